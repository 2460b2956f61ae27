//! What a proxy's own configuration (`ProxyConfig`) says about its HTTP listeners.

use proto::{
    envoy::{
        config::core::v3::{
            HttpProtocolOptions, http_protocol_options::HeadersWithUnderscoresAction as Underscores,
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager,
            http_connection_manager::{
                ForwardClientCertDetails, PathWithEscapedSlashesAction as Slashes,
                ServerHeaderTransformation, SetCurrentClientCertDetails,
            },
        },
    },
    istio::mesh::v1alpha1::{
        ForwardClientCertDetails as MeshForward, ProxyConfig,
        proxy_config::{
            ConnectionSettings,
            connection_settings::{
                HeadersWithUnderscoresAction, PathWithEscapedSlashesAction, Profile,
            },
            proxy_headers::MetadataExchangeMode,
        },
    },
};

/// Which side of a proxy a listener is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// From the mesh to the application beside the proxy.
    Inbound,
    /// From the application beside the proxy.
    Outbound,
    /// From outside, at a gateway.
    Gateway,
}

/// `proxyHeaders`: which headers a proxy adds, changes and reveals.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyHeaders {
    pub server_name: String,
    pub server_transformation: ServerHeaderTransformation,
    pub forward_client_cert: ForwardClientCertDetails,
    pub client_cert_details: SetCurrentClientCertDetails,
    /// `x-envoy-attempt-count` on requests.
    pub attempt_count: bool,
    /// `Some(false)` where no `x-request-id` is to be made.
    pub generate_request_id: Option<bool>,
    pub suppress_debug_headers: bool,
    /// No metadata towards hosts outside of the mesh.
    pub metadata_in_mesh_only: bool,
    pub x_forwarded_port: bool,
    pub x_forwarded_host: bool,
    /// HTTP/1 header names keep their case.
    pub preserve_case: bool,
}

impl ProxyHeaders {
    /// The headers for listeners of `class`, Istio's defaults filled in.
    pub fn new(config: &ProxyConfig, class: Class) -> ProxyHeaders {
        let mut out = ProxyHeaders {
            // Outbound, Envoy's own default ("envoy") stays.
            server_name: if class == Class::Outbound {
                ""
            } else {
                "istio-envoy"
            }
            .to_owned(),
            server_transformation: ServerHeaderTransformation::Overwrite,
            forward_client_cert: ForwardClientCertDetails::AppendForward,
            client_cert_details: SetCurrentClientCertDetails {
                subject: Some(true),
                uri: true,
                dns: true,
                ..Default::default()
            },
            attempt_count: true,
            generate_request_id: None,
            suppress_debug_headers: false,
            metadata_in_mesh_only: false,
            x_forwarded_port: false,
            x_forwarded_host: false,
            preserve_case: false,
        };
        let Some(headers) = &config.proxy_headers else {
            return out;
        };
        let is_true = |v: Option<bool>| v == Some(true);
        out.attempt_count = !is_true(headers.attempt_count.as_ref().and_then(|a| a.disabled));
        if let Some(forward) = forward_client_cert(headers.forwarded_client_cert) {
            out.forward_client_cert = forward;
        }
        if let Some(server) = &headers.server {
            if is_true(server.disabled) {
                out.server_name.clear();
                out.server_transformation = ServerHeaderTransformation::PassThrough;
            } else if !server.value.is_empty() {
                out.server_name = server.value.clone();
            }
        }
        if is_true(headers.request_id.as_ref().and_then(|r| r.disabled)) {
            out.generate_request_id = Some(false);
        }
        out.suppress_debug_headers = is_true(
            headers
                .envoy_debug_headers
                .as_ref()
                .and_then(|d| d.disabled),
        );
        out.metadata_in_mesh_only = headers
            .metadata_exchange_headers
            .as_ref()
            .is_some_and(|m| m.mode == MetadataExchangeMode::InMesh as i32);
        out.x_forwarded_port = is_true(headers.x_forwarded_port.as_ref().and_then(|p| p.enabled));
        out.x_forwarded_host = is_true(headers.x_forwarded_host.as_ref().and_then(|h| h.enabled));
        out.preserve_case = is_true(headers.preserve_http1_header_case);
        if let Some(details) = &headers.set_current_client_cert_details {
            out.client_cert_details = SetCurrentClientCertDetails {
                subject: Some(details.subject.unwrap_or(true)),
                uri: details.uri.unwrap_or(true),
                dns: details.dns.unwrap_or(true),
                cert: details.cert.unwrap_or(false),
                chain: details.chain.unwrap_or(false),
                ..Default::default()
            };
        }
        out
    }
}

/// The mesh's word for what happens to `x-forwarded-client-cert`; `None` where the user leaves it open.
pub fn forward_client_cert(mode: i32) -> Option<ForwardClientCertDetails> {
    Some(match MeshForward::try_from(mode).ok()? {
        MeshForward::Undefined => return None,
        MeshForward::Sanitize => ForwardClientCertDetails::Sanitize,
        MeshForward::ForwardOnly => ForwardClientCertDetails::ForwardOnly,
        MeshForward::AppendForward => ForwardClientCertDetails::AppendForward,
        MeshForward::SanitizeSet => ForwardClientCertDetails::SanitizeSet,
        MeshForward::AlwaysForwardOnly => ForwardClientCertDetails::AlwaysForwardOnly,
    })
}

