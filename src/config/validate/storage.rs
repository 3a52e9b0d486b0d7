//! Where keyrings live and what seals them.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use crate::config::problem::{Report, suggest};
use crate::config::raw;
use crate::config::{Admin, Initialise, PreviousSeal, Seal, SealKey, Store, TokenSource};
use crate::keyring::time::Span;

use super::{choose, quoted};

const DEFAULT_STALENESS_LIMIT: Span = Span::HOUR;
const DEFAULT_PUBLISH_LAG: Span = Span::MINUTE;

pub(super) fn validate(
    store: Option<raw::Store>,
    seal: Option<raw::Seal>,
    admin: Option<&Admin>,
    report: &mut Report,
) -> Option<(Store, Seal)> {
    let store = report.require("store", store, "add [store] with kind = \"file\" and path = \"data/keyrings\"");
    let seal = report.require("seal", seal, "add [seal] with kind = \"file\" and path = \"data/seal.key\"");
    let store = store.and_then(|raw| self::store(raw, report));
    let seal = seal.and_then(|raw| self::seal(raw, report));
    let (store, seal) = (store?, seal?);
    keep_apart(&store, &seal, admin, report);
    Some((store, seal))
}

fn store(raw: raw::Store, report: &mut Report) -> Option<Store> {
    let is_file = store_kind(raw.kind, report);
    let initialise = [("never", Initialise::Never), ("if-empty", Initialise::IfEmpty)];
    let initialise = choose("store.initialise", raw.initialise, &initialise, report).unwrap_or_default();
    // Other kinds need other keys.
    if !is_file {
        return None;
    }
    let path = report.require("store.path", raw.path, "name the folder for keyrings, such as \"data/keyrings\"");
    Some(Store {
        path: path?,
        initialise,
        staleness_limit: raw.staleness_limit.unwrap_or(DEFAULT_STALENESS_LIMIT),
        publish_lag: raw.publish_lag.unwrap_or(DEFAULT_PUBLISH_LAG),
    })
}

/// Whether it is `file`, as when nothing is said.
fn store_kind(given: Option<String>, report: &mut Report) -> bool {
    match given {
        None => return true,
        Some(kind) if kind == "file" => return true,
        Some(kind) if ["postgres", "upstream", "kubernetes"].contains(&kind.as_str()) => {
            report.refuse("store.kind", format_args!("{kind:?} is not in this release, which has only \"file\""));
        }
        Some(kind) => {
            let hint = suggest(&kind, &["file"]);
            report.refuse("store.kind", format_args!("{} is not one of its values; {hint}", quoted(&kind)));
        }
    }
    false
}

fn seal(raw: raw::Seal, report: &mut Report) -> Option<Seal> {
    let raw::Seal { kind, path, key_id, previous, .. } = raw;
    let example = "name the file of the key-encryption key, such as \"data/seal.key\"";
    let key = seal_key("seal", example, KeySource { kind, path, key_id }, report);
    let mut others = Vec::new();
    for (name, raw) in previous.unwrap_or_default().entries {
        let raw::PreviousSeal { kind, path, key_id, .. } = raw;
        let table = format!("seal.previous.{name}");
        if let Some(key) =
            seal_key(&table, "name the file of the earlier key", KeySource { kind, path, key_id }, report)
        {
            others.push(PreviousSeal { name, key });
        }
    }
    Some(Seal { key: key?, previous: others })
}

/// What a seal's table says of where its key is.
struct KeySource {
    kind: Option<String>,
    path: Option<PathBuf>,
    key_id: Option<String>,
}

#[derive(Clone, Copy)]
enum SealKind {
    File,
    AwsKms,
}

