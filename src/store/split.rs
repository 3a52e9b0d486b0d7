//! A replica's view of a shared store: what all replicas share, beside what this one remembers for itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;

use super::shared::{Heads, Replica, Report, Revision, SharedStore};
use super::{Digest, Document, Store, StoreError, overwrite};
use crate::keyring::name::Name;
use crate::keyring::time::Span;

/// Shared documents from a shared store; seen marks, the alive mark and copies of what was read last in a store of this
/// replica's own. Until the shared store has answered once, or something was to be written to it, the copies stand in for
/// what cannot be read.
pub struct Split {
    shared: Arc<dyn SharedStore>,
    own: Arc<dyn Store>,
    answered: AtomicBool,
}

impl Split {
    pub fn new(shared: Arc<dyn SharedStore>, own: Arc<dyn Store>) -> Self {
        Split { shared, own, answered: AtomicBool::new(false) }
    }

    fn of(&self, document: &Document) -> &dyn Store {
        if document.is_shared() { &*self.shared } else { &*self.own }
    }

    /// The copy of a shared document, for as long as the store has not answered.
    async fn copy(&self, failure: StoreError, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        if self.answered.load(Ordering::Relaxed) || !matches!(failure, StoreError::Unavailable { .. }) {
            return Err(failure);
        }
        // Unreadable is not absent: without a copy the failure stands.
        self.own.read(document).await?.map(Some).ok_or(failure)
    }
}

#[async_trait]
impl Store for Split {
    fn kind(&self) -> &'static str {
        self.shared.kind()
    }

    fn place(&self) -> Option<String> {
        self.shared.place()
    }

    fn locate(&self, document: &Document) -> String {
        self.of(document).locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        match self.of(document).read(document).await {
            Err(error) if document.is_shared() => self.copy(error, document).await,
            read => read,
        }
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        if document.is_shared() {
            // Only the store itself can say what became of a write, or what was there before it.
            self.answered.store(true, Ordering::Relaxed);
        }
        self.of(document).replace(document, expected, bytes).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.of(document).remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        // Copies are of what this replica uses: which keyrings there are they cannot tell.
        self.shared.keysets().await
    }

    async fn keep(&self, document: &Document, bytes: &[u8]) -> Result<(), StoreError> {
        overwrite(&*self.own, document, bytes).await
    }

    fn uses(&self, keyset: &Name) -> bool {
        self.shared.uses(keyset)
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        Some(self)
    }
}

#[async_trait]
impl SharedStore for Split {
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError> {
        let heads = self.shared.heads(known, wait).await?;
        self.answered.store(true, Ordering::Relaxed);
        Ok(heads)
    }

    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError> {
        self.shared.report(replicas).await
    }

    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError> {
        self.shared.replicas(longest).await
    }

    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError> {
        self.shared.forget(replicas).await
    }
}
