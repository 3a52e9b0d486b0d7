//! What people see: the page of the admin listener in a real browser, and keys over time on the command line.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "people/browser.rs"]
mod browser;
#[path = "people/picture.rs"]
mod picture;
mod support;
#[path = "people/text.rs"]
mod text;

use reqwest::Method;
use serde_json::{Value, json};

use browser::Browser;
use support::api::{Call, operator_token};
use support::{Daemon, PATIENCE, eventually};

/// A keyset whose keys stand by after two seconds and rotate when told to; one verifier never forgets.
const TABLES: &str = r#"
[issuer.main]
url = "https://issuer.example.test"
max_age = "1s"
[keyset.default]
algorithm = "ES256"
[keyset.default.rotation]
every = "30d"
propagation = "2s"
verifiers = ["vault", { name = "billing", cache = "500ms" }]
[keyset.default.tokens]
max_ttl = "10m"
clock_skew = "500ms"
[admin.token.viewer]
role = "viewer"
file = "viewer.token"
"#;

/// Whatever becomes of it, it is text.
const HOSTILE: &str = r#"<img src=x onerror="window.pwned=1"><b>bold</b>"#;

const CARD: &str = "[data-keyset=default]";

async fn start() -> Daemon {
    Daemon::builder().tables(TABLES).start().await
}

fn button(kind: &str) -> String {
    format!("[data-focus='default/{kind}']")
}

async fn keyset(daemon: &Daemon) -> Value {
    Call::get(daemon, "admin", "/v1/keysets/default?history=true").expect(200).await.json()
}

/// Of the oldest key in this state; 0 where there is none.
fn serial_of(keyset: &Value, state: &str) -> u64 {
    let keys = keyset["keys"].as_array().unwrap().iter().filter(|key| key["state"] == state);
    keys.filter_map(|key| key["serial"].as_u64()).min().unwrap_or(0)
}

async fn standby(daemon: &Daemon) {
    eventually("a standby key", PATIENCE, async || (serial_of(&keyset(daemon).await, "standby") > 0).then_some(()))
        .await;
}

/// Waits until nothing moves by itself any more and the page shows that: what is asked for then is decided on that.
async fn calm(daemon: &Daemon, browser: &Browser) {
    eventually("the keyset and the page to come to rest", PATIENCE, async || {
        let shown = keyset(daemon).await;
        let count = |state: &str| shown["keys"].as_array().unwrap().iter().filter(|key| key["state"] == state).count();
        let rests = count("pending") == 0 && count("standby") == 2 && count("active") == 1;
        let told = browser.text(CARD).await.contains(&format!("generation {}", shown["generation"]));
        (rests && told).then_some(())
    })
    .await;
}

/// At the page, with this token pasted, by keyboard alone.
async fn log_in(daemon: &Daemon, token: &str, width: u32) -> Browser {
    let browser = Browser::open(&daemon.url("admin", "/"), width, 900).await;
    browser.until("document.activeElement.id === 'token'").await;
    browser.type_text(token).await;
    browser.press("Enter").await;
    browser
}

/// Opens a dialog and waits for the answer of what would happen; looks again where the keyset moved on just then.
async fn open(browser: &Browser, kind: &str, told: &str) {
    browser.click(&button(kind)).await;
    eventually(told, PATIENCE, async || {
        browser.eval("document.querySelector('#dialog-again')?.click()").await;
        browser.text("#dialog-answer").await.contains(told).then_some(())
    })
    .await;
}

async fn operator(daemon: &Daemon, width: u32) -> Browser {
    let browser = log_in(daemon, &operator_token(daemon), width).await;
    browser.shows(CARD, "ES256").await;
    browser
}

