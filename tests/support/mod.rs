//! What the integration tests share: the real binary started on ports of its own, with its logs at hand.
//!
//! What this takes for granted of the daemon beyond DESIGN.md: with `[log] format = "json"` it writes one JSON object
//! per line to standard error, and for each listener one with the message `listening` and the fields `listener`
//! (`public`, `signer`, `admin`, `ops`) and `address` (`127.0.0.1:43210`, or `unix:` and a path). The fields may stand
//! beside the message or, as tracing-subscriber writes them by default, together with it under `fields`.

#![allow(dead_code, reason = "each test binary compiles this module and uses its own part of it")]

pub mod api;
pub mod kms_proxy;
pub mod localstack;
pub mod ports;
pub mod postgres;
pub mod receiver;
pub mod storage;
pub mod strict_verifier;
pub mod tcp_proxy;
pub mod tools;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Client, Method};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

/// How long anything that should happen at once may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// One request's time limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

const FILE_STORE: &str = "kind = \"file\"\npath = \"keyrings\"\ninitialise = \"if-empty\"";

/// A daemon to be started: listeners, store, seal and one operator are set up; issuers and keysets are the test's.
pub struct DaemonBuilder {
    tables: String,
    /// What stands in `[seal]` and below.
    seal: String,
    role: Role,
    /// What stands in `[store]`.
    store: String,
    /// Another build's than this one's.
    binary: Option<PathBuf>,
    signer: Signer,
    environment: Vec<(String, String)>,
}

/// Which listeners it has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    All,
    Manager,
    Signer,
}

/// Where applications reach the daemon, and how it knows them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signer {
    Loopback,
    LoopbackWithToken,
    UnixSocket,
}

/// A running daemon in a folder of its own. Dropping it kills it.
pub struct Daemon {
    builder: DaemonBuilder,
    folder: TempDir,
    listen: BTreeMap<&'static str, String>,
    /// They stay ours while it restarts.
    _ports: Vec<ports::ReservedPort>,
    process: Option<Process>,
    http: Client,
    /// What earlier processes of this daemon wrote.
    earlier_logs: Vec<String>,
}

/// An HTTP answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
}

/// The answer to a sign request.
#[derive(Clone, Debug, Deserialize)]
pub struct Signed {
    pub token: String,
    pub kid: String,
    pub alg: String,
    /// Unix seconds.
    pub expires_at: u64,
    pub expires_in: u64,
}

/// One scrape of `/metrics`.
#[derive(Debug)]
pub struct Metrics(pub String);

impl Daemon {
    pub fn builder() -> DaemonBuilder {
        let seal = "kind = \"file\"\npath = \"seal.key\"".to_owned();
        DaemonBuilder {
            tables: String::new(),
            seal,
            role: Role::All,
            store: FILE_STORE.to_owned(),
            binary: None,
            signer: Signer::Loopback,
            environment: Vec::new(),
        }
    }

    /// The address of a TCP listener with a path on it.
    pub fn url(&self, listener: &str, path: &str) -> String {
        let address = self.address(listener);
        assert!(!address.starts_with("unix:"), "the {listener} listener is a Unix socket");
        format!("http://{address}{path}")
    }

    /// `127.0.0.1:PORT` or `unix:PATH`, as the daemon announced it.
    pub fn address(&self, listener: &str) -> &str {
        self.listen.get(listener).unwrap_or_else(|| panic!("there is no listener {listener}"))
    }

