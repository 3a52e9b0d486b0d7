//! What is refused for its timing fails, or lies within a margin that docs/simulate.md tells of.

use std::collections::BTreeMap;

use jwksd::keyring::policy::Policy;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timing::Finding;
use jwksd::simulation::random::Random;
use jwksd::simulation::rules::{Ours, Rules};
use jwksd::simulation::{Faults, Report, Scenario, play};

use crate::accepted::occurrences;
use crate::rules::Within;
use crate::written::{Keyset, Schedule, Written};
use crate::{SEEDS, is_broken};

/// Why a keyset is refused, as DESIGN §4 says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reason {
    /// Shorter than caches, verifiers, lag and σ together.
    Propagation,
    /// Shorter than the `max_age` that documents are given out with.
    MaxAge,
    /// Rotations by a period, or by a crontab line, are no further apart than propagation.
    Period,
    Line,
    /// More than three years apart.
    Years,
    NoSuccessor,
    /// More than ten keys in one document.
    Keys,
}

const REASONS: [Reason; 7] = [
    Reason::Propagation,
    Reason::MaxAge,
    Reason::Period,
    Reason::Line,
    Reason::Years,
    Reason::NoSuccessor,
    Reason::Keys,
];

/// Of each reason so many configurations are looked at.
const OF_EACH: usize = 4;

/// One keyset that is refused for one reason, of a configuration in which nothing else is wrong.
struct Refused {
    seed: u64,
    written: Written,
    number: usize,
    reason: Reason,
    policy: Policy,
}

#[test]
fn what_is_refused_fails_or_lies_within_a_known_margin() {
    let mut seen: BTreeMap<Reason, usize> = BTreeMap::new();
    for seed in 1..5_000 {
        let written = Written::any(&mut Random::new(seed));
        let reasons = reasons(&written);
        let mut findings = written.read().err().unwrap_or_default();
        // Ten keys never take so many bytes: where these are too many, keys are too.
        findings.retain(|finding| !finding.message.contains("bytes, more than"));
        assert_eq!(findings.len(), reasons.len(), "seed {seed}: {findings:#?}\n{reasons:?}\n{written:#?}");
        let [(number, reason)] = reasons[..] else { continue };
        let told = seen.entry(reason).or_default();
        if *told == OF_EACH {
            continue;
        }
        *told += 1;
        assert_is_for(reason, &findings[0]);
        let policy = written.policies().swap_remove(number);
        Refused { seed, written, number, reason, policy }.judge();
        if REASONS.iter().all(|reason| seen.get(reason) == Some(&OF_EACH)) {
            return;
        }
    }
    panic!("not every reason came up often enough: {seen:?}");
}

/// Which rules of DESIGN §4 a configuration breaks, computed from what was written: of which keyset (the first, where
/// all are concerned), and why.
fn reasons(written: &Written) -> Vec<(usize, Reason)> {
    let mut reasons = Vec::new();
    for (number, keyset) in written.keysets.iter().enumerate() {
        let (propagation, gap) = (keyset.propagation, keyset.schedule.gap());
        if propagation < written.needed(keyset) {
            reasons.push((number, Reason::Propagation));
        } else if propagation < written.max_age {
            reasons.push((number, Reason::MaxAge));
        }
        if gap <= propagation {
            let by_line = matches!(keyset.schedule, Schedule::Line(_));
            reasons.push((number, if by_line { Reason::Line } else { Reason::Period }));
        }
        if gap > Span::DAY.times(3 * 365) {
            reasons.push((number, Reason::Years));
        }
        if keyset.successors == 0 {
            reasons.push((number, Reason::NoSuccessor));
        }
    }
    if written.keysets.iter().map(|keyset| written.keys(keyset)).sum::<i64>() > 10 {
        reasons.push((0, Reason::Keys));
    }
    reasons
}

fn assert_is_for(reason: Reason, finding: &Finding) {
    let (key, words) = match reason {
        Reason::Propagation => ("rotation.propagation", "raise it to at least"),
        Reason::MaxAge => ("rotation.propagation", "for which anyone may keep a JWKS"),
        Reason::Period => ("rotation.every", "not longer than rotation.propagation"),
        Reason::Line => ("rotation.schedule", "not longer than rotation.propagation"),
        Reason::Years => ("rotation.every", "longer than 3 years"),
        Reason::NoSuccessor => ("rotation.successors", "no published key to rotate to"),
        Reason::Keys => ("", "more than 10"),
    };
    assert!(finding.key == key && finding.message.contains(words), "{reason:?}: {finding:?}");
}

