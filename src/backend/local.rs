//! Private keys that live in this process: made here, sealed at rest, used through aws-lc.
//!
//! Nothing is stored here: the sealed key is the handle, and the keyring that names it is its only place. So creating
//! a key again after a crash makes another one, and the first was never durable; destroying a key is dropping its
//! handle from the keyring.

use std::sync::Arc;

use async_trait::async_trait;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self, EcdsaKeyPair, EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair, RsaEncoding, RsaKeyPair,
};
use rsa::Pkcs1v15Sign;
use rsa::pss::Pss;
use rsa::sha2::{Digest, Sha256};
use rsa::signature::{Signer as _, Verifier as _};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use super::material::{PrivateKeyMaterial, Secret};
use super::verify::Verifier;
use super::{Backend, BackendError, BackendErrorKind, CreatedKey, KeyIdentity, LocalSigner, Signer, StoredKey};
use crate::keyring::algorithm::{Algorithm, SigningCost};
use crate::keyring::jwk::{Kid, PublicBytes, PublicJwk};
use crate::seal::data_keys::{DataKeys, LateDataKeys};

/// The name of this backend in configuration, metrics and records.
pub const LOCAL: &str = "local";

/// Encrypts private keys at rest. Called on blocking threads.
pub trait KeySealing: Send + Sync + 'static {
    /// Encrypts `plaintext` and binds it to `associated_data`.
    fn seal(&self, associated_data: &[u8], plaintext: &[u8]) -> Result<String, SealingError>;

    /// The inverse of [`seal`](Self::seal); fails when the associated data differs or anything was changed.
    fn open(&self, associated_data: &[u8], sealed: &str) -> Result<Zeroizing<Vec<u8>>, SealingError>;
}

impl KeySealing for DataKeys {
    fn seal(&self, associated_data: &[u8], plaintext: &[u8]) -> Result<String, SealingError> {
        self.seal_private(associated_data, plaintext).map_err(|error| SealingError::Internal(Some(error.into())))
    }

    fn open(&self, associated_data: &[u8], sealed: &str) -> Result<Zeroizing<Vec<u8>>, SealingError> {
        self.open_private(associated_data, sealed).map_err(|_| SealingError::Mismatch)
    }
}

impl KeySealing for LateDataKeys {
    fn seal(&self, associated_data: &[u8], plaintext: &[u8]) -> Result<String, SealingError> {
        arrived(self)?.seal(associated_data, plaintext)
    }

    fn open(&self, associated_data: &[u8], sealed: &str) -> Result<Zeroizing<Vec<u8>>, SealingError> {
        arrived(self)?.open(associated_data, sealed)
    }
}

fn arrived(late: &LateDataKeys) -> Result<&DataKeys, SealingError> {
    late.arrived().ok_or(SealingError::Unavailable(None))
}

/// Why a key was not sealed or unsealed.
#[derive(Debug, thiserror::Error)]
pub enum SealingError {
    #[error("the seal cannot be reached")]
    Unavailable(#[source] Option<Box<dyn std::error::Error + Send + Sync>>),
    #[error("it was not sealed with this seal for this key, or was changed since")]
    Mismatch,
    #[error("sealing failed")]
    Internal(#[source] Option<Box<dyn std::error::Error + Send + Sync>>),
}

/// What a backend can do that takes in private keys made elsewhere.
#[async_trait]
pub trait ImportPrivate: Send + Sync + 'static {
    /// Takes in a key under the kid it is known by. Its pair is tested as that of a created key is.
    ///
    /// # Errors
    /// [`BackendErrorKind::PairwiseTest`] also where the key does not fit the algorithm.
    async fn import(
        &self,
        identity: &KeyIdentity,
        kid: Kid,
        algorithm: Algorithm,
        material: PrivateKeyMaterial,
    ) -> Result<CreatedKey, BackendError>;
}

/// The backend `local`.
pub struct LocalBackend {
    sealing: Arc<dyn KeySealing>,
    /// One key is made at a time: making RSA keys takes seconds of a processor that signing needs too.
    making: Arc<Semaphore>,
}

impl LocalBackend {
    /// A backend whose keys are sealed by `sealing`.
    pub fn new(sealing: Arc<dyn KeySealing>) -> Self {
        LocalBackend { sealing, making: Arc::new(Semaphore::new(1)) }
    }

