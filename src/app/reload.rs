//! Re-reading configuration, tokens and certificates: all or nothing, and what runs goes on when it is invalid.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::access::{Access, Credentials};
use super::herald::Herald;
use super::notices::{self, Receivers};
use super::{declared, explained, settings, tls_files, tolerance};
use crate::config::{
    Config, ConfigErrors, ContentDigest, Loaded, POLL_INTERVAL, Source, Watch, load, restart_first, restart_needed,
};
use crate::engine::{Engine, chain};
use crate::http::access::AccessLog;
use crate::http::admin::{Reload, ReloadAnswer};
use crate::http::tls::{PreparedTls, Tls};
use crate::keyring::time::Span;
use crate::kubernetes::ServiceAccounts;

/// Takes new configurations into the running daemon.
pub(super) struct Reloader {
    engine: Arc<Engine>,
    access: Arc<Access>,
    receivers: Receivers,
    source: Source,
    running: tokio::sync::Mutex<Running>,
    tls: Mutex<Vec<(&'static str, Arc<Tls>)>>,
    access_log: OnceLock<Arc<AccessLog>>,
    /// What was wrong at the last attempt; empty when nothing was.
    wrong: Mutex<Vec<String>>,
    attention: tokio::sync::Mutex<Attention>,
    herald: Arc<Herald>,
}

struct Running {
    config: Config,
    /// With what the process started: the base for what needs a restart.
    started: Config,
    /// The files of `config`, as they were before they were read.
    files: Option<Watch>,
}

/// Notices SIGHUP and changed files from before anything is read: what changes during the start is not missed.
pub(super) struct Attention {
    hangup: Signal,
    watch: Watch,
}

impl Attention {
    /// # Errors
    /// The process cannot listen for signals.
    pub fn new(loaded: &Loaded) -> Result<Self, std::io::Error> {
        let watch = watch_of(&loaded.config, loaded.file.as_ref());
        Ok(Attention { hangup: signal(SignalKind::hangup())?, watch })
    }
}

/// Watches what `config` names as it is now, and its own file as it was read.
fn watch_of(config: &Config, file: Option<&(PathBuf, ContentDigest)>) -> Watch {
    let watch = Watch::new(config.reloadable_files());
    match file {
        Some((path, digest)) => watch.knowing(path.clone(), *digest),
        None => watch,
    }
}

impl Reloader {
    pub fn new(
        engine: Arc<Engine>,
        (access, receivers): (Arc<Access>, Receivers),
        source: Source,
        loaded: Loaded,
        attention: Attention,
        herald: Arc<Herald>,
    ) -> Self {
        let config = loaded.config;
        let running = Running { started: config.clone(), config, files: None };
        Reloader {
            engine,
            access,
            receivers,
            access_log: OnceLock::new(),
            source,
            running: tokio::sync::Mutex::new(running),
            tls: Mutex::default(),
            wrong: Mutex::default(),
            attention: tokio::sync::Mutex::new(attention),
            herald,
        }
    }

    /// `tls` is that of the listener `name`.
    pub fn follow_tls(&self, name: &'static str, tls: Arc<Tls>) {
        self.engine.metrics.set_certificate_expiry(name, tls.validity().until);
        self.tls.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((name, tls));
    }

    /// Who knows the service accounts of a cluster.
    pub fn service_accounts(&self) -> Arc<ServiceAccounts> {
        self.access.service_accounts.clone()
    }

    /// `log` writes lines as the configuration wants, now and after each reload.
    pub fn follow_access_log(&self, log: Arc<AccessLog>, config: &Config) {
        set_access_log(&log, config);
        let _ = self.access_log.set(log);
    }

    /// Reads everything again. After an error everything is as before, and a metric says so.
    pub async fn reload(&self) -> Result<ReloadAnswer, Vec<String>> {
        self.herald.reloading().await;
        let result = self.try_again().await;
        self.herald.ready().await;
        result
    }

