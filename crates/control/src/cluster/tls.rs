//! TLS towards servers: what the DestinationRule says, or mutual TLS of the mesh where the endpoint has a sidecar.

use proto::{
    Struct, any,
    envoy::{
        config::{
            cluster::v3::cluster::{DiscoveryType, TransportSocketMatch},
            core::v3::{
                DataSource, ProxyProtocolConfig, TransportSocket, UpstreamHttpProtocolOptions,
                data_source, transport_socket::ConfigType,
            },
        },
        extensions::transport_sockets::{
            proxy_protocol::v3::ProxyProtocolUpstreamTransport,
            raw_buffer::v3::RawBuffer,
            tls::v3::{
                CertificateValidationContext, CommonTlsContext, SdsSecretConfig, TlsParameters,
                UpstreamTlsContext,
                common_tls_context::{CombinedCertificateValidationContext, ValidationContextType},
                tls_parameters::TlsProtocol,
            },
        },
    },
    istio::networking::v1alpha3::{
        ClientTlsSettings, client_tls_settings::TlSmode, traffic_policy::ProxyProtocol,
    },
};

use super::draft::{Draft, text};
use crate::{
    endpoint::text_struct,
    listener::tls::{OWN_CERTIFICATE, ROOTS, agent_secret, credential},
    model::{Mesh, MtlsMode, Protocol, Proxy, Registry, Service},
    route::exact,
};

const TLS: &str = "envoy.transport_sockets.tls";
const RAW: &str = "envoy.transport_sockets.raw_buffer";
const PROXY_PROTOCOL: &str = "envoy.transport_sockets.upstream_proxy_protocol";

/// What a cluster's TLS depends on beside the rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer<'a> {
    pub(super) service: &'a Service,
    /// What the port speaks.
    pub(super) protocol: Protocol,
    /// Identities of its servers.
    pub(super) accounts: &'a [String],
    /// The name that tells the server's gateway which cluster is meant.
    pub(super) sni: &'a str,
    /// What servers do, as far as a client can know; `None` outside the mesh.
    pub(super) server: Option<MtlsMode>,
    /// The rule is for chosen workloads: then a sidecar may use credentials by name.
    pub(super) selected: bool,
}

/// Sets the transport socket(s).
pub(super) fn apply(
    draft: &mut Draft,
    mesh: &Mesh,
    proxy: &Proxy,
    rule: Option<&ClientTlsSettings>,
    peer: Peer<'_>,
) {
    let Some((settings, detected)) = effective(mesh, proxy, rule, peer) else {
        return;
    };
    let Some(context) = context(draft, mesh, proxy, &settings, peer) else {
        return;
    };
    let tls = socket(TLS, any::pack(&context));
    // At an original destination nobody knows which endpoint it is: all or nothing.
    if detected && !draft.is(DiscoveryType::OriginalDst) && settings.mode() == TlSmode::IstioMutual
    {
        draft.cluster.transport_socket_matches = vec![
            TransportSocketMatch {
                name: "tlsMode-istio".to_owned(),
                r#match: Some(text_struct("tlsMode", "istio")),
                transport_socket: Some(tls),
            },
            TransportSocketMatch {
                name: "tlsMode-disabled".to_owned(),
                r#match: Some(Struct::default()),
                transport_socket: Some(raw()),
            },
        ];
    } else {
        draft.cluster.transport_socket = Some(tls);
    }
}

/// Every socket of the cluster begins with the PROXY protocol's header.
pub(super) fn proxy_protocol(draft: &mut Draft, rule: Option<&ProxyProtocol>) {
    let Some(rule) = rule else { return };
    let wrap = |inner: TransportSocket| {
        let config = ProxyProtocolUpstreamTransport {
            config: Some(ProxyProtocolConfig {
                version: rule.version,
                ..ProxyProtocolConfig::default()
            }),
            transport_socket: Some(inner),
            ..ProxyProtocolUpstreamTransport::default()
        };
        socket(PROXY_PROTOCOL, any::pack(&config))
    };
    let cluster = &mut draft.cluster;
    if cluster.transport_socket.is_none() && cluster.transport_socket_matches.is_empty() {
        cluster.transport_socket = Some(wrap(raw()));
        return;
    }
    cluster.transport_socket = cluster.transport_socket.take().map(wrap);
    for one in &mut cluster.transport_socket_matches {
        one.transport_socket = one.transport_socket.take().map(wrap);
    }
}

