//! Everything around the replicas: time, applications that sign, verifiers behind balancers and caches; and the oracle,
//! which says what must not happen.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jwksd::clock::{Clock, ManualClock};
use jwksd::engine::ReplicaRole;
use jwksd::keyring::record::Keyring;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::store::Document;

use crate::history::History;
use crate::hub::{Copy, Link};
use crate::line::{Line, Log, StoreFlaw};
use crate::random::Random;
use crate::replica::Common;
use crate::seat::{AHEAD_MAX, LONGEST_EVERY, LONGEST_WINDOW, SLOWEST, Seat};
use crate::verifier::{Checked, HttpCache, Served, Verdict, Verifier, kids};

/// What is wrong on purpose with the surroundings of the replicas.
#[derive(Clone, Copy, Debug)]
pub struct Flaws {
    /// Verifiers keep documents three times as long as declared.
    pub hoards: bool,
    /// The propagation in force counts neither publish lag nor caches, and balancers learn late who is unready.
    pub hasty: bool,
    /// Verifiers' clocks are further apart than σ.
    pub skewed: bool,
    /// Balancers go on asking replicas that say that they are unready.
    pub asks_unready: bool,
    pub store: StoreFlaw,
}

impl Flaws {
    pub const NONE: Flaws =
        Flaws { hoards: false, hasty: false, skewed: false, asks_unready: false, store: StoreFlaw::None };
}

/// What a run came across, so that nobody takes an empty one for a proof.
#[derive(Debug, Default)]
pub struct Stats {
    pub tokens: u64,
    pub accepted: u64,
    pub excused: u64,
    pub without_document: u64,
    pub promotions: u64,
    pub crashes: u64,
    pub starts: u64,
    pub revocations: u64,
    pub restored: u64,
    pub stale_refusals: u64,
}

struct Token {
    text: String,
    kid: String,
    lives: (i64, i64),
}

pub struct World {
    pub common: Common,
    pub truth: Arc<ManualClock>,
    pub seats: Vec<Seat>,
    pub stats: Stats,
    pub random: Random,
    pub flaws: Flaws,
    pub history: History,
    /// The newest copy and the older one in its place; and until when.
    pub older: Option<(Copy, Copy, Timestamp)>,
    /// To be put back some time.
    pub backup: Option<Copy>,
    pub hub_wrong_since: Timestamp,
    pub hub_wrong_until: Option<Timestamp>,
    /// When a revocation was answered, and by whom.
    pub answered: HashMap<String, (Timestamp, usize)>,
    /// Reaches the hub whatever happens.
    pub side: Arc<Link>,
    log: Log,
    caches: Vec<HttpCache>,
    verifiers: Vec<Verifier>,
    tokens: Vec<Token>,
    checked: Checked,
    /// Since when each kid could be fetched.
    served_since: HashMap<String, Timestamp>,
    /// What was shown of each generation.
    shown: HashMap<(String, String, u64), Arc<Keyring>>,
    story: Vec<String>,
}

pub const TICK: Span = Span::SECOND;

/// After whatever was wrong has ended, a replica is well again within this.
const RECOVERY: Span = Span::from_secs(10);

impl World {
    pub async fn new(random: Random, flaws: Flaws) -> World {
        let truth = ManualClock::at(Timestamp::from_secs(1_800_000_000));
        let common = Common::new(truth.clone());
        let spread = if flaws.skewed { AHEAD_MAX * 25 } else { AHEAD_MAX };
        let slow = if flaws.hoards { SLOWEST.times(4) } else { SLOWEST };
        let verifiers = vec![
            Verifier::new("asks every time", Span::ZERO, 0, true),
            Verifier::new("slow and fast-running", slow, AHEAD_MAX, false),
            Verifier::new("slow and late", slow, -spread, false),
            Verifier::new("refetches", slow, -AHEAD_MAX, true),
        ];
        let mut world = World {
            side: common.hub.link(),
            common,
            truth,
            seats: Vec::new(),
            stats: Stats::default(),
            random,
            flaws,
            history: History::default(),
            older: None,
            backup: None,
            hub_wrong_since: Timestamp::EPOCH,
            hub_wrong_until: None,
            answered: HashMap::new(),
            log: Log::default(),
            caches: (0..2).map(|_| HttpCache::default()).collect(),
            verifiers,
            tokens: Vec::new(),
            checked: Checked::default(),
            served_since: HashMap::new(),
            shown: HashMap::new(),
            story: Vec::new(),
        };
        world.take_seats().await;
        world
    }

