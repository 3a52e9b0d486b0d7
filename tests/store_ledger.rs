//! The ledger over real files and over stores that fail at every write: what is damaged, swapped, replayed, lost or forged
//! is refused with its name and the way out, and a crash anywhere loses nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::decide::{Decision, Idempotency, Intent, Request, decide};
use jwksd::keyring::jwk::{EcCurve, Kid, PublicJwk};
use jwksd::keyring::name::Name;
use jwksd::keyring::notice::Book;
use jwksd::keyring::plan::{Desired, Facts};
use jwksd::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::record::{
    Answered, AuditEntry, Floor, Hold, Journal, Key, KeyState, Keyring, Origin, PrivateHandle, Revocation, Superseded,
};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::data_keys::DataKeys;
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::file::FileStore;
use jwksd::store::ledger::{
    Alive, Amended, Initialisation, Installation, KeysetState, Ledger, LedgerError, Loaded, Mark, SealEvidence, Settled,
};
use jwksd::store::memory::MemoryStore;
use jwksd::store::record::RecordProblem;
use jwksd::store::{Digest, Document, Store, StoreError};

const ISSUER: &str = "https://auth.example.com";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn at(secs: i64) -> Timestamp {
    Timestamp::from_secs(1_795_514_400 + secs)
}

fn policy() -> Policy {
    Policy {
        issuer: IssuerPolicy {
            name: name("main"),
            url: ISSUER.to_owned(),
            max_age: Span::from_secs(300),
            stale_if_error: Span::ZERO,
            caches: vec![Span::from_secs(300)],
            jwks_paths: vec![],
            discovery: Discovery::Minimal,
            probes: Vec::new(),
        },
        algorithm: Algorithm::Es256,
        backend: "local".to_owned(),
        rotation: RotationPolicy {
            schedule: Schedule::Every(Span::DAY),
            propagation: Span::from_secs(3600),
            successors: 2,
            overlap_extra: Span::ZERO,
            bootstrap: Bootstrap::Wait,
            verifiers: vec![],
            clock_skew: Span::from_secs(60),
            staleness_limit: Span::ZERO,
            publish_lag: Span::ZERO,
        },
        tokens: TokenPolicy {
            max_ttl: Span::from_secs(900),
            default_ttl: Span::from_secs(300),
            required_claims: vec![],
            forbidden_claims: vec![],
            audiences: vec![],
            types: vec!["JWT".to_owned()],
            backdate: Span::ZERO,
        },
    }
}

/// What private keys are bound to here.
fn associated_data(keyring: &Keyring, key: &Key, _: &DataKeys) -> Vec<u8> {
    format!("{} {}", keyring.keyset, key.serial).into_bytes()
}

fn key(keyset: &Name, serial: u64, keys: &DataKeys) -> Key {
    let private = format!("the private key {serial} of {keyset}");
    let handle = keys.seal_private(format!("{keyset} {serial}").as_bytes(), private.as_bytes()).unwrap();
    Key {
        serial,
        kid: Kid(format!("kid-{keyset}-{serial}").into()),
        algorithm: Algorithm::Es256,
        public: PublicJwk::Ec { crv: EcCurve::P256, x: format!("x-of-{keyset}-{serial}"), y: "y".to_owned() },
        private: Some(PrivateHandle { backend: "local".to_owned(), handle }),
        origin: Origin::Created,
        state: KeyState::Pending,
        entered_at: at(0),
        created_at: at(0),
        since_generation: 3,
        published_at: None,
        seen_at: None,
        activated_at: None,
        demoted_at: None,
        stopped_at: None,
        ttl_bound: Span::from_secs(900),
        overlap_bound: Span::from_secs(1020),
        published_until: None,
        unpropagated: false,
        rolled_back: false,
        revocation: None,
    }
}

/// The first generation of a keyring, with two local keys and a remote one.
fn keyring(keyset: &Name, lineage: &str, keys: &DataKeys) -> Keyring {
    let mut remote = key(keyset, 3, keys);
    remote.private = Some(PrivateHandle { backend: "aws-kms".to_owned(), handle: "alias/three".to_owned() });
    Keyring {
        keyset: keyset.clone(),
        lineage: lineage.to_owned(),
        generation: 1,
        written_at: at(0),
        policy: policy(),
        born: None,
        supersedes: Vec::new(),
        first: true,
        keys: vec![key(keyset, 1, keys), key(keyset, 2, keys), remote],
        banned: vec![],
        next_serial: 4,
        last_promotion_at: None,
        disabled_switch_at: None,
        hold: None,
        drained: false,
        confirmed_algorithm: None,
        floors: vec![],
        journal: Journal::default(),
    }
}

fn following(current: &Loaded) -> Keyring {
    let mut next = (*current.keyring).clone();
    next.generation += 1;
    next.written_at = at(next.generation as i64);
    next
}

fn ephemeral_seal() -> Arc<dyn KeyEncryptionKey> {
    Arc::new(FileKey::ephemeral())
}

async fn initialise(store: Arc<dyn Store>, seal: &Arc<dyn KeyEncryptionKey>) -> Result<Ledger, LedgerError> {
    let seal = Arc::clone(seal);
    Ledger::initialise(store, SealEvidence::Unknown, async || Ok(seal), at(0)).await
}

/// Registers keysets and writes their first generation.
async fn add(ledger: &Ledger, keysets: &[&str]) -> Vec<Loaded> {
    let names: Vec<_> = keysets.iter().map(|text| (name(text), ISSUER.to_owned())).collect();
    let mut loaded = Vec::new();
    for registration in ledger.register(&names, at(0)).await.unwrap() {
        let first = keyring(&registration.name, &registration.lineage, &ledger.keys());
        loaded.push(ledger.save(None, &first).await.unwrap());
    }
    ledger.created(&names.into_iter().map(|(name, _)| name).collect::<Vec<_>>()).await.unwrap();
    loaded
}

/// An installation in a folder, opened anew for each look, as by a restarted daemon.
struct Site {
    folder: tempfile::TempDir,
}

impl Site {
    /// With the keysets `default` and `other`, each at generation 1.
    async fn new() -> Self {
        let site = Site { folder: tempfile::tempdir().unwrap() };
        add(&site.initialise().await.unwrap(), &["default", "other"]).await;
        site
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(FileStore::create(&self.path("keyrings")).unwrap())
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn seal_path(&self) -> PathBuf {
        self.path("seal.key")
    }

    fn evidence(&self) -> SealEvidence {
        if FileKey::exists(&self.seal_path()).unwrap() { SealEvidence::Exists } else { SealEvidence::Missing }
    }

    fn seal(&self) -> Result<Arc<dyn KeyEncryptionKey>, SealError> {
        Ok(Arc::new(FileKey::load(&self.seal_path())?))
    }

    async fn initialise(&self) -> Result<Ledger, LedgerError> {
        let path = self.seal_path();
        let make_seal = async || Ok(Arc::new(FileKey::load_or_create(&path)?) as Arc<dyn KeyEncryptionKey>);
        Ledger::initialise(self.store(), self.evidence(), make_seal, at(0)).await
    }

    async fn open(&self) -> Result<Ledger, LedgerError> {
        let store = self.store();
        Ledger::inspect(store.as_ref(), self.evidence()).await?;
        Ledger::open(store, &[self.seal()?]).await
    }

    async fn load(&self, keyset: &str) -> Result<Option<Loaded>, LedgerError> {
        self.open().await?.load(&name(keyset)).await
    }

    /// Moves `keyset` one generation on.
    async fn advance(&self, keyset: &str) {
        let ledger = self.open().await.unwrap();
        let current = ledger.load(&name(keyset)).await.unwrap().unwrap();
        ledger.save(Some(&current), &following(&current)).await.unwrap();
    }

    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(self.folder.path(), &mut files);
        files.retain(|path, _| !path.ends_with("_lock"));
        files
    }

