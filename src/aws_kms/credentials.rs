//! Loading credentials to the end, also when the call that needs them is given up meanwhile.

use std::sync::Arc;

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use tokio::sync::{Mutex, oneshot};

/// A credential chain whose answer is not lost. An attempt at a signature has less than a second; where the chain needs
/// longer, because STS is slow, each attempt would begin anew and none would ever end.
#[derive(Clone, Debug)]
pub(super) struct Patient {
    chain: SharedCredentialsProvider,
    /// What was loaded for somebody who did not wait for it.
    spare: Arc<Mutex<Option<Credentials>>>,
}

impl Patient {
    pub(super) fn new(chain: SharedCredentialsProvider) -> Self {
        Patient { chain, spare: Arc::default() }
    }

    async fn load(&self) -> Result<Credentials, CredentialsError> {
        let (answer, asked) = oneshot::channel();
        let (chain, spare) = (self.chain.clone(), self.spare.clone());
        tokio::spawn(async move {
            // Whoever comes meanwhile waits for this one's answer.
            let mut spare = spare.lock().await;
            let loaded = match spare.take() {
                Some(loaded) => Ok(loaded),
                None => chain.provide_credentials().await,
            };
            if let Err(Ok(unwanted)) = answer.send(loaded) {
                *spare = Some(unwanted);
            }
        });
        asked.await.unwrap_or_else(|_| Err(CredentialsError::unhandled("loading was aborted")))
    }
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
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;

    #[derive(Debug)]
    struct Slow(Arc<AtomicUsize>);

    impl ProvideCredentials for Slow {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            future::ProvideCredentials::new(async {
                self.0.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_secs(5)).await;
                Ok(Credentials::new("id", "secret", None, None, "test"))
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_that_take_longer_than_an_attempt_arrive_all_the_same() {
        let loads = Arc::new(AtomicUsize::new(0));
        let patient = Patient::new(SharedCredentialsProvider::new(Slow(loads.clone())));
        let mut attempts = 0;
        let loaded = loop {
            attempts += 1;
            if let Ok(loaded) = timeout(Duration::from_millis(900), patient.provide_credentials()).await {
                break loaded.unwrap();
            }
            assert!(attempts < 20);
        };
        assert_eq!((loaded.access_key_id(), loads.load(Ordering::Relaxed)), ("id", 1));
    }
}
