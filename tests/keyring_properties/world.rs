//! One keyset without engine, store or backend: facts made up by the test, steps carried out at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::change::{Change, NewKey};
use jwksd::keyring::decide::{Decision, Idempotency, ImportedKey, Intent, Outcome, Refusal, Request, decide};
use jwksd::keyring::jwk::{EcCurve, Kid, PublicJwk};
use jwksd::keyring::name::Name;
use jwksd::keyring::plan::{Desired, Facts, Plan, Seen, SlowStep, Step, plan};
use jwksd::keyring::policy::{Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::record::{Key, KeyState, Keyring, PrivateHandle, Serial};
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timing::{self, Severity};

use crate::policy::policy as hourly;
use crate::promises::{Cause, Promises};

/// Steps that any situation may need at one instant; far below what an endless loop takes.
const STEPS_MAX: usize = 100;

pub const START: Timestamp = Timestamp::from_secs(1_800_000_000);

/// What the configuration says.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    Policy(Box<Policy>),
    Degraded,
    Absent,
}

/// What a probe gets to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// What is published.
    Shows,
    /// A document without waiting keys.
    Misses,
    /// Nothing.
    Fails,
}

/// A keyset with everything around it.
pub struct World {
    pub now: Timestamp,
    /// The latest time given out since somebody vouched for the clock.
    latest: Timestamp,
    pub keyring: Keyring,
    pub wanted: Wanted,
    pub frozen: bool,
    /// The public listener answers.
    pub open: bool,
    pub resumed_at: Option<Timestamp>,
    pub removals_not_before: Timestamp,
    /// Keys of other keysets in the same JWKS.
    pub neighbours: u32,
    pub creation_works: bool,
    pub destruction_works: bool,
    pub published: BTreeMap<Serial, Timestamp>,
    /// When each key stopped, and the latest time given out until then.
    stopped: BTreeMap<Serial, (Timestamp, Timestamp)>,
    backoff: BTreeMap<SlowStep, Timestamp>,
    /// What happens when the issuer's probe is sampled, as it is at every look.
    pub probe: Probe,
    seen: BTreeMap<Serial, Seen>,
    /// The last time the probe got an answer.
    sampled: Timestamp,
    pub wake: Option<Timestamp>,
    pub promises: Promises,
    /// Every write, newest last: what it was.
    pub history: Vec<String>,
}

impl World {
    /// An issuer that never published anything, with the daemon open to verifiers.
    pub fn first(policy: Policy) -> World {
        World::new(policy, true)
    }

    /// A keyset that joins an issuer which verifiers know already.
    pub fn later(policy: Policy) -> World {
        World::new(policy, false)
    }

    fn new(policy: Policy, first: bool) -> World {
        let keyring = Keyring::new(Name::parse("default").unwrap(), "lineage".to_owned(), policy.clone(), first, START);
        World {
            now: START,
            latest: START,
            promises: Promises::new(),
            keyring,
            wanted: Wanted::Policy(Box::new(policy)),
            frozen: false,
            open: true,
            resumed_at: None,
            removals_not_before: Timestamp::EPOCH,
            neighbours: 0,
            creation_works: true,
            destruction_works: true,
            published: BTreeMap::new(),
            stopped: BTreeMap::new(),
            backoff: BTreeMap::new(),
            probe: Probe::Shows,
            seen: BTreeMap::new(),
            sampled: START,
            wake: None,
            history: Vec::new(),
        }
    }

    /// Does what there is to do at this instant.
    pub fn settle(&mut self) -> &mut Self {
        for _ in 0..STEPS_MAX {
            self.see();
            let planned = self.plan();
            let Some(step) = planned.step else {
                self.wake = planned.wake;
                if let Some(wake) = planned.wake {
                    assert!(wake > self.now, "the planner wants to wake at {wake}, but it is {}", self.now);
                }
                return self;
            };
            self.carry_out(step);
        }
        panic!("no rest after {STEPS_MAX} steps at one instant:\n{}", self.story());
    }

