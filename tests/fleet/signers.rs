//! Signers in the test's process: the real engine over a real upstream store each, with the tasks that the daemon gives
//! it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{Clock, SystemClock, TrustedClock};
use jwksd::config::Secret;
use jwksd::engine::{Engine, KeysetCell, ReplicaRole, Settings};
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::name::Name;
use jwksd::keyring::time::Span;
use jwksd::seal::KeyEncryptionKey;
use jwksd::store::ledger::Ledger;
use jwksd::store::memory::MemoryStore;
use jwksd::store::shared::{Heads, Replica, Report, Revision, SharedStore};
use jwksd::store::split::Split;
use jwksd::store::upstream::{Token, UpstreamSettings, UpstreamStore};
use jwksd::store::{Digest, Document, Store, StoreError};
use jwksd::telemetry::metrics::Metrics;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::KEYSET;

/// How many start at once: a fleet is rolled out, not switched on.
const START_AT_ONCE: usize = 50;

/// What all signers have in common.
pub struct Common {
    pub urls: Vec<String>,
    pub token: &'static str,
    /// Spares each client reading the system's authorities, which plain HTTP has no use for.
    pub ca_file: PathBuf,
    pub seal: Arc<dyn KeyEncryptionKey>,
    pub requests: Arc<Requests>,
}

/// Requests to managers so far.
#[derive(Default)]
pub struct Requests {
    indexes: AtomicU64,
    records: AtomicU64,
    reports: AtomicU64,
}

pub struct Fleet {
    common: Arc<Common>,
    signers: Vec<Signer>,
}

pub struct Signer {
    engine: Arc<Engine>,
    cancel: CancellationToken,
    tasks: JoinSet<()>,
}

impl Fleet {
    pub fn new(common: Common) -> Self {
        Fleet { common: Arc::new(common), signers: Vec::new() }
    }

    /// Starts signers until there are so many; every other one has a public listener.
    pub async fn grow_to(&mut self, number: usize) {
        let turns = Arc::new(Semaphore::new(START_AT_ONCE));
        let mut starting = JoinSet::new();
        for index in self.signers.len()..number {
            let (common, turns) = (self.common.clone(), turns.clone());
            starting.spawn(async move {
                let _turn = turns.acquire().await.unwrap();
                Signer::start(&common, index % 2 == 0).await
            });
        }
        self.signers.extend(starting.join_all().await);
    }

    pub fn requests(&self) -> &Arc<Requests> {
        &self.common.requests
    }

    pub fn iter(&self) -> impl Iterator<Item = &Signer> {
        self.signers.iter()
    }

    pub async fn stop(self) {
        let mut stopping = JoinSet::new();
        for signer in self.signers {
            stopping.spawn(signer.stop());
        }
        stopping.join_all().await;
    }
}

impl Signer {
    /// As the daemon starts one, but for its listeners.
    async fn start(common: &Common, publishes: bool) -> Signer {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let token = Token::Fixed(Secret::new(common.token.as_bytes()).unwrap());
        let mut settings = UpstreamSettings::new(common.urls.clone(), token);
        settings.ca_file = Some(common.ca_file.clone());
        settings.keysets = Some(vec![Name::parse(KEYSET).unwrap()]);
        let store = UpstreamStore::open(settings, clock.clone()).unwrap();
        let managers = Arc::new(Counted { store, requests: common.requests.clone() });
        let store = Arc::new(Split::new(managers, Arc::new(MemoryStore::new())));
        let ledger = Arc::new(Ledger::open(store, std::slice::from_ref(&common.seal)).await.unwrap());
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(ledger.keys()))];
        let role = ReplicaRole::Signer;
        let settings = Settings { sign_deadline: Span::SECOND, audit_signatures: false, pool_size: 1, role, publishes };
        let trusted = Arc::new(TrustedClock::new(clock, Span::from_secs(2)));
        let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
        engine.configure(&[]).await.unwrap();
        engine.resume().await;
        engine.look_at_store(Span::ZERO).await.unwrap();
        engine.reconcile_all().await;
        engine.opened().await;
        engine.schedule();
        let (cancel, mut tasks) = (CancellationToken::new(), JoinSet::new());
        tasks.spawn(engine.clone().beat(cancel.clone()));
        tasks.spawn(engine.clone().follow(cancel.clone()));
        tasks.spawn(engine.clone().attend(cancel.clone()));
        Signer { engine, cancel, tasks }
    }

    pub fn generation(&self) -> u64 {
        self.cell().snapshot.load().keyring.generation
    }

    pub fn is_frozen(&self) -> bool {
        self.cell().snapshot.load().frozen.is_some()
    }

    /// The key that its next token has.
    pub async fn signs_with(&self) -> String {
        let request = parse_request(br#"{"claims":{"sub":"someone","aud":"somewhere"}}"#).unwrap();
        let issued = self.engine.sign(&self.cell(), &request, None, "test").await;
        issued.unwrap_or_else(|error| panic!("{}: {error}", self.engine.replica())).kid.to_string()
    }

    fn cell(&self) -> Arc<KeysetCell> {
        self.engine.keyset(KEYSET).unwrap()
    }

    /// As at SIGTERM.
    async fn stop(mut self) {
        self.cancel.cancel();
        while self.tasks.join_next().await.is_some() {}
        self.engine.stop().await;
        self.engine.take_leave().await;
    }
}

impl Requests {
    pub fn total(&self) -> u64 {
        [&self.indexes, &self.records, &self.reports].iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl std::fmt::Display for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [indexes, records, reports] =
            [&self.indexes, &self.records, &self.reports].map(|count| count.load(Ordering::Relaxed));
        write!(f, "{indexes} for the index, {records} for records, {reports} reports")
    }
}

/// Counts what is asked of managers.
struct Counted {
    store: UpstreamStore,
    requests: Arc<Requests>,
}

#[async_trait]
impl Store for Counted {
    fn kind(&self) -> &'static str {
        self.store.kind()
    }

    fn locate(&self, document: &Document) -> String {
        self.store.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.requests.records.fetch_add(1, Ordering::Relaxed);
        self.store.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.replace(document, expected, bytes).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.store.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.requests.indexes.fetch_add(1, Ordering::Relaxed);
        self.store.keysets().await
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for Counted {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        self.requests.indexes.fetch_add(1, Ordering::Relaxed);
        self.store.heads(known, wait).await
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.requests.reports.fetch_add(1, Ordering::Relaxed);
        self.store.report(replicas).await
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.store.replicas(longest).await
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.requests.reports.fetch_add(1, Ordering::Relaxed);
        self.store.forget(replicas).await
    }
}
