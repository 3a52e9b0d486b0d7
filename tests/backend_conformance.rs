//! What every backend must do, run over each of them; and what the local one must do besides.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; clippy sees only #[test] functions as tests")]

mod support;

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jwksd::aws_kms::SdkKms;
use jwksd::backend::aws_kms::AwsKmsBackend;
use jwksd::backend::local::{ImportPrivate, KeySealing, LocalBackend, SealingError};
use jwksd::backend::material::PrivateKeyMaterial;
use jwksd::backend::{Backend, BackendError, BackendErrorKind, CreatedKey, KeyIdentity, Signer, StoredKey};
use jwksd::clock::SystemClock;
use jwksd::config::AwsKms;
use jwksd::keyring::algorithm::{Algorithm, EdLabel, RsaBits};
use jwksd::keyring::jwk::{EcCurve, Kid, PublicBytes, PublicJwk};
use jwksd::keyring::name::Name;
use jwksd::keyring::time::Span;
use jwksd::seal::data_keys::DataKeys;
use rsa::sha2::{Digest, Sha256};
use rsa::signature::Verifier as _;
use support::localstack::{Account, LocalStack, REGION};
use zeroize::Zeroizing;

/// A backend under test.
#[async_trait]
trait Subject: Sync {
    /// A new instance over the same keys, as after a restart.
    fn restarted(&self) -> Arc<dyn Backend>;
    fn algorithms(&self) -> Vec<Algorithm>;
    /// Whether a second `create` for one identity finds the first key (remote backends), or the first one was never
    /// kept (the local one).
    fn remembers(&self) -> bool;
}

/// The suite: each adapter passes it whole.
async fn suite(subject: &dyn Subject) {
    for (serial, algorithm) in (1..).zip(subject.algorithms()) {
        let identity = identity("installation", "default", serial);
        let created = subject.restarted().create(&identity, algorithm).await.unwrap();
        let key = stored(&identity, algorithm, &created);
        a_created_key_is_named_by_its_thumbprint(&key);
        a_signature_verifies_elsewhere(&*subject.restarted(), &key).await;
        creation_is_idempotent(subject, &key).await;
        another_identity_or_public_key_does_not_open(&*subject.restarted(), &key).await;
        destruction_is_idempotent(&*subject.restarted(), &key).await;
    }
}

fn a_created_key_is_named_by_its_thumbprint(key: &StoredKey) {
    assert_eq!(key.kid, key.public.thumbprint());
    assert!(key.public.fits(key.algorithm));
    let validated = PublicJwk::from_jwk_json(&serde_json::to_value(&key.public).unwrap()).unwrap();
    assert_eq!(validated.public, key.public);
}

async fn a_signature_verifies_elsewhere(backend: &dyn Backend, key: &StoredKey) {
    let signer = backend.open(key).await.unwrap();
    for message in [&b""[..], b"header.payload", &[0x5a; 20_000]] {
        let signature = sign(&signer, message).await.unwrap();
        assert_eq!(signature.len(), key.algorithm.signature_len());
        assert!(verifies(key, message, &signature), "{}", key.algorithm);
        assert!(!verifies(key, b"other", &signature), "{}", key.algorithm);
    }
}

async fn creation_is_idempotent(subject: &dyn Subject, key: &StoredKey) {
    let again = subject.restarted().create(&key.identity, key.algorithm).await.unwrap();
    assert_eq!(again.kid == key.kid, subject.remembers());
    // Whichever it is, both can be opened: a crash between making and storing costs nothing.
    subject.restarted().open(&stored(&key.identity, key.algorithm, &again)).await.unwrap();
    subject.restarted().open(key).await.unwrap();
}

async fn another_identity_or_public_key_does_not_open(backend: &dyn Backend, key: &StoredKey) {
    let mut others = vec![key.clone(); 7];
    others[0].identity.serial += 1;
    others[1].identity.keyset = Name::parse("other").unwrap();
    others[2].identity.installation = "other".into();
    others[3].kid = Kid("other".into());
    others[4].handle = key.handle.chars().rev().collect();
    others[5].handle = String::new();
    others[6].public = PrivateKeyMaterial::generate(key.algorithm).unwrap().public().clone();
    for other in others {
        let error = refusal(backend.open(&other).await);
        assert!(matches!(error.kind, BackendErrorKind::Unreadable | BackendErrorKind::NotFound), "{error}");
    }
}

async fn destruction_is_idempotent(backend: &dyn Backend, key: &StoredKey) {
    backend.destroy(key).await.unwrap();
    backend.destroy(key).await.unwrap();
    let mut never_existed = key.clone();
    never_existed.identity.serial = 999;
    never_existed.handle = "never existed".into();
    backend.destroy(&never_existed).await.unwrap();
}

