//! Private key material: made, validated, converted and read from what people have (PEM, JWK).
//!
//! The RustCrypto crates do all of this; the keys they hold are wiped when dropped. Signing for callers happens
//! elsewhere, in aws-lc.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use getrandom::SysRng;
use getrandom::rand_core::UnwrapErr;
use p256::elliptic_curve::Generate;
use p256::pkcs8::spki::SubjectPublicKeyInfoRef;
use p256::pkcs8::{EncodePrivateKey, ObjectIdentifier, PrivateKeyInfoRef};
use rsa::pkcs1::der::Decode;
use rsa::traits::{PrivateKeyParts, PublicKeyParts};
use serde::Deserialize;
use serde::de::IgnoredAny;
use zeroize::Zeroizing;

use crate::keyring::algorithm::Algorithm;
use crate::keyring::json::parse_strict;
use crate::keyring::jwk::{EcCurve, JwkError, ParsedJwk, PublicJwk, parse_jwks};

/// The longest input that an import reads, in bytes.
pub const MAX_IMPORT_BYTES: usize = 64 * 1024;

/// A private key whose halves belong together: every constructor derives the public half or checks it.
#[derive(Clone)]
pub struct PrivateKeyMaterial {
    secret: Secret,
    public: PublicJwk,
}

/// The private half, in types that wipe themselves.
#[derive(Clone)]
pub(super) enum Secret {
    P256(p256::SecretKey),
    P384(p384::SecretKey),
    Rsa(Box<rsa::RsaPrivateKey>),
    Ed25519(ed25519_dalek::SigningKey),
}

/// A private key someone brought, and what came with it.
#[derive(Clone, Debug)]
pub struct ImportedPrivate {
    /// The key itself.
    pub material: PrivateKeyMaterial,
    /// The parts of a JWK around the key; PEM has none.
    pub described: Option<ParsedJwk>,
}

impl PrivateKeyMaterial {
    /// Makes a new key from the operating system's randomness. RSA keys take from 50 ms (2048 bits) to seconds
    /// (4096 bits) of one processor: not on an async thread.
    ///
    /// # Errors
    /// [`MaterialError::Randomness`] and [`MaterialError::Generation`]; a repetition may succeed.
    pub fn generate(algorithm: Algorithm) -> Result<Self, MaterialError> {
        // The RSA generator panics where randomness fails, so find out first.
        getrandom::fill(&mut [0; 32]).map_err(|_| MaterialError::Randomness)?;
        let secret = match algorithm {
            Algorithm::Es256 => Secret::P256(
                p256::SecretKey::try_generate_from_rng(&mut SysRng).map_err(|_| MaterialError::Randomness)?,
            ),
            Algorithm::Es384 => Secret::P384(
                p384::SecretKey::try_generate_from_rng(&mut SysRng).map_err(|_| MaterialError::Randomness)?,
            ),
            Algorithm::Rs256 { rsa_bits } | Algorithm::Ps256 { rsa_bits } => Secret::Rsa(Box::new(
                rsa::RsaPrivateKey::new(&mut UnwrapErr(SysRng), rsa_bits.bits() as usize)
                    .map_err(|_| MaterialError::Generation)?,
            )),
            Algorithm::EdDsa { .. } => {
                let mut seed = Zeroizing::new([0; 32]);
                getrandom::fill(&mut *seed).map_err(|_| MaterialError::Randomness)?;
                Secret::Ed25519(ed25519_dalek::SigningKey::from_bytes(&seed))
            }
        };
        Self::of(secret).map_err(|_| MaterialError::Generation)
    }

    /// Reads a private key: one PEM block of PKCS#8 (`PRIVATE KEY`), SEC 1 (`EC PRIVATE KEY`) or PKCS#1
    /// (`RSA PRIVATE KEY`), or one JWK.
    ///
    /// # Errors
    /// Everything else, and keys that are weak, unsupported or inconsistent. No message quotes the input.
    pub fn import(input: &[u8]) -> Result<ImportedPrivate, MaterialError> {
        match Format::of(input)? {
            Format::Json(text) => private_jwk(text),
            Format::Pem(text) => {
                let block = PemBlock::read(text)?;
                let material = match block.label.as_str() {
                    "PRIVATE KEY" => Self::from_pkcs8_der(&block.der)?,
                    "EC PRIVATE KEY" => Self::from_sec1_der(&block.der)?,
                    "RSA PRIVATE KEY" => Self::from_pkcs1_der(&block.der)?,
                    _ => return Err(unexpected_label(&block.label, "a private key")),
                };
                Ok(ImportedPrivate { material, described: None })
            }
        }
    }

