//! What operators ask for: each request becomes a refusal or the next keyring together with the answer to it.
//! Intent, idempotency key, audit entry and effect are one value, so they are one write.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::change::{IDEMPOTENCY_KEPT, NewKey, Trigger, stored_bytes};
use super::jwk::Kid;
use super::plan::{Blocker, Desired, Facts, emergency_successor, is_held, next_standby};
use super::policy::{Bootstrap, Policy};
use super::record::{Answered, Hold, Journal, Key, KeyState, Keyring, Origin, Revocation, Serial};
use super::time::{Span, Timestamp};

/// Idempotency keys remembered per keyset at one time.
pub const ANSWERED_KEPT: usize = 1000;

/// Bytes that remembered answers may take in a record.
const ANSWERED_BYTES: usize = 3 * 1024 * 1024;

/// What an operator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    Rotate {
        allow_unpropagated: bool,
        confirm_algorithm: Option<Confirmation>,
    },
    Rollback,
    Revoke {
        serial: Serial,
    },
    Compromise,
    Hold {
        until: Option<Timestamp>,
    },
    Resume,
    Drain,
    /// A drained keyset is to sign again.
    Undrain,
    Import(Box<ImportedKey>),
}

/// An operator's word that verifiers can follow a change of algorithm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Confirmation {
    /// Whatever waits.
    Any,
    /// Only this `alg`.
    Alg(String),
}

/// A key from elsewhere, already validated and, if private, sealed by the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedKey {
    pub key: NewKey,
    /// The longest life of tokens it already signed.
    pub ttl_bound: Span,
    /// Since when it has been published elsewhere, by the operator's word.
    pub published_since: Option<Timestamp>,
    /// Public-only keys: until when they stay published.
    pub published_until: Option<Timestamp>,
}

/// An intent with who asked, why and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub intent: Intent,
    pub actor: String,
    pub reason: Option<String>,
    pub dry_run: bool,
    /// `If-Match`: only if the keyring still has one of these generations.
    pub if_generation: Option<Vec<u64>>,
    pub idempotency: Option<Idempotency>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Idempotency {
    pub key: String,
    /// Digest of actor, method, path and body.
    pub fingerprint: String,
}

/// What comes of a request that is not refused.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Answered before under the same Idempotency-Key.
    Replay(Outcome),
    /// Nothing to write: a dry run, or it already is as asked and no Idempotency-Key is to be remembered.
    Answer(Outcome),
    Write {
        next: Box<Keyring>,
        outcome: Outcome,
    },
}

/// The answer to every operator's request (DESIGN §7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Outcome {
    pub action: String,
    pub dry_run: bool,
    /// The generation after the write; the current one where nothing was written.
    pub generation: u64,
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// No verifier that caches as declared can reject a live token because of this.
    pub safe: bool,
    /// The key that signs now was not published for `propagation`.
    pub unpropagated: bool,
    pub changes: Vec<KeyChange>,
    pub verifiers: Vec<VerifierOutlook>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub next_standby_at: Option<Timestamp>,
    pub warnings: Vec<String>,
    pub exposure: Option<Exposure>,
    /// Verifiers that keep a removed key until they are restarted.
    pub restart_verifiers: Vec<String>,
    /// Of a revocation: other replicas that may use the key for longer than `exposure` counts, because they do not hear of
    /// it. Null where that could not be found out, and in answers that an earlier release gave.
    #[serde(default)]
    pub unconfirmed_replicas: Option<Vec<UnconfirmedReplica>>,
}

