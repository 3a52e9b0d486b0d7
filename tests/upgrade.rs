//! A rolling upgrade and its way back: three replicas over PostgreSQL and a signer behind them, each in turn replaced by
//! the other build while it rotates, signs and is verified. `tests/run` builds the commit before this one and names it
//! here.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod support;
#[path = "upgrade/traffic.rs"]
mod traffic;

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Method;

use support::ports::ReservedPort;
use support::postgres::{PostgresServer, Roles};
use support::{Daemon, eventually};
use traffic::Traffic;

pub const KEYSET: &str = "default";
pub const ISSUER: &str = "https://issuer.example.test";

/// Rotations are six seconds apart; a machine may be slow, but not without end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Propagation is exactly caches (`max_age`) + slowest verifier + `publish_lag` + σ: nothing is left over.
const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"

[keyset.default]
algorithm = "ES256"
[keyset.default.rotation]
every = "6s"
propagation = "4500ms"
verifiers = [{ name = "strict", cache = "1s" }]
[keyset.default.tokens]
max_ttl = "4s"
clock_skew = "500ms"
"#;

const TOKEN: &str = "a-token-of-signers-0123456789-0123456789-012345";

/// Three replicas and a signer without a store, in the order in which they are replaced.
struct Fleet {
    daemons: Vec<Daemon>,
    roles: Roles,
    _ports: Vec<ReservedPort>,
}

/// What `tests/run` built, and which commits that is about.
struct Previous {
    binary: Option<PathBuf>,
    told: String,
}

impl Previous {
    fn find() -> Self {
        let told = std::env::var("JWKSD_TEST_PREVIOUS_COMMIT").unwrap_or_else(|_| {
            "this build and this build: tests/run also builds the commit before, and names it".to_owned()
        });
        let binary = std::env::var_os("JWKSD_TEST_PREVIOUS").map(PathBuf::from);
        if let Some(path) = &binary {
            assert!(path.exists(), "{} is missing: run tests/run, which builds it", path.display());
        }
        Previous { binary, told }
    }
}

impl Fleet {
    async fn start(previous: &Previous) -> Self {
        let roles = PostgresServer::shared().await.database().await.with_roles().await;
        let ports: Vec<ReservedPort> = (0..3).map(|_| ReservedPort::any()).collect();
        let mut replicas: Vec<Daemon> = Vec::new();
        for port in &ports {
            let mut replica = replica(port, replicas.first());
            replica.set_binary(previous.binary.as_deref());
            replica.init(&roles).await;
            replica.restart().await;
            replicas.push(replica);
        }
        let mut signer = signer(&ports, &replicas[0]);
        signer.set_binary(previous.binary.as_deref());
        signer.restart().await;
        let mut daemons = vec![signer];
        daemons.extend(replicas);
        Fleet { daemons, roles, _ports: ports }
    }

    /// One by one, each after a key that was made since the one before it was replaced has signed everywhere.
    async fn replace_all(&mut self, binary: Option<PathBuf>, traffic: &Traffic) {
        for index in 0..self.daemons.len() {
            let daemon = &mut self.daemons[index];
            daemon.sigterm().await;
            daemon.set_binary(binary.as_deref());
            daemon.start_process().await;
            daemon.ready().await;
            traffic.rotates(PATIENCE).await;
            self.assert_nothing_is_frozen().await;
        }
    }

    async fn assert_nothing_is_frozen(&self) {
        for daemon in &self.daemons {
            let frozen = daemon.metrics().await.sum("jwksd_alarms", &[("alarm", "frozen")]);
            assert_eq!(frozen.unwrap_or_default(), 0.0, "{}", daemon.logs().join("\n"));
        }
    }

    /// What every replica shows of the keyring, once it is the same.
    async fn agrees(&self) {
        eventually("all replicas to be at one generation", PATIENCE, async || {
            let mut generations = Vec::new();
            for replica in &self.daemons[1..] {
                let answer = replica.admin(Method::GET, &format!("/keysets/{KEYSET}"), None).await;
                generations.push(answer.json()["generation"].as_u64()?);
            }
            let mut documents = Vec::new();
            for daemon in &self.daemons {
                documents.push(daemon.get("public", traffic::JWKS).await.text);
            }
            let same = generations.windows(2).all(|pair| pair[0] == pair[1]);
            (same && documents.windows(2).all(|pair| pair[0] == pair[1])).then_some(())
        })
        .await;
    }
}

fn replica(port: &ReservedPort, first: Option<&Daemon>) -> Daemon {
    let store = "kind = \"postgres\"\nurl_env = \"JWKSD_DATABASE_URL\"\nstate_path = \"state\"\n\
                 staleness_limit = \"10s\"\npublish_lag = \"2s\"";
    let replication = format!(
        "[replication]\nlisten = \"127.0.0.1:{}\"\n[replication.client.edge]\ntoken_file = \"edge.token\"\n",
        port.number()
    );
    let mut builder = Daemon::builder().replica_of(store).tables(TABLES).tables(&replication);
    if let Some(first) = first {
        builder = builder.seal(&seal_of(first));
    }
    let replica = builder.prepare();
    std::fs::write(replica.path("edge.token"), TOKEN).unwrap();
    replica
}

fn signer(ports: &[ReservedPort], first: &Daemon) -> Daemon {
    let urls: Vec<String> = ports.iter().map(|port| format!("\"http://127.0.0.1:{}\"", port.number())).collect();
    let store = format!(
        "kind = \"upstream\"\nurls = [{}]\ntoken_file = \"edge.token\"\nstate_path = \"state\"",
        urls.join(", ")
    );
    let signer = Daemon::builder().seal(&seal_of(first)).signer_of(&store).prepare();
    std::fs::write(signer.path("edge.token"), TOKEN).unwrap();
    signer
}

fn seal_of(first: &Daemon) -> String {
    format!("kind = \"file\"\npath = \"{}\"", first.path("seal.key").display())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_is_rejected_through_an_upgrade_and_its_way_back() {
    let previous = Previous::find();
    println!("rolling upgrade between {}", previous.told);
    let mut fleet = Fleet::start(&previous).await;
    let traffic = Traffic::start(&fleet.daemons);
    traffic.rotates(PATIENCE).await;

    // The tables first, by the new release; replicas of the one before go on with them.
    let roles = fleet.roles.clone();
    let migrating = fleet.daemons.last_mut().unwrap();
    migrating.set_binary(None);
    migrating.init(&roles).await;
    migrating.set_binary(previous.binary.as_deref());
    traffic.rotates(PATIENCE).await;

    fleet.replace_all(None, &traffic).await;
    fleet.replace_all(previous.binary, &traffic).await;

    let told = traffic.stop().await;
    println!("{told}");
    fleet.agrees().await;
    fleet.assert_nothing_is_frozen().await;
}
