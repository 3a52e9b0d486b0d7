//! Whether a policy can keep the promise: every refusal and warning about timing, with its arithmetic, and what follows
//! from a policy.
//!
//! Messages name every configuration key they count, so that a reader can redo the sum and knows which ones to change.

use std::collections::BTreeSet;
use std::fmt;

use super::name::Name;
use super::policy::{IssuerPolicy, Policy, RotationPolicy, Verifier};
use super::schedule::{Gap, Schedule};
use super::time::Span;
use super::verifiers;

/// Keys in one JWKS: AWS ALB reads no more.
pub const MAX_KEYS: u32 = 10;
/// Bytes of one JWKS: Nimbus reads no more by default.
pub const MAX_JWKS_BYTES: usize = 50 * 1024;
/// From here on verifiers that keep few keys (jwks-rsa: 5) evict live ones.
pub const MANY_KEYS: u32 = 6;
/// NIST SP 800-57 part 1 §5.3.6: private signature keys are used for one to three years.
pub const LONGEST_ROTATION: Span = Span::from_secs(3 * 365 * 86_400);
pub const LONG_ROTATION: Span = Span::from_secs(365 * 86_400);
/// A bearer token cannot be revoked: beyond this its life deserves a thought.
pub const LONG_TOKEN: Span = Span::DAY;

/// Something about a policy that an operator must change, or should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    /// The keyset whose table `key` is relative to; `None`: the issuer's table.
    pub keyset: Option<Name>,
    pub issuer: Option<Name>,
    /// Such as `rotation.propagation` or `tokens.default_ttl`; empty for the table itself.
    pub key: &'static str,
    /// A full sentence without the path: what is wrong, the arithmetic, what to do.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Warning,
    /// Refused by `check` and for new keysets; degrades existing ones.
    Refused,
}

impl Finding {
    /// Where it stands in the configuration, such as `keyset.default.rotation.propagation`.
    pub fn path(&self) -> String {
        let table = match (&self.keyset, &self.issuer) {
            (Some(keyset), _) => format!("keyset.{keyset}"),
            (None, Some(issuer)) => format!("issuer.{issuer}"),
            (None, None) => String::new(),
        };
        [table.as_str(), self.key].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(".")
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path(), self.message)
    }
}

/// What follows from a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Derived {
    pub propagation: Span,
    /// The least that propagation may be.
    pub visibility_window: Span,
    /// The slowest cache of a verifier that propagation still covers.
    pub covered_verifier: Span,
    /// How long a key stays published after it stopped signing.
    pub overlap: Span,
    pub smallest_gap: Gap,
    pub largest_gap: Gap,
    /// The most keys of this keyset in the JWKS, emergencies aside: one active, the successors, and those whose overlap
    /// has not passed.
    pub worst_case_keys: u32,
    /// An upper bound of what those keys take in the JWKS.
    pub worst_case_bytes: usize,
}

/// Computes what follows from a policy.
pub fn derive(policy: &Policy) -> Derived {
    let rotation = &policy.rotation;
    let overlap = policy.overlap();
    let smallest_gap = rotation.schedule.smallest_gap();
    let keys = retiring_keys(overlap, smallest_gap.span).saturating_add(rotation.successors).saturating_add(1);
    let elsewhere = policy.issuer.cache_span() + rotation.publish_lag + rotation.clock_skew;
    Derived {
        propagation: rotation.propagation,
        visibility_window: policy.visibility_window(),
        covered_verifier: rotation.propagation.saturating_sub(elsewhere),
        overlap,
        smallest_gap,
        largest_gap: rotation.schedule.largest_gap(),
        worst_case_keys: keys,
        worst_case_bytes: policy.algorithm.jwk_bytes().saturating_mul(keys as usize),
    }
}

/// ⌈overlap ÷ gap⌉: how many former keys can still be published.
fn retiring_keys(overlap: Span, gap: Span) -> u32 {
    let quotient = (overlap.as_millis() as u64).div_ceil((gap.as_millis() as u64).max(1));
    u32::try_from(quotient).unwrap_or(u32::MAX)
}

