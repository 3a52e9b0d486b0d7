//! The unit file: systemd takes it, and it names only what there is.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use jwksd::config::{Loaded, Source, load};
use tempfile::TempDir;

use crate::Notified;
use crate::support::ports::ReservedPort;
use crate::support::{Process, tools};

pub const UNIT: &str = "deploy/systemd/jwksd.service";
const CONFIG: &str = "deploy/systemd/jwksd.toml";

/// What systemd calls exposure, in tenths; 0 is none, 100 the most. Above 20 it finds less to praise.
const MOST_EXPOSED: &str = "15";

pub fn repository(path: &str) -> String {
    fs::read_to_string(tools::repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The values of a setting, in order.
pub fn values(setting: &str) -> Vec<String> {
    let unit = repository(UNIT);
    let values = unit.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

fn value(setting: &str) -> String {
    let values = values(setting);
    let [value] = &values[..] else { panic!("{setting} is set {} times", values.len()) };
    value.clone()
}

fn systemd_analyze(arguments: &[&str], unit: &Path) -> Output {
    Command::new(tools::systemd_analyze()).args(arguments).arg(unit).env("SYSTEMD_COLORS", "0").output().unwrap()
}

/// The unit as it would be with this build installed.
fn installed(folder: &TempDir) -> std::path::PathBuf {
    let unit = repository(UNIT).replace("/usr/bin/jwksd", env!("CARGO_BIN_EXE_jwksd"));
    let path = folder.path().join("jwksd.service");
    fs::write(&path, unit).unwrap();
    path
}

#[test]
fn systemd_understands_every_line_of_it() {
    let folder = TempDir::new().unwrap();
    let verified = systemd_analyze(&["verify", "--man=no"], &installed(&folder));
    let remarks = String::from_utf8_lossy(&verified.stderr);
    // It verifies the units that ours names, too.
    let remarks: Vec<&str> = remarks.lines().filter(|line| line.contains("jwksd")).collect();
    assert!(verified.status.success() && remarks.is_empty(), "{remarks:#?}");
    // It would have said so.
    let broken = fs::read_to_string(installed(&folder)).unwrap().replace("ProtectHome=", "ProtectHouse=");
    fs::write(folder.path().join("jwksd.service"), broken).unwrap();
    let refused = systemd_analyze(&["verify", "--man=no"], &folder.path().join("jwksd.service"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("ProtectHouse"));
}

#[test]
fn systemd_finds_it_hardly_exposed() {
    let folder = TempDir::new().unwrap();
    let threshold = format!("--threshold={MOST_EXPOSED}");
    let judged = systemd_analyze(&["security", "--offline=true", "--no-pager", &threshold], &installed(&folder));
    let report = String::from_utf8_lossy(&judged.stdout);
    assert!(judged.status.success() && report.contains("Overall exposure level"), "{report}");
}

/// What `ExecStart` and the other commands say is what the binary knows.
#[test]
fn its_commands_exist() {
    let start = value("ExecStart");
    let words: Vec<&str> = start.split_whitespace().collect();
    assert_eq!(words[..2], ["/usr/bin/jwksd", "serve"], "{start}");
    let help = Command::new(env!("CARGO_BIN_EXE_jwksd")).args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for flag in words.iter().filter(|word| word.starts_with("--")) {
        assert!(help.split_whitespace().any(|known| known == *flag), "jwksd serve knows no {flag}");
    }
    assert_eq!(value("ExecReload"), "/bin/kill -HUP $MAINPID");
    // What the daemon does with a broken configuration; anything else may pass.
    let broken =
        Command::new(env!("CARGO_BIN_EXE_jwksd")).args(["serve", "--config", "/nowhere.toml"]).output().unwrap();
    assert_eq!(broken.status.code().unwrap().to_string(), value("RestartPreventExitStatus"));
    let user = repository("deploy/systemd/jwksd.sysusers.conf");
    assert!(user.lines().any(|line| line.starts_with(&format!("u {} ", value("User")))), "{user}");
}

/// The variables of the unit, with the folder of the credentials put in.
fn environment(credentials: &str) -> BTreeMap<String, String> {
    let pair = |text: String| {
        let (name, value) = text.split_once('=').unwrap();
        (name.to_owned(), value.replace("%d", credentials))
    };
    values("Environment").into_iter().map(pair).collect()
}

fn loaded(environment: BTreeMap<String, String>) -> Loaded {
    let loaded = load(&Source::File(tools::repository(CONFIG)), environment.into_iter());
    loaded.unwrap_or_else(|error| panic!("{CONFIG}: {error}"))
}

#[test]
fn its_configuration_keeps_to_the_folders_that_it_gives() {
    let text = repository(CONFIG);
    let settings = text.lines().filter_map(|line| line.split('#').next()?.split_once('='));
    let settings = settings.map(|(_, value)| value.trim().trim_matches('"').trim_start_matches("unix:"));
    let paths: Vec<&str> = settings.filter(|value| value.starts_with('/')).collect();
    assert!(paths.len() >= 5, "{paths:?}");
    let state = format!("/var/lib/{}/", value("StateDirectory"));
    let runtime = format!("/run/{}/", value("RuntimeDirectory"));
    let credentials: BTreeMap<String, String> = values("LoadCredential")
        .iter()
        .map(|credential| credential.split_once(':').map(|(name, path)| (path.to_owned(), name.to_owned())).unwrap())
        .collect();
    let variables = environment("%d");
    for path in paths {
        let kept = path.starts_with(&state) || path.starts_with(&runtime);
        // A secret of root's: the daemon reads the credential instead.
        let given =
            credentials.get(path).is_some_and(|name| variables.values().any(|value| *value == format!("%d/{name}")));
        assert!(kept || given, "{path} is neither in a folder of the service nor one of its credentials");
    }
    assert_eq!(variables.len(), credentials.len(), "each credential is used by one variable");
    assert_ne!(loaded(environment("/credentials")).config, loaded(BTreeMap::new()).config, "the variables count");
    assert!(loaded(BTreeMap::new()).timing.is_empty());
}

/// The steps of docs/systemd.md, with other folders: root makes everything, the service is given its state and, as
/// copies that it can only read, its secrets.
#[tokio::test(flavor = "multi_thread")]
async fn it_starts_with_its_secrets_as_credentials() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let ports = [ReservedPort::any(), ReservedPort::any()];
    let text = ["/var/lib/jwksd", "/run/jwksd", "/etc/jwksd"]
        .iter()
        .fold(repository(CONFIG), |text, path| {
            text.replace(path, &folder.path().join(&path[1..]).display().to_string())
        })
        .replace("8620", &ports[0].number().to_string())
        .replace("8623", &ports[1].number().to_string());
    for name in ["etc/jwksd", "var/lib/jwksd", "run/jwksd", "credentials"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    let config = at("etc/jwksd/jwksd.toml");
    fs::write(&config, text).unwrap();
    let jwksd = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_jwksd"));
        command.arg("--config").arg(&config).args(arguments).current_dir(at("var/lib/jwksd")).env_clear();
        command
    };
    let made = jwksd(&["init"]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for credential in values("LoadCredential") {
        let (name, path) = credential.split_once(':').unwrap();
        let copy = at("credentials").join(name);
        fs::rename(at(&path[1..]), &copy).unwrap_or_else(|error| panic!("`jwksd init` made no {path}: {error}"));
        fs::set_permissions(copy, fs::Permissions::from_mode(0o400)).unwrap();
    }
    let notified = Notified::at_a_path();
    let mut serve = jwksd(&["serve"]);
    let process = Process::start({
        serve.envs(environment(&at("credentials").display().to_string())).env("NOTIFY_SOCKET", &notified.name);
        serve
    });
    let ready = notified.notice().await;
    assert_eq!(ready, "READY=1\nSTATUS=Serving 1 keyset", "{}", process.output.lines().join("\n"));
    // An operator, who finds the token where the configuration says.
    fs::copy(at("credentials/admin.token"), at("etc/jwksd/admin.token")).unwrap();
    for arguments in [&["healthcheck"][..], &["status"]] {
        let done = tokio::task::block_in_place(|| jwksd(arguments).output().unwrap());
        assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}