    /// Runs `work` on a blocking thread, after every earlier one has finished.
    async fn one_at_a_time<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&dyn KeySealing) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let permit = Arc::clone(&self.making).acquire_owned().await.map_err(|error| internal(operation, error))?;
        let sealing = Arc::clone(&self.sealing);
        // The permit goes along: when the caller gives up, the work still counts until it ends.
        let finished = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            apart(move || work(&*sealing)).map_err(|error| internal(operation, error))?
        });
        finished.await.map_err(|error| internal(operation, error))?
    }
}

#[async_trait]
impl Backend for LocalBackend {
    fn name(&self) -> &'static str {
        LOCAL
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        let identity = identity.clone();
        self.one_at_a_time("create", move |sealing| {
            let material = PrivateKeyMaterial::generate(algorithm).map_err(|error| internal("create", error))?;
            let kid = material.public().thumbprint();
            take_in("create", sealing, &identity, kid, algorithm, &material)
        })
        .await
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        let (sealing, key) = (Arc::clone(&self.sealing), key.clone());
        let opened = tokio::task::spawn_blocking(move || {
            let associated_data = associated_data(&key.identity, &key.kid);
            let plaintext =
                sealing.open(&associated_data, &key.handle).map_err(|error| sealing_failed("open", error))?;
            SigningKey::from_pkcs8(key.algorithm, &key.public, &plaintext).map_err(|error| unreadable("open", error))
        });
        let signer = Arc::new(opened.await.map_err(|error| internal("open", error))??);
        Ok(match key.algorithm.cost() {
            SigningCost::Microseconds => Signer::Inline(signer),
            SigningCost::Tenths => Signer::InTurn(signer),
            SigningCost::Milliseconds => Signer::Pooled(signer),
        })
    }

    /// Succeeds always: the private half goes with the handle, which the keyring drops.
    async fn destroy(&self, _key: &StoredKey) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl ImportPrivate for LocalBackend {
    async fn import(
        &self,
        identity: &KeyIdentity,
        kid: Kid,
        algorithm: Algorithm,
        material: PrivateKeyMaterial,
    ) -> Result<CreatedKey, BackendError> {
        let identity = identity.clone();
        self.one_at_a_time("import", move |sealing| take_in("import", sealing, &identity, kid, algorithm, &material))
            .await
    }
}

/// Runs `work` on a thread that gives way to those that sign.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    let working = || {
        // Where it is refused, signatures made meanwhile take longer.
        let _ = rustix::process::nice(GIVING_WAY);
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("making keys".to_owned()).spawn_scoped(scope, working)?;
        thread.join().map_err(|_| std::io::Error::other("making a key panicked"))
    })
}

/// Of a processor that is wanted by others all the time, such a thread still gets a quarter (sched(7)): after a compromise
/// signing waits for it.
const GIVING_WAY: i32 = 5;

/// Tests the pair and seals its private half.
fn take_in(
    operation: &'static str,
    sealing: &dyn KeySealing,
    identity: &KeyIdentity,
    kid: Kid,
    algorithm: Algorithm,
    material: &PrivateKeyMaterial,
) -> Result<CreatedKey, BackendError> {
    let plaintext = material.to_pkcs8_der().map_err(|error| internal(operation, error))?;
    pairwise_test(material, material.public(), algorithm, &plaintext)
        .map_err(|error| failed(operation, BackendErrorKind::PairwiseTest, Some(error.into())))?;
    let handle =
        sealing.seal(&associated_data(identity, &kid), &plaintext).map_err(|error| sealing_failed(operation, error))?;
    Ok(CreatedKey { kid, public: material.public().clone(), handle })
}

