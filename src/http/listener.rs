//! Sockets: binding them before anything answers, accepting without ever spinning, and stopping without losing a
//! request.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::access::AccessLog;
use super::body::BODY_LIMIT;
use super::connection::Connections;
use super::middleware::{Edge, Routes};
use super::tls::Tls;
use super::wire::Transport;

/// Where a listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    Tcp(SocketAddr),
    /// A socket file with these permission bits, whatever the umask.
    Unix {
        path: PathBuf,
        mode: u32,
    },
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddress::Tcp(address) => address.fmt(f),
            ListenAddress::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Who is at the other end of a request's connection; in its extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    Tcp(SocketAddr),
    /// As the kernel recorded it at connect (SO_PEERCRED).
    Unix {
        uid: u32,
        gid: u32,
        pid: Option<i32>,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix { uid, .. } => write!(f, "uid {uid}"),
        }
    }
}

/// How a listener serves. [`ListenerOptions::new`] gives the values of the contract; tests shorten them.
#[derive(Clone, Debug)]
pub struct ListenerOptions {
    /// In logs: `public`, `signer`, `admin`, `ops` or `replication`.
    pub name: &'static str,
    /// For TCP; a Unix socket never speaks TLS.
    pub tls: Option<Arc<Tls>>,
    /// Which requests get a line in the log.
    pub access_log: Arc<AccessLog>,
    /// From a connection's beginning, or a head's first byte, to the head's end.
    pub head_timeout: Duration,
    /// How long a connection may stay open between requests, or a client may leave an answer untaken.
    pub idle_timeout: Duration,
    /// From a head's end to the body's.
    pub body_timeout: Duration,
    /// The most bytes of a body.
    pub body_limit: usize,
    /// More than these, and the oldest without a complete head are closed.
    pub max_connections: usize,
    /// At the end: how long requests may take to finish.
    pub drain_timeout: Duration,
    /// At the end: how long a connection that looks idle stays open for a request that is on its way.
    pub drain_grace: Duration,
}

impl ListenerOptions {
    pub fn new(name: &'static str) -> Self {
        ListenerOptions {
            name,
            tls: None,
            access_log: Arc::default(),
            head_timeout: Duration::from_secs(10),
            // Longer than the 60 s after which load balancers and connection pools usually close, so that they do it.
            idle_timeout: Duration::from_secs(75),
            body_timeout: Duration::from_secs(10),
            body_limit: BODY_LIMIT,
            // 1,024 that may all be idle, and room for those that are busy meanwhile.
            max_connections: 1024 + 128,
            drain_timeout: Duration::from_secs(5),
            drain_grace: Duration::from_millis(100),
        }
    }
}

/// A socket that already queues connections; they are answered once it is served.
#[derive(Debug)]
pub struct BoundListener {
    socket: Socket,
    address: ListenAddress,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        /// Removes the file when the listener goes.
        _file: SocketFile,
    },
}

/// How a listener ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// Connections that were cut off since their requests did not finish in time.
    pub cut: usize,
}

impl BoundListener {
    /// Binds and listens. A Unix socket file left by a process that is gone is replaced; one that is in use, and any
    /// other file, is not. Must be called within a tokio runtime.
    pub fn bind(address: &ListenAddress) -> Result<Self, BindError> {
        let (socket, address) = match address {
            ListenAddress::Tcp(wanted) => {
                let bound = bind_tcp(*wanted).and_then(|listener| Ok((listener.local_addr()?, listener)));
                let (bound, listener) = bound.map_err(|source| BindError::Tcp { address: *wanted, source })?;
                (Socket::Tcp(listener), ListenAddress::Tcp(bound))
            }
            ListenAddress::Unix { path, mode } => {
                let (listener, file) = bind_unix(path, *mode)?;
                (Socket::Unix { listener, _file: file }, address.clone())
            }
        };
        Ok(BoundListener { socket, address })
    }

