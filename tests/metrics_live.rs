//! Every metric of DESIGN.md §8 is seen to move in the real binary.
//!
//! What this release cannot move, and why:
//! - `jwksd_signing_failures_total` with any reason but `no_active_key`: the local backend neither fails nor is remote, a
//!   file store is never stale, and a thousand queued signatures are no test for a shared machine;
//! - `jwksd_backend_requests_total` with every outcome but `ok`: the local backend does not fail; `encrypt`, `decrypt` and
//!   `describe` are a seal's in AWS KMS (tests/aws_kms_seal.rs);
//! - `jwksd_publication_mismatch`, `jwksd_publisher_…` and the alarm `publisher_failing`: tests/probes.rs has probes,
//!   tests/publishers.rs and tests/publishers_engine.rs have publishers; `jwksd_staleness_limit_seconds`: 0 with a file store;
//! - `jwksd_jwks_requests_total` with `code="other"`: what is no JWKS path belongs to no issuer;
//! - `jwksd_rotations_total` with `compromise` (a new key, not the compromise, takes over: `revocation`) and
//!   `key_disabled` (remote backends); the alarms `unauthenticated`, `key_disabled`, `publication_mismatch`,
//!   `backend_unavailable` and `destruction_pending` for the same reasons;
//! - `jwksd_clock_frozen` and the alarm `clock_frozen`: tests of the clock move them, with a clock of their own;
//! - `jwksd_build_info` is 1.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod support;

use std::collections::BTreeMap;

use reqwest::Method;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use support::api::Call;
use support::{Daemon, Metrics, PATIENCE, eventually, tools};

const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
[issuer.other]
url = "https://issuer.example.test/other"
max_age = "1s"
[keyset.default]
issuer = "main"
algorithm = "ES256"
[keyset.default.rotation]
every = "1h"
propagation = "2s"
[keyset.default.tokens]
max_ttl = "1s"
clock_skew = "500ms"
audiences = ["good"]
[keyset.quick]
issuer = "other"
algorithm = "RS256"
[keyset.quick.rotation]
every = "3s"
propagation = "2s"
successors = 1
[keyset.quick.tokens]
max_ttl = "1s"
clock_skew = "500ms"
"#;

type Labels = &'static [(&'static str, &'static str)];

