//! What the daemon tells about itself: metrics, logs, traces and audit lines, none of which may ever carry a secret or a token.

pub mod access;
pub mod audit;
pub mod hardening;
pub mod logging;
pub mod metrics;
pub mod redaction;
pub mod sieve;
pub mod trace_context;
pub mod traces;

/// An error with its causes, for the log.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
