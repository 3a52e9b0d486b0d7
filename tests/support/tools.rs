//! Where the programs are that `tests/run` installs: as the environment says, else where that script puts them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Python with the packages of `tests/interop/python/requirements.txt`.
pub fn python() -> PathBuf {
    tool("JWKSD_TEST_PYTHON", "venv/bin/python")
}

pub fn node() -> PathBuf {
    tool("JWKSD_TEST_NODE", "venv/bin/node")
}

/// The `node_modules` of `tests/interop/node/package.json`.
pub fn node_modules() -> PathBuf {
    tool("JWKSD_TEST_NODE_MODULES", "node/node_modules")
}

pub fn envoy() -> PathBuf {
    tool("JWKSD_TEST_ENVOY", "venv/bin/envoy")
}

/// Python 3.13 with the packages of `tests/interop/localstack/requirements.txt`.
pub fn localstack() -> PathBuf {
    tool("JWKSD_TEST_LOCALSTACK", "localstack/bin/python")
}

/// Python with the packages of `tests/openapi_conformance/requirements.txt`.
pub fn schemathesis() -> PathBuf {
    tool("JWKSD_TEST_SCHEMATHESIS", "schemathesis/bin/python")
}

pub fn helm() -> PathBuf {
    tool("JWKSD_TEST_HELM", "kubernetes/bin/helm")
}

pub fn kubectl() -> PathBuf {
    tool("JWKSD_TEST_KUBECTL", "kubernetes/bin/kubectl")
}

/// Python with the packages of `tests/kubernetes/requirements.txt`.
pub fn kubernetes_python() -> PathBuf {
    tool("JWKSD_TEST_KUBERNETES_PYTHON", "kubernetes/venv/bin/python")
}

pub fn go() -> PathBuf {
    tool("JWKSD_TEST_GO", "/usr/bin/go")
}

pub fn java() -> PathBuf {
    tool("JWKSD_TEST_JAVA", "/usr/bin/java")
}

pub fn promtool() -> PathBuf {
    tool("JWKSD_TEST_PROMTOOL", "/usr/bin/promtool")
}

pub fn buildah() -> PathBuf {
    tool("JWKSD_TEST_BUILDAH", "/usr/bin/buildah")
}

pub fn hadolint() -> PathBuf {
    tool("JWKSD_TEST_HADOLINT", "venv/bin/hadolint")
}

pub fn strace() -> PathBuf {
    tool("JWKSD_TEST_STRACE", "/usr/bin/strace")
}

pub fn systemd_analyze() -> PathBuf {
    tool("JWKSD_TEST_SYSTEMD_ANALYZE", "/usr/bin/systemd-analyze")
}

/// A browser, for the page of the admin listener.
pub fn chromium() -> PathBuf {
    tool("JWKSD_TEST_CHROMIUM", "/usr/bin/chromium")
}

/// The server, from the same Debian package.
pub fn prometheus() -> PathBuf {
    tool("JWKSD_TEST_PROMETHEUS", "/usr/bin/prometheus")
}

/// A program of the PostgreSQL server, which Debian keeps out of `PATH`.
pub fn postgres_program(name: &str) -> PathBuf {
    tool("JWKSD_TEST_POSTGRES_BIN", "/usr/lib/postgresql/15/bin").join(name)
}

/// The library to put into `LD_PRELOAD` so that a process sees another time (with `FAKETIME` beside it).
pub fn faketime_library() -> PathBuf {
    let default = format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
    tool("JWKSD_TEST_FAKETIME_LIB", &default)
}

/// The list of the simulations with planted faults.
pub fn planted() -> PathBuf {
    tool("JWKSD_TEST_PLANTED", "../planted/built.json")
}

/// A file of this repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Whatever a test builds for itself and may keep for the next run.
pub fn cache(name: &str) -> PathBuf {
    let folder = repository("target/test-tools/cache").join(name);
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    folder
}

/// A library to preload into the daemon, built from `tests/SOURCE`; again whenever that changed.
pub fn preloaded(source: &str) -> PathBuf {
    static BUILDING: Mutex<()> = Mutex::new(());
    let _building = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let source = repository("tests").join(source);
    let name = source.file_stem().expect("a source file has a name").to_string_lossy().into_owned();
    let built = cache("preloaded").join(format!("{name}.so"));
    let modified = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if modified(&built).is_none_or(|built| Some(built) < modified(&source)) {
        // Beside the target, then moved: another test binary may be loading it.
        let temporary = built.with_extension(std::process::id().to_string());
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o"]).arg(&temporary).arg(&source);
        assert!(cc.status().is_ok_and(|status| status.success()), "{cc:?} failed: is there a C compiler?");
        std::fs::rename(&temporary, &built).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
    }
    built
}

fn tool(variable: &str, default: &str) -> PathBuf {
    let path = match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => repository("target/test-tools").join(default),
    };
    assert!(path.exists(), "{} is missing ({variable} names another): run tests/run once", path.display());
    path
}
