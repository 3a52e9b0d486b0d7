//! Everything of one kind that a directory has.

use std::ops::Deref;

#[cfg(test)]
#[path = "../../tests/support/policy.rs"]
mod policy;

/// All keysets, or all issuers, in their order. To look at them is to walk over thousands: nothing that concerns one
/// keyset does. Unit tests count how often this thread did.
#[derive(Clone)]
pub struct All<T>(Vec<T>);

impl<T> All<T> {
    pub(super) fn push(&mut self, item: T) {
        self.0.push(item);
    }
}

impl<T> Default for All<T> {
    fn default() -> Self {
        All(Vec::new())
    }
}

impl<T> Deref for All<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        #[cfg(test)]
        tests::WALKS.set(tests::WALKS.get() + 1);
        &self.0
    }
}

impl<'a, T> IntoIterator for &'a All<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use crate::backend::Backend;
    use crate::backend::local::LocalBackend;
    use crate::clock::{ManualClock, TrustedClock};
    use crate::engine::{Declared, Engine, ReplicaRole, Settings};
    use crate::keyring::claims::parse_request;
    use crate::keyring::decide::{Intent, Request};
    use crate::keyring::name::Name;
    use crate::keyring::time::{Span, Timestamp};
    use crate::seal::KeyEncryptionKey;
    use crate::seal::file::FileKey;
    use crate::store::ledger::{Ledger, SealEvidence};
    use crate::store::memory::MemoryStore;
    use crate::telemetry::metrics::Metrics;

    thread_local! {
        pub(super) static WALKS: Cell<usize> = const { Cell::new(0) };
    }

    const START: Timestamp = Timestamp::from_secs(1_800_000_000);

    /// How often everything was walked over for one token, one JWKS, one rotation with its successor, one revocation,
    /// one look at a keyset; for one scrape, one heartbeat, one start.
    #[derive(Debug, PartialEq, Eq)]
    struct Walks {
        token: usize,
        jwks: usize,
        rotation: usize,
        revocation: usize,
        look: usize,
        scrape: usize,
        beat: usize,
        start: usize,
    }

    async fn walks(keysets: usize) -> Walks {
        let clock = ManualClock::at(START);
        let trusted = Arc::new(TrustedClock::new(clock.clone(), Span::SECOND));
        let seal = async || Ok(Arc::new(FileKey::ephemeral()) as Arc<dyn KeyEncryptionKey>);
        let store = Arc::new(MemoryStore::new());
        let ledger = Ledger::initialise(store, SealEvidence::Missing, seal, START).await.unwrap();
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(ledger.keys()))];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let engine = Engine::new(trusted, Arc::new(ledger), backends, None, Arc::new(Metrics::new()), settings);
        let declared: Vec<Declared> = (0..keysets).map(declare).collect();
        let count = || WALKS.replace(0);
        count();
        engine.configure(&declared).await.unwrap();
        engine.resume().await;
        engine.reconcile_all().await;
        engine.confirm_created().await.unwrap();
        engine.opened().await;
        engine.reconcile_all().await;
        let start = count();
        // Until the successors have propagated, without a silence.
        for _ in 0..20 {
            clock.advance(Span::from_millis(500));
            engine.pulse().await;
        }
        engine.reconcile_all().await;
        let cell = engine.keyset("keyset-3").unwrap();
        count();
        let body = br#"{"claims":{"sub":"a","aud":"b"}}"#;
        engine.sign(&cell, &parse_request(body).unwrap(), None, "test").await.unwrap();
        let token = count();
        let directory = engine.directory();
        assert_eq!(directory.routes["/i1/.well-known/jwks.json"].issuer.served().unwrap().keys, 4);
        let jwks = count();
        let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
        engine.command(&cell, request(rotate)).await.unwrap();
        engine.reconcile(&cell).await;
        let rotation = count();
        let serial = cell.snapshot.load().keyring.active().unwrap().serial;
        engine.command(&cell, request(Intent::Revoke { serial })).await.unwrap();
        engine.reconcile(&cell).await;
        let revocation = count();
        engine.look(&cell);
        let look = count();
        engine.refresh_all_metrics();
        engine.metrics.render(None);
        let scrape = count();
        engine.pulse().await;
        let beat = count();
        Walks { token, jwks, rotation, revocation, look, scrape, beat, start }
    }

    fn request(intent: Intent) -> Request {
        let actor = "operator".to_owned();
        Request { intent, actor, reason: None, dry_run: false, if_generation: None, idempotency: None }
    }

    /// Two to an issuer.
    fn declare(number: usize) -> Declared {
        let issuer = format!("i{}", number / 2);
        let policy = super::policy::policy(&issuer, &format!("https://issuer.example/{issuer}"));
        Declared { name: Name::parse(&format!("keyset-{number}")).unwrap(), policy: Arc::new(policy), fits: true }
    }

    #[tokio::test]
    async fn what_concerns_one_keyset_walks_over_nothing_and_what_concerns_all_over_each_once() {
        let [few, many] = [walks(4).await, walks(16).await];
        let per_keyset = [many.token, many.jwks, many.rotation, many.revocation, many.look];
        assert_eq!(per_keyset, [0; 5], "{many:?}");
        assert_eq!(few, many, "a walk over all for each of all");
    }
}
