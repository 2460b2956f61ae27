//! Access logs, as MeshConfig and Telemetry ask for them.

use proto::{
    Struct, Value, any,
    envoy::{
        config::{
            accesslog::v3::{
                AccessLog, AccessLogFilter, AndFilter, ExtensionFilter, ResponseFlagFilter,
                access_log, access_log_filter::FilterSpecifier, extension_filter,
            },
            core::v3::{
                ApiVersion, DataSource, GrpcService, JsonFormatOptions, SubstitutionFormatString,
                TypedExtensionConfig, data_source, grpc_service,
                substitution_format_string::Format,
            },
        },
        extensions::{
            access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig,
            access_loggers::{
                file::v3::{FileAccessLog, file_access_log::AccessLogFormat},
                filters::cel::v3::ExpressionFilter,
                grpc::v3::{
                    CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig,
                },
            },
            formatter::req_without_query::v3::ReqWithoutQuery,
        },
    },
    istio::mesh::v1alpha1::{
        MeshConfig,
        mesh_config::{
            AccessLogEncoding,
            extension_provider::{
                EnvoyFileAccessLogProvider, EnvoyHttpGrpcV3LogProvider,
                EnvoyOpenTelemetryLogProvider, EnvoyTcpGrpcV3LogProvider,
                envoy_file_access_log_provider::log_format::LogFormat,
            },
        },
    },
    opentelemetry::proto::common::v1::{AnyValue, KeyValue, KeyValueList, any_value},
    prost_types::value::Kind,
};

/// Istio's line, ended by a newline.
const TEXT_FORMAT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" ",
    "%RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% ",
    "\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% ",
    "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" ",
    "\"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% ",
    "%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% ",
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n",
);

