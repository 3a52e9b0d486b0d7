//! Conditional requests (RFC 9110 §13).

use http::HeaderValue;

/// Whether an `If-None-Match` value names the tag; the comparison is weak (RFC 9110 §13.1.2).
pub(super) fn names(value: &HeaderValue, etag: &HeaderValue) -> bool {
    let (Ok(value), Ok(etag)) = (value.to_str(), etag.to_str()) else { return false };
    value.trim() == "*" || value.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)
}
