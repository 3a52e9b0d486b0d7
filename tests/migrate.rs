//! docs/migrate.md, played: its configuration and its commands move a live RS256 issuer to the real daemon and back,
//! while tokens are signed all the time and verified by caches that hold each document for as long as they may.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::IntoResponse;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use support::strict_verifier::{Expected, StrictVerifier};
use support::{Daemon, PATIENCE, eventually, unix_now};

const PAGE: &str = include_str!("../docs/migrate.md");
const ISSUER: &str = "https://auth.example.com";
const URL: &str = "https://auth.example.com/oauth/keys";
const AUDIENCE: &str = "https://api.example.com";
const OLD_KID: &str = "old-2024";

/// Life of every token, and what the page calls 1h and 15m.
const LIFE: u64 = 3;
/// How long the verifiers hold a document: max-age and their own, and how long is waited for that.
const SLOWEST: Duration = Duration::from_millis(1000);
const CACHES: Duration = Duration::from_millis(2200);

#[tokio::test(flavor = "multi_thread")]
async fn the_page_moves_a_live_issuer_without_one_rejected_token() {
    let mut world = World::start("6s").await;
    world.traffic.sign_with(&[Signer::Old]);
    world.tokens_flow().await;

    // Step 1, its way back, and again.
    world.run("beside");
    world.daemon.sigterm().await;
    world.tokens_flow().await;
    world.daemon.restart().await;

    // Step 2, its way back, and again.
    let compared = world.output("compare");
    let compared = String::from_utf8(compared.stdout).unwrap();
    assert!(
        compared.contains("missing") && !compared.contains("foreign") && !compared.contains("tampered"),
        "{compared}"
    );
    world.url.serve(world.ours());
    world.run("equal");
    world.tokens_flow().await;
    world.url.serve(world.theirs.clone());
    world.tokens_flow().await;
    world.url.serve(world.ours());
    tokio::time::sleep(CACHES).await;

    // Step 3, one application after the other, its way back, and again.
    world.run("try");
    world.traffic.sign_with(&[Signer::Old, Signer::Ours]);
    world.tokens_flow().await;
    world.traffic.sign_with(&[Signer::Ours]);
    world.tokens_flow().await;
    world.traffic.sign_with(&[Signer::Old]);
    world.tokens_flow().await;
    world.traffic.sign_with(&[Signer::Ours]);
    tokio::time::sleep(Duration::from_secs(LIFE)).await;

    // Step 4: while it is held the old key stays, however late it is.
    world.old_key_is_due().await;
    assert!(world.publishes_old_key().await);
    world.run("finish");
    world.old_key_leaves().await;
    world.tokens_flow().await;

    // Its way back once the key has left: published again by a second keyset, then it signs.
    let again = world.block("toml", "again");
    world.daemon.add_tables(&again);
    world.daemon.restart().await;
    world.run("again");
    assert!(world.publishes_old_key().await);
    tokio::time::sleep(CACHES).await;
    world.traffic.sign_with(&[Signer::Old, Signer::Ours]);
    world.tokens_flow().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn holding_again_keeps_the_old_key_beyond_its_time() {
    let mut world = World::start("20s").await;
    world.traffic.sign_with(&[Signer::Old]);
    world.run("beside");
    world.url.serve(world.ours());
    tokio::time::sleep(CACHES).await;
    world.traffic.sign_with(&[Signer::Ours]);
    world.tokens_flow().await;
    world.run("finish");
    world.run("keep");
    world.old_key_is_due().await;
    world.traffic.sign_with(&[Signer::Old]);
    world.tokens_flow().await;
    assert!(world.publishes_old_key().await);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_brings_a_private_key_that_signs_at_once() {
    let mut world = World::start("60s").await;
    world.traffic.sign_with(&[Signer::Old]);
    world.tokens_flow().await;
    world.run("private");

    // No wait: every verifier has the key. And back, and on, with the URL switched in between.
    world.traffic.sign_with(&[Signer::Ours]);
    world.tokens_flow().await;
    assert_eq!(world.ours_signs_with().await, OLD_KID);
    world.traffic.sign_with(&[Signer::Old]);
    world.tokens_flow().await;
    world.traffic.sign_with(&[Signer::Old, Signer::Ours]);
    world.url.serve(world.ours());
    world.run("equal");
    world.tokens_flow().await;
    world.url.serve(world.theirs.clone());
    world.tokens_flow().await;
    world.url.serve(world.ours());
    tokio::time::sleep(CACHES).await;
    world.run("private-finish");

    // The change of keys is an ordinary rotation.
    world.traffic.sign_with(&[Signer::Ours]);
    world.jwksd("jwksd rotate --wait");
    world.tokens_flow().await;
    assert_ne!(world.ours_signs_with().await, OLD_KID);
    world.tokens_flow().await;
    world.end().await;
}

#[test]
fn every_block_with_an_id_is_played() {
    let source = include_str!("migrate.rs");
    for (kind, id) in blocks(PAGE).keys() {
        assert!(source.contains(&format!("\"{id}\"")), "nothing plays the block {id} ({kind})");
    }
}

/// The old issuer, the URL that verifiers know, jwksd, and the traffic.
struct World {
    daemon: Daemon,
    url: Url,
    theirs: Served,
    traffic: Traffic,
    /// What the page calls 60d, and since when it runs.
    until: &'static str,
    imported: Option<Instant>,
    commands: BTreeMap<(String, String), String>,
}

impl World {
    /// `until` stands for the page's 60d: how long the old key stays published.
    async fn start(until: &'static str) -> World {
        let commands = blocks(PAGE);
        let pem = std::fs::read(vector("rsa2048-pkcs8.pem")).unwrap();
        let old_key = EncodingKey::from_rsa_pem(&pem).unwrap();
        let theirs = Served::Document(old_jwks(&old_key).to_string());
        let url = Url::start(theirs.clone()).await;
        let config = commands[&("toml".to_owned(), "config".to_owned())].clone();
        let config = swap(
            &config,
            &[
                ("\"5m\"", "\"1s\""),
                ("\"30d\"", "\"10m\""),
                ("\"24h\"", "\"4s\""),
                ("\"15m\"", &format!("\"{LIFE}s\"")),
                ("\"60s\"", "\"500ms\""),
            ],
        );
        let defaults = format!("[defaults.tokens]\ndefault_ttl = \"{LIFE}s\"\n");
        let config = format!("{config}{defaults}");
        let mut daemon = Daemon::builder().tables(&config).start().await;
        // From now on the file names the ports, so that commands find them.
        daemon.restart().await;
        std::fs::write(daemon.path("old.pem"), pem).unwrap();
        std::fs::copy(vector("rsa2048-spki.pem"), daemon.path("old-public.pem")).unwrap();
        let traffic = Traffic::start(old_key, daemon.url("signer", "/v1/keysets/default/sign"), &url.address);
        World { daemon, url, theirs, traffic, until, imported: None, commands }
    }

    fn ours(&self) -> Served {
        Served::From(self.daemon.url("public", "/oauth/keys"))
    }

    fn block(&self, kind: &str, id: &str) -> String {
        let text = self.commands.get(&(kind.to_owned(), id.to_owned()));
        let text = text.unwrap_or_else(|| panic!("docs/migrate.md has no block {id}"));
        if kind == "toml" {
            let rotation = "every = \"10m\"\npropagation = \"4s\"\n";
            let tokens = format!(
                "[keyset.old.tokens]\nmax_ttl = \"{LIFE}s\"\ndefault_ttl = \"{LIFE}s\"\nclock_skew = \"500ms\"\n"
            );
            return format!("{}{rotation}{tokens}", text);
        }
        let life = format!("--max-token-life {LIFE}s");
        // The way back after the end needs a time of its own.
        let until = if id == "again" { "60s" } else { self.until };
        text.replace(URL, &self.url.address).replace("60d", until).replace("--max-token-life 1h", &life)
    }

    /// Runs the block's commands; each must succeed.
    fn run(&mut self, id: &str) {
        let output = self.output(id);
        assert!(output.status.success(), "{id}: {output:?}");
        if id == "beside" {
            self.imported = Some(Instant::now());
        }
    }

    fn output(&self, id: &str) -> Output {
        self.shell(&self.block("sh", id))
    }

    fn jwksd(&self, command: &str) {
        let output = self.shell(command);
        assert!(output.status.success(), "{command}: {output:?}");
    }

    fn shell(&self, script: &str) -> Output {
        let binary = Path::new(env!("CARGO_BIN_EXE_jwksd")).parent().unwrap();
        let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("sh");
        shell.args(["-e", "-c", script]).current_dir(self.daemon.path("")).env("PATH", path);
        shell.env_remove("JWKSD_SERVER").env_remove("JWKSD_TOKEN").env("JWKSD_CONFIG", "jwksd.toml");
        shell.output().unwrap()
    }

    async fn published_kids(&self) -> Vec<String> {
        let document = self.daemon.get("public", "/oauth/keys").await.json();
        document["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
    }

    async fn publishes_old_key(&self) -> bool {
        self.published_kids().await.iter().any(|kid| kid == OLD_KID)
    }

    async fn ours_signs_with(&self) -> String {
        self.daemon.sign("default", json!({ "claims": { "sub": "a", "aud": AUDIENCE } })).await.kid
    }

    /// Waits until the old key's stated time has passed.
    async fn old_key_is_due(&self) {
        let until = Duration::from_secs(self.until.trim_end_matches('s').parse().unwrap());
        tokio::time::sleep_until(self.imported.unwrap() + until).await;
    }

    async fn old_key_leaves(&self) {
        eventually("the old key to leave", PATIENCE, async || (!self.publishes_old_key().await).then_some(())).await;
    }

    /// Lets a token's whole life pass: nothing may be rejected.
    async fn tokens_flow(&self) {
        let issued = self.traffic.count().0;
        let lived = async || (self.traffic.count().1 > issued).then_some(());
        eventually("a token to live its whole life", PATIENCE, lived).await;
        self.traffic.nothing_rejected();
    }

    async fn end(self) {
        self.traffic.nothing_rejected();
        assert!(self.traffic.tally.lock().unwrap().verified > 100);
        self.traffic.task.abort();
    }
}

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/keys").join(name)
}

/// The fenced blocks with an id, by kind and id.
fn blocks(page: &str) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for block in page.split("```").skip(1).step_by(2) {
        let (head, text) = block.split_once('\n').unwrap();
        if let Some((kind, id)) = head.split_once(" id=") {
            let earlier = found.insert((kind.to_owned(), id.trim().to_owned()), text.to_owned());
            assert!(earlier.is_none(), "two blocks {head}");
        }
    }
    found
}

/// Replaces each text, which must occur.
fn swap(text: &str, pairs: &[(&str, &str)]) -> String {
    pairs.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "docs/migrate.md does not say {from} any more");
        text.replace(from, to)
    })
}

