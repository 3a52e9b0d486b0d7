//! What is known of verifiers: how long their caches take to see a new key and to forget a removed one, at their
//! defaults, and which algorithms they read.
//!
//! The figures were read in the products' sources and documentation in November 2026. A deployment that changed a
//! default declares `{ name, cache }` instead.

use std::fmt;

use super::algorithm::Algorithm;
use super::policy::Verifier;
use super::time::Span;

/// A product that verifies tokens, at its defaults.
#[derive(Debug)]
pub struct Preset {
    /// How configuration calls it.
    pub name: &'static str,
    /// What it is, for people.
    pub product: &'static str,
    /// The longest until it sees a new key, beyond the caches in front of it.
    pub new: CacheTime,
    /// The longest until it forgets a removed key without a restart.
    pub old: CacheTime,
    /// Worth knowing before relying on the figures.
    pub note: Option<&'static str>,
    /// The `alg`s it can read; `None`: nothing is known, so nothing is refused.
    reads: Option<&'static [&'static str]>,
    /// The `alg`s that make it reject a whole JWKS in which they occur.
    chokes_on: &'static [&'static str],
    /// The only `alg`s it accepts until it is told otherwise.
    pins: Option<&'static [&'static str]>,
}

/// How long a verifier's cache holds what it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheTime {
    Within(Span),
    /// As long as our `Cache-Control: max-age` says.
    MaxAge,
    /// The longer of the two.
    MaxAgeOr(Span),
    /// Until an unknown kid makes it fetch again, or a restart.
    Unbounded,
    /// It reads a static file: until somebody replaces that.
    Manual,
    /// Nobody measured it.
    Unknown,
}

/// A declared verifier whose cache has no figure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifierError {
    #[error(
        "`{name}` is not a known verifier: write one that `jwksd verifiers` lists, a duration such as \"36h\", or \
         {{ name = \"{name}\", cache = \"1h\" }}"
    )]
    Unknown { name: String },
    #[error(
        "{name} reads its keys from a static file, so no cache time covers it: replace the file at least once per \
         rotation.propagation and declare {{ name = \"{name}\", cache = \"24h\" }} with the longest time that takes"
    )]
    Manual { name: &'static str },
    #[error("how long {name} caches is not known: measure it and declare {{ name = \"{name}\", cache = \"1h\" }}")]
    Unmeasured { name: &'static str },
}

/// Every known verifier, in the order of the README's table.
pub fn presets() -> &'static [Preset] {
    PRESETS
}

/// The verifier that configuration calls `name`.
pub fn preset(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// A declared verifier at its defaults, for an issuer that publishes with `max_age`: `sees_new` is the NEW column,
/// `keeps_old` the OLD one (`None`: unbounded).
///
/// # Errors
/// When `name` is no preset, or one without a figure for new keys (static files, unmeasured products).
pub fn resolve(name: &str, max_age: Span) -> Result<Verifier, VerifierError> {
    let preset = preset(name).ok_or_else(|| VerifierError::Unknown { name: name.chars().take(80).collect() })?;
    let sees_new = match preset.new {
        CacheTime::Manual | CacheTime::Unbounded => return Err(VerifierError::Manual { name: preset.name }),
        CacheTime::Unknown => return Err(VerifierError::Unmeasured { name: preset.name }),
        bounded => bounded.span(max_age).unwrap_or(max_age),
    };
    Ok(Verifier { name: preset.name.to_owned(), sees_new, keeps_old: preset.old.span(max_age) })
}

impl Preset {
    /// Whether it can verify tokens of `algorithm`; true when nothing is known to the contrary.
    pub fn reads(&self, algorithm: Algorithm) -> bool {
        self.reads.is_none_or(|reads| reads.contains(&algorithm.alg())) && !self.chokes_on(algorithm)
    }

    /// Whether a key of `algorithm` makes it reject every key beside it.
    pub fn chokes_on(&self, algorithm: Algorithm) -> bool {
        self.chokes_on.contains(&algorithm.alg())
    }

    /// The algorithms it is told to trust by default, where `algorithm` is not one of them.
    pub fn pinned_against(&self, algorithm: Algorithm) -> Option<&'static [&'static str]> {
        self.pins.filter(|pins| !pins.contains(&algorithm.alg()))
    }

    /// The `alg`s it can read, where that is known.
    pub fn known_algorithms(&self) -> Option<&'static [&'static str]> {
        self.reads
    }
}

