//! Several replicas over one store, in one process and on clocks that the test moves: who writes, who adopts, who waits,
//! who stops.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "replicas/beginnings.rs"]
mod beginnings;
#[path = "replicas/held.rs"]
mod held;
#[path = "replicas/hub.rs"]
mod hub;
#[path = "support/policy.rs"]
mod policy;
#[path = "replicas/recovery.rs"]
mod recovery;
#[path = "replicas/replica.rs"]
mod replica;
#[path = "replicas/telling.rs"]
mod telling;

use std::sync::Arc;

use jwksd::clock::ManualClock;
use jwksd::engine::{CommandError, ReplicaRole, SignFailure};
use jwksd::keyring::decide::{Intent, Outcome, Request};
use jwksd::keyring::record::KeyState;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::store::Document;
use jwksd::store::memory::MemoryStore;
use jwksd::telemetry::metrics::SigningFailure;

use replica::{Common, LAG, Replica, SKEW, STALENESS, policy};

/// Replicas and their clocks, which run together.
struct World {
    common: Common,
    clocks: Vec<Arc<ManualClock>>,
    replicas: Vec<Replica>,
}

impl World {
    fn new() -> Self {
        let clock = ManualClock::at(Timestamp::from_millis(1_790_000_000_000));
        World { common: Common::new(clock.clone()), clocks: vec![clock], replicas: Vec::new() }
    }

    async fn with(roles: &[ReplicaRole]) -> Self {
        let mut world = World::new();
        for role in roles {
            world.join(*role).await;
        }
        world
    }

    /// A clock that shows what the others show.
    fn clock(&mut self) -> Arc<ManualClock> {
        let clock = ManualClock::at(jwksd::clock::Clock::wall(&*self.clocks[0]));
        self.clocks.push(clock.clone());
        clock
    }

    async fn join(&mut self, role: ReplicaRole) -> usize {
        let clock = self.clock();
        let replica = self.common.start(role, &clock, &[("default", policy())]).await;
        self.replicas.push(replica);
        self.replicas.len() - 1
    }

    async fn pass(&self, span: Span) {
        let step = Span::from_millis(500);
        for _ in 0..span.as_millis() / step.as_millis() {
            self.clocks.iter().for_each(|clock| clock.advance(step));
            for replica in &self.replicas {
                replica.tick().await;
            }
        }
    }

    async fn tick(&self) {
        for replica in &self.replicas {
            replica.tick().await;
        }
    }

    /// Every replica's tokens have a key that every replica publishes.
    async fn assert_agreement(&self) {
        for signer in &self.replicas {
            let Ok(issued) = signer.sign().await else { continue };
            for publisher in &self.replicas {
                let served = publisher.served().unwrap_or_default();
                assert!(served.contains(&issued.kid.to_string()), "{} is not in {served:?}", issued.kid);
            }
        }
    }
}

const ALL: ReplicaRole = ReplicaRole::All;
const MANAGER: ReplicaRole = ReplicaRole::Manager;
const SIGNER: ReplicaRole = ReplicaRole::Signer;

/// Why a replica does not sign.
async fn refusal(replica: &Replica) -> Option<SigningFailure> {
    match replica.sign().await {
        Ok(_) => None,
        Err(SignFailure::Ours { reason, .. }) => Some(reason),
        Err(error @ (SignFailure::Claims(_) | SignFailure::Drained)) => panic!("{error}"),
    }
}

#[tokio::test]
async fn replicas_share_one_keyring_through_rotations() {
    let world = World::with(&[ALL, ALL, SIGNER]).await;
    let mut actives = std::collections::BTreeSet::new();
    for _ in 0..180 {
        world.pass(Span::from_secs(2)).await;
        world.assert_agreement().await;
        let active: Vec<_> = world.replicas.iter().map(Replica::active).collect();
        actives.extend(active.iter().flatten().copied());
        assert!(world.replicas.iter().all(|replica| replica.frozen().is_none()));
    }
    assert!(actives.len() >= 6, "{actives:?}");
    let generations: Vec<_> = world.replicas.iter().map(Replica::generation).collect();
    assert!(generations.windows(2).all(|pair| pair[0] == pair[1]), "{generations:?}");
    // Each serial was made once: what a loser made was never stored.
    let keyring = world.replicas[0].cell().snapshot.load().keyring.clone();
    let serials: Vec<_> = keyring.keys.iter().map(|key| key.serial).collect();
    assert!(serials.windows(2).all(|pair| pair[0] < pair[1]), "{serials:?}");
}

