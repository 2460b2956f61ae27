//! What an install or upgrade would run into.

use serde_json::Value;

use super::{Facts, Finding, id, label, some, text};

/// Judges whether the mesh can be installed.
pub(crate) fn before(facts: &Facts, namespace: &str, revision: &str) -> Vec<Finding> {
    let mut out = Vec::new();
    server(facts, &mut out);
    nodes(facts, &mut out);
    definitions(facts, &mut out);
    webhooks(facts, namespace, revision, &mut out);
    network(facts, &mut out);
    ports(facts, &mut out);
    security(facts, &mut out);
    out
}

fn server(facts: &Facts, out: &mut Vec<Finding>) {
    let Some(server) = &facts.server else { return };
    if server.minor < OLDEST {
        out.push(Finding::error(format!(
            "the API server is {}: 1.{} is the oldest that is served",
            server.version, OLDEST.1
        )));
    } else if server.minor < NATIVE {
        out.push(Finding::warning(format!(
            "the API server is {}: sidecars are ordinary containers below 1.{}, so a Job with one does not end by itself",
            server.version, NATIVE.1
        )));
    } else {
        out.push(Finding::fine(format!("API server {}", server.version)));
    }
    match server.ahead {
        Some(ahead) if ahead.abs() > CLOCK => out.push(Finding::error(format!(
            "the API server's clock is {} s {} this one: certificates and tokens would be refused; set the clocks",
            ahead.abs(),
            if ahead > 0 { "ahead of" } else { "behind" },
        ))),
        Some(_) => out.push(Finding::fine("clocks agree")),
        None => {}
    }
}

