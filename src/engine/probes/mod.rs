//! The publication gate: watching, where verifiers fetch, what they are served (DESIGN §2, "pending").

mod fetch;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Engine;
use super::cell::IssuerCell;
use super::reconcile::chain;
use crate::keyring::outlook::Alarm;
use crate::keyring::plan::Seen;
use crate::keyring::policy::IssuerPolicy;
use crate::keyring::publication::{CacheHeaders, Discrepancy, Served};
use crate::keyring::record::{Key, KeyState, Keyring, Serial};
use crate::keyring::time::{Span, Timestamp};

pub use fetch::{Fetch, FetchError, Fetched, HttpsFetch};

/// Samples are at least this far apart, and at most [`SLOWEST`].
const QUICKEST: Span = Span::from_millis(250);
const SLOWEST: Span = Span::from_secs(30);

/// Discrepancies of one probe that are kept and told.
const TOLD_MAX: usize = 10;

/// What the probes of one issuer show.
#[derive(Default)]
pub struct Probes {
    each: Vec<Probe>,
    /// The locations are the ones that an earlier run asked.
    resumes: bool,
    /// Since when an earlier run saw each waiting kid, in boot time, as far as it counts: without the time in between.
    recorded: HashMap<String, i64>,
    /// Boot time of an earlier run's last samples: of probes that had none in this run, nothing later is known.
    sampled_before: Option<i64>,
    /// Waiting kids that were seen, and recorded as that, and have been seen ever since.
    agreed: HashSet<String>,
}

/// One location and what it showed in this run.
#[derive(Clone, Debug)]
pub struct Probe {
    pub url: String,
    /// Boot time of its first turn, in milliseconds.
    begun: i64,
    /// Boot time of the last sample, in milliseconds.
    sampled: Option<i64>,
    /// Why the last fetch got no sample.
    pub failing: Option<String>,
    /// Since when it has shown each kid, in boot time without the time that nothing was known; may lie before this boot.
    shown: HashMap<String, i64>,
    /// What no cache explains, as of the last sample.
    pub discrepancies: BTreeSet<Discrepancy>,
    /// How it may be held longer than declared, as of the last sample.
    pub excess: Option<String>,
}

impl Probe {
    fn new(url: &str, boot: i64) -> Self {
        Probe {
            url: url.to_owned(),
            begun: boot,
            sampled: None,
            failing: None,
            shown: HashMap::new(),
            discrepancies: BTreeSet::new(),
            excess: None,
        }
    }

    /// Takes a sample; `recorded` tells since when an earlier run saw a key.
    fn sample(&mut self, served: &Served, waiting: &[Key], recorded: &HashMap<String, i64>, boot: i64, interval: Span) {
        let first = self.sampled.is_none();
        // Nothing is known of the time between two samples beyond their usual distance.
        let gap = self.sampled.map_or(0, |last| (boot - last - 2 * interval.as_millis()).max(0));
        let mut shown = HashMap::new();
        for key in waiting.iter().filter(|key| served.shows(key)) {
            let kid = key.kid.as_str();
            let since = match self.shown.get(kid) {
                Some(since) => since + gap,
                None if first => recorded.get(kid).map_or(boot, |since| boot.min(*since)),
                None => boot,
            };
            shown.insert(kid.to_owned(), since);
        }
        self.shown = shown;
        self.sampled = Some(boot);
        self.failing = None;
    }

    /// The waiting kids that it showed last, in order.
    pub fn shows(&self) -> Vec<String> {
        let mut kids: Vec<String> = self.shown.keys().cloned().collect();
        kids.sort();
        kids
    }

    /// Its last sample was without the key.
    fn misses(&self, kid: &str) -> bool {
        self.sampled.is_some() && !self.shown.contains_key(kid)
    }

