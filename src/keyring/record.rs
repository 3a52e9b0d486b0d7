//! A keyset's stored record: its keys, the policy in force and the journal of what happened to them.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::algorithm::Algorithm;
use super::decide::KeyChange;
use super::jwk::{Kid, PublicJwk};
use super::name::Name;
use super::policy::Policy;
use super::time::{Span, Timestamp};

/// Number of a key in its keyset: 1, 2, 3 …
pub type Serial = u64;

/// The record of one keyset. Every change makes a new value with the next generation; nothing is edited in place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyring {
    pub keyset: Name,
    /// Which history this record belongs to: random, kept for life.
    pub lineage: String,
    /// Grows by one per change.
    pub generation: u64,
    /// When this generation was written, by the writer's trusted clock.
    pub written_at: Timestamp,
    /// The policy in force, which a broken or missing configuration leaves as it is.
    pub policy: Policy,
    /// The lineage that its private keys are bound to, where that is a former one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub born: Option<String>,
    /// Histories that this one goes on from, after a recovery.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub supersedes: Vec<Superseded>,
    /// Its first key may sign at once: the issuer had never published any (DESIGN §2, "First key").
    pub first: bool,
    /// In order of serial; of those that ended the newest are kept as history.
    pub keys: Vec<Key>,
    /// Revoked keys that are not listed any more, oldest first: their kids, and their thumbprints where these differ. They
    /// must never come back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub banned: Vec<String>,
    pub next_serial: Serial,
    pub last_promotion_at: Option<Timestamp>,
    /// When a successor last took over from a key that its backend had disabled. Not read from the audit log: a busy keyset
    /// could push the entry out within the hour that counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled_switch_at: Option<Timestamp>,
    pub hold: Option<Hold>,
    /// An operator ended this keyset; its keys leave as their tokens expire and no new ones are made.
    pub drained: bool,
    /// An operator confirmed that the algorithm of waiting keys, which differs from the active one's, may sign.
    pub confirmed_algorithm: Option<Algorithm>,
    /// Longer waits of earlier policies that still hold (DESIGN §2: shortening takes effect one old propagation later).
    pub floors: Vec<Floor>,
    pub journal: Journal,
}

/// A history that ended when it was recovered from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superseded {
    pub lineage: String,
    /// The last generation that the recovery knew of.
    pub generation: u64,
}

/// One key. Its private half is in `private` (sealed, or a remote backend's name for it) until it is destroyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub serial: Serial,
    pub kid: Kid,
    pub algorithm: Algorithm,
    pub public: PublicJwk,
    /// The backend's handle of the private half; absent for public-only keys and once destroyed.
    pub private: Option<PrivateHandle>,
    pub origin: Origin,
    pub state: KeyState,
    /// When it entered its state.
    pub entered_at: Timestamp,
    pub created_at: Timestamp,
    /// The keyring's first generation that contains it: a replica that shows an older one does not publish it.
    #[serde(default)]
    pub since_generation: u64,
    /// First moment an answerable snapshot contained it.
    pub published_at: Option<Timestamp>,
    /// Since when every sample of every probe has shown it, while it waits; only where the issuer has probes.
    #[serde(default)]
    pub seen_at: Option<Timestamp>,
    pub activated_at: Option<Timestamp>,
    /// When a successor took over from it.
    pub demoted_at: Option<Timestamp>,
    /// From when on no signature of this key could begin; observed after the write that demoted it.
    pub stopped_at: Option<Timestamp>,
    /// The longest token life it was ever allowed to sign.
    pub ttl_bound: Span,
    /// The largest overlap in force while it signed.
    pub overlap_bound: Span,
    /// Imported public-only keys: published until then.
    pub published_until: Option<Timestamp>,
    /// It signed before it was published for `propagation` (first key, emergency or an operator's `allow_unpropagated`).
    pub unpropagated: bool,
    /// An operator rolled back from this key, and not to it since.
    pub rolled_back: bool,
    pub revocation: Option<Revocation>,
}

/// How the record refers to a private key, and which backend understands it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateHandle {
    pub backend: String,
    /// Sealed key or remote name; opaque here.
    pub handle: String,
}

impl std::fmt::Debug for PrivateHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrivateHandle").field("backend", &self.backend).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    Created,
    Imported,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyState {
    Pending,
    Standby,
    Active,
    Retiring,
    Retired,
    Revoked,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    pub reason: String,
    pub actor: String,
    pub at: Timestamp,
}

/// Scheduled promotions, removals and destruction of unrevoked keys wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub reason: String,
    pub until: Option<Timestamp>,
    pub actor: String,
    pub since: Timestamp,
}

/// A wait that an earlier policy promised and that holds until `until`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Floor {
    pub propagation: Span,
    pub window: Span,
    pub until: Timestamp,
}

/// What happened, and which calls were already answered; written in the same compare-and-swap as the effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Grows by one per entry ever written.
    pub next_seq: u64,
    pub audit: Vec<AuditEntry>,
    pub answered: Vec<Answered>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditEntry {
    pub seq: u64,
    pub at: Timestamp,
    pub action: String,
    pub actor: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub kids: BTreeSet<Kid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The generation that it came with; absent in what an earlier release wrote, and in the installation's journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// What became of each key, active ones first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<KeyChange>,
}

/// An idempotent call and its answer (kept 24 hours).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// The Idempotency-Key.
    pub key: String,
    /// SHA-256 of actor, method, path and body, base64url.
    pub fingerprint: String,
    pub at: Timestamp,
    pub answer: serde_json::Value,
}

impl KeyState {
    pub const ALL: [KeyState; 6] = [
        KeyState::Pending,
        KeyState::Standby,
        KeyState::Active,
        KeyState::Retiring,
        KeyState::Retired,
        KeyState::Revoked,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            KeyState::Pending => "pending",
            KeyState::Standby => "standby",
            KeyState::Active => "active",
            KeyState::Retiring => "retiring",
            KeyState::Retired => "retired",
            KeyState::Revoked => "revoked",
        }
    }

    /// Whether a key in this state stands in the JWKS.
    pub const fn is_published(self) -> bool {
        matches!(self, KeyState::Pending | KeyState::Standby | KeyState::Active | KeyState::Retiring)
    }
}

impl std::fmt::Display for KeyState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
