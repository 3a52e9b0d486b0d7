//! Whether what `check` accepts holds: years of random configurations, played with everything that goes wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::change::Change;
use jwksd::keyring::decide::{Decision, Refusal, Request, decide};
use jwksd::keyring::name::Name;
use jwksd::keyring::plan::{Desired, Facts, Plan, plan};
use jwksd::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::record::{Key, KeyState, Keyring};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timing::{self, Severity};
use jwksd::simulation::random::Random;
use jwksd::simulation::rules::{Ours, Rules};
use jwksd::simulation::{Advice, Caching, Faults, Reality, Report, Scenario, advise, play};

fn span(random: &mut Random, low: i64, high: i64) -> Span {
    Span::from_millis(random.between(low, high))
}

/// Any policy, mostly near what is just allowed.
fn policy(random: &mut Random, shared: bool) -> Policy {
    let caches: Vec<Span> = (0..=random.below(2)).map(|_| span(random, 0, 600_000)).collect();
    let stale_if_error = if random.below(3) == 0 { span(random, 0, 60_000) } else { Span::ZERO };
    let verifiers: Vec<Verifier> = (0..random.below(4))
        .map(|number| {
            let sees_new = span(random, 0, 3_600_000);
            Verifier { name: format!("v{number}"), sees_new, keeps_old: Some(sees_new) }
        })
        .collect();
    let clock_skew = Span::from_secs(random.between(0, 120));
    let publish_lag = if shared { span(random, 0, 60_000) } else { Span::ZERO };
    let staleness_limit = if shared { span(random, 1_000, 3_600_000) } else { Span::ZERO };
    let needed = caches.iter().copied().sum::<Span>()
        + stale_if_error
        + verifiers.iter().map(|verifier| verifier.sees_new).max().unwrap_or_default()
        + clock_skew
        + publish_lag;
    let propagation = needed + if random.below(2) == 0 { Span::from_millis(1) } else { span(random, 1, 3_600_000) };
    let every = propagation
        + Span::from_millis(1)
        + if random.below(2) == 0 { Span::ZERO } else { span(random, 0, 36_000_000) };
    let max_ttl = Span::from_secs(random.between(1, 3600));
    Policy {
        issuer: IssuerPolicy {
            name: Name::parse("main").unwrap(),
            url: "https://auth.example.com".to_owned(),
            max_age: caches[0],
            stale_if_error,
            caches,
            jwks_paths: Vec::new(),
            discovery: Discovery::Minimal,
            probes: Vec::new(),
        },
        algorithm: Algorithm::Es256,
        backend: "local".to_owned(),
        rotation: RotationPolicy {
            schedule: Schedule::Every(every),
            propagation,
            successors: 1 + u32::try_from(random.below(2)).unwrap(),
            overlap_extra: Span::ZERO,
            bootstrap: Bootstrap::Wait,
            verifiers,
            clock_skew,
            staleness_limit,
            publish_lag,
        },
        tokens: TokenPolicy {
            max_ttl,
            default_ttl: max_ttl,
            required_claims: Vec::new(),
            forbidden_claims: Vec::new(),
            audiences: Vec::new(),
            types: vec!["JWT".to_owned()],
            backdate: Span::ZERO,
        },
    }
}

fn is_accepted(policy: &Policy) -> bool {
    let name = Name::parse("default").unwrap();
    let mut findings = timing::examine_keyset(&name, policy);
    findings.extend(timing::examine_issuer(&policy.issuer.name, &[(name, policy)]));
    findings.iter().all(|finding| finding.severity != Severity::Refused)
}

fn declared(policy: &Policy, replicas: usize) -> Reality {
    let declared = policy.rotation.verifiers.iter();
    let mut verifiers: Vec<Caching> =
        declared.map(|verifier| Caching { name: verifier.name.clone(), sees_new: verifier.sees_new }).collect();
    verifiers.push(Caching { name: "no cache".to_owned(), sees_new: Span::ZERO });
    Reality {
        replicas,
        skew: policy.rotation.clock_skew,
        lag: policy.rotation.publish_lag,
        layers: policy.issuer.cache_span(),
        verifiers,
        tokens: 12,
        faults: Faults::ALL,
    }
}

