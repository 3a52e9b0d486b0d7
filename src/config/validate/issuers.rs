//! Issuers: their URLs, what is served for them, and how long it may be cached.

use std::collections::HashMap;

use crate::config::problem::Report;
use crate::config::raw;
use crate::config::{ProcessRole, Publisher};
use crate::keyring::name::Name;
use crate::keyring::policy::{Discovery, IssuerPolicy};
use crate::keyring::time::Span;

use super::url::{check_path, parse_url};
use super::{at_most, choose, publishers};

const DEFAULT_MAX_AGE: Span = Span::from_secs(300);
/// `Cache-Control` ages above a year mean nothing more (RFC 9111 §1.2.2 counts in 31 bits of seconds).
const LONGEST_CACHE: Span = Span::from_secs(365 * 86_400);
/// Each is asked about twice per `max_age`.
const PROBES_MAX: usize = 8;

/// Every issuer of the file (one whose URL was refused has none), and their publishers.
pub(super) fn validate(
    raw: Option<raw::Named<raw::Issuer>>,
    role: Option<ProcessRole>,
    report: &mut Report,
) -> (Vec<IssuerPolicy>, Vec<Publisher>) {
    let raw = raw.unwrap_or_default().entries;
    if raw.is_empty() && role != Some(ProcessRole::Signer) && !report.is_broken("issuer") {
        report.refuse("issuer", "missing: add [issuer.NAME] with `url`, the `iss` of its tokens");
    }
    let mut publishers = Vec::new();
    let mut issuers = Vec::with_capacity(raw.len());
    for (name, mut raw) in raw {
        publishers.extend(publishers::validate(&name, raw.publish.take(), role, report));
        issuers.push(issuer(name, raw, report));
    }
    refuse_collisions(&issuers, report);
    publishers::refuse_collisions(&publishers, &issuers, report);
    (issuers, publishers)
}

fn issuer(name: Name, raw: raw::Issuer, report: &mut Report) -> IssuerPolicy {
    let path = |key: &str| format!("issuer.{name}.{key}");
    let url =
        report.require(path("url"), raw.url, "give the `iss` of its tokens, such as \"https://auth.example.com\"");
    let url = url.filter(|url| match parse_url(url) {
        Ok(url) => {
            if !url.encrypted && !url.loopback {
                report.warn(
                    path("url"),
                    "http:// lets whoever is on the path replace the key set: use https:// outside of tests",
                );
            }
            true
        }
        Err(message) => {
            report.refuse(path("url"), message);
            false
        }
    });
    let max_age = at_most(&path("max_age"), raw.max_age, LONGEST_CACHE, report).unwrap_or(DEFAULT_MAX_AGE);
    if max_age.is_zero() {
        report.refuse(path("max_age"), "0s would make every verifier ask for every token: use at least a few seconds");
    }
    let stale = at_most(&path("stale_if_error"), raw.stale_if_error, LONGEST_CACHE, report).unwrap_or(Span::ZERO);
    let caches = caches(&path("caches"), raw.caches, max_age, report);
    for (index, jwks_path) in raw.jwks_paths.iter().flatten().enumerate() {
        if let Err(message) = check_path(jwks_path) {
            report.refuse(format_args!("{}[{index}]", path("jwks_paths")), message);
        }
    }
    let probes = probes(&path("probes"), raw.probes, report);
    let modes = [("minimal", Discovery::Minimal), ("off", Discovery::Off)];
    let discovery = choose(&path("discovery"), raw.discovery, &modes, report).unwrap_or_default();
    IssuerPolicy {
        name,
        url: url.unwrap_or_default(),
        max_age,
        stale_if_error: stale,
        caches,
        jwks_paths: raw.jwks_paths.unwrap_or_default(),
        discovery,
        probes,
    }
}

fn caches(path: &str, given: Option<Vec<Span>>, max_age: Span, report: &mut Report) -> Vec<Span> {
    let Some(caches) = given else { return vec![max_age] };
    for (index, cache) in caches.iter().enumerate() {
        at_most(&format!("{path}[{index}]"), Some(*cache), LONGEST_CACHE, report);
    }
    caches
}

/// Where verifiers fetch the key set: public locations, asked without credentials.
fn probes(path: &str, given: Option<Vec<String>>, report: &mut Report) -> Vec<String> {
    let probes = given.unwrap_or_default();
    if probes.len() > PROBES_MAX {
        report.refuse(path, format_args!("has {} locations: at most {PROBES_MAX} are asked", probes.len()));
    }
    for (index, probe) in probes.iter().enumerate() {
        let refused = match parse_url(probe) {
            Ok(url) if !url.encrypted => Some("must begin with https://: whoever is on the path could show any key"),
            Ok(url) if url.link_local => Some("is a link-local address, where clouds keep credentials"),
            Ok(_) if probes[..index].contains(probe) => Some("stands there twice"),
            Ok(_) => None,
            Err(message) => Some(message),
        };
        if let Some(message) = refused {
            report.refuse(format_args!("{path}[{index}]"), message);
        }
    }
    probes
}

/// One process serves all issuers: what stands at one path belongs to one of them.
fn refuse_collisions(issuers: &[IssuerPolicy], report: &mut Report) {
    let mut urls: HashMap<String, &Name> = HashMap::new();
    let mut served: HashMap<String, &Name> = HashMap::new();
    for policy in issuers.iter().filter(|issuer| !issuer.url.is_empty()) {
        let path = |key: &str| format!("issuer.{}.{key}", policy.name);
        if let Some(first) = urls.insert(policy.url.trim_end_matches('/').to_ascii_lowercase(), &policy.name) {
            report.refuse(path("url"), format_args!("is the URL of issuer.{first} too: one issuer has one URL"));
            continue;
        }
        let own = own_paths(policy);
        if let Some((location, first)) = own.iter().find_map(|p| served.get(p).map(|first| (p, first))) {
            report.refuse(
                path("url"),
                format_args!("would be served at {location}, as issuer.{first} is: give them different paths"),
            );
            continue;
        }
        served.extend(own.into_iter().map(|location| (location, &policy.name)));
    }
    for policy in issuers {
        for (index, location) in policy.jwks_paths.iter().enumerate() {
            if let Some(first) = served.insert(location.clone(), &policy.name) {
                report.refuse(
                    format_args!("issuer.{}.jwks_paths[{index}]", policy.name),
                    format_args!("{location} is served for issuer.{first} already"),
                );
            }
        }
    }
}

/// Where each document of an issuer is served.
pub(super) fn documents(issuer: &IssuerPolicy) -> Vec<String> {
    let mut paths = own_paths(issuer);
    paths.extend(issuer.jwks_paths.iter().cloned());
    paths
}

/// Where an issuer is served, further key set paths aside.
fn own_paths(issuer: &IssuerPolicy) -> Vec<String> {
    let path = issuer.path();
    let mut paths = vec![issuer.jwks_path()];
    if issuer.discovery == Discovery::Minimal {
        paths.push(format!("{path}/.well-known/openid-configuration"));
        paths.push(format!("/.well-known/oauth-authorization-server{path}"));
    }
    paths
}
