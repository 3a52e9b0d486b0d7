//! Opening, and once in its life making, the store and the seal.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::AppError;
use super::access::{AccessError, Environment, fresh_token, process_environment};
use super::stores::{self, RawStore};
use crate::aws_kms::SdkKms;
use crate::clock::TrustedClock;
use crate::config::{Config, Initialise, ProcessRole, SealKey, SecretSource, StoreKind};
use crate::keyring::time::{Span, Timestamp};
use crate::seal::aws_kms::{AwsKmsKey, CallCounter};
use crate::seal::file::{FileKey, write_new};
use crate::seal::{KeyEncryptionKey, SealError};
use crate::store::ledger::{Initialisation, Ledger, LedgerError, SealEvidence, Site, Unauthenticated};
use crate::store::memory::MemoryStore;
use crate::store::relay::Relay;
use crate::store::traced::TracedStore;
use crate::store::{Document, Store, StoreError};

/// A shared store that cannot be opened at a start is tried again at these intervals.
const RETRY_MIN: Span = Span::from_millis(100);
const RETRY_MAX: Span = Span::from_secs(5);

/// What an initialisation made.
#[derive(Clone, Debug, Default)]
pub struct Initialised {
    /// Files that were made, for people.
    pub made: Vec<String>,
    /// There was nothing to do.
    pub already: bool,
}

/// A store as it is found at a start.
pub(super) enum Opened {
    /// Everything can be authenticated.
    Ledger(Ledger),
    /// The seal lives elsewhere and has not been asked yet.
    Sealed(Unauthenticated, Unsealing),
}

/// What opens a store whose seal lives elsewhere; may be tried again and again.
pub(super) struct Unsealing {
    store: Arc<dyn Store>,
    keys: Vec<Arc<dyn KeyEncryptionKey>>,
    /// Counts what the keys ask their service.
    pub(super) calls: Arc<CallCounter>,
    /// Nothing is initialised, and that may be done.
    initialise: bool,
}

impl Unsealing {
    fn new(config: &Config, store: Arc<dyn Store>, initialise: bool) -> Result<Self, AppError> {
        let calls = Arc::default();
        Ok(Unsealing { store, keys: keys(config, &calls)?, calls, initialise })
    }

    /// Opens the store, or initialises it; continues what an earlier attempt began.
    pub async fn attempt(&self, now: Timestamp) -> Result<Ledger, LedgerError> {
        let Some(primary) = self.keys.first().filter(|_| self.initialise) else {
            return Ledger::open(self.store.clone(), &self.keys).await;
        };
        let seal = async || Ok(primary.clone());
        Ledger::initialise(self.store.clone(), SealEvidence::Unknown, seal, now).await
    }
}

/// Opens what is initialised; initialises what is empty where the configuration allows it. Asks nobody elsewhere.
///
/// `served` gives the store that replicas fetch from, where there are any.
pub(super) async fn open(
    config: &Config,
    clock: &TrustedClock,
    environment: &Environment,
    served: impl FnOnce(Arc<dyn Store>) -> Served,
) -> Result<(Opened, Option<Arc<Relay>>), AppError> {
    let raw = RawStore::open(config, environment)?;
    let (store, relay) = served(raw.store.clone());
    let mut failures: u32 = 0;
    loop {
        let opened = async {
            // Copies stand in for a database that is away; its tables wait for the next start then.
            let prepared = raw.prepare(config).await;
            let opened = open_records(config, store.clone(), clock.now()).await?;
            match prepared {
                Err(error) if waits(config, &error) => {
                    tracing::warn!(error = %crate::engine::chain(&error), "the tables could not be looked after");
                    Ok(opened)
                }
                prepared => prepared.map(|()| opened),
            }
        };
        let error = match opened.await {
            Err(error) if raw.is_shared() && waits(config, &error) => error,
            opened => return Ok((opened?, relay)),
        };
        // Others may be about to initialise the store, or to start it again.
        tracing::error!(error = %crate::engine::chain(&error), failures, "the store cannot be opened; it is tried again");
        clock.clock().sleep(RETRY_MIN.times(1 << failures.min(6)).min(RETRY_MAX)).await;
        failures = failures.saturating_add(1);
    }
}