    /// Reads a PKCS#8 document (RFC 5208, RFC 5958): our own, or an imported one.
    ///
    /// # Errors
    /// Malformed documents, unsupported algorithms, keys whose parts do not belong together.
    pub fn from_pkcs8_der(der: &[u8]) -> Result<Self, MaterialError> {
        let info = PrivateKeyInfoRef::try_from(der).map_err(|_| MaterialError::Malformed { what: "PKCS#8" })?;
        let inconsistent = MaterialError::Inconsistent { what: PAIR_MISMATCH };
        let secret = match key_kind(info.algorithm.oid, info.algorithm.parameters_oid().ok())? {
            KeyKind::Ec(EcCurve::P256) => {
                Secret::P256(p256::SecretKey::try_from(info.clone()).map_err(|_| inconsistent)?)
            }
            KeyKind::Ec(EcCurve::P384) => {
                Secret::P384(p384::SecretKey::try_from(info.clone()).map_err(|_| inconsistent)?)
            }
            KeyKind::Ed25519 => {
                Secret::Ed25519(ed25519_dalek::SigningKey::try_from(info.clone()).map_err(|_| inconsistent)?)
            }
            KeyKind::Rsa => return Self::from_pkcs1_der(info.private_key.as_bytes()),
        };
        let material = Self::of(secret)?;
        match info.public_key.and_then(|public| public.as_bytes().map(<[u8]>::to_vec)) {
            Some(stated) if material.raw_public().is_some_and(|derived| derived != stated) => {
                Err(MaterialError::Inconsistent { what: PAIR_MISMATCH })
            }
            _ => Ok(material),
        }
    }

    /// The key as a PKCS#8 document.
    ///
    /// # Errors
    /// [`MaterialError::Encoding`], which no key of this type can cause.
    pub fn to_pkcs8_der(&self) -> Result<Zeroizing<Vec<u8>>, MaterialError> {
        let document = match &self.secret {
            Secret::P256(key) => key.to_pkcs8_der(),
            Secret::P384(key) => key.to_pkcs8_der(),
            Secret::Rsa(key) => key.to_pkcs8_der(),
            Secret::Ed25519(key) => key.to_pkcs8_der(),
        };
        Ok(document.map_err(|_| MaterialError::Encoding)?.to_bytes())
    }