#[tokio::test]
async fn a_replica_that_looked_before_another_made_the_keyset_starts_with_it() {
    let mut world = World::new();
    let (clock, link) = (world.clock(), world.common.hub.link());
    let looked = world.common.open(ALL, &clock, &link, Arc::new(MemoryStore::new())).await;
    world.join(ALL).await;
    let second = world.common.start_with(looked, ALL, &clock, &[("default", policy())], link).await;
    assert_eq!(second.active(), world.replicas[0].active());
    assert_eq!(second.frozen(), None);
}

#[tokio::test]
async fn of_two_that_write_one_wins_and_the_other_adopts_what_was_written() {
    let world = World::with(&[ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    let [first, second] = &world.replicas[..] else { unreachable!() };
    let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
    let before = first.active();
    first.command(rotate).await.unwrap();
    // The second has not looked since: its own request is decided on what the first wrote.
    assert_eq!(second.active(), before);
    second.command(Intent::Hold { until: None }).await.unwrap();
    assert_eq!(second.active(), first.active());
    assert_eq!(second.generation(), first.generation() + 1);
    world.tick().await;
    assert!(first.cell().snapshot.load().keyring.hold.is_some());
    assert!(world.replicas.iter().all(|replica| replica.frozen().is_none()));
}

#[tokio::test]
async fn a_write_whose_answer_was_lost_while_another_wrote_is_settled() {
    let world = World::with(&[ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    let [first, second] = &world.replicas[..] else { unreachable!() };
    first.link.lose_next_answer();
    first.command(Intent::Hold { until: None }).await.unwrap();
    world.tick().await;
    assert!(second.cell().snapshot.load().keyring.hold.is_some());
    first.link.lose_next_answer();
    first.link.set_cut(false);
    second.command(Intent::Resume).await.unwrap();
    world.tick().await;
    assert!(first.cell().snapshot.load().keyring.hold.is_none());
    assert!(first.frozen().is_none());
}

#[tokio::test]
async fn a_revocation_reaches_every_replica_at_its_next_look() {
    let world = World::with(&[MANAGER, SIGNER, SIGNER]).await;
    world.pass(Span::from_secs(20)).await;
    let signer = &world.replicas[1];
    let issued = signer.sign().await.unwrap();
    let serial = signer.active().unwrap();
    world.replicas[0].command(Intent::Revoke { serial }).await.unwrap();
    for replica in &world.replicas[1..] {
        replica.engine.look_at_store(Span::ZERO).await.unwrap();
        assert!(!replica.served().unwrap().contains(&issued.kid.to_string()));
        assert_ne!(replica.sign().await.unwrap().kid, issued.kid);
    }
}

#[tokio::test]
async fn a_revocation_names_replicas_that_may_not_hear_of_it() {
    let world = World::with(&[ALL, ALL, MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(20)).await;
    let [first, cut, ..] = &world.replicas[..] else { unreachable!() };
    let named =
        |outcome: Outcome| outcome.unconfirmed_replicas.map(|replicas| replicas.into_iter().collect::<Vec<_>>());
    let rehearse = async || {
        let intent = Intent::Revoke { serial: first.active().unwrap() };
        let request = Request { dry_run: true, ..first.request(intent) };
        named(first.engine.command(&first.cell(), request).await.unwrap())
    };
    assert_eq!(rehearse().await, Some(Vec::new()), "all were seen lately");

    cut.link.set_cut(true);
    let (since, shown) = (first.engine.clock.now(), cut.generation());
    world.pass(LAG + Span::from_secs(3)).await;
    let expected = rehearse().await.unwrap();
    let [replica] = &expected[..] else { panic!("{expected:?}") };
    assert_eq!((replica.name.as_str(), replica.publishes), (cut.engine.replica(), true));
    assert_eq!(replica.generation, Some(shown));
    assert!(replica.last_seen_at <= since && since <= replica.last_seen_at + LAG, "{replica:?} since {since}");
    let serial = first.active().unwrap();
    let kid = first.cell().snapshot.load().keyring.key(serial).unwrap().kid.to_string();
    let outcome = first.command(Intent::Revoke { serial }).await.unwrap();
    assert_eq!(named(outcome), Some(expected), "what was rehearsed");
    assert!(cut.served().unwrap().contains(&kid), "it is served on, which is what was said");
    // Nothing else is worth a word of it.
    assert_eq!(named(first.command(Intent::Hold { until: None }).await.unwrap()), Some(Vec::new()));

    cut.link.set_cut(false);
    world.pass(LAG).await;
    assert!(!cut.served().unwrap().contains(&kid));
    assert_eq!(rehearse().await, Some(Vec::new()), "it is back");
}

#[tokio::test]
async fn a_revocation_names_who_crashed_and_not_who_stopped_in_good_order() {
    let world = World::with(&[ALL, ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    let [first, stops, crashes] = &world.replicas[..] else { unreachable!() };
    stops.engine.take_leave().await;
    stops.link.set_cut(true);
    crashes.link.set_cut(true);
    world.pass(LAG + Span::from_secs(3)).await;
    let outcome = first.command(Intent::Compromise).await.unwrap();
    let names: Vec<_> = outcome.unconfirmed_replicas.unwrap().into_iter().map(|replica| replica.name).collect();
    assert_eq!(names, [crashes.engine.replica()]);
    // Verifiers remember what it served: that it published, and until when, stays known.
    let known = first.engine.replicas(Span::MINUTE).await.unwrap().others;
    let left = known.into_iter().find(|other| other.report.replica == stops.engine.replica()).unwrap().report;
    assert!(left.publishes && left.stopped && !left.tells, "{left:?}");
}

/// A store forgets after a day who was silent; with more time to propagate, such a replica may still publish.
#[tokio::test]
async fn where_replicas_may_have_been_forgotten_a_revocation_does_not_say_that_all_hear_of_it() {
    let world = World::with(&[ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    let first = &world.replicas[0];
    let answered = async |propagation: Span| {
        let mut longer = policy();
        longer.rotation.propagation = propagation;
        longer.rotation.schedule = Schedule::Every(Span::DAY.times(30));
        first.engine.configure(&[replica::declare("default", longer)]).await.unwrap();
        world.tick().await;
        let intent = Intent::Revoke { serial: first.active().unwrap() };
        let request = Request { dry_run: true, ..first.request(intent) };
        first.engine.command(&first.cell(), request).await.unwrap().unconfirmed_replicas.map(|replicas| replicas.len())
    };
    assert_eq!(answered(Span::from_secs(20 * 3600)).await, Some(0));
    assert_eq!(answered(Span::DAY.times(3)).await, None);
}

#[tokio::test]
async fn a_revocation_names_a_replica_that_is_seen_and_lags() {
    let world = World::with(&[ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    let [first, lags] = &world.replicas[..] else { unreachable!() };
    let store = first.engine.ledger().unwrap().store();
    let shared = store.shared().unwrap();
    let reported = shared.replicas(Span::DAY).await.unwrap().into_iter().map(|replica| replica.report);
    let before = reported.filter(|report| report.replica == lags.engine.replica()).collect::<Vec<_>>();
    world.pass(Span::MINUTE.times(2)).await;
    shared.report(&before).await.unwrap();
    let outcome = first.command(Intent::Compromise).await.unwrap();
    let names: Vec<_> = outcome.unconfirmed_replicas.unwrap().into_iter().map(|replica| replica.name).collect();
    assert_eq!(names, [lags.engine.replica()]);
}

/// It does not follow the store, so it does not hear of the revocation either.
#[tokio::test]
async fn a_revocation_names_a_replica_that_is_seen_and_lacks_no_key_but_what_was_written_long_ago() {
    let world = World::with(&[ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    let [first, lags] = &world.replicas[..] else { unreachable!() };
    first.command(Intent::Hold { until: None }).await.unwrap();
    world.pass(Span::MINUTE).await;
    let store = first.engine.ledger().unwrap().store();
    let shared = store.shared().unwrap();
    let reported = shared.replicas(Span::DAY).await.unwrap().into_iter().map(|replica| replica.report);
    let before = reported.filter(|report| report.replica == lags.engine.replica()).collect::<Vec<_>>();
    let named = async || {
        shared.report(&before).await.unwrap();
        let request = Request { dry_run: true, ..first.request(Intent::Compromise) };
        let outcome = first.engine.command(&first.cell(), request).await.unwrap();
        outcome.unconfirmed_replicas.unwrap().into_iter().map(|replica| replica.name).collect::<Vec<_>>()
    };
    let until = first.engine.clock.now() + Span::HOUR;
    first.command(Intent::Hold { until: Some(until) }).await.unwrap();
    assert!(named().await.is_empty(), "it may still take it up in time");
    world.pass(LAG + Span::from_secs(3)).await;
    assert_eq!(named().await, [lags.engine.replica()]);
}

#[tokio::test]
async fn a_replica_that_is_cut_off_signs_until_the_staleness_limit_and_publishes_on() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(20)).await;
    let signer = &world.replicas[1];
    signer.link.set_cut(true);
    world.pass(STALENESS.saturating_sub(Span::SECOND)).await;
    signer.sign().await.unwrap();
    world.pass(Span::from_secs(2)).await;
    assert_eq!(refusal(signer).await, Some(SigningFailure::StaleKeyring));
    assert!(signer.served().is_some());
    assert!(signer.alarms().contains(&"stale"), "{:?}", signer.alarms());
    signer.link.set_cut(false);
    world.tick().await;
    signer.sign().await.unwrap();
}

#[tokio::test]
async fn nothing_signed_by_a_replica_that_is_cut_off_outlives_its_key() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(20)).await;
    let [manager, signer] = &world.replicas[..] else { unreachable!() };
    signer.link.set_cut(true);
    let old = signer.active().unwrap();
    manager.command(Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None }).await.unwrap();
    let mut last = 0;
    for _ in 0..200 {
        world.pass(Span::SECOND).await;
        if let Ok(issued) = signer.sign().await {
            last = last.max(issued.expires_at);
        }
        let gone = !manager.serials(KeyState::Retiring).contains(&old);
        let now = manager.engine.clock.now().as_millis() / 1000;
        assert!(!gone || now > last, "the key left while a token lives until {last}, and it is {now}");
        if gone {
            return;
        }
    }
    panic!("the old key never left");
}

#[tokio::test]
async fn a_signer_changes_nothing_and_says_who_may() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    let refused = world.replicas[1].command(Intent::Hold { until: None }).await;
    assert!(matches!(refused, Err(CommandError::ReadOnly)), "{refused:?}");
}

#[tokio::test]
async fn a_signer_enforces_the_policy_in_the_keyring_and_follows_its_changes() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(2)).await;
    let issued = world.replicas[1].sign().await.unwrap();
    assert_eq!(issued.expires_in, 10);
    let mut shorter = policy();
    shorter.tokens.max_ttl = Span::from_secs(4);
    shorter.tokens.default_ttl = Span::from_secs(4);
    let declared = [replica::declare("default", shorter)];
    world.replicas[0].engine.configure(&declared).await.unwrap();
    world.pass(Span::from_secs(2)).await;
    assert_eq!(world.replicas[1].sign().await.unwrap().expires_in, 4);
}

#[tokio::test]
async fn of_two_configurations_the_one_that_came_last_stays() {
    let world = World::with(&[MANAGER, MANAGER]).await;
    world.pass(Span::from_secs(2)).await;
    let [first, second] = &world.replicas[..] else { unreachable!() };
    let mut longer = policy();
    longer.tokens.max_ttl = Span::from_secs(12);
    second.engine.configure(&[replica::declare("default", longer.clone())]).await.unwrap();
    world.pass(Span::from_secs(5)).await;
    let generation = first.generation();
    world.pass(Span::from_secs(5)).await;
    assert_eq!(first.cell().snapshot.load().keyring.policy, longer);
    assert_eq!(first.generation(), generation, "nobody puts a policy back");
    assert!(first.alarms().contains(&"superseded"), "{:?}", first.alarms());
    assert!(!second.alarms().contains(&"superseded"), "{:?}", second.alarms());
}

#[tokio::test]
async fn two_managers_with_different_configurations_do_not_take_turns() {
    let mut world = World::with(&[MANAGER]).await;
    world.pass(Span::from_secs(2)).await;
    let mut longer = policy();
    longer.tokens.max_ttl = Span::from_secs(12);
    world.replicas[0].engine.configure(&[replica::declare("default", longer)]).await.unwrap();
    world.pass(Span::from_secs(5)).await;
    // One that was not updated yet starts again and puts its policy back. That is the last word.
    world.join(MANAGER).await;
    world.pass(Span::from_secs(5)).await;
    let [first, second] = &world.replicas[..] else { unreachable!() };
    let adopted = |replica: &Replica| {
        let keyring = replica.cell().snapshot.load().keyring.clone();
        keyring.journal.audit.iter().filter(|entry| entry.action == "policy-adopted").count()
    };
    assert_eq!(adopted(first), 2, "nobody puts a policy back");
    assert_eq!(first.cell().snapshot.load().keyring.policy, policy());
    assert!(first.alarms().contains(&"superseded"), "{:?}", first.alarms());
    assert!(!second.alarms().contains(&"superseded"), "{:?}", second.alarms());
}

#[tokio::test]
async fn a_policy_that_another_manager_took_back_stays_away() {
    let world = World::with(&[MANAGER, MANAGER]).await;
    world.pass(Span::from_secs(2)).await;
    let [first, second] = &world.replicas[..] else { unreachable!() };
    for (manager, life) in [(first, 12), (second, 14), (second, 10)] {
        let mut policy = policy();
        policy.tokens.max_ttl = Span::from_secs(life);
        manager.engine.configure(&[replica::declare("default", policy)]).await.unwrap();
        world.pass(Span::from_secs(5)).await;
    }
    // What was stored when the first took its configuration is stored again: it came last all the same.
    assert_eq!(first.cell().snapshot.load().keyring.policy, policy());
    assert_eq!(second.cell().snapshot.load().keyring.policy, policy());
}

#[tokio::test]
async fn promotion_waits_for_a_live_replica_that_lags_and_names_it() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(2)).await;
    let [manager, signer] = &world.replicas[..] else { unreachable!() };
    // It reports, and takes up nothing: a keyset that it froze, say.
    let stuck = signer.generation();
    let mut waited = false;
    for _ in 0..400 {
        world.clocks.iter().for_each(|clock| clock.advance(Span::from_millis(500)));
        manager.tick().await;
        signer.engine.attend_once().await.unwrap();
        waited |= manager.alarms().contains(&"replica_lagging");
    }
    assert_eq!(signer.generation(), stuck);
    let view = manager.engine.look(&manager.cell());
    let blocked = &view.outlook.next_rotation.as_ref().unwrap().blocked_by;
    let serial =
        manager.serials(KeyState::Pending).into_iter().chain(manager.serials(KeyState::Standby)).max().unwrap();
    assert!(waited, "no alarm");
    // Keys that it has may still take over; the first that it lacks may not.
    assert_eq!(manager.cell().missing_replicas(serial), [signer.engine.replica()]);
    assert!(blocked.iter().any(|blocker| blocker.as_str() == "replicas"), "{blocked:?}");
    let active = manager.active();
    signer.tick().await;
    manager.tick().await;
    assert_eq!(manager.active(), active, "whoever fetched from it just before has not seen the key");
    world.pass(Span::from_secs(20)).await;
    assert_ne!(manager.active(), active);
}

#[tokio::test]
async fn nobody_waits_for_a_replica_that_died() {
    let mut world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(30)).await;
    drop(world.replicas.pop());
    let active = world.replicas[0].active();
    world.pass(Span::MINUTE + LAG).await;
    assert_ne!(world.replicas[0].active(), active);
}

#[tokio::test]
async fn an_older_copy_of_the_store_freezes_and_the_last_good_set_is_served() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(20)).await;
    let copy = world.common.hub.copy();
    let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
    world.replicas[0].command(rotate).await.unwrap();
    world.tick().await;
    let served = world.replicas[1].served();
    let generation = world.replicas[0].generation();
    world.common.hub.restore(&copy);
    world.pass(Span::from_secs(5)).await;
    for replica in &world.replicas {
        assert!(replica.frozen().unwrap().contains("older than generation"), "{:?}", replica.frozen());
        assert_eq!(replica.served(), served);
        assert_eq!(replica.generation(), generation);
    }
    // Nothing was written over what was put back.
    assert_eq!(world.common.hub.copy_digests(), copy.digests());
}

