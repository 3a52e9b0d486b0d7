//! One example per rule of DESIGN §2, in round numbers: a rotation per hour, propagation 10 minutes, tokens of 5
//! minutes, σ 1 minute; so an overlap of 7 minutes.

use std::sync::Arc;

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::change::{Change, NewKey};
use jwksd::keyring::decide::{Confirmation, ImportedKey, Intent, Refusal, Request};
use jwksd::keyring::jwk::Kid;
use jwksd::keyring::outlook::{Alarm, outlook};
use jwksd::keyring::plan::{Blocker, Facts, Step, blockers, due_at, is_overtaken, plan};
use jwksd::keyring::policy::{Bootstrap, Verifier};
use jwksd::keyring::record::KeyState;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};

use crate::world::{START, Wanted, World, import, policy, request, rotate, with};

const MINUTE: Span = Span::MINUTE;
const HOUR: Span = Span::HOUR;

fn minutes(n: u32) -> Span {
    MINUTE.times(n)
}

fn just_before(span: Span) -> Span {
    span.saturating_sub(Span::from_millis(1))
}

/// A keyset after twenty minutes: key 1 active since START, keys 2 and 3 standby.
fn settled() -> World {
    let mut world = World::first(policy());
    world.pass(minutes(20));
    assert_eq!(states(&world), [(1, KeyState::Active), (2, KeyState::Standby), (3, KeyState::Standby)]);
    world
}

fn states(world: &World) -> Vec<(u64, KeyState)> {
    crate::world::keys(&world.keyring)
}

#[test]
fn the_first_key_of_a_new_issuer_signs_at_once() {
    let mut world = World::first(policy());
    world.settle();
    assert_eq!(states(&world), [(1, KeyState::Active), (2, KeyState::Pending), (3, KeyState::Pending)]);
    assert!(world.keyring.key(1).unwrap().unpropagated);
}

#[test]
fn what_another_replica_recorded_of_a_probe_is_left_to_it() {
    let mut world = World::first(with(|it| it.issuer.probes = vec!["https://auth.example.com/jwks".to_owned()]));
    world.settle();
    let mut keyring = world.keyring.clone();
    assert!(keyring.key(2).unwrap().seen_at.is_some(), "it waits, and the probe shows it");
    keyring = keyring.after(&Change::Observe { published: vec![], stopped: vec![], seen: vec![(2, None)] }, world.now);
    let facts = world.facts();
    let Some(Step::Write(Change::Observe { seen, .. })) = plan(&keyring, &facts).step else {
        panic!("what is seen is recorded");
    };
    assert_eq!(seen, [(2, Some(facts.seen[&2].since))]);
    let contested = Facts { contested: [2].into(), ..facts };
    assert_eq!(plan(&keyring, &contested).step, plan(&world.keyring, &world.facts()).step, "nothing else differs");
}

#[test]
fn the_first_key_of_a_keyset_that_joins_an_issuer_waits_like_any_other() {
    let mut world = World::later(policy());
    world.settle();
    assert_eq!(world.active(), None);
    assert_eq!(states(&world).len(), 3, "its first key and both successors wait");
    world.pass(just_before(minutes(10)));
    assert_eq!(world.active(), None);
    world.pass(Span::from_millis(1));
    assert_eq!(world.active(), Some(1));
    assert!(!world.keyring.key(1).unwrap().unpropagated);
}

#[test]
fn a_joining_keyset_signs_at_once_with_immediate_bootstrap() {
    let mut world = World::later(with(|policy| policy.rotation.bootstrap = Bootstrap::Immediate));
    world.settle();
    assert_eq!(world.active(), Some(1));
    assert!(world.keyring.key(1).unwrap().unpropagated);
}

#[test]
fn keys_that_nobody_can_fetch_do_not_propagate() {
    let mut world = World::later(policy());
    world.open = false;
    world.pass(HOUR);
    assert_eq!(states(&world).iter().filter(|(_, state)| *state == KeyState::Pending).count(), 3);
    world.open = true;
    world.pass(minutes(9));
    assert_eq!(world.active(), None);
    world.pass(MINUTE);
    assert_eq!(world.active(), Some(1));
}

#[test]
fn a_rotation_happens_on_time_and_the_former_key_leaves_after_its_overlap() {
    let mut world = settled();
    world.pass(just_before(minutes(40)));
    assert_eq!(world.active(), Some(1));
    world.pass(Span::from_millis(1));
    assert_eq!(world.active(), Some(2));
    assert_eq!(world.state(1), KeyState::Retiring);
    world.pass(just_before(minutes(7)));
    assert_eq!(world.state(1), KeyState::Retiring);
    world.pass(Span::from_millis(1));
    assert_eq!(world.state(1), KeyState::Retired);
    assert!(world.keyring.key(1).unwrap().private.is_none(), "its private half is destroyed");
}

