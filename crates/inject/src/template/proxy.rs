//! The templates with a proxy: the sidecar, and the gateway (a pod that is nothing but a proxy).

use proto::istio::mesh::v1alpha1::mesh_config::extension_provider::Provider;
use serde_json::{Map, Value, json};

use super::{Data, INIT, MODE, PROXY, STATUS_PORT, VALIDATION, env, env_field, env_limit, mount};
use crate::Error;

const TRAFFIC: &str = "traffic.sidecar.istio.io/";

/// A pod's proxy beside its containers (or, native, before them), and the init container that captures its traffic.
pub(super) fn sidecar(data: &Data<'_>) -> Result<Value, Error> {
    let mut labels = data.canonical_labels(true);
    let label = |name: &str, default: &str| match data.label(name) {
        Some(text) if !text.is_empty() => text.to_string(),
        _ => default.into(),
    };
    let tls = "security.istio.io/tlsMode";
    labels.insert(tls.into(), label(tls, "istio").into());
    if data
        .proxy
        .proxy_metadata
        .get("ISTIO_META_ENABLE_HBONE")
        .is_some_and(|v| v == "true")
    {
        let tunnel = "networking.istio.io/tunnel";
        labels.insert(tunnel.into(), label(tunnel, "http").into());
    }
    let mut annotations = data.common_annotations();
    if data.on("pilot.cni.enabled") {
        cni_annotations(data, &mut annotations);
    }
    let native = data.native();
    let mut init = Vec::new();
    let mut containers = Vec::new();
    if data.mode() != "NONE" {
        init.push(init_container(data));
    }
    let proxy = sidecar_container(data, native)?;
    if native {
        init.push(proxy)
    } else {
        containers.push(proxy)
    }
    let mut spec = json!({"volumes": sidecar_volumes(data)?});
    if !init.is_empty() {
        spec["initContainers"] = init.into();
    }
    if !containers.is_empty() {
        spec["containers"] = containers.into();
    }
    add_pull_secrets(data, &mut spec);
    Ok(json!({"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}))
}

/// The gateway's proxy: the only container, listening at ports of its own.
pub(super) fn gateway(data: &Data<'_>) -> Value {
    let security = match data.settings.values.at("gateways.securityContext") {
        Some(Value::Object(given)) if !given.is_empty() => Value::Object(given.clone()),
        _ => json!({"sysctls": [{"name": "net.ipv4.ip_unprivileged_port_start", "value": "0"}]}),
    };
    let mut container = json!({
        "name": PROXY,
        "image": data.proxy_image(),
        "ports": [{"containerPort": 15090, "protocol": "TCP", "name": "http-envoy-prom"}],
        "args": data.proxy_args("router"),
        "securityContext": {
            "runAsUser": data.settings.proxy_uid,
            "runAsGroup": data.settings.proxy_gid,
        },
        "env": gateway_env(data),
        "readinessProbe": probe(15021, [
            number(data, "global.proxy.readinessInitialDelaySeconds"),
            number(data, "global.proxy.readinessPeriodSeconds"),
            number(data, "global.proxy.readinessFailureThreshold"),
        ]),
        "volumeMounts": mounts(data, false),
    });
    if data.on("global.proxy.lifecycle") {
        container["lifecycle"] = data
            .settings
            .values
            .at("global.proxy.lifecycle")
            .cloned()
            .into();
    }
    add_pull_policy(data, &mut container);
    let mut volumes = vec![
        json!({"name": "workload-socket"}),
        json!({"name": "credential-socket", "emptyDir": {}}),
        certificates(data, true),
    ];
    volumes.extend(common_volumes(data, "istio-envoy"));
    volumes.extend(mounted_certificates(data));
    let mut spec = json!({
        "securityContext": security,
        "containers": [container],
        "volumes": volumes,
    });
    add_pull_secrets(data, &mut spec);
    json!({
        "metadata": {
            "labels": data.canonical_labels(false),
            "annotations": data.common_annotations(),
        },
        "spec": spec,
    })
}

fn number(data: &Data<'_>, path: &str) -> i64 {
    data.values(path).parse().unwrap_or(0)
}

/// What the CNI plug-in reads: the same settings that the init container would have got as flags.
fn cni_annotations(data: &Data<'_>, out: &mut Map<String, Value>) {
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

fn init_container(data: &Data<'_>) -> Value {
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
    add_seccomp(data, &mut security);
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
    add_pull_policy(data, &mut container);
    container
}

fn sidecar_container(data: &Data<'_>, native: bool) -> Result<Value, Error> {
    let mut args = data.proxy_args("sidecar");
    if data.on("global.proxy.outlierLogPath") {
        args.push(format!(
            "--outlierLogPath={}",
            data.values("global.proxy.outlierLogPath")
        ));
    }
    let mut container = json!({
        "name": PROXY,
        "image": data.proxy_image(),
        "ports": [{"containerPort": 15090, "protocol": "TCP", "name": "http-envoy-prom"}],
        "args": args,
        "env": sidecar_env(data)?,
        "securityContext": sidecar_security(data),
        "resources": data.resources(),
        "volumeMounts": sidecar_mounts(data)?,
    });
    if native {
        container["restartPolicy"] = "Always".into();
    }
    let hold = data
        .proxy
        .hold_application_until_proxy_starts
        .unwrap_or(false)
        || data.on("global.proxy.holdApplicationUntilProxyStarts");
    if data.on("global.proxy.lifecycle") {
        container["lifecycle"] = data
            .settings
            .values
            .at("global.proxy.lifecycle")
            .cloned()
            .into();
    } else if hold && !native {
        container["lifecycle"] =
            json!({"postStart": {"exec": {"command": ["pilot-agent", "wait"]}}});
    } else if native {
        let port = data.annotation_or(STATUS_PORT, "global.proxy.statusPort");
        let drain = [
            "pilot-agent",
            "request",
            &format!("--debug-port={port}"),
            "POST",
            "drain",
        ];
        container["lifecycle"] = json!({"preStop": {"exec": {"command": drain}}});
    }
    add_pull_policy(data, &mut container);
    if !data.status_port_off() {
        if data.on("global.proxy.startupProbe.enabled") {
            let failures = number(data, "global.proxy.startupProbe.failureThreshold");
            container["startupProbe"] = probe(15021, [0, 1, failures]);
        }
        container["readinessProbe"] = probe(15021, readiness(data)?);
    }
    Ok(container)
}

/// Delay, period and failures of the readiness probe.
pub(super) fn readiness(data: &Data<'_>) -> Result<[i64; 3], Error> {
    let number = |name: &str, path: &str| {
        let path = format!("global.proxy.readiness{path}");
        data.number(&format!("readiness.status.sidecar.istio.io/{name}"), &path)
    };
    Ok([
        number("initialDelaySeconds", "InitialDelaySeconds")?,
        number("periodSeconds", "PeriodSeconds")?,
        number("failureThreshold", "FailureThreshold")?,
    ])
}

pub(super) fn probe(port: u16, [delay, period, failures]: [i64; 3]) -> Value {
    json!({
        "httpGet": {"path": "/healthz/ready", "port": port},
        "initialDelaySeconds": delay,
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    })
}

fn sidecar_security(data: &Data<'_>) -> Value {
    let privileged = data.on("global.proxy.privileged");
    let tracing = data.proxy.proxy_metadata.get("IPTABLES_TRACE_LOGGING");
    let bind = data.annotation_or(
        "sidecar.istio.io/capNetBindService",
        "global.proxy.capNetBindService",
    ) == "true";
    let mut added = Vec::new();
    if data.tproxy() {
        added.push("NET_ADMIN");
    }
    if bind {
        added.push("NET_BIND_SERVICE");
    }
    let mut security = json!({
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": true,
    });
    let root = if tracing.is_some_and(|v| v == "true") {
        added = vec!["NET_ADMIN"];
        security["allowPrivilegeEscalation"] = true.into();
        security["privileged"] = true.into();
        security["runAsGroup"] = data.settings.proxy_gid.into();
        true
    } else {
        security["allowPrivilegeEscalation"] = privileged.into();
        security["privileged"] = privileged.into();
        let root = !added.is_empty();
        security["runAsGroup"] = if root { 1337 } else { data.settings.proxy_gid }.into();
        root
    };
    if !added.is_empty() {
        security["capabilities"]["add"] = json!(added);
    }
    security["runAsNonRoot"] = (!root).into();
    security["runAsUser"] = if root { 0 } else { data.settings.proxy_uid }.into();
    add_seccomp(data, &mut security);
    security
}

/// What every proxy's environment begins with.
pub(super) fn first_env(data: &Data<'_>) -> Vec<Value> {
    let ca = match data.values("global.caAddress") {
        address if !address.is_empty() => address,
        _ => {
            let revision = match data.values("revision") {
                revision if revision.is_empty() => revision,
                revision => format!("-{revision}"),
            };
            format!(
                "istiod{revision}.{}.svc:15012",
                data.values("global.istioNamespace")
            )
        }
    };
    let mut out = Vec::new();
    out.push(env(
        "PILOT_CERT_PROVIDER",
        &data.values("global.pilotCertProvider"),
    ));
    out.push(env("CA_ADDR", &ca));
    for (name, path) in [
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("INSTANCE_IP", "status.podIP"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("HOST_IP", "status.hostIP"),
    ] {
        out.push(env_field(name, path));
    }
    out
}

pub(super) fn config_env(data: &Data<'_>) -> [Value; 2] {
    [
        env("PROXY_CONFIG", &format!("{}\n", data.proxy_config())),
        env("ISTIO_META_POD_PORTS", &data.pod_ports()),
    ]
}

pub(super) fn apps_env(data: &Data<'_>) -> Value {
    env("ISTIO_META_APP_CONTAINERS", &data.apps().join(","))
}

pub(super) fn node_env(data: &Data<'_>) -> [Value; 2] {
    let cluster = match data.values("global.multiCluster.clusterName") {
        name if name.is_empty() => "Kubernetes".into(),
        name => name,
    };
    [
        env("ISTIO_META_CLUSTER_ID", &cluster),
        env_field("ISTIO_META_NODE_NAME", "spec.nodeName"),
    ]
}

fn compliance_env(data: &Data<'_>, out: &mut Vec<Value>) {
    let policy = &data.settings.compliance_policy;
    if !policy.is_empty() {
        out.push(env("COMPLIANCE_POLICY", policy));
        if policy == "fips-140-3" {
            out.push(env("GODEBUG", "fips140=only"));
        }
    }
}

pub(super) fn network_env(data: &Data<'_>) -> Option<Value> {
    let network = data.values("global.network");
    (!network.is_empty()).then(|| env("ISTIO_META_NETWORK", &network))
}

/// The workload's name and owner.
pub(super) fn workload_env(data: &Data<'_>, name: &str, out: &mut Vec<Value>) {
    let owner = data.owner;
    if !name.is_empty() {
        out.push(env("ISTIO_META_WORKLOAD_NAME", name));
    }
    if !owner.api_version.is_empty() && !owner.name.is_empty() {
        let namespace = if owner.namespace.is_empty() {
            "default"
        } else {
            &owner.namespace
        };
        let (version, kind) = (&owner.api_version, owner.kind.to_lowercase());
        out.push(env(
            "ISTIO_META_OWNER",
            &format!(
                "kubernetes://apis/{version}/namespaces/{namespace}/{kind}s/{}",
                owner.name
            ),
        ));
    }
}

pub(super) fn mesh_env(data: &Data<'_>, out: &mut Vec<Value>) {
    let domain = data.trust_domain();
    let mesh = match data.values("global.meshID") {
        id if id.is_empty() => domain.clone(),
        id => id,
    };
    if !mesh.is_empty() {
        out.push(env("ISTIO_META_MESH_ID", &mesh));
    }
    if !domain.is_empty() {
        out.push(env("TRUST_DOMAIN", &domain));
    }
}

fn bootstrap_env(data: &Data<'_>) -> Option<Value> {
    data.annotation(BOOTSTRAP)?;
    let path = "/etc/istio/custom-bootstrap/custom_bootstrap.json";
    Some(env("ISTIO_BOOTSTRAP_OVERRIDE", path))
}

const BOOTSTRAP: &str = "sidecar.istio.io/bootstrapOverride";

fn sidecar_env(data: &Data<'_>) -> Result<Vec<Value>, Error> {
    let mut out = Vec::new();
    if data.localhost_inbound() {
        out.push(env("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION", "true"));
    }
    out.extend(first_env(data));
    out.push(env_limit("ISTIO_CPU_LIMIT", "limits.cpu"));
    out.extend(config_env(data));
    out.push(apps_env(data));
    out.push(env_limit("GOMEMLIMIT", "limits.memory"));
    compliance_env(data, &mut out);
    out.extend(node_env(data));
    let mode = match data.annotation(MODE) {
        Some(mode) if !mode.is_empty() => mode,
        _ => data.mesh_mode(),
    };
    out.push(env("ISTIO_META_INTERCEPTION_MODE", mode));
    out.extend(network_env(data));
    let name = match data.label("service.istio.io/workload-name") {
        Some(name) if !name.is_empty() => name,
        _ => &data.owner.name,
    };
    workload_env(data, name, &mut out);
    out.extend(bootstrap_env(data));
    mesh_env(data, &mut out);
    if data.values("global.proxy.tracer") == "datadog" {
        for (name, value) in data.json_objects("apm.datadoghq.com/env")? {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), String::from);
            out.push(env(&name, &text));
        }
    }
    if let Some(attributes) = open_telemetry(data) {
        out.push(env("OTEL_RESOURCE_ATTRIBUTES", &attributes));
    }
    out.extend(data.metadata_env());
    Ok(out)
}

fn gateway_env(data: &Data<'_>) -> Vec<Value> {
    let mut out = first_env(data);
    out.push(env_limit("ISTIO_CPU_LIMIT", "limits.cpu"));
    out.extend(config_env(data));
    out.push(env_limit("GOMEMLIMIT", "limits.memory"));
    compliance_env(data, &mut out);
    out.push(apps_env(data));
    out.extend(node_env(data));
    out.push(env("ISTIO_META_INTERCEPTION_MODE", data.mesh_mode()));
    out.extend(network_env(data));
    workload_env(data, &data.owner.name, &mut out);
    out.extend(bootstrap_env(data));
    mesh_env(data, &mut out);
    out.extend(data.metadata_env());
    out
}

/// The attributes of OpenTelemetry's semantic conventions, if a provider of the mesh asks for them.
fn open_telemetry(data: &Data<'_>) -> Option<String> {
    use proto::istio::mesh::v1alpha1::mesh_config::extension_provider::ServiceAttributeEnrichment;
    let wanted = ServiceAttributeEnrichment::OtelSemanticConventions as i32;
    let asked = data
        .settings
        .mesh
        .extension_providers
        .iter()
        .any(|p| match &p.provider {
            Some(Provider::Opentelemetry(o)) => o.service_attribute_enrichment == wanted,
            _ => false,
        });
    if !asked {
        return None;
    }
    let given = |name: &str| {
        let annotation = data.annotation(&format!("resource.opentelemetry.io/{name}"));
        annotation.filter(|t| !t.is_empty()).map(String::from)
    };
    let namespace = &data.owner.namespace;
    let mut out = Vec::new();
    let service = given("service.namespace").or((!namespace.is_empty()).then(|| namespace.clone()));
    out.extend(service.map(|n| format!("service.namespace={n}")));
    let containers: Vec<&Value> = data.containers().collect();
    let version = given("service.version")
        .or(data
            .label("app.kubernetes.io/version")
            .filter(|t| !t.is_empty())
            .map(String::from))
        .or_else(|| match containers[..] {
            [only] => image_version(only["image"].as_str().unwrap_or_default()),
            _ => None,
        });
    out.extend(version.map(|v| format!("service.version={v}")));
    let instance = given("service.instance.id").or_else(|| {
        let name = containers.first()?["name"].as_str()?;
        Some(format!("{namespace}.$(POD_NAME).{name}"))
    });
    out.extend(instance.map(|i| format!("service.instance.id={i}")));
    (!out.is_empty()).then(|| out.join(","))
}

/// The tag and the digest of an image, joined by `@`.
fn image_version(image: &str) -> Option<String> {
    let (image, digest) = match image.split_once('@') {
        Some((image, digest)) => (image, digest),
        None => (image, ""),
    };
    let name = image.rsplit('/').next().unwrap_or(image);
    let tag = name.rsplit_once(':').map_or("", |(_, tag)| tag);
    match (tag, digest) {
        ("", "") => None,
        (tag, "") => Some(tag.into()),
        ("", digest) => Some(digest.into()),
        (tag, digest) => Some(format!("{tag}@{digest}")),
    }
}

fn gke(data: &Data<'_>) -> bool {
    data.values("global.caName") == "GkeWorkloadCertificate"
}

pub(super) fn certificates_mount(data: &Data<'_>) -> Value {
    let path = "/var/run/secrets/workload-spiffe-credentials";
    if gke(data) {
        json!({"name": "gke-workload-certificate", "mountPath": path, "readOnly": true})
    } else {
        mount("workload-certs", path)
    }
}

/// The mounts that sidecars and gateways share; only sidecars read revocation lists.
fn mounts(data: &Data<'_>, revocation: bool) -> Vec<Value> {
    let mut out = vec![
        mount("workload-socket", "/var/run/secrets/workload-spiffe-uds"),
        mount("credential-socket", "/var/run/secrets/credential-uds"),
        certificates_mount(data),
    ];
    if data.values("global.pilotCertProvider") == "istiod" {
        out.push(mount("istiod-ca-cert", "/var/run/secrets/istio"));
        if revocation {
            out.push(mount("istio-ca-crl", "/var/run/secrets/istio/crl"));
        }
    }
    out.push(mount("istio-data", "/var/lib/istio/data"));
    if data.annotation(BOOTSTRAP).is_some() {
        out.push(mount(
            "custom-bootstrap-volume",
            "/etc/istio/custom-bootstrap",
        ));
    }
    out.push(mount("istio-envoy", "/etc/istio/proxy"));
    out.push(mount("istio-token", "/var/run/secrets/tokens"));
    if data.on("global.mountMtlsCerts") {
        out.push(json!({"name": "istio-certs", "mountPath": "/etc/certs/", "readOnly": true}));
    }
    out.push(mount("istio-podinfo", "/etc/istio/pod"));
    out
}

fn sidecar_mounts(data: &Data<'_>) -> Result<Vec<Value>, Error> {
    let mut out = mounts(data, true);
    if let Some(path) = lightstep(data) {
        let folder = match path.rfind('/') {
            Some(end) => &path[..=end],
            None => "",
        };
        out.push(json!({"name": "lightstep-certs", "mountPath": folder, "readOnly": true}));
    }
    out.extend(user_mounts(data)?);
    Ok(out)
}

/// The CA file of a Lightstep tracer.
fn lightstep(data: &Data<'_>) -> Option<String> {
    if data.values("global.proxy.tracer") != "lightstep" {
        return None;
    }
    let tls = data.proxy.tracing.as_ref()?.tls_settings.as_ref()?;
    Some(tls.ca_certificates.clone())
}

pub(super) fn user_mounts(data: &Data<'_>) -> Result<Vec<Value>, Error> {
    named(data.json_objects("sidecar.istio.io/userVolumeMount")?)
}

pub(super) fn user_volumes(data: &Data<'_>) -> Result<Vec<Value>, Error> {
    named(data.json_objects("sidecar.istio.io/userVolume")?)
}

fn named(entries: Vec<(String, Value)>) -> Result<Vec<Value>, Error> {
    let with_name = |(name, mut value): (String, Value)| match &mut value {
        Value::Object(fields) => {
            fields.insert("name".into(), name.into());
            Ok(value)
        }
        _ => Err(Error::Invalid {
            path: "sidecar.istio.io/userVolume, sidecar.istio.io/userVolumeMount".into(),
            why: format!("{name:?}: an object is expected"),
        }),
    };
    entries.into_iter().map(with_name).collect()
}

/// Where the workload's certificates are. Istio writes the sidecar's without a kind and the gateway's as emptyDir.
pub(super) fn certificates(data: &Data<'_>, explicit: bool) -> Value {
    if gke(data) {
        let driver = "workloadcertificates.security.cloud.google.com";
        json!({"name": "gke-workload-certificate", "csi": {"driver": driver}})
    } else if explicit {
        json!({"name": "workload-certs", "emptyDir": {}})
    } else {
        json!({"name": "workload-certs"})
    }
}

/// The volumes from the bootstrap on that every template has; `socket` is that of /etc/istio/proxy.
pub(super) fn common_volumes(data: &Data<'_>, socket: &str) -> Vec<Value> {
    let mut out = Vec::new();
    if let Some(name) = data.annotation(BOOTSTRAP) {
        out.push(json!({"name": "custom-bootstrap-volume", "configMap": {"name": name}}));
    }
    out.push(json!({"name": socket, "emptyDir": {"medium": "Memory"}}));
    out.push(json!({"name": "istio-data", "emptyDir": {}}));
    out.push(json!({"name": "istio-podinfo", "downwardAPI": {"items": [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "annotations", "fieldRef": {"fieldPath": "metadata.annotations"}},
    ]}}));
    let token = json!({
        "path": "istio-token",
        "expirationSeconds": 43200,
        "audience": data.values("global.sds.token.aud"),
    });
    out.push(
        json!({"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": token}]}}),
    );
    if data.values("global.pilotCertProvider") == "istiod" {
        let own = data.values("global.trustBundleName");
        let name = |default: &str| {
            if own.is_empty() {
                default.to_string()
            } else {
                own.clone()
            }
        };
        let bundle = data
            .settings
            .values
            .at("pilot.env.ENABLE_CLUSTER_TRUST_BUNDLE_API");
        out.push(if bundle == Some(&Value::Bool(true)) {
            let name = format!("istio.io:istiod-ca:{}", name("root-cert"));
            let source = json!({"clusterTrustBundle": {"name": name, "path": "root-cert.pem"}});
            json!({"name": "istiod-ca-cert", "projected": {"sources": [source]}})
        } else {
            json!({"name": "istiod-ca-cert", "configMap": {"name": name("istio-ca-root-cert")}})
        });
    }
    out
}

