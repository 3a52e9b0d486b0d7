//! The files of deploy/examples/envoy, as they are but for their ports.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::support::ports::ReservedPort;
use crate::support::{PATIENCE, Process, eventually, http_client, tools, unix_now};
use crate::verifiers::{Envoy, Verifier as _};

const FOLDER: &str = "deploy/examples/envoy";
const AUDIENCE: &str = "https://api.example.com";

/// A daemon with the example's configuration, used as its README says.
struct Example {
    folder: TempDir,
    process: Process,
    public: ReservedPort,
    _others: [ReservedPort; 3],
}

impl Example {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let [public, signer, admin, ops] = [(); 4].map(|()| ReservedPort::any());
        let config = ["8620", "8621", "8622", "8623"]
            .iter()
            .zip([&public, &signer, &admin, &ops])
            .fold(file("jwksd.toml"), |text, (from, to)| text.replace(from, &to.number().to_string()));
        std::fs::write(folder.path().join("jwksd.toml"), config).expect("the folder is writable");
        let process = Process::start(jwksd(folder.path(), &["serve"]));
        let example = Example { folder, process, public, _others: [signer, admin, ops] };
        eventually("the daemon to be ready", PATIENCE, async || {
            assert!(!example.process.output.has_ended(), "{}", example.process.output.lines().join("\n"));
            jwksd(example.folder.path(), &["healthcheck"]).output().ok()?.status.success().then_some(())
        })
        .await;
        example
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = jwksd(self.folder.path(), arguments).output().expect("the binary starts");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("it prints text").trim().to_owned()
    }

    fn token(&self, audience: &str, ttl: &str) -> String {
        self.run(&["sign", "--sub", "alice", "--aud", audience, "--ttl", ttl])
    }

    /// Envoy's part, before this daemon. A second of leeway instead of a minute: a test waits for a token to expire.
    fn envoy(&self) -> String {
        let leeway = "clock_skew_seconds: 60";
        let text = file("envoy.yaml");
        assert!(text.contains(leeway), "the leeway is spelled out, as in jwksd.toml");
        text.replace(leeway, "clock_skew_seconds: 1")
            .replace("8620", &self.public.number().to_string())
            .replace("port_value: 9901", "port_value: 0")
            .replace("port_value: 10000", "port_value: 0")
    }
}

fn file(name: &str) -> String {
    let path = tools::repository(FOLDER).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn jwksd(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
    command.args(["--config", "jwksd.toml"]).args(arguments).current_dir(folder).env_clear();
    command
}

/// What Envoy answers to a token, if it is not let in.
async fn refused(envoy: &Envoy, token: &str) -> String {
    envoy.verify(token).await.expect_err("it was let in")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_envoy_example_lets_in_whom_it_should_through_rotations() {
    let example = Example::start().await;
    let envoy = Envoy::run(&example.envoy()).await;
    let short = example.token(AUDIENCE, "1s");
    let expires_at = unix_now() + Duration::from_secs(1);
    let before = example.token(AUDIENCE, "5m");
    assert_eq!(envoy.verify(&before).await, Ok(()));

    let foreign = Example::start().await.token(AUDIENCE, "5m");
    assert!(refused(&envoy, &foreign).await.starts_with("401"), "another daemon's key");
    let other_audience = example.token("https://other.example.com", "5m");
    assert!(refused(&envoy, &other_audience).await.starts_with("403"));
    assert!(refused(&envoy, "").await.starts_with("401"), "no token");
    let altered = format!("{}A{}", &before[..before.len() - 12], &before[before.len() - 11..]);
    assert!(altered == before || refused(&envoy, &altered).await.starts_with("401"), "an altered signature");

    // Both successors were published before Envoy fetched: its one copy serves two rotations.
    let mut tokens = vec![before];
    for _ in 0..2 {
        example.run(&["rotate", "--allow-unpropagated", "--yes", "--reason", "a drill"]);
        let token = example.token(AUDIENCE, "5m");
        assert!(tokens.iter().all(|known| head(known) != head(&token)), "another key signs");
        tokens.push(token);
        for token in &tokens {
            assert_eq!(envoy.verify(token).await, Ok(()));
        }
    }
    tokio::time::sleep((expires_at + Duration::from_secs(2)).saturating_sub(unix_now())).await;
    let expired = refused(&envoy, &short).await;
    assert!(expired.starts_with("401") && expired.contains("expired"), "{expired}");
    one_fetch(&envoy).await;
}

/// Envoy fetched before it opened, and not once for a kid that it did not know: why `propagation` must outlast its cache.
/// The counters are those that the README names.
async fn one_fetch(envoy: &Envoy) {
    let url = format!("http://{}/stats?filter=jwks_fetch", envoy.admin);
    let client = http_client().build().expect("a client without TLS set-up");
    let stats = client.get(url).send().await.expect("Envoy answers");
    let stats = stats.text().await.expect("it is text");
    for line in ["http.api.jwt_authn.jwks_fetch_success: 1", "http.api.jwt_authn.jwks_fetch_failed: 0"] {
        assert!(stats.lines().any(|found| found == line), "{line} is not in\n{stats}");
    }
}

fn head(token: &str) -> &str {
    token.split('.').next().unwrap_or_default()
}

/// What jwksd.toml and envoy.yaml say of each other.
#[test]
fn the_envoy_example_declares_what_envoy_does() {
    let (envoy, config) = (file("envoy.yaml"), file("jwksd.toml"));
    let config: toml::Value = toml::from_str(&config).expect("it is TOML");
    let issuer = config["issuer"]["main"]["url"].as_str().expect("a URL");
    assert!(envoy.contains(&format!("issuer: {issuer} ")), "{issuer}");
    let preset = jwksd(Path::new("/"), &["verifiers"]).output().expect("the binary starts");
    let preset = String::from_utf8(preset.stdout).expect("it prints text");
    let preset = preset.lines().find(|line| line.starts_with("envoy ")).expect("Envoy is known");
    assert!(preset.contains(" 10m "), "{preset}");
    assert!(envoy.contains("cache_duration: { seconds: 600 }"), "as the preset says: {preset}");
    let declared = config["keyset"]["default"]["rotation"]["verifiers"].as_array().expect("a list");
    assert_eq!(declared, &["envoy".into()]);
    let path = tools::repository(FOLDER).join("jwksd.toml");
    let checked = Command::new(env!("CARGO_BIN_EXE_jwksd")).arg("check").arg("--config").arg(path).output();
    let checked = checked.expect("the binary starts");
    let text = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && text.contains("16m"), "the README's sum is 16m: {text}");
}
