//! A history: what is installed, who verifies, and everything that will happen, drawn before it begins, so that a part of
//! it can be left out to see whether the rest still fails.

use jwksd::aws_kms::AWS_KMS;
use jwksd::backend::local::LOCAL;
use jwksd::engine::ReplicaRole;
use jwksd::keyring::algorithm::Algorithm;
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::{Bootstrap, Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::Span;
use jwksd::keyring::timing::{self, Severity};

use crate::audience::Class;
use crate::imports::Import;
use crate::kms;
use crate::probes::{self, Shown};
use crate::random::Random;
use crate::world::KEYSETS;

/// Something that happens to the installation. `seat` is a number of a replica, taken modulo how many there are.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Rotate {
        seat: usize,
        early: bool,
    },
    Rollback {
        seat: usize,
    },
    Hold {
        seat: usize,
        lasts: i64,
    },
    Resume {
        seat: usize,
    },
    /// The active key, or some published one.
    Revoke {
        seat: usize,
        which: Option<usize>,
    },
    Compromise {
        seat: usize,
    },
    /// Another policy of those that the history has.
    Configure {
        seat: usize,
        policy: usize,
    },
    /// The configuration wants another algorithm, or the first one again.
    Algorithm {
        seat: usize,
        other: bool,
    },
    /// A rotation that confirms the algorithm of whatever waits.
    Confirm {
        seat: usize,
    },
    Drain {
        seat: usize,
    },
    Undrain {
        seat: usize,
    },
    /// The store of a single process is copied.
    Backup,
    /// Only that copy is left, and `jwksd recover` is told what verifiers are served. Its marks of what was seen go back
    /// with it, or say that there was more.
    Recover {
        marks: bool,
    },
    /// The process dies at the await after so many, and comes back later.
    Crash {
        seat: usize,
        places: u64,
    },
    /// The process is killed, and may lose what it remembered of a shared store.
    Kill {
        seat: usize,
        down: i64,
        forgets: bool,
    },
    /// The process stands still.
    Stop {
        seat: usize,
        lasts: i64,
    },
    Cut {
        seat: usize,
        lasts: i64,
        deaf: bool,
        mute: bool,
    },
    Slow {
        seat: usize,
        lasts: i64,
        most: u64,
    },
    LoseAnswers {
        seat: usize,
        count: u32,
    },
    LateWrite {
        seat: usize,
        after: u64,
    },
    StoreClock {
        error: i64,
        lasts: i64,
    },
    /// A copy of the store is made, and put back for a while some time later.
    Older {
        lasts: i64,
    },
    Mood {
        mood: kms::Mood,
        lasts: i64,
    },
    /// NTP corrects a clock within what may be.
    Drift {
        seat: usize,
        ahead: i64,
    },
    /// Somebody sets a clock to a wrong time, and it is put right later.
    Jump {
        seat: usize,
        by: i64,
        lasts: i64,
    },
    /// The key of an issuer that was there before joins.
    Import(Import),
    RevokeEarlier {
        seat: usize,
        number: usize,
    },
    /// Something is wrong with a location that probes look at.
    Show {
        location: usize,
        shown: Shown,
        lasts: i64,
    },
}

/// Where the randomness of changes in several steps begins.
const CHANGES: u64 = 0xc4a9;

/// Where that of probes begins, and again that of what becomes of them.
const PROBES: u64 = 0x9b0e;
pub const PROBING: u64 = 0x100c;

/// The same of imports.
const IMPORTS: u64 = 0x1347;
pub const IMPORTING: u64 = 0x01d0;

/// What stays the same for a whole history.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub roles: Vec<ReplicaRole>,
    /// One process with a store of its own.
    pub is_single: bool,
    pub keysets: usize,
    pub is_remote: bool,
    /// No clock is further from true time, in milliseconds.
    pub ahead_max: i64,
    pub classes: Vec<Class>,
    pub verifiers: usize,
    /// A second caching layer keeps documents for so long, in milliseconds; 0: there is none.
    pub edge: i64,
    /// Of a thousand fetches so many fail on the way.
    pub flaky: u64,
    /// A lie: what the KMS confirmed is gone some time later.
    pub loses_keys: bool,
    pub policies: Vec<Policy>,
    /// Places that probes may look at.
    pub locations: usize,
    /// Private keys from elsewhere can join.
    pub takes_private: bool,
}

