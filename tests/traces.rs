//! Traces, on the real binary with the feature `otel`: what a collector of the tests' own receives of signatures and
//! steps, that no token or claim is in it, and that a collector that is away is felt by nobody.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

mod support;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use http::StatusCode;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyValue;
use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind, status::StatusCode as SpanStatus};
use prost::Message;
use serde_json::json;
use tokio::time::Instant;

use support::api::Call;
use support::{Daemon, DaemonBuilder, PATIENCE, eventually};

const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
[keyset.default]
algorithm = "ES256"
[keyset.default.rotation]
propagation = "2s"
[keyset.default.tokens]
clock_skew = "500ms"
[keyset.pooled]
algorithm = "RS256"
[keyset.pooled.rotation]
propagation = "2s"
[keyset.pooled.tokens]
clock_skew = "500ms"
"#;

/// Planted where nothing may be repeated from.
const SECRETS: [&str; 4] = ["secret-in-a-claim", "secret-in-the-query", "secret-in-a-header", "secret-in-the-path"];

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const UNSAMPLED: &str = "5bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// An OTLP receiver (OTLP/HTTP, binary protobuf).
struct Receiver {
    endpoint: String,
    received: Arc<Mutex<Received>>,
}

#[derive(Default)]
struct Received {
    spans: Vec<Span>,
    service: Vec<String>,
    raw: Vec<Bytes>,
}

