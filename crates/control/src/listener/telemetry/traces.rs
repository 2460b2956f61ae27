//! Traces: whose they are, how many, and where they are sent.

use std::collections::BTreeMap;

use proto::{
    Any, Duration, any,
    envoy::{
        config::{
            core::v3::{
                GrpcService, HeaderValue, HeaderValueOption, HttpService, HttpUri,
                TypedExtensionConfig, grpc_service, header_value_option::HeaderAppendAction,
                http_uri,
            },
            trace::v3::{
                DatadogConfig, OpenTelemetryConfig, SkyWalkingConfig, ZipkinConfig, tracing,
                zipkin_config::{CollectorEndpointVersion, TraceContextOption},
            },
        },
        extensions::{
            filters::network::http_connection_manager::v3::http_connection_manager::Tracing,
            tracers::opentelemetry::resource_detectors::v3::{
                DynatraceResourceDetectorConfig, EnvironmentResourceDetectorConfig,
            },
        },
        r#type::tracing::v3::CustomTag,
    },
    istio::{
        mesh::v1alpha1::mesh_config::{
            ExtensionProvider,
            extension_provider::{
                HttpHeader, OpenTelemetryTracingProvider, Provider, ZipkinTracingProvider,
                http_header::HeaderValue as Source,
                zipkin_tracing_provider::TraceContextOption as MeshContextOption,
            },
        },
        telemetry::v1alpha1::{
            WorkloadMode,
            tracing::{CustomTag as TelemetryTag, custom_tag::Type as TelemetryTagType},
        },
    },
};

use super::{
    super::{settings::Class, tracing as spans},
    Applied, Destination, Kind, covers, mode_of,
};

/// Where a Zipkin collector takes spans.
const ZIPKIN_PATH: &str = "/api/v2/spans";
/// How long a Zipkin collector may take.
const ZIPKIN_TIMEOUT: Duration = Duration {
    seconds: 5,
    nanos: 0,
};

/// What Telemetry says about the traces of one side.
#[derive(Default)]
struct Spec<'a> {
    provider: Option<&'a ExtensionProvider>,
    disabled: bool,
    sampling: Option<f64>,
    tags: Option<&'a BTreeMap<String, TelemetryTag>>,
    request_id: bool,
    istio_tags: bool,
}

/// A tracer's settings and what follows from them.
struct Tracer {
    name: &'static str,
    config: Any,
    max_tag_length: u32,
    child_spans: bool,
    /// The tracer samples by itself.
    samples: bool,
}

