//! Containers that run jwksd, and what must be true of each.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::configuration;

/// Where the image has the binary.
const BINARY: &str = "/usr/local/bin/jwksd";

/// What the ops listener answers (README, HTTP API).
const OPS_PATHS: [&str; 3] = ["/livez", "/readyz", "/readyz/sign"];

/// A container that runs jwksd, with the pod around it.
pub struct Workload {
    /// `Deployment orders`.
    pub name: String,
    pub labels: Value,
    /// The pod's spec.
    pub pod: Value,
    pub container: Value,
    /// The name of the ConfigMap's key.
    pub config_file: String,
    pub config: Value,
}

impl Workload {
    /// Those of all pods among `documents`, whose ConfigMaps are there too.
    pub fn all(documents: &[Value]) -> Vec<Workload> {
        let mut all = Vec::new();
        for document in documents {
            let template = &document["spec"]["template"];
            let pod = &template["spec"];
            let containers = ["initContainers", "containers"].into_iter().flat_map(|list| items(&pod[list]));
            for container in containers.filter(|container| container["command"][0] == BINARY) {
                let (config_file, config) = mounted_config(documents, pod, container);
                all.push(Workload {
                    name: format!("{} {}", text(&document["kind"]), text(&document["metadata"]["name"])),
                    labels: template["metadata"]["labels"].clone(),
                    pod: pod.clone(),
                    container: container.clone(),
                    config_file,
                    config,
                });
            }
        }
        all
    }

    /// Not a Job: it goes on.
    pub fn is_served(&self) -> bool {
        self.arguments().contains(&"serve".to_owned())
    }

    pub fn is_sidecar(&self) -> bool {
        self.container["restartPolicy"] == "Always"
    }

    pub fn arguments(&self) -> Vec<String> {
        items(&self.container["command"]).chain(items(&self.container["args"])).skip(1).map(text).collect()
    }

