//! Gateways and ListenerSets: each listener becomes a Gateway of the model with one server.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use config::{
    Kind, Meta, Object, ObjectKey, Source,
    gateway_api::{
        FromNamespaces, Gateway as KubernetesGateway, GatewayAddress, LabelSelector, Listener,
        ListenerSet, RouteGroupKind, TlsMode,
    },
};
use proto::istio::networking::v1alpha3::{Gateway, Port, Server};

use super::{
    CONTROLLER, Condition, DEFAULT_CLASS, Derived, DerivedGateway, Fault, GatewayReport, INFIX,
    Inputs, ListenerReport, Report, grant::Grants, tls,
};
use crate::model::{
    Origin,
    gateway::{Binding, ServiceBinding},
};

/// Of a listener's `tls.options`: `auto-passthrough`.
const LISTENER_PROTOCOL: &str = "gateway.istio.io/listener-protocol";
/// Names of what is made for a Gateway, where the usual ones do not do.
pub(super) const NAME_OVERRIDE: &str = "gateway.istio.io/name-override";
pub(super) const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
const ADDRESS_TYPE: &str = "networking.istio.io/address-type";
/// Of a Gateway's labels: the port at which TLS is handed on by the cluster that its SNI names.
const AUTO_PASSTHROUGH_PORT: &str = "networking.istio.io/gatewayPort";

/// A listener as routes see it.
#[derive(Debug, Clone)]
pub(super) struct Attachable {
    /// `NAMESPACE/NAME` of the Gateway made of it.
    pub(super) internal: String,
    /// Kinds of routes that may attach.
    pub(super) kinds: Vec<&'static str>,
    /// `NAMESPACE/HOST`; the namespace may be `*` (all) or `~` (none).
    pub(super) hosts: Vec<String>,
    /// As written; empty for all.
    pub(super) hostname: String,
    pub(super) name: String,
    pub(super) port: u32,
    pub(super) protocol: String,
}

/// All listeners.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    pub(super) gateways: Vec<DerivedGateway>,
    pub(super) reports: BTreeMap<ObjectKey, Report>,
    /// By the Gateway or ListenerSet that they stand in.
    pub(super) attachable: BTreeMap<ObjectKey, Vec<Attachable>>,
}

impl Listeners {
    pub(super) fn new(inputs: &Inputs<'_>, grants: &Grants) -> Self {
        let mut out = Listeners::default();
        for class in inputs.snapshot.gateway_classes.iter() {
            if class.spec.controller_name == CONTROLLER {
                let key = ObjectKey::new(Kind::GatewayClass, "", &*class.meta.name);
                out.reports.insert(key, Report::Class);
            }
        }
        let mut sets: BTreeMap<(String, String), Vec<&Arc<Object<ListenerSet>>>> = BTreeMap::new();
        for set in inputs.sorted(&inputs.snapshot.listener_sets) {
            let Some(parent) = &set.spec.parent_ref else {
                continue;
            };
            if parent.group() == config::gateway_api::GROUP && parent.kind() == "Gateway" {
                let namespace = parent.namespace.as_ref().unwrap_or(&set.meta.namespace);
                sets.entry((namespace.clone(), parent.name.clone()))
                    .or_default()
                    .push(set);
            }
        }
        for gateway in inputs.sorted(&inputs.snapshot.kubernetes_gateways) {
            if is_ours(inputs, &gateway.spec.gateway_class_name) {
                let key = (gateway.meta.namespace.clone(), gateway.meta.name.clone());
                let sets = sets.get(&key).map_or(&[][..], Vec::as_slice);
                out.gateway(inputs, grants, gateway, sets);
            }
        }
        out
    }

