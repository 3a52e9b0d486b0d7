//! An API server, as far as it serves keys, with all that can be wrong with one.

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::authority::{Authority, NOW};
use crate::keys::ClusterKey;

/// What it answers.
#[derive(Clone)]
pub enum Mode {
    Keys(Vec<Value>),
    Text(String),
    Status(u16),
    /// 302 to a place that would answer.
    Redirect(String),
    /// Closes the connection unanswered.
    Closed,
    /// Says nothing, for good.
    Silent,
    /// Breaks off in the middle of the body.
    Cut,
    /// More than anybody wants to read.
    Huge,
}

pub struct ApiServer {
    port: u16,
    pub authority: Authority,
    mode: Arc<Mutex<Mode>>,
    /// The `Authorization` of each request so far.
    asked: watch::Sender<Vec<String>>,
}

impl Mode {
    pub fn of(keys: &[&ClusterKey]) -> Self {
        Mode::Keys(keys.iter().map(|key| key.jwk()).collect())
    }
}

impl ApiServer {
    pub async fn start(mode: Mode) -> Self {
        let authority = Authority::new("cluster");
        let pair = authority.server(NOW);
        let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![pair.der.clone()], pair.secret.clone_key())
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = ApiServer { port, authority, mode: Arc::new(Mutex::new(mode)), asked: watch::Sender::default() };
        let (mode, asked) = (server.mode.clone(), server.asked.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, mode, asked) = (acceptor.clone(), mode.clone(), asked.clone());
                tokio::spawn(async move {
                    // A client that goes away is its own business.
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        if stream.read_buf(&mut head).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let head = String::from_utf8(head).unwrap();
                    let shown = head.lines().find_map(|line| line.strip_prefix("authorization: ")).unwrap_or_default();
                    asked.send_modify(|asked| asked.push(shown.to_owned()));
                    let mode = mode.lock().unwrap().clone();
                    if matches!(mode, Mode::Silent) {
                        let _ = stream.read(&mut [0; 1]).await;
                        return;
                    }
                    let _ = stream.write_all(&answer(&mode)).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        server
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}/openid/v1/jwks", self.port)
    }

    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.borrow().clone()
    }

    /// Waits until it was asked again after `before` requests.
    pub async fn asked_after(&self, before: usize) {
        let mut asked = self.asked.subscribe();
        let again = asked.wait_for(|asked| asked.len() > before);
        tokio::time::timeout(crate::support::PATIENCE, again).await.expect("it is asked again").unwrap();
    }
}

fn answer(mode: &Mode) -> Vec<u8> {
    let full = |status: u16, more: &str, body: String| {
        let head = format!("HTTP/1.1 {status} \r\n{more}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
        (head + &body).into_bytes()
    };
    match mode {
        Mode::Keys(keys) => full(200, "", json!({ "keys": keys }).to_string()),
        Mode::Text(text) => full(200, "", text.clone()),
        Mode::Status(status) => full(*status, "", String::new()),
        Mode::Redirect(to) => full(302, &format!("location: {to}\r\n"), String::new()),
        Mode::Cut => b"HTTP/1.1 200 \r\ncontent-length: 1000\r\n\r\n{\"keys\":[".to_vec(),
        Mode::Huge => full(200, "", format!("{{\"keys\":[],\"padding\":\"{}\"}}", "x".repeat(1 << 20))),
        Mode::Closed | Mode::Silent => Vec::new(),
    }
}
