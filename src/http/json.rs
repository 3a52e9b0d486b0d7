//! JSON request bodies, read strictly: what is not understood is refused, never ignored.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};

use super::body;
use super::problem::{Problem, ProblemType};

/// A required JSON body. Refused with 415 when the content type is not `application/json`, 413 and 408 when it is too
/// large or too slow, 400 when it does not parse, repeats a member at any depth, or is not a `T` (which should
/// `deny_unknown_fields`).
#[derive(Clone, Copy, Debug)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        if !is_json(&parts.headers) {
            return Err(ProblemType::UnsupportedMediaType.into());
        }
        parse(&body::read(body).await?).map(JsonBody)
    }
}

/// A JSON body that may be left out: an empty one is `T::default()`, whatever its content type.
#[derive(Clone, Copy, Debug)]
pub struct OptionalJson<T>(pub T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let json = is_json(&parts.headers);
        if !json && !http_body::Body::is_end_stream(&body) && parts.headers.contains_key(CONTENT_TYPE) {
            return Err(ProblemType::UnsupportedMediaType.into());
        }
        let bytes: Bytes = body::read(body).await?;
        match bytes.is_empty() {
            true => Ok(OptionalJson(T::default())),
            false if json => parse(&bytes).map(OptionalJson),
            false => Err(ProblemType::UnsupportedMediaType.into()),
        }
    }
}

/// Parses a request's JSON as [`JsonBody`] does.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    if bytes.is_empty() {
        return Err(malformed("The request's body is empty; it must be a JSON object.".to_owned()));
    }
    if let Err(error) = serde_json::from_slice::<Unrepeated>(bytes) {
        return Err(malformed(format!("The request's body: {}.", describe(&error))));
    }
    // serde would take an array for a struct, its items for the members in order.
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(malformed("The request's body must be a JSON object.".to_owned()));
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = shortened(&error.path().to_string());
        let what = describe(error.inner());
        malformed(match path.as_str() {
            "." => format!("The request's body: {what}."),
            path => format!("Member `{path}`: {what}."),
        })
    })
}

pub(super) fn is_json(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let Ok(text) = value.to_str() else { return false };
    let mut parts = text.split(';').map(str::trim);
    let json = parts.next().is_some_and(|essence| essence.eq_ignore_ascii_case("application/json"));
    // RFC 8259 §8.1: JSON between systems is UTF-8; the parameter has no meaning but may be there.
    json && parts.filter_map(|parameter| parameter.split_once('=')).all(|(name, value)| {
        !name.eq_ignore_ascii_case("charset") || value.trim_matches('"').eq_ignore_ascii_case("utf-8")
    })
}

fn malformed(detail: String) -> Problem {
    Problem::new(ProblemType::MalformedRequest).detail(detail)
}

/// The parser's message without values: a request may hold private keys (import) or tokens.
fn describe(error: &serde_json::Error) -> String {
    let message = error.to_string();
    for kind in ["invalid type: ", "invalid value: "] {
        if let (Some(rest), Some(cut)) = (message.strip_prefix(kind), message.rfind(", expected ")) {
            let found = rest.split([' ', ',']).next().unwrap_or_default();
            return shortened(&format!("{kind}{found}{}", &message[cut..]));
        }
    }
    shortened(&message)
}

fn shortened(text: &str) -> String {
    const LONGEST: usize = 300;
    if text.chars().count() <= LONGEST { text.to_owned() } else { text.chars().take(LONGEST).chain(['…']).collect() }
}

/// Any JSON value in which no object repeats a member (RFC 8259 §4: what a repeated one means is unpredictable; two
/// parsers could see two different claims). serde_json bounds the depth.
struct Unrepeated;

impl<'de> Deserialize<'de> for Unrepeated {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UnrepeatedVisitor)
    }
}

struct UnrepeatedVisitor;

