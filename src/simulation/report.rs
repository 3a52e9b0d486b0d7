//! What came of a simulation.

use super::served::Moment;
use crate::keyring::record::Serial;
use crate::keyring::time::{Span, Timestamp};

/// Everything that was counted, and the worst that happened.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub rotations: u64,
    pub keys: u64,
    pub revocations: u64,
    pub crashes: u64,
    /// Tokens that were shown to a verifier while they were live, of keys that were not revoked.
    pub presented: u64,
    pub rejected: u64,
    /// The rejection that missed by most.
    pub incident: Option<Incident>,
    /// The closest that a new key came to being asked for too early, and a former one to being removed too early.
    pub early: Option<Margin>,
    pub late: Option<Margin>,
    /// Signatures by keys that the replica knew an operator had revoked.
    pub misused: u64,
    /// What happened last, one line each, up to the incident.
    pub story: Vec<String>,
}

/// A live token that a verifier rejected.
#[derive(Clone, Debug)]
pub struct Incident {
    pub at: Timestamp,
    pub verifier: String,
    pub key: Serial,
    pub signed_at: Timestamp,
    /// From when the document was that the verifier held.
    pub document_of: Option<Timestamp>,
    /// When the key was first served, and when it was served last.
    pub served_from: Option<Timestamp>,
    pub served_until: Option<Timestamp>,
    pub(super) is_early: bool,
    pub(super) missed_by: Span,
}

impl Incident {
    /// Whether the verifier did not know the key yet, rather than not any more.
    pub fn is_early(&self) -> bool {
        self.is_early
    }

    /// By how much the verifier's document was too old, or the removal too early.
    pub fn missed_by(&self) -> Span {
        self.missed_by
    }
}

/// How much more it would have taken for a rejection.
#[derive(Clone, Debug)]
pub struct Margin {
    /// Milliseconds; negative where only chance kept a token from being rejected.
    pub millis: Moment,
    pub at: Timestamp,
    pub verifier: String,
    pub key: Serial,
}
