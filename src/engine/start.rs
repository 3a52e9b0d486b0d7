//! From stored records and a configuration to a directory of keysets; also at a reload.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{Mutex, Notify};

use super::cell::{Directory, IssuerCell, KeysetCell, RemoteHealth, Route, RouteKind, SigningPool, Writer};
use super::following::load_current;
use super::reconcile::chain;
use super::side_by_side::side_by_side;
use super::snapshot::{KeysetSnapshot, Wanted};
use super::{Declared, Engine};
use crate::backend::BackendErrorKind;
use crate::keyring::change::Change;
use crate::keyring::claims::TokenRules;
use crate::keyring::name::Name;
use crate::keyring::policy::{Discovery, IssuerPolicy};
use crate::keyring::record::Keyring;
use crate::store::ledger::{KeysetState, LedgerError, Loaded};

/// Why the daemon does not start, or a new configuration is not taken.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("keyset {keyset}: key {serial} of its keyring cannot be opened: {cause}. See docs/restore.md")]
    Key { keyset: Name, serial: u64, cause: String },
    #[error(
        "keyset.{keyset}: its keys are published for the issuer {stored}, the configuration says {configured}: put the former issuer back, run `jwksd drain {keyset}`, and change it once its keys have retired"
    )]
    IssuerChanged { keyset: Name, stored: String, configured: String },
    #[error("keyset.{keyset} is new and its configuration breaks a rule of timing; see the messages of `jwksd check`")]
    NewDoesNotFit { keyset: Name },
    #[error(
        "keyset {keyset}, which is gone from the configuration, is published at {path} for {url}; the configuration uses that path for another issuer"
    )]
    PathTaken { keyset: Name, path: String, url: String },
}

impl StartError {
    /// Whether another configuration would be taken: what is stored is not at fault.
    pub fn is_configuration(&self) -> bool {
        match self {
            StartError::IssuerChanged { .. } | StartError::NewDoesNotFit { .. } | StartError::PathTaken { .. } => true,
            StartError::Ledger(_) | StartError::Key { .. } => false,
        }
    }

    /// Whether trying again later, without anybody doing anything, can help.
    pub fn may_pass(&self) -> bool {
        matches!(self, StartError::Ledger(error) if error.may_pass())
    }
}

/// A keyset about to become a cell.
pub(super) struct Known {
    pub stored: Option<Loaded>,
    pub keyring: Arc<Keyring>,
    pub wanted: Wanted,
    pub position: usize,
    /// Nobody has proved the keyring: the seal is out of reach, or the check failed.
    pub unauthenticated: bool,
    /// Why nothing is to be written.
    pub frozen: Option<Arc<str>>,
}

/// Every keyset of the configuration and of the store.
#[derive(Default)]
pub(super) struct Gathered {
    pub known: BTreeMap<Name, Known>,
    /// Those that cannot be taken, and why.
    pub failures: Vec<(Name, StartError)>,
}

impl Engine {
    /// Takes a configuration: loads what is stored, registers what is new, keeps what runs. Nothing changes on error.
    pub async fn configure(self: &Arc<Self>, declared: &[Declared]) -> Result<(), Vec<StartError>> {
        let _configuring = self.configuring.lock().await;
        self.configure_with(declared).await?;
        self.remember(declared);
        Ok(())
    }

    /// What the configuration says, and what stood in the store when it was taken.
    pub(super) fn remember(&self, declared: &[Declared]) {
        let positions = positions(declared);
        for cell in &self.directory().order {
            let declared = positions.get(&cell.name).map(|at| &declared[*at].policy);
            let stored = &cell.snapshot.load().keyring.policy;
            // Mostly they are the same, and one copy serves both.
            let same = declared.filter(|declared| ***declared == *stored).cloned();
            cell.base.store(Some(same.unwrap_or_else(|| Arc::new(stored.clone()))));
            // A pass since the configuration was taken may have found it superseded by what was stored before.
            cell.wake.notify_one();
        }
        *self.declared.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = declared.to_vec();
        self.settle_tolerance();
        self.completeness_changed();
    }

