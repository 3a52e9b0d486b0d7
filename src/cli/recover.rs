//! `jwksd recover`: after a store was restored from an older copy, or two writers diverged.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::client::fetch;
use super::daemon::{failed, read};
use super::keysets::confirm;
use super::{Action, Failure, Global, Outcome, Output, in_runtime};
use crate::app::{Maintained, open_for_maintenance, system_now};
use crate::clock::SystemClock;
use crate::keyring::jwk::parse_jwks;
use crate::keyring::name::Name;
use crate::keyring::recover::ServedKey;
use crate::store::Store;
use crate::store::file::FileStore;
use crate::store::ledger::{Evidence, RecoveredKeyset, RecoveryOutcome, RecoveryRequest, recover_store};
use crate::store::upstream::{Token, UpstreamSettings, UpstreamStore};

/// Who recovered, in the audit log: whoever may run this may write the store.
const ACTOR: &str = "recover";

#[derive(Args)]
pub(super) struct RecoverArgs {
    /// Another copy of the records: a copy of a file store's or a replica's state folder, or the URL of a manager's
    /// replication listener; may be repeated
    #[arg(long, value_name = "FOLDER|URL")]
    from: Vec<String>,
    /// Bearer token for URLs of --from
    #[arg(long, value_name = "FILE")]
    from_token_file: Option<PathBuf>,
    /// What verifiers are served today: a file or a URL, for one keyset; may be repeated
    #[arg(long, value_name = "[KEYSET=]FILE|URL")]
    jwks: Vec<String>,
    /// Go on although somebody saw more than there are records of
    #[arg(long)]
    lose_newer: bool,
    #[command(flatten)]
    action: Action,
}

pub(super) fn recover(global: &Global, args: RecoverArgs) -> Outcome {
    let loaded = read(&global.source())?;
    in_runtime(async {
        let Maintained { store, keks, own } = open_for_maintenance(&loaded.config).await.map_err(failed)?;
        let named = args.from.iter().map(|from| evidence(from, &args, global));
        let kept = own.map(|(path, store)| Ok(Evidence { store, label: path.display().to_string() }));
        let evidence = named.chain(kept).collect::<Result<Vec<_>, _>>()?;
        let keysets = keysets(store.as_ref(), &evidence).await?;
        let mut served: BTreeMap<Name, Vec<ServedKey>> = BTreeMap::new();
        for source in &args.jwks {
            let (keyset, keys) = served_keys(source, &keysets, global).await?;
            served.entry(keyset).or_default().extend(keys);
        }
        let request = |dry_run| RecoveryRequest {
            evidence: &evidence,
            served: &served,
            lose_newer: args.lose_newer,
            dry_run,
            actor: ACTOR,
            reason: args.action.request.reason.as_deref(),
            now: system_now(),
        };
        let refused = |error| Failure::Failed(crate::engine::chain(&error));
        let planned = recover_store(store.clone(), &keks, &request(true)).await.map_err(refused)?;
        if args.action.request.dry_run || planned.is_nothing() {
            return print(global, &planned, true);
        }
        if !args.action.yes {
            confirm(&described(&planned))?;
        }
        let done = recover_store(store, &keks, &request(false)).await.map_err(refused)?;
        print(global, &done, false)
    })
}

/// Of every place: a record may be lost in the store.
async fn keysets(store: &dyn Store, evidence: &[Evidence]) -> Result<Vec<Name>, Failure> {
    let mut names = BTreeSet::new();
    for store in std::iter::once(store).chain(evidence.iter().map(|evidence| evidence.store.as_ref())) {
        let found = store.keysets().await.map_err(|error| Failure::Failed(crate::engine::chain(&error)))?;
        names.extend(found);
    }
    Ok(names.into_iter().collect())
}

fn evidence(from: &str, args: &RecoverArgs, global: &Global) -> Result<Evidence, Failure> {
    let unusable = |error: String| Failure::Usage(format!("--from {from}: {error}"));
    let store: Arc<dyn Store> = if from.starts_with("http://") || from.starts_with("https://") {
        let token = args.from_token_file.clone();
        let token = token.ok_or_else(|| unusable("name the bearer token's file with --from-token-file".to_owned()))?;
        let settings = UpstreamSettings {
            ca_file: global.ca_file.clone(),
            ..UpstreamSettings::new(vec![from.to_owned()], Token::File(token))
        };
        let opened = UpstreamStore::open(settings, Arc::new(SystemClock));
        Arc::new(opened.map_err(|error| unusable(crate::engine::chain(&error)))?)
    } else {
        Arc::new(FileStore::open(from.as_ref()).map_err(|error| unusable(crate::engine::chain(&error)))?)
    };
    Ok(Evidence { store, label: from.to_owned() })
}

