//! A keyset's keys over time: what its record says of the past, and what the planner itself will do while nothing else
//! happens. Pictures of rotations are drawn from this and from nothing else, so they cannot disagree with the daemon.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::change::{Change, NewKey, Trigger};
use super::jwk::{EcCurve, Kid, PublicJwk};
use super::name::Name;
use super::plan::{Desired, Facts, JWKS_KEYS_MAX, Seen, Step, plan};
use super::policy::Policy;
use super::record::{Key, KeyState, Keyring, Origin, PrivateHandle, Serial};
use super::time::{Span, Timestamp};

/// Steps that are played forward at most: some two hundred rotations.
const STEPS_MAX: usize = 2000;

/// How far anyone may look ahead.
pub const AHEAD_MAX: Span = Span::DAY.times(3660);

/// The keys of a keyset over time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Timeline {
    #[schema(value_type = String)]
    pub keyset: Name,
    /// Of the keyring that it begins with.
    pub generation: u64,
    #[schema(value_type = String, format = DateTime)]
    pub from: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub now: Timestamp,
    /// What comes later is not told: earlier than asked for where there would be too many rotations.
    #[schema(value_type = String, format = DateTime)]
    pub until: Timestamp,
    /// Nothing moves by itself: the clock or the record cannot be trusted. What would come is not known.
    pub stands_still: bool,
    /// In order of serial.
    pub keys: Vec<Lane>,
    /// Promotions to come.
    pub rotations: Vec<Rotation>,
}

/// One key over time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Lane {
    pub serial: Serial,
    /// Absent for a key that is not made yet.
    #[schema(value_type = Option<String>)]
    pub kid: Option<Kid>,
    pub algorithm: &'static str,
    /// Without gaps, each until the next one begins.
    pub phases: Vec<Phase>,
}

/// The time that a key is in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Phase {
    #[schema(value_type = String)]
    pub state: KeyState,
    #[schema(value_type = String, format = DateTime)]
    pub from: Timestamp,
    /// Absent where it ends later than is told, or never.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub until: Option<Timestamp>,
}

/// A promotion to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Rotation {
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// As in `next_rotation` and in the label of `jwksd_rotations_total`.
    pub trigger: &'static str,
    /// The key that signs from then on.
    pub serial: Serial,
    /// The one that signed until then.
    pub former: Option<Serial>,
}

/// How much of a timeline somebody wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub past: Span,
    pub ahead: Span,
}

impl Window {
    /// The last rotation and the next two.
    pub fn of(policy: &Policy) -> Window {
        let gap = policy.rotation.schedule.largest_gap().span.max(policy.rotation.propagation);
        Window { past: gap, ahead: gap.times(2) + policy.rotation.propagation }
    }
}

/// The timeline of a keyring. What holds up waiting keys now (a replica that lags, a probe that fails) is taken to be over
/// at once. With `stands_still` nothing is played.
pub fn timeline(keyring: &Keyring, facts: &Facts<'_>, window: Window, stands_still: bool) -> Timeline {
    let (from, until) = (facts.now - window.past, facts.now + window.ahead.min(AHEAD_MAX));
    let stands_still = stands_still || facts.clock_frozen;
    let mut lanes: BTreeMap<Serial, Lane> =
        keyring.keys.iter().map(|key| (key.serial, recorded(keyring, key))).collect();
    let mut play = Play { keyring: stripped(keyring), facts: facts.clone(), lanes: &mut lanes, rotations: Vec::new() };
    let until = if stands_still { until } else { play.until(until) };
    let rotations = play.rotations;
    let keys = lanes.into_values().filter(|lane| lane.shows_after(from)).collect();
    let (keyset, generation) = (keyring.keyset.clone(), keyring.generation);
    Timeline { keyset, generation, from, now: facts.now, until, stands_still, keys, rotations }
}

/// What a keyset would do whose configuration is taken for the first time at `start`: its issuer has never published a key.
pub fn forecast(keyset: &Name, policy: &Policy, start: Timestamp, ahead: Span) -> Timeline {
    let keyring = Keyring::new(keyset.clone(), String::new(), policy.clone(), true, start);
    let facts = Facts {
        unconfirmed: Some(Vec::new()),
        now: start,
        clock_frozen: false,
        removals_not_before: Timestamp::EPOCH,
        desired: Desired::Policy(policy),
        published: BTreeMap::new(),
        stopped: BTreeMap::new(),
        seen: BTreeMap::new(),
        contested: BTreeSet::new(),
        issuer_served: false,
        resumed_at: None,
        lagging: BTreeMap::new(),
        room: JWKS_KEYS_MAX,
        backoff: BTreeMap::new(),
    };
    timeline(&keyring, &facts, Window { past: Span::ZERO, ahead }, false)
}

impl Lane {
    /// Whether any of it lies after `from`; what is left of a key that ended is nothing to see.
    fn shows_after(&self, from: Timestamp) -> bool {
        self.phases.last().is_some_and(|last| last.state.is_published() || last.from >= from)
    }

    /// What came at the same moment as what followed it, or is said to have come later, did not last.
    fn enter(&mut self, state: KeyState, at: Timestamp) {
        while self.phases.last().is_some_and(|last| last.from >= at && last.state != state) {
            self.phases.pop();
        }
        match self.phases.last_mut() {
            Some(last) if last.state == state => last.until = None,
            last => {
                if let Some(last) = last {
                    last.until = Some(at);
                }
                self.phases.push(Phase { state, from: at, until: None });
            }
        }
    }
}

