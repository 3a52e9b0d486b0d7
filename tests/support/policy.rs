//! A policy for engines that tests build themselves: one rotation per hour, everything seen within four seconds.

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Span;

/// Of the only keyset of an issuer; tests change what matters to them.
pub fn policy(issuer: &str, url: &str) -> Policy {
    Policy {
        issuer: IssuerPolicy {
            name: Name::parse(issuer).unwrap(),
            url: url.to_owned(),
            max_age: Span::SECOND,
            stale_if_error: Span::ZERO,
            caches: vec![Span::SECOND],
            jwks_paths: Vec::new(),
            discovery: Discovery::Off,
            probes: Vec::new(),
        },
        algorithm: Algorithm::Es256,
        backend: "local".to_owned(),
        rotation: RotationPolicy {
            schedule: Schedule::Every(Span::HOUR),
            propagation: Span::from_secs(4),
            successors: 1,
            overlap_extra: Span::ZERO,
            bootstrap: Bootstrap::Wait,
            verifiers: Vec::new(),
            clock_skew: Span::SECOND,
            staleness_limit: Span::ZERO,
            publish_lag: Span::ZERO,
        },
        tokens: TokenPolicy {
            max_ttl: Span::MINUTE,
            default_ttl: Span::MINUTE,
            required_claims: Vec::new(),
            forbidden_claims: Vec::new(),
            audiences: Vec::new(),
            types: vec!["JWT".to_owned()],
            backdate: Span::ZERO,
        },
    }
}
