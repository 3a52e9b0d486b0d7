//! Operators' requests to the daemon as a whole: kept, as a keyset's are, in the record of what they concern.

use std::future::Future;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use super::Engine;
use super::command::CommandError;
use super::reconcile::chain;
use crate::keyring::decide::{Idempotency, Refusal};
use crate::keyring::record::Journal;
use crate::keyring::time::Timestamp;
use crate::store::ledger::{Amended, Ledger};

/// Who asks for something that concerns no single keyset, why and how.
#[derive(Clone, Debug)]
pub struct WholeRequest {
    pub actor: String,
    pub reason: Option<String>,
    pub dry_run: bool,
    /// `If-Match`: only if the installation's record still has one of these generations.
    pub if_generation: Option<Vec<u64>>,
    pub idempotency: Option<Idempotency>,
}

/// What came of accepting the clock.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct ClockAnswer {
    pub action: &'static str,
    pub dry_run: bool,
    /// Of the installation's record, after the write.
    pub generation: u64,
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Whether it was frozen before.
    pub was_frozen: bool,
}

impl Engine {
    /// An operator accepts the clock as it is. The audit entry is durable before anything moves; the answer is kept after
    /// that, so that whoever repeats a request that a crash cut off has it carried out.
    ///
    /// # Errors
    /// Refused, or the installation's record could not be written. Repeat it with the same Idempotency-Key.
    pub async fn accept_clock(&self, request: &WholeRequest) -> Result<Value, CommandError> {
        let ledger = self.open_ledger()?;
        let _turn = self.turn.lock().await;
        self.look_at_installation().await;
        if let Some(answer) = self.answered(request)? {
            return Ok(answer);
        }
        let (dry_run, was_frozen) = (request.dry_run, self.clock.read().frozen);
        let mut at = self.clock.now();
        if was_frozen && !dry_run {
            let wall = self.clock.clock().wall();
            self.amend(request.if_generation.as_deref(), |journal, _| note(journal, wall, "clock-accept", request))
                .await?;
            at = self.thaw();
        }
        let answer = |generation| ClockAnswer { action: "clock-accept", dry_run, generation, at, was_frozen };
        if dry_run || request.idempotency.is_none() {
            return Ok(value(&answer(ledger.generation())));
        }
        // Where nothing was frozen this is the first write.
        let expected = request.if_generation.as_deref().filter(|_| !was_frozen);
        let remember = |journal: &mut Journal, generation| {
            journal.remember(request.idempotency.as_ref(), value(&answer(generation)), at);
        };
        let generation = self.amend(expected, remember).await?;
        Ok(value(&answer(generation)))
    }

    /// Has the configuration re-read by `reload` and writes that down. `answer` makes the answer from what came of it and
    /// the generation of the installation's record.
    ///
    /// # Errors
    /// Refused, before anything was re-read; or, only with an Idempotency-Key, its answer could not be kept.
    pub async fn reload_as<T, E>(
        &self,
        request: &WholeRequest,
        reload: impl Future<Output = Result<T, E>>,
        answer: impl Fn(&T, u64) -> Value,
    ) -> Result<Result<Value, E>, CommandError> {
        let ledger = self.open_ledger()?;
        let _turn = self.turn.lock().await;
        self.look_at_installation().await;
        if let Some(answer) = self.answered(request)? {
            return Ok(Ok(answer));
        }
        let reloaded = match reload.await {
            Ok(reloaded) => reloaded,
            Err(errors) => return Ok(Err(errors)),
        };
        let at = self.clock.now();
        let noted = self.amend(None, |journal, generation| {
            note(journal, at, "reload", request);
            journal.remember(request.idempotency.as_ref(), answer(&reloaded, generation), at);
        });
        let generation = match noted.await {
            Ok(generation) => generation,
            // It has happened, whatever becomes of the record of it.
            Err(error) if request.idempotency.is_none() => {
                tracing::error!(error = %chain(&error), "the reload could not be written into the audit log");
                ledger.generation()
            }
            Err(error) => return Err(error),
        };
        Ok(Ok(answer(&reloaded, generation)))
    }

    /// The answer that the same request got before; refuses what is not to be carried out.
    fn answered(&self, request: &WholeRequest) -> Result<Option<Value>, CommandError> {
        let ledger = self.open_ledger()?;
        let installation = ledger.installation();
        if let Some(answer) = installation.journal.replay(request.idempotency.as_ref(), self.clock.now())? {
            return Ok(Some(answer.clone()));
        }
        let current = ledger.generation();
        match &request.if_generation {
            Some(expected) if !expected.contains(&current) => Err(Refusal::GenerationMismatch { current }.into()),
            _ => Ok(None),
        }
    }

    /// Another replica may have answered the same request.
    async fn look_at_installation(&self) {
        if let Ok(ledger) = self.ledger()
            && self.is_shared()
            && let Err(error) = ledger.refresh().await
        {
            tracing::warn!(error = %chain(&error), "what other replicas wrote could not be looked at");
        }
    }

    fn open_ledger(&self) -> Result<&Arc<Ledger>, CommandError> {
        if self.is_reader() {
            return Err(CommandError::ReadOnly);
        }
        self.writable().map_err(|_| CommandError::Sealed)
    }

    async fn amend(&self, expected: Option<&[u64]>, amend: impl Fn(&mut Journal, u64)) -> Result<u64, CommandError> {
        match self.open_ledger()?.amend_journal(expected, amend).await {
            Ok(Amended::At { generation }) => Ok(generation),
            Ok(Amended::MovedOn { current }) => Err(Refusal::GenerationMismatch { current }.into()),
            Err(error) => Err(CommandError::Store { cause: chain(&error) }),
        }
    }
}

fn note(journal: &mut Journal, at: Timestamp, action: &str, request: &WholeRequest) {
    journal.note(at, action, &request.actor, request.reason.as_deref(), [], None);
    journal.tidy(at);
}

fn value(answer: &impl Serialize) -> Value {
    serde_json::to_value(answer).unwrap_or_default()
}
