//! What every request passes before its handler: request id, span, limits, panics, problems; and for signer and admin
//! the refusal of requests that a web page caused.

use std::any::Any;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, RandomState};
use std::io::Write as _;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use http::header::{CONNECTION, CONTENT_TYPE, HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version};
use http_body::Body as _;
use tower::Service;
use tracing::{Instrument, Span, debug_span, info_span};

use super::access::{AccessLog, NoteRoute, Sampling, Watched};
use super::body::{BODY_LIMIT, Limited};
use super::listener::{ListenAddress, Peer};
use super::problem::{Problem, ProblemType, Sieves};
use super::tls::Tls;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The id of one request, in its extensions, its span, its problems and its answer's `X-Request-Id`: the client's own if it
/// sent a sane one, so that traces join.
#[derive(Clone, PartialEq, Eq)]
pub struct RequestId(HeaderValue);

impl RequestId {
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    fn sent(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(X_REQUEST_ID)?;
        let legal = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let sane = (1..=64).contains(&value.len()) && value.as_bytes().iter().all(legal);
        sane.then(|| RequestId(value.clone()))
    }
}

impl std::fmt::Debug for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The outermost layer around a router. [`super::listener::BoundListener::serve`] puts it there; tests of a router alone call
/// it as a tower service.
///
/// Whatever happens inside, the answer has an `X-Request-Id`, and every error is a problem: bare 4xx and 500s of axum
/// and its extractors are turned into one, panics into 500.
#[derive(Clone)]
pub struct Edge {
    router: Router,
    shortcut: Option<Arc<dyn Shortcut>>,
    listener: &'static str,
    body_limit: usize,
    body_timeout: Duration,
    ids: Arc<RequestIds>,
    sieves: Arc<Sieves>,
    access: Arc<Sampling>,
}

/// A way around the router for the requests that come by the thousand: what the router's layers cost, they would pay at
/// each one. Whatever the layers check, it checks itself.
pub trait Shortcut: Send + Sync {
    /// Whether it answers requests like this one.
    fn takes(&self, request: &Request) -> bool;

    /// The answer to a request that it takes.
    fn answer(&self, request: Request) -> Answering<'_>;
}

/// An answer under way.
pub type Answering<'a> = Pin<Box<dyn Future<Output = Response> + Send + 'a>>;

/// What answers the requests of a listener.
pub struct Routes {
    pub router: Router,
    pub shortcut: Option<Arc<dyn Shortcut>>,
}

impl From<Router> for Routes {
    fn from(router: Router) -> Self {
        Routes { router, shortcut: None }
    }
}

impl Edge {
    /// `listener` names the listener in logs; a body must arrive within `body_timeout`.
    pub fn new(routes: impl Into<Routes>, listener: &'static str, body_timeout: Duration) -> Self {
        let (ids, sieves) = (Arc::new(RequestIds::new()), Arc::new(Sieves::new()));
        let Routes { router, shortcut } = routes.into();
        let (router, access) = (router.layer(NoteRoute), AccessLog::new().of(listener));
        Edge { router, shortcut, listener, body_limit: BODY_LIMIT, body_timeout, ids, sieves, access }
    }

    /// Requests get lines as `log` says.
    #[must_use]
    pub fn with_access_log(self, log: &AccessLog) -> Self {
        let access = log.of(self.listener);
        Edge { access, ..self }
    }

    /// Bodies may have this many bytes.
    #[must_use]
    pub fn with_body_limit(self, body_limit: usize) -> Self {
        Edge { body_limit, ..self }
    }

