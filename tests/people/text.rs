//! The same on the command line: rotations to come, keys over time, replicas.

use std::process::Output;

use jwksd::keyring::time::{Span, Timestamp};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::api::{Call, Description};
use crate::support::postgres::PostgresServer;
use crate::support::{Daemon, PATIENCE, eventually};

const PLANNED: &str = r#"
[public]
listen = "127.0.0.1:1"
[store]
kind = "file"
path = "nowhere/keyrings"
[seal]
kind = "file"
path = "nowhere/seal.key"
[issuer.main]
url = "https://auth.example.com"
[keyset.monthly]
algorithm = "ES256"
[keyset.tuesdays]
algorithm = "EdDSA"
[keyset.tuesdays.rotation]
schedule = "0 10 * * 2"
timezone = "Europe/Berlin"
successors = 1
"#;

fn plan(arguments: &[&str]) -> Output {
    plan_of(PLANNED, arguments)
}

fn plan_of(configuration: &str, arguments: &[&str]) -> Output {
    let folder = tempfile::TempDir::new().unwrap();
    std::fs::write(folder.path().join("jwksd.toml"), configuration).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.args(["--config", "jwksd.toml", "plan"]).args(arguments).current_dir(folder.path()).env_clear();
    let output = command.env("COLUMNS", "90").output().unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["jwksd.toml"], "nothing is made");
    output
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn times<'a>(plan: &'a Value, member: &str) -> Vec<&'a str> {
    plan["rotations"].as_array().unwrap().iter().map(|rotation| rotation[member].as_str().unwrap()).collect()
}

#[test]
fn a_plan_is_drawn_from_a_configuration_alone() {
    let drawn = text(&plan(&["monthly", "--from", "2026-11-24T10:00:00Z", "--for", "90d"]));
    assert!(drawn.lines().all(|line| line.chars().count() <= 110) && !drawn.contains('\u{1b}'), "{drawn}");
    let picture = drawn.lines().skip(1).take_while(|line| !line.contains("pending"));
    assert!(picture.clone().count() > 4 && picture.clone().all(|line| line.chars().count() <= 90), "{drawn}");
    for line in [
        "Tue 24 Nov 2026 10:00:00 UTC  key 1 is the first to sign",
        "Thu 24 Dec 2026 10:00:00 UTC  key 2 takes over from key 1, which leaves at 10:17:00",
        "Sat 23 Jan 2027 10:00:00 UTC  key 3 takes over from key 2",
    ] {
        assert!(drawn.contains(line), "{line} in {drawn}");
    }
    let all = text(&plan(&[]));
    assert!(
        all.contains("monthly") && all.contains("tuesdays") && all.contains("\"0 10 * * 2\" (Europe/Berlin)"),
        "{all}"
    );
}

#[test]
fn a_plan_follows_crontab_lines_through_daylight_saving_time() {
    let planned = text(&plan(&["tuesdays", "--from", "2026-10-12T00:00:00Z", "--for", "4w", "-o", "json"]));
    let planned: Value = serde_json::from_str(&planned).unwrap();
    let due = [
        "2026-10-12T00:00:00Z",
        "2026-10-13T08:00:00Z",
        "2026-10-20T08:00:00Z",
        "2026-10-27T09:00:00Z",
        "2026-11-03T09:00:00Z",
    ];
    assert_eq!(times(&planned, "at"), due, "10:00 in Berlin");
    assert_eq!(times(&planned, "trigger"), ["first", "schedule", "schedule", "schedule", "schedule"]);
    // Every phase begins where the one before it ends, and keys are published for a day before they sign.
    for lane in planned["keys"].as_array().unwrap() {
        let phases = lane["phases"].as_array().unwrap();
        assert!(lane["kid"].is_null(), "nothing is made: {lane}");
        assert!(phases.windows(2).all(|pair| pair[0]["until"] == pair[1]["from"]), "{lane}");
        let begin = |state: &str| phases.iter().find(|phase| phase["state"] == state).map(|phase| at(&phase["from"]));
        if let (Some(pending), Some(standby)) = (begin("pending"), begin("standby")) {
            assert_eq!(standby, pending + Span::DAY, "{lane}");
        }
    }
}

fn at(value: &Value) -> Timestamp {
    Timestamp::parse_rfc3339(value.as_str().unwrap()).unwrap()
}

#[test]
fn a_plan_without_end_stops_somewhere_and_says_where() {
    let quick = PLANNED.replace("[keyset.tuesdays]", "[keyset.monthly.rotation]\nevery = \"1m\"\npropagation = \"20s\"\n[keyset.monthly.tokens]\nmax_ttl = \"1s\"\nclock_skew = \"1s\"\n[keyset.tuesdays]");
    let quick = quick.replace("auth.example.com\"", "auth.example.com\"\nmax_age = \"5s\"");
    let planned =
        text(&plan_of(&quick, &["monthly", "--from", "2026-11-24T10:00:00Z", "--for", "3650d", "-o", "json"]));
    let planned: Value = serde_json::from_str(&planned).unwrap();
    let count = planned["rotations"].as_array().unwrap().len();
    assert!((100..1000).contains(&count), "{count}");
    assert!(planned["until"].as_str().unwrap().starts_with("2026-11-24T"), "{}", planned["until"]);
}

#[test]
fn a_plan_that_cannot_be_made_says_what_is_wrong() {
    for (arguments, words) in [
        (&["yearly"][..], "there is no keyset `yearly`: there are monthly, tuesdays"),
        (&["--for", "soon"], "--for: "),
        (&["--for", "0s"], "is not between a moment and ten years"),
        (&["--from", "tomorrow"], "neither an RFC 3339 time"),
    ] {
        let output = plan(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains(words), "{told}");
    }
    let output = plan_of(
        &PLANNED.replace("[keyset.monthly]", "[keyset.monthly.rotation]\npropagation = \"1s\"\n[keyset.monthly]"),
        &[],
    );
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("propagation"));
}

