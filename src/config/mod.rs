//! The configuration: one file (TOML or JSON) and the environment, read into a [`Config`] that is valid by construction.
//!
//! Everything wrong with it is reported at once, each with its config path. Two kinds are told apart: *problems* (unknown
//! keys, wrong types, listeners, security rules, …), with which no daemon runs, and *timing findings* (`keyring::timing`),
//! which `check` and new keysets refuse, but with which a keyset that has a keyring only runs degraded.

mod env;
mod files;
mod identity;
mod load;
mod notice;
mod problem;
mod publisher;
mod raw;
mod restart;
mod secret;
mod store;
mod telemetry;
mod validate;
mod value;
mod watch;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::keyring::name::Name;
use crate::keyring::policy::{IssuerPolicy, Policy};
use crate::keyring::time::Span;

pub use env::PREFIX as ENVIRONMENT_PREFIX;
pub use files::{FileReport, examine_files};
pub use identity::{Kubernetes, San, ServiceAccount};
pub use load::{ConfigErrors, EMBEDDED, Invalid, Loaded, SEARCHED, Source, load};
pub use notice::{NoticeSecretError, NoticeSecrets, Receiver};
pub use problem::Problem;
pub use publisher::{Publisher, PublisherKind};
pub use raw::{KnownKey, known_keys};
pub use restart::{restart_first, restart_needed};
pub use secret::{LONGEST_SECRET, Secret, SecretError, SecretFile, SecretProblem};
pub use store::{Initialise, Postgres, Store, StoreKind, Upstream};
pub use telemetry::{AccessLog, Share, Telemetry, Traces};
pub use value::Format;
pub use watch::{ContentDigest, POLL_INTERVAL, Watch};

/// What one daemon is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub role: ProcessRole,
    /// Verifiers: key sets and discovery; `None`, which only a signer may have: off.
    pub public: Option<Listener>,
    /// Applications; `None`: off.
    pub signer: Option<Signer>,
    /// Operators; `None`: off.
    pub admin: Option<Admin>,
    /// Liveness, readiness, metrics; `None`: off.
    pub ops: Option<Listener>,
    /// Signers without access to the store; `None`: off.
    pub replication: Option<Replication>,
    /// How service accounts of signer clients are verified.
    pub kubernetes: Kubernetes,
    pub store: Store,
    pub seal: Seal,
    /// In the order of the file; none for a signer, which goes by what is stored.
    pub issuers: Vec<IssuerPolicy>,
    /// In the order of the file, which the published key sets follow; none for a signer, which goes by what is stored.
    pub keysets: Vec<Keyset>,
    /// In the order of the file.
    pub publishers: Vec<Publisher>,
    /// How AWS KMS is reached; used only by keysets, keyrings or a seal that need it.
    pub aws_kms: AwsKms,
    /// Who is told what becomes of keys, in the order of the file; none for a signer.
    pub notices: Vec<Receiver>,
    pub log: Log,
    pub telemetry: Telemetry,
    /// How long to go on serving, unready, after SIGTERM.
    pub shutdown_delay: Span,
}

/// What this process does among the replicas of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ProcessRole {
    /// Manages, publishes and signs.
    #[default]
    All,
    /// Makes and rotates keys and publishes; signs nothing for applications.
    Manager,
    /// Signs, and publishes, by what managers stored; changes nothing.
    Signer,
}

/// A keyset and all that is to hold for it, defaults included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyset {
    pub name: Name,
    pub policy: Arc<Policy>,
}

/// Where to listen, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: Address,
    /// `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix {
        path: PathBuf,
        /// Permission bits of the socket, whatever the umask.
        mode: u32,
    },
}

/// PEM files of a listener's certificate chain and its key; re-read when their content changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// Who vouches for clients that show a certificate; `None`: none is asked for.
    pub client_ca_file: Option<PathBuf>,
}

/// The listener for applications.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    pub listener: Listener,
    /// How long one signature may take, retries included.
    pub sign_deadline: Span,
    /// Empty: whoever reaches the (loopback) address or socket may sign.
    pub clients: Vec<SignerClient>,
}

