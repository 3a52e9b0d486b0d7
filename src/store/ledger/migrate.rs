//! `jwksd migrate`: everything that a store holds into another one, byte for byte.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::json;

use super::{INSTALLATION, Installation, Ledger, LedgerError, Mark};
use crate::keyring::name::Name;
use crate::keyring::time::{Span, Timestamp};
use crate::seal::KeyEncryptionKey;
use crate::store::memory::MemoryStore;
use crate::store::record::{FORMAT, Kind, UnverifiedRecord};
use crate::store::shared::Revision;
use crate::store::{Digest, Document, Store, StoreError, overwrite};

/// Whoever reported within this is taken to be running.
const REPORTED_WITHIN: Span = Span::MINUTE;

/// What the mark of an unfinished initialisation says while records are moved in.
const MIGRATING: &str = "migrating";

/// A store, and the keys that open it, the primary one first.
pub struct Site {
    pub store: Arc<dyn Store>,
    pub keks: Vec<Arc<dyn KeyEncryptionKey>>,
}

/// What a migration did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    pub keyrings: usize,
    /// The target held everything before: nothing was written.
    pub already: bool,
}

/// Why nothing was moved, or not everything. The source is as it was; a target that was written to is marked unfinished.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("the seal of the target does not open the records of {location}: both must name the same seal")]
    OtherSeal {
        location: String,
        #[source]
        source: LedgerError,
    },
    #[error("{location} is the store itself: name another one")]
    SameStore { location: String },
    #[error(
        "replicas reported to {location} within the last minute: {replicas}. Stop them all, and try again a minute later: \
         until then nobody knows whether they run"
    )]
    InUse { location: String, replicas: String },
    #[error("{location} holds something already ({found}): move that away, or name an empty store")]
    Occupied { location: String, found: String },
    #[error(
        "{location} was written while it was read: stop whatever writes it and migrate again; until then the target is unfinished"
    )]
    Changed { location: String },
    #[error(
        "{location} is not what was written there: the target is unfinished; find out what else writes it, then migrate again"
    )]
    Differs { location: String },
    #[error("it cannot be noted that {location} was seen ({problem}): the target is unfinished; migrate again")]
    Unmarked { location: String, problem: String },
}

impl From<StoreError> for MigrateError {
    fn from(error: StoreError) -> Self {
        MigrateError::Ledger(error.into())
    }
}

/// Copies everything from one store of an installation into another, which is empty or was left unfinished by an earlier
/// try. Writes nothing into `from`; until all is in `to` and was read back, nobody can start on that.
pub async fn migrate_store(from: &Site, to: &Site, now: Timestamp) -> Result<Migrated, MigrateError> {
    let location = to.store.locate(&Document::Installation);
    if from.store.place().is_some_and(|place| to.store.place() == Some(place)) {
        return Err(MigrateError::SameStore { location });
    }
    refuse_in_use(from.store.as_ref()).await?;
    refuse_in_use(to.store.as_ref()).await?;
    let revision = revision(from.store.as_ref()).await?;
    let copy = Arc::new(Copied::of(from.store.clone()).await?);
    let source = Ledger::open(copy.clone(), &from.keks).await?;
    load_all(&source).await?;
    let opened = Ledger::open(copy.clone(), &to.keks).await;
    opened
        .map_err(|source| MigrateError::OtherSeal { location: from.store.locate(&Document::Installation), source })?;
    let id = source.installation().id.clone();
    let digests = copy.shared_digests();
    let keyrings = digests.len() - 1;
    if !prepare(to.store.as_ref(), &id, &digests, now).await? {
        return Ok(Migrated { keyrings, already: true });
    }
    copy.write_into(to.store.as_ref()).await?;
    verify(to, &source, &digests).await?;
    refuse_changed(from.store.as_ref(), revision.as_ref(), &digests).await?;
    to.store.remove(&Document::Initialising).await?;
    Ok(Migrated { keyrings, already: false })
}