pub(super) fn mounted_certificates(data: &Data<'_>) -> Option<Value> {
    if !data.on("global.mountMtlsCerts") {
        return None;
    }
    let account = data.spec["serviceAccountName"]
        .as_str()
        .filter(|n| !n.is_empty());
    let name = format!("istio.{}", account.unwrap_or("default"));
    Some(json!({"name": "istio-certs", "secret": {"optional": true, "secretName": name}}))
}

fn sidecar_volumes(data: &Data<'_>) -> Result<Vec<Value>, Error> {
    let mut out = vec![
        json!({"name": "workload-socket"}),
        json!({"name": "credential-socket"}),
        certificates(data, false),
    ];
    out.extend(common_volumes(data, "istio-envoy"));
    let list = match data.values("pilot.crlConfigMapName") {
        name if name.is_empty() => "istio-ca-crl".into(),
        name => name,
    };
    out.push(json!({"name": "istio-ca-crl", "configMap": {"name": list, "optional": true}}));
    out.extend(mounted_certificates(data));
    out.extend(user_volumes(data)?);
    if lightstep(data).is_some() {
        let secret = json!({"optional": true, "secretName": "lightstep.cacert"});
        out.push(json!({"name": "lightstep-certs", "secret": secret}));
    }
    Ok(out)
}

pub(super) fn add_pull_policy(data: &Data<'_>, container: &mut Value) {
    let policy = data.values("global.imagePullPolicy");
    if !policy.is_empty() {
        container["imagePullPolicy"] = policy.into();
    }
}

pub(super) fn add_pull_secrets(data: &Data<'_>, spec: &mut Value) {
    let names = data.settings.values.texts("global.imagePullSecrets");
    if !names.is_empty() {
        spec["imagePullSecrets"] = names.iter().map(|n| json!({"name": n})).collect();
    }
}

fn add_seccomp(data: &Data<'_>, security: &mut Value) {
    if data.on("global.proxy.seccompProfile") {
        security["seccompProfile"] = data
            .settings
            .values
            .at("global.proxy.seccompProfile")
            .cloned()
            .into();
    }
}
