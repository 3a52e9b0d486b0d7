//! The daemon without its listeners: the real engine over a store that outlives it.

use std::sync::Arc;

use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::whole::WholeRequest;
use jwksd::engine::{CommandError, Declared, Engine, Issued, KeysetCell, ReplicaRole, Rest, Settings};
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::decide::{Intent, Outcome, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::{IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::telemetry::metrics::Metrics;

use crate::policy::policy;
use crate::store::FaultyStore;
use crate::verifier::Served;

/// σ of every policy here.
pub const SKEW: Span = Span::from_secs(2);
/// The slowest declared verifier of every policy here.
pub const SLOWEST: Span = Span::from_secs(8);
/// The longest that any policy here gives everyone to see a new key.
pub const LONGEST_WINDOW: Span = Span::from_secs(40);
pub const KINDS: u64 = 4;

const HEARTBEAT: Span = Span::from_secs(2);

/// Policies that keep the rules, each with a propagation as short as they allow.
pub fn policy_of(kind: u64) -> Policy {
    let (max_age, stale, every, max_ttl, successors) = match kind % KINDS {
        0 => (10, 0, 45, 15, 2),
        1 => (10, 5, 60, 30, 2),
        2 => (4, 0, 30, 5, 1),
        _ => (30, 0, 70, 20, 2),
    };
    let secs = Span::from_secs;
    let base = policy("main", "https://auth.example.com");
    Policy {
        issuer: IssuerPolicy {
            max_age: secs(max_age),
            stale_if_error: secs(stale),
            caches: vec![secs(max_age)],
            ..base.issuer
        },
        rotation: RotationPolicy {
            schedule: Schedule::Every(secs(every)),
            propagation: secs(max_age + stale) + SLOWEST + SKEW,
            successors,
            verifiers: vec![Verifier { name: "slow".to_owned(), sees_new: SLOWEST, keeps_old: Some(SLOWEST) }],
            clock_skew: SKEW,
            ..base.rotation
        },
        tokens: TokenPolicy { max_ttl: secs(max_ttl), default_ttl: secs(max_ttl), ..base.tokens },
        ..base
    }
}

pub struct Daemon {
    pub store: Arc<FaultyStore>,
    pub clock: Arc<ManualClock>,
    seal: Arc<dyn KeyEncryptionKey>,
    pub declared: Vec<Declared>,
    process: Option<Process>,
    /// Why the last start was refused, with a store that works.
    pub refusal: Option<String>,
}

struct Process {
    engine: Arc<Engine>,
    /// Boot time at which it wants to be reconciled.
    look_at: Option<Span>,
    beat_at: Span,
    frozen: bool,
}

impl Daemon {
    pub fn new(clock: Arc<ManualClock>, policy: Policy) -> Daemon {
        let declared = vec![declare(policy)];
        let seal = Arc::new(FileKey::ephemeral());
        Daemon { store: FaultyStore::new(), clock, seal, declared, process: None, refusal: None }
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// The process is gone, whatever it was doing.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// As the composition root does it, up to open listeners.
    pub async fn start(&mut self) -> bool {
        self.store.revive();
        let booted = self.boot().await;
        if self.store.is_dead() {
            return false;
        }
        match booted {
            Ok(engine) => {
                let frozen = engine.clock.read().frozen;
                self.process = Some(Process { engine, look_at: None, beat_at: Span::ZERO, frozen });
                self.reconcile().await;
                self.tick().await;
                self.runs()
            }
            Err(error) => {
                if !self.store_is_out() {
                    self.refusal = Some(error);
                }
                false
            }
        }
    }

    async fn boot(&self) -> Result<Arc<Engine>, String> {
        let clock = Arc::new(TrustedClock::new(self.clock.clone(), SKEW));
        let seal = self.seal.clone();
        let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal) };
        let ledger = Ledger::initialise(self.store.clone(), SealEvidence::Unknown, make, clock.now()).await;
        let ledger = Arc::new(ledger.map_err(|error| error.to_string())?);
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(ledger.keys()))];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let engine = Engine::new(clock, ledger, backends, None, Arc::new(Metrics::new()), settings);
        engine.configure(&self.declared).await.map_err(|errors| format!("{errors:?}"))?;
        engine.resume().await;
        engine.reconcile_all().await;
        engine.confirm_created().await.map_err(|error| error.to_string())?;
        engine.opened().await;
        Ok(engine)
    }

    fn store_is_out(&self) -> bool {
        self.store.is_dead() || self.store.is_out()
    }

    fn engine(&self) -> Option<&Arc<Engine>> {
        self.process.as_ref().map(|process| &process.engine)
    }

    fn cell(&self) -> Option<Arc<KeysetCell>> {
        self.engine().and_then(|engine| engine.keyset("default"))
    }

    /// One pass of the keyset's task.
    pub async fn reconcile(&mut self) {
        let (Some(engine), Some(cell)) = (self.engine().cloned(), self.cell()) else { return };
        let rest = engine.reconcile(&cell).await;
        let boot = engine.clock.boot();
        let look_at = match rest {
            Rest::Until(wake) => wake.map(|wake| boot + wake.since(engine.clock.now())),
            Rest::Retry(span) => Some(boot + span),
            Rest::Frozen => None,
        };
        if let Some(process) = &mut self.process {
            process.look_at = look_at;
        }
        self.bury();
    }

    /// What the daemon's own tasks do at this instant.
    pub async fn tick(&mut self) {
        let boot = jwksd::clock::Clock::boot(&*self.clock);
        let Some(process) = &mut self.process else { return };
        let (engine, beats) = (process.engine.clone(), process.beat_at <= boot);
        if beats {
            process.beat_at = boot + HEARTBEAT;
            let frozen = engine.clock.read().frozen;
            if frozen != process.frozen {
                process.frozen = frozen;
                process.look_at = Some(boot);
            }
            engine.pulse().await;
            self.bury();
        }
        if self.process.as_ref().is_some_and(|process| process.look_at.is_some_and(|at| at <= boot)) {
            self.reconcile().await;
        }
    }

    /// How long until one of its tasks wants to run.
    pub fn rests_for(&self) -> Option<Span> {
        let boot = jwksd::clock::Clock::boot(&*self.clock);
        let process = self.process.as_ref()?;
        let next = process.look_at.map_or(process.beat_at, |at| at.min(process.beat_at));
        Some(next.saturating_sub(boot))
    }

    pub async fn command(&mut self, intent: Intent) -> Result<Outcome, String> {
        let (Some(engine), Some(cell)) = (self.engine().cloned(), self.cell()) else { return Err("down".to_owned()) };
        let reason = Some("simulation".to_owned());
        let request =
            Request { intent, actor: "sim".to_owned(), reason, dry_run: false, if_generation: None, idempotency: None };
        let answer = engine.command(&cell, request).await;
        self.reconcile().await;
        answer.map_err(|error| match error {
            CommandError::Refused(refusal) => format!("refused: {refusal}"),
            other => other.to_string(),
        })
    }

    /// Another configuration; a process that runs takes it at once.
    pub async fn configure(&mut self, declared: Vec<Declared>) {
        if let Some(engine) = self.engine().cloned() {
            let taken = engine.configure(&declared).await;
            if taken.is_err() {
                assert!(self.store_is_out(), "the configuration is not taken: {taken:?}");
                self.bury();
                return;
            }
        }
        self.declared = declared;
        self.reconcile().await;
    }

    pub async fn accept_clock(&mut self) {
        let engine = self.engine().unwrap().clone();
        engine.clock.read();
        let (actor, reason, idempotency) = ("sim".to_owned(), None, None);
        let request = WholeRequest { actor, reason, dry_run: false, if_generation: None, idempotency };
        engine.accept_clock(&request).await.unwrap();
    }

    /// The token and the lives it says of itself are the application's business.
    pub async fn sign(&self) -> Option<Issued> {
        let (engine, cell) = (self.engine()?, self.cell()?);
        let request = parse_request(br#"{"claims":{"sub":"someone","aud":"somewhere"}}"#).unwrap();
        engine.sign(&cell, &request, None, "sim").await.ok()
    }

    /// What a verifier that asks now gets.
    pub fn served(&self) -> Option<Served> {
        let engine = self.engine().filter(|engine| engine.is_open())?;
        let document = engine.directory().issuers.first()?.document.load_full()?;
        let header = document.cache_control.to_str().unwrap();
        let seconds = |name: &str| {
            let found = header.split(", ").find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            Span::from_secs(found.map_or(0, |seconds| seconds.parse().unwrap()))
        };
        let (max_age, stale_if_error) = (seconds("max-age"), seconds("stale-if-error"));
        Some(Served { body: document.body.to_vec(), max_age, stale_if_error })
    }

    /// Kids that an operator could name, the active one first where there is one.
    pub fn keys(&self) -> Vec<(u64, String)> {
        let Some(cell) = self.cell() else { return Vec::new() };
        let keyring = cell.snapshot.load_full().keyring.clone();
        keyring.published().map(|key| (key.serial, key.kid.to_string())).collect()
    }

    pub fn active_serial(&self) -> Option<u64> {
        Some(self.cell()?.snapshot.load_full().keyring.active()?.serial)
    }

    pub fn active_kid(&self) -> Option<String> {
        Some(self.cell()?.snapshot.load_full().keyring.active()?.kid.to_string())
    }

    /// It runs, and neither froze nor stopped signing.
    pub fn is_working(&self) -> bool {
        self.cell().is_some_and(|cell| {
            let snapshot = cell.snapshot.load_full();
            snapshot.frozen.is_none() && snapshot.active.is_some()
        })
    }

    pub fn frozen_because(&self) -> Option<String> {
        self.cell()?.snapshot.load_full().frozen.as_deref().map(str::to_owned)
    }

    fn bury(&mut self) {
        if self.store.is_dead() {
            self.process = None;
        }
    }
}

pub fn declare(policy: Policy) -> Declared {
    Declared { name: Name::parse("default").unwrap(), policy: Arc::new(policy), fits: true }
}

pub const START: Timestamp = Timestamp::from_secs(1_800_000_000);
