//! Creating a key once per serial, whoever tries, however often, and wherever it dies.

use std::time::Duration;

use tokio::sync::Mutex;

use super::creation::{Claimed, Creation};
use super::error::{ClaimError, failed, internal, unsettled};
use super::{AwsKmsBackend, spec_of};
use crate::aws_kms::{KeyDescription, KeyState, KmsErrorKind};
use crate::backend::{BackendError, BackendErrorKind, KeyIdentity};
use crate::keyring::algorithm::Algorithm;
use crate::keyring::jwk::PublicJwk;

/// One serial's creation in this process: held by whoever works on it, and keeps what it made and could not claim yet.
pub(super) type Claim = Mutex<Option<HalfMade>>;

/// A key without alias. Kept so that a retry goes on with it: each `CreateKey` makes another key, which costs.
pub(super) struct HalfMade {
    arn: String,
    algorithm: Algorithm,
    made_at: Duration,
    /// Of its tags.
    nonce: String,
}

/// The names that a serial may be claimed under: the plain one, and others where a key that cannot be used has it.
const NAMES_MAX: u32 = 8;

/// A new key may be unknown for this long to some of the service's machines.
const KNOWN_AFTER: Duration = Duration::from_secs(60);

impl AwsKmsBackend {
    /// The key of `identity`: found, or made and claimed. Its ARN and public half.
    pub(super) async fn create_claimed(
        &self,
        identity: &KeyIdentity,
        algorithm: Algorithm,
    ) -> Result<(String, PublicJwk), BackendError> {
        let first = alias(identity);
        let claim = self.claim(&first);
        let mut half = claim.lock().await;
        for n in 1..=NAMES_MAX {
            let alias = if n == 1 { first.clone() } else { format!("{first}/{n}") };
            let found = match self.claimed(&alias).await? {
                Some(key) => key,
                None => match self.make(identity, algorithm, &alias, &mut half).await? {
                    Made::Claimed(arn, public) => {
                        *half = None;
                        self.forget_claim(&first);
                        return Ok((arn, public));
                    }
                    Made::Lost => {
                        let winner = self.claimed(&alias).await?;
                        winner.ok_or_else(|| unsettled(ClaimError::NotVisible { alias: alias.clone() }))?
                    }
                },
            };
            if found.state != KeyState::Enabled || found.spec != Some(spec_of(algorithm)) {
                // Destroyed in a history that a restored store does not know, or made for another algorithm.
                tracing::warn!(
                    alias,
                    key = found.arn,
                    "the alias names a key that cannot be used for this serial; the next name is tried"
                );
                continue;
            }
            let public = self.adopted(identity, algorithm, &alias, &found, half.as_ref()).await?;
            if let Some(own) = half.take().filter(|own| own.arn != found.arn) {
                self.discard(&own.arn).await;
            }
            self.forget_claim(&first);
            return Ok((found.arn, public));
        }
        Err(internal("create", ClaimError::Exhausted { alias: first, tried: NAMES_MAX - 1 }))
    }

