//! The composition root: the only place that wires adapters to ports, and runs what it wired.

mod access;
mod reload;
mod storage;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::backend::local::{ImportPrivate, LocalBackend};
use crate::clock::{Clock, SystemClock, TrustedClock};
use crate::config::{Address, Config, Listener, Loaded, Source};
use crate::engine::probes::HttpsFetch;
use crate::engine::{Declared, Engine, Settings, StartError};
use crate::http::admin::AdminState;
use crate::http::listener::{BindError, BoundListener, ListenAddress, ListenerOptions, raise_open_file_limit};
use crate::http::middleware::{HostPolicy, guard_host};
use crate::http::ops::OpsState;
use crate::http::signer::SignerState;
use crate::http::tls::{Tls, TlsError, TlsFiles};
use crate::keyring::time::{Span, Timestamp};
use crate::store::ledger::{Ledger, LedgerError};
use crate::telemetry::metrics::Metrics;

pub use access::{AccessError, fresh_token};
pub use storage::{Initialised, initialise, open_for_maintenance};

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
    Access(#[from] AccessError),
    #[error("{}", list(.0))]
    Start(Vec<StartError>),
    #[error("{} is not initialised: run `jwksd init`, or set [store] initialise = \"if-empty\"", .path.display())]
    NotInitialised { path: PathBuf },
    #[error("a listener ended by itself; the log says why")]
    ListenerEnded,
    #[error("the process cannot be told to stop: {0}")]
    Signals(std::io::Error),
}

fn list(errors: &[StartError]) -> String {
    errors.iter().map(|error| crate::engine::chain(error)).collect::<Vec<_>>().join("\n")
}

/// A daemon with its listeners bound and its keyrings loaded, about to run.
pub struct App {
    engine: Arc<Engine>,
    listeners: Vec<Bound>,
    stopping: Arc<AtomicBool>,
    reloader: Arc<reload::Reloader>,
}

struct Bound {
    name: &'static str,
    listener: BoundListener,
    router: axum::Router,
    tls: Option<Arc<Tls>>,
}

/// How requests get at most this long to finish after a listener stopped accepting (DESIGN §10).
const DRAIN: std::time::Duration = std::time::Duration::from_secs(5);

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
        // All listeners bind before anything is changed or answered.
        let sockets = bind_all(&config)?;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let trusted = Arc::new(TrustedClock::new(clock, tolerance(&config)));
        let (ledger, variables) = match storage {
            Storage::Configured => (storage::open(&config, trusted.now()).await?, access::process_environment()),
            Storage::Memory { admin_token } => {
                let fixed: access::Environment = Arc::new(move |_| Some(admin_token.clone()));
                (storage::memory(trusted.now()).await?, fixed)
            }
        };
        let metrics = Arc::new(Metrics::new());
        metrics.set_config_last_reload_successful(true);
        let engine = wire(&config, ledger, trusted, metrics);
        engine.configure(&declared(&loaded)).await.map_err(AppError::Start)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let access = Arc::new(access::Access::new(&engine, &config, variables)?);
        let reloader = Arc::new(reload::Reloader::new(engine.clone(), access.clone(), source, loaded));
        let mut listeners = Vec::new();
        for (name, listener, socket) in sockets {
            let tls = listener.tls.as_ref().map(|files| Tls::load(tls_files(files))).transpose()?;
            if let Some(tls) = &tls {
                reloader.follow_tls(tls.clone());
            }
            let router = match name {
                "public" => crate::http::public::router(engine.clone()),
                "ops" => crate::http::ops::router(OpsState {
                    engine: engine.clone(),
                    stopping: stopping.clone(),
                    told: Arc::default(),
                }),
                "signer" => {
                    let state = SignerState { engine: engine.clone(), clients: access.clients.clone() };
                    guarded(crate::http::signer::router(state), &socket, tls.is_some())
                }
                _ => {
                    let reload = reload::handle(reloader.clone());
                    let state = AdminState { engine: engine.clone(), tokens: access.admins.clone(), reload };
                    guarded(crate::http::admin::router(state), &socket, tls.is_some())
                }
            };
            listeners.push(Bound { name, listener: socket, router, tls });
        }
        Ok(App { engine, listeners, stopping, reloader })
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
        let App { engine, listeners, stopping, reloader } = self;
        let mut stop = std::pin::pin!(stop);
        tokio::select! {
            done = first_pass(&engine) => done?,
            () = &mut stop => {
                engine.stop().await;
                return Ok(());
            }
        }
        let shutdown = CancellationToken::new();
        let mut serving = JoinSet::new();
        for bound in listeners {
            let options = ListenerOptions { tls: bound.tls, drain_timeout: DRAIN, ..ListenerOptions::new(bound.name) };
            tracing::info!(listener = bound.name, address = %bound.listener.local_addr(), "listening");
            serving.spawn(bound.listener.serve(bound.router, options, shutdown.clone()));
        }
        engine.opened().await;
        engine.schedule();
        let background = CancellationToken::new();
        let (supervisor, cancel) = (engine.supervisor.clone(), background.clone());
        let (beating, watching) = (engine.clone(), reloader.clone());
        let beat = supervisor.clone().keep("heartbeat", cancel.clone(), move || beating.clone().beat(cancel.clone()));
        let (probing, fetch, cancel) = (engine.clone(), Arc::new(HttpsFetch::default()), background.clone());
        let probe = supervisor
            .clone()
            .keep("probes", cancel.clone(), move || probing.clone().probe(fetch.clone(), cancel.clone()));
        let cancel = background.clone();
        let watch = supervisor.keep("reload", cancel.clone(), move || reload::watch(watching.clone(), cancel.clone()));
        let (beat, probe, watch) = (tokio::spawn(beat), tokio::spawn(probe), tokio::spawn(watch));

        let broken = tokio::select! {
            () = &mut stop => false,
            _ = serving.join_next() => {
                tracing::error!("a listener ended by itself: the process ends, to be started again");
                true
            }
        };
        stopping.store(true, Ordering::Relaxed);
        let shutdown_delay = reloader.shutdown_delay().await;
        tracing::info!(delay = %shutdown_delay, "stopping: unready, still serving");
        tokio::time::sleep(shutdown_delay.to_std()).await;
        shutdown.cancel();
        while serving.join_next().await.is_some() {}
        background.cancel();
        let _ = tokio::join!(beat, probe, watch);
        engine.stop().await;
        engine.pulse().await;
        tracing::info!("stopped");
        if broken { Err(AppError::ListenerEnded) } else { Ok(()) }
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

