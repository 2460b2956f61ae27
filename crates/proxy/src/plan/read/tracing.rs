//! Tracing.

use std::{sync::Arc, time::Duration};

use proto::{
    Any,
    envoy::{
        config::{core::v3 as core, trace::v3 as pb},
        extensions::{
            filters::network::http_connection_manager::v3::http_connection_manager as nested,
            tracers::opentelemetry::resource_detectors::v3::StaticConfigResourceDetectorConfig,
        },
    },
};

use super::{
    common::{enumeration, extension, header_name, percent, typed_config},
    jwt_authn::http_uri,
    log_service::patient_call,
    tag::custom_tag,
};
use crate::plan::{
    error::{At, Step, unsupported},
    format::{Operator, OperatorKind, Part, Template},
    matcher::Percent,
    tracing::{Collector, HttpCollector, Tracer, TracerKind, Tracing},
};

/// `HttpConnectionManager.Tracing`.
pub(super) fn tracing(at: At<'_>, m: &nested::Tracing) -> Step<Tracing> {
    let nested::Tracing {
        client_sampling,
        random_sampling,
        overall_sampling,
        // Events within spans: docs/accepted-without-effect.md.
        verbose: _,
        max_path_tag_length,
        custom_tags,
        provider,
        spawn_upstream_span,
        operation,
        upstream_operation,
        no_context_propagation,
    } = m;
    let all = Percent::whole(100);
    Ok(Tracing {
        client_sampling: at
            .optional("client_sampling", client_sampling, percent)?
            .unwrap_or(all),
        random_sampling: at
            .optional("random_sampling", random_sampling, percent)?
            .unwrap_or(all),
        overall_sampling: at
            .optional("overall_sampling", overall_sampling, percent)?
            .unwrap_or(all),
        max_path_tag_length: max_path_tag_length.unwrap_or(256) as usize,
        tags: at.each("custom_tags", custom_tags, custom_tag),
        no_context_propagation: *no_context_propagation,
        spawn_upstream_span: spawn_upstream_span.unwrap_or(false),
        operation: name(&at, "operation", operation)?,
        upstream_operation: name(&at, "upstream_operation", upstream_operation)?,
        provider: at.optional("provider", provider, provider_of)?.flatten(),
    })
}

/// `Tracing` of the bootstrap.
pub(super) fn of_bootstrap(at: At<'_>, m: &pb::Tracing) -> Step<Option<Arc<Tracer>>> {
    Ok(at.optional("http", &m.http, provider_of)?.flatten())
}

fn name(at: &At<'_>, field: &str, text: &str) -> Step<Option<Template>> {
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = Template::parse(text).map_err(|why| at.field(field).error(why))?;
    Ok(Some(parsed))
}

fn provider_of(at: At<'_>, m: &pb::tracing::Http) -> Step<Option<Arc<Tracer>>> {
    let Some(pb::tracing::http::ConfigType::TypedConfig(any)) = &m.config_type else {
        return Err(at
            .field("typed_config")
            .error("is required: the configuration of this tracer with its @type"));
    };
    tracer(at.field("typed_config"), any)
}

fn tracer(at: At<'_>, any: &Any) -> Step<Option<Arc<Tracer>>> {
    let found = extension(&at, any)?;
    let tracer = match found.name.as_str() {
        "envoy.config.trace.v3.OpenTelemetryConfig" => open_telemetry(at, &found.decode(&at)?)?,
        "envoy.config.trace.v3.ZipkinConfig" => zipkin(at, &found.decode(&at)?)?,
        // Without spans: docs/accepted-without-effect.md.
        "envoy.config.trace.v3.DatadogConfig"
        | "envoy.config.trace.v3.SkyWalkingConfig"
        | "envoy.config.trace.v3.LightstepConfig"
        | "envoy.config.trace.v3.OpenCensusConfig"
        | "envoy.config.trace.v3.XRayConfig"
        | "envoy.config.trace.v3.DynamicOtConfig"
        | "envoy.config.trace.v3.TraceServiceConfig" => return Ok(None),
        _ => return Err(found.unknown(&at, "tracer")),
    };
    Ok(Some(Arc::new(tracer)))
}

fn open_telemetry(at: At<'_>, m: &pb::OpenTelemetryConfig) -> Step<Tracer> {
    let pb::OpenTelemetryConfig {
        grpc_service,
        http_service,
        service_name,
        resource_detectors,
        sampler,
        // Spans that wait are bounded in any case.
        max_cache_size: _,
        exporter,
        set_telemetry_sdk_resource_attributes,
        set_service_name_resource_attribute,
        set_instrumentation_scope,
    } = m;
    unsupported!(
        at,
        exporter,
        set_telemetry_sdk_resource_attributes,
        set_service_name_resource_attribute,
        set_instrumentation_scope,
    );
    if let Some(m) = sampler {
        let at = at.field("sampler");
        let found = typed_config(&at, &m.typed_config, "sampler")?;
        // Whatever begins here is sampled as the connection manager says.
        if found.name != "envoy.extensions.tracers.opentelemetry.samplers.v3.AlwaysOnSamplerConfig"
        {
            return Err(found.unknown(&at.field("typed_config"), "sampler"));
        }
        return Err(at.not_implemented(
            "is not implemented; write random_sampling 100 on the connection manager",
        ));
    }
    let resource = detected(&at, resource_detectors);
    let collector = match (grpc_service, http_service) {
        (Some(m), None) => Collector::Grpc(patient_call(at.field("grpc_service"), m)?),
        (None, Some(m)) => Collector::Http(http_service_of(at.field("http_service"), m)?),
        _ => return Err(at.error("needs one of grpc_service, http_service")),
    };
    let service_name = match service_name.as_str() {
        "" => "unknown_service:envoy",
        name => name,
    };
    Ok(Tracer {
        kind: TracerKind::OpenTelemetry {
            service_name: service_name.into(),
            resource,
        },
        collector,
    })
}

