//! What seals keyrings, and that secrets and what is kept or shown do not lie together.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::config::problem::Report;
use crate::config::raw;
use crate::config::{PreviousSeal, Publisher, Seal, SealKey, Store, StoreKind};

use super::listeners::Listeners;
use super::store::folders;
use super::{choose, plain, publishers, quoted};

pub(super) fn seal(raw: Option<raw::Seal>, report: &mut Report) -> Option<Seal> {
    let raw = report.require("seal", raw, "add [seal] with kind = \"file\" and path = \"data/seal.key\"")?;
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

/// Each secret has a file of its own, and none lies among the records that it protects or among what is published.
pub(super) fn keep_apart(
    store: &Store,
    seal: &Seal,
    listeners: &Listeners,
    publishers: &[Publisher],
    report: &mut Report,
) {
    keep_keys_apart(seal, report);
    let files = secret_files(store, seal, listeners);
    let kept: Vec<_> = folders(store).map(|(key, path)| (key, plain(path))).collect();
    let mut taken: HashMap<PathBuf, &str> = HashMap::new();
    for (key, path) in &files {
        let path = plain(path);
        for (folder_key, folder) in &kept {
            if path == *folder {
                report.refuse(key, format_args!("is the folder of {folder_key}: secrets have files of their own"));
            } else if path.starts_with(folder) {
                let message =
                    format_args!("lies in the folder of {folder_key}: a copy of the store would hold {key} too");
                report.warn(key, message);
            }
        }
        match taken.get(&path) {
            // Two tokens of one listener with one file are refused where they are compared.
            Some(first) if ["admin.", "replication."].iter().any(|t| first.starts_with(t) && key.starts_with(t)) => {}
            Some(first) => report.refuse(key, format_args!("is the file of {first}: secrets have files of their own")),
            None => {
                taken.insert(path, key);
            }
        }
    }
    for (key, folder) in publishers::folders(publishers) {
        let kept = kept.iter().map(|(key, path)| ((*key).to_owned(), path.clone()));
        let secrets = files.iter().map(|(key, path)| (key.clone(), plain(path)));
        for (other, path) in kept.chain(secrets) {
            if path.starts_with(&folder) {
                report.refuse(&key, format_args!("holds {other}, and whatever lies there is published: name another"));
            } else if folder.starts_with(&path) {
                report.refuse(&key, format_args!("lies in {other}, which holds nothing else: name another folder"));
            }
        }
    }
}

/// The files of secrets that open the store or are asked for beyond signatures, with their keys.
fn secret_files<'a>(store: &'a Store, seal: &'a Seal, listeners: &'a Listeners) -> Vec<(String, &'a Path)> {
    let mut files: Vec<(String, &Path)> = Vec::new();
    files.extend(seal.keys().filter_map(|(table, key)| match key {
        SealKey::File { path } => Some((format!("{table}.path"), path.as_path())),
        SealKey::AwsKms { .. } => None,
    }));
    let admins = listeners.admin.iter().flat_map(|admin| &admin.tokens);
    let admins = admins.map(|token| (format!("admin.token.{}.file", token.name), &token.source));
    let replicas = listeners.replication.iter().flat_map(|replication| &replication.clients);
    let replicas = replicas.map(|client| (format!("replication.client.{}.token_file", client.name), &client.token));
    files.extend(admins.chain(replicas).filter_map(|(key, source)| Some((key, source.file()?.as_path()))));
    let opens = match &store.kind {
        StoreKind::File { .. } => None,
        StoreKind::Postgres(postgres) => postgres.url.file().map(|path| ("store.url_file", path)),
        StoreKind::Upstream(upstream) => upstream.token.file().map(|path| ("store.token_file", path)),
    };
    files.extend(opens.map(|(key, path)| (key.to_owned(), path.as_path())));
    files
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
