//! Processes that are pinned to a core and end with the benchmark.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server under test; killed when dropped.
pub struct Server {
    child: Child,
    name: String,
}

impl Server {
    /// Starts `command` on the server's core and waits until it takes connections at `address`.
    pub fn start(mut command: Command, address: SocketAddr) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut pinned = Command::new("taskset");
        pinned.arg("--cpu-list").arg(crate::SERVER.to_string()).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => pinned.env(key, value),
                None => pinned.env_remove(key),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            pinned.current_dir(folder);
        }
        command = pinned;
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = spawned.unwrap_or_else(|error| panic!("starting {name}: {error}"));
        let mut server = Server { child, name };
        server.wait_for(address);
        server
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// User and system time so far.
    pub fn cpu(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // SAFETY: it only reads a setting.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Duration::from_secs_f64(ticks as f64 / per_second as f64)
    }

    fn wait_for(&mut self, address: SocketAddr) {
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("{} ended at once: {status}", self.name);
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{} does not listen on {address}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pins the calling thread, and those it starts from now on.
pub fn pin(core: usize) {
    // SAFETY: the set is initialised by CPU_ZERO before it is read; the kernel only reads it.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_ZERO(&mut set);
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(result, 0, "core {core} cannot be used: {}", io::Error::last_os_error());
}

/// A port of this host that nobody has just now.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
