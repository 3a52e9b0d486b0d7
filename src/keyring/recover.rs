//! Making one history of several: after a store was restored from an older copy, or two writers diverged.
//!
//! What anyone may hold a live token of stays published, what was revoked anywhere stays revoked, and the result names
//! the histories that it goes on from, so that replicas which saw one of them accept it.

use std::collections::BTreeSet;

use super::algorithm::Algorithm;
use super::change::NewKey;
use super::jwk::{Kid, PublicJwk};
use super::record::{Key, KeyState, Keyring, Origin, Revocation, Serial, Superseded};
use super::time::{Span, Timestamp};

/// A key that is being served, of which no record may be left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedKey {
    pub kid: Kid,
    pub algorithm: Algorithm,
    pub public: PublicJwk,
}

/// Who recovers, and for what.
#[derive(Clone, Debug)]
pub struct Recovery<'a> {
    /// Of the history that begins.
    pub lineage: String,
    pub actor: &'a str,
    pub reason: Option<&'a str>,
    pub now: Timestamp,
    /// What verifiers are served today, if that is known: a key that is not in it cannot sign at once.
    pub served: Option<&'a [ServedKey]>,
    /// The last generations that somebody saw, of whatever history.
    pub seen: &'a [Superseded],
}

/// A keyring made of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    pub keyring: Keyring,
    /// Which of the histories it goes on from.
    pub base: usize,
    /// Keys of other histories, or only of the served document, that stay published until their tokens have expired.
    pub kept: Vec<Kid>,
    /// Keys that are revoked because another history revoked them, or no longer served them.
    pub revoked: Vec<Kid>,
    /// Keys that must wait for propagation again, since verifiers may not be served them.
    pub waiting: Vec<Kid>,
    /// Private keys that nobody refers to any more: their serial is another key's. Their backend still has them.
    pub abandoned: Vec<Kid>,
}

/// Merges the histories of one keyset; `None` when there are none. The newest is gone on from: the one with the highest
/// generation, of these the one written last.
pub fn recover(histories: &[Keyring], recovery: &Recovery<'_>) -> Option<Recovered> {
    let base = (0..histories.len()).max_by_key(|&at| (histories[at].generation, histories[at].written_at))?;
    let mut merge = Merge::begin(histories, base, recovery);
    for (at, history) in histories.iter().enumerate() {
        if at != base {
            merge.take_revocations(history);
        }
    }
    for (at, history) in histories.iter().enumerate() {
        if at != base {
            history.keys.iter().for_each(|key| merge.take_key(key, history));
        }
    }
    match recovery.served {
        Some(served) => {
            served.iter().for_each(|key| merge.take_served(key));
            let newest = histories[base].generation;
            if recovery.seen.iter().any(|seen| seen.generation > newest) {
                merge.revoke_unserved(served);
            }
            merge.distrust(|key| served.iter().any(|served| served.public == key.public));
        }
        None => {
            let shows = |history: &Keyring, key: &Key| history.published().any(|shown| shown.public == key.public);
            // The one that signs goes on: whether anybody was served without it is not known.
            merge.distrust(|key| key.state == KeyState::Active || histories.iter().all(|history| shows(history, key)));
        }
    }
    Some(merge.end(histories))
}

struct Merge<'a> {
    recovery: &'a Recovery<'a>,
    result: Recovered,
    /// The longest overlap of any history: nobody knows which of them a token was signed under.
    overlap: Span,
    ttl_bound: Span,
}

impl<'a> Merge<'a> {
    fn begin(histories: &[Keyring], base: usize, recovery: &'a Recovery<'a>) -> Self {
        let chosen = &histories[base];
        let mut keyring = chosen.next(recovery.now);
        keyring.born.get_or_insert_with(|| chosen.lineage.clone());
        keyring.lineage = recovery.lineage.clone();
        let known = histories.iter().map(|history| history.generation);
        let seen = recovery.seen.iter().map(|seen| seen.generation);
        keyring.generation = known.chain(seen).max().unwrap_or(0) + 1;
        keyring.next_serial = histories.iter().map(|history| history.next_serial).max().unwrap_or(1);
        keyring.journal.next_seq = histories.iter().map(|history| history.journal.next_seq).max().unwrap_or(0);
        let overlaps = histories.iter().flat_map(|history| history.keys.iter().map(|key| history.overlap_of(key)));
        let overlap = overlaps.chain(histories.iter().map(|history| history.policy.overlap())).max();
        let bounds = histories.iter().flat_map(|history| history.keys.iter().map(|key| key.ttl_bound));
        let ttl_bound = bounds.chain(histories.iter().map(|history| history.policy.tokens.max_ttl)).max();
        Merge {
            recovery,
            result: Recovered {
                keyring,
                base,
                kept: Vec::new(),
                revoked: Vec::new(),
                waiting: Vec::new(),
                abandoned: Vec::new(),
            },
            overlap: overlap.unwrap_or_default(),
            ttl_bound: ttl_bound.unwrap_or_default(),
        }
    }

