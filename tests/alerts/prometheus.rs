//! Debian's Prometheus, which scrapes daemons every second and judges them by the hastened rules.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::ports::ReservedPort;
use crate::support::{Daemon, PATIENCE, Process, eventually, http_client, tools};

/// Killed when it is dropped.
pub struct Prometheus {
    url: String,
    http: reqwest::Client,
    _process: Process,
    _port: ReservedPort,
    _folder: TempDir,
}

impl Prometheus {
    /// Scrapes each daemon as a job of its own name.
    pub async fn start(daemons: &[(&str, &Daemon)], rules: &str) -> Prometheus {
        let folder = TempDir::new().unwrap();
        let port = ReservedPort::any();
        let mut config = "global: { scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s }\n\
                          rule_files: [rules.yaml]\nscrape_configs:\n"
            .to_owned();
        for (job, daemon) in daemons {
            let target = daemon.address("ops");
            writeln!(config, "  - {{ job_name: {job}, static_configs: [{{ targets: ['{target}'] }}] }}").unwrap();
        }
        std::fs::write(folder.path().join("rules.yaml"), rules).unwrap();
        std::fs::write(folder.path().join("prometheus.yaml"), config).unwrap();
        let process = Process::start(command(folder.path(), port.number()));
        let url = format!("http://127.0.0.1:{}", port.number());
        let http = http_client().build().unwrap();
        eventually("Prometheus to be ready", PATIENCE, async || {
            let answer = http.get(format!("{url}/-/ready")).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        Prometheus { url, http, _process: process, _port: port, _folder: folder }
    }

    /// What a query gives; one that is refused fails the test.
    pub async fn query(&self, expression: &str) -> Vec<Value> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let form = self.http.post(format!("{}/api/v1/query", self.url)).body(format!("query={encoded}"));
        let answer = form.header("content-type", "application/x-www-form-urlencoded").send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        answer["data"]["result"].as_array().cloned().unwrap_or_default()
    }

    /// Alerts that fire, with their labels and annotations.
    pub async fn alerts(&self) -> Vec<Value> {
        let answer = self.http.get(format!("{}/api/v1/alerts", self.url)).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        let alerts = answer["data"]["alerts"].as_array().cloned().unwrap_or_default();
        alerts.into_iter().filter(|alert| alert["state"] == "firing").collect()
    }

    /// As `Name` or `Name/keyset` or `Name/issuer`, those of one job.
    pub async fn firing(&self, job: &str) -> BTreeSet<String> {
        let of_job = self.alerts().await.into_iter().filter(|alert| alert["labels"]["job"] == job);
        let told = |alert: Value| {
            let label = |name: &str| alert["labels"][name].as_str().map(str::to_owned);
            let name = label("alertname").unwrap_or_default();
            match label("keyset").or(label("issuer")) {
                Some(of) => format!("{name}/{of}"),
                None => name,
            }
        };
        of_job.map(told).collect()
    }
}

fn command(folder: &Path, port: u16) -> Command {
    let mut command = Command::new(tools::prometheus());
    command.current_dir(folder).arg("--config.file=prometheus.yaml").arg("--storage.tsdb.path=data");
    command.arg(format!("--web.listen-address=127.0.0.1:{port}")).arg("--log.level=error");
    command
}
