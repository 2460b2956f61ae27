//! Filters that are the same in every listener: built and encoded once.

use std::{collections::BTreeMap, sync::LazyLock};

use proto::{
    Any, Struct, Value, any,
    envoy::{
        config::listener::v3::{Filter, ListenerFilter, filter, listener_filter},
        extensions::filters::{
            http::{
                cors::v3::Cors,
                fault::v3::HttpFault,
                grpc_stats::v3::{
                    FilterConfig as GrpcStats, filter_config::PerMethodStatSpecifier,
                },
                grpc_web::v3::GrpcWeb,
                router::v3::Router,
            },
            listener::{
                http_inspector::v3::HttpInspector, original_dst::v3::OriginalDst,
                original_src::v3::OriginalSrc, proxy_protocol::v3::ProxyProtocol,
                tls_inspector::v3::TlsInspector,
            },
            network::http_connection_manager::v3::{HttpFilter, http_filter},
        },
    },
    istio::envoy::config::filter::http::alpn::v2alpha1::{
        FilterConfig as Alpn,
        filter_config::{AlpnOverride, Protocol},
    },
    prost_types::value::Kind,
    udpa::r#type::v1::TypedStruct,
};

use super::settings::Class;
use crate::route::{CORS, FAULT};

/// Name of the filters, HTTP and network, that tell proxies about each other.
pub const METADATA_EXCHANGE: &str = "istio.metadata_exchange";
const PEER_METADATA: &str = "type.googleapis.com/io.istio.http.peer_metadata.Config";
const TCP_METADATA_EXCHANGE: &str =
    "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange";
/// A ClientHello that fits in here is inspected without a larger buffer.
const TLS_INSPECTOR_BUFFER: u32 = 512;
/// Mark of connections that keep their source address (TPROXY); the rules of the pod let it pass.
const ORIGINAL_SRC_MARK: u32 = 1337;

/// An HTTP filter from its encoded settings.
pub fn http(name: &str, config: Any) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

/// A network filter from its encoded settings.
pub fn network(name: &str, config: Any) -> Filter {
    Filter {
        name: name.to_owned(),
        config_type: Some(filter::ConfigType::TypedConfig(config)),
    }
}

