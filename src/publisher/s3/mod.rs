//! A bucket of Amazon S3, or of a storage that speaks its protocol and knows conditional writes.

mod credentials;
mod error;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::{BehaviorVersion, Region};
use bytes::Bytes;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, BackoffConfig, ClientOptions, GetOptions, ObjectStore as _, PutMode, PutOptions,
    RetryConfig, UpdateVersion,
};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use self::credentials::Chain;
use self::error::failed;
use super::{BODY_MAX, Headers, Operation, Outgoing, Placed, PublishError, Publisher, Version};
use crate::clock::Clock;

/// The user metadata that holds the generations: `x-amz-meta-jwksd-generations`.
const GENERATIONS: &str = "jwksd-generations";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// One request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// A call with its retries and the loading of credentials.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
const RETRIES: usize = 2;

/// Where the bucket is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub name: String,
    /// What keys begin with, without a slash at either end; may be empty.
    pub prefix: String,
    /// `None`: as the AWS environment or profile says.
    pub region: Option<String>,
    /// `None`: the service's own for the region, or as the AWS environment says.
    pub endpoint_url: Option<String>,
}

/// Documents as objects. Requests have the bucket in their path, as every compatible storage takes them.
pub struct S3Publisher {
    bucket: Bucket,
    clock: Arc<dyn Clock>,
    /// Made for the first call: building it may ask the instance metadata service.
    store: OnceCell<AmazonS3>,
}

impl S3Publisher {
    pub fn new(bucket: Bucket, clock: Arc<dyn Clock>) -> Self {
        S3Publisher { bucket, clock, store: OnceCell::new() }
    }

    async fn store(&self) -> Result<&AmazonS3, String> {
        self.store
            .get_or_try_init(|| async {
                // A behaviour of the SDK changes only with this line.
                let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12());
                if let Some(region) = &self.bucket.region {
                    loader = loader.region(Region::new(region.clone()));
                }
                let loaded = loader.load().await;
                let region = loaded.region().ok_or("no region: set `region` of the publisher, or AWS_REGION")?;
                let chain = loaded.credentials_provider().ok_or("no AWS credentials are configured")?;
                let endpoint = self
                    .bucket
                    .endpoint_url
                    .clone()
                    .or_else(|| std::env::var("AWS_ENDPOINT_URL_S3").ok().filter(|url| !url.is_empty()))
                    .or_else(|| loaded.endpoint_url().map(str::to_owned));
                self.build(region.as_ref(), endpoint, Chain::new(chain, self.clock.clone()))
            })
            .await
    }

    fn build(&self, region: &str, endpoint: Option<String>, credentials: Chain) -> Result<AmazonS3, String> {
        let plain = endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
        let options = ClientOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT)
            .with_allow_http(plain);
        let backoff = BackoffConfig { max_backoff: Duration::from_secs(1), ..BackoffConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&self.bucket.name)
            .with_region(region)
            .with_credentials(Arc::new(credentials))
            .with_client_options(options)
            .with_virtual_hosted_style_request(false)
            .with_retry(RetryConfig { backoff, max_retries: RETRIES, retry_timeout: CALL_TIMEOUT });
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
        }
        builder.build().map_err(|error| error.to_string())
    }

    /// Has a call done within its time.
    async fn within<T>(
        &self,
        operation: Operation,
        path: &str,
        call: impl Future<Output = Result<T, PublishError>> + Send,
    ) -> Result<T, PublishError> {
        let late = |_| {
            let problem = format!("the storage does not answer within {} s", CALL_TIMEOUT.as_secs());
            self.refused(operation, path, problem)
        };
        timeout(CALL_TIMEOUT, call).await.map_err(late)?
    }

    /// The client and the key of a document.
    async fn object(&self, operation: Operation, path: &str) -> Result<(&AmazonS3, Path), PublishError> {
        let key = Path::parse(self.key(path)).map_err(|error| self.refused(operation, path, error.to_string()))?;
        let store = self.store().await.map_err(|problem| self.refused(operation, path, problem))?;
        Ok((store, key))
    }

    fn refused(&self, operation: Operation, path: &str, problem: String) -> PublishError {
        PublishError::Failed { operation, place: self.locate(path), problem, source: None }
    }

    fn key(&self, path: &str) -> String {
        let path = path.trim_start_matches('/');
        if self.bucket.prefix.is_empty() { path.to_owned() } else { format!("{}/{path}", self.bucket.prefix) }
    }

    async fn fetch(&self, path: &str) -> Result<Option<Placed>, PublishError> {
        let (store, key) = self.object(Operation::Read, path).await?;
        let found = match store.get_opts(&key, GetOptions::default()).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            found => found.map_err(|error| failed(Operation::Read, self.locate(path), error))?,
        };
        if found.meta.size > BODY_MAX as u64 {
            return Err(PublishError::TooLarge { place: self.locate(path) });
        }
        let text = |attribute: Attribute| found.attributes.get(&attribute).map(|value| value.to_string());
        let headers = Headers {
            content_type: text(Attribute::ContentType).unwrap_or_default(),
            cache_control: text(Attribute::CacheControl).unwrap_or_default(),
        };
        let generations = text(Attribute::Metadata(GENERATIONS.into()));
        let unversioned = || {
            let problem = "the storage answers without an ETag, so it cannot replace conditionally: use another";
            self.refused(Operation::Read, path, problem.to_owned())
        };
        let version = Version(found.meta.e_tag.clone().ok_or_else(unversioned)?);
        let body = found.bytes().await.map_err(|error| failed(Operation::Read, self.locate(path), error))?;
        let body = body.slice_ref(body.trim_ascii_end());
        Ok(Some(Placed { body, headers: Some(headers), generations, version }))
    }

    async fn replace(&self, path: &str, document: &Outgoing, expected: Option<&Version>) -> Result<(), PublishError> {
        let (store, key) = self.object(Operation::Write, path).await?;
        let headers = document.headers.clone();
        let attributes = Attributes::from_iter([
            (Attribute::ContentType, headers.content_type),
            (Attribute::CacheControl, headers.cache_control),
            (Attribute::Metadata(GENERATIONS.into()), document.generations.clone()),
        ]);
        let mode = match expected {
            None => PutMode::Create,
            Some(version) => PutMode::Update(UpdateVersion { e_tag: Some(version.0.clone()), version: None }),
        };
        let options = PutOptions { mode, attributes, ..PutOptions::default() };
        match store.put_opts(&key, distinct(document).into(), options).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                Err(PublishError::Conflict { place: self.locate(path) })
            }
            Err(error) => Err(failed(Operation::Write, self.locate(path), error)),
        }
    }
}

