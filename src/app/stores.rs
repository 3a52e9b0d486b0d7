//! From `[store]` to a store: what its kind needs, and nothing of what is in it.

use std::path::Path;
use std::sync::Arc;

use super::AppError;
use super::access::{Environment, read_secret};
use crate::clock::SystemClock;
use crate::config::{Config, Initialise, Postgres, ProcessRole, SecretSource, StoreKind, Upstream};
use crate::store::file::FileStore;
use crate::store::memory::MemoryStore;
use crate::store::postgres::{PostgresSettings, PostgresStore};
use crate::store::shared::SharedStore;
use crate::store::split::Split;
use crate::store::upstream::{Token, UpstreamSettings, UpstreamStore};
use crate::store::{Document, Store};

/// A store before anything in it is read.
pub(super) struct RawStore {
    pub store: Arc<dyn Store>,
    /// Its tables may have to be made first.
    postgres: Option<Arc<PostgresStore>>,
}

impl RawStore {
    /// As a daemon opens it: a folder is made if the configuration allows that.
    pub fn open(config: &Config, environment: &Environment) -> Result<Self, AppError> {
        match (&config.store.kind, config.store.initialise) {
            (StoreKind::File { path }, Initialise::IfEmpty) => Ok(Self::file(FileStore::create(path)?)),
            _ => Self::open_existing(config, environment),
        }
    }

    /// Only what is there.
    pub fn open_existing(config: &Config, environment: &Environment) -> Result<Self, AppError> {
        let own = || own(config.store.state_path.as_deref());
        match &config.store.kind {
            StoreKind::File { path } if !exists(path) => Err(AppError::NotInitialised { path: path.clone() }),
            StoreKind::File { path } => Ok(Self::file(FileStore::open(path)?)),
            StoreKind::Postgres(postgres) => Self::over_postgres(postgres, environment, own()?),
            StoreKind::Upstream(upstream) => {
                let managers: Arc<dyn SharedStore> = Arc::new(self::upstream(upstream, environment)?);
                Ok(RawStore { store: Arc::new(Split::new(managers, own()?)), postgres: None })
            }
        }
    }

    /// For `jwksd init`: makes the folder or the tables, whatever `initialise` says.
    pub async fn create(config: &Config, environment: &Environment) -> Result<Self, AppError> {
        match &config.store.kind {
            StoreKind::File { path } => Ok(Self::file(FileStore::create(path)?)),
            StoreKind::Upstream(_) => Err(AppError::Unfit(vec![
                "store.kind: managers write what an upstream store reads: run this command with a manager's configuration"
                    .to_owned(),
            ])),
            StoreKind::Postgres(postgres) => {
                // Not over its state_path: a replica may run on that while the tables are brought up to date.
                let raw = Self::over_postgres(postgres, environment, Arc::new(MemoryStore::new()))?;
                raw.migrate().await?;
                Ok(raw)
            }
        }
    }

    /// Brings tables up to date where this process may.
    pub async fn prepare(&self, config: &Config) -> Result<(), AppError> {
        let may = config.role != ProcessRole::Signer && config.store.initialise == Initialise::IfEmpty;
        if may { self.migrate().await } else { Ok(()) }
    }

    pub fn is_shared(&self) -> bool {
        self.store.shared().is_some()
    }

    async fn migrate(&self) -> Result<(), AppError> {
        match &self.postgres {
            Some(postgres) => Ok(postgres.migrate().await?),
            None => Ok(()),
        }
    }

    fn over_postgres(postgres: &Postgres, environment: &Environment, own: Arc<dyn Store>) -> Result<Self, AppError> {
        let database = Arc::new(self::postgres(postgres, environment)?);
        let store = Arc::new(Split::new(database.clone(), own));
        Ok(RawStore { store, postgres: Some(database) })
    }

    fn file(store: FileStore) -> Self {
        RawStore { store: Arc::new(store), postgres: None }
    }
}

/// A store in words.
pub(super) fn describe(config: &Config, store: &dyn Store) -> String {
    match &config.store.kind {
        StoreKind::File { path } => path.display().to_string(),
        _ => store.locate(&Document::Installation),
    }
}

/// Where a replica keeps what it remembers for itself.
fn own(state_path: Option<&Path>) -> Result<Arc<dyn Store>, AppError> {
    Ok(match state_path {
        Some(path) => Arc::new(FileStore::create(path)?),
        None => Arc::new(MemoryStore::new()),
    })
}

fn postgres(postgres: &Postgres, environment: &Environment) -> Result<PostgresStore, AppError> {
    let url = read_secret("store", "url_file", &postgres.url, environment)?;
    Ok(PostgresStore::new(PostgresSettings {
        url,
        ca_file: postgres.ca_file.clone(),
        schema: postgres.schema.clone(),
        statement_timeout: postgres.statement_timeout.to_std(),
        connections: postgres.connections,
    })?)
}

fn upstream(upstream: &Upstream, environment: &Environment) -> Result<UpstreamStore, AppError> {
    let token = match &upstream.token {
        SecretSource::File(path) => Token::File(path.clone()),
        variable => Token::Fixed(read_secret("store.token_env", "", variable, environment)?),
    };
    let settings = UpstreamSettings {
        ca_file: upstream.ca_file.clone(),
        keysets: upstream.keysets.clone(),
        ..UpstreamSettings::new(upstream.urls.clone(), token)
    };
    Ok(UpstreamStore::open(settings, Arc::new(SystemClock))?)
}

/// Unreadable counts as there.
fn exists(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}
