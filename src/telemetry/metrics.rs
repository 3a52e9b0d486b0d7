//! The metrics of DESIGN §8: exact names, labels from closed sets, every series there from the start with 0.
//!
//! All series of a keyset live in one block of atomics. So a signature costs three atomic additions and neither a
//! lock nor a look-up, and ten thousand keysets cost megabytes, not hundreds. prometheus-client encodes them; its own
//! metric types would take an allocation per series and, for histograms, a mutex per observation.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::registry::Registry;

use crate::keyring::algorithm::Algorithm;
use crate::keyring::name::Name;
use crate::keyring::record::KeyState;
use crate::keyring::time::{Span, Timestamp};

mod exposition;
mod families;
mod histogram;
mod labels;
mod process;

pub use exposition::Exposition;
pub use labels::{
    Alarm, BackendOperation, BackendOutcome, JwksCode, NoticeOutcome, RotationFailureReason, RotationStep,
    RotationTrigger, SignRejection, SigningFailure,
};

use histogram::Histogram;
use process::Process;

/// All metrics of the process; clones share them.
#[derive(Clone)]
pub struct Metrics {
    series: Arc<Series>,
    text: Arc<Registry>,
    open_metrics: Arc<Registry>,
}

/// What the engine reports of one keyset; clones share it.
#[derive(Clone)]
pub struct KeysetMetrics {
    keyset: Arc<KeysetSeries>,
}

/// What signing reports, resolved once per keyset, algorithm and backend and then kept beside the signer.
#[derive(Clone)]
pub struct SigningMetrics {
    keyset: Arc<KeysetSeries>,
    lane: Arc<SigningLane>,
    alg: usize,
}

/// What the public listener, the probes and the publishers report of one issuer; clones share it.
#[derive(Clone)]
pub struct IssuerMetrics {
    issuer: Arc<IssuerSeries>,
}

/// What is reported of one of an issuer's publishers; clones share it.
#[derive(Clone)]
pub struct PublisherMetrics {
    publisher: Arc<PublisherSeries>,
}

/// What is reported of requests to one backend; clones share it.
#[derive(Clone)]
pub struct BackendMetrics {
    backend: Arc<BackendSeries>,
}

impl Metrics {
    /// Metrics of a process without keysets. Reads `/proc` once for the start time.
    pub fn new() -> Self {
        let series = Arc::new(Series::new());
        let registry = |exposition| {
            let mut registry = Registry::default();
            registry.register_collector(Box::new(families::Families { series: series.clone(), exposition }));
            Arc::new(registry)
        };
        Metrics {
            text: registry(Exposition::Text),
            open_metrics: registry(Exposition::OpenMetrics),
            series: series.clone(),
        }
    }

    /// Makes every series of the keyset, its issuer and its backend appear, with 0 where they are new. Repeating it
    /// with another algorithm or backend adds their series and keeps the former ones, whose keys may still sign.
    pub fn register_keyset(
        &self,
        keyset: &Name,
        algorithm: Algorithm,
        backend: &'static str,
        issuer: &Name,
    ) -> KeysetMetrics {
        let registered = {
            let mut keysets = write(&self.series.keysets);
            let entry = keysets
                .entry(keyset.clone())
                .or_insert_with(|| RegisteredKeyset { issuer: issuer.clone(), series: Arc::new(KeysetSeries::new()) });
            let former = std::mem::replace(&mut entry.issuer, issuer.clone());
            let series = entry.series.clone();
            if former != *issuer {
                self.forget_issuer_without_keysets(&keysets, &former);
            }
            KeysetMetrics { keyset: series }
        };
        // After the keyset stands in the map: otherwise another one that leaves could take the issuer with it.
        self.register_issuer(issuer);
        self.register_backend(backend);
        registered.signing(algorithm, backend);
        registered
    }

