//! [`KmsApi`] over aws-sdk-kms, built when it is first used.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_kms::Client;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::timeout::TimeoutConfig;
use aws_sdk_kms::config::{BehaviorVersion, IdentityCache, Region, StalledStreamProtectionConfig};
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{self, EncryptionAlgorithmSpec, KeyUsageType, MessageType, SigningAlgorithmSpec, Tag};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::credentials::Patient;
use super::{
    Encrypted, EncryptionContext, KeyDescription, KeySpec, KeyState, KmsApi, KmsError, KmsErrorKind, KmsOperation,
    Message, Pace, Page, PublicKey, SigningAlgorithm,
};
use crate::clock::SystemClock;
use crate::config::AwsKms;
use crate::keyring::time::Timestamp;

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a call may take that no request waits for: making an RSA key takes seconds.
const SLOW_CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// Calls under way at once that no request waits for. A place of their own: signatures never wait behind them.
const SLOW_CALLS: usize = 8;

/// Items of a page; the service's largest is 1,000 keys or 100 aliases.
const KEYS_PER_PAGE: i32 = 100;

/// AWS KMS through the SDK with its standard credential chain: environment, profiles, web identity (IRSA), container
/// credentials (ECS, EKS Pod Identity), instance metadata.
///
/// Nothing is read or sent before the first call: building the SDK's configuration may ask the instance metadata
/// service, which a daemon without KMS must not.
pub struct SdkKms {
    settings: AwsKms,
    client: OnceCell<Client>,
    quick: Arc<Semaphore>,
    slow: Arc<Semaphore>,
}

impl SdkKms {
    pub fn new(settings: AwsKms) -> Self {
        let quick = Arc::new(Semaphore::new(settings.concurrency as usize));
        SdkKms { settings, client: OnceCell::new(), quick, slow: Arc::new(Semaphore::new(SLOW_CALLS)) }
    }

    /// Over a client that is there already, whatever region, endpoint and credentials it has.
    pub fn with_client(client: Client, settings: AwsKms) -> Self {
        SdkKms { client: OnceCell::from(client), ..SdkKms::new(settings) }
    }

    async fn client(&self, operation: KmsOperation, key: &str) -> Result<&Client, KmsError> {
        self.client
            .get_or_try_init(|| async {
                let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).build();
                // A behaviour of the SDK changes only with this line.
                let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
                    .retry_config(RetryConfig::disabled())
                    .timeout_config(timeouts)
                    .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
                    .identity_cache(IdentityCache::lazy().load_timeout(SLOW_CALL_TIMEOUT).build());
                if let Some(region) = &self.settings.region {
                    loader = loader.region(Region::new(region.clone()));
                }
                if let Some(url) = &self.settings.endpoint_url {
                    loader = loader.endpoint_url(url);
                }
                let loaded = loader.load().await;
                if loaded.region().is_none() {
                    let detail = "no region: set [backend.aws-kms] region, or AWS_REGION";
                    return Err(KmsError::new(operation, key, KmsErrorKind::Other, detail));
                }
                let mut config = aws_sdk_kms::config::Builder::from(&loaded);
                if let Some(chain) = loaded.credentials_provider() {
                    config = config.credentials_provider(Patient::new(chain, Arc::new(SystemClock)));
                }
                Ok(Client::from_conf(config.build()))
            })
            .await
    }

    /// Makes one attempt of a call that a request waits for.
    async fn quick<T, E, F: Future<Output = Result<T, SdkError<E, HttpResponse>>>>(
        &self,
        operation: KmsOperation,
        key: &str,
        call: impl FnOnce(Client) -> F,
    ) -> Result<T, KmsError>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        self.attempt(operation, key, &self.quick, self.settings.attempt_timeout.to_std(), call).await
    }

    /// Makes one attempt of any other call.
    async fn slow<T, E, F: Future<Output = Result<T, SdkError<E, HttpResponse>>>>(
        &self,
        operation: KmsOperation,
        key: &str,
        call: impl FnOnce(Client) -> F,
    ) -> Result<T, KmsError>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        self.attempt(operation, key, &self.slow, SLOW_CALL_TIMEOUT, call).await
    }

    async fn attempt<T, E, F: Future<Output = Result<T, SdkError<E, HttpResponse>>>>(
        &self,
        operation: KmsOperation,
        key: &str,
        places: &Semaphore,
        limit: Duration,
        call: impl FnOnce(Client) -> F,
    ) -> Result<T, KmsError>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let failed = |kind, detail: &str| KmsError::new(operation, key, kind, detail);
        // Whoever holds a place has a limit, so this ends; the caller may give up sooner.
        let _place = places.acquire().await.map_err(|_| failed(KmsErrorKind::Other, "shutting down"))?;
        let attempt = async {
            let client = self.client(operation, key).await?.clone();
            call(client).await.map_err(|error| KmsError::from_sdk(operation, key, &error))
        };
        let late = |_| failed(KmsErrorKind::Timeout, &format!("nothing within {} ms", limit.as_millis()));
        timeout(limit, attempt).await.map_err(late)?
    }
}

