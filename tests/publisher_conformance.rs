//! What every publisher must do, run over each of them; then what each of them promises alone.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use jwksd::clock::SystemClock;
use jwksd::publisher::file::FilePublisher;
use jwksd::publisher::s3::{Bucket, S3Publisher};
use jwksd::publisher::{BODY_MAX, Headers, Outgoing, PublishError, Publisher, Version};

use support::localstack::REGION;
use support::storage::{BucketSite, Weather};

const PATH: &str = "/tenant-a/.well-known/jwks.json";

/// A place under test, as two daemons know it.
struct Subject {
    one: Arc<dyn Publisher>,
    other: Arc<dyn Publisher>,
    raw: Raw,
}

/// The place as somebody else knows it.
enum Raw {
    Folder(tempfile::TempDir),
    Bucket(BucketSite),
}

impl Subject {
    async fn file() -> Subject {
        let folder = tempfile::tempdir().unwrap();
        let publisher = || Arc::new(FilePublisher::new(folder.path().join("public")));
        Subject { one: publisher(), other: publisher(), raw: Raw::Folder(folder) }
    }

    async fn s3() -> Subject {
        let site = BucketSite::new().await;
        Subject { one: bucket(&site), other: bucket(&site), raw: Raw::Bucket(site) }
    }

    async fn tamper(&self, body: &str) {
        match &self.raw {
            Raw::Folder(folder) => fs::write(file_of(folder), body).unwrap(),
            Raw::Bucket(site) => site.tamper(&key(), body, None).await,
        }
    }

    async fn remove(&self) {
        match &self.raw {
            Raw::Folder(folder) => fs::remove_file(file_of(folder)).unwrap(),
            Raw::Bucket(site) => site.remove(&key()).await,
        }
    }
}

fn bucket(site: &BucketSite) -> Arc<dyn Publisher> {
    for (name, value) in BucketSite::environment() {
        // SAFETY: every test of this binary sets the same before it makes a client, and nothing sets another.
        unsafe { std::env::set_var(name, value) };
    }
    let bucket = Bucket {
        name: site.name.clone(),
        prefix: "published".to_owned(),
        region: Some(REGION.to_owned()),
        endpoint_url: Some(site.endpoint.clone()),
    };
    Arc::new(S3Publisher::new(bucket, Arc::new(SystemClock)))
}

fn key() -> String {
    format!("published{PATH}")
}

fn file_of(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("public").join(PATH.trim_start_matches('/'))
}

