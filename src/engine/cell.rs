//! The places where snapshots live, one per keyset and one per issuer.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{Mutex, Notify, Semaphore};

use super::probes::Probes;
use super::snapshot::{JwksDocument, KeysetSnapshot, Wanted};
use crate::keyring::name::Name;
use crate::keyring::plan::Lag;
use crate::keyring::policy::{IssuerPolicy, Policy};
use crate::keyring::record::{Keyring, Serial};
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::Loaded;
use crate::telemetry::metrics::{IssuerMetrics, KeysetMetrics, SigningMetrics};

/// One keyset in this process.
pub struct KeysetCell {
    pub name: Name,
    /// Position in the configuration, for the order within the JWKS.
    pub position: AtomicUsize,
    pub issuer: Arc<IssuerCell>,
    pub snapshot: ArcSwap<KeysetSnapshot>,
    pub metrics: KeysetMetrics,
    pub signing_metrics: ArcSwap<SigningMetrics>,
    pub pool: SigningPool,
    pub remote: RemoteHealth,
    /// Whoever holds it may write the keyring; it remembers what was stored last.
    pub(super) writer: Mutex<Writer>,
    pub(super) wake: Notify,
    /// A write's outcome is unknown (`Writer::unsettled`), readable without the writer.
    pub(super) uncertain: AtomicBool,
    /// Boot time at which the store was last known to hold what is shown, in milliseconds; `i64::MAX` where this process
    /// alone writes it.
    pub(super) confirmed: AtomicI64,
    /// The same, whether or not the store's clock agrees with ours.
    pub(super) read: AtomicI64,
    /// The last look could not read the keyring.
    pub(super) behind: AtomicBool,
    /// Another replica moved the keyset to another issuer: this cell ends.
    pub(super) moved: AtomicBool,
    /// The last write was this process's: it goes on, and other replicas let it.
    pub(super) leads: AtomicBool,
    /// Boot time until which this process lets others take the next step, in milliseconds; 0: it has not begun to wait.
    pub(super) gives_way_until: AtomicI64,
    /// The policy that was stored when this process took its configuration; what it wants itself, once another one was.
    pub(super) base: ArcSwapOption<Policy>,
    /// Waiting keys that other replicas lack, or lacked.
    pub(super) laggards: std::sync::Mutex<BTreeMap<Serial, Laggards>>,
}

/// Replicas that publish and lack a key.
#[derive(Clone, Debug)]
pub(super) struct Laggards {
    /// Boot time since when, without a break.
    pub since: Span,
    /// Boot time at which there were any.
    pub until: Span,
    /// Those that lack it still.
    pub replicas: Vec<String>,
}

impl KeysetCell {
    /// Boot time at which the store last confirmed the keyring, in milliseconds, negative before the boot; `None` where
    /// nobody else writes it, `i64::MIN` if it never has.
    pub fn confirmed_at(&self) -> Option<i64> {
        Some(self.confirmed.load(Ordering::Relaxed)).filter(|at| *at != i64::MAX)
    }

    /// Whether the keyring was not confirmed for longer than its policy allows signers (S).
    pub fn is_stale(&self, limit: Span, boot: Span) -> bool {
        let confirmed = self.confirmed.load(Ordering::Relaxed);
        confirmed != i64::MAX && boot.as_millis().saturating_sub(confirmed) > limit.as_millis()
    }

    /// Whether what is shown was not read from the store for longer than `limit`, whatever that store's clock says.
    pub fn is_unread(&self, limit: Span, boot: Span) -> bool {
        let read = self.read.load(Ordering::Relaxed);
        read != i64::MAX && boot.as_millis().saturating_sub(read) > limit.as_millis()
    }

    /// In boot time, in milliseconds.
    pub(super) fn confirm(&self, at: i64) {
        self.confirmed.fetch_max(at, Ordering::Relaxed);
        self.note_read(at);
    }

    pub(super) fn note_read(&self, at: i64) {
        self.read.fetch_max(at, Ordering::Relaxed);
    }

