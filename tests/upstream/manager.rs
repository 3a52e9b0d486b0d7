//! A manager as signers see it: a ledger over a relay, and its replication listener on a port that stays its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jwksd::clock::{Clock, SystemClock, TrustedClock};
use jwksd::config::Secret;
use jwksd::http::auth::{Authenticator, TokenSet};
use jwksd::http::listener::{BoundListener, Drained, ListenAddress, ListenerOptions};
use jwksd::http::middleware::{HostPolicy, guard_host};
use jwksd::http::replication::{MOST_CONNECTIONS, ReplicationState, router};
use jwksd::http::tls::{ClientCertificates, Tls, TlsFiles};
use jwksd::keyring::name::Name;
use jwksd::keyring::policy::{Discovery, IssuerPolicy, Policy, RotationPolicy, TokenPolicy};
use jwksd::keyring::record::{Journal, Keyring};
use jwksd::keyring::schedule::Schedule;
use jwksd::keyring::time::{Span, Timestamp};
use jwksd::seal::KeyEncryptionKey;
use jwksd::seal::file::FileKey;
use jwksd::store::ledger::{Ledger, Loaded, SealEvidence};
use jwksd::store::memory::MemoryStore;
use jwksd::store::relay::Relay;
use jwksd::store::upstream::{Token, UpstreamSettings, UpstreamStore};
use jwksd::store::wire::LONGEST_REPORT;
use jwksd::store::{Document, Store};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::ports::ReservedPort;

pub const TOKEN: &str = "a-token-of-signers-0123456789";

pub const ISSUER: &str = "https://auth.example.com";

/// Longer than anything that waits for an event should take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Manager {
    pub relay: Arc<Relay>,
    pub ledger: Ledger,
    pub kek: Arc<dyn KeyEncryptionKey>,
    pub clients: Arc<Authenticator<()>>,
    port: ReservedPort,
    tls: Option<Arc<Tls>>,
    serving: Option<Serving>,
}

struct Serving {
    stop: CancellationToken,
    served: JoinHandle<Drained>,
}

impl Manager {
    /// With the keysets `default` and `second`, serving.
    pub async fn start() -> Self {
        let mut manager = Self::over(Arc::new(MemoryStore::new()), Arc::new(SystemClock)).await;
        manager.serve();
        manager
    }

    /// The same over a store and by a clock, not serving yet.
    pub async fn over(store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        let kek: Arc<dyn KeyEncryptionKey> = Arc::new(FileKey::ephemeral());
        let (relay, clients) = (relay(store, &clock), authenticator(&clock));
        let make = async || Ok(kek.clone());
        let ledger = Ledger::initialise(relay.clone(), SealEvidence::Unknown, make, at(0)).await.unwrap();
        let keysets = [name("default"), name("second")];
        let registered = keysets.clone().map(|keyset| (keyset, ISSUER.to_owned()));
        for registration in ledger.register(&registered, at(0)).await.unwrap() {
            let keyring = keyring(&registration.name, &registration.lineage);
            ledger.save(None, &keyring).await.unwrap();
        }
        ledger.created(&keysets).await.unwrap();
        Manager { relay, ledger, kek, clients, port: ReservedPort::any(), tls: None, serving: None }
    }

    /// Another one of the same installation, through its own way to the store; has read nothing but the installation.
    pub async fn beside(&self, store: Arc<dyn Store>, clock: Arc<dyn Clock>) -> Self {
        let relay = relay(store, &clock);
        let ledger = Ledger::open(relay.clone(), std::slice::from_ref(&self.kek)).await.unwrap();
        let (kek, clients) = (self.kek.clone(), authenticator(&clock));
        Manager { relay, ledger, kek, clients, port: ReservedPort::any(), tls: None, serving: None }
    }

    /// With a certificate for `localhost`, whose files are made in `folder`: the certificate in `ca.crt`.
    pub fn with_tls(mut self, folder: &Path) -> Self {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (cert_file, key_file) = (folder.join("ca.crt"), folder.join("tls.key"));
        std::fs::write(&cert_file, cert.pem()).unwrap();
        std::fs::write(&key_file, signing_key.serialize_pem()).unwrap();
        let files = TlsFiles { cert_file, key_file, clients: ClientCertificates::None };
        self.tls = Some(Tls::load(&files).unwrap());
        self
    }

