//! What the daemon is compared with: nginx with a file, OpenBao, and aws-lc-rs in a loop.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::body;
use crate::load::Request;
use crate::process::{Server, free_address};

/// A program that `benches/run` installs and names in the environment.
pub fn program(variable: &str) -> PathBuf {
    let Some(path) = std::env::var_os(variable) else {
        panic!("{variable} is not set: run benches/run, which installs what the comparison needs");
    };
    PathBuf::from(path)
}

/// nginx as one process, as Debian configures it but for the access log, which is off.
pub struct Nginx {
    _server: Server,
    pub address: SocketAddr,
    _folder: TempDir,
}

impl Nginx {
    pub fn serving(document: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (address, root) = (free_address(), folder.path().display().to_string());
        fs::create_dir_all(folder.path().join(".well-known")).unwrap();
        fs::write(folder.path().join(".well-known/jwks.json"), document).unwrap();
        let configuration = format!(
            "daemon off; master_process off; pid {root}/pid; error_log {root}/error.log; user root;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;\n\
             client_body_temp_path {root}/a; proxy_temp_path {root}/b; fastcgi_temp_path {root}/c;\n\
             uwsgi_temp_path {root}/d; scgi_temp_path {root}/e;\n\
             open_file_cache max=100; types {{ application/jwk-set+json json; }}\n\
             server {{ listen {address}; root {root}; add_header Cache-Control \"public, max-age=300\";\n\
             add_header Access-Control-Allow-Origin *; }} }}"
        );
        fs::write(folder.path().join("nginx.conf"), configuration).unwrap();
        let mut command = Command::new(program("JWKSD_BENCH_NGINX"));
        command.arg("-c").arg(folder.path().join("nginx.conf")).arg("-p").arg(folder.path());
        Nginx { _server: Server::start(command, address), address, _folder: folder }
    }

    pub fn jwks(&self) -> Request {
        Request::get(self.address, "/.well-known/jwks.json")
    }
}

/// OpenBao's development server: everything in memory, no audit.
pub struct OpenBao {
    _server: Server,
    address: SocketAddr,
}

const BAO_TOKEN: &str = "X-Vault-Token: root\r\n";

impl OpenBao {
    pub fn start() -> Self {
        let address = free_address();
        let mut command = Command::new(program("JWKSD_BENCH_BAO"));
        command.args(["server", "-dev", "-dev-root-token-id=root", "-dev-no-store-token"]);
        command.arg(format!("-dev-listen-address={address}"));
        let bao = OpenBao { _server: Server::start(command, address), address };
        bao.wait();
        bao.ask("sys/mounts/transit", &json!({"type": "transit"}));
        for (name, kind) in [("ec", "ecdsa-p256"), ("rsa", "rsa-2048")] {
            bao.ask(&format!("transit/keys/{name}"), &json!({"type": kind}));
        }
        bao.prepare_identity();
        bao
    }

    fn wait(&self) {
        let health = Request::get(self.address, "/v1/sys/health");
        for _ in 0..200 {
            if health.once().starts_with("HTTP/1.1 200") {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("OpenBao is not ready");
    }

    /// Identity tokens are for those who logged in as somebody, not for root.
    fn prepare_identity(&self) {
        self.ask("identity/oidc/key/ec", &json!({"algorithm": "ES256", "allowed_client_ids": "*"}));
        self.ask("identity/oidc/role/app", &json!({"key": "ec", "ttl": "15m"}));
        self.ask("sys/auth/userpass", &json!({"type": "userpass"}));
        let policy = json!({"policy": "path \"identity/oidc/token/*\" { capabilities = [\"read\"] }"});
        self.ask("sys/policies/acl/tokens", &policy);
        self.ask("auth/userpass/users/app", &json!({"password": "benchmark", "token_policies": "tokens"}));
    }

    /// A signature over what a JWT of ours is signed over, in the form that a JWS has.
    pub fn transit(&self, key: &str, algorithm: &str, message: &str) -> Request {
        use base64::Engine as _;
        let input = base64::engine::general_purpose::STANDARD.encode(message);
        let mut body = json!({"input": input, "marshaling_algorithm": "jws"});
        if algorithm.starts_with("RS") {
            body["signature_algorithm"] = json!("pkcs1v15");
        }
        self.post(&format!("transit/sign/{key}/sha2-256"), &body)
    }

    pub fn identity(&self) -> Request {
        let login = self.ask("auth/userpass/login/app", &json!({"password": "benchmark"}));
        let token = login["auth"]["client_token"].as_str().unwrap().to_owned();
        let text = format!("X-Vault-Token: {token}\r\n");
        Request::get_with(self.address, "/v1/identity/oidc/token/app", &text)
    }

    fn post(&self, path: &str, body: &Value) -> Request {
        Request::post(self.address, &format!("/v1/{path}"), BAO_TOKEN, &body.to_string())
    }

    fn ask(&self, path: &str, content: &Value) -> Value {
        let answer = self.post(path, content).once();
        assert!(answer.starts_with("HTTP/1.1 20"), "{path}: {answer}");
        serde_json::from_str(body(&answer)).unwrap_or_default()
    }
}

/// What one core could sign if nothing else were to be done.
pub enum Loop {
    Es256(EcdsaKeyPair, SystemRandom),
    Rs256(Box<RsaKeyPair>, SystemRandom, Vec<u8>),
}

impl Loop {
    pub fn of(algorithm: &str) -> Self {
        let random = SystemRandom::new();
        match algorithm {
            "ES256" => Loop::Es256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(), random),
            _ => {
                let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
                let signature = vec![0; pair.public_modulus_len()];
                Loop::Rs256(Box::new(pair), random, signature)
            }
        }
    }

    pub fn sign(&mut self, message: &[u8]) {
        match self {
            Loop::Es256(pair, random) => _ = std::hint::black_box(pair.sign(random, message).unwrap()),
            Loop::Rs256(pair, random, signature) => {
                pair.sign(&RSA_PKCS1_SHA256, random, message, signature).unwrap();
                std::hint::black_box(&signature);
            }
        }
    }
}
