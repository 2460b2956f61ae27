//! A captured scenario: its objects as a mesh, and what istiod sent to each of its nodes.

#[path = "../../../testkit/src/conformance.rs"]
mod finder;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use config::{Severity, Snapshot};
use outrigger_control::{
    cluster, endpoint, listener,
    model::{Mesh, Node, Proxy, Resource, Settings},
    route,
};
use proto::envoy::config::core::v3::Node as EnvoyNode;
use serde_json::{Value, json};

/// MeshConfig that every scenario's own is set on top of.
const BASE_MESH: &str = "defaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012'}\ntrustDomain: cluster.local\nrootNamespace: istio-system\n";

/// The folder of captures; `None` (and a line in the log) where it is missing. In CI it must be there.
pub(crate) fn data() -> Option<PathBuf> {
    finder::conformance("istiod-xds")
}

pub(crate) struct Scenario {
    pub(crate) name: String,
    dir: PathBuf,
    pub(crate) mesh: Mesh,
}

impl Scenario {
    /// All scenarios, by name.
    pub(crate) fn all(root: &Path) -> Vec<Self> {
        let mut dirs: Vec<_> = fs::read_dir(root)
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| p.join("input.yaml").exists())
            .collect();
        dirs.sort();
        dirs.into_iter().map(|dir| Self::read(root, dir)).collect()
    }

    fn read(root: &Path, dir: PathBuf) -> Self {
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let own = text(&dir.join("mesh.yaml"));
        // A duplicate key would be an error: what the scenario says stands instead of the base's line.
        let says = |key: &str| own.lines().any(|l| l.starts_with(&format!("{key}:")));
        let base: String = BASE_MESH
            .lines()
            .filter(|l| !says(l.split(':').next().unwrap_or_default()))
            .map(|l| format!("{l}\n"))
            .collect();
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": base + &own},
        });
        let (objects, input, config) = (
            text(&root.join("mesh.yaml")),
            text(&dir.join("input.yaml")),
            map.to_string(),
        );
        let files = [
            (Path::new("mesh.yaml"), objects.as_str()),
            (Path::new("input.yaml"), input.as_str()),
            (Path::new("config.json"), config.as_str()),
        ];
        let (snapshot, problems) = Snapshot::from_texts(files);
        let errors: Vec<_> = problems
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .collect();
        assert!(errors.is_empty(), "{}: {}", dir.display(), errors[0]);
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        Self {
            name,
            dir,
            mesh: Mesh::new(Arc::new(snapshot), Settings::default(), None),
        }
    }

    /// The nodes, by pod: the proxy, and what istiod sent.
    pub(crate) fn nodes(&self) -> Vec<(String, Proxy, Value)> {
        let mut files: Vec<_> = fs::read_dir(&self.dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter_map(|n| Some(n.strip_suffix(".node.json")?.to_owned()))
            .collect();
        files.sort();
        let read = |name: String| -> Value {
            serde_json::from_str(&fs::read_to_string(self.dir.join(name)).unwrap()).unwrap()
        };
        files
            .into_iter()
            .map(|pod| {
                let node: EnvoyNode =
                    proto::json::from_value(&read(format!("{pod}.node.json"))).unwrap();
                let node = Arc::new(Node::parse(&node).unwrap());
                let proxy = Proxy::new(&self.mesh, node);
                let expected = read(format!("{pod}.json"));
                (pod, proxy, expected)
            })
            .collect()
    }

    /// One section of every node: pod, what istiod sent, what we make.
    pub(crate) fn translate(&self, section: &str) -> Vec<(String, Vec<Value>, Vec<Value>)> {
        self.nodes()
            .into_iter()
            .map(|(pod, proxy, expected)| {
                let want = expected
                    .get(section)
                    .and_then(Value::as_array)
                    .cloned()
                    .unwrap_or_default();
                let got = self.build(section, &proxy).iter().map(shown).collect();
                (pod, want, got)
            })
            .collect()
    }

    /// Everything that all nodes get.
    pub(crate) fn resources(&self) -> Vec<Resource> {
        let sections = ["clusters", "endpoints", "listeners", "routes"];
        let nodes = self.nodes();
        sections
            .iter()
            .flat_map(|s| nodes.iter().flat_map(|(_, p, _)| self.build(s, p)))
            .collect()
    }

    fn build(&self, section: &str, proxy: &Proxy) -> Vec<Resource> {
        match section {
            "clusters" => cluster::build(&self.mesh, proxy),
            "endpoints" => {
                // The capture asked for every outbound cluster, whatever its kind.
                let clusters = cluster::build(&self.mesh, proxy);
                let names = clusters
                    .iter()
                    .map(|c| c.name.as_str())
                    .filter(|n| n.starts_with("outbound|"));
                endpoint::build(&self.mesh, proxy, names)
            }
            "listeners" => listener::build(&self.mesh, proxy),
            "routes" => {
                let mut names = BTreeSet::new();
                for listener in listener::build(&self.mesh, proxy) {
                    route_names(&shown(&listener), &mut names);
                }
                route::build(&self.mesh, proxy, &names.into_iter().collect::<Vec<_>>())
            }
            other => panic!("no section {other}"),
        }
    }
}

fn shown(resource: &Resource) -> Value {
    assert!(!resource.name.is_empty());
    proto::json::any_to_value(&resource.any())
}

/// The route configurations that a listener asks for.
fn route_names(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            if let Some(name) = fields.get("routeConfigName").and_then(Value::as_str) {
                out.insert(name.to_owned());
            }
            fields.values().for_each(|v| route_names(v, out));
        }
        Value::Array(items) => items.iter().for_each(|v| route_names(v, out)),
        _ => {}
    }
}
