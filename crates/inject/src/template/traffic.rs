//! How the pod's traffic is captured: the init container's flags, or the CNI plug-in's annotations.

use serde_json::{Map, Value, json};

use super::{Data, INIT, MODE, STATUS_PORT, VALIDATION, proxy};

const TRAFFIC: &str = "traffic.sidecar.istio.io/";

/// What the CNI plug-in reads: the same settings that the init container would have got as flags.
pub(super) fn cni_annotations(data: &Data<'_>, out: &mut Map<String, Value>) {
    let mut add = |name: &str, value: String| {
        out.insert(name.into(), value.into());
    };
    if data.values("pilot.cni.provider") == "multus" {
        let name = "k8s.v1.cni.cncf.io/networks";
        add(name, networks(data.annotation(name).unwrap_or_default()));
    }
    add(MODE, data.mode());
    let traffic = |name: &str, path: &str| data.annotation_or(&format!("{TRAFFIC}{name}"), path);
    for (name, path) in [
        ("includeOutboundIPRanges", "global.proxy.includeIPRanges"),
        ("excludeOutboundIPRanges", "global.proxy.excludeIPRanges"),
    ] {
        let text = traffic(name, path);
        if !text.is_empty() {
            add(&format!("{TRAFFIC}{name}"), text);
        }
    }
    let include = traffic("includeInboundPorts", "global.proxy.includeInboundPorts");
    add(&format!("{TRAFFIC}includeInboundPorts"), include);
    add(
        &format!("{TRAFFIC}excludeInboundPorts"),
        excluded_inbound(data),
    );
    for (name, path) in [
        ("includeOutboundPorts", "global.proxy.includeOutboundPorts"),
        ("excludeOutboundPorts", "global.proxy.excludeOutboundPorts"),
    ] {
        let name = format!("{TRAFFIC}{name}");
        if data.annotation(&name).is_some() || data.on(path) {
            add(&name, data.annotation_or(&name, path));
        }
    }
    for name in [
        "traffic.sidecar.istio.io/kubevirtInterfaces",
        "istio.io/reroute-virtual-interfaces",
        "traffic.sidecar.istio.io/excludeInterfaces",
    ] {
        if let Some(text) = data.annotation(name).filter(|t| !t.is_empty()) {
            add(name, text.into());
        }
    }
}

/// The networks of a multus pod with Istio's added, in whichever of the two forms the user chose.
fn networks(given: &str) -> String {
    const OURS: &str = "default/istio-cni";
    if given.is_empty() {
        return OURS.into();
    }
    if let Some(end) = given.rfind(']') {
        let Ok(Value::Array(list)) = serde_json::from_str(given) else {
            return given.into();
        };
        if list
            .iter()
            .any(|n| n["name"] == "istio-cni" && n["namespace"] == "default")
        {
            return given.into();
        }
        let (head, tail) = given.split_at(end);
        return format!("{head}, {{\"name\": \"istio-cni\", \"namespace\": \"default\"}}{tail}");
    }
    if given.split(',').any(|n| n.trim() == OURS) {
        return given.into();
    }
    format!("{given}, {OURS}")
}

/// Inbound ports that are not captured: the user's, and the agent's.
fn excluded_inbound(data: &Data<'_>) -> String {
    let user = data.annotation_or(
        &format!("{TRAFFIC}excludeInboundPorts"),
        "global.proxy.excludeInboundPorts",
    );
    let status = data.annotation_or(STATUS_PORT, "global.proxy.statusPort");
    let status = status.trim();
    if status.is_empty() || status == "0" || user.split(',').any(|p| p == status) {
        return user;
    }
    let mut ports: Vec<&str> = user
        .split(',')
        .map(str::trim)
        .filter(|p| !p.is_empty())
        .collect();
    ports.push(status);
    ports.join(",")
}

