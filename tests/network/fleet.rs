//! Five replicas and their PostgreSQL, each in a network namespace of its own.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::{Client, Method};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::links::{Bridge, Link, Namespace};
use crate::support::postgres::{Database, PostgresServer, connect};
use crate::support::tools::faketime_library;
use crate::support::{Answer, LogLine, Metrics, PATIENCE, Process, eventually, http_client};

pub const ISSUER: &str = "https://issuer.example.test";
/// For how long a verifier holds a document at most beyond `max-age`, the health checks of its balancer counted.
pub const VERIFIER_CACHE: Duration = Duration::from_secs(2);
/// The longest difference between two clocks that the managers' configuration allows, in seconds.
pub const SIGMA: f64 = 1.0;

/// What managers enforce. `propagation` covers `max_age`, verifiers, σ and `publish_lag`, 5 s, and 3 s more: the longest
/// that a replica may publish without being confirmed is 4 s. The overlap is 4 s + 2σ + S = 10 s.
const POLICY: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"

[keyset.main]
algorithm = "ES256"
[keyset.main.rotation]
every = "9s"
propagation = "8s"
successors = 1
verifiers = [{ name = "test", cache = "2s" }]
[keyset.main.tokens]
max_ttl = "4s"
default_ttl = "4s"
clock_skew = "1s"
"#;

/// Where PostgreSQL is on the network behind.
const DATABASE_HOST: u8 = 5;
/// Where the first replica is, on both networks.
const FIRST_HOST: u8 = 11;
const REPLICATION_TOKEN: &str = "a-token-of-replicas-that-nobody-guesses-0123456789";

/// What is in front of replicas (verifiers, health checks) and behind them (PostgreSQL, replication) are two networks.
pub struct Fleet {
    pub postgres: Postgres,
    pub replicas: Vec<Replica>,
    _bridges: [Bridge; 2],
    _folder: TempDir,
}

/// PostgreSQL in its namespace.
pub struct Postgres {
    server: PostgresServer,
    namespace: Namespace,
    _link: Link,
    address: String,
    database: Database,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Manager,
    /// A signer that reads the database.
    Signer,
    /// A signer that reads from the managers.
    Upstream,
}

pub struct Replica {
    pub face: Arc<Face>,
    pub kind: Kind,
    pub namespace: Namespace,
    pub front: Link,
    pub back: Link,
    pub back_address: String,
    /// What its clock is ahead of the test's, in seconds.
    pub skew: f64,
    process: Option<Process>,
    earlier_logs: Vec<String>,
}

/// What everybody else sees of a replica.
pub struct Face {
    pub name: &'static str,
    public: String,
    ops: String,
    folder: PathBuf,
    http: Client,
    signer: Option<Client>,
    admin: Option<Client>,
    /// Whoever reaches it may count on an answer.
    is_up: AtomicBool,
}

impl Fleet {
    /// Starts everything, PostgreSQL first. The namespace of the test is the one that this is called in.
    pub async fn start() -> Self {
        let (front, back) = (Bridge::new("front", "10.77.0"), Bridge::new("back", "10.78.0"));
        let authority = Authority::new();
        let postgres = Postgres::start(&back, &authority).await;
        let folder = TempDir::new().expect("a temporary folder");
        let plan = [
            ("manager-1", Kind::Manager, 0.0),
            ("manager-2", Kind::Manager, -0.4),
            ("signer-1", Kind::Signer, 0.4),
            ("signer-2", Kind::Signer, 0.0),
            ("upstream", Kind::Upstream, 0.0),
        ];
        let mut replicas = Vec::new();
        for (host, (name, kind, skew)) in (FIRST_HOST..).zip(plan) {
            let namespace = Namespace::new();
            let (front_link, back_link) = (front.connect(&namespace, host), back.connect(&namespace, host));
            let folder = folder.path().join(name);
            std::fs::create_dir(&folder).expect("the folder is new");
            let face = Arc::new(Face::new(name, kind, &front.address(host), folder));
            let back_address = back.address(host);
            let (front, back, process, earlier_logs) = (front_link, back_link, None, Vec::new());
            replicas.push(Replica { face, kind, namespace, front, back, back_address, skew, process, earlier_logs });
        }
        let mut fleet = Fleet { postgres, replicas, _bridges: [front, back], _folder: folder };
        fleet.write_files(&authority);
        fleet.initialise();
        // All at once: who comes first makes the keys.
        fleet.replicas.iter_mut().for_each(Replica::spawn);
        for replica in &fleet.replicas {
            replica.listens().await;
        }
        for replica in &fleet.replicas {
            replica.face.becomes_ready().await;
        }
        fleet
    }