#[test]
fn missed_occurrences_coalesce_into_one() {
    let mut world = settled();
    world.restart(HOUR.times(100)).settle();
    world.pass(minutes(6));
    assert_eq!(world.active(), Some(2), "one rotation, once the silence is over");
    world.pass(minutes(50));
    assert_eq!(world.active(), Some(2));
    assert_eq!(world.audit("promoted"), 2);
}

#[test]
fn missed_occurrences_of_a_crontab_line_coalesce_into_one() {
    let monthly = Schedule::cron("0 10 1 * *", None).unwrap();
    let mut world = World::first(with(|policy| policy.rotation.schedule = monthly));
    world.settle();
    world.restart(Span::DAY.times(400)).settle();
    world.pass(minutes(20));
    assert_eq!(world.audit("promoted"), 2);
    let due = due_at(&world.keyring).unwrap();
    assert!(due > world.now && due.since(world.now) < Span::DAY.times(32));
}

#[test]
fn after_a_silence_promotions_wait_until_everyone_could_look_again() {
    let mut world = settled();
    world.restart(HOUR).settle();
    assert_eq!(blockers(&world.keyring, &world.facts()), [Blocker::Silence]);
    let refused = world.ask(rotate());
    let again = world.now + minutes(6);
    assert_eq!(refused, Err(Refusal::NoStandby { next_standby_at: Some(again) }));
    world.pass(just_before(minutes(6)));
    assert_eq!(world.active(), Some(1));
    world.pass(Span::from_millis(1));
    assert_eq!(world.active(), Some(2));
}

#[test]
fn a_short_restart_delays_nothing() {
    let mut world = settled();
    world.pass(minutes(39));
    world.restart(MINUTE).settle();
    assert_eq!(world.active(), Some(2));
}

#[test]
fn a_rotation_without_a_ready_successor_is_late_and_not_skipped() {
    let mut world = World::first(policy());
    world.creation_works = false;
    world.settle();
    world.creation_works = true;
    world.pass(Span::from_secs(5));
    for serial in [2, 3] {
        world.ask(Intent::Revoke { serial }).unwrap();
    }
    world.creation_works = false;
    world.pass(minutes(90));
    assert_eq!(world.active(), Some(1));
    assert_eq!(blockers(&world.keyring, &world.facts()), [Blocker::NoStandby]);
    let alarms = outlook(&world.keyring, &world.facts()).alarms;
    for alarm in [Alarm::RotationOverdue, Alarm::NoStandby, Alarm::BackendUnavailable] {
        assert!(alarms.contains(&alarm), "{alarm} is missing in {alarms:?}");
    }
    world.creation_works = true;
    world.pass(minutes(10));
    assert_eq!(world.active(), Some(1), "the new key is not published for long enough");
    world.pass(Span::from_secs(5));
    assert_eq!(world.active(), Some(4));
}

#[test]
fn occurrences_within_propagation_of_a_forced_rotation_are_skipped() {
    let hourly = Schedule::cron("0 * * * *", None).unwrap();
    let mut world = World::first(with(|policy| policy.rotation.schedule = hourly));
    world.settle();
    let to_next_hour = Timestamp::from_secs((START.as_secs() / 3600 + 1) * 3600).since(START);
    world.pass(to_next_hour);
    world.pass(minutes(55));
    let before = world.active().unwrap();
    world.ask(rotate()).unwrap();
    world.pass(minutes(5));
    assert_eq!(world.active(), Some(before + 1), "five minutes after a forced rotation the hour changes nothing");
    world.pass(minutes(59));
    assert_eq!(world.active(), Some(before + 1));
    world.pass(MINUTE);
    assert_eq!(world.active(), Some(before + 2));
}

#[test]
fn a_forced_rotation_moves_the_period() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.pass(minutes(59));
    assert_eq!(world.active(), Some(2));
    world.pass(MINUTE);
    assert_eq!(world.active(), Some(3));
}

#[test]
fn rotate_without_a_standby_says_when_there_is_one() {
    let mut world = World::first(policy());
    world.settle();
    let next_standby_at = Some(START + minutes(10));
    assert_eq!(world.ask(rotate()), Err(Refusal::NoStandby { next_standby_at }));
    let early = Intent::Rotate { allow_unpropagated: true, confirm_algorithm: None };
    let answer = world.ask(early).unwrap();
    assert!(answer.unpropagated && !answer.safe);
    assert_eq!(world.active(), Some(2));
}

#[test]
fn rotate_ignores_a_hold_and_the_schedule_does_not() {
    let mut world = settled();
    world.ask(Intent::Hold { until: None }).unwrap();
    world.pass(HOUR.times(3));
    assert_eq!(world.active(), Some(1));
    world.ask(rotate()).unwrap();
    world.pass(HOUR.times(3));
    assert_eq!(world.active(), Some(2));
    assert_eq!(world.state(1), KeyState::Retiring, "removals wait too");
    world.ask(Intent::Resume).unwrap();
    world.settle();
    assert_eq!((world.active(), world.state(1)), (Some(3), KeyState::Retired));
}