/// The token and what was typed are nowhere but in memory, nothing broke a rule, and nobody else was asked.
async fn assert_well_behaved(daemon: &Daemon, browser: &Browser) {
    assert_eq!(browser.complaints().await, Vec::<String>::new());
    let kept = "JSON.stringify([localStorage.length, sessionStorage.length, document.cookie, location.pathname + \
                location.search + location.hash, history.length <= 2, document.querySelectorAll('img').length, window.pwned ?? 0])";
    assert_eq!(browser.eval(kept).await, r#"[0,0,"","/",true,0,0]"#);
    let token = operator_token(daemon);
    let everything = browser.eval("document.documentElement.outerHTML").await;
    assert!(!everything.as_str().unwrap().contains(&token), "the token is in the document");
    let own = daemon.url("admin", "/");
    for url in browser.asked() {
        assert!(url.starts_with(&own) && !url.contains(&token), "{url} was asked for");
    }
}

#[tokio::test]
async fn an_operator_rotates_holds_rolls_back_and_revokes_after_seeing_what_would_happen() {
    let daemon = start().await;
    standby(&daemon).await;
    let browser = operator(&daemon, 1200).await;
    browser.shows(CARD, "healthy").await;
    browser.until("document.querySelectorAll('svg .bar.active').length > 0").await;
    browser.until("document.querySelectorAll('svg .bar.coming').length > 0").await;
    // Times are the reader's, and UTC on hover.
    browser.until("[...document.querySelectorAll('time')].some((time) => time.title.endsWith('UTC'))").await;

    calm(&daemon, &browser).await;
    let before = keyset(&daemon).await;
    open(&browser, "rotate", "standby → active").await;
    browser.shows("#dialog-answer", "billing: sees the key by").await;
    assert_eq!(keyset(&daemon).await["generation"], before["generation"], "asking changes nothing");
    browser.type_text("a drill").await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    let after = keyset(&daemon).await;
    assert_eq!(serial_of(&after, "active"), serial_of(&before, "standby"));
    assert_eq!(serial_of(&after, "retiring"), serial_of(&before, "active"));
    browser.press("Escape").await;
    browser.shows(CARD, "retiring").await;
    browser.shows("#audit", "a drill").await;
    browser.until("document.activeElement.dataset.focus === 'default/rotate'").await;

    calm(&daemon, &browser).await;
    open(&browser, "hold", "until it is resumed").await;
    browser.type_text(HOSTILE).await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    browser.click("#dialog-cancel").await;
    browser.shows("[data-hold] q", HOSTILE).await;
    assert_eq!(keyset(&daemon).await["hold"]["reason"], HOSTILE);
    calm(&daemon, &browser).await;
    open(&browser, "resume", "will go on").await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    browser.click("#dialog-cancel").await;
    browser.until("document.querySelector('[data-hold]') === null").await;
    assert!(keyset(&daemon).await["hold"].is_null());

    calm(&daemon, &browser).await;
    let before = keyset(&daemon).await;
    open(&browser, "rollback", "retiring → active").await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    browser.click("#dialog-cancel").await;
    let back = keyset(&daemon).await;
    assert_eq!(serial_of(&back, "active"), serial_of(&before, "retiring"));

    let revoked = serial_of(&back, "active");
    calm(&daemon, &browser).await;
    open(&browser, &format!("revoke/{revoked}"), "Restart these verifiers: vault").await;
    browser.shows("#dialog-answer", "Declared caches may accept the key until").await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    browser.click("#dialog-cancel").await;
    assert_eq!(serial_of(&keyset(&daemon).await, "revoked"), revoked);
    browser.until(&format!("document.querySelector('[data-serial=\"{revoked}\"]') === null")).await;
    browser.until("document.querySelectorAll('svg .bar.revoked').length > 0").await;
    assert_well_behaved(&daemon, &browser).await;
}

#[tokio::test]
async fn what_changed_meanwhile_is_told_and_nothing_is_done_until_it_was_looked_at() {
    let daemon = start().await;
    standby(&daemon).await;
    let browser = operator(&daemon, 1200).await;
    calm(&daemon, &browser).await;
    open(&browser, "rotate", "standby → active").await;
    daemon.admin(Method::PUT, "/keysets/default/hold", Some(json!({ "reason": "somebody else" }))).await;
    let before = keyset(&daemon).await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Something has changed meanwhile.").await;
    assert_eq!(keyset(&daemon).await["generation"], before["generation"], "nothing was done");
    assert_eq!(browser.eval("document.querySelector('#dialog-confirm').disabled").await, true);
    browser.click("#dialog-again").await;
    browser.shows("#dialog-answer", "standby → active").await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    assert_eq!(serial_of(&keyset(&daemon).await, "active"), serial_of(&before, "standby"));
    assert_well_behaved(&daemon, &browser).await;
}

#[tokio::test]
async fn a_request_without_an_answer_is_repeated_as_it_was() {
    let mut daemon = start().await;
    standby(&daemon).await;
    let browser = operator(&daemon, 1200).await;
    calm(&daemon, &browser).await;
    open(&browser, "hold", "until it is resumed").await;
    browser.type_text("a freeze").await;
    daemon.kill9().await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "No answer came").await;
    daemon.restart().await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    assert_eq!(keyset(&daemon).await["hold"]["reason"], "a freeze");
    // Had the first one been carried out, its key would have kept the second from being so.
    let sent = browser.sent("/v1/keysets/default/hold");
    let keys: Vec<&str> = sent.iter().filter_map(|request| request["Idempotency-Key"].as_str()).collect();
    assert_eq!(keys.len(), 2, "{sent:?}");
    assert_eq!(keys[0], keys[1]);
    assert!(sent.iter().all(|request| request["If-Match"].is_string()), "{sent:?}");
}