/// Everything that one keyset's policy can get wrong by itself, in the order of the configuration.
pub fn examine_keyset(name: &Name, policy: &Policy) -> Vec<Finding> {
    let mut findings = Findings { keyset: Some(name), issuer: &policy.issuer.name, list: Vec::new() };
    examine_propagation(policy, &mut findings);
    examine_schedule(&policy.rotation, &mut findings);
    examine_successors(&policy.rotation, &mut findings);
    examine_verifiers(policy, &mut findings);
    examine_tokens(policy, &mut findings);
    findings.list
}

/// Everything that the keysets of one issuer can only get wrong together, and the issuer's own table. `keysets` are all
/// of the issuer's.
pub fn examine_issuer(issuer: &Name, keysets: &[(Name, &Policy)]) -> Vec<Finding> {
    let mut findings = Findings { keyset: None, issuer, list: Vec::new() };
    if let Some((_, policy)) = keysets.first() {
        examine_caches(&policy.issuer, &mut findings);
    }
    examine_document_size(keysets, &mut findings);
    for (keyset, policy) in keysets {
        findings.keyset = Some(keyset);
        examine_mixed_algorithms(policy, keysets, &mut findings);
    }
    findings.list
}

struct Findings<'a> {
    keyset: Option<&'a Name>,
    issuer: &'a Name,
    list: Vec<Finding>,
}

impl Findings<'_> {
    fn refuse(&mut self, key: &'static str, message: String) {
        self.add(Severity::Refused, key, message);
    }

    fn warn(&mut self, key: &'static str, message: String) {
        self.add(Severity::Warning, key, message);
    }

    fn add(&mut self, severity: Severity, key: &'static str, message: String) {
        let (keyset, issuer) = (self.keyset.cloned(), Some(self.issuer.clone()));
        self.list.push(Finding { severity, keyset, issuer, key, message });
    }
}

fn examine_propagation(policy: &Policy, findings: &mut Findings) {
    const KEY: &str = "rotation.propagation";
    let (propagation, needed, max_age) =
        (policy.rotation.propagation, policy.visibility_window(), policy.issuer.max_age);
    if propagation < needed {
        let terms = visibility_terms(policy);
        findings.refuse(
            KEY,
            format!("{KEY} = {propagation} is shorter than {terms} = {needed}: raise it to at least {needed}"),
        );
    } else if propagation < max_age {
        let issuer = &policy.issuer.name;
        findings.refuse(
            KEY,
            format!(
                "{KEY} = {propagation} is shorter than issuer.{issuer}.max_age {max_age}, for which anyone may keep a \
                 JWKS: raise it to at least {max_age}, or lower max_age"
            ),
        );
    }
}

/// How a sum says that it counts no verifier.
pub const NO_VERIFIERS: &str = "rotation.verifiers declares none";

/// The sum that propagation must reach, term by term.
fn visibility_terms(policy: &Policy) -> String {
    let (issuer, rotation) = (&policy.issuer, &policy.rotation);
    let mut terms = cache_terms(issuer);
    match slowest(rotation) {
        Some(verifier) => {
            terms.push(format!("slowest verifier {} {} (rotation.verifiers)", verifier.name, verifier.sees_new));
        }
        None => terms.push(format!("slowest verifier 0s ({NO_VERIFIERS})")),
    }
    if !rotation.publish_lag.is_zero() {
        terms.push(format!("store.publish_lag {}", rotation.publish_lag));
    }
    terms.push(format!("tokens.clock_skew {}", rotation.clock_skew));
    terms.join(" + ")
}

fn cache_terms(issuer: &IssuerPolicy) -> Vec<String> {
    let name = &issuer.name;
    let layers = match issuer.caches.as_slice() {
        [] => "0s (none)".to_owned(),
        [only] if *only == issuer.max_age => format!("{only} (max_age unless set)"),
        layers => layers.iter().map(Span::to_string).collect::<Vec<_>>().join(" + "),
    };
    vec![format!("issuer.{name}.caches {layers}"), format!("issuer.{name}.stale_if_error {}", issuer.stale_if_error)]
}

fn slowest(rotation: &RotationPolicy) -> Option<&Verifier> {
    rotation.verifiers.iter().max_by_key(|verifier| verifier.sees_new)
}

