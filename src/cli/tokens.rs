//! Commands about tokens: sign, verify, inspect, and comparing key sets.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, Which, configuration, fetch};
use super::keysets::print_json;
use super::print::{json_text, plain};
use super::render::str_of;
use super::{Failure, Global, Outcome, Output};
use crate::app::system_now;
use crate::backend::token::{decode, verify_token, weaknesses};
use crate::config::Config;
use crate::keyring::jwk::{ParsedJwk, parse_jwks};
use crate::keyring::time::Span;

/// How far clocks may differ in `verify`.
const LEEWAY: Span = Span::from_secs(60);

/// The longest token read from standard input.
const TOKEN_MAX: u64 = 64 * 1024;

/// What a token shall say.
pub(super) struct Wish {
    pub sub: Option<String>,
    pub aud: Vec<String>,
    pub ttl: Option<String>,
    pub typ: Option<String>,
    pub claims: Vec<String>,
}

pub(super) async fn sign(global: &Global, keyset: Option<&str>, wish: Wish) -> Outcome {
    let keyset = match keyset {
        Some(keyset) => keyset.to_owned(),
        None => only_keyset(&configuration(global)?)?,
    };
    let body = request(wish)?;
    let signer = Client::new(global, Which::Signer)?;
    let answer = signer.send(Method::POST, &format!("/v1/keysets/{keyset}/sign"), Some(&body)).await?;
    match global.output {
        Output::Json => print_json(&answer),
        Output::Text => println!("{}", str_of(&answer["token"])),
    }
    Ok(())
}

fn only_keyset(config: &Config) -> Result<String, Failure> {
    match config.keysets.as_slice() {
        [only] => Ok(only.name.to_string()),
        // A signer's configuration names none.
        [] => Err(Failure::Usage("say which keyset: the configuration has none".to_owned())),
        several => {
            let names: Vec<_> = several.iter().map(|keyset| keyset.name.as_str()).collect();
            Err(Failure::Usage(format!("say which keyset: {}", names.join(", "))))
        }
    }
}

fn request(wish: Wish) -> Result<Value, Failure> {
    let mut claims = Map::new();
    if let Some(sub) = wish.sub {
        claims.insert("sub".to_owned(), sub.into());
    }
    match wish.aud.as_slice() {
        [] => {}
        [one] => _ = claims.insert("aud".to_owned(), one.as_str().into()),
        several => _ = claims.insert("aud".to_owned(), several.into()),
    }
    for claim in &wish.claims {
        let (name, value) = claim
            .split_once('=')
            .ok_or_else(|| Failure::Usage(format!("--claim `{claim}`: write it as name=value")))?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        if claims.insert(name.to_owned(), value).is_some() {
            return Err(Failure::Usage(format!("the claim {name} is given twice")));
        }
    }
    let mut body = Map::from_iter([("claims".to_owned(), Value::from(claims))]);
    if let Some(ttl) = wish.ttl {
        body.insert("ttl".to_owned(), ttl.into());
    }
    if let Some(typ) = wish.typ {
        body.insert("typ".to_owned(), typ.into());
    }
    Ok(body.into())
}

pub(super) async fn verify(
    global: &Global,
    token: &str,
    jwks: Option<String>,
    iss: Option<String>,
    aud: Option<String>,
) -> Outcome {
    let token = argument(token)?;
    let refused = |error: &dyn std::fmt::Display| Failure::Failed(format!("the token is not valid: {error}"));
    let decoded = decode(&token).map_err(|error| refused(&error))?;
    let (keys, issuer) = match jwks {
        Some(url) => {
            let keys = usable(&fetch(&url, global.ca_file.as_deref()).await?)?;
            let issuer = match iss {
                Some(iss) => iss,
                None => issuer_of(&url, global).await?,
            };
            (keys, issuer)
        }
        None => {
            let config = configuration(global)?;
            let wanted = iss.unwrap_or_else(|| decoded.claims.get("iss").map(str_of).unwrap_or_default().to_owned());
            let issuer = config.issuers.iter().find(|issuer| issuer.url == wanted);
            let issuer = issuer.ok_or_else(|| {
                let known: Vec<_> = config.issuers.iter().map(|issuer| issuer.url.as_str()).collect();
                refused(&format!("its iss is `{wanted}`; this daemon's issuers are {}", known.join(", ")))
            })?;
            let document = Client::new(global, Which::Public)?.get(&issuer.jwks_path()).await?;
            (usable(&document)?, wanted)
        }
    };
    let claims = verify_token(&token, &keys, system_now(), &issuer, aud.as_deref(), LEEWAY).map_err(|e| refused(&e))?;
    match global.output {
        Output::Json => print_json(&json!({ "valid": true, "header": decoded.header, "claims": claims })),
        Output::Text => {
            println!(
                "valid: signed by {issuer} with the key {}",
                plain(decoded.header.get("kid").map(str_of).unwrap_or_default())
            );
            println!("{}", json_text(&Value::from(claims)));
        }
    }
    Ok(())
}

