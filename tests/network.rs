//! Real replicas and a real PostgreSQL in networks of their own, while links are cut, servers stop, and clocks differ.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "network/fleet.rs"]
mod fleet;
#[path = "network/links.rs"]
mod links;
mod support;

use fleet::Fleet;
use links::Namespace;

#[test]
fn no_valid_token_is_rejected() {
    // All of this process that takes part lives in a namespace of its own, in which addresses are free.
    Namespace::new().run(|| {
        let runtime = tokio::runtime::Runtime::new().expect("threads can be started");
        runtime.block_on(async {
            let mut fleet = Fleet::start().await;
            for face in fleet.faces() {
                println!("{} {}", face.name, face.jwks(support::PATIENCE).await.unwrap().text);
                if face.signs() { println!("{:?}", face.sign(4).await); }
            }
            println!("{}", fleet.of("manager-1").face.keyset().await);
            tokio::time::sleep(std::time::Duration::from_secs(12)).await;
            for r in &fleet.replicas { println!("{}", r.transcript(50)); }
            for face in fleet.faces() {
                println!("{} {}", face.name, face.jwks(support::PATIENCE).await.unwrap().text);
                if face.signs() { println!("{:?}", face.sign(4).await); }
            }
        });
    });
}
