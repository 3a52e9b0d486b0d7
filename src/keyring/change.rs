//! What can happen to a keyring, and what each change makes of it. Planner and operators both go through here.

use std::collections::BTreeSet;

use super::algorithm::Algorithm;
use super::decide::KeyChange;
use super::jwk::{Kid, PublicJwk};
use super::lifecycle::{KeyEvent, Transition, transition};
use super::name::Name;
use super::policy::Policy;
use super::record::{
    AuditEntry, Floor, Hold, Journal, Key, KeyState, Keyring, Origin, PrivateHandle, Revocation, Serial,
};
use super::time::{Span, Timestamp};

/// Who speaks in the audit log when nobody asked.
pub const SYSTEM: &str = "jwksd";

/// Audit entries kept in a keyring; older ones live on in the log.
pub const AUDIT_KEPT: usize = 200;

/// Retired keys kept as history.
pub const HISTORY_KEPT: usize = 200;

/// Revoked keys kept with all that is known of them; of older ones only what identifies them, since they must never come back.
pub const REVOKED_KEPT: usize = 300;

/// Bytes that identities of revoked keys may take in a record: more than 40,000 of them.
const BANNED_BYTES: usize = 3 * 1024 * 1024;

/// What an entry takes in a record besides its text: quotes, comma, indentation.
const ENTRY_BYTES: usize = 12;

/// How long an Idempotency-Key is remembered.
pub const IDEMPOTENCY_KEPT: Span = Span::DAY;

/// Why a key was promoted; also the `trigger` label of `jwksd_rotations_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trigger {
    First,
    Schedule,
    Operator,
    Rollback,
    Revocation,
    Compromise,
    KeyDisabled,
    Import,
}

impl Trigger {
    pub const ALL: [Trigger; 8] = [
        Trigger::First,
        Trigger::Schedule,
        Trigger::Operator,
        Trigger::Rollback,
        Trigger::Revocation,
        Trigger::Compromise,
        Trigger::KeyDisabled,
        Trigger::Import,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Trigger::First => "first",
            Trigger::Schedule => "schedule",
            Trigger::Operator => "operator",
            Trigger::Rollback => "rollback",
            Trigger::Revocation => "revocation",
            Trigger::Compromise => "compromise",
            Trigger::KeyDisabled => "key_disabled",
            Trigger::Import => "import",
        }
    }
}

/// A key about to join a keyring, as created in a backend or brought by an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewKey {
    pub kid: Kid,
    pub algorithm: Algorithm,
    pub public: PublicJwk,
    pub private: Option<PrivateHandle>,
}

/// One change of one keyring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The configured policy replaces the one in force; bounds of the active key rise with it.
    AdoptPolicy(Box<Policy>),
    /// A drained keyset begins anew with another issuer.
    Restart {
        policy: Box<Policy>,
        first: bool,
    },
    /// What this process saw: since when keys are published, from when on demoted ones could not sign, and since when
    /// probes have shown waiting ones without a gap.
    Observe {
        published: Vec<(Serial, Timestamp)>,
        stopped: Vec<(Serial, Timestamp)>,
        seen: Vec<(Serial, Option<Timestamp>)>,
    },
    /// A created key joins as pending.
    Add(Box<NewKey>),
    /// A key was created that is not wanted any more: it is noted as one that ended, so that it is destroyed as those are.
    AddEnded(Box<NewKey>),
    Propagated(Vec<Serial>),
    Promote {
        serial: Serial,
        trigger: Trigger,
        unpropagated: bool,
    },
    Withdraw(Vec<Serial>),
    Expire(Vec<Serial>),
    Destroyed(Serial),
    HoldEnded,
    /// Times that lie in the future become now: key publication counts anew, the schedule too.
    Rebase,
}

impl Keyring {
    /// An empty keyring, not stored yet: its first write has generation 1.
    pub fn new(keyset: Name, lineage: String, policy: Policy, first: bool, now: Timestamp) -> Keyring {
        Keyring {
            keyset,
            lineage,
            generation: 0,
            written_at: now,
            policy,
            born: None,
            supersedes: Vec::new(),
            first,
            keys: Vec::new(),
            banned: Vec::new(),
            next_serial: 1,
            last_promotion_at: None,
            disabled_switch_at: None,
            hold: None,
            drained: false,
            confirmed_algorithm: None,
            floors: Vec::new(),
            journal: Journal::default(),
        }
    }

    /// The lineage that private keys are bound to: the one that the keyset began with.
    pub fn key_lineage(&self) -> &str {
        self.born.as_deref().unwrap_or(&self.lineage)
    }

