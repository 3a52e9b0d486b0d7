//! A store that fails when it is told to: crashes of the process at a write, outages, answers that get lost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use jwksd::keyring::name::Name;
use jwksd::store::memory::MemoryStore;
use jwksd::store::{Digest, Document, Store, StoreError};

/// Whether the write that kills the process is still carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    Before,
    After,
}

#[derive(Default)]
pub struct FaultyStore {
    inner: MemoryStore,
    writes: AtomicU64,
    crash: Mutex<Option<(u64, Crash)>>,
    /// The process is dead: nothing it does reaches the store.
    dead: AtomicBool,
    outage: AtomicBool,
    /// The next write of a keyring happens, and its answer gets lost.
    lose_answer: AtomicBool,
    /// So does the next read.
    lose_read_too: AtomicBool,
    lose_read: AtomicBool,
    /// The next read of the keyring fails, though everything else is there.
    hide_keyring: AtomicBool,
    /// A planted flaw: every n-th write of a keyring is confirmed and forgotten.
    forget_every: AtomicU64,
}

impl FaultyStore {
    pub fn new() -> Arc<Self> {
        Arc::new(FaultyStore::default())
    }

    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// The process dies at its `at`-th write, counted from the beginning of everything.
    pub fn crash_at(&self, at: u64, effect: Crash) {
        *self.crash.lock().unwrap() = Some((at, effect));
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    pub fn is_out(&self) -> bool {
        self.outage.load(Ordering::SeqCst)
    }

    /// Another process opens it.
    pub fn revive(&self) {
        self.dead.store(false, Ordering::SeqCst);
        for lost in [&self.lose_answer, &self.lose_read_too, &self.lose_read] {
            lost.store(false, Ordering::SeqCst);
        }
    }

    pub fn set_outage(&self, outage: bool) {
        self.outage.store(outage, Ordering::SeqCst);
    }

    pub fn fail_next_write_after_effect(&self) {
        self.lose_answer.store(true, Ordering::SeqCst);
    }

    pub fn fail_next_write_after_effect_and_the_read_after_it(&self) {
        self.lose_answer.store(true, Ordering::SeqCst);
        self.lose_read_too.store(true, Ordering::SeqCst);
    }

    pub fn hide_keyring_once(&self) {
        self.hide_keyring.store(true, Ordering::SeqCst);
    }

    pub fn forget_every(&self, n: u64) {
        self.forget_every.store(n, Ordering::SeqCst);
    }

    pub async fn lose_alive_mark(&self) {
        self.inner.remove(&Document::Alive).await.unwrap();
    }

    fn unavailable(&self, operation: &'static str, document: &Document) -> StoreError {
        let problem = "the simulation says so".to_owned();
        StoreError::Unavailable { operation, document: document.to_string(), problem, source: None }
    }

    fn gone(&self) -> bool {
        self.dead.load(Ordering::SeqCst) || self.outage.load(Ordering::SeqCst)
    }

    /// Counts a write; says whether the process dies at it.
    fn count(&self) -> Option<Crash> {
        let number = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let mut crash = self.crash.lock().unwrap();
        match *crash {
            Some((at, effect)) if at == number => {
                *crash = None;
                self.dead.store(true, Ordering::SeqCst);
                Some(effect)
            }
            _ => None,
        }
    }
}

#[async_trait]
impl Store for FaultyStore {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn locate(&self, document: &Document) -> String {
        self.inner.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        let hidden = matches!(document, Document::Keyring(_)) && self.hide_keyring.swap(false, Ordering::SeqCst);
        if self.gone() || hidden || self.lose_read.swap(false, Ordering::SeqCst) {
            return Err(self.unavailable("read", document));
        }
        self.inner.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        if self.gone() {
            return Err(self.unavailable("write", document));
        }
        let crash = self.count();
        if crash == Some(Crash::Before) {
            return Err(self.unavailable("write", document));
        }
        let forget = self.forget_every.load(Ordering::SeqCst);
        let keyring = matches!(document, Document::Keyring(_) | Document::Seen(_));
        if keyring && forget > 0 && expected.is_some() && (self.writes() / 2).is_multiple_of(forget) {
            return Ok(());
        }
        self.inner.replace(document, expected, bytes).await?;
        let lost = matches!(document, Document::Keyring(_)) && self.lose_answer.swap(false, Ordering::SeqCst);
        if lost && self.lose_read_too.swap(false, Ordering::SeqCst) {
            self.lose_read.store(true, Ordering::SeqCst);
        }
        if lost || crash == Some(Crash::After) { Err(self.unavailable("write", document)) } else { Ok(()) }
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        if self.gone() {
            return Err(self.unavailable("remove", document));
        }
        let crash = self.count();
        if crash != Some(Crash::Before) {
            self.inner.remove(document).await?;
        }
        if crash.is_some() { Err(self.unavailable("remove", document)) } else { Ok(()) }
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        if self.gone() {
            return Err(self.unavailable("list", &Document::Installation));
        }
        self.inner.keysets().await
    }
}
