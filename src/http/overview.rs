//! What operators look at besides the keysets themselves: keys over time, the replicas, and who they are here.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};

use super::admin::{Actor, AdminState, bad_query};
use super::openapi::ProblemBody;
use super::problem::{Problem, ProblemType};
use crate::engine::KeysetCell;
use crate::keyring::name::Name;
use crate::keyring::record::{Key, Serial};
use crate::keyring::time::{Span, Timestamp};
use crate::keyring::timeline::{AHEAD_MAX, Timeline, Window};
use crate::store::shared::Report;

/// Replicas are listed for so long after their last report, so that one that died is seen to be missing.
const KNOWN_FOR: Span = Span::HOUR;

/// Generations that an answer tells at most, over all replicas and keysets; beyond that only of those that lack something.
const GENERATIONS_MAX: usize = 20_000;

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields, default)]
#[into_params(parameter_in = Query)]
pub struct TimelineQuery {
    /// How far back, such as `30d` [default: the longest time between two rotations]
    past: Option<String>,
    /// How far ahead, at most ten years [default: two rotations]
    ahead: Option<String>,
}

impl TimelineQuery {
    /// The window asked for, which may leave either side to the policy.
    fn sides(&self) -> Result<(Option<Span>, Option<Span>), Problem> {
        let span = |name: &str, text: &Option<String>| {
            let Some(text) = text else { return Ok(None) };
            let span = Span::parse(text).ok().filter(|span| *span <= AHEAD_MAX);
            let detail = || format!("{name} must be a duration such as 30d, of at most ten years.");
            span.map(Some).ok_or_else(|| Problem::new(ProblemType::ValueNotAllowed).detail(detail()))
        };
        Ok((span("past", &self.past)?, span("ahead", &self.ahead)?))
    }
}

#[utoipa::path(get, path = "/v1/keysets/{keyset}/timeline", tag = "admin", params(("keyset" = String, Path), TimelineQuery),
    responses((status = 200, body = Timeline), (status = 404, body = ProblemBody, content_type = "application/problem+json"),
        (status = 422, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn timeline(
    State(state): State<AdminState>,
    Path(keyset): Path<String>,
    query: Result<Query<TimelineQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let (past, ahead) = query.map_err(bad_query)?.sides()?;
    let cell = state.cell(&keyset)?;
    let timeline = state.engine.timeline(&cell, |policy| {
        let usual = Window::of(policy);
        Window { past: past.unwrap_or(usual.past), ahead: ahead.unwrap_or(usual.ahead) }
    });
    Ok(Json(timeline).into_response())
}

/// Who asks, and what that allows.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct WhoamiView {
    /// As in the audit log.
    name: String,
    /// `viewer` (reads) or `operator` (changes).
    role: &'static str,
    /// Of this process: `all`, `manager`, or `signer`, which changes nothing.
    replica_role: &'static str,
    version: &'static str,
}

#[utoipa::path(get, path = "/v1/whoami", tag = "admin", responses((status = 200, body = WhoamiView)))]
pub(super) async fn whoami(State(state): State<AdminState>, Extension(actor): Extension<Actor>) -> Response {
    let role = actor.role.as_str();
    let replica_role = state.engine.role().as_str();
    let view = WhoamiView { name: actor.name.to_string(), role, replica_role, version: env!("CARGO_PKG_VERSION") };
    Json(view).into_response()
}

/// The replicas of a store; of a file store this process alone, and the signers that read from it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ReplicaList {
    /// False where there may be others: who reads from managers is not told of them.
    complete: bool,
    /// A replica that publishes and reported within this time is waited for before a key signs.
    waited_for_seconds: i64,
    /// This process first, the others in order of name.
    replicas: Vec<ReplicaView>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ReplicaView {
    /// Of the process: another one after a restart.
    name: String,
    /// Whether this is the process that answers.
    own: bool,
    /// `all`, `manager` or `signer`.
    role: String,
    version: String,
    /// Its public listener is open: its verifiers see what it has taken up and nothing else.
    publishes: bool,
    /// It reported recently enough to be waited for.
    live: bool,
    /// It stopped in good order: since it was last seen it serves and signs nothing.
    stopped: bool,
    #[schema(value_type = String, format = DateTime)]
    last_seen_at: Timestamp,
    /// What it shows of each keyset; where replicas and keysets are very many, only of those in which it lacks something.
    keysets: Vec<ShownView>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ShownView {
    keyset: String,
    /// Absent where it does not show the keyset at all.
    generation: Option<u64>,
    /// Published keys that it does not show yet.
    lacks: Vec<LackedKey>,
}

#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct LackedKey {
    serial: Serial,
    kid: String,
}

#[utoipa::path(get, path = "/v1/replicas", tag = "admin",
    responses((status = 200, body = ReplicaList), (status = 503, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn replicas(State(state): State<AdminState>) -> Result<Response, Problem> {
    let known = state.engine.replicas(KNOWN_FOR).await;
    let known = known.map_err(|error| Problem::new(ProblemType::StoreUnavailable).cause(&error).retry_after(1))?;
    let (now, directory) = (state.engine.clock.now(), state.engine.directory());
    let everything = (known.others.len() + 1) * directory.order.len() <= GENERATIONS_MAX;
    let seen = |report: &Report, age: Span, own: bool| ReplicaView {
        name: report.replica.clone(),
        own,
        role: report.role.clone(),
        version: report.version.clone(),
        publishes: report.publishes,
        live: age <= known.waited_for,
        stopped: report.stopped,
        last_seen_at: now - age,
        keysets: shown(&directory.order, &report.generations, everything),
    };
    let own = seen(&known.own, Span::ZERO, true);
    let others = known.others.iter().map(|other| seen(&other.report, other.age, false));
    let replicas = std::iter::once(own).chain(others).collect();
    let list = ReplicaList { complete: known.complete, waited_for_seconds: known.waited_for.as_secs(), replicas };
    Ok(Json(list).into_response())
}

fn shown(cells: &[Arc<KeysetCell>], generations: &BTreeMap<Name, u64>, everything: bool) -> Vec<ShownView> {
    let view = |cell: &Arc<KeysetCell>| {
        let generation = generations.get(&cell.name).copied();
        let keyring = &cell.snapshot.load().keyring;
        let lacked = |key: &&Key| generation.is_none_or(|generation| generation < key.since_generation);
        let named = |key: &Key| LackedKey { serial: key.serial, kid: key.kid.to_string() };
        let lacks: Vec<_> = keyring.published().filter(lacked).map(named).collect();
        (everything || !lacks.is_empty()).then(|| ShownView { keyset: cell.name.to_string(), generation, lacks })
    };
    cells.iter().filter_map(view).collect()
}
