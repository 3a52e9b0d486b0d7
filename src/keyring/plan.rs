//! The planner: what has to happen next to a keyring, and when to look again. It is total: any stored time, any `now`.

use std::collections::{BTreeMap, BTreeSet};

use super::algorithm::Algorithm;
use super::change::{Change, Trigger};
use super::decide::UnconfirmedReplica;
use super::policy::{Bootstrap, Policy};
use super::record::{Hold, Key, KeyState, Keyring, Origin, Serial};
use super::time::{Span, Timestamp};

/// The most keys an issuer's JWKS may hold (AWS ALB reads no more).
pub const JWKS_KEYS_MAX: u32 = 10;

/// A record of what probes show is renewed when it is off by more.
const SEEN_RESOLUTION: Span = Span::SECOND;

/// Stored times may be this far ahead of a clock that was set back a little.
pub const FUTURE_TOLERATED: Span = Span::MINUTE.times(10);

/// What a decision needs to know besides the keyring.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// Trusted time (DESIGN §3.13).
    pub now: Timestamp,
    /// The clock cannot be trusted: nothing that waits for time happens.
    pub clock_frozen: bool,
    /// Removals wait until then, after a gap longer than any overlap.
    pub removals_not_before: Timestamp,
    /// What the configuration says of this keyset.
    pub desired: Desired<'a>,
    /// Since when this process publishes each key; only keys that an answerable snapshot contains.
    pub published: BTreeMap<Serial, Timestamp>,
    /// Since when this process cannot sign with each key that is retiring, or the latest time that a token of it may
    /// carry as `iat`, whichever is later.
    pub stopped: BTreeMap<Serial, Timestamp>,
    /// What the issuer's probes show of waiting keys; a key they do not all show is missing. Unused without probes.
    pub seen: BTreeMap<Serial, Seen>,
    /// Waiting keys of which another replica recorded something else than this process sees, and rightly so: nothing is
    /// recorded of them before what it sees changes. Else two that are shown different things would write for ever.
    pub contested: BTreeSet<Serial>,
    /// The issuer's document was served already when this keyset had no key in it.
    pub issuer_served: bool,
    /// When publication resumed after a silence longer than max_age.
    pub resumed_at: Option<Timestamp>,
    /// What other replicas that publish lack of waiting keys, or lacked a while ago; keys that all have are missing.
    pub lagging: BTreeMap<Serial, Lag>,
    /// How many more keys the issuer's JWKS can take.
    pub room: u32,
    /// Slow steps that failed and are not to be tried before a time.
    pub backoff: BTreeMap<SlowStep, Timestamp>,
    /// Other replicas that may not hear of a revocation soon; `None` where that could not be found out. Only the answer to
    /// one tells of it.
    pub unconfirmed: Option<Vec<UnconfirmedReplica>>,
}

/// What all probes of an issuer show of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Every sample since then showed it; time without a sample is added.
    pub since: Timestamp,
    /// The last sample, where fetches have failed since: what comes later is not known.
    pub until: Option<Timestamp>,
}

/// A replica publishes, and what it publishes lacks a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// The last moment at which that was so.
    pub until: Timestamp,
    /// The names of those for which it is so now; none when they have caught up.
    pub replicas: Vec<String>,
}

/// What the configuration wants of a keyset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired<'a> {
    Policy(&'a Policy),
    /// The configuration no longer fits the keyring: the stored policy goes on, nothing is promoted.
    Degraded,
    /// Gone from the configuration: no transition until an operator drains it.
    Absent,
}

/// Work that leaves the process and may take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SlowStep {
    Create { serial: Serial },
    Destroy { serial: Serial },
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write the keyring with this change.
    Write(Change),
    /// Have the backend make this key, then write it.
    Create { serial: Serial, algorithm: Algorithm },
    /// Have the backend destroy this key's private half, then write that.
    Destroy { serial: Serial },
}

/// What to do now, and when to plan again if nothing else happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub step: Option<Step>,
    pub wake: Option<Timestamp>,
}

/// Why something that is due does not happen; names in admin answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blocker {
    NoStandby,
    Propagation,
    /// A probe does not show the key, or cannot be fetched.
    Probe,
    /// Another replica does not publish the key yet, or has not for long enough.
    Replicas,
    Silence,
    Hold,
    ClockFrozen,
    ClockGap,
    Degraded,
    Absent,
    AlgorithmUnconfirmed,
    JwksFull,
}

