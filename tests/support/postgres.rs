//! Real PostgreSQL servers: one for each test binary that its tests share, with a database each, and servers of their own
//! for tests that stop them or change how they work.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use jwksd::config::Secret;
use jwksd::store::postgres::{DEFAULT_SCHEMA, PostgresSettings, PostgresStore};
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::OnceCell;

use super::ports::ReservedPort;
use super::tools;

/// Of the superuser, and of every role that tests make.
pub const PASSWORD: &str = "n0t-a-s3cret";

/// Stops the server and removes its files when its input ends, which it does when the test's process ends, however that is.
const KEEPER: &str = r#"read -r _; "$1" -D "$2/data" -m immediate -s stop; rm -rf "$2""#;

/// A server with its files. PostgreSQL refuses to run as root, so then it runs as the user `postgres`.
pub struct PostgresServer {
    port: ReservedPort,
    folder: PathBuf,
    keeper: Child,
}

/// A server that stands still. Dropping this lets it go on.
pub struct Paused {
    processes: Vec<i32>,
}

impl Drop for Paused {
    fn drop(&mut self) {
        signal(&self.processes, Signal::CONT);
    }
}

/// A database of its own.
#[derive(Clone)]
pub struct Database {
    pub port: u16,
    pub name: String,
}

/// URLs of a database for each of the roles.
#[derive(Clone)]
pub struct Roles {
    pub owner: String,
    pub manager: String,
    pub signer: String,
}

