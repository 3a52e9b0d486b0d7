//! What a store offers to several replicas that use it at once: noticing each other's writes, and each other.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;

use super::{Digest, Document, Store, StoreError};
use crate::keyring::name::Name;
use crate::keyring::time::{Span, Timestamp};

/// Reports are kept for this long, where there are not too many.
pub const REMEMBERED: Span = Span::DAY;

/// A store that other replicas write and read too.
#[async_trait]
pub trait SharedStore: Store {
    /// What is stored, as soon as it differs from `known`; at the latest after about `wait`. With `known` absent or a
    /// `wait` of zero it answers at once. What it says was true at some moment after the call.
    async fn heads(&self, known: Option<&Revision>, wait: Duration) -> Result<Heads, StoreError>;

    /// Tells the others about these replicas, each under its name; replaces what was told before.
    async fn report(&self, replicas: &[Report]) -> Result<(), StoreError>;

    /// The replicas that reported within `longest`, in order of name.
    async fn replicas(&self, longest: Span) -> Result<Vec<Replica>, StoreError>;

    /// These replicas stop in good order: nobody waits for them any more.
    async fn forget(&self, replicas: &[&str]) -> Result<(), StoreError>;
}

/// Tells one state of a store from any other, a restored older copy included. Opaque.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Revision(pub String);

/// What a store holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heads {
    pub revision: Revision,
    /// The store's clock when it answered.
    pub store_time: Timestamp,
    /// How old this is: zero for the database itself, more behind somebody who was not able to ask it.
    pub age: Span,
    /// The digest of every shared document; `None` when the revision is the one that was known.
    pub documents: Option<BTreeMap<Document, Digest>>,
}

/// What a replica says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of this process: another one after a restart.
    pub replica: String,
    /// `all`, `manager` or `signer`.
    pub role: String,
    /// Of the software.
    pub version: String,
    /// Its public listener is open: what it has not taken up, its verifiers do not see.
    pub publishes: bool,
    /// It can send notices to receivers: one of those that can does. Of older releases every manager counts.
    pub tells: bool,
    /// It stopped in good order: since this report it serves and signs nothing. Kept, since verifiers remember what it served.
    pub stopped: bool,
    /// Of each keyring that it shows.
    pub generations: BTreeMap<Name, u64>,
    /// By URL of each issuer that it publishes: since when without a long silence.
    pub resumed: BTreeMap<String, Timestamp>,
}

/// A replica as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    pub report: Report,
    /// Since its last report, by the store's clock.
    pub age: Span,
}

/// The longest name of a replica, in bytes; longer ones are cut where they are made.
pub const LONGEST_REPLICA: usize = 128;
