//! How AWS KMS is reached.

use crate::config::AwsKms;
use crate::config::problem::Report;
use crate::config::raw;
use crate::keyring::time::Span;

use super::quoted;

/// Two attempts fit the default `sign_deadline`, the second at another connection.
const DEFAULT_ATTEMPT_TIMEOUT: Span = Span::from_millis(900);
const LONGEST_ATTEMPT_TIMEOUT: Span = Span::MINUTE;
const DEFAULT_CONCURRENCY: u32 = 256;
const MOST_CONCURRENCY: u32 = 4096;
/// The longest the service offers: waiting for deletion costs nothing, and a deleted key is gone.
const DEFAULT_DELETION_WINDOW: Span = Span::from_secs(30 * 86_400);
/// Far longer than any creation takes, so that no key is deleted under the hands of its maker.
const DEFAULT_CLEANUP_AFTER: Span = Span::DAY;

pub(super) fn validate(raw: Option<raw::AwsKmsBackend>, report: &mut Report) -> AwsKms {
    const PATH: &str = "backend.aws-kms";
    let raw = raw.unwrap_or_default();
    if let Some(region) = raw.region.as_ref().filter(|region| !is_region(region)) {
        report.refuse(
            format_args!("{PATH}.region"),
            format_args!("{} is not a region such as \"eu-central-1\"", quoted(region)),
        );
    }
    if let Some(url) = raw.endpoint_url.as_ref().filter(|url| !is_endpoint(url)) {
        report.refuse(
            format_args!("{PATH}.endpoint_url"),
            format_args!(
                "{} is not a URL such as \"https://kms.eu-central-1.amazonaws.com\", without user, query and fragment",
                quoted(url)
            ),
        );
    }
    let attempt_timeout = raw.attempt_timeout.unwrap_or(DEFAULT_ATTEMPT_TIMEOUT);
    if attempt_timeout.is_zero() || attempt_timeout > LONGEST_ATTEMPT_TIMEOUT {
        let most = format_args!("{attempt_timeout} is out of range: 1ms to {LONGEST_ATTEMPT_TIMEOUT}");
        report.refuse(format_args!("{PATH}.attempt_timeout"), most);
    }
    let concurrency = raw.concurrency.unwrap_or(DEFAULT_CONCURRENCY);
    if !(1..=MOST_CONCURRENCY).contains(&concurrency) {
        let range = format_args!("{concurrency} is out of range: 1 to {MOST_CONCURRENCY}");
        report.refuse(format_args!("{PATH}.concurrency"), range);
    }
    let cleanup_after = raw.cleanup_after.unwrap_or(DEFAULT_CLEANUP_AFTER);
    if cleanup_after < Span::HOUR {
        let short =
            format_args!("{cleanup_after} is for tests: a key that is just being made may be taken for a leftover");
        report.warn(format_args!("{PATH}.cleanup_after"), short);
    }
    AwsKms {
        region: raw.region,
        endpoint_url: raw.endpoint_url,
        attempt_timeout,
        concurrency,
        deletion_window_days: deletion_window(PATH, raw.deletion_window.unwrap_or(DEFAULT_DELETION_WINDOW), report),
        cleanup_after,
    }
}

/// Whole days, as the service counts.
fn deletion_window(path: &str, given: Span, report: &mut Report) -> u8 {
    let days = given.as_millis() / Span::DAY.as_millis();
    match u8::try_from(days) {
        Ok(days) if (7..=30).contains(&days) && given == Span::DAY.times(days.into()) => days,
        _ => {
            let range = format_args!("{given}: AWS KMS takes whole days, \"7d\" to \"30d\"");
            report.refuse(format_args!("{path}.deletion_window"), range);
            30
        }
    }
}

pub(super) fn is_region(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    text.len() <= 64 && text.chars().all(allowed) && text.starts_with(|c: char| c.is_ascii_lowercase())
}

fn is_endpoint(text: &str) -> bool {
    let Ok(uri) = text.parse::<http::Uri>() else { return false };
    let http = matches!(uri.scheme_str(), Some("http" | "https"));
    let authority = uri.authority().is_some_and(|authority| !authority.as_str().contains('@'));
    http && authority && uri.query().is_none() && !text.contains('#')
}
