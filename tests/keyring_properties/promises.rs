//! What was promised to verifiers, kept apart from the keyring: when each key could first be fetched, and until when
//! some clock may accept a token of it. Uses nothing that decides in the core.

use std::collections::BTreeMap;

use jwksd::keyring::change::{Change, Trigger};
use jwksd::keyring::decide::Intent;
use jwksd::keyring::plan::{Desired, Facts};
use jwksd::keyring::policy::{Bootstrap, Policy};
use jwksd::keyring::record::{Hold, Key, KeyState, Keyring, Serial};
use jwksd::keyring::time::{Span, Timestamp};

use crate::world::Probe;

/// Why a keyring was written.
#[derive(Clone, Debug)]
pub enum Cause {
    Planned(Change),
    Operator(Intent),
}

#[derive(Default)]
pub struct Promises {
    /// Off for histories that begin with made-up times.
    pub kept: bool,
    published: BTreeMap<Serial, Timestamp>,
    /// Waiting keys that the probe shows: for how long by now, and when it was asked last.
    shown: BTreeMap<Serial, (Span, Timestamp)>,
    /// The last instant at which a clock within σ may hold a token of the key for live.
    live_until: BTreeMap<Serial, Timestamp>,
    /// Imported public keys: until when their owner asked for them.
    wanted_until: BTreeMap<Serial, Timestamp>,
    /// Policies that were replaced by quicker ones, with the end of their word.
    slower: Vec<Slower>,
    resumed: Option<Timestamp>,
    /// The longest life of a token of each key.
    longest_life: BTreeMap<Serial, Span>,
}

struct Slower {
    propagation: Span,
    window: Span,
    until: Timestamp,
}

macro_rules! must {
    ($holds:expr, $($why:tt)+) => { if !$holds { return Err(format!($($why)+)); } };
}

impl Promises {
    pub fn new() -> Promises {
        Promises {
            kept: true,
            published: BTreeMap::new(),
            shown: BTreeMap::new(),
            live_until: BTreeMap::new(),
            wanted_until: BTreeMap::new(),
            slower: Vec::new(),
            resumed: None,
            longest_life: BTreeMap::new(),
        }
    }

    /// Somebody can fetch the key from now on.
    pub fn published(&mut self, serial: Serial, now: Timestamp) {
        self.published.entry(serial).or_insert(now);
    }

    /// The probe was asked. Time counts between two samples that both showed the key.
    pub fn sampled(&mut self, serial: Serial, probe: Probe, now: Timestamp) {
        match probe {
            Probe::Misses => drop(self.shown.remove(&serial)),
            Probe::Fails => {
                if let Some((_, last)) = self.shown.get_mut(&serial) {
                    *last = Timestamp::MAX;
                }
            }
            Probe::Shows if self.published.contains_key(&serial) => {
                let (shown, last) = self.shown.entry(serial).or_insert((Span::ZERO, now));
                *shown = *shown + now.since(*last);
                *last = now;
            }
            Probe::Shows => {}
        }
    }

    /// Nobody asks the probe for a while.
    pub fn unsampled(&mut self) {
        self.shown.values_mut().for_each(|(_, last)| *last = Timestamp::MAX);
    }

    /// Other probes are asked from now on.
    pub fn other_probes(&mut self) {
        self.shown.clear();
    }

    pub fn silence_ended(&mut self, now: Timestamp) {
        self.resumed = Some(now);
    }

    /// It is `now`, and until now the active key signed the longest tokens it may.
    pub fn time_is(&mut self, now: Timestamp, keyring: &Keyring) {
        if let Some(active) = keyring.active() {
            let longest = self.longest_life.entry(active.serial).or_default();
            *longest = (*longest).max(life(&keyring.policy));
            let until = now + life(&keyring.policy);
            let last = self.live_until.entry(active.serial).or_insert(until);
            *last = (*last).max(until);
        }
        self.slower.retain(|slower| slower.until > now);
    }

    /// Tokens issued later than `now` are not valid yet for anyone whose clock is right; the others expire as they would.
    pub fn clock_accepted(&mut self, now: Timestamp, keyring: &Keyring) {
        for (serial, until) in &mut self.live_until {
            *until = (*until).min(now + self.longest_life.get(serial).copied().unwrap_or_default());
        }
        self.time_is(now, keyring);
    }

