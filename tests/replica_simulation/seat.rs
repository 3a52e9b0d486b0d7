//! Where one replica runs: its machine's clock, what it remembers, its line to the hub, and its process while there is one.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use jwksd::clock::ManualClock;
use jwksd::engine::{Declared, Engine, Issued, KeysetCell, ReplicaRole};
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::decide::{Intent, Outcome, Request};
use jwksd::keyring::policy::{Policy, Verifier};
use jwksd::keyring::record::Keyring;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};

use crate::line::{Line, Own};
use crate::replica::{Common, SKEW, declare, policy};
use crate::verifier::Served;

/// Policies that keep the rules, each with a propagation as short as they allow.
pub fn policy_of(kind: u64) -> Policy {
    let secs = Span::from_secs;
    let (max_age, every, max_ttl, staleness, successors) = match kind % KINDS {
        0 => (4, 60, 10, 20, 2),
        1 => (4, 45, 16, 12, 2),
        2 => (10, 70, 6, 30, 1),
        _ => (6, 50, 10, 8, 2),
    };
    let mut policy = policy();
    policy.issuer.max_age = secs(max_age);
    policy.issuer.caches = vec![secs(max_age)];
    policy.rotation.schedule = Schedule::Every(secs(every));
    policy.rotation.successors = successors;
    policy.rotation.staleness_limit = secs(staleness);
    policy.rotation.verifiers = vec![Verifier { name: "slow".to_owned(), sees_new: SLOWEST, keeps_old: Some(SLOWEST) }];
    policy.rotation.propagation = policy.visibility_window();
    policy.tokens.max_ttl = secs(max_ttl);
    policy.tokens.default_ttl = secs(max_ttl);
    policy
}

pub const KINDS: u64 = 4;
/// The slowest declared verifier of every policy here.
pub const SLOWEST: Span = Span::from_secs(4);
/// The longest that any policy here gives everyone to see a new key, and then some.
pub const LONGEST_WINDOW: Span = Span::from_secs(30);
/// The longest of all times between two scheduled rotations.
pub const LONGEST_EVERY: Span = Span::from_secs(70);
/// No machine's clock is further from true time.
pub const AHEAD_MAX: i64 = SKEW.as_millis() / 2;

type Look = Pin<Box<dyn Future<Output = bool>>>;

pub struct Seat {
    pub name: String,
    pub role: ReplicaRole,
    pub clock: Arc<ManualClock>,
    pub line: Arc<Line>,
    pub declared: Vec<Declared>,
    pub engine: Option<Arc<Engine>>,
    /// True time until which no process runs.
    pub down_until: Timestamp,
    /// Its tasks do nothing until then; its listeners answer.
    pub stalled_until: Timestamp,
    /// Faults of its line end then.
    pub faulty_until: Timestamp,
    pub started_at: Timestamp,
    /// Since when nothing is wrong with it.
    pub well_since: Timestamp,
    /// When the last look began that ended well.
    pub looked: Option<Timestamp>,
    /// Turns since the last look began.
    idle: u32,
    own: Arc<Own>,
    look: Option<(Timestamp, Look)>,
}

impl Seat {
    pub fn new(name: String, role: ReplicaRole, clock: Arc<ManualClock>, line: Arc<Line>, now: Timestamp) -> Seat {
        Seat {
            name,
            role,
            clock,
            own: Own::new(line.clone()),
            line,
            declared: vec![declare("default", policy_of(0))],
            engine: None,
            down_until: now,
            stalled_until: now,
            faulty_until: now,
            started_at: now,
            well_since: now,
            idle: 0,
            looked: None,
            look: None,
        }
    }

    pub fn writes(&self) -> bool {
        self.role != ReplicaRole::Signer
    }

    pub fn signs(&self) -> bool {
        self.role != ReplicaRole::Manager
    }

    /// A process begins; why not, if it does not.
    pub async fn start(&mut self, common: &Common, now: Timestamp) -> Result<(), String> {
        self.line.revive();
        let booted = common.boot(self.role, &self.clock, &self.declared, self.line.clone(), self.own.clone()).await;
        self.line.started();
        if self.line.is_dead() {
            return Err("it died while it started".to_owned());
        }
        self.engine = Some(booted?);
        (self.started_at, self.well_since, self.looked) = (now, self.well_since.max(now), None);
        Ok(())
    }