/// Tells the ALPN filter to leave the application's protocols alone where the rule brings its own TLS.
pub(super) fn mark_own_alpn(draft: &mut Draft, rule: Option<&ClientTlsSettings>) {
    if rule.is_some_and(|t| matches!(t.mode(), TlSmode::Simple | TlSmode::Mutual)) {
        draft
            .istio_metadata()
            .insert("alpn_override".to_owned(), text("false"));
    }
}

/// The settings that count, and whether they were found out rather than written.
fn effective(
    mesh: &Mesh,
    proxy: &Proxy,
    rule: Option<&ClientTlsSettings>,
    peer: Peer<'_>,
) -> Option<(ClientTlsSettings, bool)> {
    let certs = proxy.node.meta("TLS_CLIENT_CERT_CHAIN");
    let from_files = |sans: Vec<String>, sni: String, skip: Option<bool>| ClientTlsSettings {
        mode: TlSmode::Mutual.into(),
        client_certificate: certs.unwrap_or_default().to_owned(),
        private_key: proxy
            .node
            .meta("TLS_CLIENT_KEY")
            .unwrap_or_default()
            .to_owned(),
        ca_certificates: proxy
            .node
            .meta("TLS_CLIENT_ROOT_CERT")
            .unwrap_or_default()
            .to_owned(),
        subject_alt_names: sans,
        sni,
        insecure_skip_verify: skip,
        ..ClientTlsSettings::default()
    };
    if let Some(rule) = rule {
        let settings = match rule.mode() {
            TlSmode::Disable => return None,
            TlSmode::Simple => rule.clone(),
            _ if certs.is_some() && !peer.service.mesh_external => from_files(
                rule.subject_alt_names.clone(),
                rule.sni.clone(),
                rule.insecure_skip_verify,
            ),
            TlSmode::Mutual => rule.clone(),
            TlSmode::IstioMutual => {
                let mut settings = rule.clone();
                if settings.sni.is_empty() {
                    settings.sni = peer.sni.to_owned();
                }
                if settings.subject_alt_names.is_empty() {
                    settings.subject_alt_names = peer.accounts.to_vec();
                }
                settings
            }
        };
        return Some((settings, false));
    }
    let auto = mesh.config().enable_auto_mtls != Some(false);
    if peer.service.mesh_external || !auto || matches!(peer.server, None | Some(MtlsMode::Disable))
    {
        return None;
    }
    let (sans, sni) = (peer.accounts.to_vec(), peer.sni.to_owned());
    let settings = if certs.is_some() {
        from_files(sans, sni, None)
    } else {
        ClientTlsSettings {
            mode: TlSmode::IstioMutual.into(),
            subject_alt_names: sans,
            sni,
            ..ClientTlsSettings::default()
        }
    };
    Some((settings, true))
}

