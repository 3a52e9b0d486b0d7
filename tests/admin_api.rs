//! The admin listener of the real binary, held against DESIGN.md §7: every member, status and header.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use jwksd::keyring::time::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};

use support::api::{Call, Description, Seen};
use support::{Answer, Daemon, PATIENCE, eventually};

/// A keyset whose successors are ready after two seconds and whose schedule does nothing meanwhile.
const ONE: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
[keyset.default]
issuer = "main"
algorithm = "ES256"
[keyset.default.rotation]
every = "1h"
propagation = "2s"
verifiers = [{ name = "billing", cache = "300ms" }, "vault", "openbao"]
[keyset.default.tokens]
max_ttl = "10m"
clock_skew = "500ms"
"#;

/// Others beside it, so that every member of an answer has another value somewhere.
const OTHERS: &str = r#"
[issuer.other]
url = "https://issuer.example.test/other"
max_age = "1s"
[keyset.second]
issuer = "other"
algorithm = "EdDSA"
[keyset.second.rotation]
every = "2h"
propagation = "3s"
[keyset.second.tokens]
max_ttl = "5m"
clock_skew = "600ms"
[issuer.quick]
url = "https://issuer.example.test/quick"
max_age = "1s"
[keyset.quick]
issuer = "quick"
algorithm = "ES256"
[keyset.quick.rotation]
every = "3s"
propagation = "2s"
[keyset.quick.tokens]
max_ttl = "1s"
clock_skew = "500ms"
[admin.token.deputy]
role = "operator"
file = "deputy.token"
"#;

/// Joins an issuer that has published keys, so its first key waits.
const LATE: &str = r#"
[keyset.late]
issuer = "main"
algorithm = "ES384"
[keyset.late.rotation]
every = "1h"
propagation = "20m"
[keyset.late.tokens]
max_ttl = "10m"
clock_skew = "500ms"
"#;

/// Members that this release can give one value only.
const CONSTANT: [&str; 1] = ["keyset.backend"];

/// A daemon whose every answer is held against its own description and taken down.
struct Admin {
    daemon: Daemon,
    description: Description,
    seen: Seen,
    reached: BTreeSet<String>,
}

impl Admin {
    async fn start(tables: &str) -> Self {
        let daemon = Daemon::builder().tables(tables).start().await;
        let description = Description::of(&daemon).await;
        Admin { daemon, description, seen: Seen::default(), reached: BTreeSet::new() }
    }

    /// Calls `/v1` and `path`; the answer must be described, and is noted under `kind` when it is a 200.
    async fn call(&mut self, kind: &str, method: Method, path: &str, body: Option<Value>) -> Answer {
        let call = Call::new(&self.daemon, method.clone(), "admin", &format!("/v1{path}"));
        self.send(kind, &method, path, body, call).await
    }

    async fn send(&mut self, kind: &str, method: &Method, path: &str, body: Option<Value>, call: Call) -> Answer {
        let call = match &body {
            Some(body) => call.json(body),
            None => call,
        };
        let answer = call.send().await;
        let template = template(path);
        self.description.check(method.as_str(), &template, &answer);
        self.reached.insert(format!("{method} {template}"));
        match kind {
            "list" => answer.json()["keysets"].as_array().unwrap().iter().for_each(|one| self.seen.note("keyset", one)),
            kind if answer.status == 200 => self.seen.note(kind, &answer.json()),
            _ => {}
        }
        answer
    }

    /// As [`call`](Self::call), for what other tests see move.
    async fn look_at(&mut self, path: &str) {
        let answer = Call::get(&self.daemon, "admin", &format!("/v1{path}")).expect(200).await;
        let template = template(path);
        self.description.check("GET", &template, &answer);
        self.reached.insert(format!("GET {template}"));
    }

    async fn show(&mut self, keyset: &str) -> Value {
        let answer = self.call("keyset", Method::GET, &format!("/keysets/{keyset}?history=true"), None).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    async fn post(&mut self, path: &str, body: Value) -> Answer {
        self.call("outcome", Method::POST, path, Some(body)).await
    }

    /// As [`post`](Self::post), and it must be done.
    async fn done(&mut self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, 200, "POST {path}: {}", answer.text);
        answer.json()
    }

    /// Waits until `keyset` has a key in this state.
    async fn until(&self, keyset: &str, state: &str) {
        let what = format!("a {state} key of {keyset}");
        eventually(&what, PATIENCE, async || {
            let shown = look(&self.daemon, keyset).await;
            (!kids(&shown, state).is_empty()).then_some(())
        })
        .await;
    }

    /// Adds tables and has the configuration read again.
    async fn reload(&mut self, change: impl FnOnce(String) -> String) -> Answer {
        rewrite(&self.daemon, change);
        self.call("reload", Method::POST, "/reload", Some(json!({ "reason": "a test" }))).await
    }
}

/// The path as the description writes it.
fn template(path: &str) -> String {
    let path = path.split('?').next().unwrap();
    let mut parts: Vec<&str> = path.split('/').collect();
    for (at, name) in [(2, "keysets"), (4, "keys")] {
        if parts.len() > at && parts[at - 1] == name {
            parts[at] = if name == "keysets" { "{keyset}" } else { "{kid}" };
        }
    }
    format!("/v1{}", parts.join("/"))
}

async fn look(daemon: &Daemon, keyset: &str) -> Value {
    Call::get(daemon, "admin", &format!("/v1/keysets/{keyset}?history=true")).expect(200).await.json()
}

