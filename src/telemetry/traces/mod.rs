//! Traces: what a request or a step consisted of and how long each part took, sent to an OpenTelemetry collector.
//!
//! Only builds with the feature `otel` have them. Spans are those of `tracing` with the target [`TARGET`]; nothing else is
//! sent: neither log lines nor spans of libraries. They carry names, numbers and outcomes, never claims, tokens or
//! whatever a caller chose. Where the feature or the table is missing, a span is [`Span::none`] or disabled, and costs
//! nothing.

use tracing::Span;

use super::metrics::{BackendOperation, BackendOutcome, SigningFailure};
use super::trace_context::{TraceId, TraceParent};
use crate::keyring::name::Name;

#[cfg(feature = "otel")]
pub mod collector;

/// The target of all spans that are sent.
pub const TARGET: &str = "jwksd::traces";

/// Whether this build can send traces.
pub const AVAILABLE: bool = cfg!(feature = "otel");

#[cfg(feature = "otel")]
macro_rules! span {
    ($($fields:tt)*) => { tracing::info_span!(target: TARGET, $($fields)*) };
}

/// The arguments are looked at, so that they are used, and not evaluated.
#[cfg(not(feature = "otel"))]
macro_rules! span {
    ($name:literal $(, $($key:ident).+ = $value:expr)* $(,)?) => {{
        let _ = || { $( let _ = &$value; )* };
        Span::none()
    }};
}

/// One request to a listener, a part of the caller's trace if it named one.
pub fn request(listener: &'static str, method: &str, parent: Option<TraceParent>) -> Span {
    let empty = tracing::field::Empty;
    let span = span!(
        "request",
        otel.kind = "server",
        otel.status_code = empty,
        jwksd.listener = listener,
        http.request.method = method,
        http.route = empty,
        http.response.status_code = empty,
        jwksd.client = empty,
    );
    #[cfg(feature = "otel")]
    if let Some(parent) = parent {
        collector::continue_trace(&span, parent);
    }
    let _ = parent;
    span
}

/// How a [`request`] is called, once its route is known.
pub fn name(span: &Span, name: String) {
    #[cfg(feature = "otel")]
    collector::rename(span, name);
    #[cfg(not(feature = "otel"))]
    let _ = (span, name);
}

/// One signature, from the accepted request to the token or the refusal.
pub fn sign(keyset: &Name) -> Span {
    let empty = tracing::field::Empty;
    span!(
        "sign",
        otel.status_code = empty,
        jwksd.keyset = keyset.as_str(),
        jwksd.alg = empty,
        jwksd.backend = empty,
        jwksd.outcome = empty,
    )
}

/// Which algorithm and backend the current [`sign`] uses.
pub fn signs_with(alg: &'static str, backend: &str) {
    if AVAILABLE {
        Span::current().record("jwksd.alg", alg).record("jwksd.backend", backend);
    }
}

/// How a signature ended: `issued`, `refused` (the caller's mistake) or the reason of our failure.
pub fn signed(span: &Span, failure: Option<Option<SigningFailure>>) {
    let outcome = match failure {
        None => "issued",
        Some(None) => "refused",
        Some(Some(reason)) => {
            span.record("otel.status_code", "ERROR");
            reason.as_str()
        }
    };
    span.record("jwksd.outcome", outcome);
}

/// One call of a backend or of a seal's key.
pub fn backend(backend: &'static str, operation: BackendOperation) -> Span {
    let empty = tracing::field::Empty;
    span!(
        "backend",
        otel.kind = if backend == "local" { "internal" } else { "client" },
        otel.status_code = empty,
        jwksd.backend = backend,
        jwksd.operation = operation.as_str(),
        jwksd.outcome = empty,
    )
}

/// How the call ended.
pub fn answered(span: &Span, outcome: BackendOutcome) {
    span.record("jwksd.outcome", outcome.as_str());
    if outcome != BackendOutcome::Ok {
        span.record("otel.status_code", "ERROR");
    }
}

/// One step of a keyset's life: `create`, `promote`, …
pub fn step(keyset: &Name, step: &'static str) -> Span {
    span!("reconcile", otel.status_code = tracing::field::Empty, jwksd.keyset = keyset.as_str(), jwksd.step = step)
}

/// One call of the store; `document` says what kind of thing, not which.
pub fn store(kind: &'static str, operation: &'static str, document: &'static str) -> Span {
    span!(
        "store",
        otel.kind = "client",
        otel.status_code = tracing::field::Empty,
        jwksd.store = kind,
        jwksd.operation = operation,
        jwksd.document = document,
    )
}

/// What a span stands for has failed.
pub fn failed(span: &Span) {
    span.record("otel.status_code", "ERROR");
}

/// The trace that `span` is part of; `None` where there are no traces.
pub fn trace_of(span: &Span) -> Option<TraceId> {
    #[cfg(feature = "otel")]
    return collector::context_of(span).map(|context| context.trace_id);
    #[cfg(not(feature = "otel"))]
    {
        let _ = span;
        None
    }
}

/// The `traceparent` for what is asked of another server now.
pub fn outgoing() -> Option<TraceParent> {
    #[cfg(feature = "otel")]
    return collector::context_of(&Span::current());
    #[cfg(not(feature = "otel"))]
    None
}