    /// The public half.
    pub fn public(&self) -> &PublicJwk {
        &self.public
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    fn of(secret: Secret) -> Result<Self, MaterialError> {
        let ec = |crv: EcCurve, point: &[u8]| {
            let (x, y) = point.get(1..).unwrap_or_default().split_at_checked(crv.coordinate_len()).unwrap_or_default();
            PublicJwk::ec(crv, x, y)
        };
        let public = match &secret {
            Secret::P256(key) => ec(EcCurve::P256, &key.public_key().to_sec1_bytes()),
            Secret::P384(key) => ec(EcCurve::P384, &key.public_key().to_sec1_bytes()),
            Secret::Rsa(key) => PublicJwk::rsa(&key.n_bytes(), &key.e_bytes()),
            Secret::Ed25519(key) => PublicJwk::ed25519(key.verifying_key().as_bytes()),
        };
        Ok(PrivateKeyMaterial { public: public?, secret })
    }

    /// The public key as PKCS#8 version 2 states it beside the private one.
    fn raw_public(&self) -> Option<Vec<u8>> {
        match &self.secret {
            Secret::P256(key) => Some(key.public_key().to_sec1_bytes().into()),
            Secret::P384(key) => Some(key.public_key().to_sec1_bytes().into()),
            Secret::Ed25519(key) => Some(key.verifying_key().as_bytes().to_vec()),
            Secret::Rsa(_) => None,
        }
    }

    fn from_sec1_der(der: &[u8]) -> Result<Self, MaterialError> {
        // The curve may be left out of the document, so the length of the scalar decides; a stated curve or public
        // point that says otherwise fails.
        if let Ok(key) = p256::SecretKey::from_sec1_der(der) {
            return Self::of(Secret::P256(key));
        }
        if let Ok(key) = p384::SecretKey::from_sec1_der(der) {
            return Self::of(Secret::P384(key));
        }
        match UNSUPPORTED_CURVES.into_iter().find(|(_, oid)| der.windows(oid.len()).any(|window| window == *oid)) {
            Some((name, _)) => Err(MaterialError::UnsupportedCurve { name: name.to_owned() }),
            None => Err(MaterialError::Inconsistent {
                what: "it is no P-256 or P-384 key in SEC 1 form with a named curve and a matching public point",
            }),
        }
    }

    fn from_pkcs1_der(der: &[u8]) -> Result<Self, MaterialError> {
        let key =
            rsa::pkcs1::RsaPrivateKeyRef::from_der(der).map_err(|_| MaterialError::Malformed { what: "PKCS#1" })?;
        if key.other_prime_infos.is_some() {
            return Err(MaterialError::MultiPrime);
        }
        Self::from_rsa_parts(&RsaParts {
            n: key.modulus.as_bytes(),
            e: key.public_exponent.as_bytes(),
            d: key.private_exponent.as_bytes(),
            p: key.prime1.as_bytes(),
            q: key.prime2.as_bytes(),
            dp: key.exponent1.as_bytes(),
            dq: key.exponent2.as_bytes(),
            qi: key.coefficient.as_bytes(),
        })
    }

    fn from_rsa_parts(parts: &RsaParts<'_>) -> Result<Self, MaterialError> {
        // Checks the sizes, which bound everything below.
        PublicJwk::rsa(parts.n, parts.e)?;
        let number = |bytes: &[u8]| {
            rsa::BoxedUint::from_be_slice(bytes, parts.bits())
                .map_err(|_| MaterialError::Inconsistent { what: "a private value is longer than the modulus" })
        };
        let (n, e) = (number(parts.n)?, number(parts.e)?);
        let primes = vec![number(parts.p)?, number(parts.q)?];
        let key = rsa::RsaPrivateKey::from_components(n, e, number(parts.d)?, primes).map_err(|_| {
            MaterialError::Inconsistent {
                what: "n is not p·q with factors of half its length, or d does not belong to e",
            }
        })?;
        // The crate recomputes these three and forgets what the input said; a wrong one means a damaged key.
        let (dp, dq, qi) = (number(parts.dp)?, number(parts.dq)?, number(parts.qi)?);
        if key.dp() != Some(&dp) || key.dq() != Some(&dq) || key.crt_coefficient() != Some(qi) {
            return Err(MaterialError::Inconsistent { what: "dp, dq or qi does not belong to p, q and d" });
        }
        if parts.primes_are_close() {
            return Err(MaterialError::ClosePrimes);
        }
        Self::of(Secret::Rsa(Box::new(key)))
    }
}

impl fmt::Debug for PrivateKeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKeyMaterial").field("public", &self.public).finish_non_exhaustive()
    }
}

/// Reads public keys: one PEM block of SPKI (`PUBLIC KEY`) or PKCS#1 (`RSA PUBLIC KEY`), one JWK, or a JWK Set, all of
/// whose keys must be usable. To skip those that are not, use [`parse_jwks`].
///
/// # Errors
/// Everything else, private keys too, and keys that are weak or unsupported.
pub fn import_public(input: &[u8]) -> Result<Vec<ParsedJwk>, MaterialError> {
    match Format::of(input)? {
        Format::Json(text) => {
            let value = parse_strict(text).map_err(|error| MaterialError::Json { problem: error.to_string() })?;
            if value.get("keys").is_none() {
                return Ok(vec![PublicJwk::from_jwk_json(&value)?]);
            }
            let keys = parse_jwks(&value)?.into_iter().enumerate();
            keys.map(|(index, key)| key.map_err(|source| MaterialError::KeyOfSet { position: index + 1, source }))
                .collect()
        }
        Format::Pem(text) => {
            let block = PemBlock::read(text)?;
            let public = match block.label.as_str() {
                "PUBLIC KEY" => public_from_spki(&block.der)?,
                "RSA PUBLIC KEY" => public_from_pkcs1(&block.der)?,
                _ => return Err(unexpected_label(&block.label, "a public key")),
            };
            Ok(vec![ParsedJwk { public, kid: None, algorithm: None }])
        }
    }
}

