//! Services: completed with an address, and matched with their pods.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

use super::{Key, at, default_at, key, list, selects, text};
use crate::node::services::VirtualPort;

/// What the node needs to know of a pod.
#[derive(Clone, Debug)]
pub(crate) struct Backend {
    pub(crate) namespace: String,
    /// The Pod object.
    pub(crate) object: Value,
    pub(crate) address: Ipv4Addr,
    pub(crate) ready: bool,
}

/// A Service as the API server would store it.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) key: Key,
    pub(crate) object: Value,
    /// `None` for headless services and external names.
    pub(crate) address: Option<Ipv4Addr>,
}

impl Service {
    /// Fills in what the API server fills in. `allocate` gives the service's address.
    pub(crate) fn complete(
        mut object: Value,
        allocate: impl FnOnce(&Key) -> Ipv4Addr,
    ) -> Result<Self, String> {
        let key = key(&object);
        super::default_at(&mut object, &["metadata", "namespace"], key.0.clone());
        default_at(&mut object, &["spec", "type"], "ClusterIP");
        let kind = text(&object, &["spec", "type"]).to_owned();
        let mut address = None;
        if kind == "ExternalName" {
            if text(&object, &["spec", "externalName"]).is_empty() {
                return Err(
                    "`spec.externalName` is missing, which type ExternalName needs".to_owned(),
                );
            }
        } else {
            let given = text(&object, &["spec", "clusterIP"]).to_owned();
            if given != "None" {
                let ip = match given.as_str() {
                    "" => allocate(&key),
                    text => text.parse().map_err(|_| {
                        format!("`spec.clusterIP`: {text:?} is not an IPv4 address")
                    })?,
                };
                address = Some(ip);
                *super::at_mut(&mut object, &["spec", "clusterIP"]) = json!(ip.to_string());
            }
            let ip = text(&object, &["spec", "clusterIP"]).to_owned();
            default_at(&mut object, &["spec", "clusterIPs"], json!([ip]));
            default_at(&mut object, &["spec", "ipFamilies"], json!(["IPv4"]));
            default_at(&mut object, &["spec", "ipFamilyPolicy"], "SingleStack");
            default_at(&mut object, &["spec", "sessionAffinity"], "None");
        }
        if let Some(ports) = object["spec"]["ports"].as_array_mut() {
            for (i, port) in ports.iter_mut().enumerate() {
                let Some(number) = port["port"].as_u64().filter(|p| (1..=65535).contains(p)) else {
                    return Err(format!(
                        "`spec.ports[{i}].port` must be a number between 1 and 65535"
                    ));
                };
                default_at(port, &["protocol"], "TCP");
                default_at(port, &["targetPort"], number);
            }
        } else if kind != "ExternalName" && address.is_some() {
            return Err("`spec.ports` is missing".to_owned());
        }
        Ok(Self {
            key,
            object,
            address,
        })
    }

    /// `name.namespace.svc.cluster.local`.
    pub(crate) fn host(&self) -> String {
        format!("{}.{}.svc.cluster.local", self.key.1, self.key.0)
    }

    pub(crate) fn is_headless(&self) -> bool {
        text(&self.object, &["spec", "clusterIP"]) == "None"
    }

    /// The pods behind it that may get traffic.
    pub(crate) fn backends<'a>(&'a self, pods: &'a [Backend]) -> impl Iterator<Item = &'a Backend> {
        let unready_too = at(&self.object, &["spec", "publishNotReadyAddresses"]) == &json!(true);
        let selector = at(&self.object, &["spec", "selector"]);
        pods.iter().filter(move |p| {
            p.namespace == self.key.0
                && (p.ready || unready_too)
                && selects(selector, at(&p.object, &["metadata", "labels"]))
        })
    }

    /// Each port with its pods; `slices` are the user's own EndpointSlices for services without a selector.
    pub(crate) fn virtual_ports(&self, pods: &[Backend], slices: &[Value]) -> Vec<VirtualPort> {
        let Some(address) = self.address else {
            return Vec::new();
        };
        list(&self.object, &["spec", "ports"])
            .iter()
            .map(|port| VirtualPort {
                name: format!("{}/{}:{}", self.key.0, self.key.1, port_name(port)),
                address,
                port: port["port"].as_u64().unwrap_or(0) as u16,
                protocol: text(port, &["protocol"]).to_ascii_lowercase(),
                endpoints: self.endpoints(port, pods, slices),
            })
            .collect()
    }

    /// The address and port of each pod behind one of its ports.
    pub(crate) fn endpoints(
        &self,
        port: &Value,
        pods: &[Backend],
        slices: &[Value],
    ) -> Vec<(Ipv4Addr, u16)> {
        let mut out: Vec<_> = self
            .backends(pods)
            .filter_map(|p| Some((p.address, target_port(port, &p.object)?)))
            .collect();
        if self.object["spec"]["selector"].is_null() {
            for slice in slices.iter().filter(|s| {
                key(s).0 == self.key.0
                    && s["metadata"]["labels"]["kubernetes.io/service-name"] == json!(self.key.1)
            }) {
                let number = list(slice, &["ports"])
                    .iter()
                    .find(|p| text(p, &["name"]) == text(port, &["name"]))
                    .and_then(|p| p["port"].as_u64());
                let Some(number) = number else { continue };
                for endpoint in list(slice, &["endpoints"]) {
                    if endpoint["conditions"]["ready"] == json!(false) {
                        continue;
                    }
                    let addresses = list(endpoint, &["addresses"])
                        .iter()
                        .filter_map(|a| a.as_str()?.parse().ok());
                    out.extend(addresses.map(|a| (a, number as u16)));
                }
            }
        }
        out
    }