impl Blocker {
    pub const ALL: [Blocker; 12] = [
        Blocker::NoStandby,
        Blocker::Propagation,
        Blocker::Probe,
        Blocker::Replicas,
        Blocker::Silence,
        Blocker::Hold,
        Blocker::ClockFrozen,
        Blocker::ClockGap,
        Blocker::Degraded,
        Blocker::Absent,
        Blocker::AlgorithmUnconfirmed,
        Blocker::JwksFull,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Blocker::NoStandby => "no_standby",
            Blocker::Propagation => "propagation",
            Blocker::Probe => "probe",
            Blocker::Replicas => "replicas",
            Blocker::Silence => "silence",
            Blocker::Hold => "hold",
            Blocker::ClockFrozen => "clock_frozen",
            Blocker::ClockGap => "clock_gap",
            Blocker::Degraded => "degraded",
            Blocker::Absent => "absent",
            Blocker::AlgorithmUnconfirmed => "algorithm_unconfirmed",
            Blocker::JwksFull => "jwks_full",
        }
    }
}

/// Decides the next step for one keyring.
pub fn plan(keyring: &Keyring, facts: &Facts<'_>) -> Plan {
    let mut view = View { keyring, facts, wake: None };
    let step = view.next_step();
    Plan { step, wake: view.wake.filter(|wake| *wake > facts.now) }
}

struct View<'a> {
    keyring: &'a Keyring,
    facts: &'a Facts<'a>,
    wake: Option<Timestamp>,
}

impl<'a> View<'a> {
    /// What is overdue comes before what prepares; slow work comes last.
    fn next_step(&mut self) -> Option<Step> {
        self.rebase()
            .or_else(|| self.observe())
            .or_else(|| self.emergency())
            .or_else(|| self.adopt())
            .or_else(|| self.end_hold())
            .or_else(|| self.propagate())
            .or_else(|| self.expire())
            .or_else(|| self.first())
            .or_else(|| self.rotate())
            .or_else(|| self.withdraw())
            .or_else(|| self.create())
            .or_else(|| self.destroy())
    }

    /// Times later than now come from a clock that an operator has since declared wrong.
    fn rebase(&mut self) -> Option<Step> {
        let now = self.facts.now;
        let ahead = |at: Option<Timestamp>| at.is_some_and(|at| at > now + FUTURE_TOLERATED);
        let keyring = self.keyring;
        let wrong = ahead(keyring.last_promotion_at)
            || ahead(keyring.disabled_switch_at)
            || keyring
                .keys
                .iter()
                .any(|key| key.state.is_published() && (ahead(key.published_at) || ahead(key.activated_at)));
        (wrong && !self.facts.clock_frozen && !self.idle()).then_some(Step::Write(Change::Rebase))
    }

    fn observe(&mut self) -> Option<Step> {
        if self.facts.clock_frozen {
            return None; // A frozen clock may be behind; a time stamped with it could come too early.
        }
        let seen = |facts: &BTreeMap<Serial, Timestamp>, wanted: &dyn Fn(&Key) -> bool| {
            let keys = self.keyring.keys.iter().filter(|key| wanted(key));
            keys.filter_map(|key| facts.get(&key.serial).map(|&at| (key.serial, at))).collect::<Vec<_>>()
        };
        let published = seen(&self.facts.published, &|key| key.state.is_published() && key.published_at.is_none());
        let stopped = seen(&self.facts.stopped, &|key| key.state == KeyState::Retiring && key.stopped_at.is_none());
        let seen = self.newly_seen();
        let nothing = published.is_empty() && stopped.is_empty() && seen.is_empty();
        (!nothing).then_some(Step::Write(Change::Observe { published, stopped, seen }))
    }

    /// Waiting keys of which probes show something else than the record says.
    fn newly_seen(&self) -> Vec<(Serial, Option<Timestamp>)> {
        if self.keyring.policy.issuer.probes.is_empty() {
            return Vec::new();
        }
        let waiting = |key: &&Key| matches!(key.state, KeyState::Pending | KeyState::Standby);
        let news = |key: &Key| {
            let seen = self.facts.seen.get(&key.serial).map(|seen| seen.since);
            let differs = match (key.seen_at, seen) {
                (Some(recorded), Some(since)) => since > recorded + SEEN_RESOLUTION,
                (recorded, seen) => recorded.is_some() != seen.is_some(),
            };
            differs.then_some((key.serial, seen))
        };
        let is_ours = |key: &&Key| !self.facts.contested.contains(&key.serial);
        self.keyring.keys.iter().filter(waiting).filter(is_ours).filter_map(news).collect()
    }

