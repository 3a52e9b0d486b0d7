//! Where decisions become effects: keyrings are loaded, planned, carried out, written and shown to requests.

#[cfg(test)]
pub(crate) mod bare;
pub mod cell;
pub mod command;
mod disabled;
mod following;
pub mod heartbeat;
mod liveness;
pub mod notices;
pub mod placing;
pub mod presence;
pub mod probes;
mod publish;
mod reconcile;
pub mod scheduler;
mod seal;
mod side_by_side;
pub mod signing;
pub mod snapshot;
mod start;
pub mod supervise;
pub mod view;
pub mod whole;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::Semaphore;

use crate::backend::local::ImportPrivate;
use crate::backend::{Backend, KeyIdentity, StoredKey};
use crate::clock::TrustedClock;
use crate::keyring::change::NewKey;
use crate::keyring::jwk::PublishedEntry;
use crate::keyring::name::Name;
use crate::keyring::plan::{Desired, Facts, JWKS_KEYS_MAX, Lag};
use crate::keyring::policy::Policy;
use crate::keyring::record::{Key, Keyring};
use crate::keyring::time::{Span, Timestamp};
use crate::random::{Entropy, System};
use crate::store::ledger::{Ledger, Unauthenticated};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::sieve::Sieve;

pub use cell::{Directory, IssuerCell, KeysetCell, Route, RouteKind};
pub use command::CommandError;
pub use reconcile::{Rest, chain};
pub use signing::{Issued, SignFailure};
pub use snapshot::{ActiveKey, JwksDocument, KeysetSnapshot, Stopped, Wanted};
pub use start::StartError;

/// The most bytes an issuer's JWKS may have (Nimbus reads 50 KB).
pub const JWKS_BYTES_MAX: usize = 50_000;

/// Who is waited for while nobody could be asked.
const UNKNOWN_REPLICAS: &str = "others, which could not be asked";

/// The daemon's core at work. Shared by all listeners and tasks.
pub struct Engine {
    pub clock: Arc<TrustedClock>,
    pub metrics: Arc<Metrics>,
    /// Arrives when the seal opens; nothing can be written before.
    ledger: OnceLock<Arc<Ledger>>,
    /// What the store says of itself, while the seal is out of reach.
    claims: ArcSwapOption<Unauthenticated>,
    /// The seal has not been opened: records are served as they are, and nothing else happens.
    sealed: AtomicBool,
    /// Whoever holds it may exchange the directory.
    configuring: tokio::sync::Mutex<()>,
    backends: HashMap<&'static str, Arc<dyn Backend>>,
    /// By backend: how many more keys may be opened now. Each backend has its own, so that none waits for another.
    opening: HashMap<&'static str, Semaphore>,
    /// Seals imported private keys, where a backend can.
    importer: Option<Arc<dyn ImportPrivate>>,
    directory: ArcSwap<Directory>,
    settings: ArcSwap<Settings>,
    /// The public listener answers.
    open: AtomicBool,
    /// Boot time since when it does, in milliseconds.
    open_since: AtomicI64,
    /// Boot time until which no key in another system is destroyed, in milliseconds.
    keep_remote_until: AtomicI64,
    /// Boot time until which removals wait, in milliseconds.
    removals_wait: AtomicI64,
    heartbeat_failing: AtomicBool,
    /// Boot time of the last heartbeat, in milliseconds.
    last_beat: AtomicI64,
    progress: liveness::Progress,
    stopping: AtomicBool,
    /// Keyrings were written that the installation does not list as created yet.
    unconfirmed: AtomicBool,
    /// Another configuration was taken.
    reconfigured: tokio::sync::Notify,
    scheduler: std::sync::Mutex<scheduler::Tasks>,
    /// Where issuers are published besides the public listener.
    places: OnceLock<placing::Places>,
    /// Watches this process's background tasks.
    pub supervisor: Arc<supervise::Supervisor>,
    /// Steps that could not be stored.
    complaints: Sieve,
    /// Held by whoever carries out a request to the daemon as a whole.
    turn: tokio::sync::Mutex<()>,
    /// What this process is to the other replicas of its store.
    role: ReplicaRole,
    /// Signatures that keep a processor for some tenths of a millisecond, one for each processor at a time.
    busy: Semaphore,
    /// Lets replicas that began together go apart.
    entropy: Arc<dyn Entropy>,
    /// This process among the replicas: the machine's name and something random.
    replica: String,
    /// Other replicas use the store too.
    shared: bool,
    /// Whether the public listener is one of this process's.
    publishes: bool,
    /// No issuer waits for first keys.
    complete: AtomicBool,
    following: following::Following,
    presence: presence::Presence,
    notices: notices::Notices,
    /// What the configuration says, for when the store has new keysets.
    declared: std::sync::Mutex<Vec<Declared>>,
}

