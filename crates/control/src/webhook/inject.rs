//! `/inject`: a pod in, the patch that gives it its proxy out.

use std::{collections::BTreeMap, sync::Arc};

use config::{Object, Snapshot, kubernetes::ConfigMap, yaml};
use inject::{
    Settings, Values,
    decide::{Decision, decide},
};
use parking_lot::Mutex;
use proto::istio::mesh::v1alpha1::MeshConfig;
use serde_json::Value;
use tracing::{info, warn};

use super::{
    patch::diff,
    review::{Review, Verdict},
};
use crate::server::Server;

/// Injects with the settings of the ConfigMap as it is now.
#[derive(Debug)]
pub struct Injector {
    namespace: String,
    config_map: String,
    revision: String,
    current: Mutex<Option<Current>>,
}

/// Settings, and what they were made of.
#[derive(Debug, Clone)]
struct Current {
    map: Option<Arc<Object<ConfigMap>>>,
    mesh: Arc<MeshConfig>,
    native: bool,
    settings: Arc<Settings>,
}

impl Injector {
    /// Reads values from the ConfigMap `istio-sidecar-injector` (with the revision's suffix) of a namespace.
    pub fn new(namespace: &str, revision: &str) -> Self {
        let suffix = match revision {
            "" | "default" => String::new(),
            revision => format!("-{revision}"),
        };
        Injector {
            namespace: namespace.to_owned(),
            config_map: format!("istio-sidecar-injector{suffix}"),
            revision: revision.to_owned(),
            current: Mutex::default(),
        }
    }

    /// The settings for these objects. Values that cannot be read leave those that were in force.
    pub(crate) fn settings(&self, snapshot: &Snapshot) -> Arc<Settings> {
        let map = snapshot
            .config_maps
            .get(&self.namespace, &self.config_map)
            .cloned();
        let native = native_sidecars(snapshot);
        let mut current = self.current.lock();
        if let Some(known) = &*current {
            let same_map = match (&known.map, &map) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            };
            if same_map && Arc::ptr_eq(&known.mesh, &snapshot.mesh) && known.native == native {
                return known.settings.clone();
            }
        }
        let text = map.as_ref().and_then(|m| m.spec.data.get("values"));
        let values = match values(text.map_or("", String::as_str)) {
            Ok(values) => values,
            Err(why) => {
                warn!(
                    "ConfigMap {}/{}: values: {why}; the last good ones stay in force",
                    self.namespace, self.config_map
                );
                current
                    .as_ref()
                    .map_or_else(Values::default, |c| c.settings.values.clone())
            }
        };
        let mut settings = Settings::new(values, (*snapshot.mesh).clone());
        settings.revision = self.revision.clone();
        settings.native_sidecars = match &*settings.values.text("pilot.env.ENABLE_NATIVE_SIDECARS")
        {
            "true" => true,
            "false" => false,
            _ => native,
        };
        let policy = map
            .as_ref()
            .and_then(|m| m.spec.data.get("config"))
            .and_then(|text| yaml::document(text, 1).ok().flatten())
            .and_then(|d| d.value["policy"].as_str().map(str::to_owned));
        settings.inject_by_default = policy.as_deref() != Some("disabled");
        let settings = Arc::new(settings);
        *current = Some(Current {
            map,
            mesh: snapshot.mesh.clone(),
            native,
            settings: settings.clone(),
        });
        settings
    }
}

fn values(text: &str) -> Result<Values, String> {
    let value = match yaml::document(text, 1) {
        Ok(document) => document.map_or(Value::Null, |d| d.value),
        Err(e) => return Err(format!("line {}: {}", e.line, e.message)),
    };
    Values::new(&value).map_err(|e| e.to_string())
}

/// Whether every node runs init containers beside the others (Kubernetes 1.29 and newer).
fn native_sidecars(snapshot: &Snapshot) -> bool {
    let minor = |version: &str| -> Option<u32> {
        let mut parts = version.trim_start_matches('v').split('.');
        let (major, minor) = (parts.next()?, parts.next()?);
        (major == "1").then(|| minor.parse().ok()).flatten()
    };
    let versions: Vec<Option<u32>> = snapshot
        .nodes
        .iter()
        .map(|n| minor(&n.spec.status.info.kubelet_version))
        .collect();
    !versions.is_empty() && versions.iter().all(|v| v.is_some_and(|v| v >= 29))
}

/// The answer to a request.
pub(super) fn answer(injector: &Injector, server: &Server, path: &str, body: &[u8]) -> Value {
    server
        .metrics
        .count("sidecar_injection_requests_total", &[]);
    let review = match Review::read(body) {
        Ok(review) => review,
        Err(refused) => {
            server.metrics.count("sidecar_injection_failure_total", &[]);
            return refused;
        }
    };
    let verdict = match &review.object {
        Some(pod) => inject(injector, server, path, &review, pod),
        None => Verdict::allowed(),
    };
    review.answer(verdict)
}

fn inject(
    injector: &Injector,
    server: &Server,
    path: &str,
    review: &Review,
    pod: &Value,
) -> Verdict {
    let Some(push) = server.current() else {
        return Verdict::Denied("the control plane has not read the cluster yet; try again".into());
    };
    let mut pod = pod.clone();
    if let Some(metadata) = pod["metadata"].as_object_mut() {
        metadata.remove("managedFields");
        metadata
            .entry("namespace")
            .or_insert_with(|| review.namespace.as_str().into());
    }
    let mut settings = injector.settings(push.mesh.snapshot());
    match inject::proxy_config::for_pod(&settings, push.mesh.snapshot(), &pod) {
        Ok(own) => settings = own.map_or(settings, Arc::new),
        Err(e) => return Verdict::Denied(e.to_string()),
    }
    let environment = environment(path);
    if !environment.is_empty() {
        let mut own = (*settings).clone();
        own.proxy_env = environment;
        settings = Arc::new(own);
    }
    if decide(&pod, &settings) != Decision::Inject {
        server.metrics.count("sidecar_injection_skip_total", &[]);
        return Verdict::allowed();
    }
    let metadata = &pod["metadata"];
    let name = ["name", "generateName"]
        .iter()
        .find_map(|f| metadata[*f].as_str().filter(|n| !n.is_empty()))
        .unwrap_or("(no name)")
        .to_owned();
    match inject::pod(&pod, &inject::owner(&pod), &settings) {
        Ok(injected) => {
            server.metrics.count("sidecar_injection_success_total", &[]);
            info!("{}/{name}: sidecar injected", review.namespace);
            Verdict::Allowed {
                patch: diff(&pod, &injected),
                warnings: Vec::new(),
            }
        }
        Err(e) => {
            server.metrics.count("sidecar_injection_failure_total", &[]);
            warn!("{}/{name}: no sidecar: {e}", review.namespace);
            Verdict::Denied(e.to_string())
        }
    }
}

/// What the path sets: `/inject/cluster/CLUSTER/net/NETWORK`, and other names as variables of the proxy.
fn environment(path: &str) -> BTreeMap<String, String> {
    let rest = path.strip_prefix("/inject").unwrap_or_default();
    let parts: Vec<&str> = rest.split('/').filter(|p| !p.is_empty()).collect();
    parts
        .chunks_exact(2)
        .map(|pair| {
            let key = match pair[0] {
                "cluster" => "ISTIO_META_CLUSTER_ID".to_owned(),
                "net" => "ISTIO_META_NETWORK".to_owned(),
                other => other.to_uppercase(),
            };
            (key, pair[1].replace("--slash--", "/"))
        })
        .collect()
}
