//! TLS of a listener: certificate and key from PEM files, read again while running.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

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
    /// A certificate under this CA if they have one; who has none is told apart by [`ClientCertificate`] being absent.
    Optional(PathBuf),
    /// A certificate under this CA, or the handshake fails.
    Required(PathBuf),
}

/// The subject alternative names (DNS and URI) of the certificate that a client proved to own; in the extensions of its
/// requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    pub names: Arc<[String]>,
}

impl ClientCertificate {
    /// From a certificate that the handshake has verified; `None` where it cannot be read.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
        let names = parsed.valid_dns_names().chain(parsed.valid_uri_names()).map(str::to_owned).collect();
        Some(ClientCertificate { names })
    }
}

/// A listener's TLS; handshakes use the last files that were valid.
pub struct Tls {
    current: ArcSwap<InUse>,
    /// SHA-256 of what `current` was made of.
    fingerprint: Mutex<[u8; 32]>,
}

struct InUse {
    config: Arc<ServerConfig>,
    /// The server's own certificate.
    leaf: CertificateDer<'static>,
}

/// TLS files that were read and fit each other, not yet in use.
pub struct PreparedTls {
    in_use: Arc<InUse>,
    fingerprint: [u8; 32],
}

impl Tls {
    /// Reads and checks the files: the key must fit the certificate.
    pub fn load(files: &TlsFiles) -> Result<Arc<Self>, TlsError> {
        let PreparedTls { in_use, fingerprint } = Self::prepare(files)?;
        Ok(Arc::new(Tls { current: ArcSwap::new(in_use), fingerprint: Mutex::new(fingerprint) }))
    }

    /// Reads files and checks them, for [`replace`](Self::replace).
    pub fn prepare(files: &TlsFiles) -> Result<PreparedTls, TlsError> {
        let contents = Contents::read(files)?;
        Ok(PreparedTls { in_use: Arc::new(contents.in_use(files)?), fingerprint: contents.fingerprint() })
    }

    /// New connections use these files from now on; `true` if they are others than before.
    pub fn replace(&self, prepared: PreparedTls) -> bool {
        let mut fingerprint = self.fingerprint.lock().unwrap_or_else(PoisonError::into_inner);
        if *fingerprint == prepared.fingerprint {
            return false;
        }
        self.current.store(prepared.in_use);
        *fingerprint = prepared.fingerprint;
        true
    }

    /// Whether the certificate in use is one for `host`, a name or an address.
    pub fn is_for(&self, host: &str) -> bool {
        let Ok(name) = ServerName::try_from(host) else { return false };
        let current = self.current.load();
        let leaf = webpki::EndEntityCert::try_from(&current.leaf);
        leaf.is_ok_and(|leaf| leaf.verify_is_valid_for_subject_name(&name).is_ok())
    }

    pub(super) fn current(&self) -> Arc<ServerConfig> {
        self.current.load().config.clone()
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

    fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
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
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(pair)?
            .with_client_cert_verifier(self.client_verifier(files)?)
            .with_single_cert(chain, key)
            .map_err(pair)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(InUse { config: Arc::new(config), leaf })
    }

    fn client_verifier(&self, files: &TlsFiles) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let (path, required) = match &files.clients {
            ClientCertificates::None => return Ok(WebPkiClientVerifier::no_client_auth()),
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
        builder.build().map_err(|source| TlsError::ClientCa { path: path.clone(), source: source.into() })
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
