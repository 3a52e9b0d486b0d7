//! The soak itself: a daemon, constant load on it, a verifier that knows nothing but the JWKS, and samples.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use crate::support::Outcome;
use crate::support::client::Connection;
use crate::support::daemon::{Daemon, Site};

/// How long and how finely.
pub struct Plan {
    pub length: Duration,
    /// Between two samples.
    pub every: Duration,
}

/// What a run brought.
#[derive(Default)]
pub struct Soak {
    pub samples: Vec<Sample>,
    /// Requests and verifications.
    pub failures: u64,
    pub first_failure: String,
    pub verifications: u64,
}

impl Soak {
    /// Since the start.
    pub fn rotations(&self) -> u64 {
        self.samples.last().map_or(0, |sample| sample.rotations)
    }
}

/// A moment of the daemon, and the requests since the moment before.
#[derive(Clone, Debug)]
pub struct Sample {
    pub at: Duration,
    pub resident: u64,
    pub open_files: u64,
    pub threads: u64,
    /// Of all issuers.
    pub jwks_bytes: u64,
    /// Since the start.
    pub rotations: u64,
    pub requests: u64,
    pub signatures: Latencies,
    pub documents: Latencies,
}

/// In milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latencies {
    pub p50: f64,
    pub p99: f64,
}

/// A cheap algorithm that rotates as often as its verifiers allow, and one whose keys are expensive to make. Verifiers
/// cache for a second, as these here do.
const TABLES: &str = r#"
[issuer.orders]
url = "https://issuer.example.test/orders"
max_age = "1s"
[issuer.billing]
url = "https://issuer.example.test/billing"
max_age = "1s"
[defaults.rotation]
propagation = "2500ms"
verifiers = [{ name = "soak", cache = "1s" }]
[defaults.tokens]
max_ttl = "3s"
default_ttl = "3s"
clock_skew = "200ms"
[keyset.orders]
issuer = "orders"
algorithm = "ES256"
rotation.every = "3s"
[keyset.billing]
issuer = "billing"
algorithm = "RS256"
rotation.every = "12s"
"#;

const KEYSETS: [&str; 2] = ["orders", "billing"];

/// Connections and their requests per second.
const LOAD: [(What, u32); 6] = [
    (What::Sign("orders"), 100),
    (What::Sign("orders"), 100),
    (What::Sign("orders"), 100),
    (What::Sign("billing"), 20),
    (What::Fetch("orders"), 100),
    (What::Fetch("billing"), 100),
];

const CLAIMS: &str = r#"{"claims":{"sub":"user-4711","aud":"https://api.example.com"}}"#;
const AUDIENCE: &str = "https://api.example.com";

/// One token in so many of a connection is verified, at once and late in its life.
const SAMPLED: u32 = 10;

/// A token lives for two to three seconds.
const LATE: Duration = Duration::from_millis(1_500);

/// What the verifier was told that it may cache.
const MAX_AGE: Duration = Duration::from_secs(1);

/// A request that begins later than this after its time waited for the one before it, and counts from its time.
const PUNCTUAL: Duration = Duration::from_millis(2);