    pub fn of(&mut self, name: &str) -> &mut Replica {
        self.replicas.iter_mut().find(|replica| replica.face.name == name).expect("it is one of the five")
    }

    pub fn faces(&self) -> Vec<Arc<Face>> {
        self.replicas.iter().map(|replica| replica.face.clone()).collect()
    }

    /// Certificates, tokens and configurations; what one replica has to itself is in its own folder.
    fn write_files(&self, authority: &Authority) {
        let urls: Vec<String> = self
            .replicas
            .iter()
            .filter(|replica| replica.kind == Kind::Manager)
            .map(|replica| format!("\"https://{}:8624\"", replica.back_address))
            .collect();
        for replica in &self.replicas {
            let write = |name: &str, content: &str| write_secret(&replica.face.folder.join(name), content);
            let (certificate, key) = authority.sign(&replica.back_address);
            write("tls.crt", &certificate);
            write("tls.key", &key);
            write("ca.crt", &authority.pem);
            write("replication.token", REPLICATION_TOKEN);
            let role = if replica.kind == Kind::Manager { "jwksd_manager" } else { "jwksd_signer" };
            write("database.url", &self.postgres.url(role));
            write("jwksd.toml", &replica.config(&urls.join(", ")));
        }
    }

    /// `jwksd init`, as the owner of the tables, where the first manager is; then everybody gets the seal key.
    fn initialise(&self) {
        let first = &self.replicas[0];
        let url = first.face.folder.join("database.url");
        write_secret(&url, &self.postgres.url("jwksd_owner"));
        let output = first.namespace.run(|| first.command(&["init"]).output()).expect("the binary is there");
        assert!(output.status.success(), "jwksd init: {}", String::from_utf8_lossy(&output.stderr));
        write_secret(&url, &self.postgres.url("jwksd_manager"));
        let made = |name: &str| std::fs::read(first.face.folder.join(name)).expect("init made it");
        for replica in &self.replicas[1..] {
            for name in ["seal.key", "admin.token"] {
                let path = replica.face.folder.join(name);
                std::fs::write(&path, made(name)).expect("the folder is writable");
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("it is ours");
            }
        }
    }
}

impl Postgres {
    async fn start(network: &Bridge, authority: &Authority) -> Self {
        let namespace = Namespace::new();
        let link = network.connect(&namespace, DATABASE_HOST);
        let address = network.address(DATABASE_HOST);
        let settings = [("listen_addresses".to_owned(), "*".to_owned())];
        let server = namespace.run(|| PostgresServer::start_blocking(&settings));
        let (certificate, key) = authority.sign(&address);
        let certificate = server.write("server.crt", &certificate).display().to_string();
        let key = server.write("server.key", &key).display().to_string();
        server.configure(&[("ssl", "on"), ("ssl_cert_file", &certificate), ("ssl_key_file", &key)]);
        server.let_in("10.78.0.0/24");
        let database = Database { port: server.port(), name: "jwksd".to_owned() };
        let postgres = Postgres { server, namespace, _link: link, address, database };
        let maintenance = Database { name: "postgres".to_owned(), ..postgres.database.clone() };
        let url = maintenance.url_of("postgres", &postgres.address, maintenance.port);
        let client = connect(&url).await.expect("the server takes connections");
        client.batch_execute("CREATE DATABASE jwksd").await.expect("the superuser may");
        postgres
    }

    /// What a replica is configured with: TLS, and nothing else.
    fn url(&self, role: &str) -> String {
        self.url_without_tls(role).replace("?sslmode=disable", "")
    }

    fn url_without_tls(&self, role: &str) -> String {
        self.database.url_of(role, &self.address, self.database.port)
    }

    /// Does something with the server where it runs.
    pub fn with<T: Send>(&self, act: impl FnOnce(&PostgresServer) -> T + Send) -> T {
        let server = &self.server;
        self.namespace.run(|| act(server))
    }