    fn take_revocations(&mut self, history: &Keyring) {
        let known: BTreeSet<String> = self.result.keyring.banned.iter().cloned().collect();
        for theirs in history.keys.iter().filter(|key| key.state == KeyState::Revoked) {
            let same = |ours: &Key| ours.kid == theirs.kid || ours.public == theirs.public;
            match self.result.keyring.keys.iter().position(same) {
                Some(at) => self.revoke(at, theirs.revocation.clone()),
                None if self.result.keyring.has_revoked(&theirs.kid, &theirs.public) => {}
                None => self.append(theirs, history, KeyState::Revoked),
            }
        }
        let fresh: Vec<String> = history.banned.iter().filter(|banned| !known.contains(*banned)).cloned().collect();
        let banned = |key: &Key| {
            let thumbprint = key.public.thumbprint();
            fresh.iter().any(|text| text == key.kid.as_str() || text == thumbprint.as_str())
        };
        for at in 0..self.result.keyring.keys.len() {
            if banned(&self.result.keyring.keys[at]) {
                self.revoke(at, None);
            }
        }
        self.result.keyring.banned.extend(fresh);
    }

    fn revoke(&mut self, at: usize, revocation: Option<Revocation>) {
        let Recovery { actor, reason, now, .. } = *self.recovery;
        let key = &mut self.result.keyring.keys[at];
        if key.state == KeyState::Revoked {
            return;
        }
        key.state = KeyState::Revoked;
        key.entered_at = now;
        key.revocation = revocation.or_else(|| {
            let reason = reason.unwrap_or("recovered").to_owned();
            Some(Revocation { reason, actor: actor.to_owned(), at: now })
        });
        self.result.revoked.push(key.kid.clone());
    }

    /// A key of another history: whatever state it had, from now on it is only verified with.
    fn take_key(&mut self, theirs: &Key, history: &Keyring) {
        let same = |ours: &Key| ours.kid == theirs.kid || ours.public == theirs.public;
        if let Some(at) = self.result.keyring.keys.iter().position(same) {
            self.join(at, theirs);
        } else if self.result.keyring.has_revoked(&theirs.kid, &theirs.public) {
            // It stays so.
        } else if theirs.state.is_published() {
            self.append(theirs, history, KeyState::Retiring);
            self.result.kept.push(theirs.kid.clone());
        } else if theirs.private.is_some() {
            // Its private half is still to be destroyed.
            self.append(theirs, history, theirs.state);
        }
    }

    /// A key of both: its tokens may be as long as either allowed, and as late as either signed.
    fn join(&mut self, at: usize, theirs: &Key) {
        let (now, until) = (self.recovery.now, self.recovery.now + self.overlap);
        let ours = &mut self.result.keyring.keys[at];
        ours.ttl_bound = ours.ttl_bound.max(theirs.ttl_bound);
        ours.overlap_bound = ours.overlap_bound.max(theirs.overlap_bound);
        ours.published_until = ours.published_until.max(theirs.published_until);
        let signs_there = theirs.state == KeyState::Active;
        if signs_there && matches!(ours.state, KeyState::Retiring | KeyState::Retired) {
            if ours.state == KeyState::Retired {
                ours.state = KeyState::Retiring;
                ours.entered_at = now;
                ours.since_generation = self.result.keyring.generation;
            }
            ours.published_until = ours.published_until.max(Some(until));
            self.result.kept.push(ours.kid.clone());
        }
    }

