//! One connection's life, and the limits that keep slow, idle and surplus ones from hurting others.

use std::collections::HashMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http::header::CONNECTION;
use http::{HeaderValue, Request, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::body::BODY_LIMIT;
use super::certificate::ClientCertificate;
use super::listener::{ListenerOptions, Peer};
use super::middleware::Edge;
use super::wire::{Transport, Watched};

/// The most bytes of a request's head.
const HEAD_LIMIT: u32 = 32 * 1024;

/// How long a connection may take to close after it was told to.
const CLOSING: Duration = Duration::from_secs(1);

/// What all connections of one listener share.
pub(super) struct Connections {
    edge: Edge,
    options: ListenerOptions,
    builder: auto::Builder<TokioExecutor>,
    epoch: Instant,
    open: Mutex<Open>,
    /// Stop: answer what was asked, then close.
    stop: CancellationToken,
    /// The time for that is over.
    cut: CancellationToken,
}

#[derive(Default)]
struct Open {
    next: u64,
    by_number: HashMap<u64, Arc<Conn>>,
}

impl Connections {
    pub(super) fn new(edge: Edge, options: ListenerOptions, stop: CancellationToken) -> Self {
        Connections {
            edge,
            options,
            builder: protocols(),
            epoch: Instant::now(),
            open: Mutex::default(),
            stop,
            cut: CancellationToken::new(),
        }
    }

    /// Makes room for one more: closes the connection that has waited longest for a head; if all have sent one, the
    /// one that has stalled longest within its requests (a body that does not come, an answer that is not taken).
    /// `false` if there is no room, since a handler is at work for every connection.
    pub(super) fn make_room(&self) -> bool {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).make_room(self.options.max_connections)
    }

    /// Frees one connection's file descriptor, however many are allowed.
    pub(super) fn close_oldest(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let fewer = open.by_number.len();
        open.make_room(fewer);
    }

    pub(super) fn cut_off(&self) {
        self.cut.cancel();
    }

    /// Serves one accepted connection to its end.
    pub(super) async fn serve(self: Arc<Self>, transport: Transport, peer: Peer) {
        let place = Place::take(&self);
        let conn = place.conn.clone();
        let Some((transport, certificate)) = self.secured(transport, &conn).await else { return };
        let requests = Requests { connections: self.clone(), conn: conn.clone(), peer, certificate };
        let io = TokioIo::new(Watched::new(transport, conn.clone()));
        let mut served = pin!(self.builder.serve_connection(io, requests));
        let mut phase = Phase::Open;
        let mut alarm = pin!(sleep_until(self.next_check(&conn)));
        loop {
            tokio::select! {
                biased;
                _ = served.as_mut() => return,
                () = conn.evicted.notified() => return,
                () = self.cut.cancelled() => return,
                () = self.stop.cancelled(), if phase == Phase::Open => {
                    // A request may be on its way on a connection that looks idle: for a moment it is still taken.
                    phase = Phase::Stopping;
                    alarm.as_mut().reset(Instant::now() + self.options.drain_grace);
                    if conn.in_request() {
                        served.as_mut().graceful_shutdown();
                    }
                }
                () = alarm.as_mut() => {
                    match (phase, conn.verdict(self.now(), &self.options)) {
                        (_, Verdict::Drop) => return,
                        (Phase::Closing, _) if !conn.in_request() => return,
                        (Phase::Stopping, _) | (Phase::Open, Verdict::Close) => {
                            phase = Phase::Closing;
                            served.as_mut().graceful_shutdown();
                            alarm.as_mut().reset(Instant::now() + CLOSING);
                        }
                        (Phase::Closing, _) => alarm.as_mut().reset(Instant::now() + CLOSING),
                        (Phase::Open, Verdict::Keep) => alarm.as_mut().reset(self.next_check(&conn)),
                    }
                }
            }
        }
    }

    /// The TLS handshake, within the time for the first head.
    async fn secured(&self, transport: Transport, conn: &Conn) -> Option<(Transport, Option<ClientCertificate>)> {
        let (stream, tls) = match (transport, &self.options.tls) {
            (Transport::Tcp(stream), Some(tls)) => (stream, tls),
            (transport, _) => return Some((transport, None)),
        };
        let in_use = tls.current();
        let deadline = Instant::now() + self.options.head_timeout;
        let stopped = async {
            self.stop.cancelled().await;
            tokio::time::sleep(self.options.drain_grace).await;
        };
        let stream = tokio::select! {
            biased;
            handshake = TlsAcceptor::from(in_use.config.clone()).accept(stream).into_fallible() => match handshake {
                Ok(stream) => stream,
                Err((error, stream)) => {
                    tracing::debug!(listener = self.options.name, %error, "TLS handshake failed");
                    hang_up(stream).await;
                    return None;
                }
            },
            () = sleep_until(deadline) => return None,
            () = conn.evicted.notified() => return None,
            () = stopped => return None,
        };
        let shown = stream.get_ref().1.peer_certificates();
        let certificate = shown.and_then(|chain| ClientCertificate::of(chain, tls.clone(), &in_use));
        Some((Transport::Tls(Box::new(stream)), certificate))
    }

    /// No later than `head_timeout` from now: what begins after this moment is then not noticed too late.
    fn next_check(&self, conn: &Conn) -> Instant {
        let latest = self.now() + micros(self.options.head_timeout);
        let at = conn.deadline(&self.options).map_or(latest, |(at, _)| at.min(latest));
        // The millisecond makes up for rounding; without it a check could come just before the deadline, again and again.
        self.epoch + Duration::from_micros(at) + Duration::from_millis(1)
    }

    fn now(&self) -> u64 {
        micros(self.epoch.elapsed())
    }
}

