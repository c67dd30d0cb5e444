//! Fuzz targets: each takes bytes, makes of them what a hostile device, guest or front-end could
//! give, and panics when something of ours does not stand it.
//!
//! They are functions here so that two things can run them: libFuzzer (`make fuzz`, the crate in
//! `tests/fuzz`), and the plain test `corpus`, which replays every input that is kept. The bytes are
//! read from front to back as small instructions, and what is missing reads as zero, so that any
//! bytes are an input and a change in one place changes little elsewhere.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

mod image;
mod input;
mod messages;
mod rig;
mod virtqueue;

pub use image::store_image;
pub use messages::vhost_messages;
pub use virtqueue::virtqueue;

/// A target's name, which is that of its folders in `tests/fuzz/corpus` and `regressions`.
pub type Target = (&'static str, fn(&[u8]));

/// The targets of this crate. Those of the API and the configuration are in `target/src/fuzz.rs`.
pub const TARGETS: [Target; 3] =
    [("store_image", store_image), ("virtqueue", virtqueue), ("vhost_messages", vhost_messages)];

/// Gives a target every input that is kept for it: the corpus, and each that ever found something.
/// With `INPUT` set, that file alone. `test` is what `cargo test` runs it with.
///
/// # Panics
/// When one of them finds something, after saying which; when there are none.
pub fn replay(name: &str, target: fn(&[u8]), test: &str) {
    for input in inputs(name) {
        let bytes = std::fs::read(&input).expect("it was just listed");
        let outcome = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
        if let Err(panic) = outcome {
            let input = input.display();
            eprintln!("{name} failed; replay: INPUT={input} cargo test {test} -- --nocapture");
            resume_unwind(panic);
        }
    }
}

fn inputs(name: &str) -> Vec<PathBuf> {
    if let Some(input) = std::env::var_os("INPUT") {
        return vec![input.into()];
    }
    let mut inputs = Vec::new();
    for folder in ["corpus", "regressions"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder).join(name);
        // Git keeps no empty folder: a target that has found nothing has no regressions.
        let Ok(files) = std::fs::read_dir(&folder) else { continue };
        inputs.extend(files.map(|file| file.expect("a readable folder").path()));
    }
    assert!(!inputs.is_empty(), "{name} has no corpus");
    inputs.sort();
    inputs
}
