//! `envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs`: records of requests and connections.
//!
//! A batch is a stream of its own, with the identifier first, as each stream begins: whoever serves it need not keep
//! anything, and a service that goes away loses a batch at most.

use std::{collections::BTreeMap, rc::Rc, sync::Arc, time::Instant};

use outrigger_http::{Headers, Method, Version};
use prost::Message;
use proto::{
    Any,
    envoy::{
        config::core::v3::{Node, RequestMethod},
        data::accesslog::v3::{
            self as data, AccessLogCommon, ConnectionProperties, HttpAccessLogEntry,
            HttpRequestProperties, HttpResponseProperties, ResponseFlags, TcpAccessLogEntry,
            TlsProperties, http_access_log_entry::HttpVersion, response_flags, tls_properties,
        },
        service::accesslog::v3::{
            StreamAccessLogsMessage,
            stream_access_logs_message::{
                HttpAccessLogEntries, Identifier, LogEntries, TcpAccessLogEntries,
            },
        },
    },
};
use tls::{certificate::Certificate, session::Session};

use super::{
    deliver_records,
    values::{address, duration, metadata, structure, text, timestamp},
};
use crate::{
    access_log::tag,
    http::{Exchange, Flags},
    plan::{Address, access_log::GrpcLog},
    report::{Batches, LOGS, Limits},
    worker::Worker,
};

/// A log on one worker.
#[derive(Debug)]
pub(crate) struct Log {
    plan: Arc<GrpcLog>,
    batches: Rc<Batches<Entry>>,
}

enum Entry {
    Http(Box<HttpAccessLogEntry>),
    Tcp(Box<TcpAccessLogEntry>),
}

impl Log {
    pub(crate) fn new(plan: Arc<GrpcLog>, worker: &Worker) -> Self {
        let scope = "access_logs.grpc_access_log.";
        let limits = Limits::of_log(plan.delivery.flush_interval, plan.delivery.buffer_size);
        let of = plan.clone();
        let send = move |worker, entries| send(of.clone(), worker, entries);
        Self {
            plan,
            batches: Batches::new(worker, limits, scope, LOGS, send),
        }
    }

    /// Puts the record of a request or connection by.
    pub(crate) fn write(&self, exchange: &Exchange<'_>) {
        let common = Some(common(&self.plan, exchange));
        let (entry, size) = if self.plan.http {
            let entry = HttpAccessLogEntry {
                common_properties: common,
                protocol_version: match exchange.request.version {
                    Version::Http10 => HttpVersion::Http10,
                    Version::Http11 => HttpVersion::Http11,
                    Version::Http2 => HttpVersion::Http2,
                }
                .into(),
                request: Some(request(&self.plan, exchange)),
                response: Some(response(&self.plan, exchange)),
            };
            let size = entry.encoded_len();
            (Entry::Http(Box::new(entry)), size)
        } else {
            let entry = TcpAccessLogEntry {
                common_properties: common,
                connection_properties: Some(ConnectionProperties {
                    received_bytes: exchange.progress.received,
                    sent_bytes: exchange.progress.sent,
                }),
            };
            let size = entry.encoded_len();
            (Entry::Tcp(Box::new(entry)), size)
        };
        self.batches.add(entry, size);
    }
}

async fn send(plan: Arc<GrpcLog>, worker: Rc<Worker>, entries: Vec<Entry>) -> bool {
    let (mut http, mut tcp) = (Vec::new(), Vec::new());
    for entry in entries {
        match entry {
            Entry::Http(entry) => http.push(*entry),
            Entry::Tcp(entry) => tcp.push(*entry),
        }
    }
    let node = &worker.bootstrap.node;
    let message = StreamAccessLogsMessage {
        identifier: Some(Identifier {
            node: Some(Node {
                id: node.id.to_string(),
                cluster: node.cluster.to_string(),
                metadata: Some(structure(&node.metadata)),
                ..Default::default()
            }),
            log_name: plan.log_name.to_string(),
        }),
        log_entries: Some(match plan.http {
            true => LogEntries::HttpLogs(HttpAccessLogEntries { log_entry: http }),
            false => LogEntries::TcpLogs(TcpAccessLogEntries { log_entry: tcp }),
        }),
    };
    let path = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
    deliver_records(&worker, &plan.delivery, &plan.log_name, path, &message).await
}

