//! The HTTP connection manager, the same for every HTTP chain up to a few words.

use std::sync::LazyLock;

use proto::{
    Any, any,
    envoy::{
        config::{
            core::v3::{
                AggregatedConfigSource, ApiVersion, ConfigSource, Http1ProtocolOptions,
                Http2ProtocolOptions, HttpProtocolOptions, TypedExtensionConfig, config_source,
                http1_protocol_options::{HeaderKeyFormat, header_key_format},
            },
            listener::v3::Filter,
            route::v3::RouteConfiguration,
        },
        extensions::{
            filters::network::http_connection_manager::v3::{
                HttpConnectionManager, Rds, RequestIdExtension,
                http_connection_manager::{
                    ForwardClientCertDetails, InternalAddressConfig, PathWithEscapedSlashesAction,
                    RouteSpecifier, SetCurrentClientCertDetails, UpgradeConfig,
                },
            },
            http::header_formatters::preserve_case::v3::PreserveCaseFormatterConfig,
            request_id::uuid::v3::UuidRequestIdConfig,
        },
    },
    istio::mesh::v1alpha1::mesh_config::proxy_path_normalization::NormalizationType,
};

use super::{
    env::Env,
    filters,
    settings::{self, Class},
};
use crate::route::NO_TIMEOUT;

/// Name of the filter.
pub const HTTP_CONNECTION_MANAGER: &str = "envoy.filters.network.http_connection_manager";

/// Where a connection manager finds its routes.
#[derive(Debug, Clone)]
pub enum Routes {
    /// By name, over ADS.
    Named(String),
    /// In place.
    Inline(Box<RouteConfiguration>),
}

/// What differs between connection managers of one proxy.
#[derive(Debug, Clone)]
pub struct Http {
    pub class: Class,
    pub routes: Routes,
    /// First part of the names of its statistics.
    pub stat_prefix: String,
    pub grpc_web: bool,
    /// The port speaks HTTP/2 by declaration.
    pub http2: bool,
    /// Requests may name absolute URLs (`http_proxy`).
    pub http_proxy: bool,
}

impl Http {
    /// A connection manager with nothing special about it.
    pub fn new(class: Class, routes: Routes, stat_prefix: String) -> Http {
        Http {
            class,
            routes,
            stat_prefix,
            grpc_web: false,
            http2: false,
            http_proxy: false,
        }
    }

    /// The network filter.
    pub fn filter(self, env: &Env<'_>) -> Filter {
        filters::network(HTTP_CONNECTION_MANAGER, any::pack(&self.build(env)))
    }

    fn build(self, env: &Env<'_>) -> HttpConnectionManager {
        let headers = env.headers(self.class);
        let reports = env.reports(self.class);
        let http_filters = self.http_filters(env);
        let mut out = HttpConnectionManager {
            http_filters,
            stat_prefix: self.stat_prefix,
            server_name: headers.server_name.clone(),
            server_header_transformation: headers.server_transformation.into(),
            generate_request_id: headers.generate_request_id,
            proxy_100_continue: true,
            append_x_forwarded_port: headers.x_forwarded_port,
            use_remote_address: Some(self.class == Class::Gateway),
            upgrade_configs: vec![UpgradeConfig {
                upgrade_type: "websocket".to_owned(),
                ..Default::default()
            }],
            // Envoy would end streams that are quiet for five minutes.
            stream_idle_timeout: Some(NO_TIMEOUT),
            common_http_protocol_options: env.idle_timeout.map(|idle| HttpProtocolOptions {
                idle_timeout: Some(idle),
                ..Default::default()
            }),
            access_log: reports.logs.http.clone(),
            tracing: reports.tracing.clone(),
            request_id_extension: Some(request_id(reports.request_id_for_sampling)),
            // Only where addresses of peers are believed does it matter which of them are internal.
            internal_address_config: (self.class == Class::Gateway
                && !env.internal_networks.is_empty())
            .then(|| InternalAddressConfig {
                cidr_ranges: env.internal_networks.clone(),
                ..Default::default()
            }),
            route_specifier: Some(match self.routes {
                Routes::Named(name) => rds(name),
                Routes::Inline(routes) => RouteSpecifier::RouteConfig(*routes),
            }),
            ..Default::default()
        };
        if self.http2 {
            out.http2_protocol_options = Some(Http2ProtocolOptions::default());
        }
        http1(&mut out, env, self.class, self.http_proxy);
        paths(&mut out, env);
        client_certificates(&mut out, env, self.class);
        if let Some(own) = &env.connection_settings {
            settings::apply(own, &mut out);
        }
        out
    }

