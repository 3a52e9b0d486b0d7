//! A histogram of durations whose observation is two atomic additions.
//!
//! prometheus-client's own takes a mutex per observation, which all threads that sign would share.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds in nanoseconds: from a local ES256 signature (16 µs) to a KMS at its worst.
const BOUNDS: [u64; 19] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

const BUCKETS: usize = BOUNDS.len() + 1;

/// Counts durations in fixed buckets.
pub(super) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_nanos: AtomicU64,
}

/// What a histogram held at a scrape, in the form that prometheus-client encodes.
pub(super) struct Observed {
    pub(super) sum_seconds: f64,
    pub(super) count: u64,
    /// Upper bound in seconds and the number of observations in this bucket alone.
    pub(super) buckets: [(f64, u64); BUCKETS],
}

impl Histogram {
    pub(super) fn new() -> Self {
        Histogram { buckets: std::array::from_fn(|_| AtomicU64::new(0)), sum_nanos: AtomicU64::new(0) }
    }

    /// `sum_nanos` wraps after 584 years of signing, which a scraper takes for a restart.
    pub(super) fn observe(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[BOUNDS.partition_point(|&bound| bound < nanos)].fetch_add(1, Relaxed);
        self.sum_nanos.fetch_add(nanos, Relaxed);
    }

    /// The count is the sum of the buckets read, so both always agree.
    pub(super) fn observed(&self) -> Observed {
        let buckets = std::array::from_fn(|i| {
            let bound = BOUNDS.get(i).map_or(f64::INFINITY, |&nanos| seconds(nanos));
            (bound, self.buckets[i].load(Relaxed))
        });
        Observed {
            sum_seconds: seconds(self.sum_nanos.load(Relaxed)),
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
        }
    }
}

/// A division, since multiplying by 1e-9 would make 0.000025000000000000001 of 25 µs.
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_counts_in_the_smallest_bucket_that_holds_it() {
        let histogram = Histogram::new();
        for micros in [1, 10, 11, 10_000_000, 10_000_001] {
            histogram.observe(Duration::from_micros(micros));
        }
        let observed = histogram.observed();
        let filled: Vec<_> = observed.buckets.iter().filter(|(_, n)| *n > 0).copied().collect();
        assert_eq!(filled, [(0.000_01, 2), (0.000_025, 1), (10.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(observed.count, 5);
        assert!((observed.sum_seconds - 20.000_023).abs() < 1e-9);
    }

    #[test]
    fn no_duration_panics() {
        Histogram::new().observe(Duration::MAX);
    }
}
