//! What must hold for any input. `tests/fuzz.rs` asks it of the corpus and of seeded changes to it, in every `cargo test`.
//!
//! A target panics where something does not hold, and else says what became of the input, so that a harness can tell
//! whether it tests anything.

pub mod claims;
pub mod config;
pub mod cron;
pub mod keys;
pub mod records;
pub mod tokens;

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted,
    Refused,
}

/// What is fuzzed.
pub struct Target {
    /// Of the target, and of its folder in `tests/fuzz/corpus`.
    pub name: &'static str,
    pub run: fn(&[u8]) -> Verdict,
    /// No input is longer, in bytes.
    pub longest: usize,
}

pub const TARGETS: [Target; 6] = [
    Target { name: "config", run: config::run, longest: 16 * 1024 },
    Target { name: "keys", run: keys::run, longest: 8 * 1024 },
    Target { name: "tokens", run: tokens::run, longest: 8 * 1024 },
    Target { name: "claims", run: claims::run, longest: 20 * 1024 },
    Target { name: "records", run: records::run, longest: 32 * 1024 },
    Target { name: "cron", run: cron::run, longest: 1024 },
];

/// A message is for people: it says something, it is short, and it cannot garble a terminal or a log.
pub fn assert_presentable(message: &str, longest: usize) {
    assert!(!message.trim().is_empty(), "a message says nothing");
    assert!(message.len() <= longest, "a message of {} bytes: {message}", message.len());
    let garbling = message.chars().find(|c| c.is_control());
    assert_eq!(garbling, None, "a message holds a control character: {message:?}");
}
