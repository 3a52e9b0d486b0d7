//! Signing with a key in AWS KMS.

use std::sync::Arc;

use async_trait::async_trait;
use aws_lc_rs::digest::{self, SHA256, SHA384};

use super::error::{failed, internal};
use crate::aws_kms::{KmsApi, LONGEST_RAW_MESSAGE, Message, Pace, SigningAlgorithm};
use crate::backend::{BackendError, RemoteSigner};
use crate::keyring::algorithm::Algorithm;

/// A key by its ARN, and how it signs.
pub(super) struct RemoteKey {
    api: Arc<dyn KmsApi>,
    arn: String,
    algorithm: Algorithm,
}

impl RemoteKey {
    pub(super) fn new(api: Arc<dyn KmsApi>, arn: &str, algorithm: Algorithm) -> Self {
        RemoteKey { api, arn: arn.to_owned(), algorithm }
    }

    /// Signs; `operation` is what it is done for, in errors. Hashed here, so that tokens of any size can be signed: the
    /// service takes messages of up to 4,096 bytes.
    pub(super) async fn sign_as(
        &self,
        operation: &'static str,
        message: &[u8],
        pace: Pace,
    ) -> Result<Vec<u8>, BackendError> {
        let (how, hash) = match self.algorithm {
            Algorithm::Es256 => (SigningAlgorithm::EcdsaSha256, Some(&SHA256)),
            Algorithm::Es384 => (SigningAlgorithm::EcdsaSha384, Some(&SHA384)),
            Algorithm::Rs256 { .. } => (SigningAlgorithm::RsassaPkcs1V15Sha256, Some(&SHA256)),
            Algorithm::Ps256 { .. } => (SigningAlgorithm::RsassaPssSha256, Some(&SHA256)),
            // Ed25519 signs messages, not digests (RFC 8032 §5.1; the pre-hashed variant is no JWS algorithm).
            Algorithm::EdDsa { .. } => (SigningAlgorithm::Ed25519Sha512, None),
        };
        let signed = match hash {
            Some(hash) => {
                let digest = digest::digest(hash, message);
                self.api.sign(&self.arn, Message::Digest(digest.as_ref()), how, pace).await
            }
            None => self.api.sign(&self.arn, Message::Raw(message), how, pace).await,
        };
        let signature = signed.map_err(|error| failed(operation, error))?;
        jose_form(self.algorithm, signature).map_err(|error| internal(operation, error))
    }
}

#[async_trait]
impl RemoteSigner for RemoteKey {
    fn longest_message(&self) -> Option<usize> {
        matches!(self.algorithm, Algorithm::EdDsa { .. }).then_some(LONGEST_RAW_MESSAGE)
    }

    async fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.sign_as("sign", message, Pace::Request).await
    }
}

/// ECDSA signatures come as DER and leave as r‖s of fixed length (RFC 7518 §3.4).
fn jose_form(algorithm: Algorithm, signature: Vec<u8>) -> Result<Vec<u8>, p256::ecdsa::Error> {
    match algorithm {
        Algorithm::Es256 => Ok(p256::ecdsa::Signature::from_der(&signature)?.to_bytes().to_vec()),
        Algorithm::Es384 => Ok(p384::ecdsa::Signature::from_der(&signature)?.to_bytes().to_vec()),
        Algorithm::Rs256 { .. } | Algorithm::Ps256 { .. } | Algorithm::EdDsa { .. } => Ok(signature),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// r = 1 and s = 2: DER drops what JOSE keeps.
    #[test]
    fn short_numbers_of_an_ecdsa_signature_are_filled_up() {
        let der = vec![0x30, 6, 2, 1, 1, 2, 1, 2];
        let jose = jose_form(Algorithm::Es256, der.clone()).unwrap();
        assert_eq!((jose.len(), jose[31], jose[63]), (64, 1, 2));
        let jose = jose_form(Algorithm::Es384, der.clone()).unwrap();
        assert_eq!((jose.len(), jose[47], jose[95]), (96, 1, 2));
        assert!(jose_form(Algorithm::Es256, der[..7].to_vec()).is_err());
    }
}