/// `connectionSettings` with its profile's values filled in. The EDGE profile hardens gateways only.
pub fn connection_settings(config: &ProxyConfig, is_gateway: bool) -> Option<ConnectionSettings> {
    let mut out = config.connection_settings?;
    if out.profile != Profile::Edge as i32 || !is_gateway {
        return Some(out);
    }
    let seconds = |seconds: i64| Some(proto::Duration { seconds, nanos: 0 });
    out.listener_per_connection_buffer_limit_bytes
        .get_or_insert(32 << 10);
    out.http_idle_timeout = out.http_idle_timeout.or(seconds(3600));
    out.http_stream_idle_timeout = out.http_stream_idle_timeout.or(seconds(300));
    out.http_request_timeout = out.http_request_timeout.or(seconds(300));
    out.http_request_headers_timeout = out.http_request_headers_timeout.or(seconds(60));
    out.http_max_concurrent_streams.get_or_insert(100);
    out.http2_initial_stream_window_size.get_or_insert(64 << 10);
    out.http2_initial_connection_window_size
        .get_or_insert(1 << 20);
    if out.http_headers_with_underscores_action
        == HeadersWithUnderscoresAction::HeadersWithUnderscoresUnspecified as i32
    {
        out.http_headers_with_underscores_action =
            HeadersWithUnderscoresAction::HeadersWithUnderscoresRejectRequest.into();
    }
    out.http_merge_slashes.get_or_insert(true);
    if out.http_path_with_escaped_slashes_action
        == PathWithEscapedSlashesAction::PathWithEscapedSlashesUnspecified as i32
    {
        out.http_path_with_escaped_slashes_action =
            PathWithEscapedSlashesAction::UnescapeAndRedirect.into();
    }
    Some(out)
}

/// Writes the connection settings into a connection manager.
pub fn apply(settings: &ConnectionSettings, hcm: &mut HttpConnectionManager) {
    let common = |hcm: &mut HttpConnectionManager, set: &dyn Fn(&mut HttpProtocolOptions)| {
        set(hcm.common_http_protocol_options.get_or_insert_default());
    };
    if let Some(idle) = settings.http_idle_timeout {
        common(hcm, &|o| o.idle_timeout = Some(idle));
    }
    if let Some(max) = settings.http_max_connection_duration {
        common(hcm, &|o| o.max_connection_duration = Some(max));
    }
    if let Some(max) = settings.http_max_stream_duration {
        common(hcm, &|o| o.max_stream_duration = Some(max));
    }
    hcm.stream_idle_timeout = settings
        .http_stream_idle_timeout
        .or(hcm.stream_idle_timeout);
    hcm.request_timeout = settings.http_request_timeout.or(hcm.request_timeout);
    hcm.request_headers_timeout = settings
        .http_request_headers_timeout
        .or(hcm.request_headers_timeout);
    hcm.drain_timeout = settings.http_drain_timeout.or(hcm.drain_timeout);

    let unsigned = |v: Option<i32>| v.and_then(|v| u32::try_from(v).ok());
    let streams = unsigned(settings.http_max_concurrent_streams);
    let stream_window = unsigned(settings.http2_initial_stream_window_size);
    let connection_window = unsigned(settings.http2_initial_connection_window_size);
    if streams.is_some() || stream_window.is_some() || connection_window.is_some() {
        let h2 = hcm.http2_protocol_options.get_or_insert_default();
        h2.max_concurrent_streams = streams.or(h2.max_concurrent_streams);
        h2.initial_stream_window_size = stream_window.or(h2.initial_stream_window_size);
        h2.initial_connection_window_size = connection_window.or(h2.initial_connection_window_size);
    }
    let underscores = match settings.http_headers_with_underscores_action() {
        HeadersWithUnderscoresAction::HeadersWithUnderscoresUnspecified => None,
        HeadersWithUnderscoresAction::HeadersWithUnderscoresRejectRequest => {
            Some(Underscores::RejectRequest)
        }
        HeadersWithUnderscoresAction::HeadersWithUnderscoresDropHeader => {
            Some(Underscores::DropHeader)
        }
        _ => Some(Underscores::Allow),
    };
    if let Some(action) = underscores {
        common(hcm, &|o| o.headers_with_underscores_action = action.into());
    }
    if let Some(merge) = settings.http_merge_slashes {
        hcm.merge_slashes = merge;
    }
    let slashes = match settings.http_path_with_escaped_slashes_action() {
        PathWithEscapedSlashesAction::PathWithEscapedSlashesUnspecified => None,
        PathWithEscapedSlashesAction::RejectRequest => Some(Slashes::RejectRequest),
        PathWithEscapedSlashesAction::UnescapeAndRedirect => Some(Slashes::UnescapeAndRedirect),
        PathWithEscapedSlashesAction::UnescapeAndForward => Some(Slashes::UnescapeAndForward),
        _ => Some(Slashes::KeepUnchanged),
    };
    if let Some(action) = slashes {
        hcm.path_with_escaped_slashes_action = action.into();
    }
}