/// Every series that must have had two values at the end.
const SERIES: &[(&str, Labels)] = &[
    ("jwksd_signatures_total", &[("keyset", "default"), ("alg", "ES256"), ("backend", "local")]),
    ("jwksd_signatures_total", &[("keyset", "quick"), ("alg", "RS256"), ("backend", "local")]),
    ("jwksd_signing_failures_total", &[("keyset", "late"), ("backend", "local"), ("reason", "no_active_key")]),
    ("jwksd_sign_rejections_total", &[("keyset", "default"), ("reason", "ttl")]),
    ("jwksd_sign_rejections_total", &[("keyset", "default"), ("reason", "claims")]),
    ("jwksd_sign_rejections_total", &[("keyset", "default"), ("reason", "audience")]),
    ("jwksd_sign_rejections_total", &[("keyset", "default"), ("reason", "unauthorized")]),
    ("jwksd_sign_rejections_total", &[("keyset", "default"), ("reason", "malformed")]),
    ("jwksd_sign_duration_seconds_count", &[("keyset", "default"), ("backend", "local")]),
    ("jwksd_sign_duration_seconds_sum", &[("keyset", "default"), ("backend", "local")]),
    ("jwksd_backend_requests_total", &[("backend", "local"), ("operation", "create"), ("outcome", "ok")]),
    ("jwksd_backend_requests_total", &[("backend", "local"), ("operation", "open"), ("outcome", "ok")]),
    ("jwksd_backend_requests_total", &[("backend", "local"), ("operation", "sign"), ("outcome", "ok")]),
    ("jwksd_backend_requests_total", &[("backend", "local"), ("operation", "destroy"), ("outcome", "ok")]),
    ("jwksd_backend_requests_total", &[("backend", "local"), ("operation", "import"), ("outcome", "ok")]),
    ("jwksd_backend_request_duration_seconds_count", &[("backend", "local"), ("operation", "create")]),
    ("jwksd_keys", &[("keyset", "default"), ("state", "pending")]),
    ("jwksd_keys", &[("keyset", "default"), ("state", "standby")]),
    ("jwksd_keys", &[("keyset", "default"), ("state", "retiring")]),
    ("jwksd_keys", &[("keyset", "default"), ("state", "retired")]),
    ("jwksd_keys", &[("keyset", "default"), ("state", "revoked")]),
    ("jwksd_keys", &[("keyset", "late"), ("state", "active")]),
    ("jwksd_active_key_activated_timestamp_seconds", &[("keyset", "default")]),
    ("jwksd_next_rotation_timestamp_seconds", &[("keyset", "default")]),
    ("jwksd_rotation_overdue_seconds", &[("keyset", "quick")]),
    ("jwksd_rotations_total", &[("keyset", "quick"), ("trigger", "schedule")]),
    ("jwksd_rotations_total", &[("keyset", "default"), ("trigger", "operator")]),
    ("jwksd_rotations_total", &[("keyset", "default"), ("trigger", "rollback")]),
    ("jwksd_rotations_total", &[("keyset", "default"), ("trigger", "revocation")]),
    ("jwksd_rotations_total", &[("keyset", "late"), ("trigger", "import")]),
    ("jwksd_rotation_failures_total", &[("keyset", "quick"), ("reason", "store")]),
    ("jwksd_standby_ready", &[("keyset", "default")]),
    ("jwksd_standby_expected_timestamp_seconds", &[("keyset", "default")]),
    ("jwksd_hold", &[("keyset", "quick")]),
    ("jwksd_keyring_confirmed_timestamp_seconds", &[("keyset", "default")]),
    ("jwksd_jwks_requests_total", &[("issuer", "main"), ("code", "200")]),
    ("jwksd_jwks_requests_total", &[("issuer", "main"), ("code", "304")]),
    ("jwksd_jwks_requests_total", &[("issuer", "main"), ("code", "405")]),
    ("jwksd_jwks_requests_total", &[("issuer", "main"), ("code", "503")]),
    ("jwksd_admin_auth_failures_total", &[]),
    ("jwksd_config_last_reload_successful", &[]),
    ("jwksd_alarms", &[("alarm", "config_invalid")]),
    ("jwksd_alarms", &[("alarm", "rotation_overdue")]),
    ("jwksd_alarms", &[("alarm", "no_standby")]),
    ("jwksd_alarms", &[("alarm", "no_active_key")]),
    ("jwksd_alarms", &[("alarm", "absent")]),
    ("jwksd_alarms", &[("alarm", "algorithm_unconfirmed")]),
    ("jwksd_alarms", &[("alarm", "store_unavailable")]),
    ("jwksd_alarms", &[("alarm", "heartbeat_failed")]),
    ("process_cpu_seconds_total", &[]),
];

/// The values each series was seen with.
struct Watch {
    daemon: Daemon,
    seen: BTreeMap<usize, Vec<f64>>,
}

impl Watch {
    async fn look(&mut self) -> Metrics {
        let metrics = self.daemon.metrics().await;
        for (index, (name, labels)) in SERIES.iter().enumerate() {
            let Some(value) = metrics.sum(name, labels) else { continue };
            let values = self.seen.entry(index).or_default();
            if !values.contains(&value) {
                values.push(value);
            }
        }
        metrics
    }

    /// Looks until the series is `wanted`.
    async fn until(&mut self, name: &str, labels: &[(&str, &str)], wanted: impl Fn(f64) -> bool) {
        eventually(&format!("{name}{labels:?}"), PATIENCE, async || {
            let metrics = self.look().await;
            metrics.sum(name, labels).is_some_and(&wanted).then_some(())
        })
        .await;
    }

    async fn post(&mut self, path: &str, body: Value) {
        Call::post(&self.daemon, "admin", &format!("/v1{path}")).json(&body).expect(200).await;
        self.look().await;
    }

    async fn sign(&mut self, keyset: &str, body: Value, status: u16) {
        let call = Call::post(&self.daemon, "signer", &format!("/v1/keysets/{keyset}/sign"));
        call.bearer(TOKEN).json(&body).expect(status).await;
    }