fn identity(installation: &str, keyset: &str, serial: u64) -> KeyIdentity {
    KeyIdentity {
        installation: installation.into(),
        lineage: "lineage".into(),
        keyset: Name::parse(keyset).unwrap(),
        serial,
    }
}

fn stored(identity: &KeyIdentity, algorithm: Algorithm, created: &CreatedKey) -> StoredKey {
    StoredKey {
        identity: identity.clone(),
        kid: created.kid.clone(),
        algorithm,
        public: created.public.clone(),
        handle: created.handle.clone(),
    }
}

async fn sign(signer: &Signer, message: &[u8]) -> Result<Vec<u8>, BackendError> {
    match signer {
        Signer::Inline(signer) | Signer::InTurn(signer) | Signer::Pooled(signer) => signer.sign(message),
        Signer::Remote(signer) => signer.sign(message).await,
    }
}

fn refusal(result: Result<Signer, BackendError>) -> BackendError {
    result.err().expect("the key must not open")
}

/// Verifies with the RustCrypto crates and the published members alone.
fn verifies(key: &StoredKey, message: &[u8], signature: &[u8]) -> bool {
    let hash = Sha256::digest(message);
    match (key.public.to_bytes().unwrap(), key.algorithm) {
        (PublicBytes::Ec { crv: EcCurve::P256, point }, Algorithm::Es256) => {
            let key = p256::ecdsa::VerifyingKey::from_sec1_bytes(&point).unwrap();
            p256::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| key.verify(message, &signature).is_ok())
        }
        (PublicBytes::Ec { crv: EcCurve::P384, point }, Algorithm::Es384) => {
            let key = p384::ecdsa::VerifyingKey::from_sec1_bytes(&point).unwrap();
            p384::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| key.verify(message, &signature).is_ok())
        }
        (PublicBytes::Ed25519(point), Algorithm::EdDsa { .. }) => {
            let key = ed25519_dalek::VerifyingKey::from_bytes(&point).unwrap();
            ed25519_dalek::Signature::from_slice(signature)
                .is_ok_and(|signature| key.verify_strict(message, &signature).is_ok())
        }
        (PublicBytes::Rsa { n, e }, algorithm) => {
            let number = rsa::BoxedUint::from_be_slice_vartime;
            let key = rsa::RsaPublicKey::new(number(&n), number(&e)).unwrap();
            match algorithm {
                Algorithm::Rs256 { .. } => key.verify(rsa::Pkcs1v15Sign::new::<Sha256>(), &hash, signature).is_ok(),
                Algorithm::Ps256 { .. } => key.verify(rsa::Pss::<Sha256>::new(), &hash, signature).is_ok(),
                _ => false,
            }
        }
        _ => false,
    }
}

/// A seal in memory, with faults to order.
struct TestSeal {
    key: [u8; 32],
    fault: Mutex<Fault>,
    /// Calls of `seal` under way, and the most there ever were.
    under_way: Mutex<(usize, usize)>,
    changed: Condvar,
    nonces: AtomicUsize,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    Unavailable,
    Internal,
    /// Unseals to something else than was sealed.
    Garbage,
    /// Waits in `seal` for a second call that should not come.
    Crowd,
}

impl TestSeal {
    fn new() -> Arc<Self> {
        Arc::new(TestSeal {
            key: [9; 32],
            fault: Mutex::new(Fault::None),
            under_way: Mutex::new((0, 0)),
            changed: Condvar::new(),
            nonces: AtomicUsize::new(0),
        })
    }

    fn order(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    fn fail(&self) -> Result<Fault, SealingError> {
        match *self.fault.lock().unwrap() {
            Fault::Unavailable => Err(SealingError::Unavailable(None)),
            Fault::Internal => Err(SealingError::Internal(Some("broken".into()))),
            fault => Ok(fault),
        }
    }

    fn cipher(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &self.key).unwrap())
    }

    fn wait_for_company(&self) {
        let mut under_way = self.under_way.lock().unwrap();
        under_way.0 += 1;
        under_way.1 = under_way.1.max(under_way.0);
        self.changed.notify_all();
        let patience = Duration::from_millis(200);
        let (mut under_way, _) = self.changed.wait_timeout_while(under_way, patience, |calls| calls.1 < 2).unwrap();
        under_way.0 -= 1;
    }
}

