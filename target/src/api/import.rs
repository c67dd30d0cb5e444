//! Routes that take a stream: a volume is imported.
//!
//! Every other body comes whole and at once ([`super::limit`]); a stream comes as it comes, and what
//! feeds it may be somebody's pipe. So its bounds are its own: so many imports at once, so many pieces
//! waiting for the device, and so long without a byte. The thread that takes the stream apart ends when
//! it ends, whyever that is, and its answer is the route's.

use super::Refusal;
use super::limit::{Patience, Stopping};
use super::routes::{Answer, SnapshotName, VolumeName};
use super::types::Imported;
use crate::control::Control;
use crate::importer::{self, ImportRequest};
use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::{Extension, Json};
use hyper::body::Body as _;
use std::future::poll_fn;
use std::io::{self, Read};
use std::pin::{Pin, pin};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Pieces of a stream that have been received and not taken apart. A connection reads at most some
/// hundred KiB at once.
const PIECES_WAITING: usize = 4;

/// How often the patience that other bodies find.
const PATIENCE_FACTOR: u32 = 12;

/// The `{name}` and the `{snapshot}` of a path, checked.
pub(super) struct VolumeFromSnapshot(VolumeName, SnapshotName);

impl<S: Send + Sync> FromRequestParts<S> for VolumeFromSnapshot {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path((name, snapshot)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Refusal::malformed(rejection.body_text()))?;
        Ok(Self(VolumeName::check(&name)?, SnapshotName::check(&snapshot)?))
    }
}

pub(super) async fn import_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    Extension(patience): Extension<Patience>,
    Extension(stopping): Extension<Stopping>,
    body: Body,
) -> Answer<Imported> {
    let request = ImportRequest { name, from: None };
    import(control, request, (patience, stopping), body).await.map(Json)
}

pub(super) async fn import_difference(
    State(control): State<Control>,
    VolumeFromSnapshot(VolumeName(name), SnapshotName(from)): VolumeFromSnapshot,
    Extension(patience): Extension<Patience>,
    Extension(stopping): Extension<Stopping>,
    body: Body,
) -> Answer<Imported> {
    let request = ImportRequest { name, from: Some(from) };
    import(control, request, (patience, stopping), body).await.map(Json)
}

async fn import(
    control: Control,
    request: ImportRequest,
    bounds: (Patience, Stopping),
    body: Body,
) -> Result<Imported, Refusal> {
    let place = control.place_for_import()?;
    let (sender, pieces) = mpsc::channel(PIECES_WAITING);
    let (answer, mut answered) = oneshot::channel();
    let work = move || {
        let source = Source { pieces, rest: Bytes::new() };
        let outcome = importer::run(&control, request, source);
        drop((control, place));
        // The asker may have hung up.
        let _ = answer.send(outcome);
    };
    let spawned = std::thread::Builder::new().name("bessel-import".to_owned()).spawn(work);
    spawned.map_err(|error| Refusal::failed(format!("cannot start a thread: {error}")))?;
    let mut fed = pin!(feed(body, sender, bounds));
    let outcome = tokio::select! {
        outcome = &mut answered => outcome,
        () = &mut fed => answered.await,
    };
    outcome.unwrap_or_else(|_| Err(Refusal::failed("the import ended early; see the log")))
}

/// Passes a body on, piece by piece, until it ends or nobody takes it. Why it ends early is passed on
/// last.
async fn feed(
    mut body: Body,
    sender: mpsc::Sender<Result<Bytes, Refusal>>,
    (Patience(patience), Stopping(mut stopping)): (Patience, Stopping),
) {
    let patience = patience * PATIENCE_FACTOR;
    // An error means that the sender is gone, which is a stop as well.
    let mut stopped = pin!(async move { drop(stopping.wait_for(|stop| *stop).await) });
    loop {
        let frame = poll_fn(|context| Pin::new(&mut body).poll_frame(context));
        let next = tokio::select! {
            next = timeout(patience, frame) => next,
            () = &mut stopped => {
                let _ = sender.send(Err(Refusal::stopping())).await;
                return;
            }
        };
        let piece = match next {
            Ok(None) => return,
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(bytes) => Ok(bytes),
                Err(_) => continue, // Trailers, which nobody needs.
            },
            Ok(Some(Err(_))) => Err(Refusal::malformed("its sender broke off")),
            Err(_) => Err(Refusal::malformed(format!(
                "nothing came for {} seconds; put a file between",
                patience.as_secs()
            ))),
        };
        let ends = piece.is_err();
        if sender.send(piece).await.is_err() || ends {
            return;
        }
    }
}

/// What was received, for the thread.
struct Source {
    pieces: mpsc::Receiver<Result<Bytes, Refusal>>,
    rest: Bytes,
}

impl Read for Source {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(Ok(piece)) => self.rest = piece,
                Some(Err(refusal)) => return Err(io::Error::other(refusal)),
            }
        }
        let count = self.rest.len().min(bytes.len());
        bytes[..count].copy_from_slice(&self.rest.split_to(count));
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::RefusalKind;
    use super::*;
    use hyper::body::Frame;
    use std::convert::Infallible;
    use std::task::{Context, Poll};
    use std::time::Duration;
    use tokio::sync::watch;

    /// Brings one piece, and then nothing for ever.
    struct Stalled(Option<Bytes>);

    impl hyper::body::Body for Stalled {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            match self.0.take() {
                Some(bytes) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
                None => Poll::Pending,
            }
        }
    }

    /// What a thread gets of a stream that stalls.
    fn stalled(patience: Duration, stop: bool) -> (String, Refusal) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (sender, pieces) = mpsc::channel(PIECES_WAITING);
        let (tell, stopping) = watch::channel(false);
        let thread = std::thread::spawn(move || {
            let mut source = Source { pieces, rest: Bytes::new() };
            let mut text = [0; 5];
            source.read_exact(&mut text).unwrap();
            if stop {
                tell.send(true).unwrap();
            }
            let error = source.read(&mut text).unwrap_err();
            let refusal = error.get_ref().unwrap().downcast_ref::<Refusal>().unwrap().clone();
            drop(tell);
            (String::from_utf8(text.to_vec()).unwrap(), refusal)
        });
        let body = Body::new(Stalled(Some(Bytes::from_static(b"hello"))));
        runtime.block_on(feed(body, sender, (Patience(patience), Stopping(stopping))));
        thread.join().unwrap()
    }

    #[test]
    fn a_stream_that_stalls_ends_with_the_reason() {
        let (text, refusal) = stalled(Duration::from_millis(5), false);
        assert_eq!((&*text, refusal.kind), ("hello", RefusalKind::Malformed));
        assert!(refusal.message.contains("nothing came for"), "{refusal}");
    }

    #[test]
    fn a_daemon_that_stops_waits_for_no_stream() {
        let (text, refusal) = stalled(Duration::from_secs(1 << 20), true);
        assert_eq!((&*text, refusal), ("hello", Refusal::stopping()));
    }
}
