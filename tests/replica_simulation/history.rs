//! What the store has held, judged by what DESIGN says of it and by nothing of the product: records are read as JSON.

use std::collections::{HashMap, HashSet};

use jwksd::keyring::time::{Span, Timestamp};
use jwksd::store::Document;
use serde_json::Value;

/// An emergency that no replica could carry on with may last for so long.
const EMERGENCY: Span = Span::from_secs(180);

/// Every keyring that was ever stored.
#[derive(Default)]
pub struct History {
    stored: HashMap<Document, Record>,
    /// The key of each serial, by keyset and lineage.
    serials: HashMap<(Document, String, u64), String>,
    /// Somebody asked for their revocation.
    pub condemned: HashSet<String>,
    /// Somebody asked for the revocation of whatever there is.
    pub compromised: HashSet<Document>,
    /// Were revoked in the store at some time.
    pub revoked: HashSet<String>,
    /// Say of themselves that they sign before everyone could see them.
    pub early: HashSet<String>,
    /// When somebody last asked for what may put such a key to work.
    pub emergencies: HashMap<Document, Timestamp>,
    /// By keyset: how many there were, and when the last one was.
    pub promotions: HashMap<Document, (u64, Timestamp)>,
}

#[derive(Clone, Default)]
struct Record {
    lineage: String,
    generation: u64,
    keys: HashMap<u64, (String, String)>,
}

impl Record {
    fn of(bytes: &[u8]) -> Record {
        let record: Value = serde_json::from_slice(bytes).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let keys = record["body"]["keys"].as_array().unwrap().iter();
        let keys = keys.map(|key| (key["serial"].as_u64().unwrap(), (text(&key["kid"]), text(&key["state"]))));
        let generation = record["generation"].as_u64().unwrap();
        Record { lineage: text(&record["lineage"]), generation, keys: keys.collect() }
    }

    fn active(&self) -> Vec<&String> {
        self.keys.values().filter(|(_, state)| state == "active").map(|(kid, _)| kid).collect()
    }
}

impl History {
    pub fn documents(&self) -> Vec<Document> {
        self.stored.keys().cloned().collect()
    }

    pub fn generation(&self, document: &Document) -> u64 {
        self.stored.get(document).map_or(0, |record| record.generation)
    }

    /// Whether a key signs, as the store has it.
    pub fn has_active(&self, document: &Document) -> bool {
        self.stored.get(document).is_some_and(|record| !record.active().is_empty())
    }

    /// Another copy was put in the place of what was stored.
    pub fn replaced(&mut self, document: &Document, bytes: &[u8]) {
        self.stored.insert(document.clone(), Record::of(bytes));
    }

    /// A replica wrote; what is wrong with that.
    pub fn wrote(&mut self, document: &Document, bytes: &[u8], at: Timestamp) -> Result<(), String> {
        let next = Record::of(bytes);
        let before = self.stored.insert(document.clone(), next.clone()).unwrap_or_default();
        if next.generation != before.generation + 1 {
            return Err(format!("{document}: generation {} follows {}", next.generation, before.generation));
        }
        for (serial, (kid, state)) in &next.keys {
            let id = (document.clone(), next.lineage.clone(), *serial);
            if self.serials.entry(id).or_insert_with(|| kid.clone()) != kid {
                return Err(format!("{document}: serial {serial} is stored a second time, as {kid}"));
            }
            let was = before.keys.get(serial).map_or("none", |(_, state)| state.as_str());
            if !may_become(was, state) {
                return Err(format!("{document}: {kid} goes from {was} to {state}"));
            }
            if state == "revoked" {
                self.revoked.insert(kid.clone());
                if !self.condemned.contains(kid) && !self.compromised.contains(document) {
                    return Err(format!("{document}: nobody asked for the revocation of {kid}"));
                }
            }
        }
        let lost = before.keys.iter().find(|(serial, (_, state))| {
            !matches!(state.as_str(), "retired" | "revoked") && !next.keys.contains_key(serial)
        });
        if let Some((serial, (kid, state))) = lost {
            return Err(format!("{document}: {kid} ({serial}) vanishes while it is {state}"));
        }
        let was = before.active().first().map(|kid| (*kid).clone());
        match next.active()[..] {
            [] if was.as_ref().is_some_and(|kid| !self.revoked.contains(kid)) => {
                Err(format!("{document}: {was:?} stops signing and nobody follows"))
            }
            [] => Ok(()),
            [kid] => {
                if was.as_ref() == Some(kid) {
                    return Ok(());
                }
                let count = self.promotions.get(document).map_or(0, |(count, _)| *count);
                self.promotions.insert(document.clone(), (count + 1, at));
                if is_early(bytes, kid) && self.early.insert(kid.clone()) && count > 0 {
                    let recent = self.emergencies.get(document).is_some_and(|last| at < *last + EMERGENCY);
                    let unasked = || format!("{document}: {kid} signs early, and nobody asked for that");
                    return if recent { Ok(()) } else { Err(unasked()) };
                }
                Ok(())
            }
            _ => Err(format!("{document}: two keys sign")),
        }
    }
}

fn is_early(bytes: &[u8], kid: &str) -> bool {
    let record: Value = serde_json::from_slice(bytes).unwrap();
    record["body"]["keys"].as_array().unwrap().iter().any(|key| key["kid"] == kid && key["unpropagated"] == true)
}

/// DESIGN §2.
fn may_become(was: &str, is: &str) -> bool {
    let next: &[&str] = match was {
        "none" => &["pending"],
        "pending" => &["standby", "active", "retired", "revoked"],
        "standby" => &["active", "retired", "revoked"],
        "active" => &["retiring", "revoked"],
        "retiring" => &["active", "retired", "revoked"],
        _ => &[],
    };
    was == is || next.contains(&is)
}
