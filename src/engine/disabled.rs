//! A key that its backend disabled behind our back: confirmed, then replaced by a successor that just signed.

use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use super::cell::KeysetCell;
use super::reconcile::chain;
use crate::backend::verify::verify;
use crate::backend::{BackendError, BackendErrorKind, Signer};
use crate::keyring::algorithm::Algorithm;
use crate::keyring::change::{Change, Trigger};
use crate::keyring::disabled::{Remedy, remedy};
use crate::keyring::jwk::PublicJwk;
use crate::keyring::record::Serial;

/// What keys sign to show that they can: no header begins so, so it is no token of anybody.
const MESSAGE: &[u8] = b"jwksd test signature";

/// How long such a signature may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a test signature went.
enum Tested {
    Signs,
    Disabled,
    /// It is not known: the backend is away, or returned something else.
    Unknown(String),
}

impl Engine {
    /// Looks into a report that the active key is disabled. `true`: another key signs now, plan again.
    pub(super) async fn replace_disabled(&self, cell: &Arc<KeysetCell>) -> bool {
        let Some(serial) = cell.remote.reported() else { return false };
        let snapshot = cell.snapshot.load_full();
        let Some(active) = snapshot.active.clone().filter(|active| active.serial == serial) else {
            cell.remote.absolve(serial);
            return false;
        };
        match test(&active.signer, active.algorithm, &active.public).await {
            Tested::Signs => {
                cell.remote.absolve(serial);
                return false;
            }
            Tested::Unknown(_) => return false,
            Tested::Disabled => {}
        }
        // Told once; the alarm stays.
        let news = cell.remote.confirm(serial);
        if news {
            tracing::error!(keyset = %cell.name, kid = %active.kid, serial, "the active key is disabled or pending deletion in its backend although nobody asked for that here");
        }
        match remedy(&snapshot.keyring, &self.facts(cell, &snapshot)) {
            Remedy::Switch(candidates) => self.switch_to_one_of(cell, snapshot.keyring.generation, &candidates).await,
            Remedy::WaitUntil(until) if news => {
                tracing::error!(keyset = %cell.name, %until, "a key was replaced for that within the hour: no further key is put at risk before that time; enable the key, or rotate");
                false
            }
            Remedy::NoSuccessor if news => {
                tracing::error!(keyset = %cell.name, "no propagated successor waits; enable the key, or revoke it");
                false
            }
            Remedy::WaitUntil(_) | Remedy::NoSuccessor => false,
        }
    }

    /// Promotes the first candidate that signs.
    async fn switch_to_one_of(&self, cell: &Arc<KeysetCell>, generation: u64, candidates: &[Serial]) -> bool {
        let keyring = cell.snapshot.load_full().keyring.clone();
        for &serial in candidates {
            let Some(key) = keyring.key(serial) else { continue };
            let tested = match self.open(&keyring, key).await {
                Ok(signer) => test(&signer, key.algorithm, &key.public).await,
                Err(error) => Tested::Unknown(chain(&error)),
            };
            if !matches!(tested, Tested::Signs) {
                let problem = if let Tested::Unknown(problem) = tested { problem } else { "it is disabled too".into() };
                tracing::error!(keyset = %cell.name, serial, problem, "a successor of the disabled key does not sign either");
                continue;
            }
            let change = Change::Promote { serial, trigger: Trigger::KeyDisabled, unpropagated: false };
            // Written only over the generation that was looked at, with its audit entry.
            return self.carry_write(cell, generation, &change).await.is_ok();
        }
        false
    }
}

async fn test(signer: &Signer, algorithm: Algorithm, public: &PublicJwk) -> Tested {
    let signed = match signer {
        Signer::Inline(signer) | Signer::InTurn(signer) => signer.sign(MESSAGE),
        Signer::Pooled(signer) => {
            let signer = signer.clone();
            match tokio::task::spawn_blocking(move || signer.sign(MESSAGE)).await {
                Ok(signed) => signed,
                Err(error) => return Tested::Unknown(error.to_string()),
            }
        }
        Signer::Remote(signer) => match tokio::time::timeout(PATIENCE, signer.sign(MESSAGE)).await {
            Ok(signed) => signed,
            Err(_) => return Tested::Unknown("no answer in time".to_owned()),
        },
    };
    match signed {
        Ok(signature) => match verify(algorithm, public, MESSAGE, &signature) {
            Ok(()) => Tested::Signs,
            Err(error) => Tested::Unknown(chain(&error)),
        },
        Err(BackendError { kind: BackendErrorKind::KeyDisabled | BackendErrorKind::NotFound, .. }) => Tested::Disabled,
        Err(error) => Tested::Unknown(chain(&error)),
    }
}