/// Closes a connection whose client may still be sending, so that the alert which says why gets through: closed with
/// unread bytes, a connection is reset, and what was on its way is lost.
async fn hang_up(mut stream: TcpStream) {
    let drained = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    };
    // Whoever goes on sending has no claim to an explanation.
    let _ = tokio::time::timeout(CLOSING, drained).await;
}

impl Open {
    fn make_room(&mut self, most: usize) -> bool {
        while self.by_number.len() >= most {
            let victims = self.by_number.iter().filter_map(|(number, conn)| Some((conn.age()?, *number)));
            let Some((_, number)) = victims.min() else { return false };
            if self.by_number.get(&number).is_some_and(|conn| conn.evict()) {
                self.by_number.remove(&number);
            }
        }
        true
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The listener stops; requests that were on their way are still taken.
    Stopping,
    /// hyper was told to close after the requests under way.
    Closing,
}

enum Verdict {
    Keep,
    /// Idle for too long: close politely.
    Close,
    /// Too slow: drop.
    Drop,
}

/// A connection's place among the open ones; gives it up when dropped.
struct Place {
    connections: Arc<Connections>,
    number: u64,
    conn: Arc<Conn>,
}

impl Place {
    fn take(connections: &Arc<Connections>) -> Self {
        let conn = Arc::new(Conn::new(connections.epoch));
        let mut open = connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        let number = open.next;
        open.next += 1;
        open.by_number.insert(number, conn.clone());
        drop(open);
        Place { connections: connections.clone(), number, conn }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.by_number.remove(&self.number);
    }
}

/// What is known of one connection; written by its requests, read by whoever needs room. Times are microseconds since
/// the listener's epoch.
pub(super) struct Conn {
    epoch: Instant,
    /// Requests under way (bits 0–30), how many of them stall (bits 31–61), and `EVICTED`: one word, so that a
    /// connection is never closed while a head completes.
    load: AtomicU64,
    /// When it last began to wait: for a head, or within a request.
    since: AtomicU64,
    /// When the head under way began; 0 without one.
    head: AtomicU64,
    served: AtomicBool,
    unread: AtomicBool,
    evicted: Notify,
}

const ONE_REQUEST: u64 = 1;
const ONE_STALL: u64 = 1 << 31;
const EVICTED: u64 = 1 << 63;

fn requests(load: u64) -> u64 {
    load & (ONE_STALL - 1)
}

fn stalls(load: u64) -> u64 {
    (load & !EVICTED) >> 31
}

impl Conn {
    fn new(epoch: Instant) -> Self {
        let conn = Conn {
            epoch,
            load: AtomicU64::new(0),
            since: AtomicU64::new(0),
            head: AtomicU64::new(0),
            served: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            evicted: Notify::new(),
        };
        conn.wait_begins();
        conn
    }

