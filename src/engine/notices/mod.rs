//! Telling receivers what becomes of keys.
//!
//! There is no queue: what is to be told is read off the keyrings each time, and a stored [`Book`] says how far each
//! receiver got. So nothing is lost with a process, nothing grows while a receiver is away, and no transition waits.
//! Each receiver has a task of its own. Where several managers share a store, one of them sends.

mod send;
mod shelf;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Engine;
use crate::config::Receiver;
use crate::keyring::name::Name;
use crate::keyring::notice::{Due, Event, Heard, Notice};
use crate::keyring::outlook::Alarm;
use crate::keyring::time::{Span, Timestamp};
use crate::random;
use crate::store::shared::Replica;
use crate::telemetry::metrics::NoticeOutcome;

pub use send::{Webhook, WebhookError};

use shelf::Shelf;

/// Notices taken up at once; what comes after them is read again.
const BATCH: usize = 64;

/// How often it is looked what lies ahead and which alarms are raised; more seldom where that takes longer.
const LOOK_MIN: Span = Span::SECOND;
const LOOK_PER_KEYSET: Span = Span::from_millis(2);

/// An alarm is told once it lasts, and its end likewise.
const SETTLED: Span = Span::from_secs(10);

/// Attempts after a failure are at most this far apart, whatever the receiver asks for.
const RETRY_MAX: Span = Span::MINUTE.times(5);
const RETRY_MIN: Span = Span::from_millis(500);
const RETRY_AFTER_MAX: Span = Span::HOUR;

/// Attempts at a notice that its receiver refuses as such.
const REFUSALS_MAX: u32 = 8;

/// A receiver that takes nothing for longer raises an alarm.
const FAILING_MAX: Span = Span::MINUTE.times(10);

/// How soon it is looked again whether this process is to send.
const NOT_YET: Span = Span::SECOND;

/// Takes notices to one receiver.
#[async_trait::async_trait]
pub trait Deliver: Send + Sync + 'static {
    /// One attempt. `now` goes into the signature.
    async fn deliver(&self, notice: &Notice, now: Timestamp) -> Result<(), NotDelivered>;
}

/// Why a receiver did not take a notice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotDelivered {
    /// It may take it later.
    #[error("{problem}")]
    Later { problem: String, after: Option<Span> },
    /// It takes others, perhaps, but not this one.
    #[error("it refuses the notice with {status}")]
    Refused { status: u16 },
    /// It wants no more (410).
    #[error("it answers 410: it wants no more notices")]
    Gone,
}

/// A receiver and the way to it.
pub struct Addressee {
    pub receiver: Receiver,
    pub line: Arc<dyn Deliver>,
}

/// How it stands with the receivers.
#[derive(Default)]
pub(super) struct Notices {
    addressees: watch::Sender<Vec<Arc<Addressee>>>,
    /// Some keyring changed.
    news: watch::Sender<()>,
    /// Held by whoever looks or notes what was heard.
    shelf: tokio::sync::Mutex<Shelf>,
    health: Mutex<BTreeMap<Name, Health>>,
    /// Other managers of the store that can send; `None`: not known yet.
    managers: Mutex<Option<BTreeSet<String>>>,
}

#[derive(Clone, Default)]
struct Health {
    keysets: Option<Vec<Name>>,
    /// When the notice that waits became due.
    waiting: Option<Timestamp>,
    /// Boot time since when every attempt has failed.
    failing: Option<Span>,
    /// It wants no more.
    gone: bool,
    told: Option<NotDelivered>,
}

impl Health {
    /// How it stood, but not of which keysets it is to hear.
    fn forget(&mut self) {
        *self = Health { keysets: self.keysets.take(), ..Health::default() };
    }
}

impl Notices {
    pub(super) fn news(&self) {
        self.news.send_replace(());
    }

    /// Takes note of the other replicas. Where one of them is to send, what this process, `own`, knew of its receivers is
    /// that one's to know now.
    pub(super) fn heed(&self, others: &[Replica], own: &str) {
        let signer = super::ReplicaRole::Signer.as_str();
        let managers = others.iter().filter(|other| other.report.role != signer && other.report.tells);
        let names: BTreeSet<String> = managers.map(|other| other.report.replica.clone()).collect();
        if names.first().is_some_and(|first| first.as_str() < own) {
            self.health().values_mut().for_each(Health::forget);
        }
        *self.managers.lock().unwrap_or_else(PoisonError::into_inner) = Some(names);
    }