    /// Answers one request.
    pub async fn answer(&self, mut request: Request) -> Response {
        let id = RequestId::sent(request.headers()).unwrap_or_else(|| self.ids.next());
        let span = self.span(&request, &id);
        let watched = Watched::begin(self.listener, &self.access, &mut request);
        let traced = watched.as_ref().map_or_else(Span::none, Watched::span);
        let http1 = request.version() < Version::HTTP_2;
        let mut response = self.answer_within(request, &id).instrument(span).instrument(traced).await;
        if let Some(watched) = watched {
            watched.end(&self.access, &id, &response);
        }
        // What is left of such a body would have to be read before the connection could serve another request.
        if http1 && matches!(response.status(), StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response.headers_mut().insert(X_REQUEST_ID, id.0);
        response
    }

    async fn answer_within(&self, request: Request, id: &RequestId) -> Response {
        let mut response = match self.limited(request) {
            Ok(request) => catch_panic(self.handle(request, id)).await.unwrap_or_else(|panic| {
                tracing::error!(request_id = id.as_str(), panic = panic_text(&*panic), "a handler panicked");
                ProblemType::Internal.into_response()
            }),
            Err(problem) => problem.into_response(),
        };
        let problem = response.extensions_mut().remove::<Problem>().or_else(|| problem_of_bare(&response));
        if let Some(problem) = problem {
            problem.log(id, &self.sieves);
            problem.write_to(&mut response, Some(id));
        }
        response
    }

    async fn handle(&self, mut request: Request, id: &RequestId) -> Response {
        if let Some(shortcut) = self.shortcut.as_ref().filter(|shortcut| shortcut.takes(&request)) {
            return shortcut.answer(request).await;
        }
        request.extensions_mut().insert(id.clone());
        match self.router.clone().call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    fn limited(&self, request: Request) -> Result<Request, Problem> {
        if lacks_host(&request) {
            let detail = "A request of HTTP/1.1 has exactly one Host header field (RFC 9112 §3.2).";
            return Err(Problem::new(ProblemType::MalformedRequest).detail(detail));
        }
        if request.body().is_end_stream() {
            return Ok(request);
        }
        if request.body().size_hint().lower() > self.body_limit as u64 {
            return Err(ProblemType::BodyTooLarge.into());
        }
        Ok(request.map(|body| Body::new(Limited::new(body, self.body_limit, self.body_timeout))))
    }

    /// Reads and signatures are in a debug span, which costs nothing when it is off (a problem names its request anyway);
    /// what changes something in an info span.
    fn span(&self, request: &Request, id: &RequestId) -> Span {
        let (listener, id, method) = (self.listener, id.as_str(), request.method());
        if method == Method::GET || method == Method::HEAD || listener == "signer" {
            debug_span!("request", listener, id, %method, path = short_path(request))
        } else {
            info_span!("request", listener, id, %method, path = short_path(request))
        }
    }
}

impl Service<Request> for Edge {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let edge = self.clone();
        Box::pin(async move { Ok(edge.answer(request).await) })
    }
}

/// Ids that are unique over processes: a random number for this one, and a count.
struct RequestIds {
    process: u32,
    count: AtomicU64,
}

impl RequestIds {
    fn new() -> Self {
        // The standard library's per-process hash keys: random, and cannot fail. Ids are no secrets.
        let process = (RandomState::new().hash_one("request id") >> 32) as u32;
        RequestIds { process, count: AtomicU64::new(1) }
    }

    fn next(&self) -> RequestId {
        let mut text = [0; 8 + 1 + 16];
        let mut rest = &mut text[..];
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        write!(rest, "{:08x}-{count:x}", self.process).expect("there is room for two numbers");
        let unused = rest.len();
        let text = &text[..text.len() - unused];
        RequestId(HeaderValue::from_bytes(text).expect("hexadecimal digits and a hyphen are a header value"))
    }
}

/// Which hosts a listener answers for, so that a web page cannot reach it through a name that it points at a loopback
/// address (DNS rebinding: loopback is not authentication).
#[derive(Clone, Debug)]
pub struct HostPolicy {
    listen: Option<IpAddr>,
    /// What most clients send: the address listened on, as it is written.
    own: String,
    names: Vec<(String, Option<u16>)>,
    /// Behind TLS: what its certificate is for.
    tls: Option<Arc<Tls>>,
}

impl HostPolicy {
    /// Allows also every host that the certificate in use is for.
    #[must_use]
    pub fn with_certificate(self, tls: Arc<Tls>) -> Self {
        HostPolicy { tls: Some(tls), ..self }
    }

