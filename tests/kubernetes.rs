//! The Helm chart, the plain manifests and the Kustomize component: rendered by the real programs, validated against
//! the schemas of several versions of Kubernetes, and held against the real binary.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on ends")]

#[path = "kubernetes/cluster.rs"]
mod cluster;
#[path = "kubernetes/page.rs"]
mod page;
#[path = "kubernetes/render.rs"]
mod render;
mod support;
#[path = "kubernetes/topology.rs"]
mod topology;
#[path = "kubernetes/workload.rs"]
mod workload;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use jwksd::config::{Config, Format, Source, load, restart_needed};
use jwksd::keyring::policy::Discovery;

use render::{manifests, parsed, refusal, template};
use workload::{Contents, Workload, of_kind, text};

/// Values that between them use everything of the chart, and what else is rendered, as one list for each.
fn matrix() -> Vec<(String, Vec<Value>)> {
    let mut all: Vec<(String, Vec<Value>)> = Vec::new();
    for values in ["managers", "file", "admin", "plain"] {
        all.push((values.to_owned(), manifests(values, &[])));
    }
    all.push(("one manager".to_owned(), manifests("plain", &["manager.replicas=1"])));
    let annotated = [r"manager.service.annotations.a\.example/b=c", r"ingress.annotations.a\.example/b=c"];
    all.push(("annotations".to_owned(), manifests("plain", &annotated)));
    all.push(("an application".to_owned(), render::application(&[])));
    let sets = [
        "jwksd.sidecar.readiness=true",
        "jwksd.sidecar.startWhenReadyToSign=true",
        "podSecurityContext.fsGroup=2000",
        "jwksd.sidecar.podMonitor.enabled=true",
    ];
    all.push(("an application that is to be ready".to_owned(), render::application(&sets)));
    all.push(("deploy/kubernetes".to_owned(), parsed(&render::kustomized("deploy/kubernetes"))));
    all.push(("deploy/kustomize/example".to_owned(), parsed(&render::kustomized("deploy/kustomize/example"))));
    all
}

#[test]
fn every_manifest_says_what_the_binary_does() {
    for (case, documents) in matrix() {
        println!("{case}");
        assert_true(&documents);
    }
}

/// All that can be held against the binary.
fn assert_true(documents: &[Value]) {
    let contents = Contents::any();
    let workloads = Workload::all(documents);
    assert!(!workloads.is_empty(), "no container runs jwksd");
    assert!(of_kind(documents, "Secret").is_empty(), "Secrets exist before");
    for workload in &workloads {
        workload.assert_confined();
        workload.assert_mounts_cover_the_configuration();
        workload.assert_ports_are_the_listeners();
        workload.assert_probes_ask_the_ops_listener();
        workload.assert_accepted_by_the_binary(&contents);
    }
    cluster::assert_services_lead_to_listeners(documents, &workloads);
    cluster::assert_only_public_paths_are_routed(documents, &workloads);
    cluster::assert_policies_separate_the_listeners(documents, &workloads);
    cluster::assert_custom_resources_fit(documents, &workloads);
}

#[test]
fn charts_pass_the_linter() {
    for values in ["managers", "file", "admin", "plain", "sidecar"] {
        render::lint("deploy/helm/jwksd", &[&format!("deploy/helm/jwksd/ci/{values}-values.yaml")]);
    }
    render::lint_application();
}

/// Whoever reads the plain manifests and whoever installs the chart run the same.
#[test]
fn the_plain_manifests_are_what_the_chart_renders() {
    let mut chart = manifests("plain", &[]);
    let mut plain: Vec<Value> = Vec::new();
    for entry in std::fs::read_dir(support::tools::repository("deploy/kubernetes")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "kustomization.yaml" && path.file_name().unwrap() != "namespace.yaml" {
            plain.extend(parsed(&std::fs::read_to_string(&path).unwrap()));
        }
    }
    // What only Helm needs.
    chart.retain(|document| document["kind"] != "PrometheusRule");
    for document in &mut chart {
        for label in ["app.kubernetes.io/managed-by", "app.kubernetes.io/version", "helm.sh/chart"] {
            document["metadata"]["labels"].as_object_mut().unwrap().remove(label);
        }
        if document["kind"] == "Job" {
            let name = text(&document["metadata"]["name"]);
            let (name, hash) = name.rsplit_once('-').unwrap();
            assert_eq!(hash.len(), 8);
            document["metadata"]["name"] = json!(name);
        }
        if let Some(metadata) = document.pointer_mut("/spec/template/metadata").and_then(Value::as_object_mut) {
            metadata.remove("annotations");
        }
    }
    let named = |documents: &[Value]| -> BTreeSet<String> {
        documents.iter().map(|d| format!("{} {}", text(&d["kind"]), text(&d["metadata"]["name"]))).collect()
    };
    assert_eq!(named(&plain), named(&chart));
    for document in &chart {
        let same = |other: &&Value| {
            other["kind"] == document["kind"] && other["metadata"]["name"] == document["metadata"]["name"]
        };
        let other = plain.iter().find(same).unwrap();
        assert_eq!(other, document, "{}", named(std::slice::from_ref(document)).first().unwrap());
    }
}