impl CacheTime {
    /// The time for an issuer that publishes with `max_age`; `None` when it has no bound that we know.
    pub fn span(self, max_age: Span) -> Option<Span> {
        match self {
            CacheTime::Within(span) => Some(span),
            CacheTime::MaxAge => Some(max_age),
            CacheTime::MaxAgeOr(span) => Some(span.max(max_age)),
            CacheTime::Unbounded | CacheTime::Manual | CacheTime::Unknown => None,
        }
    }
}

/// `10m`, `max-age`, `max(30m, max-age)`, `∞`, `manual`, `unknown`.
impl fmt::Display for CacheTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CacheTime::Within(span) => span.fmt(f),
            CacheTime::MaxAge => f.write_str("max-age"),
            CacheTime::MaxAgeOr(span) => write!(f, "max({span}, max-age)"),
            CacheTime::Unbounded => f.write_str("∞"),
            CacheTime::Manual => f.write_str("manual"),
            CacheTime::Unknown => f.write_str("unknown"),
        }
    }
}

const fn secs(n: i64) -> CacheTime {
    CacheTime::Within(Span::from_secs(n))
}

const fn mins(n: i64) -> CacheTime {
    secs(n * 60)
}

const fn hours(n: i64) -> CacheTime {
    mins(n * 60)
}

const fn product(name: &'static str, product: &'static str, new: CacheTime, old: CacheTime) -> Preset {
    Preset { name, product, new, old, note: None, reads: None, chokes_on: &[], pins: None }
}

impl Preset {
    const fn note(self, note: &'static str) -> Self {
        Preset { note: Some(note), ..self }
    }

    const fn reading(self, algs: &'static [&'static str]) -> Self {
        Preset { reads: Some(algs), ..self }
    }

    const fn pinning(self, algs: &'static [&'static str]) -> Self {
        Preset { pins: Some(algs), ..self }
    }

    /// It rejects a JWKS that contains one `kty`, `alg` or `crv` it does not know. Of ours that is the label of
    /// RFC 9864, which is younger than these libraries.
    const fn all_or_nothing(self) -> Self {
        Preset { chokes_on: &["Ed25519"], ..self }
    }
}

const RS256: &[&str] = &["RS256"];
const RSA: &[&str] = &["RS256", "PS256"];
const NO_EDWARDS: &[&str] = &["ES256", "ES384", "RS256", "PS256"];
/// Those that know Ed25519 by the label of RFC 8037 only.
const OLD_LABEL: &[&str] = &["ES256", "ES384", "RS256", "PS256", "EdDSA"];

const FROM_DISCOVERY: &str = "reads the accepted algorithms from discovery at start, else RS256 only";
const JWKS_RSA: &str = "keeps 5 keys";

use CacheTime::{Manual, MaxAge, MaxAgeOr, Unbounded, Unknown};

