//! The HTTP foundation over real sockets: what a client can do to a listener, and what it must not be able to do.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails; clippy.toml exempts only test functions")]

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::Extensions;
use axum::routing::{get, post};
use axum::{Extension, Router};
use jwksd::clock::{Clock, SystemClock};
use jwksd::http::certificate::ClientCertificate;
use jwksd::http::json::{JsonBody, OptionalJson};
use jwksd::http::listener::{
    BindError, BoundListener, Drained, ListenAddress, ListenerOptions, Peer, raise_open_file_limit,
};
use jwksd::http::middleware::{HostPolicy, RequestId, guard_host};
use jwksd::http::problem::{PROBLEM_JSON, ProblemType};
use jwksd::http::tls::{ClientCertificates, Tls, TlsFiles};
use jwksd::keyring::time::Timestamp;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Longer than anything here should take, shorter than a person waits.
const PATIENCE: Duration = Duration::from_secs(20);

struct Running {
    address: ListenAddress,
    shutdown: CancellationToken,
    served: JoinHandle<Drained>,
}

impl Running {
    fn tcp(&self) -> SocketAddr {
        match self.address {
            ListenAddress::Tcp(address) => address,
            ListenAddress::Unix { .. } => panic!("not TCP"),
        }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.tcp())
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.tcp()).await.unwrap()
    }

    async fn stop(self) -> Drained {
        self.shutdown.cancel();
        timeout(PATIENCE, self.served).await.expect("the listener does not stop").unwrap()
    }
}

fn port_zero() -> ListenAddress {
    ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())
}

fn options() -> ListenerOptions {
    ListenerOptions::new("test")
}

fn start(router: Router, options: ListenerOptions) -> Running {
    start_at(&port_zero(), router, options)
}

fn start_at(address: &ListenAddress, router: Router, options: ListenerOptions) -> Running {
    let bound = BoundListener::bind(address).unwrap();
    let address = bound.local_addr().clone();
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(bound.serve(router, options, shutdown.clone()));
    Running { address, shutdown, served }
}

/// `GET /` answers, `POST /json` wants an object, `POST /optional` may have one, `POST /unread` ignores its body.
fn router() -> Router {
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/id", get(|id: Extension<RequestId>| async move { id.as_str().to_owned() }))
        .route("/version", get(|version: axum::http::Version| async move { format!("{version:?}") }))
        .route("/json", post(|JsonBody(value): JsonBody<Value>| async move { value.to_string() }))
        .route("/optional", post(|OptionalJson(value): OptionalJson<Value>| async move { value.to_string() }))
        .route("/unread", post(|| async { "ignored" }))
        .route("/number/{n}", get(|n: axum::extract::Path<u32>| async move { n.to_string() }))
        .route("/panic", get(|| async { panic!("a handler's panic, on purpose") as &str }))
}

