//! WasmPlugin and TrafficExtension.

use proto::istio::{
    extensions::v1alpha1::{
        EnvValueSource, TrafficExtension, VmConfig, WasmPlugin, traffic_extension::FilterConfig,
    },
    r#type::v1beta1::PortSelector,
};

use super::Report;

pub(super) fn plugin(report: &mut Report, spec: &WasmPlugin) {
    report.targets(
        spec.selector.as_ref(),
        spec.target_ref.as_ref(),
        &spec.target_refs,
    );
    module(
        report,
        "spec",
        &Module {
            url: &spec.url,
            sha256: &spec.sha256,
            pull_secret: &spec.image_pull_secret,
            name: &spec.plugin_name,
            vm: spec.vm_config.as_ref(),
        },
    );
    ports(report, spec.r#match.iter().map(|m| &*m.ports));
}

pub(super) fn extension(report: &mut Report, spec: &TrafficExtension) {
    report.targets(spec.selector.as_ref(), None, &spec.target_refs);
    match &spec.filter_config {
        None => report.error("spec", "does nothing: give wasm or lua"),
        Some(FilterConfig::Lua(lua)) => {
            if !(1..=LONGEST_SCRIPT).contains(&lua.inline_code.len()) {
                report.error(
                    "spec.lua.inlineCode",
                    format!("must be 1 to {LONGEST_SCRIPT} bytes"),
                );
            }
        }
        Some(FilterConfig::Wasm(wasm)) => module(
            report,
            "spec.wasm",
            &Module {
                url: &wasm.url,
                sha256: &wasm.sha256,
                pull_secret: &wasm.image_pull_secret,
                name: &wasm.plugin_name,
                vm: wasm.vm_config.as_ref(),
            },
        ),
    }
    ports(report, spec.r#match.iter().map(|m| &*m.ports));
}

const LONGEST_SCRIPT: usize = 65_536;

/// What both kinds say of a module.
struct Module<'a> {
    url: &'a str,
    sha256: &'a str,
    pull_secret: &'a str,
    name: &'a str,
    vm: Option<&'a VmConfig>,
}

fn module(report: &mut Report, field: &str, module: &Module<'_>) {
    let url = format!("{field}.url");
    match module.url.split_once("://") {
        _ if module.url.is_empty() => report.error(url, "is missing"),
        Some((scheme, _)) if !matches!(scheme, "file" | "http" | "https" | "oci") => {
            let message = format!("{scheme:?} is none of file, http, https and oci");
            report.error(url, message);
        }
        _ => {}
    }
    let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    let hex = module.sha256.len() == 64 && module.sha256.bytes().all(digit);
    if !module.sha256.is_empty() && !hex {
        report.error(
            format!("{field}.sha256"),
            "must be 64 lower-case hexadecimal digits",
        );
    }
    if module.pull_secret.len() > 253 {
        report.error(
            format!("{field}.imagePullSecret"),
            "must be at most 253 characters",
        );
    }
    if module.name.len() > 256 {
        report.error(
            format!("{field}.pluginName"),
            "must be at most 256 characters",
        );
    }
    let env = module.vm.map(|vm| vm.env.as_slice()).unwrap_or_default();
    for (i, e) in env.iter().enumerate() {
        let field = format!("{field}.vmConfig.env[{i}]");
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
}

fn ports<'a>(report: &mut Report, matches: impl Iterator<Item = &'a [PortSelector]>) {
    for (i, ports) in matches.enumerate() {
        for (j, port) in ports.iter().enumerate() {
            report.port(format!("spec.match[{i}].ports[{j}].number"), port.number);
        }
    }
}
