//! `bessel format`: an empty store on a block device or file.

use super::Outcome;
use super::output::{Progress, print_either};
use crate::config::STORE_SIZE_MAX;
use crate::daemon::{create_file, set_file_size};
use crate::entropy;
use crate::plane::uuid;
use crate::size::parse_size;
use bessel_mapping::format::Geometry;
use bessel_mapping::store::{self, FormatOptions, Found};
use bessel_reactor::clock::SystemClock;
use bessel_reactor::device::{DeviceLock, FileDevice, OpenOptions};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use clap::Args;
use nix::unistd::{Whence, lseek};
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// `bessel format`
#[derive(Args, Debug)]
pub(crate) struct FormatArgs {
    /// Block device or file
    device: PathBuf,
    /// Size of the file; it is created if there is none
    #[arg(long, value_parser = parse_size)]
    size: Option<ByteCount>,
    /// Size of an extent, a power of two from 1MiB to 256GiB
    #[arg(long, value_parser = parse_size)]
    extent_size: Option<ByteCount>,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was made.
#[derive(Serialize)]
struct Formatted {
    device: String,
    uuid: String,
    size_bytes: u64,
    extent_bytes: u64,
    extents: u64,
    /// What was destroyed.
    replaced: Option<String>,
}

/// Runs `bessel format`.
pub(crate) fn run(arguments: &FormatArgs) -> Outcome {
    let device = &arguments.device;
    let created = prepare(arguments)?;
    let formatted = format(arguments).inspect_err(|_| {
        if created {
            let _ = std::fs::remove_file(device);
        }
    })?;
    print_either(arguments.json, &formatted, |formatted| {
        let size = ByteCount::new(formatted.size_bytes).human();
        let extent = ByteCount::new(formatted.extent_bytes).human();
        let replaced = formatted.replaced.as_ref();
        let replaced = replaced.map_or(String::new(), |what| format!(", destroying {what}"));
        format!(
            "formatted {}{replaced}: {size} in {} extents of {extent}, uuid {}",
            formatted.device, formatted.extents, formatted.uuid
        )
    })
}

/// Makes the file if there is none. True when it did.
fn prepare(arguments: &FormatArgs) -> Result<bool, Box<dyn std::error::Error>> {
    let device = &arguments.device;
    let name = device.display();
    if let Some(size) = arguments.size {
        check_shape(size, arguments.extent_size)
            .map_err(|what| format!("cannot format {name}: {what}"))?;
    }
    if let Ok(target) = std::fs::read_link(device)
        && !device.exists()
    {
        let target = target.display();
        return Err(format!(
            "{name} is a symbolic link to {target}, which is not there; correct the link"
        )
        .into());
    }
    let Ok(metadata) = std::fs::metadata(device) else {
        let size = arguments.size.ok_or_else(|| {
            format!("{name} does not exist; give --size to create a file, or correct the path")
        })?;
        create_file(device, size)
            .map_err(|error| format!("cannot create {name}: {error}; check its directory"))?;
        return Ok(true);
    };
    if arguments.size.is_some() && !metadata.is_file() {
        return Err(
            format!("{name} is no regular file and keeps its size; leave --size out").into()
        );
    }
    Ok(false)
}

fn format(arguments: &FormatArgs) -> Result<Formatted, Box<dyn std::error::Error>> {
    let path = &arguments.device;
    let named = |error: &dyn std::error::Error| {
        format!("cannot format {}: {}", path.display(), crate::one_line(error))
    };
    let _lock = DeviceLock::acquire(path).map_err(|error| named(&error))?;
    if let Some(size) = arguments.size {
        resize(path, size, arguments.force)?;
    }
    let options = OpenOptions::default();
    let mut device = FileDevice::open(path, &options).map_err(|error| named(&error))?;
    let random = entropy::read()?;
    let options = FormatOptions {
        extent_size: arguments.extent_size,
        force: arguments.force,
        uuid: random.uuid,
        secret: random.secret,
        time: SystemClock::start().wall(),
    };
    let progress = Progress::new("formatting", arguments.json);
    let report = store::format(&mut device, &options, &mut |done, total| progress.set(done, total));
    drop(progress);
    let report = report.map_err(|error| named(&error))?;
    Ok(Formatted {
        device: path.display().to_string(),
        uuid: uuid(&report.uuid),
        size_bytes: report.geometry.size().get(),
        extent_bytes: ByteCount::from_blocks(report.geometry.extent_blocks).get(),
        extents: report.geometry.extent_count,
        replaced: match report.replaced {
            Found::Blank => None,
            found => Some(found.to_string()),
        },
    })
}

/// Refuses a store that cannot be, before a file is made or changed for it.
fn check_shape(size: ByteCount, extent_size: Option<ByteCount>) -> Result<(), String> {
    if size > STORE_SIZE_MAX {
        return Err(format!("{} is too large; a store has at most 64PiB", size.exact()));
    }
    Geometry::plan(size, extent_size).map(|_| ()).map_err(|error| error.to_string())
}

/// Gives an existing file another size, unless it holds something that is to be kept.
fn resize(path: &Path, size: ByteCount, force: bool) -> Outcome {
    let name = path.display();
    let file = File::options().read(true).write(true).open(path)?;
    let length = file.metadata()?.len();
    if length == size.get() {
        return Ok(());
    }
    if !force && let Some(found) = held(path, &file, length, size)? {
        return Err(format!("{name} holds {found}; use --force to destroy it").into());
    }
    set_file_size(&file, size).map_err(|error| format!("cannot resize {name}: {error}"))?;
    Ok(())
}

/// What a file holds that another size would endanger. What is past the last whole block is looked
/// at here, since a device has none.
fn held(
    path: &Path,
    file: &File,
    length: u64,
    size: ByteCount,
) -> Result<Option<String>, Box<dyn std::error::Error>> {
    if length == 0 {
        return Ok(None);
    }
    if length < BLOCK_SIZE {
        return Ok(Some(format!("{length} bytes of something")));
    }
    let found = store::probe(&mut FileDevice::open(path, &OpenOptions::default())?)?;
    if found != Found::Blank {
        return Ok(Some(found.to_string()));
    }
    let mut tail = vec![0; (length % BLOCK_SIZE) as usize];
    file.read_exact_at(&mut tail, length - length % BLOCK_SIZE)?;
    if tail.iter().any(|&byte| byte != 0) {
        return Ok(Some("unknown data at its end".to_owned()));
    }
    let cut = size.get() < length && lseek(file, size.get() as i64, Whence::SeekData).is_ok();
    Ok(cut.then(|| format!("data past {}", size.exact())))
}