/// A replica that was silent for longer than its store waits for any, or lacks for longer than that what was written. One
/// that stopped in good order is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct UnconfirmedReplica {
    pub name: String,
    /// When it reported last. It may have crashed then.
    #[schema(value_type = String, format = DateTime)]
    pub last_seen_at: Timestamp,
    /// Whether it serves verifiers.
    pub publishes: bool,
    /// Of the keyring that it showed then; null where it showed none.
    pub generation: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct KeyChange {
    #[schema(value_type = String)]
    pub kid: Kid,
    pub serial: Serial,
    /// Absent for a key that joins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub from: Option<KeyState>,
    #[schema(value_type = String)]
    pub to: KeyState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub unpublished_at: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VerifierOutlook {
    pub name: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub sees_new_key_by: Option<Timestamp>,
    pub ok: bool,
}

/// How long a revoked key may still be accepted somewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Exposure {
    /// When the last declared cache that forgets by itself has forgotten the key: the issuer's own, and declared verifiers
    /// behind them. Null only in answers that an earlier release gave.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub until: Option<Timestamp>,
    /// Verifiers that forget only at a restart.
    pub unbounded: Vec<String>,
}

impl Exposure {
    /// Of keys that are revoked at `at` under `policy`.
    pub fn of(policy: &Policy, at: Timestamp) -> Exposure {
        let caches = policy.issuer.cache_span() + policy.rotation.publish_lag + policy.rotation.clock_skew;
        let bounded = policy.rotation.verifiers.iter().filter_map(|verifier| verifier.keeps_old);
        let slowest = bounded.max().unwrap_or(Span::ZERO);
        let unbounded = policy.rotation.verifiers.iter().filter(|verifier| verifier.keeps_old.is_none());
        Exposure {
            until: Some(at + caches + slowest),
            unbounded: unbounded.map(|verifier| verifier.name.clone()).collect(),
        }
    }
}

/// Why a request is not carried out. Nothing was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the generation is {current} now: read again and decide again")]
    GenerationMismatch { current: u64 },
    #[error("this Idempotency-Key was used for another request within the last 24 hours: use a new one")]
    IdempotencyKeyReused,
    #[error("no standby key may sign yet{}", next_standby_at.map(|at| format!(": the next one may at {at}, or use allow_unpropagated")).unwrap_or_default())]
    NoStandby { next_standby_at: Option<Timestamp> },
    #[error(
        "the waiting keys are {waiting}, tokens are signed with {signing}, and many verifiers pin algorithms: rotate with confirm_algorithm = \"{waiting}\" once every verifier accepts it"
    )]
    AlgorithmUnconfirmed { waiting: String, signing: String },
    #[error("confirm_algorithm is {asked}, but the waiting keys are {waiting}")]
    AlgorithmMismatch { asked: String, waiting: String },
    #[error("the issuer's JWKS would hold more than 10 keys: wait until a retiring key has left, or lower successors")]
    JwksFull { next_standby_at: Option<Timestamp> },
    #[error(
        "the keyset is drained: it signs no more; remove it from the configuration, give it another issuer, or let it sign again: `jwksd drain --undo`"
    )]
    Drained,
    #[error(
        "the configuration of this keyset does not fit its keyring, so nothing is promoted: mend the configuration"
    )]
    Degraded,
    #[error("the keyset is not in the configuration: add it again, or drain it")]
    Absent,
    #[error("the clock cannot be trusted now: correct it, or accept it: `jwksd clock accept`")]
    ClockFrozen,
    #[error("there is nothing to roll back to: {reason}")]
    NothingToRollBack { reason: &'static str },
    #[error("the keyset has no key {key}")]
    UnknownKey { key: String },
    #[error("the key is already retired: no verifier was told to trust it any more")]
    AlreadyRetired,
    #[error("`until` is {until}, which has passed")]
    HoldInThePast { until: Timestamp },
    #[error("the key cannot be imported: {reason}")]
    ImportRefused { reason: String },
    #[error("the keyset already has the key {kid}")]
    AlreadyImported { kid: Kid },
}

