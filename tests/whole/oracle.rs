//! What must hold whatever happened: exposures, the inventory of the KMS, and what everything comes to in the end.

use jwksd::store::Document;

use crate::account::CLEANUP_AFTER;
use crate::audience::Verdict;
use crate::history;
use crate::keys::{KeyId, is_earlier};
use crate::kms::{Entry, FOREIGN};
use crate::world::{RECOVERY, World};

/// When what is left over in an account of AWS KMS is gone, in milliseconds: old enough, and walked by.
const CLEANED_UP_AFTER: i64 = CLEANUP_AFTER.as_millis() * 5 / 4 + 2 * RECOVERY;

impl World {
    /// When the product said so, a revoked key is out of every cache of a verifier that forgets by itself.
    pub fn judge_exposure(&mut self, key: KeyId, revoked_at: i64) -> Result<(), String> {
        let now = self.now();
        // A replica that was cut off may have published the key for longer; it is a stated limit of the promise.
        if self.all_well_since + RECOVERY >= revoked_at || self.newest.is_some() {
            return Ok(());
        }
        // Where every keyset is drained no document is served that could take the place of those in caches.
        if !self.records.all().any(|(_, record)| record.keys.values().any(|key| !key.state.has_ended())) {
            return Ok(());
        }
        self.stats.exposures += 1;
        let accepted = self.with_audience(|audience, balancer| {
            (0..audience.verifiers.len()).find(|number| {
                let bounded = audience.classes[audience.verifiers[*number].class].forgets();
                bounded && audience.look_up(*number, key, now, balancer) == Verdict::Accepted
            })
        })?;
        match accepted.filter(|_| self.audience.failures == 0) {
            Some(number) => {
                let class = &self.audience.classes[self.audience.verifiers[number].class];
                Err(format!("verifier {number} ({class:?}) accepts the revoked key {key} after its exposure"))
            }
            None => Ok(()),
        }
    }

    /// Nothing is destroyed that lives, or is not ours.
    pub fn judge_kms(&mut self) -> Result<(), String> {
        if let Some(wrong) = self.common.kms.wrongs().pop() {
            return Err(wrong);
        }
        let now = self.now();
        for key in self.common.kms.destroyed() {
            if self.common.kms.is_foreign(key) {
                return Err(format!("somebody else's key {key} is destroyed"));
            }
            let Some((_, kept)) = self.records.find(key) else {
                if self.common.kms.is_account {
                    continue; // Made, and never claimed.
                }
                return Err(format!("key {key} is destroyed, and no record ever named it"));
            };
            let lives = self.lives_until.get(&key).is_some_and(|until| now < *until);
            if !kept.state.has_ended() || (lives && !self.records.revoked.contains_key(&key)) {
                return Err(format!("key {key} is destroyed while it is {:?}, its tokens live: {lives}", kept.state));
            }
        }
        Ok(())
    }

    /// After everything was right for a while: all agree, sign, rotate, and nothing is left over.
    pub fn judge_end(&mut self) -> Result<(), String> {
        let now = self.now();
        let every = self.setup.policies.iter().map(|policy| history::every(policy).as_millis()).max().unwrap();
        for seat in &self.seats {
            let Some(engine) = seat.engine() else { return Err(format!("{} does not run in the end", seat.name)) };
            for (document, record) in self.records.all() {
                let Document::Keyring(name) = document else { continue };
                let Some(cell) = engine.keyset(name.as_str()) else {
                    return Err(format!("{} lacks {name}", seat.name));
                };
                let snapshot = cell.snapshot.load();
                if let Some(why) = &snapshot.frozen {
                    return Err(format!("{} stays frozen: {why}", seat.name));
                }
                if snapshot.keyring.generation + 1 < record.generation {
                    let shown = snapshot.keyring.generation;
                    return Err(format!("{} shows generation {shown} of {}", seat.name, record.generation));
                }
            }
            let missing = [engine.missing_to_publish(), engine.missing_to_sign()].concat();
            if !missing.is_empty() {
                return Err(format!("{} is not ready in the end: {missing:?}", seat.name));
            }
        }
        let windows = self.setup.policies.iter().map(|policy| policy.visibility_window().as_millis()).max().unwrap();
        for (document, (_, at)) in &self.records.promotions {
            if now > at + every + windows + RECOVERY {
                return Err(format!("{document} was rotated last at {at}"));
            }
        }
        self.judge_probes()?;
        self.judge_inventory(now)
    }

    fn is_taken_by_an_import(&self, entry: &Entry) -> bool {
        let record = self.records.of(&Document::Keyring(entry.keyset.clone()));
        record.and_then(|record| record.keys.get(&entry.serial)).is_some_and(|kept| is_earlier(kept.id))
    }

    fn judge_inventory(&self, now: i64) -> Result<(), String> {
        let entries = self.common.kms.entries();
        for entry in &entries {
            if entry.keyset.as_str() == FOREIGN {
                if entry.destroyed {
                    return Err("somebody else's key was destroyed".to_owned());
                }
                continue;
            }
            let kept = self.records.find(entry.id).map(|(_, kept)| kept);
            let live_record = kept.is_some_and(|kept| !kept.state.has_ended());
            match (entry.destroyed, kept) {
                (true, _) if live_record => return Err(format!("key {} is gone and in use", entry.id)),
                (true, _) => {}
                _ if self.lost.contains(&entry.id) => {}
                (false, None) if entry.made_at <= self.lost_until => {}
                // Made before another algorithm was wanted for the same serial; its name is taken.
                (false, None) if entries.iter().any(|other| entry.is_twin_of(other)) => {}
                // An import took the serial while its answer was lost: nobody asks for it again.
                (false, None) if self.is_taken_by_an_import(entry) => {}
                (false, None) if self.common.kms.is_account && now < entry.made_at + CLEANED_UP_AFTER => {}
                (false, None) => {
                    return Err(format!(
                        "key {} (serial {}) of {} ms is left over",
                        entry.id, entry.serial, entry.made_at
                    ));
                }
                (false, Some(kept)) => {
                    let ended = self.ended_at.get(&entry.id).copied().filter(|_| kept.state.has_ended());
                    if ended.is_some_and(|ended| now > ended + 2 * RECOVERY) {
                        return Err(format!("key {} ended long ago and is not destroyed", entry.id));
                    }
                }
            }
        }
        Ok(())
    }
}