#[test]
fn a_hold_ends_by_itself() {
    let mut world = settled();
    let until = world.now + HOUR.times(2);
    world.ask(Intent::Hold { until: Some(until) }).unwrap();
    world.pass(just_before(HOUR.times(2)));
    assert_eq!(world.active(), Some(1));
    world.pass(Span::from_millis(1));
    assert_eq!((world.active(), world.keyring.hold.clone()), (Some(2), None));
    let past = world.now;
    assert_eq!(world.ask(Intent::Hold { until: Some(past) }), Err(Refusal::HoldInThePast { until: past }));
}

#[test]
fn a_hold_does_not_stop_revocation_or_the_end_of_a_revoked_key() {
    let mut world = settled();
    world.ask(Intent::Hold { until: None }).unwrap();
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    world.settle();
    assert_eq!(world.active(), Some(2));
    assert!(world.keyring.key(1).unwrap().private.is_none());
}

#[test]
fn rollback_puts_the_former_key_back_and_sets_a_hold() {
    let mut world = settled();
    assert!(matches!(world.ask(Intent::Rollback), Err(Refusal::NothingToRollBack { .. })));
    world.ask(rotate()).unwrap();
    world.pass(MINUTE);
    world.ask(Intent::Rollback).unwrap();
    assert_eq!((world.active(), world.state(2)), (Some(1), KeyState::Retiring));
    assert!(world.keyring.hold.is_some());
}

#[test]
fn a_rollback_is_taken_back_by_another_one() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.pass(MINUTE);
    let mark = |world: &World, serial| world.keyring.key(serial).unwrap().rolled_back;
    for (to, from) in [(1, 2), (2, 1), (1, 2)] {
        let answer = world.ask(Intent::Rollback).unwrap();
        assert_eq!((world.active(), world.state(from)), (Some(to), KeyState::Retiring));
        assert!(answer.safe && !answer.unpropagated, "verifiers know both");
        assert_eq!((mark(&world, to), mark(&world, from)), (false, true));
        assert!(world.keyring.hold.is_some());
        world.pass(Span::SECOND);
    }
    world.pass(minutes(8));
    assert_eq!(world.state(2), KeyState::Retiring, "a hold keeps what it may be needed for");
    world.ask(Intent::Resume).unwrap();
    world.pass(minutes(1));
    assert_eq!(world.state(2), KeyState::Retired);
    assert!(matches!(world.ask(Intent::Rollback), Err(Refusal::NothingToRollBack { .. })));
}

#[test]
fn exposure_covers_the_declared_caches_whether_or_not_verifiers_are_declared() {
    let verifier = |name: &str, keeps_old| Verifier { name: name.to_owned(), sees_new: Span::ZERO, keeps_old };
    for (verifiers, slowest, unbounded) in [
        (vec![], Span::ZERO, vec![]),
        (vec![verifier("vault", None)], Span::ZERO, vec!["vault"]),
        (vec![verifier("a", Some(MINUTE)), verifier("b", Some(minutes(9)))], minutes(9), vec![]),
        (vec![verifier("a", Some(MINUTE)), verifier("vault", None)], MINUTE, vec!["vault"]),
    ] {
        let mut policy = policy();
        policy.issuer.caches = vec![MINUTE, Span::from_secs(30)];
        policy.issuer.stale_if_error = Span::from_secs(7);
        policy.rotation.verifiers = verifiers.clone();
        let caches = Span::from_secs(97) + policy.rotation.clock_skew;
        let mut world = World::first(policy);
        world.settle();
        let dry = Request { dry_run: true, ..request(Intent::Revoke { serial: 1 }) };
        let answer = world.request(&dry).unwrap();
        let exposure = answer.exposure.unwrap();
        assert_eq!(exposure.until, Some(world.now + caches + slowest), "{verifiers:?}");
        assert_eq!(exposure.unbounded, unbounded);
        let warned = answer.warnings.iter().any(|warning| warning.contains("no verifiers are declared: exposure"));
        assert_eq!(warned, verifiers.is_empty(), "{:?}", answer.warnings);
    }
}

#[test]
fn there_is_no_way_back_to_a_key_that_retired_or_was_revoked() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.pass(minutes(8));
    assert_eq!(world.state(1), KeyState::Retired);
    assert!(matches!(world.ask(Intent::Rollback), Err(Refusal::NothingToRollBack { .. })));
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert!(matches!(world.ask(Intent::Rollback), Err(Refusal::NothingToRollBack { .. })));
}

