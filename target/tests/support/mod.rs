//! A daemon with a directory of its own, for tests that meet it from outside.

#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod device;
pub(crate) mod load;
pub(crate) mod reader;

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_bessel");

/// Says something past the capture of output: which seed a run has, and what is skipped, which `make
/// test` repeats at its end.
pub(crate) fn tell(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// A directory for a store and its sockets, on tmpfs where there is one: short paths, no disk.
pub(crate) struct World {
    pub(crate) directory: PathBuf,
    /// Where the store is; in the directory, unless a test has it elsewhere.
    pub(crate) store: String,
    /// As the configuration says it.
    pub(crate) node_cache: &'static str,
    daemon: Option<Child>,
    /// Files outside the directory.
    elsewhere: Vec<PathBuf>,
}

impl World {
    pub(crate) fn new(tag: &str) -> Self {
        let shared = Path::new("/dev/shm");
        let base = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let directory = base.join(format!("bessel-daemon-{}-{tag}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let store = directory.join("store.img").display().to_string();
        Self { directory, store, node_cache: "4MiB", daemon: None, elsewhere: Vec::new() }
    }

    /// Removes a file outside the directory when the world ends.
    pub(crate) fn remove_at_end(&mut self, file: PathBuf) {
        self.elsewhere.push(file);
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Writes a configuration over the store, with `rest` at its end, and returns its path.
    pub(crate) fn configure(&self, name: &str, api: &str, rest: &str) -> String {
        let text = format!(
            "store:\n  device: {}\n  size: 64MiB\n  node_cache: {}\napi:\n  socket: {}\n\
             {rest}",
            self.store,
            self.node_cache,
            self.path(api),
        );
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Starts the daemon and waits until it says that it is ready. Returns what it said.
    pub(crate) fn serve(&mut self, rest: &str) -> String {
        self.start(rest);
        let daemon = self.daemon.as_mut().expect("it was just started");
        let mut lines = BufReader::new(daemon.stdout.take().unwrap());
        let mut said = String::new();
        while !said.lines().any(|line| line.starts_with("ready; ")) {
            let more = lines.read_line(&mut said).unwrap();
            assert!(more > 0, "the daemon ended: {}", self.log());
        }
        said
    }

    /// Starts the daemon and does not wait for anything.
    pub(crate) fn start(&mut self, rest: &str) {
        let config = self.configure("bessel.yaml", "api.sock", rest);
        let daemon = Command::new(PROGRAM)
            .args(["serve", "--config", &config])
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(self.path("log")).unwrap())
            .spawn();
        self.daemon = Some(daemon.unwrap());
    }

    /// Kills the daemon, wherever it is.
    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("it runs");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// Starts the daemon with a limit on the size of files that it makes, which no journal fits in.
    pub(crate) fn fail_to_serve(&self, rest: &str) {
        let config = self.configure("bessel.yaml", "api.sock", rest);
        let mut command = Command::new("prlimit");
        command.args(["--fsize=1000000", PROGRAM, "serve", "--config", &config]);
        let ended = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(!ended.success());
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("it runs").id()
    }

    pub(crate) fn end(&mut self, signal: &str) {
        let mut daemon = self.daemon.take().expect("it runs");
        let sent = Command::new("kill").args([signal, &daemon.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let status = daemon.wait().unwrap();
        assert_eq!(status.success(), signal == "-TERM", "{status}: {}", self.log());
    }

    /// Runs a command of `bessel` against this daemon.
    pub(crate) fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The same, with `word` in it replaced by something that may have spaces.
    pub(crate) fn run_of(&self, arguments: &str, (word, text): (&str, &str)) -> Output {
        let arguments = arguments.split_whitespace();
        let replaced = arguments.map(|argument| if argument == word { text } else { argument });
        self.command("").args(replaced).output().unwrap()
    }

    /// The same, with its output going into a file.
    pub(crate) fn run_into(&self, arguments: &str, file: std::fs::File) -> Output {
        let mut command = self.command(arguments);
        command.stdout(file).stderr(Stdio::piped());
        command.spawn().unwrap().wait_with_output().unwrap()
    }

    /// Starts a command of `bessel` against this daemon.
    pub(crate) fn spawn(&self, arguments: &str) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The same, with a terminal for its standard error.
    pub(crate) fn spawn_on_terminal(
        &self,
        arguments: &str,
        input: Option<std::fs::File>,
        terminal: std::fs::File,
    ) -> Child {
        let mut command = self.command(arguments);
        command.stdin(input.map_or_else(Stdio::null, Stdio::from));
        command.stdout(Stdio::null()).stderr(terminal).env("TERM", "xterm");
        command.spawn().unwrap()
    }

    /// The same, with a pipe to its standard input.
    pub(crate) fn spawn_fed(&self, arguments: &str) -> Child {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments.split_whitespace())
            .env("BESSEL_API", self.path("api.sock"))
            .current_dir(&self.directory);
        command
    }

    /// Runs a command that must succeed, with `--json`.
    pub(crate) fn json(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{arguments} --json"))).unwrap()
    }

    /// Runs a command that must succeed.
    pub(crate) fn text(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments}: {error}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must be refused with one line, and returns that.
    pub(crate) fn refused(&self, arguments: &str) -> String {
        refusal(arguments, &self.run(arguments))
    }

    /// The same, with `word` in it replaced by something that may have spaces.
    pub(crate) fn refused_of(&self, arguments: &str, word: (&str, &str)) -> String {
        refusal(arguments, &self.run_of(arguments, word))
    }

    /// Sends bytes to the API that are no whole request, and waits until the server has hung up.
    pub(crate) fn garbage(&self, bytes: &[u8]) {
        let mut stream = UnixStream::connect(self.path("api.sock")).unwrap();
        // A server that has seen enough may hang up before all is written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }

    /// Sends bytes to the API and returns the whole answer.
    fn raw(&self, request: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path("api.sock")).unwrap();
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Sends a stream of bytes to the API and returns the answer.
    pub(crate) fn post(&self, path: &str, body: &[u8]) -> String {
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        let head = format!("{head}content-length: {length}\r\n\r\n");
        self.raw(&[head.as_bytes(), body].concat())
    }

    pub(crate) fn request(&self, method: &str, path: &str, body: &str) -> String {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        self.raw(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes())
    }
}

/// The one line of a refused command.
pub(crate) fn refusal(arguments: &str, output: &Output) -> String {
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments}: {error}");
    assert!(error.starts_with("bessel: ") && error.lines().count() == 1, "{error:?}");
    error
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
        for file in &self.elsewhere {
            let _ = std::fs::remove_file(file);
        }
    }
}
