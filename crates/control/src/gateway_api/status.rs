//! Reports as `status`: conditions, listeners, addresses and parents as Gateway API's definitions have them. Times are
//! put in where they are written, because they depend on what stands there.

use std::collections::{BTreeMap, BTreeSet};

use config::{Kind, ObjectKey, gateway_api::GROUP, gateway_api::ParentReference};
use serde_json::{Map, Value, json};

use super::{
    CONTROLLER, Condition, Fault, GatewayReport, ListenerReport, ParentReport, Report, features,
    report::AncestorReport,
};
use crate::model::Mesh;

/// The status of every object of Gateway API that is ours to report on: `conditions` without times, `parents` and
/// `ancestors` with our own alone.
pub fn all(mesh: &Mesh) -> BTreeMap<ObjectKey, Value> {
    let snapshot = mesh.snapshot();
    let reports = &mesh.gateway_api().reports;
    let mut out = BTreeMap::new();
    for (key, report) in reports.iter() {
        let generation = snapshot.get(key).map_or(0, |o| o.meta().generation);
        let status = match report {
            Report::Class => of_class(generation),
            Report::Gateway(gateway) => of_gateway(mesh, gateway, generation),
            Report::Route(parents) => {
                let parents: Vec<Value> = parents.iter().map(|p| parent(p, generation)).collect();
                json!({"parents": parents})
            }
            Report::Policy(ancestors) => {
                let all: Vec<Value> = ancestors.iter().map(|a| ancestor(a, generation)).collect();
                json!({"ancestors": all})
            }
        };
        out.insert(key.clone(), status);
    }
    // A route that names nothing of ours any more keeps nothing that we said.
    for (kind, keys) in [
        (Kind::HttpRoute, names(&snapshot.http_routes)),
        (Kind::GrpcRoute, names(&snapshot.grpc_routes)),
        (Kind::TlsRoute, names(&snapshot.tls_routes)),
        (Kind::TcpRoute, names(&snapshot.tcp_routes)),
    ] {
        for (namespace, name) in keys {
            out.entry(ObjectKey::new(kind, namespace, name))
                .or_insert_with(|| json!({"parents": []}));
        }
    }
    out
}

fn of_class(generation: i64) -> Value {
    let accepted = Condition::unless("Accepted", None, "Accepted", "Handled by Istio controller");
    let features: Vec<Value> = features::SUPPORTED
        .iter()
        .map(|name| json!({"name": name}))
        .collect();
    json!({
        "conditions": conditions(&[accepted], generation),
        "supportedFeatures": features,
    })
}

fn names<T>(table: &config::Table<T>) -> Vec<(String, String)> {
    table
        .iter()
        .map(|o| (o.meta.namespace.clone(), o.meta.name.clone()))
        .collect()
}

fn conditions(all: &[Condition], generation: i64) -> Vec<Value> {
    let mut sorted: Vec<&Condition> = all.iter().collect();
    sorted.sort_by_key(|c| c.kind);
    sorted
        .into_iter()
        .map(|c| {
            json!({
                "type": c.kind,
                "status": if c.holds { "True" } else { "False" },
                "reason": c.reason,
                "message": c.message,
                "observedGeneration": generation,
            })
        })
        .collect()
}

fn reference(parent: &ParentReference) -> Value {
    let mut out = Map::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            out.insert(name.to_owned(), value);
        }
    };
    put("group", Some(parent.group().into()));
    put("kind", Some(parent.kind().into()));
    put("namespace", parent.namespace.clone().map(Value::from));
    put("name", Some(parent.name.clone().into()));
    put("sectionName", parent.section_name.clone().map(Value::from));
    put("port", parent.port.map(Value::from));
    Value::Object(out)
}

fn parent(report: &ParentReport, generation: i64) -> Value {
    let message = match report.bound {
        0 | 1 => "Route was valid".to_owned(),
        n => format!("Route was valid, bound to {n} parents"),
    };
    let said = [
        Condition::unless("Accepted", report.denied.as_ref(), "Accepted", message),
        Condition::unless(
            "ResolvedRefs",
            report.unresolved.as_ref(),
            "ResolvedRefs",
            "All references resolved",
        ),
    ];
    json!({
        "parentRef": reference(&report.parent),
        "controllerName": CONTROLLER,
        "conditions": conditions(&said, generation),
    })
}

