//! What the PostgreSQL store promises beyond what every store does: durable writes, rights, tables of several versions,
//! servers and networks that fail, and whom it trusts.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "store_postgres/failures.rs"]
mod failures;
#[path = "store_postgres/schema.rs"]
mod schema;
mod support;
#[path = "store_postgres/trust.rs"]
mod trust;
#[path = "store_postgres/writes.rs"]
mod writes;

use jwksd::keyring::name::Name;
use jwksd::store::postgres::{PostgresSettings, PostgresStore};
use jwksd::store::shared::Report;
use jwksd::store::{Document, StoreError};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn keyring(text: &str) -> Document {
    Document::Keyring(name(text))
}

fn report(replica: &str) -> Report {
    Report {
        replica: replica.to_owned(),
        role: "signer".to_owned(),
        version: "0.1.0".to_owned(),
        publishes: true,
        tells: false,
        stopped: false,
        generations: [(name("a"), 1)].into(),
        resumed: Default::default(),
    }
}

fn open(settings: PostgresSettings) -> PostgresStore {
    PostgresStore::new(settings).unwrap()
}

/// Message of an error that another try may help against; it and its causes hold no password.
fn unavailable<T>(result: Result<T, StoreError>) -> String {
    let error = result.map(|_| ()).expect_err("it fails");
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(error) = cause {
        for text in [error.to_string(), format!("{error:?}")] {
            assert!(!text.contains(support::postgres::PASSWORD), "{text}");
        }
        cause = error.source();
    }
    error.to_string()
}
