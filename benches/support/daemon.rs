//! A daemon in a temporary folder: its configuration, its start, its end.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::Outcome;
use super::client::Connection;
use super::process::Process;

/// Longer than any start that is still worth measuring.
const PATIENCE: Duration = Duration::from_secs(600);

const LISTENERS: [&str; 4] = ["public", "signer", "admin", "ops"];

/// Listeners on ports that the system chooses, one operator, file store and file seal beside the configuration.
const SURROUNDINGS: &str = r#"
[log]
format = "json"
[public]
listen = "127.0.0.1:0"
[signer]
listen = "127.0.0.1:0"
[admin]
listen = "127.0.0.1:0"
[admin.token.operator]
role = "operator"
file = "admin.token"
[ops]
listen = "127.0.0.1:0"
[store]
kind = "file"
path = "keyrings"
initialise = "if-empty"
[seal]
kind = "file"
path = "seal.key"
"#;

/// Where daemons are started one after the other; it goes with what they stored.
pub struct Site {
    folder: TempDir,
    binary: PathBuf,
}

/// A running daemon. Dropping it kills it.
pub struct Daemon {
    child: Child,
    pub process: Process,
    addresses: BTreeMap<&'static str, SocketAddr>,
    operator: String,
    began: Instant,
}

impl Site {
    /// `tables` are issuers and keysets, in TOML.
    pub fn new(binary: PathBuf, tables: &str) -> Outcome<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("jwksd.toml"), format!("{SURROUNDINGS}\n{tables}"))?;
        Ok(Site { folder, binary })
    }

    /// Starts a daemon and waits until it listens.
    pub async fn start(&self) -> Outcome<Daemon> {
        let mut command = self.command("serve");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn()?;
        let log = child.stderr.take().ok_or("it has a pipe for its log")?;
        let (told, mut announced) = mpsc::unbounded_channel();
        std::thread::spawn(move || listen_to(BufReader::new(log), &told));
        let process = Process(child.id());
        let mut daemon = Daemon { child, process, addresses: BTreeMap::new(), operator: String::new(), began };
        while daemon.addresses.len() < LISTENERS.len() {
            let next = timeout(PATIENCE, announced.recv()).await.map_err(|_| "the daemon does not listen")?;
            let (listener, address) = next.ok_or("the daemon ended at its start; its log is above")?;
            daemon.addresses.insert(listener, address);
        }
        daemon.operator = std::fs::read_to_string(self.folder.path().join("admin.token"))?.trim().to_owned();
        Ok(daemon)
    }

    /// How long another command with the same configuration takes.
    pub async fn run(&self, command: &str) -> Outcome<Duration> {
        let mut command = self.command(command);
        let began = Instant::now();
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        Ok(began.elapsed())
    }

    fn command(&self, command: &str) -> Command {
        let mut process = Command::new(&self.binary);
        process.args([command, "--config", "jwksd.toml"]).current_dir(self.folder.path()).env_clear();
        process
    }
}

impl Daemon {
    /// Since it was started.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    pub async fn connect(&self, listener: &'static str) -> Outcome<Connection> {
        let address = self.addresses.get(listener).ok_or("a listener that was announced")?;
        let connection = Connection::open(*address).await?;
        Ok(match listener {
            "admin" => connection.with_token(self.operator.clone()),
            _ => connection,
        })
    }

    /// Sends SIGTERM, waits for its end, and says how long that took.
    pub async fn stop(mut self) -> Outcome<Duration> {
        let began = Instant::now();
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM)?;
        while self.child.try_wait()?.is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(began.elapsed())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads the log to its end, so that the daemon never waits for a reader; shows errors.
fn listen_to(log: impl BufRead, told: &mpsc::UnboundedSender<(&'static str, SocketAddr)>) {
    for line in log.lines().map_while(Result::ok) {
        if line.contains("\"ERROR\"") {
            eprintln!("{line}");
        }
        if line.contains("\"listening\"")
            && let Ok(line) = serde_json::from_str::<serde_json::Value>(&line)
        {
            let field = |name: &str| line.get(name).or_else(|| line.get("fields")?.get(name))?.as_str();
            let listener = LISTENERS.into_iter().find(|known| field("listener") == Some(known));
            if let (Some(listener), Some(Ok(address))) = (listener, field("address").map(str::parse)) {
                let _ = told.send((listener, address));
            }
        }
    }
}