/// The document with white space behind it (RFC 8259 §2) that its generations choose. An ETag knows the body only: were
/// a later document the same as an earlier one, `If-Match` could not tell a writer that something came in between.
fn distinct(document: &Outgoing) -> Bytes {
    const WHITE: [u8; 4] = *b" \n\r\t";
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, document.generations.as_bytes());
    let bits = digest.as_ref().iter().take(6).flat_map(|byte| [byte >> 6, byte >> 4 & 3, byte >> 2 & 3, byte & 3]);
    document.body.iter().copied().chain(bits.map(|bits| WHITE[usize::from(bits)])).collect()
}

#[async_trait]
impl Publisher for S3Publisher {
    fn kind(&self) -> &'static str {
        "s3"
    }

    fn locate(&self, path: &str) -> String {
        format!("s3://{}/{}", self.bucket.name, self.key(path))
    }

    async fn read(&self, path: &str) -> Result<Option<Placed>, PublishError> {
        self.within(Operation::Read, path, self.fetch(path)).await
    }

    async fn put(&self, path: &str, document: &Outgoing, expected: Option<&Version>) -> Result<(), PublishError> {
        self.within(Operation::Write, path, self.replace(path, document, expected)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_document_of_another_generation_has_another_body_and_means_the_same() {
        let document = |generations: &str| Outgoing {
            body: Bytes::from_static(b"{\"keys\":[]}"),
            headers: Headers { content_type: String::new(), cache_control: String::new() },
            generations: generations.to_owned(),
        };
        let (one, other) = (distinct(&document("a:0f:1")), distinct(&document("a:0f:2")));
        assert_ne!(one, other);
        for body in [one, other] {
            assert_eq!(body.len(), 11 + 24);
            assert_eq!(body.trim_ascii_end(), b"{\"keys\":[]}");
            assert_eq!(serde_json::from_slice::<serde_json::Value>(&body).unwrap()["keys"], serde_json::json!([]));
        }
    }
}
