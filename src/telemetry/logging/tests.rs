use std::io;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::net::TcpListener;

use super::*;

const JWS: &str = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl";

/// A writer that keeps what is written.
#[derive(Clone, Default)]
pub(in crate::telemetry) struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    pub(in crate::telemetry) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    pub(in crate::telemetry) fn while_logging_json(&self, filter: &str, body: impl FnOnce()) {
        self.while_logging(LogFormat::Json, filter, body);
    }

    pub(in crate::telemetry) fn while_logging_text(&self, filter: &str, body: impl FnOnce()) {
        self.while_logging(LogFormat::Text, filter, body);
    }

    fn while_logging(&self, format: LogFormat, filter: &str, body: impl FnOnce()) {
        let subscriber = subscriber(format, &LogFilter::parse(filter).unwrap(), false, self.clone());
        tracing::subscriber::with_default(subscriber, body);
    }
}

impl io::Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Captured {
    type Writer = Captured;

    fn make_writer(&self) -> Captured {
        self.clone()
    }
}

pub(in crate::telemetry) fn json_lines(captured: &Captured) -> Vec<Value> {
    captured.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_mistyped_level_is_refused_and_not_taken_for_a_target() {
    for good in ["info", "TRACE", "off", " warn , hyper=info ", "info,jwksd::http=debug,h2=off"] {
        assert!(LogFilter::parse(good).is_ok(), "{good}");
    }
    for bad in ["", " , ", "inof", "info,debgu", "hyper=", "=info", "hyper=loud", "info;debug", "a[{x=1}]=info"] {
        let message = LogFilter::parse(bad).unwrap_err().to_string();
        assert!(message.contains("use off, error, warn, info, debug or trace"), "{bad}: {message}");
    }
}

#[test]
fn the_filter_decides_what_is_logged_except_for_audit_lines() {
    let captured = Captured::default();
    captured.while_logging_json("warn,jwksd::chatty=debug", || {
        tracing::info!("not shown");
        tracing::warn!("shown");
        tracing::debug!(target: "jwksd::chatty", "shown");
        tracing::info!(target: audit::LIFECYCLE, "shown");
        tracing::debug!(target: audit::LIFECYCLE, "not shown");
    });
    let messages: Vec<_> = json_lines(&captured).into_iter().map(|line| line["message"].clone()).collect();
    assert_eq!(messages, ["shown"; 3]);

    let silenced = Captured::default();
    silenced.while_logging_json("info,jwksd::audit=off", || tracing::error!(target: audit::LIFECYCLE, "not shown"));
    assert_eq!(silenced.text(), "");
}

#[test]
fn json_lines_carry_fields_and_the_span_of_the_request() {
    let captured = Captured::default();
    captured.while_logging_json("info", || {
        let _span = tracing::info_span!("request", id = "r-1").entered();
        tracing::info!(keyset = "default", attempt = 2, "retrying");
    });
    let line = &json_lines(&captured)[0];
    assert_eq!(line["keyset"], "default");
    assert_eq!(line["attempt"], 2);
    assert_eq!(line["message"], "retrying");
    assert_eq!(line["span"]["id"], "r-1");
    let timestamp = line["timestamp"].as_str().unwrap();
    assert!(crate::keyring::time::Timestamp::parse_rfc3339(timestamp).is_some(), "{timestamp}");
}

#[test]
fn a_secret_in_a_field_a_message_or_a_span_is_not_written() {
    for format in [LogFormat::Text, LogFormat::Json] {
        let captured = Captured::default();
        captured.while_logging(format, "trace", || {
            let _span = tracing::trace_span!("request", authorization = "Bearer s3cret").entered();
            tracing::trace!(token = JWS, "answering with {JWS}");
            tracing::trace!(key = ?"-----BEGIN PRIVATE KEY-----\nMC4CAQAw\n-----END PRIVATE KEY-----\n");
        });
        let text = captured.text();
        for secret in [JWS, "s3cret", "MC4CAQAw"] {
            assert!(!text.contains(secret), "{text}");
        }
        assert!(text.contains("[redacted JWS]") && text.contains("[redacted private key]"), "{text}");
    }
}

#[tokio::test]
async fn libraries_at_trace_level_write_no_credentials_and_no_tokens() {
    let captured = Captured::default();
    let filter = LogFilter::parse("trace").unwrap();
    let subscriber = subscriber(LogFormat::Text, &filter, false, captured.clone());
    let _logging = tracing::subscriber::set_default(subscriber);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/sign", listener.local_addr().unwrap());
    let router = axum::Router::new().route("/sign", axum::routing::post(|| async { JWS }));
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    for client in [reqwest::Client::builder(), reqwest::Client::builder().http2_prior_knowledge()] {
        let request = client.build().unwrap().post(&url).bearer_auth("s3cret-of-the-admin").body(JWS);
        tracing::trace!(?request, "sending");
        assert_eq!(request.send().await.unwrap().text().await.unwrap(), JWS);
    }
    server.abort();

    let text = captured.text();
    for library in ["hyper_util::", "h2::"] {
        assert!(text.contains(library), "{library} said nothing, so nothing was tested");
    }
    for secret in ["s3cret-of-the-admin", JWS, "c2lnbmF0dXJl"] {
        assert!(!text.contains(secret), "{text}");
    }
}

#[test]
fn a_panic_is_one_line_with_its_place_and_without_its_formatted_message() {
    let former = panic::take_hook();
    let captured = Captured::default();
    report_panics();
    captured.while_logging_json("info", || {
        let secret = "s3cret";
        let _ = panic::catch_unwind(|| panic!("cannot open {secret}\nof many lines"));
        let _ = panic::catch_unwind(|| panic!("a literal"));
    });
    panic::set_hook(former);
    // Only lines of this thread: the subscriber is its own.
    let lines = json_lines(&captured);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["message"], "panic: (message withheld)");
    assert_eq!(lines[1]["message"], "panic: a literal");
    for line in lines {
        assert!(line["location"].as_str().unwrap().contains("logging/tests.rs:"), "{line}");
        assert!(line["thread"].is_string());
    }
}
