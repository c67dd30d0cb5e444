//! Speaks to the daemon: one HTTP/1.1 request over its Unix socket, one answer, closed.
//!
//! Both ends are ours and one exchange is all a command needs, so this is written out (status line,
//! headers, a body of known length) instead of bringing an HTTP client and its runtime.

use crate::api::types::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
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
    /// Longest wait for an answer; none for work that takes as long as it takes.
    timeout: Option<Duration>,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), timeout: Some(ANSWER_TIMEOUT) }
    }

    /// Waits for as long as it takes.
    pub(crate) fn patient(self) -> Self {
        Self { timeout: None, ..self }
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

    /// Asks for something that comes in pieces, to be read as it comes.
    pub(crate) fn stream(&self, path: &str) -> Result<Chunks<BufReader<UnixStream>>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let broken = |source| ClientError::BrokenOff { socket: self.socket.clone(), source };
        let foreign = |what: String| ClientError::Foreign { socket: self.socket.clone(), what };
        let mut stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        stream.set_read_timeout(self.timeout).map_err(unreachable)?;
        let head = format!("GET {path} HTTP/1.1\r\nhost: bessel\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).map_err(broken)?;
        let mut source = BufReader::with_capacity(1 << 16, stream);
        let head = read_head(&mut source).map_err(broken)?;
        let (status, chunked) = look_at_head(&head).map_err(|what| foreign(what.to_owned()))?;
        if status == 200 && chunked {
            return Ok(Chunks { source, left: 0, first: true, ended: false });
        }
        let mut body = Vec::new();
        source.take(ANSWER_SIZE_MAX).read_to_end(&mut body).map_err(broken)?;
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(refusal) => Err(ClientError::Refused(refusal.error)),
            Err(_) => Err(foreign(format!("status {status} without a reason"))),
        }
    }

    /// Sends what `produce` writes, as it comes, and waits for the answer. A daemon that has seen
    /// enough answers early and takes no more: the answer counts then, not that writing failed.
    ///
    /// # Errors
    /// The daemon's refusal, before all; else what `produce` fails with, which then ends the body in
    /// its own way; else that the daemon broke off.
    pub(crate) fn upload<T: DeserializeOwned, E: From<ClientError>>(
        &self,
        path: &str,
        produce: impl FnOnce(&mut dyn Write) -> Result<(), UploadError<E>>,
    ) -> Result<T, E> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let broken = |source| ClientError::BrokenOff { socket: self.socket.clone(), source };
        let mut stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        stream.set_read_timeout(self.timeout).map_err(unreachable)?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: bessel\r\nconnection: close\r\n\
             content-type: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        let mut sent = stream.write_all(head.as_bytes());
        let mut failed = None;
        if sent.is_ok() {
            let mut body = BufWriter::with_capacity(CHUNK_BYTES, ChunkedBody { stream: &stream });
            match produce(&mut body).and_then(|()| body.flush().map_err(UploadError::Sending)) {
                Ok(()) => {}
                Err(UploadError::Sending(error)) => sent = Err(error),
                Err(UploadError::Producing(error)) => {
                    let _ = body.flush();
                    failed = Some(error);
                }
            }
            drop(body.into_parts());
            sent = sent.and_then(|()| stream.write_all(b"0\r\n\r\n"));
        }
        let answer = read_answer(&stream);
        if let Some(error) = failed {
            return Err(error);
        }
        let answer = match (answer, sent) {
            (Ok(answer), Err(error)) if answer.is_empty() => return Err(broken(error).into()),
            (Ok(answer), _) => answer,
            (Err(error), _) => return Err(broken(error).into()),
        };
        Ok(self.understand(&answer)?)
    }

    fn exchange<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &[u8],
    ) -> Result<T, ClientError> {
        let unreachable = |source| ClientError::Unreachable { socket: self.socket.clone(), source };
        let stream = UnixStream::connect(&self.socket).map_err(unreachable)?;
        stream.set_read_timeout(self.timeout).map_err(unreachable)?;
        let answer = ask(stream, method, path, body)
            .map_err(|source| ClientError::BrokenOff { socket: self.socket.clone(), source })?;
        self.understand(&answer)
    }

    /// What a whole answer says.
    fn understand<T: DeserializeOwned>(&self, answer: &[u8]) -> Result<T, ClientError> {
        let foreign = |what: String| ClientError::Foreign { socket: self.socket.clone(), what };
        let (status, body) = split_answer(answer).map_err(|what| foreign(what.to_owned()))?;
        if (200..300).contains(&status) {
            return serde_json::from_slice(body).map_err(|error| foreign(error.to_string()));
        }
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(refusal) => Err(ClientError::Refused(refusal.error)),
            Err(_) => Err(foreign(format!("status {status} without a reason"))),
        }
    }
}

