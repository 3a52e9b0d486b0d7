//! What can be between a signer and a manager, and what can be in a manager's place.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// A TCP proxy whose connections can be cut, or left open without anything passing.
pub struct Proxy {
    address: SocketAddr,
    state: watch::Sender<Wire>,
    accepting: JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    Whole,
    /// Connections end at once.
    Cut,
    /// They stay, and nothing passes.
    Dead,
}

impl Proxy {
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, _) = watch::channel(Wire::Whole);
        let seen = state.clone();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, port, seen.subscribe()));
            }
        });
        Proxy { address, state, accepting }
    }

    pub fn set(&self, wire: Wire) {
        self.state.send_replace(wire);
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(mut client: TcpStream, port: u16, mut wire: watch::Receiver<Wire>) {
    let now = *wire.borrow_and_update();
    if now == Wire::Cut {
        return;
    }
    let Ok(mut manager) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    loop {
        let now = *wire.borrow_and_update();
        tokio::select! {
            _ = copy_bidirectional(&mut client, &mut manager), if now == Wire::Whole => return,
            changed = wire.changed() => {
                if changed.is_err() || *wire.borrow() == Wire::Cut {
                    return;
                }
            }
        }
    }
}

/// Answers every request with the same bytes.
pub struct Liar {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Liar {
    pub async fn saying(answer: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(answer);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(lie(client, answer.clone()));
            }
        });
        Liar { address, accepting }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn lie(mut client: TcpStream, answer: Arc<Vec<u8>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match client.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let _ = client.write_all(&answer).await;
    let _ = client.shutdown().await;
}