    /// Takes the configuration again, since another replica changed which keysets there are, or where they are served.
    pub(super) async fn rebuild(self: &Arc<Self>) -> Result<(), LedgerError> {
        let _configuring = self.configuring.lock().await;
        let mut declared = self.declared.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let installation = self.ledger()?.installation();
        // Only whoever configures a keyset registers or moves it.
        declared.retain(|declared| {
            let entry = installation.keysets.get(&declared.name);
            entry.is_some_and(|entry| entry.issuer == declared.policy.issuer.url)
        });
        if let Err(errors) = self.configure_with(&declared).await {
            let mut passing = None;
            for error in errors {
                tracing::error!(error = %chain(&error), "what another replica wrote does not go with the configuration here; what ran before goes on");
                if let StartError::Ledger(error) = error {
                    passing = passing.or(Some(error).filter(LedgerError::may_pass));
                }
            }
            return passing.map_or(Ok(()), Err);
        }
        for cell in &self.directory().order {
            if cell.base.load().is_none() {
                cell.base.store(Some(Arc::new(cell.snapshot.load().keyring.policy.clone())));
            }
        }
        self.schedule();
        Ok(())
    }

    async fn configure_with(self: &Arc<Self>, declared: &[Declared]) -> Result<(), Vec<StartError>> {
        if self.is_sealed() {
            return Err(vec![LedgerError::Sealed.into()]);
        }
        let current = self.directory();
        let Gathered { mut known, failures } = self.gather(declared, &current).await;
        if !failures.is_empty() {
            return Err(failures.into_iter().map(|(_, error)| error).collect());
        }
        self.register_new(declared, &mut known, &current).await.map_err(|error| vec![error])?;
        let directory = self.build(known, &current);
        self.directory.store(Arc::new(directory));
        self.take_over(declared).await;
        self.settle_tolerance();
        self.completeness_changed();
        self.reconfigured.notify_one();
        Ok(())
    }

    /// Loads every keyset and finds what speaks against taking it.
    pub(super) async fn gather(self: &Arc<Self>, declared: &[Declared], current: &Directory) -> Gathered {
        let mut gathered = self.load_all(declared, current).await;
        let Gathered { known, failures } = &mut gathered;
        for declared in declared {
            if let Some(entry) = known.get(&declared.name)
                && let Some(error) = contradiction(declared, &entry.keyring)
            {
                failures.push((declared.name.clone(), error));
            }
        }
        let new = known.iter().filter(|(name, entry)| !current.keysets.contains_key(*name) && !entry.unauthenticated);
        let new: Vec<Arc<Keyring>> = new.map(|(_, entry)| entry.keyring.clone()).collect();
        let opened = side_by_side(new, |keyring| {
            let engine = self.clone();
            async move { (keyring.keyset.clone(), engine.unreadable_keys(&keyring).await) }
        });
        for (name, errors) in opened.await {
            failures.extend(errors.into_iter().map(|error| (name.clone(), error)));
        }
        failures.extend(contested_paths(known, declared));
        gathered
    }

