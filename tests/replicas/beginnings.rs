//! Machines that came up a moment ago, issuers that begin incomplete, keysets that move.

use std::sync::Arc;
use std::time::Duration;

use jwksd::clock::{Clock, ManualClock, TrustedClock};
use jwksd::engine::{Engine, Records, ReplicaRole, Settings};
use jwksd::keyring::decide::Intent;
use jwksd::keyring::policy::Policy;
use jwksd::keyring::record::KeyState;
use jwksd::keyring::time::Span;
use jwksd::store::Store;
use jwksd::store::ledger::Unauthenticated;
use jwksd::store::memory::MemoryStore;
use jwksd::store::shared::SharedStore;
use jwksd::store::split::Split;
use jwksd::telemetry::metrics::{Metrics, SigningFailure};

use super::held::Gate;
use super::replica::{SKEW, declare, policy};
use super::{World, refusal};

#[tokio::test]
async fn what_was_confirmed_long_before_the_machine_came_up_is_stale() {
    let mut patient = policy();
    patient.rotation.staleness_limit = Span::HOUR;
    let mut world = World::new();
    let clock = world.clock();
    let manager = world.common.start(ReplicaRole::Manager, &clock, &[("default", patient)]).await;
    world.replicas.push(manager);
    let (own, link) = (Arc::new(MemoryStore::new()), world.common.hub.link());
    let clock = world.clock();
    let signer = world.common.start_over(ReplicaRole::Signer, &clock, &[], link.clone(), own.clone()).await;
    world.replicas.push(signer);
    world.pass(Span::from_secs(5)).await;
    world.replicas[1].sign().await.unwrap();
    drop(world.replicas.pop());
    link.set_cut(true);
    // Up for less than S, after a night.
    let later = ManualClock::at(world.clocks[0].wall() + Span::HOUR.times(5));
    assert!(later.boot() < Span::HOUR);
    let again = world.common.start_over(ReplicaRole::Signer, &later, &[], link, own).await;
    again.engine.pulse().await;
    assert_eq!(refusal(&again).await, Some(SigningFailure::StaleKeyring));
}

/// A KMS that holds the seal is away when one replica starts; the others go on.
#[tokio::test]
async fn a_replica_whose_seal_is_away_follows_what_others_write() {
    let mut world = World::new();
    world.join(ReplicaRole::Manager).await;
    world.pass(Span::from_secs(20)).await;
    let clock = world.clock();
    let store: Arc<dyn Store> = Arc::new(Split::new(world.common.hub.link(), Arc::new(MemoryStore::new())));
    let claims = Unauthenticated::read(store).await.unwrap();
    let trusted = Arc::new(TrustedClock::new(clock, SKEW));
    let settings = Settings {
        sign_deadline: Span::SECOND,
        audit_signatures: false,
        pool_size: 1,
        role: ReplicaRole::Manager,
        publishes: true,
    };
    let sealed = Engine::new(trusted, Records::Sealed(claims), [], None, Arc::new(Metrics::new()), settings);
    sealed.configure_sealed(&[declare("default", policy())]).await.unwrap();
    sealed.opened().await;
    let served = || {
        let document = sealed.directory().issuers[0].served().unwrap();
        String::from_utf8_lossy(&document.body).into_owned()
    };
    let manager = &world.replicas[0];
    let revoked = manager.sign().await.unwrap().kid.to_string();
    assert!(served().contains(&revoked));
    manager.command(Intent::Revoke { serial: manager.active().unwrap() }).await.unwrap();
    sealed.look_at_store(Span::ZERO).await.unwrap();
    assert!(!served().contains(&revoked), "it publishes on what was revoked");
    assert!(served().contains(manager.sign().await.unwrap().kid.as_str()));
    assert!(sealed.missing_to_publish().is_empty(), "{:?}", sealed.missing_to_publish());
    // The others know that it publishes, and what.
    sealed.attend_once().await.unwrap();
    let reported = world.common.hub.link().replicas(Span::MINUTE).await.unwrap();
    let own = reported.iter().find(|other| other.report.replica == sealed.replica()).unwrap();
    let generation = own.report.generations.values().copied().max();
    assert_eq!((own.report.publishes, generation), (true, Some(manager.generation())));
    assert!(!own.report.tells, "receivers of notices hear nothing from it");
}