/// Refuses a store into which a migration began and did not end. A replica that starts from its copies, since a shared
/// store cannot be asked, has copies of what was complete.
pub(super) async fn refuse_unfinished(store: &dyn Store) -> Result<(), LedgerError> {
    match store.read(&Document::Initialising).await {
        Ok(Some(mark)) if marked(&mark).is_some() => {
            Err(LedgerError::Migrating { location: store.locate(&Document::Installation) })
        }
        Err(error) if store.shared().is_none() => Err(error.into()),
        _ => Ok(()),
    }
}

#[derive(Deserialize)]
struct MigratingMark {
    kind: String,
    installation: String,
}

/// The installation that is being moved in, if that is what the mark says.
fn marked(mark: &[u8]) -> Option<String> {
    let mark: MigratingMark = serde_json::from_slice(mark).ok()?;
    (mark.kind == MIGRATING).then_some(mark.installation)
}

/// Refuses a shared store that replicas used within the last minute.
pub async fn refuse_in_use(store: &dyn Store) -> Result<(), MigrateError> {
    let Some(shared) = store.shared() else { return Ok(()) };
    let replicas = shared.replicas(REPORTED_WITHIN).await?;
    if replicas.is_empty() {
        return Ok(());
    }
    let named: Vec<String> =
        replicas.into_iter().map(|replica| format!("{} ({})", replica.report.replica, replica.report.role)).collect();
    Err(MigrateError::InUse { location: store.locate(&Document::Installation), replicas: named.join(", ") })
}

async fn revision(store: &dyn Store) -> Result<Option<Revision>, StoreError> {
    match store.shared() {
        Some(shared) => Ok(Some(shared.heads(None, Duration::ZERO).await?.revision)),
        None => Ok(None),
    }
}

/// Whether records have to be written: marks the target as unfinished, or finds everything there.
async fn prepare(
    to: &dyn Store,
    id: &str,
    digests: &BTreeMap<Document, Digest>,
    now: Timestamp,
) -> Result<bool, MigrateError> {
    let location = to.locate(&Document::Installation);
    let occupied = |found: String| MigrateError::Occupied { location: location.clone(), found };
    if let Some(mark) = to.read(&Document::Initialising).await? {
        return match marked(&mark) {
            Some(installation) if installation == id => Ok(true),
            Some(installation) => Err(occupied(format!("the installation {installation} is being moved there"))),
            None => Err(occupied(format!("an initialisation began there, {}", to.locate(&Document::Initialising)))),
        };
    }
    if let Some(bytes) = to.read(&Document::Installation).await? {
        let record = UnverifiedRecord::parse(&location, &bytes, Kind::Installation, INSTALLATION);
        let claimed = record.and_then(|record| record.unverified_body::<Installation>(&location));
        return match claimed {
            Ok(installation) if installation.id != id => Err(occupied(format!("the installation {}", installation.id))),
            Ok(_) if shared_digests(to).await? == *digests => Ok(false),
            Ok(_) => Err(occupied("another state of this installation, which is older or has gone on".to_owned())),
            Err(error) => Err(occupied(error.to_string())),
        };
    }
    if let Some(found) = super::initialise::remains(to).await? {
        return Err(occupied(found));
    }
    let mark = json!({ "format": FORMAT, "kind": MIGRATING, "installation": id, "started_at": now });
    to.replace(&Document::Initialising, None, format!("{mark:#}\n").as_bytes()).await?;
    Ok(true)
}

/// Reads everything back and proves that it is what was copied; notes it as seen.
async fn verify(to: &Site, source: &Ledger, digests: &BTreeMap<Document, Digest>) -> Result<(), MigrateError> {
    let differs = |document: &Document| MigrateError::Differs { location: to.store.locate(document) };
    if shared_digests(to.store.as_ref()).await? != *digests {
        return Err(differs(&Document::Installation));
    }
    let target = Ledger::open_records(to.store.clone(), &to.keks).await?;
    if target.installation_digest() != source.installation_digest() {
        return Err(differs(&Document::Installation));
    }
    let mut marks = vec![(Document::Installation, target.installation_mark())];
    for (name, digest, mark) in load_all(&target).await? {
        let document = Document::Keyring(name);
        if digests.get(&document) != Some(&digest) {
            return Err(differs(&document));
        }
        marks.push((document, mark));
    }
    let behind = marks.into_iter().find_map(|(document, mark)| match mark {
        Mark::Current => None,
        Mark::Behind { problem } => Some((to.store.locate(&document), problem)),
    });
    match behind {
        Some((location, problem)) => Err(MigrateError::Unmarked { location, problem }),
        None => Ok(()),
    }
}

