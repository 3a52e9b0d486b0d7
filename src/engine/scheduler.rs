//! One task per keyset: it reconciles, sleeps until the planner's time or a notification, and decides nothing.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cell::KeysetCell;
use super::reconcile::Rest;
use crate::keyring::name::Name;
use crate::keyring::time::Span;

/// How often to look while the clock cannot be trusted.
const WHILE_FROZEN: Span = Span::from_secs(15);

/// How long to wait after a pass that panicked.
const AFTER_PANIC: Span = Span::from_secs(5);

/// How long a stop waits for steps under way.
const STEP_UNDER_WAY: std::time::Duration = std::time::Duration::from_secs(3);

/// The running tasks, by keyset.
#[derive(Default)]
pub struct Tasks {
    running: HashMap<Name, (CancellationToken, JoinHandle<()>, Arc<KeysetCell>)>,
}

impl Engine {
    /// One pass over every keyset; ends when each sleeps or has failed once.
    pub async fn reconcile_all(self: &Arc<Self>) {
        let mut passes = tokio::task::JoinSet::new();
        for cell in &self.directory().order {
            let (engine, cell) = (self.clone(), cell.clone());
            passes.spawn(async move { engine.reconcile(&cell).await });
        }
        while let Some(pass) = passes.join_next().await {
            if let Err(error) = pass {
                tracing::error!(%error, "the first pass over a keyset was aborted; it is tried again");
            }
        }
    }

    /// Starts the tasks again that ended by themselves, which none should.
    pub(super) fn revive(self: &Arc<Self>) {
        let ended: Vec<Name> = {
            let tasks = self.scheduler.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let ended = tasks.running.iter().filter(|(_, (_, task, _))| task.is_finished());
            ended.map(|(name, _)| name.clone()).collect()
        };
        for keyset in &ended {
            tracing::error!(%keyset, "the schedule of the keyset ended; it is started again");
        }
        if !ended.is_empty() {
            self.schedule();
        }
    }

    /// Starts the tasks of keysets that have none and ends those of keysets that are gone.
    pub fn schedule(self: &Arc<Self>) {
        let directory = self.directory();
        let mut tasks = self.scheduler.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tasks.running.retain(|name, (cancel, task, cell)| {
            let same = directory.keysets.get(name).is_some_and(|now| Arc::ptr_eq(now, cell));
            let stays = same && !task.is_finished();
            if !stays {
                cancel.cancel();
            }
            stays
        });
        for cell in &directory.order {
            if !tasks.running.contains_key(&cell.name) {
                let cancel = CancellationToken::new();
                let task = tokio::spawn(run(self.clone(), cell.clone(), cancel.clone()));
                tasks.running.insert(cell.name.clone(), (cancel, task, cell.clone()));
            }
        }
    }

    /// Ends all tasks at their next rest; a step under way is finished first, unless it takes too long.
    pub async fn stop(&self) {
        self.stopping.store(true, std::sync::atomic::Ordering::Relaxed);
        let tasks = {
            let mut tasks = self.scheduler.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::take(&mut *tasks)
        };
        for (cancel, ..) in tasks.running.values() {
            cancel.cancel();
        }
        let finished = async {
            for (_, task, _) in tasks.running.into_values() {
                let _ = task.await;
            }
        };
        // A backend may hang. What it has begun is found again by the next start, as after a crash.
        if tokio::time::timeout(STEP_UNDER_WAY, finished).await.is_err() {
            tracing::warn!("a step is still waiting for its backend; it is left to the next start");
        }
    }

    /// Has every keyset planned again: time or configuration changed.
    pub fn wake_all(&self) {
        for cell in &self.directory().order {
            cell.wake.notify_one();
        }
    }
}

async fn run(engine: Arc<Engine>, cell: Arc<KeysetCell>, cancel: CancellationToken) {
    while !cancel.is_cancelled() {
        // In a task of its own, so that a panic ends one pass and not the keyset's schedule.
        let pass = tokio::spawn({
            let (engine, cell) = (engine.clone(), cell.clone());
            async move { engine.reconcile(&cell).await }
        });
        let rest = pass.await.unwrap_or_else(|error| {
            tracing::error!(keyset = %cell.name, %error, "a pass over the keyset was aborted; it is tried again");
            Rest::Retry(AFTER_PANIC)
        });
        let clock = engine.clock.clock();
        let nap = match rest {
            // Whoever next reads the clock may thaw it, unnoticed by the heartbeat: look again soon.
            Rest::Until(_) if engine.clock.read().frozen => Some(WHILE_FROZEN),
            Rest::Until(Some(wake)) => Some(wake.since(engine.clock.now())),
            Rest::Retry(span) => Some(span),
            Rest::Until(None) | Rest::Frozen => None,
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = cell.wake.notified() => {}
            () = async { match nap { Some(span) => clock.sleep(span).await, None => std::future::pending().await } } => {}
        }
    }
}
