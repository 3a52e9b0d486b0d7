//! A backend whose keys are local ones and are opened as a test wants it.

use std::sync::Arc;

use async_trait::async_trait;
use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, CreatedKey, KeyIdentity, LocalSigner, Signer, StoredKey};
use jwksd::keyring::algorithm::Algorithm;

/// `open` makes the signer of a key from the one that signs here.
pub struct LocalKeys<F> {
    pub name: &'static str,
    pub keys: LocalBackend,
    pub open: F,
}

#[async_trait]
impl<F> Backend for LocalKeys<F>
where
    F: Fn(&StoredKey, Arc<dyn LocalSigner>) -> Signer + Send + Sync + 'static,
{
    fn name(&self) -> &'static str {
        self.name
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        self.keys.create(identity, algorithm).await
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        match self.keys.open(key).await? {
            Signer::Inline(signer) | Signer::InTurn(signer) | Signer::Pooled(signer) => Ok((self.open)(key, signer)),
            Signer::Remote(_) => panic!("local keys sign here"),
        }
    }

    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        self.keys.destroy(key).await
    }
}
