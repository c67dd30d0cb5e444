//! The daemon's API: HTTP/JSON on a Unix socket, on a thread of its own.
//!
//! Routes turn HTTP into calls of the control plane and its refusals into statuses; nothing is
//! decided here. The socket belongs to the user that runs the daemon (mode 0600), which is all the
//! authentication there is. The optional TCP listener can be reached by anyone who reaches the
//! address, so it has only what reads counters.

mod import;
mod limit;
mod metrics;
mod openapi;
mod refusal;
mod routes;
mod server;
pub(crate) mod types;

pub(crate) use refusal::{Refusal, RefusalKind};
pub(crate) use server::ApiServer;

/// Serves one connection as the Unix socket does, until its client has hung up and has all answers.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) async fn serve_connection(
    stream: tokio::net::UnixStream,
    control: crate::control::Control,
) {
    let (_running, stopping) = tokio::sync::watch::channel(false);
    let router = limit::bounded(routes::router(control), limit::PATIENCE, &stopping);
    limit::serve_connection(stream, router, limit::PATIENCE, stopping).await;
}