fn scenario(seed: u64) -> Option<Scenario> {
    let mut random = Random::new(seed);
    let shared = random.below(2) == 0;
    let policy = policy(&mut random, shared);
    if !is_accepted(&policy) {
        return None;
    }
    let replicas = if shared { 2 + random.index(3) } else { 1 };
    let every = match policy.rotation.schedule {
        Schedule::Every(every) => every,
        _ => unreachable!("only periods are drawn"),
    };
    let reality = declared(&policy, replicas);
    Some(Scenario {
        keyset: Name::parse("default").unwrap(),
        policies: vec![policy],
        reality,
        begins: Timestamp::from_secs(1_800_000_000),
        lasts: every.times(100),
        seed,
    })
}

/// How many scenarios the first test plays.
const SCENARIOS: u64 = 30;

/// Within so many seeds every flaw has to be found.
const SEEDS: u64 = 40;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} = {text} is not a number")))
}

/// Whether a run shows that a promise was broken.
fn is_broken(report: &Report) -> bool {
    report.rejected > 0 || report.misused > 0
}

/// `JWKSD_PROOF_SCENARIOS` plays more, `JWKSD_PROOF_SEED` one again.
#[test]
fn what_is_accepted_rejects_no_live_token() {
    let (only, wanted) = (number("JWKSD_PROOF_SEED"), number("JWKSD_PROOF_SCENARIOS").unwrap_or(SCENARIOS));
    let (mut played, mut presented) = (0, 0);
    let mut seed = only.unwrap_or(1);
    while played < wanted {
        if let Some(scenario) = scenario(seed) {
            let report = play(&scenario, &Ours, |_| ());
            assert!(
                !is_broken(&report),
                "JWKSD_PROOF_SEED={seed}\n{:#?}\n{:#?}\n{:#?}\n{}",
                report.incident,
                scenario.policies[0].rotation,
                scenario.reality,
                report.story.join("\n")
            );
            assert!(
                report.early.iter().chain(&report.late).all(|margin| margin.millis >= 0),
                "seed {seed}: {report:#?}"
            );
            presented += report.presented;
            played += 1;
        }
        if only.is_some() {
            return;
        }
        seed += 1;
    }
    println!("{played} scenarios, {presented} live tokens shown");
    assert!(presented > 1_000 * played, "{presented} presentations are too few to say anything");
}

/// The first seed whose run fails, of scenarios that `change` was made to.
fn found(rules: &impl Rules, change: impl Fn(&mut Scenario)) -> Option<u64> {
    let mut scenarios = (1..=SEEDS).filter_map(|seed| Some((seed, scenario(seed)?)));
    scenarios.find_map(|(seed, mut scenario)| {
        change(&mut scenario);
        is_broken(&play(&scenario, rules, |_| ())).then_some(seed)
    })
}

/// A planner that sees another keyring than there is.
struct Misled<F>(F);

impl<F: Fn(&mut Keyring)> Rules for Misled<F> {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan {
        let mut seen = keyring.clone();
        (self.0)(&mut seen);
        let policy = seen.policy.clone();
        plan(&seen, &Facts { desired: Desired::Policy(&policy), ..facts.clone() })
    }

    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring {
        keyring.after(change, now)
    }

    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
        decide(keyring, facts, request)
    }
}

/// Writes something else than was decided.
struct Miswritten<F, G> {
    after: F,
    decided: G,
}

impl<F: Fn(&Change, &mut Keyring), G: Fn(&Keyring, &mut Keyring)> Rules for Miswritten<F, G> {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan {
        plan(keyring, facts)
    }

    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring {
        let mut next = keyring.after(change, now);
        (self.after)(change, &mut next);
        next
    }

    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
        let mut decision = decide(keyring, facts, request)?;
        if let Decision::Write { next, .. } = &mut decision {
            (self.decided)(keyring, next);
        }
        Ok(decision)
    }
}

fn halved(span: Span) -> Span {
    Span::from_millis(span.as_millis() / 2)
}

#[test]
fn a_promotion_before_propagation_is_found() {
    let early = Misled(|keyring: &mut Keyring| {
        keyring.policy.rotation.propagation = halved(keyring.policy.rotation.propagation);
        keyring.policy.rotation.schedule = Schedule::Every(keyring.policy.rotation.propagation + Span::SECOND);
    });
    assert!(found(&early, |_| ()).is_some());
}

