//! From what AWS KMS says to what the engine does about it.

use crate::aws_kms::{AWS_KMS, KmsError, KmsErrorKind};
use crate::backend::{BackendError, BackendErrorKind};

/// Keys of these kinds cannot sign JWTs.
#[derive(Debug, thiserror::Error)]
#[error(
    "{arn} does not sign, or not as JWTs are signed: name a key of usage SIGN_VERIFY with an RSA, P-256, P-384 or Ed25519 spec"
)]
pub(super) struct NotForSigning {
    pub(super) arn: String,
}

/// What was given for import names no key.
#[derive(Debug, thiserror::Error)]
#[error("{given:?} is no ARN of a key: give arn:aws:kms:REGION:ACCOUNT:key/ID (an alias can be pointed elsewhere)")]
pub(super) struct NotAnArn {
    pub(super) given: String,
}

/// An alias of ours that names something else.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClaimError {
    #[error(
        "{alias} names {arn}, and nothing proves that this installation made that key for this serial. The tags of a new \
         key may not be visible yet, which passes within minutes; a store that was restored or resealed does not know \
         every key either. If this stays, find out who made the key and whether it signs for anybody; change its alias \
         only when you know that it does not"
    )]
    Foreign { alias: String, arn: String },
    #[error(
        "{alias} and the {tried} names after it are all taken by keys that cannot be used: delete some of these aliases"
    )]
    Exhausted { alias: String, tried: u32 },
    #[error("{alias} is taken and cannot be read yet: another process has just made it")]
    NotVisible { alias: String },
    #[error("the seal is away, and with it what proves that a key is ours")]
    NoProof,
}

pub(super) fn failed(operation: &'static str, error: KmsError) -> BackendError {
    BackendError { backend: AWS_KMS, operation, kind: kind_of(error.kind), source: Some(error.into()) }
}

pub(super) fn internal(operation: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> BackendError {
    BackendError { backend: AWS_KMS, operation, kind: BackendErrorKind::Internal, source: Some(error.into()) }
}

/// Its claim is not settled yet: again soon.
pub(super) fn unsettled(error: ClaimError) -> BackendError {
    BackendError {
        backend: AWS_KMS,
        operation: "create",
        kind: BackendErrorKind::Unavailable,
        source: Some(error.into()),
    }
}

fn kind_of(kind: KmsErrorKind) -> BackendErrorKind {
    match kind {
        KmsErrorKind::Unavailable => BackendErrorKind::Unavailable,
        KmsErrorKind::Timeout => BackendErrorKind::Timeout,
        KmsErrorKind::Throttled => BackendErrorKind::Throttled,
        KmsErrorKind::Denied => BackendErrorKind::Denied,
        KmsErrorKind::Disabled | KmsErrorKind::InvalidState => BackendErrorKind::KeyDisabled,
        KmsErrorKind::NotFound => BackendErrorKind::NotFound,
        KmsErrorKind::AlreadyExists
        | KmsErrorKind::InvalidCiphertext
        | KmsErrorKind::Quota
        | KmsErrorKind::Unsupported
        | KmsErrorKind::Other => BackendErrorKind::Internal,
    }
}
