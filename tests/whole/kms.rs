//! A KMS: an inventory of keys that outlives every process, and the ways in which it fails.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::backend::local::ImportPrivate;
use jwksd::backend::material::PrivateKeyMaterial;
use jwksd::backend::{
    Backend, BackendError, BackendErrorKind, CreatedKey, KeyIdentity, LocalSigner, RemoteSigner, Signer, StoredKey,
};
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::jwk::Kid;
use jwksd::keyring::name::Name;

use crate::account;
use crate::keys::{KeyId, Pair, id_of, ids_of, is_earlier, pair};
use crate::life::Life;
use crate::random::Random;

/// As policies name it.
pub const NAME: &str = "simulated-kms";

/// Whose keys nobody may touch.
pub const FOREIGN: &str = "foreign";

/// One in so many signatures over the network is slow, and takes up to so long, in milliseconds: three in a row keep the
/// deadline of a request.
const SLOW_ONE_IN: u64 = 2;
const SLOW_MAX: u64 = 600;

/// How a KMS answers while something is wrong with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Well,
    /// Every call fails at once.
    Away,
    /// Calls are turned away, one in two.
    Throttling,
    /// Calls are not answered until it is well again, and then carried out.
    Hanging,
    /// What is asked is done, and the answer gets lost.
    Mute,
    /// What is asked is done long after the caller was told that it failed.
    Late,
    /// What it signs is not what was asked.
    Lying,
}

impl Mood {
    pub const BAD: [Mood; 6] = [Mood::Away, Mood::Throttling, Mood::Hanging, Mood::Mute, Mood::Late, Mood::Lying];
}

/// A key in the inventory.
#[derive(Clone)]
pub struct Entry {
    pub id: KeyId,
    pub keyset: Name,
    pub serial: u64,
    pub(crate) lineage: String,
    pub destroyed: bool,
    /// True time, in milliseconds.
    pub made_at: i64,
    /// Those of a key in AWS KMS.
    pub tags: Vec<(String, String)>,
    pub disabled: bool,
}

impl Entry {
    pub(crate) fn new(id: KeyId, keyset: Name, serial: u64, lineage: &str, made_at: i64) -> Entry {
        let lineage = lineage.to_owned();
        Entry { id, keyset, serial, lineage, destroyed: false, made_at, tags: Vec::new(), disabled: false }
    }

    fn is_of(&self, identity: &KeyIdentity) -> bool {
        (&self.keyset, self.serial, &self.lineage) == (&identity.keyset, identity.serial, &identity.lineage)
    }

    /// Whether both were made for the same serial; only one of them can be used for it.
    pub fn is_twin_of(&self, other: &Entry) -> bool {
        self.id != other.id
            && (&self.keyset, self.serial, &self.lineage) == (&other.keyset, other.serial, &other.lineage)
    }
}

pub struct Kms {
    inventory: Mutex<Inventory>,
    well: tokio::sync::Notify,
    /// As policies name it.
    pub name: &'static str,
    /// Signatures are made over the network, and are real.
    pub is_remote: bool,
    /// It is an account of AWS KMS.
    pub is_account: bool,
}

pub(crate) struct Inventory {
    pub(crate) entries: BTreeMap<KeyId, Entry>,
    /// Names of keys in AWS KMS.
    pub(crate) aliases: BTreeMap<String, KeyId>,
    mood: Mood,
    random: Random,
    /// What was asked to be destroyed since the oracle last looked.
    destroyed: Vec<KeyId>,
    wrongs: Vec<String>,
    loses: bool,
    /// Of signatures alone.
    pace: Random,
}

impl Kms {
    /// `pace` says how long signatures take.
    pub fn new(random: Random, pace: Random, name: &'static str, is_remote: bool, is_account: bool) -> Arc<Self> {
        let inventory = Inventory {
            entries: BTreeMap::new(),
            aliases: BTreeMap::new(),
            mood: Mood::Well,
            random,
            destroyed: Vec::new(),
            wrongs: Vec::new(),
            loses: false,
            pace,
        };
        Arc::new(Kms {
            inventory: Mutex::new(inventory),
            well: tokio::sync::Notify::new(),
            name,
            is_remote,
            is_account,
        })
    }

    pub fn set_mood(&self, mood: Mood) {
        self.inventory().mood = mood;
        self.well.notify_waiters();
    }

    pub fn mood(&self) -> Mood {
        self.inventory().mood
    }

    pub fn entries(&self) -> Vec<Entry> {
        self.inventory().entries.values().cloned().collect()
    }