#[tokio::test]
async fn a_request_of_http_1_1_without_exactly_one_host_is_refused() {
    let server = start(router(), options());
    for (head, status) in [
        ("GET / HTTP/1.1\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a\r\n", "200"),
        ("GET / HTTP/1.0\r\n", "200"),
    ] {
        let mut stream = server.connect().await;
        send(&mut stream, &format!("{head}connection: close\r\n\r\n")).await;
        let answer = rest(&mut stream).await;
        assert!(answer.split(' ').nth(1) == Some(status), "{head:?}: {answer}");
        assert_eq!(answer.contains("urn:jwksd:problem:malformed-request"), status == "400", "{answer}");
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

/// Everything until the server closes.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    match timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server does not close") {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    String::from_utf8(bytes).unwrap()
}

/// One answer with a Content-Length: head and body.
async fn answer(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut text = String::new();
    let mut byte = [0];
    let mut body = usize::MAX;
    while body > 0 {
        timeout(PATIENCE, stream.read_exact(&mut byte)).await.expect("no answer").unwrap();
        text.push(byte[0] as char);
        body = body.wrapping_sub(1);
        if text.ends_with("\r\n\r\n") && body > usize::MAX / 2 {
            let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
            body = length.map_or(0, |length| length.parse().unwrap());
        }
    }
    text
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    match timeout(Duration::ZERO, stream.read(&mut byte)).await {
        Err(_) => false,
        Ok(read) => read.map_or(true, |n| n == 0),
    }
}

/// Waits until the server has closed `count` of `streams`, and says which.
async fn closed(streams: &mut [TcpStream], count: usize) -> Vec<usize> {
    let watch = async {
        loop {
            let mut found = Vec::new();
            for (index, stream) in streams.iter_mut().enumerate() {
                if is_closed(stream).await {
                    found.push(index);
                }
            }
            if found.len() >= count {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, watch).await.expect("too few connections were closed")
}

fn problem(answer: &str) -> Value {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(PROBLEM_JSON), "{answer}");
    serde_json::from_str(body).unwrap()
}

fn urn(kind: ProblemType) -> String {
    format!("urn:jwksd:problem:{}", kind.slug())
}

async fn refused(response: reqwest::Response, kind: ProblemType) -> Value {
    assert_eq!(response.status(), kind.status());
    assert_eq!(response.headers()["content-type"], PROBLEM_JSON);
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["type"], urn(kind));
    assert_eq!(body["status"], kind.status().as_u16());
    assert_eq!(body["request_id"], id);
    body
}

#[tokio::test]
async fn a_slow_head_is_dropped_however_it_drips() {
    let server = start(router(), ListenerOptions { head_timeout: Duration::from_millis(300), ..options() });
    let mut silent = server.connect().await;
    let mut dripping = server.connect().await;
    let mut second = server.connect().await;
    send(&mut second, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    assert!(answer(&mut second).await.ends_with("hello"));
    send(&mut second, "GET / HT").await;
    let begun = tokio::time::Instant::now();
    let drip = async {
        let (mut read, mut write) = dripping.split();
        let dripping = async {
            while write.write_all(b"G").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! { text = rest(&mut read) => text, () = dripping => String::new() }
    };
    let (silent, _, second) = tokio::join!(rest(&mut silent), drip, rest(&mut second));
    assert_eq!((silent.as_str(), second.as_str()), ("", ""));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_idle_connection_outlives_the_time_for_heads_and_not_its_own() {
    let server = start(
        router(),
        ListenerOptions {
            head_timeout: Duration::from_millis(200),
            idle_timeout: Duration::from_millis(1500),
            ..options()
        },
    );
    let mut stream = server.connect().await;
    let begun = tokio::time::Instant::now();
    send(&mut stream, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    answer(&mut stream).await;
    assert_eq!(rest(&mut stream).await, "");
    assert!(begun.elapsed() >= Duration::from_millis(1500), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_slow_head_of_http2_is_dropped() {
    let server = start(router(), ListenerOptions { head_timeout: Duration::from_millis(300), ..options() });
    let mut stream = server.connect().await;
    // Preface, empty SETTINGS, a whole request (`:method GET`, `:scheme http`, `:path /`), then HEADERS without END_HEADERS.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    stream.write_all(b"\0\0\x03\x01\x05\0\0\0\x01\x82\x86\x84").await.unwrap();
    stream.write_all(b"\0\0\x03\x01\x01\0\0\0\x03\x82\x86\x84").await.unwrap();
    let mut bytes = Vec::new();
    let begun = tokio::time::Instant::now();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server does not close");
    assert!(bytes.windows(5).any(|window| window == b"hello"), "the whole request was not answered");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn fifteen_hundred_idle_connections_do_not_hurt_the_next_request() {
    let limit = raise_open_file_limit();
    assert!(limit.is_none_or(|limit| limit >= 4096), "this test needs 4,096 open files, the hard limit is {limit:?}");
    let server = start(router(), options());
    let mut idle = Vec::new();
    for _ in 0..1500 {
        idle.push(server.connect().await);
    }
    let begun = tokio::time::Instant::now();
    assert_eq!(reqwest::get(server.url("/")).await.unwrap().text().await.unwrap(), "hello");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let surplus = 1500 + 1 - options().max_connections;
    let closed = closed(&mut idle, surplus).await;
    assert_eq!(closed, (0..surplus).collect::<Vec<_>>(), "not the oldest were closed");
    assert!(1500 - closed.len() >= 1024 - 1);
}

#[tokio::test]
async fn surplus_connections_spare_those_inside_a_request() {
    let release = Arc::new(Semaphore::new(0));
    let begun = Arc::new(Notify::new());
    let wait = get(async |State((begun, release)): State<(Arc<Notify>, Arc<Semaphore>)>| {
        begun.notify_one();
        release.acquire().await.unwrap().forget();
        "waited"
    });
    let router = router().merge(Router::new().route("/wait", wait).with_state((begun.clone(), release.clone())));
    let server = start(router, ListenerOptions { max_connections: 4, ..options() });
    let mut busy = server.connect().await;
    send(&mut busy, "GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    begun.notified().await;
    let mut others = Vec::new();
    for _ in 0..8 {
        let mut other = server.connect().await;
        send(&mut other, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        assert!(answer(&mut other).await.ends_with("hello"));
        others.push(other);
    }
    assert_eq!(closed(&mut others, 5).await, [0, 1, 2, 3, 4]);
    release.add_permits(1);
    assert!(answer(&mut busy).await.ends_with("waited"));
}

#[tokio::test]
async fn connections_whose_body_never_comes_make_room_too() {
    let server = start(router(), ListenerOptions { max_connections: 4, ..options() });
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let mut stream = server.connect().await;
        send(
            &mut stream,
            "POST /json HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{",
        )
        .await;
        stalled.push(stream);
    }
    assert_eq!(reqwest::get(server.url("/")).await.unwrap().status(), 200);
    assert_eq!(closed(&mut stalled, 5).await.len(), 5);
}

#[tokio::test]
async fn a_head_too_large_is_431() {
    let server = start(router(), options());
    let filler = |size: usize| format!("GET / HTTP/1.1\r\nhost: localhost\r\nx-filler: {}\r\n\r\n", "x".repeat(size));
    let mut stream = server.connect().await;
    send(&mut stream, &filler(31 * 1024)).await;
    assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200 "));
    let mut stream = server.connect().await;
    send(&mut stream, &filler(200 * 1024)).await;
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(problem(&answer)["type"], urn(ProblemType::HeadTooLarge));
}

#[tokio::test]
async fn what_is_not_http_is_a_problem() {
    let server = start(router(), options());
    for bad in ["nonsense\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET / HTTP/1.1\r\nbad header\r\n\r\n"] {
        let mut stream = server.connect().await;
        send(&mut stream, bad).await;
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bad}: {answer}");
        assert_eq!(problem(&answer)["type"], urn(ProblemType::MalformedRequest));
    }
}

#[tokio::test]
async fn a_body_too_large_is_413_whether_its_length_is_told_or_not() {
    let server = start(router(), options());
    let client = reqwest::Client::new();
    let largest = format!("{{\"x\":\"{}\"}}", "x".repeat(64 * 1024 - 8));
    assert_eq!(largest.len(), 64 * 1024);
    let post = |path: &str, body: reqwest::Body| {
        client.post(server.url(path)).header("content-type", "application/json").body(body).send()
    };
    assert_eq!(post("/json", largest.clone().into()).await.unwrap().status(), 200);
    for path in ["/json", "/optional", "/unread"] {
        let response = post(path, format!("{largest} ").into()).await.unwrap();
        refused(response, ProblemType::BodyTooLarge).await;
    }
    refused(post("/json", vec![b'x'; 3_000_000].into()).await.unwrap(), ProblemType::BodyTooLarge).await;
    let mut stream = server.connect().await;
    let head = "POST /json HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    send(&mut stream, head).await;
    send(&mut stream, &format!("ffff\r\n{}\r\nff\r\n{}\r\n0\r\n\r\n", "1".repeat(0xffff), "1".repeat(0xff))).await;
    let answer = rest(&mut stream).await;
    assert_eq!(problem(&answer)["type"], urn(ProblemType::BodyTooLarge));
}

#[tokio::test]
async fn a_body_too_slow_is_408() {
    let server = start(router(), ListenerOptions { body_timeout: Duration::from_millis(100), ..options() });
    let mut stream = server.connect().await;
    send(
        &mut stream,
        "POST /json HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
    )
    .await;
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert_eq!(problem(&answer)["type"], urn(ProblemType::BodyTimeout));
}

#[tokio::test]
async fn errors_of_routing_and_extractors_are_problems() {
    let server = start(router(), options());
    let client = reqwest::Client::new();
    refused(client.get(server.url("/nowhere")).send().await.unwrap(), ProblemType::NotFound).await;
    let response = client.delete(server.url("/")).send().await.unwrap();
    assert_eq!(response.headers()["allow"], "GET,HEAD");
    refused(response, ProblemType::MethodNotAllowed).await;
    refused(client.get(server.url("/number/x")).send().await.unwrap(), ProblemType::MalformedRequest).await;
    refused(client.get(server.url("/number/%ff")).send().await.unwrap(), ProblemType::MalformedRequest).await;
    let response = client.post(server.url("/json")).body("{}").send().await.unwrap();
    refused(response, ProblemType::UnsupportedMediaType).await;
    let response = client.post(server.url("/optional")).send().await.unwrap();
    assert_eq!(response.text().await.unwrap(), "null");
}

#[tokio::test]
async fn a_panic_is_500_and_the_connection_lives() {
    let server = start(router(), options());
    let client = reqwest::Client::new();
    let body = refused(client.get(server.url("/panic")).send().await.unwrap(), ProblemType::Internal).await;
    assert!(!body.to_string().contains("on purpose"));
    assert_eq!(client.get(server.url("/")).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_sane_request_id_is_kept_and_another_replaced() {
    let server = start(router(), options());
    let client = reqwest::Client::new();
    let ask = async |id: &str| {
        let response = client.get(server.url("/id")).header("x-request-id", id).send().await.unwrap();
        let echoed = response.headers()["x-request-id"].to_str().unwrap().to_owned();
        assert_eq!(response.text().await.unwrap(), echoed);
        echoed
    };
    let longest = "a".repeat(64);
    for sane in ["a", "Trace_1.2-3", &longest] {
        assert_eq!(ask(sane).await, sane);
    }
    let too_long = "a".repeat(65);
    let mut made = Vec::new();
    for bad in ["", "a b", "a\"b", "<script>", &too_long] {
        made.push(ask(bad).await);
        assert_ne!(made.last().unwrap(), bad);
    }
    made.sort();
    made.dedup();
    assert_eq!(made.len(), 5, "request ids repeat: {made:?}");
}

#[tokio::test]
async fn both_versions_of_http_are_spoken_in_clear() {
    let server = start(router(), options());
    let http1 = reqwest::Client::builder().http1_only().build().unwrap();
    let http2 = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    for (client, version) in [(http1, "HTTP/1.1"), (http2, "HTTP/2.0")] {
        let response = client.get(server.url("/version")).send().await.unwrap();
        assert_eq!(response.text().await.unwrap(), version);
    }
}

/// A CA, and certificates it signs.
struct Ca {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Ca { issuer: rcgen::Issuer::new(params, key), pem }
    }

    /// Certificate and key in PEM.
    fn sign(&self, name: &str) -> (String, String) {
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    fn client(&self) -> reqwest::ClientBuilder {
        let root = reqwest::Certificate::from_pem(self.pem.as_bytes()).unwrap();
        reqwest::Client::builder().tls_certs_only([root]).pool_max_idle_per_host(0)
    }
}

fn tls_files(folder: &Path, ca: &Ca, clients: ClientCertificates) -> TlsFiles {
    let (cert_file, key_file) = (folder.join("tls.crt"), folder.join("tls.key"));
    let (cert, key) = ca.sign("localhost");
    std::fs::write(&cert_file, cert).unwrap();
    std::fs::write(&key_file, key).unwrap();
    TlsFiles { cert_file, key_file, clients }
}

#[tokio::test]
async fn tls_speaks_both_versions_and_takes_new_certificates_while_running() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Ca::new(), Ca::new());
    let tls = Tls::load(&tls_files(folder.path(), &old, ClientCertificates::None)).unwrap();
    let server = start(router(), ListenerOptions { tls: Some(tls.clone()), ..options() });
    let url = format!("https://localhost:{}/version", server.tcp().port());
    let ask = async |client: reqwest::ClientBuilder| client.build().unwrap().get(&url).send().await?.text().await;
    assert_eq!(ask(old.client()).await.unwrap(), "HTTP/2.0");
    assert_eq!(ask(old.client().http1_only()).await.unwrap(), "HTTP/1.1");
    assert!(ask(new.client()).await.is_err());
    let renewed = tls_files(folder.path(), &new, ClientCertificates::None);
    assert!(tls.replace(Tls::prepare(&renewed).unwrap()));
    assert_eq!(ask(new.client()).await.unwrap(), "HTTP/2.0");
    let mut plain = server.connect().await;
    send(&mut plain, "GET / HTTP/1.1\r\n\r\n").await;
    assert!(!rest(&mut plain).await.contains("hello"));
}

#[tokio::test]
async fn a_handshake_that_stops_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let tls = Tls::load(&tls_files(folder.path(), &Ca::new(), ClientCertificates::None)).unwrap();
    let head_timeout = Duration::from_millis(200);
    let server = start(router(), ListenerOptions { tls: Some(tls), head_timeout, ..options() });
    let mut stream = server.connect().await;
    stream.write_all(&[0x16, 3, 1, 2]).await.unwrap();
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server does not close");
}

#[tokio::test]
async fn a_client_certificate_tells_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::new();
    let ca_file = folder.path().join("ca.crt");
    std::fs::write(&ca_file, &ca.pem).unwrap();
    let who = get(|extensions: Extensions| async move {
        let shown = extensions.get::<ClientCertificate>();
        // It may expire on an open connection.
        let now_and_later = |shown: &ClientCertificate| {
            format!("{:?} {:?}", shown.names(SystemClock.wall()), shown.names(Timestamp::MAX))
        };
        shown.map_or("nobody".to_owned(), now_and_later)
    });
    let ask = async |clients: ClientCertificates, shown: Option<&Ca>| {
        let tls = Tls::load(&tls_files(folder.path(), &ca, clients)).unwrap();
        let server = start(Router::new().route("/", who.clone()), ListenerOptions { tls: Some(tls), ..options() });
        let mut client = ca.client();
        if let Some(issuer) = shown {
            let (cert, key) = issuer.sign("orders.internal");
            client = client.identity(reqwest::Identity::from_pem(format!("{key}{cert}").as_bytes()).unwrap());
        }
        let url = format!("https://localhost:{}/", server.tcp().port());
        client.build().unwrap().get(url).send().await?.text().await
    };
    let (optional, required) = (ClientCertificates::Optional(ca_file.clone()), ClientCertificates::Required(ca_file));
    let known = "Some([Dns(\"orders.internal\")]) None";
    assert_eq!(ask(optional.clone(), Some(&ca)).await.unwrap(), known);
    assert_eq!(ask(required.clone(), Some(&ca)).await.unwrap(), known);
    assert_eq!(ask(optional.clone(), None).await.unwrap(), "nobody");
    assert!(ask(required, None).await.is_err());
    assert!(ask(optional, Some(&Ca::new())).await.is_err());
}

fn unix_address(path: PathBuf) -> ListenAddress {
    ListenAddress::Unix { path, mode: 0o620 }
}

#[tokio::test]
async fn a_unix_socket_has_its_mode_knows_its_peer_and_goes_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("signer.sock");
    let who = get(|peer: Extension<Peer>| async move { format!("{:?}", *peer) });
    let server = start_at(&unix_address(path.clone()), Router::new().route("/", who), options());
    let found = std::fs::metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o620);
    let mut stream = UnixStream::connect(&path).await.unwrap();
    send(&mut stream, "GET / HTTP/1.1\r\n\r\n").await;
    let answer = answer(&mut stream).await;
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let peer = Peer::Unix { uid, gid, pid: Some(std::process::id() as i32) };
    assert!(answer.ends_with(&format!("{peer:?}")), "{answer}");
    server.stop().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_nothing_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("signer.sock");
    let address = unix_address(path.clone());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let live = BoundListener::bind(&address).unwrap();
    assert!(matches!(BoundListener::bind(&address), Err(BindError::InUse { .. })));
    assert!(path.exists(), "the refused one removed the socket of the other");
    drop(live);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(BoundListener::bind(&address), Err(BindError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let nowhere = unix_address(folder.path().join("missing/signer.sock"));
    assert!(matches!(BoundListener::bind(&nowhere), Err(BindError::NoFolder { .. })));
    let too_long = unix_address(folder.path().join("x".repeat(120)));
    assert!(matches!(BoundListener::bind(&too_long), Err(BindError::Unix { .. })));
}

#[tokio::test]
async fn a_socket_that_another_put_in_our_place_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("signer.sock");
    let bound = BoundListener::bind(&unix_address(path.clone())).unwrap();
    std::fs::rename(&path, folder.path().join("moved.sock")).unwrap();
    let _successor = std::os::unix::net::UnixListener::bind(&path).unwrap();
    drop(bound);
    assert!(path.exists());
}

#[tokio::test]
async fn an_address_in_use_is_refused() {
    let bound = BoundListener::bind(&port_zero()).unwrap();
    assert!(matches!(BoundListener::bind(bound.local_addr()), Err(BindError::Tcp { .. })));
}

#[tokio::test]
async fn requests_wait_for_a_listener_that_is_bound_and_not_yet_served() {
    let bound = BoundListener::bind(&port_zero()).unwrap();
    let ListenAddress::Tcp(address) = *bound.local_addr() else { panic!("not TCP") };
    let mut early = TcpStream::connect(address).await.unwrap();
    send(&mut early, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    tokio::spawn(bound.serve(router(), options(), CancellationToken::new()));
    assert!(answer(&mut early).await.ends_with("hello"));
}

/// Clients that send one request after another until the connection is closed politely.
async fn shutdown_under_load(version: &str) {
    let brief = get(|| async {
        tokio::time::sleep(Duration::from_millis(3)).await;
        "hello"
    });
    let server = start(Router::new().route("/", brief), options());
    let answered = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let (url, shutdown, answered) = (server.url("/"), server.shutdown.clone(), answered.clone());
            let client = match version {
                "h2" => reqwest::Client::builder().http2_prior_knowledge(),
                _ => reqwest::Client::builder().http1_only(),
            };
            let client = client.build().unwrap();
            tokio::spawn(async move {
                while !shutdown.is_cancelled() {
                    let response = client.get(&url).send().await.expect("a request was lost");
                    assert_eq!(response.text().await.expect("an answer was cut off"), "hello");
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    while answered.load(Ordering::Relaxed) < 200 {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.stop().await, Drained { cut: 0 });
    for client in clients {
        client.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_under_load_answers_every_request_of_http1() {
    shutdown_under_load("h1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_under_load_answers_every_request_of_http2() {
    shutdown_under_load("h2").await;
}

#[tokio::test]
async fn shutdown_closes_idle_connections_and_stops_accepting() {
    let server = start(router(), options());
    let (mut fresh, mut used) = (server.connect().await, server.connect().await);
    send(&mut used, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    answer(&mut used).await;
    let address = server.tcp();
    let begun = tokio::time::Instant::now();
    assert_eq!(server.stop().await, Drained { cut: 0 });
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(rest(&mut fresh).await, "");
    assert_eq!(rest(&mut used).await, "");
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn shutdown_cuts_off_what_does_not_finish() {
    let begun = Arc::new(Notify::new());
    let forever = get(async |State(begun): State<Arc<Notify>>| {
        begun.notify_one();
        std::future::pending::<&str>().await
    });
    let router = Router::new().route("/", forever).with_state(begun.clone());
    let server = start(router, ListenerOptions { drain_timeout: Duration::from_millis(300), ..options() });
    let mut stream = server.connect().await;
    send(&mut stream, "GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    begun.notified().await;
    assert_eq!(server.stop().await, Drained { cut: 1 });
}

#[tokio::test]
async fn requests_that_a_foreign_page_caused_are_refused() {
    let bound = BoundListener::bind(&port_zero()).unwrap();
    let ListenAddress::Tcp(address) = *bound.local_addr() else { panic!("not TCP") };
    let policy = HostPolicy::new(bound.local_addr(), ["jwksd.internal"]).unwrap();
    let guarded = guard_host(router(), Arc::new(policy));
    tokio::spawn(bound.serve(guarded, options(), CancellationToken::new()));
    let ask = async |headers: &[(&str, &str)]| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        send(&mut stream, &format!("GET / HTTP/1.1\r\n{headers}\r\n")).await;
        let answer = answer(&mut stream).await;
        if answer.starts_with("HTTP/1.1 200 ") {
            None
        } else {
            Some(problem(&answer)["type"].as_str().unwrap().to_owned())
        }
    };
    for host in
        ["localhost", "LocalHost:1", "127.0.0.1", "127.8.8.8:80", "[::1]:8622", "jwksd.internal:9", "localhost."]
    {
        assert_eq!(ask(&[("host", host)]).await, None, "{host}");
    }
    for host in ["evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "internal", "127.1.evil"] {
        assert_eq!(ask(&[("host", host)]).await, Some(urn(ProblemType::HostNotAllowed)), "{host}");
    }
    for hosts in [&[][..], &[("host", "a@localhost")], &[("host", "localhost"), ("host", "localhost")]] {
        assert_eq!(ask(hosts).await, Some(urn(ProblemType::MalformedRequest)), "{hosts:?}");
    }
    let host = ("host", "localhost:8622");
    for good in [("origin", "http://localhost:8622"), ("sec-fetch-site", "same-origin"), ("sec-fetch-site", "none")] {
        assert_eq!(ask(&[host, good]).await, None, "{good:?}");
    }
    for bad in [
        ("origin", "null"),
        ("origin", "https://evil.example"),
        ("origin", "http://localhost"),
        ("origin", "http://localhost:8620"),
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-site", "same-site"),
    ] {
        assert_eq!(ask(&[host, bad]).await, Some(urn(ProblemType::ForeignOrigin)), "{bad:?}");
    }
    let http2 = reqwest::Client::builder()
        .http2_prior_knowledge()
        .resolve("evil.example", address)
        .resolve("jwksd.internal", address)
        .build()
        .unwrap();
    let port = address.port();
    let response = http2.get(format!("http://evil.example:{port}/")).send().await.unwrap();
    refused(response, ProblemType::HostNotAllowed).await;
    let response = http2.get(format!("http://jwksd.internal:{port}/")).send().await.unwrap();
    assert_eq!(response.status(), 200);
}

#[tokio::test]
async fn a_unix_socket_takes_any_host() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let address = unix_address(path.clone());
    let policy = Arc::new(HostPolicy::new(&address, []).unwrap());
    let _server = start_at(&address, guard_host(router(), policy), options());
    for head in ["GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nhost: anything.example\r\n\r\n"] {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        send(&mut stream, head).await;
        assert!(answer(&mut stream).await.ends_with("hello"), "{head}");
    }
}
