//! What is wrong with a mesh that is installed.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Facts, Finding, id, label, some, text};

/// Judges whether the installed mesh does its work.
pub(crate) fn after(facts: &Facts, namespace: &str, revision: &str) -> Vec<Finding> {
    let mut out = Vec::new();
    control_plane(facts, namespace, revision, &mut out);
    bundles(facts, namespace, revision, &mut out);
    namespaces(facts, &mut out);
    pods(facts, namespace, revision, &mut out);
    plaintext(facts, namespace, revision, &mut out);
    out
}

fn control_plane(facts: &Facts, namespace: &str, revision: &str, out: &mut Vec<Finding>) {
    let Some(found) = facts.control_plane(namespace, revision) else {
        out.push(Finding::error(format!(
            "there is no control plane of revision {revision} in {namespace}"
        )));
        return;
    };
    let wanted = found["spec"]["replicas"].as_i64().unwrap_or(1);
    let ready = found["status"]["readyReplicas"].as_i64().unwrap_or(0);
    let version = label(found, "app.kubernetes.io/version");
    let text = format!(
        "control plane {}, version {version}: {ready} of {wanted} pods ready",
        id(found)
    );
    out.push(match (ready, wanted) {
        (0, _) => Finding::error(text),
        (ready, wanted) if ready < wanted => Finding::warning(text),
        _ => Finding::fine(text),
    });
    if wanted == 1 {
        out.push(Finding::warning(
            "one replica: while its node is drained no pod of the mesh can be made (--set pilot.replicaCount=2)",
        ));
    }
}

/// The API server must know the authority behind our webhooks.
fn bundles(facts: &Facts, namespace: &str, revision: &str, out: &mut Vec<Finding>) {
    let all = facts.mutating.iter().chain(&facts.validating);
    for configuration in all.filter(|c| label(c, "istio.io/rev") == revision) {
        let entries = configuration["webhooks"].as_array().into_iter().flatten();
        let lacking = entries
            .filter(|e| text(e, "/clientConfig/service/namespace") == namespace)
            .filter(|e| text(e, "/clientConfig/caBundle").is_empty())
            .count();
        if lacking > 0 {
            out.push(Finding::error(format!(
                "webhook configuration {}: {lacking} entries without caBundle, so the API server refuses what it asks \
                 them about; see the control plane's log",
                id(configuration)
            )));
        }
    }
}

/// Namespaces that say two things, or name nobody.
fn namespaces(facts: &Facts, out: &mut Vec<Finding>) {
    let mut known: Vec<&str> = Vec::new();
    for configuration in &facts.mutating {
        known.push(label(configuration, "istio.io/rev"));
        known.push(label(configuration, "istio.io/tag"));
    }
    for namespace in &facts.namespaces {
        let (injection, revision) = (
            label(namespace, "istio-injection"),
            label(namespace, "istio.io/rev"),
        );
        if !injection.is_empty() && !revision.is_empty() {
            out.push(Finding::warning(format!(
                "namespace {} has both istio-injection={injection}, which counts, and istio.io/rev={revision}, which does not",
                id(namespace)
            )));
        } else if !revision.is_empty() && !known.contains(&revision) {
            out.push(Finding::error(format!(
                "namespace {} has istio.io/rev={revision}, and no revision and no tag is called so: its pods are not injected",
                id(namespace)
            )));
        }
    }
}

