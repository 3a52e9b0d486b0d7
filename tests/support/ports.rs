//! Ports that stay free while a daemon restarts.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::fs::{FlockOperation, flock};

/// A loopback port that no other test takes as long as this lives. It lies below the range from which the kernel serves
/// outgoing connections and port 0, so that nobody gets it by accident between two starts of a daemon.
pub struct ReservedPort {
    number: u16,
    /// Locked; other test processes respect it.
    _lock: File,
}

/// The lowest port tried.
const FIRST: u16 = 10_000;

impl ReservedPort {
    pub fn any() -> Self {
        static TRIED: AtomicU16 = AtomicU16::new(0);
        let range = first_ephemeral() - FIRST;
        // Processes begin at different places; the lock settles what coincides.
        let start = u16::try_from(std::process::id() % u32::from(range)).expect("a remainder is less than its divisor");
        let folder = std::env::temp_dir().join("jwksd-test-ports");
        std::fs::create_dir_all(&folder).expect("the folder for temporary files is writable");
        for _ in 0..range {
            let offset = (u32::from(start) + u32::from(TRIED.fetch_add(1, Ordering::Relaxed))) % u32::from(range);
            let number = FIRST + u16::try_from(offset).expect("it is less than the range");
            let lock = File::create(folder.join(number.to_string())).expect("the folder is writable");
            let ours = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
            if ours && TcpListener::bind((Ipv4Addr::LOCALHOST, number)).is_ok() {
                return Self { number, _lock: lock };
            }
        }
        panic!("no port between {FIRST} and {} is free", first_ephemeral());
    }

    pub fn number(&self) -> u16 {
        self.number
    }
}

fn first_ephemeral() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").expect("Linux tells the range");
    let first = range.split_whitespace().next().expect("it has two numbers").parse().expect("a port");
    assert!(first > FIRST, "outgoing connections take ports from {first} on: none is left to reserve");
    first
}
