//! Everything together: events in the order of time, and an oracle that says what must not happen. Between two events the
//! replicas do whatever they want to do; no time passes while any of them is at work.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use jwksd::engine::Issued;
use jwksd::keyring::decide::Outcome;
use jwksd::keyring::name::Name;
use jwksd::keyring::time::Span;
use jwksd::seal::file::FileKey;
use jwksd::store::Document;

use crate::audience::{Audience, Origin, Served};
use crate::history::{self, Event, History, Setup};
use crate::imports::Imports;
use crate::keys::KeyId;
use crate::kms::Kms;
use crate::life::{Doom, StoreClock, Truth};
use crate::probes::{Locations, Probed};
use crate::random::Random;
use crate::records::Records;
use crate::seat::{Common, Seat, declare};
use crate::shelf::{Copy, Shelf};
use crate::tokens::{Present, Token};

/// What a run came across, so that nobody takes an empty one for a proof.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub rotations: u64,
    pub tokens: u64,
    pub presentations: u64,
    pub accepted: u64,
    pub excused: u64,
    pub unreachable: u64,
    pub revocations: u64,
    pub exposures: u64,
    pub crashes: u64,
    pub starts: u64,
    pub restored: u64,
    pub recovered: u64,
    /// Changes of algorithm.
    pub changes: u64,
    pub drains: u64,
    /// Signatures under way when a revocation was answered.
    pub raced: u64,
    pub refusals: u64,
    pub faults: u64,
    pub fetches: u64,
    pub places: u64,
    /// Documents that probes were shown.
    pub samples: u64,
    pub imports: u64,
    /// Tokens that issuers signed which were there before.
    pub earlier: u64,
}

impl Stats {
    pub fn add(&mut self, other: &Stats) {
        let pairs = [
            (&mut self.rotations, other.rotations),
            (&mut self.tokens, other.tokens),
            (&mut self.presentations, other.presentations),
            (&mut self.accepted, other.accepted),
            (&mut self.excused, other.excused),
            (&mut self.unreachable, other.unreachable),
            (&mut self.revocations, other.revocations),
            (&mut self.exposures, other.exposures),
            (&mut self.crashes, other.crashes),
            (&mut self.starts, other.starts),
            (&mut self.restored, other.restored),
            (&mut self.recovered, other.recovered),
            (&mut self.changes, other.changes),
            (&mut self.drains, other.drains),
            (&mut self.raced, other.raced),
            (&mut self.refusals, other.refusals),
            (&mut self.faults, other.faults),
            (&mut self.fetches, other.fetches),
            (&mut self.places, other.places),
            (&mut self.samples, other.samples),
            (&mut self.imports, other.imports),
            (&mut self.earlier, other.earlier),
        ];
        for (sum, more) in pairs {
            *sum += more;
        }
    }
}

/// What a history came to.
pub struct Ending {
    pub stats: Stats,
    pub story: Vec<String>,
    pub broken: Option<String>,
}

/// Something that is due.
#[derive(Clone, Debug)]
pub enum Due {
    Event(Event),
    /// What was wrong with a seat's way is right again.
    WayHeals(usize),
    StoreClockHeals,
    Restore {
        lasts: i64,
        tries: u32,
    },
    PutBack,
    KmsHeals,
    ClockHeals(usize),
    LocationHeals(usize),
    Start(usize),
    /// Applications ask one replica, or all, for a token of each keyset.
    Sign {
        all: bool,
    },
    /// The regular application.
    Routine,
    Present(Present),
    Exposure {
        key: KeyId,
        revoked_at: i64,
    },
    EverythingHeals,
    Resume,
    /// Changes of algorithm that wait for a word get it.
    Confirm,
    End,
}