    async fn load_all(self: &Arc<Self>, declared: &[Declared], current: &Directory) -> Gathered {
        let listed: Vec<Name> =
            self.installation().map(|stored| stored.keysets.keys().cloned().collect()).unwrap_or_default();
        let names: BTreeSet<Name> = listed.into_iter().chain(declared.iter().map(|d| d.name.clone())).collect();
        let positions = positions(declared);
        let Gathered { mut known, mut failures } = Gathered::default();
        let mut stored = Vec::new();
        for name in names {
            let position = positions.get(&name).copied();
            let unlisted = if self.is_reader() { Wanted::Stored } else { Wanted::Absent };
            let wanted = position.map_or(unlisted, |at| match declared[at].fits {
                true => Wanted::Policy(declared[at].policy.clone()),
                false => Wanted::Degraded,
            });
            let position = position.unwrap_or(usize::MAX);
            if !self.uses(&name) {
                continue;
            }
            let running = current.keysets.get(&name).filter(|cell| !cell.moved.load(Ordering::Relaxed));
            if let Some(cell) = running {
                let keyring = cell.snapshot.load_full().keyring.clone();
                known.insert(name, Known::running(keyring, wanted, position));
                continue;
            }
            stored.push((name, wanted, position));
        }
        let loaded = side_by_side(stored, |(name, wanted, position)| {
            let engine = self.clone();
            async move { (engine.load(&name).await, name, wanted, position) }
        });
        for (loaded, name, wanted, position) in loaded.await {
            match loaded {
                Ok(None) => {}
                Ok(Some((keyring, stored))) => {
                    let unauthenticated = stored.is_none();
                    let entry = Known { stored, unauthenticated, ..Known::running(keyring, wanted, position) };
                    known.insert(name, entry);
                }
                Err(error) => failures.push((name, error.into())),
            }
        }
        let old = |d: &Declared| {
            known.get(&d.name).is_some_and(|k: &Known| k.keyring.policy.issuer.url == d.policy.issuer.url)
        };
        for declared in declared.iter().filter(|d| !d.fits && !old(d)) {
            let name = declared.name.clone();
            failures.push((name.clone(), StartError::NewDoesNotFit { keyset: name }));
        }
        Gathered { known, failures }
    }

    /// Whether this process takes part in a keyset.
    pub(super) fn uses(&self, name: &Name) -> bool {
        self.ledger().map_or(true, |ledger| ledger.uses(name))
    }

    /// A keyring from the ledger; while there is none, as the store claims it.
    async fn load(&self, name: &Name) -> Result<Option<(Arc<Keyring>, Option<Loaded>)>, LedgerError> {
        match (self.ledger(), self.claims.load_full()) {
            (Err(_), Some(claims)) => Ok(claims.load(name).await?.map(|keyring| (Arc::new(keyring), None))),
            (ledger, _) => {
                let loaded = load_current(ledger?, name, |_| Ok(())).await?;
                Ok(loaded.map(|loaded| (loaded.keyring.clone(), Some(loaded))))
            }
        }
    }

    /// Unreadable is not absent: every private key the keyring relies on must open, not only today's.
    async fn unreadable_keys(&self, keyring: &Keyring) -> Vec<StartError> {
        let mut errors = Vec::new();
        for key in keyring.published().filter(|key| key.private.is_some()) {
            if let Err(error) = self.open(keyring, key).await
                && matches!(error.kind, BackendErrorKind::Unreadable)
            {
                let cause = chain(&error);
                errors.push(StartError::Key { keyset: keyring.keyset.clone(), serial: key.serial, cause });
            }
        }
        errors
    }

    pub(super) async fn register_new(
        &self,
        declared: &[Declared],
        known: &mut BTreeMap<Name, Known>,
        current: &Directory,
    ) -> Result<(), StartError> {
        if self.is_reader() {
            return Ok(());
        }
        let moved =
            |d: &&Declared| known.get(&d.name).is_none_or(|k| k.keyring.policy.issuer.url != d.policy.issuer.url);
        let new: Vec<&Declared> = declared.iter().filter(moved).collect();
        if new.is_empty() {
            return Ok(());
        }
        let now = self.clock.now();
        let names: Vec<(Name, String)> = new.iter().map(|d| (d.name.clone(), d.policy.issuer.url.clone())).collect();
        let ledger = self.ledger()?;
        let registrations = ledger.register(&names, now).await?;
        let positions = positions(declared);
        for registration in registrations {
            let Some(position) = positions.get(&registration.name).copied() else { continue };
            let policy = &declared[position].policy;
            match known.get_mut(&registration.name) {
                Some(entry) => {
                    let change = Change::Restart { policy: Box::new((**policy).clone()), first: registration.first };
                    // Nobody else writes it meanwhile, and the cell of the former issuer never again.
                    let former = current.keysets.get(&registration.name);
                    let _writer = match former {
                        Some(cell) => Some(cell.writer.lock().await),
                        None => None,
                    };
                    let stored = ledger.load(&registration.name).await?;
                    let base = stored.as_ref().map_or(&entry.keyring, |stored| &stored.keyring);
                    let next = Arc::new(base.after(&change, now));
                    entry.stored = Some(ledger.save_shared(stored.as_ref(), &next).await?);
                    entry.keyring = next;
                    if let Some(cell) = former {
                        let mut ended = (*cell.snapshot.load_full()).clone();
                        ended.frozen = Some("the keyset has moved to another issuer".into());
                        cell.snapshot.store(Arc::new(ended));
                    }
                }
                None => {
                    let keyring = Keyring::new(
                        registration.name.clone(),
                        registration.lineage.clone(),
                        (**policy).clone(),
                        registration.first,
                        now,
                    );
                    let wanted = Wanted::Policy(policy.clone());
                    known.insert(registration.name, Known::running(keyring, wanted, position));
                }
            }
        }
        Ok(())
    }