/// An application that may sign.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignerClient {
    pub name: Name,
    pub credential: ClientCredential,
    /// `None`: every keyset.
    pub keysets: Option<Vec<Name>>,
    /// `None`: every audience its keysets allow.
    pub audiences: Option<Vec<String>>,
}

/// How a signer client proves who it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ClientCredential {
    /// The bearer token in this file.
    TokenFile(PathBuf),
    /// The user ID of the process at the other end of a Unix socket.
    Uid(u32),
    /// A certificate with this name, under the listener's client CA.
    San(San),
    /// A token of the cluster for this service account.
    ServiceAccount(ServiceAccount),
}

/// The listener for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    pub listener: Listener,
    /// At least one, or one of `clients`.
    pub tokens: Vec<AdminToken>,
    /// Those who show a certificate.
    pub clients: Vec<AdminClient>,
    /// Whether the page for people is served.
    pub page: bool,
}

/// An operator who is known by a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminClient {
    /// Who acts, in the audit log.
    pub name: Name,
    pub role: Role,
    pub san: San,
}

/// A bearer token of the admin listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminToken {
    /// Who acts, in the audit log.
    pub name: Name,
    pub role: Role,
    pub source: SecretSource,
}

/// What somebody on the admin listener may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads and changes.
    Operator,
}

/// The listener for signers that have no access to the store: it serves sealed records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    pub listener: Listener,
    /// At least one.
    pub clients: Vec<ReplicationClient>,
}

/// A signer, or several with one token, that may read sealed records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicationClient {
    pub name: Name,
    pub token: SecretSource,
}

/// Where a secret is to be found.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SecretSource {
    File(PathBuf),
    /// The name of an environment variable.
    Environment(String),
}

/// The key-encryption keys of kind `file`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seal {
    /// The key that seals.
    pub key: SealKey,
    /// Keys that only unseal, until everything is resealed.
    pub previous: Vec<PreviousSeal>,
}

/// Where a key-encryption key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SealKey {
    File {
        path: PathBuf,
    },
    /// A symmetric key in AWS KMS: its ARN, its ID, or an alias.
    AwsKms {
        key_id: String,
    },
}

/// A key-encryption key on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviousSeal {
    pub name: Name,
    pub key: SealKey,
}

impl Seal {
    /// Every key-encryption key with the path of its table, the one that seals first.
    pub fn keys(&self) -> impl Iterator<Item = (String, &SealKey)> {
        let previous = self.previous.iter().map(|seal| (format!("seal.previous.{}", seal.name), &seal.key));
        std::iter::once(("seal".to_owned(), &self.key)).chain(previous)
    }
}

impl fmt::Display for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SealKey::File { path } => write!(f, "{}", path.display()),
            SealKey::AwsKms { key_id } => write!(f, "aws-kms:{key_id}"),
        }
    }
}

/// How AWS KMS is reached and used, by the backend and the seal of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsKms {
    /// `None`: as the AWS environment or profile says.
    pub region: Option<String>,
    /// `None`: the service's own for the region, or as the AWS environment says.
    pub endpoint_url: Option<String>,
    /// How long one attempt at a signature may take; `sign_deadline` covers them all.
    pub attempt_timeout: Span,
    /// Signatures under way at once, over all keysets.
    pub concurrency: u32,
    /// Days from the retirement of a key to its deletion, 7 to 30: how long a mistake can be undone.
    pub deletion_window_days: u8,
    /// How old a key of ours without alias, left over by a crash, must be to be deleted.
    pub cleanup_after: Span,
}