    /// `load` fails, says which file and what to do, and nothing at all is written.
    async fn refused(&self, keyset: &str, file: &str) -> LedgerError {
        let before = self.files();
        let error = self.load(keyset).await.unwrap_err();
        let message = error.to_string();
        assert!(message.contains(self.path(file).to_str().unwrap()), "{message}");
        assert!(message.contains("docs/restore.md") || message.contains("run that release"), "{message}");
        assert!(!error.may_pass());
        assert_eq!(self.files(), before, "something was written");
        error
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
}

fn problem(error: LedgerError) -> RecordProblem {
    match error {
        LedgerError::Record(error) => error.problem,
        other => panic!("{other}"),
    }
}

const DEFAULT: &str = "keyrings/default.json";
const OTHER: &str = "keyrings/other.json";
const INSTALLATION: &str = "keyrings/_installation.json";

#[tokio::test]
async fn what_was_saved_is_loaded_by_the_next_daemon() {
    let site = Site::new().await;
    site.advance("default").await;
    let ledger = site.open().await.unwrap();
    let loaded = ledger.load(&name("default")).await.unwrap().unwrap();
    assert_eq!((loaded.keyring.generation, loaded.keyring.keys.len()), (2, 3));
    assert_eq!(loaded.mark, Mark::Current);
    assert_eq!(loaded.digest, Digest::of(&fs::read(site.path(DEFAULT)).unwrap()));
    let (first, keys) = (&loaded.keyring.keys[0], ledger.keys());
    let bound_to = associated_data(&loaded.keyring, first, &keys);
    let private = keys.open_private(&bound_to, &first.private.as_ref().unwrap().handle).unwrap();
    assert_eq!(&**private, b"the private key 1 of default");
    assert!(ledger.load(&name("never-registered")).await.unwrap().is_none());
}

#[tokio::test]
async fn every_record_names_its_predecessor() {
    let site = Site::new().await;
    let first = fs::read(site.path(DEFAULT)).unwrap();
    site.advance("default").await;
    let second: serde_json::Value = serde_json::from_slice(&fs::read(site.path(DEFAULT)).unwrap()).unwrap();
    assert_eq!(second["previous"], Digest::of(&first).to_base64url());
    assert_eq!((&second["format"], &second["generation"], &second["kind"]), (&1.into(), &2.into(), &"keyring".into()));
    assert_eq!(second["lineage"], second["body"]["lineage"]);
}

#[tokio::test]
async fn a_truncated_record_is_refused() {
    let site = Site::new().await;
    let whole = fs::read(site.path(DEFAULT)).unwrap();
    for length in [0, 1, whole.len() / 2, whole.len() - 2] {
        fs::write(site.path(DEFAULT), &whole[..length]).unwrap();
        assert!(matches!(problem(site.refused("default", DEFAULT).await), RecordProblem::Malformed { .. }));
    }
    // The others go on.
    site.load("other").await.unwrap().unwrap();
}

#[tokio::test]
async fn no_flipped_byte_changes_what_is_loaded() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    let expected = ledger.load(&name("default")).await.unwrap().unwrap().keyring;
    let whole = fs::read(site.path(DEFAULT)).unwrap();
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(site.path(DEFAULT), &flipped).unwrap();
        if let Ok(loaded) = ledger.load(&name("default")).await {
            panic!("byte {at} may change: {:?}", loaded.map(|loaded| loaded.keyring == expected));
        }
    }
    fs::write(site.path(DEFAULT), &whole).unwrap();
    ledger.load(&name("default")).await.unwrap().unwrap();
}

#[tokio::test]
async fn swapped_records_are_refused() {
    let site = Site::new().await;
    let (default, other) = (fs::read(site.path(DEFAULT)).unwrap(), fs::read(site.path(OTHER)).unwrap());
    fs::write(site.path(DEFAULT), &other).unwrap();
    fs::write(site.path(OTHER), &default).unwrap();
    assert!(matches!(problem(site.refused("default", DEFAULT).await), RecordProblem::WrongDocument { .. }));
    fs::write(site.path(DEFAULT), fs::read(site.path(INSTALLATION)).unwrap()).unwrap();
    assert!(matches!(problem(site.refused("default", DEFAULT).await), RecordProblem::WrongDocument { .. }));
}

#[tokio::test]
async fn an_older_copy_put_back_is_refused() {
    let site = Site::new().await;
    let old = fs::read(site.path(DEFAULT)).unwrap();
    site.advance("default").await;
    fs::write(site.path(DEFAULT), old).unwrap();
    let error = site.refused("default", DEFAULT).await;
    assert!(matches!(error, LedgerError::OlderThanSeen { generation: 1, seen: 2, .. }), "{error}");
}

#[tokio::test]
async fn an_older_installation_put_back_is_refused() {
    let site = Site::new().await;
    let old = fs::read(site.path(INSTALLATION)).unwrap();
    site.open().await.unwrap().register(&[(name("third"), ISSUER.to_owned())], at(1)).await.unwrap();
    fs::write(site.path(INSTALLATION), old).unwrap();
    let error = site.refused("default", INSTALLATION).await;
    assert!(matches!(error, LedgerError::OlderThanSeen { .. }), "{error}");
}

#[tokio::test]
async fn another_record_of_the_same_generation_is_refused() {
    let site = Site::new().await;
    let before = site.files();
    site.advance("default").await;
    let one = fs::read(site.path(DEFAULT)).unwrap();
    for (path, bytes) in &before {
        fs::write(path, bytes).unwrap();
    }
    let ledger = site.open().await.unwrap();
    let current = ledger.load(&name("default")).await.unwrap().unwrap();
    let mut different = following(&current);
    different.drained = true;
    ledger.save(Some(&current), &different).await.unwrap();
    drop(ledger);
    fs::write(site.path(DEFAULT), &one).unwrap();
    let error = site.refused("default", DEFAULT).await;
    assert!(matches!(error, LedgerError::Forked { generation: 2, .. }), "{error}");
    // Nor a successor of what was not seen.
    fs::write(site.path("keyrings/_seen/default.json"), &before[&site.path("keyrings/_seen/default.json")]).unwrap();
    let ledger = site.open().await.unwrap();
    let current = ledger.load(&name("default")).await.unwrap().unwrap();
    ledger.save(Some(&current), &following(&current)).await.unwrap();
    let three = fs::read(site.path(DEFAULT)).unwrap();
    drop(ledger);
    for (path, bytes) in &before {
        fs::write(path, bytes).unwrap();
    }
    let ledger = site.open().await.unwrap();
    let current = ledger.load(&name("default")).await.unwrap().unwrap();
    ledger.save(Some(&current), &different).await.unwrap();
    drop(ledger);
    fs::write(site.path(DEFAULT), three).unwrap();
    let error = site.refused("default", DEFAULT).await;
    assert!(matches!(error, LedgerError::Forked { generation: 3, .. }), "{error}");
}

