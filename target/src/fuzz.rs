//! Fuzz targets of the program's own edge: HTTP requests, and the configuration.
//!
//! Each takes bytes from libFuzzer (`make fuzz`) or from a file of the corpus that is kept in
//! `tests/fuzz`, and panics when something of ours does not stand them. See `tests/harness/fuzz.rs`.

use crate::api;
use crate::api::types::State;
use crate::config::Config;
use crate::control::Control;
use crate::daemon::Rehearsal;
use crate::stream::{Encoder, Header, Part};
use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{BLOCK_SIZE, ByteCount, VolumeBlock};
use std::cell::RefCell;
use std::io::{ErrorKind, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use tokio::runtime::Runtime;

/// Longest input: what a client sends at once without waiting for answers.
const BYTES_MAX: usize = 64 << 10;
/// Inputs for one daemon: its store has 4096 places for volumes, and deleted ones keep theirs.
const INPUTS_MAX: u32 = 400;

struct Daemon {
    runtime: Runtime,
    rehearsal: Rehearsal,
    inputs: u32,
}

impl Daemon {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Self { runtime: runtime.expect("a runtime"), rehearsal: Rehearsal::start(), inputs: 0 }
    }
}

thread_local! {
    static DAEMON: RefCell<Option<Daemon>> = const { RefCell::new(None) };
}

/// HTTP on the Unix socket: the bytes are what a client sends. A first byte below 128 says that they
/// are to be made requests of first (`written`), so that most of them come past the parser; from 96 on
/// most of those are imports.
pub fn api(data: &[u8]) {
    let text = match data.split_first() {
        Some((first, rest)) if *first < 96 => written(rest, false),
        Some((first, rest)) if *first < 128 => written(rest, true),
        Some((_, rest)) => rest.to_vec(),
        None => return,
    };
    DAEMON.with_borrow_mut(|daemon| {
        if daemon.as_ref().is_some_and(|daemon| daemon.inputs == INPUTS_MAX) {
            *daemon = None; // Before the next one starts.
        }
        let Daemon { runtime, rehearsal, inputs } = daemon.get_or_insert_with(Daemon::start);
        *inputs += 1;
        let control = rehearsal.control();
        let answers =
            runtime.block_on(converse(control.clone(), &text[..text.len().min(BYTES_MAX)]));
        assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."), "{answers:?}");
        runtime.block_on(delete_all(control));
    });
}

/// Sends bytes on a connection of its own, hangs up, and takes the answers.
async fn converse(control: Control, bytes: &[u8]) -> Vec<u8> {
    let (mut client, server) = UnixStream::pair().expect("a pair of sockets");
    client.write_all(bytes).expect("the socket's buffer is larger");
    client.shutdown(std::net::Shutdown::Write).expect("it is connected");
    for end in [&client, &server] {
        end.set_nonblocking(true).expect("it is a socket");
    }
    let client = tokio::net::UnixStream::from_std(client).expect("a runtime");
    let server = tokio::net::UnixStream::from_std(server).expect("a runtime");
    let (answers, ()) = tokio::join!(receive(client), api::serve_connection(server, control));
    answers
}

async fn receive(client: tokio::net::UnixStream) -> Vec<u8> {
    let mut answers = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        client.readable().await.expect("it is a socket");
        match client.try_read(&mut buffer) {
            Ok(0) => return answers,
            Ok(count) => answers.extend(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // Hung up with some of our bytes unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return answers,
            Err(error) => panic!("a socket of our own failed: {error}"),
        }
    }
}

/// The same store for the next input, but for the places that are used up; and the control plane
/// still answers.
async fn delete_all(control: Control) {
    loop {
        let volumes = control.call(|plane| plane.list_volumes()).await;
        let volumes = volumes.expect("the control plane answers");
        if volumes.is_empty() {
            return;
        }
        // One that is being imported goes by itself: its client has hung up.
        for volume in volumes.into_iter().filter(|volume| volume.state != State::Importing) {
            let name = volume.name;
            let deleted = control.call(move |plane| plane.delete_volume(&name)).await;
            deleted.expect("nobody is connected");
        }
    }
}

/// Requests, made of bytes: which method, which path, which body.
fn written(mut bytes: &[u8], imports: bool) -> Vec<u8> {
    let mut text = Vec::new();
    while !bytes.is_empty() {
        let (method, path, body) = match if imports { pick(&mut bytes, 5) } else { 0 } {
            0 => {
                let method = ["GET", "POST", "PATCH", "DELETE", "PUT"][pick(&mut bytes, 5)];
                (method, path(&mut bytes), body(&mut bytes))
            }
            1 => ("GET", "/v1/jobs".to_owned(), Vec::new()),
            2 => {
                let path = format!("/v1/volumes/{}/import/{}", word(&mut bytes), word(&mut bytes));
                ("POST", path, stream(&mut bytes))
            }
            _ => {
                let path = format!("/v1/volumes/{}/import", word(&mut bytes));
                ("POST", path, stream(&mut bytes))
            }
        };
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n", body.len());
        text.extend(head.as_bytes());
        text.extend(b"content-type: application/json\r\n\r\n");
        text.extend(body);
    }
    text
}

fn pick(bytes: &mut &[u8], count: usize) -> usize {
    let Some((first, rest)) = bytes.split_first() else { return 0 };
    *bytes = rest;
    usize::from(*first) % count
}

