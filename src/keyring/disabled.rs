//! What to do when a backend no longer signs with the active key although nobody here took it out of use (DESIGN §10).

use super::change::Trigger;
use super::plan::{Facts, is_propagated};
use super::record::{AuditEntry, KeyState, Keyring, Serial};
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
    let last = latest(&keyring.journal.audit);
    if let Some(until) = last.map(|at| at + SWITCH_INTERVAL).filter(|until| *until > facts.now) {
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

/// By the audit log, which is durable and part of the record.
fn latest(audit: &[AuditEntry]) -> Option<Timestamp> {
    let switched =
        |action: &str, reason: Option<&str>| action == "promoted" && reason == Some(Trigger::KeyDisabled.as_str());
    audit.iter().filter(|entry| switched(&entry.action, entry.reason.as_deref())).map(|entry| entry.at).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64, at: Timestamp, action: &str, reason: &str) -> AuditEntry {
        let (action, reason) = (action.to_owned(), Some(reason.to_owned()));
        AuditEntry { seq, at, action, actor: "jwksd".to_owned(), reason, kids: Default::default(), detail: None }
    }

    #[test]
    fn only_promotions_for_this_reason_count_as_switches() {
        let now = Timestamp::from_secs(1_800_000_000);
        let mut entries = vec![
            entry(0, now, "promoted", "schedule"),
            entry(1, now, "revoked", "key_disabled"),
            entry(2, now + Span::HOUR, "rotate", "key_disabled"),
        ];
        assert_eq!(latest(&entries), None);
        entries.push(entry(3, now + Span::MINUTE, "promoted", "key_disabled"));
        entries.push(entry(4, now, "promoted", "key_disabled"));
        assert_eq!(latest(&entries), Some(now + Span::MINUTE));
    }
}
