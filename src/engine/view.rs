//! What an operator and Prometheus see of a keyset.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Engine;
use super::cell::KeysetCell;
use super::snapshot::KeysetSnapshot;
use crate::keyring::outlook::{Alarm, Outlook, outlook};
use crate::keyring::plan::is_held;
use crate::keyring::policy::Policy;
use crate::keyring::record::{KeyState, Keyring};
use crate::keyring::time::{Span, Timestamp};
use crate::keyring::timeline::{Timeline, Window, timeline};
use crate::telemetry::audit::{LifecycleEvent, lifecycle};

/// A keyset as it is now and what lies ahead.
pub struct Sight {
    pub snapshot: Arc<KeysetSnapshot>,
    pub outlook: Outlook,
    pub alarms: BTreeSet<Alarm>,
    /// There is an active key, and nothing is known to keep it from signing.
    pub can_sign: bool,
    pub now: Timestamp,
}

/// How a keyset is, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Ok,
    /// It signs and publishes, but something needs an operator.
    Degraded,
    /// It cannot sign.
    Failing,
}

impl Health {
    pub const fn as_str(self) -> &'static str {
        match self {
            Health::Ok => "ok",
            Health::Degraded => "degraded",
            Health::Failing => "failing",
        }
    }
}

impl Sight {
    pub fn health(&self) -> Health {
        if !self.can_sign && self.snapshot.is_to_sign() {
            Health::Failing
        } else if self.alarms.is_empty() {
            Health::Ok
        } else {
            Health::Degraded
        }
    }
}

impl Engine {
    /// Looks at a keyset without locking anything.
    pub fn look(&self, cell: &KeysetCell) -> Sight {
        let snapshot = cell.snapshot.load_full();
        let facts = self.facts(cell, &snapshot);
        let outlook = outlook(&snapshot.keyring, &facts);
        let mut alarms = outlook.alarms.clone();
        if snapshot.frozen.is_some() {
            alarms.insert(Alarm::Frozen);
        }
        if snapshot.unauthenticated {
            alarms.insert(Alarm::Unauthenticated);
        }
        if snapshot.store_failing {
            alarms.insert(Alarm::StoreUnavailable);
        }
        if self.following.fails() {
            alarms.insert(Alarm::StoreUnavailable);
        }
        if cell.is_superseded(&snapshot) {
            alarms.insert(Alarm::Superseded);
        }
        let (rotation, boot) = (&snapshot.keyring.policy.rotation, self.clock.boot());
        if cell.lags_for_longer_than(rotation.publish_lag, boot) {
            alarms.insert(Alarm::ReplicaLagging);
        }
        let stale = cell.is_stale(rotation.staleness_limit, boot);
        if stale {
            alarms.insert(Alarm::Stale);
        }
        if self.heartbeat_fails() {
            alarms.insert(Alarm::HeartbeatFailed);
        }
        alarms.extend(cell.issuer.probes().alarms());
        alarms.extend(self.place_alarms(cell));
        if cell
            .remote
            .disabled()
            .is_some_and(|serial| snapshot.keyring.active().is_some_and(|key| key.serial == serial))
        {
            alarms.insert(Alarm::KeyDisabled);
        }
        if self.notices.fails(&cell.name, boot) {
            alarms.insert(Alarm::NoticeFailing);
        }
        let silent = cell.is_known_not_to_sign();
        if silent {
            alarms.insert(Alarm::BackendUnavailable);
        }
        let can_sign = snapshot.active.is_some() && !silent && !stale;
        let now = facts.now;
        Sight { can_sign, outlook, alarms, now, snapshot }
    }

    /// A keyset's keys over time, by the policy in force; as much as `window` says of it.
    pub fn timeline(&self, cell: &KeysetCell, window: impl FnOnce(&Policy) -> Window) -> Timeline {
        let snapshot = cell.snapshot.load_full();
        let facts = self.facts(cell, &snapshot);
        let stands_still = snapshot.frozen.is_some() || snapshot.unauthenticated;
        timeline(&snapshot.keyring, &facts, window(&snapshot.keyring.policy), stands_still)
    }

    /// Why what this replica publishes may be too old for verifiers, or is missing; empty when it is to be asked
    /// (DESIGN §3.8).
    pub fn missing_to_publish(&self) -> Vec<String> {
        let (directory, boot) = (self.directory(), self.clock.boot());
        let mut missing = Vec::new();
        for cell in &directory.order {
            if cell.is_unread(cell.snapshot.load().keyring.policy.publishing_limit(), boot) {
                let name = &cell.name;
                missing.push(format!("keyset {name} was not read from the store for longer than propagation allows"));
            }
        }
        for issuer in &directory.issuers {
            let wanted = directory.keysets_of(issuer).any(|cell| !cell.snapshot.load().keyring.drained);
            if wanted && issuer.served().is_none() {
                missing.push(format!("issuer {} has no published key", issuer.policy.load().name));
            }
        }
        missing
    }

