//! Taking up what other replicas of a shared store wrote, and knowing when the store last confirmed what is shown.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cell::{KeysetCell, Writer};
use super::reconcile::chain;
use crate::clock::Reading;
use crate::keyring::record::{KeyState, Keyring};
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::{LedgerError, Loaded};
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
}

impl Following {
    pub(super) fn clock_differs(&self) -> bool {
        self.clock_differs.load(Ordering::Relaxed)
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
                looked = self.look_at_store(self.patience()) => looked,
                () = cancel.cancelled() => return,
            };
            self.following.failing.store(looked.is_err(), Ordering::Relaxed);
            let Err(error) = looked else {
                if failures > 0 {
                    tracing::info!(failures, "the store answers again");
                }
                failures = 0;
                continue;
            };
            if failures == 0 {
                tracing::error!(error = %chain(&error), "the store cannot be followed: what was read last goes on; it is tried again");
            }
            failures = failures.saturating_add(1);
            let pause = RETRY_MIN.times(1 << failures.min(5)).min(RETRY_MAX);
            tokio::select! {
                () = self.clock.clock().sleep(super::presence::jittered(pause)) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    /// Looks once, waiting for news for up to `wait`: takes up what changed, and notes when that was confirmed.
    pub async fn look_at_store(self: &Arc<Self>, wait: Span) -> Result<(), LedgerError> {
        let ledger = self.ledger()?.clone();
        let Some(shared) = ledger.shared() else { return Ok(()) };
        let mut known = self.following.known.lock().await;
        let (heads, asked, agrees) = self.ask(shared, known.as_ref(), wait).await?;
        self.note_clock(agrees, heads.store_time);
        if let Some(documents) = &heads.documents {
            // Whatever fails now is looked at again.
            *known = None;
            self.take_up(documents).await?;
            *known = Some(heads.revision);
        }
        if agrees {
            self.confirm_all(asked.boot.saturating_sub(heads.age));
        }
        Ok(())
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
        if !self.take_up_installation(documents.get(&Document::Installation)).await? {
            return Ok(());
        }
        let directory = self.directory();
        let stored = documents.keys().filter_map(|document| match document {
            Document::Keyring(name) => Some(name),
            _ => None,
        });
        let mut rebuild = stored.into_iter().any(|name| !directory.keysets.contains_key(name));
        for cell in &directory.order {
            let head = documents.get(&Document::Keyring(cell.name.clone())).copied();
            rebuild |= self.catch_up(cell, head).await?;
        }
        if rebuild {
            self.rebuild().await;
        }
        self.settle_tolerance();
        self.settle_completeness().await;
        self.presence.changed();
        Ok(())
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
        self.directory().order.iter().all(|cell| cell.snapshot.load().frozen.is_some())
    }

    /// Brings a keyset to the record with the digest `head`, or a newer one. Whether paths or issuers have changed.
    async fn catch_up(self: &Arc<Self>, cell: &Arc<KeysetCell>, head: Option<Digest>) -> Result<bool, LedgerError> {
        let mut writer = cell.writer.lock().await;
        let snapshot = cell.snapshot.load_full();
        let current = writer.stored.as_ref().map(|stored| stored.digest);
        if head == current && snapshot.frozen.is_none() && writer.unsettled.is_none() {
            return Ok(false);
        }
        self.load_again(cell, &mut writer).await?;
        let (before, next) = (&snapshot.keyring, cell.snapshot.load_full().keyring.clone());
        Ok(before.policy.issuer != next.policy.issuer || before.drained != next.drained)
    }

    /// Takes up the stored keyring, whoever wrote it. One that cannot be trusted freezes the keyset until the store holds
    /// one that can. The caller holds the writer.
    pub(super) async fn load_again(&self, cell: &Arc<KeysetCell>, writer: &mut Writer) -> Result<(), LedgerError> {
        let ledger = self.ledger()?;
        let shown = cell.snapshot.load().keyring.clone();
        let accept = |found: &Keyring| lost_revocation(&shown, found, ledger.locate(&cell.name)).map_or(Ok(()), Err);
        let loaded = match ledger.load_if(&cell.name, accept).await {
            // The installation may have changed together with the keyring.
            Err(error) if error.is_distrust() => match ledger.refresh().await {
                Ok(()) => ledger.load_if(&cell.name, accept).await,
                Err(error) => Err(error),
            },
            loaded => loaded,
        };
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
        if before.frozen.is_some() {
            tracing::warn!(keyset = %cell.name, generation = loaded.keyring.generation, "the stored record can be trusted again");
            let mut thawed = (*before).clone();
            thawed.frozen = None;
            cell.snapshot.store(Arc::new(thawed));
        }
        if same && before.frozen.is_none() {
            return Ok(());
        }
        let next = Arc::new(loaded.keyring.clone());
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

    fn confirm_all(&self, at: Span) {
        for cell in &self.directory().order {
            if cell.snapshot.load().frozen.is_none() {
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
        if !self.is_shared() {
            return;
        }
        let Some(installation) = self.installation() else { return };
        let directory = self.directory();
        for issuer in &directory.issuers {
            let cells: Vec<_> = directory.keysets_of(issuer).collect();
            let published =
                cells.iter().any(|cell| cell.snapshot.load().keyring.keys.iter().any(|key| key.published_at.is_some()));
            let begun = |keyring: &Keyring| {
                keyring.active().is_some() || keyring.last_promotion_at.is_some() || keyring.drained
            };
            let missing = installation.keysets.iter().any(|(name, entry)| {
                let cell = directory.keysets.get(name);
                entry.issuer == issuer.url
                    && entry.first
                    && !cell.is_some_and(|cell| begun(&cell.snapshot.load().keyring))
            });
            if issuer.note_incomplete(missing && !published) && !issuer.is_withheld() {
                for cell in cells {
                    self.edit(cell, |shown| self.stamp(cell, shown)).await;
                    cell.wake.notify_one();
                }
            }
        }
    }
}

/// A recovered history that forgot a revocation must not bring the key back.
fn lost_revocation(shown: &Keyring, found: &Keyring, location: String) -> Option<LedgerError> {
    let mut revoked = shown.keys.iter().filter(|key| key.state == KeyState::Revoked);
    let lost = revoked.find(|key| !found.has_revoked(&key.kid, &key.public))?;
    Some(LedgerError::LostRevocation { location, kid: lost.kid.to_string() })
}
