//! The composition root: the only place that wires adapters to ports, and runs what it wired.

mod access;
mod herald;
pub mod leftovers;
mod notices;
mod publishers;
mod reload;
mod storage;
mod stores;
mod unfit;
mod unseal;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::aws_kms::{AWS_KMS, SdkKms};
use crate::backend::Backend;
use crate::backend::aws_kms::AwsKmsBackend;
use crate::backend::local::{ImportPrivate, LocalBackend};
use crate::clock::{Clock, SystemClock, TrustedClock};
use crate::config::{Address, Config, Listener, Loaded, ProcessRole, Source};
use crate::engine::probes::HttpsFetch;
use crate::engine::{Declared, Engine, Records, ReplicaRole, Settings, StartError};
use crate::http::access::AccessLog;
use crate::http::admin::AdminState;
use crate::http::listener::{BindError, BoundListener, ListenAddress, ListenerOptions, raise_open_file_limit};
use crate::http::middleware::{HostPolicy, Routes, guard_host};
use crate::http::ops::OpsState;
use crate::http::replication::{MOST_CONNECTIONS, ReplicationState};
use crate::http::signer::SignerState;
use crate::http::tls::{ClientCertificates, Tls, TlsError, TlsFiles};
use crate::keyring::time::{Span, Timestamp};
use crate::memory;
use crate::seal::data_keys::LateDataKeys;
use crate::store::ledger::LedgerError;
use crate::store::relay::Relay;
use crate::store::wire::LONGEST_REPORT;
use crate::systemd::Systemd;
use crate::telemetry::metrics::Metrics;

use unfit::Unfit;

pub use access::{AccessError, fresh_token};
pub use notices::webhooks;
pub use storage::{Initialised, Maintained, initialise, open_for_maintenance, open_for_migration};

/// Why the daemon did not start, or ended with a failure.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Seal(#[from] crate::seal::SealError),
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    #[error(transparent)]
    Upstream(#[from] crate::store::upstream::OpenError),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("{}", .0.join("\n"))]
    Start(Vec<String>),
    /// Another configuration would start.
    #[error("{}", .0.join("\n"))]
    Unfit(Vec<String>),
    #[error("{} is not initialised: run `jwksd init`, or set [store] initialise = \"if-empty\"", .path.display())]
    NotInitialised { path: PathBuf },
    #[error("a listener ended by itself; the log says why")]
    ListenerEnded,
    #[error("the start was aborted")]
    Aborted(#[source] tokio::task::JoinError),
    #[error("the process cannot be told to stop: {0}")]
    Signals(std::io::Error),
}

impl AppError {
    /// Whether the configuration is at fault: nothing helps but another one.
    pub fn is_configuration(&self) -> bool {
        matches!(self, AppError::Unfit(_) | AppError::Tls(_) | AppError::Access(_) | AppError::Upstream(_))
    }
}

fn refused(errors: Vec<StartError>, loaded: &Loaded) -> AppError {
    let unfit = errors.iter().all(StartError::is_configuration);
    let told = explained(errors, loaded);
    if unfit { AppError::Unfit(told) } else { AppError::Start(told) }
}

/// Each refusal in words, with the arithmetic of a configuration that does not fit.
fn explained(errors: Vec<StartError>, loaded: &Loaded) -> Vec<String> {
    let unfit = Unfit::of(loaded);
    let explain = |error: StartError| match error {
        StartError::NewDoesNotFit { keyset } => {
            unfit.concerning(&keyset).map(|finding| format!("{}: {}", finding.path(), finding.message)).collect()
        }
        error => vec![crate::engine::chain(&error)],
    };
    let mut told: Vec<String> = errors.into_iter().flat_map(explain).collect();
    told.dedup();
    told
}

/// Before anything is made: where nothing is stored yet every keyset is new, and must fit.
fn refuse_unfit_first_start(loaded: &Loaded) -> Result<(), AppError> {
    // What a shared store holds is not known before it is asked.
    let Some(path) = loaded.config.store.file_path() else { return Ok(()) };
    if loaded.timing.is_empty() || path.try_exists().unwrap_or(true) {
        return Ok(());
    }
    let told = loaded.timing.iter().map(|finding| format!("{}: {}", finding.path(), finding.message));
    Err(AppError::Unfit(told.collect()))
}

/// A daemon with its listeners bound and its keyrings loaded, about to run.
pub struct App {
    engine: Arc<Engine>,
    aws_kms: Arc<AwsKmsBackend>,
    listeners: Vec<Bound>,
    stopping: Arc<AtomicBool>,
    reloader: Arc<reload::Reloader>,
    herald: Arc<herald::Herald>,
    /// The seal lives elsewhere and is opened while the daemon runs.
    sealed: Option<unseal::Sealed>,
    /// Something that the daemon needs is not on this machine.
    remote: bool,
    /// What other replicas fetch here.
    relay: Option<Arc<Relay>>,
    access_log: Arc<AccessLog>,
    /// Listeners end, and answers are held back no longer.
    shutdown: CancellationToken,
}

struct Bound {
    name: &'static str,
    listener: BoundListener,
    routes: Routes,
    tls: Option<Arc<Tls>>,
}

/// How requests get at most this long to finish after a listener stopped accepting (DESIGN §10).
const DRAIN: std::time::Duration = std::time::Duration::from_secs(5);

/// How long listeners stay closed at most for what is not on this machine (DESIGN §5).
const OPEN_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);

