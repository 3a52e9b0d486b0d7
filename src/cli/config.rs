//! `check` and `verifiers`: what a configuration means, without running it.

use serde_json::json;

use super::keysets::print_json;
use super::{Failure, Global, Outcome, Output};
use crate::app::{system_now, tls_files};
use crate::config::{Config, ConfigErrors, Keyset, ProcessRole, TlsFiles, examine_files, load};
use crate::engine::chain;
use crate::http::tls::{Standing, Tls};
use crate::keyring::timing::derive;
use crate::keyring::verifiers::presets;

/// Validates, prints the derived timing and warnings. Binds nothing and makes nothing.
pub(super) fn check(global: &Global) -> Outcome {
    let loaded = match load(&global.source(), std::env::vars()) {
        Ok(loaded) => loaded,
        Err(error) => {
            if global.output == Output::Json {
                print_json(&json!({ "valid": false, "errors": lines(&error), "warnings": [], "keysets": [] }));
            }
            return Err(Failure::Usage(chain(&error)));
        }
    };
    let files = examine_files(&loaded.config);
    let mut errors: Vec<String> = loaded.timing.iter().map(|f| format!("{}: {}", f.path(), f.message)).collect();
    errors.extend(files.problems.iter().map(ToString::to_string));
    let mut warnings: Vec<String> = loaded.warnings.iter().chain(&files.warnings).map(ToString::to_string).collect();
    for (table, listener) in loaded.config.listeners() {
        let Some(tls) = &listener.tls else { continue };
        // What cannot even be read was told above.
        if files.problems.iter().any(|problem| problem.path.starts_with(&format!("{table}.tls."))) {
            continue;
        }
        match certificate(&loaded.config, table, tls) {
            Ok(remarks) => warnings.extend(remarks),
            Err(error) => errors.push(error),
        }
    }
    let keysets: Vec<_> = loaded.config.keysets.iter().map(|keyset| (keyset, derive(&keyset.policy))).collect();
    if global.output == Output::Json {
        let derived: Vec<_> = keysets
            .iter()
            .map(|(keyset, derived)| {
                json!({
                    "name": keyset.name, "issuer": keyset.policy.issuer.url, "algorithm": keyset.policy.algorithm.alg(),
                    "propagation_seconds": keyset.policy.rotation.propagation.as_secs(),
                    "visibility_window_seconds": derived.visibility_window.as_secs(),
                    "overlap_seconds": derived.overlap.as_secs(),
                    "worst_case_keys": derived.worst_case_keys,
                })
            })
            .collect();
        print_json(&json!({
            "valid": errors.is_empty(), "errors": errors, "warnings": warnings, "role": loaded.config.role.as_str(),
            "store": loaded.config.store.kind.as_str(), "keysets": derived,
        }));
    } else {
        println!("{} is {}", loaded.origin, if errors.is_empty() { "valid" } else { "not valid" });
        println!("role {}, store {}", loaded.config.role, loaded.config.store.kind);
        if loaded.config.role == ProcessRole::Signer {
            println!("keysets and their timing are those that managers stored");
        }
        for (keyset, derived) in &keysets {
            let policy = &keyset.policy;
            let lag = if policy.rotation.publish_lag.is_zero() { "" } else { "publish lag + " };
            println!("\n{}  {}  {}", keyset.name, policy.algorithm, policy.issuer.url);
            println!("  rotation      {}", policy.rotation.schedule);
            println!(
                "  propagation   {}: a key is published for this long before it may sign",
                policy.rotation.propagation
            );
            println!(
                "  visibility    {}: the least that propagation may be (caches + slowest verifier + {lag}clock skew)",
                derived.visibility_window
            );
            println!(
                "  overlap       {}: a key stays published for this long after it stopped signing",
                derived.overlap
            );
            println!("  keys          at most {} at once in the JWKS", derived.worst_case_keys);
        }
        for warning in &warnings {
            println!("\nwarning: {warning}");
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Failure::Usage(errors.join("\njwksd: "))) }
}