impl KeySealing for TestSeal {
    fn seal(&self, associated_data: &[u8], plaintext: &[u8]) -> Result<String, SealingError> {
        if self.fail()? == Fault::Crowd {
            self.wait_for_company();
        }
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&(self.nonces.fetch_add(1, Ordering::Relaxed) as u64).to_be_bytes());
        let mut sealed = plaintext.to_vec();
        let additional = Aad::from(associated_data);
        self.cipher().seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), additional, &mut sealed).unwrap();
        Ok(STANDARD.encode([&nonce[..], &sealed].concat()))
    }

    fn open(&self, associated_data: &[u8], sealed: &str) -> Result<Zeroizing<Vec<u8>>, SealingError> {
        if self.fail()? == Fault::Garbage {
            return Ok(Zeroizing::new(vec![0x30; 100]));
        }
        let bytes = STANDARD.decode(sealed).map_err(|_| SealingError::Mismatch)?;
        let (nonce, sealed) = bytes.split_at_checked(12).ok_or(SealingError::Mismatch)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealingError::Mismatch)?;
        let mut plaintext = sealed.to_vec();
        let opened = self.cipher().open_in_place(nonce, Aad::from(associated_data), &mut plaintext);
        Ok(Zeroizing::new(opened.map_err(|_| SealingError::Mismatch)?.to_vec()))
    }
}

struct Local(Arc<TestSeal>);

impl Subject for Local {
    fn restarted(&self) -> Arc<dyn Backend> {
        Arc::new(LocalBackend::new(self.0.clone()))
    }

    fn algorithms(&self) -> Vec<Algorithm> {
        vec![
            Algorithm::Es256,
            Algorithm::Es384,
            Algorithm::Rs256 { rsa_bits: RsaBits::B2048 },
            Algorithm::Ps256 { rsa_bits: RsaBits::B3072 },
            Algorithm::EdDsa { label: EdLabel::EdDsa },
            Algorithm::EdDsa { label: EdLabel::Ed25519 },
        ]
    }

