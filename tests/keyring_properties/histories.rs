//! Random histories.

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::decide::{Confirmation, ImportedKey, Intent, Request};
use jwksd::keyring::outlook::outlook;
use jwksd::keyring::policy::{Bootstrap, Policy, Verifier};
use jwksd::keyring::record::{KeyState, Keyring};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::world::{Probe, Wanted, World, idempotent, import, is_valid, policy, request};

#[derive(Clone, Debug)]
enum Event {
    Pass(Span),
    /// Time passes and nobody plans.
    Sleep(Span),
    /// By less than the guard minds.
    SetBack(Span),
    SetBackAndAccept(Span),
    Probe(Probe),
    Restart(Span),
    Frozen(bool),
    CreationWorks(bool),
    DestructionWorks(bool),
    Open(bool),
    Neighbours(u32),
    RemovalsWait(Span),
    Configure(Box<Policy>),
    Misconfigure,
    Remove,
    Ask(Wish),
}

#[derive(Clone, Debug)]
enum Wish {
    Rotate {
        allow_unpropagated: bool,
        confirm: bool,
    },
    Rollback,
    /// Which of the published keys, modulo their number.
    Revoke(usize),
    Compromise,
    Hold(Option<Span>),
    Resume,
    Drain,
    Undrain,
    Import {
        private: bool,
        life: Span,
        published_for: Option<Span>,
        other_algorithm: bool,
    },
}

fn spans() -> impl Strategy<Value = Span> {
    prop_oneof![
        6 => (0i64..600_000).prop_map(Span::from_millis),
        6 => (0i64..300).prop_map(|n| Span::MINUTE.times(u32::try_from(n).unwrap())),
        3 => (0i64..90).prop_map(|n| Span::HOUR.times(u32::try_from(n).unwrap())),
        1 => (0i64..5).prop_map(|n| Span::DAY.times(365 * u32::try_from(n).unwrap())),
    ]
}

fn policies() -> impl Strategy<Value = Policy> {
    let times = (1i64..600, 0i64..120, 0i64..3600, 0i64..120, 0i64..7200, 1i64..100_000);
    let rest = (1u32..4, 1i64..3600, any::<bool>(), any::<bool>(), 0i64..600, prop::bool::weighted(0.4));
    (times, rest).prop_map(
        |((max_age, stale, sees_new, skew, slack, gap), (successors, ttl, es384, now, extra, probed))| {
            let mut made = policy();
            let secs = Span::from_secs;
            if probed {
                made.issuer.probes = vec!["https://auth.example.com/.well-known/jwks.json".to_owned()];
            }
            made.issuer.max_age = secs(max_age);
            made.issuer.caches = vec![secs(max_age)];
            made.issuer.stale_if_error = secs(stale);
            made.rotation.clock_skew = secs(skew);
            made.rotation.verifiers =
                vec![Verifier { name: "v".to_owned(), sees_new: secs(sees_new), keeps_old: Some(secs(sees_new)) }];
            let propagation = secs(max_age + stale + sees_new + skew + slack);
            made.rotation.propagation = propagation;
            made.rotation.overlap_extra = secs(extra);
            made.rotation.successors = successors;
            made.rotation.bootstrap = if now { Bootstrap::Immediate } else { Bootstrap::Wait };
            made.tokens.max_ttl = secs(ttl);
            made.tokens.default_ttl = secs(1);
            made.algorithm = if es384 { Algorithm::Es384 } else { Algorithm::Es256 };
            // Long enough that the keys fit into one JWKS.
            let gap = secs(gap) + made.overlap();
            made.rotation.schedule = Schedule::Every(propagation + gap);
            assert!(is_valid(&made), "{made:?}");
            made
        },
    )
}