/// What a sealed key is bound to. Each part is preceded by its length, so that no two lists of parts share an encoding.
pub fn associated_data(identity: &KeyIdentity, kid: &Kid) -> Vec<u8> {
    let serial = identity.serial.to_be_bytes();
    let parts: [&[u8]; 5] = [
        b"jwksd local key 1",
        identity.installation.as_bytes(),
        identity.keyset.as_str().as_bytes(),
        kid.as_str().as_bytes(),
        &serial,
    ];
    let mut encoded = Vec::new();
    for part in parts {
        encoded.extend_from_slice(&(part.len() as u64).to_be_bytes());
        encoded.extend_from_slice(part);
    }
    encoded
}

/// Proves that the private half belongs to the public one and that both libraries understand the key alike: each signs,
/// the other verifies (FIPS 140-3 IG 10.3.A).
fn pairwise_test(
    material: &PrivateKeyMaterial,
    public: &PublicJwk,
    algorithm: Algorithm,
    pkcs8: &[u8],
) -> Result<(), PairwiseError> {
    const MESSAGE: &[u8] = b"jwksd pairwise test";
    let verifier = Verifier::new(algorithm, public).map_err(|_| PairwiseError::Refused)?;
    let signer = SigningKey::from_pkcs8(algorithm, public, pkcs8).map_err(|_| PairwiseError::Refused)?;

    let signature = signer.sign(MESSAGE).map_err(|_| PairwiseError::Refused)?;
    if signature.len() != algorithm.signature_len() || !verifies_independently(material, algorithm, MESSAGE, &signature)
    {
        return Err(PairwiseError::Failed { signed_by: "aws-lc", verified_by: "RustCrypto" });
    }
    let signature = sign_independently(material, algorithm, MESSAGE).ok_or(PairwiseError::Refused)?;
    verifier
        .verify(MESSAGE, &signature)
        .map_err(|_| PairwiseError::Failed { signed_by: "RustCrypto", verified_by: "aws-lc" })
}

#[derive(Debug, thiserror::Error)]
enum PairwiseError {
    #[error("the key does not serve the algorithm, or its halves do not belong together")]
    Refused,
    #[error("a signature made by {signed_by} does not verify in {verified_by}")]
    Failed { signed_by: &'static str, verified_by: &'static str },
}

/// Signs with the RustCrypto crates; RSA blinded, with randomness of the operating system.
fn sign_independently(material: &PrivateKeyMaterial, algorithm: Algorithm, message: &[u8]) -> Option<Vec<u8>> {
    match (material.secret(), algorithm) {
        (Secret::P256(key), Algorithm::Es256) => {
            let signature: p256::ecdsa::Signature = p256::ecdsa::SigningKey::from(key).try_sign(message).ok()?;
            Some(signature.to_bytes().to_vec())
        }
        (Secret::P384(key), Algorithm::Es384) => {
            let signature: p384::ecdsa::Signature = p384::ecdsa::SigningKey::from(key).try_sign(message).ok()?;
            Some(signature.to_bytes().to_vec())
        }
        (Secret::Rsa(key), Algorithm::Rs256 { .. }) => {
            key.sign(Pkcs1v15Sign::new::<Sha256>(), &Sha256::digest(message)).ok()
        }
        (Secret::Rsa(key), Algorithm::Ps256 { .. }) => key.sign(Pss::<Sha256>::new(), &Sha256::digest(message)).ok(),
        (Secret::Ed25519(key), Algorithm::EdDsa { .. }) => Some(key.try_sign(message).ok()?.to_bytes().to_vec()),
        _ => None,
    }
}

fn verifies_independently(
    material: &PrivateKeyMaterial,
    algorithm: Algorithm,
    message: &[u8],
    signature: &[u8],
) -> bool {
    match (material.secret(), algorithm) {
        (Secret::P256(key), Algorithm::Es256) => p256::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| {
            p256::ecdsa::VerifyingKey::from(key.public_key()).verify(message, &signature).is_ok()
        }),
        (Secret::P384(key), Algorithm::Es384) => p384::ecdsa::Signature::from_slice(signature).is_ok_and(|signature| {
            p384::ecdsa::VerifyingKey::from(key.public_key()).verify(message, &signature).is_ok()
        }),
        (Secret::Rsa(key), Algorithm::Rs256 { .. }) => {
            let hash = Sha256::digest(message);
            key.as_public_key().verify(Pkcs1v15Sign::new::<Sha256>(), &hash, signature).is_ok()
        }
        (Secret::Rsa(key), Algorithm::Ps256 { .. }) => {
            let hash = Sha256::digest(message);
            key.as_public_key().verify(Pss::<Sha256>::new(), &hash, signature).is_ok()
        }
        (Secret::Ed25519(key), Algorithm::EdDsa { .. }) => ed25519_dalek::Signature::from_slice(signature)
            .is_ok_and(|signature| key.verifying_key().verify_strict(message, &signature).is_ok()),
        _ => false,
    }
}

