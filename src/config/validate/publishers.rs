//! Publishers: where else the documents of an issuer are written.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::config::problem::Report;
use crate::config::raw;
use crate::config::{ProcessRole, Publisher, PublisherKind};
use crate::keyring::name::Name;
use crate::keyring::policy::IssuerPolicy;

use super::aws_kms::is_region;
use super::issuers::documents;
use super::url::check_endpoint;
use super::{choose, plain, quoted};

/// Each is written whenever the documents change.
const MOST_PER_ISSUER: usize = 8;
/// Keys of S3 have at most 1024 bytes; the issuer's path and the document's name follow.
const LONGEST_PREFIX: usize = 256;

#[derive(Clone, Copy)]
enum Kind {
    File,
    S3,
}

/// The publishers of one issuer, in the order of the file.
pub(super) fn validate(
    issuer: &Name,
    raw: Option<raw::Named<raw::Publisher>>,
    role: Option<ProcessRole>,
    report: &mut Report,
) -> Vec<Publisher> {
    let table = format!("issuer.{issuer}.publish");
    let raw = raw.unwrap_or_default().entries;
    if role == Some(ProcessRole::Signer) && !raw.is_empty() {
        report.refuse(
            &table,
            "a signer goes by what managers stored and ignores [issuer], so it would publish nothing there: leave it to \
             the managers",
        );
    }
    if raw.len() > MOST_PER_ISSUER {
        report.refuse(&table, format_args!("has {} publishers: at most {MOST_PER_ISSUER} per issuer", raw.len()));
    }
    let publisher = |(name, raw): (Name, raw::Publisher)| {
        let kind = kind(&format!("{table}.{name}"), raw, report)?;
        Some(Publisher { issuer: issuer.clone(), name, kind })
    };
    raw.into_iter().filter_map(publisher).collect()
}

fn kind(table: &str, raw: raw::Publisher, report: &mut Report) -> Option<PublisherKind> {
    let path = |key: &str| format!("{table}.{key}");
    let given = report.require(path("kind"), raw.kind.clone(), "use \"file\" or \"s3\"");
    match choose(&path("kind"), given, &[("file", Kind::File), ("s3", Kind::S3)], report)? {
        Kind::File => {
            let foreign = [
                ("bucket", raw.bucket.is_some()),
                ("prefix", raw.prefix.is_some()),
                ("region", raw.region.is_some()),
                ("endpoint_url", raw.endpoint_url.is_some()),
            ];
            for (key, _) in foreign.into_iter().filter(|(_, given)| *given) {
                report.refuse(path(key), "belongs to kind = \"s3\"; a file publisher has a path");
            }
            let advice = "name the folder to write to, such as \"/srv/www\"";
            report.require(path("path"), raw.path, advice).map(|path| PublisherKind::File { path })
        }
        Kind::S3 => {
            if raw.path.is_some() {
                report.refuse(path("path"), "belongs to kind = \"file\"; an s3 publisher has a bucket and a prefix");
            }
            s3(table, raw, report)
        }
    }
}

fn s3(table: &str, raw: raw::Publisher, report: &mut Report) -> Option<PublisherKind> {
    let path = |key: &str| format!("{table}.{key}");
    let bucket = report.require(path("bucket"), raw.bucket, "name the bucket, such as \"example-jwks\"");
    if let Some(bucket) = bucket.as_ref().filter(|bucket| !is_bucket(bucket)) {
        report.refuse(
            path("bucket"),
            format_args!(
                "{} is not a bucket's name: 3 to 63 of a-z, 0-9, - and ., beginning and ending with a letter or digit",
                quoted(bucket)
            ),
        );
    }
    let prefix = raw.prefix.unwrap_or_default();
    let prefix = prefix.strip_suffix('/').unwrap_or(&prefix);
    if let Err(message) = check_prefix(prefix) {
        report.refuse(path("prefix"), message);
    }
    if let Some(region) = raw.region.as_ref().filter(|region| !is_region(region)) {
        report.refuse(path("region"), format_args!("{} is not a region such as \"eu-central-1\"", quoted(region)));
    }
    if let Some(Err(message)) = raw.endpoint_url.as_deref().map(check_endpoint) {
        report.refuse(path("endpoint_url"), message);
    }
    Some(PublisherKind::S3 {
        bucket: bucket?,
        prefix: prefix.to_owned(),
        region: raw.region,
        endpoint_url: raw.endpoint_url,
    })
}

/// Amazon S3 user guide, "General purpose bucket naming rules".
fn is_bucket(name: &str) -> bool {
    let end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let legal = |c: char| end(c) || c == '-' || c == '.';
    (3..=63).contains(&name.len())
        && name.chars().all(legal)
        && name.starts_with(end)
        && name.ends_with(end)
        && !name.contains("..")
        && name.parse::<std::net::Ipv4Addr>().is_err()
}