    /// Time passes, with a look whenever the planner asked for one.
    pub fn pass(&mut self, span: Span) -> &mut Self {
        let until = self.now + span;
        self.settle();
        // Cron-like swarms of wakes cannot occur: each wake does something or moves on.
        let mut looks = 0;
        while let Some(wake) = self.wake.filter(|wake| *wake <= until) {
            self.check_nothing_is_missed(wake);
            self.now = wake;
            self.promises.time_is(self.now, &self.keyring);
            let before = self.keyring.generation;
            self.settle();
            let happened = self.keyring.generation > before || self.blocked();
            assert!(happened, "nothing happened at the wake time {wake} and nothing says why\n{}", self.story());
            looks += 1;
            if looks > 60 {
                break; // Years at a period of minutes: the rest is missed on purpose, as in a downtime.
            }
        }
        self.now = until;
        self.promises.time_is(self.now, &self.keyring);
        self.settle()
    }

    /// Time passes while nobody looks.
    pub fn sleep(&mut self, span: Span) -> &mut Self {
        self.now = self.now + span;
        self.promises.time_is(self.now, &self.keyring);
        self
    }

    /// The clock is set back by less than the guard minds.
    pub fn set_back(&mut self, span: Span) -> &mut Self {
        self.look();
        self.now = self.now - span;
        self.promises.time_is(self.now, &self.keyring);
        self
    }

    /// The clock is set back, and somebody vouches for it: what waits for time waits once more, as the engine has it.
    pub fn set_back_and_accept(&mut self, span: Span) -> &mut Self {
        self.now = self.now - span;
        self.latest = self.now;
        let published = self.keyring.published().map(|key| self.keyring.overlap_of(key));
        let longest = published.chain([self.keyring.policy.overlap()]).max().unwrap();
        self.removals_not_before = self.now + longest;
        self.resumed_at = Some(self.now);
        self.promises.silence_ended(self.now);
        self.promises.clock_accepted(self.now, &self.keyring);
        self
    }

    /// The clock is read, as for every signature.
    fn look(&mut self) {
        self.latest = self.latest.max(self.now);
    }

    /// A restart after `downtime` in which nothing was published.
    pub fn restart(&mut self, downtime: Span) -> &mut Self {
        self.promises.unsampled();
        self.now = self.now + downtime;
        self.promises.time_is(self.now, &self.keyring);
        let recorded = self.keyring.keys.iter().filter_map(|key| Some((key.serial, key.seen_at?)));
        self.seen = recorded
            .map(|(serial, since)| {
                (serial, Seen { since: since + self.now.since(self.sampled), until: Some(self.now) })
            })
            .collect();
        self.published.clear();
        self.stopped.clear();
        self.backoff.clear();
        if downtime > self.keyring.policy.issuer.max_age {
            self.resumed_at = Some(self.now);
            self.promises.silence_ended(self.now);
        }
        self
    }

    pub fn want(&mut self, policy: Policy) -> &mut Self {
        if policy.issuer.probes != self.keyring.policy.issuer.probes {
            self.seen.clear();
            self.promises.other_probes();
        }
        self.wanted = Wanted::Policy(Box::new(policy));
        self
    }

    pub fn ask(&mut self, intent: Intent) -> Result<Outcome, Refusal> {
        self.request(&request(intent))
    }

    pub fn request(&mut self, request: &Request) -> Result<Outcome, Refusal> {
        self.see();
        let facts = self.facts();
        let decision = decide(&self.keyring, &facts, request)?;
        match decision {
            Decision::Replay(outcome) | Decision::Answer(outcome) => Ok(outcome),
            Decision::Write { next, outcome } => {
                assert!(!request.dry_run, "a dry run was written");
                assert_eq!(outcome.generation, next.generation);
                self.take(*next, &Cause::Operator(request.intent.clone()));
                Ok(outcome)
            }
        }
    }

    pub fn plan(&self) -> Plan {
        plan(&self.keyring, &self.facts())
    }

