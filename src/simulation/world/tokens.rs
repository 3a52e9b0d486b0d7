//! Tokens in a simulation: which are watched, when verifiers are shown them, and what they make of them.

use super::{Event, World};
use crate::keyring::record::Serial;
use crate::keyring::time::{Span, Timestamp};
use crate::simulation::Reality;
use crate::simulation::report::{Incident, Margin};
use crate::simulation::rules::Rules;
use crate::simulation::served::Document;
use crate::simulation::verifying::{Life, Presentation};

impl<R: Rules> World<'_, R> {
    /// Watches tokens that are signed at this instant: shown as soon as they are live, at their last moment, or between.
    pub(super) fn watch(&mut self, replica: usize, key: Serial) {
        if self.excused.contains(&key) || self.scenario.reality.verifiers.is_empty() {
            return;
        }
        let Some(view) = self.replicas[replica].view.clone() else { return };
        let clock = self.replicas[replica].clock(self.now).as_millis();
        let reality: &Reality = &self.scenario.reality;
        let longest =
            view.key(key).map_or(view.policy.tokens.max_ttl, |key| key.ttl_bound.min(view.policy.tokens.max_ttl));
        for _ in 0..reality.tokens {
            let ttl = Span::from_secs(self.random.extreme(longest.as_secs()).max(1));
            let life = Life::issued(clock, ttl, view.policy.tokens.backdate);
            let verifier = self.random.index(reality.verifiers.len());
            let (from, to) = life.for_clock(self.clocks[verifier]);
            let from = from.max(self.now);
            if to < from {
                continue;
            }
            let at = from + self.random.extreme(to - from);
            let age = reality.verifiers[verifier].age(reality.layers, &mut self.random);
            let last = self.last_live.entry(key).or_insert((to, verifier));
            *last = (*last).max((to, verifier));
            self.push(at, Event::Present(Presentation { key, verifier, signed: self.now, age }));
        }
    }

    pub(super) fn judge(&mut self, shown: Presentation) {
        if self.excused.contains(&shown.key) {
            return;
        }
        let document = self.served.document(self.now - shown.age, self.now, &mut self.random);
        self.report.presented += 1;
        if document.is_some_and(|document| self.served.contains(document, shown.key)) {
            return self.note_margin(shown);
        }
        self.report.rejected += 1;
        let (is_early, missed) = document.map_or((true, 0), |document| self.served.lack(document, shown.key, self.now));
        let missed_by = Span::from_millis(missed);
        if self.report.incident.as_ref().is_some_and(|worst| worst.missed_by >= missed_by) {
            return;
        }
        let (from, until) = self.served.life(shown.key).map_or((None, None), |(from, until)| (Some(from), until));
        self.report.story = self.story.iter().cloned().collect();
        self.report.incident = Some(Incident {
            at: Timestamp::from_millis(self.now),
            verifier: self.scenario.reality.verifiers[shown.verifier].name.clone(),
            key: shown.key,
            signed_at: Timestamp::from_millis(shown.signed),
            document_of: document.map(|Document { of, .. }| Timestamp::from_millis(of)),
            served_from: from.map(Timestamp::from_millis),
            served_until: until.map(Timestamp::from_millis),
            is_early,
            missed_by,
        });
    }

    /// How much older the document could have been.
    fn note_margin(&mut self, shown: Presentation) {
        let verifier = &self.scenario.reality.verifiers[shown.verifier];
        if shown.key == 1 {
            return; // The first key of an issuer signs at once: nobody holds a document without it.
        }
        let Some(since) = self.served.known_since(shown.key, self.now) else { return };
        let margin = Margin {
            millis: self.now - verifier.oldest(self.scenario.reality.layers) - since,
            at: Timestamp::from_millis(self.now),
            verifier: verifier.name.clone(),
            key: shown.key,
        };
        keep_least(&mut self.report.early, margin);
    }

    /// A key is shown no more: how long that is after its last live token.
    pub(super) fn note_removal(&mut self, key: Serial) {
        let Some((last, verifier)) = self.last_live.get(&key) else { return };
        let margin = Margin {
            millis: self.now - last,
            at: Timestamp::from_millis(self.now),
            verifier: self.scenario.reality.verifiers[*verifier].name.clone(),
            key,
        };
        keep_least(&mut self.report.late, margin);
    }
}

fn keep_least(kept: &mut Option<Margin>, margin: Margin) {
    if kept.as_ref().is_none_or(|kept| margin.millis < kept.millis) {
        *kept = Some(margin);
    }
}
