//! A proxy that passes bytes on, or swallows them: a network that was cut says nothing to either side.

use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Runs until it is dropped.
pub struct TcpProxy {
    port: u16,
    cut: Arc<watch::Sender<bool>>,
    task: JoinHandle<()>,
}

impl TcpProxy {
    /// Before a port of this machine.
    pub async fn before(target: u16) -> TcpProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let cut = Arc::new(watch::Sender::new(false));
        let task = tokio::spawn(serve(listener, target, cut.clone()));
        TcpProxy { port, cut, task }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on nothing arrives; connections are still taken.
    pub fn cut(&self) {
        self.cut.send_replace(true);
    }

    /// New connections work. Those that were cut stay silent, as behind a firewall that forgot them.
    pub fn heal(&self) {
        self.cut.send_replace(false);
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, target: u16, cut: Arc<watch::Sender<bool>>) {
    while let Ok((client, _)) = listener.accept().await {
        tokio::spawn(connection(client, target, cut.subscribe()));
    }
}

async fn connection(client: TcpStream, target: u16, cut: watch::Receiver<bool>) {
    if *cut.borrow() {
        // Held open, never read.
        let () = std::future::pending().await;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(pass(from_client, to_server, cut.clone()), pass(from_server, to_client, cut));
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut cut: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let read = tokio::select! {
            biased;
            _ = cut.wait_for(|cut| *cut) => break,
            read = from.read(&mut bytes) => read,
        };
        match read {
            Ok(count) if count > 0 && to.write_all(&bytes[..count]).await.is_ok() => {}
            _ => return,
        }
    }
    // Neither side learns of it.
    let () = std::future::pending().await;
}