    /// A keyset that signed before and has no key that signs: revocation left nothing, or compromise everything.
    fn emergency(&mut self) -> Option<Step> {
        let keyring = self.keyring;
        if keyring.drained || keyring.active().is_some() || keyring.last_promotion_at.is_none() {
            return None;
        }
        if let Some((serial, unpropagated)) = emergency_successor(keyring, self.facts) {
            let trigger = Trigger::Revocation;
            return Some(Step::Write(Change::Promote { serial, trigger, unpropagated }));
        }
        let usable = |key: &Key| {
            key.state == KeyState::Pending && key.private.is_some() && keyring.algorithm_agreed(key.algorithm)
        };
        if keyring.keys.iter().any(usable) {
            return None; // It is promoted as soon as it is published.
        }
        self.create_key(keyring.signing_algorithm().unwrap_or(keyring.policy.algorithm))
    }

    fn adopt(&mut self) -> Option<Step> {
        let Desired::Policy(policy) = self.facts.desired else { return None };
        let differs = *policy != self.keyring.policy && policy.issuer.url == self.keyring.policy.issuer.url;
        differs.then(|| Step::Write(Change::AdoptPolicy(Box::new(policy.clone()))))
    }

    fn end_hold(&mut self) -> Option<Step> {
        let until = self.keyring.hold.as_ref()?.until?;
        if self.facts.clock_frozen {
            return None;
        }
        self.at(until).then_some(Step::Write(Change::HoldEnded))
    }

    fn propagate(&mut self) -> Option<Step> {
        if self.facts.clock_frozen || self.idle() {
            return None;
        }
        let mut ready = Vec::new();
        for key in self.in_state(KeyState::Pending) {
            if let Some(propagated) = propagated_from(self.keyring, self.facts, key)
                && self.at(propagated)
            {
                ready.push(key.serial);
            }
        }
        (!ready.is_empty()).then_some(Step::Write(Change::Propagated(ready)))
    }

    fn expire(&mut self) -> Option<Step> {
        if self.facts.clock_frozen || self.idle() || self.held() {
            return None;
        }
        let mut over = Vec::new();
        for key in self.in_state(KeyState::Retiring) {
            let unobserved = key.stopped_at.is_none() && key.activated_at.is_some();
            let Some(expires) = self.keyring.expires_at(key).filter(|_| !unobserved) else { continue };
            if self.at(expires.max(self.facts.removals_not_before)) {
                over.push(key.serial);
            }
        }
        (!over.is_empty()).then_some(Step::Write(Change::Expire(over)))
    }

    /// The first key of a keyset: at once where the issuer is new, else when it has waited like any other.
    fn first(&mut self) -> Option<Step> {
        let keyring = self.keyring;
        if keyring.drained || keyring.active().is_some() || keyring.last_promotion_at.is_some() || self.idle() {
            return None;
        }
        let at_once = keyring.first || keyring.policy.rotation.bootstrap == Bootstrap::Immediate;
        if at_once {
            let candidate = keyring.keys.iter().find(|key| can_sign_at_once(key))?;
            if self.facts.issuer_served && keyring.first {
                // Somebody may hold a document of this issuer that does not contain the key.
                let visible = keyring.visible_again_at(candidate.published_at?);
                if self.facts.clock_frozen || !self.at(visible) {
                    return None;
                }
            }
            let unpropagated = !is_propagated(keyring, self.facts, candidate);
            let serial = candidate.serial;
            return Some(Step::Write(Change::Promote { serial, trigger: Trigger::First, unpropagated }));
        }
        if self.held() || !matches!(self.facts.desired, Desired::Policy(_)) {
            return None;
        }
        self.promotable_now(Trigger::First)
    }

    fn rotate(&mut self) -> Option<Step> {
        self.keyring.active()?;
        let due = due_at(self.keyring)?;
        if !self.at(due) || !standing_blockers(self.keyring, self.facts).is_empty() {
            return None;
        }
        self.promotable_now(Trigger::Schedule)
    }

