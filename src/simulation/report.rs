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
    /// The first rejection.
    pub incident: Option<Incident>,
    /// The closest that a new key came to being asked for too early, and a former one to being removed too early.
    pub early: Option<Margin>,
    pub late: Option<Margin>,
    /// What happened last, one line each, up to the incident.
    pub story: Vec<String>,
    /// For how long no replica could sign although all was well: milliseconds.
    pub silent: Moment,
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
}

impl Incident {
    /// Whether the verifier did not know the key yet, rather than not any more.
    pub fn is_early(&self) -> bool {
        match (self.document_of, self.served_until) {
            (Some(of), Some(until)) => of < until,
            _ => true,
        }
    }

    /// By how much the verifier's document was too old, or the removal too early.
    pub fn missed_by(&self) -> Span {
        match (self.is_early(), self.document_of, self.served_from, self.served_until) {
            (true, Some(of), Some(from), _) => from.since(of),
            (false, Some(of), _, Some(until)) => of.since(until),
            _ => Span::ZERO,
        }
    }
}

/// How much more it would have taken for a rejection.
#[derive(Clone, Debug)]
pub struct Margin {
    pub span: Span,
    pub at: Timestamp,
    pub verifier: String,
    pub key: Serial,
}