fn pods(facts: &Facts, namespace: &str, revision: &str, out: &mut Vec<Finding>) {
    let mut without = Vec::new();
    let mut images: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut uncaptured = Vec::new();
    for pod in &facts.pods {
        let done = matches!(text(pod, "/status/phase"), "Succeeded" | "Failed");
        let host = pod["spec"]["hostNetwork"] == true;
        let of = text(pod, "/metadata/namespace");
        if done || host || of == namespace || !pod["metadata"]["deletionTimestamp"].is_null() {
            continue;
        }
        let injected = facts
            .namespace(of)
            .and_then(|n| facts.injected_by(n))
            .is_some();
        match proxy(pod) {
            Some(container) => {
                if pod["metadata"]["annotations"]["istio.io/rev"] == revision {
                    images
                        .entry(text(container, "/image"))
                        .or_default()
                        .push(id(pod));
                }
                if label(pod, "cni.istio.io/uninitialized") == "true" {
                    uncaptured.push(id(pod));
                }
            }
            None if injected && label(pod, "sidecar.istio.io/inject") != "false" => {
                without.push(id(pod));
            }
            None => {}
        }
    }
    if !without.is_empty() {
        out.push(Finding::warning(format!(
            "pods of injected namespaces without a sidecar (they are older than the label, or ask for none): {}; restart \
             them with `kubectl rollout restart`",
            some(&without)
        )));
    }
    if !uncaptured.is_empty() {
        out.push(Finding::error(format!(
            "pods whose traffic is not captured: {}; delete them",
            some(&uncaptured)
        )));
    }
    let current = current(facts, namespace, revision);
    for (image, pods) in images.iter().filter(|(i, _)| Some(**i) != current) {
        if current.is_some() {
            out.push(Finding::warning(format!(
                "{} pods run another proxy, {image}: {}; restart them when it suits",
                pods.len(),
                some(pods)
            )));
        }
    }
    let count: usize = images.values().map(Vec::len).sum();
    out.push(Finding::fine(format!(
        "{count} pods of revision {revision} have a sidecar"
    )));
}

/// Port 15010, which takes everybody's word for who they are: whether it answers, and whom it is to answer.
fn plaintext(facts: &Facts, namespace: &str, revision: &str, out: &mut Vec<Finding>) {
    let Some(found) = facts.control_plane(namespace, revision) else {
        return;
    };
    let arguments = found["spec"]["template"]["spec"]["containers"][0]["args"].as_array();
    let open = arguments
        .into_iter()
        .flatten()
        .any(|a| a == "--grpcAddr=:15010");
    let name = text(found, "/metadata/name");
    let host = format!("{name}.{namespace}.");
    let pods = facts.pods.iter().filter(|p| asks_in_plaintext(p, &host));
    let pods: Vec<String> = pods.map(id).collect();
    match (open, pods.is_empty()) {
        (false, true) => {}
        (false, false) => out.push(Finding::error(format!(
            "pods that ask the control plane on port 15010, which is closed: {}; let their discoveryAddress be \
             {name}.{namespace}.svc:15012 and restart them, or install with --set pilot.plaintextXds=true",
            some(&pods)
        ))),
        (true, true) => out.push(Finding::warning(
            "port 15010 tells everybody in the cluster what proxies are told, and no pod asks there; close it with \
             --set pilot.plaintextXds=false",
        )),
        (true, false) => out.push(Finding::warning(format!(
            "port 15010 tells everybody in the cluster what proxies are told; before it can be closed with --set \
             pilot.plaintextXds=false these have to ask on port 15012: {}",
            some(&pods)
        ))),
    }
}

/// Whether a pod was injected with that port of the Service whose names begin so: for its proxy, or for programs that
/// have none and are always sent to the default revision.
fn asks_in_plaintext(pod: &Value, host: &str) -> bool {
    let settings = proxy(pod)
        .and_then(|p| p["env"].as_array())
        .into_iter()
        .flatten()
        .filter(|v| v["name"] == "PROXY_CONFIG")
        .filter_map(|v| serde_json::from_str::<Value>(v["value"].as_str()?).ok());
    let mut addresses = settings.map(|s| text(&s, "/discoveryAddress").to_owned());
    let init = pod["spec"]["initContainers"].as_array();
    addresses.any(|a| a.starts_with(host) && a.ends_with(":15010"))
        || host.starts_with("istiod.")
            && init
                .into_iter()
                .flatten()
                .any(|c| c["name"] == "grpc-bootstrap-init")
}

/// The sidecar of a pod, of either kind.
fn proxy(pod: &Value) -> Option<&Value> {
    ["containers", "initContainers"]
        .into_iter()
        .filter_map(|key| pod["spec"][key].as_array())
        .flatten()
        .find(|c| c["name"] == "istio-proxy")
}

/// The image that gateways of this install name, which is that of its sidecars.
fn current<'a>(facts: &'a Facts, namespace: &str, revision: &str) -> Option<&'a str> {
    facts
        .deployments
        .iter()
        .filter(|d| text(d, "/metadata/namespace") == namespace)
        .filter(|d| label(d, "istio.io/rev") == revision)
        .map(|d| {
            let annotations = &d["spec"]["template"]["metadata"]["annotations"];
            annotations["sidecar.istio.io/proxyImage"]
                .as_str()
                .unwrap_or_default()
        })
        .find(|image| !image.is_empty())
}
