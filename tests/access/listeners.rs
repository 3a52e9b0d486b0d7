//! The daemon's own certificates: renewed while running, kept when the new ones are of no use, told in metrics.

use tokio_rustls::rustls::HandshakeKind;

use crate::KEYSETS;
use crate::authority::{Authority, NOW, Years};
use crate::support::{Daemon, PATIENCE, eventually};
use crate::wire::{Wire, config};

const LISTENERS: [&str; 3] = ["public", "signer", "admin"];

async fn shows(daemon: &Daemon, listener: &str, authority: &Authority) -> bool {
    Wire::open(daemon.address(listener), config(authority, None)).await.is_ok()
}

async fn expiry(daemon: &Daemon, listener: &str) -> Option<f64> {
    daemon.metrics().await.sum("jwksd_certificate_expiry_timestamp_seconds", &[("listener", listener)])
}

/// The first second of a year.
fn year(year: i32) -> f64 {
    rcgen::date_time_ymd(year, 1, 1).unix_timestamp() as f64
}

async fn reload(daemon: &Daemon, status: u16) -> String {
    let token = crate::support::api::operator_token(daemon);
    let client = crate::support::http_client().tls_danger_accept_invalid_certs(true).build().unwrap();
    let url = format!("https://{}/v1/reload", daemon.address("admin"));
    let answer = client.post(url).bearer_auth(token).json(&serde_json::json!({})).send().await.unwrap();
    assert_eq!(answer.status().as_u16(), status);
    answer.text().await.unwrap()
}

#[tokio::test]
async fn every_listener_renews_its_certificate_and_keeps_it_when_the_new_one_is_of_no_use() {
    let tables: String = LISTENERS
        .iter()
        .map(|listener| format!("[{listener}.tls]\ncert_file = \"{listener}.crt\"\nkey_file = \"{listener}.key\"\n"))
        .collect();
    let mut daemon = Daemon::builder().tables(&format!("{tables}{KEYSETS}")).prepare();
    let first = Authority::new("first");
    let write = |authority: &Authority, years: Years| {
        LISTENERS.iter().for_each(|listener| authority.server(years).write(&daemon.path(""), listener));
    };
    write(&first, (2020, 2080));
    let daemon = {
        daemon.start_process().await;
        daemon.ready().await;
        daemon
    };
    for listener in LISTENERS {
        assert!(shows(&daemon, listener, &first).await, "{listener}");
        assert_eq!(expiry(&daemon, listener).await, Some(year(2080)), "{listener}");
    }
    assert_eq!(expiry(&daemon, "ops").await, None, "no TLS, no certificate");

    // Where nobody shows a certificate, sessions are resumed.
    let client = config(&first, None);
    let mut wire = Wire::open(daemon.address("public"), client.clone()).await.unwrap();
    assert_eq!(wire.ask("GET", "/.well-known/jwks.json", None, None).await.unwrap().0, 200);
    let again = Wire::open(daemon.address("public"), client).await.unwrap();
    assert_eq!((wire.handshake(), again.handshake()), (HandshakeKind::Full, HandshakeKind::Resumed));

    let second = Authority::new("second");
    for (what, years) in [("expired", (2018, 2019)), ("is not valid before", (2085, 2090))] {
        second.server(years).write(&daemon.path(""), "signer");
        let refused = reload(&daemon, 422).await;
        assert!(refused.contains("signer.tls.cert_file: signer.crt") && refused.contains(what), "{refused}");
        assert!(shows(&daemon, "signer", &first).await);
        assert_eq!(expiry(&daemon, "signer").await, Some(year(2080)));
    }
    std::fs::write(daemon.path("signer.crt"), second.server(NOW).cert).unwrap();
    let refused = reload(&daemon, 422).await;
    assert!(refused.contains("signer.tls") && refused.contains("the key must be that of"), "{refused}");
    daemon.log_line("the failure", |line| line.message().contains("the former one goes on")).await;

    for listener in LISTENERS {
        second.server((2020, 2090)).write(&daemon.path(""), listener);
    }
    for listener in LISTENERS {
        eventually("the new certificate", PATIENCE, async || shows(&daemon, listener, &second).await.then_some(()))
            .await;
        eventually("its end", PATIENCE, async || (expiry(&daemon, listener).await == Some(year(2090))).then_some(()))
            .await;
    }
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_told_at_the_start_and_keeps_no_other_change_out() {
    let mut daemon = Daemon::builder()
        .tables(&format!("[public.tls]\ncert_file = \"a.crt\"\nkey_file = \"a.key\"\n{KEYSETS}"))
        .prepare();
    Authority::new("a").server((2018, 2019)).write(&daemon.path(""), "a");
    daemon.start_process().await;
    let told = daemon
        .log_line("the certificate", |line| line.field("listener") == "public" && !line.field("wrong").is_empty());
    assert!(told.await.field("wrong").contains("expired at 2019-01-01"));
    assert_eq!(expiry(&daemon, "public").await, Some(year(2019)));
    let answer = crate::support::api::Call::post(&daemon, "admin", "/v1/reload").json(&serde_json::json!({}));
    answer.expect(200).await;
}