/// Whether a start waits until somebody else has mended it.
fn waits(config: &Config, error: &AppError) -> bool {
    match error {
        AppError::Ledger(LedgerError::NotInitialised { .. }) => config.role == ProcessRole::Signer,
        AppError::Ledger(error) => error.may_pass(),
        AppError::Store(error) => matches!(error, StoreError::Unavailable { .. }),
        _ => false,
    }
}

/// A store as the ledger uses it, and the relay in it.
pub(super) type Served = (Arc<dyn Store>, Option<Arc<Relay>>);

/// Puts a relay around the store where replicas fetch from this process.
pub(super) fn relayed(config: &Config, store: Arc<dyn Store>, clock: &Arc<TrustedClock>) -> Served {
    let store = if config.telemetry.traces.is_some() { Arc::new(TracedStore(store)) as Arc<dyn Store> } else { store };
    if config.replication.is_none() {
        return (store, None);
    }
    let relay = Arc::new(Relay::new(store, clock.clone()));
    (relay.clone(), Some(relay))
}

async fn open_records(config: &Config, store: Arc<dyn Store>, now: Timestamp) -> Result<Opened, AppError> {
    let evidence = seal_evidence(config)?;
    let remote = evidence == SealEvidence::Unknown;
    match Ledger::inspect(store.as_ref(), evidence).await? {
        Initialisation::Initialised if remote => {
            let claims = Unauthenticated::read(store.clone()).await?;
            Ok(Opened::Sealed(claims, Unsealing::new(config, store, false)?))
        }
        Initialisation::Initialised => Ok(Opened::Ledger(open_initialised(config, store).await?)),
        // `jwksd init` began and did not end; or it never ran.
        _ if config.store.initialise == Initialise::Never => {
            Err(LedgerError::NotInitialised { location: store.locate(&Document::Installation) }.into())
        }
        _ if remote => {
            announce(make_tokens(config)?);
            let claims = Unauthenticated::uninitialised(store.clone());
            Ok(Opened::Sealed(claims, Unsealing::new(config, store, true)?))
        }
        _ => {
            let (ledger, made) = make(config, store, evidence, now).await?;
            announce(made);
            Ok(Opened::Ledger(ledger))
        }
    }
}

fn announce(made: Vec<String>) {
    for made in made {
        tracing::info!("initialised: made {made}");
    }
}

/// `jwksd init`: makes store, seal and missing admin tokens, whatever `initialise` says. Repeating it changes nothing.
///
/// A seal key beside an empty file store speaks for a store that was lost, unless `existing_seal` says that it was there
/// first.
pub async fn initialise(config: &Config, existing_seal: bool, now: Timestamp) -> Result<Initialised, AppError> {
    let raw = RawStore::create(config, &process_environment()).await?;
    let evidence = match seal_evidence(config)? {
        // A seal that all replicas share is handed out before the store is made: its file says nothing of a lost store.
        SealEvidence::Exists if raw.is_shared() || existing_seal => SealEvidence::Unknown,
        evidence => evidence,
    };
    let store = raw.store;
    if Ledger::inspect(store.as_ref(), evidence).await? == Initialisation::Initialised {
        open_initialised(config, store).await?;
        let made = make_tokens(config)?;
        return Ok(Initialised { already: made.is_empty(), made });
    }
    let (_, made) = make(config, store, evidence, now).await?;
    Ok(Initialised { made, already: false })
}

/// Opens an initialised store with nobody else in it: for `reseal` and `recover`.
pub async fn open_for_maintenance(config: &Config) -> Result<Maintained, AppError> {
    let raw = RawStore::open_existing(config, &process_environment())?;
    Ok(Maintained { store: raw.store, keks: keys(config, &Arc::default())?, own: raw.own })
}

/// A store that nobody else in this machine uses.
pub struct Maintained {
    pub store: Arc<dyn Store>,
    /// The one that seals first.
    pub keks: Vec<Arc<dyn KeyEncryptionKey>>,
    /// Where this replica of a shared store keeps what it remembers, and the store there.
    pub own: Option<(PathBuf, Arc<dyn Store>)>,
}

