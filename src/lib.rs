//! jwksd owns the signing keys of JWT issuers. See ARCHITECTURE.md for how the layers fit.

pub mod app;
pub mod aws_kms;
pub mod backend;
pub mod cli;
pub mod clock;
pub mod config;
pub mod engine;
pub mod http;
pub mod keyring;
pub mod kubernetes;
pub mod memory;
pub mod outbound;
pub mod publisher;
pub mod random;
pub mod seal;
pub mod simulation;
pub mod store;
pub mod systemd;
pub mod telemetry;