    fn gateway(
        &mut self,
        inputs: &Inputs<'_>,
        grants: &Grants,
        gateway: &Arc<Object<KubernetesGateway>>,
        sets: &[&Arc<Object<ListenerSet>>],
    ) {
        let key = ObjectKey::new(
            Kind::KubernetesGateway,
            &*gateway.meta.namespace,
            &*gateway.meta.name,
        );
        let (services, address_fault) = services(inputs, gateway);
        let fault = address_fault.or_else(|| parameters_fault(gateway));
        let managed = is_managed(&gateway.spec);
        let nowhere = services.is_empty() && fault.is_some();
        let binding = ServiceBinding {
            hosts: services.clone(),
            namespace: gateway.meta.namespace.clone(),
            service_account: managed.then(|| service_account(gateway)),
        };
        let (allowed, refused): (Vec<_>, Vec<_>) = sets
            .iter()
            .copied()
            .partition(|set| set_allowed(inputs, gateway, &set.meta.namespace));
        for set in refused {
            let key = set_key(set);
            let fault = Fault::new(
                "NotAllowed",
                "The parent Gateway does not allow this reference; check its 'spec.allowedListeners'",
            );
            let report = report(set.meta.namespace.clone(), Vec::new(), managed, true);
            let refused = GatewayReport {
                refused: Some(fault),
                ..report
            };
            self.reports.insert(key, Report::Gateway(refused));
        }
        let mut taken: Vec<Listener> = Vec::new();
        let mut building = Building {
            inputs,
            grants,
            gateway,
            binding: &binding,
            taken: &mut taken,
        };
        // Without a place to listen at there is nothing to say of listeners.
        let none: &[Listener] = &[];
        let made = building.listeners(
            &gateway.meta,
            &gateway.source,
            Kind::KubernetesGateway,
            if nowhere {
                none
            } else {
                &gateway.spec.listeners
            },
        );
        let mut ports: BTreeSet<u32> = made.ports.clone();
        let mut own = report(
            gateway.meta.namespace.clone(),
            services.clone(),
            managed,
            false,
        );
        own.fault = fault.clone();
        own.insecure_frontend = tls::insecure(&gateway.spec);
        own.address_type = gateway.meta.annotations.get(ADDRESS_TYPE).cloned();
        own.listeners = made.reports;
        self.gateways.extend(made.gateways);
        self.attachable.insert(key.clone(), made.attachable);
        for set in allowed {
            let made = building.listeners(
                &set.meta,
                &set.source,
                Kind::ListenerSet,
                if nowhere { none } else { &set.spec.listeners },
            );
            ports.extend(&made.ports);
            own.sets += usize::from(made.reports.iter().any(|l| l.valid));
            let mut of_set = report(
                gateway.meta.namespace.clone(),
                services.clone(),
                managed,
                true,
            );
            of_set.fault = fault.clone().map(|f| Fault {
                message: format!("Parent not accepted: {}", f.message),
                ..f
            });
            of_set.ports = made.ports.into_iter().collect();
            of_set.listeners = made.reports;
            self.reports.insert(set_key(set), Report::Gateway(of_set));
            self.gateways.extend(made.gateways);
            self.attachable.insert(set_key(set), made.attachable);
        }
        own.ports = ports.into_iter().collect();
        self.reports.insert(key, Report::Gateway(own));
    }
}

/// What becomes of the listeners of one object.
#[derive(Default)]
struct Made {
    gateways: Vec<DerivedGateway>,
    attachable: Vec<Attachable>,
    reports: Vec<ListenerReport>,
    ports: BTreeSet<u32>,
}

struct Building<'a> {
    inputs: &'a Inputs<'a>,
    grants: &'a Grants,
    gateway: &'a Object<KubernetesGateway>,
    binding: &'a ServiceBinding,
    /// Listeners of the Gateway and its sets that came first.
    taken: &'a mut Vec<Listener>,
}