static PRESETS: &[Preset] = &[
    product("jose", "panva/jose (Node)", secs(30), mins(10)),
    product("jwks-rsa", "auth0 jwks-rsa (Node)", secs(0), mins(10)).note(JWKS_RSA),
    product("express-jwt", "express-jwt with jwks-rsa (Node)", secs(0), mins(10)).note(JWKS_RSA),
    product("fast-jwt", "fast-jwt with get-jwks (Node)", secs(0), secs(60)),
    product("get-jwks", "get-jwks (Node)", secs(0), secs(60)),
    product("aws-jwt-verify", "aws-jwt-verify (Node)", secs(10), Unbounded),
    product("pyjwt", "PyJWT PyJWKClient (Python)", secs(30), mins(5)).reading(OLD_LABEL),
    product("authlib", "Authlib (Python)", secs(0), Unbounded),
    product("nimbus", "Nimbus JOSE + JWT (Java)", secs(30), mins(5)),
    product("spring-security", "Spring Security (Java)", secs(0), mins(5))
        .pinning(RS256)
        .note("jwk-set-uri trusts RS256 only; issuer-uri reads the algorithms once at start"),
    product("spring-security-reactive", "Spring Security, reactive (Java)", secs(0), Unbounded)
        .pinning(RS256)
        .note("jwk-set-uri trusts RS256 only; issuer-uri reads the algorithms once at start"),
    product("jwks-rsa-java", "jwks-rsa-java", secs(0), hours(10)),
    product("microsoft-identity-model", "Microsoft.IdentityModel (.NET)", mins(5), mins(13 * 60 + 36)),
    product("go-oidc", "go-oidc v3", secs(0), Unbounded).all_or_nothing().note(FROM_DISCOVERY),
    product("vault", "HashiCorp Vault", secs(0), Unbounded).all_or_nothing().note(FROM_DISCOVERY),
    product("openbao", "OpenBao", secs(0), Unbounded).all_or_nothing().note(FROM_DISCOVERY),
    product("oauth2-proxy", "oauth2-proxy", secs(0), Unbounded).all_or_nothing().note(FROM_DISCOVERY),
    product("go-oidc-v2", "go-oidc v2", MaxAge, Unbounded).all_or_nothing().note(FROM_DISCOVERY),
    product("kubernetes", "Kubernetes API server", MaxAge, Unbounded).all_or_nothing().reading(NO_EDWARDS),
    product("jwx", "jwx v2 (Go)", MaxAgeOr(Span::from_secs(1800)), MaxAgeOr(Span::from_secs(1800))).all_or_nothing(),
    product("keyfunc", "keyfunc (Go)", mins(5), hours(1)).all_or_nothing(),
    product("jwks-client-rs", "jwks_client_rs (Rust)", secs(0), hours(24)).all_or_nothing(),
    product("jwt-authorizer", "jwt-authorizer (Rust)", mins(10), Unbounded),
    product("envoy", "Envoy jwt_authn", mins(10), mins(10))
        .reading(OLD_LABEL)
        .note("keeps a removed key for as long as its fetches fail"),
    product("istio", "Istio", mins(20), mins(20))
        .note("keeps a removed key up to 7 days while its fetches fail; pushing to the proxies comes on top"),
    product("aws-api-gateway", "AWS API Gateway", hours(2), hours(2)).reading(RSA),
    product("aws-alb", "AWS Application Load Balancer", Unknown, Unknown).reading(RS256).note("reads at most 10 keys"),
    product("kong-openid-connect", "Kong openid-connect", secs(30), Unbounded),
    product("apisix", "Apache APISIX", secs(0), hours(48)),
    product("lua-resty-openidc", "lua-resty-openidc", secs(0), hours(48)),
    product("nginx-plus", "NGINX Plus with proxy_cache", MaxAge, MaxAge),
    product("traefik-hub", "Traefik Hub", MaxAge, MaxAge),
    product("hasura", "Hasura", MaxAge, MaxAge),
    product("apigee", "Apigee", mins(5), mins(5)),
    product("supabase", "Supabase", mins(20), mins(20)),
    product("openfga", "OpenFGA before its fix", hours(48), hours(48)),
    product("postgrest", "PostgREST", Manual, Manual),
    product("kong-oss", "Kong, open source", Manual, Manual),
    product("api-shield", "Cloudflare API Shield", Manual, Manual),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::algorithm::{EdLabel, RsaBits};
    use crate::keyring::name::Name;

    const MAX_AGE: Span = Span::from_secs(300);
    const EDDSA: Algorithm = Algorithm::EdDsa { label: EdLabel::EdDsa };
    const ED25519: Algorithm = Algorithm::EdDsa { label: EdLabel::Ed25519 };
    const RS: Algorithm = Algorithm::Rs256 { rsa_bits: RsaBits::B2048 };

    fn columns(name: &str, max_age: Span) -> (Span, Option<Span>) {
        let verifier = resolve(name, max_age).unwrap();
        assert_eq!(verifier.name, name);
        (verifier.sees_new, verifier.keeps_old)
    }

    #[test]
    fn names_are_unique_and_can_be_written_in_configuration() {
        let mut names: Vec<_> = presets().iter().map(|preset| preset.name).collect();
        assert!(names.iter().all(|name| Name::parse(name).is_ok()));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), presets().len());
    }

    #[test]
    fn propagation_uses_the_new_column_and_exposure_the_old_one() {
        assert_eq!(columns("envoy", MAX_AGE), (Span::MINUTE.times(10), Some(Span::MINUTE.times(10))));
        assert_eq!(columns("jose", MAX_AGE), (Span::from_secs(30), Some(Span::MINUTE.times(10))));
        assert_eq!(columns("vault", MAX_AGE), (Span::ZERO, None));
        assert_eq!(columns("aws-api-gateway", MAX_AGE), (Span::HOUR.times(2), Some(Span::HOUR.times(2))));
        assert_eq!(columns("openfga", MAX_AGE), (Span::HOUR.times(48), Some(Span::HOUR.times(48))));
    }

    #[test]
    fn max_age_counts_what_the_issuer_publishes() {
        assert_eq!(columns("hasura", MAX_AGE), (MAX_AGE, Some(MAX_AGE)));
        assert_eq!(columns("kubernetes", Span::DAY), (Span::DAY, None));
        assert_eq!(columns("jwx", MAX_AGE), (Span::MINUTE.times(30), Some(Span::MINUTE.times(30))));
        assert_eq!(columns("jwx", Span::HOUR), (Span::HOUR, Some(Span::HOUR)));
    }

    #[test]
    fn every_preset_resolves_or_says_what_to_declare_instead() {
        for preset in presets() {
            match resolve(preset.name, MAX_AGE) {
                Ok(verifier) => assert!(verifier.sees_new <= Span::DAY.times(2), "{}", preset.name),
                Err(error) => assert!(error.to_string().contains("cache = "), "{error}"),
            }
        }
        assert_eq!(resolve("postgrest", MAX_AGE), Err(VerifierError::Manual { name: "postgrest" }));
        assert_eq!(resolve("aws-alb", MAX_AGE), Err(VerifierError::Unmeasured { name: "aws-alb" }));
        assert!(resolve("envoi", MAX_AGE).unwrap_err().to_string().contains("`envoi` is not a known verifier"));
    }

    #[test]
    fn algorithms_a_verifier_cannot_read_are_known() {
        let reads = |name: &str, algorithm| preset(name).unwrap().reads(algorithm);
        assert!(reads("aws-api-gateway", RS) && !reads("aws-api-gateway", Algorithm::Es256));
        assert!(reads("aws-alb", RS) && !reads("aws-alb", Algorithm::Ps256 { rsa_bits: RsaBits::B2048 }));
        assert!(reads("kubernetes", Algorithm::Es384) && !reads("kubernetes", EDDSA));
        assert!(reads("envoy", EDDSA) && !reads("envoy", ED25519));
        assert!(reads("pyjwt", EDDSA) && !reads("pyjwt", ED25519));
        assert!(reads("jose", ED25519), "nothing is known against it");
    }

    #[test]
    fn some_verifiers_reject_a_whole_set_for_one_unknown_key() {
        for name in ["go-oidc", "vault", "keyfunc", "jwx", "jwks-client-rs"] {
            let preset = preset(name).unwrap();
            assert!(preset.chokes_on(ED25519) && !preset.reads(ED25519), "{name}");
            assert!(!preset.chokes_on(EDDSA) && !preset.chokes_on(RS), "{name}");
        }
        assert!(!preset("envoy").unwrap().chokes_on(ED25519));
        assert_eq!(preset("spring-security").unwrap().pinned_against(Algorithm::Es256), Some(RS256));
        assert_eq!(preset("spring-security").unwrap().pinned_against(RS), None);
    }
}