fn listener(name: &str, config: Any) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        config_type: Some(listener_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

pub fn original_dst() -> ListenerFilter {
    listener(
        "envoy.filters.listener.original_dst",
        any::pack(&OriginalDst {}),
    )
}

pub fn original_src() -> ListenerFilter {
    let config = OriginalSrc {
        mark: ORIGINAL_SRC_MARK,
        ..Default::default()
    };
    listener("envoy.filters.listener.original_src", any::pack(&config))
}

pub fn tls_inspector() -> ListenerFilter {
    let config = TlsInspector {
        initial_read_buffer_size: Some(TLS_INSPECTOR_BUFFER),
        ..Default::default()
    };
    listener("envoy.filters.listener.tls_inspector", any::pack(&config))
}

pub fn http_inspector() -> ListenerFilter {
    listener(
        "envoy.filters.listener.http_inspector",
        any::pack(&HttpInspector {}),
    )
}

pub fn proxy_protocol() -> ListenerFilter {
    listener(
        "envoy.filters.listener.proxy_protocol",
        any::pack(&ProxyProtocol::default()),
    )
}

/// The network filter of inbound chains that reads what the peer says about itself.
pub fn tcp_metadata_exchange() -> Filter {
    static FILTER: LazyLock<Filter> = LazyLock::new(|| {
        network(
            METADATA_EXCHANGE,
            typed_struct(
                TCP_METADATA_EXCHANGE,
                [
                    (
                        "protocol",
                        Kind::StringValue("istio-peer-exchange".to_owned()),
                    ),
                    ("enable_discovery", Kind::BoolValue(true)),
                ],
            ),
        )
    });
    FILTER.clone()
}

/// The HTTP filter that carries peers' metadata in headers; towards hosts outside of the mesh it may stay silent.
pub fn http_metadata_exchange(class: Class, skip_external: bool) -> HttpFilter {
    static INBOUND: LazyLock<HttpFilter> = LazyLock::new(|| peer_metadata("downstream", false));
    static OUTBOUND: LazyLock<HttpFilter> = LazyLock::new(|| peer_metadata("upstream", false));
    static IN_MESH: LazyLock<HttpFilter> = LazyLock::new(|| peer_metadata("upstream", true));
    match (class, skip_external) {
        (Class::Inbound, _) => INBOUND.clone(),
        (_, false) => OUTBOUND.clone(),
        (_, true) => IN_MESH.clone(),
    }
}

/// gRPC message counts, for the statistics filter.
pub fn grpc_stats() -> HttpFilter {
    static FILTER: LazyLock<HttpFilter> = LazyLock::new(|| {
        let config = GrpcStats {
            emit_filter_state: true,
            per_method_stat_specifier: Some(PerMethodStatSpecifier::StatsForAllMethods(false)),
            ..Default::default()
        };
        http("envoy.filters.http.grpc_stats", any::pack(&config))
    });
    FILTER.clone()
}

pub fn grpc_web() -> HttpFilter {
    http("envoy.filters.http.grpc_web", any::pack(&GrpcWeb {}))
}

/// Offers the ALPN names by which a sidecar knows Istio's HTTP.
pub fn alpn() -> HttpFilter {
    static FILTER: LazyLock<HttpFilter> = LazyLock::new(|| {
        let offer = |protocol: Protocol, names: [&str; 3]| AlpnOverride {
            upstream_protocol: protocol.into(),
            alpn_override: names.map(str::to_owned).to_vec(),
        };
        let config = Alpn {
            alpn_override: vec![
                offer(Protocol::Http10, ["istio-http/1.0", "istio", "http/1.0"]),
                offer(Protocol::Http11, ["istio-http/1.1", "istio", "http/1.1"]),
                offer(Protocol::Http2, ["istio-h2", "istio", "h2"]),
            ],
        };
        http("istio.alpn", any::pack(&config))
    });
    FILTER.clone()
}

/// Faults and CORS: empty here, their settings are on the routes.
pub fn fault() -> HttpFilter {
    http(FAULT, any::pack(&HttpFault::default()))
}

pub fn cors() -> HttpFilter {
    http(CORS, any::pack(&Cors {}))
}

pub fn router(suppress_envoy_headers: bool) -> HttpFilter {
    let config = Router {
        suppress_envoy_headers,
        ..Default::default()
    };
    http("envoy.filters.http.router", any::pack(&config))
}

fn peer_metadata(side: &str, skip_external: bool) -> HttpFilter {
    let method = |name: &str, fields: Vec<(&str, Kind)>| {
        structure([(name, Kind::StructValue(structure_of(fields)))])
    };
    let discovery = list([
        method("istio_headers", vec![]),
        method("workload_discovery", vec![]),
    ]);
    let skip = skip_external.then_some(("skip_external_clusters", Kind::BoolValue(true)));
    let propagation = list([method("istio_headers", skip.into_iter().collect())]);
    let (discovery_key, propagation_key) =
        (format!("{side}_discovery"), format!("{side}_propagation"));
    http(
        METADATA_EXCHANGE,
        typed_struct(
            PEER_METADATA,
            [
                (discovery_key.as_str(), discovery),
                (propagation_key.as_str(), propagation),
            ],
        ),
    )
}

fn typed_struct<const N: usize>(type_url: &str, fields: [(&str, Kind); N]) -> Any {
    any::pack(&TypedStruct {
        type_url: type_url.to_owned(),
        value: Some(structure_of(fields.into_iter().collect())),
    })
}

fn structure<const N: usize>(fields: [(&str, Kind); N]) -> Kind {
    Kind::StructValue(structure_of(fields.into_iter().collect()))
}

fn structure_of(fields: Vec<(&str, Kind)>) -> Struct {
    let fields: BTreeMap<String, Value> = fields
        .into_iter()
        .map(|(name, kind)| (name.to_owned(), Value { kind: Some(kind) }))
        .collect();
    Struct { fields }
}

fn list<const N: usize>(kinds: [Kind; N]) -> Kind {
    let values = kinds
        .into_iter()
        .map(|kind| Value { kind: Some(kind) })
        .collect();
    Kind::ListValue(proto::prost_types::ListValue { values })
}
