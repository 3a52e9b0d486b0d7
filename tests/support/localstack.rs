//! LocalStack: its KMS keeps key states and signs digests as the service does (moto does neither), and its S3 honours
//! `If-Match` and `If-None-Match`.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::RetryConfig;
use aws_sdk_kms::config::{BehaviorVersion, Credentials, Region};
use tokio::sync::OnceCell;

use super::ports::ReservedPort;
use super::{eventually, http_client, tools};

pub const REGION: &str = "eu-central-1";

/// How long it may take to start on a busy machine.
const START: Duration = Duration::from_secs(120);

/// A running LocalStack: at most one of each service for each test binary, killed with it.
pub struct LocalStack {
    endpoint: String,
    _port: ReservedPort,
}

/// An account of its own within LocalStack: no test sees the keys of another.
#[derive(Clone)]
pub struct Account {
    pub endpoint: String,
    /// LocalStack takes twelve digits for the account.
    pub access_key_id: String,
    pub client: Client,
}

impl LocalStack {
    /// The KMS of this test binary, started by whoever asks first.
    pub async fn shared() -> &'static LocalStack {
        static SHARED: OnceCell<LocalStack> = OnceCell::const_new();
        SHARED.get_or_init(|| LocalStack::start("kms")).await
    }

    /// The S3 of this test binary, started by whoever asks first.
    pub async fn storage() -> &'static LocalStack {
        static SHARED: OnceCell<LocalStack> = OnceCell::const_new();
        SHARED.get_or_init(|| LocalStack::start("s3")).await
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn start(service: &str) -> LocalStack {
        let port = ReservedPort::any();
        let endpoint = format!("http://127.0.0.1:{}", port.number());
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("localstack-{}", port.number()));
        std::fs::create_dir_all(&root).expect("the target folder is writable");
        let log = root.join("localstack.log");
        let output = std::fs::File::create(&log).expect("the folder is writable");
        let mut command = Command::new(tools::localstack());
        command.args(["-m", "localstack.runtime.main"]).current_dir(&root);
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path))).env("HOME", &root);
        command.env("GATEWAY_LISTEN", format!("127.0.0.1:{}", port.number()));
        for (name, value) in [
            ("GATEWAY_SERVER", "hypercorn"),
            ("SERVICES", service),
            ("DNS_ADDRESS", "0"),
            ("DISABLE_EVENTS", "1"),
            ("SKIP_SSL_CERT_DOWNLOAD", "1"),
            ("DISABLE_UPDATES", "1"),
        ] {
            command.env(name, value);
        }
        command.env("FILESYSTEM_ROOT", &root).env("TMPDIR", &root);
        command.stdin(Stdio::null()).stdout(output.try_clone().expect("a file")).stderr(output);
        keep(command);
        eventually(&format!("LocalStack ({})", log.display()), START, async || {
            let health = http_client().build().ok()?.get(format!("{endpoint}/_localstack/health")).send().await.ok()?;
            let health: serde_json::Value = health.json().await.ok()?;
            matches!(health["services"][service].as_str(), Some("available" | "running")).then_some(())
        })
        .await;
        LocalStack { endpoint, _port: port }
    }

    /// A new account.
    pub fn account(&self) -> Account {
        static NEXT: AtomicU64 = AtomicU64::new(100_000_000_001);
        let access_key_id = NEXT.fetch_add(1, Ordering::Relaxed).to_string();
        let client = client(&self.endpoint, &access_key_id);
        Account { endpoint: self.endpoint.clone(), access_key_id, client }
    }
}

impl Account {
    /// Set these for a process that is to use this account.
    pub fn environment(&self) -> [(&'static str, String); 3] {
        [
            ("AWS_ACCESS_KEY_ID", self.access_key_id.clone()),
            ("AWS_SECRET_ACCESS_KEY", "not-a-secret".to_owned()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ]
    }
}

/// A client of the tests' own, for preparing and for looking at what became of keys.
pub fn client(endpoint: &str, access_key_id: &str) -> Client {
    let credentials = Credentials::new(access_key_id, "not-a-secret", None, None, "tests");
    let config = aws_sdk_kms::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new(REGION))
        .endpoint_url(endpoint)
        .retry_config(RetryConfig::disabled())
        .credentials_provider(credentials);
    Client::from_conf(config.build())
}

/// Starts a process that is killed when this one ends, however it ends. LocalStack ends on nothing but SIGKILL.
fn keep(mut command: Command) {
    // The signal comes when the starting *thread* ends, and tests have threads of their own: this one outlives them.
    let (started, outcome) = std::sync::mpsc::channel::<std::io::Result<()>>();
    std::thread::spawn(move || {
        // SAFETY: prctl is async-signal-safe and touches nothing of the parent.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        match command.spawn() {
            Ok(mut child) => {
                let _ = started.send(Ok(()));
                let _ = child.wait();
            }
            Err(error) => _ = started.send(Err(error)),
        }
    });
    outcome.recv().expect("the thread answers").expect("LocalStack's Python starts");
}