    /// Judges one write; the error says which promise it breaks.
    pub fn write(&mut self, before: &Keyring, next: &Keyring, cause: &Cause, facts: &Facts<'_>) -> Result<(), String> {
        if !self.kept {
            return Ok(());
        }
        self.remember_import(before, next, cause, facts.now);
        if matches!(cause, Cause::Planned(Change::Rebase)) {
            // The clock was set back: what counts from now on is the time that passes on the accepted one.
            self.published.values_mut().for_each(|at| *at = (*at).min(facts.now));
        }
        self.time_is(facts.now, before);
        judge_record(before, next, cause, facts)?;
        judge_restraint(before, next, cause, facts)?;
        self.judge_removals(before, next, facts.now)?;
        self.judge_signer(before, next, cause, facts)?;
        self.note_policies(before, next, facts.now);
        self.time_is(facts.now, next);
        Ok(())
    }

    /// Invariant 2.
    fn judge_removals(&self, before: &Keyring, next: &Keyring, now: Timestamp) -> Result<(), String> {
        for key in before.published() {
            let after = next.key(key.serial).map(|key| key.state);
            if after.is_some_and(|state| state.is_published() || state == KeyState::Revoked) {
                continue;
            }
            let live = self.live_until.get(&key.serial).copied().unwrap_or(Timestamp::EPOCH);
            must!(live <= now, "key {} left the JWKS at {now}, its tokens live until {live}", key.serial);
            let wanted = self.wanted_until.get(&key.serial).copied().unwrap_or(Timestamp::EPOCH);
            must!(wanted <= now, "key {} left the JWKS at {now}, it was wanted until {wanted}", key.serial);
        }
        Ok(())
    }

    /// Invariants 1 and 4.
    fn judge_signer(&self, before: &Keyring, next: &Keyring, cause: &Cause, facts: &Facts<'_>) -> Result<(), String> {
        let count = next.keys.iter().filter(|key| key.state == KeyState::Active).count();
        must!(count <= 1, "{count} keys are active");
        let Some(active) = next.active() else {
            return match (before.active(), cause) {
                (None, _) | (Some(_), Cause::Operator(Intent::Compromise | Intent::Drain)) => Ok(()),
                (Some(revoked), Cause::Operator(Intent::Revoke { .. })) => {
                    let heir = next.keys.iter().find(|key| self.could_follow(revoked, key));
                    must!(heir.is_none(), "key {:?} could sign, but nothing does", heir.map(|key| key.serial));
                    Ok(())
                }
                _ => Err("no key is active any more".to_owned()),
            };
        };
        must!(active.private.is_some(), "the active key {} has no private half", active.serial);
        must!(active.ttl_bound >= next.policy.tokens.max_ttl, "the bound of key {} is too low", active.serial);
        if before.active().is_some_and(|key| key.serial == active.serial) {
            return Ok(());
        }
        self.judge_promotion(before, next, active, cause, facts)
    }

    fn judge_promotion(
        &self,
        before: &Keyring,
        next: &Keyring,
        active: &Key,
        cause: &Cause,
        facts: &Facts<'_>,
    ) -> Result<(), String> {
        let serial = active.serial;
        let propagated = self.is_propagated(before, active, facts.now);
        let signed_before = before.key(serial).is_some_and(|key| key.activated_at.is_some());
        must!(
            self.published.contains_key(&serial) || before.last_promotion_at.is_none() || is_import(cause),
            "key {serial} signs and nobody could fetch it"
        );
        match cause {
            Cause::Planned(Change::Promote { trigger: Trigger::Schedule, .. }) => {
                must!(propagated, "key {serial} was promoted by the schedule before it was published long enough");
                must!(self.is_visible(before, facts.now), "key {serial} was promoted soon after a silence");
                must!(before.active().is_some(), "the schedule promoted without a former key");
                must!(!held(before.hold.as_ref(), facts.now), "promoted under a hold");
                must!(facts.room > 0, "promoted with a full JWKS");
            }
            Cause::Planned(Change::Promote { trigger: Trigger::First, .. }) => {
                let at_once = before.first || before.policy.rotation.bootstrap == Bootstrap::Immediate;
                must!(propagated || at_once, "key {serial} was promoted as the first one too early");
                must!(before.last_promotion_at.is_none(), "key {serial} is not the first");
            }
            Cause::Planned(Change::Promote { trigger: Trigger::Revocation, .. }) => {
                must!(before.active().is_none(), "an emergency replaced an active key");
            }
            Cause::Operator(Intent::Rotate { allow_unpropagated, .. }) => {
                must!(propagated || *allow_unpropagated, "key {serial} was promoted by an operator too early");
                let visible = self.is_visible(before, facts.now);
                must!(visible || *allow_unpropagated, "an operator's rotation came too soon after a silence");
            }
            Cause::Operator(Intent::Rollback) => must!(signed_before, "rolled back to a key that never signed"),
            Cause::Operator(Intent::Undrain) => must!(
                before.drained && (signed_before || propagated),
                "the drain ended with a key that verifiers may not know"
            ),
            Cause::Operator(Intent::Revoke { .. }) => {
                let state = before.key(serial).map(|key| key.state);
                let waiting = before.keys.iter().find(|key| key.state == KeyState::Standby && self.can_sign(key));
                if let (Some(waiting), Some(other)) = (waiting, state.filter(|state| *state != KeyState::Standby)) {
                    let same = waiting.algorithm == active.algorithm;
                    must!(!same, "a {other} key follows although {} is standby", waiting.serial);
                }
            }
            Cause::Operator(Intent::Import(_)) => must!(before.active().is_none(), "an import replaced the active key"),
            other => return Err(format!("{other:?} made key {serial} active")),
        }
        let exempt = signed_before || is_import(cause);
        if !propagated && !exempt {
            must!(active.unpropagated, "key {serial} signs early and its record does not say so");
            let said = next.journal.audit.last().and_then(|entry| entry.detail.clone()).unwrap_or_default();
            let audited = said.contains("unpropagated") || said.contains("before it was published");
            must!(audited, "key {serial} signs early and the audit log does not say so: {said:?}");
        }
        Ok(())
    }