fn common(plan: &GrpcLog, exchange: &Exchange<'_>) -> AccessLogCommon {
    let (connection, progress) = (exchange.connection, &exchange.progress);
    let upstream = &exchange.upstream;
    let since =
        |at: Option<Instant>| at.map(|at| duration(at.saturating_duration_since(progress.start)));
    let state = plan.filter_state.iter().filter_map(|name| {
        let value = exchange.state(name)?;
        let any = Any {
            type_url: "type.googleapis.com/google.protobuf.Struct".to_owned(),
            value: structure(value).encode_to_vec(),
        };
        Some((name.to_string(), any))
    });
    let tags = plan.tags.iter();
    let tags = tags.filter_map(|tag| Some((tag.name.to_string(), tag::value(tag, exchange)?)));
    let host = upstream.host.as_ref().map(|host| &host.address);
    let id = exchange.request.headers.get_str("x-request-id");
    AccessLogCommon {
        sample_rate: 1.0,
        downstream_remote_address: connection.remote.map(address),
        downstream_direct_remote_address: connection.direct_remote.map(address),
        downstream_local_address: connection.local.map(address),
        tls_properties: connection.tls.as_deref().map(|session| {
            let asked = connection.requested_server_name.as_deref();
            tls_properties(session, asked.unwrap_or_default())
        }),
        start_time: Some(timestamp(progress.start_time)),
        time_to_last_rx_byte: since(progress.request_received),
        time_to_first_upstream_tx_byte: since(progress.upstream_first_sent),
        time_to_last_upstream_tx_byte: since(progress.upstream_last_sent),
        time_to_first_upstream_rx_byte: since(progress.upstream_first_received),
        time_to_last_upstream_rx_byte: since(progress.upstream_last_received),
        time_to_first_downstream_tx_byte: since(progress.downstream_first_sent),
        time_to_last_downstream_tx_byte: since(progress.end),
        upstream_remote_address: host.and_then(|host| match host {
            Address::Socket(socket) => Some(address(*socket)),
            _ => None,
        }),
        upstream_local_address: upstream.local.map(address),
        upstream_cluster: upstream.cluster_name().unwrap_or_default().into(),
        response_flags: (!exchange.flags.is_empty()).then(|| response_flags(exchange)),
        metadata: (!exchange.dynamic_metadata.is_empty()).then(|| {
            let each = exchange.dynamic_metadata.iter();
            metadata(
                each.map(|(name, value)| (name.clone(), value.clone()))
                    .collect(),
            )
        }),
        upstream_transport_failure_reason: upstream.failure.clone(),
        route_name: match exchange.route.route() {
            Some(route) => route.name.to_string(),
            None => String::new(),
        },
        filter_state_objects: state.collect(),
        custom_tags: tags.collect(),
        duration: Some(duration(exchange.duration())),
        upstream_request_attempt_count: upstream.attempts,
        connection_termination_details: {
            let details = connection.termination_details.as_deref();
            details.unwrap_or_default().to_owned()
        },
        stream_id: id.unwrap_or_default().to_owned(),
        downstream_transport_failure_reason: {
            let reason = connection.transport_failure.as_deref();
            reason.unwrap_or_default().to_owned()
        },
        access_log_type: data::AccessLogType::from_str_name(exchange.log_type)
            .unwrap_or_default()
            .into(),
        ..Default::default()
    }
}

fn request(plan: &GrpcLog, exchange: &Exchange<'_>) -> HttpRequestProperties {
    let request = &exchange.request;
    let header = |name| value_of(&request.headers, name);
    let path = request.path().to_owned();
    HttpRequestProperties {
        request_method: match request.method {
            Method::Get => RequestMethod::Get,
            Method::Head => RequestMethod::Head,
            Method::Post => RequestMethod::Post,
            Method::Connect => RequestMethod::Connect,
            ref other => RequestMethod::from_str_name(other.as_str()).unwrap_or_default(),
        }
        .into(),
        scheme: request.scheme().to_owned(),
        authority: request.authority().to_owned(),
        path,
        user_agent: header("user-agent"),
        referer: header("referer"),
        forwarded_for: header("x-forwarded-for"),
        request_id: header("x-request-id"),
        original_path: header("x-envoy-original-path"),
        request_headers_bytes: request.headers.wire_size() as u64,
        request_body_bytes: exchange.progress.received,
        request_headers: listed(&plan.request_headers, Some(&request.headers)),
        ..Default::default()
    }
}

fn response(plan: &GrpcLog, exchange: &Exchange<'_>) -> HttpResponseProperties {
    let headers = exchange.response.as_ref().map(|response| &response.headers);
    HttpResponseProperties {
        response_code: exchange.response.as_ref().map(|head| head.status.into()),
        response_headers_bytes: headers.map_or(0, |headers| headers.wire_size() as u64),
        response_body_bytes: exchange.progress.sent,
        response_headers: listed(&plan.response_headers, headers),
        response_trailers: listed(&plan.response_trailers, exchange.trailers.as_ref()),
        response_code_details: exchange.details.to_string(),
        ..Default::default()
    }
}

