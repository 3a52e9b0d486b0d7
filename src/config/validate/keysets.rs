//! Keysets: from what is given for one, its defaults and its issuer to the policy it is to follow.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::config::problem::{Report, nearest, suggest};
use crate::config::raw;
use crate::config::{Keyset, ProcessRole};
use crate::keyring::algorithm::{Algorithm, EdLabel, RsaBits};
use crate::keyring::name::Name;
use crate::keyring::policy::{Bootstrap, IssuerPolicy, Policy, RotationPolicy, TokenPolicy, Verifier};
use crate::keyring::schedule::Schedule;
use crate::keyring::time::Span;
use crate::keyring::timing::{self, Finding, NO_VERIFIERS, Severity};
use crate::keyring::verifiers;

use super::{at_most, choose, quoted};

const DEFAULT_EVERY: Span = Span::from_secs(30 * 86_400);
const DEFAULT_PROPAGATION: Span = Span::DAY;
const DEFAULT_SUCCESSORS: u32 = 2;
const DEFAULT_MAX_TTL: Span = Span::from_secs(15 * 60);
/// `default_ttl` where `max_ttl` is not shorter.
const DEFAULT_TTL: Span = Span::from_secs(5 * 60);
const DEFAULT_CLOCK_SKEW: Span = Span::from_secs(60);
const DEFAULT_REQUIRED: [&str; 2] = ["aud", "sub"];
const DEFAULT_FORBIDDEN: [&str; 4] = ["password", "password_hash", "ssn", "secret"];
const DEFAULT_TYPES: [&str; 2] = ["JWT", "at+jwt"];
/// What every setting of a keyset may take together, as JSON: its keyring keeps them.
const POLICY_BYTES: usize = 64 * 1024;

/// Further back, tokens would be older than many verifiers accept.
const LONGEST_BACKDATE: Span = Span::HOUR;

/// The claims that the daemon itself sets.
const OWN_CLAIMS: [&str; 5] = ["exp", "iat", "nbf", "iss", "jti"];

/// What a keyset may name as its backend.
const BACKENDS: [&str; 2] = ["local", "aws-kms"];

/// Backends that other releases have.
const LATER_BACKENDS: [&str; 4] = ["openbao", "pkcs11", "gcp-kms", "azure-key-vault"];

/// What a store that replicas share adds to every policy; zero for one that they do not.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sharing {
    pub(super) staleness_limit: Span,
    pub(super) publish_lag: Span,
}

pub(super) fn validate(
    raw: Option<raw::Named<raw::Keyset>>,
    defaults: raw::Defaults,
    issuers: &[IssuerPolicy],
    sharing: Sharing,
    role: Option<ProcessRole>,
    report: &mut Report,
) -> Vec<Keyset> {
    let raw = raw.unwrap_or_default().entries;
    let by_stored_policy = role == Some(ProcessRole::Signer);
    if raw.is_empty() && !by_stored_policy && !report.is_broken("keyset") {
        report.refuse(
            "keyset",
            "no keyset is configured, so there is nothing to sign with: add [keyset.NAME] with `algorithm`",
        );
    }
    let mut resolver = Resolver::new(defaults, issuers, sharing, report);
    let keysets: Vec<_> = raw.into_iter().filter_map(|(name, raw)| resolver.keyset(name, raw)).collect();
    let used: HashSet<&Name> = keysets.iter().map(|keyset| &keyset.policy.issuer.name).collect();
    let idle = issuers.iter().filter(|issuer| !by_stored_policy && !used.contains(&issuer.name));
    for policy in idle {
        report.warn(
            format_args!("issuer.{}", policy.name),
            "has no keyset: its key set has no keys and is answered with 503",
        );
    }
    keysets
}

