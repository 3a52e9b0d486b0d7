//! Recording that this daemon is alive and publishing, and noticing when it was not: silences, suspends, clock steps.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cell::heartbeat_interval;
use super::reconcile::chain;
use crate::keyring::outlook::Alarm;
use crate::keyring::plan::FUTURE_TOLERATED;
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::{Alive, Ledger};

/// How long keys in other systems are kept after the store moved.
const DAY_AFTER_MOVE: Span = Span::DAY;

impl Engine {
    /// Reads what the last run recorded, and takes it over.
    pub async fn resume(&self) {
        let Ok(ledger) = self.ledger() else { return };
        if !self.is_reader() {
            self.settle_place(ledger).await;
            if let Err(error) = ledger.end_initialisation().await {
                tracing::debug!(error = %chain(&error), "whether the initialisation is complete will be looked at by the next start");
            }
        }
        match ledger.read_alive().await {
            Ok(own) => self.resume_from(latest(own, self.published_by_others().await).as_ref()),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "it is not known when the daemon was last alive; it is taken to have been away for long");
                self.resume_from(Some(&Alive::long_ago()));
            }
        }
    }

    /// A store that is somewhere else than before may be a copy beside its original: for a day nothing is destroyed that
    /// the original may still need.
    async fn settle_place(&self, ledger: &Ledger) {
        let now = self.clock.now();
        let moved_at = ledger.settle_place(now).await.unwrap_or_else(|error| {
            tracing::error!(error = %chain(&error), "it cannot be recorded where the store is");
            Some(now)
        });
        let Some(moved_at) = moved_at else { return };
        let wait = DAY_AFTER_MOVE.saturating_sub(now.since(moved_at));
        if !wait.is_zero() {
            tracing::warn!(%wait, "the store was somewhere else before: if this is a copy beside its original, the original's keys must not end here, so no key in another system is destroyed for a day");
            self.keep_remote_until.store((self.clock.boot() + wait).as_millis(), Ordering::Relaxed);
        }
    }

    /// Takes over what the last run recorded: the time it was last alive, silences and delays that still count.
    /// A clock behind that time freezes; a gap longer than the longest overlap delays removals (DESIGN §3.13).
    pub fn resume_from(&self, alive: Option<&Alive>) {
        let unknown = Alive::long_ago();
        let published = || {
            self.directory()
                .order
                .iter()
                .any(|cell| cell.snapshot.load().keyring.keys.iter().any(|key| key.published_at.is_some()))
        };
        let alive = match alive {
            Some(alive) => alive,
            None if published() => &unknown,
            None => return,
        };
        // The record of being alive is not always durable; what was written with a keyring is.
        let written =
            self.directory().order.iter().map(|cell| cell.snapshot.load().keyring.clone()).collect::<Vec<_>>();
        let written = written.iter().filter(|keyring| keyring.generation > 0).map(|keyring| keyring.written_at).max();
        let recorded = written.map_or(alive.at, |written| written.max(alive.at));
        let reading = self.clock.start_from(recorded);
        // It went on signing for up to an interval after its last record.
        self.clock.given_out(recorded.max(alive.latest.min(recorded + FUTURE_TOLERATED)) + self.interval());
        if reading.frozen {
            tracing::error!(recorded = %recorded, "the clock is behind the last recorded time: nothing that waits for time happens until it is right or accepted");
        }
        // With a seal that was late it publishes already, and the gap ended when that began.
        let boot = self.clock.boot();
        let began = self.open_since().unwrap_or(boot);
        let gap = (reading.now - boot.saturating_sub(began)).since(alive.at);
        let longest = self.longest_overlap();
        let delay = if gap > longest { longest } else { alive.removals_delay };
        if !delay.is_zero() {
            self.removals_wait.store((self.clock.boot() + delay).as_millis(), Ordering::Relaxed);
        }
        // Who removes nothing has nothing to wait with, and without a state of its own it is away at every start.
        if gap > longest && !longest.is_zero() && !self.is_reader() {
            tracing::warn!(gap = %gap, delay = %longest, "the daemon was away for longer than any overlap; removals wait once more");
        }
        if let Some(confirmed) = alive.confirmed.filter(|_| !reading.frozen) {
            // It may lie before this boot.
            let at = boot.as_millis().saturating_sub(reading.now.since(confirmed).as_millis());
            self.directory().order.iter().for_each(|cell| cell.confirm(at));
        }
        for issuer in &self.directory().issuers {
            if let Some(sampled) = alive.sampled.get(&issuer.url) {
                issuer.probes().resume(&self.keyrings_of(issuer), *sampled, reading.now, boot.as_millis());
            }
            // A frozen clock hides how long the gap was.
            if reading.frozen || gap > issuer.policy.load().max_age {
                issuer.resumed_not_before_boot_ms(began.as_millis());
            } else if let Some(resumed) = alive.resumed.get(&issuer.url) {
                let ago = reading.now.since(*resumed);
                issuer.resumed_not_before_boot_ms(boot.as_millis() - ago.as_millis());
            }
        }
    }

    /// Beats until cancelled. Each beat also looks at the clock, so that a step is noticed without any request.
    pub async fn beat(self: Arc<Self>, cancel: CancellationToken) {
        let mut last = self.clock.boot();
        let mut frozen = self.clock.read().frozen;
        self.pulse().await;
        loop {
            let interval = self.interval();
            self.moved();
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = self.clock.clock().sleep(interval) => {}
            }
            let boot = self.clock.boot();
            let silence = boot.saturating_sub(last);
            last = boot;
            self.notice_silence(silence, interval);
            let reading = self.clock.read();
            if reading.frozen != frozen {
                frozen = reading.frozen;
                self.clock_changed(frozen, reading.now);
            }
            self.pulse().await;
            self.revive();
        }
    }

    /// One record that the daemon is alive.
    pub async fn pulse(&self) {
        self.last_beat.store(self.clock.boot().as_millis(), Ordering::Relaxed);
        let reading = self.clock.read();
        self.metrics.set_clock_frozen(reading.frozen);
        let Ok(ledger) = self.ledger() else { return };
        if reading.frozen || !self.is_open() || self.is_sealed() {
            return; // Nothing is recorded with a time that may be wrong, nor before anything is published.
        }
        let boot = self.clock.boot().as_millis();
        let directory = self.directory();
        let sampled = directory.issuers.iter().filter_map(|issuer| {
            let until = issuer.probes().known_until()?;
            Some((issuer.url.clone(), Timestamp::from_millis(reading.now.as_millis() - (boot - until))))
        });
        let wait = self.removals_wait.load(Ordering::Relaxed);
        let confirmed = directory.order.iter().filter_map(|cell| cell.confirmed_at()).min();
        let confirmed = confirmed.filter(|at| *at != i64::MIN);
        let alive = Alive {
            at: reading.now,
            resumed: self.resumed_by_url(),
            removals_delay: Span::from_millis(wait.saturating_sub(boot)),
            latest: self.clock.latest(),
            sampled: sampled.collect(),
            confirmed: confirmed.map(|at| Timestamp::from_millis(reading.now.as_millis() - (boot - at))),
        };
        let _waiting = self.waits_for_store();
        let failing = match ledger.write_alive(&alive).await {
            Ok(()) => false,
            Err(error) => {
                if !self.heartbeat_failing.load(Ordering::Relaxed) {
                    tracing::error!(error = %chain(&error), "cannot record that the daemon is alive; it is tried again");
                }
                true
            }
        };
        self.heartbeat_failing.store(failing, Ordering::Relaxed);
        if !failing {
            for cell in directory.order.iter().filter(|cell| cell.snapshot.load().store_failing) {
                self.edit(cell, |shown| shown.store_failing = false).await;
            }
        }
        if let Err(error) = self.confirm_created().await {
            tracing::error!(error = %chain(&error), "cannot record that a keyset was created; it is tried again");
        }
    }

    pub(super) fn heartbeat_fails(&self) -> bool {
        self.heartbeat_failing.load(Ordering::Relaxed)
    }

    /// Takes the clock as it is for right.
    pub(super) fn thaw(&self) -> Timestamp {
        let reading = self.clock.accept();
        // How much time really passed nobody knows: what waits for time waits once more.
        let boot = self.clock.boot();
        self.removals_wait.store((boot + self.longest_overlap()).as_millis(), Ordering::Relaxed);
        for issuer in &self.directory().issuers {
            issuer.set_resumed_boot_ms(boot.as_millis());
        }
        self.clock_changed(false, reading.now);
        reading.now
    }

    /// Whether the configuration on disk is the one that runs.
    pub fn set_configuration_valid(&self, valid: bool) {
        self.metrics.set_config_last_reload_successful(valid);
        self.metrics.set_alarm(Alarm::ConfigInvalid, u64::from(!valid));
    }

    /// Announces that the guard froze or thawed, and has everything planned again.
    pub fn clock_changed(&self, frozen: bool, now: Timestamp) {
        self.metrics.set_clock_frozen(frozen);
        if frozen {
            tracing::error!(%now, "the wall clock stepped: nothing that waits for time happens; signing goes on by boot time");
        } else {
            tracing::warn!(%now, "the wall clock is trusted again");
        }
        self.wake_all();
    }

    /// A process that was stopped, or a machine that slept, published nothing meanwhile.
    fn notice_silence(&self, silence: Span, interval: Span) {
        let boot = self.clock.boot().as_millis();
        for issuer in &self.directory().issuers {
            if silence > issuer.policy.load().max_age.max(interval.times(3)) {
                issuer.set_resumed_boot_ms(boot);
                tracing::warn!(issuer = %issuer.url, silence = %silence, "nothing was published for longer than max_age; promotions wait until verifiers could see the keys again");
            }
        }
        if silence > interval.times(3) {
            self.wake_all();
        }
    }

    /// Whether this process was asleep for so long that its documents may have left every cache.
    pub(super) fn is_silent(&self, max_age: Span, boot: Span) -> bool {
        let last = Span::from_millis(self.last_beat.load(Ordering::Relaxed));
        self.is_open() && boot.saturating_sub(last) > max_age.max(heartbeat_interval(max_age).times(3))
    }

    pub(super) fn open_since(&self) -> Option<Span> {
        Some(self.open_since.load(Ordering::Relaxed)).filter(|at| *at != i64::MIN).map(Span::from_millis)
    }

    pub(super) fn interval(&self) -> Span {
        let directory = self.directory();
        let shortest = directory.issuers.iter().map(|issuer| issuer.policy.load().max_age).min();
        heartbeat_interval(shortest.unwrap_or(Span::MINUTE))
    }

    fn longest_overlap(&self) -> Span {
        let directory = self.directory();
        let overlaps = directory.order.iter().map(|cell| {
            let keyring = cell.snapshot.load().keyring.clone();
            let keys = keyring.published().map(|key| keyring.overlap_of(key)).max();
            keys.unwrap_or(Span::ZERO).max(keyring.policy.overlap())
        });
        overlaps.max().unwrap_or(Span::ZERO)
    }
}

/// What this process recorded, or what others published later: a replica that comes back to others was no silence.
fn latest(own: Option<Alive>, others: Option<Alive>) -> Option<Alive> {
    match (own, others) {
        (Some(own), Some(others)) if others.at > own.at => {
            Some(Alive { at: others.at, resumed: others.resumed, removals_delay: Span::ZERO, ..own })
        }
        (Some(own), _) => Some(own),
        (None, others) => others,
    }
}