fn nodes(facts: &Facts, out: &mut Vec<Finding>) {
    let mut fine = 0;
    for node in &facts.nodes {
        let name = id(node);
        let info = |key: &str| text(node, &format!("/status/nodeInfo/{key}"));
        let (kernel, system, architecture) = (
            info("kernelVersion"),
            info("operatingSystem"),
            info("architecture"),
        );
        if system != "linux" {
            out.push(Finding::warning(format!(
                "node {name} runs {system}: pods there are not captured"
            )));
            continue;
        }
        if !ARCHITECTURES.contains(&architecture) {
            out.push(Finding::error(format!(
                "node {name} is {architecture}: the images are built for {}",
                ARCHITECTURES.join(" and ")
            )));
            continue;
        }
        let mut numbers = kernel
            .split(|c: char| !c.is_ascii_digit())
            .map(|p| p.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version < KERNEL {
            out.push(Finding::error(format!(
                "node {name} has kernel {kernel}: {}.{} or newer is needed for interception",
                KERNEL.0, KERNEL.1
            )));
            continue;
        }
        let ready = node["status"]["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|c| c["type"] == "Ready" && c["status"] == "True");
        if ready {
            fine += 1;
        } else {
            out.push(Finding::warning(format!("node {name} is not ready")));
        }
    }
    if fine > 0 {
        out.push(Finding::fine(format!(
            "{fine} nodes can run pods of the mesh"
        )));
    }
}

fn definitions(facts: &Facts, out: &mut Vec<Finding>) {
    let mut foreign = Vec::new();
    for ours in kubernetes::crd::all() {
        let name = text(&ours, "/metadata/name");
        let Some(found) = facts.definitions.iter().find(|d| id(d) == name) else {
            continue;
        };
        let versions = |d: &Value| -> Vec<String> {
            let all = d["spec"]["versions"].as_array().into_iter().flatten();
            all.map(|v| text(v, "/name").to_owned()).collect()
        };
        let stored = found["status"]["storedVersions"].as_array();
        let served = versions(&ours);
        for version in stored.into_iter().flatten().filter_map(Value::as_str) {
            if !served.iter().any(|v| v == version) {
                out.push(Finding::error(format!(
                    "definition {name} has objects stored as {version}, which is not served: rewrite them as {} first",
                    served.join(" or ")
                )));
            }
        }
        let managers = found["metadata"]["managedFields"].as_array();
        let mine = managers
            .into_iter()
            .flatten()
            .any(|m| m["manager"] == kubernetes::FIELD_MANAGER);
        if !mine {
            foreign.push(name.to_owned());
        }
    }
    if !foreign.is_empty() {
        out.push(Finding::warning(format!(
            "definitions of another installer would be taken over: {}",
            some(&foreign)
        )));
    }
}

/// Webhooks that would do the same work twice, and those that would refuse us because nobody answers for them.
fn webhooks(facts: &Facts, namespace: &str, revision: &str, out: &mut Vec<Finding>) {
    for configuration in &facts.mutating {
        let ours = text(configuration, "/webhooks/0/clientConfig/service/namespace") == namespace
            && label(configuration, "istio.io/rev") == revision
            && label(configuration, "app.kubernetes.io/part-of") == "outrigger";
        let injects = label(configuration, "app") == "sidecar-injector"
            || text(configuration, "/webhooks/0/name").contains("sidecar-injector");
        let same = label(configuration, "istio.io/rev") == revision
            || label(configuration, "istio.io/tag") == revision;
        if injects && same && !ours {
            out.push(Finding::error(format!(
                "MutatingWebhookConfiguration {} injects for revision {revision} already: pods would get two sidecars; \
                 remove it, or install with another --revision",
                id(configuration)
            )));
        }
    }
    let all = facts.mutating.iter().chain(&facts.validating);
    for configuration in all {
        for entry in configuration["webhooks"].as_array().into_iter().flatten() {
            let call = |key: &str| text(entry, &format!("/clientConfig/service/{key}"));
            let (service, of) = (call("name"), call("namespace"));
            let must_answer = entry["failurePolicy"] != "Ignore" && !service.is_empty();
            if must_answer && concerns_us(entry) && facts.answers(of, service) != Some(true) {
                let own = of == namespace && label(configuration, "istio.io/rev") == revision;
                let text = format!(
                    "webhook {} of {} must be asked, and Service {of}/{service} has no pod that is ready: what it is \
                     asked about is refused",
                    text(entry, "/name"),
                    id(configuration)
                );
                // Ours is mended by the very install.
                out.push(match own {
                    true => Finding::warning(text),
                    false => Finding::error(text),
                });
            }
        }
    }
}

/// Whether a webhook is asked about something that an install makes.
fn concerns_us(entry: &Value) -> bool {
    let rules = entry["rules"].as_array().into_iter().flatten();
    rules
        .flat_map(|r| r["resources"].as_array().into_iter().flatten())
        .filter_map(Value::as_str)
        .any(|r| {
            matches!(
                r,
                "*" | "*/*" | "pods" | "deployments" | "services" | "configmaps" | "namespaces"
            )
        })
}

fn network(facts: &Facts, out: &mut Vec<Finding>) {
    let node_agents = facts.daemon_sets.iter().filter(|d| {
        let name = text(d, "/metadata/name");
        name.starts_with("istio-cni-node")
    });
    for agent in node_agents {
        let count = |key: &str| agent["status"][key].as_i64().unwrap_or(0);
        let (wanted, ready) = (count("desiredNumberScheduled"), count("numberReady"));
        if ready < wanted {
            out.push(Finding::error(format!(
                "DaemonSet {}: {ready} of {wanted} pods are ready; pods on the other nodes are not captured by the CNI plug-in",
                id(agent)
            )));
        }
    }
    let cilium = facts
        .daemon_sets
        .iter()
        .find(|d| label(d, "k8s-app") == "cilium");
    if cilium.is_some() {
        out.push(Finding::warning(
            "Cilium balances Services in its socket layer unless socketLB.hostNamespaceOnly is true: sidecars then see \
             addresses of pods where routes name Services",
        ));
    }
}

/// Containers of pods that would be injected, on ports that the sidecar needs.
fn ports(facts: &Facts, out: &mut Vec<Finding>) {
    let mut taken = Vec::new();
    for pod in &facts.pods {
        let namespace = facts.namespace(text(pod, "/metadata/namespace"));
        if namespace.and_then(|n| facts.injected_by(n)).is_none()
            || label(pod, "sidecar.istio.io/inject") == "false"
        {
            continue;
        }
        let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
        for container in containers.filter(|c| c["name"] != "istio-proxy") {
            let ports = container["ports"].as_array().into_iter().flatten();
            for port in ports.filter_map(|p| p["containerPort"].as_u64()) {
                if RESERVED.contains(&port) {
                    taken.push(format!(
                        "{} (container {}, port {port})",
                        id(pod),
                        text(container, "/name")
                    ));
                }
            }
        }
    }
    if !taken.is_empty() {
        out.push(Finding::error(format!(
            "ports 15000 to 15090 belong to the sidecar, and pods of the mesh listen there: {}",
            some(&taken)
        )));
    }
}

/// Namespaces whose level of Pod Security does not let the init container set up interception.
fn security(facts: &Facts, out: &mut Vec<Finding>) {
    let has_plugin = facts
        .daemon_sets
        .iter()
        .any(|d| text(d, "/metadata/name").starts_with("istio-cni-node"));
    let refused: Vec<String> = facts
        .namespaces
        .iter()
        .filter(|n| facts.injected_by(n).is_some())
        .filter(|n| {
            matches!(
                label(n, "pod-security.kubernetes.io/enforce"),
                "baseline" | "restricted"
            )
        })
        .map(id)
        .collect();
    if !refused.is_empty() && !has_plugin {
        out.push(Finding::error(format!(
            "Pod Security refuses NET_ADMIN, which istio-init needs, in namespaces {}: install with --set cni.enabled=true",
            some(&refused)
        )));
    }
}

/// The oldest API server with what we use: ValidatingAdmissionPolicy-free CRDs with CEL rules are stable since 1.29.
const OLDEST: (u32, u32) = (1, 29);
/// The first one whose sidecars are init containers by default (`inject` asks the kubelets for 1.33).
const NATIVE: (u32, u32) = (1, 33);
/// iptables' owner match in nft, TPROXY and SO_ORIGINAL_DST for IPv6 are all there.
const KERNEL: (u32, u32) = (4, 19);
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];
/// Seconds. Certificates begin two minutes before they are issued.
const CLOCK: i64 = 60;
/// What the sidecar listens on.
const RESERVED: [u64; 11] = [
    15000, 15001, 15002, 15004, 15006, 15008, 15020, 15021, 15053, 15090, 15099,
];
