//! The typed, authenticated view of a store: what the engine reads and writes.
//!
//! A [`Store`] moves bytes; the ledger knows what they mean and whether they can be trusted. Unreadable is never absent
//! here: what cannot be read, authenticated or placed in its history is an error that names the document and the way out,
//! and nothing is written over it.

mod error;
mod initialise;
mod installation;
mod migrate;
mod recover;
mod reseal;
mod seen;
mod unauthenticated;

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

pub use self::error::LedgerError;
pub use self::initialise::{Initialisation, SealEvidence};
pub use self::installation::{Installation, IssuerEntry, KeysetEntry, KeysetState, WrappedDataKey};
pub use self::migrate::{MigrateError, Migrated, Site, migrate_store, refuse_in_use};
pub use self::recover::{Evidence, RecoverError, RecoveredKeyset, RecoveryOutcome, RecoveryRequest, recover_store};
pub use self::reseal::Resealed;
pub use self::seen::Mark;
pub use self::unauthenticated::Unauthenticated;

use self::installation::{Place, unwrap_data_keys};
use self::seen::{Position, SeenMark};
use super::record::{Header, Kind, OpenedRecord, RecordProblem, UnverifiedRecord, open_record, seal_record};
use super::shared::SharedStore;
use super::{Digest, Document, Store, StoreError, overwrite};
use crate::keyring::change::SYSTEM;
use crate::keyring::name::Name;
use crate::keyring::notice::Book;
use crate::keyring::record::{Journal, Keyring};
use crate::keyring::time::{Span, Timestamp};
use crate::random;
use crate::seal::KeyEncryptionKey;
use crate::seal::data_keys::DataKeys;

/// The name of documents that exist once: their kind's.
const INSTALLATION: &str = Kind::Installation.as_str();
const ALIVE: &str = Kind::Alive.as_str();
const NOTICES: &str = Kind::Notices.as_str();

/// How often a change of the installation is made again because another replica was faster.
const RACES_MAX: u32 = 32;

/// An opened installation.
pub struct Ledger {
    store: Arc<dyn Store>,
    keys: Arc<DataKeys>,
    installation: ArcSwap<StoredInstallation>,
    /// Held by whoever changes the installation.
    changing: Mutex<Certainty>,
}

/// A keyring as it is stored.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Shared with whoever shows it: of thousands of keysets each is in memory once.
    pub keyring: Arc<Keyring>,
    /// Of the stored bytes: what the next write expects to replace.
    pub digest: Digest,
    pub mark: Mark,
}

/// What became of a write whose outcome was unknown.
#[derive(Clone, Debug)]
pub enum Settled {
    /// It is stored, durably.
    Written(Box<Loaded>),
    /// It is not; what was there before is. It can be written again.
    NotWritten,
}

/// What became of a change to the installation's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amended {
    /// It is stored; the record has this generation now.
    At { generation: u64 },
    /// Nothing was written: the record had left the expected generation.
    MovedOn { current: u64 },
}

/// A keyset as the installation knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    pub name: Name,
    /// Registered together with its issuer, which had never published a key (DESIGN §2, "First key"). Matters to whoever
    /// makes its first key; stays true afterwards.
    pub first: bool,
    /// For the keyring to make.
    pub lineage: String,
}

/// When this daemon last published; outside keyrings, so that it costs no generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    pub at: Timestamp,
    /// By issuer URL: since when it has published without a long silence.
    pub resumed: BTreeMap<String, Timestamp>,
    /// How much longer removals wait after a long absence, in uptime.
    #[serde(default)]
    pub removals_delay: Span,
    /// The latest time given to any token until then.
    #[serde(default)]
    pub latest: Timestamp,
    /// By issuer URL: until when it is known what all its probes show.
    #[serde(default)]
    pub sampled: BTreeMap<String, Timestamp>,
    /// When a shared store last confirmed every keyring.
    #[serde(default)]
    pub confirmed: Option<Timestamp>,
}

