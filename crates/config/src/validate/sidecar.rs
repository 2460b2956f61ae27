//! Sidecar.

use std::net::{IpAddr, SocketAddr};

use proto::istio::networking::v1alpha3::{
    CaptureMode, IstioEgressListener, IstioIngressListener, OutboundTrafficPolicy, Sidecar,
    outbound_traffic_policy::Mode, server_tls_settings::TlSmode,
};

use super::{
    Report, destination_rule::connection_pool, gateway::tls, names, virtual_service::destination,
};

pub(super) fn check(report: &mut Report, spec: &Sidecar) {
    let empty = spec.egress.is_empty()
        && spec.ingress.is_empty()
        && spec.outbound_traffic_policy.is_none()
        && spec.inbound_connection_pool.is_none();
    if empty {
        report.error(
            "spec",
            "is empty: give egress, ingress, outboundTrafficPolicy or inboundConnectionPool",
        );
    }
    if let Some(selector) = &spec.workload_selector {
        report.alpha_selector(&selector.labels);
    }
    let mut ports = Vec::new();
    for (i, listener) in spec.ingress.iter().enumerate() {
        ingress(report, &format!("spec.ingress[{i}]"), listener, &mut ports);
    }
    connection_pool(
        report,
        "spec.inboundConnectionPool",
        spec.inbound_connection_pool.as_ref(),
    );
    let (mut ports, mut sockets) = (Vec::new(), Vec::new());
    for (i, listener) in spec.egress.iter().enumerate() {
        let field = format!("spec.egress[{i}]");
        if listener.port.is_none() && i + 1 != spec.egress.len() {
            report.error(
                format!("{field}.port"),
                "a listener without a port catches the rest and must be the last one",
            );
        }
        egress(report, &field, listener, &mut ports, &mut sockets);
    }
    if let Some(policy) = &spec.outbound_traffic_policy {
        outbound(report, policy);
    }
}

fn ingress(
    report: &mut Report,
    field: &str,
    listener: &IstioIngressListener,
    ports: &mut Vec<u32>,
) {
    let Some(port) = &listener.port else {
        report.error(format!("{field}.port"), "is missing");
        return;
    };
    if port.target_port > 0 {
        report.error(
            format!("{field}.port.targetPort"),
            "has no effect here; leave it out",
        );
    }
    if port.number == 0 {
        report.error(format!("{field}.port.number"), "is missing");
    } else {
        report.port(format!("{field}.port.number"), port.number);
    }
    if !listener.bind.is_empty() {
        report.check(format!("{field}.bind"), names::ip(&listener.bind));
    }
    if ports.contains(&port.number) {
        report.error(
            format!("{field}.port.number"),
            format!("{} is given twice", port.number),
        );
    }
    ports.push(port.number);
    if !listener.default_endpoint.is_empty() {
        report.check(
            format!("{field}.defaultEndpoint"),
            endpoint(&listener.default_endpoint),
        );
    }
    if let Some(settings) = &listener.tls {
        let field = format!("{field}.tls");
        for (name, given) in [
            ("subjectAltNames", !settings.subject_alt_names.is_empty()),
            ("httpsRedirect", settings.https_redirect),
            ("credentialName", !settings.credential_name.is_empty()),
            ("credentialNames", !settings.credential_names.is_empty()),
            ("tlsCertificates", !settings.tls_certificates.is_empty()),
        ] {
            if given {
                report.error(
                    format!("{field}.{name}"),
                    "is not supported for the ingress of a sidecar",
                );
            }
        }
        if matches!(
            settings.mode(),
            TlSmode::IstioMutual | TlSmode::AutoPassthrough
        ) {
            report.error(
                format!("{field}.mode"),
                "is not supported for the ingress of a sidecar",
            );
        }
        if names::protocol(&port.protocol) != Some(names::Protocol::Tls) {
            report.error(&field, "needs protocol HTTPS or TLS");
        }
        tls(report, &field, settings);
    }
    connection_pool(
        report,
        &format!("{field}.connectionPool"),
        listener.connection_pool.as_ref(),
    );
}

fn endpoint(text: &str) -> Result<(), String> {
    if let Some(path) = text.strip_prefix("unix://") {
        return names::unix_path(path);
    }
    let form = || {
        format!(
            "{text:?} must be 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix:///PATH"
        )
    };
    let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
    let port: u16 = port.parse().map_err(|_| form())?;
    let own = host.is_empty()
        || format!("{host}:{port}")
            .parse::<SocketAddr>()
            .is_ok_and(|a| match a.ip() {
                IpAddr::V4(ip) => ip.is_unspecified() || ip == std::net::Ipv4Addr::LOCALHOST,
                IpAddr::V6(ip) => ip.is_unspecified() || ip.is_loopback(),
            });
    if own && port > 0 { Ok(()) } else { Err(form()) }
}

fn egress<'a>(
    report: &mut Report,
    field: &str,
    listener: &'a IstioEgressListener,
    ports: &mut Vec<u32>,
    sockets: &mut Vec<&'a str>,
) {
    if let Some(port) = &listener.port {
        if port.target_port > 0 {
            report.error(
                format!("{field}.port.targetPort"),
                "has no effect here; leave it out",
            );
        }
        match listener.bind.strip_prefix("unix://") {
            Some(path) => {
                report.check(format!("{field}.bind"), names::unix_path(path));
                if port.number != 0 {
                    report.error(
                        format!("{field}.port.number"),
                        "must be 0 with a unix socket",
                    );
                }
                if !matches!(
                    listener.capture_mode(),
                    CaptureMode::Default | CaptureMode::None
                ) {
                    report.error(
                        format!("{field}.captureMode"),
                        "must be DEFAULT or NONE with a unix socket",
                    );
                }
                if sockets.contains(&listener.bind.as_str()) {
                    report.error(format!("{field}.bind"), "is given twice");
                }
                sockets.push(&listener.bind);
            }
            None => {
                if !listener.bind.is_empty() {
                    report.check(format!("{field}.bind"), names::ip(&listener.bind));
                }
                report.port(format!("{field}.port.number"), port.number);
                if ports.contains(&port.number) {
                    report.error(
                        format!("{field}.port.number"),
                        format!("{} is given twice", port.number),
                    );
                }
                ports.push(port.number);
            }
        }
    }
    if listener.hosts.is_empty() {
        report.error(
            format!("{field}.hosts"),
            "at least one host is needed, as in ./* or istio-system/*",
        );
    }
    for (i, host) in listener.hosts.iter().enumerate() {
        report.check(
            format!("{field}.hosts[{i}]"),
            names::namespace_slash_host(host, false),
        );
    }
}

fn outbound(report: &mut Report, policy: &OutboundTrafficPolicy) {
    let field = "spec.outboundTrafficPolicy";
    let Some(proxy) = &policy.egress_proxy else {
        return;
    };
    if policy.mode() != Mode::AllowAny {
        report.error(
            format!("{field}.egressProxy"),
            "has an effect only with mode ALLOW_ANY",
        );
        return;
    }
    if proxy.port.is_none() {
        report.error(format!("{field}.egressProxy.port"), "is missing");
    }
    destination(report, &format!("{field}.egressProxy"), proxy);
}
