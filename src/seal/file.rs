//! The file seal: a key-encryption key in a file of its own.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use aws_lc_rs::aead::NONCE_LEN;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustix::fs::{CWD, RenameFlags};
use zeroize::Zeroizing;

use super::cipher::{Cipher, SECRET_LEN, derive, hex};
use super::{KeyEncryptionKey, SealError};

/// What a key file starts with, so that a person and a secret scanner recognise it.
const PREFIX: &str = "jwksd-seal-v1:";
const DOMAIN: &str = "jwksd-seal-v1";
/// No key file is longer; reading stops there.
const LONGEST_FILE: u64 = 1024;
const WAY_OUT: &str = "restore the file from your backup, see docs/restore.md";

/// A 32-byte key from a file with one line, `jwksd-seal-v1:` and base64url. It wraps with AES-256-GCM; the wrapping key
/// and the id are both derived (HKDF-SHA256), so the id tells nothing about the key.
pub struct FileKey {
    id: String,
    cipher: Cipher,
}

impl FileKey {
    /// Reads the key of an existing file (blocking).
    ///
    /// Refused are files that others than owner and group can touch, and anything that is not a key. Owner and group
    /// may: Kubernetes mounts secrets as 0440 and volumes as 0660 for the pod's group.
    pub fn load(path: &Path) -> Result<Self, SealError> {
        let wrong = |problem: String| SealError::File { path: path.display().to_string(), problem };
        // Not blocking: a pipe in its place must not hold up the start.
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| wrong(unreadable(&error)))?;
        let metadata = file.metadata().map_err(|error| wrong(unreadable(&error)))?;
        if !metadata.is_file() {
            return Err(wrong(format!("is not a regular file; {WAY_OUT}")));
        }
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o007 != 0 {
            return Err(wrong(format!(
                "has mode {mode:04o}, so every user of this machine can get at it; run `chmod 600` on it, and \
                 `jwksd reseal` with a new key if somebody may have read it"
            )));
        }
        // Sized up front: a growing buffer would leave copies of the key behind.
        let mut text = Zeroizing::new(String::with_capacity(LONGEST_FILE as usize + 1));
        file.take(LONGEST_FILE).read_to_string(&mut text).map_err(|error| wrong(unreadable(&error)))?;
        let secret = parse(&text).ok_or_else(|| {
            wrong(format!("does not hold a seal key (one line, `{PREFIX}` and 43 characters); {WAY_OUT}"))
        })?;
        Ok(Self::from_secret(&secret))
    }

    /// Makes a new key and its file, mode 0600 whatever the umask, durable before this returns (blocking). Missing
    /// folders are made with mode 0700. The file appears whole or not at all, and an existing one is never touched.
    pub fn create(path: &Path) -> Result<Self, SealError> {
        let wrong =
            |error: io::Error| SealError::File { path: path.display().to_string(), problem: unwritable(&error) };
        let secret = crate::random::secret();
        let line = Zeroizing::new(format!("{PREFIX}{}\n", *Zeroizing::new(URL_SAFE_NO_PAD.encode(*secret))));
        write_new(path, line.as_bytes()).map_err(wrong)?;
        Ok(Self::from_secret(&secret))
    }

    /// [`load`](Self::load), or [`create`](Self::create) where there is no file: what initialisation needs to
    /// continue after a crash. Durable either way, since data keys are wrapped with it next.
    pub fn load_or_create(path: &Path) -> Result<Self, SealError> {
        if !Self::exists(path)? {
            return Self::create(path);
        }
        let key = Self::load(path)?;
        sync_folder(&folder_of(path))
            .map_err(|error| SealError::File { path: path.display().to_string(), problem: unwritable(&error) })?;
        Ok(key)
    }

    /// Whether the file exists, readable or not. Fails when that cannot be found out.
    pub fn exists(path: &Path) -> Result<bool, SealError> {
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(SealError::File { path: path.display().to_string(), problem: unreadable(&error) }),
        }
    }

    /// A key that lives in memory and dies with the process: the demo and tests.
    pub fn ephemeral() -> Self {
        Self::from_secret(&crate::random::secret())
    }

    fn from_secret(secret: &[u8; SECRET_LEN]) -> Self {
        let id = format!("file:{}", hex(&derive(secret, DOMAIN, "id")[..8]));
        FileKey { id, cipher: Cipher::new(&derive(secret, DOMAIN, "wrap data keys")) }
    }
}

