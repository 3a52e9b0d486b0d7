//! Verifiers: how old the documents are that they judge tokens by.

use super::random::Random;
use super::served::Moment;
use crate::keyring::time::Span;

/// A kind of verifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caching {
    pub name: String,
    /// The longest until it sees a new key, beyond the caches in front of it.
    pub sees_new: Span,
}

/// A token at the moment at which somebody verifies it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Presentation {
    pub key: u64,
    pub verifier: usize,
    pub signed: Moment,
    /// When the document was fetched that the verifier judges by, before the caches in front of it.
    pub age: i64,
}

/// A token as far as its life goes, in the clock of who signed it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    pub not_before: i64,
    /// Seconds (RFC 7519 NumericDate).
    pub expires: i64,
}

impl Life {
    /// Issued when the signer's clock shows `clock` (milliseconds).
    pub fn issued(clock: i64, ttl: Span, backdate: Span) -> Life {
        let now = clock.div_euclid(1000);
        Life { not_before: now - backdate.as_secs(), expires: now + ttl.as_secs() }
    }

    /// From when to when it is live for a clock that is `ahead`, both included: nbf ≤ clock < exp.
    pub fn for_clock(self, ahead: i64) -> (Moment, Moment) {
        (self.not_before * 1000 - ahead, self.expires * 1000 - ahead - 1)
    }
}

impl Caching {
    /// How old the document may be that it judges by: its own cache and those in front of it.
    pub fn oldest(&self, layers: Span) -> i64 {
        (self.sees_new + layers).as_millis()
    }

    pub(super) fn age(&self, layers: Span, random: &mut Random) -> i64 {
        random.extreme(self.oldest(layers))
    }
}
