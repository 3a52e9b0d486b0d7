//! Finding keys that a crash left behind: made by us, never claimed.
//!
//! What may be deleted is narrow. A key counts as a leftover only if its tags name this installation, one of its
//! keysets and that keyset's lineage; its nonce carries a code that only this installation's secret makes, over the
//! time at which the key was indeed made; no other key has that nonce; it has no alias; no keyring names it; and it is
//! older than `cleanup_after` (24 h), whereas a maker gives a key up that it could not claim within half of that. So a
//! copy of the store that runs beside the original can delete nothing the original is making or using, and in the first
//! 24 h after a lineage began there is nothing old enough to delete.
//!
//! The keys of the account are walked through page by page, in several passes where there are many; only at the end of
//! the walk, when all nonces are known, anything is deleted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::sync::Mutex;

use super::AwsKmsBackend;
use super::creation::{Claimed, Creation};
use super::error::failed;
use super::handle::arn_in;
use crate::aws_kms::{KeyState, KmsError, KmsErrorKind};
use crate::backend::BackendError;
use crate::keyring::name::Name;
use crate::keyring::record::Keyring;
use crate::keyring::time::{Span, Timestamp};

/// What belongs to this installation.
#[derive(Clone, Debug, Default)]
pub struct Owned {
    lineages: BTreeMap<Name, String>,
    /// ARNs that keyrings name.
    referenced: BTreeSet<String>,
}

impl Owned {
    /// Notes a keyring, whatever its backend is now.
    pub fn add(&mut self, keyring: &Keyring) {
        self.lineages.insert(keyring.keyset.clone(), keyring.key_lineage().to_owned());
        let handles = keyring.keys.iter().filter_map(|key| key.private.as_ref());
        self.referenced.extend(handles.filter_map(|private| arn_in(&private.handle)).map(str::to_owned));
    }

    pub(super) fn lineage_of(&self, keyset: &str) -> Option<&str> {
        self.lineages.iter().find(|(name, _)| name.as_str() == keyset).map(|(_, lineage)| lineage.as_str())
    }
}

/// What a clean-up found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CleanUp {
    /// Keys looked at.
    pub examined: usize,
    /// Leftovers scheduled for deletion.
    pub scheduled: usize,
    /// Leftovers that are too young yet.
    pub young: usize,
    /// Keys passed over because a call about them failed.
    pub failed: usize,
}

/// What is known of the account, between clean-ups.
pub(super) type Walk = Mutex<Walked>;

/// How far the walk through the account has come, and what it found.
#[derive(Default)]
pub(super) struct Walked {
    /// Where the next clean-up goes on; `None`: at the beginning.
    marker: Option<String>,
    /// The nonces of this walk, with the key that has each.
    nonces: HashMap<String, Owner>,
    /// What earlier walks found out, by ARN, so that each key is asked about once. Where an account has more keys, some
    /// are asked about again.
    known: HashMap<String, Known>,
}

/// Who has a nonce.
enum Owner {
    One {
        arn: String,
        ours: bool,
    },
    /// Somebody copied tags. Which key is the copy may be clear by their dates, and is not worth an error.
    Several,
}

enum Known {
    /// Nothing of ours.
    Foreign,
    /// Made by us: its nonce.
    Ours(String),
    /// Made by us, and nothing is left to do about it: its nonce.
    Ended(String),
    /// Its tags said nothing when it was first seen, which may be because they are not visible yet.
    Mute { since: Timestamp },
}

/// Keys remembered.
const KNOWN_MAX: usize = 20_000;

/// After this long without tags of ours, a key is not ours.
const VISIBLE_AFTER: Span = Span::DAY;

/// So many calls that fail one after the other say that the service is away, not that a key is strange.
const FAILURES_MAX: usize = 5;

/// Keys examined in one clean-up; the rest is for the next one.
const EXAMINED_MAX: usize = 2_000;

/// Pages read in one clean-up.
const PAGES_MAX: usize = 500;

/// The longest pause between two keys: the service's quotas are shared with everybody in the account.
const PAUSE_MAX: Duration = Duration::from_millis(200);

