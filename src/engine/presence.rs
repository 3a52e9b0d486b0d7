//! Telling other replicas what this one publishes, and waiting for those that lag.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::cell::{KeysetCell, Laggards};
use super::reconcile::chain;
use super::{Engine, ReplicaRole};
use crate::keyring::decide::UnconfirmedReplica;
use crate::keyring::record::{KeyState, Serial};
use crate::keyring::time::{Span, Timestamp};
use crate::random::Entropy;
use crate::store::ledger::{Alive, LedgerError};
use crate::store::relay::Relay;
use crate::store::shared::{LONGEST_REPLICA, REMEMBERED, Replica, Report};

/// Reports come at least this often, and more often where `publish_lag` is short.
const INTERVAL_MAX: Span = Span::from_secs(15);
const INTERVAL_MIN: Span = Span::from_millis(100);

/// The kind of store behind which managers stand, who do not tell of other replicas.
const READ_FROM_MANAGERS: &str = "upstream";

/// How long a revocation waits to learn who may not hear of it.
const REVOCATION_WAITS: Span = Span::SECOND;

/// Replicas that one answer names, at most: it is kept in the keyring.
const UNCONFIRMED_MAX: usize = 1000;

/// What is known of the other replicas.
#[derive(Default)]
pub(super) struct Presence {
    changed: Notify,
    /// Boot time at which the others were last asked, in milliseconds; 0: never.
    asked: AtomicI64,
    /// For how long that answer holds, in milliseconds.
    holds: AtomicI64,
    /// Where replicas report that have no store of their own, if this process has one to itself.
    relay: OnceLock<Arc<Relay>>,
}

/// Replicas of one store.
pub struct Known {
    pub own: Report,
    pub others: Vec<Replica>,
    /// There are no others, but for those that were silent for longer than asked.
    pub complete: bool,
    /// A replica that publishes and reported within this is waited for.
    pub waited_for: Span,
}

impl Presence {
    /// This process shows something else than it reported.
    pub(super) fn changed(&self) {
        self.changed.notify_one();
    }
}

impl Engine {
    /// The name of this process among the replicas of its store.
    pub fn replica(&self) -> &str {
        &self.replica
    }

    pub fn role(&self) -> super::ReplicaRole {
        self.role
    }

    /// Whether it is not known what other replicas publish: then nothing is promoted that waits for them.
    pub(super) fn others_are_unknown(&self) -> bool {
        if !self.shared && self.presence.relay.get().is_none() {
            return false;
        }
        let asked = self.presence.asked.load(Ordering::Relaxed);
        let holds = self.presence.holds.load(Ordering::Relaxed);
        asked == 0 || self.clock.boot().as_millis().saturating_sub(asked) > holds
    }

    fn was_open_for(&self, span: Span) -> bool {
        self.open_since().is_some_and(|since| self.clock.boot().saturating_sub(since) >= span)
    }

    /// Replicas report to `relay`.
    pub fn hear(&self, relay: Arc<Relay>) {
        let _ = self.presence.relay.set(relay);
    }

