//! What is to be expected of a keyring: the next rotation and what blocks it, each key's next state, alarms.

use std::collections::BTreeSet;

use serde::Serialize;

use super::plan::{
    Blocker, Desired, Facts, SlowStep, blockers, due_at, is_held, is_propagated, next_standby, overdue_grace,
    propagated_from, ready_at, standing_blockers,
};
use super::record::{Key, KeyState, Keyring, Serial};
use super::time::{Span, Timestamp};

/// Something an operator should know. The closed set of the `alarm` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Alarm {
    /// The configuration does not fit the keyring; the stored policy goes on.
    Degraded,
    /// The keyset is gone from the configuration and not drained.
    Absent,
    /// The keyset is drained and signs no more, and still or again in the configuration.
    Drained,
    /// The record cannot be trusted; the last good set is served and nothing is written.
    Frozen,
    /// The seal could not be reached yet and the record is served unauthenticated; or it failed the check and its keys
    /// are not served any more.
    Unauthenticated,
    /// The wall clock stepped or lags behind what was recorded.
    ClockFrozen,
    /// The store cannot be read or written.
    StoreUnavailable,
    /// A scheduled rotation is late.
    RotationOverdue,
    /// No key waits to take over.
    NoStandby,
    /// No key signs.
    NoActiveKey,
    /// The issuer's JWKS has no room for another key.
    JwksFull,
    /// What is served elsewhere differs from what we publish.
    PublicationMismatch,
    /// What is served elsewhere cannot be fetched; waiting keys do not propagate.
    ProbeUnreachable,
    /// What is served elsewhere may be held longer than the declared caches.
    CachesExceeded,
    /// A place where the issuer is published has been behind for long.
    PublisherFailing,
    /// A backend disabled a key behind our back.
    KeyDisabled,
    /// Waiting keys have another algorithm, which an operator has not confirmed.
    AlgorithmUnconfirmed,
    /// The backend does not make keys, or does not sign.
    BackendUnavailable,
    /// A private key that should be destroyed is not yet.
    DestructionPending,
    /// The daemon cannot record that it is alive.
    HeartbeatFailed,
    /// A changed configuration is invalid; the former one goes on.
    ConfigInvalid,
    /// Another replica adopted another policy than this one's configuration says; that one stays.
    Superseded,
    /// A replica that publishes has lacked a waiting key for longer than `publish_lag`.
    ReplicaLagging,
    /// The store has not confirmed the keyring for longer than `staleness_limit`: this replica does not sign.
    Stale,
    /// A receiver of notices has not taken any for long.
    NoticeFailing,
}

impl Alarm {
    pub const ALL: [Alarm; 25] = [
        Alarm::Degraded,
        Alarm::Absent,
        Alarm::Drained,
        Alarm::Frozen,
        Alarm::Unauthenticated,
        Alarm::ClockFrozen,
        Alarm::StoreUnavailable,
        Alarm::RotationOverdue,
        Alarm::NoStandby,
        Alarm::NoActiveKey,
        Alarm::JwksFull,
        Alarm::PublicationMismatch,
        Alarm::ProbeUnreachable,
        Alarm::CachesExceeded,
        Alarm::PublisherFailing,
        Alarm::KeyDisabled,
        Alarm::AlgorithmUnconfirmed,
        Alarm::BackendUnavailable,
        Alarm::DestructionPending,
        Alarm::HeartbeatFailed,
        Alarm::ConfigInvalid,
        Alarm::Superseded,
        Alarm::ReplicaLagging,
        Alarm::Stale,
        Alarm::NoticeFailing,
    ];

