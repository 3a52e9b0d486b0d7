//! The hot path: claims policy, header, signature. Reads one snapshot, takes no lock, touches no store.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio::time::timeout;

use super::Engine;
use super::cell::KeysetCell;
use super::reconcile::{chain, outcome_of};
use super::snapshot::ActiveKey;
use crate::backend::verify::verify;
use crate::backend::{BackendError, BackendErrorKind, LocalSigner, RemoteSigner, Signer};
use crate::clock::Clock;
use crate::keyring::claims::{ClaimError, SignRequest};
use crate::keyring::jwk::Kid;
use crate::keyring::time::Timestamp;
use crate::telemetry::audit::{SignatureLine, signature};
use crate::telemetry::metrics::{BackendMetrics, BackendOperation, BackendOutcome, SigningFailure};

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
    /// Ours; the reason is also the metric's label.
    #[error("the token could not be signed: {reason:?}")]
    Ours { reason: SigningFailure, cause: String },
}

/// Attempts of one request at a remote backend within its deadline.
const REMOTE_ATTEMPTS: u32 = 3;
const REMOTE_PAUSE: Duration = Duration::from_millis(20);

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
        let result = self.sign_once_more(cell, request, audiences, client).await;
        match &result {
            Ok(_) => metrics.signed(self.clock.clock().monotonic().saturating_sub(started)),
            Err(SignFailure::Ours { reason, .. }) => metrics.failed(*reason),
            Err(SignFailure::Claims(error)) => metrics.rejected(error.rejection().into()),
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
        for _ in 0..3 {
            if let Some(issued) = self.attempt(cell, request, audiences, client).await? {
                return Ok(issued);
            }
        }
        Err(ours(SigningFailure::NoActiveKey, "the key was revoked while it signed, again and again"))
    }

    /// `None` when the key was revoked before its token could leave.
    async fn attempt(
        &self,
        cell: &KeysetCell,
        request: &SignRequest<'_>,
        audiences: Option<&[String]>,
        client: &str,
    ) -> Result<Option<Issued>, SignFailure> {
        // One reading serves iat, nbf and exp. It comes before the choice of the key, so that no key signs with a time
        // later than the one at which it was seen to have stopped.
        let now = self.clock.now();
        let snapshot = cell.snapshot.load();
        let jti = random_jti();
        let prepared = snapshot.rules.issue(request, now, &jti, audiences)?;
        let Some(active) = snapshot.active.clone() else {
            return Err(ours(SigningFailure::NoActiveKey, "no key is active"));
        };
        drop(snapshot);
        let Some(header) = active.headers.get(prepared.typ) else {
            return Err(ours(SigningFailure::NoActiveKey, "the allowed types change just now"));
        };
        let mut token = String::with_capacity(
            header.len() + prepared.payload.len() * 4 / 3 + active.algorithm.signature_len() * 4 / 3 + 16,
        );
        token.push_str(header);
        URL_SAFE_NO_PAD.encode_string(&prepared.payload, &mut token);
        let signature = self.signature(cell, &active, &token).await?;
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
    ) -> Result<Vec<u8>, SignFailure> {
        match &active.signer {
            Signer::Inline(signer) => {
                let clock = self.clock.clock().as_ref();
                counted(clock, &active.requests, || signer.sign(message.as_bytes())).map_err(failed)
            }
            Signer::Pooled(signer) => self.pooled(cell, active, signer.clone(), message).await,
            Signer::Remote(signer) => self.remote(cell, active, signer.clone(), message).await,
        }
    }

    async fn pooled(
        &self,
        cell: &KeysetCell,
        active: &ActiveKey,
        signer: Arc<dyn LocalSigner>,
        message: &str,
    ) -> Result<Vec<u8>, SignFailure> {
        let message = message.as_bytes().to_vec();
        let (clock, requests) = (self.clock.clock().clone(), active.requests.clone());
        self.in_turn(cell, SigningFailure::Overload, async move {
            let work =
                tokio::task::spawn_blocking(move || counted(clock.as_ref(), &requests, || signer.sign(&message)));
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
    ) -> Result<Vec<u8>, SignFailure> {
        self.in_turn(cell, SigningFailure::BackendTimeout, async {
            let mut failures = 0;
            let signature = loop {
                let started = self.clock.clock().monotonic();
                let result = signer.sign(message.as_bytes()).await;
                count(self.clock.clock().as_ref(), &active.requests, started, &result);
                match result {
                    Ok(signature) => break signature,
                    Err(error)
                        if transient(error.kind) && failures + 1 < REMOTE_ATTEMPTS && !active.door.is_closed() =>
                    {
                        failures += 1;
                        let jitter = u32::from(random_byte()) % 16;
                        tokio::time::sleep(REMOTE_PAUSE * (1 << failures) + Duration::from_millis(u64::from(jitter)))
                            .await;
                    }
                    Err(error) => return Err(failed(error)),
                }
            };
            verify(active.algorithm, &active.public, message.as_bytes(), &signature)
                .map_err(|error| ours(SigningFailure::VerificationFailed, &chain(&error)))?;
            Ok(signature)
        })
        .await
    }

    /// Waits for one of the keyset's places, then works, all within the deadline.
    async fn in_turn(
        &self,
        cell: &KeysetCell,
        late: SigningFailure,
        work: impl Future<Output = Result<Vec<u8>, SignFailure>>,
    ) -> Result<Vec<u8>, SignFailure> {
        let Some(place) = cell.pool.enter() else {
            return Err(ours(SigningFailure::Overload, "the queue of the keyset is full"));
        };
        let permits = cell.pool.permits.clone();
        let bounded = timeout(self.settings.load().sign_deadline.to_std(), async move {
            let _permit = permits.acquire_owned().await;
            work.await
        });
        let result = bounded.await.unwrap_or_else(|_| Err(ours(late, "no signature within sign_deadline")));
        drop(place);
        result
    }
}

/// A signature that this process makes, counted as a request to its backend.
fn counted(
    clock: &dyn Clock,
    requests: &BackendMetrics,
    sign: impl FnOnce() -> Result<Vec<u8>, BackendError>,
) -> Result<Vec<u8>, BackendError> {
    let started = clock.monotonic();
    let result = sign();
    count(clock, requests, started, &result);
    result
}

fn count(clock: &dyn Clock, requests: &BackendMetrics, started: Duration, result: &Result<Vec<u8>, BackendError>) {
    let outcome = result.as_ref().err().map_or(BackendOutcome::Ok, |error| outcome_of(error.kind));
    requests.requested(BackendOperation::Sign, outcome, clock.monotonic().saturating_sub(started));
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

/// 128 random bits, base64url.
fn random_jti() -> String {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random generator never fails once seeded");
    URL_SAFE_NO_PAD.encode(bytes)
}

fn random_byte() -> u8 {
    let mut byte = [0u8; 1];
    aws_lc_rs::rand::fill(&mut byte).expect("the system's random generator never fails once seeded");
    byte[0]
}

fn signature_line(cell: &KeysetCell, active: &ActiveKey, jti: &str, client: &str, at: Timestamp) {
    signature(&SignatureLine { at, jti, keyset: &cell.name, kid: &active.kid, client: Some(client) });
}

impl KeysetCell {
    /// Requests waiting for a signature now.
    pub fn queued(&self) -> usize {
        self.pool.waiting.load(Ordering::Relaxed)
    }
}