/// Whether a listener can speak TLS with its files now; warnings where that ends soon, or an authority has ended.
fn certificate(config: &Config, table: &str, files: &TlsFiles) -> Result<Vec<String>, String> {
    let prepared = Tls::prepare(&tls_files(config, table, files));
    let prepared = prepared.map_err(|error| format!("{table}.tls: {}", chain(&error)))?;
    let validity = prepared.validity();
    let mut remarks = Vec::new();
    if let (Some(ended), Some(path)) = (prepared.ended_authority(system_now()), &files.client_ca_file) {
        remarks.push(format!(
            "{table}.tls.client_ca_file: {}: an authority in it expired at {ended}, and goes on vouching for its clients: take it \
             out",
            path.display()
        ));
    }
    let (now, place) = (system_now(), format!("{table}.tls.cert_file: {}", files.cert_file.display()));
    match validity.refusal(now) {
        Some(refusal) => Err(format!("{place}: {refusal}")),
        None => {
            if validity.standing(now) == Standing::Ending {
                remarks.push(format!("{place}: the certificate expires at {}: renew it", validity.until));
            }
            Ok(remarks)
        }
    }
}

/// A configuration whose keysets can be foreseen without a daemon: one that runs, and a manager's.
pub(super) fn foreseeable(global: &Global) -> Result<Config, Failure> {
    let loaded = load(&global.source(), std::env::vars()).map_err(|error| Failure::Usage(chain(&error)))?;
    if !loaded.timing.is_empty() {
        let errors: Vec<String> = loaded.timing.iter().map(|f| format!("{}: {}", f.path(), f.message)).collect();
        return Err(Failure::Usage(errors.join("\njwksd: ")));
    }
    if loaded.config.role == ProcessRole::Signer {
        let message = "a signer's keysets and their timing are those that managers stored: use a manager's configuration (--config)";
        return Err(Failure::Usage(message.to_owned()));
    }
    Ok(loaded.config)
}

/// The keyset of that name, or all.
pub(super) fn chosen<'a>(config: &'a Config, keyset: Option<&str>) -> Result<Vec<&'a Keyset>, Failure> {
    let wanted = |known: &&Keyset| keyset.is_none_or(|wanted| known.name.as_str() == wanted);
    let found: Vec<&Keyset> = config.keysets.iter().filter(wanted).collect();
    match (keyset, found.as_slice()) {
        (Some(wanted), []) => {
            let names: Vec<_> = config.keysets.iter().map(|known| known.name.to_string()).collect();
            Err(Failure::Usage(format!("there is no keyset `{wanted}`: there are {}", names.join(", "))))
        }
        _ => Ok(found),
    }
}

/// Each error of its own, for programs.
fn lines(error: &ConfigErrors) -> Vec<String> {
    match error {
        ConfigErrors::Invalid(invalid) => {
            let timing = invalid.timing.iter().map(ToString::to_string);
            invalid.problems.iter().map(ToString::to_string).chain(timing).collect()
        }
        other => vec![chain(other)],
    }
}

/// Lists the presets and how they cache.
pub(super) fn verifiers(global: &Global) -> Outcome {
    if global.output == Output::Json {
        let all: Vec<_> = presets()
            .iter()
            .map(|preset| json!({ "name": preset.name, "product": preset.product, "sees_new_key_within": preset.new.to_string(), "keeps_old_key_for": preset.old.to_string() }))
            .collect();
        print_json(&json!({ "verifiers": all }));
        return Ok(());
    }
    println!("{:<24}  {:<18}  {:<18}  PRODUCT", "NAME", "SEES NEW WITHIN", "KEEPS OLD FOR");
    for preset in presets() {
        println!(
            "{:<24}  {:<18}  {:<18}  {}",
            preset.name,
            preset.new.to_string(),
            preset.old.to_string(),
            preset.product
        );
    }
    Ok(())
}