    /// How many alarms there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The position in [`ALL`](Self::ALL).
    pub const fn index(self) -> usize {
        self as usize
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Alarm::Degraded => "degraded",
            Alarm::Absent => "absent",
            Alarm::Drained => "drained",
            Alarm::Frozen => "frozen",
            Alarm::Unauthenticated => "unauthenticated",
            Alarm::ClockFrozen => "clock_frozen",
            Alarm::StoreUnavailable => "store_unavailable",
            Alarm::RotationOverdue => "rotation_overdue",
            Alarm::NoStandby => "no_standby",
            Alarm::NoActiveKey => "no_active_key",
            Alarm::JwksFull => "jwks_full",
            Alarm::PublicationMismatch => "publication_mismatch",
            Alarm::ProbeUnreachable => "probe_unreachable",
            Alarm::CachesExceeded => "caches_exceeded",
            Alarm::PublisherFailing => "publisher_failing",
            Alarm::KeyDisabled => "key_disabled",
            Alarm::AlgorithmUnconfirmed => "algorithm_unconfirmed",
            Alarm::BackendUnavailable => "backend_unavailable",
            Alarm::DestructionPending => "destruction_pending",
            Alarm::HeartbeatFailed => "heartbeat_failed",
            Alarm::ConfigInvalid => "config_invalid",
            Alarm::Superseded => "superseded",
            Alarm::ReplicaLagging => "replica_lagging",
            Alarm::Stale => "stale",
            Alarm::NoticeFailing => "notice_failing",
        }
    }
}

