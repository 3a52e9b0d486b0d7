//! What stands around the pods: Services, routes, policies, what operators of Prometheus read.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::public_paths;
use crate::workload::{Workload, items, of_kind, text};

/// Every Service selects the pods of one workload and leads to the listener of its name, and every listener that can be
/// reached from outside has one.
pub fn assert_services_lead_to_listeners(documents: &[Value], workloads: &[Workload]) {
    let mut led_to = BTreeSet::new();
    for service in of_kind(documents, "Service") {
        let workload = selected(&service["spec"]["selector"], workloads);
        for port in items(&service["spec"]["ports"]) {
            let listener = text(&port["targetPort"]);
            assert!(workload.reachable().contains(&(listener.clone(), port["port"].as_u64().unwrap())), "{service}");
            assert_eq!(port["name"], listener.as_str());
            assert!(led_to.insert((workload.name.clone(), listener)), "two Services lead there: {service}");
        }
    }
    for workload in workloads.iter().filter(|workload| workload.is_served() && !workload.is_sidecar()) {
        for (listener, _) in workload.reachable() {
            assert!(led_to.contains(&(workload.name.clone(), listener.clone())), "{}: {listener}", workload.name);
        }
    }
    for workload in workloads {
        for url in items(&workload.config["store"]["urls"]).map(text) {
            let (host, port) = url.trim_start_matches("https://").split_once(':').unwrap();
            let named = |service: &&Value| name_of(service) == host.split('.').next().unwrap();
            // Of other releases are only those that applications go to.
            let found = of_kind(documents, "Service").into_iter().find(named);
            assert!(found.is_some() || workload.is_sidecar(), "{}: {url} is no Service", workload.name);
            if let Some(service) = found {
                assert_eq!(service["spec"]["ports"][0]["port"].to_string(), port, "{url}");
                assert_eq!(service["spec"]["ports"][0]["targetPort"], "replication", "{url}");
            }
        }
    }
    let accounts: BTreeSet<String> = of_kind(documents, "ServiceAccount").iter().map(|a| name_of(a)).collect();
    for workload in workloads {
        if let Some(account) = workload.pod["serviceAccountName"].as_str() {
            assert!(accounts.contains(account), "{}: there is no ServiceAccount {account}", workload.name);
        }
    }
}

/// What is reachable from outside the cluster is what verifiers fetch, path for path.
pub fn assert_only_public_paths_are_routed(documents: &[Value], workloads: &[Workload]) {
    let mut by_ingress = BTreeSet::new();
    for ingress in of_kind(documents, "Ingress") {
        assert!(ingress["spec"]["defaultBackend"].is_null());
        for rule in items(&ingress["spec"]["rules"]) {
            for path in items(&rule["http"]["paths"]) {
                assert_eq!(path["pathType"], "Exact");
                let backend = &path["backend"]["service"];
                assert_eq!(backend["port"]["name"], "public");
                assert_public(documents, &text(&backend["name"]), None);
                assert!(by_ingress.insert((text(&rule["host"]), text(&path["path"]))), "{path} stands twice");
            }
        }
    }
    let mut by_route = BTreeSet::new();
    for route in of_kind(documents, "HTTPRoute") {
        assert_eq!(route["apiVersion"], "gateway.networking.k8s.io/v1");
        let spec = &route["spec"];
        assert_known(spec, &["parentRefs", "hostnames", "rules"]);
        assert!(items(&spec["parentRefs"]).all(|parent| parent["name"].is_string()));
        for rule in items(&spec["rules"]) {
            assert_known(rule, &["matches", "backendRefs"]);
            for backend in items(&rule["backendRefs"]) {
                assert_public(documents, &text(&backend["name"]), backend["port"].as_u64());
            }
            for matched in items(&rule["matches"]) {
                assert_eq!(matched["path"]["type"], "Exact");
                for host in items(&spec["hostnames"]) {
                    by_route.insert((text(host), text(&matched["path"]["value"])));
                }
            }
        }
    }
    let managers = || workloads.iter().find(|workload| workload.config["issuer"].is_object()).expect("it publishes");
    for routed in [by_ingress, by_route].into_iter().filter(|routed| !routed.is_empty()) {
        assert_eq!(routed, public_paths(&managers().config));
    }
}

