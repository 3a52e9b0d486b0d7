//! Records from managers over HTTP: for replicas that need neither the store behind them nor the right to write.

mod fault;
mod line;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use reqwest::header::{ETAG, HeaderMap, HeaderName, IF_NONE_MATCH};
use reqwest::{Method, StatusCode, Url};

pub use self::line::OpenError;

use self::fault::Fault;
use self::line::{Line, Question};
use super::record::LONGEST_RECORD;
use super::shared::{Heads, Replica, Report, Revision, SharedStore};
use super::wire::{self, IndexBody, IndexEntry, LONGEST_INDEX, LONGEST_QUERY, LONGEST_WAIT, ReportBody};
use super::{Digest, Document, Store, StoreError};
use crate::clock::Clock;
use crate::config::Secret;
use crate::keyring::name::Name;
use crate::keyring::time::{Span, Timestamp};

const PREFER: HeaderName = HeaderName::from_static("prefer");

/// Where managers are, and how they are asked.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Of managers: `https://HOST:PORT`, a path before `/v1` if something in between wants one. Any of them will do.
    pub urls: Vec<String>,
    pub token: Token,
    /// PEM certificates: who else signs is not trusted. `None`: the system's certificate authorities.
    pub ca_file: Option<PathBuf>,
    /// Those that this replica uses; `None`: all. The installation's record always comes along.
    pub keysets: Option<Vec<Name>>,
    pub connect_timeout: Span,
    /// From a request to its whole answer, what it was held back for not counted.
    pub answer_timeout: Span,
}

impl UpstreamSettings {
    /// With everything that can be left out.
    pub fn new(urls: Vec<String>, token: Token) -> Self {
        let (connect_timeout, answer_timeout) = (Span::from_secs(5), Span::from_secs(10));
        UpstreamSettings { urls, token, ca_file: None, keysets: None, connect_timeout, answer_timeout }
    }
}

/// What managers know this replica by.
#[derive(Clone, Debug)]
pub enum Token {
    /// Read again when a manager does not take it.
    File(PathBuf),
    Fixed(Secret),
}

/// What managers hold, as one of them tells. Read-only. Ask it for shared documents only: what a replica remembers for
/// itself belongs into a store of its own, see [`Split`](super::split::Split).
pub struct UpstreamStore {
    line: Line,
    clock: Arc<dyn Clock>,
    keysets: Option<Vec<Name>>,
    /// What the manager whose index was taken last serves an older one of, or nothing.
    disputed: Mutex<BTreeSet<Document>>,
}

impl UpstreamStore {
    /// Reads token and certificates (blocking); asks nobody yet.
    pub fn open(settings: UpstreamSettings, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        let keysets = settings.keysets.clone();
        Ok(UpstreamStore { line: Line::open(settings)?, clock, keysets, disputed: Mutex::default() })
    }

    /// The index of what this replica uses.
    async fn index(&self, manager: Url, known: Option<&Revision>, wait: Duration) -> Result<Heads, Fault> {
        let keysets = self.keysets.as_deref();
        let mut question = Question::get(below(&manager, wire::RECORDS)?, LONGEST_INDEX);
        let names = keysets.map(|names| names.iter().map(Name::as_str).collect::<Vec<_>>().join(","));
        if let Some(names) = names.filter(|names| names.len() <= LONGEST_QUERY) {
            question.url.query_pairs_mut().append_pair("keysets", &names);
        }
        if let Some(Revision(etag)) = known {
            question.headers.insert(IF_NONE_MATCH, etag.parse().map_err(|_| Fault::Protocol("its ETag is none"))?);
            let seconds = wait.as_millis().div_ceil(1000).min(u128::from(LONGEST_WAIT));
            let seconds = u64::try_from(seconds).unwrap_or(LONGEST_WAIT);
            if seconds > 0 {
                question.headers.insert(PREFER, format!("wait={seconds}").parse().expect("digits are a header value"));
                question.patience = Duration::from_secs(seconds);
            }
        }
        let begun = self.clock.boot();
        let answer = self.line.ask(&question).await?;
        let took = self.clock.boot().saturating_sub(begun);
        let revision = Revision(header(&answer.headers, ETAG.as_str())?.to_owned());
        let documents = match answer.status {
            StatusCode::NOT_MODIFIED if known == Some(&revision) => None,
            StatusCode::NOT_MODIFIED => return Err(Fault::Protocol("its 304 is about other records")),
            StatusCode::OK => Some(self.take(&revision, &answer.body)?),
            _ => return Err(Fault::refused(&answer)),
        };
        let store_time = Timestamp::parse_rfc3339(header(&answer.headers, wire::STORE_TIME)?);
        let store_time = store_time.ok_or(Fault::Protocol("its store time is none"))?;
        // What it was not held back for it may have spent on its way back, growing old.
        let on_its_way = took.saturating_sub(millis(&answer.headers, wire::WAITED)?);
        let age = millis(&answer.headers, wire::AGE)?.as_millis().saturating_add(on_its_way.as_millis());
        Ok(Heads { revision, store_time, age: Span::from_millis(age), documents })
    }