    /// HTTP/1.1: what arrives outside a request is the beginning of a head.
    pub(super) fn bytes_arrived(&self) {
        if !self.in_request() && self.head.load(Ordering::Acquire) == 0 {
            self.head.store(self.now(), Ordering::Release);
        }
    }

    /// HTTP/2: whether a head is under way, and whether it began just now.
    pub(super) fn head_is_open(&self, open: bool, anew: bool) {
        match open {
            false => self.head.store(0, Ordering::Release),
            true if anew || self.head.load(Ordering::Acquire) == 0 => self.head.store(self.now(), Ordering::Release),
            true => {}
        }
    }

    /// The client's bytes will not all be read before the connection closes.
    pub(super) fn leave_unread(&self) {
        self.unread.store(true, Ordering::Release);
    }

    pub(super) fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Acquire)
    }

    fn in_request(&self) -> bool {
        requests(self.load.load(Ordering::Acquire)) > 0
    }

    /// A head is complete. Refused if the connection has been given up meanwhile.
    fn begin(&self, http1: bool) -> Result<(), GivenUp> {
        if http1 {
            self.head.store(0, Ordering::Release);
        }
        self.served.store(true, Ordering::Release);
        match self.load.fetch_add(ONE_REQUEST, Ordering::AcqRel) & EVICTED {
            0 => Ok(()),
            _ => Err(GivenUp),
        }
    }

    fn end(&self) {
        self.wait_begins();
        self.load.fetch_sub(ONE_REQUEST, Ordering::AcqRel);
    }

    fn stall(&self) {
        self.wait_begins();
        self.load.fetch_add(ONE_STALL, Ordering::AcqRel);
    }

    fn resume(&self) {
        self.load.fetch_sub(ONE_STALL, Ordering::AcqRel);
    }

    fn wait_begins(&self) {
        self.since.store(self.now(), Ordering::Release);
    }

    /// For choosing which to close: those that wait for a head before those that stall, the oldest first; `None` if a
    /// handler is at work.
    fn age(&self) -> Option<(bool, u64)> {
        let load = self.load.load(Ordering::Acquire);
        let in_request = requests(load) > 0;
        (!in_request || stalls(load) >= requests(load)).then(|| (in_request, self.since.load(Ordering::Acquire)))
    }

    /// Gives the connection up, unless a handler has begun to work for it.
    fn evict(&self) -> bool {
        let idle = |load: u64| (requests(load) == 0 || stalls(load) >= requests(load)).then_some(load | EVICTED);
        let evicted = self.load.fetch_update(Ordering::AcqRel, Ordering::Acquire, idle).is_ok();
        if evicted {
            self.evicted.notify_one();
        }
        evicted
    }

    /// Until when it may go on like this, and what happens then; `None` while a handler is at work.
    fn deadline(&self, options: &ListenerOptions) -> Option<(u64, Verdict)> {
        let (in_request, since) = self.age()?;
        let head = self.head.load(Ordering::Acquire);
        let (head_timeout, idle_timeout) = (micros(options.head_timeout), micros(options.idle_timeout));
        Some(match (in_request, head, self.served.load(Ordering::Acquire)) {
            (true, ..) => (since + idle_timeout, Verdict::Drop),
            (false, 0, false) => (since + head_timeout, Verdict::Drop),
            (false, 0, true) => (since + idle_timeout, Verdict::Close),
            (false, began, false) => (began.min(since) + head_timeout, Verdict::Drop),
            (false, began, true) => (began + head_timeout, Verdict::Drop),
        })
    }

    fn verdict(&self, now: u64, options: &ListenerOptions) -> Verdict {
        match self.deadline(options) {
            Some((at, Verdict::Drop)) if at <= now && self.evict() => Verdict::Drop,
            Some((at, Verdict::Close)) if at <= now => Verdict::Close,
            _ => Verdict::Keep,
        }
    }

    fn now(&self) -> u64 {
        micros(self.epoch.elapsed())
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX >> 1)
}

