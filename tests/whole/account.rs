//! An account of AWS KMS, as the daemon's own backend sees it: keys with tags and names, some of them somebody else's that
//! look like ours. It fails as the other KMS does.

use std::time::Duration;

use async_trait::async_trait;
use jwksd::aws_kms::{
    Encrypted, EncryptionContext, KeyDescription, KeySpec, KeyState, KmsApi, KmsError, KmsErrorKind, KmsOperation,
    Message, Pace, Page, PublicKey, SigningAlgorithm,
};
use jwksd::backend::{BackendError, BackendErrorKind};
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::time::Span;
use zeroize::Zeroizing;

use crate::keys::{KeyId, pair};
use crate::kms::{Client, Entry, FOREIGN, Inventory};
use crate::life::BEGINNING;

/// Leftovers are cleaned up when they are so old. What is made is claimed within half of it, and a process that stands still
/// then, on a network that is late, has a minute more.
pub const CLEANUP_AFTER: Span = Span::from_secs(160);

/// Keys on one page of a list.
const PAGE: usize = 8;

/// A call that nobody answers.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(5);

const ARN: &str = "arn:aws:kms:sim:1:key/";

const INSTALLATION: &str = "jwksd:installation";
const LINEAGE: &str = "jwksd:lineage";
const KEYSET: &str = "jwksd:keyset";
const SERIAL: &str = "jwksd:serial";
const NONCE: &str = "jwksd:nonce";

/// The key that a stored handle names.
pub fn id_in(handle: &str) -> Option<KeyId> {
    handle.split(' ').nth(1)?.strip_prefix(ARN)?.parse().ok()
}

fn arn(id: KeyId) -> String {
    format!("{ARN}{id}")
}

impl Client {
    async fn call<T: Send + 'static>(
        &self,
        operation: KmsOperation,
        key: &str,
        call: impl FnOnce(&mut Inventory) -> Result<T, KmsErrorKind> + Send + 'static,
    ) -> Result<T, KmsError> {
        let done = self.act(operation.as_str(), call).await;
        done.map_err(kind_of).and_then(|done| done).map_err(|kind| wrong(operation, key, kind))
    }

    /// Asks for something about one key.
    async fn about<T: Send + 'static>(
        &self,
        operation: KmsOperation,
        key: &str,
        call: impl FnOnce(&mut Inventory, KeyId) -> Result<T, KmsErrorKind> + Send + 'static,
    ) -> Result<T, KmsError> {
        let name = key.to_owned();
        let found = move |inventory: &mut Inventory| {
            let id = inventory.resolve(&name).ok_or(KmsErrorKind::NotFound)?;
            call(inventory, id)
        };
        self.call(operation, key, found).await
    }
}

fn wrong(operation: KmsOperation, key: &str, kind: KmsErrorKind) -> KmsError {
    KmsError { operation, key: key.to_owned(), kind, detail: String::new() }
}

fn kind_of(error: BackendError) -> KmsErrorKind {
    match error.kind {
        BackendErrorKind::Throttled => KmsErrorKind::Throttled,
        BackendErrorKind::Timeout => KmsErrorKind::Timeout,
        BackendErrorKind::KeyDisabled => KmsErrorKind::Disabled,
        _ => KmsErrorKind::Unavailable,
    }
}

impl Inventory {
    fn resolve(&self, name: &str) -> Option<KeyId> {
        match name.strip_prefix(ARN) {
            Some(id) => id.parse().ok().filter(|id| self.entries.contains_key(id)),
            None => self.aliases.get(name).copied(),
        }
    }

    fn entry(&mut self, id: KeyId) -> Result<&mut Entry, KmsErrorKind> {
        self.entries.get_mut(&id).ok_or(KmsErrorKind::NotFound)
    }

    fn make(&mut self, algorithm: Algorithm, tags: Vec<(String, String)>, now: i64) -> KeyId {
        let tag =
            |name: &str| tags.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).unwrap_or_default();
        let id = self.take_id(algorithm);
        let (keyset, serial) = (Name::parse(tag(KEYSET)).unwrap(), tag(SERIAL).parse().unwrap());
        let entry = Entry::new(id, keyset, serial, tag(LINEAGE), now);
        self.insert(Entry { tags, ..entry });
        id
    }

    /// Somebody makes a key with the tags of another one, of which one may be changed. A `*` is what the nonce ends in.
    fn imitate(&mut self, like: KeyId, changed: Option<(&str, &str)>, now: i64) {
        let mut tags = self.entries.get(&like).map(|entry| entry.tags.clone()).unwrap_or_default();
        for (key, value) in &mut tags {
            if let Some((_, other)) = changed.filter(|(changed, _)| changed == key) {
                let rest = value.split_once('.').map_or("", |(_, rest)| rest);
                *value = other.replace('*', rest);
            }
        }
        let id = self.take_id(pair(like).algorithm());
        let entry = Entry::new(id, Name::parse(FOREIGN).unwrap(), 1, FOREIGN, now);
        self.insert(Entry { tags, ..entry });
    }

    fn names_of(&self, id: KeyId) -> Vec<String> {
        self.aliases.iter().filter(|(_, of)| **of == id).map(|(alias, _)| alias.clone()).collect()
    }
}

/// What strangers change: it is another installation's, or nothing proves it.
const FORGED: [(&str, &str); 3] = [(INSTALLATION, "another"), (SERIAL, "77"), (NONCE, "0123456789.*")];

fn describe(entry: &Entry) -> KeyDescription {
    KeyDescription {
        arn: arn(entry.id),
        state: match (entry.destroyed, entry.disabled) {
            (true, _) => KeyState::PendingDeletion,
            (false, true) => KeyState::Disabled,
            (false, false) => KeyState::Enabled,
        },
        spec: Some(spec_of(entry.id)),
        signs: true,
        encrypts: false,
        created_at: Some(BEGINNING + Span::from_millis(entry.made_at)),
        born_there: true,
    }
}

