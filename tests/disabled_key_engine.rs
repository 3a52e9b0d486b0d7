//! A key that its backend disabled (DESIGN §10), by the engine's own clock: confirmed, then one switch an hour to a
//! successor that just signed. `tests/key_disabled.rs` shows the same from outside, without the hour.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "support/local_keys.rs"]
mod local_keys;
#[path = "support/policy.rs"]
mod policy;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, BackendErrorKind, LocalSigner, RemoteSigner, Signer, StoredKey};
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings, SignFailure};
use jwksd::keyring::change::AUDIT_KEPT;
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::outlook::Alarm;
use jwksd::keyring::policy::Policy;
use jwksd::keyring::record::{KeyState, Keyring, Serial};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::telemetry::metrics::{Metrics, SigningFailure};
use local_keys::LocalKeys;

const PROPAGATION: Span = Span::from_secs(120);

/// Keys as a service would hold them: each can be disabled, for good or for some signatures.
#[derive(Default)]
struct Disabled {
    /// Signatures that are refused from now on; `usize::MAX`: all.
    left: Mutex<BTreeMap<Serial, usize>>,
    tried: Mutex<BTreeSet<Serial>>,
    /// Signatures asked for.
    attempts: AtomicUsize,
}

struct Guarded {
    serial: Serial,
    signer: Arc<dyn LocalSigner>,
    disabled: Arc<Disabled>,
}

#[async_trait]
impl RemoteSigner for Guarded {
    async fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.disabled.tried.lock().unwrap().insert(self.serial);
        self.disabled.attempts.fetch_add(1, Ordering::SeqCst);
        if let Some(left) = self.disabled.left.lock().unwrap().get_mut(&self.serial).filter(|left| **left > 0) {
            *left -= usize::from(*left != usize::MAX);
            let kind = BackendErrorKind::KeyDisabled;
            return Err(BackendError { backend: "service", operation: "sign", kind, source: None });
        }
        self.signer.sign(message)
    }
}

struct Site {
    engine: Arc<Engine>,
    clock: Arc<ManualClock>,
    disabled: Arc<Disabled>,
    store: Arc<MemoryStore>,
    seal: Arc<dyn KeyEncryptionKey>,
}

impl Site {
    /// A keyset that signs and has all its successors propagated; no rotation is near.
    async fn settled() -> Site {
        Self::settled_as(ReplicaRole::All).await
    }

    async fn settled_as(role: ReplicaRole) -> Site {
        let store = Arc::new(MemoryStore::new());
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
        let disabled = Arc::new(Disabled::default());
        let engine = start(&store, &seal, &clock, &disabled, role).await;
        let site = Site { engine, clock, disabled, store, seal };
        site.pass(PROPAGATION + Span::MINUTE).await;
        assert_eq!(site.standbys(), [2, 3]);
        assert_eq!(site.sign().await.unwrap(), site.kid_of(1));
        site
    }

    /// As a daemon that lives: it shows that it does, and looks after its keyset.
    async fn pass(&self, span: Span) {
        let end = self.clock_now() + span;
        while self.clock_now() < end {
            self.clock.advance(Span::from_secs(20).min(end.since(self.clock_now())));
            self.engine.pulse().await;
            self.engine.reconcile_all().await;
        }
    }

    fn clock_now(&self) -> Timestamp {
        self.engine.clock.now()
    }

    fn disable(&self, serial: Serial) {
        self.disabled.left.lock().unwrap().insert(serial, usize::MAX);
    }