    /// Reports until cancelled, and looks which others lag.
    pub async fn attend(self: Arc<Self>, cancel: CancellationToken) {
        let mut failing = false;
        while !cancel.is_cancelled() {
            match self.attend_once().await {
                Ok(()) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(error = %chain(&error), "other replicas cannot be told what this one publishes; it is tried again");
                }
                Err(_) => {}
            }
            let interval = self.jittered(self.report_interval());
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                // Only what is published is waited for. Many replicas see one change: they do not all report at once.
                () = self.presence.changed.notified(), if self.publishes() => {
                    self.clock.clock().sleep(self.entropy.span_between(Span::ZERO, Span::from_millis(interval.as_millis() / 4).min(Span::SECOND))).await;
                }
                () = self.clock.clock().sleep(interval) => {}
            }
        }
    }

    /// The last thing that a replica says, when it serves and signs no more. One that publishes nothing is forgotten; of one
    /// that did it stays known when that was last.
    pub async fn take_leave(&self) {
        let store = self.store();
        let Some(shared) = store.as_ref().and_then(|store| store.shared()) else { return };
        let told = match self.publishes() {
            true => shared.report(&[Report { stopped: true, tells: false, ..self.own_report() }]).await,
            false => shared.forget(&[&self.replica]).await,
        };
        if let Err(error) = told {
            tracing::debug!(error = %chain(&error), "the store could not be told that this replica stops");
        }
    }

    /// One report and one look at the others.
    pub async fn attend_once(self: &Arc<Self>) -> Result<(), LedgerError> {
        let store = self.store();
        let shared = store.as_ref().and_then(|store| store.shared());
        let mut others = match (shared, self.presence.relay.get()) {
            (Some(shared), _) => {
                shared.report(&[self.own_report()]).await?;
                if self.is_reader() || self.is_sealed() {
                    return Ok(());
                }
                shared.replicas(self.lag_limit()).await?
            }
            (None, Some(relay)) if self.was_open_for(self.lag_limit()) => relay.reported(self.lag_limit()),
            // Those that report here have not had the time to.
            (None, _) => return Ok(()),
        };
        others.retain(|other| other.report.replica != self.replica);
        self.notices.heed(&others, &self.replica);
        for cell in &self.directory().order {
            self.note_laggards(cell, &others);
        }
        self.heed(&others).await?;
        let holds = self.lag_limit().max(self.report_interval().times(4));
        self.presence.holds.store(holds.as_millis(), Ordering::Relaxed);
        self.presence.asked.store(self.clock.boot().as_millis(), Ordering::Relaxed);
        Ok(())
    }

    /// A store that holds less than a replica saw went backwards, also for a process that never saw more.
    async fn heed(self: &Arc<Self>, others: &[Replica]) -> Result<(), LedgerError> {
        let saw_more = |cell: &KeysetCell| {
            let shown = cell.snapshot.load().keyring.generation;
            let generations = others.iter().filter_map(|other| other.report.generations.get(&cell.name).copied());
            generations.max().filter(|seen| *seen > shown)
        };
        for cell in &self.directory().order {
            if cell.snapshot.load().frozen.is_some() || saw_more(cell).is_none() {
                continue;
            }
            // Mostly they were only faster.
            let mut writer = cell.writer.lock().await;
            self.load_again(cell, &mut writer).await?;
            let generation = cell.snapshot.load().keyring.generation;
            if let Some(seen) = saw_more(cell).filter(|_| cell.snapshot.load().frozen.is_none()) {
                let location = self.ledger()?.locate(&cell.name);
                self.distrust(cell, &LedgerError::OlderThanSeen { location, generation, seen });
            }
        }
        Ok(())
    }

    /// This process and, behind it in order of name, the replicas that reported within `longest`, as far as they can be
    /// known here: who reads from managers is not told of others.
    pub async fn replicas(&self, longest: Span) -> Result<Known, LedgerError> {
        let store = self.store();
        let mut others = match (store.as_ref().and_then(|store| store.shared()), self.presence.relay.get()) {
            (Some(shared), _) => shared.replicas(longest).await?,
            (None, Some(relay)) => relay.reported(longest),
            (None, None) => Vec::new(),
        };
        others.retain(|other| other.report.replica != self.replica);
        others.sort_by(|a, b| a.report.replica.cmp(&b.report.replica));
        let kind = store.as_ref().map(|store| store.kind());
        let complete = kind.is_some_and(|kind| kind != READ_FROM_MANAGERS);
        Ok(Known { own: self.own_report(), others, complete, waited_for: self.lag_limit() })
    }

    /// Who of the others may use a key of `cell` on when it is revoked now: those that were silent for longer than is waited
    /// for, until they would be unready and sign no more, and those that report without having taken up what is older
    /// than that, be it a promotion alone: who does not follow the store does not hear of a revocation either. Not those that
    /// stopped in good order. `None` where the store does not tell (a revocation does not wait for it), and where nobody is to
    /// be named but somebody may have been forgotten.
    pub(super) async fn unconfirmed_replicas(&self, cell: &KeysetCell) -> Option<Vec<UnconfirmedReplica>> {
        let keyring = cell.snapshot.load().keyring.clone();
        // What was written carries the time of who wrote it.
        let skew = keyring.policy.rotation.clock_skew;
        let (publishing, signing) = (keyring.policy.publishing_limit(), keyring.policy.rotation.staleness_limit);
        let longest = publishing.max(signing);
        let known = tokio::select! {
            biased;
            known = self.replicas(longest) => known.ok()?,
            () = self.clock.clock().sleep(REVOCATION_WAITS) => return None,
        };
        let now = self.clock.now();
        let is_unconfirmed = |other: &&Replica| {
            let report = &other.report;
            let publishes = if report.publishes { publishing } else { Span::ZERO };
            let signs = if report.role == ReplicaRole::Manager.as_str() { Span::ZERO } else { signing };
            // Whoever knows nothing of the keyset has another configuration.
            let shown = report.generations.get(&cell.name).copied().unwrap_or(u64::MAX);
            match other.age > known.waited_for {
                _ if report.stopped => false,
                true => other.age <= publishes.max(signs),
                false => keyring.wrote_after(shown, now - other.age - known.waited_for - skew),
            }
        };
        let named = known.others.iter().filter(is_unconfirmed).take(UNCONFIRMED_MAX).map(|other| UnconfirmedReplica {
            name: other.report.replica.clone(),
            last_seen_at: now - other.age,
            publishes: other.report.publishes,
            generation: other.report.generations.get(&cell.name).copied(),
        });
        let named: Vec<UnconfirmedReplica> = named.collect();
        (!named.is_empty() || self.remembers_replicas_for(longest)).then_some(named)
    }

    /// Whether all that reported within `longest` are known: stores forget those that were silent for long, and those that report
    /// to this process are known since its start.
    fn remembers_replicas_for(&self, longest: Span) -> bool {
        match self.shared {
            true => longest <= REMEMBERED,
            false => self.presence.relay.get().is_none() || self.was_open_for(longest),
        }
    }

    fn own_report(&self) -> Report {
        let directory = self.directory();
        let shown = directory.order.iter().map(|cell| (cell.name.clone(), cell.snapshot.load().keyring.generation));
        let publishes = self.publishes() && self.is_open();
        Report {
            replica: self.replica.clone(),
            role: self.role.as_str().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            publishes,
            tells: self.can_tell(),
            stopped: false,
            generations: shown.collect(),
            resumed: if publishes { self.resumed_by_url() } else { BTreeMap::new() },
        }
    }

    /// By URL of each issuer: since when this process publishes without a long silence, where there was one.
    pub(super) fn resumed_by_url(&self) -> BTreeMap<String, Timestamp> {
        let (now, boot) = (self.clock.now(), self.clock.boot().as_millis());
        let directory = self.directory();
        let resumed = directory.issuers.iter().filter_map(|issuer| {
            let at = issuer.resumed_boot_ms()?;
            Some((issuer.url.clone(), Timestamp::from_millis(now.as_millis() - (boot - at))))
        });
        resumed.collect()
    }

    /// When any replica last published, as far as the store knows. It keeps this process from taking its own absence for
    /// a silence.
    pub(super) async fn published_by_others(&self) -> Option<Alive> {
        let shared = self.ledger().ok()?.shared()?;
        let replicas = shared.replicas(Span::DAY).await.ok()?;
        let publishing =
            replicas.into_iter().filter(|other| other.report.publishes && other.report.replica != self.replica);
        let last = publishing.min_by_key(|other| other.age)?;
        Some(Alive { at: self.clock.now() - last.age, resumed: last.report.resumed, ..Alive::long_ago() })
    }

    /// Which of `others` publish and lack a waiting key.
    fn note_laggards(&self, cell: &KeysetCell, others: &[Replica]) {
        let keyring = cell.snapshot.load().keyring.clone();
        let boot = self.clock.boot();
        let mut laggards = cell.laggards.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = keyring.keys.iter().filter(|key| matches!(key.state, KeyState::Pending | KeyState::Standby));
        let mut noted: BTreeMap<Serial, Laggards> = BTreeMap::new();
        for key in waiting {
            let lags = |other: &&Replica| {
                let shown = other.report.generations.get(&cell.name).copied().unwrap_or(0);
                other.report.publishes && shown < key.since_generation
            };
            let replicas: Vec<String> = others.iter().filter(lags).map(|other| other.report.replica.clone()).collect();
            let before = laggards.remove(&key.serial);
            if replicas.is_empty() {
                noted.extend(before.map(|before| (key.serial, Laggards { replicas, ..before })));
            } else {
                let since = before.filter(|before| !before.replicas.is_empty()).map_or(boot, |before| before.since);
                noted.insert(key.serial, Laggards { since, until: boot, replicas });
            }
        }
        let changed = laggards.len() != noted.len() || !noted.is_empty();
        *laggards = noted;
        drop(laggards);
        if changed {
            cell.wake.notify_one();
        }
    }

    /// Between three quarters of a span and all of it: replicas that began together do not stay together.
    pub(super) fn jittered(&self, span: Span) -> Span {
        self.entropy.span_between(Span::from_millis(span.as_millis() / 4 * 3), span)
    }

    /// Replicas that have not reported for this long are not waited for: what they may still serve, propagation covers.
    fn lag_limit(&self) -> Span {
        let directory = self.directory();
        let lags = directory.order.iter().map(|cell| cell.snapshot.load().keyring.policy.rotation.publish_lag);
        lags.max().unwrap_or(Span::MINUTE)
    }

    fn report_interval(&self) -> Span {
        let directory = self.directory();
        let lags = directory.order.iter().map(|cell| cell.snapshot.load().keyring.policy.rotation.publish_lag);
        let shortest = lags.min().unwrap_or(Span::MINUTE);
        Span::from_millis(shortest.as_millis() / 4).min(INTERVAL_MAX).max(INTERVAL_MIN)
    }
}

/// The machine's name, for people, and something random, since a name may come back.
pub(super) fn replica_name(entropy: &dyn Entropy) -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let plain: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')).collect();
    let id = entropy.early_id();
    let room = LONGEST_REPLICA - 9;
    format!("{}/{}", &plain[..plain.len().min(room)], &id[..8])
}
