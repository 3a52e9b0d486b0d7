//! A backend whose keys stay elsewhere until they are destroyed, and whose creations can be held up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::backend::local::LocalBackend;
use jwksd::backend::{Backend, BackendError, CreatedKey, KeyIdentity, Signer, StoredKey};
use jwksd::engine::ReplicaRole;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::decide::Intent;
use jwksd::keyring::record::KeyState;
use jwksd::keyring::time::Span;
use tokio::sync::Notify;

use super::World;

/// Lets creations pass while it is open.
#[derive(Default)]
pub struct Gate {
    closed: AtomicBool,
    reached: Notify,
    opened: Notify,
}

impl Gate {
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
    }

    pub fn open(&self) {
        self.closed.store(false, SeqCst);
        self.opened.notify_one();
    }

    /// Waits until a creation stands before it.
    pub async fn reached(&self) {
        self.reached.notified().await;
    }

    async fn pass(&self) {
        if self.closed.load(SeqCst) {
            self.reached.notify_one();
            self.opened.notified().await;
        }
    }
}

pub struct Held {
    pub keys: LocalBackend,
    pub gate: Arc<Gate>,
}

#[async_trait]
impl Backend for Held {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn create(&self, identity: &KeyIdentity, algorithm: Algorithm) -> Result<CreatedKey, BackendError> {
        self.gate.pass().await;
        self.keys.create(identity, algorithm).await
    }

    fn left_over(&self, _identity: &KeyIdentity, key: &CreatedKey) -> Option<String> {
        Some(key.handle.clone())
    }

    async fn open(&self, key: &StoredKey) -> Result<Signer, BackendError> {
        self.keys.open(key).await
    }

    async fn destroy(&self, key: &StoredKey) -> Result<(), BackendError> {
        self.keys.destroy(key).await
    }
}

/// It knows nothing of the drain when it wants to add the key, and loses against what drained the keyset.
#[tokio::test]
async fn a_key_elsewhere_that_another_replica_overtook_is_destroyed() {
    let mut world = World::new();
    let gate = Arc::<Gate>::default();
    world.common.gate = Some(gate.clone());
    let first = world.join(ReplicaRole::Manager).await;
    let second = world.join(ReplicaRole::Manager).await;
    world.pass(Span::from_secs(30)).await;
    let (first, second) = (&world.replicas[first], &world.replicas[second]);
    let next = first.cell().snapshot.load().keyring.next_serial;
    gate.close();
    let (engine, clocks) = (first.engine.clone(), world.clocks.clone());
    let ticks = tokio::spawn(async move {
        loop {
            clocks.iter().for_each(|clock| clock.advance(Span::from_millis(500)));
            let _ = engine.look_at_store(Span::ZERO).await;
            let _ = engine.attend_once().await;
            engine.reconcile_all().await;
            engine.pulse().await;
        }
    });
    tokio::time::timeout(Duration::from_secs(30), gate.reached()).await.expect("a successor is made");
    second.engine.look_at_store(Span::ZERO).await.unwrap();
    second.command(Intent::Drain).await.unwrap();
    gate.open();
    let ended = async {
        loop {
            let keyring = first.cell().snapshot.load().keyring.clone();
            if let Some(key) = keyring.key(next) {
                return (key.state, key.published_at.is_some(), keyring.drained);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(30), ended).await.expect("the key joins");
    ticks.abort();
    assert_eq!(ended, (KeyState::Retired, false, true));
}
