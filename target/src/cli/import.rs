//! `bessel volume import`: a new volume of a raw file, sparse or not, of a block device or of what comes
//! down a pipe; or of a snapshot and a difference to it.
//!
//! This process reads the file, with the rights of who runs it, and sends a stream (docs/stream.md); the
//! daemon opens no path that a client names. Holes are left out, and so are blocks of zeroes: what a
//! pipe brings becomes as sparse as what a file has. Size and content are rounded up with zeroes to a
//! sector, as `qemu-img` does it, and to a block at least, the least that a volume has.

use super::client::{ClientError, UploadError};
use super::output::{Progress, print_either};
use super::{ApiArgs, Outcome};
use crate::api::types::Imported;
use crate::reference::SnapshotReference;
use crate::stream::{Decoder, Encoder, HEADER_BYTES, Header, Part, StreamError};
use bessel_mapping::format::{VOLUME_SIZE_MAX, VOLUME_SIZE_MIN};
use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{BLOCK_SIZE, ByteCount, SECTOR_SIZE, VolumeBlock};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde::Serialize;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// Bytes that are read together: a multiple of a block.
const PIECE_BYTES: usize = 1 << 20;

/// What to import.
pub(super) struct Import<'a> {
    /// The new volume.
    pub(super) name: &'a str,
    /// `-` is standard input.
    pub(super) file: &'a Path,
    pub(super) size: Option<ByteCount>,
    pub(super) from: Option<&'a SnapshotReference>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct ImportedFile {
    #[serde(flatten)]
    imported: Imported,
    file: String,
    /// What was read of it, holes included.
    file_bytes: u64,
}

/// Why there is no volume.
#[derive(Debug, thiserror::Error)]
enum ImportError {
    #[error("cannot open {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: {source}; there is no volume")]
    Read { path: PathBuf, source: io::Error },
    #[error("{0} is a directory; name a file")]
    Directory(PathBuf),
    #[error("{0} is neither a file nor a block device; send what it gives down a pipe, to `-`")]
    NoFile(PathBuf),
    #[error("standard input is a terminal; name a file, or send one down a pipe")]
    Terminal,
    #[error("{0} is empty; there is nothing to import")]
    Empty(PathBuf),
    #[error("{path} has {}, and a volume at most {}", .size.human(), VOLUME_SIZE_MAX.human())]
    TooLarge { path: PathBuf, size: ByteCount },
    #[error(
        "{path} has more than the {} that --size says; give at least what it has, or leave that out",
        .size.exact()
    )]
    MoreThanSize { path: PathBuf, size: ByteCount },
    #[error("{path} has changed its size while it was read; import it when nobody writes to it")]
    Changed { path: PathBuf },
    #[error(
        "{path} is a difference to snapshot {base}, made by `bessel snapshot export --from`; give \
         --from {base}"
    )]
    Difference { path: PathBuf, base: String },
    #[error("{path} is no difference made by `bessel snapshot export --from`: {source}")]
    NoDifference { path: PathBuf, source: StreamError },
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Something to read, and how much of it there is, if that is known.
struct Source {
    file: File,
    path: PathBuf,
    size: Option<ByteCount>,
}

/// What a source holds.
enum Content {
    /// A stream, to be sent as it is.
    Stream,
    /// What a disk holds.
    Raw,
}

