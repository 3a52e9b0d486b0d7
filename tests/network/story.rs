//! What happened so far, for whoever has to find out why a token was rejected; and what ends the test.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

/// Shared by everything that runs.
pub struct Story {
    begun: Instant,
    events: Mutex<Vec<String>>,
    failure: watch::Sender<Option<String>>,
    has_ended: AtomicBool,
    revoked: Mutex<BTreeSet<String>>,
    signed_with: Mutex<BTreeSet<String>>,
    pub counts: Counts,
    signers: Mutex<BTreeMap<&'static str, Signer>>,
}

#[derive(Default)]
pub struct Counts {
    pub faults: AtomicU64,
    pub fetches: AtomicU64,
    /// Fetches while no replica was ready.
    pub desperate: AtomicU64,
    pub accepted: AtomicU64,
    /// Checks that came when the token did not live any more: the machine was busy.
    pub late: AtomicU64,
}

/// What came of sign requests to one replica.
#[derive(Clone, Default)]
pub struct Signer {
    pub signed: u64,
    pub refused: u64,
    /// Of the last token.
    pub kid: String,
}

impl Story {
    pub fn new() -> Self {
        Story {
            begun: Instant::now(),
            events: Mutex::default(),
            failure: watch::Sender::new(None),
            has_ended: AtomicBool::new(false),
            revoked: Mutex::default(),
            signed_with: Mutex::default(),
            counts: Counts::default(),
            signers: Mutex::default(),
        }
    }

    pub fn tell(&self, event: impl AsRef<str>) {
        let line = format!("{:7.2} s  {}", self.begun.elapsed().as_secs_f64(), event.as_ref());
        println!("{line}");
        lock(&self.events).push(line);
    }

    /// A fault begins.
    pub fn fault(&self, what: impl AsRef<str>) {
        self.counts.faults.fetch_add(1, Ordering::Relaxed);
        self.tell(what);
    }

    /// Ends the test. The first reason counts.
    pub fn fail(&self, why: String) {
        let first = self.failure.send_if_modified(|failure| {
            let first = failure.is_none() && !self.has_ended.load(Ordering::SeqCst);
            if first {
                *failure = Some(why.clone());
            }
            first
        });
        if first {
            self.tell(format!("FAILED: {why}"));
        }
    }

    /// What fails from now on comes of ending.
    pub fn end(&self) {
        self.has_ended.store(true, Ordering::SeqCst);
    }

    pub async fn failed(&self) -> String {
        let mut failure = self.failure.subscribe();
        let failed = failure.wait_for(Option::is_some).await.expect("the sender lives as long as the story");
        failed.clone().unwrap_or_default()
    }

    /// Tokens of this key may be rejected from now on.
    pub fn revoke(&self, kid: &str) {
        lock(&self.revoked).insert(kid.to_owned());
    }

    pub fn is_revoked(&self, kid: &str) -> bool {
        lock(&self.revoked).contains(kid)
    }

    pub fn signed(&self, replica: &'static str, kid: &str) {
        lock(&self.signed_with).insert(kid.to_owned());
        let mut signers = lock(&self.signers);
        let signer = signers.entry(replica).or_default();
        signer.signed += 1;
        if signer.kid != kid {
            kid.clone_into(&mut signer.kid);
            drop(signers);
            self.tell(format!("{replica} signs with {}", short(kid)));
        }
    }

    pub fn refused(&self, replica: &'static str) {
        lock(&self.signers).entry(replica).or_default().refused += 1;
    }

    pub fn signer(&self, replica: &'static str) -> Signer {
        lock(&self.signers).get(replica).cloned().unwrap_or_default()
    }

    pub fn whole(&self) -> String {
        lock(&self.events).join("\n")
    }

    pub fn summary(&self, rotations: u64) -> String {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut told = String::new();
        let signers = lock(&self.signers);
        let (tokens, refused) = signers.values().fold((0, 0), |(t, r), signer| (t + signer.signed, r + signer.refused));
        let rows = [
            ("seconds", self.begun.elapsed().as_secs()),
            ("faults", count(&self.counts.faults)),
            ("rotations", rotations),
            ("keys that signed", lock(&self.signed_with).len() as u64),
            ("revocations", lock(&self.revoked).len() as u64),
            ("tokens signed", tokens),
            ("signatures refused (503)", refused),
            ("documents fetched", count(&self.counts.fetches)),
            ("of these while no replica was ready", count(&self.counts.desperate)),
            ("verifications", count(&self.counts.accepted)),
            ("verifications that came too late", count(&self.counts.late)),
        ];
        for (what, number) in rows {
            let _ = writeln!(told, "{number:>8}  {what}");
        }
        told
    }
}

/// The beginning of a key's name, for people.
pub fn short(kid: &str) -> &str {
    kid.get(..8).unwrap_or(kid)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