#[tokio::test]
async fn a_replica_that_never_saw_more_heeds_those_that_did() {
    let mut world = World::with(&[MANAGER]).await;
    world.pass(Span::from_secs(20)).await;
    let copy = world.common.hub.copy();
    let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
    world.replicas[0].command(rotate).await.unwrap();
    world.common.hub.restore(&copy);
    world.tick().await;
    let newcomer = world.join(MANAGER).await;
    world.tick().await;
    let frozen = world.replicas[newcomer].frozen();
    assert!(frozen.as_deref().is_some_and(|reason| reason.contains("older than generation")), "{frozen:?}");
    assert_eq!(world.common.hub.copy_digests(), copy.digests(), "nothing was written over what was put back");
}

#[tokio::test]
async fn two_histories_that_diverged_freeze_until_the_one_that_was_seen_is_back() {
    let world = World::with(&[MANAGER]).await;
    world.pass(Span::from_secs(20)).await;
    let manager = &world.replicas[0];
    let copy = world.common.hub.copy();
    manager.command(Intent::Hold { until: None }).await.unwrap();
    let good = world.common.hub.copy();
    world.common.hub.restore(&copy);
    // Somebody without memory goes on from the older copy.
    let other = World { common: world.common.clone(), clocks: vec![], replicas: vec![] };
    let clock = ManualClock::at(jwksd::clock::Clock::wall(&*world.clocks[0]));
    let stranger = other.common.start(MANAGER, &clock, &[("default", policy())]).await;
    let rotate = Intent::Rotate { allow_unpropagated: true, confirm_algorithm: None };
    stranger.command(rotate).await.unwrap();
    world.tick().await;
    assert!(manager.frozen().unwrap().contains("diverged"), "{:?}", manager.frozen());
    world.common.hub.restore(&good);
    world.tick().await;
    assert_eq!(manager.frozen(), None, "what it saw last is stored again");
}