/// Why key material was not made or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MaterialError {
    #[error("the operating system gives no randomness: try again once it does")]
    Randomness,
    #[error("making a key failed: try again")]
    Generation,
    #[error("the key could not be encoded as PKCS#8")]
    Encoding,
    #[error("the key is longer than {MAX_IMPORT_BYTES} bytes: import one key at a time")]
    TooLong,
    #[error(
        "this is neither PEM nor a JWK: give a file that begins with -----BEGIN or {{ (DER: `openssl pkey -inform DER` \
         converts it)"
    )]
    UnknownFormat,
    #[error("the PEM is damaged: {problem}")]
    Pem { problem: &'static str },
    #[error("the file holds {count} PEM blocks ({labels}): keep only the one of the key to import")]
    SeveralBlocks { count: usize, labels: String },
    #[error("the private key is encrypted: decrypt it first with `openssl pkey -in KEY -out PLAIN`")]
    Encrypted,
    #[error("the PEM block is {label:?}, not {wanted}: {advice}")]
    UnexpectedLabel { label: String, wanted: &'static str, advice: &'static str },
    #[error("the key's algorithm is {name}, which is not supported: use EC (P-256, P-384), RSA or Ed25519")]
    UnsupportedAlgorithm { name: String },
    #[error("the key's curve is {name}, which is not supported: use P-256, P-384 or Ed25519")]
    UnsupportedCurve { name: String },
    #[error("the RSA key has more than two primes, which is not supported: make a new key")]
    MultiPrime,
    #[error("the RSA key's primes are so close that it can be factored: make a new key")]
    ClosePrimes,
    #[error("the key is damaged: it cannot be read as {what}; export it again")]
    Malformed { what: &'static str },
    #[error("the key's parts do not belong together: {what}; export it again")]
    Inconsistent { what: &'static str },
    #[error("the JWK cannot be read: {problem}")]
    Json { problem: String },
    #[error("the JWK is public: import it as a public-only key, or give the private one")]
    PublicJwk,
    #[error("this is a JWK Set: import its private keys one at a time")]
    SetOfPrivateKeys,
    #[error("the private member \"{member}\" of the JWK {problem}")]
    PrivateMember { member: &'static str, problem: &'static str },
    #[error("key {position} of the JWK Set cannot be used: {source}")]
    KeyOfSet { position: usize, source: JwkError },
    #[error(transparent)]
    Jwk(#[from] JwkError),
}

const PAIR_MISMATCH: &str = "the private value is no valid one, or does not belong to the public point";

enum Format<'a> {
    Pem(&'a str),
    Json(&'a [u8]),
}

impl<'a> Format<'a> {
    fn of(input: &'a [u8]) -> Result<Self, MaterialError> {
        if input.len() > MAX_IMPORT_BYTES {
            return Err(MaterialError::TooLong);
        }
        let text = std::str::from_utf8(input).map_err(|_| MaterialError::UnknownFormat)?.trim();
        if text.starts_with('{') {
            Ok(Format::Json(text.as_bytes()))
        } else if text.contains(PEM_BEGIN) {
            Ok(Format::Pem(text))
        } else {
            Err(MaterialError::UnknownFormat)
        }
    }
}

const PEM_BEGIN: &str = "-----BEGIN ";
const PEM_END: &str = "-----END ";
const PEM_DASHES: &str = "-----";

/// The one block of a PEM file (RFC 7468), decoded.
struct PemBlock {
    label: String,
    der: Zeroizing<Vec<u8>>,
}

impl PemBlock {
    fn read(text: &str) -> Result<Self, MaterialError> {
        let damaged = |problem| MaterialError::Pem { problem };
        let labels: Vec<_> = text.split(PEM_BEGIN).skip(1).map(label_of).collect();
        let [label] = labels[..] else {
            let shown = labels.iter().take(4).map(|label| label.chars().take(32).collect::<String>());
            let labels_text = shown.collect::<Vec<_>>().join(", ").escape_debug().to_string();
            return Err(MaterialError::SeveralBlocks { count: labels.len(), labels: labels_text });
        };
        let rest =
            text.strip_prefix(PEM_BEGIN).ok_or(damaged("there is text before the line -----BEGIN …; remove it"))?;
        let body = rest
            .strip_prefix(label)
            .and_then(|rest| rest.strip_prefix(PEM_DASHES))
            .ok_or(damaged("the line -----BEGIN … is incomplete"))?;
        let (body, end) = body.split_once(PEM_END).ok_or(damaged("the line -----END … is missing"))?;
        if end != format!("{label}{PEM_DASHES}") {
            return Err(damaged("the line -----END … does not match -----BEGIN …, or text follows it; remove it"));
        }
        if label == "ENCRYPTED PRIVATE KEY" || body.contains("Proc-Type:") {
            return Err(MaterialError::Encrypted);
        }
        // Reserved in one piece, so that growing leaves no copies behind.
        let mut base64 = Zeroizing::new(String::with_capacity(body.len()));
        base64.extend(body.chars().filter(|c| !c.is_ascii_whitespace()));
        let der = STANDARD.decode(base64.as_bytes()).map_err(|_| damaged("its content is not base64"))?;
        Ok(PemBlock { label: label.to_owned(), der: Zeroizing::new(der) })
    }
}

/// Capitals, digits and spaces, as every label here and elsewhere has them. Where the line is damaged, what follows may
/// be the key, and labels stand in messages.
fn label_of(rest: &str) -> &str {
    let end = rest.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == ' '));
    &rest[..end.unwrap_or(rest.len())]
}

fn unexpected_label(label: &str, wanted: &'static str) -> MaterialError {
    let advice = match label {
        "CERTIFICATE" => "`openssl x509 -in CERT -pubkey -noout` prints its public key",
        "OPENSSH PRIVATE KEY" => "`ssh-keygen -p -m PKCS8 -f KEY` converts it",
        "EC PARAMETERS" => "keep only the block EC PRIVATE KEY",
        "PUBLIC KEY" | "RSA PUBLIC KEY" => "import it as a public-only key, or give the private one",
        "PRIVATE KEY" | "RSA PRIVATE KEY" | "EC PRIVATE KEY" => {
            "import it as a private key, or let `openssl pkey -in KEY -pubout` print the public one"
        }
        _ => "`openssl pkey -in KEY` converts what OpenSSL knows",
    };
    MaterialError::UnexpectedLabel { label: label.chars().take(64).collect(), wanted, advice }
}

enum KeyKind {
    Ec(EcCurve),
    Rsa,
    Ed25519,
}

const ID_EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const ID_P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const ID_P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const ID_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ID_RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const ID_ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// Curves people come with, as DER object identifiers, to name them in a refusal.
const UNSUPPORTED_CURVES: [(&str, &[u8]); 4] = [
    ("P-521", &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23]),
    ("secp256k1", &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x0a]),
    ("P-224", &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x21]),
    ("brainpool", &[0x06, 0x09, 0x2b, 0x24, 0x03, 0x03, 0x02, 0x08, 0x01, 0x01]),
];

