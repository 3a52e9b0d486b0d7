//! AWS KMS as this daemon uses it: exactly the calls it makes, behind a small trait, with errors by what to do next.
//!
//! The key backend and the seal stand on it. There are no retries here: callers hold a deadline and retry within it.

mod credentials;
mod error;
mod sdk;

use async_trait::async_trait;
use zeroize::Zeroizing;

use crate::keyring::time::Timestamp;

pub use error::{KmsError, KmsErrorKind};
pub use sdk::SdkKms;

/// The name of the service in configuration, metrics and records, both as a backend and as a seal.
pub const AWS_KMS: &str = "aws-kms";

/// What a symmetric ciphertext is bound to: keys and values, in any order. Not secret; it stands in CloudTrail.
pub type EncryptionContext = [(&'static str, String)];

/// The calls of the AWS KMS API that this daemon makes. `key` is an ARN, a key ID or an alias, as the service takes it.
#[async_trait]
pub trait KmsApi: Send + Sync + 'static {
    /// Encrypts at most 4,096 bytes with a symmetric key.
    async fn encrypt(&self, key: &str, plaintext: &[u8], context: &EncryptionContext) -> Result<Encrypted, KmsError>;

    /// The inverse of [`encrypt`](Self::encrypt). `key` is sent along, so that no other key is ever tried.
    ///
    /// # Errors
    /// [`KmsErrorKind::InvalidCiphertext`] when the context or the key differs, or anything was changed.
    async fn decrypt(
        &self,
        key: &str,
        ciphertext: &[u8],
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError>;

    /// Makes an asymmetric key that signs and verifies. Not idempotent: each call makes one.
    async fn create_signing_key(
        &self,
        spec: KeySpec,
        description: &str,
        tags: &[(&'static str, String)],
    ) -> Result<KeyDescription, KmsError>;

    async fn describe_key(&self, key: &str) -> Result<KeyDescription, KmsError>;

    /// The public half as a DER SubjectPublicKeyInfo (RFC 5280 §4.1).
    async fn public_key(&self, key: &str) -> Result<PublicKey, KmsError>;

    /// Signs. ECDSA signatures come as DER (RFC 3279 §2.2.3), RSA and Ed25519 ones as bytes.
    async fn sign(
        &self,
        key: &str,
        message: Message<'_>,
        algorithm: SigningAlgorithm,
        pace: Pace,
    ) -> Result<Vec<u8>, KmsError>;

    /// Names a key.
    ///
    /// # Errors
    /// [`KmsErrorKind::AlreadyExists`] when the alias names a key already, be it this one.
    async fn create_alias(&self, alias: &str, key: &str) -> Result<(), KmsError>;

    /// The names of one key.
    async fn list_aliases(&self, key: &str, marker: Option<&str>) -> Result<Page<String>, KmsError>;

    /// The ARNs of all keys of the account in the region.
    async fn list_keys(&self, marker: Option<&str>) -> Result<Page<String>, KmsError>;

    async fn list_resource_tags(&self, key: &str, marker: Option<&str>) -> Result<Page<(String, String)>, KmsError>;

    async fn disable_key(&self, key: &str) -> Result<(), KmsError>;

    /// Schedules deletion after `days` (7 to 30).
    ///
    /// # Errors
    /// [`KmsErrorKind::InvalidState`] when it is scheduled already.
    async fn schedule_key_deletion(&self, key: &str, days: u8) -> Result<(), KmsError>;
}

/// An API call, as IAM policies name it after `kms:`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KmsOperation {
    Encrypt,
    Decrypt,
    CreateKey,
    DescribeKey,
    GetPublicKey,
    Sign,
    CreateAlias,
    ListAliases,
    ListKeys,
    ListResourceTags,
    DisableKey,
    ScheduleKeyDeletion,
}

impl KmsOperation {
    pub const fn as_str(self) -> &'static str {
        match self {
            KmsOperation::Encrypt => "Encrypt",
            KmsOperation::Decrypt => "Decrypt",
            KmsOperation::CreateKey => "CreateKey",
            KmsOperation::DescribeKey => "DescribeKey",
            KmsOperation::GetPublicKey => "GetPublicKey",
            KmsOperation::Sign => "Sign",
            KmsOperation::CreateAlias => "CreateAlias",
            KmsOperation::ListAliases => "ListAliases",
            KmsOperation::ListKeys => "ListKeys",
            KmsOperation::ListResourceTags => "ListResourceTags",
            KmsOperation::DisableKey => "DisableKey",
            KmsOperation::ScheduleKeyDeletion => "ScheduleKeyDeletion",
        }
    }
}

/// What [`KmsApi::encrypt`] answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encrypted {
    /// The ARN of the key that encrypted, whatever it was called in the request.
    pub key_arn: String,
    pub ciphertext: Vec<u8>,
}

/// The kinds of asymmetric keys that sign JWTs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySpec {
    EccNistP256,
    EccNistP384,
    EccNistEdwards25519,
    Rsa2048,
    Rsa3072,
    Rsa4096,
}

/// How a key signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SigningAlgorithm {
    EcdsaSha256,
    EcdsaSha384,
    Ed25519Sha512,
    RsassaPkcs1V15Sha256,
    RsassaPssSha256,
}

/// Whether somebody waits for a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A request does: the call has `attempt_timeout`, and a place among the signatures.
    Request,
    /// Nobody does, as when a new key is tested: the call has as long as any other.
    Background,
}

/// The longest message that the service signs as it is, in bytes (AWS KMS API Reference, Sign, `MessageType` RAW).
pub const LONGEST_RAW_MESSAGE: usize = 4096;

/// What is signed.
#[derive(Clone, Copy, Debug)]
pub enum Message<'a> {
    /// The digest that the algorithm demands; messages of any length can be signed so.
    Digest(&'a [u8]),
    /// The message itself, at most [`LONGEST_RAW_MESSAGE`] bytes.
    Raw(&'a [u8]),
}

/// What the service says of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyDescription {
    pub arn: String,
    pub state: KeyState,
    /// `None`: a kind of key that signs no JWTs.
    pub spec: Option<KeySpec>,
    /// It signs and verifies, and does nothing else.
    pub signs: bool,
    /// It encrypts and decrypts with one symmetric key, as a seal does.
    pub encrypts: bool,
    /// By the service's clock.
    pub created_at: Option<Timestamp>,
    /// The service itself made the private key, and it never was anywhere else. `false`: it was imported, or lives in a
    /// key store of the account's own.
    pub born_there: bool,
}

/// Whether a key works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    Enabled,
    Disabled,
    PendingDeletion,
    /// Being made or imported, or its key store is away.
    Other,
}

/// What [`KmsApi::public_key`] answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    pub arn: String,
    /// `None`: a kind of key that signs no JWTs.
    pub spec: Option<KeySpec>,
    pub signs: bool,
    pub subject_public_key_info: Vec<u8>,
}

/// A part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Where the next page begins; `None`: this was the last.
    pub next: Option<String>,
}
