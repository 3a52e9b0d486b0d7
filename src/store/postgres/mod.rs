//! The PostgreSQL store: what several replicas share, in one schema of a database.
//!
//! ```text
//! documents    name, bytes, digest; generation and lineage for people
//! state        one row that changes with every write: the revision
//! audit        every record's journal, kept for good
//! replicas     who runs, and which generations each shows
//! migrations   the versions of these tables
//! ```
//!
//! It holds shared documents only; what a replica remembers for itself has its place in a store of its own
//! ([`Split`](super::split::Split)). See docs/postgres.md.

mod failure;
mod journal;
mod migrations;
mod pool;
mod presence;
mod session;
mod settings;
mod tls;
mod wake;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use tokio_postgres::Transaction;
use tokio_postgres::types::{ToSql, Type};

use self::failure::Failure;
pub use self::migrations::NEWEST as NEWEST_SCHEMA;
use self::pool::Pool;
pub use self::settings::{DEFAULT_SCHEMA, PostgresSettings};
use self::wake::{Wake, jittered};
use super::shared::{Heads, Replica, Report, Revision, SharedStore};
use super::{Digest, Document, Store, StoreError};
use crate::keyring::name::Name;
use crate::keyring::time::{Span, Timestamp};

const KEYRING: &str = "keyring/";
/// While nothing listens, a waiting call asks about this often.
const POLL_EVERY: Duration = Duration::from_secs(1);
/// Longest that [`PostgresStore::migrate`] takes: it may wait for others that migrate, and for busy tables.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(90);

/// Documents in PostgreSQL. A write is one transaction: the compare-and-swap, the revision, the new entries of the audit
/// table and a notification. The comparison is of digests, and a record's bytes contain its generation, its lineage and its
/// predecessor's digest: equal digests are the same record of the same history.
///
/// Every call ends within `statement_timeout` and two seconds, whatever the network does.
#[derive(Debug)]
pub struct PostgresStore {
    pool: Arc<Pool>,
    wake: OnceLock<Wake>,
}

/// Holds a write to at least `on`: committed means flushed here and on every synchronous standby. Only `remote_apply` is
/// stronger. statement_timeout does not end that wait, since it counts for statements up to their commit.
const BEGIN_DURABLY: &str = "SELECT set_config('synchronous_commit', \
     CASE current_setting('synchronous_commit') WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, true)";

const CREATE: &str = "INSERT INTO {schema}.documents (document, bytes, lineage, generation) VALUES ($1, $2, $3, $4) \
     ON CONFLICT DO NOTHING";

/// A second writer waits for the row, and then compares with what the first one left.
const REPLACE: &str = "UPDATE {schema}.documents SET bytes = $2, lineage = $3, generation = $4, \
     written_at = clock_timestamp() WHERE document = $1 AND digest = $5";

const AUDIT: &str = "INSERT INTO {schema}.audit (lineage, keyset, seq, at, action, actor, reason, kids, detail) \
     SELECT $1, $2, seq, at, action, actor, reason, kids, detail FROM jsonb_to_recordset($3::text::jsonb) \
     AS entry(seq bigint, at timestamptz, action text, actor text, reason text, kids text[], detail text) \
     ON CONFLICT DO NOTHING";

/// One statement, so that revision and digests are of one moment. Without a change only the first two columns.
const HEADS: &str = "SELECT state.changes || '.' || state.last_write, \
     (extract(epoch FROM clock_timestamp()) * 1000)::bigint, document, digest FROM {schema}.state \
     LEFT JOIN {schema}.documents ON state.changes || '.' || state.last_write IS DISTINCT FROM $1";

impl PostgresStore {
    /// Checks the settings; the first use connects.
    pub fn new(settings: PostgresSettings) -> Result<Self, StoreError> {
        let unusable = |problem| StoreError::Unusable { document: "the PostgreSQL store".to_owned(), problem };
        let pool = Arc::new(Pool::new(settings.check().map_err(unusable)?));
        Ok(PostgresStore { pool, wake: OnceLock::new() })
    }