impl Walked {
    fn note(&mut self, arn: &str, known: Known) {
        if self.known.len() >= KNOWN_MAX {
            self.known.clear();
        }
        self.known.insert(arn.to_owned(), known);
    }

    /// Notes who has a nonce in this walk; `ours`: something may be left to do about the key.
    fn meet(&mut self, found: &str, nonce: &str, ours: bool) {
        match self.nonces.get_mut(nonce) {
            Some(Owner::One { arn, .. }) if arn == found => {}
            Some(owner) => *owner = Owner::Several,
            None => _ = self.nonces.insert(nonce.to_owned(), Owner::One { arn: found.to_owned(), ours }),
        }
    }
}

impl AwsKmsBackend {
    /// Waits until a creation failed, which may have left something behind.
    pub async fn creation_failed(&self) {
        self.unsettled.notified().await;
    }

    /// How old a leftover must be.
    pub fn cleanup_after(&self) -> Span {
        self.cleanup_after
    }

    /// Looks at more of the account's keys and, when it has seen them all, schedules leftovers for deletion. Slow, and
    /// no request waits for it. A key whose call fails is passed over; the next walk comes by again.
    ///
    /// # Errors
    /// A page that could not be read, or several calls in a row that failed; what was found before it is done.
    pub async fn clean_up(&self, installation: &str, owned: &Owned, now: Timestamp) -> Result<CleanUp, BackendError> {
        // Without the secret nothing can be told to be ours, and keyrings may not be authenticated yet.
        if self.proof.prove(&[b"is the secret at hand?"]).is_none() {
            return Ok(CleanUp::default());
        }
        let mut walk = self.walk.lock().await;
        let mut done = CleanUp::default();
        let mut patience = Patience::default();
        for _ in 0..PAGES_MAX {
            let page = match self.api.list_keys(walk.marker.as_deref()).await {
                Ok(page) => page,
                Err(error) => {
                    // Markers are not kept for ever: the next walk begins anew.
                    if !error.kind.is_transient() {
                        (walk.marker, walk.nonces) = (None, HashMap::new());
                    }
                    return Err(failed("clean_up", error));
                }
            };
            for arn in page.items {
                let looked = self.look(&arn, installation, owned, now, &mut walk, &mut done).await;
                patience.bear(&arn, looked, &mut done)?;
            }
            walk.marker = page.next;
            if walk.marker.is_none() {
                let nonces = std::mem::take(&mut walk.nonces);
                self.delete_leftovers(nonces, owned, now, &mut walk, &mut done).await?;
                break;
            }
            if done.examined >= EXAMINED_MAX {
                break;
            }
        }
        Ok(done)
    }

    /// Finds out whether a key is ours, unless that is known.
    async fn look(
        &self,
        arn: &str,
        installation: &str,
        owned: &Owned,
        now: Timestamp,
        walk: &mut Walked,
        done: &mut CleanUp,
    ) -> Result<(), KmsError> {
        let since = match walk.known.get(arn) {
            Some(Known::Foreign) => return Ok(()),
            Some(known @ (Known::Ours(nonce) | Known::Ended(nonce))) => {
                let (nonce, ours) = (nonce.clone(), matches!(known, Known::Ours(_)));
                walk.meet(arn, &nonce, ours);
                return Ok(());
            }
            Some(Known::Mute { since }) => *since,
            None => now,
        };
        done.examined += 1;
        tokio::time::sleep((self.cleanup_after.to_std() / 100_000).min(PAUSE_MAX)).await;
        let tags = match self.api.list_resource_tags(arn, None).await {
            Ok(page) => page.items,
            // Keys of others may be closed to us, or vanish meanwhile; so may ours be that were just made.
            Err(error) if matches!(error.kind, KmsErrorKind::Denied | KmsErrorKind::NotFound) => Vec::new(),
            Err(error) => return Err(error),
        };
        let known = match Creation::claimed(installation, &tags) {
            Claimed::Foreign => Known::Foreign,
            Claimed::Creation(made) if made.is_signed(&*self.proof) => {
                let ours = owned.lineage_of(&made.keyset) == Some(made.lineage.as_str());
                walk.meet(arn, made.nonce(), ours);
                let nonce = made.nonce().to_owned();
                if ours { Known::Ours(nonce) } else { Known::Ended(nonce) }
            }
            // Copied tags never prove anything, and a data key that `jwksd reseal` dropped is gone for good.
            Claimed::Creation(_) => {
                tracing::info!(
                    key = arn,
                    "a key has this installation's tags, and nothing proves that it made the key; clean-up leaves it alone"
                );
                Known::Foreign
            }
            Claimed::Nothing if now.since(since) >= VISIBLE_AFTER => Known::Foreign,
            Claimed::Nothing => Known::Mute { since },
        };
        walk.note(arn, known);
        Ok(())
    }

