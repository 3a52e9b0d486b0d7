//! What the kubelet and Prometheus ask: `/livez`, `/readyz`, `/readyz/sign`, `/metrics`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::HeaderMap;
use http::header::{ACCEPT, CONTENT_TYPE};
use serde_json::json;

use super::problem::{Problem, ProblemType, method_not_allowed, not_found};
use crate::engine::Engine;

/// What the ops listener knows.
#[derive(Clone)]
pub struct OpsState {
    pub engine: Arc<Engine>,
    /// Set when the process begins to stop.
    pub stopping: Arc<AtomicBool>,
    /// What was missing when each of the two was asked for last.
    pub told: Arc<Mutex<BTreeMap<&'static str, Vec<String>>>>,
}

pub fn router(state: OpsState) -> Router {
    Router::new()
        .route("/livez", get(alive))
        .route("/readyz", get(ready_to_publish))
        .route("/readyz/sign", get(ready_to_sign))
        .route("/metrics", get(metrics))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(state)
}

/// Whether this process works: nothing beyond it counts, nor does any keyset.
async fn alive(State(state): State<OpsState>) -> Response {
    let missing = state.engine.ailments();
    if missing.is_empty() {
        return Json(json!({ "alive": true })).into_response();
    }
    Problem::new(ProblemType::NotReady).member("missing", missing).retry_after(1).into_response()
}

/// Whether this process can publish; does not depend on any backend.
async fn ready_to_publish(State(state): State<OpsState>) -> Response {
    let mut missing = state.missing();
    missing.extend(state.engine.missing_to_publish());
    state.answer("publish", missing)
}

async fn ready_to_sign(State(state): State<OpsState>) -> Response {
    let mut missing = state.missing();
    missing.extend(state.engine.missing_to_sign());
    state.answer("sign", missing)
}

impl OpsState {
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.stopping.load(Ordering::Relaxed) {
            missing.push("the process is stopping".to_owned());
        }
        if !self.engine.is_open() {
            missing.push("the listeners are not open yet".to_owned());
        }
        missing
    }

    /// Answers, and logs when the answer changes: a kubelet asks every few seconds.
    fn answer(&self, to: &'static str, missing: Vec<String>) -> Response {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = told.insert(to, missing.clone()).unwrap_or_default();
        drop(told);
        match (before == missing, missing.is_empty()) {
            (true, _) => {}
            (false, true) => tracing::info!("ready to {to} again"),
            (false, false) => tracing::warn!(missing = ?missing, "not ready to {to}"),
        }
        if missing.is_empty() {
            return Json(json!({ "ready": true })).into_response();
        }
        Problem::new(ProblemType::NotReady).member("missing", missing).retry_after(1).into_response()
    }
}

async fn metrics(State(state): State<OpsState>, headers: HeaderMap) -> Response {
    state.engine.refresh_all_metrics();
    let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
    let (content_type, text) = state.engine.metrics.render(accept);
    ([(CONTENT_TYPE, content_type)], text).into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::clock::SystemClock;
    use crate::engine::bare::bare_engine;

    #[tokio::test]
    async fn a_background_task_that_panicked_is_named_by_livez() {
        let engine = bare_engine(Arc::new(SystemClock)).await;
        let state = OpsState { engine: engine.clone(), stopping: Arc::default(), told: Arc::default() };
        assert_eq!(alive(State(state.clone())).await.status(), 200);
        let cancel = CancellationToken::new();
        let task = engine.supervisor.clone().keep("heartbeat", cancel.clone(), || async { panic!("a drill") });
        let kept = tokio::spawn(task);
        let named = async {
            while alive(State(state.clone())).await.status() != 503 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), named).await.unwrap();
        cancel.cancel();
        kept.await.unwrap();
    }
}
