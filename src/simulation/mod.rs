//! Plays a keyset through years in moments: replicas that decide with the real planner on clocks that disagree, a store,
//! a backend and links that fail, operators who come at bad moments, caches in front of it and verifiers behind them.
//!
//! What decides is the keyring's own code ([`rules`]). What judges is not: a token is rejected when the document that its
//! verifier holds has no such key, which follows from what was served when ([`served`]) and how long caches hold it.

mod advice;
pub mod random;
mod replica;
mod report;
pub mod rules;
pub mod served;
mod verifying;
mod world;

pub use advice::{Advice, advise};
pub use report::{Incident, Margin, Report};
pub use verifying::Caching;
pub use world::play;

use crate::keyring::name::Name;
use crate::keyring::policy::Policy;
use crate::keyring::time::{Span, Timestamp};

/// What is played.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub keyset: Name,
    /// What the configuration says: the first at the beginning, the others later, where configurations change.
    pub policies: Vec<Policy>,
    pub reality: Reality,
    pub begins: Timestamp,
    pub lasts: Span,
    pub seed: u64,
}

/// What is true of the world, whatever the configuration declares.
#[derive(Clone, Debug)]
pub struct Reality {
    /// How many share the keyring; one has a file for a store.
    pub replicas: usize,
    /// The largest difference between any two clocks.
    pub skew: Span,
    /// The longest that what one replica wrote takes to be served by another that reaches the store.
    pub lag: Span,
    /// How long caching layers in front may hold a document, all together.
    pub layers: Span,
    /// Who verifies.
    pub verifiers: Vec<Caching>,
    /// How many tokens are watched of those that each replica signs with each key.
    pub tokens: usize,
    pub faults: Faults,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Replicas crash and come back, sometimes after long.
    pub crashes: bool,
    /// Replicas lose their way to the store, and the store is away.
    pub outages: bool,
    /// Keys cannot be made or destroyed for a while.
    pub backend: bool,
    /// Operators rotate, roll back, hold, resume and revoke.
    pub operators: bool,
}

impl Reality {
    /// The one that takes longest to see a new key.
    pub fn slowest(&self) -> Option<&Caching> {
        self.verifiers.iter().max_by_key(|verifier| verifier.sees_new)
    }
}

impl Faults {
    pub const ALL: Faults = Faults { crashes: true, outages: true, backend: true, operators: true };
    pub const NONE: Faults = Faults { crashes: false, outages: false, backend: false, operators: false };
}
