//! Backends elsewhere. One that never answers holds up nothing that does not need it: DESIGN §2, "a planned rotation needs no backend
//! at the moment it happens".

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "support/policy.rs"]
mod policy;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, CreatedKey, KeyIdentity, RemoteSigner, Signer, StoredKey};
use jwksd::clock::{Clock, ManualClock, TrustedClock};
use jwksd::engine::{Declared, Engine, KeysetCell, ReplicaRole, Settings, SignFailure};
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::notice::{Event, Heard};
use jwksd::keyring::outlook::Alarm;
use jwksd::keyring::policy::{IssuerPolicy, Policy, RotationPolicy, TokenPolicy};
use jwksd::keyring::record::{KeyState, Serial};
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::Store;
use jwksd::store::file::FileStore;
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::telemetry::metrics::{Metrics, SigningFailure};

/// Answers as the local backend does, until it hangs; keys of the backend `elsewhere` stay there until they are destroyed.
struct Hanging {
    name: &'static str,
    local: LocalBackend,
    hangs: AtomicBool,
    /// Calls that will never be answered.
    stuck: AtomicUsize,
    destroyed: AtomicUsize,
    news: tokio::sync::Notify,
    goes_on: tokio::sync::Notify,
}

impl Hanging {
    async fn perhaps_hang(&self) {
        if self.hangs.load(Ordering::SeqCst) {
            self.stuck.fetch_add(1, Ordering::SeqCst);
            self.news.notify_one();
            self.goes_on.notified().await;
        }
    }
}

#[async_trait]
impl Backend for Hanging {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        self.perhaps_hang().await;
        self.local.create(identity, algorithm).await
    }

    fn left_over(&self, identity: &KeyIdentity, key: &CreatedKey) -> Option<String> {
        (self.name == ELSEWHERE).then(|| format!("{} of {}", identity.serial, key.kid))
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        if self.name == MUTE {
            return Ok(Signer::Remote(Arc::new(Mute)));
        }
        self.local.open(key).await
    }

    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        self.perhaps_hang().await;
        self.destroyed.fetch_add(1, Ordering::SeqCst);
        self.local.destroy(key).await
    }
}

/// A backend whose keys stay where they were made.
const ELSEWHERE: &str = "elsewhere";

/// A backend whose signatures never come.
const MUTE: &str = "mute";

struct Mute;

#[async_trait]
impl RemoteSigner for Mute {
    async fn sign(&self, _message: &[u8]) -> Result<Vec<u8>, BackendError> {
        std::future::pending().await
    }
}

fn policy(backend: &str) -> Policy {
    let base = policy::policy("main", "https://auth.example.com");
    Policy {
        issuer: IssuerPolicy { max_age: Span::MINUTE, caches: vec![Span::MINUTE], ..base.issuer },
        backend: backend.to_owned(),
        rotation: RotationPolicy {
            propagation: Span::MINUTE.times(10),
            successors: 2,
            clock_skew: Span::MINUTE,
            ..base.rotation
        },
        tokens: TokenPolicy { max_ttl: Span::MINUTE.times(5), ..base.tokens },
        ..base
    }
}

fn declared(policy: Policy) -> Declared {
    Declared { name: Name::parse("default").unwrap(), policy: Arc::new(policy), fits: true }
}

struct Site {
    clock: Arc<ManualClock>,
    backend: Arc<Hanging>,
    engine: Arc<Engine>,
    cell: Arc<KeysetCell>,
}

impl Site {
    async fn start() -> Site {
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        Site::open(Arc::new(MemoryStore::new()), Arc::new(FileKey::ephemeral()), clock, "local").await
    }

