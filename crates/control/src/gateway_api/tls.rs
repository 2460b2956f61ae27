//! The TLS of a listener: its certificates, and what clients have to show. References are followed here, and only those
//! that a grant allows.

use config::{
    Kind,
    gateway_api::{
        ClientValidation, Gateway as KubernetesGateway, ListenerTls, ObjectReference, TlsMode,
        ValidationMode,
    },
};
use proto::istio::networking::v1alpha3::{ServerTlsSettings, server_tls_settings::TlSmode};

use super::{Fault, Inputs, grant::Grants};
use crate::secret;

/// Of a listener's `tls.options`: which certificates clients show.
const TERMINATE_MODE: &str = "gateway.istio.io/tls-terminate-mode";
/// Of a listener's `tls.options`: ciphers of TLS 1.2.
const CIPHER_SUITES: &str = "gateway.istio.io/tls-cipher-suites";

/// What clients of a port have to show.
pub(super) fn frontend(spec: &KubernetesGateway, port: u32) -> Option<&ClientValidation> {
    let frontend = spec.tls.as_ref()?.frontend.as_ref()?;
    let own = frontend.per_port.iter().find(|p| p.port == port);
    Some(own.map_or(&frontend.default, |p| &p.tls))
}

/// Whether clients without a valid certificate are let in somewhere.
pub(super) fn insecure(spec: &KubernetesGateway) -> bool {
    let Some(frontend) = spec.tls.as_ref().and_then(|t| t.frontend.as_ref()) else {
        return false;
    };
    std::iter::once(&frontend.default)
        .chain(frontend.per_port.iter().map(|p| &p.tls))
        .filter_map(|v| v.validation.as_ref())
        .any(|v| v.mode == ValidationMode::AllowInsecureFallback)
}

/// A listener's TLS, as far as it can be had, and what is wrong with the rest.
pub(super) fn settings(
    inputs: &Inputs<'_>,
    grants: &Grants,
    of: (Kind, &str),
    tls: &ListenerTls,
    frontend: Option<&ClientValidation>,
    auto_passthrough: bool,
) -> (ServerTlsSettings, Option<Fault>) {
    let mut out = ServerTlsSettings::default();
    let option = |name: &str| tls.options.get(name).map(String::as_str);
    if tls.mode == TlsMode::Passthrough {
        out.set_mode(if auto_passthrough {
            TlSmode::AutoPassthrough
        } else {
            TlSmode::Passthrough
        });
    } else {
        out.set_mode(TlSmode::Simple);
        match option(TERMINATE_MODE) {
            Some("MUTUAL") => out.set_mode(TlSmode::Mutual),
            Some("OPTIONAL_MUTUAL") => out.set_mode(TlSmode::OptionalMutual),
            Some("ISTIO_SIMPLE") => {
                out.credential_name = "builtin://".to_owned();
                return (out, None);
            }
            Some("ISTIO_MUTUAL") => {
                out.set_mode(TlSmode::IstioMutual);
                return (out, None);
            }
            _ => {}
        }
        if let Err(fault) = certificates(inputs, grants, of, tls, &mut out) {
            return (out, fault);
        }
        if let Err(fault) = clients(
            inputs,
            grants,
            of,
            frontend,
            option(TERMINATE_MODE),
            &mut out,
        ) {
            return (out, Some(fault));
        }
    }
    if let Some(ciphers) = option(CIPHER_SUITES) {
        // Which of them are known is decided where TLS is translated.
        out.cipher_suites = ciphers
            .split(',')
            .map(|c| c.trim().to_owned())
            .filter(|c| !c.is_empty())
            .collect();
    }
    (out, None)
}

fn certificates(
    inputs: &Inputs<'_>,
    grants: &Grants,
    of: (Kind, &str),
    tls: &ListenerTls,
    out: &mut ServerTlsSettings,
) -> Result<(), Option<Fault>> {
    if tls.certificate_refs.len() > 2 {
        return Err(Some(Fault::new(
            "InvalidCertificateRef",
            "TLS mode can only support up to 2 server certificates",
        )));
    }
    let mut names = vec![String::new(); tls.certificate_refs.len()];
    let mut faults = None;
    for (i, reference) in tls.certificate_refs.iter().enumerate() {
        match certificate(inputs, grants, of, reference) {
            Ok(name) => names[i] = name,
            Err(fault) => faults = Fault::join(faults, Some(fault)),
        }
    }
    let valid: Vec<&String> = names.iter().filter(|n| !n.is_empty()).collect();
    match valid.as_slice() {
        [] => return Err(faults),
        [_] => out.credential_name.clone_from(&names[0]),
        _ => out.credential_names = names.clone(),
    }
    if let [only] = valid.as_slice() {
        out.credential_name = (*only).clone();
    }
    Ok(())
}

