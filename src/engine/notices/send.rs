//! Notices as webhooks (Standard Webhooks 1.0): signed, without redirects, bounded in time and size.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::DateTime;
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use reqwest::{Certificate, StatusCode};

use super::{Deliver, NotDelivered};
use crate::config::{NoticeSecrets, Receiver};
use crate::engine::reconcile::chain;
use crate::keyring::notice::Notice;
use crate::keyring::time::{Span, Timestamp};
use crate::outbound::{self, NotLinkLocal};

/// Of an answer: nobody reads more.
const BODY_MAX: usize = 16 * 1024;

/// A URL that takes webhooks.
pub struct Webhook {
    http: reqwest::Client,
    url: String,
    keys: Vec<hmac::Key>,
}

/// Why a receiver cannot be sent to at all.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error("cannot read {}", path.display())]
    CaFile { path: PathBuf, source: std::io::Error },
    #[error("{} has no certificate in PEM", path.display())]
    NoCertificate { path: PathBuf },
    #[error("no HTTPS client can be made: see that the system's certificate authorities are installed")]
    Client(#[source] reqwest::Error),
}

impl Webhook {
    /// Reads `ca_file`; nothing is sent yet.
    pub fn new(receiver: &Receiver, secrets: &NoticeSecrets) -> Result<Webhook, WebhookError> {
        let mut builder = outbound::client("notice")
            .https_only(receiver.url.starts_with("https://"))
            .dns_resolver(Arc::new(NotLinkLocal))
            .timeout(receiver.timeout.to_std())
            .pool_max_idle_per_host(1);
        if let Some(path) = &receiver.ca_file {
            builder = builder.tls_certs_only(certificates(path)?);
        }
        let http = builder.build().map_err(WebhookError::Client)?;
        let keys = secrets.expose().map(|secret| hmac::Key::new(hmac::HMAC_SHA256, secret)).collect();
        Ok(Webhook { http, url: receiver.url.clone(), keys })
    }

    /// One signature per secret, so that a receiver may exchange its own whenever it likes.
    fn signature(&self, id: &str, seconds: &str, body: &[u8]) -> String {
        let sign = |key: &hmac::Key| {
            let mut context = hmac::Context::with_key(key);
            for part in [id.as_bytes(), b".", seconds.as_bytes(), b".", body] {
                context.update(part);
            }
            format!("v1,{}", STANDARD.encode(context.sign()))
        };
        self.keys.iter().map(sign).collect::<Vec<_>>().join(" ")
    }

    /// Sends a notice and returns the status of the answer.
    pub async fn send(&self, notice: &Notice, now: Timestamp) -> Result<u16, NotDelivered> {
        let (body, seconds) = (notice.body(), now.as_secs().to_string());
        let request = self.http.post(&self.url).header(CONTENT_TYPE, "application/json");
        let request = request
            .header("webhook-id", &notice.id)
            .header("webhook-timestamp", &seconds)
            .header("webhook-signature", self.signature(&notice.id, &seconds, &body));
        // The URL may contain a secret.
        let later = |error: reqwest::Error| NotDelivered::Later { problem: chain(&error.without_url()), after: None };
        let response = request.body(body).send().await.map_err(later)?;
        let (status, after) = (response.status(), retry_after(response.headers(), now));
        // Read so that the connection can be used again; what it says does not matter.
        let _ = outbound::body(response, BODY_MAX).await;
        if status.is_success() { Ok(status.as_u16()) } else { Err(refusal(status, after)) }
    }
}

#[async_trait]
impl Deliver for Webhook {
    async fn deliver(&self, notice: &Notice, now: Timestamp) -> Result<(), NotDelivered> {
        self.send(notice, now).await.map(|_| ())
    }
}

/// What an answer that is no success means: that the receiver is not as it should be, or the notice.
fn refusal(status: StatusCode, after: Option<Span>) -> NotDelivered {
    let later = |problem| NotDelivered::Later { problem, after };
    match status.as_u16() {
        410 => NotDelivered::Gone,
        300..=399 => later(format!("it answers {}, and redirects are not followed", status.as_u16())),
        401 | 403 | 404 | 407 | 408 | 425 | 429 => later(format!("it answers {}", status.as_u16())),
        400..=499 => NotDelivered::Refused { status: status.as_u16() },
        status => later(format!("it answers {status}")),
    }
}

/// Seconds, or a date (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Span> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Span::from_secs(seconds.into()));
    }
    let date = DateTime::parse_from_rfc2822(text).ok()?;
    Some(Timestamp::from_secs(date.timestamp()).since(now))
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, WebhookError> {
    let pem = std::fs::read(path).map_err(|source| WebhookError::CaFile { path: path.to_owned(), source })?;
    let found = Certificate::from_pem_bundle(&pem).unwrap_or_default();
    if found.is_empty() { Err(WebhookError::NoCertificate { path: path.to_owned() }) } else { Ok(found) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Secret, SecretSource};
    use crate::keyring::name::Name;

    fn webhook(secrets: &str) -> Webhook {
        let receiver = Receiver {
            name: Name::parse("ops").unwrap(),
            url: "http://127.0.0.1:1/".to_owned(),
            secret: SecretSource::Environment("S".to_owned()),
            events: Vec::new(),
            keysets: None,
            before: Vec::new(),
            ca_file: None,
            timeout: Span::SECOND,
            give_up_after: Span::SECOND,
        };
        let secrets = NoticeSecrets::parse(&Secret::new(secrets.as_bytes()).unwrap()).unwrap();
        Webhook::new(&receiver, &secrets).unwrap()
    }

    /// The example of the specification's reference libraries.
    #[test]
    fn it_signs_as_standard_webhooks_says() {
        let signed = |secrets: &str| {
            webhook(secrets).signature("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", br#"{"test": 2432232314}"#)
        };
        let one = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        assert_eq!(signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), one);
        let both = signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA");
        assert_eq!(both.split(' ').next(), Some(one));
        assert_eq!(both.split(' ').count(), 2);
    }

    #[test]
    fn an_answer_tells_whether_to_come_again() {
        let status = |code| refusal(StatusCode::from_u16(code).unwrap(), None);
        assert_eq!(status(410), NotDelivered::Gone);
        for code in [400, 405, 413, 422] {
            assert_eq!(status(code), NotDelivered::Refused { status: code });
        }
        for code in [301, 307, 401, 403, 404, 408, 429, 500, 503] {
            assert!(matches!(status(code), NotDelivered::Later { .. }), "{code}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = Timestamp::parse_rfc3339("2026-11-24T10:00:00Z").unwrap();
        let asked = |text: &str| {
            let headers = [(RETRY_AFTER, text.parse().unwrap())].into_iter().collect();
            retry_after(&headers, now)
        };
        assert_eq!(asked("120"), Some(Span::from_secs(120)));
        assert_eq!(asked("Tue, 24 Nov 2026 10:01:00 GMT"), Some(Span::MINUTE));
        assert_eq!(asked("Tue, 24 Nov 2026 09:00:00 GMT"), Some(Span::ZERO));
        assert_eq!(asked("soon"), None);
    }
}
