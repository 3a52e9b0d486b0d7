//! Kubernetes service accounts: the tokens that a kubelet writes into pods, verified with the keys that the cluster's API
//! server publishes.
//!
//! A signature waits for the API server only where it may help: before the first keys are here, and when a token names a
//! key that is not known. Everything else is done in the background, and what was verified is remembered until it expires.

mod fetch;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::backend::token::{Claims, Jws, TokenError, verify_token};
use crate::clock::TrustedClock;
use crate::config::{Kubernetes, ServiceAccount};
use crate::keyring::jwk::ParsedJwk;
use crate::keyring::time::{Span, Timestamp};
use crate::telemetry::chain;
use crate::telemetry::metrics::Metrics;

use fetch::{FetchError, fetch};

/// How often the keys are fetched while all goes well.
const REFRESH: Span = Span::from_secs(300);

/// For how long keys are good after the API server last confirmed them. Tokens of pods live for an hour by default.
pub const KEEP: Span = Span::HOUR;

/// After a failure keys are fetched again after this, after further ones later.
const FIRST_PAUSE: Span = Span::SECOND;
const LONGEST_PAUSE: Span = Span::from_secs(30);

/// Tokens of unknown keys have the keys fetched at most this often.
const LEAST_PAUSE: Span = Span::from_secs(10);

/// How long a request waits for keys that are being fetched, and how many may.
const PATIENCE: Duration = Duration::from_secs(2);
const MOST_WAITING: usize = 64;

/// How far the clocks of cluster and daemon may differ.
const LEEWAY: Span = Span::MINUTE;

/// The most tokens that are remembered.
const MOST_VERIFIED: usize = 4096;

/// Tells which service account a token is for.
pub struct ServiceAccounts {
    clock: Arc<TrustedClock>,
    metrics: Arc<Metrics>,
    settings: watch::Sender<Option<Arc<Kubernetes>>>,
    known: ArcSwap<Known>,
    /// Serialises changes of `known`.
    change: Mutex<()>,
    /// Somebody lacks a key.
    wanted: Notify,
    /// How often keys were fetched or not.
    attempts: watch::Sender<u64>,
    under_way: AtomicBool,
    /// When the last attempt began, in milliseconds since boot.
    began: AtomicI64,
    waiting: Semaphore,
}

/// The keys in use, and what was verified with them. Other keys or settings forget what these verified.
#[derive(Default)]
struct Known {
    settings: Option<Arc<Kubernetes>>,
    keys: Option<Keys>,
    /// By SHA-256 of the token: whose it is, and when it expires.
    verified: RwLock<HashMap<[u8; 32], (ServiceAccount, Timestamp)>>,
}

struct Keys {
    issuer: String,
    keys: Vec<ParsedJwk>,
    /// When the API server last served them, in milliseconds since boot.
    confirmed: AtomicI64,
}

/// Why a token names no service account.
#[derive(Debug, thiserror::Error)]
pub enum Rejection {
    #[error("no service account may sign")]
    Off,
    #[error("the cluster's keys are not known: the API server has not served them for {KEEP}, or never")]
    NoKeys,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error("the token's claim \"{claim}\" is not one of a pod's service account")]
    NotOfPod { claim: &'static str },
}

impl ServiceAccounts {
    pub fn new(clock: Arc<TrustedClock>, metrics: Arc<Metrics>, settings: Option<Kubernetes>) -> Self {
        let accounts = ServiceAccounts {
            clock,
            metrics,
            settings: watch::Sender::new(None),
            known: ArcSwap::default(),
            change: Mutex::new(()),
            wanted: Notify::new(),
            attempts: watch::Sender::new(0),
            under_way: AtomicBool::new(false),
            began: AtomicI64::new(i64::MIN),
            waiting: Semaphore::new(MOST_WAITING),
        };
        accounts.configure(settings);
        accounts
    }

    /// Takes other settings; `None`: no service account may sign. Keys of another place or issuer are forgotten.
    pub fn configure(&self, settings: Option<Kubernetes>) {
        let settings = settings.map(Arc::new);
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        if self.known.load().settings == settings {
            return;
        }
        self.metrics.set_cluster_keys_confirmed(settings.as_ref().map(|_| Timestamp::EPOCH));
        self.known.store(Arc::new(Known { settings: settings.clone(), ..Known::default() }));
        self.began.store(i64::MIN, Ordering::Release);
        self.settings.send_replace(settings);
    }

    /// Whose token it is.
    ///
    /// # Errors
    /// Everything but a token of this cluster for a service account, meant for this daemon, and valid now.
    pub async fn identify(&self, token: &str) -> Result<ServiceAccount, Rejection> {
        // From before the look at the keys, so that an attempt which ends meanwhile is not missed.
        let attempts = self.attempts.subscribe();
        let checked = self.check(token);
        let lacks_key = matches!(checked, Err(Rejection::NoKeys | Rejection::Token(TokenError::UnknownKid { .. })));
        if lacks_key && self.asked_again(attempts).await { self.check(token) } else { checked }
    }

