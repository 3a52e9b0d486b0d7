//! Changes of configuration, tokens and certificates while the daemon runs, and while it starts.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod support;

use std::path::Path;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::api::Call;
use support::{Daemon, PATIENCE, eventually};

const KEYSET: &str = "[issuer.main]\nurl = \"https://auth.example.com\"\n[keyset.default]\nalgorithm = \"ES256\"\n\
    [keyset.default.rotation]\nevery = \"2d\"\npropagation = \"1h\"\n\
    [keyset.default.tokens]\nmax_ttl = \"10m\"\n";

fn rewrite(daemon: &Daemon, change: impl FnOnce(String) -> String) {
    let path = daemon.path("jwksd.toml");
    let text = change(std::fs::read_to_string(&path).unwrap());
    std::fs::write(&path, text).unwrap();
}

async fn reload(daemon: &Daemon, status: u16) -> Value {
    Call::post(daemon, "admin", "/v1/reload").json(&json!({})).expect(status).await.json()
}

async fn max_ttl(daemon: &Daemon) -> i64 {
    daemon.admin(Method::GET, "/keysets/default", None).await.json()["policy"]["max_ttl_seconds"].as_i64().unwrap()
}

async fn gauge(daemon: &Daemon, name: &str) -> f64 {
    daemon.metrics().await.sum(name, &[]).unwrap()
}

/// A certificate for localhost that is its own authority.
fn write_pair(folder: &Path, name: &str) -> String {
    let pair = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    std::fs::write(folder.join(format!("{name}.crt")), pair.cert.pem()).unwrap();
    std::fs::write(folder.join(format!("{name}.key")), pair.signing_key.serialize_pem()).unwrap();
    pair.cert.pem()
}

/// A daemon whose public listener speaks TLS with `a.crt`.
fn with_tls() -> (Daemon, String) {
    let daemon = Daemon::builder()
        .tables(&format!("[public.tls]\ncert_file = \"a.crt\"\nkey_file = \"a.key\"\n{KEYSET}"))
        .prepare();
    let first = write_pair(&daemon.path(""), "a");
    (daemon, first)
}

/// Whether the public listener shows this certificate to a new connection.
async fn shows(daemon: &Daemon, certificate: &str) -> bool {
    let trusted = reqwest::Certificate::from_pem(certificate.as_bytes()).unwrap();
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([trusted]).build().unwrap();
    let port = daemon.address("public").rsplit(':').next().unwrap();
    client.get(format!("https://localhost:{port}/.well-known/jwks.json")).send().await.is_ok()
}

#[tokio::test]
async fn timing_that_would_be_refused_changes_nothing_and_is_told_with_its_arithmetic() {
    let daemon = Daemon::builder().tables(KEYSET).start().await;
    rewrite(&daemon, |text| {
        text.replace("propagation = \"1h\"", "propagation = \"1s\"").replace("max_ttl = \"10m\"", "max_ttl = \"20m\"")
    });
    let refused = reload(&daemon, 422).await["errors"].to_string();
    assert!(refused.contains("keyset.default.rotation.propagation") && refused.contains("max_age"), "{refused}");
    assert_eq!(max_ttl(&daemon).await, 600, "nothing of it is taken");
    assert!(gauge(&daemon, "jwksd_config_last_reload_successful").await == 0.0);
    let shown = daemon.admin(Method::GET, "/keysets/default", None).await.json();
    assert_eq!(shown["health"], "ok", "{shown:#}");
    rewrite(&daemon, |text| text.replace("propagation = \"1s\"", "propagation = \"1h\""));
    reload(&daemon, 200).await;
    eventually("the rest of it", PATIENCE, async || (max_ttl(&daemon).await == 1200).then_some(())).await;
}

