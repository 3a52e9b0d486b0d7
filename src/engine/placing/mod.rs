//! Placing every issuer's documents where others serve them to verifiers, and knowing what is there.
//!
//! A key counts as published only once every place of its issuer was read back with it ([`Engine::is_placed`]).

mod blame;
mod pass;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cell::{IssuerCell, KeysetCell};
use super::reconcile::chain;
use crate::keyring::name::Name;
use crate::keyring::outlook::Alarm;
use crate::keyring::time::Span;
use crate::publisher::{PublishError, Publisher};
use crate::random;
use crate::telemetry::metrics::PublisherMetrics;

use blame::Left;
use pass::Pass;

/// What is placed is looked at again at least this often, and once per `max_age` where that is shorter.
const LOOK_AGAIN: Span = Span::MINUTE;
const LOOK_AGAIN_MIN: Span = Span::SECOND;

/// Attempts after a failure are at most this far apart.
const RETRY_MAX: Span = Span::from_secs(5);
const RETRY_MIN: Span = Span::from_millis(100);

/// A place that is behind for longer raises an alarm, unless replicas may lag for longer still.
const BEHIND_MAX: Span = Span::MINUTE;

/// By the issuer's URL.
pub(super) type Places = BTreeMap<String, Vec<Arc<Place>>>;

/// Where one issuer's documents are placed.
pub struct Place {
    /// URL of the issuer.
    issuer: String,
    name: Name,
    publisher: Arc<dyn Publisher>,
    /// Fires whenever the issuer's documents were rendered anew.
    rendered: watch::Sender<()>,
    /// One pass at a time.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

/// What is known of a place.
#[derive(Default)]
struct State {
    /// The kids that it showed, with exactly their members, when it was read last.
    shown: BTreeSet<String>,
    /// By path: the last document of ours.
    left: BTreeMap<String, Left>,
    /// By path: what was said of it since, and whether somebody else was to blame.
    told: BTreeMap<String, (bool, String)>,
    /// Boot time since which it was not found to be as it should.
    behind_since: Option<Span>,
    /// It lacks a key that counts as published: nothing may be promoted.
    lacking: bool,
    /// Boot time at which it was found that somebody else had changed it; until a later look finds it as it should be.
    foreign_since: Option<Span>,
    /// Why the last attempt failed.
    failing: Option<String>,
}

impl Place {
    /// `issuer` is the issuer's URL; `name` tells its places apart.
    pub fn new(issuer: String, name: Name, publisher: Arc<dyn Publisher>) -> Self {
        Place {
            issuer,
            name,
            publisher,
            rendered: watch::Sender::new(()),
            turn: tokio::sync::Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// Held for moments only.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine {
    /// From now on issuers are published at these places too. Once, before listeners open.
    pub fn place_at(&self, places: Vec<Place>) {
        for place in &places {
            if let Some(issuer) = self.issuer_of(place) {
                issuer.metrics.publisher(&place.name);
            }
        }
        let mut by_issuer = Places::new();
        for place in places {
            by_issuer.entry(place.issuer.clone()).or_default().push(Arc::new(place));
        }
        let known = self.places.set(by_issuer);
        debug_assert!(known.is_ok(), "places are set once");
    }

    /// Gives every place one chance to be right.
    pub async fn place_all(self: &Arc<Self>) {
        let mut passes = JoinSet::new();
        for place in self.every_place() {
            let (engine, place) = (self.clone(), place.clone());
            passes.spawn(async move { _ = engine.place(&place).await });
        }
        while passes.join_next().await.is_some() {}
    }

    /// Keeps every place right until cancelled. They do not wait for each other.
    pub async fn watch_places(self: Arc<Self>, cancel: CancellationToken) {
        let mut places = JoinSet::new();
        for place in self.every_place() {
            places.spawn(self.clone().watch_place(place.clone()));
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            Some(Err(error)) = places.join_next() => {
                if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic); // The supervisor starts all of them again.
                }
            }
        }
    }

    async fn watch_place(self: Arc<Self>, place: Arc<Place>) {
        let mut rendered = place.rendered.subscribe();
        let mut failures = 0;
        loop {
            rendered.borrow_and_update();
            let pause = match self.place(&place).await {
                Ok(Pass::Right) => {
                    failures = 0;
                    self.interval_of(&place)
                }
                Ok(Pass::NotYet) => LOOK_AGAIN_MIN,
                Ok(Pass::Behind) | Err(_) => {
                    failures += 1;
                    pause_after(failures)
                }
            };
            tokio::select! {
                () = self.clock.clock().sleep(pause) => {}
                // The sender lives as long as the place.
                _ = rendered.changed() => {}
            }
        }
    }