    /// Pod Security Standards, restricted; and what else keeps a process with private keys to itself.
    pub fn assert_confined(&self) {
        let name = &self.name;
        let own = &self.container["securityContext"];
        for (path, wanted) in [
            ("/runAsNonRoot", Value::from(true)),
            ("/runAsUser", 65532.into()),
            ("/runAsGroup", 65532.into()),
            ("/allowPrivilegeEscalation", false.into()),
            ("/readOnlyRootFilesystem", true.into()),
            ("/capabilities/drop/0", "ALL".into()),
            ("/seccompProfile/type", "RuntimeDefault".into()),
        ] {
            assert_eq!(own.pointer(path), Some(&wanted), "{name}: securityContext{path}");
        }
        assert!(own["capabilities"]["add"].is_null());
        assert!(self.pod["securityContext"]["fsGroup"].is_number(), "{name}: without fsGroup secrets are root's alone");
        assert_eq!(self.pod["securityContext"]["runAsNonRoot"], true);
        for member in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"] {
            assert!(self.pod[member].is_null(), "{name}: {member}");
        }
        assert_eq!(self.pod["automountServiceAccountToken"], false, "{name}");
        let resources = &self.container["resources"];
        assert!(
            resources["limits"]["memory"].is_string() && resources["limits"]["cpu"].is_null(),
            "{name}: {resources}"
        );
        assert!(resources["requests"]["memory"].is_string() && resources["requests"]["cpu"].is_string(), "{name}");
        if self.is_served() && !self.is_sidecar() {
            let delay = configuration(&self.config).shutdown_delay.as_secs();
            let grace = self.pod["terminationGracePeriodSeconds"].as_i64().unwrap();
            assert!(grace >= delay + 10, "{name}: {grace} s for a shutdown_delay of {delay} s");
        }
    }

    /// Every path in the configuration is in a volume, those that are written in one that can be.
    pub fn assert_mounts_cover_the_configuration(&self) {
        let mounts = self.mounts();
        for (key, path) in paths(&self.config) {
            let covering = mounts.iter().filter(|mount| Path::new(&path).starts_with(&mount.path));
            let mount = covering.max_by_key(|mount| mount.path.len());
            let mount = mount.unwrap_or_else(|| panic!("{}: {key} = {path} is in no volume", self.name));
            let written = is_written(&key);
            assert!(
                !written || !mount.read_only,
                "{}: {key} = {path} is in a volume that cannot be written",
                self.name
            );
            let secret = mount.volume["secret"].is_object();
            assert!(
                written || secret || mount.path == "/var/lib/jwksd",
                "{}: {key} = {path} is no secret's",
                self.name
            );
        }
    }

    /// Containers announce exactly the listeners that can be reached from outside.
    pub fn assert_ports_are_the_listeners(&self) {
        let announced: BTreeSet<(String, u64)> = items(&self.container["ports"])
            .map(|port| {
                let name = text(&port["name"]);
                (name.strip_prefix("jwksd-").unwrap_or(&name).to_owned(), port["containerPort"].as_u64().unwrap())
            })
            .collect();
        let wanted = if self.is_served() { self.reachable() } else { BTreeSet::new() };
        assert_eq!(announced, wanted, "{}", self.name);
    }

    /// Names and ports of the listeners that can be reached from outside the pod.
    pub fn reachable(&self) -> BTreeSet<(String, u64)> {
        let config = configuration(&self.config);
        let remote = config.listeners().filter(|(_, listener)| !listener.address.is_local());
        remote.map(|(name, listener)| (name.to_owned(), port_of(&listener.address.to_string()))).collect()
    }

    pub fn port(&self, listener: &str) -> u64 {
        port_of(&text(&self.config[listener]["listen"]))
    }

    pub fn assert_probes_ask_the_ops_listener(&self) {
        for (kind, probe) in self.probes() {
            let name = format!("{} {kind}", self.name);
            if let Some(get) = probe.get("httpGet") {
                assert_eq!(get["port"], "ops", "{name}");
                assert!(OPS_PATHS.contains(&text(&get["path"]).as_str()), "{name}: {get}");
                let tls = !self.config["ops"]["tls"].is_null();
                assert_eq!(get["scheme"], if tls { "HTTPS" } else { "HTTP" }, "{name}");
            } else {
                let command: Vec<String> = items(&probe["exec"]["command"]).map(text).collect();
                assert_eq!(command[0], BINARY, "{name}");
                assert!(command.contains(&format!("http://127.0.0.1:{}", self.port("ops"))), "{name}: {command:?}");
                assert_understood(&command[1..]);
            }
            // What is beyond the process is no reason to restart it.
            let asks_for_more = probe.to_string().contains("readyz") || probe.to_string().contains("--sign");
            assert!(kind != "livenessProbe" || !asks_for_more, "{name}");
        }
        let kinds: BTreeSet<&str> = self.probes().into_iter().map(|(kind, _)| kind).collect();
        let least: &[&str] = match (self.is_served(), self.is_sidecar()) {
            (false, _) => &[],
            (true, true) => &["startupProbe", "livenessProbe"],
            (true, false) => &["startupProbe", "livenessProbe", "readinessProbe"],
        };
        assert!(least.iter().all(|kind| kinds.contains(kind)), "{}: {kinds:?}", self.name);
    }

    pub fn probes(&self) -> Vec<(&'static str, Value)> {
        let kinds = ["startupProbe", "livenessProbe", "readinessProbe"].into_iter();
        kinds.map(|kind| (kind, self.container[kind].clone())).filter(|(_, probe)| !probe.is_null()).collect()
    }

    /// Its command line is one, and `jwksd check` has nothing against its configuration, files and environment.
    pub fn assert_accepted_by_the_binary(&self, contents: &Contents) {
        assert_understood(&self.arguments());
        let root = Root::of(self, contents);
        let mut check = Command::new(env!("CARGO_BIN_EXE_jwksd"));
        check.env_clear().envs(root.environment(self, contents)).arg("check");
        let output = check.output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {told}", self.name);
        // Of modes, for one: the volumes' are the kubelet's.
        assert!(!told.contains("everyone on this machine"), "{}: {told}", self.name);
    }

    pub fn mounts(&self) -> Vec<Mount> {
        let volumes: BTreeMap<String, &Value> = items(&self.pod["volumes"]).map(|v| (text(&v["name"]), v)).collect();
        let mount = |mount: &Value| {
            // Such a file never changes, whatever becomes of its Secret.
            assert!(mount["subPath"].is_null(), "{}: {mount}", self.name);
            let name = text(&mount["name"]);
            let volume = volumes.get(&name).unwrap_or_else(|| panic!("{}: there is no volume {name}", self.name));
            let read_only = mount["readOnly"] == true;
            Mount { path: text(&mount["mountPath"]), read_only, volume: (*volume).clone() }
        };
        items(&self.container["volumeMounts"]).map(mount).collect()
    }

    fn config_folder(&self) -> String {
        self.mounts().into_iter().find(|mount| mount.volume["configMap"].is_object()).expect("there is one").path
    }
}

