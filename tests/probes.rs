//! The publication gate, on the real binary: a key may sign only after what verifiers really fetch has shown it for
//! `propagation`. An edge of the tests' own stands between: it passes on, holds, alters or fails.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod support;

use std::sync::{Arc, Mutex};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use support::{Daemon, DaemonBuilder, PATIENCE, eventually};

type Alteration = fn(&mut Vec<Value>);

/// What the edge answers.
#[derive(Clone)]
enum Mode {
    /// What the daemon serves now.
    Through,
    /// What the daemon serves now, altered.
    Altered(Alteration),
    Document(String),
    Status(u16),
}

/// A public HTTPS location in front of the daemon.
struct Edge {
    port: u16,
    ca_pem: String,
    answers: Arc<Mutex<(Mode, String)>>,
    /// Where the daemon publishes, once it does.
    origin: Arc<Mutex<Option<String>>>,
}

impl Edge {
    async fn start(mode: Mode) -> Edge {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let ca_pem = params.self_signed(&key).unwrap().pem();
        let ca = rcgen::Issuer::new(params, key);
        let key = rcgen::KeyPair::generate().unwrap();
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = rcgen::CertificateParams::new(names).unwrap().signed_by(&key, &ca).unwrap();
        let secret = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], secret)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let edge = Edge {
            port: listener.local_addr().unwrap().port(),
            ca_pem,
            answers: Arc::new(Mutex::new((mode, String::new()))),
            origin: Arc::default(),
        };
        let (answers, origin) = (edge.answers.clone(), edge.origin.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, answers, origin) = (acceptor.clone(), answers.clone(), origin.clone());
                tokio::spawn(async move {
                    // A client that goes away is its own business.
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut request = [0; 4096];
                    if stream.read(&mut request).await.is_err() {
                        return;
                    }
                    let (mode, headers) = answers.lock().unwrap().clone();
                    let origin = origin.lock().unwrap().clone();
                    let (status, body) = answer(mode, origin).await;
                    let head = format!(
                        "HTTP/1.1 {status} \r\nlocation: https://localhost/\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
                        body.len()
                    );
                    let _ = stream.write_all((head + &body).as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        edge
    }

    fn url(&self) -> String {
        format!("https://localhost:{}/.well-known/jwks.json", self.port)
    }

    fn set(&self, mode: Mode) {
        self.answers.lock().unwrap().0 = mode;
    }

    /// Header lines of every answer.
    fn set_headers(&self, headers: &str) {
        self.answers.lock().unwrap().1 = headers.to_owned();
    }

    /// A daemon that trusts and probes this edge, which passes on what it serves.
    async fn daemon(&self, rotation: &str) -> Daemon {
        let mut daemon = self.builder(rotation).prepare();
        let ca = daemon.path("ca.pem");
        std::fs::write(&ca, &self.ca_pem).unwrap();
        daemon.set_env("SSL_CERT_FILE", Some(ca.to_str().unwrap()));
        *self.origin.lock().unwrap() = Some(format!("http://{}/.well-known/jwks.json", daemon.address("public")));
        daemon.start_process().await;
        daemon.ready().await;
        daemon
    }

    fn builder(&self, rotation: &str) -> DaemonBuilder {
        Daemon::builder().tables(&format!(
            "[issuer.main]\nurl = \"https://auth.example.com\"\nmax_age = \"1s\"\nprobes = [\"{}\"]\n\
             [keyset.default]\nalgorithm = \"ES256\"\n[keyset.default.rotation]\n{rotation}\n\
             [keyset.default.tokens]\nmax_ttl = \"2s\"\nclock_skew = \"0s\"\n",
            self.url()
        ))
    }
}

async fn answer(mode: Mode, origin: Option<String>) -> (u16, String) {
    match mode {
        Mode::Document(body) => (200, body),
        Mode::Status(status) => (status, String::new()),
        Mode::Through => fetch(origin).await.map_or((502, String::new()), |body| (200, body)),
        Mode::Altered(alter) => {
            let Some(body) = fetch(origin).await else { return (502, String::new()) };
            let mut document: Value = serde_json::from_str(&body).unwrap();
            alter(document["keys"].as_array_mut().unwrap());
            (200, document.to_string())
        }
    }
}

async fn fetch(origin: Option<String>) -> Option<String> {
    let answer = reqwest::Client::builder().no_proxy().build().unwrap().get(origin?).send().await.ok()?;
    if answer.status() == 200 { answer.text().await.ok() } else { None }
}

/// Rotations four seconds apart, each key published for two.
const QUICK: &str = "every = \"4s\"\npropagation = \"2s\"";
/// No rotation while the test runs.
const SLOW: &str = "every = \"3h\"\npropagation = \"1h\"";

async fn keyset(daemon: &Daemon) -> Value {
    daemon.admin(Method::GET, "/keysets/default", None).await.json()
}

/// Waits until the keyset's answer is as wanted.
async fn until(daemon: &Daemon, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    eventually(what, PATIENCE, async || {
        let shown = keyset(daemon).await;
        wanted(&shown).then_some(shown)
    })
    .await
}

fn has(list: &Value, member: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|one| one == member))
}

