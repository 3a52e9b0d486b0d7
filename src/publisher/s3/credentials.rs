//! The AWS credential chain as the storage's client wants it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use tokio::sync::Mutex;

use crate::clock::Clock;
use crate::keyring::time::{Span, Timestamp};

/// Names the chain in errors.
pub(super) const CREDENTIALS: &str = "AWS credentials";

/// Credentials that end sooner are loaded anew.
const MARGIN: Duration = Duration::from_secs(60);

/// Those without an end may stand in a file that somebody replaces.
const KEPT: Span = Span::from_secs(300);

/// The standard chain: environment, profiles, web identity, container credentials, instance metadata. Whoever comes
/// while they are loaded waits for the same answer.
pub(super) struct Chain {
    chain: SharedCredentialsProvider,
    clock: Arc<dyn Clock>,
    held: Mutex<Option<Held>>,
}

struct Held {
    credential: Arc<AwsCredential>,
    until: Timestamp,
}

impl Chain {
    pub(super) fn new(chain: SharedCredentialsProvider, clock: Arc<dyn Clock>) -> Self {
        Chain { chain, clock, held: Mutex::default() }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").finish_non_exhaustive()
    }
}

#[async_trait]
impl CredentialProvider for Chain {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut held = self.held.lock().await;
        let now = self.clock.wall();
        if let Some(held) = held.as_ref().filter(|held| now < held.until) {
            return Ok(held.credential.clone());
        }
        let failed = |error| object_store::Error::Generic { store: CREDENTIALS, source: Box::new(error) };
        let loaded = self.chain.provide_credentials().await.map_err(failed)?;
        let credential = Arc::new(AwsCredential {
            key_id: loaded.access_key_id().to_owned(),
            secret_key: loaded.secret_access_key().to_owned(),
            token: loaded.session_token().map(str::to_owned),
        });
        let kept = now + KEPT;
        let until = loaded
            .expiry()
            .map_or(kept, |expiry| timestamp(expiry.checked_sub(MARGIN).unwrap_or(UNIX_EPOCH)).min(kept));
        *held = Some(Held { credential: credential.clone(), until });
        Ok(credential)
    }
}

fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