#[tokio::test]
async fn a_command_whose_answer_was_lost_and_that_was_overtaken_is_not_done_twice() {
    let mut world = World::new();
    for _ in 0..2 {
        world.join(ReplicaRole::Manager).await;
    }
    world.pass(Span::from_secs(20)).await;
    let second = world.replicas.pop().unwrap();
    let first = &world.replicas[0];
    let before = first.active().unwrap();
    let hold = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(second.command(Intent::Hold { until: None })).unwrap();
    };
    // In a thread of its own: a runtime cannot be entered from within another.
    first.link.lose_next_answer_while(move || std::thread::spawn(hold).join().unwrap());
    let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
    let outcome = first.command(rotate).await.unwrap();
    assert_eq!(first.active(), Some(before + 1), "{outcome:?}");
    assert!(first.cell().snapshot.load().keyring.hold.is_some(), "what overtook it was taken up");
}

#[tokio::test]
async fn an_issuer_goes_on_without_a_keyset_whose_first_key_cannot_be_made() {
    let mut world = World::new();
    let clock = world.clock();
    let unmakeable = Policy { backend: "aws-kms".to_owned(), ..policy() };
    let policies = [("default", policy()), ("other", unmakeable)];
    let manager = world.common.start(ReplicaRole::Manager, &clock, &policies).await;
    world.replicas.push(manager);
    world.pass(Span::from_secs(2)).await;
    let issued = world.replicas[0].sign().await.unwrap();
    assert!(world.replicas[0].served().unwrap().contains(&issued.kid.to_string()));
    assert!(!world.replicas[0].cell_of("other").snapshot.load().keyring.first, "it is not a first one any more");
}

#[tokio::test]
async fn a_keyset_that_moved_to_another_issuer_stays_there() {
    let mut world = World::new();
    for _ in 0..2 {
        world.join(ReplicaRole::Manager).await;
    }
    world.pass(Span::from_secs(20)).await;
    world.replicas[0].command(Intent::Drain).await.unwrap();
    world.pass(Span::MINUTE).await;
    let mut elsewhere = policy();
    elsewhere.issuer.url = "https://auth.example.com/elsewhere".to_owned();
    let [first, second] = &world.replicas[..] else { unreachable!() };
    first.engine.configure(&[declare("default", elsewhere.clone())]).await.unwrap();
    world.pass(Span::from_secs(5)).await;
    let generation = first.generation();
    assert_eq!(first.cell().snapshot.load().keyring.policy.issuer.url, elsewhere.issuer.url);
    world.pass(Span::from_secs(5)).await;
    assert_eq!(first.generation(), generation, "nobody moves it back");
    for issuer in &second.engine.directory().issuers {
        let Some(document) = issuer.served() else { continue };
        let text = String::from_utf8_lossy(&document.body).into_owned();
        let keyring = first.cell().snapshot.load().keyring.clone();
        let shown = keyring.published().any(|key| text.contains(key.kid.as_str()));
        assert!(!shown || issuer.url == elsewhere.issuer.url, "its keys stand in the document of {}", issuer.url);
    }
}

/// It knows nothing of the drain when it wants to add the key, and loses against what drained the keyset.
#[tokio::test]
async fn a_key_elsewhere_that_another_replica_overtook_is_destroyed() {
    let mut world = World::new();
    let gate = Arc::<Gate>::default();
    world.common.gate = Some(gate.clone());
    let first = world.join(ReplicaRole::Manager).await;
    let second = world.join(ReplicaRole::Manager).await;
    world.pass(Span::from_secs(30)).await;
    let (first, second) = (&world.replicas[first], &world.replicas[second]);
    let next = first.cell().snapshot.load().keyring.next_serial;
    gate.close();
    let (engine, clocks) = (first.engine.clone(), world.clocks.clone());
    let ticks = tokio::spawn(async move {
        loop {
            clocks.iter().for_each(|clock| clock.advance(Span::from_millis(500)));
            let _ = engine.look_at_store(Span::ZERO).await;
            let _ = engine.attend_once().await;
            engine.reconcile_all().await;
            engine.pulse().await;
        }
    });
    tokio::time::timeout(Duration::from_secs(30), gate.reached()).await.expect("a successor is made");
    second.engine.look_at_store(Span::ZERO).await.unwrap();
    second.command(Intent::Drain).await.unwrap();
    gate.open();
    let ended = async {
        loop {
            let keyring = first.cell().snapshot.load().keyring.clone();
            if let Some(key) = keyring.key(next) {
                return (key.state, key.published_at.is_some(), keyring.drained);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(30), ended).await.expect("the key joins");
    ticks.abort();
    assert_eq!(ended, (KeyState::Retired, false, true));
}