/// What a replica does with the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReplicaRole {
    /// Plans, writes, publishes and signs.
    #[default]
    All,
    /// Plans, writes and publishes.
    Manager,
    /// Reads, signs and may publish.
    Signer,
}

impl ReplicaRole {
    pub const fn as_str(self) -> &'static str {
        match self {
            ReplicaRole::All => "all",
            ReplicaRole::Manager => "manager",
            ReplicaRole::Signer => "signer",
        }
    }
}

/// What the engine needs to know besides policies.
#[derive(Clone, Debug)]
pub struct Settings {
    pub sign_deadline: Span,
    /// Log one line per signature.
    pub audit_signatures: bool,
    /// Slow signatures of one keyset that may be made at once: the processors.
    pub pool_size: usize,
    /// Taken at the start; later ones change nothing.
    pub role: ReplicaRole,
    /// There is a public listener; as for the role.
    pub publishes: bool,
}

/// A keyset of the configuration.
#[derive(Clone, Debug)]
pub struct Declared {
    pub name: Name,
    pub policy: Arc<Policy>,
    /// The policy passed every rule of DESIGN §4; otherwise an existing keyring starts degraded.
    pub fits: bool,
}

/// Where the engine's keyrings come from.
pub enum Records {
    Authenticated(Arc<Ledger>),
    /// The seal could not be reached yet; [`Engine::unseal`] follows.
    Sealed(Unauthenticated),
}

impl From<Arc<Ledger>> for Records {
    fn from(ledger: Arc<Ledger>) -> Self {
        Records::Authenticated(ledger)
    }
}

