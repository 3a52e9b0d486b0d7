//! Rules of the repository: layering, and documents that say what the code does.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use jwksd::config::{Source, load};
use jwksd::http::problem::ProblemType;

/// The modules of src/, lower rows later: a module may use its own row and those after it. As in ARCHITECTURE.md.
const LAYERS: [&[&str]; 15] = [
    &["main"],
    &["cli"],
    &["app"],
    &["http"],
    &["engine"],
    &["store"],
    &["kubernetes"],
    &["backend"],
    &["seal"],
    &["publisher"],
    &["telemetry"],
    &["aws_kms"],
    &["config", "clock", "memory", "outbound", "random", "systemd"],
    &["simulation"],
    &["keyring"],
];

/// What the keyring and its simulation must not use: what they say depends on their arguments alone.
const PURE: [&str; 6] = ["tokio", "tracing", "std::fs", "std::net", "rand", "aws_lc_rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn files_under(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut folders = vec![root().join(folder)];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "node_modules" && !name.starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

fn documents() -> Vec<String> {
    let written = files_under("docs", "md").into_iter().chain(files_under("deploy", "md"));
    let mut documents: Vec<String> = written.map(|path| relative(&path)).collect();
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"] {
        documents.push(name.to_owned());
    }
    documents
}

#[test]
fn lower_layers_never_use_higher_ones() {
    let row = |module: &str| LAYERS.iter().position(|row| row.contains(&module));
    let mut broken = Vec::new();
    for path in files_under("src", "rs") {
        let name = relative(&path);
        let module = name["src/".len()..].split(['/', '.']).next().unwrap();
        if module == "lib" {
            continue;
        }
        let own = row(module).unwrap_or_else(|| panic!("{name}: the layer of {module} is not known: add it to LAYERS"));
        let text = read(&name);
        for used in used_modules(&text) {
            let Some(other) = row(&used) else { panic!("{name}: uses crate::{used}, whose layer is not known") };
            if other < own {
                broken.push(format!("{name} uses crate::{used}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn the_layering_test_sees_every_form_of_use() {
    let text = "use crate::engine::Engine;\nuse crate::{\n  http::x,\n  store::{y, z},\n};\nlet x = crate::app::f();\n// crate::cli\n";
    let used: Vec<String> = used_modules(text).into_iter().collect();
    assert_eq!(used, ["app", "engine", "http", "store"]);
}

/// First segments after `crate::`, comments left out.
fn used_modules(text: &str) -> BTreeSet<String> {
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap()).collect();
    let code = code.join("\n");
    let mut used = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => used.extend(group_heads(group)),
            None => _ = used.insert(identifier(rest)),
        }
    }
    used
}

/// The first identifier of each item of a `{…}` group, nested groups skipped.
fn group_heads(group: &str) -> Vec<String> {
    let (mut heads, mut depth, mut item) = (Vec::new(), 0, String::new());
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => heads.push(std::mem::take(&mut item)),
            '{' => depth += 1,
            '}' => depth -= 1,
            _ if depth == 0 => item.push(c),
            _ => {}
        }
    }
    heads.push(item);
    heads.iter().map(|item| identifier(item.trim())).filter(|name| !name.is_empty()).collect()
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
}

#[test]
fn keyring_and_simulation_do_no_input_or_output() {
    for path in files_under("src/keyring", "rs").into_iter().chain(files_under("src/simulation", "rs")) {
        let text = read(&relative(&path));
        let text = text.split("#[cfg(test)]").next().unwrap();
        for line in text.lines().map(|line| line.split("//").next().unwrap()) {
            for banned in PURE {
                let uses = line.contains(&format!("{banned}::")) || line.trim() == format!("use {banned};");
                assert!(!uses, "{}: {line}", relative(&path));
            }
        }
    }
}

#[test]
fn randomness_is_drawn_in_one_place() {
    // What makes keys and signs draws its own.
    let allowed = ["src/random.rs", "src/backend/local.rs"];
    let drawn =
        files_under("src", "rs").into_iter().map(|path| relative(&path)).filter(|name| read(name).contains("rand::"));
    let others: Vec<String> = drawn.filter(|name| !allowed.contains(&name.as_str())).collect();
    assert!(others.is_empty(), "use crate::random: {others:?}");
}

