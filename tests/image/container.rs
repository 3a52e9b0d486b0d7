//! An image in a storage of its own, and a process in it.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::ports::ReservedPort;
use crate::support::{PATIENCE, Process, eventually, http_client, tools};
use crate::{DOCKERFILE, USER, lay_out, output};

const NAME: &str = "jwksd:test";
pub const REVISION: &str = "0123abc";

/// How long the daemon goes on, unready, after it was told to stop: time to look at it, on a busy machine too.
const SHUTDOWN_DELAY: &str = "5s";

/// What was built, with a container of it that is mounted.
pub struct Image {
    storage: TempDir,
    container: String,
    pub root: PathBuf,
    pub config: Value,
    /// Every file as it was built.
    built: Vec<(PathBuf, Metadata)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    pub uid: u32,
    pub mode: u32,
    pub is_file: bool,
    pub is_link: bool,
    len: u64,
    modified: (i64, i64),
}

impl Image {
    /// As docs/docker.md says for a binary of one's own: this build's.
    pub fn build() -> Image {
        let folder = TempDir::new().unwrap();
        let (stripped, rootfs) = (folder.path().join("jwksd"), folder.path().join("rootfs"));
        output(Command::new("strip").arg("-o").arg(&stripped).arg(env!("CARGO_BIN_EXE_jwksd")));
        lay_out(&stripped, &rootfs);
        let context = format!("rootfs={}", rootfs.display());
        let revision = format!("REVISION={REVISION}");
        let arguments = ["--build-arg", &revision, "--build-context", &context];
        Image::build_from(&tools::repository(DOCKERFILE), &arguments)
    }

    /// With the repository as the context.
    pub fn build_from(dockerfile: &Path, arguments: &[&str]) -> Image {
        let root = rustix::process::geteuid().is_root();
        assert!(root, "buildah without a user namespace needs root: run the tests as root");
        let storage = TempDir::new().unwrap();
        let mut image =
            Image { storage, container: String::new(), root: PathBuf::new(), config: Value::Null, built: Vec::new() };
        let mut build = image.buildah(&["build", "--format", "docker", "--tag", NAME]);
        build.args(arguments).arg("--file").arg(dockerfile).arg(tools::repository("."));
        output(&mut build);
        image.container = output(&mut image.buildah(&["from", "--pull-never", NAME])).trim().to_owned();
        image.root = output(&mut image.buildah(&["mount", &image.container])).trim().into();
        image.built = image.files();
        let inspected = output(&mut image.buildah(&["inspect", "--type", "image", NAME]));
        image.config = serde_json::from_str::<Value>(&inspected).unwrap()["Docker"]["config"].take();
        image
    }

    pub fn buildah(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(tools::buildah());
        // Neither needs what a container has not: namespaces of its own, overlays.
        command.env("BUILDAH_ISOLATION", "chroot").args(["--storage-driver", "vfs"]);
        command.arg("--root").arg(self.storage.path().join("storage"));
        command.arg("--runroot").arg(self.storage.path().join("run"));
        command.args(arguments);
        command
    }

    /// Its files' bytes together.
    pub fn size(&self) -> u64 {
        self.built.iter().map(|(_, metadata)| metadata.len).sum()
    }

    /// All that is in it, by path, as it is now.
    pub fn files(&self) -> Vec<(PathBuf, Metadata)> {
        let (mut folders, mut files) = (vec![self.root.clone()], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
                let found = entry.metadata().unwrap();
                if found.is_dir() {
                    folders.push(entry.path());
                }
                let metadata = Metadata {
                    uid: found.uid(),
                    mode: found.mode() & 0o7777,
                    is_file: found.is_file(),
                    is_link: found.is_symlink(),
                    len: if found.is_file() { found.len() } else { 0 },
                    modified: (found.mtime(), found.mtime_nsec()),
                };
                files.push((entry.path().strip_prefix(&self.root).unwrap().to_owned(), metadata));
            }
        }
        files.sort_by(|a, b| a.0.cmp(&b.0));
        files
    }

    /// Paths that are not as they were built.
    pub fn changed(&self) -> Vec<String> {
        // What buildah itself puts there to mount on.
        let made = |path: &Path| {
            let first = path.components().next().map(|first| first.as_os_str().to_owned()).unwrap_or_default();
            ["dev", "proc", "sys"].contains(&&*first.to_string_lossy())
                || ["etc", "run", "etc/hosts", "etc/hostname", "etc/resolv.conf", "run/.containerenv"]
                    .contains(&&*path.to_string_lossy())
        };
        let now = self.files();
        let changed = now.iter().filter(|file| !self.built.contains(file) && !made(&file.0));
        changed.map(|(path, _)| path.display().to_string()).collect()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = self.buildah(&["umount", &self.container]).output();
    }
}

