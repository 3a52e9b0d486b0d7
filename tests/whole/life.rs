//! A process's life and its machine's clocks: time that only passes when everybody waits, clocks that differ from true time,
//! and an end at any await.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use jwksd::clock::Clock;
use jwksd::keyring::time::{Span, Timestamp};
use tokio::time::Instant;

/// When every history begins.
pub const BEGINNING: Timestamp = Timestamp::from_secs(1_800_000_000);

/// True time, in milliseconds since the beginning.
#[derive(Clone, Copy)]
pub struct Truth(Instant);

impl Truth {
    pub fn begin() -> Self {
        Truth(Instant::now())
    }

    pub fn now(self) -> i64 {
        i64::try_from(self.0.elapsed().as_millis()).unwrap()
    }

    pub fn wall(self) -> Timestamp {
        BEGINNING + Span::from_millis(self.now())
    }

    pub async fn reach(self, at: i64) {
        let at = self.0 + Duration::from_millis(u64::try_from(at).unwrap());
        if at > Instant::now() {
            tokio::time::sleep_until(at).await;
        }
    }
}

/// The places at which a process can be killed, counted over a whole history, and the one at which one is.
#[derive(Default)]
pub struct Doom {
    passed: AtomicU64,
    at: AtomicU64,
}

impl Doom {
    /// Whoever passes the place `at`, counted from one, dies there; with 0 nobody does.
    pub fn at(at: u64) -> Arc<Self> {
        Arc::new(Doom { passed: AtomicU64::new(0), at: AtomicU64::new(at) })
    }

    /// From now on nobody dies. How many places there were.
    pub fn is_over(&self) -> u64 {
        self.at.store(0, Relaxed);
        self.passed.load(Relaxed)
    }
}

/// One process from its start to its end.
pub struct Life {
    doom: Arc<Doom>,
    dead: AtomicBool,
    /// It dies at the place after so many.
    left: AtomicU64,
    /// True time until which it does nothing, in milliseconds.
    stopped_until: Arc<AtomicI64>,
    truth: Truth,
}

impl Life {
    pub fn begin(doom: Arc<Doom>, truth: Truth, stopped_until: Arc<AtomicI64>) -> Arc<Self> {
        Arc::new(Life { doom, dead: AtomicBool::new(false), left: AtomicU64::new(u64::MAX), stopped_until, truth })
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Relaxed)
    }

    pub fn die(&self) {
        self.dead.store(true, Relaxed);
    }

    /// It dies `places` further on.
    pub fn die_after(&self, places: u64) {
        self.left.store(places, Relaxed);
    }

    /// A place at which the process may be killed, or stand still. Whoever was killed never comes back from here: that is
    /// all that others see of it.
    pub async fn pass(&self) {
        if self.ends() {
            pending::<()>().await;
        }
        while self.stopped_until.load(Relaxed) > self.truth.now() {
            self.truth.reach(self.stopped_until.load(Relaxed)).await;
            if self.is_dead() {
                pending::<()>().await;
            }
        }
    }

    /// The same where nobody waits.
    pub fn ends(&self) -> bool {
        if self.is_dead() {
            return true;
        }
        let (passed, left) = (self.doom.passed.fetch_add(1, Relaxed) + 1, self.left.load(Relaxed));
        if passed == self.doom.at.load(Relaxed) || left == 0 {
            self.die();
            return true;
        }
        if left != u64::MAX {
            self.left.store(left - 1, Relaxed);
        }
        false
    }
}

/// The clocks of one machine.
pub struct Machine {
    truth: Truth,
    /// How far its wall clock is ahead of true time, in milliseconds.
    ahead: Arc<AtomicI64>,
    life: Arc<Life>,
}

impl Machine {
    pub fn new(truth: Truth, ahead: Arc<AtomicI64>, life: Arc<Life>) -> Arc<Self> {
        Arc::new(Machine { truth, ahead, life })
    }
}

impl Clock for Machine {
    fn wall(&self) -> Timestamp {
        self.truth.wall() + Span::from_millis(self.ahead.load(Relaxed))
    }

    fn boot(&self) -> Span {
        Span::from_millis(1_000_000 + self.truth.now())
    }

    fn monotonic(&self) -> Duration {
        self.truth.0.elapsed()
    }

    fn sleep(&self, span: Span) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let life = self.life.clone();
        Box::pin(async move {
            life.pass().await;
            // A timer of the runtime ends up to a millisecond late; sleeping for nothing would never let time pass.
            tokio::time::sleep(span.to_std()).await;
            life.pass().await;
        })
    }
}

/// The clock of a store, which may be wrong.
pub struct StoreClock {
    pub truth: Truth,
    pub ahead: AtomicI64,
}

impl StoreClock {
    pub fn now(&self) -> Timestamp {
        self.truth.wall() + Span::from_millis(self.ahead.load(Relaxed))
    }
}
