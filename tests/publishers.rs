//! Issuers published at a folder and in a bucket, by the real binary: whoever reads only what is placed there never
//! rejects a live token, and what others do to it is told and repaired.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

mod support;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use support::localstack::REGION;
use support::storage::{BucketSite, Weather, WebServer};
use support::strict_verifier::{Expected, StrictVerifier};
use support::{Daemon, PATIENCE, Signed, eventually, unix_now};

const ISSUER: &str = "https://issuer.example.test/tenant-a";
const AUDIENCE: &str = "https://api.example.test";
const JWKS: &str = "/tenant-a/.well-known/jwks.json";
const DISCOVERY: &str = "/tenant-a/.well-known/openid-configuration";

/// Propagation is exactly caches (`max_age`) + slowest verifier + σ: nothing is left over.
const QUICK: &str =
    "every = \"3s\"\npropagation = \"2100ms\"\nsuccessors = 1\nverifiers = [{ name = \"strict\", cache = \"1s\" }]";
/// A key set that nobody here made.
const FORGED: &str = r#"{"keys":[{"kty":"EC","kid":"mallory","crv":"P-256","x":"AA","y":"AA"}]}"#;

const SLOW: &str = "every = \"3h\"\npropagation = \"1h\"";

/// How long a rotation scenario may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(150);

/// A daemon that publishes in both ways.
struct Site {
    daemon: Daemon,
    bucket: BucketSite,
}

impl Site {
    async fn prepare(rotation: &str) -> Site {
        Site::prepare_with(rotation, "1s").await
    }

    async fn prepare_with(rotation: &str, max_age: &str) -> Site {
        let bucket = BucketSite::new().await;
        let daemon = Daemon::builder().tables(&format!(
            "[issuer.main]\nurl = \"{ISSUER}\"\nmax_age = \"{max_age}\"\n\
             [issuer.main.publish.folder]\nkind = \"file\"\npath = \"public\"\n\
             [issuer.main.publish.cdn]\nkind = \"s3\"\nbucket = \"{}\"\nprefix = \"a/b\"\nregion = \"{REGION}\"\nendpoint_url = \"{}\"\n\
             [keyset.default]\nalgorithm = \"ES256\"\n[keyset.default.rotation]\n{rotation}\n\
             [keyset.default.tokens]\nmax_ttl = \"2s\"\nclock_skew = \"100ms\"\n",
            bucket.name, bucket.endpoint
        ));
        let environment = BucketSite::environment().into_iter();
        let daemon = environment.fold(daemon, |daemon, (name, value)| daemon.env(name, value));
        Site { daemon: daemon.prepare(), bucket }
    }

    async fn start(rotation: &str) -> Site {
        let mut site = Site::prepare(rotation).await;
        site.daemon.start_process().await;
        site.daemon.ready().await;
        site
    }

    fn file(&self, path: &str) -> PathBuf {
        self.daemon.path("public").join(path.trim_start_matches('/'))
    }

    fn key(path: &str) -> String {
        format!("a/b{path}")
    }

    async fn object(&self, path: &str) -> Option<String> {
        Some(self.bucket.object(&Site::key(path)).await?.text().await.unwrap())
    }

    /// The document in the folder and the one in the bucket.
    async fn placed(&self, path: &str) -> [Option<String>; 2] {
        [std::fs::read_to_string(self.file(path)).ok(), self.object(path).await]
    }

    async fn served(&self) -> Value {
        self.daemon.get("public", JWKS).await.json()
    }

    /// Waits until both places have what the daemon serves.
    async fn settled(&self) {
        eventually("both places to be as served", PATIENCE, async || {
            let served = self.served().await;
            let both = self.placed(JWKS).await;
            both.iter().all(|placed| parsed(placed.as_deref()) == Some(served.clone())).then_some(())
        })
        .await;
    }

