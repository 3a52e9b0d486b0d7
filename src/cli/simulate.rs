//! `simulate`: plays a configuration, with what the user says is true, and tells what would have gone wrong.

use std::io::IsTerminal;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::config::{chosen, foreseeable};
use super::keysets::print_json;
use super::print::plain;
use super::timeline::duration;
use super::{Failure, Global, Outcome, Output};
use crate::config::{Config, Keyset, StoreKind};
use crate::keyring::policy::Policy;
use crate::keyring::time::{Span, Timestamp};
use crate::keyring::verifiers;
use crate::simulation::rules::Ours;
use crate::simulation::{Advice, Caching, Faults, Incident, Margin, Reality, Report, Scenario, advise, play};

/// When every simulation begins, so that a seed says everything: 2027-01-15T08:00:00Z.
const BEGINS: Timestamp = Timestamp::from_secs(1_800_000_000);

/// How many rotations one keyset is played for at most.
const ROTATIONS_MAX: i64 = 5_000;

/// Tokens that are watched of each key at each replica, each time that it begins or stops to sign.
const TOKENS: usize = 12;

/// Lines of the story that are told.
const TOLD: usize = 12;

#[derive(Args)]
pub(super) struct SimulateArgs {
    /// Only this keyset [default: all]
    keyset: Option<String>,
    /// How long to play
    #[arg(long = "for", value_name = "DURATION", default_value = "1y")]
    span: String,
    /// How many there are of each kind of verifier, each with a clock of its own
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    verifiers: u8,
    /// How many share the store [default: 1 with a file store, otherwise 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    replicas: Option<u8>,
    /// What goes wrong
    #[arg(long, value_enum, value_delimiter = ',', value_name = "FAULTS", default_value = "all")]
    faults: Vec<Fault>,
    /// Repeats a run [default: another one each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// A verifier that the configuration does not declare: a name that `jwksd verifiers` lists, or how long it caches
    #[arg(long, value_name = "NAME|DURATION")]
    verifier: Vec<String>,
    /// A caching layer in front that the configuration does not declare
    #[arg(long, value_name = "DURATION")]
    cache: Vec<String>,
    /// The true largest difference between any two clocks [default: as declared]
    #[arg(long, value_name = "DURATION")]
    skew: Option<String>,
    /// How late replicas truly show what another one wrote, in a shared store [default: as declared]
    #[arg(long, value_name = "DURATION")]
    lag: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fault {
    /// Replicas crash and come back
    Crashes,
    /// Replicas lose the store, or it is away
    Outages,
    /// Keys cannot be made or destroyed
    Backend,
    /// Operators rotate, roll back, hold, resume and revoke
    Operators,
    All,
    None,
}

/// One keyset that was played.
struct Played<'a> {
    keyset: &'a Keyset,
    lasted: Span,
    report: Report,
    advice: Vec<Advice>,
}

pub(super) fn simulate(global: &Global, args: &SimulateArgs) -> Outcome {
    let config = foreseeable(global)?;
    let asked = length(&args.span)?;
    let faults = faults(&args.faults)?;
    let keysets = chosen(&config, args.keyset.as_deref())?;
    let seed = args.seed.unwrap_or_else(|| u64::from(u32::from_be_bytes(crate::random::bytes())));
    let mut all = Vec::new();
    for keyset in keysets {
        let reality = reality(args, &config, &keyset.policy, faults)?;
        let gap = keyset.policy.rotation.schedule.smallest_gap().span.as_millis();
        let lasts = asked.min(Span::from_millis(gap.saturating_mul(ROTATIONS_MAX)));
        let scenario = Scenario {
            keyset: keyset.name.clone(),
            policies: vec![(*keyset.policy).clone()],
            reality,
            begins: BEGINS,
            lasts,
            seed,
        };
        let mut bar = Bar::new(keyset.name.as_str());
        let report = play(&scenario, &Ours, |done| bar.show(done));
        bar.clear();
        let advice = report.incident.iter();
        let advice = advice.flat_map(|it| advise(&keyset.name, &keyset.policy, &scenario.reality, it)).collect();
        all.push(Played { keyset, lasted: lasts, report, advice });
    }
    if global.output == Output::Json {
        let keysets: Vec<Value> = all.iter().map(|played| document(played, asked)).collect();
        print_json(&json!({ "seed": seed, "begins_at": BEGINS.to_rfc3339(), "keysets": keysets }));
    } else {
        all.iter().for_each(|played| print(played, asked));
        println!("seed {seed}");
    }
    let rejected: u64 = all.iter().map(|played| played.report.rejected).sum();
    match rejected {
        0 => Ok(()),
        1 => Err(Failure::Failed("1 live token was rejected".to_owned())),
        many => Err(Failure::Failed(format!("{many} live tokens were rejected"))),
    }
}