#[derive(Clone, Debug)]
pub struct History {
    pub setup: Setup,
    pub events: Vec<(i64, Event)>,
    /// In milliseconds, before everything is put right.
    pub lasts: i64,
}

/// What kind of histories to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Mostly one process and little that goes wrong: many rotations.
    Rotations,
    /// Everything, everywhere.
    Turmoil,
}

fn secs(random: &mut Random, choices: &[i64]) -> i64 {
    choices[random.below(choices.len() as u64) as usize] * 1000
}

impl Mix {
    /// For how many rotations a history is drawn. Records grow with what has been, and with them all that is done.
    const fn rotations(self) -> i64 {
        match self {
            Mix::Rotations => 5,
            Mix::Turmoil => 8,
        }
    }
}

impl History {
    /// Everything that operators do on one day, by one process or by two that share a store.
    pub fn everyday(shared: bool) -> History {
        let drawn = (1..).map(|seed| History::draw(seed, Mix::Rotations));
        let fits = |history: &History| history.setup.is_single != shared && history.setup.flaky == 0;
        let mut history = drawn.into_iter().find(fits).expect("seeds go on");
        if shared {
            // Replicas that look less often have fewer moments at which to die.
            history.setup.policies.iter_mut().for_each(slow_down);
        }
        history.setup.probe(if shared { 2 } else { 0 }, |_| true);
        let every = every(&history.setup.policies[0]).as_millis();
        let events = [
            (120, Event::Rotate { seat: 0, early: false }),
            (130, Event::Rollback { seat: 0 }),
            (140, Event::Resume { seat: 0 }),
            (260, Event::Revoke { seat: 0, which: None }),
            (300, Event::Hold { seat: 0, lasts: every / 5 }),
            (330, Event::Configure { seat: 0, policy: 1 }),
            (400, Event::Revoke { seat: 0, which: Some(1) }),
            (470, Event::Compromise { seat: 0 }),
            (600, Event::Algorithm { seat: 0, other: true }),
            (640, Event::Confirm { seat: 0 }),
            (720, Event::Confirm { seat: 0 }),
            (760, Event::Drain { seat: 0 }),
            (770, Event::Undrain { seat: 0 }),
        ];
        history.events = events.into_iter().map(|(part, event)| (every * part / 100, event)).collect();
        history.lasts = every * 9;
        history
    }

    pub fn draw(seed: u64, mix: Mix) -> History {
        let mut random = Random::new(seed);
        let mut setup = Setup::draw(seed, mix, &mut random);
        let every = setup.policies.iter().map(|policy| every(policy).as_millis()).max().unwrap();
        let lasts = every * mix.rotations();
        let faults = match mix {
            Mix::Rotations => random.below(4),
            Mix::Turmoil => 6 + random.below(30),
        };
        let mut events: Vec<(i64, Event)> = (0..faults)
            .map(|_| (1 + i64::try_from(random.below(lasts.unsigned_abs())).unwrap(), draw_event(&setup, &mut random)))
            .collect();
        events.extend(draw_change(&setup, lasts, every));
        events.extend(draw_probes(&mut setup, lasts));
        events.extend(draw_imports(&mut setup, lasts, every));
        events.sort_by_key(|(at, _)| *at);
        History { setup, events, lasts }
    }
}