    async fn reload(&mut self, change: impl FnOnce(String) -> String, status: u16) {
        let path = self.daemon.path("jwksd.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, change(text)).unwrap();
        Call::post(&self.daemon, "admin", "/v1/reload").expect(status).await;
        self.look().await;
    }
}

const TOKEN: &str = "a-token-long-enough-to-be-taken-for-one-0123456789";

/// Whether the daemon may write files; sockets and pipes are not concerned.
fn let_write(daemon: &Daemon, may: bool) {
    let pid = Pid::from_raw(i32::try_from(daemon.pid()).unwrap());
    let current = if may { None } else { Some(0) };
    prlimit(pid, Resource::Fsize, Rlimit { current, maximum: None }).expect("its own limits may be changed");
}

#[tokio::test]
async fn every_metric_moves() {
    // A child inherits what is ignored: a write beyond the limit is then an error, as on a full disk, and no signal.
    // SAFETY: ignoring a signal is sound at any time.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let daemon = Daemon::builder().tables(TABLES).signer_with_token().start().await;
    let mut it = Watch { daemon, seen: BTreeMap::new() };
    let good = json!({ "claims": { "sub": "a", "aud": "good" } });
    let start = it.look().await;
    let first =
        |metrics: &Metrics, keyset| metrics.sum("jwksd_rotations_total", &[("keyset", keyset), ("trigger", "first")]);
    assert_eq!(first(&start, "default"), Some(1.0));
    for (name, labels) in SERIES.iter().filter(|(_, labels)| !labels.contains(&("keyset", "late"))) {
        assert!(start.sum(name, labels).is_some(), "{name}{labels:?} exists from the start");
    }

    let signed = async |it: &mut Watch| {
        let labels = [("backend", "local"), ("operation", "sign")];
        let metrics = it.look().await;
        let names = ["jwksd_backend_requests_total", "jwksd_backend_request_duration_seconds_count"];
        names.map(|name| metrics.sum(name, &labels).unwrap())
    };
    it.sign("default", good.clone(), 200).await;
    assert_eq!(signed(&mut it).await, [1.0, 1.0], "in place");
    it.sign("quick", good.clone(), 200).await;
    assert_eq!(signed(&mut it).await, [2.0, 2.0], "in the pool");
    it.sign("default", json!({ "claims": { "sub": "a", "aud": "good" }, "ttl": "1h" }), 422).await;
    it.sign("default", json!({ "claims": { "sub": "a" } }), 422).await;
    it.sign("default", json!({ "claims": { "sub": "a", "aud": "bad" } }), 422).await;
    it.sign("default", json!({}), 400).await;
    let stranger = Call::post(&it.daemon, "signer", "/v1/keysets/default/sign").bearer("a-stranger");
    stranger.json(&good).expect(401).await;
    Call::get(&it.daemon, "admin", "/v1/keysets").bearer("a-stranger").expect(401).await;
    let jwks = |method: Method| Call::new(&it.daemon, method, "public", "/.well-known/jwks.json");
    let etag = jwks(Method::GET).expect(200).await.header("etag").to_owned();
    jwks(Method::GET).header("if-none-match", "*").expect(304).await;
    jwks(Method::POST).expect(405).await;
    assert!(!etag.is_empty());
    let metrics = it.look().await;
    for (name, labels) in SERIES.iter().filter(|(name, _)| *name == "jwksd_sign_rejections_total") {
        assert_eq!(metrics.sum(name, labels), Some(1.0), "{labels:?}: each request counts once, under one reason");
    }

    // The schedule, then late because of a hold.
    it.until("jwksd_rotations_total", &[("keyset", "quick"), ("trigger", "schedule")], |value| value > 0.0).await;
    // A store that cannot be written: the step fails and is retried.
    let_write(&it.daemon, false);
    it.until("jwksd_rotation_failures_total", &[("keyset", "quick"), ("reason", "store")], |value| value > 0.0).await;
    it.until("jwksd_alarms", &[("alarm", "store_unavailable")], |value| value > 0.0).await;
    it.until("jwksd_alarms", &[("alarm", "heartbeat_failed")], |value| value > 0.0).await;
    it.sign("quick", good.clone(), 200).await;
    for _ in 0..20 {
        Call::new(&it.daemon, Method::PUT, "admin", "/v1/keysets/default/hold").json(&json!({})).expect(503).await;
    }
    let lines = it.daemon.logs();
    let told = lines.iter().filter(|line| line.contains("store-unavailable")).count();
    assert!((1..=2).contains(&told), "of many alike one line now and then, not {told}");
    let_write(&it.daemon, true);
    it.until("jwksd_alarms", &[("alarm", "store_unavailable")], |value| value == 0.0).await;
    it.until("jwksd_alarms", &[("alarm", "heartbeat_failed")], |value| value == 0.0).await;
    Call::new(&it.daemon, Method::PUT, "admin", "/v1/keysets/quick/hold").json(&json!({})).expect(200).await;

    it.until("jwksd_keys", &[("keyset", "default"), ("state", "standby")], |value| value == 2.0).await;
    it.post("/keysets/default/rotate", json!({})).await;
    it.post("/keysets/default/rollback", json!({})).await;
    Call::new(&it.daemon, Method::DELETE, "admin", "/v1/keysets/default/hold").expect(204).await;
    it.until("jwksd_keys", &[("keyset", "default"), ("state", "retired")], |value| value > 0.0).await;
    let active = Call::get(&it.daemon, "admin", "/v1/keysets/default").expect(200).await.json()["active_kid"].clone();
    it.post(&format!("/keysets/default/keys/{}/revoke", active.as_str().unwrap()), json!({})).await;
    it.post("/keysets/default/compromise", json!({})).await;
    it.until("jwksd_keys", &[("keyset", "default"), ("state", "active")], |value| value == 1.0).await;

    // A configuration that is invalid, one that changes the algorithm, one with a keyset more, one with a keyset less.
    it.reload(|text| text.replace("max_ttl", "maxttl"), 422).await;
    it.reload(|text| text.replace("maxttl", "max_ttl").replace("\"RS256\"", "\"ES256\""), 200).await;
    it.until("jwksd_alarms", &[("alarm", "algorithm_unconfirmed")], |value| value > 0.0).await;
    let late = TABLES.split_once("[keyset.default]").unwrap().1.split_once("[keyset.quick]").unwrap().0;
    let late = late.replace("keyset.default", "keyset.late").replace("propagation = \"2s\"", "propagation = \"5s\"");
    it.reload(
        |text| format!("{text}\n[keyset.late]{late}").replace("issuer = \"main\"\nalgorithm = \"ES256\"\n\n", ""),
        200,
    )
    .await;
    it.until("jwksd_keys", &[("keyset", "late"), ("state", "pending")], |value| value > 0.0).await;
    it.sign("late", good.clone(), 503).await;
    assert_eq!(first(&it.look().await, "late"), Some(0.0));
    let key = std::fs::read_to_string(tools::repository("tests/vectors/keys/p256-pkcs8.pem")).unwrap();
    it.post("/keysets/late/import", json!({ "private_key": key, "published_since": "2020-01-01T00:00:00Z" })).await;
    it.until("jwksd_rotation_overdue_seconds", &[("keyset", "quick")], |value| value > 0.0).await;
    it.until("jwksd_alarms", &[("alarm", "rotation_overdue")], |value| value > 0.0).await;
    it.until("jwksd_standby_ready", &[("keyset", "default")], |value| value == 1.0).await;

    it.reload(
        |text| {
            let (head, rest) = text.split_once("[keyset.default]").unwrap();
            let (_, tail) = rest.split_once("[keyset.quick]").unwrap();
            format!("{head}[keyset.quick]{tail}")
        },
        200,
    )
    .await;
    it.until("jwksd_alarms", &[("alarm", "absent")], |value| value > 0.0).await;
    for keyset in ["default", "late"] {
        it.post(&format!("/keysets/{keyset}/drain"), json!({})).await;
    }
    eventually("the issuer's last key to leave", PATIENCE, async || {
        let jwks = Call::get(&it.daemon, "public", "/.well-known/jwks.json").send().await;
        (jwks.status == 503).then_some(())
    })
    .await;
    it.look().await;

    let still: Vec<String> = SERIES
        .iter()
        .enumerate()
        .filter(|(index, _)| it.seen.get(index).is_none_or(|values| values.len() < 2))
        .map(|(index, (name, labels))| format!("{name}{labels:?}: {:?}", it.seen.get(&index)))
        .collect();
    assert!(still.is_empty(), "seen with fewer than two values:\n{}", still.join("\n"));
}