fn key_kind(algorithm: ObjectIdentifier, parameters: Option<ObjectIdentifier>) -> Result<KeyKind, MaterialError> {
    match algorithm {
        ID_RSA | ID_RSA_PSS => Ok(KeyKind::Rsa),
        ID_ED25519 => Ok(KeyKind::Ed25519),
        ID_EC_PUBLIC_KEY => match parameters {
            Some(ID_P256) => Ok(KeyKind::Ec(EcCurve::P256)),
            Some(ID_P384) => Ok(KeyKind::Ec(EcCurve::P384)),
            Some(other) => Err(MaterialError::UnsupportedCurve { name: oid_name(other) }),
            None => Err(MaterialError::UnsupportedCurve { name: "given by explicit parameters".into() }),
        },
        other => Err(MaterialError::UnsupportedAlgorithm { name: oid_name(other) }),
    }
}

fn oid_name(oid: ObjectIdentifier) -> String {
    let dotted = oid.to_string();
    match dotted.as_str() {
        "1.3.132.0.35" => "P-521".into(),
        "1.3.132.0.33" => "P-224".into(),
        "1.3.132.0.10" => "secp256k1".into(),
        "1.3.101.110" => "X25519".into(),
        "1.3.101.113" => "Ed448".into(),
        "1.2.840.10040.4.1" => "DSA".into(),
        _ => dotted,
    }
}

