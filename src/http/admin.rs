//! What operators ask for. Every changing call is one intent, answered once its effect is durable and shows.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use http::header::{AUTHORIZATION, ETAG};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::access::Notes;
use super::audit::{AuditPage, AuditQuery};
use super::auth::{Authenticator, Source, Unauthorized};
use super::call::{Call, fingerprint_of, problem_of, problem_of_refusal};
use super::certificate::{Certificates, ClientCertificate};
use super::json::OptionalJson;
use super::listener::Peer;
use super::openapi::ProblemBody;
use super::problem::{Problem, ProblemType, method_not_allowed, not_found};
use super::view::{HoldView, KeysetView};
use crate::backend::RemoteFound;
use crate::backend::material::PrivateKeyMaterial;
use crate::config::Role;
use crate::engine::whole::ClockAnswer;
use crate::engine::{Engine, KeysetCell};
use crate::keyring::decide::{Confirmation, Intent, Outcome, Refusal};
use crate::keyring::name::Name;
use crate::keyring::time::Timestamp;

/// Re-reads configuration, tokens and certificates; in the composition root's hands.
pub type Reload =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<ReloadAnswer, Vec<String>>> + Send>> + Send + Sync>;

/// What the admin listener knows.
#[derive(Clone)]
pub struct AdminState {
    pub engine: Arc<Engine>,
    pub tokens: Arc<Authenticator<Role>>,
    pub certificates: Arc<Certificates<Role>>,
    pub reload: Reload,
    /// Whether the page for people is served.
    pub page: bool,
}

/// Who asks, once authenticated.
#[derive(Clone)]
pub(super) struct Actor {
    pub name: Name,
    pub role: Role,
}

pub fn router(state: AdminState) -> Router {
    let page = state.page;
    let api = Router::new()
        .route("/v1/keysets", get(list))
        .route("/v1/keysets/{keyset}", get(show))
        .route("/v1/keysets/{keyset}/timeline", get(super::overview::timeline))
        .route("/v1/keysets/{keyset}/rotate", post(rotate))
        .route("/v1/keysets/{keyset}/rollback", post(rollback))
        .route("/v1/keysets/{keyset}/compromise", post(compromise))
        .route("/v1/keysets/{keyset}/keys/{kid}/revoke", post(revoke))
        .route("/v1/keysets/{keyset}/hold", put(hold).delete(resume))
        .route("/v1/keysets/{keyset}/drain", post(drain).delete(undrain))
        .route("/v1/keysets/{keyset}/import", post(super::import::import))
        .route("/v1/clock", get(show_clock))
        .route("/v1/clock/accept", post(accept_clock))
        .route("/v1/reload", post(reload))
        .route("/v1/audit", get(audit))
        .route("/v1/replicas", get(super::overview::replicas))
        .route("/v1/whoami", get(super::overview::whoami))
        .route("/openapi.json", get(super::openapi::document))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(axum::middleware::from_fn_with_state(state.clone(), authenticate))
        .with_state(state);
    // The page asks for a token itself: there is nothing in it that needs one.
    if page { api.route("/", get(super::page::page).fallback(method_not_allowed)) } else { api }
}

/// Every request needs a token or a certificate; every request that changes something needs an operator's.
async fn authenticate(State(state): State<AdminState>, mut request: Request, next: Next) -> Response {
    let Some(peer) = request.extensions().get::<Peer>().copied() else { return ProblemType::Internal.into_response() };
    let (name, role) =
        match state.identify(request.headers(), request.extensions().get::<ClientCertificate>(), &peer).await {
            Ok(identified) => identified,
            Err(unauthorized) => {
                state.engine.metrics.admin_auth_failed();
                return unauthorized.into_response();
            }
        };
    Notes::client(request.extensions(), name.as_str());
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !reads && role != Role::Operator {
        let detail = "The role of these credentials is viewer; changing something takes an operator.";
        return Problem::new(ProblemType::Forbidden).detail(detail).into_response();
    }
    request.extensions_mut().insert(Actor { name, role });
    next.run(request).await
}

/// Why, and whether only to look.
#[derive(Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ActionBody {
    pub(super) reason: Option<String>,
    pub(super) dry_run: bool,
}

#[derive(Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RotateBody {
    reason: Option<String>,
    dry_run: bool,
    /// Also take a key that was not published for `propagation`.
    allow_unpropagated: bool,
    /// The `alg` of the waiting keys, or true for whichever it is.
    confirm_algorithm: Option<ConfirmBody>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(untagged)]
enum ConfirmBody {
    Any(bool),
    Alg(String),
}

