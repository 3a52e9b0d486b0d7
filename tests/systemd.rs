//! The daemon under systemd: what it says to the socket in `NOTIFY_SOCKET`, and that the unit in deploy/systemd is one that
//! systemd takes, lets the daemon do what it does and no more, and names only what there is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

#[path = "systemd/sandbox.rs"]
mod sandbox;
#[path = "systemd/unit.rs"]
mod unit;

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use jwksd::clock::{Clock as _, SystemClock};
use rustix::process::Signal;
use tempfile::TempDir;

use support::{Daemon, DaemonBuilder, PATIENCE};

const KEYSET: &str = "[issuer.main]\nurl = \"https://issuer.example.test\"\n[keyset.main]\nalgorithm = \"ES256\"\n";

/// Half of it is a fifth of a second.
const WATCHDOG_MICROSECONDS: &str = "400000";

/// A socket in the place of systemd's.
struct Notified {
    socket: tokio::net::UnixDatagram,
    /// As `NOTIFY_SOCKET` names it.
    name: String,
    _folder: TempDir,
}

impl Notified {
    fn at_a_path() -> Self {
        let folder = TempDir::new().unwrap();
        let name = folder.path().join("notify").display().to_string();
        Notified::with(UnixDatagram::bind(&name).unwrap(), name, folder)
    }

    fn at_an_abstract_address() -> Self {
        let folder = TempDir::new().unwrap();
        // As unlikely to be taken as the folder's.
        let name = folder.path().join("notify").display().to_string();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        Notified::with(UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}"), folder)
    }

    fn with(socket: UnixDatagram, name: String, folder: TempDir) -> Self {
        socket.set_nonblocking(true).unwrap();
        Notified { socket: tokio::net::UnixDatagram::from_std(socket).unwrap(), name, _folder: folder }
    }

    fn daemon(&self) -> DaemonBuilder {
        Daemon::builder().tables(KEYSET).env("NOTIFY_SOCKET", &self.name)
    }

    async fn message(&self) -> String {
        let mut buffer = [0; 4096];
        let arrival = tokio::time::timeout(PATIENCE, self.socket.recv(&mut buffer)).await;
        let length = arrival.unwrap_or_else(|_| panic!("no message within {PATIENCE:?}")).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    /// The next message that is not only a sign of life or a status.
    async fn notice(&self) -> String {
        loop {
            let message = self.message().await;
            if !message.starts_with("WATCHDOG=1") && !message.starts_with("STATUS=") {
                return message;
            }
        }
    }
}

#[tokio::test]
async fn systemd_hears_of_the_start_the_reloads_and_the_end_in_order() {
    for notified in [Notified::at_a_path(), Notified::at_an_abstract_address()] {
        let mut daemon = notified.daemon().prepare();
        daemon.spawn();
        assert_eq!(notified.message().await, "STATUS=Starting");
        assert_eq!(notified.message().await, "READY=1\nSTATUS=Serving 1 keyset");
        // That was no promise: it answers.
        assert_eq!(daemon.get("public", "/.well-known/jwks.json").await.status, 200);

        let before = SystemClock.monotonic();
        daemon.signal(Signal::HUP);
        let reloading = notified.notice().await;
        let told = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|rest| rest.split('\n').next());
        let told = Duration::from_micros(told.unwrap_or_else(|| panic!("{reloading}")).parse().unwrap());
        assert!((before..=SystemClock.monotonic()).contains(&(told + Duration::from_micros(1))), "{told:?}");
        assert_eq!(notified.notice().await, "READY=1\nSTATUS=Serving 1 keyset");

        std::fs::write(daemon.path("jwksd.toml"), "broken").unwrap();
        daemon.signal(Signal::HUP);
        assert!(notified.notice().await.starts_with("RELOADING=1\n"));
        let ready = notified.notice().await;
        assert!(ready.starts_with("READY=1\n") && ready.contains("invalid"), "it goes on: {ready}");

        let status = daemon.sigterm().await;
        assert!(status.success(), "{status}");
        let mut last = notified.notice().await;
        // The changed file may have been noticed besides the signal.
        while !last.starts_with("STOPPING=1") {
            assert!(last.starts_with("RELOADING=1") || last.starts_with("READY=1"), "{last}");
            last = notified.notice().await;
        }
        assert_eq!(last, "STOPPING=1\nSTATUS=Stopping");
        let nothing = notified.socket.try_recv(&mut [0; 16]).unwrap_err();
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock, "the end is the last that is heard");
    }
}

#[tokio::test]
async fn signs_of_life_come_at_half_the_interval() {
    let notified = Notified::at_a_path();
    let daemon = notified.daemon().env("WATCHDOG_USEC", WATCHDOG_MICROSECONDS).start().await;
    let began = SystemClock.monotonic();
    let mut signs = 0;
    while signs < 6 {
        signs += u32::from(notified.message().await.starts_with("WATCHDOG=1"));
    }
    let took = SystemClock.monotonic() - began;
    assert!(took < Duration::from_secs(10), "{took:?} for what should take a second");
    drop(daemon);
}

#[tokio::test]
async fn a_watchdog_that_waits_for_another_process_is_given_no_sign() {
    let notified = Notified::at_a_path();
    let builder = notified.daemon().env("WATCHDOG_USEC", WATCHDOG_MICROSECONDS).env("WATCHDOG_PID", "1");
    let mut daemon = builder.start().await;
    assert!(daemon.sigterm().await.success());
    for expected in ["STATUS=Starting", "READY=1\nSTATUS=Serving 1 keyset", "STOPPING=1\nSTATUS=Stopping"] {
        assert_eq!(notified.message().await, expected);
    }
}
