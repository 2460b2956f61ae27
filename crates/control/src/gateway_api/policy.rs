//! BackendTLSPolicies become DestinationRules: one for each backend, of which the oldest policy counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use config::{
    Kind, Meta, Object, ObjectKey,
    gateway_api::{
        BackendTlsPolicy, BackendValidation, GROUP, HttpBackendRef, ParentReference, PolicyTarget,
        SubjectAltNameType,
    },
};
use proto::istio::networking::v1alpha3::{
    ClientTlsSettings, DestinationRule, PortSelector, TrafficPolicy, client_tls_settings::TlSmode,
    traffic_policy::PortTrafficPolicy,
};

use super::{
    CONTROLLER, Derived, Fault, INFIX, Inputs, MESH_CONTROLLER, Report, listener,
    report::AncestorReport,
};
use crate::{model::Origin, secret};

/// Annotation of a policy that is to be left alone.
const IGNORE: &str = "istio.io/ignore-policy-attachment";
/// A reference that leads nowhere: the backend is not reached, rather than reached without the check.
const INVALID: &str = "invalid://";
/// What `status.ancestors` may hold.
const MAX_ANCESTORS: usize = 16;

/// What all policies mean.
#[derive(Debug, Default)]
pub(super) struct Policies {
    pub(super) rules: Vec<Derived<DestinationRule>>,
    pub(super) reports: BTreeMap<ObjectKey, Report>,
}

/// A backend: kind, namespace, name, and one of its hosts.
type Backend = (String, String, String, String);

/// The Gateways (namespace, name) through which each backend (kind, namespace, name) is reached.
type Gateways = BTreeMap<(String, String, String), BTreeSet<(String, String)>>;

/// What of a policy counts for a backend.
struct Part {
    section: Option<String>,
    tls: ClientTlsSettings,
    from: Origin,
    created: Option<i64>,
}

pub(super) fn build(inputs: &Inputs<'_>) -> Policies {
    let mut out = Policies::default();
    let table = &inputs.snapshot.backend_tls_policies;
    if table.is_empty() {
        return out;
    }
    let ancestors = ancestors(inputs);
    let all: Vec<_> = inputs
        .sorted(table)
        .into_iter()
        .filter(|p| !is_ignored(&p.meta))
        .collect();
    let mut parts: BTreeMap<Backend, Vec<Part>> = BTreeMap::new();
    for (at, policy) in all.iter().enumerate() {
        let older = &all[..at];
        let reports = one(inputs, policy, older, &ancestors, &mut parts);
        let key = ObjectKey::new(
            Kind::BackendTlsPolicy,
            &*policy.meta.namespace,
            &*policy.meta.name,
        );
        out.reports.insert(key, Report::Policy(reports));
    }
    out.rules = parts
        .into_iter()
        .map(|(backend, parts)| rule(inputs, backend, parts))
        .collect();
    out
}

fn is_ignored(meta: &Meta) -> bool {
    meta.annotations
        .get(IGNORE)
        .is_some_and(|v| v.eq_ignore_ascii_case("true"))
}

fn one(
    inputs: &Inputs<'_>,
    policy: &Arc<Object<BackendTlsPolicy>>,
    older: &[&Arc<Object<BackendTlsPolicy>>],
    gateways_of: &Gateways,
    parts: &mut BTreeMap<Backend, Vec<Part>>,
) -> Vec<AncestorReport> {
    let namespace = &policy.meta.namespace;
    let validation = &policy.spec.validation;
    let (credential, unresolved, refused) = authorities(inputs, validation, namespace);
    let mut tls = ClientTlsSettings {
        sni: validation.hostname.clone(),
        subject_alt_names: validation
            .subject_alt_names
            .iter()
            .map(|n| match n.kind {
                SubjectAltNameType::Hostname => n.hostname.clone(),
                SubjectAltNameType::Uri => n.uri.clone(),
            })
            .collect(),
        credential_name: credential,
        ..ClientTlsSettings::default()
    };
    tls.set_mode(TlSmode::Simple);
    let mut out = Vec::new();
    let mut gateways: BTreeSet<(String, String)> = BTreeSet::new();
    let mut last = refused.clone();
    for target in &policy.spec.target_refs {
        let mut denied = refused.clone();
        match hosts(inputs, target, namespace) {
            Err(fault) => denied = Some(fault),
            Ok(hosts) => {
                let same = |t: &PolicyTarget| t == target;
                let first = older.iter().find(|o| {
                    o.meta.namespace == *namespace && o.spec.target_refs.iter().any(same)
                });
                if let Some(first) = first {
                    denied = Some(Fault::new(
                        "Conflicted",
                        format!(
                            "Conflicts with BackendTLSPolicy {:?} targeting the same backend",
                            first.meta.name
                        ),
                    ));
                } else {
                    for host in hosts {
                        let backend = (
                            target.kind.clone(),
                            namespace.clone(),
                            target.name.clone(),
                            host,
                        );
                        parts.entry(backend).or_default().push(Part {
                            section: target.section_name.clone().filter(|s| !s.is_empty()),
                            tls: tls.clone(),
                            from: Origin::of(Kind::BackendTlsPolicy, policy),
                            created: policy.meta.creation_timestamp,
                        });
                    }
                }
                let key = (target.kind.clone(), namespace.clone(), target.name.clone());
                gateways.extend(gateways_of.get(&key).into_iter().flatten().cloned());
            }
        }
        last.clone_from(&denied);
        out.push(AncestorReport {
            ancestor: ParentReference {
                group: Some(target.group.clone()),
                kind: Some(target.kind.clone()),
                namespace: None,
                name: target.name.clone(),
                section_name: target.section_name.clone(),
                port: None,
            },
            controller: MESH_CONTROLLER,
            denied,
            unresolved: unresolved.clone(),
        });
    }
    for (of, name) in gateways {
        out.push(AncestorReport {
            ancestor: ParentReference {
                group: Some(GROUP.to_owned()),
                kind: Some("Gateway".to_owned()),
                namespace: (of != *namespace).then_some(of),
                name,
                section_name: None,
                port: None,
            },
            controller: CONTROLLER,
            denied: last.clone(),
            unresolved: unresolved.clone(),
        });
    }
    out.truncate(MAX_ANCESTORS);
    out
}