#[tokio::test]
async fn a_deleted_keyring_is_lost_not_new() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    fs::remove_file(site.path(DEFAULT)).unwrap();
    assert!(matches!(ledger.load(&name("default")).await, Err(LedgerError::Missing { .. })));
    drop(ledger);
    assert!(matches!(site.refused("default", DEFAULT).await, LedgerError::Missing { .. }));
    // Before anything is asked for.
    assert!(matches!(site.open().await, Err(LedgerError::Missing { .. })));
}

#[tokio::test]
async fn a_keyring_deleted_before_it_was_noted_as_created_is_lost_too() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    let third = ledger.register(&[(name("third"), ISSUER.to_owned())], at(0)).await.unwrap().remove(0);
    assert!(ledger.load(&name("third")).await.unwrap().is_none());
    ledger.save(None, &keyring(&third.name, &third.lineage, &ledger.keys())).await.unwrap();
    fs::remove_file(site.path("keyrings/third.json")).unwrap();
    drop(ledger);
    assert!(matches!(site.refused("third", "keyrings/third.json").await, LedgerError::Missing { .. }));
}

#[tokio::test]
async fn a_lost_seen_mark_is_written_again() {
    let site = Site::new().await;
    fs::remove_dir_all(site.path("keyrings/_seen")).unwrap();
    assert_eq!(site.load("default").await.unwrap().unwrap().mark, Mark::Current);
    assert!(site.path("keyrings/_seen/default.json").exists());
    assert!(site.path("keyrings/_seen/_installation.json").exists());
}

#[tokio::test]
async fn a_damaged_or_swapped_seen_mark_is_refused() {
    let site = Site::new().await;
    let mark = "keyrings/_seen/default.json";
    let whole = fs::read(site.path(mark)).unwrap();
    fs::write(site.path(mark), &whole[..20]).unwrap();
    assert!(matches!(problem(site.refused("default", mark).await), RecordProblem::Malformed { .. }));
    fs::copy(site.path("keyrings/_seen/other.json"), site.path(mark)).unwrap();
    assert!(matches!(problem(site.refused("default", mark).await), RecordProblem::WrongDocument { .. }));
}

#[tokio::test]
async fn a_record_newer_than_its_mark_is_accepted_and_marked() {
    let site = Site::new().await;
    let mark = site.path("keyrings/_seen/default.json");
    let old_mark = fs::read(&mark).unwrap();
    site.advance("default").await;
    site.advance("default").await;
    // The crash came between record and mark.
    fs::write(&mark, &old_mark).unwrap();
    let loaded = site.load("default").await.unwrap().unwrap();
    assert_eq!((loaded.keyring.generation, loaded.mark), (3, Mark::Current));
    assert_ne!(fs::read(&mark).unwrap(), old_mark);
}

#[tokio::test]
async fn a_forged_public_key_is_refused() {
    let site = Site::new().await;
    for (file, from, to) in [
        (DEFAULT, "x-of-default-1", "x-of-mallory-1"),
        (DEFAULT, "\"state\": \"pending\"", "\"state\": \"active\""),
        (DEFAULT, "\"generation\": 1", "\"generation\": 9"),
        (INSTALLATION, "\"first\": true", "\"first\": false"),
        (INSTALLATION, "\"created\"", "\"creating\""),
    ] {
        let text = fs::read_to_string(site.path(file)).unwrap();
        fs::write(site.path(file), text.replace(from, to)).unwrap();
        assert_eq!(problem(site.refused("default", file).await), RecordProblem::Changed, "{from}");
        fs::write(site.path(file), text).unwrap();
    }
    site.load("default").await.unwrap().unwrap();
}

#[tokio::test]
async fn a_record_of_another_installation_is_refused() {
    let (site, foreign) = (Site::new().await, Site::new().await);
    fs::copy(foreign.path(DEFAULT), site.path(DEFAULT)).unwrap();
    assert!(matches!(problem(site.refused("default", DEFAULT).await), RecordProblem::OtherInstallation { .. }));
}

#[tokio::test]
async fn another_life_of_a_keyset_is_refused() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    let keyset = name("third");
    ledger.register(&[(keyset.clone(), ISSUER.to_owned())], at(0)).await.unwrap();
    let wrong = keyring(&keyset, "another lineage", &ledger.keys());
    assert!(matches!(ledger.save(None, &wrong).await, Err(LedgerError::OtherLineage { .. })));
}

#[tokio::test]
async fn a_keyring_that_the_installation_does_not_know_is_not_taken_over() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ledger = initialise(Arc::clone(&store), &ephemeral_seal()).await.unwrap();
    store.replace(&Document::Keyring(name("stray")), None, b"{}").await.unwrap();
    let error = ledger.load(&name("stray")).await.unwrap_err();
    assert!(matches!(error, LedgerError::Unlisted { .. }), "{error}");
}

#[tokio::test]
async fn a_newer_format_is_refused_and_nothing_is_written() {
    let site = Site::new().await;
    for file in [INSTALLATION, DEFAULT] {
        let text = fs::read_to_string(site.path(file)).unwrap();
        let newer = text.replace("\"format\": 1", "\"format\": 2").replace("\"written_by\": \"", "\"written_by\": \"x");
        fs::write(site.path(file), newer).unwrap();
        let error = site.refused("default", file).await;
        assert!(error.to_string().contains("written by xjwksd "), "{error}");
        assert!(matches!(problem(error), RecordProblem::NewerFormat { format: 2, .. }));
        fs::write(site.path(file), text).unwrap();
    }
}

#[tokio::test]
async fn the_wrong_seal_key_is_refused_by_name() {
    let site = Site::new().await;
    let right = site.seal().unwrap().id().await.unwrap();
    fs::remove_file(site.seal_path()).unwrap();
    let wrong = FileKey::create(&site.seal_path()).unwrap().id().await.unwrap();
    let error = site.refused("default", INSTALLATION).await;
    let message = error.to_string();
    assert!(matches!(error, LedgerError::OtherSeal { .. }) && message.contains(&right) && message.contains(&wrong));
}

#[tokio::test]
async fn a_lost_seal_key_is_refused_and_not_replaced() {
    let site = Site::new().await;
    fs::remove_file(site.seal_path()).unwrap();
    assert!(matches!(site.refused("default", INSTALLATION).await, LedgerError::SealLost { .. }));
    assert!(matches!(site.initialise().await, Err(LedgerError::SealLost { .. })));
    assert!(!site.seal_path().exists());
}