    fn promotable_now(&mut self, trigger: Trigger) -> Option<Step> {
        let (serial, ready) = next_standby(self.keyring, self.facts)?;
        if self.facts.clock_frozen || !self.at(ready) {
            return None;
        }
        let standby = self.keyring.key(serial).is_some_and(|key| key.state == KeyState::Standby);
        standby.then_some(Step::Write(Change::Promote { serial, trigger, unpropagated: false }))
    }

    /// Successors of another algorithm than the configured one will never sign.
    fn withdraw(&mut self) -> Option<Step> {
        // While nothing signs, the key made in the emergency may be of the former algorithm, which verifiers know.
        let emergency = self.keyring.active().is_none() && self.keyring.last_promotion_at.is_some();
        if !matches!(self.facts.desired, Desired::Policy(_)) || self.keyring.drained || emergency || self.held() {
            return None;
        }
        let unused =
            |key: &&Key| matches!(key.state, KeyState::Pending | KeyState::Standby) && !is_wanted(self.keyring, key);
        let serials: Vec<Serial> = self.keyring.keys.iter().filter(unused).map(|key| key.serial).collect();
        (!serials.is_empty()).then_some(Step::Write(Change::Withdraw(serials)))
    }

    fn create(&mut self) -> Option<Step> {
        if self.keyring.drained || self.facts.desired == Desired::Absent {
            return None;
        }
        // A keyset without an active key needs its first key as well as its successors.
        let wanted = self.keyring.policy.rotation.successors.saturating_add(u32::from(self.keyring.active().is_none()));
        if self.waiting() >= wanted || self.facts.room == 0 {
            return None;
        }
        self.create_key(self.keyring.policy.algorithm)
    }

    fn create_key(&mut self, algorithm: Algorithm) -> Option<Step> {
        let serial = self.keyring.next_serial;
        self.may_try(SlowStep::Create { serial }).then_some(Step::Create { serial, algorithm })
    }

    fn destroy(&mut self) -> Option<Step> {
        let held = self.held() || self.facts.clock_frozen;
        let idle = self.idle();
        for key in &self.keyring.keys {
            let due = match key.state {
                KeyState::Revoked => true,
                KeyState::Retired => !held && !idle,
                _ => false,
            };
            if due && key.private.is_some() && self.may_try(SlowStep::Destroy { serial: key.serial }) {
                return Some(Step::Destroy { serial: key.serial });
            }
        }
        None
    }

    fn waiting(&self) -> u32 {
        let waits =
            |key: &&Key| matches!(key.state, KeyState::Pending | KeyState::Standby) && is_wanted(self.keyring, key);
        u32::try_from(self.keyring.keys.iter().filter(waits).count()).unwrap_or(u32::MAX)
    }

    fn in_state(&self, state: KeyState) -> impl Iterator<Item = &'a Key> + use<'a> {
        let keyring = self.keyring;
        keyring.keys.iter().filter(move |key| key.state == state)
    }

    /// A hold does not end by a clock that cannot be trusted.
    fn held(&self) -> bool {
        let hold = self.keyring.hold.as_ref();
        is_held(hold, self.facts.now) || (self.facts.clock_frozen && hold.is_some())
    }

    /// Gone from the configuration and not drained: nothing happens by itself.
    fn idle(&self) -> bool {
        self.facts.desired == Desired::Absent && !self.keyring.drained
    }

    fn may_try(&mut self, step: SlowStep) -> bool {
        match self.facts.backoff.get(&step) {
            Some(&not_before) => self.at(not_before),
            None => true,
        }
    }

    /// Whether `time` has come; if not, it is a time to wake.
    fn at(&mut self, time: Timestamp) -> bool {
        if time == Timestamp::MAX {
            return false; // Where sums of times end; it never comes.
        }
        let come = time <= self.facts.now;
        if !come {
            self.wake = Some(self.wake.map_or(time, |wake| wake.min(time)));
        }
        come
    }
}

/// Whether a hold is in force at `now`.
pub fn is_held(hold: Option<&Hold>, now: Timestamp) -> bool {
    hold.is_some_and(|hold| hold.until.is_none_or(|until| now < until))
}