#[test]
fn nothing_is_left_to_do() {
    // In two halves, so that this file does not contain them.
    let words = [concat!("TO", "DO"), concat!("FIX", "ME")];
    let sources = files_under("src", "rs").into_iter().chain(files_under("tests", "rs"));
    for path in sources.chain(files_under("docs", "md")).chain(files_under("config", "toml")) {
        let text = read(&relative(&path));
        for word in words {
            assert!(!text.contains(word), "{} says {word}", relative(&path));
        }
    }
}

#[test]
fn every_problem_is_answered_somewhere() {
    let sources = files_under("src", "rs").into_iter().filter(|path| !path.ends_with("http/problem.rs"));
    let code: String = sources.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let mentions = |kind: &ProblemType| {
        let name = format!("ProblemType::{kind:?}");
        code.match_indices(&name).any(|(at, _)| !code[at + name.len()..].starts_with(|c: char| c.is_alphanumeric()))
    };
    for kind in ProblemType::ALL {
        assert!(mentions(kind), "{} is never answered with", kind.slug());
    }
}

#[test]
fn the_readme_lists_every_problem_and_no_other() {
    let readme = read("README.md");
    let listed: BTreeMap<&str, (&str, &str)> = readme
        .lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix("| `")?.strip_suffix(" |")?.split(" | ").collect();
            let [slug, status, meaning] = cells[..] else { return None };
            status.parse::<u16>().ok()?;
            Some((slug.strip_suffix('`')?, (status, meaning)))
        })
        .collect();
    for kind in ProblemType::ALL {
        let (status, meaning) = listed.get(kind.slug()).unwrap_or_else(|| panic!("README lacks {}", kind.slug()));
        assert_eq!(*status, kind.status().as_str(), "{}", kind.slug());
        assert_eq!(*meaning, kind.explanation(), "{}", kind.slug());
    }
    let known: BTreeSet<&str> = ProblemType::ALL.iter().map(|kind| kind.slug()).collect();
    let listed: BTreeSet<&str> = listed.into_keys().collect();
    assert_eq!(listed, known);
}

#[test]
fn every_sample_configuration_loads() {
    for path in files_under("config", "toml") {
        let environment =
            ["GRAFANA_TOKEN", "DASHBOARD_TOKEN", "NOTICE_SECRET"].map(|name| (name.to_owned(), "t".repeat(43)));
        let loaded = load(&Source::File(path.clone()), environment.into_iter());
        let loaded = loaded.unwrap_or_else(|error| panic!("{}: {error}", relative(&path)));
        assert!(loaded.timing.is_empty(), "{}: {:?}", relative(&path), loaded.timing);
    }
}

#[test]
fn the_readme_lists_every_command_and_no_other() {
    let readme = read("README.md");
    let listed: BTreeSet<&str> =
        readme.lines().filter_map(|line| line.strip_prefix("| `jwksd ")?.split('`').next()).collect();
    assert_eq!(listed, subcommands().iter().map(String::as_str).collect());
}

fn jwksd(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_jwksd")).args(arguments).output().unwrap()
}

fn subcommands() -> BTreeSet<String> {
    let help = String::from_utf8(jwksd(&["--help"]).stdout).unwrap();
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names = commands.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.map(|line| line.split_whitespace().next().unwrap().to_owned()).filter(|name| name != "help").collect()
}

/// A flag that does not exist, or one too many arguments, is wrong usage even with `--help` later on, so each flag of
/// the documents must be in the command's own help.
#[test]
fn the_commands_of_the_documents_exist() {
    let known = subcommands();
    let mut checked = 0;
    for document in documents() {
        for command in commands(&read(&document)) {
            let mut words = command.split_whitespace().skip(1);
            let name = words.next().unwrap();
            assert!(known.contains(name), "{document}: {command}: there is no such command");
            // One command has commands of its own.
            let inner = words.clone().next().filter(|_| name == "clock");
            let help = jwksd(&[Some(name), inner, Some("--help")].into_iter().flatten().collect::<Vec<_>>());
            assert!(help.status.success(), "{document}: {command}");
            let help = String::from_utf8(help.stdout).unwrap();
            for flag in words.filter(|word| word.starts_with("--")) {
                let there = help.lines().any(|line| line.split_whitespace().any(|word| word == flag));
                assert!(there, "{document}: {command}: jwksd {name} has no {flag}");
            }
            checked += 1;
        }
    }
    assert!(checked > 20, "only {checked} commands were found");
}