async fn served_keys(source: &str, keysets: &[Name], global: &Global) -> Result<(Name, Vec<ServedKey>), Failure> {
    let named = source.split_once('=').filter(|(name, _)| Name::parse(name).is_ok());
    let (keyset, place) = match (named, keysets) {
        (Some((name, place)), _) => (Name::parse(name).ok(), place),
        (None, [only]) => (Some(only.clone()), source),
        (None, _) => (None, source),
    };
    let keyset = keyset.filter(|keyset| keysets.contains(keyset)).ok_or_else(|| {
        let known: Vec<&str> = keysets.iter().map(Name::as_str).collect();
        Failure::Usage(format!("--jwks {source}: say whose keys these are, KEYSET=…, of {}", known.join(", ")))
    })?;
    let document: Value = if place.starts_with("http://") || place.starts_with("https://") {
        fetch(place, global.ca_file.as_deref()).await?
    } else {
        let text = std::fs::read(place).map_err(|error| Failure::Usage(format!("--jwks {place}: {error}")))?;
        serde_json::from_slice(&text).map_err(|error| Failure::Usage(format!("--jwks {place} is not JSON: {error}")))?
    };
    let wrong = |error: &dyn std::fmt::Display| Failure::Usage(format!("--jwks {place}: {error}"));
    let mut keys = Vec::new();
    for parsed in parse_jwks(&document).map_err(|error| wrong(&error))? {
        let parsed = parsed.map_err(|error| wrong(&error))?;
        let algorithm = parsed.algorithm.or_else(|| parsed.public.algorithms().first().copied());
        let algorithm = algorithm.ok_or_else(|| wrong(&"a key fits no algorithm that jwksd has"))?;
        keys.push(ServedKey { kid: parsed.kid_or_thumbprint(), algorithm, public: parsed.public });
    }
    Ok((keyset, keys))
}

fn described(outcome: &RecoveryOutcome) -> String {
    let mut text = String::new();
    for keyset in &outcome.keysets {
        text.push_str(&line(keyset));
    }
    for keyset in &outcome.renewed {
        text.push_str(&format!(
            "{keyset}: nothing is left of it; it begins anew, and its first key waits for propagation\n"
        ));
    }
    if !outcome.installation_is_intact {
        text.push_str("the installation's record is written anew\n");
    }
    for problem in &outcome.unusable {
        text.push_str(&format!("not used: {problem}\n"));
    }
    text
}

fn line(keyset: &RecoveredKeyset) -> String {
    let recovered = &keyset.recovered;
    let keyring = &recovered.keyring;
    let signs = keyring.active().map_or("no key signs yet".to_owned(), |key| format!("{} signs", key.kid));
    let mut text =
        format!("{}: goes on from {}, as generation {}; {signs}\n", keyring.keyset, keyset.base, keyring.generation);
    let lists = [
        ("stay published until their tokens have expired", &recovered.kept),
        ("are revoked, as another copy or the served keys say", &recovered.revoked),
        ("are published now and wait for propagation", &recovered.waiting),
        ("have private keys left in their backend that nothing refers to", &recovered.abandoned),
    ];
    for (what, kids) in lists.into_iter().filter(|(_, kids)| !kids.is_empty()) {
        let kids: Vec<&str> = kids.iter().map(|kid| kid.as_str()).collect();
        text.push_str(&format!("  {} {what}\n", kids.join(", ")));
    }
    text
}

fn print(global: &Global, outcome: &RecoveryOutcome, dry_run: bool) -> Outcome {
    match global.output {
        Output::Json => {
            let keysets: Vec<Value> = outcome
                .keysets
                .iter()
                .map(|keyset| {
                    let recovered = &keyset.recovered;
                    json!({
                        "keyset": recovered.keyring.keyset, "from": keyset.base,
                        "generation": recovered.keyring.generation, "lineage": recovered.keyring.lineage,
                        "active_kid": recovered.keyring.active().map(|key| key.kid.as_str()),
                        "kept": recovered.kept, "revoked": recovered.revoked, "waiting": recovered.waiting,
                        "abandoned": recovered.abandoned,
                    })
                })
                .collect();
            println!(
                "{:#}",
                json!({ "dry_run": dry_run, "keysets": keysets, "renewed": outcome.renewed, "not_used": outcome.unusable })
            );
        }
        Output::Text if outcome.is_nothing() => {
            for problem in &outcome.unusable {
                println!("not used: {problem}");
            }
            println!("nothing to recover: the store holds the newest record of every keyset");
        }
        Output::Text => {
            let text = described(outcome);
            println!("{}", text.trim_end());
            println!("{}", if dry_run { "nothing was changed" } else { "recovered" });
        }
    }
    Ok(())
}
