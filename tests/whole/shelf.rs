//! Stores: what is kept on them, and the ways to them, on which everything can go wrong that goes wrong on networks and
//! disks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::keyring::name::Name;
use jwksd::keyring::time::Span;
use jwksd::store::shared::{Heads, Replica, Report, Revision, SharedStore};
use jwksd::store::{Digest, Document, Store, StoreError};

use crate::life::{Life, StoreClock};
use crate::random::Random;

/// A write that a store took.
pub struct Written {
    /// True time, in milliseconds.
    pub at: i64,
    /// When somebody set out to write it.
    pub asked: i64,
    pub by: usize,
    pub document: Document,
    pub bytes: Arc<[u8]>,
}

/// What a store holds.
pub struct Shelf {
    clock: StoreClock,
    content: Mutex<Content>,
    changed: tokio::sync::Notify,
    /// Of every state that ever was another one.
    revisions: AtomicU64,
    log: Mutex<Vec<Written>>,
    /// Something was written that somebody judges.
    pub news: tokio::sync::Notify,
}

#[derive(Clone, Default)]
struct Content {
    documents: BTreeMap<Document, (Digest, Arc<[u8]>)>,
    revision: u64,
    reports: BTreeMap<String, (Report, i64)>,
}

/// Everything on a shelf, to be put back later.
#[derive(Clone)]
pub struct Copy(Content);

impl Copy {
    pub fn read(&self, document: &Document) -> Option<Arc<[u8]>> {
        self.0.documents.get(document).map(|(_, bytes)| bytes.clone())
    }
}

impl Shelf {
    pub fn new(clock: StoreClock) -> Arc<Self> {
        Arc::new(Shelf {
            clock,
            content: Mutex::default(),
            changed: tokio::sync::Notify::new(),
            revisions: AtomicU64::new(0),
            log: Mutex::default(),
            news: tokio::sync::Notify::new(),
        })
    }

    pub fn clock(&self) -> &StoreClock {
        &self.clock
    }

    /// What was written since the last call.
    pub fn written(&self) -> Vec<Written> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    pub fn copy(&self) -> Copy {
        Copy(self.content().clone())
    }

    /// As from a backup: everything is as it was, under a revision that never was before. What was reported stays.
    pub fn restore(&self, copy: &Copy) {
        let mut content = self.content();
        content.documents.clone_from(&copy.0.documents);
        self.touch(&mut content);
    }

    /// The same of the records alone: whoever saw more still says so.
    pub fn restore_records(&self, copy: &Copy) {
        let is_mark = |document: &Document| matches!(document, Document::Seen(_) | Document::SeenInstallation);
        let mut content = self.content();
        content.documents.retain(|document, _| is_mark(document));
        let records = copy.0.documents.iter().filter(|(document, _)| !is_mark(document));
        content.documents.extend(records.map(|(document, stored)| (document.clone(), stored.clone())));
        self.touch(&mut content);
    }

    pub fn read(&self, document: &Document) -> Option<Arc<[u8]>> {
        self.content().documents.get(document).map(|(_, bytes)| bytes.clone())
    }

    pub fn keyrings(&self) -> Vec<(Document, Arc<[u8]>)> {
        let content = self.content();
        let keyrings = content.documents.iter().filter(|(document, _)| matches!(document, Document::Keyring(_)));
        keyrings.map(|(document, (_, bytes))| (document.clone(), bytes.clone())).collect()
    }

    pub fn forget_everything(&self) {
        let mut content = self.content();
        *content = Content::default();
        self.touch(&mut content);
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    fn touch(&self, content: &mut Content) {
        content.revision = self.revisions.fetch_add(1, Relaxed) + 1;
        self.changed.notify_waiters();
    }

    fn replace(
        &self,
        (by, asked): (usize, i64),
        document: &Document,
        expected: Option<Digest>,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let mut content = self.content();
        if content.documents.get(document).map(|(digest, _)| *digest) != expected {
            return Err(StoreError::Conflict { document: document.to_string() });
        }
        let bytes: Arc<[u8]> = bytes.into();
        content.documents.insert(document.clone(), (Digest::of(&bytes), bytes.clone()));
        self.touch(&mut content);
        if matches!(document, Document::Keyring(_)) {
            let written = Written { at: self.clock.truth.now(), asked, by, document: document.clone(), bytes };
            self.log.lock().unwrap().push(written);
            self.news.notify_one();
        }
        Ok(())
    }
}

/// What is wrong with a way to a store.
#[derive(Clone, Default)]
pub struct Weather {
    /// Reads fail.
    pub deaf: bool,
    /// Writes fail.
    pub mute: bool,
    /// Calls take up to so long, in milliseconds.
    pub slow: u64,
    /// So many writes are carried out and reported as failed.
    pub lose_answers: u32,
    /// The next write fails, and is carried out so much later, in milliseconds.
    pub late_write: Option<u64>,
}

/// Who asks, and what is wrong with the way: the same for all processes of one machine.
pub struct Way {
    pub who: usize,
    weather: Mutex<Weather>,
    random: Mutex<Random>,
    /// True time, in milliseconds, of the last question that was answered: whatever is signed later than S after it is stale.
    answered: Mutex<Option<i64>>,
}

impl Way {
    pub fn new(who: usize, random: Random) -> Arc<Self> {
        Arc::new(Way { who, weather: Mutex::default(), random: Mutex::new(random), answered: Mutex::default() })
    }

    pub fn set(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock().unwrap());
    }

    pub fn weather(&self) -> Weather {
        self.weather.lock().unwrap().clone()
    }

    pub fn heal(&self) {
        self.set(|weather| *weather = Weather::default());
    }

