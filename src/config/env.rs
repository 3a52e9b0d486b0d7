//! Scalar values from the environment: `JWKSD__PUBLIC__LISTEN`, `JWKSD__KEYSET__DEFAULT__ALGORITHM`.
//!
//! Two underscores separate the segments of the path, whose case does not matter. A variable's name cannot contain `-`,
//! so `_` stands for it: `JWKSD__KEYSET__TENANT_A__ALGORITHM` is `keyset.tenant-a.algorithm`. That is unambiguous, because
//! names never contain `_` and no two keys of a table differ only in it. (Names with two hyphens in a row cannot be
//! reached.) A variable may add a key to the file, or a whole table such as `[admin]`, but not a keyset, an issuer or
//! another named table: a misspelt name would otherwise create one.

use super::problem::{Report, suggest};
use super::raw::Shape;
use super::value::Value;

/// What the names of overriding variables begin with.
pub const PREFIX: &str = "JWKSD__";

/// Puts the values of `variables` (others than overrides are ignored) over those of the file.
pub(super) fn apply(
    tree: &mut Value,
    shape: &Shape,
    variables: impl Iterator<Item = (String, String)>,
    report: &mut Report,
) {
    let mut overrides: Vec<_> = variables.filter(|(name, _)| name.starts_with(PREFIX)).collect();
    overrides.sort();
    for (variable, text) in overrides {
        let path: Vec<String> = variable[PREFIX.len()..].split("__").map(str::to_ascii_lowercase).collect();
        match set(tree, shape, &path, &mut String::new(), text) {
            Ok(path) => {
                if let Some(other) = report.overridden(path.clone(), variable.clone()) {
                    report.refuse(&variable, format_args!("{other} sets {path} too"));
                }
            }
            Err(message) => report.refuse(&variable, message),
        }
    }
}

/// Sets the value at `segments` below `tree` and returns its config path.
fn set(tree: &mut Value, shape: &Shape, segments: &[String], at: &mut String, text: String) -> Result<String, String> {
    let Some((segment, rest)) = segments.split_first() else {
        *tree = scalar(shape, at, text)?;
        return Ok(at.clone());
    };
    let entries = match tree {
        Value::Table(entries) => entries,
        // The file has something else where a table belongs; reading it will say so.
        _ => return Err(format!("{at} is not a table in the configuration")),
    };
    let (key, shape) = match shape {
        Shape::Table(fields) => known_field(fields, segment, at)?,
        Shape::Named(inner) => (existing_name(entries, segment, at)?, *inner),
        _ => return Err(format!("{at} has no keys below it")),
    };
    if !at.is_empty() {
        at.push('.');
    }
    at.push_str(&key);
    match entries.iter().position(|(name, _)| *name == key) {
        Some(index) => set(&mut entries[index].1, shape, rest, at, text),
        None => {
            let mut added = Value::Table(Vec::new());
            let path = set(&mut added, shape, rest, at, text)?;
            entries.push((key, added));
            Ok(path)
        }
    }
}

fn known_field(
    fields: &'static [(&'static str, Shape)],
    segment: &str,
    at: &str,
) -> Result<(String, &'static Shape), String> {
    let plain = |name: &str| name.replace('-', "_");
    match fields.iter().find(|(name, _)| plain(name) == plain(segment)) {
        Some((name, shape)) => Ok(((*name).to_owned(), shape)),
        None => {
            let known: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
            let place = if at.is_empty() { "the configuration".to_owned() } else { format!("[{at}]") };
            let segment: String = segment.chars().take(64).collect();
            Err(format!("{place} has no key `{segment}`; {}", suggest(&segment, &known)))
        }
    }
}

fn existing_name(entries: &[(String, Value)], segment: &str, at: &str) -> Result<String, String> {
    let name = segment.replace('_', "-");
    if entries.iter().any(|(key, _)| *key == name) {
        return Ok(name);
    }
    let known: Vec<_> = entries.iter().map(|(key, _)| key.as_str()).collect();
    let name: String = name.chars().take(64).collect();
    Err(format!("the configuration has no [{at}.{name}], and a variable cannot add one; {}", suggest(&name, &known)))
}

/// The text as what the key wants. The text is never quoted: it may be a secret in the wrong place.
fn scalar(shape: &Shape, at: &str, text: String) -> Result<Value, String> {
    match shape {
        Shape::Text | Shape::Refused(_) => Ok(Value::Text(text)),
        Shape::Integer => {
            text.trim().parse().map(Value::Integer).map_err(|_| format!("{at} is an integer, and this is none"))
        }
        Shape::Share => match text.trim().parse() {
            Ok(share) => Ok(Value::Fraction(share)),
            Err(_) => Err(format!("{at} is a share from 0 to 1, and this is no number")),
        },
        Shape::Boolean => match text.trim() {
            "true" => Ok(Value::Boolean(true)),
            "false" => Ok(Value::Boolean(false)),
            _ => Err(format!("{at} is true or false, and this is neither")),
        },
        Shape::List => Err(format!("{at} is a list: set it in the configuration file")),
        Shape::Table(_) | Shape::Named(_) => Err(format!("{at} is a table: name one of its keys")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::raw::{Field, Root};
    use super::super::value::Format;
    use super::*;

    fn overridden(file: &str, variables: &[(&str, &str)]) -> (Value, Vec<String>) {
        let mut tree = Value::parse(file, Format::Toml).unwrap();
        let mut report = Report::default();
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        apply(&mut tree, &Root::SHAPE, variables, &mut report);
        (tree, report.finish().problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_variable_replaces_or_adds_a_value_of_the_type_of_its_key() {
        let (tree, problems) = overridden(
            "[keyset.tenant-a]\nalgorithm = \"ES256\"\n",
            &[
                ("JWKSD__KEYSET__TENANT_A__ALGORITHM", "RS256"),
                ("JWKSD__KEYSET__TENANT_A__RSA_BITS", "3072"),
                ("JWKSD__LOG__SIGNATURES", "true"),
                ("JWKSD_CONFIG", "ignored"),
                ("PATH", "ignored"),
            ],
        );
        assert_eq!(problems, Vec::<String>::new());
        let expected = "[keyset.tenant-a]\nalgorithm = \"RS256\"\nrsa_bits = 3072\n[log]\nsignatures = true\n";
        assert_eq!(tree, Value::parse(expected, Format::Toml).unwrap());
    }

    #[test]
    fn what_cannot_be_set_is_refused_with_the_name_of_the_variable() {
        let (tree, problems) = overridden(
            "[keyset.default]\n",
            &[
                ("JWKSD__KEYSET__DEFUALT__ALGORITHM", "ES256"),
                ("JWKSD__KEYSET__DEFAULT__RSA_BITS", "many"),
                ("JWKSD__KEYSET__DEFAULT__TOKENS__AUDIENCES", "a,b"),
                ("JWKSD__LOG", "text"),
                ("JWKSD__LOG__LEVEL__X", "text"),
                ("JWKSD__LOG__SIGNATURES", "yes"),
                ("JWKSD__PUBLC__LISTEN", "127.0.0.1:1"),
                ("JWKSD__PUBLIC__LISTEN", "127.0.0.1:1"),
                ("JWKSD__public__listen", "127.0.0.1:2"),
                ("JWKSD__", "x"),
            ],
        );
        insta::assert_snapshot!(problems.join("\n"));
        // What was refused leaves nothing behind that would be refused again.
        let kept = "[keyset.default]\n[public]\nlisten = \"127.0.0.1:2\"\n";
        assert_eq!(tree, Value::parse(kept, Format::Toml).unwrap());
    }
}