fn old_jwks(key: &EncodingKey) -> Value {
    let jwk = serde_json::to_value(Jwk::from_encoding_key(key, Algorithm::RS256).unwrap()).unwrap();
    json!({ "keys": [{ "kty": "RSA", "n": jwk["n"], "e": jwk["e"], "kid": OLD_KID, "use": "sig", "alg": "RS256" }] })
}

/// What the URL that verifiers know answers.
#[derive(Clone)]
enum Served {
    Document(String),
    /// As a proxy would.
    From(String),
}

struct Url {
    address: String,
    served: Arc<Mutex<Served>>,
}

impl Url {
    async fn start(first: Served) -> Url {
        let served = Arc::new(Mutex::new(first));
        let router = Router::new().fallback(answer).with_state(served.clone());
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}/oauth/keys", socket.local_addr().unwrap());
        tokio::spawn(axum::serve(socket, router).into_future());
        Url { address, served }
    }

    fn serve(&self, served: Served) {
        *self.served.lock().unwrap() = served;
    }
}

async fn answer(State(served): State<Arc<Mutex<Served>>>) -> impl IntoResponse {
    let served = served.lock().unwrap().clone();
    let body = match served {
        Served::Document(text) => text,
        Served::From(url) => proxied(&url).await,
    };
    ([(CONTENT_TYPE, "application/jwk-set+json"), (CACHE_CONTROL, "public, max-age=1")], body)
}

