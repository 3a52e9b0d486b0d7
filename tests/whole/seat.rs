//! Where one replica runs: its machine's clock, what it remembers, its way to the store, and its process while there is one.
//! The process runs the daemon's own tasks: one per keyset, the heartbeat, and those that follow a shared store.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use jwksd::app::leftovers::clean_up;
use jwksd::backend::Backend;
use jwksd::backend::aws_kms::AwsKmsBackend;
use jwksd::clock::{Clock, TrustedClock};
use jwksd::engine::{Declared, Engine, JwksDocument, KeysetCell, ReplicaRole, Settings};
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::Policy;
use jwksd::keyring::time::Span;
use jwksd::random::Entropy;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::Store;
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::split::Split;
use jwksd::telemetry::metrics::Metrics;
use tokio_util::sync::CancellationToken;

use crate::account::CLEANUP_AFTER;
use crate::audience::Served;
use crate::kms::{Client, Kms};
use crate::life::{Doom, Life, Machine, StoreClock, Truth};
use crate::probes::{Locations, Looker};
use crate::random::Random;
use crate::shelf::{Port, Shelf, Way};

/// What all replicas have in common.
#[derive(Clone)]
pub struct Common {
    pub truth: Truth,
    pub doom: Arc<Doom>,
    pub hub: Arc<Shelf>,
    pub kms: Arc<Kms>,
    pub seal: Arc<dyn KeyEncryptionKey>,
    pub locations: Arc<Locations>,
    pub is_single: bool,
    pub skew: Span,
}

pub struct Seat {
    pub name: String,
    pub role: ReplicaRole,
    /// How far the machine's clock is ahead, in milliseconds.
    pub ahead: Arc<AtomicI64>,
    pub stopped_until: Arc<AtomicI64>,
    pub way: Arc<Way>,
    pub declared: Vec<Declared>,
    pub process: Option<Process>,
    /// Requests for signatures that were not answered yet.
    pub under_way: Arc<AtomicU64>,
    /// Processes that there were.
    starts: u64,
    own: Arc<Shelf>,
    random: Random,
    /// What was served last, as bytes and as read.
    served: Option<(Arc<JwksDocument>, Arc<Served>)>,
}

pub struct Process {
    pub life: Arc<Life>,
    engine: Arc<OnceLock<Result<Arc<Engine>, String>>>,
}

/// Randomness that a seed repeats.
struct Seeded(Mutex<Random>);

impl Entropy for Seeded {
    fn fill(&self, bytes: &mut [u8]) {
        let mut random = self.0.lock().unwrap();
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&random.next().to_be_bytes()[..chunk.len()]);
        }
    }
}

impl Seat {
    pub fn new(number: usize, role: ReplicaRole, ahead: i64, common: &Common, mut random: Random) -> Seat {
        let own = Shelf::new(StoreClock { truth: common.truth, ahead: AtomicI64::new(0) });
        Seat {
            name: format!("{}-{number}", role.as_str()),
            role,
            ahead: Arc::new(AtomicI64::new(ahead)),
            stopped_until: Arc::default(),
            way: Way::new(number, random.fork()),
            declared: Vec::new(),
            process: None,
            under_way: Arc::default(),
            starts: 0,
            own,
            random,
            served: None,
        }
    }

    pub fn writes(&self) -> bool {
        self.role != ReplicaRole::Signer
    }

    pub fn signs(&self) -> bool {
        self.role != ReplicaRole::Manager
    }

    pub fn is_stopped(&self, now: i64) -> bool {
        self.stopped_until.load(Relaxed) > now
    }

    /// A process begins.
    pub fn start(&mut self, common: &Common) {
        let life = Life::begin(common.doom.clone(), common.truth, self.stopped_until.clone());
        let engine = Arc::new(OnceLock::new());
        let boot = Boot {
            common: common.clone(),
            role: self.role,
            machine: Machine::new(common.truth, self.ahead.clone(), life.clone()),
            declared: self.declared.clone(),
            way: self.way.clone(),
            own: self.own.clone(),
            entropy: Arc::new(Seeded(Mutex::new(self.random.fork()))),
            life: life.clone(),
            process: self.starts + 1,
        };
        let slot = engine.clone();
        tokio::spawn(async move {
            let booted = boot.run().await;
            let _ = slot.set(booted);
        });
        self.starts += 1;
        self.under_way = Arc::default();
        self.process = Some(Process { life, engine });
    }

    /// The process is gone, whatever it was doing.
    pub fn fall(&mut self) {
        if let Some(process) = self.process.take() {
            process.life.die();
        }
        self.served = None;
        // Nobody is left who stands still.
        self.stopped_until.store(0, Relaxed);
    }

    /// Which process there is, or was last.
    pub fn number(&self) -> u64 {
        self.starts
    }

    pub fn lose_memory(&mut self) {
        self.own.forget_everything();
    }

    /// The store as an operator on this machine has it, while no process runs.
    pub fn store_of_an_operator(&self, common: &Common) -> Arc<dyn Store> {
        let life = Life::begin(Doom::at(0), common.truth, Arc::default());
        Port::new(common.hub.clone(), Way::new(self.way.who, Random::new(0)), life, false)
    }

    pub fn engine(&self) -> Option<&Arc<Engine>> {
        let process = self.process.as_ref().filter(|process| !process.life.is_dead())?;
        process.engine.get()?.as_ref().ok().filter(|engine| engine.is_open())
    }

    /// Why the last start failed.
    pub fn refusal(&self) -> Option<&str> {
        self.process.as_ref()?.engine.get()?.as_ref().err().map(String::as_str)
    }

    pub fn cell(&self, keyset: &str) -> Option<Arc<KeysetCell>> {
        self.engine()?.keyset(keyset)
    }

