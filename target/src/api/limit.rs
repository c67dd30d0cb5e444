//! Serving with bounds: on connections, and on how long each may make us wait.
//!
//! Connections are file descriptors, and those are shared with the sockets of all volumes: a client
//! that opens connections and sends nothing must not take what a guest needs to connect. At the
//! bound further clients wait in the backlog; and lest the idle ones keep them there, a connection
//! ends when its client takes longer than [`PATIENCE`] for the next request's head, for the body,
//! or for taking any more of an answer. How long we take for an answer is not bounded here.
//! A route that takes a stream reads its body itself, within bounds of its own ([`super::import`]).

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};

use super::Refusal;
use super::routes::{BODY_BYTES_MAX, takes_a_stream};

/// Longest wait for a client, idle connections included: ours send their request at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What a route that takes a stream knows of its listener's bounds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience(pub(super) Duration);

/// And where it hears that the daemon stops.
#[derive(Clone, Debug)]
pub(super) struct Stopping(pub(super) watch::Receiver<bool>);

/// Bounds of a listener.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Most connections at once.
    pub(super) connections: usize,
    /// See [`PATIENCE`].
    pub(super) patience: Duration,
}

/// Serves `router` until told to stop, then until the answers being made have left.
pub(super) async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    limits: Limits,
    mut stopping: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(limits.connections));
    let patience = limits.patience;
    let router = bounded(router, patience, &stopping);
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            let place = place.expect("the semaphore is never closed");
            (place, listener.accept().await.0)
        };
        let (place, stream) = tokio::select! {
            next = next => next,
            // An error means that the sender is gone, which is a stop as well.
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        let (router, stopping) = (router.clone(), stopping.clone());
        connections.spawn(async move {
            serve_connection(stream, router, patience, stopping).await;
            drop(place);
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// The same routes, each of which gets its whole body in bounded time or is refused; but for those that
/// take a stream.
pub(super) fn bounded(
    router: Router,
    patience: Duration,
    stopping: &watch::Receiver<bool>,
) -> Router {
    router
        .layer(middleware::from_fn(move |request, next| with_body(patience, request, next)))
        .layer(Extension(Patience(patience)))
        .layer(Extension(Stopping(stopping.clone())))
}

/// Serves one client until it hangs up, takes too long, or we are told to stop.
pub(super) async fn serve_connection<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    router: Router,
    patience: Duration,
    mut stopping: watch::Receiver<bool>,
) {
    let stream = TokioIo::new(Impatient { stream, patience, waiting: None });
    let mut server = http1::Builder::new();
    // Counts from the end of the answer before, so an idle connection ends as well.
    server.timer(TokioTimer::default()).header_read_timeout(patience);
    let mut connection = pin!(server.serve_connection(stream, TowerToHyperService::new(router)));
    // How a connection fails is its client's business.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|stop| *stop) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// Reads the whole body, in bounded time, before the request goes on.
async fn with_body(patience: Duration, request: Request, next: Next) -> Response {
    if takes_a_stream(request.uri().path()) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    match timeout(patience, to_bytes(body, BODY_BYTES_MAX)).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Ok(Err(_)) => Refusal::body_too_large(BODY_BYTES_MAX).into_response(),
        Err(_) => Refusal::malformed("the body did not come; send it at once").into_response(),
    }
}

/// A stream whose writes fail when they have made no headway for too long.
struct Impatient<S> {
    stream: S,
    patience: Duration,
    /// Runs while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    /// Passes on what became of a write, unless it has waited for too long.
    fn bounded<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let patience = self.patience;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(patience)));
        waiting.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.bounded(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.bounded(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::{get, post};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    const PATIENCE: Duration = Duration::from_millis(50);

    /// Serves at most two connections at once while `test` runs.
    fn with_server(name: &str, test: impl FnOnce(&dyn Fn(&str) -> UnixStream)) {
        let name = format!("bessel-limit-{}-{name}.sock", std::process::id());
        let path: PathBuf = std::env::temp_dir().join(name);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, stopping) = watch::channel(false);
        let router = Router::new()
            .route("/", get(|| async { "hello" }))
            .route("/body", post(|body: String| async { body }))
            .route("/v1/volumes/{name}/import", post(take_stream))
            .route("/large", get(|| async { vec![7; 8 << 20] }))
            .route("/slow", get(|| async { sleep(PATIENCE * 4).await }));
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let limits = Limits { connections: 2, patience: PATIENCE };
                serve(listener, router, limits, stopping).await;
            });
        });
        test(&|sent| {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(sent.as_bytes()).unwrap();
            stream
        });
        stop.send(true).unwrap();
        server.join().unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    /// A route that reads its body itself.
    async fn take_stream(Extension(Stopping(_)): Extension<Stopping>, body: Body) -> String {
        to_bytes(body, usize::MAX).await.unwrap().len().to_string()
    }

    fn answer(mut stream: UnixStream) -> String {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    const ASK: &str = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

    #[test]
    fn clients_that_keep_us_waiting_do_not_keep_others_out() {
        with_server("waiting", |connect| {
            for stalled in [
                "",
                "GET / HT",
                "GET / HTTP/1.1\r\nhost: x\r\n\r\n", // Answered, then idle.
                "POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf",
                "GET /large HTTP/1.1\r\nhost: x\r\n\r\n", // Never read.
            ] {
                let _stalled: Vec<_> = (0..6).map(|_| connect(stalled)).collect();
                let answered = answer(connect(ASK));
                assert!(answered.ends_with("\r\n\r\nhello"), "after {stalled:?}: {answered}");
            }
        });
    }

    #[test]
    fn an_answer_may_take_longer_than_a_client_may() {
        with_server("slow", |connect| {
            let answered = answer(connect(&ASK.replace("GET /", "GET /slow")));
            assert!(answered.starts_with("HTTP/1.1 200 "), "{answered}");
        });
    }

    #[test]
    fn a_whole_body_arrives_and_one_too_long_is_refused_unless_it_is_a_stream() {
        with_server("body", |connect| {
            let post = |length: usize| {
                let head = ASK.replace("GET /", "POST /body").replace("\r\n\r\n", "\r\n");
                let body = "x".repeat(length);
                answer(connect(&format!("{head}content-length: {length}\r\n\r\n{body}")))
            };
            assert!(post(5).ends_with("\r\n\r\nxxxxx"));
            assert!(post(BODY_BYTES_MAX + 1).starts_with("HTTP/1.1 413 "));
            let head =
                ASK.replace("GET /", "POST /v1/volumes/x/import").replace("\r\n\r\n", "\r\n");
            let length = BODY_BYTES_MAX * 100;
            let body = "x".repeat(length);
            let took = answer(connect(&format!("{head}content-length: {length}\r\n\r\n{body}")));
            assert!(took.ends_with(&format!("\r\n\r\n{length}")), "a stream is longer: {took}");
        });
    }
}
