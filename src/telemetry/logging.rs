//! Logs: text or JSON lines to standard error, filtered, and searched for secrets on their way out.

use std::io::IsTerminal;
use std::panic::{self, PanicHookInfo};

use serde::Deserialize;
use tracing::Subscriber;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::redaction::Redacting;
use super::{access, audit, traces};

/// The environment variable that overrides the configured filter.
pub const LOG_VARIABLE: &str = "JWKSD_LOG";

/// tracing would take numbers and the empty word too.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// How a log line is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people: one line, coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line, fields at its top level.
    Json,
}

/// Crates of the AWS SDK that describe requests below `info`, with session tokens and signatures in them.
const AWS_SDK: [&str; 11] = [
    "aws_config",
    "aws_credential_types",
    "aws_runtime",
    "aws_sdk_kms",
    "aws_sdk_sts",
    "aws_sigv4",
    "aws_smithy_async",
    "aws_smithy_http",
    "aws_smithy_http_client",
    "aws_smithy_runtime",
    "aws_smithy_runtime_api",
];

/// Which events are logged: a level, or a level per target as in `info,jwksd=debug,hyper=warn`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(String);

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter says nothing.
    #[error("`{0}` is not a log level: use off, error, warn, info, debug or trace, or a list like \"info,hyper=warn\"")]
    Filter(String),
    /// Something in the process has set up logging before.
    #[error("logging is set up already: set it up once, before anything else")]
    AlreadySetUp,
}

impl LogFilter {
    /// Reads a filter. A word alone must be a level: otherwise a mistyped `inof` would name a target and silence all
    /// others.
    ///
    /// # Errors
    /// [`LoggingError::Filter`] with the part that is wrong.
    pub fn parse(text: &str) -> Result<Self, LoggingError> {
        let wrong = |part: &str| LoggingError::Filter(part.chars().take(80).collect());
        let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
        if parts.is_empty() {
            return Err(wrong(text));
        }
        for part in &parts {
            let (target, level) = part.rsplit_once('=').unwrap_or(("jwksd", part));
            if !is_target(target) || !LEVELS.iter().any(|known| level.eq_ignore_ascii_case(known)) {
                return Err(wrong(part));
            }
        }
        Ok(LogFilter(parts.join(",")))
    }

    /// Audit and access lines are configured on their own, so the level of everything else does not silence them; a directive
    /// that names their target does.
    fn to_targets(&self) -> Targets {
        let mut targets = Targets::new()
            .with_targets([audit::LIFECYCLE, audit::SIGNATURES, access::TARGET].map(|own| (own, LevelFilter::INFO)));
        // A longer target would count for more than the caps below.
        for directive in self.0.split(',').filter(|directive| !names_aws_sdk(directive)) {
            let level = |text: &str| text.parse().unwrap_or(LevelFilter::INFO);
            targets = match directive.rsplit_once('=') {
                Some((target, named)) => targets.with_target(target, level(named)),
                None => targets.with_default(level(directive)),
            };
        }
        // Last, so that they hold whatever was asked for.
        targets = targets.with_targets(AWS_SDK.map(|target| (target, LevelFilter::INFO)));
        // Spans for a collector are no part of the log.
        targets.with_target(traces::TARGET, LevelFilter::OFF)
    }
}

impl Default for LogFilter {
    fn default() -> Self {
        LogFilter("info".to_owned())
    }
}

/// Logs to standard error from now on, records of the `log` crate included, and reports panics there.
///
/// # Errors
/// [`LoggingError::AlreadySetUp`] the second time.
pub fn init(format: LogFormat, filter: &LogFilter) -> Result<(), LoggingError> {
    subscriber(format, filter, in_colour(format), std::io::stderr)
        .try_init()
        .map_err(|_| LoggingError::AlreadySetUp)?;
    report_panics();
    Ok(())
}

/// As [`init`], and the spans of [`traces`] go to `tracer`.
///
/// # Errors
/// [`LoggingError::AlreadySetUp`] the second time.
#[cfg(feature = "otel")]
pub fn init_with_traces(
    format: LogFormat,
    filter: &LogFilter,
    tracer: opentelemetry_sdk::trace::SdkTracer,
) -> Result<(), LoggingError> {
    use tracing_subscriber::Layer;

    let spans = tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_tracked_inactivity(false)
        .with_filter(Targets::new().with_target(traces::TARGET, LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(Redacting(std::io::stderr)).log_internal_errors(false);
    let registry = tracing_subscriber::registry().with(spans);
    let initialised = match format {
        LogFormat::Text => {
            registry.with(lines.with_ansi(in_colour(format)).with_filter(filter.to_targets())).try_init()
        }
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true).with_current_span(true).with_span_list(false);
            registry.with(lines.with_filter(filter.to_targets())).try_init()
        }
    };
    initialised.map_err(|_| LoggingError::AlreadySetUp)?;
    report_panics();
    Ok(())
}

fn in_colour(format: LogFormat) -> bool {
    format == LogFormat::Text && std::io::stderr().is_terminal()
}

/// A subscriber that writes redacted lines to `writer`.
pub fn subscriber<W>(
    format: LogFormat,
    filter: &LogFilter,
    colour: bool,
    writer: W,
) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // A log that cannot be written is nothing to write about.
    let lines = tracing_subscriber::fmt::layer().with_writer(Redacting(writer)).log_internal_errors(false);
    let registry = tracing_subscriber::registry().with(filter.to_targets());
    match format {
        LogFormat::Text => Box::new(registry.with(lines.with_ansi(colour))),
        LogFormat::Json => {
            Box::new(registry.with(lines.json().flatten_event(true).with_current_span(true).with_span_list(false)))
        }
    }
}

/// Replaces the panic hook by one that logs one line: where, in which thread, and the message only where it is a
/// literal of the source. A formatted message may quote what was being processed.
pub fn report_panics() {
    panic::set_hook(Box::new(|info| {
        let (location, message) = describe(info);
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        if tracing::dispatcher::has_been_set() {
            tracing::error!(target: "jwksd::panic", location, thread, "panic: {message}");
        } else {
            eprintln!("jwksd: panic in thread {thread} at {location}: {message}");
        }
    }));
}

fn describe<'a>(info: &'a PanicHookInfo<'_>) -> (String, &'a str) {
    let location = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let message = info.payload().downcast_ref::<&'static str>().copied().unwrap_or("(message withheld)");
    (location, message)
}

/// Whether a directive is about a part of the AWS SDK, which is logged from `info` on whatever is asked for.
fn names_aws_sdk(directive: &str) -> bool {
    directive.split_once('=').is_some_and(|(target, _)| target.starts_with("aws_"))
}

/// A Rust path, as targets are.
fn is_target(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b':' | b'-'))
}

#[cfg(test)]
pub(super) mod tests;