    /// Removes the series of a keyset, and those of its issuer when no other keyset belongs to it. Handles that still
    /// exist count into the void.
    pub fn unregister_keyset(&self, keyset: &Name) {
        let mut keysets = write(&self.series.keysets);
        if let Some(removed) = keysets.remove(keyset) {
            self.forget_issuer_without_keysets(&keysets, &removed.issuer);
        }
    }

    /// Makes every series of the issuer appear.
    pub fn register_issuer(&self, issuer: &Name) -> IssuerMetrics {
        let mut issuers = write(&self.series.issuers);
        let issuer = issuers.entry(issuer.clone()).or_insert_with(|| Arc::new(IssuerSeries::new())).clone();
        IssuerMetrics { issuer }
    }

    /// Makes every series of the backend appear. They stay, since the backend's names are few and counters that
    /// vanish mislead.
    pub fn register_backend(&self, backend: &'static str) -> BackendMetrics {
        let mut backends = write(&self.series.backends);
        let backend = backends.entry(backend).or_insert_with(|| Arc::new(BackendSeries::new())).clone();
        BackendMetrics { backend }
    }

    /// `jwksd_staleness_limit_seconds`
    pub fn set_staleness_limit(&self, limit: Span) {
        self.series.staleness_limit_millis.store(millis(limit), Relaxed);
    }

    /// `jwksd_notices_total`
    pub fn noticed(&self, outcome: NoticeOutcome, count: u64) {
        self.series.notices[outcome.index()].fetch_add(count, Relaxed);
    }

    /// `jwksd_notices_oldest_timestamp_seconds`
    pub fn set_notices_oldest(&self, at: Option<Timestamp>) {
        store_timestamp(&self.series.notices_oldest_millis, at);
    }

    /// `jwksd_admin_auth_failures_total`
    pub fn admin_auth_failed(&self) {
        self.series.admin_auth_failures.fetch_add(1, Relaxed);
    }

    /// `jwksd_config_last_reload_successful`; 0 until the first configuration is in force.
    pub fn set_config_last_reload_successful(&self, successful: bool) {
        self.series.config_last_reload_successful.store(successful.into(), Relaxed);
    }

    /// `jwksd_clock_frozen`
    pub fn set_clock_frozen(&self, frozen: bool) {
        self.series.clock_frozen.store(frozen.into(), Relaxed);
    }

    /// How many things outside keysets (listeners, files, the clock) raise `alarm` now. `jwksd_alarms` is this plus the
    /// keysets that raise it through [`KeysetMetrics::set_alarms`].
    pub fn set_alarm(&self, alarm: Alarm, raised_by: u64) {
        self.series.alarms[alarm.index()].store(raised_by, Relaxed);
    }

    /// `jwksd_certificate_expiry_timestamp_seconds`; the series appears where it is new.
    pub fn set_certificate_expiry(&self, listener: &'static str, at: Timestamp) {
        write(&self.series.certificates).insert(listener, at);
    }

    /// `jwksd_cluster_keys_confirmed_timestamp_seconds`; 0 before the first time, and no series where there are no service
    /// accounts.
    pub fn set_cluster_keys_confirmed(&self, at: Option<Timestamp>) {
        *write(&self.series.cluster_keys) = at;
    }

    /// The page for a scraper with this `Accept` header: the content type and the body. With very many keysets the
    /// body is large; [`write`](Self::write) needs no memory for it.
    pub fn render(&self, accept: Option<&str>) -> (&'static str, String) {
        let exposition = Exposition::negotiate(accept);
        let mut body = String::new();
        self.write(exposition, &mut body).expect("writing to a String does not fail");
        (exposition.content_type(), body)
    }

    /// Writes the page in small pieces.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, exposition: Exposition, writer: &mut impl Write) -> fmt::Result {
        match exposition {
            Exposition::Text => encode_registry(writer, &self.text),
            Exposition::OpenMetrics => {
                encode_registry(writer, &self.open_metrics)?;
                encode_eof(writer)
            }
        }
    }
}