    async fn open(
        store: Arc<dyn Store>,
        key: Arc<dyn KeyEncryptionKey>,
        clock: Arc<ManualClock>,
        name: &'static str,
    ) -> Site {
        let seal = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(key) };
        let ledger = Ledger::initialise(store, SealEvidence::Unknown, seal, clock.wall()).await.unwrap();
        let backend = Arc::new(Hanging {
            name,
            local: LocalBackend::new(ledger.keys()),
            hangs: AtomicBool::new(false),
            stuck: AtomicUsize::new(0),
            destroyed: AtomicUsize::new(0),
            news: tokio::sync::Notify::new(),
            goes_on: tokio::sync::Notify::new(),
        });
        let trusted = Arc::new(TrustedClock::new(clock.clone(), Span::MINUTE));
        let backends: [Arc<dyn Backend>; 1] = [backend.clone()];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let engine = Engine::new(trusted, Arc::new(ledger), backends, None, Arc::new(Metrics::new()), settings);
        engine.configure(&[declared(policy(name))]).await.unwrap();
        engine.resume().await;
        engine.reconcile_all().await;
        engine.opened().await;
        engine.schedule();
        let cell = engine.keyset("default").unwrap();
        Site { clock, backend, engine, cell }
    }

    fn active(&self) -> Option<Serial> {
        self.cell.snapshot.load().keyring.active().map(|key| key.serial)
    }

    fn state(&self, serial: Serial) -> Option<KeyState> {
        self.cell.snapshot.load().keyring.key(serial).map(|key| key.state)
    }

    /// Keys that ended and whose private half is not destroyed.
    fn ended_and_kept(&self) -> usize {
        let keyring = self.cell.snapshot.load().keyring.clone();
        keyring.keys.iter().filter(|key| !key.state.is_published() && key.private.is_some()).count()
    }

    async fn drain(&self) {
        let request = Request {
            intent: Intent::Drain,
            actor: "someone".to_owned(),
            reason: None,
            dry_run: false,
            if_generation: None,
            idempotency: None,
        };
        self.engine.command(&self.cell, request).await.unwrap();
    }

    /// Lets the engine's tasks run until it is so; the clock stands still meanwhile.
    async fn until(&self, what: &str, is_so: impl Fn(&Site) -> bool) {
        let waits = async {
            while !is_so(self) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(30), waits).await;
        assert!(waited.is_ok(), "waited for {what}: {:?}", self.cell.snapshot.load().keyring.keys);
    }

    /// The heartbeat's part: time passes while the daemon is alive.
    async fn pass(&self, span: Span) {
        let steps = u32::try_from(span.as_millis() / Span::SECOND.times(20).as_millis()).unwrap();
        for _ in 0..steps {
            self.clock.advance(Span::SECOND.times(20));
            self.engine.pulse().await;
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn rotations_and_removals_go_on_while_a_creation_or_destruction_hangs() {
    let site = Site::start().await;
    site.pass(Span::MINUTE.times(11)).await;
    site.until("two successors", |site| {
        site.state(2) == Some(KeyState::Standby) && site.state(3) == Some(KeyState::Standby)
    })
    .await;
    site.backend.hangs.store(true, Ordering::SeqCst);
    // The rotation asks for another successor, which never comes.
    site.pass(Span::MINUTE.times(50)).await;
    site.until("the first rotation", |site| site.active() == Some(2)).await;
    site.until("a creation that hangs", |site| site.backend.stuck.load(Ordering::SeqCst) == 1).await;
    site.pass(Span::MINUTE.times(8)).await;
    site.until("the end of the first key", |site| site.state(1) == Some(KeyState::Retired)).await;
    site.pass(Span::MINUTE.times(60)).await;
    site.until("the second rotation", |site| site.active() == Some(3)).await;
    assert_eq!(site.backend.stuck.load(Ordering::SeqCst), 1, "one slow step of a keyset at a time");
}

/// Until it was made it was wanted: nobody will ever ask for it again.
#[tokio::test]
async fn a_key_elsewhere_that_is_overtaken_while_it_is_made_is_destroyed() {
    for (name, drains, remains) in [(ELSEWHERE, false, true), (ELSEWHERE, true, true), ("local", false, false)] {
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        let site = Site::open(Arc::new(MemoryStore::new()), Arc::new(FileKey::ephemeral()), clock, name).await;
        site.pass(Span::MINUTE.times(11)).await;
        site.until("two successors", |site| site.state(3) == Some(KeyState::Standby)).await;
        site.backend.hangs.store(true, Ordering::SeqCst);
        site.pass(Span::MINUTE.times(50)).await;
        site.until("a creation that hangs", |site| site.backend.stuck.load(Ordering::SeqCst) == 1).await;
        if drains {
            site.drain().await;
        } else {
            let policy = Policy { algorithm: Algorithm::Es384, ..policy(name) };
            site.engine.configure(&[declared(policy)]).await.unwrap();
        }
        site.until("the end of the successor", |site| site.state(3) == Some(KeyState::Retired)).await;
        site.backend.hangs.store(false, Ordering::SeqCst);
        site.backend.goes_on.notify_one();
        // Of the successor, and of the key that came too late.
        site.until("their destruction", |site| site.ended_and_kept() == 0).await;
        let keyring = site.cell.snapshot.load().keyring.clone();
        let key = keyring.key(4).filter(|key| key.algorithm == Algorithm::Es256);
        let told = key.map(|key| (key.state, key.published_at, key.private.is_none()));
        assert_eq!(told, remains.then_some((KeyState::Retired, None, true)), "{name}, drained: {drains}");
        assert!(!drains || keyring.next_serial == 5, "nothing else is made");
        let (heard, _) = Heard::new(Timestamp::from_millis(0)).unheard(&keyring);
        let born = heard.iter().filter(|due| due.notice.event == Event::KeyCreated);
        let serials: Vec<_> = born.map(|due| json(&due.notice.body())["data"]["serial"].clone()).collect();
        assert!(serials.contains(&3.into()), "{serials:?}");
        assert!(!remains || !serials.contains(&4.into()), "receivers are not told that what had ended was made");
    }
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes).unwrap()
}

/// A restored copy of a store beside the original: neither may end what the other still uses.
#[tokio::test]
async fn a_copied_store_destroys_nothing_elsewhere_for_a_day() {
    let folder = tempfile::tempdir().unwrap();
    let (original, copy) = (folder.path().join("original"), folder.path().join("copy"));
    let key: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
    let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
    let store = Arc::new(FileStore::create(&original).unwrap());
    let site = Site::open(store, key.clone(), clock.clone(), ELSEWHERE).await;
    site.pass(Span::MINUTE.times(11)).await;
    site.until("a successor", |site| site.state(2) == Some(KeyState::Standby)).await;
    site.engine.stop().await;
    drop(site);
    let copied = std::process::Command::new("cp").arg("-a").arg(&original).arg(&copy).status().unwrap();
    assert!(copied.success());

    let store = Arc::new(FileStore::open(&copy).unwrap());
    let site = Site::open(store, key.clone(), clock.clone(), ELSEWHERE).await;
    site.pass(Span::MINUTE.times(70)).await;
    site.until("the end of the first key", |site| site.state(1) == Some(KeyState::Retired)).await;
    for _ in 0..22 {
        site.pass(Span::HOUR).await;
    }
    assert_eq!(site.backend.destroyed.load(Ordering::SeqCst), 0);
    let cell = site.cell.clone();
    assert!(site.engine.look(&cell).alarms.contains(&Alarm::DestructionPending));
    let moved = site.engine.installation().unwrap().journal.audit.iter().filter(|e| e.action == "store-moved").count();
    assert_eq!(moved, 1);
    site.pass(Span::HOUR.times(2)).await;
    site.until("its destruction", |site| site.backend.destroyed.load(Ordering::SeqCst) > 0).await;
    site.engine.stop().await;
    drop(site);

    // The original is where it was.
    let store = Arc::new(FileStore::open(&original).unwrap());
    let site = Site::open(store, key, clock, ELSEWHERE).await;
    site.pass(Span::HOUR.times(3)).await;
    site.until("destruction at once", |site| site.backend.destroyed.load(Ordering::SeqCst) > 0).await;
}

#[tokio::test(start_paused = true)]
async fn signatures_that_never_come_are_bounded_in_number_and_time() {
    const ASKED: usize = 1_200;
    let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
    let site = Site::open(Arc::new(MemoryStore::new()), Arc::new(FileKey::ephemeral()), clock, MUTE).await;
    let mut asked = tokio::task::JoinSet::new();
    for _ in 0..ASKED {
        let (engine, cell) = (site.engine.clone(), site.cell.clone());
        asked.spawn(async move {
            let request = parse_request(br#"{"claims":{"sub":"someone","aud":"somewhere"}}"#).unwrap();
            engine.sign(&cell, &request, None, "test").await.map(|_| ())
        });
    }
    let (mut overload, mut late) = (0, 0);
    while let Some(answer) = asked.join_next().await {
        match answer.unwrap() {
            Err(SignFailure::Ours { reason: SigningFailure::Overload, .. }) => {
                assert_eq!(late, 0, "whoever finds the queue full is told at once");
                overload += 1;
            }
            Err(SignFailure::Ours { reason: SigningFailure::BackendTimeout, .. }) => late += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((overload, late), (ASKED - 1_024, 1_024));
    assert!(site.cell.issuer.document.load().is_some(), "the keys stay published");
}