fn value_of(headers: &Headers, name: &str) -> String {
    let joined = headers.joined(name).unwrap_or_default();
    text(joined.into_owned())
}

/// The fields that are wanted and there.
fn listed(wanted: &[Arc<str>], headers: Option<&Headers>) -> BTreeMap<String, String> {
    let each = wanted.iter().filter_map(|name| {
        let value = headers?.joined(name)?;
        Some((name.to_string(), text(value.into_owned())))
    });
    each.collect()
}

fn tls_properties(session: &Session, server_name: &str) -> TlsProperties {
    use data::tls_properties::TlsVersion;
    TlsProperties {
        tls_version: match session.version {
            "TLSv1.3" => TlsVersion::TlSv13,
            "TLSv1.2" => TlsVersion::TlSv12,
            _ => TlsVersion::VersionUnspecified,
        }
        .into(),
        tls_cipher_suite: tls::session::cipher_number(session.cipher).map(u32::from),
        tls_sni_hostname: server_name.to_owned(),
        local_certificate_properties: session.local.as_deref().map(certificate),
        peer_certificate_properties: session.peer.as_deref().map(certificate),
        ..Default::default()
    }
}

fn certificate(certificate: &Certificate) -> tls_properties::CertificateProperties {
    use tls_properties::certificate_properties::{SubjectAltName, subject_alt_name::San};
    let uris = certificate
        .uris
        .iter()
        .map(|name| San::Uri(name.to_string()));
    let dns = certificate
        .dns
        .iter()
        .map(|name| San::Dns(name.to_string()));
    tls_properties::CertificateProperties {
        subject_alt_name: uris
            .chain(dns)
            .map(|san| SubjectAltName { san: Some(san) })
            .collect(),
        subject: certificate.subject.to_string(),
        issuer: certificate.issuer.to_string(),
    }
}

fn response_flags(exchange: &Exchange<'_>) -> ResponseFlags {
    let has = |flag| exchange.flags.has(flag);
    ResponseFlags {
        failed_local_healthcheck: has(Flags::FAILED_LOCAL_HEALTH_CHECK),
        no_healthy_upstream: has(Flags::NO_HEALTHY_UPSTREAM),
        upstream_request_timeout: has(Flags::UPSTREAM_REQUEST_TIMEOUT),
        local_reset: has(Flags::LOCAL_RESET),
        upstream_remote_reset: has(Flags::UPSTREAM_REMOTE_RESET),
        upstream_connection_failure: has(Flags::UPSTREAM_CONNECTION_FAILURE),
        upstream_connection_termination: has(Flags::UPSTREAM_CONNECTION_TERMINATION),
        upstream_overflow: has(Flags::UPSTREAM_OVERFLOW),
        no_route_found: has(Flags::NO_ROUTE_FOUND),
        delay_injected: has(Flags::DELAY_INJECTED),
        fault_injected: has(Flags::FAULT_INJECTED),
        rate_limited: has(Flags::RATE_LIMITED),
        unauthorized_details: has(Flags::UNAUTHORIZED_EXTERNAL).then(|| {
            response_flags::Unauthorized {
                reason: response_flags::unauthorized::Reason::ExternalService.into(),
            }
        }),
        rate_limit_service_error: has(Flags::RATELIMIT_SERVICE_ERROR),
        downstream_connection_termination: has(Flags::DOWNSTREAM_CONNECTION_TERMINATION),
        upstream_retry_limit_exceeded: has(Flags::UPSTREAM_RETRY_LIMIT_EXCEEDED),
        stream_idle_timeout: has(Flags::STREAM_IDLE_TIMEOUT),
        invalid_envoy_request_headers: has(Flags::INVALID_ENVOY_HEADERS),
        downstream_protocol_error: has(Flags::DOWNSTREAM_PROTOCOL_ERROR),
        upstream_max_stream_duration_reached: has(Flags::UPSTREAM_MAX_STREAM_DURATION),
        response_from_cache_filter: has(Flags::RESPONSE_FROM_CACHE),
        no_filter_config_found: has(Flags::NO_FILTER_CONFIG),
        duration_timeout: has(Flags::DURATION_TIMEOUT),
        upstream_protocol_error: has(Flags::UPSTREAM_PROTOCOL_ERROR),
        no_cluster_found: has(Flags::NO_CLUSTER_FOUND),
        overload_manager: has(Flags::OVERLOAD_MANAGER),
        dns_resolution_failure: has(Flags::DNS_RESOLUTION_FAILED),
        downstream_remote_reset: has(Flags::DOWNSTREAM_REMOTE_RESET),
    }
}
