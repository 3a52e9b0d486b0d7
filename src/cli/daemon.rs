//! `serve`, `init` and `reseal`.

use super::{Failure, Global, Outcome, Output};
use crate::app::{App, AppError, Maintained, Storage, initialise, open_for_maintenance, stop_signal, system_now};
use crate::backend::KeyIdentity;
use crate::backend::local::associated_data;
use crate::config::{Loaded, LogFormat, Source, load};
use crate::keyring::record::{Key, Keyring};
use crate::seal::data_keys::DataKeys;
use crate::store::ledger::{Ledger, refuse_in_use};
#[cfg(feature = "otel")]
use crate::telemetry::traces::collector::{self, Sending};
use crate::telemetry::{hardening, logging};
use crate::{memory, random};

pub(super) fn serve(global: &Global) -> Outcome {
    memory::bound_arenas();
    let source = global.source();
    let loaded = read(&source)?;
    // Last to go, so that it sends what the end itself left.
    let _sending = start_telemetry(&loaded)?;
    run(loaded, source)
}

fn run(loaded: Loaded, source: Source) -> Outcome {
    match hardening::harden() {
        Err(error) if error.is_fatal() => return Err(Failure::Failed(crate::engine::chain(&error))),
        Err(error) => tracing::warn!(error = %crate::engine::chain(&error), "the process is not fully hardened"),
        Ok(()) => {}
    }
    random::prepare();
    for warning in &loaded.warnings {
        tracing::warn!(key = %warning.path, "{}", warning.message);
    }
    for finding in &loaded.timing {
        tracing::error!(key = %finding.path(), "{}", finding.message);
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), configuration = %loaded.origin, "jwksd starts");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Failure::Failed(error.to_string()))?.block_on(async {
        let mut stop = std::pin::pin!(stop_signal().map_err(failed)?);
        // A store that others start may be waited for.
        let app = tokio::select! {
            app = App::build(loaded, source, Storage::Configured) => app.map_err(failed)?,
            () = &mut stop => return Ok(()),
        };
        app.run(stop).await.map_err(failed)
    })
}

/// Reads the configuration; what would refuse any daemon is a usage error.
pub(super) fn read(source: &Source) -> Result<Loaded, Failure> {
    load(source, std::env::vars()).map_err(|error| Failure::Usage(error.to_string()))
}

/// The log, and traces where they are wanted: what is returned sends them.
#[cfg(feature = "otel")]
fn start_telemetry(loaded: &Loaded) -> Result<Option<Sending>, Failure> {
    let Some(traces) = &loaded.config.telemetry.traces else { return start_logging(loaded).map(|()| None) };
    let settings =
        collector::Settings { endpoint: traces.endpoint.clone(), sample_ratio: traces.sample_ratio.as_f64() };
    let started = collector::start(&settings);
    let (sending, tracer) = started.map_err(|error| Failure::Usage(crate::engine::chain(&error)))?;
    let (format, filter) = log_of(loaded)?;
    logging::init_with_traces(format, &filter, tracer).map_err(|error| Failure::Usage(error.to_string()))?;
    Ok(Some(sending))
}

/// The log; this build has no traces, and refuses a configuration with them.
#[cfg(not(feature = "otel"))]
fn start_telemetry(loaded: &Loaded) -> Result<Option<Sending>, Failure> {
    start_logging(loaded).map(|()| None)
}

/// Nothing does.
#[cfg(not(feature = "otel"))]
enum Sending {}

pub(super) fn start_logging(loaded: &Loaded) -> Outcome {
    let (format, filter) = log_of(loaded)?;
    logging::init(format, &filter).map_err(|error| Failure::Usage(error.to_string()))
}

fn log_of(loaded: &Loaded) -> Result<(logging::LogFormat, logging::LogFilter), Failure> {
    let log = &loaded.config.log;
    let format = match log.format {
        LogFormat::Text => logging::LogFormat::Text,
        LogFormat::Json => logging::LogFormat::Json,
    };
    let wanted = std::env::var(logging::LOG_VARIABLE).unwrap_or_else(|_| log.level.as_str().to_owned());
    let filter = logging::LogFilter::parse(&wanted).map_err(|error| Failure::Usage(error.to_string()))?;
    Ok((format, filter))
}

pub(super) fn init(global: &Global, existing_seal: bool) -> Outcome {
    let loaded = read(&global.source())?;
    super::in_runtime(async {
        let done = initialise(&loaded.config, existing_seal, system_now()).await.map_err(failed)?;
        match global.output {
            Output::Json => println!("{:#}", serde_json::json!({ "made": done.made, "already": done.already })),
            Output::Text if done.already => println!("already initialised"),
            Output::Text => done.made.iter().for_each(|made| println!("made {made}")),
        }
        Ok(())
    })
}

/// Moves every data key under the configured seal and every secret under a new data key.
pub(super) fn reseal(global: &Global) -> Outcome {
    let loaded = read(&global.source())?;
    super::in_runtime(async {
        let Maintained { store, keks: keys, .. } = open_for_maintenance(&loaded.config).await.map_err(failed)?;
        // A file store's lock tells; replicas of a shared one could not read what is resealed under them.
        let in_use = refuse_in_use(store.as_ref()).await;
        in_use.map_err(|error| Failure::Failed(crate::engine::chain(&error)))?;
        let bind = |keyring: &Keyring, key: &Key, keys: &DataKeys| {
            let identity = KeyIdentity {
                installation: keys.installation().to_owned(),
                lineage: keyring.key_lineage().to_owned(),
                keyset: keyring.keyset.clone(),
                serial: key.serial,
            };
            associated_data(&identity, &key.kid)
        };
        let Some((primary, old)) = keys.split_first() else {
            return Err(Failure::Usage("no seal is configured".to_owned()));
        };
        let resealed = Ledger::reseal(store, primary.clone(), old, bind, system_now()).await;
        let resealed = resealed.map_err(|error| Failure::Failed(crate::engine::chain(&error)))?;
        match global.output {
            Output::Json => println!(
                "{:#}",
                serde_json::json!({ "keyrings": resealed.keyrings, "private_keys": resealed.private_keys })
            ),
            Output::Text => println!(
                "resealed {} keyrings and {} private keys under the seal key {}; former seal keys are not needed any more",
                resealed.keyrings, resealed.private_keys, loaded.config.seal.key
            ),
        }
        Ok(())
    })
}

pub(super) fn failed(error: AppError) -> Failure {
    let told = crate::engine::chain(&error);
    if error.is_configuration() { Failure::Usage(told) } else { Failure::Failed(told) }
}
