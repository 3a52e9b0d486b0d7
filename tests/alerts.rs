//! What operators watch jwksd with: the alert rules fire for what really happens to real daemons under a real Prometheus, and
//! say nothing else; each has its page in the runbook; the dashboard asks for nothing that does not exist.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]

#[path = "alerts/documents.rs"]
mod documents;
#[path = "alerts/faults.rs"]
mod faults;
#[path = "alerts/prometheus.rs"]
mod prometheus;
mod support;

use std::collections::BTreeSet;

use support::tools::repository;

/// The rules as they are delivered.
fn rules() -> String {
    std::fs::read_to_string(repository("deploy/prometheus/rules.yaml")).expect("the rules are there")
}

/// Names of alerts, in order.
fn alert_names() -> BTreeSet<String> {
    let rules = rules();
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    names.map(str::to_owned).collect()
}

/// The rules for impatient tests: what is counted in minutes and hours is counted in seconds. tests/*.yaml beside the rules
/// hold the true durations against made-up series (`promtool test rules`).
fn hastened() -> String {
    let replacements = [
        ("[5m]", "[10s]"),
        ("[10m]", "[10s]"),
        ("[15m]", "[10s]"),
        ("[30m]", "[30s]"),
        (">= 60", ">= 20"),
        ("> 3600", "> 2"),
        ("> 900", "> 2"),
        ("> 600", "> 5"),
    ];
    let mut text = rules();
    for (slow, quick) in replacements {
        assert!(text.contains(slow), "the rules have no `{slow}` any more");
        text = text.replace(slow, quick);
    }
    let lines = text.lines().map(|line| match line.trim().starts_with("for: ") {
        true => line.split("for: ").next().unwrap_or_default().to_owned() + "for: 1s",
        false => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n") + "\n"
}
