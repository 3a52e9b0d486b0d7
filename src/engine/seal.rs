//! Life without the seal: records are served as the store claims them, until the seal opens and proves them or not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cell::{Directory, IssuerCell};
use super::reconcile::chain;
use super::snapshot::Wanted;
use super::start::{Gathered, Known, StartError};
use super::{Declared, Engine};
use crate::keyring::name::Name;
use crate::keyring::record::Keyring;
use crate::store::Store;
use crate::store::ledger::{Installation, Ledger, LedgerError, Unauthenticated};

impl Engine {
    /// Whether the seal has not been opened since the start: nothing is signed, changed or written.
    pub fn is_sealed(&self) -> bool {
        self.sealed.load(Ordering::SeqCst)
    }

    /// The ledger, once the seal is open.
    pub fn ledger(&self) -> Result<&Arc<Ledger>, LedgerError> {
        self.ledger.get().ok_or(LedgerError::Sealed)
    }

    /// The ledger, for what people ask for; only once everything was taken over.
    pub(super) fn writable(&self) -> Result<&Arc<Ledger>, LedgerError> {
        if self.is_sealed() { Err(LedgerError::Sealed) } else { self.ledger() }
    }

    /// The installation; as the store claims it while the seal is out of reach, `None` if it is not initialised either.
    pub fn installation(&self) -> Option<Arc<Installation>> {
        match (self.ledger(), self.claims.load_full()) {
            (Ok(ledger), _) => Some(ledger.installation()),
            (Err(_), claims) => claims.and_then(|claims| claims.installation().cloned()),
        }
    }

    /// The store, whether or not the seal is open.
    pub(super) fn store(&self) -> Option<Arc<dyn Store>> {
        match self.ledger() {
            Ok(ledger) => Some(ledger.store()),
            Err(_) => self.claims.load_full().map(|claims| claims.store()),
        }
    }

    /// What the store claims now that others wrote it, while the seal is out of reach.
    pub(super) async fn show_claims(self: &Arc<Self>) -> Result<(), LedgerError> {
        let Some(claims) = self.claims.load_full() else { return Ok(()) };
        let fresh = Unauthenticated::read(claims.store()).await?;
        self.claims.store(Some(Arc::new(fresh)));
        let declared = self.declared.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        if let Err(errors) = self.configure_sealed(&declared).await {
            for error in errors {
                tracing::error!(error = %chain(&error), "what the store claims now cannot be shown; what it claimed before is");
            }
        }
        Ok(())
    }

    /// Takes a configuration while the seal is out of reach: shows what is stored, without any signer, and writes
    /// nothing. What would refuse a start refuses it here too, as far as it can be seen.
    pub async fn configure_sealed(self: &Arc<Self>, declared: &[Declared]) -> Result<(), Vec<StartError>> {
        let _configuring = self.configuring.lock().await;
        if !self.is_sealed() {
            return Ok(()); // It was opened meanwhile.
        }
        let current = Directory { issuers: self.directory().issuers.clone(), ..Directory::default() };
        let Gathered { mut known, failures } = self.gather(declared, &current).await;
        if !failures.is_empty() {
            return Err(failures.into_iter().map(|(_, error)| error).collect());
        }
        *self.declared.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = declared.to_vec();
        let now = self.clock.now();
        for (position, new) in declared.iter().enumerate() {
            // Made known when the seal opens; until then it has a place, and no key.
            known.entry(new.name.clone()).or_insert_with(|| Known {
                unauthenticated: true,
                ..Known::running(without_keys(new, now), Wanted::Policy(new.policy.clone()), position)
            });
        }
        self.directory.store(Arc::new(self.build(known, &current)));
        for issuer in &self.directory().issuers {
            self.render(issuer);
        }
        Ok(())
    }

