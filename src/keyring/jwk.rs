//! Public keys as JWKs (RFC 7517), their thumbprints (RFC 7638) and the published document.
//!
//! The type has no private fields, so no private member can reach an output.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::algorithm::{Algorithm, EdLabel, RsaBits};

/// A key ID: for created keys the RFC 7638 SHA-256 thumbprint in base64url; imported keys may keep another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Kid(pub Arc<str>);

impl Kid {
    /// Longest kid an imported key may keep, in bytes.
    pub const MAX_BYTES: usize = 256;

    /// A kid that an imported key brought along: 1 to 256 bytes of printable ASCII. It ends up in headers of tokens,
    /// in paths and in logs, so control characters and look-alikes stay out.
    pub fn parse(text: &str) -> Result<Self, KidError> {
        if text.is_empty() || text.len() > Kid::MAX_BYTES || !text.bytes().all(|b| (0x20..=0x7e).contains(&b)) {
            return Err(KidError { text: shown(text) });
        }
        Ok(Kid(text.into()))
    }

    /// As it stands in headers and in the published document.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Kid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that cannot be a kid here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text} cannot be a kid: use 1 to 256 printable ASCII characters, or leave it out to get the thumbprint")]
pub struct KidError {
    text: String,
}

/// The public members of a key, as base64url strings without padding (RFC 7518 §6, RFC 8037 §2). Minimal and
/// canonical: constructors refuse anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kty")]
pub enum PublicJwk {
    #[serde(rename = "EC")]
    Ec { crv: EcCurve, x: String, y: String },
    #[serde(rename = "RSA")]
    Rsa { n: String, e: String },
    #[serde(rename = "OKP")]
    Okp { crv: OkpCurve, x: String },
}

/// The elliptic curves of ECDSA keys (RFC 7518 §6.2.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EcCurve {
    #[serde(rename = "P-256")]
    P256,
    #[serde(rename = "P-384")]
    P384,
}

impl EcCurve {
    /// Length of one coordinate, and of the private scalar, in bytes (RFC 7518 §6.2.1.2).
    pub const fn coordinate_len(self) -> usize {
        match self {
            EcCurve::P256 => 32,
            EcCurve::P384 => 48,
        }
    }

    /// The value of `crv`.
    pub const fn name(self) -> &'static str {
        match self {
            EcCurve::P256 => "P-256",
            EcCurve::P384 => "P-384",
        }
    }
}

/// The curve of EdDSA keys (RFC 8037 §2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OkpCurve {
    Ed25519,
}

/// A JWK as someone else wrote it, after validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedJwk {
    /// Its public members, canonical.
    pub public: PublicJwk,
    /// Its `kid`, where it has one.
    pub kid: Option<Kid>,
    /// What its `alg` says, where it has one; it fits the key.
    pub algorithm: Option<Algorithm>,
}

impl ParsedJwk {
    /// The kid it came with, else its thumbprint.
    pub fn kid_or_thumbprint(&self) -> Kid {
        self.kid.clone().unwrap_or_else(|| self.public.thumbprint())
    }
}

/// The bytes behind the members of a [`PublicJwk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicBytes {
    /// The uncompressed point: 0x04 ‖ x ‖ y (SEC 1 §2.3.3).
    Ec {
        crv: EcCurve,
        point: Vec<u8>,
    },
    /// Big-endian, without leading zero octets.
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    Ed25519([u8; 32]),
}

/// The one public exponent that every part of this daemon (and most verifiers) can handle.
const RSA_EXPONENT: [u8; 3] = [1, 0, 1];
/// Its base64url form.
const RSA_EXPONENT_BASE64URL: &str = "AQAB";

/// Members that carry private or secret key material (RFC 7518 §6.2.2, §6.3.2, §6.4; RFC 8037 §2; RFC 9964).
const PRIVATE_MEMBERS: [&str; 9] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"];

impl PublicJwk {
    /// Reads and validates a public JWK. Members nobody knows are ignored (RFC 7517 §4).
    ///
    /// # Errors
    /// Private members, keys not meant for signatures, unsupported, malformed, weak and inconsistent keys.
    pub fn from_jwk_json(jwk: &Value) -> Result<ParsedJwk, JwkError> {
        let jwk = jwk.as_object().ok_or(JwkError::NotAnObject)?;
        let kty = text(jwk, "kty")?;
        if kty == "oct" {
            return Err(JwkError::Symmetric);
        }
        if let Some(member) = PRIVATE_MEMBERS.into_iter().find(|&member| jwk.contains_key(member)) {
            return Err(JwkError::PrivateMember { member });
        }
        let public = match kty {
            "EC" => PublicJwk::ec(ec_curve(text(jwk, "crv")?)?, &bytes(jwk, "x")?, &bytes(jwk, "y")?)?,
            "RSA" => PublicJwk::rsa(&bytes(jwk, "n")?, &bytes(jwk, "e")?)?,
            "OKP" => match text(jwk, "crv")? {
                "Ed25519" => PublicJwk::ed25519(&bytes(jwk, "x")?)?,
                other => return Err(JwkError::UnsupportedCurve { crv: shown(other) }),
            },
            other => return Err(JwkError::UnsupportedKeyType { kty: shown(other) }),
        };
        meant_for_signatures(jwk)?;
        let algorithm = match optional_text(jwk, "alg")? {
            Some(alg) => Some(
                public
                    .algorithm_named(alg)
                    .ok_or_else(|| JwkError::Algorithm { alg: shown(alg), possible: public.possible_algs() })?,
            ),
            None => None,
        };
        let kid = optional_text(jwk, "kid")?.map(Kid::parse).transpose()?;
        Ok(ParsedJwk { public, kid, algorithm })
    }

