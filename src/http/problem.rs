//! Errors as every listener answers them: RFC 9457 problem details with `type` from a closed list.

use std::fmt;
use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::middleware::RequestId;
use crate::telemetry::sieve::Sieve;

/// The media type of RFC 9457.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// One problem on its way to a client: a type, what is particular about this occurrence, and (never sent) its cause.
///
/// For a 5xx the client sees the constant [`ProblemType::explanation`]; `detail` and `cause` go to the log with the
/// request id.
#[derive(Clone)]
pub struct Problem {
    kind: ProblemType,
    detail: Option<String>,
    instance: Option<String>,
    retry_after_seconds: Option<u64>,
    members: Map<String, Value>,
    cause: Option<Arc<str>>,
}

impl Problem {
    pub fn new(kind: ProblemType) -> Self {
        Problem { kind, detail: None, instance: None, retry_after_seconds: None, members: Map::new(), cause: None }
    }

    /// What is particular about this occurrence and what to do next. Must not hold secrets or tokens.
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// A URI reference that identifies this occurrence (RFC 9457 §3.1.5).
    pub fn instance(mut self, instance: impl Into<String>) -> Self {
        self.instance = Some(instance.into());
        self
    }

    /// Sent as the member `retry_after_seconds` and as `Retry-After`; at least 1, because 0 invites a retry storm.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_seconds = Some(seconds.max(1));
        self
    }

    /// An extension member (RFC 9457 §3.2), such as `errors` or `next_standby_at`. The standard members' names are ignored.
    pub fn member(mut self, name: &str, value: impl Into<Value>) -> Self {
        if !STANDARD_MEMBERS.contains(&name) {
            self.members.insert(name.to_owned(), value.into());
        }
        self
    }

    /// What went wrong inside, with all its sources: logged once, with the request id, when the answer leaves.
    pub fn cause(mut self, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut chain = error.to_string();
        let mut source = error.source();
        while let Some(inner) = source {
            chain.push_str(": ");
            chain.push_str(&inner.to_string());
            source = inner.source();
        }
        self.cause = Some(chain.into());
        self
    }

    pub fn kind(&self) -> ProblemType {
        self.kind
    }

    pub fn status(&self) -> StatusCode {
        self.kind.status()
    }

    /// Logs what the client is not told; of many alike a line now and then. Called once per answer, inside the request's span.
    pub(super) fn log(&self, request_id: &RequestId, sieves: &Sieves) {
        let (id, problem) = (request_id.as_str(), self.kind.slug());
        let failed = self.status().is_server_error() && self.kind != ProblemType::NotReady;
        // Who asks for readiness logs when it changes.
        let Some(kept_back) = sieves.pass(self.kind).filter(|_| failed) else {
            return tracing::debug!(request_id = id, problem, "request refused");
        };
        let cause = self.cause.as_deref().or(self.detail.as_deref()).unwrap_or("none given");
        match self.status().as_u16() {
            500 => tracing::error!(request_id = id, problem, cause, kept_back, "request failed"),
            _ => tracing::warn!(request_id = id, problem, cause, kept_back, "request failed"),
        }
    }

    /// Writes status, body and headers into `response`, keeping what else it carries (such as `Allow`).
    pub(super) fn write_to(&self, response: &mut Response, request_id: Option<&RequestId>) {
        let body = self.render(request_id);
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.remove(http::header::CONTENT_LENGTH);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        *response.body_mut() = Body::from(body);
    }

    /// The document without a request id, for requests that had none since they could not be parsed.
    pub(super) fn to_json(&self) -> Vec<u8> {
        self.render(None)
    }

    fn render(&self, request_id: Option<&RequestId>) -> Vec<u8> {
        let detail = match &self.detail {
            Some(detail) if !self.status().is_server_error() => detail.as_str(),
            _ => self.kind.explanation(),
        };
        let document = Document {
            kind: format!("urn:jwksd:problem:{}", self.kind.slug()),
            title: self.kind.title(),
            status: self.status().as_u16(),
            detail,
            instance: self.instance.as_deref(),
            request_id: request_id.map(RequestId::as_str),
            retry_after_seconds: self.retry_after_seconds,
            members: &self.members,
        };
        serde_json::to_vec(&document).expect("strings, integers and JSON values always serialise")
    }
}

/// One sieve for each type of problem, so that an overload does not hide what else goes wrong.
pub(super) struct Sieves {
    epoch: Instant,
    by_type: [Sieve; ProblemType::ALL.len()],
}

