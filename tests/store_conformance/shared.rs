//! What every store must do that several replicas share, run over each of them.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use jwksd::keyring::time::Span;
use jwksd::store::postgres::PostgresStore;
use jwksd::store::shared::{LONGEST_REPLICA, Report, Revision, SharedStore};
use jwksd::store::{Digest, Document, StoreError};
use tokio::time::Instant;

use super::support::postgres::{Database, PostgresServer, settings};
use super::{all_documents, keyring, name};

/// A shared store under test, and how others reach what it holds.
pub struct SharedSubject {
    pub store: Arc<dyn SharedStore>,
    /// Another replica's handle on the same content.
    pub another: Box<dyn Fn() -> Arc<dyn SharedStore>>,
    /// Copies the content as a backup would.
    back_up: AsyncStep,
    /// Puts back what was copied last.
    restore: AsyncStep,
    /// Lets that much time pass for the replicas told of so far.
    age: Box<dyn Fn(Duration) -> Step>,
}

type Step = Pin<Box<dyn Future<Output = ()>>>;
type AsyncStep = Box<dyn Fn() -> Step>;

impl SharedSubject {
    pub async fn postgres() -> Self {
        let database = PostgresServer::shared().await.database().await;
        let roles = database.with_roles().await;
        let another =
            move || -> Arc<dyn SharedStore> { Arc::new(PostgresStore::new(settings(&roles.manager)).unwrap()) };
        // As pg_dump and pg_restore do: triggers do not fire, every table comes back.
        const COPY: &str = "DROP SCHEMA IF EXISTS backup CASCADE; CREATE SCHEMA backup; \
             CREATE TABLE backup.documents AS SELECT document, bytes FROM jwksd.documents; \
             CREATE TABLE backup.state AS SELECT * FROM jwksd.state";
        const PUT_BACK: &str = "BEGIN; SET LOCAL session_replication_role = replica; \
             DELETE FROM jwksd.documents; INSERT INTO jwksd.documents (document, bytes) SELECT * FROM backup.documents; \
             DELETE FROM jwksd.state; INSERT INTO jwksd.state SELECT * FROM backup.state; COMMIT";
        let run = |sql: String, database: Database| -> Step { Box::pin(async move { database.sql(&sql).await }) };
        let (copied, restored, aged) = (database.clone(), database.clone(), database);
        SharedSubject {
            store: another(),
            another: Box::new(another),
            back_up: Box::new(move || run(COPY.to_owned(), copied.clone())),
            restore: Box::new(move || run(PUT_BACK.to_owned(), restored.clone())),
            age: Box::new(move |by| {
                let sql =
                    format!("UPDATE jwksd.replicas SET reported_at = reported_at - interval '{} s'", by.as_secs());
                run(sql, aged.clone())
            }),
        }
    }
}

