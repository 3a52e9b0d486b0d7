//! The installation's record: what exists, and the wrapped data keys that authenticate it.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::LedgerError;
use crate::keyring::name::Name;
use crate::keyring::record::{Journal, Superseded};
use crate::keyring::time::Timestamp;
use crate::seal::data_keys::{DataKeySecret, DataKeys};
use crate::seal::{KeyEncryptionKey, SealError};

/// More than a reseal that was interrupted several times leaves behind.
const MOST_DATA_KEYS: usize = 16;

/// What one store holds, as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installation {
    /// Random, for life. Data keys and everything made with them are bound to it.
    pub id: String,
    pub current_data_key: String,
    /// One, or more while a reseal is under way.
    pub data_keys: Vec<WrappedDataKey>,
    /// Issuers that ever had a keyset here, by URL.
    pub issuers: BTreeMap<String, IssuerEntry>,
    /// Keysets that ever were, drained ones included.
    pub keysets: BTreeMap<Name, KeysetEntry>,
    /// What was done to the daemon as a whole: clock accepted, configuration reloaded.
    pub journal: Journal,
    /// Histories of this record that this one goes on from, after a recovery.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supersedes: Vec<Superseded>,
    /// Where the store was when it was written last.
    #[serde(default)]
    pub place: Option<Place>,
}

/// What tells a store from a copy of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub id: String,
    /// Since when the store has been here, if it was somewhere else before.
    pub moved_at: Option<Timestamp>,
}

/// A data key as the seal wrapped it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedDataKey {
    pub id: String,
    /// The key-encryption key that unwraps it.
    pub kek: String,
    /// Base64url.
    pub wrapped: String,
    pub wrapped_at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerEntry {
    pub initialised_at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeysetEntry {
    /// URL of the issuer it was registered for last.
    pub issuer: String,
    /// It was registered together with its issuer, which had never published a key.
    pub first: bool,
    pub state: KeysetState,
    /// Lineage of its keyring.
    pub lineage: String,
}

/// Whether a keyring must exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeysetState {
    /// Registered; its keyring may or may not have been written.
    Creating,
    /// Its keyring was written: one that is missing is lost.
    Created,
}

impl WrappedDataKey {
    pub(super) async fn wrap(
        installation: &str,
        id: &str,
        secret: &DataKeySecret,
        kek: &dyn KeyEncryptionKey,
        now: Timestamp,
    ) -> Result<Self, SealError> {
        let key = kek.id().await?;
        let wrapped = kek.wrap(&context(installation, id), secret.expose()).await?;
        let wrapped = URL_SAFE_NO_PAD.encode(wrapped);
        Ok(WrappedDataKey { id: id.to_owned(), kek: key, wrapped, wrapped_at: now })
    }

    /// The one of `keks` that wrapped it. A key that cannot say which one it is may be the one, unless another is.
    async fn find_kek<'a>(
        &self,
        location: &str,
        keks: &'a [Arc<dyn KeyEncryptionKey>],
    ) -> Result<&'a Arc<dyn KeyEncryptionKey>, LedgerError> {
        let (mut offered, mut unknown) = (Vec::new(), None);
        for kek in keks {
            match kek.id().await {
                Ok(id) if id == self.kek => return Ok(kek),
                Ok(id) => offered.push(id),
                Err(error) => unknown = unknown.or(Some(error)),
            }
        }
        Err(unknown.map_or_else(
            || LedgerError::OtherSeal {
                location: location.to_owned(),
                needed: self.kek.chars().take(200).collect(),
                offered: offered.join(", "),
            },
            LedgerError::Seal,
        ))
    }

    async fn unwrap(&self, installation: &str, kek: &dyn KeyEncryptionKey) -> Result<DataKeySecret, SealError> {
        let mismatch = || SealError::Mismatch { key: self.kek.clone(), what: format!("the data key `{}`", self.id) };
        let wrapped = URL_SAFE_NO_PAD.decode(&self.wrapped).map_err(|_| mismatch())?;
        let secret = kek.unwrap(&context(installation, &self.id), &wrapped).await?;
        DataKeySecret::from_unwrapped(&secret).ok_or_else(mismatch)
    }
}

/// Binds a wrapped data key to its place. Constant for ever: a seal in a KMS records it as encryption context.
fn context(installation: &str, data_key: &str) -> String {
    format!("jwksd data key {data_key} of installation {installation}")
}

/// Unwraps every data key of a record that is not authenticated yet: the result authenticates it.
pub(super) async fn unwrap_data_keys(
    location: &str,
    installation: &Installation,
    keks: &[Arc<dyn KeyEncryptionKey>],
) -> Result<DataKeys, LedgerError> {
    if installation.data_keys.len() > MOST_DATA_KEYS {
        return Err(inconsistent(location, "more data keys than any reseal leaves"));
    }
    let mut secrets = Vec::new();
    for wrapped in &installation.data_keys {
        let kek = wrapped.find_kek(location, keks).await?;
        secrets.push((wrapped.id.clone(), wrapped.unwrap(&installation.id, kek.as_ref()).await?));
    }
    DataKeys::new(&installation.id, &installation.current_data_key, secrets)
        .map_err(|_| inconsistent(location, "its current data key is not among its data keys"))
}

fn inconsistent(location: &str, problem: &'static str) -> LedgerError {
    LedgerError::Inconsistent { location: location.to_owned(), problem }
}
