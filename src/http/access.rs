//! The access log: which requests get a line, and what handlers know for it.

use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::extract::{MatchedPath, Request};
use axum::response::Response;
use http::{Extensions, HeaderName, Method};
use http_body::Body as _;
use tokio::time::Instant;
use tower::{Layer, Service};
use tracing::Span;

use super::listener::Peer;
use super::middleware::RequestId;
use crate::telemetry::access::{AccessLine, access};
use crate::telemetry::trace_context::TraceParent;
use crate::telemetry::traces;

/// Which requests of each listener get a line; can be changed while they are served. Off, it costs one relaxed load per
/// request.
#[derive(Debug)]
pub struct AccessLog {
    listeners: [(&'static str, Arc<Sampling>); 5],
}

/// How many requests of one listener get a line.
#[derive(Debug, Default)]
pub struct Sampling {
    /// Millionths of the successful ones; [`OFF`] for none at all.
    share: AtomicU32,
    successes: AtomicU64,
}

/// No line, not even for failures.
const OFF: u32 = u32::MAX;

impl AccessLog {
    /// Off everywhere.
    pub fn new() -> Self {
        let off = || Arc::new(Sampling { share: OFF.into(), successes: AtomicU64::new(0) });
        AccessLog { listeners: ["public", "signer", "admin", "ops", "replication"].map(|name| (name, off())) }
    }

    /// From now on `listeners` log every failure and these millionths of their successes; others nothing.
    pub fn set(&self, listeners: &[String], millionths: u32) {
        for (name, sampling) in &self.listeners {
            let on = listeners.iter().any(|wanted| wanted == name);
            sampling.share.store(if on { millionths } else { OFF }, Ordering::Relaxed);
        }
    }

    /// What decides for the listener of that name; off for others.
    pub fn of(&self, listener: &str) -> Arc<Sampling> {
        let known = self.listeners.iter().find(|(name, _)| *name == listener);
        known.map_or_else(Arc::default, |(_, sampling)| sampling.clone())
    }
}

impl Default for AccessLog {
    fn default() -> Self {
        AccessLog::new()
    }
}

impl Sampling {
    fn is_on(&self) -> bool {
        self.share.load(Ordering::Relaxed) != OFF
    }

    /// Evenly spread: of a share of a tenth every tenth success, the first one included.
    fn takes(&self, failed: bool) -> bool {
        let share = u64::from(self.share.load(Ordering::Relaxed));
        if share == u64::from(OFF) || failed {
            return failed && share != u64::from(OFF);
        }
        let count = self.successes.fetch_add(1, Ordering::Relaxed) % 1_000_000;
        (count * share) % 1_000_000 < share
    }
}

/// What is found out about a request while it is handled, in its extensions where somebody wants to know.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Noted>);

#[derive(Debug, Default)]
struct Noted {
    route: OnceLock<Route>,
    client: OnceLock<String>,
    keyset: OnceLock<String>,
}

#[derive(Debug)]
enum Route {
    Template(MatchedPath),
    Path(String),
}

impl Notes {
    /// Who asks, once that is known.
    pub fn client(extensions: &Extensions, name: &str) {
        if let Some(notes) = extensions.get::<Notes>() {
            let _ = notes.0.client.set(name.to_owned());
        }
    }

    /// Which keyset is concerned, once it is known to exist.
    pub fn keyset(extensions: &Extensions, name: &str) {
        if let Some(notes) = extensions.get::<Notes>() {
            let _ = notes.0.keyset.set(name.to_owned());
        }
    }

    /// A path that the configuration names.
    pub fn path(extensions: &Extensions, path: &str) {
        if let Some(notes) = extensions.get::<Notes>() {
            let _ = notes.0.route.set(Route::Path(path.to_owned()));
        }
    }

    fn route(&self) -> Option<&str> {
        self.0.route.get().map(|route| match route {
            Route::Template(template) => template.as_str(),
            Route::Path(path) => path.as_str(),
        })
    }
}

/// The caller's trace (W3C Trace Context §3.2).
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A request under way that the access log or a trace follows.
pub(super) struct Watched {
    notes: Notes,
    begun: Instant,
    listener: &'static str,
    method: Method,
    peer: Option<Peer>,
    trace_id: Option<String>,
    span: Span,
}

impl Watched {
    /// `None` when nobody wants to know; nothing is then done. Callers' traces are continued where callers are known: on
    /// the public listener anybody could have everything recorded.
    pub(super) fn begin(listener: &'static str, sampling: &Sampling, request: &mut Request) -> Option<Self> {
        let sent = if listener == "public" { None } else { request.headers().get(TRACEPARENT) };
        let parent = sent.and_then(|value| TraceParent::parse(value.to_str().ok()?));
        let span = match listener {
            "ops" => Span::none(),
            _ => traces::request(listener, known(request.method()), parent),
        };
        if !sampling.is_on() && span.is_disabled() {
            return None;
        }
        let trace_id = traces::trace_of(&span).or(parent.map(|parent| parent.trace_id)).map(|id| id.to_string());
        let notes = Notes::default();
        request.extensions_mut().insert(notes.clone());
        let peer = request.extensions().get::<Peer>().copied();
        let method = request.method().clone();
        Some(Watched { notes, begun: Instant::now(), listener, method, peer, trace_id, span })
    }

    pub(super) fn span(&self) -> Span {
        self.span.clone()
    }

    pub(super) fn end(self, sampling: &Sampling, id: &RequestId, response: &Response) {
        let status = response.status();
        let (route, client) = (self.notes.route(), self.notes.0.client.get().map(String::as_str));
        if !self.span.is_disabled() {
            let method = known(&self.method);
            traces::name(&self.span, route.map_or(method.to_owned(), |route| format!("{method} {route}")));
            self.span.record("http.route", route).record("jwksd.client", client);
            self.span.record("http.response.status_code", status.as_u16());
            if status.is_server_error() {
                traces::failed(&self.span);
            }
        }
        if !sampling.takes(status.is_client_error() || status.is_server_error()) {
            return;
        }
        let peer = self.peer.map(|peer| peer.to_string());
        access(&AccessLine {
            listener: self.listener,
            method: known(&self.method),
            path: route,
            status: status.as_u16(),
            took: self.begun.elapsed(),
            bytes: response.body().size_hint().exact(),
            client,
            keyset: self.notes.0.keyset.get().map(String::as_str),
            request_id: id.as_str(),
            trace_id: self.trace_id.as_deref(),
            peer: peer.as_deref(),
        });
    }
}

/// A method as it is told: those of RFC 9110 and PATCH, never a caller's own word.
fn known(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        "OPTIONS" => "OPTIONS",
        "CONNECT" => "CONNECT",
        "TRACE" => "TRACE",
        _ => "_OTHER",
    }
}

/// Notes the template of the route that a request matched; [`super::middleware::Edge`] puts it around every router.
#[derive(Clone, Copy, Debug)]
pub(super) struct NoteRoute;

impl<S> Layer<S> for NoteRoute {
    type Service = NotingRoute<S>;

