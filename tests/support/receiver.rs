//! A receiver of webhooks that does as it is told: takes them, refuses them, hangs, breaks off.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{PATIENCE, eventually};

/// What it does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A status and further header lines.
    Status(u16, &'static str),
    /// Reads, and answers nothing.
    Hang,
    /// Closes in the midst of the answer.
    BreakOff,
}

/// A request that it read whole.
#[derive(Clone, Debug)]
pub struct Received {
    pub target: String,
    pub headers: BTreeMap<String, String>,
    pub body: String,
    /// It was answered with a success.
    pub taken: bool,
}

impl Received {
    pub fn id(&self) -> &str {
        &self.headers["webhook-id"]
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a notice is JSON")
    }

    pub fn event(&self) -> String {
        self.json()["type"].as_str().expect("a notice has a type").to_owned()
    }
}

#[derive(Default)]
struct State {
    received: Vec<Received>,
    /// What comes next; after that, `always`.
    replies: VecDeque<Reply>,
    always: Option<Reply>,
    /// What it never takes, however often it is sent: 422.
    refused: Option<&'static str>,
}

/// Listens on a port of its own until it is dropped. Clones share it.
#[derive(Clone)]
pub struct Receiver {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    _task: Arc<Listening>,
}

struct Listening(tokio::task::JoinHandle<()>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Receiver {
    pub async fn start() -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has free ports");
        let (address, state) = (listener.local_addr().expect("it is bound"), Arc::<Mutex<State>>::default());
        let shared = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let state = shared.clone();
                tokio::spawn(async move { serve(connection, &state).await });
            }
        });
        Receiver { address, state, _task: Arc::new(Listening(task)) }
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// What it does with the next requests, one after the other.
    pub fn next(&self, replies: impl IntoIterator<Item = Reply>) {
        self.state().replies.extend(replies);
    }

    /// What it does with all others; `None`: takes them.
    pub fn always(&self, reply: Option<Reply>) {
        self.state().always = reply;
    }

    /// Answers notices of this event with 422, however often they are sent.
    pub fn refuse(&self, event: &'static str) {
        self.state().refused = Some(event);
    }

    pub fn received(&self) -> Vec<Received> {
        self.state().received.clone()
    }

    /// What it took, each once.
    pub fn taken(&self) -> Vec<Received> {
        let mut taken: Vec<Received> = Vec::new();
        for received in self.received().into_iter().filter(|received| received.taken) {
            if !taken.iter().any(|known| known.id() == received.id()) {
                taken.push(received);
            }
        }
        taken
    }

    /// Waits until it took what `wanted` accepts.
    pub async fn took(&self, what: &str, wanted: impl Fn(&Received) -> bool) -> Received {
        eventually(what, PATIENCE.saturating_mul(2), async || self.taken().into_iter().find(&wanted)).await
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve(mut connection: TcpStream, state: &Mutex<State>) {
    while let Some(mut received) = read(&mut connection).await {
        let reply = {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let reply = match state.refused {
                Some(event) if received.event() == event => Reply::Status(422, ""),
                _ => state.replies.pop_front().or_else(|| state.always.clone()).unwrap_or(Reply::Status(204, "")),
            };
            received.taken = matches!(reply, Reply::Status(200..=299, _));
            state.received.push(received);
            reply
        };
        let answered = match reply {
            Reply::Status(status, headers) => {
                let answer = format!("HTTP/1.1 {status} As told\r\ncontent-length: 0\r\n{headers}\r\n");
                connection.write_all(answer.as_bytes()).await.is_ok()
            }
            Reply::BreakOff => {
                let _ = connection.write_all(b"HTTP/1.1 2").await;
                false
            }
            Reply::Hang => {
                tokio::time::sleep(Duration::from_secs(600)).await;
                false
            }
        };
        if !answered {
            return;
        }
    }
}

async fn read(connection: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if connection.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8(bytes[..head].to_vec()).ok()?;
    let mut lines = text.lines();
    let target = lines.next()?.split(' ').nth(1)?.to_owned();
    let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let headers: BTreeMap<String, String> = lines.filter_map(header).collect();
    let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = bytes.split_off(head + 4);
    while body.len() < length {
        if connection.read_buf(&mut body).await.ok()? == 0 {
            return None;
        }
    }
    Some(Received { target, headers, body: String::from_utf8(body).ok()?, taken: false })
}
