//! The hub goes back to an older copy, every replica freezes, and `jwksd recover` over the running fleet thaws it.

use std::collections::BTreeMap;

use jwksd::store::ledger::{Evidence, RecoverError, RecoveryOutcome, RecoveryRequest, recover_store};
use jwksd::store::split::Split;

use super::*;

/// A replica whose own store the test keeps.
async fn join_with_memory(world: &mut World, role: ReplicaRole) -> Arc<MemoryStore> {
    let (clock, own) = (world.clock(), Arc::new(MemoryStore::new()));
    let link = world.common.hub.link();
    let replica = world.common.start_over(role, &clock, &[("default", policy())], link, own.clone()).await;
    world.replicas.push(replica);
    own
}

async fn recover(
    world: &World,
    evidence: &[&Arc<MemoryStore>],
    lose_newer: bool,
) -> Result<RecoveryOutcome, RecoverError> {
    let store = Arc::new(Split::new(world.common.hub.link(), Arc::new(MemoryStore::new())));
    let copy = |own: &&Arc<MemoryStore>| Evidence { store: (*own).clone(), label: "a replica's copies".to_owned() };
    let evidence: Vec<Evidence> = evidence.iter().map(copy).collect();
    let served = BTreeMap::new();
    let now = world.replicas[0].engine.clock.now();
    let request = RecoveryRequest {
        evidence: &evidence,
        served: &served,
        lose_newer,
        dry_run: false,
        actor: "recover",
        reason: None,
        now,
    };
    recover_store(store, std::slice::from_ref(&world.common.seal), &request).await
}

#[tokio::test]
async fn replicas_thaw_by_themselves_when_their_history_is_recovered_and_rotate_on() {
    let mut world = World::with(&[MANAGER, ALL]).await;
    let kept = join_with_memory(&mut world, SIGNER).await;
    world.pass(Span::from_secs(20)).await;
    let copy = world.common.hub.copy();
    let rotate = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };
    world.replicas[0].command(rotate).await.unwrap();
    world.tick().await;
    let issued = world.replicas[2].sign().await.unwrap();
    world.common.hub.restore(&copy);
    world.pass(Span::from_secs(5)).await;
    assert!(world.replicas.iter().all(|replica| replica.frozen().is_some()));

    let alone = recover(&world, &[], false).await;
    assert!(matches!(alone, Err(RecoverError::NewerSeen { .. })), "{:?}", alone.err());
    let done = recover(&world, &[&kept], false).await.unwrap();
    assert_eq!(done.keysets.len(), 1);
    assert!(done.unusable.is_empty(), "{:?}", done.unusable);
    world.pass(Span::from_secs(2)).await;
    for replica in &world.replicas {
        assert_eq!(replica.frozen(), None);
        assert_eq!(replica.sign().await.unwrap().kid, issued.kid, "the key that signed signs on");
        assert!(replica.served().unwrap().contains(&issued.kid.to_string()));
    }
    let active = world.replicas[0].active();
    for _ in 0..60 {
        world.pass(Span::from_secs(2)).await;
        world.assert_agreement().await;
    }
    assert_ne!(world.replicas[0].active(), active);
    assert!(world.replicas.iter().all(|replica| replica.frozen().is_none()));
    assert!(recover(&world, &[&kept], false).await.unwrap().is_nothing());
}

#[tokio::test]
async fn a_replica_that_saw_a_revocation_stays_frozen_until_the_record_knows_of_it() {
    let mut world = World::with(&[MANAGER]).await;
    let kept = join_with_memory(&mut world, SIGNER).await;
    world.pass(Span::from_secs(20)).await;
    let copy = world.common.hub.copy();
    let issued = world.replicas[1].sign().await.unwrap();
    let serial = world.replicas[1].active().unwrap();
    world.replicas[0].command(Intent::Revoke { serial }).await.unwrap();
    world.pass(Span::from_secs(2)).await;
    world.common.hub.restore(&copy);
    world.pass(Span::from_secs(5)).await;

    // Without anything that knows of the revocation.
    let done = recover(&world, &[], true).await.unwrap();
    assert_eq!(done.keysets.len(), 1);
    world.pass(Span::from_secs(5)).await;
    for replica in &world.replicas {
        let frozen = replica.frozen().unwrap();
        assert!(frozen.contains("does not know that the key") && frozen.contains(&issued.kid.to_string()), "{frozen}");
        assert!(!replica.served().unwrap().contains(&issued.kid.to_string()));
    }
    // What a replica refused it did not take for its copy: that still knows.
    let done = recover(&world, &[&kept], false).await.unwrap();
    assert_eq!(done.keysets[0].recovered.revoked.len(), 1);
    world.pass(Span::from_secs(5)).await;
    for replica in &world.replicas {
        assert_eq!(replica.frozen(), None);
        assert_ne!(replica.sign().await.unwrap().kid, issued.kid);
        assert!(!replica.served().unwrap().contains(&issued.kid.to_string()));
    }
}