    /// The seal is open: every record is authenticated and what can be trusted goes on as after any start. A keyset
    /// whose record fails is not served any more.
    ///
    /// # Errors
    /// As [`configure`](Self::configure) while no listener is open. Later only what may pass: call it again.
    pub async fn unseal(self: &Arc<Self>, ledger: Arc<Ledger>, declared: &[Declared]) -> Result<(), Vec<StartError>> {
        let _configuring = self.configuring.lock().await;
        self.ledger.get_or_init(|| ledger);
        let claimed = self.directory();
        // Issuers go on as they are; keysets begin anew, so that nothing of what was only claimed is left.
        let current = Directory { issuers: claimed.issuers.clone(), ..Directory::default() };
        let Gathered { mut known, failures } = self.gather(declared, &current).await;
        let passing = failures.iter().any(|(_, error)| error.may_pass());
        if passing || (!failures.is_empty() && !self.is_open()) {
            return Err(failures.into_iter().map(|(_, error)| error).collect());
        }
        for (name, error) in failures {
            self.refuse(&mut known, &name, declared, &claimed, &error);
        }
        self.register_new(declared, &mut known, &current).await.map_err(|error| vec![error])?;
        let directory = self.build(known, &current);
        let begins = |issuer: &&Arc<IssuerCell>| self.is_open() && issuer.document.load().is_none();
        let beginning: Vec<_> = directory.issuers.iter().filter(begins).cloned().collect();
        beginning.iter().for_each(|issuer| issuer.withhold(true));
        self.directory.store(Arc::new(directory));
        self.keep_publication_times(&claimed).await;
        self.take_over(declared).await;
        for issuer in &self.directory().issuers {
            self.render(issuer);
        }
        self.remember(declared);
        self.forget_claims().await;
        self.resume().await;
        self.sealed.store(false, Ordering::SeqCst);
        if !beginning.is_empty() {
            self.begin(&beginning).await;
        }
        self.refresh_all_metrics();
        Ok(())
    }

    /// Issuers that never published begin behind open listeners as they would behind closed ones: all at once, when every
    /// keyset has what it can have.
    async fn begin(self: &Arc<Self>, issuers: &[Arc<IssuerCell>]) {
        self.reconcile_all().await;
        for issuer in issuers {
            issuer.withhold(false);
            self.rendered(issuer);
        }
        for cell in &self.directory().order {
            self.edit(cell, |shown| self.stamp(cell, shown)).await;
            cell.wake.notify_one();
        }
    }

    /// The installation's own record cannot be trusted, so no keyset can: nothing is served any more.
    pub async fn refuse_everything(&self, reason: &str) {
        let _configuring = self.configuring.lock().await;
        let reason: Arc<str> = reason.into();
        let directory = self.directory();
        for cell in &directory.order {
            self.edit(cell, |shown| {
                let mut empty = (*shown.keyring).clone();
                empty.keys.clear();
                shown.keyring = Arc::new(empty);
                shown.frozen = Some(reason.clone());
            })
            .await;
        }
        for issuer in &directory.issuers {
            self.render(issuer);
        }
        self.refresh_all_metrics();
    }

    /// What is not authentic loses its keys. An authentic record with a private key that does not open is only frozen:
    /// its public keys are right.
    fn refuse(
        &self,
        known: &mut BTreeMap<Name, Known>,
        name: &Name,
        declared: &[Declared],
        claimed: &Directory,
        error: &StartError,
    ) {
        let reason: Arc<str> = chain(error).into();
        if let (StartError::Key { .. }, Some(entry)) = (error, known.get_mut(name)) {
            tracing::error!(keyset = %name, error = %reason, "the keyset is frozen: what it published stays, nothing is written");
            entry.frozen = Some(reason);
            return;
        }
        tracing::error!(keyset = %name, error = %reason, "the keyset's record failed its check: its keys are not served any more");
        let declared = declared.iter().enumerate().find(|(_, declared)| declared.name == *name);
        let now = self.clock.now();
        let entry = match (declared, claimed.keysets.get(name)) {
            (Some((position, declared)), _) => {
                Known::running(without_keys(declared, now), Wanted::Policy(declared.policy.clone()), position)
            }
            (None, Some(cell)) => {
                let policy = cell.snapshot.load().keyring.policy.clone();
                let keyring = Keyring::new(name.clone(), String::new(), policy, false, now);
                Known::running(keyring, Wanted::Absent, usize::MAX)
            }
            (None, None) => return,
        };
        known.insert(name.clone(), Known { unauthenticated: true, frozen: Some(reason), ..entry });
    }

    /// A key was published from when it was shown, whether or not that was proved yet; if it is the same record.
    async fn keep_publication_times(&self, claimed: &Directory) {
        for cell in &self.directory().order {
            let Some(former) = claimed.keysets.get(&cell.name).map(|former| former.snapshot.load_full()) else {
                continue;
            };
            self.edit(cell, |shown| {
                if shown.keyring == former.keyring {
                    shown.published.clone_from(&former.published);
                    shown.stopped.clone_from(&former.stopped);
                }
            })
            .await;
        }
    }
}

fn without_keys(declared: &Declared, now: crate::keyring::time::Timestamp) -> Keyring {
    Keyring::new(declared.name.clone(), String::new(), (*declared.policy).clone(), false, now)
}
