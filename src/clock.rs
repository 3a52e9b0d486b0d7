//! The only ambient time: the machine's clocks behind a port, and the guard that decides whether they can be trusted.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use arc_swap::ArcSwap;

use crate::keyring::time::{Span, Timestamp};

/// The machine's clocks.
pub trait Clock: Send + Sync + 'static {
    /// Wall-clock time (CLOCK_REALTIME); people and NTP may step it.
    fn wall(&self) -> Timestamp;

    /// Time since boot including suspend (CLOCK_BOOTTIME); nobody can step it.
    fn boot(&self) -> Span;

    /// A stopwatch for latencies, in nanoseconds (CLOCK_MONOTONIC).
    fn monotonic(&self) -> std::time::Duration;

    /// Ends after about `span` of boot time; may end later, when the machine was suspended.
    fn sleep(&self, span: Span) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The clocks of this machine, read through libc so that a preloaded library can stand in for them.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> Timestamp {
        Timestamp::from_millis(millis(read(libc::CLOCK_REALTIME)))
    }

    fn boot(&self) -> Span {
        Span::from_millis(millis(read(libc::CLOCK_BOOTTIME)))
    }

    fn monotonic(&self) -> std::time::Duration {
        let time = read(libc::CLOCK_MONOTONIC);
        std::time::Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
    }

    fn sleep(&self, span: Span) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(span.to_std()))
    }
}

fn read(clock: libc::clockid_t) -> libc::timespec {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that the call fills; the clock ids exist since Linux 2.6.39.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time
}

fn millis(time: libc::timespec) -> i64 {
    time.tv_sec.saturating_mul(1000).saturating_add(time.tv_nsec / 1_000_000)
}

/// A reading that went through the guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    pub now: Timestamp,
    /// The wall clock disagrees with what time must be; `now` is the last agreed wall clock plus boot time.
    pub frozen: bool,
    /// Time since boot, not before `now` was read.
    pub boot: Span,
}

/// Compares the wall clock with boot time at every reading (DESIGN §3.13). A step by more than the tolerance freezes:
/// time then goes on from the last agreed wall clock until the clock agrees again or an operator accepts it.
pub struct TrustedClock {
    clock: Arc<dyn Clock>,
    tolerance_ms: AtomicI64,
    state: ArcSwap<Guard>,
    /// Serialises changes of `state`; readers never take it.
    change: Mutex<()>,
    /// The latest time ever given out, in milliseconds, since somebody last vouched for the clock.
    latest: AtomicI64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Guard {
    /// What was agreed, at most [`ANCHOR_LIFE`] ago: steps are measured against it, so that many small ones add up.
    anchor: Pair,
    /// The last agreed reading, to within [`AGREED_RESOLUTION`].
    agreed: Pair,
    frozen: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    wall: Timestamp,
    boot: Span,
}

const ANCHOR_LIFE: Span = Span::HOUR;
const AGREED_RESOLUTION: Span = Span::SECOND;

/// Steps below this are never taken for one: NTP makes them.
pub const LEAST_TOLERANCE: Span = Span::from_millis(500);

impl TrustedClock {
    /// Trusts the wall clock as it is. `tolerance` is the smallest σ of any keyset; at least half a second counts.
    pub fn new(clock: Arc<dyn Clock>, tolerance: Span) -> Self {
        let pair = Pair { wall: clock.wall(), boot: clock.boot() };
        TrustedClock {
            clock,
            tolerance_ms: AtomicI64::new(tolerance.max(LEAST_TOLERANCE).as_millis()),
            state: ArcSwap::from_pointee(Guard { anchor: pair, agreed: pair, frozen: false }),
            change: Mutex::new(()),
            latest: AtomicI64::new(pair.wall.as_millis()),
        }
    }

    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Time since boot.
    pub fn boot(&self) -> Span {
        self.clock.boot()
    }

    pub fn set_tolerance(&self, tolerance: Span) {
        self.tolerance_ms.store(tolerance.max(LEAST_TOLERANCE).as_millis(), Ordering::Relaxed);
    }

    /// The time to decide and sign by.
    pub fn read(&self) -> Reading {
        let reading = self.look();
        self.given_out(reading.now);
        reading
    }

    /// The latest time any reading has given since the clock was last accepted: tokens may carry it as `iat` although
    /// the clock was set back since, by less than the guard minds.
    pub fn latest(&self) -> Timestamp {
        Timestamp::from_millis(self.latest.load(Ordering::SeqCst))
    }

    /// Another run of this process may have given out times up to `at`.
    pub fn given_out(&self, at: Timestamp) {
        // Most readings are of a millisecond that was given out already: they only look.
        if self.latest.load(Ordering::SeqCst) < at.as_millis() {
            self.latest.fetch_max(at.as_millis(), Ordering::SeqCst);
        }
    }

