//! What managers and signers say to each other over HTTP: shapes, header fields and limits, for both ends.
//!
//! The two may be of neighbouring releases while a fleet is upgraded. So a release only adds: members, parameters and header
//! fields that the other end may pass over, and that this one does without.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::Document;
use super::shared::Report;
use crate::keyring::name::Name;
use crate::keyring::time::Timestamp;

/// Where records are: the index here, each record below.
pub const RECORDS: &str = "/v1/records";

/// Where replicas report, each under its name.
pub const REPLICAS: &str = "/v1/replicas";

/// The answering replica's trusted clock, RFC 3339.
pub const STORE_TIME: &str = "jwksd-store-time";

/// Milliseconds since the answering replica knew from its store that this is what is stored; 0 where nobody else writes.
pub const AGE: &str = "jwksd-age-ms";

/// How many milliseconds the answer was held back for something to change: what else it took, it was on its way.
pub const WAITED: &str = "jwksd-waited-ms";

/// A replica may ask an answer to be held back for this long, in seconds (`Prefer: wait`, RFC 7240 §4.3).
pub const LONGEST_WAIT: u64 = 60;

/// The most bytes of an index: room for 50,000 records.
pub const LONGEST_INDEX: usize = 8 * 1024 * 1024;

/// The most bytes of a report: room for 10,000 keysets.
pub const LONGEST_REPORT: usize = 1024 * 1024;

/// The longest query that restricts an index to some keysets, in bytes; who wants more takes the whole index.
pub const LONGEST_QUERY: usize = 8 * 1024;

/// What a replica can have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct IndexBody {
    /// In order of `document`.
    pub documents: Vec<IndexEntry>,
}

/// A record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct IndexEntry {
    /// `installation`, or `keyrings/` and a keyset: its path below `/v1/records/`.
    pub document: String,
    /// SHA-256 of what is served, base64url; null while it must exist but has not been read and found good.
    pub digest: Option<String>,
    /// For people.
    pub generation: Option<u64>,
    /// There while the store has held something else for longer than it takes to read it: `digest` is the last good one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disputed: Option<Disputed>,
}

/// What the store has in the place of a record that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Disputed {
    /// Its digest; null where it is missing.
    pub stored: Option<String>,
}

/// What a signer says of itself. What a newer one adds is passed over: a manager that refused it would wait for none of
/// the signers that were upgraded first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReportBody {
    /// `signer`.
    pub role: String,
    /// Of the software.
    pub version: String,
    /// Its public listener is open.
    pub publishes: bool,
    /// It can send notices to receivers.
    #[serde(default = "as_older_releases_do")]
    pub tells: bool,
    /// It stopped in good order: since this report it serves and signs nothing.
    #[serde(default)]
    pub stopped: bool,
    /// Of each keyring that it shows.
    #[serde(deserialize_with = "by_known_name")]
    #[schema(value_type = BTreeMap<String, u64>)]
    pub generations: BTreeMap<Name, u64>,
    /// By URL of each issuer that it publishes: since when without a long silence.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    pub resumed: BTreeMap<String, Timestamp>,
}

impl ReportBody {
    pub fn of(report: &Report) -> Self {
        let Report { replica: _, role, version, publishes, tells, stopped, generations, resumed } = report.clone();
        ReportBody { role, version, publishes, tells, stopped, generations, resumed }
    }

    pub fn into_report(self, replica: String) -> Report {
        let ReportBody { role, version, publishes, tells, stopped, generations, resumed } = self;
        Report { replica, role, version, publishes, tells, stopped, generations, resumed }
    }
}

/// Those that do not say so were never told otherwise.
fn as_older_releases_do() -> bool {
    true
}

/// A keyset that a newer release may name so is none of ours.
fn by_known_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<Name, u64>, D::Error> {
    let told = BTreeMap::<String, u64>::deserialize(deserializer)?;
    Ok(told.into_iter().filter_map(|(keyset, generation)| Some((Name::parse(&keyset).ok()?, generation))).collect())
}

/// The path of a document below [`RECORDS`]; `None` for what is not served.
pub fn path_of(document: &Document) -> Option<String> {
    match document {
        Document::Installation => Some("installation".to_owned()),
        Document::Keyring(name) => Some(format!("keyrings/{name}")),
        _ => None,
    }
}

/// The document of a path.
pub fn document_at(path: &str) -> Option<Document> {
    match path.strip_prefix("keyrings/") {
        Some(name) => Name::parse(name).ok().map(Document::Keyring),
        None => (path == "installation").then_some(Document::Installation),
    }
}
