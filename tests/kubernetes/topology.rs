//! The plain manifests' managers and the Kustomize example's sidecar as real processes: users, groups, modes and files as
//! kubelets make them, configurations, command lines and probes as rendered. What a cluster would add is replaced: addresses
//! by ports of this machine, names of Services by loopback, AWS KMS by LocalStack, roles by credentials in the environment.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::{Value, json};

use crate::render::{kustomized, manifests, parsed};
use crate::support::localstack::{Account, LocalStack, REGION};
use crate::support::ports::ReservedPort;
use crate::support::postgres::PostgresServer;
use crate::support::{PATIENCE, Process, eventually, http_client};
use crate::workload::{Contents, Root, Workload, items, of_kind, text};

/// The image's user, and the application's in deploy/kustomize/example.
const DAEMON: u32 = 65532;
const APPLICATION: u32 = 10001;

/// A container with its files and the ports that take the place of its own.
struct Pod {
    workload: Workload,
    root: Root,
    binary: PathBuf,
    ports: Vec<(String, ReservedPort)>,
}

/// A key in an AWS account of this test's own.
struct Seal {
    account: Account,
    arn: String,
}

impl Seal {
    async fn new() -> Self {
        let account = LocalStack::shared().await.account();
        let made = account.client.create_key().send().await.unwrap();
        let arn = made.key_metadata().and_then(|key| key.arn()).expect("a key has one").to_owned();
        Seal { account, arn }
    }

    /// Makes it the seal of a workload, which reaches AWS KMS at `endpoint`.
    fn seals(&self, workload: &mut Workload, endpoint: &str) {
        workload.config["seal"] = json!({ "kind": "aws-kms", "key_id": self.arn });
        workload.config["backend"] = json!({ "aws-kms": { "region": REGION, "endpoint_url": endpoint } });
        let variables = workload.container["env"].as_array_mut().expect("it has some");
        for (name, value) in self.account.environment() {
            variables.push(json!({ "name": name, "value": value }));
        }
    }
}

impl Pod {
    fn new(mut workload: Workload, contents: &Contents, binary: &Path) -> Self {
        let mut ports = Vec::new();
        for (listener, _) in workload.reachable() {
            let port = ReservedPort::any();
            workload.config[&listener]["listen"] = json!(format!("127.0.0.1:{}", port.number()));
            ports.push((listener, port));
        }
        let root = Root::of(&workload, contents);
        Pod { workload, root, binary: binary.to_owned(), ports }
    }

    fn port(&self, listener: &str) -> u16 {
        let found = self.ports.iter().find(|(name, _)| name == listener);
        found.unwrap_or_else(|| panic!("no listener {listener}")).1.number()
    }

