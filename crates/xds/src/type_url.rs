//! The type URLs that travel on ADS, in the order in which a push sends them.

/// Clusters.
pub const CDS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// Endpoints of a cluster.
pub const EDS: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// Listeners.
pub const LDS: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// Route configurations.
pub const RDS: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
/// Certificates and keys.
pub const SDS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Configuration of single extensions.
pub const ECDS: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
/// Runtime layers.
pub const RTDS: &str = "type.googleapis.com/envoy.service.runtime.v3.Runtime";
/// Istio's table of names for the agent's DNS proxy.
pub const NDS: &str = "type.googleapis.com/istio.networking.nds.v1.NameTable";
/// Istio's proxy configuration for the agent.
pub const PCDS: &str = "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig";
/// What an agent reports about its application's health; a request only, never answered.
pub const HEALTH_INFORMATION: &str = "type.googleapis.com/istio.v1.HealthInformation";

/// Upserts go out in this order, so that nothing refers to what is not there yet; removals in the reverse.
pub const PUSH_ORDER: [&str; 8] = [CDS, EDS, LDS, RDS, SDS, ECDS, NDS, PCDS];

/// The short name that logs, metrics and `proxy-status` use; the URL itself where there is none.
pub fn short(type_url: &str) -> &str {
    match type_url {
        CDS => "CDS",
        ECDS => "ECDS",
        EDS => "EDS",
        LDS => "LDS",
        NDS => "NDS",
        PCDS => "PCDS",
        RDS => "RDS",
        RTDS => "RTDS",
        SDS => "SDS",
        other => other,
    }
}

/// Whether a request without names asks for everything of this type. That holds for CDS and LDS by the
/// specification, and for Istio's own types.
pub fn is_wildcard(type_url: &str) -> bool {
    matches!(type_url, CDS | LDS) || type_url.contains("/istio.")
}
