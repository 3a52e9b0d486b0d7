//! Mutual TLS: certificates of clients on signer and admin.

use std::os::unix::fs::symlink;

use serde_json::{Value, json};
use tokio_rustls::rustls::HandshakeKind;

use crate::authority::{Authority, NOW, Pair, dns, uri};
use crate::support::{Daemon, DaemonBuilder, PATIENCE, eventually};
use crate::wire::{Wire, config};
use crate::{KEYSETS, SIGN, claims};

const ORDERS: &str = "spiffe://example.com/orders";
const TOKEN: &str = "a-token-long-enough-to-be-taken-for-one-0123456789";

const SIGNER: &str = "[signer.tls]\ncert_file = \"server.crt\"\nkey_file = \"server.key\"\nclient_ca_file = \"ca.crt\"\n\
    [signer.client.orders]\nsan = \"spiffe://example.com/orders\"\nkeysets = [\"default\"]\naudiences = [\"https://api\"]\n\
    [signer.client.billing]\nsan = \"Billing.Internal\"\n";

const ADMIN: &str = "[admin.tls]\ncert_file = \"server.crt\"\nkey_file = \"server.key\"\nclient_ca_file = \"ca.crt\"\n\
    [admin.client.alice]\nrole = \"operator\"\nsan = \"spiffe://example.com/alice\"\n\
    [admin.client.bob]\nrole = \"viewer\"\nsan = \"bob.internal\"\n";

struct Setting {
    daemon: Daemon,
    /// Signs what servers show.
    servers: Authority,
    /// Signs what clients show.
    clients: Authority,
}

async fn started(builder: DaemonBuilder) -> Setting {
    let mut daemon = builder.prepare();
    let (servers, clients) = (Authority::new("servers"), Authority::new("clients"));
    servers.server(NOW).write(&daemon.path(""), "server");
    std::fs::write(daemon.path("ca-1.crt"), &clients.pem).unwrap();
    symlink("ca-1.crt", daemon.path("ca.crt")).unwrap();
    std::fs::write(daemon.path("client.token"), TOKEN).unwrap();
    daemon.start_process().await;
    daemon.ready().await;
    Setting { daemon, servers, clients }
}

fn with_token() -> DaemonBuilder {
    Daemon::builder().tables(&format!("{SIGNER}[signer.client.job]\ntoken_file = \"client.token\"\n{KEYSETS}"))
}

impl Setting {
    async fn connect(&self, listener: &str, own: Option<&Pair>) -> std::io::Result<Wire> {
        Wire::open(self.daemon.address(listener), config(&self.servers, own)).await
    }

    /// The status of a signature over a new connection; 0 when it is refused.
    async fn signs(&self, own: Option<&Pair>, token: Option<&str>) -> u16 {
        let Ok(mut wire) = self.connect("signer", own).await else { return 0 };
        wire.ask("POST", SIGN, token, Some(&claims("https://api"))).await.map_or(0, |(status, _)| status)
    }

    /// Replaces the authority of clients as Kubernetes would: by a link.
    fn swap_authority(&self, authority: &Authority) {
        std::fs::write(self.daemon.path("ca-2.crt"), &authority.pem).unwrap();
        symlink("ca-2.crt", self.daemon.path("ca.new")).unwrap();
        std::fs::rename(self.daemon.path("ca.new"), self.daemon.path("ca.crt")).unwrap();
    }

    fn rewrite(&self, change: impl FnOnce(String) -> String) {
        let path = self.daemon.path("jwksd.toml");
        let text = change(std::fs::read_to_string(&path).unwrap());
        std::fs::write(&path, text).unwrap();
    }
}

#[tokio::test]
async fn a_certificate_signs_for_its_clients_keysets_and_audiences_only() {
    let setting = started(with_token()).await;
    let orders = setting.clients.client(vec![uri(ORDERS)]);
    let mut wire = setting.connect("signer", Some(&orders)).await.unwrap();
    let mut ask = async |path: &str, audience: &str| {
        let (status, body) = wire.ask("POST", path, None, Some(&claims(audience))).await.unwrap();
        (status, body["type"].as_str().unwrap_or_default().rsplit(':').next().unwrap().to_owned())
    };
    assert_eq!(ask(SIGN, "https://api").await.0, 200);
    assert_eq!(ask(SIGN, "https://other").await, (422, "audience-not-allowed".to_owned()));
    assert_eq!(ask("/v1/keysets/partners/sign", "https://api").await, (403, "forbidden".to_owned()));
    let billing = setting.clients.client(vec![dns("BILLING.internal")]);
    let mut wire = setting.connect("signer", Some(&billing)).await.unwrap();
    let (status, _) = wire.ask("POST", "/v1/keysets/partners/sign", None, Some(&claims("any"))).await.unwrap();
    assert_eq!(status, 200, "DNS names have no case");
    // A token says more of who asks than the connection it comes on.
    let (status, _) = wire.ask("POST", SIGN, Some(TOKEN), Some(&claims("any"))).await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(setting.signs(None, Some(TOKEN)).await, 200, "clients with tokens need no certificate");
    assert_eq!(setting.signs(None, None).await, 401);
}