#[derive(Debug, thiserror::Error)]
#[error("the connection was closed to make room")]
struct GivenUp;

fn protocols() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // hyper's own timeout would run on idle connections too; `Conn` knows the difference. Answers are small: copying one
    // behind its head costs less than handing the kernel two pieces.
    builder.http1().header_read_timeout(None).max_buf_size(HEAD_LIMIT as usize).half_close(true).writev(false);
    builder
        .http2()
        .max_header_list_size(HEAD_LIMIT)
        .max_concurrent_streams(128)
        // Enough for one whole body per stream, and eight per connection.
        .initial_stream_window_size(BODY_LIMIT as u32)
        .initial_connection_window_size(8 * BODY_LIMIT as u32)
        .max_send_buf_size(128 * 1024);
    builder
}

/// Passes requests to the router and keeps account of them.
struct Requests {
    connections: Arc<Connections>,
    conn: Arc<Conn>,
    peer: Peer,
    certificate: Option<ClientCertificate>,
}

impl hyper::service::Service<Request<Incoming>> for Requests {
    type Response = Response<Sent>;
    type Error = GivenUp;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Sent>, GivenUp>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let http1 = request.version() < Version::HTTP_2;
        let under_way = match UnderWay::begin(&self.conn, http1) {
            Ok(under_way) => under_way,
            Err(error) => return Box::pin(std::future::ready(Err(error))),
        };
        request.extensions_mut().insert(self.peer);
        if let Some(certificate) = &self.certificate {
            request.extensions_mut().insert(certificate.clone());
        }
        let request = request.map(|body| match body.is_end_stream() {
            true => Body::empty(),
            false => Body::new(Received::new(body, self.conn.clone(), http1)),
        });
        let connections = self.connections.clone();
        Box::pin(async move {
            let mut response = connections.edge.answer(request).await;
            if http1 && connections.stop.is_cancelled() {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response.map(|body| Sent::new(body, under_way)))
        })
    }
}

/// A request from its complete head to the end of its answer.
struct UnderWay(Arc<Conn>);

impl UnderWay {
    fn begin(conn: &Arc<Conn>, http1: bool) -> Result<Self, GivenUp> {
        conn.begin(http1)?;
        Ok(UnderWay(conn.clone()))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A request's body; the request stalls until all of it is here.
struct Received {
    inner: Incoming,
    conn: Arc<Conn>,
    http1: bool,
    ended: bool,
}

impl Received {
    fn new(inner: Incoming, conn: Arc<Conn>, http1: bool) -> Self {
        conn.stall();
        Received { inner, conn, http1, ended: false }
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.conn.resume();
        }
    }
}

impl HttpBody for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if matches!(polled, Poll::Ready(None)) || self.inner.is_end_stream() {
            self.end();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if !self.ended {
            if self.http1 {
                self.conn.leave_unread();
            }
            self.end();
        }
    }
}

/// An answer's body; the request stalls until hyper has taken all of it.
struct Sent {
    inner: Body,
    under_way: UnderWay,
}

impl Sent {
    fn new(inner: Body, under_way: UnderWay) -> Self {
        under_way.0.stall();
        Sent { inner, under_way }
    }
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.under_way.0.resume();
    }
}
