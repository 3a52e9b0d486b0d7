//! The way to the collector: OTLP over HTTP, from a thread of its own, through a bounded queue.
//!
//! The SDK queues what is finished (`OTEL_BSP_MAX_QUEUE_SIZE`, 2,048 spans) and drops what does not fit, so that neither a slow
//! nor a dead collector is felt by a request. Its thread sends, on a runtime of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId as OtelTraceId, TraceState, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use tokio::runtime::Runtime;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::super::trace_context::{TraceId, TraceParent};
use crate::outbound;

/// Where traces go, and how many of them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The collector's base URL; `None`: as `OTEL_EXPORTER_OTLP_…` says, else `http://localhost:4318`.
    pub endpoint: Option<String>,
    /// The share of the traces that begin here, 0 to 1; callers decide for theirs.
    pub sample_ratio: f64,
}

/// Why traces cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("the collector cannot be used; correct [telemetry.traces] endpoint or the variables OTEL_EXPORTER_OTLP_…")]
    Exporter(#[from] ExporterBuildError),
    #[error("the HTTP client for the collector cannot be set up")]
    Client(#[from] reqwest::Error),
    #[error("the runtime for the collector cannot be set up")]
    Runtime(#[from] std::io::Error),
}

/// Sends finished spans until it is dropped, and then what is left, for a few seconds.
#[derive(Debug)]
pub struct Sending {
    provider: SdkTracerProvider,
}

/// How long the end of the process waits for the collector.
const FAREWELL: Duration = Duration::from_secs(2);

/// The longest answer of a collector that is read.
const LONGEST_ANSWER: usize = 64 * 1024;

/// Starts sending. Its tracer belongs into the subscriber's layer.
///
/// # Errors
/// When the endpoint is no URL or the process lacks resources; not when the collector cannot be reached.
pub fn start(settings: &Settings) -> Result<(Sending, SdkTracer), TracesError> {
    let mut exporter = SpanExporter::builder().with_http().with_http_client(Collector::new()?);
    if let Some(endpoint) = &settings.endpoint {
        exporter = exporter.with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')));
    }
    let resource = Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let named = std::env::var_os("OTEL_SERVICE_NAME").is_some();
    let resource = if named { resource } else { resource.with_service_name("jwksd") };
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter.build()?)
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(settings.sample_ratio))))
        .with_resource(resource.build())
        .build();
    let tracer = provider.tracer("jwksd");
    Ok((Sending { provider }, tracer))
}

impl Drop for Sending {
    fn drop(&mut self) {
        // What is not delivered by then is lost, as traces may be.
        let _ = self.provider.shutdown_with_timeout(FAREWELL);
    }
}

/// Makes `span` a part of its caller's trace.
pub(super) fn continue_trace(span: &Span, parent: TraceParent) {
    let flags = if parent.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
    let (trace, caller) = (OtelTraceId::from_bytes(parent.trace_id.0), SpanId::from_bytes(parent.span_id));
    let context = SpanContext::new(trace, caller, flags, true, TraceState::default());
    // Fails only where no layer records the span.
    let _ = span.set_parent(Context::new().with_remote_span_context(context));
}

/// Where `span` stands in its trace.
pub(super) fn context_of(span: &Span) -> Option<TraceParent> {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    context.is_valid().then(|| TraceParent {
        trace_id: TraceId(context.trace_id().to_bytes()),
        span_id: context.span_id().to_bytes(),
        sampled: context.is_sampled(),
    })
}

/// Gives a span that has begun another name.
pub(super) fn rename(span: &Span, name: String) {
    span.context().span().update_name(name);
}

/// The HTTP client of the sending thread.
#[derive(Debug)]
struct Collector {
    runtime: Runtime,
    client: reqwest::Client,
    /// The last attempt failed, and the log knows.
    failing: AtomicBool,
}

impl Collector {
    fn new() -> Result<Self, TracesError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = outbound::client("traces").timeout(Duration::from_secs(10)).build()?;
        Ok(Collector { runtime, client, failing: AtomicBool::new(false) })
    }

    async fn send(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        // The URL may have credentials.
        let request = reqwest::Request::try_from(request).map_err(reqwest::Error::without_url)?;
        let response = self.client.execute(request).await.map_err(reqwest::Error::without_url)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = outbound::body(response, LONGEST_ANSWER).await?;
        let mut answer = http::Response::new(Bytes::from(body));
        (*answer.status_mut(), *answer.headers_mut()) = (status, headers);
        Ok(answer)
    }

    /// Tells the log when delivery begins to fail and when it works again.
    fn note(&self, problem: Option<String>) {
        let failing = problem.is_some();
        match (self.failing.swap(failing, Ordering::Relaxed), problem) {
            (false, Some(error)) => tracing::warn!(error, "the collector takes no traces: they are dropped"),
            (true, None) => tracing::info!("the collector takes traces again"),
            _ => {}
        }
    }
}

#[async_trait]
impl HttpClient for Collector {
    /// Called in the sending thread, which nothing waits for; so it may block there.
    async fn send_bytes(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, HttpError> {
        let sent = self.runtime.block_on(self.send(request));
        self.note(match &sent {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("it answered {}", answer.status())),
            Err(error) => Some(chain(error.as_ref())),
        });
        sent
    }
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
