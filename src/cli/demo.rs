//! `serve --demo`: the whole life of keys in a few minutes, in memory, told as it happens.

use std::sync::Arc;
use std::time::Duration;

use super::{Failure, Outcome};
use crate::app::{App, Storage, stop_signal};
use crate::config::Format;
use crate::config::Source;
use crate::engine::Engine;
use crate::keyring::claims::parse_request;
use crate::keyring::record::{AuditEntry, KeyState, Keyring};
use crate::telemetry::{hardening, logging};

/// A rotation every minute; a key waits 20 s before it signs and stays 24 s after it. Store and seal are not used.
const CONFIG: &str = r#"
[public]
listen = "127.0.0.1:8620"
[signer]
listen = "127.0.0.1:8621"
[admin]
listen = "127.0.0.1:8622"
[admin.token.demo]
role = "operator"
env = "JWKSD_DEMO_TOKEN"
[ops]
listen = "127.0.0.1:8623"
[store]
kind = "file"
path = "demo-store"
[seal]
kind = "file"
path = "demo-seal.key"
[log]
level = "error"
[issuer.demo]
url = "http://127.0.0.1:8620"
max_age = "2s"
[keyset.demo]
algorithm = "ES256"
backend = "local"
[keyset.demo.rotation]
every = "1m"
propagation = "20s"
successors = 1
verifiers = ["10s"]
[keyset.demo.tokens]
max_ttl = "20s"
default_ttl = "20s"
clock_skew = "2s"
required_claims = ["sub"]
"#;

/// How often the story looks for news.
const LOOK: Duration = Duration::from_millis(500);

pub(super) fn serve() -> Outcome {
    let token = crate::app::fresh_token();
    let source =
        Source::Text { name: "the demo's configuration".to_owned(), text: CONFIG.to_owned(), format: Format::Toml };
    let environment = std::env::vars().filter(|(name, _)| name.starts_with("JWKSD__"));
    let loaded = crate::config::load(&source, environment).map_err(|error| Failure::Usage(error.to_string()))?;
    let filter =
        logging::LogFilter::parse("error,jwksd::audit=off").map_err(|error| Failure::Usage(error.to_string()))?;
    logging::init(logging::LogFormat::Text, &filter).map_err(|error| Failure::Usage(error.to_string()))?;
    let _ = hardening::harden();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.map_err(|error| Failure::Failed(error.to_string()))?.block_on(async {
        let failed = |error: crate::app::AppError| Failure::Failed(crate::engine::chain(&error));
        let stop = stop_signal().map_err(failed)?;
        let app = App::build(loaded, source, Storage::Memory { admin_token: token.clone() }).await.map_err(failed)?;
        let engine = app.engine().clone();
        let story = tokio::spawn(tell(engine, token));
        let result = app.run(stop).await.map_err(failed);
        story.abort();
        result
    })
}

async fn tell(engine: Arc<Engine>, token: String) {
    while !engine.is_open() {
        tokio::time::sleep(LOOK).await;
    }
    let Some(cell) = engine.keyset("demo") else { return };
    println!("jwksd demo: everything in memory, one rotation a minute. Stop it with Ctrl-C.\n");
    introduce(&engine, &cell, &token).await;
    let mut told = 0;
    loop {
        let keyring = cell.snapshot.load_full().keyring.clone();
        for entry in keyring.journal.audit.iter().filter(|entry| entry.seq >= told) {
            println!("{}  {}", entry.at.to_chrono().format("%H:%M:%S"), sentence(&keyring, entry));
        }
        told = keyring.journal.next_seq;
        tokio::time::sleep(LOOK).await;
    }
}

async fn introduce(engine: &Arc<Engine>, cell: &crate::engine::KeysetCell, token: &str) {
    let request = parse_request(br#"{"claims":{"sub":"alice","aud":"demo"}}"#);
    let issued = match request {
        Ok(request) => engine.sign(cell, &request, None, "demo").await,
        Err(_) => return,
    };
    println!("Published keys:    curl http://127.0.0.1:8620/.well-known/jwks.json");
    println!(
        "Sign a token:      curl -H 'Content-Type: application/json' -d '{{\"claims\":{{\"sub\":\"alice\"}}}}' http://127.0.0.1:8621/v1/keysets/demo/sign"
    );
    if let Ok(issued) = issued {
        println!("A token (20 s):    {}", issued.token);
        println!("Verify it:         jwksd verify --jwks http://127.0.0.1:8620/.well-known/jwks.json {}", issued.token);
        println!("Look into it:      jwksd inspect {}", issued.token);
    }
    println!("Watch:             JWKSD_TOKEN={token} jwksd --server 127.0.0.1:8622 status --watch");
    println!("Rotate now:        JWKSD_TOKEN={token} jwksd --server 127.0.0.1:8622 rotate\n");
}

/// What an audit entry means, for someone who sees it for the first time.
fn sentence(keyring: &Keyring, entry: &AuditEntry) -> String {
    let keys: Vec<String> = entry
        .kids
        .iter()
        .map(|kid| {
            let serial = keyring.key_by_kid(kid.as_str()).map_or(0, |key| key.serial);
            format!("key {serial} ({})", super::render::short_kid(kid.as_str()))
        })
        .collect();
    let keys = keys.join(", ");
    let active = keyring.keys.iter().find(|key| key.state == KeyState::Active).map_or(0, |key| key.serial);
    match entry.action.as_str() {
        "created" => format!("{keys} is made and published; it may not sign before every verifier can have seen it"),
        "propagated" => format!("{keys} has been published for 20 s: ready to take over"),
        "promoted" => format!("{keys} signs from now on; key {active} is first in the JWKS"),
        "retired" => format!("{keys} leaves the JWKS: the last token it signed has expired for every clock"),
        "destroyed" => format!("the private half of {keys} is destroyed"),
        other => format!("{other}: {keys}"),
    }
}