fn spec_of(id: KeyId) -> KeySpec {
    match pair(id).algorithm() {
        Algorithm::Es384 => KeySpec::EccNistP384,
        _ => KeySpec::EccNistP256,
    }
}

#[async_trait]
impl KmsApi for Client {
    async fn encrypt(&self, key: &str, _: &[u8], _: &EncryptionContext) -> Result<Encrypted, KmsError> {
        Err(wrong(KmsOperation::Encrypt, key, KmsErrorKind::Unsupported))
    }

    async fn decrypt(&self, key: &str, _: &[u8], _: &EncryptionContext) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        Err(wrong(KmsOperation::Decrypt, key, KmsErrorKind::Unsupported))
    }

    async fn create_signing_key(
        &self,
        spec: KeySpec,
        _: &str,
        tags: &[(&'static str, String)],
    ) -> Result<KeyDescription, KmsError> {
        let algorithm = if spec == KeySpec::EccNistP384 { Algorithm::Es384 } else { Algorithm::Es256 };
        let tags: Vec<_> = tags.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        let now = self.truth.now();
        self.call(KmsOperation::CreateKey, "", move |inventory| {
            let is_first = inventory.entries.values().all(|entry| entry.tags.is_empty());
            let id = inventory.make(algorithm, tags, now);
            if is_first {
                FORGED.iter().for_each(|changed| inventory.imitate(id, Some(*changed), now));
            }
            inventory.entry(id).map(|entry| describe(entry))
        })
        .await
    }

    async fn describe_key(&self, key: &str) -> Result<KeyDescription, KmsError> {
        self.about(KmsOperation::DescribeKey, key, |inventory, id| inventory.entry(id).map(|entry| describe(entry)))
            .await
    }

    async fn public_key(&self, key: &str) -> Result<PublicKey, KmsError> {
        self.about(KmsOperation::GetPublicKey, key, |_, id| {
            let subject_public_key_info = pair(id).public_key_info();
            Ok(PublicKey { arn: arn(id), spec: Some(spec_of(id)), signs: true, subject_public_key_info })
        })
        .await
    }

    async fn sign(&self, key: &str, message: Message<'_>, _: SigningAlgorithm, _: Pace) -> Result<Vec<u8>, KmsError> {
        let wrong = |kind| wrong(KmsOperation::Sign, key, kind);
        let id = key.strip_prefix(ARN).and_then(|id| id.parse().ok()).ok_or(wrong(KmsErrorKind::NotFound))?;
        let Message::Digest(digest) = message else { return Err(wrong(KmsErrorKind::Unsupported)) };
        let hand = self.hand(id);
        let other: Vec<u8> = digest.iter().map(|byte| !byte).collect();
        let signed = hand.sign_as(|is_asked| pair(id).sign_digest(if is_asked { digest } else { &other }));
        let signed = tokio::time::timeout(GIVEN_UP_AFTER, signed).await;
        signed.map_err(|_| wrong(KmsErrorKind::Timeout))?.map_err(|error| wrong(kind_of(error)))
    }

    async fn create_alias(&self, alias: &str, key: &str) -> Result<(), KmsError> {
        let (alias, now) = (alias.to_owned(), self.truth.now());
        self.about(KmsOperation::CreateAlias, key, move |inventory, id| {
            if inventory.aliases.contains_key(&alias) {
                return Err(KmsErrorKind::AlreadyExists);
            }
            if inventory.entry(id)?.destroyed {
                return Err(KmsErrorKind::InvalidState);
            }
            if inventory.aliases.is_empty() {
                inventory.imitate(id, None, now);
            }
            inventory.aliases.insert(alias, id);
            Ok(())
        })
        .await
    }

    async fn list_aliases(&self, key: &str, _: Option<&str>) -> Result<Page<String>, KmsError> {
        self.about(KmsOperation::ListAliases, key, |inventory, id| {
            Ok(Page { items: inventory.names_of(id), next: None })
        })
        .await
    }

    async fn list_keys(&self, marker: Option<&str>) -> Result<Page<String>, KmsError> {
        let from: usize = marker.and_then(|marker| marker.parse().ok()).unwrap_or(0);
        self.call(KmsOperation::ListKeys, "", move |inventory| {
            let items: Vec<String> = inventory.entries.keys().skip(from).take(PAGE).map(|id| arn(*id)).collect();
            let next = (from + PAGE < inventory.entries.len()).then(|| (from + PAGE).to_string());
            Ok(Page { items, next })
        })
        .await
    }

    async fn list_resource_tags(&self, key: &str, _: Option<&str>) -> Result<Page<(String, String)>, KmsError> {
        let tags = |inventory: &mut Inventory, id| inventory.entry(id).map(|entry| entry.tags.clone());
        let items = self.about(KmsOperation::ListResourceTags, key, tags).await?;
        Ok(Page { items, next: None })
    }

    async fn disable_key(&self, key: &str) -> Result<(), KmsError> {
        self.about(KmsOperation::DisableKey, key, |inventory, id| {
            let entry = inventory.entry(id)?;
            if entry.destroyed {
                return Err(KmsErrorKind::InvalidState);
            }
            entry.disabled = true;
            Ok(())
        })
        .await
    }

    async fn schedule_key_deletion(&self, key: &str, _: u8) -> Result<(), KmsError> {
        self.about(KmsOperation::ScheduleKeyDeletion, key, |inventory, id| {
            if inventory.entry(id)?.destroyed {
                return Err(KmsErrorKind::InvalidState);
            }
            inventory.destroy(id);
            Ok(())
        })
        .await
    }
}
