//! HTTP requests of this process to servers of its operator's choice: no redirects, no proxy, bounded answers.

use std::net::SocketAddr;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{ClientBuilder, Response};

use crate::config::is_link_local;

/// What every such client has in common; `purpose` tells servers what is asked for.
pub fn client(purpose: &str) -> ClientBuilder {
    let agent = format!("jwksd/{} ({purpose})", env!("CARGO_PKG_VERSION"));
    reqwest::Client::builder().no_proxy().redirect(Policy::none()).user_agent(agent)
}

/// The whole body of an answer, unless it has more than `longest` bytes.
pub async fn body(mut response: Response, longest: usize) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| BodyError::Broken(error.without_url()))? {
        if body.len() + chunk.len() > longest {
            return Err(BodyError::TooLong);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Why an answer was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("the answer broke off")]
    Broken(#[source] reqwest::Error),
    #[error("the answer is too long")]
    TooLong,
}

/// Resolves names to addresses beyond this network segment, so that a name cannot lead a request to the credentials that
/// clouds serve there. Addresses in the configuration are checked by its validation.
pub struct NotLinkLocal;

impl Resolve for NotLinkLocal {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> = found.filter(|address| !is_link_local(address.ip())).collect();
            if allowed.is_empty() {
                return Err(format!("{} has no address that may be asked", name.as_str()).into());
            }
            let addresses: Addrs = Box::new(allowed.into_iter());
            Ok(addresses)
        })
    }
}