fn context(
    draft: &mut Draft,
    mesh: &Mesh,
    proxy: &Proxy,
    tls: &ClientTlsSettings,
    peer: Peer<'_>,
) -> Option<UpstreamTlsContext> {
    let mut common = CommonTlsContext {
        tls_params: Some(TlsParameters {
            tls_minimum_protocol_version: TlsProtocol::TlSv12.into(),
            tls_maximum_protocol_version: TlsProtocol::TlSv13.into(),
            ..TlsParameters::default()
        }),
        ..CommonTlsContext::default()
    };
    let by_name = !tls.credential_name.is_empty();
    // Only a gateway, or a workload that a rule selects, may read secrets by name.
    let privileged = by_name && !tls.credential_name.starts_with("configmap://");
    if privileged && !proxy.is_router() && !peer.selected && tls.mode() != TlSmode::IstioMutual {
        return None;
    }
    match tls.mode() {
        TlSmode::Disable => return None,
        TlSmode::IstioMutual => {
            common.tls_certificate_sds_secret_configs = vec![agent_secret(OWN_CERTIFICATE)];
            common.validation_context_type =
                Some(combined(names(&tls.subject_alt_names), agent_secret(ROOTS)));
            common.alpn_protocols = mesh_alpn(draft, proxy, peer);
            let sni = if tls.sni.is_empty() {
                draft.cluster.name.clone()
            } else {
                tls.sni.clone()
            };
            return Some(UpstreamTlsContext {
                common_tls_context: Some(common),
                sni,
                ..UpstreamTlsContext::default()
            });
        }
        TlSmode::Simple | TlSmode::Mutual => {}
    }
    let skip = tls.insecure_skip_verify == Some(true);
    check_name_of_host(draft, tls, skip);
    // A ServiceEntry says itself who its servers are.
    let sans = if tls.subject_alt_names.is_empty() && peer.service.registry == Registry::External {
        peer.accounts
    } else {
        &tls.subject_alt_names
    };
    let mutual = tls.mode() == TlSmode::Mutual;
    if by_name {
        if mutual {
            common.tls_certificate_sds_secret_configs = vec![credential(&tls.credential_name)];
        }
        if !skip {
            let roots = credential(&format!("{}-cacert", tls.credential_name));
            common.validation_context_type = Some(combined(names(sans), roots));
        }
    } else {
        if mutual {
            if tls.client_certificate.is_empty() || tls.private_key.is_empty() {
                tracing::warn!(
                    "cluster {}: tls mode MUTUAL without clientCertificate and privateKey; it is sent without TLS",
                    draft.cluster.name
                );
                return None;
            }
            common.tls_certificate_sds_secret_configs = vec![agent_secret(&format!(
                "file-cert:{}~{}",
                tls.client_certificate, tls.private_key
            ))];
        }
        common.validation_context_type = Some(if skip {
            ValidationContextType::ValidationContext(CertificateValidationContext::default())
        } else {
            let mut context = names(sans);
            if !tls.ca_crl.is_empty() {
                context.crl = Some(DataSource {
                    specifier: Some(data_source::Specifier::Filename(tls.ca_crl.clone())),
                    ..DataSource::default()
                });
            }
            let roots = if tls.ca_certificates.is_empty() {
                "system"
            } else {
                &tls.ca_certificates
            };
            combined(context, agent_secret(&format!("file-root:{roots}")))
        });
    }
    if let (Some(params), Some(defaults)) = (&mut common.tls_params, &mesh.config().tls_defaults) {
        params.ecdh_curves = defaults.ecdh_curves.clone();
        params.cipher_suites = defaults.cipher_suites.clone();
    }
    if draft.is_http2() {
        common.alpn_protocols = vec!["h2".to_owned()];
    }
    Some(UpstreamTlsContext {
        common_tls_context: Some(common),
        sni: tls.sni.clone(),
        ..UpstreamTlsContext::default()
    })
}

/// The protocols that tell a server's sidecar what is inside. For HTTP the ALPN filter says it request by request; a
/// proxy without that filter offers what the port is declared to be.
fn mesh_alpn(draft: &Draft, proxy: &Proxy, peer: Peer<'_>) -> Vec<String> {
    let list: &[&str] = match (proxy.node.has_istio_filters(), draft.is_http2()) {
        (true, true) => &["istio-peer-exchange", "istio", "h2"],
        (true, false) => &["istio-peer-exchange", "istio"],
        (false, true) => &["istio-h2", "istio", "h2"],
        (false, false) if peer.protocol.is_http() => &["istio-http/1.1", "istio"],
        (false, false) => &["istio"],
    };
    list.iter().map(|p| (*p).to_owned()).collect()
}

/// Without an SNI of its own the cluster takes the request's host, and, unless names are given, checks it.
fn check_name_of_host(draft: &mut Draft, tls: &ClientTlsSettings, skip: bool) {
    if !tls.sni.is_empty() {
        return;
    }
    let options: &mut UpstreamHttpProtocolOptions = draft
        .http()
        .upstream_http_protocol_options
        .get_or_insert_default();
    options.auto_sni = true;
    if tls.subject_alt_names.is_empty() && !skip {
        options.auto_san_validation = true;
    }
}

#[allow(deprecated)] // Untyped names: matched against URIs and DNS names alike, as Istio writes them.
fn names(sans: &[String]) -> CertificateValidationContext {
    CertificateValidationContext {
        match_subject_alt_names: sans.iter().map(|s| exact(s)).collect(),
        ..CertificateValidationContext::default()
    }
}

/// What is checked about a peer, with the roots that SDS gives.
#[allow(deprecated)]
pub(crate) fn combined(
    context: CertificateValidationContext,
    roots: SdsSecretConfig,
) -> ValidationContextType {
    ValidationContextType::CombinedValidationContext(CombinedCertificateValidationContext {
        default_validation_context: Some(context),
        validation_context_sds_secret_config: Some(roots),
        ..CombinedCertificateValidationContext::default()
    })
}

fn raw() -> TransportSocket {
    socket(RAW, any::pack(&RawBuffer::default()))
}

fn socket(name: &str, config: proto::Any) -> TransportSocket {
    TransportSocket {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
    }
}
