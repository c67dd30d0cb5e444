//! `bessel snapshot export`: what a snapshot holds, as a sparse file or down a pipe; or its difference
//! to another, as a stream (docs/stream.md).
//!
//! This process writes the file, with the rights of who runs it; the daemon only reads the store. A
//! file is made beside its place and gets its name when it is whole, so that an export that breaks
//! off leaves nothing behind and nothing changed.

use super::output::{Progress, print_either};
use super::{ApiArgs, Outcome};
use crate::reference::SnapshotReference;
use crate::stream::{Decoder, Header, Part, StreamError};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes that are taken and written together.
const PIECE_BYTES: usize = 1 << 20;

/// What to export, and where to.
pub(super) struct Export<'a> {
    pub(super) snapshot: &'a SnapshotReference,
    pub(super) from: Option<&'a SnapshotReference>,
    /// `-` is standard output.
    pub(super) file: &'a Path,
    pub(super) force: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Exported {
    snapshot: String,
    from: Option<String>,
    file: String,
    size_bytes: u64,
    data_bytes: u64,
}

/// Why an export was not made.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("{0} exists; choose another name, or give --force to replace it")]
    Exists(PathBuf),
    #[error("{0} is no regular file; export to `-` and send that there")]
    NoFile(PathBuf),
    #[error("cannot write {path}: {source}; nothing is left behind")]
    Write { path: PathBuf, source: io::Error },
    #[error("the export broke off: {0}; nothing is left behind")]
    Stream(#[from] StreamError),
    #[error("the daemon sent another snapshot than was asked for")]
    Other,
}

/// Runs `bessel snapshot export`.
pub(super) fn run(api: &ApiArgs, export: &Export<'_>) -> Outcome {
    let Export { snapshot, from, file, force } = export;
    let to_pipe = *file == Path::new("-");
    if !to_pipe {
        check_target(file, *force)?;
    }
    let path = match from {
        None => format!("/v1/snapshots/{}/export", snapshot.in_path()),
        Some(from) => format!("/v1/snapshots/{}/export/{}", from.in_path(), snapshot.in_path()),
    };
    let source = api.client().patient().stream(&path)?;
    let quiet = api.json || !io::stderr().is_terminal();
    let progress = Progress::new("exporting", quiet);
    let (header, data) = if to_pipe {
        let stdout = BufWriter::with_capacity(PIECE_BYTES, io::stdout().lock());
        let failed = |source| ExportError::Write { path: PathBuf::from("-"), source };
        write_out(source, from.is_some(), stdout, &progress, &failed)?
    } else {
        let part = PartFile::create(file)?;
        let failed = |source| ExportError::Write { path: file.to_path_buf(), source };
        let ended = match from {
            Some(_) => write_out(source, true, &part.file, &progress, &failed),
            None => write_sparse(source, &part.file, &progress, &failed),
        }?;
        part.finish(file).map_err(failed)?;
        ended
    };
    drop(progress);
    if to_pipe {
        return Ok(());
    }
    let exported = Exported {
        snapshot: header.snapshot.map(|id| id.to_string()).unwrap_or_default(),
        from: header.base.map(|(id, _)| id.to_string()),
        file: file.display().to_string(),
        size_bytes: header.size.get(),
        data_bytes: data,
    };
    print_either(api.json, &exported, |exported| {
        let data = ByteCount::new(exported.data_bytes).human();
        let size = ByteCount::new(exported.size_bytes).human();
        let what = match &exported.from {
            None => format!("{size}, of which {data} are data"),
            Some(from) => format!("{data} of data that differ from snapshot {from}"),
        };
        format!("exported snapshot {} to {}: {what}", exported.snapshot, exported.file)
    })
}

fn check_target(file: &Path, force: bool) -> Result<(), ExportError> {
    let Ok(metadata) = std::fs::symlink_metadata(file) else { return Ok(()) };
    if !metadata.is_file() {
        return Err(ExportError::NoFile(file.to_path_buf()));
    }
    if force { Ok(()) } else { Err(ExportError::Exists(file.to_path_buf())) }
}

/// A file that has no name of its own yet. Removed when it is dropped.
struct PartFile {
    file: File,
    path: Option<PathBuf>,
}

