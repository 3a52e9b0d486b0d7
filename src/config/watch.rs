//! Notices when files change, by their content.
//!
//! Files are read again every two seconds. Notification by the kernel (inotify) would miss what matters here: a mounted
//! Kubernetes secret changes by swapping a symbolic link two folders up, and network file systems notify nobody. A few
//! small files cost nothing to read, and comparing content makes it irrelevant how they were replaced.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// How often files are looked at.
pub const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Larger files are all the same to the watch; none that the daemon would read is as large.
const LONGEST_FILE: u64 = 16 * 1024 * 1024;

/// SHA-256 of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentDigest([u8; 32]);

/// Files and what they contained when last looked at.
#[derive(Debug)]
pub struct Watch {
    seen: BTreeMap<PathBuf, Seen>,
    interval: Duration,
}

/// A file at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Content(ContentDigest),
    Absent,
    Unreadable,
    TooLong,
}

impl ContentDigest {
    pub fn of(content: &[u8]) -> Self {
        ContentDigest(Sha256::digest(content).into())
    }

    /// Its first eight bytes in hexadecimal, to tell contents apart in names.
    pub fn short(&self) -> String {
        self.0[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Watch {
    /// Watches `paths`, whether they exist or not. Make the watch before reading the files, so that no change falls in
    /// between; for what was read earlier, see [`knowing`](Self::knowing).
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let seen = paths.into_iter().map(|path| (path.clone(), look(&path))).collect();
        Watch { seen, interval: POLL_INTERVAL }
    }

    /// Compares `path` with a content that was read before, instead of with what it is now.
    #[must_use]
    pub fn knowing(mut self, path: PathBuf, content: ContentDigest) -> Self {
        self.seen.insert(path, Seen::Content(content));
        self
    }

    /// Looks every `interval` instead of every [`POLL_INTERVAL`].
    #[must_use]
    pub fn every(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Watches from now on what `other` watches; of files watched before, what is known here counts.
    pub fn follow(&mut self, other: Watch) {
        let known = std::mem::replace(&mut self.seen, other.seen);
        for (path, seen) in &mut self.seen {
            if let Some(known) = known.get(path) {
                *seen = *known;
            }
        }
    }

    /// Waits until files differ from what they were, appear or disappear, and returns which. May be dropped while it
    /// waits; nothing is lost. Never returns an empty list.
    pub async fn changed(&mut self) -> Vec<PathBuf> {
        loop {
            tokio::time::sleep(self.interval).await;
            let paths: Vec<PathBuf> = self.seen.keys().cloned().collect();
            let looked = tokio::task::spawn_blocking(move || {
                paths.into_iter().map(|path| (look(&path), path)).collect::<Vec<_>>()
            });
            // The runtime shuts down, or reading panicked: the next round looks again.
            let Ok(looked) = looked.await else { continue };
            let changed = self.note(looked);
            if !changed.is_empty() {
                return changed;
            }
        }
    }

    fn note(&mut self, looked: Vec<(Seen, PathBuf)>) -> Vec<PathBuf> {
        let mut changed = Vec::new();
        for (now, path) in looked {
            if self.seen.insert(path.clone(), now) != Some(now) {
                changed.push(path);
            }
        }
        changed
    }
}

fn look(path: &Path) -> Seen {
    // Not even opened unless regular: opening a FIFO would wait for its writer.
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => read(path),
        Ok(_) => Seen::Unreadable,
        Err(error) => Seen::of(&error),
    }
}

fn read(path: &Path) -> Seen {
    let mut file = match File::open(path) {
        Ok(file) => file.take(LONGEST_FILE + 1),
        Err(error) => return Seen::of(&error),
    };
    // Hashed piece by piece: secrets do not pile up in memory.
    let mut hash = Sha256::new();
    let mut piece = zeroize::Zeroizing::new([0; 8192]);
    let mut length = 0;
    loop {
        match file.read(piece.as_mut_slice()) {
            Ok(0) if length > LONGEST_FILE => return Seen::TooLong,
            Ok(0) => return Seen::Content(ContentDigest(hash.finalize().into())),
            Ok(count) => {
                hash.update(&piece[..count]);
                length += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Seen::of(&error),
        }
    }
}

impl Seen {
    fn of(error: &std::io::Error) -> Seen {
        if error.kind() == ErrorKind::NotFound { Seen::Absent } else { Seen::Unreadable }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_files_whose_content_changed_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| folder.path().join(name));
        std::fs::write(&a, "1").unwrap();
        std::fs::write(&b, "1").unwrap();
        let mut watch = Watch::new([a.clone(), b.clone(), c.clone()]);
        std::fs::write(&a, "1").unwrap();
        std::fs::write(&b, "2").unwrap();
        assert_eq!(watch.changed().await, [b]);
        std::fs::write(&c, "1").unwrap();
        assert_eq!(watch.changed().await, [c]);
        std::fs::remove_file(&a).unwrap();
        assert_eq!(watch.changed().await, [a]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_between_reading_and_watching_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(&path, "new").unwrap();
        let mut watch = Watch::new([path.clone()]).knowing(path.clone(), ContentDigest::of(b"old"));
        assert_eq!(watch.changed().await, [path]);
    }

    #[tokio::test(start_paused = true)]
    async fn following_other_files_keeps_what_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let [kept, dropped] = ["kept", "dropped"].map(|name| folder.path().join(name));
        std::fs::write(&kept, "1").unwrap();
        let mut watch = Watch::new([kept.clone(), dropped.clone()]);
        std::fs::write(&kept, "2").unwrap();
        std::fs::write(&dropped, "2").unwrap();
        watch.follow(Watch::new([kept.clone()]));
        assert_eq!(watch.changed().await, [kept]);
    }
}
