//! Two who make the same serial.

use std::sync::Arc;

use aws_sdk_kms::Client;
use futures_util::future::join_all;
use jwksd::aws_kms::SdkKms;
use jwksd::backend::aws_kms::{AwsKmsBackend, Owned};
use jwksd::backend::{Backend, CreatedKey, KeyIdentity};
use jwksd::clock::{Clock, SystemClock};
use jwksd::config::AwsKms;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::record::{Key, KeyState, Keyring, Origin, PrivateHandle};
use jwksd::keyring::time::Span;
use jwksd::seal::data_keys::DataKeys;

use super::account::keys;
use super::{Trial, request};
use crate::support::localstack::{Account, LocalStack, REGION};
use crate::support::{PATIENCE, eventually};

pub fn backend(account: &Account, secret: &Arc<DataKeys>) -> AwsKmsBackend {
    backend_at(&account.client, Span::from_secs(20), secret, Arc::new(SystemClock))
}

pub fn backend_at(
    client: &Client,
    attempt_timeout: Span,
    secret: &Arc<DataKeys>,
    clock: Arc<dyn Clock>,
) -> AwsKmsBackend {
    let settings = AwsKms {
        region: Some(REGION.to_owned()),
        endpoint_url: None,
        attempt_timeout,
        concurrency: 4,
        deletion_window_days: 7,
        cleanup_after: Span::DAY,
    };
    let api = Arc::new(SdkKms::with_client(client.clone(), settings));
    AwsKmsBackend::new(api, secret.clone(), clock, 7, Span::DAY)
}

