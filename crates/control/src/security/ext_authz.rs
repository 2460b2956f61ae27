//! CUSTOM policies: the extension providers of MeshConfig that decide instead of RBAC.

use proto::{
    Any, Duration, any,
    envoy::{
        config::core::v3::{ApiVersion, GrpcService, HeaderValue, HttpUri, grpc_service, http_uri},
        extensions::filters::{
            http::ext_authz::v3::{
                AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, HttpService,
                ext_authz::Services as AskedBy,
            },
            network::ext_authz::v3::ExtAuthz as NetworkExtAuthz,
        },
        r#type::{
            matcher::v3::{ListStringMatcher, MetadataMatcher, StringMatcher},
            v3::{HttpStatus, StatusCode},
        },
    },
    istio::mesh::v1alpha1::{
        MeshConfig,
        mesh_config::{
            ExtensionProvider,
            extension_provider::{
                EnvoyExternalAuthorizationGrpcProvider as Grpc,
                EnvoyExternalAuthorizationHttpProvider as Http,
                EnvoyExternalAuthorizationRequestBody as Body, Provider,
            },
        },
    },
};

use super::matchers;
use crate::{model::Services, names};

/// Before the statistics and metadata of the RBAC filter that finds out whether a provider is to be asked.
pub(crate) const STAT_PREFIX: &str = "istio_ext_authz_";
/// First part of the names of CUSTOM policies.
pub(crate) const POLICY_PREFIX: &str = "istio-ext-authz";
const EFFECTIVE_POLICY: &str = "istio_ext_authz_shadow_effective_policy_id";
/// A provider that says nothing about it may take ten minutes: asking is the user's explicit wish.
const TIMEOUT: Duration = Duration {
    seconds: 600,
    nanos: 0,
};

/// How a provider is asked.
#[derive(Debug, Clone)]
pub(crate) struct Filters {
    pub(crate) http: Any,
    /// Providers over HTTP cannot judge connections.
    pub(crate) tcp: Option<Any>,
}

/// Why a CUSTOM policy cannot be enforced; everything that it matches is denied then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadProvider {
    #[error(
        "MeshConfig.extensionProviders has no envoyExtAuthzHttp or envoyExtAuthzGrpc provider {0:?}"
    )]
    Unknown(String),
    #[error("MeshConfig.extensionProviders has more than one provider {0:?}")]
    Duplicate(String),
    #[error(
        "extension provider {0:?}: a name has 1 to 63 lower-case letters, digits and inner hyphens"
    )]
    Name(String),
    #[error("extension provider {provider:?}: service {service:?} is {what}")]
    Service {
        provider: String,
        service: String,
        what: &'static str,
    },
    #[error("extension provider {provider:?}: {field} {value:?} {problem}")]
    Field {
        provider: String,
        field: &'static str,
        value: String,
        problem: &'static str,
    },
}

/// The one provider of this name.
pub(crate) fn provider<'a>(mesh: &'a MeshConfig, name: &str) -> Result<&'a Provider, BadProvider> {
    let asked = |p: &&ExtensionProvider| {
        p.name == name
            && matches!(
                p.provider,
                Some(Provider::EnvoyExtAuthzHttp(_) | Provider::EnvoyExtAuthzGrpc(_))
            )
    };
    let mut found = mesh.extension_providers.iter().filter(asked);
    let provider = found
        .next()
        .and_then(|p| p.provider.as_ref())
        .ok_or_else(|| BadProvider::Unknown(name.to_owned()))?;
    if found.next().is_some() {
        return Err(BadProvider::Duplicate(name.to_owned()));
    }
    if !is_label(name) {
        return Err(BadProvider::Name(name.to_owned()));
    }
    Ok(provider)
}

/// The filters that ask the provider of this name, where a policy of the provider has matched.
pub(crate) fn filters(
    mesh: &MeshConfig,
    services: &Services,
    name: &str,
) -> Result<Filters, BadProvider> {
    match provider(mesh, name)? {
        Provider::EnvoyExtAuthzHttp(config) => http(services, name, config),
        Provider::EnvoyExtAuthzGrpc(config) => grpc(services, name, config),
        _ => Err(BadProvider::Unknown(name.to_owned())),
    }
}

