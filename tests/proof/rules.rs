//! Rules other than the daemon's: with a flaw, with siblings, or watched.

use std::cell::Cell;

use jwksd::keyring::change::Change;
use jwksd::keyring::decide::{Decision, Refusal, Request, decide};
use jwksd::keyring::plan::{Desired, Facts, Plan, plan};
use jwksd::keyring::record::Keyring;
use jwksd::keyring::time::Timestamp;
use jwksd::simulation::rules::Rules;

/// A planner that sees another keyring than there is.
pub struct Misled<F>(pub F);

impl<F: Fn(&mut Keyring)> Rules for Misled<F> {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan {
        let mut seen = keyring.clone();
        (self.0)(&mut seen);
        let policy = seen.policy.clone();
        plan(&seen, &Facts { desired: Desired::Policy(&policy), ..facts.clone() })
    }

    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring {
        keyring.after(change, now)
    }

    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
        decide(keyring, facts, request)
    }
}

/// Writes something else than was decided.
pub struct Miswritten<F, G> {
    pub after: F,
    pub decided: G,
}

impl<F: Fn(&Change, &mut Keyring), G: Fn(&Keyring, &mut Keyring)> Rules for Miswritten<F, G> {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan {
        plan(keyring, facts)
    }

    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring {
        let mut next = keyring.after(change, now);
        (self.after)(change, &mut next);
        next
    }

    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
        let mut decision = decide(keyring, facts, request)?;
        if let Decision::Write { next, .. } = &mut decision {
            (self.decided)(keyring, next);
        }
        Ok(decision)
    }
}

/// The daemon's own rules where other keysets of the issuer take so much of the JWKS that this one may publish only so
/// many keys; remembers the most there were.
pub struct Within {
    pub keys: u32,
    pub most: Cell<u32>,
}

impl Within {
    pub fn new(keys: u32) -> Within {
        Within { keys, most: Cell::new(0) }
    }

    fn facts<'a>(&self, keyring: &Keyring, facts: &Facts<'a>) -> Facts<'a> {
        let keys = u32::try_from(keyring.published().count()).unwrap();
        self.most.set(self.most.get().max(keys));
        Facts { room: self.keys.saturating_sub(keys), ..facts.clone() }
    }
}

impl Rules for Within {
    fn plan(&self, keyring: &Keyring, facts: &Facts<'_>) -> Plan {
        plan(keyring, &self.facts(keyring, facts))
    }

    fn after(&self, keyring: &Keyring, change: &Change, now: Timestamp) -> Keyring {
        keyring.after(change, now)
    }

    fn decide(&self, keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
        decide(keyring, &self.facts(keyring, facts), request)
    }
}
