//! Where keyrings live: a folder, a database, or with managers.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::config::problem::{Report, suggest};
use crate::config::raw;
use crate::config::{Initialise, Postgres, ProcessRole, Store, StoreKind, Upstream};
use crate::keyring::name::Name;
use crate::keyring::time::Span;

use super::keysets::Sharing;
use super::secrets::{SecretKeys, TOKEN, secret};
use super::url::check_endpoint;
use super::{choose, quoted};

const DEFAULT_STALENESS_LIMIT: Span = Span::HOUR;
const DEFAULT_PUBLISH_LAG: Span = Span::MINUTE;
const DEFAULT_SCHEMA: &str = "jwksd";
/// PostgreSQL cuts longer identifiers (NAMEDATALEN).
const LONGEST_SCHEMA: usize = 48;
const DEFAULT_STATEMENT_TIMEOUT: Span = Span::from_secs(5);
const SHORTEST_STATEMENT_TIMEOUT: Span = Span::from_millis(100);
const LONGEST_STATEMENT_TIMEOUT: Span = Span::MINUTE;
const DEFAULT_CONNECTIONS: u32 = 4;
/// One listens for changes.
const LEAST_CONNECTIONS: u32 = 2;
const MOST_CONNECTIONS: u32 = 64;
const MOST_UPSTREAMS: usize = 8;

const DATABASE_URL: SecretKeys = SecretKeys {
    file: "url_file",
    env: "url_env",
    noun: "the database's URL",
    example: "DATABASE_URL",
    inline: &["url", "dsn", "user", "password", "token", "secret"],
};

/// The kinds of store, before anything else about them is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Postgres,
    Upstream,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Kind::File => "file",
            Kind::Postgres => "postgres",
            Kind::Upstream => "upstream",
        }
    }
}

/// What the store adds to every policy; the defaults where the store's table could not be read.
pub(super) fn sharing(raw: Option<&raw::Store>, replicates: bool) -> Sharing {
    let Some(raw) = raw else { return Sharing::default() };
    // Zero is accepted where it says nothing: a file store without replicas.
    let given = |limit: Option<Span>| limit.filter(|limit| !limit.is_zero());
    match raw.kind.as_deref() {
        // A file store that no replica fetches from is always confirmed and shows at once what was written.
        kind if replicates || matches!(kind, Some("postgres" | "upstream")) => Sharing {
            staleness_limit: given(raw.staleness_limit).unwrap_or(DEFAULT_STALENESS_LIMIT),
            publish_lag: given(raw.publish_lag).unwrap_or(DEFAULT_PUBLISH_LAG),
        },
        _ => Sharing::default(),
    }
}

pub(super) fn validate(raw: Option<raw::Store>, role: Option<ProcessRole>, report: &mut Report) -> Option<Store> {
    let raw = report.require("store", raw, "add [store] with kind = \"file\" and path = \"data/keyrings\"")?;
    let kind = kind(raw.kind.clone(), report);
    if let (Some(kind), Some(role)) = (kind, role) {
        check_role(kind, role, report);
    }
    let initialise = initialise(raw.initialise.clone(), kind, role, report);
    let kind = kind?;
    refuse_foreign_keys(&raw, kind, report);
    limits(&raw, kind, role, report);
    let staleness_limit = raw.staleness_limit.unwrap_or(DEFAULT_STALENESS_LIMIT);
    let publish_lag = raw.publish_lag.unwrap_or(DEFAULT_PUBLISH_LAG);
    let state_path = raw.state_path.clone().filter(|_| kind != Kind::File);
    let kind = match kind {
        Kind::File => {
            let advice = "name the folder for keyrings, such as \"data/keyrings\"";
            StoreKind::File { path: report.require("store.path", raw.path, advice)? }
        }
        Kind::Postgres => StoreKind::Postgres(postgres(raw, report)?),
        Kind::Upstream => StoreKind::Upstream(upstream(raw, report)?),
    };
    Some(Store { kind, initialise, staleness_limit, publish_lag, state_path })
}

/// `file` when nothing is said.
fn kind(given: Option<String>, report: &mut Report) -> Option<Kind> {
    const KINDS: [&str; 3] = ["file", "postgres", "upstream"];
    let Some(given) = given else { return (!report.is_broken("store.kind")).then_some(Kind::File) };
    match given.as_str() {
        "file" => return Some(Kind::File),
        "postgres" => return Some(Kind::Postgres),
        "upstream" => return Some(Kind::Upstream),
        "kubernetes" => report.refuse(
            "store.kind",
            "\"kubernetes\" is not in this release, which has \"file\", \"postgres\" and \"upstream\"",
        ),
        other => {
            let hint = suggest(other, &KINDS);
            report.refuse("store.kind", format_args!("{} is not one of its values; {hint}", quoted(other)));
        }
    }
    None
}

