//! What a keyring stores of a key in AWS KMS.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::aws_kms::AWS_KMS;
use crate::backend::{BackendError, BackendErrorKind, KeyIdentity};
use crate::keyring::jwk::{Kid, PublicJwk};

/// `created ARN DIGEST` or `adopted ARN DIGEST`. The digest binds the ARN to the key it was stored for: a handle that
/// ends up at another key of the keyring is noticed. (That nobody forged it, the record's authentication says.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Handle {
    /// This installation made it and destroys it.
    Created { arn: String },
    /// Somebody else made it.
    Adopted { arn: String },
}

/// Why a handle is not one.
#[derive(Debug, thiserror::Error)]
#[error("the stored handle of key {serial} of {keyset} does not belong to it: see docs/restore.md")]
struct NotItsHandle {
    keyset: String,
    serial: u64,
}

impl Handle {
    pub(super) fn created(arn: &str) -> Self {
        Handle::Created { arn: arn.to_owned() }
    }

    pub(super) fn adopted(arn: &str) -> Self {
        Handle::Adopted { arn: arn.to_owned() }
    }

    pub(super) fn arn(&self) -> &str {
        match self {
            Handle::Created { arn } | Handle::Adopted { arn } => arn,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Handle::Created { .. } => "created",
            Handle::Adopted { .. } => "adopted",
        }
    }

    pub(super) fn write(&self, identity: &KeyIdentity, kid: &Kid, public: &PublicJwk) -> String {
        format!("{} {} {}", self.word(), self.arn(), self.digest(identity, kid, public))
    }

    pub(super) fn read(
        text: &str,
        identity: &KeyIdentity,
        kid: &Kid,
        public: &PublicJwk,
    ) -> Result<Self, BackendError> {
        let read = Handle::parse(text).filter(|(handle, digest)| handle.digest(identity, kid, public) == *digest);
        read.map(|(handle, _)| handle).ok_or_else(|| BackendError {
            backend: AWS_KMS,
            operation: "open",
            kind: BackendErrorKind::Unreadable,
            source: Some(Box::new(NotItsHandle { keyset: identity.keyset.to_string(), serial: identity.serial })),
        })
    }

    fn parse(text: &str) -> Option<(Self, &str)> {
        let mut words = text.split(' ');
        let (word, arn, digest) = (words.next()?, words.next()?, words.next()?);
        let handle = match word {
            "created" => Handle::created(arn),
            "adopted" => Handle::adopted(arn),
            _ => return None,
        };
        (words.next().is_none() && arn.starts_with("arn:")).then_some((handle, digest))
    }

    fn digest(&self, identity: &KeyIdentity, kid: &Kid, public: &PublicJwk) -> String {
        let (serial, thumbprint) = (identity.serial.to_be_bytes(), public.thumbprint());
        let parts: [&[u8]; 8] = [
            b"jwksd aws-kms handle 1",
            self.word().as_bytes(),
            self.arn().as_bytes(),
            identity.installation.as_bytes(),
            identity.keyset.as_str().as_bytes(),
            &serial,
            kid.as_str().as_bytes(),
            thumbprint.as_str().as_bytes(),
        ];
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        URL_SAFE_NO_PAD.encode(&hash.finalize()[..16])
    }
}

/// The ARN in a stored handle, whosever it is.
pub(super) fn arn_in(handle: &str) -> Option<&str> {
    handle.split(' ').nth(1).filter(|arn| arn.starts_with("arn:"))
}
