//! Load over keep-alive HTTP/1.1 connections: as much as a server takes, or at a given rate. Requests are bytes made
//! beforehand, and of answers only status and length are read, so that one core makes more load than one core serves.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Address::Tcp(address)
    }
}

/// One kind of request.
#[derive(Clone)]
pub struct Request {
    address: Address,
    bytes: Arc<[u8]>,
}

impl Request {
    pub fn get(address: impl Into<Address>, path: &str) -> Self {
        Request::get_with(address, path, "")
    }

    /// With further header lines, each of which ends with CRLF.
    pub fn get_with(address: impl Into<Address>, path: &str, headers: &str) -> Self {
        let address = address.into();
        let host = address.host();
        Request::of(address, format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n"))
    }

    /// A JSON request with further header lines, each of which ends with CRLF.
    pub fn post(address: impl Into<Address>, path: &str, headers: &str, body: &str) -> Self {
        let (address, length) = (address.into(), body.len());
        let host = address.host();
        Request::of(
            address,
            format!(
                "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
            ),
        )
    }

    /// The same bytes, sent elsewhere.
    #[must_use]
    pub fn to(&self, address: impl Into<Address>) -> Self {
        Request { address: address.into(), bytes: self.bytes.clone() }
    }

    fn of(address: Address, text: String) -> Self {
        Request { address, bytes: text.into_bytes().into() }
    }

    /// Asks once and returns the whole answer.
    pub fn once(&self) -> String {
        run(async {
            let mut connection = Connection::open(&self.address).await;
            connection.exchange(&self.bytes).await;
            connection.answer()
        })
    }
}

/// What a load saw.
#[derive(Clone, Default)]
pub struct Seen {
    pub answered: u64,
    /// Answers that were no 200.
    pub failed: u64,
    pub took: Duration,
    /// Microseconds: from the moment when each request was to be sent, whether or not it could be (no coordinated
    /// omission).
    latencies: Vec<u32>,
}

impl Seen {
    pub fn per_second(&self) -> f64 {
        self.answered as f64 / self.took.as_secs_f64()
    }

    /// The latency, in milliseconds, that `share` of the requests did not exceed.
    pub fn percentile(&self, share: f64) -> f64 {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let at = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
        sorted.get(at).map_or(f64::NAN, |micros| f64::from(*micros) / 1000.0)
    }

