//! `jwksd recover` with the real binary over a file store, as docs/restore.md tells it: an older copy, one that diverged,
//! lost records, a revocation that one copy forgot. After each the daemon starts and live tokens are verified.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use support::strict_verifier::{Expected, StrictVerifier};
use support::tools::preloaded;
use support::{Daemon, PATIENCE, Signed};
use tokio::process::Command;

const QUIET: &str = r#"
[issuer.main]
url = "https://issuer.example.test"

[keyset.main]
algorithm = "ES256"

[keyset.other]
algorithm = "ES256"
"#;

struct Ran {
    status: std::process::ExitStatus,
    out: String,
    err: String,
}

async fn run(daemon: &Daemon, arguments: &[&str], environment: &[(&str, String)]) -> Ran {
    let mut command = Command::from(daemon.command(arguments));
    command.envs(environment.iter().map(|(name, value)| (*name, value)));
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(PATIENCE, output).await.expect("it ends").expect("it runs");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { status: output.status, out: text(output.stdout), err: text(output.stderr) }
}

async fn recover(daemon: &Daemon, arguments: &[&str]) -> String {
    let ran = run(daemon, &[&["recover", "--yes"], arguments].concat(), &[]).await;
    assert!(ran.status.success(), "{arguments:?}: {}{}", ran.out, ran.err);
    ran.out
}

async fn refused(daemon: &Daemon, code: i32, arguments: &[&str]) -> String {
    let before = files(&daemon.path("keyrings"));
    let ran = run(daemon, &[&["recover"], arguments].concat(), &[]).await;
    assert_eq!(ran.status.code(), Some(code), "{arguments:?}: {}{}", ran.out, ran.err);
    assert_eq!(files(&daemon.path("keyrings")), before, "nothing was written");
    ran.err
}

/// There is no more to do, whatever it is given.
async fn is_done(daemon: &Daemon, arguments: &[&str]) {
    let told = recover(daemon, arguments).await;
    assert!(told.contains("nothing to recover"), "{told}");
}

async fn starts_not(daemon: &mut Daemon) -> String {
    assert!(daemon.try_start().await.is_err(), "it must not start");
    daemon.logs().join("\n")
}

async fn sign(daemon: &Daemon) -> Signed {
    daemon.sign("main", json!({ "claims": { "sub": "someone", "aud": "somewhere" } })).await
}