    /// Allows literal loopback addresses and `localhost` with any port, the address listened on, and `names` (`name`
    /// for any port, `name:port` for one). On an unspecified address (`0.0.0.0`) any literal address is allowed: a page
    /// can be of such a host only if that host served it.
    pub fn new<'a>(address: &ListenAddress, names: impl IntoIterator<Item = &'a str>) -> Result<Self, HostNameError> {
        let parsed = |name: &str| {
            let wrong = || HostNameError { name: name.chars().take(80).collect() };
            let authority: Authority = name.parse().map_err(|_| wrong())?;
            host_and_port(&authority).ok_or_else(wrong)
        };
        let names = names.into_iter().map(parsed).collect::<Result<_, _>>()?;
        let listen = match address {
            ListenAddress::Tcp(address) => Some(address.ip()),
            ListenAddress::Unix { .. } => None,
        };
        Ok(HostPolicy { listen, own: address.to_string(), names, tls: None })
    }

    /// Refuses a request whose `Host` (or HTTP/2 `:authority`) is not allowed, and one that `Origin` or `Sec-Fetch-Site`
    /// shows to come from elsewhere. Over a Unix socket, which no page reaches, any host will do.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap, peer: Option<&Peer>) -> Result<(), Problem> {
        if self.is_plain(uri, headers) {
            return Ok(());
        }
        let hosts = named_hosts(uri, headers)?;
        let local = matches!(peer, Some(Peer::Unix { .. }));
        if !local {
            if hosts.is_empty() {
                return Err(Problem::new(ProblemType::MalformedRequest).detail("The request has no Host."));
            }
            if !hosts.iter().all(|(host, port)| self.allows(host, *port)) {
                return Err(ProblemType::HostNotAllowed.into());
            }
        }
        if foreign_fetch(headers) || foreign_origin(headers, &hosts) {
            return Err(ProblemType::ForeignOrigin.into());
        }
        Ok(())
    }

    /// The request names the address listened on and nothing else; no browser says where it comes from.
    fn is_plain(&self, uri: &Uri, headers: &HeaderMap) -> bool {
        let mut hosts = headers.get_all(HOST).iter();
        let own = hosts.next().is_some_and(|host| host.as_bytes() == self.own.as_bytes()) && hosts.next().is_none();
        own && uri.authority().is_none() && !headers.contains_key(ORIGIN) && !headers.contains_key(SEC_FETCH_SITE)
    }

    fn allows(&self, host: &str, port: Option<u16>) -> bool {
        if let Some(ip) = literal(host) {
            let listen = self.listen.map(|ip| ip.to_canonical());
            if ip.is_loopback() || listen.is_some_and(|listen| listen.is_unspecified() || listen == ip) {
                return true;
            }
        }
        let certified = |tls: &Arc<Tls>| tls.is_for(host.trim_start_matches('[').trim_end_matches(']'));
        host == "localhost"
            || self.tls.as_ref().is_some_and(certified)
            || self.names.iter().any(|(name, only)| name == host && (only.is_none() || *only == port))
    }
}

/// A configured host that is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not a host: write it like \"jwksd.internal\" or \"jwksd.internal:8622\"")]
pub struct HostNameError {
    name: String,
}

/// Puts `policy` in front of every route of `router`, fallbacks included.
pub fn guard_host(router: Router, policy: Arc<HostPolicy>) -> Router {
    async fn guard(State(policy): State<Arc<HostPolicy>>, request: Request, next: Next) -> Response {
        match policy.check(request.uri(), request.headers(), request.extensions().get::<Peer>()) {
            Ok(()) => next.run(request).await,
            Err(problem) => problem.into_response(),
        }
    }
    router.layer(from_fn_with_state(policy, guard))
}