#[tokio::test]
async fn a_store_that_is_empty_but_should_not_be_is_refused() {
    let site = Site::new().await;
    fs::remove_dir_all(site.path("keyrings")).unwrap();
    let error = site.initialise().await.unwrap_err();
    assert!(matches!(error, LedgerError::StoreLost { .. }) && error.to_string().contains("docs/restore.md"), "{error}");
    // Whatever is left of a store: it is not a fresh one, seal or not, mark or not.
    for remains in ["default.json", "_seen/_installation.json", "_alive.json"] {
        let folder = tempfile::tempdir().unwrap();
        let store = FileStore::create(folder.path()).unwrap();
        fs::write(folder.path().join(remains), "x").unwrap();
        for marked in [false, true] {
            for evidence in [SealEvidence::Exists, SealEvidence::Missing, SealEvidence::Unknown] {
                let error = Ledger::inspect(&store, evidence).await.unwrap_err();
                assert!(matches!(error, LedgerError::InstallationLost { .. }), "{remains} {evidence:?}: {error}");
                assert!(error.to_string().contains(remains), "{error}");
            }
            if !marked {
                store.replace(&Document::Initialising, None, b"{}").await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn opening_what_was_never_initialised_says_what_to_do() {
    let error = Ledger::open(Arc::new(MemoryStore::new()), &[ephemeral_seal()]).await.unwrap_err();
    assert!(matches!(error, LedgerError::NotInitialised { .. }) && error.to_string().contains("jwksd init"), "{error}");
}

#[tokio::test]
async fn an_unreadable_store_is_not_taken_for_an_empty_one() {
    let store = Faulty::over(Arc::new(MemoryStore::new()), Fault::Before, 0);
    let error = Ledger::inspect(&store, SealEvidence::Missing).await.unwrap_err();
    assert!(error.may_pass(), "{error}");
}

#[tokio::test]
async fn registering_is_one_write_and_repeats_itself() {
    let store = Arc::new(Faulty::over(Arc::new(MemoryStore::new()), Fault::Never, 0));
    let ledger = initialise(store.clone(), &ephemeral_seal()).await.unwrap();
    let both = [(name("a"), ISSUER.to_owned()), (name("b"), ISSUER.to_owned())];
    let before = store.installation_writes();
    let registrations = ledger.register(&both, at(0)).await.unwrap();
    assert_eq!(store.installation_writes(), before + 1);
    assert!(registrations.iter().all(|registration| registration.first));
    assert_ne!(registrations[0].lineage, registrations[1].lineage);
    assert_eq!(ledger.register(&both, at(5)).await.unwrap(), registrations);
    ledger.created(&[name("a"), name("b")]).await.unwrap();
    ledger.created(&[name("b")]).await.unwrap();
    assert_eq!(store.installation_writes(), before + 2);
    assert!(matches!(ledger.created(&[name("c")]).await, Err(LedgerError::Unregistered { .. })));

    let installation = ledger.installation();
    assert_eq!(installation.issuers[ISSUER].initialised_at, at(0));
    assert!(installation.keysets.values().all(|entry| entry.state == KeysetState::Created));
}

#[tokio::test]
async fn only_keysets_registered_with_a_new_issuer_are_first() {
    let ledger = initialise(Arc::new(MemoryStore::new()), &ephemeral_seal()).await.unwrap();
    add(&ledger, &["a"]).await;
    let elsewhere = "https://elsewhere.example.com".to_owned();
    let later = [(name("b"), ISSUER.to_owned()), (name("c"), elsewhere.clone()), (name("d"), elsewhere.clone())];
    let registrations = ledger.register(&later, at(1)).await.unwrap();
    assert_eq!(registrations.iter().map(|r| r.first).collect::<Vec<_>>(), [false, true, true]);
    // A keyset that moves keeps its history and is not first at an issuer that has published.
    let before = ledger.installation().keysets[&name("a")].lineage.clone();
    let moved = ledger.register(&[(name("a"), elsewhere.clone())], at(2)).await.unwrap().remove(0);
    assert_eq!((moved.first, moved.lineage), (false, before));
    assert_eq!(ledger.installation().keysets[&name("a")].issuer, elsewhere);
    let new = ledger.register(&[(name("a"), "https://new.example.com".to_owned())], at(3)).await.unwrap().remove(0);
    assert!(new.first);
}

#[tokio::test]
async fn generations_follow_each_other() {
    let ledger = initialise(Arc::new(MemoryStore::new()), &ephemeral_seal()).await.unwrap();
    let current = add(&ledger, &["a"]).await.remove(0);
    for generation in [0, 1, 3, u64::MAX] {
        let next = Keyring { generation, ..(*current.keyring).clone() };
        assert!(matches!(ledger.save(Some(&current), &next).await, Err(LedgerError::OutOfSequence { .. })));
    }
    let next = following(&current);
    ledger.save(Some(&current), &next).await.unwrap();
    let again = ledger.save(Some(&current), &next).await;
    assert!(matches!(again, Err(LedgerError::Store(StoreError::Conflict { .. }))));
    let unknown = keyring(&name("unknown"), "l", &ledger.keys());
    assert!(matches!(ledger.save(None, &unknown).await, Err(LedgerError::Unregistered { .. })));
}

#[tokio::test]
async fn the_journal_of_the_installation_is_kept() {
    let site = Site::new().await;
    let entry = AuditEntry {
        seq: 0,
        at: at(9),
        action: "clock-accept".to_owned(),
        actor: "operator".to_owned(),
        reason: None,
        kids: BTreeSet::new(),
        detail: None,
        generation: None,
        changes: Vec::new(),
    };
    site.open().await.unwrap().amend_journal(None, |journal, _| journal.audit.push(entry.clone())).await.unwrap();
    let ledger = site.open().await.unwrap();
    assert_eq!(ledger.installation().journal.audit, [entry]);

    // A change may be bound to the generation it was decided at.
    let current = ledger.generation();
    let note = |journal: &mut Journal, generation| journal.next_seq = generation;
    let stale = ledger.amend_journal(Some(&[current - 1]), note).await.unwrap();
    assert_eq!((stale, ledger.generation()), (Amended::MovedOn { current }, current), "nothing was written");
    let bound = ledger.amend_journal(Some(&[current]), note).await.unwrap();
    assert_eq!((bound, ledger.generation()), (Amended::At { generation: current + 1 }, current + 1));
    assert_eq!(ledger.installation().journal.next_seq, current + 1, "the generation that the write made");
}

/// Replicas of neighbouring releases read each other's records while a fleet is upgraded.
#[tokio::test]
async fn members_that_a_newer_release_adds_to_a_record_are_passed_over() {
    fn add_members(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Array(items) => items.iter_mut().for_each(add_members),
            serde_json::Value::Object(members) => {
                members.values_mut().for_each(add_members);
                members.insert("newer".to_owned(), serde_json::json!({ "than": ["this", 1] }));
            }
            _ => {}
        }
    }
    let ledger = initialise(Arc::new(MemoryStore::new()), &ephemeral_seal()).await.unwrap();
    let mut known = keyring(&name("a"), "l", &ledger.keys());
    let (reason, actor) = ("why".to_owned(), "who".to_owned());
    known.keys[1].state = KeyState::Revoked;
    known.keys[1].revocation = Some(Revocation { reason: reason.clone(), actor: actor.clone(), at: at(2) });
    known.hold = Some(Hold { reason, until: None, actor: actor.clone(), since: at(3) });
    known.supersedes.push(Superseded { lineage: "former".to_owned(), generation: 4 });
    known.floors.push(Floor { propagation: Span::HOUR, window: Span::MINUTE, until: at(5) });
    let (action, kids) = ("hold".to_owned(), BTreeSet::new());
    known.journal.audit.push(AuditEntry {
        seq: 0,
        at: at(3),
        action,
        actor,
        reason: None,
        kids,
        detail: None,
        generation: None,
        changes: Vec::new(),
    });
    for schedule in [Schedule::Every(Span::DAY), Schedule::cron("@daily", Some("Europe/Berlin")).unwrap()] {
        known.policy.rotation.schedule = schedule;
        let mut stored = serde_json::to_value(&known).unwrap();
        add_members(&mut stored);
        let read: Keyring = serde_json::from_str(&stored.to_string()).unwrap();
        assert_eq!(read, known);
    }
    let mut stored = serde_json::to_value(&*ledger.installation()).unwrap();
    stored["newer"] = serde_json::json!(1);
    assert_eq!(serde_json::from_value::<Installation>(stored).unwrap(), *ledger.installation());
}

/// Everything that grows, grown as far as it goes.
fn fullest(base: Keyring) -> Keyring {
    let reason = || Some("\u{1f511}".repeat(1000)); // The longest that is accepted, four bytes a character.
    let model = base.keys[0].clone();
    let mut keyring = Keyring { keys: vec![], ..base };
    let short = |n| Verifier { name: format!("v{n}"), sees_new: Span::SECOND, keeps_old: None };
    keyring.policy.rotation.verifiers = (0..1200).map(short).collect();
    let policy_bytes = serde_json::to_vec(&keyring.policy).unwrap().len();
    assert!((50_000..70_000).contains(&policy_bytes), "as the configuration limits it: {policy_bytes}");
    let mut number = 0_u32;
    let mut call = |keyring: &mut Keyring, intent: Intent| {
        number += 1;
        let policy = keyring.policy.clone();
        let facts = Facts {
            unconfirmed: Some(Vec::new()),
            now: at(1),
            clock_frozen: false,
            removals_not_before: Timestamp::EPOCH,
            desired: Desired::Policy(&policy),
            published: BTreeMap::new(),
            stopped: BTreeMap::new(),
            seen: BTreeMap::new(),
            contested: BTreeSet::new(),
            issuer_served: true,
            resumed_at: None,
            lagging: BTreeMap::new(),
            room: 10,
            backoff: BTreeMap::new(),
        };
        let idempotency = Idempotency { key: format!("{number:\"<255}"), fingerprint: "f".repeat(43) };
        let request = Request {
            intent,
            actor: "a".repeat(63),
            reason: reason(),
            dry_run: false,
            if_generation: None,
            idempotency: Some(idempotency),
        };
        match decide(keyring, &facts, &request).unwrap() {
            Decision::Write { next, .. } => *keyring = *next,
            other => panic!("{other:?}"),
        }
    };
    let bring = |keyring: &mut Keyring, serial: u64, state: KeyState| {
        let kid = Kid::parse(&format!("{serial:\"<256}")).unwrap();
        let n = format!("{serial:A<683}");
        let public = PublicJwk::Rsa { n, e: "AQAB".to_owned() };
        let mut key = Key { kid, public, state, ..model.clone() };
        (key.serial, key.private) = (serial, None);
        keyring.keys.push(key);
    };
    // Ten at a time, as a JWKS holds them; then the history of those that retired.
    for serial in 1..=400 {
        bring(&mut keyring, serial, KeyState::Retiring);
        if serial % 10 == 0 {
            call(&mut keyring, Intent::Compromise);
        }
    }
    for serial in 2001..=2300 {
        bring(&mut keyring, serial, KeyState::Retired);
    }
    // What would take years of revocations to fill.
    keyring.banned.extend((0..60_000).map(|n| format!("{n:x>43}")));
    for serial in 3001..=3010 {
        bring(&mut keyring, serial, KeyState::Retiring);
    }
    call(&mut keyring, Intent::Hold { until: None });
    call(&mut keyring, Intent::Compromise);
    // As often as anybody likes: the longest answer and the longest entry, each many times.
    let longest = |answers: &Vec<Answered>| {
        answers.iter().max_by_key(|answered| answered.answer.to_string().len()).unwrap().clone()
    };
    let (answer, entry) = (longest(&keyring.journal.answered), keyring.journal.audit.last().unwrap().clone());
    keyring.journal.answered.extend(vec![answer; 1100]);
    keyring.journal.audit.extend(vec![entry; 1100]);
    call(&mut keyring, Intent::Hold { until: None });
    keyring.generation = 1;
    keyring
}

#[tokio::test]
async fn a_record_in_which_everything_has_grown_to_its_limit_can_be_stored() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    let registration = ledger.register(&[(name("third"), ISSUER.to_owned())], at(0)).await.unwrap().remove(0);
    let (keyset, lineage) = (registration.name, registration.lineage);
    let full = fullest(keyring(&keyset, &lineage, &ledger.keys()));
    let count = |state| full.keys.iter().filter(|key| key.state == state).count();
    assert_eq!((count(KeyState::Revoked), count(KeyState::Retired)), (300, 200));
    assert_eq!(full.journal.audit.len(), 200);
    assert!(full.journal.answered.len() > 10 && full.banned.len() > 40_000);
    ledger.save(None, &full).await.unwrap();
    let length = fs::metadata(site.path("keyrings/third.json")).unwrap().len();
    println!("{length} bytes");
    assert!(length < 15 * 1024 * 1024, "{length} bytes: no room left below the longest record");
}

#[tokio::test]
async fn a_record_that_would_become_too_long_is_not_written_and_what_is_stored_stays_trusted() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    let registration = ledger.register(&[(name("third"), ISSUER.to_owned())], at(0)).await.unwrap().remove(0);
    let (keyset, lineage) = (registration.name, registration.lineage);
    let stored = ledger.save(None, &keyring(&keyset, &lineage, &ledger.keys())).await.unwrap();
    let mut next = following(&stored);
    next.policy.tokens.audiences = vec!["x".repeat(17 * 1024 * 1024)];
    let error = ledger.save(Some(&stored), &next).await.unwrap_err();
    assert!(!error.is_distrust() && !error.may_pass(), "{error}");
    assert!(error.to_string().contains("nothing was written"), "{error}");
    assert_eq!(ledger.load(&keyset).await.unwrap().unwrap().keyring, stored.keyring);
    ledger.save(Some(&stored), &following(&stored)).await.unwrap();
}

#[tokio::test]
async fn the_alive_mark_is_kept_and_its_absence_is_not_an_error() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    assert_eq!(ledger.read_alive().await.unwrap(), None);
    let mut alive = Alive {
        at: at(1),
        resumed: BTreeMap::from([(ISSUER.to_owned(), at(0))]),
        removals_delay: Span::ZERO,
        latest: at(0),
        confirmed: None,
        sampled: BTreeMap::new(),
    };
    ledger.write_alive(&alive).await.unwrap();
    alive.at = at(2);
    ledger.write_alive(&alive).await.unwrap();
    drop(ledger);
    let ledger = site.open().await.unwrap();
    assert_eq!(ledger.read_alive().await.unwrap(), Some(alive.clone()));
    // What a power failure may leave of a file that is not synced.
    let path = site.path("keyrings/_alive.json");
    let whole = fs::read(&path).unwrap();
    for length in [0, 10, whole.len() / 2] {
        fs::write(&path, &whole[..length]).unwrap();
        assert_eq!(ledger.read_alive().await.unwrap(), None);
    }
    ledger.write_alive(&alive).await.unwrap();
    assert_eq!(ledger.read_alive().await.unwrap(), Some(alive));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"at\": \"2026", "\"at\": \"2036")).unwrap();
    let error = ledger.read_alive().await.unwrap_err();
    assert_eq!(problem(error), RecordProblem::Changed);
}

