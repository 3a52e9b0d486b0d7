//! A folder that a web server serves.
//!
//! ```text
//! public/
//!   tenant-a/.well-known/jwks.json
//!   tenant-a/.well-known/.jwks.json.generations   from which generations it was rendered
//!   .jwksd.lock                                   held while one of several daemons compares and writes
//! ```
//!
//! Folders have mode 0755 and files 0644 whatever the umask: the web server is another user.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::{BODY_MAX, Operation, Outgoing, Placed, PublishError, Publisher, Version};
use crate::keyring::placement::GENERATIONS_BYTES_MAX;

const LOCK: &str = ".jwksd.lock";
const PUBLIC_FILE: Mode = Mode::from_raw_mode(0o644);
const PUBLIC_FOLDER: Mode = Mode::from_raw_mode(0o755);

/// How long a call may take, waiting for another daemon and for a slow disk included.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How often the lock is tried while another daemon holds it, and how long to wait in between.
const LOCK_TRIES: u32 = 200;
const LOCK_PAUSE: Duration = Duration::from_millis(25);

/// Documents as files below a folder. A reader sees the old file or the new one; a symbolic link in a document's place
/// is replaced and never followed.
pub struct FilePublisher {
    root: PathBuf,
    /// One call at a time: a file system that hangs holds up one thread, not one more with each attempt.
    turn: Arc<Mutex<()>>,
}

impl FilePublisher {
    /// Nothing is opened yet; the folder is made when something is placed, if its parent is there.
    pub fn new(root: PathBuf) -> Self {
        FilePublisher { root, turn: Arc::default() }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        operation: Operation,
        path: &str,
        work: impl FnOnce(&Place) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, PublishError> {
        let place = self.locate(path);
        let failed = |problem: String, source: Option<io::Error>| PublishError::Failed {
            operation,
            place: place.clone(),
            problem,
            source: source.map(|error| error.into()),
        };
        let document = Place::new(&self.root, path)
            .ok_or_else(|| failed(format!("`{path}` is no path of a public document"), None))?;
        let turn = self.turn.clone();
        let work = async {
            let turn = turn.lock_owned().await;
            tokio::task::spawn_blocking(move || {
                let _turn = turn;
                work(&document)
            })
            .await
        };
        match timeout(TIMEOUT, work).await {
            Ok(Ok(Ok(done))) => Ok(done),
            Ok(Ok(Err(Failure::Conflict))) => Err(PublishError::Conflict { place }),
            Ok(Ok(Err(Failure::TooLarge))) => Err(PublishError::TooLarge { place }),
            Ok(Ok(Err(Failure::Io(error)))) => Err(failed(explained(&error), Some(error))),
            Ok(Err(_)) => Err(failed("the process is ending".to_owned(), None)),
            Err(_) => Err(failed(format!("the file system does not answer within {} s", TIMEOUT.as_secs()), None)),
        }
    }
}

#[async_trait]
impl Publisher for FilePublisher {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn locate(&self, path: &str) -> String {
        self.root.join(path.trim_start_matches('/')).display().to_string()
    }

    async fn read(&self, path: &str) -> Result<Option<Placed>, PublishError> {
        self.blocking(Operation::Read, path, Place::read).await
    }

    async fn put(&self, path: &str, document: &Outgoing, expected: Option<&Version>) -> Result<(), PublishError> {
        let (document, expected) = (document.clone(), expected.cloned());
        self.blocking(Operation::Write, path, move |place| place.put(&document, expected.as_ref())).await
    }
}

/// One document's place, for the blocking half.
struct Place {
    root: PathBuf,
    folders: Vec<String>,
    name: String,
}

enum Failure {
    Conflict,
    TooLarge,
    Io(io::Error),
}

impl<E: Into<io::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Io(error.into())
    }
}

impl Place {
    /// `None` for a path that could lead out of the folder or to a file of ours.
    fn new(root: &Path, path: &str) -> Option<Self> {
        let mut folders: Vec<String> = path.strip_prefix('/')?.split('/').map(str::to_owned).collect();
        let plain = |name: &String| !matches!(name.as_str(), "" | "." | ".." | LOCK) && !name.contains('\0');
        if !folders.iter().all(plain) {
            return None;
        }
        let name = folders.pop().filter(|name| !name.ends_with(".generations") && !name.ends_with(".tmp"))?;
        Some(Place { root: root.to_owned(), folders, name })
    }

    fn read(&self) -> Result<Option<Placed>, Failure> {
        let root = match open_folder(CWD, &self.root) {
            Err(Errno::NOENT) => return Ok(None),
            opened => opened?,
        };
        // Between a writer's two renames the mark belongs to the next document.
        let _lock = lock(&root, FlockOperation::NonBlockingLockShared)?;
        let mut folder = root.try_clone()?;
        for name in &self.folders {
            folder = match open_folder(&folder, name) {
                Err(Errno::NOENT) => return Ok(None),
                opened => opened?,
            };
        }
        self.placed(&folder)
    }

    fn put(&self, document: &Outgoing, expected: Option<&Version>) -> Result<(), Failure> {
        let root = match open_folder(CWD, &self.root) {
            Err(Errno::NOENT) => make_folder(CWD, self.root.as_os_str())?,
            opened => opened?,
        };
        let _lock = lock(&root, FlockOperation::NonBlockingLockExclusive)?;
        let mut folder = root.try_clone()?;
        for name in &self.folders {
            folder = match open_folder(&folder, name) {
                Err(Errno::NOENT) => make_folder(&folder, name.as_ref())?,
                opened => opened?,
            };
        }
        self.compare(&folder, expected)?;
        let mark_name = self.mark();
        let mark = Staged::write(&folder, &mark_name, document.generations.as_bytes())?;
        let body = Staged::write(&folder, &self.name, &document.body)?;
        // Again, since writing takes its time and nobody but us minds the lock: what others did meanwhile is to be seen.
        self.compare(&folder, expected)?;
        // The mark first: after a crash in between, what is there looks newer than it is and gives way to nothing older.
        mark.place()?;
        body.place()?;
        Ok(rustix::fs::fsync(&folder)?)
    }

