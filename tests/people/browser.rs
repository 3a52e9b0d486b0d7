//! Chromium without a window, driven through the DevTools protocol over a pipe: what a person at the page does and sees.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;

use crate::support::{PATIENCE, eventually, tools};

/// Chromium takes commands from its descriptor 3 and answers on 4, each message ended by a zero byte.
const ON_PIPES: &str = r#"exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;

/// Notes violations of the content security policy that the console might not tell.
const WATCH: &str = "window.violations = []; document.addEventListener('securitypolicyviolation', \
                     (event) => window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));";

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Value>>>>;

/// A browser with one page. Dropping it kills it.
pub struct Browser {
    _child: Child,
    _profile: TempDir,
    input: tokio::sync::Mutex<ChildStdin>,
    next: AtomicU64,
    waiting: Waiting,
    events: Arc<Mutex<Vec<Value>>>,
    session: String,
}

impl Browser {
    /// A window of this size, in Berlin.
    pub async fn open(url: &str, width: u32, height: u32) -> Browser {
        let profile = TempDir::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", ON_PIPES]).arg(tools::chromium());
        command.args(["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run"]);
        command.args(["--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]);
        command.args([
            "--disable-sync",
            "--disable-extensions",
            "--no-proxy-server",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
        ]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
        command.env("TZ", "Europe/Berlin").env("HOME", profile.path()).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (waiting, events) = (Waiting::default(), Arc::<Mutex<Vec<Value>>>::default());
        tokio::spawn(read(child.stdout.take().unwrap(), waiting.clone(), events.clone()));
        let input = tokio::sync::Mutex::new(child.stdin.take().unwrap());
        let (next, session) = (AtomicU64::new(1), String::new());
        let mut browser = Browser { _child: child, _profile: profile, input, next, waiting, events, session };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" })).await;
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let attached = browser.call("Target.attachToTarget", attach).await;
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser.resize(width, height).await;
        browser.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": WATCH })).await;
        browser.call("Page.navigate", json!({ "url": url })).await;
        browser.until("document.readyState === 'complete' && document.title === 'jwksd'").await;
        browser
    }

    pub async fn resize(&self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics).await;
    }

    pub async fn dark(&self, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", features).await;
    }

    /// One command of the protocol.
    pub async fn call(&self, method: &str, params: Value) -> Value {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_empty() {
            message["sessionId"] = self.session.as_str().into();
        }
        let (answered, answer) = oneshot::channel();
        self.waiting.lock().unwrap().insert(id, answered);
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.input.lock().await.write_all(&bytes).await.expect("Chromium runs");
        let answer = tokio::time::timeout(PATIENCE, answer).await;
        let answer = answer.unwrap_or_else(|_| panic!("{method}: no answer")).expect("Chromium runs");
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].clone()
    }

    /// What a script evaluates to.
    pub async fn eval(&self, script: &str) -> Value {
        let params = json!({ "expression": script, "awaitPromise": true, "returnByValue": true });
        let result = self.call("Runtime.evaluate", params).await;
        assert!(result["exceptionDetails"].is_null(), "{script}: {result}");
        result["result"]["value"].clone()
    }

    pub async fn text(&self, selector: &str) -> String {
        let script = format!("document.querySelector({})?.innerText ?? ''", json!(selector));
        self.eval(&script).await.as_str().unwrap().to_owned()
    }

    /// Waits until a script's value is true.
    pub async fn until(&self, script: &str) {
        eventually(script, PATIENCE, async || (self.eval(script).await == true).then_some(())).await;
    }

    /// Waits until an element shows this text; fails with what it shows instead.
    pub async fn shows(&self, selector: &str, text: &str) {
        let shown = async {
            while !self.text(selector).await.contains(text) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, shown).await.is_err() {
            panic!("{selector} does not show {text:?}, but {:?}", self.text(selector).await);
        }
    }

    /// Clicks on what can be clicked.
    pub async fn click(&self, selector: &str) {
        let selector = json!(selector);
        self.until(&format!("(document.querySelector({selector})?.disabled ?? true) === false")).await;
        self.eval(&format!("document.querySelector({selector}).click()")).await;
    }

    /// Types into what has the focus.
    pub async fn type_text(&self, text: &str) {
        self.call("Input.insertText", json!({ "text": text })).await;
    }

    /// `Enter`, `Tab` or `Escape`.
    pub async fn press(&self, key: &str) {
        let code = match key {
            "Enter" => 13,
            "Tab" => 9,
            _ => 27,
        };
        let text = if key == "Enter" { "\r" } else { "" };
        for kind in ["keyDown", "keyUp"] {
            let kind = if text.is_empty() && kind == "keyDown" { "rawKeyDown" } else { kind };
            let text = if kind == "keyDown" { text } else { "" };
            let event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    pub async fn screenshot(&self, path: &Path) {
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" })).await;
        std::fs::write(path, STANDARD.decode(shot["data"].as_str().unwrap()).unwrap()).unwrap();
    }

    /// What scripts complained of, and what the content security policy kept from happening. Refusals of the API, which
    /// the console tells as well, are no complaints of the page.
    pub async fn complaints(&self) -> Vec<String> {
        let mut complaints: Vec<String> = Vec::new();
        for event in self.events.lock().unwrap().iter() {
            let entry = &event["params"]["entry"];
            let told = match event["method"].as_str().unwrap_or_default() {
                "Runtime.exceptionThrown" => true,
                "Runtime.consoleAPICalled" => {
                    ["error", "warning", "assert"].map(Value::from).contains(&event["params"]["type"])
                }
                "Log.entryAdded" => {
                    entry["source"] != "network" && (entry["level"] == "error" || entry["level"] == "warning")
                }
                _ => false,
            };
            if told {
                complaints.push(event.to_string());
            }
        }
        let violations = self.eval("window.violations").await;
        complaints.extend(violations.as_array().unwrap().iter().map(ToString::to_string));
        complaints
    }

    /// The headers of all requests to a path.
    pub fn sent(&self, path: &str) -> Vec<Value> {
        let events = self.events.lock().unwrap();
        let requests = events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        let requests = requests.map(|event| &event["params"]["request"]);
        let to_it = requests.filter(|request| request["url"].as_str().is_some_and(|url| url.ends_with(path)));
        to_it.map(|request| request["headers"].clone()).collect()
    }

    /// Addresses that were asked for, but for the page's own data.
    pub fn asked(&self) -> Vec<String> {
        let events = self.events.lock().unwrap();
        let requests = events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        let urls = requests.filter_map(|event| event["params"]["request"]["url"].as_str());
        urls.filter(|url| !url.starts_with("data:")).map(str::to_owned).collect()
    }
}

/// Hands answers to those who wait and keeps the rest.
async fn read(output: ChildStdout, waiting: Waiting, events: Arc<Mutex<Vec<Value>>>) {
    let mut messages = BufReader::new(output).split(0);
    while let Ok(Some(bytes)) = messages.next_segment().await {
        let Ok(message) = serde_json::from_slice::<Value>(&bytes) else { continue };
        match message["id"].as_u64() {
            Some(id) => {
                if let Some(answered) = waiting.lock().unwrap().remove(&id) {
                    let _ = answered.send(message);
                }
            }
            None => events.lock().unwrap().push(message),
        }
    }
}