/// A volume where the container sees it.
pub struct Mount {
    pub path: String,
    pub read_only: bool,
    pub volume: Value,
}

/// What the files of Secrets hold.
pub struct Contents {
    pub certificate: String,
    pub key: String,
    pub manager_url: String,
    pub owner_url: String,
}

impl Contents {
    /// For who only looks at them.
    pub fn any() -> Self {
        let url = |user: &str| format!("postgres://{user}:secret@database.example.com/jwksd");
        Self::with_urls(url("jwksd_manager"), url("jwksd_owner"))
    }

    pub fn with_urls(manager_url: String, owner_url: String) -> Self {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        Contents { certificate: cert.pem(), key: signing_key.serialize_pem(), manager_url, owner_url }
    }

    /// What is in a Secret under a key. Of one name, whoever mounts it finds the same.
    pub fn of(&self, secret: &str, key: &str) -> String {
        match key.rsplit('/').next().unwrap() {
            "tls.key" => self.key.clone(),
            file if file.ends_with(".crt") => self.certificate.clone(),
            "url" if secret.ends_with("owner") => self.owner_url.clone(),
            "url" => self.manager_url.clone(),
            file if file.ends_with(".key") => format!("jwksd-seal-v1:{}A\n", "s".repeat(42)),
            file => format!("{file}-of-a-secret-that-exists-0123456789\n"),
        }
    }
}

/// A folder that stands for the container's root, with everything mounted as a kubelet does it.
pub struct Root {
    folder: TempDir,
    config: PathBuf,
}

impl Root {
    pub fn of(workload: &Workload, contents: &Contents) -> Root {
        let folder = tempfile::Builder::new().prefix("jk").tempdir().unwrap();
        set_mode(folder.path(), 0o755);
        let group = workload.pod["securityContext"]["fsGroup"].as_u64().unwrap();
        let root = Root { config: PathBuf::new(), folder };
        let files: Vec<String> = paths(&workload.config).into_iter().map(|(_, path)| path).collect();
        for mount in workload.mounts() {
            let at = root.path(&mount.path);
            std::fs::create_dir_all(&at).unwrap();
            let secret = text_or_empty(&mount.volume["secret"]["secretName"]);
            let owner = text_or_empty(&mount.volume["secret"]["secretName"]).ends_with("owner");
            let own = files.iter().filter(|path| Path::new(path).starts_with(&mount.path)).cloned();
            let own = own.chain(owner.then(|| format!("{}/url", mount.path)));
            for path in own.filter(|_| !secret.is_empty()) {
                let file = root.path(&path);
                std::fs::create_dir_all(file.parent().unwrap()).unwrap();
                std::fs::write(&file, contents.of(&secret, &path)).unwrap();
                give(&file, group, mode_of(&mount.volume["secret"]["defaultMode"]));
            }
            if mount.volume["emptyDir"].is_object() || mount.volume["persistentVolumeClaim"].is_object() {
                // As SetVolumeOwnership of the kubelet leaves it: the group may write, and what is made in it is the group's.
                give(&at, group, 0o2775);
            }
        }
        let folder = root.path(&workload.config_folder());
        let config = folder.join(&workload.config_file);
        std::fs::write(&config, relocated(&workload.config, &root).to_string()).unwrap();
        set_mode(&config, 0o444);
        Root { config, ..root }
    }

