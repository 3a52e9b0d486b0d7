//! What every store must do, run over each of them; then what only the file store promises.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "store_conformance/shared.rs"]
mod shared;
mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use jwksd::keyring::name::Name;
use jwksd::store::file::FileStore;
use jwksd::store::memory::MemoryStore;
use jwksd::store::record::LONGEST_RECORD;
use jwksd::store::split::Split;
use jwksd::store::{Digest, Document, Store, StoreError};

use shared::SharedSubject;

type Reopen = Box<dyn Fn(Arc<dyn Store>) -> Arc<dyn Store>>;

/// A store under test, and how to let it go and come back.
struct Subject {
    store: Arc<dyn Store>,
    reopen: Reopen,
    _folder: Option<tempfile::TempDir>,
}

impl Subject {
    async fn file() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyrings");
        let store = Arc::new(FileStore::create(&path).unwrap());
        let reopen = move |old: Arc<dyn Store>| -> Arc<dyn Store> {
            drop(old);
            Arc::new(FileStore::open(&path).unwrap())
        };
        Subject { store, reopen: Box::new(reopen), _folder: Some(folder) }
    }

    async fn memory() -> Self {
        Subject { store: Arc::new(MemoryStore::new()), reopen: Box::new(|store| store), _folder: None }
    }

    /// As a replica sees it: shared documents in PostgreSQL, its own ones elsewhere. With the rights of a manager.
    async fn postgres() -> Self {
        let SharedSubject { store, another, .. } = SharedSubject::postgres().await;
        let own = Arc::new(MemoryStore::new());
        let store = Arc::new(Split::new(store, own.clone()));
        let reopen = move |old: Arc<dyn Store>| -> Arc<dyn Store> {
            drop(old);
            Arc::new(Split::new(another(), own.clone()))
        };
        Subject { store, reopen: Box::new(reopen), _folder: None }
    }
}