impl Engine {
    pub fn new(
        clock: Arc<TrustedClock>,
        records: impl Into<Records>,
        backends: impl IntoIterator<Item = Arc<dyn Backend>>,
        importer: Option<Arc<dyn ImportPrivate>>,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Arc<Engine> {
        Self::with_entropy(clock, records, backends, importer, metrics, settings, Arc::new(System))
    }

    /// The same with another source for its name, for ids of tokens and for pauses. Keys, lineages and whatever else must
    /// never be guessed do not come from it.
    pub fn with_entropy(
        clock: Arc<TrustedClock>,
        records: impl Into<Records>,
        backends: impl IntoIterator<Item = Arc<dyn Backend>>,
        importer: Option<Arc<dyn ImportPrivate>>,
        metrics: Arc<Metrics>,
        settings: Settings,
        entropy: Arc<dyn Entropy>,
    ) -> Arc<Engine> {
        let (ledger, claims) = match records.into() {
            Records::Authenticated(ledger) => (OnceLock::from(ledger), None),
            Records::Sealed(claims) => (OnceLock::new(), Some(claims)),
        };
        let (role, publishes) = (settings.role, settings.publishes);
        let shared = match (&ledger.get(), &claims) {
            (Some(ledger), _) => ledger.shared().is_some(),
            (None, claims) => claims.as_ref().is_some_and(Unauthenticated::is_shared),
        };
        let backends: HashMap<_, _> = backends.into_iter().map(|backend| (backend.name(), backend)).collect();
        let opening = backends.keys().map(|name| (*name, Semaphore::new(publish::OPENED_AT_ONCE))).collect();
        Arc::new(Engine {
            clock,
            metrics,
            sealed: AtomicBool::new(claims.is_some()),
            ledger,
            claims: ArcSwapOption::from(claims.map(Arc::new)),
            configuring: tokio::sync::Mutex::default(),
            backends,
            opening,
            importer,
            directory: ArcSwap::from_pointee(Directory::default()),
            busy: Semaphore::new(settings.pool_size),
            settings: ArcSwap::from_pointee(settings),
            open: AtomicBool::new(false),
            open_since: AtomicI64::new(i64::MIN),
            keep_remote_until: AtomicI64::new(i64::MIN),
            removals_wait: AtomicI64::new(i64::MIN),
            heartbeat_failing: AtomicBool::new(false),
            last_beat: AtomicI64::new(0),
            progress: liveness::Progress::default(),
            stopping: AtomicBool::new(false),
            unconfirmed: AtomicBool::new(true),
            reconfigured: tokio::sync::Notify::new(),
            scheduler: std::sync::Mutex::default(),
            places: OnceLock::new(),
            supervisor: Arc::default(),
            complaints: Sieve::default(),
            turn: tokio::sync::Mutex::default(),
            role,
            shared,
            publishes,
            complete: AtomicBool::new(false),
            declared: std::sync::Mutex::default(),
            replica: presence::replica_name(&*entropy),
            entropy,
            following: following::Following::default(),
            presence: presence::Presence::default(),
            notices: notices::Notices::default(),
        })
    }

    pub fn directory(&self) -> Arc<Directory> {
        self.directory.load_full()
    }

    pub fn keyset(&self, name: &str) -> Option<Arc<KeysetCell>> {
        self.directory.load().keysets.get(name).cloned()
    }

    /// Exchanges the settings; pools keep the size they were made with.
    pub fn set_settings(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    /// Whether other replicas use the store too.
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Whether this process only reads the store, and enforces what stands there.
    pub fn is_reader(&self) -> bool {
        self.role == ReplicaRole::Signer
    }

    pub(crate) fn publishes(&self) -> bool {
        self.publishes
    }

    pub fn is_open(&self) -> bool {
        // Whoever opens the listeners and whoever opens the seal each look whether the other is done.
        self.open.load(Ordering::SeqCst)
    }

    /// What the planner has to know, as of now.
    pub fn facts<'a>(&self, cell: &KeysetCell, snapshot: &'a KeysetSnapshot) -> Facts<'a> {
        let reading = self.clock.read();
        let boot = self.clock.boot();
        // Boot time knows how long ago something happened whatever became of the wall clock.
        let past = |at: &Span| reading.now - boot.saturating_sub(*at);
        // A clock that was accepted since may be far behind what tokens carry; they are valid for nobody yet.
        let latest = self.clock.latest();
        let ended = |stopped: &Stopped| past(&stopped.at).max(stopped.latest.min(latest));
        let future = |at: Span| reading.now + at.saturating_sub(boot);
        let wait = self.removals_wait.load(Ordering::Relaxed);
        let seen = cell.issuer.probes().seen(&snapshot.keyring, |at| past(&Span::from_millis(at)));
        Facts {
            unconfirmed: Some(Vec::new()),
            now: reading.now,
            clock_frozen: reading.frozen || self.following.clock_differs(),
            removals_not_before: if wait > boot.as_millis() {
                future(Span::from_millis(wait))
            } else {
                Timestamp::EPOCH
            },
            desired: match &snapshot.desired {
                // Another replica has adopted another policy since: the one that came last stays.
                Wanted::Policy(_) if cell.is_superseded(snapshot) => Desired::Policy(&snapshot.keyring.policy),
                Wanted::Policy(policy) => Desired::Policy(policy),
                Wanted::Degraded => Desired::Degraded,
                Wanted::Stored => Desired::Policy(&snapshot.keyring.policy),
                Wanted::Absent => Desired::Absent,
            },
            published: snapshot.published.iter().map(|(serial, at)| (*serial, past(at))).collect(),
            stopped: snapshot.stopped.iter().map(|(serial, stopped)| (*serial, ended(stopped))).collect(),
            resumed_at: if self.is_silent(cell.issuer.policy.load().max_age, boot) || self.is_lacking(&cell.issuer) {
                Some(reading.now)
            } else {
                let resumed = cell.issuer.resumed_boot_ms();
                resumed.map(|at| Timestamp::from_millis(reading.now.as_millis() - (boot.as_millis() - at)))
            },
            contested: match self.is_shared() {
                true => cell.issuer.probes().contested(&snapshot.keyring.keys, &seen),
                false => BTreeSet::new(),
            },
            seen,
            issuer_served: self.is_issuer_served(cell, snapshot),
            lagging: if self.others_are_unknown() {
                let unknown = Lag { until: reading.now, replicas: vec![UNKNOWN_REPLICAS.to_owned()] };
                snapshot.keyring.keys.iter().map(|key| (key.serial, unknown.clone())).collect()
            } else {
                cell.lagging(&snapshot.keyring, past)
            },
            room: self.room(cell, &snapshot.keyring),
            backoff: snapshot.backoff.iter().map(|(step, backoff)| (*step, future(backoff.not_before))).collect(),
        }
    }

