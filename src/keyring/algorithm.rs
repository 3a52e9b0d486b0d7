//! The signature algorithms a keyset may use: asymmetric ones only, so `none` and HMAC cannot be expressed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A signature algorithm together with what is needed to make a key for it (RFC 7518 §3.1, RFC 8037 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "alg")]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256.
    #[serde(rename = "ES256")]
    Es256,
    /// ECDSA on P-384 with SHA-384.
    #[serde(rename = "ES384")]
    Es384,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    #[serde(rename = "RS256")]
    Rs256 { rsa_bits: RsaBits },
    /// RSASSA-PSS with SHA-256, MGF1-SHA-256 and a salt of 32 bytes.
    #[serde(rename = "PS256")]
    Ps256 { rsa_bits: RsaBits },
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    EdDsa { label: EdLabel },
}

/// RSA modulus sizes that new keys may have (RFC 7518 §3.3 asks for at least 2048).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum RsaBits {
    #[default]
    B2048,
    B3072,
    B4096,
}

/// What an Ed25519 key calls its algorithm: RFC 8037 says `EdDSA`, RFC 9864 says `Ed25519`; verifiers differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EdLabel {
    #[default]
    #[serde(rename = "EdDSA")]
    EdDsa,
    Ed25519,
}

/// How long a signature keeps a processor, which decides where it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SigningCost {
    /// Nothing notices.
    Microseconds,
    /// Some tenths of a millisecond: less than it takes to wait for a thread, too long to go before others.
    Tenths,
    /// Long enough that it must not run on an async thread.
    Milliseconds,
}

impl Algorithm {
    /// The value of `alg` in the JOSE header and the JWK.
    pub const fn alg(self) -> &'static str {
        match self {
            Algorithm::Es256 => "ES256",
            Algorithm::Es384 => "ES384",
            Algorithm::Rs256 { .. } => "RS256",
            Algorithm::Ps256 { .. } => "PS256",
            Algorithm::EdDsa { label: EdLabel::EdDsa } => "EdDSA",
            Algorithm::EdDsa { label: EdLabel::Ed25519 } => "Ed25519",
        }
    }

    /// Every `alg` a key of this daemon can carry: the closed set for metric labels.
    pub const ALL_ALGS: [&'static str; 6] = ["ES256", "ES384", "RS256", "PS256", "EdDSA", "Ed25519"];

    /// Length of a JOSE signature in bytes (ECDSA: r‖s, RFC 7518 §3.4).
    pub const fn signature_len(self) -> usize {
        match self {
            Algorithm::Es256 | Algorithm::EdDsa { .. } => 64,
            Algorithm::Es384 => 96,
            Algorithm::Rs256 { rsa_bits } | Algorithm::Ps256 { rsa_bits } => rsa_bits.bits() as usize / 8,
        }
    }

    pub const fn cost(self) -> SigningCost {
        match self {
            Algorithm::Es256 | Algorithm::Es384 | Algorithm::EdDsa { .. } => SigningCost::Microseconds,
            Algorithm::Rs256 { rsa_bits } | Algorithm::Ps256 { rsa_bits } => match rsa_bits {
                RsaBits::B2048 => SigningCost::Tenths,
                RsaBits::B3072 | RsaBits::B4096 => SigningCost::Milliseconds,
            },
        }
    }

    /// An upper bound in bytes of the entry in the published document of a key with a thumbprint as kid: one made here.
    pub const fn jwk_bytes(self) -> usize {
        match self {
            Algorithm::Es256 | Algorithm::EdDsa { .. } => 300,
            Algorithm::Es384 => 380,
            Algorithm::Rs256 { rsa_bits } | Algorithm::Ps256 { rsa_bits } => rsa_bits.bits() as usize / 8 * 4 / 3 + 240,
        }
    }
}

impl RsaBits {
    pub const fn bits(self) -> u32 {
        match self {
            RsaBits::B2048 => 2048,
            RsaBits::B3072 => 3072,
            RsaBits::B4096 => 4096,
        }
    }
}

impl TryFrom<u32> for RsaBits {
    type Error = String;
    fn try_from(bits: u32) -> Result<Self, String> {
        match bits {
            2048 => Ok(RsaBits::B2048),
            3072 => Ok(RsaBits::B3072),
            4096 => Ok(RsaBits::B4096),
            _ => Err(format!("{bits} is not an RSA key size of this daemon: use 2048, 3072 or 4096")),
        }
    }
}

impl From<RsaBits> for u32 {
    fn from(bits: RsaBits) -> u32 {
        bits.bits()
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.alg())
    }
}
