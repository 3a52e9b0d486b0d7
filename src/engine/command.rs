//! Operators' requests: decided on the current keyring, written with their effect, answered once they show.

use std::sync::Arc;

use super::Engine;
use super::cell::KeysetCell;
use super::reconcile::{CommitError, chain};
use crate::backend::material::PrivateKeyMaterial;
use crate::backend::{BackendError, BackendErrorKind, RemoteFound};
use crate::keyring::change::{NewKey, Trigger};
use crate::keyring::decide::{Decision, Intent, Outcome, Refusal, Request, UnconfirmedReplica, decide};
use crate::keyring::plan::Facts;
use crate::keyring::record::{Key, KeyState, Keyring, PrivateHandle};
use crate::telemetry::metrics::BackendOperation;

/// How often a request is decided again because another replica was faster.
const RACES_MAX: u32 = 16;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the seal has not been opened yet, so nothing can be changed")]
    Sealed,
    /// This replica may not change anything.
    #[error("this replica only reads the keyrings (role = \"signer\"): ask a manager")]
    ReadOnly,
    #[error("the keyset is frozen: {reason}")]
    Frozen { reason: Arc<str> },
    #[error("the change could not be stored: {cause}")]
    Store { cause: String },
    #[error("the key that would sign cannot be opened: {cause}")]
    Backend { cause: String },
    #[error("another keyset of the issuer has or revoked the key or kid {kid}")]
    KidTaken { kid: String },
}

impl Engine {
    /// Carries out a request. Runs to its end even when the caller goes away.
    pub async fn command(self: &Arc<Self>, cell: &Arc<KeysetCell>, request: Request) -> Result<Outcome, CommandError> {
        self.spawn_command(cell, request, None).await
    }

    /// As [`command`](Self::command), for an import of a private key: `material` is sealed for the serial it gets.
    pub async fn import(
        self: &Arc<Self>,
        cell: &Arc<KeysetCell>,
        request: Request,
        material: PrivateKeyMaterial,
    ) -> Result<Outcome, CommandError> {
        self.spawn_command(cell, request, Some(Joining::Private(Box::new(material)))).await
    }

    /// The key that `reference` names in the service of the keyset's backend.
    pub async fn find_remote(&self, cell: &KeysetCell, reference: &str) -> Result<RemoteFound, CommandError> {
        let name = cell.snapshot.load().keyring.policy.backend.clone();
        let backend = self.backend(&name).ok_or_else(|| takes_no_remote(&name))?;
        let adopting = backend.adopts().ok_or_else(|| takes_no_remote(&name))?;
        self.timed(backend, BackendOperation::Import, adopting.find(reference)).await.map_err(not_adopted)
    }

    /// As [`command`](Self::command), for an import of a key that stays where it is. It is tested before anything
    /// waits for the keyset.
    pub async fn adopt(
        self: &Arc<Self>,
        cell: &Arc<KeysetCell>,
        request: Request,
        found: RemoteFound,
    ) -> Result<Outcome, CommandError> {
        let name = cell.snapshot.load().keyring.policy.backend.clone();
        let backend = self.backend(&name).cloned().ok_or_else(|| takes_no_remote(&name))?;
        if let (Intent::Import(imported), Some(adopting)) = (&request.intent, backend.adopts()) {
            let test = adopting.test(&found, imported.key.algorithm);
            self.timed(&backend, BackendOperation::Import, test).await.map_err(not_adopted)?;
        }
        self.spawn_command(cell, request, Some(Joining::Remote(found))).await
    }

    async fn spawn_command(
        self: &Arc<Self>,
        cell: &Arc<KeysetCell>,
        request: Request,
        material: Option<Joining>,
    ) -> Result<Outcome, CommandError> {
        if self.is_reader() {
            return Err(CommandError::ReadOnly);
        }
        if self.is_sealed() && cell.snapshot.load().frozen.is_none() {
            return Err(CommandError::Sealed);
        }
        let (engine, cell) = (self.clone(), cell.clone());
        let work = tokio::spawn(async move { engine.carry_out(&cell, request, material).await });
        work.await
            .unwrap_or_else(|error| Err(CommandError::Store { cause: format!("the request was aborted: {error}") }))
    }

