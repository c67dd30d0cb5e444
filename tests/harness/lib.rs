//! The simulated world the whole-system tests run in.