impl Alive {
    /// For when it is not known: everything that waits after an absence waits.
    pub fn long_ago() -> Self {
        Alive {
            at: Timestamp::EPOCH,
            resumed: BTreeMap::new(),
            removals_delay: Span::ZERO,
            latest: Timestamp::EPOCH,
            sampled: BTreeMap::new(),
            confirmed: None,
        }
    }
}

struct StoredInstallation {
    body: Arc<Installation>,
    position: Position,
    mark: Mark,
}

/// Whether the installation in memory is the stored one.
#[derive(PartialEq, Eq)]
enum Certainty {
    Certain,
    /// A write failed, and reading it back did too.
    Unknown,
}

impl Ledger {
    /// Opens an initialised store with the key-encryption keys that are configured, the primary one first. Reads and
    /// authenticates the installation, and checks that every keyring it lists is there.
    pub async fn open(store: Arc<dyn Store>, keks: &[Arc<dyn KeyEncryptionKey>]) -> Result<Ledger, LedgerError> {
        migrate::refuse_unfinished(store.as_ref()).await?;
        let ledger = Self::open_records(store, keks).await?;
        // Replicas of a shared store may only read it: whoever manages it ends the initialisation there.
        if ledger.store.shared().is_none() {
            end_initialisation(ledger.store.as_ref()).await?;
        }
        Ok(ledger)
    }

    /// The same, whatever is unfinished.
    async fn open_records(store: Arc<dyn Store>, keks: &[Arc<dyn KeyEncryptionKey>]) -> Result<Ledger, LedgerError> {
        let location = store.locate(&Document::Installation);
        let not_initialised = || LedgerError::NotInitialised { location: location.clone() };
        let bytes = store.read(&Document::Installation).await?.ok_or_else(not_initialised)?;
        let unverified = UnverifiedRecord::parse(&location, &bytes, Kind::Installation, INSTALLATION)?;
        let claimed: Installation = unverified.unverified_body(&location)?;
        let keys = unwrap_data_keys(&location, &claimed, keks).await?;
        let record = unverified.authenticate(&location, &keys)?;
        let installation = StoredInstallation::admit(store.as_ref(), &keys, &record, claimed, &bytes).await?;
        refuse_missing_keyrings(store.as_ref(), &installation.body).await?;
        Ok(Ledger {
            store,
            keys: Arc::new(keys),
            installation: ArcSwap::from_pointee(installation),
            changing: Mutex::new(Certainty::Certain),
        })
    }

    /// The data keys: for the backend that seals private keys with them.
    pub fn keys(&self) -> Arc<DataKeys> {
        Arc::clone(&self.keys)
    }

    /// The installation as it was last read or written.
    pub fn installation(&self) -> Arc<Installation> {
        Arc::clone(&self.installation.load().body)
    }

    pub fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    /// What other replicas do with the store; `None` where there can be none.
    pub fn shared(&self) -> Option<&dyn SharedStore> {
        self.store.shared()
    }

    /// Whether this process takes part in a keyset.
    pub fn uses(&self, keyset: &Name) -> bool {
        self.store.uses(keyset)
    }

    /// Of the installation's record as it was last read or written.
    pub fn installation_digest(&self) -> Digest {
        self.installation.load().position.digest
    }

    /// Reads the installation again, which another replica may have changed.
    pub async fn refresh(&self) -> Result<(), LedgerError> {
        let mut certainty = self.changing.lock().await;
        self.installation.store(Arc::new(self.read_installation().await?));
        *certainty = Certainty::Certain;
        Ok(())
    }

    /// Whether an older copy of the installation's record would be noticed.
    pub fn installation_mark(&self) -> Mark {
        self.installation.load().mark.clone()
    }

    /// Where a person finds the keyring of `keyset`.
    pub fn locate(&self, keyset: &Name) -> String {
        self.store.locate(&Document::Keyring(keyset.clone()))
    }