#[tokio::test]
async fn after_destruction_no_file_of_the_store_holds_the_sealed_private_half() {
    let site = Site::new().await;
    let ledger = site.open().await.unwrap();
    let current = ledger.load(&name("default")).await.unwrap().unwrap();
    let sealed = current.keyring.keys[0].private.clone().unwrap().handle;
    let ciphertext = sealed.rsplit('.').next().unwrap().to_owned();
    let holds = |site: &Site| site.files().values().any(|bytes| String::from_utf8_lossy(bytes).contains(&ciphertext));
    assert!(holds(&site));
    let mut next = following(&current);
    next.keys[0].private = None;
    ledger.save(Some(&current), &next).await.unwrap();
    assert!(!holds(&site));
    assert!(!site.files().values().any(|bytes| String::from_utf8_lossy(bytes).contains("the private key")));
}

// Crashes.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Never,
    /// The write that fails has no effect.
    Before,
    /// The write that fails took effect.
    After,
}

/// A store whose n-th write fails, and everything after it, as if the process had been killed there.
struct Faulty {
    inner: Arc<dyn Store>,
    fault: Fault,
    writes_left: AtomicUsize,
    tripped: AtomicUsize,
    installation_writes: AtomicUsize,
    /// Writes of this document fail, others do not.
    broken: Option<Document>,
}