/// What the record tells of a key until now. Of a key that signed, was relieved and signed again it tells the last time.
fn recorded(keyring: &Keyring, key: &Key) -> Lane {
    let demoted = key.demoted_at.filter(|_| key.state != KeyState::Active);
    let mut marks = vec![(key.created_at, KeyState::Pending)];
    marks.extend(stood_by_from(keyring, key).map(|at| (at, KeyState::Standby)));
    marks.extend(key.activated_at.map(|at| (at, KeyState::Active)));
    marks.extend(demoted.map(|at| (at, KeyState::Retiring)));
    if key.state != KeyState::Pending {
        marks.push((key.entered_at, key.state));
    }
    let mut lane = Lane {
        serial: key.serial,
        kid: Some(key.kid.clone()),
        algorithm: key.algorithm.alg(),
        phases: Vec::with_capacity(marks.len()),
    };
    for (at, state) in marks {
        lane.enter(state, at);
    }
    lane
}

/// When a key that has gone on since came to stand by: as the journal says, else as its policy asks.
fn stood_by_from(keyring: &Keyring, key: &Key) -> Option<Timestamp> {
    if matches!(key.state, KeyState::Pending | KeyState::Standby) || key.origin == Origin::Imported {
        return None;
    }
    let told = keyring.journal.audit.iter().find(|entry| entry.action == "propagated" && entry.kids.contains(&key.kid));
    let ended = key.activated_at.unwrap_or(key.entered_at);
    let asked = key.published_at.filter(|_| !key.unpropagated).map(|at| keyring.propagated_at(at));
    told.map(|entry| entry.at).or(asked).filter(|at| *at < ended)
}

/// Without what no decision needs, so that playing costs little.
fn stripped(keyring: &Keyring) -> Keyring {
    let mut keyring = keyring.clone();
    keyring.journal = super::record::Journal::default();
    keyring.banned.clear();
    keyring
}

/// The planner, and a world in which everything that it asks for succeeds at once.
struct Play<'a> {
    keyring: Keyring,
    facts: Facts<'a>,
    lanes: &'a mut BTreeMap<Serial, Lane>,
    rotations: Vec<Rotation>,
}

impl Play<'_> {
    /// Plays until then; says how far it came.
    fn until(&mut self, end: Timestamp) -> Timestamp {
        let others = JWKS_KEYS_MAX.saturating_sub(self.facts.room).saturating_sub(self.published());
        self.facts.lagging.clear();
        for _ in 0..STEPS_MAX {
            self.observe(others);
            let next = plan(&self.keyring, &self.facts);
            match (next.step, next.wake) {
                (Some(step), _) => self.make(step),
                (None, Some(wake)) if wake <= end => self.facts.now = wake,
                (None, _) => return end,
            }
        }
        self.facts.now
    }

    fn published(&self) -> u32 {
        u32::try_from(self.keyring.published().count()).unwrap_or(u32::MAX)
    }

    /// What the daemon would know by now: what is stored is published, and whoever was relieved has stopped.
    fn observe(&mut self, others: u32) {
        let now = self.facts.now;
        self.facts.room = JWKS_KEYS_MAX.saturating_sub(others).saturating_sub(self.published());
        for key in self.keyring.published() {
            self.facts.published.entry(key.serial).or_insert(now);
            let seen = self.facts.seen.entry(key.serial).or_insert(Seen { since: now, until: None });
            seen.until = None;
            match key.state {
                KeyState::Retiring => _ = self.facts.stopped.entry(key.serial).or_insert(now),
                _ => _ = self.facts.stopped.remove(&key.serial),
            }
        }
    }

    fn make(&mut self, step: Step) {
        let now = self.facts.now;
        let change = match step {
            Step::Write(change) => change,
            Step::Create { serial, algorithm } => {
                let Ok(kid) = Kid::parse(&format!("planned-{serial}")) else { return };
                // Nobody verifies with it: it stands for a key that does not exist.
                let public = PublicJwk::Ec { crv: EcCurve::P256, x: String::new(), y: String::new() };
                let private = PrivateHandle { backend: self.keyring.policy.backend.clone(), handle: String::new() };
                self.lanes.insert(serial, Lane { serial, kid: None, algorithm: algorithm.alg(), phases: Vec::new() });
                Change::Add(Box::new(NewKey { kid, algorithm, public, private: Some(private) }))
            }
            Step::Destroy { serial } => Change::Destroyed(serial),
        };
        if let Change::Promote { serial, trigger, .. } = &change {
            self.promoted(*serial, *trigger);
        }
        self.keyring = self.keyring.after(&change, now);
        self.keyring.journal = super::record::Journal::default();
        for key in &self.keyring.keys {
            if let Some(lane) = self.lanes.get_mut(&key.serial) {
                lane.enter(key.state, now);
            }
        }
        if self.keyring.active().is_some() {
            self.keyring.keys.retain(|key| key.state.is_published() || key.private.is_some());
        }
    }

    fn promoted(&mut self, serial: Serial, trigger: Trigger) {
        let former = self.keyring.active().map(|key| key.serial);
        self.rotations.push(Rotation { at: self.facts.now, trigger: trigger.as_str(), serial, former });
    }
}
