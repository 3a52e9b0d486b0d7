//! Plan, carry out, write, show; again until the planner says when to look next.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::Instrument;

use super::cell::{KeysetCell, Writer};
use super::snapshot::{ActiveKey, Backoff};
use super::{Engine, ReplicaRole};
use crate::backend::{Backend, BackendError, BackendErrorKind, CreatedKey, KeyIdentity};
use crate::keyring::algorithm::Algorithm;
use crate::keyring::change::{Change, NewKey};
use crate::keyring::plan::{SlowStep, Step, is_overtaken, plan};
use crate::keyring::record::{KeyState, Keyring, PrivateHandle, Serial};
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::{LedgerError, Loaded, Settled};
pub use crate::telemetry::chain;
use crate::telemetry::metrics::{BackendOperation, BackendOutcome, RotationFailureReason, RotationStep};
use crate::telemetry::traces;

/// What a keyset wants after a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing to do before this trusted time, or before somebody notifies.
    Until(Option<Timestamp>),
    /// Something failed: again after this long.
    Retry(Span),
    /// The keyset is frozen: only a restart after repair helps.
    Frozen,
}

/// Retries of slow steps and writes are at most this far apart (DESIGN §10).
const RETRY_MAX: Span = Span::from_secs(5);
const RETRY_MIN: Span = Span::from_millis(100);

/// The backend whose keys live in the store alone: a copy of the store has copies of them.
const LOCAL: &str = "local";

/// Steps one pass may take before it yields to the scheduler; far above what any policy needs.
const STEPS_MAX: usize = 10_000;

/// How often a manager tries the active key of a remote backend.
const MANAGER_TRIES: Span = Span::from_secs(30);

/// How long a replica that did not write last lets others go first, at most.
const DEFER_MAX: Span = Span::SECOND;

/// A write that did not happen.
pub(super) enum CommitError {
    /// Another replica wrote first; what it wrote was taken up.
    Overtaken,
    Ledger(LedgerError),
    /// The key that would sign cannot be opened.
    Signer(BackendError),
}

impl Engine {
    /// Brings one keyset to where it should be now. Safe to call at any time, from anywhere, again and again.
    pub async fn reconcile(self: &Arc<Self>, cell: &Arc<KeysetCell>) -> Rest {
        for _ in 0..STEPS_MAX {
            if self.stopping.load(Ordering::Relaxed) || self.is_sealed() {
                return Rest::Until(None);
            }
            self.settle_completeness().await;
            if cell.uncertain.load(Ordering::Acquire) {
                let settled = self.settle(cell, &mut *cell.writer.lock().await).await;
                if let Err(error) = settled {
                    return self.commit_failed(cell, RotationStep::Policy, &CommitError::Ledger(error));
                }
            }
            let snapshot = cell.snapshot.load_full();
            if snapshot.frozen.is_some() {
                return Rest::Frozen;
            }
            if snapshot.keyring.active().is_some() && snapshot.active.is_none() {
                if let Err(rest) = self.open_active(cell).await {
                    return rest;
                }
                continue;
            }
            if self.is_reader() {
                self.refresh_metrics(cell);
                return Rest::Until(self.look_after_remote(cell, None));
            }
            let plan = plan(&snapshot.keyring, &self.facts(cell, &snapshot));
            if plan.step.is_some()
                && let Some(wait) = self.lets_others_go_first(cell)
            {
                return Rest::Retry(wait);
            }
            let outcome = match plan.step {
                None => {
                    if self.replace_disabled(cell).await {
                        continue;
                    }
                    self.refresh_metrics(cell);
                    return Rest::Until(self.look_after_remote(cell, plan.wake));
                }
                Some(Step::Write(change)) => self.carry_write(cell, snapshot.keyring.generation, &change).await,
                Some(step @ (Step::Create { .. } | Step::Destroy { .. })) => {
                    self.carry_slow(cell, step, plan.wake).await
                }
            };
            if let Err(rest) = outcome {
                self.refresh_metrics(cell);
                return rest;
            }
        }
        Rest::Retry(RETRY_MIN)
    }

