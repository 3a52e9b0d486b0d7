//! What replicas without a store of their own ask of a manager: records as they are, what there is, and when it changes.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::access::Notes;
use super::auth::{Authenticator, Source};
use super::body;
use super::conditional::names;
use super::json::{is_json, parse};
use super::listener::Peer;
use super::problem::{Problem, ProblemType, method_not_allowed, not_found};
use crate::keyring::name::Name;
use crate::store::Document;
use crate::store::relay::{Index, NotAdmitted, Relay};
use crate::store::shared::LONGEST_REPLICA;
use crate::store::wire::{self, IndexBody, LONGEST_REPORT, LONGEST_WAIT, ReportBody};

/// More than 10,000 replicas that all wait, and room for those that come meanwhile.
pub const MOST_CONNECTIONS: usize = 10_000 + 256;

/// A manager that has nothing to serve yet is asked again after this, in seconds.
const RETRY_SECONDS: u64 = 2;

/// The longest version that a replica names, in bytes.
const LONGEST_VERSION: usize = 64;

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// What the replication listener knows.
#[derive(Clone)]
pub struct ReplicationState {
    pub relay: Arc<Relay>,
    pub clients: Arc<Authenticator<()>>,
    /// The daemon stops: answers are held back no longer.
    pub stopping: CancellationToken,
}

pub fn router(state: ReplicationState) -> Router {
    Router::new()
        .route("/v1/records", get(index))
        .route("/v1/records/installation", get(installation))
        .route("/v1/records/keyrings/{keyset}", get(keyring))
        .route("/v1/replicas/{replica}", put(report).delete(leave))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(axum::middleware::from_fn_with_state(state.clone(), authenticate))
        .with_state(state)
}

async fn authenticate(State(state): State<ReplicationState>, request: Request, next: Next) -> Response {
    let Some(peer) = request.extensions().get::<Peer>().copied() else { return ProblemType::Internal.into_response() };
    match state.clients.authenticate(request.headers(), Source::from(&peer)).await {
        Ok(client) => {
            Notes::client(request.extensions(), client.name.as_str());
            next.run(request).await
        }
        Err(unauthorized) => unauthorized.into_response(),
    }
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct IndexQuery {
    /// Names of keysets with commas between them: the index is of these and the installation.
    #[param(pattern = "^[a-z0-9][a-z0-9-]{0,62}(,[a-z0-9][a-z0-9-]{0,62})*$")]
    keysets: Option<String>,
}

/// What there is. With `If-None-Match` and `Prefer: wait=SECONDS` the answer is held back until there is something else.
#[utoipa::path(get, path = "/v1/records", tag = "replication",
    params(IndexQuery,
        ("If-None-Match" = Option<String>, Header, description = "The ETag of an index: 304 while it is the same"),
        ("Prefer" = Option<String>, Header, description = "`wait=SECONDS`, at most 60: hold the 304 back for something to change")),
    responses((status = 200, body = IndexBody, headers(
        ("ETag" = String, description = "SHA-256 of the body, base64url, quoted"),
        ("Jwksd-Store-Time" = String, description = "RFC 3339: this replica's trusted clock"),
        ("Jwksd-Age-Ms" = i64, description = "Since the store was known to hold this"),
        ("Jwksd-Waited-Ms" = i64, description = "How long the answer was held back"))),
        (status = 304, description = "Unchanged since the ETag in If-None-Match; the same headers")))]
pub(super) async fn index(
    State(state): State<ReplicationState>,
    query: Result<Query<IndexQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let query = query.map_err(|_| malformed("The parameter `keysets` may be given once."))?;
    let keysets = query.keysets.as_deref().map(parse_names).transpose()?;
    let wait = preferred_wait(&headers);
    let begun = Instant::now();
    let (index, known) = current(&state, keysets.as_deref(), &headers, begun + wait.unwrap_or_default()).await?;
    let waited = begun.elapsed();
    let mut response = match known {
        true => Response::new(Body::empty()),
        false => Response::new(Body::from(index.body.clone())),
    };
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let fields = response.headers_mut();
    if !known {
        fields.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    if let Some(wait) = wait {
        fields.insert(PREFERENCE_APPLIED, text(format!("wait={}", wait.as_secs())));
    }
    let confirmation = state.relay.confirmation();
    fields.insert(wire::STORE_TIME, text(confirmation.now.to_rfc3339()));
    fields.insert(wire::AGE, HeaderValue::from(confirmation.age.as_millis()));
    fields.insert(wire::WAITED, HeaderValue::from(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX)));
    fields.insert(ETAG, text(index.etag.clone()));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// The index, once it is another one than the client knows, or at the `deadline`; and whether the client knows it.
async fn current(
    state: &ReplicationState,
    keysets: Option<&[Name]>,
    headers: &HeaderMap,
    deadline: Instant,
) -> Result<(Arc<Index>, bool), Problem> {
    let mut changes = state.relay.changes();
    loop {
        changes.borrow_and_update();
        let index = state.relay.index(keysets).map_err(not_admitted)?;
        let known = knows(headers, &index.etag);
        if !known {
            return Ok((index, known));
        }
        tokio::select! {
            biased;
            () = state.stopping.cancelled() => return Ok((index, known)),
            () = sleep_until(deadline) => return Ok((index, known)),
            // The relay outlives its router.
            _ = changes.changed() => {}
        }
    }
}

#[utoipa::path(get, path = "/v1/records/installation", tag = "replication",
    params(("If-None-Match" = Option<String>, Header, description = "304 while the record is this one")),
    responses((status = 200, description = "The record as it is stored", body = serde_json::Value, headers(("ETag" = String, description = "SHA-256 of the body, base64url, quoted"))), (status = 304, description = "Unchanged")))]
