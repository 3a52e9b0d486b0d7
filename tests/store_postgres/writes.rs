//! Durability, the audit table, the revision, and what people may do by hand.

use std::collections::BTreeSet;
use std::time::Duration;

use jwksd::keyring::jwk::Kid;
use jwksd::keyring::record::{AuditEntry, Journal};
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::data_keys::DataKeys;
use jwksd::store::postgres::PostgresSettings;
use jwksd::store::record::{Header, Kind, seal_record};
use jwksd::store::shared::SharedStore as _;
use jwksd::store::{Digest, Store as _};

use super::support::postgres::{PostgresServer, settings};
use super::{keyring, open, report, unavailable};
use crate::support::eventually;

/// Notes what durability was in force where a document changed.
const WITNESS: &str = "CREATE TABLE witness (durability text); GRANT INSERT ON witness TO PUBLIC; \
     CREATE FUNCTION witness() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
     INSERT INTO public.witness VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$; \
     CREATE TRIGGER witness AFTER INSERT OR UPDATE OR DELETE ON jwksd.documents \
     FOR EACH ROW EXECUTE FUNCTION witness()";

#[tokio::test]
async fn a_weaker_setting_of_the_server_does_not_weaken_a_write() {
    let database = PostgresServer::shared().await.database().await;
    let store = database.store().await;
    database.sql(WITNESS).await;
    for (setting, in_force) in
        [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")]
    {
        database.sql(&format!("ALTER DATABASE {} SET synchronous_commit = {setting}", database.name)).await;
        // Of new connections.
        let store = open(settings(&database.url()));
        store.replace(&keyring("a"), None, b"x").await.unwrap();
        store.replace(&keyring("a"), Some(Digest::of(b"x")), b"y").await.unwrap();
        store.remove(&keyring("a")).await.unwrap();
        let seen = database.rows("DELETE FROM witness RETURNING durability").await;
        assert_eq!(seen, [in_force; 3], "{setting}");
    }
    drop(store);
}

#[tokio::test]
async fn what_was_written_outlives_the_server_though_that_does_not_wait_for_its_disk() {
    let server = PostgresServer::start(&[("synchronous_commit", "off"), ("wal_writer_delay", "10s")]).await;
    let database = server.database().await;
    let store = database.store().await;
    for round in 0..3 {
        let document = keyring(&format!("k{round}"));
        store.replace(&document, None, b"x").await.unwrap();
        server.kill();
        server.resume();
        let bytes = eventually("the server", Duration::from_secs(30), async || store.read(&document).await.ok()).await;
        assert_eq!(bytes.unwrap(), b"x");
    }
}

#[tokio::test]
async fn a_write_that_no_synchronous_standby_confirms_has_no_known_outcome() {
    let server = PostgresServer::start(&[("synchronous_commit", "off")]).await;
    let database = server.database().await;
    drop(database.store().await);
    server.configure(&[("synchronous_standby_names", "nobody")]);
    server.reload();
    let reloaded = async || (database.rows("SHOW synchronous_standby_names").await == ["nobody"]).then_some(());
    eventually("the new setting", Duration::from_secs(10), reloaded).await;
    let store = open(PostgresSettings { statement_timeout: Duration::from_secs(1), ..settings(&database.url()) });
    let begun = tokio::time::Instant::now();
    let message = unavailable(store.replace(&keyring("a"), None, b"x").await);
    assert!(begun.elapsed() < Duration::from_secs(3) && message.contains("standbys"), "{message}");
    // Nobody sees it as long as it waits.
    assert_eq!(store.read(&keyring("a")).await.unwrap(), None);
    assert_eq!(store.heads(None, Duration::ZERO).await.unwrap().documents.unwrap().len(), 0);

    // Somebody cancels the wait: committed here, perhaps nowhere else.
    let cancel = async || {
        let waiting = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        (!database.rows(waiting).await.is_empty()).then_some(())
    };
    eventually("the first write", Duration::from_secs(10), cancel).await;
    let other = open(settings(&database.url()));
    let document = keyring("b");
    let cancelled = eventually("a wait to cancel", Duration::from_secs(10), cancel);
    let (written, ()) = tokio::join!(other.replace(&document, None, b"x"), cancelled);
    let message = unavailable(written);
    assert!(message.contains("committed it with a warning"), "{message}");
    // Presence waits for nobody.
    store.report(&[report("r")]).await.unwrap();
    store.forget(&["r"]).await.unwrap();
}

#[tokio::test]
async fn the_audit_table_keeps_what_the_records_journal_forgets() {
    let database = PostgresServer::shared().await.database().await;
    let store = open(settings(&database.with_roles().await.manager));
    let first = record("k", 1, &[entry(1, "created"), entry(2, "promoted")]);
    store.replace(&keyring("k"), None, &first).await.unwrap();
    // The first entry is gone from the record, and one with a character that PostgreSQL's text cannot hold is new.
    let second = record("k", 2, &[entry(2, "promoted"), entry(3, "re\0voked")]);
    store.replace(&keyring("k"), Some(Digest::of(&first)), &second).await.unwrap();
    // Of a write that is refused nothing is kept.
    let other = record("k", 3, &[entry(4, "lost")]);
    store.replace(&keyring("k"), Some(Digest::of(&first)), &other).await.unwrap_err();
    let rows = database
        .rows(
            "SELECT concat_ws(' ', lineage, keyset, seq, action, actor, reason, kids, extract(epoch FROM at)::int) \
               FROM jwksd.audit ORDER BY seq",
        )
        .await;
    assert_eq!(
        rows,
        [
            "lineage-k k 1 created alice because {kid-1} 1700000000",
            "lineage-k k 2 promoted alice because {kid-1} 1700000000",
            "lineage-k k 3 re\u{fffd}voked alice because {kid-1} 1700000000",
        ]
    );
    let columns = "SELECT concat_ws(' ', document, lineage, generation) FROM jwksd.documents";
    assert_eq!(database.rows(columns).await, ["keyring/k lineage-k 2"]);
}

#[tokio::test]
async fn what_is_no_record_is_stored_all_the_same() {
    let database = PostgresServer::shared().await.database().await;
    let store = database.store().await;
    let odd = br#"{"lineage":"l","generation":18446744073709551615,"body":{"journal":{"audit":[{"seq":"one"},7]}}}"#;
    for (keyset, bytes) in [("a", &b"\xff\0"[..]), ("b", odd), ("c", br#"{"lineage":3}"#)] {
        store.replace(&keyring(keyset), None, bytes).await.unwrap();
        assert_eq!(store.read(&keyring(keyset)).await.unwrap().unwrap(), bytes);
    }
    assert!(database.rows("SELECT 1 FROM jwksd.audit").await.is_empty());
}

#[tokio::test]
async fn what_is_changed_by_hand_is_noticed_as_well() {
    let database = PostgresServer::shared().await.database().await;
    let store = database.store().await;
    store.replace(&keyring("a"), None, b"x").await.unwrap();
    let mut known = store.heads(None, Duration::ZERO).await.unwrap().revision;
    for sql in [
        "UPDATE jwksd.documents SET bytes = 'y'",
        "INSERT INTO jwksd.documents (document, bytes) VALUES ('of a newer release', 'z')",
        "DELETE FROM jwksd.documents WHERE document = 'keyring/a'",
        "TRUNCATE jwksd.documents",
    ] {
        let waiting = store.heads(Some(&known), Duration::from_secs(60));
        let (heads, ()) =
            tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(waiting, database.sql(sql)) })
                .await
                .unwrap_or_else(|_| panic!("{sql}"));
        let heads = heads.unwrap();
        assert_ne!(heads.revision, known, "{sql}");
        let digest = heads.documents.unwrap().get(&keyring("a")).copied();
        assert_eq!(
            digest,
            (!sql.contains("keyring/a") && !sql.starts_with("TRUNCATE")).then(|| Digest::of(b"y")),
            "{sql}"
        );
        known = heads.revision;
    }
}

