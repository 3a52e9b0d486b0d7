//! The wall clock steps, lags and leaps under the real binary, and the machine sleeps: nothing moves forward on a time
//! that cannot be trusted, and tokens carry the right one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};
use support::api::Call;
use support::tools::{faketime_library, preloaded};
use support::{Daemon, PATIENCE, eventually, unix_now};
use tokio::time::Instant;

const YEAR: i64 = 365 * 86_400;

/// After a silence promotions wait 3 s (caches, σ), after a gap removals wait 5 s (one overlap).
const BRISK: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "2s"

[keyset.main]
algorithm = "EdDSA"
[keyset.main.rotation]
every = "3500ms"
propagation = "3s"
[keyset.main.tokens]
max_ttl = "3s"
default_ttl = "3s"
clock_skew = "1s"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_step_while_running_freezes_until_the_clock_is_right_again() {
    for step in [YEAR, -YEAR] {
        let daemon = with_clock(0).await;
        set_clock(&daemon, step);
        // The very next token is right: the guard looks at every reading, not only at the scheduler's.
        signs_at(&daemon, 0).await;
        frozen(&daemon, true).await;
        let before = keyset(&daemon).await;
        assert!(before["alarms"].as_array().unwrap().contains(&json!("clock_frozen")), "{before}");
        eventually("the rotation to be overdue", PATIENCE, async || {
            let next = keyset(&daemon).await["next_rotation"].clone();
            let blocked = next["blocked_by"].as_array().unwrap().contains(&json!("clock_frozen"));
            assert!(blocked, "{next}");
            (next["overdue_seconds"].as_i64() >= Some(2)).then_some(())
        })
        .await;
        let after = keyset(&daemon).await;
        assert_eq!(states(&after), states(&before), "nothing moved while the clock was wrong");
        signs_at(&daemon, 0).await;

        set_clock(&daemon, 0);
        frozen(&daemon, false).await;
        rotates(&daemon, &after).await;
        signs_at(&daemon, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_accept_a_stepped_clock() {
    for step in [YEAR, -YEAR] {
        let daemon = with_clock(0).await;
        set_clock(&daemon, step);
        frozen(&daemon, true).await;
        signs_at(&daemon, 0).await;
        let clock = daemon.admin(Method::GET, "/clock", None).await.json();
        assert_eq!(clock["frozen"], true, "{clock}");
        let accept = |body: Value| Call::post(&daemon, "admin", "/v1/clock/accept").json(&body);
        let once = |body: Value| accept(body).header("idempotency-key", "accept-1");
        let looked = accept(json!({ "dry_run": true })).expect(200).await.json();
        assert_eq!((&looked["was_frozen"], &looked["generation"]), (&json!(true), &clock["generation"]), "{looked}");
        accept(json!({})).header("if-match", "\"1\"").expect(412).await;
        frozen(&daemon, true).await;
        let reason = json!({ "reason": "it was wrong before" });
        let etag = format!("\"{}\"", clock["generation"]);
        assert!(clock_command(&daemon, &["show"]).await.1.contains("FROZEN"));
        let (code, unasked) = clock_command(&daemon, &["accept"]).await;
        assert!(code == 2 && unasked.contains("--yes"), "{unasked}");
        assert!(clock_command(&daemon, &["accept", "--dry-run"]).await.1.contains("nothing changed"));
        frozen(&daemon, true).await;
        let answer = once(reason.clone()).header("if-match", &etag).expect(200).await;
        assert_eq!(answer.json()["was_frozen"], true, "{}", answer.text);
        assert_eq!(answer.header("etag"), format!("\"{}\"", answer.json()["generation"]));
        frozen(&daemon, false).await;
        signs_at(&daemon, step).await;
        let again = once(reason).header("if-match", &etag).expect(200).await;
        assert_eq!(again.json(), answer.json(), "it is not carried out again, nor held against its generation");
        assert_eq!(once(json!({})).expect(422).await.slug(), "idempotency-key-reused");
        assert_eq!(keyset(&daemon).await["alarms"].to_string().find("clock"), None);
        let audit = daemon.admin(Method::GET, "/audit", None).await;
        assert!(audit.text.contains("clock-accept") && audit.text.contains("it was wrong before"), "{}", audit.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_behind_the_last_run_freezes_at_start() {
    let mut daemon = with_clock(YEAR).await;
    signs_at(&daemon, YEAR).await;
    assert!(daemon.sigterm().await.success());
    set_clock(&daemon, 0);
    daemon.restart().await;
    frozen(&daemon, true).await;
    let before = keyset(&daemon).await;
    signs_at(&daemon, YEAR).await;
    set_clock(&daemon, YEAR);
    frozen(&daemon, false).await;
    rotates(&daemon, &before).await;

    // Nobody repairs it, so it is still behind at the next start; then an operator decides.
    assert!(daemon.sigterm().await.success());
    set_clock(&daemon, 0);
    for _ in 0..2 {
        daemon.restart().await;
        frozen(&daemon, true).await;
        signs_at(&daemon, YEAR).await;
    }
    assert_eq!(daemon.admin(Method::POST, "/clock/accept", None).await.status, 200);
    frozen(&daemon, false).await;
    signs_at(&daemon, 0).await;
    daemon.restart().await;
    frozen(&daemon, false).await;
    signs_at(&daemon, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_far_ahead_of_the_last_run_delays_removals_and_promotions() {
    let mut daemon = with_clock(0).await;
    let retiring = eventually("a retiring key", PATIENCE, async || {
        let found = in_state(&keyset(&daemon).await, "retiring");
        (!found.is_empty()).then_some(found)
    })
    .await;
    assert!(daemon.sigterm().await.success());
    set_clock(&daemon, YEAR);
    let started = Instant::now();
    daemon.restart().await;
    frozen(&daemon, false).await;
    signs_at(&daemon, YEAR).await;
    let first = keyset(&daemon).await;
    assert_eq!(in_state(&first, "retiring"), retiring, "for all it knows its tokens still live");
    assert!(first["next_rotation"]["blocked_by"].as_array().unwrap().contains(&json!("silence")), "{first}");
    assert!(first.to_string().contains("clock_gap"), "{first}");
    rotates(&daemon, &first).await;
    assert!(started.elapsed() >= Duration::from_secs(3), "promoted after {:?}", started.elapsed());
    eventually("the removal", PATIENCE, async || {
        let left = in_state(&keyset(&daemon).await, "retiring");
        left.is_disjoint(&retiring).then_some(())
    })
    .await;
    assert!(started.elapsed() >= Duration::from_secs(5), "removed after {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_slept_is_not_mistaken_for_a_stepped_clock_but_for_a_silence() {
    let mut daemon = Daemon::builder().tables(BRISK).prepare();
    let asleep = daemon.path("asleep");
    fs::write(&asleep, 0i64.to_ne_bytes()).unwrap();
    daemon.set_env("LD_PRELOAD", Some(preloaded("clock/suspend.c").to_str().unwrap()));
    daemon.set_env("CLOCK_ASLEEP", Some(asleep.to_str().unwrap()));
    daemon.start_process().await;
    daemon.ready().await;
    // Until a successor could take over at once.
    eventually("a standby", PATIENCE, async || (!in_state(&keyset(&daemon).await, "standby").is_empty()).then_some(()))
        .await;
    let file = fs::OpenOptions::new().write(true).open(&asleep).unwrap();
    file.write_all_at(&3600i64.to_ne_bytes(), 0).unwrap();
    let woken = Instant::now();
    signs_at(&daemon, 3600).await;
    daemon.log_line("the silence", |line| line.message().contains("nothing was published for longer")).await;
    let before = keyset(&daemon).await;
    frozen(&daemon, false).await;
    rotates(&daemon, &before).await;
    assert!(woken.elapsed() >= Duration::from_secs(3), "promoted after {:?}", woken.elapsed());
}

/// What `jwksd clock …` answers: its exit code and what it prints.
async fn clock_command(daemon: &Daemon, arguments: &[&str]) -> (i32, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.arg("clock").args(arguments).current_dir(daemon.path("")).env_clear().stdin(std::process::Stdio::null());
    command.args(["--server", daemon.address("admin"), "--token-file", "admin.token"]).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends").unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text.into_owned())
}

/// A daemon whose wall clock differs by `offset` seconds from the real one.
async fn with_clock(offset: i64) -> Daemon {
    let mut daemon = Daemon::builder().tables(BRISK).prepare();
    set_clock(&daemon, offset);
    let file = daemon.path("clock");
    daemon.set_env("LD_PRELOAD", Some(faketime_library().to_str().unwrap()));
    daemon.set_env("FAKETIME_TIMESTAMP_FILE", Some(file.to_str().unwrap()));
    daemon.set_env("FAKETIME_NO_CACHE", Some("1"));
    // Covers CLOCK_BOOTTIME as well: the guard needs a clock that nobody can step.
    daemon.set_env("FAKETIME_DONT_FAKE_MONOTONIC", Some("1"));
    daemon.set_env("NO_FAKE_STAT", Some("1"));
    daemon.start_process().await;
    daemon.ready().await;
    daemon
}

fn set_clock(daemon: &Daemon, offset: i64) {
    let new = daemon.path("clock.new");
    fs::write(&new, format!("{offset:+}")).unwrap();
    fs::rename(new, daemon.path("clock")).unwrap();
}

async fn keyset(daemon: &Daemon) -> Value {
    daemon.admin(Method::GET, "/keysets/main", None).await.json()
}

fn states(keyset: &Value) -> Vec<(u64, String)> {
    let keys = keyset["keys"].as_array().unwrap().iter();
    keys.map(|key| (key["serial"].as_u64().unwrap(), key["state"].as_str().unwrap().to_owned())).collect()
}

fn in_state(keyset: &Value, state: &str) -> BTreeSet<u64> {
    states(keyset).into_iter().filter(|(_, is)| is == state).map(|(serial, _)| serial).collect()
}

async fn rotates(daemon: &Daemon, before: &Value) {
    eventually("a rotation", PATIENCE, async || {
        (keyset(daemon).await["active_kid"] != before["active_kid"]).then_some(())
    })
    .await;
}

/// The metric and a token both say it.
async fn frozen(daemon: &Daemon, expected: bool) {
    eventually(&format!("jwksd_clock_frozen to be {expected}"), PATIENCE, async || {
        let frozen = daemon.metrics().await.sum("jwksd_clock_frozen", &[]).unwrap();
        (frozen == f64::from(u8::from(expected))).then_some(())
    })
    .await;
}

/// A token signed now carries the real time plus `offset` seconds.
async fn signs_at(daemon: &Daemon, offset: i64) {
    let expected = unix_now().as_secs().cast_signed() + offset;
    let signed = daemon.sign("main", json!({ "claims": { "sub": "s", "aud": "a" } })).await;
    let payload = URL_SAFE_NO_PAD.decode(signed.token.split('.').nth(1).unwrap()).unwrap();
    let claims: Value = serde_json::from_slice(&payload).unwrap();
    let issued = claims["iat"].as_i64().unwrap();
    assert!((issued - expected).abs() <= 5, "iat {issued} is {} s off", issued - expected);
    assert_eq!(claims["exp"].as_i64().unwrap(), issued + 3, "{claims}");
}
