//! TLS of the command line: whose certificate is accepted, and which one is shown.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::ClientBuilder;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use zeroize::Zeroizing;

use super::{Failure, Global};

/// What a connection goes by.
#[derive(Default)]
pub(super) struct Trust {
    /// The authorities to trust; `None`: the system's.
    pub ca_file: Option<PathBuf>,
    /// The certificate of the daemon itself, as its configuration names it: it is accepted whatever its names are. Commands
    /// on the daemon's own machine connect to its address, which hardly any certificate names.
    pub known: Option<PathBuf>,
    /// Certificate and key to show.
    pub own: Option<(PathBuf, PathBuf)>,
}

impl Trust {
    /// As the arguments say; `known` only where they name no authority.
    pub fn of(global: &Global, known: Option<PathBuf>) -> Self {
        let ca_file = global.ca_file.clone();
        Trust {
            known: known.filter(|_| ca_file.is_none()),
            ca_file,
            own: global.client_cert.clone().zip(global.client_key.clone()),
        }
    }

    pub fn apply(&self, builder: ClientBuilder) -> Result<ClientBuilder, Failure> {
        let leaf = self.known.as_deref().and_then(|path| CertificateDer::from_pem_file(path).ok());
        if let Some(leaf) = leaf {
            return Ok(builder.tls_backend_preconfigured(self.knowing(leaf)?));
        }
        let builder = match &self.ca_file {
            Some(path) => builder.add_root_certificate(authority(path)?),
            None => builder,
        };
        match &self.own {
            Some((cert, key)) => Ok(builder.identity(identity(cert, key)?)),
            None => Ok(builder),
        }
    }

    fn knowing(&self, leaf: CertificateDer<'static>) -> Result<ClientConfig, Failure> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let others = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().ok();
        let verifier = Arc::new(Known { leaf, others, provider: provider.clone() });
        let failed = |error: rustls::Error| Failure::Failed(format!("no TLS client can be made: {error}"));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let Some((cert, key)) = &self.own else { return Ok(builder.with_no_client_auth()) };
        let wrong = |path: &Path, error: &dyn std::fmt::Display| unusable(path, error);
        let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect);
        let chain = chain.map_err(|error| wrong(cert, &error))?;
        let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, &error))?;
        builder.with_client_auth_cert(chain, secret).map_err(|error| wrong(cert, &error))
    }
}

fn authority(path: &Path) -> Result<reqwest::Certificate, Failure> {
    let wrong = |error: &dyn std::fmt::Display| Failure::Usage(format!("--ca-file {}: {error}", path.display()));
    let pem = std::fs::read(path).map_err(|error| wrong(&error))?;
    reqwest::Certificate::from_pem(&pem).map_err(|error| wrong(&error))
}

fn identity(cert: &Path, key: &Path) -> Result<reqwest::Identity, Failure> {
    let read = |path: &Path| std::fs::read(path).map(Zeroizing::new).map_err(|error| unusable(path, &error));
    let (cert_pem, key_pem) = (read(cert)?, read(key)?);
    let both = Zeroizing::new([key_pem.as_slice(), b"\n", cert_pem.as_slice()].concat());
    reqwest::Identity::from_pem(&both).map_err(|error| unusable(cert, &error))
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    let what = "--client-cert and --client-key name the PEM files of a certificate and its private key";
    Failure::Usage(format!("{}: {error}; {what}", path.display()))
}

/// Accepts one certificate, and others as the system's authorities say.
#[derive(Debug)]
struct Known {
    leaf: CertificateDer<'static>,
    /// `None` where the system has no authorities.
    others: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *end_entity == self.leaf {
            return Ok(ServerCertVerified::assertion());
        }
        let others = self.others.as_ref().ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        others.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