fn examine_schedule(rotation: &RotationPolicy, findings: &mut Findings) {
    let key = match rotation.schedule {
        Schedule::Every(_) => "rotation.every",
        Schedule::Cron(_) => "rotation.schedule",
    };
    let (smallest, largest) = (rotation.schedule.smallest_gap(), rotation.schedule.largest_gap());
    if smallest.span <= rotation.propagation {
        let propagation = rotation.propagation;
        let what = describe_gap(&rotation.schedule, smallest);
        findings.refuse(
            key,
            format!(
                "{what}, which is not longer than rotation.propagation {propagation}: a new key could not be seen \
                 before its turn; rotate less often, or lower rotation.propagation below {}",
                smallest.span
            ),
        );
    }
    let what = describe_gap(&rotation.schedule, largest);
    if largest.span > LONGEST_ROTATION {
        findings.refuse(
            key,
            format!(
                "{what}, longer than 3 years ({LONGEST_ROTATION}; NIST SP 800-57 part 1 §5.3.6): rotate more often"
            ),
        );
    } else if largest.span >= LONG_ROTATION {
        findings
            .warn(key, format!("{what}: an unnoticed theft of a key stays useful for that long; rotate more often"));
    }
}

/// `rotation.every = 30d`, or the line with the two occurrences that are so far apart.
fn describe_gap(schedule: &Schedule, gap: Gap) -> String {
    match (schedule, gap.between) {
        (Schedule::Cron(cron), Some((from, to))) => {
            format!("rotation.schedule = {cron} fires at {from} and next at {to}, {} apart", gap.span)
        }
        (Schedule::Cron(cron), None) => format!("rotation.schedule = {cron} fires {} apart", gap.span),
        (Schedule::Every(every), _) => format!("rotation.every = {every}"),
    }
}

fn examine_successors(rotation: &RotationPolicy, findings: &mut Findings) {
    const KEY: &str = "rotation.successors";
    if rotation.successors == 0 {
        findings.refuse(
            KEY,
            format!(
                "{KEY} = 0 leaves no published key to rotate to: at least 1; 2 cover an emergency after a rotation"
            ),
        );
    }
}

fn examine_verifiers(policy: &Policy, findings: &mut Findings) {
    const KEY: &str = "rotation.verifiers";
    let rotation = &policy.rotation;
    if rotation.verifiers.is_empty() && rotation.propagation >= policy.visibility_window() {
        let (propagation, covered) = (rotation.propagation, derive(policy).covered_verifier);
        let rest: Vec<String> = cache_terms(&policy.issuer)
            .into_iter()
            .chain((!rotation.publish_lag.is_zero()).then(|| format!("store.publish_lag {}", rotation.publish_lag)))
            .chain([format!("tokens.clock_skew {}", rotation.clock_skew)])
            .collect();
        findings.warn(
            KEY,
            format!(
                "no verifier is declared: a verifier may cache for at most rotation.propagation {propagation} - {} = \
                 {covered}, a slower one will reject new tokens; declare yours (`jwksd verifiers` lists known ones)",
                rest.join(" - ")
            ),
        );
    }
    let declared: BTreeSet<&str> = rotation.verifiers.iter().map(|verifier| verifier.name.as_str()).collect();
    for preset in declared.into_iter().filter_map(verifiers::preset) {
        let (name, alg) = (preset.name, policy.algorithm);
        if !preset.reads(alg) {
            let known =
                preset.known_algorithms().map_or_else(String::new, |algs| format!(" (it reads {})", algs.join(", ")));
            findings.refuse(
                KEY,
                format!(
                    "{name} cannot read algorithm {alg}{known}: change `algorithm`, or give {name} a keyset of its own"
                ),
            );
        } else if let Some(pins) = preset.pinned_against(alg) {
            let pins = pins.join(", ");
            findings.warn(KEY, format!("{name} trusts {pins} only unless it is configured for algorithm {alg}"));
        }
    }
}

