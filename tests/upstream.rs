//! Records over HTTP, from a manager's ledger to a signer's: the real router on a port, the real client, and what can go
//! wrong between them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "replicas/hub.rs"]
#[allow(dead_code, reason = "shared with tests/replicas.rs, which uses all of it")]
mod hub;
#[path = "upstream/manager.rs"]
mod manager;
#[path = "support/policy.rs"]
mod policy;
mod support;
#[path = "upstream/wires.rs"]
mod wires;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jwksd::clock::{Clock, ManualClock, SystemClock};
use jwksd::config::Secret;
use jwksd::http::listener::raise_open_file_limit;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::store::ledger::{Ledger, LedgerError};
use jwksd::store::memory::MemoryStore;
use jwksd::store::record::LONGEST_RECORD;
use jwksd::store::shared::{Heads, Report, SharedStore};
use jwksd::store::split::Split;
use jwksd::store::upstream::{OpenError, Token, UpstreamStore};
use jwksd::store::wire;
use jwksd::store::{Digest, Document, Store, StoreError};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use hub::Hub;
use manager::{Manager, PATIENCE, TOKEN, at, document, name, open, settings, signer_of, tokens};
use wires::{Liar, Proxy, Wire};

const NO_WAIT: Duration = Duration::ZERO;
const LONG: Duration = Duration::from_secs(20);

/// Well below `LONG`, and what a busy machine needs.
const SOON: Duration = Duration::from_secs(5);

async fn heads(signer: &UpstreamStore) -> Heads {
    signer.heads(None, NO_WAIT).await.unwrap()
}

/// Waits for something else than `known` in the background.
fn waiting(signer: &Arc<UpstreamStore>, known: &Heads, wait: Duration) -> tokio::task::JoinHandle<Heads> {
    let (signer, known) = (signer.clone(), known.revision.clone());
    tokio::spawn(async move { signer.heads(Some(&known), wait).await.unwrap() })
}

async fn get(manager: &Manager, path: &str, headers: &[(&str, &str)]) -> Response {
    request(manager, Method::GET, path, headers, None).await
}

