//! `jwksd migrate` with the real binary: a live issuer moves from files into PostgreSQL and back, nobody starts on half of
//! it, and a crash at any write is resumed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use support::postgres::{Database, PostgresServer};
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
algorithm = "EdDSA"
"#;

const POSTGRES: &str = "kind = \"postgres\"\nurl_file = \"database.url\"\nstate_path = \"state\"";
const FILE: &str = "kind = \"file\"\npath = \"keyrings\"";
const ELSEWHERE: &str = "kind = \"file\"\npath = \"elsewhere\"";

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

async fn migrate(daemon: &Daemon) -> String {
    let ran = run(daemon, &["migrate", "--to", "to.toml"], &[]).await;
    assert!(ran.status.success(), "{}{}", ran.out, ran.err);
    ran.out
}

async fn refused(daemon: &Daemon, code: i32) -> String {
    let ran = run(daemon, &["migrate", "--to", "to.toml"], &[]).await;
    assert_eq!(ran.status.code(), Some(code), "{}{}", ran.out, ran.err);
    ran.err
}

async fn sign(daemon: &Daemon) -> Signed {
    daemon.sign("main", json!({ "claims": { "sub": "someone", "aud": "somewhere" } })).await
}

/// By a verifier that knows nothing yet.
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

/// A database, named in the daemon's folder.
async fn database(daemon: &Daemon) -> Database {
    let database = PostgresServer::shared().await.database().await;
    let file = daemon.path("database.url");
    fs::write(&file, database.url()).unwrap();
    fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    database
}

fn records(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.is_file() && !path.ends_with("_lock"));
    files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_issuer_moves_into_postgresql_and_back() {
    let mut daemon = Daemon::builder().tables(QUIET).start().await;
    let database = database(&daemon).await;
    daemon.write_config("to.toml", POSTGRES);
    let first = sign(&daemon).await;
    let busy = refused(&daemon, 1).await;
    assert!(busy.contains("in use by another jwksd"), "{busy}");
    daemon.sigterm().await;

    let before = records(&daemon.path("keyrings"));
    let told = migrate(&daemon).await;
    assert!(told.contains("moved: 2 keyrings") && told.contains("move the old store away"), "{told}");
    assert_eq!(records(&daemon.path("keyrings")), before, "the source stays as it is");
    assert_eq!(database.rows("SELECT count(*) FROM jwksd.documents WHERE document = 'initialising'").await, ["0"]);
    assert!(migrate(&daemon).await.contains("moved before"));

    daemon.set_store(POSTGRES);
    daemon.restart().await;
    let second = sign(&daemon).await;
    assert_eq!(second.kid, first.kid, "the same key signs on");
    verify(&daemon, &[&first, &second]).await;
    daemon.write_config("to.toml", ELSEWHERE);
    let busy = refused_in_use(&daemon).await;
    assert!(busy.contains("within the last minute: ") && busy.contains("(all)"), "{busy}");
    let rotated = json!({ "allow_unpropagated": true });
    assert_eq!(daemon.admin(reqwest::Method::POST, "/keysets/main/rotate", Some(rotated)).await.status, 200);
    let third = sign(&daemon).await;
    assert_ne!(third.kid, first.kid);
    daemon.sigterm().await;
    a_minute_later(&database).await;

    // The old store is behind: it cannot be moved there again.
    daemon.set_store(FILE);
    daemon.write_config("to.toml", POSTGRES);
    let behind = refused(&daemon, 1).await;
    assert!(behind.contains("another state of this installation"), "{behind}");

    daemon.set_store(POSTGRES);
    daemon.write_config("to.toml", FILE);
    let occupied = refused(&daemon, 1).await;
    assert!(occupied.contains("another state of this installation"), "{occupied}");
    daemon.write_config("to.toml", ELSEWHERE);
    migrate(&daemon).await;
    daemon.set_store(ELSEWHERE);
    daemon.restart().await;
    let fourth = sign(&daemon).await;
    assert_eq!(fourth.kid, third.kid);
    verify(&daemon, &[&first, &second, &third, &fourth]).await;
}

/// The database's clock cannot be moved, but what it noted.
async fn a_minute_later(database: &Database) {
    database.sql("UPDATE jwksd.replicas SET reported_at = reported_at - interval '61 seconds'").await;
}

