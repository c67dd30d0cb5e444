//! Speaks to the daemon: one HTTP/1.1 request over its Unix socket, one answer, closed.
//!
//! Both ends are ours and one exchange is all a command needs, so this is written out (status line,
//! headers, a body of known length) instead of bringing an HTTP client and its runtime.

use crate::api::types::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest wait for an answer. Commands take milliseconds; a commit on a slow disk takes seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest answer: the tree of a store with its most snapshots.
const ANSWER_SIZE_MAX: u64 = 1 << 30;

/// Why a command did not get its answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error(
        "cannot reach the daemon at {socket}: {source}; is `bessel serve` running? name its \
         socket with --api or BESSEL_API"
    )]
    Unreachable { socket: PathBuf, source: std::io::Error },
    #[error("the daemon at {socket} broke off: {source}; its log says more")]
    BrokenOff { socket: PathBuf, source: std::io::Error },
    #[error("{socket} does not speak the API of this version: {what}; is it `bessel serve`?")]
    Foreign { socket: PathBuf, what: String },
    /// The daemon's own words.
    #[error("{0}")]
    Refused(String),
}

/// A daemon, by the path of its socket.
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.exchange("GET", path, b"")
    }

    pub(crate) fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.exchange("POST", path, &to_json(body))
    }

    pub(crate) fn put<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.exchange("PUT", path, &to_json(body))
    }

    pub(crate) fn patch<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        self.exchange("PATCH", path, &to_json(body))
    }

    pub(crate) fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.exchange("DELETE", path, b"")
    }

    fn exchange<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Result<T, ClientError> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(unreachable)?;
        let answer = ask(stream, method, path, body)
            .map_err(|source| ClientError::BrokenOff { socket: self.socket.clone(), source })?;
        let foreign = |what: String| ClientError::Foreign { socket: self.socket.clone(), what };
        let (status, body) = split_answer(&answer).map_err(|what| foreign(what.to_owned()))?;
        if (200..300).contains(&status) {
            return serde_json::from_slice(body).map_err(|error| foreign(error.to_string()));
        }
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(refusal) => Err(ClientError::Refused(refusal.error)),
            Err(_) => Err(foreign(format!("status {status} without a reason"))),
        }
    }
}

fn to_json<B: Serialize>(body: &B) -> Vec<u8> {
    serde_json::to_vec(body).expect("the API's requests have string keys and finite numbers")
}

fn ask(
    mut stream: UnixStream,
    method: &str,
    path: &str,
    body: &[u8],
) -> Result<Vec<u8>, std::io::Error> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: bessel\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.take(ANSWER_SIZE_MAX).read_to_end(&mut answer)?;
    Ok(answer)
}

/// Status and body of an HTTP answer that ended with its connection.
fn split_answer(answer: &[u8]) -> Result<(u16, &[u8]), &'static str> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.ok_or("the answer has no end of headers")?;
    let head = std::str::from_utf8(&answer[..end]).map_err(|_| "the headers are no text")?;
    let body = &answer[end + 4..];
    let mut lines = head.split("\r\n");
    let status_line = lines.next().unwrap_or_default();
    let status = status_line
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .and_then(|digits| digits.parse().ok())
        .ok_or("the answer is no HTTP/1.1")?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or("the answer has no length")?;
    if body.len() != length {
        return Err("the answer was cut short");
    }
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart_only_when_it_is_whole() {
        let whole = b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\nx: y\r\n\r\n{}";
        assert_eq!(split_answer(whole), Ok((409, &b"{}"[..])));
        assert!(split_answer(&whole[..whole.len() - 1]).is_err(), "cut short");
        assert!(split_answer(b"HTTP/1.1 200 OK\r\n\r\n{}").is_err(), "no length");
        assert!(split_answer(b"SSH-2.0-x\r\ncontent-length: 0\r\n\r\n").is_err(), "not HTTP");
        assert!(split_answer(b"").is_err());
    }

    #[test]
    fn a_daemon_that_is_not_there_is_named_with_what_to_do() {
        let client = Client::new(Path::new("/no/such.sock"));
        let error = client.get::<ErrorBody>("/v1/volumes").unwrap_err().to_string();
        assert!(error.starts_with("cannot reach the daemon at /no/such.sock: "), "{error}");
        assert!(error.contains("--api"), "{error}");
    }
}
