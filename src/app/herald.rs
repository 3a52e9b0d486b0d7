//! What systemd hears of a running daemon: when it is ready, reloads and stops, how it is, and that it is alive.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::engine::Engine;
use crate::keyring::time::Span;
use crate::systemd::{Notice, Systemd};

/// How often the status is looked at where no watchdog sets a pace.
const STATUS_EVERY: Span = Span::from_secs(10);

/// A process that does not work is looked at again after this part of half the watchdog's interval.
const AGAIN: i64 = 10;

/// The most things that a status names.
const MOST_NAMED: usize = 3;

/// Tells systemd.
pub(super) struct Herald {
    systemd: Systemd,
    engine: Arc<Engine>,
    /// The configuration on disk is the one that runs.
    configured: AtomicBool,
    stopping: AtomicBool,
    /// The status that systemd knows.
    told: Mutex<String>,
}

impl Herald {
    pub fn new(systemd: Systemd, engine: Arc<Engine>) -> Self {
        Herald {
            systemd,
            engine,
            configured: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            told: Mutex::default(),
        }
    }

    /// Whether there is anybody to tell.
    pub fn is_heard(&self) -> bool {
        self.systemd.is_told()
    }

    /// The listeners are open, or a reload is over.
    pub async fn ready(&self) {
        let status = self.status();
        self.tell(Notice::Ready, status).await;
    }

    pub async fn reloading(&self) {
        let now = self.engine.clock.clock().monotonic();
        self.tell(Notice::Reloading(now), "Reloading".to_owned()).await;
    }

    /// Whether what is on disk was taken, or runs already: the next status says so.
    pub fn set_configured(&self, valid: bool) {
        self.configured.store(valid, Ordering::Relaxed);
    }

    /// `delay`: for how long it still serves.
    pub async fn stopping(&self, delay: Span) {
        self.stopping.store(true, Ordering::Relaxed);
        let status =
            if delay.is_zero() { "Stopping".to_owned() } else { format!("Stopping: serves for another {delay}") };
        self.tell(Notice::Stopping, status).await;
    }

    /// Keeps the status true, and gives signs of life at half the watchdog's interval, until cancelled. It does so by the
    /// engine's word and not for being scheduled itself: what hangs is to be started again.
    pub async fn watch(self: Arc<Self>, cancel: CancellationToken) {
        let half = self.systemd.watchdog().map(|interval| interval.as_millis() / 2);
        let again = Span::from_millis(half.unwrap_or_default() / AGAIN).max(Span::from_millis(1));
        let mut was_alive = true;
        loop {
            let ailments = self.engine.ailments();
            let alive = ailments.is_empty();
            if was_alive && !alive {
                tracing::error!(
                    ?ailments,
                    "this process does not work: systemd's watchdog hears nothing of it until it does"
                );
            }
            was_alive = alive;
            let status = self.changed_status();
            if status.is_some() || (alive && half.is_some()) {
                let sign = (alive && half.is_some()).then_some(Notice::Alive);
                self.systemd.tell(sign, status.as_deref()).await;
            }
            let nap = match half {
                None => STATUS_EVERY,
                Some(half) if alive => Span::from_millis(half),
                Some(_) => again,
            };
            tokio::select! {
                () = self.engine.clock.clock().sleep(nap) => {}
                () = cancel.cancelled() => return,
            }
        }
    }

    async fn tell(&self, notice: Notice, status: String) {
        // After this nothing makes the service ready again.
        if notice != Notice::Stopping && self.stopping.load(Ordering::Relaxed) {
            return;
        }
        self.told().clone_from(&status);
        self.systemd.tell(Some(notice), Some(&status)).await;
    }

    fn changed_status(&self) -> Option<String> {
        let status = self.status();
        let mut told = self.told();
        if self.stopping.load(Ordering::Relaxed) || *told == status {
            return None;
        }
        told.clone_from(&status);
        Some(status)
    }

    /// One line for `systemctl status`.
    fn status(&self) -> String {
        let keysets = self.engine.directory().order.len();
        let mut said = vec![format!("Serving {keysets} keyset{}", if keysets == 1 { "" } else { "s" })];
        for (to, missing) in [("publish", self.engine.missing_to_publish()), ("sign", self.engine.missing_to_sign())] {
            if !missing.is_empty() {
                said.push(format!("not ready to {to}: {}", some_of(&missing)));
            }
        }
        if !self.configured.load(Ordering::Relaxed) {
            said.push("the configuration on disk is invalid and the former one runs".to_owned());
        }
        said.join("; ")
    }