fn faults(listed: &[Fault]) -> Result<Faults, Failure> {
    match listed {
        [Fault::All] => return Ok(Faults::ALL),
        [Fault::None] => return Ok(Faults::NONE),
        _ => {}
    }
    if listed.contains(&Fault::All) || listed.contains(&Fault::None) {
        return Err(Failure::Usage("--faults: `all` and `none` stand alone".to_owned()));
    }
    let has = |fault| listed.contains(&fault);
    Ok(Faults {
        crashes: has(Fault::Crashes),
        outages: has(Fault::Outages),
        backend: has(Fault::Backend),
        operators: has(Fault::Operators),
    })
}

/// What is declared, and what the command line says beyond that.
fn reality(args: &SimulateArgs, config: &Config, policy: &Policy, faults: Faults) -> Result<Reality, Failure> {
    let shared = !matches!(config.store.kind, StoreKind::File { .. }) || config.replication.is_some();
    let replicas = usize::from(args.replicas.unwrap_or(if shared { 3 } else { 1 }));
    if !shared && (replicas > 1 || args.lag.is_some()) {
        let message = "--replicas and --lag: a file store serves one process; configure a shared store to play several";
        return Err(Failure::Usage(message.to_owned()));
    }
    let mut kinds: Vec<Caching> = Vec::new();
    for verifier in &policy.rotation.verifiers {
        kinds.push(Caching { name: verifier.name.clone(), sees_new: verifier.sees_new });
    }
    for text in &args.verifier {
        kinds.push(verifier(text, policy)?);
    }
    kinds.push(Caching { name: "no-cache".to_owned(), sees_new: Span::ZERO });
    let each = usize::from(args.verifiers);
    let verifiers = kinds.into_iter().flat_map(|kind| std::iter::repeat_n(kind, each)).collect();
    let layers = args.cache.iter().map(|text| any_duration("--cache", text)).collect::<Result<Vec<Span>, Failure>>()?;
    let declared =
        |option, text: &Option<String>, span| text.as_ref().map_or(Ok(span), |text| any_duration(option, text));
    Ok(Reality {
        replicas,
        skew: declared("--skew", &args.skew, policy.rotation.clock_skew)?,
        lag: declared("--lag", &args.lag, policy.rotation.publish_lag)?,
        layers: policy.issuer.cache_span() + layers.into_iter().sum(),
        verifiers,
        tokens: TOKENS,
        faults,
    })
}

fn verifier(text: &str, policy: &Policy) -> Result<Caching, Failure> {
    if let Ok(sees_new) = Span::parse(text) {
        return Ok(Caching { name: format!("caches-{text}"), sees_new });
    }
    let known = verifiers::resolve(text, policy.issuer.max_age);
    let known = known.map_err(|error| Failure::Usage(format!("--verifier: {error}")))?;
    Ok(Caching { name: known.name, sees_new: known.sees_new })
}

/// Years are of 365 days here: how long they are exactly does not matter.
fn length(text: &str) -> Result<Span, Failure> {
    let years = text.strip_suffix('y').and_then(|years| years.parse::<u32>().ok());
    match years {
        Some(years @ 1..=10) => Ok(Span::DAY.times(365 * years)),
        _ => duration("--for", text),
    }
}

/// Nothing is a duration too, unlike for spans to look at.
fn any_duration(option: &str, text: &str) -> Result<Span, Failure> {
    match Span::parse(text) {
        Ok(span) if span.is_zero() => Ok(span),
        _ => duration(option, text),
    }
}

fn document(played: &Played<'_>, asked: Span) -> Value {
    let report = &played.report;
    let margin = |margin: &Option<Margin>| {
        margin.as_ref().map(|it| {
            json!({ "milliseconds": it.millis, "at": it.at.to_rfc3339(), "verifier": it.verifier, "serial": it.key })
        })
    };
    let incident = report.incident.as_ref().map(|it| {
        let time = |at: Option<Timestamp>| at.map(Timestamp::to_rfc3339);
        json!({
            "at": it.at.to_rfc3339(), "verifier": it.verifier, "serial": it.key, "signed_at": it.signed_at.to_rfc3339(),
            "cause": if it.is_early() { "not-known-yet" } else { "not-known-any-more" },
            "missed_by_milliseconds": it.missed_by().as_millis(), "document_of": time(it.document_of),
            "served_from": time(it.served_from), "served_until": time(it.served_until), "story": report.story,
        })
    });
    let advice: Vec<Value> =
        played.advice.iter().map(|it| json!({ "setting": it.setting, "value": it.value, "why": it.why })).collect();
    json!({
        "name": played.keyset.name, "simulated_seconds": played.lasted.as_secs(), "cut": played.lasted < asked,
        "rotations": report.rotations, "keys": report.keys, "revocations": report.revocations, "crashes": report.crashes,
        "tokens_presented": report.presented, "tokens_rejected": report.rejected,
        "margins": { "new_key": margin(&report.early), "former_key": margin(&report.late) },
        "worst": incident, "advice": advice,
    })
}

