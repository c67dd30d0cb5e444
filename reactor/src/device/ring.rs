//! An io_uring with one registered file: entries in, answers out, and no idea of what they mean.
//!
//! This file may contain `unsafe`: entries name memory, and the ring's user promises that it stays
//! (see [`Ring::push`]).
//!
//! Hot path: `push`, `enter`, `take_answers`. They allocate nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, opcode, squeue};

use super::watch::WATCHES_MAX;
use crate::buffer::{BufferPool, Segment};
use crate::clock::SystemClock;

/// Buffers that can be registered at once: 1 TiB of guest memory in regions of 1 GiB.
pub const BUFFERS_MAX: u32 = 1024;

/// How long a device may take to answer the first read that is polled for.
const PROBE_MAX: Duration = Duration::from_secs(5);

/// The ring's file is the only registered one.
pub(super) const FILE: Fixed = Fixed(0);

/// A ring, and how many entries the kernel has not been told of.
///
/// The first thread that enters it owns it from then on (`IORING_SETUP_SINGLE_ISSUER`; it is made
/// disabled, and enabled at that moment).
pub(super) struct Ring {
    ring: IoUring,
    queued: usize,
    /// The thread that uses the ring is known to the kernel.
    enabled: bool,
}

/// [`IoUring`] has no `Debug` of its own.
impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { ring, queued, enabled } = self;
        let (ring, polled) = (ring.as_raw_fd(), ring.params().is_setup_iopoll());
        write!(f, "Ring {{ ring: {ring}, polled: {polled}, queued: {queued}, enabled: {enabled} }}")
    }
}

impl Ring {
    /// Makes a ring for so many operations in flight, polls for all watches beside them, and an end for
    /// each of these. A thread may sleep in it.
    ///
    /// What is left of an operation after the device's interrupt is done at our next entry to the
    /// kernel or return from it, and a flag in shared memory says when one is due
    /// (`IORING_SETUP_COOP_TASKRUN`), so a turn that finds nothing costs no system call. The
    /// alternative is to do it only when we enter the ring (`DEFER_TASKRUN`). Measured with 4 KiB
    /// random reads at depth 32 on ext4 and a virtio disk (2 virtual cores, Linux 6.18;
    /// medians of three asleep, means of two polling):
    ///
    /// | thousand reads a second (CPU each)  | cooperative   | deferred      | neither       |
    /// | ----------------------------------- | ------------- | ------------- | ------------- |
    /// | asleep in the ring between them     | 82.7 (2.3 us) | 73.6 (3.3 us) | 82.7 (2.3 us) |
    /// | polling (all are limited by disk)   | 99 (9.8 us)   | 94 (10.0 us)  | 94 (10.0 us)  |
    ///
    /// Deferred, a sleeper wakes for the first completion and takes it alone; otherwise the whole batch
    /// is there when it wakes. Deferred and entering at each turn took 47 entries an operation.
    pub(super) fn new(file: &File, depth: u32) -> io::Result<Self> {
        Self::with(file, depth, depth + 2 * WATCHES_MAX as u32, |_| {})
    }

    /// Makes a ring whose operations are not announced by the device: each [`Ring::enter`] asks it for those
    /// that are done (`IORING_SETUP_IOPOLL`), and nothing else finds them. It takes reads and writes only.
    ///
    /// Nobody waits in it: the kernel would look for an answer until it has found one, and with a queue that
    /// is shared somebody else may have found it.
    pub(super) fn polled(file: &File, depth: u32) -> io::Result<Self> {
        Self::with(file, depth, depth, |builder| {
            builder.setup_iopoll();
        })
    }

    fn with(
        file: &File,
        depth: u32,
        answers: u32,
        set_up: impl Fn(&mut Builder),
    ) -> io::Result<Self> {
        let ring = with_the_best_there_is(depth, answers, set_up)?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        Ok(Self { ring, queued: 0, enabled: false })
    }

    /// Most answers that may be there at once.
    pub(super) fn answers_max(&self) -> usize {
        self.ring.params().cq_entries() as usize
    }

    /// Entries that the kernel has not been told of.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// The kernel says that it has put completions off until it is entered.
    pub(super) fn is_due(&mut self) -> bool {
        self.ring.submission().taskrun()
    }

