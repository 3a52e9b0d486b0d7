//! The verifiers that stand before a running daemon, behind one question: is this token accepted?

use std::path::PathBuf;
use std::process::{Command as StdCommand, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::support::strict_verifier::{Expected, StrictVerifier};
use crate::support::{PATIENCE, Process, eventually, tools};

/// Accepts a token or says why not. A verifier that breaks down fails the test instead.
#[async_trait]
pub trait Verifier: Send + Sync {
    fn name(&self) -> &str;

    async fn verify(&self, token: &str) -> Result<(), String>;

    /// What stands in the rejection of a token because it has expired, and after how long beyond `exp` it does.
    fn expiry(&self) -> (&'static str, Duration);
}

/// Where verifiers find the keys and what they are set up to accept.
#[derive(Clone, Debug)]
pub struct Setting {
    pub jwks_url: String,
    pub expected: Expected,
    /// How long each verifier keeps a document, in whole seconds.
    pub cache: Duration,
}

/// A program of `tests/interop/python` or `tests/interop/node` and what it can verify.
pub struct Program {
    file: &'static str,
    algorithms: &'static [&'static str],
    expired: &'static str,
    /// Some libraries let a token through in the very second of its `exp`.
    slack: Duration,
}

const EVERY_ALGORITHM: &[&str] = &["ES256", "ES384", "RS256", "PS256", "EdDSA"];

pub const PROGRAMS: [Program; 6] = [
    Program {
        file: "python/pyjwt_verifier.py",
        algorithms: EVERY_ALGORITHM,
        expired: "ExpiredSignatureError",
        slack: Duration::ZERO,
    },
    Program {
        file: "python/joserfc_verifier.py",
        algorithms: EVERY_ALGORITHM,
        expired: "ExpiredTokenError",
        slack: Duration::ZERO,
    },
    Program {
        file: "python/authlib_verifier.py",
        algorithms: EVERY_ALGORITHM,
        expired: "ExpiredTokenError",
        slack: Duration::from_secs(1),
    },
    Program {
        file: "python/jwcrypto_verifier.py",
        algorithms: EVERY_ALGORITHM,
        expired: "JWTExpired",
        slack: Duration::from_secs(1),
    },
    Program {
        file: "node/jose_verifier.mjs",
        algorithms: EVERY_ALGORITHM,
        expired: "ERR_JWT_EXPIRED",
        slack: Duration::ZERO,
    },
    Program {
        file: "node/jsonwebtoken_verifier.cjs",
        algorithms: &["ES256", "ES384", "RS256", "PS256"],
        expired: "TokenExpiredError",
        slack: Duration::ZERO,
    },
];

/// A started [`Program`], spoken to in lines of JSON. Dropping it kills it.
struct LineVerifier {
    program: &'static Program,
    setting: Setting,
    exchange: Mutex<Exchange>,
    _child: Child,
}

struct Exchange {
    requests: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

/// Starts every verifier that knows the algorithm and waits until each is ready.
pub async fn all(setting: &Setting) -> Vec<Box<dyn Verifier>> {
    let mut verifiers: Vec<Box<dyn Verifier>> = Vec::new();
    let able = PROGRAMS.iter().filter(|program| program.algorithms.contains(&setting.expected.alg.as_str()));
    let started: Vec<_> = able.map(|program| LineVerifier::start(program, setting)).collect();
    verifiers.push(Box::new(Envoy::start(setting).await));
    for verifier in started {
        verifier.ready().await;
        verifiers.push(Box::new(verifier));
    }
    verifiers.extend(Strict::set(setting).await.into_iter().map(|strict| Box::new(strict) as Box<dyn Verifier>));
    verifiers
}

impl LineVerifier {
    fn start(program: &'static Program, setting: &Setting) -> Self {
        let interpreter = if program.file.starts_with("python") { tools::python() } else { tools::node() };
        let mut child = Command::new(interpreter)
            .arg(tools::repository("tests/interop").join(program.file))
            .args([&setting.jwks_url, &setting.cache.as_secs().to_string()])
            .env("NODE_PATH", tools::node_modules())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("NO_PROXY", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.file));
        let requests = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let exchange = Mutex::new(Exchange { requests, answers });
        LineVerifier { program, setting: setting.clone(), exchange, _child: child }
    }

    async fn ready(&self) {
        let first = self.answer(&mut *self.exchange.lock().await).await;
        assert_eq!(first["ready"], true, "{}: {first}", self.program.file);
    }

    async fn answer(&self, exchange: &mut Exchange) -> Value {
        let line = timeout(PATIENCE, exchange.answers.next_line())
            .await
            .unwrap_or_else(|_| panic!("{} did not answer within {PATIENCE:?}", self.program.file))
            .expect("its output can be read")
            .unwrap_or_else(|| panic!("{} ended", self.program.file));
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{}: {error}: {line}", self.program.file))
    }
}

#[async_trait]
impl Verifier for LineVerifier {
    fn name(&self) -> &str {
        self.program.file
    }

    async fn verify(&self, token: &str) -> Result<(), String> {
        let Expected { iss, aud, alg } = &self.setting.expected;
        let request = json!({"token": token, "iss": iss, "aud": aud, "alg": alg});
        let mut exchange = self.exchange.lock().await;
        exchange.requests.write_all(format!("{request}\n").as_bytes()).await.expect("it reads its input");
        let answer = self.answer(&mut exchange).await;
        match answer["ok"].as_bool() {
            Some(true) => Ok(()),
            Some(false) => Err(answer["error"].as_str().unwrap_or_default().to_owned()),
            None => panic!("{}: {answer}", self.program.file),
        }
    }

    fn expiry(&self) -> (&'static str, Duration) {
        (self.program.expired, self.program.slack)
    }
}

/// Envoy's `jwt_authn` in front of a route that answers 200 by itself. Dropping it kills it.
pub struct Envoy {
    url: String,
    /// Where its own counters are.
    pub admin: String,
    http: reqwest::Client,
    process: Process,
    _folder: TempDir,
}

impl Envoy {
    async fn start(setting: &Setting) -> Self {
        Envoy::run(&Envoy::config(setting)).await
    }

    /// With one listener, whose port and that of `admin` are 0.
    pub async fn run(yaml: &str) -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let (config, admin) = (folder.path().join("envoy.yaml"), folder.path().join("admin"));
        std::fs::write(&config, yaml).expect("the folder is writable");
        let mut command = StdCommand::new(tools::envoy());
        command.args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]).args([
            PathBuf::from("--config-path"),
            config,
            PathBuf::from("--admin-address-path"),
            admin.clone(),
        ]);
        let process = Process::start(command);
        let http =
            reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().expect("a client without TLS set-up");
        let (url, admin) = eventually("Envoy to listen", PATIENCE, async || {
            assert!(!process.output.has_ended(), "Envoy ended:\n{}", process.output.lines().join("\n"));
            let admin = std::fs::read_to_string(&admin).ok().filter(|address| !address.is_empty())?;
            let listeners = http.get(format!("http://{admin}/listeners?format=json")).send().await.ok()?;
            let listeners: Value = listeners.json().await.ok()?;
            let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
            Some((format!("http://127.0.0.1:{}/", address["port_value"].as_u64()?), admin))
        })
        .await;
        Envoy { url, admin, http, process, _folder: folder }
    }

    fn config(setting: &Setting) -> String {
        let url: http::Uri = setting.jwks_url.parse().expect("a URL");
        let port = url.port_u16().expect("a port").to_string();
        let template = tools::repository("tests/interop/envoy.yaml");
        let template = std::fs::read_to_string(template).expect("it is in the repository");
        [
            ("@ISSUER@", setting.expected.iss.as_str()),
            ("@AUDIENCE@", &setting.expected.aud),
            ("@JWKS_URL@", &setting.jwks_url),
            ("@JWKS_PORT@", &port),
            ("@CACHE_SECONDS@", &setting.cache.as_secs().to_string()),
        ]
        .iter()
        .fold(template, |config, (word, value)| config.replace(word, value))
    }
}

