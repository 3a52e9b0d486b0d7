//! What DESIGN §10 says happens when AWS KMS is away, slow, throttles or refuses.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::time::Instant;

use super::{Trial, request};
use crate::support::kms_proxy::Fault;
use crate::support::strict_verifier::{Expected, StrictVerifier};
use crate::support::{Answer, PATIENCE, eventually};

fn slug(answer: &Answer) -> String {
    answer.json()["type"].as_str().unwrap_or_default().trim_start_matches("urn:jwksd:problem:").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn down_at_start_it_serves_its_jwks_and_signs_once_kms_is_back() {
    for (fault, problem) in [(Fault::LoseRequest, "backend-unavailable"), (Fault::Hang, "backend-timeout")] {
        let mut trial = Trial::start().await;
        let kids = trial.jwks_kids().await;
        trial.daemon.sigterm().await;
        trial.proxy.always("*", fault.clone());
        trial.daemon.start_process().await;
        assert_eq!(trial.jwks_kids().await, kids);
        trial.daemon.ready().await;
        assert_eq!(trial.daemon.get("ops", "/readyz/sign").await.status, 503, "{fault:?}");
        let refused = trial.daemon.sign_answer("main", request()).await;
        assert_eq!((refused.status, slug(&refused).as_str()), (503, problem), "{}", refused.text);
        assert!(refused.headers.contains_key("retry-after"), "{:?}", refused.headers);
        let shown = trial.daemon.admin(Method::GET, "/keysets/main", None).await.json();
        assert_eq!(shown["health"], "failing", "{shown}");
        trial.proxy.clear();
        // No request asks meanwhile: the daemon finds out by itself.
        trial.signs().await;
        trial.daemon.sign("main", request()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_at_the_first_start_it_opens_its_listeners_and_makes_its_keys_later() {
    let mut trial = Trial::prepare().await;
    trial.proxy.always("*", Fault::Hang);
    let began = Instant::now();
    trial.daemon.start_process().await;
    // A call that hangs is given up after 15 s: nothing waited for one.
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    let jwks = trial.daemon.get("public", "/.well-known/jwks.json").await;
    assert_eq!((jwks.status, jwks.headers["cache-control"].to_str().unwrap()), (503, "no-store"));
    let refused = trial.daemon.sign_answer("main", request()).await;
    assert_eq!((refused.status, slug(&refused).as_str()), (503, "no-active-key"));
    trial.proxy.clear();
    trial.settled().await;
    trial.daemon.sign("main", request()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_a_kms_that_hangs() {
    let mut trial = Trial::start().await;
    trial.proxy.next("DescribeKey", 1, Fault::HoldRequest);
    assert_eq!(trial.rotate().await.status, 200);
    trial.proxy.held().await;
    let began = Instant::now();
    assert!(trial.daemon.sigterm().await.success());
    // The call itself is given up after 15 s.
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_has_its_answer_and_its_reason() {
    let trial = Trial::start().await;
    let kids = trial.jwks_kids().await;
    for (fault, problem, reason, outcome) in [
        (Fault::LoseRequest, "backend-unavailable", "backend_unavailable", "unavailable"),
        (Fault::Fail, "backend-unavailable", "backend_unavailable", "unavailable"),
        (Fault::Throttle, "backend-throttled", "backend_throttled", "throttled"),
        (Fault::Deny, "backend-denied", "backend_denied", "denied"),
        // 2 s for each signature: longer than an attempt may take.
        (Fault::Delay(Duration::from_secs(2)), "backend-timeout", "backend_timeout", "timeout"),
        (Fault::Hang, "backend-timeout", "backend_timeout", "timeout"),
        // Verified before it leaves; the service itself had no failure.
        (Fault::SpoilSignature, "verification-failed", "verification_failed", "ok"),
    ] {
        let before = trial.failures(reason).await;
        trial.proxy.always("Sign", fault.clone());
        let refused = trial.daemon.sign_answer("main", request()).await;
        assert_eq!((refused.status, slug(&refused).as_str()), (503, problem), "{fault:?}: {}", refused.text);
        assert!(refused.headers.contains_key("retry-after"), "{fault:?}");
        assert!(!refused.text.contains("arn:"), "the cause is for the log: {}", refused.text);
        assert_eq!(trial.failures(reason).await, before + 1.0, "{fault:?}");
        let counted = [("backend", "aws-kms"), ("operation", "sign"), ("outcome", outcome)];
        let counted = trial.daemon.metrics().await.sum("jwksd_backend_requests_total", &counted);
        assert!(counted.unwrap() >= 1.0, "{fault:?}");
        assert_eq!(trial.jwks_kids().await, kids);
        trial.proxy.clear();
        trial.signs().await;
    }
    let retries = trial.proxy.count("Sign");
    trial.proxy.nth("Sign", 1, Fault::Fail);
    trial.daemon.sign("main", request()).await;
    assert_eq!(trial.proxy.count("Sign"), retries + 2, "one failure is retried within the deadline");
}

#[tokio::test(flavor = "multi_thread")]
async fn throttling_is_retried_but_never_a_storm() {
    let trial = Trial::start().await;
    let ask = async |times: usize| {
        let answers = join_all((0..times).map(|_| trial.daemon.sign_answer("main", request()))).await;
        let mut counted: BTreeMap<String, usize> = BTreeMap::new();
        for answer in answers {
            let what = if answer.status == 200 { "signed".to_owned() } else { slug(&answer) };
            *counted.entry(what).or_default() += 1;
        }
        counted
    };
    // Half of all calls: nearly everybody gets a token, in time.
    trial.proxy.each("Sign", 2, Fault::Throttle);
    let half = ask(60).await;
    assert!(half.get("signed").is_some_and(|signed| *signed >= 50), "{half:?}");
    assert!(half.keys().all(|what| what == "signed" || what == "backend-throttled"), "{half:?}");
    // All of them: each request is sent once, and a bounded number of retries in all.
    trial.proxy.clear();
    trial.proxy.always("Sign", Fault::Throttle);
    trial.proxy.forget_calls();
    let all = ask(300).await;
    assert_eq!(all, BTreeMap::from([("backend-throttled".to_owned(), 300)]));
    let sent = trial.proxy.count("Sign");
    assert!((300..=300 + 100 + 5).contains(&sent), "{sent} calls for 300 requests");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_needs_no_kms_and_its_successor_comes_when_kms_is_back() {
    let trial = Trial::start().await;
    let before = trial.jwks_kids().await;
    trial.proxy.always("*", Fault::LoseRequest);
    let rotated = trial.rotate().await;
    assert_eq!(rotated.status, 200, "{}", rotated.text);
    assert_eq!(trial.jwks_kids().await, before, "the next key cannot be made yet");
    eventually("a failed creation to be counted", PATIENCE, async || {
        let labels = [("keyset", "main"), ("step", "create"), ("reason", "backend")];
        let failed = trial.daemon.metrics().await.sum("jwksd_rotation_failures_total", &labels);
        failed.filter(|failed| *failed >= 1.0).map(|_| ())
    })
    .await;
    trial.proxy.clear();
    trial.settled().await;
    assert_eq!(trial.jwks_kids().await.len(), 4);
    trial.daemon.sign("main", request()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destruction_is_tried_until_it_is_confirmed() {
    let trial = Trial::start().await;
    let revoked = trial.keys().await.iter().find(|key| key["serial"] == 3).unwrap()["kid"].clone();
    trial.proxy.next("DisableKey", 1, Fault::Deny);
    trial.proxy.next("ScheduleKeyDeletion", 2, Fault::LoseRequest);
    let path = format!("/keysets/main/keys/{}/revoke", revoked.as_str().unwrap());
    assert_eq!(trial.daemon.admin(Method::POST, &path, Some(json!({ "reason": "a test" }))).await.status, 200);
    eventually("the key to be pending deletion", PATIENCE, async || {
        let keys = super::account::keys(&trial.account).await;
        let key = keys.iter().find(|key| key.tag("jwksd:serial") == "3").unwrap();
        (key.state == aws_sdk_kms::types::KeyState::PendingDeletion).then_some(())
    })
    .await;
    let labels = [("keyset", "main"), ("step", "destroy"), ("reason", "backend")];
    let failed = trial.daemon.metrics().await.sum("jwksd_rotation_failures_total", &labels);
    assert!(failed.unwrap() >= 2.0, "{failed:?}");
    let scheduled = trial.proxy.calls().into_iter().rfind(|call| call.operation == "ScheduleKeyDeletion").unwrap();
    assert_eq!(scheduled.status, Some(200));
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_aws_never_show_at_any_level() {
    const SESSION_TOKEN: &str = "session-token-that-nobody-may-read";
    let mut trial = Trial::prepare().await;
    trial.daemon.set_env("JWKSD__LOG__LEVEL", Some("trace"));
    trial.daemon.set_env("AWS_SESSION_TOKEN", Some(SESSION_TOKEN));
    trial.daemon.restart().await;
    trial.settled().await;
    trial.proxy.always("Sign", Fault::Deny);
    let refused = trial.daemon.sign_answer("main", request()).await;
    let metrics = trial.daemon.metrics().await.0;
    let logs = trial.daemon.logs();
    assert!(logs.iter().any(|line| line.contains("\"TRACE\"")), "it logs at that level");
    for secret in [SESSION_TOKEN, "not-a-secret", "AWS4-HMAC-SHA256"] {
        assert!(!refused.text.contains(secret) && !metrics.contains(secret), "{secret}");
        let line = logs.iter().find(|line| line.contains(secret));
        assert!(line.is_none(), "{secret}: {line:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_larger_than_what_kms_signs_is_signed() {
    let trial = Trial::start().await;
    let claims = json!({ "sub": "alice", "aud": "https://api.example.test", "note": "x".repeat(12_000) });
    let signed = trial.daemon.sign("main", json!({ "claims": claims })).await;
    assert!(signed.token.len() > 3 * 4096);
    let jwks = trial.daemon.url("public", "/.well-known/jwks.json");
    let mut verifier = StrictVerifier::new(jwks, Duration::ZERO);
    let expected = Expected {
        iss: "https://issuer.example.test".to_owned(),
        aud: "https://api.example.test".to_owned(),
        alg: "ES256".to_owned(),
    };
    verifier.verify(&signed.token, &expected).await.unwrap();
}

/// How long one request of each kind takes, in the middle of several.
async fn latency(trial: &Trial) -> Duration {
    let mut took = Vec::new();
    for _ in 0..21 {
        let began = Instant::now();
        assert_eq!(trial.daemon.get("public", "/.well-known/jwks.json").await.status, 200);
        assert_eq!(trial.daemon.admin(Method::GET, "/keysets/main", None).await.status, 200);
        took.push(began.elapsed());
    }
    took.sort();
    took[took.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_signatures_while_kms_hangs_leaves_the_rest_in_peace() {
    let trial = Trial::start().await;
    let idle = latency(&trial).await;
    trial.proxy.always("Sign", Fault::Hang);
    let flood = join_all((0..400).map(|_| trial.daemon.sign_answer("main", request())));
    let calm = async {
        // The flood has arrived when all places are taken.
        eventually("the flood to reach KMS", PATIENCE, async || (trial.proxy.count("Sign") >= 100).then_some(())).await;
        latency(&trial).await
    };
    let (answers, flooded) = tokio::join!(flood, calm);
    assert!(answers.iter().all(|answer| answer.status == 503));
    // The service hangs for seconds; on a busy machine an idle run takes its time too.
    let bound = (idle * 20).max(Duration::from_millis(250));
    assert!(flooded < bound, "idle {idle:?}, during the flood {flooded:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_gone_is_told_apart_from_a_service_that_is_away() {
    let trial = Trial::start().await;
    let before = trial.failures("key_disabled").await;
    trial.proxy.nth("Sign", 1, Fault::Refuse("NotFoundException"));
    let refused = trial.daemon.sign_answer("main", request()).await;
    assert_eq!((refused.status, slug(&refused).as_str()), (503, "key-disabled"), "{}", refused.text);
    assert_eq!(trial.failures("key_disabled").await, before + 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_revoked_while_it_signs_signs_nothing_that_leaves() {
    let trial = Trial::start().await;
    let active = trial.daemon.sign("main", request()).await.kid;
    trial.proxy.forget_calls();
    // Less than an attempt may take.
    trial.proxy.always("Sign", Fault::Delay(Duration::from_millis(600)));
    let signing = join_all((0..8).map(|_| trial.daemon.sign_answer("main", request())));
    let revoking = async {
        eventually("the signatures to reach KMS", PATIENCE, async || (trial.proxy.count("Sign") >= 8).then_some(()))
            .await;
        let path = format!("/keysets/main/keys/{active}/revoke");
        let body = json!({ "reason": "a test" });
        let answer = trial.daemon.admin(Method::POST, &path, Some(body)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    };
    let (answers, ()) = tokio::join!(signing, revoking);
    for answer in answers {
        // Signed by the successor, or not at all.
        assert!([200, 503].contains(&answer.status), "{}", answer.text);
        assert!(answer.status != 200 || answer.json()["kid"] != active.as_str(), "{}", answer.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_deleted_after_the_configured_days_and_never_while_published() {
    let trial = Trial::start().await;
    assert_eq!(trial.rotate().await.status, 200);
    trial.settled().await;
    let revoked = trial.keys().await.iter().find(|key| key["serial"] == 3).unwrap()["kid"].clone();
    let path = format!("/keysets/main/keys/{}/revoke", revoked.as_str().unwrap());
    assert_eq!(trial.daemon.admin(Method::POST, &path, Some(json!({ "reason": "a test" }))).await.status, 200);
    eventually("the deletion", PATIENCE, async || (trial.proxy.count("ScheduleKeyDeletion") >= 1).then_some(())).await;
    let calls = trial.proxy.calls();
    let ended = ["DisableKey", "ScheduleKeyDeletion"];
    let of_three = super::account::keys(&trial.account).await;
    let of_three = of_three.iter().find(|key| key.tag("jwksd:serial") == "3").unwrap();
    for call in calls.iter().filter(|call| ended.contains(&call.operation.as_str())) {
        assert_eq!(call.key, of_three.arn, "the retired key is published still");
        assert!(call.operation == "DisableKey" || call.body["PendingWindowInDays"] == 7, "{call:?}");
    }
    assert!(!trial.jwks_kids().await.contains(revoked.as_str().unwrap()));
}