impl std::fmt::Display for Alarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What lies ahead of a keyring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outlook {
    pub next_rotation: Option<NextRotation>,
    /// What comes next for each key that has not ended.
    pub keys: Vec<(Serial, NextState)>,
    /// Keys that could sign now if they had to.
    pub standby_ready: u32,
    /// When the next key becomes ready; the past when one is.
    pub standby_expected: Option<Timestamp>,
    pub alarms: BTreeSet<Alarm>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextRotation {
    pub at: Timestamp,
    pub trigger: &'static str,
    pub overdue: Span,
    pub blocked_by: Vec<Blocker>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextState {
    pub state: KeyState,
    pub at: Option<Timestamp>,
    /// Of a standby key that may not be promoted yet, since propagation grew or publication paused: when it may.
    pub not_before: Option<Timestamp>,
    pub waiting_for: Vec<Blocker>,
}

/// Looks ahead; as total as the planner.
pub fn outlook(keyring: &Keyring, facts: &Facts<'_>) -> Outlook {
    let next_rotation = next_rotation(keyring, facts);
    let following = next_standby(keyring, facts);
    let keys = keyring.keys.iter().filter_map(|key| {
        next_state(keyring, facts, key, next_rotation.as_ref(), following).map(|next| (key.serial, next))
    });
    Outlook {
        keys: keys.collect(),
        standby_ready: ready_count(keyring, facts),
        standby_expected: following.map(|(_, at)| at),
        alarms: alarms(keyring, facts, next_rotation.as_ref()),
        next_rotation,
    }
}

fn next_rotation(keyring: &Keyring, facts: &Facts<'_>) -> Option<NextRotation> {
    if keyring.drained {
        return None;
    }
    if keyring.active().is_none() {
        let (_, ready) = next_standby(keyring, facts)?;
        let blocked_by = standing_blockers(keyring, facts);
        return Some(NextRotation { at: ready, trigger: "first", overdue: Span::ZERO, blocked_by });
    }
    let at = due_at(keyring)?;
    let overdue = facts.now.since(at);
    let mut blocked_by = blockers(keyring, facts);
    if overdue.is_zero() {
        // What will have passed by then does not block.
        let ready_then = next_standby(keyring, facts).is_some_and(|(_, ready)| ready <= at);
        blocked_by.retain(|blocker| match blocker {
            Blocker::Propagation | Blocker::Silence => !ready_then,
            Blocker::Hold => keyring.hold.as_ref().is_some_and(|hold| hold.until.is_none_or(|until| until > at)),
            _ => true,
        });
    }
    Some(NextRotation { at, trigger: "schedule", overdue, blocked_by })
}

fn next_state(
    keyring: &Keyring,
    facts: &Facts<'_>,
    key: &Key,
    rotation: Option<&NextRotation>,
    following: Option<(Serial, Timestamp)>,
) -> Option<NextState> {
    let frozen = facts.clock_frozen.then_some(Blocker::ClockFrozen);
    let hold = is_held(keyring.hold.as_ref(), facts.now).then_some(Blocker::Hold);
    match key.state {
        KeyState::Pending => {
            let at = propagated_from(keyring, facts, key);
            let unseen = (key.published_at.is_some() && at.is_none()).then_some(Blocker::Probe);
            Some(NextState {
                state: KeyState::Standby,
                at,
                not_before: None,
                waiting_for: frozen.into_iter().chain(unseen).collect(),
            })
        }
        KeyState::Standby => {
            let next = following.is_some_and(|(serial, _)| serial == key.serial);
            let at = rotation.filter(|_| next).map(|rotation| rotation.at.max(facts.now));
            let waiting_for = rotation.filter(|_| next).map(|rotation| rotation.blocked_by.clone()).unwrap_or_default();
            let not_before = ready_at(keyring, facts, key).filter(|ready| *ready > facts.now);
            Some(NextState { state: KeyState::Active, at, not_before, waiting_for })
        }
        KeyState::Active => {
            let rotation = rotation?;
            let (at, waiting_for) = (Some(rotation.at), rotation.blocked_by.clone());
            Some(NextState { state: KeyState::Retiring, at, not_before: None, waiting_for })
        }
        KeyState::Retiring => {
            let at = keyring.expires_at(key).map(|at| at.max(facts.removals_not_before));
            let gap = keyring.expires_at(key).filter(|at| *at < facts.removals_not_before).map(|_| Blocker::ClockGap);
            let waiting_for = frozen.into_iter().chain(hold).chain(gap).collect();
            Some(NextState { state: KeyState::Retired, at, not_before: None, waiting_for })
        }
        KeyState::Retired | KeyState::Revoked => None,
    }
}

fn ready_count(keyring: &Keyring, facts: &Facts<'_>) -> u32 {
    let ready = |key: &&Key| {
        key.state == KeyState::Standby
            && key.private.is_some()
            && keyring.algorithm_agreed(key.algorithm)
            && is_propagated(keyring, facts, key)
    };
    u32::try_from(keyring.keys.iter().filter(ready).count()).unwrap_or(u32::MAX)
}

fn alarms(keyring: &Keyring, facts: &Facts<'_>, rotation: Option<&NextRotation>) -> BTreeSet<Alarm> {
    let mut alarms = BTreeSet::new();
    match facts.desired {
        Desired::Degraded => alarms.insert(Alarm::Degraded),
        Desired::Absent if !keyring.drained => alarms.insert(Alarm::Absent),
        _ => false,
    };
    if keyring.drained && facts.desired != Desired::Absent {
        alarms.insert(Alarm::Drained);
    }
    if facts.clock_frozen {
        alarms.insert(Alarm::ClockFrozen);
    }
    if rotation.is_some_and(|rotation| rotation.trigger == "schedule" && rotation.overdue > overdue_grace(keyring)) {
        alarms.insert(Alarm::RotationOverdue);
    }
    let waiting = |key: &&Key| matches!(key.state, KeyState::Pending | KeyState::Standby) && key.private.is_some();
    if !keyring.drained && !keyring.keys.iter().any(|key| waiting(&key)) {
        alarms.insert(Alarm::NoStandby);
    }
    if !keyring.drained && keyring.active().is_none() {
        alarms.insert(Alarm::NoActiveKey);
    }
    if keyring.keys.iter().any(|key| waiting(&key) && !keyring.algorithm_agreed(key.algorithm)) {
        alarms.insert(Alarm::AlgorithmUnconfirmed);
    }
    if facts.room == 0 {
        alarms.insert(Alarm::JwksFull);
    }
    for step in facts.backoff.keys() {
        alarms.insert(match step {
            SlowStep::Create { .. } => Alarm::BackendUnavailable,
            SlowStep::Destroy { .. } => Alarm::DestructionPending,
        });
    }
    alarms
}
