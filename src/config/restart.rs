//! What a running daemon cannot take up.

use super::{Address, Config, Seal, Store, StoreKind};

/// The listeners there can be.
const TABLES: [&str; 5] = ["public", "signer", "admin", "ops", "replication"];

/// What differs between `old` and `new` and is only taken up by a restart: role, listeners, store, seal, publishers, log
/// format and level. Everything else (keysets, issuers, clients, tokens, certificates, deadlines) can be adopted while
/// running.
pub fn restart_needed(old: &Config, new: &Config) -> Vec<String> {
    let mut changes = Vec::new();
    let mut compare = |path: &str, old: String, new: String| {
        if old != new {
            changes.push(format!("{path}: {old} → {new}"));
        }
    };
    compare("role", old.role.to_string(), new.role.to_string());
    for table in TABLES {
        compare(table, describe_listener(old, table), describe_listener(new, table));
    }
    compare("admin.page", describe_page(old), describe_page(new));
    compare("store", describe_store(&old.store), describe_store(&new.store));
    compare("seal", old.seal.key.to_string(), new.seal.key.to_string());
    compare("seal.previous", describe_previous(&old.seal), describe_previous(&new.seal));
    compare("issuer.NAME.publish", describe_publishers(old), describe_publishers(new));
    compare("backend.aws-kms", format!("{:?}", old.aws_kms), format!("{:?}", new.aws_kms));
    compare("log.format", format!("{:?}", old.log.format), format!("{:?}", new.log.format));
    compare("telemetry.traces", describe_traces(old), describe_traces(new));
    compare("log.level", old.log.level.as_str().to_owned(), new.log.level.as_str().to_owned());
    changes
}

/// What differs so much that a process that runs by `old` can take nothing of `new`: what its policies are depends on it.
/// Without a shared store they have no staleness limit and no publish lag, and a signer's configuration has none at all.
pub fn restart_first(old: &Config, new: &Config) -> Vec<String> {
    let role = (old.role != new.role).then(|| format!("role: {} → {}", old.role, new.role));
    let (from, to) = (&old.store.kind, &new.store.kind);
    let store =
        (from.is_shared() != to.is_shared()).then(|| format!("store.kind: {} → {}", from.as_str(), to.as_str()));
    let replicates = |config: &Config| config.replication.is_some() && !config.store.kind.is_shared();
    let replication = (replicates(old) != replicates(new)).then(|| {
        let word = |config: &Config| if replicates(config) { "on" } else { "off" };
        format!("replication: {} → {}", word(old), word(new))
    });
    let changes = role.into_iter().chain(store).chain(replication);
    changes.map(|change| format!("{change} needs a restart, before which nothing of the change is taken")).collect()
}

fn describe_listener(config: &Config, table: &str) -> String {
    let Some((_, listener)) = config.listeners().find(|(name, _)| *name == table) else { return "off".to_owned() };
    let tls = if listener.tls.is_some() { " with TLS" } else { "" };
    match &listener.address {
        Address::Tcp(_) => format!("{}{tls}", listener.address),
        Address::Unix { mode, .. } => format!("{} (mode {mode:04o}){tls}", listener.address),
    }
}

/// Only where there is an admin listener to speak of.
fn describe_page(config: &Config) -> String {
    config.admin.as_ref().is_none_or(|admin| admin.page).to_string()
}

/// Everything about the store that only a start reads. The limits of a shared store are part of the policies.
fn describe_store(store: &Store) -> String {
    let mut text = store.kind.to_string();
    let mut further = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            text.push_str(&format!(", {key} {value}"));
        }
    };
    let path = |path: &std::path::PathBuf| path.display().to_string();
    match &store.kind {
        StoreKind::File { .. } => {}
        StoreKind::Postgres(postgres) => {
            further("ca_file", postgres.ca_file.as_ref().map(path));
            further("statement_timeout", Some(postgres.statement_timeout.to_string()));
            further("connections", Some(postgres.connections.to_string()));
        }
        StoreKind::Upstream(upstream) => {
            further("token from", Some(upstream.token.to_string()));
            further("ca_file", upstream.ca_file.as_ref().map(path));
            let names = |names: &Vec<_>| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            further("keysets", upstream.keysets.as_ref().map(names));
        }
    }
    further("state_path", store.state_path.as_ref().map(path));
    text
}

fn describe_traces(config: &Config) -> String {
    let Some(traces) = &config.telemetry.traces else { return "off".to_owned() };
    let endpoint = traces.endpoint.as_deref().unwrap_or("the environment's endpoint");
    format!("{endpoint}, sample_ratio {}", traces.sample_ratio.as_f64())
}

fn describe_previous(seal: &Seal) -> String {
    named(seal.previous.iter().map(|seal| format!("{}={}", seal.name, seal.key)))
}

fn describe_publishers(config: &Config) -> String {
    named(
        config.publishers.iter().map(|publisher| format!("{}.{}={}", publisher.issuer, publisher.name, publisher.kind)),
    )
}

/// The order in the file does not matter.
fn named(entries: impl Iterator<Item = String>) -> String {
    let mut entries: Vec<_> = entries.collect();
    entries.sort();
    if entries.is_empty() { "none".to_owned() } else { entries.join(", ") }
}
