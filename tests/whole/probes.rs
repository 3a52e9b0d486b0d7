//! Probes: the locations that replicas look at, what they are shown there, and what must come of it. A location is a place at
//! which verifiers fetch, unless something is wrong with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use jwksd::engine::KeysetCell;
use jwksd::engine::probes::{Fetch, FetchError, Fetched, Probe};
use jwksd::keyring::outlook::Alarm;
use jwksd::keyring::publication::CacheHeaders;
use tokio::sync::{Notify, oneshot};

use crate::audience::Served;
use crate::keys::KeyId;
use crate::life::Life;
use crate::random::Random;
use crate::records::{Promotion, Record};
use crate::shelf::{Shelf, Written};
use crate::world::{Due, KEYSETS, RECOVERY, World};

/// Locations that a history may have.
pub const MOST: usize = 3;

/// One in so many fetches fails for itself; one in so many is slow, and takes up to so long, in milliseconds.
const FAILS_ONE_IN: u64 = 40;
const SLOW_ONE_IN: u64 = 4;
const SLOW_MAX: u64 = 2_000;

/// Two samples of one location are no further apart than the longest max-age that is drawn, and a fetch, in milliseconds.
const SAMPLED_WITHIN: i64 = 30_000 / 2 + 5_000;

/// A record of what is shown is no further off, in milliseconds.
const RECORDED_WITHIN: i64 = 1_000;

/// A rotation that is late for longer says why, in milliseconds.
const LATE: i64 = 5_000;

/// What somebody who looks is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shown {
    #[default]
    Served,
    /// Nobody answers.
    Nothing,
    /// What was shown there last.
    Stuck,
    /// Another issuer's document.
    Foreign,
}

impl Shown {
    pub const BAD: [Shown; 3] = [Shown::Nothing, Shown::Stuck, Shown::Foreign];
}

/// As configured.
pub fn url(location: usize) -> String {
    format!("https://{location}.example.com/.well-known/jwks.json")
}

/// All locations, as replicas reach them.
pub struct Locations {
    content: Mutex<Content>,
    /// Somebody asks.
    shelf: Arc<Shelf>,
}

struct Content {
    each: Vec<Location>,
    asked: Vec<Asked>,
    samples: Vec<Sample>,
    random: Random,
    is_well: bool,
}

#[derive(Clone, Default)]
struct Location {
    shown: Shown,
    /// True time, in milliseconds, at which that began and will end.
    lasts: (i64, i64),
    last: Option<Answer>,
}

/// A document with its age, in milliseconds.
type Answer = (Arc<Served>, i64);

struct Asked {
    location: usize,
    answer: oneshot::Sender<Option<Answer>>,
}

/// Which keys a process was shown.
struct Sample {
    at: i64,
    seat: usize,
    process: u64,
    location: usize,
    keys: Vec<KeyId>,
}

impl Locations {
    pub fn new(count: usize, random: Random, shelf: Arc<Shelf>) -> Arc<Self> {
        let each = vec![Location::default(); count];
        let content = Content { each, asked: Vec::new(), samples: Vec::new(), random, is_well: false };
        Arc::new(Locations { content: Mutex::new(content), shelf })
    }

    pub fn are_any(&self) -> bool {
        !self.content().each.is_empty()
    }

    /// Fetches do not fail any more.
    pub fn heal(&self) {
        let mut content = self.content();
        content.is_well = true;
        content.each.iter_mut().for_each(|location| location.shown = Shown::Served);
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    fn news(&self) -> &Notify {
        &self.shelf.news
    }
}

/// One process's way to the locations.
pub struct Looker {
    pub locations: Arc<Locations>,
    pub life: Arc<Life>,
    pub truth: crate::life::Truth,
    pub seat: usize,
    pub process: u64,
}

impl Looker {
    /// How long the way takes, and whether it leads anywhere.
    fn set_out(&self) -> (u64, bool) {
        let mut content = self.locations.content();
        let (slow, fails) = (content.random.below(SLOW_ONE_IN) == 0, content.random.below(FAILS_ONE_IN) == 0);
        let takes = if slow { content.random.below(SLOW_MAX) } else { 0 };
        (takes, content.is_well || !fails)
    }

