//! Routes put together: one VirtualService for each gateway (or service) and host.
//!
//! Rules for one host come from several HTTPRoutes and GRPCRoutes. The most specific comes first, whichever route it is
//! of: exact path, longest prefix, method, headers, query; among equals the older route.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use config::{Kind, Meta, Object, ObjectKey, gateway_api::ParentReference};
use proto::istio::networking::v1alpha3::{
    HttpMatchRequest, HttpRoute as Rule, L4MatchAttributes, TcpRoute, VirtualService,
    string_match::MatchType,
};

use super::{
    Derived, Fault, INFIX, Inputs, ParentReport, Report,
    grant::Grants,
    http::{self, Referrer, Rules},
    l4,
    parent::{Attachment, Parents, Route, To},
};
use crate::model::Origin;

/// What all routes mean.
#[derive(Debug, Default)]
pub(super) struct Attached {
    pub(super) virtual_services: Vec<Derived<VirtualService>>,
    pub(super) reports: BTreeMap<ObjectKey, Report>,
    /// Routes of each listener.
    pub(super) counts: BTreeMap<(ObjectKey, String), usize>,
}

pub(super) fn build(inputs: &Inputs<'_>, grants: &Grants, parents: &Parents<'_>) -> Attached {
    let mut building = Building {
        inputs,
        grants,
        parents,
        out: Attached::default(),
        by_host: BTreeMap::new(),
    };
    let s = inputs.snapshot;
    for route in inputs.sorted(&s.http_routes) {
        let (spec, of) = (&route.spec, building.of(Kind::HttpRoute, &route.meta));
        building.http(
            route,
            Kind::HttpRoute,
            (&spec.parent_refs, &spec.hostnames),
            |mesh| http::http(of.with_grants(!mesh), route),
        );
    }
    for route in inputs.sorted(&s.grpc_routes) {
        let (spec, of) = (&route.spec, building.of(Kind::GrpcRoute, &route.meta));
        building.http(
            route,
            Kind::GrpcRoute,
            (&spec.parent_refs, &spec.hostnames),
            |mesh| http::grpc(of.with_grants(!mesh), route),
        );
    }
    building.merge();
    for route in inputs.sorted(&s.tls_routes) {
        building.tls(route);
    }
    for route in inputs.sorted(&s.tcp_routes) {
        building.tcp(route);
    }
    building.out
}

impl<'a> Referrer<'a> {
    fn with_grants(self, needs_grant: bool) -> Self {
        Referrer {
            needs_grant,
            ..self
        }
    }
}

/// One route's rules for one gateway and host.
struct Part {
    created: i64,
    namespace: String,
    name: String,
    spec: VirtualService,
    from: Origin,
    source: config::Source,
}

struct Building<'a> {
    inputs: &'a Inputs<'a>,
    grants: &'a Grants,
    parents: &'a Parents<'a>,
    out: Attached,
    /// By `GATEWAY/HOST` or (mesh) `NAMESPACE[/PORT]/HOST`.
    by_host: BTreeMap<String, Vec<Part>>,
}

