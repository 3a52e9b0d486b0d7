//! Failures that really happen, side by side, and a daemon that has none.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;

use crate::hastened;
use crate::prometheus::Prometheus;
use crate::support::kms_proxy::{Fault, KmsProxy};
use crate::support::localstack::{LocalStack, REGION};
use crate::support::ports::ReservedPort;
use crate::support::tools::faketime_library;
use crate::support::{Daemon, DaemonBuilder, PATIENCE, eventually, http_client};

const KEYSET: &str = "[issuer.main]\nurl = \"https://issuer.example.test\"\nmax_age = \"1s\"\n\
                      [keyset.default]\nalgorithm = \"ES256\"\n\
                      [keyset.default.tokens]\nmax_ttl = \"1s\"\ndefault_ttl = \"1s\"\nclock_skew = \"500ms\"\n";

/// How long everything together may take to be noticed on a busy machine.
const NOTICED: Duration = Duration::from_secs(60);

/// Requests that come all the time, until it is dropped.
struct Traffic(JoinSet<()>);

impl Traffic {
    fn none() -> Self {
        Traffic(JoinSet::new())
    }

    fn request(self, method: Method, url: String, body: Option<serde_json::Value>) -> Self {
        self.each(Duration::from_millis(100), method, url, body)
    }

    fn each(mut self, pause: Duration, method: Method, url: String, body: Option<serde_json::Value>) -> Self {
        self.0.spawn(async move {
            let http = http_client().build().unwrap();
            let mut often = tokio::time::interval(pause);
            loop {
                often.tick().await;
                let request = http.request(method.clone(), &url);
                let request = body.iter().fold(request, |request, body| request.json(body));
                // Whether it is answered is what the daemon's metrics tell.
                let _ = request.send().await;
            }
        });
        self
    }

    fn signatures(self, daemon: &Daemon, keyset: &str) -> Self {
        let good = json!({ "claims": { "sub": "a", "aud": "b" } });
        self.request(Method::POST, daemon.url("signer", &format!("/v1/keysets/{keyset}/sign")), Some(good))
    }

    /// Many applications, so that answers that come late do not make them few.
    fn many_signatures(self, daemon: &Daemon, keyset: &str) -> Self {
        (0..6).fold(self, |traffic, _| traffic.signatures(daemon, keyset))
    }

    /// One request every two seconds.
    fn few_signatures(self, daemon: &Daemon, keyset: &str) -> Self {
        let url = daemon.url("signer", &format!("/v1/keysets/{keyset}/sign"));
        self.each(Duration::from_secs(2), Method::POST, url, Some(json!({ "claims": { "sub": "a", "aud": "b" } })))
    }

    /// What callers do wrong: 422.
    fn mistakes(self, daemon: &Daemon) -> Self {
        let bad = json!({ "claims": {}, "ttl": "1000h" });
        self.request(Method::POST, daemon.url("signer", "/v1/keysets/default/sign"), Some(bad))
    }

    fn verifiers(self, daemon: &Daemon) -> Self {
        self.request(Method::GET, daemon.url("public", "/.well-known/jwks.json"), None)
    }
}

fn plain() -> DaemonBuilder {
    Daemon::builder().tables(KEYSET)
}

async fn act(daemon: &Daemon, method: Method, path: &str, body: serde_json::Value) {
    let answer = daemon.admin(method, path, Some(body)).await;
    assert!(answer.status < 300, "{path}: {}", answer.text);
}