fn kids(keyset: &Value, state: &str) -> Vec<String> {
    let keys = keyset["keys"].as_array().unwrap().iter().filter(|key| key["state"] == state);
    keys.map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

fn active(keyset: &Value) -> String {
    keyset["active_kid"].as_str().expect("a key is active").to_owned()
}

fn rewrite(daemon: &Daemon, change: impl FnOnce(String) -> String) {
    let path = daemon.path("jwksd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, change(text)).unwrap();
}

fn vector(name: &str) -> String {
    std::fs::read_to_string(support::tools::repository("tests/vectors/keys").join(name)).unwrap()
}

fn in_an_hour() -> String {
    "2099-01-01T00:00:00Z".to_owned()
}

async fn published_kids(daemon: &Daemon) -> Vec<String> {
    let jwks = Call::get(daemon, "public", "/.well-known/jwks.json").expect(200).await.json();
    jwks["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn every_member_of_every_answer_moves_and_is_described() {
    let mut it = Admin::start(&format!("{ONE}{OTHERS}")).await;
    let all = it.call("list", Method::GET, "/keysets", None).await.json();
    let names: Vec<&str> = all["keysets"].as_array().unwrap().iter().map(|k| k["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["default", "second", "quick"], "in the configuration's order");
    it.call("list", Method::GET, "/keysets?history=true", None).await;
    for keyset in names {
        let shown = it.show(keyset).await;
        assert_eq!((&shown["health"], &shown["alarms"], &shown["hold"]), (&json!("ok"), &json!([]), &Value::Null));
        assert_eq!(shown["keys"][0]["state"], "active");
        assert_eq!(shown["keys"][0]["kid"], shown["active_kid"]);
    }
    assert_eq!(
        it.show("default").await["policy"],
        json!({
            "max_ttl_seconds": 600, "propagation_seconds": 2, "overlap_seconds": 601,
        })
    );

    // Held, so that its rotation becomes overdue; looked at when it is.
    it.call("hold", Method::PUT, "/keysets/quick/hold", Some(json!({ "reason": "to see it late" }))).await;

    // Nothing stands by yet.
    let early = it.post("/keysets/default/rotate", json!({})).await;
    assert_eq!((early.status, early.slug().as_str()), (409, "no-standby"), "{}", early.text);
    assert!(early.json()["next_standby_at"].is_string(), "{}", early.text);
    let trial = it.done("/keysets/default/rotate", json!({ "dry_run": true, "allow_unpropagated": true })).await;
    assert_eq!(
        (&trial["dry_run"], &trial["unpropagated"], &trial["safe"]),
        (&json!(true), &json!(true), &json!(false))
    );
    assert_eq!(trial["verifiers"][0]["ok"], false, "{trial}");

    it.until("default", "standby").await;
    let before = it.show("default").await;
    let rotated = it.done("/keysets/default/rotate", json!({ "reason": "first of many" })).await;
    assert_eq!((&rotated["safe"], &rotated["unpropagated"]), (&json!(true), &json!(false)), "{rotated}");
    assert!(rotated["generation"].as_u64() > before["generation"].as_u64());
    let changes = rotated["changes"].as_array().unwrap();
    assert_eq!((&changes[0]["from"], &changes[0]["to"]), (&json!("standby"), &json!("active")));
    assert_eq!((&changes[1]["from"], &changes[1]["to"]), (&json!("active"), &json!("retiring")));
    assert_eq!(changes[1]["kid"], before["active_kid"]);
    assert!(changes[1]["unpublished_at"].is_string() && changes[0].get("unpublished_at").is_none(), "{rotated}");
    // The answer comes once JWKS and signer show it.
    let now_active = changes[0]["kid"].as_str().unwrap();
    assert_eq!(published_kids(&it.daemon).await[0], now_active);
    assert_eq!(it.daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await.kid, now_active);

    let hold = json!({ "until": in_an_hour(), "reason": "until later" });
    it.call("hold", Method::PUT, "/keysets/default/hold", Some(hold)).await;
    it.show("default").await;
    let deputy = std::fs::read_to_string(it.daemon.path("deputy.token")).unwrap();
    let call = Call::new(&it.daemon, Method::PUT, "admin", "/v1/keysets/default/hold").bearer(deputy.trim());
    it.send("hold", &Method::PUT, "/keysets/default/hold", Some(json!({ "reason": "until resumed" })), call).await;
    let held = it.show("default").await;
    assert_eq!(held["hold"]["actor"], "deputy");
    assert_eq!(held["next_rotation"]["blocked_by"], json!(["hold"]));

    let back = it.done("/keysets/default/rollback", json!({ "reason": "too early" })).await;
    assert_eq!(back["changes"][0]["kid"], before["active_kid"], "{back}");
    let forth = it.done("/keysets/default/rollback", json!({ "reason": "that was a mistake" })).await;
    assert_eq!(forth["changes"][0]["kid"], now_active, "{forth}");
    assert_eq!(it.call("none", Method::DELETE, "/keysets/default/hold", None).await.status, 204);

    // A revocation with declared verifiers and one without.
    let kid = active(&it.show("default").await);
    let revoked = it.done(&format!("/keysets/default/keys/{kid}/revoke"), json!({ "reason": "leaked" })).await;
    assert_eq!(revoked["exposure"]["unbounded"], json!(["vault", "openbao"]), "{revoked}");
    assert_eq!(revoked["restart_verifiers"], json!(["vault", "openbao"]));
    assert!(revoked["exposure"]["until"].is_string(), "the bounded verifier's");
    assert!(!published_kids(&it.daemon).await.contains(&kid));
    let kid = active(&it.show("second").await);
    let path = format!("/v1/keysets/second/keys/{kid}/revoke");
    let call = Call::post(&it.daemon, "admin", &path).bearer(deputy.trim());
    let body = json!({ "reason": "a drill" });
    let other = it.send("outcome", &Method::POST, &path[3..], Some(body), call).await.json();
    assert!(other["exposure"]["until"].is_string(), "the issuer's own caches: {other}");
    assert_eq!(other["exposure"]["unbounded"], json!([]));
    it.show("second").await;

    let key = json!({ "private_key": vector("p256-pkcs8.pem"), "kid": "old-kid", "max_token_life": "1h" });
    let imported = it.done("/keysets/default/import", key).await;
    assert!(imported["changes"][0].get("from").is_none(), "{imported}");
    it.show("default").await;
    it.done("/keysets/default/compromise", json!({ "reason": "the store leaked" })).await;
    it.until("default", "active").await;

    let added = it.reload(|text| text + LATE).await;
    assert_eq!((added.status, &added.json()["changed"]), (200, &json!(true)), "{}", added.text);
    it.until("late", "pending").await;
    eventually("the latecomer's publication", PATIENCE, async || {
        (!look(&it.daemon, "late").await["next_rotation"].is_null()).then_some(())
    })
    .await;
    let late = it.show("late").await;
    assert_eq!((&late["active_kid"], &late["health"]), (&Value::Null, &json!("failing")), "{late}");
    assert_eq!(late["next_rotation"]["trigger"], "first", "{late}");
    let moved = it.reload(|text| text.replace("[log]\n", "shutdown_delay = \"1s\"\n[log]\n")).await;
    assert_eq!(moved.status, 422, "shutdown_delay is not a key of the table before: {}", moved.text);
    let unchanged = it
        .reload(|text| text.replace("shutdown_delay = \"1s\"\n", "").replace("json\"", "text\"\nlevel = \"debug\""))
        .await
        .json();
    assert!(!unchanged["restart_needed"].as_array().unwrap().is_empty(), "{unchanged}");
    it.reload(|text| text.replace("text\"\nlevel = \"debug\"", "json\"")).await;
    it.reload(|text| text).await;

    // Gone from the configuration: it stays published, raises an alarm, and is drained.
    let without_second = |text: String| {
        let (head, rest) = text.split_once("[keyset.second]").unwrap();
        let (_, tail) = rest.split_once("[issuer.quick]").unwrap();
        format!("{head}[issuer.quick]{tail}")
            .replace("[issuer.other]\nurl = \"https://issuer.example.test/other\"\nmax_age = \"1s\"\n", "")
    };
    let removed = it.reload(without_second).await;
    assert_eq!(removed.status, 200, "{}", removed.text);
    let absent = it.show("second").await;
    assert_eq!(absent["alarms"], json!(["absent"]), "{absent}");
    it.done("/keysets/second/drain", json!({ "reason": "not needed any more" })).await;
    let refused = it.call("none", Method::DELETE, "/keysets/second/drain", None).await;
    assert_eq!((refused.status, refused.slug().as_str()), (409, "keyset-not-configured"));
    let drained = it.show("second").await;
    assert_eq!(drained["next_rotation"], Value::Null, "{drained}");

    it.call("clock", Method::POST, "/clock/accept", Some(json!({}))).await;
    it.call("clock", Method::POST, "/clock/accept", Some(json!({ "dry_run": true }))).await;
    it.call("shown-clock", Method::GET, "/clock", None).await;
    eventually("the held rotation to be overdue", PATIENCE, async || {
        let shown = look(&it.daemon, "quick").await;
        (shown["next_rotation"]["overdue_seconds"].as_i64().unwrap() > 0).then_some(())
    })
    .await;
    it.show("quick").await;
    let page = it.call("audit", Method::GET, "/audit", None).await;
    assert_eq!(page.status, 200);
    it.call("audit", Method::GET, "/audit?after=2099-01-01T00:00:00Z", None).await;
    it.call("list", Method::GET, "/keysets", None).await;
    for path in ["/keysets/default/timeline", "/keysets/quick/timeline", "/replicas", "/whoami"] {
        it.look_at(path).await;
    }

    // `ClockAnswer.was_frozen` takes a clock that steps; nothing here moves it.
    let mut constant = CONSTANT.to_vec();
    // Only on a standby key that has to wait again: how often one is met here depends on the moment. The examples of
    // tests/keyring_properties see it move.
    constant.push("keyset.keys[].next.not_before");
    // There is one replica; those of tests/replicas.rs see it move.
    constant.push("outcome.unconfirmed_replicas");
    constant.extend(["clock.action", "clock.was_frozen", "clock.at", "clock.generation", "reload.action"]);
    constant.extend(["shown-clock.now", "shown-clock.frozen", "shown-clock.generation"]);
    it.seen.assert_two_of_each(&constant);
    let unreached = described_operations(&it.description, "admin");
    let unreached: Vec<_> = unreached.iter().filter(|operation| !it.reached.contains(*operation)).collect();
    assert_eq!(unreached, ["GET /openapi.json"], "every route of the description is one");
    assert_documented_members(&it, "KeysetView", "keyset");
    assert_documented_members(&it, "Outcome", "outcome");
    assert_documented_members(&it, "AuditPage", "audit");
}

fn described_operations(description: &Description, tag: &str) -> Vec<String> {
    let mut operations = Vec::new();
    for (path, item) in description.document()["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if operation["tags"].as_array().unwrap().contains(&json!(tag)) {
                operations.push(format!("{} {path}", method.to_uppercase()));
            }
        }
    }
    operations
}

/// The description names no member that no answer has.
fn assert_documented_members(it: &Admin, schema: &str, kind: &str) {
    let schema = &it.description.document()["components"]["schemas"][schema];
    // `probes`, of issuers that have some: tests/probes.rs sees all its members move.
    for name in schema["properties"].as_object().unwrap().keys().filter(|name| *name != "probes") {
        assert!(!it.seen.values(&format!("{kind}.{name}")).is_empty(), "{kind}.{name} is described and never answered");
    }
}

#[tokio::test]
async fn a_change_can_be_bound_to_a_generation_and_repeated_safely() {
    let mut it = Admin::start(ONE).await;
    it.until("default", "standby").await;
    let shown = Call::get(&it.daemon, "admin", "/v1/keysets/default").expect(200).await;
    let etag = shown.header("etag").to_owned();
    assert_eq!(etag, format!("\"{}\"", shown.json()["generation"]));

    let rotate = |if_match: &str| {
        Call::post(&it.daemon, "admin", "/v1/keysets/default/rotate").header("if-match", if_match).json(&json!({}))
    };
    let stale = rotate("\"0\"").expect(412).await;
    assert_eq!(stale.slug(), "generation-mismatch");
    for wrong in ["44", "\"44", "*, \"44\"", ""] {
        assert_eq!(rotate(wrong).expect(400).await.slug(), "malformed-request", "{wrong}");
    }
    // A weak tag never matches, not even that of the generation (RFC 9110 §13.1.1); nor does one that is not ours.
    for stale in [format!("W/{etag}"), format!("\"0\", W/{etag}"), "\"x\"".to_owned(), etag.replacen('"', "\"0", 1)] {
        assert_eq!(rotate(&stale).expect(412).await.slug(), "generation-mismatch", "{stale}");
    }
    // Any of a list will do.
    let listed = format!("\"0\", {etag}");
    for any in ["*", &listed] {
        let dry = Call::post(&it.daemon, "admin", "/v1/keysets/default/rotate").header("if-match", any);
        dry.json(&json!({ "dry_run": true })).expect(200).await;
    }
    let bound = rotate(&etag).header("idempotency-key", "rotate-1").expect(200).await;
    assert_eq!(bound.header("etag"), format!("\"{}\"", bound.json()["generation"]));
    // The same key again: the same answer, whatever the generation is by now.
    let repeated = rotate(&etag).header("idempotency-key", "rotate-1").expect(200).await;
    assert_eq!(repeated.json(), bound.json());
    assert_eq!(repeated.header("etag"), bound.header("etag"));
    let reused = Call::post(&it.daemon, "admin", "/v1/keysets/default/rotate").header("idempotency-key", "rotate-1");
    let reused = reused.json(&json!({ "reason": "another body" })).expect(422).await;
    assert_eq!(reused.slug(), "idempotency-key-reused");
    let elsewhere =
        Call::post(&it.daemon, "admin", "/v1/keysets/default/rollback").header("idempotency-key", "rotate-1");
    assert_eq!(elsewhere.json(&json!({})).expect(422).await.slug(), "idempotency-key-reused");
    for wrong in [String::new(), "x".repeat(256), "ü".to_owned(), "a\tb".to_owned()] {
        let call = Call::post(&it.daemon, "admin", "/v1/keysets/default/rotate").header("idempotency-key", &wrong);
        assert_eq!(call.json(&json!({})).expect(400).await.slug(), "idempotency-key-invalid", "{wrong:?}");
    }

    it.daemon.kill9().await;
    it.daemon.restart().await;
    let after_crash =
        Call::post(&it.daemon, "admin", "/v1/keysets/default/rotate").header("idempotency-key", "rotate-1");
    assert_eq!(after_crash.json(&json!({})).expect(200).await.json(), bound.json());
    let now = look(&it.daemon, "default").await;
    assert_eq!(active(&now), bound.json()["changes"][0]["kid"].as_str().unwrap(), "it rotated once");

    // A dry run is no change: it is not remembered.
    for _ in 0..2 {
        let dry = Call::post(&it.daemon, "admin", "/v1/keysets/default/compromise").header("idempotency-key", "dry-1");
        let dry = dry.json(&json!({ "dry_run": true })).expect(200).await.json();
        assert_eq!((&dry["generation"], &dry["dry_run"]), (&now["generation"], &json!(true)));
    }
    assert_eq!(look(&it.daemon, "default").await["keys"], now["keys"]);
    let hold = || {
        let call = Call::new(&it.daemon, Method::PUT, "admin", "/v1/keysets/default/hold");
        call.header("idempotency-key", "hold-1").json(&json!({ "reason": "once" }))
    };
    assert_eq!(hold().expect(200).await.json(), hold().expect(200).await.json());
    let resume = || {
        Call::new(&it.daemon, Method::DELETE, "admin", "/v1/keysets/default/hold").header("idempotency-key", "resume-1")
    };
    resume().expect(204).await;
    hold().expect(200).await;
    resume().expect(204).await;
    assert_eq!(look(&it.daemon, "default").await["hold"], Value::Null);
}

#[tokio::test]
async fn what_concerns_no_single_keyset_can_be_bound_and_repeated_safely_too() {
    let mut it = Admin::start(ONE).await;
    let shown = it.call("shown-clock", Method::GET, "/clock", None).await;
    let generation = shown.json()["generation"].as_u64().unwrap();
    assert_eq!(shown.header("etag"), format!("\"{generation}\""));
    assert_eq!(shown.json()["frozen"], false);

    for path in ["/v1/clock/accept", "/v1/reload"] {
        let call = |daemon: &Daemon| Call::post(daemon, "admin", path);
        for (header, wrong, status) in
            [("if-match", "7", 400), ("if-match", "W/\"0\", \"0\"", 412), ("idempotency-key", "", 400)]
        {
            call(&it.daemon).header(header, wrong).expect(status).await;
        }
        let at = Call::get(&it.daemon, "admin", "/v1/clock").expect(200).await.header("etag").to_owned();
        let key = format!("key of {path}");
        let body = json!({ "reason": "once" });
        let bound =
            call(&it.daemon).header("if-match", &at).header("idempotency-key", &key).json(&body).expect(200).await;
        let after = bound.json()["generation"].as_u64().unwrap();
        assert_eq!(format!("\"{}\"", after - 1), at, "remembered in one write");
        assert_eq!(bound.header("etag"), format!("\"{after}\""));
        call(&it.daemon).header("if-match", &at).expect(412).await;
        let other = call(&it.daemon).header("idempotency-key", &key).json(&json!({ "reason": "other" }));
        assert_eq!(other.expect(422).await.slug(), "idempotency-key-reused");
        it.daemon.kill9().await;
        it.daemon.restart().await;
        let again =
            call(&it.daemon).header("if-match", &at).header("idempotency-key", &key).json(&body).expect(200).await;
        assert_eq!((again.json(), again.header("etag")), (bound.json(), bound.header("etag")));
        let elsewhere = if path == "/v1/reload" { "/v1/clock/accept" } else { "/v1/reload" };
        let elsewhere = Call::post(&it.daemon, "admin", elsewhere).header("idempotency-key", &key).json(&body);
        assert_eq!(elsewhere.expect(422).await.slug(), "idempotency-key-reused");
    }
    let dry = Call::post(&it.daemon, "admin", "/v1/reload").json(&json!({ "dry_run": true })).expect(422).await;
    assert_eq!(dry.slug(), "dry-run-not-supported");
    let items = Call::get(&it.daemon, "admin", "/v1/audit").expect(200).await.json();
    let noted = items["items"].as_array().unwrap().iter().filter(|item| item["action"] == "reload");
    assert_eq!(noted.count(), 1, "{items}");
}

#[tokio::test]
async fn an_idempotency_key_is_remembered_where_nothing_had_to_change() {
    let mut it = Admin::start(ONE).await;
    it.until("default", "standby").await;
    let first = active(&look(&it.daemon, "default").await);
    let path = format!("/v1/keysets/default/keys/{first}/revoke");
    it.done(&path[3..], json!({ "reason": "leaked" })).await;
    let before = look(&it.daemon, "default").await;

    let revoke =
        |daemon: &Daemon, body: Value| Call::post(daemon, "admin", &path).header("idempotency-key", "k-1").json(&body);
    let resume = |daemon: &Daemon| {
        Call::new(daemon, Method::DELETE, "admin", "/v1/keysets/default/hold").header("idempotency-key", "k-2")
    };
    let (revoked, resumed) = (json!({ "reason": "again" }), json!({}));
    let answer = revoke(&it.daemon, revoked.clone()).expect(200).await;
    assert_eq!(answer.json()["changes"], json!([]), "{}", answer.text);
    let no_content = resume(&it.daemon).json(&resumed).expect(204).await;
    for restarted in [false, true] {
        if restarted {
            it.daemon.kill9().await;
            it.daemon.restart().await;
        }
        let again = revoke(&it.daemon, revoked.clone()).expect(200).await;
        assert_eq!((again.json(), again.header("etag")), (answer.json(), answer.header("etag")));
        assert_eq!(resume(&it.daemon).json(&resumed).expect(204).await.header("etag"), no_content.header("etag"));
        let other = revoke(&it.daemon, json!({ "reason": "another body" })).expect(422).await;
        assert_eq!(other.slug(), "idempotency-key-reused");
        let other = resume(&it.daemon).json(&json!({ "reason": "another body" })).expect(422).await;
        assert_eq!(other.slug(), "idempotency-key-reused");
    }
    // Without a key nothing is written.
    let settled = look(&it.daemon, "default").await["generation"].clone();
    Call::post(&it.daemon, "admin", &path).json(&revoked).expect(200).await;
    let after = look(&it.daemon, "default").await;
    assert_eq!((&after["generation"], active(&after)), (&settled, active(&before)));
}

#[tokio::test]
async fn holds_rollbacks_and_revocations_answer_as_designed() {
    let mut it = Admin::start(ONE).await;
    let nothing = it.post("/keysets/default/rollback", json!({})).await;
    assert_eq!((nothing.status, nothing.slug().as_str()), (409, "nothing-to-roll-back"));
    it.until("default", "standby").await;

    let past =
        it.call("hold", Method::PUT, "/keysets/default/hold", Some(json!({ "until": "2020-01-01T00:00:00Z" }))).await;
    assert_eq!((past.status, past.slug().as_str()), (422, "hold-invalid"));
    let hold = json!({ "until": in_an_hour(), "reason": "a freeze" });
    let held = it.call("hold", Method::PUT, "/keysets/default/hold", Some(hold)).await;
    assert_eq!(held.status, 200);
    let members: Vec<String> = held.json().as_object().unwrap().keys().cloned().collect();
    assert_eq!(
        members.iter().map(String::as_str).collect::<BTreeSet<_>>(),
        BTreeSet::from(["reason", "until", "actor", "since"])
    );
    assert_eq!(look(&it.daemon, "default").await["hold"], held.json());
    let short = Call::new(&it.daemon, Method::PUT, "admin", "/v1/keysets/default/hold");
    let soon =
        (chrono::DateTime::from_timestamp(i64::try_from(support::unix_now().as_secs()).unwrap() + 2, 0)).unwrap();
    short
        .json(&json!({ "until": soon.format("%Y-%m-%dT%H:%M:%SZ").to_string(), "reason": "shorter" }))
        .expect(200)
        .await;
    assert_eq!(look(&it.daemon, "default").await["hold"]["reason"], "shorter", "a hold replaces the former one");
    let deleted = Call::new(&it.daemon, Method::DELETE, "admin", "/v1/keysets/default/hold").expect(204).await;
    assert!(deleted.text.is_empty());
    Call::new(&it.daemon, Method::DELETE, "admin", "/v1/keysets/default/hold").expect(204).await;

    // Rotate ignores a hold; a rollback sets one.
    it.call("hold", Method::PUT, "/keysets/default/hold", Some(json!({}))).await;
    let first = active(&look(&it.daemon, "default").await);
    let rotated = it.done("/keysets/default/rotate", json!({})).await;
    assert!(rotated["warnings"].to_string().contains("hold"), "{rotated}");
    it.call("hold", Method::DELETE, "/keysets/default/hold", None).await;
    let back = it.done("/keysets/default/rollback", json!({ "reason": "a bad key" })).await;
    assert_eq!(back["changes"][0]["kid"], first.as_str());
    let shown = look(&it.daemon, "default").await;
    assert_eq!((active(&shown), &shown["hold"]["reason"]), (first.clone(), &json!("a bad key")));

    // Revoking: a standby key leaves, the active key is succeeded, a revoked one stays as it is.
    let standby = kids(&shown, "standby");
    if let Some(kid) = standby.first() {
        let answer = it.done(&format!("/keysets/default/keys/{kid}/revoke"), json!({})).await;
        assert_eq!(answer["changes"][0]["to"], "revoked");
        assert!(!published_kids(&it.daemon).await.contains(kid));
    }
    let revoked = it.done(&format!("/keysets/default/keys/{first}/revoke"), json!({ "reason": "leaked" })).await;
    assert_eq!(revoked["changes"][0]["to"], "active", "a successor signs at once: {revoked}");
    let again = it.done(&format!("/keysets/default/keys/{first}/revoke"), json!({ "reason": "twice" })).await;
    assert_eq!((&again["changes"], &again["safe"]), (&json!([]), &json!(true)), "{again}");
    let after = look(&it.daemon, "default").await;
    let key = after["keys"].as_array().unwrap().iter().find(|key| key["kid"] == first.as_str()).unwrap();
    assert_eq!(key["revocation"]["reason"], "leaked");
    let listed = Call::get(&it.daemon, "admin", "/v1/keysets/default").expect(200).await.json();
    assert!(kids(&listed, "revoked").is_empty(), "ended keys only with history=true");
    let unknown = it.post("/keysets/default/keys/nobody/revoke", json!({})).await;
    assert_eq!((unknown.status, unknown.slug().as_str()), (404, "unknown-key"));

    let items = Call::get(&it.daemon, "admin", "/v1/audit").expect(200).await.json();
    let actions: BTreeSet<&str> =
        items["items"].as_array().unwrap().iter().map(|item| item["action"].as_str().unwrap()).collect();
    for action in ["rotate", "rollback", "revoke", "hold", "resume", "created", "propagated", "promoted"] {
        assert!(actions.contains(action), "{action} among {actions:?}");
    }
}

#[tokio::test]
async fn a_drained_keyset_ends_and_its_retired_keys_cannot_be_revoked() {
    let brief = ONE.replace("max_ttl = \"10m\"", "max_ttl = \"1s\"").replace("verifiers", "# verifiers");
    let mut it = Admin::start(&format!("{brief}{OTHERS}")).await;
    let kid = active(&look(&it.daemon, "default").await);
    let gone = it
        .reload(|text| {
            let (head, rest) = text.split_once("[keyset.default]").unwrap();
            let (_, tail) = rest.split_once("[issuer.other]").unwrap();
            format!("{head}[issuer.other]{tail}")
                .replace("[issuer.main]\nurl = \"https://issuer.example.test\"\nmax_age = \"1s\"\n", "")
        })
        .await;
    assert_eq!(gone.status, 200, "{}", gone.text);
    let rotate = it.post("/keysets/default/rotate", json!({})).await;
    assert_eq!((rotate.status, rotate.slug().as_str()), (409, "keyset-not-configured"));
    assert_eq!(published_kids(&it.daemon).await[0], kid, "absence is no transition");
    let trial = it.done("/keysets/default/drain", json!({ "dry_run": true })).await;
    assert!(!trial["changes"].as_array().unwrap().is_empty());
    assert_eq!(look(&it.daemon, "default").await["alarms"], json!(["absent"]));
    let drained = it.done("/keysets/default/drain", json!({ "reason": "the issuer closes" })).await;
    assert_eq!(drained["action"], "drain");
    let refused = it.daemon.sign_answer("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await;
    assert_eq!((refused.status, refused.slug().as_str()), (409, "keyset-drained"), "waiting does not help");
    let metrics = it.daemon.metrics().await;
    let of = ("keyset", "default");
    assert_eq!(metrics.sum("jwksd_drained", &[of]), Some(1.0));
    assert_eq!(metrics.sum("jwksd_sign_rejections_total", &[of, ("reason", "drained")]), Some(1.0));
    assert_eq!(metrics.sum("jwksd_signing_failures_total", &[of]), Some(0.0), "it is no failure of ours");
    for path in ["/keysets/default/rotate", "/keysets/default/rollback"] {
        let answer = it.post(path, json!({})).await;
        assert_eq!((answer.status, answer.slug().as_str()), (409, "keyset-drained"), "{path}");
    }
    it.until("default", "retired").await;
    eventually("the drained key to have left", PATIENCE, async || {
        let shown = look(&it.daemon, "default").await;
        kids(&shown, "retired").contains(&kid).then_some(())
    })
    .await;
    let retired = it.post(&format!("/keysets/default/keys/{kid}/revoke"), json!({})).await;
    assert_eq!((retired.status, retired.slug().as_str()), (409, "already-retired"));
    let empty = Call::get(&it.daemon, "public", "/.well-known/jwks.json").expect(503).await;
    assert_eq!((empty.slug().as_str(), empty.header("cache-control")), ("jwks-empty", "no-store"));
}

#[tokio::test]
async fn only_those_with_a_token_and_the_role_get_in() {
    let viewer = "[admin.token.viewer]\nrole = \"viewer\"\nfile = \"viewer.token\"\n";
    let it = Admin::start(&format!("{ONE}{viewer}")).await;
    let token = std::fs::read_to_string(it.daemon.path("viewer.token")).unwrap();
    let kid = active(&look(&it.daemon, "default").await);
    let changing = [
        (Method::POST, "/v1/keysets/default/rotate".to_owned()),
        (Method::POST, "/v1/keysets/default/rollback".to_owned()),
        (Method::POST, "/v1/keysets/default/compromise".to_owned()),
        (Method::POST, format!("/v1/keysets/default/keys/{kid}/revoke")),
        (Method::PUT, "/v1/keysets/default/hold".to_owned()),
        (Method::DELETE, "/v1/keysets/default/hold".to_owned()),
        (Method::POST, "/v1/keysets/default/drain".to_owned()),
        (Method::DELETE, "/v1/keysets/default/drain".to_owned()),
        (Method::POST, "/v1/keysets/default/import".to_owned()),
        (Method::POST, "/v1/clock/accept".to_owned()),
        (Method::POST, "/v1/reload".to_owned()),
    ];
    let reading = [
        "/v1/keysets",
        "/v1/keysets/default",
        "/v1/keysets/default/timeline",
        "/v1/replicas",
        "/v1/whoami",
        "/v1/audit",
        "/openapi.json",
    ];
    for (method, path) in &changing {
        let call = || Call::new(&it.daemon, method.clone(), "admin", path).json(&json!({}));
        assert_eq!(call().bearer(token.trim()).expect(403).await.slug(), "forbidden", "{method} {path}");
        let nobody = call().without_token().expect(401).await;
        assert_eq!(nobody.slug(), "unauthorized");
        assert_eq!(nobody.header("www-authenticate"), "Bearer realm=\"jwksd\"");
    }
    let whoami = Call::get(&it.daemon, "admin", "/v1/whoami").bearer(token.trim()).expect(200).await.json();
    assert_eq!((&whoami["name"], &whoami["role"]), (&json!("viewer"), &json!("viewer")));
    for path in reading {
        let call = || Call::get(&it.daemon, "admin", path);
        call().bearer(token.trim()).expect(200).await;
        call().without_token().expect(401).await;
    }
    let right = support::api::operator_token(&it.daemon);
    let wrong = [
        format!("Basic {right}"),
        right.clone(),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer {}", &right[..right.len() - 1]),
        format!("Bearer {right}x"),
    ];
    for value in &wrong {
        let call = Call::get(&it.daemon, "admin", "/v1/keysets").header("authorization", value);
        assert_eq!(call.expect(401).await.slug(), "unauthorized");
    }
    // Whoever guesses is slowed; a valid token is not.
    let started = tokio::time::Instant::now();
    Call::get(&it.daemon, "admin", "/v1/keysets").expect(200).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // A path that is none needs a token as well: nothing is told to strangers.
    Call::get(&it.daemon, "admin", "/v1/nothing").without_token().expect(401).await;
    let after = look(&it.daemon, "default").await;
    assert_eq!((active(&after), &after["hold"]), (kid, &Value::Null), "nothing was changed");
    let failures = it.daemon.metrics().await.sum("jwksd_admin_auth_failures_total", &[]).unwrap();
    assert!(failures >= f64::from(u32::try_from(changing.len() + reading.len() + wrong.len()).unwrap()), "{failures}");
}

#[tokio::test]
async fn web_pages_and_malformed_requests_are_refused() {
    let it = Admin::start(ONE).await;
    let daemon = &it.daemon;
    let port = daemon.address("admin").rsplit(':').next().unwrap().to_owned();
    for (name, value, slug) in [
        ("host", "evil.example".to_owned(), "host-not-allowed"),
        ("host", format!("rebound.example:{port}"), "host-not-allowed"),
        ("host", "10.0.0.1".to_owned(), "host-not-allowed"),
        ("origin", "https://evil.example".to_owned(), "foreign-origin"),
        ("origin", "null".to_owned(), "foreign-origin"),
        ("origin", "http://127.0.0.1:1".to_owned(), "foreign-origin"),
        ("sec-fetch-site", "cross-site".to_owned(), "foreign-origin"),
        ("sec-fetch-site", "same-site".to_owned(), "foreign-origin"),
    ] {
        for listener in ["admin", "signer"] {
            let call = Call::get(daemon, listener, "/v1/keysets/default").header(name, &value);
            assert_eq!(call.expect(403).await.slug(), slug, "{listener}: {name}: {value}");
        }
    }
    for (name, value) in [
        ("host", format!("localhost:{port}")),
        ("origin", format!("http://{}", daemon.address("admin"))),
        ("sec-fetch-site", "none".to_owned()),
        ("sec-fetch-site", "same-origin".to_owned()),
    ] {
        Call::get(daemon, "admin", "/v1/keysets").header(name, &value).expect(200).await;
    }

    let post = |path: &str| Call::post(daemon, "admin", &format!("/v1{path}"));
    let rotate = "/keysets/default/rotate";
    for body in [
        "{",
        "[]",
        "null",
        "\"x\"",
        "{}{}",
        "{\"reasn\":\"x\"}",
        "{\"reason\":1}",
        "{\"dry_run\":\"yes\"}",
        "{\"dry_run\":null}",
        "{\"reason\":\"a\",\"reason\":\"b\"}",
        "{\"confirm_algorithm\":1}",
        "\u{feff}{}",
    ] {
        for path in [rotate, "/keysets/default/rollback", "/keysets/default/drain", "/keysets/default/compromise"] {
            let strict = path == rotate || !body.contains("confirm_algorithm");
            let answer = post(path).text("application/json", body).expect(400).await;
            assert_eq!(answer.slug(), "malformed-request", "{path} {body} {strict}");
        }
    }
    for path in ["/clock/accept", "/reload", "/keysets/default/import"] {
        assert_eq!(post(path).json(&json!({ "surprise": 1 })).expect(400).await.slug(), "malformed-request", "{path}");
    }
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"] {
        assert_eq!(post(rotate).text(content_type, "{}").expect(415).await.slug(), "unsupported-media-type");
    }
    assert_eq!(post(rotate).bare("{}").expect(415).await.slug(), "unsupported-media-type");
    let large = json!({ "reason": "x".repeat(66_000) });
    assert_eq!(post(rotate).json(&large).expect(413).await.slug(), "body-too-large");
    let long = json!({ "reason": "x".repeat(1001) });
    assert_eq!(post(rotate).json(&long).expect(422).await.slug(), "value-not-allowed");
    let control = json!({ "reason": "\u{1b}[2J" });
    assert_eq!(post(rotate).json(&control).expect(422).await.slug(), "value-not-allowed");
    for query in ["?history=perhaps", "?histroy=true", "?history=true&history=false"] {
        let call = Call::get(daemon, "admin", &format!("/v1/keysets/default{query}"));
        assert_eq!(call.expect(400).await.slug(), "malformed-request", "{query}");
    }
    for after in ["yesterday", "1", "2026-01-01", "2026-01-01T00:00:00Z~x", "~~"] {
        let call = Call::get(daemon, "admin", &format!("/v1/audit?after={after}"));
        assert_eq!(call.expect(400).await.slug(), "malformed-request", "{after}");
    }
    for path in ["/v1", "/v1/", "/v1/keysets/", "/v1/keyset", "/v2/keysets", "/v1/keysets/default/keys"] {
        assert_eq!(Call::get(daemon, "admin", path).expect(404).await.slug(), "not-found", "{path}");
    }
    for path in ["nobody", "DEFAULT", "default%20", "..%2fdefault", &"x".repeat(3000)] {
        assert_eq!(
            Call::get(daemon, "admin", &format!("/v1/keysets/{path}")).expect(404).await.slug(),
            "unknown-keyset"
        );
    }
    for (method, path, allow) in [
        (Method::GET, rotate, "POST"),
        (Method::POST, "/keysets/default/hold", "PUT"),
        (Method::DELETE, "/keysets/default", "GET"),
        (Method::PATCH, "/audit", "GET"),
        (Method::OPTIONS, "/keysets", "GET"),
        (Method::GET, "/reload", "POST"),
    ] {
        let answer = Call::new(daemon, method.clone(), "admin", &format!("/v1{path}")).expect(405).await;
        assert_eq!(answer.slug(), "method-not-allowed");
        assert!(answer.header("allow").contains(allow), "{method} {path}: {}", answer.header("allow"));
    }
    let own = Call::get(daemon, "admin", "/nothing").header("x-request-id", "trace-1").expect(404).await;
    assert_eq!(own.json()["request_id"], "trace-1");
    for listener in ["signer", "ops", "public"] {
        Call::get(daemon, listener, "/nothing").expect(404).await;
        let path = match listener {
            "signer" => "/v1/keysets/default/sign",
            "ops" => "/livez",
            _ => "/.well-known/jwks.json",
        };
        let method = if listener == "signer" { Method::GET } else { Method::POST };
        let answer = Call::new(daemon, method, listener, path).expect(405).await;
        assert!(!answer.header("allow").is_empty(), "{listener}");
    }
}

#[tokio::test]
async fn keys_from_elsewhere_join_or_are_refused_with_a_reason() {
    let rfc: Value = serde_json::from_str(include_str!("vectors/jwk.json")).unwrap();
    let jwk = rfc.pointer("/rfc7515/a3/jwk").expect("the private key of RFC 7515 A.3").to_string();
    let mut it = Admin::start(&format!("{ONE}{OTHERS}")).await;
    let path = "/keysets/default/import";
    let refused = [
        (json!({}), "exactly one"),
        (json!({ "private_key": vector("p256-pkcs8.pem"), "public_key": vector("p256-spki.pem") }), "exactly one"),
        (json!({ "private_key": "not a key" }), "cannot be imported"),
        (json!({ "private_key": vector("p256-spki.pem") }), "public-only"),
        (json!({ "private_key": vector("p256-encrypted-pkcs8.pem") }), "decrypt it first"),
        (json!({ "private_key": vector("secp256k1-pkcs8.pem") }), "secp256k1"),
        (json!({ "private_key": vector("ed25519-pkcs8.pem"), "alg": "EdDSA" }), "the keyset signs with ES256"),
        (json!({ "private_key": vector("rsa2048-pkcs8.pem") }), "say which with alg"),
        (json!({ "private_key": vector("p256-pkcs8.pem"), "alg": "RS256" }), "cannot be used with RS256"),
        (json!({ "private_key": vector("p256-pkcs8.pem"), "kid": "" }), "kid"),
        (json!({ "public_key": vector("p256-spki.pem") }), "until"),
        (json!({ "public_key": vector("p256-spki.pem"), "until": "2020-01-01T00:00:00Z" }), "future"),
        (json!({ "public_key": vector("p256-pkcs8.pem"), "until": in_an_hour() }), "cannot be imported"),
    ];
    for (body, reason) in refused {
        let answer = it.post(path, body).await;
        assert_eq!((answer.status, answer.slug().as_str()), (422, "import-refused"), "{reason}: {}", answer.text);
        assert!(answer.detail().contains(reason), "{reason}: {}", answer.detail());
    }
    for body in [
        json!({ "private_key": 1 }),
        json!({ "public_key": ["x"] }),
        json!({ "public_key": vector("p256-spki.pem"), "until": "tomorrow" }),
        json!({ "private_key": vector("p256-pkcs8.pem"), "max_token_life": "long" }),
        json!({ "private_key": vector("p256-pkcs8.pem"), "max_token_life": -1 }),
    ] {
        let answer = it.post(path, body).await;
        assert_eq!((answer.status, answer.slug().as_str()), (400, "malformed-request"), "{}", answer.text);
    }

    // With one active, a private key becomes standby, with its kid and the life of the tokens it signed.
    let body = json!({ "private_key": vector("p256-pkcs8.pem"), "kid": "from-elsewhere", "max_token_life": "2h",
        "published_since": "2020-01-01T00:00:00Z", "reason": "moving here" });
    let trial = it.done(path, json!({ "private_key": vector("p256-pkcs8.pem"), "dry_run": true })).await;
    assert_eq!(trial["changes"][0]["to"], "standby");
    let joined = it.done(path, body.clone()).await;
    assert_eq!(
        (&joined["changes"][0]["kid"], &joined["changes"][0]["to"]),
        (&json!("from-elsewhere"), &json!("standby"))
    );
    let shown = it.show("default").await;
    let key = shown["keys"].as_array().unwrap().iter().find(|key| key["kid"] == "from-elsewhere").unwrap();
    assert_eq!((&key["origin"], &key["ttl_bound_seconds"]), (&json!("imported"), &json!(7200)));
    assert!(published_kids(&it.daemon).await.contains(&"from-elsewhere".to_owned()));
    let twice = it.post(path, body).await;
    assert_eq!((twice.status, twice.slug().as_str()), (409, "already-imported"));

    // A JWK, and a public key that stays until a stated time.
    let second = it.done(path, json!({ "private_key": jwk, "kid": "rfc7515", "max_token_life": 3600 })).await;
    assert_eq!(second["changes"][0]["to"], "standby", "{second}");
    let public = json!({ "public_key": vector("p384-spki.pem"), "until": in_an_hour(), "kid": "other-signer" });
    let retiring = it.done(path, public).await;
    assert_eq!(retiring["changes"][0]["to"], "retiring", "{retiring}");
    assert_eq!(retiring["changes"][0]["unpublished_at"], in_an_hour());
    assert_eq!(published_kids(&it.daemon).await.last().unwrap(), "other-signer");

    // What was imported and published for long signs like any other key.
    eventually("the imported key to be taken", PATIENCE, async || {
        let rotated = Call::post(&it.daemon, "admin", "/v1/keysets/default/rotate").json(&json!({})).send().await;
        (rotated.status == 200).then_some(())
    })
    .await;
    let signed = it.daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await;
    assert_eq!(signed.kid, active(&look(&it.daemon, "default").await));
}

#[tokio::test]
async fn a_reload_takes_what_is_valid_and_keeps_what_runs_otherwise() {
    let mut it = Admin::start(ONE).await;
    let gauge = async |it: &Admin| it.daemon.metrics().await.sum("jwksd_config_last_reload_successful", &[]);
    assert_eq!(gauge(&it).await, Some(1.0));
    let broken = it.reload(|text| text.replace("every = \"1h\"", "every = \"soon\"\nevry = \"1h\"")).await;
    assert_eq!((broken.status, broken.slug().as_str()), (422, "configuration-invalid"));
    let errors = broken.json()["errors"].to_string();
    assert!(errors.contains("keyset.default.rotation.every") && errors.contains("evry"), "all at once: {errors}");
    assert_eq!(gauge(&it).await, Some(0.0));
    assert_eq!(it.daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "config_invalid")]), Some(1.0));
    it.daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await;
    let mended = it
        .reload(|text| {
            text.replace("every = \"soon\"\nevry = \"1h\"", "every = \"1h\"")
                .replace("max_ttl = \"10m\"", "max_ttl = \"20m\"")
        })
        .await;
    assert_eq!((mended.status, &mended.json()["changed"]), (200, &json!(true)), "{}", mended.text);
    assert_eq!(gauge(&it).await, Some(1.0));
    eventually("the new policy", PATIENCE, async || {
        let shown = look(&it.daemon, "default").await;
        (shown["policy"]["max_ttl_seconds"] == 1200).then_some(())
    })
    .await;
    // A new token takes effect, the former one ends.
    let former = support::api::operator_token(&it.daemon);
    std::fs::write(it.daemon.path("admin.token"), "another-token-that-is-long-enough-0123456789\n").unwrap();
    eventually("the exchanged token", PATIENCE, async || {
        let call = Call::get(&it.daemon, "admin", "/v1/keysets").send().await;
        (call.status == 200).then_some(())
    })
    .await;
    Call::get(&it.daemon, "admin", "/v1/keysets").bearer(&former).expect(401).await;
    let same = it.call("reload", Method::POST, "/reload", None).await.json();
    assert_eq!(same["changed"], false, "{same}");
}

