//! `v1 Pod`.

use serde::Deserialize;

use super::null_as_default;

/// `v1 Pod`, with or without a status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// `spec`.
    #[serde(deserialize_with = "null_as_default")]
    pub spec: PodSpec,
    /// `status`; all empty for a pod that was never started.
    #[serde(deserialize_with = "null_as_default")]
    pub status: PodStatus,
}

/// `spec` of a Pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The node it runs on, or empty.
    pub node_name: String,
    /// Its service account; empty means `default`.
    pub service_account_name: String,
    /// Whether it shares its node's network (and so its addresses).
    pub host_network: bool,
    /// Host name inside the pod, or empty.
    pub hostname: String,
    /// The headless service that gives its name, or empty.
    pub subdomain: String,
    /// Containers.
    #[serde(deserialize_with = "null_as_default")]
    pub containers: Vec<Container>,
    /// Init containers; those with `restartPolicy: Always` run beside the others.
    #[serde(deserialize_with = "null_as_default")]
    pub init_containers: Vec<Container>,
    /// Further conditions that it must have to count as ready.
    #[serde(deserialize_with = "null_as_default")]
    pub readiness_gates: Vec<ReadinessGate>,
}

/// One element of `spec.readinessGates`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReadinessGate {
    /// The type of a condition.
    pub condition_type: String,
}

/// A container of a Pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// `Always` marks an init container as a sidecar.
    pub restart_policy: String,
    /// Declared ports.
    #[serde(deserialize_with = "null_as_default")]
    pub ports: Vec<ContainerPort>,
}

/// A declared port of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Its name, or empty.
    pub name: String,
    /// 1–65535.
    pub container_port: u16,
    /// `TCP` (also when empty), `UDP` or `SCTP`.
    pub protocol: String,
}

/// `status` of a Pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown` or empty.
    pub phase: String,
    /// Its address, or empty.
    #[serde(rename = "podIP")]
    pub pod_ip: String,
    #[serde(rename = "podIPs", deserialize_with = "null_as_default")]
    pod_ips: Vec<PodIp>,
    /// Its node's address, or empty.
    #[serde(rename = "hostIP")]
    pub host_ip: String,
    /// Conditions.
    #[serde(deserialize_with = "null_as_default")]
    pub conditions: Vec<PodCondition>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

/// One element of `status.conditions`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodCondition {
    /// `Ready`, `PodScheduled` …
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

impl Pod {
    /// All its addresses, the primary one first.
    pub fn addresses(&self) -> Vec<&str> {
        let mut out: Vec<&str> = Vec::new();
        let all = std::iter::once(self.status.pod_ip.as_str())
            .chain(self.status.pod_ips.iter().map(|p| p.ip.as_str()));
        for ip in all {
            if !ip.is_empty() && !out.contains(&ip) {
                out.push(ip);
            }
        }
        out
    }

    /// Whether its `Ready` condition is `True`.
    pub fn is_ready(&self) -> bool {
        self.has("Ready")
    }

    /// Whether its kubelet, when it was last heard, found its containers ready and its gates open. Such a pod's `Ready`
    /// is `False` all the same once its node has not reported for a while: the node controller writes that, and it alone.
    pub fn was_able(&self) -> bool {
        let gates = self.spec.readiness_gates.iter();
        self.has("ContainersReady") && gates.map(|g| &g.condition_type).all(|gate| self.has(gate))
    }

    fn has(&self, condition: &str) -> bool {
        let mut all = self.status.conditions.iter();
        all.any(|c| c.kind == condition && c.status == "True")
    }

    /// Whether it has ended for good, so that its address may belong to another pod by now.
    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Its service account with Kubernetes' default.
    pub fn service_account(&self) -> &str {
        match self.spec.service_account_name.as_str() {
            "" => "default",
            name => name,
        }
    }

    /// The containers that run as long as the pod does, native sidecars included.
    pub fn running_containers(&self) -> impl Iterator<Item = &Container> {
        let sidecars = self
            .spec
            .init_containers
            .iter()
            .filter(|c| c.restart_policy == "Always");
        self.spec.containers.iter().chain(sidecars)
    }

    /// The number of the declared port of that name and protocol (`TCP` …).
    pub fn port_named(&self, name: &str, protocol: &str) -> Option<u16> {
        self.running_containers()
            .flat_map(|c| &c.ports)
            .find(|p| {
                let declared = if p.protocol.is_empty() {
                    "TCP"
                } else {
                    &p.protocol
                };
                p.name == name && declared == protocol
            })
            .map(|p| p.container_port)
    }
}
