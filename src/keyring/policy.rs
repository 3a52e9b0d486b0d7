//! The policy of a keyset: everything a decision or a signature depends on. The policy in force is stored in the
//! keyring, so that a broken configuration changes nothing.

use serde::{Deserialize, Serialize};

use super::algorithm::Algorithm;
use super::name::Name;
use super::schedule::Schedule;
use super::time::Span;

/// What one keyset is to do. Built by validation from the configuration; stored in the keyring once adopted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub issuer: IssuerPolicy,
    pub algorithm: Algorithm,
    /// Name of the backend that makes and uses the private keys.
    pub backend: String,
    pub rotation: RotationPolicy,
    pub tokens: TokenPolicy,
}

/// How an issuer publishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerPolicy {
    pub name: Name,
    /// The `iss` of every token, without a trailing slash unless configured so.
    pub url: String,
    pub max_age: Span,
    pub stale_if_error: Span,
    /// One entry per caching layer between the daemon and the verifiers.
    pub caches: Vec<Span>,
    /// Further absolute paths at which the same document is served.
    pub jwks_paths: Vec<String>,
    pub discovery: Discovery,
    /// Where verifiers fetch the document: a waiting key counts as published only while all of these show it.
    #[serde(default)]
    pub probes: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Discovery {
    #[default]
    Minimal,
    Off,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationPolicy {
    pub schedule: Schedule,
    /// How long a key is published before it may sign.
    pub propagation: Span,
    /// Keys that wait published behind the active one.
    pub successors: u32,
    pub overlap_extra: Span,
    pub bootstrap: Bootstrap,
    pub verifiers: Vec<Verifier>,
    /// σ, the largest difference between any two clocks involved.
    pub clock_skew: Span,
    /// S, how long a replica may sign unconfirmed; zero for the file store.
    pub staleness_limit: Span,
    /// How late a replica may publish what another wrote; zero for the file store.
    pub publish_lag: Span,
}

/// What a keyset that is not first at its issuer does before its first key was published for `propagation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bootstrap {
    #[default]
    Wait,
    Immediate,
}

/// A declared verifier and how it caches at its slowest (beyond the `caches` in front of it).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verifier {
    pub name: String,
    /// The longest until it sees a new key.
    pub sees_new: Span,
    /// The longest until it forgets a removed key; `None`: not before a restart or an unknown kid.
    pub keeps_old: Option<Span>,
}

/// What a token of the keyset may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenPolicy {
    /// Whole seconds, at least one.
    pub max_ttl: Span,
    pub default_ttl: Span,
    pub required_claims: Vec<String>,
    /// Matched at any depth, in any case.
    pub forbidden_claims: Vec<String>,
    /// The only values `aud` may have; empty: any.
    pub audiences: Vec<String>,
    /// The `typ` headers a caller may ask for; the first is the default.
    pub types: Vec<String>,
    /// Moves `iat` and `nbf` into the past, for verifiers with slow clocks and no leeway.
    pub backdate: Span,
}

impl IssuerPolicy {
    /// How long a fetched document may stay in caches: the sum of the layers and `stale-if-error`.
    pub fn cache_span(&self) -> Span {
        self.caches.iter().copied().sum::<Span>() + self.stale_if_error
    }

    /// The path of the issuer's URL without a trailing slash: `` or `/tenant-a`.
    pub fn path(&self) -> &str {
        let after_scheme = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        after_scheme.find('/').map_or("", |at| after_scheme[at..].trim_end_matches('/'))
    }

    /// Where the key set is published, relative to the origin.
    pub fn jwks_path(&self) -> String {
        format!("{}/.well-known/jwks.json", self.path())
    }
}

impl RotationPolicy {
    /// The slowest declared verifier's time to see a new key.
    pub fn slowest_verifier(&self) -> Span {
        self.verifiers.iter().map(|v| v.sees_new).max().unwrap_or(Span::ZERO)
    }
}

impl Policy {
    /// How long until everyone who caches as declared sees a change: caches, the slowest verifier, publish lag and σ.
    /// The least that `propagation` may be (DESIGN §4).
    pub fn visibility_window(&self) -> Span {
        self.issuer.cache_span()
            + self.rotation.slowest_verifier()
            + self.rotation.publish_lag
            + self.rotation.clock_skew
    }

    /// How long a replica that nobody confirms may go on publishing what it has: whoever fetches that at the very end
    /// still sees each new key before it signs (DESIGN §3.8).
    pub fn publishing_limit(&self) -> Span {
        let others = self.visibility_window().saturating_sub(self.rotation.publish_lag);
        self.rotation.propagation.saturating_sub(others)
    }

    /// `overlap = max_ttl + 2σ + S + overlap_extra`, for a key that never was allowed longer tokens.
    pub fn overlap(&self) -> Span {
        self.tokens.max_ttl + self.overlap_margin()
    }

    /// The part of the overlap that does not depend on token lives: `2σ + S + overlap_extra`.
    pub fn overlap_margin(&self) -> Span {
        self.rotation.clock_skew.times(2) + self.rotation.staleness_limit + self.rotation.overlap_extra
    }
}
