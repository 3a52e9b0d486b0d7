//! Commands of operators: look, rotate, hold, revoke, import.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use reqwest::Method;
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

use super::client::{Client, Which, fetch};
use super::print::{json_text, plain};
use super::render::{self, str_of};
use super::timeline::{draw, width};
use super::{Action, Failure, Global, Health, Outcome, Output, Unasked, time_or_duration};
use crate::app::system_now;
use crate::keyring::jwk::parse_jwks;
use crate::keyring::time::{Span, Timestamp};

/// How often `status --watch` looks.
const WATCH_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn status(
    global: &Global,
    keyset: Option<&str>,
    watch: bool,
    history: bool,
    timeline: bool,
) -> Outcome {
    let admin = Client::new(global, Which::Admin)?;
    let query = if history { "?history=true" } else { "" };
    loop {
        let mut keysets = match keyset {
            Some(name) => vec![admin.get(&format!("/v1/keysets/{name}{query}")).await?],
            None => list(&admin, query).await?,
        };
        for keyset in keysets.iter_mut().filter(|_| timeline) {
            keyset["timeline"] = admin.get(&format!("/v1/keysets/{}/timeline", str_of(&keyset["name"]))).await?;
        }
        if global.output == Output::Json {
            print_json(&if keyset.is_some() { keysets[0].clone() } else { json!({ "keysets": keysets }) });
        } else {
            if watch {
                print!("\x1b[2J\x1b[H");
            }
            let colour = render::colour();
            let drawn = |keyset: &Value| {
                let table = render::keyset(keyset, system_now(), colour);
                if timeline { table + &draw(&keyset["timeline"], width(), colour) } else { table }
            };
            let drawn: Vec<_> = keysets.iter().map(drawn).collect();
            print!("{}", drawn.join("\n"));
            let _ = std::io::stdout().flush();
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// The replicas of the daemon's store.
pub(super) async fn replicas(global: &Global) -> Outcome {
    let list = Client::new(global, Which::Admin)?.get("/v1/replicas").await?;
    match global.output {
        Output::Json => print_json(&list),
        Output::Text => print!("{}", render::replicas(&list, system_now(), render::colour())),
    }
    Ok(())
}

pub(super) async fn rotate(
    global: &Global,
    keyset: Option<&str>,
    allow_unpropagated: bool,
    confirm_algorithm: Option<String>,
    action: &Action,
) -> Outcome {
    let mut body = body_of(&action.request);
    if allow_unpropagated {
        body.insert("allow_unpropagated".to_owned(), true.into());
    }
    if let Some(alg) = confirm_algorithm {
        body.insert("confirm_algorithm".to_owned(), alg.into());
    }
    let admin = Client::new(global, Which::Admin)?;
    let keyset = chosen(&admin, keyset).await?;
    let risky = allow_unpropagated || body.contains_key("confirm_algorithm");
    carry_out(global, &admin, (Method::POST, &format!("/v1/keysets/{keyset}/rotate")), body, action, risky).await
}

/// compromise, rollback, drain
pub(super) async fn act(
    global: &Global,
    keyset: Option<String>,
    name: &str,
    method: Method,
    action: &Action,
) -> Outcome {
    let admin = Client::new(global, Which::Admin)?;
    let keyset = chosen(&admin, keyset.as_deref()).await?;
    let path = format!("/v1/keysets/{keyset}/{name}");
    carry_out(global, &admin, (method, &path), body_of(&action.request), action, true).await
}

pub(super) async fn revoke(global: &Global, target: &[String], action: &Action) -> Outcome {
    let (keyset, key) = match target {
        [key] => (None, key),
        [keyset, key] => (Some(keyset.as_str()), key),
        _ => return Err(Failure::Usage("give a key, or a keyset and a key".to_owned())),
    };
    let admin = Client::new(global, Which::Admin)?;
    let keyset = chosen(&admin, keyset).await?;
    let shown = admin.get(&format!("/v1/keysets/{keyset}?history=true")).await?;
    let kid = resolve(&shown, key)?;
    let path = format!("/v1/keysets/{keyset}/keys/{}/revoke", escaped(&kid));
    carry_out(global, &admin, (Method::POST, &path), body_of(&action.request), action, true).await
}

pub(super) async fn hold(global: &Global, keyset: Option<&str>, until: Option<String>, request: &Unasked) -> Outcome {
    let mut body = body_of(request);
    if let Some(until) = until {
        body.insert("until".to_owned(), time_or_duration(&until, system_now())?.to_rfc3339().into());
    }
    let admin = Client::new(global, Which::Admin)?;
    let keyset = chosen(&admin, keyset).await?;
    let path = format!("/v1/keysets/{keyset}/hold");
    let mut hold = persist(&admin, Method::PUT, &path, &body.into(), request.wait).await?;
    if request.dry_run {
        hold["dry_run"] = true.into();
    }
    match global.output {
        Output::Json => print_json(&hold),
        Output::Text => {
            let until = hold["until"].as_str().map_or("until it is resumed".to_owned(), |at| format!("until {at}"));
            match request.dry_run {
                true => println!("{keyset} would be held {until} (dry run, nothing changed)"),
                false => println!("{keyset} is held {until}"),
            }
        }
    }
    Ok(())
}

pub(super) async fn resume(global: &Global, keyset: Option<&str>, request: &Unasked) -> Outcome {
    let admin = Client::new(global, Which::Admin)?;
    let keyset = chosen(&admin, keyset).await?;
    let path = format!("/v1/keysets/{keyset}/hold");
    persist(&admin, Method::DELETE, &path, &body_of(request).into(), request.wait).await?;
    let mut answer = json!({ "keyset": keyset, "hold": null });
    if request.dry_run {
        answer["dry_run"] = true.into();
    }
    match global.output {
        Output::Json => print_json(&answer),
        Output::Text if request.dry_run => println!("{keyset} would not be held (dry run, nothing changed)"),
        Output::Text => println!("{keyset} is not held"),
    }
    Ok(())
}

pub(super) async fn audit(global: &Global, keyset: Option<&str>, after: Option<String>) -> Outcome {
    let admin = Client::new(global, Which::Admin)?;
    let mut after = after;
    let mut all = Vec::new();
    loop {
        let mut query: Vec<String> = after.iter().map(|after| format!("after={}", escaped(after))).collect();
        query.extend(keyset.map(|keyset| format!("keyset={keyset}")));
        let page = admin.get(&format!("/v1/audit?{}", query.join("&"))).await?;
        let items = page["items"].as_array().cloned().unwrap_or_default();
        if items.is_empty() {
            break;
        }
        all.extend(items);
        after = page["next"].as_str().map(str::to_owned);
    }
    if global.output == Output::Json {
        print_json(&json!({ "items": all, "next": after }));
        return Ok(());
    }
    for item in &all {
        let kids: Vec<_> =
            item["kids"].as_array().into_iter().flatten().map(|kid| render::short_kid(&plain(str_of(kid)))).collect();
        let reason = plain(str_of(&item["reason"]));
        println!(
            "{:<24}  {:<12}  {:<14}  {:<12}  {}  {reason}",
            plain(str_of(&item["time"])),
            plain(str_of(&item["keyset"])),
            plain(str_of(&item["action"])),
            plain(str_of(&item["actor"])),
            kids.join(" ")
        );
    }
    Ok(())
}

/// Keys to import.
#[derive(Args)]
pub(super) struct ImportArgs {
    keyset: Option<String>,
    /// Private key: PEM (PKCS#8, SEC 1, PKCS#1) or JWK
    #[arg(long, value_name = "FILE", group = "source")]
    key: Option<PathBuf>,
    /// Public key or JWK Set: PEM or JSON
    #[arg(long, value_name = "FILE", group = "source")]
    public: Option<PathBuf>,
    /// The keys of a JWKS served elsewhere, as public keys
    #[arg(long, value_name = "URL", group = "source")]
    jwks: Option<String>,
    /// A key in AWS KMS, by its ARN, for a keyset with that backend; it stays its owner's
    #[arg(long, value_name = "ARN", group = "source")]
    aws_kms: Option<String>,
    /// The kid under which verifiers know the key [default: its own, else its thumbprint]
    #[arg(long, allow_hyphen_values = true)]
    kid: Option<String>,
    /// Its algorithm, where nothing else says
    #[arg(long)]
    alg: Option<String>,
    /// The longest life of tokens it already signed
    #[arg(long, value_name = "DURATION")]
    max_token_life: Option<String>,
    /// Since when verifiers can fetch it elsewhere (RFC 3339)
    #[arg(long, value_name = "TIME")]
    published_since: Option<String>,
    /// Public keys stay published until then (RFC 3339, or a duration from now)
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    #[command(flatten)]
    request: Unasked,
}

pub(super) async fn import(global: &Global, arguments: ImportArgs) -> Outcome {
    let mut common = body_of(&arguments.request);
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            common.insert(name.to_owned(), value.into());
        }
    };
    put("alg", arguments.alg.clone());
    put("kid", arguments.kid.clone());
    if let Some(life) = &arguments.max_token_life {
        Span::parse(life).map_err(|error| Failure::Usage(format!("--max-token-life: {error}")))?;
    }
    put("max_token_life", arguments.max_token_life.clone());
    if let Some(since) = &arguments.published_since {
        let at = Timestamp::parse_rfc3339(since);
        let at = at.ok_or_else(|| Failure::Usage(format!("--published-since: `{since}` is not an RFC 3339 time")))?;
        put("published_since", Some(at.to_rfc3339()));
    }
    if let Some(until) = &arguments.until {
        put("until", Some(time_or_duration(until, system_now())?.to_rfc3339()));
    }
    let admin = Client::new(global, Which::Admin)?;
    let keyset = chosen(&admin, arguments.keyset.as_deref()).await?;
    let path = format!("/v1/keysets/{keyset}/import");
    for (member, text) in sources(global, &arguments).await? {
        let mut body = common.clone();
        body.insert(member.to_owned(), text.as_str().into());
        let outcome = persist(&admin, Method::POST, &path, &body.into(), arguments.request.wait).await?;
        show(global, &outcome);
    }
    Ok(())
}

/// What to send: the member's name and its text.
async fn sources(global: &Global, arguments: &ImportArgs) -> Result<Vec<(&'static str, Zeroizing<String>)>, Failure> {
    let read = |path: &PathBuf| {
        let text =
            std::fs::read_to_string(path).map_err(|error| Failure::Usage(format!("{}: {error}", path.display())));
        text.map(Zeroizing::new)
    };
    if let Some(arn) = &arguments.aws_kms {
        return Ok(vec![("aws_kms", Zeroizing::new(arn.clone()))]);
    }
    let set = match (&arguments.key, &arguments.public, &arguments.jwks) {
        (Some(path), None, None) => return Ok(vec![("private_key", read(path)?)]),
        (None, Some(path), None) => {
            let text = read(path)?;
            match serde_json::from_str::<Value>(&text) {
                Ok(value) if value.get("keys").is_some() => value,
                _ => return Ok(vec![("public_key", text)]),
            }
        }
        (None, None, Some(url)) => fetch(url, global.ca_file.as_deref()).await?,
        _ => return Err(Failure::Usage("give one of --key, --public, --jwks and --aws-kms".to_owned())),
    };
    // Refuse the whole set before the first key of it is imported.
    let parsed = parse_jwks(&set).map_err(|error| Failure::Usage(error.to_string()))?;
    for (position, key) in parsed.iter().enumerate() {
        if let Err(error) = key {
            return Err(Failure::Usage(format!("key {} of the set: {error}", position + 1)));
        }
    }
    if arguments.kid.is_some() && parsed.len() != 1 {
        return Err(Failure::Usage("--kid names one key, the set has several".to_owned()));
    }
    let keys = set["keys"].as_array().into_iter().flatten();
    Ok(keys.map(|key| ("public_key", Zeroizing::new(key.to_string()))).collect())
}

pub(super) async fn healthcheck(global: &Global, asked: Health) -> Outcome {
    let ops = Client::new(global, Which::Ops)?;
    let (path, is) = match asked {
        Health::Alive => ("/livez", "alive"),
        Health::ReadyToPublish => ("/readyz", "ready"),
        Health::ReadyToSign => ("/readyz/sign", "ready"),
    };
    match ops.try_send(Method::GET, path, None).await? {
        Ok(answer) => {
            match global.output {
                Output::Json => print_json(&answer),
                Output::Text => println!("{is}"),
            }
            Ok(())
        }
        Err(problem) => Err(Failure::Failed(problem.to_string())),
    }
}

/// Shows what would happen, asks, does it, shows what happened.
async fn carry_out(
    global: &Global,
    admin: &Client,
    (method, path): (Method, &str),
    body: Map<String, Value>,
    action: &Action,
    risky: bool,
) -> Outcome {
    if risky && !action.request.dry_run && !action.yes {
        let mut trial = body.clone();
        trial.insert("dry_run".to_owned(), true.into());
        let outcome = admin.send(method.clone(), path, Some(&trial.into())).await?;
        confirm(&render::outcome(&outcome, false))?;
    }
    let outcome = persist(admin, method, path, &body.into(), action.request.wait).await?;
    show(global, &outcome);
    Ok(())
}

/// Has it done; with `wait` as soon as it can be.
pub(super) async fn persist(
    admin: &Client,
    method: Method,
    path: &str,
    body: &Value,
    wait: bool,
) -> Result<Value, Failure> {
    loop {
        match admin.try_send(method.clone(), path, Some(body)).await? {
            Ok(answer) => return Ok(answer),
            Err(problem) if wait && problem.status.as_u16() == 409 => {
                let at = problem.body["next_standby_at"].as_str().and_then(Timestamp::parse_rfc3339);
                let Some(at) = at else { return Err(Failure::Refused(problem.to_string())) };
                eprintln!("waiting until {at}");
                tokio::time::sleep(at.since(system_now()).to_std().max(Duration::from_millis(200))).await;
            }
            Err(problem) if wait && problem.status.as_u16() == 503 => {
                let seconds = problem.body["retry_after_seconds"].as_u64().unwrap_or(1);
                tokio::time::sleep(Duration::from_secs(seconds)).await;
            }
            Err(problem) => return Err(Failure::Refused(problem.to_string())),
        }
    }
}

/// Shows what would happen and asks.
pub(super) fn confirm(what: &str) -> Outcome {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage(
            "this cannot be undone and there is no terminal to ask on: use --yes, or --dry-run".to_owned(),
        ));
    }
    eprint!("{what}");
    eprint!("Do it? [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    match read {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => Err(Failure::Failed("nothing was changed".to_owned())),
    }
}

