//! What is advised after a live token was rejected, and that it helps.

use jwksd::keyring::name::Name;
use jwksd::keyring::policy::Policy;
use jwksd::keyring::record::Keyring;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timing::{self, Severity};
use jwksd::simulation::rules::Ours;
use jwksd::simulation::{Advice, Caching, Faults, Reality, Scenario, advise, play};

use crate::rules::Misled;
use crate::{SEEDS, scenario};

fn is_accepted(policy: &Policy) -> bool {
    let name = Name::parse("default").unwrap();
    let mut findings = timing::examine_keyset(&name, policy);
    findings.extend(timing::examine_issuer(&policy.issuer.name, &[(name, policy)]));
    findings.iter().all(|finding| finding.severity != Severity::Refused)
}

/// A usual policy with room to spare, played for a while.
fn usual(replicas: usize) -> Scenario {
    let mut policy = (1..).find_map(scenario).expect("one is accepted").policies.remove(0);
    (policy.rotation.successors, policy.rotation.overlap_extra) = (2, Span::ZERO);
    let rotation = &mut policy.rotation;
    (rotation.propagation, rotation.schedule) = (Span::HOUR, Schedule::Every(Span::HOUR.times(3)));
    (rotation.clock_skew, rotation.verifiers) = (Span::MINUTE, Vec::new());
    if replicas > 1 {
        (rotation.staleness_limit, rotation.publish_lag) = (Span::HOUR, Span::MINUTE);
    } else {
        (rotation.staleness_limit, rotation.publish_lag) = (Span::ZERO, Span::ZERO);
    }
    (policy.issuer.caches, policy.issuer.max_age) = (vec![Span::MINUTE.times(5)], Span::MINUTE.times(5));
    policy.issuer.stale_if_error = Span::ZERO;
    (policy.tokens.max_ttl, policy.tokens.default_ttl) = (Span::HOUR, Span::HOUR);
    assert!(is_accepted(&policy));
    let reality = Reality {
        replicas,
        skew: policy.rotation.clock_skew,
        lag: policy.rotation.publish_lag,
        layers: Span::MINUTE.times(5),
        verifiers: vec![Caching { name: "no cache".to_owned(), sees_new: Span::ZERO }],
        tokens: 12,
        faults: Faults::ALL,
    };
    Scenario {
        keyset: Name::parse("default").unwrap(),
        policies: vec![policy],
        reality,
        begins: Timestamp::from_secs(1_800_000_000),
        lasts: Span::DAY.times(20),
        seed: 1,
    }
}

/// What is advised after a run in which something that `change` makes true was not declared.
fn advised(replicas: usize, change: impl Fn(&mut Reality)) -> Vec<Advice> {
    let mut scenario = usual(replicas);
    change(&mut scenario.reality);
    let incident = (1..=SEEDS).find_map(|seed| {
        scenario.seed = seed;
        play(&scenario, &Ours, |_| ()).incident
    });
    let incident = incident.expect("a token is rejected");
    advise(&scenario.keyset, &scenario.policies[0], &scenario.reality, &incident)
}

fn settings(advice: &[Advice]) -> Vec<(&str, &str)> {
    advice.iter().map(|advice| (advice.setting.as_str(), advice.value.as_str())).collect()
}

#[test]
fn advice_names_the_setting_and_the_least_value() {
    const PROPAGATION: &str = "keyset.default.rotation.propagation";
    let slow = Caching { name: "vault".to_owned(), sees_new: Span::HOUR.times(2) };
    let verifier = advised(1, |reality| reality.verifiers.push(slow.clone()));
    let declare = ("keyset.default.rotation.verifiers", "{ name = \"vault\", cache = \"2h\" }");
    assert_eq!(settings(&verifier), [declare, (PROPAGATION, "\"2h6m\"")]);
    let layer = advised(1, |reality| reality.layers = reality.layers + Span::HOUR);
    assert_eq!(settings(&layer), [("issuer.main.caches", "[\"5m\", \"1h\"]"), (PROPAGATION, "\"1h6m\"")]);
    let slower = advised(1, |reality| reality.layers = reality.layers + Span::HOUR.times(5));
    assert_eq!(slower.last().unwrap().setting, "keyset.default.rotation.every", "it leaves no room for propagation");
    let lag = advised(3, |reality| reality.lag = Span::HOUR.times(2));
    assert_eq!(settings(&lag), [("store.publish_lag", "\"2h\""), (PROPAGATION, "\"2h6m\"")]);
    let skew = advised(1, |reality| reality.skew = Span::HOUR.times(2));
    assert_eq!(settings(&skew)[0], ("keyset.default.tokens.clock_skew", "\"2h\""));
}

#[test]
fn advice_that_is_taken_ends_the_rejections() {
    let mut scenario = usual(1);
    scenario.reality.layers = scenario.reality.layers + Span::HOUR;
    assert!(play(&scenario, &Ours, |_| ()).rejected > 0);
    let policy = &mut scenario.policies[0];
    policy.issuer.caches.push(Span::HOUR);
    policy.rotation.propagation = Span::MINUTE.times(66);
    assert!(is_accepted(policy));
    let report = play(&scenario, &Ours, |_| ());
    assert_eq!(report.rejected, 0, "{:#?}", report.incident);
}

/// Rules that take away a former key ten minutes early: no setting of the configuration says that, so what is left to
/// advise is to keep former keys for longer.
#[test]
fn a_former_key_that_leaves_too_early_is_to_be_kept_for_longer() {
    let hasty = Misled(|keyring: &mut Keyring| {
        for key in &mut keyring.keys {
            key.ttl_bound = key.ttl_bound.saturating_sub(Span::MINUTE.times(10));
            key.overlap_bound = Span::ZERO;
        }
    });
    let mut scenario = usual(1);
    let mut advised = 0;
    while let Some(incident) = play(&scenario, &hasty, |_| ()).incident {
        assert!(!incident.is_early(), "{incident:#?}");
        let advice = advise(&scenario.keyset, &scenario.policies[0], &scenario.reality, &incident);
        let [Advice { setting, value, .. }] = &advice[..] else { panic!("{advice:?}") };
        assert_eq!(setting, "keyset.default.rotation.overlap_extra");
        let extra = Span::parse(value.trim_matches('"')).unwrap();
        assert!(extra > scenario.policies[0].rotation.overlap_extra && extra <= Span::MINUTE.times(10));
        scenario.policies[0].rotation.overlap_extra = extra;
        advised += 1;
    }
    assert!((1..20).contains(&advised), "advised {advised} times");
}

#[test]
fn a_seed_says_everything() {
    let run = || format!("{:?}", play(&usual(3), &Ours, |_| ()));
    assert_eq!(run(), run());
}

#[test]
fn margins_shrink_by_what_is_true_and_not_declared() {
    let least = |scenario: &Scenario| play(scenario, &Ours, |_| ()).early.expect("keys were new").millis;
    let mut scenario = usual(1);
    scenario.reality.faults = Faults::NONE;
    let before = least(&scenario);
    scenario.reality.layers = scenario.reality.layers + Span::MINUTE;
    assert!((before - 60_000 - least(&scenario)).abs() <= 60_000, "within what clocks differ by");
    assert!(before >= 0);
}