impl Sieves {
    pub fn new() -> Self {
        Sieves { epoch: Instant::now(), by_type: std::array::from_fn(|_| Sieve::default()) }
    }

    fn pass(&self, kind: ProblemType) -> Option<u64> {
        self.by_type[kind as usize].pass(self.epoch.elapsed())
    }
}

impl From<ProblemType> for Problem {
    fn from(kind: ProblemType) -> Self {
        Problem::new(kind)
    }
}

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Problem");
        out.field("type", &self.kind.slug()).field("detail", &self.detail).field("cause", &self.cause).finish()
    }
}

/// The whole answer, without the request id; [`super::middleware::Edge`] finds the problem in the response's extensions and
/// writes it again with the id.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        self.write_to(&mut response, None);
        response.extensions_mut().insert(self);
        response
    }
}

impl IntoResponse for ProblemType {
    fn into_response(self) -> Response {
        Problem::new(self).into_response()
    }
}

/// A fallback handler: 404. Routers need it only where they run without [`super::middleware::Edge`], which turns bare
/// 404s into this.
pub async fn not_found() -> Problem {
    ProblemType::NotFound.into()
}

/// A fallback for known paths: 405; axum adds `Allow`. Needed as [`not_found`] is.
pub async fn method_not_allowed() -> Problem {
    ProblemType::MethodNotAllowed.into()
}

const STANDARD_MEMBERS: [&str; 7] =
    ["type", "title", "status", "detail", "instance", "request_id", "retry_after_seconds"];

#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "type")]
    kind: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_seconds: Option<u64>,
    #[serde(flatten)]
    members: &'a Map<String, Value>,
}

macro_rules! problem_types {
    ($($variant:ident $slug:literal $status:literal $title:literal $explanation:literal;)+) => {
        /// The closed list of problems: `urn:jwksd:problem:{slug}`. A slug, once released, keeps its meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ProblemType {
            $(#[doc = concat!($status, ": ", $explanation)] $variant,)+
        }

        impl ProblemType {
            /// Every type, ordered by status, for the README and for metrics.
            pub const ALL: &'static [ProblemType] = &[$(ProblemType::$variant),+];

            /// The last part of the `type` URN.
            pub const fn slug(self) -> &'static str {
                match self { $(ProblemType::$variant => $slug),+ }
            }

            /// The same for every occurrence (RFC 9457 §3.1.3).
            pub const fn title(self) -> &'static str {
                match self { $(ProblemType::$variant => $title),+ }
            }

            /// What it means and what to do next; the `detail` of every 5xx, and of others without one of their own.
            pub const fn explanation(self) -> &'static str {
                match self { $(ProblemType::$variant => $explanation),+ }
            }

            pub const fn status(self) -> StatusCode {
                let code: u16 = match self { $(ProblemType::$variant => $status),+ };
                match StatusCode::from_u16(code) {
                    Ok(status) => status,
                    Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
                }
            }
        }
    };
}

