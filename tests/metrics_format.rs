//! The metrics page as scrapers and readers of the documentation see it.
#![allow(clippy::unwrap_used, reason = "a test that fails says where")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::record::KeyState;
use jwksd::telemetry::metrics::{
    Alarm, BackendOperation, BackendOutcome, JwksCode, Metrics, RotationFailureReason, RotationStep, RotationTrigger,
    SignRejection, SigningFailure,
};

const OPEN_METRICS: &str = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

fn metrics() -> Metrics {
    let metrics = Metrics::new();
    metrics.set_certificate_expiry("signer", jwksd::keyring::time::Timestamp::from_secs(1_900_000_000));
    metrics.set_cluster_keys_confirmed(Some(jwksd::keyring::time::Timestamp::EPOCH));
    for keyset in ["default", "orders"] {
        let name = Name::parse(keyset).unwrap();
        let issuer = Name::parse("main").unwrap();
        let keyset = metrics.register_keyset(&name, Algorithm::Es256, "local", &issuer);
        keyset.signing(Algorithm::Es256, "local").signed(Duration::from_micros(16));
        metrics.register_issuer(&issuer).publisher(&Name::parse("cdn").unwrap());
    }
    metrics
}

/// What the page says: family by family the type and the label names of its samples.
#[derive(Debug, PartialEq)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
}

fn families(page: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            current = name.to_owned();
            let family = Family { kind: kind.to_owned(), labels: BTreeSet::new() };
            assert!(families.insert(current.clone(), family).is_none(), "{name} stands twice on the page");
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&current), "{line} does not belong to {current}");
            families.get_mut(&current).unwrap().labels.extend(label_names(line));
        }
    }
    families
}

/// Label names of a sample without `le`. No value on our page holds a quote, comma or brace.
fn label_names(sample: &str) -> impl Iterator<Item = String> {
    let labels = sample.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(labels, _)| labels);
    labels.split(',').filter_map(|label| label.split_once('=')).map(|(name, _)| name.to_owned()).filter(|n| n != "le")
}

/// Rows of the tables in docs/metrics.md whose first cell is code, as cells.
fn documented_rows() -> Vec<Vec<String>> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

fn code(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let documented: BTreeMap<String, Family> = documented_rows()
        .iter()
        .filter(|row| ["counter", "gauge", "histogram"].contains(&row[1].as_str()))
        .map(|row| {
            let family = Family { kind: row[1].clone(), labels: code(&row[2]) };
            (row[0].trim_matches('`').to_owned(), family)
        })
        .collect();
    assert_eq!(families(&metrics().render(None).1), documented);
}

#[test]
fn every_label_value_is_documented_and_every_documented_value_exists() {
    let documented: BTreeSet<(String, String, String)> = documented_rows()
        .iter()
        .filter(|row| row[1].starts_with('`'))
        .map(|row| {
            let plain = |i: usize| row[i].trim_matches('`').to_owned();
            (plain(1), plain(0), plain(2))
        })
        .collect();
    let mut exist = BTreeSet::new();
    let mut add = |metric: &str, label: &str, values: Vec<&'static str>| {
        exist.extend(values.into_iter().map(|value| (metric.to_owned(), label.to_owned(), value.to_owned())));
    };
    macro_rules! values {
        ($closed:ident) => {
            $closed::ALL.iter().map(|value| value.as_str()).collect()
        };
    }
    add("jwksd_signing_failures_total", "reason", values!(SigningFailure));
    add("jwksd_sign_rejections_total", "reason", values!(SignRejection));
    add("jwksd_backend_requests_total", "operation", values!(BackendOperation));
    add("jwksd_backend_requests_total", "outcome", values!(BackendOutcome));
    add("jwksd_rotations_total", "trigger", values!(RotationTrigger));
    add("jwksd_rotation_failures_total", "step", values!(RotationStep));
    add("jwksd_rotation_failures_total", "reason", values!(RotationFailureReason));
    add("jwksd_alarms", "alarm", values!(Alarm));
    add("jwksd_jwks_requests_total", "code", values!(JwksCode));
    add("jwksd_keys", "state", values!(KeyState));
    assert_eq!(documented, exist);
    let (_, page) = metrics().render(None);
    for (metric, label, value) in exist {
        let label = format!("{label}=\"{value}\"");
        let exists = page.lines().any(|line| line.starts_with(&metric) && line.contains(&label));
        assert!(exists, "no series of {metric} has {label}");
    }
}

#[test]
fn promtool_accepts_the_page_without_a_remark() {
    let (content_type, page) = metrics().render(None);
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool must be on the PATH: run tests/run, which installs it (Debian package prometheus)");
    promtool.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let remarks = [output.stdout, output.stderr].concat();
    assert_eq!(String::from_utf8_lossy(&remarks), "");
    assert!(output.status.success());
}

#[test]
fn help_and_type_stand_before_the_samples_under_the_name_that_the_format_wants() {
    let (_, text) = metrics().render(None);
    assert!(text.contains("# HELP jwksd_signatures_total Tokens signed\n# TYPE jwksd_signatures_total counter\n"));
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"));

    let (content_type, open_metrics) = metrics().render(Some(OPEN_METRICS));
    assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(open_metrics.contains("# HELP jwksd_signatures Tokens signed\n# TYPE jwksd_signatures counter\n"));
    assert!(open_metrics.contains("\njwksd_signatures_total{keyset=\"default\",alg=\"ES256\",backend=\"local\"} 1\n"));
    assert!(open_metrics.ends_with("\n# EOF\n"));
}

#[test]
fn the_page_has_no_series_twice() {
    for accept in [None, Some(OPEN_METRICS)] {
        let (_, page) = metrics().render(accept);
        let mut seen = BTreeSet::new();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (series, _) = line.rsplit_once(' ').unwrap();
            assert!(seen.insert(series), "{series} stands twice");
        }
    }
}