/// What `resource_detectors` find out.
pub(super) fn detected(
    at: &At<'_>,
    detectors: &[core::TypedExtensionConfig],
) -> Vec<(Arc<str>, Arc<str>)> {
    let found = at.each("resource_detectors", detectors, |at, m| {
        let found = typed_config(&at, &m.typed_config, "resource detector")?;
        let at = at.field("typed_config");
        match found.name.rsplit('.').next() {
            Some("EnvironmentResourceDetectorConfig") => Ok(environment()),
            Some("StaticConfigResourceDetectorConfig") => {
                let m: StaticConfigResourceDetectorConfig = found.decode(&at)?;
                let each = m.attributes.into_iter();
                Ok(each
                    .map(|(key, value)| (key.into(), value.into()))
                    .collect())
            }
            _ => Err(found.unknown(&at, "resource detector")),
        }
    });
    found.into_iter().flatten().collect()
}

/// `OTEL_RESOURCE_ATTRIBUTES`: `key=value` with commas between.
fn environment() -> Vec<(Arc<str>, Arc<str>)> {
    let text = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (key.trim().into(), value.trim().into()))
        .collect()
}

fn zipkin(at: At<'_>, m: &pb::ZipkinConfig) -> Step<Tracer> {
    use pb::zipkin_config::{CollectorEndpointVersion as V, TraceContextOption};
    let pb::ZipkinConfig {
        collector_cluster,
        collector_endpoint,
        trace_id_128bit,
        shared_span_context,
        collector_endpoint_version,
        collector_hostname,
        split_spans_for_request,
        trace_context_option,
        collector_service,
        timestamp_trace_ids,
    } = m;
    unsupported!(at, split_spans_for_request, timestamp_trace_ids);
    let version: V = enumeration(
        &at,
        "collector_endpoint_version",
        *collector_endpoint_version,
    )?;
    if !matches!(version, V::HttpJson | V::DeprecatedAndUnavailableDoNotUse) {
        return Err(at
            .field("collector_endpoint_version")
            .not_implemented("is not implemented; write HTTP_JSON"));
    }
    let option: TraceContextOption =
        enumeration(&at, "trace_context_option", *trace_context_option)?;
    let collector = match collector_service {
        Some(m) => http_service_of(at.field("collector_service"), m)?,
        None => {
            let cluster = at.text("collector_cluster", collector_cluster)?;
            HttpCollector {
                authority: match collector_hostname.as_str() {
                    "" => cluster.clone(),
                    name => name.into(),
                },
                path: at.text("collector_endpoint", collector_endpoint)?,
                cluster,
                headers: Vec::new(),
                timeout: PATIENCE,
            }
        }
    };
    Ok(Tracer {
        kind: TracerKind::Zipkin {
            wide: *trace_id_128bit,
            shared: shared_span_context.unwrap_or(true),
            w3c: option == TraceContextOption::UseB3WithW3cPropagation,
        },
        collector: Collector::Http(collector),
    })
}

/// The value of a header of our own calls, for which there is no request: variables of the environment are put in.
fn without_request(at: &At<'_>, text: &str) -> Step<Arc<str>> {
    let template = Template::parse(text).map_err(|why| at.error(why))?;
    let mut value = String::new();
    for part in &template.parts {
        match part {
            Part::Text(text) => value.push_str(text),
            Part::Operator(Operator {
                kind: OperatorKind::Environment(name),
                max_length,
            }) => {
                let found = std::env::var(&**name).unwrap_or_default();
                let most = max_length.unwrap_or(usize::MAX);
                value.push_str(&found[..found.floor_char_boundary(most)]);
            }
            Part::Operator(_) => {
                return Err(at.not_implemented(
                    "operators other than %ENVIRONMENT(X)% are not implemented here",
                ));
            }
        }
    }
    if value.chars().any(char::is_control) {
        return Err(at.error("has a character that no header may have"));
    }
    Ok(value.into())
}

/// `HttpService`.
pub(super) fn http_service_of(at: At<'_>, m: &core::HttpService) -> Step<HttpCollector> {
    let uri = at.required("http_uri", &m.http_uri, http_uri)?;
    let headers = at.each(
        "request_headers_to_add",
        &m.request_headers_to_add,
        |at, m| {
            at.required("header", &m.header, |at, m| {
                let name = header_name(&at, "key", &m.key)?;
                Ok((name, without_request(&at.field("value"), &m.value)?))
            })
        },
    );
    // As with other headers: without a value there is none.
    let headers = headers.into_iter().filter(|(_, value)| !value.is_empty());
    Ok(HttpCollector {
        cluster: uri.cluster,
        authority: (&*uri.authority).into(),
        path: (&*uri.path).into(),
        headers: headers.collect(),
        // Nobody waits for a collector for ever.
        timeout: match uri.timeout {
            Duration::ZERO => PATIENCE,
            timeout => timeout,
        },
    })
}

/// How long a collector may take where nothing is said.
const PATIENCE: Duration = Duration::from_secs(5);