async fn take(State(received): State<Arc<Mutex<Received>>>, body: Bytes) -> (StatusCode, Vec<u8>) {
    let request = ExportTraceServiceRequest::decode(body.clone()).expect("what was sent is OTLP");
    let mut received = received.lock().unwrap();
    received.raw.push(body);
    for resource in request.resource_spans {
        let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
        let service = attributes.iter().find(|attribute| attribute.key == "service.name");
        received.service.extend(service.map(|attribute| format!("{:?}", attribute.value)));
        received.spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    (StatusCode::OK, ExportTraceServiceResponse::default().encode_to_vec())
}

impl Receiver {
    async fn start() -> Receiver {
        let received = Arc::<Mutex<Received>>::default();
        let router = Router::new().route("/v1/traces", post(take)).with_state(received.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Receiver { endpoint, received }
    }

    fn spans(&self) -> Vec<Span> {
        self.received.lock().unwrap().spans.clone()
    }

    async fn span(&self, what: &str, wanted: impl Fn(&Span) -> bool) -> Span {
        eventually(what, PATIENCE, async || self.spans().into_iter().find(&wanted)).await
    }
}

fn attribute(span: &Span, key: &str) -> Option<String> {
    let value = span.attributes.iter().find(|attribute| attribute.key == key)?.value.clone()?.value?;
    Some(match value {
        AnyValue::StringValue(text) => text,
        AnyValue::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

fn is(span: &Span, name: &str, attributes: &[(&str, &str)]) -> bool {
    span.name == name && attributes.iter().all(|(key, value)| attribute(span, key).as_deref() == Some(*value))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn traced(endpoint: &str, sample_ratio: &str) -> DaemonBuilder {
    let traces = format!("[telemetry.traces]\nendpoint = \"{endpoint}\"\nsample_ratio = {sample_ratio}\n");
    Daemon::builder().tables(&format!("{TABLES}{traces}")).env("OTEL_BSP_SCHEDULE_DELAY", "50")
}

fn sign(daemon: &Daemon, keyset: &str, traceparent: Option<&str>) -> Call {
    let body = json!({ "claims": { "sub": SECRETS[0], "aud": "a", "note": SECRETS[0] } });
    let path = format!("/v1/keysets/{keyset}/sign?q={}", SECRETS[1]);
    let call = Call::post(daemon, "signer", &path).json(&body).header("x-note", SECRETS[2]);
    let call = call.header("tracestate", &format!("vendor={}", SECRETS[2])).header("baggage", SECRETS[2]);
    traceparent.into_iter().fold(call, |call, parent| call.header("traceparent", parent))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_is_a_trace_that_continues_its_callers() {
    let receiver = Receiver::start().await;
    let daemon = traced(&receiver.endpoint, "1").signer_with_token().start().await;
    let client = std::fs::read_to_string(daemon.path("client.token")).unwrap();
    let mut tokens = vec![client.trim().to_owned()];
    for (keyset, alg) in [("default", "ES256"), ("pooled", "RS256")] {
        let parent = format!("00-{TRACE}-{CALLER}-01");
        let answer = sign(&daemon, keyset, Some(&parent)).bearer(client.trim()).expect(200).await;
        tokens.push(answer.json()["token"].as_str().unwrap().to_owned());
        let signed =
            [("jwksd.keyset", keyset), ("jwksd.alg", alg), ("jwksd.backend", "local"), ("jwksd.outcome", "issued")];
        let span = receiver.span("the span of the signature", |span| is(span, "sign", &signed)).await;
        assert_eq!(hex(&span.trace_id), TRACE);
        let request = receiver.span("its request", |request| request.span_id == span.parent_span_id).await;
        assert_eq!((request.kind(), hex(&request.parent_span_id).as_str()), (SpanKind::Server, CALLER));
        assert_eq!(request.name, "POST /v1/keysets/{keyset}/sign");
        let details = [("http.response.status_code", "200"), ("jwksd.listener", "signer"), ("jwksd.client", "app")];
        assert!(details.iter().all(|(key, value)| attribute(&request, key).as_deref() == Some(value)), "{request:?}");
        let call = [("jwksd.operation", "sign"), ("jwksd.outcome", "ok")];
        receiver
            .span("the backend's part", |part| part.parent_span_id == span.span_id && is(part, "backend", &call))
            .await;
    }
    // The caller's mistake is no failure of ours, and a caller that does not record is not recorded.
    let short = Call::post(&daemon, "signer", "/v1/keysets/default/sign").bearer(client.trim());
    short.json(&json!({ "claims": { "sub": SECRETS[0] } })).expect(422).await;
    let refused = receiver.span("the refusal", |span| is(span, "sign", &[("jwksd.outcome", "refused")])).await;
    assert_ne!(refused.status.map(|status| status.code()), Some(SpanStatus::Error));
    sign(&daemon, "default", Some(&format!("00-{UNSAMPLED}-{CALLER}-00"))).bearer(client.trim()).expect(200).await;
    // Nobody's path is repeated, and nobody on the public listener decides what is recorded.
    let lost = format!("/{}/{}", SECRETS[3], SECRETS[3]);
    Call::get(&daemon, "public", &lost).header("traceparent", &format!("00-{UNSAMPLED}-{CALLER}-01")).expect(404).await;
    let public = [("jwksd.listener", "public"), ("http.response.status_code", "404")];
    receiver.span("the stranger's request", |span| is(span, "GET", &public)).await;

    // Steps, with what they do to backend and store.
    let steps = [("jwksd.keyset", "default"), ("jwksd.step", "create")];
    let create = receiver.span("a step", |span| is(span, "reconcile", &steps)).await;
    let within = |span: &Span| span.trace_id == create.trace_id && span.parent_span_id == create.span_id;
    receiver.span("its key", |span| within(span) && is(span, "backend", &[("jwksd.operation", "create")])).await;
    let written = [("jwksd.operation", "replace"), ("jwksd.document", "keyring"), ("jwksd.store", "file")];
    receiver.span("its write", |span| within(span) && is(span, "store", &written)).await;

    let received = receiver.received.lock().unwrap();
    assert!(received.service.iter().all(|service| service.contains("jwksd")), "{:?}", received.service);
    assert!(received.spans.iter().all(|span| hex(&span.trace_id) != UNSAMPLED));
    assert!(received.spans.iter().all(|span| attribute(span, "jwksd.listener").as_deref() != Some("ops")));
    for raw in &received.raw {
        for secret in SECRETS.iter().copied().chain(tokens.iter().map(String::as_str)) {
            assert!(!raw.windows(secret.len()).any(|window| window == secret.as_bytes()), "{secret} was sent");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_share_that_is_wanted_is_recorded_and_callers_decide_for_theirs() {
    let receiver = Receiver::start().await;
    let daemon = traced(&receiver.endpoint, "0").start().await;
    for _ in 0..20 {
        sign(&daemon, "default", None).expect(200).await;
    }
    sign(&daemon, "default", Some(&format!("00-{TRACE}-{CALLER}-01"))).expect(200).await;
    receiver.span("the caller's", |span| span.name == "sign").await;
    assert!(receiver.spans().iter().all(|span| hex(&span.trace_id) == TRACE));
}

/// One endpoint that nobody listens at, and one that takes everything and never answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_is_felt_by_nobody() {
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = support::ports::ReservedPort::any();
    for port in [closed.number(), mute.local_addr().unwrap().port()] {
        let builder =
            traced(&format!("http://127.0.0.1:{port}/secret-in-the-url"), "1").env("OTEL_BSP_MAX_QUEUE_SIZE", "16");
        let mut daemon = builder.env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8").start().await;
        let begun = Instant::now();
        for _ in 0..200 {
            daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "a" } })).await;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "200 signatures took {:?}", begun.elapsed());
        if port == closed.number() {
            daemon.log_line("the collector", |line| line.message().contains("takes no traces")).await;
            let told = daemon.logs().iter().filter(|line| line.contains("takes no traces")).count();
            assert_eq!(told, 1, "once, not at each attempt");
        }
        assert!(!daemon.logs().iter().any(|line| line.contains("secret-in-the-url")), "URLs may have credentials");
        let begun = Instant::now();
        assert!(daemon.sigterm().await.success());
        assert!(begun.elapsed() < Duration::from_secs(8), "the end took {:?}", begun.elapsed());
    }
}

#[test]
fn the_table_of_the_reference_loads_in_this_build() {
    let text = std::fs::read_to_string(support::tools::repository("config/reference.toml")).unwrap();
    let table = text.split_once("# [telemetry.traces]").expect("it is shown").1;
    let keys = table.lines().skip(1).map_while(|line| line.strip_prefix("# ")).filter(|line| line.contains(" = "));
    let text = format!("{text}\n[telemetry.traces]\n{}\n", keys.collect::<Vec<_>>().join("\n"));
    let source = jwksd::config::Source::Text { name: "reference".into(), text, format: jwksd::config::Format::Toml };
    let environment = ["DASHBOARD_TOKEN", "GRAFANA_TOKEN"].map(|name| (name.to_owned(), "t".repeat(43)));
    let traces = jwksd::config::load(&source, environment.into_iter()).unwrap().config.telemetry.traces.unwrap();
    assert_eq!((traces.endpoint.as_deref(), traces.sample_ratio.as_f64()), (Some("http://localhost:4318"), 1.0));
}
