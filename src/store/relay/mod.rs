//! What a manager hands on to replicas that have no store of their own: the records it read or wrote last and found
//! good, and their reports the other way. Its store does not notice how many there are.

mod index;
mod presence;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::index::Index;
pub use self::presence::{MOST_REPLICAS, TooMany};

use self::index::Served;
use self::presence::Presence;
use super::record::{Kind, UnverifiedRecord};
use super::shared::{Heads, Replica, Report, Revision, SharedStore};
use super::{Digest, Document, Store, StoreError};
use crate::clock::TrustedClock;
use crate::keyring::name::Name;
use crate::keyring::time::{Span, Timestamp};

/// A store that remembers what was kept, for others to fetch.
pub struct Relay {
    store: Arc<dyn Store>,
    clock: Arc<TrustedClock>,
    served: Mutex<Served>,
    /// Counts what changes an index.
    changes: watch::Sender<u64>,
    presence: Presence,
}

/// A record as it is handed on.
#[derive(Clone, Debug)]
pub struct Record {
    pub bytes: Bytes,
    pub digest: Digest,
}

/// How far what is served can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// By the trusted clock of this process.
    pub now: Timestamp,
    /// Since the store was known to hold what is served; [`Span::MAX`] if it has not been.
    pub age: Span,
}

/// What must exist but has not been read and found good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAdmitted;

impl Relay {
    pub fn new(store: Arc<dyn Store>, clock: Arc<TrustedClock>) -> Self {
        Relay { store, clock, served: Mutex::default(), changes: watch::Sender::new(0), presence: Presence::default() }
    }

    /// The index of everything, or of the installation and these keysets.
    pub fn index(&self, keysets: Option<&[Name]>) -> Result<Arc<Index>, NotAdmitted> {
        self.served().index(keysets)
    }

    /// A document; `None` if none was ever written.
    pub fn record(&self, document: &Document) -> Result<Option<Record>, NotAdmitted> {
        self.served().record(document)
    }

    /// Everything was read that could be: what is still missing is so until somebody repairs it. Before this only a whole
    /// set is served.
    pub fn settle(&self) {
        if self.served().settle() {
            self.changed();
        }
    }

    /// Sees every change of an index.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// How many see changes now: requests that wait, among others.
    pub fn listeners(&self) -> usize {
        self.changes.receiver_count()
    }

    /// How fresh this is.
    pub fn confirmation(&self) -> Confirmation {
        let age = match (self.store.shared(), self.served().confirmed()) {
            (None, _) => Span::ZERO, // Nobody else writes there.
            (Some(_), None) => Span::MAX,
            (Some(_), Some(at)) => Span::from_millis(self.clock.boot().as_millis().saturating_sub(at)),
        };
        Confirmation { now: self.clock.now(), age }
    }

    /// Takes a replica's report, to be passed on soon.
    pub fn take_report(&self, report: Report) -> Result<(), TooMany> {
        self.presence.take(report, self.clock.boot(), self.store.shared().is_some())
    }

    /// A replica has stopped in good order.
    pub fn take_leave(&self, replica: &str) {
        self.presence.leave(replica, self.store.shared().is_some());
    }

    /// Passes reports on to a shared store, many at a time. Runs until `stop`, and then once more.
    pub async fn pass_on(&self, stop: CancellationToken) {
        match self.store.shared() {
            Some(shared) => self.presence.pass_on(shared, stop).await,
            None => stop.cancelled().await,
        }
    }

    /// The replicas that reported here within `longest`, where no shared store takes their reports.
    pub fn reported(&self, longest: Span) -> Vec<Replica> {
        self.presence.replicas(self.clock.boot(), longest)
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        // A panic elsewhere leaves at worst an index that the next change renders again.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn keep_to_serve(&self, document: &Document, bytes: &[u8]) {
        let Some(generation) = self.generation(document, bytes) else { return };
        if self.served().keep(document, bytes, generation) {
            self.changed();
        }
    }

    /// Of a document that replicas may fetch. What is kept was admitted, so it parses.
    fn generation(&self, document: &Document, bytes: &[u8]) -> Option<u64> {
        let (kind, name) = match document {
            Document::Installation => (Kind::Installation, Kind::Installation.as_str()),
            Document::Keyring(name) => (Kind::Keyring, name.as_str()),
            _ => return None,
        };
        let record = UnverifiedRecord::parse(&self.locate(document), bytes, kind, name).ok()?;
        Some(record.generation())
    }

    /// `asked` is when, in boot time: whatever the answer does on its way, what it says was true after that.
    fn observe(&self, heads: &Heads, asked: Span) {
        let as_of = asked.as_millis().saturating_sub(heads.age.as_millis());
        if self.served().observe(heads, as_of) {
            self.changed();
        }
    }
}

#[async_trait]
impl Store for Relay {
    fn kind(&self) -> &'static str {
        self.store.kind()
    }

    fn place(&self) -> Option<String> {
        self.store.place()
    }

    fn locate(&self, document: &Document) -> String {
        self.store.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.replace(document, expected, bytes).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.store.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.store.keysets().await
    }

    async fn keep(&self, document: &Document, bytes: &[u8]) -> Result<(), StoreError> {
        self.keep_to_serve(document, bytes);
        self.store.keep(document, bytes).await
    }

    fn uses(&self, keyset: &Name) -> bool {
        self.store.uses(keyset)
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        self.store.shared().map(|_| self as &dyn SharedStore)
    }
}

#[async_trait]
impl SharedStore for Relay {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        let asked = self.clock.boot();
        let heads = self.upstream()?.heads(known, wait).await?;
        self.observe(&heads, asked);
        Ok(heads)
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.upstream()?.report(replicas).await
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.upstream()?.replicas(longest).await
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.upstream()?.forget(replicas).await
    }
}

impl Relay {
    fn upstream(&self) -> Result<&dyn SharedStore, StoreError> {
        self.store.shared().ok_or_else(|| StoreError::Unavailable {
            operation: "ask others through",
            document: format!("the {} store", self.kind()),
            problem: "only one daemon uses it".to_owned(),
            source: None,
        })
    }
}

/// Digests by document.
type Digests = BTreeMap<Document, Digest>;
