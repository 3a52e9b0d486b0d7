//! The keyring's core alone, where a whole daemon would take too long: the same installations, played by `src/simulation`.

use std::sync::Mutex;

use jwksd::keyring::name::Name;
use jwksd::keyring::time::Span;
use jwksd::simulation::rules::Ours;
use jwksd::simulation::{Caching, Faults, Reality, Scenario, play};

use crate::history::{History, Mix, every};
use crate::life::BEGINNING;

/// Rotations of one scenario, about.
const LENGTH: u32 = 200;

#[derive(Debug, Default)]
pub struct Played {
    pub rotations: u64,
    pub presented: u64,
    pub crashes: u64,
    pub revocations: u64,
}

/// Plays scenarios of consecutive seeds until so many rotations were played.
pub fn play_until(first: u64, rotations: u64) -> Result<Played, String> {
    let sum = Mutex::new(Played::default());
    let broken = crate::search(
        first,
        |_| sum.lock().unwrap().rotations >= rotations,
        |seed| {
            let report = play(&scenario(seed), &Ours, |_| ());
            let mut sum = sum.lock().unwrap();
            sum.rotations += report.rotations;
            sum.presented += report.presented;
            sum.crashes += report.crashes;
            sum.revocations += report.revocations;
            let broken = report.rejected > 0 || report.misused > 0;
            broken.then(|| format!("core, seed {seed}: {:?}\n{}", report.incident, report.story.join("\n")))
        },
    );
    broken.map_or_else(|| Ok(sum.into_inner().unwrap()), Err)
}

fn scenario(seed: u64) -> Scenario {
    let setup = History::draw(seed, Mix::Turmoil).setup;
    let mut policy = setup.policies[0].clone();
    // What probes show takes a whole daemon.
    policy.issuer.probes.clear();
    let verifiers = policy.rotation.verifiers.iter();
    let reality = Reality {
        replicas: setup.roles.len(),
        skew: policy.rotation.clock_skew,
        lag: policy.rotation.publish_lag,
        layers: policy.issuer.cache_span(),
        verifiers: verifiers.map(|v| Caching { name: v.name.clone(), sees_new: v.sees_new }).collect(),
        tokens: 3,
        faults: if seed.is_multiple_of(2) { Faults::ALL } else { Faults { operators: true, ..Faults::NONE } },
    };
    Scenario {
        keyset: Name::parse("default").unwrap(),
        lasts: Span::from_millis(every(&policy).as_millis()).times(LENGTH),
        policies: vec![policy],
        reality,
        begins: BEGINNING,
        seed,
    }
}