    pub fn active(&self) -> Option<&Key> {
        self.keys.iter().find(|key| key.state == KeyState::Active)
    }

    pub fn key(&self, serial: Serial) -> Option<&Key> {
        self.keys.iter().find(|key| key.serial == serial)
    }

    pub fn key_by_kid(&self, kid: &str) -> Option<&Key> {
        self.keys.iter().find(|key| key.kid.as_str() == kid)
    }

    /// Keys in the JWKS, in no particular order.
    pub fn published(&self) -> impl Iterator<Item = &Key> {
        self.keys.iter().filter(|key| key.state.is_published())
    }

    /// What the applications' tokens are signed with: the active key's algorithm, or the last one's.
    pub fn signing_algorithm(&self) -> Option<Algorithm> {
        self.active()
            .or_else(|| self.keys.iter().filter(|key| key.activated_at.is_some()).max_by_key(|key| key.activated_at))
            .map(|key| key.algorithm)
    }

    /// Whether a key of this algorithm may sign without an operator's word: verifiers pin algorithms.
    pub fn algorithm_agreed(&self, algorithm: Algorithm) -> bool {
        self.signing_algorithm().is_none_or(|signing| signing.alg() == algorithm.alg())
            || self.confirmed_algorithm.is_some_and(|confirmed| confirmed.alg() == algorithm.alg())
    }

    /// When everything the key may have signed has expired for every clock (DESIGN §4): its overlap after it stopped
    /// signing. `None` for keys that are not retiring.
    pub fn expires_at(&self, key: &Key) -> Option<Timestamp> {
        if key.state != KeyState::Retiring {
            return None;
        }
        let stopped = key.stopped_at.or(key.demoted_at).unwrap_or(key.entered_at);
        let by_life = (key.activated_at.is_some() || key.private.is_some()).then(|| stopped + self.overlap_of(key));
        by_life.max(key.published_until)
    }

    /// How long this key stays published after it stopped signing.
    pub fn overlap_of(&self, key: &Key) -> Span {
        key.overlap_bound.max(key.ttl_bound + self.policy.overlap_margin())
    }

    /// When a key first published at `published` has been visible for as long as every policy still in force demands.
    pub fn propagated_at(&self, published: Timestamp) -> Timestamp {
        let floors = self.floors.iter().map(|floor| (published + floor.propagation).min(floor.until));
        floors.chain([published + self.policy.rotation.propagation]).max().unwrap_or(published)
    }

    /// When promotions may go on after publication resumed at `resumed`.
    pub fn visible_again_at(&self, resumed: Timestamp) -> Timestamp {
        let floors = self.floors.iter().map(|floor| (resumed + floor.window).min(floor.until));
        floors.chain([resumed + self.policy.visibility_window()]).max().unwrap_or(resumed)
    }

    /// The next generation: this keyring with `change` made to it.
    pub fn after(&self, change: &Change, now: Timestamp) -> Keyring {
        let mut next = self.next(now);
        next.make(change, now);
        next.note_changes(self);
        next.tidy(now);
        next
    }

    /// A copy that counts as the next generation; callers then edit it and `tidy` it.
    pub(super) fn next(&self, now: Timestamp) -> Keyring {
        let mut next = self.clone();
        next.generation += 1;
        next.written_at = now;
        next
    }

    fn make(&mut self, change: &Change, now: Timestamp) {
        match change {
            Change::AdoptPolicy(policy) => self.adopt(policy, now),
            Change::Restart { policy, first } => self.restart(policy, *first, now),
            Change::Observe { published, stopped, seen } => self.observe(published, stopped, seen),
            Change::Add(key) => self.add(key, now),
            Change::AddEnded(key) => self.add_ended(key, now),
            Change::Propagated(serials) => self.move_each(serials, KeyEvent::Propagated, "propagated", now),
            Change::Promote { serial, trigger, unpropagated } => {
                self.promote(*serial, *unpropagated, now);
                if *trigger == Trigger::KeyDisabled {
                    self.disabled_switch_at = Some(now);
                }
                let kid = self.kid_of(*serial);
                let detail = unpropagated.then(|| "signs before it was published for propagation".to_owned());
                self.note(now, "promoted", SYSTEM, Some(trigger.as_str()), kid, detail);
            }
            Change::Withdraw(serials) => {
                self.withdraw(serials, now);
                let kids: Vec<Kid> = serials.iter().flat_map(|&serial| self.kid_of(serial)).collect();
                self.note(now, "withdrawn", SYSTEM, None, kids, None);
            }
            Change::Expire(serials) => self.move_each(serials, KeyEvent::Expired, "retired", now),
            Change::Destroyed(serial) => {
                self.edit(*serial, |key| key.private = None);
                let kid = self.kid_of(*serial);
                self.note(now, "destroyed", SYSTEM, None, kid, None);
            }
            Change::Rebase => {
                for key in &mut self.keys {
                    key.published_at = key.published_at.map(|at| at.min(now));
                    key.seen_at = key.seen_at.map(|at| at.min(now));
                    key.activated_at = key.activated_at.map(|at| at.min(now));
                }
                self.last_promotion_at = self.last_promotion_at.map(|at| at.min(now));
                self.disabled_switch_at = self.disabled_switch_at.map(|at| at.min(now));
                self.note(now, "rebased", SYSTEM, Some("stored times were ahead of the accepted clock"), [], None);
            }
            Change::HoldEnded => {
                self.hold = None;
                self.note(now, "hold-ended", SYSTEM, None, [], None);
            }
        }
    }

