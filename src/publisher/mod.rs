//! The port to where an issuer's documents are placed for others to serve: folders of web servers, buckets behind CDNs.

pub mod file;
pub mod s3;

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;

/// The most bytes that are read of a placed document: well above what an issuer's JWKS may have.
pub const BODY_MAX: usize = 256 * 1024;

/// Holds documents at public paths, such as `/tenant-a/.well-known/jwks.json`: reads them whole, and replaces them
/// atomically when they are still what the caller has read.
#[async_trait]
pub trait Publisher: Send + Sync + 'static {
    /// The name in the configuration: `file`, `s3`.
    fn kind(&self) -> &'static str;

    /// Where a person finds the document. For messages.
    fn locate(&self, path: &str) -> String;

    /// What is at the path; `None` only when there certainly is nothing. Never older than a `put` that returned.
    async fn read(&self, path: &str) -> Result<Option<Placed>, PublishError>;

    /// Replaces what is at the path if it is still `expected` (`None`: nothing). Readers see the former document or
    /// this one; nothing has changed when it returns [`PublishError::Conflict`], and either may be when it returns another.
    async fn put(&self, path: &str, document: &Outgoing, expected: Option<&Version>) -> Result<(), PublishError>;
}

/// A document to be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    pub body: Bytes,
    pub headers: Headers,
    /// From which generations it was rendered: `keyring::placement::Generations` as text.
    pub generations: String,
}

/// What is served along with a document, where the place keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    pub content_type: String,
    pub cache_control: String,
}

/// A document that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub body: Bytes,
    /// `None`: the place keeps none, or somebody else's document has none.
    pub headers: Option<Headers>,
    /// As in [`Outgoing`]; `None` where somebody else placed it.
    pub generations: Option<String>,
    pub version: Version,
}

impl Placed {
    /// Whether it is this document, whichever generations it claims.
    pub fn is(&self, document: &Outgoing) -> bool {
        self.body == document.body && self.headers.as_ref().is_none_or(|headers| *headers == document.headers)
    }
}

/// What tells a placed document, its generations included, from every other that was or will be at its path. Means
/// something to its place only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(pub String);

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Somebody else placed something first.
    #[error("{place} was changed by somebody else meanwhile")]
    Conflict { place: String },
    #[error("{place} has more than {BODY_MAX} bytes, so it is not ours: remove it")]
    TooLarge { place: String },
    /// It could not be read or written; of a write, the outcome may be unknown.
    #[error("cannot {operation} {place}: {problem}")]
    Failed {
        operation: Operation,
        place: String,
        problem: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
        })
    }
}