    /// Takes an index, as far as this replica uses it. A record that the manager cannot vouch for counts as what the store
    /// has in its place, so that nobody takes an older one for confirmed.
    fn take(&self, revision: &Revision, body: &[u8]) -> Result<BTreeMap<Document, Digest>, Fault> {
        if revision.0 != quoted(&Digest::of(body)) {
            return Err(Fault::Protocol("the index is not the one that its ETag names"));
        }
        let (mut documents, mut doubtful) = (BTreeMap::new(), BTreeSet::new());
        for (document, entry) in entries(body)? {
            if !self.uses(&document) {
                continue;
            }
            if entry.disputed.is_some() || entry.digest.is_none() {
                doubtful.insert(document.clone());
            }
            let stored = match entry.disputed {
                Some(disputed) => disputed.stored,
                None => entry.digest,
            };
            let Some(digest) = stored else { continue };
            let digest = Digest::from_base64url(&digest).ok_or(Fault::Protocol("a digest in its index is none"))?;
            documents.insert(document, digest);
        }
        *self.disputed() = doubtful;
        Ok(documents)
    }

    fn uses(&self, document: &Document) -> bool {
        match (document, &self.keysets) {
            (Document::Keyring(name), Some(keysets)) => keysets.contains(name),
            _ => true,
        }
    }

    fn disputed(&self) -> MutexGuard<'_, BTreeSet<Document>> {
        // A panic elsewhere cannot leave the set half changed: it is replaced whole.
        self.disputed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn record(&self, manager: Url, path: &str) -> Result<Option<Vec<u8>>, Fault> {
        let url = below(&manager, &format!("{}/{path}", wire::RECORDS))?;
        let answer = self.line.ask(&Question::get(url, LONGEST_RECORD)).await?;
        match answer.status {
            StatusCode::OK => {
                let etag = header(&answer.headers, ETAG.as_str())?;
                match quoted(&Digest::of(&answer.body)) == etag {
                    true => Ok(Some(answer.body)),
                    false => Err(Fault::Protocol("the record is not the one that its ETag names")),
                }
            }
            // Any other 404 comes from something that is not a manager.
            StatusCode::NOT_FOUND if answer.problem().as_deref() == Some("unknown-record") => Ok(None),
            _ => Err(Fault::refused(&answer)),
        }
    }

    async fn everything(&self, manager: Url) -> Result<BTreeMap<Document, IndexEntry>, Fault> {
        let url = below(&manager, wire::RECORDS)?;
        let answer = self.line.ask(&Question::get(url, LONGEST_INDEX)).await?;
        match answer.status {
            StatusCode::OK => entries(&answer.body),
            _ => Err(Fault::refused(&answer)),
        }
    }

    async fn tell(&self, manager: Url, method: Method, replica: &str, body: Option<Vec<u8>>) -> Result<(), Fault> {
        let mut url = below(&manager, wire::REPLICAS)?;
        url.path_segments_mut().map_err(|()| Fault::Protocol("its URL takes no path"))?.push(replica);
        let question = Question { method, body, ..Question::get(url, LONGEST_INDEX) };
        let answer = self.line.ask(&question).await?;
        if answer.status.is_success() { Ok(()) } else { Err(Fault::refused(&answer)) }
    }
}