/// A rule for each listener, open to everybody for the public one alone; disruption budgets for whoever has replicas.
pub fn assert_policies_separate_the_listeners(documents: &[Value], workloads: &[Workload]) {
    for policy in of_kind(documents, "NetworkPolicy") {
        let workload = selected(&policy["spec"]["podSelector"]["matchLabels"], workloads);
        assert_eq!(policy["spec"]["policyTypes"][0], "Ingress");
        let mut opened = BTreeSet::new();
        for rule in items(&policy["spec"]["ingress"]) {
            let port = rule["ports"][0]["port"].as_u64().unwrap();
            assert!(rule["ports"][1].is_null(), "a rule is for one listener: {rule}");
            let listeners = workload.reachable();
            let (listener, _) =
                listeners.iter().find(|(_, number)| *number == port).unwrap_or_else(|| panic!("{rule}"));
            opened.insert(listener.clone());
            let selects =
                |peer: &Value| ["podSelector", "namespaceSelector"].iter().any(|s| !peer[s]["matchLabels"].is_null());
            let narrowed = items(&rule["from"]).count() > 0 && items(&rule["from"]).all(selects);
            assert!(listener == "public" || narrowed, "{listener} is open to everybody: {rule}");
            assert!(
                listener != "admin" || items(&rule["from"]).all(|peer| peer["namespaceSelector"].is_object()),
                "{rule}"
            );
        }
        let mut wanted: BTreeSet<String> = workload.reachable().into_iter().map(|(listener, _)| listener).collect();
        if !opened.contains("admin") {
            wanted.remove("admin");
        }
        assert_eq!(opened, wanted, "{}", workload.name);
    }
    for workload in workloads {
        let reads_managers = workload.config["store"]["kind"] == "upstream";
        assert_eq!(workload.labels["jwksd-replication-client"] == "true", reads_managers, "{}", workload.name);
    }
    let budgets = of_kind(documents, "PodDisruptionBudget");
    for deployment in of_kind(documents, "Deployment") {
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        let own = budgets.iter().filter(|budget| matches(&budget["spec"]["selector"]["matchLabels"], labels)).count();
        let replicated = deployment["spec"]["replicas"].as_u64() > Some(1);
        let ours = deployment["spec"]["template"]["spec"]["containers"][0]["name"] == "jwksd";
        assert_eq!(own, usize::from(replicated && ours), "{}", name_of(deployment));
    }
}

/// Kinds that are not Kubernetes' own have no schema here: every member is one that their documentation has, and leads
/// somewhere.
pub fn assert_custom_resources_fit(documents: &[Value], workloads: &[Workload]) {
    for monitor in of_kind(documents, "ServiceMonitor") {
        assert_eq!(monitor["apiVersion"], "monitoring.coreos.com/v1");
        assert_known(&monitor["spec"], &["selector", "namespaceSelector", "targetLabels", "endpoints"]);
        let services = of_kind(documents, "Service");
        let wanted = &monitor["spec"]["selector"]["matchLabels"];
        let watched: Vec<&&Value> = services.iter().filter(|s| matches(wanted, &s["metadata"]["labels"])).collect();
        let served = workloads.iter().filter(|workload| workload.is_served()).count();
        assert_eq!(watched.len(), served, "one for each workload");
        for endpoint in items(&monitor["spec"]["endpoints"]) {
            assert_known(endpoint, &["port", "path", "interval", "scheme", "tlsConfig"]);
            assert_eq!(endpoint["path"], "/metrics");
            assert!(
                watched.iter().all(|s| s["spec"]["ports"][0]["name"] == endpoint["port"] && endpoint["port"] == "ops")
            );
        }
    }
    for monitor in of_kind(documents, "PodMonitor") {
        assert_known(&monitor["spec"], &["selector", "namespaceSelector", "podMetricsEndpoints"]);
        let workload = selected(&monitor["spec"]["selector"]["matchLabels"], workloads);
        let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
        assert_eq!(endpoint["path"], "/metrics");
        assert!(items(&workload.container["ports"]).any(|port| port["name"] == endpoint["port"]), "{endpoint}");
    }
    for rule in of_kind(documents, "PrometheusRule") {
        assert_eq!(rule["apiVersion"], "monitoring.coreos.com/v1");
        assert_eq!(rule["spec"], crate::render::yaml("deploy/helm/jwksd/files/rules.yaml"));
    }
}

fn assert_public(documents: &[Value], service: &str, port: Option<u64>) {
    let services = of_kind(documents, "Service");
    let found =
        services.iter().find(|found| name_of(found) == service).unwrap_or_else(|| panic!("no Service {service}"));
    let led = &found["spec"]["ports"][0];
    assert_eq!(led["targetPort"], "public");
    assert!(port.is_none_or(|port| led["port"] == port), "{service} has no port {port:?}");
}

/// The one workload whose pods have these labels: what serves there.
fn selected<'a>(selector: &Value, workloads: &'a [Workload]) -> &'a Workload {
    let labelled: Vec<&Workload> = workloads.iter().filter(|workload| matches(selector, &workload.labels)).collect();
    let (found, others): (Vec<&Workload>, Vec<&Workload>) =
        labelled.into_iter().partition(|workload| workload.is_served());
    assert_eq!(found.len(), 1, "{selector} selects {:?}", found.iter().map(|w| &w.name).collect::<Vec<_>>());
    assert!(others.iter().all(|other| other.name == found[0].name), "{selector} selects other pods too");
    found[0]
}

fn matches(selector: &Value, labels: &Value) -> bool {
    let selector = selector.as_object().expect("a selector names labels");
    !selector.is_empty() && selector.iter().all(|(name, value)| labels[name] == *value)
}

fn assert_known(value: &Value, members: &[&str]) {
    for name in value.as_object().expect("an object").keys() {
        assert!(members.contains(&name.as_str()), "{name} is none of {members:?}");
    }
}

fn name_of(document: &Value) -> String {
    text(&document["metadata"]["name"])
}