problem_types! {
    MalformedRequest "malformed-request" 400 "Malformed request"
        "The request is not HTTP as this endpoint understands it, its JSON does not parse, or a member is unknown or of the wrong type.";
    IdempotencyKeyInvalid "idempotency-key-invalid" 400 "Invalid Idempotency-Key"
        "Idempotency-Key must be 1 to 255 printable ASCII characters, given once.";
    Unauthorized "unauthorized" 401 "Not authenticated"
        "Send a valid token as `Authorization: Bearer …`, or prove by a client certificate who you are, where the listener asks for one.";
    Forbidden "forbidden" 403 "Not allowed"
        "The credentials are valid but do not allow this.";
    ForeignOrigin "foreign-origin" 403 "Foreign origin"
        "Requests that a web page of another origin caused are refused.";
    HostNotAllowed "host-not-allowed" 403 "Host not allowed"
        "The Host of the request is not one this listener answers for: the address it listens on, localhost, or a name in its TLS certificate.";
    NotFound "not-found" 404 "Not found"
        "There is nothing at this path.";
    UnknownKeyset "unknown-keyset" 404 "Unknown keyset"
        "No keyset has this name; GET /v1/keysets lists them.";
    UnknownKey "unknown-key" 404 "Unknown key"
        "No key of this keyset has this kid.";
    UnknownRecord "unknown-record" 404 "Unknown record"
        "No record of this keyset was ever written.";
    MethodNotAllowed "method-not-allowed" 405 "Method not allowed"
        "This path does not take this method; Allow lists those it takes.";
    BodyTimeout "body-timeout" 408 "Body too slow"
        "The request's body did not arrive in time.";
    NoStandby "no-standby" 409 "No standby key"
        "No successor has been published for long enough; wait until next_standby_at or allow an unpropagated key.";
    JwksFull "jwks-full" 409 "JWKS full"
        "One more key would break the limit of keys in a JWKS; wait until a retiring key leaves or revoke one.";
    KeysetDrained "keyset-drained" 409 "Keyset drained"
        "The keyset has been drained: it signs no more and makes no new keys.";
    ReadOnlyReplica "read-only-replica" 409 "Read-only replica"
        "This replica only reads the keyrings; ask a manager.";
    KeysetFrozen "keyset-frozen" 409 "Keyset frozen"
        "The keyset's record cannot be trusted, so nothing may change; see its alarms.";
    KeysetDegraded "keyset-degraded" 409 "Keyset degraded"
        "The configuration does not fit the keyset any more, so nothing is promoted; see its alarms.";
    KeysetNotConfigured "keyset-not-configured" 409 "Keyset not configured"
        "The keyset is gone from the configuration; put it back or drain it.";
    AlgorithmUnconfirmed "algorithm-unconfirmed" 409 "Algorithm change not confirmed"
        "The successor has another algorithm than the active key; rotate with confirm_algorithm when all verifiers can read it.";
    AlreadyRetired "already-retired" 409 "Key already retired"
        "The key has already left the JWKS and cannot be revoked any more.";
    NothingToRollBack "nothing-to-roll-back" 409 "Nothing to roll back"
        "No demoted key is still published and unrevoked.";
    AlreadyImported "already-imported" 409 "Already imported"
        "A key with this kid or this public key already exists.";
    GenerationMismatch "generation-mismatch" 412 "Generation has moved on"
        "What was to be changed is no longer at the generation in If-Match; read it again and decide anew.";
    BodyTooLarge "body-too-large" 413 "Body too large"
        "A request's body may have at most 64 KiB, a replica's report 1 MiB.";
    UriTooLong "uri-too-long" 414 "URI too long"
        "The request's target is too long.";
    UnsupportedMediaType "unsupported-media-type" 415 "Unsupported media type"
        "The body must be JSON, with `Content-Type: application/json`.";
    ValueNotAllowed "value-not-allowed" 422 "Value not allowed"
        "A member of the request has a value that is not allowed.";
    TtlInvalid "ttl-invalid" 422 "Invalid token life"
        "The ttl is not a whole number of seconds from 1.";
    TtlTooLong "ttl-too-long" 422 "Token life too long"
        "The token would live longer than the keyset's max_ttl.";
    ClaimMissing "claim-missing" 422 "Required claim missing"
        "A claim that the keyset requires is missing or empty.";
    ClaimForbidden "claim-forbidden" 422 "Forbidden claim"
        "A claim that callers may not set is present.";
    ClaimInvalid "claim-invalid" 422 "Invalid claim"
        "A registered claim has a value of the wrong type or out of range.";
    AudienceNotAllowed "audience-not-allowed" 422 "Audience not allowed"
        "An audience is not one that the keyset or this client may sign for.";
    TypeNotAllowed "type-not-allowed" 422 "Token type not allowed"
        "The typ is not one that the keyset may sign.";
    HoldInvalid "hold-invalid" 422 "Invalid hold"
        "A hold must end in the future.";
    DryRunNotSupported "dry-run-not-supported" 422 "No dry run"
        "This action cannot be tried without doing it.";
    ImportRefused "import-refused" 422 "Import refused"
        "The key is weak, inconsistent, or does not fit the keyset.";
    ConfigurationInvalid "configuration-invalid" 422 "Invalid configuration"
        "The configuration on disk is invalid; what runs keeps running.";
    IdempotencyKeyReused "idempotency-key-reused" 422 "Idempotency-Key reused"
        "This Idempotency-Key was used with another request; choose a new one.";
    TooManyFailedLogins "too-many-failed-logins" 429 "Too many failed logins"
        "Too many failed logins from this address; valid tokens are not affected.";
    HeadTooLarge "head-too-large" 431 "Head too large"
        "The request line and header fields may have at most 32 KiB and 100 fields together.";
    Internal "internal" 500 "Internal error"
        "Something failed inside; the log has the cause under this request_id.";
    NoActiveKey "no-active-key" 503 "No active key"
        "The keyset has no active key yet; retry later.";
    JwksEmpty "jwks-empty" 503 "JWKS empty"
        "The issuer has no published key yet; retry later.";
    StaleKeyring "stale-keyring" 503 "Keyring not confirmed"
        "The store has not confirmed the keyring for too long, so nothing is signed; retry later.";
    Overload "overload" 503 "Overloaded"
        "Too many requests wait for this keyset; retry later.";
    BackendUnavailable "backend-unavailable" 503 "Backend unavailable"
        "The key backend cannot be reached; retry later.";
    BackendTimeout "backend-timeout" 503 "Backend too slow"
        "The key backend did not answer in time; retry later.";
    BackendThrottled "backend-throttled" 503 "Backend throttles"
        "The key backend throttles requests; retry later.";
    BackendDenied "backend-denied" 503 "Backend denies access"
        "The key backend denies access; an operator must grant it.";
    KeyDisabled "key-disabled" 503 "Key disabled"
        "The active key is disabled in its backend; a successor takes over if there is one.";
    VerificationFailed "verification-failed" 503 "Signature not valid"
        "The backend returned a signature that does not verify; it was discarded.";
    SealUnavailable "seal-unavailable" 503 "Seal unavailable"
        "The key-encryption key cannot be reached; retry later.";
    StoreUnavailable "store-unavailable" 503 "Store unavailable"
        "The store cannot be read or written. Whether the change was stored is found out as soon as it can: read again, or repeat with the same Idempotency-Key.";
    RecordsUnavailable "records-unavailable" 503 "Records not available"
        "This replica has not read what is asked for and found it good; retry later, or ask another one.";
    ClusterKeysUnavailable "cluster-keys-unavailable" 503 "Cluster's keys unavailable"
        "The token could be a service account's, and the cluster's keys to tell cannot be fetched; retry later.";
    ClockFrozen "clock-frozen" 503 "Clock not trusted"
        "The clock stepped, so keys do not move; it thaws when it agrees again or an operator accepts it.";
    NotReady "not-ready" 503 "Not ready"
        "This process is not ready; the members say what is not.";
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use http_body_util::BodyExt;

    use super::*;

    async fn document(response: Response) -> Value {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn slugs_are_unique_and_statuses_are_errors() {
        let slugs: HashSet<_> = ProblemType::ALL.iter().map(|kind| kind.slug()).collect();
        assert_eq!(slugs.len(), ProblemType::ALL.len());
        for kind in ProblemType::ALL {
            assert!(kind.status().is_client_error() || kind.status().is_server_error(), "{kind:?}");
            assert!(kind.slug().chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{kind:?}");
            assert!(kind.explanation().ends_with('.'), "{kind:?}");
        }
        assert!(ProblemType::ALL.is_sorted_by_key(|kind| kind.status().as_u16()));
    }

    #[tokio::test]
    async fn a_problem_carries_its_type_detail_and_members() {
        let problem = Problem::new(ProblemType::NoStandby)
            .detail("the next key stands by later")
            .member("next_standby_at", "2026-11-24T10:00:00Z")
            .member("status", 200)
            .retry_after(0);
        let response = problem.into_response();
        assert_eq!(response.status(), 409);
        assert_eq!(response.headers()[CONTENT_TYPE], PROBLEM_JSON);
        assert_eq!(response.headers()[RETRY_AFTER], "1");
        assert_eq!(
            document(response).await,
            serde_json::json!({
                "type": "urn:jwksd:problem:no-standby", "title": "No standby key", "status": 409,
                "detail": "the next key stands by later", "retry_after_seconds": 1,
                "next_standby_at": "2026-11-24T10:00:00Z",
            })
        );
    }

    #[tokio::test]
    async fn a_server_error_never_tells_its_cause() {
        let cause = std::io::Error::other("disk /dev/sda1 is on fire");
        let problem = Problem::new(ProblemType::StoreUnavailable).detail("secret detail").cause(&cause);
        let body = document(problem.into_response()).await;
        assert_eq!(body["detail"], ProblemType::StoreUnavailable.explanation());
        assert!(!body.to_string().contains("fire"), "{body}");
        assert!(!body.to_string().contains("secret"), "{body}");
    }
}
