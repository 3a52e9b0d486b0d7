//! What helm and kubectl make of this repository's files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::tools::{helm, kubectl, kubernetes_python, repository};

/// The first that the chart is for, one between, and the newest whose schemas are known.
const VERSIONS: [&str; 3] = ["1.29", "1.33", "1.37"];

/// Kinds that are no part of Kubernetes: `cluster.rs` looks at their structure.
const CUSTOM: [&str; 4] = ["HTTPRoute", "PodMonitor", "PrometheusRule", "ServiceMonitor"];

/// The chart's documents for `ci/{values}-values.yaml` with these values set over it, validated.
pub fn manifests(values: &str, sets: &[&str]) -> Vec<Value> {
    parsed(&template(values, sets, &[]).unwrap_or_else(|error| panic!("{values} {sets:?}: {error}")))
}

/// Why helm does not render it.
pub fn refusal(values: &str, sets: &[&str]) -> String {
    template(values, sets, &[]).expect_err(&format!("{values} {sets:?} is rendered"))
}

/// What `helm template` prints, or why it does not. `values`: empty for none.
pub fn template(values: &str, sets: &[&str], flags: &[&str]) -> Result<String, String> {
    let file = repository(&format!("deploy/helm/jwksd/ci/{values}-values.yaml"));
    let mut helm = self::helm_in(&repository("deploy/helm"));
    helm.args(["template", "jwksd", "jwksd", "--namespace", "jwksd"]).args(flags);
    if !values.is_empty() {
        helm.arg("--values").arg(file);
    }
    run(with_sets(&mut helm, sets))
}

/// The example of an application's chart, with its dependency beside it as `helm dependency build` puts it there.
pub fn application(sets: &[&str]) -> Vec<Value> {
    parsed(&application_template(sets).unwrap_or_else(|error| panic!("{sets:?}: {error}")))
}

pub fn application_refusal(sets: &[&str]) -> String {
    application_template(sets).expect_err("it is rendered")
}

fn application_template(sets: &[&str]) -> Result<String, String> {
    let mut helm = helm_in(application_chart());
    helm.args(["template", "orders", ".", "--namespace", "orders"]);
    run(with_sets(&mut helm, sets))
}

pub fn lint(chart: &str, values: &[&str]) {
    let mut helm = helm_in(&repository(""));
    helm.args(["lint", "--strict", chart]).args(values.iter().flat_map(|file| ["--values", file]));
    run(&mut helm).unwrap_or_else(|error| panic!("{chart} {values:?}: {error}"));
}

pub fn lint_application() {
    let mut helm = helm_in(application_chart());
    run(helm.args(["lint", "--strict", "."])).unwrap_or_else(|error| panic!("{error}"));
}

/// A copy of the charts, in which the example's dependency has been built.
fn application_chart() -> &'static Path {
    static COPY: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, chart) = COPY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let mut copy = Command::new("cp");
        run(copy.arg("-r").arg(repository("deploy/helm")).arg(folder.path())).unwrap();
        let chart = folder.path().join("helm/examples/app");
        run(helm_in(&chart).args(["dependency", "build"])).unwrap();
        (folder, chart)
    });
    chart
}

/// What `kubectl kustomize` prints.
pub fn kustomized(folder: &str) -> String {
    let mut kubectl = Command::new(kubectl());
    run(kubectl.arg("kustomize").arg(repository(folder))).unwrap_or_else(|error| panic!("{folder}: {error}"))
}

/// Validates documents and reads them.
pub fn parsed(yaml: &str) -> Vec<Value> {
    let mut validate = Command::new(kubernetes_python());
    validate.arg(repository("tests/kubernetes/validate.py"));
    validate.args(CUSTOM.iter().flat_map(|kind| ["--custom", kind])).args(VERSIONS);
    validate.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = validate.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || std::io::Write::write_all(&mut input, yaml.as_bytes()));
        child.wait_with_output().unwrap()
    });
    let text = told(&output).unwrap_or_else(|error| panic!("{error}\n{yaml}"));
    serde_json::from_str(&text).unwrap()
}

/// Any YAML file of this repository.
pub fn yaml(path: &str) -> Value {
    let mut python = Command::new(kubernetes_python());
    python.args(["-c", "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))"]);
    let text = run(python.arg(repository(path))).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_json::from_str(&text).unwrap()
}

/// Helm with its own files out of the way of the user's.
fn helm_in(folder: &Path) -> Command {
    static HOME: OnceLock<TempDir> = OnceLock::new();
    let home = HOME.get_or_init(|| tempfile::tempdir().unwrap()).path();
    let mut helm = Command::new(helm());
    helm.current_dir(folder).env("HELM_CACHE_HOME", home).env("HELM_CONFIG_HOME", home).env("HELM_DATA_HOME", home);
    helm
}

fn with_sets<'a>(helm: &'a mut Command, sets: &[&str]) -> &'a mut Command {
    for set in sets {
        // Modes and paths are texts; numbers and nulls are not.
        let value = set.split_once('=').unwrap().1;
        let literal = value == "null"
            || value == "true"
            || value == "false"
            || value.parse::<u32>().is_ok() && !value.starts_with('0');
        helm.args([if literal || value.is_empty() { "--set" } else { "--set-string" }, set]);
    }
    helm
}

fn run(command: &mut Command) -> Result<String, String> {
    told(&command.output().unwrap_or_else(|error| panic!("{command:?}: {error}")))
}

fn told(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr) + &text(&output.stdout)) }
}