    /// Whether another replica has adopted another policy than this process's since that was configured.
    pub fn is_superseded(&self, snapshot: &KeysetSnapshot) -> bool {
        let (Wanted::Policy(wanted), Some(base)) = (&snapshot.desired, &*self.base.load()) else { return false };
        let stored = &snapshot.keyring.policy;
        *stored != **wanted && *stored != **base
    }

    /// The stored policy is another one than when this process took its configuration: what it wants was adopted, or
    /// somebody else's came later. Whatever is stored from now on, it does not want it back: two processes would take
    /// turns for ever.
    pub(super) fn policy_moved(&self, desired: &Wanted) {
        if let Wanted::Policy(wanted) = desired {
            self.base.store(Some(wanted.clone()));
        }
    }

    /// Names of the replicas that publish and lack the key.
    pub fn missing_replicas(&self, serial: Serial) -> Vec<String> {
        let laggards = self.laggards.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        laggards.get(&serial).map(|lag| lag.replicas.clone()).unwrap_or_default()
    }

    /// Whether a replica has lacked a waiting key for so long.
    pub fn lags_for_longer_than(&self, limit: Span, boot: Span) -> bool {
        let laggards = self.laggards.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        laggards.values().any(|lag| !lag.replicas.is_empty() && boot.saturating_sub(lag.since) > limit)
    }

    /// What other replicas lack of this keyring's waiting keys.
    pub(super) fn lagging(&self, keyring: &Keyring, past: impl Fn(&Span) -> Timestamp) -> BTreeMap<Serial, Lag> {
        let laggards = self.laggards.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let waiting = laggards.iter().filter(|(serial, _)| keyring.key(**serial).is_some());
        waiting
            .map(|(serial, lag)| (*serial, Lag { until: past(&lag.until), replicas: lag.replicas.clone() }))
            .collect()
    }
}

pub(super) struct Writer {
    /// `None` until the first write.
    pub stored: Option<Loaded>,
    /// A write whose outcome is not known: it is found out before anything else is written.
    pub unsettled: Option<Arc<Keyring>>,
}

/// One issuer in this process.
pub struct IssuerCell {
    pub url: String,
    pub policy: ArcSwap<IssuerPolicy>,
    /// What is rendered; [`served`](Self::served) is what the public may see of it.
    pub document: ArcSwapOption<JwksDocument>,
    /// The issuer begins while listeners are open: nothing is served before all its keysets have their first key.
    withheld: AtomicBool,
    /// Other replicas write too, and not every keyset that begins with the issuer has its first key yet.
    incomplete: AtomicBool,
    pub metrics: IssuerMetrics,
    /// Whoever holds it may add a key to the issuer's JWKS: the limit counts all its keysets.
    pub(super) admission: Mutex<()>,
    /// Serialises rendering, so that an older set of keys never replaces a newer one.
    pub(super) rendering: std::sync::Mutex<()>,
    /// What is served where verifiers fetch.
    probes: std::sync::Mutex<Probes>,
    /// Boot time at which publication resumed after a silence longer than max_age; negative: none.
    resumed: AtomicI64,
}

impl IssuerCell {
    pub fn new(policy: IssuerPolicy, metrics: IssuerMetrics) -> Self {
        IssuerCell {
            url: policy.url.clone(),
            policy: ArcSwap::from_pointee(policy),
            document: ArcSwapOption::empty(),
            withheld: AtomicBool::new(false),
            incomplete: AtomicBool::new(false),
            metrics,
            admission: Mutex::new(()),
            rendering: std::sync::Mutex::new(()),
            probes: std::sync::Mutex::default(),
            resumed: AtomicI64::new(i64::MIN),
        }
    }

    /// What the issuer's probes show. Held for moments only.
    pub fn probes(&self) -> std::sync::MutexGuard<'_, Probes> {
        self.probes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Boot time at which publication resumed; may lie before this boot, then it is negative milliseconds.
    pub fn resumed_boot_ms(&self) -> Option<i64> {
        Some(self.resumed.load(Ordering::Relaxed)).filter(|at| *at != i64::MIN)
    }

    /// The document that the public listener answers with.
    pub fn served(&self) -> Option<Arc<JwksDocument>> {
        if self.is_withheld() { None } else { self.document.load_full() }
    }

