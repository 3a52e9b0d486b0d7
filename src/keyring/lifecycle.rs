//! The life of a key as one table (DESIGN §2): which event takes which state where.

use super::record::KeyState;

/// What can happen to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeyEvent {
    /// It was published for as long as propagation demands.
    Propagated,
    /// It becomes the key that signs.
    Promoted,
    /// Another key became the one that signs.
    Demoted,
    /// A key that signed before signs again.
    Reinstated,
    /// Everything it signed has expired for every clock.
    Expired,
    /// It will never be needed.
    Withdrawn,
    /// It will not sign here, but did so elsewhere.
    Relieved,
    /// It must not be trusted any more.
    Revoked,
}

/// What an event does to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    To(KeyState),
    /// It already is what the event asks for.
    Unchanged,
    /// The event cannot happen in this state.
    Refused,
}

impl KeyEvent {
    pub const ALL: [KeyEvent; 8] = [
        KeyEvent::Propagated,
        KeyEvent::Promoted,
        KeyEvent::Demoted,
        KeyEvent::Reinstated,
        KeyEvent::Expired,
        KeyEvent::Withdrawn,
        KeyEvent::Relieved,
        KeyEvent::Revoked,
    ];
}

/// The one transition function.
pub const fn transition(state: KeyState, event: KeyEvent) -> Transition {
    use KeyEvent as E;
    use KeyState as S;
    use Transition::{Refused, To, Unchanged};
    match (state, event) {
        (S::Pending, E::Propagated) => To(S::Standby),
        (S::Pending, E::Promoted) => To(S::Active),
        (S::Pending, E::Withdrawn) => To(S::Retired),
        (S::Pending, E::Relieved) => To(S::Retiring),
        (S::Pending, E::Revoked) => To(S::Revoked),
        (S::Pending, E::Demoted | E::Reinstated | E::Expired) => Refused,

        (S::Standby, E::Propagated) => Unchanged,
        (S::Standby, E::Promoted) => To(S::Active),
        (S::Standby, E::Withdrawn) => To(S::Retired),
        (S::Standby, E::Relieved) => To(S::Retiring),
        (S::Standby, E::Revoked) => To(S::Revoked),
        (S::Standby, E::Demoted | E::Reinstated | E::Expired) => Refused,

        (S::Active, E::Demoted) => To(S::Retiring),
        (S::Active, E::Revoked) => To(S::Revoked),
        (S::Active, E::Promoted | E::Reinstated) => Unchanged,
        (S::Active, E::Propagated | E::Expired | E::Withdrawn | E::Relieved) => Refused,

        (S::Retiring, E::Reinstated) => To(S::Active),
        (S::Retiring, E::Expired) => To(S::Retired),
        (S::Retiring, E::Revoked) => To(S::Revoked),
        (S::Retiring, E::Demoted | E::Relieved) => Unchanged,
        (S::Retiring, E::Propagated | E::Promoted | E::Withdrawn) => Refused,

        (S::Retired, E::Expired | E::Withdrawn) => Unchanged,
        (S::Retired, E::Propagated | E::Promoted | E::Demoted | E::Reinstated | E::Relieved | E::Revoked) => Refused,

        (S::Revoked, E::Revoked) => Unchanged,
        (
            S::Revoked,
            E::Propagated | E::Promoted | E::Demoted | E::Reinstated | E::Expired | E::Withdrawn | E::Relieved,
        ) => Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    #[test]
    fn every_pair_of_state_and_event_is_decided() {
        let mut table = String::new();
        for state in KeyState::ALL {
            for event in KeyEvent::ALL {
                let outcome = match transition(state, event) {
                    Transition::To(to) => format!("→ {to}"),
                    Transition::Unchanged => "unchanged".to_owned(),
                    Transition::Refused => "refused".to_owned(),
                };
                writeln!(table, "{state:<9} {:<11} {outcome}", format!("{event:?}")).unwrap();
            }
        }
        insta::assert_snapshot!(table);
    }

    #[test]
    fn nothing_leaves_an_end_state() {
        for event in KeyEvent::ALL {
            for end in [KeyState::Retired, KeyState::Revoked] {
                assert!(!matches!(transition(end, event), Transition::To(_)));
            }
        }
    }
}
