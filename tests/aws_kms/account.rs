//! Looking at an account from outside.

use aws_sdk_kms::types::{KeyState, Tag};

use crate::support::localstack::Account;

/// A key and everything that is known of it.
#[derive(Debug)]
pub struct Found {
    pub arn: String,
    pub state: KeyState,
    pub aliases: Vec<String>,
    pub tags: Vec<(String, String)>,
}

impl Found {
    pub fn is_alive(&self) -> bool {
        self.state == KeyState::Enabled
    }

    pub fn tag(&self, name: &str) -> &str {
        let found = self.tags.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str()).unwrap_or_default()
    }
}

/// Every key of the account.
pub async fn keys(account: &Account) -> Vec<Found> {
    let mut found = Vec::new();
    let mut pages = account.client.list_keys().into_paginator().send();
    while let Some(page) = pages.next().await {
        for key in page.unwrap().keys.unwrap_or_default() {
            found.push(key_of(account, &key.key_arn.unwrap()).await);
        }
    }
    found
}

pub async fn key_of(account: &Account, arn: &str) -> Found {
    let client = &account.client;
    let described = client.describe_key().key_id(arn).send().await.unwrap().key_metadata.unwrap();
    let aliases = client.list_aliases().key_id(arn).send().await.unwrap().aliases.unwrap_or_default();
    let tags = client.list_resource_tags().key_id(arn).send().await.unwrap().tags.unwrap_or_default();
    Found {
        arn: arn.to_owned(),
        state: described.key_state.unwrap(),
        aliases: aliases.into_iter().filter_map(|alias| alias.alias_name).collect(),
        tags: tags.into_iter().map(|tag| (tag.tag_key, tag.tag_value)).collect(),
    }
}

/// A key that somebody else made.
pub async fn foreign_key(account: &Account, tags: &[(&str, &str)]) -> String {
    let tags = tags.iter().map(|(key, value)| Tag::builder().tag_key(*key).tag_value(*value).build().unwrap());
    let request = account.client.create_key().key_usage("SIGN_VERIFY".into()).key_spec("ECC_NIST_P256".into());
    let made = request.set_tags(Some(tags.collect())).send().await.unwrap();
    made.key_metadata.unwrap().arn.unwrap()
}

/// A key with the same tags as another, which somebody else made.
pub async fn copy_of(account: &Account, key: &Found) -> String {
    let tags: Vec<(&str, &str)> = key.tags.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    foreign_key(account, &tags).await
}