    pub(super) fn build(&self, known: BTreeMap<Name, Known>, current: &Directory) -> Directory {
        let mut issuers: HashMap<String, Arc<IssuerCell>> = HashMap::new();
        let running: HashMap<&str, &Arc<IssuerCell>> =
            current.issuers.iter().map(|issuer| (issuer.url.as_str(), issuer)).collect();
        let mut directory = Directory::default();
        let mut ordered: Vec<(Name, Known)> = known.into_iter().collect();
        ordered.sort_by_key(|(_, known)| known.position);
        for (name, known) in ordered {
            let policy = known.issuer().clone();
            let served = known.is_served();
            let issuer = issuers.entry(policy.url.clone()).or_insert_with(|| {
                let existing = running.get(policy.url.as_str()).map(|issuer| Arc::clone(issuer));
                let issuer = existing.unwrap_or_else(|| {
                    Arc::new(IssuerCell::new(policy.clone(), self.metrics.register_issuer(&policy.name)))
                });
                issuer.policy.store(Arc::new(policy.clone()));
                let adopted = known.keyring.policy.issuer.probes == policy.probes;
                issuer.probes().follow(&policy, adopted, self.clock.boot().as_millis());
                directory.issuers.push(issuer.clone());
                issuer
            });
            let issuer = issuer.clone();
            let existing = current.keysets.get(&name).filter(|cell| Arc::ptr_eq(&cell.issuer, &issuer));
            let cell = match existing {
                Some(cell) => {
                    cell.position.store(known.position, Ordering::Relaxed);
                    cell.clone()
                }
                None => self.cell(name.clone(), issuer.clone(), known),
            };
            if served {
                for (path, kind) in paths(&policy) {
                    directory.routes.insert(path, Route { issuer: cell.issuer.clone(), kind });
                }
            }
            directory.push(cell);
        }
        directory
    }

    fn cell(&self, name: Name, issuer: Arc<IssuerCell>, known: Known) -> Arc<KeysetCell> {
        let policy = &known.keyring.policy;
        let backend = self.signing_backend(&known.keyring);
        let metrics = self.metrics.register_keyset(&name, policy.algorithm, backend, &policy.issuer.name);
        let signing = metrics.signing(policy.algorithm, backend);
        Arc::new(KeysetCell {
            position: AtomicUsize::new(known.position),
            issuer,
            snapshot: ArcSwap::from_pointee(KeysetSnapshot {
                rules: Arc::new(TokenRules::new(&policy.issuer.url, &policy.tokens)),
                keyring: known.keyring.clone(),
                desired: known.wanted,
                active: None,
                published: BTreeMap::new(),
                stopped: BTreeMap::new(),
                backoff: BTreeMap::new(),
                frozen: known.frozen,
                thaws: false,
                unauthenticated: known.unauthenticated,
                store_failing: false,
            }),
            metrics,
            signing_metrics: ArcSwap::from_pointee(signing),
            pool: SigningPool::new(self.settings.load().pool_size),
            remote: RemoteHealth::default(),
            writer: Mutex::new(Writer { stored: known.stored, unsettled: None }),
            wake: Notify::new(),
            uncertain: AtomicBool::new(false),
            confirmed: AtomicI64::new(if self.is_shared() { self.following.confirmed() } else { i64::MAX }),
            read: AtomicI64::new(if self.is_shared() { self.following.read() } else { i64::MAX }),
            behind: AtomicBool::new(false),
            moved: AtomicBool::new(false),
            leads: AtomicBool::new(false),
            gives_way_until: AtomicI64::new(0),
            base: ArcSwapOption::empty(),
            laggards: std::sync::Mutex::default(),
            name,
        })
    }

