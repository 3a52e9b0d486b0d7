//! Creating a key once per serial, whoever tries, however often, and wherever it dies.

use tokio::sync::Mutex;

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
    made_at: std::time::Duration,
}

/// The names that a serial may be claimed under: the plain one, and others where a key that cannot be used has it.
const NAMES_MAX: u32 = 8;

const INSTALLATION: &str = "jwksd:installation";
const LINEAGE: &str = "jwksd:lineage";
const KEYSET: &str = "jwksd:keyset";
const SERIAL: &str = "jwksd:serial";
const NONCE: &str = "jwksd:nonce";

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
            let public = self.adopted(identity, algorithm, &alias, &found).await?;
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
                let tags = self.tags(identity).ok_or_else(|| unsettled(ClaimError::NoProof))?;
                let description = format!("jwksd {} {}", identity.keyset, identity.serial);
                let made_at = self.clock.monotonic();
                let made = self.api.create_signing_key(spec_of(algorithm), &description, &tags).await;
                let arn = made.map_err(|error| failed("create", error))?.arn;
                *half = Some(HalfMade { arn: arn.clone(), algorithm, made_at });
                arn
            }
        };
        let public = match self.tested("create", &arn, algorithm).await {
            Ok(public) => public,
            Err(error) => {
                if error.kind == BackendErrorKind::PairwiseTest {
                    *half = None;
                    self.discard(&arn).await;
                }
                return Err(error);
            }
        };
        match self.api.create_alias(alias, &arn).await {
            Ok(()) => Ok(Made::Claimed(arn, public)),
            Err(error) if error.kind == KmsErrorKind::AlreadyExists => Ok(Made::Lost),
            Err(error) => {
                if matches!(error.kind, KmsErrorKind::InvalidState | KmsErrorKind::Disabled) {
                    // Somebody took it for a leftover.
                    *half = None;
                }
                Err(failed("create", error))
            }
        }
    }

    /// Checks that a key found under the alias is what the alias says, and works.
    async fn adopted(
        &self,
        identity: &KeyIdentity,
        algorithm: Algorithm,
        alias: &str,
        found: &KeyDescription,
    ) -> Result<PublicJwk, BackendError> {
        let tags = self.api.list_resource_tags(&found.arn, None).await.map_err(|error| failed("create", error))?;
        let serial = identity.serial.to_string();
        let wanted = [
            (INSTALLATION, identity.installation.as_str()),
            (LINEAGE, identity.lineage.as_str()),
            (KEYSET, identity.keyset.as_str()),
            (SERIAL, serial.as_str()),
        ];
        let has = |(key, value): &(&str, &str)| tags.items.iter().any(|(k, v)| k == key && v == value);
        if !found.signs || !wanted.iter().all(has) {
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

    fn tags(&self, identity: &KeyIdentity) -> Option<[(&'static str, String); 5]> {
        let serial = identity.serial.to_string();
        let mut random = [0u8; 16];
        aws_lc_rs::rand::fill(&mut random).ok()?;
        let random = hex(&random);
        let (with, code) = self.proof.prove(&proof_parts(identity, &serial, &random))?;
        Some([
            (INSTALLATION, identity.installation.clone()),
            (LINEAGE, identity.lineage.clone()),
            (KEYSET, identity.keyset.to_string()),
            (SERIAL, serial),
            (NONCE, format!("{random}.{with}.{}", hex(&code))),
        ])
    }

    /// Whether the tags are those of a key that this installation made for one of its keysets, by lineage.
    pub(super) fn is_ours(&self, installation: &str, lineages: &super::Owned, tags: &[(String, String)]) -> bool {
        let tag = |name: &str| tags.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let (Some(of), Some(lineage), Some(keyset), Some(serial), Some(nonce)) =
            (tag(INSTALLATION), tag(LINEAGE), tag(KEYSET), tag(SERIAL), tag(NONCE))
        else {
            return false;
        };
        if of != installation || lineages.lineage_of(keyset) != Some(lineage) {
            return false;
        }
        let mut words = nonce.split('.');
        let (Some(random), Some(with), Some(code), None) = (words.next(), words.next(), words.next(), words.next())
        else {
            return false;
        };
        let Some(code) = unhex(code) else { return false };
        let parts: [&[u8]; 6] =
            [PROOF, of.as_bytes(), lineage.as_bytes(), keyset.as_bytes(), serial.as_bytes(), random.as_bytes()];
        self.proof.holds(with, &parts, &code)
    }
}

/// How a creation ended.
enum Made {
    Claimed(String, PublicJwk),
    /// Somebody else has the alias.
    Lost,
}

const PROOF: &[u8] = b"jwksd aws-kms creation 1";

fn proof_parts<'a>(identity: &'a KeyIdentity, serial: &'a str, random: &'a str) -> [&'a [u8]; 6] {
    [
        PROOF,
        identity.installation.as_bytes(),
        identity.lineage.as_bytes(),
        identity.keyset.as_str().as_bytes(),
        serial.as_bytes(),
        random.as_bytes(),
    ]
}

/// The claim of a serial. At most 256 characters of `a-zA-Z0-9/_-`, as the service demands.
fn alias(identity: &KeyIdentity) -> String {
    format!("alias/jwksd/{}/{}/{}", identity.installation, identity.keyset, identity.serial)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.is_ascii() && text.len().is_multiple_of(2) && text.len() <= 128;
    digits.then(|| (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect())?
}