    fn layer(&self, inner: S) -> NotingRoute<S> {
        NotingRoute(inner)
    }
}

#[derive(Clone, Debug)]
pub(super) struct NotingRoute<S>(S);

impl<S, F> Service<Request> for NotingRoute<S>
where
    S: Service<Request, Response = Response, Error = Infallible, Future = F>,
    F: Future<Output = Result<Response, Infallible>>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = F;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> F {
        let extensions = request.extensions();
        if let (Some(notes), Some(template)) = (extensions.get::<Notes>(), extensions.get::<MatchedPath>()) {
            let _ = notes.0.route.set(Route::Template(template.clone()));
        }
        self.0.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_successes_and_every_failure_gets_a_line() {
        let log = AccessLog::new();
        let signer = log.of("signer");
        assert!(!signer.takes(true) && !signer.takes(false));
        log.set(&["signer".to_owned()], 250_000);
        assert!(signer.is_on() && !log.of("ops").is_on());
        assert_eq!((0..1000).filter(|_| signer.takes(false)).count(), 250);
        assert_eq!((0..1000).filter(|_| signer.takes(true)).count(), 1000);
        log.set(&["signer".to_owned()], 0);
        assert!(signer.takes(true) && !signer.takes(false));
        log.set(&["signer".to_owned()], 1_000_000);
        assert!((0..10).all(|_| signer.takes(false)));
        log.set(&[], 1_000_000);
        assert!(!signer.takes(true));
    }
}
