//! The client examples against the real daemon: each gets tokens from a daemon that starts after it and restarts
//! under it.

mod support;

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, UnixListener};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use support::strict_verifier::{Expected, StrictVerifier};
use support::{Daemon, DaemonBuilder, PATIENCE, tools};

const ISSUER: &str = "https://issuer.example.test";
const AUDIENCE: &str = "https://api.example.test";

/// Building with Go or starting a JVM on a busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(120);

#[tokio::test]
async fn the_go_client_outlives_restarts() {
    let program = tools::cache("clients").join("go-client");
    let mut build = Command::new(tools::go());
    build.arg("build").arg("-o").arg(&program).arg(example("go/client.go"));
    build.env("GOCACHE", tools::cache("go")).env("GOPATH", tools::cache("gopath")).env("GOTOOLCHAIN", "local");
    let built = timeout(BUILD_LIMIT, build.kill_on_drop(true).status()).await.expect("the build ends in time");
    assert!(built.expect("Go runs").success());
    outlives_restarts(on_unix_socket(), |daemon| {
        let mut client = Command::new(&program);
        client.arg(daemon.path("signer.sock"));
        client
    })
    .await;
}

#[tokio::test]
async fn the_node_client_outlives_restarts() {
    outlives_restarts(on_unix_socket(), |daemon| {
        let mut client = Command::new(tools::node());
        client.arg(example("node/client.mjs")).arg(daemon.path("signer.sock"));
        client
    })
    .await;
}

#[tokio::test]
async fn the_python_client_outlives_restarts() {
    outlives_restarts(on_unix_socket(), |daemon| {
        let mut client = Command::new(tools::python());
        client.arg(example("python/client.py")).arg(daemon.path("signer.sock"));
        client
    })
    .await;
}

#[tokio::test]
async fn the_java_client_outlives_restarts() {
    outlives_restarts(Daemon::builder().signer_with_token(), |daemon| {
        let mut client = Command::new(tools::java());
        client.arg(example("java/Client.java")).arg(daemon.url("signer", "")).arg(daemon.path("client.token"));
        client
    })
    .await;
}

#[test]
fn each_client_has_fewer_than_60_lines() {
    for client in ["go/client.go", "node/client.mjs", "python/client.py", "java/Client.java"] {
        let text = std::fs::read_to_string(example(client)).expect("it is in the repository");
        assert!(text.lines().count() < 60, "{client} has {} lines", text.lines().count());
    }
}

/// A keyset that joins an issuer which has keys already: nothing signs until its first key was published long enough.
const LATECOMER: &str = r#"
[keyset.latecomer]
algorithm = "ES256"
[keyset.latecomer.rotation]
propagation = "2100ms"
verifiers = [{ name = "ours", cache = "1s" }]
[keyset.latecomer.tokens]
clock_skew = "100ms"
"#;

/// `command` gives a client without its last two arguments.
async fn outlives_restarts(builder: DaemonBuilder, command: impl Fn(&Daemon) -> Command) {
    let tables =
        format!("[issuer.main]\nurl = \"{ISSUER}\"\nmax_age = \"1s\"\n\n[keyset.default]\nalgorithm = \"ES256\"\n");
    let mut daemon = builder.tables(&tables).start().await;
    daemon.sigterm().await;
    daemon.add_tables(LATECOMER);

    // At first something that hangs up, then nobody, then a daemon that answers 503.
    let mut client = Client::start(command(&daemon));
    client.ask_for("alice").await;
    hang_up_on_first_attempt(daemon.address("signer")).await;
    daemon.restart().await;
    verify(&daemon, &client.token().await, "alice").await;
    let not_yet = [("keyset", "latecomer"), ("reason", "no_active_key")];
    let refused = daemon.metrics().await.sum("jwksd_signing_failures_total", &not_yet);
    assert!(refused >= Some(1.0), "the client was never told to wait: {refused:?}");

    // The connection it holds breaks, and nobody answers for a while.
    daemon.kill9().await;
    client.ask_for("bob").await;
    daemon.restart().await;
    verify(&daemon, &client.token().await, "bob").await;

    // It has a good connection.
    client.ask_for("carol").await;
    verify(&daemon, &client.token().await, "carol").await;
}

/// Stands in the daemon's place until the client has tried once, which a JVM may need seconds for.
async fn hang_up_on_first_attempt(address: &str) {
    let attempt = async {
        match address.strip_prefix("unix:") {
            Some(path) => {
                let _ = std::fs::remove_file(path);
                drop(UnixListener::bind(path)?.accept().await?);
                std::fs::remove_file(path)
            }
            None => TcpListener::bind(address).await?.accept().await.map(drop),
        }
    };
    timeout(PATIENCE, attempt).await.expect("the client tries in time").expect("its attempt can be received");
}

async fn verify(daemon: &Daemon, token: &str, sub: &str) {
    let jwks_url = daemon.url("public", "/.well-known/jwks.json");
    let expected = Expected { iss: ISSUER.to_owned(), aud: AUDIENCE.to_owned(), alg: "ES256".to_owned() };
    let claims = StrictVerifier::new(jwks_url, Duration::ZERO).verify(token, &expected).await;
    assert_eq!(claims.map(|claims| claims["sub"].clone()), Ok(sub.into()));
}

/// A running client: subjects go in, tokens come out. Dropping it kills it.
struct Client {
    subjects: ChildStdin,
    tokens: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Client {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .args(["latecomer", AUDIENCE])
            .env("NO_PROXY", "127.0.0.1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let subjects = child.stdin.take().expect("it is piped");
        let tokens = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Client { subjects, tokens, _child: child }
    }

    async fn ask_for(&mut self, subject: &str) {
        self.subjects.write_all(format!("{subject}\n").as_bytes()).await.expect("the client reads its input");
    }

    async fn token(&mut self) -> String {
        let line = timeout(PATIENCE, self.tokens.next_line()).await.expect("a token in time");
        line.expect("the client's output can be read").unwrap_or_else(|| panic!("the client gave up"))
    }
}

fn on_unix_socket() -> DaemonBuilder {
    Daemon::builder().signer_on_unix_socket()
}

fn example(path: &str) -> PathBuf {
    tools::repository("examples/clients").join(path)
}
