//! What lies between one replica and its stores, and what can go wrong there: outages in one direction or both, answers
//! that come late or get lost, writes that land after everybody gave up, a process that dies at a write.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::clock::{Clock, ManualClock};
use jwksd::keyring::name::Name;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::store::memory::MemoryStore;
use jwksd::store::shared::{Heads, Replica, Report, Revision, SharedStore};
use jwksd::store::{Digest, Document, Store, StoreError};

use crate::hub::Link;

/// Whether the write that kills the process is still carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    Before,
    After,
}

/// What is wrong on purpose with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreFlaw {
    None,
    /// Some writes are confirmed and forgotten.
    Forgets,
    /// Of two that write at once both win.
    BothWin,
    /// Reads come from a copy that is not kept up to date, and say that they are new.
    OldReads,
}

/// A write that the store took.
pub struct Written {
    pub by: usize,
    pub document: Document,
    pub bytes: Vec<u8>,
    /// The newest generation that the writer had seen.
    pub seen: u64,
}

pub type Log = Arc<Mutex<Vec<Written>>>;

/// One replica's way to the hub.
pub struct Line {
    who: usize,
    link: Arc<Link>,
    /// True time.
    truth: Arc<ManualClock>,
    log: Log,
    pub faults: Mutex<Faults>,
}

#[derive(Default)]
pub struct Faults {
    pub cut: bool,
    /// Reads fail, writes do not.
    pub deaf: bool,
    /// Writes fail, reads do not.
    pub mute: bool,
    /// What the store holds is told so much later.
    pub late: Span,
    pub lose_answers: u32,
    /// The next write fails, and lands some seconds later.
    pub late_write: bool,
    pub flaw: Option<StoreFlaw>,
    /// The process dies at the write after so many.
    crash: Option<(u64, Crash)>,
    dead: bool,
    /// Nobody lets time pass while a process starts: its answers come at once.
    starts: bool,
    /// An answer is under way.
    waiting: bool,
    under_way: Vec<(Document, Option<Digest>, Vec<u8>)>,
    /// When the last question was asked that was answered.
    confirmable: Option<Timestamp>,
    /// The newest generation of each document that went through here.
    seen: BTreeMap<Document, u64>,
    writes: u64,
    old: Option<Copy>,
}

/// An outdated copy of the store, from which a flawed one answers.
#[derive(Clone)]
struct Copy {
    taken_at: Timestamp,
    heads: Heads,
    documents: BTreeMap<Document, Vec<u8>>,
}

impl Line {
    pub fn new(who: usize, link: Arc<Link>, truth: Arc<ManualClock>, log: Log, flaw: StoreFlaw) -> Arc<Self> {
        let faults = Faults { flaw: Some(flaw), ..Faults::default() };
        Arc::new(Line { who, link, truth, log, faults: Mutex::new(faults) })
    }

    pub fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults());
    }

    pub fn crash_after(&self, writes: u64, effect: Crash) {
        self.faults().crash = Some((writes, effect));
    }

    pub fn is_dead(&self) -> bool {
        self.faults().dead
    }

    /// Another process begins.
    pub fn revive(&self) {
        let mut faults = self.faults();
        (faults.dead, faults.waiting, faults.crash, faults.starts) = (false, false, None, true);
    }

    pub fn started(&self) {
        self.faults().starts = false;
    }

    pub fn heal(&self) {
        let mut faults = self.faults();
        (faults.cut, faults.deaf, faults.mute, faults.late) = (false, false, false, Span::ZERO);
    }

    pub fn late(&self) -> Span {
        self.faults().late
    }

    pub fn is_well(&self) -> bool {
        let faults = self.faults();
        !faults.cut && !faults.deaf && !faults.mute && faults.late.is_zero()
    }

    pub fn is_waiting(&self) -> bool {
        self.faults().waiting
    }

    pub fn confirmable(&self) -> Option<Timestamp> {
        self.faults().confirmable
    }

    /// What the replica remembered is lost.
    pub fn forget(&self) {
        let mut faults = self.faults();
        faults.seen.clear();
        faults.confirmable = None;
    }

    pub fn has_writes_under_way(&self) -> bool {
        !self.faults().under_way.is_empty()
    }

    /// What was given up arrives.
    pub async fn land(&self) {
        let arriving = std::mem::take(&mut self.faults().under_way);
        for (document, expected, bytes) in arriving {
            if self.link.replace(&document, expected, &bytes).await.is_ok() {
                self.note(&document, &bytes);
            }
        }
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap()
    }

    fn note(&self, document: &Document, bytes: &[u8]) {
        let (by, seen) = (self.who, self.faults().seen.get(document).copied().unwrap_or(0));
        self.log.lock().unwrap().push(Written { by, document: document.clone(), bytes: bytes.to_vec(), seen });
    }

    fn saw(&self, document: &Document, bytes: &[u8]) {
        if !matches!(document, Document::Keyring(_)) {
            return;
        }
        let generation = generation(bytes);
        let mut faults = self.faults();
        let seen = faults.seen.entry(document.clone()).or_default();
        *seen = generation.max(*seen);
    }

    fn may_read(&self) -> Result<(), StoreError> {
        let faults = self.faults();
        if faults.cut || faults.deaf || faults.dead { Err(unavailable("read")) } else { Ok(()) }
    }

    fn may_write(&self) -> Result<(), StoreError> {
        let faults = self.faults();
        if faults.cut || faults.mute || faults.dead { Err(unavailable("write")) } else { Ok(()) }
    }

    /// Counts a write of either store; says whether the process dies at it.
    fn count(&self) -> Option<Crash> {
        let mut faults = self.faults();
        faults.writes += 1;
        match faults.crash {
            Some((0, effect)) => {
                (faults.crash, faults.dead) = (None, true);
                Some(effect)
            }
            Some((left, effect)) => {
                faults.crash = Some((left - 1, effect));
                None
            }
            None => None,
        }
    }

    /// Whether a flawed store confirms this write and forgets it.
    fn forgets(&self, document: &Document) -> bool {
        let faults = self.faults();
        faults.flaw == Some(StoreFlaw::Forgets)
            && matches!(document, Document::Keyring(_))
            && faults.writes.is_multiple_of(5)
    }

    /// The old copy that a flawed store answers from now.
    async fn old_copy(&self) -> Result<Option<Copy>, StoreError> {
        let (flaw, held) = {
            let faults = self.faults();
            (faults.flaw, faults.old.clone())
        };
        if flaw != Some(StoreFlaw::OldReads) {
            return Ok(None);
        }
        let now = self.truth.wall();
        if let Some(held) = held.filter(|held| now < held.taken_at + Span::MINUTE.times(3)) {
            return Ok(Some(held));
        }
        let heads = self.link.heads(None, Duration::ZERO).await?;
        let mut documents = BTreeMap::new();
        for document in heads.documents.iter().flat_map(|documents| documents.keys()) {
            documents.extend(self.link.read(document).await?.map(|bytes| (document.clone(), bytes)));
        }
        let copy = Copy { taken_at: now, heads, documents };
        self.faults().old = Some(copy.clone());
        Ok(Some(copy))
    }
}

