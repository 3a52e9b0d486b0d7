//! Webhooks, by the real binary and a real receiver; what is told in advance, by a clock that the test moves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "notices/ahead.rs"]
mod ahead;
#[path = "support/policy.rs"]
mod policy;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use support::receiver::{Received, Receiver, Reply};
use support::{Daemon, PATIENCE, eventually, tools};

const SECRET: &str = "whsec_c2VjcmV0LW9mLXRoZS1maXJzdC1yZWNlaXZlcg==";
const OTHER: &str = "whsec_YW5vdGhlci1zZWNyZXQtdGhhdC1jb21lcy1sYXRlcg==";

const QUICK: &str =
    "every = \"3s\"\npropagation = \"2100ms\"\nsuccessors = 1\nverifiers = [{ name = \"strict\", cache = \"1s\" }]";
const SLOW: &str =
    "every = \"30d\"\npropagation = \"2100ms\"\nverifiers = [\"vault\", { name = \"strict\", cache = \"1s\" }]";

fn tables(rotation: &str, notices: &str) -> String {
    format!(
        "[issuer.main]\nurl = \"https://issuer.example.test\"\nmax_age = \"1s\"\n[keyset.default]\nalgorithm = \"ES256\"\n\
         [keyset.default.rotation]\n{rotation}\n[keyset.default.tokens]\nmax_ttl = \"2s\"\nclock_skew = \"100ms\"\n{notices}"
    )
}

fn notice(name: &str, url: &str, more: &str) -> String {
    format!("[notice.{name}]\nurl = \"{url}\"\nsecret_file = \"{name}.secret\"\ntimeout = \"500ms\"\n{more}\n")
}

async fn start(rotation: &str, notices: &str) -> Daemon {
    let mut daemon = Daemon::builder().tables(&tables(rotation, notices)).prepare();
    for name in ["ops", "dead"] {
        std::fs::write(daemon.path(&format!("{name}.secret")), format!("{SECRET}\n")).unwrap();
    }
    daemon.start_process().await;
    daemon.ready().await;
    daemon
}