#[tokio::test]
async fn replicas_that_come_and_go_do_not_fill_the_table() {
    let database = PostgresServer::shared().await.database().await;
    let store = database.store().await;
    let many = "INSERT INTO jwksd.replicas SELECT 'r' || n, 'all', '0', true, '{}', '{}', now() - n * interval '1 s' \
                FROM generate_series(1, 30000) AS n";
    database.sql(many).await;
    store.report(&[report("new")]).await.unwrap();
    assert_eq!(database.rows("SELECT count(*) FROM jwksd.replicas").await, ["10001"]);
    let replicas = store.replicas(Span::DAY).await.unwrap();
    assert_eq!(replicas.len(), 10000);
    assert!(replicas.iter().any(|replica| replica.report.replica == "new"));
    assert!(!replicas.iter().any(|replica| replica.report.replica == "r10001"));
}

#[tokio::test]
async fn a_database_is_told_from_others() {
    let server = PostgresServer::shared().await;
    let (one, other) = (server.database().await, server.database().await);
    let roles = one.with_roles().await;
    let (store, elsewhere) = (open(settings(&roles.manager)), other.store().await);
    let again = open(settings(&roles.signer));
    assert_eq!(again.place(), None);
    for store in [&store, &elsewhere, &again] {
        store.heads(None, Duration::ZERO).await.unwrap();
    }
    assert!(store.place().is_some());
    assert_eq!(store.place(), again.place());
    assert_ne!(store.place(), elsewhere.place());
}

fn entry(seq: u64, action: &str) -> AuditEntry {
    AuditEntry {
        seq,
        at: Timestamp::from_secs(1_700_000_000),
        action: action.to_owned(),
        actor: "alice".to_owned(),
        reason: Some("because".to_owned()),
        kids: BTreeSet::from([Kid::parse("kid-1").unwrap()]),
        detail: None,
        generation: None,
        changes: Vec::new(),
    }
}

fn record(keyset: &str, generation: u64, audit: &[AuditEntry]) -> Vec<u8> {
    let journal = Journal { next_seq: 9, audit: audit.to_vec(), answered: Vec::new() };
    let lineage = format!("lineage-{keyset}");
    let header = Header { kind: Kind::Keyring, name: keyset, lineage: &lineage, generation, previous: None };
    let keys = DataKeys::ephemeral("installation");
    seal_record("x", &header, &serde_json::json!({ "keys": [], "journal": journal }), &keys).unwrap()
}
