//! URLs that everybody on the way reads alike.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::config::is_link_local;

const LONGEST_URL: usize = 512;

/// What is to be known of a URL beside its text.
pub(super) struct Url {
    pub(super) encrypted: bool,
    /// The host is an address of this network segment only.
    pub(super) link_local: bool,
    /// The host is this machine.
    pub(super) loopback: bool,
}

/// A plain URL. Verifiers compare an `iss` byte by byte and derive locations from it (OIDC Discovery §4.1, RFC 8414 §2);
/// the rest is asked there, and nothing but a path is added.
pub(super) fn parse_url(url: &str) -> Result<Url, &'static str> {
    let (encrypted, rest) = match url.strip_prefix("https://") {
        Some(rest) => (true, rest),
        None => (false, url.strip_prefix("http://").ok_or("must begin with https:// (or http://)")?),
    };
    if url.len() > LONGEST_URL {
        return Err("is longer than 512 bytes");
    }
    if rest.contains(['?', '#']) {
        return Err("must have neither query nor fragment");
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
pub(super) fn check_path(path: &str) -> Result<(), &'static str> {
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

/// A URL at which this process asks for something or leaves it: encrypted, unless it does not leave this machine.
pub(super) fn check_endpoint(url: &str) -> Result<(), &'static str> {
    let Url { encrypted, loopback, .. } = parse_url(url)?;
    if !encrypted && !loopback {
        return Err(
            "must begin with https:// (http:// only on this machine): whoever is on the path could read and change it",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_plain() {
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

    #[test]
    fn nothing_is_sent_in_clear_text_beyond_this_machine() {
        for good in
            ["https://a.example.com", "https://a:8443/b", "http://127.0.0.1:4566", "http://[::1]", "http://localhost"]
        {
            assert!(check_endpoint(good).is_ok(), "{good} was refused");
        }
        for bad in
            ["http://a.example.com", "http://10.0.0.1", "http://localhost.example.com", "https://u:p@a", "https://a?b"]
        {
            assert!(check_endpoint(bad).is_err(), "{bad} was accepted");
        }
    }
}