    /// The key that has the alias.
    async fn claimed(&self, alias: &str) -> Result<Option<KeyDescription>, BackendError> {
        match self.api.describe_key(alias).await {
            Ok(key) => Ok(Some(key)),
            Err(error) if error.kind == KmsErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("create", error)),
        }
    }

    /// Makes a key, or goes on with the one made before, tests it and claims the alias for it.
    async fn make(
        &self,
        identity: &KeyIdentity,
        algorithm: Algorithm,
        alias: &str,
        half: &mut Option<HalfMade>,
    ) -> Result<Made, BackendError> {
        // Given up long before anybody's clean-up takes it for a leftover.
        let within = self.cleanup_after.to_std() / 2;
        let young = |key: &HalfMade| self.clock.monotonic().saturating_sub(key.made_at) < within;
        if let Some(stale) = half.take_if(|key| key.algorithm != algorithm || !young(key)) {
            self.discard(&stale.arn).await;
        }
        let arn = match half {
            Some(key) => key.arn.clone(),
            None => {
                let (tags, nonce) = self.tags(identity).ok_or_else(|| unsettled(ClaimError::NoProof))?;
                let description = format!("jwksd {} {}", identity.keyset, identity.serial);
                let made_at = self.clock.monotonic();
                let made = self.api.create_signing_key(spec_of(algorithm), &description, &tags).await;
                let arn = made.map_err(|error| failed("create", error))?.arn;
                *half = Some(HalfMade { arn: arn.clone(), algorithm, made_at, nonce });
                arn
            }
        };
        let public = match self.tested("create", &arn, algorithm).await {
            Ok(public) => public,
            Err(error) => {
                self.give_up_if_useless(half, error.kind).await;
                return Err(error);
            }
        };
        match self.api.create_alias(alias, &arn).await {
            Ok(()) => Ok(Made::Claimed(arn, public)),
            Err(error) if error.kind == KmsErrorKind::AlreadyExists => Ok(Made::Lost),
            Err(error) => {
                let error = failed("create", error);
                self.give_up_if_useless(half, error.kind).await;
                Err(error)
            }
        }
    }

    /// Gives up a key that will never be claimed, so that the next attempt makes another: it does not work, or somebody
    /// took it for a leftover.
    async fn give_up_if_useless(&self, half: &mut Option<HalfMade>, error: BackendErrorKind) {
        let useless = |key: &mut HalfMade| match error {
            BackendErrorKind::PairwiseTest | BackendErrorKind::KeyDisabled => true,
            BackendErrorKind::NotFound => self.clock.monotonic().saturating_sub(key.made_at) > KNOWN_AFTER,
            _ => false,
        };
        if let Some(key) = half.take_if(useless) {
            self.discard(&key.arn).await;
        }
    }

    /// Checks that a key found under the alias is what the alias says, and works.
    async fn adopted(
        &self,
        identity: &KeyIdentity,
        algorithm: Algorithm,
        alias: &str,
        found: &KeyDescription,
        half: Option<&HalfMade>,
    ) -> Result<PublicJwk, BackendError> {
        if self.proof.prove(&[]).is_none() {
            return Err(unsettled(ClaimError::NoProof));
        }
        let tags = self.api.list_resource_tags(&found.arn, None).await.map_err(|error| failed("create", error))?;
        // Everything about an alias can be guessed, and tags can be copied: only the code of the nonce is ours alone.
        let copied = |made: &Creation| half.is_some_and(|own| own.nonce == made.nonce() && own.arn != found.arn);
        let proven = match Creation::claimed(&identity.installation, &tags.items) {
            Claimed::Creation(made) => {
                made.is_of(identity) && made.is_signed(&*self.proof) && made.fits(found) && !copied(&made)
            }
            Claimed::Foreign | Claimed::Nothing => false,
        };
        if !proven {
            let foreign = ClaimError::Foreign { alias: alias.to_owned(), arn: found.arn.clone() };
            return Err(internal("create", foreign));
        }
        let public = self.tested("create", &found.arn, algorithm).await?;
        tracing::info!(keyset = %identity.keyset, serial = identity.serial, key = found.arn, "the key of this serial exists already; it is used");
        Ok(public)
    }

    /// Schedules a key for deletion that this process made and nobody else knows. What fails is left to clean-up.
    async fn discard(&self, arn: &str) {
        match self.schedule_deletion(arn).await {
            Ok(()) => tracing::info!(key = arn, "a key that was made and not needed is scheduled for deletion"),
            Err(error) => {
                tracing::warn!(key = arn, error = %error, "a key that was made and not needed could not be scheduled for deletion; clean-up tries again");
                self.unsettled.notify_one();
            }
        }
    }
}

/// How a creation ended.
enum Made {
    Claimed(String, PublicJwk),
    /// Somebody else has the alias.
    Lost,
}

/// The claim of a serial. At most 256 characters of `a-zA-Z0-9/_-`, as the service demands.
fn alias(identity: &KeyIdentity) -> String {
    format!("alias/jwksd/{}/{}/{}", identity.installation, identity.keyset, identity.serial)
}