    fn http_filters(
        &self,
        env: &Env<'_>,
    ) -> Vec<proto::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter>
    {
        let headers = env.headers(self.class);
        let mut out = Vec::with_capacity(8);
        if env.istio_filters {
            out.push(filters::http_metadata_exchange(
                self.class,
                headers.metadata_in_mesh_only,
            ));
        }
        if let Some(enforcement) = env.enforcement(self.class) {
            out.extend(enforcement.http.iter().cloned());
        }
        if self.grpc_web {
            out.push(filters::grpc_web());
        }
        out.push(filters::grpc_stats());
        if env.istio_filters && self.class != Class::Inbound {
            out.push(filters::alpn());
        }
        out.push(filters::fault());
        out.push(filters::cors());
        if env.istio_filters {
            out.extend(env.reports(self.class).http_stats.iter().cloned());
        }
        out.push(filters::router(headers.suppress_debug_headers));
        out
    }
}

fn http1(out: &mut HttpConnectionManager, env: &Env<'_>, class: Class, http_proxy: bool) {
    let preserve_case = env.headers(class).preserve_case;
    // A gateway's options are there even where nothing is set.
    if !(env.http10 || http_proxy || preserve_case || class == Class::Gateway) {
        return;
    }
    out.http_protocol_options = Some(Http1ProtocolOptions {
        accept_http_10: env.http10,
        allow_absolute_url: http_proxy.then_some(true),
        header_key_format: preserve_case.then(preserve_case_format),
        ..Default::default()
    });
}

/// How paths are made comparable before routing.
fn paths(out: &mut HttpConnectionManager, env: &Env<'_>) {
    use PathWithEscapedSlashesAction as Slashes;
    let normalization = env
        .mesh
        .path_normalization
        .as_ref()
        .map(|n| n.normalization());
    let (normalize, merge, slashes) = match normalization {
        Some(NormalizationType::None) => (false, false, Slashes::KeepUnchanged),
        Some(NormalizationType::MergeSlashes) => (true, true, Slashes::KeepUnchanged),
        Some(NormalizationType::DecodeAndMergeSlashes) => (true, true, Slashes::UnescapeAndForward),
        _ => (true, false, Slashes::KeepUnchanged),
    };
    out.normalize_path = Some(normalize);
    out.merge_slashes = merge;
    out.path_with_escaped_slashes_action = slashes.into();
}

/// What the application learns about the client's certificate.
fn client_certificates(out: &mut HttpConnectionManager, env: &Env<'_>, class: Class) {
    match class {
        Class::Outbound => {}
        Class::Inbound => {
            let headers = env.headers(class);
            out.forward_client_cert_details = headers.forward_client_cert.into();
            out.set_current_client_cert_details = Some(headers.client_cert_details);
        }
        Class::Gateway => {
            let topology = env.proxy_config.gateway_topology.as_ref();
            out.xff_num_trusted_hops = topology.map_or(0, |t| t.num_trusted_proxies);
            let details = topology
                .and_then(|t| settings::forward_client_cert(t.forward_client_cert_details))
                .unwrap_or(ForwardClientCertDetails::SanitizeSet);
            out.forward_client_cert_details = details.into();
            if matches!(
                details,
                ForwardClientCertDetails::AppendForward | ForwardClientCertDetails::SanitizeSet
            ) {
                out.set_current_client_cert_details = Some(SetCurrentClientCertDetails {
                    subject: Some(true),
                    cert: true,
                    dns: true,
                    uri: true,
                    ..Default::default()
                });
            }
        }
    }
}

/// Routes over the same stream, waited for without limit: a listener must not serve without them.
fn rds(name: String) -> RouteSpecifier {
    RouteSpecifier::Rds(Rds {
        config_source: Some(ConfigSource {
            config_source_specifier: Some(config_source::ConfigSourceSpecifier::Ads(
                AggregatedConfigSource {},
            )),
            initial_fetch_timeout: Some(NO_TIMEOUT),
            resource_api_version: ApiVersion::V3.into(),
            ..Default::default()
        }),
        route_config_name: name,
    })
}

fn request_id(for_sampling: bool) -> RequestIdExtension {
    static DEFAULT: LazyLock<Any> = LazyLock::new(|| uuid(true));
    RequestIdExtension {
        typed_config: Some(if for_sampling {
            DEFAULT.clone()
        } else {
            uuid(false)
        }),
    }
}

fn uuid(for_sampling: bool) -> Any {
    any::pack(&UuidRequestIdConfig {
        use_request_id_for_trace_sampling: Some(for_sampling),
        ..Default::default()
    })
}

fn preserve_case_format() -> HeaderKeyFormat {
    let formatter = TypedExtensionConfig {
        name: "preserve_case".to_owned(),
        typed_config: Some(any::pack(&PreserveCaseFormatterConfig::default())),
    };
    HeaderKeyFormat {
        header_format: Some(header_key_format::HeaderFormat::StatefulFormatter(
            formatter,
        )),
    }
}