fn draw_event(setup: &Setup, random: &mut Random) -> Event {
    let seat = random.below(16) as usize;
    let lasts = 500 + i64::try_from(random.below(40_000)).unwrap();
    let half = random.below(2) == 0;
    match random.below(40) {
        0..=4 => Event::Rotate { seat, early: random.below(5) == 0 },
        5 | 6 => Event::Rollback { seat },
        7 | 8 => Event::Hold { seat, lasts },
        9 | 10 => Event::Resume { seat },
        11..=13 => Event::Revoke { seat, which: half.then(|| random.below(8) as usize) },
        14 => Event::Compromise { seat },
        15..=18 => Event::Configure { seat, policy: random.below(setup.policies.len() as u64) as usize },
        19..=23 => Event::Crash { seat, places: random.below(60) },
        24 | 25 => Event::Kill { seat, down: lasts, forgets: half },
        26 | 27 => Event::Stop { seat, lasts },
        28 | 29 => {
            let kind = random.below(3);
            Event::Cut { seat, lasts, deaf: kind != 1, mute: kind != 2 }
        }
        30 => Event::Slow { seat, lasts, most: 1 + random.below(6_000) },
        31 => Event::LoseAnswers { seat, count: 1 + random.below(3) as u32 },
        32 => Event::LateWrite { seat, after: random.below(10_000) },
        33 => Event::StoreClock { error: if half { 60_000 } else { -20_000 }, lasts },
        34 => Event::Older { lasts },
        35 | 36 => Event::Mood { mood: kms::Mood::BAD[random.below(6) as usize], lasts },
        37 | 38 => Event::Drift { seat, ahead: ahead(setup, random) },
        _ => Event::Jump { seat, by: if half { 3_600_000 } else { -3_600_000 }, lasts },
    }
}

/// Changes of the installation that take several steps, in some of the histories. They are drawn from a sequence of their
/// own: what else happens does not depend on them.
fn draw_change(setup: &Setup, lasts: i64, every: i64) -> Vec<(i64, Event)> {
    let mut random = Random::new(setup.seed ^ CHANGES);
    let kind = random.below(16);
    let mut some = |most: i64| i64::try_from(random.below(most.max(1).unsigned_abs())).unwrap();
    let begin = every + some(lasts - 3 * every);
    // The first of the replicas writes; what is left over of its number says which keyset.
    let first_of = |keyset: usize| keyset * setup.roles.len();
    match kind {
        0..=3 => {
            let mut events = Vec::new();
            let back = begin + some(3 * every);
            for (at, other) in [(begin, true), (back, false)].into_iter().take(1 + usize::from(kind > 1)) {
                let seats = (0..setup.roles.len()).map(|seat| (at + some(3_000), Event::Algorithm { seat, other }));
                events.extend(seats.collect::<Vec<_>>());
                for keyset in 0..setup.keysets {
                    let times = [some(every), some(2 * every), some(2 * every)];
                    events.extend(times.map(|after| (at + after, Event::Confirm { seat: first_of(keyset) })));
                }
            }
            events
        }
        4 | 5 => {
            let (keyset, ends) = (some(16) as usize % setup.keysets, begin + some(2 * every));
            let seat = first_of(keyset);
            vec![(begin, Event::Drain { seat }), (ends, Event::Undrain { seat })]
        }
        6 | 7 if setup.is_single && !setup.is_remote && setup.keysets == 1 => {
            vec![(begin, Event::Backup), (begin + some(3 * every), Event::Recover { marks: kind == 7 })]
        }
        _ => Vec::new(),
    }
}

/// Probes in some of the histories, and what is wrong with the locations that they look at. Drawn as changes are.
fn draw_probes(setup: &mut Setup, lasts: i64) -> Vec<(i64, Event)> {
    let mut random = Random::new(setup.seed ^ PROBES);
    if random.below(4) > 0 {
        return Vec::new();
    }
    // The first policy looks at all of them, the others perhaps at fewer.
    let locations = 1 + random.below(probes::MOST as u64) as usize;
    setup.probe(locations, |policy| policy == 0 || random.below(3) > 0);
    let mut some = |most: i64| i64::try_from(random.below(most.unsigned_abs())).unwrap();
    let count = some(5);
    let show = |_| {
        let (location, shown) = (some(probes::MOST as i64) as usize, Shown::BAD[some(3) as usize]);
        (1 + some(lasts), Event::Show { location, shown, lasts: 500 + some(60_000) })
    };
    (0..count).map(show).collect()
}

