//! The AWS KMS seal: a key-encryption key that never leaves the service.
//!
//! It is asked when the seal is opened or changed, and never in between: what it wraps are data keys, and these sign and
//! seal at local speed, whatever becomes of the service.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::OnceCell;
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use super::{KeyEncryptionKey, SealError};
use crate::aws_kms::{AWS_KMS, EncryptionContext, KmsApi, KmsError, KmsErrorKind};
use crate::clock::Clock;
use crate::telemetry::metrics::{BackendMetrics, BackendOperation, BackendOutcome, Metrics};

/// How long one attempt may take. The first one also fetches credentials.
const ATTEMPT: Duration = Duration::from_millis(2500);

/// How long a call takes at most, with its retries.
const DEADLINE: Duration = Duration::from_millis(4500);

const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(50);

/// What the encryption context says in every call, for IAM conditions and CloudTrail. Constant for ever.
const PURPOSE: (&str, &str) = ("jwksd-purpose", "seal");
const CONTEXT: &str = "jwksd-context";

/// A symmetric key in AWS KMS.
pub struct AwsKmsKey {
    api: Arc<dyn KmsApi>,
    /// As configured: an ARN, a key ID or an alias.
    named: String,
    /// Which key that is; asked once, so that an alias that moves does not move a running daemon's seal.
    arn: OnceCell<String>,
    counter: Arc<CallCounter>,
}

/// Counts calls, retries one by one, as those of the backend `aws-kms`. Keys are made before there are metrics: calls
/// before [`start`](Self::start) are not counted.
#[derive(Default)]
pub struct CallCounter(OnceLock<(BackendMetrics, Arc<dyn Clock>)>);

impl CallCounter {
    /// Makes the series appear. Repeating it changes nothing.
    pub fn start(&self, metrics: &Metrics, clock: Arc<dyn Clock>) {
        self.0.get_or_init(|| (metrics.register_backend(AWS_KMS), clock));
    }

    fn begin(&self, operation: BackendOperation) -> Counted<'_> {
        let began = self.0.get().map(|(_, clock)| clock.monotonic()).unwrap_or_default();
        Counted { counter: self, operation, began, outcome: BackendOutcome::Timeout }
    }
}

/// A call under way. One that is given up is counted as a timeout.
struct Counted<'a> {
    counter: &'a CallCounter,
    operation: BackendOperation,
    began: Duration,
    outcome: BackendOutcome,
}

impl Counted<'_> {
    fn ended<T>(mut self, result: &Result<T, KmsError>) {
        self.outcome = result.as_ref().err().map_or(BackendOutcome::Ok, |error| outcome_of(error.kind));
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if let Some((metrics, clock)) = self.counter.0.get() {
            metrics.requested(self.operation, self.outcome, clock.monotonic().saturating_sub(self.began));
        }
    }
}

impl AwsKmsKey {
    /// The key that `named` means to the service: an ARN, a key ID, or an alias. Nothing is asked yet.
    pub fn new(api: Arc<dyn KmsApi>, named: &str) -> Self {
        let arn = if is_key_arn(named) { OnceCell::new_with(Some(named.to_owned())) } else { OnceCell::new() };
        AwsKmsKey { api, named: named.to_owned(), arn, counter: Arc::default() }
    }

    /// The same key, with its calls counted there.
    #[must_use]
    pub fn counted_by(self, counter: &Arc<CallCounter>) -> Self {
        AwsKmsKey { counter: counter.clone(), ..self }
    }

    async fn arn(&self) -> Result<&str, SealError> {
        let ask = || async {
            let found = self.persist(BackendOperation::Describe, || self.api.describe_key(&self.named)).await;
            let key = found.map_err(|error| self.failed(error))?;
            if !key.encrypts {
                let problem = "it is not a symmetric key for encryption; make one with KeySpec SYMMETRIC_DEFAULT";
                return Err(SealError::Unusable { key: self.named.clone(), problem: problem.to_owned() });
            }
            Ok(key.arn)
        };
        self.arn.get_or_try_init(ask).await.map(String::as_str)
    }

