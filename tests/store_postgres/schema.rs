//! Tables of several versions, and roles with least rights.

use std::time::Duration;

use jwksd::keyring::time::Span;
use jwksd::store::postgres::{NEWEST_SCHEMA, PostgresSettings};
use jwksd::store::shared::SharedStore as _;
use jwksd::store::{Digest, Store as _};

use super::support::postgres::{Database, PostgresServer, connect, settings};
use super::{keyring, open, report, unavailable};

const VERSIONS: &str = "SELECT version FROM jwksd.migrations ORDER BY version";

async fn database() -> Database {
    PostgresServer::shared().await.database().await
}

fn all_versions() -> Vec<String> {
    (1..=NEWEST_SCHEMA).map(|version| version.to_string()).collect()
}

#[tokio::test]
async fn an_empty_database_gets_its_tables_once() {
    let database = database().await;
    let store = open(settings(&database.url()));
    let message = unavailable(store.read(&keyring("a")).await);
    assert!(message.contains("jwksd init") && message.contains("`jwksd`"), "{message}");
    store.migrate().await.unwrap();
    store.replace(&keyring("a"), None, b"x").await.unwrap();
    let known = store.heads(None, Duration::ZERO).await.unwrap().revision;
    store.migrate().await.unwrap();
    assert_eq!(store.heads(Some(&known), Duration::ZERO).await.unwrap().documents, None);
    assert_eq!(database.rows(VERSIONS).await, all_versions());
}

