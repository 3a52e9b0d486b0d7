//! Months of rotations on a clock that the test moves: what was foreseen happens, and how the page looks by then.

use std::collections::BTreeMap;
use std::sync::Arc;

use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{Clock, ManualClock, TrustedClock};
use jwksd::config::{Format, Role, Source, load};
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings};
use jwksd::http::admin::{AdminState, Reload, router};
use jwksd::http::auth::{Authenticator, TokenSet};
use jwksd::http::certificate::{CertificateSet, Certificates};
use jwksd::http::listener::{BoundListener, ListenAddress, ListenerOptions};
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::record::{KeyState, Serial};
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timeline::{Timeline, Window};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::telemetry::metrics::Metrics;
use tokio_util::sync::CancellationToken;

use crate::browser::Browser;

/// Believable, and with caches so long that a daemon may look at its clock every half hour.
const TABLES: &str = r#"
[public]
listen = "127.0.0.1:8620"
[store]
kind = "file"
path = "data/keyrings"
[seal]
kind = "file"
path = "data/seal.key"
[issuer.main]
url = "https://auth.example.com"
max_age = "1h"
[issuer.partners]
url = "https://auth.example.com/partners"
max_age = "1h"
[keyset.default]
issuer = "main"
algorithm = "ES256"
[keyset.default.rotation]
every = "30d"
propagation = "4d"
verifiers = ["envoy", "vault"]
[keyset.default.tokens]
max_ttl = "36h"
[keyset.partners]
issuer = "partners"
algorithm = "EdDSA"
[keyset.partners.rotation]
schedule = "0 10 * * 2"
timezone = "Europe/Berlin"
propagation = "2d"
successors = 1
verifiers = ["36h"]
[keyset.partners.tokens]
max_ttl = "12h"
"#;

const STEP: Span = Span::MINUTE.times(30);

const TOKEN: &str = "a-token-long-enough-to-be-taken-for-one-0123456789";

struct World {
    engine: Arc<Engine>,
    clock: Arc<ManualClock>,
}

