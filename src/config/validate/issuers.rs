//! Issuers: their URLs, what is served for them, and how long it may be cached.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::config::problem::Report;
use crate::config::raw;
use crate::keyring::name::Name;
use crate::keyring::policy::{Discovery, IssuerPolicy};
use crate::keyring::time::Span;

use super::{at_most, choose};
use crate::config::is_link_local;

const DEFAULT_MAX_AGE: Span = Span::from_secs(300);
/// `Cache-Control` ages above a year mean nothing more (RFC 9111 §1.2.2 counts in 31 bits of seconds).
const LONGEST_CACHE: Span = Span::from_secs(365 * 86_400);
const LONGEST_URL: usize = 512;
/// Each is asked about twice per `max_age`.
const PROBES_MAX: usize = 8;

/// Every issuer of the file; one whose URL was refused has none.
pub(super) fn validate(raw: Option<raw::Named<raw::Issuer>>, report: &mut Report) -> Vec<IssuerPolicy> {
    let raw = raw.unwrap_or_default().entries;
    if raw.is_empty() && !report.is_broken("issuer") {
        report.refuse("issuer", "missing: add [issuer.NAME] with `url`, the `iss` of its tokens");
    }
    let issuers: Vec<_> = raw.into_iter().map(|(name, raw)| issuer(name, raw, report)).collect();
    refuse_collisions(&issuers, report);
    issuers
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

struct Url {
    encrypted: bool,
    /// The host is an address of this network segment only.
    link_local: bool,
    loopback: bool,
}

/// An `iss` that verifiers compare byte by byte and derive locations from (OIDC Discovery §4.1, RFC 8414 §2).
fn parse_url(url: &str) -> Result<Url, &'static str> {
    let (encrypted, rest) = match url.strip_prefix("https://") {
        Some(rest) => (true, rest),
        None => (false, url.strip_prefix("http://").ok_or("must begin with https:// (or http://)")?),
    };
    if url.len() > LONGEST_URL {
        return Err("is longer than 512 bytes");
    }
    if rest.contains(['?', '#']) {
        return Err("must have neither query nor fragment (RFC 8414 §2)");
    }
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    if authority.contains('@') {
        return Err("must not contain user or password");
    }
    let (loopback, link_local) = parse_authority(authority)?;
    // A slash at the end belongs to the `iss` of some issuers and is not part of the path that is served.
    match path.strip_suffix('/').unwrap_or(path) {
        "" => {}
        path => check_path(path)?,
    }
    Ok(Url { encrypted, link_local, loopback })
}

/// Whether the host is this machine, and whether it is a link-local address.
fn parse_authority(authority: &str) -> Result<(bool, bool), &'static str> {
    const NO_HOST: &str = "has no valid host name or address";
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(NO_HOST)?;
            address.parse::<Ipv6Addr>().map_err(|_| NO_HOST)?;
            (
                address,
                port.strip_prefix(':')
                    .map_or_else(|| if port.is_empty() { Ok(None) } else { Err(NO_HOST) }, |p| Ok(Some(p)))?,
            )
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if port.is_some_and(|port| port.starts_with('+') || port.parse::<u16>().ok().is_none_or(|port| port == 0)) {
        return Err("has no valid port after the host");
    }
    if let Ok(address) = host.parse::<Ipv6Addr>() {
        return Ok((address.to_canonical().is_loopback(), is_link_local(address.to_canonical())));
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Ok((address.is_loopback(), is_link_local(address.into())));
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let label = |label: &str| !label.is_empty() && label.len() <= 63 && label.chars().all(legal);
    if host.len() > 253 || !host.split('.').all(label) || host.split('.').all(|l| l.chars().all(|c| c.is_ascii_digit()))
    {
        return Err(NO_HOST);
    }
    let host = host.to_ascii_lowercase();
    Ok((host == "localhost" || host.ends_with(".localhost"), false))
}

/// A path that everyone on the way reads alike: absolute, without empty or dot segments and percent-encoding.
fn check_path(path: &str) -> Result<(), &'static str> {
    let Some(segments) = path.strip_prefix('/') else {
        return Err("must be an absolute path, such as \"/oauth/keys\"");
    };
    if path.len() > LONGEST_URL {
        return Err("is longer than 512 bytes");
    }
    // pchar of RFC 3986 §3.3 without percent-encoding.
    let legal = |c: char| c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:@/".contains(c);
    if !path.chars().all(legal) {
        return Err(
            "has a character that does not belong into a path, or percent-encoding, which not everyone reads alike",
        );
    }
    if segments.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err("has an empty segment, `.` or `..` in its path, which not everyone reads alike");
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn issuer_urls_are_plain() {
        for good in [
            "https://auth.example.com",
            "https://auth.example.com/",
            "https://auth.example.com:8443/tenant-a/v2.0",
            "http://127.0.0.1:8620",
            "http://[::1]:8620",
            "http://localhost",
        ] {
            assert!(parse_url(good).is_ok(), "{good} was refused");
        }
        for bad in [
            "auth.example.com",
            "HTTPS://auth.example.com",
            "ftp://auth.example.com",
            "https://",
            "https:///path",
            "https://a b",
            "https://u:p@auth.example.com",
            "https://auth.example.com?x=1",
            "https://auth.example.com/#x",
            "https://auth.example.com:0",
            "https://auth.example.com:99999",
            "https://auth.example.com:+80",
            "https://auth.example.com:",
            "https://auth..example.com",
            "https://999.1.1.1",
            "https://[::1",
            "https://[::1]x",
            "https://auth.example.com//a",
            "https://auth.example.com/a/../b",
            "https://auth.example.com/a%2fb",
            "https://auth.example.com/{a}",
        ] {
            assert!(parse_url(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn only_this_machine_is_loopback() {
        for (url, loopback) in [
            ("http://127.9.9.9", true),
            ("http://[::1]", true),
            ("http://[::ffff:127.0.0.1]", true),
            ("http://LOCALHOST:1", true),
            ("http://a.localhost", true),
            ("http://localhost.example.com", false),
            ("http://10.0.0.1", false),
        ] {
            assert_eq!(parse_url(url).unwrap().loopback, loopback, "{url}");
        }
    }
}
