//! Taking over a key that somebody else made in AWS KMS.

use std::process::Command;

use reqwest::Method;
use serde_json::json;

use super::account::{foreign_key, key_of};
use super::{Trial, request};
use crate::support::kms_proxy::Fault;
use crate::support::{PATIENCE, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_key_signs_under_its_kid_and_stays_its_owners() {
    let trial = Trial::start().await;
    let arn = foreign_key(&trial.account, &[]).await;
    let (server, token) = (trial.daemon.url("admin", ""), trial.daemon.path("admin.token"));
    let arguments = ["import", "main", "--aws-kms", &arn, "--kid", "known for years", "--server", &server];
    let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.args(arguments).arg("--token-file").arg(token).env_clear();
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(trial.jwks_kids().await.contains("known for years"));

    // It is the oldest that waits only after the two that were there; rotate until it signs.
    let mut signed = trial.daemon.sign("main", request()).await;
    for _ in 0..4 {
        if signed.kid == "known for years" {
            break;
        }
        assert_eq!(trial.rotate().await.status, 200);
        signed = trial.daemon.sign("main", request()).await;
    }
    assert_eq!(signed.kid, "known for years");

    let path = "/keysets/main/keys/known%20for%20years/revoke";
    let revoked = trial.daemon.admin(Method::POST, path, Some(json!({ "reason": "a test" }))).await;
    assert_eq!(revoked.status, 200, "{}", revoked.text);
    eventually("the key to be forgotten", PATIENCE, async || {
        let shown = trial.daemon.admin(Method::GET, "/keysets/main", None).await.json();
        (!shown["alarms"].to_string().contains("destruction")).then_some(())
    })
    .await;
    trial.daemon.log_line("a key that is forgotten", |line| line.message().contains("is forgotten")).await;
    let key = key_of(&trial.account, &arn).await;
    assert!(key.is_alive() && key.aliases.is_empty() && key.tags.is_empty(), "{key:?}");
    let touched = trial.proxy.calls().into_iter().filter(|call| call.key == arn).map(|call| call.operation);
    assert!(
        touched
            .into_iter()
            .all(|operation| ["GetPublicKey", "DescribeKey", "Sign", "ListResourceTags"].contains(&operation.as_str()))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_sign_is_refused_and_an_outage_is_not_a_refusal() {
    let trial = Trial::start().await;
    let import = async |arn: &str| {
        let answer = trial.daemon.admin(Method::POST, "/keysets/main/import", Some(json!({ "aws_kms": arn }))).await;
        (answer.status, answer.text)
    };
    let symmetric = trial.account.client.create_key().send().await.unwrap().key_metadata.unwrap().arn.unwrap();
    let arn = foreign_key(&trial.account, &[]).await;
    let missing = format!("{}00000000-0000-0000-0000-000000000000", &arn[..arn.rfind('/').unwrap() + 1]);
    for refused in ["alias/mine", "arn:aws:kms:eu-central-1:1:alias/mine", &symmetric, &missing] {
        let (status, text) = import(refused).await;
        assert_eq!(status, 422, "{refused}: {text}");
    }
    let both = json!({ "aws_kms": arn, "public_key": "x" });
    assert_eq!(trial.daemon.admin(Method::POST, "/keysets/main/import", Some(both)).await.status, 422);
    trial.proxy.always("*", Fault::LoseRequest);
    let (status, text) = import(&arn).await;
    assert_eq!(status, 503, "{text}");
    trial.proxy.clear();
    let (status, text) = import(&arn).await;
    assert_eq!(status, 200, "{text}");
}
