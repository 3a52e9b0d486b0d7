//! Whether this process works: what `/livez` says and systemd's watchdog hears. A restart must be able to help, so
//! nothing beyond the process counts: a store that hangs would hang after it, too.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use super::Engine;
use crate::keyring::time::Span;

/// How late the heartbeat may be: a busy machine, or one that comes back from sleep.
const LATE: Span = Span::from_secs(30);

/// How far the heartbeat has come.
pub(super) struct Progress {
    /// When it last moved, in milliseconds of CLOCK_MONOTONIC: that clock sleeps with the machine, as timers do.
    moved: AtomicI64,
    /// It waits for the store, or for a writer that does.
    waits: AtomicBool,
}

impl Default for Progress {
    fn default() -> Self {
        Progress { moved: AtomicI64::new(i64::MIN), waits: AtomicBool::new(false) }
    }
}

/// Held while the heartbeat waits for the store.
pub(super) struct Waiting<'a>(&'a Engine);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.moved();
        self.0.progress.waits.store(false, Ordering::SeqCst);
    }
}

impl Engine {
    /// What keeps this process from working, in words; empty while it works.
    pub fn ailments(&self) -> Vec<String> {
        let ended = self.supervisor.ailing().into_iter();
        let ended = ended.map(|task| format!("the task {task} ended and was started again"));
        let stuck = self.stuck().map(|since| format!("the heartbeat has not moved for {since}"));
        ended.chain(stuck).collect()
    }

    /// For how long the heartbeat has been late by its own fault.
    fn stuck(&self) -> Option<Span> {
        let moved = self.progress.moved.load(Ordering::SeqCst);
        if moved == i64::MIN || self.progress.waits.load(Ordering::SeqCst) {
            return None;
        }
        let since = self.monotonic().saturating_sub(Span::from_millis(moved));
        (since > self.interval() + LATE).then_some(since)
    }

    /// The heartbeat came this far.
    pub(super) fn moved(&self) {
        self.progress.moved.store(self.monotonic().as_millis(), Ordering::SeqCst);
    }

    pub(super) fn waits_for_store(&self) -> Waiting<'_> {
        self.progress.waits.store(true, Ordering::SeqCst);
        Waiting(self)
    }

    fn monotonic(&self) -> Span {
        Span::from_std(self.clock.clock().monotonic())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::engine::bare::bare_engine;
    use crate::keyring::time::Timestamp;

    #[tokio::test]
    async fn a_late_heartbeat_is_named_and_a_store_that_hangs_is_not() {
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        let engine = bare_engine(clock.clone()).await;
        clock.advance(Span::DAY);
        assert_eq!(engine.ailments(), [""; 0], "it has not begun");
        engine.moved();
        clock.advance(engine.interval() + LATE);
        assert_eq!(engine.ailments(), [""; 0], "a busy machine");
        clock.advance(Span::SECOND);
        assert_eq!(engine.ailments(), ["the heartbeat has not moved for 1m1s"]);
        engine.moved();
        let waiting = engine.waits_for_store();
        clock.advance(Span::DAY);
        assert_eq!(engine.ailments(), [""; 0], "it waits for the store");
        drop(waiting);
        assert_eq!(engine.ailments(), [""; 0], "and has come on");
        clock.advance(Span::HOUR);
        assert_eq!(engine.ailments().len(), 1);
    }
}