    /// A point given by its coordinates, which have the full length of the curve's field (RFC 7518 §6.2.1.2).
    ///
    /// # Errors
    /// Coordinates of another length, points that are not on the curve.
    pub fn ec(crv: EcCurve, x: &[u8], y: &[u8]) -> Result<Self, JwkError> {
        for (member, coordinate) in [("x", x), ("y", y)] {
            exact_len(member, coordinate, crv.coordinate_len())?;
        }
        let mut point = vec![4];
        point.extend_from_slice(x);
        point.extend_from_slice(y);
        let on_curve = match crv {
            EcCurve::P256 => p256::PublicKey::from_sec1_bytes(&point).is_ok(),
            EcCurve::P384 => p384::PublicKey::from_sec1_bytes(&point).is_ok(),
        };
        if !on_curve {
            return Err(JwkError::OffCurve { crv: crv.name() });
        }
        Ok(PublicJwk::Ec { crv, x: URL_SAFE_NO_PAD.encode(x), y: URL_SAFE_NO_PAD.encode(y) })
    }

    /// An RSA key given by modulus and exponent, big-endian. Leading zero octets are dropped, because they would
    /// change the thumbprint of the same key.
    ///
    /// # Errors
    /// Moduli of other than 2048, 3072 or 4096 bits, exponents other than 65537, moduli with small factors or the
    /// ROCA fingerprint (CVE-2017-15361).
    pub fn rsa(n: &[u8], e: &[u8]) -> Result<Self, JwkError> {
        let (n, e) = (strip_leading_zeros(n), strip_leading_zeros(e));
        if e != RSA_EXPONENT {
            return Err(JwkError::RsaExponent);
        }
        let bits = bit_len(n);
        if RsaBits::try_from(bits).is_err() {
            return Err(JwkError::RsaSize { bits });
        }
        let (modulus, exponent) = (big_uint(n), big_uint(e));
        if rsa::RsaPublicKey::new(modulus, exponent).is_err() || has_small_factor(n) {
            return Err(JwkError::RsaModulus { problem: "it has a small factor, so it is no product of two primes" });
        }
        if has_roca_fingerprint(n) {
            return Err(JwkError::RsaModulus {
                problem: "it was made by a generator whose keys can be factored (ROCA, CVE-2017-15361)",
            });
        }
        Ok(PublicJwk::Rsa { n: URL_SAFE_NO_PAD.encode(n), e: URL_SAFE_NO_PAD.encode(e) })
    }

    /// An Ed25519 key given by its 32 bytes (RFC 8032 §5.1.2).
    ///
    /// # Errors
    /// Bytes that are no point in its canonical encoding, and points of small order, for which anyone can sign.
    pub fn ed25519(x: &[u8]) -> Result<Self, JwkError> {
        exact_len("x", x, 32)?;
        let mut encoded = [0; 32];
        encoded.copy_from_slice(x);
        let point =
            ed25519_dalek::VerifyingKey::from_bytes(&encoded).map_err(|_| JwkError::OffCurve { crv: "Ed25519" })?;
        if point.is_weak() {
            return Err(JwkError::SmallOrder);
        }
        if point.to_edwards().compress().to_bytes() != encoded {
            return Err(JwkError::OffCurve { crv: "Ed25519" });
        }
        Ok(PublicJwk::Okp { crv: OkpCurve::Ed25519, x: URL_SAFE_NO_PAD.encode(x) })
    }