async fn rotate(daemon: &Daemon) {
    let body = Some(json!({ "allow_unpropagated": true }));
    let answer = daemon.admin(Method::POST, "/keysets/main/rotate", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

async fn verify(daemon: &Daemon, tokens: &[&Signed]) {
    let mut verifier = StrictVerifier::new(daemon.url("public", "/.well-known/jwks.json"), Duration::ZERO);
    let expected = Expected {
        iss: "https://issuer.example.test".to_owned(),
        aud: "somewhere".to_owned(),
        alg: "ES256".to_owned(),
    };
    for signed in tokens {
        verifier.verify(&signed.token, &expected).await.unwrap();
    }
}

async fn kids(daemon: &Daemon) -> Vec<String> {
    let jwks = daemon.get("public", "/.well-known/jwks.json").await.json();
    jwks["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

async fn healthy(daemon: &Daemon) {
    for keyset in ["main", "other"] {
        let shown = daemon.admin(Method::GET, &format!("/keysets/{keyset}"), None).await.json();
        assert_eq!((&shown["health"], &shown["alarms"]), (&json!("ok"), &json!([])), "{shown}");
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for folder in [folder.to_owned(), folder.join("_seen")] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() && !path.ends_with("_lock") {
                found.insert(path.display().to_string(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Copies a folder of records whole.
fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to.join("_seen")).unwrap();
    for folder in [to.to_owned(), to.join("_seen")] {
        fs::set_permissions(folder, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    }
    for (path, bytes) in files(from) {
        fs::write(to.join(Path::new(&path).strip_prefix(from).unwrap()), bytes).unwrap();
    }
}

fn lineage(daemon: &Daemon) -> Value {
    let record = fs::read(daemon.path("keyrings/main.json")).unwrap();
    serde_json::from_slice::<Value>(&record).unwrap()["lineage"].clone()
}

/// A stopped daemon that rotated after `old` was copied; `new` is what it had in the end.
async fn rotated() -> (Daemon, Signed, Signed) {
    let mut daemon = Daemon::builder().tables(QUIET).start().await;
    let first = sign(&daemon).await;
    daemon.sigterm().await;
    copy(&daemon.path("keyrings"), &daemon.path("old"));
    daemon.restart().await;
    rotate(&daemon).await;
    let second = sign(&daemon).await;
    daemon.sigterm().await;
    copy(&daemon.path("keyrings"), &daemon.path("new"));
    (daemon, first, second)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_older_copy_is_as_good_as_any_until_somebody_names_the_newer_one() {
    let (mut daemon, first, second) = rotated().await;
    copy(&daemon.path("old"), &daemon.path("keyrings"));
    is_done(&daemon, &[]).await;
    // It ran for a while, and signed.
    daemon.restart().await;
    let third = sign(&daemon).await;
    assert!(!kids(&daemon).await.is_empty());
    let busy = refused_while_it_runs(&daemon).await;
    assert!(busy.contains("in use by another jwksd"), "{busy}");
    daemon.sigterm().await;
    let before = lineage(&daemon);
    let planned = run(&daemon, &["recover", "--dry-run", "--from", "new"], &[]).await;
    assert!(planned.out.contains("nothing was changed"), "{}{}", planned.out, planned.err);
    assert_eq!(lineage(&daemon), before);
    let unasked = refused(&daemon, 2, &["--from", "new"]).await;
    assert!(unasked.contains("--yes"), "{unasked}");
    let told = recover(&daemon, &["--from", "new"]).await;
    assert!(told.contains("recovered") && told.contains("signs"), "{told}");
    assert_ne!(lineage(&daemon), before);
    is_done(&daemon, &["--from", "new", "--from", "old"]).await;
    daemon.restart().await;
    verify(&daemon, &[&first, &second, &third, &sign(&daemon).await]).await;
    healthy(&daemon).await;
    rotate(&daemon).await;
    daemon.restart().await;
    healthy(&daemon).await;
}

async fn refused_while_it_runs(daemon: &Daemon) -> String {
    let ran = run(daemon, &["recover", "--yes", "--from", "new"], &[]).await;
    assert_eq!(ran.status.code(), Some(1), "{}{}", ran.out, ran.err);
    ran.err
}

#[tokio::test(flavor = "multi_thread")]
async fn older_records_under_newer_marks_need_the_newer_copy_or_what_is_served() {
    let (mut daemon, first, second) = rotated().await;
    fs::copy(daemon.path("old/main.json"), daemon.path("keyrings/main.json")).unwrap();
    assert!(starts_not(&mut daemon).await.contains("an old copy was put back"));
    let newer = refused(&daemon, 1, &["--yes"]).await;
    assert!(newer.contains("this store saw a generation") && newer.contains("--lose-newer"), "{newer}");
    recover(&daemon, &["--from", "new"]).await;
    daemon.restart().await;
    verify(&daemon, &[&first, &second]).await;
    assert_eq!(sign(&daemon).await.kid, second.kid);
    let jwks = daemon.get("public", "/.well-known/jwks.json").await.text;
    fs::write(daemon.path("served.json"), jwks).unwrap();
    daemon.sigterm().await;

    // Only the keys that are served are left: of another keyset too, which stay its own.
    fs::copy(daemon.path("old/main.json"), daemon.path("keyrings/main.json")).unwrap();
    let whose = refused(&daemon, 2, &["--yes", "--jwks", "served.json"]).await;
    assert!(whose.contains("KEYSET="), "{whose}");
    recover(&daemon, &["--jwks", "main=served.json"]).await;
    daemon.restart().await;
    verify(&daemon, &[&first, &second]).await;
    let mut served = kids(&daemon).await;
    served.sort();
    served.dedup();
    assert_eq!(served.len(), kids(&daemon).await.len(), "no key stands there twice");
    healthy(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_stores_that_diverged_become_one() {
    let (mut daemon, first, second) = rotated().await;
    // Another writer went on from the old copy.
    copy(&daemon.path("old"), &daemon.path("keyrings"));
    daemon.restart().await;
    let revoked = kids(&daemon).await.into_iter().find(|kid| *kid != first.kid && *kid != second.kid).unwrap();
    let keyset = daemon.admin(Method::GET, "/keysets/main", None).await.json();
    let own = keyset["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap());
    let revoked = own.clone().find(|kid| *kid != first.kid && *kid != second.kid).unwrap_or(&revoked).to_owned();
    let answer = daemon.admin(Method::POST, &format!("/keysets/main/keys/{revoked}/revoke"), Some(json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let third = sign(&daemon).await;
    daemon.sigterm().await;
    recover(&daemon, &["--from", "new"]).await;
    is_done(&daemon, &["--from", "new"]).await;
    daemon.restart().await;
    verify(&daemon, &[&first, &second, &third, &sign(&daemon).await]).await;
    assert!(!kids(&daemon).await.contains(&revoked), "what one of them revoked is revoked");
    healthy(&daemon).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_records_come_from_a_copy_or_begin_anew_when_that_is_said() {
    let (mut daemon, first, second) = rotated().await;
    fs::remove_file(daemon.path("keyrings/main.json")).unwrap();
    assert!(starts_not(&mut daemon).await.contains("is missing although the keyset"));
    let lost = refused(&daemon, 1, &["--yes"]).await;
    assert!(lost.contains("has no record that can be read"), "{lost}");
    recover(&daemon, &["--from", "new"]).await;
    daemon.restart().await;
    verify(&daemon, &[&first, &second]).await;
    daemon.sigterm().await;

    fs::remove_file(daemon.path("keyrings/_installation.json")).unwrap();
    assert!(starts_not(&mut daemon).await.contains("the installation's record was lost"));
    let lost = refused(&daemon, 1, &["--yes"]).await;
    assert!(lost.contains("no installation's record"), "{lost}");
    recover(&daemon, &["--from", "old"]).await;
    daemon.restart().await;
    verify(&daemon, &[&first, &second]).await;
    healthy(&daemon).await;
    daemon.sigterm().await;

    fs::remove_file(daemon.path("keyrings/other.json")).unwrap();
    let told = recover(&daemon, &["--lose-newer"]).await;
    assert!(told.contains("other: nothing is left of it"), "{told}");
    daemon.restart().await;
    verify(&daemon, &[&first, &second]).await;
    let other = daemon.admin(Method::GET, "/keysets/other", None).await.json();
    assert_eq!(other["active_kid"], Value::Null, "its first key waits: {other}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_seal_or_installation_is_told() {
    let (daemon, ..) = rotated().await;
    let mut other = Daemon::builder().tables(QUIET).start().await;
    other.sigterm().await;
    let foreign = other.path("keyrings").display().to_string();
    // Its seal is another one too: what cannot be opened is not used, and that is told.
    let ran = run(&daemon, &["recover", "--yes", "--from", &foreign], &[]).await;
    assert!(ran.out.contains("not used: ") && ran.out.contains("was sealed with the key"), "{}{}", ran.out, ran.err);
    fs::rename(daemon.path("seal.key"), daemon.path("own.key")).unwrap();
    fs::copy(other.path("seal.key"), daemon.path("seal.key")).unwrap();
    let sealed = refused(&daemon, 1, &["--yes"]).await;
    assert!(sealed.contains("that the configured seal opens") && sealed.contains("was sealed with"), "{sealed}");
    let missing = refused(&daemon, 2, &["--yes", "--from", "nowhere"]).await;
    assert!(missing.contains("--from nowhere"), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_killed_at_any_change_is_finished_by_repeating_it() {
    let (mut daemon, first, second) = rotated().await;
    let armed = |change: usize| {
        [
            ("LD_PRELOAD", preloaded("crashes/shim.c").display().to_string()),
            ("FAULTS_KILL_AT", change.to_string()),
            ("FAULTS_REPORT", daemon.path("changes").display().to_string()),
        ]
    };
    let mixed = || {
        copy(&daemon.path("new"), &daemon.path("keyrings"));
        fs::copy(daemon.path("old/main.json"), daemon.path("keyrings/main.json")).unwrap();
    };
    let arguments = ["recover", "--yes", "--from", "new"];
    mixed();
    assert!(run(&daemon, &arguments, &armed(0)).await.status.success());
    let changes = fs::read_to_string(daemon.path("changes")).unwrap().lines().count();
    assert!(changes > 8, "so few cannot be all: {changes}");
    for change in 1..=changes {
        mixed();
        let killed = run(&daemon, &arguments, &armed(change)).await;
        assert_eq!(killed.status.signal(), Some(9), "at {change}: {}{}", killed.out, killed.err);
        recover(&daemon, &["--from", "new"]).await;
        is_done(&daemon, &["--from", "new", "--from", "old"]).await;
    }
    daemon.restart().await;
    verify(&daemon, &[&first, &second, &sign(&daemon).await]).await;
    healthy(&daemon).await;
}