/// Each case as a test of each shared store.
macro_rules! shared_conformance {
    ($($case:ident),* $(,)?) => {
        mod shared_postgres_store {
            $( #[tokio::test] async fn $case() { super::$case(super::SharedSubject::postgres().await).await } )*
        }
    };
}

shared_conformance![
    heads_show_every_shared_document_with_its_digest,
    a_known_revision_is_answered_without_documents,
    every_change_is_another_revision,
    waiting_ends_with_a_write_of_another,
    waiting_ends_in_time_without_a_change,
    an_unknown_revision_is_answered_at_once,
    what_was_restored_is_never_the_revision_that_was_seen,
    of_concurrent_writers_at_different_handles_exactly_one_wins,
    the_stores_clock_goes_on,
    replicas_are_told_of_in_order_of_name,
    a_later_report_takes_the_place_of_an_earlier_one,
    replicas_that_fell_silent_age_and_are_left_out,
    a_replica_that_is_forgotten_is_gone,
    what_each_replica_keeps_for_itself_has_no_place_here,
];

/// Far longer than a notification takes, far shorter than the waits given.
const SOON: Duration = Duration::from_secs(5);
const LONG: Duration = Duration::from_secs(60);

fn report(replica: &str) -> Report {
    Report {
        replica: replica.to_owned(),
        role: "all".to_owned(),
        version: "0.1.0".to_owned(),
        publishes: true,
        tells: replica != "b",
        stopped: replica == "a",
        generations: BTreeMap::from([(name("a"), 7), (name("b"), u64::from(u32::MAX))]),
        resumed: BTreeMap::new(),
    }
}

async fn heads_show_every_shared_document_with_its_digest(subject: SharedSubject) {
    let store = subject.store;
    assert_eq!(store.heads(None, LONG).await.unwrap().documents, Some(BTreeMap::new()));
    let documents = [Document::Initialising, Document::Installation, keyring("a"), keyring("installation")];
    for document in &documents {
        store.replace(document, None, document.to_string().as_bytes()).await.unwrap();
    }
    let digest = |document: &Document| (document.clone(), Digest::of(document.to_string().as_bytes()));
    let expected: BTreeMap<_, _> = documents.iter().map(digest).collect();
    assert_eq!((subject.another)().heads(None, LONG).await.unwrap().documents, Some(expected));
}

async fn a_known_revision_is_answered_without_documents(subject: SharedSubject) {
    subject.store.replace(&keyring("a"), None, b"x").await.unwrap();
    let seen = subject.store.heads(None, Duration::ZERO).await.unwrap();
    let again = (subject.another)().heads(Some(&seen.revision), Duration::ZERO).await.unwrap();
    assert_eq!((again.revision, again.documents), (seen.revision, None));
}

async fn every_change_is_another_revision(subject: SharedSubject) {
    let store = subject.store;
    let mut seen = vec![store.heads(None, Duration::ZERO).await.unwrap().revision];
    store.replace(&keyring("a"), None, b"x").await.unwrap();
    seen.push(store.heads(None, Duration::ZERO).await.unwrap().revision);
    store.replace(&keyring("a"), Some(Digest::of(b"x")), b"y").await.unwrap();
    seen.push(store.heads(None, Duration::ZERO).await.unwrap().revision);
    store.replace(&keyring("a"), Some(Digest::of(b"y")), b"x").await.unwrap();
    seen.push(store.heads(None, Duration::ZERO).await.unwrap().revision);
    store.remove(&keyring("a")).await.unwrap();
    seen.push(store.heads(None, Duration::ZERO).await.unwrap().revision);
    for (index, revision) in seen.iter().enumerate() {
        assert!(!seen[..index].contains(revision), "{seen:?}");
    }
    // What changes nothing is none.
    store.replace(&keyring("a"), Some(Digest::of(b"y")), b"z").await.unwrap_err();
    store.report(&[report("r")]).await.unwrap();
    assert_eq!(Some(&store.heads(None, Duration::ZERO).await.unwrap().revision), seen.last());
}

async fn waiting_ends_with_a_write_of_another(subject: SharedSubject) {
    let other = (subject.another)();
    let mut known = subject.store.heads(None, Duration::ZERO).await.unwrap().revision;
    let mut current = None;
    // The first wait may begin before anything listens; the later ones hear of it.
    for text in [b"1", b"2", b"3"] {
        let begun = Instant::now();
        let waiting = subject.store.heads(Some(&known), LONG);
        let writing = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            other.replace(&keyring("a"), current, text).await.unwrap();
        };
        let (heads, ()) = tokio::join!(waiting, writing);
        let heads = heads.unwrap();
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        assert_eq!(heads.documents.unwrap()[&keyring("a")], Digest::of(text));
        (known, current) = (heads.revision, Some(Digest::of(text)));
    }
}

