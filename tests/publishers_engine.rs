//! Places where an issuer is published, by the engine's own clock: what counts as published, and what a replica that
//! lags may not do. `tests/publishers.rs` shows the rest from outside.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::placing::Place;
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings};
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::outlook::Alarm;
use jwksd::keyring::placement::Generations;
use jwksd::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy};
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
}

impl Board {
    fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    fn jwks(&self) -> Option<Placed> {
        self.placed.lock().unwrap().get(JWKS).cloned()
    }

    fn kids(&self) -> Vec<String> {
        let placed = self.jwks().expect("something is placed");
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
        if self.faults.lock().unwrap().reads {
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
        Ok(())
    }
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
        let declared = Declared { name: Name::parse("a").unwrap(), policy: Arc::new(policy()), fits: true };
        engine.configure(&[declared]).await.unwrap();
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

fn policy() -> Policy {
    Policy {
        issuer: IssuerPolicy {
            name: Name::parse("main").unwrap(),
            url: URL.to_owned(),
            max_age: Span::MINUTE,
            stale_if_error: Span::ZERO,
            caches: vec![Span::MINUTE],
            jwks_paths: Vec::new(),
            discovery: Discovery::Off,
            probes: Vec::new(),
        },
        algorithm: Algorithm::Es256,
        backend: "local".to_owned(),
        rotation: RotationPolicy {
            schedule: Schedule::Every(Span::DAY.times(30)),
            propagation: PROPAGATION,
            successors: 2,
            overlap_extra: Span::ZERO,
            bootstrap: Bootstrap::Wait,
            verifiers: Vec::new(),
            clock_skew: Span::SECOND,
            staleness_limit: Span::ZERO,
            publish_lag: Span::ZERO,
        },
        tokens: TokenPolicy {
            max_ttl: Span::MINUTE,
            default_ttl: Span::MINUTE,
            required_claims: Vec::new(),
            forbidden_claims: Vec::new(),
            audiences: Vec::new(),
            types: vec!["JWT".to_owned()],
            backdate: Span::ZERO,
        },
    }
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
