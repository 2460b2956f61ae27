//! The templates with a proxy: the sidecar, and the gateway (a pod that is nothing but a proxy).

use serde_json::{Value, json};

use super::{Data, PROXY, STATUS_PORT, environment, traffic, volumes};
use crate::Error;

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
        traffic::cni_annotations(data, &mut annotations);
    }
    let native = data.native();
    let mut init = Vec::new();
    let mut containers = Vec::new();
    if data.mode() != "NONE" {
        init.push(traffic::init_container(data));
    }
    let proxy = sidecar_container(data, native)?;
    if native {
        init.push(proxy)
    } else {
        containers.push(proxy)
    }
    let mut spec = json!({"volumes": volumes::sidecar_volumes(data)?});
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
        "env": environment::gateway_env(data),
        "readinessProbe": probe(15021, [
            number(data, "global.proxy.readinessInitialDelaySeconds"),
            number(data, "global.proxy.readinessPeriodSeconds"),
            number(data, "global.proxy.readinessFailureThreshold"),
        ]),
        "volumeMounts": volumes::mounts(data, false),
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
        volumes::certificates(data, true),
    ];
    volumes.extend(volumes::common_volumes(data, "istio-envoy"));
    volumes.extend(volumes::mounted_certificates(data));
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
        "env": environment::sidecar_env(data)?,
        "securityContext": sidecar_security(data),
        "resources": data.resources(),
        "volumeMounts": volumes::sidecar_mounts(data)?,
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

pub(super) fn add_seccomp(data: &Data<'_>, security: &mut Value) {
    if data.on("global.proxy.seccompProfile") {
        security["seccompProfile"] = data
            .settings
            .values
            .at("global.proxy.seccompProfile")
            .cloned()
            .into();
    }
}