    async fn ask(&self, location: usize) -> Option<Answer> {
        let (answer, answered) = oneshot::channel();
        self.locations.content().asked.push(Asked { location, answer });
        self.locations.news().notify_one();
        answered.await.ok()?
    }
}

#[async_trait]
impl Fetch for Looker {
    async fn fetch(&self, asked: &str) -> Result<Fetched, FetchError> {
        self.life.pass().await;
        let (takes, leads) = self.set_out();
        if takes > 0 {
            tokio::time::sleep(Duration::from_millis(takes)).await;
            self.life.pass().await;
        }
        let location = (0..MOST).find(|location| url(*location) == asked).expect("only locations are configured");
        let answer = if leads { self.ask(location).await } else { None };
        self.life.pass().await;
        let (served, age) = answer.ok_or(FetchError::Status { status: 503 })?;
        let (at, keys) = (self.truth.now(), served.keys.clone());
        let Looker { seat, process, .. } = *self;
        self.locations.content().samples.push(Sample { at, seat, process, location, keys });
        let headers =
            CacheHeaders { age: Some((age / 1000).to_string()), cache_control: Some(served.cache_control.clone()) };
        Ok(Fetched { body: served.body.to_vec(), headers })
    }
}

/// What probes have shown, as far as the oracle knows.
#[derive(Default)]
pub struct Probed {
    /// By location: when each key was shown to anybody first.
    first: BTreeMap<(usize, KeyId), i64>,
    /// By process and location: when it was last shown a document without the key, which was waiting.
    lacked: BTreeMap<(usize, u64, usize, KeyId), i64>,
    /// By process: samples that it took.
    taken: BTreeMap<(usize, u64), u64>,
    /// By process and key: how many those were when it last recorded that the key is seen.
    recorded: BTreeMap<(usize, u64, KeyId), u64>,
}

impl World {
    pub fn show(&mut self, location: usize, shown: Shown, lasts: i64) {
        let now = self.now();
        let until = now + lasts;
        let locations = self.common.locations.clone();
        let mut content = locations.content();
        let Some(one) = content.each.get_mut(location) else { return };
        (one.shown, one.lasts) = (shown, (now, until));
        self.at(until, Due::LocationHeals(location));
    }

    pub fn location_heals(&mut self, location: usize) -> Result<(), String> {
        let (now, (shown, lasts)) = {
            let content = self.common.locations.content();
            (self.now(), (content.each[location].shown, content.each[location].lasts))
        };
        if now < lasts.1 {
            return Ok(()); // Something else is wrong meanwhile.
        }
        self.judge_alarms(location, shown, lasts.0)?;
        self.common.locations.content().each[location].shown = Shown::Served;
        Ok(())
    }

    /// Answers those who look at locations.
    pub fn answer_probes(&mut self) -> Result<(), String> {
        let asked = std::mem::take(&mut self.common.locations.content().asked);
        for Asked { location, answer } in asked {
            let shown = self.shown_at(location)?;
            let _ = answer.send(shown);
        }
        Ok(())
    }

    /// Remembers what they were shown.
    pub fn note_samples(&mut self) {
        let samples = std::mem::take(&mut self.common.locations.content().samples);
        for sample in samples {
            self.stats.samples += 1;
            *self.probed.taken.entry((sample.seat, sample.process)).or_default() += 1;
            for key in &sample.keys {
                self.probed.first.entry((sample.location, *key)).or_insert(sample.at);
            }
            for key in self.records.waiting().filter(|key| !sample.keys.contains(key)) {
                self.probed.lacked.insert((sample.seat, sample.process, sample.location, key), sample.at);
            }
        }
    }

    /// Nobody records again that he sees a key, after another one recorded the contrary, unless he was shown something since.
    pub fn judge_recorded_sight(&mut self, written: &Written, before: &Record) -> Result<(), String> {
        let Some(after) = self.records.of(&written.document).filter(|after| after.probes == before.probes) else {
            return Ok(());
        };
        let (seat, process) = (written.by, self.seats[written.by].number());
        let taken = self.probed.taken.get(&(seat, process)).copied().unwrap_or(0);
        for (serial, key) in &after.keys {
            if !key.is_seen || before.keys.get(serial).is_none_or(|former| former.is_seen) {
                continue;
            }
            if self.probed.recorded.insert((seat, process, key.id), taken) == Some(taken) {
                let name = &self.seats[seat].name;
                return Err(format!("{name} records again that key {} is seen, and was shown nothing since", key.id));
            }
        }
        Ok(())
    }

    fn shown_at(&mut self, location: usize) -> Result<Option<Answer>, String> {
        let one = self.common.locations.content().each[location].clone();
        match one.shown {
            Shown::Nothing => return Ok(None),
            Shown::Stuck => return Ok(one.last),
            Shown::Foreign => return Ok(Some((Served::foreign(), 0))),
            Shown::Served => {}
        }
        // The balancer's own turns are those of verifiers.
        std::mem::swap(&mut self.random, &mut self.probing);
        let now = self.now();
        let edge = [Some(0), None, Some(1)][location];
        let shown = self.with_audience(|audience, balancer| audience.through(edge, now, balancer));
        std::mem::swap(&mut self.random, &mut self.probing);
        let shown = shown?.map(|(served, born)| (served, now - born));
        if shown.is_some() {
            self.common.locations.content().each[location].last.clone_from(&shown);
        }
        Ok(shown)
    }