/// A daemon whose keys are in a KMS, and what stands between the two.
async fn with_kms() -> (Daemon, KmsProxy) {
    let account = LocalStack::shared().await.account();
    let proxy = KmsProxy::before(&account.endpoint).await;
    let keyset = |name: &str| {
        format!(
            "[keyset.{name}]\nalgorithm = \"ES256\"\nbackend = \"aws-kms\"\n[keyset.{name}.rotation]\nsuccessors = 1\n"
        )
    };
    let backend = format!("[backend.aws-kms]\nregion = \"{REGION}\"\nendpoint_url = \"{}\"\n", proxy.url());
    let issuer = "[issuer.main]\nurl = \"https://issuer.example.test\"\n";
    let mut builder = Daemon::builder().tables(&[issuer, &keyset("busy"), &keyset("night"), &backend].concat());
    for (name, value) in account.environment() {
        builder = builder.env(name, &value);
    }
    let daemon = builder.start().await;
    eventually("keys in the KMS", PATIENCE, async || {
        let (_, keysets) = (daemon.get("ops", "/readyz/sign").await, daemon.admin(Method::GET, "/keysets", None).await);
        let waiting = keysets.text.matches("\"pending\"").count() + keysets.text.matches("\"standby\"").count();
        (daemon.get("ops", "/readyz/sign").await.status == 200 && waiting >= 2).then_some(())
    })
    .await;
    (daemon, proxy)
}

/// A daemon whose wall clock is what a file in its folder says.
async fn with_own_clock() -> Daemon {
    let mut daemon = plain().prepare();
    set_clock(&daemon, 0);
    let (library, file) = (faketime_library(), daemon.path("clock"));
    daemon.set_env("LD_PRELOAD", library.to_str());
    daemon.set_env("FAKETIME_TIMESTAMP_FILE", file.to_str());
    for name in ["FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT"] {
        daemon.set_env(name, Some("1"));
    }
    daemon.restart().await;
    daemon
}

fn set_clock(daemon: &Daemon, offset: i64) {
    let new = daemon.path("clock.new");
    std::fs::write(&new, format!("{offset:+}")).unwrap();
    std::fs::rename(new, daemon.path("clock")).unwrap();
}

/// A manager, and a signer that has its keyrings from it alone.
async fn manager_and_signer() -> (Daemon, Daemon, ReservedPort) {
    let port = ReservedPort::any();
    let listen = format!("[replication]\nlisten = \"127.0.0.1:{}\"\n", port.number());
    let client = "[replication.client.edge]\ntoken_file = \"edge.token\"\n";
    let mut manager = plain().tables(&listen).tables(client).prepare();
    let limits = "staleness_limit = \"10s\"\npublish_lag = \"1s\"";
    manager.set_store(&format!("kind = \"file\"\npath = \"keyrings\"\ninitialise = \"if-empty\"\n{limits}"));
    std::fs::write(manager.path("edge.token"), "a-token-of-signers-0123456789-0123456789-012345").unwrap();
    manager.restart().await;
    let seal = format!("kind = \"file\"\npath = \"{}\"", manager.path("seal.key").display());
    let store = format!(
        "kind = \"upstream\"\nurls = [\"http://127.0.0.1:{}\"]\ntoken_file = \"{}\"",
        port.number(),
        manager.path("edge.token").display()
    );
    let signer = Daemon::builder().seal(&seal).signer_of(&store).start().await;
    (manager, signer, port)
}

