//! Any input: what `tests/fuzz/targets` says must hold, for every file of the corpus and for seeded changes to them. Each run
//! also tries a seed of its own, which it prints. CONTRIBUTING.md tells how to run it for longer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "fuzz/http.rs"]
mod http;
#[path = "fuzz/measure.rs"]
mod measure;
#[path = "fuzz/mutate.rs"]
mod mutate;
mod support;
#[path = "fuzz/targets/mod.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use jwksd::simulation::random::Random;

use measure::Measured;
use mutate::mutate;
use targets::{TARGETS, Target, Verdict};

/// The seed of every run, besides a new one.
const SEED: u64 = 20_261_122;

/// No input may cost more, of one processor that others use too, unoptimised; the worst found costs a tenth.
const LONGEST_MILLIS: u64 = 5_000;
/// No input may hold more memory at once, in bytes.
const MOST_BYTES: usize = 32 * 1024 * 1024;

#[test]
fn configurations_are_understood_or_refused_with_reasons() {
    fuzz("config", 4_000);
}

#[test]
fn keys_that_are_imported_are_sound_and_stay_secret() {
    fuzz("keys", 10_000);
}

#[test]
fn tokens_verify_only_where_jsonwebtoken_agrees() {
    fuzz("tokens", 15_000);
}

#[test]
fn what_is_issued_keeps_the_keysets_rules() {
    fuzz("claims", 50_000);
}

#[test]
fn records_are_believed_only_as_they_were_sealed() {
    fuzz("records", 8_000);
}

#[test]
fn crontab_lines_fire_as_in_croner_and_ever_later() {
    fuzz("cron", 4_000);
}

/// One input of the corpus.
struct Case {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// The corpus of a target as it is, then so many changes by each of two seeds; or, with `JWKSD_FUZZ_SECONDS`, changes by one
/// seed for that long.
fn fuzz(name: &str, changes: u64) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target of that name");
    let cases = corpus(name);
    let verdicts: Vec<Verdict> = cases.iter().map(|case| judge(target, &case.bytes, &case.path.display())).collect();
    for verdict in [Verdict::Accepted, Verdict::Refused] {
        let count = verdicts.iter().filter(|found| **found == verdict).count();
        assert!(count > 0, "no file of the corpus of {name} is {verdict:?}: what is asked of those is not tested");
    }
    let fresh = fresh_seed();
    match asked("JWKSD_FUZZ_SECONDS") {
        None => {
            run(target, &cases, SEED, |count, _| count < changes);
            run(target, &cases, fresh, |count, _| count < changes);
        }
        Some(seconds) => run(target, &cases, fresh, |_, millis| millis < seconds * 1000),
    }
}

/// The seed that somebody asks for, or one that nobody chose.
fn fresh_seed() -> u64 {
    asked("JWKSD_FUZZ_SEED").unwrap_or_else(|| u64::from_be_bytes(jwksd::random::bytes()) % 1_000_000_000)
}

fn asked(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// Changes files of the corpus, one after the other, while `goes_on` of how many were tried and of the milliseconds used.
fn run(target: &Target, cases: &[Case], seed: u64, goes_on: impl Fn(u64, u64) -> bool) {
    println!("{}: JWKSD_FUZZ_SEED={seed}", target.name);
    let mut random = Random::new(seed);
    let start = Measured::begin();
    let (mut count, mut accepted) = (0, 0);
    while goes_on(count, start.millis()) {
        let (case, other) = (&cases[random.index(cases.len())], &cases[random.index(cases.len())]);
        let bytes = mutate(&case.bytes, &other.bytes, target.longest, &mut random);
        let what = format!("change {count} by the seed {seed}, to {}", case.path.display());
        accepted += u64::from(judge(target, &bytes, &what) == Verdict::Accepted);
        count += 1;
    }
    println!("{}: {accepted} of {count} changed inputs were accepted, in {} ms", target.name, start.millis());
}

/// Runs the target on an input. One with which something does not hold is kept.
fn judge(target: &Target, bytes: &[u8], what: &dyn std::fmt::Display) -> Verdict {
    let measured = Measured::begin();
    let verdict = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    let (millis, most) = (measured.millis(), measured.most_bytes());
    let problem = match verdict {
        Ok(verdict) if millis <= LONGEST_MILLIS && most <= MOST_BYTES => return verdict,
        Ok(_) => format!("it took {millis} ms and {most} bytes"),
        Err(_) => "see the panic above".to_owned(),
    };
    let kept = keep(target.name, bytes);
    panic!("{}: {what}: {problem}. The input is in {}", target.name, kept.display());
}

fn keep(name: &str, bytes: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fuzz-found").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let digest = jwksd::store::Digest::of(bytes).to_base64url();
    let path = folder.join(&digest[..16]);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn corpus(name: &str) -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(name);
    let files = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| Case { bytes: std::fs::read(&path).unwrap(), path }).collect()
}