    pub fn serve(&mut self) {
        let address = format!("127.0.0.1:{}", self.port.number()).parse().unwrap();
        let bound = BoundListener::bind(&ListenAddress::Tcp(address)).unwrap();
        let stop = CancellationToken::new();
        let state =
            ReplicationState { relay: self.relay.clone(), clients: self.clients.clone(), stopping: stop.clone() };
        let hosts = HostPolicy::new(bound.local_addr(), []).unwrap();
        let options = ListenerOptions {
            tls: self.tls.clone(),
            max_connections: MOST_CONNECTIONS,
            body_limit: LONGEST_REPORT,
            ..ListenerOptions::new("replication")
        };
        let served = tokio::spawn(bound.serve(guard_host(router(state), Arc::new(hosts)), options, stop.clone()));
        self.serving = Some(Serving { stop, served });
    }

    /// As at SIGTERM.
    pub async fn stop(&mut self) -> Drained {
        let Serving { stop, served } = self.serving.take().unwrap();
        stop.cancel();
        tokio::time::timeout(PATIENCE, served).await.expect("the listener does not end").unwrap()
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port())
    }

    /// Writes the next generation of a keyring.
    pub async fn write(&self, keyset: &str) -> Loaded {
        let current = self.ledger.load(&name(keyset)).await.unwrap().unwrap();
        let mut next = (*current.keyring).clone();
        next.generation += 1;
        next.written_at = at(i64::try_from(next.generation).unwrap());
        self.ledger.save(Some(&current), &next).await.unwrap()
    }

    /// A signer of it.
    pub fn signer(&self) -> Arc<UpstreamStore> {
        signer_of(vec![self.url()])
    }
}

fn relay(store: Arc<dyn Store>, clock: &Arc<dyn Clock>) -> Arc<Relay> {
    Arc::new(Relay::new(store, Arc::new(TrustedClock::new(clock.clone(), Span::MINUTE))))
}

fn authenticator(clock: &Arc<dyn Clock>) -> Arc<Authenticator<()>> {
    let clock = clock.clone();
    Arc::new(Authenticator::new(tokens(TOKEN), move || clock.wall()))
}

pub fn tokens(secret: &str) -> TokenSet<()> {
    let mut tokens = TokenSet::default();
    tokens.insert(name("edge"), secret.as_bytes(), ()).unwrap();
    tokens
}

pub fn settings(urls: Vec<String>) -> UpstreamSettings {
    UpstreamSettings::new(urls, Token::Fixed(Secret::new(TOKEN.as_bytes()).unwrap()))
}

pub fn signer_of(urls: Vec<String>) -> Arc<UpstreamStore> {
    open(settings(urls))
}

pub fn open(settings: UpstreamSettings) -> Arc<UpstreamStore> {
    Arc::new(UpstreamStore::open(settings, Arc::new(SystemClock)).unwrap())
}

pub fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

pub fn document(keyset: &str) -> Document {
    Document::Keyring(name(keyset))
}

pub fn at(secs: i64) -> Timestamp {
    Timestamp::from_secs(1_795_514_400 + secs)
}

/// The first generation of a keyring, before its first key.
fn keyring(keyset: &Name, lineage: &str) -> Keyring {
    Keyring {
        keyset: keyset.clone(),
        lineage: lineage.to_owned(),
        generation: 1,
        written_at: at(0),
        policy: policy(),
        first: true,
        keys: Vec::new(),
        banned: Vec::new(),
        next_serial: 1,
        last_promotion_at: None,
        disabled_switch_at: None,
        hold: None,
        drained: false,
        confirmed_algorithm: None,
        floors: Vec::new(),
        born: None,
        supersedes: Vec::new(),
        journal: Journal::default(),
    }
}

fn policy() -> Policy {
    let base = crate::policy::policy("main", ISSUER);
    Policy {
        issuer: IssuerPolicy {
            max_age: Span::MINUTE,
            caches: vec![Span::MINUTE],
            discovery: Discovery::Minimal,
            ..base.issuer
        },
        rotation: RotationPolicy {
            schedule: Schedule::Every(Span::DAY),
            propagation: Span::HOUR,
            successors: 2,
            clock_skew: Span::MINUTE,
            staleness_limit: Span::HOUR,
            publish_lag: Span::MINUTE,
            ..base.rotation
        },
        tokens: TokenPolicy { max_ttl: Span::HOUR, ..base.tokens },
        ..base
    }
}
