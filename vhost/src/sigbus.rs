//! Survives a guest's memory being truncated under us (a marked `unsafe` file).
//!
//! Guest memory is a file that the front-end owns and may shrink at any time; touching a page past
//! its new end raises SIGBUS, which would end the process and with it every other guest. The
//! handler here puts private zeroes over the whole mapping that faulted and marks it poisoned: the
//! access goes on, its queue notices and stops, and nobody else is disturbed.
//!
//! Must not be broken: the handler only reads atomics and calls `mmap`, `sigaction`: nothing in it
//! may allocate, lock or log. A fault outside protected mappings goes to the handler that was
//! there before.
//!
//! The kernel does not fault on our behalf: I/O over truncated memory ends in EFAULT. Copies to and from
//! a store in memory are ours (`reactor/src/device/mapped.rs`): these go on, with zeroes.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Mappings that can be protected at once. 4096 ÷ 8, the regions of a large QEMU guest, is 512
/// guests.
const SLOTS: usize = 4096;
/// `Slot::start` of a slot that is being filled; no mapping starts at the first byte.
const RESERVED: usize = 1;

struct Slot {
    /// Address of the mapping; 0 when the slot is free.
    start: AtomicUsize,
    length: AtomicUsize,
    poisoned: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        length: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; SLOTS];

/// Counts poisonings in the process: a queue compares it with what it saw last, one load a batch.
static EVENTS: AtomicU64 = AtomicU64::new(0);

static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Protects one mapping until dropped. Drop it before unmapping.
#[derive(Debug)]
pub(crate) struct Guard {
    slot: usize,
}

/// Poisonings so far.
pub(crate) fn events() -> u64 {
    EVENTS.load(Ordering::Relaxed)
}

impl Guard {
    /// Protects the mapping of `length` bytes at `start`, both multiples of its page size. `None`
    /// when the table is full.
    ///
    /// # Safety
    /// The range must be one mapping, made by the caller and unmapped only after the guard is
    /// dropped; nothing may depend on its contents once it is poisoned.
    pub(crate) unsafe fn protect(start: usize, length: usize) -> Option<Self> {
        install();
        let slot = TABLE.iter().position(|slot| {
            slot.start.compare_exchange(0, RESERVED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        TABLE[slot].poisoned.store(false, Ordering::Relaxed);
        TABLE[slot].length.store(length, Ordering::Release);
        TABLE[slot].start.store(start, Ordering::Release);
        Some(Self { slot })
    }

    /// The mapping was truncated and now holds zeroes.
    pub(crate) fn poisoned(&self) -> bool {
        TABLE[self.slot].poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE[self.slot].start.store(0, Ordering::Release);
    }
}

fn install() {
    PREVIOUS.get_or_init(|| {
        // SAFETY: `sigaction` is plain data, for which all zeroes is a valid value.
        let (mut action, mut previous): (libc::sigaction, libc::sigaction) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: both pointers are to live values; the handler has the signature that SA_SIGINFO
        // asks for and does only what is allowed in a signal handler.
        let result = unsafe { libc::sigaction(libc::SIGBUS, &action, &mut previous) };
        assert_eq!(result, 0, "SIGBUS is a signal that can be handled");
        previous
    });
}

/// The protected mapping that holds `address`.
fn find(address: usize) -> Option<(usize, usize, &'static Slot)> {
    TABLE.iter().find_map(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        let length = slot.length.load(Ordering::Acquire);
        // A slot that changed hands between the two loads would mix two mappings.
        let stable = slot.start.load(Ordering::Acquire) == start;
        let holds = start > RESERVED && address.wrapping_sub(start) < length;
        (stable && holds).then_some((start, length, slot))
    })
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` to a SA_SIGINFO handler, with an address for
    // SIGBUS.
    let address = unsafe { (*info).si_addr() } as usize;
    // SAFETY: `__errno_location` gives this thread's errno, which `mmap` below may change under
    // the code that was interrupted.
    let errno = unsafe { *libc::__errno_location() };
    let covered = find(address).is_some_and(|(start, length, slot)| {
        // SAFETY: the range is a mapping of ours (`Guard::protect`), so replacing it takes away
        // nothing else; its users expect any bytes at any time.
        let placed = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if placed == libc::MAP_FAILED {
            return false;
        }
        slot.poisoned.store(true, Ordering::Release);
        EVENTS.fetch_add(1, Ordering::Release);
        true
    });
    // SAFETY: as for the read above.
    unsafe { *libc::__errno_location() = errno };
    if !covered {
        pass_on(signal, info, context);
    }
}

/// Does what would have happened without us.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get().filter(|previous| {
        previous.sa_sigaction != libc::SIG_DFL && previous.sa_sigaction != libc::SIG_IGN
    });
    match previous {
        Some(previous) if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: SA_SIGINFO says that the stored address is a handler of this signature.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(previous.sa_sigaction) };
            handler(signal, info, context);
        }
        Some(previous) => {
            // SAFETY: without SA_SIGINFO the stored address is a handler that takes the signal.
            let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(previous.sa_sigaction) };
            handler(signal);
        }
        None => {
            // SAFETY: restores the default action; the access then faults again and ends the
            // process, as it must.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}