/// A private key in aws-lc, ready for one algorithm.
struct SigningKey {
    pair: Pair,
    random: SystemRandom,
}

enum Pair {
    Ec(EcdsaKeyPair),
    Rsa(RsaKeyPair, &'static dyn RsaEncoding),
    Ed25519(Ed25519KeyPair),
}

impl SigningKey {
    /// Reads a key and makes sure that it is the private half of `public` and fits the algorithm.
    fn from_pkcs8(algorithm: Algorithm, public: &PublicJwk, pkcs8: &[u8]) -> Result<Self, KeyMismatch> {
        if !public.fits(algorithm) {
            return Err(KeyMismatch);
        }
        let expected = public.to_bytes().map_err(|_| KeyMismatch)?;
        let pair = match &expected {
            PublicBytes::Ec { point, .. } => {
                let pair = EcdsaKeyPair::from_pkcs8(ecdsa(algorithm), pkcs8).map_err(|_| KeyMismatch)?;
                matching(pair.public_key().as_ref() == point.as_slice())?;
                Pair::Ec(pair)
            }
            PublicBytes::Rsa { n, e } => {
                let pair = RsaKeyPair::from_pkcs8(pkcs8).map_err(|_| KeyMismatch)?;
                let held = pair.public_key();
                matching(held.modulus().big_endian_without_leading_zero() == n.as_slice())?;
                matching(held.exponent().big_endian_without_leading_zero() == e.as_slice())?;
                Pair::Rsa(pair, rsa_encoding(algorithm))
            }
            PublicBytes::Ed25519(point) => {
                let pair = Ed25519KeyPair::from_pkcs8(pkcs8).map_err(|_| KeyMismatch)?;
                matching(pair.public_key().as_ref() == point.as_slice())?;
                Pair::Ed25519(pair)
            }
        };
        Ok(SigningKey { pair, random: SystemRandom::new() })
    }
}

impl LocalSigner for SigningKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        match &self.pair {
            Pair::Ec(pair) => pair.sign(&self.random, message).map(|signature| signature.as_ref().to_vec()),
            Pair::Ed25519(pair) => pair.try_sign(message).map(|signature| signature.as_ref().to_vec()),
            Pair::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(*encoding, &self.random, message, &mut signature).map(|()| signature)
            }
        }
        .map_err(|error| internal("sign", error))
    }
}

/// The unsealed key is not the one that the keyring publishes.
#[derive(Debug, thiserror::Error)]
#[error("the unsealed key is not the private half of the stored public key")]
struct KeyMismatch;

fn matching(same: bool) -> Result<(), KeyMismatch> {
    if same { Ok(()) } else { Err(KeyMismatch) }
}

fn ecdsa(algorithm: Algorithm) -> &'static EcdsaSigningAlgorithm {
    match algorithm {
        Algorithm::Es384 => &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
        // Others than ES256 do not come here: `fits` has tied the key's curve to the algorithm.
        _ => &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
    }
}

fn rsa_encoding(algorithm: Algorithm) -> &'static dyn RsaEncoding {
    match algorithm {
        // A salt as long as the hash (RFC 7518 §3.5).
        Algorithm::Ps256 { .. } => &signature::RSA_PSS_SHA256,
        _ => &signature::RSA_PKCS1_SHA256,
    }
}

type Source = Box<dyn std::error::Error + Send + Sync>;

fn failed(operation: &'static str, kind: BackendErrorKind, source: Option<Source>) -> BackendError {
    BackendError { backend: LOCAL, operation, kind, source }
}

