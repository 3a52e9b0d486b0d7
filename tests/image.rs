//! The container image: built by buildah from deploy/docker/Dockerfile with this build's binary, and run.
//!
//! No registry is asked, so the stage that compiles stays out: `--build-context rootfs=` puts what deploy/docker/rootfs.sh lays
//! out in its place, as for users with a binary of their own. That stage runs the same script on what cargo built.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

#[path = "image/container.rs"]
mod container;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;

use container::{Container, Image};
use support::tools;

const DOCKERFILE: &str = "deploy/docker/Dockerfile";

/// As in the Dockerfile and the documents.
const USER: u32 = 65532;

/// Of what Debian's compiler makes without debug information; a release is far smaller.
const LARGEST: u64 = 150_000_000;

fn repository(path: &str) -> String {
    fs::read_to_string(tools::repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The output of a command that must succeed.
fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn lay_out(binary: &Path, folder: &Path) {
    output(Command::new(tools::repository("deploy/docker/rootfs.sh")).arg(binary).arg(folder));
}

#[test]
fn the_linter_finds_nothing_to_remark() {
    output(Command::new(tools::hadolint()).arg(tools::repository(DOCKERFILE)));
}

#[test]
fn everything_that_is_copied_is_in_a_checkout() {
    let dockerfile = repository(DOCKERFILE).replace("\\\n", " ");
    let copies = dockerfile.lines().filter_map(|line| line.strip_prefix("COPY "));
    let copies = copies.filter(|line| !line.contains("--from=")).map(str::split_whitespace);
    // The last word of each is where it goes.
    let copied = copies.flat_map(|words| {
        let mut words: Vec<&str> = words.collect();
        words.pop();
        words
    });
    let copied: BTreeSet<&str> = copied.collect();
    assert!(copied.len() > 5, "{copied:?}");
    let ignored = repository(".dockerignore");
    let exceptions: Vec<&str> = ignored.lines().filter_map(|line| line.strip_prefix('!')).collect();
    assert!(ignored.lines().any(|line| line == "*"), "all else is left out");
    for path in &copied {
        assert!(tools::repository(path).exists(), "{path} is copied, and not there");
        let sent = exceptions.iter().any(|exception| Path::new(path).starts_with(exception));
        assert!(sent, ".dockerignore leaves out {path}, which is copied");
    }
    for exception in exceptions {
        let used = copied.iter().any(|path| Path::new(path).starts_with(exception));
        assert!(used, ".dockerignore lets {exception} in, which nothing copies");
    }
    for file in included() {
        let there = copied.iter().any(|path| file.starts_with(tools::repository(path)));
        assert!(there, "{} is compiled in, and not copied", file.display());
    }
}

/// What .dockerignore lets through is all that the stage which compiles copies: a package that cargo understands.
#[test]
fn the_stage_that_compiles_gets_every_source() {
    let dockerfile = repository(DOCKERFILE);
    let copies = dockerfile.lines().filter(|line| line.starts_with("COPY ") && !line.contains("--from="));
    let copies: Vec<&str> = ["FROM scratch", "WORKDIR /build"].into_iter().chain(copies).collect();
    let folder = TempDir::new().unwrap();
    let stage = folder.path().join("Dockerfile");
    fs::write(&stage, copies.join("\n")).unwrap();
    let sent = Image::build_from(&stage, &[]);
    let build = sent.root.join("build");
    let mut described = Command::new(env!("CARGO"));
    described.args(["metadata", "--format-version=1", "--no-deps", "--locked", "--offline", "--manifest-path"]);
    output(described.arg(build.join("Cargo.toml")));
    output(Command::new("diff").arg("--recursive").arg(tools::repository("src")).arg(build.join("src")));
    assert!(!build.join("tests").exists() && !build.join("target").exists(), "and nothing else");
}

/// The files that the sources compile into the binary.
fn included() -> Vec<std::path::PathBuf> {
    let found = output(
        Command::new("grep")
            .args(["-rEo", "include_(str|bytes)!\\(\"[^\"]+\"", "--include=*.rs"])
            .arg(tools::repository("src")),
    );
    let files = found.lines().map(|line| {
        let (source, call) = line.split_once(':').unwrap();
        let named = Path::new(source).parent().unwrap().join(call.split('"').nth(1).unwrap());
        named.canonicalize().unwrap_or_else(|error| panic!("{line}: {error}"))
    });
    let files: Vec<_> = files.collect();
    assert!(files.len() > 2, "{files:?}");
    files
}

#[test]
fn a_static_binary_needs_no_libraries_and_a_mistake_is_named() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("main.c"), "int main(void) { return 0; }").unwrap();
    output(Command::new("cc").arg("-static").arg("-o").arg(at("static")).arg(at("main.c")));
    lay_out(&at("static"), &at("root"));
    let libraries = fs::read_dir(at("root/lib")).unwrap().count() + fs::read_dir(at("root/lib64")).unwrap().count();
    assert_eq!(libraries, 0);
    for (binary, root, complaint) in [("static", "root", "exists already"), ("nothing", "new", "not an executable")] {
        let refused = Command::new(tools::repository("deploy/docker/rootfs.sh")).arg(at(binary)).arg(at(root)).output();
        let refused = refused.unwrap();
        assert!(!refused.status.success());
        assert!(String::from_utf8_lossy(&refused.stderr).contains(complaint));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_serves_signs_and_stops() {
    let image = Image::build();
    says_what_it_is(&image);
    contains_little(&image);
    let mut container = Container::run(&image, "[signer.client.app]\nuid = 0\n").await;
    assert_eq!(container.user(), (USER, USER), "user and group");
    let kid = container.kid().await;
    let claims = json!({"claims": {"sub": "alice", "aud": "https://api.example.com"}});
    assert_eq!(container.sign(&claims).await["kid"], kid, "over the socket that applications share");
    assert_eq!(container.healthcheck(), 0, "healthy");
    let operator = container.inside(&["jwksd", "status"]);
    assert!(operator.status.success(), "{}", String::from_utf8_lossy(&operator.stderr));
    let ended = container.stop_while(|container| {
        // It goes on serving for a while, unready.
        assert_eq!(container.healthcheck(), 1, "unhealthy");
    });
    assert!(ended.await.success());
    assert_eq!(container.healthcheck(), 4, "not there");
    assert_eq!(image.changed(), [""; 0], "nothing is written but to the volumes");

    // Again, on a root that nobody can write to. buildah cannot do that; the kernel can.
    container.start_read_only().await;
    assert_eq!(container.kid().await, kid, "the volume keeps the key");
    assert!(container.root_is_read_only());
    assert_eq!(container.healthcheck(), 0);
    assert!(container.stop_while(|_| ()).await.success());
}

fn says_what_it_is(image: &Image) {
    let config = &image.config;
    assert_eq!(config["User"], "65532:65532", "a number that is not root's");
    assert_eq!(config["Entrypoint"], json!(["/usr/bin/jwksd"]));
    assert_eq!(config["Cmd"], json!(["serve"]));
    assert_eq!(config["Healthcheck"]["Test"], json!(["CMD", "/usr/bin/jwksd", "healthcheck"]));
    assert_eq!(config["WorkingDir"], "/var/lib/jwksd");
    let ports: BTreeSet<&str> = config["ExposedPorts"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(ports, BTreeSet::from(["8620/tcp", "8623/tcp"]));
    let label = |name: &str| config["Labels"][format!("org.opencontainers.image.{name}")].as_str().unwrap_or_default();
    assert_eq!(label("title"), "jwksd");
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"), "ARG VERSION follows Cargo.toml");
    assert_eq!(label("licenses"), env!("CARGO_PKG_LICENSE"));
    assert_eq!(label("revision"), container::REVISION, "as the build was told");
    assert!(
        config["Volumes"].as_object().is_none_or(serde_json::Map::is_empty),
        "where state goes is the user's decision"
    );
}

fn contains_little(image: &Image) {
    let mut programs = Vec::new();
    for (path, metadata) in image.files() {
        let name = path.display();
        let own = path.starts_with("var/lib/jwksd") || path.starts_with("run/jwksd");
        assert_eq!(metadata.uid, if own { USER } else { 0 }, "the owner of {name}");
        let mode = metadata.mode;
        assert!(metadata.is_link || mode & 0o022 == 0, "{name} has mode {mode:o}");
        assert_eq!(mode & 0o6000, 0, "{name} has mode {mode:o}");
        let library = path.starts_with("lib") || path.starts_with("lib64");
        if metadata.is_file && mode & 0o111 != 0 && !library {
            programs.push(path);
        }
    }
    assert_eq!(programs, [Path::new("usr/bin/jwksd")], "no shell, no package tools");
    let size = image.size();
    println!("image with this build's binary: {} MB", size / 1_000_000);
    assert!(size < LARGEST, "{size} bytes");
    let authorities = fs::read_to_string(image.root.join("etc/ssl/certs/ca-certificates.crt")).unwrap();
    assert!(authorities.matches("BEGIN CERTIFICATE").count() > 50);
    assert_eq!(fs::metadata(image.root.join("usr/bin/jwksd")).unwrap().permissions().mode() & 0o777, 0o755);
}
