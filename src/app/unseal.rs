//! Opening a seal that lives elsewhere: again and again, until it opens or says that it never will.

use std::sync::Arc;

use tokio::sync::Notify;

use super::AppError;
use super::storage::Unsealing;
use crate::engine::{Declared, Engine, StartError, chain};
use crate::keyring::time::Span;
use crate::random;
use crate::seal::data_keys::LateDataKeys;

/// Attempts begin at most this far apart (DESIGN §10), unless one takes longer.
const RETRY_MAX: Span = Span::from_secs(5);
const RETRY_MIN: Span = Span::from_millis(200);

/// A pause is shortened by up to this part of it, so that many daemons do not come back as one.
const JITTER: i64 = 4;

/// A daemon that waits for its seal.
pub(super) struct Sealed {
    pub unsealing: Unsealing,
    pub data_keys: Arc<LateDataKeys>,
    pub declared: Vec<Declared>,
}

impl Sealed {
    /// Returns once the seal is open and every record was authenticated. `failed` is told of each attempt that failed.
    ///
    /// # Errors
    /// What refuses a start, as long as no listener is open. Later nothing does: what cannot be trusted is not served.
    pub async fn unseal(&self, engine: &Arc<Engine>, failed: &Notify) -> Result<(), AppError> {
        self.unsealing.calls.start(&engine.metrics, engine.clock.clock().clone());
        let mut failures: u32 = 0;
        loop {
            let began = engine.clock.boot();
            let Err(error) = self.attempt(engine).await else {
                tracing::info!(failures, "the seal is open");
                return Ok(());
            };
            if !error.may_pass() {
                if !engine.is_open() {
                    return Err(error.into());
                }
                let reason = error.text();
                tracing::error!(error = %reason, "the seal refuses what is stored: nothing of it is served any more; repair it and restart");
                engine.refuse_everything(&reason).await;
                // As the keysets, so this: only a restart after repair helps.
                return std::future::pending().await;
            }
            if failures == 0 {
                tracing::error!(error = %error.text(), "the seal cannot be opened: records are served unauthenticated, nothing is signed or written; it is tried again");
            } else {
                tracing::warn!(error = %error.text(), failures, "the seal still cannot be opened; it is tried again");
            }
            failed.notify_one();
            engine.clock.clock().sleep(pause(failures, engine.clock.boot().saturating_sub(began))).await;
            failures = failures.saturating_add(1);
        }
    }

    async fn attempt(&self, engine: &Arc<Engine>) -> Result<(), Failure> {
        let ledger = match engine.ledger() {
            // An earlier attempt opened the seal and then met a store that failed.
            Ok(ledger) => ledger.clone(),
            Err(_) => Arc::new(self.unsealing.attempt(engine.clock.now()).await.map_err(|error| vec![error.into()])?),
        };
        self.data_keys.arrive(ledger.keys());
        Ok(engine.unseal(ledger, &self.declared).await?)
    }
}

/// Why one attempt failed.
struct Failure(Vec<StartError>);

impl From<Vec<StartError>> for Failure {
    fn from(errors: Vec<StartError>) -> Self {
        Failure(errors)
    }
}

impl From<Failure> for AppError {
    fn from(Failure(errors): Failure) -> Self {
        AppError::Start(errors.iter().map(|error| chain(error)).collect())
    }
}

impl Failure {
    fn may_pass(&self) -> bool {
        self.0.iter().any(StartError::may_pass)
    }

    fn text(&self) -> String {
        self.0.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; ")
    }
}

/// How long to wait after the failure number `failures` (from 0) of an attempt that took `took`.
fn pause(failures: u32, took: Span) -> Span {
    let longest = RETRY_MIN.times(1 << failures.min(6)).min(RETRY_MAX);
    let rest = longest.as_millis().min(RETRY_MAX.saturating_sub(took).as_millis()).max(RETRY_MIN.as_millis());
    random::span_between(Span::from_millis(rest - rest / JITTER), Span::from_millis(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_begin_at_most_five_seconds_apart_and_pauses_grow() {
        for failures in [0, 1, 5, 6, 100, u32::MAX] {
            for took in [0, 10, 4_000] {
                let took = Span::from_millis(took);
                for _ in 0..100 {
                    let pause = pause(failures, took);
                    assert!(pause + took <= RETRY_MAX, "{failures}: {pause} after {took}");
                    assert!(pause >= Span::from_millis(150), "{failures}: {pause} after {took}");
                }
            }
        }
        assert!(pause(0, Span::ZERO) <= RETRY_MIN);
        assert!(pause(9, Span::ZERO) > Span::from_secs(3));
    }

    #[test]
    fn an_attempt_that_took_long_is_repeated_soon_but_not_at_once() {
        let pause = pause(3, Span::MINUTE);
        assert!((Span::from_millis(150)..=RETRY_MIN).contains(&pause), "{pause}");
    }
}