    /// Raises bounds before the longer lives become possible; keeps longer waits until they have run out.
    fn adopt(&mut self, policy: &Policy, now: Timestamp) {
        let old = std::mem::replace(&mut self.policy, policy.clone());
        let shorter = policy.rotation.propagation < old.rotation.propagation
            || policy.visibility_window() < old.visibility_window();
        if shorter {
            let floor = Floor {
                propagation: old.rotation.propagation,
                window: old.visibility_window(),
                until: now + old.rotation.propagation,
            };
            // What waits no longer than this in any respect adds nothing.
            self.floors.retain(|other| {
                other.propagation > floor.propagation || other.window > floor.window || other.until > floor.until
            });
            self.floors.push(floor);
        }
        if policy.issuer.probes != old.issuer.probes {
            // What other probes showed says nothing about these.
            self.keys.iter_mut().for_each(|key| key.seen_at = None);
        }
        let (life, overlap) = (policy.tokens.max_ttl, policy.overlap());
        if let Some(active) = self.keys.iter_mut().find(|key| key.state == KeyState::Active) {
            active.ttl_bound = active.ttl_bound.max(life);
            active.overlap_bound = active.overlap_bound.max(overlap).max(active.ttl_bound + policy.overlap_margin());
        }
        self.note(now, "policy-adopted", SYSTEM, None, [], None);
    }

    fn restart(&mut self, policy: &Policy, first: bool, now: Timestamp) {
        self.policy = policy.clone();
        self.first = first;
        self.drained = false;
        self.hold = None;
        self.last_promotion_at = None;
        self.confirmed_algorithm = Some(policy.algorithm);
        self.floors.clear();
        self.note(now, "restarted", SYSTEM, Some("another issuer was configured for the drained keyset"), [], None);
    }

    fn observe(
        &mut self,
        published: &[(Serial, Timestamp)],
        stopped: &[(Serial, Timestamp)],
        seen: &[(Serial, Option<Timestamp>)],
    ) {
        for &(serial, at) in published {
            self.edit(serial, |key| {
                key.published_at.get_or_insert(at);
            });
        }
        for &(serial, at) in stopped {
            self.edit(serial, |key| {
                key.stopped_at.get_or_insert(at);
            });
        }
        for &(serial, at) in seen {
            self.edit(serial, |key| key.seen_at = at);
        }
    }

    fn add(&mut self, new: &NewKey, now: Timestamp) {
        let kid = new.kid.clone();
        self.push(new, KeyState::Pending, Origin::Created, now);
        self.note(now, "created", SYSTEM, None, [kid], None);
    }

    fn add_ended(&mut self, new: &NewKey, now: Timestamp) {
        let kid = new.kid.clone();
        step(self.push(new, KeyState::Pending, Origin::Created, now), KeyEvent::Withdrawn, now);
        self.note(now, "withdrawn", SYSTEM, Some("not wanted any more when it was made"), [kid], None);
    }

    /// Appends a key with the next serial.
    pub(super) fn push(&mut self, new: &NewKey, state: KeyState, origin: Origin, now: Timestamp) -> &mut Key {
        let serial = self.next_serial;
        self.next_serial += 1;
        let since_generation = self.generation;
        self.keys.push(Key {
            serial,
            kid: new.kid.clone(),
            algorithm: new.algorithm,
            public: new.public.clone(),
            private: new.private.clone(),
            origin,
            state,
            entered_at: now,
            created_at: now,
            since_generation,
            published_at: None,
            seen_at: None,
            activated_at: None,
            demoted_at: None,
            stopped_at: None,
            ttl_bound: Span::ZERO,
            overlap_bound: Span::ZERO,
            published_until: None,
            unpropagated: false,
            rolled_back: false,
            revocation: None,
        });
        let last = self.keys.len() - 1;
        &mut self.keys[last]
    }

