//! A listener in a process that has run out of file descriptors. Alone in its binary, since the limit is the process's.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails; clippy.toml exempts only test functions")]

use std::os::fd::AsRawFd;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use jwksd::http::listener::{BoundListener, ListenAddress, ListenerOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn idle_connections_give_way_when_file_descriptors_run_out_and_accepting_does_not_spin() {
    let bound = BoundListener::bind(&ListenAddress::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
    let ListenAddress::Tcp(address) = *bound.local_addr() else { panic!("not TCP") };
    let mut clients = Vec::new();
    for _ in 0..60 {
        clients.push(TcpStream::connect(address).await.unwrap());
    }
    let highest = clients.last().unwrap().as_raw_fd();
    let limit = Rlimit { current: Some(highest as u64 + 20), ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, limit).unwrap();

    let router = Router::new().route("/", get(|| async { "hello" }));
    tokio::spawn(bound.serve(router, ListenerOptions::new("test"), CancellationToken::new()));
    let mut last = clients.pop().unwrap();
    last.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(20), last.read_to_string(&mut answer)).await.expect("no answer").unwrap();
    assert!(answer.ends_with("hello"), "{answer}");
    let cpu = cpu_time();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(cpu_time() - cpu < Duration::from_millis(100), "the listener spins");
}

/// The processor time of this process: fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    let ticks: u32 = after_name.split(' ').skip(11).take(2).map(|field| field.parse::<u32>().unwrap()).sum();
    Duration::from_millis(10) * ticks
}
