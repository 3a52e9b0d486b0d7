//! A verifier that gives a rotating issuer no slack: it holds each document for as long as it may, never looks again
//! because of an unknown kid, allows no leeway, and shares no code with the daemon.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::{self, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;
use thiserror::Error;
use tokio::time::Instant;

use super::unix_now;

/// What a token must say to be accepted.
#[derive(Clone, Debug)]
pub struct Expected {
    pub iss: String,
    pub aud: String,
    pub alg: String,
}

pub struct StrictVerifier {
    jwks_url: String,
    /// How long this verifier holds a document beyond the time its `max-age` allows a cache in front to hold it.
    slowest: Duration,
    http: reqwest::Client,
    held: Option<Document>,
}

/// A fetched JWKS.
struct Document {
    held_until: Instant,
    keys: BTreeMap<String, Value>,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum Rejection {
    #[error("the document: {0}")]
    Document(String),
    #[error("malformed: {0}")]
    Malformed(&'static str),
    #[error("alg is {0}")]
    Algorithm(String),
    #[error("no key {0} in the document held")]
    UnknownKid(String),
    #[error("signature")]
    Signature,
    #[error("iss is {0}")]
    Issuer(String),
    #[error("aud is {0}")]
    Audience(String),
    #[error("not yet valid")]
    NotYetValid,
    #[error("expired")]
    Expired,
}

impl StrictVerifier {
    pub fn new(jwks_url: String, slowest: Duration) -> Self {
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build();
        StrictVerifier { jwks_url, slowest, http: http.expect("a client without TLS set-up"), held: None }
    }

    /// Verifies a compact JWS as RFC 7519 §7.2 and RFC 8725 ask, against the document held.
    pub async fn verify(&mut self, token: &str, expected: &Expected) -> Result<Value, Rejection> {
        let [header, payload, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            return Err(Rejection::Malformed("not three parts"));
        };
        let (header, claims) = (object(header)?, object(payload)?);
        if header["alg"] != expected.alg {
            return Err(Rejection::Algorithm(header["alg"].to_string()));
        }
        let kid = header["kid"].as_str().ok_or(Rejection::Malformed("no kid"))?;
        let key = self.keys().await?.get(kid).ok_or_else(|| Rejection::UnknownKid(kid.to_owned()))?;
        let signed = &token[..token.len() - signature.len() - 1];
        verify_signature(key, &expected.alg, signed.as_bytes(), &decode(signature)?)?;
        check_claims(&claims, expected)?;
        Ok(claims)
    }

    /// Fetches a document now, unless one is held.
    pub async fn hold_a_document(&mut self) -> Result<(), Rejection> {
        self.keys().await.map(drop)
    }

    async fn keys(&mut self) -> Result<&BTreeMap<String, Value>, Rejection> {
        let now = Instant::now();
        let held = match self.held.take() {
            Some(document) if now < document.held_until => document,
            _ => self.fetch(now).await?,
        };
        Ok(&self.held.insert(held).keys)
    }

    async fn fetch(&self, asked_at: Instant) -> Result<Document, Rejection> {
        let refused = |what: String| Rejection::Document(format!("{}: {what}", self.jwks_url));
        let response = self.http.get(&self.jwks_url).send().await.map_err(|error| refused(format!("{error:?}")))?;
        if response.status() != 200 {
            return Err(refused(format!("status {}", response.status())));
        }
        let header =
            |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if header("content-type") != "application/jwk-set+json" {
            return Err(refused(format!("content type {:?}", header("content-type"))));
        }
        let max_age = max_age(header("cache-control"))
            .ok_or_else(|| refused(format!("no max-age in Cache-Control {:?}", header("cache-control"))))?;
        let document: Value = response.json().await.map_err(|error| refused(format!("{error:?}")))?;
        let mut keys = BTreeMap::new();
        for key in document["keys"].as_array().ok_or_else(|| refused("no keys".to_owned()))? {
            let kid = key["kid"].as_str().ok_or_else(|| refused(format!("a key without kid: {key}")))?;
            if key["use"] != "sig"
                || ["d", "p", "q", "dp", "dq", "qi", "k", "priv"].iter().any(|m| key.get(m).is_some())
            {
                return Err(refused(format!("a key that has no place in it: {kid}")));
            }
            if keys.insert(kid.to_owned(), key.clone()).is_some() {
                return Err(refused(format!("two keys {kid}")));
            }
        }
        // Age counts from the request: a slow answer may be as old as that (RFC 9111 §4.2.3).
        Ok(Document { held_until: asked_at + max_age + self.slowest, keys })
    }
}

fn verify_signature(key: &Value, alg: &str, message: &[u8], signature: &[u8]) -> Result<(), Rejection> {
    if key["alg"] != alg {
        return Err(Rejection::Algorithm(key["alg"].to_string()));
    }
    let member = |name: &str| decode(key[name].as_str().unwrap_or_default());
    let point = || Ok([vec![4], member("x")?, member("y")?].concat());
    let modulus = || Ok(PublicKeyComponents { n: member("n")?, e: member("e")? });
    let verified = match (alg, key["kty"].as_str(), key["crv"].as_str()) {
        ("ES256", Some("EC"), Some("P-256")) => {
            UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point()?).verify(message, signature)
        }
        ("ES384", Some("EC"), Some("P-384")) => {
            UnparsedPublicKey::new(&signature::ECDSA_P384_SHA384_FIXED, point()?).verify(message, signature)
        }
        ("RS256", Some("RSA"), None) => modulus()?.verify(&signature::RSA_PKCS1_2048_8192_SHA256, message, signature),
        ("PS256", Some("RSA"), None) => modulus()?.verify(&signature::RSA_PSS_2048_8192_SHA256, message, signature),
        ("EdDSA" | "Ed25519", Some("OKP"), Some("Ed25519")) => {
            UnparsedPublicKey::new(&signature::ED25519, member("x")?).verify(message, signature)
        }
        _ => return Err(Rejection::Document(format!("{key} is not a key for {alg}"))),
    };
    verified.map_err(|_| Rejection::Signature)
}

fn check_claims(claims: &Value, expected: &Expected) -> Result<(), Rejection> {
    if claims["iss"] != expected.iss {
        return Err(Rejection::Issuer(claims["iss"].to_string()));
    }
    let audiences = claims["aud"].as_array().map_or(std::slice::from_ref(&claims["aud"]), Vec::as_slice);
    if !audiences.contains(&Value::from(expected.aud.as_str())) {
        return Err(Rejection::Audience(claims["aud"].to_string()));
    }
    let seconds = |name| claims[name].as_u64().map(Duration::from_secs);
    let (nbf, exp) = (seconds("nbf").unwrap_or_default(), seconds("exp").ok_or(Rejection::Malformed("no exp"))?);
    match unix_now() {
        now if now < nbf => Err(Rejection::NotYetValid),
        now if now >= exp => Err(Rejection::Expired),
        _ => Ok(()),
    }
}

fn max_age(cache_control: &str) -> Option<Duration> {
    let seconds = cache_control.split(',').find_map(|directive| directive.trim().strip_prefix("max-age="))?;
    seconds.parse().ok().map(Duration::from_secs)
}

fn object(part: &str) -> Result<Value, Rejection> {
    serde_json::from_slice(&decode(part)?).map_err(|_| Rejection::Malformed("not JSON"))
}

fn decode(part: &str) -> Result<Vec<u8>, Rejection> {
    URL_SAFE_NO_PAD.decode(part).map_err(|_| Rejection::Malformed("not base64url"))
}