    /// Makes keysets with the URLs of their issuers known, all in one write; `first` are those of issuers that were not
    /// known before it. Repeating it changes nothing and answers the same. A keyset that names another issuer than before
    /// is moved there: the caller has made sure that it was drained.
    pub async fn register(&self, keysets: &[(Name, String)], now: Timestamp) -> Result<Vec<Registration>, LedgerError> {
        self.change(|installation| {
            let known: Vec<String> = installation.issuers.keys().cloned().collect();
            for (name, issuer) in keysets {
                let first = known.binary_search(issuer).is_err();
                installation.register(name, issuer, first, now);
            }
        })
        .await?;
        let installation = self.installation();
        keysets
            .iter()
            .map(|(name, _)| {
                let entry = entry(&installation, name)?;
                Ok(Registration { name: name.clone(), first: entry.first, lineage: entry.lineage.clone() })
            })
            .collect()
    }

    /// Notes that the keyrings of these keysets were written, so that a missing one is a loss from now on. One write, none
    /// if it was noted before.
    pub async fn created(&self, keysets: &[Name]) -> Result<(), LedgerError> {
        for name in keysets {
            entry(&self.installation(), name)?;
        }
        self.change(|installation| {
            for name in keysets {
                if let Some(entry) = installation.keysets.get_mut(name) {
                    entry.state = KeysetState::Created;
                }
            }
        })
        .await
    }

    /// These keysets begin after their issuer: their first keys wait like any other.
    pub async fn begin_later(&self, keysets: &[Name]) -> Result<(), LedgerError> {
        self.change(|installation| {
            for name in keysets {
                if let Some(entry) = installation.keysets.get_mut(name).filter(|e| e.state == KeysetState::Creating) {
                    entry.first = false;
                }
            }
        })
        .await
    }

    /// Removes what a crash may have left of the initialisation of a shared store.
    pub async fn end_initialisation(&self) -> Result<(), LedgerError> {
        Ok(end_initialisation(self.store.as_ref()).await?)
    }

    /// Notes where the store is. The time since which it has been here, if it was somewhere else before: it may be a copy,
    /// and the original may live on.
    pub async fn settle_place(&self, now: Timestamp) -> Result<Option<Timestamp>, LedgerError> {
        let Some(here) = self.store.place() else { return Ok(None) };
        let recorded = self.installation().place.clone();
        if let Some(place) = recorded.as_ref().filter(|place| place.id == here) {
            return Ok(place.moved_at);
        }
        // A record from before places were noted says nothing of a move.
        let moved_at = recorded.map(|_| now);
        self.change(|installation| {
            installation.place = Some(Place { id: here.clone(), moved_at });
            if moved_at.is_some() {
                installation.journal.note(now, "store-moved", SYSTEM, None, [], None);
                installation.journal.tidy(now);
            }
        })
        .await?;
        Ok(moved_at)
    }

    /// Generation of the installation's record as it was last read or written; it grows by one per change.
    pub fn generation(&self) -> u64 {
        self.installation.load().position.generation
    }

    /// Changes the journal of the installation, if its record still is at one of the generations `expected` (`None`:
    /// whichever it is). `amend` gets the generation that the write makes.
    pub async fn amend_journal(
        &self,
        expected: Option<&[u64]>,
        amend: impl Fn(&mut Journal, u64),
    ) -> Result<Amended, LedgerError> {
        self.change_at(expected, |installation, generation| amend(&mut installation.journal, generation)).await
    }

    /// The keyring of a registered keyset; `None` only if it was never written. It is authentic, of this keyset and
    /// lineage, and not older than what was seen before.
    pub async fn load(&self, keyset: &Name) -> Result<Option<Loaded>, LedgerError> {
        self.load_if(keyset, |_| Ok(())).await
    }

