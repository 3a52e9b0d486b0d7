//! A proxy between a daemon and LocalStack that sees each call, and can delay it, lose it, or answer in its place.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

use super::http_client;

/// What is done with a call.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It goes on after this long.
    Delay(Duration),
    /// The connection ends before the service sees the call.
    LoseRequest,
    /// The service carries it out, and the connection ends before its answer arrives.
    LoseAnswer,
    /// 400 ThrottlingException.
    Throttle,
    /// 400 AccessDeniedException.
    Deny,
    /// 500 KMSInternalException.
    Fail,
    /// 400 with this code.
    Refuse(&'static str),
    /// The service's answer with its signature changed in one byte.
    SpoilSignature,
    /// Nothing ever comes back, and the service never sees it.
    Hang,
    /// As [`Hang`](Fault::Hang), and [`KmsProxy::held`] resolves.
    HoldRequest,
    /// The service carries it out; then as [`HoldRequest`](Fault::HoldRequest).
    HoldAnswer,
}

/// A call that came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// `Sign`, `CreateKey`, …
    pub operation: String,
    /// The key or alias it names, if any.
    pub key: String,
    /// What was asked.
    pub body: Value,
    /// What came back from the service; `None`: it was not asked, or did not answer.
    pub status: Option<u16>,
}

struct Rule {
    /// `*`: any.
    operation: String,
    /// Calls that pass before it applies.
    skip: usize,
    /// Of those that follow, each `every`-th.
    every: usize,
    /// How often it applies; `usize::MAX`: always.
    times: usize,
    seen: usize,
    fault: Fault,
}

#[derive(Default)]
struct State {
    rules: Mutex<VecDeque<Rule>>,
    calls: Mutex<Vec<Call>>,
    held: Notify,
}

/// Runs until it is dropped.
pub struct KmsProxy {
    address: SocketAddr,
    state: Arc<State>,
    _stop: watch::Sender<()>,
}

impl KmsProxy {
    pub async fn before(target: &str) -> KmsProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let state = Arc::new(State::default());
        let (stop, stopped) = watch::channel(());
        tokio::spawn(serve(listener, state.clone(), target.to_owned(), stopped));
        KmsProxy { address, state, _stop: stop }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Every call of `operation` (`*`: of any) from now on.
    pub fn always(&self, operation: &str, fault: Fault) {
        self.rule(operation, 0, 1, usize::MAX, fault);
    }

    /// The `n`-th call of `operation` from now on, counted from 1.
    pub fn nth(&self, operation: &str, n: usize, fault: Fault) {
        self.rule(operation, n - 1, 1, 1, fault);
    }

    /// The next `times` calls of `operation`.
    pub fn next(&self, operation: &str, times: usize, fault: Fault) {
        self.rule(operation, 0, 1, times, fault);
    }

    /// Each `every`-th call of `operation`.
    pub fn each(&self, operation: &str, every: usize, fault: Fault) {
        self.rule(operation, every - 1, every, usize::MAX, fault);
    }

    fn rule(&self, operation: &str, skip: usize, every: usize, times: usize, fault: Fault) {
        let rule = Rule { operation: operation.to_owned(), skip, every, times, seen: 0, fault };
        lock(&self.state.rules).push_back(rule);
    }

    /// From now on all calls pass. What hangs goes on hanging.
    pub fn clear(&self) {
        lock(&self.state.rules).clear();
    }

    /// Waits until a call is held.
    pub async fn held(&self) {
        self.state.held.notified().await;
    }

    /// All calls so far, in the order of their arrival.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.state.calls).clone()
    }

    pub fn count(&self, operation: &str) -> usize {
        self.calls().iter().filter(|call| call.operation == operation).count()
    }

    pub fn forget_calls(&self) {
        lock(&self.state.calls).clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: TcpListener, state: Arc<State>, target: String, mut stop: watch::Receiver<()>) {
    let client = http_client().build().expect("a client without TLS set-up");
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { return };
                tokio::spawn(connection(stream, state.clone(), client.clone(), target.clone()));
            }
            // The sender is gone.
            _ = stop.changed() => return,
        }
    }
}