fn seal_key(table: &str, example: &str, source: KeySource, report: &mut Report) -> Option<SealKey> {
    let KeySource { kind, path, key_id } = source;
    let kinds = [("file", SealKind::File), ("aws-kms", SealKind::AwsKms)];
    let given = kind.is_some();
    let kind = match choose(&format!("{table}.kind"), kind, &kinds, report) {
        None if given => return None,
        kind => kind.unwrap_or(SealKind::File),
    };
    match kind {
        SealKind::File => {
            if key_id.is_some() {
                let message = "belongs to kind = \"aws-kms\"; a file seal has a path";
                report.refuse(format_args!("{table}.key_id"), message);
            }
            report.require(format!("{table}.path"), path, example).map(|path| SealKey::File { path })
        }
        SealKind::AwsKms => {
            if path.is_some() {
                report.refuse(format_args!("{table}.path"), "belongs to kind = \"file\"; an aws-kms seal has a key_id");
            }
            let example = "name a symmetric key in AWS KMS by its ARN, its ID, or as \"alias/jwksd-seal\"";
            let key_id = report.require(format!("{table}.key_id"), key_id, example)?;
            if !is_key_id(&key_id) {
                report.refuse(
                    format_args!("{table}.key_id"),
                    format_args!(
                        "{} is neither an ARN (arn:aws:kms:REGION:ACCOUNT:key/ID) nor a key ID nor an alias (alias/NAME)",
                        quoted(&key_id)
                    ),
                );
            }
            Some(SealKey::AwsKms { key_id })
        }
    }
}

/// Whether AWS KMS could know a key by this name: API reference of Encrypt, `KeyId`.
fn is_key_id(text: &str) -> bool {
    const LONGEST: usize = 2048;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_/:".contains(c);
    let plain =
        |id: &str| !id.is_empty() && id.len() <= 256 && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let alias = |name: &str| name.strip_prefix("alias/").is_some_and(|name| !name.is_empty());
    if text.len() > LONGEST || !text.chars().all(allowed) {
        return false;
    }
    match text.strip_prefix("arn:") {
        // arn:PARTITION:kms:REGION:ACCOUNT:key/ID
        Some(arn) => {
            let parts: Vec<&str> = arn.splitn(5, ':').collect();
            let [_, "kms", _, _, resource] = parts[..] else { return false };
            resource.strip_prefix("key/").is_some_and(plain) || alias(resource)
        }
        None => alias(text) || plain(text),
    }
}

/// Each secret has a file of its own, and none lies among the records that it protects.
fn keep_apart(store: &Store, seal: &Seal, admin: Option<&Admin>, report: &mut Report) {
    let mut files: Vec<(String, &Path)> = Vec::new();
    files.extend(seal.keys().filter_map(|(table, key)| match key {
        SealKey::File { path } => Some((format!("{table}.path"), path.as_path())),
        SealKey::AwsKms { .. } => None,
    }));
    keep_keys_apart(seal, report);
    files.extend(admin.iter().flat_map(|admin| &admin.tokens).filter_map(|token| match &token.source {
        TokenSource::File(path) => Some((format!("admin.token.{}.file", token.name), path.as_path())),
        TokenSource::Environment(_) => None,
    }));
    let folder = plain(&store.path);
    let mut taken: HashMap<PathBuf, &str> = HashMap::new();
    for (key, path) in &files {
        let path = plain(path);
        if path == folder {
            report.refuse(key, "is the folder of store.path: secrets have files of their own");
        } else if path.starts_with(&folder) {
            report
                .warn(key, format_args!("lies in the folder of store.path: a copy of the store would hold {key} too"));
        }
        match taken.get(&path) {
            // Two admin tokens with one file are refused where tokens are compared.
            Some(first) if first.starts_with("admin.") && key.starts_with("admin.") => {}
            Some(first) => report.refuse(key, format_args!("is the file of {first}: secrets have files of their own")),
            None => {
                taken.insert(path, key);
            }
        }
    }
}

/// An earlier key in AWS KMS that is the present one would do nothing.
fn keep_keys_apart(seal: &Seal, report: &mut Report) {
    let mut taken: HashMap<&str, String> = HashMap::new();
    for (table, key) in seal.keys() {
        let SealKey::AwsKms { key_id } = key else { continue };
        match taken.get(key_id.as_str()) {
            Some(first) => {
                report.refuse(
                    format_args!("{table}.key_id"),
                    format_args!("is the key of {first}: name another, or leave it out"),
                );
            }
            None => _ = taken.insert(key_id, table),
        }
    }
}

/// Without `.`, so that `./data` is `data`. Links are not followed: the files need not exist yet.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| *component != Component::CurDir).collect()
}
