//! Which of several managers tells receivers what becomes of keys.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use jwksd::config::{Receiver, SecretSource};
use jwksd::engine::ReplicaRole;
use jwksd::engine::notices::{Addressee, Deliver, NotDelivered};
use jwksd::keyring::decide::Intent;
use jwksd::keyring::name::Name;
use jwksd::keyring::notice::{Event, Notice};
use jwksd::keyring::time::Span;
use jwksd::store::shared::{Report, SharedStore};
use tokio_util::sync::CancellationToken;

use super::World;
use super::hub::Link;
use super::replica::Replica;

/// Counts what it takes, unless it is to refuse.
#[derive(Default)]
struct Desk {
    taken: Mutex<usize>,
    refuses: Mutex<Option<NotDelivered>>,
}

#[async_trait]
impl Deliver for Desk {
    async fn deliver(&self, _: &Notice, _: jwksd::keyring::time::Timestamp) -> Result<(), NotDelivered> {
        match self.refuses.lock().unwrap().clone() {
            Some(refusal) => Err(refusal),
            None => {
                *self.taken.lock().unwrap() += 1;
                Ok(())
            }
        }
    }
}

/// A manager, and another one that is there by its reports alone.
struct Site {
    world: World,
    other: Arc<Link>,
    desk: Arc<Desk>,
    stop: CancellationToken,
}

impl Site {
    async fn start() -> Site {
        let mut world = World::new();
        world.join(ReplicaRole::Manager).await;
        world.pass(Span::from_secs(20)).await;
        let other = world.common.hub.link();
        Site { world, other, desk: Arc::default(), stop: CancellationToken::new() }
    }

    fn manager(&self) -> &Replica {
        &self.world.replicas[0]
    }

    /// From now on there is a receiver.
    async fn tell(&self) {
        let receiver = Receiver {
            name: Name::parse("desk").unwrap(),
            url: "https://desk.example".to_owned(),
            secret: SecretSource::Environment("UNUSED".to_owned()),
            events: vec![Event::HoldSet],
            keysets: None,
            before: Vec::new(),
            ca_file: None,
            timeout: Span::SECOND,
            give_up_after: Span::DAY,
        };
        self.manager().engine.tell(vec![Addressee { receiver, line: self.desk.clone() }]);
        tokio::spawn(self.manager().engine.clone().watch_notices(self.stop.clone()));
        self.settle().await;
    }

    /// The other's name is the first of all names.
    async fn other_reports(&self, tells: bool) {
        let report = Report {
            replica: "0".to_owned(),
            role: "manager".to_owned(),
            version: "0.1.0".to_owned(),
            publishes: false,
            tells,
            stopped: false,
            generations: Default::default(),
            resumed: Default::default(),
        };
        self.other.report(&[report]).await.unwrap();
        self.manager().engine.attend_once().await.unwrap();
    }

    /// What the manager reports of itself.
    async fn reports_that_it_tells(&self) -> bool {
        self.manager().engine.attend_once().await.unwrap();
        let reported = self.other.replicas(Span::MINUTE).await.unwrap();
        let name = self.manager().engine.replica();
        reported.into_iter().find(|known| known.report.replica == name).unwrap().report.tells
    }

    async fn hold(&self) {
        self.manager().command(Intent::Hold { until: None }).await.unwrap();
        self.settle().await;
    }

    fn advance(&self, span: Span) {
        self.world.clocks.iter().for_each(|clock| clock.advance(span));
    }

    /// Lets the tasks see what there is.
    async fn settle(&self) {
        for _ in 0..200 {
            tokio::task::yield_now().await;
        }
    }

    /// For two seconds: longer than it is waited before it is looked again who is to send.
    async fn pass(&self) {
        for _ in 0..4 {
            self.advance(Span::from_millis(500));
            self.settle().await;
        }
    }

    fn taken(&self) -> usize {
        *self.desk.taken.lock().unwrap()
    }

    fn alarm(&self) -> bool {
        self.manager().alarms().contains(&"notice_failing")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test]
async fn a_manager_that_cannot_tell_leaves_it_to_the_others() {
    let site = Site::start().await;
    assert!(!site.reports_that_it_tells().await, "it has no receivers");
    site.tell().await;
    assert!(site.reports_that_it_tells().await);
    site.hold().await;
    site.pass().await;
    assert_eq!(site.taken(), 1);
    site.other_reports(true).await;
    site.pass().await;
    site.hold().await;
    site.pass().await;
    assert_eq!(site.taken(), 1, "of two that can the first by name sends");
    site.other_reports(false).await;
    site.pass().await;
    assert_eq!(site.taken(), 2, "it is sealed, say, or has no receivers");
}

#[tokio::test]
async fn a_manager_that_hands_the_sending_over_forgets_how_it_went() {
    for refusal in [NotDelivered::Later { problem: "as a test".to_owned(), after: None }, NotDelivered::Gone] {
        let site = Site::start().await;
        site.tell().await;
        site.manager().engine.attend_once().await.unwrap();
        site.pass().await;
        *site.desk.refuses.lock().unwrap() = Some(refusal.clone());
        site.hold().await;
        site.pass().await;
        site.advance(Span::MINUTE.times(11));
        site.settle().await;
        assert!(site.alarm(), "{refusal}: {:?}", site.manager().alarms());
        site.other_reports(true).await;
        assert!(!site.alarm(), "{refusal}: the receiver is another's to worry about");
        site.pass().await;
        assert!(!site.alarm(), "{refusal}");
        // Back again it tries again.
        *site.desk.refuses.lock().unwrap() = None;
        site.other_reports(false).await;
        for _ in 0..200 {
            site.pass().await;
            site.other_reports(false).await;
            if site.taken() > 0 {
                break;
            }
        }
        assert_eq!(site.taken(), 1, "{refusal}");
    }
}