/// Verifies with the receiver's code of docs/notices.md, and by hand with nothing but Python's own library.
fn verify(received: &[Received], secret: &str) {
    let page = std::fs::read_to_string(tools::repository("docs/notices.md")).unwrap();
    let receive = page.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    let check = "
import base64, hashlib, hmac, json, sys
secret, all = json.load(sys.stdin)
for headers, body in all:
    assert receive(headers, body, secret) == json.loads(body)
    signed = '.'.join([headers['webhook-id'], headers['webhook-timestamp'], body]).encode()
    mac = hmac.new(base64.b64decode(secret[len('whsec_'):]), signed, hashlib.sha256).digest()
    assert 'v1,' + base64.b64encode(mac).decode() in headers['webhook-signature'].split(' ')
    try:
        receive(headers, body + ' ', secret)
    except Exception:
        continue
    raise SystemExit('a changed body was taken')
";
    let all: Vec<Value> = received.iter().map(|received| json!([received.headers, received.body])).collect();
    let mut python = Command::new(tools::python());
    python.args(["-c", &format!("{receive}{check}")]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut python = python.spawn().unwrap();
    python.stdin.take().unwrap().write_all(json!([secret, all]).to_string().as_bytes()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn serial(received: &Received) -> Option<u64> {
    received.json()["data"]["serial"].as_u64()
}

fn events_of(received: &[Received], of: u64) -> Vec<String> {
    received.iter().filter(|received| serial(received) == Some(of)).map(Received::event).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_rotation_is_told_in_order() {
    let receiver = Receiver::start().await;
    let daemon = start(QUICK, &notice("ops", &receiver.url(), "before = [\"800ms\"]")).await;
    // Of a key that was made after the receiver was known, from its beginning to its end.
    let created = receiver.took("a key's creation", |it| it.event() == "key.created").await;
    let of = serial(&created).unwrap();
    receiver.took("its end", |it| it.event() == "key.destroyed" && serial(it) == Some(of)).await;
    let taken = receiver.taken();
    let expected = [
        "key.created",
        "propagation.upcoming",
        "key.propagated",
        "rotation.upcoming",
        "key.activated",
        "key.retiring",
        "removal.upcoming",
        "key.retired",
        "key.destroyed",
    ];
    assert_eq!(events_of(&taken, of), expected);
    assert!(taken.iter().all(|it| it.target == "/hook" && it.headers["content-type"] == "application/json"));

    let find = |event: &str| taken.iter().find(|it| it.event() == event && serial(it) == Some(of)).unwrap().json();
    let (upcoming, activated) = (find("rotation.upcoming"), find("key.activated"));
    let at = |value: &Value| chrono::DateTime::parse_from_rfc3339(value.as_str().unwrap()).unwrap();
    let ahead = at(&upcoming["data"]["at"]) - at(&upcoming["timestamp"]);
    assert_eq!(ahead.num_milliseconds(), 800);
    let late = at(&activated["timestamp"]) - at(&upcoming["data"]["at"]);
    assert!((0..2000).contains(&late.num_milliseconds()), "it was announced for {upcoming}, and came {activated}");
    assert_eq!(activated["data"]["trigger"], "schedule");
    assert_eq!(activated["data"]["actor"], "jwksd");
    let retiring = find("key.retiring");
    assert!(at(&retiring["data"]["unpublished_at"]) > at(&retiring["timestamp"]));
    verify(&taken, SECRET);

    let metrics = daemon.metrics().await;
    let delivered = metrics.sum("jwksd_notices_total", &[("outcome", "delivered")]).unwrap();
    assert!(delivered >= taken.len() as f64 - 1.0, "{delivered} of {}", taken.len());
    assert_eq!(metrics.sum("jwksd_notices_total", &[("outcome", "dropped")]), Some(0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_taken_is_tried_again_and_redirects_lead_nowhere() {
    let receiver = Receiver::start().await;
    let daemon = start(SLOW, &notice("ops", &receiver.url(), "events = [\"hold.*\"]")).await;
    receiver.next([
        Reply::Status(500, ""),
        Reply::Hang,
        Reply::BreakOff,
        Reply::Status(307, "location: /elsewhere\r\n"),
        Reply::Status(503, "retry-after: 1\r\n"),
    ]);
    let reason = json!({ "reason": "change freeze" });
    assert_eq!(daemon.admin(Method::PUT, "/keysets/default/hold", Some(reason)).await.status, 200);
    daemon.admin(Method::DELETE, "/keysets/default/hold", None).await;
    receiver.took("the hold's end", |it| it.event() == "hold.ended").await;
    let received = receiver.received();
    let first: Vec<&Received> = received.iter().filter(|it| it.event() == "hold.set").collect();
    assert_eq!(first.len(), 6, "{received:#?}");
    assert!(first.iter().all(|it| it.id() == first[0].id() && it.body == first[0].body));
    assert_eq!(first[5].json()["data"]["reason"], "change freeze");
    assert_eq!(first[5].json()["data"]["actor"], "operator");
    assert!(received.iter().all(|it| it.target == "/hook"), "a redirect was followed");
    assert_eq!(received[6].event(), "hold.ended", "it waited for what came before it");
    verify(&received, SECRET);
    let metrics = daemon.metrics().await;
    assert_eq!(metrics.sum("jwksd_notices_total", &[("outcome", "failed")]), Some(5.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_dead_holds_nobody_up_and_hears_everything_later() {
    let (receiver, dead) = (Receiver::start().await, Receiver::start().await);
    dead.always(Some(Reply::Hang));
    let events = "before = []\nevents = [\"key.*\"]";
    let notices = notice("ops", &receiver.url(), events) + &notice("dead", &dead.url(), events);
    let mut daemon = start(QUICK, &notices).await;
    let rotations = async |at_least: f64| {
        eventually("rotations", PATIENCE, async || {
            let count = daemon.metrics().await.sum("jwksd_rotations_total", &[("trigger", "schedule")])?;
            daemon.sign("default", json!({ "claims": { "sub": "s", "aud": "https://api.example.test" } })).await;
            (count >= at_least).then_some(())
        })
        .await;
    };
    rotations(2.0).await;
    receiver.took("a retirement", |it| it.event() == "key.retired").await;
    let metrics = daemon.metrics().await;
    assert_eq!(metrics.sum("jwksd_rotation_overdue_seconds", &[]), Some(0.0));
    assert!(metrics.sum("jwksd_notices_oldest_timestamp_seconds", &[]).unwrap() > 0.0);
    assert!(dead.taken().is_empty());

    // In the midst of it, and what was not told yet is known to the next process.
    daemon.kill9().await;
    let told = receiver.taken().len();
    dead.always(None);
    daemon.restart().await;
    let last = receiver.taken().last().unwrap().id().to_owned();
    dead.took("what the other one was told last", |it| it.id() == last).await;
    receiver.took("more than before", |it| !receiver.taken()[..told].iter().any(|old| old.id() == it.id())).await;
    let of = |receiver: &Receiver| receiver.taken().iter().map(|it| it.id().to_owned()).collect::<Vec<_>>();
    let (all, late) = (of(&receiver), of(&dead));
    let until = all.iter().position(|id| *id == last).unwrap();
    // Both came to know of the daemon within moments of each other, and hear the same from then on.
    let from = all.iter().position(|id| *id == late[0]).expect("the first that the late one heard");
    assert!(from <= 3, "the late one lacks the first {from}");
    assert_eq!(all[from..=until], late[..=until - from], "in the same order, and nothing is lost");
    assert!(!late.iter().collect::<BTreeSet<_>>().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_tells_how_long_the_key_may_still_be_accepted() {
    let receiver = Receiver::start().await;
    let daemon = start(SLOW, &notice("ops", &receiver.url(), "")).await;
    receiver.took("a successor", |it| it.event() == "key.propagated").await;
    let active = daemon.admin(Method::GET, "/keysets/default", None).await.json()["active_kid"].clone();
    let path = format!("/keysets/default/keys/{}/revoke", active.as_str().unwrap());
    let answer = daemon.admin(Method::POST, &path, Some(json!({ "reason": "laptop stolen" }))).await.json();
    let revoked = receiver.took("the revocation", |it| it.event() == "key.revoked").await.json();
    let data = &revoked["data"];
    assert_eq!((&data["kid"], &data["exposure"]), (&active, &answer["exposure"]));
    assert_eq!(data["exposure"]["unbounded"], json!(["vault"]));
    assert_eq!((&data["reason"], &data["actor"]), (&json!("laptop stolen"), &json!("operator")));
    assert_eq!((&data["trigger"], &data["generation"]), (&json!("revocation"), &answer["generation"]));
    let successor = receiver.took("its successor", |it| it.event() == "key.activated").await.json();
    assert_eq!(successor["data"]["kid"], answer["changes"][0]["kid"]);

    let hold = json!({ "reason": "freeze", "until": "2090-01-02T00:00:00Z" });
    daemon.admin(Method::PUT, "/keysets/default/hold", Some(hold)).await;
    receiver.took("the hold", |it| it.event() == "hold.set").await;
    daemon.admin(Method::POST, "/keysets/default/drain", Some(json!({ "reason": "moved" }))).await;
    receiver.took("the end", |it| it.event() == "keyset.drained").await;
    receiver.took("an alarm", |it| it.event() == "alarm.raised" && it.json()["data"]["alarm"] == "drained").await;
    receiver.took("a destruction", |it| it.event() == "key.destroyed").await;
    as_documented(&receiver.taken());
}

/// Every example of docs/notices.md whose type was sent has exactly the members that were sent.
fn as_documented(taken: &[Received]) {
    let page = std::fs::read_to_string(tools::repository("docs/notices.md")).unwrap();
    let examples = page.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let examples: BTreeMap<String, Value> = examples
        .map(|text| serde_json::from_str::<Value>(text).unwrap())
        .map(|example| (example["type"].as_str().unwrap().to_owned(), example))
        .collect();
    let shape = |value: &Value| -> BTreeSet<String> {
        let data = value["data"].as_object().unwrap().keys().map(|key| format!("data.{key}"));
        // Only an operator gives a reason, and only a rotation is blocked.
        data.chain(value.as_object().unwrap().keys().cloned())
            .filter(|key| !["data.reason", "data.blocked_by"].contains(&key.as_str()))
            .collect()
    };
    let mut seen = BTreeSet::new();
    for received in taken {
        let sent = received.json();
        if let Some(example) = examples.get(&received.event()) {
            assert_eq!(shape(&sent), shape(example), "{sent}");
            seen.insert(received.event());
        }
    }
    for event in ["key.activated", "key.revoked", "key.destroyed", "hold.set", "keyset.drained", "alarm.raised"] {
        assert!(seen.contains(event), "{event} was not sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_exchanged_by_a_reload_and_show_nowhere() {
    let receiver = Receiver::start().await;
    let url = format!("{}?sig=confidential-query", receiver.url());
    let daemon = start(SLOW, &notice("ops", &url, "events = [\"hold.*\"]")).await;
    let hold = async |daemon: &Daemon| {
        daemon.admin(Method::PUT, "/keysets/default/hold", Some(json!({ "reason": "r" }))).await;
    };
    hold(&daemon).await;
    let first = receiver.took("the first", |_| true).await;
    assert_eq!(first.target, "/hook?sig=confidential-query");
    verify(std::slice::from_ref(&first), SECRET);

    // Both secrets for a while; the receiver may go over to the new one whenever it likes.
    std::fs::write(daemon.path("ops.secret"), format!("{OTHER}\n{SECRET}\n")).unwrap();
    daemon.signal(Signal::HUP);
    daemon.log_line("the reload", |line| line.message() == "configuration reloaded").await;
    hold(&daemon).await;
    let second = receiver.took("the second", |it| it.id() != first.id()).await;
    verify(std::slice::from_ref(&second), SECRET);
    verify(std::slice::from_ref(&second), OTHER);

    // 410: nothing more, until the configuration is reloaded.
    receiver.always(Some(Reply::Status(410, "")));
    hold(&daemon).await;
    daemon.log_line("the receiver's wish", |line| line.message().contains("wants no more")).await;
    let received = receiver.received().len();
    receiver.always(None);
    hold(&daemon).await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert_eq!(receiver.received().len(), received, "it was told although it wanted no more");
    let shown = daemon.admin(Method::GET, "/keysets/default", None).await.json();
    assert_eq!(shown["alarms"], json!(["notice_failing"]));
    std::fs::write(daemon.path("ops.secret"), format!("{OTHER}\n")).unwrap();
    daemon.signal(Signal::HUP);
    eventually("what came meanwhile", PATIENCE, async || (receiver.taken().len() == 4).then_some(())).await;
    verify(&receiver.taken()[2..], OTHER);

    // A receiver that cannot be reached says so, without its address.
    receiver.always(Some(Reply::BreakOff));
    hold(&daemon).await;
    daemon.log_line("a failure", |line| line.message().contains("could not be delivered")).await;
    let output = daemon.command(&["notice", "test"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("ops: not delivered"), "{told}");
    receiver.always(None);
    let output = daemon.command(&["notice", "test", "ops"]).output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("ops: delivered, it answers 204"));
    let test = receiver.took("the test notice", |it| it.event() == "notice.test").await;
    verify(&[test], OTHER);
    assert_eq!(daemon.command(&["notice", "test", "nobody"]).output().unwrap().status.code(), Some(2));

    let logs = daemon.logs().join("\n") + &told;
    for secret in [SECRET, OTHER, &SECRET[6..], &OTHER[6..], "confidential-query"] {
        assert!(!logs.contains(secret), "{secret} shows");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_that_is_refused_as_such_makes_way() {
    let receiver = Receiver::start().await;
    let daemon = start(SLOW, &notice("ops", &receiver.url(), "events = [\"hold.*\"]\ngive_up_after = \"1s\"")).await;
    receiver.refuse("hold.set");
    daemon.admin(Method::PUT, "/keysets/default/hold", Some(json!({ "reason": "r" }))).await;
    daemon.admin(Method::DELETE, "/keysets/default/hold", None).await;
    receiver.took("the next one", |it| it.event() == "hold.ended").await;
    assert!(!receiver.taken().iter().any(|it| it.event() == "hold.set"));
    let metrics = daemon.metrics().await;
    assert_eq!(metrics.sum("jwksd_notices_total", &[("outcome", "dropped")]), Some(1.0));
}
