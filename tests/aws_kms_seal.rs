//! Local keys under a seal in AWS KMS: the real binary, LocalStack, and a proxy between them that loses, delays and
//! refuses calls.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use support::kms_proxy::{Fault, KmsProxy};
use support::localstack::{Account, LocalStack, REGION};
use support::{Daemon, PATIENCE, Process, eventually};

/// From the moment that KMS answers again to the first signature.
const BACK_WITHIN: Duration = Duration::from_secs(10);

/// Listeners open within two seconds; the rest is for a busy machine to start a process.
const OPEN_WITHIN: Duration = Duration::from_secs(5);

struct Trial {
    daemon: Daemon,
    proxy: KmsProxy,
    account: Account,
    /// The ARN of the seal's key.
    key: String,
}

impl Trial {
    /// Nothing is started; no rotation comes due.
    async fn prepare() -> Trial {
        Trial::with(&keysets("1h", "2s")).await
    }

    async fn with(keysets: &str) -> Trial {
        let account = LocalStack::shared().await.account();
        let proxy = KmsProxy::before(&account.endpoint).await;
        let key = account.symmetric_key().await;
        let mut builder = Daemon::builder().seal(&sealed_by(&key)).tables(keysets);
        builder =
            builder.tables(&format!("[backend.aws-kms]\nregion = \"{REGION}\"\nendpoint_url = \"{}\"\n", proxy.url()));
        for (name, value) in account.environment() {
            builder = builder.env(name, &value);
        }
        Trial { daemon: builder.prepare(), proxy, account, key }
    }

    /// Initialised, stopped, and KMS out of reach.
    async fn stopped_with(fault: Fault) -> Trial {
        let mut trial = Trial::prepare().await;
        trial.daemon.restart().await;
        trial.signs("a").await;
        trial.signs("b").await;
        trial.daemon.sigterm().await;
        trial.proxy.always("*", fault);
        trial
    }

    async fn signs(&self, keyset: &str) -> String {
        let ask = async || {
            let answer = self.daemon.sign_answer(keyset, request()).await;
            (answer.status == 200).then(|| answer.json()["kid"].as_str().unwrap().to_owned())
        };
        eventually(&format!("{keyset} to sign"), BACK_WITHIN, ask).await
    }

    async fn jwks(&self) -> Vec<String> {
        let answer = self.daemon.get("public", "/.well-known/jwks.json").await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let keys = answer.json()["keys"].as_array().unwrap().clone();
        let mut kids: Vec<String> = keys.iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect();
        kids.sort();
        kids
    }

    async fn alarms(&self, keyset: &str) -> Value {
        self.daemon.admin(Method::GET, &format!("/keysets/{keyset}"), None).await.json()["alarms"].clone()
    }

    /// Every file of the store but the lock, byte for byte.
    fn stored(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.daemon.path("keyrings")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if !path.ends_with("_lock") {
                    files.insert(path.display().to_string(), std::fs::read(&path).unwrap());
                }
            }
        }
        files
    }

    /// On a thread of its own: the proxy runs on this one.
    async fn reseal(&self) -> std::process::Output {
        let mut command = self.daemon.command(&["reseal"]);
        tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap()
    }
}

impl Account {
    async fn symmetric_key(&self) -> String {
        let made = self.client.create_key().send().await.unwrap();
        made.key_metadata.unwrap().arn.unwrap()
    }
}

fn sealed_by(key_id: &str) -> String {
    format!("kind = \"aws-kms\"\nkey_id = \"{key_id}\"")
}

fn request() -> Value {
    json!({ "claims": { "sub": "s", "aud": "https://api.example" } })
}

/// `a` and `b` of one issuer.
fn keysets(every: &str, max_ttl: &str) -> String {
    format!(
        "[issuer.main]\nurl = \"http://127.0.0.1:8620\"\nmax_age = \"1s\"\n\n\
         [defaults.rotation]\nevery = \"{every}\"\npropagation = \"1600ms\"\nsuccessors = 1\n\n\
         [defaults.tokens]\nmax_ttl = \"{max_ttl}\"\ndefault_ttl = \"1s\"\nclock_skew = \"500ms\"\n\n\
         [keyset.a]\nalgorithm = \"ES256\"\n\n[keyset.b]\nalgorithm = \"ES256\"\n"
    )
}