/// The component adds what the chart's templates add, whatever the application's chart adds to its own pod.
#[test]
fn the_component_adds_the_same_sidecar_as_the_chart() {
    let by_chart = render::application(&["jwksd.sidecar.secrets.replication.existingSecret=jwksd-replication"]);
    let by_kustomize = parsed(&render::kustomized("deploy/kustomize/example"));
    let pod = |documents: &[Value]| of_kind(documents, "Deployment")[0]["spec"]["template"]["spec"].clone();
    let (chart, kustomize) = (pod(&by_chart), pod(&by_kustomize));
    let mut wanted = chart["initContainers"][0].clone();
    // Left to the cluster's default by the one, and the default of the chart by the other.
    wanted.as_object_mut().unwrap().remove("imagePullPolicy");
    assert_eq!(kustomize["initContainers"][0], wanted);
    assert_eq!(kustomize["initContainers"][1]["name"], "migrate", "the application's own come after it");
    assert_eq!(kustomize["securityContext"], chart["securityContext"]);
    for member in ["env", "volumeMounts"] {
        assert_eq!(kustomize["containers"][0][member], chart["containers"][0][member]);
    }
    let mut volumes = chart["volumes"].clone();
    volumes[0]["configMap"]["name"] = json!("jwksd-sidecar");
    assert_eq!(kustomize["volumes"], volumes);
    let config = |documents: &[Value]| Workload::all(documents).remove(0).config;
    assert_eq!(config(&by_kustomize), config(&by_chart));
}

