//! The engine before and after its seal opens (DESIGN §3.6): what is served, what is refused, and that nothing is written.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[path = "support/policy.rs"]
mod policy;

use std::collections::BTreeMap;
use std::sync::Arc;

use jwksd::backend::Backend;
use jwksd::backend::local::LocalBackend;
use jwksd::clock::{ManualClock, TrustedClock};
use jwksd::engine::view::Health;
use jwksd::engine::whole::WholeRequest;
use jwksd::engine::{CommandError, Declared, Engine, Records, ReplicaRole, Rest, Settings, SignFailure};
use jwksd::keyring::claims::parse_request;
use jwksd::keyring::decide::{Intent, Request};
use jwksd::keyring::name::Name;
use jwksd::keyring::outlook::Alarm;
use jwksd::keyring::policy::{IssuerPolicy, Policy};
use jwksd::keyring::record::KeyState;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::KeyEncryptionKey;
use jwksd::seal::data_keys::LateDataKeys;
use jwksd::seal::file::FileKey;
use jwksd::store::ledger::{Ledger, LedgerError, SealEvidence, Unauthenticated};
use jwksd::store::memory::MemoryStore;
use jwksd::store::{Digest, Document, Store};
use jwksd::telemetry::metrics::{Metrics, SigningFailure};

/// A store and its seal, which outlive the engines on them.
struct Site {
    store: Arc<MemoryStore>,
    seal: Arc<dyn KeyEncryptionKey>,
    clock: Arc<ManualClock>,
    declared: Vec<Declared>,
}

/// An engine that has not seen its seal yet.
struct Waiting {
    engine: Arc<Engine>,
    data_keys: Arc<LateDataKeys>,
}

impl Site {
    /// `a` and `b` of one issuer, `c` of another.
    fn new() -> Self {
        let declared = [("a", "https://one.example"), ("b", "https://one.example"), ("c", "https://two.example")];
        Site {
            store: Arc::new(MemoryStore::new()),
            seal: Arc::new(FileKey::ephemeral()),
            clock: ManualClock::at(Timestamp::from_secs(1_800_000_000)),
            declared: declared.iter().map(|(name, url)| declare(name, url)).collect(),
        }
    }

    /// Runs a daemon with its seal for a while and ends it.
    async fn lived_in() -> Self {
        let site = Site::new();
        let waiting = site.wait_for_initialisation();
        waiting.engine.configure_sealed(&site.declared).await.unwrap();
        site.unseal(&waiting).await.unwrap();
        waiting.engine.reconcile_all().await;
        waiting.engine.confirm_created().await.unwrap();
        waiting.engine.opened().await;
        waiting.engine.pulse().await;
        for _ in 0..10 {
            site.clock.advance(Span::SECOND);
            waiting.engine.reconcile_all().await;
        }
        waiting.engine.pulse().await;
        site
    }

    fn trusted(&self) -> Arc<TrustedClock> {
        Arc::new(TrustedClock::new(self.clock.clone(), Span::SECOND))
    }

    fn engine(&self, records: Records) -> Waiting {
        let data_keys = Arc::new(LateDataKeys::default());
        let backends: [Arc<dyn Backend>; 1] = [Arc::new(LocalBackend::new(data_keys.clone()))];
        let settings = Settings {
            sign_deadline: Span::SECOND,
            audit_signatures: false,
            pool_size: 1,
            role: ReplicaRole::All,
            publishes: true,
        };
        let engine = Engine::new(self.trusted(), records, backends, None, Arc::new(Metrics::new()), settings);
        Waiting { engine, data_keys }
    }

    fn wait_for_initialisation(&self) -> Waiting {
        self.engine(Records::Sealed(Unauthenticated::uninitialised(self.store.clone())))
    }

    /// A daemon that serves already although its seal is out of reach.
    async fn sealed(&self) -> Waiting {
        let claims = Unauthenticated::read(self.store.clone()).await.unwrap();
        let waiting = self.engine(Records::Sealed(claims));
        waiting.engine.configure_sealed(&self.declared).await.unwrap();
        waiting
    }

