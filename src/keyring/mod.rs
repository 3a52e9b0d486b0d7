//! The pure heart: keys, their states and the one transition function, policy, planner and the published document.
//!
//! Nothing here does I/O, reads a clock, draws randomness or logs; `now` is an argument. Everything that decides lives
//! here, once.

pub mod algorithm;
pub mod change;
pub mod claims;
pub mod decide;
pub mod disabled;
pub mod discovery;
pub mod json;
pub mod jwk;
pub mod lifecycle;
pub mod name;
pub mod notice;
pub mod outlook;
pub mod placement;
pub mod plan;
pub mod policy;
pub mod publication;
pub mod record;
pub mod recover;
pub mod schedule;
pub mod time;
pub mod timeline;
pub mod timing;
pub mod verifiers;
mod zone;
