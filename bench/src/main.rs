//! `bessel-bench`: how fast, measured the same way twice.
//!
//! A polling vhost-user-blk front-end (`load`, `fill`) and a run of the same load against Bessel
//! and its peers, in turns (`compare`). It depends on no other crate of the workspace: what it
//! measures cannot flatter itself through shared code, and any back end can be measured.
//!
//! ```text
//! cli ──► load ──► queue ──► memory      rings and buffers, shared with the server
//!   │       └────► frontend ──► message  the vhost-user conversation that sets them up
//!   └──► compare ──► server              the processes measured, and their scratch files
//!        snapshots ──┴──► api            what snapshots cost, on Bessel alone
//! ```
//!
//! Whatever this program waits for has a bound, and whatever it starts it stops.

#![deny(unsafe_code)] // Allowed in `memory` only.

mod api;
mod cli;
mod clock;
mod compare;
#[cfg(test)]
mod fake_device;
mod frontend;
mod interrupt;
mod load;
mod memory;
mod message;
mod output;
mod pattern;
mod plan;
mod process;
mod queue;
mod report;
mod server;
mod size;
mod snapshots;
mod timeline;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bessel-bench: {message}");
            ExitCode::FAILURE
        }
    }
}
