//! WasmPlugin.

use proto::istio::extensions::v1alpha1::{EnvValueSource, WasmPlugin};

use super::Report;

pub(super) fn check(report: &mut Report, spec: &WasmPlugin) {
    report.targets(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
    );
    match spec.url.split_once("://") {
        _ if spec.url.is_empty() => report.error("spec.url", "is missing"),
        Some((scheme, _)) if !matches!(scheme, "file" | "http" | "https" | "oci") => {
            report.error(
                "spec.url",
                format!("{scheme:?} is none of file, http, https and oci"),
            );
        }
        _ => {}
    }
    let hex = spec.sha256.len() == 64
        && spec
            .sha256
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !spec.sha256.is_empty() && !hex {
        report.error("spec.sha256", "must be 64 lower-case hexadecimal digits");
    }
    if spec.image_pull_secret.len() > 253 {
        report.error("spec.imagePullSecret", "must be at most 253 characters");
    }
    if spec.plugin_name.len() > 256 {
        report.error("spec.pluginName", "must be at most 256 characters");
    }
    let env = spec
        .vm_config
        .as_ref()
        .map(|c| c.env.as_slice())
        .unwrap_or_default();
    for (i, e) in env.iter().enumerate() {
        let field = format!("spec.vmConfig.env[{i}]");
        if e.name.is_empty() || e.name.len() > 256 {
            report.error(format!("{field}.name"), "must be 1 to 256 characters");
        }
        if env[..i].iter().any(|o| o.name == e.name) {
            report.error(
                format!("{field}.name"),
                format!("{:?} is given twice", e.name),
            );
        }
        if e.value_from() != EnvValueSource::Inline && !e.value.is_empty() {
            report.error(
                format!("{field}.value"),
                "must be left out unless valueFrom is INLINE",
            );
        }
    }
    for (i, m) in spec.r#match.iter().enumerate() {
        for (j, port) in m.ports.iter().enumerate() {
            report.port(format!("spec.match[{i}].ports[{j}].number"), port.number);
        }
    }
}