fn ancestor(report: &AncestorReport, generation: i64) -> Value {
    let valid = "Configuration is valid";
    let said = [
        Condition::unless("Accepted", report.denied.as_ref(), "Accepted", valid),
        Condition::unless(
            "ResolvedRefs",
            report.unresolved.as_ref(),
            "ResolvedRefs",
            valid,
        ),
    ];
    json!({
        "ancestorRef": reference(&report.ancestor),
        "controllerName": report.controller,
        "conditions": conditions(&said, generation),
    })
}

fn of_gateway(mesh: &Mesh, report: &GatewayReport, generation: i64) -> Value {
    if let Some(fault) = &report.refused {
        let said = ["Accepted", "Programmed"].map(|c| Condition::unless(c, Some(fault), "", ""));
        return json!({"conditions": conditions(&said, generation), "listeners": []});
    }
    let places = Places::find(mesh, report);
    let mut said = vec![accepted(report), programmed(report, &places)];
    if !report.is_set {
        said.push(Condition::unless(
            "ResolvedRefs",
            None,
            "ResolvedRefs",
            "All references resolved",
        ));
    }
    if report.insecure_frontend {
        said.push(Condition::unless(
            "InsecureFrontendValidationMode",
            None,
            "ConfigurationChanged",
            "Gateway is operating in AllowInsecureFallback mode for frontend validation",
        ));
    }
    let listeners: Vec<Value> = report
        .listeners
        .iter()
        .map(|l| listener(l, generation))
        .collect();
    let mut out = json!({
        "conditions": conditions(&said, generation),
        "listeners": listeners,
    });
    if report.is_set {
        return out;
    }
    if report.sets > 0 {
        out["attachedListenerSets"] = report.sets.into();
    }
    // An address that was given once stays while there is none: DNS follows it.
    let addresses = places.addresses(report);
    if !addresses.is_empty() {
        out["addresses"] = addresses
            .iter()
            .map(|value| {
                let ip = value.parse::<std::net::IpAddr>().is_ok();
                json!({"type": if ip { "IPAddress" } else { "Hostname" }, "value": value})
            })
            .collect();
    }
    out
}

fn listener(report: &ListenerReport, generation: i64) -> Value {
    let kinds: Vec<Value> = report
        .kinds
        .iter()
        .map(|kind| json!({"group": GROUP, "kind": kind}))
        .collect();
    json!({
        "name": report.name,
        "attachedRoutes": report.attached,
        "supportedKinds": kinds,
        "conditions": conditions(&report.conditions, generation),
    })
}

fn accepted(report: &GatewayReport) -> Condition {
    let all = report.listeners.len();
    let valid = report.listeners.iter().filter(|l| l.valid).count();
    let what = if report.is_set {
        "ListenerSet"
    } else {
        "Gateway"
    };
    let none = Fault::new(
        "ListenersNotValid",
        format!("None of the {what}'s listeners are valid"),
    );
    if report.fault.is_some() {
        Condition::unless("Accepted", report.fault.as_ref(), "", "")
    } else if all > 0 && valid == 0 {
        Condition::unless("Accepted", Some(&none), "", "")
    } else if valid < all && !report.is_set {
        Condition::unless(
            "Accepted",
            None,
            "ListenersNotValid",
            "One or more of the Gateway's listeners are invalid",
        )
    } else {
        Condition::unless("Accepted", None, "Accepted", "Resource accepted")
    }
}

fn programmed(report: &GatewayReport, places: &Places) -> Condition {
    let none_valid = report.is_set && !report.listeners.iter().any(|l| l.valid);
    let fault = if none_valid {
        Some(Fault::new(
            "ListenersNotValid",
            "None of the ListenerSet's listeners are valid",
        ))
    } else if report.services.is_empty() {
        Some(Fault::new(
            "UnsupportedAddress",
            "Failed to assign to any requested addresses",
        ))
    } else if !places.warnings.is_empty() {
        let warnings: Vec<&str> = places.warnings.iter().map(String::as_str).collect();
        let warnings = warnings.join("; ");
        let message = if places.internal.is_empty() {
            format!("Failed to assign to any requested addresses: {warnings}")
        } else {
            format!(
                "Assigned to service(s) {}, but failed to assign to all requested addresses: {warnings}",
                joined(&places.internal)
            )
        };
        let reason = if places.unusable {
            "AddressNotUsable"
        } else {
            "AddressNotAssigned"
        };
        Some(Fault::new(reason, message))
    } else {
        None
    };
    let message = if places.internal.is_empty() {
        "Resource programmed".to_owned()
    } else {
        format!(
            "Resource programmed, assigned to service(s) {}",
            joined(&places.internal)
        )
    };
    Condition::unless("Programmed", fault.as_ref(), "Programmed", message)
}

