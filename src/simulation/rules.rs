//! What decides in a simulation: the keyring's own planner and transitions, or, in tests, something with a flaw.

use crate::keyring::change::Change;
use crate::keyring::decide::{Decision, Refusal, Request, decide};
use crate::keyring::plan::{Facts, Plan, plan};
use crate::keyring::record::Keyring;
use crate::keyring::time::Timestamp;

/// Every decision about keys.
pub trait Rules {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan;
    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring;
    /// # Errors
    /// What the daemon would refuse.
    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal>;
}

/// Those of the daemon.
pub struct Ours;

impl Rules for Ours {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan {
        plan(keyring, facts)
    }

    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring {
        keyring.after(change, now)
    }

    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
        decide(keyring, facts, request)
    }
}
