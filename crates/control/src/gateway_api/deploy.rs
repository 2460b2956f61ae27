//! What a managed Gateway is run by: a ServiceAccount, a Deployment and a Service, named and labelled as istiod's are.
//! They belong to the Gateway and go with it.

use std::collections::{BTreeMap, BTreeSet};

use config::{Kind, Meta, Object, gateway_api::Gateway};
use inject::Settings;
use serde_json::{Value, json};

use super::{CONTROLLER, DEFAULT_CLASS, listener};
use crate::model::Mesh;

/// Annotation of a Gateway that says which controller's way of deploying is used: larger numbers win.
const CONTROLLER_VERSION: &str = "gateway.istio.io/controller-version";
/// Ours, which is istiod's since 1.18.
const OUR_VERSION: u64 = 5;
const REVISION: &str = "istio.io/rev";
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const CLASS_NAME: &str = "gateway.networking.k8s.io/gateway-class-name";
const MANAGED: &str = "gateway.istio.io/managed";
const MANAGED_BY: &str = "istio.io-gateway-controller";
/// Annotations of a Gateway that speak about itself alone.
const OWN_ANNOTATIONS: [&str; 4] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    listener::NAME_OVERRIDE,
    listener::SERVICE_ACCOUNT,
    CONTROLLER_VERSION,
];
const STATUS_PORT: u32 = 15021;
const MAX_PORT_NAME: usize = 63;

/// The objects of one Gateway, in the order in which they are put in.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployed {
    /// `NAMESPACE/NAME` of the Gateway.
    pub gateway: String,
    /// ServiceAccount, Deployment, Service; or why there are none.
    pub objects: Result<Vec<Value>, String>,
}

/// The GatewayClass that is ours, for a cluster that has none of its name.
pub fn class() -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": DEFAULT_CLASS},
        "spec": {"controllerName": CONTROLLER, "description": "The default Istio GatewayClass"},
    })
}

/// What is to be there for all managed Gateways of a revision.
pub fn all(mesh: &Mesh, settings: &Settings) -> Vec<Deployed> {
    let snapshot = mesh.snapshot();
    let mut out = Vec::new();
    for gateway in snapshot.kubernetes_gateways.iter() {
        let name = &gateway.spec.gateway_class_name;
        let ours = match snapshot.gateway_classes.get("", name) {
            Some(class) => class.spec.controller_name == CONTROLLER,
            None => name == DEFAULT_CLASS,
        };
        if !ours || !listener::is_managed(&gateway.spec) || !is_of_revision(mesh, gateway, settings)
        {
            continue;
        }
        if gateway.meta.deletion_timestamp.is_some() || gateway.meta.uid.is_empty() {
            continue;
        }
        out.push(Deployed {
            gateway: format!("{}/{}", gateway.meta.namespace, gateway.meta.name),
            objects: objects(mesh, gateway, settings),
        });
    }
    out
}

/// Whether a Gateway is this revision's, and no newer controller has taken it over.
fn is_of_revision(mesh: &Mesh, gateway: &Object<Gateway>, settings: &Settings) -> bool {
    let version = gateway.meta.annotations.get(CONTROLLER_VERSION);
    if version.is_some_and(|v| v.parse::<u64>().map_or(true, |v| v > OUR_VERSION)) {
        return false;
    }
    let namespace = mesh.snapshot().namespaces.get("", &gateway.meta.namespace);
    let asked = gateway
        .meta
        .labels
        .get(REVISION)
        .or_else(|| namespace.and_then(|n| n.meta.labels.get(REVISION)));
    let own = match settings.revision.as_str() {
        "" => "default",
        own => own,
    };
    asked.map_or("default", String::as_str) == own
}

fn objects(
    mesh: &Mesh,
    gateway: &Object<Gateway>,
    settings: &Settings,
) -> Result<Vec<Value>, String> {
    let made = Made::new(mesh, gateway, settings);
    Ok(vec![made.account(), made.deployment()?, made.service()])
}

struct Made<'a> {
    mesh: &'a Mesh,
    gateway: &'a Object<Gateway>,
    settings: &'a Settings,
    name: String,
    account: String,
    /// Labels and annotations that the user asks for.
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

