//! Signer clients that are Kubernetes service accounts.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use jwksd::clock::{Clock, SystemClock, TrustedClock};
use jwksd::config::Kubernetes;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::kubernetes::{Rejection, ServiceAccounts};
use jwksd::telemetry::metrics::Metrics;
use reqwest::Method;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::authority::{Authority, NOW, uri};
use crate::cluster::{ApiServer, Mode};
use crate::keys::{ClusterKey, ISSUER, claims, with};
use crate::support::api::Call;
use crate::support::{Answer, Daemon, DaemonBuilder, PATIENCE, eventually, unix_now};
use crate::wire::{Wire, config};
use crate::{KEYSETS, SIGN};

const CLIENTS: &str = "[signer.client.orders]\nservice_account = \"shop/orders\"\nkeysets = [\"default\"]\n\
    audiences = [\"https://api\"]\n[signer.client.billing]\nservice_account = \"shop/billing\"\n";

/// What the daemon itself shows to the API server.
const POD_TOKEN: &str = "the.pods.own-token-0123456789";

/// A daemon that may ask this API server, not started.
fn prepared(builder: DaemonBuilder, server: &ApiServer) -> Daemon {
    let url = server.url();
    let kubernetes = format!(
        "[kubernetes]\nissuer = \"{ISSUER}\"\njwks_url = \"{url}\"\nca_file = \"cluster.crt\"\ntoken_file = \"pod.token\"\n"
    );
    let daemon = builder.tables(&format!("{CLIENTS}{kubernetes}{KEYSETS}")).prepare();
    std::fs::write(daemon.path("cluster.crt"), &server.authority.pem).unwrap();
    std::fs::write(daemon.path("pod.token"), POD_TOKEN).unwrap();
    daemon
}

async fn started(server: &ApiServer) -> Daemon {
    let mut daemon = prepared(Daemon::builder(), server);
    daemon.start_process().await;
    daemon.ready().await;
    daemon
}

async fn sign(daemon: &Daemon, token: &str, path: &str, audience: &str) -> Answer {
    Call::post(daemon, "signer", path).bearer(token).json(&crate::claims(audience)).send().await
}

async fn signs(daemon: &Daemon, token: &str) -> u16 {
    sign(daemon, token, SIGN, "https://api").await.status
}

#[tokio::test]
async fn a_pods_token_signs_for_its_clients_keysets_and_audiences_only() {
    let key = ClusterKey::new("k1");
    let server = ApiServer::start(Mode::of(&[&key])).await;
    let daemon = started(&server).await;
    let orders = key.token(&claims("shop", "orders"));
    // The second time from memory.
    for _ in 0..2 {
        assert_eq!(signs(&daemon, &orders).await, 200);
        assert_eq!(sign(&daemon, &orders, SIGN, "https://other").await.slug(), "audience-not-allowed");
        assert_eq!(sign(&daemon, &orders, "/v1/keysets/partners/sign", "https://api").await.slug(), "forbidden");
    }
    let billing = key.token(&claims("shop", "billing"));
    assert_eq!(sign(&daemon, &billing, "/v1/keysets/partners/sign", "any").await.status, 200);
    let view = Call::get(&daemon, "signer", "/v1/keysets/default").bearer(&orders).expect(200).await;
    assert_eq!(view.json()["name"], "default");
    assert_eq!(server.asked(), [format!("Bearer {POD_TOKEN}")], "one look at the keys serves all");
    let confirmed = daemon.metrics().await.sum("jwksd_cluster_keys_confirmed_timestamp_seconds", &[]).unwrap();
    assert!((confirmed - unix_now().as_secs_f64()).abs() < 60.0, "{confirmed}");
}