    /// Whoever wrote last goes on; the others give it a moment, each another one, and mostly find the step done. How much
    /// longer this one waits.
    fn lets_others_go_first(&self, cell: &KeysetCell) -> Option<Span> {
        // At a start others are starting too, and what is missing is wanted now.
        if !self.is_shared() || !self.is_open() || cell.leads.load(Ordering::Relaxed) {
            return None;
        }
        let boot = self.clock.boot();
        let until = Span::from_millis(cell.gives_way_until.load(Ordering::Relaxed));
        if until.is_zero() {
            let propagation = cell.snapshot.load().keyring.policy.rotation.propagation;
            let wait =
                self.entropy.span_between(Span::ZERO, Span::from_millis(propagation.as_millis() / 8).min(DEFER_MAX));
            cell.gives_way_until.store((boot + wait).as_millis(), Ordering::Relaxed);
            return Some(wait);
        }
        Some(until.saturating_sub(boot)).filter(|left| !left.is_zero())
    }

    /// Has a backend work on `step`, which may take long or for ever. What becomes due meanwhile does not wait for it: a
    /// planned rotation needs no backend (DESIGN §2).
    async fn carry_slow(
        self: &Arc<Self>,
        cell: &Arc<KeysetCell>,
        step: Step,
        mut wake: Option<Timestamp>,
    ) -> Result<(), Rest> {
        // In a task of its own: it holds the writer at its end, and must get there while this one writes something else.
        let mut work = tokio::spawn({
            let (engine, cell) = (self.clone(), cell.clone());
            async move {
                match step {
                    Step::Create { serial, algorithm } => {
                        let span = traces::step(&cell.name, RotationStep::Create.as_str());
                        engine.carry_create(&cell, serial, algorithm).instrument(span).await
                    }
                    Step::Destroy { serial } => {
                        let span = traces::step(&cell.name, RotationStep::Destroy.as_str());
                        engine.carry_destroy(&cell, serial).instrument(span).await
                    }
                    Step::Write(_) => Ok(()),
                }
            }
        });
        loop {
            let clock = self.clock.clock();
            let due = async {
                match wake {
                    Some(wake) => clock.sleep(wake.since(self.clock.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                done = &mut work => return done.unwrap_or_else(|error| {
                    tracing::error!(keyset = %cell.name, %error, "a step was aborted; it is tried again");
                    Err(Rest::Retry(RETRY_MAX))
                }),
                () = due => {}
                () = cell.wake.notified() => {}
            }
            wake = self.carry_quick(cell).await;
        }
    }

    /// Writes what is due, and leaves to others what takes long. Returns when to look again.
    async fn carry_quick(self: &Arc<Self>, cell: &Arc<KeysetCell>) -> Option<Timestamp> {
        let soon = || Some(self.clock.now() + Span::SECOND);
        for _ in 0..STEPS_MAX {
            let snapshot = cell.snapshot.load_full();
            if snapshot.frozen.is_some() || self.is_sealed() {
                return None;
            }
            let plan = plan(&snapshot.keyring, &self.facts(cell, &snapshot));
            let Some(Step::Write(change)) = plan.step else {
                if self.replace_disabled(cell).await {
                    continue;
                }
                self.refresh_metrics(cell);
                return self.look_after_remote(cell, plan.wake);
            };
            if self.carry_write(cell, snapshot.keyring.generation, &change).await.is_err() {
                return soon();
            }
        }
        soon()
    }

    /// Tries an active key that is not known to sign, and says when to look again.
    fn look_after_remote(self: &Arc<Self>, cell: &Arc<KeysetCell>, wake: Option<Timestamp>) -> Option<Timestamp> {
        if !cell.is_known_not_to_sign() {
            // A manager signs nothing by itself, so it would not notice a key that was disabled.
            if self.role != ReplicaRole::Manager || !cell.signs_remotely() {
                return wake;
            }
            if cell.remote.is_due(self.clock.boot(), MANAGER_TRIES) {
                self.probe(cell);
            }
            let next = self.clock.now() + MANAGER_TRIES;
            return Some(wake.map_or(next, |wake| wake.min(next)));
        }
        self.probe(cell);
        let soon = self.clock.now() + RETRY_MAX;
        Some(wake.map_or(soon, |wake| wake.min(soon)))
    }

    pub(super) async fn carry_write(
        &self,
        cell: &Arc<KeysetCell>,
        generation: u64,
        change: &Change,
    ) -> Result<(), Rest> {
        let span = traces::step(&cell.name, step_of(change).as_str());
        let written = self.write_change(cell, generation, change).instrument(span.clone()).await;
        if written.is_err() {
            traces::failed(&span);
        }
        written
    }

    async fn write_change(&self, cell: &Arc<KeysetCell>, generation: u64, change: &Change) -> Result<(), Rest> {
        let mut writer = cell.writer.lock().await;
        let settled = self.settle(cell, &mut writer).await;
        settled.map_err(|error| self.commit_failed(cell, step_of(change), &CommitError::Ledger(error)))?;
        let current = cell.snapshot.load_full().keyring.clone();
        if current.generation != generation {
            return Ok(()); // Somebody wrote in between: plan again.
        }
        let next = current.after(change, self.clock.now());
        match self.commit(cell, &mut writer, next).await {
            Ok(()) => {}
            Err(CommitError::Overtaken) => return Ok(()),
            Err(error) => return Err(self.commit_failed(cell, step_of(change), &error)),
        }
        if let Change::Promote { trigger, .. } = change {
            cell.metrics.rotated((*trigger).into());
        }
        Ok(())
    }

    /// The backend works outside the write; whether its key is still wanted is checked again inside.
    async fn carry_create(&self, cell: &Arc<KeysetCell>, serial: Serial, algorithm: Algorithm) -> Result<(), Rest> {
        let slow = SlowStep::Create { serial };
        let keyring = cell.snapshot.load_full().keyring.clone();
        let name = keyring.policy.backend.clone();
        let Some(backend) = self.backend(&name).cloned() else {
            return self.step_failed(cell, slow, RotationStep::Create, BackendErrorKind::Unavailable).await;
        };
        let identity = self.identity(&keyring, serial);
        let made = self.timed(&backend, BackendOperation::Create, backend.create(&identity, algorithm)).await;
        let created = match made {
            Ok(created) => created,
            Err(error) => {
                tracing::warn!(keyset = %cell.name, serial, error = %chain(&error), "a new key could not be created; it is tried again");
                return self.step_failed(cell, slow, RotationStep::Create, error.kind).await;
            }
        };
        let _admission = cell.issuer.admission.lock().await;
        let mut writer = cell.writer.lock().await;
        let settled = self.settle(cell, &mut writer).await;
        settled.map_err(|error| self.commit_failed(cell, RotationStep::Create, &CommitError::Ledger(error)))?;
        let error = loop {
            let Some(next) = self.with_created(cell, &backend, &identity, &created, algorithm) else { return Ok(()) };
            match self.commit(cell, &mut writer, next).await {
                Ok(()) => return Ok(()),
                // Another replica got further, and may want the key no more.
                Err(CommitError::Overtaken) => {}
                Err(error) => break error,
            }
        };
        drop(writer);
        // Making a key costs more than writing it: not again at once.
        self.back_off(cell, slow).await;
        Err(self.commit_failed(cell, RotationStep::Create, &error))
    }

    /// The keyring with a key that was made for `identity`, if anything is to become of it now.
    fn with_created(
        &self,
        cell: &KeysetCell,
        backend: &Arc<dyn Backend>,
        identity: &KeyIdentity,
        created: &CreatedKey,
        algorithm: Algorithm,
    ) -> Option<Keyring> {
        let (serial, snapshot) = (identity.serial, cell.snapshot.load_full());
        let facts = self.facts(cell, &snapshot);
        let change = if plan(&snapshot.keyring, &facts).step == Some(Step::Create { serial, algorithm }) {
            Change::Add(Box::new(new_key(backend, created.clone(), algorithm)))
        } else if is_overtaken(&snapshot.keyring, &facts, serial, algorithm) {
            self.add_ended(&snapshot.keyring, backend, identity, created.clone(), algorithm)?
        } else {
            return None; // Something else is due first; creation is idempotent.
        };
        Some(snapshot.keyring.after(&change, self.clock.now()))
    }

    /// Has a key that was made for `identity` and is not wanted any more destroyed by way of the keyring: whoever of this store
    /// could still take it up finds it ended, and all goes as if it had been made a moment before it was overtaken. `None`:
    /// nothing is left of it, the keyring names it already, or it is none of this keyring's.
    fn add_ended(
        &self,
        keyring: &Keyring,
        backend: &Arc<dyn Backend>,
        identity: &KeyIdentity,
        created: CreatedKey,
        algorithm: Algorithm,
    ) -> Option<Change> {
        let named = keyring.keys.iter().any(|key| key.kid == created.kid || key.public == created.public);
        if named || self.identity(keyring, identity.serial) != *identity {
            return None;
        }
        let handle = backend.left_over(&self.identity(keyring, keyring.next_serial), &created)?;
        tracing::info!(keyset = %keyring.keyset, serial = identity.serial, kid = %created.kid, "a key is not wanted any more that was just made; it is destroyed");
        Some(Change::AddEnded(Box::new(new_key(backend, CreatedKey { handle, ..created }, algorithm))))
    }

    async fn carry_destroy(&self, cell: &Arc<KeysetCell>, serial: Serial) -> Result<(), Rest> {
        let keyring = cell.snapshot.load_full().keyring.clone();
        let slow = SlowStep::Destroy { serial };
        let key = keyring.key(serial);
        let Some((key, stored)) = key.and_then(|key| Some((key, self.stored_key(&keyring, key)?))) else {
            return Ok(());
        };
        let name = key.private.as_ref().map(|private| private.backend.as_str()).unwrap_or_default();
        let Some(backend) = self.backend(name).cloned() else {
            return self.step_failed(cell, slow, RotationStep::Destroy, BackendErrorKind::Unavailable).await;
        };
        let keep_until = Span::from_millis(self.keep_remote_until.load(Ordering::Relaxed));
        if backend.name() != LOCAL && self.clock.boot() < keep_until {
            let kept = Backoff { not_before: keep_until, failures: 1 };
            self.edit(cell, |shown| _ = shown.backoff.insert(slow, kept)).await;
            return Ok(());
        }
        if let Err(error) = self.timed(&backend, BackendOperation::Destroy, backend.destroy(&stored)).await {
            tracing::warn!(keyset = %cell.name, serial, error = %chain(&error), "a private key could not be destroyed; it is tried again");
            return self.step_failed(cell, slow, RotationStep::Destroy, error.kind).await;
        }
        let mut writer = cell.writer.lock().await;
        let settled = self.settle(cell, &mut writer).await;
        settled.map_err(|error| self.commit_failed(cell, RotationStep::Destroy, &CommitError::Ledger(error)))?;
        let current = cell.snapshot.load_full().keyring.clone();
        if current.key(serial).is_none_or(|key| key.private.is_none() || key.state.is_published()) {
            return Ok(());
        }
        let next = current.after(&Change::Destroyed(serial), self.clock.now());
        match self.commit(cell, &mut writer, next).await {
            Ok(()) | Err(CommitError::Overtaken) => Ok(()),
            Err(error) => Err(self.commit_failed(cell, RotationStep::Destroy, &error)),
        }
    }

    /// Opens the active key when an earlier attempt failed.
    async fn open_active(&self, cell: &Arc<KeysetCell>) -> Result<(), Rest> {
        let _writer = cell.writer.lock().await;
        let keyring = cell.snapshot.load_full().keyring.clone();
        match self.ready_signer(cell, &keyring).await {
            Ok(signer) => {
                self.show(cell, keyring, signer);
                Ok(())
            }
            Err(error) => {
                tracing::error!(keyset = %cell.name, error = %chain(&error), "the active key cannot be opened; it is tried again");
                Err(Rest::Retry(RETRY_MAX))
            }
        }
    }

    /// Makes `next` durable, then shows it. The caller holds the writer.
    pub(super) async fn commit(
        &self,
        cell: &Arc<KeysetCell>,
        writer: &mut Writer,
        next: Keyring,
    ) -> Result<(), CommitError> {
        let signer: Option<Arc<ActiveKey>> = match self.ready_signer(cell, &next).await {
            Ok(signer) => signer,
            // A revocation waits for nothing; the successor is opened later.
            Err(_) if keeps_or_revokes_the_signer(cell, &next) => None,
            Err(error) => return Err(CommitError::Signer(error)),
        };
        let asked = self.clock.boot();
        let next = Arc::new(next);
        let saved = match self.save(cell, writer, &next).await {
            Ok(saved) => saved,
            Err(LedgerError::Overtaken { .. }) => {
                self.load_again(cell, writer).await.map_err(CommitError::Ledger)?;
                return Err(CommitError::Overtaken);
            }
            Err(error) => {
                self.distrust(cell, &error);
                return Err(CommitError::Ledger(error));
            }
        };
        writer.stored = Some(saved);
        if self.is_shared() {
            cell.leads.store(true, Ordering::Relaxed);
            if !self.following.clock_differs() {
                cell.confirm(asked.as_millis());
            }
            self.presence.changed();
        }
        let before = cell.snapshot.load_full().keyring.clone();
        let was_full = self.room(cell, &before) == 0;
        self.show(cell, next.clone(), signer);
        self.report(cell, &before, &next);
        if was_full && self.room(cell, &next) > 0 {
            self.wake_siblings(cell);
        }
        if next.generation == 1 {
            self.unconfirmed.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Writes, and where the outcome is unknown reads back what happened. What stays unknown is remembered.
    async fn save(&self, cell: &KeysetCell, writer: &mut Writer, next: &Arc<Keyring>) -> Result<Loaded, LedgerError> {
        let ledger = self.ledger()?;
        let failed = match ledger.save_shared(writer.stored.as_ref(), next).await {
            Ok(saved) => return Ok(saved),
            Err(error @ LedgerError::Overtaken { .. }) => return Err(error),
            Err(error) if !error.may_pass() => return Err(error),
            Err(error) => error,
        };
        match ledger.settle(writer.stored.as_ref(), next).await {
            Ok(Settled::Written(saved)) => Ok(*saved),
            Ok(Settled::NotWritten) => Err(failed),
            Err(error @ LedgerError::Overtaken { .. }) => Err(error),
            Err(error) if error.is_distrust() => Err(error),
            Err(_) => {
                writer.unsettled = Some(Arc::clone(next));
                cell.uncertain.store(true, Ordering::Release);
                cell.wake.notify_one();
                Err(failed)
            }
        }
    }

    /// Finds out what became of a write whose outcome was unknown; shows it if it is stored.
    pub(super) async fn settle(&self, cell: &Arc<KeysetCell>, writer: &mut Writer) -> Result<(), LedgerError> {
        let Some(unsettled) = writer.unsettled.clone() else { return Ok(()) };
        match self.ledger()?.settle(writer.stored.as_ref(), &unsettled).await {
            Ok(Settled::NotWritten) => {}
            Ok(Settled::Written(saved)) => {
                writer.stored = Some(*saved);
                let before = cell.snapshot.load_full().keyring.clone();
                let next = unsettled;
                // A signer that cannot be opened now is opened by the next pass.
                let signer = self.ready_signer(cell, &next).await.ok().flatten();
                self.show(cell, next.clone(), signer);
                self.report(cell, &before, &next);
            }
            Err(LedgerError::Overtaken { .. }) => self.load_again(cell, writer).await?,
            Err(error) => {
                self.distrust(cell, &error);
                return Err(error);
            }
        }
        writer.unsettled = None;
        cell.uncertain.store(false, Ordering::Release);
        Ok(())
    }

    /// A record that is not what we wrote cannot be trusted: the last good set is served, nothing more is written.
    pub(super) fn distrust(&self, cell: &KeysetCell, error: &LedgerError) {
        let mut shown = (*cell.snapshot.load_full()).clone();
        if error.is_distrust() {
            if shown.frozen.as_deref() == Some(chain(error).as_str()) {
                return;
            }
            tracing::error!(keyset = %cell.name, error = %chain(error), "the keyset is frozen: what it published stays, nothing is written");
            shown.frozen = Some(chain(error).into());
            shown.thaws = self.is_shared();
        } else {
            shown.store_failing = true;
        }
        cell.snapshot.store(Arc::new(shown));
    }

    fn commit_failed(&self, cell: &KeysetCell, step: RotationStep, error: &CommitError) -> Rest {
        let reason = match error {
            CommitError::Ledger(_) | CommitError::Overtaken => RotationFailureReason::Store,
            CommitError::Signer(_) => RotationFailureReason::Backend,
        };
        cell.metrics.rotation_failed(step, reason);
        match error {
            CommitError::Overtaken => Rest::Retry(RETRY_MIN),
            CommitError::Ledger(error) if error.is_distrust() => Rest::Frozen,
            CommitError::Ledger(error) => {
                // Tried every second, for every keyset of the store.
                if let Some(kept_back) = self.complaints.pass(self.clock.boot().to_std()) {
                    tracing::error!(keyset = %cell.name, error = %chain(error), kept_back, "a step could not be stored; it is tried again");
                }
                Rest::Retry(Span::SECOND)
            }
            CommitError::Signer(error) => {
                tracing::error!(keyset = %cell.name, error = %chain(error), "the key that should sign cannot be opened; it is tried again");
                Rest::Retry(RETRY_MAX)
            }
        }
    }

    /// Notes that a slow step failed and when it may be tried again; other steps go on.
    async fn step_failed(
        &self,
        cell: &Arc<KeysetCell>,
        slow: SlowStep,
        step: RotationStep,
        kind: BackendErrorKind,
    ) -> Result<(), Rest> {
        let reason = match kind {
            BackendErrorKind::PairwiseTest => RotationFailureReason::PairwiseTest,
            _ => RotationFailureReason::Backend,
        };
        cell.metrics.rotation_failed(step, reason);
        self.back_off(cell, slow).await;
        Ok(())
    }

    async fn back_off(&self, cell: &KeysetCell, slow: SlowStep) {
        let boot = self.clock.boot();
        self.edit(cell, |shown| {
            let failures = shown.backoff.get(&slow).map_or(1, |backoff| backoff.failures.saturating_add(1));
            let delay = RETRY_MIN.times(1 << failures.min(6)).min(RETRY_MAX);
            shown.backoff.insert(slow, Backoff { not_before: boot + delay, failures });
        })
        .await;
    }

    /// Runs a backend call and counts how it went and how long it took.
    pub(super) async fn timed<T>(
        &self,
        backend: &Arc<dyn Backend>,
        operation: BackendOperation,
        call: impl Future<Output = Result<T, BackendError>>,
    ) -> Result<T, BackendError> {
        let start = self.clock.clock().monotonic();
        let span = traces::backend(backend.name(), operation);
        let result = call.instrument(span.clone()).await;
        let took = self.clock.clock().monotonic().saturating_sub(start);
        let outcome = result.as_ref().err().map_or(BackendOutcome::Ok, |error| outcome_of(error.kind));
        traces::answered(&span, outcome);
        self.metrics.register_backend(backend.name()).requested(operation, outcome, took);
        result
    }

    fn wake_siblings(&self, cell: &KeysetCell) {
        let directory = self.directory();
        for sibling in directory.keysets_of(&cell.issuer) {
            sibling.wake.notify_one();
        }
    }
}

fn new_key(backend: &Arc<dyn Backend>, created: CreatedKey, algorithm: Algorithm) -> NewKey {
    let private = PrivateHandle { backend: backend.name().to_owned(), handle: created.handle };
    NewKey { kid: created.kid, algorithm, public: created.public, private: Some(private) }
}

/// Whether a write must not wait for a key that cannot be opened: it takes the signer away, or does not touch it.
fn keeps_or_revokes_the_signer(cell: &KeysetCell, next: &Keyring) -> bool {
    let shown = cell.snapshot.load();
    let signing = shown.keyring.active().and_then(|active| next.key(active.serial));
    signing.is_some_and(|key| matches!(key.state, KeyState::Revoked | KeyState::Active))
}

fn step_of(change: &Change) -> RotationStep {
    match change {
        Change::Add(_) | Change::AddEnded(_) => RotationStep::Create,
        Change::Observe { .. } => RotationStep::Publish,
        Change::Propagated(_) => RotationStep::Propagate,
        Change::Promote { .. } => RotationStep::Promote,
        Change::Withdraw(_) | Change::Expire(_) => RotationStep::Retire,
        Change::Destroyed(_) => RotationStep::Destroy,
        Change::AdoptPolicy(_) | Change::Restart { .. } | Change::HoldEnded | Change::Rebase => RotationStep::Policy,
    }
}

pub(super) fn outcome_of(kind: BackendErrorKind) -> BackendOutcome {
    match kind {
        BackendErrorKind::Unavailable => BackendOutcome::Unavailable,
        BackendErrorKind::Timeout => BackendOutcome::Timeout,
        BackendErrorKind::Throttled => BackendOutcome::Throttled,
        BackendErrorKind::Denied => BackendOutcome::Denied,
        BackendErrorKind::KeyDisabled => BackendOutcome::KeyDisabled,
        BackendErrorKind::NotFound => BackendOutcome::NotFound,
        BackendErrorKind::Unreadable | BackendErrorKind::PairwiseTest | BackendErrorKind::Internal => {
            BackendOutcome::Failed
        }
    }
}
