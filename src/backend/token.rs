//! Reading and verifying tokens as `jwksd verify` and `jwksd inspect` do: compact JWS (RFC 7515 §7.1) with JWT claims
//! (RFC 7519), as strictly as RFC 8725 advises.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::verify::{VerifyError, verify};
use crate::keyring::algorithm::Algorithm;
use crate::keyring::json::parse_strict;
use crate::keyring::jwk::{ParsedJwk, shown};
use crate::keyring::time::{Span, Timestamp};

/// The longest token that is read, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// The members of a JWT's payload.
pub type Claims = Map<String, Value>;

/// What a token says, believed by nobody yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    pub header: Map<String, Value>,
    pub claims: Claims,
}

/// Reads a token without verifying anything.
///
/// # Errors
/// What is not three segments of canonical base64url with JSON objects, free of repeated members, in the first two.
pub fn decode(token: &str) -> Result<Decoded, TokenError> {
    let jws = Jws::parse(token)?;
    Ok(Decoded { claims: jws.claims()?, header: jws.header })
}

/// Verifies a token: signature by the key of its kid, then times, issuer and audience.
///
/// `leeway` is how far clocks may differ. Without `expected_audience` the audience is not checked.
///
/// # Errors
/// The first thing wrong with it.
pub fn verify_token(
    token: &str,
    keys: &[ParsedJwk],
    now: Timestamp,
    expected_issuer: &str,
    expected_audience: Option<&str>,
    leeway: Span,
) -> Result<Claims, TokenError> {
    let jws = Jws::parse(token)?;
    jws.verify(keys)?;
    let claims = jws.claims()?;
    check_times(&claims, now, leeway)?;
    check_issuer(&claims, expected_issuer)?;
    if let Some(expected) = expected_audience {
        check_audience(&claims, expected)?;
    }
    Ok(claims)
}

/// A compact JWS, taken apart. Its payload may be anything.
#[derive(Clone)]
pub struct Jws<'a> {
    pub header: Map<String, Value>,
    pub payload: Vec<u8>,
    signature: Vec<u8>,
    signing_input: &'a str,
}

/// Header members that bring a key along, or say where to fetch one (RFC 7515 §4.1.2–§4.1.6): an attacker's choice.
const KEY_MEMBERS: [&str; 4] = ["jwk", "jku", "x5u", "x5c"];

impl<'a> Jws<'a> {
    /// Exactly three segments of base64url without padding or stray bits; the header is a JSON object in which no
    /// member stands twice (RFC 7515 §4).
    ///
    /// # Errors
    /// Everything else, and tokens longer than [`MAX_TOKEN_BYTES`].
    pub fn parse(token: &'a str) -> Result<Self, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::TooLong);
        }
        let segments: Vec<&str> = token.split('.').collect();
        let [header, payload, signature] = segments[..] else {
            return Err(TokenError::Segments { found: segments.len() });
        };
        let header = object("header", &segment("header", header)?)?;
        Ok(Jws {
            header,
            payload: segment("payload", payload)?,
            signature: segment("signature", signature)?,
            // What is left before the last dot, as it was received.
            signing_input: token.rsplit_once('.').map_or(token, |(input, _)| input),
        })
    }

    /// Verifies the signature with the key whose kid the header names, under that key's own algorithm, and returns the
    /// key. The token's `alg` chooses nothing; it has to agree (RFC 8725 §3.1).
    ///
    /// # Errors
    /// Unsigned and symmetric tokens, extensions (`crit`, `b64`), embedded keys, unknown kids, other algorithms, and
    /// signatures that are not the key's.
    pub fn verify<'k>(&self, keys: &'k [ParsedJwk]) -> Result<&'k ParsedJwk, TokenError> {
        let alg = self.acceptable_alg()?;
        if self.header.contains_key("crit") || self.header.contains_key("b64") {
            return Err(TokenError::Critical);
        }
        if let Some(member) = KEY_MEMBERS.into_iter().find(|&member| self.header.contains_key(member)) {
            return Err(TokenError::EmbeddedKey { member });
        }
        let kid = self.header.get("kid").and_then(Value::as_str).ok_or(TokenError::NoKid)?;
        let mut candidates = keys.iter().filter(|key| key.kid.as_ref().is_some_and(|known| known.as_str() == kid));
        let key = candidates.next().ok_or_else(|| TokenError::UnknownKid { kid: shown(kid) })?;
        if candidates.next().is_some() {
            return Err(TokenError::AmbiguousKid { kid: shown(kid) });
        }
        verify(algorithm_of(key, alg)?, &key.public, self.signing_input.as_bytes(), &self.signature)?;
        Ok(key)
    }

    /// The payload as JWT claims.
    ///
    /// # Errors
    /// A payload that is no JSON object, or has a member twice.
    pub fn claims(&self) -> Result<Claims, TokenError> {
        object("payload", &self.payload)
    }

    fn acceptable_alg(&self) -> Result<&str, TokenError> {
        let alg = self.header.get("alg").and_then(Value::as_str).ok_or(TokenError::NoAlg)?;
        if alg.eq_ignore_ascii_case("none") {
            return Err(TokenError::Unsigned);
        }
        if is_symmetric(alg) {
            return Err(TokenError::Symmetric { alg: shown(alg) });
        }
        Ok(alg)
    }
}