    /// The process is gone, whatever it was doing.
    pub fn fall(&mut self, until: Timestamp) {
        (self.engine, self.look, self.looked) = (None, None, None);
        self.down_until = until;
    }

    pub fn lose_memory(&mut self) {
        self.line.forget();
        self.own = Own::new(self.line.clone());
    }

    /// What the process's tasks do within a moment. Looking at the store may take longer.
    pub async fn tick(&mut self, now: Timestamp, looks: bool) {
        let Some(engine) = self.engine.clone() else { return };
        self.idle += 1;
        if self.look.is_none() && (looks || self.idle > 2) {
            self.idle = 0;
            let engine = engine.clone();
            let work: Look = Box::pin(async move { engine.look_at_store(Span::ZERO).await.is_ok() });
            self.look = Some((now, work));
        }
        if let Some((began, look)) = &mut self.look
            && let Some(well) = progress(look, &self.line).await
        {
            if well {
                self.looked = Some(*began);
            }
            self.look = None;
        }
        let _ = engine.attend_once().await;
        engine.reconcile_all().await;
        engine.pulse().await;
    }

    pub fn cells(&self) -> Vec<Arc<KeysetCell>> {
        self.engine.as_ref().map(|engine| engine.directory().order.clone()).unwrap_or_default()
    }

    pub fn keyring(&self, keyset: &str) -> Option<Arc<Keyring>> {
        Some(self.engine.as_ref()?.keyset(keyset)?.snapshot.load().keyring.clone())
    }

    pub async fn command(&self, keyset: &str, intent: Intent) -> Result<Outcome, String> {
        let engine = self.engine.as_ref().ok_or("down")?;
        let cell = engine.keyset(keyset).ok_or("not known here")?;
        let (actor, reason) = ("sim".to_owned(), Some("simulation".to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        engine.command(&cell, request).await.map_err(|error| error.to_string())
    }

    /// Another configuration; a process that runs takes it at once.
    pub async fn configure(&mut self, declared: Vec<Declared>) -> Result<(), String> {
        if let Some(engine) = &self.engine {
            engine.configure(&declared).await.map_err(|errors| format!("{errors:?}"))?;
        }
        self.declared = declared;
        Ok(())
    }

    pub async fn sign(&self, cell: &KeysetCell) -> Result<Issued, String> {
        let request = parse_request(br#"{"claims":{"sub":"someone","aud":"somewhere"}}"#).unwrap();
        let engine = self.engine.as_ref().ok_or("down")?;
        engine.sign(cell, &request, None, "sim").await.map_err(|error| error.to_string())
    }

    pub fn is_ready_to_publish(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| engine.is_open() && engine.missing_to_publish().is_empty())
    }

    /// What a verifier that asks now gets.
    pub fn served(&self) -> Option<Served> {
        let document = self.engine.as_ref()?.directory().issuers.first()?.served()?;
        let header = document.cache_control.to_str().unwrap();
        let seconds = |name: &str| {
            let found = header.split(", ").find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            Span::from_secs(found.map_or(0, |seconds| seconds.parse().unwrap()))
        };
        let (max_age, stale_if_error) = (seconds("max-age"), seconds("stale-if-error"));
        Some(Served { body: document.body.to_vec(), max_age, stale_if_error })
    }

    /// The machine's clock is `ahead` milliseconds ahead of true time.
    pub fn set_clock(&self, truth: Timestamp, ahead: i64) {
        self.clock.step_to(Timestamp::from_millis(truth.as_millis() + ahead));
    }
}

/// Goes on until it is done or waits for an answer that is late.
async fn progress(look: &mut Look, line: &Line) -> Option<bool> {
    loop {
        let polled = poll_fn(|context| Poll::Ready(look.as_mut().poll(context))).await;
        match polled {
            Poll::Ready(well) => return Some(well),
            Poll::Pending if line.is_waiting() => return None,
            Poll::Pending => tokio::task::yield_now().await,
        }
    }
}
