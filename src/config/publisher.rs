//! Where else an issuer's documents are written.

use std::fmt;
use std::path::PathBuf;

use crate::keyring::name::Name;

/// A place that gets every document of an issuer. It is no part of the issuer's policy: keyrings do not remember it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publisher {
    pub issuer: Name,
    /// Among those of the issuer.
    pub name: Name,
    pub kind: PublisherKind,
}

/// The place. Documents are written below it as they are served: at `{issuer path}/.well-known/jwks.json` and so on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublisherKind {
    /// A folder.
    File { path: PathBuf },
    S3 {
        bucket: String,
        /// What keys begin with, without a slash at either end; may be empty.
        prefix: String,
        /// `None`: as the AWS environment or profile says.
        region: Option<String>,
        /// `None`: the service's own for the region, or as the AWS environment says.
        endpoint_url: Option<String>,
    },
}

impl Publisher {
    /// The path of its table.
    pub fn table(&self) -> String {
        format!("issuer.{}.publish.{}", self.issuer, self.name)
    }
}

impl PublisherKind {
    /// As in the configuration.
    pub const fn as_str(&self) -> &'static str {
        match self {
            PublisherKind::File { .. } => "file",
            PublisherKind::S3 { .. } => "s3",
        }
    }
}

impl fmt::Display for PublisherKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PublisherKind::File { path } => write!(f, "file {}", path.display()),
            PublisherKind::S3 { bucket, prefix, region, endpoint_url } => {
                write!(f, "s3://{bucket}/{prefix}")?;
                let region = region.as_ref().map(|region| format!(" in {region}"));
                let endpoint = endpoint_url.as_ref().map(|url| format!(" at {url}"));
                write!(f, "{}{}", region.unwrap_or_default(), endpoint.unwrap_or_default())
            }
        }
    }
}
