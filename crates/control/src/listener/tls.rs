//! TLS that listeners terminate: mutual TLS of the mesh, and the servers of gateways.

use proto::{
    any,
    envoy::{
        config::core::v3::{
            AggregatedConfigSource, ApiConfigSource, ApiVersion, ConfigSource, DataSource,
            GrpcService, TransportSocket, api_config_source, config_source, data_source,
            grpc_service, transport_socket,
        },
        extensions::transport_sockets::tls::v3::{
            CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
            TlsParameters, certificate_validation_context::TrustChainVerification,
            common_tls_context::ValidationContextType, tls_parameters::TlsProtocol,
        },
        r#type::matcher::v3::StringMatcher,
    },
    istio::{
        mesh::v1alpha1::{MeshConfig, mesh_config::TlsConfig, mesh_config::tls_config},
        networking::v1alpha3::{
            ServerTlsSettings,
            server_tls_settings::{TlSmode, TlsProtocol as ServerProtocol},
        },
    },
};

use crate::{
    cluster::tls::combined,
    route::{exact, prefix},
};

/// The secret that holds a workload's own certificate.
pub const OWN_CERTIFICATE: &str = "default";
/// The secret that holds the mesh's roots.
pub const ROOTS: &str = "ROOTCA";
/// The bootstrap's cluster of the agent's secret service.
const SDS_CLUSTER: &str = "sds-grpc";
const CA_SUFFIX: &str = "-cacert";
const BUILTIN: &str = "builtin://";

/// Ciphers of the mesh's TLS 1.2.
const MESH_CIPHERS: [&str; 6] = [
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
    "AES256-GCM-SHA384",
    "AES128-GCM-SHA256",
];
const ALPN_HTTP: [&str; 2] = ["h2", "http/1.1"];
const ALPN_TCP_WITH_EXCHANGE: [&str; 3] = ["istio-peer-exchange", "h2", "http/1.1"];

/// Certificate files that the node names instead of secrets of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateFiles {
    pub certificate_chain: String,
    pub private_key: String,
    pub root: String,
}

/// How an inbound port terminates mutual TLS: `(for HTTP, for TCP)`.
pub fn inbound_mutual(
    mesh: &MeshConfig,
    files: &CertificateFiles,
) -> (DownstreamTlsContext, DownstreamTlsContext) {
    let mut domains: Vec<&str> = vec![&mesh.trust_domain];
    for alias in &mesh.trust_domain_aliases {
        if !domains.contains(&alias.as_str()) {
            domains.push(alias);
        }
    }
    let names = domains
        .iter()
        .map(|d| prefix(&format!("spiffe://{d}/")))
        .collect();
    let minimum = match mesh
        .mesh_m_tls
        .as_ref()
        .map(TlsConfig::min_protocol_version)
    {
        Some(tls_config::TlsProtocol::Tlsv13) => TlsProtocol::TlSv13,
        _ => TlsProtocol::TlSv12,
    };
    let defaults = mesh.mesh_m_tls.as_ref();
    let ciphers = defaults
        .map(|d| d.cipher_suites.clone())
        .filter(|c| !c.is_empty())
        .unwrap_or_else(|| MESH_CIPHERS.map(str::to_owned).to_vec());
    let mut common = CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: minimum.into(),
            tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
            cipher_suites: ciphers,
            ..Default::default()
        }),
        ..Default::default()
    };
    own_identity(&mut common, files, names, true, None);
    let context = |alpn: &[&str]| DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            alpn_protocols: alpn.iter().map(|a| (*a).to_owned()).collect(),
            ..common.clone()
        }),
        require_client_certificate: Some(true),
        ..Default::default()
    };
    (context(&ALPN_HTTP), context(&ALPN_TCP_WITH_EXCHANGE))
}

/// How a gateway's server (or a Sidecar's ingress) terminates TLS. `tcp` tells that what comes out is no HTTP.
pub fn server(
    tls: &ServerTlsSettings,
    tcp: bool,
    mesh: &MeshConfig,
    files: &CertificateFiles,
) -> DownstreamTlsContext {
    let mode = tls.mode();
    let alpn: &[&str] = if tcp && mode == TlSmode::IstioMutual {
        &ALPN_TCP_WITH_EXCHANGE
    } else {
        &ALPN_HTTP
    };
    let requires = matches!(mode, TlSmode::Mutual | TlSmode::IstioMutual);
    let validates = requires || mode == TlSmode::OptionalMutual;
    let mut common = CommonTlsContext {
        alpn_protocols: alpn.iter().map(|a| (*a).to_owned()).collect(),
        ..Default::default()
    };
    let names = tls.subject_alt_names.iter().map(|n| exact(n)).collect();
    if mode == TlSmode::IstioMutual {
        own_identity(&mut common, files, names, validates, Some(tls));
    } else if !tls.credential_names.is_empty() || !tls.credential_name.is_empty() {
        credentials(&mut common, tls, names);
    } else {
        files_of_server(&mut common, tls, names, validates);
    }
    if matches!(
        mode,
        TlSmode::Simple | TlSmode::Mutual | TlSmode::OptionalMutual
    ) {
        parameters(&mut common, tls, mesh.tls_defaults.as_ref());
    }
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(requires),
        ..Default::default()
    }
}

