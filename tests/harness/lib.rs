//! The simulated world the whole-system tests run in.
//!
//! [`model`] says what a sector may hold. One seed is one run, on any machine.

#![forbid(unsafe_code)]

pub mod model;
