//! A backend whose keys stay elsewhere until they are destroyed, and whose creations can be held up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use async_trait::async_trait;
use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, CreatedKey, KeyIdentity, Signer, StoredKey};
use jwksd::keyring::algorithm::Algorithm;
use tokio::sync::Notify;

/// Lets creations pass while it is open.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    reached: Notify,
    opened: Notify,
}

impl Gate {
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
    }

    pub fn open(&self) {
        self.closed.store(false, SeqCst);
        self.opened.notify_one();
    }

    /// Waits until a creation stands before it.
    pub async fn reached(&self) {
        self.reached.notified().await;
    }

    async fn pass(&self) {
        if self.closed.load(SeqCst) {
            self.reached.notify_one();
            self.opened.notified().await;
        }
    }
}

pub struct Held {
    pub keys: LocalBackend,
    pub gate: Arc<Gate>,
}

#[async_trait]
impl Backend for Held {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        self.gate.pass().await;
        self.keys.create(identity, algorithm).await
    }

    fn left_over(&self, _identity: &KeyIdentity, key: &CreatedKey) -> Option<String> {
        Some(key.handle.clone())
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        self.keys.open(key).await
    }

    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        self.keys.destroy(key).await
    }
}