    /// Where another replica writes at the same time, the request is decided again on what that wrote.
    async fn carry_out(
        &self,
        cell: &Arc<KeysetCell>,
        request: Request,
        joining: Option<Joining>,
    ) -> Result<Outcome, CommandError> {
        let adds = matches!(request.intent, Intent::Import(_));
        let _admission = if adds { Some(cell.issuer.admission.lock().await) } else { None };
        let revokes = matches!(request.intent, Intent::Revoke { .. } | Intent::Compromise);
        let unconfirmed = if revokes { self.unconfirmed_replicas(cell).await } else { Some(Vec::new()) };
        for attempt in 0..RACES_MAX {
            match self.attempt_command(cell, request.clone(), joining.as_ref(), &unconfirmed).await {
                Ok(None) => {}
                // It may be that another replica wrote since this one looked.
                Err(CommandError::Refused(_)) if attempt == 0 && self.is_shared() => {
                    let mut writer = cell.writer.lock().await;
                    if let Err(error) = self.load_again(cell, &mut writer).await {
                        tracing::warn!(keyset = %cell.name, error = %chain(&error), "what other replicas wrote could not be looked at");
                    }
                }
                Ok(Some(outcome)) => return Ok(outcome),
                Err(error) => return Err(error),
            }
        }
        Err(CommandError::Store { cause: "other replicas kept changing the keyring; repeat the request".to_owned() })
    }

    /// `None` when another replica was faster.
    async fn attempt_command(
        &self,
        cell: &Arc<KeysetCell>,
        mut request: Request,
        joining: Option<&Joining>,
        unconfirmed: &Option<Vec<UnconfirmedReplica>>,
    ) -> Result<Option<Outcome>, CommandError> {
        let mut writer = cell.writer.lock().await;
        let settled = self.settle(cell, &mut writer).await;
        let snapshot = cell.snapshot.load_full();
        if let Err(error) = settled
            && snapshot.frozen.is_none()
        {
            return Err(CommandError::Store { cause: chain(&error) });
        }
        if let Some(reason) = &snapshot.frozen {
            return Err(CommandError::Frozen { reason: reason.clone() });
        }
        if let Intent::Import(imported) = &mut request.intent {
            self.refuse_taken(cell, &imported.key)?;
            imported.key.private = match joining {
                Some(Joining::Private(material)) => {
                    Some(self.seal_imported(&snapshot.keyring, &imported.key, (**material).clone()).await?)
                }
                Some(Joining::Remote(found)) => Some(self.name_adopted(&snapshot.keyring, &imported.key, found)?),
                None => None,
            };
        }
        let mut facts = Facts { unconfirmed: unconfirmed.clone(), ..self.facts(cell, &snapshot) };
        if let Intent::Import(imported) = &request.intent {
            facts.room = u32::from(self.has_room_for(cell, &imported.key));
        }
        let before = snapshot.keyring.journal.clone();
        let (next, outcome) = match decide(&snapshot.keyring, &facts, &request)? {
            Decision::Replay(outcome) | Decision::Answer(outcome) => return Ok(Some(outcome)),
            Decision::Write { next, outcome } => (*next, outcome),
        };
        let entries: Vec<_> = next.journal.audit.iter().filter(|entry| entry.seq >= before.next_seq).cloned().collect();
        match self.commit(cell, &mut writer, next).await {
            Ok(()) => {}
            Err(CommitError::Overtaken) => {
                // Its answer may have been lost, and another replica have written after it: it is not to be done twice.
                let now = cell.snapshot.load_full().keyring.clone();
                let landed = !entries.is_empty() && entries.iter().all(|entry| now.journal.audit.contains(entry));
                return Ok(landed.then_some(outcome));
            }
            Err(CommitError::Ledger(error)) => return Err(CommandError::Store { cause: chain(&error) }),
            Err(CommitError::Signer(error)) => return Err(CommandError::Backend { cause: chain(&error) }),
        }
        if outcome.changes.iter().any(|change| change.to == KeyState::Active) {
            cell.metrics.rotated(trigger(&request.intent).into());
        }
        self.refresh_metrics(cell);
        cell.wake.notify_one();
        Ok(Some(outcome))
    }