    /// As [`reload`](Self::reload), of the process's own accord after a failure: systemd need not see that each time.
    async fn try_again(&self) -> Result<ReloadAnswer, Vec<String>> {
        let result = self.attempt().await;
        self.engine.set_configuration_valid(result.is_ok());
        self.herald.set_configured(result.is_ok());
        let errors = result.as_ref().err().cloned().unwrap_or_default();
        let before = std::mem::replace(&mut *self.wrong(), errors);
        match &result {
            Ok(answer) if answer.changed => {
                tracing::info!(restart_needed = ?answer.restart_needed, "configuration reloaded");
            }
            Ok(_) if !before.is_empty() => tracing::info!("the configuration is valid again, and the one that runs"),
            Ok(_) => {}
            Err(errors) if *errors == before => {} // Tried again; it was told.
            Err(errors) => {
                tracing::error!(errors = ?errors, "the changed configuration is invalid: the former one goes on")
            }
        }
        result
    }

    async fn attempt(&self) -> Result<ReloadAnswer, Vec<String>> {
        let mut running = self.running.lock().await;
        let taken = self.take(&mut running).await;
        if taken.is_err() {
            // A configuration that is broken must not keep a revoked token or an expired certificate in use.
            // Nor must a certificate of one listener keep what was revoked in use on another.
            let config = running.config.clone();
            let (fresh, _) = self.read(&config, &running.started);
            self.put_in_force(fresh);
        }
        taken
    }

    /// Everything is read and checked before anything is put in force.
    async fn take(&self, running: &mut Running) -> Result<ReloadAnswer, Vec<String>> {
        let loaded = load(&self.source, std::env::vars()).map_err(|error| lines(&error))?;
        let files = watch_of(&loaded.config, loaded.file.as_ref());
        let other = loaded.config != running.config;
        if other && !loaded.timing.is_empty() {
            return Err(loaded.timing.iter().map(|f| format!("{}: {}", f.path(), f.message)).collect());
        }
        let unfit = restart_first(&running.started, &loaded.config);
        if !unfit.is_empty() {
            return Err(unfit);
        }
        let (fresh, errors) = self.read(&loaded.config, &running.started);
        if !errors.is_empty() {
            return Err(errors);
        }
        if other {
            let configured = self.engine.configure(&declared(&loaded)).await;
            configured.map_err(|errors| explained(errors, &loaded))?;
            self.engine.set_settings(settings(&loaded.config));
            if let Some(log) = self.access_log.get() {
                set_access_log(log, &loaded.config);
            }
            if !self.engine.is_reader() {
                self.engine.clock.set_tolerance(tolerance(&loaded.config));
            }
            self.engine.schedule();
        }
        let renewed = self.put_in_force(fresh);
        self.engine.tell_again();
        running.files = Some(files);
        running.config = loaded.config;
        let unfit = loaded.timing.iter().map(|f| format!("{}: {}", f.path(), f.message));
        Ok(ReloadAnswer {
            action: "reload",
            generation: 0, // Known once it is written down.
            changed: other || renewed,
            warnings: unfit
                .chain(loaded.warnings.iter().map(ToString::to_string))
                .chain(self.engine.remarks())
                .collect(),
            restart_needed: restart_needed(&running.started, &running.config),
        })
    }

    /// Reads every token, certificate and key that `config` names, for the listeners there are: one that is gone from
    /// the configuration goes on as it started until the restart that ends it. What cannot be used is told, and left out.
    fn read(&self, config: &Config, started: &Config) -> (Fresh, Vec<String>) {
        let listens = |config: &Config| {
            let listener = config.signer.as_ref().map(|signer| &signer.listener);
            listener.map(|listener| (listener.address.clone(), listener.tls.is_some()))
        };
        let same_signer = listens(started) == listens(config);
        let mut config = config.clone();
        if config.signer.is_none() {
            config.signer.clone_from(&started.signer);
        }
        if config.admin.is_none() {
            config.admin.clone_from(&started.admin);
        }
        let mut errors = Vec::new();
        let mut tls = Vec::new();
        for (name, current) in self.tls.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            let of = |config: &Config| config.listeners().find(|(of, _)| of == name).and_then(|(_, l)| l.tls.clone());
            let Some(files) = of(&config).or_else(|| of(started)) else { continue };
            match Tls::prepare(&tls_files(&config, name, &files)) {
                Ok(prepared) => match self.worse(current, &prepared) {
                    Some(wrong) => errors.push(format!("{name}.tls.cert_file: {}: {wrong}", files.cert_file.display())),
                    None => tls.push((*name, current.clone(), prepared)),
                },
                Err(error) => errors.push(format!("{name}.tls: {}", chain(&error))),
            }
        }
        let credentials = self.access.read(&config).map_err(|error| errors.push(chain(&error))).ok();
        let receivers = self.receivers.read(&config).map_err(|error| errors.push(chain(&error))).ok();
        (Fresh { credentials, receivers, same_signer, tls }, errors)
    }