#[test]
fn a_removal_before_the_overlap_has_passed_is_found() {
    let early = Misled(|keyring: &mut Keyring| {
        for key in &mut keyring.keys {
            (key.ttl_bound, key.overlap_bound) = (halved(key.ttl_bound), Span::ZERO);
        }
    });
    assert!(found(&early, |_| ()).is_some());
}

#[test]
fn an_overlap_that_counts_from_the_creation_of_the_key_is_found() {
    let early = Misled(|keyring: &mut Keyring| {
        for key in &mut keyring.keys {
            key.stopped_at = key.stopped_at.map(|_| key.created_at);
        }
    });
    assert!(found(&early, |_| ()).is_some());
}

#[test]
fn a_bound_that_is_forgotten_when_max_ttl_is_lowered_is_found() {
    let forgetful = Miswritten {
        after: |change: &Change, next: &mut Keyring| {
            if let Change::AdoptPolicy(policy) = change {
                for key in &mut next.keys {
                    (key.ttl_bound, key.overlap_bound) = (policy.tokens.max_ttl, policy.overlap());
                }
            }
        },
        decided: |_: &Keyring, _: &mut Keyring| (),
    };
    let lowered = |scenario: &mut Scenario| {
        let mut policy = scenario.policies[0].clone();
        policy.tokens.max_ttl = Span::SECOND;
        policy.tokens.default_ttl = Span::SECOND;
        scenario.policies.push(policy);
    };
    assert!(found(&forgetful, lowered).is_some());
    assert_eq!(found(&Ours, lowered), None, "the daemon's own rules remember");
}

#[test]
fn a_revoked_key_that_signs_on_is_found() {
    let deaf = Miswritten {
        after: |_: &Change, _: &mut Keyring| (),
        decided: |before: &Keyring, next: &mut Keyring| {
            // The answer says revoked, the record does not.
            let revoked = |key: &&Key| next.key(key.serial).is_some_and(|key| key.state == KeyState::Revoked);
            if before.keys.iter().any(|key| key.state == KeyState::Active && revoked(&key)) {
                next.keys.clone_from(&before.keys);
            }
        },
    };
    assert!(found(&deaf, |_| ()).is_some());
}

#[test]
fn what_is_true_but_not_declared_is_found() {
    let hours = Span::HOUR.times(2);
    assert!(found(&Ours, |scenario| scenario.reality.layers = scenario.reality.layers + hours).is_some(), "a layer");
    let slower = |scenario: &mut Scenario| {
        scenario.reality.verifiers.push(Caching { name: "slower".to_owned(), sees_new: hours.times(2) });
    };
    assert!(found(&Ours, slower).is_some(), "a slower verifier");
    assert!(found(&Ours, |scenario| scenario.reality.skew = hours).is_some(), "clocks");
    let lag = |scenario: &mut Scenario| {
        if scenario.reality.replicas > 1 {
            scenario.reality.lag = hours;
        }
    };
    assert!(found(&Ours, lag).is_some(), "late replicas");
}

/// What `check` refuses is refused for a reason: one second less than it asks for fails where several write, because the
/// clocks of two managers may eat up all of σ. A single writer measures the wait with one clock, so it has all of σ to spare.
#[test]
fn one_second_less_than_is_asked_for_fails_or_lies_within_the_difference_of_clocks() {
    let short = |scenario: &mut Scenario| {
        let policy = &mut scenario.policies[0];
        policy.rotation.propagation = policy.visibility_window().saturating_sub(Span::SECOND);
        policy.rotation.schedule = Schedule::Every(policy.rotation.propagation + Span::SECOND);
        assert!(!is_accepted(policy));
    };
    let shared = |scenario: &mut Scenario| {
        short(scenario);
        if scenario.reality.replicas == 1 {
            scenario.lasts = Span::ZERO;
        }
    };
    assert!(found(&Ours, shared).is_some(), "several that write");
    let single = |scenario: &mut Scenario| {
        short(scenario);
        if scenario.reality.replicas > 1 || scenario.reality.skew < Span::SECOND {
            scenario.lasts = Span::ZERO;
        }
    };
    assert_eq!(found(&Ours, single), None, "one that writes");
}

/// A usual policy with room to spare, played for a while.
fn usual(replicas: usize) -> Scenario {
    let mut policy = (1..).find_map(scenario).expect("one is accepted").policies.remove(0);
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
    let reality = declared(&policy, replicas);
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
