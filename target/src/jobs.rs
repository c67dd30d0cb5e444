//! Long work that is under way, and how far it has come: for who asks.
//!
//! Whoever does such work holds a [`Job`] and tells it of each piece; when the work has ended, however it
//! ended, the job is dropped and no longer listed. Telling costs an atomic addition.

use crate::api::types::{JobKind, JobView};
use crate::time::rfc3339;
use bessel_reactor::clock::{SystemClock, WallTime};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// "Nobody knows how much there is."
const UNKNOWN: u64 = u64::MAX;

/// All jobs. Clones show the same.
#[derive(Clone)]
pub(crate) struct Jobs {
    listed: Arc<Mutex<Listed>>,
    clock: SystemClock,
}

#[derive(Default)]
struct Listed {
    /// Jobs that were begun so far.
    begun: u64,
    jobs: BTreeMap<u64, Entry>,
}

struct Entry {
    kind: JobKind,
    subject: String,
    started: WallTime,
    progress: Arc<Progress>,
}

struct Progress {
    done: AtomicU64,
    /// Or [`UNKNOWN`].
    total: AtomicU64,
}

/// One piece of long work. Dropping it takes it off the list.
pub(crate) struct Job {
    id: u64,
    listed: Arc<Mutex<Listed>>,
    progress: Arc<Progress>,
}

impl Jobs {
    pub(crate) fn new(clock: SystemClock) -> Self {
        Self { listed: Arc::default(), clock }
    }

    /// Lists work on `subject`, of so many bytes if that is known.
    pub(crate) fn begin(&self, kind: JobKind, subject: &str, total_bytes: Option<u64>) -> Job {
        let progress = Arc::new(Progress {
            done: AtomicU64::new(0),
            total: AtomicU64::new(total_bytes.unwrap_or(UNKNOWN)),
        });
        let mut listed = lock(&self.listed);
        listed.begun += 1;
        let id = listed.begun;
        let entry = Entry {
            kind,
            subject: subject.to_owned(),
            started: self.clock.wall(),
            progress: Arc::clone(&progress),
        };
        listed.jobs.insert(id, entry);
        Job { id, listed: Arc::clone(&self.listed), progress }
    }

    /// What is under way, in the order in which it was begun.
    pub(crate) fn list(&self) -> Vec<JobView> {
        let listed = lock(&self.listed);
        let view = |(id, entry): (&u64, &Entry)| {
            let total = entry.progress.total.load(Ordering::Relaxed);
            JobView {
                id: *id,
                kind: entry.kind,
                subject: entry.subject.clone(),
                done_bytes: entry.progress.done.load(Ordering::Relaxed),
                total_bytes: (total != UNKNOWN).then_some(total),
                started: rfc3339(entry.started),
            }
        };
        listed.jobs.iter().map(view).collect()
    }
}

impl Job {
    /// So many bytes more are done.
    pub(crate) fn advance(&self, bytes: u64) {
        self.progress.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How much there is has become known.
    pub(crate) fn set_total(&self, total_bytes: u64) {
        self.progress.total.store(total_bytes, Ordering::Relaxed);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        lock(&self.listed).jobs.remove(&self.id);
    }
}

fn lock(listed: &Mutex<Listed>) -> MutexGuard<'_, Listed> {
    listed.lock().expect("no holder of this lock panics")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_listed_with_its_progress_until_it_ends() {
        let jobs = Jobs::new(SystemClock::start());
        let export = jobs.begin(JobKind::Export, "1.0", Some(100));
        let import = jobs.clone().begin(JobKind::Import, "vm1", None);
        export.advance(30);
        export.advance(12);
        let shown = |jobs: &Jobs| -> Vec<_> {
            let list = jobs.list().into_iter();
            list.map(|job| (job.id, job.subject, job.done_bytes, job.total_bytes)).collect()
        };
        assert_eq!(
            shown(&jobs),
            [(1, "1.0".to_owned(), 42, Some(100)), (2, "vm1".to_owned(), 0, None)]
        );
        drop(export);
        import.set_total(7);
        assert_eq!(shown(&jobs), [(2, "vm1".to_owned(), 0, Some(7))]);
        drop(import);
        let third = jobs.begin(JobKind::Export, "1.0", None);
        assert_eq!(shown(&jobs), [(3, "1.0".to_owned(), 0, None)], "numbers are not used again");
        drop(third);
        assert!(jobs.list().is_empty());
    }
}
