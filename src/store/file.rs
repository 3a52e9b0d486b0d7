//! The file store: one folder, one daemon.
//!
//! ```text
//! data/keyrings/
//!   NAME.json             the keyring of the keyset NAME
//!   _installation.json    wrapped data keys, issuers, keysets
//!   _alive.json           when the daemon last published
//!   _notices.json         what receivers of notices have heard
//!   _initialising.json    only during initialisation
//!   _seen/NAME.json       generation and digest of the keyring seen last
//!   _seen/_installation.json
//!   _lock                 held by the daemon for its lifetime; holds its process id
//! ```
//!
//! No keyset's name contains `_` or `.`, so whatever a keyset is called, its files are its own.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::Semaphore;

use super::record::LONGEST_RECORD;
use super::{Digest, Document, Store, StoreError};
use crate::keyring::name::Name;
use crate::seal::file::create_folders;

const LOCK: &str = "_lock";
const SEEN: &str = "_seen";
const TEMPORARY_SUFFIX: &str = ".tmp";
const PRIVATE_FILE: Mode = Mode::from_raw_mode(0o600);
const PRIVATE_FOLDER: Mode = Mode::from_raw_mode(0o700);
/// Documents that share a lock wait for each other; different ones mostly do not.
const LOCKS: usize = 64;
/// Threads that may wait for the disk at once. Thousands of keysets may be due in one moment, and the threads that they
/// would take are also those that make RSA signatures.
const AT_ONCE: usize = 32;

/// Documents as files. Writes are atomic (a reader sees the old file or the new one) and durable (file and folder are
/// synced before they count), folders have mode 0700 and files 0600 whatever the umask, and an exclusive lock keeps a
/// second daemon out. All of it works on the folder that was opened, whatever is later mounted or moved to its path.
#[derive(Debug)]
pub struct FileStore {
    folder: Arc<Folder>,
    threads: Arc<Semaphore>,
}

impl FileStore {
    /// Opens the store in an existing folder and locks it (blocking).
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let folder = Folder::open(path)?;
        Ok(FileStore { folder: Arc::new(folder), threads: Arc::new(Semaphore::new(AT_ONCE)) })
    }

    /// Makes the folder, and its missing parents, with mode 0700 unless it exists; then opens it (blocking).
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        create_folders(path).map_err(|error| failure("create", &path.display().to_string(), error))?;
        Self::open(path)
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        document: String,
        work: impl FnOnce(&Folder) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let folder = Arc::clone(&self.folder);
        // It goes along, and is never closed: when the caller gives up, the work still counts until it ends.
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let work = move || {
            let _thread = thread;
            work(&folder)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
            let problem = "the process is ending".to_owned();
            Err(StoreError::Unavailable { operation, document, problem, source: None })
        })
    }
}

#[async_trait]
impl Store for FileStore {
    fn kind(&self) -> &'static str {
        "file"
    }

    /// The folder's inode and birth: a copy has others. A snapshot of the whole file system has the same.
    fn place(&self) -> Option<String> {
        let folder = File::from(self.folder.root.try_clone().ok()?).metadata().ok()?;
        let born = folder.created().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        Some(format!("{}-{}", folder.ino(), born.unwrap_or_default().as_nanos()))
    }

    fn locate(&self, document: &Document) -> String {
        self.folder.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        let document = document.clone();
        self.blocking("read", self.locate(&document), move |folder| folder.read(&document)).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        let (document, bytes) = (document.clone(), bytes.to_vec());
        self.blocking("write", self.locate(&document), move |folder| folder.replace(&document, expected, &bytes)).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        let document = document.clone();
        self.blocking("remove", self.locate(&document), move |folder| folder.remove(&document)).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.blocking("list", self.folder.path.display().to_string(), Folder::keysets).await
    }
}

