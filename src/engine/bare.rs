//! An engine without keysets, for unit tests of what stands around it.

use std::sync::Arc;

use super::{Engine, ReplicaRole, Settings};
use crate::clock::{Clock, TrustedClock};
use crate::keyring::time::{Span, Timestamp};
use crate::seal::KeyEncryptionKey;
use crate::seal::file::FileKey;
use crate::store::ledger::{Ledger, SealEvidence};
use crate::store::memory::MemoryStore;
use crate::telemetry::metrics::Metrics;

pub(crate) async fn bare_engine(clock: Arc<dyn Clock>) -> Arc<Engine> {
    let seal = async || Ok(Arc::new(FileKey::ephemeral()) as Arc<dyn KeyEncryptionKey>);
    let store = Arc::new(MemoryStore::new());
    let ledger = Ledger::initialise(store, SealEvidence::Missing, seal, Timestamp::EPOCH).await;
    let ledger = ledger.expect("a store in memory takes everything");
    let clock = Arc::new(TrustedClock::new(clock, Span::SECOND));
    let settings = Settings {
        sign_deadline: Span::SECOND,
        audit_signatures: false,
        pool_size: 1,
        role: ReplicaRole::All,
        publishes: true,
    };
    Engine::new(clock, Arc::new(ledger), [], None, Arc::new(Metrics::new()), settings)
}
