//! docs/kubernetes.md: its values render to what is true of the binary, and its commands run, as far as they do without a
//! cluster.

use std::path::Path;
use std::process::Command;

use jwksd::seal::file::FileKey;

use crate::assert_true;
use crate::render::parsed;
use crate::support::tools::{helm, kubectl, repository};

/// What needs a cluster is done without: an installation is rendered, an object is only printed, of a command in a pod and
/// of what asks the API server it is found out whether there is such a command.
const WITHOUT_CLUSTER: &str = r#"
set -euo pipefail
kubectl() {
    case $1 in
    create) "$KUBECTL" "$@" --dry-run=client -o yaml ;;
    kustomize) "$KUBECTL" "$@" ;;
    apply) [ "$2" = -k ] && "$KUBECTL" kustomize "$3" ;;
    exec)
        while [ "$1" != -- ]; do shift; done
        [ "$2" = /usr/local/bin/jwksd ] && shift 2 && "$JWKSD" "$@" --help ;;
    *) "$KUBECTL" "$@" --help ;;
    esac
}
helm() {
    case $1 in
    install)
        # Its notes, too.
        "$HELM" "$@" --dry-run=client >notes
        shift && "$HELM" template "$@" ;;
    upgrade) shift && "$HELM" template "$@" ;;
    *) "$HELM" "$@" ;;
    esac
}
"#;

#[test]
fn its_values_render_and_its_commands_run() {
    let page = std::fs::read_to_string(repository("docs/kubernetes.md")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut copy = Command::new("cp");
    assert!(copy.arg("-r").arg(repository("deploy")).arg(folder.path()).status().unwrap().success());
    for file in ["manager.url", "owner.url", "database-ca.crt"] {
        std::fs::write(folder.path().join(file), "to be written by whoever made the database").unwrap();
    }
    let mut rendered = 0;
    for (language, text) in blocks(&page) {
        match (language, text.lines().next().and_then(|line| line.strip_prefix("# "))) {
            ("yaml", Some(name)) if name != "Chart.yaml" => std::fs::write(folder.path().join(name), text).unwrap(),
            ("sh", _) => {
                // Each line is a shell of its own here, and what the first one sets holds for the others.
                let umask = text.lines().next().filter(|line| line.starts_with("umask ")).unwrap_or_default();
                for line in text.lines() {
                    rendered += usize::from(run(umask, line, folder.path()));
                }
            }
            _ => {}
        }
    }
    assert!(rendered >= 8, "only {rendered} commands rendered something");
    FileKey::load(&folder.path().join("seal.key")).unwrap();
    let notes = std::fs::read_to_string(folder.path().join("notes")).unwrap();
    assert!(notes.contains("/usr/local/bin/jwksd status") && notes.contains("/.well-known/jwks.json"), "{notes}");
}

/// Whether it rendered workloads, which are then true.
fn run(umask: &str, line: &str, folder: &Path) -> bool {
    let mut bash = Command::new("bash");
    bash.arg("-c")
        .arg(format!("{WITHOUT_CLUSTER}{umask}\n{line}"))
        .current_dir(folder)
        .env("HELM", helm())
        .env("KUBECTL", kubectl());
    let output = bash.env("JWKSD", env!("CARGO_BIN_EXE_jwksd")).env("HOME", folder).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{line}: {told}{}", String::from_utf8_lossy(&output.stderr));
    let renders =
        ["helm install", "helm upgrade", "helm template", "kubectl apply", "kubectl kustomize", "kubectl create"];
    if !renders.iter().any(|command| line.starts_with(command)) {
        return false;
    }
    let documents = parsed(&told);
    let workloads = documents.iter().any(|document| document["kind"] == "Deployment");
    if workloads {
        assert_true(&documents);
    }
    workloads
}

/// Languages and texts of the fenced blocks.
fn blocks(page: &str) -> Vec<(&str, &str)> {
    page.split("```").skip(1).step_by(2).filter_map(|block| block.split_once('\n')).collect()
}
