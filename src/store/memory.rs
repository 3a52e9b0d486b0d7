//! A store that dies with the process: the demo, and tests.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::{Digest, Document, Store, StoreError};
use crate::keyring::name::Name;

/// Keeps documents in memory.
#[derive(Default)]
pub struct MemoryStore {
    documents: Mutex<BTreeMap<Document, Vec<u8>>>,
}

impl MemoryStore {
    pub fn new() -> Self {
        Self::default()
    }

    fn documents(&self) -> MutexGuard<'_, BTreeMap<Document, Vec<u8>>> {
        // A panic elsewhere cannot leave the map half changed: every change is one insert or remove.
        self.documents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn locate(&self, document: &Document) -> String {
        format!("{document} in memory")
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.documents().get(document).cloned())
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        let mut documents = self.documents();
        if documents.get(document).map(|current| Digest::of(current)) != expected {
            return Err(StoreError::Conflict { document: self.locate(document) });
        }
        documents.insert(document.clone(), bytes.to_vec());
        Ok(())
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.documents().remove(document);
        Ok(())
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        let keyset = |document: &Document| match document {
            Document::Keyring(name) => Some(name.clone()),
            _ => None,
        };
        Ok(self.documents().keys().filter_map(keyset).collect())
    }
}

impl std::fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}