fn show(global: &Global, outcome: &Value) {
    match global.output {
        Output::Json => print_json(outcome),
        Output::Text => print!("{}", render::outcome(outcome, render::colour())),
    }
}

pub(super) fn body_of(request: &Unasked) -> Map<String, Value> {
    let mut body = Map::new();
    if let Some(reason) = &request.reason {
        body.insert("reason".to_owned(), reason.as_str().into());
    }
    if request.dry_run {
        body.insert("dry_run".to_owned(), true.into());
    }
    body
}

async fn list(admin: &Client, query: &str) -> Result<Vec<Value>, Failure> {
    let answer = admin.get(&format!("/v1/keysets{query}")).await?;
    Ok(answer["keysets"].as_array().cloned().unwrap_or_default())
}

/// The named keyset, or the only one.
pub(super) async fn chosen(admin: &Client, keyset: Option<&str>) -> Result<String, Failure> {
    if let Some(keyset) = keyset {
        return Ok(keyset.to_owned());
    }
    let keysets = list(admin, "").await?;
    let names: Vec<_> = keysets.iter().map(|keyset| str_of(&keyset["name"]).to_owned()).collect();
    match names.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Failure::Refused("the daemon has no keyset".to_owned())),
        _ => Err(Failure::Usage(format!("say which keyset: {}", names.join(", ")))),
    }
}

