//! Everything around the daemon: time, an application that signs, verifiers that check, an operator, faults; and the
//! oracle, which says what must not happen.

use std::collections::{HashMap, HashSet};

use jwksd::clock::ManualClock;
use jwksd::keyring::decide::{Intent, Outcome};
use jwksd::keyring::policy::Policy;
use jwksd::keyring::record::KeyState;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};

use crate::daemon::{Daemon, KINDS, LONGEST_WINDOW, SKEW, SLOWEST, START, declare, policy_of};
use crate::random::Random;
use crate::store::{Crash, FaultyStore};
use crate::verifier::{Checked, HttpCache, Served, Verdict, Verifier, kids};

/// What is wrong on purpose with the surroundings of the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Flaws {
    /// A verifier keeps documents three times as long as declared.
    pub hoards: bool,
    /// The propagation in force is shorter than the caches.
    pub hasty: bool,
    /// Verifiers' clocks are further apart than σ.
    pub skewed: bool,
    /// The store confirms writes that it then forgets.
    pub forgets: bool,
}

impl Flaws {
    pub const NONE: Flaws = Flaws { hoards: false, hasty: false, skewed: false, forgets: false };
}

#[derive(Clone, Copy, Debug)]
pub enum Operator {
    Rotate,
    RotateEarly,
    Rollback,
    Hold(Option<Span>),
    Resume,
    RevokeActive,
    RevokeAny(u64),
    Compromise,
}

/// What a run came across, so that nobody takes an empty one for a proof.
#[derive(Debug, Default)]
pub struct Stats {
    pub tokens: u64,
    pub accepted: u64,
    pub excused: u64,
    pub without_document: u64,
    pub rotations: u64,
    pub crashes: u64,
    pub restarts: u64,
    pub revocations: u64,
}

struct Token {
    text: String,
    kid: String,
    lives: (i64, i64),
}

pub struct World {
    pub daemon: Daemon,
    pub stats: Stats,
    random: Random,
    truth: Timestamp,
    flaws: Flaws,
    cache: HttpCache,
    verifiers: Vec<Verifier>,
    tokens: Vec<Token>,
    checked: Checked,
    /// Since when each kid could be fetched.
    served_since: HashMap<String, Timestamp>,
    /// Somebody tried to revoke them; whether it succeeded may be unknown.
    maybe_revoked: HashSet<String>,
    /// A revocation of them was answered.
    revoked: HashSet<String>,
    /// They sign before anyone could have seen them, because of an emergency.
    early: HashSet<String>,
    /// The next key that signs may be one of those.
    emergency: bool,
    active: Option<String>,
    down_until: Option<Timestamp>,
    stepped_until: Option<Timestamp>,
    out_until: Option<Timestamp>,
    story: Vec<String>,
}

const TICK: Span = Span::SECOND;

/// Tokens that are kept for checking; the oldest are dropped first.
const TOKENS_MAX: usize = 80;

impl World {
    pub async fn new(random: Random, flaws: Flaws) -> World {
        World::crashing(random, flaws, None).await
    }

    /// A daemon that will crash at one of the writes of its life.
    pub async fn crashing(random: Random, flaws: Flaws, crash: Option<(u64, Crash)>) -> World {
        let half = SKEW.as_millis() / 2;
        let spread = if flaws.skewed { half * 25 } else { half };
        let (ahead, behind) = (if flaws.skewed { half } else { spread }, -spread);
        let slow = if flaws.hoards { SLOWEST.times(3) } else { SLOWEST };
        let clock = ManualClock::at(START);
        let mut world = World {
            daemon: Daemon::new(clock, flawed(policy_of(0), flaws)),
            stats: Stats::default(),
            random,
            truth: START,
            flaws,
            cache: HttpCache::default(),
            verifiers: vec![
                Verifier::new("asks every time", Span::ZERO, 0, true),
                Verifier::new("slow and fast-running", slow, ahead, false),
                Verifier::new("slow and late", slow, behind, false),
                Verifier::new("refetches", slow, behind, true),
            ],
            tokens: Vec::new(),
            checked: Checked::default(),
            served_since: HashMap::new(),
            maybe_revoked: HashSet::new(),
            revoked: HashSet::new(),
            early: HashSet::new(),
            emergency: false,
            active: None,
            down_until: None,
            stepped_until: None,
            out_until: None,
            story: Vec::new(),
        };
        if flaws.forgets {
            world.store().forget_every(5);
        }
        if let Some((at, effect)) = crash {
            world.store().crash_at(at, effect);
        }
        world.daemon.start().await;
        world.after_effects();
        world.look();
        world
    }

