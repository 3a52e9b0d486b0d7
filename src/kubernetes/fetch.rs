//! Fetching the cluster's keys from its API server.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Certificate, StatusCode};
use zeroize::Zeroizing;

use crate::backend::token::decode;
use crate::config::{Kubernetes, Secret, SecretError};
use crate::keyring::jwk::{JwkError, ParsedJwk, parse_jwks};
use crate::outbound::{self, BodyError};

/// How long one attempt may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The most bytes of a key set: a hundred keys of 4,096 bits have less.
const LONGEST: usize = 256 * 1024;

/// Where a kubelet puts what pods need to reach the API server.
const POD_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
const POD_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("kubernetes.token_file")]
    Token(#[source] SecretError),
    #[error("{} holds no token", .path.display())]
    NotAToken { path: PathBuf },
    #[error("whose tokens to accept is not known, as there is no token of a pod here: set issuer under [kubernetes]")]
    NoIssuer,
    #[error("kubernetes.ca_file: {} cannot be read", .path.display())]
    CaFile { path: PathBuf, source: std::io::Error },
    #[error("kubernetes.ca_file: {} holds no certificate in PEM", .path.display())]
    NoCertificate { path: PathBuf },
    #[error("no HTTPS client can be made: name the cluster's authority in ca_file under [kubernetes]")]
    Client(#[source] reqwest::Error),
    #[error("the API server does not answer")]
    Request(#[source] reqwest::Error),
    #[error(
        "the API server answers {status}: let this pod's service account read the keys (ClusterRole \
         system:service-account-issuer-discovery), or check jwks_url under [kubernetes]"
    )]
    Status { status: u16 },
    #[error("the answer is no key set")]
    Body(#[source] BodyError),
    #[error("the answer is not JSON")]
    Json(#[source] serde_json::Error),
    #[error("the answer is no key set")]
    Jwks(#[source] JwkError),
    #[error("the answer holds no key that could verify anything here")]
    NoKeys,
}

/// The issuer, and the keys that can verify its tokens. Files are read anew each time: the kubelet renews them.
pub(super) async fn fetch(settings: &Kubernetes) -> Result<(String, Vec<ParsedJwk>), FetchError> {
    let token = token(settings.token_file.clone()).await?;
    let issuer = match &settings.issuer {
        Some(issuer) => issuer.clone(),
        None => token.as_ref().and_then(|token| issuer_of(token)).ok_or(FetchError::NoIssuer)?,
    };
    let mut request = client(settings).await?.get(&settings.jwks_url);
    if let Some(token) = token.filter(|_| settings.token_file.is_some() || asks_own_cluster(settings)) {
        request = request.bearer_auth(token.as_str());
    }
    let response = request.send().await.map_err(FetchError::Request)?;
    if response.status() != StatusCode::OK {
        return Err(FetchError::Status { status: response.status().as_u16() });
    }
    let body = outbound::body(response, LONGEST).await.map_err(FetchError::Body)?;
    let document = serde_json::from_slice(&body).map_err(FetchError::Json)?;
    let keys = parse_jwks(&document).map_err(FetchError::Jwks)?;
    // Keys of other kinds, symmetric ones among them, are none to verify with.
    let keys: Vec<ParsedJwk> = keys.into_iter().filter_map(Result::ok).collect();
    if keys.is_empty() { Err(FetchError::NoKeys) } else { Ok((issuer, keys)) }
}

/// Whether the API server of this pod's cluster is asked: the pod's own token is shown to nobody else unasked, and its
/// authority vouches for nobody else.
fn asks_own_cluster(settings: &Kubernetes) -> bool {
    settings.jwks_url == Kubernetes::JWKS_URL
}

/// What to ask with: the file that is named, or the pod's where it is one.
async fn token(named: Option<PathBuf>) -> Result<Option<Zeroizing<String>>, FetchError> {
    let path = named.clone().unwrap_or_else(|| PathBuf::from(POD_TOKEN));
    if named.is_none() && is_absent(&path).await {
        return Ok(None);
    }
    let of_path = path.clone();
    let read = tokio::task::spawn_blocking(move || Secret::read_file(&of_path)).await;
    let secret = read.map_err(|_| FetchError::NotAToken { path: path.clone() })?.map_err(FetchError::Token)?.secret;
    let text = std::str::from_utf8(secret.expose()).ok().filter(|text| text.bytes().all(|b| b.is_ascii_graphic()));
    text.map(|text| Some(Zeroizing::new(text.to_owned()))).ok_or(FetchError::NotAToken { path })
}

/// The kubelet wrote the token for this pod: whoever it says made it is the cluster.
fn issuer_of(token: &str) -> Option<String> {
    let claims = decode(token).ok()?.claims;
    claims.get("iss")?.as_str().map(str::to_owned)
}

async fn client(settings: &Kubernetes) -> Result<reqwest::Client, FetchError> {
    let mut builder = outbound::client("service accounts").timeout(TIMEOUT).pool_max_idle_per_host(0);
    let own = asks_own_cluster(settings).then(|| PathBuf::from(POD_CA));
    let path = match (&settings.ca_file, own) {
        (Some(path), _) => Some(path.clone()),
        (None, Some(own)) if !is_absent(&own).await => Some(own),
        (None, _) => None,
    };
    if let Some(path) = path {
        let pem = tokio::fs::read(&path).await;
        let pem = pem.map_err(|source| FetchError::CaFile { path: path.clone(), source })?;
        let certificates = Certificate::from_pem_bundle(&pem).unwrap_or_default();
        if certificates.is_empty() {
            return Err(FetchError::NoCertificate { path });
        }
        builder = builder.tls_certs_only(certificates);
    }
    builder.build().map_err(FetchError::Client)
}

async fn is_absent(path: &Path) -> bool {
    tokio::fs::metadata(path).await.is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_own_files_are_for_its_own_cluster() {
        let elsewhere = |url: &str| Kubernetes { jwks_url: url.to_owned(), ..Kubernetes::default() };
        assert!(asks_own_cluster(&Kubernetes::default()));
        for url in ["https://oidc.example.com/keys", "https://kubernetes.default.svc.evil.example/openid/v1/jwks"] {
            assert!(!asks_own_cluster(&elsewhere(url)), "{url}");
        }
    }
}