    /// Shows every keyring under the new directory and tells each keyset what is wanted of it now.
    pub(super) async fn take_over(self: &Arc<Self>, declared: &[Declared]) {
        let directory = self.directory();
        let positions = positions(declared);
        let mut cells = Vec::with_capacity(directory.order.len());
        for cell in &directory.order {
            let wanted = match positions.get(&cell.name).map(|at| &declared[*at]) {
                Some(d) if d.fits => Wanted::Policy(d.policy.clone()),
                Some(_) => Wanted::Degraded,
                None if self.is_reader() => Wanted::Stored,
                None => Wanted::Absent,
            };
            self.want(cell, wanted).await;
            cells.push(cell.clone());
        }
        let shown = side_by_side(cells, |cell| {
            let engine = self.clone();
            async move { engine.show_stored(&cell).await }
        });
        shown.await;
    }

    /// Shows what is known to be stored, with its signer.
    async fn show_stored(&self, cell: &Arc<KeysetCell>) {
        let _writer = cell.writer.lock().await;
        let snapshot = cell.snapshot.load_full();
        let keyring = snapshot.keyring.clone();
        if keyring.drained && snapshot.is_to_sign() {
            tracing::warn!(keyset = %cell.name, "{DRAINED}");
        }
        if keyring.generation > 0 {
            // A failure to open is retried, and reported, by reconciliation.
            let signer = self.ready_signer(cell, &keyring).await.ok().flatten();
            self.show(cell, keyring, signer);
        }
    }

    /// What is worth saying of a configuration that was taken, given what is stored.
    pub fn remarks(&self) -> Vec<String> {
        let directory = self.directory();
        let drained = directory.order.iter().filter(|cell| {
            let snapshot = cell.snapshot.load();
            snapshot.keyring.drained && snapshot.is_to_sign()
        });
        drained.map(|cell| format!("keyset.{}: {DRAINED}", cell.name)).collect()
    }

    /// Keysets of a new issuer that could not get their first key, or are not configured any more, begin like any other:
    /// the rest of the issuer does not wait for them.
    pub async fn give_up_first_keys(&self) {
        let (true, Ok(ledger)) = (self.is_shared() && !self.is_reader() && !self.is_sealed(), self.ledger()) else {
            return;
        };
        let directory = self.directory();
        let begun =
            |name: &Name| directory.keysets.get(name).is_some_and(|cell| cell.snapshot.load().keyring.generation > 0);
        let installation = ledger.installation();
        let open = installation.keysets.iter().filter(|(_, entry)| entry.first && entry.state == KeysetState::Creating);
        let waiting: Vec<Name> = open.map(|(name, _)| name).filter(|name| !begun(name)).cloned().collect();
        if waiting.is_empty() {
            return;
        }
        if let Err(error) = ledger.begin_later(&waiting).await {
            tracing::error!(error = %chain(&error), "keysets without a first key keep their issuer back; it is tried again at the next start");
            return;
        }
        for name in &waiting {
            tracing::warn!(keyset = %name, "the keyset has no first key; its issuer goes on without it, and its first key will wait for propagation");
        }
        self.begin_as_registered().await;
        self.completeness_changed();
    }

    /// Whether a keyset that was not written yet is a first one is the installation's to tell.
    pub(super) async fn begin_as_registered(&self) {
        let Some(installation) = self.installation() else { return };
        for cell in &self.directory().order {
            let first = installation.keysets.get(&cell.name).is_some_and(|entry| entry.first);
            let keyring = cell.snapshot.load().keyring.clone();
            if keyring.generation == 0 && keyring.first && !first {
                self.edit(cell, |shown| shown.keyring = Arc::new(Keyring { first, ..(*keyring).clone() })).await;
            }
        }
    }