/// As a proxy asks again while what is behind it restarts.
async fn proxied(url: &str) -> String {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for _ in 0..200 {
        if let Ok(answer) = client.get(url).send().await
            && answer.status() == 200
        {
            return answer.text().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{url} does not answer");
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Signer {
    Old,
    Ours,
}

/// Signs all the time and verifies every living token all the time.
struct Traffic {
    signers: Arc<Mutex<Vec<Signer>>>,
    tally: Arc<Mutex<Tally>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Tally {
    issued: usize,
    expired: usize,
    verified: usize,
    rejected: Vec<String>,
}

impl Traffic {
    fn start(old_key: EncodingKey, ours: String, url: &str) -> Traffic {
        let (signers, tally) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Tally::default())));
        let verifiers: Vec<_> = (0..3).map(|_| StrictVerifier::new(url.to_owned(), SLOWEST)).collect();
        let task = tokio::spawn(flow(old_key, ours, verifiers, signers.clone(), tally.clone()));
        Traffic { signers, tally, task }
    }

    fn sign_with(&self, signers: &[Signer]) {
        *self.signers.lock().unwrap() = signers.to_vec();
    }

    /// Tokens issued, and tokens that have expired since.
    fn count(&self) -> (usize, usize) {
        let tally = self.tally.lock().unwrap();
        (tally.issued, tally.expired)
    }

    fn nothing_rejected(&self) {
        let tally = self.tally.lock().unwrap();
        assert!(tally.rejected.is_empty(), "{:#?}", tally.rejected);
        assert!(!self.task.is_finished(), "the traffic has ended");
    }
}

async fn flow(
    old_key: EncodingKey,
    ours: String,
    mut verifiers: Vec<StrictVerifier>,
    signers: Arc<Mutex<Vec<Signer>>>,
    tally: Arc<Mutex<Tally>>,
) {
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let expected = Expected { iss: ISSUER.to_owned(), aud: AUDIENCE.to_owned(), alg: "RS256".to_owned() };
    let mut alive: Vec<(u64, String)> = Vec::new();
    for turn in 0.. {
        let now = unix_now();
        let chosen = signers.lock().unwrap().clone();
        for signer in chosen {
            let token = match signer {
                Signer::Old => old_token(&old_key, now.as_secs()),
                Signer::Ours => {
                    let body = json!({ "claims": { "sub": "alice", "aud": AUDIENCE } });
                    let sent = http.post(&ours).json(&body).send().await;
                    // While it restarts there is no answer; a token that nobody got cannot be rejected.
                    let Ok(answer) = sent else { continue };
                    let answer: Value = answer.json().await.unwrap();
                    answer["token"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
                }
            };
            alive.push((now.as_secs() + LIFE, token));
            tally.lock().unwrap().issued += 1;
        }
        for (position, verifier) in verifiers.iter_mut().enumerate() {
            // They begin at different times, so that their caches expire at different ones.
            if turn < position * 3 {
                continue;
            }
            for (expires, token) in &alive {
                if unix_now() + Duration::from_millis(300) >= Duration::from_secs(*expires) {
                    continue;
                }
                let verdict = verifier.verify(token, &expected).await;
                let late = unix_now() >= Duration::from_secs(*expires);
                let mut tally = tally.lock().unwrap();
                match verdict {
                    Ok(_) => tally.verified += 1,
                    Err(_) if late => {}
                    Err(rejection) => {
                        tally.rejected.push(format!("{position}: {rejection}, at {:?}: {token}", unix_now()));
                    }
                }
            }
        }
        let before = alive.len();
        alive.retain(|(expires, _)| unix_now() < Duration::from_secs(*expires));
        tally.lock().unwrap().expired += before - alive.len();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn old_token(key: &EncodingKey, now: u64) -> String {
    let mut header = Header::new(Algorithm::RS256);
    header.kid = Some(OLD_KID.to_owned());
    let claims = json!({ "iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "nbf": now, "exp": now + LIFE });
    encode(&header, &claims, key).unwrap()
}