fn http(services: &Services, name: &str, config: &Http) -> Result<Filters, BadProvider> {
    let (host, cluster) = destination(services, name, &config.service, config.port)?;
    if !config.path_prefix.is_empty() && !config.path_prefix.starts_with('/') {
        return Err(field(
            name,
            "pathPrefix",
            &config.path_prefix,
            "must begin with /",
        ));
    }
    let lists = [
        (
            "includeRequestHeadersInCheck",
            &config.include_request_headers_in_check,
        ),
        ("includeHeadersInCheck", &config.include_headers_in_check),
        (
            "headersToDownstreamOnDeny",
            &config.headers_to_downstream_on_deny,
        ),
        (
            "headersToDownstreamOnAllow",
            &config.headers_to_downstream_on_allow,
        ),
        (
            "headersToUpstreamOnAllow",
            &config.headers_to_upstream_on_allow,
        ),
    ];
    if let Some((list, _)) = lists.iter().find(|(_, l)| l.iter().any(|h| h == "*")) {
        return Err(field(
            name,
            list,
            "*",
            "must name headers, or their first or last part",
        ));
    }
    let headers_to_add: Vec<_> = config
        .include_additional_headers_in_check
        .iter()
        .map(|(key, value)| HeaderValue {
            key: key.clone(),
            value: value.clone(),
            ..Default::default()
        })
        .collect();
    let response = AuthorizationResponse {
        allowed_upstream_headers: headers(&config.headers_to_upstream_on_allow),
        allowed_client_headers: headers(&config.headers_to_downstream_on_deny),
        allowed_client_headers_on_success: headers(&config.headers_to_downstream_on_allow),
        ..Default::default()
    };
    let service = HttpService {
        server_uri: Some(HttpUri {
            // Only its presence is asked for: where requests go is the cluster's business.
            uri: format!("http://{host}"),
            timeout: Some(config.timeout.unwrap_or(TIMEOUT)),
            http_upstream_type: Some(http_uri::HttpUpstreamType::Cluster(cluster)),
        }),
        path_prefix: config.path_prefix.clone(),
        authorization_request: (!headers_to_add.is_empty()).then(|| AuthorizationRequest {
            headers_to_add,
            ..Default::default()
        }),
        authorization_response: (response != AuthorizationResponse::default()).then_some(response),
        ..Default::default()
    };
    let filter = ExtAuthz {
        status_on_error: status(name, &config.status_on_error)?,
        failure_mode_allow: config.fail_open,
        transport_api_version: ApiVersion::V3.into(),
        filter_enabled_metadata: Some(enabled(super::HTTP_RBAC, name)),
        with_request_body: body(config.include_request_body_in_check.as_ref()),
        allowed_headers: headers(&config.include_request_headers_in_check)
            .or_else(|| headers(&config.include_headers_in_check)),
        services: Some(AskedBy::HttpService(service)),
        ..Default::default()
    };
    Ok(Filters {
        http: any::pack(&filter),
        tcp: None,
    })
}

fn grpc(services: &Services, name: &str, config: &Grpc) -> Result<Filters, BadProvider> {
    let (host, cluster) = destination(services, name, &config.service, config.port)?;
    let service = GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
            grpc_service::EnvoyGrpc {
                cluster_name: cluster,
                authority: host,
                ..Default::default()
            },
        )),
        timeout: Some(config.timeout.unwrap_or(TIMEOUT)),
        ..Default::default()
    };
    let http = ExtAuthz {
        status_on_error: status(name, &config.status_on_error)?,
        failure_mode_allow: config.fail_open,
        transport_api_version: ApiVersion::V3.into(),
        filter_enabled_metadata: Some(enabled(super::HTTP_RBAC, name)),
        with_request_body: body(config.include_request_body_in_check.as_ref()),
        services: Some(AskedBy::GrpcService(service.clone())),
        ..Default::default()
    };
    let tcp = NetworkExtAuthz {
        stat_prefix: super::TCP_STAT_PREFIX.to_owned(),
        grpc_service: Some(service),
        failure_mode_allow: config.fail_open,
        transport_api_version: ApiVersion::V3.into(),
        filter_enabled_metadata: Some(enabled(super::NETWORK_RBAC, name)),
        ..Default::default()
    };
    Ok(Filters {
        http: any::pack(&http),
        tcp: Some(any::pack(&tcp)),
    })
}

/// Only where a policy of the provider has matched: the RBAC filter before left its name.
fn enabled(rbac: &str, provider: &str) -> MetadataMatcher {
    let policy = matchers::prefix(&format!("{POLICY_PREFIX}-{provider}"));
    matchers::metadata(rbac, &[EFFECTIVE_POLICY], matchers::string_value(policy))
}

fn destination(
    services: &Services,
    provider: &str,
    service: &str,
    port: u32,
) -> Result<(String, String), BadProvider> {
    if !(1..=65535).contains(&port) {
        return Err(field(
            provider,
            "port",
            &port.to_string(),
            "must be 1 to 65535",
        ));
    }
    let found: Vec<_> = match service.split_once('/') {
        Some((namespace, host)) => services.get(host, namespace).into_iter().collect(),
        None => services.of_host(service).collect(),
    };
    match found.as_slice() {
        [only] => Ok((
            only.hostname.clone(),
            names::outbound_cluster(port, "", &only.hostname),
        )),
        several => Err(BadProvider::Service {
            provider: provider.to_owned(),
            service: service.to_owned(),
            what: if several.is_empty() {
                "not known; name a Service or ServiceEntry as NAMESPACE/HOST"
            } else {
                "in more than one namespace; name it as NAMESPACE/HOST"
            },
        }),
    }
}

fn status(provider: &str, text: &str) -> Result<Option<HttpStatus>, BadProvider> {
    if text.is_empty() {
        return Ok(None);
    }
    let code = text.parse::<i32>().ok();
    let code = code.and_then(|code| StatusCode::try_from(code).ok());
    match code {
        Some(code) => Ok(Some(HttpStatus { code: code.into() })),
        None => Err(field(
            provider,
            "statusOnError",
            text,
            "must be an HTTP status code",
        )),
    }
}

fn body(config: Option<&Body>) -> Option<BufferSettings> {
    config.map(|c| BufferSettings {
        max_request_bytes: c.max_request_bytes,
        allow_partial_message: c.allow_partial_message,
        pack_as_bytes: c.pack_as_bytes,
    })
}

/// Names of headers, with a star at one end where only the other part counts.
fn headers(names: &[String]) -> Option<ListStringMatcher> {
    (!names.is_empty()).then(|| ListStringMatcher {
        patterns: names
            .iter()
            .map(|name| StringMatcher {
                ignore_case: true,
                ..matchers::string(name)
            })
            .collect(),
    })
}

fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn field(provider: &str, field: &'static str, value: &str, problem: &'static str) -> BadProvider {
    BadProvider::Field {
        provider: provider.to_owned(),
        field,
        value: value.to_owned(),
        problem,
    }
}
