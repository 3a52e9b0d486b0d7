//! The world of a simulation: events in the order of time.

mod faults;
mod tokens;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

use super::Scenario;
use super::random::Random;
use super::replica::Replica;
use super::report::Report;
use super::rules::Rules;
use super::served::{Moment, Served};
use super::verifying::Presentation;
use crate::keyring::algorithm::Algorithm;
use crate::keyring::change::{Change, NewKey, Trigger};
use crate::keyring::jwk::{EcCurve, Kid, PublicJwk};
use crate::keyring::plan::{SlowStep, Step};
use crate::keyring::policy::Policy;
use crate::keyring::record::{Journal, Keyring, PrivateHandle, Serial};
use crate::keyring::time::{Span, Timestamp};

/// Steps that any situation may need at one instant; far below what an endless loop takes.
const STEPS_MAX: usize = 100;

/// How many lines of the story are kept.
const STORY_MAX: usize = 30;

/// About how many faults there are at most: they are further apart where the span is long.
const FAULTS_MAX: i64 = 5_000;

/// How often what nobody asks for any more is dropped: after so many events.
const FORGET_EVERY: u64 = 4096;

enum Event {
    Look {
        replica: usize,
    },
    /// A replica may have to stop signing or answering.
    Limit {
        replica: usize,
    },
    Present(Presentation),
    Fault,
    /// Operators use up every key that waits, as soon as the newest may sign.
    Rush,
    Return {
        replica: usize,
    },
    Linked {
        replica: usize,
    },
    StoreBack,
    BackendBack,
    Configure,
}

struct Queued {
    at: Moment,
    order: u64,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Queued {}

impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Queued {
    /// The earliest is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

struct World<'a, R> {
    scenario: &'a Scenario,
    rules: &'a R,
    random: Random,
    now: Moment,
    queue: BinaryHeap<Queued>,
    order: u64,
    store: Arc<Keyring>,
    store_up: bool,
    backend_up: bool,
    /// Which policy the configuration holds.
    policy: usize,
    replicas: Vec<Replica>,
    served: Served,
    /// Clocks of verifiers, in milliseconds ahead.
    clocks: Vec<i64>,
    /// Which keys the record says each replica shows; whether it answers is another matter.
    shown: Vec<BTreeSet<Serial>>,
    /// Keys that an operator revoked, and in which generation.
    revoked: BTreeMap<Serial, u64>,
    /// Keys whose tokens nobody promised anything: revoked ones, and those that had to sign before everyone knew them.
    excused: BTreeSet<Serial>,
    /// The last moment at which a watched token of each key is live, and for which verifier.
    last_live: BTreeMap<Serial, (Moment, usize)>,
    /// The longest wait between faults that keeps their number bounded.
    pause: i64,
    ever_served: bool,
    story: VecDeque<String>,
    report: Report,
}

/// Plays a scenario to its end. `progress` is told how far it is, from 0 to 1.
pub fn play<R: Rules>(scenario: &Scenario, rules: &R, mut progress: impl FnMut(f64)) -> Report {
    let mut world = World::new(scenario, rules);
    let (begin, end) = (world.now, world.now + scenario.lasts.as_millis());
    let mut events = 0u64;
    while let Some(Queued { at, event, .. }) = world.queue.pop() {
        if at > end {
            break;
        }
        world.now = at;
        world.happen(event);
        events += 1;
        if events.is_multiple_of(FORGET_EVERY) {
            world.forget();
            progress((at - begin) as f64 / (end - begin).max(1) as f64);
        }
    }
    if world.report.incident.is_none() {
        world.report.story = world.story.into();
    }
    world.report
}

impl<'a, R: Rules> World<'a, R> {
    fn new(scenario: &'a Scenario, rules: &'a R) -> Self {
        let mut random = Random::new(scenario.seed);
        let reality = &scenario.reality;
        let half = reality.skew.as_millis() / 2;
        let now = scenario.begins.as_millis();
        let replicas = clocks(reality.replicas, half, &mut random).into_iter().map(Replica::new).collect::<Vec<_>>();
        let clocks = clocks(reality.verifiers.len(), half, &mut random);
        let first = scenario.policies[0].clone();
        let keyring = Keyring::new(scenario.keyset.clone(), "simulated".to_owned(), first, true, scenario.begins);
        let mut world = World {
            scenario,
            rules,
            random,
            now,
            queue: BinaryHeap::new(),
            order: 0,
            store: Arc::new(keyring),
            store_up: true,
            backend_up: true,
            policy: 0,
            served: Served::new(replicas.len()),
            replicas,
            clocks,
            shown: vec![BTreeSet::new(); reality.replicas],
            revoked: BTreeMap::new(),
            excused: BTreeSet::new(),
            pause: scenario.lasts.as_millis() / FAULTS_MAX,
            last_live: BTreeMap::new(),
            ever_served: false,
            story: VecDeque::new(),
            report: Report::default(),
        };
        for replica in 0..world.replicas.len() {
            world.look_at(replica, now);
        }
        if reality.faults != super::Faults::NONE {
            world.next_fault();
        }
        if scenario.policies.len() > 1 {
            world.next_configuration();
        }
        world
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Look { replica } => {
                if self.replicas[replica].next_look == self.now {
                    self.replicas[replica].next_look = Moment::MAX;
                    self.look(replica);
                }
            }
            Event::Limit { replica } => self.limit(replica),
            Event::Present(presentation) => self.judge(presentation),
            Event::Fault => {
                self.fault();
                self.next_fault();
            }
            Event::Rush => self.rush(),
            Event::Return { replica } => self.come_back(replica),
            Event::Linked { replica } => {
                self.replicas[replica].linked = true;
                self.look(replica);
            }
            Event::StoreBack => {
                self.store_up = true;
                (0..self.replicas.len()).for_each(|replica| self.look(replica));
            }
            Event::BackendBack => self.backend_up = true,
            Event::Configure => {
                self.policy = self.random.index(self.scenario.policies.len());
                self.tell(|| "another configuration".to_owned());
                (0..self.managers()).for_each(|replica| self.look(replica));
                self.next_configuration();
            }
        }
    }