fn replica(first: Option<&Daemon>) -> Daemon {
    let store =
        "kind = \"postgres\"\nurl_env = \"JWKSD_DATABASE_URL\"\nstaleness_limit = \"10s\"\npublish_lag = \"2s\"";
    let tables = "[issuer.main]\nurl = \"https://issuer.example.test\"\nmax_age = \"1s\"\n[keyset.default]\nalgorithm = \"ES256\"\n\
                  [keyset.default.rotation]\nevery = \"30d\"\npropagation = \"4s\"\n\
                  [keyset.default.tokens]\nmax_ttl = \"10m\"\nclock_skew = \"500ms\"\n";
    let mut builder = Daemon::builder().replica_of(store).tables(tables);
    if let Some(first) = first {
        builder = builder.seal(&format!("kind = \"file\"\npath = \"{}\"", first.path("seal.key").display()));
    }
    builder.prepare()
}

async fn replicas(daemon: &Daemon) -> Value {
    Call::get(daemon, "admin", "/v1/replicas").expect(200).await.json()
}

/// What the first says of the second.
async fn other(daemon: &Daemon, until: impl Fn(&Value) -> bool) -> Value {
    eventually("the other replica to be told of", PATIENCE, async || {
        let list = replicas(daemon).await;
        list["replicas"].as_array().unwrap().get(1).cloned().filter(|other| until(other))
    })
    .await
}

#[tokio::test]
async fn replicas_over_postgres_are_told_with_what_they_show_and_lack() {
    let roles = PostgresServer::shared().await.database().await.with_roles().await;
    let mut first = replica(None);
    first.init(&roles).await;
    first.restart().await;
    first.ready().await;
    let mut second = replica(Some(&first));
    second.init(&roles).await;
    second.restart().await;
    second.ready().await;
    let up_to_date = |other: &Value| {
        let shown = &other["keysets"][0];
        other["live"] == true
            && other["publishes"] == true
            && shown["generation"].is_u64()
            && shown["lacks"] == json!([])
    };
    let told = other(&first, up_to_date).await;
    assert_eq!(
        (&told["role"], &told["publishes"], &told["own"]),
        (&json!("all"), &json!(true), &json!(false)),
        "{told}"
    );
    let list = replicas(&first).await;
    assert_eq!((&list["complete"], &list["replicas"][0]["own"]), (&json!(true), &json!(true)), "{list}");
    assert_eq!(list["replicas"][0]["name"], replicas(&second).await["replicas"][1]["name"]);
    let answer = Call::get(&first, "admin", "/v1/replicas").expect(200).await;
    Description::of(&first).await.check("GET", "/v1/replicas", &answer);

    // One that stands still lacks what the other makes, and after a while nobody waits for it.
    second.signal(Signal::STOP);
    let rotate = json!({ "allow_unpropagated": true });
    Call::post(&first, "admin", "/v1/keysets/default/rotate").json(&rotate).expect(200).await;
    let lagging = other(&first, |other| other["keysets"][0]["lacks"] != json!([])).await;
    assert!(lagging["keysets"][0]["lacks"][0]["kid"].is_string(), "{lagging}");
    other(&first, |other| other["live"] == false).await;
    let mut command = first.command(&["replicas"]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let drawn = text(&output);
    assert!(drawn.contains("here") && drawn.contains("silent") && drawn.contains("lacks default key"), "{drawn}");
    second.signal(Signal::CONT);
    other(&first, up_to_date).await;
}

#[tokio::test]
async fn a_running_keyset_is_drawn_below_its_table() {
    let daemon = crate::start().await;
    crate::standby(&daemon).await;
    let run = async |arguments: &[&str]| {
        let mut command = daemon.command(arguments);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        text(&output)
    };
    let table = run(&["status"]).await;
    let drawn = run(&["status", "--timeline"]).await;
    let rows = |text: &str| text.lines().take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(rows(&table), rows(&drawn), "the table stays as it is");
    assert!(
        !table.contains("now")
            && drawn.contains("now")
            && drawn.contains('█')
            && drawn.contains("takes over from key 1"),
        "{drawn}"
    );
    let told: Value = serde_json::from_str(&run(&["status", "default", "--timeline", "-o", "json"]).await).unwrap();
    let timeline = Call::get(&daemon, "admin", "/v1/keysets/default/timeline").expect(200).await;
    assert_eq!(told["timeline"]["rotations"], timeline.json()["rotations"]);
    assert_eq!(told["next_rotation"]["at"], told["timeline"]["rotations"][0]["at"], "the picture and the table agree");
    let description = Description::of(&daemon).await;
    description.check("GET", "/v1/keysets/{keyset}/timeline", &timeline);
    let wide = Call::get(&daemon, "admin", "/v1/keysets/default/timeline?past=1h&ahead=365d").expect(200).await.json();
    assert!(wide["rotations"].as_array().unwrap().len() >= 12, "{wide}");
    for query in ["ahead=never", "ahead=5000d", "past=-1h"] {
        let path = format!("/v1/keysets/default/timeline?{query}");
        assert_eq!(Call::get(&daemon, "admin", &path).expect(422).await.slug(), "value-not-allowed", "{query}");
    }
    Call::get(&daemon, "admin", "/v1/keysets/default/timeline?till=1h").expect(400).await;
    Call::get(&daemon, "admin", "/v1/keysets/other/timeline").expect(404).await;
}
