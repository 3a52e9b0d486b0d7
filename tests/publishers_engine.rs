//! Places where an issuer is published, by the engine's own clock: what counts as published, and what a replica that
//! lags may not do. `tests/publishers.rs` shows the rest from outside.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "support/policy.rs"]
mod policy;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::placing::Place;
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings};
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::outlook::Alarm;
use jwksd::keyring::placement::Generations;
use jwksd::keyring::policy::{IssuerPolicy, Policy};
use jwksd::keyring::record::{KeyState, Keyring};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::publisher::{Operation, Outgoing, Placed, PublishError, Publisher, Version};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::store::shared::{Heads, Replica, Report, Revision, SharedStore};
use jwksd::store::{Digest, Document, Store, StoreError};
use jwksd::telemetry::metrics::Metrics;

const PROPAGATION: Span = Span::from_secs(120);
const URL: &str = "https://issuer.example";
const JWKS: &str = "/.well-known/jwks.json";
const MORE: &str = "/more/jwks.json";

/// A key set that nobody here made.
const FORGED: &str = r#"{"keys":[{"kty":"EC","kid":"mallory","crv":"P-256","x":"AA","y":"AA"}]}"#;

/// A place in memory. Clones share it.
#[derive(Clone, Default)]
struct Board {
    placed: Arc<Mutex<BTreeMap<String, Placed>>>,
    writes: Arc<Mutex<u64>>,
    faults: Arc<Mutex<Faults>>,
}

#[derive(Clone, Default)]
struct Faults {
    reads: bool,
    writes: bool,
    /// Writes succeed and change nothing.
    lies: bool,
    /// What somebody else places between a read and the write that follows it, once.
    race: Option<Placed>,
    /// What somebody else places between a write and the read that follows it, once.
    retort: Option<Placed>,
    /// Writes are carried out, and fail.
    answers_lost: bool,
    /// Nothing can be read at this path.
    unreadable: Option<&'static str>,
}

impl Board {
    fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    fn jwks(&self) -> Option<Placed> {
        self.placed.lock().unwrap().get(JWKS).cloned()
    }

    /// Changes the body below its mark, as whoever edits a file does.
    fn forge(&self, body: &'static str) {
        let mut placed = self.placed.lock().unwrap();
        let forged = with_body(&placed[JWKS], body);
        placed.insert(JWKS.to_owned(), forged);
    }

    fn kids(&self) -> Vec<String> {
        self.kids_at(JWKS)
    }

    fn kids_at(&self, path: &str) -> Vec<String> {
        let placed = self.placed.lock().unwrap().get(path).cloned().expect("something is placed");
        let document: serde_json::Value = serde_json::from_slice(&placed.body).unwrap();
        document["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
    }

    fn failure(&self, operation: Operation, path: &str) -> PublishError {
        PublishError::Failed { operation, place: self.locate(path), problem: "as a test".to_owned(), source: None }
    }
}

#[async_trait]
impl Publisher for Board {
    fn kind(&self) -> &'static str {
        "board"
    }

    fn locate(&self, path: &str) -> String {
        format!("board:{path}")
    }

    async fn read(&self, path: &str) -> Result<Option<Placed>, PublishError> {
        let faults = self.faults.lock().unwrap().clone();
        if faults.reads || faults.unreadable == Some(path) {
            return Err(self.failure(Operation::Read, path));
        }
        Ok(self.placed.lock().unwrap().get(path).cloned())
    }

    async fn put(&self, path: &str, document: &Outgoing, expected: Option<&Version>) -> Result<(), PublishError> {
        let mut faults = self.faults.lock().unwrap();
        if faults.writes {
            return Err(self.failure(Operation::Write, path));
        }
        if faults.lies {
            return Ok(());
        }
        let mut placed = self.placed.lock().unwrap();
        if let Some(other) = faults.race.take() {
            placed.insert(path.to_owned(), other);
        }
        if placed.get(path).map(|placed| &placed.version) != expected {
            return Err(PublishError::Conflict { place: self.locate(path) });
        }
        let mut writes = self.writes.lock().unwrap();
        *writes += 1;
        let document = Placed {
            body: document.body.clone(),
            headers: Some(document.headers.clone()),
            generations: Some(document.generations.clone()),
            version: Version(writes.to_string()),
        };
        placed.insert(path.to_owned(), document);
        if let Some(other) = faults.retort.take() {
            placed.insert(path.to_owned(), other);
        }
        if faults.answers_lost { Err(self.failure(Operation::Write, path)) } else { Ok(()) }
    }
}

fn with_body(placed: &Placed, body: &'static str) -> Placed {
    let version = Version(format!("{}, and then {body}", placed.version.0));
    Placed { body: body.into(), version, ..placed.clone() }
}