/// How long listeners stay closed at most for what is published elsewhere.
const PLACED_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);

/// Where the daemon keeps its state.
pub enum Storage {
    /// As configured.
    Configured,
    /// In memory, for `--demo`; tokens that come from the environment are this one.
    Memory { admin_token: String },
}

impl App {
    /// Binds, opens the store, loads every keyring. Nothing answers yet.
    pub async fn build(loaded: Loaded, source: Source, storage: Storage) -> Result<App, AppError> {
        let config = loaded.config.clone();
        raise_open_file_limit();
        let systemd = systemd();
        systemd.tell(None, Some("Starting")).await;
        // What changes from here on is noticed: everything is read after this.
        let attention = reload::Attention::new(&loaded).map_err(AppError::Signals)?;
        refuse_unfit_first_start(&loaded)?;
        // All listeners bind before anything is changed or answered.
        let sockets = bind_all(&config)?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let trusted = Arc::new(TrustedClock::new(clock, tolerance(&config)));
        let served = |store| storage::relayed(&config, store, &trusted);
        let ((opened, relay), variables) = match storage {
            Storage::Configured => {
                let variables = access::process_environment();
                (storage::open(&config, &trusted, &variables, served).await?, variables)
            }
            Storage::Memory { admin_token } => {
                let fixed: access::Environment = Arc::new(move |_| Some(admin_token.clone()));
                let (ledger, relay) = storage::memory(trusted.now(), served).await?;
                ((storage::Opened::Ledger(ledger), relay), fixed)
            }
        };
        let metrics = Arc::new(Metrics::new());
        metrics.set_config_last_reload_successful(true);
        let declared = declared(&loaded);
        let Wired { engine, sealed, aws_kms } = wire(&config, opened, trusted, metrics, &declared);
        if let Some(relay) = &relay {
            engine.hear(relay.clone());
        }
        configure(&engine, sealed.is_some(), &declared).await.map_err(|errors| refused(errors, &loaded))?;
        engine.place_at(publishers::places(&config));
        let (stopping, shutdown) = (Arc::new(AtomicBool::new(false)), CancellationToken::new());
        let access = Arc::new(access::Access::new(&engine, &config, variables.clone())?);
        let receivers = notices::Receivers::new(engine.clone(), &config, variables)?;
        let access_log = Arc::new(AccessLog::new());
        let credentials = (access.clone(), receivers);
        let herald = Arc::new(herald::Herald::new(systemd, engine.clone()));
        let (reloading, telling) = (engine.clone(), herald.clone());
        let reloader = Arc::new(reload::Reloader::new(reloading, credentials, source, loaded, attention, telling));
        reloader.follow_access_log(access_log.clone(), &config);
        let mut listeners = Vec::new();
        for (name, listener, socket) in sockets {
            let tls = listener.tls.as_ref().map(|files| Tls::load(&tls_files(&config, name, files))).transpose()?;
            if let Some(tls) = &tls {
                if let Some(wrong) = tls.validity().refusal(engine.clock.now()) {
                    tracing::error!(listener = name, wrong, "clients will not accept the certificate");
                }
                reloader.follow_tls(name, tls.clone());
            }
            let routes: Routes = match name {
                "public" => crate::http::public::routes(engine.clone()),
                "ops" => crate::http::ops::router(OpsState {
                    engine: engine.clone(),
                    stopping: stopping.clone(),
                    told: Arc::default(),
                })
                .into(),
                "signer" => {
                    let state = SignerState { engine: engine.clone(), clients: access.clients.clone() };
                    crate::http::signer::routes(state, host_policy(&socket, tls.as_ref()))
                }
                "replication" => {
                    let Some(relay) = relay.clone() else { continue };
                    let (clients, stopping) = (access.replicas.clone(), shutdown.clone());
                    let state = ReplicationState { relay, clients, stopping };
                    let policy = host_policy(&socket, tls.as_ref());
                    guard_host(crate::http::replication::router(state), policy).into()
                }
                _ => {
                    let reload = reload::handle(reloader.clone());
                    let page = config.admin.as_ref().is_some_and(|admin| admin.page);
                    let (tokens, certificates) = (access.admins.clone(), access.operators.clone());
                    let state = AdminState { engine: engine.clone(), tokens, certificates, reload, page };
                    guard_host(crate::http::admin::router(state), host_policy(&socket, tls.as_ref())).into()
                }
            };
            listeners.push(Bound { name, listener: socket, routes, tls });
        }
        let remote = sealed.is_some() || leftovers::uses_aws_kms(&engine);
        Ok(App { engine, aws_kms, listeners, stopping, reloader, herald, sealed, remote, relay, access_log, shutdown })
    }

    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Where a listener really listens.
    pub fn address(&self, name: &str) -> Option<&ListenAddress> {
        self.listeners.iter().find(|bound| bound.name == name).map(|bound| bound.listener.local_addr())
    }