    fn told(&self) -> std::sync::MutexGuard<'_, String> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn some_of(missing: &[String]) -> String {
    let named = missing[..missing.len().min(MOST_NAMED)].join(", ");
    match missing.len().saturating_sub(MOST_NAMED) {
        0 => named,
        more => format!("{named}, and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::UnixDatagram;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::clock::{Clock, ManualClock};
    use crate::engine::bare::bare_engine;
    use crate::keyring::time::Timestamp;

    const WATCHDOG: Span = Span::from_secs(20);

    /// An engine without keysets on a clock of its own, and a socket in the place of systemd's.
    struct Stage {
        clock: Arc<ManualClock>,
        engine: Arc<Engine>,
        herald: Arc<Herald>,
        socket: UnixDatagram,
        _folder: tempfile::TempDir,
    }

    impl Stage {
        async fn set(watchdog: bool) -> Stage {
            let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
            let engine = bare_engine(clock.clone()).await;
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("notify");
            let socket = UnixDatagram::bind(&path).unwrap();
            let variables = |name: &str| match name {
                "NOTIFY_SOCKET" => Some(path.display().to_string()),
                "WATCHDOG_USEC" => watchdog.then(|| (WATCHDOG.as_millis() * 1_000).to_string()),
                _ => None,
            };
            let (systemd, errors) = Systemd::from_environment(variables, 1);
            assert!(errors.is_empty(), "{errors:?}");
            let herald = Arc::new(Herald::new(systemd, engine.clone()));
            Stage { clock, engine, herald, socket, _folder: folder }
        }

        /// The next message, for which the clock may go on second by second, and how far it went.
        async fn message_within(&self, limit: Span) -> Option<(String, Span)> {
            let began = self.clock.boot();
            loop {
                let mut buffer = [0; 1024];
                let arrival = tokio::time::timeout(Duration::from_millis(20), self.socket.recv(&mut buffer)).await;
                let waited = self.clock.boot().saturating_sub(began);
                match arrival {
                    Ok(length) => return Some((String::from_utf8_lossy(&buffer[..length.unwrap()]).into(), waited)),
                    Err(_) if waited >= limit => return None,
                    Err(_) => self.clock.advance(Span::SECOND),
                }
            }
        }

        fn beat(&self) -> JoinHandle<()> {
            tokio::spawn(self.engine.clone().beat(CancellationToken::new()))
        }
    }

    #[tokio::test]
    async fn signs_of_life_come_at_half_the_interval_and_end_when_the_heartbeat_hangs() {
        let stage = Stage::set(true).await;
        let heartbeat = stage.beat();
        let watching = tokio::spawn(stage.herald.clone().watch(CancellationToken::new()));
        let (first, _) = stage.message_within(Span::ZERO).await.unwrap();
        assert_eq!(first, "WATCHDOG=1\nSTATUS=Serving 0 keysets");
        // Longer than the heartbeat may be late, while it is not.
        for _ in 0..12 {
            let (message, waited) = stage.message_within(WATCHDOG).await.unwrap();
            assert_eq!((message.as_str(), waited), ("WATCHDOG=1", Span::from_secs(10)));
        }
        heartbeat.abort();
        let mut alive = Span::ZERO;
        while let Some((message, waited)) = stage.message_within(WATCHDOG).await {
            assert_eq!(message, "WATCHDOG=1");
            alive = Span::from_millis(alive.as_millis() + waited.as_millis());
            assert!(alive < Span::from_secs(90), "the heartbeat has been dead for {alive}");
        }
        assert_eq!(stage.engine.ailments().len(), 1, "{:?}", stage.engine.ailments());
        let heartbeat = stage.beat();
        let (message, waited) = stage.message_within(Span::from_secs(2)).await.unwrap();
        assert_eq!(message, "WATCHDOG=1", "it is heard again soon: after {waited}");
        heartbeat.abort();
        watching.abort();
    }

    #[tokio::test]
    async fn a_task_that_fails_ends_the_signs_of_life() {
        let stage = Stage::set(true).await;
        let cancel = CancellationToken::new();
        let failing = stage.engine.supervisor.clone().keep("drill", cancel.clone(), || async { panic!("a drill") });
        let failing = tokio::spawn(failing);
        while stage.engine.ailments().is_empty() {
            tokio::task::yield_now().await;
        }
        let watching = tokio::spawn(stage.herald.clone().watch(CancellationToken::new()));
        let (message, _) = stage.message_within(Span::ZERO).await.unwrap();
        assert_eq!(message, "STATUS=Serving 0 keysets", "no sign of life");
        assert_eq!(stage.message_within(WATCHDOG).await, None);
        watching.abort();
        cancel.cancel();
        failing.await.unwrap();
    }

    #[tokio::test]
    async fn without_a_watchdog_only_a_changed_status_is_told_and_after_the_end_none() {
        let stage = Stage::set(false).await;
        stage.herald.ready().await;
        assert_eq!(stage.message_within(Span::ZERO).await.unwrap().0, "READY=1\nSTATUS=Serving 0 keysets");
        let watching = tokio::spawn(stage.herald.clone().watch(CancellationToken::new()));
        assert_eq!(stage.message_within(Span::from_secs(15)).await, None);
        stage.herald.set_configured(false);
        let (message, _) = stage.message_within(Span::from_secs(15)).await.unwrap();
        let invalid = "STATUS=Serving 0 keysets; the configuration on disk is invalid and the former one runs";
        assert_eq!(message, invalid);
        stage.herald.stopping(Span::from_secs(5)).await;
        let (message, _) = stage.message_within(Span::ZERO).await.unwrap();
        assert_eq!(message, "STOPPING=1\nSTATUS=Stopping: serves for another 5s");
        stage.herald.ready().await;
        assert_eq!(stage.message_within(Span::from_secs(15)).await, None, "it is over");
        watching.abort();
    }

    #[test]
    fn a_status_names_a_few_of_many() {
        let missing = ["a", "b", "c", "d", "e"].map(str::to_owned);
        assert_eq!(some_of(&missing[..3]), "a, b, c");
        assert_eq!(some_of(&missing), "a, b, c, and 2 more");
    }
}