/// Istio's keys of a JSON line and their operators.
const JSON_FORMAT: [(&str, &str); 24] = [
    ("start_time", "%START_TIME%"),
    ("route_name", "%ROUTE_NAME%"),
    ("method", "%REQ(:METHOD)%"),
    ("path", "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%"),
    ("protocol", "%PROTOCOL%"),
    ("response_code", "%RESPONSE_CODE%"),
    ("response_flags", "%RESPONSE_FLAGS%"),
    ("response_code_details", "%RESPONSE_CODE_DETAILS%"),
    (
        "connection_termination_details",
        "%CONNECTION_TERMINATION_DETAILS%",
    ),
    ("bytes_received", "%BYTES_RECEIVED%"),
    ("bytes_sent", "%BYTES_SENT%"),
    ("duration", "%DURATION%"),
    (
        "upstream_service_time",
        "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    ),
    ("x_forwarded_for", "%REQ(X-FORWARDED-FOR)%"),
    ("user_agent", "%REQ(USER-AGENT)%"),
    ("request_id", "%REQ(X-REQUEST-ID)%"),
    ("authority", "%REQ(:AUTHORITY)%"),
    ("upstream_host", "%UPSTREAM_HOST%"),
    ("upstream_cluster", "%UPSTREAM_CLUSTER_RAW%"),
    ("upstream_local_address", "%UPSTREAM_LOCAL_ADDRESS%"),
    ("downstream_local_address", "%DOWNSTREAM_LOCAL_ADDRESS%"),
    ("downstream_remote_address", "%DOWNSTREAM_REMOTE_ADDRESS%"),
    ("requested_server_name", "%REQUESTED_SERVER_NAME%"),
    (
        "upstream_transport_failure_reason",
        "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    ),
];

const FILE: &str = "envoy.access_loggers.file";
const HTTP_GRPC: &str = "envoy.access_loggers.http_grpc";
const TCP_GRPC: &str = "envoy.tcp_grpc_access_log";
const OPEN_TELEMETRY: &str = "envoy.access_loggers.open_telemetry";
const DEFAULT_PATH: &str = "/dev/stdout";
/// The bootstrap's cluster for `enableEnvoyAccessLogService`.
const ACCESS_LOG_SERVICE: &str = "envoy_accesslog_service";
/// What the metadata exchange filters know about the peers.
const PEERS: [&str; 2] = ["upstream_peer", "downstream_peer"];
/// The same under the names of older filters.
const OLD_PEERS: [&str; 4] = [
    "wasm.upstream_peer",
    "wasm.upstream_peer_id",
    "wasm.downstream_peer",
    "wasm.downstream_peer_id",
];

/// The logs of one side of a proxy, per kind of place that writes them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AccessLogs {
    pub http: Vec<AccessLog>,
    pub tcp: Vec<AccessLog>,
    /// Only connections that no chain took.
    pub listener: Vec<AccessLog>,
}

impl AccessLogs {
    /// What MeshConfig itself asks for.
    pub fn from_mesh(mesh: &MeshConfig) -> AccessLogs {
        let mut out = AccessLogs::default();
        if !mesh.access_log_file.is_empty() {
            out.push_everywhere(file_of_mesh(&mesh.access_log_file, mesh), None, mesh);
        }
        if mesh.enable_envoy_access_log_service {
            let states: Vec<String> = PEERS
                .iter()
                .chain(&OLD_PEERS)
                .map(|s| (*s).to_owned())
                .collect();
            let common =
                |log_name: &str| common_grpc(log_name, ACCESS_LOG_SERVICE, "", states.clone());
            out.http
                .push(http_grpc(common("http_envoy_accesslog"), None));
            out.tcp.push(tcp_grpc(common("tcp_envoy_accesslog")));
            if !mesh.disable_envoy_listener_log {
                let log = tcp_grpc(common("listener_envoy_accesslog"));
                out.listener.push(AccessLog {
                    filter: Some(no_route()),
                    ..log
                });
            }
        }
        out
    }

    /// Adds a log, with the user's condition, wherever this side logs.
    pub fn push_everywhere(&mut self, log: AccessLog, condition: Option<&str>, mesh: &MeshConfig) {
        let condition = condition.map(cel);
        let plain = AccessLog {
            filter: condition.clone(),
            ..log
        };
        if !mesh.disable_envoy_listener_log {
            let filter = match condition {
                None => no_route(),
                Some(condition) => AccessLogFilter {
                    filter_specifier: Some(FilterSpecifier::AndFilter(AndFilter {
                        filters: vec![no_route(), condition],
                    })),
                },
            };
            self.listener.push(AccessLog {
                filter: Some(filter),
                ..plain.clone()
            });
        }
        self.http.push(plain.clone());
        self.tcp.push(plain);
    }
}

/// A file log in the mesh's format.
pub fn file_of_mesh(path: &str, mesh: &MeshConfig) -> AccessLog {
    let format = if mesh.access_log_encoding == AccessLogEncoding::Json as i32 {
        // A format that is no JSON object counts as none, as in Istio.
        let own = serde_json::from_str(&mesh.access_log_format)
            .ok()
            .and_then(structure);
        json_format(own)
    } else {
        text_format(&mesh.access_log_format)
    };
    file(path, format)
}

/// A file log of an extension provider.
pub fn file_of_provider(provider: &EnvoyFileAccessLogProvider) -> AccessLog {
    let format = provider
        .log_format
        .as_ref()
        .and_then(|f| f.log_format.as_ref());
    let mut format = match format {
        Some(LogFormat::Labels(labels)) => {
            json_format(Some(labels.clone()).filter(|l| !l.fields.is_empty()))
        }
        Some(LogFormat::Text(text)) => text_format(text),
        None => text_format(""),
    };
    format.omit_empty_values = provider.omit_empty_values;
    let path = if provider.path.is_empty() {
        DEFAULT_PATH
    } else {
        &provider.path
    };
    file(path, format)
}

/// A gRPC log of HTTP requests, sent to `cluster`.
pub fn http_grpc_of_provider(
    provider: &EnvoyHttpGrpcV3LogProvider,
    cluster: &str,
    authority: &str,
) -> AccessLog {
    let name = or_default(&provider.log_name, "http_envoy_accesslog");
    let states = states(&provider.filter_state_objects_to_log);
    http_grpc(
        common_grpc(name, cluster, authority, states),
        Some(provider),
    )
}

/// A gRPC log of connections, sent to `cluster`.
pub fn tcp_grpc_of_provider(
    provider: &EnvoyTcpGrpcV3LogProvider,
    cluster: &str,
    authority: &str,
) -> AccessLog {
    let name = or_default(&provider.log_name, "tcp_envoy_accesslog");
    let states = states(&provider.filter_state_objects_to_log);
    tcp_grpc(common_grpc(name, cluster, authority, states))
}

/// An OpenTelemetry log, sent to `cluster`.
#[expect(
    deprecated,
    reason = "istiod writes common_config, and older proxies know nothing else"
)]
pub fn open_telemetry(
    provider: &EnvoyOpenTelemetryLogProvider,
    cluster: &str,
    authority: &str,
) -> AccessLog {
    let name = or_default(&provider.log_name, "otel_envoy_accesslog");
    let all = PEERS
        .iter()
        .chain(&OLD_PEERS)
        .map(|s| (*s).to_owned())
        .collect();
    let own = provider.log_format.as_ref();
    let text = own.map_or("", |f| f.text.as_str());
    let text = if text.is_empty() { TEXT_FORMAT } else { text };
    let labels = own
        .and_then(|f| f.labels.as_ref())
        .filter(|l| !l.fields.is_empty());
    let string = |text: &str| AnyValue {
        value: Some(any_value::Value::StringValue(text.to_owned())),
    };
    let values: Vec<(&String, &str)> = labels
        .into_iter()
        .flat_map(|l| &l.fields)
        .map(|(key, value)| match &value.kind {
            Some(Kind::StringValue(text)) => (key, text.as_str()),
            _ => (key, ""),
        })
        .collect();
    let config = OpenTelemetryAccessLogConfig {
        common_config: Some(common_grpc(name, cluster, authority, all)),
        disable_builtin_labels: true,
        body: Some(string(text)),
        attributes: labels.map(|_| KeyValueList {
            values: values
                .iter()
                .map(|(key, value)| KeyValue {
                    key: (*key).clone(),
                    value: Some(string(value)),
                    ..Default::default()
                })
                .collect(),
        }),
        formatters: formatters(values.iter().map(|(_, v)| *v).chain([text])),
        ..Default::default()
    };
    log(OPEN_TELEMETRY, any::pack(&config))
}

