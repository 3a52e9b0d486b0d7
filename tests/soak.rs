//! The soak of `benches/soak`, short and judged by counts: rotations every few seconds under load fail no request, reject
//! no token and leave no file open.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

#[allow(dead_code, reason = "the program prints more than is judged here")]
#[path = "../benches/soak/run.rs"]
mod run;
#[path = "../benches/support/mod.rs"]
mod support;
#[path = "../benches/soak/verdict.rs"]
mod verdict;

use std::time::Duration;

use run::{Latencies, Plan, Sample};

#[tokio::test(flavor = "multi_thread")]
async fn rotations_under_load_fail_no_request_and_leave_no_file_open() {
    let plan = Plan { length: Duration::from_secs(18), every: Duration::from_millis(500) };
    let soak = run::soak(env!("CARGO_BIN_EXE_jwksd").into(), &plan).await.unwrap();
    assert_eq!(soak.failures, 0, "the first: {}", soak.first_failure);
    assert!(soak.rotations() >= 5, "{} rotations", soak.rotations());
    assert!(soak.verifications > 100, "{} verifications", soak.verifications);
    // Between two steps of a rotation a file of the store is open, at most for a moment.
    let fewest = |samples: &[Sample]| samples.iter().map(|sample| sample.open_files).min();
    let (first, last) = soak.samples.split_at(soak.samples.len() / 2);
    assert!(fewest(last) <= fewest(first), "files stay open: {:?}", soak.samples);
}

#[test]
fn what_grows_is_not_flat_and_what_wavers_is() {
    let flat: Vec<Sample> = (0..20).map(|number| sample(number, 0)).collect();
    assert!(verdict::compare(&flat).iter().all(|finding| finding.flat));
    let leaking: Vec<Sample> = (0..20).map(|number| sample(number, number)).collect();
    let not_flat: Vec<_> = verdict::compare(&leaking).into_iter().filter(|finding| !finding.flat).collect();
    let figures: Vec<_> = not_flat.iter().map(|finding| finding.figure).collect();
    assert_eq!(figures, ["RSS, MB", "open files"]);
    assert!(not_flat[0].to_string().contains("NOT FLAT"), "{}", not_flat[0]);
    assert!(verdict::compare(&[]).iter().all(|finding| !finding.flat), "a run without samples shows nothing");
}

/// Wavers from one to the next, and leaks a megabyte and a file per `leaks`.
fn sample(number: u64, leaks: u64) -> Sample {
    let waver = number % 3;
    let latencies = Latencies { p50: 0.2 + waver as f64 * 0.05, p99: 1.0 + waver as f64 * 0.5 };
    Sample {
        at: Duration::from_secs(60 * number),
        resident: 20_000_000 + waver * 500_000 + leaks * 1_000_000,
        open_files: 20 + waver % 2 + leaks,
        threads: 8 + waver,
        jwks_bytes: 1_000,
        rotations: 20 * number,
        requests: 30_000,
        signatures: latencies,
        documents: latencies,
    }
}
