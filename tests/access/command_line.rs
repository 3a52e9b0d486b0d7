//! Operators on the command line, with TLS and certificates of their own.

use std::process::Output;

use crate::KEYSETS;
use crate::authority::{Authority, NOW, Years, dns, uri};
use crate::support::Daemon;

const TABLES: &str = "[admin.tls]\ncert_file = \"server.crt\"\nkey_file = \"server.key\"\nclient_ca_file = \"ca.crt\"\n\
    [admin.client.alice]\nrole = \"operator\"\nsan = \"spiffe://example.com/alice\"\n\
    [ops.tls]\ncert_file = \"server.crt\"\nkey_file = \"server.key\"\n";

async fn run(daemon: &Daemon, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = daemon.command(arguments);
    let Output { status, stdout, stderr } =
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (status.code(), String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap())
}

fn prepared(years: Years) -> (Daemon, Authority) {
    let daemon = Daemon::builder().tables(&format!("{TABLES}{KEYSETS}")).prepare();
    let authority = Authority::new("all");
    // For another name than the one that commands on this machine connect to.
    authority.sign("server", vec![dns("jwksd.internal")], years).write(&daemon.path(""), "server");
    std::fs::write(daemon.path("ca.crt"), &authority.pem).unwrap();
    authority.client(vec![uri("spiffe://example.com/alice")]).write(&daemon.path(""), "alice");
    authority.client(vec![dns("mallory.internal")]).write(&daemon.path(""), "mallory");
    Authority::new("all").client(vec![uri("spiffe://example.com/alice")]).write(&daemon.path(""), "foreign");
    (daemon, authority)
}

#[tokio::test]
async fn commands_on_the_daemons_machine_know_its_certificate_and_show_one() {
    let (mut daemon, authority) = prepared(NOW);
    daemon.start_process().await;
    let (code, text) = run(&daemon, &["healthcheck"]).await;
    assert_eq!((code, text.trim()), (Some(0), "ready"));
    let alice = ["--client-cert", "alice.crt", "--client-key", "alice.key"];
    let (code, text) = run(&daemon, &[&alice[..], &["status"]].concat()).await;
    assert!(code == Some(0) && text.contains("default"), "{code:?} {text}");
    let hold = [&alice[..], &["hold", "default", "--reason", "tests"]].concat();
    assert_eq!(run(&daemon, &hold).await.0, Some(0));
    let (_, audit) = run(&daemon, &[&alice[..], &["audit", "default"]].concat()).await;
    assert!(audit.lines().any(|line| line.contains("hold") && line.contains("alice")), "{audit}");
    let mallory = ["--client-cert", "mallory.crt", "--client-key", "mallory.key", "status"];
    let (code, text) = run(&daemon, &mallory).await;
    assert!(code == Some(3) && text.contains("unauthorized"), "{code:?} {text}");
    let foreign = ["--client-cert", "foreign.crt", "--client-key", "foreign.key", "status"];
    let (code, text) = run(&daemon, &foreign).await;
    assert!(code == Some(1) && text.contains("client_ca_file"), "{code:?} {text}");
    // Without the key, and with an authority named, in which case names count.
    assert_eq!(run(&daemon, &["--client-cert", "alice.crt", "status"]).await.0, Some(2));
    let named = [&alice[..], &["--ca-file", "ca.crt", "status"]].concat();
    let (code, text) = run(&daemon, &named).await;
    assert!(code == Some(1) && text.contains("for another name"), "{code:?} {text}");
    // The authority alone does not make another server the daemon.
    authority.sign("server", vec![dns("other.internal")], NOW).write(&daemon.path(""), "other");
    let url = format!("https://{}", daemon.address("ops"));
    let (code, text) = run(&daemon, &["--server", &url, "healthcheck"]).await;
    assert!(code == Some(1) && text.contains("--ca-file"), "{code:?} {text}");
}

#[tokio::test]
async fn check_looks_at_certificates() {
    let (daemon, authority) = prepared((2018, 2019));
    let (code, text) = run(&daemon, &["check"]).await;
    let said = "admin.tls.cert_file: server.crt: the certificate expired at 2019-01-01T00:00:00Z: renew it";
    assert!(code == Some(2) && text.contains(said), "{code:?} {text}");
    authority.server((2080, 2090)).write(&daemon.path(""), "server");
    let (code, text) = run(&daemon, &["check"]).await;
    assert!(code == Some(2) && text.contains("not valid before 2080-01-01"), "{code:?} {text}");
    std::fs::write(daemon.path("server.crt"), authority.server(NOW).cert).unwrap();
    let (code, text) = run(&daemon, &["check"]).await;
    assert!(code == Some(2) && text.contains("ops.tls: server.crt and server.key do not serve TLS"), "{code:?} {text}");
    authority.server((1990, 2030)).write(&daemon.path(""), "server");
    let (code, text) = run(&daemon, &["check"]).await;
    assert!(code == Some(0) && text.contains("warning: admin.tls.cert_file"), "{code:?} {text}");
    authority.server(NOW).write(&daemon.path(""), "server");
    std::fs::write(daemon.path("ca.crt"), "nothing").unwrap();
    let (code, text) = run(&daemon, &["check"]).await;
    assert!(code == Some(2) && text.contains("ca.crt holds no certificate"), "{code:?} {text}");
    authority.server(NOW).write(&daemon.path(""), "server");
    std::fs::write(daemon.path("ca.crt"), &authority.pem).unwrap();
    assert_eq!(run(&daemon, &["check"]).await.0, Some(0));
}
