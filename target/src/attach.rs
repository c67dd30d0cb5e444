//! Joins guests to volumes: the only code that knows both `vhost` and `mapping`.
//!
//! ```text
//! vhost server ──start/stop──▶ host.rs ──┐                     ┌─▶ queues of guests
//! control plane ───commands──▶ port.rs ──┼─▶ inbox ─▶ core.rs ─┤
//! imports ───────────orders──▶ port.rs ──┘       ▲             └─▶ shard ─▶ device
//! other cores ─────blocks────────────────────────┘
//! ```
//!
//! `core.rs` is the hot path: what one reactor polls, which volume's turn it is (`shares.rs`) and how much
//! of it its limits allow (`limiter.rs`). Everything else is control path and reaches a
//! core by messages only.

mod core;
mod counters;
mod host;
mod limiter;
mod memory;
mod orders;
mod port;
mod shares;

pub(crate) use self::core::{Core, CoreSeat};
pub(crate) use counters::CoreCounters;
pub(crate) use host::{VolumeHost, Way};
pub(crate) use limiter::{Limiter, Throttled};
pub(crate) use orders::{Order, OrderMemory};
pub(crate) use port::{Answer, CoreMessage, CorePort};