#[tokio::test]
async fn a_forged_record_freezes_every_replica() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(5)).await;
    let document = Document::Keyring(jwksd::keyring::name::Name::parse("default").unwrap());
    world.common.hub.edit(&document, |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        let forged = text.replace("\"drained\": false", "\"drained\": true");
        assert_ne!(forged, text);
        forged.into_bytes()
    });
    world.tick().await;
    for replica in &world.replicas {
        assert!(replica.frozen().is_some());
        assert!(replica.served().is_some());
    }
}

#[tokio::test]
async fn a_clock_beyond_the_skew_neither_signs_nor_changes_anything() {
    let mut world = World::with(&[MANAGER]).await;
    world.pass(Span::from_secs(20)).await;
    let clock = world.clock();
    clock.step_to(jwksd::clock::Clock::wall(&*clock) + SKEW + Span::from_secs(2));
    let wrong = world.common.start(ALL, &clock, &[("default", policy())]).await;
    assert_eq!(refusal(&wrong).await, Some(SigningFailure::StaleKeyring));
    assert!(wrong.alarms().contains(&"clock_frozen"), "{:?}", wrong.alarms());
    world.replicas.push(wrong);
    // It publishes what the others write, revocations too.
    world.pass(Span::from_secs(3)).await;
    let serial = world.replicas[0].active().unwrap();
    world.replicas[0].command(Intent::Revoke { serial }).await.unwrap();
    world.tick().await;
    assert_eq!(world.replicas[1].served(), world.replicas[0].served());
    let clock = world.replicas[1].clock.clone();
    clock.step_to(jwksd::clock::Clock::wall(&*world.clocks[0]));
    world.tick().await;
    world.tick().await;
    world.replicas[1].sign().await.unwrap();
}