    /// Whether a receiver that is to hear of the keyset has taken nothing for long.
    pub(super) fn fails(&self, keyset: &Name, boot: Span) -> bool {
        self.health().values().any(|health| {
            let long = health.failing.is_some_and(|since| boot.saturating_sub(since) > FAILING_MAX);
            (long || health.gone) && health.keysets.as_ref().is_none_or(|names| names.contains(keyset))
        })
    }

    /// When the oldest notice that waits became due.
    pub(super) fn oldest(&self) -> Option<Timestamp> {
        self.health().values().filter_map(|health| health.waiting).min()
    }

    fn is_gone(&self, receiver: &Name) -> bool {
        self.health().get(receiver).is_some_and(|health| health.gone)
    }

    fn health(&self) -> MutexGuard<'_, BTreeMap<Name, Health>> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edit(&self, receiver: &Name, edit: impl FnOnce(&mut Health)) {
        // Of a receiver that is gone nothing is kept.
        if let Some(health) = self.health().get_mut(receiver) {
            edit(health);
        }
    }
}

/// How it went with one notice.
#[derive(PartialEq, Eq)]
enum Handed {
    /// It needs not be sent again.
    Over,
    /// This process is not to send any more.
    NotOurs,
}

/// Since when, in boot time, alarms are as they are.
#[derive(Default)]
struct Settling(BTreeMap<(Name, Alarm), (bool, Span)>);

impl Settling {
    /// The alarms that count as raised, with the time since when: what lasts, and what has not ended for long enough.
    fn settled(
        &mut self,
        heard: &Heard,
        keyset: &Name,
        raised: &BTreeSet<Alarm>,
        boot: Span,
        now: Timestamp,
    ) -> BTreeMap<Alarm, Timestamp> {
        let mut settled = BTreeMap::new();
        for alarm in Alarm::ALL {
            let (is, known) = (raised.contains(&alarm), heard.knows_alarm(keyset, alarm));
            if is == known.is_some() {
                self.0.remove(&(keyset.clone(), alarm));
                settled.extend(known.map(|since| (alarm, since)));
                continue;
            }
            let (was, since) = self.0.entry((keyset.clone(), alarm)).or_insert((is, boot));
            if *was != is {
                (*was, *since) = (is, boot);
            }
            let lasted = boot.saturating_sub(*since);
            match known {
                Some(told) if lasted < SETTLED => _ = settled.insert(alarm, told),
                None if is && lasted >= SETTLED => _ = settled.insert(alarm, now - lasted),
                _ => {}
            }
        }
        settled
    }
}

impl Engine {
    /// From now on these are told. What is under way to others is broken off.
    pub fn tell(&self, addressees: Vec<Addressee>) {
        let fresh = |to: &Addressee| {
            let health = Health { keysets: to.receiver.keysets.clone(), ..Health::default() };
            (to.receiver.name.clone(), health)
        };
        *self.notices.health() = addressees.iter().map(fresh).collect();
        self.notices.addressees.send_replace(addressees.into_iter().map(Arc::new).collect());
    }

    /// Those that wanted no more are tried again.
    pub fn tell_again(&self) {
        if self.notices.health().values().any(|health| health.gone) {
            self.notices.health().values_mut().for_each(|health| health.gone = false);
            self.notices.addressees.send_modify(|_| {});
        }
    }

    /// Sends notices until cancelled. Receivers do not wait for each other.
    pub async fn watch_notices(self: Arc<Self>, cancel: CancellationToken) {
        let mut addressees = self.notices.addressees.subscribe();
        while !cancel.is_cancelled() {
            let current = addressees.borrow_and_update().clone();
            let mut tasks = JoinSet::new();
            for addressee in current {
                tasks.spawn(self.clone().attend_to(addressee));
            }
            tokio::select! {
                () = cancel.cancelled() => {}
                _ = addressees.changed() => {}
                Some(Err(error)) = tasks.join_next() => {
                    if let Ok(panic) = error.try_into_panic() {
                        std::panic::resume_unwind(panic); // The supervisor starts all of them again.
                    }
                }
            }
            tasks.shutdown().await;
        }
        self.keep_book(Span::ZERO).await;
    }

