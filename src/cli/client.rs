//! A small HTTP client for the daemon's own listeners, over TCP, TLS or a Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{Method, Response, StatusCode};
use serde_json::Value;
use zeroize::Zeroizing;

use super::print::plain;
use super::trust::Trust;
use super::{Failure, Global, variable};
use crate::config::{Address, Config, Listener, Role, Secret, SecretSource, load};
use crate::engine::chain;

/// How long an answer may take: longer than any deadline of the daemon.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Largest answer read from elsewhere.
const ANSWER_MAX: usize = 4 * 1024 * 1024;

/// Which listener of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Public,
    Signer,
    Admin,
    Ops,
}

/// A connection to one listener.
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    /// For messages.
    target: String,
    token: Option<Zeroizing<String>>,
    /// Names this run of the command, so that a repeated call changes nothing twice.
    call: String,
}

/// The configuration that a command uses to find the daemon.
pub(super) fn configuration(global: &Global) -> Result<Config, Failure> {
    let source = global.source();
    let loaded = load(&source, std::env::vars()).map_err(|error| Failure::Usage(chain(&error)))?;
    Ok(loaded.config)
}

/// The same, for a daemon that runs: a file that was broken since must not keep operators from it.
fn running(global: &Global) -> Result<Config, Failure> {
    configuration(global).map_err(|failure| match failure {
        Failure::Usage(message) => Failure::Usage(format!(
            "{message}\na daemon that runs is reached without its configuration by --server ADDRESS and --token-file FILE"
        )),
        other => other,
    })
}

impl Client {
    /// Connects lazily to `--server`, else to the listener of the configuration.
    pub fn new(global: &Global, which: Which) -> Result<Client, Failure> {
        // The variable names one listener, and commands talk to four.
        let named = global.server.clone().or_else(|| variable("JWKSD_SERVER").filter(|_| which == Which::Admin));
        let (server, known) = match named {
            Some(server) => (server, None),
            None => configured(&running(global)?, which)?,
        };
        let token = match which {
            Which::Admin | Which::Signer => token(global, which)?,
            Which::Public | Which::Ops => None,
        };
        Self::to(&server, &Trust::of(global, known), token)
    }

    fn to(server: &str, trust: &Trust, token: Option<Zeroizing<String>>) -> Result<Client, Failure> {
        let mut builder = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .user_agent(concat!("jwksd/", env!("CARGO_PKG_VERSION")));
        let base = match server.strip_prefix("unix:") {
            Some(path) => {
                builder = builder.unix_socket(PathBuf::from(path));
                "http://localhost".to_owned()
            }
            None if server.contains("://") => server.trim_end_matches('/').to_owned(),
            None => format!("http://{server}"),
        };
        if base.starts_with("https://") {
            builder = trust.apply(builder)?;
        } else {
            // Nobody's certificate is looked at: a container without any authorities is no obstacle.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build().map_err(|error| Failure::Failed(describe(&error)))?;
        let call = format!("cli-{}", crate::app::fresh_token());
        Ok(Client { http, base, target: server.to_owned(), token, call })
    }

    pub async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.send(Method::GET, path, None).await
    }

    /// Sends a request and returns the JSON answer; `Null` for an empty one.
    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        match self.try_send(method, path, body).await? {
            Ok(answer) => Ok(answer),
            Err(problem) => Err(Failure::Refused(problem.to_string())),
        }
    }

    /// As [`send`](Self::send), but hands back what the daemon refused.
    pub async fn try_send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Result<Value, Problem>, Failure> {
        let changes = method != Method::GET;
        let mut request = self.http.request(method, format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.as_str());
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        if changes {
            request = request.header("Idempotency-Key", format!("{}{}", self.call, fingerprint(path, body)));
        }
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let text = read(response).await.map_err(|error| self.unreachable(&error))?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(Ok(value));
        }
        Ok(Err(Problem { status, body: value }))
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        if let Some(tls) = tls_error(error) {
            return Failure::Failed(format!("the daemon at {} answers, but {}", self.target, not_trusted(tls)));
        }
        Failure::Unreachable(format!(
            "the daemon at {} cannot be reached: {}; is it running? (--server says where)",
            self.target,
            describe(error)
        ))
    }
}

/// What the daemon said when it refused (RFC 9457).
pub(super) struct Problem {
    pub status: StatusCode,
    pub body: Value,
}

impl Problem {
    pub fn slug(&self) -> &str {
        self.body["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap_or_default()
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.body["detail"].as_str() {
            Some(detail) => write!(f, "{} ({}, {})", plain(detail), plain(self.slug()), self.status.as_u16())?,
            None => write!(f, "the daemon answered {}", self.status)?,
        }
        for key in ["missing", "errors"] {
            for item in self.body[key].as_array().into_iter().flatten() {
                write!(f, "\n  {}", plain(item.as_str().unwrap_or_default()))?;
            }
        }
        Ok(())
    }
}

/// Fetches a JSON document from anywhere.
pub(super) async fn fetch(url: &str, ca_file: Option<&Path>) -> Result<Value, Failure> {
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(Failure::Usage(format!("`{url}` is not an http or https URL")));
    }
    let trust = Trust { ca_file: ca_file.map(Path::to_owned), ..Trust::default() };
    let client = Client::to(url, &trust, None)?;
    let response = client.http.get(url).send().await.map_err(|error| match tls_error(&error) {
        Some(tls) => Failure::Failed(format!("{url} cannot be fetched: {}", not_trusted(tls))),
        None => Failure::Unreachable(format!("{url} cannot be fetched: {}", describe(&error))),
    })?;
    if response.status() != StatusCode::OK {
        return Err(Failure::Failed(format!(
            "{url} answered {}; a JWKS must be 200, never a redirect",
            response.status()
        )));
    }
    let text = read(response).await.map_err(|error| Failure::Failed(format!("{url}: {}", describe(&error))))?;
    serde_json::from_str(&text).map_err(|error| Failure::Failed(format!("{url} is not JSON: {error}")))
}

