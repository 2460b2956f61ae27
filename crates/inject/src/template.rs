//! The shipped templates as code: what is added to a pod, as a partial pod to be merged in.

mod environment;
mod grpc;
mod proxy;
mod traffic;
mod volumes;

use proto::istio::mesh::v1alpha1::{
    ProxyConfig, mesh_config::inbound_traffic_policy::Mode, proxy_config::InboundInterceptionMode,
};
use proto::json::{self as proto_json, MessageDescriptor};
use serde_json::{Map, Value, json};

use crate::{Error, Owner, Settings, schema, schema::Type};

/// The proxy's container.
pub const PROXY: &str = "istio-proxy";
/// The init container that writes the rules.
pub const INIT: &str = "istio-init";
/// The init container that checks the rules of the CNI plug-in.
pub const VALIDATION: &str = "istio-validation";

/// The templates by name.
pub const NAMES: [&str; 4] = ["gateway", "grpc-agent", "grpc-simple", "sidecar"];

/// Annotations that more than one place reads.
pub(crate) const MODE: &str = "sidecar.istio.io/interceptionMode";
pub(crate) const NATIVE: &str = "sidecar.istio.io/nativeSidecar";
const BOOTSTRAP: &str = "sidecar.istio.io/bootstrapOverride";
pub(crate) const STATUS_PORT: &str = "status.sidecar.istio.io/port";

/// What a template looks at.
#[derive(Debug)]
pub(crate) struct Data<'a> {
    pub settings: &'a Settings,
    pub owner: &'a Owner,
    /// The pod as it was before any injection.
    pub metadata: &'a Value,
    /// Its spec.
    pub spec: &'a Value,
    /// The mesh's ProxyConfig with the pod's annotation merged in.
    pub proxy: &'a ProxyConfig,
}

/// The partial pod of one template.
pub(crate) fn render(name: &str, data: &Data<'_>) -> Result<Value, Error> {
    match name {
        "sidecar" => proxy::sidecar(data),
        "gateway" => Ok(proxy::gateway(data)),
        "grpc-simple" => grpc::simple(data),
        "grpc-agent" => grpc::agent(data),
        _ => Err(Error::UnknownTemplate {
            name: name.into(),
            have: NAMES.join(", "),
        }),
    }
}

