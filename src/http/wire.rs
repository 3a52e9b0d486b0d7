//! The bytes of one connection: TCP, TLS or Unix; watched, so that a head that has begun and does not end is noticed in
//! HTTP/1.1 and HTTP/2 alike, which hyper's own timeout cannot tell from an idle connection.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;

use super::connection::Conn;
use super::problem::{PROBLEM_JSON, Problem, ProblemType};

/// One of the three kinds of stream that a listener accepts.
pub(super) enum Transport {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

macro_rules! each {
    ($transport:expr, $stream:ident => $call:expr) => {
        match $transport {
            Transport::Tcp($stream) => $call,
            Transport::Tls($stream) => $call,
            Transport::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(&mut *self, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(&mut *self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(&mut *self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        each!(self, stream => stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut *self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(&mut *self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// A transport that tells its [`Conn`] when a head begins, answers what hyper refuses with a problem, and closes without
/// cutting off its last answer.
pub(super) struct Watched {
    transport: Transport,
    conn: Arc<Conn>,
    protocol: Protocol,
    refusal: Option<Bytes>,
    linger: Option<Linger>,
}

impl Watched {
    pub(super) fn new(transport: Transport, conn: Arc<Conn>) -> Self {
        Watched { transport, conn, protocol: Protocol::Unknown { matched: 0 }, refusal: None, linger: None }
    }

    fn saw(&mut self, mut bytes: &[u8]) {
        while let Protocol::Unknown { matched } = &mut self.protocol {
            let Some((first, rest)) = bytes.split_first() else { return };
            if PREFACE.get(*matched) != Some(first) {
                self.protocol = Protocol::Http1;
                break;
            }
            *matched += 1;
            bytes = rest;
            if *matched == PREFACE.len() {
                self.protocol = Protocol::Http2(Frames::default());
            }
        }
        match &mut self.protocol {
            Protocol::Unknown { .. } => {}
            Protocol::Http1 => self.conn.bytes_arrived(),
            Protocol::Http2(frames) => {
                let completed = frames.read(bytes);
                self.conn.head_is_open(frames.open(), completed);
            }
        }
    }

    /// Writes the refusal in place of the `len` bytes that hyper wants to write.
    fn poll_refuse(&mut self, cx: &mut Context<'_>, len: usize) -> Poll<io::Result<usize>> {
        while let Some(refusal) = self.refusal.as_mut().filter(|refusal| refusal.has_remaining()) {
            let written = ready!(Pin::new(&mut self.transport).poll_write(cx, refusal))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            refusal.advance(written);
        }
        self.refusal = None;
        Poll::Ready(Ok(len))
    }

    fn refuses(&mut self, buf: &[u8]) -> bool {
        if self.refusal.is_none() {
            self.refusal = refusal_for(buf);
            if self.refusal.is_some() {
                self.conn.leave_unread();
            }
        }
        self.refusal.is_some()
    }
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.transport).poll_read(cx, buf))?;
        if let Some(bytes) = buf.filled().get(before..).filter(|bytes| !bytes.is_empty()) {
            self.saw(bytes);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.refuses(buf) {
            return self.poll_refuse(cx, buf.len());
        }
        Pin::new(&mut self.transport).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(buf) = bufs.iter().find(|buf| !buf.is_empty())
            && self.refuses(buf)
        {
            return self.poll_refuse(cx, buf.len());
        }
        Pin::new(&mut self.transport).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.transport).poll_shutdown(cx))?;
            if !this.conn.has_unread() {
                return Poll::Ready(Ok(()));
            }
        }
        this.linger.get_or_insert_with(Linger::new).poll(&mut this.transport, cx).map(Ok)
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

enum Protocol {
    Unknown { matched: usize },
    Http1,
    Http2(Frames),
}

/// Follows the frames of HTTP/2 (RFC 9113 §4.1) just closely enough to know whether one that belongs to a head is under
/// way.
#[derive(Default)]
struct Frames {
    header: [u8; 9],
    filled: usize,
    payload_left: usize,
    /// The payload under way is DATA; how long a body may take is [`super::body`]'s business.
    data: bool,
    /// HEADERS came without END_HEADERS; CONTINUATION must follow (§6.10).
    continues: bool,
}

impl Frames {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const CONTINUATION: u8 = 9;
    const END_HEADERS: u8 = 4;

    /// Whether something was completed in `bytes`, so that what is open after them began within them.
    fn read(&mut self, mut bytes: &[u8]) -> bool {
        let mut completed = false;
        while !bytes.is_empty() {
            if self.payload_left == 0 {
                let (taken, rest) = bytes.split_at(bytes.len().min(9 - self.filled));
                self.header[self.filled..self.filled + taken.len()].copy_from_slice(taken);
                self.filled += taken.len();
                bytes = rest;
                if self.filled < 9 {
                    break;
                }
                self.begin();
            }
            let taken = bytes.len().min(self.payload_left);
            self.payload_left -= taken;
            bytes = &bytes[taken..];
            completed |= self.payload_left == 0 && !self.continues;
        }
        completed
    }

    fn begin(&mut self) {
        let [a, b, c, kind, flags, ..] = self.header;
        self.filled = 0;
        self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
        self.data = kind == Self::DATA;
        if matches!(kind, Self::HEADERS | Self::CONTINUATION) {
            self.continues = flags & Self::END_HEADERS == 0;
        }
    }

    fn open(&self) -> bool {
        self.filled > 0 || self.continues || (self.payload_left > 0 && !self.data)
    }
}

/// Closing a socket with unread bytes resets it, and the client may lose the answer. So what the client still sends is
/// read and dropped for a moment.
struct Linger {
    alarm: Pin<Box<Sleep>>,
    left: usize,
}

impl Linger {
    fn new() -> Self {
        Linger { alarm: Box::pin(sleep(Duration::from_secs(1))), left: 4 * 1024 * 1024 }
    }

    fn poll(&mut self, transport: &mut Transport, cx: &mut Context<'_>) -> Poll<()> {
        if self.alarm.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let mut space = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut *transport).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() && self.left > buf.filled().len() => self.left -= buf.filled().len(),
                _ => return Poll::Ready(()),
            }
        }
    }
}

/// hyper answers what it cannot parse with a bare status; ours are problems. Its answers are told from ours by having no
/// request id.
fn refusal_for(buf: &[u8]) -> Option<Bytes> {
    let status = buf.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    let kind = match status {
        b"400" => ProblemType::MalformedRequest,
        b"414" => ProblemType::UriTooLong,
        b"431" => ProblemType::HeadTooLarge,
        _ => return None,
    };
    let head = std::str::from_utf8(buf).ok()?;
    if !head.ends_with("\r\n\r\n") || head.contains("x-request-id:") {
        return None;
    }
    let body = Problem::new(kind).to_json();
    let reason = kind.status().canonical_reason().unwrap_or_default();
    let mut answer = format!(
        "HTTP/1.1 {} {reason}\r\nconnection: close\r\ncache-control: no-store\r\ncontent-type: {PROBLEM_JSON}\r\ncontent-length: {}\r\n\r\n",
        kind.status().as_u16(),
        body.len(),
    )
    .into_bytes();
    answer.extend_from_slice(&body);
    Some(answer.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = (payload as u32).to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        frame.resize(9 + payload, 7);
        frame
    }

    #[test]
    fn a_head_is_open_from_its_first_byte_to_end_headers_however_it_is_cut() {
        let head = [frame(1, 0, 5), frame(9, 0, 3), frame(9, 4, 2)].concat();
        for cut in 1..head.len() {
            let mut frames = Frames::default();
            assert!(!frames.read(&head[..cut]), "cut at {cut}");
            assert!(frames.open(), "cut at {cut}");
            assert!(frames.read(&head[cut..]), "cut at {cut}");
            assert!(!frames.open(), "cut at {cut}");
        }
    }

    #[test]
    fn an_incomplete_body_or_a_whole_ping_is_no_open_head() {
        let mut frames = Frames::default();
        frames.read(&[frame(4, 0, 0), frame(6, 0, 8)].concat());
        assert!(!frames.open());
        frames.read(&frame(0, 1, 100)[..50]);
        assert!(!frames.open());
    }

    #[test]
    fn only_bare_answers_are_replaced() {
        let bare = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let refusal = refusal_for(bare).unwrap();
        assert!(refusal.starts_with(b"HTTP/1.1 431 ") && refusal.ends_with(b"}"), "{refusal:?}");
        assert_eq!(refusal_for(b"HTTP/1.1 400 Bad Request\r\nx-request-id: 1\r\n\r\n"), None);
        assert_eq!(refusal_for(b"HTTP/1.1 200 OK\r\n\r\n"), None);
    }
}