/// A location where verifiers fetch, run by somebody else, and a daemon that probes it.
async fn probing_a_stranger() -> (Daemon, Daemon) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let mut stranger = plain().tables("[public.tls]\ncert_file = \"tls.crt\"\nkey_file = \"tls.key\"").prepare();
    std::fs::write(stranger.path("tls.crt"), certificate.pem()).unwrap();
    std::fs::write(stranger.path("tls.key"), key.serialize_pem()).unwrap();
    stranger.restart().await;
    let port = stranger.address("public").rsplit(':').next().unwrap().to_owned();
    let probe = format!("max_age = \"1s\"\nprobes = [\"https://localhost:{port}/.well-known/jwks.json\"]");
    let trusted = stranger.path("tls.crt");
    let tables = KEYSET.replace("max_age = \"1s\"", &probe);
    let probing = Daemon::builder().tables(&tables).env("SSL_CERT_FILE", trusted.to_str().unwrap()).start().await;
    (probing, stranger)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_fires_its_alerts_and_no_others() {
    let ((kms, proxy), (withheld, create_fails), clock, (mut manager, signer, _port), (probing, _stranger)) =
        tokio::join!(with_kms(), with_kms(), with_own_clock(), manager_and_signer(), probing_a_stranger());
    let (healthy, mut down, broken, drained) =
        tokio::join!(plain().start(), plain().start(), plain().start(), plain().start());
    let jobs = [
        ("jwksd-healthy", &healthy),
        ("jwksd-down", &down),
        ("jwksd-broken", &broken),
        ("jwksd-drained", &drained),
        ("jwksd-kms", &kms),
        ("jwksd-withheld", &withheld),
        ("jwksd-clock", &clock),
        ("jwksd-manager", &manager),
        ("jwksd-signer", &signer),
        ("jwksd-probing", &probing),
    ];
    let prometheus = Prometheus::start(&jobs, &hastened()).await;
    let traffic = Traffic::none().signatures(&healthy, "default").mistakes(&healthy).verifiers(&healthy);
    let _traffic = traffic.many_signatures(&kms, "busy").verifiers(&drained).mistakes(&drained);
    eventually("scrapes and signatures of all", PATIENCE, async || {
        let seen = prometheus.query("count(jwksd_build_info)").await;
        let signed = prometheus.query("sum(increase(jwksd_signatures_total{keyset=\"busy\"}[10s])) > 40").await;
        (seen.first()?["value"][1] == jobs.len().to_string().as_str() && !signed.is_empty()).then_some(())
    })
    .await;

    // What is normal, and what is not.
    act(&healthy, Method::POST, "/keysets/default/rotate", json!({ "allow_unpropagated": true })).await;
    act(&healthy, Method::PUT, "/keysets/default/hold", json!({ "reason": "a test" })).await;
    down.kill9().await;
    std::fs::write(broken.path("jwksd.toml"), "no = \"configuration\"\n").unwrap();
    act(&drained, Method::POST, "/keysets/default/drain", json!({})).await;
    proxy.always("Sign", Fault::Fail);
    let _few = Traffic::none().few_signatures(&kms, "night");
    create_fails.always("CreateKey", Fault::Deny);
    act(&withheld, Method::POST, "/keysets/busy/rotate", json!({ "allow_unpropagated": true })).await;
    set_clock(&clock, 365 * 86_400);
    manager.kill9().await;

    let expected: [(&str, &[&str]); 10] = [
        ("jwksd-healthy", &[]),
        ("jwksd-down", &["JwksdDown"]),
        ("jwksd-broken", &["JwksdConfigReloadFailed"]),
        ("jwksd-drained", &["JwksdJwksUnavailable/main", "JwksdKeysetDrained"]),
        ("jwksd-kms", &["JwksdBackendUnavailable", "JwksdSigningFailing/busy", "JwksdSigningFailingLowTraffic/night"]),
        ("jwksd-withheld", &["JwksdBackendUnavailable", "JwksdNoStandby/busy"]),
        ("jwksd-clock", &["JwksdClockFrozen"]),
        ("jwksd-manager", &["JwksdDown"]),
        ("jwksd-signer", &["JwksdKeyringStale/default", "JwksdStoreUnavailable"]),
        // What is not shown there does not propagate.
        ("jwksd-probing", &["JwksdNoStandby/default", "JwksdPublicJwksWrong/main"]),
    ];
    let wrong = async || {
        let mut wrong = Vec::new();
        for (job, alerts) in expected {
            let wanted: BTreeSet<String> = alerts.iter().map(|&name| name.to_owned()).collect();
            let firing = prometheus.firing(job).await;
            if firing != wanted {
                wrong.push(format!("{job}: {firing:?} instead of {wanted:?}"));
            }
        }
        wrong
    };
    let all = async {
        while !wrong().await.is_empty() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    if tokio::time::timeout(NOTICED, all).await.is_err() {
        panic!("after {NOTICED:?}:\n{}", wrong().await.join("\n"));
    }
    for alert in prometheus.alerts().await {
        for text in ["summary", "description", "runbook_url"].map(|name| alert["annotations"][name].as_str().unwrap()) {
            assert!(!text.is_empty() && !text.contains("<no value>") && !text.contains("error expanding"), "{alert}");
        }
    }
}