impl Metrics {
    fn forget_issuer_without_keysets(&self, keysets: &BTreeMap<Name, RegisteredKeyset>, issuer: &Name) {
        if !keysets.values().any(|keyset| keyset.issuer == *issuer) {
            write(&self.series.issuers).remove(issuer);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl KeysetMetrics {
    /// The handle that signing with this algorithm in this backend needs; its series appear if they are new.
    pub fn signing(&self, algorithm: Algorithm, backend: &'static str) -> SigningMetrics {
        let alg = alg_index(algorithm);
        let lane = {
            let mut lanes = write(&self.keyset.lanes);
            lanes.entry(backend).or_insert_with(|| Arc::new(SigningLane::new())).clone()
        };
        lane.algs.fetch_or(1 << alg, Relaxed);
        SigningMetrics { keyset: self.keyset.clone(), lane, alg }
    }

    /// `jwksd_sign_rejections_total`
    pub fn rejected(&self, reason: SignRejection) {
        self.keyset.rejections[reason.index()].fetch_add(1, Relaxed);
    }

    /// `jwksd_keys`: how many keys are in `state`; for ended states those that the keyring still remembers.
    pub fn set_keys(&self, state: KeyState, keys: u64) {
        self.keyset.keys[state as usize].store(keys, Relaxed);
    }

    /// `jwksd_active_key_activated_timestamp_seconds`; 0 without an active key.
    pub fn set_active_key_activated(&self, at: Option<Timestamp>) {
        store_timestamp(&self.keyset.activated_millis, at);
    }

    /// `jwksd_next_rotation_timestamp_seconds`; 0 when none is planned.
    pub fn set_next_rotation(&self, at: Option<Timestamp>) {
        store_timestamp(&self.keyset.next_rotation_millis, at);
    }

    /// `jwksd_rotation_overdue_seconds`
    pub fn set_rotation_overdue(&self, by: Span) {
        self.keyset.overdue_millis.store(millis(by), Relaxed);
    }

    /// `jwksd_rotations_total`
    pub fn rotated(&self, trigger: RotationTrigger) {
        self.keyset.rotations[trigger.index()].fetch_add(1, Relaxed);
    }

    /// `jwksd_rotation_failures_total`
    pub fn rotation_failed(&self, step: RotationStep, reason: RotationFailureReason) {
        self.keyset.rotation_failures[step.index()][reason.index()].fetch_add(1, Relaxed);
    }

    /// `jwksd_standby_ready`: whether a propagated successor could be promoted now.
    pub fn set_standby_ready(&self, ready: bool) {
        self.keyset.standby_ready.store(ready.into(), Relaxed);
    }

    /// `jwksd_standby_expected_timestamp_seconds`: when the next successor will be ready; 0 when none is on its way.
    pub fn set_standby_expected(&self, at: Option<Timestamp>) {
        store_timestamp(&self.keyset.standby_expected_millis, at);
    }

    /// `jwksd_hold`
    pub fn set_hold(&self, held: bool) {
        self.keyset.hold.store(held.into(), Relaxed);
    }

    /// `jwksd_drained`
    pub fn set_drained(&self, drained: bool) {
        self.keyset.drained.store(drained.into(), Relaxed);
    }

    /// `jwksd_keyring_confirmed_timestamp_seconds`: when the keyring was last confirmed with the store.
    pub fn set_confirmed(&self, at: Timestamp) {
        store_timestamp(&self.keyset.confirmed_millis, Some(at));
    }

    /// The alarms that this keyset raises now, all of them; the former ones are replaced.
    pub fn set_alarms(&self, raised: impl IntoIterator<Item = Alarm>) {
        let bits = raised.into_iter().fold(0, |bits, alarm| bits | 1 << alarm.index());
        self.keyset.alarms.store(bits, Relaxed);
    }
}

impl SigningMetrics {
    /// A token left, and signing it took this long: `jwksd_signatures_total`, `jwksd_sign_duration_seconds`.
    pub fn signed(&self, took: Duration) {
        self.lane.signatures[self.alg].fetch_add(1, Relaxed);
        self.lane.duration.observe(took);
    }

    /// `jwksd_signing_failures_total`
    pub fn failed(&self, reason: SigningFailure) {
        self.lane.failures[reason.index()].fetch_add(1, Relaxed);
    }

    /// `jwksd_sign_rejections_total`
    pub fn rejected(&self, reason: SignRejection) {
        self.keyset.rejections[reason.index()].fetch_add(1, Relaxed);
    }
}

impl IssuerMetrics {
    /// `jwksd_jwks_requests_total`
    pub fn jwks_requested(&self, code: JwksCode) {
        self.issuer.requests[code.index()].fetch_add(1, Relaxed);
    }

    /// `jwksd_publication_mismatch`: how many probes see another document than the one published, and how many publishers
    /// found that somebody else changed it.
    pub fn set_publication_mismatch(&self, probes: u64) {
        self.issuer.publication_mismatch.store(probes, Relaxed);
    }
}

impl IssuerMetrics {
    /// Makes every series of one of the issuer's publishers appear.
    pub fn publisher(&self, publisher: &Name) -> PublisherMetrics {
        let mut publishers = write(&self.issuer.publishers);
        PublisherMetrics { publisher: publishers.entry(publisher.clone()).or_default().clone() }
    }
}

impl PublisherMetrics {
    /// `jwksd_publisher_placed_timestamp_seconds`: when everything was last read back as it should be.
    pub fn placed(&self, at: Timestamp) {
        store_timestamp(&self.publisher.placed_millis, Some(at));
    }

    /// `jwksd_publisher_failures_total`
    pub fn failed(&self) {
        self.publisher.failures.fetch_add(1, Relaxed);
    }
}

impl BackendMetrics {
    /// `jwksd_backend_requests_total`, `jwksd_backend_request_duration_seconds`
    pub fn requested(&self, operation: BackendOperation, outcome: BackendOutcome, took: Duration) {
        self.backend.requests[operation.index()][outcome.index()].fetch_add(1, Relaxed);
        self.backend.durations[operation.index()].observe(took);
    }
}

struct Series {
    keysets: RwLock<BTreeMap<Name, RegisteredKeyset>>,
    issuers: RwLock<BTreeMap<Name, Arc<IssuerSeries>>>,
    backends: RwLock<BTreeMap<&'static str, Arc<BackendSeries>>>,
    /// By listener: those that speak TLS.
    certificates: RwLock<BTreeMap<&'static str, Timestamp>>,
    /// `None`: no service account may sign.
    cluster_keys: RwLock<Option<Timestamp>>,
    staleness_limit_millis: AtomicU64,
    admin_auth_failures: AtomicU64,
    notices: [AtomicU64; NoticeOutcome::COUNT],
    notices_oldest_millis: AtomicU64,
    config_last_reload_successful: AtomicU64,
    clock_frozen: AtomicU64,
    alarms: [AtomicU64; Alarm::COUNT],
    process: Process,
}

struct RegisteredKeyset {
    issuer: Name,
    series: Arc<KeysetSeries>,
}

struct KeysetSeries {
    /// By backend: one, unless the configuration moved the keyset from one backend to another.
    lanes: RwLock<BTreeMap<&'static str, Arc<SigningLane>>>,
    rejections: [AtomicU64; SignRejection::COUNT],
    keys: [AtomicU64; KeyState::ALL.len()],
    activated_millis: AtomicU64,
    next_rotation_millis: AtomicU64,
    overdue_millis: AtomicU64,
    rotations: [AtomicU64; RotationTrigger::COUNT],
    rotation_failures: [[AtomicU64; RotationFailureReason::COUNT]; RotationStep::COUNT],
    standby_ready: AtomicU64,
    standby_expected_millis: AtomicU64,
    hold: AtomicU64,
    drained: AtomicU64,
    confirmed_millis: AtomicU64,
    /// A bit per [`Alarm`].
    alarms: AtomicU32,
}

/// What a keyset's signing in one backend counts.
struct SigningLane {
    /// By position in [`Algorithm::ALL_ALGS`]; shown where the bit in `algs` is set.
    signatures: [AtomicU64; Algorithm::ALL_ALGS.len()],
    algs: AtomicU32,
    failures: [AtomicU64; SigningFailure::COUNT],
    duration: Histogram,
}

struct IssuerSeries {
    requests: [AtomicU64; JwksCode::COUNT],
    publication_mismatch: AtomicU64,
    publishers: RwLock<BTreeMap<Name, Arc<PublisherSeries>>>,
}

#[derive(Default)]
struct PublisherSeries {
    placed_millis: AtomicU64,
    failures: AtomicU64,
}

struct BackendSeries {
    requests: [[AtomicU64; BackendOutcome::COUNT]; BackendOperation::COUNT],
    durations: [Histogram; BackendOperation::COUNT],
}

impl Series {
    fn new() -> Self {
        Series {
            keysets: RwLock::default(),
            issuers: RwLock::default(),
            backends: RwLock::default(),
            certificates: RwLock::default(),
            cluster_keys: RwLock::default(),
            staleness_limit_millis: AtomicU64::new(0),
            admin_auth_failures: AtomicU64::new(0),
            notices: zeros(),
            notices_oldest_millis: AtomicU64::new(0),
            config_last_reload_successful: AtomicU64::new(0),
            clock_frozen: AtomicU64::new(0),
            alarms: zeros(),
            process: Process::new(),
        }
    }
}

impl KeysetSeries {
    fn new() -> Self {
        KeysetSeries {
            lanes: RwLock::default(),
            rejections: zeros(),
            keys: zeros(),
            activated_millis: AtomicU64::new(0),
            next_rotation_millis: AtomicU64::new(0),
            overdue_millis: AtomicU64::new(0),
            rotations: zeros(),
            rotation_failures: std::array::from_fn(|_| zeros()),
            standby_ready: AtomicU64::new(0),
            standby_expected_millis: AtomicU64::new(0),
            hold: AtomicU64::new(0),
            drained: AtomicU64::new(0),
            confirmed_millis: AtomicU64::new(0),
            alarms: AtomicU32::new(0),
        }
    }
}

impl SigningLane {
    fn new() -> Self {
        SigningLane { signatures: zeros(), algs: AtomicU32::new(0), failures: zeros(), duration: Histogram::new() }
    }
}

impl IssuerSeries {
    fn new() -> Self {
        IssuerSeries { requests: zeros(), publication_mismatch: AtomicU64::new(0), publishers: RwLock::default() }
    }
}

impl BackendSeries {
    fn new() -> Self {
        BackendSeries {
            requests: std::array::from_fn(|_| zeros()),
            durations: std::array::from_fn(|_| Histogram::new()),
        }
    }
}

// The alarms of a keyset are the bits of a u32.
const _: () = assert!(Alarm::COUNT <= 32);

fn zeros<const N: usize>() -> [AtomicU64; N] {
    std::array::from_fn(|_| AtomicU64::new(0))
}

fn alg_index(algorithm: Algorithm) -> usize {
    let alg = algorithm.alg();
    Algorithm::ALL_ALGS.iter().position(|&known| known == alg).expect("ALL_ALGS names every alg")
}

fn millis(span: Span) -> u64 {
    span.as_millis().unsigned_abs()
}

fn store_timestamp(gauge: &AtomicU64, at: Option<Timestamp>) {
    gauge.store(at.map_or(0, |at| at.as_millis().unsigned_abs()), Relaxed);
}

/// A map of counters is never left half changed, so a panic elsewhere does not spoil it.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
