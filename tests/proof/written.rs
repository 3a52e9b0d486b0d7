//! Random configurations, written as people write them and read by what `jwksd check` reads them with. What must hold of
//! one is computed here from what was written, not from what the product made of it.

use std::fmt::Write as _;

use jwksd::config::{self, ConfigErrors, Format, Source};
use jwksd::keyring::policy::Policy;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::keyring::timing::Finding;
use jwksd::simulation::random::Random;
use jwksd::simulation::{Caching, Faults, Reality, Scenario};

/// Crontab lines with their zones and the least time between two occurrences. When summer time begins, ten o'clock comes
/// after 23 hours; half past two does not come, so that three does instead, after 23 and a half.
const LINES: [(&str, &str, Span); 4] = [
    ("0 10 * * *", "Europe/Berlin", Span::HOUR.times(23)),
    ("30 2 * * *", "America/New_York", Span::MINUTE.times(23 * 60 + 30)),
    ("0 */12 * * *", "UTC", Span::HOUR.times(12)),
    ("0 4 * * 2,5", "UTC", Span::DAY.times(3)),
];

/// One configuration: an issuer with its keysets, and the store.
#[derive(Clone, Debug)]
pub struct Written {
    /// Several replicas share the store: its `publish_lag` and `staleness_limit`.
    pub shared: Option<(Span, Span)>,
    pub max_age: Span,
    /// Left out where empty.
    pub caches: Vec<Span>,
    pub stale_if_error: Span,
    pub keysets: Vec<Keyset>,
}

#[derive(Clone, Debug)]
pub struct Keyset {
    pub schedule: Schedule,
    pub propagation: Span,
    pub successors: u32,
    pub overlap_extra: Span,
    pub verifiers: Vec<Span>,
    pub clock_skew: Span,
    pub max_ttl: Span,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Every(Span),
    /// One of [`LINES`].
    Line(usize),
}

impl Schedule {
    /// The least time between two rotations.
    pub fn gap(self) -> Span {
        match self {
            Schedule::Every(every) => every,
            Schedule::Line(line) => LINES[line].2,
        }
    }
}

fn span(random: &mut Random, low: i64, high: i64) -> Span {
    Span::from_millis(random.between(low, high))
}

fn seconds(random: &mut Random, low: i64, high: i64) -> Span {
    Span::from_secs(random.between(low, high))
}

impl Written {
    /// Anything, mostly near what is just allowed.
    pub fn any(random: &mut Random) -> Written {
        let mut written = Written {
            shared: (random.below(2) == 0).then(|| (span(random, 1, 60_000), span(random, 1_000, 3_600_000))),
            max_age: seconds(random, 1, 600),
            caches: (0..random.below(4)).map(|_| span(random, 0, 600_000)).collect(),
            stale_if_error: if random.below(3) == 0 { span(random, 0, 60_000) } else { Span::ZERO },
            keysets: Vec::new(),
        };
        for _ in 0..if random.below(4) == 0 { 2 + random.below(2) } else { 1 } {
            let keyset = written.any_keyset(random);
            written.keysets.push(keyset);
        }
        written
    }

    fn any_keyset(&self, random: &mut Random) -> Keyset {
        let mut keyset = Keyset {
            schedule: Schedule::Line(0),
            propagation: Span::ZERO,
            successors: 2,
            overlap_extra: Span::ZERO,
            verifiers: (0..random.below(4)).map(|_| span(random, 0, 3_600_000)).collect(),
            clock_skew: seconds(random, 0, 120),
            max_ttl: Span::SECOND,
        };
        self.redraw(&mut keyset, random);
        keyset
    }

