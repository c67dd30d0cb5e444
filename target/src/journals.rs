//! The journals of the reactors, as files beside the API socket: finding those that a killed daemon
//! left, making this life's, and removing them (`bessel_mapping::journal`).
//!
//! They are named for the store and the opening of it that they belong to, so that two daemons in one
//! directory do not meet, and hidden, since they are nobody else's business.

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
    identity: Identity,
    found: Vec<PathBuf>,
    made: Vec<PathBuf>,
    outstanding: BTreeMap<VolumeId, Vec<Change>>,
}

impl Journals {
    /// Looks for what a killed daemon left in `directory`.
    ///
    /// # Errors
    /// When the directory cannot be read. A file that cannot be is passed over, with a warning.
    pub(crate) fn find(directory: &Path, store: &OpenedStore) -> io::Result<Self> {
        let identity = Identity { store: store.superblock.uuid, boot: boot()?, epoch: store.epoch };
        let prefix = prefix(&identity);
        let (mut found, mut read) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !name.starts_with(&prefix) {
                continue;
            }
            match OutlivingMemory::open(&path) {
                Ok(memory) => read.extend(journal::read(&memory.segment())),
                Err(error) => tracing::warn!("journal {} is passed over: {error}", path.display()),
            }
            found.push(path);
        }
        let outstanding = journal::outstanding(read, &identity);
        let directory = directory.to_owned();
        Ok(Self { directory, identity, found, made: Vec::new(), outstanding })
    }

    /// What must be done again before anybody is served, by volume.
    pub(crate) fn take_outstanding(&mut self) -> BTreeMap<VolumeId, Vec<Change>> {
        std::mem::take(&mut self.outstanding)
    }

    /// Makes the journal of a reactor.
    ///
    /// # Errors
    /// One line that says which file, why, and what to do.
    pub(crate) fn make(&mut self, reactor: usize) -> Result<(OutlivingMemory, Journal), String> {
        let name = format!("{}{}.{reactor}.journal", prefix(&self.identity), self.identity.epoch);
        let path = self.directory.join(name);
        let memory = OutlivingMemory::create(&path, JOURNAL_BYTES).map_err(|error| {
            format!(
                "cannot make journal {}: {error}; give the directory of api.socket {} MiB of room",
                path.display(),
                JOURNAL_BYTES.div_ceil(1 << 20)
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

fn remove(paths: &mut Vec<PathBuf>) {
    for path in paths.drain(..) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::warn!("journal {} stays: {error}", path.display());
        }
    }
}

/// What the names of a store's journals begin with.
fn prefix(identity: &Identity) -> String {
    let uuid: String = identity.store.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(".bessel-{uuid}.")
}

/// The kernel's boot id, as bytes.
fn boot() -> io::Result<[u8; 16]> {
    let text = std::fs::read_to_string(BOOT_ID)?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let number = u128::from_str_radix(&digits, 16);
    let number = number.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(number.to_be_bytes())
}
