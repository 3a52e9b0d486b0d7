//! A shared store in memory, and the links that replicas reach it by: each can be cut, and answers can get lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::clock::{Clock, ManualClock};
use jwksd::keyring::name::Name;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::store::shared::{Heads, Replica, Report, Revision, SharedStore};
use jwksd::store::{Digest, Document, Store, StoreError};

/// What the database would be.
pub struct Hub {
    clock: Arc<ManualClock>,
    content: Mutex<Content>,
    writes: AtomicU64,
    /// Added to the clock that it tells.
    clock_error: AtomicI64,
}

#[derive(Clone, Default)]
struct Content {
    documents: BTreeMap<Document, Vec<u8>>,
    /// Unique for every state that ever was.
    revision: u64,
    reports: BTreeMap<String, (Report, Timestamp)>,
}

/// A copy of everything, to be put back later.
#[derive(Clone)]
pub struct Copy(Content);

/// One replica's way to the hub.
pub struct Link {
    hub: Arc<Hub>,
    cut: AtomicBool,
    lose_answer: AtomicBool,
    /// Done between that write and the loss of its answer.
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Hub {
    pub fn new(clock: Arc<ManualClock>) -> Arc<Self> {
        Arc::new(Hub { clock, content: Mutex::default(), writes: AtomicU64::new(0), clock_error: AtomicI64::new(0) })
    }

    pub fn link(self: &Arc<Self>) -> Arc<Link> {
        Arc::new(Link {
            hub: self.clone(),
            cut: AtomicBool::new(false),
            lose_answer: AtomicBool::new(false),
            meanwhile: Mutex::default(),
        })
    }

    pub fn copy(&self) -> Copy {
        Copy(self.content.lock().unwrap().clone())
    }

    /// As from a backup: everything is as it was, under a revision that never was before.
    pub fn restore(&self, copy: &Copy) {
        let mut content = self.content.lock().unwrap();
        *content = copy.0.clone();
        content.revision = self.next();
    }

    /// What is stored, for comparison.
    pub fn copy_digests(&self) -> BTreeMap<Document, Digest> {
        self.copy().digests()
    }

    pub fn edit(&self, document: &Document, edit: impl FnOnce(Vec<u8>) -> Vec<u8>) {
        let mut content = self.content.lock().unwrap();
        let old = content.documents.remove(document).unwrap();
        content.documents.insert(document.clone(), edit(old));
        content.revision = self.next();
    }

    /// Its clock is off by so much.
    pub fn set_clock_error(&self, error: Span) {
        self.clock_error.store(error.as_millis(), Ordering::SeqCst);
    }

    fn next(&self) -> u64 {
        self.writes.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn time(&self) -> Timestamp {
        self.clock.wall() + Span::from_millis(self.clock_error.load(Ordering::SeqCst))
    }
}

impl Copy {
    pub fn digests(&self) -> BTreeMap<Document, Digest> {
        self.0.documents.iter().map(|(document, bytes)| (document.clone(), Digest::of(bytes))).collect()
    }
}

impl Link {
    pub fn set_cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }

    /// The next write happens, and its answer gets lost.
    pub fn lose_next_answer(&self) {
        self.lose_answer.store(true, Ordering::SeqCst);
    }

    /// The same, and something happens before it is noticed.
    pub fn lose_next_answer_while(&self, meanwhile: impl FnOnce() + Send + 'static) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(meanwhile));
        self.lose_next_answer();
    }

    fn check(&self, operation: &'static str, document: &str) -> Result<(), StoreError> {
        if self.cut.load(Ordering::SeqCst) { Err(unavailable(operation, document)) } else { Ok(()) }
    }
}

fn unavailable(operation: &'static str, document: &str) -> StoreError {
    let problem = "the link is cut".to_owned();
    StoreError::Unavailable { operation, document: document.to_owned(), problem, source: None }
}

#[async_trait]
impl Store for Link {
    fn kind(&self) -> &'static str {
        "hub"
    }

    fn locate(&self, document: &Document) -> String {
        format!("{document} in the hub")
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.check("read", &document.to_string())?;
        Ok(self.hub.content.lock().unwrap().documents.get(document).cloned())
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.check("write", &document.to_string())?;
        assert!(document.is_shared(), "{document} is a replica's own");
        {
            let mut content = self.hub.content.lock().unwrap();
            if content.documents.get(document).map(|current| Digest::of(current)) != expected {
                return Err(StoreError::Conflict { document: self.locate(document) });
            }
            content.documents.insert(document.clone(), bytes.to_vec());
            content.revision = self.hub.next();
        }
        if self.lose_answer.swap(false, Ordering::SeqCst) {
            if let Some(meanwhile) = self.meanwhile.lock().unwrap().take() {
                meanwhile();
            }
            return Err(unavailable("write", &document.to_string()));
        }
        Ok(())
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.check("remove", &document.to_string())?;
        let mut content = self.hub.content.lock().unwrap();
        content.documents.remove(document);
        content.revision = self.hub.next();
        Ok(())
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.check("list", "keyrings")?;
        let content = self.hub.content.lock().unwrap();
        let names = content.documents.keys().filter_map(|document| match document {
            Document::Keyring(name) => Some(name.clone()),
            _ => None,
        });
        Ok(names.collect())
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for Link {
    /// Never waits: time here passes only by hand.
    async fn heads(&self, known: Option<&Revision>, _: Duration) -> Result<Heads, StoreError> {
        self.check("read", "the revision")?;
        let content = self.hub.content.lock().unwrap();
        let revision = Revision(content.revision.to_string());
        let changed = known != Some(&revision);
        let digests =
            || content.documents.iter().map(|(document, bytes)| (document.clone(), Digest::of(bytes))).collect();
        Ok(Heads { revision, store_time: self.hub.time(), age: Span::ZERO, documents: changed.then(digests) })
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.check("report", "replicas")?;
        let at = self.hub.time();
        let mut content = self.hub.content.lock().unwrap();
        content.reports.extend(replicas.iter().map(|report| (report.replica.clone(), (report.clone(), at))));
        Ok(())
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.check("read", "replicas")?;
        let now = self.hub.time();
        let content = self.hub.content.lock().unwrap();
        let known =
            content.reports.values().map(|(report, at)| Replica { report: report.clone(), age: now.since(*at) });
        Ok(known.filter(|replica| replica.age <= longest).collect())
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.check("forget", "replicas")?;
        self.hub.content.lock().unwrap().reports.retain(|replica, _| !replicas.contains(&replica.as_str()));
        Ok(())
    }
}
