//! The book of what receivers have heard, as it is in memory and in the store.

use crate::config::Receiver;
use crate::engine::Engine;
use crate::engine::reconcile::chain;
use crate::keyring::name::Name;
use crate::keyring::notice::{Book, Heard, Mark};
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::LedgerError;
use crate::store::{Digest, StoreError};

/// Receivers whose place is kept, those gone from the configuration included.
const KEPT: usize = 32;

/// How often a write is made again because another manager was faster.
const RACES_MAX: u32 = 4;

#[derive(Default)]
pub(super) struct Shelf {
    opened: bool,
    book: Book,
    /// Of what is stored; `None`: nothing is.
    digest: Option<Digest>,
    /// Something was noted since it was stored.
    changed: bool,
    /// Boot time of the last write.
    written: Span,
    failing: bool,
}

impl Shelf {
    /// What the receiver has heard; `None` while that cannot be read.
    pub fn open_for<'a>(&'a mut self, receiver: &Receiver, now: Timestamp) -> &'a mut Heard {
        if !self.book.receivers.contains_key(&receiver.name) {
            self.changed = true;
        }
        self.book.receivers.entry(receiver.name.clone()).or_insert_with(|| Heard::new(now))
    }

    /// The same, read from the store first where it was not.
    pub async fn open(&mut self, engine: &Engine, now: Timestamp, receiver: &Receiver) -> Option<&mut Heard> {
        if !self.opened {
            let (book, digest) = match read(engine, now, receiver).await {
                Ok(read) => read,
                Err(error) => {
                    self.complain(&error, "what receivers of notices have heard cannot be read; it is tried again");
                    return None;
                }
            };
            *self = Shelf { opened: true, book, digest, ..Shelf::default() };
        }
        Some(self.open_for(receiver, now))
    }

    /// It is read again before it is used.
    pub fn close(&mut self) {
        if !self.changed {
            self.opened = false;
        }
    }

    pub fn changed(&mut self, changed: bool) {
        self.changed |= changed;
    }

    pub fn note(&mut self, receiver: &Name, mark: Mark) {
        if let Some(heard) = self.book.receivers.get_mut(receiver) {
            heard.note(mark);
            self.changed = true;
        }
    }

    async fn write(&mut self, engine: &Engine) -> Result<(), LedgerError> {
        let ledger = engine.ledger()?;
        let keysets = engine.directory().order.iter().map(|cell| cell.name.clone()).collect();
        self.book.receivers.values_mut().for_each(|heard| heard.keep_only(&keysets));
        let names: Vec<Name> = engine.notices.health().keys().cloned().collect();
        if self.book.receivers.len() > KEPT {
            self.book.receivers.retain(|name, _| names.contains(name));
        }
        for _ in 0..RACES_MAX {
            match ledger.write_notices(&self.book, self.digest).await {
                Ok(digest) => {
                    self.digest = Some(digest);
                    self.changed = false;
                    return Ok(());
                }
                Err(LedgerError::Store(StoreError::Conflict { .. })) => {
                    let stored = ledger.read_notices().await?;
                    self.digest = stored.as_ref().map(|(_, digest)| *digest);
                    self.book.join(stored.map(|(book, _)| book).unwrap_or_default());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(()) // Others keep writing: what they note is as good, and this is tried again.
    }

    fn complain(&mut self, error: &LedgerError, what: &str) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(error = %chain(error), "{what}");
        }
    }
}

/// A record that cannot be used is not an absent one: what may have been told already is told again, and its id says so.
async fn read(engine: &Engine, now: Timestamp, receiver: &Receiver) -> Result<(Book, Option<Digest>), LedgerError> {
    let ledger = engine.ledger()?;
    match ledger.read_notices().await {
        Ok(Some((book, digest))) => Ok((book, Some(digest))),
        Ok(None) => Ok((Book::default(), None)),
        Err(error) if error.is_unusable_record() => {
            tracing::error!(error = %chain(&error), "what receivers of notices have heard cannot be used: they are told again what the keysets' journals hold");
            let mut book = Book::default();
            for name in engine.notices.health().keys() {
                book.receivers.insert(name.clone(), Heard::new(now - receiver.give_up_after));
            }
            let digest = ledger.renew_notices(&book).await?;
            Ok((book, Some(digest)))
        }
        Err(error) => Err(error),
    }
}

impl Engine {
    /// Stores what was noted, unless that happened less than `apart` ago.
    pub(super) async fn keep_book(&self, apart: Span) {
        let mut shelf = self.notices.shelf.lock().await;
        let boot = self.clock.boot();
        if !shelf.changed || !shelf.opened || boot.saturating_sub(shelf.written) < apart {
            return;
        }
        shelf.written = boot;
        match shelf.write(self).await {
            Ok(()) => shelf.failing = false,
            Err(error) => {
                shelf.complain(&error, "what receivers of notices have heard cannot be stored; it is tried again");
            }
        }
    }
}