fn wishes() -> impl Strategy<Value = Wish> {
    let life = (0i64..7200).prop_map(Span::from_secs);
    let imports = (any::<bool>(), life, prop::option::of(spans()), prop::bool::weighted(0.1));
    prop_oneof![
        4 => (any::<bool>(), any::<bool>())
            .prop_map(|(allow_unpropagated, confirm)| Wish::Rotate { allow_unpropagated, confirm }),
        2 => Just(Wish::Rollback),
        1 => Just(Wish::Undrain),
        3 => (0usize..10).prop_map(Wish::Revoke),
        1 => Just(Wish::Compromise),
        2 => prop::option::of(spans()).prop_map(Wish::Hold),
        2 => Just(Wish::Resume),
        1 => prop::bool::weighted(0.2).prop_map(|yes| if yes { Wish::Drain } else { Wish::Resume }),
        2 => imports.prop_map(|(private, life, published_for, other_algorithm)| {
            Wish::Import { private, life, published_for, other_algorithm }
        }),
    ]
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => spans().prop_map(Event::Pass),
        3 => spans().prop_map(Event::Sleep),
        2 => (0i64..500).prop_map(|ms| Event::SetBack(Span::from_millis(ms))),
        1 => spans().prop_map(Event::SetBackAndAccept),
        2 => prop_oneof![3 => Just(Probe::Shows), 1 => Just(Probe::Misses), 1 => Just(Probe::Fails)].prop_map(Event::Probe),
        2 => spans().prop_map(Event::Restart),
        1 => any::<bool>().prop_map(Event::Frozen),
        1 => any::<bool>().prop_map(Event::CreationWorks),
        1 => any::<bool>().prop_map(Event::DestructionWorks),
        1 => prop::bool::weighted(0.8).prop_map(Event::Open),
        1 => (0u32..9).prop_map(Event::Neighbours),
        1 => spans().prop_map(Event::RemovalsWait),
        3 => policies().prop_map(|policy| Event::Configure(Box::new(policy))),
        1 => Just(Event::Misconfigure),
        1 => Just(Event::Remove),
        9 => wishes().prop_map(Event::Ask),
    ]
}

fn happen(world: &mut World, event: &Event, number: u64) {
    match event {
        Event::Pass(span) => drop(world.pass(*span)),
        Event::Sleep(span) => drop(world.sleep(*span)),
        Event::SetBack(span) => drop(world.set_back(*span)),
        Event::SetBackAndAccept(span) => drop(world.set_back_and_accept(*span)),
        Event::Restart(span) => drop(world.restart(*span)),
        Event::Probe(probe) => world.probe = *probe,
        Event::Frozen(frozen) => world.frozen = *frozen,
        Event::CreationWorks(works) => world.creation_works = *works,
        Event::DestructionWorks(works) => world.destruction_works = *works,
        Event::Open(open) => world.open = *open,
        Event::Neighbours(keys) => world.neighbours = *keys,
        Event::RemovalsWait(span) => world.removals_not_before = world.now + *span,
        Event::Configure(policy) => drop(world.want((**policy).clone())),
        Event::Misconfigure => world.wanted = Wanted::Degraded,
        Event::Remove => world.wanted = Wanted::Absent,
        Event::Ask(wish) => ask(world, wish, number),
    }
    world.settle();
    check_rest(world);
}

/// What must hold whenever nothing is left to do.
fn check_rest(world: &World) {
    let keyring = &world.keyring;
    let facts = world.facts();
    let seen = outlook(keyring, &facts);
    for (serial, _) in &seen.keys {
        assert!(keyring.key(*serial).is_some_and(|key| key.state.is_published()));
    }
    let signed_once = keyring.last_promotion_at.is_some() && !keyring.drained;
    if signed_once && world.open && world.creation_works && facts.backoff.is_empty() {
        assert!(keyring.active().is_some(), "nothing signs and nothing is done about it\n{}", world.story());
    }
    if keyring.drained {
        let unused = keyring.keys.iter().any(|key| matches!(key.state, KeyState::Pending | KeyState::Standby));
        assert!(!unused && keyring.active().is_none());
    }
}

fn ask(world: &mut World, wish: &Wish, number: u64) {
    let Some(intent) = intent(world, wish, number) else { return };
    let dry = Request { dry_run: true, ..request(intent.clone()) };
    let before = world.keyring.clone();
    let foretold = world.request(&dry);
    assert_eq!(world.keyring, before, "a dry run changed something");
    let key = format!("call-{number}");
    let real = idempotent(intent, &key, "body");
    let answer = world.request(&real);
    match (&foretold, &answer) {
        (Ok(foretold), Ok(answer)) => {
            assert_eq!((&foretold.changes, foretold.safe), (&answer.changes, answer.safe));
            assert!(foretold.dry_run && !answer.dry_run);
            assert_eq!(foretold.generation, before.generation);
        }
        (foretold, answer) => assert_eq!(foretold.as_ref().err(), answer.as_ref().err()),
    }
    let Ok(answer) = answer else {
        assert_eq!(world.keyring, before, "a refusal changed something");
        return;
    };
    if world.keyring.generation > before.generation {
        let written = world.keyring.clone();
        assert_eq!(world.request(&real), Ok(answer), "the answer was not repeated");
        assert_eq!(world.keyring, written, "a repeated call changed something");
        let other = idempotent(Intent::Resume, &key, "another body");
        assert!(world.request(&other).is_err(), "an Idempotency-Key served two requests");
    }
}