#[async_trait]
impl KeyEncryptionKey for FileKey {
    async fn id(&self) -> Result<String, SealError> {
        Ok(self.id.clone())
    }

    /// The nonce, then the ciphertext with its tag. Never fails.
    async fn wrap(&self, context: &str, plaintext: &[u8]) -> Result<Vec<u8>, SealError> {
        let sealed = self.cipher.seal(context.as_bytes(), plaintext);
        Ok([&sealed.nonce[..], &sealed.ciphertext].concat())
    }

    async fn unwrap(&self, context: &str, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let mismatch = || SealError::Mismatch { key: self.id.clone(), what: format!("`{context}`") };
        let (nonce, ciphertext) = wrapped.split_first_chunk::<NONCE_LEN>().ok_or_else(mismatch)?;
        self.cipher.open(context.as_bytes(), *nonce, ciphertext).map_err(|_| mismatch())
    }
}

impl fmt::Debug for FileKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileKey").field("id", &self.id).finish_non_exhaustive()
    }
}

fn parse(text: &str) -> Option<Zeroizing<[u8; SECRET_LEN]>> {
    let encoded = text.trim_end_matches(['\r', '\n']).strip_prefix(PREFIX)?;
    let mut secret = Zeroizing::new([0; SECRET_LEN]);
    // Exact: the buffer is as long as the key, and canonical base64url has one form only.
    let length = URL_SAFE_NO_PAD.decode_slice(encoded, &mut secret[..]).ok()?;
    (length == SECRET_LEN).then_some(secret)
}

