//! The text of a configuration as a tree, the same for TOML and JSON, in the order of the file.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// What a configuration file is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Toml,
    Json,
}

impl Format {
    /// By the file's extension; whatever is not `.json` is taken for TOML.
    pub fn of(path: &std::path::Path) -> Self {
        match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("json") => Format::Json,
            _ => Format::Toml,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Toml => "TOML",
            Format::Json => "JSON",
        })
    }
}

/// A node of the tree. Tables keep the order of the file: the published key set follows it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Fraction(f64),
    Boolean(bool),
    List(Vec<Value>),
    Table(Vec<(String, Value)>),
    /// What no key of the configuration can be: null, a TOML date.
    Other(&'static str),
}

/// Where and why a text is not TOML or JSON. The text itself is not quoted: it may contain a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) message: String,
}

impl Value {
    pub(super) fn parse(text: &str, format: Format) -> Result<Value, SyntaxError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        match format {
            Format::Toml => toml::from_str(text).map_err(|error| toml_error(text, &error)),
            Format::Json => serde_json::from_str(text).map_err(|error| json_error(&error)),
        }
    }

    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "text",
            Value::Integer(_) => "an integer",
            Value::Fraction(_) => "a number with a fraction",
            Value::Boolean(_) => "a boolean",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
            Value::Other(kind) => kind,
        }
    }
}

/// The line and column (both from 1, in characters) of a byte of `text`.
fn position(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn toml_error(text: &str, error: &toml::de::Error) -> SyntaxError {
    let (line, column) = position(text, error.span().map_or(0, |span| span.start));
    SyntaxError { line, column, message: error.message().trim_end().replace('\n', ", ") }
}

fn json_error(error: &serde_json::Error) -> SyntaxError {
    // serde_json appends the position that is reported separately.
    let full = error.to_string();
    let message = full.rsplit_once(" at line ").map_or(full.as_str(), |(message, _)| message);
    SyntaxError { line: error.line(), column: error.column().max(1), message: message.to_owned() }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

/// How `toml` hands a date to a generic visitor: a table with this one key.
const TOML_DATE: &str = "$__toml_private_datetime";

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Integer(number))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
        Ok(i64::try_from(number).map_or(Value::Other("an integer that is too large"), Value::Integer))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Fraction(number))
    }

    fn visit_bool<E: de::Error>(self, boolean: bool) -> Result<Value, E> {
        Ok(Value::Boolean(boolean))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Other("null"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut table = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            if key == TOML_DATE {
                entries.next_value::<IgnoredAny>()?;
                return Ok(Value::Other("a date"));
            }
            // JSON parsers commonly keep the last of two equal keys; a policy must not depend on that.
            if !seen.insert(key.clone()) {
                let shown: String = key.chars().take(64).collect();
                return Err(de::Error::custom(format_args!("the key {shown:?} stands twice in one table")));
            }
            table.push((key, entries.next_value()?));
        }
        Ok(Value::Table(table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_give_the_same_tree_in_the_order_of_the_file() {
        let toml = Value::parse("b = 1\na = [\"x\", { n = true }]\n[t.z]\n[t.c]\nk = \"v\"\n", Format::Toml).unwrap();
        let json = Value::parse(r#"{"b": 1, "a": ["x", {"n": true}], "t": {"z": {}, "c": {"k": "v"}}}"#, Format::Json)
            .unwrap();
        assert_eq!(toml, json);
        let Value::Table(entries) = toml else { panic!("not a table") };
        assert_eq!(entries.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), ["b", "a", "t"]);
    }

    #[test]
    fn a_key_given_twice_is_refused_in_both_formats() {
        let json = Value::parse("{\"a\": 1,\n \"a\": 2}", Format::Json).unwrap_err();
        assert_eq!((json.line, json.message.as_str()), (2, "the key \"a\" stands twice in one table"));
        let toml = Value::parse("a = 1\na = 2\n", Format::Toml).unwrap_err();
        assert_eq!((toml.line, toml.column, toml.message.as_str()), (2, 1, "duplicate key"));
    }

    #[test]
    fn syntax_errors_do_not_quote_the_file() {
        for (format, text) in [(Format::Toml, "a = \"hunter2\nb"), (Format::Json, "{\"a\": hunter2}")] {
            let error = Value::parse(text, format).unwrap_err();
            assert!(!error.message.contains("hunter2"), "{error:?}");
            assert!(error.line >= 1 && error.column >= 1, "{error:?}");
        }
    }

    #[test]
    fn dates_fractions_and_null_have_a_name() {
        let kinds = |value: Value| match value {
            Value::Table(entries) => entries.iter().map(|(_, value)| value.kind()).collect::<Vec<_>>(),
            _ => Vec::new(),
        };
        let toml = Value::parse("a = 2026-01-01\nb = 1.5\n", Format::Toml).unwrap();
        assert_eq!(kinds(toml), ["a date", "a number with a fraction"]);
        let json = Value::parse(r#"{"a": null, "b": 18446744073709551615}"#, Format::Json).unwrap();
        assert_eq!(kinds(json), ["null", "an integer that is too large"]);
    }
}
