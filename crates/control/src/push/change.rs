//! What changed, and which types of resources that can matter to.
//!
//! An answer of "yes" costs a rebuild, whose equal results are then not sent; an answer of "no" must be certain.

use std::collections::BTreeSet;

use config::{Kind, ObjectKey};
use xds::type_url::{CDS, ECDS, EDS, LDS, NDS, RDS, SDS};

use crate::{listener, model::Mesh};

/// A set of changes; merging two gives what both did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Everything may have changed (MeshConfig, say).
    pub full: bool,
    /// Objects that changed.
    pub keys: BTreeSet<ObjectKey>,
    /// Services, as (hostname, namespace), whose endpoints changed.
    pub endpoints: BTreeSet<(String, String)>,
    /// Whether those endpoints also stand in clusters or listeners (DNS, headless, service accounts).
    pub endpoints_elsewhere: bool,
    /// Whether listeners are made from some VirtualService or DestinationRule among the objects.
    pub listener_rules: bool,
}

/// Which part of a type's resources is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// What proxies of one view share.
    Shared,
    /// What belongs to one proxy.
    Own,
}

impl Change {
    /// The change that these objects make, from one state of the mesh to the next.
    pub fn between(mut keys: BTreeSet<ObjectKey>, older: &Mesh, newer: &Mesh) -> Self {
        // Gateway API's objects reach proxies as what is made of them, and other objects can change that too.
        keys.extend(newer.gateway_api().changed_since(older.gateway_api()));
        let endpoints = newer.endpoint_changes(older);
        let endpoints_elsewhere = endpoints
            .iter()
            .any(|key| newer.endpoint_change_needs_clusters(older, key));
        let full = keys.iter().any(is_mesh_wide)
            || older.config() != newer.config()
            || older.snapshot().networks != newer.snapshot().networks;
        let listener_rules = keys
            .iter()
            .filter(|k| is_rule_kind(k.kind))
            .any(|k| listener::depends_on(older, k) || listener::depends_on(newer, k));
        Change {
            full,
            keys,
            endpoints,
            endpoints_elsewhere,
            listener_rules,
        }
    }

    /// Everything.
    pub fn everything() -> Self {
        Change {
            full: true,
            ..Change::default()
        }
    }

    /// Adds another change.
    pub fn merge(&mut self, other: &Change) {
        self.full |= other.full;
        self.keys.extend(other.keys.iter().cloned());
        self.endpoints.extend(other.endpoints.iter().cloned());
        self.endpoints_elsewhere |= other.endpoints_elsewhere;
        self.listener_rules |= other.listener_rules;
    }

    /// Whether only endpoints changed: nothing but the endpoints of the named services is to be built anew.
    pub fn only_endpoints(&self) -> bool {
        !self.full && self.keys.iter().all(|k| is_endpoint_kind(k.kind))
    }

    /// Whether every proxy keeps its labels, services and scope.
    pub(crate) fn leaves_proxies_in_place(&self) -> bool {
        !self.full
            && self
                .keys
                .iter()
                .all(|k| matches!(k.kind, Kind::EndpointSlice | Kind::Secret))
    }

    /// Whether any resource of this type may differ.
    pub(crate) fn affects(&self, type_url: &str, part: Part, router: bool) -> bool {
        if self.full {
            return true;
        }
        // A router's own resources are all of its listeners and routes.
        let part = if router { Part::Shared } else { part };
        let by_endpoints = match type_url {
            EDS => !self.endpoints.is_empty(),
            NDS => !self.endpoints.is_empty(),
            CDS | LDS => self.endpoints_elsewhere,
            _ => false,
        };
        by_endpoints
            || (type_url == LDS && self.listener_rules)
            || self
                .keys
                .iter()
                .any(|k| kind_affects(k.kind, type_url, part, router))
    }

    /// What to call this push in `pilot_push_triggers`.
    pub fn reason(&self) -> &'static str {
        if self.full {
            return "global";
        }
        let has = |kinds: &[Kind]| self.keys.iter().any(|k| kinds.contains(&k.kind));
        if self.only_endpoints() {
            if self.endpoints_elsewhere {
                "headlessendpoint"
            } else {
                "endpoint"
            }
        } else if has(&[Kind::Service, Kind::ServiceEntry]) {
            "service"
        } else if has(&[Kind::Secret]) {
            "secret"
        } else {
            "config"
        }
    }
}

/// Kinds that reach proxies only through the endpoints of services (and a proxy's own place in the mesh).
pub(crate) fn is_endpoint_kind(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::EndpointSlice | Kind::Pod | Kind::Node | Kind::WorkloadEntry
    )
}