/// Each case as a test of each publisher.
macro_rules! conformance {
    ($($case:ident),* $(,)?) => {
        mod file { $( #[tokio::test] async fn $case() { super::$case(super::Subject::file().await).await } )* }
        mod s3 { $( #[tokio::test] async fn $case() { super::$case(super::Subject::s3().await).await } )* }
    };
}

conformance![
    where_nothing_was_placed_there_is_nothing,
    what_was_placed_is_read_back_by_everybody,
    placing_over_something_unexpected_is_a_conflict_and_changes_nothing,
    replacing_something_else_is_a_conflict_and_changes_nothing,
    replacing_what_is_gone_is_a_conflict,
    a_document_that_comes_back_to_what_it_was_is_still_another_one,
    of_concurrent_writers_exactly_one_wins,
    what_somebody_else_wrote_is_seen_and_can_be_replaced,
    what_is_too_large_is_refused,
    paths_do_not_get_in_each_others_way,
];

fn document(body: &str, generation: u64) -> Outgoing {
    Outgoing {
        body: Bytes::from(body.to_owned()),
        headers: Headers {
            content_type: "application/jwk-set+json".to_owned(),
            cache_control: "public, max-age=300".to_owned(),
        },
        generations: format!("default:0f0f:{generation}"),
    }
}

async fn version(publisher: &Arc<dyn Publisher>) -> Version {
    publisher.read(PATH).await.unwrap().expect("it was placed").version
}

async fn is_there(publisher: &Arc<dyn Publisher>, document: &Outgoing) {
    let placed = publisher.read(PATH).await.unwrap().expect("something is there");
    assert!(placed.is(document), "{placed:?}");
    assert_eq!(placed.generations.as_ref(), Some(&document.generations));
    assert!(placed.headers.is_none_or(|headers| headers == document.headers));
}

fn is_conflict(outcome: Result<(), PublishError>) {
    assert!(matches!(outcome, Err(PublishError::Conflict { .. })), "{outcome:?}");
}

async fn where_nothing_was_placed_there_is_nothing(subject: Subject) {
    assert_eq!(subject.one.read(PATH).await.unwrap(), None);
}

async fn what_was_placed_is_read_back_by_everybody(subject: Subject) {
    let (first, second) = (document(r#"{"keys":[]}"#, 1), document(r#"{"keys":[{}]}"#, 2));
    subject.one.put(PATH, &first, None).await.unwrap();
    is_there(&subject.one, &first).await;
    is_there(&subject.other, &first).await;
    subject.other.put(PATH, &second, Some(&version(&subject.one).await)).await.unwrap();
    is_there(&subject.one, &second).await;
}

async fn placing_over_something_unexpected_is_a_conflict_and_changes_nothing(subject: Subject) {
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    is_conflict(subject.other.put(PATH, &document("other", 2), None).await);
    is_there(&subject.one, &document("first", 1)).await;
}

async fn replacing_something_else_is_a_conflict_and_changes_nothing(subject: Subject) {
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    let first = version(&subject.one).await;
    subject.other.put(PATH, &document("second", 2), Some(&first)).await.unwrap();
    is_conflict(subject.one.put(PATH, &document("third", 3), Some(&first)).await);
    is_there(&subject.one, &document("second", 2)).await;
}

async fn replacing_what_is_gone_is_a_conflict(subject: Subject) {
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    let first = version(&subject.one).await;
    subject.remove().await;
    is_conflict(subject.one.put(PATH, &document("second", 2), Some(&first)).await);
    assert_eq!(subject.one.read(PATH).await.unwrap(), None);
}

async fn a_document_that_comes_back_to_what_it_was_is_still_another_one(subject: Subject) {
    subject.one.put(PATH, &document("same", 1), None).await.unwrap();
    let first = version(&subject.one).await;
    subject.other.put(PATH, &document("same", 3), Some(&first)).await.unwrap();
    // A writer that lags and read the first one must not win over the third.
    is_conflict(subject.one.put(PATH, &document("second", 2), Some(&first)).await);
    is_there(&subject.one, &document("same", 3)).await;
}

async fn of_concurrent_writers_exactly_one_wins(subject: Subject) {
    subject.one.put(PATH, &document("0", 0), None).await.unwrap();
    let first = version(&subject.one).await;
    let documents: Vec<_> = (1..=8).map(|at| document(&at.to_string(), at)).collect();
    let writes = documents.iter().zip([&subject.one, &subject.other].into_iter().cycle());
    let outcomes = join_all(writes.map(|(document, publisher)| publisher.put(PATH, document, Some(&first)))).await;
    let winners: Vec<_> = outcomes.iter().zip(&documents).filter(|(outcome, _)| outcome.is_ok()).collect();
    assert_eq!(winners.len(), 1, "{outcomes:?}");
    is_there(&subject.one, winners[0].1).await;
    outcomes.into_iter().filter(Result::is_err).for_each(is_conflict);
}

async fn what_somebody_else_wrote_is_seen_and_can_be_replaced(subject: Subject) {
    let ours = document(r#"{"keys":[]}"#, 1);
    subject.one.put(PATH, &ours, None).await.unwrap();
    let before = version(&subject.one).await;
    subject.tamper(r#"{"keys":[{"kid":"foreign"}]}"#).await;
    let found = subject.one.read(PATH).await.unwrap().unwrap();
    assert!(!found.is(&ours));
    is_conflict(subject.one.put(PATH, &document("x", 2), Some(&before)).await);
    subject.one.put(PATH, &ours, Some(&found.version)).await.unwrap();
    is_there(&subject.other, &ours).await;
}

async fn what_is_too_large_is_refused(subject: Subject) {
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    subject.tamper(&"x".repeat(BODY_MAX + 1)).await;
    let error = subject.one.read(PATH).await.unwrap_err();
    assert!(matches!(error, PublishError::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains("jwks.json"), "{error}");
}

async fn paths_do_not_get_in_each_others_way(subject: Subject) {
    let paths = [PATH, "/.well-known/jwks.json", "/tenant-a/.well-known/openid-configuration", "/keys"];
    for (at, path) in paths.into_iter().enumerate() {
        subject.one.put(path, &document(path, at as u64), None).await.unwrap();
    }
    for (at, path) in paths.into_iter().enumerate() {
        assert!(subject.other.read(path).await.unwrap().unwrap().is(&document(path, at as u64)), "{path}");
        assert!(subject.one.locate(path).ends_with(path.trim_start_matches('/')), "{}", subject.one.locate(path));
    }
}

fn modes(folder: &std::path::Path, found: &mut Vec<(String, u32)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        found.push((path.display().to_string(), fs::metadata(&path).unwrap().permissions().mode() & 0o7777));
        if path.is_dir() {
            modes(&path, found);
        }
    }
}

#[tokio::test]
async fn a_web_server_may_read_all_of_it_whatever_the_umask() {
    // For all tests of this binary, which have no business with it.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let subject = Subject::file().await;
    let Raw::Folder(folder) = &subject.raw else { unreachable!() };
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    let mut found = Vec::new();
    modes(folder.path(), &mut found);
    assert_eq!(found.len(), 6, "{found:?}");
    for (path, mode) in found {
        let wanted = if std::path::Path::new(&path).is_dir() { 0o755 } else { 0o644 };
        assert_eq!(mode, wanted, "{path} has {mode:o}");
    }
}

#[tokio::test]
async fn a_symbolic_link_is_replaced_and_never_followed() {
    let subject = Subject::file().await;
    let Raw::Folder(folder) = &subject.raw else { unreachable!() };
    let secret = folder.path().join("secret");
    fs::write(&secret, "not to be read or written").unwrap();
    fs::create_dir_all(file_of(folder).parent().unwrap()).unwrap();
    symlink(&secret, file_of(folder)).unwrap();
    let found = subject.one.read(PATH).await.unwrap().unwrap();
    assert_eq!(found.body, "");
    subject.one.put(PATH, &document("ours", 1), Some(&found.version)).await.unwrap();
    assert_eq!(fs::read_to_string(&secret).unwrap(), "not to be read or written");
    assert!(fs::symlink_metadata(file_of(folder)).unwrap().is_file());
    is_there(&subject.one, &document("ours", 1)).await;
}

#[tokio::test]
async fn no_path_leads_out_of_the_folder() {
    let subject = Subject::file().await;
    for path in ["/../x", "/a/../../x", "x", "/", "//x", "/a//x", "/.", "/a\0b", "/.jwksd.lock", "/.x.generations"] {
        let error = subject.one.put(path, &document("x", 1), None).await.unwrap_err();
        assert!(error.to_string().contains("no path of a public document"), "{path:?}: {error}");
        assert!(subject.one.read(path).await.is_err(), "{path:?}");
    }
}

#[tokio::test]
async fn what_a_killed_writer_left_is_in_nobodys_way() {
    let subject = Subject::file().await;
    let Raw::Folder(folder) = &subject.raw else { unreachable!() };
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    let beside = |name: &str| file_of(folder).with_file_name(name);
    fs::write(beside(".jwks.json.tmp"), "half").unwrap();
    // It was killed between the two: the mark is ahead of the document, so nothing older takes its place.
    fs::write(beside(".jwks.json.generations"), "default:0f0f:2").unwrap();
    let found = subject.one.read(PATH).await.unwrap().unwrap();
    assert_eq!((&found.body[..], found.generations.as_deref()), (&b"first"[..], Some("default:0f0f:2")));
    subject.one.put(PATH, &document("second", 2), Some(&found.version)).await.unwrap();
    is_there(&subject.other, &document("second", 2)).await;
    assert!(!beside(".jwks.json.tmp").exists());
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_or_written_is_named_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let publisher = FilePublisher::new(folder.path().join("missing/public"));
    let told = publisher.put(PATH, &document("x", 1), None).await.unwrap_err().to_string();
    assert!(
        told.starts_with("cannot write ") && told.ends_with("the folder above it does not exist: make it"),
        "{told}"
    );
    fs::write(folder.path().join("file"), "").unwrap();
    let publisher = FilePublisher::new(folder.path().join("file"));
    assert!(publisher.put(PATH, &document("x", 1), None).await.is_err());
    assert!(publisher.read(PATH).await.is_err(), "unreadable is not absent");
}

#[tokio::test]
async fn objects_have_the_headers_that_the_daemon_itself_sends() {
    let subject = Subject::s3().await;
    let Raw::Bucket(site) = &subject.raw else { unreachable!() };
    subject.one.put(PATH, &document(r#"{"keys":[]}"#, 1), None).await.unwrap();
    let object = site.object(&key()).await.unwrap();
    let header = |name: &str| object.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "application/jwk-set+json");
    assert_eq!(header("cache-control"), "public, max-age=300");
    assert_eq!(header("x-amz-meta-jwksd-generations"), "default:0f0f:1");
    let body: serde_json::Value = object.json().await.unwrap();
    assert_eq!(body, serde_json::json!({ "keys": [] }));
}

#[tokio::test]
async fn a_storage_that_fails_is_told_in_words_that_help() {
    let subject = Subject::s3().await;
    let Raw::Bucket(site) = &subject.raw else { unreachable!() };
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    let first = version(&subject.one).await;
    for (weather, wanted) in [
        (Weather::Down, "the storage cannot be reached"),
        (Weather::Denied, "access is denied (AccessDenied): its policy must allow s3:GetObject"),
        (Weather::Overloaded, "the storage answers 503 Service Unavailable (SlowDown)"),
    ] {
        site.set(weather);
        let told = subject.one.read(PATH).await.unwrap_err().to_string();
        assert!(told.starts_with(&format!("cannot read s3://{}/{}: {wanted}", site.name, key())), "{told}");
        let told = subject.one.put(PATH, &document("second", 2), Some(&first)).await.unwrap_err().to_string();
        assert!(told.starts_with(&format!("cannot write s3://{}/{}: {wanted}", site.name, key())), "{told}");
    }
    site.set(Weather::Fair);
    is_there(&subject.one, &document("first", 1)).await;
    let missing = BucketSite::new().await;
    let nowhere = Bucket {
        name: "no-such-bucket".to_owned(),
        prefix: String::new(),
        region: Some(REGION.to_owned()),
        endpoint_url: Some(missing.endpoint.clone()),
    };
    let told = S3Publisher::new(nowhere, Arc::new(SystemClock)).put(PATH, &document("x", 1), None).await.unwrap_err();
    assert!(told.to_string().contains("the bucket does not exist (NoSuchBucket)"), "{told}");
}

#[tokio::test]
async fn a_storage_that_never_answers_holds_nobody_up_for_long() {
    let subject = Subject::s3().await;
    let Raw::Bucket(site) = &subject.raw else { unreachable!() };
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    site.set(Weather::Hanging);
    let outcome = tokio::time::timeout(Duration::from_secs(25), subject.one.read(PATH)).await;
    assert!(outcome.expect("it gives up by itself").is_err());
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_an_error_and_found_out_by_reading() {
    let subject = Subject::s3().await;
    let Raw::Bucket(site) = &subject.raw else { unreachable!() };
    subject.one.put(PATH, &document("first", 1), None).await.unwrap();
    let first = version(&subject.one).await;
    site.set(Weather::AnswersLost);
    assert!(subject.one.put(PATH, &document("second", 2), Some(&first)).await.is_err());
    site.set(Weather::Fair);
    is_there(&subject.one, &document("second", 2)).await;
}