/// The credential that holds the authorities; what of the references cannot be followed; why nothing is accepted.
fn authorities(
    inputs: &Inputs<'_>,
    validation: &BackendValidation,
    namespace: &str,
) -> (String, Option<Fault>, Option<Fault>) {
    let Some(reference) = validation.ca_certificate_refs.first() else {
        // Those of the proxy's system.
        return (String::new(), None, None);
    };
    let invalid = |reason: &'static str, why: String| {
        (
            INVALID.to_owned(),
            Some(Fault::new(reason, why.clone())),
            Some(Fault::new("NoValidCACertificate", why)),
        )
    };
    let name = &reference.name;
    if !reference.group.is_empty() || reference.kind != "ConfigMap" {
        return invalid(
            "InvalidKind",
            format!(
                "Certificate reference not supported: unsupported reference kind: {}",
                reference.kind
            ),
        );
    }
    let Some(map) = inputs.snapshot.config_maps.get(namespace, name) else {
        return invalid(
            "InvalidCACertificateRef",
            format!(
                "Certificate reference not found: reference {namespace}/{name} (of kind ConfigMap) not found"
            ),
        );
    };
    if let Err(why) = secret::check_config_map(&map.spec) {
        return invalid(
            "InvalidCACertificateRef",
            format!("Certificate invalid: {why}"),
        );
    }
    (format!("configmap://{namespace}/{name}"), None, None)
}

/// The hosts of a target.
fn hosts(
    inputs: &Inputs<'_>,
    target: &PolicyTarget,
    namespace: &str,
) -> Result<Vec<String>, Fault> {
    let missing =
        |what: String| Fault::new("TargetNotFound", format!("targetRefs invalid: {what}"));
    let not_found = || {
        missing(format!(
            "reference {namespace}/{} (of kind {}) not found",
            target.name, target.kind
        ))
    };
    let (hosts, ports) = match (target.group.as_str(), target.kind.as_str()) {
        ("" | "core", "Service") => {
            let service = inputs.snapshot.services.get(namespace, &target.name);
            let service = service.ok_or_else(not_found)?;
            (
                vec![inputs.service_host(&target.name, namespace)],
                service
                    .spec
                    .spec
                    .ports
                    .iter()
                    .map(|p| p.name.clone())
                    .collect::<Vec<_>>(),
            )
        }
        ("networking.istio.io", "ServiceEntry") => {
            let entry = inputs.snapshot.service_entries.get(namespace, &target.name);
            let entry = entry.ok_or_else(not_found)?;
            (
                entry.spec.hosts.clone(),
                entry.spec.ports.iter().map(|p| p.name.clone()).collect(),
            )
        }
        (_, kind) => return Err(missing(format!("unsupported kind {kind}"))),
    };
    match target.section_name.as_deref() {
        Some(section) if !section.is_empty() && !ports.iter().any(|p| p == section) => {
            Err(missing(format!(
                "sectionName {section:?} does not exist in {} {namespace}/{}",
                target.kind, target.name
            )))
        }
        _ => Ok(hosts),
    }
}

