//! Verifiers as users run them: a shared HTTP cache, caches of their own, clocks of their own. They know the JWKS as
//! bytes and check signatures with `jsonwebtoken`.

use std::collections::{HashMap, HashSet};

use jsonwebtoken::{DecodingKey, Validation, decode};
use jwksd::keyring::time::{Span, Timestamp};
use serde_json::Value;

/// Keys of a fetched document by kid.
type Keys = HashMap<String, Jwk>;

struct Jwk {
    alg: String,
    /// Tells keys apart.
    coordinates: String,
    key: DecodingKey,
}

/// Signatures that were checked: the same token under the same key is good for every verifier.
#[derive(Default)]
pub struct Checked(HashSet<(String, String)>);

impl Checked {
    fn verify(&mut self, token: &str, jwk: &Jwk) -> bool {
        let pair = (token.to_owned(), jwk.coordinates.clone());
        if self.0.contains(&pair) {
            return true;
        }
        let mut validation = Validation::new(jwk.alg.parse().unwrap());
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        decode::<Value>(token, &jwk.key, &validation).is_ok() && self.0.insert(pair)
    }
}

/// What the public listener answers at this moment; `None` when it does not, or with 503.
#[derive(Clone)]
pub struct Served {
    pub body: Vec<u8>,
    pub max_age: Span,
    pub stale_if_error: Span,
}

/// The caching layer in front of the daemon, which keeps a document for as long as it may.
#[derive(Default)]
pub struct HttpCache {
    held: Option<(Timestamp, Served)>,
}

impl HttpCache {
    pub fn fetch(&mut self, now: Timestamp, origin: Option<&Served>) -> Option<Served> {
        if let Some((at, held)) = &self.held
            && now < *at + held.max_age
        {
            return Some(held.clone());
        }
        match origin {
            Some(served) => self.held = Some((now, served.clone())),
            None => self.held = self.held.take().filter(|(at, held)| now < *at + held.max_age + held.stale_if_error),
        }
        self.held.as_ref().map(|(_, held)| held.clone())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    /// Not valid yet, or no longer, by the verifier's clock.
    NotLive,
    /// It has no document that it may use, and cannot get one.
    NoDocument,
    UnknownKey,
    BadSignature,
}

pub struct Verifier {
    pub name: &'static str,
    /// How long it keeps a document.
    pub cache: Span,
    /// How far its clock is ahead, in milliseconds.
    pub ahead: i64,
    pub refetches: bool,
    held: Option<(Timestamp, Keys)>,
}

impl Verifier {
    pub fn new(name: &'static str, cache: Span, ahead: i64, refetches: bool) -> Self {
        Verifier { name, cache, ahead, refetches, held: None }
    }

    /// Judges a token at `now` of true time.
    pub fn verify(
        &mut self,
        token: &str,
        (nbf, exp): (i64, i64),
        now: Timestamp,
        checked: &mut Checked,
        mut fetch: impl FnMut() -> Option<Served>,
    ) -> Verdict {
        let clock = now.as_millis() + self.ahead;
        if clock < nbf * 1000 || clock >= exp * 1000 {
            return Verdict::NotLive;
        }
        if self.held.as_ref().is_some_and(|(at, _)| now >= *at + self.cache) {
            self.held = None;
        }
        if self.held.is_none() {
            self.held = fetch().map(|served| (now, parse(&served.body)));
        }
        let kid = jsonwebtoken::decode_header(token).unwrap().kid.unwrap();
        let known = |held: &Option<(Timestamp, HashMap<_, _>)>| held.as_ref().map(|(_, keys)| keys.contains_key(&kid));
        if known(&self.held) == Some(false)
            && self.refetches
            && let Some(served) = fetch()
        {
            self.held = Some((now, parse(&served.body)));
        }
        let Some((_, keys)) = &self.held else { return Verdict::NoDocument };
        let Some(jwk) = keys.get(&kid) else { return Verdict::UnknownKey };
        if checked.verify(token, jwk) { Verdict::Accepted } else { Verdict::BadSignature }
    }
}

/// The kids in a served document.
pub fn kids(body: &[u8]) -> Vec<String> {
    parse(body).into_keys().collect()
}

fn parse(body: &[u8]) -> Keys {
    let document: Value = serde_json::from_slice(body).unwrap();
    let entry = |jwk: &Value| {
        let text = |member: &str| jwk[member].as_str().unwrap().to_owned();
        let key = DecodingKey::from_ec_components(&text("x"), &text("y")).unwrap();
        (text("kid"), Jwk { alg: text("alg"), coordinates: text("x") + &text("y"), key })
    };
    let keys: Keys = document["keys"].as_array().unwrap().iter().map(entry).collect();
    assert_eq!(keys.len(), document["keys"].as_array().unwrap().len(), "two keys of one kid");
    keys
}