/// Each with the reason that the log gives; `k2` is published too.
fn forgeries(key: &ClusterKey, foreign: &ClusterKey) -> Vec<(&'static str, String)> {
    let good = || claims("shop", "orders");
    let now = unix_now().as_secs();
    let own = |name: &str| json!({ "namespace": "shop", "serviceaccount": { "name": name } });
    let mut tampered = key.token(&good());
    tampered.truncate(tampered.len() - 6);
    vec![
        ("not meant for the audience", key.token(&with(good(), "aud", json!(["https://kubernetes.default.svc"])))),
        ("no claim \"aud\"", key.token(&with(good(), "aud", Value::Null))),
        ("the token's issuer is", key.token(&with(good(), "iss", json!("https://other.example.com")))),
        ("no signer client has the service account shop/other", key.token(&claims("shop", "other"))),
        ("no signer client has the service account other/orders", key.token(&claims("other", "orders"))),
        ("the token expired", key.token(&with(good(), "exp", json!(now - 120)))),
        ("no claim \"exp\"", key.token(&with(good(), "exp", Value::Null))),
        ("not valid before", key.token(&with(good(), "nbf", json!(now + 120)))),
        ("claim \"kubernetes.io\"", key.token(&with(good(), "kubernetes.io", Value::Null))),
        ("claim \"kubernetes.io\"", key.token(&with(good(), "kubernetes.io", own("billing")))),
        (
            "claim \"kubernetes.io\"",
            key.token(&with(
                good(),
                "kubernetes.io",
                json!({ "namespace": "x", "serviceaccount": { "name": "orders" } }),
            )),
        ),
        ("claim \"sub\"", key.token(&with(good(), "sub", json!("system:node:node-1")))),
        ("is not signed", key.unsigned_token(&good())),
        ("is symmetric", key.hmac_token(&good())),
        ("published for RS256", key.pss_token(&good())),
        ("not one of this key", foreign.token_as(&key.kid, &good())),
        ("not one of this key", key.token_as("k2", &good())),
        ("no published key", foreign.token(&good())),
        ("not canonical base64url", tampered + "!"),
    ]
}

#[tokio::test]
async fn tokens_that_are_not_good_sign_nothing_and_are_told_without_being_shown() {
    let [key, second, foreign] = ["k1", "k2", "foreign"].map(ClusterKey::new);
    let server = ApiServer::start(Mode::of(&[&key, &second])).await;
    let daemon = started(&server).await;
    assert_eq!(signs(&daemon, &key.token(&claims("shop", "orders"))).await, 200);
    let mut forgeries = forgeries(&key, &foreign);
    // A few: further failures from one address are answered late. Why each is refused is looked at below.
    forgeries.retain(|(why, _)| {
        ["not meant for", "expired", "is symmetric", "shop/other"].iter().any(|kept| why.contains(kept))
    });
    assert_eq!(forgeries.len(), 4);
    for (why, token) in &forgeries {
        let answer = sign(&daemon, token, SIGN, "https://api").await;
        assert_eq!((answer.status, answer.slug().as_str()), (401, "unauthorized"), "{why}");
    }
    let labels = [("keyset", "default"), ("reason", "unauthorized")];
    let counted = daemon.metrics().await.sum("jwksd_sign_rejections_total", &labels);
    assert_eq!(counted, Some(forgeries.len() as f64));
    let refused = |line: &crate::support::LogLine| line.message() == "a service account's token was refused";
    let told = daemon.log_line("a refusal", refused).await;
    assert!(told.field("reason").contains(forgeries[0].0), "{told:?}");
    for (_, token) in &forgeries {
        let secret = token.split('.').nth(1).unwrap();
        assert!(!daemon.logs().iter().any(|line| line.contains(secret)), "a token in the log");
    }
}

/// The reasons, one by one: the daemon's log tells only of some.
#[tokio::test]
async fn each_forgery_is_refused_for_its_own_reason() {
    let [key, second, foreign] = ["k1", "k2", "foreign"].map(ClusterKey::new);
    let server = ApiServer::start(Mode::of(&[&key, &second])).await;
    let cluster = Cluster::new(&server, SystemClock);
    cluster.accepts(&key).await;
    for (why, token) in forgeries(&key, &foreign) {
        match cluster.accounts.identify(&token).await {
            Ok(account) => assert!(why.contains(&account.to_string()), "{why}: accepted as {account}"),
            Err(rejection) => assert!(rejection.to_string().contains(why), "{why}: {rejection}"),
        }
    }
}