fn print(played: &Played<'_>, asked: Span) {
    let (report, rotation) = (&played.report, &played.keyset.policy.rotation);
    println!(
        "{}  {}, each key published {} before it signs",
        played.keyset.name, rotation.schedule, rotation.propagation
    );
    let cut = if played.lasted < asked {
        format!(" (not {asked}: {ROTATIONS_MAX} rotations are played at most)")
    } else {
        String::new()
    };
    println!("  simulated    {}{cut}", played.lasted);
    println!(
        "  happened     {} rotations, {} keys made, {} revoked, {} crashes",
        report.rotations, report.keys, report.revocations, report.crashes
    );
    println!("  live tokens  {} shown to verifiers, {} rejected", report.presented, report.rejected);
    if let Some(margin) = &report.early {
        println!("  new keys     {}", told(margin, "known", "before a verifier needed it", "too late"));
    }
    if let Some(margin) = &report.late {
        println!("  former keys  {}", told(margin, "removed", "after the last live token", "too early"));
    }
    let Some(incident) = &report.incident else {
        println!("");
        return;
    };
    let why = if incident.is_early() { "did not know the key yet" } else { "did not know the key any more" };
    println!("\n  The worst rejection: {} {why}, by {}", plain(&incident.verifier), incident.missed_by());
    for line in moments(report, incident) {
        println!("    {}", plain(&line));
    }
    if played.advice.is_empty() {
        println!("\n  Everything that is true was declared: please report this with its seed and configuration.\n");
        return;
    }
    println!("\n  Change:");
    for advice in &played.advice {
        println!("    {} = {}\n      {}", advice.setting, plain(&advice.value), plain(&advice.why));
    }
    println!("");
}

/// The end of the story, and what became of the token, in the order of time.
fn moments(report: &Report, incident: &Incident) -> Vec<String> {
    let mut lines = report.story[report.story.len().saturating_sub(TOLD)..].to_vec();
    if let Some(of) = incident.document_of {
        lines.push(format!("{}  {} has the JWKS of this moment", of.to_rfc3339(), incident.verifier));
    }
    lines.push(format!("{}  a token is signed with key {}", incident.signed_at.to_rfc3339(), incident.key));
    lines.push(format!("{}  {} rejects it", incident.at.to_rfc3339(), incident.verifier));
    // Times of one format sort as text; what happened at one moment stays in its order.
    lines.sort_by(|one, other| one.split(' ').next().cmp(&other.split(' ').next()));
    lines
}

/// Such as `known 20s before a verifier needed it (envoy, key 7, 2027-02-01T00:00:00Z)`.
fn told(margin: &Margin, what: &str, well: &str, badly: &str) -> String {
    let millis = margin.millis.saturating_abs();
    let by = if millis < 1000 { Span::from_millis(millis) } else { Span::from_secs(millis / 1000) };
    let how = if margin.millis < 0 { badly } else { well };
    format!("{what} {by} {how} ({}, key {}, {})", plain(&margin.verifier), margin.key, margin.at.to_rfc3339())
}

/// How far a simulation is, on a terminal only.
struct Bar<'a> {
    name: &'a str,
    shown: Option<u8>,
    on: bool,
}

impl<'a> Bar<'a> {
    const WIDTH: usize = 40;

    fn new(name: &'a str) -> Self {
        Bar { name, shown: None, on: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, done: f64) {
        let percent = (done.clamp(0.0, 1.0) * 100.0) as u8;
        if !self.on || self.shown == Some(percent) {
            return;
        }
        self.shown = Some(percent);
        let full = usize::from(percent) * Self::WIDTH / 100;
        let (full, rest) = ("█".repeat(full), "░".repeat(Self::WIDTH - full));
        super::print::complain(&format!("\r{} {full}{rest} {percent:>3} %", self.name));
    }

    fn clear(&mut self) {
        if self.shown.is_some() {
            super::print::complain("\r\x1b[2K");
        }
    }
}
