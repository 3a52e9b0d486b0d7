//! A deterministic simulation of the whole: the real engine and its tasks, replicas with roles, on simulated clocks, stores,
//! a KMS (or an account of AWS KMS behind the real backend) and networks, with crashes at any await, operators and
//! configurations at bad moments, changes of algorithm, drains and recoveries, caching layers, balancers and verifiers, and
//! probes of what these are served, and keys of issuers that were there before. Publishers are not in it.
//!
//! The oracle and the verifiers decide nothing with `src/keyring`: they read stored records and served documents as JSON,
//! and know the time. A history that fails is shrunk and printed; `JWKSD_WHOLE_SEED=…` repeats one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "whole/account.rs"]
mod account;
#[path = "whole/audience.rs"]
mod audience;
#[path = "whole/core.rs"]
mod core;
#[path = "whole/events.rs"]
mod events;
#[path = "whole/history.rs"]
mod history;
#[path = "whole/imports.rs"]
mod imports;
#[path = "whole/keys.rs"]
mod keys;
#[path = "whole/kms.rs"]
mod kms;
#[path = "whole/life.rs"]
mod life;
#[path = "whole/oracle.rs"]
mod oracle;
#[path = "whole/probes.rs"]
mod probes;
#[path = "simulation/random.rs"]
#[allow(dead_code, reason = "its seeds are never drawn by the system")]
mod random;
#[path = "whole/records.rs"]
mod records;
#[path = "whole/seat.rs"]
mod seat;
#[path = "whole/shelf.rs"]
mod shelf;
#[path = "whole/shrink.rs"]
mod shrink;
#[path = "whole/tokens.rs"]
mod tokens;
#[path = "whole/world.rs"]
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use history::{History, Mix};
use life::Doom;
use world::{Ending, Stats, World};

/// Plays one history; a process dies at the await `doom`, counted from one. Time of the runtime stands still while anybody
/// has something to do.
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

/// Has all cores work on one number after the other until one finds something, or says that it is enough.
fn search<T: Send>(
    first: u64,
    enough: impl Fn(u64) -> bool + Sync,
    work: impl Fn(u64) -> Option<T> + Sync,
) -> Option<T> {
    let (next, found) = (AtomicU64::new(first), Mutex::new(None));
    let take = || {
        while found.lock().unwrap().is_none() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if enough(number) {
                return;
            }
            if let Some(this) = work(number) {
                found.lock().unwrap().get_or_insert(this);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, std::num::NonZero::get) {
            scope.spawn(take);
        }
    });
    found.into_inner().unwrap()
}

/// Plays histories of consecutive seeds until so many rotations were played.
fn play_until(first: u64, mix: Mix, rotations: u64) -> Result<Stats, String> {
    let (played, sum) = (AtomicU64::new(0), Mutex::new(Stats::default()));
    let broken = search(
        first,
        |_| played.load(Ordering::Relaxed) >= rotations,
        |seed| {
            let history = History::draw(seed, mix);
            let ending = play(&history);
            played.fetch_add(ending.stats.rotations.max(1), Ordering::Relaxed);
            sum.lock().unwrap().add(&ending.stats);
            ending.broken.map(|_| history)
        },
    );
    match broken {
        Some(history) => Err(shrink::report(&history, mix, &play)),
        None => Ok(sum.into_inner().unwrap()),
    }
}

/// Of a thousand rotations so many are played where most goes wrong, and so many by whole daemons; the keyring's core alone
/// plays the others.
const TURMOIL: u64 = 4;
const WHOLE: u64 = 50;

/// However few are wanted.
const LEAST: u64 = 60;

