//! Schemathesis against a running daemon: requests made from its own description, sound and unsound ones, to every operation of
//! every listener. No answer is a 5xx, every one fits its schema, and what the description allows is not called malformed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use support::ports::ReservedPort;
use support::{Daemon, tools};

/// Schemathesis draws its requests from it.
const SEED: &str = "20261122";

/// Keys are ready within seconds, so that they can be rotated, rolled back and revoked. Nothing here degrades the daemon.
const STORE: &str =
    "kind = \"file\"\npath = \"keyrings\"\ninitialise = \"if-empty\"\nstaleness_limit = \"1s\"\npublish_lag = \"1s\"";
const TABLES: &str = r#"
[replication.client.signers]
token_file = "signers.token"

[issuer.main]
url = "https://auth.example.com"
max_age = "1s"

[defaults.rotation]
propagation = "3s"

[defaults.tokens]
clock_skew = "1s"
required_claims = []

[keyset.default]
algorithm = "ES256"
backend = "local"

[keyset.spare]
algorithm = "EdDSA"
backend = "local"
"#;

/// A listener, the operations it serves (by their tag), and the file of the token it asks for.
struct Listener {
    tag: &'static str,
    token: Option<&'static str>,
    url: String,
    /// What Schemathesis is to know beside the description, in its own configuration's words.
    settings: String,
}

/// What is refused for what it asks for: unknown names, states and rules that no schema tells. A 400 would say that the
/// request is malformed, which what the description allows is not.
const EXPECTED: &str = r#""2xx", "3xx", "401", "403", "404", "409", "412", "413", "422""#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_answers_as_the_description_says() {
    let port = ReservedPort::any();
    let replication = format!("127.0.0.1:{}", port.number());
    let tables = format!("[replication]\nlisten = \"{replication}\"\n{TABLES}");
    let mut daemon = Daemon::builder().replica_of(STORE).signer_with_token().tables(&tables).prepare();
    std::fs::write(daemon.path("signers.token"), "a-token-for-signers-that-is-long-enough-0123456789").unwrap();
    daemon.restart().await;
    let description = daemon.get("admin", "/openapi.json").await.json();
    std::fs::write(daemon.path("openapi.json"), description.to_string()).unwrap();

    let url = |listener: &str| daemon.url(listener, "");
    let common = format!("[checks]\npositive_data_acceptance.expected-statuses = [{EXPECTED}]\n");
    let keyset = format!("[parameters]\n\"path.keyset\" = \"default\"\n\n{common}");
    let kid = daemon.get("admin", "/v1/keysets/default").await.json()["keys"][1]["kid"].as_str().unwrap().to_owned();
    // The signer takes no parameter where the admin listener, which serves the same path, takes one.
    let signer =
        format!("{keyset}{}", operation("/v1/keysets/{keyset}", "checks.negative_data_rejection.enabled = false"));
    // A position in the log is opaque, and names of replicas are counted in bytes, times are judged by the calendar.
    let also_400 = format!("checks.positive_data_acceptance.expected-statuses = [{EXPECTED}, \"400\"]");
    let replicas = format!("{keyset}{}", operation("/v1/replicas/{replica}", &also_400));
    let revoked = format!(
        "parameters = {{ \"path.kid\" = \"{kid}\", \"path.keyset\" = \"default\", \"header.If-Match\" = \"*\" }}"
    );
    // Schemathesis takes any ETag for what this header may be, whatever its schema says.
    let any = "\"path.keyset\" = \"default\"\n\"header.If-Match\" = \"*\"";
    let admin = format!(
        "{}{}{}",
        keyset.replace("\"path.keyset\" = \"default\"", any),
        operation("/v1/audit", &also_400),
        operation("/v1/keysets/{keyset}/keys/{kid}/revoke", &revoked)
    );
    let listeners = [
        Listener { tag: "public", token: None, url: url("public"), settings: common.clone() },
        Listener { tag: "ops", token: None, url: url("ops"), settings: common },
        Listener { tag: "signer", token: Some("client.token"), url: url("signer"), settings: signer },
        Listener {
            tag: "replication",
            token: Some("signers.token"),
            url: format!("http://{replication}"),
            settings: replicas,
        },
        // The last: what it changes is for good.
        Listener { tag: "admin", token: Some("admin.token"), url: url("admin"), settings: admin },
    ];
    assert_eq!(operations(&description, None), 32, "the operations that a tag here stands for");
    for listener in listeners {
        let operations = operations(&description, Some(listener.tag));
        let run = start(&daemon, &listener);
        let output = tokio::task::spawn_blocking(run).await.unwrap();
        judge(listener.tag, operations, &output);
    }
    let healthy = daemon.get("admin", "/v1/keysets/spare").await.json();
    assert_eq!(healthy["health"], "ok", "{healthy}");
    let panicked: Vec<String> = daemon.logs().into_iter().filter(|line| line.contains("panicked")).collect();
    assert!(panicked.is_empty(), "{panicked:#?}");
}

/// Settings for the operations of one path.
fn operation(path: &str, settings: &str) -> String {
    format!("\n[[operations]]\ninclude-path = \"{path}\"\n{settings}\n")
}

/// How many operations have the tag, or one of those that are tested.
fn operations(description: &Value, tag: Option<&str>) -> usize {
    let known = ["public", "ops", "signer", "replication", "admin"];
    let paths = description["paths"].as_object().unwrap().values();
    let all = paths.flat_map(|path| path.as_object().unwrap().values());
    let tags = all.map(|operation| {
        operation["tags"].as_array().unwrap().iter().map(|tag| tag.as_str().unwrap()).collect::<Vec<_>>()
    });
    tags.filter(|tags| match tag {
        Some(tag) => tags.contains(&tag),
        None => tags.iter().any(|tag| known.contains(tag)),
    })
    .count()
}

fn start(daemon: &Daemon, listener: &Listener) -> impl FnOnce() -> Output + use<> {
    let folder = daemon.path(&format!("schemathesis-{}", listener.tag));
    std::fs::create_dir(&folder).unwrap();
    let settings = folder.join("schemathesis.toml");
    std::fs::write(&settings, &listener.settings).unwrap();
    let python: PathBuf = tools::schemathesis();
    let mut command = Command::new(python);
    command.args(["-m", "schemathesis.cli", "--config-file"]).arg(settings).arg("run").arg(daemon.path("openapi.json"));
    command.args(["--url", &listener.url, "--include-tag", listener.tag, "--seed", SEED]);
    command.args(["--phases", "examples,coverage,fuzzing", "--max-examples", "8"]);
    command.args(["--generation-database", "none", "--continue-on-failure", "--no-color", "--warnings", "off"]);
    command.args(["--output-sanitize", "false"]);
    if let Some(file) = listener.token {
        let mut header = String::new();
        write!(header, "Authorization: Bearer {}", std::fs::read_to_string(daemon.path(file)).unwrap().trim()).unwrap();
        command.args(["--header", &header]);
    }
    // Nothing of the machine: no proxy, no settings, no database of earlier runs.
    command.current_dir(&folder).env_clear().env("HOME", &folder).env("COLUMNS", "160").env("LANG", "C.UTF-8");
    move || command.output().expect("Schemathesis starts")
}

fn judge(tag: &str, operations: usize, output: &Output) {
    let report = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "the {tag} listener and its description disagree:\n{report}");
    assert!(report.contains(&format!("Tested: {operations}\n")), "not all of {operations} operations:\n{report}");
    println!("{tag}: {}", report.lines().filter(|line| line.contains("generated")).collect::<String>().trim());
}
