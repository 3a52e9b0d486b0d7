//! What went wrong with the database, in words that say what to do.

use std::error::Error;
use std::io;

use tokio_postgres::error::{DbError, SqlState};

use crate::store::StoreError;

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Failure {
    /// The document is not what the caller thinks; nothing was changed.
    Conflict,
    Problem {
        text: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
}

impl Failure {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Failure::Problem { text: text.into(), source: None }
    }

    pub(super) fn because(text: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Failure::Problem { text: text.into(), source: Some(Box::new(source)) }
    }

    /// Of a statement sent to a server that was ready.
    pub(super) fn of_statement(error: tokio_postgres::Error) -> Self {
        let text = match error.as_db_error() {
            Some(db) => statement_problem(db),
            None if error.is_closed() => "the connection to PostgreSQL was lost: it is tried again".to_owned(),
            None => match find::<io::Error>(&error) {
                Some(io) => format!("the connection to PostgreSQL was lost ({io}): it is tried again"),
                None => format!("PostgreSQL's answer was not understood: {error}"),
            },
        };
        Failure::because(text, error)
    }

    /// Of connecting to `server` as `user`.
    pub(super) fn of_connecting(error: tokio_postgres::Error, server: &str, user: &str) -> Self {
        let text = match error.as_db_error() {
            Some(db) => login_problem(db, server, user),
            None => network_problem(&error, server),
        };
        Failure::because(text, error)
    }

    pub(super) fn text(&self) -> String {
        match self {
            Failure::Conflict => "it is not what was read last".to_owned(),
            Failure::Problem { text, .. } => text.clone(),
        }
    }

    pub(super) fn of(self, operation: &'static str, document: String) -> StoreError {
        match self {
            Failure::Conflict => StoreError::Conflict { document },
            Failure::Problem { text, source } => StoreError::Unavailable { operation, document, problem: text, source },
        }
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Failure::of_statement(error)
    }
}

fn statement_problem(db: &DbError) -> String {
    let message = db.message();
    match *db.code() {
        SqlState::UNDEFINED_TABLE | SqlState::INVALID_SCHEMA_NAME | SqlState::UNDEFINED_COLUMN => format!(
            "the tables are not there ({message}): run `jwksd init` with the URL of the role that is to own them"
        ),
        SqlState::INSUFFICIENT_PRIVILEGE => format!(
            "{message}: the role in the URL lacks a right. Managers use SCHEMA_manager, signers SCHEMA_signer \
             (deploy/postgres/roles.sql); `jwksd init` with the owner's URL grants what these need"
        ),
        SqlState::READ_ONLY_SQL_TRANSACTION => format!(
            "{message}: this server or role takes no writes (a standby, or default_transaction_read_only); the URL must \
             lead to the primary"
        ),
        SqlState::QUERY_CANCELED => {
            format!("{message}: PostgreSQL was too slow for statement_timeout, or somebody cancelled it")
        }
        SqlState::LOCK_NOT_AVAILABLE => {
            format!("{message}: another transaction holds it, perhaps one that waits for a synchronous standby")
        }
        SqlState::DISK_FULL => format!("{message}: PostgreSQL's disk is full; what was there is intact"),
        SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN | SqlState::CANNOT_CONNECT_NOW => {
            format!("{message}: PostgreSQL stops or starts; it is tried again")
        }
        ref code => format!("{message} (SQLSTATE {})", code.code()),
    }
}

fn login_problem(db: &DbError, server: &str, user: &str) -> String {
    let message = db.message();
    match *db.code() {
        SqlState::INVALID_PASSWORD | SqlState::INVALID_AUTHORIZATION_SPECIFICATION => format!(
            "{server} refused the login of `{user}` ({message}): check user and password in the URL, and the server's pg_hba.conf"
        ),
        SqlState::INVALID_CATALOG_NAME => format!("{server}: {message}: make it (createdb), or correct the URL"),
        SqlState::INSUFFICIENT_PRIVILEGE => format!("{server}: {message}: grant `{user}` CONNECT on the database"),
        SqlState::TOO_MANY_CONNECTIONS => {
            format!("{server} has no connection left ({message}): raise max_connections, or lower connections here")
        }
        SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN | SqlState::CANNOT_CONNECT_NOW => {
            format!("{server} stops or starts ({message}); it is tried again")
        }
        ref code => format!("{server} refused the connection: {message} (SQLSTATE {})", code.code()),
    }
}

fn network_problem(error: &tokio_postgres::Error, server: &str) -> String {
    if let Some(tls) = find::<rustls::Error>(error) {
        return format!(
            "cannot trust {server}: {tls}. Its certificate must be valid for the host in the URL and come from an \
             authority in ca_file (without it: of the system)"
        );
    }
    if let Some(io) = find::<io::Error>(error) {
        let problem = match io.kind() {
            io::ErrorKind::ConnectionRefused => "connection refused; does PostgreSQL run there?".to_owned(),
            io::ErrorKind::NotFound => "there is no socket; does PostgreSQL run there?".to_owned(),
            _ => io.to_string(),
        };
        return format!("cannot connect to {server}: {problem}");
    }
    let reason = Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    let advice = if reason.contains("does not support TLS") { ": turn it on there (ssl = on)" } else { "" };
    format!("cannot connect to {server}: {reason}{advice}")
}

/// The first of this type in the chain, also inside of an I/O error, which hides what it wraps.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        let wrapped = error.downcast_ref::<io::Error>().and_then(|io| io.get_ref());
        next = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