impl Faulty {
    fn over(inner: Arc<dyn Store>, fault: Fault, writes: usize) -> Self {
        let tripped = AtomicUsize::new(usize::from(fault != Fault::Never && writes == 0));
        Faulty {
            inner,
            fault,
            writes_left: AtomicUsize::new(writes),
            tripped,
            installation_writes: 0.into(),
            broken: None,
        }
    }

    fn tripped(&self) -> bool {
        self.tripped.load(Ordering::SeqCst) != 0
    }

    fn installation_writes(&self) -> usize {
        self.installation_writes.load(Ordering::SeqCst)
    }

    fn fails(&self) -> StoreError {
        StoreError::Unavailable { operation: "write", document: "x".into(), problem: "test".into(), source: None }
    }

    fn alive(&self) -> Result<(), StoreError> {
        if self.tripped() { Err(self.fails()) } else { Ok(()) }
    }

    /// Whether this write is the one that fails.
    fn trips(&self) -> bool {
        if self.fault == Fault::Never {
            return false;
        }
        let last = self.writes_left.fetch_sub(1, Ordering::SeqCst) == 1;
        self.tripped.store(usize::from(last), Ordering::SeqCst);
        last
    }
}

#[async_trait]
impl Store for Faulty {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn locate(&self, document: &Document) -> String {
        self.inner.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.alive()?;
        self.inner.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.alive()?;
        if self.broken.as_ref() == Some(document) {
            return Err(self.fails());
        }
        if *document == Document::Installation {
            self.installation_writes.fetch_add(1, Ordering::SeqCst);
        }
        let trips = self.trips();
        if !trips || self.fault == Fault::After {
            self.inner.replace(document, expected, bytes).await?;
        }
        if trips { Err(self.fails()) } else { Ok(()) }
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.alive()?;
        let trips = self.trips();
        if !trips || self.fault == Fault::After {
            self.inner.remove(document).await?;
        }
        if trips { Err(self.fails()) } else { Ok(()) }
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.alive()?;
        self.inner.keysets().await
    }
}

/// Runs `scenario` with a crash at the first write, the second … until it gets through; returns how many there are.
async fn crash_everywhere(fault: Fault, scenario: impl AsyncFn(Fault, usize) -> bool) -> usize {
    for writes in 1..100 {
        if !scenario(fault, writes).await {
            return writes - 1;
        }
    }
    panic!("it never gets through");
}

#[tokio::test]
async fn an_initialisation_that_crashed_anywhere_is_resumed() {
    for fault in [Fault::Before, Fault::After] {
        let writes = crash_everywhere(fault, async |fault, writes| {
            let folder = tempfile::tempdir().unwrap();
            let seal_path = folder.path().join("seal.key");
            let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
            let store = Arc::new(Faulty::over(Arc::clone(&inner), fault, writes));
            let evidence = || match FileKey::exists(&seal_path).unwrap() {
                true => SealEvidence::Exists,
                false => SealEvidence::Missing,
            };
            let make_seal = async || Ok(Arc::new(FileKey::load_or_create(&seal_path)?) as Arc<dyn KeyEncryptionKey>);
            let attempt = Ledger::initialise(store.clone(), evidence(), make_seal, at(0)).await;
            assert_eq!(attempt.is_err(), store.tripped());

            let found = Ledger::inspect(inner.as_ref(), evidence()).await.unwrap();
            let marked = inner.read(&Document::Initialising).await.unwrap().is_some();
            // A seal key is never made without a mark, and never without being resumable.
            assert!(!seal_path.exists() || marked || found == Initialisation::Initialised);
            let ledger = Ledger::initialise(Arc::clone(&inner), evidence(), make_seal, at(0)).await.unwrap();

            let installation = ledger.installation();
            assert_eq!((installation.data_keys.len(), installation.keysets.len()), (1, 0));
            assert_eq!(installation.data_keys[0].kek, FileKey::load(&seal_path).unwrap().id().await.unwrap());
            assert_eq!(inner.read(&Document::Initialising).await.unwrap(), None);
            assert_eq!(ledger.installation_mark(), Mark::Current);
            assert_eq!(Ledger::inspect(inner.as_ref(), evidence()).await.unwrap(), Initialisation::Initialised);
            let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::load(&seal_path).unwrap());
            Ledger::open(inner, &[seal]).await.unwrap();
            store.tripped()
        })
        .await;
        assert_eq!(writes, 4, "mark, installation, seen mark, mark removed");
    }
}

#[tokio::test]
async fn a_crash_before_or_after_the_seal_key_is_made_is_resumed() {
    for made in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seal.key");
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let crash = async || {
            if made {
                FileKey::create(&path)?;
            }
            Err(SealError::Unavailable { key: "test".into(), source: None })
        };
        Ledger::initialise(Arc::clone(&store), SealEvidence::Missing, crash, at(0)).await.unwrap_err();
        let evidence = if made { SealEvidence::Exists } else { SealEvidence::Missing };
        assert_eq!(Ledger::inspect(store.as_ref(), evidence).await.unwrap(), Initialisation::Initialising);
        let resume = async || Ok(Arc::new(FileKey::load_or_create(&path)?) as Arc<dyn KeyEncryptionKey>);
        Ledger::initialise(store, evidence, resume, at(0)).await.unwrap();
    }
}