#[tokio::test]
async fn certificates_that_are_nobodys_sign_nothing() {
    let setting = started(with_token()).await;
    let of = |names| setting.clients.client(names);
    let many: Vec<_> = (0..100).map(|n| dns(&format!("n{n}.internal"))).chain([uri(ORDERS)]).collect();
    for (what, pair) in [
        ("a name that is not configured", of(vec![uri("spiffe://example.com/other")])),
        ("a longer path", of(vec![uri("spiffe://example.com/orders/")])),
        ("another case in a SPIFFE ID", of(vec![uri("spiffe://Example.com/orders")])),
        ("a wildcard", of(vec![dns("*.internal")])),
        ("a DNS name as a URI", of(vec![uri("billing.internal")])),
        ("a name as an e-mail address", of(vec![rcgen::SanType::Rfc822Name("billing.internal".try_into().unwrap())])),
        ("a common name", setting.clients.sign("billing.internal", vec![], NOW)),
        ("names of two clients", of(vec![uri(ORDERS), dns("billing.internal")])),
        ("very many names", of(many)),
    ] {
        assert_eq!(setting.signs(Some(&pair), None).await, 401, "{what}");
    }
    let refused = setting.daemon.metrics().await;
    let labels = [("keyset", "default"), ("reason", "unauthorized")];
    assert_eq!(refused.sum("jwksd_sign_rejections_total", &labels), Some(9.0));
    // These do not get as far as a request.
    for (what, pair) in [
        ("of another authority", Authority::new("clients").client(vec![uri(ORDERS)])),
        ("expired", setting.clients.sign("client", vec![uri(ORDERS)], (2019, 2020))),
        ("of the future", setting.clients.sign("client", vec![uri(ORDERS)], (2080, 2090))),
    ] {
        assert_eq!(setting.signs(Some(&pair), None).await, 0, "{what}");
    }
    assert_eq!(
        setting.signs(Some(&of(vec![dns("more.internal"), uri(ORDERS)])), None).await,
        200,
        "one name is enough"
    );
}

