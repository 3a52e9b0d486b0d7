//! What the store has held, judged by what DESIGN says of it and by nothing of the product: records are read as JSON.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use jwksd::store::Document;
use serde::Deserialize;

use crate::keys::{KeyId, id_of, is_earlier, pair};
use crate::kms::id_in;

/// An emergency that no replica could carry on with may last for so long, in milliseconds.
const EMERGENCY: i64 = 180_000;

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    lineage: Cow<'a, str>,
    generation: u64,
    #[serde(borrow)]
    body: Body<'a>,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    keys: Vec<Entry<'a>>,
    drained: bool,
    policy: Policy,
}

#[derive(Deserialize)]
struct Policy {
    issuer: Issuer,
    rotation: Rotation,
}

#[derive(Deserialize)]
struct Issuer {
    probes: Vec<String>,
}

#[derive(Deserialize)]
struct Rotation {
    propagation: i64,
}

#[derive(Deserialize)]
struct Entry<'a> {
    serial: u64,
    #[serde(borrow)]
    kid: Cow<'a, str>,
    #[serde(borrow)]
    state: Cow<'a, str>,
    unpropagated: bool,
    seen_at: Option<serde::de::IgnoredAny>,
    #[serde(borrow)]
    private: Option<Private<'a>>,
}

#[derive(Deserialize)]
struct Private<'a> {
    #[serde(borrow)]
    handle: Cow<'a, str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    Pending,
    Standby,
    Active,
    Retiring,
    Retired,
    Revoked,
}

impl State {
    fn of(text: &str) -> Option<State> {
        Some(match text {
            "pending" => State::Pending,
            "standby" => State::Standby,
            "active" => State::Active,
            "retiring" => State::Retiring,
            "retired" => State::Retired,
            "revoked" => State::Revoked,
            _ => return None,
        })
    }

