//! The `bessel` program: one command in, one exit status out.
//!
//! 0: done. 1: refused or failed, with one line on standard error that says what and why. 2: wrong
//! usage, explained by clap.

#![forbid(unsafe_code)]

mod api;
mod attach;
mod cli;
mod config;
mod control;
mod daemon;
mod entropy;
mod journals;
mod placement;
mod places;
mod plane;
mod reference;
mod size;
mod time;

use std::process::ExitCode;

// With the feature `planted` the mapping holds mistakes on purpose, for tests alone.
const _: () = assert!(!bessel_mapping::PLANTED, "bessel is not to be built with planted bugs");

fn main() -> ExitCode {
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
