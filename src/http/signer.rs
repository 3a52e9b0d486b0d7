//! What applications ask for: signatures.

use std::future::ready;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::PartialSchema;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};

use super::access::Notes;
use super::body;
use super::certificate::ClientCertificate;
use super::clients::{Clients, Grant};
use super::json::is_json;
use super::listener::Peer;
use super::middleware::{Answering, HostPolicy, Routes, Shortcut, guard_host};
use super::problem::{Problem, ProblemType, method_not_allowed, not_found};
use super::view::PolicyView;
use crate::engine::{Engine, Issued, KeysetCell, SignFailure};
use crate::keyring::claims::{ClaimError, ClaimProblem, parse_request};
use crate::telemetry::metrics::{SignRejection, SigningFailure};

/// What the signer listener knows.
#[derive(Clone)]
pub struct SignerState {
    pub engine: Arc<Engine>,
    pub clients: Arc<Clients>,
}

/// The routes of the signer listener, which answers for the hosts of `policy` alone.
pub fn routes(state: SignerState, policy: Arc<HostPolicy>) -> Routes {
    let shortcut = Signing { state: state.clone(), policy: policy.clone() };
    let router = Router::new()
        .route(SIGN, post(sign))
        .route("/v1/keysets/{keyset}", get(describe))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(state);
    Routes { router: guard_host(router, policy), shortcut: Some(Arc::new(shortcut)) }
}

const SIGN: &str = "/v1/keysets/{keyset}/sign";

/// The shortcut for what is asked most.
struct Signing {
    state: SignerState,
    policy: Arc<HostPolicy>,
}

impl Shortcut for Signing {
    fn takes(&self, request: &Request) -> bool {
        request.method() == Method::POST && keyset_of(request.uri().path()).is_some()
    }

    fn answer(&self, request: Request) -> Answering<'_> {
        if let Err(problem) = self.policy.check(request.uri(), request.headers(), request.extensions().get::<Peer>()) {
            return Box::pin(ready(problem.into_response()));
        }
        Notes::path(request.extensions(), SIGN);
        Box::pin(async {
            let path = request.uri().clone();
            answer_for(&self.state, keyset_of(path.path()).unwrap_or_default(), request).await
        })
    }
}

/// The keyset whose tokens are asked for at this path; `None` also where the router has to decode it.
fn keyset_of(path: &str) -> Option<&str> {
    let keyset = path.strip_prefix("/v1/keysets/")?.strip_suffix("/sign")?;
    (!keyset.is_empty() && !keyset.contains(['/', '%'])).then_some(keyset)
}

/// What is asked to be signed.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the shape for the API description; `parse_request` reads it without copying")]
pub struct SignBody {
    /// Any JSON object; the daemon adds `iss`, `iat`, `nbf`, `exp` and `jti`.
    #[schema(value_type = Object)]
    claims: serde_json::Value,
    /// A duration such as "10m", or whole seconds.
    #[schema(value_type = TtlBody, required = false)]
    ttl: Option<serde_json::Value>,
    /// The token's `typ`, one of the keyset's.
    #[schema(value_type = String, required = false)]
    typ: Option<String>,
}

/// A life for a token, for the API description: a duration such as "10m" or "1h30m", or whole seconds.
pub struct TtlBody;

impl PartialSchema for TtlBody {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^([0-9]{1,4}(ms|s|m|h|d|w)){1,4}$"));
        let seconds = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0)).maximum(Some(u32::MAX));
        let either = OneOfBuilder::new().item(text).item(seconds);
        either.description(Some("A duration such as \"10m\" or \"1h30m\", or whole seconds")).into()
    }
}

impl utoipa::ToSchema for TtlBody {}

/// A signed token.
#[derive(Debug, utoipa::ToSchema)]
#[allow(dead_code, reason = "the shape for the API description; `rendered` writes it")]
pub struct SignAnswer {
    /// A compact JWS (RFC 7515 §7.1).
    token: String,
    kid: String,
    alg: &'static str,
    /// Unix seconds.
    expires_at: i64,
    expires_in: i64,
}