    /// Tells one receiver everything that there is to tell, for ever.
    async fn attend_to(self: Arc<Self>, to: Arc<Addressee>) {
        let mut news = self.notices.news.subscribe();
        let (mut settling, mut look_at) = (Settling::default(), Span::ZERO);
        loop {
            news.borrow_and_update();
            let pause = match self.tells().await {
                false => NOT_YET,
                true => {
                    let due = self.due(&to.receiver, &mut settling, &mut look_at).await;
                    let waits = due.as_ref().is_some_and(|due| !due.is_empty());
                    for due in due.unwrap_or_default() {
                        if self.hand_over(&to, due).await == Handed::NotOurs {
                            break;
                        }
                    }
                    self.keep_book(Span::SECOND).await;
                    if waits {
                        continue;
                    }
                    look_at.saturating_sub(self.clock.boot()).min(NOT_YET.max(LOOK_MIN))
                }
            };
            tokio::select! {
                () = self.clock.clock().sleep(pause.max(Span::from_millis(10))) => {}
                // The sender lives as long as the engine.
                _ = news.changed() => {}
            }
        }
    }

    /// Whether this process could send, if no other did.
    pub(super) fn can_tell(&self) -> bool {
        let has_receivers = !self.notices.addressees.borrow().is_empty();
        has_receivers && !self.is_reader() && !self.is_sealed() && self.is_open()
    }

    /// Whether it is up to this process to send: of all managers that can the first by name.
    async fn tells(&self) -> bool {
        let first = !self.is_shared() || {
            let managers = self.notices.managers.lock().unwrap_or_else(PoisonError::into_inner);
            managers.as_ref().is_some_and(|others| others.iter().all(|other| *other > self.replica))
        };
        let tells = first && self.can_tell();
        if !tells {
            self.notices.health().values_mut().for_each(Health::forget);
            self.keep_book(Span::ZERO).await;
            self.notices.shelf.lock().await.close();
        }
        tells
    }

    /// What is to be told next, the oldest of each keyset first; `None` while it cannot be known.
    async fn due(&self, receiver: &Receiver, settling: &mut Settling, look_at: &mut Span) -> Option<Vec<Due>> {
        let mut shelf = self.notices.shelf.lock().await;
        let now = self.clock.now();
        let heard = shelf.open(self, now, receiver).await?;
        let directory = self.directory();
        let followed = || directory.order.iter().filter(|cell| receiver.follows(&cell.name));
        let (mut due, mut changed, mut lost) = (Vec::new(), false, 0);
        for cell in followed() {
            let keyring = cell.snapshot.load().keyring.clone();
            let (unheard, missed) = heard.unheard(&keyring);
            lost += missed;
            changed |= missed > 0;
            if missed > 0 {
                heard.skip_lost(&keyring);
            }
            let before = due.len();
            for next in unheard {
                if receiver.wants(next.notice.event) {
                    due.push(next);
                } else if due.len() == before {
                    heard.note(next.mark);
                    changed = true;
                }
            }
            if due.len() >= BATCH {
                break;
            }
        }
        if due.is_empty() && self.clock.boot() >= *look_at {
            let wake = self.look_ahead(receiver, heard, settling, &mut due);
            let pause = LOOK_PER_KEYSET.times(u32::try_from(directory.order.len()).unwrap_or(u32::MAX)).max(LOOK_MIN);
            let soon = wake.map_or(pause, |wake| wake.since(now).min(pause));
            *look_at = self.clock.boot() + soon;
        }
        due.truncate(BATCH);
        shelf.changed(changed);
        drop(shelf);
        if lost > 0 {
            self.metrics.noticed(NoticeOutcome::Dropped, lost);
            tracing::error!(notice = %receiver.name, lost, "entries left the keysets' journals before the receiver could be told of them; `jwksd audit` and the log have them");
        }
        self.notices.edit(&receiver.name, |health| health.waiting = due.first().map(|due| due.notice.at));
        Some(due)
    }

