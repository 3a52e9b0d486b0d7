//! The hot path: claims policy, header, signature. Reads one snapshot, takes no lock, touches no store.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use tokio::time::timeout;
use tracing::{Instrument, Span};

use super::Engine;
use super::cell::KeysetCell;
use super::reconcile::{chain, outcome_of};
use super::snapshot::ActiveKey;
use crate::backend::verify::verify;
use crate::backend::{BackendError, BackendErrorKind, LocalSigner, RemoteSigner, Signer};
use crate::clock::Clock;
use crate::keyring::claims::{ClaimError, Problem, SignRequest};
use crate::keyring::jwk::Kid;
use crate::keyring::record::Serial;
use crate::keyring::time::Timestamp;
use crate::random::Entropy;
use crate::telemetry::audit::{SignatureLine, signature};
use crate::telemetry::metrics::{BackendMetrics, BackendOperation, BackendOutcome, SignRejection, SigningFailure};
use crate::telemetry::traces;

/// A signed token.
#[derive(Clone)]
pub struct Issued {
    pub token: String,
    pub kid: Kid,
    pub alg: &'static str,
    /// Unix seconds.
    pub expires_at: i64,
    pub expires_in: i64,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum SignFailure {
    /// The caller's claims.
    #[error(transparent)]
    Claims(#[from] ClaimError),
    /// An operator ended the keyset: waiting does not help.
    #[error("the keyset is drained")]
    Drained,
    /// Ours; the reason is also the metric's label.
    #[error("the token could not be signed: {reason:?}")]
    Ours { reason: SigningFailure, cause: String },
}

impl SignFailure {
    /// `None` where the caller is at fault.
    fn reason(&self) -> Option<SigningFailure> {
        match self {
            SignFailure::Claims(_) | SignFailure::Drained => None,
            SignFailure::Ours { reason, .. } => Some(*reason),
        }
    }
}

/// Attempts of one request at a remote backend, as far as its deadline allows.
const REMOTE_ATTEMPTS: u32 = 6;
/// The first pause between two of them is at most this; each further one twice that of the one before.
const REMOTE_PAUSE_MIN: Duration = Duration::from_millis(5);
const REMOTE_PAUSE: Duration = Duration::from_millis(25);
const REMOTE_PAUSE_MAX: Duration = Duration::from_millis(400);
/// Less time than this is not worth another attempt; it also keeps the attempt's end before the request's.
const REMOTE_SPARE: Duration = Duration::from_millis(10);

/// 128 random bits tell tokens apart.
const JTI_BYTES: usize = 16;

/// What a probe has signed. It is no JWS: those contain a dot.
const PROBE: &[u8] = b"jwksd asks whether this key signs";

impl Engine {
    /// Signs the claims of `request` with the keyset's active key. `audiences` limits the client; `client` is its name
    /// for the audit line.
    pub async fn sign(
        &self,
        cell: &KeysetCell,
        request: &SignRequest<'_>,
        audiences: Option<&[String]>,
        client: &str,
    ) -> Result<Issued, SignFailure> {
        let started = self.clock.clock().monotonic();
        let metrics = cell.signing_metrics.load();
        let span = traces::sign(&cell.name);
        let result = self.sign_once_more(cell, request, audiences, client).instrument(span.clone()).await;
        traces::signed(&span, result.as_ref().err().map(SignFailure::reason));
        match &result {
            Ok(_) => metrics.signed(self.clock.clock().monotonic().saturating_sub(started)),
            Err(SignFailure::Ours { reason, .. }) => metrics.failed(*reason),
            Err(SignFailure::Claims(error)) => metrics.rejected(error.rejection().into()),
            Err(SignFailure::Drained) => metrics.rejected(SignRejection::Drained),
        }
        result
    }

    /// A key revoked while it signed is replaced by its successor.
    async fn sign_once_more(
        &self,
        cell: &KeysetCell,
        request: &SignRequest<'_>,
        audiences: Option<&[String]>,
        client: &str,
    ) -> Result<Issued, SignFailure> {
        let ends = self.clock.clock().monotonic() + self.settings.load().sign_deadline.to_std();
        for _ in 0..3 {
            if let Some(issued) = self.attempt(cell, request, audiences, client, ends).await? {
                return Ok(issued);
            }
        }
        Err(ours(SigningFailure::NoActiveKey, "the key was revoked while it signed, again and again"))
    }

    /// `None` when the key was revoked before its token could leave. `ends` is when the whole request must be done.
    async fn attempt(
        &self,
        cell: &KeysetCell,
        request: &SignRequest<'_>,
        audiences: Option<&[String]>,
        client: &str,
        ends: Duration,
    ) -> Result<Option<Issued>, SignFailure> {
        // One reading serves iat, nbf and exp. It comes before the choice of the key, so that no key signs with a time
        // later than the one at which it was seen to have stopped.
        let reading = self.clock.read();
        let now = reading.now;
        let snapshot = cell.snapshot.load();
        let jti = URL_SAFE_NO_PAD.encode(self.entropy.bytes::<JTI_BYTES>());
        let prepared = snapshot.rules.issue(request, now, &jti, audiences)?;
        if cell.is_stale(snapshot.keyring.policy.rotation.staleness_limit, reading.boot) {
            return Err(ours(
                SigningFailure::StaleKeyring,
                "the store has not confirmed the keyring for staleness_limit",
            ));
        }
        if self.is_sealed() || cell.issuer.is_withheld() {
            return Err(ours(SigningFailure::BackendUnavailable, "the seal has not been opened yet"));
        }
        let Some(active) = snapshot.active.clone() else {
            if snapshot.keyring.drained {
                return Err(SignFailure::Drained);
            }
            return Err(ours(SigningFailure::NoActiveKey, "no key is active"));
        };
        drop(snapshot);
        traces::signs_with(active.algorithm.alg(), &active.backend);
        let Some(header) = active.headers.get(prepared.typ) else {
            return Err(ours(SigningFailure::NoActiveKey, "the allowed types change just now"));
        };
        let mut token = String::with_capacity(
            header.len() + prepared.payload.len() * 4 / 3 + active.algorithm.signature_len() * 4 / 3 + 16,
        );
        token.push_str(header);
        URL_SAFE_NO_PAD.encode_string(&prepared.payload, &mut token);
        refuse_what_is_too_long(&active.signer, &token)?;
        let signature = self.signature(cell, &active, &token, ends).await?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(&signature, &mut token);
        let issued = active.door.leave(|| Issued {
            token,
            kid: active.kid.clone(),
            alg: active.algorithm.alg(),
            expires_at: prepared.expires_at,
            expires_in: prepared.expires_in,
        });
        if issued.is_some() && self.settings.load().audit_signatures {
            signature_line(cell, &active, &prepared.jti, client, now);
        }
        Ok(issued)
    }

    async fn signature(
        &self,
        cell: &KeysetCell,
        active: &Arc<ActiveKey>,
        message: &str,
        ends: Duration,
    ) -> Result<Vec<u8>, SignFailure> {
        match &active.signer {
            Signer::Inline(signer) => {
                let clock = self.clock.clock().as_ref();
                counted(clock, &active.requests, || signer.sign(message.as_bytes())).map_err(failed)
            }
            Signer::InTurn(signer) => self.when_others_have_run(cell, active, &**signer, message, ends).await,
            Signer::Pooled(signer) => self.pooled(cell, active, signer.clone(), message, ends).await,
            Signer::Remote(signer) => self.remote(cell, active, signer.clone(), message, ends).await,
        }
    }

    /// Signs here, without what handing over to another thread costs. Whoever is ready goes before, so that a quick
    /// signature or a document never waits for more than one of these, or one for each other processor.
    async fn when_others_have_run(
        &self,
        cell: &KeysetCell,
        active: &ActiveKey,
        signer: &dyn LocalSigner,
        message: &str,
        ends: Duration,
    ) -> Result<Vec<u8>, SignFailure> {
        let clock = self.clock.clock().as_ref();
        self.in_turn(cell, &cell.pool.threads, ends, SigningFailure::Overload, async {
            let _turn = self.busy.acquire().await;
            // By the first, requests that arrived while the one before signed are known; by the second, they have run.
            yield_now().await;
            yield_now().await;
            counted(clock, &active.requests, || signer.sign(message.as_bytes())).map_err(failed)
        })
        .await
    }

    async fn pooled(
        &self,
        cell: &KeysetCell,
        active: &ActiveKey,
        signer: Arc<dyn LocalSigner>,
        message: &str,
        ends: Duration,
    ) -> Result<Vec<u8>, SignFailure> {
        let message = message.as_bytes().to_vec();
        let (clock, requests, span) = (self.clock.clock().clone(), active.requests.clone(), Span::current());
        self.in_turn(cell, &cell.pool.threads, ends, SigningFailure::Overload, async move {
            let work = tokio::task::spawn_blocking(move || {
                span.in_scope(|| counted(clock.as_ref(), &requests, || signer.sign(&message)))
            });
            match work.await {
                Ok(signature) => signature.map_err(failed),
                Err(error) => Err(ours(SigningFailure::BackendUnavailable, &error.to_string())),
            }
        })
        .await
    }

    /// Signs elsewhere, with retries inside the deadline; what comes back is verified before it leaves.
    async fn remote(
        &self,
        cell: &KeysetCell,
        active: &ActiveKey,
        signer: Arc<dyn RemoteSigner>,
        message: &str,
        ends: Duration,
    ) -> Result<Vec<u8>, SignFailure> {
        let left = || ends.saturating_sub(self.clock.clock().monotonic()).saturating_sub(REMOTE_SPARE);
        let signed = self
            .in_turn(cell, &cell.pool.calls, ends, SigningFailure::BackendTimeout, async {
                let mut attempt = 0;
                let signature = loop {
                    attempt += 1;
                    let error = match self.attempt_remote(active, &*signer, message.as_bytes(), left()).await {
                        Ok(signature) => break signature,
                        Err(error) => error,
                    };
                    let pause = pause_before(attempt, &*self.entropy);
                    let again = transient(error.kind)
                        && attempt < REMOTE_ATTEMPTS
                        && left() > pause
                        && !active.door.is_closed()
                        && cell.pool.may_retry();
                    if !again {
                        return Err(failed(error));
                    }
                    tokio::time::sleep(pause).await;
                };
                cell.pool.succeeded();
                verify(active.algorithm, &active.public, message.as_bytes(), &signature)
                    .map_err(|error| ours(SigningFailure::VerificationFailed, &chain(&error)))?;
                Ok(signature)
            })
            .await;
        note_health(cell, signed.as_ref().err());
        note_disabled(cell, active.serial, signed.as_ref().err());
        signed
    }

    /// One call, counted and timed.
    async fn attempt_remote(
        &self,
        active: &ActiveKey,
        signer: &dyn RemoteSigner,
        message: &[u8],
        limit: Duration,
    ) -> Result<Vec<u8>, BackendError> {
        let late = |_| BackendError {
            backend: self.backend(&active.backend).map_or("unknown", |backend| backend.name()),
            operation: "sign",
            kind: BackendErrorKind::Timeout,
            source: None,
        };
        let call = async { timeout(limit, signer.sign(message)).await.map_err(late)? };
        match self.backend(&active.backend) {
            Some(backend) => self.timed(backend, BackendOperation::Sign, call).await,
            None => call.await,
        }
    }

    /// Finds out in the background whether a remote active key signs, unless somebody does already. The keyset is
    /// notified when the answer is news.
    pub(super) fn probe(self: &Arc<Self>, cell: &Arc<KeysetCell>) {
        let Some(active) = cell.snapshot.load().active.clone() else { return };
        let Signer::Remote(signer) = active.signer.clone() else { return };
        if !cell.remote.begin_probe() {
            return;
        }
        let (engine, cell) = (self.clone(), cell.clone());
        tokio::spawn(async move {
            let limit = engine.settings.load().sign_deadline.to_std();
            let signed = engine.attempt_remote(&active, &*signer, PROBE, limit).await.map_err(failed);
            let verified = signed.and_then(|signature| {
                verify(active.algorithm, &active.public, PROBE, &signature)
                    .map_err(|error| ours(SigningFailure::VerificationFailed, &chain(&error)))
            });
            cell.remote.probed();
            if let Err(SignFailure::Ours { reason, cause }) = &verified {
                tracing::warn!(keyset = %cell.name, kid = %active.kid, reason = reason.as_str(), error = %cause, "the active key does not sign; it is tried again");
            }
            note_health(&cell, verified.as_ref().err());
            note_disabled(&cell, active.serial, verified.as_ref().err());
        });
    }

    /// Waits for one of the keyset's places, then works, all within the deadline.
    async fn in_turn(
        &self,
        cell: &KeysetCell,
        places: &Arc<Semaphore>,
        ends: Duration,
        late: SigningFailure,
        work: impl Future<Output = Result<Vec<u8>, SignFailure>>,
    ) -> Result<Vec<u8>, SignFailure> {
        let Some(place) = cell.pool.enter() else {
            return Err(ours(SigningFailure::Overload, "the queue of the keyset is full"));
        };
        let permits = places.clone();
        let left = ends.saturating_sub(self.clock.clock().monotonic());
        let bounded = timeout(left, async move {
            let _permit = permits.acquire_owned().await;
            work.await
        });
        let result = bounded.await.unwrap_or_else(|_| Err(ours(late, "no signature within sign_deadline")));
        drop(place);
        result
    }
}

/// What a backend can never sign is the caller's error, and says nothing about the backend.
fn refuse_what_is_too_long(signer: &Signer, message: &str) -> Result<(), ClaimError> {
    let Signer::Remote(signer) = signer else { return Ok(()) };
    match signer.longest_message() {
        Some(longest) if message.len() > longest => {
            Err(ClaimError::Invalid { path: "claims".to_owned(), problem: Problem::TooLongForBackend { longest } })
        }
        _ => Ok(()),
    }
}

/// Full jitter: those that failed together do not come back together.
fn pause_before(attempt: u32, entropy: &dyn Entropy) -> Duration {
    let most = REMOTE_PAUSE.saturating_mul(1 << attempt.min(10)).min(REMOTE_PAUSE_MAX);
    entropy.between(REMOTE_PAUSE_MIN, REMOTE_PAUSE_MIN + most)
}

/// Remembers whether the active key of a remote backend signs. A full queue and throttling say nothing about that.
fn note_health(cell: &KeysetCell, failure: Option<&SignFailure>) {
    let signs = match failure {
        None => true,
        Some(SignFailure::Ours { reason, .. }) => match reason {
            SigningFailure::BackendUnavailable
            | SigningFailure::BackendTimeout
            | SigningFailure::BackendDenied
            | SigningFailure::KeyDisabled
            | SigningFailure::VerificationFailed => false,
            SigningFailure::BackendThrottled
            | SigningFailure::StaleKeyring
            | SigningFailure::NoActiveKey
            | SigningFailure::Overload
            | SigningFailure::ClusterKeysUnavailable => return,
        },
        Some(SignFailure::Claims(_) | SignFailure::Drained) => return,
    };
    if cell.remote.note(signs) {
        cell.wake.notify_one();
    }
}

/// Remembers whether the backend called the key disabled, so that it is looked into.
fn note_disabled(cell: &KeysetCell, serial: Serial, failure: Option<&SignFailure>) {
    match failure {
        Some(SignFailure::Ours { reason: SigningFailure::KeyDisabled, .. }) => {
            if cell.remote.report(serial) {
                cell.wake.notify_one();
            }
        }
        None => cell.remote.absolve(serial),
        Some(_) => {}
    }
}

/// A signature that this process makes, counted as a request to its backend.
fn counted(
    clock: &dyn Clock,
    requests: &BackendMetrics,
    sign: impl FnOnce() -> Result<Vec<u8>, BackendError>,
) -> Result<Vec<u8>, BackendError> {
    let started = clock.monotonic();
    let span = traces::backend("local", BackendOperation::Sign);
    let result = span.in_scope(sign);
    let outcome = result.as_ref().err().map_or(BackendOutcome::Ok, |error| outcome_of(error.kind));
    traces::answered(&span, outcome);
    requests.requested(BackendOperation::Sign, outcome, clock.monotonic().saturating_sub(started));
    result
}

fn transient(kind: BackendErrorKind) -> bool {
    matches!(kind, BackendErrorKind::Unavailable | BackendErrorKind::Throttled | BackendErrorKind::Timeout)
}

fn failed(error: BackendError) -> SignFailure {
    let reason = match error.kind {
        BackendErrorKind::Timeout => SigningFailure::BackendTimeout,
        BackendErrorKind::Throttled => SigningFailure::BackendThrottled,
        BackendErrorKind::Denied => SigningFailure::BackendDenied,
        BackendErrorKind::KeyDisabled | BackendErrorKind::NotFound => SigningFailure::KeyDisabled,
        BackendErrorKind::Unavailable
        | BackendErrorKind::Unreadable
        | BackendErrorKind::PairwiseTest
        | BackendErrorKind::Internal => SigningFailure::BackendUnavailable,
    };
    ours(reason, &chain(&error))
}

fn ours(reason: SigningFailure, cause: &str) -> SignFailure {
    SignFailure::Ours { reason, cause: cause.to_owned() }
}

fn signature_line(cell: &KeysetCell, active: &ActiveKey, jti: &str, client: &str, at: Timestamp) {
    signature(&SignatureLine { at, jti, keyset: &cell.name, kid: &active.kid, client: Some(client) });
}

impl KeysetCell {
    /// The active key is a remote one, and the last attempt to sign with it failed, or there was none yet.
    pub fn is_known_not_to_sign(&self) -> bool {
        self.signs_remotely() && !self.remote.signs()
    }

    /// The active key is in another system.
    pub(super) fn signs_remotely(&self) -> bool {
        self.snapshot.load().active.as_ref().is_some_and(|key| matches!(key.signer, Signer::Remote(_)))
    }

    /// Requests waiting for a signature now.
    pub fn queued(&self) -> usize {
        self.pool.waiting.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;

    /// Signs at most 4,096 bytes, and is never asked.
    struct Short;

    #[async_trait]
    impl RemoteSigner for Short {
        fn longest_message(&self) -> Option<usize> {
            Some(4096)
        }

        async fn sign(&self, _: &[u8]) -> Result<Vec<u8>, BackendError> {
            unreachable!("it is refused before")
        }
    }

    #[test]
    fn a_token_that_the_backend_can_never_sign_is_the_callers_error() {
        let signer = Signer::Remote(Arc::new(Short));
        assert_eq!(refuse_what_is_too_long(&signer, &"x".repeat(4096)), Ok(()));
        let error = refuse_what_is_too_long(&signer, &"x".repeat(4097)).unwrap_err();
        assert!(error.to_string().contains("4096 bytes"), "{error}");
        // Not counted as a failure of ours, and never noted as ill health.
        assert!(matches!(SignFailure::from(error), SignFailure::Claims(_)));
    }
}