#[tokio::test]
async fn any_plain_name_is_good_for_a_schema() {
    let database = database().await;
    // One of SQL's words, and one that is not there.
    for schema in ["user", "other_1"] {
        let store = open(PostgresSettings { schema: schema.to_owned(), ..settings(&database.url()) });
        store.migrate().await.unwrap();
        store.replace(&keyring("a"), None, schema.as_bytes()).await.unwrap();
        let known = store.heads(None, Duration::ZERO).await.unwrap().revision;
        let waiting = store.heads(Some(&known), Duration::from_secs(60));
        let other = keyring("b");
        let (heads, written) = tokio::join!(waiting, store.replace(&other, None, b"x"));
        written.unwrap();
        assert_eq!(heads.unwrap().documents.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn two_that_migrate_at_once_do_not_get_in_each_others_way() {
    let database = database().await;
    let stores: Vec<_> = (0..6).map(|_| open(settings(&database.url()))).collect();
    let migrated = futures_util::future::join_all(stores.iter().map(|store| store.migrate())).await;
    for result in migrated {
        result.unwrap();
    }
    assert_eq!(database.rows(VERSIONS).await, all_versions());
    assert_eq!(database.rows("SELECT count(*) FROM jwksd.state").await, ["1"]);
}

#[tokio::test]
async fn older_tables_are_refused_until_they_are_brought_up_to_date() {
    let database = database().await;
    database.store().await.replace(&keyring("a"), None, b"x").await.unwrap();
    database.sql("DELETE FROM jwksd.migrations WHERE version = 2; DROP TABLE jwksd.audit").await;
    let store = open(settings(&database.url()));
    let message = unavailable(store.read(&keyring("a")).await);
    assert!(message.contains("version 1") && message.contains("jwksd init"), "{message}");
    store.migrate().await.unwrap();
    assert_eq!(store.read(&keyring("a")).await.unwrap().unwrap(), b"x");
    assert_eq!(database.rows("SELECT count(*) FROM jwksd.audit").await, ["0"]);
}

#[tokio::test]
async fn newer_tables_are_used_while_they_allow_it() {
    let database = database().await;
    drop(database.store().await);
    let newer = |compatible_from: i32| {
        let version = NEWEST_SCHEMA + 5;
        format!(
            "INSERT INTO jwksd.migrations VALUES ({version}, {compatible_from}, 'future') \
                 ON CONFLICT (version) DO UPDATE SET compatible_from = excluded.compatible_from"
        )
    };
    database.sql(&newer(NEWEST_SCHEMA)).await;
    let store = open(settings(&database.url()));
    store.replace(&keyring("a"), None, b"x").await.unwrap();
    store.migrate().await.unwrap();
    database.sql(&newer(NEWEST_SCHEMA + 1)).await;
    let store = open(settings(&database.url()));
    for message in [
        unavailable(store.replace(&keyring("a"), Some(Digest::of(b"x")), b"y").await),
        unavailable(store.heads(None, Duration::ZERO).await),
        unavailable(store.migrate().await),
    ] {
        assert!(message.contains("newer jwksd"), "{message}");
    }
    assert_eq!(database.rows("SELECT convert_from(bytes, 'UTF8') FROM jwksd.documents").await, ["x"]);
}

#[tokio::test]
async fn who_may_not_make_tables_says_who_may() {
    let database = database().await;
    let url = database.url_of("jwksd_manager", "127.0.0.1", database.port);
    let store = open(settings(&url));
    for message in [unavailable(store.migrate().await), unavailable(store.read(&keyring("a")).await)] {
        assert!(message.contains("permission denied") && message.contains("jwksd init"), "{message}");
    }
}

#[tokio::test]
async fn a_signer_reads_and_tells_of_itself_and_no_more() {
    let database = database().await;
    let roles = database.with_roles().await;
    let manager = open(settings(&roles.manager));
    manager.replace(&keyring("a"), None, b"x").await.unwrap();
    let signer = open(settings(&roles.signer));
    let known = signer.heads(None, Duration::ZERO).await.unwrap();
    assert_eq!(known.documents.unwrap()[&keyring("a")], Digest::of(b"x"));
    assert_eq!(signer.read(&keyring("a")).await.unwrap().unwrap(), b"x");
    assert_eq!(signer.keysets().await.unwrap().len(), 1);
    signer.report(&[report("s")]).await.unwrap();
    assert_eq!(signer.replicas(Span::HOUR).await.unwrap().len(), 1);
    signer.forget(&["s"]).await.unwrap();
    let document = keyring("a");
    let writing = manager.replace(&document, Some(Digest::of(b"x")), b"y");
    let (heads, written) = tokio::join!(signer.heads(Some(&known.revision), Duration::from_secs(60)), writing);
    written.unwrap();
    assert!(heads.unwrap().documents.is_some());
    for message in [
        unavailable(signer.replace(&keyring("a"), Some(Digest::of(b"y")), b"z").await),
        unavailable(signer.replace(&keyring("b"), None, b"z").await),
        unavailable(signer.remove(&keyring("a")).await),
        unavailable(signer.migrate().await),
    ] {
        assert!(message.contains("permission denied") && message.contains("SCHEMA_manager"), "{message}");
    }
    assert_eq!(manager.read(&keyring("a")).await.unwrap().unwrap(), b"y");
}

/// What each role may do with each table, however it is asked: the code above uses no more, and nobody has more.
#[tokio::test]
async fn roles_have_the_rights_that_they_need_and_no_others() {
    let database = database().await;
    let roles = database.with_roles().await;
    for (url, role, rights) in [
        (
            &roles.manager,
            "jwksd_manager",
            [
                "audit: INSERT SELECT",
                "documents: DELETE INSERT SELECT UPDATE",
                "migrations: SELECT",
                "replicas: DELETE INSERT SELECT UPDATE",
                "state: SELECT UPDATE",
            ]
            .as_slice(),
        ),
        (
            &roles.signer,
            "jwksd_signer",
            ["documents: SELECT", "migrations: SELECT", "replicas: DELETE INSERT SELECT UPDATE", "state: SELECT"]
                .as_slice(),
        ),
    ] {
        let granted = database
            .rows(&format!(
                "SELECT table_name || ': ' || string_agg(privilege_type, ' ' ORDER BY privilege_type) \
                 FROM information_schema.table_privileges WHERE table_schema = 'jwksd' AND grantee IN ('{role}', 'PUBLIC') \
                 GROUP BY table_name ORDER BY table_name"
            ))
            .await;
        assert_eq!(granted, rights, "{role}");
        let client = connect(url).await.unwrap();
        for sql in [
            "DELETE FROM jwksd.audit",
            "UPDATE jwksd.audit SET actor = 'nobody'",
            "TRUNCATE jwksd.audit",
            "TRUNCATE jwksd.documents",
            "UPDATE jwksd.migrations SET version = 7",
            "CREATE TABLE jwksd.mine (x int)",
            "ALTER TABLE jwksd.documents DISABLE TRIGGER ALL",
        ] {
            let refused = client.batch_execute(sql).await.unwrap_err();
            assert_eq!(refused.code(), Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE), "{role}: {sql}");
        }
    }
}