    async fn sign(&self) -> Result<String, SigningFailure> {
        let request = parse_request(br#"{"claims":{"sub":"s"}}"#).unwrap();
        match self.engine.sign(&self.cell(), &request, None, "test").await {
            Ok(issued) => Ok(issued.kid.to_string()),
            Err(SignFailure::Ours { reason, .. }) => Err(reason),
            Err(error @ (SignFailure::Claims(_) | SignFailure::Drained)) => panic!("{error}"),
        }
    }

    /// An application meets the disabled key, then the keyset's task looks into it.
    async fn meets_a_disabled_key(&self) {
        assert_eq!(self.sign().await, Err(SigningFailure::KeyDisabled));
        self.engine.reconcile_all().await;
    }

    async fn ask(&self, intent: Intent) {
        let (actor, reason) = ("operator".to_owned(), Some("test".to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        self.engine.command(&self.cell(), request).await.unwrap();
    }

    fn cell(&self) -> Arc<jwksd::engine::cell::KeysetCell> {
        self.engine.keyset("a").unwrap()
    }

    fn keyring(&self) -> Arc<Keyring> {
        self.cell().snapshot.load().keyring.clone()
    }

    fn active(&self) -> Serial {
        self.keyring().active().unwrap().serial
    }

    fn standbys(&self) -> Vec<Serial> {
        let keyring = self.keyring();
        keyring.keys.iter().filter(|key| key.state == KeyState::Standby).map(|key| key.serial).collect()
    }

    fn kid_of(&self, serial: Serial) -> String {
        self.keyring().key(serial).unwrap().kid.to_string()
    }

    fn alarmed(&self) -> bool {
        self.engine.look(&self.cell()).alarms.contains(&Alarm::KeyDisabled)
    }

    /// Audit entries of switches, as far as the log still has them.
    fn switches(&self) -> usize {
        let keyring = self.keyring();
        let audit = keyring.journal.audit.iter();
        audit.filter(|entry| entry.action == "promoted" && entry.reason.as_deref() == Some("key_disabled")).count()
    }
}

async fn start(
    store: &Arc<MemoryStore>,
    seal: &Arc<dyn KeyEncryptionKey>,
    clock: &Arc<ManualClock>,
    disabled: &Arc<Disabled>,
    role: ReplicaRole,
) -> Arc<Engine> {
    let trusted = Arc::new(TrustedClock::new(clock.clone(), Span::SECOND));
    let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal.clone()) };
    let ledger = Ledger::initialise(store.clone(), SealEvidence::Unknown, make, trusted.now()).await;
    let ledger = Arc::new(ledger.unwrap());
    let (keys, disabled) = (LocalBackend::new(ledger.keys()), disabled.clone());
    let open = move |key: &StoredKey, signer| {
        Signer::Remote(Arc::new(Guarded { serial: key.identity.serial, signer, disabled: disabled.clone() }))
    };
    let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalKeys { name: "service", keys, open })];
    let settings =
        Settings { sign_deadline: Span::SECOND, audit_signatures: false, pool_size: 1, role, publishes: true };
    let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
    let declared = Declared { name: Name::parse("a").unwrap(), policy: Arc::new(policy()), fits: true };
    engine.configure(&[declared]).await.unwrap();
    engine.resume().await;
    engine.reconcile_all().await;
    engine.confirm_created().await.unwrap();
    engine.opened().await;
    engine.pulse().await;
    engine.reconcile_all().await;
    engine
}

fn policy() -> Policy {
    let mut policy = policy::policy("main", "https://issuer.example");
    (policy.issuer.max_age, policy.issuer.caches) = (Span::MINUTE, vec![Span::MINUTE]);
    policy.backend = "service".to_owned();
    let rotation = &mut policy.rotation;
    (rotation.schedule, rotation.propagation) = (Schedule::Every(Span::DAY.times(30)), PROPAGATION);
    rotation.successors = 2;
    policy
}

#[tokio::test]
async fn a_disabled_key_is_replaced_once_an_hour() {
    let site = Site::settled().await;
    site.disable(1);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (2, 1, false));
    assert_eq!(site.sign().await.unwrap(), site.kid_of(2));
    let published = site.keyring().key(1).unwrap().state;
    assert_eq!(published, KeyState::Retiring, "what it signed is still valid");

    // All of the next hour: whoever disables keys does not run through all that wait.
    site.pass(PROPAGATION + Span::MINUTE).await;
    site.disable(2);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (2, 1, true));
    site.pass(Span::HOUR.saturating_sub(PROPAGATION + Span::MINUTE.times(2))).await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (2, 1, true));
    assert_eq!(site.sign().await, Err(SigningFailure::KeyDisabled));

    // After it nobody has to ask again.
    site.pass(Span::MINUTE.times(2)).await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (3, 2, false));
    assert_eq!(site.sign().await.unwrap(), site.kid_of(3));
}

