//! One replica without listeners or tasks of its own: what those would do happens when the test says so.

use std::sync::Arc;

use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{Clock, ManualClock, TrustedClock};
use jwksd::engine::{CommandError, Declared, Engine, Issued, KeysetCell, ReplicaRole, Settings, SignFailure};
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::decide::{Intent, Outcome, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::{IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::record::KeyState;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Span;
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::Store;
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::store::shared::SharedStore;
use jwksd::store::split::Split;
use jwksd::telemetry::metrics::Metrics;

use super::held::{Gate, Held};
use super::hub::{Hub, Link};
use crate::policy::policy as hourly;

pub const SKEW: Span = Span::from_secs(2);
pub const STALENESS: Span = Span::from_secs(20);
pub const LAG: Span = Span::from_secs(5);

pub struct Replica {
    pub engine: Arc<Engine>,
    pub link: Arc<Link>,
    pub clock: Arc<ManualClock>,
}

/// What replicas of one installation have in common.
#[derive(Clone)]
pub struct Common {
    pub hub: Arc<Hub>,
    pub seal: Arc<dyn KeyEncryptionKey>,
    /// Keys are elsewhere, and made when this lets them.
    pub gate: Option<Arc<Gate>>,
}

impl Common {
    pub fn new(clock: Arc<ManualClock>) -> Self {
        Common { hub: Hub::new(clock), seal: Arc::new(FileKey::ephemeral()), gate: None }
    }

    /// A replica as after its start, with open listeners.
    pub async fn start(&self, role: ReplicaRole, clock: &Arc<ManualClock>, policies: &[(&str, Policy)]) -> Replica {
        let link = self.hub.link();
        self.start_over(role, clock, policies, link, Arc::new(MemoryStore::new())).await
    }

    pub async fn start_over(
        &self,
        role: ReplicaRole,
        clock: &Arc<ManualClock>,
        policies: &[(&str, Policy)],
        link: Arc<Link>,
        own: Arc<MemoryStore>,
    ) -> Replica {
        let declared = declare_all(policies);
        let engine = self.boot(role, clock, &declared, link.clone(), own).await.unwrap();
        Replica { engine, link, clock: clock.clone() }
    }

    /// An engine over `shared` and `own`, up to open listeners; or why it does not start.
    pub async fn boot(
        &self,
        role: ReplicaRole,
        clock: &Arc<ManualClock>,
        declared: &[Declared],
        shared: Arc<dyn SharedStore>,
        own: Arc<dyn Store>,
    ) -> Result<Arc<Engine>, String> {
        let ledger = self.open_over(role, clock, shared, own).await?;
        self.run(ledger, role, clock, declared).await
    }

    /// The first thing that a start does.
    pub async fn open(
        &self,
        role: ReplicaRole,
        clock: &Arc<ManualClock>,
        link: &Arc<Link>,
        own: Arc<MemoryStore>,
    ) -> Arc<Ledger> {
        self.open_over(role, clock, link.clone(), own).await.unwrap()
    }

    /// The rest of it.
    pub async fn start_with(
        &self,
        ledger: Arc<Ledger>,
        role: ReplicaRole,
        clock: &Arc<ManualClock>,
        policies: &[(&str, Policy)],
        link: Arc<Link>,
    ) -> Replica {
        let engine = self.run(ledger, role, clock, &declare_all(policies)).await.unwrap();
        Replica { engine, link, clock: clock.clone() }
    }

    async fn open_over(
        &self,
        role: ReplicaRole,
        clock: &Arc<ManualClock>,
        shared: Arc<dyn SharedStore>,
        own: Arc<dyn Store>,
    ) -> Result<Arc<Ledger>, String> {
        let store = Arc::new(Split::new(shared, own));
        // As the composition root asks first.
        Ledger::inspect(store.as_ref(), SealEvidence::Unknown).await.map_err(|error| error.to_string())?;
        let ledger = match role {
            ReplicaRole::Signer => Ledger::open(store, std::slice::from_ref(&self.seal)).await,
            _ => {
                let seal = self.seal.clone();
                let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal) };
                Ledger::initialise(store, SealEvidence::Unknown, make, clock.wall()).await
            }
        };
        ledger.map(Arc::new).map_err(|error| error.to_string())
    }

    async fn run(
        &self,
        ledger: Arc<Ledger>,
        role: ReplicaRole,
        clock: &Arc<ManualClock>,
        declared: &[Declared],
    ) -> Result<Arc<Engine>, String> {
        let trusted = Arc::new(TrustedClock::new(clock.clone(), SKEW));
        let keys = LocalBackend::new(ledger.keys());
        let backends: [Arc<dyn Backend>; 1] = match self.gate.clone() {
            Some(gate) => [Arc::new(Held { keys, gate })],
            None => [Arc::new(keys)],
        };
        let settings =
            Settings { sign_deadline: Span::SECOND, audit_signatures: false, pool_size: 1, role, publishes: true };
        let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
        let declared = if role == ReplicaRole::Signer { &[] } else { declared };
        engine.configure(declared).await.map_err(|errors| format!("{errors:?}"))?;
        engine.resume().await;
        let _ = engine.look_at_store(Span::ZERO).await;
        let _ = engine.attend_once().await;
        engine.reconcile_all().await;
        engine.give_up_first_keys().await;
        engine.confirm_created().await.map_err(|error| error.to_string())?;
        engine.opened().await;
        Ok(engine)
    }
}