/// Memory that several daemons use.
struct Common(MemoryStore);

#[async_trait]
impl Store for Common {
    fn kind(&self) -> &'static str {
        "common"
    }

    fn locate(&self, document: &Document) -> String {
        self.0.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.0.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.0.replace(document, expected, bytes).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.0.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.0.keysets().await
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for Common {
    async fn heads(&self, known: Option<&Revision>, _wait: Duration) -> Result<Heads, StoreError> {
        let revision = known.cloned().unwrap_or(Revision("0".to_owned()));
        Ok(Heads { revision, store_time: Timestamp::EPOCH, age: Span::ZERO, documents: None })
    }

    async fn report(&self, _replicas: &[Report]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn replicas(&self, _longest: Span) -> Result<Vec<Replica>, StoreError> {
        Ok(Vec::new())
    }

    async fn forget(&self, _replicas: &[&str]) -> Result<(), StoreError> {
        Ok(())
    }
}

struct Site {
    engine: Arc<Engine>,
    clock: Arc<ManualClock>,
}

impl Site {
    async fn start(
        store: Arc<dyn Store>,
        seal: &Arc<dyn KeyEncryptionKey>,
        clock: &Arc<ManualClock>,
        boards: &[Board],
    ) -> Site {
        let trusted = Arc::new(TrustedClock::new(clock.clone(), Span::SECOND));
        let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal.clone()) };
        let ledger = Arc::new(Ledger::initialise(store, SealEvidence::Unknown, make, trusted.now()).await.unwrap());
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(ledger.keys()))];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
        engine.configure(&[declared(policy())]).await.unwrap();
        let place = |(at, board): (usize, &Board)| {
            let name = Name::parse(&format!("board-{at}")).unwrap();
            Place::new(URL.to_owned(), name, Arc::new(board.clone()))
        };
        engine.place_at(boards.iter().enumerate().map(place).collect());
        engine.resume().await;
        engine.reconcile_all().await;
        engine.confirm_created().await.unwrap();
        engine.place_all().await;
        engine.opened().await;
        engine.pulse().await;
        engine.reconcile_all().await;
        Site { engine, clock: clock.clone() }
    }

    /// The only daemon of its store.
    async fn alone(boards: &[Board]) -> Site {
        let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        Site::start(Arc::new(MemoryStore::new()), &seal, &clock, boards).await
    }

    /// As a daemon that lives: it shows that it does, looks after its keyset, and after its places.
    async fn pass(&self, span: Span) {
        let end = self.engine.clock.now() + span;
        while self.engine.clock.now() < end {
            self.clock.advance(Span::from_secs(10).min(end.since(self.engine.clock.now())));
            self.engine.pulse().await;
            self.engine.place_all().await;
            self.engine.reconcile_all().await;
        }
    }

    async fn reload(&self, policy: Policy) {
        self.engine.configure(&[declared(policy)]).await.unwrap();
        self.engine.reconcile_all().await;
    }

    async fn ask(&self, intent: Intent) {
        let (actor, reason) = ("operator".to_owned(), Some("test".to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        self.engine.command(&self.engine.keyset("a").unwrap(), request).await.unwrap();
        self.engine.reconcile_all().await;
    }

    fn keyring(&self) -> Arc<Keyring> {
        self.engine.keyset("a").unwrap().snapshot.load().keyring.clone()
    }

    fn published(&self) -> usize {
        self.keyring().keys.iter().filter(|key| key.published_at.is_some()).count()
    }

    fn standbys(&self) -> usize {
        self.keyring().keys.iter().filter(|key| key.state == KeyState::Standby).count()
    }

    fn raises(&self, alarm: Alarm) -> bool {
        self.engine.look(&self.engine.keyset("a").unwrap()).alarms.contains(&alarm)
    }
}

fn declared(policy: Policy) -> Declared {
    Declared { name: Name::parse("a").unwrap(), policy: Arc::new(policy), fits: true }
}

/// With a key set at a further path.
fn policy_of_two_paths() -> Policy {
    let policy = policy();
    let issuer = IssuerPolicy { jwks_paths: vec![MORE.to_owned()], ..policy.issuer.clone() };
    Policy { issuer, ..policy }
}

fn policy() -> Policy {
    let mut policy = policy::policy("main", URL);
    (policy.issuer.max_age, policy.issuer.caches) = (Span::MINUTE, vec![Span::MINUTE]);
    let rotation = &mut policy.rotation;
    (rotation.schedule, rotation.propagation) = (Schedule::Every(Span::DAY.times(30)), PROPAGATION);
    rotation.successors = 2;
    policy
}

#[tokio::test]
async fn a_key_counts_as_published_once_the_last_place_was_read_back_with_it() {
    let boards = [Board::default(), Board::default()];
    boards[1].set(Faults { writes: true, ..Faults::default() });
    let site = Site::alone(&boards).await;
    assert_eq!(boards[0].kids().len(), 3, "one place does not wait for the other");
    site.pass(PROPAGATION.times(2)).await;
    assert_eq!((site.published(), site.standbys()), (0, 0));
    boards[1].set(Faults::default());
    site.pass(Span::from_secs(10)).await;
    assert_eq!((site.published(), site.standbys()), (3, 0));
    let placed_at = site.engine.clock.now();
    assert!(site.keyring().keys.iter().all(|key| key.published_at.unwrap() + Span::from_secs(10) >= placed_at));
    site.pass(PROPAGATION.saturating_sub(Span::from_secs(20))).await;
    assert_eq!(site.standbys(), 0, "propagation counts from there");
    site.pass(Span::from_secs(30)).await;
    assert_eq!(site.standbys(), 2);
}

#[tokio::test]
async fn a_write_that_is_not_read_back_publishes_nothing() {
    let board = Board::default();
    board.set(Faults { lies: true, ..Faults::default() });
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.pass(PROPAGATION).await;
    assert_eq!(site.published(), 0);
    board.set(Faults::default());
    site.pass(Span::from_secs(10)).await;
    assert_eq!(site.published(), 3);
}

#[tokio::test]
async fn a_place_that_is_behind_for_a_minute_raises_an_alarm_until_it_is_right() {
    for faults in [Faults { writes: true, ..Faults::default() }, Faults { reads: true, ..Faults::default() }] {
        let board = Board::default();
        let site = Site::alone(std::slice::from_ref(&board)).await;
        site.pass(PROPAGATION + Span::MINUTE).await;
        assert!(!site.raises(Alarm::PublisherFailing));
        board.set(faults);
        site.ask(Intent::Hold { until: None }).await;
        site.pass(Span::from_secs(50)).await;
        assert!(!site.raises(Alarm::PublisherFailing), "it may be over soon");
        site.pass(Span::from_secs(30)).await;
        assert!(site.raises(Alarm::PublisherFailing));
        board.set(Faults::default());
        site.pass(Span::from_secs(10)).await;
        assert!(!site.raises(Alarm::PublisherFailing));
    }
}

#[tokio::test]
async fn what_is_not_changed_is_not_written_again() {
    let board = Board::default();
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.pass(PROPAGATION + Span::MINUTE).await;
    let writes = *board.writes.lock().unwrap();
    site.pass(Span::HOUR).await;
    assert_eq!(*board.writes.lock().unwrap(), writes);
}

#[tokio::test]
async fn a_replica_that_lags_never_replaces_what_is_newer() {
    let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
    let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
    let store: Arc<dyn Store> = Arc::new(Common(MemoryStore::new()));
    let board = Board::default();
    let ahead = Site::start(store.clone(), &seal, &clock, std::slice::from_ref(&board)).await;
    ahead.pass(PROPAGATION + Span::MINUTE).await;
    let lagging = Site::start(store, &seal, &clock, std::slice::from_ref(&board)).await;
    assert_eq!(lagging.keyring().generation, ahead.keyring().generation);
    // A key goes, and the other replica does not hear of it.
    let revoked = ahead.keyring().active().unwrap().clone();
    ahead.ask(Intent::Revoke { serial: revoked.serial }).await;
    ahead.engine.place_all().await;
    let newest = board.jwks().unwrap();
    assert!(!board.kids().contains(&revoked.kid.to_string()));
    for _ in 0..10 {
        clock.advance(Span::from_secs(10));
        lagging.engine.place_all().await;
        assert_eq!(board.jwks().unwrap(), newest);
    }
    assert!(lagging.raises(Alarm::PublisherFailing), "a replica should have caught up");
    assert!(!lagging.raises(Alarm::PublicationMismatch), "nobody else was there");

    // Nor in a race: what it read is replaced before it writes.
    let older = board.placed.lock().unwrap().remove(JWKS).unwrap();
    board.set(Faults { race: Some(older.clone()), ..Faults::default() });
    lagging.engine.place_all().await;
    assert_eq!(board.jwks().unwrap(), older);
}

#[tokio::test]
async fn another_installations_document_is_replaced_and_told() {
    let board = Board::default();
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.pass(Span::MINUTE).await;
    let other = Site::alone(std::slice::from_ref(&board)).await;
    assert!(other.raises(Alarm::PublicationMismatch));
    other.pass(Span::from_secs(30)).await;
    assert!(other.raises(Alarm::PublicationMismatch), "for as long as somebody may need to see it");
    other.pass(Span::MINUTE).await;
    let ours = Generations::of([other.keyring().as_ref()]).to_string();
    assert_eq!(board.jwks().unwrap().generations, Some(ours));
    assert!(!other.raises(Alarm::PublicationMismatch), "it has stayed ours since");
}

#[tokio::test]
async fn a_change_is_told_also_while_a_newer_document_is_due() {
    for body in [FORGED, r#"{"keys":[]}"#, "gone"] {
        let board = Board::default();
        let site = Site::alone(std::slice::from_ref(&board)).await;
        site.pass(Span::MINUTE).await;
        site.ask(Intent::Hold { until: None }).await;
        let due = Generations::of([site.keyring().as_ref()]).to_string();
        assert_ne!(board.jwks().unwrap().generations, Some(due), "a newer document is due");
        site.engine.place_all().await;
        assert!(!site.raises(Alarm::PublicationMismatch), "the daemon itself went on");
        site.ask(Intent::Resume).await;
        board.forge(body);
        site.engine.place_all().await;
        assert!(site.raises(Alarm::PublicationMismatch), "{body}");
        assert_eq!(board.kids().len(), 3, "{body}");
    }
}

#[tokio::test]
async fn a_replica_tells_a_forged_key_also_while_a_newer_document_is_due() {
    let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
    let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
    let board = Board::default();
    let store: Arc<dyn Store> = Arc::new(Common(MemoryStore::new()));
    let site = Site::start(store, &seal, &clock, std::slice::from_ref(&board)).await;
    site.pass(Span::MINUTE).await;
    site.ask(Intent::Hold { until: None }).await;
    board.forge(FORGED);
    site.engine.place_all().await;
    assert!(site.raises(Alarm::PublicationMismatch));
    assert_eq!(board.kids().len(), 3);
}

#[tokio::test]
async fn a_change_between_a_write_and_its_reading_back_is_told() {
    let board = Board::default();
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.pass(Span::MINUTE).await;
    site.ask(Intent::Hold { until: None }).await;
    let forged = Placed { generations: None, ..with_body(&board.jwks().unwrap(), FORGED) };
    board.set(Faults { retort: Some(forged), ..Faults::default() });
    site.engine.place_all().await;
    assert!(site.raises(Alarm::PublicationMismatch));
    assert_eq!(board.kids().len(), 3);
}

#[tokio::test]
async fn a_write_of_our_own_whose_outcome_was_unknown_is_nobody_elses() {
    let board = Board::default();
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.pass(PROPAGATION + Span::MINUTE).await;
    board.set(Faults { answers_lost: true, ..Faults::default() });
    let revoked = site.keyring().active().unwrap().serial;
    site.ask(Intent::Revoke { serial: revoked }).await;
    site.engine.place_all().await;
    board.set(Faults::default());
    site.ask(Intent::Hold { until: None }).await;
    site.engine.place_all().await;
    assert!(!site.raises(Alarm::PublicationMismatch));
    let ours = Generations::of([site.keyring().as_ref()]).to_string();
    assert_eq!(board.jwks().unwrap().generations, Some(ours));
}

#[tokio::test]
async fn a_path_that_a_reload_adds_was_changed_by_nobody() {
    let board = Board::default();
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.pass(Span::MINUTE).await;
    site.reload(policy_of_two_paths()).await;
    site.engine.place_all().await;
    assert_eq!(board.kids_at(MORE), board.kids());
    assert!(!site.raises(Alarm::PublicationMismatch));
    // Once it is there it is to stay, for as long as the configuration has it.
    board.placed.lock().unwrap().remove(MORE);
    site.engine.place_all().await;
    assert!(site.raises(Alarm::PublicationMismatch));
    assert_eq!(board.kids_at(MORE), board.kids());
    site.reload(policy()).await;
    site.pass(Span::MINUTE.times(3)).await;
    board.placed.lock().unwrap().remove(MORE);
    site.reload(policy_of_two_paths()).await;
    site.engine.place_all().await;
    assert!(!site.raises(Alarm::PublicationMismatch));
}

#[tokio::test]
async fn a_path_that_fails_keeps_no_revoked_key_at_the_next_one() {
    let board = Board::default();
    let site = Site::alone(std::slice::from_ref(&board)).await;
    site.reload(policy_of_two_paths()).await;
    site.pass(PROPAGATION + Span::MINUTE).await;
    let revoked = site.keyring().active().unwrap().clone();
    board.set(Faults { unreadable: Some(JWKS), ..Faults::default() });
    site.ask(Intent::Revoke { serial: revoked.serial }).await;
    site.engine.place_all().await;
    assert!(board.kids().contains(&revoked.kid.to_string()), "nothing can be done there");
    assert!(!board.kids_at(MORE).contains(&revoked.kid.to_string()));
}