/// What needs no encoding on the way (Amazon S3 user guide, "Safe characters").
fn check_prefix(prefix: &str) -> Result<(), &'static str> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "!-_.*'()/".contains(c);
    if prefix.len() > LONGEST_PREFIX {
        return Err("is longer than 256 bytes");
    }
    if !prefix.chars().all(legal) {
        return Err("has a character that keys had better not have: use letters, digits, / and !-_.*'()");
    }
    if !prefix.is_empty() && prefix.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return Err("has an empty segment, `.` or `..`: write it like \"jwks/production\"");
    }
    Ok(())
}

/// No two publishers write one document, and none of them a file where another one needs a folder.
pub(super) fn refuse_collisions(publishers: &[Publisher], issuers: &[IssuerPolicy], report: &mut Report) {
    let issuers: HashMap<&Name, &IssuerPolicy> = issuers.iter().map(|issuer| (&issuer.name, issuer)).collect();
    let mut written: HashMap<String, &Publisher> = HashMap::new();
    let mut above: HashMap<String, &Publisher> = HashMap::new();
    for publisher in publishers {
        let Some(issuer) = issuers.get(&publisher.issuer).filter(|issuer| !issuer.url.is_empty()) else { continue };
        let places: Vec<_> = documents(issuer).iter().map(|document| place(&publisher.kind, document)).collect();
        if let Some((place, first)) = places.iter().find_map(|place| Some((place, written.get(place)?))) {
            let message = format_args!("{place} is written by {} too: give each its own place", first.table());
            report.refuse(publisher.table(), message);
            continue;
        }
        let folders = || places.iter().flat_map(|place| parents(&publisher.kind, place));
        let file_over = folders().find_map(|folder| Some((folder, *written.get(folder)?)));
        let under = || places.iter().find_map(|place| Some((place.as_str(), *above.get(place)?)));
        if let Some((place, first)) = file_over.or_else(under) {
            let message = format_args!(
                "{place} would be a file for one and a folder for the other of this and {}: give them different folders, \
                 or one issuer discovery = \"off\"",
                first.table()
            );
            report.refuse(publisher.table(), message);
            continue;
        }
        above.extend(folders().map(|folder| (folder.to_owned(), publisher)));
        written.extend(places.into_iter().map(|place| (place, publisher)));
    }
}

/// Where a document goes, in words that are equal for equal places.
fn place(kind: &PublisherKind, document: &str) -> String {
    match kind {
        PublisherKind::File { path } => format!("{}{document}", plain(path).display()),
        PublisherKind::S3 { bucket, prefix, endpoint_url, .. } => {
            let endpoint = endpoint_url.as_ref().map(|url| format!(" at {}", url.trim_end_matches('/')));
            let slash = if prefix.is_empty() { "" } else { "/" };
            format!("s3://{bucket}{slash}{prefix}{document}{}", endpoint.unwrap_or_default())
        }
    }
}

/// The folders above a file. S3 has none.
fn parents<'a>(kind: &PublisherKind, place: &'a str) -> impl Iterator<Item = &'a str> {
    let is_file = matches!(kind, PublisherKind::File { .. });
    Path::new(place).ancestors().skip(1).filter_map(Path::to_str).filter(move |folder| is_file && !folder.is_empty())
}

/// The folders that publishers write to.
pub(super) fn folders(publishers: &[Publisher]) -> impl Iterator<Item = (String, PathBuf)> {
    publishers.iter().filter_map(|publisher| match &publisher.kind {
        PublisherKind::File { path } => Some((format!("{}.path", publisher.table()), plain(path))),
        PublisherKind::S3 { .. } => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_named_as_the_service_names_them() {
        for good in ["abc", "example-jwks", "a.b.c", "0a9", &"a".repeat(63)] {
            assert!(is_bucket(good), "{good} was refused");
        }
        for bad in ["ab", &"a".repeat(64), "-abc", "abc-", "a..b", "Abc", "a_b", "192.168.1.1", "a/b", "s3://abc", ""] {
            assert!(!is_bucket(bad), "{bad} was accepted");
        }
    }

    #[test]
    fn prefixes_are_plain() {
        for good in ["", "jwks", "jwks/production", "a.b_c-d!*'()"] {
            assert!(check_prefix(good).is_ok(), "{good} was refused");
        }
        for bad in ["/", "/a", "a/", "a//b", "a/../b", ".", "a b", "a%20b", "ä", "a?b", &"a".repeat(257)] {
            assert!(check_prefix(bad).is_err(), "{bad} was accepted");
        }
    }
}
