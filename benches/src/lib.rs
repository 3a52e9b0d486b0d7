//! What the benchmarks share: processes on cores of their own, load, and tables of what was measured.

pub mod bare;
pub mod daemon;
pub mod load;
pub mod peers;
pub mod process;

use std::time::{Duration, Instant};

/// The core of whatever serves; the load comes from [`CLIENT`]. With one core for each, neither takes time from the other.
pub const SERVER: usize = 0;
pub const CLIENT: usize = 1;

/// The middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        _ if sorted.is_empty() => f64::NAN,
        1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// `smallest middle largest`, as the tables show a figure of several rounds.
pub fn spread(values: &[f64]) -> String {
    let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{:>9.0} ({smallest:.0} … {largest:.0})", median(values))
}

/// How often per second `work` can be done on the server's core, measured for `span` after a short warm-up.
pub fn in_a_loop(span: Duration, mut work: impl FnMut()) -> f64 {
    process::pin(SERVER);
    let mut count = |span: Duration| {
        let (begun, mut done) = (Instant::now(), 0_u64);
        while begun.elapsed() < span {
            work();
            done += 1;
        }
        done as f64 / begun.elapsed().as_secs_f64()
    };
    count(span / 10);
    let rate = count(span);
    process::pin(CLIENT);
    rate
}

/// Rounds and seconds per figure: `--quick` is for trying whether everything runs.
pub struct Effort {
    pub rounds: usize,
    pub span: Duration,
}

impl Effort {
    pub fn asked_for() -> Self {
        match std::env::args().any(|argument| argument == "--quick") {
            true => Effort { rounds: 1, span: Duration::from_secs(1) },
            false => Effort { rounds: 5, span: Duration::from_secs(4) },
        }
    }
}
