//! `[telemetry]`: access lines and traces.

use crate::config::problem::{Report, suggest};
use crate::config::raw::{AccessLog as RawAccessLog, Telemetry as RawTelemetry, Traces as RawTraces};
use crate::config::{AccessLog, Share, Telemetry, Traces};

use super::quoted;
use super::url::parse_url;

/// Every listener, in the order of the documents.
const LISTENERS: [&str; 5] = ["public", "signer", "admin", "ops", "replication"];

pub(super) fn validate(raw: RawTelemetry, report: &mut Report) -> Telemetry {
    Telemetry {
        access_log: access_log(raw.access_log.unwrap_or_default(), report),
        traces: raw.traces.map(|traces| self::traces(traces, report)),
    }
}

fn access_log(raw: RawAccessLog, report: &mut Report) -> AccessLog {
    let usual = AccessLog::default();
    let listeners = raw.listeners.unwrap_or(usual.listeners);
    for name in listeners.iter().filter(|name| !LISTENERS.contains(&name.as_str())) {
        let message = format!("{} is no listener; {}", quoted(name), suggest(name, &LISTENERS));
        report.refuse("telemetry.access_log.listeners", message);
    }
    AccessLog {
        enabled: raw.enabled.unwrap_or(usual.enabled),
        listeners,
        sample_ratio: raw.sample_ratio.unwrap_or(usual.sample_ratio),
    }
}

fn traces(raw: RawTraces, report: &mut Report) -> Traces {
    if !cfg!(feature = "otel") {
        let message = "this build cannot send traces: leave the table out, or build jwksd with `cargo build --release \
                       --features otel`";
        report.refuse("telemetry.traces", message);
    }
    if let Some(Err(problem)) = raw.endpoint.as_deref().map(parse_url) {
        let message = format!(
            "{problem}; it is the base URL of a collector, such as \"http://localhost:4318\", and credentials come from the \
             environment (OTEL_EXPORTER_OTLP_HEADERS)"
        );
        report.refuse("telemetry.traces.endpoint", message);
    }
    Traces { endpoint: raw.endpoint, sample_ratio: raw.sample_ratio.unwrap_or(Share::ALL) }
}
