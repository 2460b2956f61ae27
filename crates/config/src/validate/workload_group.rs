//! WorkloadGroup.

use proto::istio::networking::v1alpha3::{
    ReadinessProbe, WorkloadGroup, readiness_probe::HealthCheckMethod,
};

use super::{Report, names};

/// The template is not a whole WorkloadEntry: its address is filled in when a workload registers.
pub(super) fn check(report: &mut Report, spec: &WorkloadGroup) {
    if spec.template.is_none() {
        return report.error("spec.template", "is missing");
    }
    if let Some(metadata) = &spec.metadata {
        report.check("spec.metadata.labels", names::label_map(&metadata.labels));
    }
    if let Some(probe) = &spec.probe {
        check_probe(report, probe);
    }
}

fn check_probe(report: &mut Report, probe: &ReadinessProbe) {
    for (field, value) in [
        ("periodSeconds", probe.period_seconds),
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        if value < 0 {
            report.error(format!("spec.probe.{field}"), "must not be negative");
        }
    }
    match &probe.health_check_method {
        Some(HealthCheckMethod::HttpGet(get)) => {
            report.port("spec.probe.httpGet.port", get.port);
            if !matches!(&*get.scheme, "" | "HTTP" | "HTTPS") {
                report.error("spec.probe.httpGet.scheme", "must be HTTP or HTTPS");
            }
            for (i, header) in get.http_headers.iter().enumerate() {
                let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
                if header.name.is_empty() || !header.name.bytes().all(valid) {
                    report.error(
                        format!("spec.probe.httpGet.httpHeaders[{i}].name"),
                        format!("{:?} is no name of a header", header.name),
                    );
                }
            }
        }
        Some(HealthCheckMethod::TcpSocket(socket)) => {
            report.port("spec.probe.tcpSocket.port", socket.port);
        }
        Some(HealthCheckMethod::Exec(exec)) => {
            if exec.command.is_empty() {
                report.error("spec.probe.exec.command", "is missing");
            }
        }
        Some(HealthCheckMethod::Grpc(_)) => {
            report.error(
                "spec.probe.grpc",
                "is not taken here, nor by Istio: give httpGet, tcpSocket or exec",
            );
        }
        None => report.error(
            "spec.probe",
            "says not how to probe: give httpGet, tcpSocket or exec",
        ),
    }
}