#[tokio::test]
async fn a_restart_does_not_make_caches_forget_that_an_issuer_was_served_without_a_first_key() {
    let twin = |name: &str| format!("[keyset.{name}]\nissuer = \"twins\"\nalgorithm = \"EdDSA\"\n");
    let twins = "[issuer.twins]\nurl = \"https://issuer.example.test/twins\"\nmax_age = \"1h\"\n";
    let mut it = Admin::start(ONE).await;
    let tables = format!("{twins}{}{}", twin("left"), twin("right"));
    let added = it.reload(|text| format!("{text}\n{tables}")).await;
    assert_eq!(added.status, 200, "{}", added.text);
    let sight = async |it: &Admin| {
        let (left, right) = (look(&it.daemon, "left").await, look(&it.daemon, "right").await);
        let published = |twin: &Value| {
            let keys = twin["keys"].as_array().unwrap();
            !keys.is_empty() && keys.iter().all(|key| !key["published_at"].is_null())
        };
        (published(&left) && published(&right)).then(|| [left["active_kid"].clone(), right["active_kid"].clone()])
    };
    let before = eventually("both to be published", PATIENCE, async || sight(&it).await).await;
    assert!(before.contains(&Value::Null), "one came second, and somebody may hold a document without it: {before:?}");
    it.daemon.kill9().await;
    let killed = Timestamp::from_millis(i64::try_from(support::unix_now().as_millis()).unwrap());
    it.daemon.add_tables(&tables);
    it.daemon.restart().await;
    eventually("both to be published", PATIENCE, async || sight(&it).await).await;
    // One may have been promoted while the other was looked at, but none since.
    let audit = Call::get(&it.daemon, "admin", "/v1/audit").expect(200).await.json();
    let promoted = audit["items"].as_array().unwrap().iter().filter(|item| item["action"] == "promoted");
    let late = promoted.filter(|item| Timestamp::parse_rfc3339(item["time"].as_str().unwrap()).unwrap() > killed);
    assert_eq!(late.count(), 0, "it still waits: {audit}");
}