fn certificate(
    inputs: &Inputs<'_>,
    grants: &Grants,
    of: (Kind, &str),
    reference: &ObjectReference,
) -> Result<String, Fault> {
    let shown = shown(reference);
    if !reference.group.is_empty() || reference.kind != "Secret" {
        return Err(Fault::new(
            "InvalidCertificateRef",
            format!("invalid certificate reference {shown}, only secret is allowed"),
        ));
    }
    let namespace = reference.namespace.as_deref().unwrap_or(of.1);
    let name = &reference.name;
    // Asked before anybody looks: the answer must not tell whether a foreign Secret exists.
    if !grants.allow(of, ("", "Secret", namespace, name)) {
        return Err(Fault::new(
            "RefNotPermitted",
            format!(
                "certificateRef {name}/{namespace} not accessible to a Gateway in namespace {:?} (missing a ReferenceGrant?)",
                of.1
            ),
        ));
    }
    let invalid = |why: String| {
        Fault::new(
            "InvalidCertificateRef",
            format!("invalid certificate reference {shown}, {why}"),
        )
    };
    let secret = inputs
        .snapshot
        .secrets
        .get(namespace, name)
        .ok_or_else(|| invalid(format!("secret {namespace}/{name} not found")))?;
    secret::check_certificate(&secret.spec).map_err(invalid)?;
    Ok(format!("kubernetes-gateway://{namespace}/{name}"))
}

fn clients(
    inputs: &Inputs<'_>,
    grants: &Grants,
    of: (Kind, &str),
    frontend: Option<&ClientValidation>,
    option: Option<&str>,
    out: &mut ServerTlsSettings,
) -> Result<(), Fault> {
    let Some(validation) = frontend.and_then(|f| f.validation.as_ref()) else {
        return Ok(());
    };
    let reference = match validation.ca_certificate_refs.as_slice() {
        [] => return Ok(()),
        [only] => only,
        _ => {
            return Err(Fault::new(
                "InvalidCACertificateRef",
                "only one caCertificateRef is supported",
            ));
        }
    };
    let namespace = reference.namespace.as_deref().unwrap_or(of.1);
    let name = &reference.name;
    if !grants.allow(of, (&reference.group, &reference.kind, namespace, name)) {
        return Err(Fault::new(
            "RefNotPermitted",
            format!(
                "caCertificateRef {namespace}/{name} not accessible to a Gateway in namespace {:?} (missing a ReferenceGrant?)",
                of.1
            ),
        ));
    }
    let shown = shown(reference);
    let invalid = |why: String| {
        Fault::new(
            "InvalidCACertificateRef",
            format!("invalid CA certificate reference {shown}, {why}"),
        )
    };
    let scheme = match (reference.group.as_str(), reference.kind.as_str()) {
        ("", "ConfigMap") => {
            let map = inputs.snapshot.config_maps.get(namespace, name);
            let map =
                map.ok_or_else(|| invalid(format!("configmap {namespace}/{name} not found")))?;
            secret::check_config_map(&map.spec).map_err(invalid)?;
            "configmap"
        }
        ("", "Secret") => {
            let object = inputs.snapshot.secrets.get(namespace, name);
            let object =
                object.ok_or_else(|| invalid(format!("secret {namespace}/{name} not found")))?;
            secret::check_roots(&object.spec).map_err(invalid)?;
            "kubernetes-gateway"
        }
        _ => {
            return Err(Fault::new(
                "InvalidCACertificateKind",
                format!(
                    "invalid CA certificate reference {shown}, only secret and configmap are allowed"
                ),
            ));
        }
    };
    out.ca_cert_credential_name = format!("{scheme}://{namespace}/{name}-cacert");
    let fallback = validation.mode == ValidationMode::AllowInsecureFallback;
    match option {
        Some("MUTUAL" | "OPTIONAL_MUTUAL") => out.insecure_skip_verify = Some(false),
        _ => {
            out.set_mode(if fallback {
                TlSmode::OptionalMutual
            } else {
                TlSmode::Mutual
            });
            out.insecure_skip_verify = Some(fallback);
        }
    }
    Ok(())
}

/// `GROUP/KIND/NAME.NAMESPACE`, as istiod writes references.
fn shown(reference: &ObjectReference) -> String {
    format!(
        "{}/{}/{}.{}",
        reference.group,
        reference.kind,
        reference.name,
        reference.namespace.as_deref().unwrap_or_default()
    )
}