pub(super) async fn installation(
    State(state): State<ReplicationState>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    record(&state, &Document::Installation, &headers)
}

#[utoipa::path(get, path = "/v1/records/keyrings/{keyset}", tag = "replication",
    params(("keyset" = String, Path, description = "Name of a keyset"),
        ("If-None-Match" = Option<String>, Header, description = "304 while the record is this one")),
    responses((status = 200, description = "The record as it is stored", body = serde_json::Value, headers(("ETag" = String, description = "SHA-256 of the body, base64url, quoted"))), (status = 304, description = "Unchanged")))]
pub(super) async fn keyring(
    State(state): State<ReplicationState>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let name = Name::parse(&keyset).map_err(|error| malformed(&format!("{error}.")))?;
    record(&state, &Document::Keyring(name), &headers)
}

fn record(state: &ReplicationState, document: &Document, headers: &HeaderMap) -> Result<Response, Problem> {
    let record = state.relay.record(document).map_err(not_admitted)?;
    let record = record.ok_or(ProblemType::UnknownRecord)?;
    let etag = format!("\"{}\"", record.digest);
    let mut response = Response::new(Body::empty());
    if knows(headers, &etag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else {
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        *response.body_mut() = Body::from(record.bytes);
    }
    response.headers_mut().insert(ETAG, text(etag));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// A replica says that it is there, and what it shows. It reports again and again; the newest report counts.
#[utoipa::path(put, path = "/v1/replicas/{replica}", tag = "replication", request_body = ReportBody,
    params(("replica" = String, Path, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]{1,128}$", description = "Of this process: another one after a restart")),
    responses((status = 204, description = "Taken; it is passed on within seconds")))]
pub(super) async fn report(
    State(state): State<ReplicationState>,
    Path(replica): Path<String>,
    request: Request,
) -> Result<StatusCode, Problem> {
    let replica = checked_replica(replica)?;
    let (parts, body) = request.into_parts();
    if !is_json(&parts.headers) {
        return Err(ProblemType::UnsupportedMediaType.into());
    }
    let bytes: Bytes = body::read_up_to(body, LONGEST_REPORT).await?;
    let report: ReportBody = parse(&bytes)?;
    if report.role != "signer" {
        return Err(Problem::new(ProblemType::ValueNotAllowed).detail("Only replicas of the role signer report here."));
    }
    if !is_short(&report.version, LONGEST_VERSION) {
        return Err(
            Problem::new(ProblemType::ValueNotAllowed).detail("The version must be 1 to 64 printable characters.")
        );
    }
    let full =
        |_| Problem::new(ProblemType::Overload).detail("More replicas report than there may be.").retry_after(30);
    state.relay.take_report(report.into_report(replica)).map_err(full)?;
    Ok(StatusCode::NO_CONTENT)
}

/// A replica stops in good order: nobody waits for it any more.
#[utoipa::path(delete, path = "/v1/replicas/{replica}", tag = "replication",
    params(("replica" = String, Path, pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]{1,128}$", description = "As it reported")),
    responses((status = 204, description = "Taken, whether it had reported or not; it is passed on within seconds")))]
pub(super) async fn leave(
    State(state): State<ReplicationState>,
    Path(replica): Path<String>,
) -> Result<StatusCode, Problem> {
    state.relay.take_leave(&checked_replica(replica)?);
    Ok(StatusCode::NO_CONTENT)
}

fn checked_replica(replica: String) -> Result<String, Problem> {
    match is_short(&replica, LONGEST_REPLICA) {
        true => Ok(replica),
        false => Err(malformed("The name of a replica is 1 to 128 bytes of printable characters.")),
    }
}

fn is_short(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len()) && !text.chars().any(char::is_control)
}

fn parse_names(text: &str) -> Result<Vec<Name>, Problem> {
    text.split(',').map(|name| Name::parse(name).map_err(|error| malformed(&format!("keysets: {error}.")))).collect()
}

/// `wait` of RFC 7240 §4.3, in seconds, as far as it is granted. What is not understood is no preference.
fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(PREFER).iter().filter_map(|value| value.to_str().ok());
    let preferences = values.flat_map(|value| value.split(',')).map(|preference| preference.split(';').next());
    let mut waits = preferences.filter_map(|preference| {
        let (name, value) = preference?.split_once('=')?;
        let value = value.trim().trim_matches('"');
        name.trim().eq_ignore_ascii_case("wait").then(|| value.parse::<u64>().ok()).flatten()
    });
    // Of several the first counts (§2).
    waits.next().map(|seconds| Duration::from_secs(seconds.min(LONGEST_WAIT)))
}

fn knows(headers: &HeaderMap, etag: &str) -> bool {
    let etag = text(etag.to_owned());
    headers.get_all(IF_NONE_MATCH).iter().any(|value| names(value, &etag))
}

fn text(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("base64url, quotes, digits and times are a header value")
}

fn malformed(detail: &str) -> Problem {
    Problem::new(ProblemType::MalformedRequest).detail(detail)
}

fn not_admitted(_: NotAdmitted) -> Problem {
    Problem::new(ProblemType::RecordsUnavailable).retry_after(RETRY_SECONDS)
}