async fn request(
    manager: &Manager,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<Value>,
) -> Response {
    let client = Client::builder().no_proxy().build().unwrap();
    let mut request = client.request(method, format!("{}{path}", manager.url()));
    if !headers.iter().any(|(name, _)| *name == "authorization") {
        request = request.bearer_auth(TOKEN);
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    if let Some(body) = body {
        request = request.json(&body);
    }
    request.send().await.unwrap()
}

async fn slug(response: Response) -> (u16, String) {
    let status = response.status().as_u16();
    let problem: Value = response.json().await.unwrap();
    (status, problem["type"].as_str().unwrap().replace("urn:jwksd:problem:", ""))
}

fn problem_of(error: StoreError) -> String {
    match error {
        StoreError::Unavailable { problem, .. } => problem,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_signer_reads_what_the_manager_stored() {
    let manager = Manager::start().await;
    let signer = manager.signer();
    let before = SystemClock.wall();
    let Heads { store_time, age, documents, .. } = heads(&signer).await;
    assert!(store_time >= before && store_time <= SystemClock.wall(), "{store_time}");
    assert!(age < Span::from_secs(5), "nobody else writes a store in memory: {age}");
    let documents = documents.unwrap();
    let expected = [Document::Installation, document("default"), document("second")];
    assert_eq!(documents.keys().cloned().collect::<Vec<_>>(), expected);
    for (document, digest) in &documents {
        let bytes = signer.read(document).await.unwrap().unwrap();
        assert_eq!(Some(&bytes), manager.relay.read(document).await.unwrap().as_ref());
        assert_eq!(*digest, Digest::of(&bytes));
    }
    assert_eq!(signer.read(&document("other")).await.unwrap(), None);
    assert_eq!(signer.read(&Document::Initialising).await.unwrap(), None);
    assert_eq!(signer.keysets().await.unwrap(), [name("default"), name("second")]);
    assert!(signer.locate(&document("default")).ends_with("/v1/records/keyrings/default"));

    // And its ledger finds them authentic.
    let store = Arc::new(Split::new(signer, Arc::new(MemoryStore::new())));
    let ledger = Ledger::open(store, std::slice::from_ref(&manager.kek)).await.unwrap();
    let loaded = ledger.load(&name("default")).await.unwrap().unwrap();
    assert_eq!(loaded.digest, documents[&document("default")]);
}

#[tokio::test]
async fn a_signer_cannot_write() {
    let manager = Manager::start().await;
    let signer = manager.signer();
    let written = signer.replace(&document("default"), None, b"x").await;
    assert!(matches!(written, Err(StoreError::ReadOnly { .. })), "{written:?}");
    let removed = signer.remove(&Document::Installation).await;
    assert!(matches!(removed, Err(StoreError::ReadOnly { .. })), "{removed:?}");
}

#[tokio::test]
async fn whoever_waits_hears_of_a_change_at_once() {
    let manager = Manager::start().await;
    let signer = manager.signer();
    let known = heads(&signer).await;
    let begun = Instant::now();
    let waits = waiting(&signer, &known, LONG);
    // The change may come before the request does: then the answer is there at once, as it should.
    let written = manager.write("default").await;
    let changed = timeout(SOON, waits).await.unwrap().unwrap();
    assert!(begun.elapsed() < SOON);
    assert_ne!(changed.revision, known.revision);
    assert_eq!(changed.documents.unwrap()[&document("default")], written.digest);
}

#[tokio::test]
async fn without_a_change_the_answer_comes_in_time_and_without_a_body() {
    let manager = Manager::start().await;
    let signer = manager.signer();
    let known = heads(&signer).await;
    let begun = Instant::now();
    let same = signer.heads(Some(&known.revision), Duration::from_secs(1)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1) && begun.elapsed() < SOON);
    assert_eq!((same.revision.clone(), same.documents), (known.revision.clone(), None));
    assert!(same.age < Span::from_secs(1), "what it was held back for is no age: {}", same.age);

    let etag = known.revision.0.as_str();
    let raw = get(&manager, "/v1/records", &[("if-none-match", etag)]).await;
    assert_eq!(raw.status(), 304);
    let field = |name: &str| raw.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(field("etag"), etag);
    assert_eq!(field("cache-control"), "no-store");
    assert!(Timestamp::parse_rfc3339(&field(wire::STORE_TIME)).is_some());
    assert_eq!((field(wire::AGE).as_str(), field(wire::WAITED).parse::<u64>().is_ok()), ("0", true));
    assert!(raw.bytes().await.unwrap().is_empty());

    let applied = get(&manager, "/v1/records", &[("prefer", "respond-async, wait=900")]).await;
    assert_eq!(applied.headers()["preference-applied"], "wait=60", "who knows nothing waits for nothing");
    let record = get(&manager, "/v1/records/keyrings/default", &[]).await;
    let tag = record.headers()["etag"].to_str().unwrap().to_owned();
    let known = get(&manager, "/v1/records/keyrings/default", &[("if-none-match", &tag)]).await;
    assert_eq!(known.status(), 304);
    assert!(known.bytes().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_signer_of_some_keysets_hears_of_no_other() {
    let manager = Manager::start().await;
    let signer = open(jwksd::store::upstream::UpstreamSettings {
        keysets: Some(vec![name("default"), name("not-there")]),
        ..settings(vec![manager.url()])
    });
    let known = heads(&signer).await;
    let documents = known.documents.clone().unwrap();
    assert_eq!(documents.into_keys().collect::<Vec<_>>(), [Document::Installation, document("default")]);
    let waits = waiting(&signer, &known, Duration::from_secs(2));
    manager.write("second").await;
    assert_eq!(waits.await.unwrap().documents, None);
    let waits = waiting(&signer, &known, LONG);
    manager.write("default").await;
    assert!(timeout(SOON, waits).await.unwrap().unwrap().documents.is_some());
    assert_eq!(signer.keysets().await.unwrap().len(), 2, "what exists does not depend on what is used");
}

#[tokio::test]
async fn more_keysets_than_a_query_holds_are_picked_from_the_whole_index() {
    let manager = Manager::start().await;
    let many = (0..2000).map(|n| name(&format!("keyset-{n}"))).chain([name("second")]).collect();
    let signer =
        open(jwksd::store::upstream::UpstreamSettings { keysets: Some(many), ..settings(vec![manager.url()]) });
    let documents = heads(&signer).await.documents.unwrap();
    assert_eq!(documents.into_keys().collect::<Vec<_>>(), [Document::Installation, document("second")]);
}

#[tokio::test]
async fn a_wrong_token_is_refused_and_an_exchanged_one_taken_up() {
    let manager = Manager::start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let signer = open(jwksd::store::upstream::UpstreamSettings {
        token: Token::File(file.clone()),
        ..settings(vec![manager.url()])
    });
    heads(&signer).await;
    manager.clients.replace(tokens("another-token-of-signers-0123456789"));
    let refused = problem_of(signer.heads(None, NO_WAIT).await.unwrap_err());
    assert!(refused.starts_with("401: "), "{refused}");
    assert!(!refused.contains(TOKEN), "{refused}");
    std::fs::write(&file, "another-token-of-signers-0123456789\n").unwrap();
    heads(&signer).await;
    assert!(manager.clients.failures() > 0);
    assert!(!format!("{signer:?}").contains("token"), "{signer:?}");
}

#[tokio::test]
async fn what_is_no_url_token_or_certificate_is_refused_before_anybody_is_asked() {
    let open = |settings| UpstreamStore::open(settings, Arc::new(SystemClock)).unwrap_err();
    assert!(matches!(open(settings(Vec::new())), OpenError::NoUrl));
    for url in ["jwksd:8624", "ftp://jwksd", "https://user:secret@jwksd", "https://jwksd/?a=b", "https://jwksd/#a"] {
        assert!(matches!(open(settings(vec![url.to_owned()])), OpenError::Url { .. }), "{url}");
    }
    let url = vec!["https://localhost:1".to_owned()];
    let spaced = Token::Fixed(Secret::new(b"two words").unwrap());
    let with = |token| jwksd::store::upstream::UpstreamSettings { token, ..settings(url.clone()) };
    assert!(matches!(open(with(spaced)), OpenError::NotAToken));
    assert!(matches!(open(with(Token::File("/not/there".into()))), OpenError::Token(_)));
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("ca.crt");
    let trusting = |file| jwksd::store::upstream::UpstreamSettings { ca_file: Some(file), ..settings(url.clone()) };
    assert!(matches!(open(trusting(empty.clone())), OpenError::CaFile { .. }));
    std::fs::write(&empty, "no certificate").unwrap();
    assert!(matches!(open(trusting(empty)), OpenError::NoCertificate { .. }));
}

#[tokio::test]
async fn only_a_manager_with_the_right_certificate_is_believed() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut manager = Manager::over(Arc::new(MemoryStore::new()), Arc::new(SystemClock)).await.with_tls(folder.path());
    manager.serve();
    let url = |host: &str| vec![format!("https://{host}:{}", manager.port())];
    let trusting = |urls, folder: &tempfile::TempDir| {
        let ca_file = Some(folder.path().join("ca.crt"));
        open(jwksd::store::upstream::UpstreamSettings { ca_file, ..settings(urls) })
    };
    heads(&trusting(url("localhost"), &folder)).await;
    let host = problem_of(trusting(url("127.0.0.1"), &folder).heads(None, NO_WAIT).await.unwrap_err());
    assert!(host.contains("certificate"), "{host}");
    // The same name, signed by somebody else.
    let _stranger = Manager::over(Arc::new(MemoryStore::new()), Arc::new(SystemClock)).await.with_tls(other.path());
    let stranger = problem_of(trusting(url("localhost"), &other).heads(None, NO_WAIT).await.unwrap_err());
    assert!(stranger.contains("certificate"), "{stranger}");
    let system = problem_of(signer_of(url("localhost")).heads(None, NO_WAIT).await.unwrap_err());
    assert!(system.contains("certificate"), "{system}");
}

#[tokio::test]
async fn when_one_manager_is_away_another_is_asked() {
    let mut first = Manager::start().await;
    let hole = support::ports::ReservedPort::any();
    let nobody = format!("http://127.0.0.1:{}", hole.number());
    // Wherever the turn begins: one of the two answers, to reads and looks.
    for _ in 0..8 {
        let signer = signer_of(vec![nobody.clone(), first.url()]);
        assert!(signer.read(&document("default")).await.unwrap().is_some());
        let known = heads(&signer).await;
        assert!(known.documents.is_some());
    }
    let second = Manager::start().await;
    let signer = signer_of(vec![first.url(), second.url()]);
    heads(&signer).await;
    first.stop().await;
    heads(&signer).await;
    first.serve();
    heads(&signer).await;
}

#[tokio::test]
async fn a_signer_outlives_restarts_and_cut_lines() {
    let mut manager = Manager::start().await;
    let proxy = Proxy::before(manager.port()).await;
    let signer = open(jwksd::store::upstream::UpstreamSettings {
        answer_timeout: Span::from_secs(1),
        ..settings(vec![proxy.url()])
    });
    let known = heads(&signer).await;
    let wait = |wait: u64| {
        let (signer, revision) = (signer.clone(), known.revision.clone());
        tokio::spawn(async move { signer.heads(Some(&revision), Duration::from_secs(wait)).await })
    };

    let cut = wait(20);
    proxy.set(Wire::Cut);
    assert!(timeout(SOON, cut).await.unwrap().unwrap().is_err());
    proxy.set(Wire::Whole);
    assert_eq!(heads(&signer).await.revision, known.revision);

    // A line over which nothing comes is given up a little after the answer was due.
    let begun = Instant::now();
    let dead = wait(1);
    proxy.set(Wire::Dead);
    let given_up = problem_of(timeout(SOON, dead).await.unwrap().unwrap().unwrap_err());
    assert!(given_up.contains("too long"), "{given_up}");
    assert!(begun.elapsed() >= Duration::from_secs(2) && begun.elapsed() < SOON);
    proxy.set(Wire::Whole);
    assert_eq!(heads(&signer).await.revision, known.revision);

    manager.stop().await;
    assert!(signer.read(&document("default")).await.is_err());
    manager.write("default").await;
    manager.serve();
    let changed = signer.heads(Some(&known.revision), LONG).await;
    assert_ne!(changed.unwrap().revision, known.revision);
}

/// An answer with a body, as HTTP/1.1.
fn answer(headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = "HTTP/1.1 200 OK\r\nconnection: close\r\n".to_owned();
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if !headers.iter().any(|(name, _)| *name == "content-length") {
        text.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    [text.as_bytes(), body].concat()
}

fn quoted(body: &[u8]) -> String {
    format!("\"{}\"", Digest::of(body))
}

#[tokio::test]
async fn nothing_is_taken_of_a_record_that_is_not_what_it_says() {
    let record = b"{}\n";
    let (right, wrong) = (quoted(record), quoted(b"other"));
    let huge = (LONGEST_RECORD + 1).to_string();
    let long = vec![b'x'; LONGEST_RECORD + 1];
    let unread = [
        answer(&[("etag", &wrong)], record),
        answer(&[], record),
        answer(&[("etag", &format!("W/{right}"))], record),
        answer(&[("etag", &right), ("etag", &wrong)], record),
        answer(&[("etag", &right), ("content-length", "4")], record),
        answer(&[("etag", &right), ("content-length", &huge)], record),
        answer(&[("etag", &quoted(&long))], &long),
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec(),
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            .to_vec(),
        b"HTTP/1.1 304 Not Modified\r\nconnection: close\r\n\r\n".to_vec(),
        b"not HTTP at all\r\n\r\n".to_vec(),
    ];
    for lie in unread {
        let shown = String::from_utf8_lossy(&lie[..lie.len().min(120)]).into_owned();
        let liar = Liar::saying(lie).await;
        let read = signer_of(vec![liar.url()]).read(&document("default")).await;
        assert!(matches!(read, Err(StoreError::Unavailable { .. })), "{shown}: {read:?}");
    }
    let honest = Liar::saying(answer(&[("etag", &right)], record)).await;
    assert_eq!(signer_of(vec![honest.url()]).read(&document("default")).await.unwrap().unwrap(), record);
}

#[tokio::test]
async fn nothing_is_taken_of_an_index_that_is_not_what_it_says() {
    let entry = |document: &str, digest: Value| json!({ "document": document, "digest": digest, "generation": 1 });
    let index = |documents: Vec<Value>| serde_json::to_vec(&json!({ "documents": documents })).unwrap();
    let digest = || json!(Digest::of(b"").to_base64url());
    let good = index(vec![entry("installation", digest()), entry("of/later", digest())]);
    let told = [(wire::STORE_TIME, "2026-11-22T10:00:00Z"), (wire::AGE, "5"), (wire::WAITED, "0")];
    let lie = |etag: String, without: &str, body: &[u8]| {
        let mut headers: Vec<(&str, &str)> = told.iter().filter(|(name, _)| *name != without).copied().collect();
        headers.push(("etag", &etag));
        answer(&headers, body)
    };
    let mut lies = vec![lie(quoted(b"other"), "", &good)];
    lies.extend(told.iter().map(|(name, _)| lie(quoted(&good), name, &good)));
    let lacking = index(vec![entry("keyrings/default", digest())]);
    let twice = index(vec![entry("installation", digest()), entry("installation", digest())]);
    let no_digest = index(vec![entry("installation", json!("short"))]);
    for body in [&lacking, &twice, &no_digest, &b"[]".to_vec(), &vec![b' '; wire::LONGEST_INDEX + 1]] {
        lies.push(lie(quoted(body), "", body));
    }
    for lie in lies {
        let shown = String::from_utf8_lossy(&lie[..lie.len().min(300)]).into_owned();
        let liar = Liar::saying(lie).await;
        let taken = signer_of(vec![liar.url()]).heads(None, NO_WAIT).await;
        assert!(matches!(taken, Err(StoreError::Unavailable { .. })), "{shown}: {taken:?}");
    }
    let honest = Liar::saying(lie(quoted(&good), "", &good)).await;
    let taken = signer_of(vec![honest.url()]).heads(None, NO_WAIT).await.unwrap();
    assert_eq!(taken.documents.unwrap().into_keys().collect::<Vec<_>>(), [Document::Installation]);
    assert!(taken.age >= Span::from_millis(5));

    // A 304 about something else would leave a signer with what it has.
    let other = b"HTTP/1.1 304 Not Modified\r\netag: \"x\"\r\nconnection: close\r\n\r\n".to_vec();
    let liar = Liar::saying(other).await;
    let known = taken.revision;
    assert!(signer_of(vec![liar.url()]).heads(Some(&known), NO_WAIT).await.is_err());
}

#[tokio::test]
async fn one_change_wakes_five_hundred() {
    raise_open_file_limit();
    let mut manager = Manager::start().await;
    let signers: Vec<_> = (0..500).map(|_| manager.signer()).collect();
    let known = heads(&signers[0]).await;
    let before = manager.relay.changes();
    let waits: Vec<_> = signers.iter().map(|signer| waiting(signer, &known, Duration::from_secs(60))).collect();
    // All of them wait, as far as can be told from here: the relay has as many listeners.
    let deadline = Instant::now() + PATIENCE;
    while manager.relay.listeners() < 500 {
        assert!(Instant::now() < deadline, "{} wait", manager.relay.listeners());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(before);
    let begun = Instant::now();
    let written = manager.write("default").await;
    for wait in waits {
        let changed = timeout(PATIENCE, wait).await.unwrap().unwrap();
        assert_eq!(changed.documents.unwrap()[&document("default")], written.digest);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());

    // Those that wait when the manager stops do not hold it up, and go away knowing that nothing has changed.
    let known = heads(&signers[0]).await;
    let waits: Vec<_> = signers.iter().map(|signer| waiting(signer, &known, Duration::from_secs(60))).collect();
    while manager.relay.listeners() < 500 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let begun = Instant::now();
    let drained = manager.stop().await;
    assert_eq!(drained.cut, 0);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    for wait in waits {
        assert_eq!(timeout(PATIENCE, wait).await.unwrap().unwrap().documents, None);
    }
}

#[tokio::test]
async fn refusals_are_problems_that_say_what_is_wrong() {
    let manager = Manager::start().await;
    let report = json!({ "role": "signer", "version": "0.1.0", "publishes": true, "generations": {} });
    let with = |member: &str, value: Value| {
        let mut report = report.clone();
        report[member] = value;
        Some(report)
    };
    let many: BTreeMap<String, u64> = (0..20_000).map(|n| (format!("{n:0>55}"), n)).collect();
    let none: &[(&str, &str)] = &[];
    let long = format!("/v1/replicas/{}", "x".repeat(129));
    for (method, path, headers, body, status, problem) in [
        (Method::GET, "/v1/records", &[("authorization", "Bearer wrong")][..], None, 401, "unauthorized"),
        (Method::GET, "/v1/records", &[("authorization", "")], None, 401, "unauthorized"),
        (Method::GET, "/v1/records/keyrings/default", &[("authorization", "Basic x")], None, 401, "unauthorized"),
        (Method::GET, "/v1/records", &[("host", "rebound.example.com")], None, 403, "host-not-allowed"),
        (Method::GET, "/v1/records?keysets=UPPER", none, None, 400, "malformed-request"),
        (Method::GET, "/v1/records?keysets=", none, None, 400, "malformed-request"),
        (Method::GET, "/v1/records?keysets=default&keysets=second", none, None, 400, "malformed-request"),
        (Method::GET, "/v1/records/keyrings/other", none, None, 404, "unknown-record"),
        (Method::GET, "/v1/records/keyrings/_seen", none, None, 400, "malformed-request"),
        (Method::GET, "/v1/records/alive", none, None, 404, "not-found"),
        (Method::POST, "/v1/records", none, None, 405, "method-not-allowed"),
        (Method::PUT, "/v1/replicas/a", none, with("role", json!("manager")), 422, "value-not-allowed"),
        (Method::PUT, "/v1/replicas/a", none, with("version", json!("")), 422, "value-not-allowed"),
        (Method::PUT, "/v1/replicas/a", none, with("publishes", json!("yes")), 400, "malformed-request"),
        (Method::PUT, "/v1/replicas/a", none, with("generations", json!(many)), 413, "body-too-large"),
        (Method::PUT, "/v1/replicas/a", none, None, 415, "unsupported-media-type"),
        (Method::PUT, long.as_str(), none, Some(report.clone()), 400, "malformed-request"),
    ] {
        let shown = format!("{method} {path}");
        let answer = request(&manager, method, path, headers, body).await;
        assert_eq!(slug(answer).await, (status, problem.to_owned()), "{shown}");
    }
}

#[tokio::test]
async fn what_a_signer_of_a_newer_release_adds_is_passed_over() {
    let manager = Manager::start().await;
    let report = json!({
        "role": "signer", "version": "9.0.0", "publishes": true, "zone": { "of": "a newer release" },
        "generations": { "default": 7, "A name of a newer release": 1 },
    });
    let answer = request(&manager, Method::PUT, "/v1/replicas/a", &[], Some(report)).await;
    assert_eq!(answer.status(), 204);
    let known = manager.relay.reported(Span::MINUTE);
    assert_eq!(known.len(), 1);
    assert_eq!(known[0].report.generations, BTreeMap::from([(name("default"), 7)]));
    let answer = request(&manager, Method::GET, "/v1/records?keysets=default&zone=x", &[("x-zone", "x")], None).await;
    assert_eq!(answer.status(), 200);
}

fn report(replica: &str, generation: u64) -> Report {
    Report {
        replica: replica.to_owned(),
        role: "signer".to_owned(),
        version: "0.1.0".to_owned(),
        publishes: true,
        tells: false,
        stopped: false,
        generations: BTreeMap::from([(name("default"), generation)]),
        resumed: BTreeMap::from([(manager::ISSUER.to_owned(), at(5))]),
    }
}

#[tokio::test]
async fn reports_stay_with_a_manager_whose_store_is_its_own() {
    let manager = Manager::start().await;
    let signer = manager.signer();
    let hosted = "host-1.example/1a2b3c4d";
    signer.report(&[report("one", 3), report(hosted, 4)]).await.unwrap();
    signer.report(&[report("one", 5)]).await.unwrap();
    let reported: Vec<Report> = manager.relay.reported(Span::MINUTE).into_iter().map(|known| known.report).collect();
    assert_eq!(reported, [report(hosted, 4), report("one", 5)]);
    signer.forget(&[hosted]).await.unwrap();
    assert_eq!(manager.relay.reported(Span::MINUTE).len(), 1);
    assert_eq!(signer.replicas(Span::MINUTE).await.unwrap(), [], "managers do not tell");
    // A report of as many keysets as a daemon may have.
    let generations = (0..10_000).map(|n| (name(&format!("{n:0>63}")), 1_000_000)).collect();
    signer.report(&[Report { generations, ..report("large", 1) }]).await.unwrap();
}

#[tokio::test]
async fn reports_are_passed_on_to_a_shared_store() {
    let clock = ManualClock::at(at(0));
    let hub = Hub::new(clock.clone());
    let link = hub.link();
    let store = Arc::new(Split::new(link.clone(), Arc::new(MemoryStore::new())));
    let mut manager = Manager::over(store, Arc::new(SystemClock)).await;
    manager.serve();
    let (relay, stop) = (manager.relay.clone(), CancellationToken::new());
    let until = stop.clone();
    let passing = tokio::spawn(async move { relay.pass_on(until).await });
    let signer = manager.signer();
    signer.report(&[report("one", 1), report("two", 1)]).await.unwrap();
    eventually("both are known", async || reports(&hub).await == [report("one", 1), report("two", 1)]).await;
    link.set_cut(true);
    signer.report(&[report("one", 2)]).await.unwrap();
    signer.forget(&["two"]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(reports(&hub).await.len(), 2);
    link.set_cut(false);
    eventually("what could not be passed on is", async || reports(&hub).await == [report("one", 2)]).await;
    signer.forget(&["one"]).await.unwrap();
    stop.cancel();
    timeout(PATIENCE, passing).await.unwrap().unwrap();
    assert_eq!(reports(&hub).await, [], "what came last is passed on before the end");
}

async fn reports(hub: &Arc<Hub>) -> Vec<Report> {
    let replicas = hub.link().replicas(Span::DAY).await.unwrap();
    replicas.into_iter().map(|replica| replica.report).collect()
}

async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Two managers of one installation, whose clocks are moved by hand.
struct Pair {
    clock: Arc<ManualClock>,
    hub: Arc<Hub>,
    one: Manager,
    other: Manager,
    link: Arc<hub::Link>,
}

impl Pair {
    async fn start() -> Self {
        let clock = ManualClock::at(at(0));
        let hub = Hub::new(clock.clone());
        let (first, link) = (hub.link(), hub.link());
        let split = |link| Arc::new(Split::new(link, Arc::new(MemoryStore::new())));
        let mut one = Manager::over(split(first), clock.clone()).await;
        let mut other = one.beside(split(link.clone()), clock.clone()).await;
        one.serve();
        other.serve();
        Pair { clock, hub, one, other, link }
    }

    /// The second manager does what its follower does, for these keysets.
    async fn follow(&self, keysets: &[&str]) {
        self.other.relay.heads(None, NO_WAIT).await.unwrap();
        for keyset in keysets {
            self.other.ledger.load(&name(keyset)).await.unwrap();
        }
    }

    async fn seen(&self) -> Heads {
        heads(&self.other.signer()).await
    }
}

#[tokio::test]
async fn a_manager_that_has_not_read_everything_serves_nothing() {
    let pair = Pair::start().await;
    let signer = pair.other.signer();
    let refused = problem_of(signer.heads(None, NO_WAIT).await.unwrap_err());
    assert!(refused.contains("503 (records-unavailable)"), "{refused}");
    let missing = get(&pair.other, "/v1/records/keyrings/default", &[]).await;
    assert_eq!(slug(missing).await, (503, "records-unavailable".to_owned()), "it exists, so it is not unknown");
    pair.follow(&["default", "second"]).await;
    assert_eq!(heads(&signer).await.documents, heads(&pair.one.signer()).await.documents);
}

#[tokio::test]
async fn what_a_manager_could_not_read_is_doubtful_and_nothing_else_is() {
    let pair = Pair::start().await;
    pair.follow(&["second"]).await;
    pair.other.relay.settle();
    let signer = pair.other.signer();
    let documents = heads(&signer).await.documents.unwrap();
    assert_eq!(documents.into_keys().collect::<Vec<_>>(), [Document::Installation, document("second")]);
    assert_eq!(signer.keysets().await.unwrap(), [name("default"), name("second")], "it must exist");
    let read = signer.read(&document("default")).await;
    assert!(matches!(read, Err(StoreError::Disputed { .. })), "{read:?}");
    assert!(LedgerError::from(read.unwrap_err()).is_distrust());
    assert!(signer.read(&document("second")).await.unwrap().is_some());
}

#[tokio::test]
async fn age_grows_from_when_the_store_last_held_what_is_served() {
    let pair = Pair::start().await;
    pair.other.ledger.load(&name("default")).await.unwrap();
    pair.other.ledger.load(&name("second")).await.unwrap();
    assert_eq!(pair.seen().await.age, Span::MAX, "it was never confirmed");
    pair.follow(&[]).await;
    assert!(pair.seen().await.age < Span::SECOND);
    pair.clock.advance(Span::MINUTE);
    let old = pair.seen().await.age;
    assert!(old >= Span::MINUTE && old < Span::from_secs(70), "{old}");
    pair.link.set_cut(true);
    assert!(pair.other.relay.heads(None, NO_WAIT).await.is_err());
    assert!(pair.seen().await.age >= Span::MINUTE, "a failure confirms nothing");
    pair.link.set_cut(false);

    // What is known to be there but not read yet is not confirmed; once read it is, as of when the store said so.
    let before = pair.seen().await.revision;
    pair.one.write("default").await;
    pair.follow(&[]).await;
    let seen = pair.seen().await;
    assert!(seen.age >= Span::MINUTE, "{}", seen.age);
    assert_eq!(seen.revision, before, "it is being read: nobody else has to look");
    pair.clock.advance(Span::SECOND);
    pair.other.ledger.load(&name("default")).await.unwrap();
    let seen = pair.seen().await;
    assert!(seen.age >= Span::SECOND && seen.age < Span::from_secs(10), "{}", seen.age);
    assert_ne!(seen.revision, before);
}

#[tokio::test]
async fn a_record_that_the_manager_refuses_is_disputed_until_it_is_repaired() {
    let pair = Pair::start().await;
    pair.follow(&["default", "second"]).await;
    pair.follow(&[]).await;
    let signer = pair.other.signer();
    let good = heads(&signer).await.documents.unwrap();
    let copy = pair.hub.copy();
    pair.hub.edit(&document("default"), |_| b"{}".to_vec());
    for _ in 0..2 {
        pair.other.relay.heads(None, NO_WAIT).await.unwrap();
        assert!(pair.other.ledger.load(&name("default")).await.is_err());
    }
    pair.clock.advance(Span::MINUTE);
    pair.other.relay.heads(None, NO_WAIT).await.unwrap();
    let disputed = heads(&signer).await;
    assert!(disputed.age < Span::SECOND, "the others are confirmed: {}", disputed.age);
    let documents = disputed.documents.unwrap();
    assert_eq!(documents[&document("default")], Digest::of(b"{}"), "what is served does not pass for confirmed");
    assert_eq!(documents[&document("second")], good[&document("second")]);
    let read = signer.read(&document("default")).await;
    assert!(matches!(read, Err(StoreError::Disputed { .. })), "{read:?}");
    // Whoever starts now shows the last good one.
    let fresh = pair.other.signer().read(&document("default")).await.unwrap().unwrap();
    assert_eq!(Digest::of(&fresh), good[&document("default")]);

    pair.hub.restore(&copy);
    pair.follow(&["default"]).await;
    assert_eq!(heads(&signer).await.documents.unwrap(), good);
    assert!(signer.read(&document("default")).await.unwrap().is_some());
}

#[tokio::test]
async fn a_signer_starts_from_its_copies_while_managers_are_away() {
    let mut manager = Manager::start().await;
    let own: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let keks = [manager.kek.clone()];
    let store = || -> Arc<dyn Store> { Arc::new(Split::new(manager.signer(), own.clone())) };
    let first = Ledger::open(store(), &keks).await.unwrap();
    let loaded = first.load(&name("default")).await.unwrap().unwrap();
    let (again, other) = (store(), store());
    manager.stop().await;
    let ledger = Ledger::open(again, &keks).await.unwrap();
    assert_eq!(ledger.load(&name("default")).await.unwrap().unwrap().digest, loaded.digest);
    // What it never used it cannot show; that does not make it lost.
    let second = ledger.load(&name("second")).await.unwrap_err();
    assert!(second.may_pass() && !second.is_distrust(), "{second:?}");

    // Once a manager answered, the copy is older than what counts.
    manager.serve();
    let ledger = Ledger::open(other, &keks).await.unwrap();
    ledger.shared().unwrap().heads(None, NO_WAIT).await.unwrap();
    manager.stop().await;
    assert!(ledger.load(&name("default")).await.unwrap_err().may_pass());
}

#[tokio::test]
async fn the_description_has_the_routes_that_there_are() {
    let manager = Manager::start().await;
    let api = serde_json::to_value(jwksd::http::openapi::api()).unwrap();
    let mut described = Vec::new();
    for (path, item) in api["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if operation["tags"] == json!(["replication"]) {
                assert_eq!(operation["security"], json!([{ "token": [] }]), "{path}");
                described.push((method.to_uppercase(), path.clone()));
            }
        }
    }
    assert_eq!(described.len(), 5, "{described:?}");
    for (method, path) in described {
        let path = path.replace("{keyset}", "default").replace("{replica}", "one");
        let report = json!({ "role": "signer", "version": "1", "publishes": false, "generations": {}, "resumed": {} });
        let body = (method == "PUT").then_some(report);
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let answer = request(&manager, method.clone(), &path, &[], body).await;
        assert!(answer.status().is_success(), "{method} {path}: {}", answer.status());
    }
    let shape = |schema: &str| -> Vec<String> {
        api["components"]["schemas"][schema]["properties"].as_object().unwrap().keys().cloned().collect()
    };
    let index: Value = get(&manager, "/v1/records", &[]).await.json().await.unwrap();
    assert!(index["documents"][0].as_object().unwrap().keys().all(|member| shape("IndexEntry").contains(member)));
    assert_eq!(shape("ReportBody"), ["generations", "publishes", "resumed", "role", "stopped", "tells", "version"]);
}
