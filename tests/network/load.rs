//! Applications that ask for tokens all the time, and verifiers that hold what they fetched for as long as they may.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use crate::fleet::{Face, ISSUER, VERIFIER_CACHE};
use crate::random::Random;
use crate::story::{Story, short};
use crate::support::{Answer, Signed, unix_now};

/// Between two requests of one application.
const PAUSE: Duration = Duration::from_millis(100);
/// For one request of a verifier or a health check.
const FETCH_LIMIT: Duration = Duration::from_millis(700);
/// How old what a balancer knows of a replica may be. It counts as part of how long a document is held.
const HEALTH_AGE: Duration = Duration::from_secs(1);
/// A verifier looks at a token for the last time this long before it expires.
const BEFORE_EXPIRY: Duration = Duration::from_millis(150);
/// What the clocks of the verifiers are ahead of the test's, in milliseconds.
const CLOCKS: [i64; 4] = [-400, 0, 400, 0];

/// A token on its way to the verifiers.
#[derive(Clone)]
struct Token {
    text: Arc<str>,
    kid: Arc<str>,
    signer: &'static str,
    nbf: Duration,
    exp: Duration,
}

/// Starts everything; it runs until the runtime ends.
pub fn start(story: &Arc<Story>, faces: &[Arc<Face>], seed: u64) {
    let mut verifiers = Vec::new();
    for (index, clock) in (0u64..).zip(CLOCKS) {
        let (sender, tokens) = unbounded_channel();
        verifiers.push(sender);
        let random = Random::new(seed.wrapping_add(index));
        let verifier = Verifier { name: index, clock, story: story.clone(), faces: faces.to_vec(), random, held: None };
        tokio::spawn(verifier.run(tokens));
    }
    for (index, face) in (100u64..).zip(faces.iter().filter(|face| face.signs())) {
        tokio::spawn(apply(story.clone(), face.clone(), verifiers.clone(), Random::new(seed.wrapping_add(index))));
    }
}

/// An application beside a signer.
async fn apply(story: Arc<Story>, face: Arc<Face>, verifiers: Vec<UnboundedSender<Token>>, mut random: Random) {
    loop {
        tokio::time::sleep(PAUSE).await;
        if !face.is_up() {
            continue;
        }
        match face.sign(2 + random.below(3)).await {
            Ok(answer) if answer.status == 200 => {
                let token = signed(&answer, face.name);
                story.signed(face.name, &token.kid);
                for verifier in &verifiers {
                    let _ = verifier.send(token.clone());
                }
            }
            Ok(answer) if is_stale(&answer) => story.refused(face.name),
            Ok(answer) => return story.fail(format!("{}: {} {}", face.name, answer.status, answer.text)),
            // It is being killed.
            Err(_) if !face.is_up() => {}
            Err(error) => return story.fail(format!("{} does not answer applications: {error:?}", face.name)),
        }
    }
}

fn is_stale(answer: &Answer) -> bool {
    answer.status == 503 && answer.json()["type"] == "urn:jwksd:problem:stale-keyring"
}

fn signed(answer: &Answer, signer: &'static str) -> Token {
    let signed: Signed = serde_json::from_value(answer.json()).expect("the members that DESIGN.md §7 promises");
    let claims: Value = jsonwebtoken::dangerous::insecure_decode(&signed.token).expect("a token").claims;
    let seconds = |name: &str| Duration::from_secs(claims[name].as_u64().expect("seconds"));
    let (nbf, exp) = (seconds("nbf"), seconds("exp"));
    Token { text: signed.token.into(), kid: signed.kid.into(), signer, nbf, exp }
}

/// Tokens by when they are to be looked at.
#[derive(Default)]
struct Waiting(VecDeque<(Duration, Token)>);

impl Waiting {
    fn add(&mut self, due: Duration, token: Token) {
        let place = self.0.partition_point(|(other, _)| *other <= due);
        self.0.insert(place, (due, token));
    }

    fn first(&self) -> Option<Duration> {
        self.0.front().map(|(due, _)| *due)
    }

    fn next(&mut self) -> Option<Token> {
        self.0.pop_front().map(|(_, token)| token)
    }
}

/// Fetches from any replica that is ready, holds what it got, never looks again because of an unknown kid.
struct Verifier {
    name: u64,
    /// Milliseconds.
    clock: i64,
    story: Arc<Story>,
    faces: Vec<Arc<Face>>,
    random: Random,
    held: Option<Held>,
}

struct Held {
    until: Instant,
    from: &'static str,
    fetched: Instant,
    keys: BTreeMap<String, DecodingKey>,
}