#[tokio::test]
async fn the_clusters_keys_are_followed_and_forgotten() {
    let [old, new] = ["old", "new"].map(ClusterKey::new);
    let server = ApiServer::start(Mode::of(&[&old])).await;
    let daemon = started(&server).await;
    let [before, after] = [&old, &new].map(|key| key.token(&claims("shop", "orders")));
    assert_eq!(signs(&daemon, &before).await, 200);
    server.set(Mode::of(&[&new]));
    // Unknown keys have the cluster asked, though not at every request.
    eventually("the new key", PATIENCE, async || (signs(&daemon, &after).await == 200).then_some(())).await;
    assert!(server.asked().len() <= 3, "{}", server.asked().len());
    assert_eq!(signs(&daemon, &before).await, 401, "what the former key had verified is forgotten");
}

#[tokio::test]
async fn an_api_server_that_is_down_at_the_start_is_asked_until_it_answers() {
    let key = ClusterKey::new("k1");
    let server = ApiServer::start(Mode::Closed).await;
    let daemon = started(&server).await;
    let token = key.token(&claims("shop", "orders"));
    let answer = sign(&daemon, &token, SIGN, "https://api").await;
    assert_eq!((answer.status, answer.slug().as_str()), (503, "cluster-keys-unavailable"));
    assert_eq!(answer.header("retry-after"), "2");
    let labels = |reason| [("keyset", "default"), ("reason", reason)];
    let metrics = daemon.metrics().await;
    let failures = metrics.sum("jwksd_signing_failures_total", &labels("cluster_keys_unavailable"));
    let rejections = metrics.sum("jwksd_sign_rejections_total", &labels("unauthorized"));
    assert_eq!((failures, rejections), (Some(1.0), Some(0.0)), "it is ours, not the caller's");
    assert_eq!(sign(&daemon, "no-such-token", SIGN, "https://api").await.status, 401, "what is no token of a cluster");
    let told = |line: &crate::support::LogLine| line.message().contains("cannot be fetched");
    assert!(daemon.log_line("why", told).await.field("error").contains("the API server does not answer"));
    server.set(Mode::of(&[&key]));
    eventually("the keys", PATIENCE, async || (signs(&daemon, &token).await == 200).then_some(())).await;
    server.set(Mode::Closed);
    let later = key.token(&with(claims("shop", "orders"), "jti", json!("another")));
    assert_eq!(signs(&daemon, &later).await, 200, "the keys at hand are good for a while");
}

#[tokio::test]
async fn clients_of_all_kinds_sign_side_by_side() {
    let key = ClusterKey::new("k1");
    let server = ApiServer::start(Mode::of(&[&key])).await;
    let pod = key.token(&claims("shop", "billing"));
    let secret = "a-token-long-enough-to-be-taken-for-one-0123456789";
    let body = crate::claims("any");

    let tables = "[signer.tls]\ncert_file = \"server.crt\"\nkey_file = \"server.key\"\nclient_ca_file = \"ca.crt\"\n\
        [signer.client.mesh]\nsan = \"spiffe://example.com/mesh\"\n[log]\nsignatures = true\n";
    let mut daemon = prepared(
        Daemon::builder().signer_with_token().tables(&tables.replace("[log]\nsignatures = true\n", "")),
        &server,
    );
    let authority = Authority::new("all");
    authority.server(NOW).write(&daemon.path(""), "server");
    std::fs::write(daemon.path("ca.crt"), &authority.pem).unwrap();
    daemon.start_process().await;
    daemon.ready().await;
    let mesh = authority.client(vec![uri("spiffe://example.com/mesh")]);
    for (own, token, status) in [
        (Some(&mesh), None, 200),
        (None, Some(secret), 200),
        (None, Some(pod.as_str()), 200),
        (Some(&mesh), Some(pod.as_str()), 200),
        (Some(&mesh), Some("a.wrong.token"), 200),
        (None, Some("a.wrong.token"), 401),
        (None, None, 401),
    ] {
        let mut wire = Wire::open(daemon.address("signer"), config(&authority, own)).await.unwrap();
        let (found, answer) = wire.ask("POST", SIGN, token, Some(&body)).await.unwrap();
        assert_eq!(found, status, "{token:?} {answer}");
    }

    let uid = rustix::process::getuid().as_raw();
    let own = format!("[signer.client.app]\nuid = {uid}\nkeysets = [\"default\"]\n");
    let mut daemon = prepared(Daemon::builder().signer_on_unix_socket().tables(&own), &server);
    daemon.start_process().await;
    daemon.ready().await;
    assert_eq!(daemon.sign_answer("default", body.clone()).await.status, 200, "by its user");
    assert_eq!(daemon.sign_answer("partners", body.clone()).await.status, 403, "by its user");
    let socket = daemon.address("signer").trim_start_matches("unix:").to_owned();
    let client = crate::support::http_client().unix_socket(std::path::PathBuf::from(socket)).build().unwrap();
    let url = "http://localhost/v1/keysets/partners/sign";
    let answer = client.request(Method::POST, url).bearer_auth(&pod).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200, "a token says more than the user");
}