    /// Waits until the daemon has nothing more to write. What somebody else does to a file in the moment in which it
    /// is replaced goes with it, and nobody hears of it.
    async fn at_rest(&self) {
        let published =
            |shown: &Value| shown["keys"].as_array().unwrap().iter().all(|key| key["published_at"].is_string());
        let shown = self.until("every key published", published).await;
        let newest = format!(":{}", shown["generation"]);
        eventually("both places to be from the newest generation", PATIENCE, async || {
            let file = std::fs::read_to_string(self.mark(JWKS)).unwrap_or_default();
            let object = self.bucket.object(&Site::key(JWKS)).await?;
            let mark = object.headers().get("x-amz-meta-jwksd-generations")?.to_str().unwrap();
            (file.ends_with(&newest) && mark.ends_with(&newest)).then_some(())
        })
        .await;
        self.settled().await;
    }

    /// The file beside a document that says from which generations it was rendered.
    fn mark(&self, path: &str) -> PathBuf {
        let file = self.file(path);
        file.with_file_name(format!(".{}.generations", file.file_name().unwrap().to_str().unwrap()))
    }

    async fn mismatches(&self) -> f64 {
        self.metric("jwksd_publication_mismatch", &[("issuer", "main")]).await
    }

    /// How often the log blamed somebody else.
    fn told(&self) -> usize {
        self.daemon.logs().iter().filter(|line| line.contains("was changed by somebody else")).count()
    }

    async fn keyset(&self) -> Value {
        self.daemon.admin(Method::GET, "/keysets/default", None).await.json()
    }

    async fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        eventually(what, PATIENCE, async || {
            let shown = self.keyset().await;
            wanted(&shown).then_some(shown)
        })
        .await
    }

    async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.daemon.metrics().await.sum(name, labels).unwrap_or_else(|| panic!("no series {name} {labels:?}"))
    }

    async fn revoke(&self, kid: &str) {
        let path = format!("/keysets/default/keys/{kid}/revoke");
        let revoked = self.daemon.admin(Method::POST, &path, Some(json!({ "reason": "a test" }))).await;
        assert_eq!(revoked.status, 200, "{}", revoked.text);
    }
}

fn parsed(text: Option<&str>) -> Option<Value> {
    serde_json::from_str(text?).ok()
}

fn kids(document: &str) -> BTreeSet<String> {
    let document: Value = serde_json::from_str(document).unwrap();
    let keys = document["keys"].as_array().unwrap();
    keys.iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

fn has(list: &Value, member: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|one| one == member))
}

/// Verifiers that know only what is placed, and tokens that they have yet to see a second time.
struct Audience {
    verifiers: Vec<(&'static str, StrictVerifier)>,
    expected: Expected,
    live: Vec<Signed>,
    kids: BTreeSet<String>,
}

impl Audience {
    fn of(site: &Site, web: &WebServer) -> Audience {
        let cache = Duration::from_secs(1);
        let verifiers = vec![
            ("the folder's", StrictVerifier::new(web.url(JWKS), cache)),
            ("the bucket's", StrictVerifier::new(site.bucket.url(&Site::key(JWKS)), cache)),
        ];
        let expected = Expected { iss: ISSUER.to_owned(), aud: AUDIENCE.to_owned(), alg: "ES256".to_owned() };
        Audience { verifiers, expected, live: Vec::new(), kids: BTreeSet::new() }
    }

    /// A new token, at once; and every one that is about to expire.
    async fn turn(&mut self, daemon: &Daemon) {
        let claims = json!({ "claims": { "sub": "s", "aud": AUDIENCE }, "ttl": "2s" });
        let signed = daemon.sign("default", claims).await;
        self.kids.insert(signed.kid.clone());
        self.show(&signed).await;
        self.live.push(signed);
        let soon = unix_now() + Duration::from_millis(400);
        let (last_chance, live) =
            std::mem::take(&mut self.live).into_iter().partition(|token| Duration::from_secs(token.expires_at) < soon);
        self.live = live;
        let last_chance: Vec<Signed> = last_chance;
        for token in last_chance {
            self.show(&token).await;
        }
    }