fn joined(all: &BTreeSet<String>) -> String {
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    match all.as_slice() {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [a, b] => format!("{a} and {b}"),
        [first @ .., last] => format!("{}, and {last}", first.join(", ")),
    }
}

/// Where a Gateway is reached.
#[derive(Debug, Default)]
struct Places {
    /// `HOST:PORT` of services.
    internal: BTreeSet<String>,
    /// Their addresses.
    internal_ips: BTreeSet<String>,
    /// Addresses of load balancers.
    external: BTreeSet<String>,
    /// Hosts of services that still wait for theirs.
    pending: BTreeSet<String>,
    warnings: BTreeSet<String>,
    /// Whether waiting does not help.
    unusable: bool,
}

impl Places {
    fn find(mesh: &Mesh, report: &GatewayReport) -> Places {
        let mut out = Places::default();
        for host in &report.services {
            let Some(service) = mesh.services().get(host, &report.namespace) else {
                let others: Vec<String> = mesh
                    .services()
                    .of_host(host)
                    .map(|s| format!("{:?}", s.namespace))
                    .collect();
                out.warnings.insert(if others.is_empty() {
                    format!("hostname {host:?} not found")
                } else {
                    format!(
                        "hostname {host:?} not found in namespace {:?}, but it was found in namespace(s) {}",
                        report.namespace,
                        others.join(", ")
                    )
                });
                out.unusable = true;
                continue;
            };
            for port in &report.ports {
                out.look(mesh, report, service, *port);
            }
        }
        out
    }

    fn look(
        &mut self,
        mesh: &Mesh,
        report: &GatewayReport,
        service: &crate::model::Service,
        port: u32,
    ) {
        let host = &service.hostname;
        if !mesh.endpoints(service, port).is_empty() {
            self.internal.insert(format!("{host}:{port}"));
            self.internal_ips.extend(
                service
                    .cluster_ips
                    .iter()
                    .filter(|a| {
                        a.parse::<std::net::IpAddr>()
                            .is_ok_and(|a| !a.is_unspecified())
                    })
                    .cloned(),
            );
            if !service.external_addresses.is_empty() {
                self.external
                    .extend(service.external_addresses.iter().cloned());
            } else if is_load_balancer(mesh, service) && self.pending.insert(host.clone()) {
                self.warnings
                    .insert(format!("address pending for hostname {host:?}"));
            }
            return;
        }
        let mut any = false;
        let mut hints = BTreeSet::new();
        for (number, endpoint) in mesh.all_endpoints(service) {
            any = true;
            if endpoint.port == port {
                hints.insert(number.to_string());
            }
        }
        if !any {
            self.warnings
                .insert(format!("no instances found for hostname {host:?}"));
        } else if !hints.is_empty() {
            let hints: Vec<String> = hints.into_iter().collect();
            self.warnings.insert(format!(
                "port {port} not found for hostname {host:?} (hint: the service port should be specified, not the workload port. Did you mean one of these ports: {}?)",
                hints.join(", ")
            ));
            self.unusable = true;
        } else if !(report.managed && service.port(port).is_some()) {
            self.warnings
                .insert(format!("port {port} not found for hostname {host:?}"));
            self.unusable = true;
        }
    }

    /// What users are told: addresses of load balancers, else the services themselves.
    fn addresses(&self, report: &GatewayReport) -> Vec<String> {
        if !self.external.is_empty() {
            return self.external.iter().cloned().collect();
        }
        let wanted = report.address_type.as_deref().unwrap_or("Hostname");
        let mut out: Vec<String> = Vec::new();
        if wanted != "Hostname" {
            out.extend(self.internal_ips.iter().cloned());
        }
        if wanted != "IPAddress" {
            for host_port in &self.internal {
                let host = host_port.rsplit_once(':').map_or("", |(host, _)| host);
                if !self.pending.contains(host) && !out.iter().any(|o| o == host) {
                    out.push(host.to_owned());
                }
            }
        }
        out
    }
}

fn is_load_balancer(mesh: &Mesh, service: &crate::model::Service) -> bool {
    let table = &mesh.snapshot().services;
    table
        .get(&service.namespace, &service.name)
        .is_some_and(|s| s.spec.spec.kind == "LoadBalancer")
}
