//! What a start costs grows with the number of keysets and no faster, counted in what is asked of the store.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "support/policy.rs"]
mod policy;
#[path = "support/starting.rs"]
mod starting;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, CreatedKey, KeyIdentity, Signer, StoredKey};
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings};
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::KeyEncryptionKey;
use jwksd::seal::file::FileKey;
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::store::{Digest, Document, Store, StoreError};
use jwksd::telemetry::metrics::Metrics;
use tokio::sync::Semaphore;

const START: Timestamp = Timestamp::from_secs(1_800_000_000);

/// Each issuer has two keysets.
const PER_ISSUER: usize = 2;

/// A store that counts what is asked of it.
#[derive(Default)]
struct Counting {
    store: MemoryStore,
    reads: AtomicUsize,
    writes: AtomicUsize,
    lists: AtomicUsize,
}

#[async_trait]
impl Store for Counting {
    fn kind(&self) -> &'static str {
        self.store.kind()
    }

    fn locate(&self, document: &Document) -> String {
        self.store.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.store.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.store.replace(document, expected, bytes).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.store.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.lists.fetch_add(1, Ordering::Relaxed);
        self.store.keysets().await
    }
}

/// What was asked of the store, since the last time.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    reads: usize,
    writes: usize,
    lists: usize,
}

impl Counting {
    fn take(&self) -> Counts {
        let take = |count: &AtomicUsize| count.swap(0, Ordering::Relaxed);
        Counts { reads: take(&self.reads), writes: take(&self.writes), lists: take(&self.lists) }
    }
}

/// What the first start of so many keysets asks of the store, the next one, and a heartbeat.
async fn costs(keysets: usize) -> [Counts; 3] {
    let store = Arc::new(Counting::default());
    let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
    let declared: Vec<Declared> = (0..keysets).map(declare).collect();
    let first = start(&store, &seal, &declared).await;
    let created = store.take();
    drop(first);
    let second = start(&store, &seal, &declared).await;
    let started = store.take();
    second.pulse().await;
    let beaten = store.take();
    for issuer in &second.directory().issuers {
        let directory = second.directory();
        let keysets: Vec<&Name> = directory.keysets_of(issuer).map(|cell| &cell.name).collect();
        assert_eq!(keysets.len(), PER_ISSUER, "{keysets:?} of {}", issuer.url);
        assert_eq!(issuer.served().unwrap().keys, 4, "{}", issuer.url);
    }
    [created, started, beaten]
}

async fn start(store: &Arc<Counting>, seal: &Arc<dyn KeyEncryptionKey>, declared: &[Declared]) -> Arc<Engine> {
    let engine = engine(store, seal, |keys| Arc::new(keys)).await;
    starting::start(&engine, declared).await;
    engine
}

async fn engine(
    store: &Arc<Counting>,
    seal: &Arc<dyn KeyEncryptionKey>,
    backend: impl FnOnce(LocalBackend) -> Arc<dyn Backend>,
) -> Arc<Engine> {
    let clock = Arc::new(TrustedClock::new(ManualClock::at(START), Span::SECOND));
    let seal = seal.clone();
    let ledger = Ledger::initialise(store.clone(), SealEvidence::Unknown, async || Ok(seal), START).await.unwrap();
    let backends = [backend(LocalBackend::new(ledger.keys()))];
    let settings = Settings {
        sign_deadline: Span::SECOND,
        audit_signatures: false,
        pool_size: 1,
        role: ReplicaRole::All,
        publishes: true,
    };
    Engine::new(clock, Arc::new(ledger), backends, None, Arc::new(Metrics::new()), settings)
}

fn declare(number: usize) -> Declared {
    let issuer = format!("issuer-{}", number / PER_ISSUER);
    let policy = policy::policy(&issuer, &format!("https://issuer.example/{issuer}"));
    Declared { name: Name::parse(&format!("keyset-{number}")).unwrap(), policy: Arc::new(policy), fits: true }
}

#[tokio::test]
async fn what_is_asked_of_the_store_grows_with_the_keysets_and_no_faster() {
    let [few, more, many] = [costs(20).await, costs(40).await, costs(80).await];
    for (stage, ((few, more), many)) in few.iter().zip(&more).zip(&many).enumerate() {
        // The same for each keyset that comes on top.
        let growth = |count: fn(&Counts) -> usize| (count(more) - count(few), count(many) - count(more));
        for (what, (twenty, forty)) in
            [("reads", growth(|count| count.reads)), ("writes", growth(|count| count.writes))]
        {
            assert_eq!(2 * twenty, forty, "{what} of stage {stage}: {few:?}, {more:?}, {many:?}");
        }
        assert_eq!(few.lists, many.lists, "stage {stage}: the folder is listed per keyset");
    }
    let [_, started, beaten] = &many;
    assert!(started.reads <= 80 * 2 + 10, "a keyring and its mark are read once each: {started:?}");
    assert!(started.writes <= 10, "a start without news writes nothing for a keyset: {started:?}");
    assert!(beaten.reads + beaten.writes <= 4, "a heartbeat costs one record, however many keysets: {beaten:?}");
}

/// A backend that makes keys at once and opens them when it is let.
struct Gated {
    keys: LocalBackend,
    made: Arc<Semaphore>,
    gate: Arc<Semaphore>,
    opening: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

#[async_trait]
impl Backend for Gated {
    fn name(&self) -> &'static str {
        self.keys.name()
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        let created = self.keys.create(identity, algorithm).await;
        self.made.add_permits(1);
        created
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        self.most.fetch_max(self.opening.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let _let = self.gate.acquire().await.unwrap();
        let opened = self.keys.open(key).await;
        self.opening.fetch_sub(1, Ordering::SeqCst);
        opened
    }

    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        self.keys.destroy(key).await
    }
}

#[tokio::test]
async fn keys_are_opened_some_at_a_time_however_many_keysets_want_one() {
    const KEYSETS: usize = 80;
    let [made, gate] = [(); 2].map(|()| Arc::new(Semaphore::new(0)));
    let [opening, most] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let (store, seal) = (Arc::new(Counting::default()), Arc::new(FileKey::ephemeral()) as Arc<dyn KeyEncryptionKey>);
    let (counted, gated, under_way, maximum) = (made.clone(), gate.clone(), opening.clone(), most.clone());
    let gated = |keys| Arc::new(Gated { keys, made: counted, gate: gated, opening: under_way, most: maximum }) as _;
    let engine = engine(&store, &seal, gated).await;
    engine.configure(&(0..KEYSETS).map(declare).collect::<Vec<_>>()).await.unwrap();
    engine.resume().await;
    let passes = tokio::spawn({
        let engine = engine.clone();
        async move { engine.reconcile_all().await }
    });
    // Each keyset has its first key, and wants to open it; nothing but that is left to do.
    let _made = made.acquire_many(KEYSETS as u32).await.unwrap();
    for _ in 0..1_000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(opening.load(Ordering::SeqCst), 32);
    gate.add_permits(KEYSETS * 10);
    passes.await.unwrap();
    assert_eq!((most.load(Ordering::SeqCst), opening.load(Ordering::SeqCst)), (32, 0));
    for cell in &engine.directory().order {
        assert!(cell.snapshot.load().active.is_some(), "{} signs", cell.name);
    }
}