#[test]
fn a_revoked_key_is_followed_by_standby_then_retiring_then_pending_then_nothing() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.settle();
    let all = [(1, KeyState::Retiring), (2, KeyState::Active), (3, KeyState::Standby), (4, KeyState::Pending)];
    assert_eq!(states(&world), all);
    world.creation_works = false;
    world.ask(Intent::Revoke { serial: 2 }).unwrap();
    assert_eq!(world.active(), Some(3), "the oldest standby");
    world.ask(Intent::Revoke { serial: 3 }).unwrap();
    assert_eq!(world.active(), Some(1), "the newest retiring key");
    let answer = world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert_eq!(world.active(), Some(4), "the oldest pending one");
    assert!(answer.unpropagated && !answer.safe);
    let answer = world.ask(Intent::Revoke { serial: 4 }).unwrap();
    assert_eq!(world.active(), None);
    assert!(!answer.safe);
    world.pass(minutes(3));
    assert_eq!(world.active(), None);
    world.creation_works = true;
    world.pass(Span::from_secs(5));
    assert_eq!(world.active(), Some(5), "a new key signs as soon as it is there");
    assert!(world.keyring.key(5).unwrap().unpropagated);
}

#[test]
fn a_key_that_was_rolled_back_from_does_not_follow_a_revoked_one() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.settle();
    world.ask(Intent::Rollback).unwrap();
    world.ask(Intent::Revoke { serial: 3 }).unwrap();
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert_eq!(world.active(), Some(4), "key 2 was rolled back from, key 4 only waits");
}

#[test]
fn a_revoked_key_is_revoked_once_and_a_retired_one_not_at_all() {
    let mut world = settled();
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    let generation = world.keyring.generation;
    let answer = world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert!(answer.changes.is_empty());
    assert_eq!(world.keyring.generation, generation);
    world.ask(rotate()).unwrap();
    world.pass(minutes(8));
    assert_eq!(world.ask(Intent::Revoke { serial: 2 }), Err(Refusal::AlreadyRetired));
    assert!(matches!(world.ask(Intent::Revoke { serial: 99 }), Err(Refusal::UnknownKey { .. })));
}

#[test]
fn a_compromise_revokes_everything_and_starts_afresh() {
    let mut world = settled();
    world.ask(Intent::Compromise).unwrap();
    assert_eq!(world.active(), None);
    assert!(states(&world).iter().all(|(_, state)| *state == KeyState::Revoked));
    world.settle();
    assert_eq!(world.active(), Some(4));
    assert!(world.keyring.key(4).unwrap().unpropagated);
    assert_eq!(world.keyring.published().count(), 3);
}

#[test]
fn a_change_of_algorithm_waits_for_an_operator() {
    let mut world = settled();
    world.want(with(|policy| policy.algorithm = Algorithm::Es384)).settle();
    assert_eq!((world.state(2), world.state(3)), (KeyState::Retired, KeyState::Retired));
    world.pass(HOUR.times(5));
    assert_eq!(world.active(), Some(1));
    assert!(outlook(&world.keyring, &world.facts()).alarms.contains(&Alarm::AlgorithmUnconfirmed));
    assert_eq!(blockers(&world.keyring, &world.facts()), [Blocker::AlgorithmUnconfirmed]);
    assert!(matches!(world.ask(rotate()), Err(Refusal::AlgorithmUnconfirmed { .. })));
    let confirm = |alg: &str| Intent::Rotate {
        allow_unpropagated: false,
        confirm_algorithm: Some(Confirmation::Alg(alg.to_owned())),
    };
    assert!(matches!(world.ask(confirm("RS256")), Err(Refusal::AlgorithmMismatch { .. })));
    world.ask(confirm("ES384")).unwrap();
    assert_eq!(world.active(), Some(4));
    world.pass(HOUR);
    assert_eq!(world.active(), Some(5), "from now on the schedule goes on by itself");
}

#[test]
fn an_emergency_during_an_unconfirmed_change_of_algorithm_stays_with_the_known_one() {
    let mut world = settled();
    world.want(with(|policy| policy.algorithm = Algorithm::Es384));
    world.pass(minutes(1));
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert_eq!(world.active(), None);
    world.settle();
    let active = world.keyring.active().expect("a new key of the algorithm that verifiers know signs");
    assert_eq!(active.algorithm, Algorithm::Es256);
}

#[test]
fn an_emergency_key_waits_for_the_listener_and_is_not_withdrawn() {
    let mut world = settled();
    world.want(with(|policy| policy.algorithm = Algorithm::Es384));
    world.pass(minutes(1));
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    world.restart(Span::SECOND).open = false;
    world.settle();
    assert_eq!(world.active(), None);
    world.open = true;
    world.settle();
    assert_eq!(world.keyring.active().map(|key| key.algorithm), Some(Algorithm::Es256));
}

