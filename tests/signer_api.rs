//! The signer and public listeners of the real binary, held against DESIGN.md §7. Every answer passes through `Call`,
//! which looks for private members in it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};

use support::api::{Call, Description};
use support::{Answer, Daemon, PATIENCE, eventually, unix_now};

const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
stale_if_error = "1s"
jwks_paths = ["/oauth/keys", "/keys.json"]
[issuer.tenant]
url = "https://issuer.example.test/tenant-a"
max_age = "1s"
discovery = "off"
[keyset.default]
issuer = "main"
algorithm = "ES256"
[keyset.default.rotation]
every = "1h"
propagation = "3s"
[keyset.default.tokens]
max_ttl = "15m"
default_ttl = "5m"
clock_skew = "500ms"
[keyset.strict]
issuer = "main"
algorithm = "ES256"
[keyset.strict.rotation]
every = "1h"
propagation = "3s"
[keyset.strict.tokens]
max_ttl = "1m"
clock_skew = "500ms"
required_claims = ["sub", "aud", "tenant"]
audiences = ["https://a.example", "https://b.example"]
types = ["at+jwt"]
[keyset.tenant]
issuer = "tenant"
algorithm = "RS256"
[keyset.tenant.rotation]
every = "1h"
propagation = "3s"
successors = 1
[keyset.tenant.tokens]
max_ttl = "1m"
clock_skew = "500ms"
"#;

fn sign(daemon: &Daemon, keyset: &str) -> Call {
    Call::post(daemon, "signer", &format!("/v1/keysets/{keyset}/sign"))
}

fn claims_of(answer: &Value) -> Value {
    part_of(answer, 1)
}

fn header_of(answer: &Value) -> Value {
    part_of(answer, 0)
}

fn part_of(answer: &Value, at: usize) -> Value {
    let token = answer["token"].as_str().unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(at).unwrap()).unwrap()).unwrap()
}