    /// What managers wrote.
    pub async fn documents(&self) -> Vec<(String, String)> {
        let client = connect(&self.url_without_tls("postgres")).await.expect("the server runs");
        let rows = client.query("SELECT document, encode(digest, 'hex') FROM jwksd.documents ORDER BY 1", &[]).await;
        rows.expect("the tables are there").iter().map(|row| (row.get(0), row.get(1))).collect()
    }
}

impl Replica {
    /// Starts it and waits until it listens.
    pub async fn start(&mut self) {
        self.spawn();
        self.listens().await;
    }

    async fn listens(&self) {
        self.log_line("its listeners", |line| line.message() == "listening" && line.field("listener") == "ops").await;
        self.face.is_up.store(true, Ordering::SeqCst);
    }

    fn spawn(&mut self) {
        let command = self.command(&["serve"]);
        let process = self.namespace.run(|| Process::start(command));
        self.process = Some(process);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.face.is_up.store(false, Ordering::SeqCst);
        let mut process = self.process.take().expect("it runs");
        process.child.kill().expect("a child that was not waited for can be killed");
        process.child.wait().expect("a child that was not waited for");
        self.earlier_logs.extend(process.output.lines());
    }

    pub async fn restart(&mut self) {
        self.kill();
        self.start().await;
    }

    /// Waits for a line of the log of the running process.
    pub async fn log_line(&self, what: &str, wanted: impl Fn(&LogLine) -> bool) -> LogLine {
        let process = self.process.as_ref().expect("it runs");
        let found = process.log_line(what, wanted).await;
        found.unwrap_or_else(|error| panic!("{}: {error}\n{}", self.face.name, self.transcript(40)))
    }

    /// Its last warnings and errors, and whatever is no log.
    pub fn transcript(&self, lines: usize) -> String {
        let logs = self.earlier_logs.iter().cloned();
        let logs = logs.chain(self.process.iter().flat_map(|process| process.output.lines()));
        let told: Vec<String> = logs.filter(|line| !line.contains("\"level\":\"INFO\"")).collect();
        format!("--- {} ---\n{}", self.face.name, told[told.len().saturating_sub(lines)..].join("\n"))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
        command.args(["--config", "jwksd.toml"]).args(arguments).current_dir(&self.face.folder);
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path))).env("RUST_BACKTRACE", "1");
        if self.skew != 0.0 {
            command.env("LD_PRELOAD", faketime_library()).env("FAKETIME", format!("{:+}", self.skew));
            // Of CLOCK_BOOTTIME as well: machines differ in what they call now, not in how time passes.
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
        }
        command
    }

    fn config(&self, managers: &str) -> String {
        let (front, back) = (&self.face.public, &self.back_address);
        let ops = &self.face.ops;
        let database = "[store]\nkind = \"postgres\"\nurl_file = \"database.url\"\nca_file = \"ca.crt\"\nstatement_timeout = \"1s\"\n\
                        state_path = \"state\"\n";
        let common = format!(
            "[public]\nlisten = \"{front}\"\n[ops]\nlisten = \"{ops}\"\n[log]\nformat = \"json\"\n[seal]\nkind = \
             \"file\"\npath = \"seal.key\"\n"
        );
        let signer = "role = \"signer\"\n[signer]\nlisten = \"unix:signer.sock\"\n";
        match self.kind {
            Kind::Manager => format!(
                "role = \"manager\"\n{common}[admin]\nlisten = \"unix:admin.sock\"\n[admin.token.operator]\nrole = \
                 \"operator\"\nfile = \"admin.token\"\n[replication]\nlisten = \"{back}:8624\"\n[replication.tls]\n\
                 cert_file = \"tls.crt\"\nkey_file = \"tls.key\"\n[replication.client.upstream]\ntoken_file = \
                 \"replication.token\"\n{database}staleness_limit = \"4s\"\npublish_lag = \"1s\"\n{POLICY}"
            ),
            Kind::Signer => format!("{signer}{common}{database}"),
            Kind::Upstream => format!(
                "{signer}{common}[store]\nkind = \"upstream\"\nurls = [{managers}]\ntoken_file = \
                 \"replication.token\"\nca_file = \"ca.crt\"\nstate_path = \"state\"\n"
            ),
        }
    }
}

