//! What every seal is built from: AES-256-GCM under random nonces, HKDF-SHA256, both of aws-lc-rs, whose key
//! objects wipe themselves when dropped.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::hkdf;
use zeroize::Zeroizing;

/// Length of every secret key here, in bytes.
pub const SECRET_LEN: usize = 32;

const TAG_LEN: usize = 16;

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// HKDF-SHA256 (RFC 5869): one key per `purpose`, in the domain that `salt` names.
pub(crate) fn derive(secret: &[u8], salt: &str, purpose: &str) -> Zeroizing<[u8; SECRET_LEN]> {
    let mut key = Zeroizing::new([0; SECRET_LEN]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt.as_bytes())
        .extract(secret)
        .expand(&[purpose.as_bytes()], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key[..]))
        .expect("32 bytes are within what HKDF-SHA256 can give");
    key
}

/// AES-256-GCM with a random 96-bit nonce per message. Safe for 2³² messages per key (NIST SP 800-38D §8.3); a data
/// key seals one message per private key ever made, and a key-encryption key one per data key.
pub(crate) struct Cipher(RandomizedNonceKey);

/// What a cipher made: a nonce, and the ciphertext with its tag.
pub(crate) struct Sealed {
    pub nonce: [u8; NONCE_LEN],
    pub ciphertext: Vec<u8>,
}

/// The ciphertext is not one of this key and associated data.
#[derive(Debug)]
pub(crate) struct NotAuthentic;

impl Cipher {
    pub fn new(key: &[u8; SECRET_LEN]) -> Self {
        Cipher(RandomizedNonceKey::new(&AES_256_GCM, key).expect("32 bytes are an AES-256 key"))
    }

    pub fn seal(&self, associated_data: &[u8], plaintext: &[u8]) -> Sealed {
        // The buffer is encrypted in place and never grows, so no copy of the plaintext stays behind.
        let mut ciphertext = Vec::with_capacity(plaintext.len() + TAG_LEN);
        ciphertext.extend_from_slice(plaintext);
        let nonce = self
            .0
            .seal_in_place_append_tag(Aad::from(associated_data), &mut ciphertext)
            .expect("AES-GCM seals anything shorter than 64 GiB");
        Sealed { nonce: *nonce.as_ref(), ciphertext }
    }

    pub fn open(
        &self,
        associated_data: &[u8],
        nonce: [u8; NONCE_LEN],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, NotAuthentic> {
        let mut buffer = Zeroizing::new(ciphertext.to_vec());
        let length = self
            .0
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(associated_data), &mut buffer)
            .map_err(|_| NotAuthentic)?
            .len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(…)")
    }
}
