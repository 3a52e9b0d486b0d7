//! `jwksd migrate`: everything into another store.

use std::path::PathBuf;

use clap::Args;

use super::daemon::{failed, read};
use super::{Failure, Global, Outcome, Output, in_runtime};
use crate::app::{open_for_migration, system_now};
use crate::config::Source;
use crate::store::ledger::{MigrateError, migrate_store};

#[derive(Args)]
pub(super) struct MigrateArgs {
    /// The configuration to go on with: its [store] is filled, its [seal] must be the same
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
}

pub(super) fn migrate(global: &Global, args: &MigrateArgs) -> Outcome {
    let from = read(&global.source())?;
    let to = read(&Source::File(args.to.clone()))?;
    in_runtime(async {
        let (source, target) = open_for_migration(&from.config, &to.config).await.map_err(failed)?;
        let done = migrate_store(&source, &target, system_now()).await.map_err(refused)?;
        let (old, new) = (from.config.store.kind.to_string(), to.config.store.kind.to_string());
        match global.output {
            Output::Json => println!(
                "{:#}",
                serde_json::json!({
                    "keyrings": done.keyrings, "already": done.already, "from": old, "to": new,
                    "does_not_fit": to.timing.iter().map(|finding| finding.path()).collect::<Vec<_>>(),
                })
            ),
            Output::Text => {
                let what = if done.already { "moved before" } else { "moved" };
                println!("{what}: {} keyrings, from {old} to {new}", done.keyrings);
                for finding in &to.timing {
                    println!("{}: {}", finding.path(), finding.message);
                }
                if !to.timing.is_empty() {
                    println!("with these it starts degraded: it serves and signs, and promotes nothing");
                }
                println!("start jwksd with {} from now on", args.to.display());
                println!(
                    "move the old store away: it is as it was, and a daemon that is started on it makes keys of its own"
                );
            }
        }
        Ok(())
    })
}

fn refused(error: MigrateError) -> Failure {
    let told = crate::engine::chain(&error);
    match error {
        MigrateError::SameStore { .. } => Failure::Usage(told),
        _ => Failure::Failed(told),
    }
}