#[tokio::test]
async fn while_kms_is_away_the_daemon_serves_its_jwks_and_nothing_else_and_signs_soon_after() {
    let mut trial = Trial::prepare().await;
    trial.daemon.restart().await;
    let kids = [trial.signs("a").await, trial.signs("b").await];
    eventually("two successors", PATIENCE, async || (trial.jwks().await.len() == 4).then_some(())).await;
    let jwks = trial.jwks().await;
    trial.daemon.sigterm().await;
    let stored = trial.stored();
    trial.proxy.always("*", Fault::LoseRequest);
    tokio::time::timeout(OPEN_WITHIN, trial.daemon.start_process()).await.expect("it opens after the first failure");

    assert_eq!(trial.jwks().await, jwks);
    assert_eq!(trial.daemon.get("ops", "/readyz").await.status, 200);
    let unready = trial.daemon.get("ops", "/readyz/sign").await;
    assert_eq!(unready.status, 503);
    assert!(unready.text.contains("the seal has not been opened yet"), "{}", unready.text);
    let refused = trial.daemon.sign_answer("a", request()).await;
    assert_eq!(refused.status, 503);
    assert_eq!(refused.json()["type"], "urn:jwksd:problem:seal-unavailable");
    assert_eq!(refused.headers["retry-after"], "5");
    for (method, path) in [
        (Method::POST, "/keysets/a/rotate"),
        (Method::POST, "/keysets/b/compromise"),
        (Method::PUT, "/keysets/a/hold"),
        (Method::POST, "/reload"),
    ] {
        let answer = trial.daemon.admin(method, path, Some(json!({ "reason": "test" }))).await;
        assert_eq!(answer.status, 503, "{path}: {}", answer.text);
        assert_eq!(answer.json()["type"], "urn:jwksd:problem:seal-unavailable", "{path}");
        assert!(answer.headers.contains_key("retry-after"), "{path}");
    }
    assert_eq!(trial.alarms("a").await, json!(["unauthenticated"]));
    let metrics = trial.daemon.metrics().await;
    assert_eq!(metrics.sum("jwksd_alarms", &[("alarm", "unauthenticated")]), Some(2.0));
    let failures = [("keyset", "a"), ("reason", "backend_unavailable")];
    assert_eq!(metrics.sum("jwksd_signing_failures_total", &failures), Some(1.0));
    assert!(trial.daemon.logs().iter().any(|line| line.contains("the seal cannot be opened")));
    // Several attempts later nothing was written.
    let asked = trial.proxy.calls().len();
    eventually("further attempts", PATIENCE, async || (trial.proxy.calls().len() > asked + 8).then_some(())).await;
    assert_eq!(trial.stored(), stored);

    trial.proxy.clear();
    assert_eq!([trial.signs("a").await, trial.signs("b").await], kids);
    assert_eq!(trial.jwks().await, jwks);
    assert_eq!(trial.alarms("a").await, json!([]));
    assert_eq!(trial.daemon.get("ops", "/readyz/sign").await.status, 200);
    let rotated =
        trial.daemon.admin(Method::POST, "/keysets/a/rotate", Some(json!({ "allow_unpropagated": true }))).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
}

#[tokio::test]
async fn a_record_changed_while_the_seal_is_away_is_not_served_any_more_once_it_opens() {
    let mut trial = Trial::stopped_with(Fault::LoseRequest).await;
    trial.daemon.start_process().await;
    let served = trial.jwks().await;
    let file = trial.daemon.path("keyrings/a.json");
    let forged = std::fs::read_to_string(&file).unwrap().replacen("\"successors\": 1", "\"successors\": 2", 1);
    std::fs::write(&file, &forged).unwrap();
    assert_eq!(trial.jwks().await, served);

    trial.proxy.clear();
    trial.signs("b").await;
    let left = trial.jwks().await;
    assert!(left.len() * 2 == served.len() && left.iter().all(|kid| served.contains(kid)), "{left:?} of {served:?}");
    let alarms = trial.alarms("a").await;
    assert!(
        ["frozen", "unauthenticated"].iter().all(|alarm| alarms.as_array().unwrap().contains(&json!(alarm))),
        "{alarms}"
    );
    assert_eq!(trial.alarms("b").await, json!([]));
    assert_eq!(trial.daemon.sign_answer("a", request()).await.status, 503);
    assert_eq!(trial.daemon.admin(Method::POST, "/keysets/a/rotate", None).await.status, 409);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), forged, "nothing is written over it");
    assert!(trial.daemon.logs().iter().any(|line| line.contains("failed its check") && line.contains("a.json")));
}

