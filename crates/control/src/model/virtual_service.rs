//! VirtualService: names written out, delegates merged in, and who sees which for which gateway.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use config::{Kind, Object};
use proto::istio::networking::v1alpha3::{
    Destination, HttpMatchRequest, HttpRoute, StringMatch, VirtualService, string_match::MatchType,
};

use super::{Origin, host, service::ExportTo};
use crate::{gateway_api::Derived, route::Semantics};

/// The gateway name that means: all sidecars.
pub const MESH: &str = "mesh";

/// A VirtualService ready for translation: hosts, gateways and destinations are full names, delegates are merged.
#[derive(Debug, Clone)]
pub struct Routes {
    pub object: Arc<Object<VirtualService>>,
    /// With `.` written out as the object's namespace and MeshConfig's default applied.
    pub export_to: ExportTo,
    /// The object, then the delegates that were merged into it; or the routes of Gateway API that it was made of.
    pub from: Vec<Origin>,
    /// Whose rules it follows.
    pub semantics: Semantics,
}

impl Routes {
    /// The message.
    pub fn spec(&self) -> &VirtualService {
        &self.object.spec
    }

    /// The namespace of the object.
    pub fn namespace(&self) -> &str {
        &self.object.meta.namespace
    }

    /// The name of the object.
    pub fn name(&self) -> &str {
        &self.object.meta.name
    }

    /// The gateways that it is bound to; none means [`MESH`].
    pub fn gateways(&self) -> Vec<&str> {
        match self.spec().gateways.as_slice() {
            [] => vec![MESH],
            gateways => gateways.iter().map(String::as_str).collect(),
        }
    }
}

/// All VirtualServices, the oldest first, by who sees them through which gateway.
#[derive(Debug, Clone, Default)]
pub struct VirtualServices {
    /// Visible everywhere, by gateway.
    public: BTreeMap<String, Vec<Arc<Routes>>>,
    /// Visible only in the namespace that they are in, by (namespace, gateway).
    private: BTreeMap<(String, String), Vec<Arc<Routes>>>,
    /// Visible in a namespace that they name, by (namespace, gateway).
    exported: BTreeMap<(String, String), Vec<Arc<Routes>>>,
    label_keys: BTreeSet<String>,
}

impl VirtualServices {
    /// Resolves, merges and indexes the objects. `derived` were made of Gateway API's routes; `default_export` is
    /// MeshConfig's `defaultVirtualServiceExportTo`.
    pub fn new(
        objects: Vec<Arc<Object<VirtualService>>>,
        derived: &[Derived<VirtualService>],
        domain: &str,
        default_export: &ExportTo,
    ) -> Self {
        let mut resolved: Vec<_> = objects
            .iter()
            .map(|o| resolve(o, domain, default_export))
            .chain(derived.iter().map(|d| complete(d, default_export)))
            .collect();
        resolved.sort_by(|a, b| a.object.by_age(&b.object));
        let delegates: BTreeMap<(&str, &str), &Routes> = resolved
            .iter()
            .filter(|r| r.spec().hosts.is_empty())
            .map(|r| ((r.namespace(), r.name()), r))
            .collect();
        let mut out = Self::default();
        for root in resolved.iter().filter(|r| !r.spec().hosts.is_empty()) {
            out.add(Arc::new(merge_delegates(root, &delegates)));
        }
        out
    }

    /// Those that a proxy of `namespace` sees for `gateway` (`mesh` or `NAMESPACE/NAME`): its namespace's own
    /// private ones, then those exported to it, then the public ones; each part oldest first. Among the public ones
    /// Gateway API's routes of the own namespace come first: a consumer's routes go before the producer's.
    pub fn for_gateway(
        &self,
        namespace: &str,
        gateway: &str,
    ) -> impl Iterator<Item = &Arc<Routes>> {
        let key = (namespace.to_owned(), gateway.to_owned());
        let public = self.public.get(gateway).map_or(&[][..], Vec::as_slice);
        let own = |r: &Arc<Routes>, client: &str| {
            r.semantics == Semantics::Gateway && r.namespace() == client
        };
        let client = key.0.clone();
        let first: Vec<&Arc<Routes>> = public.iter().filter(|r| own(r, &client)).collect();
        let rest = public.iter().filter(move |r| !own(r, &client));
        self.private
            .get(&key)
            .into_iter()
            .chain(self.exported.get(&key))
            .flatten()
            .chain(first)
            .chain(rest)
    }

