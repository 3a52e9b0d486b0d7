//! `clock show` and `clock accept`.

use reqwest::Method;
use serde_json::Value;

use super::client::{Client, Which};
use super::keysets::{body_of, confirm, persist, print_json};
use super::render::str_of;
use super::{Action, Global, Outcome, Output};

pub(super) async fn show(global: &Global) -> Outcome {
    let clock = Client::new(global, Which::Admin)?.get("/v1/clock").await?;
    match global.output {
        Output::Json => print_json(&clock),
        Output::Text => println!("{}  {}", str_of(&clock["now"]), trust(&clock["frozen"])),
    }
    Ok(())
}

pub(super) async fn accept(global: &Global, action: &Action) -> Outcome {
    let admin = Client::new(global, Which::Admin)?;
    let body = body_of(&action.request);
    if !action.request.dry_run && !action.yes {
        let clock = admin.get("/v1/clock").await?;
        if clock["frozen"].as_bool().unwrap_or_default() {
            confirm(
                "The wall clock of the daemon's machine stepped. Accepted, it is taken for right: keys move by it, and removals and promotions wait once more.\n",
            )?;
        }
    }
    let answer = persist(&admin, Method::POST, "/v1/clock/accept", &body.into(), action.request.wait).await?;
    let frozen = answer["was_frozen"].as_bool().unwrap_or_default();
    match global.output {
        Output::Json => print_json(&answer),
        Output::Text if !frozen => println!("the clock is trusted: there is nothing to accept"),
        Output::Text if action.request.dry_run => println!("the clock would be accepted (dry run, nothing changed)"),
        Output::Text => println!("the clock is accepted: {}", str_of(&answer["at"])),
    }
    Ok(())
}

fn trust(frozen: &Value) -> &'static str {
    match frozen.as_bool().unwrap_or_default() {
        true => "FROZEN: nothing that waits for time happens until the clock is right again, or `jwksd clock accept`",
        false => "trusted",
    }
}
