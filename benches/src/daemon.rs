//! The daemon that is measured: the release binary on the server's core, with a configuration of the benchmark's.

use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::load::{Address, Request};
use crate::process::{Server, free_address};

/// An application's credentials: a benchmark without them would leave out what everybody needs.
const TOKEN: &str = "a-token-for-the-benchmark-of-43-characters--";

pub struct Daemon {
    pub server: Server,
    pub public: SocketAddr,
    pub signer: Address,
    pub admin: SocketAddr,
    _folder: TempDir,
}

/// A keyset of an issuer of the same name.
pub struct Keyset {
    pub name: &'static str,
    pub algorithm: &'static str,
    /// What stands in its tables besides.
    pub tables: &'static str,
}

impl Daemon {
    /// Starts it and waits until every keyset signs. Applications reach it over TCP.
    pub fn start(keysets: &[Keyset]) -> Self {
        Daemon::start_in(tempfile::tempdir().unwrap(), keysets, free_address().into())
    }

    /// As a sidecar is reached: applications use a Unix socket.
    pub fn start_as_sidecar(keysets: &[Keyset]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("signer.sock");
        Daemon::start_in(folder, keysets, Address::Unix(socket))
    }

    fn start_in(folder: TempDir, keysets: &[Keyset], signer: Address) -> Self {
        let [public, admin] = std::array::from_fn(|_| free_address());
        let listen = match &signer {
            Address::Tcp(address) => address.to_string(),
            Address::Unix(path) => format!("unix:{}", path.display()),
        };
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(path("signer.token"), TOKEN).unwrap();
        fs::write(path("admin.token"), TOKEN.to_uppercase()).unwrap();
        let mut text = format!(
            "[public]\nlisten = \"{public}\"\n[signer]\nlisten = \"{listen}\"\n[signer.client.bench]\ntoken_file = \"{}\"\n\
             [admin]\nlisten = \"{admin}\"\n[admin.token.bench]\nrole = \"operator\"\nfile = \"{}\"\n\
             [store]\nkind = \"file\"\npath = \"{}\"\ninitialise = \"if-empty\"\n[seal]\nkind = \"file\"\npath = \"{}\"\n",
            path("signer.token"),
            path("admin.token"),
            path("keyrings"),
            path("seal.key")
        );
        for Keyset { name, algorithm, tables } in keysets {
            let _ = write!(
                text,
                "[issuer.{name}]\nurl = \"http://{public}/{name}\"\nmax_age = \"1s\"\n\
                 [keyset.{name}]\nissuer = \"{name}\"\nalgorithm = \"{algorithm}\"\nbackend = \"local\"\n{tables}\n"
            );
        }
        fs::write(path("jwksd.toml"), text).unwrap();
        let mut command = Command::new(crate::peers::program("JWKSD_BENCH_BINARY"));
        command.args(["serve", "--config", &path("jwksd.toml")]).current_dir(folder.path());
        let daemon = Daemon { server: Server::start(command, public), public, signer, admin, _folder: folder };
        for keyset in keysets {
            daemon.wait_until(&daemon.sign(keyset.name), |answer| answer.starts_with("HTTP/1.1 200"));
        }
        daemon
    }

    pub fn jwks(&self, keyset: &str) -> Request {
        Request::get(self.public, &format!("/{keyset}/.well-known/jwks.json"))
    }

    /// A token as an API's: who, for whom, what for.
    pub fn sign(&self, keyset: &str) -> Request {
        let headers = format!("Authorization: Bearer {TOKEN}\r\n");
        Request::post(self.signer.clone(), &format!("/v1/keysets/{keyset}/sign"), &headers, SIGN_BODY)
    }

    pub fn rotate(&self, keyset: &str) -> Request {
        let headers = format!("Authorization: Bearer {}\r\n", TOKEN.to_uppercase());
        Request::post(self.admin, &format!("/v1/keysets/{keyset}/rotate"), &headers, "{\"reason\":\"benchmark\"}")
    }

    /// Asks until the answer is as wanted.
    pub fn wait_until(&self, request: &Request, wanted: impl Fn(&str) -> bool) -> String {
        let begun = Instant::now();
        loop {
            let answer = request.once();
            if wanted(&answer) {
                return answer;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "still: {answer}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

pub const SIGN_BODY: &str =
    r#"{"claims":{"sub":"user-4711","aud":"https://api.example.com","scope":"orders:read orders:write"}}"#;

/// The body of an answer.
pub fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

/// The `token` of an answer to a sign request.
pub fn token(answer: &str) -> String {
    let json: serde_json::Value = serde_json::from_str(body(answer)).unwrap_or_else(|_| panic!("no token: {answer}"));
    json["token"].as_str().unwrap().to_owned()
}
