//! What can be wrong with an answer of a manager.

use std::error::Error;

use super::line::Answer;
use crate::outbound::BodyError;

/// Why a manager's answer says nothing.
#[derive(Debug)]
pub(super) enum Fault {
    /// There is none.
    Request(reqwest::Error),
    Body(BodyError),
    /// It is a refusal.
    Status {
        status: u16,
        problem: Option<String>,
    },
    /// It is not one of a manager.
    Protocol(&'static str),
    /// It lacks a header field, or has a wrong one.
    Header(&'static str),
    /// The token cannot be sent.
    Token,
}

impl Fault {
    pub fn refused(answer: &Answer) -> Self {
        Fault::Status { status: answer.status.as_u16(), problem: answer.problem() }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fault::Request(error) => write!(f, "no answer: {}", cause(error)),
            Fault::Body(BodyError::Broken(error)) => write!(f, "the answer broke off: {}", cause(error)),
            Fault::Body(BodyError::TooLong) => f.write_str("the answer is longer than any of a manager"),
            Fault::Status { status: 401, .. } => {
                f.write_str("401: the token is not one of a client in the manager's [replication.client]")
            }
            Fault::Status { status, problem: Some(problem) } => write!(f, "{status} ({problem})"),
            Fault::Status { status, problem: None } => {
                write!(f, "{status}: see that the URL is the one of a manager's replication listener")
            }
            Fault::Protocol(problem) => write!(f, "{problem}; nothing was taken from it"),
            Fault::Header(name) => {
                write!(f, "the answer has no usable {name}: see that nothing in between changes header fields")
            }
            Fault::Token => f.write_str("the token holds something that cannot be sent"),
        }
    }
}

/// The innermost reason: what wraps it repeats the URL or says no more.
fn cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "it took too long".to_owned();
    }
    let mut innermost: &(dyn Error + 'static) = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