    fn url(&self, listener: &str, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port(listener))
    }

    /// A command in the container: its user, no capabilities, its environment, and the pod's group.
    fn command(&self, contents: &Contents, arguments: &[String]) -> Command {
        let mut command = self.command_as(DAEMON, true, &self.root.arguments(arguments));
        command.envs(self.root.environment(&self.workload, contents));
        command
    }

    /// A command of some container of the pod; `in_group`: as all of them are, in the group of its fsGroup.
    fn command_as(&self, user: u32, in_group: bool, arguments: &[String]) -> Command {
        let mut command = Command::new("setpriv");
        command.env_clear().env("PATH", "/usr/bin:/bin");
        command.arg(format!("--reuid={user}")).arg(format!("--regid={user}"));
        let group = &self.workload.pod["securityContext"]["fsGroup"];
        command.arg(if in_group { format!("--groups={group}") } else { "--clear-groups".to_owned() });
        command.args(["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]);
        command.arg(&self.binary).args(arguments).current_dir("/");
        command
    }

    fn serve(&self, contents: &Contents) -> Process {
        Process::start(self.command(contents, &self.workload.arguments()))
    }

    /// Asks as the kubelet does.
    async fn passes(&self, contents: &Contents, probe: &Value) -> bool {
        if let Some(get) = probe.get("httpGet") {
            let url = self.url(&text(&get["port"]), &text(&get["path"]));
            let answer = http_client().build().unwrap().get(url).send().await;
            return answer.is_ok_and(|answer| answer.status().is_success());
        }
        let own = format!("127.0.0.1:{}", self.port("ops"));
        let words = items(&probe["exec"]["command"]).skip(1).map(|word| text(word).replace("127.0.0.1:8623", &own));
        let mut command = self.command(contents, &words.collect::<Vec<_>>());
        tokio::task::spawn_blocking(move || command.output().unwrap().status.success()).await.unwrap()
    }

    async fn pass_all_probes(&self, contents: &Contents, process: &Process) {
        for (kind, probe) in self.workload.probes() {
            let asked = async || self.passes(contents, &probe).await.then_some(());
            let passed = eventually(kind, PATIENCE, asked);
            tokio::select! {
                () = passed => {}
                _ = process.output.ended() => panic!("{}: {:#?}", self.workload.name, process.output.lines()),
            }
        }
    }
}

#[tokio::test]
async fn what_is_rendered_publishes_and_signs() {
    assert!(rustix::process::geteuid().is_root(), "this test takes other users' part: run it as root");
    let roles = PostgresServer::shared().await.database().await.with_roles().await;
    let contents = Contents::with_urls(roles.manager, roles.owner);
    let (_folder, binary) = binary_for_everybody();
    let documents = parsed(&kustomized("deploy/kubernetes"));
    let seal = Seal::new().await;

    let mut managers = Workload::all(&documents);
    managers.iter_mut().for_each(|workload| seal.seals(workload, &seal.account.endpoint));
    let served = managers.iter().position(Workload::is_served).expect("a Deployment");
    let manager = Pod::new(managers.remove(served), &contents, &binary);
    let init = Pod::new(managers.remove(0), &contents, &binary);
    let made = succeeds(init.command(&contents, &init.workload.arguments()));
    assert!(made.contains("made the store"), "{made}");
    let running = manager.serve(&contents);
    manager.pass_all_probes(&contents, &running).await;
    let status = succeeds(manager.command(&contents, &["status".to_owned()]));
    assert!(status.contains("default") && status.contains("active"), "{status}");
    succeeds(manager.command(&contents, &["check".to_owned()]));
    only_public_paths_are_answered(&manager, &documents).await;

    a_seal_that_is_away_keeps_no_application_from_starting(&manager, &seal, &contents, &binary).await;

    let mut workload = sidecar_of(&manager);
    seal.seals(&mut workload, &seal.account.endpoint);
    let sidecar = Pod::new(workload, &contents, &binary);
    let mut process = sidecar.serve(&contents);
    sidecar.pass_all_probes(&contents, &process).await;
    the_application_signs(&sidecar, &manager).await;

    // A configuration that is not valid is not taken up, and is no reason to restart the sidecar.
    std::fs::write(sidecar.root.config(), "{").unwrap();
    let refused = |line: &crate::support::LogLine| line.0.to_string().contains("not valid JSON");
    process.log_line("the refusal of the configuration", refused).await.unwrap();
    for (kind, probe) in sidecar.workload.probes() {
        assert!(sidecar.passes(&contents, &probe).await, "{kind}");
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&process.child), rustix::process::Signal::TERM)
        .unwrap();
    process.output.ended().await.unwrap();
    assert!(process.child.wait().unwrap().success(), "{:#?}", process.output.lines());
}

/// With a seal key that was handed out first, the volume is initialised by the pod's init container.
#[tokio::test]
async fn one_process_with_a_file_store_serves_applications() {
    assert!(rustix::process::geteuid().is_root(), "this test takes other users' part: run it as root");
    let contents = Contents::any();
    let (_folder, binary) = binary_for_everybody();
    let mut workloads = Workload::all(&manifests("file", &[]));
    let daemon = workloads.iter().position(Workload::is_served).expect("a Deployment");
    let daemon = Pod::new(workloads.remove(daemon), &contents, &binary);
    let init = daemon.root.arguments(&workloads[0].arguments());
    let made = succeeds(daemon.command_as(DAEMON, true, &init));
    assert!(made.contains("keyrings") && made.contains("operator.token") && !made.contains("seal"), "{made}");
    let running = daemon.serve(&contents);
    daemon.pass_all_probes(&contents, &running).await;
    succeeds(daemon.command(&contents, &["status".to_owned()]));
    let server = format!("https://127.0.0.1:{}", daemon.port("signer"));
    let sign = |token: &str| {
        let (token, ca) = (daemon.root.path(token), daemon.root.path("/run/secrets/jwksd/tls/tls.crt"));
        let mut words =
            vec!["sign", "default", "--sub", "alice", "--aud", "https://api.example.com", "--server", &server];
        let files = [token.display().to_string(), ca.display().to_string()];
        words.extend(["--token-file", &files[0], "--ca-file", &files[1]]);
        daemon.command_as(DAEMON, true, &words.into_iter().map(str::to_owned).collect::<Vec<_>>()).output().unwrap()
    };
    let signed = sign("/run/secrets/jwksd/clients/orders.token");
    assert!(signed.status.success(), "{signed:?}");
    assert_eq!(sign("/var/lib/jwksd/operator.token").status.code(), Some(3), "an operator's token is no client's");
}

