//! What can be wrong with the stored state as a whole, and what to do about it.

use crate::keyring::name::Name;
use crate::seal::SealError;
use crate::store::StoreError;
use crate::store::record::{RecordError, RecordProblem};

/// Why the ledger refused or failed.
///
/// Only [`Store`](Self::Store) and [`Seal`](Self::Seal) with `Unavailable`, and [`Sealed`](Self::Sealed), may pass by
/// themselves; [`may_pass`](Self::may_pass) tells. Everything else needs a person, and nothing was overwritten.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The seal could not be reached since the start.
    #[error("the seal has not been opened yet: records are served unauthenticated and nothing is written")]
    Sealed,
    #[error(
        "{location} does not exist: nothing was initialised here. Run `jwksd init` (or set initialise = \"if-empty\") \
         for a new issuer; for an existing one check [store] path and restore the store, see docs/restore.md"
    )]
    NotInitialised { location: String },
    #[error(
        "{location} does not exist although a seal key does: the store was lost, or another path is configured. Check \
         [store] path and restore the store, see docs/restore.md; only to start afresh, move the seal key away first"
    )]
    StoreLost { location: String },
    #[error(
        "{location} exists but the seal key that opens it does not: restore the seal key file, see docs/restore.md. No \
         new key is made in its place, since it could open nothing"
    )]
    SealLost { location: String },
    #[error(
        "{location} is missing although {found} exists: the installation's record was lost. Restore the whole store, \
         see docs/restore.md"
    )]
    InstallationLost { location: String, found: String },
    #[error(
        "{location} is unfinished: `jwksd migrate` began to move an installation here and did not end. Run it again, or \
         go on with the store it came from, see docs/postgres.md"
    )]
    Migrating { location: String },
    #[error(
        "{location} was sealed with the key {needed}, but the configured seal is {offered}: configure that key as well, \
         or restore it, see docs/restore.md"
    )]
    OtherSeal { location: String, needed: String, offered: String },
    #[error(
        "{location} is missing although the keyset `{keyset}` exists: restore it, see docs/restore.md. No new keyring is \
         made in its place, since verifiers and live tokens depend on its keys"
    )]
    Missing { keyset: Name, location: String },
    #[error(
        "{location} exists although the installation knows no keyset `{keyset}`: it came from another store, or the \
         installation's record is older. Move it away, or restore the whole store, see docs/restore.md"
    )]
    Unlisted { keyset: Name, location: String },
    #[error(
        "{location} is generation {generation}, older than generation {seen} that was seen before: an old copy was put \
         back. Restore the newest copy, see docs/restore.md"
    )]
    OlderThanSeen { location: String, generation: u64, seen: u64 },
    #[error(
        "{location} is another generation {generation} than the one seen before: two writers have diverged. Keep both \
         copies and restore the right one, see docs/restore.md"
    )]
    Forked { location: String, generation: u64 },
    #[error(
        "{location} belongs to the history {found}, not to {expected}: it comes from another life of this keyset. Restore \
         the store as a whole, see docs/restore.md"
    )]
    OtherLineage { location: String, found: String, expected: String },
    #[error(
        "{location} does not know that the key {kid} was revoked, which this replica saw: it was restored or recovered without \
         that. Recover it again with a copy that knows, or revoke the key there, see docs/restore.md"
    )]
    LostRevocation { location: String, kid: String },
    #[error("{location} contradicts itself ({problem}): restore it, see docs/restore.md")]
    Inconsistent { location: String, problem: &'static str },
    /// Another replica wrote first: what it wrote is to be loaded.
    #[error("{location} was changed by another replica at the same time")]
    Overtaken { location: String },
    #[error("the keyset `{keyset}` is not registered, so nothing is stored for it")]
    Unregistered { keyset: Name },
    #[error("generation {next} of the keyset `{keyset}` does not follow generation {current}")]
    OutOfSequence { keyset: Name, current: u64, next: u64 },
    #[error(
        "the private key {serial} of the keyset `{keyset}` cannot be opened with its data key ({problem}): nothing was \
         resealed for it. Restore {location}, see docs/restore.md"
    )]
    UnreadablePrivateKey { keyset: Name, serial: u64, location: String, problem: String },
}

impl LedgerError {
    /// A record that this release could read, were it whole. A newer release's is none.
    pub fn is_unusable_record(&self) -> bool {
        matches!(self, LedgerError::Record(error) if !matches!(error.problem, RecordProblem::NewerFormat { .. }))
    }

    /// Whether what is stored cannot be trusted: somebody else wrote, changed, removed or put back a record.
    pub fn is_distrust(&self) -> bool {
        match self {
            LedgerError::Record(error) => !error.problem.is_of_writing(),
            LedgerError::Store(StoreError::Conflict { .. })
            | LedgerError::Store(StoreError::Disputed { .. })
            | LedgerError::Missing { .. }
            | LedgerError::Unlisted { .. }
            | LedgerError::InstallationLost { .. }
            | LedgerError::OlderThanSeen { .. }
            | LedgerError::Forked { .. }
            | LedgerError::OtherLineage { .. }
            | LedgerError::LostRevocation { .. }
            | LedgerError::Inconsistent { .. } => true,
            LedgerError::Store(_)
            | LedgerError::Seal(_)
            | LedgerError::Sealed
            | LedgerError::Overtaken { .. }
            | LedgerError::NotInitialised { .. }
            | LedgerError::StoreLost { .. }
            | LedgerError::SealLost { .. }
            | LedgerError::Migrating { .. }
            | LedgerError::OtherSeal { .. }
            | LedgerError::Unregistered { .. }
            | LedgerError::OutOfSequence { .. }
            | LedgerError::UnreadablePrivateKey { .. } => false,
        }
    }

    /// Whether trying again later, without anybody doing anything, can help.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            LedgerError::Store(StoreError::Unavailable { .. })
                | LedgerError::Seal(SealError::Unavailable { .. })
                | LedgerError::Sealed
                | LedgerError::Overtaken { .. }
        )
    }
}