/// Reads an answer of bounded size.
async fn read(mut response: Response) -> Result<String, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > ANSWER_MAX {
            break;
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Tells different calls of one run apart; the same call has the same.
fn fingerprint(path: &str, body: Option<&Value>) -> String {
    let text = format!("{path} {}", body.map(Value::to_string).unwrap_or_default());
    crate::config::ContentDigest::of(text.as_bytes()).short()
}

/// What TLS has against a connection, if that is why there is none.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(tls) = error.downcast_ref() {
            return Some(tls);
        }
        // What an I/O error wraps is no source of it.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = match wrapped {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Why, and what to do.
fn not_trusted(error: &rustls::Error) -> String {
    use rustls::{AlertDescription as Alert, CertificateError as Certificate};
    match error {
        rustls::Error::AlertReceived(Alert::CertificateRequired) => {
            return "it wants a certificate of yours: name one with --client-cert and --client-key".to_owned();
        }
        rustls::Error::AlertReceived(
            alert @ (Alert::UnknownCA
            | Alert::BadCertificate
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::DecryptError),
        ) => {
            return format!(
                "it does not accept the certificate of --client-cert ({alert:?}): it must be valid and signed by the \
                 authority in the listener's client_ca_file"
            );
        }
        _ => {}
    }
    let rustls::Error::InvalidCertificate(certificate) = error else {
        return format!("no TLS connection comes about: {error}; does the listener speak TLS?");
    };
    let (why, what) = match certificate {
        Certificate::UnknownIssuer => {
            ("who signed it is not known here".to_owned(), "name the authority's certificate with --ca-file")
        }
        Certificate::Expired | Certificate::ExpiredContext { .. } => ("it has expired".to_owned(), "renew it"),
        Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
            ("it is for another name".to_owned(), "connect with --server to a name that it is for")
        }
        // webpki says so of a plain self-signed certificate, which is an authority's.
        other if format!("{other:?}").contains("CaUsedAsEndEntity") => (
            "it is an authority's, as self-signed ones are by default".to_owned(),
            "sign one with it for the daemon (basicConstraints CA:FALSE), and name the authority's with --ca-file",
        ),
        other => (other.to_string(), "give the daemon another one, or name its authority's with --ca-file"),
    };
    format!("its certificate is not acceptable: {why}; {what}")
}

fn describe(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = cause.to_string();
        source = cause.source();
    }
    text
}

/// Where the listener is, and the file of its certificate.
fn configured(config: &Config, which: Which) -> Result<(String, Option<PathBuf>), Failure> {
    let (table, listener) = match which {
        Which::Public => ("public", config.public.as_ref()),
        Which::Signer => ("signer", config.signer.as_ref().map(|signer| &signer.listener)),
        Which::Admin => ("admin", config.admin.as_ref().map(|admin| &admin.listener)),
        Which::Ops => ("ops", config.ops.as_ref()),
    };
    let missing = || Failure::Usage(format!("the configuration has no [{table}] listener: say where with --server"));
    let listener = listener.ok_or_else(missing)?;
    Ok((reachable(listener), listener.tls.as_ref().map(|tls| tls.cert_file.clone())))
}

/// The address to connect to: an unspecified one is reached on loopback.
fn reachable(listener: &Listener) -> String {
    match &listener.address {
        Address::Unix { path, .. } => format!("unix:{}", path.display()),
        Address::Tcp(address) => {
            let mut address = *address;
            if address.ip().is_unspecified() {
                address.set_ip(if address.is_ipv4() {
                    std::net::Ipv4Addr::LOCALHOST.into()
                } else {
                    std::net::Ipv6Addr::LOCALHOST.into()
                });
            }
            let scheme = if listener.tls.is_some() { "https" } else { "http" };
            format!("{scheme}://{address}")
        }
    }
}

/// The bearer token: `--token-file`, `$JWKSD_TOKEN`, else the first operator's of the configuration.
fn token(global: &Global, which: Which) -> Result<Option<Zeroizing<String>>, Failure> {
    if let Some(path) = &global.token_file {
        return read_token(path).map(Some);
    }
    if let Some(token) = variable("JWKSD_TOKEN") {
        return Ok(Some(Zeroizing::new(token)));
    }
    // A certificate says who it is.
    if which == Which::Signer || global.client_cert.is_some() {
        return Ok(None);
    }
    let config = running(global)?;
    let tokens = config.admin.iter().flat_map(|admin| &admin.tokens);
    let mut files = tokens.filter_map(|token| match &token.source {
        SecretSource::File(path) => Some((token.role != Role::Operator, path)),
        SecretSource::Environment(_) => None,
    });
    let first = files.by_ref().min_by_key(|(viewer, _)| *viewer);
    let (_, path) = first.ok_or_else(|| {
        Failure::Usage(
            "the configuration names no admin token file: use --token-file, or --client-cert and --client-key"
                .to_owned(),
        )
    })?;
    read_token(path).map(Some)
}

fn read_token(path: &Path) -> Result<Zeroizing<String>, Failure> {
    let read = Secret::read_file(path).map_err(|error| Failure::Usage(error.to_string()))?;
    let text = std::str::from_utf8(read.secret.expose());
    let text = text.map_err(|_| Failure::Usage(format!("{} does not hold a token", path.display())))?;
    Ok(Zeroizing::new(text.to_owned()))
}