#[tokio::test]
async fn a_kms_that_hangs_at_the_start_does_not_hold_up_the_listeners() {
    let mut trial = Trial::stopped_with(Fault::Hang).await;
    tokio::time::timeout(OPEN_WITHIN, trial.daemon.start_process()).await.expect("listeners open after two seconds");
    assert!(!trial.jwks().await.is_empty());
    assert_eq!(trial.daemon.sign_answer("a", request()).await.status, 503);
    trial.proxy.clear();
    trial.signs("a").await;
}

#[tokio::test]
async fn access_denied_at_the_start_is_told_and_tried_again() {
    let mut trial = Trial::stopped_with(Fault::Deny).await;
    trial.daemon.start_process().await;
    assert!(!trial.jwks().await.is_empty());
    trial.daemon.log_line("a denied attempt", |line| line.0.to_string().contains("access denied")).await;
    trial.proxy.clear();
    trial.signs("b").await;
}

#[tokio::test]
async fn a_first_start_without_kms_waits_and_then_begins() {
    let mut trial = Trial::prepare().await;
    trial.proxy.always("*", Fault::LoseRequest);
    trial.daemon.start_process().await;
    let answer = trial.daemon.get("public", "/.well-known/jwks.json").await;
    assert_eq!((answer.status, answer.headers["cache-control"].to_str().unwrap()), (503, "no-store"));
    assert_eq!(trial.daemon.get("ops", "/readyz").await.status, 503);
    assert_eq!(trial.daemon.sign_answer("a", request()).await.status, 503);
    assert_eq!(trial.stored().len(), 1, "the mark of an initialisation: {:?}", trial.stored().keys());
    trial.daemon.kill9().await;

    // It goes on where it was, in another process as in the same.
    trial.daemon.start_process().await;
    assert_eq!(trial.daemon.get("ops", "/readyz").await.status, 503);
    trial.proxy.clear();
    trial.daemon.ready().await;
    trial.signs("a").await;
    trial.signs("b").await;
    assert!(trial.stored().keys().all(|name| !name.contains("initialising")), "{:?}", trial.stored().keys());
}

#[tokio::test]
async fn once_started_kms_is_not_needed_through_rotations() {
    let mut trial = Trial::with(&keysets("4s", "2s")).await;
    trial.daemon.restart().await;
    let first = trial.signs("a").await;
    trial.proxy.always("*", Fault::Hang);
    trial.proxy.forget_calls();
    let mut kids = vec![first];
    let rotations = eventually("three rotations", PATIENCE, async || {
        let signed = trial.daemon.sign("a", request()).await;
        if kids.last() != Some(&signed.kid) {
            kids.push(signed.kid);
        }
        (kids.len() > 3).then_some(())
    });
    rotations.await;
    assert_eq!(trial.proxy.calls(), [], "new keys are made and sealed without it");
    // Between a rotation and the next successor there is none; then there is.
    eventually("no alarm", PATIENCE, async || (trial.alarms("a").await == json!([])).then_some(())).await;
}

