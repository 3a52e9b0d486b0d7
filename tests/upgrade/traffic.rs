//! Applications that have every daemon sign without a pause, and caching verifiers behind each daemon, to which every
//! token is shown at once and again shortly before it expires.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::strict_verifier::{Expected, Rejection, StrictVerifier};
use crate::support::{Daemon, Signed, eventually, unix_now};
use crate::{ISSUER, KEYSET};

pub const JWKS: &str = "/.well-known/jwks.json";
const AUDIENCE: &str = "https://api.example.test";

/// As declared: a verifier holds a document for this long after a cache before it has.
const SLOWEST: Duration = Duration::from_secs(1);

const PAUSE: Duration = Duration::from_millis(50);

/// How long before its expiry a token is shown again.
const SHORTLY: Duration = Duration::from_millis(300);

pub struct Traffic {
    seen: Arc<Seen>,
    applications: JoinSet<()>,
    daemons: usize,
}

/// What came of it so far.
#[derive(Default)]
struct Seen {
    /// By kid: which daemons have signed with it.
    signers: Mutex<BTreeMap<String, BTreeSet<usize>>>,
    tally: Mutex<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    /// It was shown after its end, or the verifier's daemon was away: says nothing.
    unjudged: u64,
    rejected: Vec<String>,
    /// Sign requests that a daemon took and did not answer with a token.
    refused: Vec<String>,
}

/// One for each daemon, shared by all applications.
type Verifiers = Arc<[tokio::sync::Mutex<StrictVerifier>]>;

impl Traffic {
    pub fn start(daemons: &[Daemon]) -> Self {
        let seen = Arc::<Seen>::default();
        let verifiers = daemons.iter().map(|daemon| StrictVerifier::new(daemon.url("public", JWKS), SLOWEST));
        let verifiers: Verifiers = verifiers.map(tokio::sync::Mutex::new).collect();
        let mut applications = JoinSet::new();
        for (index, daemon) in daemons.iter().enumerate() {
            let url = daemon.url("signer", &format!("/v1/keysets/{KEYSET}/sign"));
            applications.spawn(apply(index, url, verifiers.clone(), seen.clone()));
        }
        Traffic { seen, applications, daemons: daemons.len() }
    }

    /// Waits until a key that nobody has signed with yet has signed everywhere.
    pub async fn rotates(&self, limit: Duration) {
        let before: BTreeSet<String> = self.seen.signers.lock().unwrap().keys().cloned().collect();
        eventually("a new key to sign everywhere", limit, async || {
            self.assert_nothing_was_rejected();
            let signers = self.seen.signers.lock().unwrap();
            let mut new = signers.iter().filter(|(kid, _)| !before.contains(*kid));
            new.any(|(_, signers)| signers.len() == self.daemons).then_some(())
        })
        .await;
    }

    /// Ends it when every token has been judged, and tells what was seen.
    pub async fn stop(mut self) -> String {
        self.applications.abort_all();
        while self.applications.join_next().await.is_some() {}
        self.assert_nothing_was_rejected();
        let tally = self.seen.tally.lock().unwrap();
        let keys = self.seen.signers.lock().unwrap().len();
        assert!(tally.accepted > 10 * tally.unjudged, "hardly any token was judged: {tally:?}");
        format!("{keys} keys, {} times accepted, {} times not judged in time", tally.accepted, tally.unjudged)
    }

    fn assert_nothing_was_rejected(&self) {
        let tally = self.seen.tally.lock().unwrap();
        assert!(tally.rejected.is_empty(), "live tokens were rejected: {:#?}", tally.rejected);
        assert!(tally.refused.is_empty(), "requests were refused: {:#?}", tally.refused);
    }
}

/// Has one daemon sign for as long as it runs. While it is being replaced there is nobody to ask.
async fn apply(index: usize, url: String, verifiers: Verifiers, seen: Arc<Seen>) {
    let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().unwrap();
    let body = json!({ "claims": { "sub": "alice", "aud": AUDIENCE } });
    let mut later = JoinSet::new();
    loop {
        sleep(PAUSE).await;
        while later.try_join_next().is_some() {}
        let Ok(response) = http.post(&url).json(&body).send().await else { continue };
        let status = response.status();
        let Ok(text) = response.text().await else { continue };
        if status != 200 {
            seen.tally.lock().unwrap().refused.push(format!("daemon {index}: {status} {text}"));
            continue;
        }
        let signed: Signed = serde_json::from_str(&text).unwrap();
        seen.signers.lock().unwrap().entry(signed.kid.clone()).or_default().insert(index);
        show(&verifiers, &signed, &seen, "at once").await;
        let (verifiers, seen) = (verifiers.clone(), seen.clone());
        later.spawn(async move {
            let left = Duration::from_secs(signed.expires_at).saturating_sub(unix_now());
            sleep(left.saturating_sub(SHORTLY)).await;
            show(&verifiers, &signed, &seen, "shortly before its end").await;
        });
    }
}

async fn show(verifiers: &Verifiers, signed: &Signed, seen: &Seen, when: &str) {
    let expected = Expected { iss: ISSUER.to_owned(), aud: AUDIENCE.to_owned(), alg: "ES256".to_owned() };
    for (index, verifier) in verifiers.iter().enumerate() {
        let judged = verifier.lock().await.verify(&signed.token, &expected).await;
        let mut tally = seen.tally.lock().unwrap();
        match judged {
            Ok(_) => tally.accepted += 1,
            Err(rejection) if is_unreachable(&rejection) || has_ended(signed) => tally.unjudged += 1,
            Err(rejection) => {
                tally
                    .rejected
                    .push(format!("verifier {index}, {when}: {rejection}, a token with the key {}", signed.kid));
            }
        }
    }
}

/// The daemon that the verifier fetches from is being replaced.
fn is_unreachable(rejection: &Rejection) -> bool {
    matches!(rejection, Rejection::Document(problem) if problem.contains("reqwest::Error"))
}

fn has_ended(signed: &Signed) -> bool {
    unix_now() >= Duration::from_secs(signed.expires_at)
}
