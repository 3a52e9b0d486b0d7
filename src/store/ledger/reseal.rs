//! `jwksd reseal`: everything under a new data key, wrapped by the primary key-encryption key.

use std::sync::Arc;

use super::installation::WrappedDataKey;
use super::seen::SeenMark;
use super::{Ledger, LedgerError, Mark, prepare_installation, unwrap_data_keys};
use crate::keyring::name::Name;
use crate::keyring::record::{Key, Keyring};
use crate::keyring::time::Timestamp;
use crate::seal::KeyEncryptionKey;
use crate::seal::data_keys::{DataKeyError, DataKeySecret, DataKeys};
use crate::store::{Document, Store, StoreError};

/// The backend whose handles are private keys sealed with data keys.
const LOCAL: &str = "local";

/// What a reseal did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resealed {
    /// Id of the data key that everything is under now.
    pub data_key: String,
    /// Id of the key-encryption key that wraps it.
    pub kek: String,
    /// Keyrings written again.
    pub keyrings: usize,
    /// Private keys encrypted again.
    pub private_keys: usize,
}

impl Ledger {
    /// Makes a new data key wrapped by `primary`, encrypts every local private key and authenticates every record with it,
    /// and drops the older data keys. `old` are the key-encryption keys in use so far; those that wrap nothing afterwards
    /// can be destroyed.
    ///
    /// Both data keys are listed until the last write, so a crash at any write leaves a store that opens with all these
    /// keys, and repeating the call continues. `associated_data` gives what a private key is bound to.
    pub async fn reseal(
        store: Arc<dyn Store>,
        primary: Arc<dyn KeyEncryptionKey>,
        old: &[Arc<dyn KeyEncryptionKey>],
        associated_data: impl Fn(&Keyring, &Key, &DataKeys) -> Vec<u8>,
        now: Timestamp,
    ) -> Result<Resealed, LedgerError> {
        let keks: Vec<_> = std::iter::once(Arc::clone(&primary)).chain(old.iter().cloned()).collect();
        let mut ledger = Ledger::open(Arc::clone(&store), &keks).await?;
        let kek = primary.id().await?;
        if !ledger.is_resealing(&kek) {
            ledger.add_data_key(&keks, now).await?;
            ledger = Ledger::open(store, &keks).await?;
        }
        let mut resealed = Resealed { data_key: ledger.keys.current().to_owned(), kek, keyrings: 0, private_keys: 0 };
        for keyset in ledger.installation().keysets.keys() {
            ledger.reseal_keyring(keyset, &associated_data, now, &mut resealed).await?;
        }
        ledger.reseal_marks().await?;
        ledger.drop_old_data_keys().await?;
        Ok(resealed)
    }

    /// A reseal to this key began and was interrupted.
    fn is_resealing(&self, kek: &str) -> bool {
        let installation = self.installation();
        let current = installation.data_keys.iter().find(|key| key.id == installation.current_data_key);
        installation.data_keys.len() > 1 && current.is_some_and(|key| key.kek == kek)
    }

    /// Lists a new data key, wrapped by the first of `keks`, and makes it the current one.
    async fn add_data_key(&self, keks: &[Arc<dyn KeyEncryptionKey>], now: Timestamp) -> Result<(), LedgerError> {
        let stored = self.installation.load_full();
        let mut next = (*stored.body).clone();
        let (id, secret) = (DataKeys::new_id(), DataKeySecret::generate());
        if let Some(primary) = keks.first() {
            next.data_keys.push(WrappedDataKey::wrap(&next.id, &id, &secret, primary.as_ref(), now).await?);
            next.current_data_key = id;
        }
        let location = self.store.locate(&Document::Installation);
        let keys = unwrap_data_keys(&location, &next, keks).await?;
        let (bytes, _) = prepare_installation(self.store.as_ref(), &stored.position, &next, &keys)?;
        self.store.replace(&Document::Installation, Some(stored.position.digest), &bytes).await?;
        Ok(())
    }

    async fn reseal_keyring(
        &self,
        keyset: &Name,
        associated_data: &impl Fn(&Keyring, &Key, &DataKeys) -> Vec<u8>,
        now: Timestamp,
        resealed: &mut Resealed,
    ) -> Result<(), LedgerError> {
        let Some((loaded, data_key)) = self.load_with_data_key(keyset, |_| Ok(())).await? else { return Ok(()) };
        let next = self.reencrypt(&loaded.keyring, associated_data)?;
        let stored = if next == *loaded.keyring && data_key == self.keys.current() {
            loaded
        } else {
            resealed.keyrings += 1;
            resealed.private_keys +=
                next.keys.iter().zip(&loaded.keyring.keys).filter(|(new, old)| new.private != old.private).count();
            let generation = loaded.keyring.generation.saturating_add(1);
            self.save(Some(&loaded), &Keyring { generation, written_at: now, ..next }).await?
        };
        // Marks are written after their records, so one that is current is under the current data key. One that is behind
        // may be under the key that is dropped next, and could not be read any more.
        match stored.mark {
            Mark::Current => Ok(()),
            Mark::Behind { problem } => {
                let document = self.store.locate(&Document::Seen(keyset.clone()));
                Err(StoreError::Unavailable { operation: "reseal", document, problem, source: None }.into())
            }
        }
    }

    /// The same keyring with its local private keys under the current data key.
    fn reencrypt(
        &self,
        keyring: &Keyring,
        associated_data: &impl Fn(&Keyring, &Key, &DataKeys) -> Vec<u8>,
    ) -> Result<Keyring, LedgerError> {
        let mut next = keyring.clone();
        for key in &mut next.keys {
            let bound_to = associated_data(keyring, key, &self.keys);
            let serial = key.serial;
            let Some(private) = key.private.as_mut().filter(|private| private.backend == LOCAL) else { continue };
            let unreadable = |error: DataKeyError| LedgerError::UnreadablePrivateKey {
                keyset: keyring.keyset.clone(),
                serial,
                location: self.locate(&keyring.keyset),
                problem: error.to_string(),
            };
            // Opened even where it is current already: the older data keys go only if every private key can be read.
            let plaintext = self.keys.open_private(&bound_to, &private.handle).map_err(unreadable)?;
            if !self.keys.is_current(&private.handle) {
                private.handle = self.keys.seal_private(&bound_to, &plaintext).map_err(unreadable)?;
            }
        }
        Ok(next)
    }

    async fn reseal_marks(&self) -> Result<(), LedgerError> {
        let stored = self.installation.load_full();
        SeenMark::of_installation(self.store.as_ref(), &self.keys).write(&stored.position).await?;
        match self.read_notices().await {
            Ok(Some((book, digest))) => _ = self.write_notices(&book, Some(digest)).await?,
            Ok(None) => {}
            // It keeps no key and no promise to verifiers. Whoever sends begins anew with it, and tells what an absent one
            // would have untold.
            Err(error) if error.is_unusable_record() => {
                tracing::warn!(%error, "what receivers of notices have heard cannot be used and is left as it is: they will be told again");
            }
            Err(error) => return Err(error),
        }
        match self.read_alive().await? {
            Some(alive) => self.write_alive(&alive).await,
            None => Ok(self.store.remove(&Document::Alive).await?),
        }
    }

    async fn drop_old_data_keys(&self) -> Result<(), LedgerError> {
        self.change(|installation| {
            let current = installation.current_data_key.clone();
            installation.data_keys.retain(|key| key.id == current);
        })
        .await
    }
}
