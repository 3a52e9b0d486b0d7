//! Identities that others vouch for: names in certificates, and Kubernetes service accounts.

use std::fmt;
use std::net::IpAddr;

/// A subject alternative name (RFC 5280 §4.2.1.6) by which a client is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum San {
    /// In lower case.
    Dns(String),
    /// Compared byte by byte, as SPIFFE IDs are.
    Uri(String),
}

impl San {
    /// `spiffe://example.com/orders` or another URI, or a DNS name.
    ///
    /// # Errors
    /// What is no name, and what is not the name of one client alone; with what to write instead.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if let Some(id) = text.strip_prefix("spiffe://") {
            return check_spiffe(id).map(|()| San::Uri(text.to_owned()));
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
            let good = scheme.starts_with(|c: char| c.is_ascii_lowercase()) && scheme.chars().all(legal);
            let plain = !rest.is_empty() && rest.chars().all(|c| c.is_ascii_graphic());
            return (good && plain).then(|| San::Uri(text.to_owned())).ok_or(
                "is not a URI: write it as it stands in the certificate, such as \"spiffe://example.com/orders\"",
            );
        }
        if text.contains('*') {
            return Err("stands for many names: give each client a name of its own");
        }
        if text.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
            return Err("is an address, which tells who had it last: use a DNS name or a URI");
        }
        if text.len() > 253 || !text.split('.').all(is_label) {
            return Err(
                "is neither a DNS name such as \"orders.internal\" nor a URI such as \"spiffe://example.com/orders\"",
            );
        }
        Ok(San::Dns(text.to_ascii_lowercase()))
    }
}

/// As in the configuration.
impl fmt::Display for San {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (San::Dns(text) | San::Uri(text)) = self;
        f.write_str(text)
    }
}

/// What follows `spiffe://` (SPIFFE-ID §2): a trust domain and the path of a workload.
fn check_spiffe(id: &str) -> Result<(), &'static str> {
    let Some((domain, path)) = id.split_once('/') else {
        return Err(
            "names a whole trust domain: add the path of the workload, such as \"spiffe://example.com/orders\"",
        );
    };
    let of_domain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
    if domain.is_empty() || !domain.chars().all(of_domain) {
        return Err("has a trust domain with other characters than a-z, 0-9, `-`, `.` and `_`: no SPIFFE ID has");
    }
    let of_path = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    if !path.chars().all(of_path) || path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err("has a path that no SPIFFE ID has: letters, digits, `-`, `.` and `_` between single slashes");
    }
    Ok(())
}

/// A Kubernetes service account.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceAccount {
    pub namespace: String,
    pub name: String,
}

impl ServiceAccount {
    /// `namespace/name`.
    ///
    /// # Errors
    /// What names no service account.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "is not a service account: write its namespace and its name, such as \"shop/orders\"";
        let (namespace, name) = text.split_once('/').ok_or(WRONG)?;
        let lower = |label: &str| is_label(label) && !label.contains(|c: char| c.is_ascii_uppercase() || c == '_');
        let legal = lower(namespace) && name.len() <= 253 && name.split('.').all(lower);
        legal.then(|| ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() }).ok_or(WRONG)
    }
}

/// As in the configuration.
impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// RFC 1123 §2.1, and `_`, which some certificates have.
fn is_label(label: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    !label.is_empty()
        && label.len() <= 63
        && label.chars().all(legal)
        && !label.starts_with('-')
        && !label.ends_with('-')
}

/// Where the cluster's keys for service accounts are, and what their tokens must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubernetes {
    /// `iss` of the tokens; `None`: that of the token in [`token_file`](Self::token_file).
    pub issuer: Option<String>,
    pub jwks_url: String,
    /// PEM of the authorities to trust; `None`: the pod's, where it is one and asks its own cluster.
    pub ca_file: Option<std::path::PathBuf>,
    /// What the cluster is asked with; `None`: the pod's, where it is one and asks its own cluster.
    pub token_file: Option<std::path::PathBuf>,
    /// What `aud` must hold.
    pub audience: String,
}

impl Kubernetes {
    /// Where every cluster serves its keys to its pods.
    pub const JWKS_URL: &str = "https://kubernetes.default.svc/openid/v1/jwks";
    pub const AUDIENCE: &str = "jwksd";
}

impl Default for Kubernetes {
    fn default() -> Self {
        Kubernetes {
            issuer: None,
            jwks_url: Self::JWKS_URL.to_owned(),
            ca_file: None,
            token_file: None,
            audience: Self::AUDIENCE.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_certificates_are_uris_or_dns_names() {
        let dns = |text: &str| San::Dns(text.to_owned());
        assert_eq!(San::parse("Orders.Internal"), Ok(dns("orders.internal")));
        assert_eq!(San::parse("orders"), Ok(dns("orders")));
        for uri in ["spiffe://example.com/ns/shop/sa/Orders", "https://example.com/orders", "urn+x://a"] {
            assert_eq!(San::parse(uri), Ok(San::Uri(uri.to_owned())), "{uri}");
        }
        for wrong in [
            "*.example.com",
            "10.0.0.7",
            "::1",
            "a@example.com",
            "example.com.",
            "a b",
            "",
            "-a.example.com",
            "spiffe://example.com",
            "spiffe://example.com/",
            "spiffe://Example.com/orders",
            "spiffe://example.com/a//b",
            "spiffe://example.com/../b",
            "spiffe://example.com/a?b",
            "Https://example.com",
            "https://",
        ] {
            assert!(San::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn service_accounts_have_a_namespace_and_a_name() {
        let parsed = ServiceAccount::parse("shop/orders.v2").unwrap();
        assert_eq!((parsed.namespace.as_str(), parsed.name.as_str()), ("shop", "orders.v2"));
        for wrong in ["orders", "shop/", "/orders", "shop/a/b", "Shop/orders", "shop/or:ders", "shop.x/orders", "a b/c"]
        {
            assert!(ServiceAccount::parse(wrong).is_err(), "{wrong}");
        }
    }
}