/// Every keyring, authenticated and in its place in history.
async fn load_all(ledger: &Ledger) -> Result<Vec<(Name, Digest, Mark)>, LedgerError> {
    let mut loaded = Vec::new();
    let listed: Vec<Name> = ledger.installation().keysets.keys().cloned().collect();
    let stored = ledger.store.keysets().await?;
    for name in listed.iter().chain(stored.iter().filter(|name| !listed.contains(name))) {
        if let Some(keyring) = ledger.load(name).await? {
            loaded.push((name.clone(), keyring.digest, keyring.mark));
        }
    }
    Ok(loaded)
}

async fn refuse_changed(
    from: &dyn Store,
    revision: Option<&Revision>,
    digests: &BTreeMap<Document, Digest>,
) -> Result<(), MigrateError> {
    refuse_in_use(from).await?;
    let moved_on = match from.shared() {
        Some(shared) => shared.heads(revision, Duration::ZERO).await?.documents.is_some(),
        None => false,
    };
    if moved_on || shared_digests(from).await? != *digests {
        return Err(MigrateError::Changed { location: from.locate(&Document::Installation) });
    }
    Ok(())
}

/// Digests of the installation and of all keyrings.
async fn shared_digests(store: &dyn Store) -> Result<BTreeMap<Document, Digest>, StoreError> {
    let mut digests = BTreeMap::new();
    let keyrings = store.keysets().await?.into_iter().map(Document::Keyring);
    for document in std::iter::once(Document::Installation).chain(keyrings) {
        if let Some(bytes) = store.read(&document).await? {
            digests.insert(document, Digest::of(&bytes));
        }
    }
    Ok(digests)
}

/// What a store held when it was read, to be opened without writing a mark into it.
struct Copied {
    of: Arc<dyn Store>,
    documents: BTreeMap<Document, Vec<u8>>,
    memory: MemoryStore,
}

impl Copied {
    async fn of(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let names = store.keysets().await?;
        let keyrings = names.iter().cloned().flat_map(|name| [Document::Keyring(name.clone()), Document::Seen(name)]);
        let single = [
            Document::Initialising,
            Document::Installation,
            Document::SeenInstallation,
            Document::Alive,
            Document::Notices,
        ];
        let (mut documents, memory) = (BTreeMap::new(), MemoryStore::new());
        for document in single.into_iter().chain(keyrings) {
            if let Some(bytes) = store.read(&document).await? {
                memory.replace(&document, None, &bytes).await?;
                documents.insert(document, bytes);
            }
        }
        Ok(Copied { of: store, documents, memory })
    }

    fn shared_digests(&self) -> BTreeMap<Document, Digest> {
        let shared = self.records();
        shared
            .filter(|(document, _)| **document != Document::Notices)
            .map(|(document, bytes)| (document.clone(), Digest::of(bytes)))
            .collect()
    }

    fn records(&self) -> impl Iterator<Item = (&Document, &Vec<u8>)> {
        self.documents.iter().filter(|(document, _)| document.is_shared() && **document != Document::Initialising)
    }

    /// The installation comes last: a store without it is never opened, whichever release looks at it.
    async fn write_into(&self, to: &dyn Store) -> Result<(), StoreError> {
        let alive = self.documents.get_key_value(&Document::Alive);
        let keyrings = self.records().filter(|(document, _)| **document != Document::Installation);
        let installation = self.documents.get_key_value(&Document::Installation);
        for (document, bytes) in keyrings.chain(alive).chain(installation) {
            overwrite(to, document, bytes).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl Store for Copied {
    fn kind(&self) -> &'static str {
        self.of.kind()
    }

    fn locate(&self, document: &Document) -> String {
        self.of.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        self.memory.read(document).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        self.memory.replace(document, expected, bytes).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        self.memory.remove(document).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.memory.keysets().await
    }
}