#[tokio::test]
async fn identities_and_the_cluster_are_taken_from_a_changed_configuration() {
    let [key, other] = ["k1", "k1"].map(ClusterKey::new);
    let server = ApiServer::start(Mode::of(&[&key])).await;
    let daemon = started(&server).await;
    let token = key.token(&claims("shop", "orders"));
    assert_eq!(signs(&daemon, &token).await, 200);
    let path = daemon.path("jwksd.toml");
    let first = std::fs::read_to_string(&path).unwrap();
    let reload = async |text: String| {
        std::fs::write(&path, text).unwrap();
        Call::post(&daemon, "admin", "/v1/reload").json(&json!({})).expect(200).await;
    };
    reload(first.replace("shop/orders", "shop/orders-2")).await;
    assert_eq!(signs(&daemon, &token).await, 401, "the identity is gone");
    reload(first.replace("token_file = \"pod.token\"", "token_file = \"pod.token\"\naudience = \"other\"")).await;
    assert_eq!(signs(&daemon, &token).await, 401, "what was verified for another audience");
    reload(first.clone()).await;
    assert_eq!(signs(&daemon, &token).await, 200);
    // Another cluster, whose keys have the same names.
    let moved = ApiServer::start(Mode::of(&[&other])).await;
    std::fs::write(daemon.path("cluster.crt"), format!("{}{}", server.authority.pem, moved.authority.pem)).unwrap();
    reload(first.replace(&server.url(), &moved.url())).await;
    assert_eq!(signs(&daemon, &token).await, 401, "a key of the former cluster");
    assert_eq!(signs(&daemon, &other.token(&claims("shop", "orders"))).await, 200);
}

/// What follows one API server, without a daemon around it.
struct Cluster {
    accounts: Arc<ServiceAccounts>,
    stop: CancellationToken,
    folder: tempfile::TempDir,
}

impl Cluster {
    fn new(server: &ApiServer, clock: impl Clock) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (ca_file, token_file) = (folder.path().join("ca.crt"), folder.path().join("token"));
        std::fs::write(&ca_file, &server.authority.pem).unwrap();
        // As in a pod: what the kubelet wrote says whose tokens these are.
        std::fs::write(&token_file, ClusterKey::new("own").token(&claims("auth", "jwksd"))).unwrap();
        let settings = Kubernetes {
            jwks_url: server.url(),
            ca_file: Some(ca_file),
            token_file: Some(token_file),
            ..Kubernetes::default()
        };
        let clock = Arc::new(TrustedClock::new(Arc::new(clock), Span::HOUR));
        let accounts = Arc::new(ServiceAccounts::new(clock, Arc::new(Metrics::new()), Some(settings)));
        let stop = CancellationToken::new();
        tokio::spawn(accounts.clone().follow(stop.clone()));
        Cluster { accounts, stop, folder }
    }

    async fn accepts(&self, key: &ClusterKey) {
        let token = key.token(&with(claims("shop", "orders"), "exp", json!(unix_now().as_secs() + 1_000_000)));
        eventually("the keys", PATIENCE, async || self.accounts.identify(&token).await.ok()).await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Runs a thousand times as fast: what takes minutes in a cluster is over in a moment.
struct FastClock {
    begun: tokio::time::Instant,
    wall: Timestamp,
}

const FASTER: u32 = 1000;

impl FastClock {
    fn new() -> Self {
        FastClock { begun: tokio::time::Instant::now(), wall: SystemClock.wall() }
    }
}

impl Clock for FastClock {
    fn wall(&self) -> Timestamp {
        self.wall + self.boot()
    }

    fn boot(&self) -> Span {
        Span::from_std(self.begun.elapsed() * FASTER)
    }

    fn monotonic(&self) -> Duration {
        self.begun.elapsed()
    }

    fn sleep(&self, span: Span) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(span.to_std() / FASTER))
    }
}