/// When the schedule next wants a rotation. Occurrences within `propagation` of the last promotion are skipped and
/// missed ones coalesce, because only the first one after it counts.
pub fn due_at(keyring: &Keyring) -> Option<Timestamp> {
    let activated = keyring.active()?.activated_at.unwrap_or(keyring.written_at);
    let last = keyring.last_promotion_at.unwrap_or(activated).max(activated);
    keyring.policy.rotation.schedule.due(activated, last + keyring.policy.rotation.propagation)
}

/// The successor that a promotion would take, and when it may sign: standby before pending, oldest first, only of an
/// agreed algorithm. After a long silence it also waits until everyone could have seen the key again.
pub fn next_standby(keyring: &Keyring, facts: &Facts<'_>) -> Option<(Serial, Timestamp)> {
    let agreed = |key: &&Key| key.private.is_some() && keyring.algorithm_agreed(key.algorithm);
    let ready = |key: &Key| ready_at(keyring, facts, key).map(|at| (key.serial, at));
    let waiting = keyring.keys.iter().filter(|key| matches!(key.state, KeyState::Standby | KeyState::Pending));
    let candidates = waiting.filter(agreed).filter_map(ready);
    candidates.min_by_key(|&(serial, at)| (at.max(facts.now), serial))
}

/// When a published key may be promoted; `None` while it is not known to be published.
pub fn ready_at(keyring: &Keyring, facts: &Facts<'_>, key: &Key) -> Option<Timestamp> {
    let propagated = propagated_from(keyring, facts, key)?;
    let visible = facts.resumed_at.map_or(Timestamp::EPOCH, |resumed| keyring.visible_again_at(resumed));
    Some(propagated.max(visible).max(everywhere_from(keyring, facts, key)))
}

/// When whoever fetched from a replica that lacked the key has seen it. Taking up what another replica wrote may take
/// `publish_lag`, which propagation includes.
fn everywhere_from(keyring: &Keyring, facts: &Facts<'_>, key: &Key) -> Timestamp {
    facts.lagging.get(&key.serial).map_or(Timestamp::EPOCH, |lag| {
        let caught_up = lag.until - keyring.policy.rotation.publish_lag;
        keyring.visible_again_at(caught_up).max(if lag.replicas.is_empty() {
            Timestamp::EPOCH
        } else {
            // Not before it has caught up, however little is left to wait then.
            facts.now + Span::from_millis(1)
        })
    })
}

/// When a published key has been published long enough; with probes, counted from the moment since which all of them
/// show it. `None` while it is not published or its sight is interrupted.
pub fn propagated_from(keyring: &Keyring, facts: &Facts<'_>, key: &Key) -> Option<Timestamp> {
    let published = key.published_at?;
    if keyring.policy.issuer.probes.is_empty() {
        return Some(keyring.propagated_at(published));
    }
    let seen = facts.seen.get(&key.serial)?;
    let propagated = keyring.propagated_at(published.max(seen.since));
    seen.until.is_none_or(|until| propagated <= until).then_some(propagated)
}

/// What keeps scheduled promotions from happening, apart from a successor that is not ready.
pub fn standing_blockers(keyring: &Keyring, facts: &Facts<'_>) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    match facts.desired {
        Desired::Degraded => blockers.push(Blocker::Degraded),
        Desired::Absent => blockers.push(Blocker::Absent),
        Desired::Policy(_) => {}
    }
    if facts.clock_frozen {
        blockers.push(Blocker::ClockFrozen);
    }
    if is_held(keyring.hold.as_ref(), facts.now) {
        blockers.push(Blocker::Hold);
    }
    if facts.room == 0 {
        blockers.push(Blocker::JwksFull);
    }
    blockers
}