/// `JWKSD_WHOLE_ROTATIONS` says how many, `JWKSD_WHOLE_SEED` which history comes first.
#[test]
fn no_promise_is_broken() {
    let rotations = number("JWKSD_WHOLE_ROTATIONS").unwrap_or(1_000);
    let seed = number("JWKSD_WHOLE_SEED").unwrap_or(1);
    let mut played = 0;
    for (mix, share) in [(Mix::Turmoil, TURMOIL), (Mix::Rotations, WHOLE)] {
        let wanted = (rotations * share / 1000).max(LEAST);
        let stats = play_until(seed, mix, wanted).unwrap_or_else(|broken| panic!("{broken}"));
        println!("{mix:?}: {stats:?}");
        assert!(stats.rotations >= wanted, "{stats:?}");
        assert!(stats.tokens > 2 * stats.rotations && stats.accepted > 50 * stats.rotations, "{stats:?}");
        assert!(stats.excused + stats.unreachable < stats.accepted / 20, "{stats:?}");
        if mix == Mix::Turmoil && stats.rotations > 1_000 {
            let rare = [stats.crashes, stats.revocations, stats.exposures, stats.restored, stats.refusals];
            assert!(rare.iter().all(|count| *count > 10), "{stats:?}");
        }
        let long = stats.rotations > 3_000;
        let several = [
            stats.changes,
            stats.drains,
            stats.samples,
            stats.earlier,
            if mix == Mix::Turmoil { stats.raced } else { stats.recovered },
        ];
        assert!(!long || several.iter().all(|count| *count > 10), "{stats:?}");
        played += stats.rotations;
    }
    let report = core::play_until(seed, rotations.saturating_sub(played)).unwrap_or_else(|broken| panic!("{broken}"));
    println!("core: {report:?}");
    assert!(played + report.rotations >= rotations, "{report:?}");
    // Whole daemons may have overshot, and left it nothing.
    assert!(report.rotations == 0 || report.presented > report.rotations, "{report:?}");
}

/// Everything that writes, and a crash at each place at which a process waits for anything. `JWKSD_WHOLE_CRASHES` says at
/// how many of them.
#[test]
fn a_crash_at_any_await_breaks_no_promise() {
    let wanted = number("JWKSD_WHOLE_CRASHES").unwrap_or(24);
    for shared in [false, true] {
        let history = History::everyday(shared);
        let calm = play(&history);
        assert_eq!(calm.broken, None, "{}", calm.story.join("\n"));
        assert!(calm.stats.rotations >= 6 && calm.stats.revocations >= 2, "{:?}", calm.stats);
        let places = calm.stats.places;
        assert!(places > 500, "only {places} places: the scenario lost its sense");
        let step = (places / wanted).max(1);
        let broken = search(
            0,
            |number| number * step >= places,
            |number| {
                let place = number * step + 1;
                let ending = play_with(&history, place);
                assert!(ending.stats.crashes > 0, "nobody died at {place} of {places}");
                let story = || ending.story[ending.story.len().saturating_sub(60)..].join("\n");
                ending.broken.as_ref().map(|broken| format!("shared: {shared}, place {place}: {broken}\n{}", story()))
            },
        );
        assert_eq!(broken, None, "{}", broken.as_deref().unwrap_or_default());
        println!("shared: {shared}: {} of {places} places", places.div_ceil(step));
    }
}

/// Histories that failed once.
#[test]
fn found_histories_stay_right() {
    for line in include_str!("whole/seeds").lines().filter(|line| !line.starts_with('#')) {
        let (mix, seed) = line.split_once(' ').unwrap();
        let mix = match mix {
            "turmoil" => Mix::Turmoil,
            "rotations" => Mix::Rotations,
            other => panic!("{other} is no mix"),
        };
        let history = History::draw(seed.parse().unwrap(), mix);
        if play(&history).broken.is_some() {
            panic!("{}", shrink::report(&history, mix, &play));
        }
    }
}

#[test]
fn a_seed_tells_the_same_story_twice() {
    for seed in [3, 4] {
        for mix in [Mix::Turmoil, Mix::Rotations] {
            let history = History::draw(seed, mix);
            let (one, other) = (play(&history), play(&history));
            assert!(one.story.len() > 50, "nothing happened");
            assert_eq!(one.story, other.story);
            assert_eq!(one.stats, other.stats);
        }
    }
}

/// Who is told less than is true notices nothing: what verifiers really do must matter.
#[test]
fn a_world_that_differs_from_what_is_declared_is_noticed() {
    type Lie = fn(&mut History);
    let lies: [(&str, Lie); 4] = [
        ("caches that nobody declared", |history| history.setup.edge += 20_000),
        ("verifiers that keep documents for longer", |history| {
            history.setup.classes.push(audience::Class::Plain { cache: 60_000 });
        }),
        ("clocks further apart", |history| history.setup.ahead_max *= 40),
        ("a KMS that loses keys", |history| history.setup.loses_keys = true),
    ];
    for (name, lie) in lies {
        let found = search(
            1,
            |seed| seed > 30,
            |seed| {
                let mut history = History::draw(seed, Mix::Rotations);
                lie(&mut history);
                play(&history).broken
            },
        );
        let found = found.unwrap_or_else(|| panic!("{name}: not noticed"));
        println!("{name}: {found}");
    }
}