    /// Since when it shows the key and until when that is known, in boot time.
    fn sees(&self, kid: &str, recorded: &HashMap<String, i64>) -> Option<(i64, Option<i64>)> {
        let Some(sampled) = self.sampled else {
            return recorded.get(kid).map(|since| (*since, Some(self.begun)));
        };
        self.shown.get(kid).map(|since| (*since, self.failing.is_some().then_some(sampled)))
    }
}

impl Probes {
    pub fn each(&self) -> &[Probe] {
        &self.each
    }

    /// What all probes show of the waiting keys of a keyring; `at` turns boot time into trusted time.
    pub fn seen(&self, keyring: &Keyring, at: impl Fn(i64) -> Timestamp) -> BTreeMap<Serial, Seen> {
        let sight = |key: &Key| {
            let mut all: Option<(i64, Option<i64>)> = None;
            for probe in &self.each {
                let (since, until) = probe.sees(key.kid.as_str(), &self.recorded)?;
                let (latest, earliest) = all.unwrap_or((since, until));
                all = Some((latest.max(since), [earliest, until].into_iter().flatten().min()));
            }
            all.map(|(since, until)| Seen { since: at(since), until: until.map(&at) })
        };
        keyring.keys.iter().filter(is_waiting).filter_map(|key| Some((key.serial, sight(key)?))).collect()
    }

    /// Waiting ones of a keyset's keys whose record this process leaves as it is, though it says otherwise than what is seen
    /// here: another replica recorded that it does not see a key that was seen here before and still is, or that it sees one
    /// of which nothing is known here yet. So whoever misses a key has the last word, and nobody repeats what he said.
    pub(super) fn contested(&mut self, keys: &[Key], seen: &BTreeMap<Serial, Seen>) -> BTreeSet<Serial> {
        let mut contested = BTreeSet::new();
        for key in keys.iter().filter(is_waiting) {
            let kid = key.kid.as_str();
            let is_contested = match (seen.contains_key(&key.serial), key.seen_at.is_some()) {
                (true, true) => {
                    self.agreed.insert(kid.to_owned());
                    false
                }
                (true, false) => self.agreed.contains(kid),
                (false, recorded) => {
                    self.agreed.remove(kid);
                    recorded && !self.each.iter().any(|probe| probe.misses(kid))
                }
            };
            if is_contested {
                contested.insert(key.serial);
            }
        }
        contested
    }

    /// Probes that find something else than what is published.
    pub fn mismatches(&self) -> usize {
        self.each.iter().filter(|probe| !probe.discrepancies.is_empty()).count()
    }

    pub fn alarms(&self) -> impl Iterator<Item = Alarm> {
        let any = |raised: bool, alarm| raised.then_some(alarm);
        [
            any(self.mismatches() > 0, Alarm::PublicationMismatch),
            any(self.each.iter().any(|probe| probe.failing.is_some()), Alarm::ProbeUnreachable),
            any(self.each.iter().any(|probe| probe.excess.is_some()), Alarm::CachesExceeded),
        ]
        .into_iter()
        .flatten()
    }

    /// Asks the locations of `policy` from now on. What the former ones showed says nothing about these.
    pub(super) fn follow(&mut self, policy: &IssuerPolicy, adopted: bool, boot: i64) {
        if self.each.iter().map(|probe| &probe.url).eq(&policy.probes) {
            return;
        }
        self.each = policy.probes.iter().map(|url| Probe::new(url, boot)).collect();
        self.resumes = adopted;
        self.recorded.clear();
        self.sampled_before = None;
        self.agreed.clear();
    }

    /// Until when it is known, in boot time, what every location shows; `None` if it never was.
    pub(super) fn known_until(&self) -> Option<i64> {
        let known = |probe: &Probe| probe.sampled.or(self.sampled_before);
        self.each.iter().map(known).min().flatten()
    }