/// Decides a request. A dry run decides alike and writes nothing.
pub fn decide(keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Decision, Refusal> {
    if let Some(answer) = replay(keyring, facts, request)? {
        return Ok(Decision::Replay(answer));
    }
    if let Some(expected) = &request.if_generation
        && !expected.contains(&keyring.generation)
    {
        return Err(Refusal::GenerationMismatch { current: keyring.generation });
    }
    let mut draft = Draft { before: keyring, facts, request, next: keyring.next(facts.now), warnings: Vec::new() };
    match draft.carry_out()? {
        // It already is as asked; only the Idempotency-Key has to be remembered.
        Effect::None if request.dry_run || request.idempotency.is_none() => {
            Ok(Decision::Answer(draft.outcome(keyring)))
        }
        Effect::Change if request.dry_run => {
            let mut outcome = draft.outcome(&draft.next);
            outcome.generation = keyring.generation;
            Ok(Decision::Answer(outcome))
        }
        Effect::None | Effect::Change => {
            let outcome = draft.outcome(&draft.next);
            draft.remember(&outcome);
            draft.next.tidy(facts.now);
            Ok(Decision::Write { next: Box::new(draft.next), outcome })
        }
    }
}

fn replay(keyring: &Keyring, facts: &Facts<'_>, request: &Request) -> Result<Option<Outcome>, Refusal> {
    let answer = keyring.journal.replay(request.idempotency.as_ref(), facts.now)?;
    Ok(answer.and_then(|answer| serde_json::from_value(answer.clone()).ok()))
}

impl Journal {
    /// The answer that a call with this Idempotency-Key got.
    ///
    /// # Errors
    /// [`Refusal::IdempotencyKeyReused`] if that was another call.
    pub fn replay(&self, idempotency: Option<&Idempotency>, now: Timestamp) -> Result<Option<&Value>, Refusal> {
        let Some(idempotency) = idempotency else { return Ok(None) };
        let fresh = |answered: &&Answered| now < answered.at + IDEMPOTENCY_KEPT;
        match self.answered.iter().filter(fresh).find(|answered| answered.key == idempotency.key) {
            None => Ok(None),
            Some(answered) if answered.fingerprint != idempotency.fingerprint => Err(Refusal::IdempotencyKeyReused),
            Some(answered) => Ok(Some(&answered.answer)),
        }
    }

    /// Keeps an answer for calls that repeat the Idempotency-Key.
    pub fn remember(&mut self, idempotency: Option<&Idempotency>, answer: Value, now: Timestamp) {
        let Some(idempotency) = idempotency else { return };
        self.tidy(now);
        self.answered.push(Answered {
            key: idempotency.key.clone(),
            fingerprint: idempotency.fingerprint.clone(),
            at: now,
            answer,
        });
        // Nobody makes so many calls by hand; the oldest answers give way.
        let mut bytes = 0;
        let fitting = self.answered.iter().rev().take(ANSWERED_KEPT).take_while(|answered| {
            bytes += stored_bytes(answered);
            bytes <= ANSWERED_BYTES
        });
        let surplus = self.answered.len() - fitting.count();
        self.answered.drain(..surplus);
    }
}

enum Effect {
    None,
    Change,
}

struct Draft<'a> {
    before: &'a Keyring,
    facts: &'a Facts<'a>,
    request: &'a Request,
    next: Keyring,
    warnings: Vec<String>,
}

