//! HTTP requests of this process to servers of its operator's choice: no redirects, no proxy, bounded answers.

use reqwest::redirect::Policy;
use reqwest::{ClientBuilder, Response};

/// What every such client has in common; `purpose` tells servers what is asked for.
pub fn client(purpose: &str) -> ClientBuilder {
    let agent = format!("jwksd/{} ({purpose})", env!("CARGO_PKG_VERSION"));
    reqwest::Client::builder().no_proxy().redirect(Policy::none()).user_agent(agent)
}

/// The whole body of an answer, unless it has more than `longest` bytes.
pub async fn body(mut response: Response, longest: usize) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(BodyError::Broken)? {
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