    /// The ports of this machine that lead to it, each with the number to try first.
    pub(crate) fn forwards(&self) -> Vec<(Value, u16)> {
        let kind = text(&self.object, &["spec", "type"]);
        list(&self.object, &["spec", "ports"])
            .iter()
            .filter(|p| text(p, &["protocol"]) == "TCP")
            .filter_map(|p| {
                let number = p["port"].as_u64()? as u16;
                let wanted = match (kind, p["nodePort"].as_u64()) {
                    ("LoadBalancer" | "NodePort", Some(node_port)) => node_port as u16,
                    ("LoadBalancer" | "NodePort", None) if number < 1024 => 8000 + number,
                    ("LoadBalancer" | "NodePort", None) => number,
                    _ if (self.key.0.as_str(), self.key.1.as_str()) == CONTROL_PLANE
                        && number == 15014 =>
                    {
                        0
                    }
                    _ => return None,
                };
                Some((p.clone(), wanted))
            })
            .collect()
    }
}

/// The control plane's monitoring port is reachable from the machine, so that commands find it.
const CONTROL_PLANE: (&str, &str) = ("istio-system", "istiod");

/// A port's name, or its number where it has none.
pub(crate) fn port_name(port: &Value) -> String {
    match text(port, &["name"]) {
        "" => port["port"].to_string(),
        name => name.to_owned(),
    }
}

/// The number that a service port means in a pod: itself, or the container port of that name.
fn target_port(port: &Value, pod: &Value) -> Option<u16> {
    match &port["targetPort"] {
        Value::String(name) => match name.parse() {
            Ok(number) => Some(number),
            Err(_) => container_port(pod, name),
        },
        number => number.as_u64().map(|n| n as u16),
    }
}

/// The number of a named container port of a pod.
pub(crate) fn container_port(pod: &Value, name: &str) -> Option<u16> {
    ["containers", "initContainers"]
        .iter()
        .flat_map(|field| list(pod, &["spec", field]))
        .flat_map(|c| list(c, &["ports"]))
        .find(|p| text(p, &["name"]) == name)
        .and_then(|p| p["containerPort"].as_u64())
        .map(|n| n as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(spec: Value) -> Result<Service, String> {
        let object =
            json!({"kind": "Service", "metadata": {"name": "web", "namespace": "a"}, "spec": spec});
        Service::complete(object, |_| Ipv4Addr::new(10, 96, 1, 1))
    }

    fn pod(n: u8, ready: bool) -> Backend {
        Backend {
            namespace: "a".into(),
            object: json!({"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}}),
            address: Ipv4Addr::new(10, 244, 0, n),
            ready,
        }
    }

    #[test]
    fn a_service_gets_an_address_and_finds_named_ports_of_ready_pods() {
        let s = service(
            json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}),
        )
        .unwrap();
        assert_eq!(s.object["spec"]["clusterIP"], "10.96.1.1");
        assert_eq!(s.object["spec"]["ports"][0]["protocol"], "TCP");
        let ports = s.virtual_ports(&[pod(5, true), pod(6, false)], &[]);
        assert_eq!(ports[0].endpoints, [(Ipv4Addr::new(10, 244, 0, 5), 8080)]);
    }

    #[test]
    fn headless_external_and_selectorless_services() {
        let s = service(json!({"clusterIP": "None", "selector": {"app": "web"}})).unwrap();
        assert!(s.is_headless() && s.virtual_ports(&[pod(5, true)], &[]).is_empty());
        assert_eq!(s.backends(&[pod(5, true), pod(6, false)]).count(), 1);
        assert!(
            service(json!({"type": "ExternalName"}))
                .unwrap_err()
                .contains("externalName")
        );
        let s = service(json!({"ports": [{"name": "http", "port": 80}]})).unwrap();
        let slice = json!({"metadata": {"namespace": "a", "labels": {"kubernetes.io/service-name": "web"}},
            "ports": [{"name": "http", "port": 9}], "endpoints": [{"addresses": ["10.1.1.1"]}]});
        assert_eq!(
            s.virtual_ports(&[pod(5, true)], &[slice])[0].endpoints,
            [(Ipv4Addr::new(10, 1, 1, 1), 9)]
        );
    }

    #[test]
    fn mistakes_are_named() {
        assert!(
            service(json!({"ports": [{"port": 0}]}))
                .unwrap_err()
                .contains("spec.ports[0].port")
        );
        assert!(
            service(json!({"clusterIP": "x", "ports": [{"port": 1}]}))
                .unwrap_err()
                .contains("clusterIP")
        );
        assert!(service(json!({})).unwrap_err().contains("spec.ports"));
    }

    #[test]
    fn load_balancers_are_reachable_from_the_machine() {
        let s = service(json!({"type": "LoadBalancer", "ports": [{"port": 80}, {"port": 443, "nodePort": 30443}]})).unwrap();
        let wanted: Vec<_> = s.forwards().into_iter().map(|f| f.1).collect();
        assert_eq!(wanted, [8080, 30443]);
        assert!(
            service(json!({"ports": [{"port": 80}]}))
                .unwrap()
                .forwards()
                .is_empty()
        );
    }
}
