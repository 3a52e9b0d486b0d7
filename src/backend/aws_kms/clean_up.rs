//! Finding keys that a crash left behind: made by us, never claimed.
//!
//! What may be deleted is narrow. A key counts as a leftover only if its tags name this installation, one of its
//! keysets and that keyset's lineage; its nonce carries a code that only this installation's secret makes; it has no
//! alias; no keyring names it; and it is older than `cleanup_after` (24 h), whereas a maker gives a key up that it could
//! not claim within half of that. So a copy of the store that runs beside the original can delete nothing the original
//! is making or using, and in the first 24 h after a lineage began there is nothing old enough to delete.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::AwsKmsBackend;
use super::error::failed;
use super::handle::arn_in;
use crate::aws_kms::{KeyState, KmsErrorKind};
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
        self.lineages.insert(keyring.keyset.clone(), keyring.lineage.clone());
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
}

/// Keys whose tags say that they are not ours, so that each is asked about once. Where an account has more, some are
/// asked about again.
#[derive(Default)]
pub(super) struct Seen(Mutex<HashSet<String>>);

/// Keys remembered as not ours.
const SEEN_MAX: usize = 20_000;

/// Keys examined in one clean-up; the rest is for the next one.
const EXAMINED_MAX: usize = 2_000;

/// Pages read in one clean-up.
const PAGES_MAX: usize = 500;

/// The longest pause between two keys: the service's quotas are shared with everybody in the account.
const PAUSE_MAX: Duration = Duration::from_millis(200);

impl Seen {
    fn contains(&self, arn: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(arn)
    }

    fn note(&self, arn: &str) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= SEEN_MAX {
            seen.clear();
        }
        seen.insert(arn.to_owned());
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

    /// Schedules leftovers for deletion. Slow, and no request waits for it.
    ///
    /// # Errors
    /// The first call that failed; what was found before it is done.
    pub async fn clean_up(&self, installation: &str, owned: &Owned, now: Timestamp) -> Result<CleanUp, BackendError> {
        // Without the secret nothing can be told to be ours, and keyrings may not be authenticated yet.
        if self.proof.prove(&[b"is the secret at hand?"]).is_none() {
            return Ok(CleanUp::default());
        }
        let pause = (self.cleanup_after.to_std() / 100_000).min(PAUSE_MAX);
        let mut done = CleanUp::default();
        let mut marker = None;
        for _ in 0..PAGES_MAX {
            let page = self.api.list_keys(marker.as_deref()).await.map_err(|error| failed("clean_up", error))?;
            for arn in page.items {
                if self.seen.contains(&arn) || owned.referenced.contains(&arn) {
                    continue;
                }
                if done.examined >= EXAMINED_MAX {
                    return Ok(done);
                }
                done.examined += 1;
                self.examine(&arn, installation, owned, now, &mut done).await?;
                tokio::time::sleep(pause).await;
            }
            marker = page.next;
            if marker.is_none() {
                break;
            }
        }
        Ok(done)
    }

    async fn examine(
        &self,
        arn: &str,
        installation: &str,
        owned: &Owned,
        now: Timestamp,
        done: &mut CleanUp,
    ) -> Result<(), BackendError> {
        let tags = match self.api.list_resource_tags(arn, None).await {
            Ok(page) => page.items,
            // Keys of others may be closed to us, or vanish meanwhile.
            Err(error) if matches!(error.kind, KmsErrorKind::Denied | KmsErrorKind::NotFound) => Vec::new(),
            Err(error) => return Err(failed("clean_up", error)),
        };
        if !self.is_ours(installation, owned, &tags) {
            self.seen.note(arn);
            return Ok(());
        }
        let key = self.api.describe_key(arn).await.map_err(|error| failed("clean_up", error))?;
        if key.state == KeyState::PendingDeletion {
            self.seen.note(arn);
            return Ok(());
        }
        // The service's clock made the date and ours judges it: hours lie between the two limits.
        let Some(age) = key.created_at.map(|at| now.since(at)) else { return Ok(()) };
        let aliases = self.api.list_aliases(arn, None).await.map_err(|error| failed("clean_up", error))?;
        if !aliases.items.is_empty() || aliases.next.is_some() {
            return Ok(());
        }
        if age < self.cleanup_after {
            done.young += 1;
            return Ok(());
        }
        self.schedule_deletion(arn).await?;
        self.seen.note(arn);
        done.scheduled += 1;
        tracing::warn!(
            key = arn,
            "a key that a crash left behind, without alias and in no keyring, is scheduled for deletion"
        );
        Ok(())
    }
}