#[tokio::test]
async fn reseal_moves_between_kinds_of_seals_and_keys_and_may_be_interrupted() {
    let mut trial = Trial::prepare().await;
    trial.daemon.set_seal("kind = \"file\"\npath = \"seal.key\"");
    trial.daemon.restart().await;
    let kid = trial.signs("a").await;
    trial.daemon.sigterm().await;
    assert_eq!(trial.proxy.calls(), [], "AWS is not asked where nothing needs it");

    let file = "kind = \"file\"\npath = \"seal.key\"";
    let other = trial.account.symmetric_key().await;
    trial.account.client.create_alias().alias_name("alias/jwksd-seal").target_key_id(&other).send().await.unwrap();
    let steps = [
        (sealed_by(&trial.key), file.to_owned()),
        (sealed_by("alias/jwksd-seal"), sealed_by(&trial.key)),
        (file.to_owned(), sealed_by("alias/jwksd-seal")),
    ];
    for (to, from) in steps {
        trial.daemon.set_seal(&format!("{to}\n[seal.previous.former]\n{from}"));
        if to.contains("aws-kms") {
            trial.proxy.nth("Encrypt", 1, Fault::HoldAnswer);
            let mut interrupted = Process::start(trial.daemon.command(&["reseal"]));
            trial.proxy.held().await;
            interrupted.child.kill().unwrap();
            drop(interrupted);
            trial.proxy.clear();
        }
        let done = trial.reseal().await;
        assert!(done.status.success(), "{to}: {}", String::from_utf8_lossy(&done.stderr));
        trial.daemon.set_seal(&to);
        trial.daemon.restart().await;
        assert_eq!(trial.signs("a").await, kid, "{to}");
        trial.daemon.sigterm().await;
    }
    // A seal that is not the one which sealed is refused, not retried.
    trial.daemon.set_seal(&sealed_by(&trial.key));
    let status = trial.daemon.try_start().await.unwrap_err();
    assert_eq!(status.code(), Some(1));
    assert!(trial.daemon.logs().iter().any(|line| line.contains("was sealed with the key file:")));
}

#[tokio::test]
async fn an_installation_forged_while_the_seal_is_away_takes_every_key_out_of_service() {
    tokio::join!(
        // An issuer that never was; a data key that the seal did not wrap; something else altogether.
        is_not_served_forged("\"http://127.0.0.1:8620\"", "\"http://127.0.0.1:8629\""),
        is_not_served_forged("\"wrapped\": \"", "\"wrapped\": \"AAAA"),
        is_not_served_forged("{", "["),
    );
}

async fn is_not_served_forged(from: &str, to: &str) {
    let mut trial = Trial::stopped_with(Fault::LoseRequest).await;
    trial.daemon.start_process().await;
    let served = trial.jwks().await;
    let file = trial.daemon.path("keyrings/_installation.json");
    let stored = std::fs::read_to_string(&file).unwrap();
    assert!(stored.contains(from), "{stored}");
    std::fs::write(&file, stored.replacen(from, to, 1)).unwrap();
    let forged = trial.stored();
    assert_eq!(trial.jwks().await, served, "nobody can tell yet");

    trial.proxy.clear();
    eventually("nothing to be served", BACK_WITHIN, async || {
        let answer = trial.daemon.get("public", "/.well-known/jwks.json").await;
        (answer.status == 503).then(|| assert_eq!(answer.headers["cache-control"], "no-store"))
    })
    .await;
    for keyset in ["a", "b"] {
        assert_eq!(trial.daemon.sign_answer(keyset, request()).await.status, 503);
        let alarms = trial.alarms(keyset).await;
        assert!(alarms.as_array().unwrap().contains(&json!("frozen")), "{alarms}");
        let path = format!("/keysets/{keyset}/rotate");
        let refused = trial.daemon.admin(Method::POST, &path, None).await;
        assert_eq!(refused.status, 409, "{}", refused.text);
        assert_eq!(refused.json()["type"], "urn:jwksd:problem:keyset-frozen");
    }
    assert_eq!(trial.daemon.get("ops", "/readyz").await.status, 503);
    assert_eq!(trial.daemon.get("ops", "/livez").await.status, 200);
    trial.daemon.log_line("what to do", |line| line.0.to_string().contains("repair it and restart")).await;
    // Nor is it tried again, and the evidence stays.
    trial.proxy.forget_calls();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(trial.proxy.calls(), []);
    assert_eq!(trial.stored(), forged);
    trial.daemon.sigterm().await;
    let status = trial.daemon.try_start().await.unwrap_err();
    assert_eq!(status.code(), Some(1), "a start refuses it");
    std::fs::write(&file, &stored).unwrap();
    trial.daemon.restart().await;
    trial.signs("a").await;
}

