//! Cleaning up, in the background, what a crash left behind in AWS KMS.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::AWS_KMS;
use crate::backend::aws_kms::{AwsKmsBackend, Owned};
use crate::engine::{Engine, Wanted, chain};
use crate::keyring::time::Span;

/// Between two clean-ups, at most and at least.
const LONGEST_INTERVAL: Span = Span::from_secs(6 * 3600);
const SHORTEST_INTERVAL: Span = Span::SECOND;

/// Cleans up at the start, after creations that failed, and every few hours, while any keyset has keys in AWS KMS.
pub async fn clean_up(engine: Arc<Engine>, backend: Arc<AwsKmsBackend>, stop: CancellationToken) {
    let interval = Span::from_millis(backend.cleanup_after().as_millis() / 4);
    let interval = interval.min(LONGEST_INTERVAL).max(SHORTEST_INTERVAL).to_std();
    loop {
        if uses_aws_kms(&engine) && !engine.is_sealed() && !engine.is_reader() {
            tokio::select! {
                () = once(&engine, &backend) => {}
                () = stop.cancelled() => return,
            }
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = after_a_failure(&backend, interval) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// A creation failed; its leftovers become old enough only after a while, and failures come in rows.
async fn after_a_failure(backend: &AwsKmsBackend, interval: Duration) {
    backend.creation_failed().await;
    tokio::time::sleep(interval.min(backend.cleanup_after().to_std())).await;
}

async fn once(engine: &Arc<Engine>, backend: &AwsKmsBackend) {
    let mut owned = Owned::default();
    for cell in &engine.directory().order {
        owned.add(&cell.snapshot.load().keyring);
    }
    let Some(installation) = engine.installation().map(|installation| installation.id.clone()) else { return };
    match backend.clean_up(&installation, &owned, engine.clock.now()).await {
        Ok(done) if done.scheduled + done.young > 0 => {
            tracing::info!(
                examined = done.examined,
                scheduled = done.scheduled,
                too_young = done.young,
                "looked for leftovers in AWS KMS"
            );
        }
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(error = %chain(&error), "leftovers in AWS KMS could not be looked for; it is tried again");
        }
    }
}

/// Whether a keyset has keys in AWS KMS, or is to have some.
pub(super) fn uses_aws_kms(engine: &Engine) -> bool {
    engine.directory().order.iter().any(|cell| {
        let snapshot = cell.snapshot.load();
        let wanted = matches!(&snapshot.desired, Wanted::Policy(policy) if policy.backend == AWS_KMS);
        let has = |key: &crate::keyring::record::Key| key.private.as_ref().is_some_and(|p| p.backend == AWS_KMS);
        wanted || snapshot.keyring.policy.backend == AWS_KMS || snapshot.keyring.keys.iter().any(has)
    })
}
