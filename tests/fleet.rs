//! A thousand signers without a store behind two managers over one PostgreSQL: all of them keep up through rotations, a
//! revocation and the restart of a manager, and the database does not notice how many there are. What that costs is
//! printed (`cargo test --test fleet -- --nocapture`); docs/upstream.md quotes it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "fleet/load.rs"]
mod load;
#[path = "fleet/signers.rs"]
mod signers;
mod support;

use std::sync::Arc;
use std::time::Duration;

use jwksd::http::listener::raise_open_file_limit;
use jwksd::seal::file::FileKey;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use load::{Load, Look, costliest, look};
use signers::{Common, Fleet, Requests};
use support::ports::ReservedPort;
use support::postgres::{Database, PostgresServer, Roles};
use support::{Daemon, eventually};

pub const KEYSET: &str = "default";

const FEW: usize = 10;
const MANY: usize = 1_000;

/// Longer than all of them together need for anything on a busy machine; each manages by itself in seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// For how long nothing happens while the load of that is taken.
const AT_REST: Duration = Duration::from_secs(15);

/// Signers look every 8 s (`publish_lag` / 3) and report every 5 to 6 s (`publish_lag` / 4), twice to three times as
/// often as with the default of a minute.
const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"

[keyset.default]
algorithm = "ES256"
[keyset.default.rotation]
every = "1h"
propagation = "30s"
successors = 3
verifiers = [{ name = "fleet", cache = "1s" }]
[keyset.default.tokens]
max_ttl = "10s"
clock_skew = "2s"
"#;

const TOKEN: &str = "a-token-of-signers-0123456789-0123456789-012345";

struct World {
    database: Database,
    managers: [Daemon; 2],
    fleet: Fleet,
    _ports: [ReservedPort; 2],
    _server: PostgresServer,
}

impl World {
    async fn start() -> Self {
        let counting =
            [("shared_preload_libraries", "pg_stat_statements"), ("pg_stat_statements.track_planning", "off")];
        let server = PostgresServer::start(&counting).await;
        let database = server.database().await;
        database.sql("CREATE EXTENSION pg_stat_statements").await;
        let roles = database.with_roles().await;
        let ports = [ReservedPort::any(), ReservedPort::any()];
        let first = manager(&roles, &ports[0], None).await;
        let second = manager(&roles, &ports[1], Some(&first)).await;
        let ca_file = first.path("authority.pem");
        let authority = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        std::fs::write(&ca_file, authority.cert.pem()).unwrap();
        let fleet = Fleet::new(Common {
            urls: ports.iter().map(|port| format!("http://127.0.0.1:{}", port.number())).collect(),
            token: TOKEN,
            ca_file,
            seal: Arc::new(FileKey::load(&first.path("seal.key")).unwrap()),
            requests: Arc::new(Requests::default()),
        });
        World { database, managers: [first, second], fleet, _ports: ports, _server: server }
    }

    async fn look(&self) -> Look {
        let managers: Vec<&Daemon> = self.managers.iter().collect();
        look(&self.database, self.fleet.requests(), &managers).await
    }

    async fn at_rest(&self) -> Load {
        let before = self.look().await;
        sleep(AT_REST).await;
        before.until(&self.look().await)
    }

