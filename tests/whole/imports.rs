//! Keys of issuers that were there before: what an operator brings along, and the tokens that these issuers signed, which
//! verifiers go on accepting until they expire.

use std::collections::BTreeMap;

use jwksd::backend::material::PrivateKeyMaterial;
use jwksd::engine::{Engine, KeysetCell};
use jwksd::keyring::change::NewKey;
use jwksd::keyring::decide::{ImportedKey, Intent, Request};
use jwksd::keyring::time::Span;
use jwksd::store::Document;
use std::sync::Arc;

use crate::history::every;
use crate::keys::{KeyId, earlier, pair};
use crate::life::BEGINNING;
use crate::world::{Note, World};

/// Tokens of an earlier issuer that are followed.
const TOKENS: u64 = 6;

/// An issuer that was there before.
pub struct Earlier {
    /// It signs elsewhere until then, and the last token expires so much later, in milliseconds.
    stops: i64,
    life: i64,
    /// Only the public half is brought along, and stays until then.
    until: Option<i64>,
    /// It was stored.
    is_here: bool,
}

pub type Imports = BTreeMap<KeyId, Earlier>;

/// Who came before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Import {
    pub seat: usize,
    pub number: usize,
    pub is_private: bool,
    /// How long its tokens live, in milliseconds.
    pub life: i64,
    /// For how long it signs on elsewhere.
    pub overlaps: i64,
}

impl World {
    /// An operator brings a key along, or tries to again.
    pub fn import(&mut self, import: Import) {
        let (now, key) = (self.now(), earlier(import.number));
        let seat = import.seat % self.seats.len();
        let keyset = self.keyset_of(import.seat);
        let Some((engine, cell)) = self.seats[seat].engine().cloned().zip(self.seats[seat].cell(keyset)) else {
            return;
        };
        // Whoever has the private half signs no more before it is here.
        let overlaps = if import.is_private { 0 } else { import.overlaps };
        let (stops, life) = (now + overlaps, import.life);
        // By the clocks of verifiers, and of whoever removes it.
        let until = (!import.is_private).then_some(stops + life + 2 * self.setup.ahead_max);
        let earlier = self.imports.entry(key).or_insert(Earlier { stops, life, until, is_here: false });
        if import.is_private {
            // It signed until just now, as far as nobody has it yet.
            if !earlier.is_here {
                earlier.stops = now;
            }
            self.records.emergencies.insert(World::document(keyset), now);
        }
        let until = earlier.until.map(|until| BEGINNING + Span::from_millis(until));
        let pair = pair(key);
        let new =
            NewKey { kid: pair.kid.clone(), algorithm: pair.algorithm(), public: pair.public.clone(), private: None };
        let imported =
            ImportedKey { key: new, ttl_bound: Span::from_millis(life), published_since: None, published_until: until };
        let from = self.source(seat, keyset);
        let (actor, reason) = ("sim".to_owned(), Some("it was there before".to_owned()));
        let intent = Intent::Import(Box::new(imported));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        let notes = self.notes.clone();
        self.stats.imports += 1;
        tokio::spawn(async move {
            let answer = ask(&engine, &cell, request, import.is_private.then_some(key)).await;
            notes.lock().unwrap().push(Note::Answer { from, what: format!("import of key {key}"), answer });
        });
    }

    /// Somebody finds that an earlier issuer's key leaked.
    pub fn revoke_earlier(&mut self, seat: usize, number: usize) {
        let key = earlier(number);
        let Some((document, _)) = self.records.find(key) else { return };
        let keys = self.records.of(document).map(|record| record.keys.clone()).unwrap_or_default();
        if let Some((serial, _)) = keys.iter().find(|(_, kept)| kept.id == key) {
            self.operate(seat, Intent::Revoke { serial: *serial });
        }
    }

    /// What earlier issuers signed is shown to verifiers of this one once they could see the key.
    pub fn follow_earlier(&mut self, document: &Document) {
        let Some(record) = self.records.of(document) else { return };
        let keys: Vec<KeyId> = record.keys.values().map(|kept| kept.id).collect();
        let now = self.now();
        let waits = self.setup.policies.iter().map(|policy| policy.rotation.propagation.as_millis()).max().unwrap();
        let widest = self.setup.policies.iter().map(|policy| every(policy).as_millis()).max().unwrap();
        for key in keys {
            let Some(earlier) = self.imports.get_mut(&key).filter(|earlier| !earlier.is_here) else { continue };
            earlier.is_here = true;
            let (stops, life) = (earlier.stops, earlier.life);
            let begin = (stops - widest).min(now);
            for number in 0..TOKENS {
                let span = (stops - begin).max(1).unsigned_abs();
                // The last of them at the last moment, which tokens count in seconds.
                let back = if number == 0 { 0 } else { i64::try_from(self.importing.below(span)).unwrap() };
                let issued = (BEGINNING.as_millis() + stops - back).div_euclid(1000);
                self.present_earlier(key, (issued, issued + life / 1000), now + waits + 2 * self.setup.ahead_max);
            }
        }
    }

    /// An import that was answered is stored, and what is stored of it is what was brought.
    pub fn judge_import(&self, name: &str, answered: &[KeyId]) -> Result<(), String> {
        match answered.iter().find(|key| self.imports.get(key).is_some_and(|earlier| !earlier.is_here)) {
            Some(key) => Err(format!("{name} answers the import of key {key}, which is not stored")),
            None => Ok(()),
        }
    }
}

async fn ask(
    engine: &Arc<Engine>,
    cell: &Arc<KeysetCell>,
    request: Request,
    private: Option<KeyId>,
) -> Result<jwksd::keyring::decide::Outcome, String> {
    let answer = match private {
        None => engine.command(cell, request).await,
        Some(key) => {
            let material = PrivateKeyMaterial::from_pkcs8_der(&pair(key).private_key_info()).unwrap();
            engine.import(cell, request, material).await
        }
    };
    answer.map_err(|error| error.to_string())
}