    /// Makes `serial` the active key and demotes the one that was, in one go.
    pub(super) fn promote(&mut self, serial: Serial, unpropagated: bool, now: Timestamp) {
        for key in &mut self.keys {
            if key.state == KeyState::Active && key.serial != serial {
                step(key, KeyEvent::Demoted, now);
                key.demoted_at = Some(now);
                key.stopped_at = None;
            }
        }
        let (life, overlap, margin) = (self.policy.tokens.max_ttl, self.policy.overlap(), self.policy.overlap_margin());
        self.edit(serial, |key| {
            let event = if key.state == KeyState::Retiring { KeyEvent::Reinstated } else { KeyEvent::Promoted };
            step(key, event, now);
            key.activated_at = Some(now);
            key.demoted_at = None;
            key.stopped_at = None;
            key.ttl_bound = key.ttl_bound.max(life);
            key.overlap_bound = key.overlap_bound.max(overlap).max(key.ttl_bound + margin);
            key.unpropagated |= unpropagated;
        });
        self.last_promotion_at = Some(now);
        if self.confirmed_algorithm.is_some() && self.key(serial).map(|k| k.algorithm) == self.confirmed_algorithm {
            self.confirmed_algorithm = None;
        }
    }

    /// Takes a key out of trust; the caller has chosen who signs instead.
    pub(super) fn revoke(&mut self, serial: Serial, revocation: &Revocation) {
        self.edit(serial, |key| {
            step(key, KeyEvent::Revoked, revocation.at);
            key.revocation = Some(revocation.clone());
        });
    }

    pub(super) fn hold(&mut self, hold: Hold) {
        self.hold = Some(hold);
    }

    pub(super) fn demote_active(&mut self, now: Timestamp) {
        for key in self.keys.iter_mut().filter(|key| key.state == KeyState::Active) {
            step(key, KeyEvent::Demoted, now);
            key.demoted_at = Some(now);
            key.stopped_at = None;
        }
    }

    /// Takes waiting keys out of use. What signed elsewhere before it came here stays published for its tokens.
    pub(super) fn withdraw(&mut self, serials: &[Serial], now: Timestamp) {
        for &serial in serials {
            self.edit(serial, |key| {
                let event = if key.origin == Origin::Imported { KeyEvent::Relieved } else { KeyEvent::Withdrawn };
                step(key, event, now);
            });
        }
    }

    fn move_each(&mut self, serials: &[Serial], event: KeyEvent, action: &str, now: Timestamp) {
        for &serial in serials {
            self.edit(serial, |key| step(key, event, now));
        }
        let kids: Vec<Kid> = serials.iter().flat_map(|&serial| self.kid_of(serial)).collect();
        self.note(now, action, SYSTEM, None, kids, None);
    }

    pub(super) fn edit(&mut self, serial: Serial, edit: impl FnOnce(&mut Key)) {
        if let Some(key) = self.keys.iter_mut().find(|key| key.serial == serial) {
            edit(key);
        }
    }

    fn kid_of(&self, serial: Serial) -> Option<Kid> {
        self.key(serial).map(|key| key.kid.clone())
    }

    /// Writes down what happened, in the same record as the effect.
    pub(super) fn note(
        &mut self,
        at: Timestamp,
        action: &str,
        actor: &str,
        reason: Option<&str>,
        kids: impl IntoIterator<Item = Kid>,
        detail: Option<String>,
    ) {
        self.journal.note(at, action, actor, reason, kids, detail);
    }

    /// Has the entry that came last tell what it did, so that it can be told without the keyring that was.
    pub(super) fn note_changes(&mut self, before: &Keyring) {
        let (generation, changes) = (self.generation, self.changes_since(before));
        if let Some(entry) = self.journal.audit.last_mut().filter(|entry| entry.seq >= before.journal.next_seq) {
            entry.generation = Some(generation);
            entry.changes = changes;
        }
    }

    /// The keys whose state differs from `before`: the one that signs first, then the newest.
    pub fn changes_since(&self, before: &Keyring) -> Vec<KeyChange> {
        let change = |key: &Key| {
            let from = before.key(key.serial).map(|before| before.state);
            (from != Some(key.state)).then(|| KeyChange {
                kid: key.kid.clone(),
                serial: key.serial,
                from,
                to: key.state,
                unpublished_at: self.expires_at(key),
            })
        };
        let mut changes: Vec<KeyChange> = self.keys.iter().filter_map(change).collect();
        changes.sort_by_key(|change| (change.to != KeyState::Active, std::cmp::Reverse(change.serial)));
        changes
    }

