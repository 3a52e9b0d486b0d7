//! Rules, their tests, the runbook and the dashboard hold together, and ask only for what there is.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use jwksd::keyring::outlook::Alarm;
use serde_json::{Value, json};

use crate::prometheus::Prometheus;
use crate::support::tools::{promtool, repository};
use crate::support::{Daemon, PATIENCE, eventually};
use crate::{alert_names, rules};

const FOLDER: &str = "deploy/prometheus/tests";

/// Metrics that only daemons with TLS have, or with clients that are service accounts.
const NOT_EVERYWHERE: [&str; 2] =
    ["jwksd_certificate_expiry_timestamp_seconds", "jwksd_cluster_keys_confirmed_timestamp_seconds"];

fn read(path: impl AsRef<Path>) -> String {
    let path = repository(&path.as_ref().to_string_lossy());
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(repository(folder)).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The code in the pages of the runbook that is marked as `language`, with the page it stands in.
fn runbook_code(language: &str) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    for page in files("docs/runbook") {
        let text = read(format!("docs/runbook/{page}"));
        for block in text.split("```").skip(1).step_by(2) {
            let (kind, code) = block.split_once('\n').unwrap();
            if kind.trim() == language {
                lines.extend(code.lines().filter(|line| !line.is_empty()).map(|line| (page.clone(), line.to_owned())));
            }
        }
    }
    lines
}

/// Every query of the dashboard with its panel, and with what Grafana would put in the place of its variables.
fn dashboard_queries() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(&read("deploy/grafana/jwksd.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let annotations = dashboard["annotations"]["list"].as_array().unwrap().iter();
    let targets = |panel: &Value| panel["targets"].as_array().cloned().unwrap_or_default();
    let asked = panels.flat_map(|panel| {
        let title = panel["title"].as_str().unwrap().to_owned();
        targets(panel).into_iter().map(move |target| (title.clone(), target["expr"].as_str().unwrap().to_owned()))
    });
    let noted = annotations.map(|note| ("annotation".to_owned(), note["expr"].as_str().unwrap().to_owned()));
    let filled = asked.chain(noted).map(|(title, query)| {
        let variables = ["$job", "$instance", "$keyset", "$issuer"];
        let query = variables.iter().fold(query, |query, name| query.replace(name, ".*"));
        (title, query.replace("$__rate_interval", "10s"))
    });
    filled.collect()
}

/// Names of metrics that a text speaks of.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    let metrics = words.filter(|word| ["jwksd_", "process_"].iter().any(|prefix| word.starts_with(prefix)));
    metrics.map(str::to_owned).collect()
}

#[test]
fn promtool_accepts_the_rules_and_their_unit_tests_pass() {
    let run =
        |command: &mut Command| command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("promtool starts");
    let mut checks = vec![run(Command::new(promtool())
        .args(["check", "rules", "rules.yaml"])
        .current_dir(repository(FOLDER).join("..")))];
    for file in files(FOLDER) {
        checks.push(run(Command::new(promtool()).args(["test", "rules", &file]).current_dir(repository(FOLDER))));
    }
    assert_eq!(checks.len(), 4);
    for check in checks {
        let output = check.wait_with_output().unwrap();
        let told = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&told));
    }
}

#[test]
fn every_alert_is_tested_explained_and_has_its_page() {
    let tests: Vec<String> = files(FOLDER).iter().map(|file| read(format!("{FOLDER}/{file}"))).collect();
    let index = read("docs/runbook/README.md");
    let text = rules();
    for alert in text.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        let fires = format!("alertname=\"{name}\", alertstate=\"firing\"");
        assert!(tests.iter().any(|test| test.contains(&fires)), "{name}: no unit test has it fire");
        assert!(["critical", "warning", "info"].iter().any(|s| alert.contains(&format!("severity: {s}"))), "{name}");
        for annotation in ["summary: ", "description: "] {
            assert!(alert.contains(annotation), "{name} has no {annotation}");
        }
        let url = format!("runbook_url: https://runbooks.example.com/jwksd/{name}.md");
        assert!(alert.contains(&url), "{name}: its runbook_url is another");
        assert!(index.contains(&format!("[{name}]({name}.md)")), "{name} is not in the runbook's index");
    }
    let pages: BTreeSet<String> =
        files("docs/runbook").iter().filter_map(|file| file.strip_suffix(".md")).map(str::to_owned).collect();
    let others = ["README", "leak", "kms-outage"].map(str::to_owned);
    assert_eq!(pages, alert_names().into_iter().chain(others).collect());
    for name in alert_names() {
        let page = read(format!("docs/runbook/{name}.md"));
        for part in
            ["What it means", "What is felt", "What to look at", "What to do", "When it is over", "How to prevent it"]
        {
            assert!(page.contains(&format!("\n## {part}\n")), "docs/runbook/{name}.md does not say: {part}");
        }
    }
}

