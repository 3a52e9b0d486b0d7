//! A keyset as answers show it (DESIGN §7, to the letter).

use serde::Serialize;

use crate::engine::KeysetCell;
use crate::engine::probes::Probe;
use crate::engine::view::Sight;
use crate::keyring::outlook::{NextRotation, NextState};
use crate::keyring::plan::Blocker;
use crate::keyring::record::{Hold, Key, KeyState, Keyring, Origin, Revocation};
use crate::keyring::time::Timestamp;

/// The admin answer for one keyset.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct KeysetView {
    name: String,
    issuer: String,
    algorithm: &'static str,
    backend: String,
    generation: u64,
    /// `ok`, `degraded` (it works, but see `alarms`) or `failing` (it cannot sign).
    health: &'static str,
    alarms: Vec<&'static str>,
    hold: Option<HoldView>,
    policy: PolicyView,
    next_rotation: Option<NextRotationView>,
    /// Where the issuer watches what verifiers are served; only where there are probes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    probes: Vec<ProbeView>,
    active_kid: Option<String>,
    keys: Vec<KeyView>,
}

#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct PolicyView {
    max_ttl_seconds: i64,
    propagation_seconds: i64,
    overlap_seconds: i64,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ProbeView {
    url: String,
    /// Why the last fetch got no answer; while it is so, the propagation of waiting keys pauses.
    failing: Option<String>,
    /// Kids of waiting keys that it shows.
    shows: Vec<String>,
    /// How what it shows differs from what is published, beyond what caches explain.
    mismatches: Vec<String>,
    /// How its headers let caches hold the document for longer than declared.
    caches_exceeded: Option<String>,
}

#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct HoldView {
    reason: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    actor: String,
    #[schema(value_type = String, format = DateTime)]
    since: Timestamp,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct NextRotationView {
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    trigger: &'static str,
    overdue_seconds: i64,
    blocked_by: Vec<&'static str>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct KeyView {
    kid: String,
    serial: u64,
    #[schema(value_type = String)]
    state: KeyState,
    #[schema(value_type = String)]
    origin: Origin,
    #[schema(value_type = Option<String>, format = DateTime)]
    published_at: Option<Timestamp>,
    /// Since when all probes show it; only on waiting keys of an issuer with probes.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_at: Option<Timestamp>,
    #[schema(value_type = String, format = DateTime)]
    entered_at: Timestamp,
    ttl_bound_seconds: i64,
    next: Option<NextView>,
    /// Replicas that publish and lack the key: its promotion waits for them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing_replicas: Vec<String>,
    /// Only on revoked keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    revocation: Option<RevocationView>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct NextView {
    #[schema(value_type = String)]
    state: KeyState,
    #[schema(value_type = Option<String>, format = DateTime)]
    at: Option<Timestamp>,
    /// Only on standby keys that may not be promoted yet, since propagation grew or publication paused.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(skip_serializing_if = "Option::is_none")]
    not_before: Option<Timestamp>,
    waiting_for: Vec<&'static str>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct RevocationView {
    reason: String,
    actor: String,
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
}

impl KeysetView {
    /// `history`: also keys that ended.
    pub fn of(cell: &KeysetCell, sight: &Sight, history: bool) -> Self {
        let keyring = &sight.snapshot.keyring;
        let mut keys: Vec<&Key> = keyring.keys.iter().filter(|key| history || key.state.is_published()).collect();
        keys.sort_by_key(|key| (rank(key.state), std::cmp::Reverse(key.serial)));
        let next =
            |key: &Key| sight.outlook.keys.iter().find(|(serial, _)| *serial == key.serial).map(|(_, next)| next);
        KeysetView {
            name: cell.name.to_string(),
            issuer: keyring.policy.issuer.url.clone(),
            algorithm: keyring.signing_algorithm().unwrap_or(keyring.policy.algorithm).alg(),
            backend: keyring.policy.backend.clone(),
            generation: keyring.generation,
            health: sight.health().as_str(),
            alarms: sight.alarms.iter().map(|alarm| alarm.as_str()).collect(),
            hold: keyring.hold.as_ref().map(HoldView::of),
            policy: PolicyView::of(keyring),
            next_rotation: sight.outlook.next_rotation.as_ref().map(NextRotationView::of),
            probes: cell.issuer.probes().each().iter().map(ProbeView::of).collect(),
            active_kid: keyring.active().map(|key| key.kid.to_string()),
            keys: keys.into_iter().map(|key| KeyView::of(key, next(key), cell.missing_replicas(key.serial))).collect(),
        }
    }
}

impl PolicyView {
    pub fn of(keyring: &Keyring) -> Self {
        let policy = &keyring.policy;
        PolicyView {
            max_ttl_seconds: policy.tokens.max_ttl.as_secs(),
            propagation_seconds: policy.rotation.propagation.as_secs(),
            overlap_seconds: policy.overlap().as_secs(),
        }
    }
}

impl ProbeView {
    fn of(probe: &Probe) -> Self {
        ProbeView {
            url: probe.url.clone(),
            failing: probe.failing.clone(),
            shows: probe.shows(),
            mismatches: probe.discrepancies.iter().map(ToString::to_string).collect(),
            caches_exceeded: probe.excess.clone(),
        }
    }
}

impl HoldView {
    pub fn of(hold: &Hold) -> Self {
        let Hold { reason, until, actor, since } = hold.clone();
        HoldView { reason, until, actor, since }
    }
}

impl NextRotationView {
    fn of(next: &NextRotation) -> Self {
        NextRotationView {
            at: next.at,
            trigger: next.trigger,
            overdue_seconds: next.overdue.as_secs(),
            blocked_by: names(&next.blocked_by),
        }
    }
}

impl KeyView {
    fn of(key: &Key, next: Option<&NextState>, missing_replicas: Vec<String>) -> Self {
        KeyView {
            missing_replicas,
            kid: key.kid.to_string(),
            serial: key.serial,
            state: key.state,
            origin: key.origin,
            published_at: key.published_at,
            seen_at: key.seen_at.filter(|_| matches!(key.state, KeyState::Pending | KeyState::Standby)),
            entered_at: key.entered_at,
            ttl_bound_seconds: key.ttl_bound.as_secs(),
            next: next.map(|next| NextView {
                state: next.state,
                at: next.at,
                not_before: next.not_before,
                waiting_for: names(&next.waiting_for),
            }),
            revocation: key.revocation.clone().map(|Revocation { reason, actor, at }| RevocationView {
                reason,
                actor,
                at,
            }),
        }
    }
}

fn names(blockers: &[Blocker]) -> Vec<&'static str> {
    blockers.iter().map(|blocker| blocker.as_str()).collect()
}

fn rank(state: KeyState) -> u8 {
    match state {
        KeyState::Active => 0,
        KeyState::Standby => 1,
        KeyState::Pending => 2,
        KeyState::Retiring => 3,
        KeyState::Retired => 4,
        KeyState::Revoked => 5,
    }
}