/// The timing rules over every keyset and issuer, less what is wrong only because a value could not be read.
pub(super) fn timing(keysets: &[Keyset], issuers: &[IssuerPolicy], report: &Report) -> Vec<Finding> {
    let mut findings = Vec::new();
    for Keyset { name, policy } in keysets {
        findings.extend(timing::examine_keyset(name, policy));
    }
    let mut by_issuer: HashMap<&Name, Vec<(Name, &Policy)>> = HashMap::new();
    for Keyset { name, policy } in keysets {
        by_issuer.entry(&policy.issuer.name).or_default().push((name.clone(), policy.as_ref()));
    }
    for policy in issuers {
        if let Some(keysets) = by_issuer.get(&policy.name) {
            findings.extend(timing::examine_issuer(&policy.name, keysets));
        }
    }
    findings.retain(|finding| !report.broken_paths().any(|key| rests_on(finding, key)));
    findings
}

/// Small terms of sums. One that could not be read counts with its default: the sum is still worth reporting.
const TERMS: [&str; 6] = ["max_age", "caches", "stale_if_error", "clock_skew", "overlap_extra", "publish_lag"];

/// Whether a value that could not be read, at `path`, decides about the finding, whose message names all that it counts.
fn rests_on(finding: &Finding, path: &str) -> bool {
    let mut segments = path.split('.');
    let concerns = match (segments.next(), segments.next()) {
        (Some("keyset"), Some(name)) => finding.keyset.as_ref().is_none_or(|keyset| keyset.as_str() == name),
        (Some("issuer"), Some(name)) => finding.issuer.as_ref().is_none_or(|issuer| issuer.as_str() == name),
        (Some("defaults" | "store"), _) => true,
        _ => false,
    };
    let leaf = path.rsplit('.').next().unwrap_or(path).split('[').next().unwrap_or(path);
    if path.split('.').any(|segment| segment == "verifiers" || segment.starts_with("verifiers[")) {
        // What the readable ones demand stands, whatever the others may be; that there are none does not.
        let none = finding.message.contains(NO_VERIFIERS);
        let advice = finding.severity == Severity::Warning && finding.key.ends_with(".verifiers");
        return concerns && (none || advice);
    }
    concerns
        && !TERMS.contains(&leaf)
        && (finding.key.rsplit('.').next() == Some(leaf) || finding.message.contains(leaf))
}

/// What all keysets have in common while they are resolved.
struct Resolver<'a> {
    defaults: raw::Defaults,
    issuers: HashMap<&'a str, &'a IssuerPolicy>,
    /// For messages, in order.
    issuer_names: Vec<&'a str>,
    /// Equal crontab lines are parsed, and their occurrences counted, once.
    lines: HashMap<(String, Option<String>), Schedule>,
    sharing: Sharing,
    report: &'a mut Report,
}

impl<'a> Resolver<'a> {
    fn new(mut defaults: raw::Defaults, issuers: &'a [IssuerPolicy], sharing: Sharing, report: &'a mut Report) -> Self {
        // Judged here once, and not again in every keyset.
        let rotation = defaults.rotation.get_or_insert_default();
        if both_schedules("defaults.rotation", rotation, report) {
            rotation.every = None;
        }
        let mut issuer_names: Vec<_> = issuers.iter().map(|issuer| issuer.name.as_str()).collect();
        issuer_names.sort_unstable();
        let issuers = issuers.iter().map(|issuer| (issuer.name.as_str(), issuer)).collect();
        defaults.tokens.get_or_insert_default();
        Resolver { defaults, issuers, issuer_names, lines: HashMap::new(), sharing, report }
    }

