//! `GET /` on the admin listener: a page for people. It is one document without anything secret in it; whoever has a
//! token pastes it there, and the page asks the API like any other client.

use std::sync::OnceLock;

use axum::response::{Html, IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use http::{HeaderName, HeaderValue};

const SHELL: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPTS: [&str; 5] = [
    include_str!("page/dom.js"),
    include_str!("page/timeline.js"),
    include_str!("page/actions.js"),
    include_str!("page/view.js"),
    include_str!("page/main.js"),
];

/// The document and the policy that goes with it.
struct Page {
    document: String,
    policy: HeaderValue,
}

pub(super) async fn page() -> Response {
    static PAGE: OnceLock<Page> = OnceLock::new();
    let page = PAGE.get_or_init(Page::assemble);
    let headers = [
        (CONTENT_SECURITY_POLICY, page.policy.clone()),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
        (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    ];
    (headers, Html(page.document.as_str())).into_response()
}

impl Page {
    /// Puts style and script into the document, and allows these by their digests and nothing else.
    fn assemble() -> Page {
        let script = format!("\n\"use strict\";\n(() => {{\n{}}})();\n", SCRIPTS.concat());
        let (style, script) = (format!("\n{STYLE}"), script);
        let document = SHELL.replace("/*STYLE*/", &style).replace("/*SCRIPT*/", &script);
        let policy = format!(
            "default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; connect-src 'self'; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            digest(&script),
            digest(&style),
        );
        let policy = HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"));
        Page { document, policy }
    }
}

/// As `Content-Security-Policy` names what stands in a document (CSP Level 3 §2.3.1).
fn digest(text: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    format!("sha256-{}", STANDARD.encode(digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyring::outlook::Alarm;
    use crate::keyring::plan::Blocker;

    #[test]
    fn the_page_has_words_for_every_alarm_and_every_reason_to_wait() {
        let Page { document, .. } = Page::assemble();
        let has = |name: &str| document.contains(&format!("\n  {name}: \""));
        for alarm in Alarm::ALL {
            assert!(has(alarm.as_str()), "alarm {alarm}");
        }
        for blocker in Blocker::ALL {
            assert!(has(blocker.as_str()), "waiting for {}", blocker.as_str());
        }
    }

    /// What the API answers is text: nothing of it may become markup, a script or an address.
    #[test]
    fn the_page_makes_no_markup_of_text_and_keeps_nothing() {
        let Page { document, .. } = Page::assemble();
        for banned in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "localStorage",
            "sessionStorage",
            "document.cookie",
            "indexedDB",
            "history.pushState",
            "location.hash",
            "javascript:",
            "http://",
            "https://",
        ] {
            let found = document.replace("http://www.w3.org/", "").replace("xmlns='http:", "").contains(banned);
            assert!(!found, "{banned}");
        }
        assert_eq!(document.matches("</script>").count(), 1);
        assert_eq!(document.matches("</style>").count(), 1);
    }
}