impl Face {
    fn new(name: &'static str, kind: Kind, front: &str, folder: PathBuf) -> Self {
        let over = |socket: &str| http_client().unix_socket(folder.join(socket)).build().expect("a plain client");
        Face {
            name,
            public: format!("{front}:8620"),
            ops: format!("{front}:8623"),
            // Links are cut: a connection that is kept may lead nowhere.
            http: http_client().pool_max_idle_per_host(0).build().expect("a plain client"),
            signer: (kind != Kind::Manager).then(|| over("signer.sock")),
            admin: (kind == Kind::Manager).then(|| over("admin.sock")),
            is_up: AtomicBool::new(false),
            folder,
        }
    }

    pub fn is_up(&self) -> bool {
        self.is_up.load(Ordering::SeqCst)
    }

    pub fn signs(&self) -> bool {
        self.signer.is_some()
    }

    /// `/readyz` and the like.
    pub async fn ops(&self, path: &str, limit: Duration) -> Result<Answer, reqwest::Error> {
        read(self.http.get(format!("http://{}{path}", self.ops)).timeout(limit)).await
    }

    pub async fn jwks(&self, limit: Duration) -> Result<Answer, reqwest::Error> {
        read(self.http.get(format!("http://{}/.well-known/jwks.json", self.public)).timeout(limit)).await
    }

    /// Asks for a token that lives for so many seconds.
    pub async fn sign(&self, ttl: u64) -> Result<Answer, reqwest::Error> {
        let signer = self.signer.as_ref().expect("a signer");
        let body = json!({ "claims": { "sub": "s", "aud": "a" }, "ttl": ttl });
        read(signer.post("http://localhost/v1/keysets/main/sign").json(&body)).await
    }

    /// A call of a manager's admin API that succeeds; `path` is what follows the keyset.
    pub async fn admin(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let answer = self.try_admin(method, path, body).await.unwrap_or_else(|error| panic!("{path}: {error:?}"));
        assert!(matches!(answer.status, 200 | 204), "{} {path}: {}", self.name, answer.text);
        if answer.text.is_empty() { Value::Null } else { answer.json() }
    }

    pub async fn try_admin(&self, method: Method, path: &str, body: Option<Value>) -> Result<Answer, reqwest::Error> {
        let admin = self.admin.as_ref().expect("a manager");
        let token = std::fs::read_to_string(self.folder.join("admin.token")).expect("init made it");
        let request = admin.request(method, format!("http://localhost/v1/keysets/main{path}"));
        let request = request.bearer_auth(token.trim());
        read(match body {
            Some(body) => request.json(&body),
            None => request,
        })
        .await
    }

    /// The keyset, as a manager tells it.
    pub async fn keyset(&self) -> Value {
        self.admin(Method::GET, "", None).await
    }

    /// The sum of the samples that carry these labels.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let answer = self.ops("/metrics", PATIENCE).await.unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        Metrics(answer.text).sum(name, labels).unwrap_or_else(|| panic!("{} has no series {name}", self.name))
    }

    pub async fn becomes_ready(&self) {
        eventually(&format!("{} to be ready", self.name), PATIENCE, async || {
            let answer = self.ops("/readyz", PATIENCE).await.ok()?;
            (answer.status == 200).then_some(())
        })
        .await;
    }
}

/// Signs the certificates of servers.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().expect("the algorithm is known");
        let pem = params.self_signed(&key).expect("it is complete").pem();
        Authority { issuer: rcgen::Issuer::new(params, key), pem }
    }

    /// Certificate and key of an address, in PEM.
    fn sign(&self, address: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("the algorithm is known");
        let params = rcgen::CertificateParams::new([address.to_owned()]).expect("it is an address");
        (params.signed_by(&key, &self.issuer).expect("it is complete").pem(), key.serialize_pem())
    }
}

async fn read(request: reqwest::RequestBuilder) -> Result<Answer, reqwest::Error> {
    let response = request.send().await?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Ok(Answer { status, headers, text: response.text().await? })
}

/// Readable by the daemon alone.
fn write_secret(path: &Path, content: &str) {
    let written = std::fs::write(path, content)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)));
    written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
