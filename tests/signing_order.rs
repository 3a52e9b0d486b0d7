//! Signatures that keep a processor for some tenths of a millisecond are made where the request is: whoever else is ready goes
//! before the next one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "support/local_keys.rs"]
mod local_keys;
#[path = "support/policy.rs"]
mod policy;
#[path = "support/starting.rs"]
mod starting;

use std::io::Write as _;
use std::os::unix::net::UnixStream as Writer;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, LocalSigner, Signer, StoredKey};
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::{Declared, Engine, ReplicaRole, Settings};
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::Bootstrap;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::file::FileKey;
use jwksd::seal::{KeyEncryptionKey, SealError};
use jwksd::store::ledger::{Ledger, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::telemetry::metrics::Metrics;
use local_keys::LocalKeys;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixStream;

#[derive(Default)]
struct Made {
    order: Mutex<Vec<&'static str>>,
    /// Where the last one was made.
    thread: Mutex<Option<ThreadId>>,
    /// A request that arrives while the first slow signature is made.
    arrives: Mutex<Option<Writer>>,
}

struct Noted {
    signer: Arc<dyn LocalSigner>,
    made: Arc<Made>,
    what: &'static str,
}

impl LocalSigner for Noted {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, BackendError> {
        self.made.order.lock().unwrap().push(self.what);
        *self.made.thread.lock().unwrap() = Some(std::thread::current().id());
        if self.what == "slow"
            && let Some(mut arrives) = self.made.arrives.lock().unwrap().take()
        {
            arrives.write_all(b"!").unwrap();
        }
        self.signer.sign(message)
    }
}

/// Signatures are noted; those of the keyset `slow` are made in turn, those of `slowest` on threads.
fn noted(key: &StoredKey, signer: Arc<dyn LocalSigner>, made: &Arc<Made>) -> Signer {
    let noted = |what| Arc::new(Noted { signer, made: made.clone(), what });
    match key.identity.keyset.as_str() {
        "slow" => Signer::InTurn(noted("slow")),
        "slowest" => Signer::Pooled(noted("slowest")),
        _ => Signer::Inline(noted("quick")),
    }
}

/// An engine with the keysets `slow`, `slowest` and `quick`, which sign.
async fn engine(made: &Arc<Made>, pool_size: usize) -> Arc<Engine> {
    let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
    let trusted = Arc::new(TrustedClock::new(clock, Span::SECOND));
    let seal: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
    let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> { Ok(seal) };
    let store = Arc::new(MemoryStore::new());
    let ledger = Ledger::initialise(store, SealEvidence::Missing, make, trusted.now()).await;
    let ledger = Arc::new(ledger.unwrap());
    let (keys, made) = (LocalBackend::new(ledger.keys()), made.clone());
    let open = move |key: &StoredKey, signer| noted(key, signer, &made);
    let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalKeys { name: "local", keys, open })];
    let settings = Settings {
        sign_deadline: Span::MINUTE,
        audit_signatures: false,
        pool_size,
        role: ReplicaRole::All,
        publishes: true,
    };
    let engine = Engine::new(trusted, ledger, backends, None, Arc::new(Metrics::new()), settings);
    let declared = ["slow", "slowest", "quick"].map(|name| {
        let mut policy = policy::policy(name, &format!("https://example.com/{name}"));
        policy.rotation.bootstrap = Bootstrap::Immediate;
        Declared { name: Name::parse(name).unwrap(), policy: Arc::new(policy), fits: true }
    });
    starting::start(&engine, &declared).await;
    engine
}

async fn sign(engine: &Engine, keyset: &str) {
    let request = parse_request(br#"{"claims":{"sub":"s"}}"#).unwrap();
    let cell = engine.keyset(keyset).unwrap();
    engine.sign(&cell, &request, None, "test").await.unwrap();
}

/// Twenty requests for slow signatures wait; during the first a quick one arrives over a socket, which a server would only see
/// by asking the system. One thread serves them all.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_arrives_during_a_slow_signature_goes_before_the_next_one() {
    const SLOW: usize = 20;
    for pool_size in [1, 4] {
        let made = Arc::new(Made::default());
        let engine = engine(&made, pool_size).await;
        let (writer, reader) = Writer::pair().unwrap();
        *made.arrives.lock().unwrap() = Some(writer);
        reader.set_nonblocking(true).unwrap();
        let mut reader = UnixStream::from_std(reader).unwrap();
        let quick = tokio::spawn({
            let engine = engine.clone();
            async move {
                reader.read_exact(&mut [0]).await.unwrap();
                sign(&engine, "quick").await;
            }
        });
        let slow: Vec<_> = (0..SLOW)
            .map(|_| {
                let engine = engine.clone();
                tokio::spawn(async move { sign(&engine, "slow").await })
            })
            .collect();
        for task in slow.into_iter().chain([quick]) {
            task.await.unwrap();
        }
        let order = made.order.lock().unwrap();
        assert_eq!(order.len(), SLOW + 1);
        let at = order.iter().position(|what| *what == "quick").unwrap();
        assert!(at <= pool_size, "the quick one came after {at} slow ones, where {pool_size} may be under way");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn only_the_slowest_signatures_are_made_on_other_threads() {
    let made = Arc::new(Made::default());
    let engine = engine(&made, 1).await;
    let asking = tokio::spawn(async move {
        let own = std::thread::current().id();
        for (keyset, elsewhere) in [("quick", false), ("slow", false), ("slowest", true)] {
            sign(&engine, keyset).await;
            assert_eq!(*made.thread.lock().unwrap() != Some(own), elsewhere, "{keyset}");
        }
    });
    asking.await.unwrap();
}
