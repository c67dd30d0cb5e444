//! The simulated world the whole-system tests run in.
//!
//! [`model`] says what a sector may hold. One seed is one run, on any machine.

#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "guest memory is shared with another thread or process")]
pub mod guest;
pub mod model;
pub mod plain_host;