/// What came back from a task.
pub enum Note {
    Answer {
        from: Source,
        what: String,
        answer: Result<Outcome, String>,
    },
    /// With the generation of the keyring that was shown when the answer left, and when that was.
    Signed {
        from: Source,
        shown: u64,
        at: i64,
        issued: Result<Issued, (String, Option<&'static str>)>,
    },
}

/// Who answered: which process on a seat, for which keyset.
#[derive(Clone)]
pub struct Source {
    pub seat: usize,
    pub process: u64,
    pub keyset: String,
}

pub struct World {
    pub setup: Setup,
    pub truth: Truth,
    pub common: Common,
    pub seats: Vec<Seat>,
    pub audience: Audience,
    pub records: Records,
    pub tokens: BTreeMap<u64, Token>,
    pub next_token: u64,
    pub stats: Stats,
    pub random: Random,
    /// The turns of a balancer that probes ask.
    pub probing: Random,
    pub probed: Probed,
    /// The tokens of issuers that were there before.
    pub importing: Random,
    pub imports: Imports,
    pub notes: Arc<Mutex<Vec<Note>>>,
    /// The newest copy, in whose place an older one is.
    pub newest: Option<Copy>,
    pub backup: Option<Copy>,
    /// A copy of a single process's store, and when it was made.
    pub saved: Option<(Copy, i64)>,
    /// When the configuration was changed last.
    pub configured_at: i64,
    /// Keys of histories that were lost, and until when such keys may have been asked for: nobody can know that they are
    /// left over.
    pub lost: BTreeSet<KeyId>,
    pub lost_until: i64,
    /// Which process answered the revocation of which key.
    pub answered: BTreeSet<(usize, u64, KeyId)>,
    /// Nothing is wrong with a seat, the store and the KMS since then.
    pub well_since: Vec<i64>,
    pub all_well_since: i64,
    pub kms_well_since: i64,
    pub jumped_until: Vec<i64>,
    /// Writes may still arrive until then.
    pub late_until: i64,
    /// When a key could first be fetched.
    pub served_since: BTreeMap<KeyId, i64>,
    pub ended_at: BTreeMap<KeyId, i64>,
    /// The last moment at which a token of a key lives for anybody, of true time.
    pub lives_until: BTreeMap<KeyId, i64>,
    queue: BinaryHeap<Reverse<(i64, u64)>>,
    dues: BTreeMap<u64, Due>,
    order: u64,
    story: Vec<String>,
    is_over: bool,
}

pub const RECOVERY: i64 = 25_000;

/// Where the randomness of slow signatures begins.
const PACE: u64 = 0x510e;

/// Between two looks whether a change of algorithm waits, in the end.
const CONFIRM_EVERY: i64 = 5_000;

impl World {
    /// Plays a history to its end, or to the first promise that is broken.
    pub async fn play(history: &History, doom: Arc<Doom>) -> Ending {
        let mut world = World::new(history, doom);
        let broken = world.run().await.err();
        if let Some(broken) = &broken {
            world.tell(|| format!("BROKEN: {broken}"));
        }
        world.stats.rotations = world.records.promotions.values().map(|(count, _)| count.saturating_sub(1)).sum();
        world.stats.fetches = world.audience.fetches;
        Ending { stats: world.stats, story: world.story, broken }
    }

