//! Re-reading configuration, tokens and certificates: all or nothing, and what runs goes on when it is invalid.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::access::Access;
use super::{declared, settings, tolerance};
use crate::config::{Config, ConfigErrors, Loaded, POLL_INTERVAL, Source, Watch, load, restart_needed};
use crate::engine::{Engine, chain};
use crate::http::admin::{Reload, ReloadAnswer};
use crate::http::tls::Tls;
use crate::keyring::time::Span;

/// Takes new configurations into the running daemon.
pub(super) struct Reloader {
    engine: Arc<Engine>,
    access: Arc<Access>,
    source: Source,
    running: tokio::sync::Mutex<Running>,
    tls: Mutex<Vec<Arc<Tls>>>,
    /// What was wrong at the last attempt; empty when nothing was.
    wrong: Mutex<Vec<String>>,
}

struct Running {
    config: Config,
    /// With what the process started: the base for what needs a restart.
    started: Config,
    file: Option<(PathBuf, crate::config::ContentDigest)>,
}

impl Reloader {
    pub fn new(engine: Arc<Engine>, access: Arc<Access>, source: Source, loaded: Loaded) -> Self {
        let Loaded { config, file, .. } = loaded;
        let running = Running { started: config.clone(), config, file };
        Reloader {
            engine,
            access,
            source,
            running: tokio::sync::Mutex::new(running),
            tls: Mutex::default(),
            wrong: Mutex::default(),
        }
    }

    pub fn follow_tls(&self, tls: Arc<Tls>) {
        self.tls.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(tls);
    }

    /// Reads everything again. After an error everything is as before, and a metric says so.
    pub async fn reload(&self) -> Result<ReloadAnswer, Vec<String>> {
        let result = self.attempt().await;
        self.engine.set_configuration_valid(result.is_ok());
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
        let loaded = load(&self.source, std::env::vars()).map_err(|error| lines(&error))?;
        let credentials = self.access.read(&loaded.config).map_err(|error| vec![chain(&error)])?;
        let mut changed = loaded.config != running.config;
        if loaded.config != running.config {
            let declared = declared(&loaded);
            let configured = self.engine.configure(&declared).await;
            configured.map_err(|errors| errors.iter().map(|error| chain(error)).collect::<Vec<_>>())?;
            self.engine.set_settings(settings(&loaded.config));
            self.engine.clock.set_tolerance(tolerance(&loaded.config));
            self.engine.schedule();
        }
        let listens = |config: &Config| config.signer.as_ref().map(|signer| signer.listener.clone());
        let same_listener = listens(&running.started) == listens(&loaded.config);
        self.access.replace(credentials, same_listener);
        // Last, since each listener keeps what it has when its new files are invalid.
        let tls: Vec<_> = self.tls.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        let mut errors = Vec::new();
        for tls in tls {
            match tls.reload() {
                Ok(renewed) => changed |= renewed,
                Err(error) => errors.push(chain(&error)),
            }
        }
        let answer = ReloadAnswer {
            action: "reload",
            generation: 0, // Known once it is written down.
            changed,
            warnings: loaded.warnings.iter().map(ToString::to_string).chain(self.engine.remarks()).collect(),
            restart_needed: restart_needed(&running.started, &loaded.config),
        };
        running.config = loaded.config;
        running.file = loaded.file;
        if errors.is_empty() { Ok(ReloadAnswer { changed, ..answer }) } else { Err(errors) }
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

    async fn watched(&self) -> Watch {
        let running = self.running.lock().await;
        let watch = Watch::new(running.config.reloadable_files());
        match &running.file {
            Some((path, digest)) => watch.knowing(path.clone(), *digest),
            None => watch,
        }
    }
}

fn lines(error: &ConfigErrors) -> Vec<String> {
    match error {
        ConfigErrors::Invalid(invalid) => invalid.problems.iter().map(ToString::to_string).collect(),
        other => vec![chain(other)],
    }
}

/// Reloads whenever a file changes or SIGHUP arrives.
pub(super) async fn watch(reloader: Arc<Reloader>, cancel: CancellationToken) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return };
    let mut watch = reloader.watched().await;
    loop {
        tokio::select! {
            changed = watch.changed() => tracing::debug!(files = ?changed, "files changed"),
            _ = hangup.recv() => tracing::debug!("SIGHUP"),
            () = reloader.retry() => {}
            () = cancel.cancelled() => return,
        }
        if reloader.reload().await.is_ok() {
            let running = reloader.running.lock().await;
            let mut files = running.config.reloadable_files();
            files.extend(running.file.iter().map(|(path, _)| path.clone()));
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