    /// Why a renewed certificate is of no use to anybody now.
    fn worse(&self, current: &Tls, prepared: &PreparedTls) -> Option<String> {
        // One that goes on as it is must not keep other changes out, whatever has become of it.
        let renewed = prepared.validity() != current.validity();
        prepared.validity().refusal(self.engine.clock.now()).filter(|_| renewed)
    }

    /// `true` if a certificate or a receiver of notices is another one than before.
    fn put_in_force(&self, fresh: Fresh) -> bool {
        if let Some(credentials) = fresh.credentials {
            self.access.replace(credentials, fresh.same_signer);
        }
        let mut renewed = fresh.receivers.is_some_and(|receivers| self.receivers.put_in_force(receivers));
        for (name, tls, prepared) in fresh.tls {
            renewed |= tls.replace(prepared);
            self.engine.metrics.set_certificate_expiry(name, tls.validity().until);
        }
        renewed
    }

    /// How long to go on serving after SIGTERM, by the configuration that runs.
    pub async fn shutdown_delay(&self) -> Span {
        self.running.lock().await.config.shutdown_delay
    }

    fn wrong(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        self.wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until it is time to try again after a failure: a file that is put back between two looks at it does not
    /// count as changed.
    async fn retry(&self) {
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            if !self.wrong().is_empty() {
                return;
            }
        }
    }
}

/// Access lines as `config` wants them.
fn set_access_log(log: &AccessLog, config: &Config) {
    let wanted = &config.telemetry.access_log;
    let listeners = if wanted.enabled { wanted.listeners.as_slice() } else { &[] };
    log.set(listeners, wanted.sample_ratio.millionths());
}

/// What was read and not put in force yet.
struct Fresh {
    /// `None` where one of them cannot be read: then all stay as they are.
    credentials: Option<Credentials>,
    /// The same for those who are notified.
    receivers: Option<notices::Fresh>,
    /// The signer listens where the configuration says.
    same_signer: bool,
    tls: Vec<(&'static str, Arc<Tls>, PreparedTls)>,
}

fn lines(error: &ConfigErrors) -> Vec<String> {
    match error {
        ConfigErrors::Invalid(invalid) => invalid.problems.iter().map(ToString::to_string).collect(),
        other => vec![chain(other)],
    }
}

/// Reloads whenever a file changes or SIGHUP arrives.
pub(super) async fn watch(reloader: Arc<Reloader>, cancel: CancellationToken) {
    let mut attention = reloader.attention.lock().await;
    let Attention { hangup, watch } = &mut *attention;
    loop {
        let reloaded = tokio::select! {
            changed = watch.changed() => {
                tracing::debug!(files = ?changed, "files changed");
                reloader.reload().await
            }
            _ = hangup.recv() => {
                tracing::debug!("SIGHUP");
                reloader.reload().await
            }
            () = reloader.retry() => reloader.try_again().await,
            () = cancel.cancelled() => return,
        };
        if reloaded.is_ok()
            && let Some(files) = reloader.running.lock().await.files.take()
        {
            watch.follow(files);
        }
    }
}

/// The reload as the admin listener calls it.
pub(super) fn handle(reloader: Arc<Reloader>) -> Reload {
    Arc::new(move || {
        let reloader = reloader.clone();
        // In a task of its own: a caller who goes away must not leave half a configuration behind.
        let work = tokio::spawn(async move { reloader.reload().await });
        Box::pin(
            async move { work.await.unwrap_or_else(|error| Err(vec![format!("the reload was aborted: {error}")])) },
        )
    })
}
