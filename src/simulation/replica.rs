//! One replica as a simulation needs it: what it knows of the keyring, since when, and what it does with that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::served::Moment;
use crate::keyring::plan::{Desired, Facts, SlowStep};
use crate::keyring::policy::Policy;
use crate::keyring::record::{Key, KeyState, Keyring, Serial};
use crate::keyring::time::{Span, Timestamp};
use crate::keyring::timing::MAX_KEYS;

pub(super) struct Replica {
    /// How far its clock is ahead of true time, in milliseconds.
    pub ahead: i64,
    pub up: bool,
    /// It reaches the store, if that is there.
    pub linked: bool,
    /// The last moment at which it had confirmed its keyring.
    pub confirmed: Moment,
    pub view: Option<Arc<Keyring>>,
    published: BTreeMap<Serial, Timestamp>,
    stopped: BTreeMap<Serial, Timestamp>,
    pub backoff: BTreeMap<SlowStep, Timestamp>,
    /// When publication resumed after a silence, by its own clock.
    pub resumed_at: Option<Timestamp>,
    /// The key it signs with, until it is told otherwise or may not any more.
    pub signing: Option<Serial>,
    pub answering: bool,
    /// The look that counts: earlier ones that are still queued are passed over.
    pub next_look: Moment,
}

impl Replica {
    pub fn new(ahead: i64) -> Replica {
        Replica {
            ahead,
            up: true,
            linked: true,
            confirmed: 0,
            view: None,
            published: BTreeMap::new(),
            stopped: BTreeMap::new(),
            backoff: BTreeMap::new(),
            resumed_at: None,
            signing: None,
            answering: false,
            next_look: Moment::MAX,
        }
    }

    /// What its clock shows.
    pub fn clock(&self, now: Moment) -> Timestamp {
        Timestamp::from_millis(now + self.ahead)
    }

    /// When its clock will show `at`.
    pub fn moment(&self, at: Timestamp) -> Moment {
        at.as_millis() - self.ahead
    }

    /// Notes what a keyring means for it, as the engine does after each swap.
    pub fn take(&mut self, keyring: Arc<Keyring>, now: Moment) {
        let clock = self.clock(now);
        let keys = |wanted: &dyn Fn(&Key) -> bool| -> Vec<Serial> {
            keyring.keys.iter().filter(|key| wanted(key)).map(|key| key.serial).collect()
        };
        let shown = keys(&|key| key.state.is_published());
        self.published.retain(|serial, _| shown.contains(serial));
        for serial in shown {
            self.published.entry(serial).or_insert(clock);
        }
        let ended = keys(&|key| key.state == KeyState::Retiring && key.stopped_at.is_none());
        self.stopped.retain(|serial, _| ended.contains(serial));
        for serial in ended {
            self.stopped.entry(serial).or_insert(clock);
        }
        self.backoff.retain(|step, _| match step {
            SlowStep::Create { serial } => *serial >= keyring.next_serial,
            SlowStep::Destroy { serial } => keyring.key(*serial).is_some_and(|key| key.private.is_some()),
        });
        self.view = Some(keyring);
    }

    /// It stops without warning: nothing that is only in memory is left.
    pub fn crash(&mut self) {
        *self = Replica { up: false, linked: self.linked, ..Replica::new(self.ahead) };
    }

    pub fn facts<'a>(&self, keyring: &Keyring, policy: &'a Policy, issuer_served: bool, now: Moment) -> Facts<'a> {
        let keys = u32::try_from(keyring.published().count()).unwrap_or(u32::MAX);
        Facts {
            unconfirmed: Some(Vec::new()),
            now: self.clock(now),
            clock_frozen: false,
            removals_not_before: Timestamp::EPOCH,
            desired: Desired::Policy(policy),
            published: self.published.clone(),
            stopped: self.stopped.clone(),
            seen: BTreeMap::new(),
            contested: BTreeSet::new(),
            issuer_served,
            resumed_at: self.resumed_at,
            lagging: BTreeMap::new(),
            room: MAX_KEYS.saturating_sub(keys),
            backoff: self.backoff.clone(),
        }
    }

    /// When it has to stop signing unless it confirms its keyring before (DESIGN §3.8).
    pub fn signs_until(&self) -> Moment {
        self.limited(|policy| policy.rotation.staleness_limit)
    }

    /// When it has to stop publishing unless it confirms its keyring before.
    pub fn answers_until(&self) -> Moment {
        self.limited(Policy::publishing_limit)
    }

    fn limited(&self, limit: impl Fn(&Policy) -> Span) -> Moment {
        self.view.as_ref().map_or(Moment::MAX, |view| self.confirmed.saturating_add(limit(&view.policy).as_millis()))
    }
}