fn check_role(kind: Kind, role: ProcessRole, report: &mut Report) {
    match (kind, role) {
        (Kind::File, ProcessRole::Manager | ProcessRole::Signer) => report.refuse(
            "role",
            format_args!(
                "\"{role}\" needs a store that several processes share, and store.kind is \"file\": use \"postgres\"{}, \
                 or role = \"all\"",
                if role == ProcessRole::Signer { " or \"upstream\"" } else { "" }
            ),
        ),
        (Kind::Upstream, ProcessRole::All | ProcessRole::Manager) => report.refuse(
            "store.kind",
            format_args!(
                "\"upstream\" only reads what managers keep, and the role is \"{role}\": use role = \"signer\", or \
                 kind = \"postgres\""
            ),
        ),
        _ => {}
    }
}

fn initialise(given: Option<String>, kind: Option<Kind>, role: Option<ProcessRole>, report: &mut Report) -> Initialise {
    if kind == Some(Kind::Upstream) {
        if given.is_some() {
            report.refuse(
                "store.initialise",
                "managers initialise the store, and an upstream signer cannot: leave it out",
            );
        }
        return Initialise::Never;
    }
    let words = [("never", Initialise::Never), ("if-empty", Initialise::IfEmpty)];
    let initialise = choose("store.initialise", given, &words, report).unwrap_or_default();
    if role == Some(ProcessRole::Signer) && initialise == Initialise::IfEmpty {
        report.warn("store.initialise", "has no effect with role = \"signer\": a manager initialises the store");
        return Initialise::Never;
    }
    initialise
}

/// Each key with the kinds that have it.
fn refuse_foreign_keys(raw: &raw::Store, kind: Kind, report: &mut Report) {
    let keys: [(&str, bool, &[Kind]); 12] = [
        ("path", raw.path.is_some(), &[Kind::File]),
        ("state_path", raw.state_path.is_some(), &[Kind::Postgres, Kind::Upstream]),
        ("url_file", raw.url_file.is_some(), &[Kind::Postgres]),
        ("url_env", raw.url_env.is_some(), &[Kind::Postgres]),
        ("ca_file", raw.ca_file.is_some(), &[Kind::Postgres, Kind::Upstream]),
        ("schema", raw.schema.is_some(), &[Kind::Postgres]),
        ("statement_timeout", raw.statement_timeout.is_some(), &[Kind::Postgres]),
        ("connections", raw.connections.is_some(), &[Kind::Postgres]),
        ("urls", raw.urls.is_some(), &[Kind::Upstream]),
        ("token_file", raw.token_file.is_some(), &[Kind::Upstream]),
        ("token_env", raw.token_env.is_some(), &[Kind::Upstream]),
        ("keysets", raw.keysets.is_some(), &[Kind::Upstream]),
    ];
    for (key, given, kinds) in keys {
        if given && !kinds.contains(&kind) {
            let owners: Vec<_> = kinds.iter().map(|kind| format!("kind = \"{}\"", kind.as_str())).collect();
            let message = format_args!(
                "belongs to {}, and this store is of kind \"{}\": leave it out",
                owners.join(" and "),
                kind.as_str()
            );
            report.refuse(format_args!("store.{key}"), message);
        }
    }
}

/// The limits of shared stores.
fn limits(raw: &raw::Store, kind: Kind, role: Option<ProcessRole>, report: &mut Report) {
    if kind == Kind::File {
        return;
    }
    if raw.staleness_limit.is_some_and(Span::is_zero) {
        let message = "0s would stop every signature: no replica confirms its keyrings at every moment";
        report.refuse("store.staleness_limit", message);
    }
    if raw.publish_lag.is_some_and(Span::is_zero) {
        let message = "0s is not to be had: a replica publishes what another one wrote only once it has read it";
        report.refuse("store.publish_lag", message);
    }
    let shared = [("staleness_limit", raw.staleness_limit), ("publish_lag", raw.publish_lag)];
    for (key, given) in shared {
        if let Some(given) = given.filter(|given| !given.is_zero() && *given < Span::SECOND) {
            let message = format_args!("{given} is for tests: every replica asks the store several times within it");
            report.warn(format_args!("store.{key}"), message);
        }
    }
    if role == Some(ProcessRole::Signer) {
        for (key, given) in shared {
            if given.is_some() {
                let message = "has no effect with role = \"signer\": it goes by the policies that managers stored";
                report.warn(format_args!("store.{key}"), message);
            }
        }
    }
}

