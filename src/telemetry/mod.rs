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
