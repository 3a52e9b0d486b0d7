//! SIGKILL at every place where the real binary changes a file, and at random under load: what was published stays
//! published, no step is done twice, and whoever repeats a request with its Idempotency-Key gets the first answer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use jwksd::seal::file::FileKey;
use reqwest::Method;
use serde_json::{Value, json};
use support::localstack::{LocalStack, REGION};
use support::tools::{preloaded, repository};
use support::{Daemon, PATIENCE, eventually, unix_now};
use tokio::time::{Instant, sleep};

/// Runs under way at once.
const AT_ONCE: usize = 3;

const SIGKILL: i32 = 9;

/// Nothing waits in these tests but what they wait for: no rotation comes due.
const QUIET: &str = r#"
[issuer.main]
url = "https://issuer.example.test"

[keyset.main]
algorithm = "EdDSA"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_killed_at_any_change_is_completed_by_the_next() {
    let changes = count(async || first_life(fresh(), None).await).await;
    killed_at_each(&changes, async |change| {
        let (mut daemon, seen) = first_life(fresh(), Some(change)).await;
        daemon.set_env("FAULTS_KILL_AT", None);
        daemon.restart().await;
        settled(&daemon).await;
        let mut after = Seen::default();
        assert!(after.look(&daemon).await, "it answers");
        after.must_continue(&seen, &BTreeSet::new());
        assert_eq!(after.serials.keys().copied().collect::<Vec<_>>(), [1, 2, 3], "made once each");
        healthy(&daemon).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_requests_killed_at_any_change_are_carried_out_once() {
    carried_out_once(rotations).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compromise_and_imports_killed_at_any_change_are_carried_out_once() {
    carried_out_once(afresh).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reseal_killed_at_any_change_is_completed_by_the_next() {
    let origin = stopped(fresh()).await;
    fs::rename(origin.path("seal.key"), origin.path("former.key")).unwrap();
    FileKey::load_or_create(&origin.path("seal.key")).unwrap();
    let file = |name: &str| format!("kind = \"file\"\npath = \"{name}\"");
    resealed_whenever_it_is_killed(&origin, fresh, &file("seal.key"), &file("former.key")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reseal_to_and_from_aws_kms_killed_at_any_change_is_completed_by_the_next() {
    let account = LocalStack::shared().await.account();
    let key = account.client.create_key().send().await.unwrap().key_metadata.unwrap().arn.unwrap();
    let (file, kms) = ("kind = \"file\"\npath = \"seal.key\"", format!("kind = \"aws-kms\"\nkey_id = \"{key}\""));
    let fresh = || {
        let endpoint = &account.endpoint;
        let table = format!("[backend.aws-kms]\nregion = \"{REGION}\"\nendpoint_url = \"{endpoint}\"\n");
        let mut daemon = fresh();
        daemon.add_tables(&table);
        account.environment().iter().for_each(|(name, value)| daemon.set_env(name, Some(value)));
        daemon
    };
    resealed_whenever_it_is_killed(&stopped(fresh()).await, fresh, &kms, file).await;

    let mut sealed = fresh();
    sealed.set_seal(&kms);
    let origin = stopped(sealed).await;
    FileKey::load_or_create(&origin.path("seal.key")).unwrap();
    resealed_whenever_it_is_killed(&origin, fresh, file, &kms).await;
}

/// Kills a reseal at each of its changes. The next one completes it, and what sealed before is not needed any more.
async fn resealed_whenever_it_is_killed(origin: &Daemon, fresh: impl Fn() -> Daemon, to: &str, from: &str) {
    let before = record(origin);
    let copied = || {
        let mut daemon = fresh();
        copy(&origin.path(""), &daemon.path(""));
        daemon.set_seal(&format!("{to}\n\n[seal.previous.former]\n{from}"));
        daemon
    };
    let changes = count(async || {
        let daemon = copied();
        assert!(reseal(&daemon, Some(0)).await.success());
        (daemon, Seen::default())
    })
    .await;
    killed_at_each(&changes, async |change| {
        let mut daemon = copied();
        killed_or_done_before(change, reseal(&daemon, Some(change)).await, &daemon);
        assert!(reseal(&daemon, None).await.success());
        let after = record(&daemon);
        let kids = |record: &Value| {
            record["body"]["keys"].as_array().unwrap().iter().map(|key| key["kid"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(kids(&after), kids(&before), "no key was lost or made");
        assert_ne!(after["data_key"], before["data_key"]);
        // Not there, not named: not needed.
        if let Some((_, former)) = from.rsplit_once("path = ") {
            fs::remove_file(daemon.path(former.trim_matches('"'))).unwrap();
        }
        daemon.set_seal(to);
        daemon.restart().await;
        signs(&daemon).await;
        healthy(&daemon).await;
    })
    .await;
}

/// The script of requests, killed at each change and repeated by the next daemon.
async fn carried_out_once(script: impl AsyncFn(&Daemon, &mut History) -> Option<()>) {
    let model = stopped(fresh()).await;
    let origin = model.path("");
    let script = &script;
    let changes = count(async || {
        let (daemon, mut history) = (copy_of(&origin), History::default());
        let (mut daemon, ended) = second_life(daemon, None, &mut history, script).await;
        assert!(!ended);
        assert!(daemon.sigterm().await.success());
        (daemon, history.seen)
    })
    .await;
    killed_at_each(&changes, async |change| {
        let mut history = History::default();
        let (mut daemon, ended) = second_life(copy_of(&origin), Some(change), &mut history, script).await;
        if !ended {
            killed_or_done_before(change, daemon.sigterm().await, &daemon);
        }
        daemon.set_env("FAULTS_KILL_AT", None);
        daemon.restart().await;
        let (answered, mut again) = (history.answers.clone(), History::default());
        assert!(script(&daemon, &mut again).await.is_some(), "it answers");
        for (key, first) in &answered {
            assert_eq!(again.answers[key], *first, "the Idempotency-Key {key} is answered as the first time");
        }
        again.seen.must_continue(&history.seen, &again.revoked);
        healthy(&daemon).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_of_unknown_outcome_is_settled_not_taken_for_somebody_elses() {
    let mut daemon = Daemon::builder().tables(QUIET).prepare();
    let fails = daemon.path("syncs-fail");
    daemon.set_env("LD_PRELOAD", Some(preloaded("crashes/shim.c").to_str().unwrap()));
    daemon.set_env("FAULTS_SYNC", Some(fails.to_str().unwrap()));
    daemon.start_process().await;
    daemon.ready().await;
    settled(&daemon).await;

    // The new record is in its place, but whether it stays there is not known.
    fs::write(&fails, "").unwrap();
    let rotate = async || {
        ask(&daemon, Method::POST, "/keysets/main/rotate", "one", Some(json!({ "allow_unpropagated": true }))).await
    };
    let answer = rotate().await.unwrap();
    assert_eq!(answer.0, 503, "{}", answer.1);
    assert!(alarms(&daemon).await.contains("store_unavailable"));
    let before = jwks_kids(&daemon).await.unwrap();
    sleep(Duration::from_millis(1500)).await; // Retries of the daemon's own steps, if it has any, fail as well.
    assert_eq!(jwks_kids(&daemon).await.unwrap(), before);

    fs::remove_file(&fails).unwrap();
    let answer = eventually("the store to be writable", PATIENCE, async || rotate().await.filter(|a| a.0 == 200)).await;
    assert_eq!(rotate().await.unwrap(), answer, "once");
    settled(&daemon).await;
    let keyset = daemon.admin(Method::GET, "/keysets/main?history=true", None).await.json();
    assert_eq!(keyset["keys"].as_array().unwrap().len(), 4, "{keyset}");
    assert_eq!(keyset["active_kid"], answer.1["changes"][0]["kid"], "{keyset}");
    healthy(&daemon).await;
    daemon.restart().await;
    healthy(&daemon).await;
}

/// Bounded in time, not in kills: a slow machine kills less often.
#[tokio::test(flavor = "multi_thread")]
async fn random_kills_under_load_lose_no_live_token_and_no_key() {
    let seed = std::env::var("JWKSD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(unix_now().subsec_nanos()) | 1);
    println!("JWKSD_TEST_SEED={seed}");
    let mut random = Random(seed);
    let mut daemon = Daemon::builder()
        .tables(
            r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"

[keyset.main]
algorithm = "ES256"
[keyset.main.rotation]
every = "1500ms"
propagation = "1100ms"
[keyset.main.tokens]
max_ttl = "2s"
default_ttl = "2s"
clock_skew = "100ms"
"#,
        )
        .start()
        .await;
    let end = Instant::now() + Duration::from_secs(15);
    let (mut seen, mut live, mut kills, mut tokens) = (Seen::default(), BTreeMap::new(), 0, 0);
    while Instant::now() < end {
        let kill = Instant::now() + Duration::from_millis(random.below(1500));
        while Instant::now() < kill {
            let signed = daemon.sign("main", json!({ "claims": { "sub": "s", "aud": "a" } })).await;
            live.insert(signed.kid, signed.expires_at);
            tokens += 1;
            all_published(&daemon, &live).await;
        }
        assert!(seen.look(&daemon).await);
        assert_eq!(daemon.kill9().await.signal(), Some(SIGKILL));
        kills += 1;
        daemon.start_process().await;
        daemon.ready().await;
        let mut after = Seen::default();
        assert!(after.look(&daemon).await);
        after.same_serials(&seen);
        seen = after;
        all_published(&daemon, &live).await;
    }
    println!("{kills} kills, {tokens} tokens, {} keys", seen.serials.len());
    assert!(kills > 3 && seen.serials.len() > 5, "{kills} kills, {} keys", seen.serials.len());
}

/// Invariant 2, seen from outside: every token that still lives can be verified.
async fn all_published(daemon: &Daemon, live: &BTreeMap<String, u64>) {
    let published = jwks_kids(daemon).await.expect("it answers");
    let now = unix_now().as_secs();
    for (kid, _) in live.iter().filter(|(_, expires)| **expires > now) {
        assert!(published.contains(kid), "{kid} signed a token that lives, but is not published: {published:?}");
    }
}

/// Runs a life with nobody killed and hands back its changes, one line each.
async fn count<F: AsyncFnOnce() -> (Daemon, Seen)>(life: F) -> Vec<String> {
    let (daemon, _) = life().await;
    let report = fs::read_to_string(daemon.path("changes")).unwrap();
    let changes: Vec<String> = report.lines().map(str::to_owned).collect();
    println!("{} places:\n{}", changes.len(), changes.join("\n"));
    changes
}

/// Every change is a place to be killed at.
async fn killed_at_each(changes: &[String], life: impl AsyncFn(usize)) {
    assert!(changes.len() > 20, "so few changes cannot be all: {changes:?}");
    stream::iter(1..=changes.len()).map(|change| life(change)).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}

fn fresh() -> Daemon {
    Daemon::builder().tables(QUIET).prepare()
}

/// A daemon in a folder of its own with the files of another that does not run.
fn copy_of(origin: &Path) -> Daemon {
    let daemon = fresh();
    copy(origin, &daemon.path(""));
    daemon
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// From nothing to an orderly end; returns a daemon that does not run any more.
async fn first_life(mut daemon: Daemon, kill_at: Option<usize>) -> (Daemon, Seen) {
    let mut seen = Seen::default();
    arm(&mut daemon, kill_at);
    let status = match daemon.try_start().await {
        Err(status) => status,
        Ok(()) => {
            settled(&daemon).await;
            seen.look(&daemon).await;
            daemon.sigterm().await
        }
    };
    killed_or_done_before(kill_at.unwrap_or(usize::MAX), status, &daemon);
    (daemon, seen)
}

/// Two changes of a keyset that fall together are one write, so a life may have fewer changes than another.
fn killed_or_done_before(change: usize, status: std::process::ExitStatus, daemon: &Daemon) {
    let changes = fs::read_to_string(daemon.path("changes")).unwrap().lines().count();
    let as_it_should = if changes < change { status.success() } else { status.signal() == Some(SIGKILL) };
    assert!(as_it_should, "to be killed at change {change} of {changes}: {status}");
}

/// A daemon that ran until it had nothing left to do and ended in order.
async fn stopped(mut daemon: Daemon) -> Daemon {
    daemon.restart().await;
    settled(&daemon).await;
    assert!(daemon.sigterm().await.success());
    daemon
}

fn record(daemon: &Daemon) -> Value {
    serde_json::from_str(&fs::read_to_string(daemon.path("keyrings/main.json")).unwrap()).unwrap()
}

/// Runs `jwksd reseal` in the daemon's folder, killed at a change where one is given.
async fn reseal(daemon: &Daemon, kill_at: Option<usize>) -> std::process::ExitStatus {
    let mut command = tokio::process::Command::from(daemon.command(&["reseal"]));
    command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null());
    if let Some(change) = kill_at {
        command.env("LD_PRELOAD", preloaded("crashes/shim.c")).env("FAULTS_KILL_AT", change.to_string());
        command.env("FAULTS_REPORT", daemon.path("changes"));
    }
    tokio::time::timeout(PATIENCE, command.status()).await.expect("it ends").unwrap()
}

/// A start and an operator's requests. Says whether it was killed meanwhile.
async fn second_life(
    mut daemon: Daemon,
    kill_at: Option<usize>,
    history: &mut History,
    script: impl AsyncFn(&Daemon, &mut History) -> Option<()>,
) -> (Daemon, bool) {
    arm(&mut daemon, kill_at);
    let killed = |status: std::process::ExitStatus| assert_eq!(status.signal(), Some(SIGKILL), "{status}");
    if let Err(status) = daemon.try_start().await {
        killed(status);
        return (daemon, true);
    }
    if script(&daemon, history).await.is_none() {
        killed(daemon.ended().await);
        return (daemon, true);
    }
    (daemon, false)
}

fn arm(daemon: &mut Daemon, kill_at: Option<usize>) {
    daemon.set_env("LD_PRELOAD", Some(preloaded("crashes/shim.c").to_str().unwrap()));
    daemon.set_env("FAULTS_KILL_AT", Some(&kill_at.unwrap_or(0).to_string()));
    let report = daemon.path("changes");
    daemon.set_env("FAULTS_REPORT", Some(report.to_str().unwrap()));
}

/// What was answered and seen.
#[derive(Default)]
struct History {
    /// By Idempotency-Key.
    answers: BTreeMap<&'static str, Value>,
    /// Kids whose revocation was asked for.
    revoked: BTreeSet<String>,
    seen: Seen,
}

/// The same requests with the same keys each time; `None` when the daemon went away.
async fn rotations(daemon: &Daemon, history: &mut History) -> Option<()> {
    let rotate = json!({ "allow_unpropagated": true });
    history.ask(daemon, Method::POST, "/rotate", "rotate", Some(rotate)).await?;
    history.ask(daemon, Method::POST, "/rollback", "rollback", None).await?;
    history.ask(daemon, Method::DELETE, "/hold", "resume", None).await?;
    // The first key signs again; the one that took over from it is revoked.
    let kid = history.answers["rollback"]["changes"].as_array().unwrap().iter();
    let kid = kid.clone().find(|change| change["to"] == "retiring").unwrap()["kid"].as_str().unwrap().to_owned();
    history.revoked.insert(kid.clone());
    history.ask(daemon, Method::POST, &format!("/keys/{kid}/revoke"), "revoke", Some(json!({}))).await?;
    settled_or_gone(daemon).await
}

/// Everything is revoked, then two keys come from elsewhere.
async fn afresh(daemon: &Daemon, history: &mut History) -> Option<()> {
    // All that is published may be gone before an answer says so.
    history.revoked.extend(origins(daemon));
    history.ask(daemon, Method::POST, "/compromise", "compromise", Some(json!({ "reason": "a drill" }))).await?;
    settled_or_gone(daemon).await?;
    let vector = |name: &str| fs::read_to_string(repository("tests/vectors/keys").join(name)).unwrap();
    let private = json!({ "private_key": vector("ed25519-pkcs8.pem"), "kid": "brought", "max_token_life": "1h" });
    history.ask(daemon, Method::POST, "/import", "import-private", Some(private)).await?;
    let until = "2099-01-01T00:00:00Z";
    let public = json!({ "public_key": vector("p256-spki.pem"), "kid": "other-signer", "until": until });
    history.ask(daemon, Method::POST, "/import", "import-public", Some(public)).await?;
    settled_or_gone(daemon).await
}

/// The kids of the first three keys, which every copy has.
fn origins(daemon: &Daemon) -> Vec<String> {
    let record = record(daemon);
    let keys = record["body"]["keys"].as_array().unwrap().iter().filter(|key| key["serial"].as_u64() <= Some(3));
    keys.map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

impl History {
    async fn ask(
        &mut self,
        daemon: &Daemon,
        method: Method,
        path: &str,
        key: &'static str,
        body: Option<Value>,
    ) -> Option<()> {
        let (status, answer) = ask(daemon, method, &format!("/keysets/main{path}"), key, body).await?;
        assert!(status == 200 || status == 204, "{key}: {status} {answer}");
        self.answers.insert(key, answer);
        self.seen.look(daemon).await.then_some(())
    }
}

/// What the outside saw of a keyset.
#[derive(Clone, Debug, Default)]
struct Seen {
    published: BTreeSet<String>,
    serials: BTreeMap<u64, String>,
}

impl Seen {
    /// False when the daemon went away.
    async fn look(&mut self, daemon: &Daemon) -> bool {
        let Some(kids) = jwks_kids(daemon).await else { return false };
        self.published = kids;
        let Some((_, keyset)) = ask(daemon, Method::GET, "/keysets/main?history=true", "", None).await else {
            return false;
        };
        let mut serials = BTreeMap::new();
        for key in keyset["keys"].as_array().unwrap() {
            let kid = key["kid"].as_str().unwrap().to_owned();
            assert_eq!(serials.insert(key["serial"].as_u64().unwrap(), kid), None, "a serial twice: {keyset}");
        }
        self.serials = serials;
        true
    }

    fn must_continue(&self, before: &Seen, revoked: &BTreeSet<String>) {
        for kid in before.published.difference(revoked) {
            assert!(self.published.contains(kid), "{kid} was published and is not any more");
        }
        self.same_serials(before);
    }

    fn same_serials(&self, before: &Seen) {
        for (serial, kid) in &before.serials {
            assert_eq!(self.serials.get(serial), Some(kid), "the serial {serial} is another key than before");
        }
    }
}

/// Waits until nothing is left to be done: two successors published, that recorded, every ended key destroyed.
async fn settled(daemon: &Daemon) {
    settled_or_gone(daemon).await;
}

async fn settled_or_gone(daemon: &Daemon) -> Option<()> {
    eventually("the keyset to settle", PATIENCE, async || {
        let Some((_, keyset)) = ask(daemon, Method::GET, "/keysets/main", "", None).await else { return Some(None) };
        let keys = keyset["keys"].as_array().unwrap();
        let waits = |key: &&Value| key["state"] == "pending" || key["state"] == "standby";
        let waiting = keys.iter().filter(|key| waits(key) && !key["published_at"].is_null());
        let settled = waiting.count() >= 2
            && !keyset["active_kid"].is_null()
            && fs::read_to_string(daemon.path("keyrings/main.json")).is_ok_and(|record| is_settled(&record));
        settled.then_some(Some(()))
    })
    .await
}

fn is_settled(record: &str) -> bool {
    let record: Value = serde_json::from_str(record).unwrap();
    record["body"]["keys"].as_array().unwrap().iter().all(|key| match key["state"].as_str().unwrap() {
        "retired" | "revoked" => key["private"].is_null(),
        "retiring" => !key["stopped_at"].is_null(),
        _ => true,
    })
}

/// A seal that lives elsewhere opens after the listeners.
async fn signs(daemon: &Daemon) {
    eventually("a signature", PATIENCE, async || {
        let answer = daemon.sign_answer("main", json!({ "claims": { "sub": "s", "aud": "a" } })).await;
        (answer.status == 200).then_some(())
    })
    .await;
}

async fn healthy(daemon: &Daemon) {
    let keyset = daemon.admin(Method::GET, "/keysets/main", None).await.json();
    assert_eq!((&keyset["health"], &keyset["alarms"]), (&json!("ok"), &json!([])), "{keyset}");
    let active = keyset["keys"].as_array().unwrap().iter().filter(|key| key["state"] == "active");
    assert_eq!(active.count(), 1, "{keyset}");
    let signed = daemon.sign("main", json!({ "claims": { "sub": "s", "aud": "a" } })).await;
    assert_eq!(signed.kid, keyset["active_kid"].as_str().unwrap());
    assert!(jwks_kids(daemon).await.unwrap().contains(&signed.kid));
    // A heartbeat may be writing just now.
    eventually("no file to be left behind", PATIENCE, async || {
        let files = fs::read_dir(daemon.path("keyrings")).unwrap().map(|entry| entry.unwrap().file_name());
        files.into_iter().all(|name| !name.to_str().unwrap().starts_with('.')).then_some(())
    })
    .await;
}

async fn alarms(daemon: &Daemon) -> String {
    daemon.admin(Method::GET, "/keysets/main", None).await.json()["alarms"].to_string()
}

/// A call of the admin API with an Idempotency-Key; `None` when the daemon is gone.
async fn ask(daemon: &Daemon, method: Method, path: &str, key: &str, body: Option<Value>) -> Option<(u16, Value)> {
    let token = fs::read_to_string(daemon.path("admin.token")).unwrap();
    let mut request = client().request(method, daemon.url("admin", &format!("/v1{path}"))).bearer_auth(token.trim());
    if !key.is_empty() {
        request = request.header("idempotency-key", key);
    }
    if let Some(body) = body {
        request = request.json(&body);
    }
    let response = request.send().await.ok()?;
    let status = response.status().as_u16();
    let text = response.text().await.ok()?;
    Some((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
}

async fn jwks_kids(daemon: &Daemon) -> Option<BTreeSet<String>> {
    let response = client().get(daemon.url("public", "/.well-known/jwks.json")).send().await.ok()?;
    let jwks: Value = serde_json::from_str(&response.text().await.ok()?).unwrap();
    // After a compromise there is none for a moment: 503.
    Some(jwks["keys"].as_array().into_iter().flatten().map(|key| key["kid"].as_str().unwrap().to_owned()).collect())
}

fn client() -> &'static reqwest::Client {
    static CLIENT: OnceLock<reqwest::Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let builder = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0);
        builder.timeout(Duration::from_secs(10)).build().unwrap()
    })
}

/// SplitMix64: the same seed, the same kills.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
