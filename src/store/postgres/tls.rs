//! TLS to the server: rustls with aws-lc-rs, certificates and names always verified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::OnceCell;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::failure::Failure;

/// Makes connectors.
#[derive(Debug)]
pub(super) struct Tls {
    ca_file: Option<PathBuf>,
    /// Reading a few hundred files once is enough.
    system: OnceCell<Arc<RootCertStore>>,
}

impl Tls {
    pub(super) fn new(ca_file: Option<PathBuf>) -> Self {
        Tls { ca_file, system: OnceCell::new() }
    }

    /// A connector that trusts what `ca_file` holds now, or the system's authorities.
    pub(super) async fn connector(&self) -> Result<MakeRustlsConnect, Failure> {
        let roots = match &self.ca_file {
            Some(path) => {
                let path = path.clone();
                blocking(move || from_file(&path)).await?
            }
            None => self.system.get_or_try_init(|| blocking(from_system)).await?.clone(),
        };
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Failure::because("TLS cannot be set up", error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // PostgreSQL 17 wants it where TLS begins without being asked for; older ones do not look.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(MakeRustlsConnect::new(config))
    }
}

async fn blocking(
    read: impl FnOnce() -> Result<Arc<RootCertStore>, Failure> + Send + 'static,
) -> Result<Arc<RootCertStore>, Failure> {
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|_| Err(Failure::new("the process is ending")))
}

fn from_file(path: &Path) -> Result<Arc<RootCertStore>, Failure> {
    let shown = path.display();
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| Failure::because(format!("its ca_file {shown} cannot be read as PEM certificates"), error))?;
    for certificate in certificates {
        roots.add(certificate).map_err(|error| {
            Failure::because(format!("its ca_file {shown} holds a certificate that cannot be an authority"), error)
        })?;
    }
    if roots.is_empty() {
        return Err(Failure::new(format!("its ca_file {shown} holds no certificate")));
    }
    Ok(Arc::new(roots))
}

fn from_system() -> Result<Arc<RootCertStore>, Failure> {
    let mut roots = RootCertStore::empty();
    // What cannot be parsed is left out, as by every other program that uses the system's authorities.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(Failure::new(
            "the system has no list of authorities to verify the server with: install ca-certificates, or name the \
             server's authority in ca_file",
        ));
    }
    Ok(Arc::new(roots))
}
