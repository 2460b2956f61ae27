//! Objects in reading order → a snapshot: duplicates, MeshConfig and derived EndpointSlices.

use std::{collections::HashMap, path::Path, sync::Arc};

use serde_json::{Map, Value};

use crate::{
    AnyObject, Kind, Object, ObjectKey, Problem, Severity, Snapshot, decode, endpoints,
    kubernetes::ConfigMap, mesh, yaml,
};

/// Where MeshConfig is looked for when nothing else is said.
pub const DEFAULT_ROOT_NAMESPACE: &str = "istio-system";
/// The ConfigMap that holds MeshConfig; that of a revision has its name behind a dash.
pub const MESH_CONFIG_MAP: &str = "istio";

impl Snapshot {
    /// A snapshot of these objects; of two with one name the first wins and the second is a problem. What did not
    /// change since `previous` is shared with it. A MeshConfig that cannot be read leaves the one of `previous`.
    /// Services without EndpointSlices get those that Kubernetes would write.
    pub fn assemble(
        objects: impl IntoIterator<Item = AnyObject>,
        previous: &Snapshot,
    ) -> (Snapshot, Vec<Problem>) {
        let (mut out, problems) = Self::collect(objects, previous);
        endpoints::derive(&mut out, previous);
        out.share(previous);
        (out, problems)
    }

    /// The same for the objects of a cluster, whose own controller writes the EndpointSlices.
    pub fn of_cluster(
        objects: impl IntoIterator<Item = AnyObject>,
        previous: &Snapshot,
    ) -> (Snapshot, Vec<Problem>) {
        let (mut out, problems) = Self::collect(objects, previous);
        out.share(previous);
        (out, problems)
    }

    fn collect(
        objects: impl IntoIterator<Item = AnyObject>,
        previous: &Snapshot,
    ) -> (Snapshot, Vec<Problem>) {
        let mut out = Snapshot::empty();
        let mut problems = Vec::new();
        let mut seen: HashMap<ObjectKey, AnyObject> = HashMap::new();
        for object in objects {
            let key = object.key();
            if let Some(first) = seen.get(&key) {
                if !first.ptr_eq(&object) {
                    problems.push(Problem {
                        severity: Severity::Error,
                        file: object.source().file.clone(),
                        line: object.source().line,
                        object: Some(key),
                        field: "metadata.name".into(),
                        message: format!(
                            "is also at {}, which stays in force; remove or rename one of the two",
                            first.source()
                        ),
                    });
                }
                continue;
            }
            seen.insert(key, object.clone());
            out.insert(object);
        }
        read_mesh(&mut out, previous, &mut problems);
        (out, problems)
    }

    /// A snapshot of some texts, each with the name that its problems carry.
    pub fn from_texts<'a>(
        texts: impl IntoIterator<Item = (&'a Path, &'a str)>,
    ) -> (Snapshot, Vec<Problem>) {
        let (mut objects, mut problems) = (Vec::new(), Vec::new());
        for (path, text) in texts {
            let file: Arc<Path> = path.into();
            for document in yaml::documents(text) {
                match document {
                    Ok(document) => {
                        let decoded = decode::document(&document, &file);
                        objects.extend(decoded.objects);
                        problems.extend(decoded.problems);
                    }
                    Err(e) => problems.push(syntax(&file, &e)),
                }
            }
        }
        let (out, more) = Snapshot::assemble(objects, &Snapshot::empty());
        problems.extend(more);
        (out, problems)
    }
}

pub(crate) fn syntax(file: &Arc<Path>, e: &yaml::YamlError) -> Problem {
    Problem {
        severity: Severity::Error,
        file: file.clone(),
        line: e.line,
        object: None,
        field: String::new(),
        message: e.message.clone(),
    }
}

fn read_mesh(out: &mut Snapshot, previous: &Snapshot, problems: &mut Vec<Problem>) {
    out.mesh_map = previous.mesh_map.clone();
    let (namespace, name) = &*previous.mesh_map;
    let Some(map) = out.config_maps.get(namespace, name).cloned() else {
        return;
    };
    let unchanged = previous
        .config_maps
        .get(namespace, name)
        .is_some_and(|old| old.spec.data == map.spec.data);
    let mut field = |key: &str, severity, message: String| {
        problems.push(Problem {
            severity,
            file: map.source.file.clone(),
            line: map.source.line,
            object: Some(ObjectKey::new(
                Kind::ConfigMap,
                &*map.meta.namespace,
                &*map.meta.name,
            )),
            field: format!("data.{key}"),
            message,
        });
    };
    // Every way out that is not a good new text leaves what was in force.
    out.mesh = previous.mesh.clone();
    out.networks = previous.networks.clone();
    match section(&map, mesh::MESH_KEY) {
        Ok(value) => match mesh::merge(&value) {
            Ok(read) => {
                for unknown in read.unknown {
                    let message = format!("unknown field {unknown} has no effect");
                    field(mesh::MESH_KEY, Severity::Warning, message);
                }
                if !unchanged {
                    out.mesh = Arc::new(read.config);
                }
            }
            Err(e) => field(mesh::MESH_KEY, Severity::Error, refused(&e)),
        },
        Err(message) => field(mesh::MESH_KEY, Severity::Error, message),
    }
    match section(&map, mesh::NETWORKS_KEY) {
        Ok(value) => match mesh::networks(&value) {
            Ok(networks) if !unchanged => out.networks = Arc::new(networks),
            Ok(_) => {}
            Err(e) => field(mesh::NETWORKS_KEY, Severity::Error, refused(&e)),
        },
        Err(message) => field(mesh::NETWORKS_KEY, Severity::Error, message),
    }
}

/// The YAML under a key; an empty object where there is none.
fn section(map: &Object<ConfigMap>, key: &str) -> Result<Value, String> {
    let text = map.spec.data.get(key).map_or("", String::as_str);
    match yaml::document(text, 1) {
        Ok(document) => Ok(document.map_or_else(|| Value::Object(Map::new()), |d| d.value)),
        Err(e) => Err(refused(&format!("line {} of it: {}", e.line, e.message))),
    }
}

fn refused(e: &dyn std::fmt::Display) -> String {
    format!("{e}; the last good settings stay in force")
}