fn init_args(data: &Data<'_>) -> Vec<String> {
    let traffic = |name: &str, path: &str| data.annotation_or(&format!("{TRAFFIC}{name}"), path);
    let port = |port: i32, default: &str| match port {
        0 => default.to_string(),
        port => port.to_string(),
    };
    let mesh = &data.settings.mesh;
    // TPROXY's proxy runs as root; its traffic is told by its group, and the user stays what it always was.
    let uid = if data.tproxy() {
        1337
    } else {
        data.settings.proxy_uid
    };
    let excluded = match excluded_inbound(data) {
        ports if ports.is_empty() => "15090,15021".into(),
        ports => format!("15090,15021,{ports}"),
    };
    let mut args: Vec<String> = vec!["istio-iptables".into()];
    let mut flag = |name: &str, value: String| args.extend([name.into(), value]);
    flag("-p", port(mesh.proxy_listen_port, "15001"));
    flag("-z", port(mesh.proxy_inbound_listen_port, "15006"));
    flag("-u", uid.to_string());
    flag("-m", data.mode());
    flag(
        "-i",
        traffic("includeOutboundIPRanges", "global.proxy.includeIPRanges"),
    );
    flag(
        "-x",
        traffic("excludeOutboundIPRanges", "global.proxy.excludeIPRanges"),
    );
    flag(
        "-b",
        traffic("includeInboundPorts", "global.proxy.includeInboundPorts"),
    );
    flag("-d", excluded);
    for (short, name, path) in [
        (
            "-q",
            "includeOutboundPorts",
            "global.proxy.includeOutboundPorts",
        ),
        (
            "-o",
            "excludeOutboundPorts",
            "global.proxy.excludeOutboundPorts",
        ),
    ] {
        if data.annotation(&format!("{TRAFFIC}{name}")).is_some() || data.on(path) {
            flag(short, traffic(name, path));
        }
    }
    let virtual_machines = data
        .annotation("istio.io/reroute-virtual-interfaces")
        .or(data.annotation("traffic.sidecar.istio.io/kubevirtInterfaces"));
    if let Some(names) = virtual_machines {
        flag("-k", names.into());
    }
    if let Some(names) = data.annotation("traffic.sidecar.istio.io/excludeInterfaces") {
        flag("-c", names.into());
    }
    let level = data.annotation_or("sidecar.istio.io/agentLogLevel", "global.logging.level");
    args.push(format!("--log_output_level={level}"));
    if data.on("global.logAsJson") {
        args.push("--log_as_json".into());
    }
    if data.on("pilot.cni.enabled") {
        args.extend(["--run-validation".into(), "--skip-rule-apply".into()]);
    } else if data.on("global.proxy_init.forceApplyIptables") {
        args.push("--force-apply".into());
    }
    if data.on("global.nativeNftables") {
        args.push("--native-nftables".into());
    }
    args
}

pub(super) fn init_container(data: &Data<'_>) -> Value {
    let cni = data.on("pilot.cni.enabled");
    let privileged = data.on("global.proxy.privileged");
    let mut security = json!({
        "allowPrivilegeEscalation": privileged,
        "privileged": privileged,
        "capabilities": {"drop": ["ALL"]},
    });
    if cni {
        let own = data.tproxy();
        security["readOnlyRootFilesystem"] = true.into();
        security["runAsGroup"] = if own { 1337 } else { data.settings.proxy_gid }.into();
        security["runAsUser"] = if own { 1337 } else { data.settings.proxy_uid }.into();
        security["runAsNonRoot"] = true.into();
    } else {
        security["capabilities"]["add"] = json!(["NET_ADMIN", "NET_RAW"]);
        security["readOnlyRootFilesystem"] = false.into();
        security["runAsGroup"] = 0.into();
        security["runAsNonRoot"] = false.into();
        security["runAsUser"] = 0.into();
    }
    proxy::add_seccomp(data, &mut security);
    let mut container = json!({
        "name": if cni { VALIDATION } else { INIT },
        "image": data.init_image(),
        "args": init_args(data),
        "resources": data.resources(),
        "securityContext": security,
    });
    if !data.proxy.proxy_metadata.is_empty() {
        container["env"] = data.metadata_env().into();
    }
    proxy::add_pull_policy(data, &mut container);
    container
}