    /// Where it really listens: for port 0 the port that was given.
    pub fn local_addr(&self) -> &ListenAddress {
        &self.address
    }

    /// Serves until `shutdown`, then answers what was asked and returns. HTTP/1.1 and HTTP/2, over TLS (ALPN) or not
    /// (prior knowledge); [`Edge`] is put around `routes`; requests carry [`Peer`], [`super::middleware::RequestId`] and,
    /// where one was shown, [`super::certificate::ClientCertificate`] in their extensions.
    pub async fn serve(
        self,
        routes: impl Into<Routes>,
        options: ListenerOptions,
        shutdown: CancellationToken,
    ) -> Drained {
        let edge = Edge::new(routes, options.name, options.body_timeout)
            .with_body_limit(options.body_limit)
            .with_access_log(&options.access_log);
        let connections = Arc::new(Connections::new(edge, options.clone(), shutdown.clone()));
        let tasks = TaskTracker::new();
        let socket = self.socket;
        let accepting = Accepting { socket, connections, tasks, options, accepted: None, complained: None };
        accepting.run(shutdown).await
    }
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("listening on {address}; another process may hold the address, or it is not one of this host's")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("listening on unix:{}: its folder does not exist; create it", .path.display())]
    NoFolder { path: PathBuf },
    #[error("listening on unix:{}: a file that is no socket is there; remove it or choose another path", .path.display())]
    NotASocket { path: PathBuf },
    #[error("listening on unix:{}: another process answers there; stop it or choose another path", .path.display())]
    InUse { path: PathBuf },
    #[error("listening on unix:{}: {operation} failed; check the path's length and permissions", .path.display())]
    Unix { path: PathBuf, operation: &'static str, source: io::Error },
}

/// Raises this process's limit of open files as far as it may, since the usual soft limit of 1,024 is less than one
/// listener's connections. Returns the limit now; `None` is unlimited.
pub fn raise_open_file_limit() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    }
}

/// The accept loop.
struct Accepting {
    socket: Socket,
    connections: Arc<Connections>,
    tasks: TaskTracker,
    options: ListenerOptions,
    /// Waits for room; kept here so that it is not lost when the end comes meanwhile.
    accepted: Option<(Transport, Peer)>,
    complained: Option<Instant>,
}

impl Accepting {
    /// While every connection is busy, or the process has no more file descriptors, we look again this often.
    const PAUSE: Duration = Duration::from_millis(10);
    /// Connections that the kernel had already accepted when the end came.
    const LAST: usize = 4096;

    async fn run(mut self, shutdown: CancellationToken) -> Drained {
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.next() => {}
            }
        }
        self.spawn_accepted();
        // Whoever had connected before the end is served too.
        tokio::task::yield_now().await;
        for _ in 0..Self::LAST {
            let polled = poll_fn(|cx| Poll::Ready(self.socket.poll_accept(cx))).await;
            let Poll::Ready(Ok(accepted)) = polled else { break };
            self.accepted = Some(accepted);
            self.spawn_accepted();
        }
        let Accepting { socket, connections, tasks, options, .. } = self;
        drop(socket);
        tasks.close();
        if timeout(options.drain_timeout, tasks.wait()).await.is_ok() {
            return Drained { cut: 0 };
        }
        let cut = tasks.len();
        tracing::warn!(listener = options.name, cut, "requests did not finish in time and were cut off");
        connections.cut_off();
        tasks.wait().await;
        Drained { cut }
    }

    /// Accepts one connection, or deals with why there is none.
    async fn next(&mut self) {
        match poll_fn(|cx| self.socket.poll_accept(cx)).await {
            Ok(accepted) => {
                self.accepted = Some(accepted);
                while !self.connections.make_room() {
                    sleep(Self::PAUSE).await;
                }
                self.spawn_accepted();
            }
            Err(error) if lacks_resources(&error) => {
                self.complain(&error);
                self.connections.close_oldest();
                sleep(Self::PAUSE).await;
            }
            // The client gave up while it was queued: nothing of ours.
            Err(error) => tracing::debug!(listener = self.options.name, %error, "accepting a connection failed"),
        }
    }

    fn spawn_accepted(&mut self) {
        if let Some((transport, peer)) = self.accepted.take() {
            self.tasks.spawn(self.connections.clone().serve(transport, peer));
        }
    }

    /// At most once in ten seconds: the cause is seldom alone.
    fn complain(&mut self, error: &io::Error) {
        let now = Instant::now();
        if self.complained.is_none_or(|last| now.duration_since(last) > Duration::from_secs(10)) {
            self.complained = Some(now);
            tracing::warn!(listener = self.options.name, %error, "cannot accept connections; raise the limit of open files");
        }
    }
}