fn examine_tokens(policy: &Policy, findings: &mut Findings) {
    let (max, default) = (policy.tokens.max_ttl, policy.tokens.default_ttl);
    for (key, ttl) in [("tokens.max_ttl", max), ("tokens.default_ttl", default)] {
        if ttl < Span::SECOND || ttl.as_millis() % 1000 != 0 {
            findings.refuse(key, format!("{key} = {ttl} is not a whole number of seconds, at least 1s"));
        }
    }
    if default > max {
        findings.refuse(
            "tokens.default_ttl",
            format!("tokens.default_ttl = {default} is longer than tokens.max_ttl {max}: lower it, or raise max_ttl"),
        );
    }
    if max > LONG_TOKEN {
        findings.warn(
            "tokens.max_ttl",
            format!(
                "tokens.max_ttl = {max} is longer than {LONG_TOKEN}: a stolen token stays valid for as long, short of \
                 revoking its key; and every key stays published {} after it stopped signing",
                policy.overlap()
            ),
        );
    }
}

fn examine_caches(issuer: &IssuerPolicy, findings: &mut Findings) {
    let layers: Span = issuer.caches.iter().copied().sum();
    if layers < issuer.max_age {
        let (name, max_age) = (&issuer.name, issuer.max_age);
        findings.warn(
            "caches",
            format!(
                "issuer.{name}.caches count {layers}, less than issuer.{name}.max_age {max_age} that every cache may \
                 use: count max_age once per layer, or lower it"
            ),
        );
    }
}

fn examine_document_size(keysets: &[(Name, &Policy)], findings: &mut Findings) {
    let derived: Vec<Derived> = keysets.iter().map(|(_, policy)| derive(policy)).collect();
    let keys = derived.iter().fold(0u32, |sum, keyset| sum.saturating_add(keyset.worst_case_keys));
    // `{"keys":[` and `]}`, and a comma per key.
    let frame = 11usize.saturating_add(keys as usize);
    let bytes = derived.iter().fold(frame, |sum, keyset| sum.saturating_add(keyset.worst_case_bytes));
    let arithmetic = || {
        let lines = keysets.iter().zip(&derived).map(|((name, policy), derived)| key_terms(name, policy, derived));
        lines.collect::<Vec<_>>().join("; ")
    };
    const ADVICE: &str = "lower rotation.successors or tokens.max_ttl, rotate less often, or use another issuer";
    if keys > MAX_KEYS {
        findings
            .refuse("", format!("its JWKS can reach {keys} keys, more than {MAX_KEYS}: {}: {ADVICE}", arithmetic()));
    } else if keys >= MANY_KEYS {
        findings.warn(
            "",
            format!(
                "its JWKS can reach {keys} keys, and some verifiers keep only {}: {}: {ADVICE}",
                MANY_KEYS - 1,
                arithmetic()
            ),
        );
    }
    if bytes > MAX_JWKS_BYTES {
        findings.refuse(
            "",
            format!("its JWKS can reach {bytes} bytes, more than {MAX_JWKS_BYTES}: {}: {ADVICE}", arithmetic()),
        );
    }
}

/// How many keys one keyset can publish, term by term.
fn key_terms(name: &Name, policy: &Policy, derived: &Derived) -> String {
    let rotation = &policy.rotation;
    let gap = match rotation.schedule {
        Schedule::Every(_) => "rotation.every",
        Schedule::Cron(_) => "smallest gap of rotation.schedule",
    };
    let staleness = match rotation.staleness_limit {
        Span::ZERO => String::new(),
        limit => format!(" + store.staleness_limit {limit}"),
    };
    let extra = match rotation.overlap_extra {
        Span::ZERO => String::new(),
        extra => format!(" + rotation.overlap_extra {extra}"),
    };
    format!(
        "keyset {name}: 1 + rotation.successors {} + ⌈overlap {} ÷ {gap} {}⌉ = {} (overlap = tokens.max_ttl {} + 2 × \
         tokens.clock_skew {}{staleness}{extra})",
        rotation.successors,
        derived.overlap,
        derived.smallest_gap.span,
        derived.worst_case_keys,
        policy.tokens.max_ttl,
        rotation.clock_skew,
    )
}