impl<'a> Building<'a> {
    fn of<'m>(&self, kind: Kind, meta: &'m Meta) -> Referrer<'m>
    where
        'a: 'm,
    {
        Referrer {
            inputs: self.inputs,
            grants: self.grants,
            kind,
            namespace: &meta.namespace,
            needs_grant: true,
        }
    }

    /// Attaches a route: its parents, and its rules for the mesh and for gateways; and says what came of it.
    fn attach<T, R>(
        &mut self,
        route: &Arc<Object<T>>,
        kind: Kind,
        (references, hostnames): (&[ParentReference], &[String]),
        rules: impl Fn(bool) -> Rules<R>,
    ) -> (Vec<Attachment>, Rules<R>, Rules<R>) {
        let attachments = self.parents.of(&Route {
            kind,
            namespace: &route.meta.namespace,
            hostnames,
            references,
        });
        let mesh = attachments.iter().any(|a| a.to.is_mesh());
        let gateway = attachments.iter().any(|a| !a.to.is_mesh());
        let of_mesh = if mesh { rules(true) } else { Rules::default() };
        let of_gateway = if gateway {
            rules(false)
        } else {
            Rules::default()
        };
        let reports = said(
            &attachments,
            of_mesh.fault.as_ref(),
            of_gateway.fault.as_ref(),
        );
        if !reports.is_empty() {
            let key = ObjectKey::new(kind, &*route.meta.namespace, &*route.meta.name);
            self.out.reports.insert(key, Report::Route(reports));
        }
        let mut bound: Vec<Attachment> = attachments
            .into_iter()
            .filter(|a| a.denied.is_none())
            .collect();
        for a in &bound {
            if let To::Listener {
                object, listener, ..
            } = &a.to
            {
                *self
                    .out
                    .counts
                    .entry((object.clone(), listener.name.clone()))
                    .or_default() += 1;
            }
        }
        bound.sort_by(|a, b| a.to.internal().cmp(b.to.internal()));
        (bound, of_mesh, of_gateway)
    }

    fn http<T>(
        &mut self,
        route: &Arc<Object<T>>,
        kind: Kind,
        info: (&[ParentReference], &[String]),
        rules: impl Fn(bool) -> Rules<Rule>,
    ) {
        let (bound, of_mesh, of_gateway) = self.attach(route, kind, info, rules);
        for attachment in bound {
            let (key, hosts, rules) = match &attachment.to {
                To::Mesh(hosts) => {
                    let mut key = route.meta.namespace.clone();
                    let mut rules = of_mesh.rules.clone();
                    if let Some(port) = attachment.reference.port {
                        key = format!("{key}/{port}");
                        only_port(&mut rules, port);
                    }
                    (key, hosts.clone(), rules)
                }
                To::Listener { listener, .. } => {
                    let hosts = or_all(info.1);
                    (listener.internal.clone(), hosts, of_gateway.rules.clone())
                }
            };
            if rules.is_empty() {
                continue;
            }
            for hostname in hosts.iter().filter(|h| attachment.to.takes_host(h)) {
                let part = Part {
                    created: route.meta.creation_timestamp.unwrap_or(0),
                    namespace: route.meta.namespace.clone(),
                    name: route.meta.name.clone(),
                    spec: VirtualService {
                        hosts: vec![hostname.clone()],
                        gateways: vec![attachment.to.internal().to_owned()],
                        http: rules.clone(),
                        ..VirtualService::default()
                    },
                    from: Origin::of(kind, route),
                    source: route.source.clone(),
                };
                self.by_host
                    .entry(format!("{key}/{hostname}"))
                    .or_default()
                    .push(part);
            }
        }
    }

    /// One VirtualService for each host, with the rules of all its routes in Gateway API's order.
    fn merge(&mut self) {
        for (key, mut parts) in std::mem::take(&mut self.by_host) {
            parts.sort_by(|a, b| {
                (a.created, &a.namespace, &a.name).cmp(&(b.created, &b.namespace, &b.name))
            });
            let mut parts = parts.into_iter();
            let Some(first) = parts.next() else { continue };
            let mut spec = first.spec;
            let mut from = vec![first.from];
            for part in parts {
                spec.http.extend(part.spec.http);
                if !from.contains(&part.from) {
                    from.push(part.from);
                }
            }
            spec.http.sort_by_key(rank);
            let object = Object {
                meta: Meta {
                    namespace: first.namespace,
                    name: key.replace('/', "~"),
                    creation_timestamp: (first.created != 0).then_some(first.created),
                    ..Meta::default()
                },
                spec,
                source: first.source,
            };
            self.out.virtual_services.push(Derived {
                object: Arc::new(object),
                from,
            });
        }
    }

    fn tls(&mut self, route: &Arc<Object<config::gateway_api::TlsRoute>>) {
        let spec = &route.spec;
        let of = self.of(Kind::TlsRoute, &route.meta);
        let (bound, of_mesh, of_gateway) = self.attach(
            route,
            Kind::TlsRoute,
            (&spec.parent_refs, &spec.hostnames),
            |mesh| l4::tls(of.with_grants(!mesh), &spec.rules, &spec.hostnames),
        );
        let mut count = 0;
        for attachment in bound {
            let (hosts, rules) = match &attachment.to {
                To::Mesh(hosts) => (
                    hosts.clone(),
                    l4::for_service(&of_mesh.rules, attachment.reference.port, hosts),
                ),
                To::Listener { listener, .. } if listener.hostname.is_empty() => {
                    (or_all(&spec.hostnames), of_gateway.rules.clone())
                }
                To::Listener { listener, .. } => (
                    l4::intersection(
                        &or_all(&spec.hostnames),
                        std::slice::from_ref(&listener.hostname),
                    ),
                    l4::for_listener(&of_gateway.rules, &listener.hostname),
                ),
            };
            for hostname in hosts {
                let made = VirtualService {
                    hosts: vec![hostname],
                    gateways: vec![attachment.to.internal().to_owned()],
                    tls: rules.clone(),
                    ..VirtualService::default()
                };
                self.add(route, Kind::TlsRoute, &format!("~tls~{count}"), made);
                count += 1;
            }
        }
    }

    fn tcp(&mut self, route: &Arc<Object<config::gateway_api::TcpRoute>>) {
        let spec = &route.spec;
        let of = self.of(Kind::TcpRoute, &route.meta);
        let (bound, of_mesh, of_gateway) =
            self.attach(route, Kind::TcpRoute, (&spec.parent_refs, &[]), |mesh| {
                l4::tcp(of.with_grants(!mesh), &spec.rules)
            });
        let mut count = 0;
        for attachment in bound {
            let (hosts, rules) = match &attachment.to {
                To::Mesh(hosts) => {
                    let mut rules = of_mesh.rules.clone();
                    if let Some(port) = attachment.reference.port {
                        only_tcp_port(&mut rules, port);
                    }
                    (hosts.clone(), rules)
                }
                To::Listener { .. } => (vec!["*".to_owned()], of_gateway.rules.clone()),
            };
            for hostname in hosts {
                let made = VirtualService {
                    hosts: vec![hostname],
                    gateways: vec![attachment.to.internal().to_owned()],
                    tcp: rules.clone(),
                    ..VirtualService::default()
                };
                self.add(route, Kind::TcpRoute, &format!("~tcp~{count}"), made);
                count += 1;
            }
        }
    }

    fn add<T>(&mut self, route: &Arc<Object<T>>, kind: Kind, suffix: &str, spec: VirtualService) {
        let object = Object {
            meta: Meta {
                namespace: route.meta.namespace.clone(),
                name: format!("{}{suffix}~{INFIX}", route.meta.name),
                creation_timestamp: route.meta.creation_timestamp,
                ..Meta::default()
            },
            spec,
            source: route.source.clone(),
        };
        self.out.virtual_services.push(Derived {
            object: Arc::new(object),
            from: vec![Origin::of(kind, route)],
        });
    }
}