/// Keys of issuers that were there before, in some of the histories. An operator asks several times, since answers get
/// lost, and something goes wrong meanwhile. Drawn as changes are.
fn draw_imports(setup: &mut Setup, lasts: i64, every: i64) -> Vec<(i64, Event)> {
    let mut random = Random::new(setup.seed ^ IMPORTS);
    if random.below(5) > 0 {
        return Vec::new();
    }
    setup.takes_private = !setup.is_remote;
    let backend = setup.backend().to_owned();
    setup.policies.iter_mut().for_each(|policy| policy.backend.clone_from(&backend));
    let mut some = |most: i64| i64::try_from(random.below(most.max(1).unsigned_abs())).unwrap();
    let mut events = Vec::new();
    for number in 0..1 + some(2) as usize {
        let begin = 1_500 + if some(3) == 0 { 0 } else { some(lasts / 2) };
        let seat = some(16) as usize % setup.keysets * setup.roles.len();
        let is_private = setup.takes_private && some(2) == 0;
        let life = if is_private { every + some(4 * every) } else { 1_000 + some(2 * every) };
        let import = Import { seat, number, is_private, life, overlaps: every + some(3 * every) };
        for after in [0, 2_000 + some(4_000), 20_000 + some(every)] {
            events.push((begin + after, Event::Import(import)));
        }
        match some(4) {
            0 => events.push((begin - 1, Event::Crash { seat, places: some(80).unsigned_abs() })),
            1 => {
                events.push((begin - 1, Event::Cut { seat, lasts: 500 + some(10_000), deaf: some(2) == 0, mute: true }))
            }
            _ => {}
        }
        // Two rotations one after the other are over while its tokens live.
        if is_private {
            let rotates = [every + some(every), 2 * every + some(every), 3 * every + some(every)];
            events.extend(rotates.map(|after| (begin + after, Event::Rotate { seat, early: false })));
        }
        if some(3) == 0 {
            events.push((begin + some(3 * every), Event::RevokeEarlier { seat, number }));
        }
    }
    events
}

/// Mostly as far as may be.
pub fn ahead(setup: &Setup, random: &mut Random) -> i64 {
    match random.below(4) {
        0 | 1 => setup.ahead_max,
        2 => -setup.ahead_max,
        _ => i64::try_from(random.below(2 * setup.ahead_max.unsigned_abs() + 1)).unwrap() - setup.ahead_max,
    }
}

impl Setup {
    /// Its KMS is an account of AWS KMS, used by the daemon's own backend, and it signs remotely.
    pub fn is_account(&self) -> bool {
        self.is_remote && self.seed.is_multiple_of(2)
    }

