//! Verifying signatures with aws-lc: those of remote backends before they leave, and those `jwksd verify` is shown.

use aws_lc_rs::signature::{self, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents, VerificationAlgorithm};

use crate::keyring::algorithm::Algorithm;
use crate::keyring::jwk::{PublicBytes, PublicJwk};

/// A public key prepared for one algorithm: parsed once, used for every signature, from any thread.
#[derive(Clone)]
pub struct Verifier {
    algorithm: Algorithm,
    key: ParsedPublicKey,
}

impl Verifier {
    /// # Errors
    /// [`VerifyError::Key`] when the key cannot serve the algorithm or is no valid key.
    pub fn new(algorithm: Algorithm, public: &PublicJwk) -> Result<Self, VerifyError> {
        let refused = VerifyError::Key { alg: algorithm.alg() };
        if !public.fits(algorithm) {
            return Err(refused);
        }
        let key = match public.to_bytes() {
            Ok(PublicBytes::Ec { point, .. }) => ParsedPublicKey::new(point_verification(algorithm), point).ok(),
            Ok(PublicBytes::Ed25519(point)) => ParsedPublicKey::new(point_verification(algorithm), point).ok(),
            Ok(PublicBytes::Rsa { n, e }) => {
                RsaPublicKeyComponents { n, e }.to_parsed_public_key(rsa_verification(algorithm)).ok()
            }
            Err(_) => None,
        };
        key.map(|key| Verifier { algorithm, key }).ok_or(refused)
    }

    /// Whether `signature` is the key's signature of `message`, in the JOSE form (RFC 7518 §3: ECDSA as r‖s of fixed
    /// length). Takes 50 to 200 µs.
    ///
    /// # Errors
    /// [`VerifyError::Signature`].
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<(), VerifyError> {
        let refused = VerifyError::Signature { alg: self.algorithm.alg() };
        // Known beforehand for every algorithm here, so no encoding of another length can slip through.
        if signature.len() != self.algorithm.signature_len() {
            return Err(refused);
        }
        self.key.verify_sig(message, signature).map_err(|_| refused)
    }

    /// The algorithm it was prepared for.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// As [`Verifier::verify`], for a key that is used once.
///
/// # Errors
/// As [`Verifier::new`] and [`Verifier::verify`].
pub fn verify(algorithm: Algorithm, public: &PublicJwk, message: &[u8], signature: &[u8]) -> Result<(), VerifyError> {
    Verifier::new(algorithm, public)?.verify(message, signature)
}

/// Why a signature was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    #[error("the key cannot verify {alg} signatures: it is of another type or size, or damaged")]
    Key { alg: &'static str },
    #[error("the {alg} signature is not one of this key over this message")]
    Signature { alg: &'static str },
}

fn point_verification(algorithm: Algorithm) -> &'static dyn VerificationAlgorithm {
    match algorithm {
        Algorithm::Es384 => &signature::ECDSA_P384_SHA384_FIXED,
        Algorithm::EdDsa { .. } => &signature::ED25519,
        // RSA keys do not come here: `fits` has tied the key's type to the algorithm.
        Algorithm::Es256 | Algorithm::Rs256 { .. } | Algorithm::Ps256 { .. } => &signature::ECDSA_P256_SHA256_FIXED,
    }
}

fn rsa_verification(algorithm: Algorithm) -> &'static RsaParameters {
    match algorithm {
        // The salt has the length of the hash, as RFC 7518 §3.5 demands; other lengths fail.
        Algorithm::Ps256 { .. } => &signature::RSA_PSS_2048_8192_SHA256,
        _ => &signature::RSA_PKCS1_2048_8192_SHA256,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::algorithm::RsaBits;
    use crate::keyring::jwk::EcCurve;

    #[test]
    fn a_key_verifies_only_the_algorithms_it_fits() {
        let generator = p256::SecretKey::from_slice(&[1; 32]).unwrap().public_key().to_sec1_bytes();
        let public = PublicJwk::ec(EcCurve::P256, &generator[1..33], &generator[33..]).unwrap();
        assert!(Verifier::new(Algorithm::Es256, &public).is_ok());
        for algorithm in [Algorithm::Es384, Algorithm::Rs256 { rsa_bits: RsaBits::B2048 }] {
            assert!(matches!(Verifier::new(algorithm, &public), Err(VerifyError::Key { .. })));
        }
    }

    #[test]
    fn a_damaged_key_is_refused_not_trusted() {
        let public = PublicJwk::Ec { crv: EcCurve::P256, x: "AA".into(), y: "!".into() };
        assert!(matches!(Verifier::new(Algorithm::Es256, &public), Err(VerifyError::Key { .. })));
        let off_curve = PublicJwk::Ec { crv: EcCurve::P256, x: "A".repeat(43), y: "A".repeat(43) };
        assert!(matches!(Verifier::new(Algorithm::Es256, &off_curve), Err(VerifyError::Key { .. })));
    }

    #[test]
    fn signatures_of_other_lengths_are_refused() {
        let public = PublicJwk::ed25519(ed25519_dalek::SigningKey::from_bytes(&[7; 32]).verifying_key().as_bytes());
        let verifier = Verifier::new(Algorithm::EdDsa { label: Default::default() }, &public.unwrap()).unwrap();
        for len in [0, 63, 65, 4096] {
            assert!(verifier.verify(b"", &vec![0; len]).is_err());
        }
    }
}