impl PostgresServer {
    /// The one of this test binary, started by whoever asks first. What it stores does not outlive a crash of the machine.
    pub async fn shared() -> &'static PostgresServer {
        static SHARED: OnceCell<PostgresServer> = OnceCell::const_new();
        SHARED.get_or_init(|| PostgresServer::start(&[])).await
    }

    /// One of its own, with these settings beside the usual ones.
    pub async fn start(settings: &[(&str, &str)]) -> PostgresServer {
        let settings: Vec<(String, String)> =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        tokio::task::spawn_blocking(move || PostgresServer::start_blocking(&settings)).await.expect("it does not panic")
    }

    /// As [`start`](Self::start), in the network namespace of this thread.
    pub fn start_blocking(settings: &[(String, String)]) -> PostgresServer {
        let server = PostgresServer::empty();
        let password_file = server.folder.join("password");
        server.write("password", PASSWORD);
        let mut initdb = server.program("initdb");
        initdb.args(["--no-sync", "--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--locale=C"]);
        succeed(initdb.arg("--pwfile").arg(&password_file).arg("--pgdata").arg(server.data()));
        server.configure(&[
            ("listen_addresses", "127.0.0.1"),
            ("port", &server.port.number().to_string()),
            ("unix_socket_directories", &server.folder.display().to_string()),
            ("fsync", "off"),
            ("max_connections", "300"),
        ]);
        for (name, value) in settings {
            server.configure(&[(name, value)]);
        }
        server.resume();
        server.make_roles();
        server
    }

    /// By the file that users run; in the template, so that every database has the schema.
    fn make_roles(&self) {
        let psql = || {
            let mut psql = self.program("psql");
            psql.env("PGPASSWORD", PASSWORD).args(["--host=127.0.0.1", "--username=postgres", "--dbname=template1"]);
            psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--port", &self.port().to_string()]);
            psql
        };
        let roles = std::fs::read_to_string(tools::repository("deploy/postgres/roles.sql")).expect("it is there");
        succeed(psql().arg("--file").arg(self.write("roles.sql", &roles)));
        for role in ["jwksd_owner", "jwksd_manager", "jwksd_signer"] {
            succeed(psql().args(["--command", &format!("ALTER ROLE {role} PASSWORD '{PASSWORD}'")]));
        }
    }

    /// A standby of `primary` that follows it by streaming.
    pub fn standby_of(primary: &PostgresServer) -> PostgresServer {
        let server = PostgresServer::empty();
        let mut basebackup = server.program("pg_basebackup");
        basebackup.env("PGPASSWORD", PASSWORD).args(["--checkpoint=fast", "--write-recovery-conf", "--no-sync"]);
        let port = primary.port().to_string();
        basebackup.args(["--host=127.0.0.1", "--username=postgres", "--port", &port, "--pgdata"]).arg(server.data());
        succeed(&mut basebackup);
        server.configure(&[
            ("port", &server.port.number().to_string()),
            ("unix_socket_directories", &server.folder.display().to_string()),
        ]);
        server.resume();
        server
    }

    fn empty() -> PostgresServer {
        let port = ReservedPort::any();
        let name = format!("jwksd-postgres-{}-{}", std::process::id(), port.number());
        // Under the folder for temporary files, which the user `postgres` can reach, wherever the checkout is.
        let folder = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&folder);
        succeed(as_postgres(&mut Command::new("mkdir")).args(["-m", "0700"]).arg(&folder));
        let mut keeper = Command::new("sh");
        keeper.args(["-c", KEEPER, "sh"]).arg(tools::postgres_program("pg_ctl")).arg(&folder);
        // Out of reach of Ctrl-C: it ends after everybody else.
        as_postgres(&mut keeper).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let keeper = keeper.spawn().expect("sh starts");
        PostgresServer { port, folder, keeper }
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Changes settings; [`resume`](Self::resume) or [`reload`](Self::reload) brings them into force.
    pub fn configure(&self, settings: &[(&str, &str)]) {
        let path = self.data().join("postgresql.conf");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("initdb wrote it");
        for (name, value) in settings {
            writeln!(file, "{name} = '{value}'").expect("the disk has room");
        }
    }

    /// Puts a file beside the data, readable by the server alone.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.join(name);
        std::fs::write(&path, content).expect("the folder is writable");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("it is ours");
        let owner = user_of_postgres();
        std::os::unix::fs::chown(&path, owner.map(|(user, _)| user), owner.map(|(_, group)| group)).expect("root may");
        path
    }

    /// Starts it (again), and returns when it takes connections.
    pub fn resume(&self) {
        let log = self.folder.join("log");
        succeed(self.control().args(["-w", "-t", "60", "-s", "start", "-l"]).arg(log));
    }

    /// Stops it as a power failure would.
    pub fn kill(&self) {
        succeed(self.control().args(["-w", "-s", "-m", "immediate", "stop"]));
    }

    /// Makes a standby a primary, and returns when it is one.
    pub fn promote(&self) {
        succeed(self.control().args(["-w", "-s", "promote"]));
    }

    /// Stops it in good order, whoever is connected.
    pub fn stop(&self) {
        succeed(self.control().args(["-w", "-s", "-m", "fast", "stop"]));
    }

    /// While it is stopped: keeps a copy of its files.
    pub fn keep_copy(&self, name: &str) {
        let mut copy = Command::new("cp");
        succeed(as_postgres(&mut copy).arg("-a").arg(self.data()).arg(self.folder.join(name)));
    }

    /// While it is stopped: a copy takes the place of its files, and the other way around.
    pub fn exchange(&self, name: &str) {
        let (data, copy, aside) = (self.data(), self.folder.join(name), self.folder.join("aside"));
        for (from, to) in [(&data, &aside), (&copy, &data), (&aside, &copy)] {
            std::fs::rename(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        }
    }

    /// Lets nothing in it run until what is returned is dropped.
    pub fn pause(&self) -> Paused {
        let pids = std::fs::read_to_string(self.data().join("postmaster.pid")).expect("it runs");
        let postmaster: i32 = pids.lines().next().expect("a line").parse().expect("a process id");
        let mut processes = vec![postmaster];
        let children = format!("/proc/{postmaster}/task/{postmaster}/children");
        signal(&processes, Signal::STOP);
        let children = std::fs::read_to_string(children).expect("Linux tells the children");
        processes.extend(children.split_whitespace().map(|pid| pid.parse::<i32>().expect("a process id")));
        signal(&processes, Signal::STOP);
        Paused { processes }
    }

    /// Lets hosts of a network log in.
    pub fn let_in(&self, network: &str) {
        let path = self.data().join("pg_hba.conf");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("initdb wrote it");
        writeln!(file, "host all all {network} scram-sha-256").expect("the disk has room");
        self.reload();
    }

    pub fn reload(&self) {
        succeed(self.control().args(["-s", "reload"]));
    }

    /// A new database, empty.
    pub async fn database(&self) -> Database {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let maintenance = Database { port: self.port(), name: "postgres".to_owned() };
        maintenance.sql(&format!("CREATE DATABASE {name}")).await;
        Database { port: self.port(), name }
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn control(&self) -> Command {
        let mut control = self.program("pg_ctl");
        control.arg("-D").arg(self.data());
        control
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(tools::postgres_program(name));
        as_postgres(&mut command).current_dir(&self.folder);
        command
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

impl Database {
    pub fn url(&self) -> String {
        self.url_of("postgres", "127.0.0.1", self.port)
    }

    /// As another role, or by another way.
    pub fn url_of(&self, user: &str, host: &str, port: u16) -> String {
        format!("postgres://{user}:{PASSWORD}@{host}:{port}/{}?sslmode=disable", self.name)
    }

    /// A store over it whose tables are there.
    pub async fn store(&self) -> PostgresStore {
        let store = PostgresStore::new(settings(&self.url())).expect("the settings are good");
        store.migrate().await.expect("the superuser may make tables");
        store
    }

    /// Has the owner make the tables.
    pub async fn with_roles(&self) -> Roles {
        let url = |role: &str| self.url_of(role, "127.0.0.1", self.port);
        let roles = Roles { owner: url("jwksd_owner"), manager: url("jwksd_manager"), signer: url("jwksd_signer") };
        let owner = PostgresStore::new(settings(&roles.owner)).expect("the settings are good");
        owner.migrate().await.expect("the owner may make tables");
        roles
    }

    /// A connection of the test's own, as the superuser.
    pub async fn client(&self) -> tokio_postgres::Client {
        connect(&self.url()).await.expect("the server takes connections")
    }

    /// Runs statements as the superuser.
    pub async fn sql(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The first column of each row, as text, asked for as the superuser.
    pub async fn rows(&self, sql: &str) -> Vec<String> {
        let messages = self.client().await.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        let text = |message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
            _ => None,
        };
        messages.into_iter().filter_map(text).collect()
    }
}

/// Settings with short limits, so that what fails fails soon.
pub fn settings(url: &str) -> PostgresSettings {
    PostgresSettings {
        url: Secret::new(url.as_bytes()).expect("it is not empty"),
        ca_file: None,
        schema: DEFAULT_SCHEMA.to_owned(),
        statement_timeout: Duration::from_secs(3),
        connections: 4,
    }
}

/// A plain connection, without what the store does with its own.
pub async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The command as the user whom PostgreSQL runs as.
fn as_postgres(command: &mut Command) -> &mut Command {
    if let Some((user, group)) = user_of_postgres() {
        command.uid(user).gid(group);
    }
    command.current_dir(Path::new("/"))
}

/// User and group, where the tests run as root.
fn user_of_postgres() -> Option<(u32, u32)> {
    let id = |option: &str| {
        let output = Command::new("id").args([option, "postgres"]).output().expect("id is there");
        String::from_utf8_lossy(&output.stdout).trim().parse().expect("Debian's package makes the user `postgres`")
    };
    rustix::process::geteuid().is_root().then(|| (id("-u"), id("-g")))
}

/// Some may be gone.
fn signal(processes: &[i32], signal: Signal) {
    for pid in processes.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        let _ = kill_process(pid, signal);
    }
}

fn succeed(command: &mut Command) {
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
