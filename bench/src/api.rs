//! Speaks to Bessel's API: HTTP over its Unix socket.
//!
//! [`Api::ask`] is for one request now and then. A [`Connection`] is for many: it stays open, and
//! several requests may be under way on it, which the daemon answers one after the other.

use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Longest answer that we take: that of a thousand volumes is a megabyte.
const BODY_BYTES_MAX: usize = 256 << 20;

/// A daemon, by the path of its API socket.
pub(crate) struct Api {
    pub(crate) socket: PathBuf,
}

/// What came back.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Api {
    /// Sends a request that must succeed, and returns its answer.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        self.connect()?.ask(method, path, body)
    }

    /// Sends a request, and returns whatever comes back.
    pub(crate) fn try_ask(&self, method: &str, path: &str, body: &Value) -> Result<Answer, String> {
        self.connect()?.try_ask(method, path, body)
    }

    /// A connection for many requests. The daemon ends it when nothing comes for some seconds.
    pub(crate) fn connect(&self) -> Result<Connection, String> {
        let connect = || -> std::io::Result<Connection> {
            let stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            Ok(Connection { answers: BufReader::new(stream.try_clone()?), stream })
        };
        let socket = self.socket.display();
        connect().map_err(|error| format!("cannot connect to the API at {socket}: {error}"))
    }
}

/// An open connection.
pub(crate) struct Connection {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Connection {
    /// Sends a request that must succeed, and returns its answer.
    pub(crate) fn ask(&mut self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let Answer { status, body } = self.try_ask(method, path, body)?;
        succeeded(status, body).map_err(|what| format!("{method} {path}: {what}"))
    }

    fn try_ask(&mut self, method: &str, path: &str, body: &Value) -> Result<Answer, String> {
        self.exchange(method, path, body).map_err(|error| format!("{method} {path}: {error}"))
    }

    fn exchange(&mut self, method: &str, path: &str, body: &Value) -> std::io::Result<Answer> {
        self.stream.write_all(request(method, path, body).as_bytes())?;
        self.receive()
    }

    /// Sends the same request `count` times in one go, and waits for all answers. All must succeed.
    pub(crate) fn ask_many(
        &mut self,
        (method, path): (&str, &str),
        body: &Value,
        count: usize,
    ) -> Result<(), String> {
        let failed = |what: String| format!("{method} {path}: {what}");
        let requests = request(method, path, body).repeat(count);
        let sent = self.stream.write_all(requests.as_bytes());
        sent.map_err(|error| failed(error.to_string()))?;
        for _ in 0..count {
            let answer = self.receive().map_err(|error| failed(error.to_string()))?;
            succeeded(answer.status, answer.body).map_err(failed)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> std::io::Result<Answer> {
        let wrong = |what: &str| Error::new(ErrorKind::InvalidData, what.to_owned());
        let status = self.line()?;
        let status = status.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
        let status =
            status.and_then(|it| it.parse().ok()).ok_or_else(|| wrong("no HTTP answer"))?;
        let mut length = 0;
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().map_err(|_| wrong("an answer of no known length"))?;
            }
        }
        if length > BODY_BYTES_MAX {
            return Err(wrong("an answer too long to take"));
        }
        let mut body = vec![0; length];
        self.answers.read_exact(&mut body)?;
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body)? };
        Ok(Answer { status, body })
    }

    /// The next line of a head, without its end; empty after the last.
    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        (&mut self.answers).take(8 << 10).read_line(&mut line)?;
        if !line.ends_with('\n') {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the daemon hung up"));
        }
        Ok(line.trim_end().to_owned())
    }
}

fn request(method: &str, path: &str, body: &Value) -> String {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: bessel\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

fn succeeded(status: u16, body: Value) -> Result<Value, String> {
    match (status, body["error"].as_str()) {
        (200..300, _) => Ok(body),
        (_, Some(why)) => Err(why.to_owned()),
        (_, None) => Err(format!("status {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Scratch;
    use serde_json::json;
    use std::os::unix::net::UnixListener;

    /// What `ask` and `ask_many` make of `answers`, which a daemon of one connection gives.
    fn talk<T>(name: &str, answers: &str, ask: impl FnOnce(&mut Connection) -> T) -> T {
        let scratch = Scratch::new(&std::env::temp_dir(), name).unwrap();
        let api = Api { socket: scratch.path().join("api.sock") };
        let listener = UnixListener::bind(&api.socket).unwrap();
        let mut connection = api.connect().unwrap();
        let mut daemon = listener.accept().unwrap().0;
        daemon.write_all(answers.as_bytes()).unwrap();
        daemon.shutdown(std::net::Shutdown::Write).unwrap();
        ask(&mut connection)
    }

    #[test]
    fn answers_are_told_apart_by_their_length() {
        let one = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"a\":1}";
        let other = "HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\nx: y\r\n\r\n{}";
        talk("test-api", &format!("{one}{other}{one}"), |connection| {
            connection.ask_many(("POST", "/x"), &json!({}), 2).unwrap();
            assert_eq!(connection.ask("GET", "/x", &Value::Null).unwrap(), json!({ "a": 1 }));
            assert!(connection.ask("GET", "/x", &Value::Null).is_err(), "the daemon has hung up");
        });
    }

    #[test]
    fn a_refusal_is_an_error_that_says_why() {
        let refused = "HTTP/1.1 409 Conflict\r\ncontent-length: 16\r\n\r\n{\"error\":\"full\"}";
        let error = talk("test-refusal", refused, |it| it.ask("PUT", "/y", &Value::Null));
        assert_eq!(error.unwrap_err(), "PUT /y: full");
        let error =
            talk("test-nonsense", "nonsense\r\n\r\n", |it| it.ask("PUT", "/y", &Value::Null));
        assert!(error.unwrap_err().contains("no HTTP answer"));
    }
}
