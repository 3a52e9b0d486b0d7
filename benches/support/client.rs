//! HTTP/1.1 over one kept connection: one request at a time, nothing parsed but status and length.

use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::Outcome;

pub struct Connection {
    stream: BufReader<TcpStream>,
    host: SocketAddr,
    token: Option<String>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    /// What is not 200 is an error with the answer's text.
    pub fn ok(self) -> Outcome<Vec<u8>> {
        match self.status {
            200 => Ok(self.body),
            status => Err(format!("{status}: {}", String::from_utf8_lossy(&self.body)).into()),
        }
    }
}

impl Connection {
    pub async fn open(host: SocketAddr) -> Outcome<Self> {
        let stream = TcpStream::connect(host).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream: BufReader::new(stream), host, token: None })
    }

    /// Requests carry this bearer token from now on.
    pub fn with_token(self, token: String) -> Self {
        Connection { token: Some(token), ..self }
    }

    pub async fn get(&mut self, path: &str) -> Outcome<Answer> {
        self.request("GET", path, None).await
    }

    pub async fn post(&mut self, path: &str, body: &str) -> Outcome<Answer> {
        self.request("POST", path, Some(body)).await
    }

    /// `{"claims": …}` signed with `keyset`; the answer as it came.
    pub async fn sign(&mut self, keyset: &str, request: &str) -> Outcome<Answer> {
        self.post(&format!("/v1/keysets/{keyset}/sign"), request).await
    }

    async fn request(&mut self, method: &str, path: &str, body: Option<&str>) -> Outcome<Answer> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.host);
        if let Some(token) = &self.token {
            head.push_str(&format!("Authorization: Bearer {token}\r\n"));
        }
        if let Some(body) = body {
            head.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        head.push_str(body.unwrap_or_default());
        self.stream.write_all(head.as_bytes()).await?;
        self.answer().await
    }

    async fn answer(&mut self) -> Outcome<Answer> {
        let mut line = String::new();
        let (mut status, mut length) = (None, None);
        loop {
            line.clear();
            if self.stream.read_line(&mut line).await? == 0 {
                return Err("the connection was closed within an answer".into());
            }
            let text = line.trim_end();
            if text.is_empty() {
                break;
            }
            match (status, text.split_once(':')) {
                (None, _) => status = Some(text.split(' ').nth(1).unwrap_or_default().parse()?),
                (_, Some((name, value))) if name.eq_ignore_ascii_case("content-length") => {
                    length = Some(value.trim().parse()?);
                }
                _ => {}
            }
        }
        let length: usize = length.ok_or("an answer without a length")?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        Ok(Answer { status: status.ok_or("an answer without a status")?, body })
    }
}
