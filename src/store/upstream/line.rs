//! The line to the managers: which one is asked, who this replica is to them, and pauses after failures.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, Method, StatusCode, Url};

use super::fault::Fault;
use super::{Token, UpstreamSettings};
use crate::config::{Secret, SecretError};
use crate::outbound;
use crate::random;
use crate::telemetry::traces;

/// After the first failure a replica waits for up to this long, after further ones longer.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Managers close idle connections after 75 s.
const IDLE: Duration = Duration::from_secs(60);

/// The most bytes of a refusal that are read.
const LONGEST_PROBLEM: usize = 64 * 1024;

/// Why managers cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("an upstream store needs at least one URL of a manager")]
    NoUrl,
    #[error("`{url}` is not the URL of a manager: write it like \"https://jwksd.internal:8624\"")]
    Url { url: String },
    #[error("the token for managers cannot be read")]
    Token(#[source] SecretError),
    #[error("the token for managers holds spaces or control characters; write one line of printable ASCII")]
    NotAToken,
    #[error("{} cannot be read", .path.display())]
    CaFile { path: PathBuf, source: std::io::Error },
    #[error("{} holds no certificate in PEM", .path.display())]
    NoCertificate { path: PathBuf },
    #[error("no HTTPS client can be made: see that the system's certificate authorities are installed")]
    Client(#[source] reqwest::Error),
}

/// A request.
pub(super) struct Question {
    pub method: Method,
    pub url: Url,
    pub headers: HeaderMap,
    pub body: Option<Vec<u8>>,
    /// For how long the answer may be held back.
    pub patience: Duration,
    /// The most bytes of an answer.
    pub longest: usize,
}

impl Question {
    pub fn get(url: Url, longest: usize) -> Self {
        let (method, headers) = (Method::GET, HeaderMap::new());
        Question { method, url, headers, body: None, patience: Duration::ZERO, longest }
    }
}

/// An answer, read to its end.
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Answer {
    /// The last part of the `type` of a problem.
    pub fn problem(&self) -> Option<String> {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        let slug = problem.get("type")?.as_str()?.strip_prefix("urn:jwksd:problem:")?;
        let legal = slug.len() <= 64 && slug.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        legal.then(|| slug.to_owned())
    }
}

pub(super) struct Line {
    managers: Vec<Url>,
    settings: UpstreamSettings,
    http: Client,
    bearer: ArcSwap<HeaderValue>,
    /// Which manager is asked: this, modulo how many there are.
    turn: AtomicUsize,
    /// In a row, of those who ask in turn.
    failures: AtomicU32,
}

impl Line {
    pub fn open(settings: UpstreamSettings) -> Result<Self, OpenError> {
        let managers = settings.urls.iter().map(|url| parse(url)).collect::<Result<Vec<_>, _>>()?;
        if managers.is_empty() {
            return Err(OpenError::NoUrl);
        }
        let bearer = bearer(&settings.token)?;
        let http = client(&settings)?;
        // Many replicas with the same configuration spread over the managers.
        let turn = AtomicUsize::new(usize::from(u16::from_be_bytes(random::bytes())) % managers.len());
        Ok(Line { managers, settings, http, bearer: ArcSwap::from_pointee(bearer), turn, failures: AtomicU32::new(0) })
    }

    /// The one that is asked now.
    pub fn manager(&self) -> Url {
        self.of_turn(self.turn.load(Ordering::Relaxed))
    }

    /// Asks the managers, each once, until one answers.
    pub async fn ask_each<T, F>(&self, ask: impl Fn(Url) -> F) -> Result<T, (Url, Fault)>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let mut left = self.managers.len();
        loop {
            let turn = self.turn.load(Ordering::Relaxed);
            let manager = self.of_turn(turn);
            match ask(manager.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(fault) => {
                    self.next(turn);
                    left -= 1;
                    if left == 0 {
                        return Err((manager, fault));
                    }
                }
            }
        }
    }

    /// Asks one manager. After a failure it is another one's turn, and whoever asks next waits a little: what cuts off one
    /// replica cuts off all, and they must not come back as one.
    pub async fn ask_in_turn<T, F>(&self, ask: impl Fn(Url) -> F) -> Result<T, (Url, Fault)>
    where
        F: Future<Output = Result<T, Fault>>,
    {
        let mut left = self.managers.len();
        loop {
            let failures = self.failures.load(Ordering::Relaxed);
            if failures > 0 {
                tokio::time::sleep(pause_after(failures)).await;
            }
            let turn = self.turn.load(Ordering::Relaxed);
            let manager = self.of_turn(turn);
            match ask(manager.clone()).await {
                Ok(answer) => {
                    self.failures.store(0, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(fault) => {
                    self.failures.store(failures.saturating_add(1), Ordering::Relaxed);
                    self.next(turn);
                    left -= 1;
                    if left == 0 {
                        return Err((manager, fault));
                    }
                }
            }
        }
    }

    /// The answer to a request, whatever it says.
    pub async fn ask(&self, request: &Question) -> Result<Answer, Fault> {
        let used = self.bearer.load_full();
        let answer = self.send(request, &used).await?;
        if answer.status != StatusCode::UNAUTHORIZED {
            return Ok(answer);
        }
        // Tokens are exchanged while replicas run.
        let token = self.settings.token.clone();
        let read = tokio::task::spawn_blocking(move || bearer(&token)).await.map_err(|_| Fault::Token)?;
        let fresh = Arc::new(read.map_err(|_| Fault::Token)?);
        if fresh == used {
            return Ok(answer);
        }
        self.bearer.store(fresh.clone());
        self.send(request, &fresh).await
    }

    async fn send(&self, request: &Question, bearer: &HeaderValue) -> Result<Answer, Fault> {
        let timeout = request.patience + self.settings.answer_timeout.to_std();
        let mut sent = self.http.request(request.method.clone(), request.url.clone()).timeout(timeout);
        sent = sent.headers(request.headers.clone()).header(AUTHORIZATION, bearer);
        if let Some(parent) = traces::outgoing() {
            sent = sent.header("traceparent", parent.to_string());
        }
        if let Some(body) = &request.body {
            sent = sent.header(CONTENT_TYPE, "application/json").body(body.clone());
        }
        let response = sent.send().await.map_err(Fault::Request)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let longest = if status.is_success() { request.longest } else { LONGEST_PROBLEM };
        let body = outbound::body(response, longest).await.map_err(Fault::Body)?;
        Ok(Answer { status, headers, body })
    }

    fn of_turn(&self, turn: usize) -> Url {
        self.managers[turn % self.managers.len()].clone()
    }

    /// Goes on with another manager.
    pub fn turn_to_next(&self) {
        self.turn.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends a manager's turn, unless somebody else did.
    fn next(&self, turn: usize) {
        let next = turn.wrapping_add(1);
        _ = self.turn.compare_exchange(turn, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

fn parse(text: &str) -> Result<Url, OpenError> {
    let wrong = || OpenError::Url { url: text.chars().take(200).collect() };
    let url = Url::parse(text).map_err(|_| wrong())?;
    let plain = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    let fits = matches!(url.scheme(), "http" | "https") && url.has_host() && plain && url.fragment().is_none();
    if fits { Ok(url) } else { Err(wrong()) }
}

fn client(settings: &UpstreamSettings) -> Result<Client, OpenError> {
    let mut builder = outbound::client("replica")
        .http1_only()
        .connect_timeout(settings.connect_timeout.to_std())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(2)
        .tcp_keepalive(Duration::from_secs(15));
    if let Some(path) = &settings.ca_file {
        builder = builder.tls_certs_only(certificates(path)?);
    }
    builder.build().map_err(OpenError::Client)
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, OpenError> {
    let pem = std::fs::read(path).map_err(|source| OpenError::CaFile { path: path.to_owned(), source })?;
    let found = Certificate::from_pem_bundle(&pem).unwrap_or_default();
    if found.is_empty() { Err(OpenError::NoCertificate { path: path.to_owned() }) } else { Ok(found) }
}

fn bearer(token: &Token) -> Result<HeaderValue, OpenError> {
    let secret = match token {
        Token::File(path) => {
            let read = Secret::read_file(path).map_err(OpenError::Token)?;
            for warning in &read.warnings {
                tracing::warn!("{warning}");
            }
            read.secret
        }
        Token::Fixed(secret) => secret.clone(),
    };
    if !secret.expose().iter().all(u8::is_ascii_graphic) {
        return Err(OpenError::NotAToken);
    }
    let text = [b"Bearer ", secret.expose()].concat();
    let mut value = HeaderValue::from_bytes(&text).map_err(|_| OpenError::NotAToken)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Full jitter: those that failed together do not come back together.
fn pause_after(failures: u32) -> Duration {
    let most = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    random::between(Duration::ZERO, most)
}