    pub fn has_ended(self) -> bool {
        matches!(self, State::Retired | State::Revoked)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Kept {
    pub id: KeyId,
    pub state: State,
    pub early: bool,
    pub has_private: bool,
    /// It is recorded that probes see it.
    pub is_seen: bool,
}

/// A keyring as the store has it.
#[derive(Clone, Default)]
pub struct Record {
    lineage: String,
    pub generation: u64,
    pub keys: BTreeMap<u64, Kept>,
    pub drained: bool,
    /// The locations that have to show a key before it signs.
    pub probes: Vec<String>,
    /// In milliseconds.
    pub propagation: i64,
}

impl Record {
    pub fn parse(bytes: &[u8]) -> Result<Record, String> {
        let record: Envelope<'_> = serde_json::from_slice(bytes).map_err(|error| format!("no record: {error}"))?;
        let mut keys = BTreeMap::new();
        for entry in &record.body.keys {
            let id = id_of(&entry.kid).ok_or_else(|| format!("{} was never made", entry.kid))?;
            let state = State::of(&entry.state).ok_or_else(|| format!("a state {}", entry.state))?;
            let handle = entry.private.as_ref().map(|private| id_in(&private.handle));
            if handle.is_some_and(|handle| handle != Some(id)) {
                return Err(format!("{} has the handle of another key", entry.kid));
            }
            let (has_private, is_seen) = (entry.private.is_some(), entry.seen_at.is_some());
            keys.insert(entry.serial, Kept { id, state, early: entry.unpropagated, has_private, is_seen });
        }
        let (lineage, drained) = (record.lineage.into_owned(), record.body.drained);
        let Policy { issuer: Issuer { probes }, rotation: Rotation { propagation } } = record.body.policy;
        Ok(Record { lineage, generation: record.generation, keys, drained, probes, propagation })
    }

    pub fn active(&self) -> Option<KeyId> {
        self.keys.values().find(|key| key.state == State::Active).map(|key| key.id)
    }
}

/// A promotion that a write carried out.
#[derive(Clone, Copy, Debug)]
pub struct Promotion {
    pub to: KeyId,
    /// The former key was of another algorithm.
    pub changes_algorithm: bool,
    /// It signs for the first time, and not before everyone could see it.
    pub has_waited: bool,
}

/// Every keyring that was ever stored.
#[derive(Default)]
pub struct Records {
    stored: BTreeMap<Document, Record>,
    /// The key of each serial, by keyset and lineage.
    serials: BTreeMap<(Document, String, u64), KeyId>,
    /// Somebody asked for their revocation.
    pub condemned: BTreeSet<KeyId>,
    /// Somebody asked for the revocation of whatever there is.
    pub compromised: BTreeSet<Document>,
    /// In which generation of their keyset they were revoked, and when, of true time.
    pub revoked: BTreeMap<KeyId, (u64, i64)>,
    /// Sign before everyone could see them, and say so.
    pub early: BTreeSet<KeyId>,
    /// When somebody last asked for what may put such a key to work.
    pub emergencies: BTreeMap<Document, i64>,
    /// By keyset: how many there were, and when the last one was.
    pub promotions: BTreeMap<Document, (u64, i64)>,
    /// Somebody asked for their end.
    pub drains: BTreeSet<Document>,
    /// Those that have ended, and since which generation.
    pub drained: BTreeMap<Document, u64>,
    /// Somebody said that verifiers can follow a change of algorithm.
    pub confirmed: BTreeSet<Document>,
    /// Every key that ever signed.
    signed: BTreeSet<KeyId>,
    /// The key of each keyset that signed last.
    signed_last: BTreeMap<Document, KeyId>,
    /// Every key that was ever stored.
    pub known: BTreeSet<KeyId>,
}

impl Records {
    pub fn of(&self, document: &Document) -> Option<&Record> {
        self.stored.get(document)
    }

    pub fn all(&self) -> impl Iterator<Item = (&Document, &Record)> {
        self.stored.iter()
    }

    pub fn generation(&self, document: &Document) -> u64 {
        self.stored.get(document).map_or(0, |record| record.generation)
    }

    /// Whether keys of another algorithm than the one that signs wait.
    pub fn waits_for_a_word(&self, document: &Document) -> bool {
        let (Some(record), Some(last)) = (self.stored.get(document), self.signed_last.get(document)) else {
            return false;
        };
        let waits = |key: &Kept| matches!(key.state, State::Pending | State::Standby);
        record.keys.values().any(|key| waits(key) && pair(key.id).algorithm() != pair(*last).algorithm())
    }

    /// Keys that are published and do not sign yet.
    pub fn waiting(&self) -> impl Iterator<Item = KeyId> {
        let keys = self.stored.values().flat_map(|record| record.keys.values());
        keys.filter(|key| matches!(key.state, State::Pending | State::Standby)).map(|key| key.id)
    }

    /// Where the record of a key is, and what it says.
    pub fn find(&self, id: KeyId) -> Option<(&Document, Kept)> {
        self.stored
            .iter()
            .find_map(|(document, record)| record.keys.values().find(|key| key.id == id).map(|key| (document, *key)))
    }

    /// A replica wrote; what is wrong with that, or which key signs from now on.
    pub fn wrote(&mut self, document: &Document, bytes: &[u8], at: i64) -> Result<Option<Promotion>, String> {
        let next = Record::parse(bytes)?;
        let before = self.stored.insert(document.clone(), next.clone()).unwrap_or_default();
        if next.generation != before.generation + 1 {
            return Err(format!("{document}: generation {} follows {}", next.generation, before.generation));
        }
        for (serial, key) in &next.keys {
            self.judge_key(document, &next, &before, *serial, *key, at)?;
        }
        let lost = before.keys.iter().find(|(serial, key)| !key.state.has_ended() && !next.keys.contains_key(serial));
        if let Some((serial, key)) = lost {
            return Err(format!("{document}: serial {serial} vanishes while it is {:?}", key.state));
        }
        self.judge_end(document, &next, &before)?;
        self.judge_active(document, &next, &before, at)
    }

    /// An operator put an older history in the place of this one: what it says is taken as it is.
    pub fn begin_again(&mut self, document: &Document, bytes: &[u8], at: i64) -> Result<(), String> {
        let record = Record::parse(bytes)?;
        self.serials.retain(|(of, ..), _| of != document);
        for (serial, key) in &record.keys {
            self.known.insert(key.id);
            self.serials.insert((document.clone(), record.lineage.clone(), *serial), key.id);
            if key.state == State::Revoked {
                self.revoked.entry(key.id).or_insert((record.generation, at));
                self.emergencies.insert(document.clone(), at);
            }
        }
        if let Some(active) = record.active() {
            self.signed.insert(active);
            self.signed_last.insert(document.clone(), active);
        }
        self.drained.remove(document);
        if record.drained {
            self.drained.insert(document.clone(), record.generation);
        }
        self.stored.insert(document.clone(), record);
        Ok(())
    }

    /// Keysets end when somebody says so, and then nothing of them signs.
    fn judge_end(&mut self, document: &Document, next: &Record, before: &Record) -> Result<(), String> {
        if !next.drained {
            self.drained.remove(document);
            return Ok(());
        }
        if !before.drained {
            self.drained.insert(document.clone(), next.generation);
        }
        match next.active() {
            _ if !self.drains.contains(document) => Err(format!("{document}: it ends, and nobody asked for that")),
            Some(key) => Err(format!("{document}: key {key} signs for a keyset that is drained")),
            None => Ok(()),
        }
    }

    fn judge_key(
        &mut self,
        document: &Document,
        next: &Record,
        before: &Record,
        serial: u64,
        key: Kept,
        at: i64,
    ) -> Result<(), String> {
        self.known.insert(key.id);
        let place = (document.clone(), next.lineage.clone(), serial);
        if *self.serials.entry(place).or_insert(key.id) != key.id {
            return Err(format!("{document}: serial {serial} is stored a second time, as key {}", key.id));
        }
        let was = before.keys.get(&serial);
        // A key from elsewhere joins as what it can be, and one that is not wanted any more stays until its tokens expire.
        let is_relieved = was.is_some_and(|was| was.state == State::Standby) && key.state == State::Retiring;
        let may = is_earlier(key.id) && (was.is_none() || is_relieved);
        if !may && !may_become(was.map(|was| was.state), key.state) {
            return Err(format!("{document}: key {} goes from {was:?} to {:?}", key.id, key.state));
        }
        if was.is_some_and(|was| was.has_private && !key.has_private) && !key.state.has_ended() {
            return Err(format!("{document}: the private half of key {} is forgotten while it lives", key.id));
        }
        if key.state == State::Revoked && !self.revoked.contains_key(&key.id) {
            self.revoked.insert(key.id, (next.generation, at));
            if !self.condemned.contains(&key.id) && !self.compromised.contains(document) {
                return Err(format!("{document}: nobody asked for the revocation of key {}", key.id));
            }
        }
        Ok(())
    }

    fn judge_active(
        &mut self,
        document: &Document,
        next: &Record,
        before: &Record,
        at: i64,
    ) -> Result<Option<Promotion>, String> {
        let active: Vec<Kept> = next.keys.values().filter(|key| key.state == State::Active).copied().collect();
        let was = before.active();
        match active[..] {
            [] if was.is_some_and(|id| !self.revoked.contains_key(&id)) && !next.drained => {
                Err(format!("{document}: key {was:?} stops signing and nobody follows"))
            }
            [] => Ok(None),
            [key] if was == Some(key.id) => Ok(None),
            [key] => {
                let count = self.promotions.get(document).map_or(0, |(count, _)| *count);
                self.promotions.insert(document.clone(), (count + 1, at));
                // The first key of an issuer is early too, and nobody holds a document without it.
                let begins = self.signed.insert(key.id);
                if key.early && begins && count > 0 {
                    self.early.insert(key.id);
                    if self.emergencies.get(document).is_none_or(|last| at >= *last + EMERGENCY) {
                        return Err(format!("{document}: key {} signs early, and nobody asked for that", key.id));
                    }
                }
                let former = self.signed_last.insert(document.clone(), key.id);
                let changes = former.is_some_and(|former| pair(former).algorithm() != pair(key.id).algorithm());
                if changes && begins && !self.confirmed.remove(document) {
                    return Err(format!(
                        "{document}: key {} signs with another algorithm, and nobody confirmed it",
                        key.id
                    ));
                }
                let has_waited = begins && count > 0 && !key.early;
                Ok(Some(Promotion { to: key.id, changes_algorithm: changes, has_waited }))
            }
            _ => Err(format!("{document}: two keys sign")),
        }
    }
}

/// DESIGN §2.
fn may_become(was: Option<State>, is: State) -> bool {
    use State::{Active, Pending, Retired, Retiring, Revoked, Standby};
    let next: &[State] = match was {
        // Made, and not wanted any more by then.
        None => &[Pending, Retired],
        Some(Pending) => &[Standby, Active, Retired, Revoked],
        Some(Standby) => &[Active, Retired, Revoked],
        Some(Active) => &[Retiring, Revoked],
        Some(Retiring) => &[Active, Retired, Revoked],
        Some(Retired | Revoked) => &[],
    };
    was == Some(is) || next.contains(&is)
}