#[test]
fn a_drained_keyset_publishes_until_its_tokens_have_expired_and_signs_no_more() {
    let mut world = settled();
    world.ask(Intent::Drain).unwrap();
    assert_eq!(states(&world), [(1, KeyState::Retiring), (2, KeyState::Retired), (3, KeyState::Retired)]);
    assert_eq!(world.ask(rotate()), Err(Refusal::Drained));
    world.wanted = Wanted::Absent;
    world.pass(just_before(minutes(7)));
    assert_eq!(world.state(1), KeyState::Retiring);
    world.pass(Span::from_millis(1));
    assert_eq!(world.keyring.published().count(), 0);
    world.pass(HOUR.times(10));
    assert_eq!(world.active(), None);
}

#[test]
fn a_standby_key_says_from_when_it_may_sign_after_a_longer_propagation() {
    let mut world = settled();
    let next = |world: &World| outlook(&world.keyring, &world.facts()).keys[1].1.clone();
    assert_eq!((next(&world).state, next(&world).not_before), (KeyState::Active, None));
    let mut longer = policy();
    longer.rotation.propagation = minutes(30);
    world.want(longer).settle();
    let Err(Refusal::NoStandby { next_standby_at }) = world.ask(rotate()) else { panic!("it may not sign yet") };
    assert_eq!((world.state(2), next(&world).not_before), (KeyState::Standby, next_standby_at));
    world.pass(minutes(10));
    assert_eq!(next(&world).not_before, None);
    world.ask(rotate()).unwrap();
}

#[test]
fn a_key_was_not_published_since_a_time_to_come() {
    let mut world = settled();
    for private in [true, false] {
        let made = import(7, Algorithm::Es256, HOUR);
        let public = jwksd::keyring::change::NewKey { private: None, ..made.key.clone() };
        let key = if private { made.key.clone() } else { public };
        let brought = |since| {
            let published_until = Some(world.now + HOUR);
            Intent::Import(Box::new(ImportedKey {
                key: key.clone(),
                published_since: Some(since),
                published_until,
                ..made.clone()
            }))
        };
        let (late, now) = (brought(world.now + Span::from_millis(1)), brought(world.now));
        for dry_run in [true, false] {
            let refused = world.request(&Request { dry_run, ..request(late.clone()) });
            let Err(Refusal::ImportRefused { reason }) = refused else { panic!("{refused:?}") };
            assert!(reason.contains("published_since") && reason.contains("yet to come"), "{reason}");
        }
        assert!(world.request(&Request { dry_run: true, ..request(now) }).is_ok());
    }
}

#[test]
fn a_drained_keyset_that_is_configured_raises_an_alarm() {
    let mut world = settled();
    world.ask(Intent::Drain).unwrap();
    let drained = |world: &World| outlook(&world.keyring, &world.facts()).alarms.contains(&Alarm::Drained);
    assert!(drained(&world));
    world.wanted = Wanted::Degraded;
    assert!(drained(&world));
    world.wanted = Wanted::Absent;
    assert!(!drained(&world), "it ends as it should");
    assert_eq!(world.ask(Intent::Undrain), Err(Refusal::Absent));
    world.wanted = Wanted::Degraded;
    assert_eq!(world.ask(Intent::Undrain), Err(Refusal::Degraded));
}

#[test]
fn a_drained_keyset_signs_again_with_its_last_key_while_verifiers_have_it() {
    let mut world = settled();
    let unchanged = world.ask(Intent::Undrain).unwrap();
    assert!(unchanged.changes.is_empty());
    world.ask(Intent::Drain).unwrap();
    world.pass(minutes(3));
    let answer = world.ask(Intent::Undrain).unwrap();
    assert_eq!((world.active(), answer.safe, answer.unpropagated), (Some(1), true, false));
    world.pass(minutes(20));
    assert_eq!((world.active(), world.state(4), world.state(5)), (Some(1), KeyState::Standby, KeyState::Standby));
}

#[test]
fn a_drained_keyset_whose_keys_have_ended_starts_again_with_a_key_that_waits() {
    let mut world = settled();
    world.ask(Intent::Drain).unwrap();
    world.pass(HOUR);
    assert_eq!(world.keyring.published().count(), 0);
    assert_eq!(world.active(), None, "configured or not, nothing starts by itself");
    let answer = world.ask(Intent::Undrain).unwrap();
    assert!(answer.warnings.iter().any(|warning| warning.contains("503")), "{:?}", answer.warnings);
    world.pass(just_before(minutes(10)));
    assert_eq!((world.active(), world.state(4)), (None, KeyState::Pending));
    world.pass(Span::from_millis(1));
    assert_eq!(world.active(), Some(4));
    assert!(!world.keyring.key(4).unwrap().unpropagated);
}

#[test]
fn absence_from_the_configuration_is_no_transition() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.wanted = Wanted::Absent;
    let before = states(&world);
    world.pass(HOUR.times(50));
    assert_eq!(states(&world), before);
    assert!(outlook(&world.keyring, &world.facts()).alarms.contains(&Alarm::Absent));
    assert_eq!(world.ask(rotate()), Err(Refusal::Absent));
    world.want(policy()).settle();
    assert_eq!(world.active(), Some(3));
}

