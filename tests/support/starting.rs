//! The start of an engine that a test built itself.

use std::sync::Arc;

use jwksd::engine::{Declared, Engine};

/// As the composition root does it, up to open listeners, and what is due then.
pub async fn start(engine: &Arc<Engine>, declared: &[Declared]) {
    engine.configure(declared).await.unwrap();
    engine.resume().await;
    engine.reconcile_all().await;
    engine.confirm_created().await.unwrap();
    engine.opened().await;
    engine.reconcile_all().await;
}