    /// Tries again what may pass soon, until the deadline.
    async fn persist<T, F>(&self, operation: BackendOperation, call: impl Fn() -> F) -> Result<T, Option<KmsError>>
    where
        F: Future<Output = Result<T, KmsError>>,
    {
        let mut last = None;
        let attempts = async {
            for attempt in 1..=ATTEMPTS {
                let counted = self.counter.begin(operation);
                let answered = timeout(ATTEMPT, call()).await.inspect(|answer| counted.ended(answer));
                match answered {
                    Ok(Ok(answer)) => return Some(answer),
                    Ok(Err(error)) => {
                        let transient = error.kind.is_transient();
                        last = Some(error);
                        if !transient {
                            return None;
                        }
                    }
                    Err(_) => {}
                }
                sleep(pause(attempt)).await;
            }
            None
        };
        match timeout(DEADLINE, attempts).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) | Err(_) => Err(last),
        }
    }

    /// `None`: there was no answer at all.
    fn failed(&self, error: Option<KmsError>) -> SealError {
        let key = self.named.clone();
        match error {
            Some(error) if error.kind == KmsErrorKind::Unsupported => {
                SealError::Unusable { key, problem: error.to_string() }
            }
            Some(error) => SealError::Unavailable { key, source: Some(error.into()) },
            None => SealError::Unavailable { key, source: Some("AWS KMS did not answer in time".into()) },
        }
    }
}

#[async_trait]
impl KeyEncryptionKey for AwsKmsKey {
    /// The ARN of the key. An alias or a key ID is looked up, once.
    async fn id(&self) -> Result<String, SealError> {
        self.arn().await.map(str::to_owned)
    }

    async fn wrap(&self, context: &str, plaintext: &[u8]) -> Result<Vec<u8>, SealError> {
        let arn = self.arn().await?;
        let bound_to = encryption_context(context);
        let encrypted = self.persist(BackendOperation::Encrypt, || self.api.encrypt(arn, plaintext, &bound_to)).await;
        Ok(encrypted.map_err(|error| self.failed(error))?.ciphertext)
    }

    async fn unwrap(&self, context: &str, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let arn = self.arn().await?;
        let bound_to = encryption_context(context);
        let decrypted = self.persist(BackendOperation::Decrypt, || self.api.decrypt(arn, wrapped, &bound_to)).await;
        decrypted.map_err(|error| match error {
            Some(error) if error.kind == KmsErrorKind::InvalidCiphertext => {
                SealError::Mismatch { key: arn.to_owned(), what: format!("`{context}`") }
            }
            error => self.failed(error),
        })
    }
}

impl std::fmt::Debug for AwsKmsKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AwsKmsKey").field("named", &self.named).field("arn", &self.arn.get()).finish_non_exhaustive()
    }
}

fn outcome_of(kind: KmsErrorKind) -> BackendOutcome {
    match kind {
        KmsErrorKind::Unavailable => BackendOutcome::Unavailable,
        KmsErrorKind::Timeout => BackendOutcome::Timeout,
        KmsErrorKind::Throttled => BackendOutcome::Throttled,
        KmsErrorKind::Denied => BackendOutcome::Denied,
        KmsErrorKind::Disabled | KmsErrorKind::InvalidState => BackendOutcome::KeyDisabled,
        KmsErrorKind::NotFound => BackendOutcome::NotFound,
        KmsErrorKind::AlreadyExists
        | KmsErrorKind::InvalidCiphertext
        | KmsErrorKind::Quota
        | KmsErrorKind::Unsupported
        | KmsErrorKind::Other => BackendOutcome::Failed,
    }
}

fn encryption_context(context: &str) -> Box<EncryptionContext> {
    Box::new([(PURPOSE.0, PURPOSE.1.to_owned()), (CONTEXT, context.to_owned())])
}

/// An alias has an ARN too, but says nothing of its key.
fn is_key_arn(named: &str) -> bool {
    named.starts_with("arn:") && named.splitn(6, ':').nth(5).is_some_and(|resource| resource.starts_with("key/"))
}

/// Doubled with each attempt, half of it at random.
fn pause(attempt: u32) -> Duration {
    let longest = PAUSE * (1 << attempt.min(5));
    crate::random::between(longest / 2, longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_arn_of_a_key_says_which_key_it_is() {
        assert!(is_key_arn("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"));
        assert!(is_key_arn("arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/mrk-1234abcd"));
        for other in ["arn:aws:kms:eu-central-1:111122223333:alias/jwksd", "alias/jwksd", "1234abcd", "arn:key/", ""] {
            assert!(!is_key_arn(other), "{other}");
        }
    }

    #[test]
    fn pauses_grow_and_stay_far_below_the_deadline() {
        let longest: Duration = (1..=ATTEMPTS).map(|attempt| PAUSE * (1 << attempt)).sum();
        assert!(longest * 2 < DEADLINE);
        for attempt in 1..=ATTEMPTS {
            for _ in 0..100 {
                assert!(pause(attempt) >= PAUSE && pause(attempt) <= PAUSE * (1 << attempt));
            }
        }
    }
}