    /// The same, if `accept` takes it: what is not taken is neither marked as seen nor kept.
    pub async fn load_if(
        &self,
        keyset: &Name,
        accept: impl Fn(&Keyring) -> Result<(), LedgerError> + Send,
    ) -> Result<Option<Loaded>, LedgerError> {
        Ok(self.load_with_data_key(keyset, accept).await?.map(|(loaded, _)| loaded))
    }

    /// Stores `next` in the place of `current` (`None`: the first generation). Durable when this returns.
    ///
    /// After [`StoreError::Unavailable`] the outcome is unknown: ask [`settle`](Self::settle) before anything else. After
    /// [`StoreError::Conflict`] somebody else wrote; load again.
    pub async fn save(&self, current: Option<&Loaded>, next: &Keyring) -> Result<Loaded, LedgerError> {
        self.save_shared(current, &Arc::new(next.clone())).await
    }

    /// [`save`](Self::save) of a keyring that will also be shown.
    pub async fn save_shared(&self, current: Option<&Loaded>, next: &Arc<Keyring>) -> Result<Loaded, LedgerError> {
        let (bytes, position) = self.prepare(current, next)?;
        let document = Document::Keyring(next.keyset.clone());
        let replaced = self.store.replace(&document, current.map(|loaded| loaded.digest), &bytes).await;
        replaced.map_err(|error| self.lost_race(error))?;
        let mark = SeenMark::of_keyring(self.store.as_ref(), &self.keys, &next.keyset).advance(&position, &bytes).await;
        Ok(Loaded { keyring: Arc::clone(next), digest: position.digest, mark })
    }

    /// Finds out what became of a [`save`](Self::save) with the same arguments that failed. Fails itself while the store
    /// cannot be read, and with a conflict if neither of the two is stored.
    pub async fn settle(&self, current: Option<&Loaded>, next: &Keyring) -> Result<Settled, LedgerError> {
        let (_, attempted) = self.prepare(current, next)?;
        // Compared before anything is judged: right after a first write that failed nothing needs to exist.
        let document = Document::Keyring(next.keyset.clone());
        let stored = self.store.read(&document).await?.map(|bytes| Digest::of(&bytes));
        if stored == current.map(|loaded| loaded.digest) {
            return Ok(Settled::NotWritten);
        }
        match self.load(&next.keyset).await? {
            Some(loaded) if loaded.digest == attempted.digest => Ok(Settled::Written(Box::new(loaded))),
            _ => Err(self.lost_race(StoreError::Conflict { document: self.locate(&next.keyset) })),
        }
    }

    /// Where nobody else may write, a conflict means that somebody did; where others may, that they were faster.
    fn lost_race(&self, error: StoreError) -> LedgerError {
        match error {
            StoreError::Conflict { document } if self.shared().is_some() => {
                LedgerError::Overtaken { location: document }
            }
            error => error.into(),
        }
    }

    /// When this daemon last published. `None` also for a record that a power failure left empty or cut off, or that an
    /// older data key authenticates: it is written without a sync, and its absence only makes the daemon wait.
    pub async fn read_alive(&self) -> Result<Option<Alive>, LedgerError> {
        let location = self.store.locate(&Document::Alive);
        let Some(bytes) = self.store.read(&Document::Alive).await? else { return Ok(None) };
        match open_record(&location, &bytes, Kind::Alive, ALIVE, &self.keys) {
            Ok(record) => Ok(Some(record.body(&location)?)),
            Err(error) => match error.problem {
                RecordProblem::Malformed { .. } | RecordProblem::UnknownDataKey { .. } => Ok(None),
                _ => Err(error.into()),
            },
        }
    }

    /// Notes that this daemon publishes. Not durable against power failures, on purpose.
    pub async fn write_alive(&self, alive: &Alive) -> Result<(), LedgerError> {
        let location = self.store.locate(&Document::Alive);
        let header = Header { kind: Kind::Alive, name: ALIVE, lineage: "", generation: 0, previous: None };
        let bytes = seal_record(&location, &header, alive, &self.keys)?;
        Ok(overwrite(self.store.as_ref(), &Document::Alive, &bytes).await?)
    }