    async fn show(&mut self, signed: &Signed) {
        for (whose, verifier) in &mut self.verifiers {
            let outcome = verifier.verify(&signed.token, &self.expected).await;
            let expired = Duration::from_secs(signed.expires_at) <= unix_now();
            assert!(outcome.is_ok() || expired, "{whose} verifier: {:?} for kid {}", outcome.err(), signed.kid);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_only_what_is_placed_accepts_every_live_token_and_rotation_waits_for_the_places() {
    let site = Site::start(QUICK).await;
    let web = WebServer::of(site.daemon.path("public"), "public, max-age=1").await;
    let mut audience = Audience::of(&site, &web);
    let end = Instant::now() + LIMIT;
    while audience.kids.len() < 4 {
        assert!(Instant::now() < end, "only {} keys signed", audience.kids.len());
        audience.turn(&site.daemon).await;
        sleep(Duration::from_millis(50)).await;
    }

    // The next successor cannot be placed: whoever signs goes on.
    site.bucket.set(Weather::WritesDenied);
    let mut late = Value::Null;
    while late["next_rotation"]["overdue_seconds"].as_i64() < Some(2) {
        assert!(Instant::now() < end, "no rotation is late: {late:#}");
        audience.turn(&site.daemon).await;
        sleep(Duration::from_millis(50)).await;
        late = site.keyset().await;
    }
    let unplaced: Vec<&Value> =
        late["keys"].as_array().unwrap().iter().filter(|key| key["published_at"].is_null()).collect();
    assert!(!unplaced.is_empty() && unplaced.iter().all(|key| key["state"] == "pending"), "{late:#}");
    let of_cdn = [("issuer", "main"), ("publisher", "cdn")];
    assert!(site.metric("jwksd_publisher_failures_total", &of_cdn).await > 0.0);
    let of_folder = [("issuer", "main"), ("publisher", "folder")];
    assert!(site.metric("jwksd_publisher_failures_total", &of_folder).await == 0.0, "they do not hold each other up");

    site.bucket.set(Weather::Fair);
    let before = audience.kids.len();
    while audience.kids.len() < before + 2 {
        assert!(Instant::now() < end, "rotation does not go on");
        audience.turn(&site.daemon).await;
        sleep(Duration::from_millis(50)).await;
    }
    let placed = site.metric("jwksd_publisher_placed_timestamp_seconds", &of_cdn).await;
    assert!((unix_now().as_secs_f64() - placed).abs() < 10.0, "{placed}");
    site.daemon.log_line("the trouble to be over", |line| line.message() == "the publisher works again").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_placed_before_the_signer_answers_and_stays_as_it_was_after_a_restart() {
    let mut site = Site::start(SLOW).await;
    let kid = site.keyset().await["active_kid"].as_str().unwrap().to_owned();
    // No waiting: the listeners opened after it.
    for document in site.placed(JWKS).await {
        assert!(kids(&document.unwrap()).contains(&kid));
    }
    site.settled().await;
    let served = site.daemon.get("public", DISCOVERY).await.json();
    for document in site.placed(DISCOVERY).await {
        assert_eq!(parsed(document.as_deref()).unwrap(), served);
    }
    let object = site.bucket.object(&Site::key(JWKS)).await.unwrap();
    assert_eq!(object.headers()["cache-control"], "public, max-age=1");
    assert_eq!(object.headers()["content-type"], "application/jwk-set+json");
    site.until("all keys published", |shown| {
        shown["keys"].as_array().unwrap().iter().all(|key| key["published_at"].is_string())
    })
    .await;
    let before = site.placed(JWKS).await;
    site.daemon.restart().await;
    assert_eq!(site.placed(JWKS).await.map(|text| kids(&text.unwrap())), before.map(|text| kids(&text.unwrap())));
    assert!(site.metric("jwksd_publication_mismatch", &[("issuer", "main")]).await == 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_do_to_it_is_told_and_repaired() {
    // A mismatch shows for as long as documents are fresh: long enough to be seen on a busy machine.
    let mut site = Site::prepare_with(SLOW, "3s").await;
    site.daemon.start_process().await;
    site.daemon.ready().await;
    site.at_rest().await;
    let [_, original] = site.placed(JWKS).await;
    let generations = format!("default:{}:1", lineage(&site).await);
    let bucket = Site::key(JWKS);
    for attack in 0..3 {
        let told = site.told();
        match attack {
            0 => {
                std::fs::write(site.file(JWKS), FORGED).unwrap();
                site.bucket.tamper(&bucket, FORGED, None).await;
            }
            1 => {
                std::fs::remove_file(site.file(JWKS)).unwrap();
                site.bucket.remove(&bucket).await;
            }
            // Older ones come back, as when a version of the bucket is restored.
            _ => {
                std::fs::write(site.mark(JWKS), &generations).unwrap();
                site.bucket.tamper(&bucket, &original.clone().unwrap(), Some(&generations)).await;
            }
        }
        eventually("a mismatch", PATIENCE, async || (site.mismatches().await > 0.0).then_some(())).await;
        eventually("both changes to be told", PATIENCE, async || (site.told() >= told + 2).then_some(())).await;
        site.at_rest().await;
        eventually("no mismatch", PATIENCE, async || (site.mismatches().await == 0.0).then_some(())).await;
        assert_eq!(site.told(), told + 2, "{:#?}", site.daemon.logs());
    }
    // Verifiers may have seen them: what was about to be promoted waits until all could look again.
    let shown = site.keyset().await;
    assert_eq!(shown["health"], "ok", "{shown:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_repaired_is_told_once_while_it_lasts() {
    let site = Site::start(SLOW).await;
    site.at_rest().await;
    site.bucket.set(Weather::WritesDenied);
    for round in 1..=2 {
        let of_cdn = [("issuer", "main"), ("publisher", "cdn")];
        let failures = site.metric("jwksd_publisher_failures_total", &of_cdn).await;
        site.bucket.tamper(&Site::key(JWKS), FORGED, None).await;
        eventually("several attempts", PATIENCE, async || {
            (site.metric("jwksd_publisher_failures_total", &of_cdn).await >= failures + 3.0).then_some(())
        })
        .await;
        assert!(site.mismatches().await > 0.0);
        site.bucket.set(Weather::Fair);
        site.at_rest().await;
        site.bucket.set(Weather::WritesDenied);
        assert_eq!(site.told(), round, "{:#?}", site.daemon.logs());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn that_there_are_no_credentials_is_said_in_so_many_words() {
    let mut site = Site::prepare(SLOW).await;
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        site.daemon.set_env(name, None);
    }
    for name in ["AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"] {
        site.daemon.set_env(name, Some("none"));
    }
    site.daemon.start_process().await;
    let told = |line: &support::LogLine| line.field("error").contains(": no AWS credentials can be had");
    site.daemon.log_line("the reason", told).await;
}

async fn lineage(site: &Site) -> String {
    let object = site.bucket.object(&Site::key(JWKS)).await.unwrap();
    let mark = object.headers()["x-amz-meta-jwksd-generations"].to_str().unwrap().to_owned();
    mark.split(':').nth(1).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_to_be_newer_does_not_outlive_the_only_writer() {
    let site = Site::start(SLOW).await;
    site.settled().await;
    let generations = format!("default:{}:99999", lineage(&site).await);
    site.bucket.tamper(&Site::key(JWKS), r#"{"keys":[]}"#, Some(&generations)).await;
    eventually("the document to be back", PATIENCE, async || {
        parsed(site.object(JWKS).await.as_deref()).filter(|found| found["keys"] != json!([]))
    })
    .await;
    site.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_leaves_the_places_at_once() {
    let site = Site::start(SLOW).await;
    site.settled().await;
    let kid = site.keyset().await["active_kid"].as_str().unwrap().to_owned();
    let begun = Instant::now();
    site.revoke(&kid).await;
    eventually("the key to be gone", PATIENCE, async || {
        let both = site.placed(JWKS).await;
        both.iter().flatten().all(|document| !kids(document).contains(&kid)).then_some(())
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(10), "it took {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_issuer_leaves_its_last_document_unless_it_shows_a_revoked_key() {
    let site = Site::start(SLOW).await;
    site.settled().await;
    let kid = site.keyset().await["active_kid"].as_str().unwrap().to_owned();
    let drained = site.daemon.admin(Method::POST, "/keysets/default/drain", Some(json!({ "reason": "a test" }))).await;
    assert_eq!(drained.status, 200, "{}", drained.text);
    let left = eventually("the last key alone, and then none served", PATIENCE, async || {
        let answer = site.daemon.get("public", JWKS).await;
        (answer.status == 503).then_some(site.placed(JWKS).await)
    })
    .await;
    for document in left {
        assert_eq!(kids(&document.unwrap()), BTreeSet::from([kid.clone()]));
    }

    let site = Site::start(&format!("{SLOW}\noverlap_extra = \"1h\"")).await;
    site.settled().await;
    let kid = site.keyset().await["active_kid"].as_str().unwrap().to_owned();
    site.daemon.admin(Method::POST, "/keysets/default/drain", Some(json!({ "reason": "a test" }))).await;
    site.revoke(&kid).await;
    eventually("an empty key set in both", PATIENCE, async || {
        let both = site.placed(JWKS).await;
        both.iter().all(|document| document.as_deref().is_some_and(|text| kids(text).is_empty())).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_read_back_does_not_count_as_published() {
    let mut site = Site::prepare(SLOW).await;
    site.bucket.set(Weather::Lying);
    site.daemon.start_process().await;
    site.daemon.ready().await;
    let of_cdn = [("issuer", "main"), ("publisher", "cdn")];
    eventually("failures", PATIENCE, async || {
        (site.metric("jwksd_publisher_failures_total", &of_cdn).await >= 2.0).then_some(())
    })
    .await;
    let unpublished = |shown: &Value| shown["keys"].as_array().unwrap().iter().all(|key| key["published_at"].is_null());
    let shown = site.keyset().await;
    assert!(unpublished(&shown), "{shown:#}");
    assert!(site.metric("jwksd_publisher_placed_timestamp_seconds", &of_cdn).await == 0.0);
    let told = |line: &support::LogLine| line.field("error").contains("what is read back is not what was written");
    site.daemon.log_line("the reason", told).await;
    site.bucket.set(Weather::Fair);
    site.until("every key published", |shown| {
        shown["keys"].as_array().unwrap().iter().all(|key| key["published_at"].is_string())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_does_not_answer_keeps_nobody_from_starting_or_stopping() {
    let mut site = Site::prepare(SLOW).await;
    site.bucket.set(Weather::Hanging);
    let begun = Instant::now();
    site.daemon.start_process().await;
    site.daemon.ready().await;
    assert!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
    site.daemon.sign("default", json!({ "claims": { "sub": "s", "aud": AUDIENCE } })).await;
    assert!(site.file(JWKS).exists(), "the other place is not held up");
    let begun = Instant::now();
    assert!(site.daemon.sigterm().await.success());
    assert!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn promotions_wait_after_a_published_key_was_missing_there() {
    let site =
        Site::start("every = \"3h\"\npropagation = \"21s\"\nverifiers = [{ name = \"slow\", cache = \"18s\" }]").await;
    site.settled().await;
    site.until("a key that could be promoted", |shown| {
        shown["keys"].as_array().unwrap().iter().any(|key| key["state"] == "standby")
    })
    .await;
    let dry = async || {
        let body = json!({ "dry_run": true });
        site.daemon.admin(Method::POST, "/keysets/default/rotate", Some(body)).await.status
    };
    assert_eq!(dry().await, 200);
    site.bucket.tamper(&Site::key(JWKS), r#"{"keys":[]}"#, None).await;
    eventually("promotions to wait", PATIENCE, async || (dry().await == 409).then_some(())).await;
    site.settled().await;
    assert_eq!(dry().await, 409, "verifiers may still hold the document without the key");
    let shown = site.keyset().await;
    assert!(has(&shown["next_rotation"]["blocked_by"], "silence") || shown["next_rotation"]["overdue_seconds"] == 0);
    eventually("promotions to go on", PATIENCE, async || (dry().await == 200).then_some(())).await;
}