    /// Seals imported material for the serial it is about to get.
    async fn seal_imported(
        &self,
        keyring: &Keyring,
        key: &NewKey,
        material: PrivateKeyMaterial,
    ) -> Result<PrivateHandle, CommandError> {
        let refused = |cause: String| CommandError::Refused(Refusal::ImportRefused { reason: cause });
        let importer = self.importer.as_ref().filter(|_| keyring.policy.backend == "local");
        let importer = importer.ok_or_else(|| {
            refused(format!("its keyset's backend is {}, which takes no private keys", keyring.policy.backend))
        })?;
        let identity = self.identity(keyring, keyring.next_serial);
        let work = importer.import(&identity, key.kid.clone(), key.algorithm, material);
        let created = match self.backend(&keyring.policy.backend) {
            Some(backend) => self.timed(backend, BackendOperation::Import, work).await,
            None => work.await,
        };
        let created = created.map_err(|error| refused(chain(&error)))?;
        Ok(PrivateHandle { backend: keyring.policy.backend.clone(), handle: created.handle })
    }

    /// Refers to an adopted key, for the serial it is about to get.
    fn name_adopted(
        &self,
        keyring: &Keyring,
        key: &NewKey,
        found: &RemoteFound,
    ) -> Result<PrivateHandle, CommandError> {
        let name = keyring.policy.backend.clone();
        let adopting =
            self.backend(&name).and_then(|backend| backend.adopts()).ok_or_else(|| takes_no_remote(&name))?;
        let handle = adopting.handle(&self.identity(keyring, keyring.next_serial), &key.kid, found);
        Ok(PrivateHandle { backend: name, handle })
    }

    /// A JWKS must not hold two keys of one kid (RFC 7517 §4.5).
    /// Nor may a key that another keyset revoked come back under another name.
    fn refuse_taken(&self, cell: &KeysetCell, new: &NewKey) -> Result<(), CommandError> {
        let directory = self.directory();
        let clashes = |key: &Key| key.state.is_published() && (key.kid == new.kid || key.public == new.public);
        let mut others = directory.keysets_of(&cell.issuer).filter(|other| other.name != cell.name);
        let taken = others.any(|other| {
            let keyring = other.snapshot.load().keyring.clone();
            keyring.has_revoked(&new.kid, &new.public) || keyring.keys.iter().any(clashes)
        });
        if taken { Err(CommandError::KidTaken { kid: new.kid.to_string() }) } else { Ok(()) }
    }
}

/// The private half of a key that joins.
enum Joining {
    /// Comes along and is sealed.
    Private(Box<PrivateKeyMaterial>),
    /// Stays where it is.
    Remote(RemoteFound),
}

fn takes_no_remote(backend: &str) -> CommandError {
    let reason = format!("its keyset's backend is {backend}, which has no keys of others to take over");
    CommandError::Refused(Refusal::ImportRefused { reason })
}

/// What may succeed later is not refused.
fn not_adopted(error: BackendError) -> CommandError {
    let cause = chain(&error);
    match error.kind {
        BackendErrorKind::Unavailable | BackendErrorKind::Timeout | BackendErrorKind::Throttled => {
            CommandError::Backend { cause }
        }
        _ => CommandError::Refused(Refusal::ImportRefused { reason: cause }),
    }
}

fn trigger(intent: &Intent) -> Trigger {
    match intent {
        Intent::Rollback => Trigger::Rollback,
        Intent::Revoke { .. } => Trigger::Revocation,
        Intent::Compromise => Trigger::Compromise,
        Intent::Import(_) => Trigger::Import,
        Intent::Rotate { .. } | Intent::Hold { .. } | Intent::Resume | Intent::Drain | Intent::Undrain => {
            Trigger::Operator
        }
    }
}