    fn keyset(&mut self, name: Name, raw: raw::Keyset) -> Option<Keyset> {
        let path = format!("keyset.{name}");
        let issuer = self.issuer(&path, raw.issuer);
        let algorithm = self.algorithm(&path, raw.algorithm, raw.rsa_bits, raw.eddsa_label);
        let backend = self.backend(&path, raw.backend);
        let max_age = issuer.as_ref().map_or(Span::ZERO, |issuer| issuer.max_age);
        let clock_skew = raw.tokens.as_ref().and_then(|tokens| tokens.clock_skew);
        let rotation = self.rotation(&path, raw.rotation.unwrap_or_default(), max_age, clock_skew);
        let tokens = self.tokens(&path, raw.tokens.unwrap_or_default());
        // An algorithm that was refused stands for none here: its keyset's timing is examined all the same.
        let algorithm = algorithm.unwrap_or(Algorithm::Es256);
        let policy = Policy { issuer: issuer?.clone(), algorithm, backend, rotation, tokens };
        let bytes = serde_json::to_vec(&policy).map_or(0, |text| text.len());
        if bytes > POLICY_BYTES {
            self.report.refuse_once(
                &path,
                format_args!("its settings take {bytes} bytes, and its keyring keeps at most {POLICY_BYTES}: name fewer verifiers, audiences, claims or types"),
            );
        }
        Some(Keyset { name, policy: Arc::new(policy) })
    }