#[tokio::test]
async fn a_refusal_is_told_in_the_daemons_words_and_only_an_operator_who_insists_goes_on() {
    let daemon = Daemon::builder().tables(&TABLES.replace("\"2s\"", "\"20m\"")).start().await;
    let browser = operator(&daemon, 1200).await;
    open(&browser, "rotate", "No standby key.").await;
    browser.shows("#dialog-answer", "The next key is ready in ").await;
    assert_eq!(browser.eval("document.querySelector('#dialog-confirm').disabled").await, true);
    browser.click("#dialog-insist").await;
    browser.shows("#dialog-answer", "some verifiers may not know it yet").await;
    browser.click("#dialog-confirm").await;
    browser.shows("#dialog-answer", "Done.").await;
    assert_eq!(serial_of(&keyset(&daemon).await, "active"), 2);
    assert_well_behaved(&daemon, &browser).await;
}

#[tokio::test]
async fn a_viewer_sees_everything_and_changes_nothing_and_a_token_that_ends_is_noticed() {
    let daemon = start().await;
    let browser = log_in(&daemon, "no-token-of-this-daemon", 1200).await;
    browser.shows("#login-problem", "does not know this token").await;
    assert_eq!(browser.eval("document.querySelector('#token').value").await, "");
    let viewer = std::fs::read_to_string(daemon.path("viewer.token")).unwrap();
    browser.type_text(viewer.trim()).await;
    browser.press("Enter").await;
    browser.shows(CARD, "active").await;
    browser.shows("#who", "changes nothing").await;
    browser.shows("#replicas", "this one").await;
    browser.shows("#audit", "created").await;
    browser.until("document.querySelectorAll('svg .bar').length > 0").await;
    assert_eq!(browser.eval("document.querySelectorAll('#overview button').length").await, 0);
    std::fs::write(daemon.path("viewer.token"), format!("{}x", viewer.trim())).unwrap();
    browser.shows("#login-problem", "not valid any more").await;
    assert_eq!(browser.eval("document.querySelector('#keysets').childElementCount").await, 0);
    assert_well_behaved(&daemon, &browser).await;
}

#[tokio::test]
async fn it_fits_a_narrow_screen_and_says_when_the_daemon_is_gone() {
    let mut daemon = start().await;
    let browser = Browser::open(&daemon.url("admin", "/"), 360, 740).await;
    let fits = "document.documentElement.scrollWidth <= 360 && [...document.querySelectorAll('main *, dialog[open] *')].every((element) => \
                element.closest('svg, .scroll, .unseen') || element.getBoundingClientRect().right <= 360.5)";
    browser.until(fits).await;
    browser.type_text(&operator_token(&daemon)).await;
    browser.press("Enter").await;
    browser.shows(CARD, "active").await;
    browser.until("document.querySelectorAll('svg .bar').length > 0").await;
    browser.shows("#audit", "created").await;
    assert_eq!(browser.eval(fits).await, true);
    open(&browser, "revoke/1", "Restart these verifiers").await;
    assert_eq!(browser.eval(fits).await, true);
    browser.press("Escape").await;
    daemon.kill9().await;
    browser.shows("#trouble", "does not answer").await;
    browser.shows("#pulse", "not up to date").await;
    daemon.restart().await;
    browser.until("document.querySelector('#trouble').hidden").await;
    assert_eq!(browser.complaints().await, Vec::<String>::new());
}

/// The page itself needs no token; everything else on the listener still does, and the guards stay.
#[tokio::test]
async fn the_page_is_served_to_nobody_elses_pages_and_can_be_turned_off() {
    let mut daemon = start().await;
    let page = Call::get(&daemon, "admin", "/").without_token().expect(200).await;
    assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
    let policy = page.header("content-security-policy").to_owned();
    for part in [
        "default-src 'none'",
        "script-src 'sha256-",
        "style-src 'sha256-",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ] {
        assert!(policy.contains(part), "{part} in {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store"),
        ("x-frame-options", "DENY"),
        ("cross-origin-opener-policy", "same-origin"),
    ] {
        assert_eq!(page.header(name), value, "{name}");
    }
    Call::new(&daemon, Method::HEAD, "admin", "/").without_token().expect(200).await;
    assert_eq!(Call::post(&daemon, "admin", "/").without_token().expect(405).await.slug(), "method-not-allowed");
    for (name, value) in
        [("host", "evil.example"), ("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")]
    {
        Call::get(&daemon, "admin", "/").header(name, value).expect(403).await;
    }
    for path in ["/v1/whoami", "/v1/replicas", "/v1/keysets/default/timeline", "/nothing"] {
        Call::get(&daemon, "admin", path).without_token().expect(401).await;
    }
    daemon.set_env("JWKSD__ADMIN__PAGE", Some("false"));
    daemon.restart().await;
    Call::get(&daemon, "admin", "/").without_token().expect(401).await;
    Call::get(&daemon, "admin", "/").expect(404).await;
}