/// The example's, with the manager's address.
fn sidecar_of(manager: &Pod) -> Workload {
    let mut workload = Workload::all(&parsed(&kustomized("deploy/kustomize/example"))).remove(0);
    workload.config["store"]["urls"] = json!([format!("https://127.0.0.1:{}", manager.port("replication"))]);
    workload
}

/// An application waits for the sidecar's startup probe, and is restarted and taken out of its Service by no other: both pass
/// while AWS KMS, which holds the seal, cannot be reached, and only signing waits for it.
async fn a_seal_that_is_away_keeps_no_application_from_starting(
    manager: &Pod,
    seal: &Seal,
    contents: &Contents,
    binary: &Path,
) {
    let nobody = ReservedPort::any();
    let mut workload = sidecar_of(manager);
    assert_eq!(workload.config["seal"]["kind"], "aws-kms");
    seal.seals(&mut workload, &format!("http://127.0.0.1:{}", nobody.number()));
    let sidecar = Pod::new(workload, contents, binary);
    let process = sidecar.serve(contents);
    assert_eq!(sidecar.workload.probes().len(), 2);
    sidecar.pass_all_probes(contents, &process).await;
    let own = format!("http://127.0.0.1:{}", sidecar.port("ops"));
    let ready = ["healthcheck", "--sign", "--server", &own].map(str::to_owned);
    let output = sidecar.command(contents, &ready).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("the seal has not been opened yet"), "{output:?}");
}

/// The socket lets in whom the pod's group and the configured user say, and nobody else.
async fn the_application_signs(sidecar: &Pod, manager: &Pod) {
    let socket = format!("unix:{}", sidecar.root.path("/run/jwksd/signer.sock").display());
    let sign = |audience: &str| -> Vec<String> {
        ["sign", "default", "--sub", "alice", "--aud", audience, "--server", &socket].map(str::to_owned).to_vec()
    };
    let good = sign("https://api.example.com");
    let ready = async || sidecar.command_as(APPLICATION, true, &good).output().unwrap().status.success().then_some(());
    eventually("the sidecar to sign", PATIENCE, ready).await;
    let token = succeeds(sidecar.command_as(APPLICATION, true, &good));
    let jwks = manager.url("public", "/.well-known/jwks.json");
    let verify = [
        "verify",
        token.trim(),
        "--jwks",
        &jwks,
        "--iss",
        "https://auth.example.com",
        "--aud",
        "https://api.example.com",
    ];
    succeeds(sidecar.command_as(APPLICATION, true, &verify.map(str::to_owned)));
    for (user, in_group, arguments, code) in [
        (APPLICATION, false, &good, 4),
        (APPLICATION + 1, true, &good, 3),
        (APPLICATION, true, &sign("https://other.example.com"), 3),
    ] {
        let output = sidecar.command_as(user, in_group, arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{user} {in_group} {arguments:?}: {output:?}");
    }
}

/// What the Ingress lets through is there; what other listeners have is not at this one.
async fn only_public_paths_are_answered(manager: &Pod, documents: &[Value]) {
    let client = http_client().timeout(Duration::from_secs(10)).build().unwrap();
    let status = async |path: &str| client.get(manager.url("public", path)).send().await.unwrap().status().as_u16();
    let mut asked = 0;
    for rule in items(&of_kind(documents, "Ingress")[0]["spec"]["rules"]) {
        for path in items(&rule["http"]["paths"]) {
            assert_eq!(status(&text(&path["path"])).await, 200, "{path}");
            asked += 1;
        }
    }
    assert_eq!(asked, 3);
    for path in ["/v1/keysets", "/metrics", "/readyz", "/v1/records"] {
        assert_eq!(status(path).await, 404, "{path}");
    }
}

/// A copy that other users can reach, wherever the build folder is.
fn binary_for_everybody() -> (tempfile::TempDir, PathBuf) {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let binary = folder.path().join("jwksd");
    std::fs::copy(env!("CARGO_BIN_EXE_jwksd"), &binary).unwrap();
    (folder, binary)
}

fn succeeds(mut command: Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {status}\n{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}
