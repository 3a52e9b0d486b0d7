//! What counts as a key of ours: only what proves it, to whoever adopts and to whoever cleans up.

use std::sync::Arc;

use jwksd::backend::aws_kms::{AwsKmsBackend, CleanUp, Owned};
use jwksd::backend::{Backend, BackendErrorKind};
use jwksd::clock::{Clock, ManualClock, SystemClock};
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::time::Span;
use jwksd::seal::data_keys::DataKeys;

use super::account::{Found, copy_of, foreign_key, key_of, keys};
use super::races::{backend, backend_at, identity, keyring};
use crate::support::kms_proxy::{Fault, KmsProxy};
use crate::support::localstack::{Account, LocalStack, client};

struct Scene {
    account: Account,
    proxy: KmsProxy,
    secret: Arc<DataKeys>,
    backend: AwsKmsBackend,
}

impl Scene {
    async fn new() -> Scene {
        Scene::with_clock(Arc::new(SystemClock)).await
    }

    async fn with_clock(clock: Arc<dyn Clock>) -> Scene {
        let account = LocalStack::shared().await.account();
        let proxy = KmsProxy::before(&account.endpoint).await;
        let secret = Arc::new(DataKeys::ephemeral("i"));
        let client = client(&proxy.url(), &account.access_key_id);
        let backend = backend_at(&client, Span::from_millis(300), &secret, clock);
        Scene { account, proxy, secret, backend }
    }

    /// Makes a key whose alias is taken away, as if its maker had died before it made the alias.
    async fn leftover(&self, serial: u64) -> Found {
        let made = self.backend.create(&identity(serial), Algorithm::Es256).await.unwrap();
        self.account.client.delete_alias().alias_name(alias(serial)).send().await.unwrap();
        key_of(&self.account, made.handle.split(' ').nth(1).unwrap()).await
    }

    async fn name(&self, arn: &str, serial: u64) {
        self.account.client.create_alias().alias_name(alias(serial)).target_key_id(arn).send().await.unwrap();
    }

    async fn is_refused(&self, arn: &str, serial: u64) {
        let error = self.backend.create(&identity(serial), Algorithm::Es256).await.err().expect("it is not adopted");
        let text = jwksd::engine::chain(&error);
        assert!(text.contains(&alias(serial)) && text.contains(arn), "{text}");
        assert!(text.contains("may not be visible yet") && !text.contains("delete"), "{text}");
        assert!(!self.proxy.calls().iter().any(|call| call.operation == "Sign" && call.key == arn));
    }

    /// Two days later, for the lineage of these tests.
    async fn clean_up(&self) -> CleanUp {
        let mut owned = Owned::default();
        owned.add(&keyring(&"l".repeat(32)));
        let later = SystemClock.wall() + Span::from_secs(2 * 86_400);
        self.backend.clean_up(&"i".repeat(32), &owned, later).await.unwrap()
    }
}

