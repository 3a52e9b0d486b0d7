//! Receivers of notices: their secrets and certificates read, and exchanged when any of it changes.

use std::sync::{Arc, Mutex, PoisonError};

use super::access::{AccessError, Environment, process_environment, read_secret};
use crate::config::{Config, NoticeSecrets, Receiver};
use crate::engine::Engine;
use crate::engine::notices::{Addressee, Webhook};
use crate::keyring::name::Name;

/// Tells the engine whom to tell.
pub(super) struct Receivers {
    engine: Arc<Engine>,
    environment: Environment,
    /// What is in force.
    known: Mutex<Vec<Known>>,
}

/// Everything that makes a receiver what it is.
#[derive(Clone, PartialEq)]
struct Known {
    receiver: Receiver,
    secrets: NoticeSecrets,
    /// What `ca_file` holds.
    authorities: Option<Vec<u8>>,
}

/// Receivers that were read and are not in force yet.
pub(super) struct Fresh(Vec<(Known, Webhook)>);

impl Receivers {
    /// Puts those of `config` in force.
    pub fn new(engine: Arc<Engine>, config: &Config, environment: Environment) -> Result<Self, AccessError> {
        let receivers = Receivers { engine, environment, known: Mutex::default() };
        receivers.put_in_force(receivers.read(config)?);
        Ok(receivers)
    }

    /// Reads what `config` names. Nothing is half taken: one that cannot be read fails all.
    pub fn read(&self, config: &Config) -> Result<Fresh, AccessError> {
        config.notices.iter().map(|receiver| read(receiver, &self.environment)).collect::<Result<_, _>>().map(Fresh)
    }

    /// Puts them in force where they are others than before: what is under way to them is broken off only then.
    pub fn put_in_force(&self, fresh: Fresh) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.iter().eq(fresh.0.iter().map(|(known, _)| known)) {
            return false;
        }
        *known = fresh.0.iter().map(|(known, _)| known.clone()).collect();
        let addressee = |(known, line): (Known, Webhook)| Addressee { receiver: known.receiver, line: Arc::new(line) };
        self.engine.tell(fresh.0.into_iter().map(addressee).collect());
        true
    }
}

/// Every receiver that the configuration names, with the way to it.
pub fn webhooks(config: &Config) -> Result<Vec<(Name, Webhook)>, AccessError> {
    let environment = process_environment();
    let webhook = |receiver| read(receiver, &environment).map(|(known, webhook)| (known.receiver.name, webhook));
    config.notices.iter().map(webhook).collect()
}

fn read(receiver: &Receiver, environment: &Environment) -> Result<(Known, Webhook), AccessError> {
    let key = format!("notice.{}", receiver.name);
    let secret = read_secret(&key, "secret_file", &receiver.secret, environment)?;
    let secrets = NoticeSecrets::parse(&secret);
    let secrets = secrets.map_err(|source| AccessError::Notice { key: key.clone(), source })?;
    let webhook = Webhook::new(receiver, &secrets).map_err(|source| AccessError::Webhook { key, source })?;
    // It was just read; one that changed since is noticed by the watch.
    let authorities = receiver.ca_file.as_ref().and_then(|path| std::fs::read(path).ok());
    Ok((Known { receiver: receiver.clone(), secrets, authorities }, webhook))
}