    async fn take_seats(&mut self) {
        let (manager, signer) = (ReplicaRole::Manager, ReplicaRole::Signer);
        let mut roles = vec![manager, manager, ReplicaRole::All, signer, signer];
        if self.random.below(2) == 0 {
            roles.push(signer);
        }
        let now = self.now();
        for (number, role) in roles.into_iter().enumerate() {
            let ahead = self.some_ahead();
            let clock = ManualClock::at(Timestamp::from_millis(now.as_millis() + ahead));
            // Only one of them is the one that answers from an old copy, or all would agree.
            let store = match self.flaws.store {
                StoreFlaw::OldReads if role != signer => StoreFlaw::None,
                flaw => flaw,
            };
            let line = Line::new(number, self.common.hub.link(), self.truth.clone(), self.log.clone(), store);
            let mut seat = Seat::new(format!("{}-{number}", role.as_str()), role, clock, line, now);
            seat.declared = self.flawed(seat.declared.clone());
            let started = seat.start(&self.common, now).await;
            assert!(started.is_ok(), "{started:?}");
            self.seats.push(seat);
        }
        self.read_log().unwrap();
    }

    pub fn now(&self) -> Timestamp {
        self.truth.wall()
    }

    pub fn some_ahead(&mut self) -> i64 {
        i64::try_from(self.random.below(2 * AHEAD_MAX.unsigned_abs() + 1)).unwrap() - AHEAD_MAX
    }

    pub fn tell(&mut self, what: String) {
        self.story.push(format!("{} {what}", self.now()));
    }

    pub fn broken(&self, what: &str) -> String {
        let from = self.story.len().saturating_sub(60);
        format!("at {} {what}\n{}", self.now(), self.story[from..].join("\n"))
    }

    /// One second: replicas do what is due, applications sign, verifiers check, in any order.
    pub async fn tick(&mut self) -> Result<(), String> {
        self.truth.advance(TICK);
        for seat in &self.seats {
            seat.clock.advance(TICK);
        }
        self.end_faults().await;
        let mut order: Vec<usize> = (0..self.seats.len()).collect();
        for left in (1..order.len()).rev() {
            order.swap(left, self.random.below(left as u64 + 1) as usize);
        }
        for number in order {
            self.take_turn(number).await?;
            if self.random.below(3) == 0 {
                self.verify()?;
            }
        }
        self.verify()?;
        self.forget_the_old();
        Ok(())
    }

    async fn take_turn(&mut self, number: usize) -> Result<(), String> {
        let (now, looks) = (self.now(), self.random.below(4) > 0);
        let seat = &mut self.seats[number];
        if seat.engine.is_none() {
            self.restart(number).await;
        } else if seat.stalled_until <= now {
            seat.tick(now, looks).await;
        }
        self.after_effects(number);
        self.read_log()?;
        self.look(number)?;
        self.sign(number).await
    }

    async fn restart(&mut self, number: usize) {
        let now = self.now();
        let seat = &mut self.seats[number];
        if seat.down_until > now {
            return;
        }
        let started = seat.start(&self.common, now).await;
        let name = seat.name.clone();
        match started {
            Ok(()) => {
                self.stats.starts += 1;
                self.tell(format!("{name} starts"));
            }
            Err(why) => {
                self.tell(format!("{name} does not start: {why}"));
                self.seats[number].fall(now + Span::from_secs(2));
            }
        }
    }

    /// A write may have killed the process.
    pub fn after_effects(&mut self, number: usize) {
        let seat = &self.seats[number];
        if seat.line.is_dead() && seat.engine.is_some() {
            self.stats.crashes += 1;
            let downtime = [0, 3, 25][self.random.below(3) as usize];
            let forgets = self.random.below(4) == 0 && self.older.is_none();
            self.fall(number, Span::from_secs(downtime), forgets);
        }
    }

    pub fn fall(&mut self, number: usize, downtime: Span, forgets: bool) {
        let until = self.now() + downtime;
        let seat = &mut self.seats[number];
        seat.fall(until);
        if forgets {
            seat.lose_memory();
        }
        let name = seat.name.clone();
        self.tell(format!("{name} is down for {downtime}, forgets: {forgets}"));
    }

    /// What was written since is judged.
    pub fn read_log(&mut self) -> Result<(), String> {
        let log = std::mem::take(&mut *self.log.lock().unwrap());
        for written in log {
            if !matches!(written.document, Document::Keyring(_)) {
                continue;
            }
            let who = self.seats.get(written.by).map_or("it", |seat| &seat.name).to_owned();
            let generation = crate::line::generation(&written.bytes);
            self.tell(format!("{who} writes {} generation {generation}", written.document));
            let seen = written.seen;
            if seen >= generation && self.older.is_some() {
                let what = format!("{who} saw generation {seen} of {} and writes over it", written.document);
                return Err(self.broken(&what));
            }
            let judged = self.history.wrote(&written.document, &written.bytes, self.now());
            judged.map_err(|what| self.broken(&format!("{who} writes {what}")))?;
        }
        Ok(())
    }