    /// Whether this key can serve the algorithm: its type, its curve, and for RSA its size.
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        match (self, algorithm) {
            (PublicJwk::Ec { crv: EcCurve::P256, .. }, Algorithm::Es256)
            | (PublicJwk::Ec { crv: EcCurve::P384, .. }, Algorithm::Es384)
            | (PublicJwk::Okp { crv: OkpCurve::Ed25519, .. }, Algorithm::EdDsa { .. }) => true,
            (PublicJwk::Rsa { .. }, Algorithm::Rs256 { rsa_bits } | Algorithm::Ps256 { rsa_bits }) => {
                self.rsa_bits() == Some(rsa_bits)
            }
            _ => false,
        }
    }

    /// The algorithm that a JOSE `alg` means for this key; `None` where the key cannot serve it.
    pub fn algorithm_named(&self, alg: &str) -> Option<Algorithm> {
        self.algorithms().into_iter().find(|algorithm| algorithm.alg() == alg)
    }

    /// Every algorithm this key can serve: more than one for RSA keys, and for the two labels of Ed25519.
    pub fn algorithms(&self) -> Vec<Algorithm> {
        match self {
            PublicJwk::Ec { crv: EcCurve::P256, .. } => vec![Algorithm::Es256],
            PublicJwk::Ec { crv: EcCurve::P384, .. } => vec![Algorithm::Es384],
            PublicJwk::Okp { crv: OkpCurve::Ed25519, .. } => {
                vec![Algorithm::EdDsa { label: EdLabel::EdDsa }, Algorithm::EdDsa { label: EdLabel::Ed25519 }]
            }
            PublicJwk::Rsa { .. } => match self.rsa_bits() {
                Some(rsa_bits) => vec![Algorithm::Rs256 { rsa_bits }, Algorithm::Ps256 { rsa_bits }],
                None => Vec::new(),
            },
        }
    }

    /// The kid of a created key: SHA-256 over the required members in lexicographic order (RFC 7638 §3, RFC 8037 §2).
    pub fn thumbprint(&self) -> Kid {
        if let Some(key) = LibraryKey::of(self) {
            return Kid(key.0.thumbprint().into());
        }
        let members = match self {
            PublicJwk::Ec { crv, x, y } => format!(r#"{{"crv":"{}","kty":"EC","x":"{x}","y":"{y}"}}"#, crv.name()),
            PublicJwk::Rsa { n, e } => format!(r#"{{"e":"{e}","kty":"RSA","n":"{n}"}}"#),
            PublicJwk::Okp { crv: OkpCurve::Ed25519, x } => format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#),
        };
        Kid(URL_SAFE_NO_PAD.encode(Sha256::digest(members)).into())
    }

    /// The key as bytes.
    ///
    /// # Errors
    /// Members that no constructor of this type would have written.
    pub fn to_bytes(&self) -> Result<PublicBytes, JwkError> {
        match self {
            PublicJwk::Ec { crv, x, y } => {
                let mut point = vec![4];
                for (member, coordinate) in [("x", x), ("y", y)] {
                    let coordinate = base64url(member, coordinate)?;
                    exact_len(member, &coordinate, crv.coordinate_len())?;
                    point.extend_from_slice(&coordinate);
                }
                Ok(PublicBytes::Ec { crv: *crv, point })
            }
            PublicJwk::Rsa { n, e } => Ok(PublicBytes::Rsa { n: base64url("n", n)?, e: base64url("e", e)? }),
            PublicJwk::Okp { crv: OkpCurve::Ed25519, x } => {
                let decoded = base64url("x", x)?;
                exact_len("x", &decoded, 32)?;
                let mut point = [0; 32];
                point.copy_from_slice(&decoded);
                Ok(PublicBytes::Ed25519(point))
            }
        }
    }

    /// The size of an RSA modulus, where it is one this daemon uses.
    fn rsa_bits(&self) -> Option<RsaBits> {
        let PublicJwk::Rsa { n, .. } = self else { return None };
        RsaBits::try_from(bit_len(&URL_SAFE_NO_PAD.decode(n).ok()?)).ok()
    }

    fn possible_algs(&self) -> String {
        let algs: Vec<_> = self.algorithms().into_iter().map(Algorithm::alg).collect();
        algs.join(" or ")
    }
}

/// Reads a JWK Set (RFC 7517 §5): each key by itself, because a set may hold keys for other purposes, which the
/// caller skips or reports.
///
/// # Errors
/// What is not a JWK Set, sets of more than [`MAX_JWKS_KEYS`] keys, and two usable keys with one kid (§4.5).
pub fn parse_jwks(jwks: &Value) -> Result<Vec<Result<ParsedJwk, JwkError>>, JwkError> {
    let keys = jwks.as_object().and_then(|set| set.get("keys")).and_then(Value::as_array).ok_or(JwkError::NotASet)?;
    if keys.len() > MAX_JWKS_KEYS {
        return Err(JwkError::TooManyKeys { found: keys.len() });
    }
    let parsed: Vec<_> = keys.iter().map(PublicJwk::from_jwk_json).collect();
    let mut kids = std::collections::BTreeSet::new();
    for kid in parsed.iter().flatten().filter_map(|key| key.kid.as_ref()) {
        if !kids.insert(kid) {
            return Err(JwkError::DuplicateKid { kid: kid.clone() });
        }
    }
    Ok(parsed)
}

/// The most keys that a JWK Set from elsewhere may hold.
pub const MAX_JWKS_KEYS: usize = 100;

/// Why a JWK was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwkError {
    #[error("a JWK is a JSON object with the member \"kty\" (RFC 7517 §4)")]
    NotAnObject,
    #[error("a JWK Set is a JSON object with the array \"keys\" (RFC 7517 §5)")]
    NotASet,
    #[error("the JWK Set holds {found} keys: at most {MAX_JWKS_KEYS} can be read")]
    TooManyKeys { found: usize },
    #[error("two keys of the JWK Set have the kid {kid}: give each its own (RFC 7517 §4.5)")]
    DuplicateKid { kid: Kid },
    #[error("the JWK lacks the member \"{member}\"")]
    Missing { member: &'static str },
    #[error("the member \"{member}\" of the JWK is not a string")]
    NotAString { member: &'static str },
    #[error("the member \"{member}\" of the JWK is not canonical base64url without padding (RFC 7515 §2)")]
    NotBase64url { member: &'static str },
    #[error("the member \"{member}\" of the JWK has {found} bytes instead of {expected}")]
    Length { member: &'static str, expected: usize, found: usize },
    #[error("the key type {kty} is not supported: use EC, RSA or OKP")]
    UnsupportedKeyType { kty: String },
    #[error("the JWK is a symmetric key, which every verifier could sign with: use EC, RSA or OKP")]
    Symmetric,
    #[error("the curve {crv} is not supported: use P-256, P-384 or Ed25519")]
    UnsupportedCurve { crv: String },
    #[error("the JWK holds the private member \"{member}\": import it as a private key, or remove the private members")]
    PrivateMember { member: &'static str },
    #[error("the JWK's point is not on the curve {crv}, or not in its one canonical encoding")]
    OffCurve { crv: &'static str },
    #[error("the Ed25519 key is a point of small order, for which anyone can make signatures: make a new key")]
    SmallOrder,
    #[error("an RSA key of {bits} bits is not accepted: use 2048, 3072 or 4096")]
    RsaSize { bits: u32 },
    #[error("the RSA public exponent is not 65537, the only one supported: make a new key")]
    RsaExponent,
    #[error("the RSA modulus is weak: {problem}; make a new key")]
    RsaModulus { problem: &'static str },
    #[error("the JWK is not meant for signatures: its \"use\" is {found} instead of \"sig\"")]
    Use { found: String },
    #[error("the JWK is not meant for signatures: its \"key_ops\" is not a list with \"{operation}\"")]
    KeyOps { operation: &'static str },
    #[error("the JWK's \"alg\" is {alg}, but the key can serve {possible}")]
    Algorithm { alg: String, possible: String },
    #[error(transparent)]
    Kid(#[from] KidError),
}

/// One key of the published document, as the keyring knows it.
#[derive(Clone, Copy, Debug)]
pub struct PublishedEntry<'a> {
    pub kid: &'a Kid,
    pub algorithm: Algorithm,
    pub public: &'a PublicJwk,
}

impl PublishedEntry<'_> {
    /// What it adds to the document, in bytes, its comma included.
    pub fn bytes(&self) -> usize {
        serde_json::to_vec(&PublishedKey::from(*self)).map_or(0, |entry| entry.len() + 1)
    }
}

/// How a key is published: `kty`, its public members, `kid`, `use` and `alg`, and nothing else (RFC 7517 §4).
#[derive(Debug, Serialize)]
pub struct PublishedKey<'a> {
    #[serde(flatten)]
    members: PublicMembers<'a>,
    kid: &'a str,
    /// `use` without `key_ops`, as RFC 7517 §4.3 wants it.
    #[serde(rename = "use")]
    usage: &'static str,
    alg: &'static str,
}

impl<'a> From<PublishedEntry<'a>> for PublishedKey<'a> {
    fn from(entry: PublishedEntry<'a>) -> Self {
        let members = match LibraryKey::of(entry.public) {
            Some(key) => PublicMembers::Library(key),
            None => PublicMembers::Own(entry.public),
        };
        PublishedKey { members, kid: entry.kid.as_str(), usage: "sig", alg: entry.algorithm.alg() }
    }
}

/// The JWK Set that verifiers fetch (RFC 7517 §5): compact JSON, keys in the caller's order.
pub fn jwks_document<'a>(keys: impl Iterator<Item = PublishedEntry<'a>>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Document<'a> {
        keys: Vec<PublishedKey<'a>>,
    }
    let document = Document { keys: keys.map(PublishedKey::from).collect() };
    serde_json::to_vec(&document).expect("strings serialise, and library keys are built without private members")
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum PublicMembers<'a> {
    Library(LibraryKey),
    Own(&'a PublicJwk),
}

/// A P-256 or RSA key in the type of the jsonwebkey crate, which serves these two. That type has room for private
/// members and its `Debug` prints them, so it stays in here: built from public bytes alone, checked again when written.
struct LibraryKey(jsonwebkey::Key);

impl LibraryKey {
    fn of(public: &PublicJwk) -> Option<Self> {
        match (public, public.to_bytes().ok()?) {
            (PublicJwk::Ec { crv: EcCurve::P256, .. }, PublicBytes::Ec { point, .. }) => {
                let (x, y) = point.get(1..)?.split_at_checked(32)?;
                Some(LibraryKey(jsonwebkey::Key::EC {
                    curve: jsonwebkey::Curve::P256,
                    d: None,
                    x: jsonwebkey::ByteArray::try_from_slice(x).ok()?,
                    y: jsonwebkey::ByteArray::try_from_slice(y).ok()?,
                }))
            }
            // Its exponent is a constant: a key with another one must not pass through it.
            (PublicJwk::Rsa { e, .. }, PublicBytes::Rsa { n, .. }) if e == RSA_EXPONENT_BASE64URL => {
                let public = jsonwebkey::RsaPublic { e: jsonwebkey::PublicExponent, n: n.into() };
                Some(LibraryKey(jsonwebkey::Key::RSA { public, private: None }))
            }
            _ => None,
        }
    }
}

impl Serialize for LibraryKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.is_private() {
            return Err(S::Error::custom("a private key must not be published"));
        }
        self.0.serialize(serializer)
    }
}

impl fmt::Debug for LibraryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibraryKey").finish_non_exhaustive()
    }
}

