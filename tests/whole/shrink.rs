//! The smallest history that still fails, as a story.

use crate::history::{History, Mix};
use crate::world::Ending;

/// Histories that are tried at most.
const TRIES: usize = 200;

/// Lines of the story.
const LINES: usize = 60;

/// What a history fails with once everything is left out that does not matter.
pub fn report(history: &History, mix: Mix, play: &dyn Fn(&History) -> Ending) -> String {
    let smallest = shrink(history, play);
    let ending = play(&smallest);
    let from = ending.story.len().saturating_sub(LINES);
    let events: Vec<String> = smallest.events.iter().map(|(at, event)| format!("  {at} ms: {event:?}")).collect();
    format!(
        "JWKSD_WHOLE_SEED={} ({mix:?}): {}\n{:?}, {:?}\nof {} events these matter:\n{}\n\n{}",
        smallest.setup.seed,
        ending.broken.unwrap_or_default(),
        smallest.setup.roles,
        smallest.setup.classes,
        history.events.len(),
        events.join("\n"),
        ending.story[from..].join("\n"),
    )
}

/// Leaves out events, many at once at first, for as long as the rest still fails.
fn shrink(history: &History, play: &dyn Fn(&History) -> Ending) -> History {
    let mut smallest = history.clone();
    let (mut chunk, mut tries) = (smallest.events.len().div_ceil(2).max(1), 0);
    loop {
        let mut from = 0;
        while from < smallest.events.len() && tries < TRIES {
            let mut tried = smallest.clone();
            tried.events.drain(from..(from + chunk).min(smallest.events.len()));
            tries += 1;
            match play(&tried).broken {
                Some(_) => smallest = tried,
                None => from += chunk,
            }
        }
        if chunk == 1 || tries >= TRIES {
            return smallest;
        }
        chunk = chunk.div_ceil(2);
    }
}
