//! Invariant 11: whatever the log level, no secret and no token shows in logs, errors or metrics, and no core dump can
//! hold one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::process::Command;

use support::api::{Call, operator_token};
use support::{Daemon, tools};

const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
[keyset.default]
algorithm = "ES256"
[keyset.default.rotation]
every = "1h"
propagation = "2s"
[keyset.default.tokens]
max_ttl = "15m"
clock_skew = "500ms"
"#;

/// The private member of RFC 7515 A.3's key.
fn private_jwk() -> (String, String) {
    let vectors: Value = serde_json::from_str(include_str!("vectors/jwk.json")).unwrap();
    let jwk = vectors.pointer("/rfc7515/a3/jwk").unwrap();
    (jwk.to_string(), jwk["d"].as_str().unwrap().to_owned())
}

/// Everything an attacker would like to find, and every text the daemon gave away while it got to see them.
#[derive(Default)]
struct Session {
    secrets: Vec<(&'static str, String)>,
    said: Vec<String>,
}

impl Session {
    fn keep(&mut self, what: &'static str, secret: &str) {
        assert!(secret.len() >= 12, "{what} is too short to be searched for");
        self.secrets.push((what, secret.to_owned()));
    }

    fn assert_nothing_leaked(&self) {
        for (what, secret) in &self.secrets {
            for said in &self.said {
                assert!(!said.contains(secret.as_str()), "{what} in: {}", said.replace(secret.as_str(), "[HERE]"));
            }
        }
    }
}

#[tokio::test]
async fn no_secret_shows_in_a_session_logged_at_trace_level() {
    let mut daemon = Daemon::builder().tables(TABLES).signer_with_token().env("JWKSD_LOG", "trace").start().await;
    let mut it = Session::default();
    let operator = operator_token(&daemon);
    it.keep("the operator's token", &operator);
    let client = std::fs::read_to_string(daemon.path("client.token")).unwrap().trim().to_owned();
    it.keep("the client's token", &client);
    let seal = std::fs::read_to_string(daemon.path("seal.key")).unwrap();
    it.keep("the seal key", seal.trim().rsplit(':').next().unwrap());

    // Tokens.
    let sign = || Call::post(&daemon, "signer", "/v1/keysets/default/sign").bearer(&client);
    let claims = json!({ "claims": { "sub": "alice-the-subject", "aud": "b", "note": "a-claim-that-is-private" } });
    let signed = sign().json(&claims).expect(200).await.json();
    let token = signed["token"].as_str().unwrap().to_owned();
    it.keep("a token", &token);
    it.keep("a token's signature", token.rsplit('.').next().unwrap());
    it.keep("a token's payload", token.split('.').nth(1).unwrap());
    it.keep("a claim", "a-claim-that-is-private");

    // Keys from elsewhere, taken and refused.
    let pem = std::fs::read_to_string(tools::repository("tests/vectors/keys/p256-pkcs8.pem")).unwrap();
    let body: Vec<&str> = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    it.keep("a line of an imported PEM", body[0]);
    it.keep("the end of an imported PEM", &body.last().unwrap()[..12]);
    let (jwk, d) = private_jwk();
    it.keep("a private member", &d);
    let hex: String = URL_SAFE_NO_PAD.decode(&d).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    it.keep("a private member in hexadecimal", &hex);
    let import = |body: Value| Call::post(&daemon, "admin", "/v1/keysets/default/import").json(&body);
    import(json!({ "private_key": pem })).expect(200).await;
    it.said.push(import(json!({ "private_key": pem })).expect(409).await.text);
    import(json!({ "private_key": jwk })).expect(200).await;
    for refused in [
        json!({ "private_key": pem.replace("-----END", "----END") }),
        json!({ "private_key": jwk.replacen("\"x\"", "\"z\"", 1), "kid": "other" }),
        json!({ "private_key": pem, "alg": "RS256", "kid": "another" }),
        json!({ "private_key": format!("{pem}{pem}"), "kid": "twice" }),
        json!({ "public_key": jwk, "until": "2099-01-01T00:00:00Z", "kid": "third" }),
        json!({ "private_key": { "d": d } }),
        json!({ "private_kye": pem }),
    ] {
        let answer = import(refused).send().await;
        assert!(answer.status >= 400, "{}", answer.text);
        it.said.push(answer.text);
    }

    // Secrets where they do not belong.
    let bodies = [
        format!("{{\"claims\":\"{token}\"}}"),
        format!("{{\"claims\":{{\"sub\":\"a\",\"aud\":\"b\",\"password\":\"{operator}\"}}}}"),
        format!("{{\"claims\":{{\"sub\":\"a\",\"aud\":\"b\",\"exp\":\"{token}\"}}}}"),
        format!("{{\"claims\":{{\"sub\":\"a\",\"aud\":\"b\",\"jti\":\"{token}\"}}}}"),
        token.clone(),
        format!("{{\"claims\":{{\"sub\":\"a\",\"aud\":\"b\",\"nbf\":{jwk}}}}}"),
        json!({ "claims": { "sub": "a" }, "ttl": pem }).to_string(),
    ];
    for body in bodies {
        let answer = sign().text("application/json", body).send().await;
        assert!(answer.status >= 400, "{}", answer.text);
        it.said.push(answer.text);
    }
    let wrong = "a-guess-that-is-somebody-elses-password";
    it.keep("a wrong token", wrong);
    for listener in ["admin", "signer"] {
        let answer = Call::get(&daemon, listener, "/v1/keysets/default").bearer(wrong).expect(401).await;
        it.said.push(answer.text);
    }
    let call = Call::new(&daemon, Method::POST, "admin", "/v1/keysets/default/rotate");
    it.said.push(call.json(&json!({ "reason": 1, "token": operator })).expect(400).await.text);
    Call::post(&daemon, "admin", "/v1/keysets/default/rotate")
        .header("idempotency-key", "an-idempotency-key")
        .json(&json!({ "allow_unpropagated": true }))
        .expect(200)
        .await;

    // A change of the files while running, an invalid configuration with a secret in it, a restart.
    let config = daemon.path("jwksd.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let inline = "an-inline-secret-in-the-configuration";
    it.keep("an inline secret", inline);
    std::fs::write(&config, format!("{text}\n[admin.token.inline]\nrole = \"viewer\"\nsecret = \"{inline}\"\n"))
        .unwrap();
    it.said.push(Call::post(&daemon, "admin", "/v1/reload").expect(422).await.text);
    std::fs::write(&config, &text).unwrap();
    Call::post(&daemon, "admin", "/v1/reload").expect(200).await;

    // `verify` and `inspect` in processes of their own, at trace level as well.
    let verify = |arguments: Vec<String>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
        command.args(arguments).current_dir(daemon.path("")).env("JWKSD_LOG", "trace").env("RUST_LOG", "trace").output()
    };
    let jwks = daemon.url("public", "/.well-known/jwks.json");
    let output = verify(vec!["verify".into(), token.clone(), "--jwks".into(), jwks.clone()]).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    it.said.push(String::from_utf8(output.stderr).unwrap());
    let (head, _) = token.rsplit_once('.').unwrap();
    let output = verify(vec!["verify".into(), format!("{head}.AAAA"), "--jwks".into(), jwks]).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    it.said.push(String::from_utf8(output.stderr).unwrap());

    it.said.push(daemon.metrics().await.0);
    daemon.sigterm().await;
    let logs = daemon.logs();
    assert!(logs.iter().any(|line| line.contains("TRACE") || line.contains("DEBUG")), "it was talkative");
    it.said.extend(logs);
    it.assert_nothing_leaked();
}

#[tokio::test]
async fn no_secret_shows_when_the_log_is_text() {
    let mut daemon = Daemon::builder().tables(TABLES).start().await;
    daemon.sigterm().await;
    // The harness reads JSON, so this one runs without it, on the folder that it made.
    let config =
        std::fs::read_to_string(daemon.path("jwksd.toml")).unwrap().replace("format = \"json\"", "format = \"text\"");
    std::fs::write(daemon.path("jwksd.toml"), &config).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command
        .args(["serve", "--config", "jwksd.toml"])
        .current_dir(daemon.path(""))
        .env("JWKSD_LOG", "trace")
        .env("NO_COLOR", "1");
    let process = support::Process::start(command);
    process
        .log_line("the ops listener", |line| line.message().contains("listening") && line.message().contains("ops"))
        .await
        .unwrap();
    let lines = process.output.lines();
    let address = |listener: &str| {
        let line = lines.iter().find(|line| line.contains("listening") && line.contains(listener)).unwrap();
        let at = line.find("127.0.0.1:").unwrap();
        line[at..].chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect::<String>()
    };
    let mut it = Session::default();
    let operator = operator_token(&daemon);
    it.keep("the operator's token", &operator);
    let seal = std::fs::read_to_string(daemon.path("seal.key")).unwrap();
    it.keep("the seal key", seal.trim().rsplit(':').next().unwrap());
    let (jwk, d) = private_jwk();
    it.keep("a private member", &d);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{}/v1/keysets/default", address("admin"));
    let imported =
        http.post(format!("{url}/import")).bearer_auth(&operator).json(&json!({ "private_key": jwk })).send().await;
    assert_eq!(imported.unwrap().status(), 200);
    let url = format!("http://{}/v1/keysets/default/sign", address("signer"));
    let signed = http.post(url).json(&json!({ "claims": { "sub": "a", "aud": "b" } })).send().await.unwrap();
    let signed: Value = signed.json().await.unwrap();
    it.keep("a token", signed["token"].as_str().unwrap());
    it.keep("a token's signature", signed["token"].as_str().unwrap().rsplit('.').next().unwrap());
    let refused =
        http.get(format!("http://{}/v1/keysets", address("admin"))).bearer_auth("a-guess").send().await.unwrap();
    assert_eq!(refused.status(), 401);
    let mut process = process;
    rustix::process::kill_process(rustix::process::Pid::from_child(&process.child), rustix::process::Signal::TERM)
        .unwrap();
    process.output.ended().await.unwrap();
    assert!(process.child.wait().unwrap().success());
    it.said.extend(process.output.lines());
    assert!(it.said.iter().any(|line| line.contains("DEBUG") || line.contains("TRACE")), "it was talkative");
    it.assert_nothing_leaked();
}

#[tokio::test]
async fn the_process_leaves_no_core_dump() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    let values: Vec<&str> = core.split_whitespace().collect();
    assert_eq!(values[4..6], ["0", "0"], "{core}");
    // What is not dumpable belongs to root in /proc, whoever runs it; as root that shows in nothing but this flag.
    use std::os::unix::fs::MetadataExt;
    let owner = std::fs::metadata(format!("/proc/{}/environ", daemon.pid())).unwrap().uid();
    assert_eq!(owner, 0, "the process is dumpable");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_whose_memory_cannot_be_protected_handles_no_keys() {
    let denied = |what| {
        let mut daemon = Daemon::builder()
            .tables("[issuer.main]\nurl = \"https://issuer.example.test\"\n[keyset.main]\nalgorithm = \"EdDSA\"")
            .prepare();
        daemon.set_env("LD_PRELOAD", Some(support::tools::preloaded("secrets/deny.c").to_str().unwrap()));
        daemon.set_env("DENY", Some(what));
        daemon
    };
    let mut exposed = denied("prctl");
    let status = exposed.try_start().await.unwrap_err();
    assert_eq!(status.code(), Some(1));
    assert!(exposed.logs().iter().any(|line| line.contains("PR_SET_DUMPABLE")), "{:?}", exposed.logs());
    assert!(!exposed.path("seal.key").exists(), "no key was made");

    // Undumpable all the same: that is said, and enough.
    let mut undumpable = denied("setrlimit");
    undumpable.start_process().await;
    undumpable.log_line("the warning", |line| line.message() == "the process is not fully hardened").await;
    undumpable.ready().await;
}

/// The access lines so far.
fn access_lines(daemon: &Daemon) -> Vec<Value> {
    let lines = daemon.logs().into_iter().filter(|line| line.contains("jwksd::access"));
    lines.map(|line| serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

#[tokio::test]
async fn access_lines_tell_of_requests_and_repeat_nothing_that_callers_made_up() {
    const SECRETS: [&str; 5] =
        ["secret-in-a-header", "secret-in-the-path", "secret-in-the-query", "secret-in-the-body", "SECRETMETHOD"];
    let [header, path, query, body, method] = SECRETS;
    let log = "[telemetry.access_log]\nenabled = true\n";
    let daemon = Daemon::builder().tables(&format!("{TABLES}{log}")).signer_with_token().start().await;
    let client = std::fs::read_to_string(daemon.path("client.token")).unwrap();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let call = |method: Method, listener: &str, path: &str| {
        let call = Call::new(&daemon, method, listener, &format!("{path}?q={query}"));
        call.header("x-secret", header).header("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"))
    };
    let sign = |claims: Value| {
        let call = call(Method::POST, "signer", "/v1/keysets/default/sign").header("x-request-id", "my-id");
        call.bearer(client.trim()).json(&json!({ "claims": claims }))
    };
    let token = sign(json!({ "sub": body, "aud": "a" })).expect(200).await.json()["token"].as_str().unwrap().to_owned();
    sign(json!({ "sub": body })).expect(422).await;
    call(Method::POST, "signer", "/v1/keysets/default/sign").bearer(header).json(&json!({})).expect(401).await;
    let lost = format!("/v1/{path}/{token}");
    for listener in ["public", "signer", "admin"] {
        call(Method::GET, listener, &lost).expect(404).await;
    }
    call(Method::from_bytes(method.as_bytes()).unwrap(), "admin", "/v1/keysets/default").expect(405).await;
    Call::get(&daemon, "admin", "/v1/keysets/default").expect(200).await;
    call(Method::GET, "public", "/.well-known/jwks.json").expect(200).await;
    call(Method::GET, "ops", "/metrics").expect(200).await;
    call(Method::GET, "ops", "/readyz").expect(200).await;

    let last = |line: &support::LogLine| line.0["path"] == "/.well-known/jwks.json";
    daemon.log_line("the last request", last).await;
    let lines = access_lines(&daemon);
    let told: Vec<String> = lines
        .iter()
        .map(|line| {
            let text = |name: &str| line[name].as_str().unwrap_or("-").to_owned();
            format!("{} {} {} {} {}", text("listener"), text("method"), text("path"), line["status"], text("client"))
        })
        .collect();
    let sign = "signer POST /v1/keysets/{keyset}/sign";
    let expected = [
        format!("{sign} 200 app"),
        format!("{sign} 422 app"),
        format!("{sign} 401 -"),
        "public GET - 404 -".to_owned(),
        "signer GET - 404 -".to_owned(),
        "admin GET - 404 operator".to_owned(),
        "admin _OTHER /v1/keysets/{keyset} 405 -".to_owned(),
        "admin GET /v1/keysets/{keyset} 200 operator".to_owned(),
        "public GET /.well-known/jwks.json 200 -".to_owned(),
    ];
    assert_eq!(told[..told.len().min(6)], expected[..6]);
    assert_eq!(told[told.len() - 2..], expected[7..]);
    assert!(told[6].starts_with("admin _OTHER /v1/keysets/{keyset} 405"), "{}", told[6]);
    let first = &lines[0];
    assert_eq!(
        (&first["request_id"], &first["trace_id"], &first["keyset"]),
        (&json!("my-id"), &json!(trace), &json!("default"))
    );
    assert!(first["duration_ms"].as_f64().is_some_and(|took| took > 0.0), "{first}");
    assert!(first["bytes"].as_u64().is_some_and(|bytes| bytes > 100), "{first}");
    assert!(first["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{first}");
    assert!(lines.iter().all(|line| line["level"] == "INFO" && line.get("span").is_none()), "{lines:?}");
    for line in &lines {
        for secret in SECRETS.into_iter().chain([token.as_str(), client.trim()]) {
            assert!(!line.to_string().contains(secret), "{secret} in {line}");
        }
    }

    // Only what fails; then nothing. Both without a restart.
    let exchange = async |log: &str| {
        let old = std::fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
        let (rest, _) = old.split_once("[telemetry.access_log]").unwrap();
        std::fs::write(daemon.path("jwksd.toml"), format!("{rest}[telemetry.access_log]\n{log}")).unwrap();
        Call::post(&daemon, "admin", "/v1/reload").json(&json!({})).expect(200).await;
        access_lines(&daemon).len()
    };
    let before = exchange("enabled = true\nlisteners = [\"public\"]\nsample_ratio = 0\n").await;
    Call::get(&daemon, "admin", "/v1/keysets").expect(200).await;
    call(Method::GET, "public", "/.well-known/jwks.json").expect(200).await;
    call(Method::GET, "public", "/no").expect(404).await;
    support::eventually("the failure", support::PATIENCE, async || {
        (access_lines(&daemon).len() > before).then_some(())
    })
    .await;
    let lines = access_lines(&daemon);
    assert_eq!((lines.len(), &lines[before]["status"]), (before + 1, &json!(404)));
    let before = exchange("enabled = false\n").await;
    call(Method::GET, "public", "/no").expect(404).await;
    Call::post(&daemon, "admin", "/v1/reload").json(&json!({})).expect(200).await;
    assert_eq!(access_lines(&daemon).len(), before);
}
