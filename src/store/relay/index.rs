//! What is served, whether it is what the store holds, and the index of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::{Digests, NotAdmitted, Record};
use crate::keyring::name::Name;
use crate::store::ledger::{Installation, KeysetState};
use crate::store::record::{Kind, UnverifiedRecord};
use crate::store::shared::{Heads, Revision};
use crate::store::wire::{Disputed, IndexBody, IndexEntry, path_of};
use crate::store::{Digest, Document};

/// The most different indexes of some keysets that are kept rendered.
const MOST_PARTIAL: usize = 64;

/// An index, rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Strong: other records have another one, and the same ones the same, whichever replica serves them. Quoted.
    pub etag: String,
    /// JSON.
    pub body: Bytes,
}

/// The records that were kept last.
#[derive(Default)]
pub(super) struct Served {
    records: BTreeMap<Document, Kept>,
    /// Keysets whose keyring must exist.
    created: BTreeSet<Name>,
    latest: Option<Latest>,
    /// What is served but was not in the store, as far as it was heard of last.
    lagging: BTreeMap<Document, Lag>,
    disputed: BTreeMap<Document, Option<Digest>>,
    /// When the store held all that is not disputed: in boot time, in milliseconds, negative before the boot.
    confirmed: Option<i64>,
    whole: Option<Arc<Index>>,
    /// Those of some keysets: replicas with the same configuration ask for the same ones.
    partial: BTreeMap<Vec<Name>, Arc<Index>>,
    /// Nothing that is missing is about to come.
    settled: bool,
}

struct Kept {
    record: Record,
    generation: u64,
}

/// What the store said last.
struct Latest {
    revision: Revision,
    documents: Digests,
    /// In boot time, in milliseconds.
    as_of: i64,
}

/// How a record came to be another one than the store's.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lag {
    /// It was kept after the store was heard of.
    Ahead,
    /// The store was heard of later. Whoever listens reads it now.
    Behind,
}

impl Served {
    /// Takes a record; `true` if it is another one than before.
    pub fn keep(&mut self, document: &Document, bytes: &[u8], generation: u64) -> bool {
        let digest = Digest::of(bytes);
        if self.records.get(document).is_some_and(|kept| kept.record.digest == digest) {
            return false;
        }
        if *document == Document::Installation {
            self.created = created(bytes);
        }
        let record = Record { bytes: Bytes::copy_from_slice(bytes), digest };
        self.records.insert(document.clone(), Kept { record, generation });
        self.forget_rendered();
        if let Some(latest) = &self.latest {
            if latest.documents.get(document) == Some(&digest) {
                self.lagging.remove(document);
            } else {
                self.lagging.insert(document.clone(), Lag::Ahead);
            }
            self.disputed.remove(document);
        }
        self.confirm();
        true
    }

    /// Takes what the store says; `true` if an index changes by that. A record that the store does not hold is one that
    /// is being read or was just written; at the second time it is disputed.
    pub fn observe(&mut self, heads: &Heads, as_of: i64) -> bool {
        let documents = match (&heads.documents, self.latest.take()) {
            (Some(documents), _) => documents.clone(),
            (None, Some(latest)) if latest.revision == heads.revision => latest.documents,
            // It is the revision that somebody else knew.
            (None, latest) => {
                self.latest = latest;
                return false;
            }
        };
        let before = std::mem::take(&mut self.lagging);
        let mut disputed = BTreeMap::new();
        for (document, kept) in &self.records {
            let stored = documents.get(document);
            if stored == Some(&kept.record.digest) {
                continue;
            }
            if before.get(document) == Some(&Lag::Behind) {
                disputed.insert(document.clone(), stored.copied());
            }
            self.lagging.insert(document.clone(), Lag::Behind);
        }
        self.latest = Some(Latest { revision: heads.revision.clone(), documents, as_of });
        let changed = disputed != self.disputed;
        if changed {
            self.disputed = disputed;
            self.forget_rendered();
        }
        self.confirm();
        changed
    }