#[async_trait]
impl Store for UpstreamStore {
    fn kind(&self) -> &'static str {
        "upstream"
    }

    fn locate(&self, document: &Document) -> String {
        let manager = self.line.manager();
        match wire::path_of(document).and_then(|path| below(&manager, &format!("{}/{path}", wire::RECORDS)).ok()) {
            Some(url) => url.to_string(),
            None => format!("{document} at {manager}"),
        }
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        // A manager that serves has long been initialised.
        let Some(path) = wire::path_of(document) else { return Ok(None) };
        if self.disputed().contains(document) {
            return Err(StoreError::Disputed { document: self.locate(document) });
        }
        let read = self.line.ask_each(|manager| self.record(manager, &path)).await;
        read.map_err(|fault| self.unavailable("read", document.to_string(), fault))
    }

    async fn replace(&self, document: &Document, _expected: Option<Digest>, _bytes: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly { document: document.to_string() })
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly { document: document.to_string() })
    }

    /// All of them, whichever this replica uses.
    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        let asked = self.line.ask_each(|manager| self.everything(manager));
        let entries = asked.await.map_err(|fault| self.unavailable("list", "the keyrings".to_owned(), fault))?;
        let keyring = |document: Document| match document {
            Document::Keyring(name) => Some(name),
            _ => None,
        };
        Ok(entries.into_keys().filter_map(keyring).collect())
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for UpstreamStore {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        let asked = self.line.ask_in_turn(|manager| self.index(manager, known, wait));
        asked.await.map_err(|fault| self.unavailable("ask for", "the records".to_owned(), fault))
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        for report in replicas {
            let body = serde_json::to_vec(&ReportBody::of(report)).expect("strings and integers always serialise");
            let tell = |manager| self.tell(manager, Method::PUT, &report.replica, Some(body.clone()));
            let told = self.line.ask_each(tell).await;
            told.map_err(|fault| self.unavailable("report", format!("the replica {}", report.replica), fault))?;
        }
        Ok(())
    }

    /// Managers do not tell.
    async fn replicas(&self, _longest: Span) -> Result<Vec<Replica>, StoreError> {
        Ok(Vec::new())
    }

    async fn forget(&self, replica: &str) -> Result<(), StoreError> {
        let told = self.line.ask_each(|manager| self.tell(manager, Method::DELETE, replica, None));
        told.await.map_err(|fault| self.unavailable("sign off", format!("the replica {replica}"), fault))
    }
}

impl UpstreamStore {
    fn unavailable(&self, operation: &'static str, what: String, (manager, fault): (Url, Fault)) -> StoreError {
        let document = format!("{what} at {manager}");
        StoreError::Unavailable { operation, document, problem: fault.to_string(), source: None }
    }
}

impl std::fmt::Debug for UpstreamStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UpstreamStore").field("manager", &self.line.manager().as_str()).finish_non_exhaustive()
    }
}

/// A path below the URL of a manager.
fn below(manager: &Url, path: &str) -> Result<Url, Fault> {
    let base = manager.as_str().trim_end_matches('/');
    Url::parse(&format!("{base}{path}")).map_err(|_| Fault::Protocol("its URL takes no path"))
}

fn quoted(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

fn header<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a str, Fault> {
    let mut values = headers.get_all(name).iter();
    match (values.next().and_then(|value| value.to_str().ok()), values.next()) {
        (Some(value), None) => Ok(value),
        _ => Err(Fault::Header(name)),
    }
}

fn millis(headers: &HeaderMap, name: &'static str) -> Result<Span, Fault> {
    let number: u64 = header(headers, name)?.parse().map_err(|_| Fault::Header(name))?;
    Ok(Span::from_millis(i64::try_from(number).unwrap_or(i64::MAX)))
}

/// The entries of an index by document; what a later release adds is passed over.
fn entries(body: &[u8]) -> Result<BTreeMap<Document, IndexEntry>, Fault> {
    let index: IndexBody = serde_json::from_slice(body).map_err(|_| Fault::Protocol("its index is none"))?;
    let mut entries = BTreeMap::new();
    for entry in index.documents {
        let Some(document) = wire::document_at(&entry.document) else { continue };
        if entries.insert(document, entry).is_some() {
            return Err(Fault::Protocol("its index names a record twice"));
        }
    }
    match entries.contains_key(&Document::Installation) {
        true => Ok(entries),
        false => Err(Fault::Protocol("its index lacks the installation")),
    }
}