    /// Runs until `stop` resolves, then finishes what was asked.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), AppError> {
        let App { engine, aws_kms, listeners, stopping, reloader, herald, sealed, remote, relay, access_log, shutdown } =
            self;
        let mut stop = std::pin::pin!(stop);
        let failed = Arc::new(Notify::new());
        let mut starting = tokio::spawn(start(engine.clone(), sealed, failed.clone(), relay.clone()));
        let mut still_starting = false;
        let open_anyway = async {
            match remote {
                true => _ = tokio::time::timeout(OPEN_WITHIN, failed.notified()).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            done = &mut starting => done.map_err(AppError::Aborted)??,
            () = open_anyway => still_starting = true,
            () = &mut stop => {
                starting.abort();
                herald.stopping(Span::ZERO).await;
                engine.stop().await;
                return Ok(());
            }
        }
        if !still_starting {
            // Whoever fetches a first token finds its key there too, unless a place does not answer.
            let _ = tokio::time::timeout(PLACED_WITHIN, engine.place_all()).await;
        }
        let mut serving = JoinSet::new();
        for bound in listeners {
            let options = ListenerOptions { access_log: access_log.clone(), ..options(bound.name, bound.tls) };
            tracing::info!(listener = bound.name, address = %bound.listener.local_addr(), "listening");
            serving.spawn(bound.listener.serve(bound.routes, options, shutdown.clone()));
        }
        engine.opened().await;
        herald.ready().await;
        // The configuration's text and tree, and whatever was read to build the keysets.
        tokio::task::spawn_blocking(memory::give_back);
        if !engine.is_sealed() {
            engine.schedule();
        }
        let background = CancellationToken::new();
        let (supervisor, cancel) = (engine.supervisor.clone(), background.clone());
        let (beating, watching) = (engine.clone(), reloader.clone());
        let beat = supervisor.clone().keep("heartbeat", cancel.clone(), move || beating.clone().beat(cancel.clone()));
        let (probing, fetch, cancel) = (engine.clone(), Arc::new(HttpsFetch::default()), background.clone());
        let probe = supervisor
            .clone()
            .keep("probes", cancel.clone(), move || probing.clone().watch_probes(fetch.clone(), cancel.clone()));
        let (placing, cancel) = (engine.clone(), background.clone());
        let place =
            supervisor.clone().keep("publishers", cancel.clone(), move || placing.clone().watch_places(cancel.clone()));
        let (telling, cancel) = (engine.clone(), background.clone());
        let tell =
            supervisor.clone().keep("notices", cancel.clone(), move || telling.clone().watch_notices(cancel.clone()));
        let (cleaning, cancel) = (engine.clone(), background.clone());
        let leftovers = supervisor.clone().keep("leftovers", cancel.clone(), move || {
            leftovers::clean_up(cleaning.clone(), aws_kms.clone(), cancel.clone())
        });
        let (accounts, cancel) = (reloader.service_accounts(), background.clone());
        let cluster = supervisor
            .clone()
            .keep("service accounts", cancel.clone(), move || accounts.clone().follow(cancel.clone()));
        let cancel = background.clone();
        let passing = supervisor.clone();
        let watch = supervisor.keep("reload", cancel.clone(), move || reload::watch(watching.clone(), cancel.clone()));
        let mut tasks = vec![
            tokio::spawn(beat),
            tokio::spawn(probe),
            tokio::spawn(place),
            tokio::spawn(tell),
            tokio::spawn(leftovers),
            tokio::spawn(cluster),
            tokio::spawn(watch),
        ];
        if herald.is_heard() {
            let (herald, cancel) = (herald.clone(), background.clone());
            tasks.push(tokio::spawn(
                passing.clone().keep("systemd", cancel.clone(), move || herald.clone().watch(cancel.clone())),
            ));
        }
        let (following, attending, cancel) = (engine.clone(), engine.clone(), background.clone());
        if engine.is_shared() {
            tasks.push(tokio::spawn(
                passing.clone().keep("store", cancel.clone(), move || following.clone().follow(cancel.clone())),
            ));
        }
        if engine.is_shared() || relay.is_some() {
            let cancel = background.clone();
            tasks.push(tokio::spawn(
                passing.clone().keep("presence", cancel.clone(), move || attending.clone().attend(cancel.clone())),
            ));
        }
        if let Some(relay) = relay {
            let cancel = background.clone();
            tasks.push(tokio::spawn(passing.keep("replicas", cancel.clone(), move || {
                let (relay, cancel) = (relay.clone(), cancel.clone());
                async move { relay.pass_on(cancel).await }
            })));
        }

        let ended = tokio::select! {
            refused = stopped_or_refused(stop, still_starting.then_some(starting)) => refused,
            _ = serving.join_next() => {
                tracing::error!("a listener ended by itself: the process ends, to be started again");
                Err(AppError::ListenerEnded)
            }
        };
        stopping.store(true, Ordering::Relaxed);
        let shutdown_delay = if matches!(ended, Ok(()) | Err(AppError::ListenerEnded)) {
            reloader.shutdown_delay().await
        } else {
            Span::ZERO
        };
        tracing::info!(delay = %shutdown_delay, "stopping: unready, still serving");
        herald.stopping(shutdown_delay).await;
        tokio::time::sleep(shutdown_delay.to_std()).await;
        shutdown.cancel();
        while serving.join_next().await.is_some() {}
        background.cancel();
        for task in tasks {
            // A supervisor ends with what it keeps; it does not panic.
            let _ = task.await;
        }
        engine.stop().await;
        engine.pulse().await;
        engine.take_leave().await;
        tracing::info!("stopped");
        ended
    }
}