fn or_all(hostnames: &[String]) -> Vec<String> {
    if hostnames.is_empty() {
        vec!["*".to_owned()]
    } else {
        hostnames.to_vec()
    }
}

/// One report for each parent that the route names: if any of its listeners takes the route, it is attached.
fn said(
    attachments: &[Attachment],
    of_mesh: Option<&Fault>,
    of_gateway: Option<&Fault>,
) -> Vec<ParentReport> {
    // From what counts most to what counts least.
    let weight = |fault: &Option<Fault>| match fault.as_ref().map(|f| f.reason) {
        None => 0,
        Some("NotAllowedByListeners") => 1,
        Some("NoMatchingListenerHostname") => 2,
        Some(_) => 3,
    };
    let mut out: Vec<ParentReport> = Vec::new();
    let mut messages: BTreeMap<usize, BTreeSet<String>> = BTreeMap::new();
    for attachment in attachments {
        let unresolved = if attachment.to.is_mesh() {
            of_mesh
        } else {
            of_gateway
        };
        let bound = usize::from(attachment.denied.is_none());
        let known = out.iter().position(|r| r.parent == attachment.reference);
        let Some(at) = known else {
            if let Some(fault) = &attachment.denied {
                messages
                    .entry(out.len())
                    .or_default()
                    .insert(fault.message.clone());
            }
            out.push(ParentReport {
                parent: attachment.reference.clone(),
                bound,
                denied: attachment.denied.clone(),
                unresolved: unresolved.cloned(),
            });
            continue;
        };
        let report = &mut out[at];
        report.bound += bound;
        let (old, new) = (weight(&report.denied), weight(&attachment.denied));
        if new < old {
            report.denied.clone_from(&attachment.denied);
            messages.remove(&at);
        } else if new == old
            && let (Some(fault), Some(more)) = (&mut report.denied, &attachment.denied)
            && messages.entry(at).or_default().insert(more.message.clone())
        {
            fault.message = format!("{}; {}", fault.message, more.message);
        }
    }
    out
}

fn only_port(rules: &mut [Rule], port: u32) {
    for rule in rules {
        if rule.r#match.is_empty() {
            rule.r#match.push(HttpMatchRequest::default());
        }
        for m in &mut rule.r#match {
            m.port = port;
        }
    }
}

fn only_tcp_port(rules: &mut [TcpRoute], port: u32) {
    for rule in rules {
        if rule.r#match.is_empty() {
            rule.r#match.push(L4MatchAttributes::default());
        }
        for m in &mut rule.r#match {
            m.port = port;
        }
    }
}

/// Kind and length of the path, whether there is a method, numbers of headers and parameters.
type Specific = (u8, usize, bool, usize, usize);

/// Sorts the most specific rule first. A rule has one match at most; without any it goes last.
fn rank(rule: &Rule) -> (bool, Reverse<Specific>) {
    let Some(m) = rule.r#match.first() else {
        return (true, Reverse((0, 0, false, 0, 0)));
    };
    let (kind, length) = match m.uri.as_ref().and_then(|u| u.match_type.as_ref()) {
        Some(MatchType::Exact(v)) => (3, v.len()),
        Some(MatchType::Prefix(v)) => (2, v.len()),
        Some(MatchType::Regex(v)) => (1, v.len()),
        None => (0, 0),
    };
    let specific = (
        kind,
        length,
        m.method.is_some(),
        m.headers.len(),
        m.query_params.len(),
    );
    (false, Reverse(specific))
}