    /// Changes what the world outside has nothing to do with.
    fn redraw(&self, keyset: &mut Keyset, random: &mut Random) {
        let needed = self.needed(keyset);
        keyset.propagation = match random.below(12) {
            10 | 11 => needed.saturating_sub(self.some_term(keyset, random)),
            0 => needed.saturating_sub(span(random, 1, needed.as_millis() / 2)),
            1 => needed.saturating_sub(Span::SECOND),
            2 => needed,
            3..7 => needed.max(self.max_age),
            _ => needed + span(random, 1, 3_600_000),
        };
        // Nothing can be waited for in no time.
        keyset.propagation = keyset.propagation.max(Span::from_millis(1));
        keyset.schedule = match random.below(12) {
            0 | 1 => Schedule::Line(random.index(LINES.len())),
            2 => Schedule::Every(keyset.propagation.saturating_sub(span(random, 0, 600_000)).max(Span::SECOND)),
            3 if random.below(4) == 0 => Schedule::Every(Span::DAY.times(4 * 365)),
            4..8 => Schedule::Every(keyset.propagation + Span::from_millis(1)),
            _ => Schedule::Every(keyset.propagation + span(random, 1, 36_000_000)),
        };
        if matches!(keyset.schedule, Schedule::Line(_)) && random.below(3) == 0 {
            // No more than an hour from what lies between two rotations.
            let gap = keyset.schedule.gap().saturating_sub(Span::HOUR);
            keyset.propagation = needed.max(gap + span(random, 0, 7_200_000));
        }
        let usual = random.below(4) > 0;
        keyset.successors = [1, 1, 2, 2, 2, 3, 4, 0][random.index(if usual { 6 } else { 8 })];
        keyset.overlap_extra = if random.below(3) == 0 { span(random, 0, 3_600_000) } else { Span::ZERO };
        let longest = if random.below(3) == 0 { 20_000 } else { 3_600 };
        keyset.max_ttl = seconds(random, 1, longest);
    }

    /// How long documents may stay in the caches in front, all together.
    pub fn layers(&self) -> Span {
        let caches = self.caches.iter().fold(Span::ZERO, |sum, layer| sum + *layer);
        if self.caches.is_empty() { self.max_age + self.stale_if_error } else { caches + self.stale_if_error }
    }

    /// The least that propagation may be, as DESIGN §4 says.
    pub fn needed(&self, keyset: &Keyset) -> Span {
        let slowest = keyset.verifiers.iter().copied().max().unwrap_or_default();
        self.layers() + slowest + keyset.clock_skew + self.shared.map_or(Span::ZERO, |(lag, _)| lag)
    }

    /// How long a former key stays, and the most keys of the keyset at a time.
    pub fn keys(&self, keyset: &Keyset) -> i64 {
        let staleness = self.shared.map_or(Span::ZERO, |(_, staleness)| staleness);
        let overlap = keyset.max_ttl + keyset.clock_skew + keyset.clock_skew + staleness + keyset.overlap_extra;
        let (overlap, gap) = (overlap.as_millis(), keyset.schedule.gap().as_millis());
        1 + i64::from(keyset.successors) + (overlap + gap - 1) / gap
    }

    /// What somebody may forget to count.
    fn some_term(&self, keyset: &Keyset, random: &mut Random) -> Span {
        let lag = self.shared.map_or(Span::ZERO, |(lag, _)| lag);
        let layer = self.caches.iter().copied().min().unwrap_or(self.max_age);
        let slowest = keyset.verifiers.iter().copied().max().unwrap_or_default();
        [layer, self.stale_if_error, slowest, keyset.clock_skew, lag][random.index(5)]
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let store = match self.shared {
            Some((lag, staleness)) => format!(
                "kind = \"postgres\"\nurl_file = \"db.url\"\npublish_lag = \"{lag}\"\nstaleness_limit = \"{staleness}\""
            ),
            None => "path = \"data/keyrings\"".to_owned(),
        };
        let listeners = ["public", "signer", "admin", "ops"].iter().enumerate();
        listeners.for_each(|(port, name)| writeln!(text, "[{name}]\nlisten = \"127.0.0.1:{}\"", 8620 + port).unwrap());
        writeln!(text, "[admin.token.operator]\nrole = \"operator\"\nfile = \"data/admin.token\"").unwrap();
        writeln!(text, "[store]\n{store}\n[seal]\npath = \"data/seal.key\"").unwrap();
        writeln!(text, "[issuer.main]\nurl = \"https://auth.example.com\"\nmax_age = \"{}\"", self.max_age).unwrap();
        writeln!(text, "stale_if_error = \"{}\"", self.stale_if_error).unwrap();
        let quoted = |spans: &[Span]| spans.iter().map(|span| format!("\"{span}\"")).collect::<Vec<_>>().join(", ");
        if !self.caches.is_empty() {
            writeln!(text, "caches = [{}]", quoted(&self.caches)).unwrap();
        }
        for (number, keyset) in self.keysets.iter().enumerate() {
            let schedule = match keyset.schedule {
                Schedule::Every(every) => format!("every = \"{every}\""),
                Schedule::Line(line) => format!("schedule = \"{}\"\ntimezone = \"{}\"", LINES[line].0, LINES[line].1),
            };
            let Keyset { propagation, successors, overlap_extra, clock_skew, max_ttl, .. } = keyset;
            let verifiers = quoted(&keyset.verifiers);
            writeln!(
                text,
                "[keyset.k{number}]\nalgorithm = \"ES256\"\n[keyset.k{number}.rotation]\n{schedule}\npropagation = \"{propagation}\"\n\
                 successors = {successors}\noverlap_extra = \"{overlap_extra}\"\nverifiers = [{verifiers}]\n\
                 [keyset.k{number}.tokens]\nmax_ttl = \"{max_ttl}\"\nclock_skew = \"{clock_skew}\""
            )
            .unwrap();
        }
        text
    }

