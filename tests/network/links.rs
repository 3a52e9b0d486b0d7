//! Networks of the test's own: namespaces, bridges between them, and links that are cut without a word.
//!
//! A namespace lives as long as somebody has it open, and nobody but this process and its children has: nothing is left
//! of it, however the test ends.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};

/// A network namespace.
pub struct Namespace {
    handle: File,
}

impl Namespace {
    /// A new one in which nothing but its loopback is up.
    pub fn new() -> Self {
        let handle = std::thread::scope(|scope| scope.spawn(leave_for_a_new_one).join().expect("it does not panic"));
        let handle = handle.unwrap_or_else(|error| {
            panic!(
                "network namespaces cannot be made here ({error}): run the tests as root, in a container with the \
                 capabilities SYS_ADMIN and NET_ADMIN"
            )
        });
        let namespace = Namespace { handle };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Runs something inside. Threads and processes that it starts belong there as well.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let entered = || {
            // SAFETY: the descriptor is open for as long as the call takes, and only this thread moves.
            let moved = unsafe { libc::setns(self.handle.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(moved, 0, "entering a namespace: {}", std::io::Error::last_os_error());
            inside()
        };
        let ended = std::thread::scope(|scope| scope.spawn(entered).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// `ip`, inside.
    pub fn ip(&self, arguments: &[&str]) {
        self.run(|| command("ip", arguments));
    }

    /// How other processes name it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd())
    }
}

fn leave_for_a_new_one() -> std::io::Result<File> {
    // SAFETY: of all that threads share only the network is given up, by this thread, which ends right after.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    File::open("/proc/thread-self/ns/net")
}

/// An Ethernet in the namespace of the test, which has the first address of its network there.
pub struct Bridge {
    name: &'static str,
    /// Such as `10.77.0`.
    network: &'static str,
}

impl Bridge {
    /// Inside of the namespace that this thread belongs to.
    pub fn new(name: &'static str, network: &'static str) -> Self {
        command("ip", &["link", "add", name, "type", "bridge"]);
        command("ip", &["address", "add", &format!("{network}.1/24"), "dev", name]);
        command("ip", &["link", "set", name, "up"]);
        Bridge { name, network }
    }

    pub fn address(&self, host: u8) -> String {
        format!("{}.{host}", self.network)
    }

    /// Gives a namespace an address, and a link to it.
    pub fn connect(&self, namespace: &Namespace, host: u8) -> Link {
        let (near, far) = (format!("{}-{host}", self.name), format!("{}0", self.name));
        let path = namespace.path();
        command("ip", &["link", "add", &near, "type", "veth", "peer", "name", &far, "netns", &path]);
        command("ip", &["link", "set", &near, "master", self.name, "up"]);
        namespace.ip(&["address", "add", &format!("{}/24", self.address(host)), "dev", &far]);
        namespace.ip(&["link", "set", &far, "up"]);
        Link { port: near, device: far }
    }
}

/// A cable between a namespace and a bridge.
pub struct Link {
    /// The end at the bridge.
    port: String,
    /// The end in the namespace.
    pub device: String,
}

impl Link {
    /// From now on the bridge drops all that comes or goes here. Neither side is told.
    pub fn cut(&self) {
        self.state("0");
    }

    pub fn heal(&self) {
        self.state("3");
    }

    /// A port's state of the spanning tree protocol: disabled or forwarding.
    fn state(&self, state: &str) {
        command("bridge", &["link", "set", "dev", &self.port, "state", state]);
    }
}

/// Between two hosts of a bridge: what one sends to the other goes to an address of Ethernet that nobody has.
pub fn lose(from: &Namespace, link: &Link, to: &str) {
    let nobody = ["lladdr", "02:00:00:00:00:01", "dev", &link.device, "nud", "permanent"];
    from.ip(&[["neigh", "replace", to].as_slice(), &nobody].concat());
}

pub fn find(from: &Namespace, link: &Link, to: &str) {
    from.ip(&["neigh", "del", to, "dev", &link.device]);
}

fn command(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}: tests/run installs iproute2"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