/// The blocking half.
#[derive(Debug)]
struct Folder {
    /// Absolute, for messages and to notice that something else stands there now.
    path: PathBuf,
    root: OwnedFd,
    seen: OwnedFd,
    /// Keeps other daemons out while it is open.
    _lock: File,
    /// Writers of one document take turns, since they compare and then replace.
    writing: [Mutex<()>; LOCKS],
    /// How many syncs of a folder failed after a file in it was replaced or removed, and how many of those were made
    /// up for: nothing read counts as durable before the two agree.
    missed_syncs: AtomicU64,
    made_up_for: AtomicU64,
}

impl Folder {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let shown = path.display().to_string();
        let failed = |error: io::Error| failure("open", &shown, error);
        let path = fs::canonicalize(path).map_err(failed)?;
        let root = open_folder(rustix::fs::CWD, &path).map_err(failed)?;
        refuse_if_others_may_write(&path).map_err(failed)?;
        let lock = lock(&root, &path)?;
        let seen = match open_folder(&root, SEEN.as_ref()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make_folder(&root, SEEN).map_err(failed)?,
            found => found.map_err(failed)?,
        };
        refuse_if_others_may_write(&path.join(SEEN)).map_err(failed)?;
        let folder = Folder {
            path,
            root,
            seen,
            _lock: lock,
            writing: std::array::from_fn(|_| Mutex::new(())),
            missed_syncs: AtomicU64::new(0),
            made_up_for: AtomicU64::new(0),
        };
        folder.remove_leftovers().map_err(failed)?;
        Ok(folder)
    }

    fn locate(&self, document: &Document) -> String {
        let (in_seen, name) = place(document);
        let folder = if in_seen { self.path.join(SEEN) } else { self.path.clone() };
        folder.join(name).display().to_string()
    }

    fn place(&self, document: &Document) -> (&OwnedFd, String) {
        let (in_seen, name) = place(document);
        (if in_seen { &self.seen } else { &self.root }, name)
    }

    fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        let failed = |error: io::Error| failure("read", &self.locate(document), error);
        // Between a writer's rename and its sync the file is visible, but not to be relied on.
        let _turn = self.turn(document);
        self.still_there().map_err(failed)?;
        self.make_up_for_missed_syncs().map_err(failed)?;
        self.content(document).map_err(failed)
    }

    fn content(&self, document: &Document) -> io::Result<Option<Vec<u8>>> {
        let (folder, name) = self.place(document);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(folder, &name, flags, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            opened => File::from(opened?),
        };
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let mut bytes = Vec::new();
        // One byte more than a record may have, so that what is too long is noticed and refused, not cut.
        file.take(LONGEST_RECORD as u64 + 1).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        let failed = |error: io::Error| failure("write", &self.locate(document), error);
        let _turn = self.turn(document);
        self.still_there().map_err(failed)?;
        let (folder, name) = self.place(document);
        let temporary = temporary_name(&name);
        let written = write_temporary(folder, &temporary, bytes, is_durable(document)).map_err(failed).and_then(|()| {
            let current = self.content(document).map_err(failed)?;
            if current.map(|bytes| Digest::of(&bytes)) != expected {
                return Err(StoreError::Conflict { document: self.locate(document) });
            }
            rustix::fs::renameat(folder, &temporary, folder, &name).map_err(|error| failed(error.into()))
        });
        if let Err(error) = written {
            // What cannot be removed now is removed at the next start.
            let _ = rustix::fs::unlinkat(folder, &temporary, AtFlags::empty());
            return Err(error);
        }
        if is_durable(document) { self.sync(folder).map_err(failed) } else { Ok(()) }
    }

    fn remove(&self, document: &Document) -> Result<(), StoreError> {
        let failed = |error: io::Error| failure("remove", &self.locate(document), error);
        let _turn = self.turn(document);
        self.still_there().map_err(failed)?;
        let (folder, name) = self.place(document);
        match rustix::fs::unlinkat(folder, &name, AtFlags::empty()) {
            // Synced even when it is gone already: an earlier attempt may have failed between the two.
            Ok(()) | Err(Errno::NOENT) => self.sync(folder).map_err(failed),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        let failed = |error: io::Error| failure("list", &self.path.display().to_string(), error);
        self.still_there().map_err(failed)?;
        self.make_up_for_missed_syncs().map_err(failed)?;
        let files = file_names(&self.root).map_err(failed)?;
        let mut keysets: Vec<Name> =
            files.iter().filter_map(|file| Name::parse(file.strip_suffix(".json")?).ok()).collect();
        keysets.sort();
        Ok(keysets)
    }

    fn turn(&self, document: &Document) -> std::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        document.hash(&mut hasher);
        // The guarded state is on disk and whole at every instant, so a panic of its last holder does not matter.
        self.writing[hasher.finish() as usize % LOCKS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails when another folder stands at the path: what is written here would be missing after a restart.
    fn still_there(&self) -> io::Result<()> {
        let (ours, found) = (rustix::fs::fstat(&self.root)?, fs::metadata(&self.path));
        match found {
            Ok(found) if (found.dev(), found.ino()) == (ours.st_dev, ours.st_ino) => Ok(()),
            Ok(_) => Err(io::Error::other("its folder was replaced while in use: restart jwksd to use the new one")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(io::Error::other("its folder was moved or removed while in use: put it back, or restart jwksd"))
            }
            Err(error) => Err(error),
        }
    }

    fn sync(&self, folder: &OwnedFd) -> io::Result<()> {
        rustix::fs::fsync(folder).map_err(|error| {
            self.missed_syncs.fetch_add(1, Ordering::SeqCst);
            error.into()
        })
    }

    /// After a failed sync a new file may be visible but not durable; a reader that took it for confirmed would publish
    /// what a power failure takes back.
    fn make_up_for_missed_syncs(&self) -> io::Result<()> {
        let missed = self.missed_syncs.load(Ordering::SeqCst);
        if missed != self.made_up_for.load(Ordering::SeqCst) {
            rustix::fs::fsync(&self.root)?;
            rustix::fs::fsync(&self.seen)?;
            self.made_up_for.fetch_max(missed, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Temporary files of a daemon that was killed while writing.
    fn remove_leftovers(&self) -> io::Result<()> {
        for folder in [&self.root, &self.seen] {
            let leftover = |file: &String| file.starts_with('.') && file.ends_with(TEMPORARY_SUFFIX);
            let leftovers: Vec<_> = file_names(folder)?.into_iter().filter(leftover).collect();
            for file in &leftovers {
                match rustix::fs::unlinkat(folder, file, AtFlags::empty()) {
                    // Served from a read-only disk, the daemon still publishes and signs; nothing reads these files.
                    Ok(()) | Err(Errno::NOENT | Errno::ROFS) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            if !leftovers.is_empty() {
                rustix::fs::fsync(folder)?;
            }
        }
        Ok(())
    }
}

/// Whether the document is in the folder of seen marks, and its file name.
fn place(document: &Document) -> (bool, String) {
    match document {
        Document::Initialising => (false, "_initialising.json".into()),
        Document::Installation => (false, "_installation.json".into()),
        Document::Alive => (false, "_alive.json".into()),
        Document::Notices => (false, "_notices.json".into()),
        Document::Keyring(name) => (false, format!("{name}.json")),
        Document::Seen(name) => (true, format!("{name}.json")),
        Document::SeenInstallation => (true, "_installation.json".into()),
    }
}

/// `Alive` is written every few seconds and needs no sync: after a power failure an older or missing one makes the
/// daemon think that it was silent for longer, which only makes it wait.
fn is_durable(document: &Document) -> bool {
    !matches!(document, Document::Alive)
}

fn temporary_name(name: &str) -> String {
    format!(".{name}{TEMPORARY_SUFFIX}")
}

fn write_temporary(folder: &OwnedFd, name: &str, bytes: &[u8], durable: bool) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // One that could not be removed earlier; the writer's turn makes it nobody else's.
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let mut file = File::from(rustix::fs::openat(folder, name, flags, PRIVATE_FILE)?);
    // The mode above is an upper bound that the umask cuts; this is exact.
    rustix::fs::fchmod(&file, PRIVATE_FILE)?;
    file.write_all(bytes)?;
    if durable { file.sync_all() } else { Ok(()) }
}

fn open_folder<Fd: rustix::fd::AsFd>(parent: Fd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, path, flags, Mode::empty())?)
}

fn make_folder(parent: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    rustix::fs::mkdirat(parent, name, PRIVATE_FOLDER)?;
    let folder = open_folder(parent, name.as_ref())?;
    rustix::fs::fchmod(&folder, PRIVATE_FOLDER)?;
    rustix::fs::fsync(parent)?;
    Ok(folder)
}

/// Whoever can write here can delete records or put back older ones. The one exception is how Kubernetes hands a volume
/// to a pod's group (`fsGroup`): group-writable with the set-group-id bit.
fn refuse_if_others_may_write(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
    let group_may_write = mode & 0o020 != 0 && mode & 0o2000 == 0;
    if mode & 0o002 != 0 || group_may_write {
        let text =
            format!("others than its owner may write to it (mode {mode:04o}): run `chmod 700 {}`", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, Explained(text)));
    }
    Ok(())
}

fn lock(root: &OwnedFd, path: &Path) -> Result<File, StoreError> {
    let failed = |error: Errno| failure("lock", &path.join(LOCK).display().to_string(), error.into());
    // Held for reading only, so that the disk can be remounted read-only under a running daemon.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = match rustix::fs::openat(root, LOCK, flags | OFlags::CREATE, PRIVATE_FILE) {
        Err(Errno::ROFS) => rustix::fs::openat(root, LOCK, flags, Mode::empty()),
        opened => opened,
    }
    .map(File::from)
    .map_err(failed)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            let document = path.display().to_string();
            return Err(StoreError::Locked { document, holder: holder(&mut file) });
        }
        Err(error) => return Err(failed(error)),
    }
    // The process id only helps a person; where it cannot be written the lock holds as well.
    let _ = rustix::fs::fchmod(&file, PRIVATE_FILE);
    let _ = leave_process_id(root);
    Ok(file)
}

