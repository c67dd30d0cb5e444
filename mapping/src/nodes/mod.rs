//! Radix nodes in memory.

pub mod cache;