    fn new(history: &History, doom: Arc<Doom>) -> World {
        let setup = history.setup.clone();
        let mut random = Random::new(setup.seed ^ 0x00c0_ffee);
        let truth = Truth::begin();
        let error = setup.ahead_max;
        let hub =
            Shelf::new(StoreClock { truth, ahead: AtomicI64::new(if random.below(2) == 0 { error } else { -error }) });
        let kms = Kms::new(
            random.fork(),
            Random::new(setup.seed ^ PACE),
            setup.backend(),
            setup.is_remote,
            setup.is_account(),
        );
        kms.add_foreign();
        let skew = setup.policies[0].rotation.clock_skew;
        let seal = Arc::new(FileKey::ephemeral());
        let probing = Random::new(setup.seed ^ !history::PROBING);
        let locations = Locations::new(setup.locations, probing, hub.clone());
        let common = Common { truth, doom, hub, kms, seal, locations, is_single: setup.is_single, skew };
        let mut seats = Vec::new();
        for (number, role) in setup.roles.iter().enumerate() {
            let ahead = history::ahead(&setup, &mut random);
            let mut seat = Seat::new(number, *role, ahead, &common, random.fork());
            seat.declared = (0..setup.keysets).map(|keyset| declare(KEYSETS[keyset], &setup.policies[0])).collect();
            seats.push(seat);
        }
        let audience =
            Audience::new(&setup.classes, setup.verifiers, setup.ahead_max, setup.edge, setup.flaky, random.fork());
        let mut world = World {
            truth,
            common,
            audience,
            records: Records::default(),
            tokens: BTreeMap::new(),
            next_token: 0,
            stats: Stats::default(),
            random,
            probing: Random::new(setup.seed ^ history::PROBING),
            probed: Probed::default(),
            importing: Random::new(setup.seed ^ history::IMPORTING),
            imports: Imports::new(),
            notes: Arc::default(),
            newest: None,
            backup: None,
            saved: None,
            configured_at: 0,
            lost: BTreeSet::new(),
            lost_until: -1,
            answered: BTreeSet::new(),
            well_since: vec![0; seats.len()],
            all_well_since: 0,
            kms_well_since: 0,
            jumped_until: vec![0; seats.len()],
            late_until: 0,
            served_since: BTreeMap::new(),
            ended_at: BTreeMap::new(),
            lives_until: BTreeMap::new(),
            queue: BinaryHeap::new(),
            dues: BTreeMap::new(),
            order: 0,
            story: Vec::new(),
            is_over: false,
            seats,
            setup,
        };
        world.begin(history);
        world
    }

    fn begin(&mut self, history: &History) {
        for seat in 0..self.seats.len() {
            // The first initialises the store; signers find it so.
            self.at(if seat == 0 { 0 } else { 1_000 }, Due::Start(seat));
        }
        for (at, event) in &history.events {
            self.at(*at, Due::Event(event.clone()));
        }
        let every = self.setup.policies.iter().map(|policy| history::every(policy).as_millis()).max().unwrap();
        self.at(2_000, Due::Routine);
        self.at(history.lasts, Due::EverythingHeals);
        self.at(history.lasts + 6_000, Due::Resume);
        self.at(history.lasts + RECOVERY, Due::Resume);
        self.at(history.lasts + 6_000, Due::Confirm);
        self.at(history.lasts + 6_000 + 2 * every + 2 * RECOVERY, Due::End);
    }

    async fn run(&mut self) -> Result<(), String> {
        if self.setup.loses_keys {
            self.common.kms.lose_keys();
        }
        while !self.is_over {
            let Some(Reverse((at, order))) = self.queue.peek().copied() else { break };
            let hub = self.common.hub.clone();
            // What replicas write is judged when they do it, and may bring something that is due sooner.
            let is_due = tokio::select! {
                biased;
                () = hub.news.notified() => false,
                () = self.truth.reach(at) => true,
            };
            self.look_around()?;
            if is_due {
                self.queue.pop();
                let due = self.dues.remove(&order).expect("what is queued is kept");
                self.handle(due).await?;
                self.look_around()?;
            }
        }
        Ok(())
    }

    async fn handle(&mut self, due: Due) -> Result<(), String> {
        let now = self.now();
        match due {
            Due::Event(event) => self.happen(event).await?,
            Due::WayHeals(seat) => self.seats[seat].way.heal(),
            Due::StoreClockHeals => self.set_store_clock(self.setup.ahead_max),
            Due::Restore { lasts, tries } => self.restore(lasts, tries),
            Due::PutBack => self.put_back()?,
            Due::KmsHeals => self.common.kms.set_mood(crate::kms::Mood::Well),
            Due::ClockHeals(seat) => self.set_clock(seat, 0),
            Due::LocationHeals(location) => self.location_heals(location)?,
            Due::Start(seat) => self.start(seat),
            Due::Sign { all } => self.sign(all).await?,
            Due::Routine => {
                self.sign(false).await?;
                let every = history::every(&self.setup.policies[0]).as_millis().unsigned_abs();
                let pause = every / 10 + self.random.below(every / 5);
                self.at(now + i64::try_from(pause).unwrap(), Due::Routine);
            }
            Due::Present(present) => self.present(&present)?,
            Due::Exposure { key, revoked_at } => self.judge_exposure(key, revoked_at)?,
            Due::EverythingHeals => self.heal()?,
            Due::Resume => self.resume(),
            Due::Confirm => {
                self.confirm();
                self.at(now + CONFIRM_EVERY, Due::Confirm);
            }
            Due::End => {
                self.judge_end()?;
                self.is_over = true;
            }
        }
        Ok(())
    }

