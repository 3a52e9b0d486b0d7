//! The real daemon before real verifiers: through rotations a few seconds apart, with every cache as slow as declared,
//! no valid token is rejected and no forged one accepted.

mod support;

#[path = "interop/envoy_example.rs"]
mod envoy_example;
#[path = "interop/forgery.rs"]
mod forgery;
#[path = "interop/verifiers.rs"]
mod verifiers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep};

use forgery::{Forgery, Stranger};
use support::localstack::{Account, REGION};
use support::strict_verifier::Expected;
use support::{Daemon, Signed, unix_now};
use verifiers::{Setting, Verifier};

const ISSUER: &str = "https://issuer.example.test";
const AUDIENCE: &str = "https://api.example.test";

/// What every verifier keeps a document for, and declares.
const CACHE: Duration = Duration::from_secs(1);

/// How many rotations each algorithm goes through by schedule, and how many more because an operator asks as soon as
/// one is possible: only those come right when the new key's propagation is over.
const ROTATIONS: usize = 5;

/// Rotations are three seconds apart; a machine may be slow, but not without end.
const LIMIT: Duration = Duration::from_secs(180);

/// How long before its expiry a token is shown again.
const SHORTLY: Duration = Duration::from_millis(300);

macro_rules! for_each_algorithm {
    ($($module:ident $alg:literal),+) => {
        $(mod $module {
            #[tokio::test(flavor = "multi_thread")]
            async fn tokens_are_accepted_through_rotations() {
                super::accepted_through_rotations($alg).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn forged_and_expired_tokens_are_rejected() {
                super::forged_and_expired_are_rejected($alg).await;
            }
        })+
    };
}

/// The same with keys in AWS KMS, which LocalStack plays; it has no Ed25519 keys.
macro_rules! for_each_algorithm_of_aws_kms {
    ($($module:ident $alg:literal),+) => {
        mod aws_kms {
            $(mod $module {
                #[tokio::test(flavor = "multi_thread")]
                async fn tokens_are_accepted_through_rotations() {
                    let account = crate::support::localstack::LocalStack::shared().await.account();
                    crate::accepted_through_rotations_of($alg, Some(&account)).await;
                }
            })+
        }
    };
}

for_each_algorithm_of_aws_kms!(es256 "ES256", es384 "ES384", rs256 "RS256", ps256 "PS256");

for_each_algorithm!(es256 "ES256", es384 "ES384", rs256 "RS256", ps256 "PS256", eddsa "EdDSA");

/// Propagation is exactly caches (`max_age`) + slowest verifier + σ: nothing is left over. The overlap is derived.
fn restless(alg: &str, account: Option<&Account>) -> String {
    let remote = account.map(|account| {
        let Account { endpoint, .. } = account;
        format!("backend = \"aws-kms\"\n[backend.aws-kms]\nregion = \"{REGION}\"\nendpoint_url = \"{endpoint}\"\n")
    });
    let backend = remote.unwrap_or_default();
    format!(
        r#"
[issuer.main]
url = "{ISSUER}"
max_age = "1s"

[keyset.main]
algorithm = "{alg}"
{backend}
[keyset.main.rotation]
every = "3s"
propagation = "2100ms"
verifiers = [{{ name = "interop", cache = "{}s" }}]
[keyset.main.tokens]
max_ttl = "2s"
clock_skew = "100ms"
"#,
        CACHE.as_secs()
    )
}

/// Two issuers of one daemon whose keys stay for the length of a test.
fn steady(alg: &str) -> String {
    format!(
        r#"
[issuer.main]
url = "{ISSUER}"

[issuer.other]
url = "{ISSUER}/other"

[keyset.main]
issuer = "main"
algorithm = "{alg}"

[keyset.other]
issuer = "other"
algorithm = "{alg}"
"#
    )
}

/// A daemon with every verifier that knows the algorithm before it.
struct Trial {
    daemon: Daemon,
    verifiers: Arc<[Box<dyn Verifier>]>,
    stranger: Stranger,
}

/// What one verifier said about one token, and whether that counts: a rejection after `exp` is no fault.
struct Verdict {
    verifier: String,
    kid: String,
    outcome: Outcome,
}

enum Outcome {
    Accepted,
    Rejected(String),
    TooLate,
}

async fn accepted_through_rotations(alg: &str) {
    accepted_through_rotations_of(alg, None).await;
}

/// With keys of the daemon itself, or of an account of AWS KMS.
async fn accepted_through_rotations_of(alg: &str, account: Option<&Account>) {
    let environment = account.map(Account::environment);
    let trial = Trial::start_with(alg, &restless(alg, account), environment.as_ref().map_or(&[], |e| &e[..])).await;
    let began = Instant::now();
    let mut kids = Vec::new();
    let mut entries = Entries::default();
    let (mut at_once, mut shortly_before) = (Tally::default(), Tally::default());
    let mut later: JoinSet<Vec<Verdict>> = JoinSet::new();
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for nth in 0.. {
        assert!(began.elapsed() < LIMIT, "only {} rotations within {LIMIT:?}", kids.len().saturating_sub(1));
        pace.tick().await;
        if kids.len() > ROTATIONS {
            trial.rotate_if_possible().await;
        }
        let signed = trial.daemon.sign("main", request(2)).await;
        if kids.last() != Some(&signed.kid) {
            assert!(!kids.contains(&signed.kid), "{} signs again: {kids:?}", signed.kid);
            // One rotation more than asked for, so that tokens of all those keys are seen until they expire.
            if kids.len() > 2 * ROTATIONS {
                break;
            }
            kids.push(signed.kid.clone());
            entries = trial.published(&signed.kid).await;
        }
        at_once.add(trial.show(&signed).await);
        if nth % 3 == 0 {
            trial
                .nobody_accepts(&trial.stranger.forgery(nth, &signed.token, &entries.signing, &entries.other_kid))
                .await;
        }
        later.spawn(show_shortly_before_expiry(Arc::clone(&trial.verifiers), signed));
        while let Some(verdicts) = later.try_join_next() {
            shortly_before.add(verdicts.expect("a verifier broke down"));
        }
        assert!(at_once.rejected.is_empty(), "right after signing: {:#?}", at_once.rejected);
        assert!(shortly_before.rejected.is_empty(), "shortly before expiry: {:#?}", shortly_before.rejected);
    }
    for verdicts in later.join_all().await {
        shortly_before.add(verdicts);
    }
    assert!(shortly_before.rejected.is_empty(), "shortly before expiry: {:#?}", shortly_before.rejected);
    for verifier in trial.verifiers.iter() {
        let seen_at_once = at_once.accepted_kids(verifier.name());
        assert_eq!(seen_at_once, kids.iter().collect(), "{} was not asked in time about every key", verifier.name());
        let seen_late = shortly_before.accepted_kids(verifier.name()).len();
        assert!(seen_late > ROTATIONS, "{} answered in time for old tokens of {seen_late} keys only", verifier.name());
    }
    let by_schedule = [("keyset", "main"), ("trigger", "schedule")];
    let counted = trial.daemon.metrics().await.sum("jwksd_rotations_total", &by_schedule).expect("the series exists");
    assert!(counted >= ROTATIONS as f64, "{counted} rotations counted, {kids:?} and another signed");
}

async fn forged_and_expired_are_rejected(alg: &str) {
    let trial = Trial::start(alg, &steady(alg)).await;
    let signed = trial.daemon.sign("main", request(300)).await;
    for verdict in trial.show(&signed).await {
        if let Outcome::Rejected(reason) = verdict.outcome {
            panic!("{} rejected the token to be forged: {reason}", verdict.verifier);
        }
    }
    let entries = trial.published(&signed.kid).await;
    for forgery in trial.stranger.forgeries(&signed.token, &entries.signing, &entries.other_kid) {
        trial.nobody_accepts(&forgery).await;
    }
    let token = trial.daemon.sign("other", request(300)).await.token;
    trial.nobody_accepts(&Forgery { what: "another issuer's token", token }).await;
    let for_others = json!({"claims": {"sub": "alice", "aud": "https://other.example.test"}});
    let token = trial.daemon.sign("main", for_others).await.token;
    trial.nobody_accepts(&Forgery { what: "a token for another audience", token }).await;
    trial.expired_tokens_are_rejected().await;
}

/// The published entry of the key that signs, and the kid of another key beside it.
#[derive(Default)]
struct Entries {
    signing: Value,
    other_kid: String,
}

impl Trial {
    async fn start(alg: &str, tables: &str) -> Self {
        Trial::start_with(alg, tables, &[]).await
    }

    async fn start_with(alg: &str, tables: &str, environment: &[(&'static str, String)]) -> Self {
        let mut builder = Daemon::builder().tables(tables);
        for (name, value) in environment {
            builder = builder.env(name, value);
        }
        let daemon = builder.start().await;
        let setting = Setting {
            jwks_url: daemon.url("public", "/.well-known/jwks.json"),
            expected: Expected { iss: ISSUER.to_owned(), aud: AUDIENCE.to_owned(), alg: alg.to_owned() },
            cache: CACHE,
        };
        Trial { daemon, verifiers: verifiers::all(&setting).await.into(), stranger: Stranger::new(alg) }
    }

    async fn published(&self, kid: &str) -> Entries {
        let document = self.daemon.get("public", "/.well-known/jwks.json").await.json();
        let keys = document["keys"].as_array().expect("a document has keys");
        let (signing, others): (Vec<_>, Vec<_>) = keys.iter().partition(|key| key["kid"] == kid);
        Entries {
            signing: signing
                .first()
                .map(|key| Value::clone(key))
                .unwrap_or_else(|| panic!("{kid} signs unpublished: {document}")),
            other_kid: others.first().and_then(|key| key["kid"].as_str()).expect("a successor waits").to_owned(),
        }
    }

    async fn rotate_if_possible(&self) {
        let reason = json!({"reason": "as early as can be"});
        let answer = self.daemon.admin(Method::POST, "/keysets/main/rotate", Some(reason)).await;
        assert!([200, 409].contains(&answer.status), "rotate: {} {}", answer.status, answer.text);
    }

    async fn show(&self, signed: &Signed) -> Vec<Verdict> {
        show(&self.verifiers, signed).await
    }

    async fn nobody_accepts(&self, forgery: &Forgery) {
        let answers = join_all(self.verifiers.iter().map(|verifier| verifier.verify(&forgery.token))).await;
        for (verifier, answer) in self.verifiers.iter().zip(answers) {
            assert!(answer.is_err(), "{} accepted {}: {}", verifier.name(), forgery.what, forgery.token);
        }
    }

    async fn expired_tokens_are_rejected(&self) {
        let signed = self.daemon.sign("main", request(1)).await;
        join_all(self.verifiers.iter().map(|verifier| async {
            let (expired, slack) = verifier.expiry();
            sleep((Duration::from_secs(signed.expires_at) + slack).saturating_sub(unix_now())).await;
            let reason = match verifier.verify(&signed.token).await {
                Err(reason) => reason,
                Ok(()) => panic!("{} accepted an expired token", verifier.name()),
            };
            assert!(reason.contains(expired), "{} rejected an expired token because of {reason}", verifier.name());
        }))
        .await;
    }
}

/// Verdicts so far: whom of which keys each verifier accepted, and every rejection that is a fault.
#[derive(Default)]
struct Tally {
    accepted: BTreeMap<String, BTreeSet<String>>,
    rejected: Vec<String>,
}

impl Tally {
    fn add(&mut self, verdicts: Vec<Verdict>) {
        for Verdict { verifier, kid, outcome } in verdicts {
            match outcome {
                Outcome::Accepted => drop(self.accepted.entry(verifier).or_default().insert(kid)),
                Outcome::Rejected(reason) => self.rejected.push(format!("{verifier}, kid {kid}: {reason}")),
                Outcome::TooLate => {}
            }
        }
    }

    fn accepted_kids(&self, verifier: &str) -> BTreeSet<&String> {
        self.accepted.get(verifier).into_iter().flatten().collect()
    }
}

async fn show_shortly_before_expiry(verifiers: Arc<[Box<dyn Verifier>]>, signed: Signed) -> Vec<Verdict> {
    sleep(Duration::from_secs(signed.expires_at).saturating_sub(unix_now() + SHORTLY)).await;
    show(&verifiers, &signed).await
}

/// Shows a token to every verifier at once.
async fn show(verifiers: &[Box<dyn Verifier>], signed: &Signed) -> Vec<Verdict> {
    join_all(verifiers.iter().map(|verifier| async {
        let answer = verifier.verify(&signed.token).await;
        let outcome = match answer {
            Ok(()) => Outcome::Accepted,
            Err(_) if unix_now().as_secs() >= signed.expires_at => Outcome::TooLate,
            Err(reason) => Outcome::Rejected(reason),
        };
        Verdict { verifier: verifier.name().to_owned(), kid: signed.kid.clone(), outcome }
    }))
    .await
}

fn request(ttl_seconds: u64) -> Value {
    json!({"claims": {"sub": "alice", "aud": AUDIENCE}, "ttl": ttl_seconds})
}
