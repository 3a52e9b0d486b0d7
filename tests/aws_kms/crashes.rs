//! SIGKILL between every two calls of a creation and of a destruction.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use reqwest::Method;
use serde_json::json;

use super::account::{foreign_key, keys};
use super::{LocalStack, Trial, request};
use crate::support::kms_proxy::Fault;
use crate::support::{PATIENCE, eventually};

/// Trials under way at once.
const AT_ONCE: usize = 3;

/// Every instant at which a creation can die, as the service sees it: before its first change, and after each call.
const CREATION: [(&str, Fault); 7] = [
    ("DescribeKey", Fault::HoldAnswer),
    ("CreateKey", Fault::HoldRequest),
    ("CreateKey", Fault::HoldAnswer),
    ("GetPublicKey", Fault::HoldAnswer),
    ("Sign", Fault::HoldAnswer),
    ("CreateAlias", Fault::HoldRequest),
    ("CreateAlias", Fault::HoldAnswer),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_killed_between_any_two_calls_leaves_one_key_per_serial() {
    let trials = stream::iter(CREATION).map(|(operation, fault)| async move {
        let mut trial = Trial::prepare().await;
        let foreign = foreign_key(&trial.account, &[]).await;
        trial.proxy.nth(operation, 1, fault.clone());
        tokio::select! {
            () = trial.daemon.start_process() => trial.proxy.held().await,
            () = trial.proxy.held() => {}
        }
        trial.daemon.kill9().await;
        trial.proxy.clear();
        trial.daemon.restart().await;
        trial.settled().await;
        one_living_key_per_serial(&trial, 3, &foreign, &format!("{operation} {fault:?}")).await;
        trial.daemon.sign("main", request()).await;
    });
    trials.buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}

/// Waits until each serial has one key, which works, and everything else of ours is on its way out.
async fn one_living_key_per_serial(trial: &Trial, serials: u64, foreign: &str, what: &str) {
    let alive = eventually(&format!("leftovers to be gone: {what}"), PATIENCE, async || {
        let keys = keys(&trial.account).await;
        let alive: Vec<_> = keys.into_iter().filter(super::account::Found::is_alive).collect();
        let ours = alive.iter().filter(|key| key.arn != foreign);
        let leftover = ours.filter(|key| key.aliases.is_empty()).count();
        tokio::time::sleep(Duration::from_millis(200)).await;
        (leftover == 0).then_some(alive)
    })
    .await;
    assert!(alive.iter().any(|key| key.arn == foreign), "{what}: a foreign key was touched");
    let ours: Vec<_> = alive.iter().filter(|key| key.arn != foreign).collect();
    let found: BTreeSet<u64> = ours.iter().map(|key| key.tag("jwksd:serial").parse().unwrap()).collect();
    assert_eq!(found, (1..=serials).collect(), "{what}");
    assert_eq!(ours.len() as u64, serials, "{what}: {ours:#?}");
    let installation = ours[0].tag("jwksd:installation");
    for key in &ours {
        let alias = format!("alias/jwksd/{installation}/main/{}", key.tag("jwksd:serial"));
        assert_eq!(key.aliases, [alias], "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destruction_killed_between_any_two_calls_is_completed() {
    let points = [
        ("DisableKey", Fault::HoldRequest),
        ("DisableKey", Fault::HoldAnswer),
        ("ScheduleKeyDeletion", Fault::HoldRequest),
        ("ScheduleKeyDeletion", Fault::HoldAnswer),
    ];
    let trials = stream::iter(points).map(|(operation, fault)| async move {
        let what = format!("{operation} {fault:?}");
        let mut trial = Trial::start().await;
        let revoked = trial.keys().await.iter().find(|key| key["serial"] == 3).unwrap()["kid"].clone();
        trial.proxy.nth(operation, 1, fault);
        let path = format!("/keysets/main/keys/{}/revoke", revoked.as_str().unwrap());
        let answer = trial.daemon.admin(Method::POST, &path, Some(json!({ "reason": "a test" }))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        trial.proxy.held().await;
        trial.daemon.kill9().await;
        trial.proxy.clear();
        trial.daemon.restart().await;
        trial.settled().await;
        eventually(&format!("the destruction to be complete: {what}"), PATIENCE, async || {
            let keys = keys(&trial.account).await;
            let destroyed: Vec<_> = keys.iter().filter(|key| !key.is_alive()).collect();
            for key in &destroyed {
                assert_eq!(key.tag("jwksd:serial"), "3", "{what}: {key:?}");
                // The serial stays claimed for as long as the key could come back.
                assert_eq!(key.aliases.len(), 1, "{what}: {key:?}");
            }
            let alarms = trial.daemon.admin(Method::GET, "/keysets/main", None).await.json()["alarms"].to_string();
            let pending = destroyed.iter().any(|key| key.state == aws_sdk_kms::types::KeyState::PendingDeletion);
            (destroyed.len() == 1 && pending && !alarms.contains("destruction")).then_some(())
        })
        .await;
        trial.daemon.sign("main", request()).await;
    });
    trials.buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_a_drain_overtakes_while_it_is_made_goes_with_its_alias() {
    // While its alias is on its way it is not to be taken for a leftover.
    let trial = Trial::with(LocalStack::shared().await.account(), "1m").await.started().await;
    trial.proxy.nth("CreateAlias", 1, Fault::Delay(Duration::from_secs(10)));
    let before = trial.proxy.count("CreateAlias");
    assert_eq!(trial.rotate().await.status, 200);
    let asked = async || (trial.proxy.count("CreateAlias") > before).then_some(());
    eventually("the alias of the next key to be asked for", PATIENCE, asked).await;
    let drained = trial.daemon.admin(Method::POST, "/keysets/main/drain", Some(json!({ "reason": "a test" }))).await;
    assert_eq!(drained.status, 200, "{}", drained.text);
    let overtaken = eventually("the key to be on its way out", PATIENCE, async || {
        let keys = keys(&trial.account).await;
        let made = keys.into_iter().find(|key| key.tag("jwksd:serial") == "4" && !key.is_alive());
        tokio::time::sleep(Duration::from_millis(200)).await;
        made
    })
    .await;
    assert_eq!(overtaken.aliases.len(), 1, "AWS KMS deletes it with the key: {overtaken:?}");
    let told = trial.keys().await.into_iter().find(|key| key["serial"] == 4).expect("it is in the keyring");
    assert_eq!((told["state"].as_str(), told["published_at"].is_null()), (Some("retired"), true), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_lost_costs_no_second_key_of_a_serial() {
    for operation in ["CreateKey", "CreateAlias"] {
        let mut trial = Trial::prepare().await;
        let foreign = foreign_key(&trial.account, &[]).await;
        trial.proxy.nth(operation, 1, Fault::LoseAnswer);
        trial.daemon.restart().await;
        trial.settled().await;
        one_living_key_per_serial(&trial, 3, &foreign, operation).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_be_tested_is_kept_for_the_next_attempt() {
    let mut trial = Trial::prepare().await;
    trial.daemon.set_tables(&super::tables(&trial.proxy, "1h"));
    trial.proxy.next("Sign", 3, Fault::Deny);
    trial.daemon.restart().await;
    trial.settled().await;
    let made = trial.proxy.calls().into_iter().filter(|call| call.operation == "CreateKey").count();
    assert_eq!(made, 3, "each CreateKey costs a key");
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_up_touches_only_what_this_installation_made() {
    let mut trial = Trial::start().await;
    let ours = keys(&trial.account).await.remove(0);
    let tags: Vec<(&str, &str)> = ours.tags.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let changed = |name: &str, value: &'static str| -> Vec<(&str, &str)> {
        tags.iter().map(|(key, old)| if *key == name { (*key, value) } else { (*key, *old) }).collect()
    };
    let mut foreign = vec![foreign_key(&trial.account, &[]).await];
    // Whoever copies tags cannot make the nonce fit: another serial, another lineage, another installation.
    for (name, value) in [("jwksd:serial", "77"), ("jwksd:lineage", "other"), ("jwksd:installation", "other")] {
        foreign.push(foreign_key(&trial.account, &changed(name, value)).await);
    }
    // A leftover of ours is cleaned up meanwhile, which proves that clean-up was here.
    trial.proxy.nth("CreateAlias", 1, Fault::HoldRequest);
    assert_eq!(trial.rotate().await.status, 200);
    trial.proxy.held().await;
    trial.daemon.kill9().await;
    trial.proxy.clear();
    trial.daemon.restart().await;
    trial.settled().await;
    eventually("the leftover to be found", PATIENCE, async || {
        let gone = keys(&trial.account).await.into_iter().filter(|key| !key.is_alive()).collect::<Vec<_>>();
        tokio::time::sleep(Duration::from_millis(200)).await;
        (gone.len() == 1 && gone[0].aliases.is_empty() && gone[0].tag("jwksd:serial") == "4").then_some(())
    })
    .await;
    for arn in foreign {
        assert!(super::account::key_of(&trial.account, &arn).await.is_alive(), "{arn}");
    }
}
