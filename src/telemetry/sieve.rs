//! Keeps a cause that repeats from filling the log.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How far apart lines of one kind are.
pub const QUIET: Duration = Duration::from_secs(10);

/// Lets one line of a kind through every [`QUIET`] and counts those it keeps back. Never blocks.
#[derive(Debug, Default)]
pub struct Sieve {
    /// When the next line may pass, in nanoseconds of the caller's clock.
    next: AtomicU64,
    kept: AtomicU64,
}

impl Sieve {
    /// Whether a line may be written at `now`, a time of any clock that only goes forward; if so, how many were kept back
    /// since the last one.
    pub fn pass(&self, now: Duration) -> Option<u64> {
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        let (next, now) = (self.next.load(Relaxed), nanos(now));
        let mine =
            now >= next && self.next.compare_exchange(next, now.saturating_add(nanos(QUIET)), Relaxed, Relaxed).is_ok();
        if mine {
            return Some(self.kept.swap(0, Relaxed));
        }
        self.kept.fetch_add(1, Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_passes_at_a_time_and_tells_how_many_did_not() {
        let sieve = Sieve::default();
        let at = |millis| sieve.pass(Duration::from_millis(millis));
        assert_eq!([at(0), at(1), at(9_999)], [Some(0), None, None]);
        assert_eq!([at(10_000), at(10_001), at(60_000)], [Some(2), None, Some(1)]);
    }
}