impl World {
    async fn at(start: &str) -> World {
        let clock = ManualClock::at(Timestamp::parse_rfc3339(start).unwrap());
        let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
        let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal) };
        let store = Arc::new(MemoryStore::new());
        let ledger = Ledger::initialise(store, SealEvidence::Unknown, make, clock.wall()).await.unwrap();
        let ledger = Arc::new(ledger);
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(ledger.keys()))];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let trusted = Arc::new(TrustedClock::new(clock.clone(), Span::MINUTE));
        let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
        let source = Source::Text { name: "test".into(), text: TABLES.into(), format: Format::Toml };
        let loaded = load(&source, std::iter::empty()).unwrap();
        assert!(loaded.timing.is_empty(), "{:?}", loaded.timing);
        let declared = loaded.config.keysets.into_iter();
        let declared: Vec<Declared> =
            declared.map(|k| Declared { name: k.name, policy: k.policy, fits: true }).collect();
        engine.configure(&declared).await.unwrap();
        engine.resume().await;
        engine.reconcile_all().await;
        engine.opened().await;
        engine.reconcile_all().await;
        World { engine, clock }
    }

    async fn pass(&self, span: Span) {
        for _ in 0..span.as_millis() / STEP.as_millis() {
            self.clock.advance(STEP);
            self.engine.pulse().await;
            self.engine.reconcile_all().await;
        }
    }

    async fn command(&self, intent: Intent, reason: &str) {
        let (actor, reason) = ("alice".to_owned(), Some(reason.to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        self.engine.command(&self.engine.keyset("default").unwrap(), request).await.unwrap();
    }

    fn timeline(&self, keyset: &str, window: Window) -> Timeline {
        self.engine.timeline(&self.engine.keyset(keyset).unwrap(), |_| window)
    }

    fn states(&self, keyset: &str) -> BTreeMap<Serial, KeyState> {
        let snapshot = self.engine.keyset(keyset).unwrap().snapshot.load_full();
        snapshot.keyring.keys.iter().map(|key| (key.serial, key.state)).collect()
    }
}

fn state_at(timeline: &Timeline, serial: Serial, at: Timestamp) -> Option<KeyState> {
    let lane = timeline.keys.iter().find(|lane| lane.serial == serial)?;
    lane.phases.iter().rfind(|phase| phase.from <= at).map(|phase| phase.state)
}

/// The daemon looks at its clock every half hour here, so moments may be that late.
#[tokio::test]
async fn what_a_timeline_foresees_is_what_the_daemon_does_and_later_tells_of_it() {
    let world = World::at("2026-10-01T09:00:00Z").await;
    world.pass(Span::DAY.times(3)).await;
    let window = Window { past: Span::DAY.times(4), ahead: Span::DAY.times(70) };
    let keysets = ["default", "partners"];
    let foreseen = keysets.map(|keyset| world.timeline(keyset, window));
    assert!(foreseen.iter().all(|timeline| timeline.rotations.len() >= 2), "{foreseen:?}");
    let mut compared = 0;
    for day in 0..69 {
        world.pass(Span::DAY).await;
        let now = world.clock.wall();
        for (keyset, foreseen) in keysets.iter().zip(&foreseen) {
            for (serial, state) in world.states(keyset) {
                let (told, before) = (state_at(foreseen, serial, now), state_at(foreseen, serial, now - STEP.times(6)));
                assert!(
                    [told, before].contains(&Some(state)),
                    "{keyset} key {serial} on day {day}: {state}, not {told:?}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 500, "{compared}");
    // What has become the past is told as it was foreseen.
    for (keyset, foreseen) in keysets.iter().zip(&foreseen) {
        let past = world.timeline(keyset, Window { past: Span::DAY.times(80), ahead: Span::ZERO });
        for rotation in &foreseen.rotations {
            let lane = past.keys.iter().find(|lane| lane.serial == rotation.serial).unwrap();
            let states: Vec<KeyState> = lane.phases.iter().map(|phase| phase.state).collect();
            let planned = foreseen.keys.iter().find(|lane| lane.serial == rotation.serial).unwrap();
            let planned: Vec<KeyState> = planned.phases.iter().map(|phase| phase.state).collect();
            assert!(
                states == planned || planned.starts_with(&states) || states.starts_with(&planned),
                "{states:?} {planned:?}"
            );
            let active = lane.phases.iter().find(|phase| phase.state == KeyState::Active).unwrap();
            let late = active.from.since(rotation.at);
            assert!(active.from >= rotation.at && late <= STEP.times(6), "{keyset} {rotation:?}: {late}");
        }
    }
}

#[tokio::test]
async fn a_timeline_tells_of_revoked_keys_and_foresees_nothing_while_the_clock_is_not_trusted() {
    let world = World::at("2026-10-01T09:00:00Z").await;
    world.pass(Span::DAY.times(10)).await;
    world.command(Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None }, "a drill").await;
    world.pass(Span::HOUR).await;
    world.command(Intent::Rollback, "too early").await;
    world.pass(Span::HOUR).await;
    world.command(Intent::Revoke { serial: 1 }, "leaked").await;
    world.command(Intent::Hold { until: None }, "until it is understood").await;
    world.pass(Span::HOUR).await;
    let window = Window { past: Span::DAY.times(20), ahead: Span::DAY.times(60) };
    let told = world.timeline("default", window);
    let now = world.clock.wall();
    assert_eq!(state_at(&told, 1, now), Some(KeyState::Revoked), "{told:?}");
    for (serial, state) in world.states("default") {
        assert_eq!(state_at(&told, serial, now), Some(state), "key {serial}: {told:?}");
    }
    for lane in &told.keys {
        assert!(
            lane.phases.windows(2).all(|two| two[0].until == Some(two[1].from) && two[0].from < two[1].from),
            "{lane:?}"
        );
        assert_eq!(lane.phases.last().and_then(|last| last.until), None, "{lane:?}");
    }
    assert!(told.rotations.is_empty() && !told.stands_still, "a hold without end: {told:?}");
    // What ended before the window is nothing to see.
    let later = world.timeline("default", Window { past: Span::MINUTE, ..window });
    assert!(later.keys.iter().all(|lane| lane.serial != 1), "{later:?}");

    world.command(Intent::Resume, "understood").await;
    assert!(!world.timeline("default", window).rotations.is_empty());
    world.clock.step_to(now + Span::DAY.times(400));
    let frozen = world.timeline("default", window);
    assert!(frozen.stands_still && frozen.rotations.is_empty(), "{frozen:?}");
    assert!(frozen.keys.iter().all(|lane| lane.kid.is_some()), "no key is to come: {frozen:?}");

    let known = world.engine.replicas(Span::HOUR).await.unwrap();
    assert!(known.complete && known.others.is_empty() && known.own.publishes, "a store in memory has one user");
    assert_eq!(known.own.replica, world.engine.replica());
}

#[tokio::test]
async fn the_page_shows_months_as_in_the_picture_of_the_readme() {
    let world = World::at("2026-09-14T08:00:00Z").await;
    world.pass(Span::DAY.times(45)).await;
    let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
    world.command(rotate, "quarterly drill, CHG-2207").await;
    world.pass(Span::DAY.times(31)).await;
    let mut tokens = TokenSet::default();
    tokens.insert(Name::parse("alice").unwrap(), TOKEN.as_bytes(), Role::Operator).unwrap();
    let clock = world.clock.clone();
    let reload: Reload = Arc::new(|| Box::pin(async { Ok(Default::default()) }));
    let same_clock = clock.clone();
    let certificates = Arc::new(Certificates::new(CertificateSet::default(), move || same_clock.wall()));
    let tokens = Arc::new(Authenticator::new(tokens, move || clock.wall()));
    let state = AdminState { engine: world.engine.clone(), tokens, certificates, reload, page: true };
    let bound = BoundListener::bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let ListenAddress::Tcp(address) = bound.local_addr().clone() else { unreachable!("TCP was asked for") };
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(bound.serve(router(state), ListenerOptions::new("admin"), shutdown.clone()));

    let browser = Browser::open(&format!("http://{address}/"), 1180, 975).await;
    browser.until("document.activeElement.id === 'token'").await;
    browser.type_text(TOKEN).await;
    browser.press("Enter").await;
    for keyset in ["default", "partners"] {
        let drawn =
            |class: &str| format!("document.querySelectorAll('[data-keyset={keyset}] svg .bar{class}').length > 1");
        browser.until(&drawn(".active:not(.coming)")).await;
        browser.until(&drawn(".active.coming")).await;
        browser.until(&drawn(".standby.coming")).await;
    }
    browser.shows("[data-keyset=default]", "healthy").await;
    browser.shows("#audit", "quarterly drill").await;
    browser.eval("document.activeElement.blur()").await;
    // With JWKSD_TEST_PICTURES=FOLDER they stay: admin-page.png is the README's, the others are to look at.
    let folder = tempfile::TempDir::new().unwrap();
    let asked = std::env::var_os("JWKSD_TEST_PICTURES").map(std::path::PathBuf::from);
    let folder = asked.as_deref().unwrap_or(folder.path());
    let picture = folder.join("admin-page.png");
    browser.screenshot(&picture).await;
    assert!(std::fs::metadata(&picture).unwrap().len() < 200_000, "the picture fits the repository");
    browser.click("[data-focus='default/rotate']").await;
    browser.shows("#dialog-answer", "standby → active").await;
    browser.screenshot(&folder.join("admin-page-dialog.png")).await;
    browser.press("Escape").await;
    browser.dark(true).await;
    browser.screenshot(&folder.join("admin-page-dark.png")).await;
    let ground = browser.eval("getComputedStyle(document.documentElement).backgroundColor").await;
    assert_eq!(ground, "rgb(20, 24, 23)");
    browser.resize(360, 900).await;
    browser.until("document.documentElement.scrollWidth <= 360").await;
    browser.screenshot(&folder.join("admin-page-narrow.png")).await;
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    shutdown.cancel();
    served.await.unwrap();
}
