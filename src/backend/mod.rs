//! The port to what makes and uses private keys, and its adapters.

pub mod aws_kms;
pub mod local;
pub mod material;
pub mod token;
pub mod verify;

use std::sync::Arc;

use async_trait::async_trait;

use crate::keyring::algorithm::Algorithm;
use crate::keyring::jwk::{Kid, PublicJwk};
use crate::keyring::name::Name;
use crate::keyring::record::Serial;

/// Which key of which keyset of which installation: the idempotency handle of its creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyIdentity {
    pub installation: String,
    pub lineage: String,
    pub keyset: Name,
    pub serial: Serial,
}

/// A key as a backend made it; not durable before the keyring that names it is.
#[derive(Clone)]
pub struct CreatedKey {
    pub kid: Kid,
    pub public: PublicJwk,
    /// Opaque to everyone but the backend: a sealed private key, or a remote key's name.
    pub handle: String,
}

/// What the keyring knows of a key that shall sign.
#[derive(Clone)]
pub struct StoredKey {
    pub identity: KeyIdentity,
    pub kid: Kid,
    pub algorithm: Algorithm,
    pub public: PublicJwk,
    pub handle: String,
}

/// Makes, opens and destroys private keys.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// The name in configuration, metrics and records: `local`, `aws-kms`, …
    fn name(&self) -> &'static str;

    /// The power to take over keys that are in its service already, if it has it.
    fn adopts(&self) -> Option<&dyn AdoptRemote> {
        None
    }

    /// Makes the key of `identity`, or finds the one an earlier call made for it. The pair has passed a
    /// sign/verify test in an independent implementation before this returns (FIPS 140-3 IG 10.3.A).
    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError>;

    /// What is left elsewhere of a key that was created and will never be asked for again: the handle under which it can be
    /// destroyed as the key of `identity`. `None`: nothing is left.
    fn left_over(&self, _identity: &KeyIdentity, _key: &CreatedKey) -> Option<String> {
        None
    }

    /// Makes a stored key ready to sign.
    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError>;

    /// Destroys the private half. Repeating it, or destroying what never existed, succeeds.
    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError>;
}

/// What a backend can do that takes over keys which are in its service already. Such a key stays its owner's: destroying
/// it later only forgets it.
#[async_trait]
pub trait AdoptRemote: Send + Sync {
    /// The key that `reference` names in the service.
    async fn find(&self, reference: &str) -> Result<RemoteFound, BackendError>;

    /// Whether it works and passes its sign/verify test.
    async fn test(&self, found: &RemoteFound, algorithm: Algorithm) -> Result<(), BackendError>;

    /// What the keyring is to store of it. Asks nobody.
    fn handle(&self, identity: &KeyIdentity, kid: &Kid, found: &RemoteFound) -> String;
}

/// A key that somebody made in a backend's service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFound {
    /// What it is called there, for good.
    pub name: String,
    pub public: PublicJwk,
}

/// A key ready to sign, by how it must be called.
#[derive(Clone)]
pub enum Signer {
    /// Takes microseconds; called where the request is.
    Inline(Arc<dyn LocalSigner>),
    /// Takes some tenths of a millisecond; called where the request is, in turn with everything else that is ready.
    InTurn(Arc<dyn LocalSigner>),
    /// Takes milliseconds; called in a bounded pool of blocking threads.
    Pooled(Arc<dyn LocalSigner>),
    /// A network call; what it returns is verified against the cached public key before it leaves.
    Remote(Arc<dyn RemoteSigner>),
}

/// Signs in this process.
pub trait LocalSigner: Send + Sync + 'static {
    /// Hashes `message` as the algorithm demands and returns the JOSE form of the signature (RFC 7518 §3: ECDSA as
    /// r‖s of fixed length).
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError>;
}

/// Signs elsewhere.
#[async_trait]
pub trait RemoteSigner: Send + Sync + 'static {
    /// The longest message that can be signed, in bytes; `None`: any.
    fn longest_message(&self) -> Option<usize> {
        None
    }

    /// As [`LocalSigner::sign`]; one attempt, the caller holds the deadline and retries.
    async fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError>;
}

/// Why a backend did not do what was asked; the kind decides what the caller does next.
#[derive(Debug, thiserror::Error)]
#[error("{operation} failed in backend {backend}: {kind}")]
pub struct BackendError {
    pub backend: &'static str,
    pub operation: &'static str,
    pub kind: BackendErrorKind,
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendErrorKind {
    #[error("it cannot be reached")]
    Unavailable,
    #[error("no answer in time")]
    Timeout,
    #[error("it throttles")]
    Throttled,
    #[error("access denied")]
    Denied,
    #[error("the key is disabled or pending deletion")]
    KeyDisabled,
    #[error("the key does not exist")]
    NotFound,
    #[error("the stored key cannot be read with this seal")]
    Unreadable,
    #[error("the new key failed its sign/verify test")]
    PairwiseTest,
    #[error("an internal failure")]
    Internal,
}
