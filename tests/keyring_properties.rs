//! Proof of the pure core: random histories of one keyset, checked at every write against a ledger of what was promised,
//! and hand-written examples of every rule of DESIGN §2.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "keyring_properties/examples.rs"]
mod examples;
#[path = "keyring_properties/histories.rs"]
mod histories;
#[path = "support/policy.rs"]
mod policy;
#[path = "keyring_properties/promises.rs"]
mod promises;
#[path = "keyring_properties/world.rs"]
mod world;