    fn issuer(&mut self, path: &str, given: Option<String>) -> Option<&'a IssuerPolicy> {
        let path = format!("{path}.issuer");
        let known = &self.issuer_names;
        match given {
            Some(name) => {
                let found = self.issuers.get(name.as_str()).copied();
                if found.is_none() && !self.report.is_broken("issuer") {
                    let hint = suggest(&name, known);
                    self.report.refuse(path, format_args!("there is no issuer {}; {hint}", quoted(&name)));
                }
                found
            }
            None if self.report.is_broken(&path) => None,
            None if known.len() == 1 => self.issuers.values().next().copied(),
            None if known.is_empty() => None,
            None => {
                let listed = known.iter().take(40).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                self.report.refuse(path, format_args!("missing: there are several issuers, name one of {listed}"));
                None
            }
        }
    }

    fn algorithm(
        &mut self,
        path: &str,
        given: Option<String>,
        rsa_bits: Option<u32>,
        eddsa_label: Option<String>,
    ) -> Option<Algorithm> {
        let bits_path = format!("{path}.rsa_bits");
        let label_path = format!("{path}.eddsa_label");
        let bits = match rsa_bits.map(RsaBits::try_from).transpose() {
            Ok(bits) => bits,
            Err(message) => {
                self.report.refuse(&bits_path, message);
                None
            }
        };
        let labels = [("EdDSA", EdLabel::EdDsa), ("Ed25519", EdLabel::Ed25519)];
        let label_given = eddsa_label.is_some();
        let label = choose(&label_path, eddsa_label, &labels, self.report);

        let path = format!("{path}.algorithm");
        let given = self.report.require(&path, given, "use \"ES256\" unless your verifiers need another")?;
        let algorithm = match given.as_str() {
            "ES256" => Algorithm::Es256,
            "ES384" => Algorithm::Es384,
            "RS256" => Algorithm::Rs256 { rsa_bits: bits.unwrap_or_default() },
            "PS256" => Algorithm::Ps256 { rsa_bits: bits.unwrap_or_default() },
            "EdDSA" => Algorithm::EdDsa { label: label.unwrap_or_default() },
            other => {
                self.report.refuse(path, no_such_algorithm(other));
                return None;
            }
        };
        if rsa_bits.is_some() && !matches!(algorithm, Algorithm::Rs256 { .. } | Algorithm::Ps256 { .. }) {
            self.report.refuse(bits_path, format_args!("is for RS256 and PS256, not for {given}: leave it out"));
        }
        if label_given && !matches!(algorithm, Algorithm::EdDsa { .. }) {
            self.report.refuse(label_path, format_args!("is for EdDSA, not for {given}: leave it out"));
        }
        Some(algorithm)
    }

    fn backend(&mut self, path: &str, given: Option<String>) -> String {
        let backend = given.unwrap_or_else(|| "local".to_owned());
        let path = format!("{path}.backend");
        if LATER_BACKENDS.contains(&backend.as_str()) {
            self.report.refuse(
                path,
                format_args!("{backend:?} is not in this release, which has only \"local\" and \"aws-kms\""),
            );
        } else if !BACKENDS.contains(&backend.as_str()) {
            let hint = suggest(&backend, &BACKENDS);
            self.report.refuse(path, format_args!("{} is not one of its values; {hint}", quoted(&backend)));
        }
        backend
    }

    fn rotation(
        &mut self,
        keyset: &str,
        own: raw::Rotation,
        max_age: Span,
        clock_skew: Option<Span>,
    ) -> RotationPolicy {
        let path = format!("{keyset}.rotation");
        let shared_skew = self.defaults.tokens.as_ref().and_then(|tokens| tokens.clock_skew);
        let schedule = self.schedule(&path, &own);
        let shared = self.defaults.rotation.as_ref();
        let successors = own.successors.or(shared.and_then(|r| r.successors)).unwrap_or(DEFAULT_SUCCESSORS);
        let propagation = own.propagation.or(shared.and_then(|r| r.propagation)).unwrap_or(DEFAULT_PROPAGATION);
        let overlap_extra = own.overlap_extra.or(shared.and_then(|r| r.overlap_extra)).unwrap_or(Span::ZERO);
        let (bootstrap_at, bootstrap) =
            own_or_shared(&path, "bootstrap", own.bootstrap, shared.and_then(|r| r.bootstrap.clone()));
        let verifiers_path = at(&path, "verifiers", own.verifiers.is_some());
        let verifiers = own.verifiers.as_ref().or(shared.and_then(|r| r.verifiers.as_ref()));
        let verifiers = resolve_verifiers(&verifiers_path, verifiers.map_or(&[], Vec::as_slice), max_age, self.report);
        let bootstraps = [("wait", Bootstrap::Wait), ("immediate", Bootstrap::Immediate)];
        RotationPolicy {
            schedule,
            propagation,
            successors,
            overlap_extra,
            bootstrap: choose(&bootstrap_at, bootstrap, &bootstraps, self.report).unwrap_or_default(),
            verifiers,
            clock_skew: clock_skew.or(shared_skew).unwrap_or(DEFAULT_CLOCK_SKEW),
            staleness_limit: self.sharing.staleness_limit,
            publish_lag: self.sharing.publish_lag,
        }
    }

    /// `every` or `schedule` of the keyset, else of the defaults, else the built-in period.
    fn schedule(&mut self, path: &str, own: &raw::Rotation) -> Schedule {
        let fallback = Schedule::Every(DEFAULT_EVERY);
        if both_schedules(path, own, self.report) {
            return fallback;
        }
        let shared = self.defaults.rotation.as_ref();
        let is_own = own.every.is_some() || own.schedule.is_some();
        let given = if is_own { Some(own) } else { shared };
        let place = |key: &str| at(path, key, is_own);
        let every = given.and_then(|r| r.every);
        let line = given.and_then(|r| r.schedule.clone());
        let zone = own.timezone.clone().or_else(|| shared.and_then(|r| r.timezone.clone()));
        match (line, every) {
            (Some(line), _) => self.cron(&place("schedule"), line, zone).unwrap_or(fallback),
            (None, every) => {
                if own.timezone.is_some() {
                    let message =
                        "goes with `schedule`; `every` counts from when a key became active, in any time zone";
                    self.report.refuse(format_args!("{path}.timezone"), message);
                }
                match Schedule::every(every.unwrap_or(DEFAULT_EVERY)) {
                    Ok(schedule) => schedule,
                    Err(error) => {
                        self.report.refuse_once(place("every"), error);
                        fallback
                    }
                }
            }
        }
    }

    fn cron(&mut self, path: &str, line: String, zone: Option<String>) -> Option<Schedule> {
        let key = (line, zone);
        if let Some(schedule) = self.lines.get(&key) {
            return Some(schedule.clone());
        }
        match Schedule::cron(&key.0, key.1.as_deref()) {
            Ok(schedule) => {
                self.lines.insert(key, schedule.clone());
                Some(schedule)
            }
            Err(error) => {
                self.report.refuse_once(path, error);
                None
            }
        }
    }

    fn tokens(&mut self, keyset: &str, own: raw::Tokens) -> TokenPolicy {
        let path = format!("{keyset}.tokens");
        let shared = self.defaults.tokens.as_ref();
        let max_ttl = own.max_ttl.or(shared.and_then(|t| t.max_ttl)).unwrap_or(DEFAULT_MAX_TTL);
        let default_ttl = own.default_ttl.or(shared.and_then(|t| t.default_ttl));
        let (backdate_at, backdate) = own_or_shared(&path, "backdate", own.backdate, shared.and_then(|t| t.backdate));
        let list = |key: &str, own: Option<Vec<String>>, shared: Option<&Vec<String>>, default: &[&str]| {
            let place = at(&path, key, own.is_some());
            let list = own.or_else(|| shared.cloned());
            (place, list.unwrap_or_else(|| default.iter().map(|text| (*text).to_owned()).collect()))
        };
        let required = list(
            "required_claims",
            own.required_claims,
            shared.and_then(|t| t.required_claims.as_ref()),
            &DEFAULT_REQUIRED,
        );
        let forbidden = list(
            "forbidden_claims",
            own.forbidden_claims,
            shared.and_then(|t| t.forbidden_claims.as_ref()),
            &DEFAULT_FORBIDDEN,
        );
        let audiences_given = own.audiences.is_some() || shared.is_some_and(|t| t.audiences.is_some());
        let audiences = list("audiences", own.audiences, shared.and_then(|t| t.audiences.as_ref()), &[]);
        let types = list("types", own.types, shared.and_then(|t| t.types.as_ref()), &DEFAULT_TYPES);
        let report = &mut *self.report;
        check_types(&types.0, &types.1, report);
        if audiences_given && audiences.1.is_empty() {
            report.refuse_once(&audiences.0, "an empty list allows no audience: leave it out to allow any");
        }
        refuse_duplicates(&audiences.0, &audiences.1, report);
        TokenPolicy {
            max_ttl,
            default_ttl: default_ttl.unwrap_or(DEFAULT_TTL.min(max_ttl)),
            forbidden_claims: forbidden_claims(forbidden, &required.1, &audiences, report),
            required_claims: required_claims(required, report),
            audiences: audiences.1,
            types: types.1,
            backdate: at_most(&backdate_at, backdate, LONGEST_BACKDATE, report).unwrap_or(Span::ZERO),
        }
    }
}

