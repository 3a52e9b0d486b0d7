//! A key that somebody disables in AWS KMS while it signs: confirmed, replaced by one that just signed, once an hour.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

use reqwest::Method;
use serde_json::{Value, json};
use support::localstack::{Account, LocalStack, REGION};
use support::{Daemon, PATIENCE, eventually};

async fn start(account: &Account) -> Daemon {
    let mut builder = Daemon::builder().tables(&format!(
        "[issuer.main]\nurl = \"http://127.0.0.1:8620\"\nmax_age = \"1s\"\n\n\
         [backend.aws-kms]\nregion = \"{REGION}\"\nendpoint_url = \"{}\"\n\n\
         [keyset.a]\nalgorithm = \"ES256\"\nbackend = \"aws-kms\"\n\n\
         [keyset.a.rotation]\nevery = \"1h\"\npropagation = \"1600ms\"\nsuccessors = 2\n\n\
         [keyset.a.tokens]\nmax_ttl = \"2s\"\ndefault_ttl = \"1s\"\nclock_skew = \"500ms\"\n",
        account.endpoint
    ));
    for (name, value) in account.environment() {
        builder = builder.env(name, &value);
    }
    builder.start().await
}

/// The ARN of the key with this serial, by its alias.
async fn key_of(account: &Account, serial: u64) -> String {
    let aliases = account.client.list_aliases().send().await.unwrap();
    let wanted = format!("/a/{serial}");
    let alias = aliases.aliases().iter().find(|alias| alias.alias_name().unwrap().ends_with(&wanted));
    alias.unwrap().target_key_id().unwrap().to_owned()
}

async fn view(daemon: &Daemon) -> Value {
    daemon.admin(Method::GET, "/keysets/a", None).await.json()
}

async fn active(daemon: &Daemon) -> u64 {
    let view = view(daemon).await;
    let keys = view["keys"].as_array().unwrap();
    keys.iter().find(|key| key["state"] == "active").unwrap()["serial"].as_u64().unwrap()
}

async fn standbys(daemon: &Daemon, count: usize) {
    eventually("propagated successors", PATIENCE, async || {
        let view = view(daemon).await;
        let standby = view["keys"].as_array().unwrap().iter().filter(|key| key["state"] == "standby").count();
        (standby >= count).then_some(())
    })
    .await;
}

fn request() -> Value {
    json!({ "claims": { "sub": "s", "aud": "https://api.example" } })
}

#[tokio::test]
async fn a_disabled_key_is_replaced_by_a_successor_that_signs_at_most_once_an_hour() {
    let account = LocalStack::shared().await.account();
    let daemon = start(&account).await;
    standbys(&daemon, 2).await;
    let before = daemon.sign("a", request()).await.kid;
    let first = active(&daemon).await;
    // The oldest successor is disabled too: the next one signs.
    account.client.disable_key().key_id(key_of(&account, first + 1).await).send().await.unwrap();
    account.client.disable_key().key_id(key_of(&account, first).await).send().await.unwrap();

    let refused = daemon.sign_answer("a", request()).await;
    assert_eq!(refused.status, 503, "{}", refused.text);
    assert_eq!(refused.json()["type"], "urn:jwksd:problem:key-disabled");
    assert!(refused.headers.contains_key("retry-after"));
    let after = eventually("a successor to sign", PATIENCE, async || {
        let answer = daemon.sign_answer("a", request()).await;
        (answer.status == 200).then(|| answer.json()["kid"].as_str().unwrap().to_owned())
    })
    .await;
    assert_ne!(after, before);
    assert_eq!(active(&daemon).await, first + 2);
    let jwks = daemon.get("public", "/.well-known/jwks.json").await.text;
    assert!(jwks.contains(&before) && jwks.contains(&after), "what it signed is still valid: {jwks}");
    let audit = daemon.admin(Method::GET, "/audit", None).await.json();
    let switched = |item: &&Value| item["action"] == "promoted" && item["reason"] == "key_disabled";
    let entries: Vec<&Value> = audit["items"].as_array().unwrap().iter().filter(switched).collect();
    assert_eq!(entries.len(), 1, "{audit}");
    assert_eq!((&entries[0]["actor"], &entries[0]["kids"]), (&json!("jwksd"), &json!([after])));
    let metrics = daemon.metrics().await;
    let switches = [("keyset", "a"), ("trigger", "key_disabled")];
    assert_eq!(metrics.sum("jwksd_rotations_total", &switches), Some(1.0));
    assert!(metrics.sum("jwksd_signing_failures_total", &[("keyset", "a"), ("reason", "key_disabled")]) >= Some(1.0));

    // Again within the hour: it stays, and says so.
    standbys(&daemon, 2).await;
    let key = key_of(&account, first + 2).await;
    account.client.disable_key().key_id(&key).send().await.unwrap();
    eventually("the alarm", PATIENCE, async || {
        assert_eq!(daemon.sign_answer("a", request()).await.status, 503, "no other key signs");
        let alarms = view(&daemon).await["alarms"].clone();
        alarms.as_array().unwrap().contains(&json!("key_disabled")).then_some(())
    })
    .await;
    assert_eq!(active(&daemon).await, first + 2);
    assert_eq!(daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "key_disabled")]), Some(1.0));

    account.client.enable_key().key_id(&key).send().await.unwrap();
    eventually("the enabled key to sign", PATIENCE, async || {
        let answer = daemon.sign_answer("a", request()).await;
        (answer.status == 200).then(|| assert_eq!(answer.json()["kid"], after.as_str()))
    })
    .await;
    eventually("no alarm", PATIENCE, async || {
        let alarms = view(&daemon).await["alarms"].clone();
        (!alarms.as_array().unwrap().contains(&json!("key_disabled"))).then_some(())
    })
    .await;
}
