//! Background tasks that must not end: one that panics is started again, and `/livez` names it until it has kept running
//! for a while. Starting it again serves verifiers better than ending a process whose documents are right; where it does
//! not help, the kubelet sees a process that is not alive.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How soon a task is started again, and how long it must run to count as well.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub again: Duration,
    pub steady: Duration,
}

/// A single panic is over before a kubelet gives up on the process (three failures, ten seconds apart).
const PACE: Pace = Pace { again: Duration::from_secs(1), steady: Duration::from_secs(10) };

/// Knows which background tasks of this process do not run as they should.
#[derive(Default)]
pub struct Supervisor {
    ailing: Mutex<BTreeSet<&'static str>>,
}

impl Supervisor {
    /// Tasks that ended by themselves and have not run for long since, by name.
    pub fn ailing(&self) -> Vec<&'static str> {
        self.ailing.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    /// Keeps the task running that `start` makes, until `cancel` has it end.
    pub async fn keep<F>(self: Arc<Self>, name: &'static str, cancel: CancellationToken, start: impl Fn() -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.keep_at(PACE, name, cancel, start).await;
    }

    async fn keep_at<F>(&self, pace: Pace, name: &'static str, cancel: CancellationToken, start: impl Fn() -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        while !cancel.is_cancelled() {
            let mut task = tokio::spawn(start());
            let ended = match tokio::time::timeout(pace.steady, &mut task).await {
                Ok(ended) => ended,
                Err(_) => {
                    self.set(name, false);
                    task.await
                }
            };
            if cancel.is_cancelled() && ended.is_ok() {
                return;
            }
            self.set(name, true);
            let cause = ended.err().map_or_else(|| "it ended by itself".to_owned(), |error| error.to_string());
            tracing::error!(task = name, cause, "a background task ended; it is started again");
            tokio::select! {
                () = tokio::time::sleep(pace.again) => {}
                () = cancel.cancelled() => {}
            }
        }
    }

    fn set(&self, name: &'static str, ails: bool) {
        let mut ailing = self.ailing.lock().unwrap_or_else(PoisonError::into_inner);
        if ails {
            ailing.insert(name)
        } else {
            ailing.remove(name)
        };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_or_ends_is_named_and_started_again() {
        let supervisor = Arc::new(Supervisor::default());
        let (starts, cancel) = (Arc::new(AtomicUsize::new(0)), CancellationToken::new());
        let start = {
            let (starts, cancel) = (starts.clone(), cancel.clone());
            move || {
                let (start, cancel) = (starts.fetch_add(1, Ordering::Relaxed), cancel.clone());
                async move {
                    match start {
                        0 => {
                            tokio::time::sleep(PACE.steady * 3).await;
                            panic!("as a test of what becomes of it");
                        }
                        1 => {}
                        _ => cancel.cancelled().await,
                    }
                }
            }
        };
        let kept = tokio::spawn(supervisor.clone().keep("heartbeat", cancel.clone(), start));
        tokio::time::sleep(PACE.steady * 2).await;
        assert_eq!(supervisor.ailing(), [""; 0], "it runs");
        tokio::time::sleep(PACE.steady + PACE.again / 2).await;
        assert_eq!((supervisor.ailing(), starts.load(Ordering::Relaxed)), (vec!["heartbeat"], 1), "it panicked");
        tokio::time::sleep(PACE.again * 2).await;
        assert_eq!(
            (supervisor.ailing(), starts.load(Ordering::Relaxed)),
            (vec!["heartbeat"], 3),
            "it ended, twice over"
        );
        tokio::time::sleep(PACE.steady * 2).await;
        assert_eq!((supervisor.ailing(), starts.load(Ordering::Relaxed)), (vec![], 3), "it runs again");
        cancel.cancel();
        kept.await.unwrap();
        assert_eq!(supervisor.ailing(), [""; 0], "an end that was asked for is none of these");
    }
}