fn is_rule_kind(kind: Kind) -> bool {
    matches!(kind, Kind::VirtualService | Kind::DestinationRule)
}

/// Whether an object can matter to any proxy at all.
pub(crate) fn matters(key: &ObjectKey) -> bool {
    key.kind != Kind::ServiceAccount
}

fn is_mesh_wide(key: &ObjectKey) -> bool {
    key.kind == Kind::Namespace
}

fn kind_affects(kind: Kind, type_url: &str, part: Part, router: bool) -> bool {
    let own = part == Part::Own;
    match kind {
        // Their effect on others is seen in the endpoints; what is left is the workload's own inbound side.
        Kind::Pod | Kind::Node | Kind::WorkloadEntry => {
            (own || router) && matches!(type_url, CDS | LDS)
        }
        Kind::EndpointSlice | Kind::ServiceAccount | Kind::WorkloadGroup => false,
        Kind::Namespace => true,
        Kind::Service | Kind::ServiceEntry => true,
        // For listeners only rules of TCP and TLS count: [`Change::listener_rules`].
        Kind::VirtualService => !own && matches!(type_url, CDS | RDS | NDS),
        // A rule's limits hold at the server too: in its inbound clusters.
        Kind::DestinationRule if own => type_url == CDS,
        Kind::DestinationRule => matches!(type_url, CDS | EDS | RDS),
        Kind::Gateway => router && matches!(type_url, CDS | LDS | RDS),
        Kind::Sidecar => !router && matches!(type_url, CDS | LDS | RDS | NDS),
        Kind::PeerAuthentication => matches!(type_url, CDS | EDS | LDS),
        // Inbound chains, and those of gateways.
        Kind::AuthorizationPolicy | Kind::RequestAuthentication => {
            (own || router) && type_url == LDS
        }
        Kind::Telemetry | Kind::WasmPlugin | Kind::TrafficExtension => {
            matches!(type_url, LDS | ECDS)
        }
        Kind::EnvoyFilter => matches!(type_url, CDS | LDS | RDS | ECDS),
        // A ConfigMap may hold the authorities of backends.
        Kind::Secret | Kind::ConfigMap => type_url == SDS,
        Kind::ProxyConfig => false,
        // What is made of them counts: [`Change::between`].
        Kind::GatewayClass
        | Kind::KubernetesGateway
        | Kind::ListenerSet
        | Kind::HttpRoute
        | Kind::GrpcRoute
        | Kind::TlsRoute
        | Kind::TcpRoute
        | Kind::ReferenceGrant
        | Kind::BackendTlsPolicy => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(kind: Kind) -> Change {
        Change {
            keys: BTreeSet::from([ObjectKey::new(kind, "default", "x")]),
            ..Change::default()
        }
    }

    #[test]
    fn a_route_change_leaves_endpoints_and_inbound_alone() {
        let change = change(Kind::VirtualService);
        assert!(change.affects(RDS, Part::Shared, false));
        assert!(!change.affects(EDS, Part::Shared, false));
        assert!(!change.affects(LDS, Part::Own, false));
        assert!(!change.affects(LDS, Part::Own, true));
        assert!(!change.only_endpoints());
        let tcp = Change {
            listener_rules: true,
            ..change
        };
        for router in [false, true] {
            assert!(tcp.affects(LDS, Part::Shared, router));
            assert!(tcp.affects(LDS, Part::Own, router));
        }
    }

    #[test]
    fn a_destination_rule_reaches_inbound_clusters() {
        let change = change(Kind::DestinationRule);
        assert!(change.affects(CDS, Part::Own, false));
        assert!(!change.affects(LDS, Part::Own, false));
    }

    #[test]
    fn endpoints_touch_clusters_only_where_clusters_hold_them() {
        let mut change = change(Kind::EndpointSlice);
        change
            .endpoints
            .insert(("a.default.svc.cluster.local".into(), "default".into()));
        assert!(change.only_endpoints());
        assert!(change.affects(EDS, Part::Shared, false));
        assert!(!change.affects(CDS, Part::Shared, false));
        assert!(!change.affects(RDS, Part::Shared, false));
        change.endpoints_elsewhere = true;
        assert!(change.affects(CDS, Part::Shared, false));
    }

    #[test]
    fn merging_keeps_both_and_everything_wins() {
        let mut both = change(Kind::Gateway);
        both.merge(&change(Kind::Sidecar));
        assert_eq!(both.keys.len(), 2);
        assert!(!both.affects(EDS, Part::Shared, false));
        both.merge(&Change::everything());
        assert!(both.affects(EDS, Part::Shared, false));
        assert_eq!(both.reason(), "global");
    }
}