/// The daemon in the image, with volumes for what it writes.
pub struct Container<'a> {
    image: &'a Image,
    volumes: TempDir,
    ports: [ReservedPort; 2],
    shutdown_delay: &'static str,
    process: Option<Process>,
}

impl<'a> Container<'a> {
    /// As an engine runs it: with the image's user, entry point, command and environment. `tables` come to its configuration.
    pub async fn run(image: &'a Image, tables: &str) -> Container<'a> {
        let volumes = TempDir::new().unwrap();
        for name in ["lib", "run"] {
            fs::create_dir(volumes.path().join(name)).unwrap();
            chown(volumes.path().join(name), Some(USER), Some(USER)).unwrap();
        }
        let config = fs::read_to_string(image.root.join("etc/jwksd/jwksd.toml")).unwrap() + "\n" + tables;
        fs::write(volumes.path().join("jwksd.toml"), config).unwrap();
        let mut container = Container {
            image,
            volumes,
            ports: [ReservedPort::any(), ReservedPort::any()],
            shutdown_delay: SHUTDOWN_DELAY,
            process: None,
        };
        let mut run = container.in_buildah();
        run.args(container.words());
        container.process = Some(Process::start(run));
        container.ready().await;
        container
    }

    /// A command in the image beside the daemon, in its user's name; not by way of its entry point.
    pub fn inside(&self, words: &[&str]) -> Output {
        self.in_buildah().args(words).output().unwrap()
    }

    /// The image's own check, with its exit code. As its process alone, which is faster than an engine.
    pub fn healthcheck(&self) -> i32 {
        let test = &self.image.config["Healthcheck"]["Test"];
        let words: Vec<&str> = test.as_array().unwrap().iter().skip(1).filter_map(Value::as_str).collect();
        let mut check = Command::new("chroot");
        check.arg(format!("--userspec={USER}:{USER}")).arg(&self.image.root).args(words);
        check.env_clear().envs(self.variables()).env("JWKSD_CONFIG", "/etc/jwksd/jwksd.toml");
        // For chroot itself.
        let done = check.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap();
        done.status.code().unwrap_or_else(|| panic!("{done:?}"))
    }

    pub async fn kid(&self) -> String {
        let url = format!("http://127.0.0.1:{}/.well-known/jwks.json", self.ports[0].number());
        let document = http_client().build().unwrap().get(url).send().await.unwrap().json::<Value>().await.unwrap();
        document["keys"][0]["kid"].as_str().unwrap().to_owned()
    }

    pub async fn sign(&self, request: &Value) -> Value {
        let socket = self.volumes.path().join("run/signer.sock");
        let client = http_client().unix_socket(socket).build().unwrap();
        let answer = client.post("http://localhost/v1/keysets/default/sign").json(request).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{}", self.transcript());
        answer.json().await.unwrap()
    }

    /// Of the daemon's process, as the kernel has them.
    pub fn user(&self) -> (u32, u32) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let id = |line: &str| {
            let ids = status.lines().find_map(|found| found.strip_prefix(line)).unwrap();
            let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert!(ids.iter().all(|id| *id == ids[0]), "real, effective, saved, file system: {ids:?}");
            ids[0]
        };
        (id("Uid:"), id("Gid:"))
    }

    /// SIGTERM as an engine sends it, and what is to be seen before the daemon is gone.
    pub async fn stop_while(&mut self, look: impl FnOnce(&Self)) -> ExitStatus {
        kill_process(Pid::from_raw(self.pid()).unwrap(), Signal::TERM).unwrap();
        let process = self.process.as_ref().unwrap();
        process.log_line("its end", |line| line.message().starts_with("stopping")).await.unwrap();
        look(self);
        let mut process = self.process.take().unwrap();
        process.output.ended().await.unwrap();
        process.child.wait().unwrap()
    }