    pub fn is_withheld(&self) -> bool {
        self.withheld.load(Ordering::SeqCst) || self.incomplete.load(Ordering::SeqCst)
    }

    /// Notes whether first keys are still missing; whether that is news.
    pub(super) fn note_incomplete(&self, incomplete: bool) -> bool {
        self.incomplete.swap(incomplete, Ordering::SeqCst) != incomplete
    }

    pub(super) fn withhold(&self, withheld: bool) {
        self.withheld.store(withheld, Ordering::SeqCst);
    }

    /// Whether the issuer's document has keys of other keysets too.
    pub fn serves_others(&self, snapshot: &KeysetSnapshot) -> bool {
        let own = snapshot.keyring.published().count();
        self.served().as_ref().is_some_and(|document| document.keys as usize > own)
    }

    pub fn set_resumed_boot_ms(&self, at: i64) {
        self.resumed.store(at, Ordering::Relaxed);
    }

    /// As [`set_resumed_boot_ms`](Self::set_resumed_boot_ms), unless a later silence is known.
    pub fn resumed_not_before_boot_ms(&self, at: i64) {
        self.resumed.fetch_max(at, Ordering::Relaxed);
    }
}

/// Whether the active key signs, where that is not up to this process. Local keys do not use it.
#[derive(Default)]
pub struct RemoteHealth {
    signs: AtomicBool,
    probing: AtomicBool,
    /// Serial of the key that its backend called disabled; 0: none.
    disabled: AtomicU64,
    /// That was found to be so when it was looked into.
    confirmed: AtomicBool,
    /// Boot time of the last attempt of ours to find out, in milliseconds.
    tried: AtomicI64,
}

impl RemoteHealth {
    /// Whether `pause` has passed since the last attempt of ours; the caller makes one now.
    pub(super) fn is_due(&self, boot: Span, pause: Span) -> bool {
        let tried = self.tried.load(Ordering::Relaxed);
        let due = boot.as_millis().saturating_sub(tried) >= pause.as_millis();
        if due {
            self.tried.store(boot.as_millis(), Ordering::Relaxed);
        }
        due
    }

    /// The last attempt succeeded. A key that was never tried is not known to sign.
    pub fn signs(&self) -> bool {
        self.signs.load(Ordering::Relaxed)
    }

    /// The key that its backend called disabled.
    pub(super) fn reported(&self) -> Option<Serial> {
        Some(self.disabled.load(Ordering::SeqCst)).filter(|serial| *serial != 0)
    }

    /// The key that is known to be disabled.
    pub fn disabled(&self) -> Option<Serial> {
        self.reported().filter(|_| self.confirmed.load(Ordering::SeqCst))
    }

    /// Its backend calls the key disabled; whether that is news.
    pub(super) fn report(&self, serial: Serial) -> bool {
        let news = self.disabled.swap(serial, Ordering::SeqCst) != serial;
        if news {
            self.confirmed.store(false, Ordering::SeqCst);
        }
        news
    }

    /// A reported key is disabled indeed; whether that is news.
    pub(super) fn confirm(&self, serial: Serial) -> bool {
        self.reported() == Some(serial) && !self.confirmed.swap(true, Ordering::SeqCst)
    }

    /// The key signs, or is not the active one any more.
    pub(super) fn absolve(&self, serial: Serial) {
        if self.disabled.compare_exchange(serial, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.confirmed.store(false, Ordering::SeqCst);
        }
    }

    /// Notes how an attempt went; whether that is news.
    pub(super) fn note(&self, signs: bool) -> bool {
        self.signs.swap(signs, Ordering::Relaxed) != signs
    }

    /// Whether the caller is to try now: nobody else does. [`probed`](Self::probed) ends it.
    pub(super) fn begin_probe(&self) -> bool {
        !self.probing.swap(true, Ordering::Relaxed)
    }

    pub(super) fn probed(&self) {
        self.probing.store(false, Ordering::Relaxed);
    }
}