/// The transport socket around a context.
pub fn socket(context: &DownstreamTlsContext) -> TransportSocket {
    TransportSocket {
        name: "envoy.transport_sockets.tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(any::pack(
            context,
        ))),
    }
}

/// The workload's own certificate: from the mesh, or from files that its node names.
fn own_identity(
    common: &mut CommonTlsContext,
    files: &CertificateFiles,
    names: Vec<StringMatcher>,
    validates: bool,
    tls: Option<&ServerTlsSettings>,
) {
    let certificate = certificate_name(&files.certificate_chain, &files.private_key);
    common.tls_certificate_sds_secret_configs = vec![agent_secret(
        certificate.as_deref().unwrap_or(OWN_CERTIFICATE),
    )];
    if validates {
        let roots = root_name(&files.root);
        common.validation_context_type = Some(validation(
            names,
            tls,
            agent_secret(roots.as_deref().unwrap_or(ROOTS)),
        ));
    }
}

/// Certificates in files of the gateway's own.
fn files_of_server(
    common: &mut CommonTlsContext,
    tls: &ServerTlsSettings,
    names: Vec<StringMatcher>,
    validates: bool,
) {
    let name = |certificate: &str, key: &str| {
        agent_secret(
            certificate_name(certificate, key)
                .as_deref()
                .unwrap_or(OWN_CERTIFICATE),
        )
    };
    common.tls_certificate_sds_secret_configs = if tls.tls_certificates.is_empty() {
        vec![name(&tls.server_certificate, &tls.private_key)]
    } else {
        tls.tls_certificates
            .iter()
            .map(|c| name(&c.server_certificate, &c.private_key))
            .collect()
    };
    if validates {
        let roots = root_name(&tls.ca_certificates);
        let roots = agent_secret(roots.as_deref().unwrap_or(ROOTS));
        common.validation_context_type = Some(validation(names, Some(tls), roots));
    }
}

/// Certificates in Kubernetes secrets, which the control plane itself gives out.
fn credentials(common: &mut CommonTlsContext, tls: &ServerTlsSettings, names: Vec<StringMatcher>) {
    let of: Vec<&str> = if tls.credential_names.is_empty() {
        vec![&tls.credential_name]
    } else {
        tls.credential_names.iter().map(String::as_str).collect()
    };
    common.tls_certificate_sds_secret_configs = of.iter().map(|n| credential(n)).collect();
    if matches!(tls.mode(), TlSmode::Mutual | TlSmode::OptionalMutual) {
        let roots = if tls.ca_cert_credential_name.is_empty() {
            format!("{}{CA_SUFFIX}", of[0])
        } else {
            tls.ca_cert_credential_name.clone()
        };
        let mut context = validation_context(names, tls);
        context.verify_certificate_spki = tls.verify_certificate_spki.clone();
        context.verify_certificate_hash = tls.verify_certificate_hash.clone();
        common.validation_context_type = Some(combined(context, credential(&roots)));
    } else if !names.is_empty() {
        common.validation_context_type =
            Some(ValidationContextType::ValidationContext(with_names(names)));
    }
}

/// The mesh's defaults for gateways, then the server's own parameters.
fn parameters(common: &mut CommonTlsContext, tls: &ServerTlsSettings, mesh: Option<&TlsConfig>) {
    let mut out = TlsParameters::default();
    if let Some(mesh) = mesh {
        out.ecdh_curves = mesh.ecdh_curves.clone();
        out.cipher_suites = mesh.cipher_suites.clone();
        out.tls_minimum_protocol_version = match mesh.min_protocol_version() {
            tls_config::TlsProtocol::TlsAuto => TlsProtocol::TlsAuto,
            tls_config::TlsProtocol::Tlsv12 => TlsProtocol::TlSv12,
            tls_config::TlsProtocol::Tlsv13 => TlsProtocol::TlSv13,
        }
        .into();
    }
    if tls.min_protocol_version() != ServerProtocol::TlsAuto {
        out.tls_minimum_protocol_version = protocol(tls.min_protocol_version()).into();
    }
    if tls.max_protocol_version() != ServerProtocol::TlsAuto {
        out.tls_maximum_protocol_version = protocol(tls.max_protocol_version()).into();
    }
    let ciphers = usable_ciphers(&tls.cipher_suites);
    if !ciphers.is_empty() {
        out.cipher_suites = ciphers;
    }
    if out != TlsParameters::default() {
        common.tls_params = Some(out);
    }
}