    fn compare(&self, folder: &OwnedFd, expected: Option<&Version>) -> Result<(), Failure> {
        let found = self.placed(folder)?.map(|placed| placed.version);
        if found.as_ref() == expected { Ok(()) } else { Err(Failure::Conflict) }
    }

    fn placed(&self, folder: &OwnedFd) -> Result<Option<Placed>, Failure> {
        let Some(body) = content(folder, &self.name, BODY_MAX)? else { return Ok(None) };
        let mark = content(folder, &self.mark(), GENERATIONS_BYTES_MAX)?;
        let version = version(&body, mark.as_deref());
        let generations = mark.and_then(|mark| String::from_utf8(mark).ok());
        Ok(Some(Placed { body: body.into(), headers: None, generations, version }))
    }

    fn mark(&self) -> String {
        format!(".{}.generations", self.name)
    }
}

/// Both files, so that a write which got no further than the mark is noticed too.
fn version(body: &[u8], mark: Option<&[u8]>) -> Version {
    let digest = |bytes: &[u8]| {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    Version(format!("{}-{}", digest(body), mark.map(digest).unwrap_or_default()))
}

fn open_folder(parent: impl AsFd, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn make_folder(parent: impl AsFd, name: &OsStr) -> Result<OwnedFd, Failure> {
    match rustix::fs::mkdirat(&parent, name, PUBLIC_FOLDER) {
        Ok(()) => {
            let made = open_folder(&parent, name)?;
            // The mode above is an upper bound that the umask cuts; this is exact.
            rustix::fs::fchmod(&made, PUBLIC_FOLDER)?;
            // The folder above may be one that this user may not open; then its entry is as durable as it gets.
            if let Ok(above) = rustix::fs::openat(&parent, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
                let _ = rustix::fs::fsync(&above);
            }
            Ok(made)
        }
        // Somebody else made it just now.
        Err(Errno::EXIST) => Ok(open_folder(&parent, name)?),
        Err(error) => Err(error.into()),
    }
}

/// Taken for the moments of a read or a write, so trying again for a while is enough.
fn lock(root: &OwnedFd, operation: FlockOperation) -> Result<Option<File>, Failure> {
    let shared = matches!(operation, FlockOperation::NonBlockingLockShared);
    // NFS locks exclusively only what is open for writing.
    let access = if shared { OFlags::RDONLY } else { OFlags::RDWR | OFlags::CREATE };
    let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(root, LOCK, flags, PUBLIC_FILE) {
        // Nobody ever wrote here.
        Err(Errno::NOENT) if shared => return Ok(None),
        opened => File::from(opened?),
    };
    if !shared {
        // Whoever owns it made it; the mode above is an upper bound that the umask cuts.
        let _ = rustix::fs::fchmod(&file, PUBLIC_FILE);
    }
    for _ in 0..LOCK_TRIES {
        match rustix::fs::flock(&file, operation) {
            Err(Errno::WOULDBLOCK | Errno::INTR) => std::thread::sleep(LOCK_PAUSE),
            done => return Ok(done.map(|()| Some(file))?),
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("another process holds {LOCK}")).into())
}

/// A file's bytes, at most `limit`; `None` when it does not exist. A symbolic link is no document of ours.
fn content(folder: &OwnedFd, name: &str, limit: usize) -> Result<Option<Vec<u8>>, Failure> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        // What it points to is not looked at: an empty document, which is replaced with the link.
        Err(Errno::LOOP) => return Ok(Some(Vec::new())),
        opened => File::from(opened?),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file: remove it").into());
    }
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit { Err(Failure::TooLarge) } else { Ok(Some(bytes)) }
}

/// A file beside the one that it is to replace. The caller holds the lock.
struct Staged<'a> {
    folder: &'a OwnedFd,
    name: &'a str,
    temporary: String,
}

impl<'a> Staged<'a> {
    fn write(folder: &'a OwnedFd, name: &'a str, bytes: &[u8]) -> Result<Self, Failure> {
        let temporary = format!(".{name}.tmp");
        match rustix::fs::unlinkat(folder, &temporary, AtFlags::empty()) {
            // Of a daemon that was killed while writing.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        // Before it is written: what is there of it goes away with this.
        let staged = Staged { folder, name, temporary };
        write(folder, &staged.temporary, bytes)?;
        Ok(staged)
    }

    /// Atomic and, once the folder is synced, durable.
    fn place(self) -> Result<(), Failure> {
        Ok(rustix::fs::renameat(self.folder, &self.temporary, self.folder, self.name)?)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // Nothing is left after `place`; what cannot be removed now is removed by the next write.
        let _ = rustix::fs::unlinkat(self.folder, &self.temporary, AtFlags::empty());
    }
}

fn write(folder: &OwnedFd, name: &str, bytes: &[u8]) -> Result<(), Failure> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(rustix::fs::openat(folder, name, flags, PUBLIC_FILE)?);
    rustix::fs::fchmod(&file, PUBLIC_FILE)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

fn explained(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "the folder above it does not exist: make it".to_owned(),
        io::ErrorKind::PermissionDenied => "give the user that runs jwksd the right to write there".to_owned(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "there is no room left".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        _ => "the file system refuses it".to_owned(),
    }
}