    pub fn facts(&self) -> Facts<'_> {
        let keys = u32::try_from(self.keyring.published().count()).unwrap();
        Facts {
            unconfirmed: Some(Vec::new()),
            now: self.now,
            clock_frozen: self.frozen,
            removals_not_before: self.removals_not_before,
            desired: match &self.wanted {
                Wanted::Policy(policy) => Desired::Policy(policy),
                Wanted::Degraded => Desired::Degraded,
                Wanted::Absent => Desired::Absent,
            },
            published: self.published.clone(),
            stopped: self
                .stopped
                .iter()
                .map(|(serial, (at, latest))| (*serial, (*at).max(*latest.min(&self.latest))))
                .collect(),
            resumed_at: self.resumed_at,
            seen: self.seen.clone(),
            contested: BTreeSet::new(),
            issuer_served: false,
            lagging: BTreeMap::new(),
            room: 10u32.saturating_sub(keys + self.neighbours),
            backoff: self.backoff.clone(),
        }
    }

    /// What the engine notes after each swap.
    fn see(&mut self) {
        let now = self.now;
        self.published.retain(|serial, _| self.keyring.key(*serial).is_some_and(|key| key.state.is_published()));
        if self.open {
            for key in self.keyring.published() {
                self.published.entry(key.serial).or_insert(now);
                self.promises.published(key.serial, now);
            }
        }
        let retiring = |key: &Key| key.state == KeyState::Retiring && key.stopped_at.is_none();
        self.stopped.retain(|serial, _| self.keyring.key(*serial).is_some_and(retiring));
        self.sample();
        self.look();
        for key in self.keyring.keys.iter().filter(|key| retiring(key)) {
            self.stopped.entry(key.serial).or_insert((now, self.latest));
        }
    }

    /// The probe looks at every waiting key.
    fn sample(&mut self) {
        let now = self.now;
        if self.probe != Probe::Fails {
            self.sampled = now;
        }
        let waiting = |key: &&Key| matches!(key.state, KeyState::Pending | KeyState::Standby);
        let waiting: Vec<Serial> = self.keyring.keys.iter().filter(waiting).map(|key| key.serial).collect();
        self.seen.retain(|serial, _| waiting.contains(serial));
        for serial in waiting {
            self.promises.sampled(serial, self.probe, now);
            match self.probe {
                Probe::Misses => drop(self.seen.remove(&serial)),
                Probe::Fails => {
                    if let Some(seen) = self.seen.get_mut(&serial) {
                        seen.until.get_or_insert(now);
                    }
                }
                Probe::Shows if self.published.contains_key(&serial) => {
                    let seen = self.seen.entry(serial).or_insert(Seen { since: now, until: None });
                    if let Some(until) = seen.until.take() {
                        seen.since = seen.since + now.since(until);
                    }
                }
                Probe::Shows => {}
            }
        }
    }

    fn carry_out(&mut self, step: Step) {
        match step {
            Step::Write(change) => self.write(&change),
            Step::Create { serial, algorithm } if self.creation_works => {
                self.write(&Change::Add(Box::new(new_key(serial, algorithm))));
            }
            Step::Create { serial, .. } => {
                self.backoff.insert(SlowStep::Create { serial }, self.now + Span::from_secs(5));
            }
            Step::Destroy { serial } if self.destruction_works => self.write(&Change::Destroyed(serial)),
            Step::Destroy { serial } => {
                self.backoff.insert(SlowStep::Destroy { serial }, self.now + Span::from_secs(5));
            }
        }
    }

    fn write(&mut self, change: &Change) {
        let next = self.keyring.after(change, self.now);
        self.take(next, &Cause::Planned(change.clone()));
    }

    fn take(&mut self, next: Keyring, cause: &Cause) {
        let told = match cause {
            Cause::Planned(Change::Add(key)) => format!("{} add {}", self.now, key.kid),
            Cause::Planned(Change::AdoptPolicy(_)) => format!("{} adopt policy", self.now),
            Cause::Planned(change) => format!("{} {change:?}", self.now),
            Cause::Operator(intent) => format!("{} operator: {intent:?}", self.now),
        };
        self.history.push(told);
        let mut promises = std::mem::take(&mut self.promises);
        let verdict = promises.write(&self.keyring, &next, cause, &self.facts());
        self.promises = promises;
        if let Err(broken) = verdict {
            panic!("{broken}\n{}\nbefore: {:#?}", self.story(), keys(&self.keyring));
        }
        self.keyring = next;
        // Steps whose key exists are no longer backed off.
        self.backoff.retain(|step, _| match step {
            SlowStep::Create { serial } => *serial >= self.keyring.next_serial,
            SlowStep::Destroy { serial } => self.keyring.key(*serial).is_some_and(|key| key.private.is_some()),
        });
    }

    /// Between two looks nothing may become due: the planner would have missed it.
    fn check_nothing_is_missed(&mut self, wake: Timestamp) {
        let (now, gap) = (self.now, wake.since(self.now).as_millis());
        for between in [now + Span::from_millis(gap / 2), wake - Span::from_millis(1)] {
            if between <= now {
                continue;
            }
            self.now = between;
            let early = self.plan().step;
            self.now = now;
            assert_eq!(early, None, "due at {between} already, but the planner sleeps until {wake}\n{}", self.story());
        }
    }

    fn blocked(&self) -> bool {
        let facts = self.facts();
        !jwksd::keyring::plan::blockers(&self.keyring, &facts).is_empty() || !self.backoff.is_empty()
    }

    pub fn story(&self) -> String {
        let from = self.history.len().saturating_sub(40);
        format!("now {}\n{}", self.now, self.history[from..].join("\n"))
    }

    pub fn state(&self, serial: Serial) -> KeyState {
        self.keyring.key(serial).map(|key| key.state).unwrap_or(KeyState::Retired)
    }

    pub fn active(&self) -> Option<Serial> {
        self.keyring.active().map(|key| key.serial)
    }

    pub fn audit(&self, action: &str) -> usize {
        self.keyring.journal.audit.iter().filter(|entry| entry.action == action).count()
    }
}

