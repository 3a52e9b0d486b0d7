//! What happens to the replicas: operators, configurations, outages, crashes, stalls, clocks, restored copies.

use jwksd::engine::Declared;
use jwksd::keyring::decide::{Intent, Outcome};
use jwksd::keyring::name::Name;
use jwksd::keyring::record::KeyState;
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Span;
use jwksd::store::{Document, Store};

use crate::line::Crash;
use crate::replica::declare;
use crate::seat::{KINDS, policy_of};
use crate::world::World;

/// Keysets of the issuer; the first is there from the beginning.
const KEYSETS: [&str; 3] = ["default", "second", "third"];

impl World {
    /// `seconds` of anything that may happen.
    pub async fn random_history(&mut self, seconds: u32) -> Result<(), String> {
        for _ in 0..seconds {
            self.happen().await?;
            self.tick().await?;
        }
        Ok(())
    }

    /// Everything is put right, and a while passes in which nothing happens.
    pub async fn settle(&mut self) -> Result<(), String> {
        self.heal().await;
        for _ in 0..15 {
            self.tick().await?;
        }
        for keyset in KEYSETS {
            let _ = self.seats[0].command(keyset, Intent::Resume).await;
            self.read_log()?;
        }
        for _ in 0..110 {
            self.tick().await?;
        }
        // Something is written at any time, and a replica looks within some seconds.
        for _ in 0..10 {
            if self.is_settled().is_ok() {
                break;
            }
            self.tick().await?;
        }
        self.is_settled()
    }

    async fn heal(&mut self) {
        self.tell("everything is put right".to_owned());
        self.put_back().await;
        self.hub_wrong_until = None;
        let now = self.now();
        for seat in &mut self.seats {
            // An answer that is on its way still comes as late as it was to.
            let late = seat.line.late();
            seat.line.heal();
            (seat.down_until, seat.stalled_until, seat.faulty_until, seat.well_since) = (now, now, now, now + late);
        }
        let ahead = self.some_ahead();
        self.common.hub.set_clock_error(Span::from_millis(ahead));
    }