    /// Goes on from what an earlier run recorded, which knew what is shown until `sampled`.
    pub(super) fn resume(&mut self, keyrings: &[Arc<Keyring>], sampled: Timestamp, now: Timestamp, boot: i64) {
        if !self.resumes {
            return;
        }
        let boot_of = |at: Timestamp| boot.saturating_sub(now.as_millis().saturating_sub(at.as_millis()));
        self.sampled_before = Some(boot_of(sampled));
        let away = now.since(sampled);
        let seen = |key: &Key| Some((key.kid.to_string(), boot_of(key.seen_at? + away)));
        self.recorded = keyrings.iter().flat_map(|keyring| &keyring.keys).filter(is_waiting).filter_map(seen).collect();
        self.agreed = self.recorded.keys().cloned().collect();
    }
}

fn is_waiting(key: &&Key) -> bool {
    matches!(key.state, KeyState::Pending | KeyState::Standby)
}

impl Engine {
    /// Samples every probe until cancelled.
    pub async fn watch_probes(self: Arc<Self>, fetch: Arc<dyn Fetch>, cancel: CancellationToken) {
        loop {
            let changed = self.reconfigured.notified();
            let issuers: Vec<_> = self.directory().issuers.clone();
            let asked = issuers.iter().filter(|issuer| !issuer.policy.load().probes.is_empty());
            let interval = asked.map(|issuer| interval(&issuer.policy.load())).min();
            // Side by side: an issuer whose probes hang must not thin out the samples of another.
            let mut samples = JoinSet::new();
            for issuer in issuers {
                let (engine, fetch) = (self.clone(), fetch.clone());
                samples.spawn(async move { engine.sample(&issuer, &fetch).await });
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = all(&mut samples) => {}
            }
            let pause = async {
                match interval {
                    Some(interval) => self.clock.clock().sleep(interval).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = changed => {}
                () = pause => {}
            }
        }
    }

    /// One sample of each probe of an issuer.
    pub async fn sample(&self, issuer: &Arc<IssuerCell>, fetch: &Arc<dyn Fetch>) {
        let policy = issuer.policy.load_full();
        let keyrings = self.keyrings_of(issuer);
        let adopted = keyrings.iter().all(|keyring| keyring.policy.issuer.probes == policy.probes);
        issuer.probes().follow(&policy, adopted, self.clock.boot().as_millis());
        let mut fetches = JoinSet::new();
        for (index, url) in policy.probes.iter().cloned().enumerate() {
            let fetch = fetch.clone();
            fetches.spawn(async move { (index, fetch.fetch(&url).await) });
        }
        let mut news = false;
        while let Some(done) = fetches.join_next().await {
            // A fetch that panicked got no sample; the next turn tries again.
            let Ok((index, outcome)) = done else { continue };
            news |= match outcome {
                Ok(fetched) => self.sampled(issuer, &policy, index, &fetched),
                Err(error) => not_sampled(issuer, index, &error),
            };
        }
        self.tell_mismatches(issuer);
        if news {
            let directory = self.directory();
            directory.keysets_of(issuer).for_each(|cell| cell.wake.notify_one());
        }
    }

    fn sampled(&self, issuer: &IssuerCell, policy: &IssuerPolicy, index: usize, fetched: &Fetched) -> bool {
        let (now, boot) = (self.clock.now(), self.clock.boot().as_millis());
        let keyrings = self.keyrings_of(issuer);
        let served = Served::parse(&fetched.body);
        let whole: Vec<&Keyring> = keyrings.iter().map(Arc::as_ref).collect();
        let found = served.discrepancies(&whole, policy, now);
        let discrepancies: BTreeSet<_> = found.into_iter().take(TOLD_MAX).collect();
        let excess = CacheHeaders::excess(&fetched.headers, policy);
        let waiting: Vec<Key> =
            keyrings.iter().flat_map(|keyring| keyring.keys.iter().filter(is_waiting)).cloned().collect();
        let mut probes = issuer.probes();
        let Probes { each, recorded, agreed, .. } = &mut *probes;
        agreed.retain(|kid| waiting.iter().any(|key| key.kid.as_str() == kid));
        let Some(probe) = each.get_mut(index) else { return false };
        let before = (probe.shown.clone(), probe.failing.is_some(), probe.sampled.is_some());
        probe.sample(&served, &waiting, recorded, boot, interval(policy));
        if before.1 {
            tracing::info!(issuer = %issuer.url, probe = %probe.url, "the probe can be fetched again");
        }
        if probe.discrepancies != discrepancies {
            tell(&issuer.url, &probe.url, &discrepancies);
        }
        if probe.excess != excess
            && let Some(excess) = &excess
        {
            tracing::warn!(issuer = %issuer.url, probe = %probe.url, "{excess}: declare the caches that are there in `caches`, or have them hold the document for less long");
        }
        probe.discrepancies = discrepancies;
        probe.excess = excess;
        before != (probe.shown.clone(), false, true)
    }

    pub(super) fn keyrings_of(&self, issuer: &IssuerCell) -> Vec<Arc<Keyring>> {
        let directory = self.directory();
        let cells = directory.keysets_of(issuer);
        cells.map(|cell| cell.snapshot.load().keyring.clone()).collect()
    }
}

async fn all(samples: &mut JoinSet<()>) {
    while let Some(done) = samples.join_next().await {
        if let Err(error) = done {
            tracing::error!(%error, "a sample of an issuer's probes was aborted; the next turn tries again");
        }
    }
}

fn not_sampled(issuer: &IssuerCell, index: usize, error: &FetchError) -> bool {
    let mut probes = issuer.probes();
    let Some(probe) = probes.each.get_mut(index) else { return false };
    let told = chain(error);
    let news = probe.failing.is_none();
    if probe.failing.as_ref() != Some(&told) {
        tracing::warn!(issuer = %issuer.url, probe = %probe.url, error = %told, "the probe got no answer: the propagation of waiting keys pauses");
    }
    probe.failing = Some(told);
    news
}

fn tell(issuer: &str, probe: &str, discrepancies: &BTreeSet<Discrepancy>) {
    if discrepancies.is_empty() {
        tracing::info!(issuer, probe, "the probe shows what is published");
    }
    for discrepancy in discrepancies {
        tracing::error!(issuer, probe, "what verifiers are served differs from what is published: {discrepancy}");
    }
}

/// Samples are half a `max_age` apart, so that no cache hides what was served in between for long.
fn interval(policy: &IssuerPolicy) -> Span {
    Span::from_millis(policy.max_age.as_millis() / 2).max(QUICKEST).min(SLOWEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::algorithm::Algorithm;
    use crate::keyring::jwk::{EcCurve, Kid, PublicJwk};
    use crate::keyring::record::Origin;

    const INTERVAL: Span = Span::SECOND;

    fn key() -> Key {
        Key {
            serial: 1,
            kid: Kid("kid".into()),
            algorithm: Algorithm::Es384,
            public: PublicJwk::Ec { crv: EcCurve::P384, x: "AA".to_owned(), y: "AA".to_owned() },
            private: None,
            origin: Origin::Created,
            state: KeyState::Pending,
            entered_at: Timestamp::EPOCH,
            created_at: Timestamp::EPOCH,
            since_generation: 0,
            published_at: None,
            seen_at: None,
            activated_at: None,
            demoted_at: None,
            stopped_at: None,
            ttl_bound: Span::ZERO,
            overlap_bound: Span::ZERO,
            published_until: None,
            unpropagated: false,
            rolled_back: false,
            revocation: None,
        }
    }

    fn shows() -> Served {
        Served::parse(
            br#"{"keys":[{"kty":"EC","crv":"P-384","x":"AA","y":"AA","kid":"kid","use":"sig","alg":"ES384"}]}"#,
        )
    }

    fn recorded(since: i64) -> HashMap<String, i64> {
        HashMap::from([("kid".to_owned(), since)])
    }

    fn sample(probe: &mut Probe, served: &Served, boot: i64) {
        probe.sample(served, &[key()], &HashMap::new(), boot, INTERVAL);
    }

    fn sees(probe: &Probe) -> Option<(i64, Option<i64>)> {
        probe.sees("kid", &HashMap::new())
    }

    #[test]
    fn a_key_is_seen_since_the_first_of_the_samples_that_all_show_it() {
        let mut probe = Probe::new("https://a", 0);
        assert_eq!(sees(&probe), None);
        sample(&mut probe, &shows(), 1000);
        sample(&mut probe, &shows(), 2000);
        assert_eq!(sees(&probe), Some((1000, None)));
        sample(&mut probe, &Served::parse(br#"{"keys":[]}"#), 3000);
        assert_eq!(sees(&probe), None);
        sample(&mut probe, &shows(), 4000);
        assert_eq!(sees(&probe), Some((4000, None)));
    }

    #[test]
    fn time_without_samples_does_not_count() {
        let mut probe = Probe::new("https://a", 0);
        sample(&mut probe, &shows(), 1000);
        probe.failing = Some("down".to_owned());
        assert_eq!(sees(&probe), Some((1000, Some(1000))), "what came after the last sample is not known");
        sample(&mut probe, &shows(), 61_000);
        assert_eq!(sees(&probe), Some((1000 + 58_000, None)), "60 s apart instead of at most 2");
    }

    #[test]
    fn what_an_earlier_run_saw_counts_until_the_first_sample_and_from_then_on_if_it_agrees() {
        let earlier = recorded(-5000);
        let mut probe = Probe::new("https://a", 100);
        assert_eq!(probe.sees("kid", &earlier), Some((-5000, Some(100))));
        probe.sample(&shows(), &[key()], &earlier, 1000, INTERVAL);
        assert_eq!(probe.sees("kid", &earlier), Some((-5000, None)));
        let mut probe = Probe::new("https://a", 100);
        probe.sample(&Served::parse(b"[]"), &[key()], &earlier, 1000, INTERVAL);
        assert_eq!(probe.sees("kid", &earlier), None);
        probe.sample(&shows(), &[key()], &earlier, 2000, INTERVAL);
        assert_eq!(probe.sees("kid", &earlier), Some((2000, None)), "a miss ends what was recorded");
    }

    #[test]
    fn of_replicas_that_are_shown_different_things_those_that_miss_a_key_have_the_last_word() {
        let recorded = |seen: bool| [Key { seen_at: seen.then_some(Timestamp::EPOCH), ..key() }];
        let seen = BTreeMap::from([(1, Seen { since: Timestamp::EPOCH, until: None })]);
        let (nothing, contested) = (BTreeMap::new(), BTreeSet::from([1]));
        let mut sees = Probes::default();
        assert!(sees.contested(&recorded(false), &seen).is_empty(), "it has something to record");
        assert!(sees.contested(&recorded(true), &seen).is_empty());
        assert_eq!(sees.contested(&recorded(false), &seen), contested, "another replica took that back");
        assert!(sees.contested(&recorded(false), &nothing).is_empty());
        assert!(sees.contested(&recorded(false), &seen).is_empty(), "it lost sight of the key, and found it again");

        let mut does_not = Probes { each: vec![Probe::new("https://a", 0)], ..Probes::default() };
        assert_eq!(does_not.contested(&recorded(true), &nothing), contested, "it has not looked yet");
        sample(&mut does_not.each[0], &Served::parse(br#"{"keys":[]}"#), 1000);
        assert!(
            does_not.contested(&recorded(true), &nothing).is_empty(),
            "a restart must not find the key recorded as seen"
        );
    }

    #[tokio::test]
    async fn names_do_not_lead_to_link_local_addresses() {
        use reqwest::dns::Resolve as _;
        let resolve = |name: &str| crate::outbound::NotLinkLocal.resolve(name.parse().unwrap());
        assert!(resolve("localhost").await.is_ok());
        // An address resolves to itself.
        assert!(resolve("169.254.169.254").await.is_err());
        assert!(resolve("fe80::1").await.is_err());
    }
}