/// Runs `bessel volume import`.
pub(super) fn run(api: &ApiArgs, import: &Import<'_>) -> Outcome {
    let Import { name, file, size, from } = import;
    let mut source = Source::open(file)?;
    let head = source.head()?;
    let content = source.look_at(&head, from.is_some())?;
    let quiet = api.json || !io::stderr().is_terminal();
    let progress = match source.size {
        Some(_) => Progress::new("importing", quiet),
        None => Progress::counting("importing", quiet),
    };
    let path = match from {
        None => format!("/v1/volumes/{name}/import"),
        Some(from) => format!("/v1/volumes/{name}/import/{}", from.in_path()),
    };
    let volume_size = match content {
        Content::Raw => source.volume_size(*size)?,
        Content::Stream => None,
    };
    let mut file_bytes = 0;
    let imported: Result<Imported, ImportError> = api.client().patient().upload(&path, |body| {
        let total = source.size;
        let show = |done| match total {
            Some(size) => progress.set(done, size.get()),
            None => progress.count(done),
        };
        file_bytes = match content {
            Content::Stream => send_stream(&mut source, &head, body, &show)?,
            Content::Raw => {
                let mut sender = Sender::new(body, volume_size)?;
                let sent = match source.size {
                    Some(size) => sender.send_file(&source, size, &show),
                    None => sender.send_pipe(&mut source, &head, volume_size, &show),
                };
                if let Err(UploadError::Producing(error)) = &sent {
                    sender.break_off(&error.to_string())?;
                }
                sent?
            }
        };
        Ok(())
    });
    let imported = imported?;
    drop(progress);
    let imported = ImportedFile { imported, file: file.display().to_string(), file_bytes };
    print_either(api.json, &imported, text)
}

fn text(it: &ImportedFile) -> String {
    let Imported { volume, data_bytes } = &it.imported;
    let data = ByteCount::new(*data_bytes).human();
    let size = ByteCount::new(volume.size_bytes);
    let what = match &volume.origin {
        Some(origin) => format!("snapshot {origin} with {data} of data on top"),
        None => format!("{}, of which {data} are data", size.human()),
    };
    let rounded = volume.origin.is_none() && !it.file_bytes.is_multiple_of(SECTOR_SIZE);
    let rounded = if rounded {
        format!("; its {} bytes were filled up with zeroes", it.file_bytes)
    } else {
        String::new()
    };
    format!(
        "imported {} as volume {}: {what}, served at {}{rounded}",
        it.file, volume.name, volume.socket
    )
}

impl Source {
    fn open(path: &Path) -> Result<Self, ImportError> {
        let path = path.to_path_buf();
        let failed = |source| ImportError::Open { path: path.clone(), source };
        if path == Path::new("-") {
            if io::stdin().is_terminal() {
                return Err(ImportError::Terminal);
            }
            let stdin = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned();
            return Ok(Self { file: File::from(stdin.map_err(failed)?), path, size: None });
        }
        let file = File::open(&path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        let size = if kind.is_dir() {
            return Err(ImportError::Directory(path));
        } else if kind.is_file() {
            Some(metadata.len())
        } else if kind.is_block_device() {
            Some(lseek(&file, 0, Whence::SeekEnd).map_err(|errno| failed(errno.into()))? as u64)
        } else if kind.is_fifo() {
            None
        } else {
            return Err(ImportError::NoFile(path));
        };
        Ok(Self { file, path, size: size.map(ByteCount::new) })
    }

    /// Its first bytes: as many as a stream's header has, or all there are. A pipe has given them then.
    fn head(&mut self) -> Result<Vec<u8>, ImportError> {
        let mut head = vec![0; HEADER_BYTES];
        let count = match self.size {
            Some(_) => self.read_at(&mut head, 0)?,
            None => fill(&mut self.file, &mut head).map_err(|error| self.unread(error))?,
        };
        head.truncate(count);
        if head.is_empty() { Err(ImportError::Empty(self.path.clone())) } else { Ok(head) }
    }

    /// Finds out what it holds, and that it is what was asked for.
    fn look_at(&self, head: &[u8], difference: bool) -> Result<Content, ImportError> {
        let path = || self.path.clone();
        match (Decoder::new(head), difference) {
            (Ok((Header { base: Some((base, _)), .. }, _)), false) => {
                Err(ImportError::Difference { path: path(), base: base.to_string() })
            }
            (Ok(_), _) => Ok(Content::Stream),
            (Err(source), true) => Err(ImportError::NoDifference { path: path(), source }),
            (Err(_), false) => Ok(Content::Raw),
        }
    }

    /// The size that the volume shall have, if that is known.
    fn volume_size(&self, asked: Option<ByteCount>) -> Result<Option<ByteCount>, ImportError> {
        let path = || self.path.clone();
        let own = match self.size {
            Some(size) if size > VOLUME_SIZE_MAX => {
                return Err(ImportError::TooLarge { path: path(), size });
            }
            own => own,
        };
        match (asked, own) {
            (Some(size), Some(own)) if own > size => {
                Err(ImportError::MoreThanSize { path: path(), size })
            }
            (Some(size), _) => Ok(Some(size)),
            (None, own) => Ok(own.map(rounded_up)),
        }
    }

    fn read_at(&self, bytes: &mut [u8], position: u64) -> Result<usize, ImportError> {
        let mut count = 0;
        while count < bytes.len() {
            match self.file.read_at(&mut bytes[count..], position + count as u64) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.unread(error)),
            }
        }
        Ok(count)
    }

    fn unread(&self, source: io::Error) -> ImportError {
        ImportError::Read { path: self.path.clone(), source }
    }

    /// The next range at or after `position` that may hold something. A file system, or a block device,
    /// that cannot tell says that all does.
    fn next_data(&self, position: u64, size: u64) -> Result<Option<(u64, u64)>, ImportError> {
        let seek = |whence| lseek(&self.file, position as i64, whence);
        let failed = |errno: Errno| self.unread(errno.into());
        let start = match seek(Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => return Ok(None),
            Err(Errno::EINVAL | Errno::ENOTSUP) => return Ok(Some((position, size))),
            Err(errno) => return Err(failed(errno)),
        };
        let end = lseek(&self.file, start as i64, Whence::SeekHole).map_err(failed)? as u64;
        Ok((start < size).then_some((start, end.min(size))))
    }
}