    /// What receivers of notices have heard, with the digest that the next write expects.
    pub async fn read_notices(&self) -> Result<Option<(Book, Digest)>, LedgerError> {
        let location = self.store.locate(&Document::Notices);
        let Some(bytes) = self.store.read(&Document::Notices).await? else { return Ok(None) };
        let record = open_record(&location, &bytes, Kind::Notices, NOTICES, &self.keys)?;
        Ok(Some((record.body(&location)?, Digest::of(&bytes))))
    }

    /// Replaces it where it has the digest `expected`; returns the new one.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] where another manager wrote it meanwhile.
    pub async fn write_notices(&self, book: &Book, expected: Option<Digest>) -> Result<Digest, LedgerError> {
        let location = self.store.locate(&Document::Notices);
        let header = Header { kind: Kind::Notices, name: NOTICES, lineage: "", generation: 0, previous: None };
        let bytes = seal_record(&location, &header, book, &self.keys)?;
        self.store.replace(&Document::Notices, expected, &bytes).await?;
        Ok(Digest::of(&bytes))
    }

    /// Begins anew with it, whatever is stored.
    pub async fn renew_notices(&self, book: &Book) -> Result<Digest, LedgerError> {
        let stored = self.store.read(&Document::Notices).await?.map(|bytes| Digest::of(&bytes));
        self.write_notices(book, stored).await
    }

    async fn load_with_data_key(
        &self,
        keyset: &Name,
        accept: impl Fn(&Keyring) -> Result<(), LedgerError> + Send,
    ) -> Result<Option<(Loaded, String)>, LedgerError> {
        let installation = self.installation();
        let entry = installation.keysets.get(keyset);
        let location = self.locate(keyset);
        let mark = SeenMark::of_keyring(self.store.as_ref(), &self.keys, keyset);
        let Some(bytes) = self.store.read(&Document::Keyring(keyset.clone())).await? else {
            let existed = entry.is_some_and(|entry| entry.state == KeysetState::Created) || mark.exists().await?;
            let missing = LedgerError::Missing { keyset: keyset.clone(), location };
            return if existed { Err(missing) } else { Ok(None) };
        };
        let unlisted = || LedgerError::Unlisted { keyset: keyset.clone(), location: location.clone() };
        let entry = entry.ok_or_else(unlisted)?;
        let record = open_record(&location, &bytes, Kind::Keyring, keyset.as_str(), &self.keys)?;
        let keyring: Keyring = record.body(&location)?;
        refuse_inconsistent(&location, keyset, &Position::of(&record), &keyring)?;
        if record.lineage != entry.lineage {
            let (found, expected) = (record.lineage, entry.lineage.clone());
            return Err(LedgerError::OtherLineage { location, found, expected });
        }
        accept(&keyring)?;
        let mark = mark.admit(&Position::of(&record), &keyring.supersedes, &bytes).await?;
        Ok(Some((Loaded { keyring: Arc::new(keyring), digest: record.digest, mark }, record.data_key)))
    }

    /// The bytes that store `next` after `current`; the same arguments give the same bytes.
    fn prepare(&self, current: Option<&Loaded>, next: &Keyring) -> Result<(Vec<u8>, Position), LedgerError> {
        let keyset = &next.keyset;
        let installation = self.installation();
        let entry = entry(&installation, keyset)?;
        let location = self.locate(keyset);
        if next.lineage != entry.lineage {
            let (found, expected) = (next.lineage.clone(), entry.lineage.clone());
            return Err(LedgerError::OtherLineage { location, found, expected });
        }
        let generation = current.map_or(0, |loaded| loaded.keyring.generation);
        if generation.checked_add(1) != Some(next.generation) {
            let (current, next) = (generation, next.generation);
            return Err(LedgerError::OutOfSequence { keyset: keyset.clone(), current, next });
        }
        let position = Position {
            lineage: next.lineage.clone(),
            generation: next.generation,
            previous: current.map(|loaded| loaded.digest),
            digest: Digest([0; 32]),
        };
        let bytes = seal_record(&location, &header(Kind::Keyring, keyset.as_str(), &position), next, &self.keys)?;
        let digest = Digest::of(&bytes);
        Ok((bytes, Position { digest, ..position }))
    }

