//! What happens to the installation: operators, configurations, outages, crashes, clocks, restored copies.

use std::sync::atomic::Ordering::Relaxed;

use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::record::KeyState;
use jwksd::keyring::time::Span;

use crate::history::Event;
use crate::kms::Mood;
use crate::life::BEGINNING;
use crate::seat::declare;
use crate::world::{Due, KEYSETS, Note, World};

/// A copy is so old when it is put back, in milliseconds.
const RESTORE_AFTER: i64 = 9_000;

impl World {
    pub async fn happen(&mut self, event: Event) -> Result<(), String> {
        self.stats.faults += 1;
        let now = self.now();
        self.tell(|| format!("{event:?}"));
        let count = self.seats.len();
        match event {
            Event::Rotate { seat, early } => {
                self.operate(seat, Intent::Rotate { allow_unpropagated: early, confirm_algorithm: None });
            }
            Event::Rollback { seat } => self.operate(seat, Intent::Rollback),
            Event::Hold { seat, lasts } => {
                let until = BEGINNING + Span::from_millis(now + lasts);
                self.operate(seat, Intent::Hold { until: Some(until) });
            }
            Event::Resume { seat } => self.operate(seat, Intent::Resume),
            Event::Revoke { seat, which } => self.revoke(seat, which),
            Event::Compromise { seat } => self.operate(seat, Intent::Compromise),
            Event::Configure { seat, policy } => self.configure(seat, policy),
            Event::Crash { seat, places } => {
                let seat = seat % count;
                if self.jumped_until[seat] <= now
                    && let Some(process) = &self.seats[seat].process
                {
                    process.life.die_after(places);
                }
            }
            Event::Kill { seat, down, forgets } => self.kill(seat % count, down, forgets),
            Event::Stop { seat, lasts } => {
                self.seats[seat % count].stopped_until.store(now + lasts, Relaxed);
                self.unwell(seat % count, now + lasts);
            }
            Event::Cut { seat, lasts, deaf, mute } => {
                let seat = seat % count;
                self.seats[seat].way.set(|weather| (weather.deaf, weather.mute) = (deaf, mute));
                self.unwell(seat, now + lasts);
                self.at(now + lasts, Due::WayHeals(seat));
            }
            Event::Slow { seat, lasts, most } => {
                let seat = seat % count;
                self.seats[seat].way.set(|weather| weather.slow = most);
                // What is under way then still takes its time.
                self.unwell(seat, now + lasts + i64::try_from(most).unwrap() * 4);
                self.at(now + lasts, Due::WayHeals(seat));
            }
            Event::LoseAnswers { seat, count: answers } => {
                self.seats[seat % count].way.set(|weather| weather.lose_answers += answers);
                self.unwell(seat % count, now + 1_000);
            }
            Event::LateWrite { seat, after } => {
                let after = i64::try_from(after).unwrap();
                // A file is written or not when the process hears of it.
                if self.newest.is_none() && !self.setup.is_single {
                    self.seats[seat % count].way.set(|weather| weather.late_write = Some(after.unsigned_abs()));
                    self.late_until = i64::MAX;
                    self.unwell(seat % count, now + after);
                }
            }
            Event::StoreClock { error, lasts } if !self.setup.is_single => {
                self.set_store_clock(error);
                (0..count).for_each(|seat| self.unwell(seat, now + lasts));
                self.at(now + lasts, Due::StoreClockHeals);
            }
            Event::Older { lasts } if !self.setup.is_single => {
                if self.backup.is_none() && self.newest.is_none() {
                    self.backup = Some(self.common.hub.copy());
                    self.at(now + RESTORE_AFTER, Due::Restore { lasts, tries: 8 });
                }
            }
            Event::StoreClock { .. } | Event::Older { .. } => {}
            Event::Mood { mood, lasts } => {
                self.common.kms.set_mood(mood);
                // What was asked for late is done up to twenty seconds later.
                self.kms_well_since = self.kms_well_since.max(now + lasts + 20_000);
                (0..count).for_each(|seat| self.unwell(seat, now + lasts));
                self.at(now + lasts, Due::KmsHeals);
            }
            Event::Drift { seat, ahead } => {
                if self.jumped_until[seat % count] <= now {
                    self.set_clock(seat % count, ahead);
                }
            }
            Event::Jump { seat, by, lasts } => self.jump(seat % count, by, lasts),
        }
        Ok(())
    }