fn ec_curve(crv: &str) -> Result<EcCurve, JwkError> {
    [EcCurve::P256, EcCurve::P384]
        .into_iter()
        .find(|curve| curve.name() == crv)
        .ok_or_else(|| JwkError::UnsupportedCurve { crv: shown(crv) })
}

/// `use` and `key_ops`, where present, must allow verifying (RFC 7517 §4.2, §4.3).
fn meant_for_signatures(jwk: &Map<String, Value>) -> Result<(), JwkError> {
    if let Some(found) = optional_text(jwk, "use")?.filter(|&usage| usage != "sig") {
        return Err(JwkError::Use { found: shown(found) });
    }
    match jwk.get("key_ops") {
        None => Ok(()),
        Some(Value::Array(operations)) if operations.iter().any(|operation| operation == "verify") => Ok(()),
        Some(_) => Err(JwkError::KeyOps { operation: "verify" }),
    }
}

fn text<'a>(jwk: &'a Map<String, Value>, member: &'static str) -> Result<&'a str, JwkError> {
    optional_text(jwk, member)?.ok_or(JwkError::Missing { member })
}

fn optional_text<'a>(jwk: &'a Map<String, Value>, member: &'static str) -> Result<Option<&'a str>, JwkError> {
    match jwk.get(member) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(JwkError::NotAString { member }),
    }
}