    /// What keeps this process from signing, in words.
    pub fn missing_to_sign(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if self.is_sealed() {
            missing.push("the seal has not been opened yet".to_owned());
        }
        for cell in &self.directory().order {
            let (snapshot, name) = (cell.snapshot.load(), &cell.name);
            if snapshot.active.is_none() && snapshot.is_to_sign() {
                let why = if snapshot.keyring.drained { "is drained, but configured" } else { "has no active key" };
                missing.push(format!("keyset {name} {why}"));
            }
            if cell.is_stale(snapshot.keyring.policy.rotation.staleness_limit, self.clock.boot()) {
                missing.push(format!("keyset {name} was not confirmed by the store for staleness_limit"));
            }
            if cell.is_known_not_to_sign() {
                missing.push(format!("the backend of keyset {name} does not sign"));
            }
        }
        missing
    }

    /// Brings every keyset's gauges up to date; a scrape sees the state of its own moment.
    pub fn refresh_all_metrics(&self) {
        self.metrics.set_clock_frozen(self.clock.read().frozen || self.following.clock_differs());
        let cells = self.directory();
        let limits = cells.order.iter().map(|cell| cell.snapshot.load().keyring.policy.rotation.staleness_limit);
        self.metrics.set_staleness_limit(limits.min().unwrap_or(Span::ZERO));
        self.metrics.set_notices_oldest(self.notices.oldest());
        for cell in &self.directory().order {
            self.refresh_metrics(cell);
        }
    }

    pub(super) fn refresh_metrics(&self, cell: &KeysetCell) {
        let sight = self.look(cell);
        let keyring = &sight.snapshot.keyring;
        for state in KeyState::ALL {
            let count = keyring.keys.iter().filter(|key| key.state == state).count();
            cell.metrics.set_keys(state, count as u64);
        }
        cell.metrics.set_active_key_activated(keyring.active().and_then(|key| key.activated_at));
        let next = sight.outlook.next_rotation.as_ref();
        cell.metrics.set_next_rotation(next.map(|next| next.at));
        cell.metrics.set_rotation_overdue(next.map(|next| next.overdue).unwrap_or_default());
        cell.metrics.set_standby_ready(sight.outlook.standby_ready > 0);
        cell.metrics.set_standby_expected(sight.outlook.standby_expected);
        cell.metrics.set_hold(is_held(keyring.hold.as_ref(), sight.now));
        cell.metrics.set_drained(keyring.drained);
        // The one process that holds a file store's lock confirms it by being alive (DESIGN §1, S).
        let ago = cell.confirmed_at().map_or(0, |at| self.clock.boot().as_millis().saturating_sub(at));
        cell.metrics.set_confirmed(if ago == i64::MAX { Timestamp::EPOCH } else { sight.now - Span::from_millis(ago) });
        cell.metrics.set_alarms(sight.alarms.iter().copied());
    }

    /// The backend of the key that signs, else the one that is to make it: keys stay where they were made.
    pub(super) fn signing_backend(&self, keyring: &Keyring) -> &'static str {
        let private = keyring.active().and_then(|key| key.private.as_ref());
        let name = private.map_or(keyring.policy.backend.as_str(), |private| private.backend.as_str());
        self.backend(name).map_or("local", |backend| backend.name())
    }

    /// One line per life-cycle event, from the audit entries that a write brought.
    pub(super) fn report(&self, cell: &KeysetCell, before: &Keyring, next: &Keyring) {
        for entry in next.journal.audit.iter().filter(|entry| entry.seq >= before.journal.next_seq) {
            let line = LifecycleEvent {
                at: entry.at,
                action: &entry.action,
                keyset: &next.keyset,
                generation: next.generation,
                actor: &entry.actor,
                kid: None,
                serial: None,
                from: None,
                to: None,
                reason: entry.reason.as_deref(),
                detail: entry.detail.as_deref(),
            };
            if entry.kids.is_empty() {
                lifecycle(&line);
            }
            for kid in &entry.kids {
                let (was, is) = (before.key_by_kid(kid.as_str()), next.key_by_kid(kid.as_str()));
                let from = was.map(|key| key.state);
                let to = is.map(|key| key.state).filter(|to| Some(*to) != from);
                let serial = is.map(|key| key.serial);
                lifecycle(&LifecycleEvent { kid: Some(kid), serial, from, to, ..line });
            }
        }
        let was = (before.signing_algorithm(), self.signing_backend(before));
        let is = (next.signing_algorithm(), self.signing_backend(next));
        if let (Some(algorithm), backend) = is
            && was != is
        {
            cell.signing_metrics.store(Arc::new(cell.metrics.signing(algorithm, backend)));
        }
    }
}