    /// Adds what lies ahead, and alarms. Returns when the next notice is due.
    fn look_ahead(
        &self,
        receiver: &Receiver,
        heard: &mut Heard,
        settling: &mut Settling,
        due: &mut Vec<Due>,
    ) -> Option<Timestamp> {
        let ahead = Event::ALL.iter().any(|event| event.is_ahead() && receiver.wants(*event));
        let alarms = Event::ALL.iter().any(|event| event.is_alarm() && receiver.wants(*event));
        if !ahead && !alarms {
            return None;
        }
        let directory = self.directory();
        let mut first = None;
        for cell in directory.order.iter().filter(|cell| receiver.follows(&cell.name)) {
            let sight = self.look(cell);
            let keyring = &sight.snapshot.keyring;
            heard.tidy(keyring);
            if alarms {
                let raised = settling.settled(heard, &cell.name, &sight.alarms, self.clock.boot(), sight.now);
                for next in heard.alarms(keyring, &raised, sight.now) {
                    if receiver.wants(next.notice.event) { due.push(next) } else { heard.note(next.mark) }
                }
            }
            // A time that cannot be trusted tells nothing of what is to come.
            if ahead && !sight.alarms.contains(&Alarm::ClockFrozen) {
                let (next, wake) = heard.ahead(keyring, &sight.outlook, &receiver.before, sight.now);
                first = first.into_iter().chain(wake).min();
                for next in next {
                    if receiver.wants(next.notice.event) { due.push(next) } else { heard.note(next.mark) }
                }
            }
            if due.len() >= BATCH {
                break;
            }
        }
        first
    }

    /// Tries until the receiver has taken the notice, or it is not worth trying any more.
    async fn hand_over(&self, to: &Addressee, due: Due) -> Handed {
        let (name, notice) = (&to.receiver.name, &due.notice);
        self.notices.edit(name, |health| health.waiting = Some(notice.at));
        let (mut failures, mut refusals) = (0, 0);
        let delivered = loop {
            let error = match to.line.deliver(notice, self.clock.now()).await {
                Ok(()) => break true,
                Err(error) => error,
            };
            failures += 1;
            refusals += u32::from(matches!(error, NotDelivered::Refused { .. }));
            self.metrics.noticed(NoticeOutcome::Failed, 1);
            self.not_delivered(name, &error);
            if error == NotDelivered::Gone {
                self.notices.edit(name, |health| health.gone = true);
                // Until a reload has everybody told anew, or another manager sends.
                while self.notices.is_gone(name) && self.tells().await {
                    self.clock.clock().sleep(NOT_YET).await;
                }
                return Handed::NotOurs;
            }
            let now = self.clock.now();
            let late =
                now.since(notice.at) > to.receiver.give_up_after || notice.until.is_some_and(|until| now >= until);
            if late || refusals >= REFUSALS_MAX {
                tracing::error!(notice = %name, id = notice.id, event = notice.event.as_str(), %error, failures, "a notice was given up");
                break false;
            }
            self.clock.clock().sleep(pause_after(failures, &error)).await;
            if !self.tells().await {
                return Handed::NotOurs;
            }
        };
        if delivered {
            self.delivered(name);
        }
        self.metrics.noticed(if delivered { NoticeOutcome::Delivered } else { NoticeOutcome::Dropped }, 1);
        self.notices.shelf.lock().await.note(name, due.mark);
        self.keep_book(Span::SECOND).await;
        self.notices.edit(name, |health| health.waiting = None);
        Handed::Over
    }

    fn not_delivered(&self, name: &Name, error: &NotDelivered) {
        let boot = self.clock.boot();
        let mut news = false;
        self.notices.edit(name, |health| {
            health.failing.get_or_insert(boot);
            news = health.told.as_ref() != Some(error);
            health.told = Some(error.clone());
        });
        match error {
            NotDelivered::Gone => {
                tracing::error!(notice = %name, "the receiver wants no more notices (410): it gets none until the configuration is reloaded");
            }
            _ if news => tracing::warn!(notice = %name, %error, "a notice could not be delivered; it is tried again"),
            _ => {}
        }
    }

    fn delivered(&self, name: &Name) {
        let mut failed = false;
        self.notices.edit(name, |health| {
            failed = health.failing.take().is_some();
            health.told = None;
        });
        if failed {
            tracing::info!(notice = %name, "the receiver takes notices again");
        }
    }
}

/// Doubles, with jitter: managers and receivers that failed together do not come back together. What the receiver asks
/// for is heeded, within bounds.
fn pause_after(failures: u32, error: &NotDelivered) -> Span {
    let most = RETRY_MIN.times(1 << failures.min(10)).min(RETRY_MAX);
    let own = random::span_between(Span::from_millis(most.as_millis() / 2), most);
    match error {
        NotDelivered::Later { after: Some(after), .. } => own.max((*after).min(RETRY_AFTER_MAX)),
        _ => own,
    }
}