fn states(own: &[String]) -> Vec<String> {
    if own.is_empty() {
        PEERS.map(str::to_owned).to_vec()
    } else {
        own.to_vec()
    }
}

fn or_default<'a>(own: &'a str, default: &'a str) -> &'a str {
    if own.is_empty() { default } else { own }
}

fn file(path: &str, format: SubstitutionFormatString) -> AccessLog {
    let config = FileAccessLog {
        path: path.to_owned(),
        access_log_format: Some(AccessLogFormat::LogFormat(format)),
    };
    log(FILE, any::pack(&config))
}

fn text_format(own: &str) -> SubstitutionFormatString {
    let text = match own {
        "" => TEXT_FORMAT.to_owned(),
        own if own.ends_with('\n') => own.to_owned(),
        own => format!("{own}\n"),
    };
    SubstitutionFormatString {
        formatters: formatters([text.as_str()]),
        format: Some(Format::TextFormatSource(DataSource {
            specifier: Some(data_source::Specifier::InlineString(text)),
            ..Default::default()
        })),
        ..Default::default()
    }
}

fn json_format(own: Option<Struct>) -> SubstitutionFormatString {
    let fields = own.unwrap_or_else(|| Struct {
        fields: JSON_FORMAT
            .iter()
            .map(|(key, operator)| {
                let kind = Kind::StringValue((*operator).to_owned());
                ((*key).to_owned(), Value { kind: Some(kind) })
            })
            .collect(),
    });
    let texts = fields.fields.values().filter_map(|v| match &v.kind {
        Some(Kind::StringValue(text)) => Some(text.as_str()),
        _ => None,
    });
    SubstitutionFormatString {
        formatters: formatters(texts),
        format: Some(Format::JsonFormat(fields.clone())),
        json_format_options: Some(JsonFormatOptions::default()),
        ..Default::default()
    }
}