async fn waiting_ends_in_time_without_a_change(subject: SharedSubject) {
    let known = subject.store.heads(None, Duration::ZERO).await.unwrap();
    let begun = Instant::now();
    let heads = subject.store.heads(Some(&known.revision), Duration::from_millis(700)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(700) && begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!((heads.revision, heads.documents), (known.revision, None));
    // It is what the store said at the end of the wait, not at its beginning.
    assert!(heads.store_time.since(known.store_time) >= Span::from_millis(600));
}

async fn an_unknown_revision_is_answered_at_once(subject: SharedSubject) {
    let begun = Instant::now();
    let heads = subject.store.heads(Some(&Revision("of another store".to_owned())), LONG).await.unwrap();
    assert!(heads.documents.is_some() && begun.elapsed() < SOON);
}

async fn what_was_restored_is_never_the_revision_that_was_seen(subject: SharedSubject) {
    let store = subject.store;
    store.replace(&keyring("a"), None, b"old").await.unwrap();
    (subject.back_up)().await;
    store.replace(&keyring("a"), Some(Digest::of(b"old")), b"new").await.unwrap();
    let seen = store.heads(None, Duration::ZERO).await.unwrap();
    (subject.restore)().await;
    let restored = store.heads(Some(&seen.revision), Duration::ZERO).await.unwrap();
    assert_eq!(restored.documents.unwrap()[&keyring("a")], Digest::of(b"old"));
    // As many writes as before lead to another place.
    store.replace(&keyring("a"), Some(Digest::of(b"old")), b"other").await.unwrap();
    let other = store.heads(Some(&seen.revision), Duration::ZERO).await.unwrap();
    assert_eq!(other.documents.unwrap()[&keyring("a")], Digest::of(b"other"));
}

async fn of_concurrent_writers_at_different_handles_exactly_one_wins(subject: SharedSubject) {
    subject.store.replace(&keyring("a"), None, b"0").await.unwrap();
    let mut current = Digest::of(b"0");
    for round in 0..5 {
        let texts: Vec<String> = (0..6).map(|writer| format!("{round} {writer}")).collect();
        let write = async |text: &String| {
            (subject.another)().replace(&keyring("a"), Some(current), text.as_bytes()).await.is_ok()
        };
        let won = futures_util::future::join_all(texts.iter().map(write)).await;
        assert_eq!(won.iter().filter(|won| **won).count(), 1);
        let winner = &texts[won.iter().position(|won| *won).unwrap()];
        assert_eq!(subject.store.read(&keyring("a")).await.unwrap().unwrap(), winner.as_bytes());
        current = Digest::of(winner.as_bytes());
    }
}

async fn the_stores_clock_goes_on(subject: SharedSubject) {
    let first = subject.store.heads(None, Duration::ZERO).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let second = (subject.another)().heads(None, Duration::ZERO).await.unwrap();
    assert!(second.store_time > first.store_time);
    assert_eq!(second.age, Span::ZERO);
}

async fn replicas_are_told_of_in_order_of_name(subject: SharedSubject) {
    assert_eq!(subject.store.replicas(Span::HOUR).await.unwrap(), []);
    let longest = "r".repeat(LONGEST_REPLICA);
    let reports = [report("b"), report("a"), report(&longest), report("A é")];
    subject.store.report(&reports).await.unwrap();
    let replicas = (subject.another)().replicas(Span::HOUR).await.unwrap();
    let reported: Vec<_> = replicas.iter().map(|replica| replica.report.clone()).collect();
    assert_eq!(reported, [report("A é"), report("a"), report("b"), report(&longest)]);
    assert!(replicas.iter().all(|replica| replica.age < Span::from_std(SOON)));
}

async fn a_later_report_takes_the_place_of_an_earlier_one(subject: SharedSubject) {
    let store = subject.store;
    store.report(&[report("a"), report("b")]).await.unwrap();
    (subject.age)(Duration::from_secs(600)).await;
    let mut later = report("a");
    (later.role, later.publishes) = ("signer".to_owned(), false);
    later.generations.insert(name("a"), 8);
    later.generations.remove(&name("b"));
    (subject.another)().report(std::slice::from_ref(&later)).await.unwrap();
    let replicas = store.replicas(Span::HOUR).await.unwrap();
    assert_eq!(replicas[0].report, later);
    assert!(replicas[0].age < Span::MINUTE);
    assert_eq!(replicas[1].report, report("b"));
    assert!(replicas[1].age >= Span::from_secs(600));
}

async fn replicas_that_fell_silent_age_and_are_left_out(subject: SharedSubject) {
    let store = subject.store;
    store.report(&[report("old")]).await.unwrap();
    (subject.age)(Duration::from_secs(600)).await;
    store.report(&[report("new")]).await.unwrap();
    let names = async |longest| -> Vec<String> {
        store.replicas(longest).await.unwrap().into_iter().map(|replica| replica.report.replica).collect()
    };
    assert_eq!(names(Span::MINUTE).await, ["new"]);
    assert_eq!(names(Span::HOUR).await, ["new", "old"]);
    assert_eq!(names(Span::MAX).await, ["new", "old"]);
    // After more than a day nobody asks for it any more.
    (subject.age)(Duration::from_secs(86_400)).await;
    store.report(&[report("new")]).await.unwrap();
    assert_eq!(names(Span::MAX).await, ["new"]);
}

async fn a_replica_that_is_forgotten_is_gone(subject: SharedSubject) {
    let store = subject.store;
    store.report(&[report("a"), report("b"), report("c")]).await.unwrap();
    store.forget(&["a", "c"]).await.unwrap();
    store.forget(&["a"]).await.unwrap();
    let replicas = (subject.another)().replicas(Span::HOUR).await.unwrap();
    assert_eq!(replicas.len(), 1);
    assert_eq!(replicas[0].report, report("b"));
}

async fn what_each_replica_keeps_for_itself_has_no_place_here(subject: SharedSubject) {
    for document in all_documents().iter().filter(|document| !document.is_shared()) {
        let unavailable = |error| matches!(error, StoreError::Unavailable { .. });
        assert!(unavailable(subject.store.read(document).await.unwrap_err()));
        assert!(unavailable(subject.store.replace(document, None, b"x").await.unwrap_err()));
        assert!(unavailable(subject.store.remove(document).await.unwrap_err()));
    }
}