impl Verifier {
    /// Looks at each token as soon as it lives, and again just before it expires.
    async fn run(mut self, mut tokens: UnboundedReceiver<Token>) {
        let mut waiting = Waiting::default();
        loop {
            let due = waiting.first().map(|due| due.saturating_sub(self.now()));
            tokio::select! {
                token = tokens.recv() => {
                    let Some(token) = token else { return };
                    waiting.add(token.exp - BEFORE_EXPIRY, token.clone());
                    // A clock behind the signer's: to this verifier it may not live yet.
                    waiting.add(token.nbf, token);
                }
                () = tokio::time::sleep(due.unwrap_or_default()), if due.is_some() => {
                    let token = waiting.next().expect("it is due");
                    self.look_at(&token).await;
                }
            }
        }
    }

    fn now(&self) -> Duration {
        let ahead = Duration::from_millis(self.clock.unsigned_abs());
        if self.clock < 0 { unix_now() - ahead } else { unix_now() + ahead }
    }

    async fn look_at(&mut self, token: &Token) {
        if self.held.as_ref().is_none_or(|held| Instant::now() >= held.until) {
            let fetched = self.fetch().await;
            self.held = Some(fetched);
        }
        let held = self.held.as_ref().expect("it was fetched");
        if self.now() >= token.exp {
            self.story.counts.late.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Err(reason) = verify(token, &held.keys) else {
            self.story.counts.accepted.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if !self.story.is_revoked(&token.kid) {
            self.story.fail(format!(
                "verifier {} rejected a live token of {}, signed with {} ({reason}): its document is {:?} old, of {}, \
                 and holds {:?}; the token lives for {:?} more",
                self.name,
                token.signer,
                short(&token.kid),
                held.fetched.elapsed(),
                held.from,
                held.keys.keys().map(|kid| short(kid)).collect::<Vec<_>>(),
                token.exp.saturating_sub(self.now()),
            ));
        }
    }

    /// As behind a balancer: from one that is ready, if there is one; from any that answers if all say they are not.
    async fn fetch(&mut self) -> Held {
        loop {
            let mut order: Vec<Arc<Face>> = self.faces.iter().filter(|face| face.is_up()).cloned().collect();
            for last in (1..order.len()).rev() {
                let chosen = self.random.below(last as u64 + 1);
                order.swap(last, usize::try_from(chosen).expect("it is an index"));
            }
            let mut unready = 0;
            for face in &order {
                let asked = Instant::now();
                match face.ops("/readyz", FETCH_LIMIT).await {
                    Ok(answer) if answer.status == 200 => {
                        if let Some(held) = self.fetch_from(face, asked).await {
                            return held;
                        }
                    }
                    Ok(_) => unready += 1,
                    Err(_) => {}
                }
            }
            if unready > 0 && unready == order.len() {
                self.story.counts.desperate.fetch_add(1, Ordering::Relaxed);
                if let Some(held) = self.fetch_from(&order[0], Instant::now()).await {
                    return held;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// `judged` is when the replica was asked whether it is ready.
    async fn fetch_from(&self, face: &Face, judged: Instant) -> Option<Held> {
        let fetched = Instant::now();
        let answer = face.jwks(FETCH_LIMIT).await.ok()?;
        // What is cut off and what has no key yet is all that may keep a document back.
        if answer.status != 200 && face.is_up() {
            self.story.fail(format!("{} answers {} to a verifier: {}", face.name, answer.status, answer.text));
        }
        let old = judged.elapsed() > HEALTH_AGE;
        if old || answer.status != 200 {
            return None;
        }
        assert_eq!(answer.headers["cache-control"], "public, max-age=1");
        self.story.counts.fetches.fetch_add(1, Ordering::Relaxed);
        let until = fetched + Duration::from_secs(1) + VERIFIER_CACHE.saturating_sub(HEALTH_AGE);
        Some(Held { until, from: face.name, fetched, keys: keys(&answer.json()) })
    }
}

fn keys(document: &Value) -> BTreeMap<String, DecodingKey> {
    let keys = document["keys"].as_array().expect("a JWKS").iter();
    let text = |key: &Value, member: &str| key[member].as_str().expect("a member of an EC key").to_owned();
    keys.map(|key| {
        let decoding = DecodingKey::from_ec_components(&text(key, "x"), &text(key, "y")).expect("a point");
        (text(key, "kid"), decoding)
    })
    .collect()
}

/// Whether it lives is asked elsewhere, by the verifier's own clock.
fn verify(token: &Token, keys: &BTreeMap<String, DecodingKey>) -> Result<(), String> {
    let key = keys.get(&*token.kid).ok_or("no such key")?;
    let mut validation = Validation::new(Algorithm::ES256);
    validation.validate_exp = false;
    validation.set_issuer(&[ISSUER]);
    validation.set_audience(&["a"]);
    jsonwebtoken::decode::<Value>(token.text.as_bytes(), key, &validation).map(drop).map_err(|error| error.to_string())
}