    /// Somebody else's keys, which nobody may touch.
    pub fn add_foreign(&self) {
        let mut inventory = self.inventory();
        let id = inventory.take_id(Algorithm::Es256);
        let keyset = Name::parse(FOREIGN).unwrap();
        inventory.insert(Entry::new(id, keyset, 1, FOREIGN, 0));
    }

    pub fn is_foreign(&self, id: KeyId) -> bool {
        self.inventory().entries.get(&id).is_some_and(|entry| entry.keyset.as_str() == FOREIGN)
    }

    /// The store went back to an older copy, and with it the private keys that live there: `kept` are those that it names.
    /// Which others are left, of which nobody knows any more.
    pub fn go_back(&self, kept: &BTreeSet<KeyId>) -> BTreeSet<KeyId> {
        let mut inventory = self.inventory();
        let mut lost = BTreeSet::new();
        for entry in inventory.entries.values_mut().filter(|entry| entry.keyset.as_str() != FOREIGN) {
            match kept.contains(&entry.id) {
                true => entry.destroyed = false,
                false => {
                    entry.lineage = "lost".to_owned();
                    lost.insert(entry.id);
                }
            }
        }
        lost
    }

    /// From now on it forgets some of what it makes.
    pub fn lose_keys(&self) {
        self.inventory().loses = true;
    }

    pub fn destroyed(&self) -> Vec<KeyId> {
        std::mem::take(&mut self.inventory().destroyed)
    }

    pub fn wrongs(&self) -> Vec<String> {
        std::mem::take(&mut self.inventory().wrongs)
    }

    fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory.lock().unwrap()
    }

    /// Gets a call through, or not.
    async fn arrive(&self, operation: &'static str) -> Result<(), BackendError> {
        loop {
            let (mood, dice) = {
                let mut inventory = self.inventory();
                (inventory.mood, inventory.random.below(2))
            };
            match mood {
                Mood::Away => return Err(failed(operation, BackendErrorKind::Unavailable)),
                Mood::Throttling if dice == 0 => return Err(failed(operation, BackendErrorKind::Throttled)),
                Mood::Hanging => self.well.notified().await,
                _ => return Ok(()),
            }
        }
    }
}

impl Inventory {
    pub(crate) fn take_id(&mut self, algorithm: Algorithm) -> KeyId {
        let ids = ids_of(algorithm);
        self.entries.range(ids.clone()).next_back().map_or(ids.start, |(last, _)| last + 1)
    }

    fn find(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Option<&Entry> {
        let of = |entry: &&Entry| entry.is_of(identity) && pair(entry.id).algorithm() == algorithm;
        self.entries.values().find(of)
    }

    /// Somebody asks for a key; what arrives late was asked for before.
    fn asked(&mut self, identity: &KeyIdentity, algorithm: Algorithm) {
        if self.find(identity, algorithm).is_some_and(|entry| entry.destroyed) {
            self.wrongs.push(format!("serial {} is asked for again after it was destroyed", identity.serial));
        }
    }

    /// Makes the key, or finds the one that was made for it before.
    fn create(&mut self, identity: &KeyIdentity, algorithm: Algorithm, now: i64) -> KeyId {
        if let Some(entry) = self.find(identity, algorithm) {
            return entry.id;
        }
        let id = self.take_id(algorithm);
        let entry = Entry::new(id, identity.keyset.clone(), identity.serial, &identity.lineage, now);
        self.insert(Entry { destroyed: self.loses && id % 5 == 4, ..entry });
        id
    }

    pub(crate) fn insert(&mut self, entry: Entry) {
        self.entries.insert(entry.id, entry);
    }

    pub(crate) fn destroy(&mut self, id: KeyId) {
        if let Some(entry) = self.entries.get_mut(&id).filter(|entry| !entry.destroyed) {
            entry.destroyed = true;
            self.destroyed.push(id);
        }
    }

    /// How long a signature takes.
    fn takes(&mut self) -> Duration {
        let slow = self.pace.below(SLOW_ONE_IN) == 0;
        Duration::from_millis(if slow { self.pace.below(SLOW_MAX) } else { 0 })
    }

    fn signs(&self, id: KeyId) -> bool {
        self.entries.get(&id).is_some_and(|entry| !entry.destroyed && !entry.disabled)
    }
}

/// The key that a stored handle names.
pub fn id_in(handle: &str) -> Option<KeyId> {
    handle.parse().ok().or_else(|| account::id_in(handle))
}

fn failed(operation: &'static str, kind: BackendErrorKind) -> BackendError {
    BackendError { backend: NAME, operation, kind, source: None }
}

/// The KMS as one process sees it.
pub struct Client {
    kms: Arc<Kms>,
    life: Arc<Life>,
    pub(crate) truth: crate::life::Truth,
    /// Nobody else asks it for keys.
    is_alone: bool,
}

impl Client {
    pub fn new(kms: Arc<Kms>, life: Arc<Life>, truth: crate::life::Truth, is_alone: bool) -> Arc<Self> {
        Arc::new(Client { kms, life, truth, is_alone })
    }

