//! The port to where records live, and its adapters.

pub mod file;
pub mod ledger;
pub mod memory;
pub mod postgres;
pub mod record;
pub mod relay;
pub mod shared;
pub mod split;
pub mod traced;
pub mod upstream;
pub mod wire;

use std::fmt;

use async_trait::async_trait;

use self::shared::SharedStore;
use crate::keyring::name::Name;

/// A stored document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Document {
    /// Present from before the seal key is made until initialisation is complete.
    Initialising,
    /// Installation id, wrapped data keys, and which keysets and issuers exist.
    Installation,
    /// A keyset's keyring.
    Keyring(Name),
    /// The highest generation and digest of a keyring that this replica saw.
    Seen(Name),
    /// The same for the installation.
    SeenInstallation,
    /// When this replica last published, and since when without a long silence.
    Alive,
    /// What each receiver of notices has heard.
    Notices,
}

impl Document {
    /// Whether it belongs to the installation as a whole. The others are what one replica remembers for itself.
    pub const fn is_shared(&self) -> bool {
        match self {
            Document::Initialising | Document::Installation | Document::Keyring(_) | Document::Notices => true,
            Document::Seen(_) | Document::SeenInstallation | Document::Alive => false,
        }
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Document::Initialising => f.write_str("the mark of an unfinished initialisation"),
            Document::Installation => f.write_str("the installation"),
            Document::Keyring(name) => write!(f, "the keyring of `{name}`"),
            Document::Seen(name) => write!(f, "the seen mark of `{name}`"),
            Document::SeenInstallation => f.write_str("the seen mark of the installation"),
            Document::Alive => f.write_str("the alive mark"),
            Document::Notices => f.write_str("the book of notices"),
        }
    }
}

/// SHA-256 of a document's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; 32]);

/// Holds documents: reads them whole, replaces them atomically and durably when they are what the caller thinks.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// The name in configuration and metrics: `file`, `memory`, …
    fn kind(&self) -> &'static str;

    /// What tells this store from a copy of it elsewhere; `None` where there is nothing of the kind.
    fn place(&self) -> Option<String> {
        None
    }

    /// Where a person finds the document: a path for files. For messages.
    fn locate(&self, document: &Document) -> String;

    /// The bytes of the document; `None` only when it certainly does not exist.
    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError>;

    /// Replaces the document if its current content has the digest `expected` (`None`: if it does not exist).
    /// Durable when this returns `Ok`; untouched when it returns `Conflict`; either when it returns `Unavailable`.
    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError>;

    /// Removes the document durably; succeeds when it is not there.
    async fn remove(&self, document: &Document) -> Result<(), StoreError>;

    /// The keysets that have a keyring, in order of name.
    async fn keysets(&self) -> Result<Vec<Name>, StoreError>;

    /// Remembers a shared document that was found good, for a start while the store cannot be reached. A store that is
    /// always at hand has no use for that.
    async fn keep(&self, _document: &Document, _bytes: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    /// Whether this process takes part in a keyset at all.
    fn uses(&self, _keyset: &Name) -> bool {
        true
    }

    /// What several replicas can do with it; `None` for a store that only one daemon uses.
    fn shared(&self) -> Option<&dyn SharedStore> {
        None
    }
}

/// Replaces a document whatever it holds: for what only ever one writer changes.
pub(crate) async fn overwrite(store: &dyn Store, document: &Document, bytes: &[u8]) -> Result<(), StoreError> {
    let current = store.read(document).await?.map(|bytes| Digest::of(&bytes));
    if current == Some(Digest::of(bytes)) {
        return Ok(());
    }
    store.replace(document, current, bytes).await
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else changed it first.
    #[error(
        "{document} is not what was read last: something else wrote it. Stop jwksd, keep a copy for the inquiry and \
         restore it, see docs/restore.md"
    )]
    Conflict { document: String },
    /// It could not be read or written; for writes the outcome is unknown.
    #[error("cannot {operation} {document}: {problem}")]
    Unavailable {
        operation: &'static str,
        document: String,
        problem: String,
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The store takes no writes from here.
    #[error("{document} cannot be written by this replica: an upstream store only reads; managers write")]
    ReadOnly { document: String },
    /// Whoever serves it has only an older one than its own store, which it does not trust or cannot read.
    #[error(
        "{document} is not what the manager's store holds: the manager refused that, its log says why. Repair the store, \
         see docs/restore.md"
    )]
    Disputed { document: String },
    /// It cannot be used as it is configured, however often it is tried.
    #[error("{document} cannot be used: {problem}")]
    Unusable { document: String, problem: String },
    /// Another daemon holds the store.
    #[error("{document} is in use by another jwksd ({holder}): one daemon at a time may use a file store")]
    Locked { document: String, holder: String },
}
