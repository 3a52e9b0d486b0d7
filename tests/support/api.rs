//! Requests with every detail chosen, and what must hold of every answer: no private member of a key in it, errors as
//! RFC 9457 problems with the request's id, and exactly the members that `/openapi.json` names.

use std::collections::{BTreeMap, BTreeSet};

use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use serde_json::Value;

use super::{Answer, Daemon};

/// One request to a TCP listener, by default with the operator's token on the admin one.
pub struct Call {
    url: String,
    method: Method,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl Call {
    pub fn new(daemon: &Daemon, method: Method, listener: &str, path: &str) -> Self {
        let call = Call { url: daemon.url(listener, path), method, headers: Vec::new(), body: None };
        match listener {
            "admin" => call.bearer(&operator_token(daemon)),
            _ => call,
        }
    }

    pub fn get(daemon: &Daemon, listener: &str, path: &str) -> Self {
        Self::new(daemon, Method::GET, listener, path)
    }

    pub fn post(daemon: &Daemon, listener: &str, path: &str) -> Self {
        Self::new(daemon, Method::POST, listener, path)
    }

    /// Sets a header; a former value of it goes.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn bearer(self, token: &str) -> Self {
        self.header("authorization", &format!("Bearer {token}"))
    }

    pub fn without_token(mut self) -> Self {
        self.headers.retain(|(name, _)| name != "authorization");
        self
    }

    pub fn json(self, body: &Value) -> Self {
        self.text("application/json", body.to_string())
    }

    pub fn text(self, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        let mut call = self.header("content-type", content_type);
        call.body = Some(body.into());
        call
    }

    pub fn bare(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = Some(body.into());
        self
    }

    /// The answer, with what must hold of every one checked.
    pub async fn send(self) -> Answer {
        let client = super::http_client().build().expect("a client without TLS set-up");
        let head = self.method == Method::HEAD;
        let mut request = client.request(self.method.clone(), &self.url);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        if let Some(body) = self.body {
            request = request.body(body);
        }
        let url = self.url;
        let response = request.send().await.unwrap_or_else(|error| panic!("{} {url}: {error:?}", self.method));
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap_or_else(|error| panic!("{url}: body: {error}"));
        let answer = Answer { status, headers, text };
        assert_public(&answer.text);
        if status >= 400 && !head {
            assert_problem(&answer);
        }
        answer
    }

    /// As [`send`](Self::send), with the status that must come.
    pub async fn expect(self, status: u16) -> Answer {
        let what = format!("{} {}", self.method, self.url);
        let answer = self.send().await;
        assert_eq!(answer.status, status, "{what}: {}", answer.text);
        answer
    }
}

impl Answer {
    /// What follows `urn:jwksd:problem:`.
    pub fn slug(&self) -> String {
        let problem = self.json();
        problem["type"].as_str().unwrap_or_default().trim_start_matches("urn:jwksd:problem:").to_owned()
    }

    pub fn detail(&self) -> String {
        self.json()["detail"].as_str().unwrap_or_default().to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// The operator's token of the harness's configuration.
pub fn operator_token(daemon: &Daemon) -> String {
    super::read(&daemon.path("admin.token")).trim().to_owned()
}

/// Invariant 7: nowhere in an answer is a private member of a JWK (RFC 7518 §6.2.2, §6.3.2, §6.4.1; RFC 8037 §2) or a
/// PEM private key.
pub fn assert_public(text: &str) {
    assert!(!(text.contains("-----BEGIN") && text.contains("PRIVATE KEY")), "a private key in an answer");
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        assert_no_private_member(&value);
    }
}

fn assert_no_private_member(value: &Value) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                let private = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"].contains(&name.as_str());
                assert!(!private, "the private member `{name}` in an answer");
                assert_no_private_member(value);
            }
        }
        Value::Array(items) => items.iter().for_each(assert_no_private_member),
        _ => {}
    }
}

/// RFC 9457 as DESIGN §7 wants it.
pub fn assert_problem(answer: &Answer) {
    let text = &answer.text;
    let content_type = answer.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    assert_eq!(content_type, Some("application/problem+json"), "{} {text}", answer.status);
    let problem = answer.json();
    assert!(problem["type"].as_str().is_some_and(|kind| kind.starts_with("urn:jwksd:problem:")), "{text}");
    assert_eq!(problem["status"], answer.status, "{text}");
    for member in ["title", "detail", "request_id"] {
        assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "{member} in {text}");
    }
    assert_eq!(problem["request_id"], answer.header("x-request-id"), "{text}");
    let retry_after = problem["retry_after_seconds"].as_u64().map(|seconds| seconds.to_string()).unwrap_or_default();
    assert_eq!(retry_after, answer.header("retry-after"), "{text}");
}

/// The API's own description, to hold answers against.
pub struct Description(Value);

