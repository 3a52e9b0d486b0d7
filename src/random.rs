//! The only ambient randomness: the system's, mostly through aws-lc-rs. (Keys are generated in `backend`, from the same source.)
//! What lets replicas take turns can come from elsewhere, so that a simulation repeats itself.

use std::time::Duration;

use zeroize::Zeroizing;

use crate::keyring::time::Span;

/// Has aws-lc seed itself on a thread of its own. It measures the jitter of the processor for that, which takes some 40 ms
/// once per process: as long as all the rest of a start, which does not need it.
pub fn prepare() {
    // Where there can be no thread, whoever needs it first waits for it.
    let _ = std::thread::Builder::new().name("randomness".to_owned()).spawn(|| _ = bytes::<1>());
}

/// Where random bytes come from.
pub trait Entropy: Send + Sync + 'static {
    /// Overwrites `bytes` with random ones.
    fn fill(&self, bytes: &mut [u8]);

    /// As [`fill`](Self::fill), for what is no secret and cannot wait until the source is [prepared](prepare).
    fn fill_early(&self, bytes: &mut [u8]) {
        self.fill(bytes);
    }
}

/// The system's randomness.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Entropy for System {
    fn fill(&self, bytes: &mut [u8]) {
        aws_lc_rs::rand::fill(bytes).expect("AWS-LC aborts the process rather than return without randomness");
    }

    fn fill_early(&self, bytes: &mut [u8]) {
        if getrandom::fill(bytes).is_err() {
            self.fill(bytes);
        }
    }
}

impl dyn Entropy {
    /// `N` random bytes.
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    /// 128 random bits in lower-case hex.
    pub fn id(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.bytes()))
    }

    /// As [`id`](Self::id), early.
    pub fn early_id(&self) -> String {
        let mut bytes = [0; 16];
        self.fill_early(&mut bytes);
        format!("{:032x}", u128::from_be_bytes(bytes))
    }

    /// A pause from `low` to `high`: those that failed or began together do not come back together. To the microsecond.
    pub fn between(&self, low: Duration, high: Duration) -> Duration {
        let range = u64::try_from(high.saturating_sub(low).as_micros()).unwrap_or(u64::MAX);
        low + Duration::from_micros(self.scaled(range))
    }

    /// [`between`](Self::between) for spans, to the millisecond.
    pub fn span_between(&self, low: Span, high: Span) -> Span {
        let range = u64::try_from(high.saturating_sub(low).as_millis()).unwrap_or(0);
        low + Span::from_millis(i64::try_from(self.scaled(range)).unwrap_or(i64::MAX))
    }

    /// Uniform from 0 to `most`.
    fn scaled(&self, most: u64) -> u64 {
        let random = u128::from(u64::from_be_bytes(self.bytes()));
        u64::try_from((random * (u128::from(most) + 1)) >> 64).unwrap_or(most)
    }
}

fn system() -> &'static dyn Entropy {
    &System
}

/// `N` random bytes of the system.
pub fn bytes<const N: usize>() -> [u8; N] {
    system().bytes()
}

/// `N` secret bytes, wiped when dropped.
pub fn secret<const N: usize>() -> Zeroizing<[u8; N]> {
    Zeroizing::new(bytes())
}

/// 128 random bits in lower-case hex: installations, lineages, replicas.
pub fn id() -> String {
    system().id()
}

/// A pause from `low` to `high`, by the system's randomness.
pub fn between(low: Duration, high: Duration) -> Duration {
    system().between(low, high)
}

/// [`between`] for spans, to the millisecond.
pub fn span_between(low: Span, high: Span) -> Span {
    system().span_between(low, high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_lies_between_its_ends_and_reaches_both() {
        let (low, high) = (Span::from_millis(3), Span::from_millis(5));
        let drawn: std::collections::BTreeSet<i64> = (0..200).map(|_| span_between(low, high).as_millis()).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [3, 4, 5]);
        let (low, high) = (Duration::from_micros(7), Duration::from_micros(8));
        assert!((0..50).all(|_| (low..=high).contains(&between(low, high))));
        assert_eq!(span_between(high_span(), Span::ZERO), high_span(), "an empty range is its lower end");
    }

    fn high_span() -> Span {
        Span::from_millis(9)
    }

    #[test]
    fn an_id_is_128_bits_of_hex() {
        assert!((0..20).all(|_| id().len() == 32));
        assert_ne!(id(), id());
        assert!((0..20).all(|_| system().early_id().len() == 32));
        assert_ne!(system().early_id(), system().early_id());
    }
}
