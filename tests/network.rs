//! Five real replicas (two managers, three signers, one of them upstream) and a real PostgreSQL in network namespaces of
//! their own, rotating every nine seconds, while links are cut, servers stop, and clocks differ. Applications sign all the
//! time; verifiers that cache as declared fetch from whichever replica is ready. No token that lives is ever rejected.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "network/faults.rs"]
mod faults;
#[path = "network/fleet.rs"]
mod fleet;
#[path = "network/links.rs"]
mod links;
#[path = "network/load.rs"]
mod load;
#[path = "simulation/random.rs"]
mod random;
#[path = "network/story.rs"]
mod story;
mod support;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt as _;

use faults::World;
use fleet::Fleet;
use links::Namespace;
use random::Random;
use story::Story;

#[test]
fn no_valid_token_is_rejected_whatever_happens_to_the_network_the_database_and_the_replicas() {
    // Whatever of this process takes part lives in a namespace of its own, where every address is free.
    Namespace::new().run(|| {
        let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
        runtime.block_on(play());
    });
}

async fn play() {
    let seed = Random::from_system();
    println!("the verifiers' seed: {seed}");
    let story = Arc::new(Story::new());
    let mut world = World { fleet: Fleet::start().await, story: story.clone() };
    load::start(&story, &world.fleet.faces(), seed);
    let outcome = tokio::select! {
        played = AssertUnwindSafe(world.play()).catch_unwind() => played.map_err(|_| "see the panic above".to_owned()),
        failure = story.failed() => Err(failure),
    };
    if let Err(failure) = outcome {
        story.end();
        let logs: Vec<String> = world.fleet.replicas.iter().map(|replica| replica.transcript(25)).collect();
        panic!("{failure}\n{}\n{}", story.whole(), logs.join("\n"));
    }
    story.end();
    let rotations = world.rotated().await;
    println!("{}", story.summary(rotations));
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let (accepted, late) = (count(&story.counts.accepted), count(&story.counts.late));
    assert!(accepted > 1000 && accepted > late, "the machine is too busy to prove anything: {accepted}, {late} late");
    assert!(rotations >= 15, "{rotations} rotations");
}
