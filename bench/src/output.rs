//! Standard output, whose reader may leave: `bessel-bench load ... | head` is no error.

use std::io::Write;

/// Prints `text` in one write. Nothing happens when nobody reads it any more.
pub(crate) fn print(text: &str) -> Result<(), String> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(format!("cannot write the output: {error}"))
        }
        _ => Ok(()),
    }
}