impl Data<'_> {
    fn annotation(&self, name: &str) -> Option<&str> {
        self.metadata["annotations"].get(name)?.as_str()
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.metadata["labels"].get(name)?.as_str()
    }

    /// The annotation, else a value of the install.
    fn annotation_or(&self, name: &str, path: &str) -> String {
        match self.annotation(name) {
            Some(text) => text.into(),
            None => self.values(path),
        }
    }

    fn values(&self, path: &str) -> String {
        self.settings.values.text(path)
    }

    fn on(&self, path: &str) -> bool {
        self.settings.values.is(path)
    }

    fn mesh_mode(&self) -> &'static str {
        InboundInterceptionMode::try_from(self.proxy.interception_mode)
            .unwrap_or(InboundInterceptionMode::Redirect)
            .as_str_name()
    }

    /// REDIRECT, TPROXY, EBPF or NONE.
    fn mode(&self) -> String {
        self.annotation(MODE).unwrap_or(self.mesh_mode()).into()
    }

    fn tproxy(&self) -> bool {
        self.mode() == "TPROXY"
    }

    /// Any word but `false` turns it on.
    fn native(&self) -> bool {
        match self.annotation(NATIVE) {
            Some(text) if !text.is_empty() => text != "false",
            _ => self.settings.native_sidecars,
        }
    }

    fn containers(&self) -> impl Iterator<Item = &Value> {
        self.spec["containers"].as_array().into_iter().flatten()
    }

    /// The names of the pod's own containers.
    fn apps(&self) -> Vec<&str> {
        let names = self.containers().filter_map(|c| c["name"].as_str());
        names.filter(|n| *n != PROXY).collect()
    }

    fn init_image(&self) -> String {
        self.image("global.proxy_init.image", "")
    }

    fn proxy_image(&self) -> String {
        let kind = self
            .proxy
            .image
            .as_ref()
            .map_or("", |i| i.image_type.as_str());
        self.image("global.proxy.image", kind)
    }

    /// A full reference if one is given, else hub, name, tag and type of the install.
    fn image(&self, path: &str, kind: &str) -> String {
        let given = self.annotation_or("sidecar.istio.io/proxyImage", path);
        if given.contains('/') {
            return given;
        }
        let name = match self.values(path) {
            name if name.is_empty() => "proxyv2".into(),
            name => name,
        };
        let kind = match self.annotation("sidecar.istio.io/proxyImageType") {
            Some(kind) => kind.to_string(),
            None if kind.is_empty() => self.values("global.variant"),
            None => kind.into(),
        };
        let mut tag = self.values("global.tag");
        if !kind.is_empty() {
            for known in ["-distroless", "-debug"] {
                if let Some(plain) = tag.strip_suffix(known) {
                    tag = plain.into();
                    break;
                }
            }
            if kind != "default" {
                tag = format!("{tag}-{kind}");
            }
        }
        format!("{}/{name}:{tag}", self.values("global.hub"))
    }

    /// Resources of the proxy and of the init container: the annotations if any of them is there, else the install's.
    fn resources(&self) -> Value {
        let mut out = Map::new();
        for (list, cpu, memory) in [
            ("requests", "proxyCPU", "proxyMemory"),
            ("limits", "proxyCPULimit", "proxyMemoryLimit"),
        ] {
            for (resource, annotation) in [("cpu", cpu), ("memory", memory)] {
                if let Some(text) = self.annotation(&format!("sidecar.istio.io/{annotation}")) {
                    let list = out.entry(list).or_insert(json!({}));
                    list[resource] = text.into();
                }
            }
        }
        if out.is_empty() {
            let given = self.settings.values.at("global.proxy.resources");
            return given.and_then(without_nulls).unwrap_or(json!({}));
        }
        out.into()
    }

    /// Canonical name and revision.
    fn canonical_labels(&self, cut: bool) -> Map<String, Value> {
        let first = |names: &[&str]| {
            names
                .iter()
                .filter_map(|n| self.label(n))
                .find(|v| !v.is_empty())
                .map(String::from)
        };
        let mut name = first(&[
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ])
        .unwrap_or_else(|| self.owner.name.clone());
        if cut {
            // A label takes no more, and must not end in these.
            name = name.chars().take(63).collect();
            name = name.trim_matches(['-', '_', '.']).into();
        }
        let revision = first(&[
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ])
        .unwrap_or_else(|| "latest".into());
        Map::from_iter([
            ("service.istio.io/canonical-name".to_string(), name.into()),
            (
                "service.istio.io/canonical-revision".to_string(),
                revision.into(),
            ),
        ])
    }

    /// The revision, and kubectl's default container.
    fn common_annotations(&self) -> Map<String, Value> {
        let revision = match self.settings.revision.as_str() {
            "" => "default",
            revision => revision,
        };
        let mut out = Map::from_iter([("istio.io/rev".to_string(), revision.into())]);
        if let Some(first) = self.apps().first() {
            for name in [
                "kubectl.kubernetes.io/default-logs-container",
                "kubectl.kubernetes.io/default-container",
            ] {
                if self.annotation(name).is_none() {
                    out.insert(name.into(), (*first).into());
                }
            }
        }
        out
    }

    /// The arguments that every proxy container begins with.
    fn proxy_args(&self, role: &str) -> Vec<String> {
        let agent = self.annotation_or("sidecar.istio.io/agentLogLevel", "global.logging.level");
        let proxy = self.annotation_or("sidecar.istio.io/logLevel", "global.proxy.logLevel");
        let component = self.annotation_or(
            "sidecar.istio.io/componentLogLevel",
            "global.proxy.componentLogLevel",
        );
        let mut args = vec![
            "proxy".into(),
            role.into(),
            "--domain".into(),
            format!(
                "$(POD_NAMESPACE).svc.{}",
                self.values("global.proxy.clusterDomain")
            ),
            format!("--proxyLogLevel={proxy}"),
            format!("--proxyComponentLogLevel={component}"),
            format!("--log_output_level={agent}"),
        ];
        if self.on("global.sts.servicePort") {
            args.push(format!(
                "--stsPort={}",
                self.values("global.sts.servicePort")
            ));
        }
        if self.on("global.logAsJson") {
            args.push("--log_as_json".into());
        }
        args
    }

    /// The ports of all containers as the agent wants them: a line each.
    fn pod_ports(&self) -> String {
        let ports = self
            .containers()
            .flat_map(|c| c["ports"].as_array().into_iter().flatten());
        let mut out = String::from("[");
        for (i, port) in ports.enumerate() {
            let comma = if i > 0 { "," } else { "" };
            out.push_str(&format!(
                "\n    {comma}{}",
                schema::json_text(Type::Port, port)
            ));
        }
        out.push_str("\n]");
        out
    }

    fn trust_domain(&self) -> String {
        match self.settings.mesh.trust_domain.as_str() {
            "" => self.values("global.trustDomain"),
            domain => domain.into(),
        }
    }

    fn localhost_inbound(&self) -> bool {
        let policy = self.settings.mesh.inbound_traffic_policy.as_ref();
        policy.is_some_and(|p| p.mode == Mode::Localhost as i32)
    }

    /// Variables from the metadata of ProxyConfig.
    fn metadata_env(&self) -> Vec<Value> {
        self.proxy
            .proxy_metadata
            .iter()
            .map(|(k, v)| env(k, v))
            .collect()
    }

    /// The number of an annotation, else that of the install; 0 is left out of probes.
    fn number(&self, name: &str, path: &str) -> Result<i64, Error> {
        let text = self.annotation_or(name, path);
        text.trim().parse().map_err(|_| Error::Invalid {
            path: if self.annotation(name).is_some() {
                name.into()
            } else {
                format!("values: {path}")
            },
            why: format!("{text:?} is not a number"),
        })
    }

    fn status_port_off(&self) -> bool {
        self.annotation_or(STATUS_PORT, "global.proxy.statusPort") == "0"
    }

    /// An annotation with a JSON object: name and fields of each entry, by name.
    fn json_objects(&self, name: &str) -> Result<Vec<(String, Value)>, Error> {
        let Some(text) = self.annotation(name) else {
            return Ok(Vec::new());
        };
        match serde_json::from_str(text) {
            Ok(Value::Object(entries)) => Ok(entries.into_iter().collect()),
            Ok(_) => Err("a JSON object of names is expected".to_string()),
            Err(e) => Err(e.to_string()),
        }
        .map_err(|why| Error::Invalid {
            path: name.into(),
            why,
        })
    }

    /// The ProxyConfig as JSON in the order of its message, without what every agent assumes.
    fn proxy_config(&self) -> String {
        let mut value = proto_json::to_value(self.proxy);
        let defaults = config::mesh::defaults().default_config.unwrap_or_default();
        let defaults = proto_json::to_value(&defaults);
        if let Value::Object(fields) = &mut value {
            fields.retain(|name, value| {
                !ASSUMED.contains(&name.as_str()) || defaults.get(name) != Some(value)
            });
        }
        match proto_json::descriptor("istio.mesh.v1alpha1.ProxyConfig") {
            Some(message) => in_order(&message, &value),
            None => value.to_string(),
        }
    }
}

