//! Who may ask: TLS on every listener, clients known by certificates, and Kubernetes service accounts, on the real binary.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod support;

#[path = "access/accounts.rs"]
mod accounts;
#[path = "access/authority.rs"]
mod authority;
#[path = "access/certificates.rs"]
mod certificates;
#[path = "access/cluster.rs"]
mod cluster;
#[path = "access/command_line.rs"]
mod command_line;
#[path = "access/keys.rs"]
mod keys;
#[path = "access/listeners.rs"]
mod listeners;
#[path = "access/wire.rs"]
mod wire;

use serde_json::{Value, json};

/// Two keysets that sign at once.
const KEYSETS: &str = "[issuer.main]\nurl = \"https://auth.example.com\"\nmax_age = \"1s\"\n\
    [defaults.rotation]\nevery = \"2d\"\npropagation = \"2s\"\nsuccessors = 1\n\
    [defaults.tokens]\nmax_ttl = \"10m\"\nclock_skew = \"500ms\"\n\
    [keyset.default]\nalgorithm = \"ES256\"\n[keyset.partners]\nalgorithm = \"ES256\"\n";

const SIGN: &str = "/v1/keysets/default/sign";

/// What is to be signed.
fn claims(audience: &str) -> Value {
    json!({ "claims": { "aud": audience, "sub": "somebody" } })
}