/// Each case as a test of each store.
macro_rules! conformance {
    ($($case:ident),* $(,)?) => {
        mod file_store { $( #[tokio::test] async fn $case() { super::$case(super::Subject::file().await).await } )* }
        mod memory_store { $( #[tokio::test] async fn $case() { super::$case(super::Subject::memory().await).await } )* }
        mod postgres_store { $( #[tokio::test] async fn $case() { super::$case(super::Subject::postgres().await).await } )* }
    };
}

conformance![
    an_absent_document_reads_as_none,
    what_was_created_is_read_back_after_reopening,
    creating_over_something_is_a_conflict_and_changes_nothing,
    replacing_something_else_is_a_conflict_and_changes_nothing,
    replacing_something_absent_is_a_conflict,
    of_concurrent_writers_exactly_one_wins,
    of_concurrent_creators_exactly_one_wins,
    removing_is_durable_and_can_be_repeated,
    keysets_are_listed_in_order_and_nothing_else_is,
    documents_do_not_get_in_each_others_way,
    any_bytes_are_kept_as_they_are,
    every_document_has_a_place_of_its_own,
];

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn keyring(text: &str) -> Document {
    Document::Keyring(name(text))
}

/// Every document, for keysets whose names are those of the store's own files.
fn all_documents() -> Vec<Document> {
    let mut documents = vec![
        Document::Initialising,
        Document::Installation,
        Document::SeenInstallation,
        Document::Alive,
        Document::Notices,
    ];
    for keyset in ["default", "installation", "alive", "notices", "initialising", "lock", "seen", "0"] {
        documents.extend([keyring(keyset), Document::Seen(name(keyset))]);
    }
    documents
}

async fn an_absent_document_reads_as_none(subject: Subject) {
    for document in all_documents() {
        assert_eq!(subject.store.read(&document).await.unwrap(), None);
    }
    assert!(subject.store.keysets().await.unwrap().is_empty());
}

async fn what_was_created_is_read_back_after_reopening(subject: Subject) {
    let Subject { store, reopen, _folder } = subject;
    for document in all_documents() {
        store.replace(&document, None, b"first").await.unwrap();
        store.replace(&document, Some(Digest::of(b"first")), b"second").await.unwrap();
    }
    let store = reopen(store);
    for document in all_documents() {
        assert_eq!(store.read(&document).await.unwrap().unwrap(), b"second");
    }
}

async fn creating_over_something_is_a_conflict_and_changes_nothing(subject: Subject) {
    subject.store.replace(&keyring("a"), None, b"first").await.unwrap();
    let again = subject.store.replace(&keyring("a"), None, b"other").await;
    assert!(matches!(again, Err(StoreError::Conflict { .. })));
    assert_eq!(subject.store.read(&keyring("a")).await.unwrap().unwrap(), b"first");
}

async fn replacing_something_else_is_a_conflict_and_changes_nothing(subject: Subject) {
    subject.store.replace(&keyring("a"), None, b"first").await.unwrap();
    let stale = subject.store.replace(&keyring("a"), Some(Digest::of(b"zeroth")), b"second").await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })));
    assert_eq!(subject.store.read(&keyring("a")).await.unwrap().unwrap(), b"first");
}

async fn replacing_something_absent_is_a_conflict(subject: Subject) {
    let result = subject.store.replace(&keyring("a"), Some(Digest::of(b"")), b"x").await;
    assert!(matches!(result, Err(StoreError::Conflict { .. })));
    assert_eq!(subject.store.read(&keyring("a")).await.unwrap(), None);
}

async fn of_concurrent_writers_exactly_one_wins(subject: Subject) {
    subject.store.replace(&keyring("a"), None, b"start").await.unwrap();
    race(&subject, Some(Digest::of(b"start"))).await;
}

async fn of_concurrent_creators_exactly_one_wins(subject: Subject) {
    race(&subject, None).await;
}

async fn race(subject: &Subject, expected: Option<Digest>) {
    let writers: Vec<_> = (0..20)
        .map(|writer| {
            let store = Arc::clone(&subject.store);
            let bytes = format!("writer {writer}");
            tokio::spawn(async move { store.replace(&keyring("a"), expected, bytes.as_bytes()).await.map(|()| bytes) })
        })
        .collect();
    let mut winners = Vec::new();
    for writer in writers {
        match writer.await.unwrap() {
            Ok(bytes) => winners.push(bytes),
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(subject.store.read(&keyring("a")).await.unwrap().unwrap(), winners[0].as_bytes());
}

async fn removing_is_durable_and_can_be_repeated(subject: Subject) {
    let Subject { store, reopen, _folder } = subject;
    for document in all_documents() {
        store.replace(&document, None, b"x").await.unwrap();
        store.remove(&document).await.unwrap();
        store.remove(&document).await.unwrap();
    }
    let store = reopen(store);
    for document in all_documents() {
        assert_eq!(store.read(&document).await.unwrap(), None);
        store.replace(&document, None, b"again").await.unwrap();
    }
}

async fn keysets_are_listed_in_order_and_nothing_else_is(subject: Subject) {
    let names = ["b", "a-b", "a", "10", "9", "installation", "alive", "seen"];
    for text in names {
        subject.store.replace(&keyring(text), None, b"x").await.unwrap();
    }
    for document in [Document::Installation, Document::Alive, Document::Initialising, Document::SeenInstallation] {
        subject.store.replace(&document, None, b"x").await.unwrap();
    }
    subject.store.replace(&Document::Seen(name("only-seen")), None, b"x").await.unwrap();
    let mut expected = names.map(name).to_vec();
    expected.sort();
    assert_eq!(subject.store.keysets().await.unwrap(), expected);
    subject.store.remove(&keyring("a")).await.unwrap();
    expected.retain(|keyset| keyset.as_str() != "a");
    assert_eq!(subject.store.keysets().await.unwrap(), expected);
}

async fn documents_do_not_get_in_each_others_way(subject: Subject) {
    for (index, document) in all_documents().iter().enumerate() {
        subject.store.replace(document, None, &[index as u8]).await.unwrap();
    }
    for (index, document) in all_documents().iter().enumerate() {
        assert_eq!(subject.store.read(document).await.unwrap().unwrap(), [index as u8], "{document:?}");
    }
}

async fn any_bytes_are_kept_as_they_are(subject: Subject) {
    let all: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    for (text, bytes) in [("empty", &b""[..]), ("all", &all)] {
        subject.store.replace(&keyring(text), None, bytes).await.unwrap();
        assert_eq!(subject.store.read(&keyring(text)).await.unwrap().unwrap(), bytes);
        subject.store.replace(&keyring(text), Some(Digest::of(bytes)), b"\r\n").await.unwrap();
    }
}

async fn every_document_has_a_place_of_its_own(subject: Subject) {
    let mut places: Vec<_> = all_documents().iter().map(|document| subject.store.locate(document)).collect();
    let count = places.len();
    places.sort();
    places.dedup();
    assert_eq!(places.len(), count);
}

// The file store.

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

#[tokio::test]
async fn a_second_daemon_is_refused_by_the_number_of_the_first() {
    let folder = folder();
    let first = FileStore::create(folder.path()).unwrap();
    let refused = FileStore::open(folder.path()).unwrap_err();
    let StoreError::Locked { ref holder, .. } = refused else { panic!("{refused}") };
    assert_eq!(*holder, format!("process {}", std::process::id()));
    let message = refused.to_string();
    assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
    assert!(message.contains(folder.path().file_name().unwrap().to_str().unwrap()), "{message}");
    // Refusing it did the first no harm, and the lock ends with its holder.
    first.replace(&keyring("a"), None, b"x").await.unwrap();
    drop(first);
    FileStore::open(folder.path()).unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_not_made_by_opening() {
    let folder = folder();
    let path = folder.path().join("missing");
    let message = FileStore::open(&path).unwrap_err().to_string();
    assert!(message.contains("missing") && message.contains("jwksd init"), "{message}");
    assert!(!path.exists());
    fs::write(&path, "a file").unwrap();
    assert!(FileStore::create(&path).unwrap_err().to_string().contains("not a folder"));
}

#[test]
fn files_and_folders_are_private_whatever_the_umask() {
    for umask in [0o000, 0o077, 0o277, 0o777] {
        let folder = folder();
        let path = folder.path().join("data/keyrings");
        let store_path = path.clone();
        // The umask belongs to the process, unless a thread takes its own.
        std::thread::spawn(move || {
            // SAFETY: both calls only change this thread's own file creation mask.
            unsafe {
                assert_eq!(libc::unshare(libc::CLONE_FS), 0);
                libc::umask(umask);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let store = FileStore::create(&store_path).unwrap();
                for document in all_documents() {
                    store.replace(&document, None, b"x").await.unwrap();
                    store.replace(&document, Some(Digest::of(b"x")), b"y").await.unwrap();
                }
            });
        })
        .join()
        .unwrap();
        for made in [folder.path().join("data"), path.clone(), path.join("_seen")] {
            assert_eq!(mode(&made), 0o700, "{} under umask {umask:o}", made.display());
        }
        let files = files_below(&path);
        assert_eq!(files.len(), all_documents().len() + 1);
        for file in files {
            assert_eq!(mode(&file), 0o600, "{} under umask {umask:o}", file.display());
        }
    }
}

#[test]
fn a_folder_that_others_may_write_to_is_refused() {
    let folder = folder();
    let path = folder.path().join("keyrings");
    drop(FileStore::create(&path).unwrap());
    // The last is how Kubernetes hands a volume to a pod's group.
    for (mode, accepted) in
        [(0o700, true), (0o750, true), (0o755, true), (0o770, false), (0o702, false), (0o777, false), (0o2770, true)]
    {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let opened = FileStore::open(&path);
        assert_eq!(opened.is_ok(), accepted, "{mode:o}");
        if let Err(error) = opened {
            assert!(error.to_string().contains("chmod 700"), "{error}");
        }
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    fs::set_permissions(path.join("_seen"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(FileStore::open(&path).is_err());
}

#[tokio::test]
async fn leftovers_of_a_killed_writer_are_removed_and_never_read() {
    let folder = folder();
    let store = FileStore::create(folder.path()).unwrap();
    store.replace(&keyring("a"), None, b"whole").await.unwrap();
    let leftovers =
        [".a.json.tmp", "_seen/.a.json.tmp", "._installation.json.tmp"].map(|file| folder.path().join(file));
    for leftover in &leftovers {
        fs::write(leftover, b"hal").unwrap();
    }
    assert_eq!(store.keysets().await.unwrap(), [name("a")]);
    // Also while running: a temporary file that could not be removed is no obstacle.
    store.replace(&keyring("a"), Some(Digest::of(b"whole")), b"new").await.unwrap();
    fs::write(&leftovers[0], b"hal").unwrap();
    drop(store);
    let store = FileStore::open(folder.path()).unwrap();
    assert!(leftovers.iter().all(|leftover| !leftover.exists()));
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), b"new");
}

#[tokio::test]
async fn a_conflict_leaves_no_temporary_file() {
    let folder = folder();
    let store = FileStore::create(folder.path()).unwrap();
    store.replace(&keyring("a"), None, b"secret one").await.unwrap();
    store.replace(&keyring("a"), None, b"secret two").await.unwrap_err();
    for file in files_below(folder.path()) {
        assert_ne!(fs::read(&file).unwrap(), b"secret two", "{}", file.display());
    }
}

#[tokio::test]
async fn what_is_not_a_plain_file_is_unreadable_not_absent() {
    let folder = folder();
    let store = FileStore::create(folder.path()).unwrap();
    fs::create_dir(folder.path().join("folder.json")).unwrap();
    symlink("/dev/zero", folder.path().join("link.json")).unwrap();
    symlink("nowhere", folder.path().join("dangling.json")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, folder.path().join("pipe.json"), 0o600.into()).unwrap();
    for text in ["folder", "link", "dangling", "pipe"] {
        let error = store.read(&keyring(text)).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { operation: "read", .. }), "{error}");
        assert!(error.to_string().contains(&format!("{text}.json")), "{error}");
        assert!(store.replace(&keyring(text), None, b"x").await.is_err());
    }
}

#[tokio::test]
async fn a_file_that_is_too_long_is_not_read_whole() {
    let folder = folder();
    let store = FileStore::create(folder.path()).unwrap();
    fs::File::create(folder.path().join("huge.json")).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(store.read(&keyring("huge")).await.unwrap().unwrap().len(), LONGEST_RECORD + 1);
}

#[tokio::test]
async fn a_folder_replaced_under_the_daemon_is_noticed() {
    let folder = folder();
    let path = folder.path().join("keyrings");
    let store = FileStore::create(&path).unwrap();
    store.replace(&keyring("a"), None, b"x").await.unwrap();
    fs::rename(&path, folder.path().join("moved")).unwrap();
    for result in [
        store.read(&keyring("a")).await.map(|_| ()),
        store.read(&keyring("absent")).await.map(|_| ()),
        store.keysets().await.map(|_| ()),
        store.replace(&keyring("b"), None, b"x").await,
        store.remove(&keyring("a")).await,
    ] {
        assert!(matches!(result, Err(StoreError::Unavailable { .. })));
    }
    fs::create_dir(&path).unwrap();
    let message = store.read(&keyring("absent")).await.unwrap_err().to_string();
    assert!(message.contains("replaced while in use"), "{message}");
    fs::remove_dir(&path).unwrap();
    fs::rename(folder.path().join("moved"), &path).unwrap();
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), b"x");
}

#[tokio::test]
async fn a_write_is_a_new_file_so_that_readers_and_backups_see_one_version() {
    let folder = folder();
    let store = FileStore::create(folder.path()).unwrap();
    let path = folder.path().join("a.json");
    store.replace(&keyring("a"), None, b"old").await.unwrap();
    let before = fs::metadata(&path).unwrap().ino();
    let reader = fs::File::open(&path).unwrap();
    store.replace(&keyring("a"), Some(Digest::of(b"old")), b"new").await.unwrap();
    assert_eq!(std::io::read_to_string(reader).unwrap(), "old");
    assert_ne!(fs::metadata(&path).unwrap().ino(), before);
}

/// A small disk of its own, gone with the test. Needs root, as in CI.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can mount a small disk");
            return None;
        }
        let disk = SmallDisk { folder: folder() };
        disk.call(0, "size=64k,mode=0700");
        Some(disk)
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn remount_read_only(&self) {
        self.call(libc::MS_REMOUNT | libc::MS_RDONLY, "");
    }

    fn remount_writable(&self) {
        self.call(libc::MS_REMOUNT, "");
    }

    fn call(&self, flags: libc::c_ulong, options: &str) {
        let target = std::ffi::CString::new(self.path().to_str().unwrap()).unwrap();
        let options = std::ffi::CString::new(options).unwrap();
        // SAFETY: all pointers are strings that outlive the call.
        let result = unsafe {
            libc::mount(c"tmpfs".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), flags, options.as_ptr().cast())
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let target = std::ffi::CString::new(self.path().to_str().unwrap()).unwrap();
        // SAFETY: the pointer is a string that outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[tokio::test]
async fn a_full_disk_fails_the_write_and_keeps_what_was_there() {
    let Some(disk) = SmallDisk::mount() else { return };
    let store = FileStore::create(&disk.path().join("keyrings")).unwrap();
    store.replace(&keyring("a"), None, &[1; 8192]).await.unwrap();
    let filler = disk.path().join("filler");
    let _ = fs::write(&filler, vec![0; 1 << 20]);
    for (document, expected) in [(keyring("a"), Some(Digest::of(&[1; 8192]))), (keyring("b"), None)] {
        let error = store.replace(&document, expected, &[2; 8192]).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { operation: "write", .. }));
        assert!(error.to_string().contains("disk is full"), "{error}");
    }
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), [1; 8192]);
    assert_eq!(store.read(&keyring("b")).await.unwrap(), None);
    assert!(!files_below(disk.path()).iter().any(|file| file.to_str().unwrap().ends_with(".tmp")));
    fs::remove_file(&filler).unwrap();
    store.replace(&keyring("a"), Some(Digest::of(&[1; 8192])), &[2; 8192]).await.unwrap();
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), [2; 8192]);
}