    fn check(&self, token: &str) -> Result<ServiceAccount, Rejection> {
        let known = self.known.load_full();
        let settings = known.settings.as_ref().ok_or(Rejection::Off)?;
        let now = self.clock.read().now;
        let keys = known.keys.as_ref().filter(|keys| keys.are_fresh(self.clock.boot()));
        let Some(keys) = keys else {
            // What no cluster would ever make is not worth waiting for.
            Jws::parse(token)?;
            return Err(Rejection::NoKeys);
        };
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some((account, until)) = known.remembered(&digest)
            && now < until
        {
            return Ok(account);
        }
        let claims = verify_token(token, &keys.keys, now, &keys.issuer, Some(&settings.audience), LEEWAY)?;
        let account = account_of(&claims)?;
        if let Some(until) = claims.get("exp").and_then(Value::as_i64).map(Timestamp::from_secs) {
            known.remember(digest, account.clone(), until, now);
        }
        Ok(account)
    }

    /// Has the keys fetched and waits for that, unless it was tried a moment ago; whether there was an attempt that
    /// `attempts` had not seen.
    async fn asked_again(&self, mut attempts: watch::Receiver<u64>) -> bool {
        let rested = self.since_last() >= LEAST_PAUSE;
        let under_way = self.under_way.load(Ordering::Acquire);
        if attempts.has_changed().unwrap_or(false) {
            return true;
        }
        if !rested && !under_way {
            return false;
        }
        let Ok(_place) = self.waiting.try_acquire() else { return false };
        if rested {
            self.wanted.notify_one();
        }
        tokio::time::timeout(PATIENCE, attempts.changed()).await.is_ok_and(|changed| changed.is_ok())
    }

    fn since_last(&self) -> Span {
        match self.began.load(Ordering::Acquire) {
            i64::MIN => Span::MAX,
            began => self.clock.boot().saturating_sub(Span::from_millis(began)),
        }
    }

    /// Keeps the keys fresh until `cancel`.
    pub async fn follow(self: Arc<Self>, cancel: CancellationToken) {
        tokio::select! {
            () = self.keep_fresh() => {}
            () = cancel.cancelled() => {}
        }
    }

    async fn keep_fresh(&self) {
        let mut configured = self.settings.subscribe();
        let mut failures = Failures::default();
        loop {
            let settings = configured.borrow_and_update().clone();
            let pause = match settings {
                None => {
                    self.under_way.store(false, Ordering::Release);
                    None
                }
                Some(settings) => {
                    self.began.store(self.clock.boot().as_millis(), Ordering::Release);
                    self.under_way.store(true, Ordering::Release);
                    let fetched = tokio::select! {
                        fetched = fetch(&settings) => Some(fetched),
                        _ = configured.changed() => None,
                    };
                    let Some(fetched) = fetched else { continue };
                    let pause = failures.tell(&settings, fetched.as_ref().err());
                    if let Ok((issuer, keys)) = fetched {
                        self.take(&settings, issuer, keys);
                    }
                    self.attempts.send_modify(|attempts| *attempts += 1);
                    // Only now: whoever finds none under way finds the attempt counted.
                    self.under_way.store(false, Ordering::Release);
                    Some(pause)
                }
            };
            let again = async {
                match pause {
                    Some(pause) => self.clock.clock().sleep(pause).await,
                    None => std::future::pending().await,
                }
            };
            let wanted = async {
                self.wanted.notified().await;
                self.clock.clock().sleep(LEAST_PAUSE.saturating_sub(self.since_last()).max(Span::ZERO)).await;
            };
            tokio::select! {
                () = again => {}
                () = wanted => {}
                changed = configured.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    failures = Failures::default();
                }
            }
        }
    }

    /// Puts keys in use, unless they are those in use or the settings have changed meanwhile.
    fn take(&self, settings: &Arc<Kubernetes>, issuer: String, keys: Vec<ParsedJwk>) {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.known.load();
        if known.settings.as_ref() != Some(settings) {
            return;
        }
        let confirmed = self.clock.boot().as_millis();
        self.metrics.set_cluster_keys_confirmed(Some(self.clock.read().now));
        if let Some(same) = known.keys.as_ref().filter(|known| known.issuer == issuer && known.keys == keys) {
            same.confirmed.store(confirmed, Ordering::Release);
            return;
        }
        tracing::info!(issuer, keys = keys.len(), "the cluster's keys for service accounts are in use");
        let keys = Some(Keys { issuer, keys, confirmed: confirmed.into() });
        self.known.store(Arc::new(Known { settings: Some(settings.clone()), keys, ..Known::default() }));
    }
}