    /// As [`run`](Self::run), with the same volumes and a root file system mounted read-only.
    pub async fn start_read_only(&mut self) {
        self.shutdown_delay = "0s";
        let root = self.image.root.display();
        let volumes = self.volumes.path().display();
        // The mounts are this process's own and end with it.
        let script = format!(
            "set -e; mount --make-rprivate /; mount --bind {root} {root}; \
             mount --bind {volumes}/lib {root}/var/lib/jwksd; mount --bind {volumes}/run {root}/run/jwksd; \
             mount -o remount,bind,ro {root}; cd {root}; exec chroot --userspec={USER}:{USER} . \"$@\""
        );
        let mut run = Command::new("unshare");
        run.args(["--mount", "sh", "-c", &script, "sh"]).args(self.words());
        run.env("JWKSD_CONFIG", "/etc/jwksd/jwksd.toml").envs(self.variables());
        self.process = Some(Process::start(run));
        self.ready().await;
    }

    pub fn root_is_read_only(&self) -> bool {
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.pid())).unwrap();
        let root =
            mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap_or_else(|| panic!("{mounts}"));
        root.split(' ').nth(5).unwrap().split(',').any(|option| option == "ro")
    }

    fn in_buildah(&self) -> Command {
        let mut run = self.image.buildah(&["run"]);
        for (name, value) in self.variables() {
            run.arg("--env").arg(format!("{name}={value}"));
        }
        let volumes = self.volumes.path().display();
        for volume in ["lib:/var/lib/jwksd", "run:/run/jwksd", "jwksd.toml:/etc/jwksd/jwksd.toml:ro"] {
            run.arg("--volume").arg(format!("{volumes}/{volume}"));
        }
        run.arg(&self.image.container).arg("--");
        run
    }

    /// What the image starts.
    fn words(&self) -> Vec<String> {
        let config = &self.image.config;
        let words = ["Entrypoint", "Cmd"].map(|part| config[part].as_array().unwrap().clone()).concat();
        words.iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    }

    /// chroot isolation shares the machine's network, so the ports are ours.
    fn variables(&self) -> Vec<(String, String)> {
        let listen =
            |name: &str, port: &ReservedPort| (format!("JWKSD__{name}__LISTEN"), format!("0.0.0.0:{}", port.number()));
        vec![
            listen("PUBLIC", &self.ports[0]),
            listen("OPS", &self.ports[1]),
            ("JWKSD__ISSUER__MAIN__URL".to_owned(), "https://auth.example.com".to_owned()),
            ("JWKSD__SHUTDOWN_DELAY".to_owned(), self.shutdown_delay.to_owned()),
        ]
    }

    async fn ready(&self) {
        let url = format!("http://127.0.0.1:{}/readyz", self.ports[1].number());
        let http = http_client().build().unwrap();
        eventually("the daemon in the image to be ready", PATIENCE, async || {
            assert!(!self.process.as_ref().unwrap().output.has_ended(), "{}", self.transcript());
            http.get(&url).send().await.ok().filter(|answer| answer.status() == 200).map(drop)
        })
        .await;
    }

    /// The daemon itself.
    fn pid(&self) -> i32 {
        let pid = self.innermost();
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        assert_eq!(command.trim(), "jwksd", "the process {pid}");
        pid
    }

    /// What was started, or the last of its descendants.
    fn innermost(&self) -> i32 {
        let mut pid = i32::try_from(self.process.as_ref().unwrap().child.id()).unwrap();
        while let Some(child) = child_of(pid) {
            pid = child;
        }
        pid
    }

    fn transcript(&self) -> String {
        self.process.iter().flat_map(|process| process.output.lines()).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Container<'_> {
    /// A test that failed: the daemon would outlive buildah, and buildah unmounts what it mounted when that ends.
    fn drop(&mut self) {
        if self.process.as_ref().is_some_and(|process| !process.output.has_ended()) {
            let _ = kill_process(Pid::from_raw(self.innermost()).unwrap(), Signal::KILL);
            let _ = self.process.as_mut().unwrap().child.wait();
        }
    }
}

fn child_of(pid: i32) -> Option<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().map_while(Result::ok);
    let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
    children.collect::<String>().split_whitespace().next().map(|child| child.parse().unwrap())
}
