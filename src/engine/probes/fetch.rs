//! Fetching a public document as a verifier would: https, no redirects, no proxy, no credentials, bounded.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use reqwest::header::{AGE, CACHE_CONTROL, HeaderMap, HeaderName};
use tokio::sync::OnceCell;

use crate::keyring::publication::CacheHeaders;
use crate::outbound::{self, BodyError, NotLinkLocal};

/// How long one fetch may take (Nimbus gives a JWKS 500 ms; a probe is more patient).
const TIMEOUT: Duration = Duration::from_secs(5);

/// The most bytes that are read: well above what an issuer's JWKS may have.
const BODY_MAX: usize = 256 * 1024;

/// What was served.
#[derive(Clone, Debug)]
pub struct Fetched {
    pub body: Vec<u8>,
    pub headers: CacheHeaders,
}

/// Where verifiers fetch, as far as a probe needs it.
#[async_trait]
pub trait Fetch: Send + Sync + 'static {
    /// The body of a 200.
    async fn fetch(&self, url: &str) -> Result<Fetched, FetchError>;
}

/// Why nothing can be said of what is served.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("no HTTPS client can be made: see that the system's certificate authorities are installed")]
    Client(#[source] reqwest::Error),
    #[error("it cannot be fetched")]
    Request(#[source] reqwest::Error),
    #[error("it answers {status}; verifiers want 200 and follow no redirect")]
    Status { status: u16 },
    #[error("its answer is larger than {BODY_MAX} bytes")]
    TooLarge,
}

/// Over HTTPS, trusting the system's certificate authorities (`SSL_CERT_FILE` names others).
#[derive(Default)]
pub struct HttpsFetch {
    /// Made for the first fetch: reading the certificate authorities takes longer than a start without probes may.
    http: OnceCell<reqwest::Client>,
}

impl HttpsFetch {
    async fn client(&self) -> Result<&reqwest::Client, FetchError> {
        self.http.get_or_try_init(async || Self::build()).await
    }

    fn build() -> Result<reqwest::Client, FetchError> {
        outbound::client("probe")
            .https_only(true)
            .dns_resolver(Arc::new(NotLinkLocal))
            .timeout(TIMEOUT)
            .pool_max_idle_per_host(1)
            .build()
            .map_err(FetchError::Client)
    }
}

#[async_trait]
impl Fetch for HttpsFetch {
    async fn fetch(&self, url: &str) -> Result<Fetched, FetchError> {
        let response = self.client().await?.get(url).send().await.map_err(FetchError::Request)?;
        if response.status() != reqwest::StatusCode::OK {
            return Err(FetchError::Status { status: response.status().as_u16() });
        }
        let headers =
            CacheHeaders { age: text(response.headers(), AGE), cache_control: text(response.headers(), CACHE_CONTROL) };
        let body = outbound::body(response, BODY_MAX).await.map_err(|error| match error {
            BodyError::Broken(error) => FetchError::Request(error),
            BodyError::TooLong => FetchError::TooLarge,
        })?;
        Ok(Fetched { body, headers })
    }
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    let values: Vec<&str> = headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    (!values.is_empty()).then(|| values.join(", "))
}