pub(super) fn public_from_spki(der: &[u8]) -> Result<PublicJwk, MaterialError> {
    let malformed = MaterialError::Malformed { what: "SubjectPublicKeyInfo" };
    let info = SubjectPublicKeyInfoRef::try_from(der).map_err(|_| malformed.clone())?;
    let key = info.subject_public_key.as_bytes().ok_or(malformed)?;
    match key_kind(info.algorithm.oid, info.algorithm.parameters_oid().ok())? {
        KeyKind::Ec(crv) => {
            // Takes compressed points too.
            let off_curve = JwkError::OffCurve { crv: crv.name() };
            let point = match crv {
                EcCurve::P256 => p256::PublicKey::from_sec1_bytes(key).map(|key| key.to_sec1_bytes()),
                EcCurve::P384 => p384::PublicKey::from_sec1_bytes(key).map(|key| key.to_sec1_bytes()),
            };
            let point = point.map_err(|_| off_curve.clone())?;
            let coordinates = point.get(1..).and_then(|point| point.split_at_checked(crv.coordinate_len()));
            let (x, y) = coordinates.ok_or(off_curve)?;
            Ok(PublicJwk::ec(crv, x, y)?)
        }
        KeyKind::Rsa => public_from_pkcs1(key),
        KeyKind::Ed25519 => Ok(PublicJwk::ed25519(key)?),
    }
}

fn public_from_pkcs1(der: &[u8]) -> Result<PublicJwk, MaterialError> {
    let key = rsa::pkcs1::RsaPublicKeyRef::from_der(der).map_err(|_| MaterialError::Malformed { what: "PKCS#1" })?;
    Ok(PublicJwk::rsa(key.modulus.as_bytes(), key.public_exponent.as_bytes())?)
}

/// The members of a two-prime RSA key (RFC 8017 §3.2), big-endian.
struct RsaParts<'a> {
    n: &'a [u8],
    e: &'a [u8],
    d: &'a [u8],
    p: &'a [u8],
    q: &'a [u8],
    dp: &'a [u8],
    dq: &'a [u8],
    qi: &'a [u8],
}

impl RsaParts<'_> {
    fn bits(&self) -> u32 {
        u32::try_from(self.n.len()).unwrap_or(u32::MAX).saturating_mul(8)
    }

    /// FIPS 186-5 §A.1.1: p and q differ within their first 100 bits (96 here), or Fermat's method finds them.
    fn primes_are_close(&self) -> bool {
        let leading = |prime: &[u8]| {
            let zeros = prime.iter().take_while(|&&byte| byte == 0).count();
            (prime.len() - zeros, prime.iter().skip(zeros).take(12).copied().collect::<Vec<u8>>())
        };
        leading(self.p) == leading(self.q)
    }
}

/// A private JWK (RFC 7518 §6), its secrets in strings that wipe themselves. Repeated members fail to parse.
#[derive(Deserialize)]
struct PrivateJwk {
    kty: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
    n: Option<String>,
    e: Option<String>,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    key_ops: Option<Vec<String>>,
    d: Option<SecretText>,
    oth: Option<IgnoredAny>,
    keys: Option<IgnoredAny>,
}

struct SecretText(Zeroizing<String>);

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| SecretText(Zeroizing::new(text)))
    }
}

impl PrivateJwk {
    fn read(text: &[u8]) -> Result<Self, MaterialError> {
        // The parser's own message may quote a value, which may be the secret.
        serde_json::from_slice(text).map_err(|error| MaterialError::Json {
            problem: format!(
                "at line {}, column {} it is no JSON, or a member has the wrong type or stands twice",
                error.line(),
                error.column()
            ),
        })
    }