    fn remembers(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn the_local_backend_conforms() {
    suite(&Local(TestSeal::new())).await;
}

#[tokio::test]
async fn a_local_key_of_the_largest_size_is_made_and_signs() {
    let algorithm = Algorithm::Rs256 { rsa_bits: RsaBits::B4096 };
    let (backend, identity) = (LocalBackend::new(TestSeal::new()), identity("i", "k", 1));
    let created = backend.create(&identity, algorithm).await.unwrap();
    a_signature_verifies_elsewhere(&backend, &stored(&identity, algorithm, &created)).await;
}

#[tokio::test]
async fn a_local_signer_runs_where_its_cost_allows() {
    let backend = LocalBackend::new(TestSeal::new());
    let [quick, slower, slow] = [
        Algorithm::Es256,
        Algorithm::Rs256 { rsa_bits: RsaBits::B2048 },
        Algorithm::Ps256 { rsa_bits: RsaBits::B3072 },
    ];
    let opened = async |algorithm: Algorithm| {
        let identity = identity("i", "k", 1);
        let created = backend.create(&identity, algorithm).await.unwrap();
        backend.open(&stored(&identity, algorithm, &created)).await.unwrap()
    };
    assert!(matches!(opened(quick).await, Signer::Inline(_)));
    assert!(matches!(opened(slower).await, Signer::InTurn(_)));
    assert!(matches!(opened(slow).await, Signer::Pooled(_)));
}

#[tokio::test]
async fn faults_of_the_seal_keep_their_kind() {
    let seal = TestSeal::new();
    let (backend, identity) = (LocalBackend::new(seal.clone()), identity("i", "k", 1));
    let created = backend.create(&identity, Algorithm::Es256).await.unwrap();
    let key = stored(&identity, Algorithm::Es256, &created);
    for (fault, kind) in
        [(Fault::Unavailable, BackendErrorKind::Unavailable), (Fault::Internal, BackendErrorKind::Internal)]
    {
        seal.order(fault);
        let error = backend.create(&identity, Algorithm::Es256).await.err().unwrap();
        assert_eq!((error.kind, error.operation, error.backend), (kind, "create", "local"));
        assert_eq!(refusal(backend.open(&key).await).kind, kind);
    }
    seal.order(Fault::Garbage);
    assert_eq!(refusal(backend.open(&key).await).kind, BackendErrorKind::Unreadable);
    seal.order(Fault::None);
    backend.open(&key).await.unwrap();
}

#[tokio::test]
async fn a_key_sealed_under_another_seal_is_unreadable() {
    let identity = identity("i", "k", 1);
    let created = LocalBackend::new(TestSeal::new()).create(&identity, Algorithm::Es256).await.unwrap();
    let other = Arc::new(TestSeal { key: [8; 32], ..Arc::into_inner(TestSeal::new()).unwrap() });
    let error = refusal(LocalBackend::new(other).open(&stored(&identity, Algorithm::Es256, &created)).await);
    assert_eq!(error.kind, BackendErrorKind::Unreadable);
}

#[tokio::test]
async fn a_local_key_opens_only_for_its_own_kind_of_algorithm() {
    let (backend, identity) = (LocalBackend::new(TestSeal::new()), identity("i", "k", 1));
    let created = backend.create(&identity, Algorithm::Es256).await.unwrap();
    for algorithm in [Algorithm::Es384, Algorithm::EdDsa { label: EdLabel::EdDsa }] {
        let error = refusal(backend.open(&stored(&identity, algorithm, &created)).await);
        assert_eq!(error.kind, BackendErrorKind::Unreadable);
    }
}

#[tokio::test]
async fn an_imported_key_keeps_its_kid_and_signs() {
    let backend = LocalBackend::new(TestSeal::new());
    let (identity, kid) = (identity("i", "k", 1), Kid::parse("old issuer's key").unwrap());
    for algorithm in [Algorithm::Es256, Algorithm::Ps256 { rsa_bits: RsaBits::B2048 }] {
        let material = PrivateKeyMaterial::generate(algorithm).unwrap();
        let imported = backend.import(&identity, kid.clone(), algorithm, material.clone()).await.unwrap();
        assert_eq!((&imported.kid, &imported.public), (&kid, material.public()));
        a_signature_verifies_elsewhere(&backend, &stored(&identity, algorithm, &imported)).await;
        let unfit = backend.import(&identity, kid.clone(), Algorithm::Es384, material).await.err().unwrap();
        assert_eq!((unfit.kind, unfit.operation), (BackendErrorKind::PairwiseTest, "import"));
    }
}

#[tokio::test]
async fn making_a_key_leaves_the_runtime_free() {
    let (backend, identity) = (LocalBackend::new(TestSeal::new()), identity("i", "k", 1));
    let mut creation = backend.create(&identity, Algorithm::Rs256 { rsa_bits: RsaBits::B2048 });
    // This runtime has one thread: were the key made on it, the first poll would return it.
    let pending = poll_fn(|context| Poll::Ready(creation.as_mut().poll(context).is_pending())).await;
    assert!(pending);
    creation.await.unwrap();
}

#[tokio::test]
async fn keys_are_made_one_at_a_time() {
    let seal = TestSeal::new();
    seal.order(Fault::Crowd);
    let backend = LocalBackend::new(seal.clone());
    let (first, second) = (identity("i", "k", 1), identity("i", "k", 2));
    let (first, second) =
        tokio::join!(backend.create(&first, Algorithm::Es256), backend.create(&second, Algorithm::Es256));
    assert_ne!(first.unwrap().kid, second.unwrap().kid);
    assert_eq!(seal.under_way.lock().unwrap().1, 1);
}

/// AWS KMS as LocalStack plays it, which has no Ed25519 keys.
struct Kms {
    account: Account,
    secret: Arc<DataKeys>,
}

impl Kms {
    async fn new() -> Kms {
        let account = LocalStack::shared().await.account();
        Kms { account, secret: Arc::new(DataKeys::ephemeral("installation")) }
    }
}

impl Subject for Kms {
    fn restarted(&self) -> Arc<dyn Backend> {
        // With the account's credentials: those of the environment are the whole process's.
        let settings = AwsKms {
            region: Some(REGION.to_owned()),
            endpoint_url: Some(self.account.endpoint.clone()),
            attempt_timeout: Span::from_secs(20),
            concurrency: 4,
            deletion_window_days: 7,
            cleanup_after: Span::DAY,
        };
        let api = Arc::new(SdkKms::with_client(self.account.client.clone(), settings));
        let proof = self.secret.clone();
        Arc::new(AwsKmsBackend::new(api, proof, Arc::new(SystemClock), 7, Span::DAY))
    }

    fn algorithms(&self) -> Vec<Algorithm> {
        vec![
            Algorithm::Es256,
            Algorithm::Es384,
            Algorithm::Rs256 { rsa_bits: RsaBits::B2048 },
            Algorithm::Ps256 { rsa_bits: RsaBits::B3072 },
        ]
    }

    fn remembers(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn the_aws_kms_backend_conforms() {
    suite(&Kms::new().await).await;
}

#[tokio::test]
async fn what_the_service_does_not_offer_is_refused_in_its_words() {
    let kms = Kms::new().await;
    let algorithm = Algorithm::EdDsa { label: EdLabel::EdDsa };
    let error = kms.restarted().create(&identity("installation", "default", 1), algorithm).await.err().unwrap();
    let text = jwksd::engine::chain(&error);
    assert_eq!(
        (error.kind, error.operation, error.backend),
        (BackendErrorKind::Internal, "create", "aws-kms"),
        "{text}"
    );
    assert!(text.contains("CreateKey") && text.contains("another algorithm"), "{text}");
}
