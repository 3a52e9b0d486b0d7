//! What happens to the installation: operators, configurations, outages, crashes, clocks, restored copies.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::decide::{Confirmation, Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::Policy;
use jwksd::keyring::record::KeyState;
use jwksd::keyring::recover::{Recovered, ServedKey};
use jwksd::keyring::time::Span;
use jwksd::seal::KeyEncryptionKey;
use jwksd::store::ledger::{RecoveryRequest, recover_store};

use crate::history::Event;
use crate::keys::{KeyId, id_of, pair};
use crate::kms::Mood;
use crate::life::BEGINNING;
use crate::records::Record;
use crate::seat::declare;
use crate::world::{Due, KEYSETS, Note, Source, World};

/// Whatever waits may sign as soon as it may.
const CONFIRM: Intent = Intent::Rotate { allow_unpropagated: false, confirm_algorithm: Some(Confirmation::Any) };

/// A machine whose store was restored starts after so long, in milliseconds.
const RESTORED_AFTER: i64 = 500;

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
            Event::Revoke { seat, which } => {
                self.ask_meanwhile().await?;
                self.revoke(seat, which);
            }
            Event::Compromise { seat } => {
                self.ask_meanwhile().await?;
                self.operate(seat, Intent::Compromise);
            }
            Event::Configure { seat, policy } => {
                let policy = self.setup.policies[policy].clone();
                self.configure(seat, |wanted| {
                    let algorithm = wanted.algorithm;
                    *wanted = Policy { algorithm, ..policy };
                });
            }
            Event::Algorithm { seat, other } => {
                let algorithm = if other { Algorithm::Es384 } else { Algorithm::Es256 };
                self.configure(seat, |wanted| wanted.algorithm = algorithm);
            }
            Event::Confirm { seat } => self.operate(seat, CONFIRM),
            Event::Drain { seat } => {
                self.stats.drains += 1;
                self.operate(seat, Intent::Drain);
            }
            Event::Undrain { seat } => self.operate(seat, Intent::Undrain),
            Event::Backup => self.saved = Some((self.common.hub.copy(), now)),
            Event::Recover { marks } => self.recover(marks).await?,
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
            Event::Import(import) => self.import(import),
            Event::RevokeEarlier { seat, number } => self.revoke_earlier(seat, number),
            Event::Show { location, shown, lasts } => self.show(location, shown, lasts),
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
    pub fn operate(&mut self, number: usize, intent: Intent) {
        let (seat, keyset) = (number % self.seats.len(), self.keyset_of(number));
        self.operate_on(seat, keyset, intent);
    }

    /// Events name replicas by larger numbers than there are: what is left over says which keyset.
    pub fn keyset_of(&self, number: usize) -> &'static str {
        KEYSETS[number / self.seats.len() % self.setup.keysets]
    }

    fn operate_on(&mut self, seat: usize, keyset: &str, intent: Intent) {
        let (now, document) = (self.now(), World::document(keyset));
        let Some((engine, cell)) = self.seats[seat].engine().cloned().zip(self.seats[seat].cell(keyset)) else {
            return;
        };
        match &intent {
            Intent::Rotate { allow_unpropagated: true, .. } => _ = self.records.emergencies.insert(document, now),
            Intent::Rotate { confirm_algorithm: Some(_), .. } => _ = self.records.confirmed.insert(document),
            Intent::Drain => _ = self.records.drains.insert(document),
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
        let (what, notes, from) = (format!("{intent:?}"), self.notes.clone(), self.source(seat, keyset));
        let (actor, reason) = ("sim".to_owned(), Some("simulation".to_owned()));
        let request = Request { intent, actor, reason, dry_run: false, if_generation: None, idempotency: None };
        tokio::spawn(async move {
            let answer = engine.command(&cell, request).await.map_err(|error| error.to_string());
            notes.lock().unwrap().push(Note::Answer { from, what, answer });
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

    /// Applications ask for tokens all the time, and a remote signature may take longer than a revocation.
    async fn ask_meanwhile(&mut self) -> Result<(), String> {
        if self.setup.is_remote { self.sign(true).await } else { Ok(()) }
    }

    fn configure(&mut self, seat: usize, change: impl FnOnce(&mut Policy)) {
        let seat = seat % self.seats.len();
        if !self.seats[seat].writes() {
            return;
        }
        self.configured_at = self.now();
        let mut policy = (*self.seats[seat].declared[0].policy).clone();
        change(&mut policy);
        let declared: Vec<_> = KEYSETS.iter().take(self.setup.keysets).map(|keyset| declare(keyset, &policy)).collect();
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

    /// The machine is lost and its store with it; what is left is a copy, and what verifiers are served.
    async fn recover(&mut self, marks: bool) -> Result<(), String> {
        let now = self.now();
        let Some((older, made_at)) = self.saved.take() else { return Ok(()) };
        let Some(served) = self.seats[0].serve(now)? else { return Ok(()) };
        // Revocations and longer lives that nobody remembers are lost, and nobody promises anything else.
        let forgets = self.configured_at >= made_at
            || !self.imports.is_empty()
            || self.records.revoked.values().any(|(_, at)| *at >= made_at);
        if forgets || self.jumped_until[0] > now {
            return Ok(());
        }
        self.fall(0, RESTORED_AFTER);
        self.look_around()?;
        self.stats.recovered += 1;
        self.tell(|| format!("a copy of {made_at} ms takes the place of the store, with its marks: {marks}"));
        match marks {
            true => self.common.hub.restore(&older),
            false => self.common.hub.restore_records(&older),
        }
        self.go_back()?;
        let keys = served.keys.iter().map(|id| pair(*id)).map(|pair| ServedKey {
            kid: pair.kid.clone(),
            algorithm: pair.algorithm(),
            public: pair.public.clone(),
        });
        let served = BTreeMap::from([(Name::parse(KEYSETS[0]).unwrap(), keys.collect::<Vec<_>>())]);
        let request = RecoveryRequest {
            evidence: &[],
            served: &served,
            lose_newer: false,
            dry_run: false,
            actor: "sim",
            reason: None,
            now: BEGINNING + Span::from_millis(now + self.seats[0].ahead.load(Relaxed)),
        };
        let recovered = recover_store(self.seats[0].store_of_an_operator(&self.common), &self.seals(), &request).await;
        let recovered = recovered.map_err(|error| format!("the store cannot be recovered: {error}"))?;
        self.tell(|| recovered.keysets.iter().map(|keyset| told(&keyset.recovered)).collect());
        self.common.hub.written();
        self.go_back()
    }

    /// The oracle goes on from what is stored now.
    fn go_back(&mut self) -> Result<(), String> {
        let now = self.now();
        for (document, bytes) in self.common.hub.keyrings() {
            self.records.begin_again(&document, &bytes, now)?;
        }
        let with_private =
            |record: &Record| record.keys.values().filter(|key| key.has_private).map(|key| key.id).collect::<Vec<_>>();
        let kept: BTreeSet<KeyId> = self.records.all().flat_map(|(_, record)| with_private(record)).collect();
        self.lost.extend(self.common.kms.go_back(&kept));
        self.lost_until = now;
        let live = |key: &KeyId| self.records.find(*key).is_some_and(|(_, kept)| !kept.state.has_ended());
        self.ended_at.retain(|key, _| !live(key));
        Ok(())
    }

    fn seals(&self) -> [Arc<dyn KeyEncryptionKey>; 1] {
        [self.common.seal.clone()]
    }

    /// Everything is put right.
    pub fn heal(&mut self) -> Result<(), String> {
        self.tell(|| "everything is put right".to_owned());
        let now = self.now();
        self.backup = None;
        self.stats.places = self.common.doom.is_over();
        self.put_back()?;
        self.common.locations.heal();
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
                if self.records.drained.contains_key(&World::document(keyset)) {
                    self.operate_on(seat, keyset, Intent::Undrain);
                }
            }
        }
    }

    /// An operator looks what waits for a word, and gives it.
    pub fn confirm(&mut self) {
        let Some(seat) = (0..self.seats.len()).find(|seat| self.seats[*seat].writes()) else { return };
        for keyset in KEYSETS.iter().take(self.setup.keysets) {
            if self.records.waits_for_a_word(&World::document(keyset)) {
                self.operate_on(seat, keyset, CONFIRM);
            }
        }
    }

    pub fn heed(&mut self, note: Note) -> Result<(), String> {
        let now = self.now();
        match note {
            Note::Signed { from, shown, at, issued } => self.signed(&from, (shown, at), issued),
            Note::Answer { from, what, answer } => {
                let Source { seat, process, keyset } = from;
                let told = match &answer {
                    Ok(outcome) => outcome.changes.iter().map(|c| format!("{} {} ", c.serial, c.to)).collect(),
                    Err(error) => error.clone(),
                };
                self.tell_of(seat, || format!("answers {keyset} {what}: {told}"));
                let Ok(outcome) = answer else { return Ok(()) };
                if outcome.action == "import" {
                    let keys = outcome.changes.iter().filter_map(|change| id_of(change.kid.as_str()));
                    self.judge_import(&self.seats[seat].name, &keys.collect::<Vec<_>>())?;
                }
                let revoked = outcome.changes.iter().filter(|change| change.to == KeyState::Revoked);
                let revoked: Vec<KeyId> = revoked.filter_map(|change| id_of(change.kid.as_str())).collect();
                if !revoked.is_empty() && process == self.seats[seat].number() {
                    self.stats.raced += self.seats[seat].under_way.load(Relaxed);
                }
                self.answered.extend(revoked.into_iter().map(|key| (seat, process, key)));
                let Some(until) = outcome.exposure.as_ref().and_then(|exposure| exposure.until) else { return Ok(()) };
                let ahead = self.seats[seat].ahead.load(Relaxed);
                let until = until.as_millis() - BEGINNING.as_millis() - ahead;
                for change in outcome.changes.iter().filter(|change| change.to == KeyState::Revoked) {
                    self.stats.revocations += 1;
                    if let Some(key) = id_of(change.kid.as_str()) {
                        self.at(until + 1, Due::Exposure { key, revoked_at: now });
                    }
                }
                Ok(())
            }
        }
    }
}

fn told(recovered: &Recovered) -> String {
    let Recovered { kept, revoked, waiting, .. } = recovered;
    format!("recovered: kept {}, revoked {}, waiting {}", kept.len(), revoked.len(), waiting.len())
}