/// Whose keys these are, by the discovery document beside them. Never by the token: it would say so itself.
async fn issuer_of(jwks: &str, global: &Global) -> Result<String, Failure> {
    let unknown =
        |why: &str| Failure::Usage(format!("whose keys {jwks} holds is not known ({why}): say it with --iss"));
    let path = jwks.split(['?', '#']).next().unwrap_or_default();
    let base =
        path.strip_suffix("/.well-known/jwks.json").ok_or_else(|| unknown("it has no discovery document beside it"))?;
    let discovery = format!("{base}/.well-known/openid-configuration");
    let document = fetch(&discovery, global.ca_file.as_deref()).await.map_err(|error| match error {
        Failure::Failed(why) | Failure::Usage(why) | Failure::Refused(why) | Failure::Unreachable(why) => unknown(&why),
    })?;
    let issuer = document["issuer"].as_str().filter(|issuer| !issuer.is_empty());
    issuer.map(str::to_owned).ok_or_else(|| unknown(&format!("{discovery} names no issuer")))
}

/// The keys of a set that can verify anything here; a set may hold others.
fn usable(document: &Value) -> Result<Vec<ParsedJwk>, Failure> {
    let keys = parse_jwks(document).map_err(|error| Failure::Failed(error.to_string()))?;
    Ok(keys.into_iter().filter_map(Result::ok).collect())
}

pub(super) fn inspect(global: &Global, token: &str) -> Outcome {
    let token = argument(token)?;
    let decoded = decode(&token).map_err(|error| Failure::Failed(format!("the token cannot be read: {error}")))?;
    let weak: Vec<String> = weaknesses(&decoded, system_now()).iter().map(ToString::to_string).collect();
    if global.output == Output::Json {
        print_json(
            &json!({ "verified": false, "header": decoded.header, "claims": decoded.claims, "weaknesses": weak }),
        );
        return Ok(());
    }
    println!("header {}", json_text(&Value::from(decoded.header)));
    println!("claims {}", json_text(&Value::from(decoded.claims)));
    for weakness in &weak {
        println!("! {}", plain(weakness));
    }
    println!("Nothing was verified: `jwksd verify` does that.");
    Ok(())
}

pub(super) async fn diff(global: &Global, url: &str, issuer: Option<String>) -> Outcome {
    let config = configuration(global)?;
    let chosen = match &issuer {
        Some(name) => config.issuers.iter().find(|issuer| issuer.name.as_str() == name),
        None if config.issuers.len() == 1 => config.issuers.first(),
        None => None,
    };
    let names: Vec<_> = config.issuers.iter().map(|issuer| issuer.name.as_str()).collect();
    let chosen =
        chosen.ok_or_else(|| Failure::Usage(format!("say which issuer with --issuer: {}", names.join(", "))))?;
    let ours = by_kid(&Client::new(global, Which::Public)?.get(&chosen.jwks_path()).await?);
    let theirs = by_kid(&fetch(url, global.ca_file.as_deref()).await?);
    let kids: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let mut differences = Vec::new();
    for kid in kids {
        match (ours.get(kid), theirs.get(kid)) {
            (Some(_), None) => differences.push(("missing", kid, "we publish it, there it is missing")),
            (None, Some(_)) => differences.push(("foreign", kid, "it is published there, not by us")),
            (Some(ours), Some(theirs)) if ours != theirs => {
                differences.push(("tampered", kid, "the same kid with other content"));
            }
            _ => {}
        }
    }
    match global.output {
        Output::Json => {
            let items: Vec<_> = differences.iter().map(|(kind, kid, _)| json!({ "kind": kind, "kid": kid })).collect();
            print_json(&json!({ "equal": items.is_empty(), "differences": items }));
        }
        Output::Text if differences.is_empty() => println!("equal: {} keys", ours.len()),
        Output::Text => differences.iter().for_each(|(kind, kid, text)| println!("{kind:<9} {}  {text}", plain(kid))),
    }
    if differences.is_empty() { Ok(()) } else { Err(Failure::Failed("the key sets differ".to_owned())) }
}

/// The members that make a key what it is, by kid.
fn by_kid(document: &Value) -> BTreeMap<String, Vec<(String, Value)>> {
    let keys = document["keys"].as_array().into_iter().flatten().filter_map(Value::as_object);
    keys.map(|key| {
        let telling = ["kty", "crv", "x", "y", "n", "e", "alg", "use"];
        let members = telling.iter().filter_map(|name| Some(((*name).to_owned(), key.get(*name)?.clone())));
        (key.get("kid").map(str_of).unwrap_or_default().to_owned(), members.collect())
    })
    .collect()
}

/// The argument, or standard input for `-`.
fn argument(token: &str) -> Result<String, Failure> {
    if token != "-" {
        return Ok(token.trim().to_owned());
    }
    let mut text = String::new();
    let read = std::io::stdin().take(TOKEN_MAX).read_to_string(&mut text);
    read.map_err(|error| Failure::Failed(format!("standard input: {error}")))?;
    Ok(text.trim().to_owned())
}
