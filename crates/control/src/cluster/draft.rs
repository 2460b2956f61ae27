//! A cluster while it is being made: the message, and the HTTP options that are packed into it at the end.

use std::collections::BTreeMap;

use proto::{
    Duration, Struct, Value, any,
    envoy::{
        config::{
            cluster::v3::{
                Cluster, Filter,
                cluster::{
                    ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy,
                },
            },
            core::v3::{
                AggregatedConfigSource, ApiVersion, BindConfig, ConfigSource, Http1ProtocolOptions,
                Http2ProtocolOptions, SocketAddress, TypedExtensionConfig,
                config_source::ConfigSourceSpecifier,
                http1_protocol_options::{HeaderKeyFormat, header_key_format::HeaderFormat},
                socket_address::PortSpecifier,
            },
            listener::v3::filter::ConfigType,
        },
        extensions::{
            http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig,
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{
                    ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
                    explicit_http_config::ProtocolConfig,
                },
            },
        },
    },
    prost_types::value::Kind,
};

use crate::{
    listener::filters,
    model::{Mesh, Origin, Port, Proxy, Resource, Service},
};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const ISTIO: &str = "istio";

/// A cluster in the making.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    pub(super) cluster: Cluster,
    pub(super) http: Option<HttpProtocolOptions>,
}

impl Draft {
    /// A cluster of a fixed discovery type.
    pub(super) fn new(name: &str, kind: DiscoveryType) -> Self {
        let cluster = Cluster {
            name: name.to_owned(),
            alt_stat_name: format!("{name};"),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind.into())),
            common_lb_config: Some(CommonLbConfig::default()),
            ..Cluster::default()
        };
        Self {
            cluster,
            http: None,
        }
    }

    /// Whether it has this discovery type.
    pub(super) fn is(&self, kind: DiscoveryType) -> bool {
        self.cluster.cluster_discovery_type == Some(ClusterDiscoveryType::Type(kind.into()))
    }

    /// Changes the discovery type.
    pub(super) fn set_kind(&mut self, kind: DiscoveryType) {
        self.cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind.into()));
    }

    /// Sets the policy.
    pub(super) fn set_lb(&mut self, policy: LbPolicy) {
        self.cluster.lb_policy = policy.into();
    }

    /// The HTTP options, made when first asked for.
    pub(super) fn http(&mut self) -> &mut HttpProtocolOptions {
        self.http.get_or_insert_default()
    }

    /// HTTP/2 upstream, unless something else is already said.
    pub(super) fn set_http2(&mut self) {
        let http = self.http();
        if http.upstream_protocol_options.is_none() {
            http.upstream_protocol_options = Some(explicit(ProtocolConfig::Http2ProtocolOptions(
                Http2ProtocolOptions::default(),
            )));
        }
    }

    /// Upstream as downstream: HTTP/1 stays HTTP/1, HTTP/2 stays HTTP/2.
    pub(super) fn set_downstream_protocol(&mut self) {
        let http = self.http();
        let http1 = match &http.upstream_protocol_options {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                protocol_config: Some(ProtocolConfig::HttpProtocolOptions(options)),
                ..
            })) => options.clone(),
            _ => Http1ProtocolOptions::default(),
        };
        http.upstream_protocol_options = Some(downstream(http1));
    }

    /// Whether upstream is always HTTP/2.
    pub(super) fn is_http2(&self) -> bool {
        matches!(
            self.http
                .as_ref()
                .and_then(|h| h.upstream_protocol_options.as_ref()),
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(
                ExplicitHttpConfig {
                    protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(_)),
                    ..
                }
            ))
        )
    }

    /// The HTTP/2 options, where upstream is always HTTP/2.
    pub(super) fn http2(&mut self) -> Option<&mut Http2ProtocolOptions> {
        match self.http.as_mut()?.upstream_protocol_options.as_mut()? {
            UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(options)),
                ..
            }) => Some(options),
            _ => None,
        }
    }

    /// What upstream speaks on this port.
    pub(super) fn set_protocol(&mut self, mesh: &Mesh, proxy: &Proxy, port: &Port) {
        if port.protocol.is_http2() {
            self.set_http2();
            return;
        }
        if port.protocol.is_http_or_sniffed() && preserves_case(mesh, proxy) {
            self.http().upstream_protocol_options = Some(explicit(
                ProtocolConfig::HttpProtocolOptions(case_preserving()),
            ));
        }
        if port.protocol.is_unsupported() && !proxy.is_router() {
            self.set_downstream_protocol();
        }
    }

    /// Istio's own part of the metadata.
    pub(super) fn istio_metadata(&mut self) -> &mut BTreeMap<String, Value> {
        let metadata = self.cluster.metadata.get_or_insert_default();
        &mut metadata
            .filter_metadata
            .entry(ISTIO.to_owned())
            .or_default()
            .fields
    }

    /// Names the services behind the cluster, for telemetry.
    pub(super) fn set_services<'a>(&mut self, services: impl IntoIterator<Item = &'a Service>) {
        let values = services.into_iter().map(|s| {
            let fields = [
                ("host", &s.hostname),
                ("name", &s.name),
                ("namespace", &s.namespace),
            ];
            let fields = fields
                .into_iter()
                .map(|(k, v)| (k.to_owned(), text(v)))
                .collect();
            Value {
                kind: Some(Kind::StructValue(Struct { fields })),
            }
        });
        let list = proto::prost_types::ListValue {
            values: values.collect(),
        };
        self.istio_metadata().insert(
            "services".to_owned(),
            Value {
                kind: Some(Kind::ListValue(list)),
            },
        );
    }

    /// Names the DestinationRule.
    pub(super) fn set_rule(&mut self, rule: &crate::model::MergedRule) {
        let meta = &rule.rule.meta;
        let path = format!(
            "/apis/networking.istio.io/v1/namespaces/{}/destination-rule/{}",
            meta.namespace, meta.name
        );
        self.istio_metadata()
            .insert("config".to_owned(), text(&path));
    }

    /// The filter that tells the server about us, and us about the server, on plain TCP; not for a proxy that has none
    /// of Istio's filters.
    pub(super) fn add_metadata_exchange(&mut self, proxy: &Proxy) {
        if !proxy.node.has_istio_filters() {
            return;
        }
        let filter = filters::tcp_metadata_exchange();
        if let Some(ConfigType::TypedConfig(config)) = filter.config_type {
            self.cluster.filters.push(Filter {
                name: filter.name,
                typed_config: Some(config),
                ..Filter::default()
            });
        }
    }

    /// Names the source address that captured traffic is told apart by.
    pub(super) fn bind_to(&mut self, proxy: &Proxy) {
        let address = if proxy.supports_v4() {
            "127.0.0.6"
        } else {
            "::6"
        };
        self.cluster.upstream_bind_config = Some(BindConfig {
            source_address: Some(source_address(address)),
            ..BindConfig::default()
        });
    }

    /// Endpoints come over ADS, under the cluster's own name.
    pub(super) fn use_eds(&mut self) {
        self.cluster.eds_cluster_config = Some(EdsClusterConfig {
            service_name: self.cluster.name.clone(),
            eds_config: Some(ConfigSource {
                config_source_specifier: Some(ConfigSourceSpecifier::Ads(
                    AggregatedConfigSource {},
                )),
                initial_fetch_timeout: Some(Duration {
                    seconds: 0,
                    nanos: 0,
                }),
                resource_api_version: ApiVersion::V3.into(),
                ..ConfigSource::default()
            }),
        });
    }

    /// Packs the options and encodes.
    pub(super) fn finish(mut self, from: Vec<Origin>) -> Resource {
        if let Some(mut http) = self.http {
            http.upstream_protocol_options.get_or_insert_with(|| {
                explicit(ProtocolConfig::HttpProtocolOptions(
                    Http1ProtocolOptions::default(),
                ))
            });
            self.cluster
                .typed_extension_protocol_options
                .insert(HTTP_OPTIONS.to_owned(), any::pack(&http));
        }
        Resource::new(self.cluster.name.clone(), &self.cluster, from)
    }
}