    /// Drops what no decision needs any more: passed floors, old answers, the oldest history.
    pub(super) fn tidy(&mut self, now: Timestamp) {
        self.floors.retain(|floor| floor.until > now);
        self.journal.tidy(now);
        self.drop_oldest(KeyState::Retired, HISTORY_KEPT);
        for revoked in self.drop_oldest(KeyState::Revoked, REVOKED_KEPT) {
            let (kid, thumbprint) = (revoked.kid.to_string(), revoked.public.thumbprint().to_string());
            self.banned.extend((thumbprint != kid).then_some(thumbprint));
            self.banned.push(kid);
        }
        // Kids are printable ASCII, of which JSON escapes two characters.
        let size = |text: &String| text.len() + text.matches(['"', '\\']).count() + ENTRY_BYTES;
        let mut bytes: usize = self.banned.iter().map(size).sum();
        let surplus = self.banned.iter().take_while(|text| {
            let over = bytes > BANNED_BYTES;
            bytes -= size(text);
            over
        });
        let surplus = surplus.count();
        self.banned.drain(..surplus);
    }

    /// Takes out the oldest keys that ended so, but for `kept` and those whose private half is still to be destroyed.
    fn drop_oldest(&mut self, state: KeyState, kept: usize) -> Vec<Key> {
        let ended = |key: &Key| key.state == state && key.private.is_none();
        let mut surplus = self.keys.iter().filter(|key| ended(key)).count().saturating_sub(kept);
        let (mut dropped, mut stay) = (Vec::new(), Vec::with_capacity(self.keys.len()));
        for key in std::mem::take(&mut self.keys) {
            if surplus > 0 && ended(&key) {
                surplus -= 1;
                dropped.push(key);
            } else {
                stay.push(key);
            }
        }
        self.keys = stay;
        dropped
    }

    /// Whether something was written before `at` that came after `generation`, as far as keys and journal tell.
    pub fn wrote_after(&self, generation: u64, at: Timestamp) -> bool {
        let key = |key: &Key| key.since_generation > generation && key.created_at < at;
        let entry = |entry: &AuditEntry| entry.generation > Some(generation) && entry.at < at;
        self.keys.iter().any(key) || self.journal.audit.iter().any(entry)
    }

    /// Whether a key with this kid or this public key was revoked here, however long ago.
    pub fn has_revoked(&self, kid: &Kid, public: &PublicJwk) -> bool {
        let listed = self.keys.iter().filter(|key| key.state == KeyState::Revoked);
        let mut listed = listed.map(|key| (&key.kid, &key.public));
        let thumbprint = public.thumbprint();
        listed.any(|(other, key)| other == kid || key == public)
            || self.banned.iter().any(|banned| banned == kid.as_str() || banned == thumbprint.as_str())
    }
}

impl Journal {
    pub fn note(
        &mut self,
        at: Timestamp,
        action: &str,
        actor: &str,
        reason: Option<&str>,
        kids: impl IntoIterator<Item = Kid>,
        detail: Option<String>,
    ) {
        self.audit.push(AuditEntry {
            seq: self.next_seq,
            at,
            action: action.to_owned(),
            actor: actor.to_owned(),
            reason: reason.map(str::to_owned),
            kids: kids.into_iter().collect::<BTreeSet<_>>(),
            detail,
            generation: None,
            changes: Vec::new(),
        });
        self.next_seq += 1;
    }

    pub fn tidy(&mut self, now: Timestamp) {
        let surplus = self.audit.len().saturating_sub(AUDIT_KEPT);
        self.audit.drain(..surplus);
        self.answered.retain(|answered| now < answered.at + IDEMPOTENCY_KEPT);
    }
}

/// What a value takes of a record, at most: indented, inside arrays and objects of the body.
pub(super) fn stored_bytes(value: &impl serde::Serialize) -> usize {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    text.len() + text.matches('\n').count() * ENTRY_BYTES
}

/// Applies the table; a refused event leaves the key as it is (callers choose keys by state, tests prove it).
pub(super) fn step(key: &mut Key, event: KeyEvent, now: Timestamp) {
    if let Transition::To(state) = transition(key.state, event) {
        key.state = state;
        key.entered_at = now;
    }
}
