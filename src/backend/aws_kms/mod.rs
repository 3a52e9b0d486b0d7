//! Private keys that never leave AWS KMS.
//!
//! A key is created under a *claim*: the alias `alias/jwksd/{installation}/{keyset}/{serial}`. Whoever makes the alias
//! has made the key of that serial; everybody else, a repeated attempt after a crash included, finds it there. A key
//! whose maker lost the race, or died before it made the alias, is a leftover: [`AwsKmsBackend::clean_up`] finds it.
//!
//! What is stored of a key is its ARN, never the alias: an alias can be pointed elsewhere.

mod claim;
mod clean_up;
mod creation;
mod error;
mod handle;
mod signer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::Notify;

use self::error::{failed, internal};
use self::handle::{Handle, arn_in};
use self::signer::RemoteKey;
use super::material::public_from_spki;
use super::verify::verify;
use super::{
    AdoptRemote, Backend, BackendError, BackendErrorKind, CreatedKey, KeyIdentity, RemoteFound, Signer, StoredKey,
};
use crate::aws_kms::{AWS_KMS, KeySpec, KeyState, KmsApi, KmsErrorKind, Pace};
use crate::clock::Clock;
use crate::keyring::algorithm::{Algorithm, RsaBits};
use crate::keyring::jwk::{Kid, PublicJwk};
use crate::keyring::time::Span;
use crate::seal::data_keys::{DataKeys, LateDataKeys};

pub use clean_up::{CleanUp, Owned};

/// Proves that a tag was written by this installation: its tags can be copied, its secret cannot.
pub trait CreationProof: Send + Sync + 'static {
    /// A code over `parts` and what it was made with; `None` while the secret is not at hand.
    fn prove(&self, parts: &[&[u8]]) -> Option<(String, Vec<u8>)>;

    /// Whether `code` was made over `parts` with what `with` names.
    fn holds(&self, with: &str, parts: &[&[u8]], code: &[u8]) -> bool;
}

impl CreationProof for DataKeys {
    fn prove(&self, parts: &[&[u8]]) -> Option<(String, Vec<u8>)> {
        let with = self.current().to_owned();
        self.mac(&with, parts).ok().map(|code| (with, code.to_vec()))
    }

    fn holds(&self, with: &str, parts: &[&[u8]], code: &[u8]) -> bool {
        self.verify_mac(with, parts, code).is_ok()
    }
}

impl CreationProof for LateDataKeys {
    fn prove(&self, parts: &[&[u8]]) -> Option<(String, Vec<u8>)> {
        self.arrived()?.prove(parts)
    }

    fn holds(&self, with: &str, parts: &[&[u8]], code: &[u8]) -> bool {
        self.arrived().is_some_and(|keys| keys.holds(with, parts, code))
    }
}

/// The backend `aws-kms`.
pub struct AwsKmsBackend {
    api: Arc<dyn KmsApi>,
    proof: Arc<dyn CreationProof>,
    clock: Arc<dyn Clock>,
    deletion_window_days: u8,
    /// How old a leftover must be to be cleaned up.
    cleanup_after: Span,
    /// Creations under way, by alias; each keeps the key it made until that is claimed.
    claims: Mutex<HashMap<String, Arc<claim::Claim>>>,
    walk: clean_up::Walk,
    /// A creation failed: there may be a leftover.
    pub(super) unsettled: Notify,
}

impl AwsKmsBackend {
    /// `deletion_window_days` is 7 to 30.
    pub fn new(
        api: Arc<dyn KmsApi>,
        proof: Arc<dyn CreationProof>,
        clock: Arc<dyn Clock>,
        deletion_window_days: u8,
        cleanup_after: Span,
    ) -> Self {
        AwsKmsBackend {
            api,
            proof,
            clock,
            deletion_window_days,
            cleanup_after,
            claims: Mutex::default(),
            walk: clean_up::Walk::default(),
            unsettled: Notify::new(),
        }
    }

    fn claim(&self, alias: &str) -> Arc<claim::Claim> {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        claims.entry(alias.to_owned()).or_default().clone()
    }

    fn forget_claim(&self, alias: &str) {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).remove(alias);
    }

    /// Fetches the public half and has the key sign for it: the service is one implementation, aws-lc the other (FIPS
    /// 140-3 IG 10.3.A).
    async fn tested(
        &self,
        operation: &'static str,
        arn: &str,
        algorithm: Algorithm,
    ) -> Result<PublicJwk, BackendError> {
        const MESSAGE: &[u8] = b"jwksd pairwise test";
        let key = self.api.public_key(arn).await.map_err(|error| failed(operation, error))?;
        let public = public_from_spki(&key.subject_public_key_info).map_err(|error| internal(operation, error))?;
        let signature =
            RemoteKey::new(self.api.clone(), arn, algorithm).sign_as(operation, MESSAGE, Pace::Background).await?;
        verify(algorithm, &public, MESSAGE, &signature).map_err(|error| BackendError {
            backend: AWS_KMS,
            operation,
            kind: BackendErrorKind::PairwiseTest,
            source: Some(error.into()),
        })?;
        Ok(public)
    }

    /// Marks a key for deletion that nobody uses. Repeating it succeeds.
    async fn schedule_deletion(&self, arn: &str) -> Result<(), BackendError> {
        match self.api.schedule_key_deletion(arn, self.deletion_window_days).await {
            Ok(()) => Ok(()),
            Err(error) if error.kind == KmsErrorKind::NotFound => Ok(()),
            Err(error) if error.kind == KmsErrorKind::InvalidState => match self.api.describe_key(arn).await {
                Ok(key) if key.state == KeyState::PendingDeletion => Ok(()),
                Err(gone) if gone.kind == KmsErrorKind::NotFound => Ok(()),
                Ok(_) => Err(failed("destroy", error)),
                Err(unknown) => Err(failed("destroy", unknown)),
            },
            Err(error) => Err(failed("destroy", error)),
        }
    }
}