/// Stands before a kid, or a prefix of one, that would be taken for an option.
pub(super) const KID_MARK: &str = "kid:";

/// A kid, a unique prefix of one, or a serial.
fn resolve(keyset: &Value, wanted: &str) -> Result<String, Failure> {
    let keys: Vec<&Value> = keyset["keys"].as_array().into_iter().flatten().collect();
    let literal = keys.iter().any(|key| str_of(&key["kid"]).starts_with(wanted));
    let wanted = wanted.strip_prefix(KID_MARK).filter(|_| !literal).unwrap_or(wanted);
    let kids = |filter: &dyn Fn(&Value) -> bool| -> Vec<String> {
        keys.iter().filter(|key| filter(key)).map(|key| str_of(&key["kid"]).to_owned()).collect()
    };
    let exact = kids(&|key| str_of(&key["kid"]) == wanted);
    let serial = kids(&|key| wanted.parse::<u64>().is_ok_and(|wanted| key["serial"].as_u64() == Some(wanted)));
    let prefix = kids(&|key| str_of(&key["kid"]).starts_with(wanted));
    let found = [exact, serial, prefix].into_iter().find(|found| !found.is_empty()).unwrap_or_default();
    match found.as_slice() {
        [kid] => Ok(kid.clone()),
        [] => Err(Failure::Usage(format!(
            "no key has the kid, prefix or serial `{wanted}`: see `jwksd status --history`"
        ))),
        several => Err(Failure::Usage(format!("`{wanted}` fits several keys: {}", several.join(", ")))),
    }
}

/// Percent-encodes what a path segment or query value must not hold (RFC 3986 §2.3).
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

pub(super) fn print_json(value: &Value) {
    println!("{}", json_text(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_by_kid_prefix_or_serial() {
        let keyset = json!({ "keys": [{ "kid": "abcdef", "serial": 1 }, { "kid": "abxyz", "serial": 2 }, { "kid": "3zz", "serial": 7 }] });
        for (wanted, kid) in
            [("abcdef", "abcdef"), ("abc", "abcdef"), ("2", "abxyz"), ("3", "3zz"), ("7", "3zz"), ("kid:abc", "abcdef")]
        {
            assert_eq!(resolve(&keyset, wanted).unwrap(), kid);
        }
        for wanted in ["ab", "nope", "9"] {
            assert!(matches!(resolve(&keyset, wanted), Err(Failure::Usage(_))), "{wanted}");
        }
    }
}