#[test]
fn what_cannot_work_is_refused_in_these_words() {
    let cases: [(&str, &[&str], &str); 32] = [
        ("", &[], "manager.config.store is missing: say where keyrings live, with kind: postgres and url_file"),
        (
            "",
            &["mode=sidecar"],
            "sidecar.config.store is missing: say where keyrings live, with kind: postgres and url_file, or kind: upstream",
        ),
        (
            "plain",
            &["manager.config.seal=null"],
            "manager.config.seal is missing: name the key that encrypts private keys at rest",
        ),
        ("sidecar", &["sidecar.config.seal=null"], "sidecar.config.seal is missing"),
        (
            "sidecar",
            &["sidecar.config.store.kind=file", "sidecar.config.store.path=/var/lib/jwksd/keyrings"],
            "sidecar.config.store is a file store: each pod would have keys of its own, which no JWKS shows",
        ),
        ("sidecar", &["sidecar.config.role=all"], "sidecar.config.role is \"all\": it has to be signer"),
        (
            "sidecar",
            &["sidecar.config.signer.listen=127.0.0.1:8621"],
            "sidecar.config.signer.listen has to be a socket in the folder that the application mounts",
        ),
        (
            "sidecar",
            &["sidecar.config.signer.socket_mode=0600"],
            "socket_mode \"0600\" lets only the sidecar's own user in",
        ),
        ("sidecar", &["sidecar.config.ops=null"], "sidecar.config.ops is missing: the probes ask there"),
        ("file", &["manager.replicas=2"], "manager.replicas is 2 with a file store, which serves one process"),
        (
            "file",
            &["manager.config.role=manager"],
            "manager.config.role is manager with a file store, which only one process can use",
        ),
        (
            "file",
            &["manager.persistence.enabled=false"],
            "a file store without a volume: all keys would be gone with the pod",
        ),
        ("plain", &["manager.persistence.enabled=true"], "manager.persistence is for a file store"),
        (
            "plain",
            &["manager.config.seal.path=/var/lib/jwksd/seal.key"],
            "all replicas of a shared store need the same key",
        ),
        (
            "plain",
            &["manager.config.role=signer"],
            "manager.config.role is \"signer\": managers have the role manager or all",
        ),
        ("plain", &["manager.config.issuer=null"], "manager.config.issuer is missing"),
        (
            "plain",
            &["manager.config.public.listen=127.0.0.1:8620"],
            "manager.config.public.listen can be reached from the pod only",
        ),
        ("plain", &["manager.config.public=null"], "manager.config.public is missing"),
        (
            "plain",
            &["manager.config.admin.listen=0.0.0.0:8622"],
            "manager.config.admin listens on 0.0.0.0:8622 without TLS: set tls.cert_file and tls.key_file to files of a Secret that exists, of cert-manager for example",
        ),
        ("plain", &["manager.config.replication.tls=null"], "for the name jwksd-replication.jwksd.svc"),
        (
            "plain",
            &["manager.config.replication.client=null"],
            "manager.config.replication listens on 0.0.0.0:8624 without clients",
        ),
        ("admin", &["manager.config.admin.token=null"], "manager.config.admin listens on [::]:9622 without tokens"),
        ("managers", &["signer.config.signer.tls=null"], "signer.config.signer listens on 0.0.0.0:8621 without TLS"),
        (
            "managers",
            &["signer.config.store.kind=file"],
            "signer.config.store is a file store: it would have keys that the managers do not know",
        ),
        (
            "plain",
            &["manager.secrets.database=null"],
            "manager.config.store.ca_file is /run/secrets/jwksd/database/ca.crt, which nothing mounts: add manager.secrets.NAME.existingSecret",
        ),
        (
            "plain",
            &["manager.config.store.state_path=/data"],
            "manager.config.store.state_path is /data, which the daemon cannot write: use a path below",
        ),
        (
            "plain",
            &["manager.config.store.state_path=data"],
            "manager.config.store.state_path is the relative path data",
        ),
        ("admin", &["manager.env=null"], "names the variable ADMIN_TOKEN, which manager.env does not set"),
        (
            "plain",
            &["manager.env[0].name=JWKSD__PUBLIC__LISTEN"],
            "manager.env has JWKSD__PUBLIC__LISTEN: set it in manager.config",
        ),
        ("plain", &["manager.init.ownerSecret="], "manager.init.ownerSecret is missing"),
        ("plain", &["httpRoute.enabled=true"], "httpRoute.parentRefs is missing"),
        ("file", &["signer.enabled=true"], "signer.enabled beside manager.config.role: all with a signer listener"),
    ];
    for (values, sets, words) in cases {
        let refused = refusal(values, sets);
        assert!(
            refused.contains(&format!("jwksd: {words}")) || refused.contains(words),
            "{values} {sets:?}: {refused}"
        );
    }
}

#[test]
fn values_of_the_wrong_shape_are_refused_by_the_schema() {
    let cases: [(&str, &str, &str); 8] = [
        ("plain", "manager.replica=2", "additional properties 'replica' not allowed"),
        ("plain", "manager.replicas=0", "/manager/replicas"),
        ("plain", "manager.secrets.seal.name=x", "additional properties 'name' not allowed"),
        ("plain", "mode=both", "'standalone', 'sidecar'"),
        ("plain", "manager.config.role=leader", "/manager/config/role"),
        ("plain", "manager.resources.limits.memory=null", "missing property 'memory'"),
        ("plain", "manager.config.public.listen=8620", "/manager/config/public/listen"),
        ("sidecar", "sidecar.config.signer.socket_mode=432", "/sidecar/config/signer/socket_mode"),
    ];
    for (values, set, words) in cases {
        let refused = refusal(values, &[set]);
        assert!(
            refused.contains("don't meet the specifications of the schema") && refused.contains(words),
            "{set}: {refused}"
        );
    }
}

/// Native sidecars are on by default since 1.29.
#[test]
fn older_clusters_are_refused() {
    for (version, accepted) in [("1.28.15", false), ("1.29.0", true), ("1.31.4-gke.1000", true)] {
        let rendered = template("sidecar", &[], &["--kube-version", version]);
        assert_eq!(rendered.is_ok(), accepted, "{version}: {rendered:?}");
    }
}

#[test]
fn an_application_that_forgets_the_mode_is_told() {
    let refused = render::application_refusal(&["jwksd.mode=standalone"]);
    assert!(
        refused.contains("an application's chart that only wants the sidecar sets jwksd.mode: sidecar"),
        "{refused}"
    );
}