/// Everything that keeps a rotation from happening now.
pub fn blockers(keyring: &Keyring, facts: &Facts<'_>) -> Vec<Blocker> {
    let mut blockers = standing_blockers(keyring, facts);
    match next_standby(keyring, facts) {
        Some((_, ready)) if ready <= facts.now => {}
        Some((serial, _)) => {
            let key = keyring.key(serial);
            let propagated = key.is_some_and(|key| is_propagated(keyring, facts, key));
            let elsewhere = key.is_some_and(|key| everywhere_from(keyring, facts, key) > facts.now);
            blockers.push(match (propagated, elsewhere) {
                (false, _) => Blocker::Propagation,
                (true, true) => Blocker::Replicas,
                (true, false) => Blocker::Silence,
            });
        }
        None => {
            let unconfirmed = |key: &Key| {
                matches!(key.state, KeyState::Standby | KeyState::Pending) && !keyring.algorithm_agreed(key.algorithm)
            };
            let waiting = keyring.keys.iter().any(unconfirmed);
            let unseen = |key: &Key| {
                matches!(key.state, KeyState::Standby | KeyState::Pending)
                    && key.published_at.is_some()
                    && propagated_from(keyring, facts, key).is_none()
            };
            blockers.push(match (waiting, keyring.keys.iter().any(unseen)) {
                (true, _) => Blocker::AlgorithmUnconfirmed,
                (false, true) => Blocker::Probe,
                (false, false) => Blocker::NoStandby,
            });
        }
    }
    blockers
}

/// Whether the key has been published for as long as it must be.
pub fn is_propagated(keyring: &Keyring, facts: &Facts<'_>, key: &Key) -> bool {
    propagated_from(keyring, facts, key).is_some_and(|propagated| propagated <= facts.now)
}

/// Who signs when the active key is gone (DESIGN §2, "Revoke"): the oldest standby; else the newest retiring key that
/// was not rolled back; else the oldest pending one, which is then unpropagated. Only published keys of an algorithm
/// that verifiers know.
pub fn emergency_successor(keyring: &Keyring, facts: &Facts<'_>) -> Option<(Serial, bool)> {
    let usable = |key: &&Key| key.private.is_some() && is_public(facts, key) && keyring.algorithm_agreed(key.algorithm);
    let in_state = |state: KeyState| keyring.keys.iter().filter(move |key| key.state == state).filter(usable);
    let standby = in_state(KeyState::Standby).min_by_key(|key| key.serial);
    let retiring = || in_state(KeyState::Retiring).filter(|key| !key.rolled_back).max_by_key(|key| key.demoted_at);
    let pending = || in_state(KeyState::Pending).min_by_key(|key| key.serial);
    let chosen = standby.or_else(retiring).or_else(pending)?;
    // An imported key that was relieved before it ever signed here may be as new to verifiers as a pending one.
    let signed_here = chosen.state == KeyState::Retiring && chosen.activated_at.is_some();
    let seen = signed_here || is_propagated(keyring, facts, chosen);
    Some((chosen.serial, !seen))
}

/// Whether a key that was made as `serial` will never be asked for again: the keyset was drained meanwhile, wants another
/// algorithm, or has another key of that serial. A keyring that has not come as far as `serial` will ask again.
pub fn is_overtaken(keyring: &Keyring, facts: &Facts<'_>, serial: Serial, algorithm: Algorithm) -> bool {
    if serial != keyring.next_serial {
        return serial < keyring.next_serial;
    }
    let wanted = match facts.desired {
        Desired::Policy(policy) => policy.algorithm,
        Desired::Degraded | Desired::Absent => keyring.policy.algorithm,
    };
    // An emergency asks for the former algorithm.
    let emergency = keyring.active().is_none() && keyring.signing_algorithm() == Some(algorithm);
    keyring.drained || (algorithm != wanted && !emergency)
}

/// Whether a waiting key is of the configured algorithm; an imported one may differ in size.
fn is_wanted(keyring: &Keyring, key: &Key) -> bool {
    let wanted = keyring.policy.algorithm;
    key.algorithm == wanted || (key.origin == Origin::Imported && key.algorithm.alg() == wanted.alg())
}

/// Whether anyone can have fetched the key: its publication is recorded, or this process publishes it.
fn is_public(facts: &Facts<'_>, key: &Key) -> bool {
    key.published_at.is_some() || facts.published.contains_key(&key.serial)
}

/// A first key signs as soon as it is stored: it is in the first document that anybody can fetch.
fn can_sign_at_once(key: &Key) -> bool {
    matches!(key.state, KeyState::Pending | KeyState::Standby) && key.private.is_some()
}

/// The margin after which a late rotation is worth an alarm: one propagation, at least a minute for long schedules.
pub fn overdue_grace(keyring: &Keyring) -> Span {
    keyring.policy.rotation.propagation.min(Span::MINUTE.times(5))
}