    /// A file in the daemon's folder, which is also its working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub async fn get(&self, listener: &str, path: &str) -> Answer {
        self.request(Method::GET, listener, path, None).await
    }

    /// A request to any listener, with the operator's token on the admin one and the client's on the signer one.
    pub async fn request(&self, method: Method, listener: &str, path: &str, body: Option<Value>) -> Answer {
        let address = self.address(listener);
        let (client, url) = match address.strip_prefix("unix:") {
            Some(socket) => (
                http_client().unix_socket(PathBuf::from(socket)).build().expect("a client without TLS set-up"),
                format!("http://localhost{path}"),
            ),
            None => (self.http.clone(), format!("http://{address}{path}")),
        };
        let mut request = client.request(method, &url);
        if let Some(token) = self.token_for(listener) {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap_or_else(|error| panic!("{url}: {error:?}\n{}", self.transcript()));
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: response.text().await.unwrap_or_else(|error| panic!("{url}: body: {error}\n{}", self.transcript())),
        }
    }

    /// A call of the admin API; `path` is what follows `/v1`.
    pub async fn admin(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        self.request(method, "admin", &format!("/v1{path}"), body).await
    }

    /// Asks for a signature and hands back whatever comes.
    pub async fn sign_answer(&self, keyset: &str, request: Value) -> Answer {
        self.request(Method::POST, "signer", &format!("/v1/keysets/{keyset}/sign"), Some(request)).await
    }

    /// A token; anything but 200 fails the test.
    pub async fn sign(&self, keyset: &str, request: Value) -> Signed {
        let answer = self.sign_answer(keyset, request).await;
        assert_eq!(answer.status, 200, "sign with {keyset}: {}\n{}", answer.text, self.transcript());
        serde_json::from_value(answer.json()).expect("the members that DESIGN.md §7 promises")
    }

    pub async fn metrics(&self) -> Metrics {
        Metrics(self.get("ops", "/metrics").await.text)
    }

    /// Every line this daemon wrote to standard output and error, through restarts.
    pub fn logs(&self) -> Vec<String> {
        let mut lines = self.earlier_logs.clone();
        lines.extend(self.process.iter().flat_map(|process| process.output.lines()));
        lines
    }

    /// Waits for a log line of the running process that `wanted` accepts.
    pub async fn log_line(&self, what: &str, wanted: impl Fn(&LogLine) -> bool) -> LogLine {
        let process = self.process.as_ref().expect("the daemon runs");
        process.log_line(what, wanted).await.unwrap_or_else(|error| panic!("{error}\n{}", self.transcript()))
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").child.id()
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill9(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("the daemon runs");
        process.child.kill().expect("a child that was not waited for can be killed");
        self.finish(process).await
    }

    /// SIGTERM, and waits until it is gone.
    pub async fn sigterm(&mut self) -> ExitStatus {
        let process = self.process.take().expect("the daemon runs");
        rustix::process::kill_process(rustix::process::Pid::from_child(&process.child), rustix::process::Signal::TERM)
            .expect("a child that was not waited for can be signalled");
        self.finish(process).await
    }

    /// Adds TOML to the configuration of the next start.
    pub fn add_tables(&mut self, toml: &str) {
        let _ = writeln!(self.builder.tables, "{toml}");
    }

    /// Stops it if it runs, starts it again on the same addresses and waits until it is ready.
    pub async fn restart(&mut self) {
        if self.process.is_some() {
            self.sigterm().await;
        }
        self.start_process().await;
        self.ready().await;
    }

    /// Starts it on its addresses and waits for its listeners only.
    pub async fn start_process(&mut self) {
        if let Err(status) = self.try_start().await {
            panic!("the daemon ended at its start: {status}\n{}", self.transcript());
        }
    }

    /// As [`start_process`](Self::start_process), or the exit status of a daemon that ends before it listens.
    pub async fn try_start(&mut self) -> Result<(), ExitStatus> {
        self.spawn();
        self.listens().await
    }

    /// Starts it and waits for nothing.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "the daemon runs already");
        std::fs::write(self.path("jwksd.toml"), self.builder.config(&self.listen)).expect("the folder is writable");
        let mut command = Command::new(self.builder.binary());
        command.args(["serve", "--config", "jwksd.toml"]).current_dir(self.folder.path());
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path))).env("RUST_BACKTRACE", "1");
        command.envs(self.builder.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::start(command));
        self.http = http_client().build().expect("a client without TLS set-up");
    }

    /// Waits for the listeners of a process that was started, or for its exit status.
    pub async fn listens(&mut self) -> Result<(), ExitStatus> {
        for listener in self.builder.listeners() {
            let wanted = |line: &LogLine| line.message() == "listening" && line.field("listener") == listener;
            let process = self.process.as_ref().expect("the daemon was started");
            match process.log_line(&format!("the {listener} listener"), wanted).await {
                Ok(line) => self.listen.insert(listener, line.field("address").to_owned()),
                Err(_) if process.output.has_ended() => return Err(self.ended().await),
                Err(error) => panic!("{error}\n{}", self.transcript()),
            };
        }
        Ok(())
    }

    /// Waits until it ends by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let process = self.process.take().expect("the daemon runs");
        self.finish(process).await
    }

    /// Sends SIGHUP, SIGTERM or another signal and waits for nothing.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let process = self.process.as_ref().expect("the daemon runs");
        rustix::process::kill_process(rustix::process::Pid::from_child(&process.child), signal)
            .expect("a child that was not waited for can be signalled");
    }

    /// Replaces the test's own part of the configuration of the next start.
    pub fn set_tables(&mut self, toml: &str) {
        self.builder.tables = toml.to_owned();
    }

    /// Has the next start run another build, or with `None` this one.
    pub fn set_binary(&mut self, path: Option<&Path>) {
        self.builder.binary = path.map(Path::to_owned);
    }

    /// Replaces what stands in `[seal]` at the next start.
    pub fn set_seal(&mut self, toml: &str) {
        self.builder.seal = toml.to_owned();
    }

    /// Replaces what stands in `[store]` at the next start.
    pub fn set_store(&mut self, toml: &str) {
        self.builder.store = toml.to_owned();
    }

    /// Writes the configuration as it would be with this in `[store]`, as a file of its own.
    pub fn write_config(&mut self, name: &str, store: &str) {
        let own = std::mem::replace(&mut self.builder.store, store.to_owned());
        let config = self.builder.config(&self.listen);
        self.builder.store = own;
        std::fs::write(self.path(name), config).expect("the folder is writable");
    }

    /// Runs the binary with another command beside the daemon, in its folder, with its configuration and environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        std::fs::write(self.path("jwksd.toml"), self.builder.config(&self.listen)).expect("the folder is writable");
        let mut command = Command::new(self.builder.binary());
        command.args(["--config", "jwksd.toml"]).args(arguments).current_dir(self.folder.path());
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.envs(self.builder.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Has the owner of the database run `jwksd init`, which also makes what the daemon needs in its folder. Its own URL is in
    /// `JWKSD_DATABASE_URL` from then on.
    pub async fn init(&mut self, roles: &postgres::Roles) {
        self.set_env("JWKSD_DATABASE_URL", Some(&roles.owner));
        let mut init = self.command(&["init"]);
        let output = tokio::task::spawn_blocking(move || init.output().expect("the binary starts"));
        let output = output.await.expect("it does not panic");
        assert!(output.status.success(), "jwksd init: {}", String::from_utf8_lossy(&output.stderr));
        self.set_env("JWKSD_DATABASE_URL", Some(&roles.manager));
    }

    /// Sets, or with `None` removes, a variable in the environment of the next start.
    pub fn set_env(&mut self, name: &str, value: Option<&str>) {
        self.builder.environment.retain(|(known, _)| known != name);
        self.builder.environment.extend(value.map(|value| (name.to_owned(), value.to_owned())));
    }

    /// Waits until `/readyz` answers 200.
    pub async fn ready(&self) {
        eventually("/readyz to be 200", PATIENCE, async || {
            let answer = self.get("ops", "/readyz").await;
            (answer.status == 200).then_some(())
        })
        .await;
    }

    fn token_for(&self, listener: &str) -> Option<String> {
        let file = match (listener, self.builder.signer) {
            ("admin", _) => "admin.token",
            ("signer", Signer::LoopbackWithToken) => "client.token",
            _ => return None,
        };
        Some(read(&self.path(file)).trim().to_owned())
    }

    async fn finish(&mut self, mut process: Process) -> ExitStatus {
        process.output.ended().await.unwrap_or_else(|error| panic!("{error}\n{}", process.output.lines().join("\n")));
        let status = process.child.wait().expect("a child that was not waited for");
        self.earlier_logs.extend(process.output.lines());
        status
    }

    fn transcript(&self) -> String {
        let logs = self.logs();
        format!("--- the daemon's last lines ---\n{}", logs[logs.len().saturating_sub(60)..].join("\n"))
    }
}