    /// Schedules what is left over among the keys of the walk that ended.
    async fn delete_leftovers(
        &self,
        nonces: HashMap<String, Owner>,
        owned: &Owned,
        now: Timestamp,
        walk: &mut Walked,
        done: &mut CleanUp,
    ) -> Result<(), BackendError> {
        let mut left_over = BTreeMap::new();
        for (nonce, owner) in nonces {
            match owner {
                Owner::One { arn, ours } if ours && !owned.referenced.contains(&arn) => {
                    left_over.insert(arn, nonce);
                }
                Owner::One { .. } => {}
                Owner::Several => {
                    tracing::warn!(nonce, "several keys have the same tags of ours; clean-up leaves all of them alone");
                }
            }
        }
        let mut patience = Patience::default();
        for (arn, nonce) in left_over {
            match self.end(&arn, now, done).await {
                Ok(ended) => {
                    if ended {
                        walk.note(&arn, Known::Ended(nonce));
                    }
                    patience.bear(&arn, Ok(()), done)?;
                }
                // The next ones may be allowed: those that are not must not keep the others for good.
                Err(error) if error.kind == KmsErrorKind::Denied => Patience::default().bear(&arn, Err(error), done)?,
                Err(error) => patience.bear(&arn, Err(error), done)?,
            }
        }
        Ok(())
    }

    /// Schedules a key of ours for deletion if it is a leftover. Whether nothing is left to do about it.
    async fn end(&self, arn: &str, now: Timestamp, done: &mut CleanUp) -> Result<bool, KmsError> {
        let key = self.api.describe_key(arn).await?;
        if key.state == KeyState::PendingDeletion {
            return Ok(true);
        }
        let tags = self.api.list_resource_tags(arn, None).await?.items;
        let Some(made) = Creation::read(&tags) else { return Ok(false) };
        let Some(age) = key.created_at.map(|at| now.since(at)) else { return Ok(false) };
        if !made.is_signed(&*self.proof) || !made.fits(&key) {
            tracing::warn!(key = arn, "a key has the tags of another key of ours; clean-up leaves it alone");
            return Ok(true);
        }
        let aliases = self.api.list_aliases(arn, None).await?;
        if !aliases.items.is_empty() || aliases.next.is_some() {
            return Ok(false);
        }
        // The service's clock made the date and ours judges it: hours lie between the two limits.
        if age < self.cleanup_after {
            done.young += 1;
            return Ok(false);
        }
        match self.api.schedule_key_deletion(arn, self.deletion_window_days).await {
            Ok(()) => {}
            Err(error) if error.kind == KmsErrorKind::NotFound => return Ok(true),
            Err(error) => return Err(error),
        }
        done.scheduled += 1;
        tracing::warn!(
            key = arn,
            "a key that a crash left behind, without alias and in no keyring, is scheduled for deletion"
        );
        Ok(true)
    }
}

/// Passes over keys whose calls fail, until it is the service that fails.
#[derive(Default)]
struct Patience {
    in_a_row: usize,
}

impl Patience {
    fn bear(&mut self, arn: &str, looked: Result<(), KmsError>, done: &mut CleanUp) -> Result<(), BackendError> {
        let Err(error) = looked else {
            self.in_a_row = 0;
            return Ok(());
        };
        done.failed += 1;
        self.in_a_row += 1;
        if self.in_a_row >= FAILURES_MAX {
            return Err(failed("clean_up", error));
        }
        tracing::warn!(key = arn, error = %error, "clean-up passes over a key");
        Ok(())
    }
}