/// Whoever started this process, as far as it is systemd.
fn systemd() -> Systemd {
    let environment = access::process_environment();
    let (systemd, errors) = Systemd::from_environment(|name| environment(name), std::process::id());
    for error in errors {
        tracing::warn!("{error}");
    }
    systemd
}

/// Takes the configuration. A shared store that has come and gone again meanwhile is waited for.
async fn configure(engine: &Arc<Engine>, sealed: bool, declared: &[Declared]) -> Result<(), Vec<StartError>> {
    loop {
        let configured = match sealed {
            false => engine.configure(declared).await,
            true => engine.configure_sealed(declared).await,
        };
        match configured {
            Err(errors) if engine.is_shared() && errors.iter().all(StartError::may_pass) => {
                let errors: Vec<String> = errors.iter().map(|error| crate::engine::chain(error)).collect();
                tracing::error!(?errors, "the configuration cannot be taken yet; it is tried again");
                engine.clock.clock().sleep(Span::SECOND).await;
            }
            configured => return configured,
        }
    }
}

/// Resolves at SIGTERM or SIGINT.
pub fn stop_signal() -> Result<impl Future<Output = ()>, AppError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(AppError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AppError::Signals)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// What comes before the ordinary life: the seal opens, and all keysets are reconciled once: active keys and all
/// successors, or the first failure of each keyset. If the listeners opened meanwhile, the scheduler does the latter.
async fn start(
    engine: Arc<Engine>,
    sealed: Option<unseal::Sealed>,
    failed: Arc<Notify>,
    relay: Option<Arc<Relay>>,
) -> Result<(), AppError> {
    match sealed {
        Some(sealed) => sealed.unseal(&engine, &failed).await?,
        None => engine.resume().await,
    }
    if let Err(error) = engine.look_at_store(Span::ZERO).await {
        tracing::warn!(error = %crate::engine::chain(&error), "the store has not confirmed the keyrings yet; it is tried again");
    }
    if let Some(relay) = relay {
        relay.settle();
    }
    if let Err(error) = engine.attend_once().await {
        tracing::warn!(error = %crate::engine::chain(&error), "it is not known what other replicas publish; promotions wait");
    }
    if !engine.is_open() {
        engine.reconcile_all().await;
        engine.give_up_first_keys().await;
        match engine.confirm_created().await {
            // It serves already: the heartbeat tries again.
            Err(error) if engine.is_open() || (engine.is_shared() && error.may_pass()) => {
                tracing::error!(error = %crate::engine::chain(&error), "cannot record that keyrings were created; it is tried again");
            }
            confirmed => confirmed?,
        }
    }
    if engine.is_open() {
        engine.schedule();
    }
    Ok(())
}

