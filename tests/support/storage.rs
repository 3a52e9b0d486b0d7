//! Where issuers are published besides the daemon: buckets of LocalStack's S3 behind an edge that can fail, and folders
//! behind a web server that knows nothing of jwksd.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use reqwest::header::AUTHORIZATION;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::localstack::{LocalStack, REGION};
use super::{PATIENCE, http_client};

/// What the edge in front of the storage does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    Fair,
    /// Connections end without an answer.
    Down,
    /// Writes are denied.
    WritesDenied,
    /// Everything is denied.
    Denied,
    /// 503 SlowDown.
    Overloaded,
    /// Requests are taken and never answered.
    Hanging,
    /// Writes are carried out, and their answers are lost.
    AnswersLost,
    /// Writes are answered with success and not carried out.
    Lying,
}

/// A bucket of its own, reached through an edge of its own.
pub struct BucketSite {
    pub name: String,
    /// The edge: the endpoint for whoever is tested.
    pub endpoint: String,
    /// The storage itself: for the test and its verifiers.
    origin: String,
    weather: Arc<Mutex<Weather>>,
    _stop: watch::Sender<()>,
}

impl BucketSite {
    pub async fn new() -> BucketSite {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let origin = LocalStack::storage().await.endpoint().to_owned();
        let name = format!("bucket-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let body = format!(
            "<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        );
        // The first request has LocalStack load its S3, which takes its time on a busy machine.
        let made = request(Method::PUT, &format!("{origin}/{name}")).body(body).timeout(PATIENCE);
        let made = made.send().await.expect("LocalStack runs");
        assert!(made.status().is_success(), "{made:?}");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let weather = Arc::new(Mutex::new(Weather::Fair));
        let (stop, stopped) = watch::channel(());
        let (seen, target) = (weather.clone(), origin.clone());
        tokio::spawn(serve(listener, stopped, move |request| edge(request, target.clone(), seen.clone())));
        BucketSite { name, endpoint, origin, weather, _stop: stop }
    }

    pub fn set(&self, weather: Weather) {
        *self.weather.lock().expect("nobody panics with it") = weather;
    }

    /// Where verifiers fetch an object.
    pub fn url(&self, key: &str) -> String {
        format!("{}/{}/{key}", self.origin, self.name)
    }

    /// What is there, headers included.
    pub async fn object(&self, key: &str) -> Option<reqwest::Response> {
        let found = request(Method::GET, &self.url(key)).send().await.expect("LocalStack runs");
        (found.status() != StatusCode::NOT_FOUND).then_some(found)
    }

    /// Puts an object as somebody else would.
    pub async fn tamper(&self, key: &str, body: &str, generations: Option<&str>) {
        let mut put = request(Method::PUT, &self.url(key)).body(body.to_owned());
        if let Some(generations) = generations {
            put = put.header("x-amz-meta-jwksd-generations", generations);
        }
        assert!(put.send().await.expect("LocalStack runs").status().is_success());
    }

    pub async fn remove(&self, key: &str) {
        let removed = request(Method::DELETE, &self.url(key)).send().await.expect("LocalStack runs");
        assert!(removed.status().is_success(), "{removed:?}");
    }

    /// For a process that publishes here.
    pub fn environment() -> [(&'static str, &'static str); 3] {
        [
            ("AWS_ACCESS_KEY_ID", ACCOUNT),
            ("AWS_SECRET_ACCESS_KEY", "not-a-secret"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ]
    }
}

const ACCOUNT: &str = "200000000001";

/// LocalStack takes the account from the credential and checks no signature.
fn request(method: Method, url: &str) -> reqwest::RequestBuilder {
    let credential = format!("{ACCOUNT}/20260101/{REGION}/s3/aws4_request");
    let signature = format!("AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0");
    http_client().build().expect("a client without TLS set-up").request(method, url).header(AUTHORIZATION, signature)
}

type Answer = Response<Full<Bytes>>;

fn answer(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer
}

fn refusal(status: StatusCode, code: &str) -> Answer {
    answer(status, format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>"))
}

/// `None`: the connection ends.
async fn edge(request: Request<Incoming>, origin: String, weather: Arc<Mutex<Weather>>) -> Option<Answer> {
    let weather = *weather.lock().expect("nobody panics with it");
    let write = request.method() == Method::PUT;
    match weather {
        Weather::Down => return None,
        Weather::Denied => return Some(refusal(StatusCode::FORBIDDEN, "AccessDenied")),
        Weather::WritesDenied if write => return Some(refusal(StatusCode::FORBIDDEN, "AccessDenied")),
        Weather::Overloaded => return Some(refusal(StatusCode::SERVICE_UNAVAILABLE, "SlowDown")),
        Weather::Hanging => std::future::pending().await,
        Weather::Lying if write => {
            let mut answer = answer(StatusCode::OK, "");
            answer.headers_mut().insert("etag", http::HeaderValue::from_static("\"0\""));
            return Some(answer);
        }
        _ => {}
    }
    let (head, body) = request.into_parts();
    let body = body.collect().await.ok()?.to_bytes();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let mut forwarded = http_client().build().expect("a client").request(head.method, format!("{origin}{path}"));
    for (name, value) in head.headers.iter().filter(|(name, _)| *name != "host" && *name != "content-length") {
        forwarded = forwarded.header(name, value);
    }
    let response = forwarded.body(body).send().await.ok()?;
    if weather == Weather::AnswersLost && write {
        return None;
    }
    let (status, headers) = (response.status(), response.headers().clone());
    let length = headers.get("content-length").cloned();
    let mut answer = answer(status, response.bytes().await.ok()?);
    *answer.headers_mut() = headers;
    answer.headers_mut().remove("transfer-encoding");
    if let Some(length) = length {
        answer.headers_mut().insert("content-length", length);
    }
    Some(answer)
}

/// A web server of a folder of key sets, with a fixed `Cache-Control` and nothing else.
pub struct WebServer {
    address: SocketAddr,
    _stop: watch::Sender<()>,
}

impl WebServer {
    pub async fn of(folder: PathBuf, cache_control: &'static str) -> WebServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (stop, stopped) = watch::channel(());
        tokio::spawn(serve(listener, stopped, move |request: Request<Incoming>| {
            let file = folder.join(request.uri().path().trim_start_matches('/'));
            async move {
                let mut found = match std::fs::read(&file) {
                    Ok(bytes) => answer(StatusCode::OK, bytes),
                    Err(_) => answer(StatusCode::NOT_FOUND, ""),
                };
                let headers = found.headers_mut();
                headers.insert("cache-control", http::HeaderValue::from_static(cache_control));
                headers.insert("content-type", http::HeaderValue::from_static("application/jwk-set+json"));
                Some(found)
            }
        }));
        WebServer { address, _stop: stop }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

async fn serve<F>(
    listener: TcpListener,
    stopped: watch::Receiver<()>,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
) where
    F: Future<Output = Option<Answer>> + Send + 'static,
{
    loop {
        let mut stop = stopped.clone();
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted { Ok((stream, _)) => stream, Err(_) => return },
            _ = stop.changed() => return,
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { answer.await.ok_or("the connection ends") }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                _ = connection => {}
                _ = stop.changed() => {}
            }
        });
    }
}
