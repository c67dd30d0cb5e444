//! Speaks to Bessel's API: one request over its Unix socket, one answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A daemon, by the path of its API socket.
pub(crate) struct Api {
    pub(crate) socket: PathBuf,
}

impl Api {
    /// Sends a request that must succeed, and returns its answer.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let failed = |what: String| format!("{method} {path}: {what}");
        let answer =
            self.exchange(method, path, body).map_err(|error| failed(error.to_string()))?;
        let text = String::from_utf8_lossy(&answer);
        let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| failed("no answer".into()))?;
        if !head.starts_with("HTTP/1.1 200 ") {
            return Err(failed(body.trim().to_owned()));
        }
        serde_json::from_str(body).map_err(|error| failed(error.to_string()))
    }

    fn exchange(&self, method: &str, path: &str, body: &Value) -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: bessel\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    }
}