#[async_trait]
impl KmsApi for SdkKms {
    async fn encrypt(&self, key: &str, plaintext: &[u8], context: &EncryptionContext) -> Result<Encrypted, KmsError> {
        let operation = KmsOperation::Encrypt;
        let answer = self
            .slow(operation, key, |client| {
                let request = client.encrypt().key_id(key).plaintext(Blob::new(plaintext));
                request.set_encryption_context(Some(owned(context))).send()
            })
            .await?;
        let ciphertext = answer.ciphertext_blob.map(Blob::into_inner).ok_or_else(|| empty(operation, key))?;
        Ok(Encrypted { key_arn: answer.key_id.unwrap_or_else(|| key.to_owned()), ciphertext })
    }

    async fn decrypt(
        &self,
        key: &str,
        ciphertext: &[u8],
        context: &EncryptionContext,
    ) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        let operation = KmsOperation::Decrypt;
        let answer = self
            .slow(operation, key, |client| {
                let request = client.decrypt().key_id(key).ciphertext_blob(Blob::new(ciphertext));
                let request = request.encryption_algorithm(EncryptionAlgorithmSpec::SymmetricDefault);
                request.set_encryption_context(Some(owned(context))).send()
            })
            .await?;
        answer.plaintext.map(|blob| Zeroizing::new(blob.into_inner())).ok_or_else(|| empty(operation, key))
    }

    async fn create_signing_key(
        &self,
        spec: KeySpec,
        description: &str,
        tags: &[(&'static str, String)],
    ) -> Result<KeyDescription, KmsError> {
        let operation = KmsOperation::CreateKey;
        let mut list = Vec::new();
        for (key, value) in tags {
            let tag = Tag::builder().tag_key(*key).tag_value(value).build();
            let invalid = |error: aws_sdk_kms::error::BuildError| {
                KmsError::new(operation, description, KmsErrorKind::Unsupported, &error.to_string())
            };
            list.push(tag.map_err(invalid)?);
        }
        let answer = self
            .slow(operation, description, |client| {
                let request = client.create_key().key_spec(to_sdk(spec)).key_usage(KeyUsageType::SignVerify);
                request.description(description).set_tags(Some(list)).send()
            })
            .await?;
        described(answer.key_metadata).ok_or_else(|| empty(operation, description))
    }

    async fn describe_key(&self, key: &str) -> Result<KeyDescription, KmsError> {
        let operation = KmsOperation::DescribeKey;
        let answer = self.slow(operation, key, |client| client.describe_key().key_id(key).send()).await?;
        described(answer.key_metadata).ok_or_else(|| empty(operation, key))
    }

    async fn public_key(&self, key: &str) -> Result<PublicKey, KmsError> {
        let operation = KmsOperation::GetPublicKey;
        let answer = self.slow(operation, key, |client| client.get_public_key().key_id(key).send()).await?;
        Ok(PublicKey {
            spec: answer.key_spec.as_ref().and_then(from_sdk),
            signs: answer.key_usage == Some(KeyUsageType::SignVerify),
            arn: answer.key_id.ok_or_else(|| empty(operation, key))?,
            subject_public_key_info: answer.public_key.map(Blob::into_inner).ok_or_else(|| empty(operation, key))?,
        })
    }

    async fn sign(
        &self,
        key: &str,
        message: Message<'_>,
        algorithm: SigningAlgorithm,
        pace: Pace,
    ) -> Result<Vec<u8>, KmsError> {
        let operation = KmsOperation::Sign;
        let (kind, bytes) = match message {
            Message::Digest(digest) => (MessageType::Digest, digest),
            Message::Raw(message) => (MessageType::Raw, message),
        };
        let call = |client: Client| {
            let request = client.sign().key_id(key).message_type(kind).message(Blob::new(bytes));
            request.signing_algorithm(algorithm_to_sdk(algorithm)).send()
        };
        let answer = match pace {
            Pace::Request => self.quick(operation, key, call).await?,
            Pace::Background => self.slow(operation, key, call).await?,
        };
        answer.signature.map(Blob::into_inner).ok_or_else(|| empty(operation, key))
    }

    async fn create_alias(&self, alias: &str, key: &str) -> Result<(), KmsError> {
        let call = |client: Client| client.create_alias().alias_name(alias).target_key_id(key).send();
        self.slow(KmsOperation::CreateAlias, alias, call).await?;
        Ok(())
    }

    async fn list_aliases(&self, key: &str, marker: Option<&str>) -> Result<Page<String>, KmsError> {
        let call = |client: Client| {
            client.list_aliases().key_id(key).set_marker(marker.map(str::to_owned)).limit(KEYS_PER_PAGE).send()
        };
        let answer = self.slow(KmsOperation::ListAliases, key, call).await?;
        let names = answer.aliases.unwrap_or_default().into_iter().filter_map(|alias| alias.alias_name);
        Ok(Page { items: names.collect(), next: answer.next_marker.filter(|_| answer.truncated) })
    }

    async fn list_keys(&self, marker: Option<&str>) -> Result<Page<String>, KmsError> {
        let call =
            |client: Client| client.list_keys().set_marker(marker.map(str::to_owned)).limit(KEYS_PER_PAGE).send();
        let answer = self.slow(KmsOperation::ListKeys, "of the account", call).await?;
        let arns = answer.keys.unwrap_or_default().into_iter().filter_map(|key| key.key_arn);
        Ok(Page { items: arns.collect(), next: answer.next_marker.filter(|_| answer.truncated) })
    }

    async fn list_resource_tags(&self, key: &str, marker: Option<&str>) -> Result<Page<(String, String)>, KmsError> {
        let call =
            |client: Client| client.list_resource_tags().key_id(key).set_marker(marker.map(str::to_owned)).send();
        let answer = self.slow(KmsOperation::ListResourceTags, key, call).await?;
        let tags = answer.tags.unwrap_or_default().into_iter().map(|tag| (tag.tag_key, tag.tag_value));
        Ok(Page { items: tags.collect(), next: answer.next_marker.filter(|_| answer.truncated) })
    }

    async fn disable_key(&self, key: &str) -> Result<(), KmsError> {
        self.slow(KmsOperation::DisableKey, key, |client| client.disable_key().key_id(key).send()).await?;
        Ok(())
    }

    async fn schedule_key_deletion(&self, key: &str, days: u8) -> Result<(), KmsError> {
        let call =
            |client: Client| client.schedule_key_deletion().key_id(key).pending_window_in_days(days.into()).send();
        self.slow(KmsOperation::ScheduleKeyDeletion, key, call).await?;
        Ok(())
    }
}

fn owned(context: &EncryptionContext) -> std::collections::HashMap<String, String> {
    context.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
}

fn empty(operation: KmsOperation, key: &str) -> KmsError {
    KmsError::new(operation, key, KmsErrorKind::Unavailable, "the answer lacks what was asked for")
}

fn described(metadata: Option<types::KeyMetadata>) -> Option<KeyDescription> {
    let metadata = metadata?;
    let state = match metadata.key_state {
        Some(types::KeyState::Enabled) => KeyState::Enabled,
        Some(types::KeyState::Disabled) => KeyState::Disabled,
        Some(types::KeyState::PendingDeletion | types::KeyState::PendingReplicaDeletion) => KeyState::PendingDeletion,
        _ => KeyState::Other,
    };
    let symmetric = metadata.key_spec == Some(types::KeySpec::SymmetricDefault);
    Some(KeyDescription {
        state,
        spec: metadata.key_spec.as_ref().and_then(from_sdk),
        signs: metadata.key_usage == Some(KeyUsageType::SignVerify),
        encrypts: symmetric && metadata.key_usage == Some(KeyUsageType::EncryptDecrypt),
        born_there: metadata.origin == Some(types::OriginType::AwsKms),
        created_at: metadata.creation_date.and_then(|at| at.to_millis().ok()).map(Timestamp::from_millis),
        arn: metadata.arn?,
    })
}

fn to_sdk(spec: KeySpec) -> types::KeySpec {
    match spec {
        KeySpec::EccNistP256 => types::KeySpec::EccNistP256,
        KeySpec::EccNistP384 => types::KeySpec::EccNistP384,
        KeySpec::EccNistEdwards25519 => types::KeySpec::EccNistEdwards25519,
        KeySpec::Rsa2048 => types::KeySpec::Rsa2048,
        KeySpec::Rsa3072 => types::KeySpec::Rsa3072,
        KeySpec::Rsa4096 => types::KeySpec::Rsa4096,
    }
}

fn from_sdk(spec: &types::KeySpec) -> Option<KeySpec> {
    match spec {
        types::KeySpec::EccNistP256 => Some(KeySpec::EccNistP256),
        types::KeySpec::EccNistP384 => Some(KeySpec::EccNistP384),
        types::KeySpec::EccNistEdwards25519 => Some(KeySpec::EccNistEdwards25519),
        types::KeySpec::Rsa2048 => Some(KeySpec::Rsa2048),
        types::KeySpec::Rsa3072 => Some(KeySpec::Rsa3072),
        types::KeySpec::Rsa4096 => Some(KeySpec::Rsa4096),
        _ => None,
    }
}

fn algorithm_to_sdk(algorithm: SigningAlgorithm) -> SigningAlgorithmSpec {
    match algorithm {
        SigningAlgorithm::EcdsaSha256 => SigningAlgorithmSpec::EcdsaSha256,
        SigningAlgorithm::EcdsaSha384 => SigningAlgorithmSpec::EcdsaSha384,
        SigningAlgorithm::Ed25519Sha512 => SigningAlgorithmSpec::Ed25519Sha512,
        SigningAlgorithm::RsassaPkcs1V15Sha256 => SigningAlgorithmSpec::RsassaPkcs1V15Sha256,
        SigningAlgorithm::RsassaPssSha256 => SigningAlgorithmSpec::RsassaPssSha256,
    }
}