impl<'a> Made<'a> {
    fn new(mesh: &'a Mesh, gateway: &'a Object<Gateway>, settings: &'a Settings) -> Self {
        let Meta {
            labels,
            annotations,
            ..
        } = &gateway.meta;
        let asked = gateway.spec.infrastructure.as_ref();
        let given = |own: &BTreeMap<String, String>, asked: Option<&BTreeMap<String, String>>| {
            asked.map_or_else(
                || own.clone(),
                |asked| {
                    let foreign = asked
                        .iter()
                        .filter(|(k, _)| !k.starts_with("gateway.networking.k8s.io/"));
                    foreign.map(|(k, v)| (k.clone(), v.clone())).collect()
                },
            )
        };
        let mut annotations = given(annotations, asked.and_then(|i| i.annotations.as_ref()));
        annotations.retain(|k, _| !OWN_ANNOTATIONS.contains(&k.as_str()));
        Made {
            mesh,
            gateway,
            settings,
            name: listener::deployment(gateway),
            account: listener::service_account(gateway),
            labels: given(labels, asked.and_then(|i| i.labels.as_ref())),
            annotations,
        }
    }

    fn namespace(&self) -> &str {
        &self.gateway.meta.namespace
    }

    /// The labels of all objects, with some more.
    fn labels(&self, more: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut out = self.labels.clone();
        let class = &self.gateway.spec.gateway_class_name;
        for (key, value) in [
            (GATEWAY_NAME, self.gateway.meta.name.as_str()),
            (CLASS_NAME, class),
        ]
        .iter()
        .chain(more)
        {
            out.insert((*key).to_owned(), (*value).to_owned());
        }
        out
    }

    fn meta(&self, name: &str, more: &[(&str, &str)]) -> Value {
        json!({
            "name": name,
            "namespace": self.namespace(),
            "annotations": self.annotations,
            "labels": self.labels(more),
            "ownerReferences": [{
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "name": self.gateway.meta.name,
                "uid": self.gateway.meta.uid,
            }],
        })
    }