    /// The public half, validated as every public JWK is.
    fn described(&self) -> Result<ParsedJwk, MaterialError> {
        let members = [
            ("kty", &self.kty),
            ("crv", &self.crv),
            ("x", &self.x),
            ("y", &self.y),
            ("n", &self.n),
            ("e", &self.e),
            ("kid", &self.kid),
            ("alg", &self.alg),
            ("use", &self.usage),
        ];
        let object = members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?.into())));
        Ok(PublicJwk::from_jwk_json(&serde_json::Value::Object(object.collect()))?)
    }

    fn decoded_d(&self, len: usize) -> Result<Zeroizing<Vec<u8>>, MaterialError> {
        let text = self.d.as_ref().ok_or(MaterialError::PublicJwk)?;
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(text.0.as_bytes()).map_err(|_| {
            MaterialError::PrivateMember { member: "d", problem: "is not canonical base64url without padding" }
        })?);
        if bytes.len() != len {
            return Err(MaterialError::PrivateMember { member: "d", problem: "has not the length its curve demands" });
        }
        Ok(bytes)
    }
}

fn private_jwk(text: &[u8]) -> Result<ImportedPrivate, MaterialError> {
    let jwk = PrivateJwk::read(text)?;
    if jwk.keys.is_some() {
        return Err(MaterialError::SetOfPrivateKeys);
    }
    if jwk.oth.is_some() {
        return Err(MaterialError::MultiPrime);
    }
    let described = jwk.described()?;
    if jwk.key_ops.as_ref().is_some_and(|operations| !operations.iter().any(|operation| operation == "sign")) {
        return Err(JwkError::KeyOps { operation: "sign" }.into());
    }
    if jwk.d.is_none() {
        return Err(MaterialError::PublicJwk);
    }
    let wrong_scalar = MaterialError::PrivateMember { member: "d", problem: "is no valid private value" };
    let material = match &described.public {
        PublicJwk::Ec { crv: EcCurve::P256, .. } | PublicJwk::Rsa { .. } => from_library(text)?,
        PublicJwk::Ec { crv: EcCurve::P384, .. } => {
            let d = jwk.decoded_d(EcCurve::P384.coordinate_len())?;
            PrivateKeyMaterial::of(Secret::P384(p384::SecretKey::from_slice(&d).map_err(|_| wrong_scalar)?))?
        }
        PublicJwk::Okp { .. } => {
            let d = jwk.decoded_d(32)?;
            let seed: &[u8; 32] = d.as_slice().try_into().map_err(|_| wrong_scalar)?;
            PrivateKeyMaterial::of(Secret::Ed25519(ed25519_dalek::SigningKey::from_bytes(seed)))?
        }
    };
    if material.public != described.public {
        return Err(MaterialError::Inconsistent { what: "\"d\" does not belong to the public members" });
    }
    Ok(ImportedPrivate { material, described: Some(described) })
}

/// P-256 and RSA keys through the jsonwebkey crate. It takes malformed private members for absent ones and checks
/// nothing against anything, so its key is rebuilt part by part; the public half was validated before.
fn from_library(text: &[u8]) -> Result<PrivateKeyMaterial, MaterialError> {
    // Its message may quote the secret.
    let key: jsonwebkey::Key = serde_json::from_slice(text).map_err(|_| MaterialError::PrivateMember {
        member: "d",
        problem: "is malformed: use canonical base64url of the length its curve demands",
    })?;
    match &key {
        jsonwebkey::Key::EC { d: Some(d), .. } => {
            let scalar = p256::SecretKey::from_slice(d)
                .map_err(|_| MaterialError::PrivateMember { member: "d", problem: "is no valid private value" })?;
            PrivateKeyMaterial::of(Secret::P256(scalar))
        }
        jsonwebkey::Key::RSA { public, private: Some(private) } => {
            let parts = (&private.p, &private.q, &private.dp, &private.dq, &private.qi);
            let (Some(p), Some(q), Some(dp), Some(dq), Some(qi)) = parts else {
                return Err(MaterialError::PrivateMember {
                    member: "p, q, dp, dq, qi",
                    problem: "is incomplete: export the key with all five",
                });
            };
            PrivateKeyMaterial::from_rsa_parts(&RsaParts {
                n: &public.n,
                e: &[1, 0, 1],
                d: &private.d,
                p,
                q,
                dp,
                dq,
                qi,
            })
        }
        _ => Err(MaterialError::PrivateMember {
            member: "d, p, q, dp, dq or qi",
            problem: "is malformed: use canonical base64url strings",
        }),
    }
}
