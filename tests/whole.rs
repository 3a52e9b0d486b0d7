//! A deterministic simulation of the whole: the real engine and its tasks, replicas with roles, on simulated clocks, stores,
//! a KMS and networks, with crashes at any await, operators and configurations at bad moments, caching layers, balancers
//! and verifiers.
//!
//! The oracle and the verifiers decide nothing with `src/keyring`: they read stored records and served documents as JSON,
//! and know the time. A history that fails is shrunk and printed; `JWKSD_WHOLE_SEED=…` repeats one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "whole/audience.rs"]
mod audience;
#[path = "whole/events.rs"]
mod events;
#[path = "whole/history.rs"]
mod history;
#[path = "whole/keys.rs"]
mod keys;
#[path = "whole/kms.rs"]
mod kms;
#[path = "whole/life.rs"]
mod life;
#[path = "whole/oracle.rs"]
mod oracle;
#[path = "simulation/random.rs"]
#[allow(dead_code, reason = "its seeds are never drawn by the system")]
mod random;
#[path = "whole/records.rs"]
mod records;
#[path = "whole/seat.rs"]
mod seat;
#[path = "whole/shelf.rs"]
mod shelf;
#[path = "whole/tokens.rs"]
mod tokens;
#[path = "whole/world.rs"]
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use history::{History, Mix};
use life::Doom;
use world::{Ending, Stats, World};

/// Plays one history. Time of its runtime stands still while anybody has something to do.
fn play_with(history: &History, doom: u64) -> Ending {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    runtime.block_on(World::play(history, Doom::at(doom)))
}

fn play(history: &History) -> Ending {
    play_with(history, 0)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} = {text} is not a number")))
}

/// The smallest history that still fails: events are left out for as long as any can be.
fn shrink(history: &History) -> (History, Ending) {
    let mut smallest = history.clone();
    let mut chunk = smallest.events.len().div_ceil(2).max(1);
    loop {
        let mut from = 0;
        while from < smallest.events.len() {
            let mut tried = smallest.clone();
            tried.events.drain(from..(from + chunk).min(smallest.events.len()));
            match play(&tried).broken {
                Some(_) => smallest = tried,
                None => from += chunk,
            }
        }
        if chunk == 1 {
            break;
        }
        chunk = chunk.div_ceil(2);
    }
    let ending = play(&smallest);
    (smallest, ending)
}

fn report(seed: u64, mix: Mix, history: &History) -> String {
    let (smallest, ending) = shrink(history);
    let from = ending.story.len().saturating_sub(60);
    format!(
        "seed {seed} of {mix:?}: {}\nevents that matter: {:#?}\nreplicas: {:?}, verifiers: {:?}\n{}",
        ending.broken.unwrap_or_default(),
        smallest.events,
        smallest.setup.roles,
        smallest.setup.classes,
        ending.story[from..].join("\n"),
    )
}

/// Rotations that one history of this mix is drawn for.
const fn length(mix: Mix) -> i64 {
    match mix {
        Mix::Rotations => 16,
        Mix::Turmoil => 8,
    }
}

/// Plays histories of consecutive seeds on all cores until so many rotations were played.
fn play_until(first: u64, mix: Mix, rotations: u64) -> Result<Stats, String> {
    let (next, played) = (AtomicU64::new(first), AtomicU64::new(0));
    let (sum, broken) = (Mutex::new(Stats::default()), Mutex::new(None));
    let work = || {
        while played.load(Ordering::Relaxed) < rotations && broken.lock().unwrap().is_none() {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let history = History::draw(seed, mix, length(mix));
            let ending = play(&history);
            played.fetch_add(ending.stats.rotations.max(1), Ordering::Relaxed);
            sum.lock().unwrap().add(&ending.stats);
            if ending.broken.is_some() {
                *broken.lock().unwrap() = Some((seed, history));
            }
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        for _ in 0..cores {
            scope.spawn(work);
        }
    });
    match broken.into_inner().unwrap() {
        Some((seed, history)) => Err(report(seed, mix, &history)),
        None => Ok(sum.into_inner().unwrap()),
    }
}

#[test]
fn no_promise_is_broken() {
    let rotations = number("JWKSD_WHOLE_ROTATIONS").unwrap_or(1_000);
    let seed = number("JWKSD_WHOLE_SEED");
    let begun = std::time::Instant::now();
    let parts = [(Mix::Turmoil, rotations / 10), (Mix::Rotations, rotations - rotations / 10)];
    for (mix, rotations) in parts {
        let stats = play_until(seed.unwrap_or(1), mix, rotations).unwrap_or_else(|broken| panic!("{broken}"));
        println!("{mix:?} after {:?}: {stats:?}", begun.elapsed());
    }
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in [3, 4] {
        for mix in [Mix::Turmoil, Mix::Rotations] {
            let history = History::draw(seed, mix, length(mix));
            let (one, other) = (play(&history), play(&history));
            assert!(one.story.len() > 50, "nothing happened");
            assert_eq!(one.story, other.story);
            assert_eq!(one.stats, other.stats);
        }
    }
}