/// Waits for the end. A start that was still under way when the listeners opened may yet be refused.
async fn stopped_or_refused(
    mut stop: std::pin::Pin<&mut impl Future<Output = ()>>,
    starting: Option<JoinHandle<Result<(), AppError>>>,
) -> Result<(), AppError> {
    if let Some(mut starting) = starting {
        tokio::select! {
            done = &mut starting => done.map_err(AppError::Aborted)??,
            () = &mut stop => {
                starting.abort();
                return Ok(());
            }
        }
    }
    stop.await;
    Ok(())
}

struct Wired {
    engine: Arc<Engine>,
    sealed: Option<unseal::Sealed>,
    aws_kms: Arc<AwsKmsBackend>,
}

fn wire(
    config: &Config,
    opened: storage::Opened,
    clock: Arc<TrustedClock>,
    metrics: Arc<Metrics>,
    declared: &[Declared],
) -> Wired {
    let data_keys = Arc::new(LateDataKeys::default());
    let local = Arc::new(LocalBackend::new(data_keys.clone()));
    // Stored keyrings may have keys there whatever the configuration says now. Nothing is read or sent before the first
    // call.
    let settings_of = &config.aws_kms;
    let aws_kms = Arc::new(AwsKmsBackend::new(
        Arc::new(SdkKms::new(settings_of.clone())),
        data_keys.clone(),
        Arc::new(SystemClock),
        settings_of.deletion_window_days,
        settings_of.cleanup_after,
    ));
    let backends: [Arc<dyn Backend>; 2] = [local.clone(), aws_kms.clone()];
    let importer: Arc<dyn ImportPrivate> = local;
    let (records, sealed) = match opened {
        storage::Opened::Ledger(ledger) => {
            data_keys.arrive(ledger.keys());
            (Records::Authenticated(Arc::new(ledger)), None)
        }
        storage::Opened::Sealed(claims, unsealing) => {
            (Records::Sealed(claims), Some(unseal::Sealed { unsealing, data_keys, declared: declared.to_vec() }))
        }
    };
    let engine = Engine::new(clock, records, backends, Some(importer), metrics, settings(config));
    Wired { engine, sealed, aws_kms }
}

