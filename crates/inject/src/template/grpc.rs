//! The templates for gRPC without a proxy: the app's own library speaks xDS.
//!
//! `grpc-simple` writes a bootstrap file that leads straight to the control plane; `grpc-agent` adds the agent, which
//! brings certificates and relays xDS over a socket.

use serde_json::{Value, json};

use super::{Data, PROXY, env, env_field, environment, mount, proxy, volumes};
use crate::Error;

/// An init container that writes the bootstrap, and its path in every container.
pub(super) fn simple(data: &Data<'_>) -> Result<Value, Error> {
    // Values that do not speak of the port are another install's, where it is open.
    if data.values("pilot.plaintextXds") == "false" {
        return Err(Error::Invalid {
            path: "template grpc-simple".into(),
            why: "its programs ask the control plane on port 15010, which this install keeps closed; use template \
                  grpc-agent, or install with --set pilot.plaintextXds=true"
                .into(),
        });
    }
    const FOLDER: &str = "/var/lib/grpc/data/";
    const VOLUME: &str = "grpc-io-proxyless-bootstrap";
    let namespace = format!("{}\n", data.values("global.istioNamespace"));
    let init = json!({
        "name": "grpc-bootstrap-init",
        "image": "busybox:1.28",
        "volumeMounts": [mount(VOLUME, FOLDER)],
        "env": [
            env_field("INSTANCE_IP", "status.podIP"),
            env_field("POD_NAME", "metadata.name"),
            env_field("POD_NAMESPACE", "metadata.namespace"),
            env("ISTIO_NAMESPACE", &namespace),
        ],
        "command": ["sh", "-c", BOOTSTRAP],
    });
    let containers: Vec<Value> = data
        .containers()
        .map(|c| {
            json!({
                "name": c["name"],
                "env": [
                    env("GRPC_XDS_BOOTSTRAP", "/var/lib/grpc/data/bootstrap.json"),
                    env("GRPC_GO_LOG_VERBOSITY_LEVEL", "99"),
                    env("GRPC_GO_LOG_SEVERITY_LEVEL", "info"),
                ],
                "volumeMounts": [mount(VOLUME, FOLDER)],
            })
        })
        .collect();
    Ok(json!({
        "metadata": {"annotations": {"sidecar.istio.io/rewriteAppHTTPProbers": "false"}},
        "spec": {
            "initContainers": [init],
            "containers": containers,
            "volumes": [{"name": VOLUME, "emptyDir": {}}],
        },
    }))
}

/// The agent as a container, and its files in every other.
pub(super) fn agent(data: &Data<'_>) -> Result<Value, Error> {
    let wait = [
        "pilot-agent",
        "wait",
        "--url=http://localhost:15020/healthz/ready",
    ];
    let mut container = json!({
        "name": PROXY,
        "image": data.proxy_image(),
        "ports": [{"containerPort": 15020, "protocol": "TCP", "name": "mesh-metrics"}],
        "args": data.proxy_args("sidecar"),
        "lifecycle": {"postStart": {"exec": {"command": wait}}},
        "env": agent_env(data),
    });
    proxy::add_pull_policy(data, &mut container);
    let mut mounts = Vec::new();
    if !data.status_port_off() {
        container["readinessProbe"] = proxy::probe(15020, proxy::readiness(data)?);
        container["resources"] = data.resources();
        mounts = agent_mounts(data);
    }
    mounts.extend(volumes::user_mounts(data)?);
    if !mounts.is_empty() {
        container["volumeMounts"] = mounts.into();
    }
    let mut containers = vec![container];
    for name in data.apps() {
        containers.push(json!({
            "name": name,
            "env": [
                env("GRPC_XDS_EXPERIMENTAL_SECURITY_SUPPORT", "true"),
                env("GRPC_XDS_BOOTSTRAP", "/etc/istio/proxy/grpc-bootstrap.json"),
            ],
            "volumeMounts": [
                mount("istio-data", "/var/lib/istio/data"),
                mount("istio-xds", "/etc/istio/proxy"),
                volumes::certificates_mount(data),
            ],
        }));
    }
    let mut volumes = vec![
        json!({"name": "workload-socket"}),
        volumes::certificates(data, false),
    ];
    volumes.extend(volumes::common_volumes(data, "istio-xds"));
    volumes.extend(volumes::mounted_certificates(data));
    volumes.extend(volumes::user_volumes(data)?);
    let mut spec = json!({"containers": containers, "volumes": volumes});
    proxy::add_pull_secrets(data, &mut spec);
    let mut annotations = data.common_annotations();
    annotations.insert(
        "sidecar.istio.io/rewriteAppHTTPProbers".into(),
        "false".into(),
    );
    let labels = data.canonical_labels(false);
    Ok(json!({"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}))
}

fn agent_env(data: &Data<'_>) -> Vec<Value> {
    let mut out = vec![
        env("ISTIO_META_GENERATOR", "grpc"),
        env("OUTPUT_CERTS", "/var/lib/istio/data"),
    ];
    if data.localhost_inbound() {
        out.push(env("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION", "true"));
    }
    out.extend(environment::first_env(data));
    out.extend(environment::config_env(data));
    out.push(environment::apps_env(data));
    out.extend(environment::node_env(data));
    out.extend(environment::network_env(data));
    environment::workload_env(data, &data.owner.name, &mut out);
    environment::mesh_env(data, &mut out);
    out.extend(data.metadata_env());
    // The library resolves names over xDS: no query needs an answer of the agent.
    out.push(env("ISTIO_META_DNS_CAPTURE", "false"));
    out.push(env("DISABLE_ENVOY", "true"));
    out
}

fn agent_mounts(data: &Data<'_>) -> Vec<Value> {
    let mut out = vec![
        mount("workload-socket", "/var/run/secrets/workload-spiffe-uds"),
        volumes::certificates_mount(data),
    ];
    if data.values("global.pilotCertProvider") == "istiod" {
        out.push(mount("istiod-ca-cert", "/var/run/secrets/istio"));
    }
    out.push(mount("istio-data", "/var/lib/istio/data"));
    out.push(mount("istio-xds", "/etc/istio/proxy"));
    out.push(mount("istio-token", "/var/run/secrets/tokens"));
    if data.on("global.mountMtlsCerts") {
        out.push(json!({"name": "istio-certs", "mountPath": "/etc/certs/", "readOnly": true}));
    }
    out.push(mount("istio-podinfo", "/etc/istio/pod"));
    out
}

/// What the init container runs; it is part of the pod that users see and compare.
const BOOTSTRAP: &str = r#"NODE_ID="sidecar~${INSTANCE_IP}~${POD_NAME}.${POD_NAMESPACE}~cluster.local"
SERVER_URI="dns:///istiod.${ISTIO_NAMESPACE}.svc:15010"
echo '
{
  "xds_servers": [
    {
      "server_uri": "'${SERVER_URI}'",
      "channel_creds": [{"type": "insecure"}],
      "server_features" : ["xds_v3"]
    }
  ],
  "node": {
    "id": "'${NODE_ID}'",
    "metadata": {
      "GENERATOR": "grpc"
    }
  }
}' > /var/lib/grpc/data/bootstrap.json"#;