    /// Labels of clients that some match looks at.
    pub(super) fn label_keys(&self) -> impl Iterator<Item = &String> {
        self.label_keys.iter()
    }

    fn add(&mut self, routes: Arc<Routes>) {
        let spec = routes.spec();
        let http = spec
            .http
            .iter()
            .flat_map(|r| &r.r#match)
            .map(|m| &m.source_labels);
        let tcp = spec
            .tcp
            .iter()
            .flat_map(|r| &r.r#match)
            .map(|m| &m.source_labels);
        let tls = spec
            .tls
            .iter()
            .flat_map(|r| &r.r#match)
            .map(|m| &m.source_labels);
        self.label_keys
            .extend(http.chain(tcp).chain(tls).flat_map(|l| l.keys().cloned()));
        for gateway in routes.gateways() {
            if routes.export_to.contains("*") {
                self.public
                    .entry(gateway.to_owned())
                    .or_default()
                    .push(routes.clone());
                continue;
            }
            if routes.export_to.contains("~") {
                continue;
            }
            for namespace in &routes.export_to {
                let own = namespace == routes.namespace();
                let map = if own {
                    &mut self.private
                } else {
                    &mut self.exported
                };
                map.entry((namespace.clone(), gateway.to_owned()))
                    .or_default()
                    .push(routes.clone());
            }
        }
    }
}

/// The hosts that the routes lead to, each with the ports that are named (0 where one is not); routes whose every
/// match asks for another source namespace than `client` are left out.
pub fn destinations(spec: &VirtualService, client: &str) -> BTreeMap<String, BTreeSet<u32>> {
    let mut out: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    let mut add = |d: &Destination| {
        let port = d.port.as_ref().map_or(0, |p| p.number);
        out.entry(d.host.clone()).or_default().insert(port);
    };
    for http in &spec.http {
        let mut asked = http
            .r#match
            .iter()
            .filter(|m| !m.source_namespace.is_empty())
            .peekable();
        if asked.peek().is_some() && !asked.any(|m| m.source_namespace == client) {
            continue;
        }
        http.route
            .iter()
            .filter_map(|r| r.destination.as_ref())
            .for_each(&mut add);
        http.mirror.iter().for_each(&mut add);
        http.mirrors
            .iter()
            .filter_map(|m| m.destination.as_ref())
            .for_each(&mut add);
    }
    let tcp = spec.tcp.iter().flat_map(|r| &r.route);
    let tls = spec.tls.iter().flat_map(|r| &r.route);
    tcp.chain(tls)
        .filter_map(|r| r.destination.as_ref())
        .for_each(&mut add);
    out
}

fn resolve(
    object: &Arc<Object<VirtualService>>,
    domain: &str,
    default_export: &ExportTo,
) -> Routes {
    let mut copy = (**object).clone();
    let namespace = copy.meta.namespace.clone();
    let full = |host: &mut String| *host = host::fqdn(host, &namespace, domain);
    let gateway = |name: &mut String| {
        if name != MESH {
            *name = host::gateway_name(name, &namespace);
        }
    };
    let spec = &mut copy.spec;
    spec.hosts.iter_mut().for_each(full);
    spec.gateways.iter_mut().for_each(gateway);
    for http in &mut spec.http {
        http.r#match
            .iter_mut()
            .flat_map(|m| &mut m.gateways)
            .for_each(gateway);
        http.route
            .iter_mut()
            .filter_map(|r| r.destination.as_mut())
            .for_each(|d| full(&mut d.host));
        http.mirror.iter_mut().for_each(|d| full(&mut d.host));
        http.mirrors
            .iter_mut()
            .filter_map(|m| m.destination.as_mut())
            .for_each(|d| full(&mut d.host));
    }
    for tcp in &mut spec.tcp {
        tcp.r#match
            .iter_mut()
            .flat_map(|m| &mut m.gateways)
            .for_each(gateway);
        tcp.route
            .iter_mut()
            .filter_map(|r| r.destination.as_mut())
            .for_each(|d| full(&mut d.host));
    }
    for tls in &mut spec.tls {
        tls.r#match
            .iter_mut()
            .flat_map(|m| &mut m.gateways)
            .for_each(gateway);
        tls.route
            .iter_mut()
            .filter_map(|r| r.destination.as_mut())
            .for_each(|d| full(&mut d.host));
    }
    let listed: ExportTo = spec.export_to.iter().cloned().collect();
    let export_to = if listed.is_empty() {
        default_export
    } else {
        &listed
    }
    .iter()
    .map(|e| {
        if e == "." {
            namespace.clone()
        } else {
            e.clone()
        }
    })
    .collect();
    Routes {
        from: vec![Origin::of(Kind::VirtualService, object)],
        object: Arc::new(copy),
        export_to,
        semantics: Semantics::Istio,
    }
}

/// One made of Gateway API's routes: its names are full ones already, and a single label in it is a host of its own.
fn complete(derived: &Derived<VirtualService>, default_export: &ExportTo) -> Routes {
    let namespace = &derived.object.meta.namespace;
    let full = |e: &String| {
        if e == "." {
            namespace.clone()
        } else {
            e.clone()
        }
    };
    Routes {
        object: derived.object.clone(),
        export_to: default_export.iter().map(full).collect(),
        from: derived.from.clone(),
        semantics: Semantics::Gateway,
    }
}

fn merge_delegates(root: &Routes, delegates: &BTreeMap<(&str, &str), &Routes>) -> Routes {
    let mut out = root.clone();
    if root.spec().http.iter().all(|r| r.delegate.is_none()) {
        return out;
    }
    let mut object = (*root.object).clone();
    let mut merged = Vec::new();
    for http in std::mem::take(&mut object.spec.http) {
        let Some(delegate) = &http.delegate else {
            merged.push(http);
            continue;
        };
        let namespace = match delegate.namespace.as_str() {
            "" => root.namespace(),
            namespace => namespace,
        };
        let Some(found) = delegates.get(&(namespace, delegate.name.as_str())) else {
            tracing::warn!(
                "{}: the delegate {namespace}/{} does not exist (a delegate has no hosts); its route is left out",
                root.from[0],
                delegate.name
            );
            continue;
        };
        if !found.export_to.contains("*") && !found.export_to.contains(root.namespace()) {
            tracing::warn!(
                "{}: the delegate {} is not exported to namespace {}; its route is left out",
                root.from[0],
                found.from[0],
                root.namespace()
            );
            continue;
        }
        merged.extend(
            found
                .spec()
                .http
                .iter()
                .filter_map(|leaf| merge_route(&http, leaf)),
        );
        out.from.extend(found.from.iter().cloned());
    }
    object.spec.http = merged;
    out.object = Arc::new(object);
    out
}

/// The delegate's route with what the root says where it says nothing; `None` where their matches exclude each other.
fn merge_route(root: &HttpRoute, leaf: &HttpRoute) -> Option<HttpRoute> {
    let r#match = match (root.r#match.as_slice(), leaf.r#match.as_slice()) {
        ([], leaves) => leaves.to_vec(),
        (roots, []) => roots.to_vec(),
        (roots, leaves) => {
            let mut out = Vec::new();
            for l in leaves {
                let before = out.len();
                out.extend(
                    roots
                        .iter()
                        .filter(|r| !conflict(r, l))
                        .map(|r| merge_match(r, l)),
                );
                if out.len() == before {
                    return None;
                }
            }
            out
        }
    };
    let mut out = leaf.clone();
    out.r#match = r#match;
    out.delegate = None;
    out.name = join_names(&root.name, &leaf.name);
    out.rewrite = out.rewrite.or_else(|| root.rewrite.clone());
    out.direct_response = out.direct_response.or_else(|| root.direct_response.clone());
    out.timeout = out.timeout.or(root.timeout);
    out.retries = out.retries.or_else(|| root.retries.clone());
    out.fault = out.fault.or_else(|| root.fault.clone());
    out.mirror = out.mirror.or_else(|| root.mirror.clone());
    out.mirror_percent = out.mirror_percent.or(root.mirror_percent);
    out.mirror_percentage = out.mirror_percentage.or(root.mirror_percentage);
    out.cors_policy = out.cors_policy.or_else(|| root.cors_policy.clone());
    if out.mirrors.is_empty() {
        out.mirrors = root.mirrors.clone();
    }
    out.headers = out.headers.or_else(|| root.headers.clone());
    Some(out)
}

fn join_names(root: &str, leaf: &str) -> String {
    match (root, leaf) {
        (root, "") => root.to_owned(),
        ("", leaf) => leaf.to_owned(),
        (root, leaf) => format!("{root}-{leaf}"),
    }
}

fn merge_match(root: &HttpMatchRequest, leaf: &HttpMatchRequest) -> HttpMatchRequest {
    fn both<V: Clone>(
        root: &BTreeMap<String, V>,
        leaf: &BTreeMap<String, V>,
    ) -> BTreeMap<String, V> {
        root.iter()
            .chain(leaf)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect()
    }
    let mut out = leaf.clone();
    out.name = join_names(&root.name, &leaf.name);
    out.uri = out.uri.or_else(|| root.uri.clone());
    out.scheme = out.scheme.or_else(|| root.scheme.clone());
    out.method = out.method.or_else(|| root.method.clone());
    out.authority = out.authority.or_else(|| root.authority.clone());
    out.headers = both(&root.headers, &leaf.headers);
    out.without_headers = both(&root.without_headers, &leaf.without_headers);
    out.query_params = both(&root.query_params, &leaf.query_params);
    out.source_labels = both(&root.source_labels, &leaf.source_labels);
    if out.port == 0 {
        out.port = root.port;
    }
    if out.source_namespace.is_empty() {
        out.source_namespace = root.source_namespace.clone();
    }
    if out.gateways.is_empty() {
        out.gateways = root.gateways.clone();
    }
    if out.stat_prefix.is_empty() {
        out.stat_prefix = root.stat_prefix.clone();
    }
    out
}

fn conflict(root: &HttpMatchRequest, leaf: &HttpMatchRequest) -> bool {
    let clash = |r: Option<&StringMatch>, l: Option<&StringMatch>| strings_conflict(r, l);
    let clash_in = |r: &BTreeMap<String, StringMatch>, l: &BTreeMap<String, StringMatch>| {
        l.iter().any(|(key, value)| clash(r.get(key), Some(value)))
    };
    clash(root.uri.as_ref(), leaf.uri.as_ref())
        || clash(root.scheme.as_ref(), leaf.scheme.as_ref())
        || clash(root.method.as_ref(), leaf.method.as_ref())
        || clash(root.authority.as_ref(), leaf.authority.as_ref())
        || clash_in(&root.headers, &leaf.headers)
        || clash_in(&root.without_headers, &leaf.without_headers)
        || clash_in(&root.query_params, &leaf.query_params)
        || root.ignore_uri_case != leaf.ignore_uri_case
        || (root.port != 0 && leaf.port != 0 && root.port != leaf.port)
        || (!root.source_namespace.is_empty() && leaf.source_namespace != root.source_namespace)
        || leaf
            .source_labels
            .iter()
            .any(|(k, v)| root.source_labels.get(k).is_some_and(|r| r != v))
        || (!root.gateways.is_empty() && leaf.gateways.iter().any(|g| !root.gateways.contains(g)))
}

/// Whether no text could satisfy both; a leaf may only narrow what the root says.
fn strings_conflict(root: Option<&StringMatch>, leaf: Option<&StringMatch>) -> bool {
    let (Some(root), Some(leaf)) = (root, leaf) else {
        return false;
    };
    match (&root.match_type, &leaf.match_type) {
        (Some(MatchType::Exact(r)), Some(MatchType::Exact(l))) => r != l,
        (Some(MatchType::Prefix(r)), Some(MatchType::Prefix(l) | MatchType::Exact(l))) => {
            !l.starts_with(r.as_str())
        }
        // Everything else, an empty matcher included, counts as a conflict in Istio.
        _ => true,
    }
}
