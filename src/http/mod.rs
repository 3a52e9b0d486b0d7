//! What the five routers run on: sockets, TLS, limits, request ids, problems, JSON bodies, Host checks, bearer tokens and client
//! certificates.
//!
//! A request passes, from the outside in: [`listener`] (connections and their limits) → [`middleware::Edge`] (request id,
//! log span, body limits, panics, problems) → the router's own layers ([`middleware::guard_host`], [`auth`]) → handler. Sign requests and
//! documents for verifiers go around the router ([`middleware::Shortcut`]).

pub mod access;
pub mod admin;
mod audit;
pub mod auth;
pub mod body;
mod call;
pub mod certificate;
pub mod clients;
mod conditional;
mod connection;
mod duration;
mod import;
pub mod json;
pub mod listener;
pub mod middleware;
pub mod openapi;
pub mod ops;
pub mod overview;
pub mod page;
pub mod problem;
pub mod public;
pub mod replication;
pub mod signer;
pub mod tls;
pub mod view;
mod wire;