    /// Marks in the installation that every keyset has its keyring, so that a missing one is noticed.
    pub async fn confirm_created(&self) -> Result<(), LedgerError> {
        if self.is_sealed() || self.is_reader() || !self.unconfirmed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let directory = self.directory();
        let stored = directory.order.iter().filter(|cell| cell.snapshot.load().keyring.generation > 0);
        let ledger = self.ledger()?;
        let installation = ledger.installation();
        let creating =
            |name: &&Name| installation.keysets.get(*name).is_some_and(|entry| entry.state == KeysetState::Creating);
        let names: Vec<Name> = stored.map(|cell| &cell.name).filter(creating).cloned().collect();
        if names.is_empty() {
            return Ok(());
        }
        ledger.created(&names).await.inspect_err(|_| self.unconfirmed.store(true, Ordering::Relaxed))
    }
}

/// Said of a keyset that an operator drained and the configuration wants.
const DRAINED: &str =
    "the keyset is configured, but was drained: it signs no more until `jwksd drain --undo` lets it, or it is removed";

/// Where each keyset stands in the configuration.
fn positions(declared: &[Declared]) -> HashMap<&Name, usize> {
    declared.iter().enumerate().map(|(at, declared)| (&declared.name, at)).collect()
}

/// What a configuration must not say of an existing keyring.
fn contradiction(declared: &Declared, keyring: &Keyring) -> Option<StartError> {
    let (stored, configured) = (&keyring.policy.issuer.url, &declared.policy.issuer.url);
    let moved = stored != configured && keyring.published().next().is_some();
    moved.then(|| StartError::IssuerChanged {
        keyset: declared.name.clone(),
        stored: stored.clone(),
        configured: configured.clone(),
    })
}

/// Paths that two issuers would serve.
fn contested_paths(known: &BTreeMap<Name, Known>, declared: &[Declared]) -> Vec<(Name, StartError)> {
    let mut takers: HashMap<String, (String, Name)> = HashMap::new();
    let mut errors = Vec::new();
    let stored = known.iter().filter(|(_, known)| known.is_served()).map(|(name, known)| (name, known.issuer()));
    let new = declared.iter().filter(|d| !known.contains_key(&d.name)).map(|d| (&d.name, &d.policy.issuer));
    for (name, issuer) in stored.chain(new) {
        for (path, _) in paths(issuer) {
            match takers.get(&path) {
                Some((url, _)) if *url != issuer.url => {
                    let (keyset, url) = (name.clone(), issuer.url.clone());
                    errors.push((keyset.clone(), StartError::PathTaken { keyset, path, url }));
                }
                _ => _ = takers.insert(path, (issuer.url.clone(), name.clone())),
            }
        }
    }
    errors
}

/// Where an issuer's documents are served.
pub(super) fn paths(policy: &IssuerPolicy) -> Vec<(String, RouteKind)> {
    let path = policy.path();
    let mut paths = vec![(policy.jwks_path(), RouteKind::Jwks)];
    paths.extend(policy.jwks_paths.iter().map(|path| (path.clone(), RouteKind::Jwks)));
    if policy.discovery == Discovery::Minimal {
        paths.push((format!("{path}/.well-known/openid-configuration"), RouteKind::Discovery));
        // RFC 8414 §3.1 puts the well-known part before the issuer's path.
        paths.push((format!("/.well-known/oauth-authorization-server{path}"), RouteKind::Discovery));
    }
    paths
}

impl Known {
    /// As what runs already, or is about to for the first time.
    pub fn running(keyring: impl Into<Arc<Keyring>>, wanted: Wanted, position: usize) -> Self {
        Known { stored: None, keyring: keyring.into(), wanted, position, unauthenticated: false, frozen: None }
    }

    fn issuer(&self) -> &IssuerPolicy {
        match &self.wanted {
            Wanted::Policy(policy) => &policy.issuer,
            Wanted::Degraded | Wanted::Absent | Wanted::Stored => &self.keyring.policy.issuer,
        }
    }

    /// A keyset that ended for good claims no path.
    fn is_served(&self) -> bool {
        let ended = self.keyring.drained && self.keyring.published().next().is_none();
        !(ended && self.wanted == Wanted::Absent)
    }
}