    pub fn confirmed(&self) -> Option<i64> {
        self.confirmed
    }

    /// `true` if it was not before.
    pub fn settle(&mut self) -> bool {
        !std::mem::replace(&mut self.settled, true)
    }

    pub fn index(&mut self, keysets: Option<&[Name]>) -> Result<Arc<Index>, NotAdmitted> {
        self.settled |= self.created.iter().all(|name| self.kept_keyring(name));
        if !self.settled || !self.records.contains_key(&Document::Installation) {
            return Err(NotAdmitted);
        }
        let Some(keysets) = keysets else {
            if let Some(index) = &self.whole {
                return Ok(index.clone());
            }
            let keyrings: BTreeSet<&Name> = self.keyrings().chain(&self.created).collect();
            let index = Arc::new(self.render(&keyrings));
            self.whole = Some(index.clone());
            return Ok(index);
        };
        if let Some(index) = self.partial.get(keysets) {
            return Ok(index.clone());
        }
        let there = |name: &&Name| self.created.contains(*name) || self.kept_keyring(name);
        let index = Arc::new(self.render(&keysets.iter().filter(there).collect()));
        if self.partial.len() < MOST_PARTIAL {
            self.partial.insert(keysets.to_vec(), index.clone());
        }
        Ok(index)
    }

    pub fn record(&self, document: &Document) -> Result<Option<Record>, NotAdmitted> {
        if let Some(kept) = self.records.get(document) {
            return Ok(Some(kept.record.clone()));
        }
        let known = self.records.contains_key(&Document::Installation);
        match document {
            Document::Keyring(name) if known && !self.created.contains(name) => Ok(None),
            _ => Err(NotAdmitted),
        }
    }

    fn forget_rendered(&mut self) {
        self.whole = None;
        self.partial.clear();
    }

    fn confirm(&mut self) {
        // Whatever is disputed lags.
        if let Some(latest) = &self.latest
            && self.lagging.len() == self.disputed.len()
        {
            self.confirmed = self.confirmed.max(Some(latest.as_of));
        }
    }

    fn keyrings(&self) -> impl Iterator<Item = &Name> {
        self.records.keys().filter_map(|document| match document {
            Document::Keyring(name) => Some(name),
            _ => None,
        })
    }

    fn kept_keyring(&self, name: &Name) -> bool {
        self.records.contains_key(&Document::Keyring(name.clone()))
    }

    fn render(&self, keyrings: &BTreeSet<&Name>) -> Index {
        let keyrings = keyrings.iter().map(|name| Document::Keyring((*name).clone()));
        let documents: Vec<IndexEntry> = std::iter::once(Document::Installation)
            .chain(keyrings)
            .filter_map(|document| self.entry(&document))
            .collect();
        let body = serde_json::to_vec(&IndexBody { documents }).expect("strings and integers always serialise");
        // Order and members are fixed, so the digest of the text is one of the records.
        Index { etag: format!("\"{}\"", Digest::of(&body)), body: body.into() }
    }

    fn entry(&self, document: &Document) -> Option<IndexEntry> {
        let kept = self.records.get(document);
        let stored = self.disputed.get(document);
        Some(IndexEntry {
            document: path_of(document)?,
            digest: kept.map(|kept| kept.record.digest.to_base64url()),
            generation: kept.map(|kept| kept.generation),
            disputed: stored.map(|stored| Disputed { stored: stored.map(|digest| digest.to_base64url()) }),
        })
    }
}

/// The keysets of an installation whose keyrings were written.
fn created(bytes: &[u8]) -> BTreeSet<Name> {
    let record = UnverifiedRecord::parse("", bytes, Kind::Installation, Kind::Installation.as_str());
    let Ok(installation) = record.and_then(|record| record.unverified_body::<Installation>("")) else {
        // What was admitted parses; if it did not, no keyring would be said to be missing.
        return BTreeSet::new();
    };
    let created = installation.keysets.into_iter().filter(|(_, entry)| entry.state == KeysetState::Created);
    created.map(|(name, _)| name).collect()
}