    pub fn store(&self) -> &FaultyStore {
        &self.daemon.store
    }

    pub fn truth(&self) -> Timestamp {
        self.truth
    }

    /// The active key is about to be revoked behind the back of this world.
    pub fn condemn_active(&mut self) {
        self.maybe_revoked.extend(self.active_kid());
    }

    pub fn writes(&self) -> u64 {
        self.store().writes()
    }

    pub fn active_kid(&self) -> Option<String> {
        self.daemon.active_kid()
    }

    /// `seconds` pass.
    pub async fn pass(&mut self, seconds: u32) -> Result<(), String> {
        for _ in 0..seconds {
            self.tick().await?;
        }
        Ok(())
    }

    /// `seconds` of anything that may happen.
    pub async fn random_history(&mut self, seconds: u32) -> Result<(), String> {
        for _ in 0..seconds {
            self.happen().await;
            self.tick().await?;
        }
        Ok(())
    }

    async fn happen(&mut self) {
        let span = Span::from_millis(1000 + i64::try_from(self.random.below(40_000)).unwrap());
        let number = self.random.below(20);
        match self.random.below(400) {
            0..4 => drop(self.operate(Operator::Rotate).await),
            4 => drop(self.operate(Operator::RotateEarly).await),
            5..8 => drop(self.operate(Operator::Rollback).await),
            8..10 => drop(self.operate(Operator::Hold(Some(span))).await),
            10 => drop(self.operate(Operator::Hold(None)).await),
            11..16 => drop(self.operate(Operator::Resume).await),
            16 | 17 => drop(self.operate(Operator::RevokeActive).await),
            18 => drop(self.operate(Operator::RevokeAny(number)).await),
            19 if number < 10 => drop(self.operate(Operator::Compromise).await),
            20..24 if !self.flaws.hasty => drop(self.configure(policy_of(number % KINDS)).await),
            24 => self.misconfigure(number.is_multiple_of(2)).await,
            25..30 => {
                let effect = if number.is_multiple_of(2) { Crash::Before } else { Crash::After };
                let at = self.writes() + 1 + number;
                self.store().crash_at(at, effect);
            }
            30 | 31 => {
                self.tell("stopped".to_owned());
                self.fall(span.min(Span::from_secs(1 + i64::try_from(number * 2).unwrap())));
            }
            32 | 33 if self.out_until.is_none() => {
                self.tell(format!("the store is out for {span}"));
                self.store().set_outage(true);
                self.out_until = Some(self.truth + span);
            }
            34 => self.store().fail_next_write_after_effect(),
            35 => self.store().fail_next_write_after_effect_and_the_read_after_it(),
            36 if self.stepped_until.is_none() && self.daemon.runs() => {
                let wrong = if number.is_multiple_of(2) { self.truth + Span::DAY } else { self.truth - Span::DAY };
                self.tell(format!("the clock says {wrong}"));
                self.daemon.clock.step_to(wrong);
                self.stepped_until = Some(self.truth + span);
                // Whatever wakes it now, such as a request, has it look at once.
                self.daemon.reconcile().await;
                self.after_effects();
                self.look();
            }
            37..45 if self.stepped_until.is_none() => {
                // As far from true time as any clock here may be: the guard does not mind, verifiers must not either.
                let half = SKEW.as_millis() / 2;
                let ahead = i64::try_from(self.random.below(2 * half.unsigned_abs() + 1)).unwrap() - half;
                let near = Timestamp::from_millis(self.truth.as_millis() + ahead);
                self.tell(format!("the clock drifts to {near}"));
                self.daemon.clock.step_to(near);
            }
            _ => {}
        }
    }

