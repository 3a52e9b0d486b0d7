//! Audit lines: one per life-cycle event, and optionally one per signature.
//!
//! They are tracing events with the targets [`LIFECYCLE`] and [`SIGNATURES`] and stable field names, at level INFO, and
//! a less talkative log level does not silence them (see [`logging`](super::logging)). They hold no claims and no tokens.

use crate::keyring::jwk::Kid;
use crate::keyring::name::Name;
use crate::keyring::record::{KeyState, Serial};
use crate::keyring::time::Timestamp;

/// The target of life-cycle lines.
pub const LIFECYCLE: &str = "jwksd::audit";

/// The target of signature lines.
pub const SIGNATURES: &str = "jwksd::signatures";

/// Something happened to a keyset: a key changed its state, or an operator did something. Fields that are `None` do
/// not appear in the line.
#[derive(Clone, Copy, Debug)]
pub struct LifecycleEvent<'a> {
    /// When, by trusted time. Field `time`, RFC 3339.
    pub at: Timestamp,
    /// What, in the words of the audit log in the keyring: `rotate`, `publish`, `retire` …
    pub action: &'a str,
    /// Whose key it is.
    pub keyset: &'a Name,
    /// The generation of the keyring that contains the change.
    pub generation: u64,
    /// Who: the name of an admin token, or `jwksd` for what it does by itself.
    pub actor: &'a str,
    /// The key that changed.
    pub kid: Option<&'a Kid>,
    /// Its number.
    pub serial: Option<Serial>,
    /// The state it left; `None` for a new key.
    pub from: Option<KeyState>,
    /// The state it entered.
    pub to: Option<KeyState>,
    /// Why, in the operator's words.
    pub reason: Option<&'a str>,
    /// What else a reader should know; no secrets.
    pub detail: Option<&'a str>,
}

/// A token left the daemon.
#[derive(Clone, Copy, Debug)]
pub struct SignatureLine<'a> {
    /// The reading of the clock that `iat` was taken from. Field `time`, RFC 3339.
    pub at: Timestamp,
    /// The token's `jti` (RFC 7519 §4.1.7).
    pub jti: &'a str,
    /// Whose key signed.
    pub keyset: &'a Name,
    /// Which key signed.
    pub kid: &'a Kid,
    /// The signer client; `None` where none are configured.
    pub client: Option<&'a str>,
}

/// Writes the line of a life-cycle event.
pub fn lifecycle(event: &LifecycleEvent<'_>) {
    tracing::info!(
        target: LIFECYCLE,
        time = %event.at,
        action = event.action,
        keyset = event.keyset.as_str(),
        generation = event.generation,
        actor = event.actor,
        kid = event.kid.map(Kid::as_str),
        serial = event.serial,
        from = event.from.map(KeyState::as_str),
        to = event.to.map(KeyState::as_str),
        reason = event.reason,
        detail = event.detail,
    );
}

/// Writes the line of a signature.
pub fn signature(line: &SignatureLine<'_>) {
    tracing::info!(
        target: SIGNATURES,
        time = %line.at,
        jti = line.jti,
        keyset = line.keyset.as_str(),
        kid = line.kid.as_str(),
        client = line.client,
    );
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::telemetry::logging::tests::{Captured, json_lines};

    fn name() -> Name {
        Name::parse("default").unwrap()
    }

    fn event<'a>(keyset: &'a Name, kid: &'a Kid) -> LifecycleEvent<'a> {
        LifecycleEvent {
            at: Timestamp::from_millis(1_795_514_400_250),
            action: "rotate",
            keyset,
            generation: 42,
            actor: "operator",
            kid: Some(kid),
            serial: Some(8),
            from: Some(KeyState::Standby),
            to: Some(KeyState::Active),
            reason: Some("planned\n{\"action\":\"forged\"}"),
            detail: None,
        }
    }

    /// Without what the formatter adds.
    fn fields(mut line: Value) -> Value {
        let members = line.as_object_mut().unwrap();
        assert_eq!(members.remove("level"), Some(json!("INFO")));
        assert!(members.remove("timestamp").is_some());
        line
    }

    #[test]
    fn a_life_cycle_event_is_one_line_with_stable_fields() {
        let captured = Captured::default();
        captured.while_logging_json("warn", || lifecycle(&event(&name(), &Kid("9kQ2".into()))));
        let lines = json_lines(&captured);
        let expected = json!({
            "target": "jwksd::audit", "time": "2026-11-24T10:00:00.250Z", "action": "rotate", "keyset": "default",
            "generation": 42, "actor": "operator", "kid": "9kQ2", "serial": 8, "from": "standby", "to": "active",
            "reason": "planned\n{\"action\":\"forged\"}",
        });
        assert_eq!(lines.into_iter().map(fields).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn a_reason_cannot_forge_a_second_line_in_text_logs() {
        let captured = Captured::default();
        captured.while_logging_text("info", || lifecycle(&event(&name(), &Kid("9kQ2".into()))));
        assert_eq!(captured.text().lines().count(), 1, "{}", captured.text());
    }

    #[test]
    fn a_signature_is_one_line_without_claims() {
        let captured = Captured::default();
        let (keyset, kid) = (name(), Kid("9kQ2".into()));
        let at = Timestamp::from_secs(1_795_514_400);
        captured.while_logging_json("off", || {
            signature(&SignatureLine { at, jti: "j1", keyset: &keyset, kid: &kid, client: Some("orders") });
            signature(&SignatureLine { at, jti: "j2", keyset: &keyset, kid: &kid, client: None });
        });
        let line = |jti: &str| {
            json!({
                "target": "jwksd::signatures", "time": "2026-11-24T10:00:00Z", "jti": jti, "keyset": "default",
                "kid": "9kQ2",
            })
        };
        let mut with_client = line("j1");
        with_client["client"] = json!("orders");
        let lines: Vec<_> = json_lines(&captured).into_iter().map(fields).collect();
        assert_eq!(lines, [with_client, line("j2")]);
    }
}
