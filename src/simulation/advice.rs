//! Which setting to change after a live token was rejected.

use super::{Incident, Reality};
use crate::keyring::name::Name;
use crate::keyring::policy::Policy;
use crate::keyring::schedule::Schedule;
use crate::keyring::time::Span;

/// A setting, the least that it has to be, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// Where it stands in the configuration, such as `keyset.default.rotation.propagation`.
    pub setting: String,
    /// What it is to be, as it is written there.
    pub value: String,
    pub why: String,
}

/// What to declare, and what follows from it, so that the incident cannot happen again. Empty when all that is true was
/// declared: then the fault is not in the configuration.
pub fn advise(keyset: &Name, policy: &Policy, reality: &Reality, incident: &Incident) -> Vec<Advice> {
    let adviser = Adviser { keyset, policy, reality };
    let mut list = adviser.undeclared();
    if incident.is_early() {
        list.extend(adviser.propagation());
    } else {
        list.retain(|advice| advice.setting.ends_with("tokens.clock_skew"));
        if list.is_empty() {
            list.push(adviser.overlap(incident.missed_by()));
        }
    }
    list
}

struct Adviser<'a> {
    keyset: &'a Name,
    policy: &'a Policy,
    reality: &'a Reality,
}

impl Adviser<'_> {
    /// What is true and was not declared.
    fn undeclared(&self) -> Vec<Advice> {
        let (policy, reality) = (self.policy, self.reality);
        let rotation = &policy.rotation;
        let mut list = Vec::new();
        if let Some(slowest) = reality.slowest().filter(|slowest| slowest.sees_new > rotation.slowest_verifier()) {
            let (name, time) = (&slowest.name, slowest.sees_new);
            list.push(self.of_keyset(
                "rotation.verifiers",
                format!("{{ name = \"{name}\", cache = \"{time}\" }}"),
                format!("verifier {name} may take {time} to see a new key, longer than any that is declared"),
            ));
        }
        let declared = policy.issuer.cache_span();
        if reality.layers > declared {
            let missing = reality.layers.saturating_sub(declared);
            let layers: Vec<String> =
                policy.issuer.caches.iter().chain([&missing]).map(|layer| format!("\"{layer}\"")).collect();
            list.push(Advice {
                setting: format!("issuer.{}.caches", policy.issuer.name),
                value: format!("[{}]", layers.join(", ")),
                why: format!("caches in front hold a document for {}, not {declared}", reality.layers),
            });
        }
        if reality.skew > rotation.clock_skew {
            let why = format!("clocks differ by up to {}, not {}", reality.skew, rotation.clock_skew);
            list.push(self.of_keyset("tokens.clock_skew", format!("\"{}\"", reality.skew), why));
        }
        if reality.lag > rotation.publish_lag {
            let why =
                format!("replicas show what others wrote up to {} late, not {}", reality.lag, rotation.publish_lag);
            list.push(Advice { setting: "store.publish_lag".to_owned(), value: format!("\"{}\"", reality.lag), why });
        }
        list
    }

    /// The wait of new keys, and the schedule that leaves room for it.
    fn propagation(&self) -> Vec<Advice> {
        let (rotation, reality) = (&self.policy.rotation, self.reality);
        let layers = reality.layers.max(self.policy.issuer.cache_span());
        let slowest = reality.slowest().map_or(Span::ZERO, |slowest| slowest.sees_new).max(rotation.slowest_verifier());
        let (skew, lag) = (reality.skew.max(rotation.clock_skew), reality.lag.max(rotation.publish_lag));
        let needed = layers + slowest + skew + lag;
        if needed <= rotation.propagation {
            return Vec::new();
        }
        let name = reality.slowest().map_or("any", |slowest| slowest.name.as_str());
        let why = format!(
            "at least caches {layers} + verifier {name} {slowest} + publish lag {lag} + clock skew {skew}; it is {}",
            rotation.propagation
        );
        let mut list = vec![self.of_keyset("rotation.propagation", format!("\"{needed}\""), why)];
        let gap = rotation.schedule.smallest_gap().span;
        if gap <= needed {
            let (key, value) = match rotation.schedule {
                Schedule::Every(_) => ("rotation.every", format!("longer than \"{needed}\"")),
                Schedule::Cron(_) => ("rotation.schedule", format!("more than {needed} between rotations")),
            };
            let why = format!("rotations have to be further apart than propagation; they are {gap} apart");
            list.push(self.of_keyset(key, value, why));
        }
        list
    }

    /// What former keys need beyond what follows from clocks and token lives.
    fn overlap(&self, missed_by: Span) -> Advice {
        let needed = self.policy.rotation.overlap_extra + missed_by + Span::SECOND;
        let why = format!("the key left at least {missed_by} too early");
        self.of_keyset("rotation.overlap_extra", format!("\"{needed}\""), why)
    }

    fn of_keyset(&self, key: &str, value: String, why: String) -> Advice {
        Advice { setting: format!("keyset.{}.{key}", self.keyset), value, why }
    }
}