/// The generation that a record says it has.
pub fn generation(bytes: &[u8]) -> u64 {
    #[derive(serde::Deserialize)]
    struct Header {
        generation: u64,
    }
    serde_json::from_slice(bytes).map_or(0, |header: Header| header.generation)
}

fn unavailable(operation: &'static str) -> StoreError {
    let problem = "the simulation says so".to_owned();
    StoreError::Unavailable { operation, document: "a document".to_owned(), problem, source: None }
}

#[async_trait]
impl Store for Line {
    fn kind(&self) -> &'static str {
        self.link.kind()
    }

    fn locate(&self, document: &Document) -> String {
        self.link.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.may_read()?;
        let read = match self.old_copy().await? {
            Some(copy) => copy.documents.get(document).cloned(),
            None => self.link.read(document).await?,
        };
        if let Some(bytes) = &read {
            self.saw(document, bytes);
        }
        Ok(read)
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.may_write()?;
        let crash = self.count();
        if crash == Some(Crash::Before) {
            return Err(unavailable("write"));
        }
        if self.forgets(document) {
            return Ok(());
        }
        if std::mem::take(&mut self.faults().late_write) {
            self.faults().under_way.push((document.clone(), expected, bytes.to_vec()));
            return Err(unavailable("write"));
        }
        let asked = self.truth.wall();
        let both_win = self.faults().flaw == Some(StoreFlaw::BothWin);
        match self.link.replace(document, expected, bytes).await {
            Err(StoreError::Conflict { .. }) if both_win => {
                let current = self.link.read(document).await?.map(|bytes| Digest::of(&bytes));
                self.link.replace(document, current, bytes).await?;
            }
            replaced => replaced?,
        }
        self.note(document, bytes);
        self.saw(document, bytes);
        let mut faults = self.faults();
        faults.confirmable = faults.confirmable.max(Some(asked));
        let lost = faults.lose_answers > 0;
        faults.lose_answers = faults.lose_answers.saturating_sub(1);
        if lost || crash.is_some() { Err(unavailable("write")) } else { Ok(()) }
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.may_write()?;
        self.link.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.may_read()?;
        self.link.keysets().await
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for Line {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        self.may_read()?;
        let asked = self.truth.wall();
        let mut heads = self.link.heads(known, wait).await?;
        if let Some(copy) = self.old_copy().await? {
            heads = Heads { store_time: heads.store_time, ..copy.heads };
        }
        let late = Some(self.faults()).filter(|faults| !faults.starts).map_or(Span::ZERO, |faults| faults.late);
        if !late.is_zero() {
            self.faults().waiting = true;
            self.truth.sleep(late).await;
            self.faults().waiting = false;
            self.may_read()?;
        }
        let mut faults = self.faults();
        faults.confirmable = faults.confirmable.max(Some(asked));
        Ok(heads)
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.may_write()?;
        self.link.report(replicas).await
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.may_read()?;
        self.link.replicas(longest).await
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.may_write()?;
        self.link.forget(replicas).await
    }
}

/// What a replica remembers for itself; its process may die at these writes too.
pub struct Own {
    inner: MemoryStore,
    line: Arc<Line>,
}

impl Own {
    pub fn new(line: Arc<Line>) -> Arc<Self> {
        Arc::new(Own { inner: MemoryStore::new(), line })
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.line.is_dead() { Err(unavailable("use")) } else { Ok(()) }
    }
}

#[async_trait]
impl Store for Own {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn locate(&self, document: &Document) -> String {
        self.inner.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.check()?;
        self.inner.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.check()?;
        match self.line.count() {
            Some(Crash::Before) => Err(unavailable("write")),
            Some(Crash::After) => {
                self.inner.replace(document, expected, bytes).await?;
                Err(unavailable("write"))
            }
            None => self.inner.replace(document, expected, bytes).await,
        }
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.check()?;
        self.inner.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.check()?;
        self.inner.keysets().await
    }
}