#[tokio::test]
async fn a_crash_anywhere_while_a_keyset_is_made_is_resumed() {
    for fault in [Fault::Before, Fault::After] {
        let writes = crash_everywhere(fault, async |fault, writes| {
            let (inner, seal) = (Arc::new(MemoryStore::new()) as Arc<dyn Store>, ephemeral_seal());
            initialise(Arc::clone(&inner), &seal).await.unwrap();
            let store = Arc::new(Faulty::over(Arc::clone(&inner), fault, writes));
            let ledger = Ledger::open(store.clone(), &[Arc::clone(&seal)]).await.unwrap();
            let _ = make(&ledger).await;

            let ledger = Ledger::open(inner, &[seal]).await.unwrap();
            let loaded = make(&ledger).await.unwrap();
            assert!(loaded.keyring.first, "the second attempt lost that the keyset is first");
            assert_eq!((loaded.keyring.generation, loaded.mark.clone()), (2, Mark::Current));
            assert_eq!(ledger.installation().keysets[&name("a")].state, KeysetState::Created);
            store.tripped()
        })
        .await;
        assert_eq!(writes, 8, "register, first and second generation, created: each with its mark");
    }

    /// What an engine does: register, write what is not written yet, note that it was.
    async fn make(ledger: &Ledger) -> Result<Loaded, LedgerError> {
        let registration = ledger.register(&[(name("a"), ISSUER.to_owned())], at(0)).await?.remove(0);
        let mut current = ledger.load(&name("a")).await?;
        if current.is_none() {
            let mut first = keyring(&registration.name, &registration.lineage, &ledger.keys());
            first.first = registration.first;
            current = Some(ledger.save(None, &first).await?);
        }
        let mut current = current.unwrap();
        ledger.created(&[name("a")]).await?;
        if current.keyring.generation == 1 {
            current = ledger.save(Some(&current), &following(&current)).await?;
        }
        Ok(current)
    }
}

#[tokio::test]
async fn a_save_of_unknown_outcome_can_be_settled() {
    for (fault, first) in [(Fault::Before, true), (Fault::After, true), (Fault::Before, false), (Fault::After, false)] {
        let (inner, seal) = (Arc::new(MemoryStore::new()) as Arc<dyn Store>, ephemeral_seal());
        let healthy = initialise(Arc::clone(&inner), &seal).await.unwrap();
        let (current, next) = if first {
            let registration = healthy.register(&[(name("a"), ISSUER.to_owned())], at(0)).await.unwrap().remove(0);
            (None, keyring(&registration.name, &registration.lineage, &healthy.keys()))
        } else {
            let current = add(&healthy, &["a"]).await.remove(0);
            let next = following(&current);
            (Some(current), next)
        };
        let store = Arc::new(Faulty::over(Arc::clone(&inner), fault, 1));
        let failing = Ledger::open(store, &[seal]).await.unwrap();
        assert!(failing.save(current.as_ref(), &next).await.unwrap_err().may_pass());
        assert!(failing.settle(current.as_ref(), &next).await.unwrap_err().may_pass(), "still unknown");

        match (fault, healthy.settle(current.as_ref(), &next).await.unwrap()) {
            (Fault::Before, Settled::NotWritten) => {
                healthy.save(current.as_ref(), &next).await.unwrap();
            }
            (Fault::After, Settled::Written(loaded)) => {
                assert_eq!((&*loaded.keyring, &loaded.mark), (&next, &Mark::Current));
                healthy.save(Some(&*loaded), &following(&loaded)).await.unwrap();
                let neither = healthy.settle(current.as_ref(), &next).await;
                assert!(matches!(neither, Err(LedgerError::Store(StoreError::Conflict { .. }))));
            }
            (fault, settled) => panic!("{fault:?} settled as {settled:?}"),
        }
    }
}

#[tokio::test]
async fn an_installation_write_of_unknown_outcome_is_found_out_before_the_next() {
    for fault in [Fault::Before, Fault::After] {
        let (inner, seal) = (Arc::new(MemoryStore::new()) as Arc<dyn Store>, ephemeral_seal());
        initialise(Arc::clone(&inner), &seal).await.unwrap();
        let store = Arc::new(Faulty::over(inner, fault, 1));
        let ledger = Ledger::open(store.clone(), &[seal]).await.unwrap();
        let keyset = [(name("a"), ISSUER.to_owned())];
        ledger.register(&keyset, at(0)).await.unwrap_err();
        // The store is back.
        store.writes_left.store(100, Ordering::SeqCst);
        store.tripped.store(0, Ordering::SeqCst);
        let registration = ledger.register(&keyset, at(1)).await.unwrap().remove(0);
        assert!(registration.first);
        let initialised_at = if fault == Fault::After { at(0) } else { at(1) };
        assert_eq!(ledger.installation().issuers[ISSUER].initialised_at, initialised_at);
    }
}

#[tokio::test]
async fn a_mark_that_cannot_be_written_does_not_hide_the_record() {
    let site = Site::new().await;
    site.advance("default").await;
    let seen = site.path("keyrings/_seen/default.json");
    let ledger = site.open().await.unwrap();
    let current = ledger.load(&name("default")).await.unwrap().unwrap();
    // A folder in its place: nobody can write there, root neither.
    let mark = fs::read(&seen).unwrap();
    fs::remove_file(&seen).unwrap();
    fs::create_dir(&seen).unwrap();
    let saved = ledger.save(Some(&current), &following(&current)).await.unwrap();
    assert!(
        matches!(&saved.mark, Mark::Behind { problem } if problem.contains("_seen/default.json")),
        "{:?}",
        saved.mark
    );
    fs::remove_dir(&seen).unwrap();
    fs::write(&seen, mark).unwrap();
    let loaded = ledger.load(&name("default")).await.unwrap().unwrap();
    assert_eq!((loaded.keyring.generation, loaded.mark), (3, Mark::Current));
}

// Reseal.

async fn sealed_site(seal: &Arc<dyn KeyEncryptionKey>) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ledger = initialise(Arc::clone(&store), seal).await.unwrap();
    let loaded = add(&ledger, &["a", "b"]).await;
    let mut next = following(&loaded[0]);
    next.keys[0].private = None;
    ledger.save(Some(&loaded[0]), &next).await.unwrap();
    ledger.register(&[(name("never-made"), ISSUER.to_owned())], at(0)).await.unwrap();
    ledger
        .write_alive(&Alive {
            at: at(3),
            resumed: BTreeMap::new(),
            removals_delay: Span::ZERO,
            latest: at(0),
            confirmed: None,
            sampled: BTreeMap::new(),
        })
        .await
        .unwrap();
    store
}

/// Everything reads, and the private keys open.
async fn intact(ledger: &Ledger) {
    for keyset in ["a", "b"] {
        let loaded = ledger.load(&name(keyset)).await.unwrap().unwrap();
        assert_eq!(loaded.mark, Mark::Current);
        for key in &loaded.keyring.keys {
            let Some(private) = &key.private else { continue };
            if private.backend != "local" {
                assert_eq!(private.handle, "alias/three");
                continue;
            }
            let bound_to = associated_data(&loaded.keyring, key, &ledger.keys());
            let opened = ledger.keys().open_private(&bound_to, &private.handle).unwrap();
            assert_eq!(&**opened, format!("the private key {} of {keyset}", key.serial).as_bytes());
        }
    }
    assert_eq!(ledger.read_alive().await.unwrap().unwrap().at, at(3));
    assert!(ledger.load(&name("never-made")).await.unwrap().is_none());
}