impl DaemonBuilder {
    /// Adds TOML: issuers, keysets, defaults.
    pub fn tables(mut self, toml: &str) -> Self {
        let _ = writeln!(self.tables, "{toml}");
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Replaces what stands in `[seal]`.
    pub fn seal(mut self, toml: &str) -> Self {
        self.seal = toml.to_owned();
        self
    }

    /// Makes it a process of the role `signer`; `toml` stands in its `[store]`.
    pub fn signer_of(self, toml: &str) -> Self {
        self.with_store(Role::Signer, toml)
    }

    /// Makes it a process of the role `manager`; `toml` stands in its `[store]`.
    pub fn manager_of(self, toml: &str) -> Self {
        self.with_store(Role::Manager, toml)
    }

    /// Leaves it the role `all`; `toml` stands in its `[store]`.
    pub fn replica_of(self, toml: &str) -> Self {
        self.with_store(Role::All, toml)
    }

    fn with_store(mut self, role: Role, toml: &str) -> Self {
        self.role = role;
        self.store = toml.to_owned();
        self
    }

    fn binary(&self) -> &Path {
        self.binary.as_deref().unwrap_or(Path::new(env!("CARGO_BIN_EXE_jwksd")))
    }

    fn listeners(&self) -> impl Iterator<Item = &'static str> + use<> {
        let signer = (self.role != Role::Manager).then_some("signer");
        let admin = (self.role != Role::Signer).then_some("admin");
        ["public"].into_iter().chain(signer).chain(admin).chain(["ops"])
    }