    async fn happen(&mut self) -> Result<(), String> {
        let span = Span::from_millis(1000 + i64::try_from(self.random.below(40_000)).unwrap());
        let number = self.random.below(self.seats.len() as u64) as usize;
        let writer = self.random.below(3) as usize;
        let keyset = KEYSETS[self.random.below(3) as usize];
        let dice = self.random.below(20);
        match self.random.below(500) {
            0..6 => {
                self.operate(writer, keyset, Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None })
                    .await?
            }
            6 => {
                self.operate(writer, keyset, Intent::Rotate { allow_unpropagated: true, confirm_algorithm: None })
                    .await?
            }
            7..10 => self.operate(writer, keyset, Intent::Rollback).await?,
            10 | 11 => {
                let until = self.now() + span;
                self.operate(writer, keyset, Intent::Hold { until: Some(until) }).await?;
            }
            12 => self.operate(writer, keyset, Intent::Hold { until: None }).await?,
            13..17 => self.operate(writer, keyset, Intent::Resume).await?,
            17..20 => self.revoke(writer, keyset, None).await?,
            20 => self.revoke(writer, keyset, Some(dice)).await?,
            21 if dice < 8 => self.operate(writer, keyset, Intent::Compromise).await?,
            22..27 => self.configure(writer, keyset, dice % KINDS).await?,
            27..45 => self.disturb(number, span, dice),
            45 => {
                for number in 0..self.seats.len() {
                    self.disturb(number, span, 0);
                }
            }
            46..52 => self.seats[number].line.set(|faults| faults.lose_answers += 1 + u32::from(dice < 5)),
            52..54 if self.older.is_none() => self.seats[writer].line.set(|faults| faults.late_write = true),
            54..62 => {
                let effect = if dice.is_multiple_of(2) { Crash::Before } else { Crash::After };
                self.seats[number].line.crash_after(dice / 2, effect);
            }
            62..65 => {
                let forgets = dice < 5 && self.older.is_none();
                self.fall(number, span, forgets);
            }
            65..71 => {
                let name = self.seats[number].name.clone();
                self.tell(format!("{name} stalls for {span}"));
                let until = self.now() + span;
                let seat = &mut self.seats[number];
                (seat.stalled_until, seat.well_since) = (until, seat.well_since.max(until));
            }
            71..90 => {
                let ahead = self.some_ahead();
                self.seats[number].set_clock(self.now(), ahead);
            }
            90..93 if self.hub_wrong_until.is_none() => {
                let error = Span::from_secs(if dice.is_multiple_of(2) { 60 } else { 20 });
                self.tell(format!("the store's clock is wrong by {error} for {span}"));
                self.common.hub.set_clock_error(error);
                self.hub_wrong_until = Some(self.now() + span);
                self.hub_wrong_since = self.now();
            }
            93..96 => self.restore(span).await,
            _ => {}
        }
        Ok(())
    }

    /// Something an operator does at one replica; a refusal is an answer like any other.
    async fn operate(&mut self, writer: usize, keyset: &str, intent: Intent) -> Result<(), String> {
        let document = document(keyset);
        let now = self.now();
        match &intent {
            Intent::Rotate { allow_unpropagated: true, .. } => _ = self.history.emergencies.insert(document, now),
            Intent::Compromise => {
                self.history.compromised.insert(document.clone());
                self.history.emergencies.insert(document, now);
            }
            Intent::Revoke { serial } => {
                let keyring = self.seats[writer].keyring(keyset);
                let key = keyring.as_ref().and_then(|keyring| keyring.key(*serial));
                self.history.condemned.extend(key.map(|key| key.kid.to_string()));
                self.history.emergencies.insert(document, now);
            }
            _ => {}
        }
        let what = format!("{intent:?}");
        let answer = self.seats[writer].command(keyset, intent).await;
        let name = self.seats[writer].name.clone();
        self.tell(format!("{name} {keyset} {what}: {}", told(&answer)));
        if let Ok(outcome) = answer {
            let revoked = outcome.changes.iter().filter(|change| change.to == KeyState::Revoked);
            for change in revoked {
                self.stats.revocations += 1;
                self.answered.insert(change.kid.to_string(), (now, writer));
            }
        }
        self.after_effects(writer);
        self.read_log()
    }

    /// The active key, or any.
    async fn revoke(&mut self, writer: usize, keyset: &str, any: Option<u64>) -> Result<(), String> {
        let Some(keyring) = self.seats[writer].keyring(keyset) else { return Ok(()) };
        let keys: Vec<u64> = keyring.published().map(|key| key.serial).collect();
        let serial = match any {
            None => keyring.active().map(|key| key.serial),
            Some(dice) => keys.get(dice as usize % keys.len().max(1)).copied(),
        };
        match serial {
            Some(serial) => self.operate(writer, keyset, Intent::Revoke { serial }).await,
            None => Ok(()),
        }
    }

    /// Another policy of a keyset, or a new keyset.
    async fn configure(&mut self, writer: usize, keyset: &str, kind: u64) -> Result<(), String> {
        let mut declared = self.seats[writer].declared.clone();
        declared.retain(|declared| declared.name.as_str() != keyset);
        let mut policy = policy_of(kind);
        if keyset != KEYSETS[0] {
            // Ten keys are all that one document may hold.
            policy.rotation.successors = 1;
        }
        declared.push(declare(keyset, policy));
        let declared = self.flawed(declared);
        let configured = self.seats[writer].configure(declared).await;
        let name = self.seats[writer].name.clone();
        self.tell(format!("{name} is configured: {keyset} with policy {kind}: {configured:?}"));
        self.after_effects(writer);
        self.read_log()
    }

    pub fn flawed(&self, mut declared: Vec<Declared>) -> Vec<Declared> {
        for declared in &mut declared {
            let mut policy = (*declared.policy).clone();
            if self.flaws.hasty {
                policy.rotation.propagation = Span::from_secs(4);
            }
            if self.flaws.hasty || self.flaws.hoards || self.flaws.asks_unready {
                // Nothing but the propagation stands between the first publication of a key and its first signature.
                policy.rotation.successors = 1;
                policy.rotation.schedule = Schedule::Every(policy.rotation.propagation + Span::SECOND);
            }
            declared.policy = policy.into();
        }
        declared
    }

    /// One signer after the other reads nothing for a while, and says what it publishes meanwhile.
    pub async fn deaf_history(&mut self, seconds: u32) -> Result<(), String> {
        for second in 0..seconds {
            if second % 50 == 20 {
                let signers: Vec<usize> =
                    (0..self.seats.len()).filter(|number| !self.seats[*number].writes()).collect();
                let number = signers[self.random.below(signers.len() as u64) as usize];
                let until = self.now() + Span::from_secs(15 + i64::try_from(self.random.below(30)).unwrap());
                let seat = &mut self.seats[number];
                seat.line.set(|faults| faults.deaf = true);
                (seat.faulty_until, seat.well_since) = (until, until);
                self.tell(format!("{} reads nothing until {until}", self.seats[number].name));
            }
            self.tick().await?;
        }
        Ok(())
    }

    /// Something is wrong with a replica's line for a while.
    fn disturb(&mut self, number: usize, span: Span, dice: u64) {
        let span = if self.flaws.asks_unready { span.times(3) } else { span };
        let until = self.now() + span;
        let late = Span::from_secs(1 + i64::try_from(dice).unwrap());
        let seat = &mut self.seats[number];
        let name = seat.name.clone();
        seat.line.set(|faults| match dice % 5 {
            0 | 1 => faults.cut = true,
            2 => faults.deaf = true,
            3 => faults.mute = true,
            _ => faults.late = late,
        });
        (seat.faulty_until, seat.well_since) = (until, seat.well_since.max(until + late));
        self.tell(format!("{name}'s line is disturbed for {span} in the way {}", dice % 5));
    }

    pub async fn end_faults(&mut self) {
        let now = self.now();
        for number in 0..self.seats.len() {
            let seat = &self.seats[number];
            if seat.faulty_until <= now {
                seat.line.heal();
            }
            if self.random.below(4) == 0 {
                self.seats[number].line.land().await;
            }
        }
        if self.hub_wrong_until.is_some_and(|until| until <= now) {
            self.hub_wrong_until = None;
            let ahead = self.some_ahead();
            self.common.hub.set_clock_error(Span::from_millis(ahead));
            self.seats.iter_mut().for_each(|seat| seat.well_since = seat.well_since.max(now));
        }
        if self.older.as_ref().is_some_and(|(.., until)| *until <= now) {
            self.put_back().await;
        }
    }

    /// Everybody who writes has seen the newest; then an older copy is put in its place.
    async fn restore(&mut self, span: Span) {
        let Some(copy) = self.backup.clone().filter(|_| self.older.is_none()) else {
            self.backup = Some(self.common.hub.copy());
            return;
        };
        let behind = self.seats.iter().filter(|seat| seat.writes()).any(|seat| {
            let newest = |document: &Document| match document {
                Document::Keyring(keyset) => seat
                    .keyring(keyset.as_str())
                    .is_some_and(|keyring| keyring.generation == self.history.generation(document)),
                _ => true,
            };
            !self.history.documents().iter().all(newest)
        });
        if behind || self.seats.iter().any(|seat| seat.line.has_writes_under_way() || !seat.line.is_well()) {
            return;
        }
        self.tell(format!("an older copy is put back for {span}"));
        self.stats.restored += 1;
        let newest = self.common.hub.copy();
        self.common.hub.restore(&copy);
        self.older = Some((newest, copy, self.now() + span));
        self.backup = None;
        for seat in &self.seats {
            seat.line.set(|faults| faults.late_write = false);
        }
        self.read_again().await;
    }

    /// Of each document the newest there is: what was written on meanwhile stays.
    async fn put_back(&mut self) {
        let Some((newest, older, _)) = self.older.take() else { return };
        self.tell("the newest copy is put back".to_owned());
        let (older, current) = (older.digests(), self.common.hub.copy_digests());
        let mut kept = Vec::new();
        for document in current.keys().filter(|document| older.get(document) != current.get(document)) {
            kept.push((document.clone(), self.side.read(document).await.unwrap().unwrap()));
        }
        self.common.hub.restore(&newest);
        for (document, bytes) in kept {
            let replaced = newest.digests().get(&document).copied();
            self.side.replace(&document, replaced, &bytes).await.unwrap();
        }
        let now = self.now();
        self.seats.iter_mut().for_each(|seat| seat.well_since = seat.well_since.max(now));
        self.answered.values_mut().for_each(|(at, _)| *at = now);
        self.read_again().await;
    }

    /// What is stored now was stored before.
    async fn read_again(&mut self) {
        for document in self.history.documents() {
            if let Some(bytes) = self.side.read(&document).await.unwrap() {
                self.history.replaced(&document, &bytes);
            }
        }
    }
}

fn document(keyset: &str) -> Document {
    Document::Keyring(Name::parse(keyset).unwrap())
}

fn told(answer: &Result<Outcome, String>) -> String {
    match answer {
        Ok(outcome) => outcome.changes.iter().map(|c| format!("{} → {} ", c.kid, c.to)).collect(),
        Err(error) => error.clone(),
    }
}