fn bytes(jwk: &Map<String, Value>, member: &'static str) -> Result<Vec<u8>, JwkError> {
    base64url(member, text(jwk, member)?)
}

fn base64url(member: &'static str, text: &str) -> Result<Vec<u8>, JwkError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| JwkError::NotBase64url { member })
}

fn exact_len(member: &'static str, bytes: &[u8], expected: usize) -> Result<(), JwkError> {
    if bytes.len() != expected {
        return Err(JwkError::Length { member, expected, found: bytes.len() });
    }
    Ok(())
}

fn strip_leading_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|&&byte| byte == 0).count();
    bytes.get(zeros..).unwrap_or_default()
}

/// Bits of a big-endian number, leading zeros not counted.
fn bit_len(number: &[u8]) -> u32 {
    let number = strip_leading_zeros(number);
    let Some(first) = number.first() else { return 0 };
    u32::try_from(number.len()).unwrap_or(u32::MAX).saturating_mul(8) - first.leading_zeros()
}

fn big_uint(number: &[u8]) -> rsa::BoxedUint {
    rsa::BoxedUint::from_be_slice_vartime(number)
}

/// The odd primes whose residues the ROCA test looks at.
const SMALL_PRIMES: [u32; 38] = [
    3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109,
    113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
];

fn remainder(number: &[u8], divisor: u32) -> u32 {
    number.iter().fold(0, |rest, &byte| (rest * 256 + u32::from(byte)) % divisor)
}

fn has_small_factor(n: &[u8]) -> bool {
    SMALL_PRIMES.into_iter().any(|prime| remainder(n, prime) == 0)
}

/// Primes of the vulnerable generator are powers of 65537 modulo many small primes, and so are their products;
/// about one healthy modulus in 2²⁷ looks the same (Nemec et al., "The Return of Coppersmith's Attack", §2.2).
fn has_roca_fingerprint(n: &[u8]) -> bool {
    SMALL_PRIMES.into_iter().all(|prime| {
        let rest = remainder(n, prime);
        let mut power = 1;
        for _ in 0..prime {
            if power == rest {
                return true;
            }
            power = power * (65537 % prime) % prime;
        }
        false
    })
}