    // What replicas do.

    fn managers(&self) -> usize {
        self.replicas.len().min(2)
    }

    fn reaches(&self, replica: usize) -> bool {
        let it = &self.replicas[replica];
        it.up && it.linked && self.store_up
    }

    /// A file store is always confirmed, and so is who reaches a shared one and has what is stored there.
    fn is_confirmed(&self, replica: usize) -> bool {
        let current = |view: &Arc<Keyring>| view.generation == self.store.generation;
        self.replicas.len() == 1 || self.reaches(replica) && self.replicas[replica].view.as_ref().is_some_and(current)
    }

    fn confirm(&mut self, replica: usize) {
        if self.is_confirmed(replica) {
            self.replicas[replica].confirmed = self.now;
        }
    }

    fn confirm_all(&mut self) {
        (0..self.replicas.len()).for_each(|replica| self.confirm(replica));
    }

    fn look_at(&mut self, replica: usize, at: Moment) {
        let at = at.max(self.now);
        if at < self.replicas[replica].next_look {
            self.replicas[replica].next_look = at;
            self.push(at, Event::Look { replica });
        }
    }

    fn look(&mut self, replica: usize) {
        if !self.replicas[replica].up {
            return;
        }
        self.confirm(replica);
        if self.reaches(replica) {
            self.take(replica, self.store.clone());
        }
        if replica < self.managers() && self.reaches(replica) {
            self.carry_on(replica);
        }
        self.limit(replica);
    }

    /// Does what there is to do, as the scheduler and reconcile do.
    fn carry_on(&mut self, replica: usize) {
        for _ in 0..STEPS_MAX {
            let it = &self.replicas[replica];
            let facts = it.facts(&self.store, &self.scenario.policies[self.policy], self.ever_served, self.now);
            let plan = self.rules.plan(&self.store, &facts);
            let clock = facts.now;
            match plan.step {
                None => {
                    if let Some(wake) = plan.wake {
                        let at = self.replicas[replica].moment(wake).max(self.now + 1);
                        self.look_at(replica, at);
                    }
                    return;
                }
                Some(Step::Write(change)) => self.write(replica, &change, clock),
                Some(Step::Create { serial, algorithm }) if self.backend_up => {
                    self.report.keys += 1;
                    self.write(replica, &Change::Add(Box::new(new_key(serial, algorithm))), clock);
                }
                Some(Step::Destroy { serial }) if self.backend_up => {
                    self.write(replica, &Change::Destroyed(serial), clock);
                }
                Some(Step::Create { serial, .. }) => self.back_off(replica, SlowStep::Create { serial }),
                Some(Step::Destroy { serial }) => self.back_off(replica, SlowStep::Destroy { serial }),
            }
        }
        panic!("no rest after {STEPS_MAX} steps at one instant: {:#?}", self.story);
    }