/// Bounds what one keyset's slow signatures take of the machine, and what they ask of a remote backend.
///
/// A keyset that moves from one backend to another has keys of both for a while, so it has places for both.
pub struct SigningPool {
    /// Slow signatures in this process.
    pub threads: Arc<Semaphore>,
    /// Calls of a remote backend.
    pub calls: Arc<Semaphore>,
    pub waiting: AtomicUsize,
    /// Retries that may still be made: each takes one, each success gives one back.
    retries: AtomicUsize,
}

/// Retries in a row without a success in between, at most. Beyond that a failing backend sees each request once: the
/// retries can never be more than what succeeds.
const RETRY_BUDGET: usize = 100;

/// Requests that may wait for a signature of one keyset before further ones are turned away.
pub const QUEUE: usize = 1024;

/// Remote signatures of one keyset under way at once: a part of what the backend's client allows for all of them, so
/// that one keyset whose key hangs does not take the others' places.
pub const REMOTE_CONCURRENCY: usize = 64;

impl SigningPool {
    /// `threads` may sign at once here.
    pub fn new(threads: usize) -> Self {
        SigningPool {
            threads: Arc::new(Semaphore::new(threads)),
            calls: Arc::new(Semaphore::new(REMOTE_CONCURRENCY)),
            waiting: AtomicUsize::new(0),
            retries: AtomicUsize::new(RETRY_BUDGET),
        }
    }

    /// Whether one more retry may be made.
    pub(super) fn may_retry(&self) -> bool {
        self.retries.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    pub(super) fn succeeded(&self) {
        let _ = self
            .retries
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| (left < RETRY_BUDGET).then_some(left + 1));
    }

    /// A place in the queue; `None` when it is full.
    pub fn enter(&self) -> Option<QueuePlace<'_>> {
        let place = QueuePlace { waiting: &self.waiting };
        // The place counts itself out on drop, also when it is turned away here.
        (self.waiting.fetch_add(1, Ordering::Relaxed) < QUEUE).then_some(place)
    }
}

pub struct QueuePlace<'a> {
    waiting: &'a AtomicUsize,
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All keysets and issuers of one configuration, and where their documents are served.
#[derive(Default)]
pub struct Directory {
    pub keysets: HashMap<Name, Arc<KeysetCell>>,
    /// Keysets in the configuration's order, those gone from it last.
    pub order: Vec<Arc<KeysetCell>>,
    pub issuers: Vec<Arc<IssuerCell>>,
    pub routes: HashMap<String, Route>,
    /// By issuer URL, in the same order: rendering one issuer costs what it has, not what the installation has.
    pub(super) members: HashMap<String, Vec<Arc<KeysetCell>>>,
}

/// What a path of the public listener serves.
#[derive(Clone)]
pub struct Route {
    pub issuer: Arc<IssuerCell>,
    pub kind: RouteKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    Jwks,
    Discovery,
}

impl RouteKind {
    /// The document's media type (RFC 7517 §8.5.2, RFC 8414 §3.2).
    pub const fn media_type(self) -> &'static str {
        match self {
            RouteKind::Jwks => "application/jwk-set+json",
            RouteKind::Discovery => "application/json",
        }
    }
}

impl Directory {
    /// Adds a keyset after those that are there.
    pub(super) fn push(&mut self, cell: Arc<KeysetCell>) {
        self.members.entry(cell.issuer.url.clone()).or_default().push(cell.clone());
        self.order.push(cell.clone());
        self.keysets.insert(cell.name.clone(), cell);
    }

    /// In the order of the configuration; none of an issuer that is of another directory.
    pub fn keysets_of<'a>(&'a self, issuer: &'a IssuerCell) -> impl Iterator<Item = &'a Arc<KeysetCell>> {
        let members = self.members.get(&issuer.url).into_iter().flatten();
        members.filter(move |cell| std::ptr::eq(cell.issuer.as_ref(), issuer))
    }
}

/// The interval between two records that this daemon is alive: min(max_age, 60 s) ÷ 2, at least 100 ms.
pub fn heartbeat_interval(max_age: Span) -> Span {
    Span::from_millis(max_age.min(Span::MINUTE).as_millis() / 2).max(Span::from_millis(100))
}