/// The first reconcile: active keys and all successors, or the first failure of each keyset. Then it opens.
async fn first_pass(engine: &Arc<Engine>) -> Result<(), AppError> {
    match engine.ledger().read_alive().await {
        Ok(alive) => engine.resume_from(alive.as_ref()),
        Err(error) => {
            tracing::warn!(error = %crate::engine::chain(&error), "it is not known when the daemon was last alive; it is taken to have been away for long");
            engine.resume_from(Some(&crate::store::ledger::Alive::long_ago()));
        }
    }
    engine.reconcile_all().await;
    engine.confirm_created().await?;
    Ok(())
}

fn wire(config: &Config, ledger: Ledger, clock: Arc<TrustedClock>, metrics: Arc<Metrics>) -> Arc<Engine> {
    let ledger = Arc::new(ledger);
    let local = Arc::new(LocalBackend::new(ledger.keys()));
    let backends: [Arc<dyn Backend>; 1] = [local.clone()];
    let importer: Arc<dyn ImportPrivate> = local;
    Engine::new(clock, ledger, backends, Some(importer), metrics, settings(config))
}

fn settings(config: &Config) -> Settings {
    Settings {
        sign_deadline: config.signer.as_ref().map_or(Span::SECOND.times(2), |signer| signer.sign_deadline),
        audit_signatures: config.log.signatures,
        pool_size: std::thread::available_parallelism().map_or(1, usize::from),
    }
}

/// The keysets of a configuration as the engine takes them.
fn declared(loaded: &Loaded) -> Vec<Declared> {
    let broken = |name: &crate::keyring::name::Name, issuer: &crate::keyring::name::Name| {
        loaded.timing.iter().any(|finding| match (&finding.keyset, &finding.issuer) {
            (Some(keyset), _) => keyset == name,
            (None, Some(of)) => of == issuer,
            (None, None) => true,
        })
    };
    let keysets = loaded.config.keysets.iter();
    keysets
        .map(|keyset| Declared {
            name: keyset.name.clone(),
            fits: !broken(&keyset.name, &keyset.policy.issuer.name),
            policy: Arc::new(keyset.policy.clone()),
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

fn listen_address(address: &Address) -> ListenAddress {
    match address {
        Address::Tcp(address) => ListenAddress::Tcp(*address),
        Address::Unix { path, mode } => ListenAddress::Unix { path: path.clone(), mode: *mode },
    }
}

fn tls_files(files: &crate::config::TlsFiles) -> TlsFiles {
    TlsFiles {
        cert_file: files.cert_file.clone(),
        key_file: files.key_file.clone(),
        clients: crate::http::tls::ClientCertificates::None,
    }
}

/// Signer and admin answer only for hosts that a web page cannot take over (DNS rebinding).
fn guarded(router: axum::Router, socket: &BoundListener, tls: bool) -> axum::Router {
    // Behind TLS the certificate's name already is the one that was asked for.
    let policy = match tls {
        true => HostPolicy::any(),
        false => HostPolicy::new(socket.local_addr(), []).expect("no names are given"),
    };
    guard_host(router, Arc::new(policy))
}

/// Wall-clock time for what runs without a daemon.
pub fn system_now() -> Timestamp {
    SystemClock.wall()
}
