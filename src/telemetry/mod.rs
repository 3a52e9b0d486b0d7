//! What the daemon tells about itself: metrics, logs and audit lines, none of which may ever carry a secret or a token.

pub mod audit;
pub mod hardening;
pub mod logging;
pub mod metrics;
pub mod redaction;
pub mod sieve;