    /// One pass over a place, counted and told.
    async fn place(&self, place: &Place) -> Result<Pass, PublishError> {
        let _turn = place.turn.lock().await;
        let Some(issuer) = self.issuer_of(place) else { return Ok(Pass::Right) };
        let metrics = issuer.metrics.publisher(&place.name);
        place.state().behind_since.get_or_insert(self.clock.boot());
        let outcome = self.pass(place, &issuer).await;
        match &outcome {
            Ok(Pass::Behind) => {}
            Ok(Pass::Right | Pass::NotYet) => place.state().behind_since = None,
            Err(error) => not_placed(place, error, &metrics),
        }
        if let Ok(pass) = &outcome {
            if place.state().failing.take().is_some() {
                tracing::info!(issuer = %issuer.url, publisher = %place.name, "the publisher works again");
            }
            if *pass == Pass::Right {
                metrics.placed(self.clock.now());
            }
        }
        self.tell_mismatches(&issuer);
        outcome
    }

    /// Has an issuer's places take its documents.
    pub(super) fn rendered(&self, issuer: &IssuerCell) {
        for place in self.places_of(&issuer.url) {
            place.rendered.send_replace(());
        }
    }

    /// Whether every place of the issuer shows the key.
    pub(super) fn is_placed(&self, issuer: &IssuerCell, kid: &str) -> bool {
        self.places_of(&issuer.url).all(|place| place.state().shown.contains(kid))
    }

    /// Whether a place is known to lack a key that verifiers were to see.
    pub(super) fn is_lacking(&self, issuer: &IssuerCell) -> bool {
        self.places_of(&issuer.url).any(|place| place.state().lacking)
    }

    /// `jwksd_publication_mismatch`: probes that see something else, and places that somebody else changed.
    pub(super) fn tell_mismatches(&self, issuer: &IssuerCell) {
        // Held until it is told: of two who count at the same time the later one has the last word.
        let probes = issuer.probes();
        let places = self.places_of(&issuer.url).filter(|place| place.state().foreign_since.is_some()).count();
        issuer.metrics.set_publication_mismatch((probes.mismatches() + places) as u64);
    }

    /// What a keyset's places have to say.
    pub(super) fn place_alarms(&self, cell: &KeysetCell) -> BTreeSet<Alarm> {
        let lag = cell.snapshot.load().keyring.policy.rotation.publish_lag;
        let boot = self.clock.boot();
        let mut alarms = BTreeSet::new();
        for place in self.places_of(&cell.issuer.url) {
            let state = place.state();
            if state.foreign_since.is_some() {
                alarms.insert(Alarm::PublicationMismatch);
            }
            if state.behind_since.is_some_and(|since| boot.saturating_sub(since) > lag.max(BEHIND_MAX)) {
                alarms.insert(Alarm::PublisherFailing);
            }
        }
        alarms
    }

    fn places_of(&self, issuer: &str) -> impl Iterator<Item = &Arc<Place>> {
        self.places.get().and_then(|places| places.get(issuer)).into_iter().flatten()
    }

    fn every_place(&self) -> impl Iterator<Item = &Arc<Place>> {
        self.places.get().into_iter().flat_map(BTreeMap::values).flatten()
    }

    fn issuer_of(&self, place: &Place) -> Option<Arc<IssuerCell>> {
        self.directory().issuers.iter().find(|issuer| issuer.url == place.issuer).cloned()
    }

    fn interval_of(&self, place: &Place) -> Span {
        let max_age = self.issuer_of(place).map(|issuer| issuer.policy.load().max_age);
        max_age.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN).max(LOOK_AGAIN_MIN)
    }
}

fn not_placed(place: &Place, error: &PublishError, metrics: &PublisherMetrics) {
    metrics.failed();
    let told = chain(error);
    let mut state = place.state();
    if state.failing.as_ref() != Some(&told) {
        tracing::error!(issuer = %place.issuer, publisher = %place.name, error = %told, "the issuer's documents are not published there; it is tried again");
    }
    state.failing = Some(told);
}

/// Doubles, with full jitter: replicas that failed together do not come back together.
fn pause_after(failures: u32) -> Span {
    let most = RETRY_MIN.times(1 << failures.min(6)).min(RETRY_MAX);
    random::span_between(RETRY_MIN, most)
}
