//! What a store says of itself while the seal that would prove it is out of reach. Reads only; nothing here can write.

use std::sync::Arc;

use super::installation::{Installation, KeysetState};
use super::seen::{Position, claimed_mark, judge};
use super::{INSTALLATION, LedgerError, refuse_inconsistent, refuse_missing_keyrings};
use crate::keyring::name::{Name, legible};
use crate::keyring::record::Keyring;
use crate::store::record::{Kind, RecordError, RecordProblem, UnverifiedRecord};
use crate::store::{Document, Store};

/// The records of a store, parsed and in their place in history as far as marks tell, but not authenticated: whoever can
/// write to the store may have written them (DESIGN §3.6).
pub struct Unauthenticated {
    store: Arc<dyn Store>,
    /// `None` while nothing is initialised.
    installation: Option<Arc<Installation>>,
}

impl Unauthenticated {
    /// A store that is to be initialised once its seal can be reached.
    pub fn uninitialised(store: Arc<dyn Store>) -> Self {
        Unauthenticated { store, installation: None }
    }

    /// Reads the installation of an initialised store. What is damaged beyond doubt is refused as
    /// [`Ledger::open`](super::Ledger::open) does.
    pub async fn read(store: Arc<dyn Store>) -> Result<Self, LedgerError> {
        let location = store.locate(&Document::Installation);
        let not_initialised = || LedgerError::NotInitialised { location: location.clone() };
        let bytes = store.read(&Document::Installation).await?.ok_or_else(not_initialised)?;
        let record = UnverifiedRecord::parse(&location, &bytes, Kind::Installation, INSTALLATION)?;
        let installation: Installation = record.unverified_body(&location)?;
        if record.installation() != installation.id {
            return Err(LedgerError::Inconsistent { location, problem: "its body is another installation's" });
        }
        let document = Document::SeenInstallation;
        if let Some(seen) = claimed_mark(store.as_ref(), &document, Kind::SeenInstallation, INSTALLATION).await? {
            judge(&location, &seen, &Position::claimed(&record), &installation.supersedes)?;
        }
        refuse_missing_keyrings(store.as_ref(), &installation).await?;
        Ok(Unauthenticated { store, installation: Some(Arc::new(installation)) })
    }

    pub fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    /// Whether other replicas may use the store too.
    pub fn is_shared(&self) -> bool {
        self.store.shared().is_some()
    }

    pub fn installation(&self) -> Option<&Arc<Installation>> {
        self.installation.as_ref()
    }

    /// The keyring of a keyset as it is stored; `None` only if none was ever written.
    pub async fn load(&self, keyset: &Name) -> Result<Option<Keyring>, LedgerError> {
        let Some(installation) = &self.installation else { return Ok(None) };
        let document = Document::Keyring(keyset.clone());
        let location = self.store.locate(&document);
        let entry = installation.keysets.get(keyset);
        let mark = Document::Seen(keyset.clone());
        let seen = claimed_mark(self.store.as_ref(), &mark, Kind::Seen, keyset.as_str());
        let Some(bytes) = self.store.read(&document).await? else {
            let existed = entry.is_some_and(|entry| entry.state == KeysetState::Created) || seen.await?.is_some();
            let missing = LedgerError::Missing { keyset: keyset.clone(), location };
            return if existed { Err(missing) } else { Ok(None) };
        };
        let entry =
            entry.ok_or_else(|| LedgerError::Unlisted { keyset: keyset.clone(), location: location.clone() })?;
        let record = UnverifiedRecord::parse(&location, &bytes, Kind::Keyring, keyset.as_str())?;
        if record.installation() != installation.id {
            let found = legible(record.installation());
            let problem = RecordProblem::OtherInstallation { found, expected: installation.id.clone() };
            return Err(RecordError::new(&location, problem).into());
        }
        let keyring: Keyring = record.unverified_body(&location)?;
        let position = Position::claimed(&record);
        refuse_inconsistent(&location, keyset, &position, &keyring)?;
        if position.lineage != entry.lineage {
            let (found, expected) = (position.lineage, entry.lineage.clone());
            return Err(LedgerError::OtherLineage { location, found, expected });
        }
        if let Some(seen) = seen.await? {
            judge(&location, &seen, &position, &keyring.supersedes)?;
        }
        Ok(Some(keyring))
    }
}
