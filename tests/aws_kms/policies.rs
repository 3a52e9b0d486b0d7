//! The least IAM policies of deploy/aws, held against the calls that are made.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{Trial, request};
use crate::support::kms_proxy::{Call, Fault};
use crate::support::{PATIENCE, eventually, tools};

fn policy(name: &str) -> Value {
    let path = tools::repository("deploy/aws").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// What a policy allows; none of it with a wildcard, each for some resource.
fn allowed(name: &str) -> BTreeSet<String> {
    let policy = policy(name);
    assert_eq!(policy["Version"], "2012-10-17");
    let mut actions = BTreeSet::new();
    for statement in policy["Statement"].as_array().unwrap() {
        assert_eq!(statement["Effect"], "Allow");
        assert!(statement["Resource"].is_string());
        for action in statement["Action"].as_array().unwrap() {
            let action = action.as_str().unwrap().strip_prefix("kms:").expect("it is about KMS");
            assert!(!action.contains('*'), "{name}: {action}");
            actions.insert(action.to_owned());
        }
    }
    actions
}

fn made(calls: &[Call]) -> BTreeSet<String> {
    calls.iter().map(|call| call.operation.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backends_policies_allow_what_is_called_and_nothing_else() {
    let mut trial = Trial::prepare().await;
    // An answer that is lost leaves a key behind, so that clean-up has something to do.
    trial.proxy.nth("CreateKey", 1, Fault::LoseAnswer);
    trial.daemon.restart().await;
    trial.settled().await;
    eventually("the leftover to be found", PATIENCE, async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        (trial.proxy.count("ScheduleKeyDeletion") == 1).then_some(())
    })
    .await;
    let revoked = trial.keys().await.iter().find(|key| key["serial"] == 3).unwrap()["kid"].clone();
    let path = format!("/keysets/main/keys/{}/revoke", revoked.as_str().unwrap());
    assert_eq!(trial.daemon.admin(Method::POST, &path, Some(json!({ "reason": "a test" }))).await.status, 200);
    eventually("its key to be destroyed", PATIENCE, async || {
        (trial.proxy.count("ScheduleKeyDeletion") == 2).then_some(())
    })
    .await;
    trial.daemon.sign("main", request()).await;
    let mut called = made(&trial.proxy.calls());
    // CreateKey with tags asks for this permission too (AWS KMS Developer Guide, "CreateKey").
    called.insert("TagResource".to_owned());
    assert_eq!(allowed("backend-manager"), called);
    assert!(trial.proxy.calls().iter().all(|call| !call.key.starts_with("alias/") || call.operation != "Sign"));
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_needs_one_permission() {
    let mut trial = Trial::prepare().await;
    trial.daemon.set_tables(&super::tables(&trial.proxy, "24h"));
    trial.daemon.restart().await;
    trial.settled().await;
    trial.proxy.forget_calls();
    for _ in 0..3 {
        trial.daemon.sign("main", request()).await;
    }
    // The one look for leftovers at the start may still be under way.
    let calls: Vec<Call> = trial.proxy.calls().into_iter().filter(|call| call.operation != "ListKeys").collect();
    assert_eq!(allowed("backend-signer"), made(&calls));
}

/// The calls of the seal are few enough to be read off its source.
#[test]
fn the_seals_policies_allow_a_key_to_wrap_and_unwrap_only() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(allowed("seal-manager"), set(&["DescribeKey", "Encrypt", "Decrypt"]));
    assert_eq!(allowed("seal-signer"), set(&["DescribeKey", "Decrypt"]));
}