    /// A path of the container.
    pub fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path.trim_start_matches('/'))
    }

    /// The configuration, with paths into this folder.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Variables of the container; those that name files lead into this folder.
    pub fn environment(&self, workload: &Workload, contents: &Contents) -> Vec<(String, String)> {
        let value = |variable: &Value| match variable["value"].as_str() {
            Some(value) if value.starts_with('/') => self.path(value).display().to_string(),
            Some(value) => value.to_owned(),
            None => {
                let source = &variable["valueFrom"]["secretKeyRef"];
                contents.of(&text(&source["name"]), &text(&source["key"])).trim_end().to_owned()
            }
        };
        items(&workload.container["env"]).map(|variable| (text(&variable["name"]), value(variable))).collect()
    }

    /// A command line of the container, with paths into this folder.
    pub fn arguments(&self, arguments: &[String]) -> Vec<String> {
        let relocate = |argument: &String| {
            if argument.starts_with('/') { self.path(argument).display().to_string() } else { argument.clone() }
        };
        arguments.iter().map(relocate).collect()
    }
}

/// The file of the ConfigMap in the folder where the command line looks for it, and its content.
fn mounted_config(documents: &[Value], pod: &Value, container: &Value) -> (String, Value) {
    let command: Vec<String> = items(&container["command"]).map(text).collect();
    let at = command.iter().position(|word| word == "--config").expect("the command names its configuration") + 1;
    let (folder, file) = command[at].rsplit_once('/').unwrap();
    let mount = items(&container["volumeMounts"]).find(|mount| mount["mountPath"] == folder).expect("it is mounted");
    let volume = items(&pod["volumes"]).find(|volume| volume["name"] == mount["name"]).expect("it is a volume");
    let name = &volume["configMap"]["name"];
    let map = of_kind(documents, "ConfigMap").into_iter().find(|map| map["metadata"]["name"] == *name);
    let map = map.unwrap_or_else(|| panic!("there is no ConfigMap {name}"));
    // Only by this name is it read as JSON.
    assert!(file.ends_with(".json"));
    let named = items(&container["env"]).find(|variable| variable["name"] == "JWKSD_CONFIG").expect("for kubectl exec");
    assert_eq!(named["value"], command[at].as_str());
    (file.to_owned(), serde_json::from_str(&text(&map["data"][file])).unwrap())
}

/// Keys and values of whatever is a path in a configuration, sockets included.
fn paths(config: &Value) -> Vec<(String, String)> {
    fn walk(at: String, value: &Value, found: &mut Vec<(String, String)>) {
        match value {
            Value::Object(members) => {
                members.iter().for_each(|(name, value)| walk(format!("{at}.{name}"), value, found));
            }
            // Paths of URLs.
            Value::Array(_) => {}
            Value::String(text) => {
                let path = text.strip_prefix("unix:").unwrap_or(text);
                if path.starts_with('/') {
                    found.push((at, path.to_owned()));
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(String::new(), config, &mut found);
    found
}

fn is_written(key: &str) -> bool {
    key.ends_with(".listen") || key.ends_with("state_path") || key == ".store.path" || key.contains(".publish.")
}

fn relocated(value: &Value, root: &Root) -> Value {
    match value {
        Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), relocated(value, root))).collect(),
        Value::String(text) if text.starts_with('/') => root.path(text).display().to_string().into(),
        Value::String(text) if text.starts_with("unix:/") => {
            format!("unix:{}", root.path(&text["unix:".len()..]).display()).into()
        }
        other => other.clone(),
    }
}

/// The binary's parser takes these words: with `--help` at the end it does nothing else.
fn assert_understood(arguments: &[String]) {
    let output = Command::new(env!("CARGO_BIN_EXE_jwksd")).args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Root's, and the group's of the pod, as a kubelet leaves it. Who is not root can only set the mode.
fn give(path: &Path, group: u64, mode: u32) {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(0), Some(u32::try_from(group).unwrap())).unwrap();
    }
    set_mode(path, mode);
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode_of(value: &Value) -> u32 {
    u32::try_from(value.as_u64().expect("secrets are mounted with a mode")).unwrap()
}

pub fn port_of(address: &str) -> u64 {
    address.rsplit(':').next().unwrap().parse().unwrap_or_else(|_| panic!("{address} has no port"))
}

pub fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

pub fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

fn text_or_empty(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
