//! Whether what `check` accepts holds, and what it refuses is refused for a reason: years of random configurations, played
//! with everything that goes wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "proof/accepted.rs"]
mod accepted;
#[path = "proof/advice.rs"]
mod advice;
#[path = "proof/flaws.rs"]
mod flaws;
#[path = "proof/refused.rs"]
mod refused;
#[path = "proof/rules.rs"]
mod rules;
#[path = "proof/written.rs"]
mod written;

use jwksd::simulation::random::Random;
use jwksd::simulation::rules::Rules;
use jwksd::simulation::{Report, Scenario, play};
use written::Written;

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

/// What a broken promise looks like.
fn told(seed: u64, scenario: &Scenario, report: &Report) -> String {
    let what = match &report.incident {
        Some(incident) if incident.is_early() => "a verifier did not know the key yet",
        Some(_) => "a verifier did not know the key any more",
        None => "a revoked key signs",
    };
    let (rotation, story) = (&scenario.policies[0].rotation, report.story.join("\n"));
    let incident = &report.incident;
    format!("JWKSD_PROOF_SEED={seed}: {what}\n{incident:#?}\n{rotation:#?}\n{:#?}\n{story}", scenario.reality)
}

/// The scenario of a seed, where its configuration is accepted: of its first keyset, for a hundred rotations.
fn scenario(seed: u64) -> Option<Scenario> {
    let written = Written::any(&mut Random::new(seed));
    Some(written.scenario(0, &written.read().ok()?, 100, seed))
}

/// The first seed whose run fails, of scenarios that `change` was made to.
fn found(rules: &impl Rules, change: impl Fn(&mut Scenario)) -> Option<u64> {
    let mut scenarios = (1..=SEEDS).filter_map(|seed| Some((seed, scenario(seed)?)));
    scenarios.find_map(|(seed, mut scenario)| {
        change(&mut scenario);
        is_broken(&play(&scenario, rules, |_| ())).then_some(seed)
    })
}