    pub fn answered(&self) -> Option<i64> {
        *self.answered.lock().unwrap()
    }

    fn note_answer(&self, asked: i64) {
        let mut answered = self.answered.lock().unwrap();
        *answered = (*answered).max(Some(asked));
    }

    fn delay(&self) -> Option<Duration> {
        let slow = self.weather.lock().unwrap().slow;
        (slow > 0).then(|| Duration::from_millis(self.random.lock().unwrap().below(slow)))
    }
}

/// A shelf as one process sees it.
pub struct Port {
    shelf: Arc<Shelf>,
    way: Arc<Way>,
    life: Arc<Life>,
    shared: bool,
}

impl Port {
    pub fn new(shelf: Arc<Shelf>, way: Arc<Way>, life: Arc<Life>, shared: bool) -> Arc<Self> {
        Arc::new(Port { shelf, way, life, shared })
    }

    async fn travel(&self) {
        self.life.pass().await;
        if let Some(delay) = self.way.delay() {
            tokio::time::sleep(delay).await;
            self.life.pass().await;
        }
    }

    fn may_read(&self) -> Result<(), StoreError> {
        if self.way.weather().deaf { Err(unavailable("read")) } else { Ok(()) }
    }

    fn may_write(&self) -> Result<(), StoreError> {
        if self.way.weather().mute { Err(unavailable("write")) } else { Ok(()) }
    }

    /// The write is given up here and arrives later, if at all.
    fn lands_later(&self, after: u64, document: &Document, expected: Option<Digest>, bytes: &[u8]) {
        let (shelf, document, bytes) = (self.shelf.clone(), document.clone(), bytes.to_vec());
        let by = (self.way.who, shelf.clock.truth.now());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(after)).await;
            let _ = shelf.replace(by, &document, expected, &bytes);
        });
    }
}

fn unavailable(operation: &'static str) -> StoreError {
    let problem = "the simulation says so".to_owned();
    StoreError::Unavailable { operation, document: "a document".to_owned(), problem, source: None }
}

#[async_trait]
impl Store for Port {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    fn locate(&self, document: &Document) -> String {
        format!("{document} on the shelf")
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.travel().await;
        self.may_read()?;
        let read = self.shelf.read(document).map(|bytes| bytes.to_vec());
        self.life.pass().await;
        Ok(read)
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        let asked = self.shelf.clock.truth.now();
        self.travel().await;
        self.may_write()?;
        let is_keyring = matches!(document, Document::Keyring(_));
        let mut lost = false;
        if is_keyring {
            let late = self.way.weather.lock().unwrap().late_write.take();
            if let Some(after) = late {
                self.lands_later(after, document, expected, bytes);
                return Err(unavailable("write"));
            }
            let mut weather = self.way.weather.lock().unwrap();
            lost = weather.lose_answers > 0;
            weather.lose_answers = weather.lose_answers.saturating_sub(1);
        }
        self.shelf.replace((self.way.who, asked), document, expected, bytes)?;
        self.life.pass().await;
        self.way.note_answer(asked);
        if lost { Err(unavailable("write")) } else { Ok(()) }
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.travel().await;
        self.may_write()?;
        {
            let mut content = self.shelf.content();
            content.documents.remove(document);
            self.shelf.touch(&mut content);
        }
        self.life.pass().await;
        Ok(())
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.travel().await;
        self.may_read()?;
        let names = self.shelf.keyrings().into_iter().filter_map(|(document, _)| match document {
            Document::Keyring(name) => Some(name),
            _ => None,
        });
        Ok(names.collect())
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        if self.shared { Some(self) } else { None }
    }
}

#[async_trait]
impl SharedStore for Port {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        let asked = self.shelf.clock.truth.now();
        self.travel().await;
        self.may_read()?;
        let known: Option<u64> = known.and_then(|revision| revision.0.parse().ok());
        let ends = tokio::time::Instant::now() + wait;
        while known == Some(self.shelf.content().revision) && tokio::time::Instant::now() < ends {
            // Nothing comes between the look and the wait: there is one thread.
            let _ = tokio::time::timeout_at(ends, self.shelf.changed.notified()).await;
            self.life.pass().await;
            self.may_read()?;
        }
        let content = self.shelf.content().clone();
        let revision = Revision(content.revision.to_string());
        let changed = known != Some(content.revision);
        let digests = || {
            let shared = content.documents.iter().filter(|(document, _)| document.is_shared());
            shared.map(|(document, (digest, _))| (document.clone(), *digest)).collect()
        };
        let heads =
            Heads { revision, store_time: self.shelf.clock.now(), age: Span::ZERO, documents: changed.then(digests) };
        // Not `asked`, where it waited for news: what it says is true of the end.
        let _ = asked;
        self.way.note_answer(self.shelf.clock.truth.now());
        self.life.pass().await;
        Ok(heads)
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.travel().await;
        self.may_write()?;
        let at = self.shelf.clock.now().as_millis();
        let reported = replicas.iter().map(|report| (report.replica.clone(), (report.clone(), at)));
        self.shelf.content().reports.extend(reported);
        self.life.pass().await;
        Ok(())
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.travel().await;
        self.may_read()?;
        let now = self.shelf.clock.now().as_millis();
        let content = self.shelf.content();
        let known = content.reports.values();
        let known = known.map(|(report, at)| Replica { report: report.clone(), age: Span::from_millis(now - at) });
        Ok(known.filter(|replica| replica.age <= longest).collect())
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.travel().await;
        self.may_write()?;
        self.shelf.content().reports.retain(|replica, _| !replicas.contains(&replica.as_str()));
        Ok(())
    }
}