    fn back_off(&mut self, replica: usize, step: SlowStep) {
        let until = self.replicas[replica].clock(self.now) + Span::MINUTE;
        self.replicas[replica].backoff.insert(step, until);
    }

    fn write(&mut self, replica: usize, change: &Change, clock: Timestamp) {
        if let Change::Promote { serial, trigger, unpropagated } = change {
            self.report.rotations += u64::from(*trigger != Trigger::First);
            if *unpropagated && *trigger != Trigger::First {
                self.excused.insert(*serial); // Nothing else was left after a revocation.
            }
        }
        let next = self.rules.after(&self.store, change, clock);
        if let Some(told) = told(change) {
            self.tell(|| format!("replica {replica}: {told}"));
        }
        self.store_next(replica, next);
    }

    fn store_next(&mut self, replica: usize, mut next: Keyring) {
        self.confirm_all();
        // History takes time to copy and decides nothing.
        next.journal = Journal::default();
        next.keys.retain(|key| key.private.is_some() || key.state.is_published());
        self.store = Arc::new(next);
        self.take(replica, self.store.clone());
        let lag = self.scenario.reality.lag.as_millis();
        for other in (0..self.replicas.len()).filter(|other| *other != replica) {
            let after = self.random.extreme(lag);
            self.look_at(other, self.now + after);
            self.limit(other);
        }
    }

    /// A replica shows and signs by another keyring from now on.
    fn take(&mut self, replica: usize, keyring: Arc<Keyring>) {
        let it = &mut self.replicas[replica];
        if it.view.as_ref().is_some_and(|view| view.generation == keyring.generation) {
            return self.limit(replica);
        }
        it.take(keyring.clone(), self.now);
        let shown: BTreeSet<Serial> = keyring.published().map(|key| key.serial).collect();
        self.ever_served |= !shown.is_empty();
        for key in &shown {
            self.served.shows(replica, *key, self.now);
        }
        let before = std::mem::replace(&mut self.shown[replica], shown);
        for gone in before.difference(&self.shown[replica].clone()) {
            self.hide(replica, *gone);
        }
        self.limit(replica);
    }

    fn hide(&mut self, replica: usize, key: Serial) {
        self.served.hides(replica, key, self.now);
        if self.excused.contains(&key) {
            return;
        }
        self.note_removal(key);
    }

    /// Brings what it signs with and whether it answers in line with what it knows and since when.
    fn limit(&mut self, replica: usize) {
        self.confirm(replica);
        let it = &self.replicas[replica];
        let confirmed = self.is_confirmed(replica);
        let (signs_until, answers_until) = (it.signs_until(), it.answers_until());
        let may_sign = it.up && (confirmed || self.now <= signs_until);
        // Who is late but reaches the store goes on answering, or no lag could do harm.
        let may_answer =
            it.up && it.view.is_some() && (confirmed || self.reaches(replica) || self.now <= answers_until);
        if !confirmed && it.up {
            let next = [signs_until, answers_until].into_iter().filter(|at| *at >= self.now).min();
            if let Some(at) = next {
                self.push(at.saturating_add(1), Event::Limit { replica });
            }
        }
        let active = self.replicas[replica].view.as_ref().and_then(|view| view.active()).map(|key| key.serial);
        self.sign_with(replica, active.filter(|_| may_sign));
        self.answer(replica, may_answer);
    }

    fn answer(&mut self, replica: usize, answering: bool) {
        if self.replicas[replica].answering == answering {
            return;
        }
        self.replicas[replica].answering = answering;
        if answering {
            self.end_silence();
            self.served.answers(replica, self.now);
        } else {
            self.served.falls_silent(replica, self.now);
        }
    }

