//! Who the server is, who the client is, and what is never shown.

use std::path::PathBuf;

use jwksd::config::Secret;
use jwksd::store::postgres::{PostgresSettings, PostgresStore};
use jwksd::store::{Store as _, StoreError};

use super::support::postgres::{Database, PASSWORD, PostgresServer, settings};
use super::{keyring, open, unavailable};

struct Ca {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    file: PathBuf,
    _folder: tempfile::TempDir,
}

impl Ca {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Ca { issuer: rcgen::Issuer::new(params, key), file, _folder: folder }
    }

    /// Certificate and key in PEM.
    fn sign(&self, name: &str) -> (String, String) {
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

/// By TLS, as `host`.
fn encrypted(database: &Database, host: &str, options: &str, ca: &Ca) -> PostgresStore {
    let url = format!("postgres://postgres:{PASSWORD}@{host}:{}/{}?{options}", database.port, database.name);
    open(PostgresSettings { ca_file: Some(ca.file.clone()), ..settings(&url) })
}

#[tokio::test]
async fn a_server_is_trusted_by_its_name_and_authority() {
    let (ca, other_ca) = (Ca::new(), Ca::new());
    let server = PostgresServer::start(&[]).await;
    let database = server.database().await;
    drop(database.store().await);

    let without = unavailable(encrypted(&database, "localhost", "sslmode=require", &ca).read(&keyring("a")).await);
    assert!(without.contains("does not support TLS") && without.contains("ssl = on"), "{without}");

    let (certificate, key) = ca.sign("localhost");
    let certificate = server.write("server.crt", &certificate);
    let key = server.write("server.key", &key);
    server.configure(&[
        ("ssl", "on"),
        ("ssl_cert_file", certificate.to_str().unwrap()),
        ("ssl_key_file", key.to_str().unwrap()),
    ]);
    server.kill();
    server.resume();
    for options in
        ["sslmode=require", "sslmode=verify-full", "sslmode=prefer", "", "sslmode=require&channel_binding=require"]
    {
        let store = encrypted(&database, "localhost", options, &ca);
        store.read(&keyring("a")).await.unwrap_or_else(|error| panic!("{options}: {error:?}"));
    }
    let used = encrypted(&database, "localhost", "application_name=observed", &ca);
    used.read(&keyring("a")).await.unwrap();
    let tls = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'observed'";
    assert_eq!(database.rows(tls).await, ["t"]);

    // The name in the URL counts, also where the address is the same; and preferring is no way around it.
    for options in ["sslmode=require", "sslmode=prefer"] {
        let message = unavailable(encrypted(&database, "127.0.0.1", options, &ca).read(&keyring("a")).await);
        assert!(message.contains("cannot trust 127.0.0.1") && message.contains("not valid for name"), "{message}");
        let message = unavailable(encrypted(&database, "localhost", options, &other_ca).read(&keyring("a")).await);
        assert!(message.contains("cannot trust localhost") && message.contains("ca_file"), "{message}");
    }
    // The system's authorities do not know it either.
    let url = format!("postgres://postgres:{PASSWORD}@localhost:{}/{}?sslmode=require", database.port, database.name);
    let message = unavailable(open(settings(&url)).read(&keyring("a")).await);
    assert!(message.contains("ca_file"), "{message}");
}

#[tokio::test]
async fn a_ca_file_that_is_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let database = PostgresServer::shared().await.database().await;
    for (file, content) in [("missing.pem", None), ("empty.pem", Some("")), ("other.pem", Some("no certificate"))] {
        let path = folder.path().join(file);
        content.iter().for_each(|content| std::fs::write(&path, content).unwrap());
        let store = open(PostgresSettings { ca_file: Some(path), ..settings(&database.url()) });
        let message = unavailable(store.read(&keyring("a")).await);
        assert!(message.contains(file), "{message}");
    }
}

#[tokio::test]
async fn a_login_that_is_refused_says_by_whom_and_shows_no_password() {
    let database = PostgresServer::shared().await.database().await;
    let url = database.url().replace(PASSWORD, "wr0ng-s3cret");
    let store = open(settings(&url));
    let message = unavailable(store.read(&keyring("a")).await);
    assert!(message.contains("`postgres`") && message.contains("password authentication failed"), "{message}");
    let address = format!("127.0.0.1:{}", database.port);
    assert!(message.contains(&address) && !message.contains("wr0ng"), "{message}");
    for shown in [format!("{store:?}"), format!("{:?}", settings(&url)), store.locate(&keyring("a"))] {
        assert!(!shown.contains("wr0ng"), "{shown}");
    }
    assert!(store.locate(&keyring("a")).contains(&address));

    let elsewhere = Database { name: "not_there".to_owned(), ..database.clone() };
    let message = unavailable(open(settings(&elsewhere.url())).read(&keyring("a")).await);
    assert!(message.contains("not_there") && message.contains("does not exist"), "{message}");
}

#[test]
fn settings_that_cannot_work_are_refused_before_anything_connects() {
    let good = settings("postgres://u@localhost/d");
    let settings = |change: fn(&mut PostgresSettings)| {
        let mut settings = good.clone();
        change(&mut settings);
        settings
    };
    for (settings, said) in [
        (settings(|settings| settings.connections = 0), "connections"),
        (settings(|settings| settings.schema = "a b".to_owned()), "schema"),
        (settings(|settings| settings.statement_timeout = std::time::Duration::ZERO), "statement_timeout"),
        (
            settings(|settings| {
                settings.url = Secret::new(b"postgres://u:s3cret@db.example/d?sslmode=disable").unwrap()
            }),
            "sslmode=disable",
        ),
    ] {
        let error = PostgresStore::new(settings).unwrap_err();
        assert!(matches!(error, StoreError::Unusable { .. }), "{error}");
        assert!(error.to_string().contains(said) && !format!("{error:?}").contains("s3cret"), "{error}");
    }
}