fn leave_process_id(root: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(rustix::fs::openat(root, LOCK, flags, Mode::empty())?);
    file.write_all(format!("{}\n", std::process::id()).as_bytes())
}

fn holder(lock: &mut File) -> String {
    let mut text = String::new();
    let read = Read::by_ref(lock).take(20).read_to_string(&mut text);
    match text.trim().parse::<u32>() {
        Ok(pid) if read.is_ok() => format!("process {pid}"),
        _ => "a process that left no number".to_owned(),
    }
}

fn file_names(folder: &OwnedFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        // What is not UTF-8 is not ours.
        if let Ok(name) = entry?.file_name().to_str() {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// An I/O error whose text already says everything.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Explained(String);

fn failure(operation: &'static str, document: &str, source: io::Error) -> StoreError {
    let problem = match source.kind() {
        _ if source.get_ref().is_some_and(|inner| inner.is::<Explained>()) => source.to_string(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full; what was there is intact. Free some space: it is tried again".to_owned()
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "the file system is read-only; what was there is intact. Remount it writable: it is tried again".to_owned()
        }
        io::ErrorKind::PermissionDenied => "permission denied: it must belong to the user that runs jwksd".to_owned(),
        io::ErrorKind::NotFound => {
            "it does not exist: run `jwksd init`, or check [store] path and whether its volume is mounted".to_owned()
        }
        io::ErrorKind::NotADirectory => "it is not a folder: check [store] path".to_owned(),
        _ if source.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            "it is a symbolic link: put the file itself there".to_owned()
        }
        _ => source.to_string(),
    };
    StoreError::Unavailable { operation, document: document.to_owned(), problem, source: Some(Box::new(source)) }
}