pub fn identity(serial: u64) -> KeyIdentity {
    let keyset = Name::parse("main").unwrap();
    KeyIdentity { installation: "i".repeat(32), lineage: "l".repeat(32), keyset, serial }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_loses_the_race_for_a_serial_takes_the_winners_key() {
    let account = LocalStack::shared().await.account();
    let secret = Arc::new(DataKeys::ephemeral("i"));
    let racers: Vec<_> = (0..4).map(|_| backend(&account, &secret)).collect();
    let identity = identity(1);
    let made = join_all(racers.iter().map(|racer| racer.create(&identity, Algorithm::Es256))).await;
    let made: Vec<_> = made.into_iter().map(|key| key.unwrap()).collect();
    assert!(made.iter().all(|key| key.kid == made[0].kid && key.handle == made[0].handle));
    let keys = keys(&account).await;
    let (alive, gone): (Vec<_>, Vec<_>) = keys.iter().partition(|key| key.is_alive());
    assert_eq!((alive.len(), alive[0].aliases.len()), (1, 1), "{keys:#?}");
    assert!(gone.iter().all(|key| key.aliases.is_empty()), "{gone:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_key_was_destroyed_or_is_of_another_kind_is_passed_over() {
    let account = LocalStack::shared().await.account();
    let secret = Arc::new(DataKeys::ephemeral("i"));
    let backend = backend(&account, &secret);
    // As a history did that a restored store does not know.
    let first = backend.create(&identity(1), Algorithm::Es256).await.unwrap();
    let other = backend.create(&identity(1), Algorithm::Es384).await.unwrap();
    assert_ne!(first.kid, other.kid);
    assert_eq!(backend.create(&identity(1), Algorithm::Es384).await.unwrap().kid, other.kid);
    assert_eq!(backend.create(&identity(1), Algorithm::Es256).await.unwrap().kid, first.kid);
    let arn = first.handle.split(' ').nth(1).unwrap();
    account.client.schedule_key_deletion().key_id(arn).pending_window_in_days(7).send().await.unwrap();
    let second = backend.create(&identity(1), Algorithm::Es256).await.unwrap();
    assert!(second.kid != first.kid && second.kid != other.kid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_key_under_our_alias_is_refused_not_used() {
    let account = LocalStack::shared().await.account();
    let backend = backend(&account, &Arc::new(DataKeys::ephemeral("i")));
    let arn = super::account::foreign_key(&account, &[]).await;
    let alias = format!("alias/jwksd/{}/main/1", "i".repeat(32));
    account.client.create_alias().alias_name(&alias).target_key_id(&arn).send().await.unwrap();
    let error = backend.create(&identity(1), Algorithm::Es256).await.err().unwrap();
    let text = jwksd::engine::chain(&error);
    assert!(text.contains(&alias) && text.contains(&arn), "{text}");
    assert!(super::account::key_of(&account, &arn).await.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_younger_than_a_day_is_nobodys_leftover() {
    let account = LocalStack::shared().await.account();
    let secret = Arc::new(DataKeys::ephemeral("i"));
    let backend = backend(&account, &secret);
    let made = backend.create(&identity(1), Algorithm::Es256).await.unwrap();
    let key = keys(&account).await.remove(0);
    account.client.delete_alias().alias_name(&key.aliases[0]).send().await.unwrap();
    let mut owned = Owned::default();
    owned.add(&keyring(&"l".repeat(32)));
    // A key that a keyring names is nobody's leftover, however old, be its alias gone.
    let mut named = keyring(&"l".repeat(32));
    named.keys.push(record_of(&made));
    let mut naming = Owned::default();
    naming.add(&named);
    let years_later = SystemClock.wall() + Span::from_secs(5 * 365 * 86_400);
    let kept = self::backend(&account, &secret).clean_up(&"i".repeat(32), &naming, years_later).await.unwrap();
    assert_eq!((kept.examined, kept.scheduled, kept.young), (1, 0, 0));
    assert!(super::account::key_of(&account, &key.arn).await.is_alive());
    let now = SystemClock.wall();
    let young = backend.clean_up(&"i".repeat(32), &owned, now).await.unwrap();
    assert_eq!((young.young, young.scheduled), (1, 0));
    // Another lineage's, however old.
    let later = now + Span::from_secs(2 * 86_400);
    let mut others = Owned::default();
    others.add(&keyring("another"));
    let fresh = super::races::backend(&account, &secret);
    assert_eq!(fresh.clean_up(&"i".repeat(32), &others, later).await.unwrap().scheduled, 0);
    assert_eq!(backend.clean_up(&"i".repeat(32), &owned, later).await.unwrap().scheduled, 1);
}

fn record_of(made: &CreatedKey) -> Key {
    let at = SystemClock.wall();
    Key {
        serial: 1,
        kid: made.kid.clone(),
        algorithm: Algorithm::Es256,
        public: made.public.clone(),
        private: Some(PrivateHandle { backend: "aws-kms".to_owned(), handle: made.handle.clone() }),
        origin: Origin::Created,
        state: KeyState::Active,
        entered_at: at,
        created_at: at,
        since_generation: 0,
        published_at: Some(at),
        seen_at: None,
        activated_at: Some(at),
        demoted_at: None,
        stopped_at: None,
        ttl_bound: Span::HOUR,
        overlap_bound: Span::HOUR,
        published_until: None,
        unpropagated: false,
        rolled_back: false,
        revocation: None,
    }
}

/// A keyring without keys.
pub fn keyring(lineage: &str) -> Keyring {
    let loaded = jwksd::config::load(&jwksd::config::Source::Embedded, std::iter::empty()).unwrap();
    let policy = (*loaded.config.keysets[0].policy).clone();
    Keyring::new(Name::parse("main").unwrap(), lineage.to_owned(), policy, true, SystemClock.wall())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_store_beside_the_original_makes_no_second_key_and_deletes_none() {
    let mut original = Trial::start().await;
    original.daemon.sigterm().await;
    let mut copy = Trial::in_account(original.account.clone()).await;
    for name in ["keyrings", "seal.key", "admin.token"] {
        let done = std::process::Command::new("cp")
            .arg("-a")
            .args([original.daemon.path(name), copy.daemon.path(name)])
            .status()
            .unwrap();
        assert!(done.success(), "{name}");
    }
    original.daemon.restart().await;
    copy.daemon.restart().await;
    let (a, b) = tokio::join!(original.rotate(), copy.rotate());
    assert_eq!((a.status, b.status), (200, 200), "{} {}", a.text, b.text);
    original.settled().await;
    copy.settled().await;
    assert_eq!(original.jwks_kids().await, copy.jwks_kids().await, "both made serial 4, and it is one key");
    // Clean-up has run in both; what may be left of the race goes, and nothing else.
    let alive = eventually("the loser's key to go", PATIENCE, async || {
        let keys = keys(&original.account).await;
        let alive: Vec<_> = keys.into_iter().filter(|key| key.is_alive()).collect();
        (alive.iter().all(|key| key.aliases.len() == 1)).then_some(alive)
    })
    .await;
    assert_eq!(alive.len(), 4, "{alive:#?}");
    original.daemon.sign("main", request()).await;
    copy.daemon.sign("main", request()).await;
}
