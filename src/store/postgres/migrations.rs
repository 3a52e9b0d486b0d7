//! The tables' versions. Migrations only add, so that replicas of neighbouring releases work side by side while a fleet is
//! upgraded: the new tables first, then one replica after the other.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::failure::Failure;

/// One step, and what a release must know to work with the tables after it.
struct Migration {
    version: i32,
    /// Releases whose [`NEWEST`] is at least this work with these tables.
    compatible_from: i32,
    sql: &'static str,
}

const MIGRATIONS: [Migration; 2] = [
    Migration { version: 1, compatible_from: 1, sql: include_str!("migrations/0001_documents.sql") },
    Migration { version: 2, compatible_from: 1, sql: include_str!("migrations/0002_audit.sql") },
];

/// The version that this release needs.
const NEEDED: i32 = 2;
/// The newest version that this release knows.
pub const NEWEST: i32 = MIGRATIONS[MIGRATIONS.len() - 1].version;

/// Where the versions are noted; older and newer releases read it.
const VERSIONS: &str = "CREATE TABLE IF NOT EXISTS {schema}.migrations (version int PRIMARY KEY, compatible_from int NOT \
     NULL, release text NOT NULL, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())";
const GRANTS: &str = include_str!("grants.sql");
/// Migrations may wait for each other, and for a transaction that uses a table.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether this release can work with the tables as they are.
pub(super) async fn check(client: &Client, schema: &str) -> Result<(), Failure> {
    let found = version(client, schema).await.map_err(|error| match error.code() {
        Some(&SqlState::UNDEFINED_TABLE | &SqlState::INVALID_SCHEMA_NAME) => Failure::because(
            format!(
                "there are no tables of jwksd in the schema `{schema}`: run `jwksd init` with the URL of the role that \
                 is to own them"
            ),
            error,
        ),
        _ => Failure::of_statement(error),
    })?;
    match found {
        Some((version, _)) if version < NEEDED => Err(Failure::new(format!(
            "the tables in the schema `{schema}` have version {version}, this release needs {NEEDED}: run its `jwksd init` \
             with the URL of the role that owns them"
        ))),
        Some((version, from)) if version > NEWEST && from > NEWEST => Err(Failure::new(format!(
            "the tables in the schema `{schema}` have version {version}, which needs a release that knows version {from}; \
             this one knows {NEWEST}: run a newer jwksd. Nothing was changed"
        ))),
        Some(_) => Ok(()),
        None => Err(Failure::new(format!(
            "the tables in the schema `{schema}` are unfinished: run `jwksd init` with the URL of the role that owns them"
        ))),
    }
}

/// Brings the tables to the newest version, and grants the roles that exist what they need. Does nothing where all is
/// done; several may run at once. Needs the rights of the schema's owner, or to make the schema.
pub(super) async fn run(client: &mut Client, schema: &str) -> Result<(), Failure> {
    let fill = |sql: &str| {
        let (manager, signer) = (format!("{schema}_manager"), format!("{schema}_signer"));
        sql.replace("{schema}", &quoted(schema)).replace("{manager}", &manager).replace("{signer}", &signer)
    };
    one_at_a_time(client, schema, &[prepare(schema), fill(VERSIONS)]).await?;
    if let Some((version, from)) = version(client, schema).await?
        && version > NEWEST
    {
        // Newer tables are the newer release's business, their grants included.
        return if from > NEWEST { check(client, schema).await } else { Ok(()) };
    }
    for Migration { version, compatible_from, sql } in MIGRATIONS {
        let note = format!(
            "INSERT INTO {{schema}}.migrations (version, compatible_from, release) VALUES ({version}, {compatible_from}, \
             '{}') ON CONFLICT DO NOTHING",
            env!("CARGO_PKG_VERSION")
        );
        let is_done = fill("SELECT 1 FROM {schema}.migrations WHERE version >= $1 LIMIT 1");
        if client.query_typed_opt(&is_done, &[(&version, Type::INT4)]).await?.is_none() {
            // Somebody else may be through with it by the time the lock is had: each can be repeated.
            one_at_a_time(client, schema, &[fill(sql), fill(&note)]).await?;
        }
    }
    one_at_a_time(client, schema, &[fill(GRANTS)]).await
}

/// `CREATE SCHEMA IF NOT EXISTS` wants the right to make one even where it is there.
fn prepare(schema: &str) -> String {
    format!(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = '{schema}') THEN CREATE SCHEMA {}; \
         END IF; END $$",
        quoted(schema)
    )
}

async fn one_at_a_time(client: &mut Client, schema: &str, steps: &[String]) -> Result<(), Failure> {
    let transaction = client.transaction().await?;
    let patience = PATIENCE.as_millis();
    transaction
        .batch_execute(&format!(
            "SET LOCAL lock_timeout = {patience}; SET LOCAL statement_timeout = {patience}; \
             SET LOCAL synchronous_commit = on; SELECT pg_advisory_xact_lock(hashtext('jwksd migrations of {schema}'))"
        ))
        .await?;
    for step in steps {
        transaction.batch_execute(step).await?;
    }
    transaction.commit().await?;
    Ok(())
}

/// Version of the tables, and what their users must know.
async fn version(client: &Client, schema: &str) -> Result<Option<(i32, i32)>, tokio_postgres::Error> {
    let schema = quoted(schema);
    let sql = format!("SELECT version, compatible_from FROM {schema}.migrations ORDER BY version DESC LIMIT 1");
    let row = client.query_typed_opt(&sql, &[]).await?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).transpose()
}

/// The schema as it stands in statements: a plain name may still be one of SQL's words.
pub(super) fn quoted(schema: &str) -> String {
    format!("\"{schema}\"")
}