impl Keys {
    fn are_fresh(&self, boot: Span) -> bool {
        boot.saturating_sub(Span::from_millis(self.confirmed.load(Ordering::Acquire))) < KEEP
    }
}

impl Known {
    fn remembered(&self, digest: &[u8; 32]) -> Option<(ServiceAccount, Timestamp)> {
        self.verified.read().unwrap_or_else(PoisonError::into_inner).get(digest).cloned()
    }

    /// When there is no room, expired tokens go, else the one that expires first.
    fn remember(&self, digest: [u8; 32], account: ServiceAccount, until: Timestamp, now: Timestamp) {
        let mut verified = self.verified.write().unwrap_or_else(PoisonError::into_inner);
        if verified.len() >= MOST_VERIFIED {
            verified.retain(|_, (_, until)| now < *until);
        }
        if verified.len() >= MOST_VERIFIED {
            let first = verified.iter().min_by_key(|(_, (_, until))| *until).map(|(digest, _)| *digest);
            first.and_then(|digest| verified.remove(&digest));
        }
        verified.insert(digest, (account, until));
    }
}

/// What a bound token says of its service account, in `sub` and in the claim of Kubernetes: both must agree.
fn account_of(claims: &Claims) -> Result<ServiceAccount, Rejection> {
    let subject = claims.get("sub").and_then(Value::as_str).unwrap_or_default();
    let subject = subject.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let (namespace, name) = subject.ok_or(Rejection::NotOfPod { claim: "sub" })?;
    let text = |path: &str| claims.get("kubernetes.io").and_then(|own| own.pointer(path)).and_then(Value::as_str);
    if text("/namespace") != Some(namespace) || text("/serviceaccount/name") != Some(name) {
        return Err(Rejection::NotOfPod { claim: "kubernetes.io" });
    }
    Ok(ServiceAccount { namespace: namespace.to_owned(), name: name.to_owned() })
}

/// Tells of failures when they begin, change and end, and says when to try again.
#[derive(Default)]
struct Failures {
    in_a_row: u32,
    told: Option<String>,
}

impl Failures {
    fn tell(&mut self, settings: &Kubernetes, failure: Option<&FetchError>) -> Span {
        let Some(failure) = failure else {
            if self.told.take().is_some() {
                tracing::info!(url = settings.jwks_url, "the cluster's keys can be fetched again");
            }
            self.in_a_row = 0;
            return REFRESH;
        };
        let error = chain(failure);
        if self.told.as_ref() != Some(&error) {
            tracing::warn!(
                url = settings.jwks_url,
                error,
                "the cluster's keys for service accounts cannot be fetched; those at hand are good for {KEEP}"
            );
            self.told = Some(error);
        }
        let pause = FIRST_PAUSE.times(1 << self.in_a_row.min(5)).min(LONGEST_PAUSE);
        self.in_a_row = self.in_a_row.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(value: Value) -> Claims {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn subject_and_claim_must_name_the_same_account() {
        let of = |namespace: &str, name: &str| json!({"namespace": namespace, "serviceaccount": {"name": name}});
        let good = claims(json!({"sub": "system:serviceaccount:shop:orders", "kubernetes.io": of("shop", "orders")}));
        assert_eq!(account_of(&good).unwrap().to_string(), "shop/orders");
        for (sub, own) in [
            ("system:serviceaccount:shop:orders", json!(null)),
            ("system:serviceaccount:shop:orders", of("shop", "billing")),
            ("system:serviceaccount:shop:orders", of("other", "orders")),
            ("system:serviceaccount:shop:orders", json!({"namespace": "shop"})),
            ("system:serviceaccount:shop", of("shop", "")),
            ("system:node:shop:orders", of("shop", "orders")),
            ("shop:orders", of("shop", "orders")),
        ] {
            let wrong = claims(json!({"sub": sub, "kubernetes.io": own}));
            assert!(matches!(account_of(&wrong), Err(Rejection::NotOfPod { .. })), "{wrong:?}");
        }
    }

    #[test]
    fn what_is_remembered_is_bounded_and_loses_what_expires_first() {
        let known = Known::default();
        let account = ServiceAccount { namespace: "shop".to_owned(), name: "orders".to_owned() };
        let (now, at) = (Timestamp::from_secs(0), |n: usize| Timestamp::from_secs(1_000_000 + n as i64));
        let digest = |n: usize| Sha256::digest(n.to_be_bytes()).into();
        for n in 0..MOST_VERIFIED + 10 {
            known.remember(digest(n), account.clone(), at(n), now);
        }
        assert_eq!(known.verified.read().unwrap().len(), MOST_VERIFIED);
        assert!(known.remembered(&digest(9)).is_none() && known.remembered(&digest(10)).is_some());
    }
}