impl Socket {
    fn poll_accept(&self, cx: &mut std::task::Context<'_>) -> Poll<io::Result<(Transport, Peer)>> {
        match self {
            Socket::Tcp(listener) => listener.poll_accept(cx).map_ok(|(stream, address)| {
                // Answers are small and whole; waiting to fill a segment only delays them. It fails only on a socket
                // that is already gone.
                let _ = stream.set_nodelay(true);
                (Transport::Tcp(stream), Peer::Tcp(address))
            }),
            Socket::Unix { listener, .. } => listener.poll_accept(cx).map(|accepted| {
                let (stream, _) = accepted?;
                let cred = stream.peer_cred()?;
                let peer = Peer::Unix { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() };
                Ok((Transport::Unix(stream), peer))
            }),
        }
    }
}

fn lacks_resources(error: &io::Error) -> bool {
    let of_ours = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| of_ours.contains(&errno))
}

/// How many connections the kernel may queue; it takes less where its own limit (somaxconn) is smaller.
const BACKLOG: i32 = 4096;

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A restart must not wait for the last connections' TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG.unsigned_abs())
}

fn bind_unix(path: &Path, mode: u32) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |operation| {
        let path = path.to_owned();
        move |source: io::Error| BindError::Unix { path, operation, source }
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(BindError::NoFolder { path: path.to_owned() });
    }
    remove_stale(path)?;
    let address = SocketAddrUnix::new(path).map_err(|e| failed("naming the socket")(e.into()))?;
    let socket = unix_socket().map_err(|e| failed("making a socket")(e.into()))?;
    rustix::net::bind(&socket, &address).map_err(|e| failed("binding")(e.into()))?;
    let file = SocketFile::of(path).map_err(failed("reading the socket file"))?;
    // Nobody can connect before `listen`, so there is no moment with other permissions than these.
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, permissions).map_err(failed("setting the mode"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(|e| failed("listening")(e.into()))?;
    let listener = UnixListener::from_std(socket.into()).map_err(failed("registering"))?;
    Ok((listener, file))
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |operation| {
        let path = path.to_owned();
        move |source: io::Error| BindError::Unix { path, operation, source }
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("looking at what is there")(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    let address = SocketAddrUnix::new(path).map_err(|e| failed("naming the socket")(e.into()))?;
    let socket = unix_socket().map_err(|e| failed("making a socket")(e.into()))?;
    match rustix::net::connect(&socket, &address) {
        // EAGAIN: somebody listens and its queue is full.
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Err(BindError::InUse { path: path.to_owned() }),
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path).map_err(failed("removing the stale socket")),
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("asking whether somebody answers there")(error.into())),
    }
}

fn unix_socket() -> Result<rustix::fd::OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A socket file of ours; removed in the end, unless another process has put its own in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let found = std::fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), device: found.dev(), inode: found.ino() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |found: std::fs::Metadata| found.dev() == self.device && found.ino() == self.inode;
        if std::fs::symlink_metadata(&self.path).is_ok_and(ours)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket file could not be removed");
        }
    }
}