    /// As policies name what keeps the keys.
    pub fn backend(&self) -> &'static str {
        match (self.is_account(), self.takes_private) {
            (true, _) => AWS_KMS,
            (false, true) => LOCAL,
            (false, false) => kms::NAME,
        }
    }

    fn draw(seed: u64, mix: Mix, random: &mut Random) -> Setup {
        let is_single = match mix {
            Mix::Rotations => random.below(16) > 0,
            Mix::Turmoil => random.below(3) == 0,
        };
        let roles = draw_roles(is_single, mix, random);
        let classes = Class::draw(random);
        let edge = if random.below(3) == 0 { secs(random, &[2, 5, 10]) } else { 0 };
        let skew = secs(random, &[1, 2]);
        let mut setup = Setup {
            seed,
            roles,
            is_single,
            keysets: if mix == Mix::Turmoil && random.below(4) == 0 { 2 } else { 1 },
            is_remote: mix == Mix::Turmoil && random.below(4) == 0,
            ahead_max: skew / 2,
            classes,
            verifiers: if mix == Mix::Turmoil && random.below(32) == 0 { 4096 } else { 48 },
            edge,
            flaky: if random.below(3) == 0 { 20 } else { 0 },
            loses_keys: false,
            policies: Vec::new(),
            locations: 0,
            takes_private: false,
        };
        while setup.policies.len() < 3 {
            let policy = setup.draw_policy(skew, mix, random);
            if setup.is_accepted(&policy) {
                setup.policies.push(policy);
            }
        }
        setup
    }

    /// Has every policy look at those of so many locations that are `wanted`.
    fn probe(&mut self, locations: usize, mut wanted: impl FnMut(usize) -> bool) {
        self.locations = locations;
        for (number, policy) in self.policies.iter_mut().enumerate() {
            policy.issuer.probes = (0..locations).filter(|_| wanted(number)).map(probes::url).collect();
        }
    }

    /// Whether `jwksd check` takes it for every keyset.
    fn is_accepted(&self, policy: &Policy) -> bool {
        let names: Vec<Name> = KEYSETS.iter().take(self.keysets).map(|name| Name::parse(name).unwrap()).collect();
        let keysets: Vec<(Name, &Policy)> = names.iter().map(|name| (name.clone(), policy)).collect();
        let mut findings = timing::examine_issuer(&policy.issuer.name, &keysets);
        findings.extend(timing::examine_keyset(&names[0], policy));
        findings.iter().all(|finding| finding.severity != Severity::Refused)
    }

    /// A policy that keeps the rules, as near to what is refused as it may be.
    fn draw_policy(&self, skew: i64, mix: Mix, random: &mut Random) -> Policy {
        let ms = Span::from_millis;
        let max_age = ms(secs(random, if mix == Mix::Rotations { &[20, 30] } else { &[6, 10, 20] }));
        let shared = |span: i64| if self.is_single { Span::ZERO } else { ms(span) };
        let mut caches = vec![max_age];
        if self.edge > 0 {
            caches.push(ms(self.edge));
        }
        let verifiers = self.classes.iter().map(|class| class.declared(max_age)).collect();
        let ttl = ms(secs(random, if mix == Mix::Rotations { &[5, 10, 20] } else { &[5, 10, 20, 60, 120] }));
        let mut policy = Policy {
            issuer: IssuerPolicy {
                name: Name::parse("main").unwrap(),
                url: "https://auth.example.com".to_owned(),
                max_age,
                stale_if_error: ms(secs(random, &[0, 0, 4])),
                caches,
                jwks_paths: Vec::new(),
                discovery: Discovery::Off,
                probes: Vec::new(),
            },
            algorithm: Algorithm::Es256,
            backend: self.backend().to_owned(),
            rotation: RotationPolicy {
                schedule: Schedule::Every(Span::SECOND),
                propagation: Span::ZERO,
                successors: if random.below(4) == 0 { 2 } else { 1 },
                overlap_extra: Span::ZERO,
                bootstrap: Bootstrap::Wait,
                verifiers,
                clock_skew: ms(skew),
                staleness_limit: shared(secs(random, &[8, 20])),
                publish_lag: shared(secs(random, &[5, 8])),
            },
            tokens: TokenPolicy {
                max_ttl: ttl,
                default_ttl: ttl,
                required_claims: Vec::new(),
                forbidden_claims: Vec::new(),
                audiences: Vec::new(),
                types: vec!["JWT".to_owned()],
                backdate: Span::ZERO,
            },
        };
        policy.rotation.propagation = policy.visibility_window() + ms([0, 0, 1, 1500][random.below(4) as usize]);
        let pause = ms([1, 1000, 5000][random.below(3) as usize]);
        policy.rotation.schedule = Schedule::Every(policy.rotation.propagation + pause);
        policy
    }
}

fn draw_roles(is_single: bool, mix: Mix, random: &mut Random) -> Vec<ReplicaRole> {
    use ReplicaRole::{All, Manager, Signer};
    let sets: &[&[ReplicaRole]] = match (is_single, mix) {
        (true, _) => &[&[All]],
        (false, Mix::Rotations) => &[&[All, All], &[Manager, Signer]],
        (false, Mix::Turmoil) => &[
            &[All, All],
            &[Manager, Signer],
            &[All, All, All],
            &[Manager, Manager, Signer, Signer],
            &[Manager, Manager, All, Signer, Signer, Signer],
        ],
    };
    sets[random.below(sets.len() as u64) as usize].to_vec()
}

fn slow_down(policy: &mut Policy) {
    policy.rotation.publish_lag = Span::from_secs(24);
    policy.rotation.staleness_limit = Span::from_secs(60);
    policy.rotation.propagation = policy.visibility_window();
    policy.rotation.schedule = Schedule::Every(policy.rotation.propagation + Span::SECOND);
}

pub fn every(policy: &Policy) -> Span {
    match policy.rotation.schedule {
        Schedule::Every(every) => every,
        _ => unreachable!("only periods are drawn"),
    }
}

impl Class {
    pub fn declared(&self, max_age: Span) -> Verifier {
        let span = |millis: Option<i64>| millis.map(Span::from_millis);
        Verifier {
            name: self.name().to_owned(),
            sees_new: span(self.sees_new()).unwrap_or(max_age),
            keeps_old: if self.forgets() { Some(span(self.cache()).unwrap_or(max_age)) } else { None },
        }
    }
}
