//! The objects of any kind, as the API server's paths name them.

use config::Kind;
use kube::{
    Api, Client,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};

/// A group, version, kind and plural of a resource.
pub fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

/// The resource of one of the kinds that are read.
pub fn of_kind(kind: Kind, version: &str) -> ApiResource {
    resource(kind.group(), version, kind.name(), &plural(kind))
}

/// The plural in the API server's paths.
pub fn plural(kind: Kind) -> String {
    let name = kind.name().to_lowercase();
    match name.strip_suffix('y') {
        // Policy, Entry; but Gateway.
        Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies"),
        _ if name.ends_with("ss") => format!("{name}es"),
        _ => format!("{name}s"),
    }
}

/// All objects of a resource, wherever they live.
pub fn all(client: &Client, resource: &ApiResource) -> Api<DynamicObject> {
    Api::all_with(client.clone(), resource)
}

/// The objects of a resource in a namespace; of the cluster where it is empty.
pub fn within(client: &Client, resource: &ApiResource, namespace: &str) -> Api<DynamicObject> {
    if namespace.is_empty() {
        Api::all_with(client.clone(), resource)
    } else {
        Api::namespaced_with(client.clone(), namespace, resource)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals_are_those_of_the_api() {
        for (kind, expected) in [
            (Kind::Namespace, "namespaces"),
            (Kind::EndpointSlice, "endpointslices"),
            (Kind::ServiceEntry, "serviceentries"),
            (Kind::WorkloadEntry, "workloadentries"),
            (Kind::Gateway, "gateways"),
            (Kind::AuthorizationPolicy, "authorizationpolicies"),
            (Kind::PeerAuthentication, "peerauthentications"),
            (Kind::Telemetry, "telemetries"),
            (Kind::GatewayClass, "gatewayclasses"),
            (Kind::HttpRoute, "httproutes"),
            (Kind::BackendTlsPolicy, "backendtlspolicies"),
            (Kind::ProxyConfig, "proxyconfigs"),
        ] {
            assert_eq!(plural(kind), expected);
        }
    }
}