    fn account(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": self.meta(&self.account, &[]),
        })
    }

    fn deployment(&self) -> Result<Value, String> {
        let name = &self.gateway.meta.name;
        Ok(json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.meta(&self.name, &[(MANAGED, MANAGED_BY)]),
            "spec": {
                "selector": {"matchLabels": {GATEWAY_NAME: name}},
                "template": {
                    "metadata": {
                        "annotations": self.pod_annotations(),
                        "labels": self.pod_labels(),
                    },
                    "spec": self.pod()?,
                },
            },
        }))
    }

    fn pod_labels(&self) -> BTreeMap<String, String> {
        let own = [
            ("sidecar.istio.io/inject", "false"),
            ("service.istio.io/canonical-name", self.name.as_str()),
            ("service.istio.io/canonical-revision", "latest"),
        ];
        let mut out: BTreeMap<String, String> = own
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect();
        out.extend(self.labels(&[(MANAGED, MANAGED_BY)]));
        out
    }

    fn pod_annotations(&self) -> BTreeMap<String, String> {
        let revision = match self.settings.revision.as_str() {
            "" => "default",
            revision => revision,
        };
        let mut out = self.annotations.clone();
        for (key, value) in [
            (REVISION, revision),
            ("prometheus.io/path", "/stats/prometheus"),
            ("prometheus.io/port", "15020"),
            ("prometheus.io/scrape", "true"),
        ] {
            out.insert(key.to_owned(), value.to_owned());
        }
        out
    }

    /// The pod of an injected gateway, with what a pod that only we know needs besides.
    fn pod(&self) -> Result<Value, String> {
        let mut annotations: BTreeMap<String, Value> = self
            .annotations
            .iter()
            .map(|(k, v)| (k.clone(), json!(v)))
            .collect();
        annotations.insert("inject.istio.io/templates".to_owned(), json!("gateway"));
        let bare = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": format!("{}-", self.name),
                "namespace": self.namespace(),
                "labels": self.labels(&[]),
                "annotations": annotations,
            },
            "spec": {
                "serviceAccountName": self.account,
                "containers": [{"name": "istio-proxy", "image": "auto"}],
            },
        });
        let owner = inject::Owner {
            api_version: "apps/v1".to_owned(),
            kind: "Deployment".to_owned(),
            name: self.name.clone(),
            namespace: self.namespace().to_owned(),
        };
        let own = inject::proxy_config::for_pod(self.settings, self.mesh.snapshot(), &bare)
            .map_err(|e| e.to_string())?;
        let settings = own.as_ref().unwrap_or(self.settings);
        let injected = inject::pod(&bare, &owner, settings).map_err(|e| e.to_string())?;
        let mut spec = injected["spec"].clone();
        let proxy = &mut spec["containers"][0];
        proxy["ports"] = json!([
            {"containerPort": 15020, "name": "metrics", "protocol": "TCP"},
            {"containerPort": STATUS_PORT, "name": "status-port", "protocol": "TCP"},
            {"containerPort": 15090, "name": "http-envoy-prom", "protocol": "TCP"},
        ]);
        proxy["securityContext"] = json!({
            "capabilities": {"drop": ["ALL"]},
            "allowPrivilegeEscalation": false,
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsUser": self.settings.proxy_uid,
            "runAsGroup": self.settings.proxy_gid,
            "runAsNonRoot": true,
            "seccompProfile": {"type": "RuntimeDefault"},
        });
        let seccomp = self.settings.values.at("global.proxy.seccompProfile");
        if let Some(profile) = seccomp.filter(|p| p.get("type").is_some()) {
            proxy["securityContext"]["seccompProfile"] = profile.clone();
        }
        if let Some(resources) = self.settings.values.at("global.proxy.resources") {
            proxy["resources"] = resources.clone();
        }
        proxy["startupProbe"] = probe(1, 30);
        proxy["readinessProbe"] = probe(15, 4);
        Ok(spec)
    }

    fn service(&self) -> Value {
        let mut spec = json!({
            "ipFamilyPolicy": "PreferDualStack",
            "ports": self.ports(),
            "selector": {GATEWAY_NAME: self.gateway.meta.name},
        });
        let kind = self
            .gateway
            .meta
            .annotations
            .get("networking.istio.io/service-type");
        let kind = kind.map_or("LoadBalancer", String::as_str);
        spec["type"] = kind.into();
        if let Some(address) = self.gateway.spec.addresses.first()
            && kind == "LoadBalancer"
        {
            spec["loadBalancerIP"] = address.value.as_str().into();
        }
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self.meta(&self.name, &[]),
            "spec": spec,
        })
    }

    /// One port of the service for each port of a listener.
    fn ports(&self) -> Vec<Value> {
        let mut out = vec![port("status-port", STATUS_PORT, "tcp")];
        let mut numbers = BTreeSet::new();
        let mut names = BTreeSet::from(["status-port".to_owned()]);
        let own = self.gateway.spec.listeners.iter();
        let sets = self.sets();
        let added = sets.iter().flat_map(|s| &s.spec.listeners);
        for listener in own.chain(added) {
            let number = match (listener.port, listener.protocol.as_str()) {
                (0, "HTTP") => 80,
                (0, "HTTPS") => 443,
                (0, _) => continue,
                (number, _) => number,
            };
            if !numbers.insert(number) {
                continue;
            }
            let mut name = listener.name.replace('.', "-");
            name.truncate(MAX_PORT_NAME);
            // Names that differ only in what was cut off or replaced: the number tells them apart.
            let mut suffix = format!("-{number}");
            let base = name.clone();
            while !names.insert(name.clone()) {
                let mut cut = base.clone();
                cut.truncate(MAX_PORT_NAME - suffix.len());
                name = cut + &suffix;
                suffix.push('x');
            }
            out.push(port(&name, number, &listener.protocol.to_lowercase()));
        }
        out
    }

    /// The ListenerSets that add to the Gateway, as far as they were taken.
    fn sets(&self) -> Vec<&'a Object<config::gateway_api::ListenerSet>> {
        let table = &self.mesh.snapshot().listener_sets;
        let reports = &self.mesh.gateway_api().reports;
        table
            .iter()
            .filter(|set| {
                let key = config::ObjectKey::new(
                    Kind::ListenerSet,
                    &*set.meta.namespace,
                    &*set.meta.name,
                );
                let taken = matches!(
                    reports.get(&key),
                    Some(super::Report::Gateway(r)) if r.refused.is_none()
                );
                taken
                    && set.spec.parent_ref.as_ref().is_some_and(|p| {
                        let namespace = p.namespace.as_ref().unwrap_or(&set.meta.namespace);
                        p.name == self.gateway.meta.name && namespace == self.namespace()
                    })
            })
            .map(|set| &**set)
            .collect()
    }
}

fn port(name: &str, number: u32, protocol: &str) -> Value {
    json!({"name": name, "port": number, "protocol": "TCP", "appProtocol": protocol})
}

fn probe(period: u32, failures: u32) -> Value {
    json!({
        "failureThreshold": failures,
        "httpGet": {"path": "/healthz/ready", "port": STATUS_PORT, "scheme": "HTTP"},
        "initialDelaySeconds": if period == 1 { 1 } else { 0 },
        "periodSeconds": period,
        "successThreshold": 1,
        "timeoutSeconds": 1,
    })
}