/// An address to connect from, any port.
pub(super) fn source_address(address: &str) -> SocketAddress {
    SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(0)),
        ..SocketAddress::default()
    }
}

/// Options for traffic of any protocol, closed after five idle minutes.
pub(super) fn passthrough_http(mesh: &Mesh, proxy: &Proxy) -> HttpProtocolOptions {
    let http1 = if preserves_case(mesh, proxy) {
        case_preserving()
    } else {
        Http1ProtocolOptions::default()
    };
    HttpProtocolOptions {
        common_http_protocol_options: Some(proto::envoy::config::core::v3::HttpProtocolOptions {
            idle_timeout: Some(Duration {
                seconds: 300,
                nanos: 0,
            }),
            ..Default::default()
        }),
        upstream_protocol_options: Some(downstream(http1)),
        ..HttpProtocolOptions::default()
    }
}

/// A text value.
pub(super) fn text(value: &str) -> Value {
    Value {
        kind: Some(Kind::StringValue(value.to_owned())),
    }
}

fn explicit(config: ProtocolConfig) -> UpstreamProtocolOptions {
    UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
        protocol_config: Some(config),
    })
}

fn downstream(http1: Http1ProtocolOptions) -> UpstreamProtocolOptions {
    UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
        http_protocol_options: Some(http1),
        http2_protocol_options: Some(Http2ProtocolOptions::default()),
        ..UseDownstreamHttpConfig::default()
    })
}

fn case_preserving() -> Http1ProtocolOptions {
    let formatter = TypedExtensionConfig {
        name: "preserve_case".to_owned(),
        typed_config: Some(any::pack(&PreserveCaseFormatterConfig::default())),
    };
    Http1ProtocolOptions {
        header_key_format: Some(HeaderKeyFormat {
            header_format: Some(HeaderFormat::StatefulFormatter(formatter)),
        }),
        ..Http1ProtocolOptions::default()
    }
}

/// Whether ProxyConfig (the proxy's own, else the mesh's) asks to keep the case of header names.
fn preserves_case(mesh: &Mesh, proxy: &Proxy) -> bool {
    proxy
        .node
        .proxy_config
        .as_ref()
        .or(mesh.config().default_config.as_ref())
        .and_then(|c| c.proxy_headers.as_ref())
        .and_then(|h| h.preserve_http1_header_case)
        .unwrap_or(false)
}