/// A refused body for the keyset `default`: status, slug and a part of the detail.
fn refused() -> Vec<(String, u16, &'static str, &'static str)> {
    let now = unix_now().as_secs();
    let bad = |body: &str, detail: &'static str| (body.to_owned(), 400, "malformed-request", detail);
    let claims = |inner: &str| format!(r#"{{"claims":{{"sub":"a","aud":"b"{inner}}}}}"#);
    let with = |member: &str| format!(r#"{{"claims":{{"sub":"a","aud":"b"}},{member}}}"#);
    let invalid = |body: String, detail: &'static str| (body, 422, "claim-invalid", detail);
    let ttl = |body: String, detail: &'static str| (body, 422, "ttl-invalid", detail);
    let missing = |body: &str, detail: &'static str| (body.to_owned(), 422, "claim-missing", detail);
    let forbidden = |body: String, detail: &'static str| (body, 422, "claim-forbidden", detail);
    let too_long = |body: String, detail: &'static str| (body, 422, "ttl-too-long", detail);
    let deep = format!("{}1{}", r#"{"x":"#.repeat(40), "}".repeat(40));
    let many = (0..300).map(|n| format!(r#","m{n}":1"#)).collect::<String>();
    let audiences = (0..65).map(|n| format!(r#""a{n}""#)).collect::<Vec<_>>().join(",");
    vec![
        // Not JSON, or not the JSON of a request.
        bad("", "read"),
        bad(" ", "read"),
        bad("{", "read"),
        bad("nonsense", "read"),
        bad("[]", "object"),
        bad("null", "object"),
        bad("1", "object"),
        bad("\"{}\"", "object"),
        bad("{}", "`claims` is missing"),
        bad("{}{}", "read"),
        bad("{\"claims\":{}} x", "read"),
        bad("\u{feff}{\"claims\":{}}", "read"),
        bad("{'claims':{}}", "read"),
        bad("{\"claims\":{},}", "read"),
        bad("{\"claims\":{\"a\":01}}", "read"),
        bad("{\"claims\":{\"a\":NaN}}", "read"),
        bad("{\"claims\":{\"a\":+1}}", "read"),
        bad("{\"claims\":{\"a\":\"\u{1}\"}}", "read"),
        bad("{\"claims\":{\"a\":\"\\x\"}}", "read"),
        bad("{\"claims\":null}", "must be an object"),
        bad("{\"claims\":[]}", "must be an object"),
        bad("{\"claims\":\"sub=a\"}", "must be an object"),
        bad("{\"claims\":1}", "must be an object"),
        bad("{\"claims\":{},\"claims\":{}}", "twice"),
        bad(&with(r#""ttl":60,"ttl":60"#), "twice"),
        bad(&with(r#""alg":"none""#), "unknown"),
        bad(&with(r#""header":{}"#), "unknown"),
        bad(&with(r#""kid":"x""#), "unknown"),
        bad(&with(r#""TTL":60"#), "unknown"),
        bad(&with(r#""ttl":null"#), "ttl"),
        bad(&with(r#""ttl":true"#), "ttl"),
        bad(&with(r#""ttl":[60]"#), "ttl"),
        bad(&with(r#""ttl":{"s":60}"#), "ttl"),
        bad(&with(r#""typ":null"#), "typ"),
        bad(&with(r#""typ":1"#), "typ"),
        bad(&with(r#""typ":["JWT"]"#), "typ"),
        // How long it lives.
        ttl(with(r#""ttl":0"#), "ttl 0"),
        ttl(with(r#""ttl":-1"#), "ttl -1"),
        ttl(with(r#""ttl":0.5"#), "ttl 0.5"),
        ttl(with(r#""ttl":"0s""#), "ttl"),
        ttl(with(r#""ttl":"500ms""#), "ttl"),
        ttl(with(r#""ttl":"1500ms""#), "ttl"),
        ttl(with(r#""ttl":"""#), "ttl"),
        ttl(with(r#""ttl":"soon""#), "ttl"),
        ttl(with(r#""ttl":"-5m""#), "ttl"),
        too_long(with(r#""ttl":901"#), "15m"),
        too_long(with(r#""ttl":"16m""#), "15m"),
        too_long(with(r#""ttl":"1h""#), "15m"),
        too_long(claims(&format!(r#","exp":{}"#, now + 3600)), "15m"),
        too_long(claims(r#","exp":99999999999"#), "15m"),
        invalid(claims(&format!(r#","exp":{}"#, now - 10)), "claims.exp must be in the future"),
        invalid(claims(r#","exp":0"#), "claims.exp"),
        invalid(claims(r#","exp":-1"#), "claims.exp"),
        invalid(claims(r#","exp":"soon""#), "claims.exp must be"),
        invalid(claims(r#","exp":null"#), "claims.exp must be"),
        invalid(claims(&format!(r#","exp":{}.5"#, now + 60)), "claims.exp must be a whole number"),
        invalid(format!(r#"{{"claims":{{"sub":"a","aud":"b","exp":{}}},"ttl":60}}"#, now + 60), "ttl and claims.exp"),
        invalid(claims(r#","nbf":"now""#), "claims.nbf"),
        invalid(claims(&format!(r#","nbf":{}"#, now + 7200)), "claims.nbf must be before exp"),
        // What the daemon says itself.
        forbidden(claims(r#","iss":"https://evil.example""#), "claims.iss is set by jwksd"),
        forbidden(claims(r#","iss":"https://issuer.example.test""#), "claims.iss"),
        forbidden(claims(&format!(r#","iat":{now}"#)), "claims.iat"),
        forbidden(claims(r#","password":"x""#), "claims.password"),
        forbidden(claims(r#","PassWord":"x""#), "claims.PassWord"),
        forbidden(claims(r#","user":{"ssn":1}"#), "claims.user.ssn"),
        forbidden(claims(r#","users":[{"secret":null}]"#), "secret"),
        forbidden(claims(r#","password_hash":"x""#), "password_hash"),
        // What is required.
        missing("{\"claims\":{}}", "claims.aud"),
        missing("{\"claims\":{\"sub\":\"a\"}}", "claims.aud"),
        missing("{\"claims\":{\"aud\":\"b\"}}", "claims.sub"),
        missing("{\"claims\":{\"sub\":\"\",\"aud\":\"b\"}}", "claims.sub"),
        missing("{\"claims\":{\"sub\":null,\"aud\":\"b\"}}", "claims.sub"),
        missing("{\"claims\":{\"sub\":\"a\",\"aud\":\"\"}}", "claims.aud"),
        missing("{\"claims\":{\"sub\":\"a\",\"aud\":[]}}", "claims.aud"),
        (with(r#""typ":"at+jwt""#), 422, "claim-missing", "claims.client_id"),
        // Claims of the wrong kind.
        invalid(r#"{"claims":{"sub":1,"aud":"b"}}"#.to_owned(), "claims.sub must be a string"),
        invalid(r#"{"claims":{"sub":["a"],"aud":"b"}}"#.to_owned(), "claims.sub"),
        invalid(r#"{"claims":{"sub":"a","aud":1}}"#.to_owned(), "claims.aud"),
        invalid(r#"{"claims":{"sub":"a","aud":{"x":1}}}"#.to_owned(), "claims.aud"),
        invalid(r#"{"claims":{"sub":"a","aud":["b",1]}}"#.to_owned(), "claims.aud"),
        invalid(r#"{"claims":{"sub":"a","aud":["b",""]}}"#.to_owned(), "claims.aud"),
        invalid(r#"{"claims":{"sub":"a","aud":["b","b"]}}"#.to_owned(), "twice"),
        invalid(format!(r#"{{"claims":{{"sub":"a","aud":[{audiences}]}}}}"#), "64"),
        invalid(claims(r#","jti":1"#), "claims.jti"),
        invalid(claims(r#","jti":"""#), "claims.jti"),
        invalid(claims(&format!(r#","jti":"{}""#, "x".repeat(129))), "claims.jti"),
        invalid(claims(r#","x":1,"x":2"#), "claims.x stands there twice"),
        invalid(claims(r#","x":{"y":1,"\u0079":2}"#), "twice"),
        invalid(claims(r#","SUB":"b""#), "case"),
        invalid(claims(r#","Exp":1"#), "case"),
        invalid(claims(r#","x":"\ud800""#), "surrogate"),
        invalid(claims(r#","x":1e999"#), "number"),
        invalid(claims(&format!(r#","x":{deep}"#)), "deeper"),
        invalid(claims(&many), "256"),
        invalid(claims(&format!(r#","x":"{}""#, "y".repeat(17_000))), "16384"),
        // The type of the token.
        (with(r#""typ":"secevent+jwt""#), 422, "type-not-allowed", "JWT or at+jwt"),
        (with(r#""typ":"""#), 422, "type-not-allowed", "JWT or at+jwt"),
    ]
}

#[tokio::test]
async fn bad_requests_are_refused_with_a_reason_and_nothing_worse() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let description = Description::of(&daemon).await;
    let table = refused();
    assert!(table.len() >= 80, "{}", table.len());
    let mut wrong = Vec::new();
    for (body, status, slug, detail) in &table {
        let shown: String = body.chars().take(120).collect();
        let answer = sign(&daemon, "default").text("application/json", body.clone()).send().await;
        if answer.status < 400 {
            wrong.push(format!("{shown}: {}", answer.status));
            continue;
        }
        description.check("POST", "/v1/keysets/{keyset}/sign", &answer);
        if answer.status != *status || answer.slug() != *slug || !answer.detail().contains(detail) {
            wrong.push(format!("{shown}: {} {} {}", answer.status, answer.slug(), answer.detail()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let strict = |claims: Value| sign(&daemon, "strict").json(&json!({ "claims": claims }));
    for (claims, slug) in [
        (json!({ "sub": "a", "aud": "https://a.example", "tenant": "", "client_id": "c" }), "claim-missing"),
        (json!({ "sub": "a", "aud": "https://a.example", "tenant": "t" }), "claim-missing"),
        (json!({ "sub": "a", "aud": "https://c.example", "tenant": "t", "client_id": "c" }), "audience-not-allowed"),
        (
            json!({ "sub": "a", "aud": ["https://a.example", "x"], "tenant": "t", "client_id": "c" }),
            "audience-not-allowed",
        ),
    ] {
        assert_eq!(strict(claims.clone()).expect(422).await.slug(), slug, "{claims}");
    }
    let typ = json!({ "claims": { "sub": "a", "aud": "https://a.example", "tenant": "t" }, "typ": "JWT" });
    assert_eq!(sign(&daemon, "strict").json(&typ).expect(422).await.slug(), "type-not-allowed");

    let body = json!({ "claims": { "sub": "a", "aud": "b" } }).to_string();
    for content_type in ["text/plain", "application/jwt", "application/json; charset=utf-16", "*/*"] {
        let answer = sign(&daemon, "default").text(content_type, body.clone()).expect(415).await;
        assert_eq!(answer.slug(), "unsupported-media-type", "{content_type}");
    }
    sign(&daemon, "default").bare(body.clone()).expect(415).await;
    let large = json!({ "claims": { "sub": "x".repeat(70_000), "aud": "b" } });
    assert_eq!(sign(&daemon, "default").json(&large).expect(413).await.slug(), "body-too-large");
    for keyset in ["nobody", "Default", "default%00", "%2e%2e"] {
        let answer = sign(&daemon, keyset).text("application/json", body.clone()).send().await;
        assert_eq!(answer.status, 404, "{keyset}: {}", answer.text);
    }
    let logs = daemon.logs().join("\n");
    assert!(!logs.contains("panicked"), "{logs}");
    daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await;
}

#[tokio::test]
async fn good_requests_say_in_the_token_what_was_asked() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let description = Description::of(&daemon).await;
    let shown = Call::get(&daemon, "signer", "/v1/keysets/default").expect(200).await;
    description.check("GET", "/v1/keysets/{keyset}", &shown);
    let shown = shown.json();
    assert_eq!(
        shown,
        json!({ "name": "default", "issuer": "https://issuer.example.test", "algorithm": "ES256",
            "active_kid": shown["active_kid"],
            "policy": { "max_ttl_seconds": 900, "propagation_seconds": 3, "overlap_seconds": 901 } })
    );
    for (request, life) in [
        (json!({}), 300),
        (json!({ "ttl": "10m" }), 600),
        (json!({ "ttl": "1m30s" }), 90),
        (json!({ "ttl": 1 }), 1),
        (json!({ "ttl": 900 }), 900),
        (json!({ "ttl": "15m" }), 900),
    ] {
        let mut request = request;
        request["claims"] =
            json!({ "sub": "alice", "aud": ["x", "y"], "n": 12345678901234567890u64, "deep": { "a": [1] } });
        let before = unix_now().as_secs();
        let answer = sign(&daemon, "default").json(&request).expect(200).await;
        description.check("POST", "/v1/keysets/{keyset}/sign", &answer);
        let answer = answer.json();
        let members: Vec<&str> = answer.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(members, ["alg", "expires_at", "expires_in", "kid", "token"]);
        let claims = claims_of(&answer);
        assert_eq!(answer["expires_in"], life, "{request}");
        assert_eq!(claims["exp"], answer["expires_at"]);
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), life);
        assert_eq!(claims["nbf"], claims["iat"]);
        assert!(claims["iat"].as_u64().unwrap() >= before && claims["iat"].as_u64().unwrap() <= before + 2);
        assert_eq!(claims["iss"], "https://issuer.example.test");
        assert_eq!((&claims["aud"], &claims["n"]), (&json!(["x", "y"]), &json!(12345678901234567890u64)));
        assert!(claims["jti"].as_str().unwrap().len() >= 20);
        let header = header_of(&answer);
        assert_eq!(header, json!({ "alg": "ES256", "typ": "JWT", "kid": shown["active_kid"] }));
    }
    let now = unix_now().as_secs();
    let own = json!({ "claims": { "sub": "a", "aud": "b", "exp": now + 100, "nbf": now - 50, "jti": "mine" } });
    let own = claims_of(&sign(&daemon, "default").json(&own).expect(200).await.json());
    assert_eq!((&own["exp"], &own["nbf"], &own["jti"]), (&json!(now + 100), &json!(now - 50), &json!("mine")));
    let access = json!({ "claims": { "sub": "a", "aud": "b", "client_id": "c" }, "typ": "at+jwt" });
    assert_eq!(header_of(&sign(&daemon, "default").json(&access).expect(200).await.json())["typ"], "at+jwt");
    let tenant =
        sign(&daemon, "tenant").json(&json!({ "claims": { "sub": "a", "aud": "b" } })).expect(200).await.json();
    assert_eq!(claims_of(&tenant)["iss"], "https://issuer.example.test/tenant-a");
    assert_eq!(tenant["alg"], "RS256");
}

#[tokio::test]
async fn clients_are_known_by_token_and_limited_to_their_keysets_and_audiences() {
    let clients = r#"
[signer.client.orders]
token_file = "orders.token"
keysets = ["default"]
audiences = ["https://a.example"]
"#;
    let daemon = Daemon::builder().tables(TABLES).tables(clients).signer_with_token().prepare();
    let secret = "the-token-of-orders-is-long-enough-0123456789";
    std::fs::write(daemon.path("orders.token"), secret).unwrap();
    let mut daemon = daemon;
    daemon.start_process().await;
    daemon.ready().await;
    let body = |aud: &str| json!({ "claims": { "sub": "a", "aud": aud } });
    let orders = |keyset: &str, aud: &str| sign(&daemon, keyset).bearer(secret).json(&body(aud));
    orders("default", "https://a.example").expect(200).await;
    assert_eq!(orders("default", "https://b.example").expect(422).await.slug(), "audience-not-allowed");
    let without = sign(&daemon, "default").bearer(secret).json(&json!({ "claims": { "sub": "a" } }));
    assert_eq!(without.expect(422).await.slug(), "claim-missing");
    assert_eq!(orders("tenant", "https://a.example").expect(403).await.slug(), "forbidden");
    assert_eq!(
        orders("nobody", "https://a.example").expect(403).await.slug(),
        "forbidden",
        "it does not learn which exist"
    );
    let view = |keyset: &str| Call::get(&daemon, "signer", &format!("/v1/keysets/{keyset}"));
    view("default").bearer(secret).expect(200).await;
    view("tenant").bearer(secret).expect(403).await;
    for call in [view("default"), sign(&daemon, "default").json(&body("b")), view("default").bearer("guess")] {
        let answer = call.expect(401).await;
        assert!(answer.header("www-authenticate").starts_with("Bearer"), "{}", answer.text);
    }
    let metrics = daemon.metrics().await;
    let unauthorized = [("keyset", "default"), ("reason", "unauthorized")];
    assert_eq!(metrics.sum("jwksd_sign_rejections_total", &unauthorized), Some(1.0));

    let other = r#"
[signer.client.me]
uid = UID
keysets = ["tenant"]
[signer.client.stranger]
uid = 4294967
"#;
    let mine = other.replace("UID", &rustix::process::getuid().as_raw().to_string());
    let local = Daemon::builder().tables(TABLES).tables(&mine).signer_on_unix_socket().start().await;
    let signed: Answer = local.sign_answer("tenant", body("b")).await;
    assert_eq!(signed.status, 200, "{}", signed.text);
    assert_eq!(local.sign_answer("default", body("b")).await.status, 403);
    // A token that allows more decides; one that is not valid takes nothing away.
    let more = format!("{mine}[signer.client.more]\ntoken_file = \"more.token\"\n");
    let mut both = Daemon::builder().tables(TABLES).tables(&more).signer_on_unix_socket().prepare();
    let token = "a-token-of-forty-characters-0123456789-abc";
    std::fs::write(both.path("more.token"), token).unwrap();
    both.start_process().await;
    both.ready().await;
    let client = reqwest::Client::builder().unix_socket(both.address("signer").trim_start_matches("unix:")).build();
    let client = client.unwrap();
    for (keyset, token) in [("default", token), ("tenant", "not-a-token")] {
        let request = client.post(format!("http://localhost/v1/keysets/{keyset}/sign")).json(&body("b"));
        let answer = request.bearer_auth(token).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{keyset}");
    }
}

/// Most sign requests go around the router: whatever its layers would have checked or undone holds for them too.
#[tokio::test]
async fn a_sign_request_is_refused_for_foreign_hosts_and_origins_and_its_path_is_decoded() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let body = json!({ "claims": { "sub": "a", "aud": "b" } });
    for (name, value, slug) in [
        ("host", "attacker.example", "host-not-allowed"),
        ("host", "127.0.0.1.attacker.example", "host-not-allowed"),
        ("origin", "https://attacker.example", "foreign-origin"),
        ("sec-fetch-site", "cross-site", "foreign-origin"),
    ] {
        let answer = sign(&daemon, "default").header(name, value).json(&body).expect(403).await;
        assert_eq!(answer.slug(), slug, "{name}: {value}");
    }
    for host in ["localhost", "127.0.0.1", "[::1]:1"] {
        sign(&daemon, "default").header("host", host).json(&body).expect(200).await;
    }
    sign(&daemon, "%64efault").json(&body).expect(200).await;
    assert_eq!(sign(&daemon, "de%2Ffault").json(&body).expect(404).await.slug(), "unknown-keyset");
    let get = Call::get(&daemon, "signer", "/v1/keysets/default/sign");
    assert_eq!(get.expect(405).await.slug(), "method-not-allowed");
}

#[tokio::test]
async fn the_jwks_is_served_as_verifiers_and_caches_need_it() {
    let mut daemon = Daemon::builder().tables(TABLES).start().await;
    let description = Description::of(&daemon).await;
    let get = |path: &str| Call::get(&daemon, "public", path);
    // Once every key is standby nothing changes any more.
    eventually("every successor to stand by", PATIENCE, async || {
        let all = Call::get(&daemon, "admin", "/v1/keysets").expect(200).await.json();
        let keys = all["keysets"].as_array().unwrap().iter().flat_map(|k| k["keys"].as_array().unwrap());
        keys.clone().all(|key| key["state"] != "pending").then_some(())
    })
    .await;
    let main = get("/.well-known/jwks.json").expect(200).await;
    description.check("GET", "/.well-known/jwks.json", &main);
    assert_eq!(main.header("content-type"), "application/jwk-set+json");
    assert_eq!(main.header("cache-control"), "public, max-age=1, stale-if-error=1");
    assert_eq!(main.header("access-control-allow-origin"), "*");
    let etag = main.header("etag").to_owned();
    assert!(etag.starts_with('"') && etag.ends_with('"') && etag.len() > 10, "a strong tag: {etag}");
    let document = main.json();
    let keys = document["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 6, "two keysets with two successors each");
    for key in keys {
        let members: Vec<&str> = key.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(members, ["alg", "crv", "kid", "kty", "use", "x", "y"]);
        assert_eq!((&key["use"], &key["alg"], &key["kty"]), (&json!("sig"), &json!("ES256"), &json!("EC")));
    }
    let mut wanted = Vec::new();
    for state in ["active", "standby"] {
        for keyset in ["default", "strict"] {
            let shown = Call::get(&daemon, "admin", &format!("/v1/keysets/{keyset}")).expect(200).await.json();
            let mut of_state: Vec<_> =
                shown["keys"].as_array().unwrap().iter().filter(|k| k["state"] == state).cloned().collect();
            of_state.sort_by_key(|key| std::cmp::Reverse(key["serial"].as_u64()));
            wanted.extend(of_state.iter().map(|key| key["kid"].clone()));
        }
    }
    let kids: Vec<Value> = keys.iter().map(|key| key["kid"].clone()).collect();
    assert_eq!(kids, wanted, "active first, then standby, in the configuration's order, newest first");

    for path in ["/oauth/keys", "/keys.json", "/.well-known/jwks.json?x=1&y", "/oauth/keys?"] {
        assert_eq!(get(path).expect(200).await.text, main.text, "{path}");
    }
    let head = Call::new(&daemon, Method::HEAD, "public", "/.well-known/jwks.json").expect(200).await;
    assert!(head.text.is_empty());
    assert_eq!(head.header("content-length"), main.text.len().to_string());
    assert_eq!((head.header("etag"), head.header("cache-control")), (etag.as_str(), main.header("cache-control")));
    for known in [etag.clone(), format!("W/{etag}"), format!("\"other\", {etag}"), "*".to_owned()] {
        let unchanged = get("/.well-known/jwks.json").header("if-none-match", &known).expect(304).await;
        assert!(unchanged.text.is_empty(), "{known}");
        assert_eq!(unchanged.header("etag"), etag);
        assert!(unchanged.header("cache-control").contains("max-age"));
        description.check("GET", "/.well-known/jwks.json", &unchanged);
    }
    get("/.well-known/jwks.json").header("if-none-match", "\"other\"").expect(200).await;

    let tenant = get("/tenant-a/.well-known/jwks.json").expect(200).await.json();
    assert_eq!(tenant["keys"].as_array().unwrap().len(), 2);
    let members: Vec<&str> = tenant["keys"][0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(members, ["alg", "e", "kid", "kty", "n", "use"]);
    for path in [
        "/tenant-a",
        "/tenant-a/",
        "/tenant-a/oauth/keys",
        "/tenant-b/.well-known/jwks.json",
        "/.well-known/jwks.json/",
        "/",
    ] {
        assert_eq!(get(path).expect(404).await.slug(), "not-found", "{path}");
    }
    for method in [Method::POST, Method::PUT, Method::DELETE] {
        let answer = Call::new(&daemon, method, "public", "/.well-known/jwks.json").expect(405).await;
        assert_eq!(answer.header("allow"), "GET, HEAD");
    }

    for path in ["/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"] {
        let discovery = get(path).expect(200).await;
        description.check("GET", path, &discovery);
        assert_eq!(
            discovery.json(),
            json!({
                "issuer": "https://issuer.example.test",
                "jwks_uri": "https://issuer.example.test/.well-known/jwks.json",
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["ES256"],
            })
        );
    }
    get("/tenant-a/.well-known/openid-configuration").expect(404).await;
    get("/.well-known/oauth-authorization-server/tenant-a").expect(404).await;

    // A change is another document; a restart is none.
    daemon.restart().await;
    assert_eq!(Call::get(&daemon, "public", "/.well-known/jwks.json").expect(200).await.header("etag"), etag);
    Call::post(&daemon, "admin", "/v1/keysets/default/rotate")
        .json(&json!({ "allow_unpropagated": true }))
        .expect(200)
        .await;
    let changed =
        Call::get(&daemon, "public", "/.well-known/jwks.json").header("if-none-match", &etag).expect(200).await;
    assert_ne!(changed.header("etag"), etag);
}

#[tokio::test]
async fn a_keyset_whose_first_key_waits_says_when_it_signs() {
    let mut daemon = Daemon::builder().tables(TABLES).start().await;
    daemon.add_tables(
        r#"
[keyset.late]
issuer = "tenant"
algorithm = "ES256"
[keyset.late.rotation]
every = "1h"
propagation = "5s"
[keyset.late.tokens]
max_ttl = "1m"
clock_skew = "500ms"
"#,
    );
    daemon.restart().await;
    let body = json!({ "claims": { "sub": "a", "aud": "b" } });
    let waiting = sign(&daemon, "late").json(&body).expect(503).await;
    assert_eq!(waiting.slug(), "no-active-key");
    let seconds: u64 = waiting.header("retry-after").parse().unwrap();
    assert!((1..=5).contains(&seconds), "{seconds}");
    let shown = Call::get(&daemon, "signer", "/v1/keysets/late").expect(200).await.json();
    assert_eq!(shown["active_kid"], Value::Null);
    let unready = Call::get(&daemon, "ops", "/readyz/sign").expect(503).await;
    assert!(unready.json()["missing"].to_string().contains("late"), "{}", unready.text);
    Call::get(&daemon, "ops", "/readyz").expect(200).await;
    Call::get(&daemon, "ops", "/livez").expect(200).await;
    sign(&daemon, "default").json(&body).expect(200).await;
    eventually("the first key to sign", PATIENCE, async || {
        let answer = sign(&daemon, "late").json(&body).send().await;
        (answer.status == 200).then_some(())
    })
    .await;
    Call::get(&daemon, "ops", "/readyz/sign").expect(200).await;
}