#[tokio::test]
async fn a_store_whose_clock_goes_wrong_confirms_nothing() {
    let world = World::with(&[ALL, ALL]).await;
    world.pass(Span::from_secs(20)).await;
    world.common.hub.set_clock_error(Span::MINUTE);
    let active = world.replicas[0].active();
    world.pass(STALENESS.saturating_sub(Span::SECOND)).await;
    world.replicas[0].sign().await.unwrap();
    world.pass(Span::MINUTE).await;
    for replica in &world.replicas {
        assert_eq!(refusal(replica).await, Some(SigningFailure::StaleKeyring));
        assert_eq!(replica.active(), active, "nothing that waits for time happens");
    }
    world.common.hub.set_clock_error(Span::ZERO);
    world.pass(Span::from_secs(5)).await;
    world.replicas[0].sign().await.unwrap();
}

#[tokio::test]
async fn clocks_within_the_skew_are_fine() {
    let mut world = World::with(&[MANAGER]).await;
    for error in [1_800, -1_800].map(Span::from_millis) {
        let clock = world.clock();
        clock.step_to(jwksd::clock::Clock::wall(&*clock) + error);
        let replica = world.common.start(ALL, &clock, &[("default", policy())]).await;
        world.replicas.push(replica);
    }
    for _ in 0..60 {
        world.pass(Span::from_secs(2)).await;
        world.assert_agreement().await;
        for replica in &world.replicas {
            replica.sign().await.unwrap();
        }
    }
}

