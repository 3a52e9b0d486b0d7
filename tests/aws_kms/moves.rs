//! A keyset that changes its backend while its keys are published.

use super::account::keys;
use super::{Trial, request, tables};

#[tokio::test(flavor = "multi_thread")]
async fn a_keyset_moves_from_local_keys_to_kms_and_back_without_losing_any() {
    let mut trial = Trial::prepare().await;
    let remote = tables(&trial.proxy, "24h");
    let local = remote.replace("backend = \"aws-kms\"", "backend = \"local\"");
    trial.daemon.set_tables(&local);
    trial.daemon.restart().await;
    trial.settled().await;
    assert!(trial.proxy.calls().is_empty(), "AWS KMS is not asked before it is used: {:?}", trial.proxy.calls());
    let first = trial.daemon.sign("main", request()).await.kid;

    for (tables, backend) in [(&remote, "aws-kms"), (&local, "local")] {
        trial.daemon.set_tables(tables);
        trial.daemon.restart().await;
        trial.settled().await;
        assert!(trial.jwks_kids().await.contains(&first), "keys stay where they were made");
        // The two that waited are of the former backend; the third is of this one.
        for _ in 0..3 {
            assert_eq!(trial.rotate().await.status, 200);
            trial.settled().await;
            trial.daemon.sign("main", request()).await;
        }
        let labels = [("keyset", "main"), ("backend", backend)];
        let signed = trial.daemon.metrics().await.sum("jwksd_signatures_total", &labels);
        assert!(signed.is_some_and(|signed| signed >= 1.0), "{backend}: {signed:?}");
    }
    assert_eq!(keys(&trial.account).await.len(), 3, "made while the keyset had that backend");
}
