//! JSON in which no object has two members of one name (RFC 7515 §4, RFC 7519 §4: such input may be refused).
//!
//! Parsers differ in which of two equal members they keep, and attackers live on that difference.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Reads exactly one JSON value. Objects nested deeper than 128 levels are refused by the parser beneath.
pub fn parse_strict(text: &[u8]) -> Result<Value, StrictJsonError> {
    let mut input = serde_json::Deserializer::from_slice(text);
    let value = Strict.deserialize(&mut input).map_err(StrictJsonError::new)?;
    input.end().map_err(StrictJsonError::new)?;
    Ok(value)
}

/// Why a text is not acceptable JSON. Says where, and quotes nothing of the text but the name of a repeated member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not acceptable JSON: {0}")]
pub struct StrictJsonError(String);

impl StrictJsonError {
    fn new(error: serde_json::Error) -> Self {
        StrictJsonError(error.to_string())
    }
}

struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number is out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if object.contains_key(&name) {
                let shown: String = name.chars().take(64).collect();
                return Err(de::Error::custom(format!("the member {shown:?} stands twice in one object")));
            }
            let value = members.next_value_seed(Strict)?;
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_serde_json_reads_is_read_the_same() {
        for text in ["null", "[1,-2,2.5,true,\"a\\u0041\"]", "{\"a\":{\"b\":[{}]},\"c\":18446744073709551615}"] {
            assert_eq!(parse_strict(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
    }

    #[test]
    fn a_repeated_member_is_refused_at_any_depth_and_however_it_is_escaped() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"x":[{"alg":"a","\u0061lg":"b"}]}"#] {
            let error = parse_strict(text.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("twice"), "{error}");
        }
        assert!(parse_strict(br#"[{"a":1},{"a":1}]"#).is_ok());
    }

    #[test]
    fn garbage_truncation_and_bottomless_nesting_are_errors_not_panics() {
        for text in [&b""[..], b"{", b"{} {}", b"{}x", b"\xff", b"{\"a\":1e999}"] {
            assert!(parse_strict(text).is_err());
        }
        assert!(parse_strict("[".repeat(100_000).as_bytes()).is_err());
    }
}
