//! What lies ahead, by a clock that the test moves.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::config::{Receiver, SecretSource};
use jwksd::engine::notices::{Addressee, Deliver, NotDelivered};
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings};
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::notice::{Event, Notice};
use jwksd::keyring::policy::{IssuerPolicy, Policy, RotationPolicy};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::Store;
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::telemetry::metrics::Metrics;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::policy::policy as hourly;
use crate::support::{PATIENCE, eventually};

const EVERY: Span = Span::from_secs(3 * 3600);

/// Keeps what is delivered, with the time at which it was.
#[derive(Clone, Default)]
struct Desk {
    taken: Arc<Mutex<Vec<(Timestamp, String, Value)>>>,
    refuses: Arc<Mutex<bool>>,
}

#[async_trait]
impl Deliver for Desk {
    async fn deliver(&self, notice: &Notice, now: Timestamp) -> Result<(), NotDelivered> {
        if *self.refuses.lock().unwrap() {
            return Err(NotDelivered::Later { problem: "as a test".to_owned(), after: None });
        }
        let body = serde_json::from_slice(&notice.body()).unwrap();
        self.taken.lock().unwrap().push((now, notice.id.clone(), body));
        Ok(())
    }
}

impl Desk {
    fn all(&self) -> Vec<(Timestamp, String, Value)> {
        self.taken.lock().unwrap().clone()
    }

    fn of(&self, event: &str) -> Vec<(Timestamp, String, Value)> {
        self.all().into_iter().filter(|(_, _, body)| body["type"] == event).collect()
    }
}

