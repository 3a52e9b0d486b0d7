//! The sandbox of the unit, held against what the daemon really asks the kernel for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use reqwest::Method;
use rustix::process::Signal;
use serde_json::json;

use crate::Notified;
use crate::support::tools;
use crate::unit::values;

/// A cheap algorithm, and one that signs on threads of its own.
const KEYSETS: &str = "[issuer.main]\nurl = \"https://issuer.example.test\"\n[keyset.main]\nalgorithm = \"ES256\"\n\
                       [keyset.slow]\nalgorithm = \"RS256\"\nrsa_bits = 3072\n";

#[tokio::test]
async fn it_allows_what_the_daemon_does() {
    let notified = Notified::at_a_path();
    let mut daemon = notified.daemon().env("WATCHDOG_USEC", "400000").prepare();
    daemon.set_tables(KEYSETS);
    let trace = daemon.path("trace");
    // The tracer stands aside: signals reach the daemon.
    let traced = daemon.path("traced");
    let (strace, jwksd) = (tools::strace(), env!("CARGO_BIN_EXE_jwksd"));
    let script = format!("#!/bin/sh\nexec {} -D -f -qq -o {} {jwksd} \"$@\"\n", strace.display(), trace.display());
    fs::write(&traced, script).unwrap();
    fs::set_permissions(&traced, fs::Permissions::from_mode(0o700)).unwrap();
    daemon.set_binary(Some(&traced));
    daemon.restart().await;
    let request = json!({"claims": {"sub": "alice", "aud": "https://api.example.test"}});
    for keyset in ["main", "slow"] {
        daemon.sign(keyset, request.clone()).await;
        let rotation = json!({"reason": "a drill", "allow_unpropagated": true});
        let rotated = daemon.admin(Method::POST, &format!("/keysets/{keyset}/rotate"), Some(rotation)).await;
        assert_eq!(rotated.status, 200, "{}", rotated.text);
    }
    daemon.metrics().await;
    daemon.signal(Signal::HUP);
    while !notified.notice().await.starts_with("RELOADING=1") {}
    assert!(notified.notice().await.starts_with("READY=1"));
    assert!(daemon.sigterm().await.success());

    let calls = fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> = calls.lines().filter_map(|line| Some(line.split_once(' ')?.1.trim_start())).collect();
    assert!(calls.iter().any(|call| call.starts_with("socket(AF_UNIX")), "the trace shows something");
    let allowed = allowed();
    let refused: BTreeSet<&str> = names(&calls).filter(|name| !allowed.contains(*name)).collect();
    assert!(refused.is_empty(), "SystemCallFilter= would refuse {refused:?}");
    assert!(!allowed.contains("ptrace") && !allowed.contains("mount"), "the filter was understood");
    for call in &calls {
        let maps = call.starts_with("mmap(") || call.starts_with("mprotect(");
        let both = call.contains("PROT_WRITE") && call.contains("PROT_EXEC");
        assert!(!(maps && both), "MemoryDenyWriteExecute= would refuse {call}");
        if let Some(family) = call.strip_prefix("socket(").and_then(|rest| rest.split([',', ')']).next()) {
            let families = values("RestrictAddressFamilies").join(" ");
            assert!(families.split(' ').any(|known| known == family), "RestrictAddressFamilies= would refuse {call}");
        }
        if call.starts_with("openat(") && ["O_WRONLY", "O_RDWR", "O_CREAT"].iter().any(|mode| call.contains(mode)) {
            let path = call.split('"').nth(1).unwrap_or_default();
            let own = !path.starts_with('/') || path == "/dev/null";
            assert!(own, "ProtectSystem=strict would refuse {call}: it is outside the folders of the service");
        }
    }
}

/// The names of the calls; what was interrupted and goes on has none.
fn names<'a>(calls: &[&'a str]) -> impl Iterator<Item = &'a str> {
    let names = calls.iter().filter_map(|call| call.split_once('(').map(|(name, _)| name)).collect::<Vec<_>>();
    names.into_iter().filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

/// What the lines of `SystemCallFilter=` leave, each in its turn.
fn allowed() -> BTreeSet<String> {
    let groups = groups();
    let mut allowed = expand("@default", &groups);
    for line in values("SystemCallFilter") {
        let (refused, line) = line.strip_prefix('~').map_or((false, line.as_str()), |rest| (true, rest));
        for call in line.split_whitespace().flat_map(|name| expand(name, &groups)) {
            if refused {
                allowed.remove(&call);
            } else {
                allowed.insert(call);
            }
        }
    }
    allowed
}

fn expand(name: &str, groups: &BTreeMap<String, Vec<String>>) -> BTreeSet<String> {
    match groups.get(name) {
        Some(members) => members.iter().flat_map(|member| expand(member, groups)).collect(),
        None => {
            assert!(!name.starts_with('@'), "systemd knows no {name}");
            BTreeSet::from([name.to_owned()])
        }
    }
}

/// systemd's own groups of system calls.
fn groups() -> BTreeMap<String, Vec<String>> {
    let shown = Command::new(tools::systemd_analyze()).args(["syscall-filter", "--no-pager"]).output().unwrap();
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in String::from_utf8(shown.stdout).unwrap().lines() {
        match line.strip_prefix("    ").map(str::trim) {
            None => current = line.trim().to_owned(),
            Some(member) if member.starts_with('#') => {}
            Some(member) => groups.entry(current.clone()).or_default().push(member.to_owned()),
        }
    }
    groups
}
