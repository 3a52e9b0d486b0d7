//! Keys that cost nothing: real points on the curve, made once, and signatures that a sum proves. Where a history signs
//! remotely the signatures are real too, since the engine verifies them.

use std::sync::{Arc, LazyLock};

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jwksd::keyring::jwk::{EcCurve, Kid, PublicJwk};

/// Keys that one history may have; none has nearly as many.
pub const POOL: usize = 1024;

/// Number of a key in the pool: in a history every key has another one.
pub type KeyId = u16;

pub struct Pair {
    pub id: KeyId,
    pub kid: Kid,
    pub public: PublicJwk,
    scalar: [u8; 32],
    point: Vec<u8>,
    /// The members `x` and `y`.
    pub coordinates: (String, String),
}

static PAIRS: LazyLock<Vec<Arc<Pair>>> =
    LazyLock::new(|| (0..POOL).map(|number| Arc::new(Pair::new(number))).collect());

pub fn pair(id: KeyId) -> &'static Arc<Pair> {
    &PAIRS[usize::from(id)]
}

/// Which key of the pool a verifier reads in a document.
pub fn id_of(kid: &str) -> Option<KeyId> {
    static BY_KID: LazyLock<std::collections::HashMap<String, KeyId>> =
        LazyLock::new(|| PAIRS.iter().map(|pair| (pair.kid.to_string(), pair.id)).collect());
    BY_KID.get(kid).copied()
}

impl Pair {
    fn new(number: usize) -> Pair {
        let mut scalar = [0x5a; 32];
        scalar[24..].copy_from_slice(&(number as u64 + 1).to_be_bytes());
        let secret = p256::SecretKey::from_slice(&scalar).unwrap();
        let point = secret.public_key().to_sec1_bytes().to_vec();
        let (x, y) = point[1..].split_at(32);
        let public = PublicJwk::ec(EcCurve::P256, x, y).unwrap();
        let coordinates = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        Pair { id: KeyId::try_from(number).unwrap(), kid: public.thumbprint(), public, scalar, point, coordinates }
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
        let pair =
            EcdsaKeyPair::from_private_key_and_public_key(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.scalar, &self.point);
        let random = aws_lc_rs::rand::SystemRandom::new();
        pair.unwrap().sign(&random, message).unwrap().as_ref().to_vec()
    }

    pub fn verifies(&self, message: &[u8], signature: &[u8], is_real: bool) -> bool {
        match is_real {
            true => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.point).verify(message, signature).is_ok(),
            false => self.sum(message) == signature,
        }
    }
}