#[tokio::test]
async fn what_is_refused_says_what_is_allowed() {
    let it = Admin::start(ONE).await;
    let unknown = Call::get(&it.daemon, "admin", "/v1/audit?keyset=nope").expect(404).await;
    assert_eq!(unknown.slug(), "unknown-keyset");
    for (path, body, forms) in [
        ("rotate", json!({ "confirm_algorithm": 5 }), "an algorithm such as"),
        ("import", json!({ "public_key": "x", "max_token_life": true }), "a duration such as"),
    ] {
        let refused = Call::post(&it.daemon, "admin", &format!("/v1/keysets/default/{path}")).json(&body).expect(400);
        let refused = refused.await;
        assert!(refused.text.contains(forms) && !refused.text.contains("enum"), "{}", refused.text);
    }
}

#[tokio::test]
async fn the_audit_log_is_read_page_by_page_and_says_who_did_what_and_why() {
    let mut it = Admin::start(&format!("{ONE}{OTHERS}")).await;
    let mut after: Option<String> = None;
    let mut items: Vec<Value> = Vec::new();
    it.done("/keysets/default/compromise", json!({ "reason": "a drill" })).await;
    it.until("default", "active").await;
    it.call("reload", Method::POST, "/reload", Some(json!({ "reason": "to be noted" }))).await;
    loop {
        let query = after.as_ref().map(|after| format!("?after={}", after.replace('+', "%2B"))).unwrap_or_default();
        let page = Call::get(&it.daemon, "admin", &format!("/v1/audit{query}")).expect(200).await.json();
        let found = page["items"].as_array().unwrap();
        if found.is_empty() {
            assert_eq!(page["next"].as_str(), after.as_deref(), "the cursor stays");
            break;
        }
        items.extend(found.iter().cloned());
        after = page["next"].as_str().map(str::to_owned);
    }
    // Between keysets a later page may bring what was decided before and stored after an earlier one was read.
    for keyset in ["default", "second"] {
        let of_it = items.iter().filter(|item| item["keyset"] == keyset);
        let times: Vec<&str> = of_it.map(|item| item["time"].as_str().unwrap()).collect();
        assert!(!times.is_empty() && times.is_sorted(), "{keyset}: oldest first");
    }
    let find = |action: &str| items.iter().find(|item| item["action"] == action).unwrap_or_else(|| panic!("{action}"));
    let compromise = find("compromise");
    assert_eq!((&compromise["actor"], &compromise["reason"]), (&json!("operator"), &json!("a drill")));
    assert_eq!((&compromise["keyset"], compromise["kids"].as_array().unwrap().len()), (&json!("default"), 3));
    assert_eq!(find("created")["actor"], "jwksd", "automatic transitions too");
    assert_eq!((&find("reload")["keyset"], &find("reload")["reason"]), (&Value::Null, &json!("to be noted")));

    it.call("hold", Method::PUT, "/keysets/second/hold", Some(json!({ "reason": "the only news" }))).await;
    let news = Call::get(&it.daemon, "admin", &format!("/v1/audit?keyset=second&after={}", after.unwrap()));
    let news = news.expect(200).await.json();
    assert!(news["items"].as_array().unwrap().iter().any(|item| item["reason"] == "the only news"), "{news}");
    assert!(news["items"].as_array().unwrap().iter().all(|item| item["keyset"] == "second"), "{news}");
    it.daemon.kill9().await;
    it.daemon.restart().await;
    let again = Call::get(&it.daemon, "admin", "/v1/audit").expect(200).await.json();
    assert!(again["items"].as_array().unwrap().len() > items.len(), "it survives a crash");
}
