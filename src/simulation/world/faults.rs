//! What goes wrong in a simulation, and when: faults of all kinds, and operators who come at bad moments.

use super::{Event, World};
use crate::keyring::decide::{Decision, Intent, Request};
use crate::keyring::record::KeyState;
use crate::keyring::time::Span;
use crate::simulation::rules::Rules;

/// To the oldest key that waits and may sign.
const ROTATE: Intent = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None };

impl<R: Rules> World<'_, R> {
    /// How long a fault lasts or is away from the next: of the order of what the policy waits for.
    pub(super) fn scale(&self) -> i64 {
        let rotation = &self.store.policy.rotation;
        (rotation.propagation.as_millis() / 2).max(1000)
    }

    pub(super) fn next_fault(&mut self) {
        let wait = self.scale().max(self.pause);
        let at = self.now + 1 + self.random.between(0, wait * 2);
        self.push(at, Event::Fault);
    }

    pub(super) fn next_configuration(&mut self) {
        let wait = self.scale() * 10;
        let at = self.now + 1 + self.random.between(0, wait * 2);
        self.push(at, Event::Configure);
    }

    pub(super) fn fault(&mut self) {
        let faults = self.scenario.reality.faults;
        let replica = self.random.index(self.replicas.len());
        let scale = self.scale();
        let last = self.random.between(1, scale);
        match self.random.below(5) {
            0 if faults.crashes => self.crash(replica, last),
            1 if faults.outages && self.replicas[replica].linked && self.replicas.len() > 1 => {
                self.tell(|| format!("replica {replica} is cut off for {}", Span::from_millis(last)));
                self.confirm(replica);
                self.replicas[replica].linked = false;
                self.push(self.now + last, Event::Linked { replica });
                self.limit(replica);
            }
            2 if faults.outages && self.store_up && self.replicas.len() > 1 => {
                self.tell(|| format!("the store is away for {}", Span::from_millis(last)));
                self.confirm_all();
                self.store_up = false;
                self.push(self.now + last, Event::StoreBack);
                (0..self.replicas.len()).for_each(|replica| self.limit(replica));
            }
            3 if faults.backend && self.backend_up => {
                self.tell(|| format!("the backend is away for {}", Span::from_millis(last)));
                self.backend_up = false;
                self.push(self.now + last, Event::BackendBack);
            }
            4 if faults.operators => self.operate(),
            _ => {}
        }
    }

    fn crash(&mut self, replica: usize, downtime: i64) {
        if !self.replicas[replica].up {
            return;
        }
        self.tell(|| format!("replica {replica} crashes for {}", Span::from_millis(downtime)));
        self.report.crashes += 1;
        self.sign_with(replica, None);
        self.answer(replica, false);
        self.replicas[replica].crash();
        self.push(self.now + downtime, Event::Return { replica });
    }

    pub(super) fn come_back(&mut self, replica: usize) {
        self.replicas[replica].up = true;
        self.look(replica);
    }

    fn operate(&mut self) {
        let manager = self.random.index(self.managers());
        if !self.reaches(manager) {
            return;
        }
        self.look(manager);
        let retiring = self.store.keys.iter().find(|key| key.state == KeyState::Retiring).map(|key| key.serial);
        let active = self.store.active().map(|key| key.serial);
        let clock = self.replicas[manager].clock(self.now);
        let intent = match self.random.below(12) {
            0..=4 => ROTATE,
            5 | 6 => Intent::Rollback,
            7 => Intent::Hold { until: Some(clock + Span::from_millis(self.scale())) },
            8 => Intent::Hold { until: None },
            9 | 10 => Intent::Resume,
            _ => match if self.random.below(2) == 0 { active } else { retiring } {
                Some(serial) => Intent::Revoke { serial },
                None => ROTATE,
            },
        };
        self.ask(manager, intent);
    }

    pub(super) fn rush(&mut self) {
        for _ in 0..self.store.policy.rotation.successors {
            let manager = self.random.index(self.managers());
            if self.reaches(manager) {
                self.look(manager);
                self.ask(manager, ROTATE);
            }
        }
    }

    /// What an operator asks of a manager that reaches the store.
    fn ask(&mut self, manager: usize, intent: Intent) {
        let active = self.store.active().map(|key| key.serial);
        let request = Request {
            intent,
            actor: "operator".to_owned(),
            reason: None,
            dry_run: false,
            if_generation: None,
            idempotency: None,
        };
        let it = &self.replicas[manager];
        let facts = it.facts(&self.store, &self.scenario.policies[self.policy], self.ever_served, self.now);
        // A revocation may have to take a key that not everyone knows yet: what it signs is not promised.
        let Ok(Decision::Write { next, outcome }) = self.rules.decide(&self.store, &facts, &request) else { return };
        self.tell(|| {
            let what = match &request.intent {
                Intent::Rotate { .. } => "rotates".to_owned(),
                Intent::Rollback => "rolls back".to_owned(),
                Intent::Hold { .. } => "holds".to_owned(),
                Intent::Resume => "resumes".to_owned(),
                Intent::Revoke { serial } => format!("revokes key {serial}"),
                other => format!("{other:?}"),
            };
            let signs = next.active().map_or("none".to_owned(), |key| key.serial.to_string());
            format!("an operator {what} at replica {manager}: key {signs} signs")
        });
        if let Intent::Revoke { serial } = request.intent {
            self.report.revocations += 1;
            self.revoked.insert(serial, next.generation);
            self.excused.insert(serial);
        }
        self.report.rotations += u64::from(next.active().map(|key| key.serial) != active);
        if outcome.unpropagated
            && let Some(key) = next.active()
        {
            self.excused.insert(key.serial);
        }
        self.store_next(manager, *next);
        self.look(manager);
        if matches!(request.intent, Intent::Rotate { .. }) && self.random.below(2) == 0 {
            let propagation = self.store.policy.rotation.propagation.as_millis();
            let skew = self.random.extreme(self.scenario.reality.skew.as_millis());
            self.push(self.now + propagation - skew.min(propagation) + 1, Event::Rush);
        }
    }
}