/// Fields of ProxyConfig that are not passed on when they have their default.
const ASSUMED: [&str; 14] = [
    "configPath",
    "binaryPath",
    "controlPlaneAuthPolicy",
    "serviceCluster",
    "drainDuration",
    "terminationDrainDuration",
    "discoveryAddress",
    "envoyMetricsService",
    "envoyAccessLogService",
    "tracing",
    "proxyAdminPort",
    "statNameLength",
    "statusPort",
    "concurrency",
];

/// A message's JSON with the fields in the order of its declaration, as Go prints it.
fn in_order(message: &MessageDescriptor, value: &Value) -> String {
    let Value::Object(object) = value else {
        return schema::json_text(Type::Any, value);
    };
    let fields: Vec<String> = message
        .fields()
        .filter_map(|field| {
            let value = object.get(field.json_name())?;
            let kind = field.kind();
            let text = match (kind.as_message(), value) {
                (Some(part), Value::Array(items)) if field.is_list() => {
                    let items: Vec<String> = items.iter().map(|i| in_order(part, i)).collect();
                    format!("[{}]", items.join(","))
                }
                (Some(part), value) if !field.is_map() => in_order(part, value),
                _ => schema::json_text(Type::Any, value),
            };
            Some(format!("{}:{text}", schema::string(field.json_name())))
        })
        .collect();
    format!("{{{}}}", fields.join(","))
}

fn env(name: &str, value: &str) -> Value {
    json!({"name": name, "value": value})
}

fn env_field(name: &str, path: &str) -> Value {
    json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}})
}

fn env_limit(name: &str, resource: &str) -> Value {
    json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": resource, "divisor": "1"}}})
}

fn mount(name: &str, path: &str) -> Value {
    json!({"name": name, "mountPath": path})
}

/// The value without nulls and without objects that held nothing else.
fn without_nulls(value: &Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(object) => {
            let kept: Map<_, _> = object
                .iter()
                .filter_map(|(k, v)| Some((k.clone(), without_nulls(v)?)))
                .collect();
            (object.is_empty() || !kept.is_empty()).then(|| kept.into())
        }
        other => Some(other.clone()),
    }
}