/// The algorithm the key is published for; where it is published without one, the only one it can serve.
fn algorithm_of(key: &ParsedJwk, alg: &str) -> Result<Algorithm, TokenError> {
    let of_key = match key.algorithm {
        Some(algorithm) => algorithm,
        // RFC 8725 §3.1: an RSA key that could serve two algorithms must not follow the token's wish.
        None if matches!(key.public.algorithms()[..], [Algorithm::Rs256 { .. }, ..]) => {
            return Err(TokenError::KeyWithoutAlg);
        }
        // One algorithm, or one with two names.
        None => key
            .public
            .algorithm_named(alg)
            .or(key.public.algorithms().first().copied())
            .ok_or(TokenError::KeyWithoutAlg)?,
    };
    if of_key.alg() != alg {
        return Err(TokenError::OtherAlgorithm { token: shown(alg), key: of_key.alg() });
    }
    Ok(of_key)
}

fn check_times(claims: &Claims, now: Timestamp, leeway: Span) -> Result<(), TokenError> {
    let expires = numeric_date(claims, "exp")?.ok_or(TokenError::MissingClaim { claim: "exp" })?;
    if now >= expires + leeway {
        return Err(TokenError::Expired { at: expires });
    }
    if let Some(from) = numeric_date(claims, "nbf")?.filter(|&from| now + leeway < from) {
        return Err(TokenError::NotYetValid { from });
    }
    // Its type is checked, its value is not: RFC 7519 §4.1.6 gives `iat` no say in validity.
    numeric_date(claims, "iat")?;
    Ok(())
}

fn check_issuer(claims: &Claims, expected: &str) -> Result<(), TokenError> {
    match claims.get("iss") {
        Some(Value::String(issuer)) if issuer == expected => Ok(()),
        Some(Value::String(issuer)) => Err(TokenError::Issuer { found: shown(issuer), expected: shown(expected) }),
        Some(_) => Err(TokenError::ClaimType { claim: "iss", wanted: "a string" }),
        None => Err(TokenError::MissingClaim { claim: "iss" }),
    }
}

fn check_audience(claims: &Claims, expected: &str) -> Result<(), TokenError> {
    let wrong_type = TokenError::ClaimType { claim: "aud", wanted: "a string or a list of strings" };
    let found = match claims.get("aud") {
        Some(Value::String(audience)) => audience == expected,
        Some(Value::Array(audiences)) if audiences.iter().all(Value::is_string) => {
            audiences.iter().any(|audience| audience == expected)
        }
        Some(_) => return Err(wrong_type),
        None => return Err(TokenError::MissingClaim { claim: "aud" }),
    };
    if found { Ok(()) } else { Err(TokenError::Audience { expected: shown(expected) }) }
}