impl<'de> Deserialize<'de> for ConfirmBody {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Any(bool),
            Alg(String),
        }
        match Either::deserialize(deserializer) {
            Ok(Either::Any(any)) => Ok(ConfirmBody::Any(any)),
            Ok(Either::Alg(alg)) => Ok(ConfirmBody::Alg(alg)),
            Err(_) => Err(serde::de::Error::custom("must be an algorithm such as \"ES256\", or true")),
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HoldBody {
    reason: Option<String>,
    /// An RFC 3339 time; without it the hold lasts until it is resumed.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    dry_run: bool,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct KeysetList {
    keysets: Vec<KeysetView>,
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct ShowQuery {
    /// Also list retired and revoked keys.
    history: bool,
}

#[utoipa::path(get, path = "/v1/keysets", tag = "admin", params(ShowQuery), responses((status = 200, body = KeysetList)))]
pub(super) async fn list(
    State(state): State<AdminState>,
    query: Result<Query<ShowQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    let history = query.map_err(bad_query)?.history;
    let directory = state.engine.directory();
    let keysets = directory.order.iter().map(|cell| KeysetView::of(cell, &state.engine.look(cell), history)).collect();
    Ok(Json(KeysetList { keysets }).into_response())
}

#[utoipa::path(get, path = "/v1/keysets/{keyset}", tag = "admin", params(("keyset" = String, Path), ShowQuery),
    responses((status = 200, body = KeysetView), (status = 404, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn show(
    State(state): State<AdminState>,
    Path(keyset): Path<String>,
    query: Result<Query<ShowQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    let history = query.map_err(bad_query)?.history;
    let cell = state.cell(&keyset)?;
    let sight = state.engine.look(&cell);
    let etag = etag(sight.snapshot.keyring.generation);
    Ok(([(ETAG, etag)], Json(KeysetView::of(&cell, &sight, history))).into_response())
}

#[utoipa::path(post, path = "/v1/keysets/{keyset}/rotate", tag = "admin", params(("keyset" = String, Path)), request_body = Option<RotateBody>,
    responses((status = 200, body = Outcome), (status = 409, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn rotate(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<RotateBody>,
) -> Result<Response, Problem> {
    let confirm_algorithm = match &body.confirm_algorithm {
        None | Some(ConfirmBody::Any(false)) => None,
        Some(ConfirmBody::Any(true)) => Some(Confirmation::Any),
        Some(ConfirmBody::Alg(alg)) => Some(Confirmation::Alg(alg.clone())),
    };
    let intent = Intent::Rotate { allow_unpropagated: body.allow_unpropagated, confirm_algorithm };
    let call = Call { action: "rotate", actor, headers, body: fingerprint_of(&body) };
    state.answer(&keyset, intent, body.reason, body.dry_run, call).await
}

#[utoipa::path(post, path = "/v1/keysets/{keyset}/rollback", tag = "admin", params(("keyset" = String, Path)), request_body = Option<ActionBody>,
    responses((status = 200, body = Outcome), (status = 409, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn rollback(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "rollback", actor, headers, body: fingerprint_of(&body) };
    state.answer(&keyset, Intent::Rollback, body.reason, body.dry_run, call).await
}

#[utoipa::path(post, path = "/v1/keysets/{keyset}/compromise", tag = "admin", params(("keyset" = String, Path)), request_body = Option<ActionBody>,
    responses((status = 200, body = Outcome), (status = 409, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn compromise(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "compromise", actor, headers, body: fingerprint_of(&body) };
    state.answer(&keyset, Intent::Compromise, body.reason, body.dry_run, call).await
}

#[utoipa::path(post, path = "/v1/keysets/{keyset}/keys/{kid}/revoke", tag = "admin",
    params(("keyset" = String, Path), ("kid" = String, Path)), request_body = Option<ActionBody>,
    responses((status = 200, body = Outcome), (status = 404, body = ProblemBody, content_type = "application/problem+json"), (status = 409, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn revoke(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path((keyset, kid)): Path<(String, String)>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let cell = state.cell(&keyset)?;
    let serial = cell.snapshot.load().keyring.key_by_kid(&kid).map(|key| key.serial);
    let serial =
        serial.ok_or_else(|| problem_of_refusal(&Refusal::UnknownKey { key: kid.chars().take(80).collect() }))?;
    let call = Call { action: "revoke", actor, headers, body: fingerprint_of(&(kid, &body)) };
    state.answer(&keyset, Intent::Revoke { serial }, body.reason, body.dry_run, call).await
}

#[utoipa::path(post, path = "/v1/keysets/{keyset}/drain", tag = "admin", params(("keyset" = String, Path)), request_body = Option<ActionBody>,
    responses((status = 200, body = Outcome), (status = 409, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn drain(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "drain", actor, headers, body: fingerprint_of(&body) };
    state.answer(&keyset, Intent::Drain, body.reason, body.dry_run, call).await
}

#[utoipa::path(delete, path = "/v1/keysets/{keyset}/drain", tag = "admin", params(("keyset" = String, Path)), request_body = Option<ActionBody>,
    responses((status = 200, body = Outcome), (status = 409, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn undrain(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "undrain", actor, headers, body: fingerprint_of(&body) };
    state.answer(&keyset, Intent::Undrain, body.reason, body.dry_run, call).await
}

#[utoipa::path(put, path = "/v1/keysets/{keyset}/hold", tag = "admin", params(("keyset" = String, Path)), request_body = Option<HoldBody>,
    responses((status = 200, body = HoldView), (status = 422, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn hold(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<HoldBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "hold", actor: actor.clone(), headers, body: fingerprint_of(&body) };
    let cell = state.cell(&keyset)?;
    let (until, reason) = (body.until, body.reason.clone());
    let outcome = state.carry_out(&cell, Intent::Hold { until }, body.reason, body.dry_run, &call).await?;
    let hold = crate::keyring::record::Hold {
        reason: reason.unwrap_or_default(),
        until,
        actor: actor.name.to_string(),
        since: outcome.at,
    };
    Ok(([(ETAG, etag(outcome.generation))], Json(HoldView::of(&hold))).into_response())
}

#[utoipa::path(delete, path = "/v1/keysets/{keyset}/hold", tag = "admin", params(("keyset" = String, Path)), request_body = Option<ActionBody>,
    responses((status = 204), (status = 404, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn resume(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "resume", actor, headers, body: fingerprint_of(&body) };
    let cell = state.cell(&keyset)?;
    let outcome = state.carry_out(&cell, Intent::Resume, body.reason, body.dry_run, &call).await?;
    Ok((StatusCode::NO_CONTENT, [(ETAG, etag(outcome.generation))]).into_response())
}

/// The clock, and the generation of the installation's record, which `If-Match` of the calls that concern no single keyset
/// is held against.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ClockView {
    #[schema(value_type = String, format = DateTime)]
    now: Timestamp,
    /// Nothing that waits for time happens until it is right again or accepted.
    frozen: bool,
    generation: u64,
}

#[utoipa::path(get, path = "/v1/clock", tag = "admin", responses((status = 200, body = ClockView)))]
pub(super) async fn show_clock(State(state): State<AdminState>) -> Response {
    // Before the seal is open there is nothing that a change could be bound to.
    let generation = state.engine.ledger().map_or(0, |ledger| ledger.generation());
    let reading = state.engine.clock.read();
    let view = ClockView { now: reading.now, frozen: reading.frozen, generation };
    ([(ETAG, etag(generation))], Json(view)).into_response()
}

#[utoipa::path(post, path = "/v1/clock/accept", tag = "admin", request_body = Option<ActionBody>,
    responses((status = 200, body = ClockAnswer)))]
pub(super) async fn accept_clock(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    let call = Call { action: "clock-accept", actor, headers, body: fingerprint_of(&body) };
    let request = call.whole(body.reason, body.dry_run)?;
    let engine = state.engine.clone();
    // In a task of its own: a caller who goes away must not leave half of it done.
    let work = tokio::spawn(async move { engine.accept_clock(&request).await });
    let answer = work.await.map_err(|error| Problem::new(ProblemType::Internal).cause(&error))?;
    Ok(answer_of_whole(answer.map_err(|error| problem_of(&error))?))
}

/// What came of re-reading the configuration.
#[derive(Clone, Debug, Default, Serialize, utoipa::ToSchema)]
pub struct ReloadAnswer {
    pub action: &'static str,
    /// Of the installation's record, after the write.
    pub generation: u64,
    /// Whether anything changed.
    pub changed: bool,
    pub warnings: Vec<String>,
    /// Changes that take effect at the next start.
    pub restart_needed: Vec<String>,
}

#[utoipa::path(post, path = "/v1/reload", tag = "admin", request_body = Option<ActionBody>,
    responses((status = 200, body = ReloadAnswer), (status = 422, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn reload(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    OptionalJson(body): OptionalJson<ActionBody>,
) -> Result<Response, Problem> {
    if body.dry_run {
        let detail =
            "Nothing tells what a reload would do without doing it: `jwksd check` validates the configuration.";
        return Err(Problem::new(ProblemType::DryRunNotSupported).detail(detail));
    }
    let call = Call { action: "reload", actor, headers, body: fingerprint_of(&body) };
    let request = call.whole(body.reason, false)?;
    let work = tokio::spawn(async move {
        let complete = |answer: &ReloadAnswer, generation| {
            serde_json::to_value(ReloadAnswer { generation, ..answer.clone() }).unwrap_or_default()
        };
        state.engine.reload_as(&request, (state.reload)(), complete).await
    });
    let reloaded = work.await.map_err(|error| Problem::new(ProblemType::Internal).cause(&error))?;
    let reloaded = reloaded.map_err(|error| problem_of(&error))?;
    let answer = reloaded.map_err(|errors| {
        let detail = "The configuration on disk is invalid; what runs keeps running.";
        Problem::new(ProblemType::ConfigurationInvalid).detail(detail).member("errors", errors)
    })?;
    Ok(answer_of_whole(answer))
}

/// An answer as it was given first, with the generation that it names.
fn answer_of_whole(answer: Value) -> Response {
    let generation = answer["generation"].as_u64().unwrap_or_default();
    ([(ETAG, etag(generation))], Json(answer)).into_response()
}

#[utoipa::path(get, path = "/v1/audit", tag = "admin", params(AuditQuery), responses((status = 200, body = AuditPage)))]
pub(super) async fn audit(
    State(state): State<AdminState>,
    query: Result<Query<AuditQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    let page = super::audit::page(&state.engine, &query.map_err(bad_query)?.0)?;
    Ok(Json(page).into_response())
}

impl AdminState {
    /// Who sends a token wants to be known by it: a wrong one is a failed login, whatever the connection proves.
    async fn identify(
        &self,
        headers: &HeaderMap,
        certificate: Option<&ClientCertificate>,
        peer: &Peer,
    ) -> Result<(Name, Role), Unauthorized> {
        if !headers.contains_key(AUTHORIZATION)
            && let Some(stranger) = certificate
        {
            if let Some(client) = self.certificates.recognise(certificate) {
                return Ok((client.name.clone(), client.role));
            }
            self.certificates.complain(peer, stranger);
        }
        let token = self.tokens.authenticate(headers, Source::from(peer)).await?;
        Ok((token.name.clone(), token.role))
    }

    pub(super) fn cell(&self, keyset: &str) -> Result<Arc<KeysetCell>, Problem> {
        let shown: String = keyset.chars().take(63).collect();
        let detail = || format!("There is no keyset `{shown}`.");
        self.engine.keyset(keyset).ok_or_else(|| Problem::new(ProblemType::UnknownKeyset).detail(detail()))
    }

    async fn answer(
        &self,
        keyset: &str,
        intent: Intent,
        reason: Option<String>,
        dry_run: bool,
        call: Call,
    ) -> Result<Response, Problem> {
        let cell = self.cell(keyset)?;
        let outcome = self.carry_out(&cell, intent, reason, dry_run, &call).await?;
        Ok(([(ETAG, etag(outcome.generation))], Json(outcome)).into_response())
    }

    pub(super) async fn carry_out(
        &self,
        cell: &Arc<KeysetCell>,
        intent: Intent,
        reason: Option<String>,
        dry_run: bool,
        call: &Call,
    ) -> Result<Outcome, Problem> {
        let wish = call.wish(intent, reason, dry_run)?;
        self.engine.command(cell, wish).await.map_err(|error| problem_of(&error))
    }

    pub(super) async fn import(
        &self,
        cell: &Arc<KeysetCell>,
        intent: Intent,
        reason: Option<String>,
        dry_run: bool,
        call: &Call,
        material: PrivateKeyMaterial,
    ) -> Result<Outcome, Problem> {
        let wish = call.wish(intent, reason, dry_run)?;
        self.engine.import(cell, wish, material).await.map_err(|error| problem_of(&error))
    }

    pub(super) async fn find_remote(&self, cell: &KeysetCell, reference: &str) -> Result<RemoteFound, Problem> {
        self.engine.find_remote(cell, reference).await.map_err(|error| problem_of(&error))
    }

    pub(super) async fn adopt(
        &self,
        cell: &Arc<KeysetCell>,
        intent: Intent,
        reason: Option<String>,
        dry_run: bool,
        call: &Call,
        found: RemoteFound,
    ) -> Result<Outcome, Problem> {
        let wish = call.wish(intent, reason, dry_run)?;
        self.engine.adopt(cell, wish, found).await.map_err(|error| problem_of(&error))
    }
}

pub(super) fn bad_query(rejection: axum::extract::rejection::QueryRejection) -> Problem {
    Problem::new(ProblemType::MalformedRequest).detail(rejection.body_text())
}

pub(super) fn etag(generation: u64) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{generation}\"")).unwrap_or(HeaderValue::from_static("\"0\""))
}