fn postgres(raw: raw::Store, report: &mut Report) -> Option<Postgres> {
    let url = secret("store", &DATABASE_URL, raw.url_file, raw.url_env, report);
    let schema = raw.schema.unwrap_or_else(|| DEFAULT_SCHEMA.to_owned());
    if let Err(message) = check_schema(&schema) {
        report.refuse("store.schema", format_args!("{} {message}", quoted(&schema)));
    }
    let statement_timeout = raw.statement_timeout.unwrap_or(DEFAULT_STATEMENT_TIMEOUT);
    if !(SHORTEST_STATEMENT_TIMEOUT..=LONGEST_STATEMENT_TIMEOUT).contains(&statement_timeout) {
        let range = format_args!(
            "{statement_timeout} is out of range: {SHORTEST_STATEMENT_TIMEOUT} to {LONGEST_STATEMENT_TIMEOUT}"
        );
        report.refuse("store.statement_timeout", range);
    }
    let connections = raw.connections.unwrap_or(DEFAULT_CONNECTIONS);
    if !(LEAST_CONNECTIONS..=MOST_CONNECTIONS).contains(&connections) {
        let range = format_args!("{connections} is out of range: {LEAST_CONNECTIONS} to {MOST_CONNECTIONS}");
        report.refuse("store.connections", range);
    }
    Some(Postgres { url: url?, ca_file: raw.ca_file, schema, statement_timeout, connections })
}

/// An identifier that needs no quotes and is not PostgreSQL's own.
fn check_schema(schema: &str) -> Result<(), &'static str> {
    let first = |c: char| c.is_ascii_lowercase() || c == '_';
    let other = |c: char| first(c) || c.is_ascii_digit();
    if schema.len() > LONGEST_SCHEMA || !schema.starts_with(first) || !schema.chars().all(other) {
        return Err("is not a schema's name: 1 to 48 of a-z, 0-9 and _, not starting with a digit");
    }
    if schema.starts_with("pg_") || schema == "information_schema" {
        return Err("belongs to PostgreSQL itself: use another name, such as \"jwksd\"");
    }
    Ok(())
}

fn upstream(raw: raw::Store, report: &mut Report) -> Option<Upstream> {
    let advice = "name the replication listeners of the managers, such as [\"https://jwksd.example.com:8624\"]";
    let urls = report.require("store.urls", raw.urls, advice).map(|urls| upstream_urls(urls, report));
    let token = secret("store", &TOKEN, raw.token_file, raw.token_env, report);
    let keysets = raw.keysets.map(|names| upstream_keysets(&names, report));
    Some(Upstream { urls: urls?, token: token?, ca_file: raw.ca_file, keysets })
}

fn upstream_urls(given: Vec<String>, report: &mut Report) -> Vec<String> {
    if !(1..=MOST_UPSTREAMS).contains(&given.len()) {
        report.refuse("store.urls", format_args!("has {} URLs: name 1 to {MOST_UPSTREAMS}", given.len()));
    }
    let mut urls: Vec<String> = Vec::with_capacity(given.len());
    for (index, url) in given.iter().enumerate() {
        let plain = url.trim_end_matches('/');
        let refused = match check_endpoint(url) {
            Ok(()) if urls.iter().any(|other| other.eq_ignore_ascii_case(plain)) => Some("stands there twice"),
            Ok(()) => None,
            Err(message) => Some(message),
        };
        if let Some(message) = refused {
            report.refuse(format_args!("store.urls[{index}]"), message);
        }
        urls.push(plain.to_owned());
    }
    urls
}

/// They are in the managers' store: whether there are such is not known here.
fn upstream_keysets(given: &[String], report: &mut Report) -> Vec<Name> {
    if given.is_empty() {
        report.refuse("store.keysets", "an empty list leaves nothing to sign with: leave it out for every keyset");
    }
    let mut seen = HashSet::new();
    let mut names = Vec::with_capacity(given.len());
    for (index, text) in given.iter().enumerate() {
        let path = format!("store.keysets[{index}]");
        match Name::parse(text) {
            Ok(_) if !seen.insert(text) => {
                report.refuse(path, format_args!("{} stands twice in the list", quoted(text)))
            }
            Ok(name) => names.push(name),
            Err(error) => report.refuse(path, error),
        }
    }
    names
}

/// The folders where a store keeps files.
pub(super) fn folders(store: &Store) -> impl Iterator<Item = (&'static str, &PathBuf)> {
    let own = store.file_path().map(|path| ("store.path", path));
    let state = store.state_path.as_ref().map(|path| ("store.state_path", path));
    own.into_iter().chain(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_plain_identifiers() {
        for good in ["jwksd", "_", "a", "auth_2", "public", &"a".repeat(48)] {
            assert!(check_schema(good).is_ok(), "{good} was refused");
        }
        for bad in
            ["2a", "a-b", "A", "a b", "a\"", "a;drop", "ä", "pg_catalog", "information_schema", &"a".repeat(49), ""]
        {
            assert!(check_schema(bad).is_err(), "{bad} was accepted");
        }
    }
}