    /// Applications come over a Unix socket instead of loopback TCP.
    pub fn signer_on_unix_socket(mut self) -> Self {
        self.signer = Signer::UnixSocket;
        self
    }

    /// Applications show the token in `client.token`, which is made here.
    pub fn signer_with_token(mut self) -> Self {
        self.signer = Signer::LoopbackWithToken;
        self
    }

    /// Starts the daemon and waits until it is ready.
    pub async fn start(self) -> Daemon {
        let mut daemon = self.prepare();
        daemon.start_process().await;
        daemon.ready().await;
        daemon
    }

    /// Makes the folder and starts nothing; `start_process` or `restart` does.
    pub fn prepare(self) -> Daemon {
        let folder = TempDir::new().expect("a temporary folder");
        let mut reserved = Vec::new();
        let mut listen = BTreeMap::new();
        for listener in self.listeners() {
            let address = if listener == "signer" && self.signer == Signer::UnixSocket {
                format!("unix:{}", folder.path().join("signer.sock").display())
            } else {
                reserved.push(ports::ReservedPort::any());
                format!("127.0.0.1:{}", reserved[reserved.len() - 1].number())
            };
            listen.insert(listener, address);
        }
        if self.signer == Signer::LoopbackWithToken {
            write_secret(&folder.path().join("client.token"), "a-token-long-enough-to-be-taken-for-one-0123456789");
        }
        let http = http_client().build().expect("a client without TLS set-up");
        Daemon { builder: self, folder, listen, _ports: reserved, process: None, http, earlier_logs: Vec::new() }
    }

    fn config(&self, listen: &BTreeMap<&str, String>) -> String {
        let mut toml = match self.role {
            Role::All => String::new(),
            Role::Manager => "role = \"manager\"\n\n".to_owned(),
            Role::Signer => "role = \"signer\"\n\n".to_owned(),
        };
        for (listener, address) in listen {
            let _ = writeln!(toml, "[{listener}]\nlisten = \"{address}\"\n");
        }
        if self.signer == Signer::LoopbackWithToken {
            let _ = writeln!(toml, "[signer.client.app]\ntoken_file = \"client.token\"\n");
        }
        toml.push_str("[log]\nformat = \"json\"\n\n");
        if self.role != Role::Signer {
            toml.push_str("[admin.token.operator]\nrole = \"operator\"\nfile = \"admin.token\"\n\n");
        }
        let _ = writeln!(toml, "[store]\n{}\n", self.store);
        let _ = writeln!(toml, "[seal]\n{}\n", self.seal);
        toml + &self.tables
    }
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text)
            .unwrap_or_else(|error| panic!("{error} in answer {}: {}", self.status, self.text))
    }
}

