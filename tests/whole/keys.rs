//! Keys that cost nothing: real points on the curve, made once, and signatures that a sum proves. Where a history signs
//! remotely the signatures are real too, since the engine verifies them.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED, ECDSA_P384_SHA384_FIXED_SIGNING,
    EcdsaKeyPair, EcdsaSigningAlgorithm, EcdsaVerificationAlgorithm, UnparsedPublicKey,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::jwk::{EcCurve, Kid, PublicJwk};
use p256::ecdsa::signature::hazmat::PrehashSigner;
use p256::pkcs8::{EncodePrivateKey, EncodePublicKey};

/// Keys that one history may have of each algorithm; none has nearly as many.
const POOL: KeyId = 1024;

/// The same of the algorithm that keysets change to; after the others.
const OTHER_POOL: KeyId = 256;

/// Keys of issuers that were there before, of the first algorithm; behind all others.
pub const EARLIER: usize = 4;

/// Number of a key in the pool: in a history every key has another one.
pub type KeyId = u16;

pub struct Pair {
    pub id: KeyId,
    pub kid: Kid,
    pub public: PublicJwk,
    kind: &'static Kind,
    scalar: Vec<u8>,
    point: Vec<u8>,
    /// The members `x` and `y`.
    pub coordinates: (String, String),
}

/// What keys of one algorithm have in common.
struct Kind {
    algorithm: Algorithm,
    curve: EcCurve,
    signing: &'static EcdsaSigningAlgorithm,
    verifying: &'static EcdsaVerificationAlgorithm,
}

static ES256: Kind = Kind {
    algorithm: Algorithm::Es256,
    curve: EcCurve::P256,
    signing: &ECDSA_P256_SHA256_FIXED_SIGNING,
    verifying: &ECDSA_P256_SHA256_FIXED,
};

static ES384: Kind = Kind {
    algorithm: Algorithm::Es384,
    curve: EcCurve::P384,
    signing: &ECDSA_P384_SHA384_FIXED_SIGNING,
    verifying: &ECDSA_P384_SHA384_FIXED,
};

static PAIRS: LazyLock<Vec<Arc<Pair>>> =
    LazyLock::new(|| (0..POOL + OTHER_POOL + EARLIER as KeyId).map(|id| Arc::new(Pair::new(id))).collect());

/// Numbers of keys of an algorithm.
pub fn ids_of(algorithm: Algorithm) -> Range<KeyId> {
    match algorithm {
        Algorithm::Es384 => POOL..POOL + OTHER_POOL,
        _ => 0..POOL,
    }
}

pub fn pair(id: KeyId) -> &'static Arc<Pair> {
    &PAIRS[usize::from(id)]
}

/// The key of an issuer that was there before.
pub fn earlier(number: usize) -> KeyId {
    POOL + OTHER_POOL + (number % EARLIER) as KeyId
}

pub fn is_earlier(id: KeyId) -> bool {
    id >= POOL + OTHER_POOL
}

/// Which key of the pool a verifier reads in a document.
pub fn id_of(kid: &str) -> Option<KeyId> {
    static BY_KID: LazyLock<std::collections::HashMap<String, KeyId>> =
        LazyLock::new(|| PAIRS.iter().map(|pair| (pair.kid.to_string(), pair.id)).collect());
    BY_KID.get(kid).copied()
}

impl Pair {
    fn new(id: KeyId) -> Pair {
        let kind = if id < POOL || is_earlier(id) { &ES256 } else { &ES384 };
        let mut scalar = vec![0x5a; kind.curve.coordinate_len()];
        let end = scalar.len();
        scalar[end - 8..].copy_from_slice(&(u64::from(id) + 1).to_be_bytes());
        let point = match kind.curve {
            EcCurve::P256 => p256::SecretKey::from_slice(&scalar).unwrap().public_key().to_sec1_bytes().to_vec(),
            EcCurve::P384 => p384::SecretKey::from_slice(&scalar).unwrap().public_key().to_sec1_bytes().to_vec(),
        };
        let (x, y) = point[1..].split_at(end);
        let public = PublicJwk::ec(kind.curve, x, y).unwrap();
        let coordinates = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        // Those keep the names that their tokens carry.
        let kid = if is_earlier(id) { Kid::parse(&format!("earlier-{id}")).unwrap() } else { public.thumbprint() };
        Pair { id, kid, public, kind, scalar, point, coordinates }
    }

    pub fn algorithm(&self) -> Algorithm {
        self.kind.algorithm
    }

    /// As `crv` calls it.
    pub fn curve(&self) -> &'static str {
        match self.kind.curve {
            EcCurve::P256 => "P-256",
            EcCurve::P384 => "P-384",
        }
    }

    /// As DER (RFC 5280 §4.1).
    pub fn public_key_info(&self) -> Vec<u8> {
        let der = match self.kind.curve {
            EcCurve::P256 => p256::PublicKey::from_sec1_bytes(&self.point).unwrap().to_public_key_der(),
            EcCurve::P384 => p384::PublicKey::from_sec1_bytes(&self.point).unwrap().to_public_key_der(),
        };
        der.unwrap().to_vec()
    }

    /// The private half as DER (RFC 5208 §5).
    pub fn private_key_info(&self) -> Vec<u8> {
        p256::SecretKey::from_slice(&self.scalar).unwrap().to_pkcs8_der().unwrap().as_bytes().to_vec()
    }

    /// The signature of a digest, as DER (RFC 3279 §2.2.3).
    pub fn sign_digest(&self, digest: &[u8]) -> Vec<u8> {
        match self.kind.curve {
            EcCurve::P256 => {
                let key = p256::ecdsa::SigningKey::from_slice(&self.scalar).unwrap();
                let signature: p256::ecdsa::Signature = key.sign_prehash(digest).unwrap();
                signature.to_der().as_bytes().to_vec()
            }
            EcCurve::P384 => {
                let key = p384::ecdsa::SigningKey::from_slice(&self.scalar).unwrap();
                let signature: p384::ecdsa::Signature = key.sign_prehash(digest).unwrap();
                signature.to_der().as_bytes().to_vec()
            }
        }
    }

    /// What only this key makes of a message, as long as a signature.
    pub fn sum(&self, message: &[u8]) -> Vec<u8> {
        let mut state = 0xcbf2_9ce4_8422_2325_u64 ^ u64::from(self.id).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for byte in message {
            state = (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        state.to_be_bytes().repeat(8)
    }

    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let pair = EcdsaKeyPair::from_private_key_and_public_key(self.kind.signing, &self.scalar, &self.point);
        let random = aws_lc_rs::rand::SystemRandom::new();
        pair.unwrap().sign(&random, message).unwrap().as_ref().to_vec()
    }

    pub fn verifies(&self, message: &[u8], signature: &[u8], is_real: bool) -> bool {
        match is_real {
            true => UnparsedPublicKey::new(self.kind.verifying, &self.point).verify(message, signature).is_ok(),
            false => self.sum(message) == signature,
        }
    }
}