#[tokio::test]
async fn keysets_that_begin_together_are_published_together_by_every_replica() {
    let mut world = World::new();
    let clock = world.clock();
    let policies = [("default", policy()), ("other", policy())];
    let first = world.common.start(MANAGER, &clock, &policies[..1]).await;
    drop(first);
    // Another issuer with two keysets; a replica that has seen only one of them hands out nothing.
    let mut elsewhere = policy();
    elsewhere.issuer.url = "https://auth.example.com/other".to_owned();
    let both = [("one", elsewhere.clone()), ("two", elsewhere)];
    let clock = world.clock();
    let manager = world.common.start(MANAGER, &clock, &both).await;
    let reader = world.common.start(SIGNER, &clock, &[]).await;
    for keyset in ["one", "two"] {
        let issued = reader.sign_with(keyset).await.unwrap();
        let serves = manager.engine.directory().issuers.iter().any(|issuer| {
            issuer
                .served()
                .is_some_and(|document| String::from_utf8_lossy(&document.body).contains(issued.kid.as_str()))
        });
        assert!(serves);
    }
}

#[tokio::test]
async fn a_keyset_that_another_manager_added_is_signed_for() {
    let world = World::with(&[MANAGER, SIGNER]).await;
    world.pass(Span::from_secs(2)).await;
    let declared = [replica::declare("default", policy()), replica::declare("second", policy())];
    world.replicas[0].engine.configure(&declared).await.unwrap();
    world.pass(Span::from_secs(40)).await;
    let issued = world.replicas[1].sign_with("second").await.unwrap();
    assert!(world.replicas[0].served().unwrap().contains(&issued.kid.to_string()));
}