    /// Something an operator does; a refusal is an answer like any other.
    pub async fn operate(&mut self, operator: Operator) -> Result<(), String> {
        let keys = self.daemon.keys();
        let intent = match operator {
            Operator::Rotate => Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None },
            Operator::RotateEarly => Intent::Rotate { allow_unpropagated: true, confirm_algorithm: None },
            Operator::Rollback => Intent::Rollback,
            Operator::Hold(span) => Intent::Hold { until: span.map(|span| self.truth + span) },
            Operator::Resume => Intent::Resume,
            Operator::Compromise => Intent::Compromise,
            Operator::RevokeActive => match self.daemon.active_serial() {
                Some(serial) => Intent::Revoke { serial },
                None => return Ok(()),
            },
            Operator::RevokeAny(number) => match keys.get(number as usize % keys.len().max(1)) {
                Some((serial, _)) => Intent::Revoke { serial: *serial },
                None => return Ok(()),
            },
        };
        let condemned: Vec<String> = match &intent {
            Intent::Revoke { serial } => keys.iter().filter(|(s, _)| s == serial).map(|(_, kid)| kid.clone()).collect(),
            Intent::Compromise => keys.into_iter().map(|(_, kid)| kid).collect(),
            _ => Vec::new(),
        };
        if !self.daemon.runs() {
            return Ok(());
        }
        let dangerous = !condemned.is_empty() || matches!(operator, Operator::RotateEarly);
        self.maybe_revoked.extend(condemned.iter().cloned());
        self.emergency |= dangerous;
        let answer = self.daemon.command(intent).await;
        self.tell(format!("{operator:?}: {}", told(&answer)));
        match answer {
            Ok(outcome) => {
                self.stats.revocations += condemned.len() as u64;
                self.revoked.extend(condemned);
                let successor = outcome.changes.iter().any(|change| change.to == KeyState::Active);
                let stays = self.active.as_ref().is_some_and(|kid| !self.maybe_revoked.contains(kid));
                if dangerous && !outcome.unpropagated && (successor || stays) {
                    self.emergency = false;
                }
            }
            Err(error) if error.starts_with("refused") => self.emergency = false,
            Err(_) => {}
        }
        self.after_effects();
        self.look();
        Ok(())
    }

    pub async fn configure(&mut self, policy: Policy) -> Result<(), String> {
        self.tell(format!("configured: max_age {}, every {}", policy.issuer.max_age, policy.rotation.schedule));
        self.daemon.configure(vec![declare(flawed(policy, self.flaws))]).await;
        self.after_effects();
        self.look();
        Ok(())
    }

    /// The keyset's table is broken, or gone.
    async fn misconfigure(&mut self, gone: bool) {
        self.tell(format!("misconfigured, gone: {gone}"));
        let mut declared = vec![declare(policy_of(0))];
        declared[0].fits = false;
        self.daemon.configure(if gone { Vec::new() } else { declared }).await;
        self.after_effects();
        self.look();
    }

    /// One second: the daemon does what is due at the instants it asked for, an application signs, verifiers check.
    async fn tick(&mut self) -> Result<(), String> {
        let until = self.truth + TICK;
        while let Some(rest) = self.daemon.rests_for().filter(|rest| *rest <= until.since(self.truth)) {
            self.advance(rest);
            self.daemon.tick().await;
            self.after_effects();
            self.look();
            if rest.is_zero() {
                break; // It is tried again: failures take no simulated time.
            }
        }
        self.advance(until.since(self.truth));
        self.end_faults().await;
        self.sign().await?;
        self.verify()?;
        if let Some(reason) = self.daemon.frozen_because() {
            return Err(self.broken(&format!("the keyset froze: {reason}")));
        }
        if let Some(reason) = self.daemon.refusal.take() {
            return Err(self.broken(&format!("the daemon does not start: {reason}")));
        }
        Ok(())
    }

    fn advance(&mut self, span: Span) {
        self.daemon.clock.advance(span);
        self.truth = self.truth + span;
    }

    async fn end_faults(&mut self) {
        if self.out_until.is_some_and(|until| until <= self.truth) {
            self.out_until = None;
            self.store().set_outage(false);
        }
        if self.stepped_until.is_some_and(|until| until <= self.truth) {
            self.stepped_until = None;
            self.daemon.clock.step_to(self.truth);
        }
        if !self.daemon.runs() && self.down_until.is_none_or(|until| until <= self.truth) && self.out_until.is_none() {
            if self.stepped_until.take().is_some() {
                self.daemon.clock.step_to(self.truth);
            }
            self.stats.restarts += 1;
            self.restart().await;
            self.after_effects();
            self.look();
        }
    }

    /// What cannot be read at a start is there nevertheless: the process ends, and another one begins.
    async fn restart(&mut self) {
        if self.random.below(4) == 0 {
            self.store().hide_keyring_once();
            if !self.daemon.start().await && !self.store().is_dead() {
                self.tell("it ends, since the keyring could not be read".to_owned());
                self.daemon.refusal = None;
            }
        }
        if !self.daemon.runs() {
            self.daemon.start().await;
        }
    }

    /// A write may have killed the process.
    fn after_effects(&mut self) {
        if self.daemon.store.is_dead() && self.down_until.is_none_or(|until| until <= self.truth) {
            self.stats.crashes += 1;
            let downtime = [0, 3, 25][self.random.below(3) as usize];
            self.tell(format!("crashed, down for {downtime} s"));
            self.fall(Span::from_secs(downtime));
        }
    }

    fn fall(&mut self, downtime: Span) {
        self.daemon.stop();
        self.down_until = Some(self.truth + downtime);
    }

    /// What anybody can see from outside.
    fn look(&mut self) {
        if let Some(served) = self.daemon.served() {
            for kid in kids(&served.body) {
                self.served_since.entry(kid).or_insert(self.truth);
            }
        }
        let active = self.daemon.active_kid();
        if let Some(kid) = &active
            && self.active != active
        {
            self.stats.rotations += 1;
            self.tell(format!("{kid} signs"));
            if std::mem::take(&mut self.emergency) {
                self.early.insert(kid.clone());
            }
            self.active = active;
        }
    }

    async fn sign(&mut self) -> Result<(), String> {
        let Some(issued) = self.daemon.sign().await else { return Ok(()) };
        let kid = issued.kid.to_string();
        if self.revoked.contains(&kid) {
            return Err(self.broken(&format!("a token of the revoked key {kid} left")));
        }
        self.stats.tokens += 1;
        let claims = claims_of(&issued.token);
        let lives = (claims["nbf"].as_i64().unwrap(), claims["exp"].as_i64().unwrap());
        self.tokens.push(Token { text: issued.token, kid, lives });
        let latest = self.truth.as_secs() - SKEW.as_secs() * 30;
        self.tokens.retain(|token| token.lives.1 > latest);
        if self.tokens.len() > TOKENS_MAX {
            self.tokens.remove(0);
        }
        Ok(())
    }

    /// Every verifier checks the newest token, the oldest one and one in between.
    fn verify(&mut self) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Ok(());
        }
        let origin = self.daemon.served();
        let last = self.tokens.len() - 1;
        let slowest = self.verifiers.iter().map(|verifier| -verifier.ahead).max().unwrap_or(0);
        let alive = |token: &Token| token.lives.1 * 1000 + slowest > self.truth.as_millis();
        let oldest = self.tokens.iter().position(alive).unwrap_or(last);
        let between = oldest + self.random.below((last - oldest + 1) as u64) as usize;
        for index in 0..self.verifiers.len() {
            for chosen in [last, oldest, between] {
                let token = &self.tokens[chosen];
                let (cache, now, checked) = (&mut self.cache, self.truth, &mut self.checked);
                let fetch = || -> Option<Served> { cache.fetch(now, origin.as_ref()) };
                let verdict = self.verifiers[index].verify(&token.text, token.lives, now, checked, fetch);
                match verdict {
                    Verdict::Accepted => self.stats.accepted += 1,
                    Verdict::NotLive => {}
                    Verdict::NoDocument => self.stats.without_document += 1,
                    Verdict::UnknownKey if self.is_excused(&token.kid) => self.stats.excused += 1,
                    Verdict::UnknownKey | Verdict::BadSignature => {
                        let (name, kid, lives) = (self.verifiers[index].name, &token.kid, token.lives);
                        let what = format!("`{name}` rejects a live token of {kid} {lives:?}: {verdict:?}");
                        return Err(self.broken(&what));
                    }
                }
            }
        }
        Ok(())
    }

    /// Revoked keys are to be rejected; a key that an emergency put to work may be unknown until caches have run out.
    fn is_excused(&self, kid: &str) -> bool {
        let young = self.served_since.get(kid).is_none_or(|since| self.truth < *since + LONGEST_WINDOW);
        self.maybe_revoked.contains(kid) || (young && self.early.contains(kid))
    }

    fn tell(&mut self, what: String) {
        self.story.push(format!("{} {what}", self.truth));
    }

    fn broken(&self, what: &str) -> String {
        let from = self.story.len().saturating_sub(30);
        format!("at {} {what}\n{}", self.truth, self.story[from..].join("\n"))
    }
}

fn flawed(mut policy: Policy, flaws: Flaws) -> Policy {
    if flaws.hasty {
        policy.rotation.propagation = Span::from_secs(5);
    }
    if flaws.hoards {
        // Nothing but the propagation stands between the first publication of a key and its first signature.
        policy.rotation.successors = 1;
        policy.rotation.schedule = Schedule::Every(policy.rotation.propagation + Span::SECOND);
    }
    policy
}

fn told(answer: &Result<Outcome, String>) -> String {
    match answer {
        Ok(outcome) => outcome.changes.iter().map(|c| format!("{} → {} ", c.kid, c.to)).collect(),
        Err(error) => error.clone(),
    }
}

fn claims_of(token: &str) -> serde_json::Value {
    use base64::Engine as _;
    let payload = token.split('.').nth(1).unwrap();
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap();
    serde_json::from_slice(&payload).unwrap()
}