impl Applied<'_> {
    /// Tracing of a side, and whether its decision travels in the request id.
    pub(super) fn tracing(&self, class: Class) -> (Option<Tracing>, bool) {
        let Some(spec) = self.spec(class) else {
            return (
                spans::of_mesh(self.mesh.config(), self.config, &self.workload),
                true,
            );
        };
        let Some(provider) = spec.provider.filter(|_| !spec.disabled) else {
            return (None, true);
        };
        let Some(tracer) = self.tracer(provider) else {
            return (None, true);
        };
        let max_length = [
            tracer.max_tag_length,
            self.config
                .tracing
                .as_ref()
                .map_or(0, |t| t.max_path_tag_length),
        ];
        let own = match spec.tags {
            Some(tags) if !tags.is_empty() => tags.iter().filter_map(tag).collect(),
            _ => spans::proxy_config_tags(self.config),
        };
        let mut out = Tracing {
            custom_tags: spans::tags(spec.istio_tags, own, &self.workload),
            max_path_tag_length: max_length.into_iter().find(|n| *n > 0),
            spawn_upstream_span: tracer.child_spans.then_some(true),
            provider: Some(tracing::Http {
                name: tracer.name.to_owned(),
                config_type: Some(tracing::http::ConfigType::TypedConfig(tracer.config)),
            }),
            ..Default::default()
        };
        let percent = if tracer.samples {
            100.0
        } else {
            spec.sampling
                .unwrap_or_else(|| spans::proxy_config_sampling(self.config))
        };
        spans::sample(&mut out, percent);
        (Some(out), spec.request_id)
    }

    /// `None` where neither Telemetry nor a default provider says anything.
    fn spec(&self, class: Class) -> Option<Spec<'_>> {
        let default = self.default_providers(Kind::Tracing).first().copied();
        let rules: Vec<_> = self.objects.iter().flat_map(|o| &o.spec.tracing).collect();
        if rules.is_empty() && default.is_none() {
            return None;
        }
        let mut out = Spec {
            request_id: true,
            istio_tags: true,
            ..Spec::default()
        };
        out.provider = default.and_then(|name| self.provider(name));
        for rule in rules {
            let wanted = rule
                .r#match
                .as_ref()
                .map_or(WorkloadMode::ClientAndServer, |m| m.mode());
            if !covers(wanted, mode_of(class)) {
                continue;
            }
            if let Some(first) = rule.providers.first() {
                out.provider = self.provider(&first.name);
            }
            out.disabled = rule.disable_span_reporting.unwrap_or(out.disabled);
            if !rule.custom_tags.is_empty() {
                out.tags = Some(&rule.custom_tags);
            }
            out.sampling = rule.random_sampling_percentage.or(out.sampling);
            out.request_id = rule
                .use_request_id_for_trace_sampling
                .unwrap_or(out.request_id);
            out.istio_tags = rule.enable_istio_tags.unwrap_or(out.istio_tags);
        }
        Some(out)
    }

    fn tracer(&self, provider: &ExtensionProvider) -> Option<Tracer> {
        let to = |service: &str, port: u32| self.destination(&provider.name, service, port);
        let service_name = &self.proxy.node.cluster;
        let (name, config, max_tag_length, samples) = match provider.provider.as_ref()? {
            Provider::Zipkin(z) => {
                let to = to(&z.service, z.port)?;
                let config = any::pack(&self.zipkin(z, &to));
                ("envoy.tracers.zipkin", config, z.max_tag_length, false)
            }
            Provider::Datadog(d) => {
                let to = to(&d.service, d.port)?;
                let config = any::pack(&DatadogConfig {
                    collector_cluster: to.cluster,
                    service_name: service_name.clone(),
                    collector_hostname: to.host,
                    ..Default::default()
                });
                ("envoy.tracers.datadog", config, d.max_tag_length, false)
            }
            Provider::Skywalking(s) => {
                let to = to(&s.service, s.port)?;
                let config = any::pack(&SkyWalkingConfig {
                    grpc_service: Some(grpc(&to)),
                    ..Default::default()
                });
                ("envoy.tracers.skywalking", config, 0, false)
            }
            Provider::Opentelemetry(o) if o.sampling.is_none() => {
                let to = to(&o.service, o.port)?;
                let config = any::pack(&open_telemetry(o, &to, service_name));
                (
                    "envoy.tracers.opentelemetry",
                    config,
                    o.max_tag_length,
                    false,
                )
            }
            _ => {
                tracing_warning(&provider.name);
                return None;
            }
        };
        let child_spans = self.proxy.is_router() || name == "envoy.tracers.skywalking";
        Some(Tracer {
            name,
            config,
            max_tag_length,
            child_spans,
            samples,
        })
    }

    /// Proxies since 1.29 take the collector as a whole service, those since 1.28 a choice of headers.
    fn zipkin(&self, z: &ZipkinTracingProvider, to: &Destination) -> ZipkinConfig {
        let version = self.proxy.node.version;
        let path = if z.path.is_empty() {
            ZIPKIN_PATH
        } else {
            &z.path
        };
        let mut out = ZipkinConfig {
            collector_endpoint_version: CollectorEndpointVersion::HttpJson.into(),
            trace_id_128bit: !z.enable_64bit_trace_id,
            shared_span_context: Some(false),
            ..Default::default()
        };
        if version.at_least(1, 29, 0) {
            out.collector_service = Some(HttpService {
                http_uri: Some(HttpUri {
                    uri: format!("http://{}{path}", to.host),
                    http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(
                        to.cluster.clone(),
                    )),
                    timeout: Some(z.timeout.unwrap_or(ZIPKIN_TIMEOUT)),
                }),
                request_headers_to_add: headers(&z.headers),
                ..Default::default()
            });
        } else {
            out.collector_cluster = to.cluster.clone();
            out.collector_endpoint = path.to_owned();
            out.collector_hostname = to.host.clone();
        }
        if version.at_least(1, 28, 0)
            && z.trace_context_option() == MeshContextOption::UseB3WithW3cPropagation
        {
            out.trace_context_option = TraceContextOption::UseB3WithW3cPropagation.into();
        }
        out
    }
}