fn declare_all(policies: &[(&str, Policy)]) -> Vec<Declared> {
    policies.iter().map(|(keyset, policy)| declare(keyset, policy.clone())).collect()
}

pub fn declare(keyset: &str, policy: Policy) -> Declared {
    Declared { name: Name::parse(keyset).unwrap(), policy: Arc::new(policy), fits: true }
}

/// Rotates every minute; a window of 15 s: caches 4, slowest verifier 4, lag 5, σ 2.
pub fn policy() -> Policy {
    let secs = Span::from_secs;
    let base = hourly("main", "https://auth.example.com");
    Policy {
        issuer: IssuerPolicy { max_age: secs(4), caches: vec![secs(4)], ..base.issuer },
        rotation: RotationPolicy {
            schedule: Schedule::Every(secs(60)),
            propagation: secs(15),
            successors: 2,
            verifiers: vec![Verifier { name: "slow".to_owned(), sees_new: secs(4), keeps_old: Some(secs(4)) }],
            clock_skew: SKEW,
            staleness_limit: STALENESS,
            publish_lag: LAG,
            ..base.rotation
        },
        tokens: TokenPolicy { max_ttl: secs(10), default_ttl: secs(10), ..base.tokens },
        ..base
    }
}

impl Replica {
    /// What its tasks do within a moment.
    pub async fn tick(&self) {
        let _ = self.engine.look_at_store(Span::ZERO).await;
        let _ = self.engine.attend_once().await;
        self.engine.reconcile_all().await;
        self.engine.pulse().await;
    }

    pub fn cell(&self) -> Arc<KeysetCell> {
        self.cell_of("default")
    }

    pub fn cell_of(&self, keyset: &str) -> Arc<KeysetCell> {
        self.engine.keyset(keyset).unwrap()
    }

    pub fn generation(&self) -> u64 {
        self.cell().snapshot.load().keyring.generation
    }

    pub fn active(&self) -> Option<u64> {
        self.cell().snapshot.load().keyring.active().map(|key| key.serial)
    }

    pub fn serials(&self, state: KeyState) -> Vec<u64> {
        let keyring = self.cell().snapshot.load().keyring.clone();
        keyring.keys.iter().filter(|key| key.state == state).map(|key| key.serial).collect()
    }

    pub fn frozen(&self) -> Option<String> {
        self.cell().snapshot.load().frozen.as_deref().map(str::to_owned)
    }

    /// The kids that verifiers get, of all keysets.
    pub fn served(&self) -> Option<Vec<String>> {
        let document = self.engine.directory().issuers.first()?.served()?;
        let document: serde_json::Value = serde_json::from_slice(&document.body).unwrap();
        let kids = document["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned());
        Some(kids.collect())
    }

    pub async fn sign(&self) -> Result<Issued, SignFailure> {
        self.sign_with("default").await
    }

    pub async fn sign_with(&self, keyset: &str) -> Result<Issued, SignFailure> {
        let request = parse_request(br#"{"claims":{"sub":"someone","aud":"somewhere"}}"#).unwrap();
        self.engine.sign(&self.cell_of(keyset), &request, None, "test").await
    }

    pub async fn command(&self, intent: Intent) -> Result<Outcome, CommandError> {
        self.engine.command(&self.cell(), self.request(intent)).await
    }

    pub fn request(&self, intent: Intent) -> Request {
        let (actor, reason) = ("test".to_owned(), Some("test".to_owned()));
        Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None }
    }

    pub fn alarms(&self) -> Vec<&'static str> {
        self.engine.look(&self.cell()).alarms.iter().map(|alarm| alarm.as_str()).collect()
    }
}