impl Metrics {
    /// The sum of all samples of this name that carry these labels; `None` when there is no such series.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.0
            .lines()
            .filter_map(|line| {
                let (series, value) = line.rsplit_once(' ')?;
                let (series_name, series_labels) = series.split_once('{').unwrap_or((series, ""));
                let carries = |(label, wanted): &(&str, &str)| series_labels.contains(&format!("{label}=\"{wanted}\""));
                (series_name == name && labels.iter().all(carries)).then(|| value.parse::<f64>().ok())?
            })
            .reduce(|sum, value| sum + value)
    }
}

/// A line of the daemon's log; plain text counts as a message.
#[derive(Clone, Debug)]
pub struct LogLine(pub Value);

impl LogLine {
    fn parse(line: &str) -> Self {
        LogLine(serde_json::from_str(line).unwrap_or_else(|_| serde_json::json!({ "message": line })))
    }

    pub fn message(&self) -> &str {
        self.field("message")
    }

    /// A field as text; empty when it is missing or not a string.
    pub fn field(&self, name: &str) -> &str {
        [&self.0[name], &self.0["fields"][name]].into_iter().find_map(Value::as_str).unwrap_or_default()
    }
}

/// A child process whose output threads collect. Dropping it kills it.
pub struct Process {
    pub child: Child,
    pub output: Arc<Output>,
}

/// The lines a process has written so far, and whether it can still write more.
pub struct Output {
    state: watch::Sender<(Vec<String>, usize)>,
}

impl Process {
    /// Starts `command`, collecting standard output and standard error.
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let output = Arc::new(Output { state: watch::Sender::new((Vec::new(), 2)) });
        output.collect(child.stdout.take().expect("it is piped"));
        output.collect(child.stderr.take().expect("it is piped"));
        Process { child, output }
    }

    /// Waits for a line that `wanted` accepts; an error when the process ends or patience does.
    pub async fn log_line(&self, what: &str, wanted: impl Fn(&LogLine) -> bool) -> Result<LogLine, String> {
        let mut seen = 0;
        let mut state = self.output.state.subscribe();
        let search = async {
            loop {
                {
                    let (lines, open_streams) = &*state.borrow_and_update();
                    if let Some(line) = lines[seen..].iter().map(|line| LogLine::parse(line)).find(&wanted) {
                        return Ok(line);
                    }
                    seen = lines.len();
                    if *open_streams == 0 {
                        return Err(format!("the process ended before its log told of {what}"));
                    }
                }
                state.changed().await.expect("the sender lives as long as the process");
            }
        };
        tokio::time::timeout(PATIENCE, search)
            .await
            .unwrap_or_else(|_| Err(format!("its log did not tell of {what} within {PATIENCE:?}")))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    pub fn lines(&self) -> Vec<String> {
        self.state.borrow().0.clone()
    }

    pub fn has_ended(&self) -> bool {
        self.state.borrow().1 == 0
    }

    /// Waits until the process has closed both streams, as it does by ending.
    pub async fn ended(&self) -> Result<(), String> {
        let mut state = self.state.subscribe();
        match tokio::time::timeout(PATIENCE, state.wait_for(|(_, open_streams)| *open_streams == 0)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(format!("the process did not end within {PATIENCE:?}")),
        }
    }

    fn collect(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let output = Arc::clone(self);
        std::thread::spawn(move || {
            // A line that cannot be read ends the collection as the end of the stream does.
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                output.state.send_modify(|(lines, _)| lines.push(line));
            }
            output.state.send_modify(|(_, open_streams)| *open_streams -= 1);
        });
    }
}

/// Asks again, 20 ms apart, until there is a value: for what announces itself by no event. `limit` fails the test.
pub async fn eventually<T>(what: &str, limit: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let attempts = async {
        loop {
            if let Some(value) = ask().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(limit, attempts).await.unwrap_or_else(|_| panic!("waited {limit:?} for {what}"))
}

/// The wall clock since the Unix epoch: verifiers of the tests' own judge `nbf` and `exp` by it.
#[expect(clippy::disallowed_methods, reason = "a verifier in another process has a clock of its own")]
pub fn unix_now() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("the clock shows a time after 1970")
}

/// Loopback only, whatever proxies the environment names.
pub fn http_client() -> reqwest::ClientBuilder {
    Client::builder().no_proxy().timeout(REQUEST_TIMEOUT)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn write_secret(path: &Path, secret: &str) {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(secret.as_bytes()))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
