//! Names on the wire that tools and users know: clusters, virtual hosts, provenance.

use std::collections::BTreeMap;

use proto::{
    Struct, Value, envoy::config::core::v3::Metadata, istio::networking::v1alpha3::Destination,
    prost_types::value::Kind,
};

/// Group and version of Istio's traffic objects, as their origin is written.
pub const NETWORKING: &str = "networking.istio.io/v1";
/// The cluster of everything that is let through.
pub const PASSTHROUGH: &str = "PassthroughCluster";
/// The cluster that refuses.
pub const BLACK_HOLE: &str = "BlackHoleCluster";

/// What a destination's service says about its cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DestinationService {
    /// The port, where the service has only one.
    pub only_port: Option<u32>,
    /// The host that an ExternalName service stands for.
    pub external_name: Option<String>,
}

/// The parts of `outbound|PORT|SUBSET|HOST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterName<'a> {
    pub direction: &'a str,
    pub port: u32,
    pub subset: &'a str,
    pub host: &'a str,
}

/// `outbound|PORT|SUBSET|HOST`.
pub fn outbound_cluster(port: u32, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// `inbound|PORT||`.
pub fn inbound_cluster(port: u32) -> String {
    format!("inbound|{port}||")
}

/// `outbound_.PORT_.SUBSET_.HOST`: the form that fits into an SNI.
pub fn sni_cluster(port: u32, subset: &str, host: &str) -> String {
    format!("outbound_.{port}_.{subset}_.{host}")
}

/// The cluster that a destination names. `listener_port` counts where neither the destination nor the service tells.
pub fn destination_cluster(
    destination: &Destination,
    service: Option<&DestinationService>,
    listener_port: u32,
) -> String {
    if destination.host.is_empty() {
        return "UnknownService".to_owned();
    }
    let host = service
        .and_then(|s| s.external_name.as_deref())
        .unwrap_or(&destination.host);
    let port = destination
        .port
        .as_ref()
        .map(|p| p.number)
        .or_else(|| service.and_then(|s| s.only_port))
        .unwrap_or(listener_port);
    outbound_cluster(port, &destination.subset, host)
}

/// Takes a cluster name apart; `None` for names of another form.
pub fn parse_cluster(name: &str) -> Option<ClusterName<'_>> {
    let mut parts = name.splitn(4, '|');
    let direction = parts.next()?;
    let port = parts.next()?.parse().ok()?;
    let subset = parts.next()?;
    let host = parts.next()?;
    Some(ClusterName {
        direction,
        port,
        subset,
        host,
    })
}

/// `host:port`, with brackets around an IPv6 address.
pub fn host_port(host: &str, port: u32) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// An IPv6 address in brackets, anything else as it is.
pub fn bracketed(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

/// `metadata.filterMetadata.istio.config`: the object that something was made from.
pub fn config_metadata(api_version: &str, plural: &str, namespace: &str, name: &str) -> Metadata {
    let path = format!("/apis/{api_version}/namespaces/{namespace}/{plural}/{name}");
    let value = Value {
        kind: Some(Kind::StringValue(path)),
    };
    let istio = Struct {
        fields: BTreeMap::from([("config".to_owned(), value)]),
    };
    Metadata {
        filter_metadata: BTreeMap::from([("istio".to_owned(), istio)]),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_come_apart_again() {
        let name = outbound_cluster(9080, "v1", "reviews.bookinfo.svc.cluster.local");
        let parts = parse_cluster(&name).unwrap();
        assert_eq!((parts.port, parts.subset), (9080, "v1"));
        assert_eq!(parse_cluster("PassthroughCluster"), None);
    }

    #[test]
    fn a_destination_without_port_takes_the_only_one() {
        let to = Destination {
            host: "a.ns".to_owned(),
            ..Default::default()
        };
        let service = DestinationService {
            only_port: Some(81),
            external_name: None,
        };
        assert_eq!(
            destination_cluster(&to, Some(&service), 80),
            "outbound|81||a.ns"
        );
        assert_eq!(destination_cluster(&to, None, 80), "outbound|80||a.ns");
    }
}
