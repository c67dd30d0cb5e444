//! The control plane: one thread that owns names, placement and servers, and changes them one
//! operation at a time.
//!
//! The API sends it closures and waits for their results, so each operation reads top down as a
//! method of [`ControlPlane`] and never meets another half done. It reaches the reactors by
//! messages only (see `attach`); a reactor never waits for it. What takes long it does in pieces, between
//! two operations.

use crate::api::Refusal;
use crate::plane::{ControlPlane, Step};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Most imports at once: each has a thread, a connection, and a MiB on its way to the device.
const IMPORTS_MAX: usize = 8;

type Job = Box<dyn FnOnce(&mut ControlPlane) + Send>;

/// Sends operations to the control plane. Clones send to the same.
#[derive(Clone)]
pub(crate) struct Control {
    jobs: mpsc::Sender<Job>,
    /// Places for imports.
    imports: Arc<Semaphore>,
}

/// The thread that carries them out.
pub(crate) struct ControlThread {
    thread: JoinHandle<ControlPlane>,
}

impl Control {
    /// Starts the thread. It ends when the last clone of the `Control` is gone.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub(crate) fn start(mut plane: ControlPlane) -> std::io::Result<(Self, ControlThread)> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let thread =
            std::thread::Builder::new().name("bessel-control".to_owned()).spawn(move || {
                while let Some(job) = next_job(&inbox, &mut plane) {
                    job(&mut plane);
                }
                plane
            })?;
        let imports = Arc::new(Semaphore::new(IMPORTS_MAX));
        Ok((Self { jobs, imports }, ControlThread { thread }))
    }

    /// A place for one more import, until it is dropped.
    ///
    /// # Errors
    /// When all are taken.
    pub(crate) fn place_for_import(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        Arc::clone(&self.imports).try_acquire_owned().map_err(|_| {
            Refusal::conflict(format!(
                "{IMPORTS_MAX} imports are under way, and no more run at once; wait until one has ended"
            ))
        })
    }

    /// Runs `operation` after those that were sent before it, and does not wait for it.
    ///
    /// # Errors
    /// When the control plane has ended.
    pub(crate) fn send(
        &self,
        operation: impl FnOnce(&mut ControlPlane) + Send + 'static,
    ) -> Result<(), Refusal> {
        self.jobs.send(Box::new(operation)).map_err(|_| Refusal::stopping())
    }

    /// Runs `operation` after those that were sent before it, and waits for what it comes to. For
    /// threads of their own: not for the API's.
    pub(crate) fn call_and_wait<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut ControlPlane) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(move |plane| {
            // The asker waits, so there is someone to take it and room for it.
            let _ = answer.send(operation(plane));
        })?;
        answered.recv().unwrap_or_else(|_| Err(Refusal::stopping()))
    }

    /// Runs `operation` after those that were sent before it. It is carried out also when the
    /// asker has gone away meanwhile.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut ControlPlane) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |plane| {
            // The asker may have hung up; the operation has happened all the same.
            let _ = answer.send(operation(plane));
        });
        self.jobs.send(job).map_err(|_| Refusal::stopping())?;
        answered.await.unwrap_or_else(|_| Err(Refusal::stopping()))
    }
}

/// How soon to look again whether what the plane waits for has come.
const LOOK: Duration = Duration::from_millis(10);

/// Waits for the next operation, and has the plane do in the meantime what it has put off. None when
/// nobody can ask for anything any more.
fn next_job(inbox: &mpsc::Receiver<Job>, plane: &mut ControlPlane) -> Option<Job> {
    loop {
        match plane.work() {
            Step::Done => return inbox.recv().ok(),
            Step::More => match inbox.try_recv() {
                Err(TryRecvError::Empty) => {}
                other => return other.ok(),
            },
            Step::Later => match inbox.recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) => {}
                other => return other.ok(),
            },
        }
    }
}

impl ControlThread {
    /// Waits for the operations that were sent and takes the control plane back.
    ///
    /// # Panics
    /// With the thread's panic, if it panicked.
    pub(crate) fn join(self) -> ControlPlane {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