fn keys_in<'a>(keyset: &'a Value, state: &str) -> Vec<&'a Value> {
    keyset["keys"].as_array().unwrap().iter().filter(|key| key["state"] == state).collect()
}

fn millis(time: &Value) -> i64 {
    humantime::parse_rfc3339(time.as_str().unwrap())
        .unwrap()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis()
        .try_into()
        .unwrap()
}

async fn mismatches(daemon: &Daemon) -> f64 {
    daemon.metrics().await.sum("jwksd_publication_mismatch", &[("issuer", "main")]).unwrap()
}

#[tokio::test]
async fn a_key_that_verifiers_are_not_served_never_signs() {
    let edge = Edge::start(Mode::Document(r#"{"keys":[]}"#.to_owned())).await;
    let daemon = edge.daemon(QUICK).await;
    let first = keyset(&daemon).await["active_kid"].clone();
    let late = until(&daemon, "a late rotation", |shown| {
        shown["next_rotation"]["overdue_seconds"].as_i64() > Some(1) && has(&shown["alarms"], "publication_mismatch")
    })
    .await;
    assert_eq!(late["active_kid"], first);
    assert_eq!(late["next_rotation"]["blocked_by"], json!(["probe"]));
    let pending = keys_in(&late, "pending");
    assert_eq!(pending.len(), 2, "{late:#}");
    assert!(pending.iter().all(|key| key["next"]["waiting_for"] == json!(["probe"])), "{late:#}");
    assert!(late["probes"][0]["mismatches"].to_string().contains("is missing"), "{late:#}");
    assert!((mismatches(&daemon).await - 1.0).abs() < f64::EPSILON);
    let refused = daemon.admin(Method::POST, "/keysets/default/rotate", Some(json!({}))).await;
    assert_eq!(refused.status, 409, "{}", refused.text);

    edge.set(Mode::Through);
    let standby = until(&daemon, "a standby", |shown| !keys_in(shown, "standby").is_empty()).await;
    for key in keys_in(&standby, "standby") {
        let waited = millis(&key["entered_at"]) - millis(&key["seen_at"]);
        assert!(waited >= 2000, "it was shown for {waited} ms only: {key:#}");
    }
    until(&daemon, "the late rotation", |shown| shown["active_kid"] != first).await;
    eventually("no mismatch", PATIENCE, async || (mismatches(&daemon).await == 0.0).then_some(())).await;
}

#[tokio::test]
async fn a_sample_without_the_key_starts_its_propagation_anew() {
    let edge = Edge::start(Mode::Through).await;
    let daemon = edge.daemon(SLOW).await;
    let shown = until(&daemon, "both successors seen", |shown| {
        keys_in(shown, "pending").iter().filter(|key| key["seen_at"].is_string()).count() == 2
    })
    .await;
    let before = millis(&keys_in(&shown, "pending")[0]["seen_at"]);
    edge.set(Mode::Document(r#"{"keys":[]}"#.to_owned()));
    until(&daemon, "neither seen", |shown| keys_in(shown, "pending").iter().all(|key| key["seen_at"].is_null())).await;
    edge.set(Mode::Through);
    let again = until(&daemon, "both seen again", |shown| {
        keys_in(shown, "pending").iter().all(|key| key["seen_at"].is_string())
    })
    .await;
    assert!(millis(&keys_in(&again, "pending")[0]["seen_at"]) > before);
}

#[tokio::test]
async fn a_location_that_cannot_be_fetched_pauses_propagation_and_an_operator_may_insist() {
    for status in [503, 302] {
        let edge = Edge::start(Mode::Status(status)).await;
        let daemon = edge.daemon(QUICK).await;
        let first = keyset(&daemon).await["active_kid"].clone();
        let late = until(&daemon, "a late rotation", |shown| {
            shown["next_rotation"]["overdue_seconds"].as_i64() > Some(0) && has(&shown["alarms"], "probe_unreachable")
        })
        .await;
        assert_eq!((&late["active_kid"], &late["next_rotation"]["blocked_by"]), (&first, &json!(["probe"])));
        assert!(late["probes"][0]["failing"].as_str().unwrap().contains(&status.to_string()), "{late:#}");
        assert!(mismatches(&daemon).await == 0.0, "nothing was seen, so nothing differs");
        let body = json!({ "allow_unpropagated": true, "reason": "the edge is down" });
        let insisted = daemon.admin(Method::POST, "/keysets/default/rotate", Some(body)).await;
        assert_eq!((insisted.status, insisted.json()["unpropagated"].clone()), (200, json!(true)), "{}", insisted.text);
    }
}

#[tokio::test]
async fn what_is_seen_outlives_a_restart() {
    let edge = Edge::start(Mode::Through).await;
    let mut daemon = edge.daemon(SLOW).await;
    let all_seen =
        |shown: &Value| keys_in(shown, "pending").iter().filter(|key| key["seen_at"].is_string()).count() == 2;
    let before = until(&daemon, "both successors seen", all_seen).await;
    let down = support::unix_now();
    daemon.restart().await;
    let after = until(&daemon, "a sample", |shown| {
        all_seen(shown) && shown["probes"][0]["shows"].as_array().is_some_and(|kids| kids.len() == 2)
    })
    .await;
    let away = i64::try_from((support::unix_now() - down).as_millis()).unwrap();
    for (before, after) in keys_in(&before, "pending").iter().zip(keys_in(&after, "pending")) {
        let later = millis(&after["seen_at"]) - millis(&before["seen_at"]);
        // What was not watched does not count: up to the time between the last sign of life and the first sample.
        assert!((0..=away + 1500).contains(&later), "{later} ms later, away for {away} ms");
    }
}

#[tokio::test]
async fn a_document_that_differs_is_told_with_what_differs() {
    let edge = Edge::start(Mode::Through).await;
    let daemon = edge.daemon(SLOW).await;
    until(&daemon, "a first sample", |shown| {
        shown["probes"][0]["shows"].as_array().is_some_and(|kids| kids.len() == 2)
    })
    .await;
    let alterations: [(&str, Alteration); 5] = [
        ("is not ours", |keys| {
            keys.push(json!({ "kty": "EC", "kid": "mallory", "crv": "P-256", "x": "AA", "y": "AA" }))
        }),
        ("has other members than ours", |keys| keys[0]["x"] = keys[1]["x"].clone()),
        ("has other members than ours", |keys| keys[0]["d"] = json!("AA")),
        ("stands there more than once", |keys| keys.push(keys[0].clone())),
        ("is missing", |keys| drop(keys.remove(0))),
    ];
    for (wanted, alter) in alterations {
        edge.set(Mode::Altered(alter));
        let shown = until(&daemon, wanted, |shown| shown["probes"][0]["mismatches"].to_string().contains(wanted)).await;
        assert!(has(&shown["alarms"], "publication_mismatch"), "{shown:#}");
        assert!((mismatches(&daemon).await - 1.0).abs() < f64::EPSILON);
        edge.set(Mode::Through);
        until(&daemon, "what is published", |shown| shown["probes"][0]["mismatches"] == json!([])).await;
    }
    edge.set(Mode::Document("no JSON".to_owned()));
    until(&daemon, "no JWKS", |shown| shown["probes"][0]["mismatches"].to_string().contains("no JWK Set")).await;
}

#[tokio::test]
async fn a_revoked_key_that_caches_serve_for_longer_than_declared_is_told() {
    let edge = Edge::start(Mode::Through).await;
    let daemon = edge.daemon(SLOW).await;
    let kid = keyset(&daemon).await["active_kid"].as_str().unwrap().to_owned();
    edge.set(Mode::Document(daemon.get("public", "/.well-known/jwks.json").await.text));
    let path = format!("/keysets/default/keys/{kid}/revoke");
    let revoked = daemon.admin(Method::POST, &path, Some(json!({ "reason": "a test" }))).await;
    assert_eq!(revoked.status, 200, "{}", revoked.text);
    let wanted = format!("key {kid} has ended and is still served");
    until(&daemon, &wanted, |shown| shown["probes"][0]["mismatches"].to_string().contains(&wanted)).await;
}

#[tokio::test]
async fn headers_that_let_caches_hold_longer_than_declared_are_told() {
    let edge = Edge::start(Mode::Through).await;
    let daemon = edge.daemon(SLOW).await;
    edge.set_headers("age: 61\r\ncache-control: public, max-age=1\r\n");
    let shown = until(&daemon, "an alarm", |shown| has(&shown["alarms"], "caches_exceeded")).await;
    assert_eq!(shown["probes"][0]["caches_exceeded"], "Age is 1m1s, the declared caches hold for 1s");
    edge.set_headers("cache-control: public, max-age=3600\r\n");
    until(&daemon, "the other header", |shown| shown["probes"][0]["caches_exceeded"].to_string().contains("3600"))
        .await;
    edge.set_headers("age: 1\r\ncache-control: public, max-age=1\r\n");
    until(&daemon, "no alarm", |shown| !has(&shown["alarms"], "caches_exceeded")).await;
}

#[tokio::test]
async fn an_edge_whose_certificate_is_not_trusted_counts_as_unreachable() {
    let edge = Edge::start(Mode::Through).await;
    let daemon = edge.builder(SLOW).start().await;
    *edge.origin.lock().unwrap() = Some(daemon.url("public", "/.well-known/jwks.json"));
    let shown = until(&daemon, "an alarm", |shown| has(&shown["alarms"], "probe_unreachable")).await;
    assert!(shown["probes"][0]["failing"].to_string().to_lowercase().contains("certificate"), "{shown:#}");
}