#[derive(Clone, Copy)]
enum What {
    Sign(&'static str),
    Fetch(&'static str),
}

/// What all tasks of a run write down.
#[derive(Default)]
struct Notes {
    signatures: Mutex<Vec<Duration>>,
    documents: Mutex<Vec<Duration>>,
    failures: AtomicU64,
    first_failure: Mutex<Option<String>>,
    verifications: AtomicU64,
}

impl Notes {
    fn failed(&self, what: impl std::fmt::Display) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        lock(&self.first_failure).get_or_insert_with(|| what.to_string());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the daemon, loads it for as long as planned and stops it.
pub async fn soak(binary: PathBuf, plan: &Plan) -> Outcome<Soak> {
    let site = Site::new(binary, TABLES)?;
    let daemon = site.start().await?;
    let notes = Arc::new(Notes::default());
    let (sampled, to_verify) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    for (what, rate) in LOAD {
        let connection = daemon.connect(what.listener()).await?;
        tasks.spawn(load(what, rate, connection, notes.clone(), sampled.clone()));
    }
    tasks.spawn(verify(daemon.connect("public").await?, to_verify, notes.clone()));
    let samples = sample(&daemon, plan, &notes).await?;
    // None of them ends by itself but by a panic.
    if let Some(Err(error)) = tasks.try_join_next() {
        return Err(error.into());
    }
    tasks.shutdown().await;
    daemon.stop().await?;
    Ok(Soak {
        samples,
        failures: notes.failures.load(Ordering::Relaxed),
        first_failure: lock(&notes.first_failure).clone().unwrap_or_default(),
        verifications: notes.verifications.load(Ordering::Relaxed),
    })
}

impl What {
    fn listener(self) -> &'static str {
        match self {
            What::Sign(_) => "signer",
            What::Fetch(_) => "public",
        }
    }
}

/// Requests at a constant rate, whether or not the ones before were slow.
async fn load(
    what: What,
    rate: u32,
    mut connection: Connection,
    notes: Arc<Notes>,
    sampled: mpsc::UnboundedSender<(&'static str, String)>,
) {
    let mut due = interval(Duration::from_secs(1) / rate);
    due.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for number in 0_u32.. {
        let time = due.tick().await;
        let now = Instant::now();
        let began = if now - time < PUNCTUAL { now } else { time };
        let answer = match what {
            What::Sign(keyset) => connection.sign(keyset, CLAIMS).await,
            What::Fetch(issuer) => connection.get(&jwks_path(issuer)).await,
        };
        let took = began.elapsed();
        match (what, answer.and_then(|answer| answer.ok())) {
            (What::Sign(keyset), Ok(body)) => {
                lock(&notes.signatures).push(took);
                if number % SAMPLED == 0 {
                    let _ = sampled.send((keyset, token_of(&body)));
                }
            }
            (What::Fetch(_), Ok(_)) => lock(&notes.documents).push(took),
            (_, Err(error)) => notes.failed(error),
        }
    }
}

fn jwks_path(issuer: &str) -> String {
    format!("/{issuer}/.well-known/jwks.json")
}

fn token_of(body: &[u8]) -> String {
    let answer: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    answer["token"].as_str().unwrap_or_default().to_owned()
}

/// Verifies tokens as they come and once more when they are old, with a JWKS that it keeps for [`MAX_AGE`] whatever it
/// meets in a token.
async fn verify(
    mut public: Connection,
    mut tokens: mpsc::UnboundedReceiver<(&'static str, String)>,
    notes: Arc<Notes>,
) {
    let mut waiting: VecDeque<(Instant, &'static str, String)> = VecDeque::new();
    let mut cached: [Option<(Instant, JwkSet)>; KEYSETS.len()] = [const { None }; KEYSETS.len()];
    loop {
        let late = waiting.front().map(|(at, ..)| *at);
        let (keyset, token) = tokio::select! {
            Some((keyset, token)) = tokens.recv() => {
                waiting.push_back((Instant::now() + LATE, keyset, token.clone()));
                (keyset, token)
            }
            () = async { match late { Some(at) => sleep_until(at).await, None => std::future::pending().await } } => {
                let Some((_, keyset, token)) = waiting.pop_front() else { continue };
                (keyset, token)
            }
        };
        let issuer = KEYSETS.iter().position(|known| *known == keyset).unwrap_or_default();
        if cached[issuer].as_ref().is_none_or(|(fetched, _)| fetched.elapsed() >= MAX_AGE) {
            let began = Instant::now();
            match fetch(&mut public, keyset).await {
                Ok(document) => cached[issuer] = Some((began, document)),
                Err(error) => notes.failed(error),
            }
        }
        let Some((_, document)) = &cached[issuer] else { continue };
        match accepts(document, &token) {
            Ok(()) => _ = notes.verifications.fetch_add(1, Ordering::Relaxed),
            Err(error) => notes.failed(format!("a token of {keyset} was rejected: {error}")),
        }
    }
}

async fn fetch(public: &mut Connection, issuer: &str) -> Outcome<JwkSet> {
    Ok(serde_json::from_slice(&public.get(&jwks_path(issuer)).await?.ok()?)?)
}

fn accepts(document: &JwkSet, token: &str) -> Outcome<()> {
    let kid = decode_header(token)?.kid.ok_or("no kid")?;
    let key = document.find(&kid).ok_or("its key is not in the JWKS")?;
    let algorithm: Algorithm = key.common.key_algorithm.ok_or("no alg")?.to_string().parse()?;
    let mut expected = Validation::new(algorithm);
    expected.set_audience(&[AUDIENCE]);
    expected.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    expected.leeway = 0;
    expected.validate_nbf = true;
    decode::<serde_json::Value>(token, &DecodingKey::from_jwk(key)?, &expected)?;
    Ok(())
}

/// Looks at the daemon every so often until the run has lasted.
async fn sample(daemon: &Daemon, plan: &Plan, notes: &Notes) -> Outcome<Vec<Sample>> {
    let began = Instant::now();
    let mut samples = Vec::new();
    while began.elapsed() < plan.length {
        sleep(plan.every).await;
        // New ones each time: the daemon drops connections that say nothing. The second is opened after the metrics were
        // read: whether the daemon had accepted it by then would be a file more or less.
        let mut ops = daemon.connect("ops").await?;
        let metrics = String::from_utf8(ops.get("/metrics").await?.ok()?)?;
        let mut public = daemon.connect("public").await?;
        let mut jwks_bytes = 0;
        for issuer in KEYSETS {
            jwks_bytes += u64::try_from(public.get(&jwks_path(issuer)).await?.ok()?.len())?;
        }
        let signatures = std::mem::take(&mut *lock(&notes.signatures));
        let documents = std::mem::take(&mut *lock(&notes.documents));
        samples.push(Sample {
            at: began.elapsed(),
            resident: daemon.process.resident()?,
            open_files: sum(&metrics, "process_open_fds"),
            threads: daemon.process.threads()?,
            jwks_bytes,
            rotations: sum(&metrics, "jwksd_rotations_total"),
            requests: u64::try_from(signatures.len() + documents.len())?,
            signatures: latencies(signatures),
            documents: latencies(documents),
        });
    }
    Ok(samples)
}

/// Of all series of a metric.
fn sum(metrics: &str, name: &str) -> u64 {
    let series = metrics.lines().filter_map(|line| line.strip_prefix(name));
    let values = series.filter(|rest| rest.starts_with([' ', '{'])).filter_map(|rest| rest.rsplit(' ').next());
    values.filter_map(|value| value.parse::<f64>().ok()).sum::<f64>() as u64
}

fn latencies(mut took: Vec<Duration>) -> Latencies {
    took.sort();
    let at = |share: f64| {
        let rank = (took.len() as f64 * share) as usize;
        took.get(rank).map_or(f64::NAN, |took| took.as_secs_f64() * 1e3)
    };
    Latencies { p50: at(0.5), p99: at(0.99) }
}