impl Building<'_> {
    fn listeners(
        &mut self,
        meta: &Meta,
        source: &Source,
        kind: Kind,
        listeners: &[Listener],
    ) -> Made {
        let mut out = Made::default();
        for listener in listeners {
            let mut listener = listener.clone();
            if listener.port == 0 {
                listener.port = match listener.protocol.as_str() {
                    "HTTP" => 80,
                    "HTTPS" => 443,
                    _ => 0,
                };
            }
            let (kinds, kinds_fault) = kinds(&listener);
            if let Some(reason) = self.conflict(&listener) {
                let message =
                    "Listener has a conflict with another listener attached to the same Gateway";
                let fault = Fault::new(reason, message);
                let mut conflicted = Condition::unless("Conflicted", Some(&fault), "", "");
                conflicted.holds = true;
                let mut conditions = vec![
                    Condition::unless("Accepted", Some(&fault), "", ""),
                    conflicted,
                    Condition::unless("Programmed", Some(&fault), "", ""),
                ];
                if let Some(fault) = &kinds_fault {
                    conditions.push(Condition::unless("ResolvedRefs", Some(fault), "", ""));
                }
                out.reports.push(ListenerReport {
                    name: listener.name.clone(),
                    kinds,
                    attached: 0,
                    conditions,
                    valid: false,
                });
                continue;
            }
            self.taken.push(listener.clone());
            self.listener(
                meta,
                source,
                kind,
                &listener,
                (kinds, kinds_fault),
                &mut out,
            );
        }
        out
    }

    fn listener(
        &self,
        meta: &Meta,
        source: &Source,
        kind: Kind,
        listener: &Listener,
        kinds: (Vec<&'static str>, Option<Fault>),
        out: &mut Made,
    ) {
        let (kinds, kinds_fault) = kinds;
        let of = (kind, meta.namespace.as_str());
        let auto = is_auto_passthrough(meta, listener);
        let frontend = tls::frontend(&self.gateway.spec, listener.port);
        let (tls, tls_fault) = match &listener.tls {
            Some(tls) => {
                let (settings, fault) =
                    tls::settings(self.inputs, self.grants, of, tls, frontend, auto);
                (Some(settings), fault)
            }
            None => (None, None),
        };
        let mut accepted = protocol_fault(listener);
        let mut programmed = None;
        if let Some(fault) = &tls_fault {
            programmed = Some(Fault::new("Invalid", "Bad TLS configuration"));
            if matches!(
                fault.reason,
                "InvalidCACertificateRef" | "InvalidCACertificateKind" | "RefNotPermitted"
            ) {
                accepted =
                    accepted.or_else(|| Some(Fault::new("NoValidCACertificate", &*fault.message)));
            }
        }
        let without_tls = tls.is_none() && matches!(listener.protocol.as_str(), "HTTPS" | "TLS");
        if without_tls && kind == Kind::ListenerSet {
            accepted = Some(Fault::new(
                "UnsupportedProtocol",
                format!(
                    "protocol is {} but no TLS section is defined",
                    listener.protocol
                ),
            ));
            programmed = Some(Fault::new("Invalid", "Bad TLS configuration"));
        }
        let valid = accepted.is_none() && tls_fault.is_none();
        let ok = "No errors found";
        let mut conflicted = Condition::unless("Conflicted", None, "NoConflicts", ok);
        conflicted.holds = false;
        let refs = kinds_fault.or(tls_fault);
        out.reports.push(ListenerReport {
            name: listener.name.clone(),
            kinds: kinds.clone(),
            attached: 0,
            conditions: vec![
                Condition::unless("Accepted", accepted.as_ref(), "Accepted", ok),
                conflicted,
                Condition::unless("Programmed", programmed.as_ref(), "Programmed", ok),
                Condition::unless("ResolvedRefs", refs.as_ref(), "ResolvedRefs", ok),
            ],
            valid,
        });
        // A place for ListenerSets: nothing is served there by itself. And a listener of a set counts only if all of it
        // can be served.
        if without_tls || (kind == Kind::ListenerSet && !valid) {
            return;
        }
        if protocol_fault(listener).is_none() {
            out.ports.insert(listener.port);
        }
        let hosts = hosts(self.inputs, &meta.namespace, listener);
        let name = format!("{}~{INFIX}~{}", meta.name, listener.name);
        out.attachable.push(Attachable {
            internal: format!("{}/{name}", meta.namespace),
            kinds,
            hosts: hosts.clone(),
            hostname: listener.hostname.clone().unwrap_or_default(),
            name: listener.name.clone(),
            port: listener.port,
            protocol: listener.protocol.clone(),
        });
        // Routes attach to what is wrong as well, and wait; but nothing is served with half of what the user wants.
        if !valid {
            return;
        }
        let server = Server {
            port: Some(Port {
                name: "default".to_owned(),
                number: listener.port,
                protocol: listener.protocol.clone(),
                ..Port::default()
            }),
            hosts,
            tls,
            ..Server::default()
        };
        let object = Object {
            meta: Meta {
                namespace: meta.namespace.clone(),
                name,
                creation_timestamp: meta.creation_timestamp,
                ..Meta::default()
            },
            spec: Gateway {
                servers: vec![server],
                ..Gateway::default()
            },
            source: source.clone(),
        };
        let mut from = vec![Origin::named(kind, meta, source)];
        if kind == Kind::ListenerSet {
            from.push(Origin::of(Kind::KubernetesGateway, self.gateway));
        }
        out.gateways.push(DerivedGateway {
            derived: Derived {
                object: Arc::new(object),
                from,
            },
            binding: Binding::Service(self.binding.clone()),
        });
    }

    /// Why the listener has to give way to an earlier one.
    fn conflict(&self, listener: &Listener) -> Option<&'static str> {
        let l4 = |l: &Listener| matches!(l.protocol.as_str(), "TCP" | "UDP");
        let l7 = |l: &Listener| matches!(l.protocol.as_str(), "HTTP" | "HTTPS" | "TLS");
        let host = |l: &Listener| l.hostname.clone().unwrap_or_else(|| "*".to_owned());
        let prior = self.taken.iter().find(|prior| {
            prior.port == listener.port
                && if l7(prior) && l7(listener) {
                    host(prior) == host(listener)
                } else if (l4(prior) || l7(prior)) && (l4(listener) || l7(listener)) {
                    true
                } else {
                    prior.protocol == listener.protocol
                }
        })?;
        let protocols = (l4(prior) && l4(listener)) || prior.protocol != listener.protocol;
        Some(if protocols {
            "ProtocolConflict"
        } else {
            "HostnameConflict"
        })
    }
}

