//! Clients known by their certificates (mutual TLS): a certificate that the handshake verified, and to whom its names
//! belong.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, UnixTime};

use super::tls::{InUse, Tls, Validity};
use crate::config::San;
use crate::keyring::name::Name;
use crate::keyring::time::Timestamp;

/// A certificate with more names than this is nobody's: each request looks all of them up.
const MOST_NAMES: usize = 64;

/// The certificate that a client proved to own; in the extensions of its requests.
#[derive(Clone)]
pub struct ClientCertificate(Arc<Shown>);

struct Shown {
    /// Leaf first.
    chain: Vec<CertificateDer<'static>>,
    names: Vec<San>,
    validity: Validity,
    tls: Arc<Tls>,
    /// What it was last verified against (the fingerprint of the files), and whether it was accepted.
    verdict: Mutex<([u8; 32], bool)>,
}

impl ClientCertificate {
    /// From a chain that a handshake of `tls` has verified with `in_use`; `None` where it cannot be read.
    pub(super) fn of(chain: &[CertificateDer<'_>], tls: Arc<Tls>, in_use: &InUse) -> Option<Self> {
        let leaf = chain.first()?;
        let validity = Validity::of(leaf)?;
        let parsed = webpki::EndEntityCert::try_from(leaf).ok()?;
        let dns = parsed.valid_dns_names().map(|name| San::Dns(name.to_ascii_lowercase()));
        let names: Vec<San> =
            dns.chain(parsed.valid_uri_names().map(|name| San::Uri(name.to_owned()))).take(MOST_NAMES + 1).collect();
        let names = if names.len() > MOST_NAMES { Vec::new() } else { names };
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let verdict = Mutex::new((in_use.fingerprint, true));
        Some(ClientCertificate(Arc::new(Shown { chain, names, validity, tls, verdict })))
    }

    /// Its subject alternative names (DNS in lower case, and URI), as long as it is one that a handshake would accept: it
    /// may expire, and the authorities may change, while its connection lives on.
    pub fn names(&self, now: Timestamp) -> Option<&[San]> {
        (now < self.0.validity.until && self.is_acceptable(now)).then_some(self.0.names.as_slice())
    }

    /// Whether the authorities in use now vouch for it. They are asked once for each change of files.
    fn is_acceptable(&self, now: Timestamp) -> bool {
        let current = self.0.tls.current();
        let mut verdict = self.0.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        if verdict.0 != current.fingerprint {
            let now = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().unsigned_abs()));
            let (leaf, others) = (&self.0.chain[0], &self.0.chain[1..]);
            let accepted = current.clients.as_ref().is_some_and(|by| by.verify_client_cert(leaf, others, now).is_ok());
            *verdict = (current.fingerprint, accepted);
        }
        verdict.1
    }
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate").field("names", &self.0.names).finish_non_exhaustive()
    }
}

/// Whose names are whose at one time.
#[derive(Debug)]
pub struct CertificateSet<R> {
    by_name: HashMap<San, Arc<CertificateClient<R>>>,
}

/// A client that is known by its certificate.
#[derive(Debug)]
pub struct CertificateClient<R> {
    pub name: Name,
    pub role: R,
}

impl<R> Default for CertificateSet<R> {
    fn default() -> Self {
        CertificateSet { by_name: HashMap::new() }
    }
}

impl<R> CertificateSet<R> {
    pub fn insert(&mut self, name: Name, san: San, role: R) {
        self.by_name.insert(san, Arc::new(CertificateClient { name, role }));
    }

    /// The one client that one of `names` belongs to. A certificate that could be two clients' is neither's.
    fn find(&self, names: &[San]) -> Option<&Arc<CertificateClient<R>>> {
        let mut found = names.iter().filter_map(|name| self.by_name.get(name));
        let first = found.next()?;
        found.all(|other| other.name == first.name).then_some(first)
    }
}

/// Knows clients by the certificates they show; the set can be exchanged while running.
pub struct Certificates<R> {
    set: ArcSwap<CertificateSet<R>>,
    clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
}

impl<R> Certificates<R> {
    pub fn new(set: CertificateSet<R>, clock: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Certificates { set: ArcSwap::from_pointee(set), clock: Arc::new(clock) }
    }

    /// Replaces all clients, for requests that arrive from now on, on open connections too.
    pub fn replace(&self, set: CertificateSet<R>) {
        self.set.store(Arc::new(set));
    }

    /// Whose certificate it is.
    pub fn recognise(&self, shown: Option<&ClientCertificate>) -> Option<Arc<CertificateClient<R>>> {
        let names = shown?.names((self.clock)())?;
        self.set.load().find(names).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> CertificateSet<()> {
        let mut set = CertificateSet::default();
        let name = |text| Name::parse(text).unwrap();
        set.insert(name("orders"), San::Uri("spiffe://example.com/orders".to_owned()), ());
        set.insert(name("billing"), San::Dns("billing.internal".to_owned()), ());
        set
    }

    fn owner(names: &[San]) -> Option<String> {
        set().find(names).map(|client| client.name.to_string())
    }

    #[test]
    fn one_name_of_one_client_is_enough_and_those_of_two_are_none() {
        let orders = San::Uri("spiffe://example.com/orders".to_owned());
        let billing = San::Dns("billing.internal".to_owned());
        let other = San::Dns("other.internal".to_owned());
        assert_eq!(owner(&[other.clone(), orders.clone()]).as_deref(), Some("orders"));
        assert_eq!(owner(&[billing.clone(), billing.clone()]).as_deref(), Some("billing"));
        assert_eq!(owner(&[orders, billing]), None);
        assert_eq!(owner(&[other]), None);
        assert_eq!(owner(&[]), None);
    }

    #[test]
    fn a_name_of_another_kind_is_another_name() {
        assert_eq!(owner(&[San::Uri("billing.internal".to_owned())]), None);
        assert_eq!(owner(&[San::Dns("*.internal".to_owned())]), None);
    }
}
