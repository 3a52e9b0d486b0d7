//! A daemon under constant load that rotates every few seconds: does anything grow? Prints what was sampled, compares the
//! first quarter with the last one, and fails if a request did or something was not flat. `docs/performance.md` says more.
//!
//! ```console
//! $ benches/run soak [MINUTES] [--binary PATH]
//! ```

#[path = "../support/mod.rs"]
mod support;

mod run;
mod verdict;

use std::process::ExitCode;
use std::time::Duration;

use run::{Plan, Soak};
use support::Outcome;
use support::arguments::Arguments;
use support::table::Table;

const MINUTES: f64 = 20.0;

/// Samples per run; those of twenty minutes are a minute long.
const SAMPLES: u32 = 20;

#[tokio::main]
async fn main() -> Outcome<ExitCode> {
    let arguments = Arguments::read(&["binary"])?;
    let minutes = arguments.positional.first().map_or(Ok(MINUTES), |minutes| minutes.parse())?;
    let length = Duration::from_secs_f64(minutes * 60.0);
    let plan = Plan { length, every: length / SAMPLES };
    let soak = run::soak(arguments.binary()?, &plan).await?;
    print(&soak);
    let failed = soak.failures > 0;
    if failed {
        println!("{} requests or verifications failed, the first: {}", soak.failures, soak.first_failure);
    }
    let findings = verdict::compare(&soak.samples);
    for finding in &findings {
        println!("{finding}");
    }
    let flat = findings.iter().all(|finding| finding.flat);
    println!("{}", if flat && !failed { "flat" } else { "NOT FLAT, or not without failures" });
    Ok(if flat && !failed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(soak: &Soak) {
    let mut table = Table::new(&[
        "at",
        "RSS, MB",
        "open files",
        "threads",
        "JWKS, bytes",
        "rotations",
        "requests",
        "sign p50, ms",
        "sign p99, ms",
        "JWKS p50, ms",
        "JWKS p99, ms",
    ]);
    let ms = |latency: f64| format!("{latency:.3}");
    for sample in &soak.samples {
        table.row(vec![
            format!("{:.0} s", sample.at.as_secs_f64()),
            format!("{:.1}", sample.resident as f64 / 1e6),
            sample.open_files.to_string(),
            sample.threads.to_string(),
            sample.jwks_bytes.to_string(),
            sample.rotations.to_string(),
            sample.requests.to_string(),
            ms(sample.signatures.p50),
            ms(sample.signatures.p99),
            ms(sample.documents.p50),
            ms(sample.documents.p99),
        ]);
    }
    table.print();
    println!("{} verifications of sampled tokens, {} rotations", soak.verifications, soak.rotations());
}