    /// Puts an entry into the ring, making room if there is none.
    ///
    /// # Safety
    /// What the entry names, a buffer or a table of pieces and their memory, stays where it is until the
    /// answer to it was taken. That the ring was dropped is not enough: the kernel goes on without it.
    pub(super) unsafe fn push(&mut self, entry: squeue::Entry, user_data: u64) {
        let entry = entry.user_data(user_data);
        loop {
            // SAFETY: by the caller's promise.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_ok() {
                self.queued += 1;
                return;
            }
            self.hand_over();
        }
    }

    /// Hands queued entries to the kernel. A device that is polled is not asked for any answer.
    pub(super) fn hand_over(&mut self) {
        self.enable();
        let queued = self.ring.submission().len() as u32;
        // SAFETY: the kernel is told of no memory but that of the entries (see `push`).
        let result = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, 0, 0, None) };
        self.submitted(result);
    }

    /// Hands queued entries to the kernel, lets it post what it has put off, and waits for so many answers.
    ///
    /// # Panics
    /// When an answer is waited for that must be polled for.
    pub(super) fn enter(&mut self, want: usize) {
        assert!(
            want == 0 || !self.ring.params().is_setup_iopoll(),
            "nobody waits in a polled ring"
        );
        self.enable();
        let result = self.ring.submitter().submit_and_wait(want);
        self.submitted(result);
    }

    /// Hands queued entries to the kernel and sleeps until there is an answer, or `timeout` has passed
    /// (`None`: never).
    pub(super) fn sleep(&mut self, timeout: Option<Duration>) {
        let Some(timeout) = timeout else { return self.enter(1) };
        self.enable();
        let timespec = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&timespec);
        let result = self.ring.submitter().submit_with_args(1, &args);
        // The wait ends early only when all was submitted, whatever ended it.
        self.submitted(result);
    }

    /// Appends the answers that are there, each with its `user_data`. No system call.
    pub(super) fn take_answers(&mut self, answers: &mut Vec<(u64, i32)>) {
        let there = self.ring.completion();
        answers.extend(there.map(|entry| (entry.user_data(), entry.result())));
    }

    /// Makes the table of registered buffers; its free numbers, none when the kernel has no such table.
    pub(super) fn make_buffer_table(&self) -> Vec<u32> {
        match self.ring.submitter().register_buffers_sparse(BUFFERS_MAX) {
            Ok(()) => (0..BUFFERS_MAX).rev().collect(),
            Err(error) => {
                tracing::warn!(%error, "no registered buffers on this kernel, going on without");
                vec![]
            }
        }
    }

    /// Pins a region and puts it into the table, or with `None` takes out what is there.
    pub(super) fn set_buffer(&mut self, index: u32, region: Option<&Segment>) -> io::Result<()> {
        self.enable();
        if region.is_none() {
            // Entries not yet seen by the kernel name the buffer; they must find it.
            self.enter(0);
        }
        let piece = match region {
            Some(region) => libc::iovec { iov_base: region.as_ptr().cast(), iov_len: region.len() },
            None => libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
        };
        // SAFETY: the region is mapped by the promise of `Segment::new`. The kernel pins its pages,
        // so even if it is unmapped early they stay allocated until unregistered. An empty piece takes
        // the old one out of the table and names no memory.
        unsafe { self.ring.submitter().register_buffers_update(index, &[piece], None) }
    }

    /// Tells the kernel that this thread will use the ring from now on.
    fn enable(&mut self) {
        if !self.enabled {
            self.enabled = true;
            self.ring.submitter().register_enable_rings().expect("the ring was made disabled");
        }
    }

    fn submitted(&mut self, result: io::Result<usize>) {
        match result {
            Ok(_) => {}
            // Out of memory or of room for answers for now, interrupted, or time is up. What was
            // not taken stays queued, and the next turn hands it over.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EBUSY | libc::EINTR | libc::ENOMEM | libc::ETIME)
                ) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                panic!("a device is used on two threads")
            }
            Err(error) => panic!("io_uring_enter refused our ring: {error}"),
        }
        self.queued = self.ring.submission().len();
    }
}

/// Makes the ring, with the best of what this kernel has.
fn with_the_best_there_is(
    depth: u32,
    answers: u32,
    set_up: impl Fn(&mut Builder),
) -> io::Result<IoUring> {
    // Entries beyond a batch of operations (polls, continuations) are handed over early when the
    // ring is full; answers have room for one for each operation, poll and removal of a poll.
    let entries = depth.max(64).next_power_of_two();
    let answers = answers.max(entries).next_power_of_two();
    let refused = |ring: &io::Result<IoUring>| {
        ring.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    };
    let mut builder = IoUring::builder();
    builder.setup_cqsize(answers).setup_r_disabled();
    set_up(&mut builder);
    let plain = builder.clone();
    builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
    let cooperative = builder.clone();
    builder.setup_single_issuer();

    let mut ring = builder.build(entries); // Linux 6.0.
    if refused(&ring) {
        ring = cooperative.build(entries); // Linux 5.19.
    }
    if refused(&ring) {
        ring = plain.build(entries);
    }
    ring
}

/// Whether the kernel and the file's device take operations that are to be polled for: reads a page of it.
/// If not, why not.
///
/// The device is asked by doing it: a device made of others may not pass the question on, and each kernel
/// says so elsewhere. The file is not used for anything else: a read that is never answered keeps it open.
pub(super) fn probe(file: File) -> Result<(), &'static str> {
    let mut pool = BufferPool::new(1, 4096);
    let buffer = pool.take().expect("the pool was made with one buffer");
    let page = pool.lend(&buffer);
    let Ok(mut ring) = Ring::polled(&file, 1) else { return Err("there is no ring for that") };
    let read = opcode::Read::new(FILE, page.as_ptr(), page.len() as u32).build();
    // SAFETY: the page is the pool's, which is dropped when there is an answer, and else never.
    unsafe { ring.push(read, 0) };
    let mut answers = Vec::with_capacity(1);
    let clock = SystemClock::start();
    let begun = clock.now();
    loop {
        ring.enter(0);
        ring.take_answers(&mut answers);
        match answers[..] {
            // Another error than "not that way" may be of this page alone.
            [(_, answer)] if [-libc::EOPNOTSUPP, -libc::EINVAL].contains(&answer) => {
                return Err("it refuses a read that is polled for");
            }
            [_] => return Ok(()),
            _ => {}
        }
        if clock.now().since(begun) > PROBE_MAX {
            // It may still write to the page.
            std::mem::forget((ring, pool));
            return Err("it takes a read that is polled for, and does not answer");
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_that_it_cannot_be_polled_is_believed() {
        let path =
            std::path::Path::new("/dev/shm").join(format!("bessel-poll-{}", std::process::id()));
        std::fs::write(&path, [0; 4096]).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let refusal = probe(file).expect_err("a file on tmpfs has no queues");
        assert!(refusal.contains("refuses"), "{refusal}");
    }
}