#[test]
fn every_alarm_has_an_alert_or_a_reason_to_have_none() {
    let (rules, index) = (rules(), read("docs/runbook/README.md"));
    let silent = index.split("## Alarms without an alert").nth(1).unwrap();
    for alarm in Alarm::ALL.map(Alarm::as_str) {
        let told = rules.contains(&format!("\"{alarm}\""))
            || rules.contains(&format!("{alarm}|"))
            || rules.contains(&format!("|{alarm}\""));
        assert!(
            told || silent.contains(&format!("`{alarm}`")),
            "{alarm}: no rule looks at it, and the index says not why"
        );
    }
}

/// Usage that is wrong is told before the configuration is looked for, which is not there.
#[test]
fn every_command_of_the_runbook_parses() {
    let commands: Vec<_> = runbook_code("sh").into_iter().filter(|(_, line)| line.starts_with("jwksd ")).collect();
    for (page, command) in &commands {
        let output = Command::new(env!("CARGO_BIN_EXE_jwksd"))
            .args(["--config", "/nonexistent/jwksd.toml"])
            .args(command.split_whitespace().skip(1))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!told.contains("Usage:") && !told.starts_with("error:"), "{page}: {command}: {told}");
        assert!(output.status.success() || told.contains("/nonexistent/jwksd.toml"), "{page}: {command}: {told}");
    }
    assert!(commands.len() > 60, "only {} commands were found", commands.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_of_rules_runbook_and_dashboard_asks_for_what_there_is() {
    let tables = "[issuer.main]\nurl = \"https://issuer.example.test\"\n[issuer.main.publish.web]\nkind = \"file\"\npath = \"web\"\n\
                  [keyset.default]\nalgorithm = \"ES256\"\n";
    let prepared = Daemon::builder().tables(tables).prepare();
    std::fs::create_dir(prepared.path("web")).unwrap();
    let mut daemon = prepared;
    daemon.restart().await;
    let page = daemon.metrics().await.0;
    let queries = || runbook_code("promql").into_iter().chain(dashboard_queries());
    let asked: String = queries().map(|(_, query)| query + "\n").collect::<String>() + &expressions(&rules());
    let exists = |name: &String| {
        page.lines().any(|line| line.starts_with(name.as_str()) && line[name.len()..].starts_with(['{', ' ']))
    };
    let missing: Vec<String> = metrics_in(&asked)
        .into_iter()
        .filter(|name| !NOT_EVERYWHERE.contains(&name.as_str()) && !exists(name))
        .collect();
    assert!(missing.is_empty(), "nobody exports {missing:?}");

    let prometheus = Prometheus::start(&[("jwksd", &daemon)], &rules()).await;
    for _ in 0..2 {
        daemon.sign("default", json!({ "claims": { "sub": "a", "aud": "b" } })).await;
        daemon.get("public", "/.well-known/jwks.json").await;
    }
    eventually("two scrapes", PATIENCE, async || {
        let rate = prometheus.query("rate(jwksd_signatures_total[10s])").await;
        (!rate.is_empty() && !prometheus.query("instance:jwksd_up == 1").await.is_empty()).then_some(())
    })
    .await;
    let mut empty = Vec::new();
    for (place, query) in queries() {
        if prometheus.query(&query).await.is_empty() {
            empty.push(format!("{place}: {query}"));
        }
    }
    // Where nothing is wrong, filters leave nothing; whatever else is empty asks for labels that do not exist.
    empty.retain(|query| {
        let filters = [" > 0", "== 0", "== 1", "> on (instance)"];
        !filters.iter().chain(&NOT_EVERYWHERE).any(|filter| query.contains(filter))
    });
    assert!(empty.is_empty(), "{empty:#?}");
}

/// What stands behind `expr:` in the rules, comments and texts left out.
fn expressions(rules: &str) -> String {
    let parts = rules.split("expr: ").skip(1);
    parts.map(|rest| rest.split("\n        labels:").next().unwrap().to_owned() + "\n").collect()
}