/// Why a body did not go out whole.
#[derive(Debug)]
pub(crate) enum UploadError<E> {
    /// The socket takes no more.
    Sending(std::io::Error),
    /// There is no more.
    Producing(E),
}

impl<E> From<std::io::Error> for UploadError<E> {
    fn from(error: std::io::Error) -> Self {
        Self::Sending(error)
    }
}

/// Bytes that are sent as one chunk.
const CHUNK_BYTES: usize = 1 << 20;

/// Each write is a chunk of the body.
struct ChunkedBody<'a> {
    stream: &'a UnixStream,
}

impl Write for ChunkedBody<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, std::io::Error> {
        if bytes.is_empty() {
            return Ok(0); // An empty chunk is the end.
        }
        write!(self.stream, "{:x}\r\n", bytes.len())?;
        self.stream.write_all(bytes)?;
        self.stream.write_all(b"\r\n")?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<(), std::io::Error> {
        Ok(())
    }
}

/// All that comes until the connection ends. A daemon that closes it while there is something of ours
/// to be read resets it, after its answer.
fn read_answer(mut stream: &UnixStream) -> Result<Vec<u8>, std::io::Error> {
    let mut answer = Vec::new();
    match (&mut stream).take(ANSWER_SIZE_MAX).read_to_end(&mut answer) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error),
        _ => Ok(answer),
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

/// Longest head of an answer.
const HEAD_BYTES_MAX: u64 = 64 << 10;

/// The head of an answer, up to the empty line.
fn read_head(source: &mut impl BufRead) -> Result<String, std::io::Error> {
    let mut head = String::new();
    let mut source = source.take(HEAD_BYTES_MAX);
    while !head.ends_with("\r\n\r\n") {
        if source.read_line(&mut head)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

/// The status of an answer, and whether its body comes in chunks.
fn look_at_head(head: &str) -> Result<(u16, bool), &'static str> {
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    let status =
        status.and_then(|digits| digits.parse().ok()).ok_or("the answer is no HTTP/1.1")?;
    let chunked = head.lines().filter_map(|line| line.split_once(':')).any(|(name, value)| {
        name.eq_ignore_ascii_case("transfer-encoding")
            && value.trim().eq_ignore_ascii_case("chunked")
    });
    Ok((status, chunked))
}

/// A body that comes in chunks, put together. An end without the last chunk is an error.
pub(crate) struct Chunks<R> {
    source: R,
    /// Bytes of the chunk that are to come.
    left: u64,
    first: bool,
    ended: bool,
}

impl<R: BufRead> Chunks<R> {
    /// Begins the next chunk.
    fn next(&mut self) -> Result<(), std::io::Error> {
        let mut line = String::new();
        if !std::mem::take(&mut self.first) {
            (&mut self.source).take(2).read_line(&mut line)?; // The end of the chunk before.
            line.clear();
        }
        (&mut self.source).take(1024).read_line(&mut line)?;
        let size = line.trim_end().split(';').next().unwrap_or_default();
        let bad = |_| std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it was cut short");
        self.left = u64::from_str_radix(size, 16).map_err(bad)?;
        self.ended = self.left == 0;
        Ok(())
    }
}

impl<R: BufRead> Read for Chunks<R> {
    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, std::io::Error> {
        if self.left == 0 && !self.ended {
            self.next()?;
        }
        let count = self.left.min(bytes.len() as u64) as usize;
        if count == 0 {
            return Ok(0);
        }
        let read = self.source.read(&mut bytes[..count])?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        Ok(read)
    }
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
    fn chunks_are_put_together_and_an_early_end_is_noticed() {
        let read = |bytes: &[u8]| {
            let mut all = Vec::new();
            let mut chunks = Chunks { source: bytes, left: 0, first: true, ended: false };
            chunks.read_to_end(&mut all).map(|_| all)
        };
        let whole = b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n";
        assert_eq!(read(whole).unwrap(), b"abc0123456789");
        for length in 0..whole.len() - 4 {
            assert!(read(&whole[..length]).is_err(), "{length} bytes");
        }
        assert!(read(b"zz\r\n").is_err() && read(b"ffffffffffffffffff\r\n").is_err());
        let head =
            read_head(&mut &b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nrest"[..]);
        assert_eq!(look_at_head(&head.unwrap()), Ok((200, true)));
        assert!(read_head(&mut &b"HTTP/1.1 200 OK\r\n"[..]).is_err());
    }

    #[test]
    fn a_daemon_that_is_not_there_is_named_with_what_to_do() {
        let client = Client::new(Path::new("/no/such.sock"));
        let error = client.get::<ErrorBody>("/v1/volumes").unwrap_err().to_string();
        assert!(error.starts_with("cannot reach the daemon at /no/such.sock: "), "{error}");
        assert!(error.contains("--api"), "{error}");
    }
}
