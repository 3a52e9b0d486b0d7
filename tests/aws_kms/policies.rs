//! The least IAM policies of deploy/aws, held against the calls that are made.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::{Trial, request};
use crate::support::kms_proxy::{Call, Fault, KmsProxy};
use crate::support::localstack::{LocalStack, REGION};
use crate::support::{Daemon, PATIENCE, eventually, tools};

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
    // A look for leftovers may still be under way, or come late on a busy machine: it makes these calls and no others.
    let looking = ["ListKeys", "ListResourceTags", "DescribeKey", "ListAliases"];
    let calls: Vec<Call> =
        trial.proxy.calls().into_iter().filter(|call| !looking.contains(&call.operation.as_str())).collect();
    assert_eq!(allowed("backend-signer"), made(&calls));
}

/// Every statement in full: a condition that is lost, or an action that moves to another, changes what is allowed.
#[test]
fn each_permission_of_the_backend_has_its_condition() {
    let tagged = |kind: &str| json!({ "Null": { format!("aws:{kind}Tag/jwksd:installation"): "false" } });
    let made = json!({
        "StringEquals": {
            "kms:KeyUsage": "SIGN_VERIFY",
            "kms:KeyOrigin": "AWS_KMS",
            "kms:KeySpec": [
                "ECC_NIST_P256", "ECC_NIST_P384", "ECC_NIST_EDWARDS25519", "RSA_2048", "RSA_3072", "RSA_4096"
            ]
        },
        "Null": { "aws:RequestTag/jwksd:installation": "false" }
    });
    let use_and_end =
        ["DescribeKey", "GetPublicKey", "Sign", "CreateAlias", "DisableKey", "ScheduleKeyDeletion"].as_slice();
    let keys = "arn:aws:kms:*:*:key/*";
    statements(
        "backend-manager",
        &[
            (&["CreateKey"], "*", made),
            (&["TagResource"], keys, tagged("Request")),
            (use_and_end, keys, tagged("Resource")),
            (&["CreateAlias"], "arn:aws:kms:*:*:alias/jwksd/*", Value::Null),
            (&["ListKeys", "ListAliases"], "*", Value::Null),
            (&["ListResourceTags"], keys, Value::Null),
        ],
    );
    let one = json!({ "StringEquals": { "aws:ResourceTag/jwksd:installation": "INSTALLATION" } });
    statements("backend-signer", &[(&["Sign"], keys, one)]);
}

fn statements(name: &str, wanted: &[(&[&str], &str, Value)]) {
    let policy = policy(name);
    let found: Vec<Value> = policy["Statement"].as_array().unwrap().clone();
    let wanted = wanted.iter().zip(&found).map(|((actions, resource, condition), found)| {
        let actions: Vec<String> = actions.iter().map(|action| format!("kms:{action}")).collect();
        let mut statement = json!({ "Sid": found["Sid"], "Effect": "Allow", "Action": actions, "Resource": resource });
        if !condition.is_null() {
            statement["Condition"] = condition.clone();
        }
        statement
    });
    assert_eq!(found, wanted.collect::<Vec<_>>(), "{name}");
}

/// Initialised by one, started again by the other.
#[tokio::test(flavor = "multi_thread")]
async fn the_seals_policies_allow_what_is_called_and_nothing_else() {
    let account = LocalStack::shared().await.account();
    let proxy = KmsProxy::before(&account.endpoint).await;
    let key = account.client.create_key().send().await.unwrap().key_metadata.unwrap().arn.unwrap();
    let tables = format!(
        "[issuer.main]\nurl = \"https://issuer.example.test\"\n\n[keyset.main]\nalgorithm = \"ES256\"\n\n\
         [backend.aws-kms]\nregion = \"{REGION}\"\nendpoint_url = \"{}\"\n",
        proxy.url()
    );
    let mut builder = Daemon::builder().seal(&format!("kind = \"aws-kms\"\nkey_id = \"{key}\"")).tables(&tables);
    for (name, value) in account.environment() {
        builder = builder.env(name, &value);
    }
    let mut daemon = builder.prepare();
    daemon.restart().await;
    assert_eq!(allowed("seal-manager"), made(&proxy.calls()));
    daemon.sigterm().await;
    proxy.forget_calls();
    daemon.restart().await;
    assert_eq!(allowed("seal-signer"), made(&proxy.calls()));
    assert!(proxy.calls().iter().all(|call| call.key == key));
    let one = "arn:aws:kms:REGION:ACCOUNT:key/KEY_ID";
    for name in ["seal-manager", "seal-signer"] {
        assert!(policy(name)["Statement"].as_array().unwrap().iter().all(|statement| statement["Resource"] == one));
    }
}