fn intent(world: &World, wish: &Wish, number: u64) -> Option<Intent> {
    let now = world.now;
    Some(match wish {
        Wish::Rotate { allow_unpropagated, confirm } => Intent::Rotate {
            allow_unpropagated: *allow_unpropagated,
            confirm_algorithm: confirm.then_some(Confirmation::Any),
        },
        Wish::Rollback => Intent::Rollback,
        Wish::Revoke(nth) => {
            let keys: Vec<u64> = world.keyring.keys.iter().map(|key| key.serial).collect();
            Intent::Revoke { serial: *keys.iter().rev().nth(nth % keys.len().max(1))? }
        }
        Wish::Compromise => Intent::Compromise,
        Wish::Hold(until) => Intent::Hold { until: until.map(|span| now + span) },
        Wish::Resume => Intent::Resume,
        Wish::Drain => Intent::Drain,
        Wish::Undrain => Intent::Undrain,
        Wish::Import { private, life, published_for, other_algorithm } => {
            let wanted = world.keyring.policy.algorithm;
            let other = if wanted == Algorithm::Es256 { Algorithm::Es384 } else { Algorithm::Es256 };
            let made = import(number, if *other_algorithm { other } else { wanted }, *life);
            let published_since = published_for.map(|span| now - span);
            Intent::Import(Box::new(if *private {
                ImportedKey { published_since, ..made }
            } else {
                let key = jwksd::keyring::change::NewKey { private: None, ..made.key.clone() };
                ImportedKey { key, published_since, published_until: Some(now + *life), ..made }
            }))
        }
    })
}

/// Any time that a record may hold: from a clock that was wrong, a forged file, another era.
fn any_time() -> impl Strategy<Value = Timestamp> {
    prop_oneof![
        Just(Timestamp::EPOCH),
        Just(Timestamp::MAX),
        (0i64..4_000_000_000).prop_map(Timestamp::from_secs),
        (-900_000i64..900_000).prop_map(|n| Timestamp::from_secs(1_800_000_000 + n)),
    ]
}

fn scramble(keyring: &mut Keyring, mut times: impl FnMut() -> Timestamp) {
    keyring.written_at = times();
    for key in &mut keyring.keys {
        key.entered_at = times();
        key.created_at = times();
        for time in [
            &mut key.published_at,
            &mut key.activated_at,
            &mut key.demoted_at,
            &mut key.stopped_at,
            &mut key.published_until,
        ] {
            if time.is_some() {
                *time = Some(times());
            }
        }
    }
    if keyring.last_promotion_at.is_some() {
        keyring.last_promotion_at = Some(times());
    }
    if keyring.disabled_switch_at.is_some() {
        keyring.disabled_switch_at = Some(times());
    }
    for floor in &mut keyring.floors {
        floor.until = times();
    }
    if let Some(hold) = &mut keyring.hold
        && hold.until.is_some()
    {
        hold.until = Some(times());
    }
}

/// The same histories in every run. `PROPTEST_RNG_SEED` and `PROPTEST_CASES` go looking for others; what they find
/// becomes an example.
fn config() -> ProptestConfig {
    let asked = |variable: &str| std::env::var_os(variable).is_some();
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if !asked("PROPTEST_RNG_SEED") {
        config.rng_seed = RngSeed::Fixed(2026);
    }
    if !asked("PROPTEST_CASES") {
        config.cases = 512;
    }
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_history_breaks_a_promise(
        policy in policies(),
        first in any::<bool>(),
        events in prop::collection::vec(events(), 1..40),
    ) {
        let mut world = if first { World::first(policy) } else { World::later(policy) };
        world.settle();
        for (number, event) in events.iter().enumerate() {
            happen(&mut world, event, 1000 + number as u64);
        }
    }

    #[test]
    fn the_planner_comes_to_rest_whatever_times_are_stored(
        policy in policies(),
        events in prop::collection::vec(events(), 0..15),
        times in prop::collection::vec(any_time(), 64),
        now in any_time(),
        later in spans(),
    ) {
        let mut world = World::first(policy);
        world.settle();
        for (number, event) in events.iter().enumerate() {
            happen(&mut world, event, 1000 + number as u64);
        }
        world.promises.kept = false;
        let mut drawn = times.iter().copied().cycle();
        scramble(&mut world.keyring, || drawn.next().unwrap());
        world.resumed_at = world.resumed_at.map(|_| times[0]);
        world.now = now;
        world.settle();
        let facts = world.facts();
        outlook(&world.keyring, &facts);
        for number in 0..8 {
            for wish in [Wish::Rollback, Wish::Rotate { allow_unpropagated: true, confirm: true }, Wish::Revoke(number)] {
                if let Some(intent) = intent(&world, &wish, 5000) {
                    drop(world.ask(intent));
                }
            }
            world.settle();
            world.sleep(later).settle();
        }
    }
}
