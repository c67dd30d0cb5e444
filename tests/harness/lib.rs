//! The simulated world the whole-system tests run in.
//!
//! [`world`] runs the real `mapping` over a simulated disk, [`model`] says what it may answer,
//! [`workload`] makes up what to ask. One seed is one run, on any machine.

#![deny(unsafe_code)]

pub mod fuzz;
#[expect(unsafe_code, reason = "guest memory is shared with another thread or process")]
pub mod guest;
pub mod model;
pub mod operations;
pub mod plain_host;
pub mod seeds;
pub mod workload;
pub mod world;
