//! Loading credentials to the end, also when the call that needs them is given up meanwhile.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use crate::clock::Clock;

/// How long a load may take. A service that accepts and never answers must not hold up the loads after it.
const LOAD_TIMEOUT: Duration = Duration::from_secs(15);

/// A credential chain whose answer is not lost. An attempt at a signature has less than a second; where the chain needs
/// longer, because STS is slow, each attempt would begin anew and none would ever end.
#[derive(Clone)]
pub(super) struct Patient {
    chain: SharedCredentialsProvider,
    clock: Arc<dyn Clock>,
    /// What was loaded for somebody who did not wait for it.
    spare: Arc<Mutex<Option<Credentials>>>,
}

impl fmt::Debug for Patient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patient").finish_non_exhaustive()
    }
}

impl Patient {
    pub(super) fn new(chain: SharedCredentialsProvider, clock: Arc<dyn Clock>) -> Self {
        Patient { chain, clock, spare: Arc::default() }
    }

    async fn load(&self) -> Result<Credentials, CredentialsError> {
        let (answer, asked) = oneshot::channel();
        let (chain, clock, spare) = (self.chain.clone(), self.clock.clone(), self.spare.clone());
        tokio::spawn(async move {
            // Whoever comes meanwhile waits for this one's answer.
            let mut spare = spare.lock().await;
            if answer.is_closed() {
                return;
            }
            let loaded = match spare.take().filter(|spare| is_fresh(spare, &*clock)) {
                Some(loaded) => Ok(loaded),
                None => timeout(LOAD_TIMEOUT, chain.provide_credentials())
                    .await
                    .unwrap_or_else(|_| Err(CredentialsError::provider_timed_out(LOAD_TIMEOUT))),
            };
            if let Err(Ok(unwanted)) = answer.send(loaded) {
                *spare = Some(unwanted);
            }
        });
        asked.await.unwrap_or_else(|_| Err(CredentialsError::unhandled("loading was aborted")))
    }
}

fn is_fresh(credentials: &Credentials, clock: &dyn Clock) -> bool {
    let now = u64::try_from(clock.wall().as_millis()).map(Duration::from_millis).unwrap_or_default();
    credentials.expiry().is_none_or(|expiry| expiry > UNIX_EPOCH + now)
}

impl ProvideCredentials for Patient {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.load())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::time::sleep;

    use super::*;
    use crate::clock::ManualClock;
    use crate::keyring::time::{Span, Timestamp};

    const ATTEMPT: Duration = Duration::from_millis(900);

    /// A chain that takes 5 s; the first load never ends if it `hangs_once`.
    #[derive(Clone, Debug, Default)]
    struct Slow {
        loads: Arc<AtomicUsize>,
        hangs_once: bool,
        /// Unix seconds.
        expiry: Option<u64>,
    }

    impl ProvideCredentials for Slow {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            future::ProvideCredentials::new(async {
                if self.loads.fetch_add(1, Ordering::Relaxed) == 0 && self.hangs_once {
                    std::future::pending::<()>().await;
                }
                sleep(Duration::from_secs(5)).await;
                let expiry = self.expiry.map(|at| UNIX_EPOCH + Duration::from_secs(at));
                Ok(Credentials::new("id", "secret", None, expiry, "test"))
            })
        }
    }

    fn patient(chain: &Slow) -> (Patient, Arc<ManualClock>) {
        let clock = ManualClock::at(Timestamp::from_secs(1_000));
        (Patient::new(SharedCredentialsProvider::new(chain.clone()), clock.clone()), clock)
    }

    /// Attempts until credentials arrive.
    async fn attempts(patient: &Patient) -> usize {
        for attempt in 1..100 {
            if let Ok(loaded) = timeout(ATTEMPT, patient.provide_credentials()).await {
                assert_eq!(loaded.unwrap().access_key_id(), "id");
                return attempt;
            }
        }
        panic!("no credentials arrive");
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_that_take_longer_than_an_attempt_arrive_all_the_same() {
        let chain = Slow::default();
        assert_eq!(attempts(&patient(&chain).0).await, 6);
        assert_eq!(chain.loads.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_load_that_never_ends_is_given_up_and_holds_nobody_up_for_long() {
        let chain = Slow { hangs_once: true, ..Slow::default() };
        let patient = patient(&chain).0;
        assert!(attempts(&patient).await <= 25);
        // Those who gave up waiting meanwhile had nothing loaded for them.
        assert_eq!(chain.loads.load(Ordering::Relaxed), 2);
        let alone = Slow { hangs_once: true, ..Slow::default() };
        let error = self::patient(&alone).0.provide_credentials().await.unwrap_err();
        assert!(matches!(error, CredentialsError::ProviderTimedOut(_)), "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_expired_while_nobody_wanted_it_is_not_used() {
        let chain = Slow { expiry: Some(1_060), ..Slow::default() };
        let (patient, clock) = patient(&chain);
        assert!(timeout(ATTEMPT, patient.provide_credentials()).await.is_err());
        sleep(Duration::from_secs(10)).await;
        clock.advance(Span::from_secs(61));
        patient.provide_credentials().await.unwrap();
        assert_eq!(chain.loads.load(Ordering::Relaxed), 2);
    }
}