/// A size that a volume can have, with all of `size` in it.
fn rounded_up(size: ByteCount) -> ByteCount {
    ByteCount::new(size.get().next_multiple_of(SECTOR_SIZE)).max(VOLUME_SIZE_MIN)
}

/// Reads until `bytes` are full or there is no more. Returns how many there are.
fn fill(source: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while count < bytes.len() {
        match source.read(&mut bytes[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

type Sent<T> = Result<T, UploadError<ImportError>>;

/// Sends a stream as it is; whether it is whole and undamaged, the daemon sees. Returns its length.
fn send_stream(
    source: &mut Source,
    head: &[u8],
    body: &mut dyn Write,
    show: &impl Fn(u64),
) -> Sent<u64> {
    let piped = source.size.is_none();
    let mut position = 0;
    if piped {
        body.write_all(head)?;
        position = head.len() as u64;
    }
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = fill(&mut source.file, &mut piece).map_err(|error| source.unread(error));
        let count = read.map_err(UploadError::Producing)?;
        if count == 0 {
            return Ok(position);
        }
        body.write_all(&piece[..count])?;
        position += count as u64;
        show(position);
    }
}

/// Makes a stream of what a disk holds.
struct Sender<'a> {
    body: &'a mut dyn Write,
    encoder: Encoder,
}

impl<'a> Sender<'a> {
    /// Begins a stream of a volume of this size, if that is known.
    fn new(body: &'a mut dyn Write, size: Option<ByteCount>) -> Sent<Self> {
        let mut encoder = Encoder::default();
        let header = Header {
            store: [0; 16],
            snapshot: None,
            size: size.unwrap_or_default(),
            time: WallTime::from_unix_nanos(0),
            base: None,
        };
        body.write_all(&encoder.header(&header))?;
        Ok(Self { body, encoder })
    }

    /// Sends what a file or block device has. Returns how much it holds, holes included.
    fn send_file(&mut self, source: &Source, size: ByteCount, show: &impl Fn(u64)) -> Sent<u64> {
        let produce = UploadError::Producing;
        let (mut piece, mut position) = (vec![0; PIECE_BYTES], 0);
        while let Some((start, end)) = source.next_data(position, size.get()).map_err(produce)? {
            // In whole blocks, of which the one before may have had the start.
            let mut at = position.max(start - start % BLOCK_SIZE);
            let end = end.next_multiple_of(BLOCK_SIZE).min(size.get());
            while at < end {
                let wanted = (end - at).min(PIECE_BYTES as u64) as usize;
                let count = source.read_at(&mut piece[..wanted], at).map_err(produce)?;
                if count < wanted {
                    return Err(produce(ImportError::Changed { path: source.path.clone() }));
                }
                self.send_piece(&mut piece, wanted, at)?;
                at += wanted as u64;
                show(at);
            }
            position = end;
            if position >= size.get() {
                break;
            }
        }
        let now = source.file.metadata().map_err(|error| produce(source.unread(error)))?;
        if now.is_file() && now.len() != size.get() {
            return Err(produce(ImportError::Changed { path: source.path.clone() }));
        }
        self.end(None)?;
        Ok(size.get())
    }

    /// Sends what comes down a pipe, of which `head` has come. Returns how much it was.
    fn send_pipe(
        &mut self,
        source: &mut Source,
        head: &[u8],
        size: Option<ByteCount>,
        show: &impl Fn(u64),
    ) -> Sent<u64> {
        let produce = UploadError::Producing;
        let (mut piece, mut position, mut ready) = (vec![0; PIECE_BYTES], 0, head.len());
        piece[..ready].copy_from_slice(head);
        loop {
            let read = fill(&mut source.file, &mut piece[ready..]);
            let count = ready + read.map_err(|error| produce(source.unread(error)))?;
            ready = 0;
            let end = position + count as u64;
            let path = || source.path.clone();
            if let Some(size) = size.filter(|size| end > size.get()) {
                return Err(produce(ImportError::MoreThanSize { path: path(), size }));
            }
            if end > VOLUME_SIZE_MAX.get() {
                let size = ByteCount::new(end);
                return Err(produce(ImportError::TooLarge { path: path(), size }));
            }
            if count > 0 {
                self.send_piece(&mut piece, count, position)?;
                show(end);
            }
            if count < PIECE_BYTES {
                let told = size.is_none().then(|| rounded_up(ByteCount::new(end)));
                self.end(told)?;
                return Ok(end);
            }
            position = end;
        }
    }

    /// Sends the blocks among the first `count` bytes that are not all zeroes.
    fn send_piece(&mut self, piece: &mut [u8], count: usize, position: u64) -> Sent<()> {
        let block = BLOCK_SIZE as usize;
        let whole = count.next_multiple_of(block);
        piece[count..whole].fill(0);
        let blocks = whole / block;
        let is_zero = |at: usize| piece[at * block..(at + 1) * block].iter().all(|byte| *byte == 0);
        let first = position / BLOCK_SIZE;
        let mut at = 0;
        while at < blocks {
            let holes = (at..blocks).take_while(|at| is_zero(*at)).count();
            at += holes;
            let data = (at..blocks).take_while(|at| !is_zero(*at)).count();
            if data > 0 {
                let (start, blocks) = (VolumeBlock::new(first + at as u64), data as u64);
                let bytes = &piece[at * block..(at + data) * block];
                self.body.write_all(&self.encoder.part(Part::Data { first: start, blocks }))?;
                self.encoder.data(bytes);
                self.body.write_all(bytes)?;
            }
            at += data;
        }
        Ok(())
    }

    fn end(&mut self, size: Option<ByteCount>) -> Sent<()> {
        Ok(self.body.write_all(&self.encoder.part(Part::End { size }))?)
    }

    /// Says why there is no more.
    fn break_off(&mut self, why: &str) -> Sent<()> {
        Ok(self.body.write_all(&self.encoder.break_off(why))?)
    }
}
