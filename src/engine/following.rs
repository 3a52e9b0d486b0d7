//! Taking up what other replicas of a shared store wrote, and knowing when the store last confirmed what is shown.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cell::{KeysetCell, Writer};
use super::reconcile::chain;
use crate::clock::Reading;
use crate::keyring::name::Name;
use crate::keyring::record::{KeyState, Keyring};
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::{Ledger, LedgerError, Loaded};
use crate::store::shared::{Heads, Revision, SharedStore};
use crate::store::{Digest, Document, StoreError};

/// The longest that one look waits for news; policies with short limits look more often.
const WAIT_MAX: Span = Span::from_secs(20);
const WAIT_MIN: Span = Span::from_millis(100);

/// After a failure the next look comes within this.
const RETRY_MAX: Span = Span::from_secs(2);
const RETRY_MIN: Span = Span::from_millis(100);

/// An answer that took no longer than this tells the store's clock well enough.
const QUICK: Span = Span::SECOND;

/// How long a new active key may take to open before the keyring is shown without it. A revocation waits for no backend.
const OPEN_WITHIN: Duration = Duration::from_secs(1);

/// Where this process is in following its store.
#[derive(Default)]
pub(super) struct Following {
    /// What was taken up last; held by whoever looks.
    known: Mutex<Option<Revision>>,
    /// The store's clock and ours differ by more than σ.
    clock_differs: AtomicBool,
    /// The last look failed.
    failing: AtomicBool,
    /// Boot time of the last look that read everything, in milliseconds; 0: none yet.
    read: AtomicI64,
    /// The same of the last one that also confirmed it.
    confirmed: AtomicI64,
}

impl Following {
    pub(super) fn clock_differs(&self) -> bool {
        self.clock_differs.load(Ordering::Relaxed)
    }

    /// Boot time at which everything was last read, in milliseconds.
    pub(super) fn read(&self) -> i64 {
        Some(self.read.load(Ordering::Relaxed)).filter(|at| *at != 0).unwrap_or(i64::MIN)
    }

    /// Boot time at which everything was last confirmed, in milliseconds.
    pub(super) fn confirmed(&self) -> i64 {
        Some(self.confirmed.load(Ordering::Relaxed)).filter(|at| *at != 0).unwrap_or(i64::MIN)
    }

    pub(super) fn fails(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }
}

