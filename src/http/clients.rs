//! Who may sign what: applications known by a token, a certificate, a Kubernetes service account or a Unix user.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::response::{IntoResponse, Response};
use http::HeaderMap;

use super::auth::{Authenticator, Source, TokenSet, bearer};
use super::certificate::{CertificateSet, Certificates, ClientCertificate};
use super::listener::Peer;
use super::problem::{Problem, ProblemType};
use crate::config::ServiceAccount;
use crate::engine::Engine;
use crate::keyring::name::Name;
use crate::kubernetes::{Rejection, ServiceAccounts};
use crate::telemetry::sieve::Sieve;

/// After so many seconds a client may find the cluster's keys fetched.
const RETRY_SECONDS: u64 = 2;

/// What a client may sign.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// `None`: every keyset.
    pub keysets: Option<Vec<Name>>,
    /// `None`: every audience its keysets allow.
    pub audiences: Option<Vec<String>>,
}

/// All clients at one time.
#[derive(Default)]
pub struct ClientSet {
    pub tokens: TokenSet<Grant>,
    pub certificates: CertificateSet<Grant>,
    pub others: OtherClients,
}

/// Those whom somebody else vouches for at each request.
#[derive(Default)]
pub struct OtherClients {
    pub uids: HashMap<u32, (Name, Grant)>,
    pub service_accounts: HashMap<ServiceAccount, (Name, Grant)>,
    /// There are no clients: whoever reaches the listener may sign everything.
    pub open: bool,
}

/// Who may sign what; can be exchanged while running.
pub struct Clients {
    engine: Arc<Engine>,
    tokens: Authenticator<Grant>,
    certificates: Certificates<Grant>,
    others: ArcSwap<OtherClients>,
    service_accounts: Arc<ServiceAccounts>,
    complaints: Sieve,
}

impl Clients {
    pub fn new(engine: Arc<Engine>, set: ClientSet, service_accounts: Arc<ServiceAccounts>) -> Self {
        let (clock, same_clock) = (engine.clone(), engine.clone());
        Clients {
            tokens: Authenticator::new(set.tokens, move || clock.clock.now()),
            certificates: Certificates::new(set.certificates, move || same_clock.clock.now()),
            others: ArcSwap::from_pointee(set.others),
            service_accounts,
            complaints: Sieve::default(),
            engine,
        }
    }

    /// Exchanges all clients, for requests that arrive from now on.
    pub fn replace(&self, set: ClientSet) {
        self.tokens.replace(set.tokens);
        self.certificates.replace(set.certificates);
        self.others.store(Arc::new(set.others));
    }

    /// The name and the grant of whoever asks. What a request itself brings along says more of who asks than its
    /// connection: a token comes before a certificate, and a certificate before the user.
    pub(super) async fn identify(
        &self,
        headers: &HeaderMap,
        peer: &Peer,
        certificate: Option<&ClientCertificate>,
    ) -> Result<(String, Grant), Response> {
        let others = self.others.load_full();
        if others.open {
            return Ok((peer.to_string(), Grant::default()));
        }
        if let Some(token) = self.tokens.recognise(headers) {
            return Ok((token.name.to_string(), token.role.clone()));
        }
        let of_pod = match self.service_account(&others, headers, peer).await {
            Ok((name, grant)) => return Ok((name.to_string(), grant.clone())),
            Err(rejection) => rejection,
        };
        if let Some(client) = self.certificates.recognise(certificate) {
            return Ok((client.name.to_string(), client.role.clone()));
        }
        if let Peer::Unix { uid, .. } = peer
            && let Some((name, grant)) = others.uids.get(uid)
        {
            return Ok((name.to_string(), grant.clone()));
        }
        if matches!(of_pod, Some(Rejection::NoKeys)) {
            return Err(Problem::new(ProblemType::ClusterKeysUnavailable).retry_after(RETRY_SECONDS).into_response());
        }
        match self.tokens.authenticate(headers, Source::from(peer)).await {
            Ok(token) => Ok((token.name.to_string(), token.role.clone())),
            Err(unauthorized) => Err(unauthorized.into_response()),
        }
    }

    /// The client of a pod's token, or what is wrong with it where it is one.
    async fn service_account<'a>(
        &self,
        others: &'a OtherClients,
        headers: &HeaderMap,
        peer: &Peer,
    ) -> Result<&'a (Name, Grant), Option<Rejection>> {
        if others.service_accounts.is_empty() {
            return Err(None);
        }
        // Other tokens are not worth looking into.
        let token = bearer(headers).and_then(|token| std::str::from_utf8(token).ok());
        let Some(token) = token.filter(|token| token.matches('.').count() == 2) else { return Err(None) };
        let rejection = match self.service_accounts.identify(token).await {
            Ok(account) => match others.service_accounts.get(&account) {
                Some(client) => return Ok(client),
                None => {
                    self.complain(peer, format_args!("no signer client has the service account {account}"));
                    return Err(None);
                }
            },
            Err(rejection) => rejection,
        };
        self.complain(peer, format_args!("{rejection}"));
        Err(Some(rejection))
    }

    /// Says why, now and then: whoever may connect can cause it.
    fn complain(&self, peer: &Peer, reason: std::fmt::Arguments<'_>) {
        if let Some(kept_back) = self.complaints.pass(self.engine.clock.clock().monotonic()) {
            tracing::warn!(%peer, %reason, kept_back, "a service account's token was refused");
        }
    }
}
