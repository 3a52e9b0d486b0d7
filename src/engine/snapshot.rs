//! What requests read: immutable, swapped whole, never locked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::backend::Signer;
use crate::keyring::algorithm::Algorithm;
use crate::keyring::claims::TokenRules;
use crate::keyring::jwk::{Kid, PublicJwk};
use crate::keyring::placement::Generations;
use crate::keyring::plan::SlowStep;
use crate::keyring::policy::Policy;
use crate::keyring::record::{Key, Keyring, Serial};
use crate::keyring::time::{Span, Timestamp};
use crate::telemetry::metrics::BackendMetrics;

/// Everything known of a keyset at one instant.
#[derive(Clone)]
pub struct KeysetSnapshot {
    pub keyring: Arc<Keyring>,
    pub desired: Wanted,
    pub rules: Arc<TokenRules>,
    pub active: Option<Arc<ActiveKey>>,
    /// Boot time since which this process publishes each key on an open listener.
    pub published: BTreeMap<Serial, Span>,
    /// Since when this process cannot sign with each retiring key.
    pub stopped: BTreeMap<Serial, Stopped>,
    /// Slow steps that failed: the boot time of the next attempt, and how often they failed.
    pub backoff: BTreeMap<SlowStep, Backoff>,
    /// Why nothing is written any more, if the record cannot be trusted.
    pub frozen: Option<Arc<str>>,
    /// It is the store that froze it: it thaws when the store holds what can be trusted.
    pub thaws: bool,
    /// Nobody has proved the keyring yet, or the check failed.
    pub unauthenticated: bool,
    /// The last write failed.
    pub store_failing: bool,
}

/// The moment from which a key cannot sign any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Boot time.
    pub at: Span,
    /// The latest time that a token of the key may carry as `iat`; later than the moment itself where the clock was set
    /// back while the key signed.
    pub latest: Timestamp,
}

/// What the configuration wants of a keyset; the owned form of `plan::Desired`.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    Policy(Arc<Policy>),
    Degraded,
    Absent,
    /// What is stored: this process only reads.
    Stored,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub not_before: Span,
    pub failures: u32,
}

/// The key that signs, opened, with its headers rendered.
pub struct ActiveKey {
    pub serial: Serial,
    pub kid: Kid,
    pub algorithm: Algorithm,
    pub public: PublicJwk,
    pub backend: String,
    pub signer: Signer,
    /// Counts the signatures asked of its backend; without a lock.
    pub requests: BackendMetrics,
    /// `base64url(header) + "."` for each allowed `typ`, in the policy's order.
    pub headers: Vec<String>,
    pub door: Arc<Door>,
}

/// Where finished tokens of one key leave, until it is revoked.
#[derive(Default)]
pub struct Door {
    revoked: AtomicBool,
    leaving: AtomicUsize,
}

impl KeysetSnapshot {
    /// Whether the keyset waits for other replicas, or people, to put the store right.
    pub fn is_frozen_by_store(&self) -> bool {
        self.frozen.is_some() && self.thaws
    }

    /// Whether applications may expect signatures: a drained keyset that is gone from the configuration has ended for good.
    pub fn is_to_sign(&self) -> bool {
        !self.keyring.drained || self.desired != Wanted::Absent
    }
}

impl ActiveKey {
    pub fn new(key: &Key, types: &[String], signer: Signer, requests: BackendMetrics, door: Arc<Door>) -> Self {
        ActiveKey {
            serial: key.serial,
            kid: key.kid.clone(),
            algorithm: key.algorithm,
            public: key.public.clone(),
            backend: key.private.as_ref().map(|private| private.backend.clone()).unwrap_or_default(),
            signer,
            requests,
            headers: types.iter().map(|typ| header(key.algorithm, typ, &key.kid)).collect(),
            door,
        }
    }
}

impl Door {
    /// Lets a finished token out, unless the key was revoked meanwhile. `token` must be quick.
    pub fn leave<T>(&self, token: impl FnOnce() -> T) -> Option<T> {
        self.leaving.fetch_add(1, Ordering::SeqCst);
        let token = (!self.revoked.load(Ordering::SeqCst)).then(token);
        self.leaving.fetch_sub(1, Ordering::SeqCst);
        token
    }

    /// From now on no token of this key leaves.
    pub fn close(&self) {
        self.revoked.store(true, Ordering::SeqCst);
        // What passed the check before the store is through in nanoseconds, unless its thread was preempted.
        while self.leaving.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    pub fn is_closed(&self) -> bool {
        self.revoked.load(Ordering::SeqCst)
    }
}

/// The JOSE header of every token: `alg`, `typ` and `kid` (RFC 7515 §4.1, RFC 8725 §3.11), base64url, with its dot.
fn header(algorithm: Algorithm, typ: &str, kid: &Kid) -> String {
    let header = serde_json::json!({ "alg": algorithm.alg(), "typ": typ, "kid": kid.as_str() });
    let mut encoded = URL_SAFE_NO_PAD.encode(header.to_string());
    encoded.push('.');
    encoded
}

/// A published JWKS, rendered once per change.
pub struct JwksDocument {
    pub body: bytes::Bytes,
    /// Strong entity tag with its quotes (RFC 9110 §8.8.3).
    pub etag: http::HeaderValue,
    pub cache_control: http::HeaderValue,
    pub keys: u32,
    /// The `alg` values in it, for the discovery document.
    pub algs: Vec<&'static str>,
    /// From which keyrings it was rendered.
    pub generations: Generations,
}