impl PartFile {
    fn create(target: &Path) -> Result<Self, ExportError> {
        let mut name = target.as_os_str().to_owned();
        name.push(format!(".part-{}", std::process::id()));
        let path = PathBuf::from(name);
        // For its owner alone: it holds what a guest keeps secret.
        let options = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = options.map_err(|source| ExportError::Write { path: path.clone(), source })?;
        Ok(Self { file, path: Some(path) })
    }

    fn finish(mut self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        let path = self.path.as_ref().expect("it has not been finished");
        std::fs::rename(path, target)?;
        self.path = None;
        Ok(())
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Takes the header, and sees that it is what was asked for.
fn begin<R: Read>(source: R, difference: bool) -> Result<(Header, Decoder<R>), ExportError> {
    let (header, decoder) = Decoder::new(source)?;
    if header.snapshot.is_none() || header.base.is_some() != difference {
        return Err(ExportError::Other);
    }
    Ok((header, decoder))
}

/// Writes a whole snapshot into an empty file, with holes where it has none. Returns bytes of data.
fn write_sparse<R: Read>(
    source: R,
    file: &File,
    progress: &Progress,
    failed: &impl Fn(io::Error) -> ExportError,
) -> Result<(Header, u64), ExportError> {
    let (header, mut decoder) = begin(source, false)?;
    let size = header.size.get();
    file.set_len(size).map_err(failed)?;
    let (mut piece, mut written) = (vec![0; PIECE_BYTES], 0);
    loop {
        let (first, blocks) = match decoder.part()? {
            Part::End { .. } => return Ok((header, written)),
            Part::Hole { .. } => continue,
            Part::Data { first, blocks } => (first, blocks),
        };
        let mut at = first.get() * BLOCK_SIZE;
        let end = at + blocks * BLOCK_SIZE;
        while at < end {
            let count = decoder.data(&mut piece)?;
            // The last block of a volume may be one in part.
            let inside = (size.saturating_sub(at)).min(count as u64);
            file.write_all_at(&piece[..inside as usize], at).map_err(failed)?;
            at += count as u64;
            written += inside;
            progress.set(at.min(size), size);
        }
    }
}

/// Writes a whole snapshot from its start to its end, or a difference as it comes, checked.
fn write_out<R: Read, W: Write>(
    source: R,
    difference: bool,
    mut target: W,
    progress: &Progress,
    failed: &impl Fn(io::Error) -> ExportError,
) -> Result<(Header, u64), ExportError> {
    let kept = std::cell::RefCell::new(Vec::new());
    let source = Tee { source, kept: difference.then_some(&kept) };
    let (header, mut decoder) = begin(source, difference)?;
    let size = header.size.get();
    let (mut piece, mut position, mut written) = (vec![0; PIECE_BYTES], 0, 0);
    loop {
        let part = decoder.part()?;
        let first = match part {
            Part::End { .. } => size,
            Part::Hole { first, .. } | Part::Data { first, .. } => first.get() * BLOCK_SIZE,
        };
        if !difference {
            if first < position {
                return Err(StreamError::Damaged("its parts are out of order").into());
            }
            let mut zeroes = io::repeat(0).take(first - position);
            io::copy(&mut zeroes, &mut target).map_err(failed)?;
            position = first;
        }
        if let Part::Data { blocks, .. } = part {
            let end = first + blocks * BLOCK_SIZE;
            let mut at = first;
            while at < end {
                let count = decoder.data(&mut piece)?;
                if !difference {
                    let inside = (size.saturating_sub(at)).min(count as u64);
                    target.write_all(&piece[..inside as usize]).map_err(failed)?;
                    position += inside;
                }
                at += count as u64;
                written += count as u64;
                progress.set(at.min(size), size);
                forward(&kept, &mut target).map_err(failed)?;
            }
        }
        forward(&kept, &mut target).map_err(failed)?;
        if matches!(part, Part::End { .. }) {
            target.flush().map_err(failed)?;
            return Ok((header, written));
        }
    }
}

/// Writes what was kept.
fn forward<W: Write>(kept: &std::cell::RefCell<Vec<u8>>, target: &mut W) -> io::Result<()> {
    let mut kept = kept.borrow_mut();
    target.write_all(&kept)?;
    kept.clear();
    Ok(())
}

/// Keeps what is read, to be written as it came.
struct Tee<'a, R> {
    source: R,
    kept: Option<&'a std::cell::RefCell<Vec<u8>>>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(bytes)?;
        if let Some(kept) = self.kept {
            kept.borrow_mut().extend_from_slice(&bytes[..count]);
        }
        Ok(count)
    }
}