/// Every `jwksd …` of the documents' `sh` blocks, pipes taken apart.
fn commands(document: &str) -> Vec<String> {
    let blocks = document.split("```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    let shell = blocks.filter(|(head, _)| head.split_whitespace().next() == Some("sh"));
    let lines = shell.flat_map(|(_, text)| text.lines()).flat_map(|line| line.split(['|', ';']));
    lines.map(str::trim).filter(|line| line.starts_with("jwksd ")).map(str::to_owned).collect()
}

#[test]
fn banned_crates_are_not_built() {
    let deny: toml::Value = toml::from_str(&read("deny.toml")).unwrap();
    let bans = deny["bans"]["deny"].as_array().unwrap();
    let bans: Vec<&str> = bans.iter().map(|ban| ban["crate"].as_str().unwrap()).collect();
    assert_eq!(bans, ["ring", "openssl", "openssl-sys", "native-tls", "hyper@0.14", "rustls@<0.23"]);
    let lock: toml::Value = toml::from_str(&read("Cargo.lock")).unwrap();
    let text = |value: &toml::Value| value.as_str().unwrap().to_owned();
    let locked = lock["package"].as_array().unwrap();
    let locked: Vec<(String, String)> = locked.iter().map(|p| (text(&p["name"]), text(&p["version"]))).collect();
    // Cargo.lock also names what optional features that are off would need; ring is there for that, and not built.
    let built = built();
    assert!(built.iter().any(|(name, _)| name == "aws-lc-rs"), "the tree could not be read");
    for (name, version) in &built {
        assert!(locked.contains(&(name.clone(), version.clone())), "{name} {version} is not in Cargo.lock");
        assert!(!is_banned(name, version), "{name} {version} is banned and built");
    }
    for (name, version) in &locked {
        assert!(!is_banned(name, version) || name == "ring", "{name} {version} is banned and in Cargo.lock");
    }
}

fn is_banned(name: &str, version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse::<u64>().unwrap_or(0));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match name {
        "ring" | "openssl" | "openssl-sys" | "native-tls" => true,
        "hyper" => (major, minor) == (0, 14),
        "rustls" => (major, minor) < (0, 23),
        _ => false,
    }
}

/// Names and versions of what this machine builds, tests included.
fn built() -> BTreeSet<(String, String)> {
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--edges", "normal,build,dev", "--prefix", "none", "--format", "{p}"]);
    let output = tree.current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let package = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.strip_prefix('v')?.to_owned()))
    };
    text.lines().filter_map(package).collect()
}

#[test]
fn the_changelog_names_this_version() {
    let heading = format!("## [{}]", env!("CARGO_PKG_VERSION"));
    assert!(read("CHANGELOG.md").lines().any(|line| line.starts_with(&heading)), "CHANGELOG.md lacks {heading}");
}

#[test]
fn links_between_documents_resolve() {
    for document in documents() {
        let text = read(&document);
        let folder = root().join(&document).parent().unwrap().to_owned();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { root().join(&document) } else { folder.join(path) };
            assert!(target.exists(), "{document}: {link} leads nowhere");
            if !anchor.is_empty() {
                let headings = std::fs::read_to_string(&target).unwrap();
                let found = headings.lines().filter(|line| line.starts_with('#')).any(|line| slug(line) == anchor);
                assert!(found, "{document}: {link}: there is no such heading");
            }
        }
    }
}

/// As forges make anchors of headings.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// docs/restore.md quotes the constant parts of every refusal, so that a search for a message finds its way out.
#[test]
fn restore_explains_every_refusal_of_a_store() {
    let page = read("docs/restore.md").split_whitespace().collect::<Vec<_>>().join(" ");
    for (source, from) in
        [("src/store/ledger/error.rs", "pub enum LedgerError"), ("src/store/record.rs", "pub enum RecordProblem")]
    {
        let text = read(source);
        let text = text.split(from).nth(1).unwrap().split("\nimpl").next().unwrap();
        let messages = text.split("#[error(").skip(1).filter_map(|rest| rest.split(")]").next());
        for message in messages.filter(|message| *message != "transparent") {
            let message = message.trim().trim_matches('"').replace("\\\n", " ").replace("\\\"", "\"");
            let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
            // The longest piece between placeholders, up to the first advice.
            let pieces = message.split(['{', '}']).step_by(2).map(|piece| piece.split(':').next().unwrap());
            let pieces = pieces.flat_map(|piece| piece.split(['`', '('])).map(str::trim);
            let piece = pieces.max_by_key(|piece| piece.len()).unwrap();
            assert!(page.contains(piece), "docs/restore.md does not quote `{piece}` of {source}");
        }
    }
}