fn alias(serial: u64) -> String {
    format!("alias/jwksd/{}/main/{serial}", "i".repeat(32))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planted_key_is_not_adopted_whatever_its_tags_say() {
    let scene = Scene::new().await;
    let ours = scene.leftover(1).await;
    let told = |serial: &'static str| -> Vec<(&str, &str)> {
        ours.tags
            .iter()
            .map(|(key, old)| (key.as_str(), if key == "jwksd:serial" { serial } else { old.as_str() }))
            .collect()
    };
    // The tags of the next serial can be guessed, its nonce cannot.
    let planted = foreign_key(&scene.account, &told("2")).await;
    scene.name(&planted, 2).await;
    scene.is_refused(&planted, 2).await;
    let without: Vec<_> = told("3").into_iter().filter(|(key, _)| *key != "jwksd:nonce").collect();
    let bare = foreign_key(&scene.account, &without).await;
    scene.name(&bare, 3).await;
    scene.is_refused(&bare, 3).await;
    for arn in [planted, bare] {
        assert!(key_of(&scene.account, &arn).await.is_alive());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_prove_nothing_about_a_key_that_was_made_at_another_time() {
    let clock = ManualClock::at(SystemClock.wall());
    let scene = Scene::with_clock(clock.clone()).await;
    // The key is asked for by a clock that is an hour ahead of the service's: as tags that are copied an hour later.
    clock.advance(Span::HOUR);
    let strange = scene.leftover(1).await;
    scene.name(&strange.arn, 1).await;
    // Its maker tested it.
    scene.proxy.forget_calls();
    scene.is_refused(&strange.arn, 1).await;
    scene.account.client.delete_alias().alias_name(alias(1)).send().await.unwrap();
    assert_eq!(scene.clean_up().await.scheduled, 0);
    assert!(key_of(&scene.account, &strange.arn).await.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_keys_with_the_very_same_tags_none_is_deleted_and_a_copy_wins_no_race() {
    let scene = Scene::new().await;
    let copied = scene.leftover(1).await;
    let copy = copy_of(&scene.account, &copied).await;
    let lonely = scene.leftover(2).await;
    assert_eq!(scene.clean_up().await.scheduled, 1);
    for (arn, alive) in [(&copied.arn, true), (&copy, true), (&lonely.arn, false)] {
        assert_eq!(key_of(&scene.account, arn).await.is_alive(), alive, "{arn}");
    }
    // Between our CreateKey and our CreateAlias.
    scene.proxy.nth("CreateAlias", 1, Fault::Throttle);
    scene.backend.create(&identity(3), Algorithm::Es256).await.err().expect("the alias was not made");
    let ours = keys(&scene.account).await.into_iter().find(|key| key.tag("jwksd:serial") == "3").unwrap();
    let copy = copy_of(&scene.account, &ours).await;
    scene.name(&copy, 3).await;
    scene.is_refused(&copy, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_made_key_that_became_useless_is_replaced_at_once() {
    let clock = ManualClock::at(SystemClock.wall());
    let scene = Scene::with_clock(clock.clone()).await;
    let create = async || scene.backend.create(&identity(1), Algorithm::Es256).await.map_err(|error| error.kind);
    let made = || scene.proxy.count("CreateKey");
    scene.proxy.nth("CreateAlias", 1, Fault::Throttle);
    assert_eq!(create().await.err(), Some(BackendErrorKind::Throttled));
    let arn = keys(&scene.account).await.remove(0).arn;
    scene.account.client.disable_key().key_id(&arn).send().await.unwrap();
    assert_eq!((create().await.err(), made()), (Some(BackendErrorKind::KeyDisabled), 1));
    // A new key that is not known everywhere yet is waited for, and not for ever.
    scene.proxy.next("GetPublicKey", 3, Fault::Refuse("NotFoundException"));
    assert_eq!((create().await.err(), made()), (Some(BackendErrorKind::NotFound), 2));
    assert_eq!((create().await.err(), made()), (Some(BackendErrorKind::NotFound), 2));
    clock.advance(Span::from_secs(61));
    assert_eq!((create().await.err(), made()), (Some(BackendErrorKind::NotFound), 2));
    create().await.unwrap();
    assert_eq!(made(), 3);
    let alive: Vec<_> = keys(&scene.account).await.into_iter().filter(Found::is_alive).collect();
    assert_eq!(alive.len(), 1, "{alive:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_test_of_a_new_key_has_more_time_than_a_request() {
    let scene = Scene::new().await;
    scene.proxy.always("Sign", Fault::Delay(std::time::Duration::from_secs(1)));
    scene.backend.create(&identity(1), Algorithm::Es256).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_up_passes_over_a_key_whose_call_fails_and_comes_back_to_it() {
    let scene = Scene::new().await;
    let leftovers = [scene.leftover(1).await, scene.leftover(2).await];
    for fault in [Fault::Fail, Fault::Refuse("AccessDeniedException")] {
        scene.proxy.nth("ListResourceTags", 1, fault);
    }
    // One call fails; the tags of the other key are not visible yet.
    let first = scene.clean_up().await;
    assert_eq!((first.examined, first.failed, first.scheduled), (2, 1, 0), "{first:?}");
    scene.proxy.nth("DescribeKey", 1, Fault::Fail);
    let second = scene.clean_up().await;
    assert_eq!((second.failed, second.scheduled), (1, 1), "{second:?}");
    assert_eq!(scene.clean_up().await.scheduled, 1);
    for key in leftovers {
        assert!(!key_of(&scene.account, &key.arn).await.is_alive());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_may_not_be_deleted_do_not_keep_clean_up_from_those_that_may() {
    let scene = Scene::new().await;
    for serial in 1..=8 {
        scene.leftover(serial).await;
    }
    scene.proxy.next("ScheduleKeyDeletion", 7, Fault::Deny);
    let done = scene.clean_up().await;
    assert_eq!((done.failed, done.scheduled), (7, 1), "{done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clean_up_goes_on_where_it_stopped() {
    let scene = Scene::new().await;
    let leftover = scene.leftover(1).await;
    let others = futures_util::future::join_all((0..110).map(|_| {
        let tag = aws_sdk_kms::types::Tag::builder().tag_key("jwksd:installation").tag_value("another");
        scene.account.client.create_key().tags(tag.build().unwrap()).send()
    }));
    assert!(others.await.iter().all(Result::is_ok));
    scene.proxy.nth("ListKeys", 2, Fault::Fail);
    let mut owned = Owned::default();
    owned.add(&keyring(&"l".repeat(32)));
    let later = SystemClock.wall() + Span::from_secs(2 * 86_400);
    scene.backend.clean_up(&"i".repeat(32), &owned, later).await.expect_err("the second page cannot be read");
    scene.proxy.forget_calls();
    let rest = scene.clean_up().await;
    assert_eq!((rest.examined, rest.scheduled, scene.proxy.count("ListKeys")), (11, 1, 1));
    assert!(!key_of(&scene.account, &leftover.arn).await.is_alive());
    // Whose keys they are is known now.
    assert_eq!(scene.clean_up().await, CleanUp::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_with_another_secret_is_left_alone() {
    let scene = Scene::new().await;
    let before = scene.leftover(1).await;
    let resealed = backend(&scene.account, &Arc::new(DataKeys::ephemeral("i")));
    let mut owned = Owned::default();
    owned.add(&keyring(&"l".repeat(32)));
    let later = SystemClock.wall() + Span::from_secs(2 * 86_400);
    assert_eq!(resealed.clean_up(&"i".repeat(32), &owned, later).await.unwrap().scheduled, 0);
    assert!(key_of(&scene.account, &before.arn).await.is_alive());
    drop(scene.secret);
}