fn internal(operation: &'static str, source: impl Into<Source>) -> BackendError {
    failed(operation, BackendErrorKind::Internal, Some(source.into()))
}

fn unreadable(operation: &'static str, source: impl Into<Source>) -> BackendError {
    failed(operation, BackendErrorKind::Unreadable, Some(source.into()))
}

fn sealing_failed(operation: &'static str, error: SealingError) -> BackendError {
    let kind = match error {
        SealingError::Unavailable(_) => BackendErrorKind::Unavailable,
        SealingError::Mismatch => BackendErrorKind::Unreadable,
        SealingError::Internal(_) => BackendErrorKind::Internal,
    };
    failed(operation, kind, Some(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::algorithm::RsaBits;
    use crate::keyring::name::Name;

    const RSA: RsaBits = RsaBits::B2048;

    fn every_kind_of_key() -> [Algorithm; 5] {
        [
            Algorithm::Es256,
            Algorithm::Es384,
            Algorithm::Rs256 { rsa_bits: RSA },
            Algorithm::Ps256 { rsa_bits: RSA },
            Algorithm::EdDsa { label: Default::default() },
        ]
    }

    #[test]
    fn a_wrong_pair_fails_the_pairwise_test() {
        for algorithm in every_kind_of_key() {
            let key = PrivateKeyMaterial::generate(algorithm).unwrap();
            let other = PrivateKeyMaterial::generate(algorithm).unwrap();
            let (key_der, other_der) = (key.to_pkcs8_der().unwrap(), other.to_pkcs8_der().unwrap());
            pairwise_test(&key, key.public(), algorithm, &key_der).unwrap();
            // The private half of another key, the public half of another key, and another key in one library only.
            assert!(pairwise_test(&key, key.public(), algorithm, &other_der).is_err());
            assert!(pairwise_test(&key, other.public(), algorithm, &key_der).is_err());
            assert!(pairwise_test(&other, key.public(), algorithm, &key_der).is_err());
            assert!(
                pairwise_test(&key, key.public(), Algorithm::Es384, &key_der).is_err() || algorithm == Algorithm::Es384
            );
        }
    }

    #[test]
    fn each_direction_of_the_pairwise_test_is_checked() {
        let algorithm = Algorithm::Es256;
        let (key, other) =
            (PrivateKeyMaterial::generate(algorithm).unwrap(), PrivateKeyMaterial::generate(algorithm).unwrap());
        let signature = sign_independently(&key, algorithm, b"m").unwrap();
        assert!(verifies_independently(&key, algorithm, b"m", &signature));
        assert!(!verifies_independently(&key, algorithm, b"n", &signature));
        assert!(!verifies_independently(&other, algorithm, b"m", &signature));
        assert!(!verifies_independently(&key, algorithm, b"m", b""));
    }

    #[test]
    fn a_thread_that_makes_keys_gives_way_and_no_other_does() {
        let niceness = || rustix::process::getpriority_process(None).unwrap();
        let own = niceness();
        assert_eq!(apart(niceness).unwrap(), (own + GIVING_WAY).min(19));
        assert_eq!(niceness(), own);
    }

    #[test]
    fn a_key_that_cannot_be_made_is_an_error_where_it_was_wanted() {
        let panicking = || -> u8 { panic!("in another thread") };
        assert!(apart(panicking).is_err());
    }

    #[test]
    fn associated_data_of_different_identities_differ() {
        let identity = |installation: &str, keyset: &str, serial| KeyIdentity {
            installation: installation.into(),
            lineage: "l".into(),
            keyset: Name::parse(keyset).unwrap(),
            serial,
        };
        let encodings = [
            associated_data(&identity("a", "bc", 1), &Kid("d".into())),
            associated_data(&identity("ab", "c", 1), &Kid("d".into())),
            associated_data(&identity("a", "b", 1), &Kid("cd".into())),
            associated_data(&identity("a", "bc", 2), &Kid("d".into())),
            associated_data(&identity("a", "bc", 1), &Kid("e".into())),
        ];
        let distinct: std::collections::BTreeSet<_> = encodings.iter().collect();
        assert_eq!(distinct.len(), encodings.len());
    }
}