#[test]
fn a_degraded_keyset_promotes_nothing_and_keeps_its_policy() {
    let mut world = settled();
    world.wanted = Wanted::Degraded;
    world.pass(HOUR.times(5));
    assert_eq!(world.active(), Some(1));
    assert_eq!(world.ask(rotate()), Err(Refusal::Degraded));
    assert_eq!(world.keyring.policy, policy());
    world.want(policy()).settle();
    assert_eq!(world.active(), Some(2));
}

#[test]
fn a_shortened_propagation_takes_effect_one_old_propagation_later() {
    let mut world = World::first(policy());
    world.settle();
    world.pass(minutes(2));
    world.want(with(|policy| policy.rotation.propagation = minutes(6))).settle();
    world.pass(minutes(5));
    assert_eq!(world.state(2), KeyState::Pending, "published for seven minutes, told ten");
    world.pass(minutes(3));
    assert_eq!(world.state(2), KeyState::Standby);
    let new = world.keyring.next_serial;
    world.ask(rotate()).unwrap();
    world.settle();
    world.pass(minutes(2));
    assert_eq!(world.state(new), KeyState::Pending, "the old wait ends twelve minutes after START");
    world.pass(minutes(4));
    assert_eq!(world.state(new), KeyState::Standby, "from then on six minutes do");
}

#[test]
fn a_raised_propagation_holds_for_keys_that_wait_already() {
    let mut world = settled();
    world.want(with(|policy| policy.rotation.propagation = minutes(40))).settle();
    let next_standby_at = Some(START + minutes(40));
    assert_eq!(world.ask(rotate()), Err(Refusal::NoStandby { next_standby_at }));
    world.pass(minutes(20));
    world.ask(rotate()).unwrap();
}

#[test]
fn a_raised_token_life_is_bound_before_it_is_used_and_a_lowered_one_shortens_nothing() {
    let mut world = settled();
    world.want(with(|policy| policy.tokens.max_ttl = minutes(15))).settle();
    assert_eq!(world.keyring.key(1).unwrap().ttl_bound, minutes(15));
    world.want(with(|policy| policy.tokens.max_ttl = MINUTE)).settle();
    assert_eq!(world.keyring.key(1).unwrap().ttl_bound, minutes(15));
    world.ask(rotate()).unwrap();
    world.pass(just_before(minutes(17)));
    assert_eq!(world.state(1), KeyState::Retiring);
    world.pass(Span::from_millis(1));
    assert_eq!(world.state(1), KeyState::Retired);
    assert_eq!(world.keyring.key(2).unwrap().ttl_bound, MINUTE);
}

#[test]
fn a_lowered_skew_shortens_no_overlap_of_a_key_that_signed_under_the_higher_one() {
    let mut world = settled();
    world.want(with(|policy| policy.rotation.clock_skew = Span::ZERO)).settle();
    world.ask(rotate()).unwrap();
    world.pass(just_before(minutes(7)));
    assert_eq!(world.state(1), KeyState::Retiring);
    world.pass(Span::from_millis(1));
    assert_eq!(world.state(1), KeyState::Retired);
}

#[test]
fn a_full_jwks_takes_no_key_refuses_rotation_and_does_not_stop_revocation() {
    let mut world = settled();
    world.neighbours = 7;
    assert!(matches!(world.ask(rotate()), Err(Refusal::JwksFull { .. })));
    world.pass(HOUR);
    assert_eq!(world.active(), Some(1));
    assert!(blockers(&world.keyring, &world.facts()).contains(&Blocker::JwksFull));
    world.neighbours = 9;
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    world.settle();
    assert_eq!(world.active(), Some(2));
    assert_eq!(world.keyring.published().count(), 2, "no new successor");
}

#[test]
fn an_imported_key_becomes_the_active_one_where_there_is_none() {
    let mut world = World::later(policy());
    let imported = import(7, Algorithm::Es256, HOUR);
    world.ask(Intent::Import(Box::new(imported.clone()))).unwrap();
    world.settle();
    assert_eq!(world.active(), Some(1));
    assert_eq!(world.keyring.active().unwrap().kid, imported.key.kid);
    let again = world.ask(Intent::Import(Box::new(imported)));
    assert!(matches!(again, Err(Refusal::AlreadyImported { .. })));
    world.pass(HOUR);
    assert_eq!(world.active(), Some(2));
    world.pass(HOUR);
    assert_eq!(world.state(1), KeyState::Retiring, "its tokens may live for an hour and twice the skew");
    world.pass(minutes(2));
    assert_eq!(world.state(1), KeyState::Retired);
}

