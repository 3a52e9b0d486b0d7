//! Reports of replicas on their way to a shared store: the newest of each, passed on many at a time; kept here where
//! there is none.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::keyring::time::Span;
use crate::store::StoreError;
use crate::store::shared::{Replica, Report, SharedStore};

/// The most replicas that are remembered.
pub const MOST_REPLICAS: usize = 10_000;

/// The most entries, of keyrings and issuers, in all their reports.
const MOST_ENTRIES: usize = 1_000_000;

/// Reports are collected for this long.
const COLLECT: Duration = Duration::from_secs(1);

/// A store that does not answer is asked again after this.
const RETRY: Duration = Duration::from_secs(5);

/// Where nothing else remembers replicas, those that were silent for this long are forgotten.
const FORGOTTEN_AFTER: Span = Span::HOUR;

/// More replicas report than there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooMany;

#[derive(Default)]
pub(super) struct Presence {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Default)]
struct State {
    /// To be passed on; where there is nobody to pass them to, all.
    reports: BTreeMap<String, Reported>,
    /// In all of `reports`.
    entries: usize,
    /// To be told that they left.
    left: BTreeSet<String>,
}

struct Reported {
    report: Report,
    /// In boot time.
    at: Span,
}

impl Presence {
    pub fn take(&self, report: Report, now: Span, passed_on: bool) -> Result<(), TooMany> {
        let mut state = self.state();
        state.insert(report, now)?;
        drop(state);
        if passed_on {
            self.news.notify_one();
        }
        Ok(())
    }

    pub fn leave(&self, replica: &str, passed_on: bool) {
        let mut state = self.state();
        state.remove(replica);
        // Nobody waits for ever for one that is not told of: reports grow old.
        if passed_on && state.left.len() < MOST_REPLICAS {
            state.left.insert(replica.to_owned());
        }
        drop(state);
        self.news.notify_one();
    }

    pub fn replicas(&self, now: Span, longest: Span) -> Vec<Replica> {
        let state = self.state();
        let known = state
            .reports
            .values()
            .map(|reported| Replica { report: reported.report.clone(), age: now.saturating_sub(reported.at) });
        known.filter(|replica| replica.age <= longest).collect()
    }

    pub async fn pass_on(&self, shared: &dyn SharedStore, stop: CancellationToken) {
        let mut failing = false;
        loop {
            tokio::select! {
                () = self.news.notified() => {}
                () = stop.cancelled() => {}
            }
            _ = stop.run_until_cancelled(tokio::time::sleep(COLLECT)).await;
            let passed = self.pass_on_once(shared).await;
            if stop.is_cancelled() {
                return;
            }
            let failed = passed.is_err();
            if let Err(error) = passed
                && !failing
            {
                tracing::warn!(%error, "cannot pass on what signers report: it is tried again");
            }
            failing = failed;
            if failed {
                _ = stop.run_until_cancelled(tokio::time::sleep(RETRY)).await;
                self.news.notify_one();
            }
        }
    }

    async fn pass_on_once(&self, shared: &dyn SharedStore) -> Result<(), StoreError> {
        let (taken, left) = self.state().drain();
        let reports: Vec<Report> = taken.iter().map(|reported| reported.report.clone()).collect();
        if !reports.is_empty()
            && let Err(error) = shared.report(&reports).await
        {
            self.state().put_back(taken, left);
            return Err(error);
        }
        let leaving: Vec<&str> = left.iter().map(String::as_str).collect();
        if !leaving.is_empty()
            && let Err(error) = shared.forget(&leaving).await
        {
            self.state().put_back(Vec::new(), left);
            return Err(error);
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves at worst a count that is off by one report.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn insert(&mut self, report: Report, now: Span) -> Result<(), TooMany> {
        let size = entries(&report);
        let is_full = |state: &State| {
            let replaced = state.reports.get(&report.replica);
            let others = state.reports.len() - usize::from(replaced.is_some());
            let entries = state.entries - replaced.map_or(0, |old| entries(&old.report));
            others >= MOST_REPLICAS || entries.saturating_add(size) > MOST_ENTRIES
        };
        if is_full(self) {
            self.forget_silent(now);
            if is_full(self) {
                return Err(TooMany);
            }
        }
        self.remove(&report.replica);
        self.left.remove(&report.replica);
        self.entries += size;
        self.reports.insert(report.replica.clone(), Reported { report, at: now });
        Ok(())
    }

    fn remove(&mut self, replica: &str) {
        if let Some(old) = self.reports.remove(replica) {
            self.entries -= entries(&old.report);
        }
    }

    fn forget_silent(&mut self, now: Span) {
        self.reports.retain(|_, reported| now.saturating_sub(reported.at) < FORGOTTEN_AFTER);
        self.entries = self.reports.values().map(|reported| entries(&reported.report)).sum();
    }

    fn drain(&mut self) -> (Vec<Reported>, BTreeSet<String>) {
        self.entries = 0;
        (std::mem::take(&mut self.reports).into_values().collect(), std::mem::take(&mut self.left))
    }

    /// What could not be passed on, unless something newer has come.
    fn put_back(&mut self, taken: Vec<Reported>, left: BTreeSet<String>) {
        for replica in left {
            if !self.reports.contains_key(&replica) {
                self.left.insert(replica);
            }
        }
        for Reported { report, at } in taken {
            if !self.reports.contains_key(&report.replica) && !self.left.contains(&report.replica) {
                // Full of newer ones: this replica reports again soon.
                _ = self.insert(report, at);
            }
        }
    }
}

fn entries(report: &Report) -> usize {
    report.generations.len().saturating_add(report.resumed.len())
}
