//! What to do when a backend no longer signs with the active key although nobody here took it out of use (DESIGN §10).

use super::plan::{Facts, is_propagated};
use super::record::{KeyState, Keyring, Serial};
use super::time::{Span, Timestamp};

/// Between two switches of one keyset: whoever disables keys is not to run through all that wait.
pub const SWITCH_INTERVAL: Span = Span::HOUR;

/// What may be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Promote the first of these that signs.
    Switch(Vec<Serial>),
    /// The last switch was less than [`SWITCH_INTERVAL`] ago.
    WaitUntil(Timestamp),
    /// No key waits that verifiers know and that they could read.
    NoSuccessor,
}

/// Decides for a keyring whose active key is known to be disabled. Holds do not stop it: nothing would sign.
pub fn remedy(keyring: &Keyring, facts: &Facts<'_>) -> Remedy {
    let next = keyring.disabled_switch_at.map(|at| at + SWITCH_INTERVAL);
    if let Some(until) = next.filter(|until| *until > facts.now) {
        return Remedy::WaitUntil(until);
    }
    let ready = keyring.keys.iter().filter(|key| {
        key.state == KeyState::Standby
            && key.private.is_some()
            && keyring.algorithm_agreed(key.algorithm)
            && is_propagated(keyring, facts, key)
    });
    let mut serials: Vec<Serial> = ready.map(|key| key.serial).collect();
    serials.sort_unstable();
    if serials.is_empty() { Remedy::NoSuccessor } else { Remedy::Switch(serials) }
}