/// The rule of a backend: of policies for all ports, and of those for the same port, the oldest counts.
fn rule(
    inputs: &Inputs<'_>,
    (kind, namespace, name, host): Backend,
    parts: Vec<Part>,
) -> Derived<DestinationRule> {
    let ports: Vec<(String, u32)> = if kind == "Service" {
        let service = inputs.snapshot.services.get(&namespace, &name);
        service
            .iter()
            .flat_map(|s| &s.spec.spec.ports)
            .map(|p| (p.name.clone(), u32::from(p.port)))
            .collect()
    } else {
        let entry = inputs.snapshot.service_entries.get(&namespace, &name);
        entry
            .iter()
            .flat_map(|e| &e.spec.ports)
            .map(|p| (p.name.clone(), p.number))
            .collect()
    };
    let mut policy = TrafficPolicy::default();
    let mut from = Vec::new();
    let mut created = None;
    let mut seen = BTreeSet::new();
    for part in parts {
        match part.section {
            None if policy.tls.is_none() => policy.tls = Some(part.tls),
            Some(section) if seen.insert(section.clone()) => {
                let number = ports.iter().find(|(n, _)| *n == section).map_or(0, |p| p.1);
                policy.port_level_settings.push(PortTrafficPolicy {
                    port: Some(PortSelector { number }),
                    tls: Some(part.tls),
                    ..PortTrafficPolicy::default()
                });
            }
            _ => {}
        }
        created = created.or(part.created);
        if !from.contains(&part.from) {
            from.push(part.from);
        }
    }
    policy
        .port_level_settings
        .sort_by_key(|p| p.port.as_ref().map(|p| p.number));
    let made = if kind == "Service" {
        format!("{name}~{INFIX}")
    } else {
        format!("{name}~{}~{INFIX}", host.replace('.', "-"))
    };
    let object = Object {
        meta: Meta {
            namespace,
            name: made,
            creation_timestamp: created,
            ..Meta::default()
        },
        spec: DestinationRule {
            host,
            traffic_policy: Some(policy),
            ..DestinationRule::default()
        },
        source: from[0].source().clone(),
    };
    Derived {
        object: Arc::new(object),
        from,
    }
}

/// The Gateways of ours through which backends are reached.
fn ancestors(inputs: &Inputs<'_>) -> Gateways {
    let mut out = Gateways::new();
    let mut add =
        |namespace: &str,
         parents: &[ParentReference],
         backends: &mut dyn Iterator<Item = (&String, Option<&String>, &String)>| {
            let gateways: Vec<(String, String)> = parents
                .iter()
                .filter(|p| p.group() == GROUP && p.kind() == "Gateway")
                .map(|p| {
                    let of = p.namespace.clone().unwrap_or_else(|| namespace.to_owned());
                    (of, p.name.clone())
                })
                .filter(|(of, name)| {
                    let gateway = inputs.snapshot.kubernetes_gateways.get(of, name);
                    gateway.is_some_and(|g| listener::is_ours(inputs, &g.spec.gateway_class_name))
                })
                .collect();
            for (kind, of, name) in backends {
                let of = of.map_or(namespace, String::as_str);
                out.entry((kind.clone(), of.to_owned(), name.clone()))
                    .or_default()
                    .extend(gateways.iter().cloned());
            }
        };
    fn http(b: &HttpBackendRef) -> (&String, Option<&String>, &String) {
        (&b.kind, b.namespace.as_ref(), &b.name)
    }
    let s = inputs.snapshot;
    for r in s.http_routes.iter() {
        let mut backends = r.spec.rules.iter().flat_map(|r| &r.backend_refs).map(http);
        add(&r.meta.namespace, &r.spec.parent_refs, &mut backends);
    }
    for r in s.grpc_routes.iter() {
        let mut backends = r.spec.rules.iter().flat_map(|r| &r.backend_refs).map(http);
        add(&r.meta.namespace, &r.spec.parent_refs, &mut backends);
    }
    let l4 = |b: &'_ config::gateway_api::BackendRef| {
        (b.kind.clone(), b.namespace.clone(), b.name.clone())
    };
    for (meta, parents, rules) in s
        .tls_routes
        .iter()
        .map(|r| (&r.meta, &r.spec.parent_refs, &r.spec.rules))
        .chain(
            s.tcp_routes
                .iter()
                .map(|r| (&r.meta, &r.spec.parent_refs, &r.spec.rules)),
        )
    {
        let all: Vec<_> = rules.iter().flat_map(|r| &r.backend_refs).map(l4).collect();
        let mut backends = all.iter().map(|(k, ns, n)| (k, ns.as_ref(), n));
        add(&meta.namespace, parents, &mut backends);
    }
    out
}