    fn look(&self) -> Reading {
        let guard = **self.state.load();
        let pair = Pair { wall: self.clock.wall(), boot: self.clock.boot() };
        match self.judge(guard, pair) {
            Verdict::Agreed => Reading { now: pair.wall, frozen: false, boot: pair.boot },
            Verdict::Frozen => Reading { now: guard.agreed.extrapolate(pair.boot), frozen: true, boot: pair.boot },
            Verdict::Changes => self.settle(),
        }
    }

    /// Trusted time; whether it is frozen does not matter to the caller.
    pub fn now(&self) -> Timestamp {
        self.read().now
    }

    /// At start: a clock behind the last recorded time cannot be right. Time goes on from that record.
    pub fn start_from(&self, recorded: Timestamp) -> Reading {
        let _changing = self.lock();
        let pair = Pair { wall: self.clock.wall(), boot: self.clock.boot() };
        if pair.wall + self.tolerance() < recorded {
            let agreed = Pair { wall: recorded, boot: pair.boot };
            self.state.store(Arc::new(Guard { anchor: agreed, agreed, frozen: true }));
            self.given_out(recorded);
            return Reading { now: recorded, frozen: true, boot: pair.boot };
        }
        drop(_changing);
        self.given_out(recorded);
        self.read()
    }

    /// An operator's word that the wall clock is right.
    pub fn accept(&self) -> Reading {
        let _changing = self.lock();
        let pair = Pair { wall: self.clock.wall(), boot: self.clock.boot() };
        self.state.store(Arc::new(Guard { anchor: pair, agreed: pair, frozen: false }));
        self.latest.store(pair.wall.as_millis(), Ordering::SeqCst);
        Reading { now: pair.wall, frozen: false, boot: pair.boot }
    }

    fn settle(&self) -> Reading {
        let _changing = self.lock();
        let guard = **self.state.load();
        let pair = Pair { wall: self.clock.wall(), boot: self.clock.boot() };
        let agrees = self.agrees(guard, pair);
        let next = match (agrees, guard.frozen) {
            (true, true) => Guard { anchor: pair, agreed: pair, frozen: false },
            (true, false) => {
                let old = pair.boot.saturating_sub(guard.anchor.boot) >= ANCHOR_LIFE;
                Guard { anchor: if old { pair } else { guard.anchor }, agreed: pair, frozen: false }
            }
            (false, _) => Guard { frozen: true, ..guard },
        };
        self.state.store(Arc::new(next));
        let now = if agrees { pair.wall } else { next.agreed.extrapolate(pair.boot) };
        Reading { now, frozen: next.frozen, boot: pair.boot }
    }

    fn judge(&self, guard: Guard, pair: Pair) -> Verdict {
        let agrees = self.agrees(guard, pair);
        match (agrees, guard.frozen) {
            (false, true) => Verdict::Frozen,
            (true, false) if pair.boot.saturating_sub(guard.agreed.boot) < AGREED_RESOLUTION => Verdict::Agreed,
            _ => Verdict::Changes,
        }
    }

    fn agrees(&self, guard: Guard, pair: Pair) -> bool {
        let expected = guard.anchor.extrapolate(pair.boot).as_millis();
        (pair.wall.as_millis() - expected).abs() <= self.tolerance_ms.load(Ordering::Relaxed)
    }