#[tokio::test]
async fn without_other_clients_a_certificate_is_required() {
    let setting = started(Daemon::builder().tables(&format!("{SIGNER}{KEYSETS}"))).await;
    assert_eq!(setting.signs(None, None).await, 0, "the handshake is to fail");
    let orders = setting.clients.client(vec![uri(ORDERS)]);
    assert_eq!(setting.signs(Some(&orders), None).await, 200);
    setting.rewrite(|text| format!("{text}\n[signer.client.job]\ntoken_file = \"client.token\"\n"));
    eventually("a token to be enough", PATIENCE, async || {
        (setting.signs(None, Some(TOKEN)).await == 200).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_open_connection_loses_its_access_with_its_authority() {
    let setting = started(with_token()).await;
    let orders = setting.clients.client(vec![uri(ORDERS)]);
    let shown = config(&setting.servers, Some(&orders));
    let mut kept = Wire::open(setting.daemon.address("signer"), shown.clone()).await.unwrap();
    let sign = claims("https://api");
    assert_eq!(kept.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0, 200);
    let again = Wire::open(setting.daemon.address("signer"), shown.clone()).await.unwrap();
    assert_eq!(again.handshake(), HandshakeKind::Full, "a resumed session would not prove its certificate");

    let other = Authority::new("clients");
    setting.swap_authority(&other);
    eventually("the open connection to be refused", PATIENCE, async || {
        (kept.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0 == 401).then_some(())
    })
    .await;
    assert_eq!(setting.signs(Some(&orders), None).await, 0, "the same client anew");
    let resumed = Wire::open(setting.daemon.address("signer"), shown).await;
    let resumed = match resumed {
        Ok(mut wire) => wire.ask("POST", SIGN, None, Some(&sign)).await.is_ok(),
        Err(_) => false,
    };
    assert!(!resumed, "a session of the former authority came back");
    assert_eq!(setting.signs(Some(&other.client(vec![uri(ORDERS)])), None).await, 200);
}

#[tokio::test]
async fn an_open_connection_loses_its_access_with_its_identity_and_keeps_it_otherwise() {
    let setting = started(with_token()).await;
    let orders = setting.clients.client(vec![uri(ORDERS)]);
    let billing = setting.clients.client(vec![dns("billing.internal")]);
    let mut lost = setting.connect("signer", Some(&orders)).await.unwrap();
    let mut kept = setting.connect("signer", Some(&billing)).await.unwrap();
    let sign = claims("https://api");
    for wire in [&mut lost, &mut kept] {
        assert_eq!(wire.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0, 200);
    }
    setting.rewrite(|text| text.replace(ORDERS, "spiffe://example.com/orders-2"));
    eventually("the open connection to be refused", PATIENCE, async || {
        (lost.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0 == 401).then_some(())
    })
    .await;
    // The server's own certificate changes nothing for those who are connected.
    setting.servers.server(NOW).write(&setting.daemon.path(""), "server");
    eventually("the new certificate", PATIENCE, async || {
        setting.daemon.logs().iter().filter(|line| line.contains("configuration reloaded")).nth(1).map(|_| ())
    })
    .await;
    assert_eq!(kept.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0, 200);
}

#[tokio::test]
async fn operators_and_viewers_are_known_by_certificates() {
    let setting = started(Daemon::builder().tables(&format!("{ADMIN}{KEYSETS}"))).await;
    let alice = setting.clients.client(vec![uri("spiffe://example.com/alice")]);
    let bob = setting.clients.client(vec![dns("bob.internal")]);
    let mallory = setting.clients.client(vec![dns("mallory.internal")]);
    let hold = json!({ "reason": "maintenance" });
    let (path, list) = ("/v1/keysets/default/hold", "/v1/keysets");
    let mut viewer = setting.connect("admin", Some(&bob)).await.unwrap();
    assert_eq!(viewer.ask("GET", list, None, None).await.unwrap().0, 200);
    assert_eq!(viewer.ask("PUT", path, None, Some(&hold)).await.unwrap().0, 403);
    let mut operator = setting.connect("admin", Some(&alice)).await.unwrap();
    let (status, held) = operator.ask("PUT", path, None, Some(&hold)).await.unwrap();
    assert_eq!((status, &held["actor"]), (200, &json!("alice")), "{held}");
    let (_, audit) = operator.ask("GET", "/v1/audit", None, None).await.unwrap();
    let entry = |item: &Value| item["action"] == "hold" && item["actor"] == "alice";
    assert!(audit["items"].as_array().unwrap().iter().any(entry), "{audit}");
    let mut stranger = setting.connect("admin", Some(&mallory)).await.unwrap();
    assert_eq!(stranger.ask("GET", list, None, None).await.unwrap().0, 401);
    let failures = setting.daemon.metrics().await.sum("jwksd_admin_auth_failures_total", &[]);
    assert_eq!(failures, Some(1.0));
    // The harness has an operator with a token, so a certificate is not required.
    let token = crate::support::api::operator_token(&setting.daemon);
    let mut plain = setting.connect("admin", None).await.unwrap();
    assert_eq!(plain.ask("GET", list, Some(&token), None).await.unwrap().0, 200);
    assert_eq!(plain.ask("GET", list, None, None).await.unwrap().0, 401);

    setting.rewrite(|text| text.replace("role = \"operator\"\nsan", "role = \"viewer\"\nsan"));
    eventually("alice to be a viewer", PATIENCE, async || {
        (operator.ask("PUT", path, None, Some(&hold)).await.unwrap().0 == 403).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_broken_certificate_of_one_listener_keeps_no_authority_in_use_on_another() {
    let public = "[public.tls]\ncert_file = \"public.crt\"\nkey_file = \"public.key\"\n";
    let tables = format!("{SIGNER}{public}[signer.client.job]\ntoken_file = \"client.token\"\n{KEYSETS}");
    let mut daemon = Daemon::builder().tables(&tables).prepare();
    Authority::new("public").server(NOW).write(&daemon.path(""), "public");
    let (servers, clients) = (Authority::new("servers"), Authority::new("clients"));
    servers.server(NOW).write(&daemon.path(""), "server");
    std::fs::write(daemon.path("ca.crt"), &clients.pem).unwrap();
    std::fs::write(daemon.path("client.token"), TOKEN).unwrap();
    daemon.start_process().await;
    daemon.ready().await;
    let orders = clients.client(vec![uri(ORDERS)]);
    let setting = Setting { daemon, servers, clients };
    let mut kept = setting.connect("signer", Some(&orders)).await.unwrap();
    let sign = claims("https://api");
    assert_eq!(kept.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0, 200);
    assert_eq!(setting.signs(None, Some(TOKEN)).await, 200);
    std::fs::write(setting.daemon.path("public.crt"), "junk").unwrap();
    setting.swap_authority(&Authority::new("others"));
    std::fs::write(setting.daemon.path("client.token"), TOKEN.replace("a-token", "another-token")).unwrap();
    eventually("the open connection to be refused", PATIENCE, async || {
        (kept.ask("POST", SIGN, None, Some(&sign)).await.unwrap().0 == 401).then_some(())
    })
    .await;
    eventually("the former token", PATIENCE, async || (setting.signs(None, Some(TOKEN)).await == 401).then_some(()))
        .await;
    let valid = setting.daemon.metrics().await.sum("jwksd_config_last_reload_successful", &[]);
    assert_eq!(valid, Some(0.0), "and the broken one is told");
}