/// Whether both are given, which is refused.
fn both_schedules(path: &str, rotation: &raw::Rotation, report: &mut Report) -> bool {
    let both = rotation.every.is_some() && rotation.schedule.is_some();
    if both {
        report.refuse(format_args!("{path}.schedule"), "stands together with `every`: choose one of them");
    }
    both
}

/// Where a value came from: the keyset's own table (`keyset.NAME.rotation`), or that of the defaults.
fn at(own_table: &str, key: &str, own: bool) -> String {
    let table = own_table.rsplit('.').next().unwrap_or(own_table);
    if own { format!("{own_table}.{key}") } else { format!("defaults.{table}.{key}") }
}

fn own_or_shared<T>(table: &str, key: &str, own: Option<T>, shared: Option<T>) -> (String, Option<T>) {
    (at(table, key, own.is_some() || shared.is_none()), own.or(shared))
}

fn no_such_algorithm(given: &str) -> String {
    let known = ["ES256", "ES384", "RS256", "PS256", "EdDSA"];
    match given {
        "Ed25519" => "is called \"EdDSA\" here; with eddsa_label = \"Ed25519\" its keys say Ed25519".to_owned(),
        "none" => "\"none\" is no signature: anyone could forge tokens; use \"ES256\"".to_owned(),
        "HS256" | "HS384" | "HS512" => {
            format!("{given:?} is symmetric: whoever can verify could sign; use \"ES256\"")
        }
        _ => format!("{} is not an algorithm of this daemon; {}", quoted(given), suggest(given, &known)),
    }
}

