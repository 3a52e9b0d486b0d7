//! Where keyrings live and what seals them.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use crate::config::problem::{Report, suggest};
use crate::config::raw;
use crate::config::{Admin, Initialise, PreviousSeal, Seal, Store, TokenSource};
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
    let is_file = kind("store.kind", raw.kind, &["postgres", "upstream", "kubernetes"], report);
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

fn seal(raw: raw::Seal, report: &mut Report) -> Option<Seal> {
    let path = if kind("seal.kind", raw.kind, &["aws-kms"], report) {
        report.require("seal.path", raw.path, "name the file of the key-encryption key, such as \"data/seal.key\"")
    } else {
        None
    };
    let mut previous = Vec::new();
    for (name, raw) in raw.previous.unwrap_or_default().entries {
        if !kind(&format!("seal.previous.{name}.kind"), raw.kind, &["aws-kms"], report) {
            continue;
        }
        let path = format!("seal.previous.{name}.path");
        if let Some(path) = report.require(path, raw.path, "name the file of the earlier key") {
            previous.push(PreviousSeal { name, path });
        }
    }
    Some(Seal { path: path?, previous })
}

/// Whether it is `file`, as when nothing is said; `later` are the kinds that other releases have.
fn kind(path: &str, given: Option<String>, later: &[&str], report: &mut Report) -> bool {
    match given {
        None => return true,
        Some(kind) if kind == "file" => return true,
        Some(kind) if later.contains(&kind.as_str()) => {
            report.refuse(path, format_args!("{kind:?} is not in this release, which has only \"file\""));
        }
        Some(kind) => {
            let hint = suggest(&kind, &["file"]);
            report.refuse(path, format_args!("{} is not one of its values; {hint}", quoted(&kind)));
        }
    }
    false
}

/// Each secret has a file of its own, and none lies among the records that it protects.
fn keep_apart(store: &Store, seal: &Seal, admin: Option<&Admin>, report: &mut Report) {
    let mut files: Vec<(String, &Path)> = vec![("seal.path".to_owned(), &seal.path)];
    files.extend(seal.previous.iter().map(|s| (format!("seal.previous.{}.path", s.name), s.path.as_path())));
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

/// Without `.`, so that `./data` is `data`. Links are not followed: the files need not exist yet.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| *component != Component::CurDir).collect()
}