    /// What the product makes of it: its policies, in the order of the keysets, or what it refuses.
    pub fn read(&self) -> Result<Vec<Policy>, Vec<Finding>> {
        let loaded = self.understood();
        if !loaded.timing.is_empty() {
            return Err(loaded.timing);
        }
        Ok(loaded.config.keysets.into_iter().map(|keyset| (*keyset.policy).clone()).collect())
    }

    /// The policies, whether or not their timing is refused.
    pub fn policies(&self) -> Vec<Policy> {
        self.understood().config.keysets.into_iter().map(|keyset| (*keyset.policy).clone()).collect()
    }

    fn understood(&self) -> config::Loaded {
        let text = self.text();
        let source = Source::Text { name: "random.toml".to_owned(), text: text.clone(), format: Format::Toml };
        match config::load(&source, std::iter::empty()) {
            Ok(loaded) => loaded,
            Err(ConfigErrors::Invalid(invalid)) => panic!("{invalid}\n{text}"),
            Err(error) => panic!("{error}\n{text}"),
        }
    }

    /// The world that was declared, as far as the keyset is concerned.
    pub fn reality(&self, keyset: &Keyset, random: &mut Random) -> Reality {
        let named = |(number, sees_new): (usize, &Span)| Caching { name: format!("v{number}"), sees_new: *sees_new };
        let mut verifiers: Vec<Caching> = keyset.verifiers.iter().enumerate().map(named).collect();
        verifiers.push(Caching { name: "no cache".to_owned(), sees_new: Span::ZERO });
        Reality {
            replicas: if self.shared.is_some() { 2 + random.index(3) } else { 1 },
            skew: keyset.clock_skew,
            lag: self.shared.map_or(Span::ZERO, |(lag, _)| lag),
            layers: self.layers(),
            verifiers,
            tokens: 12,
            faults: Faults::ALL,
        }
    }

    /// The keyset `number` in the world that was declared, for about so many rotations.
    pub fn scenario(&self, number: usize, policies: &[Policy], rotations: u32, seed: u64) -> Scenario {
        let (keyset, policy) = (&self.keysets[number], &policies[number]);
        Scenario {
            keyset: jwksd::keyring::name::Name::parse(&format!("k{number}")).unwrap(),
            policies: vec![policy.clone()],
            reality: self.reality(keyset, &mut Random::new(seed)),
            begins: Timestamp::from_secs(1_800_000_000),
            lasts: keyset.schedule.gap().times(rotations),
            seed,
        }
    }

    /// The same with other policies of the keyset that are accepted too: what the configuration may change to.
    pub fn changed(&self, number: usize, random: &mut Random) -> Option<Policy> {
        let mut changed = self.clone();
        self.redraw(&mut changed.keysets[number], random);
        Some(changed.read().ok()?.swap_remove(number))
    }
}