/// How to log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    pub level: LogLevel,
    /// One line per signature: time, jti, keyset, kid and client; no claims.
    pub signatures: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl Config {
    /// The listeners that are on, with the name of their table.
    pub fn listeners(&self) -> impl Iterator<Item = (&'static str, &Listener)> {
        let signer = self.signer.as_ref().map(|signer| ("signer", &signer.listener));
        let admin = self.admin.as_ref().map(|admin| ("admin", &admin.listener));
        let ops = self.ops.as_ref().map(|ops| ("ops", ops));
        let public = self.public.as_ref().map(|public| ("public", public));
        let replication = self.replication.as_ref().map(|replication| ("replication", &replication.listener));
        [public, signer, admin, ops, replication].into_iter().flatten()
    }

    /// The keyset of that name.
    pub fn keyset(&self, name: &str) -> Option<&Keyset> {
        self.keysets.iter().find(|keyset| keyset.name.as_str() == name)
    }

    /// Whether everybody on the listener of this table proves who they are by a certificate, and nobody in another way.
    pub fn needs_certificates(&self, table: &str) -> bool {
        match table {
            "signer" => self.signer.iter().flat_map(|signer| &signer.clients).all(SignerClient::shows_certificate),
            "admin" => self.admin.iter().all(|admin| admin.tokens.is_empty()),
            _ => false,
        }
    }

    /// The files whose content is re-read when it changes: tokens and certificates, not the configuration itself.
    pub fn reloadable_files(&self) -> Vec<PathBuf> {
        let tls = self.listeners().filter_map(|(_, listener)| listener.tls.as_ref());
        let mut files: Vec<PathBuf> = tls
            .flat_map(|tls| [Some(tls.cert_file.clone()), Some(tls.key_file.clone()), tls.client_ca_file.clone()])
            .flatten()
            .collect();
        files.extend(self.signer.iter().flat_map(|signer| &signer.clients).filter_map(SignerClient::token_file));
        let admins = self.admin.iter().flat_map(|admin| &admin.tokens).map(|token| &token.source);
        let replicas = self.replication.iter().flat_map(|listener| &listener.clients).map(|client| &client.token);
        files.extend(admins.chain(replicas).filter_map(SecretSource::file).cloned());
        let receivers = self.notices.iter();
        files.extend(receivers.flat_map(|to| to.secret.file().into_iter().chain(&to.ca_file)).cloned());
        files.sort();
        files.dedup();
        files
    }
}

impl SignerClient {
    fn shows_certificate(&self) -> bool {
        matches!(self.credential, ClientCredential::San(_))
    }

    fn token_file(&self) -> Option<PathBuf> {
        match &self.credential {
            ClientCredential::TokenFile(path) => Some(path.clone()),
            ClientCredential::Uid(_) | ClientCredential::San(_) | ClientCredential::ServiceAccount(_) => None,
        }
    }
}

impl SecretSource {
    /// The file, if it is one.
    pub fn file(&self) -> Option<&PathBuf> {
        match self {
            SecretSource::File(path) => Some(path),
            SecretSource::Environment(_) => None,
        }
    }
}

/// `file /run/secrets/token`, `variable ADMIN_TOKEN`.
impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretSource::File(path) => write!(f, "file {}", path.display()),
            SecretSource::Environment(name) => write!(f, "variable {name}"),
        }
    }
}

impl ProcessRole {
    /// As in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            ProcessRole::All => "all",
            ProcessRole::Manager => "manager",
            ProcessRole::Signer => "signer",
        }
    }
}

impl fmt::Display for ProcessRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Address {
    /// Whether only processes on this machine can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Address::Unix { .. } => true,
        }
    }
}

/// As in the configuration: `127.0.0.1:8620`, `unix:/run/jwksd/signer.sock`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => address.fmt(f),
            Address::Unix { path, .. } => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Role {
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl LogLevel {
    /// As `tracing` writes it in filters.
    pub const fn as_str(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// Whether an address belongs to one network segment (RFC 3927, RFC 4291 §2.5.6), where clouds keep the credentials of
/// machines, or is one that they use for it elsewhere.
pub fn is_link_local(address: std::net::IpAddr) -> bool {
    match address.to_canonical() {
        std::net::IpAddr::V4(address) => address.is_link_local(),
        // fd00:ec2::/32 is where AWS serves instance metadata.
        std::net::IpAddr::V6(address) => address.is_unicast_link_local() || address.segments()[..2] == [0xfd00, 0x0ec2],
    }
}