/// The running daemon holds the state folder, as a second configuration without one does not.
async fn refused_in_use(daemon: &Daemon) -> String {
    let own = fs::read_to_string(daemon.path("jwksd.toml")).unwrap();
    fs::write(daemon.path("beside.toml"), own.replace("state_path = \"state\"\n", "")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.args(["migrate", "--config", "beside.toml", "--to", "to.toml"]).current_dir(daemon.path(""));
    let output = tokio::time::timeout(PATIENCE, command.output()).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_holds_something_or_has_another_seal_is_refused() {
    let mut daemon = Daemon::builder().tables(QUIET).start().await;
    daemon.sigterm().await;
    daemon.write_config("to.toml", FILE);
    let same = refused(&daemon, 2).await;
    assert!(same.contains("both configurations name the store"), "{same}");

    let mut other = Daemon::builder().tables(QUIET).start().await;
    other.sigterm().await;
    let taken = format!("kind = \"file\"\npath = \"{}\"", other.path("keyrings").display());
    daemon.write_config("to.toml", &taken);
    let before = records(&other.path("keyrings"));
    let occupied = refused(&daemon, 1).await;
    assert!(occupied.contains("holds something already (the installation "), "{occupied}");
    assert_eq!(records(&other.path("keyrings")), before);

    daemon.write_config("to.toml", ELSEWHERE);
    let config = fs::read_to_string(daemon.path("to.toml")).unwrap();
    let foreign = other.path("seal.key").display().to_string();
    fs::write(daemon.path("to.toml"), config.replace("path = \"seal.key\"", &format!("path = \"{foreign}\""))).unwrap();
    let seal = refused(&daemon, 1).await;
    assert!(seal.contains("both must name the same seal"), "{seal}");
    assert!(records(&daemon.path("elsewhere")).is_empty(), "nothing was written");

    // Somebody's keyring without its installation.
    fs::copy(other.path("keyrings/main.json"), daemon.path("elsewhere/main.json")).unwrap();
    daemon.write_config("to.toml", ELSEWHERE);
    let remains = refused(&daemon, 1).await;
    assert!(remains.contains("elsewhere/main.json"), "{remains}");

    // What is damaged is not moved.
    fs::remove_file(daemon.path("elsewhere/main.json")).unwrap();
    fs::write(daemon.path("keyrings/other.json"), "{}").unwrap();
    let damaged = refused(&daemon, 1).await;
    assert!(damaged.contains("keyrings/other.json"), "{damaged}");
    assert!(records(&daemon.path("elsewhere")).is_empty(), "nothing was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_propagation_that_is_too_short_for_a_shared_store_is_told() {
    let short = format!("{QUIET}\n[defaults.rotation]\npropagation = \"6m\"\n");
    let mut daemon = Daemon::builder().tables(&short).start().await;
    let _database = database(&daemon).await;
    daemon.sigterm().await;
    daemon.write_config("to.toml", &format!("{POSTGRES}\npublish_lag = \"2m\""));
    let told = migrate(&daemon).await;
    assert!(told.contains("rotation.propagation") && told.contains("degraded"), "{told}");
    daemon.set_store(&format!("{POSTGRES}\npublish_lag = \"2m\""));
    let check = run(&daemon, &["check"], &[]).await;
    assert_eq!(check.status.code(), Some(2), "{}{}", check.out, check.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_killed_at_any_change_is_resumed_and_nobody_starts_on_half_of_it() {
    let mut daemon = Daemon::builder().tables(QUIET).start().await;
    let signed = sign(&daemon).await;
    daemon.sigterm().await;
    daemon.write_config("to.toml", ELSEWHERE);
    let armed = |change: usize| {
        [
            ("LD_PRELOAD", preloaded("crashes/shim.c").display().to_string()),
            ("FAULTS_KILL_AT", change.to_string()),
            ("FAULTS_REPORT", daemon.path("changes").display().to_string()),
        ]
    };
    let whole = run(&daemon, &["migrate", "--to", "to.toml"], &armed(0)).await;
    assert!(whole.status.success(), "{}{}", whole.out, whole.err);
    let changes = fs::read_to_string(daemon.path("changes")).unwrap().lines().count();
    assert!(changes > 15, "so few cannot be all: {changes}");
    let expected = records(&daemon.path("elsewhere"));
    for change in 1..=changes {
        fs::remove_dir_all(daemon.path("elsewhere")).unwrap();
        let killed = run(&daemon, &["migrate", "--to", "to.toml"], &armed(change)).await;
        assert_eq!(killed.status.signal(), Some(9), "at {change} of {changes}: {}{}", killed.out, killed.err);
        let left = daemon.path("elsewhere");
        if left.is_dir() && records(&left).contains_key("_initialising.json") {
            let mut half = Command::new(env!("CARGO_BIN_EXE_jwksd"));
            half.args(["init", "--config", "to.toml"]).current_dir(daemon.path(""));
            let half = half.output().await.unwrap();
            let told = String::from_utf8_lossy(&half.stderr);
            assert!(half.status.code() == Some(1) && told.contains("is unfinished"), "at {change}: {half:?}");
        }
        migrate(&daemon).await;
        assert_eq!(records(&left), expected, "at {change}");
    }
    daemon.set_store(ELSEWHERE);
    daemon.restart().await;
    verify(&daemon, &[&signed, &sign(&daemon).await]).await;
}
