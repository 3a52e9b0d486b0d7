//! One connection of HTTP/1.1 over TLS, which stays the same for as many requests as are made.

use std::sync::Arc;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, HandshakeKind, RootCertStore};

use crate::authority::{Authority, Pair};

pub struct Wire {
    stream: TlsStream<TcpStream>,
}

/// A client that trusts `server`'s authority and shows `own`.
pub fn config(server: &Authority, own: Option<&Pair>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(server.der.clone()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match own {
        Some(pair) => builder.with_client_auth_cert(vec![pair.der.clone()], pair.secret.clone_key()).unwrap(),
        None => builder.with_no_client_auth(),
    })
}

impl Wire {
    /// To `127.0.0.1:PORT`.
    pub async fn open(address: &str, config: Arc<ClientConfig>) -> std::io::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        let name = ServerName::try_from("localhost").unwrap();
        Ok(Wire { stream: TlsConnector::from(config).connect(name, tcp).await? })
    }

    pub fn handshake(&self) -> HandshakeKind {
        self.stream.get_ref().1.handshake_kind().unwrap()
    }

    /// Status and body, or why there is no answer: with TLS 1.3 a client learns only then that it was refused.
    pub async fn ask(&mut self, method: &str, path: &str, token: Option<&str>, body: Option<&Value>) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n");
        if let Some(token) = token {
            head += &format!("authorization: Bearer {token}\r\n");
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        if method != "GET" {
            head += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        }
        self.stream.write_all((head + "\r\n" + &body).as_bytes()).await?;
        let mut answer = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&answer);
            if let Some((head, rest)) = text.split_once("\r\n\r\n") {
                let length =
                    head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
                if rest.len() >= length.unwrap_or(0) {
                    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                    return Ok((status, serde_json::from_str(rest).unwrap_or(Value::Null)));
                }
            }
            if self.stream.read_buf(&mut answer).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

pub type Answer = std::io::Result<(u16, Value)>;