/// Whether an HTTP/1.1 request over TCP has no `Host`, or several. Over a Unix socket there is no host to name.
fn lacks_host(request: &Request) -> bool {
    let over_tcp = matches!(request.extensions().get::<Peer>(), Some(Peer::Tcp(_)));
    over_tcp && request.version() == Version::HTTP_11 && request.headers().get_all(HOST).iter().count() != 1
}

/// Every host that the request names: in its target and in `Host`, which may appear once (RFC 9112 §3.2).
fn named_hosts(uri: &Uri, headers: &HeaderMap) -> Result<Vec<(String, Option<u16>)>, Problem> {
    let wrong = || Problem::new(ProblemType::MalformedRequest).detail("The request's Host is not a host.");
    let mut hosts = Vec::with_capacity(2);
    if let Some(authority) = uri.authority() {
        hosts.push(host_and_port(authority).ok_or_else(wrong)?);
    }
    let mut values = headers.get_all(HOST).iter();
    if let Some(value) = values.next() {
        let authority = Authority::try_from(value.as_bytes()).map_err(|_| wrong())?;
        hosts.push(host_and_port(&authority).ok_or_else(wrong)?);
    }
    if values.next().is_some() {
        return Err(wrong());
    }
    Ok(hosts)
}

/// The host in lower case, without a trailing dot, and the port. `None` where there is user information or a bad port.
fn host_and_port(authority: &Authority) -> Option<(String, Option<u16>)> {
    let host = authority.host();
    let rest = authority.as_str().strip_prefix(host)?;
    let port = match rest.strip_prefix(':') {
        Some(port) => Some(port.parse().ok()?),
        None if rest.is_empty() => None,
        None => return None,
    };
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    (!host.is_empty()).then_some((host, port))
}

fn literal(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare.parse::<IpAddr>().ok().map(|ip| ip.to_canonical())
}

/// Fetch metadata: a browser says where the request came from; `none` is the address bar.
fn foreign_fetch(headers: &HeaderMap) -> bool {
    headers.get_all(SEC_FETCH_SITE).iter().any(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"))
}

fn foreign_origin(headers: &HeaderMap, hosts: &[(String, Option<u16>)]) -> bool {
    let same = |origin: &HeaderValue| -> Option<bool> {
        let uri: Uri = origin.to_str().ok()?.parse().ok()?;
        let default = match uri.scheme_str()? {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let (host, port) = host_and_port(uri.authority()?)?;
        let same =
            |(name, at): &(String, Option<u16>)| *name == host && at.unwrap_or(default) == port.unwrap_or(default);
        Some(hosts.iter().any(same))
    };
    headers.get_all(ORIGIN).iter().any(|origin| same(origin) != Some(true))
}

/// axum and its extractors refuse with a bare status or plain text. A JSON answer is somebody's deliberate one.
fn problem_of_bare(response: &Response) -> Option<Problem> {
    let kind = match response.status().as_u16() {
        404 => ProblemType::NotFound,
        405 => ProblemType::MethodNotAllowed,
        408 => ProblemType::BodyTimeout,
        413 => ProblemType::BodyTooLarge,
        414 => ProblemType::UriTooLong,
        415 => ProblemType::UnsupportedMediaType,
        400 | 422 => ProblemType::MalformedRequest,
        500 => ProblemType::Internal,
        _ => return None,
    };
    let text = |value: &HeaderValue| value.as_bytes().starts_with(b"text/plain");
    response.headers().get(CONTENT_TYPE).is_none_or(text).then(|| Problem::new(kind))
}

async fn catch_panic<F: Future>(future: F) -> Result<F::Output, Box<dyn Any + Send>> {
    let mut future = pin!(future);
    // Unwind safety: the future is dropped after a panic, never polled again.
    poll_fn(|cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
        Ok(poll) => poll.map(Ok),
        Err(panic) => Poll::Ready(Err(panic)),
    })
    .await
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn short_path(request: &Request) -> String {
    request.uri().path().chars().take(200).collect()
}