/// Whether the class of that name is looked after by us.
pub(super) fn is_ours(inputs: &Inputs<'_>, class: &str) -> bool {
    match inputs.snapshot.gateway_classes.get("", class) {
        Some(class) => class.spec.controller_name == CONTROLLER,
        None => class == DEFAULT_CLASS,
    }
}

/// Whether we make the Deployment and the Service: no address, or one IP address.
pub(super) fn is_managed(spec: &KubernetesGateway) -> bool {
    match spec.addresses.as_slice() {
        [] => true,
        [only] => only.kind == "IPAddress",
        _ => false,
    }
}

/// The name of the Deployment and the Service of a Gateway.
pub(super) fn deployment(gateway: &Object<KubernetesGateway>) -> String {
    named(gateway, NAME_OVERRIDE)
}

/// The name of the account of its pods.
pub(super) fn service_account(gateway: &Object<KubernetesGateway>) -> String {
    named(gateway, SERVICE_ACCOUNT)
}

fn named(gateway: &Object<KubernetesGateway>, annotation: &str) -> String {
    match gateway.meta.annotations.get(annotation) {
        Some(name) if !name.is_empty() => name.clone(),
        _ => format!("{}-{}", gateway.meta.name, gateway.spec.gateway_class_name),
    }
}

fn report(namespace: String, services: Vec<String>, managed: bool, is_set: bool) -> GatewayReport {
    GatewayReport {
        is_set,
        fault: None,
        refused: None,
        services,
        namespace,
        ports: Vec::new(),
        managed,
        listeners: Vec::new(),
        sets: 0,
        insecure_frontend: false,
        address_type: None,
    }
}

fn set_key(set: &Object<ListenerSet>) -> ObjectKey {
    ObjectKey::new(Kind::ListenerSet, &*set.meta.namespace, &*set.meta.name)
}

/// Host names of the services that a Gateway listens at, and what is wrong with its addresses.
fn services(
    inputs: &Inputs<'_>,
    gateway: &Object<KubernetesGateway>,
) -> (Vec<String>, Option<Fault>) {
    let namespace = &gateway.meta.namespace;
    if is_managed(&gateway.spec) {
        return (
            vec![inputs.service_host(&deployment(gateway), namespace)],
            None,
        );
    }
    let (named, skipped): (Vec<&GatewayAddress>, Vec<_>) = gateway
        .spec
        .addresses
        .iter()
        .partition(|a| a.kind == "Hostname");
    let hosts = named
        .into_iter()
        .map(|a| {
            if a.value.contains('.') {
                a.value.clone()
            } else {
                inputs.service_host(&a.value, namespace)
            }
        })
        .collect();
    let skipped: Vec<&str> = skipped.iter().map(|a| a.value.as_str()).collect();
    let fault = (!skipped.is_empty()).then(|| {
        Fault::new(
            "UnsupportedAddress",
            format!("only Hostname is supported, ignoring {skipped:?}"),
        )
    });
    (hosts, fault)
}

fn parameters_fault(gateway: &Object<KubernetesGateway>) -> Option<Fault> {
    let parameters = gateway
        .spec
        .infrastructure
        .as_ref()?
        .parameters_ref
        .as_ref()?;
    if parameters.kind != "ConfigMap" || !parameters.group.is_empty() {
        return Some(Fault::new(
            "InvalidParameters",
            format!(
                "Unsupported parametersRef group/kind {}/{}, only ConfigMap is supported",
                parameters.group, parameters.kind
            ),
        ));
    }
    Some(Fault::new(
        "InvalidParameters",
        format!(
            "spec.infrastructure.parametersRef: ConfigMap {} has no effect here: what is made for a Gateway cannot be changed by it yet",
            parameters.name
        ),
    ))
}

fn set_allowed(inputs: &Inputs<'_>, gateway: &Object<KubernetesGateway>, namespace: &str) -> bool {
    let allowed = gateway.spec.allowed_listeners.as_ref();
    let Some(rule) = allowed.and_then(|a| a.namespaces.as_ref()) else {
        return false;
    };
    match rule.from {
        FromNamespaces::All => true,
        FromNamespaces::Same => namespace == gateway.meta.namespace,
        FromNamespaces::None => false,
        FromNamespaces::Selector => rule
            .selector
            .as_ref()
            .is_some_and(|s| selects(inputs, s, namespace)),
    }
}