    /// A key that waited signs once every location has shown it for as long as it has to be published.
    pub fn judge_sight(&self, written: &Written, promotion: &Promotion) -> Result<(), String> {
        let Some(record) = self.records.of(&written.document).filter(|_| promotion.has_waited) else { return Ok(()) };
        let (seat, key) = (written.by, promotion.to);
        // Whose configuration another replica's has replaced looks where its own says.
        if self.is_superseded(seat) {
            return Ok(());
        }
        let name = &self.seats[seat].name;
        // What one replica recorded another one reads by its own clock.
        let tolerated = 2 * self.setup.ahead_max + RECORDED_WITHIN;
        for location in (0..MOST).filter(|location| record.probes.contains(&url(*location))) {
            let Some(first) = self.probed.first.get(&(location, key)) else {
                return Err(format!("{name} has key {key} sign, and no probe of location {location} ever saw it"));
            };
            if written.asked + tolerated < first + record.propagation {
                return Err(format!(
                    "{name} has key {key} sign, which location {location} shows since {first} and should for {} ms",
                    record.propagation
                ));
            }
            let lacked = self.probed.lacked.get(&(seat, self.seats[seat].number(), location, key));
            // What is decided and held up knows nothing of later samples.
            let settled = written.asked > self.well_since[seat] + RECOVERY;
            if let Some(lacked) = lacked.filter(|lacked| settled && written.asked < **lacked + record.propagation) {
                return Err(format!(
                    "{name} has key {key} sign, which it did not see at location {location} at {lacked}"
                ));
            }
        }
        Ok(())
    }

    /// Whoever looks at what is wrong for long enough says so, and why rotations are late.
    fn judge_alarms(&self, location: usize, shown: Shown, since: i64) -> Result<(), String> {
        let now = self.now();
        let wanted = match shown {
            Shown::Nothing => Alarm::ProbeUnreachable,
            Shown::Foreign => Alarm::PublicationMismatch,
            Shown::Stuck | Shown::Served => return Ok(()),
        };
        for (number, seat) in self.seats.iter().enumerate() {
            let Some(engine) = seat.engine().filter(|_| self.well_since[number].max(since) + SAMPLED_WITHIN < now)
            else {
                continue;
            };
            for keyset in KEYSETS.iter().take(self.setup.keysets) {
                let Some(cell) = engine.keyset(keyset) else { continue };
                if !cell.issuer.policy.load().probes.contains(&url(location)) {
                    continue;
                }
                let sight = engine.look(&cell);
                if !sight.alarms.contains(&wanted) {
                    return Err(format!("{} does not tell that location {location} shows {shown:?}", seat.name));
                }
                let late = sight.outlook.next_rotation.as_ref().is_some_and(|next| {
                    next.overdue.as_millis() > LATE
                        && next.blocked_by.is_empty()
                        && !self.records.all().any(|(_, r)| r.drained)
                });
                if late && seat.writes() {
                    return Err(format!("{} does not say why {keyset} is not rotated", seat.name));
                }
            }
        }
        Ok(())
    }

    fn is_superseded(&self, seat: usize) -> bool {
        let Some(engine) = self.seats[seat].engine() else { return false };
        let superseded = |cell: Arc<KeysetCell>| engine.look(&cell).alarms.contains(&Alarm::Superseded);
        KEYSETS.iter().filter_map(|keyset| engine.keyset(keyset)).any(superseded)
    }

    /// Where everything is right nobody says anything else.
    pub fn judge_probes(&self) -> Result<(), String> {
        for (number, seat) in self.seats.iter().enumerate() {
            let Some(engine) = seat.engine() else { continue };
            // It holds what is served against a configuration that another replica's has replaced.
            if self.is_superseded(number) {
                continue;
            }
            for issuer in &engine.directory().issuers {
                let wrong = |probe: &&Probe| {
                    probe.failing.is_some() || !probe.discrepancies.is_empty() || probe.excess.is_some()
                };
                if let Some(probe) = issuer.probes().each().iter().find(wrong) {
                    return Err(format!("{} finds fault with what is right: {probe:?}", seat.name));
                }
            }
        }
        Ok(())
    }
}