/// Pods are replaced exactly when the daemon would say that the change needs a restart.
#[test]
fn pods_restart_for_what_only_a_start_reads() {
    let cases = [
        "keyset.default.rotation.every=7d",
        "keyset.default.tokens.max_ttl=5m",
        "keyset.other.algorithm=EdDSA",
        "issuer.main.max_age=2m",
        "issuer.main.jwks_paths[0]=/keys",
        "issuer.main.publish.cdn.kind=s3,manager.config.issuer.main.publish.cdn.bucket=keys",
        "defaults.tokens.max_ttl=10m",
        "store.staleness_limit=30m",
        "store.publish_lag=30s",
        "store.schema=other",
        "store.statement_timeout=3s",
        "store.state_path=/var/lib/jwksd/other",
        "seal.path=/run/secrets/jwksd/seal/next.key",
        "seal.previous.former.path=/run/secrets/jwksd/seal/former.key",
        "role=all",
        "admin.token.viewer.role=viewer,manager.config.admin.token.viewer.file=/run/secrets/jwksd/admin/viewer.token",
        "admin.socket_mode=0660",
        "admin=null",
        "public.listen=0.0.0.0:8080",
        "public.tls.cert_file=/run/secrets/jwksd/tls/tls.crt,manager.config.public.tls.key_file=/run/secrets/jwksd/tls/tls.key",
        "replication.tls.cert_file=/run/secrets/jwksd/tls/other.crt",
        "replication.client.edge.token_file=/run/secrets/jwksd/replication/edge.token",
        "backend.aws-kms.region=eu-west-1",
        "log.level=debug",
        "log.signatures=true",
    ];
    let rendered = |sets: &[&str]| template("plain", sets, &[]).unwrap_or_else(|error| panic!("{sets:?}: {error}"));
    let mut all = rendered(&[]);
    for case in cases {
        all += &rendered(&[&format!("manager.config.{case}")]);
    }
    let documents = parsed(&all);
    let configs: Vec<Config> =
        of_kind(&documents, "ConfigMap").into_iter().map(|map| configuration(&json_of(map))).collect();
    let annotations: Vec<&Value> = of_kind(&documents, "Deployment")
        .into_iter()
        .map(|deployment| &deployment["spec"]["template"]["metadata"]["annotations"])
        .collect();
    assert_eq!((configs.len(), annotations.len()), (cases.len() + 1, cases.len() + 1));
    let mut restarts = 0;
    for (index, case) in cases.iter().enumerate() {
        let needed = restart_needed(&configs[0], &configs[index + 1]);
        let restarted = annotations[index + 1] != annotations[0];
        assert_eq!(restarted, !needed.is_empty(), "{case}: the daemon says {needed:?}");
        restarts += usize::from(restarted);
    }
    assert!(restarts > 8 && restarts < cases.len() - 8, "{restarts} of {}", cases.len());
}

/// An API server refuses a change of a Job: what would change it has to make another one.
#[test]
fn a_job_that_differs_is_another_job() {
    let job = |sets: &[&str]| of_kind(&manifests("plain", sets), "Job")[0].clone();
    let before = job(&[]);
    let changes = [
        "image.tag=1.0.1",
        "manager.resources.limits.memory=1Gi",
        "manager.nodeSelector.disk=ssd",
        "manager.init.ownerSecret=other",
    ];
    for set in changes {
        assert_ne!(job(&[set])["metadata"]["name"], before["metadata"]["name"], "{set}");
    }
    assert_eq!(job(&["manager.config.keyset.default.tokens.max_ttl=5m", "manager.replicas=3"]), before);
}

fn json_of(config_map: &Value) -> Value {
    serde_json::from_str(&text(&config_map["data"]["jwksd.json"])).unwrap()
}

/// As the daemon reads it.
fn configuration(config: &Value) -> Config {
    let source = Source::Text { name: "jwksd.json".to_owned(), text: config.to_string(), format: Format::Json };
    load(&source, std::iter::empty()).unwrap_or_else(|error| panic!("{error}\n{config:#}")).config
}

/// Where the issuers of a configuration are served.
fn public_paths(config: &Value) -> BTreeSet<(String, String)> {
    let mut paths = BTreeSet::new();
    for issuer in configuration(config).issuers {
        let host = issuer.url.split('/').nth(2).unwrap().split(':').next().unwrap().to_owned();
        let mut add = |path: String| _ = paths.insert((host.clone(), path));
        add(issuer.jwks_path());
        issuer.jwks_paths.iter().cloned().for_each(&mut add);
        if issuer.discovery == Discovery::Minimal {
            add(format!("{}/.well-known/openid-configuration", issuer.path()));
            add(format!("/.well-known/oauth-authorization-server{}", issuer.path()));
        }
    }
    paths
}