fn protocol(version: ServerProtocol) -> TlsProtocol {
    match version {
        ServerProtocol::TlsAuto => TlsProtocol::TlsAuto,
        ServerProtocol::Tlsv10 => TlsProtocol::TlSv10,
        ServerProtocol::Tlsv11 => TlsProtocol::TlSv11,
        ServerProtocol::Tlsv12 => TlsProtocol::TlSv12,
        ServerProtocol::Tlsv13 => TlsProtocol::TlSv13,
    }
}

/// Ciphers that a proxy can be asked for, each once: Envoy rejects a context with an unknown name.
fn usable_ciphers(names: &[String]) -> Vec<String> {
    const KNOWN: [&str; 16] = [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-SHA",
        "ECDHE-RSA-AES128-SHA",
        "ECDHE-ECDSA-AES256-SHA",
        "ECDHE-RSA-AES256-SHA",
        "AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-SHA",
        "AES256-SHA",
        "DES-CBC3-SHA",
        "ECDHE-RSA-DES-CBC3-SHA",
    ];
    let mut out: Vec<String> = Vec::new();
    for name in names {
        if KNOWN.contains(&name.as_str()) && !out.contains(name) {
            out.push(name.clone());
        }
    }
    out
}

fn validation(
    names: Vec<StringMatcher>,
    tls: Option<&ServerTlsSettings>,
    roots: SdsSecretConfig,
) -> ValidationContextType {
    let context = match tls {
        Some(tls) => {
            let mut context = validation_context(names, tls);
            if !tls.ca_crl.is_empty() {
                context.crl = Some(DataSource {
                    specifier: Some(data_source::Specifier::Filename(tls.ca_crl.clone())),
                    ..Default::default()
                });
            }
            context
        }
        None => with_names(names),
    };
    combined(context, roots)
}

fn validation_context(
    names: Vec<StringMatcher>,
    tls: &ServerTlsSettings,
) -> CertificateValidationContext {
    let mut out = with_names(names);
    if tls.insecure_skip_verify == Some(true) {
        out.trust_chain_verification = TrustChainVerification::AcceptUntrusted.into();
    }
    out
}

/// Untyped alternative names: Envoy matches them against URIs and DNS names alike.
#[allow(deprecated)]
fn with_names(names: Vec<StringMatcher>) -> CertificateValidationContext {
    CertificateValidationContext {
        match_subject_alt_names: names,
        ..Default::default()
    }
}

fn certificate_name(certificate: &str, key: &str) -> Option<String> {
    (!certificate.is_empty() && !key.is_empty()).then(|| format!("file-cert:{certificate}~{key}"))
}

fn root_name(roots: &str) -> Option<String> {
    (!roots.is_empty()).then(|| format!("file-root:{roots}"))
}

/// A Kubernetes secret by the name that a Gateway gives it.
pub(crate) fn credential(name: &str) -> SdsSecretConfig {
    if name == BUILTIN {
        return agent_secret(OWN_CERTIFICATE);
    }
    if name.strip_suffix(CA_SUFFIX) == Some(BUILTIN) {
        return agent_secret(ROOTS);
    }
    let name = name.strip_prefix("sds://").unwrap_or(name);
    let name = if name.contains("://") {
        name.to_owned()
    } else {
        format!("kubernetes://{name}")
    };
    SdsSecretConfig {
        name,
        sds_config: Some(ConfigSource {
            config_source_specifier: Some(config_source::ConfigSourceSpecifier::Ads(
                AggregatedConfigSource {},
            )),
            resource_api_version: ApiVersion::V3.into(),
            ..Default::default()
        }),
    }
}

/// A secret that the agent beside the proxy serves. The mesh's own are waited for without limit; files are not, which
/// is how Istio writes them.
pub(crate) fn agent_secret(name: &str) -> SdsSecretConfig {
    let source = ApiConfigSource {
        api_type: api_config_source::ApiType::Grpc.into(),
        transport_api_version: ApiVersion::V3.into(),
        set_node_on_first_message_only: true,
        grpc_services: vec![GrpcService {
            target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
                grpc_service::EnvoyGrpc {
                    cluster_name: SDS_CLUSTER.to_owned(),
                    ..Default::default()
                },
            )),
            ..Default::default()
        }],
        ..Default::default()
    };
    let of_mesh = name == OWN_CERTIFICATE || name == ROOTS;
    SdsSecretConfig {
        name: name.to_owned(),
        sds_config: Some(ConfigSource {
            config_source_specifier: Some(config_source::ConfigSourceSpecifier::ApiConfigSource(
                source,
            )),
            resource_api_version: ApiVersion::V3.into(),
            initial_fetch_timeout: of_mesh.then_some(crate::route::NO_TIMEOUT),
            ..Default::default()
        }),
    }
}