    async fn unseal(&self, waiting: &Waiting) -> Result<(), String> {
        let seal = self.seal.clone();
        let ledger = Ledger::initialise(
            self.store.clone(),
            SealEvidence::Unknown,
            async || Ok(seal),
            Timestamp::from_secs(1_800_000_000),
        );
        let ledger = ledger.await.map_err(|error| error.to_string())?;
        waiting.data_keys.arrive(ledger.keys());
        let unsealed = waiting.engine.unseal(Arc::new(ledger), &self.declared).await;
        unsealed.map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// Every document, byte for byte.
    async fn content(&self) -> BTreeMap<String, Option<Vec<u8>>> {
        let named = ["a", "b", "c"].map(name);
        let each = named.iter().flat_map(|name| [Document::Keyring(name.clone()), Document::Seen(name.clone())]);
        let once = [Document::Initialising, Document::Installation, Document::SeenInstallation, Document::Alive];
        let mut content = BTreeMap::new();
        for document in each.chain(once) {
            content.insert(document.to_string(), self.store.read(&document).await.unwrap());
        }
        content
    }

    /// Somebody without the seal writes to the store, and keeps the form.
    async fn forge(&self, document: Document, from: &str, to: &str) {
        let bytes = self.store.read(&document).await.unwrap().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        let forged = text.replacen(from, to, 1);
        self.store.replace(&document, Some(Digest::of(&bytes)), forged.as_bytes()).await.unwrap();
        // Whoever knows of marks removes them; a mark would tell even without the seal.
        if let Document::Keyring(keyset) = document {
            self.store.remove(&Document::Seen(keyset)).await.unwrap();
        }
    }
}

impl Waiting {
    fn jwks(&self, issuer: &str) -> Option<String> {
        let directory = self.engine.directory();
        let issuer = directory.issuers.iter().find(|found| found.url == issuer).unwrap();
        let document = issuer.served()?;
        Some(String::from_utf8(document.body.to_vec()).unwrap())
    }