impl Description {
    pub async fn of(daemon: &Daemon) -> Self {
        let document = Call::get(daemon, "admin", "/openapi.json").expect(200).await.json();
        assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "OpenAPI 3.1");
        Description(document)
    }

    pub fn document(&self) -> &Value {
        &self.0
    }

    /// Fails unless the document describes this status of this operation, and the answer has its members and no others.
    pub fn check(&self, method: &str, template: &str, answer: &Answer) {
        let what = format!("{method} {template} {}", answer.status);
        let operation = &self.0["paths"][template][method.to_ascii_lowercase()];
        assert!(operation.is_object(), "{what} is not described");
        let class = format!("{}XX", answer.status / 100);
        let exact = answer.status.to_string();
        let responses = [exact.as_str(), class.as_str()].map(|code| &operation["responses"][code]);
        let response = responses.into_iter().find(|response| response.is_object());
        let response = response.unwrap_or_else(|| panic!("{what} is not described"));
        let Some(content) = response["content"].as_object() else {
            assert!(answer.text.is_empty(), "{what} is described without a body: {}", answer.text);
            return;
        };
        let kind = answer.header("content-type").split(';').next().unwrap_or_default().to_owned();
        let content = content.get(&kind).unwrap_or_else(|| panic!("{what}: the type {kind} is not described"));
        if kind.ends_with("json") {
            self.conforms(&content["schema"], &answer.json(), &what);
        }
    }

    fn conforms(&self, schema: &Value, value: &Value, at: &str) {
        if let Err(why) = self.mismatch(schema, value, at) {
            panic!("{why}");
        }
    }

    fn mismatch(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        if let Some(reference) = schema["$ref"].as_str() {
            let target =
                self.0.pointer(reference.trim_start_matches('#')).ok_or_else(|| format!("{at}: {reference}"))?;
            return self.mismatch(target, value, at);
        }
        for several in ["oneOf", "anyOf"] {
            if let Some(choices) = schema[several].as_array() {
                let tried: Vec<_> = choices.iter().map(|choice| self.mismatch(choice, value, at)).collect();
                let fits = tried.iter().any(Result::is_ok);
                return if fits { Ok(()) } else { Err(format!("{at}: fits none of {choices:?}: {tried:?}")) };
            }
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.mismatch(part, value, at)?;
        }
        let types: Vec<&str> = match &schema["type"] {
            Value::String(one) => vec![one],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let fits = types.is_empty() || types.contains(&found) || (found == "integer" && types.contains(&"number"));
        if !fits {
            return Err(format!("{at}: {found} instead of {types:?}"));
        }
        if let Some(values) = schema["enum"].as_array().filter(|values| found == "string" && !values.contains(value)) {
            return Err(format!("{at}: {value} is none of {values:?}"));
        }
        for (index, item) in value.as_array().into_iter().flatten().enumerate() {
            self.mismatch(&schema["items"], item, &format!("{at}[{index}]"))?;
        }
        let (Some(members), Some(properties)) = (value.as_object(), schema["properties"].as_object()) else {
            return Ok(());
        };
        for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !members.contains_key(required) {
                return Err(format!("{at}: {required} is missing"));
            }
        }
        for (name, member) in members {
            let property = properties.get(name).ok_or_else(|| format!("{at}: {name} is not described"))?;
            self.mismatch(property, member, &format!("{at}.{name}"))?;
        }
        Ok(())
    }
}

/// The values that each member of some kind of answer was seen with.
#[derive(Default)]
pub struct Seen(BTreeMap<String, BTreeSet<String>>);

impl Seen {
    /// Takes down every member of `value`; of arrays, whether they were empty and the members of their items.
    pub fn note(&mut self, path: &str, value: &Value) {
        match value {
            Value::Object(members) => {
                self.mark(path, "an object");
                for (name, member) in members {
                    self.note(&format!("{path}.{name}"), member);
                }
            }
            Value::Array(items) => {
                let all: Vec<String> = items.iter().map(ToString::to_string).collect();
                self.mark(path, &format!("[{}]", all.join(",")));
                for item in items {
                    self.note(&format!("{path}[]"), item);
                }
            }
            other => self.mark(path, &other.to_string()),
        }
    }

    fn mark(&mut self, path: &str, value: &str) {
        self.0.entry(path.to_owned()).or_default().insert(value.to_owned());
    }

    /// Fails for every member with one value only, but for the objects on the way and what `except` names.
    pub fn assert_two_of_each(&self, except: &[&str]) {
        let once = |(path, values): (&String, &BTreeSet<String>)| {
            let container = values.iter().all(|value| value == "an object");
            (values.len() < 2 && !container && !except.contains(&path.as_str())).then(|| format!("{path} = {values:?}"))
        };
        let constant: Vec<String> = self.0.iter().filter_map(once).collect();
        assert!(constant.is_empty(), "seen with one value only:\n{}", constant.join("\n"));
    }

    pub fn values(&self, path: &str) -> BTreeSet<String> {
        self.0.get(path).cloned().unwrap_or_default()
    }
}
