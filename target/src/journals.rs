//! The journals of the reactors, as files beside the API socket: finding those that a killed daemon
//! left, making this life's, and removing them (`bessel_mapping::journal`).
//!
//! They are named for the store and the life of the daemon that they belong to, so that two daemons
//! in one directory do not meet, and hidden, since they are nobody else's business.

use bessel_mapping::journal::{self, Change, Identity, JOURNAL_BYTES, Journal};
use bessel_mapping::request::VolumeId;
use bessel_mapping::store::OpenedStore;
use bessel_reactor::outliving::OutlivingMemory;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// This life's journals and those found.
pub(crate) struct Journals {
    directory: PathBuf,
    /// Of the life that now begins.
    identity: Identity,
    found: Vec<PathBuf>,
    made: Vec<PathBuf>,
    outstanding: BTreeMap<VolumeId, Vec<Change>>,
    carries: bool,
}

impl Journals {
    /// Looks for what a killed daemon left in `directory`. `life` is the random name of this one.
    ///
    /// # Errors
    /// When the directory cannot be read. A file that cannot be is passed over, with a warning.
    pub(crate) fn find(directory: &Path, store: &OpenedStore, life: [u8; 16]) -> io::Result<Self> {
        let identity = Identity { store: store.superblock.uuid, boot: boot()?, life };
        let last = Identity { life: store.last_life(), ..identity };
        let prefix = prefix(&identity);
        let (mut found, mut read) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !name.starts_with(&prefix) {
                continue;
            }
            match OutlivingMemory::open(&path).map(|memory| journal::read(&memory.segment())) {
                Ok(Some((identity, entries))) if identity == last && !store.was_clean => {
                    read.push((identity, entries));
                }
                Ok(Some((_, entries))) if !entries.is_empty() => tracing::warn!(
                    "journal {} is of another life of the store and does not count",
                    path.display()
                ),
                Ok(_) => {}
                Err(error) if is_not_ours(&error) => {
                    tracing::warn!("journal {} is passed over: {error}", path.display());
                    continue; // Nor ours to remove.
                }
                // A start that was killed while it made the file.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Err(error) => {
                    let what = format!(
                        "journal {} cannot be read: {error}; remove it to give up what a killed \
                         daemon had answered and not flushed",
                        path.display()
                    );
                    return Err(io::Error::new(error.kind(), what));
                }
            }
            found.push(path);
        }
        if store.has_served() && !store.was_clean && read.is_empty() {
            tracing::info!(
                "no journal of the last life in {}: guests that outlived it may miss what they had \
                 not flushed; after a power cut this is as it should be",
                directory.display()
            );
        }
        if !store.has_served() || store.was_clean {
            read.clear();
        }
        let outstanding = journal::outstanding(read, &last);
        let directory = directory.to_owned();
        Ok(Self { directory, identity, found, made: Vec::new(), outstanding, carries: false })
    }

    /// What must be done again before anybody is served, by volume.
    pub(crate) fn take_outstanding(&mut self) -> BTreeMap<VolumeId, Vec<Change>> {
        std::mem::take(&mut self.outstanding)
    }

    /// The name of this life, to be given to the store when it begins to serve.
    pub(crate) fn life(&self) -> [u8; 16] {
        self.identity.life
    }

    /// Keeps changes that could not be made again, for the next life to try.
    ///
    /// # Errors
    /// As [`Journals::make`].
    pub(crate) fn carry(&mut self, left: &[(VolumeId, Vec<Change>)]) -> Result<(), String> {
        if left.is_empty() {
            return Ok(());
        }
        let entries = left.iter().map(|(_, changes)| changes.len()).sum();
        let (_memory, mut journal) = self.make_sized("carried", Journal::bytes_for(entries))?;
        for (volume, changes) in left {
            journal.carry(*volume, changes);
        }
        // It stays when this life ends.
        self.made.pop();
        self.carries = true;
        Ok(())
    }

    /// True when the store must not be closed as clean: the next life has something to do.
    pub(crate) fn carries(&self) -> bool {
        self.carries
    }

    /// Makes the journal of a reactor.
    ///
    /// # Errors
    /// One line that says which file, why, and what to do.
    pub(crate) fn make(&mut self, reactor: usize) -> Result<(OutlivingMemory, Journal), String> {
        self.make_sized(&reactor.to_string(), JOURNAL_BYTES)
    }

    fn make_sized(
        &mut self,
        which: &str,
        bytes: usize,
    ) -> Result<(OutlivingMemory, Journal), String> {
        let life = hex(&self.identity.life);
        let name = format!("{}{life}.{which}.journal", prefix(&self.identity));
        let path = self.directory.join(name);
        let memory = OutlivingMemory::create(&path, bytes).map_err(|error| {
            format!(
                "cannot make journal {}: {error}; the directory of api.socket must be writable and \
                 have {} MiB of room",
                path.display(),
                bytes.div_ceil(1 << 20)
            )
        })?;
        self.made.push(path);
        let journal = Journal::create(memory.segment(), &self.identity);
        Ok((memory, journal))
    }

    /// Removes what was found: all of it is durable, or can never count again.
    pub(crate) fn forget_found(&mut self) {
        remove(&mut self.found);
    }

    /// Removes this life's: everything is durable.
    pub(crate) fn forget_made(&mut self) {
        remove(&mut self.made);
    }
}

/// The file is another daemon's, or was planted.
fn is_not_ours(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::WouldBlock, io::ErrorKind::PermissionDenied];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(nix::libc::ELOOP)
}

fn remove(paths: &mut Vec<PathBuf>) {
    for path in paths.drain(..) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!("journal {} stays: {error}", path.display());
        }
    }
}

/// What the names of a store's journals begin with.
fn prefix(identity: &Identity) -> String {
    format!(".bessel-{}.", hex(&identity.store))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The kernel's boot id, as bytes.
fn boot() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string(BOOT_ID)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16);
    let number = number.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(number.to_be_bytes())
}