impl Draft<'_> {
    fn carry_out(&mut self) -> Result<Effect, Refusal> {
        match &self.request.intent {
            Intent::Rotate { allow_unpropagated, confirm_algorithm } => {
                self.rotate(*allow_unpropagated, confirm_algorithm.as_ref())
            }
            Intent::Rollback => self.roll_back(),
            Intent::Revoke { serial } => self.revoke(*serial),
            Intent::Compromise => self.compromise(),
            Intent::Hold { until } => self.hold(*until),
            Intent::Resume => self.resume(),
            Intent::Drain => self.drain(),
            Intent::Undrain => self.undrain(),
            Intent::Import(imported) => self.import(imported),
        }
    }

    fn rotate(&mut self, allow_unpropagated: bool, confirm: Option<&Confirmation>) -> Result<Effect, Refusal> {
        self.refuse_promotions(allow_unpropagated)?;
        self.confirm(confirm)?;
        let now = self.facts.now;
        let standby = next_standby(&self.next, self.facts);
        let (serial, unpropagated) = match standby {
            Some((serial, ready)) if ready <= now => (serial, false),
            _ if allow_unpropagated => {
                let waiting = |key: &&Key| {
                    matches!(key.state, KeyState::Standby | KeyState::Pending)
                        && key.private.is_some()
                        && (key.published_at.is_some() || self.facts.published.contains_key(&key.serial))
                        && self.next.algorithm_agreed(key.algorithm)
                };
                let oldest =
                    self.next.keys.iter().filter(waiting).min_by_key(|k| (k.state != KeyState::Standby, k.serial));
                (oldest.ok_or_else(|| self.no_standby(standby))?.serial, true)
            }
            _ => return Err(self.no_standby(standby)),
        };
        self.next.promote(serial, unpropagated, now);
        if is_held(self.before.hold.as_ref(), now) {
            self.warnings.push("the hold stays in force: the schedule promotes nothing until it is resumed".to_owned());
        }
        self.note(Trigger::Operator.as_str(), "rotate", unpropagated.then_some("unpropagated"));
        Ok(Effect::Change)
    }

    fn refuse_promotions(&self, allow_unpropagated: bool) -> Result<(), Refusal> {
        let next_standby_at = self.next_standby_at();
        match self.facts.desired {
            _ if self.before.drained => Err(Refusal::Drained),
            Desired::Degraded => Err(Refusal::Degraded),
            Desired::Absent => Err(Refusal::Absent),
            Desired::Policy(_) if self.facts.clock_frozen && !allow_unpropagated => Err(Refusal::ClockFrozen),
            Desired::Policy(_) if self.facts.room == 0 => Err(Refusal::JwksFull { next_standby_at }),
            Desired::Policy(_) => Ok(()),
        }
    }

    /// Takes the operator's word for the algorithm of the keys that wait.
    fn confirm(&mut self, confirm: Option<&Confirmation>) -> Result<(), Refusal> {
        let waits = |key: &&Key| matches!(key.state, KeyState::Standby | KeyState::Pending) && key.private.is_some();
        let wanted = self.next.policy.algorithm;
        let changed = self.next.keys.iter().filter(waits).any(|key| key.algorithm == wanted)
            && !self.next.algorithm_agreed(wanted);
        let waiting = wanted.alg().to_owned();
        match confirm {
            Some(Confirmation::Alg(asked)) if *asked != waiting => {
                Err(Refusal::AlgorithmMismatch { asked: asked.clone(), waiting })
            }
            Some(_) if changed => {
                self.next.confirmed_algorithm = Some(wanted);
                Ok(())
            }
            None if changed => {
                let signing = self.next.signing_algorithm().map(|a| a.alg().to_owned()).unwrap_or_default();
                Err(Refusal::AlgorithmUnconfirmed { waiting, signing })
            }
            _ => Ok(()),
        }
    }

    fn no_standby(&self, standby: Option<(Serial, Timestamp)>) -> Refusal {
        Refusal::NoStandby { next_standby_at: standby.map(|(_, at)| at.max(self.facts.now)) }
    }

    fn roll_back(&mut self) -> Result<Effect, Refusal> {
        let refuse = |reason| Err(Refusal::NothingToRollBack { reason });
        if self.before.drained {
            return Err(Refusal::Drained);
        }
        let Some(active) = self.before.active() else { return refuse("no key is active") };
        let demoted = self.before.keys.iter().filter(|key| key.demoted_at.is_some()).max_by_key(|key| key.demoted_at);
        let Some(former) = demoted else { return refuse("no key was demoted yet") };
        match former.state {
            KeyState::Revoked => return refuse("the most recently demoted key is revoked"),
            KeyState::Retiring if former.private.is_some() => {}
            _ => return refuse("the most recently demoted key has retired"),
        }
        let (now, from, to) = (self.facts.now, active.serial, former.serial);
        self.next.promote(to, false, now);
        // The mark is the operator's last word on a key, so that rolling back twice takes the first one back.
        self.next.edit(from, |key| key.rolled_back = true);
        self.next.edit(to, |key| key.rolled_back = false);
        let reason = self.request.reason.clone().unwrap_or_else(|| "rolled back".to_owned());
        self.next.hold(Hold { reason, until: None, actor: self.request.actor.clone(), since: now });
        self.warnings.push("a hold is set: the schedule promotes nothing until it is resumed".to_owned());
        self.note(Trigger::Rollback.as_str(), "rollback", None);
        Ok(Effect::Change)
    }

    fn revoke(&mut self, serial: Serial) -> Result<Effect, Refusal> {
        let key = self.before.key(serial).ok_or_else(|| Refusal::UnknownKey { key: serial.to_string() })?;
        match key.state {
            KeyState::Retired => return Err(Refusal::AlreadyRetired),
            KeyState::Revoked => return Ok(Effect::None),
            _ => {}
        }
        let was_active = key.state == KeyState::Active;
        let revocation = self.revocation();
        self.next.revoke(serial, &revocation);
        let mut unpropagated = false;
        if was_active {
            unpropagated = self.succeed();
        }
        self.note("revocation", "revoke", unpropagated.then_some("unpropagated"));
        Ok(Effect::Change)
    }

    /// Puts the next key in order in place of a revoked one; says whether it is unpropagated.
    fn succeed(&mut self) -> bool {
        let Some((successor, unpropagated)) = emergency_successor(&self.next, self.facts) else {
            self.warnings.push(
                "no published key is left: signing answers 503 until a new key is created and published, at once"
                    .to_owned(),
            );
            return false;
        };
        self.next.promote(successor, unpropagated, self.facts.now);
        unpropagated
    }

    fn compromise(&mut self) -> Result<Effect, Refusal> {
        let revocation = self.revocation();
        let published: Vec<Serial> = self.before.published().map(|key| key.serial).collect();
        if published.is_empty() {
            return Ok(Effect::None);
        }
        for serial in published {
            self.next.revoke(serial, &revocation);
        }
        self.warnings.push("every key is revoked: signing answers 503 until a new key is created and published, at once; no verifier has seen it".to_owned());
        self.note(Trigger::Compromise.as_str(), "compromise", None);
        Ok(Effect::Change)
    }

    fn hold(&mut self, until: Option<Timestamp>) -> Result<Effect, Refusal> {
        if let Some(until) = until
            && until <= self.facts.now
        {
            return Err(Refusal::HoldInThePast { until });
        }
        let reason = self.request.reason.clone().unwrap_or_default();
        self.next.hold(Hold { reason, until, actor: self.request.actor.clone(), since: self.facts.now });
        self.note("", "hold", None);
        Ok(Effect::Change)
    }

    fn resume(&mut self) -> Result<Effect, Refusal> {
        if self.before.hold.is_none() {
            return Ok(Effect::None);
        }
        self.next.hold = None;
        self.note("", "resume", None);
        Ok(Effect::Change)
    }

    fn drain(&mut self) -> Result<Effect, Refusal> {
        if self.before.drained {
            return Ok(Effect::None);
        }
        let now = self.facts.now;
        self.next.drained = true;
        self.next.hold = None;
        self.next.demote_active(now);
        let unused = |key: &&Key| matches!(key.state, KeyState::Pending | KeyState::Standby);
        let serials: Vec<Serial> = self.next.keys.iter().filter(unused).map(|key| key.serial).collect();
        self.next.withdraw(&serials, now);
        if self.facts.desired != Desired::Absent {
            self.warnings.push("the keyset is still in the configuration: remove it, or it raises an alarm".to_owned());
        }
        self.note("", "drain", None);
        Ok(Effect::Change)
    }

    /// The key that signed last signs again while verifiers still have it. Otherwise new keys are made, and the first of
    /// them waits as in a keyset that joins an issuer which verifiers know.
    fn undrain(&mut self) -> Result<Effect, Refusal> {
        if !self.before.drained {
            return Ok(Effect::None);
        }
        match self.facts.desired {
            Desired::Absent => return Err(Refusal::Absent),
            Desired::Degraded => return Err(Refusal::Degraded),
            Desired::Policy(_) => {}
        }
        self.next.drained = false;
        match emergency_successor(&self.next, self.facts) {
            Some((serial, false)) => self.next.promote(serial, false, self.facts.now),
            _ => {
                self.next.first = false;
                self.next.last_promotion_at = None;
                self.warnings.push(match self.next.policy.rotation.bootstrap {
                    Bootstrap::Wait => "no key that verifiers know is left: signing answers 503 until a new one was published for propagation".to_owned(),
                    Bootstrap::Immediate => "no key that verifiers know is left: a new one signs at once, by bootstrap = \"immediate\"".to_owned(),
                });
            }
        }
        self.note("", "undrain", None);
        Ok(Effect::Change)
    }

    fn import(&mut self, imported: &ImportedKey) -> Result<Effect, Refusal> {
        let refuse = |reason: String| Err(Refusal::ImportRefused { reason });
        let same = |key: &&Key| key.kid == imported.key.kid || key.public == imported.key.public;
        let banned = self.before.has_revoked(&imported.key.kid, &imported.key.public);
        if banned || self.before.keys.iter().any(|key| same(&key)) {
            return Err(Refusal::AlreadyImported { kid: imported.key.kid.clone() });
        }
        if self.before.drained {
            return Err(Refusal::Drained);
        }
        if self.facts.room == 0 {
            return Err(Refusal::JwksFull { next_standby_at: self.next_standby_at() });
        }
        let now = self.facts.now;
        if let Some(since) = imported.published_since.filter(|since| *since > now) {
            return refuse(format!("`published_since` is {since}, which is yet to come; it is {now}"));
        }
        if imported.key.private.is_none() {
            let Some(until) = imported.published_until.filter(|until| *until > now) else {
                return refuse("a public key is published until a stated time in the future: give `until`, the time when the last token it signed has expired".to_owned());
            };
            let key = self.next.push(&imported.key, KeyState::Retiring, Origin::Imported, now);
            key.published_until = Some(until);
            key.ttl_bound = imported.ttl_bound;
            key.published_at = imported.published_since;
        } else {
            let wanted = self.next.policy.algorithm.alg();
            if imported.key.algorithm.alg() != wanted {
                return refuse(format!("it is {}, the keyset signs with {wanted}", imported.key.algorithm.alg()));
            }
            let margin = self.next.policy.overlap_margin();
            let key = self.next.push(&imported.key, KeyState::Standby, Origin::Imported, now);
            key.ttl_bound = imported.ttl_bound;
            key.overlap_bound = imported.ttl_bound + margin;
            key.published_at = imported.published_since;
            let serial = key.serial;
            if self.before.active().is_none() {
                let unpropagated = imported.published_since.is_none();
                self.next.promote(serial, unpropagated, now);
            }
        }
        self.note("", "import", None);
        Ok(Effect::Change)
    }

    fn revocation(&self) -> Revocation {
        Revocation {
            reason: self.request.reason.clone().unwrap_or_default(),
            actor: self.request.actor.clone(),
            at: self.facts.now,
        }
    }

    fn note(&mut self, trigger: &str, action: &str, detail: Option<&str>) {
        let kids = self.next.changes_since(self.before).into_iter().map(|change| change.kid);
        let kids: Vec<Kid> = kids.collect();
        let detail = detail.map(|detail| format!("{trigger} {detail}").trim().to_owned());
        let request = self.request;
        self.next.note(self.facts.now, action, &request.actor, request.reason.as_deref(), kids, detail);
        self.next.note_changes(self.before);
    }

    fn remember(&mut self, outcome: &Outcome) {
        let answer = serde_json::to_value(outcome).unwrap_or_default();
        self.next.journal.remember(self.request.idempotency.as_ref(), answer, self.facts.now);
    }

    fn next_standby_at(&self) -> Option<Timestamp> {
        next_standby(&self.next, self.facts).map(|(_, at)| at.max(self.facts.now))
    }

    fn outcome(&self, next: &Keyring) -> Outcome {
        let changes = next.changes_since(self.before);
        let promoted = changes.iter().find(|change| change.to == KeyState::Active);
        let promoted = promoted.and_then(|change| next.key(change.serial));
        let verifiers = promoted.map(|key| self.verifiers(next, key)).unwrap_or_default();
        let unpropagated = promoted.is_some_and(|key| {
            key.unpropagated && self.before.key(key.serial).is_none_or(|before| before.activated_at.is_none())
        });
        let revokes = matches!(self.request.intent, Intent::Revoke { .. } | Intent::Compromise);
        let exposure = revokes.then(|| Exposure::of(&self.before.policy, self.facts.now));
        let leaves_none = self.before.active().is_some() && next.active().is_none() && !next.drained;
        let mut warnings = self.warnings.clone();
        if verifiers.is_empty() && promoted.is_some() && next.policy.rotation.verifiers.is_empty() {
            warnings.push("no verifiers are declared: declare them to learn what each has seen".to_owned());
        }
        if revokes && self.before.policy.rotation.verifiers.is_empty() {
            warnings.push(
                "no verifiers are declared: exposure covers the issuer's caches alone, and a verifier that caches keys itself may accept the key for longer".to_owned(),
            );
        }
        Outcome {
            action: self.action().to_owned(),
            dry_run: self.request.dry_run,
            generation: next.generation,
            at: self.facts.now,
            safe: !unpropagated && !leaves_none && verifiers.iter().all(|verifier| verifier.ok),
            unpropagated,
            restart_verifiers: exposure.as_ref().map(|e| e.unbounded.clone()).unwrap_or_default(),
            changes,
            verifiers,
            next_standby_at: next_standby(next, self.facts).map(|(_, at)| at.max(self.facts.now)),
            warnings,
            exposure,
            unconfirmed_replicas: if revokes { self.facts.unconfirmed.clone() } else { Some(Vec::new()) },
        }
    }

    fn verifiers(&self, next: &Keyring, promoted: &Key) -> Vec<VerifierOutlook> {
        let caches = next.policy.issuer.cache_span();
        let outlook = |verifier: &super::policy::Verifier| {
            let by = promoted.published_at.map(|published| published + caches + verifier.sees_new);
            VerifierOutlook {
                name: verifier.name.clone(),
                sees_new_key_by: by,
                ok: by.is_some_and(|by| by <= self.facts.now),
            }
        };
        next.policy.rotation.verifiers.iter().map(outlook).collect()
    }

    fn action(&self) -> &'static str {
        match self.request.intent {
            Intent::Rotate { .. } => "rotate",
            Intent::Rollback => "rollback",
            Intent::Revoke { .. } => "revoke",
            Intent::Compromise => "compromise",
            Intent::Hold { .. } => "hold",
            Intent::Resume => "resume",
            Intent::Drain => "drain",
            Intent::Undrain => "undrain",
            Intent::Import(_) => "import",
        }
    }
}

/// The names of what blocks, for answers.
pub fn blocker_names(blockers: &[Blocker]) -> Vec<&'static str> {
    blockers.iter().map(|blocker| blocker.as_str()).collect()
}
