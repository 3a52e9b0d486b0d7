//! The one time that a store is empty on purpose.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use super::installation::{Installation, Place, WrappedDataKey};
use super::migrate::refuse_unfinished;
use super::{INSTALLATION, Ledger, LedgerError};
use crate::keyring::record::Journal;
use crate::keyring::time::Timestamp;
use crate::random;
use crate::seal::data_keys::{DataKeySecret, DataKeys};
use crate::seal::{KeyEncryptionKey, SealError};
use crate::store::record::{FORMAT, Header, Kind, seal_record};
use crate::store::{Document, Store, StoreError};

/// What is known of the seal without using it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealEvidence {
    /// A seal key file exists: something was initialised with it.
    Exists,
    /// The seal key file does not exist.
    Missing,
    /// The seal is a KMS key, whose existence says nothing.
    Unknown,
}

/// How far a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initialisation {
    /// Empty, and nothing says that it should not be.
    Fresh,
    /// An initialisation began and did not end: repeating it continues.
    Initialising,
    /// Ready to be opened.
    Initialised,
}

impl Ledger {
    /// Looks at what is there, changing nothing. An empty store that should not be empty is an error, never `Fresh`.
    pub async fn inspect(store: &dyn Store, seal: SealEvidence) -> Result<Initialisation, LedgerError> {
        refuse_unfinished(store).await?;
        let location = store.locate(&Document::Installation);
        if store.read(&Document::Installation).await?.is_some() {
            return match seal {
                SealEvidence::Missing => Err(LedgerError::SealLost { location }),
                SealEvidence::Exists | SealEvidence::Unknown => Ok(Initialisation::Initialised),
            };
        }
        if let Some(found) = remains(store).await? {
            return Err(LedgerError::InstallationLost { location, found });
        }
        if store.read(&Document::Initialising).await?.is_some() {
            return Ok(Initialisation::Initialising);
        }
        match seal {
            SealEvidence::Exists => Err(LedgerError::StoreLost { location }),
            SealEvidence::Missing | SealEvidence::Unknown => Ok(Initialisation::Fresh),
        }
    }

    /// Initialises an empty store, or continues where a crash ended that; an initialised one is just opened.
    ///
    /// A durable mark comes first, then the seal key (`make_seal` loads it if it exists), then the installation's record,
    /// last the mark goes. So a seal key without either is evidence of a lost store, and every crash can be resumed.
    pub async fn initialise<F>(
        store: Arc<dyn Store>,
        seal: SealEvidence,
        make_seal: F,
        now: Timestamp,
    ) -> Result<Ledger, LedgerError>
    where
        F: AsyncFnOnce() -> Result<Arc<dyn KeyEncryptionKey>, SealError>,
    {
        let found = Self::inspect(store.as_ref(), seal).await?;
        if found == Initialisation::Fresh {
            let mark = json!({ "format": FORMAT, "kind": "initialising", "started_at": now });
            let marked = store.replace(&Document::Initialising, None, format!("{mark:#}\n").as_bytes()).await;
            unless_another_was_faster(store.as_ref(), marked)?;
        }
        let kek = make_seal().await?;
        if found != Initialisation::Initialised {
            write_installation(store.as_ref(), kek.as_ref(), now).await?;
        }
        Self::open(store, &[kek]).await
    }
}

/// A document that cannot have been written before the installation's record.
pub(super) async fn remains(store: &dyn Store) -> Result<Option<String>, LedgerError> {
    if let Some(keyset) = store.keysets().await?.into_iter().next() {
        return Ok(Some(store.locate(&Document::Keyring(keyset))));
    }
    for document in [Document::SeenInstallation, Document::Alive] {
        if store.read(&document).await?.is_some() {
            return Ok(Some(store.locate(&document)));
        }
    }
    Ok(None)
}

async fn write_installation(store: &dyn Store, kek: &dyn KeyEncryptionKey, now: Timestamp) -> Result<(), LedgerError> {
    let (id, data_key, secret) = (random::id(), DataKeys::new_id(), DataKeySecret::generate());
    let installation = Installation {
        id: id.clone(),
        current_data_key: data_key.clone(),
        data_keys: vec![WrappedDataKey::wrap(&id, &data_key, &secret, kek, now).await?],
        issuers: BTreeMap::new(),
        keysets: BTreeMap::new(),
        journal: Journal::default(),
        supersedes: Vec::new(),
        place: store.place().map(|id| Place { id, moved_at: None }),
    };
    let keys = DataKeys::new(&id, &data_key, [(data_key.clone(), secret)])
        .expect("the current data key is the only one given");
    let header =
        Header { kind: Kind::Installation, name: INSTALLATION, lineage: &random::id(), generation: 1, previous: None };
    let location = store.locate(&Document::Installation);
    let bytes = seal_record(&location, &header, &installation, &keys)?;
    let written = store.replace(&Document::Installation, None, &bytes).await;
    Ok(unless_another_was_faster(store, written)?)
}

/// Two replicas may initialise a shared store at once: what the first one wrote is what both open.
fn unless_another_was_faster(store: &dyn Store, written: Result<(), StoreError>) -> Result<(), StoreError> {
    match written {
        Err(StoreError::Conflict { .. }) if store.shared().is_some() => Ok(()),
        written => written,
    }
}