impl<'de> Visitor<'de> for UnrepeatedVisitor {
    type Value = Unrepeated;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Unrepeated, E> {
        Ok(Unrepeated)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Unrepeated, E> {
        Ok(Unrepeated)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Unrepeated, E> {
        Ok(Unrepeated)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Unrepeated, E> {
        Ok(Unrepeated)
    }

    fn visit_str<E>(self, _: &str) -> Result<Unrepeated, E> {
        Ok(Unrepeated)
    }

    fn visit_unit<E>(self) -> Result<Unrepeated, E> {
        Ok(Unrepeated)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Unrepeated, A::Error> {
        while items.next_element::<Unrepeated>()?.is_some() {}
        Ok(Unrepeated)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Unrepeated, A::Error> {
        let mut seen = HashSet::new();
        while let Some(MemberName(name)) = members.next_key::<MemberName<'de>>()? {
            members.next_value::<Unrepeated>()?;
            if let Some(name) = seen.replace(name) {
                return Err(de::Error::custom(format_args!("member `{}` appears twice", shortened(&name))));
            }
        }
        Ok(Unrepeated)
    }
}

#[derive(Deserialize)]
struct MemberName<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use serde_json::value::RawValue;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Order {
        reason: Option<String>,
        #[serde(default)]
        count: u32,
        claims: Option<Box<RawValue>>,
    }

    fn request(content_type: Option<&str>, body: &str) -> Request {
        let mut builder = Request::builder().method("POST");
        if let Some(content_type) = content_type {
            builder = builder.header(CONTENT_TYPE, content_type);
        }
        builder.body(Body::from(body.to_owned())).unwrap()
    }

    async fn kind(content_type: Option<&str>, body: &str) -> Option<ProblemType> {
        JsonBody::<Order>::from_request(request(content_type, body), &()).await.err().map(|problem| problem.kind())
    }

    #[tokio::test]
    async fn only_json_is_taken() {
        for good in ["application/json", "Application/JSON; charset=UTF-8", "application/json;charset=\"utf-8\""] {
            assert_eq!(kind(Some(good), "{}").await, None, "{good}");
        }
        for bad in ["text/plain", "application/jsonp", "application/json; charset=latin-1", ""] {
            assert_eq!(kind(Some(bad), "{}").await, Some(ProblemType::UnsupportedMediaType), "{bad}");
        }
        assert_eq!(kind(None, "{}").await, Some(ProblemType::UnsupportedMediaType));
    }

    #[tokio::test]
    async fn what_is_not_understood_is_malformed() {
        let deep = format!("{{\"claims\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        for bad in [
            "",
            " ",
            "{",
            "[]",
            "[\"a reason\", 1, null]",
            "null",
            "{}{}",
            "{\"reasn\":\"x\"}",
            "{\"count\":\"1\"}",
            "{\"count\":-1}",
            "{\"count\":1,\"count\":2}",
            "{\"claims\":{\"aud\":\"a\",\"aud\":\"b\"}}",
            "{\"claims\":[{\"a\":{\"b\":1,\"\\u0062\":2}}]}",
            "{\"reason\":\"\u{1}\"}",
            "\u{feff}{}",
            &deep,
        ] {
            let found = kind(Some("application/json"), bad).await;
            assert_eq!(found, Some(ProblemType::MalformedRequest), "{bad}");
        }
        let raw = request(Some("application/json"), "").map(|_| Body::from(&b"{\"reason\":\"\xff\"}"[..]));
        assert!(JsonBody::<Order>::from_request(raw, &()).await.is_err());
    }

    #[tokio::test]
    async fn members_with_the_same_name_in_different_objects_are_no_repetition() {
        assert_eq!(kind(Some("application/json"), "{\"claims\":[{\"a\":1},{\"a\":1,\"b\":{\"a\":2}}]}").await, None);
    }

    #[test]
    fn a_refusal_names_the_member_and_not_its_value() {
        let problem = parse::<Order>(b"{\"count\":\"hunter2, expected nothing\"}").unwrap_err();
        let shown = format!("{problem:?}");
        assert!(shown.contains("`count`") && shown.contains("invalid type: string, expected u32"), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[tokio::test]
    async fn a_body_may_be_left_out_where_it_is_optional() {
        let read = |content_type, body| async move {
            OptionalJson::<Order>::from_request(request(content_type, body), &()).await.map(|OptionalJson(it)| it)
        };
        assert!(read(None, "").await.is_ok());
        assert!(read(Some("text/plain"), "").await.is_ok());
        assert_eq!(read(Some("application/json"), "{\"reason\":\"r\"}").await.unwrap().reason.unwrap(), "r");
        for (content_type, body) in [(None, "{}"), (Some("text/plain"), "{}")] {
            let problem = read(content_type, body).await.unwrap_err();
            assert_eq!(problem.kind(), ProblemType::UnsupportedMediaType);
        }
        assert_eq!(read(Some("application/json"), "{").await.unwrap_err().kind(), ProblemType::MalformedRequest);
    }
}