#[async_trait]
impl Backend for AwsKmsBackend {
    fn name(&self) -> &'static str {
        AWS_KMS
    }

    fn adopts(&self) -> Option<&dyn AdoptRemote> {
        Some(self)
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        let created = self.create_claimed(identity, algorithm).await;
        if created.is_err() {
            self.unsettled.notify_one();
        }
        let (arn, public) = created?;
        let kid = public.thumbprint();
        let handle = Handle::created(&arn).write(identity, &kid, &public);
        Ok(CreatedKey { kid, public, handle })
    }

    /// The key and its alias.
    fn left_over(&self, identity: &KeyIdentity, key: &CreatedKey) -> Option<String> {
        Some(Handle::created(arn_in(&key.handle)?).write(identity, &key.kid, &key.public))
    }

    /// Calls nobody: a daemon starts and serves its JWKS while the service is away, and every signature is verified.
    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        let handle = Handle::read(&key.handle, &key.identity, &key.kid, &key.public)?;
        Ok(Signer::Remote(Arc::new(RemoteKey::new(self.api.clone(), handle.arn(), key.algorithm))))
    }

    /// Disables the key, which can be undone at once, then schedules its deletion, which can be undone for the window.
    ///
    /// Its alias stays until the service deletes it with the key: the serial remains claimed as long as the key could
    /// come back, so that a restored older store does not make a second key of that serial meanwhile.
    /// A key that was adopted is its owner's: it is only forgotten.
    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        let arn = match Handle::read(&key.handle, &key.identity, &key.kid, &key.public) {
            Ok(Handle::Created { arn }) => arn,
            Ok(Handle::Adopted { arn }) => {
                tracing::info!(keyset = %key.identity.keyset, serial = key.identity.serial, key = arn, "an adopted key is forgotten; whoever made it decides what becomes of it in AWS KMS");
                return Ok(());
            }
            // Nothing that this backend made: there is nothing of ours to destroy.
            Err(error) => {
                tracing::warn!(keyset = %key.identity.keyset, serial = key.identity.serial, error = %error, "the handle names no key of AWS KMS: nothing was destroyed");
                return Ok(());
            }
        };
        match self.api.disable_key(&arn).await {
            Ok(()) => {}
            Err(error) if error.kind == KmsErrorKind::NotFound => return Ok(()),
            // Pending deletion, as an earlier attempt left it; scheduling finds out.
            Err(error) if matches!(error.kind, KmsErrorKind::InvalidState | KmsErrorKind::Disabled) => {}
            Err(error) => return Err(failed("destroy", error)),
        }
        self.schedule_deletion(&arn).await
    }
}

#[async_trait]
impl AdoptRemote for AwsKmsBackend {
    async fn find(&self, reference: &str) -> Result<RemoteFound, BackendError> {
        if !reference.starts_with("arn:") || !reference.contains(":key/") || reference.contains(char::is_whitespace) {
            return Err(internal("import", error::NotAnArn { given: reference.chars().take(80).collect() }));
        }
        let described = self.api.describe_key(reference).await.map_err(|error| failed("import", error))?;
        if !described.signs || described.spec.is_none() {
            return Err(internal("import", error::NotForSigning { arn: described.arn }));
        }
        let key = self.api.public_key(&described.arn).await.map_err(|error| failed("import", error))?;
        let public = public_from_spki(&key.subject_public_key_info).map_err(|error| internal("import", error))?;
        Ok(RemoteFound { name: key.arn, public })
    }

    async fn test(&self, found: &RemoteFound, algorithm: Algorithm) -> Result<(), BackendError> {
        let described = self.api.describe_key(&found.name).await.map_err(|error| failed("import", error))?;
        let public = self.tested("import", &described.arn, algorithm).await?;
        match public == found.public && described.state == KeyState::Enabled {
            true => Ok(()),
            false => Err(internal("import", error::NotForSigning { arn: described.arn })),
        }
    }

    fn handle(&self, identity: &KeyIdentity, kid: &Kid, found: &RemoteFound) -> String {
        Handle::adopted(&found.name).write(identity, kid, &found.public)
    }
}

/// What the service calls the keys of an algorithm.
fn spec_of(algorithm: Algorithm) -> KeySpec {
    match algorithm {
        Algorithm::Es256 => KeySpec::EccNistP256,
        Algorithm::Es384 => KeySpec::EccNistP384,
        Algorithm::EdDsa { .. } => KeySpec::EccNistEdwards25519,
        Algorithm::Rs256 { rsa_bits } | Algorithm::Ps256 { rsa_bits } => match rsa_bits {
            RsaBits::B2048 => KeySpec::Rsa2048,
            RsaBits::B3072 => KeySpec::Rsa3072,
            RsaBits::B4096 => KeySpec::Rsa4096,
        },
    }
}