    pub fn now(&self) -> i64 {
        self.truth.now()
    }

    pub fn at(&mut self, at: i64, due: Due) {
        self.order += 1;
        self.dues.insert(self.order, due);
        self.queue.push(Reverse((at.max(self.now()), self.order)));
    }

    pub fn tell(&mut self, line: impl FnOnce() -> String) {
        let line = format!("{:>10.3} {}", self.now() as f64 / 1000.0, line());
        self.story.push(line);
    }

    fn start(&mut self, seat: usize) {
        if self.seats[seat].process.is_none() {
            self.stats.starts += 1;
            self.tell_of(seat, || "starts".to_owned());
            self.seats[seat].start(&self.common);
            self.unwell(seat, self.now());
        }
    }

    pub fn tell_of(&mut self, seat: usize, line: impl FnOnce() -> String) {
        let name = self.seats[seat].name.clone();
        self.tell(|| format!("{name} {}", line()));
    }

    /// Something is wrong with a seat until then.
    pub fn unwell(&mut self, seat: usize, until: i64) {
        self.well_since[seat] = self.well_since[seat].max(until);
        self.all_well_since = self.all_well_since.max(until);
    }

    pub fn fall(&mut self, seat: usize, down: i64) {
        self.seats[seat].fall();
        self.unwell(seat, self.now() + down);
        self.at(self.now() + down, Due::Start(seat));
    }

    /// Who died, what was written, what was answered.
    pub fn look_around(&mut self) -> Result<(), String> {
        for seat in 0..self.seats.len() {
            let died = self.seats[seat].process.as_ref().is_some_and(|process| process.life.is_dead());
            if died {
                self.stats.crashes += 1;
                let down = [100, 1_500, 12_000][self.random.below(3) as usize];
                self.tell_of(seat, || format!("crashed, is down for {down} ms"));
                self.fall(seat, down);
            } else if let Some(why) = self.seats[seat].refusal().map(str::to_owned) {
                self.tell_of(seat, || format!("does not start: {why}"));
                self.fall(seat, 2_000);
            }
        }
        self.note_samples();
        self.read_writes()?;
        self.answer_probes()?;
        let notes = std::mem::take(&mut *self.notes.lock().unwrap());
        for note in notes {
            self.heed(note)?;
        }
        self.judge_kms()
    }

    fn read_writes(&mut self) -> Result<(), String> {
        for written in self.common.hub.written() {
            let who = self.seats[written.by].name.clone();
            if self.newest.is_some() {
                return Err(format!("{who} saw more of {} and writes over an older copy", written.document));
            }
            let before = self.records.of(&written.document).cloned().unwrap_or_default();
            let wrote = self.records.wrote(&written.document, &written.bytes, written.at);
            let promoted = wrote.map_err(|what| format!("{who} writes {what}"))?;
            let generation = self.records.generation(&written.document);
            self.tell(|| match promoted {
                Some(promotion) => format!("{who} writes generation {generation}: key {} signs", promotion.to),
                None => format!("{who} writes generation {generation}"),
            });
            self.judge_recorded_sight(&written, &before)?;
            self.note_ended(&written.document);
            self.follow_earlier(&written.document);
            if let Some(promotion) = promoted {
                self.judge_sight(&written, &promotion)?;
                self.stats.changes += u64::from(promotion.changes_algorithm);
                self.expect_tokens();
            }
        }
        Ok(())
    }

    fn note_ended(&mut self, document: &Document) {
        let now = self.now();
        let Some(record) = self.records.of(document) else { return };
        for key in record.keys.values().filter(|key| key.state.has_ended()) {
            self.ended_at.entry(key.id).or_insert(now);
        }
    }

