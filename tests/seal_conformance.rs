//! What every key-encryption key keeps to: the file's and that in AWS KMS, one suite.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

use std::sync::Arc;

use async_trait::async_trait;
use jwksd::aws_kms::SdkKms;
use jwksd::config::{Source, load};
use jwksd::seal::aws_kms::AwsKmsKey;
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use support::kms_proxy::{Fault, KmsProxy};
use support::localstack::{Account, LocalStack, client};

/// Makes keys of one kind.
#[async_trait]
trait Kind {
    /// A new key, opened twice: as two processes would.
    async fn twice(&self) -> [Arc<dyn KeyEncryptionKey>; 2];
}

struct Files(tempfile::TempDir);

struct Kms {
    account: Account,
    proxy: KmsProxy,
}

#[async_trait]
impl Kind for Files {
    async fn twice(&self) -> [Arc<dyn KeyEncryptionKey>; 2] {
        let path = self.0.path().join(jwksd::random::id());
        [Arc::new(FileKey::create(&path).unwrap()), Arc::new(FileKey::load(&path).unwrap())]
    }
}

#[async_trait]
impl Kind for Kms {
    async fn twice(&self) -> [Arc<dyn KeyEncryptionKey>; 2] {
        let made = self.account.client.create_key().send().await.unwrap();
        let key = made.key_metadata.unwrap();
        let alias = format!("alias/{}", jwksd::random::id());
        self.account.client.create_alias().alias_name(&alias).target_key_id(&key.key_id).send().await.unwrap();
        [Arc::new(self.key(&key.arn.unwrap())), Arc::new(self.key(&alias))]
    }
}

impl Kms {
    async fn new() -> Self {
        let account = LocalStack::shared().await.account();
        let proxy = KmsProxy::before(&account.endpoint).await;
        Kms { account, proxy }
    }

    fn key(&self, named: &str) -> AwsKmsKey {
        let settings = load(&Source::Embedded, std::iter::empty()).unwrap().config.aws_kms;
        let client = client(&self.proxy.url(), &self.account.access_key_id);
        AwsKmsKey::new(Arc::new(SdkKms::with_client(client, settings)), named)
    }
}

async fn conforms(kind: &dyn Kind) {
    let [key, again] = kind.twice().await;
    let [other, _] = kind.twice().await;
    let secret = [7; 32];

    let wrapped = key.wrap("installation 1", &secret).await.unwrap();
    assert!(!wrapped.windows(32).any(|window| window == secret), "it is encrypted");
    assert_eq!(&key.unwrap("installation 1", &wrapped).await.unwrap()[..], secret);
    assert_eq!(&again.unwrap("installation 1", &wrapped).await.unwrap()[..], secret, "another process opens it too");
    assert_ne!(key.wrap("installation 1", &secret).await.unwrap(), wrapped, "never twice the same");

    assert_eq!(key.id().await.unwrap(), key.id().await.unwrap());
    assert_eq!(key.id().await.unwrap(), again.id().await.unwrap(), "a key has one name, however it was found");
    assert_ne!(key.id().await.unwrap(), other.id().await.unwrap());

    let mismatch = |result: Result<_, SealError>| match result {
        Err(SealError::Mismatch { .. }) => {}
        Err(error) => panic!("not told as a mismatch: {error:?}"),
        Ok::<zeroize::Zeroizing<Vec<u8>>, _>(_) => panic!("was unwrapped"),
    };
    mismatch(key.unwrap("installation 2", &wrapped).await);
    mismatch(other.unwrap("installation 1", &wrapped).await);
    for at in [0, wrapped.len() / 2, wrapped.len() - 1] {
        let mut tampered = wrapped.clone();
        tampered[at] ^= 1;
        mismatch(key.unwrap("installation 1", &tampered).await);
    }
    mismatch(key.unwrap("installation 1", b"not a ciphertext").await);
}

#[tokio::test]
async fn a_file_conforms() {
    conforms(&Files(tempfile::tempdir().unwrap())).await;
}

#[tokio::test]
async fn a_key_in_aws_kms_conforms_and_tells_unavailable_from_mismatch() {
    let kms = Kms::new().await;
    conforms(&kms).await;

    let [key, by_alias] = kms.twice().await;
    let wrapped = key.wrap("c", &[7; 32]).await.unwrap();
    for fault in [Fault::LoseRequest, Fault::Throttle, Fault::Deny, Fault::Fail, Fault::Hang] {
        kms.proxy.always("*", fault.clone());
        for error in [key.unwrap("c", &wrapped).await.unwrap_err(), by_alias.id().await.map(|_| ()).unwrap_err()] {
            assert!(matches!(error, SealError::Unavailable { .. }), "{fault:?}: {error:?}");
        }
        kms.proxy.clear();
    }
    // One failure is not told at all.
    kms.proxy.next("Decrypt", 1, Fault::Throttle);
    assert_eq!(&key.unwrap("c", &wrapped).await.unwrap()[..], [7; 32]);

    let arn = key.id().await.unwrap();
    kms.account.client.disable_key().key_id(&arn).send().await.unwrap();
    let disabled = key.unwrap("c", &wrapped).await.unwrap_err();
    assert!(matches!(disabled, SealError::Unavailable { .. }), "it may be enabled again: {disabled:?}");

    let signing = kms.account.client.create_key().key_spec(aws_sdk_kms::types::KeySpec::EccNistP256);
    let signing = signing.key_usage(aws_sdk_kms::types::KeyUsageType::SignVerify).send().await.unwrap();
    let wrong = kms.key(&signing.key_metadata.unwrap().key_id).wrap("c", &[7; 32]).await.unwrap_err();
    assert!(matches!(wrong, SealError::Unusable { .. }), "{wrong:?}");
}
