//! What is served where verifiers fetch, held against what an issuer publishes.

use std::collections::BTreeSet;
use std::fmt;

use serde_json::Value;

use super::jwk::{PublishedEntry, PublishedKey};
use super::policy::IssuerPolicy;
use super::record::{Key, Keyring};
use super::time::{Span, Timestamp};

/// How a served document differs from the published one, although every declared cache has run out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Discrepancy {
    /// It is no JWK Set (RFC 7517 §5).
    Unreadable,
    /// A key that is not ours.
    Foreign { kid: String },
    /// A key of ours with other members.
    Tampered { kid: String },
    /// A kid that stands there more than once.
    Repeated { kid: String },
    /// A key that was retired or revoked.
    Ended { kid: String },
    /// A key of ours is not there.
    Missing { kid: String },
}

impl fmt::Display for Discrepancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Discrepancy::Unreadable => f.write_str("what is served is no JWK Set"),
            Discrepancy::Foreign { kid } => write!(f, "key {kid} is not ours"),
            Discrepancy::Tampered { kid } => write!(f, "key {kid} has other members than ours"),
            Discrepancy::Repeated { kid } => write!(f, "kid {kid} stands there more than once"),
            Discrepancy::Ended { kid } => write!(f, "key {kid} has ended and is still served"),
            Discrepancy::Missing { kid } => write!(f, "key {kid} is missing"),
        }
    }
}

/// A document that somebody served.
pub struct Served {
    keys: Option<Vec<Value>>,
}

impl Served {
    pub fn parse(body: &[u8]) -> Self {
        let parsed = serde_json::from_slice::<Value>(body).ok();
        let keys = parsed.and_then(|mut document| match document.get_mut("keys").map(Value::take) {
            Some(Value::Array(keys)) => Some(keys),
            _ => None,
        });
        Served { keys }
    }

    /// Whether it has the key with exactly the members that are published.
    pub fn shows(&self, key: &Key) -> bool {
        let published = published(key);
        self.keys.iter().flatten().any(|served| *served == published)
    }

    /// Everything that no cache can explain at `now`. `keyrings` are all of the issuer's, `since` tells since when a
    /// key was publicly served.
    pub fn discrepancies(&self, keyrings: &[&Keyring], policy: &IssuerPolicy, now: Timestamp) -> BTreeSet<Discrepancy> {
        let Some(served) = &self.keys else { return BTreeSet::from([Discrepancy::Unreadable]) };
        let skew = keyrings.iter().map(|keyring| keyring.policy.rotation.clock_skew).max().unwrap_or(Span::ZERO);
        let lag = keyrings.iter().map(|keyring| keyring.policy.rotation.publish_lag).max().unwrap_or(Span::ZERO);
        let explained = policy.cache_span() + skew + lag;
        let ours: Vec<&Key> = keyrings.iter().flat_map(|keyring| &keyring.keys).collect();
        let mut found = BTreeSet::new();
        let mut kids = BTreeSet::new();
        for key in served {
            let kid = key["kid"].as_str().unwrap_or_default().to_owned();
            if !kids.insert(kid.clone()) {
                found.insert(Discrepancy::Repeated { kid: kid.clone() });
            }
            let Some(own) = ours.iter().find(|own| own.kid.as_str() == kid) else {
                found.insert(Discrepancy::Foreign { kid });
                continue;
            };
            if *key != published(own) {
                found.insert(Discrepancy::Tampered { kid });
            } else if !own.state.is_published() && own.entered_at + explained < now {
                found.insert(Discrepancy::Ended { kid });
            }
        }
        for own in ours.iter().filter(|own| own.state.is_published()) {
            let due = own.published_at.is_some_and(|published| published + explained < now);
            if due && !kids.contains(own.kid.as_str()) {
                found.insert(Discrepancy::Missing { kid: own.kid.to_string() });
            }
        }
        found
    }
}

/// The key as the JWKS shows it.
fn published(key: &Key) -> Value {
    let entry = PublishedEntry { kid: &key.kid, algorithm: key.algorithm, public: &key.public };
    serde_json::to_value(PublishedKey::from(entry))
        .expect("strings serialise, and library keys have no private members")
}

/// What a served answer says of how long it may be held: RFC 9111 §5.1 (`Age`) and §5.2 (`Cache-Control`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheHeaders {
    pub age: Option<String>,
    pub cache_control: Option<String>,
}

impl CacheHeaders {
    /// Why caches may hold the document for longer than declared, if they may.
    pub fn excess(&self, policy: &IssuerPolicy) -> Option<String> {
        let declared = policy.caches.iter().copied().sum::<Span>();
        if let Some(age) = self.age.as_deref().and_then(seconds)
            && age > declared
        {
            return Some(format!("Age is {age}, the declared caches hold for {declared}"));
        }
        // Any one layer may tell the next how long to hold it.
        let longest = policy.caches.iter().copied().max().unwrap_or(Span::ZERO).max(policy.max_age);
        let directives = self.cache_control.iter().flat_map(|value| value.split(','));
        for directive in directives {
            let (name, value) = directive.trim().split_once('=').unwrap_or((directive.trim(), ""));
            let bound = match name.to_ascii_lowercase().as_str() {
                "max-age" | "s-maxage" => longest,
                "stale-while-revalidate" | "stale-if-error" => policy.stale_if_error,
                _ => continue,
            };
            if let Some(given) = seconds(value.trim_matches('"'))
                && given > bound
            {
                return Some(format!("Cache-Control says {name}={}, declared is {bound}", given.as_secs()));
            }
        }
        None
    }
}

fn seconds(text: &str) -> Option<Span> {
    text.trim().parse::<u32>().ok().map(|seconds| Span::from_secs(i64::from(seconds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::policy::Discovery;

    fn policy() -> IssuerPolicy {
        IssuerPolicy {
            name: crate::keyring::name::Name::parse("main").unwrap(),
            url: "https://auth.example.com".to_owned(),
            max_age: Span::MINUTE,
            stale_if_error: Span::from_secs(30),
            caches: vec![Span::MINUTE, Span::from_secs(20)],
            jwks_paths: Vec::new(),
            discovery: Discovery::Off,
            probes: Vec::new(),
        }
    }

    fn excess(age: &str, cache_control: &str) -> Option<String> {
        let header = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        CacheHeaders { age: header(age), cache_control: header(cache_control) }.excess(&policy())
    }

    #[test]
    fn headers_within_the_declared_caches_are_fine() {
        for (age, cache_control) in [
            ("", ""),
            ("80", "public, max-age=60"),
            ("0", "MAX-AGE=60, s-maxage=60, stale-if-error=30"),
            ("x", "max-age=x"),
        ] {
            assert_eq!(excess(age, cache_control), None, "{age} {cache_control}");
        }
    }

    #[test]
    fn headers_beyond_the_declared_caches_are_named() {
        for (age, cache_control, wanted) in [
            ("81", "", "Age is 1m21s, the declared caches hold for 1m20s"),
            ("", "public, max-age=61", "Cache-Control says max-age=61, declared is 1m"),
            ("", "S-MaxAge=3600", "Cache-Control says S-MaxAge=3600, declared is 1m"),
            (
                "",
                "max-age=60, stale-while-revalidate=31",
                "Cache-Control says stale-while-revalidate=31, declared is 30s",
            ),
        ] {
            assert_eq!(excess(age, cache_control).as_deref(), Some(wanted));
        }
    }
}
