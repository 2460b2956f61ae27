//! The environment of proxy containers; its order is Istio's.

use proto::istio::mesh::v1alpha1::mesh_config::extension_provider::Provider;
use serde_json::Value;

use super::{BOOTSTRAP, Data, MODE, env, env_field, env_limit};
use crate::Error;

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

pub(super) fn sidecar_env(data: &Data<'_>) -> Result<Vec<Value>, Error> {
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

pub(super) fn gateway_env(data: &Data<'_>) -> Vec<Value> {
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