pub fn keys(keyring: &Keyring) -> Vec<(Serial, KeyState)> {
    keyring.keys.iter().map(|key| (key.serial, key.state)).collect()
}

pub fn request(intent: Intent) -> Request {
    Request {
        intent,
        actor: "operator".to_owned(),
        reason: Some("a test".to_owned()),
        dry_run: false,
        if_generation: None,
        idempotency: None,
    }
}

pub fn idempotent(intent: Intent, key: &str, fingerprint: &str) -> Request {
    let idempotency = Some(Idempotency { key: key.to_owned(), fingerprint: fingerprint.to_owned() });
    Request { idempotency, ..request(intent) }
}

pub fn rotate() -> Intent {
    Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None }
}

pub fn new_key(number: u64, algorithm: Algorithm) -> NewKey {
    NewKey {
        kid: Kid(Arc::from(format!("key-{number}-{algorithm}"))),
        algorithm,
        public: PublicJwk::Ec { crv: EcCurve::P256, x: format!("x{number}"), y: "y".to_owned() },
        private: Some(PrivateHandle { backend: "local".to_owned(), handle: "sealed".to_owned() }),
    }
}

pub fn import(number: u64, algorithm: Algorithm, ttl_bound: Span) -> ImportedKey {
    let key = NewKey { kid: Kid(Arc::from(format!("imported-{number}"))), ..new_key(number, algorithm) };
    ImportedKey { key, ttl_bound, published_since: None, published_until: None }
}

/// A small policy in round numbers: visible within 6 minutes, propagation 10, a rotation per hour, tokens of 5 minutes.
pub fn policy() -> Policy {
    let base = hourly("main", "https://auth.example.com");
    Policy {
        issuer: IssuerPolicy {
            max_age: Span::MINUTE,
            caches: vec![Span::MINUTE],
            discovery: Discovery::Minimal,
            ..base.issuer
        },
        rotation: RotationPolicy {
            propagation: Span::MINUTE.times(10),
            successors: 2,
            verifiers: vec![Verifier {
                name: "gateway".to_owned(),
                sees_new: Span::MINUTE.times(4),
                keeps_old: Some(Span::MINUTE.times(4)),
            }],
            clock_skew: Span::MINUTE,
            ..base.rotation
        },
        tokens: TokenPolicy { max_ttl: Span::MINUTE.times(5), ..base.tokens },
        ..base
    }
}

pub fn with(edit: impl FnOnce(&mut Policy)) -> Policy {
    let mut policy = policy();
    edit(&mut policy);
    policy
}

/// Whether a new keyset may have this policy.
pub fn is_valid(policy: &Policy) -> bool {
    let name = Name::parse("default").unwrap();
    let issuer = policy.issuer.name.clone();
    let mut findings = timing::examine_keyset(&name, policy);
    findings.extend(timing::examine_issuer(&issuer, &[(name, policy)]));
    findings.iter().all(|finding| finding.severity != Severity::Refused)
}
