//! TLS of a listener: certificate and key from PEM files, read again while running.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use x509_cert::der::Decode;
use zeroize::Zeroizing;

use crate::keyring::time::Timestamp;

/// Which files a listener's TLS is made of, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, followed by its intermediates.
    pub cert_file: PathBuf,
    /// Its private key: PKCS#8, SEC1 or PKCS#1.
    pub key_file: PathBuf,
    /// Whether clients show a certificate.
    pub clients: ClientCertificates,
}

/// What is asked of clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Nothing.
    None,
    /// A certificate under this CA if they have one; who has none is told apart by [`ClientCertificate`](super::certificate::ClientCertificate) being absent.
    Optional(PathBuf),
    /// A certificate under this CA, or the handshake fails.
    Required(PathBuf),
}

/// A listener's TLS; handshakes use the last files that were valid.
pub struct Tls {
    current: ArcSwap<InUse>,
}

/// What handshakes use.
pub(super) struct InUse {
    pub(super) config: Arc<ServerConfig>,
    /// The server's own certificate.
    leaf: CertificateDer<'static>,
    validity: Validity,
    /// Who decides about the certificates of clients; `None`: none is asked for.
    pub(super) clients: Option<Arc<dyn ClientCertVerifier>>,
    /// SHA-256 of what all this was made of.
    pub(super) fingerprint: [u8; 32],
}

/// TLS files that were read and fit each other, not yet in use.
pub struct PreparedTls {
    in_use: Arc<InUse>,
}

/// From when until when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    pub from: Timestamp,
    pub until: Timestamp,
}

/// How a certificate stands at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Good,
    /// Less than a tenth of its life is left.
    Ending,
    Over,
    NotBegun,
}

impl Validity {
    /// `None` where the certificate cannot be read.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = x509_cert::Certificate::from_der(certificate).ok()?;
        let validity = parsed.tbs_certificate.validity;
        let at =
            |time: x509_cert::time::Time| i64::try_from(time.to_unix_duration().as_secs()).map(Timestamp::from_secs);
        Some(Validity { from: at(validity.not_before).ok()?, until: at(validity.not_after).ok()? })
    }

    pub fn standing(&self, now: Timestamp) -> Standing {
        if now < self.from {
            Standing::NotBegun
        } else if self.until <= now {
            Standing::Over
        } else if self.until.since(now).as_secs() < self.until.since(self.from).as_secs() / 10 {
            Standing::Ending
        } else {
            Standing::Good
        }
    }

    /// What is wrong with a certificate that nobody accepts at `now`, and what to do.
    pub fn refusal(&self, now: Timestamp) -> Option<String> {
        match self.standing(now) {
            Standing::Over => Some(format!("the certificate expired at {}: renew it", self.until)),
            Standing::NotBegun => Some(format!(
                "the certificate is not valid before {}: compare the clocks of this machine and of whoever issued it",
                self.from
            )),
            Standing::Good | Standing::Ending => None,
        }
    }
}

impl Tls {
    /// Reads and checks the files: the key must fit the certificate.
    pub fn load(files: &TlsFiles) -> Result<Arc<Self>, TlsError> {
        let PreparedTls { in_use } = Self::prepare(files)?;
        Ok(Arc::new(Tls { current: ArcSwap::new(in_use) }))
    }

    /// Reads files and checks them, for [`replace`](Self::replace).
    pub fn prepare(files: &TlsFiles) -> Result<PreparedTls, TlsError> {
        Ok(PreparedTls { in_use: Arc::new(Contents::read(files)?.in_use(files)?) })
    }

    /// New connections use these files from now on, and certificates that clients of open ones showed must be acceptable to
    /// them too; `true` if they are others than before.
    pub fn replace(&self, prepared: PreparedTls) -> bool {
        let other = prepared.differs_from(self);
        if other {
            self.current.store(prepared.in_use);
        }
        other
    }