/// Whether a selector takes a namespace; its name counts as a label.
fn selects(inputs: &Inputs<'_>, selector: &LabelSelector, namespace: &str) -> bool {
    let Some(object) = inputs.snapshot.namespaces.get("", namespace) else {
        return false;
    };
    let mut labels = object.meta.labels.clone();
    labels.insert(
        "kubernetes.io/metadata.name".to_owned(),
        namespace.to_owned(),
    );
    selector.matches(&labels)
}

/// Whether TLS is handed on by the cluster that its SNI names (between networks).
fn is_auto_passthrough(meta: &Meta, listener: &Listener) -> bool {
    let Some(tls) = &listener.tls else {
        return false;
    };
    if tls.options.get(LISTENER_PROTOCOL).map(String::as_str) == Some("auto-passthrough") {
        return true;
    }
    if !meta.labels.contains_key("topology.istio.io/network") {
        return false;
    }
    match meta.labels.get(AUTO_PASSTHROUGH_PORT) {
        Some(port) => *port == listener.port.to_string(),
        None => listener.port == 15443,
    }
}

/// The hosts of the server: for each namespace whose routes may attach.
fn hosts(inputs: &Inputs<'_>, namespace: &str, listener: &Listener) -> Vec<String> {
    let hostname = listener.hostname.as_deref().unwrap_or("*");
    let rule = &listener.allowed_routes.namespaces;
    let namespaces: Vec<&str> = match (rule.from, &rule.selector) {
        (FromNamespaces::Same, _) => vec![namespace],
        (FromNamespaces::All, _) => vec!["*"],
        (FromNamespaces::None, _) | (FromNamespaces::Selector, None) => Vec::new(),
        (FromNamespaces::Selector, Some(selector)) => inputs
            .snapshot
            .namespaces
            .iter()
            .map(|n| n.meta.name.as_str())
            .filter(|n| selects(inputs, selector, n))
            .collect(),
    };
    if namespaces.is_empty() {
        // No namespace has this name: the listener stands, and nothing attaches.
        return vec![format!("~/{hostname}")];
    }
    namespaces
        .into_iter()
        .map(|n| format!("{n}/{hostname}"))
        .collect()
}

/// The kinds of routes that fit the protocol and that the listener allows.
fn kinds(listener: &Listener) -> (Vec<&'static str>, Option<Fault>) {
    let supported: Vec<&'static str> = match listener.protocol.as_str() {
        "HTTP" | "HTTPS" => vec!["HTTPRoute", "GRPCRoute"],
        "TCP" => vec!["TCPRoute"],
        "TLS" => match &listener.tls {
            Some(tls) if tls.mode == TlsMode::Terminate => vec!["TLSRoute", "TCPRoute"],
            _ => vec!["TLSRoute"],
        },
        _ => Vec::new(),
    };
    let asked = &listener.allowed_routes.kinds;
    if asked.is_empty() {
        return (supported, None);
    }
    let is_asked = |kind: &RouteGroupKind, name: &str| {
        kind.group == config::gateway_api::GROUP && kind.kind == name
    };
    let both: Vec<&'static str> = supported
        .into_iter()
        .filter(|name| asked.iter().any(|k| is_asked(k, name)))
        .collect();
    let fault =
        (both.len() != asked.len()).then(|| Fault::new("InvalidRouteKinds", "Invalid route kinds"));
    (both, fault)
}

fn protocol_fault(listener: &Listener) -> Option<Fault> {
    let protocol = &listener.protocol;
    let message = match protocol.as_str() {
        "HTTP" | "HTTPS" | "TLS" | "TCP" if listener.port == 0 => {
            format!("protocol {protocol} requires a port to be set")
        }
        "HTTP" | "HTTPS" | "TLS" | "TCP" => return None,
        "HBONE" => "protocol \"HBONE\" is only supported for waypoint proxies".to_owned(),
        _ => {
            let upper = protocol.to_uppercase();
            if matches!(upper.as_str(), "HTTP" | "HTTPS" | "TLS" | "TCP") {
                format!(
                    "protocol {protocol:?} is unsupported. hint: {upper:?} (uppercase) may be supported"
                )
            } else {
                format!("protocol {protocol:?} is unsupported")
            }
        }
    };
    Some(Fault::new("UnsupportedProtocol", message))
}
