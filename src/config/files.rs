//! What can be said about the files a configuration names without starting anything.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::problem::Problem;
use super::secret::{Secret, SecretError, SecretProblem, loose_mode};
use super::{ClientCredential, Config, NoticeSecrets, Receiver, SealKey, SecretSource, StoreKind};

/// Tokens shorter than this, in bytes, can be guessed.
const SHORTEST_TOKEN: usize = 16;

/// What is wrong with, and what is dubious about, the files.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FileReport {
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

/// Looks at the certificates, keys and tokens that `config` names. Those that `serve` or `jwksd init` would create (admin
/// tokens, the seal) may be absent.
pub fn examine_files(config: &Config) -> FileReport {
    let mut report = FileReport::default();
    for (table, listener) in config.listeners() {
        if let Some(tls) = &listener.tls {
            report.readable(format!("{table}.tls.cert_file"), &tls.cert_file);
            report.readable(format!("{table}.tls.key_file"), &tls.key_file);
            report.private(format!("{table}.tls.key_file"), &tls.key_file);
            if let Some(path) = &tls.client_ca_file {
                report.readable(format!("{table}.tls.client_ca_file"), path);
            }
        }
    }
    for client in config.signer.iter().flat_map(|signer| &signer.clients) {
        if let ClientCredential::TokenFile(path) = &client.credential {
            report.token(format!("signer.client.{}.token_file", client.name), path, false);
        }
    }
    let kubernetes = [("ca_file", &config.kubernetes.ca_file), ("token_file", &config.kubernetes.token_file)];
    for (key, path) in kubernetes.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?))) {
        report.readable(format!("kubernetes.{key}"), path);
    }
    for token in config.admin.iter().flat_map(|admin| &admin.tokens) {
        if let SecretSource::File(path) = &token.source {
            report.token(format!("admin.token.{}.file", token.name), path, true);
        }
    }
    for client in config.replication.iter().flat_map(|listener| &listener.clients) {
        if let SecretSource::File(path) = &client.token {
            report.token(format!("replication.client.{}.token_file", client.name), path, false);
        }
    }
    for receiver in &config.notices {
        report.notice(receiver);
    }
    report.store(&config.store.kind);
    for (table, key) in config.seal.keys() {
        let SealKey::File { path } = key else { continue };
        if table != "seal" {
            report.readable(format!("{table}.path"), path);
        }
        report.private(format!("{table}.path"), path);
    }
    report
}

impl FileReport {
    fn readable(&mut self, key: String, path: &Path) {
        let regular = File::open(path).and_then(|file| file.metadata()).map(|metadata| metadata.is_file());
        let message = match regular {
            Ok(true) => return,
            Ok(false) => format!("{} is not a regular file", path.display()),
            Err(error) => format!("cannot read {}: {error}", path.display()),
        };
        self.problems.push(Problem { path: key, message });
    }

    fn private(&mut self, key: String, path: &Path) {
        let mode = std::fs::metadata(path).map(|metadata| metadata.mode()).unwrap_or(0);
        self.warnings.extend(loose_mode(path, mode).map(|message| Problem { path: key, message }));
    }

    fn store(&mut self, kind: &StoreKind) {
        let ca_file = match kind {
            StoreKind::File { .. } => None,
            StoreKind::Postgres(postgres) => {
                if let SecretSource::File(path) = &postgres.url {
                    self.readable("store.url_file".to_owned(), path);
                    self.private("store.url_file".to_owned(), path);
                }
                postgres.ca_file.as_ref()
            }
            StoreKind::Upstream(upstream) => {
                if let SecretSource::File(path) = &upstream.token {
                    self.token("store.token_file".to_owned(), path, false);
                }
                upstream.ca_file.as_ref()
            }
        };
        if let Some(path) = ca_file {
            self.readable("store.ca_file".to_owned(), path);
        }
    }

    fn notice(&mut self, receiver: &Receiver) {
        if let Some(path) = &receiver.ca_file {
            self.readable(format!("notice.{}.ca_file", receiver.name), path);
        }
        let SecretSource::File(path) = &receiver.secret else { return };
        let key = format!("notice.{}.secret_file", receiver.name);
        match Secret::read_file(path) {
            Ok(file) => {
                let warnings = file.warnings.into_iter().map(|message| Problem { path: key.clone(), message });
                self.warnings.extend(warnings);
                if let Err(error) = NoticeSecrets::parse(&file.secret) {
                    let message = format!("cannot use the secret file {}: {error}", path.display());
                    self.problems.push(Problem { path: key, message });
                }
            }
            Err(error) => self.problems.push(Problem { path: key, message: error.to_string() }),
        }
    }

    fn token(&mut self, key: String, path: &Path, may_be_absent: bool) {
        match Secret::read_file(path) {
            Ok(file) => {
                let warnings = file.warnings.into_iter().map(|message| Problem { path: key.clone(), message });
                self.warnings.extend(warnings);
                if file.secret.expose().len() < SHORTEST_TOKEN {
                    let message = format!("the token has fewer than {SHORTEST_TOKEN} bytes: it can be guessed");
                    self.warnings.push(Problem { path: key, message });
                }
            }
            Err(SecretError::File { problem: SecretProblem::Unreadable(error), .. })
                if may_be_absent && error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => self.problems.push(Problem { path: key, message: error.to_string() }),
        }
    }
}