#[test]
fn an_imported_key_waits_as_standby_beside_an_active_one() {
    let mut world = settled();
    let imported = import(7, Algorithm::Es256, HOUR);
    world.ask(Intent::Import(Box::new(imported))).unwrap();
    assert_eq!((world.active(), world.state(4)), (Some(1), KeyState::Standby));
    let other = import(8, Algorithm::Es384, HOUR);
    assert!(matches!(world.ask(Intent::Import(Box::new(other))), Err(Refusal::ImportRefused { .. })));
}

#[test]
fn an_imported_key_that_will_not_sign_here_stays_published_for_its_tokens() {
    let mut drained = settled();
    drained.ask(Intent::Import(Box::new(import(7, Algorithm::Es256, HOUR)))).unwrap();
    drained.ask(Intent::Drain).unwrap();
    let mut changed = settled();
    changed.ask(Intent::Import(Box::new(import(7, Algorithm::Es256, HOUR)))).unwrap();
    changed.want(with(|policy| policy.algorithm = Algorithm::Es384)).settle();
    for world in [&mut drained, &mut changed] {
        assert_eq!(world.state(4), KeyState::Retiring);
        world.pass(just_before(minutes(62)));
        assert_eq!(world.state(4), KeyState::Retiring);
        world.pass(Span::from_millis(1));
        assert_eq!(world.state(4), KeyState::Retired);
    }
}

#[test]
fn an_imported_public_key_stays_until_the_stated_time_and_never_signs() {
    let mut world = settled();
    let made = import(7, Algorithm::Es384, Span::ZERO);
    let public = |until: Option<Timestamp>| {
        let key = jwksd::keyring::change::NewKey { private: None, ..made.key.clone() };
        Intent::Import(Box::new(ImportedKey { key, published_until: until, ..made.clone() }))
    };
    assert!(matches!(world.ask(public(None)), Err(Refusal::ImportRefused { .. })));
    let past = Some(world.now);
    assert!(matches!(world.ask(public(past)), Err(Refusal::ImportRefused { .. })));
    let until = world.now + HOUR.times(3);
    world.ask(public(Some(until))).unwrap();
    assert_eq!(world.state(4), KeyState::Retiring);
    world.creation_works = false;
    for serial in [1, 2, 3] {
        world.ask(Intent::Revoke { serial }).unwrap();
    }
    assert_eq!(world.active(), None);
    world.creation_works = true;
    world.pass(just_before(HOUR.times(3)));
    assert_eq!(world.state(4), KeyState::Retiring);
    world.pass(Span::from_millis(1));
    assert_eq!(world.state(4), KeyState::Retired);
}

#[test]
fn a_changed_keyring_is_noticed_by_if_match() {
    let mut world = settled();
    let current = world.keyring.generation;
    let stale = Request { if_generation: Some(vec![current - 1]), ..request(rotate()) };
    assert_eq!(world.request(&stale), Err(Refusal::GenerationMismatch { current }));
    let fresh = Request { if_generation: Some(vec![current - 1, current]), ..request(rotate()) };
    assert_eq!(world.request(&fresh).unwrap().generation, current + 1);
}

#[test]
fn an_idempotency_key_is_forgotten_after_a_day() {
    let mut world = settled();
    let call = crate::world::idempotent(Intent::Hold { until: None }, "once", "body");
    let first = world.request(&call).unwrap();
    world.sleep(just_before(Span::DAY));
    assert_eq!(world.request(&call), Ok(first.clone()));
    world.sleep(Span::from_millis(1));
    assert!(world.request(&call).unwrap().generation > first.generation);
}

#[test]
fn a_frozen_clock_stops_what_waits_for_time_and_nothing_else() {
    let mut world = settled();
    world.frozen = true;
    world.pass(HOUR.times(30));
    assert_eq!(world.active(), Some(1));
    assert_eq!(world.ask(rotate()), Err(Refusal::ClockFrozen));
    world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert_eq!(world.active(), Some(2));
    world.frozen = false;
    world.settle();
    assert_eq!(world.active(), Some(2), "it signs only since now");
}

#[test]
fn removals_wait_after_a_long_absence() {
    let mut world = settled();
    world.ask(rotate()).unwrap();
    world.restart(Span::DAY);
    world.removals_not_before = world.now + minutes(7);
    world.settle();
    world.pass(just_before(minutes(7)));
    assert_eq!(world.state(1), KeyState::Retiring);
    world.pass(Span::from_millis(1));
    assert_eq!(world.state(1), KeyState::Retired);
}

#[test]
fn a_failed_destruction_is_tried_until_it_succeeds() {
    let mut world = settled();
    world.destruction_works = false;
    world.ask(Intent::Revoke { serial: 2 }).unwrap();
    world.pass(minutes(2));
    assert!(world.keyring.key(2).unwrap().private.is_some());
    assert!(outlook(&world.keyring, &world.facts()).alarms.contains(&Alarm::DestructionPending));
    world.destruction_works = true;
    world.pass(Span::from_secs(5));
    assert!(world.keyring.key(2).unwrap().private.is_none());
    assert_eq!(world.audit("destroyed"), 1);
}

