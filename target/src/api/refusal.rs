//! An operation that was refused or failed, with the HTTP status it stands for.

use super::types::ErrorBody;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

/// What the asker may do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RefusalKind {
    /// The request makes no sense: change it.
    Malformed,
    /// There is no such thing: name another.
    NotFound,
    /// Not in this state: change the state first.
    Conflict,
    /// Too much at once: send less.
    TooLarge,
    /// The route has other methods.
    Method,
    /// The store is full: free space.
    NoSpace,
    /// The store or the device failed: look at the log.
    Failed,
    /// What the volume has on the device contradicts itself or cannot be read: check the store.
    Damaged,
    /// The daemon is going away.
    Stopping,
}

/// A refused operation. The message is one line: what is wrong and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    pub(crate) kind: RefusalKind,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn malformed(message: impl ToString) -> Self {
        Self::new(RefusalKind::Malformed, message.to_string())
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::NotFound, message)
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Conflict, message)
    }

    pub(crate) fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("the body is longer than {bytes_max} bytes; send less");
        Self::new(RefusalKind::TooLarge, message)
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Failed, message)
    }

    pub(crate) fn stopping() -> Self {
        Self::new(RefusalKind::Stopping, "the daemon is stopping; start it again")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.kind {
            RefusalKind::Malformed => StatusCode::BAD_REQUEST,
            RefusalKind::NotFound => StatusCode::NOT_FOUND,
            RefusalKind::Conflict => StatusCode::CONFLICT,
            RefusalKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            RefusalKind::Method => StatusCode::METHOD_NOT_ALLOWED,
            RefusalKind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
            RefusalKind::Failed | RefusalKind::Damaged => StatusCode::INTERNAL_SERVER_ERROR,
            RefusalKind::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(ErrorBody { error: self.message })).into_response()
    }
}