    async fn keyset(&self) -> Value {
        let answer = self.managers[0].admin(Method::GET, &format!("/keysets/{KEYSET}"), None).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    /// A decision of an operator, and how it reaches everybody.
    async fn decide(&self, what: &str, method: Method, path: &str) -> String {
        let before = self.keyset().await["generation"].as_u64().unwrap();
        let decided = json!({ "reason": "a test" });
        let answer = self.managers[0].admin(method, &format!("/keysets/{KEYSET}/{path}"), Some(decided)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let at = Instant::now();
        let arrivals = self.arrivals(at, before + 1).await;
        let part = |part: usize| arrivals[(MANY * part).div_ceil(100) - 1].as_secs_f64();
        println!(
            "{what}: after {:.2} s half of the signers had it, after {:.2} s 99 %, after {:.2} s all",
            part(50),
            part(99),
            part(100)
        );
        self.keyset().await["active_kid"].as_str().unwrap().to_owned()
    }

    /// Since `at`, in order: when each signer showed a generation.
    async fn arrivals(&self, at: Instant, generation: u64) -> Vec<Duration> {
        let mut arrivals = Vec::new();
        let mut missing: Vec<_> = self.fleet.iter().collect();
        eventually("every signer to have it", PATIENCE, async || {
            let now = at.elapsed();
            missing.retain(|signer| {
                let has = signer.generation() >= generation;
                arrivals.extend(has.then_some(now));
                !has
            });
            missing.is_empty().then_some(())
        })
        .await;
        arrivals
    }

    /// Waits until no manager or signer is behind another.
    async fn settled(&self) {
        eventually("everybody to be at the newest generation", PATIENCE, async || {
            let newest = self.keyset().await["generation"].as_u64()?;
            self.fleet.iter().all(|signer| signer.generation() == newest).then_some(())
        })
        .await;
    }

    /// Every signer signs, and with this key.
    async fn assert_all_sign_with(&self, kid: &str) {
        for signer in self.fleet.iter() {
            assert!(!signer.is_frozen());
            assert_eq!(signer.signs_with().await, kid);
        }
    }
}

async fn manager(roles: &Roles, port: &ReservedPort, first: Option<&Daemon>) -> Daemon {
    let store = "kind = \"postgres\"\nurl_env = \"JWKSD_DATABASE_URL\"\nstate_path = \"state\"\n\
                 staleness_limit = \"1m\"\npublish_lag = \"24s\"";
    let replication = format!(
        "[replication]\nlisten = \"127.0.0.1:{}\"\n[replication.client.edge]\ntoken_file = \"edge.token\"\n",
        port.number()
    );
    let mut builder = Daemon::builder().manager_of(store).tables(TABLES).tables(&replication);
    if let Some(first) = first {
        builder = builder.seal(&format!("kind = \"file\"\npath = \"{}\"", first.path("seal.key").display()));
    }
    let mut manager = builder.prepare();
    std::fs::write(manager.path("edge.token"), TOKEN).unwrap();
    manager.init(roles).await;
    manager.restart().await;
    manager
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_signers_keep_up_and_the_database_does_not_notice() {
    let limit = raise_open_file_limit().unwrap_or(u64::MAX);
    assert!(limit >= 8 * MANY as u64, "only {limit} files may be open: raise the hard limit (ulimit -Hn)");
    let mut world = World::start().await;

    world.fleet.grow_to(FEW).await;
    world.settled().await;
    let few = world.at_rest().await;
    println!("{FEW} signers at rest, {few}");

    let begun = Instant::now();
    world.fleet.grow_to(MANY).await;
    println!("{MANY} signers started in {:.1} s", begun.elapsed().as_secs_f64());
    world.settled().await;
    let many = world.at_rest().await;
    println!("{MANY} signers at rest, {many}");
    assert!(
        many.statements_per_minute <= 3.0 * few.statements_per_minute + 120.0,
        "the database has more to do because of signers: {few} with {FEW}, {many} with {MANY}"
    );

    eventually("every successor to be ready", PATIENCE, async || {
        let keyset = world.keyset().await;
        let keys = keyset["keys"].as_array()?;
        (keys.iter().filter(|key| key["state"] == "standby").count() == 3).then_some(())
    })
    .await;
    let before = world.look().await;
    let first = world.keyset().await["active_kid"].as_str().unwrap().to_owned();
    let second = world.decide("a rotation", Method::POST, "rotate").await;
    world.assert_all_sign_with(&second).await;
    let third = world.decide("another rotation", Method::POST, "rotate").await;
    world.assert_all_sign_with(&third).await;
    let fourth = world.decide("a revocation", Method::POST, &format!("keys/{third}/revoke")).await;
    world.assert_all_sign_with(&fourth).await;
    assert_eq!(std::collections::BTreeSet::from([&first, &second, &third, &fourth]).len(), 4);
    println!("two rotations and a revocation, {}", before.until(&world.look().await));

    restart_one(&mut world).await;
    world.settled().await;
    world.assert_all_sign_with(&fourth).await;

    let before = world.look().await;
    let World { database, managers, fleet, _ports, _server } = world;
    let requests = fleet.requests().clone();
    fleet.stop().await;
    let gone = "SELECT count(*) FROM jwksd.replicas WHERE role = 'signer' AND NOT publishes";
    eventually("those that publish nothing to be forgotten", PATIENCE, async || {
        (database.rows(gone).await == ["0"]).then_some(())
    })
    .await;
    let after = look(&database, &requests, &managers.iter().collect::<Vec<_>>()).await;
    println!("all signers stop, {}", before.until(&after));
    println!("requests of signers in all: {requests}");
    println!("the database's costliest statements:\n    {}", costliest(&database).await);
}

/// Whoever was at that manager goes to the other one, each after a pause of its own; nobody misses anything.
async fn restart_one(world: &mut World) {
    let before = world.look().await;
    let begun = Instant::now();
    let requests = world.fleet.requests().clone();
    let counting = tokio::spawn(async move {
        let (mut most, mut last) = (0, requests.total());
        loop {
            sleep(Duration::from_secs(1)).await;
            let now = requests.total();
            most = most.max(now - last);
            last = now;
            if begun.elapsed() > Duration::from_secs(10) {
                return most;
            }
        }
    });
    world.managers[1].sigterm().await;
    world.decide("a hold, just after a manager stopped", Method::PUT, "hold").await;
    world.managers[1].start_process().await;
    world.managers[1].ready().await;
    let most = counting.await.unwrap();
    println!("its restart, {}; at most {most} requests in a second", before.until(&world.look().await));
}