    /// Whether somebody may hold a document of the issuer in which this keyset has no key. Asked only where a first key
    /// might sign at once. A restart does not make caches forget: that a key of another keyset was published is recorded.
    fn is_issuer_served(&self, cell: &KeysetCell, snapshot: &KeysetSnapshot) -> bool {
        let keyring = &snapshot.keyring;
        if !keyring.first || keyring.active().is_some() || keyring.last_promotion_at.is_some() {
            return self.is_open() && cell.issuer.serves_others(snapshot);
        }
        let directory = self.directory();
        let mut others = directory.keysets_of(&cell.issuer).filter(|other| other.name != cell.name);
        (self.is_open() && cell.issuer.serves_others(snapshot))
            || others.any(|other| other.snapshot.load().keyring.keys.iter().any(|key| key.published_at.is_some()))
    }

    /// How many more keys the issuer's JWKS can take, by number and by bytes.
    fn room(&self, cell: &KeysetCell, keyring: &Keyring) -> u32 {
        let Some(document) = cell.issuer.document.load_full() else { return JWKS_KEYS_MAX };
        let by_number = JWKS_KEYS_MAX.saturating_sub(document.keys);
        let spare = JWKS_BYTES_MAX.saturating_sub(document.body.len());
        let by_bytes = spare / keyring.policy.algorithm.jwk_bytes();
        by_number.min(u32::try_from(by_bytes).unwrap_or(u32::MAX))
    }

    /// Whether this very key still fits: an imported one may be of another kind than the keyset's, and have a long kid.
    fn has_room_for(&self, cell: &KeysetCell, key: &NewKey) -> bool {
        let Some(document) = cell.issuer.document.load_full() else { return true };
        let entry = PublishedEntry { kid: &key.kid, algorithm: key.algorithm, public: &key.public };
        document.keys < JWKS_KEYS_MAX && document.body.len() + entry.bytes() < JWKS_BYTES_MAX
    }

    fn stored_key(&self, keyring: &Keyring, key: &Key) -> Option<StoredKey> {
        let private = key.private.as_ref()?;
        Some(StoredKey {
            identity: self.identity(keyring, key.serial),
            kid: key.kid.clone(),
            algorithm: key.algorithm,
            public: key.public.clone(),
            handle: private.handle.clone(),
        })
    }

    fn identity(&self, keyring: &Keyring, serial: u64) -> KeyIdentity {
        KeyIdentity {
            installation: self.installation().map(|installation| installation.id.clone()).unwrap_or_default(),
            lineage: keyring.key_lineage().to_owned(),
            keyset: keyring.keyset.clone(),
            serial,
        }
    }

    fn backend(&self, name: &str) -> Option<&Arc<dyn Backend>> {
        self.backends.get(name)
    }
}