    async fn sign(&self, keyset: &str) -> Result<String, SignFailure> {
        let cell = self.engine.keyset(keyset).unwrap();
        let request = parse_request(br#"{"claims":{"sub":"s"}}"#).unwrap();
        self.engine.sign(&cell, &request, None, "test").await.map(|issued| issued.kid.to_string())
    }

    async fn rotate(&self, keyset: &str) -> Result<(), CommandError> {
        let cell = self.engine.keyset(keyset).unwrap();
        let request = Request {
            intent: Intent::Rotate { allow_unpropagated: false, confirm_algorithm: None },
            actor: "operator".to_owned(),
            reason: None,
            dry_run: false,
            if_generation: None,
            idempotency: None,
        };
        self.engine.command(&cell, request).await.map(|_| ())
    }

    fn alarms(&self, keyset: &str) -> Vec<Alarm> {
        self.engine.look(&self.engine.keyset(keyset).unwrap()).alarms.into_iter().collect()
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn declare(keyset: &str, url: &str) -> Declared {
    let host = url.trim_start_matches("https://").trim_end_matches(".example");
    // Both issuers have the path `/`.
    let policy = policy::policy(host, url);
    let policy = match host {
        "two" => Policy { issuer: IssuerPolicy { url: format!("{url}/two"), ..policy.issuer }, ..policy },
        _ => policy,
    };
    Declared { name: name(keyset), policy: Arc::new(policy), fits: true }
}

const ONE: &str = "https://one.example";
const TWO: &str = "https://two.example/two";

fn whole() -> WholeRequest {
    WholeRequest { actor: "operator".to_owned(), reason: None, dry_run: false, if_generation: None, idempotency: None }
}

#[tokio::test]
async fn without_its_seal_the_engine_serves_and_does_nothing_else() {
    let site = Site::lived_in().await;
    let before = site.content().await;
    let waiting = site.sealed().await;
    waiting.engine.opened().await;

    let jwks = waiting.jwks(ONE).unwrap();
    assert_eq!(jwks.matches("\"kid\"").count(), 4, "{jwks}");
    assert!(waiting.jwks(TWO).unwrap().contains("\"kid\""));
    for keyset in ["a", "b", "c"] {
        let refused = waiting.sign(keyset).await.unwrap_err();
        assert!(matches!(refused, SignFailure::Ours { reason: SigningFailure::BackendUnavailable, .. }), "{refused:?}");
        assert!(matches!(waiting.rotate(keyset).await, Err(CommandError::Sealed)));
        assert_eq!(waiting.alarms(keyset), [Alarm::Unauthenticated]);
        let cell = waiting.engine.keyset(keyset).unwrap();
        assert_eq!(waiting.engine.look(&cell).health(), Health::Failing);
        assert_eq!(waiting.engine.reconcile(&cell).await, Rest::Until(None));
    }
    assert!(matches!(waiting.engine.accept_clock(&whole()).await, Err(CommandError::Sealed)));
    let reload = async || -> Result<(), ()> { panic!("nothing is read") };
    let reloaded = waiting.engine.reload_as(&whole(), reload(), |(), _| serde_json::Value::Null).await;
    assert!(matches!(reloaded, Err(CommandError::Sealed)));
    site.clock.advance(Span::HOUR.times(2));
    waiting.engine.pulse().await;
    waiting.engine.reconcile_all().await;
    assert!(waiting.engine.configure(&site.declared).await.is_err(), "a changed configuration waits for the seal");
    assert_eq!(site.content().await, before, "nothing is written");
    assert_eq!(waiting.jwks(ONE).unwrap(), jwks);
}

#[tokio::test]
async fn when_the_seal_opens_it_goes_on_with_the_same_keys() {
    let site = Site::lived_in().await;
    let waiting = site.sealed().await;
    waiting.engine.opened().await;
    let jwks = waiting.jwks(ONE).unwrap();
    site.clock.advance(Span::from_millis(500));
    site.unseal(&waiting).await.unwrap();

    assert_eq!(waiting.jwks(ONE).unwrap(), jwks);
    for keyset in ["a", "b", "c"] {
        let kid = waiting.sign(keyset).await.unwrap();
        let cell = waiting.engine.keyset(keyset).unwrap();
        assert_eq!(cell.snapshot.load().keyring.active().unwrap().kid.as_str(), kid);
        assert_eq!(waiting.alarms(keyset), []);
        waiting.rotate(keyset).await.unwrap();
    }
    assert!(waiting.engine.accept_clock(&whole()).await.is_ok());
}

#[tokio::test]
async fn keys_count_as_published_from_when_they_were_served_without_proof() {
    let site = Site::lived_in().await;
    // A second successor was written and the daemon ended before anybody could see it.
    let waiting = site.sealed().await;
    waiting.engine.opened().await;
    let shown = waiting.engine.keyset("a").unwrap().snapshot.load().published.clone();
    assert_eq!(shown.len(), 2);
    site.clock.advance(Span::from_millis(700));
    site.unseal(&waiting).await.unwrap();
    assert_eq!(waiting.engine.keyset("a").unwrap().snapshot.load().published, shown);
    // And the daemon was away until it served, not until its seal opened: no silence to wait for.
    let directory = waiting.engine.directory();
    assert!(directory.issuers.iter().all(|issuer| issuer.resumed_boot_ms().is_none()));
}

#[tokio::test]
async fn a_record_that_fails_its_check_is_not_served_any_more_and_the_others_go_on() {
    let site = Site::lived_in().await;
    site.forge(Document::Keyring(name("a")), "\"successors\": 1", "\"successors\": 2").await;
    let forged = site.content().await;
    let waiting = site.sealed().await;
    waiting.engine.opened().await;
    assert_eq!(waiting.jwks(ONE).unwrap().matches("\"kid\"").count(), 4, "nobody can tell yet");
    let stale = waiting.engine.keyset("a").unwrap();
    site.unseal(&waiting).await.unwrap();
    waiting.engine.reconcile_all().await;
    waiting.engine.pulse().await;

    let jwks = waiting.jwks(ONE).unwrap();
    assert_eq!(jwks.matches("\"kid\"").count(), 2, "{jwks}");
    let a = waiting.engine.keyset("a").unwrap();
    assert!(a.snapshot.load().keyring.keys.is_empty());
    assert!(stale.snapshot.load().active.is_none(), "requests under way sign with nothing");
    assert!(waiting.alarms("a").contains(&Alarm::Unauthenticated) && waiting.alarms("a").contains(&Alarm::Frozen));
    assert!(waiting.sign("a").await.is_err());
    assert!(
        matches!(waiting.rotate("a").await, Err(CommandError::Frozen { reason }) if reason.contains("changed or forged"))
    );
    assert_eq!(waiting.engine.reconcile(&a).await, Rest::Frozen);
    for keyset in ["b", "c"] {
        waiting.sign(keyset).await.unwrap();
        assert_eq!(waiting.alarms(keyset), []);
    }
    let after = site.content().await;
    for document in [Document::Keyring(name("a")), Document::Seen(name("a"))] {
        assert_eq!(after[&document.to_string()], forged[&document.to_string()], "evidence stays");
    }
}

#[tokio::test]
async fn before_any_listener_is_open_a_forged_record_refuses_the_start() {
    let site = Site::lived_in().await;
    site.forge(Document::Keyring(name("a")), "\"successors\": 1", "\"successors\": 2").await;
    let waiting = site.sealed().await;
    let refused = site.unseal(&waiting).await.unwrap_err();
    assert!(refused.contains("changed or forged"), "{refused}");
    assert!(waiting.engine.is_sealed() && waiting.sign("b").await.is_err());
}

#[tokio::test]
async fn what_is_damaged_beyond_doubt_refuses_the_start_without_any_seal() {
    let site = Site::lived_in().await;
    site.forge(Document::Keyring(name("a")), "\"format\": 1", "\"format\": 2").await;
    let claims = Unauthenticated::read(site.store.clone()).await.unwrap();
    let waiting = site.engine(Records::Sealed(claims));
    let errors = waiting.engine.configure_sealed(&site.declared).await.unwrap_err();
    assert_eq!(errors.len(), 1);
    assert!(errors[0].to_string().contains("has format 2"), "{}", errors[0]);

    // An older copy is noticed by its mark, although that is not proved either.
    let site = Site::lived_in().await;
    let old = site.store.read(&Document::Keyring(name("b"))).await.unwrap().unwrap();
    let waiting = site.sealed().await;
    site.unseal(&waiting).await.unwrap();
    waiting.engine.opened().await;
    waiting.rotate("b").await.unwrap();
    let newer = site.store.read(&Document::Keyring(name("b"))).await.unwrap().unwrap();
    assert_ne!(newer, old);
    site.store.replace(&Document::Keyring(name("b")), Some(Digest::of(&newer)), &old).await.unwrap();
    let claims = Unauthenticated::read(site.store.clone()).await.unwrap();
    let refused = claims.load(&name("b")).await.unwrap_err();
    assert!(matches!(refused, LedgerError::OlderThanSeen { .. }), "{refused}");
}

#[tokio::test]
async fn a_first_start_without_the_seal_serves_nothing_and_begins_when_it_opens() {
    let site = Site::new();
    let waiting = site.wait_for_initialisation();
    waiting.engine.configure_sealed(&site.declared).await.unwrap();
    waiting.engine.opened().await;
    waiting.engine.pulse().await;
    assert!(waiting.jwks(ONE).is_none() && waiting.sign("a").await.is_err());
    assert!(site.content().await.values().all(Option::is_none), "nothing is written");

    site.unseal(&waiting).await.unwrap();
    assert_eq!(waiting.jwks(ONE).unwrap().matches("\"kid\"").count(), 4, "all of the issuer's keys at once");
    for keyset in ["a", "b", "c"] {
        assert_eq!(waiting.engine.keyset(keyset).unwrap().snapshot.load().published.len(), 2);
        waiting.sign(keyset).await.unwrap();
        let cell = waiting.engine.keyset(keyset).unwrap();
        let keyring = cell.snapshot.load().keyring.clone();
        assert!(keyring.first && keyring.keys.iter().any(|key| key.state == KeyState::Active), "{keyring:?}");
    }
}

#[tokio::test]
async fn an_installation_that_cannot_be_trusted_takes_every_key_out_of_service() {
    let site = Site::lived_in().await;
    let waiting = site.sealed().await;
    waiting.engine.opened().await;
    waiting.engine.refuse_everything("the installation was changed or forged").await;
    assert!(waiting.jwks(ONE).is_none() && waiting.jwks(TWO).is_none());
    assert!(waiting.alarms("b").contains(&Alarm::Frozen) && waiting.sign("b").await.is_err());
    assert!(matches!(waiting.rotate("b").await, Err(CommandError::Frozen { .. })));
}
