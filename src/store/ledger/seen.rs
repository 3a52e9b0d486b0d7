//! Seen marks: which generation of a record this replica saw last, so that an older copy does not pass for the record.

use serde::{Deserialize, Serialize};

use super::{INSTALLATION, LedgerError};
use crate::keyring::name::Name;
use crate::keyring::record::Superseded;
use crate::seal::data_keys::DataKeys;
use crate::store::record::{Header, Kind, OpenedRecord, UnverifiedRecord, open_record, seal_record};
use crate::store::{Digest, Document, Store, StoreError, overwrite};

/// Whether the mark of a record says what was read or written.
///
/// A record whose mark is behind is as valid as any; but until the mark is written, an older copy put back by somebody
/// would not be noticed. So this is an alarm, not an error. The same holds for the copy that a replica of a shared store
/// keeps for a start without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mark {
    Current,
    Behind { problem: String },
}

impl Mark {
    fn of(written: Result<(), LedgerError>) -> Self {
        match written {
            Ok(()) => Mark::Current,
            Err(error) => Mark::Behind { problem: error.to_string() },
        }
    }
}

/// The place of a record in its history.
#[derive(Clone, Debug)]
pub(super) struct Position {
    pub lineage: String,
    pub generation: u64,
    pub previous: Option<Digest>,
    pub digest: Digest,
}

impl Position {
    pub fn of(record: &OpenedRecord<'_>) -> Self {
        Position {
            lineage: record.lineage.clone(),
            generation: record.generation,
            previous: record.previous,
            digest: record.digest,
        }
    }

    /// Where a record says that it is, before anybody has proved it.
    pub fn claimed(record: &UnverifiedRecord<'_>) -> Self {
        Position {
            lineage: record.lineage().to_owned(),
            generation: record.generation(),
            previous: record.previous(),
            digest: record.digest(),
        }
    }
}

/// The mark of one record.
pub(super) struct SeenMark<'a> {
    store: &'a dyn Store,
    keys: &'a DataKeys,
    kind: Kind,
    name: &'a str,
    document: Document,
    marked: Document,
    /// Of the marked record, for messages.
    location: String,
}

#[derive(Serialize, Deserialize)]
struct Body {
    digest: String,
}

impl<'a> SeenMark<'a> {
    pub fn of_keyring(store: &'a dyn Store, keys: &'a DataKeys, keyset: &'a Name) -> Self {
        let marked = Document::Keyring(keyset.clone());
        let document = Document::Seen(keyset.clone());
        let location = store.locate(&marked);
        SeenMark { store, keys, kind: Kind::Seen, name: keyset.as_str(), document, marked, location }
    }

    pub fn of_installation(store: &'a dyn Store, keys: &'a DataKeys) -> Self {
        let marked = Document::Installation;
        let document = Document::SeenInstallation;
        let location = store.locate(&marked);
        SeenMark { store, keys, kind: Kind::SeenInstallation, name: INSTALLATION, document, marked, location }
    }

    /// Refuses a record that is older than the mark or another one of its generation; moves the mark to a newer one.
    /// Without a mark any record is accepted: marks of a shared store are each replica's own.
    /// A record of another history is accepted if that goes on from the marked one (`supersedes`). `bytes` are the
    /// record's: what is admitted is what the store may [`keep`](Store::keep).
    pub async fn admit(&self, record: &Position, supersedes: &[Superseded], bytes: &[u8]) -> Result<Mark, LedgerError> {
        let Some(seen) = self.read().await? else { return Ok(self.advance(record, bytes).await) };
        match judge(&self.location, &seen, record, supersedes)? {
            Place::Same => Ok(Mark::of(self.keep(bytes).await)),
            Place::Newer => Ok(self.advance(record, bytes).await),
        }
    }

    /// Keeps the record and writes the mark; a failure is returned as a mark that is behind.
    pub async fn advance(&self, record: &Position, bytes: &[u8]) -> Mark {
        // First the copy: one that is newer than its mark is admitted at a start from copies, an older one is not.
        let kept = self.keep(bytes).await;
        let marked = self.write(record).await;
        Mark::of(kept.and(marked))
    }

    async fn keep(&self, bytes: &[u8]) -> Result<(), LedgerError> {
        Ok(self.store.keep(&self.marked, bytes).await?)
    }

    /// [`advance`](Self::advance) where going on without the mark would be wrong.
    pub async fn write(&self, record: &Position) -> Result<(), LedgerError> {
        let body = Body { digest: record.digest.to_base64url() };
        let (name, lineage, generation) = (self.name, record.lineage.as_str(), record.generation);
        let header = Header { kind: self.kind, name, lineage, generation, previous: None };
        let bytes = seal_record(&self.store.locate(&self.document), &header, &body, self.keys)?;
        overwrite(self.store, &self.document, &bytes).await?;
        Ok(())
    }

    pub async fn read(&self) -> Result<Option<Position>, LedgerError> {
        let location = self.store.locate(&self.document);
        let Some(bytes) = self.store.read(&self.document).await? else { return Ok(None) };
        let record = open_record(&location, &bytes, self.kind, self.name, self.keys)?;
        let body: Body = record.body(&location)?;
        Ok(Some(Position { digest: digest_of(location, &body)?, ..Position::of(&record) }))
    }

    /// Whether there is a mark, readable or not.
    pub async fn exists(&self) -> Result<bool, StoreError> {
        Ok(self.store.read(&self.document).await?.is_some())
    }
}

/// Where a record stands to its mark, if it may.
pub(super) enum Place {
    Same,
    Newer,
}

/// Refuses a record that is older than the mark, or another one of its generation or history.
pub(super) fn judge(
    location: &str,
    seen: &Position,
    record: &Position,
    supersedes: &[Superseded],
) -> Result<Place, LedgerError> {
    let (location, generation) = (location.to_owned(), record.generation);
    if seen.lineage != record.lineage {
        let goes_on = |former: &Superseded| former.lineage == seen.lineage && former.generation >= seen.generation;
        if supersedes.iter().any(goes_on) {
            return Ok(Place::Newer);
        }
        let (found, expected) = (record.lineage.clone(), seen.lineage.clone());
        return Err(LedgerError::OtherLineage { location, found, expected });
    }
    let successor = record.generation == seen.generation.saturating_add(1);
    if record.generation < seen.generation {
        Err(LedgerError::OlderThanSeen { location, generation, seen: seen.generation })
    } else if record.generation == seen.generation {
        if record.digest == seen.digest { Ok(Place::Same) } else { Err(LedgerError::Forked { location, generation }) }
    } else if successor && record.previous != Some(seen.digest) {
        Err(LedgerError::Forked { location, generation })
    } else {
        Ok(Place::Newer)
    }
}

/// What the mark of a record says, without any proof; `None` when there is none.
pub(super) async fn claimed_mark(
    store: &dyn Store,
    document: &Document,
    kind: Kind,
    name: &str,
) -> Result<Option<Position>, LedgerError> {
    let location = store.locate(document);
    let Some(bytes) = store.read(document).await? else { return Ok(None) };
    let record = UnverifiedRecord::parse(&location, &bytes, kind, name)?;
    let body: Body = record.unverified_body(&location)?;
    Ok(Some(Position { digest: digest_of(location, &body)?, ..Position::claimed(&record) }))
}

fn digest_of(location: String, body: &Body) -> Result<Digest, LedgerError> {
    Digest::from_base64url(&body.digest).ok_or(LedgerError::Inconsistent { location, problem: "its digest is not one" })
}