#[tokio::test]
async fn a_replica_that_remembers_starts_without_the_store_and_signs_within_the_limit() {
    let mut world = World::with(&[MANAGER]).await;
    let clock = world.clock();
    let own = Arc::new(MemoryStore::new());
    let link = world.common.hub.link();
    let signer = world.common.start_over(SIGNER, &clock, &[], link.clone(), own.clone()).await;
    world.replicas.push(signer);
    world.pass(Span::from_secs(5)).await;
    drop(world.replicas.pop());
    link.set_cut(true);
    world.pass(Span::from_secs(5)).await;
    let again = world.common.start_over(SIGNER, &clock, &[], link.clone(), own.clone()).await;
    again.sign().await.unwrap();
    assert_eq!(again.served(), world.replicas[0].served());
    world.replicas.push(again);
    world.pass(STALENESS).await;
    assert_eq!(refusal(&world.replicas[1]).await, Some(SigningFailure::StaleKeyring));
    link.set_cut(false);
    world.tick().await;
    world.replicas[1].sign().await.unwrap();
}

#[tokio::test]
async fn a_manager_that_comes_back_to_others_does_not_take_its_absence_for_a_silence() {
    let mut world = World::with(&[MANAGER, MANAGER]).await;
    world.pass(Span::from_secs(55)).await;
    drop(world.replicas.pop());
    drop(world.replicas.pop().unwrap());
    // Both were gone for a moment, shorter than max_age; the store knows when they published last.
    world.pass(Span::from_secs(2)).await;
    world.join(MANAGER).await;
    let before = world.replicas[0].active();
    world.pass(Span::from_secs(6)).await;
    assert_ne!(world.replicas[0].active(), before, "the rotation was due and nothing speaks against it");
}

#[tokio::test]
async fn after_a_real_silence_promotions_wait_for_every_replica() {
    let mut world = World::with(&[MANAGER]).await;
    world.pass(Span::from_secs(30)).await;
    drop(world.replicas.pop());
    world.pass(Span::from_secs(40)).await;
    world.join(MANAGER).await;
    world.pass(Span::SECOND).await;
    // The second finds the first publishing, and learns from it that nobody did before.
    world.join(MANAGER).await;
    let before = world.replicas[0].active();
    world.pass(Span::from_secs(8)).await;
    assert_eq!(world.replicas[1].active(), before);
    world.pass(Span::from_secs(20)).await;
    assert_ne!(world.replicas[1].active(), before);
}