    /// Whether the certificate in use is one for `host`, a name or an address.
    pub fn is_for(&self, host: &str) -> bool {
        let Ok(name) = ServerName::try_from(host) else { return false };
        let current = self.current.load();
        let leaf = webpki::EndEntityCert::try_from(&current.leaf);
        leaf.is_ok_and(|leaf| leaf.verify_is_valid_for_subject_name(&name).is_ok())
    }

    /// When the certificate in use is valid.
    pub fn validity(&self) -> Validity {
        self.current.load().validity
    }

    pub(super) fn current(&self) -> Arc<InUse> {
        self.current.load_full()
    }
}

impl PreparedTls {
    /// Whether this was made of other files, or to ask other things of clients.
    pub fn differs_from(&self, tls: &Tls) -> bool {
        self.in_use.fingerprint != tls.current.load().fingerprint
    }

    /// When the certificate is valid.
    pub fn validity(&self) -> Validity {
        self.in_use.validity
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// Why TLS files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("reading {}; check that it exists and this process may read it", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is larger than {MOST_BYTES} bytes, which no certificate is; check the path", .path.display())]
    TooLarge { path: PathBuf },
    #[error("{} holds no {what} in PEM form; it must contain `-----BEGIN …`", .path.display())]
    Missing { path: PathBuf, what: &'static str },
    #[error("{} is not valid PEM", .path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{} and {} do not serve TLS; the key must be that of the first certificate", .cert.display(), .key.display())]
    Pair { cert: PathBuf, key: PathBuf, source: rustls::Error },
    #[error("the first certificate of {} is malformed; ask for another one", .path.display())]
    Malformed { path: PathBuf },
    #[error("{} cannot verify client certificates; it must hold CA certificates", .path.display())]
    ClientCa { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
}

/// The most bytes of one file.
const MOST_BYTES: u64 = 1024 * 1024;

struct Contents {
    certificates: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Zeroizing<Vec<u8>>,
}

impl Contents {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        Ok(Contents {
            certificates: read(&files.cert_file)?,
            key: read(&files.key_file)?,
            client_ca: match &files.clients {
                ClientCertificates::None => Zeroizing::default(),
                ClientCertificates::Optional(path) | ClientCertificates::Required(path) => read(path)?,
            },
        })
    }

    fn fingerprint(&self, files: &TlsFiles) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update([match files.clients {
            ClientCertificates::None => 0,
            ClientCertificates::Optional(_) => 1,
            ClientCertificates::Required(_) => 2,
        }]);
        for part in [&self.certificates, &self.key, &self.client_ca] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part.as_slice());
        }
        hash.finalize().into()
    }

    fn in_use(&self, files: &TlsFiles) -> Result<InUse, TlsError> {
        let chain = certificates(&files.cert_file, &self.certificates)?;
        let leaf = chain[0].clone();
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|source| match source {
            pem::Error::NoItemsFound => TlsError::Missing { path: files.key_file.clone(), what: "private key" },
            source => TlsError::Pem { path: files.key_file.clone(), source },
        })?;
        let pair = |source| TlsError::Pair { cert: files.cert_file.clone(), key: files.key_file.clone(), source };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let clients = self.client_verifier(files)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(pair)?
            .with_client_cert_verifier(clients.clone().unwrap_or_else(WebPkiClientVerifier::no_client_auth))
            .with_single_cert(chain, key)
            .map_err(pair)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        if clients.is_some() {
            // A resumed session brings its certificate along unverified: each connection proves anew who it is.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        let malformed = || TlsError::Malformed { path: files.cert_file.clone() };
        let validity = Validity::of(&leaf).ok_or_else(malformed)?;
        Ok(InUse { config: Arc::new(config), leaf, validity, clients, fingerprint: self.fingerprint(files) })
    }

    fn client_verifier(&self, files: &TlsFiles) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
        let (path, required) = match &files.clients {
            ClientCertificates::None => return Ok(None),
            ClientCertificates::Optional(path) => (path, false),
            ClientCertificates::Required(path) => (path, true),
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path, &self.client_ca)? {
            let wrong = |source: rustls::Error| TlsError::ClientCa { path: path.clone(), source: source.into() };
            roots.add(certificate).map_err(wrong)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let builder = if required { builder } else { builder.allow_unauthenticated() };
        let built = builder.build().map_err(|source| TlsError::ClientCa { path: path.clone(), source: source.into() });
        Ok(Some(built?))
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut contents = Zeroizing::new(Vec::new());
    file.take(MOST_BYTES + 1).read_to_end(&mut contents).map_err(failed)?;
    if contents.len() as u64 > MOST_BYTES {
        return Err(TlsError::TooLarge { path: path.to_owned() });
    }
    Ok(contents)
}