async fn all_text(store: &dyn Store) -> String {
    let mut text = String::new();
    let mut documents = vec![Document::Installation, Document::SeenInstallation, Document::Alive];
    for keyset in ["a", "b"] {
        documents.extend([Document::Keyring(name(keyset)), Document::Seen(name(keyset))]);
    }
    for document in documents {
        text.push_str(&String::from_utf8(store.read(&document).await.unwrap().unwrap()).unwrap());
    }
    text
}

#[tokio::test]
async fn resealing_leaves_nothing_of_the_old_keys() {
    let (old, new) = (ephemeral_seal(), ephemeral_seal());
    let store = sealed_site(&old).await;
    let before = Ledger::open(Arc::clone(&store), &[Arc::clone(&old)]).await.unwrap();
    let old_data_key = before.keys().current().to_owned();
    drop(before);
    let resealed = Ledger::reseal(Arc::clone(&store), Arc::clone(&new), &[Arc::clone(&old)], associated_data, at(10))
        .await
        .unwrap();
    assert_eq!((resealed.keyrings, resealed.private_keys, resealed.kek), (2, 3, new.id().await.unwrap()));
    let error = Ledger::open(Arc::clone(&store), &[Arc::clone(&old)]).await.unwrap_err();
    assert!(matches!(error, LedgerError::OtherSeal { .. }), "{error}");
    let ledger = Ledger::open(Arc::clone(&store), &[new]).await.unwrap();
    intact(&ledger).await;
    assert_eq!(ledger.installation().data_keys.len(), 1);
    assert!(!all_text(store.as_ref()).await.contains(&old_data_key));
}

#[tokio::test]
async fn resealing_that_crashed_anywhere_is_resumed() {
    for fault in [Fault::Before, Fault::After] {
        let writes = crash_everywhere(fault, async |fault, writes| {
            let (old, new) = (ephemeral_seal(), ephemeral_seal());
            let inner = sealed_site(&old).await;
            let store = Arc::new(Faulty::over(Arc::clone(&inner), fault, writes));
            let olds = [Arc::clone(&old)];
            let _ = Ledger::reseal(store.clone(), Arc::clone(&new), &olds, associated_data, at(10)).await;

            // A daemon that knows both keys runs in between.
            let both = [Arc::clone(&new), Arc::clone(&old)];
            intact(&Ledger::open(Arc::clone(&inner), &both).await.unwrap()).await;
            let resealed = Ledger::reseal(Arc::clone(&inner), Arc::clone(&new), &olds, associated_data, at(11)).await;
            resealed.unwrap();
            let ledger = Ledger::open(Arc::clone(&inner), &[new]).await.unwrap();
            intact(&ledger).await;
            assert_eq!(ledger.installation().data_keys.len(), 1);
            let text = all_text(inner.as_ref()).await;
            assert_eq!(text.matches("\"data_key\": ").count(), text.matches(ledger.keys().current()).count() - 3 - 2);
            store.tripped()
        })
        .await;
        assert!(writes >= 8, "{writes}");
    }
}

/// What receivers have heard is no reason to keep an old key in use; a newer release's is not ours to judge.
#[tokio::test]
async fn resealing_is_not_held_up_by_a_book_of_notices_that_cannot_be_used() {
    let (old, new) = (ephemeral_seal(), ephemeral_seal());
    let store = sealed_site(&old).await;
    let ledger = Ledger::open(Arc::clone(&store), &[Arc::clone(&old)]).await.unwrap();
    ledger.write_notices(&Book::default(), None).await.unwrap();
    drop(ledger);
    let put = async |bytes: &[u8]| {
        let stored = store.read(&Document::Notices).await.unwrap().unwrap();
        store.replace(&Document::Notices, Some(Digest::of(&stored)), bytes).await.unwrap();
    };
    let whole = String::from_utf8(store.read(&Document::Notices).await.unwrap().unwrap()).unwrap();
    put(whole
        .replace("\"format\": 1", "\"format\": 2")
        .replace("\"written_by\": \"", "\"written_by\": \"x")
        .as_bytes())
    .await;
    let reseal = async || {
        Ledger::reseal(Arc::clone(&store), Arc::clone(&new), &[Arc::clone(&old)], associated_data, at(10)).await
    };
    let error = reseal().await.unwrap_err();
    assert!(matches!(problem(error), RecordProblem::NewerFormat { format: 2, .. }));
    put(b"{ damaged").await;
    reseal().await.unwrap();
    let ledger = Ledger::open(Arc::clone(&store), &[new]).await.unwrap();
    intact(&ledger).await;
    assert_eq!(ledger.installation().data_keys.len(), 1);
    // Whoever sends begins anew with it, as with any that is damaged.
    assert!(ledger.read_notices().await.unwrap_err().is_unusable_record());
    ledger.renew_notices(&Book::default()).await.unwrap();
}

#[tokio::test]
async fn resealing_stops_at_a_private_key_it_cannot_open() {
    let (old, new) = (ephemeral_seal(), ephemeral_seal());
    let store = sealed_site(&old).await;
    let wrong = |_: &Keyring, _: &Key, _: &DataKeys| b"wrong".to_vec();
    let error = Ledger::reseal(Arc::clone(&store), Arc::clone(&new), &[Arc::clone(&old)], wrong, at(10)).await;
    assert!(matches!(error, Err(LedgerError::UnreadablePrivateKey { serial: 2, .. })), "{error:?}");
    intact(&Ledger::open(store, &[new, old]).await.unwrap()).await;
}

#[tokio::test]
async fn resealing_drops_no_data_key_that_a_mark_still_needs() {
    for broken in [Document::Seen(name("b")), Document::SeenInstallation, Document::Alive] {
        let (old, new) = (ephemeral_seal(), ephemeral_seal());
        let inner = sealed_site(&old).await;
        let mut store = Faulty::over(Arc::clone(&inner), Fault::Never, 0);
        store.broken = Some(broken.clone());
        let olds = [Arc::clone(&old)];
        let error =
            Ledger::reseal(Arc::new(store), Arc::clone(&new), &olds, associated_data, at(10)).await.unwrap_err();
        assert!(error.may_pass(), "{broken}: {error}");
        assert_eq!(Ledger::open(Arc::clone(&inner), &[new, old]).await.unwrap().installation().data_keys.len(), 2);
    }
}

#[tokio::test]
async fn the_data_key_can_be_renewed_under_the_same_seal() {
    let seal = ephemeral_seal();
    let store = sealed_site(&seal).await;
    let old_data_key =
        Ledger::open(Arc::clone(&store), &[Arc::clone(&seal)]).await.unwrap().keys().current().to_owned();
    Ledger::reseal(Arc::clone(&store), Arc::clone(&seal), &[], associated_data, at(10)).await.unwrap();
    let ledger = Ledger::open(store, &[seal]).await.unwrap();
    assert_ne!(ledger.keys().current(), old_data_key);
    intact(&ledger).await;
}
