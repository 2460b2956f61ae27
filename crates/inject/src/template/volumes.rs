//! Volumes and mounts: certificates, tokens, the pod's own description, and what the user adds.

use serde_json::{Value, json};

use super::{BOOTSTRAP, Data, mount};
use crate::Error;

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
pub(super) fn mounts(data: &Data<'_>, revocation: bool) -> Vec<Value> {
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

pub(super) fn sidecar_mounts(data: &Data<'_>) -> Result<Vec<Value>, Error> {
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

pub(super) fn sidecar_volumes(data: &Data<'_>) -> Result<Vec<Value>, Error> {
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