/// Opens the store that is there and makes the one that its records are to move to: for `migrate`.
pub async fn open_for_migration(from: &Config, to: &Config) -> Result<(Site, Site), AppError> {
    let path = |config: &Config| config.store.file_path().map(|path| path.canonicalize().unwrap_or(path.clone()));
    if path(from).is_some() && path(from) == path(to) {
        return Err(AppError::Unfit(vec![format!(
            "store.path: both configurations name the store {}: name another one to move to",
            path(to).unwrap_or_default().display()
        )]));
    }
    if matches!(from.store.kind, StoreKind::Upstream(_)) {
        return Err(AppError::Unfit(vec![
            "store.kind: an upstream store holds nothing of its own: run this command with a manager's configuration"
                .to_owned(),
        ]));
    }
    let source = RawStore::open_existing(from, &process_environment())?;
    let (from, keks) = (Site { store: source.store, keks: keys(from, &Arc::default())? }, keys(to, &Arc::default())?);
    let target = RawStore::create(to, &process_environment()).await?;
    Ok((from, Site { store: target.store, keks }))
}

pub(super) async fn memory(
    now: Timestamp,
    served: impl FnOnce(Arc<dyn Store>) -> Served,
) -> Result<(Ledger, Option<Arc<Relay>>), AppError> {
    let (store, relay) = served(Arc::new(MemoryStore::new()));
    let make = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> {
        let key: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
        Ok(key)
    };
    Ok((Ledger::initialise(store, SealEvidence::Missing, make, now).await?, relay))
}

async fn open_initialised(config: &Config, store: Arc<dyn Store>) -> Result<Ledger, AppError> {
    Ok(Ledger::open(store, &keys(config, &Arc::default())?).await?)
}

/// The key-encryption keys of a configuration, the one that seals first. Keys elsewhere are not asked.
fn keys(config: &Config, calls: &Arc<CallCounter>) -> Result<Vec<Arc<dyn KeyEncryptionKey>>, AppError> {
    let mut kms = None;
    let mut keys: Vec<Arc<dyn KeyEncryptionKey>> = Vec::new();
    for (_, key) in config.seal.keys() {
        keys.push(match key {
            SealKey::File { path } => Arc::new(FileKey::load(path)?),
            SealKey::AwsKms { key_id } => {
                let api = kms.get_or_insert_with(|| Arc::new(SdkKms::new(config.aws_kms.clone())));
                Arc::new(AwsKmsKey::new(api.clone(), key_id).counted_by(calls))
            }
        });
    }
    Ok(keys)
}

async fn make(
    config: &Config,
    store: Arc<dyn Store>,
    evidence: SealEvidence,
    now: Timestamp,
) -> Result<(Ledger, Vec<String>), AppError> {
    // Before the store counts as initialised, after which nothing missing is made.
    let mut made = make_tokens(config)?;
    if let (SealKey::File { path }, SealEvidence::Missing) = (&config.seal.key, evidence) {
        made.push(format!("the seal key {}", path.display()));
    }
    let seal = async || -> Result<Arc<dyn KeyEncryptionKey>, SealError> {
        let key: Arc<dyn KeyEncryptionKey> = match &config.seal.key {
            SealKey::File { path } => Arc::new(FileKey::load_or_create(path)?),
            SealKey::AwsKms { key_id } => {
                Arc::new(AwsKmsKey::new(Arc::new(SdkKms::new(config.aws_kms.clone())), key_id))
            }
        };
        Ok(key)
    };
    let described = stores::describe(config, store.as_ref());
    let ledger = Ledger::initialise(store, evidence, seal, now).await?;
    made.push(format!("the store {described}"));
    Ok((ledger, made))
}

fn make_tokens(config: &Config) -> Result<Vec<String>, AppError> {
    let mut made = Vec::new();
    for path in missing_tokens(config) {
        let line = format!("{}\n", fresh_token());
        write_new(&path, line.as_bytes()).map_err(|source| AccessError::Create { path: path.clone(), source })?;
        made.push(format!("the admin token {}", path.display()));
    }
    Ok(made)
}

fn missing_tokens(config: &Config) -> Vec<PathBuf> {
    let tokens = config.admin.iter().flat_map(|admin| &admin.tokens);
    let files = tokens.filter_map(|token| match &token.source {
        SecretSource::File(path) => Some(path.clone()),
        SecretSource::Environment(_) => None,
    });
    files.filter(|path| !exists(path)).collect()
}

fn seal_evidence(config: &Config) -> Result<SealEvidence, SealError> {
    Ok(match &config.seal.key {
        SealKey::File { path } if FileKey::exists(path)? => SealEvidence::Exists,
        SealKey::File { .. } => SealEvidence::Missing,
        SealKey::AwsKms { .. } => SealEvidence::Unknown,
    })
}

/// Unreadable counts as there.
fn exists(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}