    fn append(&mut self, theirs: &Key, history: &Keyring, state: KeyState) {
        let (now, until) = (self.recovery.now, self.recovery.now + self.overlap);
        let keyring = &mut self.result.keyring;
        let taken = keyring.key(theirs.serial).is_some();
        let serial = if taken { next_serial(keyring) } else { theirs.serial };
        let mut key = Key { serial, state, entered_at: now, since_generation: keyring.generation, ..theirs.clone() };
        let bound = taken || history.key_lineage() != keyring.key_lineage();
        if bound && key.private.take().is_some() {
            // What it is bound to names another serial or history.
            self.result.abandoned.push(key.kid.clone());
        }
        if state == KeyState::Retiring {
            key.published_until = key.published_until.max(Some(until));
            key.demoted_at = Some(now);
            key.stopped_at = Some(now);
            key.ttl_bound = key.ttl_bound.max(self.ttl_bound);
            key.overlap_bound = key.overlap_bound.max(self.overlap);
        }
        keyring.keys.push(key);
    }

    fn take_served(&mut self, served: &ServedKey) {
        let keyring = &self.result.keyring;
        let known = keyring.keys.iter().any(|ours| ours.kid == served.kid || ours.public == served.public);
        if known || keyring.has_revoked(&served.kid, &served.public) {
            return;
        }
        let (now, until) = (self.recovery.now, self.recovery.now + self.overlap);
        let new = NewKey {
            kid: served.kid.clone(),
            algorithm: served.algorithm,
            public: served.public.clone(),
            private: None,
        };
        let key = self.result.keyring.push(&new, KeyState::Retiring, Origin::Imported, now);
        key.published_at = Some(now);
        key.published_until = Some(until);
        key.demoted_at = Some(now);
        key.stopped_at = Some(now);
        self.result.kept.push(served.kid.clone());
    }

    /// What is not served any more although somebody saw a newer record was revoked there, or ended.
    fn revoke_unserved(&mut self, served: &[ServedKey]) {
        for at in 0..self.result.keyring.keys.len() {
            let key = &self.result.keyring.keys[at];
            if key.state.is_published() && !served.iter().any(|served| served.public == key.public) {
                self.revoke(at, None);
            }
        }
    }

    /// Keys that verifiers may not be served begin to be published now.
    fn distrust(&mut self, is_shown: impl Fn(&Key) -> bool) {
        let now = self.recovery.now;
        let keyring = &mut self.result.keyring;
        let mut signs = true;
        for key in &mut keyring.keys {
            let waits = matches!(key.state, KeyState::Active | KeyState::Standby | KeyState::Pending);
            if !waits || is_shown(key) {
                continue;
            }
            signs &= key.state != KeyState::Active;
            key.state = KeyState::Pending;
            key.entered_at = now;
            key.published_at = None;
            key.seen_at = None;
            key.since_generation = keyring.generation;
            self.result.waiting.push(key.kid.clone());
        }
        if !signs {
            // As a keyset without history: the first that was published for propagation signs.
            keyring.first = false;
            keyring.last_promotion_at = None;
        }
    }

    fn end(mut self, histories: &[Keyring]) -> Recovered {
        let Recovery { actor, reason, now, .. } = *self.recovery;
        let keyring = &mut self.result.keyring;
        keyring.keys.sort_by_key(|key| key.serial);
        let former = histories
            .iter()
            .map(|history| Superseded { lineage: history.lineage.clone(), generation: history.generation });
        let earlier = histories.iter().flat_map(|history| history.supersedes.iter().cloned());
        let mut supersedes: Vec<Superseded> = Vec::new();
        for one in former.chain(earlier).chain(self.recovery.seen.iter().cloned()) {
            match supersedes.iter_mut().find(|known| known.lineage == one.lineage) {
                Some(known) => known.generation = known.generation.max(one.generation),
                None => supersedes.push(one),
            }
        }
        keyring.supersedes = supersedes;
        self.result.kept.retain(|kid| !self.result.revoked.contains(kid));
        let kids: BTreeSet<Kid> = self.result.kept.iter().chain(&self.result.revoked).cloned().collect();
        let detail = format!("of {} histories", histories.len());
        keyring.note(now, "recovered", actor, reason, kids, Some(detail));
        keyring.tidy(now);
        self.result
    }
}

fn next_serial(keyring: &mut Keyring) -> Serial {
    keyring.next_serial += 1;
    keyring.next_serial - 1
}

#[cfg(test)]
mod tests;