impl Refused {
    fn judge(&self) {
        let keyset = &self.written.keysets[self.number];
        match self.reason {
            Reason::Propagation => self.judge_propagation(keyset),
            Reason::MaxAge => {
                // A cache that goes by what the document itself says.
                let max_age = self.written.max_age;
                assert!(self.fails(SEEDS, |scenario| scenario.reality.layers = max_age), "{}", self.told());
            }
            Reason::Period | Reason::Line => self.judge_schedule(keyset),
            // No promise: keys are to be replaced while their algorithm can be relied on.
            Reason::Years => {
                assert!(!self.fails(2, |scenario| scenario.lasts = Span::DAY.times(20)), "{}", self.told())
            }
            Reason::NoSuccessor => {
                let report = self.undisturbed(20, &Ours);
                assert_eq!((report.rotations, report.rejected), (0, 0), "{}", self.told());
            }
            Reason::Keys => self.judge_keys(),
        }
    }

    /// A single writer measures the wait with one clock, so that it has all of σ to spare.
    fn judge_propagation(&self, keyset: &Keyset) {
        let missing = self.written.needed(keyset).saturating_sub(keyset.propagation);
        let margin = if self.written.shared.is_some() { Span::ZERO } else { keyset.clock_skew };
        // As often as the wait allows, so that nothing but the wait stands between a new key and its tokens.
        let often = |scenario: &mut Scenario| {
            let rotation = &mut scenario.policies[0].rotation;
            let gap = rotation.propagation + Span::from_millis(1);
            (rotation.schedule, rotation.successors) = (jwksd::keyring::schedule::Schedule::Every(gap), 1);
            scenario.lasts = gap.times(300);
        };
        // A run that never fails is not looked for as long as one that does.
        let seeds = if missing > margin { SEEDS } else { 5 };
        let fails = self.fails(seeds, often);
        assert_eq!(fails, missing > margin, "{missing} are missing, the margin is {margin}: {}", self.told());
    }

    /// Nothing signs before its time, so nothing is rejected; but rotations do not come as often as was asked for, unless
    /// gap and propagation are equal to within what making a key takes.
    fn judge_schedule(&self, keyset: &Keyset) {
        let wanted =
            if keyset.schedule == Schedule::Line(0) || keyset.schedule == Schedule::Line(1) { 400 } else { 50 };
        let report = self.undisturbed(wanted, &Ours);
        let until = BEGINS + keyset.schedule.gap().times(wanted);
        let due = occurrences(&self.policy.rotation.schedule, BEGINS, until);
        assert_eq!(report.rejected, 0, "{}", self.told());
        let late = due.saturating_sub(report.rotations);
        let margin = keyset.propagation.saturating_sub(keyset.schedule.gap()).as_millis() * i64::from(wanted);
        if margin > keyset.schedule.gap().as_millis() {
            assert!(late > 0, "{due} were due, {} came: {}", report.rotations, self.told());
        }
    }

    /// With room for all, so many are published as was counted, or one less, since the last of them leaves just when the
    /// next one comes; with room for ten, rotations are late.
    fn judge_keys(&self) {
        let counted: i64 = self.written.keysets.iter().map(|keyset| self.written.keys(keyset)).sum();
        let policies = self.written.policies();
        let mut most = 0;
        for number in 0..policies.len() {
            let rules = Within::new(u32::MAX);
            let mut scenario = self.written.scenario(number, &policies, 40, self.seed);
            scenario.reality.faults = Faults::NONE;
            play(&scenario, &rules, |_| ());
            most += i64::from(rules.most.get());
        }
        let keysets = i64::try_from(policies.len()).unwrap();
        assert!(most <= counted && most >= counted - keysets, "{most} keys, {counted} were counted: {}", self.told());
    }

    /// Whether any run fails of the world that was declared, after `change`.
    fn fails(&self, seeds: u64, change: impl Fn(&mut Scenario)) -> bool {
        (1..=seeds).any(|seed| {
            let policies = self.written.policies();
            let mut scenario = self.written.scenario(self.number, &policies, 100, seed);
            change(&mut scenario);
            is_broken(&play(&scenario, &Ours, |_| ()))
        })
    }

    fn undisturbed(&self, rotations: u32, rules: &impl Rules) -> Report {
        let mut scenario = self.written.scenario(self.number, &self.written.policies(), rotations, self.seed);
        scenario.reality.faults = Faults::NONE;
        play(&scenario, rules, |_| ())
    }

    fn told(&self) -> String {
        format!("seed {}: {:?}\n{:#?}", self.seed, self.reason, self.written)
    }
}

/// When every scenario begins.
const BEGINS: Timestamp = Timestamp::from_secs(1_800_000_000);