#[tokio::test]
async fn a_read_only_disk_fails_writes_and_serves_reads() {
    let Some(disk) = SmallDisk::mount() else { return };
    let store = FileStore::create(&disk.path().join("keyrings")).unwrap();
    store.replace(&keyring("a"), None, b"x").await.unwrap();
    disk.remount_read_only();
    for result in [
        store.replace(&keyring("a"), Some(Digest::of(b"x")), b"y").await,
        store.replace(&keyring("b"), None, b"y").await,
        store.remove(&keyring("a")).await,
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("read-only"), "{message}");
    }
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), b"x");
    drop(store);
    // A daemon that starts now still publishes, and still keeps a second one out.
    let store = FileStore::open(&disk.path().join("keyrings")).unwrap();
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), b"x");
    let second = FileStore::open(&disk.path().join("keyrings")).unwrap_err();
    assert!(matches!(second, StoreError::Locked { .. }), "{second}");
    disk.remount_writable();
    store.replace(&keyring("a"), Some(Digest::of(b"x")), b"y").await.unwrap();
}

#[test]
fn a_file_store_that_everybody_writes_to_at_once_takes_few_threads() {
    let threads = Arc::new(AtomicUsize::new(0));
    let counted = threads.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(move || _ = counted.fetch_add(1, Ordering::Relaxed))
        .build()
        .unwrap();
    runtime.block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(FileStore::create(&folder.path().join("keyrings")).unwrap());
        let mut writes = tokio::task::JoinSet::new();
        for number in 0..300 {
            let (store, keyset) = (store.clone(), Name::parse(&format!("keyset-{number}")).unwrap());
            writes.spawn(async move { store.replace(&Document::Keyring(keyset), None, b"{}").await });
        }
        for written in writes.join_all().await {
            written.unwrap();
        }
        assert_eq!(store.keysets().await.unwrap().len(), 300);
    });
    let threads = threads.load(Ordering::Relaxed);
    // 32 at once; one that is about to rest has given its place away already.
    assert!(threads < 100, "{threads} threads");
}
