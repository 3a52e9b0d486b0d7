//! Access lines: one per request, as far as the configuration asks for them. They hold no tokens, bodies, query strings or
//! headers, and of a path only what this daemon itself named.

use std::time::Duration;

/// The target of access lines.
pub const TARGET: &str = "jwksd::access";

/// A request that was answered. Fields that are `None` do not appear in the line.
#[derive(Clone, Copy, Debug)]
pub struct AccessLine<'a> {
    pub listener: &'static str,
    pub method: &'a str,
    /// The template of the route, such as `/v1/keysets/{keyset}/sign`, or a configured path; `None`: nothing of ours, and
    /// not repeated.
    pub path: Option<&'a str>,
    pub status: u16,
    /// Until the answer's head was ready. Field `duration_ms`, with fractions.
    pub took: Duration,
    /// Of the answer's body.
    pub bytes: Option<u64>,
    /// Who asked: the name of a token or client, or what the operating system says of the peer.
    pub client: Option<&'a str>,
    /// Of a sign request, where there is such a keyset.
    pub keyset: Option<&'a str>,
    pub request_id: &'a str,
    pub trace_id: Option<&'a str>,
    /// The other end of the connection: an address or a user ID.
    pub peer: Option<&'a str>,
}

/// Writes the line of a request.
pub fn access(line: &AccessLine<'_>) {
    tracing::info!(
        target: TARGET,
        listener = line.listener,
        method = line.method,
        path = line.path,
        status = line.status,
        duration_ms = (line.took.as_secs_f64() * 1e6).round() / 1e3,
        bytes = line.bytes,
        client = line.client,
        keyset = line.keyset,
        request_id = line.request_id,
        trace_id = line.trace_id,
        peer = line.peer,
    );
}