    fn could_follow(&self, revoked: &Key, key: &Key) -> bool {
        let state = match key.state {
            KeyState::Standby | KeyState::Pending => true,
            KeyState::Retiring => !key.rolled_back,
            KeyState::Active | KeyState::Retired | KeyState::Revoked => false,
        };
        state && self.can_sign(key) && key.algorithm == revoked.algorithm
    }

    fn can_sign(&self, key: &Key) -> bool {
        key.private.is_some() && self.published.contains_key(&key.serial)
    }

    fn is_propagated(&self, keyring: &Keyring, key: &Key, now: Timestamp) -> bool {
        let Some(&published) = self.published.get(&key.serial) else { return false };
        if !keyring.policy.issuer.probes.is_empty() {
            let shown = self.shown.get(&key.serial).map_or(Span::ZERO, |(shown, _)| *shown);
            if shown + Span::SECOND < keyring.policy.rotation.propagation {
                return false; // A record of what is seen is renewed when it is off by a second.
            }
        }
        let words = self.slower.iter().map(|slower| (published + slower.propagation).min(slower.until));
        words.chain([published + keyring.policy.rotation.propagation]).all(|word| word <= now)
    }

    fn is_visible(&self, keyring: &Keyring, now: Timestamp) -> bool {
        let Some(resumed) = self.resumed else { return true };
        let words = self.slower.iter().map(|slower| (resumed + slower.window).min(slower.until));
        words.chain([resumed + window(&keyring.policy)]).all(|word| word <= now)
    }

    fn note_policies(&mut self, before: &Keyring, next: &Keyring, now: Timestamp) {
        let (old, new) = (&before.policy, &next.policy);
        if new.rotation.propagation < old.rotation.propagation || window(new) < window(old) {
            let propagation = old.rotation.propagation;
            self.slower.push(Slower { propagation, window: window(old), until: now + propagation });
        }
    }

    fn remember_import(&mut self, before: &Keyring, next: &Keyring, cause: &Cause, now: Timestamp) {
        let Cause::Operator(Intent::Import(imported)) = cause else { return };
        let serial = before.next_serial;
        if let Some(since) = imported.published_since {
            self.published.insert(serial, since);
        }
        if imported.key.private.is_some() {
            // Until now it may have signed elsewhere.
            self.live_until.insert(serial, now + imported.ttl_bound + next.policy.rotation.clock_skew);
        } else if let Some(until) = imported.published_until {
            self.wanted_until.insert(serial, until);
        }
    }
}

