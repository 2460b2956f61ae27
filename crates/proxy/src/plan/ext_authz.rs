//! `ext_authz`, HTTP and network: who is asked whether a request or connection may pass, what they are told, and what
//! of their answer counts.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::matcher::{Fraction, MetadataMatcher, StringMatcher};

/// `envoy.extensions.filters.http.ext_authz.v3.ExtAuthz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtAuthz {
    /// Who is asked.
    pub service: Service,
    /// A service that cannot be asked lets everything pass.
    pub failure_mode_allow: bool,
    /// The upstream is told of that by `x-envoy-auth-failure-mode-allowed`.
    pub failure_mode_allow_header_add: bool,
    /// The service sees the body, too.
    pub with_request_body: Option<BodySettings>,
    /// The route is chosen again where the service changed the request.
    pub clear_route_cache: bool,
    /// Answer where the service cannot be asked. Default 403.
    pub status_on_error: u16,
    /// Dynamic metadata that the service is told, by namespace.
    pub metadata_context_namespaces: Vec<Arc<str>>,
    /// The route's metadata that the service is told, by namespace.
    pub route_metadata_context_namespaces: Vec<Arc<str>>,
    /// Share of requests it is asked about. Default all.
    pub enabled: Fraction,
    /// Only requests with this metadata.
    pub enabled_metadata: Option<MetadataMatcher>,
    /// Requests that it is not asked about are refused.
    pub deny_at_disable: bool,
    /// The service is told the client's certificate.
    pub include_peer_certificate: bool,
    /// The service is told the server name.
    pub include_tls_session: bool,
    /// `http.<prefix>.ext_authz.<stat_prefix>.`; empty: without it.
    pub stat_prefix: Arc<str>,
    /// Key of the node's metadata whose texts are the destination's labels.
    pub labels_key: Option<Arc<str>>,
    /// Headers that the service is told; `None`: all (gRPC), or none but a few (HTTP).
    pub allowed_headers: Option<Vec<StringMatcher>>,
    /// Headers that it is not told in any case.
    pub disallowed_headers: Vec<StringMatcher>,
    /// Headers go as bytes, one by one.
    pub encode_raw_headers: bool,
    /// A refusal counts as an answer of the route's cluster.
    pub charge_cluster_response_stats: bool,
    /// The service's metadata is taken.
    pub dynamic_metadata: bool,
    /// Bytes of the body of a refusal at most; 0 is no limit.
    pub max_denied_response_body_bytes: u32,
}

/// `envoy.extensions.filters.network.ext_authz.v3.ExtAuthz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkExtAuthz {
    /// `ext_authz.<stat_prefix>.` of its statistics.
    pub stat_prefix: Arc<str>,
    /// Who is asked.
    pub service: GrpcCall,
    /// A service that cannot be asked lets everything pass.
    pub failure_mode_allow: bool,
    /// The service is told the client's certificate.
    pub include_peer_certificate: bool,
    /// The service is told the server name.
    pub include_tls_session: bool,
    /// Only connections with this metadata.
    pub enabled_metadata: Option<MetadataMatcher>,
    /// Key of the node's metadata whose texts are the destination's labels.
    pub labels_key: Option<Arc<str>>,
    /// Dynamic metadata that the service is told, by namespace.
    pub metadata_context_namespaces: Vec<Arc<str>>,
}

/// Who is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Service {
    /// `envoy.service.auth.v3.Authorization`.
    Grpc(GrpcCall),
    /// A server that answers 200 or not.
    Http(Box<HttpCall>),
}

/// A gRPC service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcCall {
    /// Where it is.
    pub cluster: Arc<str>,
    /// Its name; the cluster's where the configuration has none.
    pub authority: Arc<str>,
    /// How long an answer may take; `None` for ever. Default 200 ms.
    pub timeout: Option<Duration>,
    /// Headers of each call.
    pub initial_metadata: Vec<(Arc<str>, Arc<str>)>,
}

/// An HTTP service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpCall {
    /// Where it is.
    pub cluster: Arc<str>,
    /// How long an answer may take; `None` for ever. Default 200 ms.
    pub timeout: Option<Duration>,
    /// Before the path of the request.
    pub path_prefix: Box<str>,
    /// Headers of each call, in place of the request's.
    pub headers_to_add: Vec<(Arc<str>, Arc<str>)>,
    /// Headers of an answer that lets pass that the upstream gets, in place of the request's.
    pub upstream: Vec<StringMatcher>,
    /// Such that it gets beside the request's.
    pub upstream_append: Vec<StringMatcher>,
    /// Headers of a refusal that the client gets; `None`: all.
    pub client: Option<Vec<StringMatcher>>,
    /// Headers of an answer that lets pass that the client gets.
    pub client_on_success: Vec<StringMatcher>,
    /// Headers of an answer that become metadata.
    pub metadata: Vec<StringMatcher>,
}

/// `BufferSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodySettings {
    /// Bytes that the service is told at most; at least 1.
    pub max_request_bytes: u32,
    /// A longer body is cut off for the service; else it is refused with 413.
    pub allow_partial_message: bool,
    /// The body goes as bytes, since it may be no text.
    pub pack_as_bytes: bool,
}

/// `ExtAuthzPerRoute.check_settings`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckSettings {
    /// What the service is told of the route; levels add up.
    pub context_extensions: BTreeMap<String, String>,
    /// The service does not see the body.
    pub disable_request_body_buffering: bool,
    /// In place of the filter's.
    pub with_request_body: Option<BodySettings>,
}
