//! One fault after the other, and what must hold during and after each.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::fleet::{Face, Fleet, Kind, SIGMA};
use crate::links;
use crate::story::{Story, short};
use crate::support::{PATIENCE, eventually};

/// For what has to wait for timeouts and pauses of its own first.
const LONG: Duration = Duration::from_secs(60);
/// Shorter than S: nobody is to notice.
const BLINK: Duration = Duration::from_secs(1);
/// From the answer to a revocation until no connected replica shows or uses the key any more.
const REVOKED_WITHIN: Duration = Duration::from_secs(1);

pub struct World {
    pub fleet: Fleet,
    pub story: Arc<Story>,
}

impl World {
    /// All of it.
    pub async fn play(&mut self) {
        self.rotations(1).await;
        self.single_links_blink().await;
        self.a_replica_is_cut_off("signer-1").await;
        self.a_replica_is_cut_off("upstream").await;
        self.a_replica_is_cut_off("manager-1").await;
        self.the_network_in_front_is_cut().await;
        self.upstream_loses_one_manager().await;
        self.postgres_stops().await;
        self.postgres_crashes().await;
        self.postgres_is_slow().await;
        self.postgres_hangs().await;
        self.managers_are_killed().await;
        self.signers_are_killed().await;
        self.a_clock_is_ahead().await;
        self.a_clock_is_behind().await;
        self.an_older_copy_takes_the_place_of_the_database().await;
        self.keys_are_revoked().await;
        self.rotations(1).await;
    }

    /// How many keys have become active so far, but for the first.
    pub async fn rotated(&self) -> u64 {
        let keyset = self.keyset().await;
        let keys = keyset["keys"].as_array().expect("keys").iter();
        let active = keys.filter(|key| key["state"] == "active").map(|key| key["serial"].as_u64().expect("a number"));
        active.max().unwrap_or(1) - 1
    }

    async fn single_links_blink(&mut self) {
        for replica in &self.fleet.replicas {
            let name = replica.face.name;
            self.story.fault(format!("the link behind {name} is cut for {BLINK:?}"));
            let before = self.story.signer(name);
            let cut = Instant::now();
            replica.back.cut();
            tokio::time::sleep(BLINK).await;
            replica.back.heal();
            // On a machine that stood still itself it says nothing.
            if replica.face.signs() && cut.elapsed() < 2 * BLINK {
                assert!(self.story.signer(name).signed > before.signed, "{name} signed nothing during {BLINK:?}");
            }
        }
        self.all_is_well().await;
    }

    async fn a_replica_is_cut_off(&mut self, name: &'static str) {
        self.story.fault(format!("the link behind {name} is cut"));
        let replica = self.fleet.of(name);
        replica.back.cut();
        let (face, kind) = (replica.face.clone(), replica.kind);
        if kind != Kind::Manager {
            self.refuses(&face).await;
            self.has_alarm(&face, "stale").await;
        }
        eventually(&format!("{name} to say that it is not ready"), PATIENCE, async || {
            (face.ops("/readyz", PATIENCE).await.ok()?.status == 503).then_some(())
        })
        .await;
        // The second one is to a key that it never saw.
        self.others_rotate(name).await;
        self.others_rotate(name).await;
        let active = self.manager_but(name).await.keyset().await["active_kid"].clone();
        let shown = still_serves(&face).await;
        assert!(!shown.contains(active.as_str().expect("there is one")), "{name} was not cut off: {shown}");
        self.story.tell(format!("the link behind {name} is healed"));
        self.fleet.of(name).back.heal();
        self.all_is_well().await;
    }

    async fn the_network_in_front_is_cut(&mut self) {
        for name in ["signer-2", "manager-2"] {
            self.story.fault(format!("verifiers do not reach {name}"));
            self.fleet.of(name).front.cut();
            self.rotations(1).await;
            self.fleet.of(name).front.heal();
        }
        self.all_is_well().await;
    }