    /// What a balancer gets from here, if it asks here at all.
    pub fn serve(&mut self, now: i64) -> Result<Option<Arc<Served>>, String> {
        if self.is_stopped(now) {
            return Ok(None);
        }
        let Some(engine) = self.engine().filter(|engine| engine.missing_to_publish().is_empty()) else {
            return Ok(None);
        };
        let Some(document) = engine.directory().issuers.first().and_then(|issuer| issuer.served()) else {
            return Ok(None);
        };
        if let Some((bytes, served)) = &self.served
            && Arc::ptr_eq(bytes, &document)
        {
            return Ok(Some(served.clone()));
        }
        let served = Arc::new(Served::parse(document.body.clone(), document.cache_control.to_str().unwrap())?);
        self.served = Some((document, served.clone()));
        Ok(Some(served))
    }
}

pub fn declare(keyset: &str, policy: &Policy) -> Declared {
    Declared { name: Name::parse(keyset).unwrap(), policy: Arc::new(policy.clone()), fits: true }
}

/// Listeners open no later than this, whatever a backend does (DESIGN §5).
const OPEN_WITHIN: Duration = Duration::from_secs(2);

const DELETION_WINDOW_DAYS: u8 = 7;

/// What a start does, as the composition root does it.
struct Boot {
    common: Common,
    role: ReplicaRole,
    machine: Arc<Machine>,
    declared: Vec<Declared>,
    way: Arc<Way>,
    own: Arc<Shelf>,
    entropy: Arc<dyn Entropy>,
    life: Arc<Life>,
    /// Which process this is on its seat.
    process: u64,
}

impl Boot {
    async fn run(self) -> Result<Arc<Engine>, String> {
        let ledger = Arc::new(self.open().await?);
        let clock = Arc::new(TrustedClock::new(self.machine.clone(), self.common.skew));
        let client = Client::new(self.common.kms.clone(), self.life.clone(), self.common.truth, self.common.is_single);
        let account = self.account(client.clone(), &ledger);
        let importer = client.clone();
        let backend = account.clone().map_or(client as Arc<dyn Backend>, |account| account);
        let settings = Settings {
            sign_deadline: Span::from_secs(2),
            audit_signatures: false,
            pool_size: 1,
            role: self.role,
            publishes: true,
        };
        let metrics = Arc::new(Metrics::new());
        let engine =
            Engine::with_entropy(clock, ledger, [backend], Some(importer), metrics, settings, self.entropy.clone());
        let declared = if self.role == ReplicaRole::Signer { &[][..] } else { &self.declared };
        engine.configure(declared).await.map_err(|errors| format!("{errors:?}"))?;
        let mut begin = tokio::spawn(begin(engine.clone()));
        if let Ok(begun) = tokio::time::timeout(OPEN_WITHIN, &mut begin).await {
            begun.map_err(|error| error.to_string())??;
        }
        engine.opened().await;
        engine.schedule();
        let cancel = CancellationToken::new();
        tokio::spawn(engine.clone().beat(cancel.clone()));
        if self.common.locations.are_any() {
            tokio::spawn(engine.clone().watch_probes(Arc::new(self.looker()), cancel.clone()));
        }
        if let Some(account) = account {
            tokio::spawn(clean_up(engine.clone(), account, cancel.clone()));
        }
        if engine.is_shared() {
            tokio::spawn(engine.clone().follow(cancel.clone()));
            tokio::spawn(engine.clone().attend(cancel));
        }
        Ok(engine)
    }

    /// The backend that keeps keys in AWS KMS, where that is where they are.
    fn account(&self, client: Arc<Client>, ledger: &Ledger) -> Option<Arc<AwsKmsBackend>> {
        let clock = self.machine.clone();
        let make = || AwsKmsBackend::new(client, ledger.keys(), clock, DELETION_WINDOW_DAYS, CLEANUP_AFTER);
        self.common.kms.is_account.then(|| Arc::new(make()))
    }

    fn looker(&self) -> Looker {
        let Common { locations, truth, .. } = self.common.clone();
        Looker { locations, truth, life: self.life.clone(), seat: self.way.who, process: self.process }
    }

    async fn open(&self) -> Result<Ledger, String> {
        let port = |shelf: &Arc<Shelf>, way: &Arc<Way>, shared| {
            Port::new(shelf.clone(), way.clone(), self.life.clone(), shared)
        };
        let store: Arc<dyn Store> = match self.common.is_single {
            true => port(&self.common.hub, &self.way, false),
            false => {
                let disk = Way::new(self.way.who, Random::new(0));
                Arc::new(Split::new(port(&self.common.hub, &self.way, true), port(&self.own, &disk, false)))
            }
        };
        Ledger::inspect(store.as_ref(), SealEvidence::Unknown).await.map_err(|error| error.to_string())?;
        let opened = match self.role {
            ReplicaRole::Signer => Ledger::open(store, std::slice::from_ref(&self.common.seal)).await,
            _ => {
                let seal = self.common.seal.clone();
                let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal) };
                Ledger::initialise(store, SealEvidence::Unknown, make, self.machine.wall()).await
            }
        };
        opened.map_err(|error| error.to_string())
    }
}

async fn begin(engine: Arc<Engine>) -> Result<(), String> {
    engine.resume().await;
    let _ = engine.look_at_store(Span::ZERO).await;
    let _ = engine.attend_once().await;
    if engine.is_open() {
        return Ok(());
    }
    engine.reconcile_all().await;
    engine.give_up_first_keys().await;
    match engine.confirm_created().await {
        Err(error) if engine.is_open() || (engine.is_shared() && error.may_pass()) => Ok(()),
        confirmed => confirmed.map_err(|error| error.to_string()),
    }
}
