//! Configuration files: JSON where the first character is a brace, else TOML.

use jwksd::config::{ConfigErrors, Format, Loaded, Problem, Source, load};
use jwksd::keyring::timing::{Finding, derive};
use toml::Value;

use super::{Verdict, assert_presentable};

/// More of a name or a value is not shown, so a message stays below this, in bytes.
const LONGEST_MESSAGE: usize = 8 * 1024;

/// Stands in for what people write into keys that ask for no secret.
const PLANTED: &str = "hunter2 is the password!";

/// Keys in which a secret was put by mistake: they do not exist, or hold the name of a variable.
const SECRET_KEYS: [&str; 13] = [
    "token",
    "secret",
    "password",
    "token_env",
    "secret_env",
    "url_env",
    "env",
    "dsn",
    "user",
    "secret_access_key",
    "session_token",
    "key",
    "value",
];

pub fn run(input: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(input) else { return Verdict::Refused };
    let format = if text.starts_with('{') { Format::Json } else { Format::Toml };
    let outcome = read(text, format);
    match &outcome {
        Ok(loaded) => what_is_accepted_makes_sense(loaded),
        Err(errors) => refusals_say_where_and_why(text, errors),
    }
    if format == Format::Toml
        && let Ok(tree) = toml::from_str::<toml::Table>(text)
    {
        let tree = Value::Table(tree);
        it_means_the_same_in_json(&tree, &outcome);
        secrets_are_not_shown(tree);
    }
    if outcome.is_ok() { Verdict::Accepted } else { Verdict::Refused }
}

fn read(text: &str, format: Format) -> Result<Loaded, ConfigErrors> {
    let source = Source::Text { name: "jwksd.toml".to_owned(), text: text.to_owned(), format };
    load(&source, std::iter::empty())
}

fn what_is_accepted_makes_sense(loaded: &Loaded) {
    loaded.warnings.iter().for_each(presentable);
    loaded.timing.iter().for_each(presentable_finding);
    for keyset in &loaded.config.keysets {
        let derived = derive(&keyset.policy);
        assert!(derived.worst_case_keys > 0);
        assert!(derived.overlap >= keyset.policy.tokens.max_ttl);
        let stored = serde_json::to_string(&keyset.policy).expect("a policy can be written into a record");
        assert_eq!(
            serde_json::from_str::<jwksd::keyring::policy::Policy>(&stored).ok().as_ref(),
            Some(keyset.policy.as_ref())
        );
    }
}

fn refusals_say_where_and_why(text: &str, errors: &ConfigErrors) {
    match errors {
        ConfigErrors::Syntax { line, column, message, .. } => {
            let lines = text.matches('\n').count() + 1;
            assert!((1..=lines).contains(line), "line {line} of {lines}");
            assert!(*column >= 1);
            assert_presentable(message, LONGEST_MESSAGE);
        }
        ConfigErrors::Invalid(invalid) => {
            assert!(!invalid.problems.is_empty() || !invalid.timing.is_empty(), "refused without a problem");
            invalid.problems.iter().chain(&invalid.warnings).for_each(presentable);
            invalid.timing.iter().for_each(presentable_finding);
        }
        ConfigErrors::Unreadable { .. } => panic!("a text at hand is readable"),
    }
}

fn presentable(problem: &Problem) {
    assert_presentable(&problem.path, 1024);
    assert_presentable(&problem.message, LONGEST_MESSAGE);
}

fn presentable_finding(finding: &Finding) {
    assert_presentable(&finding.path(), 1024);
    assert_presentable(&finding.message, LONGEST_MESSAGE);
}

/// What JSON can say too gives the same configuration, or the same problems.
fn it_means_the_same_in_json(tree: &Value, outcome: &Result<Loaded, ConfigErrors>) {
    let mut json = String::new();
    if write_json(tree, &mut json).is_none() || json.len() > 64 * 1024 {
        return;
    }
    match (outcome, read(&json, Format::Json)) {
        (Ok(toml), Ok(json)) => {
            assert_eq!(toml.config, json.config);
            assert_eq!(toml.warnings, json.warnings);
        }
        (Err(ConfigErrors::Invalid(toml)), Err(ConfigErrors::Invalid(json))) => {
            assert_eq!(toml.problems, json.problems);
        }
        // JSON's parser stops at 128 levels, TOML's at 80.
        (toml, json) => panic!("TOML: {:?}, JSON: {:?}", toml.as_ref().err(), json.err()),
    }
}

/// `None` for what JSON has no form for.
fn write_json(value: &Value, json: &mut String) -> Option<()> {
    match value {
        Value::String(text) => json.push_str(&serde_json::to_string(text).ok()?),
        Value::Integer(number) => json.push_str(&number.to_string()),
        Value::Float(number) if number.is_finite() => json.push_str(&serde_json::to_string(number).ok()?),
        Value::Boolean(boolean) => json.push_str(if *boolean { "true" } else { "false" }),
        Value::Float(_) | Value::Datetime(_) => return None,
        Value::Array(items) => {
            json.push('[');
            for (index, item) in items.iter().enumerate() {
                json.push_str(if index > 0 { "," } else { "" });
                write_json(item, json)?;
            }
            json.push(']');
        }
        Value::Table(table) => {
            json.push('{');
            for (index, (key, value)) in table.iter().enumerate() {
                json.push_str(if index > 0 { "," } else { "" });
                json.push_str(&serde_json::to_string(key).ok()?);
                json.push(':');
                write_json(value, json)?;
            }
            json.push('}');
        }
    }
    Some(())
}

/// Text in the place of a secret, wherever that is in the file.
fn secrets_are_not_shown(mut tree: Value) {
    if plant(&mut tree) == 0 {
        return;
    }
    let mut json = String::new();
    if write_json(&tree, &mut json).is_none() {
        return;
    }
    if let Err(errors) = read(&json, Format::Json) {
        let said = format!("{errors} {errors:?}");
        assert!(!said.contains("hunter2"), "an error shows a secret: {errors}");
    }
}

/// How many texts were replaced.
fn plant(value: &mut Value) -> usize {
    match value {
        Value::Table(table) => {
            let mut planted = 0;
            for (key, value) in table.iter_mut() {
                if value.is_str() && SECRET_KEYS.contains(&key.as_str()) {
                    *value = Value::String(PLANTED.to_owned());
                    planted += 1;
                } else {
                    planted += plant(value);
                }
            }
            planted
        }
        Value::Array(items) => items.iter_mut().map(plant).sum(),
        _ => 0,
    }
}