    /// Applies `change` to the installation and stores the result, unless nothing changed.
    async fn change(&self, change: impl Fn(&mut Installation)) -> Result<(), LedgerError> {
        self.change_at(None, |installation, _| change(installation)).await.map(|_| ())
    }

    /// As [`change`](Self::change), unless the record has left the generations `expected`. Where other replicas write too
    /// it is made again on what they wrote.
    async fn change_at(
        &self,
        expected: Option<&[u64]>,
        change: impl Fn(&mut Installation, u64),
    ) -> Result<Amended, LedgerError> {
        let mut certainty = self.changing.lock().await;
        for _ in 0..RACES_MAX {
            match self.change_once(&mut certainty, expected, &change).await {
                Err(LedgerError::Overtaken { .. }) if *certainty == Certainty::Certain => {}
                done => return done,
            }
        }
        Err(LedgerError::Overtaken { location: self.store.locate(&Document::Installation) })
    }

    async fn change_once(
        &self,
        certainty: &mut Certainty,
        expected: Option<&[u64]>,
        change: &impl Fn(&mut Installation, u64),
    ) -> Result<Amended, LedgerError> {
        if *certainty == Certainty::Unknown {
            self.installation.store(Arc::new(self.read_installation().await?));
            *certainty = Certainty::Certain;
        }
        let stored = self.installation.load_full();
        let current = stored.position.generation;
        if expected.is_some_and(|expected| !expected.contains(&current)) {
            return Ok(Amended::MovedOn { current });
        }
        let mut next = (*stored.body).clone();
        let generation = current.saturating_add(1);
        change(&mut next, generation);
        if next == *stored.body {
            return Ok(Amended::At { generation: current });
        }
        let (bytes, position) = prepare_installation(self.store.as_ref(), &stored.position, &next, &self.keys)?;
        let replaced = self.store.replace(&Document::Installation, Some(stored.position.digest), &bytes).await;
        if let Err(error) = replaced {
            *certainty = Certainty::Unknown;
            // Often it can be told at once whether it was written after all.
            let Ok(found) = self.read_installation().await else { return Err(self.lost_race(error)) };
            *certainty = Certainty::Certain;
            let written = found.position.digest == position.digest;
            self.installation.store(Arc::new(found));
            return if written { Ok(Amended::At { generation }) } else { Err(self.lost_race(error)) };
        }
        let mark = SeenMark::of_installation(self.store.as_ref(), &self.keys).advance(&position, &bytes).await;
        self.installation.store(Arc::new(StoredInstallation { body: Arc::new(next), position, mark }));
        Ok(Amended::At { generation })
    }

    async fn read_installation(&self) -> Result<StoredInstallation, LedgerError> {
        let location = self.store.locate(&Document::Installation);
        let lost = || LedgerError::InstallationLost { location: location.clone(), found: "its daemon".to_owned() };
        let bytes = self.store.read(&Document::Installation).await?.ok_or_else(lost)?;
        let record = open_record(&location, &bytes, Kind::Installation, INSTALLATION, &self.keys)?;
        let body = record.body(&location)?;
        StoredInstallation::admit(self.store.as_ref(), &self.keys, &record, body, &bytes).await
    }
}