#[test]
fn a_clock_set_back_a_little_lengthens_the_stay_of_a_key_that_signed_by_the_later_time() {
    let policy = with(|policy| policy.rotation.clock_skew = Span::ZERO);
    let mut world = World::first(policy);
    world.pass(minutes(20));
    let latest = world.now;
    world.set_back(Span::from_millis(400));
    world.ask(rotate()).unwrap();
    world.pass(just_before(minutes(5) + latest.since(world.now)));
    assert_eq!(world.state(1), KeyState::Retiring, "a token of 5 minutes was signed by the later clock");
    world.pass(Span::from_millis(1));
    assert_eq!(world.state(1), KeyState::Retired);
}

#[test]
fn a_hold_does_not_end_by_a_clock_that_cannot_be_trusted() {
    let mut world = settled();
    world.ask(Intent::Hold { until: Some(world.now + HOUR) }).unwrap();
    world.want(with(|policy| policy.algorithm = Algorithm::Es384)).settle();
    world.frozen = true;
    world.sleep(HOUR.times(2)).settle();
    assert_eq!((world.state(2), world.audit("withdrawn")), (KeyState::Standby, 0), "removals wait under a hold");
    world.frozen = false;
    world.settle();
    assert_eq!((world.state(3), world.audit("hold-ended")), (KeyState::Retired, 1));
}

#[test]
fn an_imported_key_that_never_signed_here_signs_unpropagated_in_an_emergency() {
    let mut world = settled();
    world.ask(Intent::Import(Box::new(import(7, Algorithm::Es256, HOUR)))).unwrap();
    world.want(with(|policy| policy.algorithm = Algorithm::Es384)).settle();
    assert_eq!(world.state(4), KeyState::Retiring);
    let outcome = world.ask(Intent::Revoke { serial: 1 }).unwrap();
    assert_eq!((world.active(), outcome.unpropagated), (Some(4), true), "verifiers had no time to see it");
    assert!(world.keyring.key(4).unwrap().unpropagated);
}

/// A key that a backend makes slowly is overtaken when nobody will ever ask for it again: then it ends, and is destroyed.
#[test]
fn a_key_is_overtaken_by_a_drain_another_algorithm_and_another_key_of_its_serial() {
    let overtaken = |world: &World, serial: u64, algorithm: Algorithm| {
        is_overtaken(&world.keyring, &world.facts(), serial, algorithm)
    };
    let mut world = settled();
    assert!(!overtaken(&world, 4, Algorithm::Es256), "it may be asked for when the next successor is wanted");
    assert!(!overtaken(&world, 5, Algorithm::Es256), "a keyring that was recovered comes by again");
    assert!(overtaken(&world, 3, Algorithm::Es256), "another key has its serial");
    world.wanted = Wanted::Policy(Box::new(with(|policy| policy.algorithm = Algorithm::Es384)));
    assert!(overtaken(&world, 4, Algorithm::Es256), "before the change is taken up, too");
    assert!(!overtaken(&world, 4, Algorithm::Es384));
    world.wanted = Wanted::Absent;
    assert!(!overtaken(&world, 4, Algorithm::Es256), "its configuration may come back");
    world.ask(Intent::Drain).unwrap();
    assert!(overtaken(&world, 4, Algorithm::Es256));

    let mut emergency = settled();
    emergency.creation_works = false;
    emergency.wanted = Wanted::Policy(Box::new(with(|policy| policy.algorithm = Algorithm::Es384)));
    emergency.settle();
    emergency.ask(Intent::Compromise).unwrap();
    assert_eq!(emergency.active(), None);
    assert!(!overtaken(&emergency, 4, Algorithm::Es256), "verifiers know the former algorithm");
}

#[test]
fn a_key_that_was_overtaken_joins_as_one_that_ended() {
    let mut world = settled();
    let key = world.keyring.key(3).unwrap();
    let (kid, private) = (Kid(Arc::from("late")), key.private.clone());
    let late = NewKey { kid: kid.clone(), algorithm: Algorithm::Es384, public: key.public.clone(), private };
    world.keyring = world.keyring.after(&Change::AddEnded(Box::new(late)), world.now);
    let key = world.keyring.key(4).unwrap();
    assert_eq!((key.state, key.published_at, key.private.is_some()), (KeyState::Retired, None, true));
    let entry = world.keyring.journal.audit.last().unwrap();
    assert_eq!((entry.action.as_str(), entry.kids.contains(&kid)), ("withdrawn", true));
    assert_eq!((entry.changes[0].from, entry.changes[0].to), (None, KeyState::Retired));
    assert_eq!(world.keyring.next_serial, 5);
    world.settle();
    assert!(world.keyring.key(4).unwrap().private.is_none(), "it is destroyed as others are");
}