async fn connection(stream: TcpStream, state: Arc<State>, client: reqwest::Client, target: String) {
    let service = service_fn(move |request| call(request, state.clone(), client.clone(), target.clone()));
    // An error of the service ends the connection without an answer.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

#[derive(Debug, thiserror::Error)]
#[error("cut")]
struct Cut;

async fn call(
    request: Request<Incoming>,
    state: Arc<State>,
    client: reqwest::Client,
    target: String,
) -> Result<Response<Full<Bytes>>, Cut> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let named = parts.headers.get("x-amz-target").and_then(|value| value.to_str().ok()).unwrap_or_default();
    let operation = named.rsplit('.').next().unwrap_or_default().to_owned();
    let at = {
        let mut calls = lock(&state.calls);
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        calls.push(Call { operation: operation.clone(), key: key_in(&body), body, status: None });
        calls.len() - 1
    };
    let fault = state.fault_for(&operation);
    match &fault {
        Some(Fault::Delay(span)) => tokio::time::sleep(*span).await,
        Some(Fault::LoseRequest) => return Err(Cut),
        Some(Fault::Throttle) => return Ok(refusal(StatusCode::BAD_REQUEST, "ThrottlingException")),
        Some(Fault::Deny) => return Ok(refusal(StatusCode::BAD_REQUEST, "AccessDeniedException")),
        Some(Fault::Fail) => return Ok(refusal(StatusCode::INTERNAL_SERVER_ERROR, "KMSInternalException")),
        Some(Fault::Refuse(code)) => return Ok(refusal(StatusCode::BAD_REQUEST, code)),
        Some(Fault::Hang) => return Ok(never().await),
        Some(Fault::HoldRequest) => {
            state.held.notify_one();
            return Ok(never().await);
        }
        Some(Fault::LoseAnswer | Fault::HoldAnswer | Fault::SpoilSignature) | None => {}
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut headers = parts.headers;
    headers.remove(http::header::HOST);
    headers.remove(http::header::CONTENT_LENGTH);
    let forwarded = client.request(parts.method, format!("{target}{path}")).headers(headers).body(body);
    // In a task of its own: the service carries out what reached it, also when the caller is gone.
    let answer = tokio::spawn(async move {
        let answer = forwarded.send().await.map_err(|_| Cut)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        Ok::<_, Cut>((status, headers, answer.bytes().await.map_err(|_| Cut)?))
    });
    let (status, headers, body) = answer.await.map_err(|_| Cut)??;
    if let Some(call) = lock(&state.calls).get_mut(at) {
        call.status = Some(status.as_u16());
    }
    match fault {
        Some(Fault::LoseAnswer) => return Err(Cut),
        Some(Fault::HoldAnswer) => {
            state.held.notify_one();
            return Ok(never().await);
        }
        _ => {}
    }
    let body = if matches!(fault, Some(Fault::SpoilSignature)) { spoiled(&body) } else { body };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    for name in ["content-type", "x-amzn-requestid", "x-amzn-errortype"] {
        if let Some(value) = headers.get(name) {
            response.headers_mut().insert(http::HeaderName::from_static(name), value.clone());
        }
    }
    Ok(response)
}

impl State {
    fn fault_for(&self, operation: &str) -> Option<Fault> {
        let mut rules = lock(&self.rules);
        let mut found = None;
        for rule in rules.iter_mut().filter(|rule| rule.operation == "*" || rule.operation == operation) {
            rule.seen += 1;
            let due = rule.seen > rule.skip && (rule.seen - rule.skip - 1).is_multiple_of(rule.every);
            if due && rule.times > 0 && found.is_none() {
                rule.times -= usize::from(rule.times != usize::MAX);
                found = Some(rule.fault.clone());
            }
        }
        found
    }
}

fn key_in(body: &Value) -> String {
    let named = ["AliasName", "KeyId", "TargetKeyId"].iter().find_map(|name| body[name].as_str());
    named.unwrap_or_default().to_owned()
}

/// The last byte of a signature is part of a number in every algorithm.
fn spoiled(body: &Bytes) -> Bytes {
    let mut answer: Value = serde_json::from_slice(body).expect("the service answers with JSON");
    let mut signature = STANDARD.decode(answer["Signature"].as_str().expect("a signature")).expect("base64");
    *signature.last_mut().expect("it is not empty") ^= 1;
    answer["Signature"] = Value::String(STANDARD.encode(signature));
    Bytes::from(answer.to_string())
}

fn refusal(status: StatusCode, code: &str) -> Response<Full<Bytes>> {
    let body = serde_json::json!({ "__type": code, "message": "by the tests' proxy" }).to_string();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let json = http::HeaderValue::from_static("application/x-amz-json-1.1");
    response.headers_mut().insert(http::header::CONTENT_TYPE, json);
    response
}

async fn never() -> Response<Full<Bytes>> {
    let never: Infallible = std::future::pending().await;
    match never {}
}
