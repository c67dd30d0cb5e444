//! SIGINT and SIGTERM as a wish to stop, so that what was started is stopped too.
//!
//! Without [`watch`] the signals end the process as usual, which is right for a plain load: the
//! kernel closes its socket and frees its memory. A comparison has child processes and scratch
//! files, so it watches.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// True once a signal has asked this program to stop.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

fn signals() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals
}

/// Turns the signals into [`requested`], for all threads started from here on.
pub(crate) fn watch() -> Result<(), String> {
    signals().thread_block().map_err(|error| format!("cannot block signals: {error}"))?;
    std::thread::Builder::new()
        .name("interrupt".into())
        .spawn(|| {
            while signals().wait().is_err() {}
            REQUESTED.store(true, Ordering::Relaxed);
        })
        .map(drop)
        .map_err(|error| format!("cannot start a thread: {error}"))
}

/// Lets the signals reach the calling thread again: children inherit what a thread blocks.
pub(crate) fn unblock_in_this_thread() -> Result<(), String> {
    signals().thread_unblock().map_err(|error| format!("cannot unblock signals: {error}"))
}