/// A piece of foreign input as it may stand in a message: quoted, escaped and short.
pub(crate) fn shown(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    if short.len() < text.len() { format!("{short:?}…") } else { format!("{short:?}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const RFC7638_N: &str = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw";
    // RFC 7515 A.3.
    const P256_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
    const P256_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";
    // RFC 8037 A.2.
    const ED25519_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

    fn p256_jwk() -> Value {
        json!({"kty": "EC", "crv": "P-256", "x": P256_X, "y": P256_Y})
    }

    fn rsa_jwk() -> Value {
        json!({"kty": "RSA", "n": RFC7638_N, "e": "AQAB"})
    }

    fn with(mut jwk: Value, member: &str, value: impl Into<Value>) -> Value {
        jwk[member] = value.into();
        jwk
    }

    fn public(jwk: &Value) -> PublicJwk {
        PublicJwk::from_jwk_json(jwk).unwrap().public
    }

    fn refusal(jwk: &Value) -> String {
        PublicJwk::from_jwk_json(jwk).unwrap_err().to_string()
    }

    #[test]
    fn thumbprints_are_those_of_the_rfcs() {
        assert_eq!(public(&rsa_jwk()).thumbprint().as_str(), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
        let okp = json!({"kty": "OKP", "crv": "Ed25519", "x": ED25519_X});
        assert_eq!(public(&okp).thumbprint().as_str(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn the_library_and_our_own_thumbprints_agree() {
        for jwk in [p256_jwk(), rsa_jwk()] {
            let members: std::collections::BTreeMap<String, Value> = serde_json::from_value(jwk.clone()).unwrap();
            let canonical = serde_json::to_vec(&members).unwrap();
            assert_eq!(public(&jwk).thumbprint().as_str(), URL_SAFE_NO_PAD.encode(Sha256::digest(canonical)));
        }
    }

    #[test]
    fn a_leading_zero_of_the_modulus_does_not_change_the_thumbprint() {
        let mut n = vec![0];
        n.extend(URL_SAFE_NO_PAD.decode(RFC7638_N).unwrap());
        let padded = with(rsa_jwk(), "n", URL_SAFE_NO_PAD.encode(n));
        assert_eq!(public(&padded), public(&rsa_jwk()));
    }

    #[test]
    fn off_curve_points_are_refused() {
        let off_curve = with(p256_jwk(), "y", P256_X);
        // Why we check: the library accepts it.
        assert!(serde_json::from_value::<jsonwebkey::Key>(off_curve.clone()).is_ok());
        assert!(refusal(&off_curve).contains("not on the curve P-256"));
        let infinity = json!({"kty": "EC", "crv": "P-384", "x": "A".repeat(64), "y": "A".repeat(64)});
        assert!(refusal(&infinity).contains("not on the curve P-384"));
    }

    #[test]
    fn coordinates_keep_their_full_length() {
        for (member, value, found) in [("x", &P256_X[..40], 30), ("y", "", 0)] {
            assert!(refusal(&with(p256_jwk(), member, value)).contains(&format!("{found} bytes instead of 32")));
        }
    }

    #[test]
    fn weak_rsa_keys_are_refused() {
        // Why we check: the library accepts any modulus.
        let tiny = with(rsa_jwk(), "n", "AAAAAAAAAAE");
        assert!(serde_json::from_value::<jsonwebkey::Key>(tiny.clone()).is_ok());
        assert!(refusal(&tiny).contains("1 bits"));
        for bytes in [128, 255, 257, 320, 1024] {
            let n = URL_SAFE_NO_PAD.encode(vec![0xff; bytes]);
            assert!(refusal(&with(rsa_jwk(), "n", n)).contains(&format!("{} bits", bytes * 8)));
        }
        let mut even = URL_SAFE_NO_PAD.decode(RFC7638_N).unwrap();
        *even.last_mut().unwrap() ^= 1;
        assert!(refusal(&with(rsa_jwk(), "n", URL_SAFE_NO_PAD.encode(&even))).contains("weak"));
        let with_factor_three = URL_SAFE_NO_PAD.encode([0xff; 256]);
        assert!(refusal(&with(rsa_jwk(), "n", with_factor_three)).contains("small factor"));
        for e in ["AQ", "Aw", "AQAD", "AQAAAAE", "AQABAA", ""] {
            assert!(refusal(&with(rsa_jwk(), "e", e)).contains("65537"), "{e}");
        }
    }

    #[test]
    fn a_key_of_the_vulnerable_generator_is_recognised() {
        use wycheproof_ng_kdf_jose::json_web::{TestName, TestSet};
        let groups = TestSet::load(TestName::JsonWebKey).unwrap().test_groups;
        let roca = groups.into_iter().find(|group| group.group_comment.contains("roca")).unwrap().public_key.unwrap();
        let modulus = |jwk: &Value| URL_SAFE_NO_PAD.decode(jwk["n"].as_str().unwrap()).unwrap();
        assert!(has_roca_fingerprint(&modulus(&roca["keys"][0])));
        assert!(!has_roca_fingerprint(&modulus(&rsa_jwk())));
        // A power of 65537 is one modulo every prime.
        let mut number = rsa::BoxedUint::one_with_precision(2048);
        for _ in 0..127 {
            number = number.wrapping_mul(rsa::BoxedUint::from(65537u64));
        }
        assert!(has_roca_fingerprint(&number.to_be_bytes()));
    }

    #[test]
    fn ed25519_points_of_small_order_and_second_encodings_are_refused() {
        let jwk = |x: [u8; 32]| json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(x)});
        let mut identity = [0; 32];
        identity[0] = 1;
        assert!(refusal(&jwk(identity)).contains("small order"));
        assert!(refusal(&jwk([0; 32])).contains("small order"));
        // y = 2²⁵⁵ − 19 + 3, a second encoding of the point y = 3.
        let mut second = [0xff; 32];
        second[0] = 0xf0;
        second[31] = 0x7f;
        let mut first = [0; 32];
        first[0] = 3;
        assert!(PublicJwk::ed25519(&first).is_ok());
        assert!(refusal(&jwk(second)).contains("canonical"));
    }

    #[test]
    fn private_members_in_a_public_import_are_refused_by_name() {
        for (jwk, member) in [(p256_jwk(), "d"), (rsa_jwk(), "qi"), (rsa_jwk(), "oth"), (p256_jwk(), "priv")] {
            let message = refusal(&with(jwk, member, "c2VjcmV0"));
            assert!(message.contains(&format!("private member \"{member}\"")), "{message}");
            assert!(!message.contains("c2VjcmV0"));
        }
        // Why the name decides, not the library: a malformed private RSA key passes there as a public one.
        let malformed = with(rsa_jwk(), "d", "!");
        let library: jsonwebkey::Key = serde_json::from_value(malformed.clone()).unwrap();
        assert!(!library.is_private());
        assert!(refusal(&malformed).contains("private member \"d\""));
    }

    #[test]
    fn only_canonical_base64url_is_read() {
        let (last, rest) = P256_X.split_at(42);
        let _ = rest;
        for x in [format!("{P256_X}="), format!("{last}V"), format!("{last}+"), format!(" {P256_X}"), "é".into()] {
            assert!(refusal(&with(p256_jwk(), "x", x.clone())).contains("canonical base64url"), "{x}");
        }
    }

    #[test]
    fn keys_for_other_purposes_are_refused() {
        assert!(refusal(&with(rsa_jwk(), "use", "enc")).contains("\"enc\" instead of \"sig\""));
        assert!(refusal(&with(rsa_jwk(), "key_ops", json!(["encrypt"]))).contains("key_ops"));
        assert!(refusal(&with(rsa_jwk(), "key_ops", "verify")).contains("key_ops"));
        assert!(PublicJwk::from_jwk_json(&with(rsa_jwk(), "key_ops", json!(["verify"]))).is_ok());
        assert!(refusal(&json!({"kty": "oct", "k": "AAAA"})).contains("symmetric"));
        assert!(refusal(&json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": ""})).contains("\"AKP\""));
        assert!(refusal(&json!({"kty": "EC", "crv": "secp256k1", "x": "", "y": ""})).contains("\"secp256k1\""));
        assert!(refusal(&json!({"kty": "OKP", "crv": "X25519", "x": ""})).contains("\"X25519\""));
        assert!(refusal(&json!({"kty": 7})).contains("not a string"));
        assert!(refusal(&json!({})).contains("\"kty\""));
        assert!(refusal(&json!([])).contains("JSON object"));
    }

    #[test]
    fn the_alg_of_a_key_must_fit_it() {
        for (jwk, alg) in [(p256_jwk(), "ES256"), (rsa_jwk(), "RS256"), (rsa_jwk(), "PS256")] {
            let parsed = PublicJwk::from_jwk_json(&with(jwk, "alg", alg)).unwrap();
            assert_eq!(parsed.algorithm.unwrap().alg(), alg);
        }
        for (jwk, alg) in [(p256_jwk(), "ES384"), (p256_jwk(), "HS256"), (rsa_jwk(), "RS512"), (rsa_jwk(), "none")] {
            assert!(refusal(&with(jwk, "alg", alg)).contains("can serve"), "{alg}");
        }
    }

    #[test]
    fn a_key_fits_only_its_own_algorithms() {
        let rsa = public(&rsa_jwk());
        assert!(rsa.fits(Algorithm::Rs256 { rsa_bits: RsaBits::B2048 }));
        assert!(rsa.fits(Algorithm::Ps256 { rsa_bits: RsaBits::B2048 }));
        assert!(!rsa.fits(Algorithm::Rs256 { rsa_bits: RsaBits::B3072 }));
        assert!(!rsa.fits(Algorithm::Es256));
        assert!(public(&p256_jwk()).fits(Algorithm::Es256));
        assert!(!public(&p256_jwk()).fits(Algorithm::Es384));
    }

    #[test]
    fn imported_kids_are_short_and_printable() {
        for good in ["a", "my signing key", "2011-04-29", &"k".repeat(256)] {
            assert_eq!(Kid::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "a\nb", "é", "\u{7f}", &"k".repeat(257)] {
            assert!(Kid::parse(bad).is_err(), "{bad:?}");
        }
        assert!(refusal(&with(p256_jwk(), "kid", "a\u{0}")).contains("cannot be a kid"));
    }

    #[test]
    fn the_document_holds_kty_kid_use_alg_and_public_members_only() {
        let (ec, rsa, okp) =
            (public(&p256_jwk()), public(&rsa_jwk()), public(&json!({"kty":"OKP","crv":"Ed25519","x":ED25519_X})));
        let kid = Kid::parse("k\"1").unwrap();
        let entries = [
            (Algorithm::Es256, &ec),
            (Algorithm::Ps256 { rsa_bits: RsaBits::B2048 }, &rsa),
            (Algorithm::EdDsa { label: EdLabel::Ed25519 }, &okp),
        ];
        let document =
            jwks_document(entries.iter().map(|&(algorithm, public)| PublishedEntry { kid: &kid, algorithm, public }));
        let expected = format!(
            concat!(
                r#"{{"keys":[{{"kty":"EC","crv":"P-256","x":"{}","y":"{}","kid":"k\"1","use":"sig","alg":"ES256"}},"#,
                r#"{{"kty":"RSA","e":"AQAB","n":"{}","kid":"k\"1","use":"sig","alg":"PS256"}},"#,
                r#"{{"kty":"OKP","crv":"Ed25519","x":"{}","kid":"k\"1","use":"sig","alg":"Ed25519"}}]}}"#
            ),
            P256_X, P256_Y, RFC7638_N, ED25519_X
        );
        assert_eq!(String::from_utf8(document).unwrap(), expected);
        assert_eq!(jwks_document(std::iter::empty()), br#"{"keys":[]}"#);
    }

    #[test]
    fn a_published_entry_is_as_small_as_the_limit_computation_assumes() {
        for (jwk, algorithm) in [
            (p256_jwk(), Algorithm::Es256),
            (rsa_jwk(), Algorithm::Rs256 { rsa_bits: RsaBits::B2048 }),
            (json!({"kty":"OKP","crv":"Ed25519","x":ED25519_X}), Algorithm::EdDsa { label: EdLabel::Ed25519 }),
        ] {
            let public = public(&jwk);
            let kid = public.thumbprint();
            let entry =
                serde_json::to_vec(&PublishedKey::from(PublishedEntry { kid: &kid, algorithm, public: &public }));
            assert!(entry.unwrap().len() <= algorithm.jwk_bytes());
        }
    }

    #[test]
    fn as_many_keys_as_a_set_may_hold_fit_its_bytes_whatever_was_imported() {
        let kid = Kid::parse(&"\"".repeat(256)).unwrap(); // The longest, and each byte of it escaped.
        let mut n = vec![0xff; 512];
        n[511] = 0x61;
        let public = PublicJwk::Rsa { n: URL_SAFE_NO_PAD.encode(n), e: "AQAB".to_owned() };
        let algorithm = Algorithm::Rs256 { rsa_bits: RsaBits::B4096 };
        let entry = PublishedEntry { kid: &kid, algorithm, public: &public };
        assert!(entry.bytes() > algorithm.jwk_bytes(), "the estimate is for keys made here");
        let keys = crate::keyring::plan::JWKS_KEYS_MAX as usize;
        let document = jwks_document(std::iter::repeat_n(entry, keys));
        assert_eq!(document.len(), jwks_document(std::iter::empty()).len() + keys * entry.bytes() - 1);
        assert!(document.len() < 20_000, "{} of the 50,000 bytes that a set may have", document.len());
    }

    #[test]
    fn a_private_key_in_the_library_type_cannot_be_published_or_printed() {
        let private = with(p256_jwk(), "d", "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI");
        let key: jsonwebkey::Key = serde_json::from_value(private).unwrap();
        // Why it is wrapped: its own Debug prints the secret.
        assert!(format!("{key:?}").contains("jpsQnnGQmL"));
        let wrapped = LibraryKey(key);
        assert!(!format!("{wrapped:?}").contains("jpsQnnGQmL"));
        assert!(serde_json::to_string(&wrapped).is_err());
    }

    #[test]
    fn every_published_key_reads_back_as_itself() {
        for jwk in [p256_jwk(), rsa_jwk(), json!({"kty":"OKP","crv":"Ed25519","x":ED25519_X})] {
            let parsed = public(&jwk);
            let kid = parsed.thumbprint();
            let algorithm = parsed.algorithms()[0];
            let document = jwks_document([PublishedEntry { kid: &kid, algorithm, public: &parsed }].into_iter());
            let keys = parse_jwks(&serde_json::from_slice(&document).unwrap()).unwrap();
            assert_eq!(keys, [Ok(ParsedJwk { public: parsed, kid: Some(kid), algorithm: Some(algorithm) })]);
        }
    }

    #[test]
    fn a_set_is_read_key_by_key_and_its_kids_are_distinct() {
        let set = json!({"keys": [p256_jwk(), {"kty": "oct", "k": "AAAA"}]});
        let keys = parse_jwks(&set).unwrap();
        assert!(keys[0].is_ok());
        assert_eq!(keys[1], Err(JwkError::Symmetric));
        let twice = json!({"keys": [with(p256_jwk(), "kid", "a"), with(rsa_jwk(), "kid", "a")]});
        assert!(parse_jwks(&twice).unwrap_err().to_string().contains("kid a"));
        assert!(parse_jwks(&json!({"keys": vec![p256_jwk(); 101]})).is_err());
        assert!(parse_jwks(&p256_jwk()).is_err());
    }
}
