//! From what the file says to what it means: every rule about a configuration that is not about time.

mod aws_kms;
mod issuers;
mod keysets;
mod listeners;
mod storage;

use std::collections::HashSet;

use crate::keyring::name::Name;
use crate::keyring::time::Span;
use crate::keyring::timing::Finding;

use super::problem::{Report, suggest};
use super::raw::{Log as RawLog, Root};
use super::{Config, Log, LogFormat, LogLevel};

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
    role(raw.role, report);
    let shutdown_delay = at_most("shutdown_delay", raw.shutdown_delay, LONGEST_SHUTDOWN_DELAY, report);
    let aws_kms = aws_kms::validate(raw.backend.unwrap_or_default().aws_kms, report);
    let log = log(raw.log.unwrap_or_default(), report);
    let issuers = issuers::validate(raw.issuer, report);
    let names: HashSet<Name> =
        raw.keyset.iter().flat_map(|named| &named.entries).map(|(name, _)| name.clone()).collect();
    let keysets = keysets::validate(raw.keyset, raw.defaults.unwrap_or_default(), &issuers, report);
    let timing = keysets::timing(&keysets, &issuers, report);
    let listeners = listeners::validate(raw.public, raw.signer, raw.admin, raw.ops, &names, report);
    let storage = storage::validate(raw.store, raw.seal, listeners.admin.as_ref(), report);

    let config = match (listeners.public, storage) {
        (Some(public), Some((store, seal))) => Some(Config {
            public,
            signer: listeners.signer,
            admin: listeners.admin,
            ops: listeners.ops,
            store,
            seal,
            issuers,
            keysets,
            aws_kms,
            log,
            shutdown_delay: shutdown_delay.unwrap_or(Span::ZERO),
        }),
        _ => None,
    };
    Validated { config, timing }
}

fn role(role: Option<String>, report: &mut Report) {
    if let Some(role) = role.filter(|role| role != "all") {
        report.refuse("role", format_args!("{role:?}: this release has one role, \"all\"; leave it out"));
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