struct Site {
    engine: Arc<Engine>,
    clock: Arc<ManualClock>,
    desk: Desk,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Site {
    async fn start(
        store: &Arc<dyn Store>,
        seal: &Arc<dyn KeyEncryptionKey>,
        clock: &Arc<ManualClock>,
        desk: &Desk,
        events: &[Event],
    ) -> Site {
        let trusted = Arc::new(TrustedClock::new(clock.clone(), Span::SECOND));
        let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal.clone()) };
        let ledger = match Ledger::open(store.clone(), std::slice::from_ref(seal)).await {
            Ok(ledger) => ledger,
            Err(_) => Ledger::initialise(store.clone(), SealEvidence::Unknown, make, trusted.now()).await.unwrap(),
        };
        let ledger = Arc::new(ledger);
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(ledger.keys()))];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
        engine.configure(&[declared(true)]).await.unwrap();
        engine.resume().await;
        engine.reconcile_all().await;
        engine.confirm_created().await.unwrap();
        engine.opened().await;
        engine.pulse().await;
        let receiver = Receiver {
            name: Name::parse("desk").unwrap(),
            url: "https://desk.example".to_owned(),
            secret: SecretSource::Environment("UNUSED".to_owned()),
            events: events.to_vec(),
            keysets: None,
            before: vec![Span::MINUTE.times(10), Span::HOUR, Span::DAY],
            ca_file: None,
            timeout: Span::SECOND,
            give_up_after: Span::DAY,
        };
        engine.tell(vec![Addressee { receiver, line: Arc::new(desk.clone()) }]);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(engine.clone().watch_notices(cancel.clone()));
        let site = Site { engine, clock: clock.clone(), desk: desk.clone(), cancel, task };
        site.settle().await;
        site
    }

    async fn new(events: &[Event]) -> (Site, Arc<dyn Store>, Arc<dyn KeyEncryptionKey>) {
        let (store, seal): (Arc<dyn Store>, Arc<dyn KeyEncryptionKey>) =
            (Arc::new(MemoryStore::new()), Arc::new(FileKey::ephemeral()));
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        (Site::start(&store, &seal, &clock, &Desk::default(), events).await, store, seal)
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
        self.engine.stop().await;
    }

    /// Lets the task see what there is.
    async fn settle(&self) {
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }

    async fn pass(&self, span: Span) {
        let end = self.engine.clock.now() + span;
        while self.engine.clock.now() < end {
            self.clock.advance(Span::from_secs(20).min(end.since(self.engine.clock.now())));
            self.engine.pulse().await;
            self.engine.reconcile_all().await;
            self.settle().await;
        }
    }

    async fn ask(&self, intent: Intent) {
        let (actor, reason) = ("operator".to_owned(), Some("test".to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        self.engine.command(&self.engine.keyset("a").unwrap(), request).await.unwrap();
        self.engine.reconcile_all().await;
        self.settle().await;
    }

    fn due(&self) -> Timestamp {
        let cell = self.engine.keyset("a").unwrap();
        self.engine.look(&cell).outlook.next_rotation.unwrap().at
    }
}

fn declared(fits: bool) -> Declared {
    let base = hourly("main", "https://issuer.example");
    let policy = Policy {
        issuer: IssuerPolicy { max_age: Span::MINUTE, caches: vec![Span::MINUTE], ..base.issuer },
        rotation: RotationPolicy {
            schedule: Schedule::Every(EVERY),
            propagation: Span::from_secs(120),
            successors: 2,
            ..base.rotation
        },
        ..base
    };
    Declared { name: Name::parse("a").unwrap(), policy: Arc::new(policy), fits }
}

fn at(value: &Value) -> Timestamp {
    Timestamp::parse_rfc3339(value.as_str().unwrap()).unwrap()
}

#[tokio::test]
async fn a_rotation_is_announced_at_its_times_once_whatever_restarts() {
    let (site, store, seal) = Site::new(&Event::ALL).await;
    site.pass(Span::MINUTE.times(5)).await;
    let due = site.due();
    let before = site.engine.clock.now();
    site.pass((due - Span::HOUR - Span::SECOND).since(before)).await;
    assert!(site.desk.of("rotation.upcoming").is_empty(), "a day is longer than the wait, an hour not yet");
    site.pass(Span::SECOND).await;
    let (told_at, id, body) = site.desk.of("rotation.upcoming").pop().expect("an hour before");
    assert_eq!((told_at, at(&body["data"]["at"]), at(&body["timestamp"])), (due - Span::HOUR, due, due - Span::HOUR));
    let keyring = site.engine.keyset("a").unwrap().snapshot.load().keyring.clone();
    assert_eq!(body["data"]["predecessor"]["kid"], keyring.active().unwrap().kid.as_str());
    let successor = body["data"]["kid"].as_str().unwrap().to_owned();

    let (clock, desk) = (site.clock.clone(), site.desk.clone());
    site.stop().await;
    let site = Site::start(&store, &seal, &clock, &desk, &Event::ALL).await;
    site.pass(Span::MINUTE.times(49)).await;
    assert_eq!(site.desk.of("rotation.upcoming").len(), 1, "it was told before the restart");
    site.pass(Span::MINUTE).await;
    let told = site.desk.of("rotation.upcoming");
    assert_eq!(told.len(), 2);
    assert_eq!(told[1].0, due - Span::MINUTE.times(10));
    assert_ne!(told[1].1, id);
    site.pass(Span::MINUTE.times(11)).await;
    let activated = site.desk.of("key.activated").pop().unwrap();
    assert_eq!(activated.2["data"]["kid"], successor.as_str());
    assert_eq!(at(&activated.2["data"]["at"]), due);
    assert_eq!(site.desk.of("rotation.upcoming").len(), 2);
    assert!(site.desk.of("rotation.rescheduled").is_empty());
    site.stop().await;
}

#[tokio::test]
async fn a_hold_puts_an_announced_rotation_off_and_its_end_announces_it_again() {
    let (site, ..) = Site::new(&Event::ALL).await;
    site.pass(Span::MINUTE.times(125)).await;
    let due = site.due();
    assert_eq!(site.desk.of("rotation.upcoming").len(), 1);
    site.ask(Intent::Hold { until: None }).await;
    site.pass(Span::SECOND.times(2)).await;
    let (_, first, body) = site.desk.of("rotation.rescheduled").pop().expect("that it is put off");
    assert_eq!((&body["data"]["at"], at(&body["data"]["was"])), (&Value::Null, due));
    assert_eq!(body["data"]["blocked_by"], serde_json::json!(["hold"]));
    site.pass(Span::MINUTE).await;
    assert_eq!(site.desk.of("rotation.rescheduled").len(), 1, "once");
    site.ask(Intent::Resume).await;
    site.pass(Span::SECOND.times(2)).await;
    let rescheduled = site.desk.of("rotation.rescheduled");
    assert_eq!(rescheduled.len(), 2);
    assert_eq!(at(&rescheduled[1].2["data"]["at"]), due);
    assert_ne!(rescheduled[1].1, first);
    let now = site.engine.clock.now();
    site.pass(due.since(now)).await;
    // The remaining lead, and never one that the other announcement covered.
    assert_eq!(site.desk.of("rotation.upcoming").len(), 2);
    let ids: std::collections::BTreeSet<String> = site.desk.all().into_iter().map(|(_, id, _)| id).collect();
    assert_eq!(ids.len(), site.desk.all().len(), "no two notices have one id");
    site.stop().await;
}

#[tokio::test]
async fn an_alarm_is_told_once_it_lasts_and_when_it_is_over() {
    let (site, ..) = Site::new(&[Event::AlarmRaised, Event::AlarmCleared]).await;
    site.pass(Span::MINUTE.times(5)).await;
    assert!(site.desk.all().is_empty(), "{:?}", site.desk.all());
    site.engine.configure(&[declared(false)]).await.unwrap();
    site.pass(Span::from_secs(8)).await;
    site.engine.configure(&[declared(true)]).await.unwrap();
    site.pass(Span::MINUTE).await;
    assert!(site.desk.all().is_empty(), "it was over within seconds");
    site.engine.configure(&[declared(false)]).await.unwrap();
    site.pass(Span::MINUTE).await;
    let raised = site.desk.all();
    assert_eq!(raised.len(), 1);
    assert_eq!((&raised[0].2["type"], &raised[0].2["data"]["alarm"]), (&"alarm.raised".into(), &"degraded".into()));
    site.engine.configure(&[declared(true)]).await.unwrap();
    site.pass(Span::MINUTE).await;
    let all = site.desk.all();
    assert_eq!(all.len(), 2);
    assert_eq!((&all[1].2["type"], &all[1].2["data"]["alarm"]), (&"alarm.cleared".into(), &"degraded".into()));
    site.stop().await;
}

#[tokio::test]
async fn what_leaves_the_journal_untold_is_counted_and_the_rest_follows() {
    let (site, ..) = Site::new(&[Event::HoldSet]).await;
    site.ask(Intent::Hold { until: None }).await;
    eventually("the first", PATIENCE, async || (site.desk.all().len() == 1).then_some(())).await;
    *site.desk.refuses.lock().unwrap() = true;
    for _ in 0..300 {
        site.ask(Intent::Hold { until: None }).await;
    }
    *site.desk.refuses.lock().unwrap() = false;
    site.pass(Span::MINUTE.times(10)).await;
    let taken = site.desk.all();
    // What was in hand when the receiver began to refuse, and what the journal still had.
    assert!(taken.len() >= 200 && taken.len() < 300, "{}", taken.len());
    let text = site.engine.metrics.render(None).1;
    let dropped = text.lines().find(|line| line.starts_with("jwksd_notices_total{outcome=\"dropped\"}")).unwrap();
    let dropped: usize = dropped.rsplit(' ').next().unwrap().parse().unwrap();
    assert_eq!(taken.len() + dropped, 301);
    site.stop().await;
}
