//! What the measuring programs share: a daemon started from a binary, what the system says of its process, and a plain
//! HTTP client that costs little beside it.

#![allow(dead_code, reason = "each program compiles this module and uses its own part of it")]

pub mod arguments;
pub mod client;
pub mod daemon;
pub mod process;
pub mod table;

use std::error::Error;

/// A measurement that cannot go on ends with what went wrong.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;
