//! Where keyrings are kept.

use std::fmt;
use std::path::PathBuf;

use crate::keyring::name::Name;
use crate::keyring::time::Span;

use super::SecretSource;

/// Where keyrings are kept, and how this process takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store {
    pub kind: StoreKind,
    /// `Never` for a process that only reads the store.
    pub initialise: Initialise,
    /// How long a replica may sign without having confirmed its keyrings with a shared store; part of every policy there.
    /// A file store uses it for those who read from its `[replication]` listener; by itself it is always confirmed.
    pub staleness_limit: Span,
    /// How late a replica may publish what another one wrote; part of every policy in a shared store, and in a
    /// file store that others read from.
    pub publish_lag: Span,
    /// Where a replica of a shared store remembers what it saw, and keeps copies for a start without that store.
    pub state_path: Option<PathBuf>,
}

/// Who keeps the keyrings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// A folder of one process.
    File {
        path: PathBuf,
    },
    Postgres(Postgres),
    Upstream(Upstream),
}

/// A PostgreSQL database that replicas share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postgres {
    /// The connection URL, with its password.
    pub url: SecretSource,
    /// PEM file of the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// A plain SQL identifier, in lower case.
    pub schema: String,
    pub statement_timeout: Span,
    /// At most so many connections at once.
    pub connections: u32,
}

/// The replication listeners of managers, which hand sealed records to signers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Base URLs, without a slash at the end; at least one. Any of them will do: replicas spread over them.
    pub urls: Vec<String>,
    /// What this signer shows them.
    pub token: SecretSource,
    /// PEM file of the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// `None`: every keyset there.
    pub keysets: Option<Vec<Name>>,
}

/// Whether `serve` may set up a store where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Initialise {
    /// Only `jwksd init` may.
    #[default]
    Never,
    IfEmpty,
}

impl Store {
    /// The folder of a file store.
    pub fn file_path(&self) -> Option<&PathBuf> {
        match &self.kind {
            StoreKind::File { path } => Some(path),
            StoreKind::Postgres(_) | StoreKind::Upstream(_) => None,
        }
    }
}

impl StoreKind {
    /// As in the configuration.
    pub const fn as_str(&self) -> &'static str {
        match self {
            StoreKind::File { .. } => "file",
            StoreKind::Postgres(_) => "postgres",
            StoreKind::Upstream(_) => "upstream",
        }
    }

    /// Whether several replicas use it at once.
    pub const fn is_shared(&self) -> bool {
        !matches!(self, StoreKind::File { .. })
    }
}

/// The kind and where it is; what is secret stays in its file or variable.
impl fmt::Display for StoreKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreKind::File { path } => write!(f, "file {}", path.display()),
            StoreKind::Postgres(postgres) => write!(f, "postgres at {}, schema {}", postgres.url, postgres.schema),
            StoreKind::Upstream(upstream) => write!(f, "upstream {}", upstream.urls.join(", ")),
        }
    }
}
