//! The seal: key-encryption keys, and the data keys they wrap.

pub mod aws_kms;
pub mod cipher;
pub mod data_keys;
pub mod file;

use async_trait::async_trait;
use zeroize::Zeroizing;

/// A key-encryption key. Its only use is to wrap and unwrap data keys.
///
/// A key that lives elsewhere bounds every call by a deadline of its own and retries within it; callers wait for it.
#[async_trait]
pub trait KeyEncryptionKey: Send + Sync + 'static {
    /// Names the key in records and messages; never secret. Stable for the life of the key. A key that is configured by
    /// a name which can move (an alias) has to be asked which one it is: that may fail as `Unavailable`.
    async fn id(&self) -> Result<String, SealError>;

    /// Encrypts `plaintext` (a data key) and binds it to `context`.
    async fn wrap(&self, context: &str, plaintext: &[u8]) -> Result<Vec<u8>, SealError>;

    /// The inverse of [`wrap`](Self::wrap); fails when the context differs or anything was changed.
    async fn unwrap(&self, context: &str, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError>;
}

/// Why a seal did not seal or unseal.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// It cannot be used now: not reached, throttled, not allowed, disabled. Trying again later can help.
    #[error("the seal key {key} cannot be used")]
    Unavailable {
        key: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    #[error("{what} was not sealed with the key {key}, or was changed since")]
    Mismatch { key: String, what: String },
    #[error("the seal key {key} cannot seal: {problem}")]
    Unusable { key: String, problem: String },
    #[error("the seal key file {path} {problem}")]
    File { path: String, problem: String },
}