    /// What anybody can see from outside, and what the replica shows inside.
    fn look(&mut self, number: usize) -> Result<(), String> {
        let now = self.now();
        let Some(served) = self.seats[number].served() else { return Ok(()) };
        let kids = kids(&served.body);
        for kid in &kids {
            self.served_since.entry(kid.clone()).or_insert(now);
            if self.knows_revoked(number, kid) {
                let name = &self.seats[number].name;
                return Err(self.broken(&format!("{name} publishes the revoked key {kid}")));
            }
        }
        for cell in self.seats[number].cells() {
            let keyring = cell.snapshot.load().keyring.clone();
            let id = (keyring.keyset.to_string(), keyring.lineage.clone(), keyring.generation);
            let first = self.shown.entry(id).or_insert_with(|| keyring.clone());
            if **first != *keyring && keyring.generation > 0 {
                let name = &self.seats[number].name;
                let what = format!("{name} has another generation {} of {}", keyring.generation, cell.name);
                return Err(self.broken(&what));
            }
        }
        Ok(())
    }

    /// Whether the replica answered the revocation, or has looked at the store since somebody did.
    fn knows_revoked(&self, number: usize, kid: &str) -> bool {
        let seat = &self.seats[number];
        let since = |at: Timestamp| self.older.is_none() && seat.looked.is_some_and(|looked| looked > at);
        self.answered.get(kid).is_some_and(|(at, by)| (*by == number && seat.started_at <= *at) || since(*at))
    }

    async fn sign(&mut self, number: usize) -> Result<(), String> {
        let now = self.now();
        for cell in self.seats[number].cells() {
            let seat = &self.seats[number];
            if !seat.signs() {
                continue;
            }
            let keyring = cell.snapshot.load().keyring.clone();
            let limit = keyring.policy.rotation.staleness_limit;
            let issued = match seat.sign(&cell).await {
                Ok(issued) => issued,
                Err(why) => {
                    self.stats.stale_refusals += u64::from(why.contains("Stale"));
                    self.must_be_excused(number, &cell.name.to_string(), &why)?;
                    continue;
                }
            };
            let kid = issued.kid.to_string();
            let name = &seat.name;
            let confirmable = seat.line.confirmable();
            if confirmable.is_none_or(|at| now > at + limit + TICK.times(2)) {
                return Err(self.broken(&format!("{name} signs with {kid}, last confirmed {confirmable:?}")));
            }
            let unsure = self.hub_wrong_until.is_some() && seat.line.is_well();
            // It learns of that by looking, and what it writes until then counts.
            let wrong_since = self.hub_wrong_since.max(seat.well_since).max(seat.started_at);
            if unsure && now > wrong_since + limit + TICK.times(4) {
                let confirmed = cell
                    .confirmed_at()
                    .map(|at| Clock::boot(&*seat.clock).as_millis().saturating_sub(at))
                    .map(Span::from_millis);
                let what = format!("{name} signs with {kid} by a wrong clock, confirmed {confirmed:?} ago");
                return Err(self.broken(&format!("{what}; it may for {limit}")));
            }
            if self.knows_revoked(number, &kid) {
                return Err(self.broken(&format!("{name} signs with the revoked key {kid}")));
            }
            self.stats.tokens += 1;
            let claims = claims_of(&issued.token);
            let lives = (claims["nbf"].as_i64().unwrap(), claims["exp"].as_i64().unwrap());
            self.tokens.push(Token { text: issued.token, kid, lives });
        }
        Ok(())
    }

    /// A replica that is well signs, unless nothing can.
    fn must_be_excused(&self, number: usize, keyset: &str, why: &str) -> Result<(), String> {
        let (seat, now) = (&self.seats[number], self.now());
        let document = Document::Keyring(jwksd::keyring::name::Name::parse(keyset).unwrap());
        let well = self.is_well(number) && now > seat.well_since + RECOVERY;
        let promoted = self.history.promotions.get(&document).is_some_and(|(_, at)| now > *at + TICK.times(8));
        if well && promoted && self.history.has_active(&document) {
            let frozen = seat.engine.as_ref().and_then(|engine| engine.keyset(keyset));
            let frozen = frozen.and_then(|cell| cell.snapshot.load().frozen.clone());
            return Err(self.broken(&format!("{} does not sign for {keyset}: {why} {frozen:?}", seat.name)));
        }
        Ok(())
    }