    /// A replica that is restarted by a wrong clock cannot know that it is wrong: nobody promises anything.
    fn jump(&mut self, seat: usize, by: i64, lasts: i64) {
        let now = self.now();
        let Some(process) = self.seats[seat].process.as_ref().filter(|_| self.seats[seat].engine().is_some()) else {
            return;
        };
        process.life.die_after(u64::MAX);
        self.set_clock(seat, by);
        self.jumped_until[seat] = now + lasts;
        self.unwell(seat, now + lasts);
        self.at(now + lasts, Due::ClockHeals(seat));
    }

    fn kill(&mut self, seat: usize, down: i64, forgets: bool) {
        if self.jumped_until[seat] > self.now() {
            return;
        }
        if self.seats[seat].process.is_some() {
            self.fall(seat, down);
            if forgets && self.newest.is_none() {
                self.seats[seat].lose_memory();
            }
        }
    }

    /// Something an operator does at one replica; a refusal is an answer like any other.
    fn operate(&mut self, number: usize, intent: Intent) {
        let (seat, keyset) = (number % self.seats.len(), self.keyset_of(number));
        self.operate_on(seat, keyset, intent);
    }

    /// Events name replicas by larger numbers than there are: what is left over says which keyset.
    fn keyset_of(&self, number: usize) -> &'static str {
        KEYSETS[number / self.seats.len() % self.setup.keysets]
    }

    fn operate_on(&mut self, seat: usize, keyset: &str, intent: Intent) {
        let (now, document) = (self.now(), World::document(keyset));
        let Some((engine, cell)) = self.seats[seat].engine().cloned().zip(self.seats[seat].cell(keyset)) else {
            return;
        };
        match &intent {
            Intent::Rotate { allow_unpropagated: true, .. } => _ = self.records.emergencies.insert(document, now),
            Intent::Compromise => {
                self.records.compromised.insert(document.clone());
                self.records.emergencies.insert(document, now);
            }
            Intent::Revoke { serial } => {
                let key = self.records.of(&document).and_then(|record| record.keys.get(serial));
                self.records.condemned.extend(key.map(|key| key.id));
                self.records.emergencies.insert(document, now);
            }
            _ => {}
        }
        let (what, notes, keyset) = (format!("{intent:?}"), self.notes.clone(), keyset.to_owned());
        let (actor, reason) = ("sim".to_owned(), Some("simulation".to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        tokio::spawn(async move {
            let answer = engine.command(&cell, request).await.map_err(|error| error.to_string());
            notes.lock().unwrap().push(Note::Answer { seat, keyset, what, answer });
        });
    }

    /// The active key, or any that is published, as the replica shows them.
    fn revoke(&mut self, seat: usize, which: Option<usize>) {
        let Some(cell) = self.seats[seat % self.seats.len()].cell(self.keyset_of(seat)) else { return };
        let keyring = cell.snapshot.load().keyring.clone();
        let keys: Vec<u64> = keyring.published().map(|key| key.serial).collect();
        let serial = match which {
            None => keyring.active().map(|key| key.serial),
            Some(which) => keys.get(which % keys.len().max(1)).copied(),
        };
        if let Some(serial) = serial {
            self.operate(seat, Intent::Revoke { serial });
        }
    }

    fn configure(&mut self, seat: usize, policy: usize) {
        let seat = seat % self.seats.len();
        if !self.seats[seat].writes() {
            return;
        }
        let policy = &self.setup.policies[policy];
        let declared: Vec<_> = KEYSETS.iter().take(self.setup.keysets).map(|keyset| declare(keyset, policy)).collect();
        self.seats[seat].declared.clone_from(&declared);
        if let Some(engine) = self.seats[seat].engine().cloned() {
            tokio::spawn(async move {
                if engine.configure(&declared).await.is_ok() {
                    engine.schedule();
                }
            });
        }
    }

    /// Everybody has seen the newest; then an older copy is put in its place. Otherwise it is tried again.
    pub fn restore(&mut self, lasts: i64, tries: u32) {
        let now = self.now();
        let is_current = |seat: &crate::seat::Seat| {
            self.records.all().all(|(document, record)| match document {
                jwksd::store::Document::Keyring(name) => seat
                    .cell(name.as_str())
                    .is_some_and(|cell| cell.snapshot.load().keyring.generation == record.generation),
                _ => true,
            })
        };
        let settled = now > self.all_well_since + 1_000 && now > self.late_until;
        let Some(older) = self.backup.clone() else { return };
        // What is written on over a copy of the newest is nothing wrong.
        let differs = self.records.all().all(|(document, _)| older.read(document) != self.common.hub.read(document));
        if !differs || !settled || !self.seats.iter().all(is_current) {
            if tries == 0 {
                self.backup = None;
            } else {
                self.at(now + RESTORE_AFTER, Due::Restore { lasts, tries: tries - 1 });
            }
            return;
        }
        self.backup = None;
        self.stats.restored += 1;
        self.tell(|| "an older copy of the store is put back".to_owned());
        self.newest = Some(self.common.hub.copy());
        self.common.hub.restore(&older);
        (0..self.seats.len()).for_each(|seat| self.unwell(seat, now + lasts));
        self.at(now + lasts, Due::PutBack);
    }

    pub fn put_back(&mut self) -> Result<(), String> {
        if let Some(newest) = self.newest.take() {
            self.tell(|| "the newest copy of the store is put back".to_owned());
            self.common.hub.restore(&newest);
        }
        Ok(())
    }

    /// Everything is put right.
    pub fn heal(&mut self) -> Result<(), String> {
        self.tell(|| "everything is put right".to_owned());
        let now = self.now();
        self.backup = None;
        self.stats.places = self.common.doom.is_over();
        self.put_back()?;
        self.common.kms.set_mood(Mood::Well);
        self.kms_well_since = self.kms_well_since.min(now + 20_000);
        self.set_store_clock(0);
        for seat in 0..self.seats.len() {
            self.seats[seat].way.heal();
            self.seats[seat].stopped_until.store(0, Relaxed);
            self.set_clock(seat, 0);
            self.jumped_until[seat] = 0;
            self.unwell(seat, now);
            // Whoever is down comes back.
            self.at(now, Due::Start(seat));
            if let Some(process) = &self.seats[seat].process {
                process.life.die_after(u64::MAX);
            }
        }
        Ok(())
    }

    /// Holds end where they can be ended.
    pub fn resume(&mut self) {
        for seat in (0..self.seats.len()).filter(|seat| self.seats[*seat].writes()).collect::<Vec<_>>() {
            for keyset in KEYSETS.iter().take(self.setup.keysets) {
                self.operate_on(seat, keyset, Intent::Resume);
            }
        }
    }

    pub fn heed(&mut self, note: Note) -> Result<(), String> {
        let now = self.now();
        match note {
            Note::Signed { seat, keyset, issued } => self.signed(seat, &keyset, issued),
            Note::Answer { seat, keyset, what, answer } => {
                let told = match &answer {
                    Ok(outcome) => outcome.changes.iter().map(|c| format!("{} {} ", c.serial, c.to)).collect(),
                    Err(error) => error.clone(),
                };
                self.tell_of(seat, || format!("answers {keyset} {what}: {told}"));
                let Ok(outcome) = answer else { return Ok(()) };
                let Some(until) = outcome.exposure.as_ref().and_then(|exposure| exposure.until) else { return Ok(()) };
                let ahead = self.seats[seat].ahead.load(Relaxed);
                let until = until.as_millis() - BEGINNING.as_millis() - ahead;
                for change in outcome.changes.iter().filter(|change| change.to == KeyState::Revoked) {
                    self.stats.revocations += 1;
                    if let Some(key) = crate::keys::id_of(change.kid.as_str()) {
                        self.at(until + 1, Due::Exposure { key, revoked_at: now });
                    }
                }
                Ok(())
            }
        }
    }
}
