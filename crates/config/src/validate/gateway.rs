//! Gateway, and the TLS settings of servers.

use proto::istio::networking::v1alpha3::{
    Gateway, Server, ServerTlsSettings, server_tls_settings::TlSmode,
};

use super::{Report, names};

pub(super) fn check(report: &mut Report, spec: &Gateway) {
    if spec.servers.is_empty() {
        report.error("spec.servers", "a gateway needs at least one server");
    }
    for (i, s) in spec.servers.iter().enumerate() {
        server(report, &format!("spec.servers[{i}]"), s);
        let name = |s: &Server| s.port.as_ref().map(|p| p.name.clone()).unwrap_or_default();
        if !name(s).is_empty() && spec.servers[..i].iter().any(|o| name(o) == name(s)) {
            report.error(
                format!("spec.servers[{i}].port.name"),
                format!("{:?} is given twice: names of ports are unique", name(s)),
            );
        }
    }
}

fn server(report: &mut Report, field: &str, server: &Server) {
    if server.hosts.is_empty() {
        report.error(
            format!("{field}.hosts"),
            "a server needs at least one host; \"*\" is every one",
        );
    }
    for (i, host) in server.hosts.iter().enumerate() {
        report.check(
            format!("{field}.hosts[{i}]"),
            names::namespace_slash_host(host, true),
        );
    }
    let unix = server.bind.strip_prefix("unix://");
    match unix {
        Some(path) => report.check(format!("{field}.bind"), names::unix_path(path)),
        None if !server.bind.is_empty() => {
            report.check(format!("{field}.bind"), names::ip(&server.bind))
        }
        None => {}
    }
    if let Some(tls) = &server.tls {
        self::tls(report, &format!("{field}.tls"), tls);
    }
    let Some(port) = &server.port else {
        report.error(format!("{field}.port"), "is missing");
        return;
    };
    if unix.is_some() && port.number != 0 {
        report.error(
            format!("{field}.port.number"),
            "must be 0 with a unix socket",
        );
    } else if unix.is_none() {
        report.port(format!("{field}.port.number"), port.number);
    }
    if port.target_port > 0 {
        report.error(
            format!("{field}.port.targetPort"),
            "has no effect here; leave it out",
        );
    }
    if port.name.is_empty() {
        report.error(format!("{field}.port.name"), "is missing");
    }
    let Some(protocol) = names::protocol(&port.protocol).filter(|p| *p != names::Protocol::Udp)
    else {
        let message = format!(
            "{:?} is none of HTTP, HTTPS, HTTP2, GRPC, GRPC-WEB, TLS, TCP, MONGO, REDIS, MYSQL",
            port.protocol
        );
        report.error(format!("{field}.port.protocol"), message);
        return;
    };
    let encrypted = protocol == names::Protocol::Tls;
    match &server.tls {
        None if encrypted => report.error(
            format!("{field}.tls"),
            format!("is needed for {}", port.protocol),
        ),
        Some(tls) if !encrypted => {
            // `tls: {httpsRedirect: true}` belongs to plaintext ports.
            let bare = tls.mode() == TlSmode::Passthrough
                && tls.server_certificate.is_empty()
                && tls.private_key.is_empty()
                && tls.ca_certificates.is_empty();
            if protocol != names::Protocol::Http || !bare {
                let message = format!("must be left out for {}: use HTTPS or TLS", port.protocol);
                report.error(format!("{field}.tls"), message);
            }
        }
        _ => {}
    }
}

pub(super) fn tls(report: &mut Report, field: &str, tls: &ServerTlsSettings) {
    let mode = tls.mode();
    let given = [
        ("serverCertificate", !tls.server_certificate.is_empty()),
        ("privateKey", !tls.private_key.is_empty()),
        ("caCertificates", !tls.ca_certificates.is_empty()),
        ("tlsCertificates", !tls.tls_certificates.is_empty()),
        ("credentialName", !tls.credential_name.is_empty()),
        ("credentialNames", !tls.credential_names.is_empty()),
    ];
    if mode == TlSmode::IstioMutual {
        for (name, _) in given.iter().filter(|(_, given)| *given) {
            report.error(
                format!("{field}.{name}"),
                "must be left out: ISTIO_MUTUAL uses the mesh's own certificates",
            );
        }
        return;
    }
    if matches!(mode, TlSmode::Passthrough | TlSmode::AutoPassthrough) {
        for (name, _) in given.iter().filter(|(_, given)| *given) {
            report.warning(
                format!("{field}.{name}"),
                "has no effect: nothing is decrypted in this mode",
            );
        }
    }
    let pair = !tls.server_certificate.is_empty() && !tls.private_key.is_empty();
    let sources = [
        pair,
        !tls.credential_name.is_empty(),
        !tls.credential_names.is_empty(),
        !tls.tls_certificates.is_empty(),
    ];
    if sources.iter().filter(|s| **s).count() > 1 {
        let message = "give one of credentialName, credentialNames, serverCertificate with privateKey, and tlsCertificates";
        report.error(format!("{field}.credentialName"), message);
    }
    let mutual = matches!(mode, TlSmode::Mutual | TlSmode::OptionalMutual);
    let terminates = mutual || mode == TlSmode::Simple;
    let credential = !tls.credential_name.is_empty() || !tls.credential_names.is_empty();
    if terminates && credential {
        return;
    }
    if mutual && tls.ca_certificates.is_empty() {
        report.error(
            format!("{field}.caCertificates"),
            "is needed to check clients; or give credentialName",
        );
    }
    if terminates {
        let pairs: Vec<(String, &str, &str)> = if tls.tls_certificates.is_empty() {
            vec![(
                field.to_owned(),
                tls.server_certificate.as_str(),
                tls.private_key.as_str(),
            )]
        } else {
            let all = tls.tls_certificates.iter().enumerate();
            all.map(|(i, c)| {
                (
                    format!("{field}.tlsCertificates[{i}]"),
                    c.server_certificate.as_str(),
                    c.private_key.as_str(),
                )
            })
            .collect()
        };
        for (field, certificate, key) in pairs {
            if certificate.is_empty() {
                report.error(
                    format!("{field}.serverCertificate"),
                    "is needed; or give credentialName",
                );
            }
            if key.is_empty() {
                report.error(
                    format!("{field}.privateKey"),
                    "is needed; or give credentialName",
                );
            }
        }
    }
    if !tls.ca_crl.is_empty() && mode == TlSmode::Simple {
        report.error(
            format!("{field}.caCrl"),
            "has no effect where clients show no certificates",
        );
    }
}