/// Writes a private file beside the target, then moves it into place without replacing: a crash leaves either no file or
/// a whole one. Missing folders are made with mode 0700.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let folder = folder_of(path);
    create_folders(&folder)?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let temporary = folder.join(format!(".{}.new", name.to_string_lossy()));
    // A leftover of a crash: never used, since only the final name is read.
    remove_if_present(&temporary)?;
    let moved = write_private(&temporary, bytes).and_then(|()| rename_new(&temporary, path));
    if moved.is_err() {
        remove_if_present(&temporary)?;
    }
    moved?;
    sync_folder(&folder)
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // `mode` above is an upper bound that the umask cuts; this is exact.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without that flag (NFS, some overlays) have hard links, which do not replace either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        done => Ok(done?),
    }
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Makes `folder` and its missing parents with mode 0700 whatever the umask, each durable in its parent. Folders that
/// exist are left as they are.
pub(crate) fn create_folders(folder: &Path) -> io::Result<()> {
    match fs::metadata(folder) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => return Err(io::ErrorKind::NotADirectory.into()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
    }
    let parent = folder_of(folder);
    if parent != folder {
        create_folders(&parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        // Somebody else made it just now, with whatever mode they wanted.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        done => done?,
    }
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
    sync_folder(&parent)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn unreadable(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("does not exist; {WAY_OUT}"),
        io::ErrorKind::PermissionDenied => "may not be read by this user; give it to the user that runs jwksd".into(),
        io::ErrorKind::InvalidData => format!("does not hold a seal key; {WAY_OUT}"),
        _ => format!("cannot be read ({error}); {WAY_OUT}"),
    }
}

fn unwritable(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            "exists already and is not replaced: what it sealed could never be opened again".into()
        }
        io::ErrorKind::PermissionDenied => "may not be written by this user; check who owns its folder".into(),
        io::ErrorKind::StorageFull => "cannot be written: the disk is full".into(),
        io::ErrorKind::ReadOnlyFilesystem => "cannot be written: the file system is read-only".into(),
        _ => format!("cannot be written ({error}); check its folder"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[tokio::test]
    async fn a_wrapped_key_comes_back_only_with_the_same_key_and_context() {
        let folder = folder();
        let path = folder.path().join("made/for/it/seal.key");
        let key = FileKey::create(&path).unwrap();
        let wrapped = key.wrap("context", b"a data key").await.unwrap();
        assert!(!wrapped.windows(10).any(|window| window == b"a data key"));

        let again = FileKey::load(&path).unwrap();
        assert_eq!(again.id, key.id);
        assert_eq!(&**again.unwrap("context", &wrapped).await.unwrap(), b"a data key");
        assert!(matches!(again.unwrap("other", &wrapped).await, Err(SealError::Mismatch { .. })));
        assert!(matches!(FileKey::ephemeral().unwrap("context", &wrapped).await, Err(SealError::Mismatch { .. })));
        for at in 0..wrapped.len() {
            let mut changed = wrapped.clone();
            changed[at] ^= 1;
            assert!(again.unwrap("context", &changed).await.is_err(), "byte {at} may change");
            assert!(again.unwrap("context", &wrapped[..at]).await.is_err(), "{at} bytes suffice");
        }
    }

    #[tokio::test]
    async fn wrapping_twice_gives_different_bytes() {
        let key = FileKey::ephemeral();
        assert_ne!(key.wrap("c", b"x").await.unwrap(), key.wrap("c", b"x").await.unwrap());
    }

    #[test]
    fn a_person_recognises_the_file_and_its_id_does_not_tell_the_key() {
        let folder = folder();
        let path = folder.path().join("seal.key");
        let key = FileKey::create(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("jwksd-seal-v1:") && text.ends_with('\n') && text.lines().count() == 1);
        assert_eq!(key.id.len(), "file:".len() + 16);
        let secret = parse(&text).unwrap();
        assert!(!hex(&*secret).contains(&key.id["file:".len()..]));
        assert!(!format!("{key:?}").contains(text.trim_end().rsplit(':').next().unwrap()));
    }

    #[test]
    fn the_file_is_private_and_its_folders_too() {
        let folder = folder();
        let path = folder.path().join("a/b/seal.key");
        FileKey::create(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!((mode(&folder.path().join("a")), mode(&folder.path().join("a/b"))), (0o700, 0o700));
    }

    #[test]
    fn an_existing_file_is_never_replaced() {
        let folder = folder();
        let path = folder.path().join("seal.key");
        fs::write(&path, "something").unwrap();
        let error = FileKey::create(&path).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"something");
        let dangling = folder.path().join("dangling");
        std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
        assert!(FileKey::create(&dangling).is_err());
        assert!(FileKey::load_or_create(&dangling).is_err());
    }

    #[test]
    fn a_crash_while_creating_leaves_nothing_in_the_way() {
        let folder = folder();
        let path = folder.path().join("seal.key");
        fs::write(folder.path().join(".seal.key.new"), "jwksd-se").unwrap();
        let made = FileKey::load_or_create(&path).unwrap();
        assert_eq!(FileKey::load_or_create(&path).unwrap().id, made.id);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_a_key_is_refused_with_path_and_way_out() {
        let folder = folder();
        let path = folder.path().join("seal.key");
        let short = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode([7; 31]));
        let long = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode([7; 33]));
        let good = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode([7; 32]));
        let padded = format!("{good}=");
        let twice = format!("{good}\n{good}");
        let spaced = format!(" {good}");
        let endless = good.repeat(100);
        for bad in ["", "garbage", PREFIX, &short, &long, &padded, &twice, &spaced, &endless, "\u{0}\u{1}"] {
            fs::write(&path, bad).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let message = FileKey::load(&path).unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()) && message.contains("docs/restore.md"), "{message}");
            assert!(!message.contains("BwcHBw"), "{message}");
        }
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(FileKey::load(&path).unwrap_err().to_string().contains("does not hold a seal key"));
        fs::write(&path, &good).unwrap();
        FileKey::load(&path).unwrap();
        assert!(FileKey::load(folder.path()).unwrap_err().to_string().contains("not a regular file"));
        let missing = FileKey::load(&folder.path().join("missing")).unwrap_err().to_string();
        assert!(missing.contains("does not exist") && missing.contains("docs/restore.md"), "{missing}");
    }

    #[test]
    fn a_key_that_everybody_can_reach_is_refused() {
        let folder = folder();
        let path = folder.path().join("seal.key");
        FileKey::create(&path).unwrap();
        for (mode, accepted) in
            [(0o400, true), (0o440, true), (0o640, true), (0o660, true), (0o604, false), (0o602, false), (0o644, false)]
        {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(FileKey::load(&path).is_ok(), accepted, "{mode:o}");
        }
    }
}
