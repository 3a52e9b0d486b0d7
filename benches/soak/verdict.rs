//! Whether what was sampled stayed as it was: the first quarter of a run against its last one.

use std::fmt;

use super::run::Sample;

/// One figure, at both ends.
#[derive(Debug)]
pub struct Finding {
    pub figure: &'static str,
    pub first: f64,
    pub last: f64,
    /// The most that the last one may be.
    pub most: f64,
    pub flat: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { figure, first, last, most, flat } = self;
        let verdict = if *flat { "flat" } else { "NOT FLAT" };
        write!(f, "{figure}: {first:.3} in the first quarter, {last:.3} in the last, at most {most:.3}: {verdict}")
    }
}

/// A figure of a sample, how many times its former value it may be, and how much may be added to that.
type Measure = (&'static str, fn(&Sample) -> f64, f64, f64);

/// Memory may move by what an allocator keeps; latencies by what else the machine does. What leaks does so with every
/// rotation and request, and is far beyond these after a few minutes.
const MEASURES: [Measure; 8] = [
    ("RSS, MB", |sample| sample.resident as f64 / 1e6, 1.1, 2.0),
    ("open files", |sample| sample.open_files as f64, 1.0, 2.0),
    ("threads", |sample| sample.threads as f64, 1.0, 4.0),
    ("JWKS, bytes", |sample| sample.jwks_bytes as f64, 1.0, 300.0),
    ("signature p50, ms", |sample| sample.signatures.p50, 1.5, 0.2),
    ("signature p99, ms", |sample| sample.signatures.p99, 2.0, 2.0),
    ("JWKS p50, ms", |sample| sample.documents.p50, 1.5, 0.2),
    ("JWKS p99, ms", |sample| sample.documents.p99, 2.0, 2.0),
];

/// Medians of the quarters. The first sample counts for nothing: everything happens for the first time.
pub fn compare(samples: &[Sample]) -> Vec<Finding> {
    let settled = samples.get(1..).unwrap_or_default();
    let quarter = settled.len().div_ceil(4);
    let (first, last) = (&settled[..quarter], &settled[settled.len() - quarter..]);
    let judge = |(figure, value, times, plus): Measure| {
        let (first, last) = (median(first, value), median(last, value));
        let most = first * times + plus;
        // A quarter without a sample is none that was flat.
        Finding { figure, first, last, most, flat: last <= most }
    };
    MEASURES.map(judge).into()
}

fn median(samples: &[Sample], value: fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
