//! Keys that never leave AWS KMS, before LocalStack and a proxy that loses, delays, refuses and holds single calls.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may fail loudly")]

mod support;

#[path = "aws_kms/account.rs"]
mod account;
#[path = "aws_kms/claims.rs"]
mod claims;
#[path = "aws_kms/crashes.rs"]
mod crashes;
#[path = "aws_kms/failures.rs"]
mod failures;
#[path = "aws_kms/import.rs"]
mod import;
#[path = "aws_kms/moves.rs"]
mod moves;
#[path = "aws_kms/policies.rs"]
mod policies;
#[path = "aws_kms/races.rs"]
mod races;

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::{Value, json};
use support::kms_proxy::KmsProxy;
use support::localstack::{Account, LocalStack, REGION};
use support::{Daemon, PATIENCE, eventually};

/// A daemon with the proxy between it and an account of its own.
struct Trial {
    daemon: Daemon,
    proxy: KmsProxy,
    account: Account,
}

impl Trial {
    /// Nothing is started. No rotation comes due by itself.
    async fn prepare() -> Trial {
        Trial::in_account(LocalStack::shared().await.account()).await
    }

    async fn in_account(account: Account) -> Trial {
        Trial::with(account, "2s").await
    }

    /// `cleanup_after` is how old a leftover must be.
    async fn with(account: Account, cleanup_after: &str) -> Trial {
        let proxy = KmsProxy::before(&account.endpoint).await;
        let mut builder = Daemon::builder().tables(&tables(&proxy, cleanup_after));
        for (name, value) in account.environment() {
            builder = builder.env(name, &value);
        }
        Trial { daemon: builder.prepare(), proxy, account }
    }

    /// Started, with all keys made and known to sign.
    async fn start() -> Trial {
        Trial::prepare().await.started().await
    }

    async fn started(mut self) -> Trial {
        self.daemon.restart().await;
        self.settled().await;
        self
    }

    /// Waits until an active key signs and two successors wait.
    async fn settled(&self) {
        eventually("an active key and two successors", PATIENCE, async || (self.waiting().await == 2).then_some(()))
            .await;
        self.signs().await;
    }

    /// Waits until it says that it can sign.
    async fn signs(&self) {
        let ready = async || (self.daemon.get("ops", "/readyz/sign").await.status == 200).then_some(());
        eventually("/readyz/sign to be 200", PATIENCE, ready).await;
    }

    async fn waiting(&self) -> usize {
        let keys = self.keys().await;
        keys.iter().filter(|key| matches!(key["state"].as_str(), Some("pending" | "standby"))).count()
    }

    /// The keys of the keyset as the admin API tells them, those that ended included.
    async fn keys(&self) -> Vec<Value> {
        let answer = self.daemon.admin(Method::GET, "/keysets/main?history=true", None).await;
        if answer.status != 200 {
            return Vec::new();
        }
        answer.json()["keys"].as_array().cloned().unwrap_or_default()
    }

    async fn jwks_kids(&self) -> BTreeSet<String> {
        let answer = self.daemon.get("public", "/.well-known/jwks.json").await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let document = answer.json();
        let keys = document["keys"].as_array().unwrap();
        keys.iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
    }

    async fn rotate(&self) -> support::Answer {
        let body = json!({ "reason": "a test", "allow_unpropagated": true });
        self.daemon.admin(Method::POST, "/keysets/main/rotate", Some(body)).await
    }

    async fn failures(&self, reason: &str) -> f64 {
        let labels = [("keyset", "main"), ("backend", "aws-kms"), ("reason", reason)];
        self.daemon.metrics().await.sum("jwksd_signing_failures_total", &labels).unwrap_or(0.0)
    }
}

/// `cleanup_after` is how old a leftover must be.
fn tables(proxy: &KmsProxy, cleanup_after: &str) -> String {
    format!(
        r#"
[issuer.main]
url = "https://issuer.example.test"

[keyset.main]
algorithm = "ES256"
backend = "aws-kms"

[backend.aws-kms]
region = "{REGION}"
endpoint_url = "{}"
deletion_window = "7d"
cleanup_after = "{cleanup_after}"
"#,
        proxy.url()
    )
}

fn request() -> Value {
    json!({ "claims": { "sub": "alice", "aud": "https://api.example.test" } })
}
