//! Whether the simulations have teeth: each fault of `tests/planted/faults`, planted in the product's own decisions, has to
//! be found by the simulations that the fault names, by the promise that it breaks. `tests/planted/plant.py` builds them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]
#![allow(clippy::disallowed_methods, reason = "how long a run takes is told")]

#[path = "support/tools.rs"]
#[allow(dead_code, reason = "other tests use more of it")]
mod tools;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde::Deserialize;

/// As many simulations run at a time.
const THREADS: usize = 2;

/// How long one may take; a fault may make it go on for ever.
const LONGEST: Duration = Duration::from_secs(240);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fault {
    /// What is wrong, and what comes of it.
    what: String,
    /// Each of them has to find it.
    found: Vec<Found>,
    edit: Vec<Edit>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Found {
    /// A test of this repository.
    #[serde(rename = "in")]
    file: String,
    /// Which of its tests, or the beginning of their names.
    test: String,
    /// What it says: the promise that is broken, not just anything that fails.
    says: String,
}

/// `tests/planted/plant.py` makes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Edit {
    #[serde(rename = "file")]
    _file: String,
    #[serde(rename = "old")]
    _old: String,
    #[serde(rename = "new")]
    _new: String,
}

/// Without a fault a simulation needs to show only that it is built from what it should be: it is played at length elsewhere.
const SHORT: [(&str, &str); 2] = [("JWKSD_SIM_SEED", "1"), ("JWKSD_WHOLE_ROTATIONS", "200")];

/// With one it plays on until it is found; few histories are of a KMS that lies.
const LONG: [(&str, &str); 2] = [("JWKSD_SIM_SEEDS", "300"), ("JWKSD_WHOLE_ROTATIONS", "500000")];

/// One run of a simulation, with a fault or without.
struct Run<'a> {
    file: &'a str,
    test: &'a str,
    fault: Option<(&'a str, &'a str)>,
}

#[test]
fn every_planted_fault_is_found() {
    let faults = faults();
    let built = built();
    let mut runs: Vec<Run> = Vec::new();
    let simulations: BTreeSet<(&str, &str)> = faults
        .values()
        .flat_map(|fault| &fault.found)
        .map(|found| (found.file.as_str(), found.test.as_str()))
        .collect();
    runs.extend(simulations.into_iter().map(|(file, test)| Run { file, test, fault: None }));
    for (name, fault) in &faults {
        assert!(!fault.what.is_empty() && !fault.found.is_empty() && !fault.edit.is_empty(), "{name}");
        let found = fault.found.iter();
        runs.extend(found.map(|it| Run { file: &it.file, test: &it.test, fault: Some((name, &it.says)) }));
    }
    let (queue, wrong) = (Mutex::new(runs.iter()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let Some(run) = queue.lock().unwrap().next() else { return };
            let began = Instant::now();
            let outcome = run.judge(&built);
            println!(
                "{} {:.1} s {}",
                run.name(),
                began.elapsed().as_secs_f64(),
                outcome.as_deref().unwrap_or("as it should")
            );
            wrong.lock().unwrap().extend(outcome.map(|what| format!("{}: {what}", run.name())));
        }
    };
    std::thread::scope(|scope| (0..THREADS).for_each(|_| _ = scope.spawn(work)));
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "of {} faults:\n{}", faults.len(), wrong.join("\n\n"));
}

#[test]
fn there_are_enough_faults_and_they_are_explained() {
    let faults = faults();
    assert!(faults.len() >= 20, "{}", faults.len());
    for (name, fault) in faults {
        assert!(fault.what.ends_with('.') && fault.what.len() > 40, "{name} does not say what is wrong");
    }
}

impl Run<'_> {
    fn name(&self) -> String {
        format!("{} in {} {}", self.fault.map_or("no fault", |(name, _)| name), self.file, self.test)
    }

    /// What is wrong with how it ends.
    fn judge(&self, built: &BTreeMap<String, PathBuf>) -> Option<String> {
        let Some(program) = built.get(self.file) else { return Some("was not built: run tests/run".to_owned()) };
        let Some((success, output)) = output(program, self.test, self.fault.map(|(name, _)| name)) else {
            return Some(format!("did not end within {} s", LONGEST.as_secs()));
        };
        match self.fault {
            _ if output.contains("running 0 tests") => Some("there is no such test".to_owned()),
            None => (!success).then(|| format!("fails without a fault:\n{}", end(&output))),
            Some(_) if success => Some("is not found".to_owned()),
            Some((_, says)) => {
                (!output.contains(says)).then(|| format!("`{says}` is not what it says:\n{}", end(&output)))
            }
        }
    }
}

/// Whether a run succeeded, and what it said; `None` if it did not end.
fn output(program: &Path, test: &str, fault: Option<&str>) -> Option<(bool, String)> {
    let mut command = Command::new(program);
    command.arg(test).env("RUST_BACKTRACE", "0").env_remove("JWKSD_PLANTED");
    match fault {
        Some(fault) => command.envs(LONG).env("JWKSD_PLANTED", fault),
        None => command.envs(SHORT),
    };
    let child = command.current_dir(tools::repository("")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let process = rustix::process::Pid::from_child(&child);
    let (done, wait) = channel();
    let waiting = std::thread::spawn(move || done.send(child.wait_with_output()));
    let ended = wait.recv_timeout(LONGEST);
    if ended.is_err() {
        _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
    }
    _ = waiting.join().unwrap();
    let output = ended.ok()?.unwrap();
    Some((
        output.status.success(),
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat(),
    ))
}

fn end(output: &str) -> String {
    let lines: Vec<&str> = output.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

fn faults() -> BTreeMap<String, Fault> {
    let folder = tools::repository("tests/planted/faults");
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let read = |path: PathBuf| {
        let fault = toml::from_str(&std::fs::read_to_string(&path).unwrap());
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, fault.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    };
    files.map(read).collect()
}

/// Where the simulations with planted faults are.
fn built() -> BTreeMap<String, PathBuf> {
    let list = tools::planted();
    let stamp = modified(&list);
    for folder in ["src", "tests/planted"] {
        let newer = newest(&tools::repository(folder)).filter(|(at, _)| *at > stamp);
        assert!(
            newer.is_none(),
            "{} is newer than the simulations with planted faults: run tests/run",
            newer.unwrap().1.display()
        );
    }
    serde_json::from_str(&std::fs::read_to_string(list).unwrap()).unwrap()
}

fn modified(path: &Path) -> std::time::SystemTime {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap()
}

fn newest(folder: &Path) -> Option<(std::time::SystemTime, PathBuf)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter_map(|path| if path.is_dir() { newest(&path) } else { Some((modified(&path), path)) }).max()
}