/// A JSON object as a message; `None` for other values.
fn structure(value: serde_json::Value) -> Option<Struct> {
    match kind(value) {
        Kind::StructValue(object) => Some(object),
        _ => None,
    }
}

fn kind(value: serde_json::Value) -> Kind {
    use serde_json::Value as Json;
    let wrap = |value| Value {
        kind: Some(kind(value)),
    };
    match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(b) => Kind::BoolValue(b),
        Json::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or(f64::NAN)),
        Json::String(s) => Kind::StringValue(s),
        Json::Array(values) => Kind::ListValue(proto::prost_types::ListValue {
            values: values.into_iter().map(wrap).collect(),
        }),
        Json::Object(fields) => Kind::StructValue(Struct {
            fields: fields
                .into_iter()
                .map(|(name, value)| (name, wrap(value)))
                .collect(),
        }),
    }
}

/// Operators that Envoy knows only with an extension.
fn formatters<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<TypedExtensionConfig> {
    let needed = texts.into_iter().any(|t| t.contains("%REQ_WITHOUT_QUERY"));
    let formatter = TypedExtensionConfig {
        name: "envoy.formatter.req_without_query".to_owned(),
        typed_config: Some(any::pack(&ReqWithoutQuery {})),
    };
    if needed { vec![formatter] } else { Vec::new() }
}

fn common_grpc(
    log_name: &str,
    cluster: &str,
    authority: &str,
    states: Vec<String>,
) -> CommonGrpcAccessLogConfig {
    CommonGrpcAccessLogConfig {
        log_name: log_name.to_owned(),
        grpc_service: Some(GrpcService {
            target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
                grpc_service::EnvoyGrpc {
                    cluster_name: cluster.to_owned(),
                    authority: authority.to_owned(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        }),
        transport_api_version: ApiVersion::V3.into(),
        filter_state_objects_to_log: states,
        ..Default::default()
    }
}

fn http_grpc(
    common: CommonGrpcAccessLogConfig,
    provider: Option<&EnvoyHttpGrpcV3LogProvider>,
) -> AccessLog {
    let mut config = HttpGrpcAccessLogConfig {
        common_config: Some(common),
        ..Default::default()
    };
    if let Some(provider) = provider {
        config.additional_request_headers_to_log =
            provider.additional_request_headers_to_log.clone();
        config.additional_response_headers_to_log =
            provider.additional_response_headers_to_log.clone();
        config.additional_response_trailers_to_log =
            provider.additional_response_trailers_to_log.clone();
    }
    log(HTTP_GRPC, any::pack(&config))
}

fn tcp_grpc(common: CommonGrpcAccessLogConfig) -> AccessLog {
    let config = TcpGrpcAccessLogConfig {
        common_config: Some(common),
    };
    log(TCP_GRPC, any::pack(&config))
}

fn log(name: &str, config: proto::Any) -> AccessLog {
    AccessLog {
        name: name.to_owned(),
        config_type: Some(access_log::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

/// The listener itself logs only what found no chain: everything else logs for itself.
fn no_route() -> AccessLogFilter {
    AccessLogFilter {
        filter_specifier: Some(FilterSpecifier::ResponseFlagFilter(ResponseFlagFilter {
            flags: vec!["NR".to_owned()],
        })),
    }
}

fn cel(expression: &str) -> AccessLogFilter {
    let config = ExpressionFilter {
        expression: expression.to_owned(),
        ..Default::default()
    };
    AccessLogFilter {
        filter_specifier: Some(FilterSpecifier::ExtensionFilter(ExtensionFilter {
            name: "envoy.access_loggers.extension_filters.cel".to_owned(),
            config_type: Some(extension_filter::ConfigType::TypedConfig(any::pack(
                &config,
            ))),
        })),
    }
}
