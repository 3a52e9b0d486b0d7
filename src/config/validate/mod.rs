//! From what the file says to what it means: every rule about a configuration that is not about time.

mod aws_kms;
mod issuers;
mod keysets;
mod kubernetes;
mod listeners;
mod notices;
mod publishers;
mod secrets;
mod storage;
mod store;
mod telemetry;
mod url;

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use crate::keyring::name::Name;
use crate::keyring::time::Span;
use crate::keyring::timing::Finding;

use super::problem::{Report, suggest};
use super::raw::{Log as RawLog, Root};
use super::{Config, Log, LogFormat, LogLevel, ProcessRole, Store, StoreKind, Upstream};

/// The longest `shutdown_delay`.
const LONGEST_SHUTDOWN_DELAY: Span = Span::HOUR;

/// What validation found out.
#[derive(Default)]
pub(super) struct Validated {
    /// Meaningful only when nothing was refused.
    pub(super) config: Option<Config>,
    pub(super) timing: Vec<Finding>,
}

pub(super) fn root(raw: Root, report: &mut Report) -> Validated {
    let role = role(raw.role, report);
    let shutdown_delay = at_most("shutdown_delay", raw.shutdown_delay, LONGEST_SHUTDOWN_DELAY, report);
    let aws_kms = aws_kms::validate(raw.backend.unwrap_or_default().aws_kms, report);
    let log = log(raw.log.unwrap_or_default(), report);
    let telemetry = telemetry::validate(raw.telemetry.unwrap_or_default(), report);
    if role == Some(ProcessRole::Signer) {
        let tables =
            [("issuer", raw.issuer.is_some()), ("defaults", raw.defaults.is_some()), ("keyset", raw.keyset.is_some())];
        warn_of_idle_tables(&tables, report);
    }
    let (issuers, publishers) = issuers::validate(raw.issuer, role, report);
    let names = raw.keyset.iter().flat_map(|named| &named.entries).map(|(name, _)| name.clone()).collect();
    let sharing = store::sharing(raw.store.as_ref(), raw.replication.is_some());
    let defaults = raw.defaults.unwrap_or_default();
    let keysets = keysets::validate(raw.keyset, defaults, &issuers, sharing, role, report);
    let store = store::validate(raw.store, role, report);
    let seal = storage::seal(raw.seal, report);
    let known = known_keysets(names, role, store.as_ref());
    let notices = notices::validate(raw.notice, role, known.as_ref(), report);
    let given = listeners::Given {
        public: raw.public,
        signer: raw.signer,
        admin: raw.admin,
        ops: raw.ops,
        replication: raw.replication,
    };
    let listeners = listeners::validate(given, role, known.as_ref(), report);
    let kubernetes = kubernetes::validate(raw.kubernetes, listeners.signer.as_ref(), report);
    if let Some(StoreKind::Upstream(upstream)) = store.as_ref().map(|store| &store.kind)
        && upstream.keysets.is_some()
        && listeners.public.is_some()
    {
        let message =
            "names a part of the keysets, and what [public] serves of an issuer must be whole: leave out one of them";
        report.refuse("store.keysets", message);
    }
    if let (Some(store), Some(seal)) = (&store, &seal) {
        storage::keep_apart(store, seal, &listeners, &publishers, report);
    }
    // What a signer is to do is stored, and what the file says of it is not judged.
    let (issuers, keysets) = if role == Some(ProcessRole::Signer) { Default::default() } else { (issuers, keysets) };
    let timing = keysets::timing(&keysets, &issuers, report);
    let config = match (role, store, seal) {
        (Some(role), Some(store), Some(seal)) => Some(Config {
            role,
            public: listeners.public,
            signer: listeners.signer,
            admin: listeners.admin,
            ops: listeners.ops,
            replication: listeners.replication,
            kubernetes,
            store,
            seal,
            issuers,
            keysets,
            publishers,
            aws_kms,
            notices,
            log,
            telemetry,
            shutdown_delay: shutdown_delay.unwrap_or(Span::ZERO),
        }),
        _ => None,
    };
    Validated { config, timing }
}

/// `None` when it could not be understood.
fn role(given: Option<String>, report: &mut Report) -> Option<ProcessRole> {
    let roles = [ProcessRole::All, ProcessRole::Manager, ProcessRole::Signer].map(|role| (role.as_str(), role));
    if given.is_none() && !report.is_broken("role") {
        return Some(ProcessRole::default());
    }
    choose("role", given, &roles, report)
}

/// One file may serve all roles; nobody is to think that these tables govern a signer.
fn warn_of_idle_tables(tables: &[(&str, bool)], report: &mut Report) {
    for (table, _) in tables.iter().filter(|(_, given)| *given) {
        report.warn(
            table,
            "has no effect with role = \"signer\": it signs for every keyset in the store, by the policy that managers \
             stored",
        );
    }
}

/// The keysets that other tables may name. `None`: whether there is one is not known here.
fn known_keysets(configured: HashSet<Name>, role: Option<ProcessRole>, store: Option<&Store>) -> Option<HashSet<Name>> {
    match (role, store.map(|store| &store.kind)) {
        (Some(ProcessRole::Signer), Some(StoreKind::Upstream(Upstream { keysets: Some(names), .. }))) => {
            Some(names.iter().cloned().collect())
        }
        (Some(ProcessRole::Signer) | None, _) => None,
        _ => Some(configured),
    }
}

fn log(raw: RawLog, report: &mut Report) -> Log {
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json)];
    let levels = [
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    Log {
        format: choose("log.format", raw.format, &formats, report).unwrap_or_default(),
        level: choose("log.level", raw.level, &levels, report).unwrap_or_default(),
        signatures: raw.signatures.unwrap_or(false),
    }
}

/// The value of the word that `path` is set to.
fn choose<T: Copy>(path: &str, given: Option<String>, words: &[(&str, T)], report: &mut Report) -> Option<T> {
    let given = given?;
    let chosen = words.iter().find(|(word, _)| *word == given).map(|(_, value)| *value);
    if chosen.is_none() {
        let known: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        report.refuse(path, format_args!("{} is not one of its values; {}", quoted(&given), suggest(&given, &known)));
    }
    chosen
}

/// A duration no longer than `most`.
fn at_most(path: &str, given: Option<Span>, most: Span, report: &mut Report) -> Option<Span> {
    if let Some(given) = given.filter(|given| *given > most) {
        report.refuse(path, format_args!("{given} is too long: at most {most}"));
        return None;
    }
    given
}

/// A given text in a message: escaped and cut.
fn quoted(text: &str) -> String {
    let cut: String = text.chars().take(80).collect();
    if cut.len() < text.len() { format!("{cut:?}…") } else { format!("{cut:?}") }
}

/// Without `.`, so that `./data` is `data`. Links are not followed: the files need not exist yet.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| *component != Component::CurDir).collect()
}
