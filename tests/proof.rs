//! Whether what `check` accepts holds: years of random configurations, played with everything that goes wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timing::{self, Severity};
use jwksd::simulation::random::Random;
use jwksd::simulation::rules::Ours;
use jwksd::simulation::{Caching, Faults, Reality, Report, Scenario, play};

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
    let every = propagation + Span::from_millis(1) + if random.below(2) == 0 { Span::ZERO } else { span(random, 0, 36_000_000) };
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
        layers: policy.issuer.caches.iter().copied().sum(),
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
        lasts: every.times(200),
        seed,
    })
}

#[test]
fn what_is_accepted_rejects_no_live_token() {
    let (mut played, mut rotations, mut presented) = (0, 0, 0);
    let begin = std::time::Instant::now();
    for seed in 1.. {
        let Some(scenario) = scenario(seed) else { continue };
        let report = play(&scenario, &Ours, |_| ());
        if let Some(incident) = &report.incident {
            panic!("seed {seed}: {incident:#?}\n{:#?}\n{:#?}\n{}", scenario.policies[0].rotation, scenario.reality, report.story.join("\n"));
        }
        played += 1;
        rotations += report.rotations;
        presented += report.presented;
        if played == 40 {
            println!("{played} {rotations} {presented} {:?}", begin.elapsed());
            println!("{:?} {:?}", report.early, report.late);
            return;
        }
    }
}

#[allow(dead_code)]
fn unused(_: Report) {}