/// A NumericDate (RFC 7519 §2): seconds, possibly with a fraction.
fn numeric_date(claims: &Claims, claim: &'static str) -> Result<Option<Timestamp>, TokenError> {
    let Some(value) = claims.get(claim) else { return Ok(None) };
    if let Some(seconds) = value.as_i64() {
        return Ok(Some(Timestamp::from_secs(seconds)));
    }
    let seconds = value.as_f64().ok_or(TokenError::ClaimType { claim, wanted: "a number of seconds" })?;
    // The cast saturates, and Timestamp clamps.
    Ok(Some(Timestamp::from_millis((seconds * 1000.0) as i64)))
}

fn segment(name: &'static str, text: &str) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| TokenError::NotBase64url { segment: name })
}

fn object(name: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, TokenError> {
    match parse_strict(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(TokenError::NotAnObject { segment: name, problem: "another JSON value".into() }),
        Err(error) => Err(TokenError::NotAnObject { segment: name, problem: error.to_string() }),
    }
}

fn is_symmetric(alg: &str) -> bool {
    alg.get(..2).is_some_and(|family| family.eq_ignore_ascii_case("HS"))
}

/// Why a token was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("the token is longer than {MAX_TOKEN_BYTES} bytes")]
    TooLong,
    #[error("a signed token has three segments separated by dots; this has {found}")]
    Segments { found: usize },
    #[error("the token's {segment} is not canonical base64url without padding")]
    NotBase64url { segment: &'static str },
    #[error("the token's {segment} is not a JSON object: {problem}")]
    NotAnObject { segment: &'static str, problem: String },
    #[error("the token's header has no \"alg\"")]
    NoAlg,
    #[error("the token is not signed: its \"alg\" is none")]
    Unsigned,
    #[error("the token's \"alg\" {alg} is symmetric: whoever could verify it could forge it")]
    Symmetric { alg: String },
    #[error("the token's header demands extensions (\"crit\" or \"b64\"), of which none is supported")]
    Critical,
    #[error("the token's header brings its own key (\"{member}\"): only published keys count")]
    EmbeddedKey { member: &'static str },
    #[error("the token's header has no \"kid\", so no published key can be chosen")]
    NoKid,
    #[error("no published key has the token's kid {kid}: it was revoked or removed, or another issuer made the token")]
    UnknownKid { kid: String },
    #[error("more than one published key has the kid {kid}: their publisher must give each its own (RFC 7517 §4.5)")]
    AmbiguousKid { kid: String },
    #[error("the published key has no \"alg\" and could serve several: its publisher must add it")]
    KeyWithoutAlg,
    #[error("the token's \"alg\" is {token}, but its key is published for {key}")]
    OtherAlgorithm { token: String, key: &'static str },
    #[error(transparent)]
    Signature(#[from] VerifyError),
    #[error("the token has no claim \"{claim}\"")]
    MissingClaim { claim: &'static str },
    #[error("the token's claim \"{claim}\" is not {wanted}")]
    ClaimType { claim: &'static str, wanted: &'static str },
    #[error("the token expired at {at}")]
    Expired { at: Timestamp },
    #[error("the token is not valid before {from}")]
    NotYetValid { from: Timestamp },
    #[error("the token's issuer is {found}, not {expected}")]
    Issuer { found: String, expected: String },
    #[error("the token is not meant for the audience {expected}")]
    Audience { expected: String },
}

/// Something about a token that makes it weaker than it could be, or useless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weakness {
    NoAlg,
    Unsigned,
    Symmetric { alg: String },
    UnknownAlgorithm { alg: String },
    Critical,
    EmbeddedKey { member: &'static str },
    NoKid,
    NoTyp,
    NoExpiry,
    LongLife { life: Span },
    Expired { at: Timestamp },
    NotYetValid { from: Timestamp },
    MalformedTime { claim: &'static str },
    MissingClaim { claim: &'static str },
    PersonalData { claim: String },
}

/// A life beyond which a token is called long.
const LONG_LIFE: Span = Span::DAY;

/// The most claims that are called personal, so that the list stays readable.
const MAX_PERSONAL: usize = 20;

/// What is weak about a token, header first.
pub fn weaknesses(token: &Decoded, now: Timestamp) -> Vec<Weakness> {
    let mut found = Vec::new();
    header_weaknesses(&token.header, &mut found);
    time_weaknesses(&token.claims, now, &mut found);
    for claim in ["iss", "aud", "sub"] {
        if token.claims.get(claim).is_none_or(is_empty) {
            found.push(Weakness::MissingClaim { claim });
        }
    }
    let mut personal = Vec::new();
    personal_data("", &token.claims, &mut personal);
    found.extend(personal.into_iter().map(|claim| Weakness::PersonalData { claim }));
    found
}

fn header_weaknesses(header: &Map<String, Value>, found: &mut Vec<Weakness>) {
    match header.get("alg").and_then(Value::as_str) {
        None => found.push(Weakness::NoAlg),
        Some(alg) if alg.eq_ignore_ascii_case("none") => found.push(Weakness::Unsigned),
        Some(alg) if is_symmetric(alg) => found.push(Weakness::Symmetric { alg: shown(alg) }),
        Some(alg) if !Algorithm::ALL_ALGS.contains(&alg) => found.push(Weakness::UnknownAlgorithm { alg: shown(alg) }),
        Some(_) => {}
    }
    if header.contains_key("crit") || header.contains_key("b64") {
        found.push(Weakness::Critical);
    }
    let embedded = KEY_MEMBERS.into_iter().filter(|&member| header.contains_key(member));
    found.extend(embedded.map(|member| Weakness::EmbeddedKey { member }));
    if header.get("kid").is_none_or(is_empty) {
        found.push(Weakness::NoKid);
    }
    if header.get("typ").is_none_or(is_empty) {
        found.push(Weakness::NoTyp);
    }
}

fn time_weaknesses(claims: &Claims, now: Timestamp, found: &mut Vec<Weakness>) {
    let mut time = |claim| {
        numeric_date(claims, claim).unwrap_or_else(|_| {
            found.push(Weakness::MalformedTime { claim });
            None
        })
    };
    let (expires, from, issued) = (time("exp"), time("nbf"), time("iat"));
    match expires {
        None => found.push(Weakness::NoExpiry),
        Some(at) => {
            let life = at.since(issued.or(from).unwrap_or(now));
            if life > LONG_LIFE {
                found.push(Weakness::LongLife { life });
            }
            if at <= now {
                found.push(Weakness::Expired { at });
            }
        }
    }
    found.extend(from.filter(|&from| from > now).map(|from| Weakness::NotYetValid { from }));
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Names of claims that look like data of a person, or a secret, without underscores and hyphens. Whoever holds a token
/// can read it.
const PERSONAL_CLAIMS: [&str; 27] = [
    "address",
    "apikey",
    "birthdate",
    "birthday",
    "cardnumber",
    "creditcard",
    "dateofbirth",
    "dob",
    "email",
    "emailaddress",
    "familyname",
    "fullname",
    "gender",
    "givenname",
    "iban",
    "mobile",
    "nationalid",
    "passport",
    "passportnumber",
    "password",
    "passwordhash",
    "phone",
    "phonenumber",
    "secret",
    "socialsecuritynumber",
    "ssn",
    "streetaddress",
];

fn personal_data(path: &str, claims: &Map<String, Value>, found: &mut Vec<String>) {
    for (name, value) in claims {
        if found.len() >= MAX_PERSONAL {
            return;
        }
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let plain: String = name.chars().filter(|c| !matches!(c, '_' | '-')).map(|c| c.to_ascii_lowercase()).collect();
        if PERSONAL_CLAIMS.contains(&plain.as_str()) {
            found.push(path);
            continue;
        }
        let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
        for object in std::iter::once(value).chain(items).filter_map(Value::as_object) {
            personal_data(&path, object, found);
        }
    }
}

impl fmt::Display for Weakness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Weakness::NoAlg => f.write_str("the header has no \"alg\""),
            Weakness::Unsigned => f.write_str("not signed (\"alg\" is none): anyone can change it"),
            Weakness::Symmetric { alg } => write!(f, "symmetric signature ({alg}): every verifier can forge it"),
            Weakness::UnknownAlgorithm { alg } => write!(f, "\"alg\" {alg} is none that jwksd knows"),
            Weakness::Critical => f.write_str("demands extensions (\"crit\" or \"b64\") that verifiers may ignore"),
            Weakness::EmbeddedKey { member } => {
                write!(f, "brings its own key (\"{member}\"): a careless verifier trusts it")
            }
            Weakness::NoKid => f.write_str("no \"kid\": verifiers must guess the key, which fails in rotations"),
            Weakness::NoTyp => f.write_str("no \"typ\": it can be mistaken for another kind of token (RFC 8725 §3.11)"),
            Weakness::NoExpiry => f.write_str("no \"exp\": it never expires"),
            Weakness::LongLife { life } => write!(f, "lives {life}: a stolen copy does too; prefer minutes"),
            Weakness::Expired { at } => write!(f, "expired at {at}"),
            Weakness::NotYetValid { from } => write!(f, "not valid before {from}"),
            Weakness::MalformedTime { claim } => write!(f, "\"{claim}\" is not a number of seconds"),
            Weakness::MissingClaim { claim: "iss" } => f.write_str("no \"iss\": verifiers cannot tell who issued it"),
            Weakness::MissingClaim { claim: "aud" } => f.write_str("no \"aud\": any service may accept it"),
            Weakness::MissingClaim { claim } => write!(f, "no \"{claim}\""),
            Weakness::PersonalData { claim } => {
                write!(f, "{} looks like personal data or a secret; whoever holds the token can read it", shown(claim))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::keyring::jwk::{Kid, PublicJwk};

    const NOW: Timestamp = Timestamp::from_secs(1_800_000_000);
    const ISSUER: &str = "https://auth.example.com";

    fn signing_key() -> ed25519_dalek::SigningKey {
        ed25519_dalek::SigningKey::from_bytes(&[7; 32])
    }

    fn published() -> Vec<ParsedJwk> {
        let public = PublicJwk::ed25519(signing_key().verifying_key().as_bytes()).unwrap();
        let algorithm = public.algorithm_named("EdDSA");
        vec![ParsedJwk { public, kid: Some(Kid("k1".into())), algorithm }]
    }

    fn header() -> Value {
        json!({"alg": "EdDSA", "kid": "k1", "typ": "JWT"})
    }

    fn claims() -> Value {
        json!({"iss": ISSUER, "aud": ["a", "b"], "sub": "s", "iat": 1_800_000_000, "nbf": 1_800_000_000,
               "exp": 1_800_000_300})
    }

    fn signed_text(header: &str, payload: &str) -> String {
        use ed25519_dalek::Signer;
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
        let signature = signing_key().sign(input.as_bytes());
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
    }

    fn signed(header: &Value, claims: &Value) -> String {
        signed_text(&header.to_string(), &claims.to_string())
    }

    fn check(token: &str) -> Result<Claims, TokenError> {
        verify_token(token, &published(), NOW, ISSUER, Some("b"), Span::ZERO)
    }

    fn with(mut value: Value, member: &str, new: impl Into<Value>) -> Value {
        value[member] = new.into();
        value
    }

    fn without(mut value: Value, member: &str) -> Value {
        value.as_object_mut().unwrap().remove(member);
        value
    }

    #[test]
    fn a_good_token_gives_its_claims() {
        assert_eq!(Value::Object(check(&signed(&header(), &claims())).unwrap()), claims());
        assert!(check(&signed(&header(), &with(claims(), "aud", "b"))).is_ok());
    }

    #[test]
    fn headers_that_try_to_choose_how_they_are_verified_are_refused() {
        use TokenError as E;
        let cases = [
            (with(header(), "alg", "none"), E::Unsigned),
            (with(header(), "alg", "nOnE"), E::Unsigned),
            (with(header(), "alg", "HS256"), E::Symmetric { alg: "\"HS256\"".into() }),
            (with(header(), "alg", "ES256"), E::OtherAlgorithm { token: "\"ES256\"".into(), key: "EdDSA" }),
            (with(header(), "alg", "Ed25519"), E::OtherAlgorithm { token: "\"Ed25519\"".into(), key: "EdDSA" }),
            (with(header(), "alg", 1), E::NoAlg),
            (without(header(), "alg"), E::NoAlg),
            (with(header(), "crit", json!(["exp"])), E::Critical),
            (with(header(), "b64", false), E::Critical),
            (with(header(), "jwk", json!({})), E::EmbeddedKey { member: "jwk" }),
            (with(header(), "jku", "https://e"), E::EmbeddedKey { member: "jku" }),
            (with(header(), "x5u", "https://e"), E::EmbeddedKey { member: "x5u" }),
            (with(header(), "x5c", json!([])), E::EmbeddedKey { member: "x5c" }),
            (without(header(), "kid"), E::NoKid),
            (with(header(), "kid", json!(["k1"])), E::NoKid),
            (with(header(), "kid", "k2"), E::UnknownKid { kid: "\"k2\"".into() }),
        ];
        for (header, expected) in cases {
            assert_eq!(check(&signed(&header, &claims())), Err(expected), "{header}");
        }
    }

    #[test]
    fn a_kid_that_two_keys_have_chooses_none() {
        let keys = [published(), published()].concat();
        let token = signed(&header(), &claims());
        let result = verify_token(&token, &keys, NOW, ISSUER, None, Span::ZERO);
        assert_eq!(result, Err(TokenError::AmbiguousKid { kid: "\"k1\"".into() }));
    }

    #[test]
    fn a_key_without_alg_serves_the_one_algorithm_it_can() {
        let mut keys = published();
        keys[0].algorithm = None;
        for alg in ["EdDSA", "Ed25519"] {
            let token = signed(&with(header(), "alg", alg), &claims());
            assert!(verify_token(&token, &keys, NOW, ISSUER, None, Span::ZERO).is_ok());
        }
        let token = signed(&with(header(), "alg", "RS256"), &claims());
        assert!(matches!(
            verify_token(&token, &keys, NOW, ISSUER, None, Span::ZERO),
            Err(TokenError::OtherAlgorithm { .. })
        ));
        let n = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw";
        let rsa = PublicJwk::from_jwk_json(&json!({"kty": "RSA", "kid": "k1", "n": n, "e": "AQAB"})).unwrap();
        let result = verify_token(&token, &[rsa], NOW, ISSUER, None, Span::ZERO);
        assert_eq!(result, Err(TokenError::KeyWithoutAlg));
    }

    #[test]
    fn malformed_tokens_are_refused_without_panic() {
        let good = signed(&header(), &claims());
        let (input, signature) = good.rsplit_once('.').unwrap();
        for token in ["", ".", "..", "a.b", "a.b.c.d", "é.é.é", " . . ", &format!("{good}."), &format!("{good}\n")] {
            assert!(check(token).is_err(), "{token:?}");
        }
        assert_eq!(check(&"a".repeat(MAX_TOKEN_BYTES + 1)), Err(TokenError::TooLong));
        assert_eq!(check(&format!("{good}=")), Err(TokenError::NotBase64url { segment: "signature" }));
        // The last character of 64 bytes carries two bits of data: with another low bit the bytes stay the same.
        let twin = signature.replace(signature.chars().last().unwrap(), "B");
        assert!(check(&format!("{input}.{twin}")).is_err());
        for header in ["[]", "null", "\"EdDSA\"", "{", r#"{"alg":"EdDSA","kid":"k1","alg":"EdDSA"}"#] {
            let result = check(&signed_text(header, &claims().to_string()));
            assert!(matches!(result, Err(TokenError::NotAnObject { segment: "header", .. })), "{header}");
        }
        for payload in ["foo", "[]", r#"{"exp":1,"exp":2}"#] {
            let result = check(&signed_text(&header().to_string(), payload));
            assert!(matches!(result, Err(TokenError::NotAnObject { segment: "payload", .. })), "{payload}");
        }
    }

    #[test]
    fn every_changed_character_breaks_the_token() {
        let good = signed(&header(), &claims());
        for at in 0..good.len() {
            let mut bytes = good.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'Q' } else { b'A' };
            assert!(check(std::str::from_utf8(&bytes).unwrap()).is_err(), "position {at}");
        }
    }

    #[test]
    fn times_are_compared_as_rfc_7519_says() {
        let at = |now: i64, leeway: i64| {
            let token = signed(&header(), &claims());
            verify_token(&token, &published(), Timestamp::from_secs(now), ISSUER, None, Span::from_secs(leeway))
        };
        let (from, exp) = (1_800_000_000, 1_800_000_300);
        assert!(at(from, 0).is_ok());
        assert!(at(exp - 1, 0).is_ok());
        assert_eq!(at(exp, 0), Err(TokenError::Expired { at: Timestamp::from_secs(exp) }));
        assert_eq!(at(from - 1, 0), Err(TokenError::NotYetValid { from: Timestamp::from_secs(from) }));
        assert!(at(exp + 59, 60).is_ok());
        assert!(at(exp + 60, 60).is_err());
        assert!(at(from - 60, 60).is_ok());
        assert!(at(from - 61, 60).is_err());
    }

    #[test]
    fn claims_of_the_wrong_type_or_value_are_refused_by_name() {
        for (changed, part) in [
            (without(claims(), "exp"), "\"exp\""),
            (with(claims(), "exp", "1800000300"), "\"exp\""),
            (with(claims(), "exp", Value::Null), "\"exp\""),
            (with(claims(), "nbf", json!([1])), "\"nbf\""),
            (with(claims(), "iat", "now"), "\"iat\""),
            (without(claims(), "iss"), "\"iss\""),
            (with(claims(), "iss", json!([ISSUER])), "\"iss\""),
            (with(claims(), "iss", "https://evil.example"), "evil"),
            (without(claims(), "aud"), "\"aud\""),
            (with(claims(), "aud", json!(["b", 1])), "\"aud\""),
            (with(claims(), "aud", "c"), "audience"),
            (with(claims(), "exp", -1), "expired"),
            (with(claims(), "exp", -1e300), "expired"),
        ] {
            let message = check(&signed(&header(), &changed)).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(check(&signed(&header(), &with(claims(), "exp", 1_800_000_000.5))).is_ok());
        assert!(check(&signed(&header(), &with(claims(), "exp", 1e300))).is_ok());
    }

    #[test]
    fn inspection_names_every_weakness() {
        let decoded = |header: Value, claims: Value| decode(&signed(&header, &claims)).unwrap();
        assert_eq!(weaknesses(&decoded(header(), claims()), NOW), []);
        let weak = decoded(
            json!({"alg": "none", "jwk": {}, "crit": ["x"]}),
            json!({"aud": [], "user": {"E-Mail": "a@b", "ids": [{"SSN": "1"}]}, "email_verified": true, "iat": "x"}),
        );
        use Weakness as W;
        assert_eq!(
            weaknesses(&weak, NOW),
            [
                W::Unsigned,
                W::Critical,
                W::EmbeddedKey { member: "jwk" },
                W::NoKid,
                W::NoTyp,
                W::MalformedTime { claim: "iat" },
                W::NoExpiry,
                W::MissingClaim { claim: "iss" },
                W::MissingClaim { claim: "aud" },
                W::MissingClaim { claim: "sub" },
                W::PersonalData { claim: "user.E-Mail".into() },
                W::PersonalData { claim: "user.ids.SSN".into() },
            ]
        );
        let hs = decoded(with(header(), "alg", "HS256"), with(claims(), "exp", 1_800_086_401));
        let life = Span::DAY + Span::SECOND;
        assert_eq!(weaknesses(&hs, NOW), [W::Symmetric { alg: "\"HS256\"".into() }, W::LongLife { life }]);
        let odd = decoded(with(header(), "alg", "ES512"), with(claims(), "nbf", 1_800_000_001));
        assert_eq!(
            weaknesses(&odd, NOW),
            [
                W::UnknownAlgorithm { alg: "\"ES512\"".into() },
                W::NotYetValid { from: Timestamp::from_secs(1_800_000_001) }
            ]
        );
        let old = weaknesses(&decoded(header(), claims()), NOW + Span::HOUR);
        assert_eq!(old, [W::Expired { at: Timestamp::from_secs(1_800_000_300) }]);
        for weakness in weaknesses(&weak, NOW).iter().chain(&old) {
            assert!(!weakness.to_string().is_empty());
        }
    }
}