    /// Whichever of the two it asks now.
    async fn upstream_loses_one_manager(&mut self) {
        for manager in ["manager-1", "manager-2"] {
            self.story.fault(format!("upstream and {manager} do not reach each other"));
            let address = self.fleet.of(manager).back_address.clone();
            let upstream = self.fleet.of("upstream");
            let face = upstream.face.clone();
            links::lose(&upstream.namespace, &upstream.back, &address);
            self.rotations(1).await;
            self.signs(&face).await;
            let upstream = self.fleet.of("upstream");
            links::find(&upstream.namespace, &upstream.back, &address);
        }
        self.all_is_well().await;
    }

    async fn postgres_stops(&mut self) {
        self.story.fault("PostgreSQL is stopped");
        self.fleet.postgres.with(|server| server.stop());
        self.everybody_refuses().await;
        self.story.fault("signer-2 is killed and started while PostgreSQL is away");
        let signer = self.fleet.of("signer-2");
        signer.restart().await;
        let face = signer.face.clone();
        still_serves(&face).await;
        self.refuses(&face).await;
        self.story.tell("PostgreSQL is started");
        self.fleet.postgres.with(|server| server.resume());
        self.all_is_well().await;
    }

    async fn postgres_crashes(&mut self) {
        self.story.fault("PostgreSQL crashes and is started again");
        self.fleet.postgres.with(|server| server.kill());
        self.fleet.postgres.with(|server| server.resume());
        self.all_is_well().await;
    }

    /// It stands still for three fifths of the time.
    async fn postgres_is_slow(&mut self) {
        self.story.fault("PostgreSQL is slow");
        let before = self.rotated().await;
        eventually("a rotation over a slow PostgreSQL", LONG, async || {
            let paused = self.fleet.postgres.with(|server| server.pause());
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(paused);
            tokio::time::sleep(Duration::from_millis(200)).await;
            (self.rotated().await > before).then_some(())
        })
        .await;
        self.all_is_well().await;
    }

    /// Connections stay open, and nothing answers.
    async fn postgres_hangs(&mut self) {
        self.story.fault("PostgreSQL hangs");
        let paused = self.fleet.postgres.with(|server| server.pause());
        self.everybody_refuses().await;
        self.story.tell("PostgreSQL goes on");
        drop(paused);
        self.all_is_well().await;
    }

    async fn managers_are_killed(&mut self) {
        for name in ["manager-1", "manager-2"] {
            self.story.fault(format!("{name} is killed"));
            self.fleet.of(name).kill();
            self.rotations(1).await;
            self.fleet.of(name).start().await;
            self.all_is_well().await;
        }
        self.story.fault("both managers are killed");
        self.fleet.of("manager-1").kill();
        self.fleet.of("manager-2").kill();
        let (upstream, signer) = (self.fleet.of("upstream").face.clone(), self.fleet.of("signer-1").face.clone());
        self.refuses(&upstream).await;
        still_serves(&upstream).await;
        self.signs(&signer).await;
        self.fleet.of("manager-1").start().await;
        self.fleet.of("manager-2").start().await;
        self.all_is_well().await;
    }

    async fn signers_are_killed(&mut self) {
        for name in ["signer-1", "signer-2", "upstream"] {
            self.story.fault(format!("{name} is killed and started"));
            self.fleet.of(name).restart().await;
            let face = self.fleet.of(name).face.clone();
            self.signs(&face).await;
        }
        self.all_is_well().await;
    }

    async fn a_clock_is_ahead(&mut self) {
        let face = self.starts_with_a_wrong_clock("signer-2", 3.0 * SIGMA).await;
        self.refuses(&face).await;
        self.others_rotate("signer-2").await;
        self.gets_the_right_clock_again(&face).await;
    }