/// Some of the input itself, as long as its first byte says.
fn raw(bytes: &mut &[u8]) -> Vec<u8> {
    let count = pick(bytes, 64).min(bytes.len());
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken.to_vec()
}

fn word(bytes: &mut &[u8]) -> String {
    const WORDS: [&str; 12] = [
        "a",
        "b",
        "c",
        "a@s",
        "b@t",
        "1.0",
        "2.0",
        "1.1",
        "s",
        "t",
        "..",
        "18446744073709551615.0",
    ];
    match pick(bytes, 16) {
        known if known < WORDS.len() => WORDS[known].to_owned(),
        // As a path may have them: anything but what ends the path.
        _ => raw(bytes).iter().map(|byte| format!("%{byte:02x}")).collect(),
    }
}

fn path(bytes: &mut &[u8]) -> String {
    match pick(bytes, 11) {
        0 | 1 => "/v1/volumes".to_owned(),
        2 => format!("/v1/volumes/{}", word(bytes)),
        3 => format!("/v1/volumes/{}/rollback", word(bytes)),
        4 | 5 => format!("/v1/volumes/{}/snapshots", word(bytes)),
        6 => format!("/v1/snapshots/{}", word(bytes)),
        7 => "/v1/tree".to_owned(),
        8 => "/v1/stats".to_owned(),
        9 => "/metrics".to_owned(),
        _ => format!("/{}?{}", word(bytes), word(bytes)),
    }
}

fn body(bytes: &mut &[u8]) -> Vec<u8> {
    const SIZES: [&str; 10] = [
        "4096",
        "1048576",
        "1073741824",
        "0",
        "512",
        "4097",
        "549755813888",
        "281474976710656",
        "18446744073709551615",
        "-1",
    ];
    let text = match pick(bytes, 9) {
        0 => String::new(),
        1 => return raw(bytes),
        2 => format!("{{\"name\":{:?},\"size_bytes\":{}}}", word(bytes), SIZES[pick(bytes, 10)]),
        3 => format!("{{\"name\":{:?},\"from\":{:?}}}", word(bytes), word(bytes)),
        4 => format!("{{\"size_bytes\":{}}}", SIZES[pick(bytes, 10)]),
        5 => format!("{{\"name\":{:?}}}", word(bytes)),
        6 => format!("{{\"label\":{:?}}}", word(bytes)),
        7 => format!("{{\"snapshot\":{:?}}}", word(bytes)),
        _ => "{}".to_owned(),
    };
    text.into_bytes()
}

/// A stream to be imported, well sealed, of parts that may be anything.
fn stream(bytes: &mut &[u8]) -> Vec<u8> {
    const SIZES: [u64; 6] = [0, 4096, 10_240, 1 << 20, 600 << 30, 1 << 60];
    const NUMBERS: [u64; 6] = [0, 1, 2, 3, 1 << 28, u64::MAX];
    let header = Header {
        store: [0; 16],
        snapshot: None,
        size: ByteCount::new(SIZES[pick(bytes, 6)]),
        time: WallTime::from_unix_nanos(0),
        base: None,
    };
    let mut encoder = Encoder::default();
    let mut text = encoder.header(&header).to_vec();
    for _ in 0..pick(bytes, 4) {
        let first = VolumeBlock::new(NUMBERS[pick(bytes, 6)]);
        let blocks = NUMBERS[pick(bytes, 6)];
        match pick(bytes, 4) {
            0 => text.extend(encoder.part(Part::Hole { first, blocks })),
            1 => text.extend(encoder.break_off("so")),
            _ => {
                text.extend(encoder.part(Part::Data { first, blocks }));
                let data = vec![7; blocks.min(2) as usize * BLOCK_SIZE as usize];
                encoder.data(&data);
                text.extend(data);
            }
        }
    }
    let told = ByteCount::new(SIZES[pick(bytes, 6)]);
    let size = (told.get() > 0).then_some(told);
    text.extend(encoder.part(Part::End { size }));
    text
}

/// The text of a configuration. One that is refused is refused in one line that begins with the
/// file; one that is taken is looked at as `bessel serve` does before it touches anything.
pub fn configuration(data: &[u8]) {
    let text = String::from_utf8_lossy(data).into_owned();
    // YAML knows more line ends than most.
    let ends = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'];
    let lines = 1 + text.matches(ends).count();
    let refused = match Config::parse(Path::new("fuzz.yaml"), text) {
        Ok(config) => config.check_machine(),
        Err(error) => Err(error),
    };
    if let Err(error) = refused {
        let line = error.to_string();
        assert!(line.starts_with("fuzz.yaml:") && !line.contains('\n'), "{line:?}");
        let number =
            line["fuzz.yaml:".len()..].split(':').next().and_then(|text| text.parse().ok());
        let number: usize = number.unwrap_or_else(|| panic!("no line number in {line:?}"));
        assert!((1..=lines).contains(&number), "{line:?} of {lines} lines");
    }
}

#[cfg(test)]
mod tests {
    use bessel_tests::fuzz::replay;

    #[test]
    fn api() {
        replay("api", super::api, "-p bessel --lib fuzz::tests::api");
    }

    #[test]
    fn configuration() {
        let test = "-p bessel --lib fuzz::tests::configuration";
        replay("configuration", super::configuration, test);
    }
}