/// What a record must be, whatever happened.
fn judge_record(before: &Keyring, next: &Keyring, cause: &Cause, facts: &Facts<'_>) -> Result<(), String> {
    must!(next.generation == before.generation + 1, "generation {} follows {}", next.generation, before.generation);
    must!(next.lineage == before.lineage && next.keyset == before.keyset, "it is another keyring");
    must!(next.written_at == facts.now, "written at {}, but it is {}", next.written_at, facts.now);
    let silent = matches!(cause, Cause::Planned(Change::Observe { .. }));
    let what_it_is =
        |keyring: &Keyring| (keyring.keys.clone(), keyring.hold.clone(), keyring.policy.clone(), keyring.drained);
    // A request that found everything as asked leaves only its Idempotency-Key.
    let remembered = matches!(cause, Cause::Operator(_)) && what_it_is(next) == what_it_is(before);
    let noted = next.journal.next_seq > before.journal.next_seq;
    must!(silent || remembered || noted, "nothing stands in the audit log");
    for key in &before.keys {
        let Some(after) = next.key(key.serial) else {
            let ended = matches!(key.state, KeyState::Retired | KeyState::Revoked) && key.private.is_none();
            must!(ended, "key {} vanished", key.serial);
            let revoked = key.state == KeyState::Revoked;
            must!(!revoked || next.has_revoked(&key.kid, &key.public), "revoked key {} could come back", key.serial);
            continue;
        };
        let same = (&after.kid, after.algorithm, &after.public) == (&key.kid, key.algorithm, &key.public);
        must!(same, "key {} became another key", key.serial);
        let ended = matches!(key.state, KeyState::Revoked | KeyState::Retired);
        must!(!ended || after.state == key.state, "key {} came back from {}", key.serial, key.state);
        must!(after.ttl_bound >= key.ttl_bound, "the bound of key {} shrank", key.serial);
        must!(after.overlap_bound >= key.overlap_bound, "the overlap of key {} shrank", key.serial);
        let destroyed = key.private.is_some() && after.private.is_none();
        must!(!destroyed || ended, "the private half of the {} key {} was destroyed", key.state, key.serial);
    }
    Ok(())
}

/// What the planner must leave alone.
fn judge_restraint(before: &Keyring, next: &Keyring, cause: &Cause, facts: &Facts<'_>) -> Result<(), String> {
    let Cause::Planned(change) = cause else { return Ok(()) };
    let emergency = before.active().is_none() && before.last_promotion_at.is_some();
    let destroys_revoked = match change {
        Change::Destroyed(serial) => before.key(*serial).is_some_and(|key| key.state == KeyState::Revoked),
        _ => false,
    };
    let ends = matches!(change, Change::Expire(_) | Change::Withdraw(_))
        || (matches!(change, Change::Destroyed(_)) && !destroys_revoked);
    if held(before.hold.as_ref(), facts.now) {
        must!(!ends, "{change:?} under a hold");
    }
    if facts.clock_frozen {
        let waits =
            matches!(change, Change::Expire(_) | Change::Propagated(_) | Change::HoldEnded | Change::Observe { .. });
        must!(!waits, "{change:?} while the clock cannot be trusted");
        let scheduled = matches!(change, Change::Promote { trigger: Trigger::Schedule, .. });
        must!(!scheduled, "{change:?} while the clock cannot be trusted");
    }
    if facts.desired == Desired::Absent && !before.drained {
        let allowed = matches!(change, Change::Observe { .. } | Change::HoldEnded)
            || destroys_revoked
            || (emergency && matches!(change, Change::Promote { .. } | Change::Add(_)));
        must!(allowed, "{change:?} although the keyset is gone from the configuration");
    }
    if matches!(facts.desired, Desired::Degraded) {
        let scheduled = matches!(change, Change::Promote { trigger: Trigger::Schedule, .. } | Change::AdoptPolicy(_));
        must!(!scheduled, "{change:?} although the configuration does not fit");
    }
    if matches!(change, Change::Add(_)) && !emergency {
        must!(facts.room > 0, "a key was added to a full JWKS");
    }
    if matches!(change, Change::Expire(_)) {
        must!(facts.removals_not_before <= facts.now, "removed although removals wait");
    }
    let revoked = |keyring: &Keyring| keyring.keys.iter().filter(|key| key.state == KeyState::Revoked).count();
    must!(revoked(next) == revoked(before), "{change:?} revoked a key");
    Ok(())
}

fn is_import(cause: &Cause) -> bool {
    matches!(cause, Cause::Operator(Intent::Import(_)))
}

/// How long a token may be live for some clock, from its signature on.
fn life(policy: &Policy) -> Span {
    policy.tokens.max_ttl + policy.rotation.clock_skew
}

/// DESIGN §4: caches + slowest verifier + σ (+ publish lag).
fn window(policy: &Policy) -> Span {
    let caches: Span = policy.issuer.caches.iter().copied().sum();
    let slowest = policy.rotation.verifiers.iter().map(|verifier| verifier.sees_new).max().unwrap_or_default();
    caches + policy.issuer.stale_if_error + slowest + policy.rotation.publish_lag + policy.rotation.clock_skew
}

fn held(hold: Option<&Hold>, now: Timestamp) -> bool {
    hold.is_some_and(|hold| hold.until.is_none_or(|until| now < until))
}