    /// It remembers a later time, and goes on from there: what it signs, if that is near enough, is as good as others'.
    async fn a_clock_is_behind(&mut self) {
        let face = self.starts_with_a_wrong_clock("signer-2", -3.0 * SIGMA).await;
        eventually("the frozen clock", PATIENCE, async || {
            (face.metric("jwksd_clock_frozen", &[]).await > 0.0).then_some(())
        })
        .await;
        self.others_rotate("signer-2").await;
        self.gets_the_right_clock_again(&face).await;
    }

    async fn starts_with_a_wrong_clock(&mut self, name: &str, skew: f64) -> Arc<Face> {
        self.story.fault(format!("{name} starts with a clock that is {skew:+} s off"));
        let signer = self.fleet.of(name);
        signer.skew = skew;
        signer.restart().await;
        signer.face.clone()
    }

    async fn gets_the_right_clock_again(&mut self, face: &Face) {
        still_serves(face).await;
        self.story.tell("its clock is right again");
        let signer = self.fleet.of(face.name);
        signer.skew = 0.0;
        signer.restart().await;
        self.all_is_well().await;
        assert!(face.metric("jwksd_clock_frozen", &[]).await < 1.0, "the clock of {} is frozen", face.name);
    }

    async fn an_older_copy_takes_the_place_of_the_database(&mut self) {
        self.story.fault("PostgreSQL is stopped for a copy");
        self.fleet.postgres.with(|server| {
            server.stop();
            server.keep_copy("older");
            server.resume();
        });
        self.all_is_well().await;
        self.rotations(2).await;
        self.story.fault("the copy takes the place of PostgreSQL's files");
        self.fleet.postgres.with(|server| {
            server.stop();
            server.exchange("older");
            server.resume();
        });
        let older = self.fleet.postgres.documents().await;
        let published = self.active().await;
        for face in self.fleet.faces() {
            self.has_alarm(&face, "frozen").await;
        }
        self.everybody_refuses().await;
        for face in self.fleet.faces() {
            let served = face.jwks(PATIENCE).await.expect("it is connected").text;
            assert!(served.contains(&published), "{} does not serve the last good keys: {served}", face.name);
        }
        assert_eq!(self.fleet.postgres.documents().await, older, "the older copy was written to");
        self.story.tell("the newer files are put back");
        self.fleet.postgres.with(|server| {
            server.stop();
            server.exchange("older");
            server.resume();
        });
        self.all_is_well().await;
        for face in self.fleet.faces() {
            assert!(face.metric("jwksd_alarms", &[("alarm", "frozen")]).await < 1.0, "{} is frozen", face.name);
        }
    }

    /// The one thing here that is judged by the clock: by the best of three, as the machine may be busy.
    async fn keys_are_revoked(&mut self) {
        let mut best = Duration::MAX;
        for manager in ["manager-1", "manager-2", "manager-1"] {
            let manager = self.fleet.of(manager).face.clone();
            let kid = self.revocable(&manager).await;
            self.story.revoke(&kid);
            self.story.tell(format!("{} revokes {}", manager.name, short(&kid)));
            let answer = manager.admin(Method::POST, &revoke(&kid), Some(json!({ "reason": "it leaked" }))).await;
            let answered = Instant::now();
            join_all(self.fleet.faces().iter().map(|face| without(face, &kid))).await;
            self.story.tell(format!("nobody shows or uses it any more after {:?}", answered.elapsed()));
            assert_eq!(answer["unpropagated"], false, "{answer}");
            best = best.min(answered.elapsed());
            self.all_is_well().await;
        }
        assert!(best <= REVOKED_WITHIN, "the quickest of three revocations took {best:?}");
    }

    /// An active key whose successor all verifiers know.
    async fn revocable(&self, manager: &Face) -> String {
        eventually("a successor that every verifier knows", LONG, async || {
            let kid = manager.keyset().await["active_kid"].as_str()?.to_owned();
            let answer = manager.admin(Method::POST, &revoke(&kid), Some(json!({ "dry_run": true }))).await;
            (answer["unpropagated"] == false).then_some(kid)
        })
        .await
    }

    async fn active(&self) -> String {
        self.keyset().await["active_kid"].as_str().expect("there is one").to_owned()
    }