fn resolve_verifiers(path: &str, given: &[raw::Verifier], max_age: Span, report: &mut Report) -> Vec<Verifier> {
    let mut resolved = Vec::with_capacity(given.len());
    for (index, verifier) in given.iter().enumerate() {
        match verifier {
            raw::Verifier::Unreadable => {}
            raw::Verifier::Cache { name, cache } => {
                let name = name.as_str().to_owned();
                resolved.push(Verifier { name, sees_new: *cache, keeps_old: Some(*cache) });
            }
            raw::Verifier::Text(text) if text.starts_with(|c: char| c.is_ascii_digit()) => match Span::parse(text) {
                Ok(cache) => resolved.push(Verifier { name: text.clone(), sees_new: cache, keeps_old: Some(cache) }),
                Err(error) => report.refuse_once(format_args!("{path}[{index}]"), error),
            },
            raw::Verifier::Text(text) => match verifiers::resolve(text, max_age) {
                Ok(verifier) => resolved.push(verifier),
                Err(error) => {
                    let near = nearest(text, verifiers::presets().iter().map(|preset| preset.name));
                    let hint =
                        near.filter(|name| name != text).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
                    report.refuse_once(format_args!("{path}[{index}]"), format_args!("{error}{hint}"));
                }
            },
        }
    }
    resolved
}

type Placed = (String, Vec<String>);

fn required_claims((path, claims): Placed, report: &mut Report) -> Vec<String> {
    refuse_duplicates(&path, &claims, report);
    for claim in claims.iter().filter(|claim| OWN_CLAIMS.contains(&claim.as_str())) {
        report.warn_once(&path, format_args!("{claim:?} need not be required: the daemon sets it in every token"));
    }
    claims.into_iter().filter(|claim| !OWN_CLAIMS.contains(&claim.as_str())).collect()
}

fn forbidden_claims(
    (path, claims): Placed,
    required: &[String],
    audiences: &Placed,
    report: &mut Report,
) -> Vec<String> {
    refuse_duplicates(&path, &claims, report);
    for (index, claim) in claims.iter().enumerate() {
        let place = format!("{path}[{index}]");
        // Forbidden claims match in any case.
        let is = |other: &str| claim.eq_ignore_ascii_case(other);
        if OWN_CLAIMS.into_iter().any(is) {
            report.refuse_once(
                place,
                format_args!("{} cannot be forbidden: the daemon sets it in every token", quoted(claim)),
            );
        } else if required.iter().any(|other| is(other)) {
            report.refuse_once(
                place,
                format_args!("{} is in required_claims too: no token could be signed", quoted(claim)),
            );
        } else if is("aud") && !audiences.1.is_empty() {
            report.refuse_once(
                place,
                format_args!("{} cannot be forbidden while `audiences` restricts it", quoted(claim)),
            );
        }
    }
    claims
}

/// `typ` headers: media types, `application/` left out (RFC 7515 §4.1.9, RFC 6838 §4.2).
fn check_types(path: &str, types: &[String], report: &mut Report) {
    if types.is_empty() {
        report.refuse_once(path, "an empty list allows no token: leave it out for \"JWT\" and \"at+jwt\"");
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || "!#$&-^_.+".contains(c);
    let name = |part: &str| {
        part.len() <= 127 && part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(legal)
    };
    for (index, typ) in types.iter().enumerate() {
        if typ.matches('/').count() > 1 || !typ.split('/').all(name) {
            let message = format!("{} is not a media type such as \"JWT\" or \"at+jwt\"", quoted(typ));
            report.refuse_once(format_args!("{path}[{index}]"), message);
        }
    }
    refuse_duplicates(path, types, report);
}

fn refuse_duplicates(path: &str, entries: &[String], report: &mut Report) {
    let mut seen = HashSet::new();
    for (index, entry) in entries.iter().enumerate() {
        if !seen.insert(entry) {
            report.refuse_once(
                format_args!("{path}[{index}]"),
                format_args!("{} stands twice in the list", quoted(entry)),
            );
        }
    }
}