fn examine_mixed_algorithms(policy: &Policy, keysets: &[(Name, &Policy)], findings: &mut Findings) {
    let declared: BTreeSet<&str> = policy.rotation.verifiers.iter().map(|verifier| verifier.name.as_str()).collect();
    for preset in declared.into_iter().filter_map(verifiers::preset) {
        for (other, theirs) in keysets {
            // Its own algorithm is examined with the keyset.
            if theirs.algorithm.alg() == policy.algorithm.alg() || !preset.chokes_on(theirs.algorithm) {
                continue;
            }
            let (name, alg, issuer) = (preset.name, theirs.algorithm, findings.issuer);
            findings.refuse(
                "rotation.verifiers",
                format!(
                    "{name} rejects the whole JWKS of issuer {issuer} because of the {alg} keys of keyset {other}: \
                     give {other} an issuer of its own, or another algorithm"
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::algorithm::{Algorithm, EdLabel, RsaBits};
    use crate::keyring::policy::{Bootstrap, Discovery, TokenPolicy};

    const MS: Span = Span::from_millis(1);

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    /// The defaults of the contract.
    fn policy() -> Policy {
        Policy {
            issuer: IssuerPolicy {
                name: name("main"),
                url: "https://auth.example.com".to_owned(),
                max_age: Span::MINUTE.times(5),
                stale_if_error: Span::ZERO,
                caches: vec![Span::MINUTE.times(5)],
                jwks_paths: Vec::new(),
                discovery: Discovery::Minimal,
                probes: Vec::new(),
            },
            algorithm: Algorithm::Es256,
            backend: "local".to_owned(),
            rotation: RotationPolicy {
                schedule: Schedule::Every(Span::DAY.times(30)),
                propagation: Span::DAY,
                successors: 2,
                overlap_extra: Span::ZERO,
                bootstrap: Bootstrap::Wait,
                verifiers: vec![declared("envoy")],
                clock_skew: Span::MINUTE,
                staleness_limit: Span::ZERO,
                publish_lag: Span::ZERO,
            },
            tokens: TokenPolicy {
                max_ttl: Span::MINUTE.times(15),
                default_ttl: Span::MINUTE.times(5),
                required_claims: Vec::new(),
                forbidden_claims: Vec::new(),
                audiences: Vec::new(),
                types: vec!["JWT".to_owned()],
                backdate: Span::ZERO,
            },
        }
    }

    fn with(change: impl FnOnce(&mut Policy)) -> Policy {
        let mut policy = policy();
        change(&mut policy);
        policy
    }

    fn declared(verifier: &str) -> Verifier {
        verifiers::resolve(verifier, Span::MINUTE.times(5)).unwrap()
    }

    fn refusals(policy: &Policy) -> Vec<(&'static str, String)> {
        of(Severity::Refused, examine_keyset(&name("default"), policy))
    }

    fn warnings(policy: &Policy) -> Vec<(&'static str, String)> {
        of(Severity::Warning, examine_keyset(&name("default"), policy))
    }

    fn of(severity: Severity, findings: Vec<Finding>) -> Vec<(&'static str, String)> {
        let chosen = findings.into_iter().filter(|finding| finding.severity == severity);
        chosen.map(|finding| (finding.key, finding.message)).collect()
    }

    fn only(findings: Vec<(&'static str, String)>, key: &str) -> String {
        assert_eq!(findings.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [key], "{findings:?}");
        findings[0].1.clone()
    }

    fn issuer_findings(severity: Severity, keysets: &[(&str, &Policy)]) -> Vec<(&'static str, String)> {
        let keysets: Vec<(Name, &Policy)> = keysets.iter().map(|(keyset, policy)| (name(keyset), *policy)).collect();
        of(severity, examine_issuer(&name("main"), &keysets))
    }

    #[test]
    fn the_defaults_with_a_declared_verifier_raise_nothing() {
        assert_eq!(examine_keyset(&name("default"), &policy()), []);
        assert_eq!(examine_issuer(&name("main"), &[(name("default"), &policy())]), []);
    }

    #[test]
    fn propagation_covers_caches_the_slowest_verifier_and_clock_skew() {
        let at = |propagation| {
            with(|p| {
                p.rotation.propagation = propagation;
                p.rotation.verifiers.push(declared("jose"));
            })
        };
        let needed = Span::MINUTE.times(5 + 10 + 1);
        assert_eq!(refusals(&at(needed)), []);
        let message = only(refusals(&at(needed.saturating_sub(MS))), "rotation.propagation");
        assert_eq!(
            message,
            "rotation.propagation = 15m59s999ms is shorter than issuer.main.caches 5m (max_age unless set) + \
             issuer.main.stale_if_error 0s + slowest verifier envoy 10m (rotation.verifiers) + tokens.clock_skew 1m = \
             16m: raise it to at least 16m"
        );
    }

    #[test]
    fn propagation_covers_every_caching_layer_stale_answers_and_the_lag_of_a_shared_store() {
        let at = |propagation| {
            with(|p| {
                p.rotation.propagation = propagation;
                p.issuer.caches = vec![Span::MINUTE.times(5), Span::MINUTE.times(2)];
                p.issuer.stale_if_error = Span::HOUR;
                p.rotation.publish_lag = Span::from_secs(30);
            })
        };
        let needed = Span::from_secs(7 * 60 + 3600 + 600 + 30 + 60);
        assert_eq!(refusals(&at(needed)), []);
        let message = only(refusals(&at(needed.saturating_sub(MS))), "rotation.propagation");
        for term in ["caches 5m + 2m", "stale_if_error 1h", "store.publish_lag 30s", "= 1h18m30s: raise"] {
            assert!(message.contains(term), "{term} is missing in: {message}");
        }
    }

    #[test]
    fn max_age_is_never_above_propagation() {
        let at = |propagation| {
            with(|p| {
                p.rotation.propagation = propagation;
                p.issuer.max_age = Span::HOUR;
            })
        };
        assert_eq!(refusals(&at(Span::HOUR)), []);
        let message = only(refusals(&at(Span::HOUR.saturating_sub(MS))), "rotation.propagation");
        assert!(message.contains("shorter than issuer.main.max_age 1h"), "{message}");
    }

    #[test]
    fn caches_that_count_less_than_max_age_are_pointed_out() {
        let policy = with(|p| p.issuer.caches = vec![Span::MINUTE]);
        let message = only(issuer_findings(Severity::Warning, &[("default", &policy)]), "caches");
        assert!(message.contains("issuer.main.caches count 1m, less than issuer.main.max_age 5m"), "{message}");
    }

    #[test]
    fn a_period_is_longer_than_propagation() {
        let every = |span| with(|p| p.rotation.schedule = Schedule::Every(span));
        assert_eq!(refusals(&every(Span::DAY + MS)), []);
        let message = only(refusals(&every(Span::DAY)), "rotation.every");
        assert!(
            message.starts_with("rotation.every = 1d, which is not longer than rotation.propagation 1d"),
            "{message}"
        );
    }

    #[test]
    fn crontab_lines_leave_more_than_propagation_between_occurrences_on_the_shortest_day_too() {
        let daily = |propagation| {
            with(|p| {
                p.rotation.schedule = Schedule::cron("0 10 * * *", Some("Europe/Berlin")).unwrap();
                p.rotation.propagation = propagation;
            })
        };
        assert_eq!(refusals(&daily(Span::HOUR.times(23).saturating_sub(MS))), []);
        let message = only(refusals(&daily(Span::HOUR.times(23))), "rotation.schedule");
        assert!(
            message.contains("fires at 2000-03-25T09:00:00Z and next at 2000-03-26T08:00:00Z, 23h apart"),
            "{message}"
        );
        assert!(message.contains("rotation.propagation 23h"), "{message}");
    }

    #[test]
    fn rotations_are_at_most_three_years_apart() {
        let every = |span| with(|p| p.rotation.schedule = Schedule::Every(span));
        assert_eq!(warnings(&every(Span::DAY.times(365).saturating_sub(MS))), []);
        only(warnings(&every(Span::DAY.times(365))), "rotation.every");
        assert_eq!(refusals(&every(Span::DAY.times(1095))), []);
        let message = only(refusals(&every(Span::DAY.times(1095) + MS)), "rotation.every");
        assert!(message.contains("NIST SP 800-57"), "{message}");

        let leap_day = with(|p| p.rotation.schedule = Schedule::cron("0 0 29 2 *", None).unwrap());
        let message = only(refusals(&leap_day), "rotation.schedule");
        assert!(message.contains("2000-02-29T00:00:00Z and next at 2004-02-29T00:00:00Z, 1461d apart"), "{message}");
    }

    #[test]
    fn a_keyset_has_a_successor() {
        assert_eq!(refusals(&with(|p| p.rotation.successors = 1)), []);
        only(refusals(&with(|p| p.rotation.successors = 0)), "rotation.successors");
    }

    #[test]
    fn without_declared_verifiers_the_warning_says_how_slow_a_cache_may_be() {
        let message = only(warnings(&with(|p| p.rotation.verifiers.clear())), "rotation.verifiers");
        assert!(message.contains("rotation.propagation 1d - issuer.main.caches 5m"), "{message}");
        assert!(message.contains("- tokens.clock_skew 1m = 23h54m"), "{message}");
    }

    #[test]
    fn a_declared_verifier_reads_the_keysets_algorithm() {
        let gateway = |algorithm| {
            with(|p| {
                p.rotation.verifiers = vec![declared("aws-api-gateway"), declared("aws-api-gateway")];
                p.algorithm = algorithm;
            })
        };
        assert_eq!(refusals(&gateway(Algorithm::Rs256 { rsa_bits: RsaBits::B2048 })), []);
        let message = only(refusals(&gateway(Algorithm::Es256)), "rotation.verifiers");
        assert!(
            message.starts_with("aws-api-gateway cannot read algorithm ES256 (it reads RS256, PS256)"),
            "{message}"
        );
    }

    #[test]
    fn a_verifier_with_a_declared_cache_is_still_known_by_name() {
        let measured = Verifier { name: "aws-alb".to_owned(), sees_new: Span::HOUR, keeps_old: Some(Span::HOUR) };
        only(refusals(&with(|p| p.rotation.verifiers = vec![measured])), "rotation.verifiers");
    }

    #[test]
    fn a_verifier_that_pins_algorithms_is_pointed_out() {
        let message =
            only(warnings(&with(|p| p.rotation.verifiers = vec![declared("spring-security")])), "rotation.verifiers");
        assert!(message.contains("spring-security trusts RS256 only"), "{message}");
    }

    #[test]
    fn another_keysets_algorithm_must_not_make_a_declared_verifier_reject_the_set() {
        let first = with(|p| p.rotation.verifiers = vec![declared("vault")]);
        let other = |label| with(|p| p.algorithm = Algorithm::EdDsa { label });
        let refused = |label| {
            let mut other = other(label);
            other.rotation.verifiers.clear();
            issuer_findings(Severity::Refused, &[("default", &first), ("edge", &other)])
        };
        assert_eq!(refused(EdLabel::EdDsa), []);
        let message = only(refused(EdLabel::Ed25519), "rotation.verifiers");
        assert!(
            message.contains("vault rejects the whole JWKS of issuer main because of the Ed25519 keys of keyset edge")
        );
    }

    #[test]
    fn token_lives_are_whole_seconds_and_the_default_is_within_the_maximum() {
        let ttl = |max, default| {
            with(|p| {
                p.tokens.max_ttl = max;
                p.tokens.default_ttl = default;
            })
        };
        assert_eq!(refusals(&ttl(Span::SECOND, Span::SECOND)), []);
        assert_eq!(refusals(&ttl(Span::HOUR, Span::HOUR)), []);
        only(refusals(&ttl(Span::SECOND + MS, Span::SECOND)), "tokens.max_ttl");
        only(refusals(&ttl(Span::SECOND, Span::from_millis(999))), "tokens.default_ttl");
        only(refusals(&ttl(Span::SECOND, Span::ZERO)), "tokens.default_ttl");
        let message = only(refusals(&ttl(Span::MINUTE, Span::from_secs(61))), "tokens.default_ttl");
        assert!(message.contains("tokens.default_ttl = 1m1s is longer than tokens.max_ttl 1m"), "{message}");
    }

    #[test]
    fn long_lived_tokens_are_pointed_out() {
        let ttl = |max| with(|p| p.tokens.max_ttl = max);
        assert_eq!(warnings(&ttl(Span::DAY)), []);
        let message = only(warnings(&ttl(Span::DAY + Span::SECOND)), "tokens.max_ttl");
        assert!(message.contains("1d1s is longer than 1d") && message.contains("stays published 1d2m1s"), "{message}");
    }

    #[test]
    fn everything_wrong_is_reported_at_once() {
        let policy = with(|p| {
            p.rotation.propagation = Span::SECOND;
            p.rotation.schedule = Schedule::Every(Span::SECOND);
            p.rotation.successors = 0;
            p.tokens.default_ttl = Span::HOUR;
        });
        let keys: Vec<_> = refusals(&policy).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["rotation.propagation", "rotation.every", "rotation.successors", "tokens.default_ttl"]);
    }

    #[test]
    fn an_issuer_publishes_at_most_ten_keys_and_six_are_pointed_out() {
        let successors = |n| with(|p| p.rotation.successors = n);
        let keys = |n: u32, severity| issuer_findings(severity, &[("default", &successors(n - 2))]);
        assert_eq!(keys(5, Severity::Warning), []);
        only(keys(6, Severity::Warning), "");
        assert_eq!(keys(10, Severity::Refused), []);
        let message = only(keys(11, Severity::Refused), "");
        assert!(
            message.starts_with(
                "its JWKS can reach 11 keys, more than 10: keyset default: 1 + rotation.successors 9 + ⌈overlap 17m ÷ \
                 rotation.every 30d⌉ = 11 (overlap = tokens.max_ttl 15m + 2 × tokens.clock_skew 1m)"
            ),
            "{message}"
        );
        let message =
            only(issuer_findings(Severity::Refused, &[("a", &policy()), ("b", &policy()), ("c", &policy())]), "");
        assert!(message.contains("12 keys") && message.contains("keyset c: 1 + "), "{message}");
    }

    #[test]
    fn retiring_keys_are_counted_by_the_overlap_over_the_smallest_gap() {
        let keys = |every| derive(&with(|p| p.rotation.schedule = Schedule::Every(every))).worst_case_keys;
        assert_eq!(keys(Span::MINUTE.times(17)), 1 + 2 + 1);
        assert_eq!(keys(Span::MINUTE.times(17).saturating_sub(MS)), 1 + 2 + 2);
        assert_eq!(keys(Span::MINUTE), 1 + 2 + 17);
        let daily = with(|p| {
            p.rotation.schedule = Schedule::cron("0 10 * * *", Some("Europe/Berlin")).unwrap();
            p.rotation.overlap_extra = Span::HOUR.times(24).saturating_sub(Span::MINUTE.times(17));
        });
        assert_eq!(derive(&daily).worst_case_keys, 1 + 2 + 2, "24 h of overlap exceed the 23 h of one night in March");
    }

    #[test]
    fn absurd_policies_are_refused_without_overflow() {
        let policy = with(|p| {
            p.rotation.successors = u32::MAX;
            p.rotation.schedule = Schedule::Every(MS);
            p.tokens.max_ttl = Span::MAX;
            p.rotation.clock_skew = Span::MAX;
        });
        assert_eq!(derive(&policy).worst_case_keys, u32::MAX);
        assert_eq!(issuer_findings(Severity::Refused, &[("a", &policy), ("b", &policy)]).len(), 2, "keys and bytes");
        assert!(!refusals(&policy).is_empty());
    }

    #[test]
    fn derived_timing_is_that_of_the_contract() {
        let derived = derive(&with(|p| {
            p.rotation.staleness_limit = Span::HOUR;
            p.rotation.publish_lag = Span::MINUTE;
        }));
        assert_eq!(derived.overlap, Span::MINUTE.times(15 + 2 + 60));
        assert_eq!(derived.visibility_window, Span::MINUTE.times(5 + 10 + 1 + 1));
        assert_eq!(derived.covered_verifier, Span::DAY.saturating_sub(Span::MINUTE.times(7)));
        assert_eq!((derived.worst_case_keys, derived.worst_case_bytes), (4, 1200));
    }

    #[test]
    fn a_finding_knows_its_place_in_the_configuration() {
        let findings = examine_keyset(&name("default"), &with(|p| p.rotation.successors = 0));
        assert_eq!(findings[0].path(), "keyset.default.rotation.successors");
        let policy = with(|p| p.rotation.successors = 20);
        assert_eq!(examine_issuer(&name("main"), &[(name("default"), &policy)])[0].path(), "issuer.main");
    }
}