    /// As a manager that runs tells it.
    async fn keyset(&self) -> Value {
        self.manager_but("").await.keyset().await
    }

    async fn manager_but(&self, name: &str) -> Arc<Face> {
        let managers = self.fleet.replicas.iter().filter(|replica| replica.kind == Kind::Manager);
        let mut faces = managers.map(|replica| replica.face.clone()).filter(|face| face.is_up() && face.name != name);
        faces.next().expect("one of the two runs")
    }

    /// Waits for so many more.
    async fn rotations(&self, more: u64) {
        let before = self.rotated().await;
        eventually("a rotation", LONG, async || (self.rotated().await >= before + more).then_some(())).await;
    }

    /// Waits for a rotation without one of the replicas.
    async fn others_rotate(&self, name: &str) {
        let manager = self.manager_but(name).await;
        let before = manager.keyset().await["active_kid"].clone();
        let what = format!("a rotation without {name}");
        eventually(&what, LONG, async || (manager.keyset().await["active_kid"] != before).then_some(())).await;
    }

    /// Waits until every signer signs, every replica is ready, and nothing is frozen; then for a rotation in peace.
    async fn all_is_well(&self) {
        for face in self.fleet.faces() {
            eventually(&format!("{} to be ready again", face.name), LONG, async || {
                (face.ops("/readyz", PATIENCE).await.ok()?.status == 200).then_some(())
            })
            .await;
            if face.signs() {
                self.signs(&face).await;
            }
        }
        self.story.tell("all is well");
    }

    /// Waits for tokens that were asked for from now on.
    async fn signs(&self, face: &Face) {
        // The first of them may have been under way.
        let enough = self.story.signer(face.name).signed + 2;
        let what = format!("{} to sign", face.name);
        eventually(&what, LONG, async || (self.story.signer(face.name).signed >= enough).then_some(())).await;
    }

    async fn refuses(&self, face: &Face) {
        let what = format!("{} to refuse to sign", face.name);
        let mut before = self.story.signer(face.name);
        eventually(&what, LONG, async || {
            let now = self.story.signer(face.name);
            if now.signed != before.signed {
                before = now;
                return None;
            }
            (now.refused >= before.refused + 3).then_some(())
        })
        .await;
        self.story.tell(format!("{} does not sign", face.name));
    }

    /// Every signer, while all go on publishing.
    async fn everybody_refuses(&self) {
        for face in self.fleet.faces() {
            if face.signs() {
                self.refuses(&face).await;
            }
        }
        for face in self.fleet.faces() {
            still_serves(&face).await;
        }
    }

    async fn has_alarm(&self, face: &Face, alarm: &str) {
        let what = format!("the alarm {alarm} of {}", face.name);
        eventually(&what, LONG, async || (face.metric("jwksd_alarms", &[("alarm", alarm)]).await > 0.0).then_some(()))
            .await;
        self.story.tell(format!("{} raises {alarm}", face.name));
    }
}

fn revoke(kid: &str) -> String {
    format!("/keys/{kid}/revoke")
}

/// What does not end with signing.
async fn still_serves(face: &Face) -> String {
    let jwks = face.jwks(PATIENCE).await.expect("it is connected in front");
    assert_eq!(jwks.status, 200, "{}: {}", face.name, jwks.text);
    let alive = face.ops("/livez", PATIENCE).await.expect("it is connected in front");
    assert_eq!(alive.status, 200, "{}: {}", face.name, alive.text);
    jwks.text
}

/// Waits until a replica neither publishes a key nor signs with it.
async fn without(face: &Face, kid: &str) {
    eventually(&format!("{} to do without {kid}", face.name), LONG, async || {
        let shown = face.jwks(PATIENCE).await.ok()?;
        let used = if face.signs() { face.sign(1).await.ok()?.text } else { String::new() };
        (!shown.text.contains(kid) && !used.contains(kid)).then_some(())
    })
    .await;
}
