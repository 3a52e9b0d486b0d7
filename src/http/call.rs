//! A changing call of the admin listener: what its headers ask for, and what is said when it is refused.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::IF_MATCH;
use serde::Serialize;

use super::admin::Actor;
use super::conditional::{self, Demand};
use super::problem::{Problem, ProblemType};
use crate::engine::CommandError;
use crate::engine::whole::WholeRequest;
use crate::keyring::decide::{Idempotency, Intent, Refusal, Request as Wish};

/// While the seal is out of reach it is tried at least this often.
pub(super) const SEAL_RETRY_SECONDS: u64 = 5;

/// Longest reason that is kept.
const REASON_MAX: usize = 1000;

/// A changing call as it came.
pub(super) struct Call {
    pub action: &'static str,
    pub actor: Actor,
    pub headers: HeaderMap,
    /// Digest of the body.
    pub body: String,
}

impl Call {
    pub(super) fn wish(&self, intent: Intent, reason: Option<String>, dry_run: bool) -> Result<Wish, Problem> {
        Ok(Wish {
            intent,
            actor: self.actor.name.to_string(),
            reason: checked_reason(reason)?,
            dry_run,
            if_generation: if_match(&self.headers)?,
            idempotency: self.idempotency()?,
        })
    }

    /// As [`wish`](Self::wish), for what concerns no single keyset.
    pub(super) fn whole(&self, reason: Option<String>, dry_run: bool) -> Result<WholeRequest, Problem> {
        Ok(WholeRequest {
            actor: self.actor.name.to_string(),
            reason: checked_reason(reason)?,
            dry_run,
            if_generation: if_match(&self.headers)?,
            idempotency: self.idempotency()?,
        })
    }

    fn idempotency(&self) -> Result<Option<Idempotency>, Problem> {
        let mut values = self.headers.get_all("idempotency-key").iter();
        let Some(value) = values.next() else { return Ok(None) };
        // A tab is no part of it, though of a header it may be.
        let valid = |key: &&str| (1..=255).contains(&key.len()) && !key.contains('\t');
        let key = value.to_str().ok().filter(valid).filter(|_| values.next().is_none());
        let key = key.ok_or(ProblemType::IdempotencyKeyInvalid)?.to_owned();
        let fingerprint = fingerprint_of(&(self.actor.name.as_str(), self.action, &self.body));
        Ok(Some(Idempotency { key, fingerprint }))
    }
}

/// SHA-256 of a value's JSON, base64url.
pub(super) fn fingerprint_of(value: &impl Serialize) -> String {
    let json = serde_json::to_vec(value).unwrap_or_default();
    URL_SAFE_NO_PAD.encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &json))
}

/// The generations of which what is to be changed must have one; `None` where any will do.
fn if_match(headers: &HeaderMap) -> Result<Option<Vec<u64>>, Problem> {
    if !headers.contains_key(IF_MATCH) {
        return Ok(None);
    }
    match conditional::demand(headers.get_all(IF_MATCH).iter()) {
        Some(Demand::Anything) => Ok(None),
        // Tags are compared letter by letter: "044" is none of ours.
        Some(Demand::OneOf(tags)) => {
            let ours = |tag: &String| tag.parse().ok().filter(|generation: &u64| generation.to_string() == *tag);
            Ok(Some(tags.iter().filter_map(ours).collect()))
        }
        None => {
            let detail = "If-Match must be * or ETags of what is to be changed, such as \"44\" with its quotes.";
            Err(Problem::new(ProblemType::MalformedRequest).detail(detail))
        }
    }
}

fn checked_reason(reason: Option<String>) -> Result<Option<String>, Problem> {
    match reason {
        Some(reason) if reason.chars().count() > REASON_MAX => {
            let detail = format!("reason may have at most {REASON_MAX} characters.");
            Err(Problem::new(ProblemType::ValueNotAllowed).detail(detail))
        }
        // Logs and terminals show it.
        Some(reason) if reason.contains(|c: char| c.is_control() && c != '\n' && c != '\t') => {
            let detail = "reason may not contain control characters.";
            Err(Problem::new(ProblemType::ValueNotAllowed).detail(detail))
        }
        reason => Ok(reason.filter(|reason| !reason.trim().is_empty())),
    }
}

pub(super) fn problem_of(error: &CommandError) -> Problem {
    match error {
        CommandError::Refused(refusal) => problem_of_refusal(refusal),
        CommandError::Sealed => Problem::new(ProblemType::SealUnavailable).cause(error).retry_after(SEAL_RETRY_SECONDS),
        CommandError::ReadOnly => Problem::new(ProblemType::ReadOnlyReplica),
        CommandError::Frozen { reason } => {
            Problem::new(ProblemType::KeysetFrozen).detail(format!("The keyset is frozen: {reason}"))
        }
        CommandError::Store { .. } => Problem::new(ProblemType::StoreUnavailable).cause(error).retry_after(1),
        CommandError::Backend { .. } => Problem::new(ProblemType::BackendUnavailable).cause(error).retry_after(1),
        CommandError::KidTaken { .. } => Problem::new(ProblemType::AlreadyImported).detail(error.to_string()),
    }
}

pub(super) fn problem_of_refusal(refusal: &Refusal) -> Problem {
    let (kind, next) = match refusal {
        Refusal::GenerationMismatch { .. } => (ProblemType::GenerationMismatch, None),
        Refusal::IdempotencyKeyReused => (ProblemType::IdempotencyKeyReused, None),
        Refusal::NoStandby { next_standby_at } => (ProblemType::NoStandby, *next_standby_at),
        Refusal::AlgorithmUnconfirmed { .. } | Refusal::AlgorithmMismatch { .. } => {
            (ProblemType::AlgorithmUnconfirmed, None)
        }
        Refusal::JwksFull { next_standby_at } => (ProblemType::JwksFull, *next_standby_at),
        Refusal::Drained => (ProblemType::KeysetDrained, None),
        Refusal::Degraded => (ProblemType::KeysetDegraded, None),
        Refusal::Absent => (ProblemType::KeysetNotConfigured, None),
        Refusal::ClockFrozen => (ProblemType::ClockFrozen, None),
        Refusal::NothingToRollBack { .. } => (ProblemType::NothingToRollBack, None),
        Refusal::UnknownKey { .. } => (ProblemType::UnknownKey, None),
        Refusal::AlreadyRetired => (ProblemType::AlreadyRetired, None),
        Refusal::HoldInThePast { .. } => (ProblemType::HoldInvalid, None),
        Refusal::ImportRefused { .. } => (ProblemType::ImportRefused, None),
        Refusal::AlreadyImported { .. } => (ProblemType::AlreadyImported, None),
    };
    let mut problem = Problem::new(kind).detail(refusal.to_string());
    if let Refusal::NoStandby { .. } | Refusal::JwksFull { .. } = refusal {
        problem = problem.member("next_standby_at", next.map(|at| at.to_rfc3339()));
    }
    problem
}
