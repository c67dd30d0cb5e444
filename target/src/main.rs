//! The `bessel` program: one command in, one exit status out.
//!
//! 0: done. 1: refused or failed, with one line on standard error that says what and why. 2: wrong
//! usage, explained by clap.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    bessel::run()
}