    /// Nothing is wrong with the replica, nor with the store.
    fn is_well(&self, number: usize) -> bool {
        let (seat, now) = (&self.seats[number], self.now());
        seat.line.is_well() && seat.stalled_until <= now && self.older.is_none() && self.hub_wrong_until.is_none()
    }

    /// Every verifier checks a new token, the oldest one that lives, and some other.
    fn verify(&mut self) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Ok(());
        }
        let now = self.now();
        let last = self.tokens.len() - 1;
        let slowest = self.verifiers.iter().map(|verifier| -verifier.ahead).max().unwrap_or(0);
        let oldest = self.tokens.iter().position(|token| token.lives.1 * 1000 + slowest > now.as_millis());
        let oldest = oldest.unwrap_or(last);
        for index in 0..self.verifiers.len() {
            let between = oldest + self.random.below((last - oldest + 1) as u64) as usize;
            for chosen in [last, oldest, between] {
                let token = &self.tokens[chosen];
                let cache = &mut self.caches[index % 2];
                let (seats, random, flaws) = (&self.seats, &mut self.random, self.flaws);
                let fetch = || -> Option<Served> { cache.fetch(now, balance(seats, random, flaws, now).as_ref()) };
                let verdict = self.verifiers[index].verify(&token.text, token.lives, now, &mut self.checked, fetch);
                match verdict {
                    Verdict::Accepted => self.stats.accepted += 1,
                    Verdict::NotLive => {}
                    Verdict::NoDocument => self.stats.without_document += 1,
                    Verdict::UnknownKey if self.is_excused(&token.kid) => self.stats.excused += 1,
                    Verdict::UnknownKey | Verdict::BadSignature => {
                        let (name, kid, lives) = (self.verifiers[index].name, &token.kid, token.lives);
                        let what = format!("`{name}` rejects a live token of {kid} {lives:?}: {verdict:?}");
                        return Err(self.broken(&what));
                    }
                }
            }
        }
        Ok(())
    }

    /// Revoked keys are to be rejected; a key that an emergency put to work may be unknown until caches have run out.
    fn is_excused(&self, kid: &str) -> bool {
        let young = self.served_since.get(kid).is_none_or(|since| self.now() < *since + LONGEST_WINDOW);
        self.history.revoked.contains(kid) || (young && self.history.early.contains(kid))
    }

    fn forget_the_old(&mut self) {
        let latest = self.now().as_secs() - AHEAD_MAX * 30 / 1000;
        self.tokens.retain(|token| token.lives.1 > latest);
    }

    /// After everything has been right for a while: all agree, sign, and rotate.
    pub fn is_settled(&self) -> Result<(), String> {
        for seat in &self.seats {
            for document in self.history.documents() {
                let Document::Keyring(keyset) = &document else { continue };
                let stored = self.history.generation(&document);
                let shown = seat.keyring(keyset.as_str()).map(|keyring| keyring.generation);
                if shown.is_none_or(|shown| shown + 1 < stored) {
                    return Err(self.broken(&format!("{} shows {shown:?} of {stored} of {document}", seat.name)));
                }
            }
            let frozen = seat.cells().into_iter().find_map(|cell| cell.snapshot.load().frozen.clone());
            if let Some(why) = frozen {
                return Err(self.broken(&format!("{} stays frozen: {why}", seat.name)));
            }
        }
        let latest: BTreeMap<&Document, Timestamp> =
            self.history.promotions.iter().map(|(document, (_, at))| (document, *at)).collect();
        match latest.iter().find(|(_, at)| self.now() > **at + LONGEST_EVERY + LONGEST_WINDOW) {
            Some((document, at)) => Err(self.broken(&format!("{document} was rotated last at {at}"))),
            None => Ok(()),
        }
    }
}

/// Any replica that says it is ready, as far as the balancer knows.
fn balance(seats: &[Seat], random: &mut Random, flaws: Flaws, now: Timestamp) -> Option<Served> {
    let informed = !flaws.hasty || now.as_secs() % 5 == 0;
    let asked = |seat: &&Seat| seat.engine.is_some() && (flaws.asks_unready || !informed || seat.is_ready_to_publish());
    let ready: Vec<&Seat> = seats.iter().filter(asked).collect();
    ready.get(random.below(ready.len() as u64) as usize)?.served()
}

fn claims_of(token: &str) -> serde_json::Value {
    use base64::Engine as _;
    let payload = token.split('.').nth(1).unwrap();
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap();
    serde_json::from_slice(&payload).unwrap()
}
