//! Whether two paths name one place.
//!
//! A store, the API and each volume have a place of their own; one that took another's would
//! disable it, for good where the daemon is started anew with the same names. So paths are compared
//! by where they lead and not by how they are spelt.

use std::path::{Path, PathBuf};

/// The one spelling of `path`: its directory without links and dots. What is not there yet keeps
/// the spelling it has.
pub(crate) fn normal(path: &Path) -> PathBuf {
    let (Some(name), Some(parent)) = (path.file_name(), path.parent()) else {
        return std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    std::fs::canonicalize(parent).map_or_else(|_| path.to_owned(), |parent| parent.join(name))
}

/// Whether a socket at `socket` would be in the place of the store, or of what a link leads to.
pub(crate) fn is_store(socket: &Path, device: &Path) -> bool {
    let socket = normal(socket);
    socket == normal(device) || std::fs::canonicalize(device).is_ok_and(|device| socket == device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_place_are_equal() {
        let name = format!("bessel-places-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(directory.join("w")).unwrap();
        std::os::unix::fs::symlink("w", directory.join("link")).unwrap();
        let at = |path: &str| directory.join(path);
        for path in ["w/./a.sock", "w/../w/a.sock", "w//a.sock", "link/a.sock"] {
            assert_eq!(normal(&at(path)), normal(&at("w/a.sock")), "{path}");
        }
        for path in ["w/b.sock", "a.sock", "w", "w/no/../a.sock"] {
            assert_ne!(normal(&at(path)), normal(&at("w/a.sock")), "{path}");
        }
        std::fs::write(at("w/store.img"), "").unwrap();
        std::os::unix::fs::symlink("w/store.img", at("store.img")).unwrap();
        assert!(is_store(&at("link/store.img"), &at("store.img")));
        assert!(is_store(&at("store.img"), &at("store.img")), "the link is the store's too");
        assert!(!is_store(&at("w/a.sock"), &at("store.img")));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