    /// Makes the schema and its tables or brings them to this release's version, and grants the roles `SCHEMA_manager` and
    /// `SCHEMA_signer`, where they exist, what they need. Needs the rights of the schema's owner; does nothing where nothing
    /// is to be done. For `jwksd init` and for starts that may initialise.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        let work = async {
            let mut session = self.pool.dial(None).await?;
            migrations::run(&mut session.client, &self.pool.settings.schema).await
        };
        let late = "PostgreSQL was too slow: something holds the tables, or another migration runs; try again";
        let done = tokio::time::timeout(MIGRATION_TIMEOUT, work).await.unwrap_or_else(|_| Err(Failure::new(late)));
        done.map_err(|failure| failure.of("migrate", self.whole()))
    }

    fn whole(&self) -> String {
        format!("the schema `{}` in PostgreSQL at {}", self.pool.settings.schema, self.pool.settings.label)
    }

    /// Runs a call to its end, or to its limit.
    async fn within<T>(
        &self,
        operation: &'static str,
        document: impl FnOnce() -> String,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, StoreError> {
        let limit = self.pool.deadline();
        let late = || {
            let standbys =
                if operation == "write" { " (and, if it has synchronous standbys, whether they answer)" } else { "" };
            let (label, limit) = (&self.pool.settings.label, limit.as_millis());
            Failure::new(format!(
                "{label} did not answer within {limit} ms: check the network and the server{standbys}"
            ))
        };
        let done = tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(late()));
        done.map_err(|failure| failure.of(operation, document()))
    }

    /// One transaction that is durable when this returns `Ok`.
    async fn write(&self, change: impl AsyncFnOnce(&Transaction<'_>) -> Result<(), Failure>) -> Result<(), Failure> {
        let mut lent = self.pool.lend().await?;
        let warnings = lent.warnings();
        let transaction = lent.client.transaction().await?;
        transaction.query_typed(BEGIN_DURABLY, &[]).await?;
        match change(&transaction).await {
            Ok(()) => {
                warnings.forget();
                transaction.commit().await?;
            }
            Err(Failure::Conflict) => {
                transaction.rollback().await?;
                lent.give_back();
                return Err(Failure::Conflict);
            }
            Err(failure) => return Err(failure),
        }
        if warnings.came() {
            return Err(Failure::new(
                "PostgreSQL committed it with a warning: its wait for a synchronous standby was cancelled, so a failover \
                 may lose it; it is read again",
            ));
        }
        lent.give_back();
        Ok(())
    }

    async fn read_row(&self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        let lent = self.pool.lend().await?;
        let sql = self.pool.sql("SELECT bytes FROM {schema}.documents WHERE document = $1");
        let row = lent.client.query_typed_opt(&sql, &[(&name, Type::TEXT)]).await?;
        lent.give_back();
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    async fn replace_row(&self, name: &str, expected: Option<Digest>, bytes: &[u8]) -> Result<(), Failure> {
        let described = journal::describe(bytes);
        let digest = expected.map(|digest| digest.0.to_vec());
        let sql = self.pool.sql(if digest.is_some() { REPLACE } else { CREATE });
        self.write(async |transaction| {
            let mut values: Vec<(&(dyn ToSql + Sync), Type)> = vec![
                (&name, Type::TEXT),
                (&bytes, Type::BYTEA),
                (&described.lineage, Type::TEXT),
                (&described.generation, Type::INT8),
            ];
            values.extend(digest.iter().map(|digest| (digest as &(dyn ToSql + Sync), Type::BYTEA)));
            if transaction.execute_typed(&sql, &values).await? != 1 {
                return Err(Failure::Conflict);
            }
            if let (Some(lineage), Some(entries)) = (&described.lineage, &described.entries) {
                let keyset = name.strip_prefix(KEYRING).unwrap_or_default();
                let values: [(&(dyn ToSql + Sync), Type); 3] =
                    [(lineage, Type::TEXT), (&keyset, Type::TEXT), (entries, Type::TEXT)];
                transaction.execute_typed(&self.pool.sql(AUDIT), &values).await?;
            }
            Ok(())
        })
        .await
    }

    async fn remove_row(&self, name: &str) -> Result<(), Failure> {
        let sql = self.pool.sql("DELETE FROM {schema}.documents WHERE document = $1");
        self.write(async |transaction| {
            transaction.execute_typed(&sql, &[(&name, Type::TEXT)]).await?;
            Ok(())
        })
        .await
    }

    async fn keyrings(&self) -> Result<Vec<Name>, Failure> {
        let lent = self.pool.lend().await?;
        let sql = self.pool.sql("SELECT document FROM {schema}.documents");
        let rows = lent.client.query_typed(&sql, &[]).await?;
        lent.give_back();
        let mut names = Vec::new();
        for row in &rows {
            if let Some(Document::Keyring(name)) = document(row.try_get(0)?) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// What is stored, if it is not what is known.
    async fn look(&self, known: Option<&str>) -> Result<Heads, Failure> {
        let lent = self.pool.lend().await?;
        let rows = lent.client.query_typed(&self.pool.sql(HEADS), &[(&known, Type::TEXT)]).await?;
        lent.give_back();
        let first = rows.first().ok_or_else(|| {
            Failure::new(
                "its table `state` is empty: somebody emptied it; `jwksd init` does not repair that, a restore does",
            )
        })?;
        let revision: String = first.try_get(0)?;
        let store_time = Timestamp::from_millis(first.try_get(1)?);
        let mut documents = BTreeMap::new();
        for row in &rows {
            let Some(name) = row.try_get::<_, Option<&str>>(2)? else { continue };
            // Rows of a newer release are its own business.
            let Some(document) = document(name) else { continue };
            let digest = <[u8; 32]>::try_from(row.try_get::<_, &[u8]>(3)?)
                .map_err(|_| Failure::new(format!("the digest of `{name}` is not one of SHA-256")))?;
            documents.insert(document, Digest(digest));
        }
        let documents = (known != Some(revision.as_str())).then_some(documents);
        Ok(Heads { revision: Revision(revision), store_time, age: Span::ZERO, documents })
    }

    async fn heads_now(&self, known: Option<&str>) -> Result<Heads, StoreError> {
        self.within("ask for changes in", || self.whole(), self.look(known)).await
    }
}

#[async_trait]
impl Store for PostgresStore {
    fn kind(&self) -> &'static str {
        "postgres"
    }

    fn place(&self) -> Option<String> {
        self.pool.place()
    }

    fn locate(&self, document: &Document) -> String {
        format!("{document} in PostgreSQL at {}, schema `{}`", self.pool.settings.label, self.pool.settings.schema)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        let name = self.row(document, "read")?;
        self.within("read", || self.locate(document), self.read_row(&name)).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        let name = self.row(document, "write")?;
        self.within("write", || self.locate(document), self.replace_row(&name, expected, bytes)).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        let name = self.row(document, "remove")?;
        self.within("remove", || self.locate(document), self.remove_row(&name)).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.within("list the keyrings in", || self.whole(), self.keyrings()).await
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for PostgresStore {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        let known = known.map(|revision| revision.0.as_str());
        if known.is_none() || wait.is_zero() {
            return self.heads_now(known).await;
        }
        let until = Instant::now() + wait;
        let wake = self.wake.get_or_init(|| Wake::start(self.pool.clone()));
        loop {
            // Listened from before the question, so that nothing falls between the two.
            let mut changes = wake.changes();
            let heads = self.heads_now(known).await?;
            let left = until.saturating_duration_since(Instant::now());
            if heads.documents.is_some() || left.is_zero() {
                return Ok(heads);
            }
            let pause = if wake.is_listening() { left } else { left.min(jittered(POLL_EVERY)) };
            // Both outcomes lead to the same question.
            let _ = tokio::time::timeout(pause, changes.changed()).await;
        }
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.within("report this replica to", || self.whole(), presence::report(&self.pool, replicas)).await
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.within("read the replicas in", || self.whole(), presence::replicas(&self.pool, longest)).await
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.within("forget replicas in", || self.whole(), presence::forget(&self.pool, replicas)).await
    }
}

impl PostgresStore {
    /// The row of a document that belongs here.
    fn row(&self, document: &Document, operation: &'static str) -> Result<String, StoreError> {
        row(document).ok_or_else(|| {
            let problem = "each replica keeps it for itself, in a store of its own";
            Failure::new(problem).of(operation, self.locate(document))
        })
    }
}

fn row(document: &Document) -> Option<String> {
    match document {
        Document::Initialising => Some("initialising".to_owned()),
        Document::Installation => Some("installation".to_owned()),
        Document::Notices => Some("notices".to_owned()),
        Document::Keyring(name) => Some(format!("{KEYRING}{name}")),
        Document::Seen(_) | Document::SeenInstallation | Document::Alive => None,
    }
}

fn document(row: &str) -> Option<Document> {
    match row {
        "initialising" => Some(Document::Initialising),
        "installation" => Some(Document::Installation),
        "notices" => Some(Document::Notices),
        _ => Name::parse(row.strip_prefix(KEYRING)?).ok().map(Document::Keyring),
    }
}
