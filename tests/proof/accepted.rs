//! What is accepted holds.

use std::sync::atomic::{AtomicU64, Ordering};

use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Timestamp;
use jwksd::simulation::random::Random;

use jwksd::simulation::{Faults, Report, play};

use crate::rules::Within;
use crate::written::Written;
use crate::{is_broken, number, told};

/// How many configurations the first test plays.
const SCENARIOS: u64 = 80;

/// How many rotations are played unless `JWKSD_PROOF_ROTATIONS` says otherwise.
const ROTATIONS: u64 = 5_000;

/// Rotations of one configuration in a long run.
const OF_ONE: u32 = 500;

/// Plays every keyset of the configuration that the seed gives, for about so many rotations each; `None` where it is
/// refused. What other keysets of the issuer publish at most is not free for a keyset.
fn played(seed: u64, rotations: u32) -> Option<Vec<Report>> {
    let mut random = Random::new(seed);
    let written = Written::any(&mut random);
    let policies = written.read().ok()?;
    let keys: Vec<i64> = written.keysets.iter().map(|keyset| written.keys(keyset)).collect();
    let play_one = |number: usize| {
        let mut scenario = written.scenario(number, &policies, rotations, seed);
        if random.below(4) == 0 {
            scenario.policies.extend(written.changed(number, &mut random));
        }
        let others: i64 = keys.iter().sum::<i64>() - keys[number];
        let rules = Within::new(10 - u32::try_from(others).unwrap());
        let report = play(&scenario, &rules, |_| ());
        assert!(!is_broken(&report), "{}", told(seed, &scenario, &report));
        let margins = report.early.iter().chain(&report.late);
        margins.for_each(|margin| assert!(margin.millis >= 0, "seed {seed}: {report:#?}"));
        report
    };
    Some((0..policies.len()).map(play_one).collect())
}

/// `JWKSD_PROOF_SCENARIOS` plays more, `JWKSD_PROOF_SEED` one again.
#[test]
fn what_is_accepted_rejects_no_live_token() {
    let (only, wanted) = (number("JWKSD_PROOF_SEED"), number("JWKSD_PROOF_SCENARIOS").unwrap_or(SCENARIOS));
    let (mut scenarios, mut presented) = (0, 0);
    for seed in only.unwrap_or(1).. {
        let reports = played(seed, 100);
        scenarios += u64::from(reports.is_some());
        presented += reports.iter().flatten().map(|report| report.presented).sum::<u64>();
        if only.is_some() || scenarios == wanted {
            break;
        }
    }
    println!("{scenarios} configurations, {presented} live tokens shown");
    assert!(only.is_some() || presented > 1_000 * scenarios, "{presented} are too few to say anything");
}

/// Runs that found something once. In this one the simulation forgot that a key was revoked while a replica that was late
/// still signed with it.
#[test]
fn what_was_found_once_stays_right() {
    assert!(played(1_000_016, OF_ONE).is_some());
}

/// As many rotations as `JWKSD_PROOF_ROTATIONS` says, of ever other configurations, on two threads.
#[test]
fn a_million_rotations() {
    let wanted = number("JWKSD_PROOF_ROTATIONS").unwrap_or(ROTATIONS);
    let (next, rotated, presented) = (AtomicU64::new(1_000_000), AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        while rotated.load(Ordering::Relaxed) < wanted {
            let reports = played(next.fetch_add(1, Ordering::Relaxed), OF_ONE);
            for report in reports.into_iter().flatten() {
                rotated.fetch_add(report.rotations, Ordering::Relaxed);
                presented.fetch_add(report.presented, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    let [seeds, rotated, presented] = [next, rotated, presented].map(AtomicU64::into_inner);
    println!("{rotated} rotations, {presented} live tokens shown, of {} configurations", seeds - 1_000_000);
    assert!(rotated >= wanted && presented > rotated);
}

/// Where nothing goes wrong, every rotation comes when it is due, and no more keys are published than was counted.
#[test]
fn what_is_accepted_keeps_its_schedule_and_its_number_of_keys() {
    let mut tight = 0;
    for seed in 1..=150 {
        let written = Written::any(&mut Random::new(seed));
        let Ok(policies) = written.read() else { continue };
        for (number, keyset) in written.keysets.iter().enumerate() {
            let mut scenario = written.scenario(number, &policies, 15, seed);
            scenario.reality.faults = Faults::NONE;
            let counted = u32::try_from(written.keys(keyset)).unwrap();
            let rules = Within::new(counted);
            let report = play(&scenario, &rules, |_| ());
            let ends = scenario.begins + scenario.lasts;
            let due = occurrences(&policies[number].rotation.schedule, scenario.begins, ends);
            // The first key signs when it is made, and the clock that counts from there is off by up to σ.
            assert!(report.rotations + 1 >= due, "seed {seed}: {} of {due} rotations\n{keyset:#?}", report.rotations);
            assert!(rules.most.get() <= counted, "seed {seed}: {} keys, not {counted}", rules.most.get());
            tight += u32::from(rules.most.get() == counted);
        }
    }
    assert!(tight > 20, "{tight} keysets had as many keys as was counted");
}

/// How often a schedule wants to rotate, if it can each time.
pub(crate) fn occurrences(schedule: &Schedule, from: Timestamp, until: Timestamp) -> u64 {
    let (mut at, mut count) = (from, 0);
    while let Some(next) = schedule.due(at, at).filter(|next| *next < until) {
        (at, count) = (next, count + 1);
    }
    count
}