impl StoredInstallation {
    async fn admit(
        store: &dyn Store,
        keys: &DataKeys,
        record: &OpenedRecord<'_>,
        body: Installation,
        bytes: &[u8],
    ) -> Result<Self, LedgerError> {
        let position = Position::of(record);
        let mark = SeenMark::of_installation(store, keys).admit(&position, &body.supersedes, bytes).await?;
        Ok(StoredInstallation { body: Arc::new(body), position, mark })
    }
}

impl Installation {
    fn register(&mut self, name: &Name, issuer: &str, first: bool, now: Timestamp) {
        self.issuers.entry(issuer.to_owned()).or_insert(IssuerEntry { initialised_at: now });
        match self.keysets.get_mut(name) {
            Some(entry) if entry.issuer == issuer => {}
            Some(entry) => {
                entry.issuer = issuer.to_owned();
                entry.first = first;
            }
            None => {
                let issuer = issuer.to_owned();
                let entry = KeysetEntry { issuer, first, state: KeysetState::Creating, lineage: random::id() };
                self.keysets.insert(name.clone(), entry);
            }
        }
    }
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("store", &self.store.kind()).field("keys", &self.keys).finish_non_exhaustive()
    }
}

/// The crash may have come after the last step but this.
async fn end_initialisation(store: &dyn Store) -> Result<(), StoreError> {
    match store.read(&Document::Initialising).await? {
        Some(_) => store.remove(&Document::Initialising).await,
        None => Ok(()),
    }
}

fn entry<'a>(installation: &'a Installation, keyset: &Name) -> Result<&'a KeysetEntry, LedgerError> {
    installation.keysets.get(keyset).ok_or_else(|| LedgerError::Unregistered { keyset: keyset.clone() })
}

fn header<'a>(kind: Kind, name: &'a str, position: &'a Position) -> Header<'a> {
    Header { kind, name, lineage: &position.lineage, generation: position.generation, previous: position.previous }
}

/// The bytes of the installation's next generation.
fn prepare_installation(
    store: &dyn Store,
    current: &Position,
    next: &Installation,
    keys: &DataKeys,
) -> Result<(Vec<u8>, Position), LedgerError> {
    let location = store.locate(&Document::Installation);
    let position = Position {
        lineage: current.lineage.clone(),
        generation: current.generation.saturating_add(1),
        previous: Some(current.digest),
        digest: Digest([0; 32]),
    };
    let bytes = seal_record(&location, &header(Kind::Installation, INSTALLATION, &position), next, keys)?;
    let digest = Digest::of(&bytes);
    Ok((bytes, Position { digest, ..position }))
}

/// Envelope and body are authenticated together; a difference is a writer's mistake, not an attack, and as dangerous.
fn refuse_inconsistent(location: &str, keyset: &Name, record: &Position, keyring: &Keyring) -> Result<(), LedgerError> {
    let problem = if keyring.keyset != *keyset {
        "its body is another keyset's"
    } else if keyring.lineage != record.lineage {
        "its body has another lineage"
    } else if keyring.generation != record.generation {
        "its body has another generation"
    } else {
        return Ok(());
    };
    Err(LedgerError::Inconsistent { location: location.to_owned(), problem })
}

async fn refuse_missing_keyrings(store: &dyn Store, installation: &Installation) -> Result<(), LedgerError> {
    let stored = match store.keysets().await {
        // It starts from copies of what this replica uses. One that it lacks is not readable, which is not absent.
        Err(StoreError::Unavailable { .. }) if store.shared().is_some() => return Ok(()),
        listed => listed?,
    };
    let missing = installation
        .keysets
        .iter()
        .find(|(name, entry)| entry.state == KeysetState::Created && stored.binary_search(name).is_err());
    match missing {
        None => Ok(()),
        Some((keyset, _)) => {
            let location = store.locate(&Document::Keyring(keyset.clone()));
            Err(LedgerError::Missing { keyset: keyset.clone(), location })
        }
    }
}