fn open_telemetry(
    o: &OpenTelemetryTracingProvider,
    to: &Destination,
    service_name: &str,
) -> OpenTelemetryConfig {
    let mut out = OpenTelemetryConfig {
        service_name: service_name.to_owned(),
        ..Default::default()
    };
    if let Some(http) = &o.http {
        let path = http.path.trim_start_matches('/');
        out.http_service = Some(HttpService {
            http_uri: Some(HttpUri {
                uri: format!("{}/{path}", to.host),
                http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(to.cluster.clone())),
                timeout: http.timeout,
            }),
            request_headers_to_add: headers(&http.headers),
            ..Default::default()
        });
    } else {
        let mut service = grpc(to);
        if let Some(own) = &o.grpc {
            service.timeout = own.timeout;
            service.initial_metadata = own.initial_metadata.iter().map(header_value).collect();
        }
        out.grpc_service = Some(service);
    }
    if let Some(detectors) = &o.resource_detectors {
        let detector = |name: &str, config| TypedExtensionConfig {
            name: format!("envoy.tracers.opentelemetry.resource_detectors.{name}"),
            typed_config: Some(config),
        };
        if detectors.environment.is_some() {
            let config = any::pack(&EnvironmentResourceDetectorConfig {});
            out.resource_detectors.push(detector("environment", config));
        }
        if detectors.dynatrace.is_some() {
            let config = any::pack(&DynatraceResourceDetectorConfig {});
            out.resource_detectors.push(detector("dynatrace", config));
        }
    }
    out
}

fn grpc(to: &Destination) -> GrpcService {
    GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
            grpc_service::EnvoyGrpc {
                cluster_name: to.cluster.clone(),
                authority: to.host.clone(),
                ..Default::default()
            },
        )),
        ..Default::default()
    }
}

fn headers(all: &[HttpHeader]) -> Vec<HeaderValueOption> {
    all.iter()
        .map(|h| HeaderValueOption {
            header: Some(header_value(h)),
            append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
            ..Default::default()
        })
        .collect()
}

/// A header's value is given, or taken from the control plane's own environment (a secret mounted there).
fn header_value(h: &HttpHeader) -> HeaderValue {
    let value = match &h.header_value {
        Some(Source::Value(value)) => value.clone(),
        Some(Source::EnvName(name)) => std::env::var(name).unwrap_or_default(),
        None => String::new(),
    };
    HeaderValue {
        key: h.name.clone(),
        value,
        ..Default::default()
    }
}

fn tag((name, tag): (&String, &TelemetryTag)) -> Option<CustomTag> {
    let kind = match tag.r#type.as_ref()? {
        TelemetryTagType::Literal(t) => spans::literal(&t.value),
        TelemetryTagType::Environment(t) => spans::environment(&t.name, &t.default_value),
        TelemetryTagType::Header(t) => spans::header(&t.name, &t.default_value),
        TelemetryTagType::Formatter(_) => {
            ::tracing::warn!(
                "Telemetry: the custom tag {name:?} is left out: tags of kind formatter are not \
                 implemented; use literal, environment or header"
            );
            return None;
        }
    };
    Some(CustomTag {
        tag: name.clone(),
        r#type: Some(kind),
        ..Default::default()
    })
}

fn tracing_warning(provider: &str) {
    ::tracing::warn!(
        "extension provider {provider:?} cannot trace: use zipkin, datadog, skywalking or \
         opentelemetry (without a sampler of its own)"
    );
}