#[async_trait]
impl Verifier for Envoy {
    fn name(&self) -> &str {
        "envoy jwt_authn"
    }

    async fn verify(&self, token: &str) -> Result<(), String> {
        let response = self.http.get(&self.url).bearer_auth(token).send().await;
        let response = response.unwrap_or_else(|e| panic!("Envoy: {e:?}\n{}", self.process.output.lines().join("\n")));
        let status = response.status().as_u16();
        let text = response.text().await.expect("Envoy's answer can be read");
        match status {
            200 => Ok(()),
            401 | 403 => Err(format!("{status} {text}")),
            _ => panic!("Envoy answered {status} {text}\n{}", self.process.output.lines().join("\n")),
        }
    }

    fn expiry(&self) -> (&'static str, Duration) {
        ("Jwt is expired", Duration::from_secs(2))
    }
}

/// The tests' own verifier.
struct Strict {
    name: String,
    expected: Expected,
    verifier: Mutex<StrictVerifier>,
}

impl Strict {
    /// How many there are: their fetches are spread over the time one of them holds a document, so that whenever a
    /// rotation comes, some of them hold a document nearly as old as a document can be.
    const PHASES: u32 = 4;

    /// Starts the fetches one after the other, which takes most of one holding time.
    async fn set(setting: &Setting) -> Vec<Strict> {
        let mut set = Vec::new();
        for phase in 0..Strict::PHASES {
            if phase > 0 {
                tokio::time::sleep(setting.cache * 2 / Strict::PHASES).await;
            }
            let mut verifier = StrictVerifier::new(setting.jwks_url.clone(), setting.cache);
            verifier.hold_a_document().await.unwrap_or_else(|rejection| panic!("the first fetch: {rejection}"));
            let name = format!("strict verifier {phase}");
            set.push(Strict { name, expected: setting.expected.clone(), verifier: Mutex::new(verifier) });
        }
        set
    }
}

#[async_trait]
impl Verifier for Strict {
    fn name(&self) -> &str {
        &self.name
    }

    async fn verify(&self, token: &str) -> Result<(), String> {
        let verdict = self.verifier.lock().await.verify(token, &self.expected).await;
        verdict.map(drop).map_err(|rejection| rejection.to_string())
    }

    fn expiry(&self) -> (&'static str, Duration) {
        ("expired", Duration::ZERO)
    }
}