fn certificates(path: &Path, contents: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(contents).collect();
    let certificates = parsed.map_err(|source| TlsError::Pem { path: path.to_owned(), source })?;
    if certificates.is_empty() {
        return Err(TlsError::Missing { path: path.to_owned(), what: "certificate" });
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write_pair(folder: &Path, cert: &str, key: &str) {
        let pair = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        std::fs::write(folder.join(cert), pair.cert.pem()).unwrap();
        std::fs::write(folder.join(key), pair.signing_key.serialize_pem()).unwrap();
    }

    fn files(folder: &Path) -> TlsFiles {
        TlsFiles {
            cert_file: folder.join("tls.crt"),
            key_file: folder.join("tls.key"),
            clients: ClientCertificates::None,
        }
    }

    #[test]
    fn a_bad_replacement_keeps_the_old_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        write_pair(folder.path(), "tls.crt", "tls.key");
        let tls = Tls::load(&files).unwrap();
        let first = tls.current();
        let reload = || Tls::prepare(&files).map(|prepared| tls.replace(prepared));
        assert!(!reload().unwrap(), "an unchanged file counts as a change");

        write_pair(folder.path(), "tls.crt", "unused.key");
        assert!(matches!(reload(), Err(TlsError::Pair { .. })));
        std::fs::write(&files.cert_file, "not PEM").unwrap();
        assert!(matches!(reload(), Err(TlsError::Missing { what: "certificate", .. })));
        std::fs::remove_file(&files.cert_file).unwrap();
        assert!(matches!(reload(), Err(TlsError::Read { .. })));
        assert!(Arc::ptr_eq(&first, &tls.current()));

        write_pair(folder.path(), "tls.crt", "tls.key");
        assert!(reload().unwrap());
        assert!(!Arc::ptr_eq(&first, &tls.current()));
    }

    #[test]
    fn a_certificate_is_for_the_names_and_addresses_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["admin.example.com", "*.pods.example.com", "10.0.0.7"].map(str::to_owned);
        let pair = rcgen::generate_simple_self_signed(names.to_vec()).unwrap();
        std::fs::write(folder.path().join("tls.crt"), pair.cert.pem()).unwrap();
        std::fs::write(folder.path().join("tls.key"), pair.signing_key.serialize_pem()).unwrap();
        let tls = Tls::load(&files(folder.path())).unwrap();
        for host in ["admin.example.com", "a.pods.example.com", "10.0.0.7"] {
            assert!(tls.is_for(host), "{host}");
        }
        for host in ["evil.example.com", "example.com", "10.0.0.8", "a b", ""] {
            assert!(!tls.is_for(host), "{host}");
        }
    }

    #[test]
    fn what_is_wrong_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        write_pair(folder.path(), "tls.crt", "tls.key");
        std::fs::write(&files.key_file, "").unwrap();
        let message = Tls::load(&files).unwrap_err().to_string();
        assert!(message.contains("tls.key") && message.contains("private key"), "{message}");
        let huge = std::fs::File::create(&files.key_file).unwrap();
        huge.set_len(MOST_BYTES + 1).unwrap();
        assert!(matches!(Tls::load(&files), Err(TlsError::TooLarge { .. })));
    }
}