#[tokio::test]
async fn a_busy_audit_log_and_a_restart_do_not_shorten_the_hour() {
    let mut site = Site::settled().await;
    site.disable(1);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches()), (2, 1));
    for _ in 0..AUDIT_KEPT {
        site.ask(Intent::Hold { until: None }).await;
        site.ask(Intent::Resume).await;
    }
    assert_eq!(site.switches(), 0, "the entry is pushed out");
    site.engine = start(&site.store, &site.seal, &site.clock, &site.disabled, ReplicaRole::All).await;
    site.disable(2);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (2, 0, true));
    site.pass(Span::HOUR + Span::MINUTE).await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (3, 1, false));
}

#[tokio::test]
async fn without_a_successor_that_signs_it_stays_and_alarms() {
    let site = Site::settled().await;
    for serial in 1..=3 {
        site.disable(serial);
    }
    site.disabled.tried.lock().unwrap().clear();
    site.meets_a_disabled_key().await;
    assert_eq!(*site.disabled.tried.lock().unwrap(), BTreeSet::from([1, 2, 3]), "each was tried");
    assert_eq!((site.active(), site.switches(), site.alarmed()), (1, 0, true));
    assert_eq!(site.standbys(), [2, 3], "none is used up");

    // One that signs again is taken at the next look.
    site.disabled.left.lock().unwrap().remove(&3);
    site.pass(Span::from_secs(20)).await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (3, 1, false));
}

#[tokio::test]
async fn successors_that_verifiers_may_not_know_yet_are_not_taken() {
    let site = Site::settled().await;
    // Everything that waits is new.
    for serial in [2, 3] {
        site.ask(Intent::Revoke { serial }).await;
    }
    site.engine.reconcile_all().await;
    assert!(site.standbys().is_empty());
    site.disable(1);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (1, 0, true));
    site.pass(PROPAGATION + Span::MINUTE).await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (4, 1, false));
}

#[tokio::test]
async fn a_propagation_that_was_raised_holds_for_successors_that_wait_already() {
    let site = Site::settled().await;
    let mut policy = policy();
    policy.rotation.propagation = Span::MINUTE.times(10);
    let declared = Declared { name: Name::parse("a").unwrap(), policy: Arc::new(policy), fits: true };
    site.engine.configure(&[declared]).await.unwrap();
    site.engine.reconcile_all().await;
    assert_eq!(site.standbys(), [2, 3]);
    site.disable(1);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (1, 0, true));
    site.pass(Span::MINUTE.times(10)).await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (2, 1, false));
}

#[tokio::test]
async fn a_report_that_does_not_hold_changes_nothing() {
    let site = Site::settled().await;
    let generation = site.keyring().generation;
    site.disabled.left.lock().unwrap().insert(1, 1);
    site.meets_a_disabled_key().await;
    assert_eq!((site.active(), site.switches(), site.alarmed()), (1, 0, false));
    assert_eq!(site.keyring().generation, generation, "nothing is written");
    assert_eq!(site.sign().await.unwrap(), site.kid_of(1));
}

#[tokio::test]
async fn a_disabled_key_is_noticed_although_nobody_asks_for_signatures() {
    let mut site = Site::settled().await;
    site.disable(1);
    // After a start it is not known whether the key signs, so the engine tries.
    site.engine = start(&site.store, &site.seal, &site.clock, &site.disabled, ReplicaRole::All).await;
    for _ in 0..100 {
        tokio::task::yield_now().await; // The attempt is a task of its own.
        site.pass(Span::from_secs(6)).await;
        if site.active() != 1 {
            break;
        }
    }
    assert_eq!((site.active(), site.switches()), (2, 1));
}

#[tokio::test]
async fn a_manager_that_nobody_asks_for_signatures_tries_by_itself() {
    let site = Site::settled_as(ReplicaRole::Manager).await;
    let before = site.disabled.attempts.load(Ordering::SeqCst);
    for _ in 0..60 {
        tokio::task::yield_now().await; // The attempt is a task of its own.
        site.pass(Span::from_secs(10)).await;
    }
    let attempts = site.disabled.attempts.load(Ordering::SeqCst) - before;
    assert!((10..=20).contains(&attempts), "every 30 seconds, not {attempts} times in ten minutes");
    site.disable(1);
    for _ in 0..100 {
        tokio::task::yield_now().await; // The attempt is a task of its own.
        site.pass(Span::from_secs(20)).await;
        if site.active() != 1 {
            break;
        }
    }
    assert_eq!((site.active(), site.switches()), (2, 1));
}