    /// Somebody answers again: was nobody there for longer than max_age, it is known to all.
    fn end_silence(&mut self) {
        let max_age = self.store.policy.issuer.max_age.as_millis();
        let last = self.served.last_answer(self.now).filter(|_| !self.served.is_answered(self.now));
        if last.is_some_and(|last| self.now - last > max_age) {
            self.tell(|| "publication goes on after a silence".to_owned());
            for replica in &mut self.replicas {
                replica.resumed_at = Some(replica.clock(self.now));
            }
        }
    }

    fn sign_with(&mut self, replica: usize, key: Option<Serial>) {
        let before = self.replicas[replica].signing;
        if before == key {
            return;
        }
        self.replicas[replica].signing = key;
        let generation = self.replicas[replica].view.as_ref().map_or(0, |view| view.generation);
        let knows = |key: Serial| self.revoked.get(&key).is_some_and(|revoked| *revoked <= generation);
        self.report.misused += u64::from(key.is_some_and(knows));
        if let Some(before) = before {
            self.watch(replica, before);
        }
        if let Some(key) = key {
            self.watch(replica, key);
        }
    }

    // Bookkeeping.

    fn push(&mut self, at: Moment, event: Event) {
        self.order += 1;
        self.queue.push(Queued { at, order: self.order, event });
    }

    fn tell(&mut self, line: impl FnOnce() -> String) {
        if self.story.len() == STORY_MAX {
            self.story.pop_front();
        }
        let line = format!("{}  {}", Timestamp::from_millis(self.now).to_rfc3339(), line());
        self.story.push_back(line);
    }

    /// What is older than any token or document in use.
    fn forget(&mut self) {
        let policies = || self.scenario.policies.iter();
        let longest = |of: &dyn Fn(&Policy) -> Span| policies().map(of).max().unwrap_or(Span::ZERO);
        let tokens = longest(&|policy| policy.overlap());
        let reality = &self.scenario.reality;
        let caches = reality.verifiers.iter().map(|verifier| verifier.oldest(reality.layers)).max().unwrap_or(0);
        let before = self.now - (tokens.as_millis() + caches) * 2 - self.scale() * 4;
        self.served.forget_before(before);
        self.last_live.retain(|_, (last, _)| *last > before);
        // A replica that is late still shows, and signs with, what is gone from the store.
        let stored = self.store.keys.iter().map(|key| key.serial);
        let shown = self.shown.iter().flatten().copied();
        let known: BTreeSet<Serial> = stored.chain(shown).chain(self.last_live.keys().copied()).collect();
        self.excused.retain(|serial| known.contains(serial));
        self.revoked.retain(|serial, _| known.contains(serial));
    }
}

/// Clocks as far from the truth as they may be, one behind and one ahead, and every third somewhere between.
fn clocks(count: usize, half: i64, random: &mut Random) -> Vec<i64> {
    let offset = random.index(3);
    let clock = |index: usize, random: &mut Random| match (index + offset) % 3 {
        0 => -half,
        1 => half,
        _ => random.between(-half, half),
    };
    (0..count).map(|index| clock(index, random)).collect()
}

/// What a change is for people; `None` for what only the record knows.
fn told(change: &Change) -> Option<String> {
    let keys = |serials: &[Serial]| serials.iter().map(|serial| format!("key {serial}")).collect::<Vec<_>>().join(", ");
    Some(match change {
        Change::Observe { .. }
        | Change::AddEnded(_)
        | Change::Destroyed(_)
        | Change::Rebase
        | Change::Restart { .. } => return None,
        Change::AdoptPolicy(_) => "another configuration is in force".to_owned(),
        Change::Add(key) => format!("{} is made and published", key.kid.as_str().replace('-', " ")),
        Change::Propagated(serials) => format!("{} may sign from now on", keys(serials)),
        Change::Promote { serial, .. } => format!("key {serial} signs"),
        Change::Withdraw(serials) => format!("{} is withdrawn", keys(serials)),
        Change::Expire(serials) => format!("{} leaves the JWKS", keys(serials)),
        Change::HoldEnded => "the hold ends".to_owned(),
    })
}

fn new_key(serial: Serial, algorithm: Algorithm) -> NewKey {
    NewKey {
        kid: Kid(Arc::from(format!("key-{serial}"))),
        algorithm,
        public: PublicJwk::Ec { crv: EcCurve::P256, x: format!("x{serial}"), y: "y".to_owned() },
        private: Some(PrivateHandle { backend: "simulated".to_owned(), handle: serial.to_string() }),
    }
}