fn settings(config: &Config) -> Settings {
    Settings {
        sign_deadline: config.signer.as_ref().map_or(Span::SECOND.times(2), |signer| signer.sign_deadline),
        audit_signatures: config.log.signatures,
        pool_size: std::thread::available_parallelism().map_or(1, usize::from),
        role: match config.role {
            ProcessRole::All => ReplicaRole::All,
            ProcessRole::Manager => ReplicaRole::Manager,
            ProcessRole::Signer => ReplicaRole::Signer,
        },
        publishes: config.public.is_some(),
    }
}

/// The keysets of a configuration as the engine takes them.
fn declared(loaded: &Loaded) -> Vec<Declared> {
    let (keysets, unfit) = (loaded.config.keysets.iter(), Unfit::of(loaded));
    keysets
        .map(|keyset| Declared {
            name: keyset.name.clone(),
            fits: unfit.concerning(&keyset.name).next().is_none(),
            policy: keyset.policy.clone(),
        })
        .collect()
}

/// The smallest σ of any keyset: a step by more than that is noticed.
fn tolerance(config: &Config) -> Span {
    config.keysets.iter().map(|keyset| keyset.policy.rotation.clock_skew).min().unwrap_or_default()
}

fn bind_all(config: &Config) -> Result<Vec<(&'static str, Listener, BoundListener)>, AppError> {
    let mut sockets = Vec::new();
    for (name, listener) in config.listeners() {
        let socket = BoundListener::bind(&listen_address(&listener.address))?;
        sockets.push((name, listener.clone(), socket));
    }
    Ok(sockets)
}

fn options(name: &'static str, tls: Option<Arc<Tls>>) -> ListenerOptions {
    let usual = ListenerOptions { tls, drain_timeout: DRAIN, ..ListenerOptions::new(name) };
    match name {
        // Each replica holds a connection, on which it waits.
        "replication" => ListenerOptions { max_connections: MOST_CONNECTIONS, body_limit: LONGEST_REPORT, ..usual },
        _ => usual,
    }
}

fn listen_address(address: &Address) -> ListenAddress {
    match address {
        Address::Tcp(address) => ListenAddress::Tcp(*address),
        Address::Unix { path, mode } => ListenAddress::Unix { path: path.clone(), mode: *mode },
    }
}

/// The TLS files of the listener `table`, and whether its clients can do without a certificate: they can where others
/// are known by a token.
pub fn tls_files(config: &Config, table: &str, files: &crate::config::TlsFiles) -> TlsFiles {
    let clients = match &files.client_ca_file {
        None => ClientCertificates::None,
        Some(path) if config.needs_certificates(table) => ClientCertificates::Required(path.clone()),
        Some(path) => ClientCertificates::Optional(path.clone()),
    };
    TlsFiles { cert_file: files.cert_file.clone(), key_file: files.key_file.clone(), clients }
}

/// Signer and admin answer only for hosts that a web page cannot take over (DNS rebinding).
fn host_policy(socket: &BoundListener, tls: Option<&Arc<Tls>>) -> Arc<HostPolicy> {
    let policy = HostPolicy::new(socket.local_addr(), []).expect("no names are given");
    Arc::new(match tls {
        Some(tls) => policy.with_certificate(tls.clone()),
        None => policy,
    })
}

/// Wall-clock time for what runs without a daemon.
pub fn system_now() -> Timestamp {
    SystemClock.wall()
}
