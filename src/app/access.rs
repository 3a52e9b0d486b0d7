//! Who may ask: tokens and clients from configuration and files, exchanged when these change.

use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine as _;

use crate::config::{ClientCredential, Config, Kubernetes, NoticeSecretError, Role, Secret, SecretError, SecretSource};
use crate::engine::Engine;
use crate::engine::notices::WebhookError;
use crate::http::auth::{Authenticator, TokenError, TokenSet};
use crate::http::certificate::{CertificateSet, Certificates};
use crate::http::clients::{ClientSet, Clients, Grant};
use crate::kubernetes::ServiceAccounts;

/// Why credentials could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    #[error("{key}")]
    Secret { key: String, source: SecretError },
    #[error("{key}")]
    Token { key: String, source: TokenError },
    #[error("{key}")]
    Notice { key: String, source: NoticeSecretError },
    #[error("{key}")]
    Webhook { key: String, source: WebhookError },
    #[error("the admin token {} cannot be made", .path.display())]
    Create { path: PathBuf, source: std::io::Error },
}

/// The credentials in force.
pub(super) struct Access {
    pub admins: Arc<Authenticator<Role>>,
    pub operators: Arc<Certificates<Role>>,
    pub service_accounts: Arc<ServiceAccounts>,
    pub clients: Arc<Clients>,
    pub replicas: Arc<Authenticator<()>>,
    environment: Environment,
}

/// Looks up a variable that holds a token.
pub(super) type Environment = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// The variables of this process.
pub(super) fn process_environment() -> Environment {
    Arc::new(|name| std::env::var(name).ok())
}

/// Credentials read from configuration and files, not yet in force.
pub(super) struct Credentials {
    admins: TokenSet<Role>,
    operators: CertificateSet<Role>,
    clients: ClientSet,
    /// Where some client has a service account.
    kubernetes: Option<Kubernetes>,
    replicas: TokenSet<()>,
}

impl Access {
    pub fn new(engine: &Arc<Engine>, config: &Config, environment: Environment) -> Result<Self, AccessError> {
        let Credentials { admins, operators, clients, kubernetes, replicas } = Credentials::read(config, &environment)?;
        let now = |engine: &Arc<Engine>| {
            let engine = engine.clone();
            move || engine.clock.now()
        };
        let service_accounts = ServiceAccounts::new(engine.clock.clone(), engine.metrics.clone(), kubernetes);
        let service_accounts = Arc::new(service_accounts);
        Ok(Access {
            admins: Arc::new(Authenticator::new(admins, now(engine))),
            operators: Arc::new(Certificates::new(operators, now(engine))),
            clients: Arc::new(Clients::new(engine.clone(), clients, service_accounts.clone())),
            service_accounts,
            replicas: Arc::new(Authenticator::new(replicas, now(engine))),
            environment,
        })
    }

    /// Reads what `config` names, without taking it.
    pub fn read(&self, config: &Config) -> Result<Credentials, AccessError> {
        Credentials::read(config, &self.environment)
    }

    /// Puts credentials in force. `same_listener`: the signer listens where this configuration says; only then may a
    /// configuration without clients open it to whoever reaches it.
    pub fn replace(&self, credentials: Credentials, same_listener: bool) {
        let Credentials { admins, operators, mut clients, kubernetes, replicas } = credentials;
        clients.others.open &= same_listener;
        self.admins.replace(admins);
        self.operators.replace(operators);
        self.replicas.replace(replicas);
        self.service_accounts.configure(kubernetes);
        self.clients.replace(clients);
    }
}

impl Credentials {
    /// Reads every token file. Nothing is half taken: one that cannot be read fails all.
    fn read(config: &Config, environment: &Environment) -> Result<Self, AccessError> {
        let mut admins = TokenSet::default();
        for token in config.admin.iter().flat_map(|admin| &admin.tokens) {
            let key = format!("admin.token.{}", token.name);
            let secret = read_secret(&key, "file", &token.source, environment)?;
            let added = admins.insert(token.name.clone(), secret.expose(), token.role);
            added.map_err(|source| AccessError::Token { key, source })?;
        }
        let mut operators = CertificateSet::default();
        for client in config.admin.iter().flat_map(|admin| &admin.clients) {
            operators.insert(client.name.clone(), client.san.clone(), client.role);
        }
        let mut replicas = TokenSet::default();
        for client in config.replication.iter().flat_map(|replication| &replication.clients) {
            let key = format!("replication.client.{}", client.name);
            let secret = read_secret(&key, "token_file", &client.token, environment)?;
            let added = replicas.insert(client.name.clone(), secret.expose(), ());
            added.map_err(|source| AccessError::Token { key, source })?;
        }
        let mut clients = ClientSet::default();
        let configured = config.signer.as_ref().map(|signer| signer.clients.as_slice()).unwrap_or_default();
        for client in configured {
            let grant = Grant { keysets: client.keysets.clone(), audiences: client.audiences.clone() };
            match &client.credential {
                ClientCredential::TokenFile(path) => {
                    let key = format!("signer.client.{}.token_file", client.name);
                    let secret = read_file(&key, path)?;
                    let added = clients.tokens.insert(client.name.clone(), secret.expose(), grant);
                    added.map_err(|source| AccessError::Token { key, source })?;
                }
                ClientCredential::Uid(uid) => {
                    clients.others.uids.insert(*uid, (client.name.clone(), grant));
                }
                ClientCredential::San(san) => clients.certificates.insert(client.name.clone(), san.clone(), grant),
                ClientCredential::ServiceAccount(account) => {
                    clients.others.service_accounts.insert(account.clone(), (client.name.clone(), grant));
                }
            }
        }
        clients.others.open = config.signer.is_some() && configured.is_empty();
        let kubernetes = (!clients.others.service_accounts.is_empty()).then(|| config.kubernetes.clone());
        Ok(Credentials { admins, operators, clients, kubernetes, replicas })
    }
}

/// The secret of the table `key`, whose file `member` names.
pub(super) fn read_secret(
    key: &str,
    member: &str,
    source: &SecretSource,
    environment: &Environment,
) -> Result<Secret, AccessError> {
    match source {
        SecretSource::File(path) => read_file(&format!("{key}.{member}"), path),
        SecretSource::Environment(name) => Secret::from_env(name, environment(name))
            .map_err(|source| AccessError::Secret { key: key.to_owned(), source }),
    }
}

fn read_file(key: &str, path: &std::path::Path) -> Result<Secret, AccessError> {
    let read = Secret::read_file(path).map_err(|source| AccessError::Secret { key: key.to_owned(), source })?;
    for warning in &read.warnings {
        tracing::warn!(key, "{warning}");
    }
    Ok(read.secret)
}

/// 256 random bits, base64url.
pub fn fresh_token() -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(crate::random::bytes::<32>())
}
