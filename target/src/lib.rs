//! What the `bessel` program is made of. A library only so that the fuzz targets can be built over
//! it; nothing else of it is for anybody outside.

#![forbid(unsafe_code)]

mod api;
mod attach;
mod balance;
mod cli;
mod config;
mod control;
mod daemon;
mod entropy;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod importer;
mod jobs;
mod journals;
mod keep;
mod limits;
mod placement;
mod places;
mod plane;
mod reclaimer;
mod reference;
mod scheduler;
mod size;
mod span;
mod stream;
mod time;

use std::process::ExitCode;

// With the feature `planted` the mapping holds mistakes on purpose, for tests alone.
const _: () = assert!(!bessel_mapping::PLANTED, "bessel is not to be built with planted bugs");

/// The program: reads the command line, does what it says, and gives the exit status.
pub fn run() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bessel: {}", one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// An error with its sources, outermost first, on one line. Sources whose text the error above them
/// gives already are left out.
fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line.replace('\n', " ")
}