    /// Tokens are signed at the moment of a promotion, by those who have not heard of it too, and right before the next.
    fn expect_tokens(&mut self) {
        let now = self.now();
        let rotation = &self.setup.policies[0].rotation;
        let (lag, every) = (rotation.publish_lag.as_millis(), history::every(&self.setup.policies[0]).as_millis());
        self.at(now, Due::Sign { all: true });
        if lag > 0 {
            self.at(now + lag, Due::Sign { all: true });
        }
        self.at(now + every - 1, Due::Sign { all: true });
    }

    /// A balancer that asks any replica that is ready.
    pub fn with_audience<T>(&mut self, look: impl FnOnce(&mut Audience, &mut Balancer<'_>) -> T) -> Result<T, String> {
        let now = self.truth.now();
        let mut balancer = Balancer {
            seats: &mut self.seats,
            records: &self.records,
            well_since: &self.well_since,
            served_since: &mut self.served_since,
            random: &mut self.random,
            lag: self.setup.policies.iter().map(|policy| policy.rotation.publish_lag).max().unwrap(),
            is_older: self.newest.is_some(),
            now,
            wrong: None,
        };
        let looked = look(&mut self.audience, &mut balancer);
        match balancer.wrong {
            Some(wrong) => Err(wrong),
            None => Ok(looked),
        }
    }

    pub fn source(&self, seat: usize, keyset: &str) -> Source {
        Source { seat, process: self.seats[seat].number(), keyset: keyset.to_owned() }
    }

    pub fn document(keyset: &str) -> Document {
        Document::Keyring(Name::parse(keyset).unwrap())
    }

    pub fn set_store_clock(&mut self, ahead: i64) {
        self.common.hub.clock().ahead.store(ahead, Relaxed);
    }

    pub fn set_clock(&mut self, seat: usize, ahead: i64) {
        self.seats[seat].ahead.store(ahead, Relaxed);
    }
}

pub const KEYSETS: [&str; 2] = ["default", "second"];

/// Asks any replica that says it is ready.
pub struct Balancer<'a> {
    seats: &'a mut [Seat],
    records: &'a Records,
    well_since: &'a [i64],
    served_since: &'a mut BTreeMap<KeyId, i64>,
    random: &'a mut Random,
    lag: Span,
    is_older: bool,
    now: i64,
    wrong: Option<String>,
}

impl Origin for Balancer<'_> {
    fn ask(&mut self) -> Option<Arc<Served>> {
        let first = self.random.below(self.seats.len() as u64) as usize;
        for turn in 0..self.seats.len() {
            let number = (first + turn) % self.seats.len();
            match self.seats[number].serve(self.now) {
                Ok(None) => {}
                Ok(Some(served)) => {
                    self.judge(number, &served);
                    return Some(served);
                }
                Err(wrong) => {
                    self.wrong = Some(format!("{} serves what is none: {wrong}", self.seats[number].name));
                    return None;
                }
            }
        }
        None
    }
}

impl Balancer<'_> {
    /// What is served was stored before, and no revoked key is in it any more.
    fn judge(&mut self, number: usize, served: &Served) {
        let seat = &self.seats[number];
        for key in &served.keys {
            self.served_since.entry(*key).or_insert(self.now);
            if !self.records.known.contains(key) {
                self.wrong = Some(format!("{} publishes key {key} before it is stored", seat.name));
            }
            let Some((generation, at)) = self.records.revoked.get(key) else { continue };
            let shown = self.records.find(*key).and_then(|(document, _)| match document {
                Document::Keyring(name) => seat.cell(name.as_str()),
                _ => None,
            });
            let shown = shown.map_or(0, |cell| cell.snapshot.load().keyring.generation);
            let late = self.now > at + self.lag.as_millis() + 100 && self.well_since[number] + RECOVERY < *at;
            if !self.is_older && (shown >= *generation || late) {
                self.wrong = Some(format!("{} still publishes the revoked key {key}", seat.name));
            }
        }
    }
}
