//! How service accounts are verified.

use crate::config::problem::Report;
use crate::config::{ClientCredential, Kubernetes, Signer, raw};

use super::url::check_endpoint;

/// `signer`: the listener, where it was understood.
pub(super) fn validate(raw: Option<raw::Kubernetes>, signer: Option<&Signer>, report: &mut Report) -> Kubernetes {
    let Some(raw) = raw else { return Kubernetes::default() };
    if let Some(signer) = signer
        && !signer.clients.iter().any(|client| matches!(client.credential, ClientCredential::ServiceAccount(_)))
    {
        report.warn("kubernetes", "has no effect: no [signer.client.NAME] has a `service_account`");
    }
    if let Some(Err(wrong)) = raw.jwks_url.as_deref().map(check_endpoint) {
        report.refuse("kubernetes.jwks_url", wrong);
    }
    for (key, text) in [("issuer", &raw.issuer), ("audience", &raw.audience)] {
        if text.as_ref().is_some_and(|text| text.trim() != text) {
            let key = format!("kubernetes.{key}");
            report.refuse(key, "begins or ends with a space, and tokens are compared with it byte by byte");
        }
    }
    if raw.audience.is_some() && raw.audience == raw.issuer {
        report.warn(
            "kubernetes.audience",
            "is the audience of the API server in most clusters: applications would show jwksd tokens that are good there; \
             use one of its own, such as \"jwksd\"",
        );
    }
    let default = Kubernetes::default();
    Kubernetes {
        issuer: raw.issuer,
        jwks_url: raw.jwks_url.unwrap_or(default.jwks_url),
        ca_file: raw.ca_file,
        token_file: raw.token_file,
        audience: raw.audience.unwrap_or(default.audience),
    }
}