impl Engine {
    /// Follows the shared store until cancelled: each look waits for news and ends with everything taken up.
    pub async fn follow(self: Arc<Self>, cancel: CancellationToken) {
        let mut failures: u32 = 0;
        while !cancel.is_cancelled() {
            let looked = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                looked = self.look_at_store(self.patience()) => looked,
            };
            self.following.failing.store(looked.is_err(), Ordering::Relaxed);
            let Err(error) = looked else {
                if failures > 0 {
                    tracing::info!(failures, "the store answers again");
                }
                failures = 0;
                if self.is_anything_frozen() {
                    // What could not be trusted may be put right without another change.
                    tokio::select! {
                        biased;
                        () = cancel.cancelled() => return,
                        () = self.clock.clock().sleep(self.jittered(RETRY_MAX)) => {}
                    }
                }
                continue;
            };
            if failures == 0 {
                tracing::error!(error = %chain(&error), "the store cannot be followed: what was read last goes on; it is tried again");
            }
            failures = failures.saturating_add(1);
            let pause = RETRY_MIN.times(1 << failures.min(5)).min(RETRY_MAX);
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = self.clock.clock().sleep(self.jittered(pause)) => {}
            }
        }
    }

    /// Looks once, waiting for news for up to `wait`: takes up what changed, and notes when that was confirmed.
    pub async fn look_at_store(self: &Arc<Self>, wait: Span) -> Result<(), LedgerError> {
        let Some(store) = self.store() else { return Ok(()) };
        let Some(shared) = store.shared() else { return Ok(()) };
        let mut known = self.following.known.lock().await;
        let (heads, asked, agrees) = self.ask(shared, known.as_ref(), wait).await?;
        self.note_clock(agrees, heads.store_time);
        let taken = match &heads.documents {
            Some(documents) => {
                // Whatever fails now, or cannot be trusted, is looked at again.
                *known = None;
                match self.is_sealed() {
                    true => self.show_claims().await,
                    false => self.take_up(documents).await,
                }
            }
            None => Ok(()),
        };
        let at = asked.boot.as_millis().saturating_sub(heads.age.as_millis());
        // What nobody has proved is confirmed by nobody; but it was read.
        if taken.is_ok() || !self.is_sealed() {
            self.confirm_all(at, agrees && !self.is_sealed());
        }
        if taken.is_ok() && !self.is_anything_frozen() {
            *known = Some(heads.revision);
            self.following.read.fetch_max(at, Ordering::Relaxed);
            if agrees && !self.is_sealed() {
                self.following.confirmed.fetch_max(at, Ordering::Relaxed);
            }
        }
        taken
    }

    /// What was taken up unproved is looked at again.
    pub(super) async fn forget_claims(&self) {
        if let Ok(mut known) = self.following.known.try_lock() {
            *known = None;
        }
    }

    /// What the store holds, when that was asked for, and whether its clock agrees with ours.
    async fn ask(
        &self,
        shared: &dyn SharedStore,
        known: Option<&Revision>,
        wait: Span,
    ) -> Result<(Heads, Reading, bool), StoreError> {
        let asked = self.clock.read();
        let heads = shared.heads(known, wait.to_std()).await?;
        self.thaw_if_right(heads.store_time);
        let got = self.clock.read();
        if self.is_between(heads.store_time, asked.now.max(got.now - QUICK), got.now) {
            return Ok((heads, asked, true));
        }
        // Its answer was slow, or one of the clocks is wrong.
        let asked = self.clock.read();
        let heads = shared.heads(known, Duration::ZERO).await?;
        let agrees = self.is_between(heads.store_time, asked.now, self.clock.now());
        Ok((heads, asked, agrees))
    }

    /// A clock that stepped is trusted again once it agrees with the store's.
    fn thaw_if_right(&self, store_time: Timestamp) {
        let wall = self.clock.clock().wall();
        if self.clock.read().frozen && self.is_between(store_time, wall - QUICK, wall) {
            self.thaw();
        }
    }

    fn is_between(&self, time: Timestamp, from: Timestamp, to: Timestamp) -> bool {
        let tolerance = self.clock.tolerance();
        from - tolerance <= time && time <= to + tolerance
    }

    fn note_clock(&self, agrees: bool, store_time: Timestamp) {
        if self.following.clock_differs.swap(!agrees, Ordering::Relaxed) != agrees {
            return;
        }
        let now = self.clock.now();
        if agrees {
            tracing::warn!(%now, "the store's clock agrees with this machine's again");
        } else {
            tracing::error!(%now, %store_time, "the store's clock and this machine's differ by more than clock_skew: no transition happens here, and signing ends with staleness_limit; set the clock that is wrong");
        }
        self.wake_all();
    }

    /// Brings everything to what the store holds.
    async fn take_up(self: &Arc<Self>, documents: &BTreeMap<Document, Digest>) -> Result<(), LedgerError> {
        // Until each has caught up, nobody knows what it lacks.
        self.directory().order.iter().for_each(|cell| cell.behind.store(true, Ordering::Relaxed));
        if !self.take_up_installation(documents.get(&Document::Installation)).await? {
            return Ok(());
        }
        self.begin_as_registered().await;
        let directory = self.directory();
        let stored = documents.keys().filter_map(|document| match document {
            Document::Keyring(name) => Some(name),
            _ => None,
        });
        let new = stored.into_iter().any(|name| !directory.keysets.contains_key(name));
        let (changed, mut failed) = self.catch_up_all(documents).await;
        if new || changed {
            self.rebuild().await?;
            failed = self.catch_up_all(documents).await.1;
        }
        self.settle_tolerance();
        self.completeness_changed();
        self.settle_completeness().await;
        self.presence.changed();
        failed.map_or(Ok(()), Err)
    }

    /// Whether paths or issuers have changed, and the first failure: one keyset that cannot be read keeps no other from a
    /// revocation.
    async fn catch_up_all(self: &Arc<Self>, documents: &BTreeMap<Document, Digest>) -> (bool, Option<LedgerError>) {
        let (mut changed, mut failed) = (false, None);
        for cell in &self.directory().order {
            let head = documents.get(&Document::Keyring(cell.name.clone())).copied();
            let caught_up = self.catch_up(cell, head).await;
            cell.behind.store(caught_up.is_err(), Ordering::Relaxed);
            match caught_up {
                Ok(other) => changed |= other,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        (changed, failed)
    }

    fn is_anything_frozen(&self) -> bool {
        self.directory().order.iter().any(|cell| cell.snapshot.load().is_frozen_by_store())
    }

    /// A process that reads the policies takes σ from them; others take it from their configuration.
    pub(super) fn settle_tolerance(&self) {
        if !self.is_reader() {
            return;
        }
        let directory = self.directory();
        let skews = directory.order.iter().map(|cell| cell.snapshot.load().keyring.policy.rotation.clock_skew);
        self.clock.set_tolerance(skews.min().unwrap_or_default());
    }

    /// Whether the installation's record can be relied on. If not, nothing else can be judged.
    async fn take_up_installation(&self, head: Option<&Digest>) -> Result<bool, LedgerError> {
        let ledger = self.ledger()?;
        if head == Some(&ledger.installation_digest()) && !self.is_everything_frozen() {
            return Ok(true);
        }
        match ledger.refresh().await {
            Ok(()) => Ok(true),
            Err(error) if error.is_distrust() => {
                for cell in &self.directory().order {
                    let _writer = cell.writer.lock().await;
                    self.distrust(cell, &error);
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn is_everything_frozen(&self) -> bool {
        let directory = self.directory();
        !directory.order.is_empty() && directory.order.iter().all(|cell| cell.snapshot.load().is_frozen_by_store())
    }

    /// Brings a keyset to the record with the digest `head`, or a newer one. Whether paths or issuers have changed.
    async fn catch_up(self: &Arc<Self>, cell: &Arc<KeysetCell>, head: Option<Digest>) -> Result<bool, LedgerError> {
        let mut writer = cell.writer.lock().await;
        let snapshot = cell.snapshot.load_full();
        let current = writer.stored.as_ref().map(|stored| stored.digest);
        if head == current && !snapshot.is_frozen_by_store() && writer.unsettled.is_none() {
            return Ok(false);
        }
        self.load_again(cell, &mut writer).await?;
        let (before, next) = (&snapshot.keyring, cell.snapshot.load_full().keyring.clone());
        Ok(cell.moved.load(Ordering::Relaxed)
            || before.policy.issuer != next.policy.issuer
            || before.drained != next.drained)
    }

    /// Takes up the stored keyring, whoever wrote it. One that cannot be trusted freezes the keyset until the store holds
    /// one that can. The caller holds the writer.
    pub(super) async fn load_again(&self, cell: &Arc<KeysetCell>, writer: &mut Writer) -> Result<(), LedgerError> {
        let ledger = self.ledger()?;
        let shown = cell.snapshot.load().keyring.clone();
        let accept = |found: &Keyring| lost_revocation(&shown, found, ledger.locate(&cell.name)).map_or(Ok(()), Err);
        let loaded = load_current(ledger, &cell.name, accept).await;
        let refused = match loaded {
            Ok(Some(loaded)) => return self.show_adopted(cell, writer, loaded).await,
            Ok(None) => return Ok(()),
            Err(error) if error.is_distrust() => error,
            Err(error) => return Err(error),
        };
        self.distrust(cell, &refused);
        self.refresh_metrics(cell);
        Ok(())
    }

    async fn show_adopted(
        &self,
        cell: &Arc<KeysetCell>,
        writer: &mut Writer,
        loaded: Loaded,
    ) -> Result<(), LedgerError> {
        let before = cell.snapshot.load_full();
        let same = writer.stored.as_ref().is_some_and(|stored| stored.digest == loaded.digest);
        writer.unsettled = None;
        cell.uncertain.store(false, Ordering::Release);
        if loaded.keyring.policy.issuer.url != cell.issuer.url {
            // Another issuer's keys have no place in this one's documents: the keyset begins anew beside them.
            cell.moved.store(true, Ordering::Relaxed);
            return Ok(());
        }
        if before.is_frozen_by_store() {
            tracing::warn!(keyset = %cell.name, generation = loaded.keyring.generation, "the stored record can be trusted again");
            let mut thawed = (*before).clone();
            (thawed.frozen, thawed.unauthenticated, thawed.thaws) = (None, false, false);
            cell.snapshot.store(Arc::new(thawed));
        } else if same {
            return Ok(());
        }
        let next = loaded.keyring.clone();
        writer.stored = Some(loaded);
        cell.leads.store(same, Ordering::Relaxed);
        cell.gives_way_until.store(0, Ordering::Relaxed);
        let opening = tokio::time::timeout(OPEN_WITHIN, self.ready_signer(cell, &next));
        // A signer that cannot be opened now is opened by the next pass.
        let signer = opening.await.ok().and_then(Result::ok).flatten();
        self.show(cell, next.clone(), signer);
        self.report(cell, &before.keyring, &next);
        self.refresh_metrics(cell);
        cell.wake.notify_one();
        Ok(())
    }

    /// What was true of the store at `at`, in boot time, in milliseconds, is true of what is shown.
    fn confirm_all(&self, at: i64, agrees: bool) {
        for cell in &self.directory().order {
            let current = !cell.behind.load(Ordering::Relaxed) && !cell.moved.load(Ordering::Relaxed);
            if !current || cell.snapshot.load().frozen.is_some() {
                continue;
            }
            cell.note_read(at);
            if agrees {
                cell.confirm(at);
            }
        }
    }

    /// How long one look may wait: what is declared of this process's delays must hold.
    fn patience(&self) -> Span {
        let limits = self
            .directory()
            .order
            .iter()
            .map(|cell| {
                let rotation = cell.snapshot.load().keyring.policy.rotation.clone();
                let lag = Span::from_millis(rotation.publish_lag.as_millis() / 3);
                lag.min(Span::from_millis(rotation.staleness_limit.as_millis() / 4))
            })
            .collect::<Vec<_>>();
        limits.into_iter().min().unwrap_or(WAIT_MAX).min(WAIT_MAX).max(WAIT_MIN)
    }

    /// Keeps an issuer back until every keyset that begins with it has its first key: a replica that saw only some of
    /// them would hand out documents without keys that sign at once. Once anything was published it never applies again.
    pub(super) async fn settle_completeness(self: &Arc<Self>) {
        if !self.is_shared() || self.complete.load(Ordering::Relaxed) {
            return;
        }
        let mut complete = true;
        let Some(installation) = self.installation() else { return };
        let directory = self.directory();
        let begun =
            |keyring: &Keyring| keyring.active().is_some() || keyring.last_promotion_at.is_some() || keyring.drained;
        let begins = installation.keysets.iter().filter(|(name, entry)| {
            let cell = directory.keysets.get(*name);
            self.uses(name) && entry.first && !cell.is_some_and(|cell| begun(&cell.snapshot.load().keyring))
        });
        let waiting: HashSet<&str> = begins.map(|(_, entry)| entry.issuer.as_str()).collect();
        for issuer in &directory.issuers {
            let cells: Vec<_> = directory.keysets_of(issuer).collect();
            let published =
                cells.iter().any(|cell| cell.snapshot.load().keyring.keys.iter().any(|key| key.published_at.is_some()));
            let missing = waiting.contains(issuer.url.as_str());
            complete &= !missing || published;
            if issuer.note_incomplete(missing && !published) && !issuer.is_withheld() {
                for cell in cells {
                    self.edit(cell, |shown| self.stamp(cell, shown)).await;
                    cell.wake.notify_one();
                }
            }
        }
        self.complete.store(complete, Ordering::Relaxed);
    }

    /// Keysets or issuers came, or may have.
    pub(super) fn completeness_changed(&self) {
        self.complete.store(false, Ordering::Relaxed);
    }
}

/// A keyring as stored. What cannot be trusted of a shared store is looked at once more: the installation may have changed
/// together with the keyring, after it was read.
pub(super) async fn load_current(
    ledger: &Ledger,
    name: &Name,
    accept: impl Fn(&Keyring) -> Result<(), LedgerError> + Send + Copy,
) -> Result<Option<Loaded>, LedgerError> {
    match ledger.load_if(name, accept).await {
        Err(error) if error.is_distrust() && ledger.shared().is_some() => {
            ledger.refresh().await?;
            ledger.load_if(name, accept).await
        }
        loaded => loaded,
    }
}

/// A recovered history that forgot a revocation must not bring the key back.
fn lost_revocation(shown: &Keyring, found: &Keyring, location: String) -> Option<LedgerError> {
    let mut revoked = shown.keys.iter().filter(|key| key.state == KeyState::Revoked);
    let lost = revoked.find(|key| !found.has_revoked(&key.kid, &key.public))?;
    Some(LedgerError::LostRevocation { location, kid: lost.kid.to_string() })
}