#[tokio::test]
async fn a_kms_that_throttles_every_other_call_delays_a_start_and_nothing_else() {
    let mut trial = Trial::prepare().await;
    let throttles = |trial: &Trial| {
        trial.proxy.nth("*", 1, Fault::Throttle);
        trial.proxy.each("*", 2, Fault::Throttle);
    };
    throttles(&trial);
    trial.daemon.restart().await;
    let kids = [trial.signs("a").await, trial.signs("b").await];
    trial.daemon.sigterm().await;

    trial.proxy.clear();
    trial.proxy.forget_calls();
    throttles(&trial);
    trial.daemon.restart().await;
    assert_eq!([trial.signs("a").await, trial.signs("b").await], kids);
    let refused = trial.proxy.calls().iter().filter(|call| call.status.is_none()).count();
    assert!(refused > 0 && trial.proxy.calls().len() <= 4 * refused, "no storm: {:?}", trial.proxy.calls());

    // While it runs, throttling of every call changes nothing.
    trial.proxy.forget_calls();
    trial.proxy.always("*", Fault::Throttle);
    let rotate = json!({ "allow_unpropagated": true });
    let rotated = trial.daemon.admin(Method::POST, "/keysets/a/rotate", Some(rotate)).await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
    for _ in 0..200 {
        assert_ne!(trial.daemon.sign("a", request()).await.kid, kids[0]);
        assert_eq!(trial.daemon.sign("b", request()).await.kid, kids[1]);
    }
    eventually("a new successor", PATIENCE, async || (trial.alarms("a").await == json!([])).then_some(())).await;
    assert_eq!(trial.proxy.calls(), [], "it is not asked");
    assert_eq!(trial.daemon.metrics().await.sum("jwksd_signing_failures_total", &[]), Some(0.0));
}

/// `jwksd_backend_requests_total` of the seal's service.
async fn counted(daemon: &Daemon, operation: &str, outcome: &str) -> Option<f64> {
    let labels = [("backend", "aws-kms"), ("operation", operation), ("outcome", outcome)];
    daemon.metrics().await.sum("jwksd_backend_requests_total", &labels)
}

#[tokio::test]
async fn calls_of_the_seal_are_counted_by_kind_and_outcome_retries_one_by_one() {
    let mut trial = Trial::prepare().await;
    trial.account.client.create_alias().alias_name("alias/jwksd-seal").target_key_id(&trial.key).send().await.unwrap();
    trial.daemon.set_seal(&sealed_by("alias/jwksd-seal"));
    trial.proxy.next("DescribeKey", 2, Fault::Throttle);
    trial.proxy.next("Encrypt", 1, Fault::Fail);
    trial.daemon.restart().await;
    trial.signs("a").await;
    let answered = |operation: &str| {
        let calls = trial.proxy.calls().into_iter();
        calls.filter(|call| call.operation == operation && call.status == Some(200)).count() as f64
    };
    assert_eq!(counted(&trial.daemon, "describe", "throttled").await, Some(2.0));
    assert_eq!(counted(&trial.daemon, "encrypt", "unavailable").await, Some(1.0));
    for (call, operation) in [("DescribeKey", "describe"), ("Encrypt", "encrypt"), ("Decrypt", "decrypt")] {
        assert_eq!(counted(&trial.daemon, operation, "ok").await, Some(answered(call)), "{call}");
    }
    assert!(answered("DescribeKey") > 0.0 && answered("Encrypt") > 0.0);
    assert_eq!(counted(&trial.daemon, "decrypt", "denied").await, Some(0.0), "there from the start");
    trial.daemon.sigterm().await;

    trial.proxy.forget_calls();
    trial.proxy.next("Decrypt", 1, Fault::Hang);
    trial.proxy.next("Decrypt", 2, Fault::Deny);
    trial.daemon.start_process().await;
    trial.signs("a").await;
    assert_eq!(counted(&trial.daemon, "decrypt", "timeout").await, Some(1.0));
    assert_eq!(counted(&trial.daemon, "decrypt", "denied").await, Some(2.0));
    assert_eq!(counted(&trial.daemon, "decrypt", "ok").await, Some(trial.proxy.count("Decrypt") as f64 - 3.0));
    let durations = [("backend", "aws-kms"), ("operation", "decrypt")];
    let metrics = trial.daemon.metrics().await;
    let timed = metrics.sum("jwksd_backend_request_duration_seconds_count", &durations);
    assert_eq!(timed, Some(trial.proxy.count("Decrypt") as f64));
    let lasted = metrics.sum("jwksd_backend_request_duration_seconds_sum", &durations);
    assert!(lasted > Some(2.0), "{lasted:?}");
}