    /// The difference between clocks that is not minded.
    pub fn tolerance(&self) -> Span {
        Span::from_millis(self.tolerance_ms.load(Ordering::Relaxed))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

enum Verdict {
    Agreed,
    Frozen,
    Changes,
}

impl Pair {
    fn extrapolate(self, boot: Span) -> Timestamp {
        self.wall + boot.saturating_sub(self.boot)
    }
}

/// A clock that tests move: wall and boot time apart from each other.
#[derive(Debug, Default)]
pub struct ManualClock {
    wall: AtomicI64,
    boot: AtomicI64,
    moved: tokio::sync::watch::Sender<Span>,
}

impl ManualClock {
    pub fn at(wall: Timestamp) -> Arc<Self> {
        let clock = ManualClock::default();
        clock.wall.store(wall.as_millis(), Ordering::SeqCst);
        clock.boot.store(1_000_000, Ordering::SeqCst);
        clock.moved.send_replace(clock.boot());
        Arc::new(clock)
    }

    /// Time passes: both clocks move.
    pub fn advance(&self, span: Span) {
        self.wall.fetch_add(span.as_millis(), Ordering::SeqCst);
        self.boot.fetch_add(span.as_millis(), Ordering::SeqCst);
        self.moved.send_replace(self.boot());
    }

    /// Somebody steps the wall clock.
    pub fn step_to(&self, wall: Timestamp) {
        self.wall.store(wall.as_millis(), Ordering::SeqCst);
        self.moved.send_replace(self.boot());
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Timestamp {
        Timestamp::from_millis(self.wall.load(Ordering::SeqCst))
    }

    fn boot(&self) -> Span {
        Span::from_millis(self.boot.load(Ordering::SeqCst))
    }

    fn monotonic(&self) -> std::time::Duration {
        self.boot().to_std()
    }

    fn sleep(&self, span: Span) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut moved = self.moved.subscribe();
        let until = self.boot() + span;
        Box::pin(async move {
            // The channel carries boot time; it closes when nobody can move time any more.
            let _ = moved.wait_for(|boot| *boot >= until).await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const YEAR: Span = Span::DAY.times(365);

    fn start() -> (Arc<ManualClock>, TrustedClock) {
        let clock = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        let trusted = TrustedClock::new(clock.clone(), Span::SECOND.times(60));
        (clock, trusted)
    }

    #[test]
    fn time_that_passes_is_trusted() {
        let (clock, trusted) = start();
        for _ in 0..10_000 {
            clock.advance(Span::MINUTE);
            assert_eq!(trusted.read(), Reading { now: clock.wall(), frozen: false, boot: clock.boot() });
        }
    }

    #[test]
    fn a_step_freezes_and_time_goes_on_from_the_last_agreed_clock() {
        for step in [clock_plus(YEAR), clock_minus(YEAR)] {
            let (clock, trusted) = start();
            let before = trusted.now();
            clock.step_to(step(clock.wall()));
            assert_eq!(trusted.read(), Reading { now: before, frozen: true, boot: clock.boot() });
            clock.advance(Span::MINUTE);
            assert_eq!(trusted.read(), Reading { now: before + Span::MINUTE, frozen: true, boot: clock.boot() });
        }
    }

    #[test]
    fn it_thaws_when_the_clock_agrees_again() {
        let (clock, trusted) = start();
        let right = clock.wall();
        clock.step_to(right + YEAR);
        assert!(trusted.read().frozen);
        clock.step_to(right + Span::SECOND.times(59));
        assert_eq!(trusted.read(), Reading { now: clock.wall(), frozen: false, boot: clock.boot() });
    }

    #[test]
    fn an_operator_can_accept_the_clock() {
        let (clock, trusted) = start();
        clock.step_to(clock.wall() + YEAR);
        assert!(trusted.read().frozen);
        assert_eq!(trusted.accept(), Reading { now: clock.wall(), frozen: false, boot: clock.boot() });
        clock.advance(Span::HOUR);
        assert!(!trusted.read().frozen);
    }

    #[test]
    fn small_steps_within_an_hour_add_up() {
        let (clock, trusted) = start();
        for _ in 0..3 {
            clock.advance(Span::MINUTE);
            clock.step_to(clock.wall() + Span::SECOND.times(25));
            trusted.read();
        }
        assert!(trusted.read().frozen);
    }

    #[test]
    fn suspend_is_time_that_passes() {
        let (clock, trusted) = start();
        clock.advance(Span::DAY.times(3));
        assert!(!trusted.read().frozen);
    }

    #[test]
    fn at_start_a_clock_behind_the_record_freezes_and_one_ahead_does_not() {
        let (clock, trusted) = start();
        let recorded = clock.wall() + Span::DAY;
        assert_eq!(trusted.start_from(recorded), Reading { now: recorded, frozen: true, boot: clock.boot() });
        clock.step_to(recorded);
        assert!(!trusted.read().frozen);
        let (clock, trusted) = start();
        assert_eq!(
            trusted.start_from(clock.wall() - YEAR),
            Reading { now: clock.wall(), frozen: false, boot: clock.boot() }
        );
    }

    #[test]
    fn the_latest_time_given_out_outlives_a_small_step_back_but_not_an_accepted_clock() {
        let (clock, trusted) = start();
        let latest = trusted.now();
        clock.step_to(latest - Span::SECOND.times(30));
        assert_eq!(trusted.read(), Reading { now: clock.wall(), frozen: false, boot: clock.boot() });
        assert_eq!(trusted.latest(), latest);
        clock.step_to(latest - YEAR);
        trusted.accept();
        assert_eq!(trusted.latest(), clock.wall());
    }

    #[test]
    fn times_an_earlier_run_gave_out_count() {
        let (clock, trusted) = start();
        let recorded = clock.wall() + Span::SECOND.times(30);
        assert!(!trusted.start_from(recorded).frozen);
        assert_eq!(trusted.latest(), recorded);
    }

    fn clock_plus(span: Span) -> Box<dyn Fn(Timestamp) -> Timestamp> {
        Box::new(move |at| at + span)
    }

    fn clock_minus(span: Span) -> Box<dyn Fn(Timestamp) -> Timestamp> {
        Box::new(move |at| at - span)
    }
}