    fn add(&mut self, other: Seen) {
        self.answered += other.answered;
        self.failed += other.failed;
        self.took = self.took.max(other.took);
        self.latencies.extend(other.latencies);
    }
}

/// As many requests as `connections` get answered in `span`, each sending its next when it has its answer. The first
/// tenth of the time does not count.
pub fn flood(request: &Request, connections: usize, span: Duration) -> Seen {
    run(async {
        let counts_from = Instant::now() + span / 10;
        let ends = counts_from + span;
        let tasks: Vec<_> = (0..connections)
            .map(|_| {
                let request = request.clone();
                tokio::spawn(async move {
                    let mut connection = Connection::open(&request.address).await;
                    let mut seen = Seen::default();
                    loop {
                        let sent = Instant::now();
                        if sent >= ends {
                            break;
                        }
                        let fine = connection.exchange(&request.bytes).await;
                        seen.note(fine, sent, counts_from);
                    }
                    seen
                })
            })
            .collect();
        gathered(tasks, span).await
    })
}

/// `rate` requests per second, evenly spaced over `connections`, for `span`.
pub fn pace(request: &Request, rate: f64, connections: usize, span: Duration) -> Seen {
    pace_all(&[(request.clone(), rate)], connections, span).remove(0)
}

/// Several kinds of requests side by side, each at its rate over connections of its own.
pub fn pace_all(kinds: &[(Request, f64)], connections: usize, span: Duration) -> Vec<Seen> {
    run(async {
        let begun = Instant::now() + Duration::from_millis(20);
        let (counts_from, ends) = (begun + span / 10, begun + span / 10 + span);
        let started: Vec<Vec<_>> = kinds
            .iter()
            .map(|(request, rate)| {
                let each = Duration::from_secs_f64(connections as f64 / rate);
                let paced = |number: usize| {
                    let request = request.clone();
                    async move {
                        let mut connection = Connection::open(&request.address).await;
                        let mut due = begun + each.mul_f64(number as f64 / connections as f64);
                        let mut seen = Seen::default();
                        while due < ends {
                            wait_until(due).await;
                            let fine = connection.exchange(&request.bytes).await;
                            seen.note(fine, due, counts_from);
                            due += each;
                        }
                        seen
                    }
                };
                (0..connections).map(|number| tokio::spawn(paced(number))).collect()
            })
            .collect();
        let mut seen = Vec::new();
        for tasks in started {
            seen.push(gathered(tasks, span).await);
        }
        seen
    })
}

/// The runtime's timers tick in milliseconds: what is left of one is waited for by giving way to others.
async fn wait_until(due: Instant) {
    const TICK: Duration = Duration::from_millis(2);
    if let Some(long) = due.checked_duration_since(Instant::now()).and_then(|left| left.checked_sub(TICK)) {
        tokio::time::sleep(long).await;
    }
    while Instant::now() < due {
        tokio::task::yield_now().await;
    }
}

async fn gathered(tasks: Vec<tokio::task::JoinHandle<Seen>>, span: Duration) -> Seen {
    let mut all = Seen::default();
    for task in tasks {
        all.add(task.await.unwrap());
    }
    all.took = span;
    all
}

/// The client's core never rests: waking one up would be work for whoever answers it, on the server's core.
fn run<T>(work: impl Future<Output = T>) -> T {
    crate::process::pin(crate::CLIENT);
    tokio::runtime::Builder::new_current_thread().enable_all().event_interval(16).build().unwrap().block_on(async {
        let restless = tokio::spawn(async {
            loop {
                tokio::task::yield_now().await;
            }
        });
        let done = work.await;
        restless.abort();
        done
    })
}

impl Seen {
    fn note(&mut self, fine: bool, since: Instant, counts_from: Instant) {
        if since >= counts_from {
            self.answered += 1;
            self.failed += u64::from(!fine);
            self.latencies.push(u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX));
        }
    }
}

impl Address {
    fn host(&self) -> String {
        match self {
            Address::Tcp(address) => address.to_string(),
            Address::Unix(_) => "localhost".to_owned(),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

struct Connection {
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    filled: usize,
}

impl Connection {
    async fn open(address: &Address) -> Self {
        let stream: std::io::Result<Box<dyn Stream>> = match address {
            Address::Tcp(address) => TcpStream::connect(address).await.map(|stream| {
                stream.set_nodelay(true).unwrap();
                Box::new(stream) as _
            }),
            Address::Unix(path) => UnixStream::connect(path).await.map(|stream| Box::new(stream) as _),
        };
        let stream = stream.unwrap_or_else(|error| panic!("connecting to {address:?}: {error}"));
        Connection { stream, buffer: vec![0; 64 * 1024], filled: 0 }
    }

    /// Sends a request and reads its answer; whether that is a 200.
    async fn exchange(&mut self, request: &[u8]) -> bool {
        self.stream.write_all(request).await.unwrap();
        self.filled = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[self.filled..]).await.unwrap();
            assert!(read > 0, "the connection was closed: {}", self.answer());
            self.filled += read;
            if is_complete(&self.buffer[..self.filled]) {
                return self.buffer.starts_with(b"HTTP/1.1 200 ");
            }
        }
    }

    fn answer(&self) -> String {
        String::from_utf8_lossy(&self.buffer[..self.filled]).into_owned()
    }
}

/// Whether a head and its whole body are there.
pub(crate) fn is_complete(message: &[u8]) -> bool {
    let Some(head) = message.windows(4).position(|window| window == b"\r\n\r\n") else { return false };
    let body = &message[head + 4..];
    for line in message[..head].split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        if line[..colon].eq_ignore_ascii_case(b"content-length") {
            let length: usize = std::str::from_utf8(&line[colon + 1..]).unwrap().trim().parse().unwrap();
            return body.len() >= length;
        }
        if line[..colon].eq_ignore_ascii_case(b"transfer-encoding") {
            return body.ends_with(b"0\r\n\r\n");
        }
    }
    true
}