/// A [`SignAnswer`]. Everything in it but the kid is letters, digits, `-`, `_` and `.`: there is nothing to escape.
fn rendered(issued: &Issued) -> Response {
    let Issued { token, kid, alg, expires_at, expires_in } = issued;
    let kid = serde_json::to_string(kid.as_str()).unwrap_or_default();
    let json = format!(
        r#"{{"token":"{token}","kid":{kid},"alg":"{alg}","expires_at":{expires_at},"expires_in":{expires_in}}}"#
    );
    let mut response = Response::new(Body::from(json));
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

const JSON: HeaderValue = HeaderValue::from_static("application/json");

#[utoipa::path(post, path = "/v1/keysets/{keyset}/sign", tag = "signer", request_body = SignBody,
    params(("keyset" = String, Path, description = "Name of a keyset")),
    responses((status = 200, body = SignAnswer), (status = "4XX", body = super::openapi::ProblemBody, content_type = "application/problem+json"), (status = "5XX", body = super::openapi::ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn sign(State(state): State<SignerState>, Path(keyset): Path<String>, request: Request) -> Response {
    answer_for(&state, &keyset, request).await
}

async fn answer_for(state: &SignerState, keyset: &str, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let Some(peer) = parts.extensions.get::<Peer>().copied() else { return ProblemType::Internal.into_response() };
    let cell = state.engine.keyset(keyset);
    let (client, grant) =
        match state.clients.identify(&parts.headers, &peer, parts.extensions.get::<ClientCertificate>()).await {
            Ok(identified) => identified,
            Err(response) => {
                count_unknown(cell.as_deref(), response.status());
                return response;
            }
        };
    Notes::client(&parts.extensions, &client);
    let cell = match admit(&grant, keyset, cell) {
        Ok(cell) => cell,
        Err(problem) => return problem.into_response(),
    };
    Notes::keyset(&parts.extensions, cell.name.as_str());
    if !is_json(&parts.headers) || !parts.headers.contains_key(CONTENT_TYPE) {
        reject(Some(&cell), SignRejection::Malformed);
        return ProblemType::UnsupportedMediaType.into_response();
    }
    let bytes = match body::read(body).await {
        Ok(bytes) => bytes,
        Err(problem) => {
            reject(Some(&cell), SignRejection::Malformed);
            return problem.into_response();
        }
    };
    let parsed = match parse_request(&bytes) {
        Ok(parsed) => parsed,
        Err(error) => {
            reject(Some(&cell), error.rejection().into());
            return claim_problem(&error).into_response();
        }
    };
    match state.engine.sign(&cell, &parsed, grant.audiences.as_deref(), &client).await {
        Ok(issued) => rendered(&issued),
        Err(failure) => failure_problem(&state.engine, &cell, &failure).into_response(),
    }
}

/// Somebody who is not known is the caller's mistake, unless it is for want of the cluster's keys.
fn count_unknown(cell: Option<&KeysetCell>, answered: StatusCode) {
    match (answered, cell) {
        (StatusCode::SERVICE_UNAVAILABLE, Some(cell)) => {
            cell.signing_metrics.load().failed(SigningFailure::ClusterKeysUnavailable);
        }
        (StatusCode::UNAUTHORIZED, cell) => reject(cell, SignRejection::Unauthorized),
        _ => {}
    }
}

/// The part of a keyset that signing needs.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct SignerView {
    name: String,
    issuer: String,
    algorithm: &'static str,
    active_kid: Option<String>,
    policy: PolicyView,
}

pub(super) async fn describe(
    State(state): State<SignerState>,
    Path(keyset): Path<String>,
    request: Request,
) -> Response {
    let Some(peer) = request.extensions().get::<Peer>().copied() else { return ProblemType::Internal.into_response() };
    let certificate = request.extensions().get::<ClientCertificate>();
    let grant = match state.clients.identify(request.headers(), &peer, certificate).await {
        Ok((client, grant)) => {
            Notes::client(request.extensions(), &client);
            grant
        }
        Err(response) => return response,
    };
    let cell = match admit(&grant, &keyset, state.engine.keyset(&keyset)) {
        Ok(cell) => cell,
        Err(problem) => return problem.into_response(),
    };
    let snapshot = cell.snapshot.load();
    let keyring = &snapshot.keyring;
    Json(SignerView {
        name: cell.name.to_string(),
        issuer: keyring.policy.issuer.url.clone(),
        algorithm: keyring.signing_algorithm().unwrap_or(keyring.policy.algorithm).alg(),
        active_kid: snapshot.active.as_ref().map(|active| active.kid.to_string()),
        policy: PolicyView::of(keyring),
    })
    .into_response()
}

/// A client learns of keysets it may not use only that it may not.
fn admit(grant: &Grant, keyset: &str, cell: Option<Arc<KeysetCell>>) -> Result<Arc<KeysetCell>, Problem> {
    if let Some(allowed) = &grant.keysets
        && !allowed.iter().any(|name| name.as_str() == keyset)
    {
        reject(cell.as_deref(), SignRejection::Unauthorized);
        return Err(Problem::new(ProblemType::Forbidden).detail("This client may not use this keyset."));
    }
    let shown: String = keyset.chars().take(63).collect();
    cell.ok_or_else(|| Problem::new(ProblemType::UnknownKeyset).detail(format!("There is no keyset `{shown}`.")))
}

fn reject(cell: Option<&KeysetCell>, reason: SignRejection) {
    if let Some(cell) = cell {
        cell.metrics.rejected(reason);
    }
}

fn claim_problem(error: &ClaimError) -> Problem {
    let kind = match error.problem() {
        ClaimProblem::MalformedRequest => ProblemType::MalformedRequest,
        ClaimProblem::TtlInvalid => ProblemType::TtlInvalid,
        ClaimProblem::TtlTooLong => ProblemType::TtlTooLong,
        ClaimProblem::ClaimMissing => ProblemType::ClaimMissing,
        ClaimProblem::ClaimForbidden => ProblemType::ClaimForbidden,
        ClaimProblem::ClaimInvalid => ProblemType::ClaimInvalid,
        ClaimProblem::AudienceNotAllowed => ProblemType::AudienceNotAllowed,
        ClaimProblem::TypeNotAllowed => ProblemType::TypeNotAllowed,
    };
    Problem::new(kind).detail(error.to_string())
}

fn failure_problem(engine: &Engine, cell: &KeysetCell, failure: &SignFailure) -> Problem {
    let (reason, cause) = match failure {
        SignFailure::Claims(error) => return claim_problem(error),
        SignFailure::Drained => return ProblemType::KeysetDrained.into(),
        SignFailure::Ours { reason, cause } => (*reason, cause),
    };
    let (kind, retry_after) = match reason {
        SigningFailure::NoActiveKey => (ProblemType::NoActiveKey, seconds_to_active(engine, cell)),
        SigningFailure::StaleKeyring => (ProblemType::StaleKeyring, 1),
        SigningFailure::Overload => (ProblemType::Overload, 1),
        SigningFailure::BackendUnavailable if engine.is_sealed() => {
            (ProblemType::SealUnavailable, super::call::SEAL_RETRY_SECONDS)
        }
        SigningFailure::BackendUnavailable => (ProblemType::BackendUnavailable, 1),
        SigningFailure::BackendTimeout => (ProblemType::BackendTimeout, 1),
        SigningFailure::BackendThrottled => (ProblemType::BackendThrottled, 1),
        SigningFailure::BackendDenied => (ProblemType::BackendDenied, 5),
        SigningFailure::KeyDisabled => (ProblemType::KeyDisabled, 1),
        SigningFailure::VerificationFailed => (ProblemType::VerificationFailed, 1),
        SigningFailure::ClusterKeysUnavailable => (ProblemType::ClusterKeysUnavailable, 1),
    };
    Problem::new(kind).detail(cause.clone()).retry_after(retry_after)
}

/// When the first key may sign, if that is known.
fn seconds_to_active(engine: &Engine, cell: &KeysetCell) -> u64 {
    let sight = engine.look(cell);
    let expected = sight.outlook.standby_expected.map(|at| at.since(sight.now).as_secs().unsigned_abs());
    expected.unwrap_or(1).max(1)
}
