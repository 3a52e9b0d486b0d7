//! Each command of the real binary, as a person and as a script use it: text, `-o json`, exit codes (DESIGN.md §9).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod support;

use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use tokio::process::Command;

use support::{Daemon, PATIENCE, eventually, tools};

const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
[keyset.default]
issuer = "main"
algorithm = "ES256"
[keyset.default.rotation]
every = "1h"
propagation = "2s"
[keyset.default.tokens]
max_ttl = "15m"
clock_skew = "500ms"
"#;

const SECOND: &str = r#"
[issuer.other]
url = "https://issuer.example.test/other"
max_age = "1s"
[keyset.second]
issuer = "other"
algorithm = "EdDSA"
[keyset.second.rotation]
every = "1h"
propagation = "2s"
[keyset.second.tokens]
max_ttl = "15m"
clock_skew = "500ms"
"#;

#[derive(Debug)]
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Runs the binary in `folder`, without a terminal.
async fn run(folder: &Path, environment: &[(&str, String)], arguments: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.args(arguments).current_dir(folder).env_clear().envs(environment.iter().map(|(k, v)| (*k, v)));
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(PATIENCE, output).await.expect("it ends").expect("it runs");
    Ran {
        code: output.status.code().expect("it was not killed"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A command for a running daemon, which it finds by the configuration.
async fn ask(daemon: &Daemon, arguments: &[&str]) -> Ran {
    let mut environment = vec![("JWKSD_CONFIG", "jwksd.toml".to_owned())];
    for (variable, listener) in [
        ("JWKSD__PUBLIC__LISTEN", "public"),
        ("JWKSD__SIGNER__LISTEN", "signer"),
        ("JWKSD__ADMIN__LISTEN", "admin"),
        ("JWKSD__OPS__LISTEN", "ops"),
    ] {
        environment.push((variable, daemon.address(listener).to_owned()));
    }
    run(&daemon.path(""), &environment, arguments).await
}

async fn done(daemon: &Daemon, arguments: &[&str]) -> Ran {
    let ran = ask(daemon, arguments).await;
    assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
    ran
}

async fn fails(daemon: &Daemon, code: i32, arguments: &[&str]) -> String {
    let ran = ask(daemon, arguments).await;
    assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
    assert!(ran.err.starts_with("jwksd: ") || code == 2, "{ran:?}");
    assert!(!ran.err.contains("panicked"), "{ran:?}");
    ran.err
}

/// An HTTP server with these documents; its address.
async fn serve_files<const N: usize>(files: [(&'static str, String); N]) -> String {
    let file = |(path, text): (&'static str, String)| (path, axum::routing::get(async move || text.clone()));
    let router = files.map(file).into_iter().fold(axum::Router::new(), |router, (path, get)| router.route(path, get));
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(socket, router).await.unwrap() });
    format!("http://{address}")
}

async fn stand_by(daemon: &Daemon) {
    eventually("two standby keys", PATIENCE, async || {
        let shown = done(daemon, &["status", "default", "-o", "json"]).await.json();
        (states(&shown).iter().filter(|state| *state == "standby").count() == 2).then_some(())
    })
    .await;
}

fn states(keyset: &Value) -> Vec<String> {
    keyset["keys"].as_array().unwrap().iter().map(|key| key["state"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn operators_work_with_the_daemon_from_the_command_line() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let refused = fails(&daemon, 3, &["rotate"]).await;
    assert!(refused.contains("no-standby") && refused.contains("409"), "{refused}");
    // --wait waits for the standby key and then rotates.
    let waited = done(&daemon, &["rotate", "--wait", "--reason", "from the shell"]).await;
    assert!(waited.out.starts_with("rotate  generation ") && waited.out.contains(" → active"), "{waited:?}");
    stand_by(&daemon).await;

    let status = done(&daemon, &["status"]).await.out;
    let lines: Vec<&str> = status.lines().collect();
    assert!(lines[0].starts_with("default  ES256  https://issuer.example.test  generation "), "{status}");
    assert!(lines[0].ends_with("  HEALTHY"), "{status}");
    let heads: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!(heads, ["#", "KID", "STATE", "SINCE", "NEXT"], "{status}");
    let column = |line: &str, at: usize| line.split_whitespace().nth(at).unwrap().to_owned();
    let drawn: Vec<String> = lines[2..].iter().map(|line| column(line, 2)).collect();
    assert_eq!(drawn, ["active", "standby", "standby", "retiring"], "{status}");
    let place = |line: &str, word: &str| line.find(word).map(|at| line[..at].chars().count());
    assert_eq!(place(lines[2], "active"), place(lines[1], "STATE"), "columns are aligned: {status}");
    assert!(lines[3].ends_with("active at the next rotation"), "{status}");
    assert!(!status.contains('\u{1b}'), "no colours without a terminal");
    let shown = done(&daemon, &["-o", "json", "status", "default"]).await.json();
    assert_eq!(done(&daemon, &["-o", "json", "status"]).await.json()["keysets"][0]["name"], "default");
    let kid = shown["keys"][0]["kid"].as_str().unwrap().to_owned();
    assert_eq!(column(lines[2], 1), format!("{}…{}", &kid[..4], &kid[kid.len() - 2..]));

    let trial = done(&daemon, &["rotate", "--dry-run"]).await.out;
    assert!(trial.contains("(dry run, nothing changed)"), "{trial}");
    assert_eq!(done(&daemon, &["rotate", "--dry-run", "-o", "json"]).await.json()["dry_run"], true);
    assert_eq!(done(&daemon, &["status", "default", "-o", "json"]).await.json()["active_kid"], kid.as_str());

    // What cannot be undone wants --yes where nobody can be asked.
    for command in [
        vec!["rollback"],
        vec!["compromise"],
        vec!["drain"],
        vec!["revoke", &kid],
        vec!["rotate", "--allow-unpropagated"],
    ] {
        let message = fails(&daemon, 2, &command).await;
        assert!(message.contains("--yes"), "{message}");
        let mut trial = command.clone();
        trial.extend(["--dry-run", "-o", "json"]);
        assert_eq!(done(&daemon, &trial).await.json()["dry_run"], true);
    }
    assert_eq!(done(&daemon, &["status", "default", "-o", "json"]).await.json()["active_kid"], kid.as_str());

    // A thumbprint may begin with a hyphen.
    let unknown = fails(&daemon, 2, &["revoke", "-Z_DGSn5oW1xPYg1ZzLz4jC3bXo0w4OqG0jv5bnhH-A", "--dry-run"]).await;
    assert!(unknown.contains("no key has the kid, prefix or serial `-Z_DG"), "{unknown}");

    let trial = done(&daemon, &["hold", "--until", "2h", "--dry-run"]).await.out;
    assert!(trial.contains("would be held until 20") && trial.contains("nothing changed"), "{trial}");
    assert_eq!(done(&daemon, &["hold", "--dry-run", "-o", "json"]).await.json()["dry_run"], true);
    assert_eq!(done(&daemon, &["status", "default", "-o", "json"]).await.json()["hold"], Value::Null);
    for never_asks in
        [vec!["hold", "--yes"], vec!["resume", "--yes"], vec!["import", "--jwks", "http://127.0.0.1:1", "-y"]]
    {
        fails(&daemon, 2, &never_asks).await;
    }
    let held = done(&daemon, &["hold", "--until", "2h", "--reason", "a freeze", "--wait"]).await.out;
    assert!(held.starts_with("default is held until 20"), "{held}");
    let again = done(&daemon, &["hold", "--until", "2099-01-01T00:00:00Z", "-o", "json"]).await.json();
    assert_eq!(again["until"], "2099-01-01T00:00:00Z");
    assert!(done(&daemon, &["status"]).await.out.contains("held by operator until 2099"));
    let trial = done(&daemon, &["resume", "--dry-run"]).await.out;
    assert!(trial.contains("would not be held") && trial.contains("nothing changed"), "{trial}");
    assert!(done(&daemon, &["status"]).await.out.contains("held by operator until 2099"));
    assert_eq!(done(&daemon, &["resume"]).await.out, "default is not held\n");
    assert_eq!(done(&daemon, &["resume", "-o", "json"]).await.json(), json!({ "keyset": "default", "hold": null }));
    fails(&daemon, 2, &["hold", "--until", "tomorrow"]).await;

    let clock = done(&daemon, &["clock", "show"]).await.out;
    assert!(clock.starts_with("20") && clock.ends_with("trusted\n"), "{clock}");
    assert_eq!(done(&daemon, &["clock", "show", "-o", "json"]).await.json()["frozen"], false);
    let accepted = done(&daemon, &["clock", "accept", "--reason", "a drill"]).await.out;
    assert_eq!(accepted, "the clock is trusted: there is nothing to accept\n");

    let back = done(&daemon, &["rollback", "--yes", "--reason", "too early"]).await.out;
    assert!(back.contains("retiring → active") && back.contains("a hold is set"), "{back}");
    done(&daemon, &["resume"]).await;

    // Keys by unique prefix, by serial, by kid.
    let standby = shown["keys"][1].clone();
    let prefix = format!("kid:{}", &standby["kid"].as_str().unwrap()[..12]);
    let by_prefix = done(&daemon, &["revoke", &prefix, "--dry-run", "-o", "json"]).await.json();
    assert_eq!(by_prefix["changes"][0]["kid"], standby["kid"]);
    let serial = standby["serial"].to_string();
    let by_serial = done(&daemon, &["revoke", "default", &serial, "--yes", "-o", "json"]).await.json();
    assert_eq!(
        (&by_serial["changes"][0]["kid"], by_serial["changes"][0]["to"].as_str()),
        (&standby["kid"], Some("revoked"))
    );
    assert!(fails(&daemon, 2, &["revoke", "999", "--yes"]).await.contains("no key has"));
    fails(&daemon, 2, &["revoke", "", "--yes"]).await;
    let history = done(&daemon, &["status", "--history"]).await.out;
    assert!(history.contains("revoked by operator"), "{history}");
    fails(&daemon, 3, &["status", "nobody"]).await;
    fails(&daemon, 3, &["rotate", "nobody"]).await;

    let audit = done(&daemon, &["audit"]).await.out;
    assert!(audit.contains("from the shell") && audit.contains("too early"), "{audit}");
    let all = done(&daemon, &["audit", "default", "-o", "json"]).await.json();
    assert!(all["items"].as_array().unwrap().len() > 10, "{all}");
    let after = done(&daemon, &["audit", "--after", all["next"].as_str().unwrap(), "-o", "json"]).await.json();
    assert_eq!(after["items"], json!([]), "{after}");
    fails(&daemon, 3, &["audit", "--after", "yesterday"]).await;

    let key = tools::repository("tests/vectors/keys/p256-pkcs8.pem");
    let joined =
        done(&daemon, &["import", "--key", key.to_str().unwrap(), "--kid", "old", "--max-token-life", "1h"]).await;
    assert!(joined.out.contains("new → standby"), "{joined:?}");
    assert!(!format!("{joined:?}").contains("PRIVATE KEY"));
    let public = tools::repository("tests/vectors/keys/p384-spki.pem");
    done(&daemon, &["import", "--public", public.to_str().unwrap(), "--until", "1h", "-o", "json"]).await;
    fails(&daemon, 3, &["import", "--key", key.to_str().unwrap(), "--kid", "old"]).await;
    fails(&daemon, 2, &["import"]).await;
    fails(&daemon, 2, &["import", "--key", "no-such-file.pem"]).await;

    assert!(done(&daemon, &["compromise", "--yes"]).await.out.contains("every key is revoked"));
    assert_eq!(done(&daemon, &["drain", "--yes", "-o", "json"]).await.json()["action"], "drain");
    assert_eq!(done(&daemon, &["drain", "--undo", "--dry-run", "-o", "json"]).await.json()["action"], "undrain");
    fails(&daemon, 3, &["rotate"]).await;
}

#[tokio::test]
async fn tokens_are_signed_verified_inspected_and_key_sets_compared() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let signed =
        done(&daemon, &["sign", "--sub", "alice", "--aud", "b", "--ttl", "1m", "--claim", "n=1", "--claim", "s=x"])
            .await;
    let token = signed.out.trim().to_owned();
    assert_eq!(token.split('.').count(), 3);
    let answer =
        done(&daemon, &["sign", "default", "--sub", "a", "--aud", "b", "--aud", "c", "-o", "json"]).await.json();
    assert_eq!(answer["expires_in"], 300);
    fails(&daemon, 3, &["sign", "--aud", "b"]).await;
    fails(&daemon, 3, &["sign", "--sub", "a", "--aud", "b", "--ttl", "1d"]).await;
    fails(&daemon, 2, &["sign", "--sub", "a", "--claim", "sub=b"]).await;
    fails(&daemon, 2, &["sign", "--claim", "novalue"]).await;

    let verified = done(&daemon, &["verify", &token]).await.out;
    assert!(verified.starts_with("valid: signed by https://issuer.example.test with the key "), "{verified}");
    let verified = done(&daemon, &["verify", &token, "--aud", "b", "-o", "json"]).await.json();
    assert_eq!(
        (&verified["valid"], &verified["claims"]["n"], &verified["claims"]["s"]),
        (&json!(true), &json!(1), &json!("x"))
    );
    let jwks = daemon.url("public", "/.well-known/jwks.json");
    done(&daemon, &["verify", &token, "--jwks", &jwks]).await;
    // Whose keys these are is said by whoever serves them, never by the token.
    let keys = daemon.get("public", "/.well-known/jwks.json").await.text;
    let discovery = json!({ "issuer": "https://somebody.else.test" }).to_string();
    let elsewhere = serve_files([
        ("/.well-known/jwks.json", keys.clone()),
        ("/.well-known/openid-configuration", discovery),
        ("/alone/.well-known/jwks.json", keys.clone()),
        ("/oauth/keys", keys),
    ])
    .await;
    let foreign = format!("{elsewhere}/.well-known/jwks.json");
    let message = fails(&daemon, 1, &["verify", &token, "--jwks", &foreign]).await;
    assert!(message.contains("the token is not valid"), "{message}");
    for path in ["/oauth/keys", "/alone/.well-known/jwks.json"] {
        let unknown = format!("{elsewhere}{path}");
        let message = fails(&daemon, 2, &["verify", &token, "--jwks", &unknown]).await;
        assert!(message.contains("--iss"), "{message}");
        done(&daemon, &["verify", &token, "--jwks", &unknown, "--iss", "https://issuer.example.test"]).await;
    }
    let parts: Vec<&str> = token.split('.').collect();
    let other = done(&daemon, &["sign", "--sub", "mallory", "--aud", "b"]).await.out.trim().to_owned();
    let forged = format!("{}.{}.{}", parts[0], other.split('.').nth(1).unwrap(), parts[2]);
    let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", parts[1]);
    for bad in [forged.as_str(), unsigned.as_str(), "not-a-token", "a.b.c", ""] {
        let message = fails(&daemon, 1, &["verify", bad]).await;
        assert!(message.contains("the token is not valid"), "{message}");
    }
    fails(&daemon, 1, &["verify", &token, "--aud", "somebody-else"]).await;
    fails(&daemon, 1, &["verify", &token, "--iss", "https://other.example"]).await;
    fails(&daemon, 2, &["verify", &token, "--jwks", "file:///etc/passwd"]).await;
    fails(&daemon, 4, &["verify", &token, "--jwks", "http://127.0.0.1:1/jwks.json"]).await;

    let inspected = done(&daemon, &["inspect", &token]).await.out;
    assert!(inspected.contains("Nothing was verified") && inspected.contains("\"alice\""), "{inspected}");
    let weak = done(&daemon, &["inspect", &unsigned, "-o", "json"]).await.json();
    assert_eq!(weak["verified"], false);
    assert!(!weak["weaknesses"].as_array().unwrap().is_empty(), "{weak}");
    fails(&daemon, 1, &["inspect", "not-a-token"]).await;

    assert!(done(&daemon, &["diff", &jwks]).await.out.starts_with("equal: 3 keys"));
    let other = Daemon::builder().tables(TABLES).start().await;
    let foreign = other.url("public", "/.well-known/jwks.json");
    let different = ask(&daemon, &["diff", &foreign, "-o", "json"]).await;
    assert_eq!((different.code, &different.json()["equal"]), (1, &json!(false)), "{different:?}");
    assert_eq!(different.json()["differences"].as_array().unwrap().len(), 6);
    let text = ask(&daemon, &["diff", &foreign]).await.out;
    assert!(text.contains("missing") && text.contains("foreign"), "{text}");
    fails(&daemon, 1, &["diff", &daemon.url("public", "/nothing")]).await;

    assert_eq!(done(&daemon, &["healthcheck"]).await.out, "ready\n");
    assert_eq!(done(&daemon, &["healthcheck", "--sign", "-o", "json"]).await.json(), json!({ "ready": true }));
    assert_eq!(done(&daemon, &["healthcheck", "--live"]).await.out, "alive\n");
    fails(&daemon, 4, &["healthcheck", "--server", "127.0.0.1:1"]).await;
    // In a container that has no authorities' certificates, which plain HTTP does not need.
    let bare = ["SSL_CERT_FILE", "SSL_CERT_DIR"].map(|name| (name, "/nonexistent".to_owned()));
    let address = daemon.address("ops").to_owned();
    let healthy = run(&daemon.path(""), &bare, &["healthcheck", "--live", "--server", &address]).await;
    assert_eq!(healthy.code, 0, "{healthy:?}");
    fails(&daemon, 4, &["status", "--server", "127.0.0.1:1"]).await;
    let wrong = daemon.path("wrong.token");
    std::fs::write(&wrong, "a-token-that-nobody-knows-0123456789").unwrap();
    assert!(fails(&daemon, 3, &["status", "--token-file", wrong.to_str().unwrap()]).await.contains("401"));
    fails(&daemon, 2, &["status", "--token-file", "no-such-file"]).await;
}

#[tokio::test]
async fn with_several_keysets_a_command_says_which() {
    let daemon = Daemon::builder().tables(TABLES).tables(SECOND).start().await;
    for command in [vec!["rotate"], vec!["hold"], vec!["sign", "--sub", "a", "--aud", "b"]] {
        let message = fails(&daemon, 2, &command).await;
        assert!(message.contains("default, second"), "{message}");
    }
    assert!(
        fails(&daemon, 2, &["diff", &daemon.url("public", "/.well-known/jwks.json")]).await.contains("main, other")
    );
    let both = done(&daemon, &["status"]).await.out;
    assert!(both.contains("default  ES256") && both.contains("second  EdDSA"), "{both}");
    let one = done(&daemon, &["status", "second"]).await.out;
    assert!(!one.contains("default"), "{one}");
    let token = done(&daemon, &["sign", "second", "--sub", "a", "--aud", "b"]).await.out;
    assert!(done(&daemon, &["verify", token.trim()]).await.out.contains("https://issuer.example.test/other"));
}

/// A configuration in a folder of its own.
fn folder(tables: &str) -> tempfile::TempDir {
    let folder = tempfile::TempDir::new().unwrap();
    let listeners = "[public]\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"127.0.0.1:0\"\n\
        [admin.token.operator]\nrole = \"operator\"\nfile = \"admin.token\"\n\
        [store]\nkind = \"file\"\npath = \"keyrings\"\n[seal]\nkind = \"file\"\npath = \"seal.key\"\n";
    std::fs::write(folder.path().join("jwksd.toml"), format!("{listeners}{tables}")).unwrap();
    folder
}

async fn alone(folder: &tempfile::TempDir, arguments: &[&str]) -> Ran {
    run(folder.path(), &[("JWKSD_CONFIG", "jwksd.toml".to_owned())], arguments).await
}

#[tokio::test]
async fn check_prints_the_timing_and_refuses_with_all_errors_at_once() {
    let good = folder(TABLES);
    let checked = alone(&good, &["check"]).await;
    assert_eq!(checked.code, 0, "{checked:?}");
    assert!(checked.out.starts_with("jwksd.toml is valid\n") && checked.out.contains("warning: "), "{checked:?}");
    let derived = alone(&good, &["check", "-o", "json"]).await.json();
    assert_eq!(derived["valid"], true);
    assert_eq!(derived["keysets"][0]["overlap_seconds"], 901);
    assert_eq!((&derived["role"], &derived["store"]), (&json!("all"), &json!("file")));
    let made: Vec<_> = std::fs::read_dir(good.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(made, ["jwksd.toml"], "it makes nothing");

    let timing = folder(&TABLES.replace("propagation = \"2s\"", "propagation = \"1s\""));
    let refused = alone(&timing, &["check"]).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.err.contains("keyset.default.rotation.propagation"), "{refused:?}");
    let broken = TABLES
        .replace("every = \"1h\"", "evry = \"1h\"\nevery = 5")
        .replace("propagation = \"2s\"", "propagation = \"1s\"");
    let broken = folder(&broken);
    let refused = alone(&broken, &["check"]).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    for part in ["keyset.default.rotation.evry", "keyset.default.rotation.every"] {
        assert!(refused.err.contains(part), "{part}: {refused:?}");
    }
    for (folder, least) in [(&timing, 1), (&broken, 2)] {
        let json = alone(folder, &["check", "-o", "json"]).await;
        assert_eq!((json.code, &json.json()["valid"]), (2, &json!(false)), "{json:?}");
        assert!(json.json()["errors"].as_array().unwrap().len() >= least, "{json:?}");
    }
    let syntax = folder("[keyset");
    let refused = alone(&syntax, &["check"]).await;
    assert!(refused.code == 2 && refused.err.contains("TOML"), "{refused:?}");
    let missing = alone(&syntax, &["check", "--config", "nowhere.toml"]).await;
    assert_eq!(missing.code, 2, "{missing:?}");
}

#[tokio::test]
async fn check_says_what_part_a_replica_takes() {
    let folder = folder(TABLES);
    let path = folder.path().join("jwksd.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let shared = "kind = \"postgres\"\nurl_env = \"DATABASE_URL\"\npublish_lag = \"1s\"\nstaleness_limit = \"9s\"\n";
    let text = text.replace("kind = \"file\"\npath = \"keyrings\"\n", shared);
    let text = text.replace("propagation = \"2s\"", "propagation = \"9s\"");
    std::fs::write(&path, format!("role = \"manager\"\n{text}")).unwrap();
    let manager = alone(&folder, &["check"]).await;
    assert_eq!(manager.code, 0, "{manager:?}");
    for part in
        ["\nrole manager, store postgres at variable DATABASE_URL, schema jwksd\n", "verifier + publish lag + clock"]
    {
        assert!(manager.out.contains(part), "{part}: {manager:?}");
    }
    let derived = alone(&folder, &["check", "-o", "json"]).await.json();
    assert_eq!((&derived["role"], &derived["store"]), (&json!("manager"), &json!("postgres")));
    assert_eq!(derived["keysets"][0]["overlap_seconds"], 910, "the staleness limit counts");
    let variables = [("JWKSD_CONFIG", "jwksd.toml".to_owned()), ("JWKSD__ROLE", "signer".to_owned())];
    let signer = run(folder.path(), &variables, &["check"]).await;
    assert_eq!(signer.code, 0, "{signer:?}");
    assert!(signer.out.contains("\nkeysets and their timing are those that managers stored\n"), "{signer:?}");
    assert!(signer.out.contains("keyset: has no effect with role = \"signer\""), "{signer:?}");
}

#[tokio::test]
async fn init_is_idempotent_and_reseal_moves_to_a_new_seal() {
    let folder = folder(TABLES);
    let early = alone(&folder, &["reseal"]).await;
    assert_eq!(early.code, 1, "{early:?}");
    let serve = alone(&folder, &["serve"]).await;
    assert!(serve.code == 1 && serve.err.contains("jwksd init"), "{serve:?}");
    let made = alone(&folder, &["init"]).await;
    assert_eq!(made.code, 0, "{made:?}");
    for what in ["seal.key", "keyrings", "admin.token"] {
        assert!(made.out.contains(what), "{made:?}");
    }
    let seal = std::fs::read(folder.path().join("seal.key")).unwrap();
    let token = std::fs::read(folder.path().join("admin.token")).unwrap();
    assert_eq!(alone(&folder, &["init"]).await.out, "already initialised\n");
    assert_eq!(alone(&folder, &["init", "-o", "json"]).await.json(), json!({ "made": [], "already": true }));
    assert_eq!(std::fs::read(folder.path().join("seal.key")).unwrap(), seal);
    assert_eq!(std::fs::read(folder.path().join("admin.token")).unwrap(), token);

    // An empty store beside a seal key was lost, unless somebody says that the key was there first.
    std::fs::remove_dir_all(folder.path().join("keyrings")).unwrap();
    let lost = alone(&folder, &["init"]).await;
    assert!(lost.code == 1 && lost.err.contains("the store was lost"), "{lost:?}");
    let made = alone(&folder, &["init", "--existing-seal"]).await;
    assert!(made.code == 0 && made.out.contains("keyrings") && !made.out.contains("seal.key"), "{made:?}");
    assert_eq!(std::fs::read(folder.path().join("seal.key")).unwrap(), seal);

    // A keyset with keys, resealed under a new seal key, is the same keyset without the former one.
    let mut daemon = Daemon::builder().tables(TABLES).start().await;
    let kid = daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await.kid;
    let busy = ask(&daemon, &["reseal"]).await;
    assert_eq!(busy.code, 1, "the daemon holds the store: {busy:?}");
    daemon.sigterm().await;
    std::fs::rename(daemon.path("seal.key"), daemon.path("former.key")).unwrap();
    std::fs::rename(folder.path().join("seal.key"), daemon.path("seal.key")).unwrap();
    let config = std::fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    let previous = format!("{config}\n[seal.previous.former]\nkind = \"file\"\npath = \"former.key\"\n");
    std::fs::write(daemon.path("jwksd.toml"), previous).unwrap();
    let resealed = ask(&daemon, &["reseal", "-o", "json"]).await;
    assert_eq!(resealed.code, 0, "{resealed:?}");
    assert_eq!((&resealed.json()["keyrings"], &resealed.json()["private_keys"]), (&json!(1), &json!(3)));
    std::fs::remove_file(daemon.path("former.key")).unwrap();
    daemon.restart().await;
    assert_eq!(daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await.kid, kid);
}

#[tokio::test]
async fn commands_without_a_daemon_and_wrong_usage() {
    let folder = folder(TABLES);
    for shell in ["bash", "zsh", "fish"] {
        let script = alone(&folder, &["completions", shell]).await;
        assert!(script.code == 0 && script.out.contains("jwksd") && script.out.contains("rotate"), "{shell}");
    }
    let verifiers = alone(&folder, &["verifiers"]).await.out;
    assert!(verifiers.contains("envoy") && verifiers.contains("vault"), "{verifiers}");
    let listed = alone(&folder, &["verifiers", "-o", "json"]).await.json();
    assert!(listed["verifiers"].as_array().unwrap().iter().any(|one| one["name"] == "aws-api-gateway"), "{listed}");
    assert!(alone(&folder, &["--version"]).await.out.starts_with("jwksd "));
    assert!(alone(&folder, &["--help"]).await.out.contains("healthcheck"));
    for wrong in [
        vec![],
        vec!["frobnicate"],
        vec!["status", "--nope"],
        vec!["revoke"],
        vec!["-o", "yaml", "status"],
        vec!["completions", "tcl"],
    ] {
        let ran = alone(&folder, &wrong).await;
        assert_eq!(ran.code, 2, "{wrong:?}: {ran:?}");
    }
    let unreachable = alone(&folder, &["status", "--server", "127.0.0.1:1", "--token-file", "jwksd.toml"]).await;
    assert!(unreachable.code == 2 || unreachable.code == 4, "{unreachable:?}");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_a_command_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let token = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.";
    for arguments in [&["check"] as &[&str], &["verifiers"], &["inspect", token], &["completions", "bash"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
        command.args(arguments).current_dir(folder.path()).env_clear().stdin(Stdio::null()).stdout(writer);
        let child = command.stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").unwrap();
        assert_eq!(output.status.code(), Some(141), "{arguments:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

#[tokio::test]
async fn a_configuration_that_cannot_be_read_says_why() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("latin.toml"), b"# \xe4").unwrap();
    for (name, why) in [(".", "regular file"), ("latin.toml", "UTF-8")] {
        for output in ["text", "json"] {
            let ran = run(folder.path(), &[], &["check", "--config", name, "-o", output]).await;
            assert_eq!(ran.code, 2, "{ran:?}");
            assert!(ran.err.contains(why) && (output == "text" || ran.out.contains(why)), "{ran:?}");
        }
    }
}

#[tokio::test]
async fn variables_that_are_empty_count_as_unset_and_the_server_is_that_of_operators() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    let ran =
        run(Path::new("/"), &[("JWKSD_CONFIG", String::new()), ("JWKSD_SERVER", String::new())], &["check"]).await;
    assert_eq!(ran.code, 0, "{ran:?}");
    let environment = [
        ("JWKSD_CONFIG", "jwksd.toml".to_owned()),
        ("JWKSD_SERVER", daemon.address("admin").to_owned()),
        ("JWKSD__PUBLIC__LISTEN", daemon.address("public").to_owned()),
        ("JWKSD__SIGNER__LISTEN", daemon.address("signer").to_owned()),
        ("JWKSD__OPS__LISTEN", daemon.address("ops").to_owned()),
    ];
    for arguments in [&["status"] as &[&str], &["sign", "--sub", "a", "--aud", "b"], &["healthcheck", "--sign"]] {
        let ran = run(&daemon.path(""), &environment, arguments).await;
        assert_eq!(ran.code, 0, "{arguments:?}: {ran:?}");
    }
}

#[tokio::test]
async fn a_broken_configuration_does_not_keep_operators_from_a_daemon_that_runs() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    std::fs::write(daemon.path("jwksd.toml"), "[keyset.default\n").unwrap();
    let refused = fails(&daemon, 2, &["status"]).await;
    assert!(refused.contains("not valid TOML") && refused.contains("--server ADDRESS and --token-file"), "{refused}");
    let (server, token) = (daemon.address("admin"), daemon.path("admin.token"));
    let named = ["--server", server, "--token-file", token.to_str().unwrap()];
    done(&daemon, &[&["status"], &named[..]].concat()).await;
    done(&daemon, &[&["rotate", "--wait"], &named[..]].concat()).await;
}

#[tokio::test]
async fn what_others_wrote_cannot_speak_to_the_terminal() {
    let daemon = Daemon::builder().tables(TABLES).start().await;
    done(&daemon, &["hold", "--reason", "one\ntwo"]).await;
    for command in ["status", "audit"] {
        let shown = done(&daemon, &[command]).await.out;
        assert!(shown.contains("one\\ntwo"), "{shown}");
    }
    assert!(done(&daemon, &["status"]).await.out.contains("held by operator until resumed: one"));
    // {"alg":"none"} and {"sub":"\u009b2J\u202e"}
    let token = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJcdTAwOWIySlx1MDAxYlx1MjAyZSJ9.";
    for output in ["text", "json"] {
        let ran = done(&daemon, &["inspect", token, "-o", output]).await.out;
        assert!(ran.contains("\\u009b2J\\u001b\\u202e"), "{ran}");
        assert!(!ran.contains(|c: char| c != '\n' && (c.is_control() || c == '\u{202e}')), "{ran:?}");
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_acceptable_is_not_called_a_daemon_that_does_not_run() {
    let folder = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    std::fs::write(folder.path().join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(folder.path().join("key.pem"), key.serialize_pem()).unwrap();
    let files = jwksd::http::tls::TlsFiles {
        cert_file: folder.path().join("cert.pem"),
        key_file: folder.path().join("key.pem"),
        clients: jwksd::http::tls::ClientCertificates::None,
    };
    let tls = Some(jwksd::http::tls::Tls::load(&files).unwrap());
    let options = jwksd::http::listener::ListenerOptions { tls, ..jwksd::http::listener::ListenerOptions::new("test") };
    let address = jwksd::http::listener::ListenAddress::Tcp("127.0.0.1:0".parse().unwrap());
    let bound = jwksd::http::listener::BoundListener::bind(&address).unwrap();
    let jwksd::http::listener::ListenAddress::Tcp(address) = bound.local_addr().clone() else { panic!("not TCP") };
    let shutdown = tokio_util::sync::CancellationToken::new();
    let served = tokio::spawn(bound.serve(axum::Router::new(), options, shutdown.clone()));
    let server = format!("https://localhost:{}", address.port());
    let ca = folder.path().join("cert.pem").display().to_string();
    for (arguments, why) in [(vec![], "--ca-file"), (vec!["--ca-file", &ca], "CA:FALSE")] {
        let mut command = vec!["healthcheck", "--server", &server];
        command.extend(arguments);
        let ran = run(folder.path(), &[], &command).await;
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.err.contains("certificate is not acceptable") && ran.err.contains(why), "{ran:?}");
        assert!(!ran.err.contains("is it running") && !ran.err.contains("CaUsed"), "{ran:?}");
    }
    shutdown.cancel();
    served.await.unwrap();
}

#[tokio::test]
async fn simulate_plays_what_is_declared_and_rejects_nothing() {
    let folder = folder(&[TABLES, SECOND].concat());
    let simulate = async |rest: &[&str]| {
        run(folder.path(), &[], &[&["simulate", "--config", "jwksd.toml", "--for", "3d"], rest].concat()).await
    };
    let text = simulate(&["--seed", "7"]).await;
    assert_eq!(text.code, 0, "{text:?}");
    for told in ["default  every 1h", "second  every 1h", "simulated    3d", " 0 rejected", "seed 7"] {
        assert!(text.out.contains(told), "{told}: {}", text.out);
    }
    assert_eq!(text.err, "", "no progress without a terminal");
    let first = simulate(&["second", "--seed", "7", "-o", "json"]).await.json();
    assert_eq!(first, simulate(&["second", "--seed", "7", "-o", "json"]).await.json(), "a seed repeats a run");
    let keyset = &first["keysets"][0];
    assert_eq!(
        (&first["seed"], &keyset["name"], &keyset["tokens_rejected"], &keyset["cut"], &keyset["simulated_seconds"]),
        (&json!(7), &json!("second"), &json!(0), &json!(false), &json!(259_200))
    );
    assert!(
        keyset["rotations"].as_u64().unwrap() > 20 && keyset["tokens_presented"].as_u64().unwrap() > 100,
        "{keyset}"
    );
    assert!(keyset["margins"]["new_key"]["milliseconds"].as_i64().unwrap() >= 0, "{keyset}");
    let calm = simulate(&["second", "--faults", "none", "-o", "json"]).await.json();
    assert_eq!((&calm["keysets"][0]["crashes"], calm["seed"].is_u64()), (&json!(0), true));
}

#[tokio::test]
async fn simulate_says_which_setting_does_not_fit_what_is_true() {
    let folder = folder(TABLES);
    let simulate = async |rest: &[&str]| {
        run(folder.path(), &[], &[&["simulate", "--config", "jwksd.toml", "--seed", "1"], rest].concat()).await
    };
    let text = simulate(&["--for", "1d", "--verifier", "envoy"]).await;
    assert_eq!(text.code, 1, "{text:?}");
    for told in [
        "keyset.default.rotation.verifiers",
        "keyset.default.rotation.propagation",
        "name = \"envoy\"",
        "envoy rejects it",
    ] {
        assert!(text.out.contains(told), "{told}: {}", text.out);
    }
    assert!(text.err.contains("rejected"), "{text:?}");
    let document = simulate(&["--for", "1d", "--cache", "10m", "-o", "json"]).await;
    assert_eq!(document.code, 1, "{document:?}");
    let keyset = &document.json()["keysets"][0];
    assert!(keyset["tokens_rejected"].as_u64().unwrap() > 0, "{keyset}");
    assert_eq!(keyset["worst"]["cause"], "not-known-yet");
    let settings: Vec<&Value> = keyset["advice"].as_array().unwrap().iter().map(|it| &it["setting"]).collect();
    assert_eq!(settings, ["issuer.main.caches", "keyset.default.rotation.propagation"]);
    let cut = simulate(&["--for", "10y", "--faults", "none", "--verifiers", "1", "-o", "json"]).await.json();
    assert_eq!(cut["keysets"][0]["cut"], true, "an hour at a time that is too many rotations");
    for (wrong, told) in [
        (["--lag", "1m"], "a file store serves one process"),
        (["--replicas", "2"], "a file store serves one process"),
        (["--verifier", "nobody"], "`nobody` is not a known verifier"),
        (["--faults", "all,none"], "stand alone"),
        (["--for", "0s"], "--for"),
        (["--skew", "soon"], "--skew"),
    ] {
        let ran = simulate(&wrong).await;
        assert_eq!(ran.code, 2, "{ran:?}");
        assert!(ran.err.contains(told), "{told}: {ran:?}");
    }
}