#[tokio::test]
async fn keys_outlive_an_outage_and_no_longer_than_promised() {
    let key = ClusterKey::new("k1");
    let server = ApiServer::start(Mode::of(&[&key])).await;
    let cluster = Cluster::new(&server, FastClock::new());
    cluster.accepts(&key).await;
    server.set(Mode::Closed);
    let token = key.token(&with(claims("shop", "orders"), "exp", json!(unix_now().as_secs() + 1_000_000)));
    // Some failed attempts later.
    let before = server.asked().len();
    server.asked_after(before + 3).await;
    assert!(cluster.accounts.identify(&token).await.is_ok());
    let limit = Duration::from_millis(jwksd::kubernetes::KEEP.as_millis().unsigned_abs()) / FASTER;
    let ended = eventually("the end", limit + PATIENCE, async || cluster.accounts.identify(&token).await.err()).await;
    assert!(matches!(ended, Rejection::NoKeys), "{ended}");
    server.set(Mode::of(&[&key]));
    cluster.accepts(&key).await;
}

#[tokio::test]
async fn answers_that_are_of_no_use_change_nothing() {
    let [key, second] = ["k1", "k2"].map(ClusterKey::new);
    let server = ApiServer::start(Mode::of(&[&key])).await;
    let cluster = Cluster::new(&server, FastClock::new());
    cluster.accepts(&key).await;
    let oct = json!({ "kty": "oct", "kid": "k1", "alg": "HS256", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I" });
    // A place that would be believed, were it asked.
    let elsewhere = ApiServer::start(Mode::of(&[&second])).await;
    let both = format!("{}{}", server.authority.pem, elsewhere.authority.pem);
    std::fs::write(cluster.folder.path().join("ca.crt"), both).unwrap();
    for (what, mode) in [
        ("closed", Mode::Closed),
        ("forbidden", Mode::Status(403)),
        ("elsewhere", Mode::Redirect(elsewhere.url())),
        ("cut", Mode::Cut),
        ("huge", Mode::Huge),
        ("no JSON", Mode::Text("<html>".to_owned())),
        ("no key set", Mode::Text("{\"keys\":{}}".to_owned())),
        ("no keys", Mode::Keys(vec![])),
        ("symmetric keys only", Mode::Keys(vec![oct.clone()])),
        ("two keys of one name", Mode::Keys(vec![second.jwk_as("k1"), key.jwk()])),
    ] {
        server.set(mode);
        let before = server.asked().len();
        server.asked_after(before + 1).await;
        cluster.accepts(&key).await;
        let other = second.token(&claims("shop", "orders"));
        assert!(cluster.accounts.identify(&other).await.is_err(), "{what}");
    }
    assert!(elsewhere.asked().is_empty(), "a redirect was followed, and the pod's token with it");
    // A symmetric key among others is passed over.
    server.set(Mode::Keys(vec![oct, second.jwk()]));
    cluster.accepts(&second).await;
    assert!(matches!(
        cluster.accounts.identify(&key.hmac_token(&claims("shop", "orders"))).await,
        Err(Rejection::Token(_))
    ));
}

#[tokio::test]
async fn a_server_that_says_nothing_holds_nobody_up_for_long() {
    let key = ClusterKey::new("k1");
    let server = ApiServer::start(Mode::Silent).await;
    let cluster = Cluster::new(&server, SystemClock);
    server.asked_after(0).await;
    let token = key.token(&claims("shop", "orders"));
    let begun = tokio::time::Instant::now();
    let waiting: Vec<_> = (0..200)
        .map(|_| {
            let (accounts, token) = (cluster.accounts.clone(), token.clone());
            tokio::spawn(async move { accounts.identify(&token).await })
        })
        .collect();
    for waiting in waiting {
        assert!(matches!(waiting.await.unwrap(), Err(Rejection::NoKeys)));
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}