    pub(crate) fn hand(&self, id: KeyId) -> Hand {
        Hand { pair: pair(id).clone(), kms: self.kms.clone(), life: self.life.clone() }
    }

    /// Does what was asked, now or later, and says what the caller is told.
    pub(crate) async fn act<T>(
        &self,
        operation: &'static str,
        act: impl FnOnce(&mut Inventory) -> T + Send + 'static,
    ) -> Result<T, BackendError>
    where
        T: Send + 'static,
    {
        self.life.pass().await;
        self.kms.arrive(operation).await?;
        self.life.pass().await;
        if self.kms.mood() == Mood::Late {
            let kms = self.kms.clone();
            let after = Duration::from_millis(1 + kms.inventory().random.below(20_000));
            tokio::spawn(async move {
                tokio::time::sleep(after).await;
                act(&mut kms.inventory());
            });
            return Err(failed(operation, BackendErrorKind::Timeout));
        }
        let done = act(&mut self.kms.inventory());
        self.life.pass().await;
        match self.kms.mood() {
            Mood::Mute => Err(failed(operation, BackendErrorKind::Unavailable)),
            _ => Ok(done),
        }
    }
}

#[async_trait]
impl Backend for Client {
    fn name(&self) -> &'static str {
        self.kms.name
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        // A replica that has not heard of the latest records may ask for what others made and destroyed.
        if self.is_alone {
            self.kms.inventory().asked(identity, algorithm);
        }
        let (identity, now) = (identity.clone(), self.truth.now());
        let id = self.act("create", move |inventory| inventory.create(&identity, algorithm, now)).await?;
        let pair = pair(id);
        Ok(CreatedKey { kid: pair.kid.clone(), public: pair.public.clone(), handle: id.to_string() })
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        self.life.pass().await;
        let id: KeyId = key.handle.parse().map_err(|_| failed("open", BackendErrorKind::NotFound))?;
        if !self.kms.is_remote && !is_earlier(id) && !self.kms.inventory().signs(id) {
            return Err(failed("open", BackendErrorKind::NotFound));
        }
        let hand = self.hand(id);
        Ok(match self.kms.is_remote {
            true => Signer::Remote(Arc::new(hand)),
            false => Signer::Inline(Arc::new(hand)),
        })
    }

    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        let id: KeyId = key.handle.parse().map_err(|_| failed("destroy", BackendErrorKind::NotFound))?;
        self.act("destroy", move |inventory| inventory.destroy(id)).await
    }
}

/// A private key from elsewhere goes with its handle, as where keys are kept in the store.
#[async_trait]
impl ImportPrivate for Client {
    async fn import(
        &self,
        _: &KeyIdentity,
        kid: Kid,
        _: Algorithm,
        material: PrivateKeyMaterial,
    ) -> Result<CreatedKey, BackendError> {
        let id = self.act("import", move |_| id_of(kid.as_str()).unwrap()).await?;
        let pair = pair(id);
        assert_eq!(*material.public(), pair.public);
        Ok(CreatedKey { kid: pair.kid.clone(), public: pair.public.clone(), handle: id.to_string() })
    }
}

/// Signs with one key.
pub(crate) struct Hand {
    pair: Arc<Pair>,
    kms: Arc<Kms>,
    life: Arc<Life>,
}

/// A key in this process's memory signs whatever becomes of the inventory.
impl LocalSigner for Hand {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        Ok(self.pair.sum(message))
    }
}

#[async_trait]
impl RemoteSigner for Hand {
    async fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.sign_as(|is_asked| self.pair.sign(if is_asked { message } else { b"something else" })).await
    }
}

impl Hand {
    /// The signature that `make` makes of what was asked for, or of something else.
    pub(crate) async fn sign_as(&self, make: impl Fn(bool) -> Vec<u8>) -> Result<Vec<u8>, BackendError> {
        self.life.pass().await;
        self.kms.arrive("sign").await?;
        if !self.kms.inventory().signs(self.pair.id) {
            return Err(failed("sign", BackendErrorKind::KeyDisabled));
        }
        match self.kms.mood() {
            Mood::Mute | Mood::Late => pending().await,
            Mood::Lying => Ok(make(false)),
            _ => {
                let signature = make(true);
                let takes = self.kms.inventory().takes();
                if !takes.is_zero() {
                    tokio::time::sleep(takes).await;
                }
                self.life.pass().await;
                Ok(signature)
            }
        }
    }
}