#[tokio::test]
async fn another_role_or_a_shared_store_is_not_half_taken() {
    let daemon = Daemon::builder().tables(KEYSET).start().await;
    let of_file = std::fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    rewrite(&daemon, |text| {
        let (before, rest) = text.split_once("[store]\n").unwrap();
        let (_, after) = rest.split_once("\n[").unwrap();
        let store = "[store]\nkind = \"postgres\"\nurl_file = \"db.url\"\n[";
        format!("{before}{store}{after}").replace("max_ttl = \"10m\"", "max_ttl = \"20m\"")
    });
    let needs = "needs a restart, before which nothing of the change is taken";
    let refused = reload(&daemon, 422).await["errors"].clone();
    assert_eq!(refused, json!([format!("store.kind: file → postgres {needs}")]));
    rewrite(&daemon, |text| format!("role = \"signer\"\n{text}"));
    let refused = reload(&daemon, 422).await["errors"].clone();
    let role = format!("role: all → signer {needs}");
    assert_eq!(refused, json!([role, format!("store.kind: file → postgres {needs}")]));
    assert_eq!(max_ttl(&daemon).await, 600, "nothing of it is taken");
    let shown = daemon.admin(Method::GET, "/keysets/default", None).await.json();
    assert_eq!(shown["health"], "ok", "the keyset counts as configured: {shown:#}");
    rewrite(&daemon, |_| of_file.replace("max_ttl = \"10m\"", "max_ttl = \"20m\""));
    reload(&daemon, 200).await;
    eventually("the rest of it", PATIENCE, async || (max_ttl(&daemon).await == 1200).then_some(())).await;
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_keeps_the_whole_change_out() {
    let (mut daemon, first) = with_tls();
    daemon.start_process().await;
    rewrite(&daemon, |text| text.replace("max_ttl = \"10m\"", "max_ttl = \"20m\""));
    std::fs::write(daemon.path("a.crt"), "junk").unwrap();
    let refused = reload(&daemon, 422).await["errors"].to_string();
    assert!(refused.contains("public.tls") && refused.contains("a.crt"), "{refused}");
    assert_eq!(max_ttl(&daemon).await, 600);
    assert!(shows(&daemon, &first).await);
}

#[tokio::test]
async fn other_certificate_files_are_taken_and_the_former_are_forgotten() {
    let (mut daemon, first) = with_tls();
    daemon.start_process().await;
    let second = write_pair(&daemon.path(""), "b");
    rewrite(&daemon, |text| text.replace("a.crt", "b.crt").replace("a.key", "b.key"));
    let answer = reload(&daemon, 200).await;
    assert_eq!((&answer["changed"], &answer["restart_needed"]), (&json!(true), &json!([])));
    assert!(shows(&daemon, &second).await && !shows(&daemon, &first).await);
    std::fs::remove_file(daemon.path("a.crt")).unwrap();
    reload(&daemon, 200).await;
    let third = write_pair(&daemon.path(""), "b");
    eventually("the renewed files", PATIENCE, async || shows(&daemon, &third).await.then_some(())).await;
}

#[tokio::test]
async fn a_broken_configuration_keeps_neither_an_old_token_nor_an_old_certificate() {
    let (mut daemon, _) = with_tls();
    daemon.start_process().await;
    let former = support::api::operator_token(&daemon);
    rewrite(&daemon, |text| format!("{text}\nnonsense = \"{{\"\n["));
    eventually("the failure", PATIENCE, async || {
        (gauge(&daemon, "jwksd_config_last_reload_successful").await == 0.0).then_some(())
    })
    .await;
    std::fs::write(daemon.path("admin.token"), "another-token-that-is-long-enough-0123456789\n").unwrap();
    let renewed = write_pair(&daemon.path(""), "a");
    eventually("the new token", PATIENCE, async || {
        (Call::get(&daemon, "admin", "/v1/keysets").send().await.status == 200).then_some(())
    })
    .await;
    Call::get(&daemon, "admin", "/v1/keysets").bearer(&former).expect(401).await;
    eventually("the new certificate", PATIENCE, async || shows(&daemon, &renewed).await.then_some(())).await;
    assert!(gauge(&daemon, "jwksd_config_last_reload_successful").await == 0.0);
}

/// Starts that take a while: four RSA keys of 4,096 bits.
const SLOW_START: &str = "[issuer.main]\nurl = \"https://auth.example.com\"\n[keyset.default]\nalgorithm = \"RS256\"\n\
    rsa_bits = 4096\n[keyset.default.rotation]\nsuccessors = 3\n";

#[tokio::test]
async fn a_hangup_and_a_new_token_during_the_start_are_not_missed() {
    let mut daemon = Daemon::builder().tables(SLOW_START).prepare();
    std::fs::write(daemon.path("admin.token"), "the-first-token-that-is-long-enough-0123456789\n").unwrap();
    std::fs::set_permissions(daemon.path("admin.token"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    daemon.spawn();
    daemon.log_line("the first step", |line| line.field("action") == "created").await;
    daemon.signal(Signal::HUP);
    std::fs::write(daemon.path("admin.token"), "another-token-that-is-long-enough-0123456789\n").unwrap();
    daemon.listens().await.expect("it outlives the signal");
    eventually("the token of the file", PATIENCE, async || {
        (Call::get(&daemon, "admin", "/v1/keysets").send().await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_listener_that_needs_a_restart_to_end_keeps_its_credentials_until_then() {
    let daemon = Daemon::builder().tables(KEYSET).signer_with_token().start().await;
    rewrite(&daemon, |text| {
        let admin = text.find("[admin]").unwrap();
        let ops = text.find("[ops]").unwrap();
        let token = text.find("[admin.token.operator]").unwrap();
        let store = text.find("[store]").unwrap();
        format!("{}{}{}", &text[..admin], &text[ops..token], &text[store..])
    });
    let answer = reload(&daemon, 200).await;
    assert!(answer["restart_needed"].to_string().contains("admin"), "{answer}");
    Call::get(&daemon, "admin", "/v1/keysets").expect(200).await;
}

#[tokio::test]
async fn a_first_start_that_is_refused_makes_nothing() {
    let mut daemon =
        Daemon::builder().tables(&KEYSET.replace("propagation = \"1h\"", "propagation = \"1s\"")).prepare();
    let status = daemon.try_start().await.expect_err("its timing is refused");
    assert_eq!(status.code(), Some(2));
    let told = daemon.logs().join("\n");
    assert!(told.contains("keyset.default.rotation.propagation") && told.contains("max_age"), "{told}");
    for made in ["keyrings", "seal.key", "admin.token"] {
        assert!(!daemon.path(made).exists(), "{made} was made");
    }
}

#[tokio::test]
async fn faults_of_the_configuration_exit_with_2() {
    let mut daemon = Daemon::builder().tables(KEYSET).start().await;
    assert!(daemon.sigterm().await.success());
    daemon.set_tables(&KEYSET.replace("auth.example.com", "other.example.com"));
    assert_eq!(daemon.try_start().await.expect_err("the issuer changed").code(), Some(2));
    daemon.set_tables(KEYSET);
    std::fs::remove_file(daemon.path("admin.token")).unwrap();
    assert_eq!(daemon.try_start().await.expect_err("a token is missing").code(), Some(2));
    let (mut daemon, _) = with_tls();
    std::fs::remove_file(daemon.path("a.key")).unwrap();
    assert_eq!(daemon.try_start().await.expect_err("a key is missing").code(), Some(2));
}

/// The configuration without the tables of one listener.
fn without(text: &str, listener: &str) -> String {
    let (mut kept, mut skip) = (String::new(), false);
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('[') {
            skip = table.split(['.', ']']).next() == Some(listener);
        }
        if !skip {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

/// The status of a signature with this token.
async fn signs_with(daemon: &Daemon, token: &str) -> u16 {
    let claims = json!({ "claims": { "sub": "a", "aud": "b" } });
    let url = daemon.url("signer", "/v1/keysets/default/sign");
    let mut request = support::http_client().build().unwrap().post(url).json(&claims);
    if !token.is_empty() {
        request = request.bearer_auth(token);
    }
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn who_was_removed_does_not_come_back_when_the_listeners_table_goes() {
    let others = "[signer.client.eve]\ntoken_file = \"eve.token\"\n[admin.token.eve]\nrole = \"operator\"\nfile = \"eve.token\"\n";
    let mut daemon = Daemon::builder().tables(&format!("{KEYSET}{others}")).signer_with_token().prepare();
    let eve = "the-token-of-eve-long-enough-to-be-taken-for-one-0123456789";
    std::fs::write(daemon.path("eve.token"), eve).unwrap();
    daemon.start_process().await;
    daemon.ready().await;
    let asks = async || {
        let url = daemon.url("admin", "/v1/keysets");
        let answer = support::http_client().build().unwrap().get(url).bearer_auth(eve).send().await;
        answer.unwrap().status().as_u16()
    };
    assert_eq!((signs_with(&daemon, eve).await, asks().await), (200, 200));
    rewrite(&daemon, |text| text.replace(others, ""));
    reload(&daemon, 200).await;
    assert_eq!((signs_with(&daemon, eve).await, asks().await), (401, 401));
    std::fs::remove_file(daemon.path("eve.token")).unwrap();
    rewrite(&daemon, |text| without(&without(&text, "signer"), "admin"));
    let answer = reload(&daemon, 200).await;
    assert!(answer["restart_needed"].to_string().contains("signer"), "{answer}");
    assert_eq!((signs_with(&daemon, eve).await, asks().await), (401, 401));
    let own = std::fs::read_to_string(daemon.path("client.token")).unwrap();
    assert_eq!(signs_with(&daemon, &own).await, 200, "who was known last is known until the restart");
}

#[tokio::test]
async fn an_open_signer_that_is_to_move_goes_on_where_it_is_until_the_restart() {
    let daemon = Daemon::builder().tables(KEYSET).start().await;
    assert_eq!(signs_with(&daemon, "").await, 200);
    let other = support::ports::ReservedPort::any();
    let here = daemon.address("signer").to_owned();
    let own = std::fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    assert!(own.contains(&here), "{own}");
    rewrite(&daemon, |text| text.replace(&here, &format!("127.0.0.1:{}", other.number())));
    let answer = reload(&daemon, 200).await;
    assert!(answer["restart_needed"].to_string().contains("signer"), "{answer}");
    assert_eq!(signs_with(&daemon, "").await, 200);
    rewrite(&daemon, |text| without(&text, "signer"));
    reload(&daemon, 200).await;
    assert_eq!(signs_with(&daemon, "").await, 200);
}
