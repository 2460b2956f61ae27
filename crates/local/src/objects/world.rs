//! Everything that the folder asks for, completed: what runs, what the node routes and what the control plane reads.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::Ipv4Addr,
    path::PathBuf,
};

use serde_json::{Value, json};

use super::{
    Key, admission, at, at_mut,
    builtin::{self, Folders},
    document::{Document, SourceFile, without_documents},
    key, list,
    service::Service,
    text, workload,
};
use crate::node::{
    dns::Answer,
    network::{POD_RANGE, SERVICE_RANGE},
};

/// A pod that should run.
#[derive(Clone, Debug)]
pub(crate) struct PodPlan {
    pub(crate) key: Key,
    /// `kind/name` of its workload.
    pub(crate) workload: String,
    /// The Pod with sidecar, without status.
    pub(crate) object: Value,
    pub(crate) address: Ipv4Addr,
    /// A number for its card on the node, never used twice.
    pub(crate) index: u32,
    /// Changes with what the user wrote, not with the mesh's settings: a change of those restarts no pod.
    pub(crate) fingerprint: u64,
}

/// The completed folder.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// The user's files, without the documents that are completed elsewhere.
    pub(crate) files: BTreeMap<PathBuf, String>,
    /// Completed objects by file name; pods are written by whoever knows their status.
    pub(crate) objects: BTreeMap<PathBuf, Value>,
    pub(crate) pods: BTreeMap<Key, PodPlan>,
    pub(crate) services: Vec<Service>,
    pub(crate) slices: Vec<Value>,
    pub(crate) config_maps: HashMap<Key, Value>,
    pub(crate) secrets: HashMap<Key, Value>,
    /// Hosts of ServiceEntries.
    pub(crate) entry_names: HashMap<String, Answer>,
    pub(crate) problems: Vec<String>,
}

/// Builds worlds one after the other, so that addresses and the last good content of a file survive an edit.
#[derive(Debug)]
pub(crate) struct Builder {
    folders: Folders,
    last_good: HashMap<PathBuf, Vec<Document>>,
    pod_addresses: HashMap<Key, u32>,
    service_addresses: HashMap<Key, Ipv4Addr>,
    next_pod: u32,
    next_service: u32,
    next_index: u32,
}

impl Builder {
    /// For a mesh with these folders.
    pub(crate) fn new(folders: Folders) -> Self {
        Self {
            folders,
            last_good: HashMap::new(),
            pod_addresses: HashMap::new(),
            service_addresses: HashMap::new(),
            next_pod: 2,
            next_service: 256,
            next_index: 0,
        }
    }

    /// The world of these files; pods whose template did not change are `previous`'s.
    pub(crate) fn build(&mut self, files: &[SourceFile], previous: &World) -> World {
        let mut world = World::default();
        let documents = self.documents(files, &mut world);
        world.config_maps = index(&documents, "ConfigMap");
        world.secrets = index(&documents, "Secret");
        let istio = ("istio-system".to_owned(), "istio".to_owned());
        let mesh_map = world.config_maps.get(&istio).cloned();
        let mesh = builtin::mesh_settings(mesh_map.as_ref()).unwrap_or_else(|e| {
            world
                .problems
                .push(format!("ConfigMap istio-system/istio: {e}"));
            builtin::mesh_defaults()
        });
        let (settings, problems) = admission::settings(&mesh);
        world.problems.extend(
            problems
                .into_iter()
                .map(|e| format!("ConfigMap istio-system/istio: {e}")),
        );
        let mesh_map = builtin::mesh_config_map(mesh_map.as_ref(), &mesh);
        world.objects.insert("istio.yaml".into(), mesh_map.clone());
        world.config_maps.insert(istio, mesh_map);

        let namespaces: HashMap<String, Value> = documents
            .iter()
            .filter(|d| text(&d.value, &["kind"]) == "Namespace")
            .map(|d| (key(&d.value).1, d.value["metadata"]["labels"].clone()))
            .collect();
        for document in &documents {
            let object = &document.value;
            match text(object, &["kind"]) {
                "Service" => self.service(document, &mut world),
                "EndpointSlice" => world.slices.push(object.clone()),
                "ServiceEntry" => entry_names(object, &mut world.entry_names),
                _ if workload::is_workload(object) => {
                    self.workload(document, &namespaces, &settings, previous, &mut world);
                }
                _ => {}
            }
        }
        world
    }

    /// Every object once: the user's, then those built in that the user did not replace.
    fn documents(&mut self, files: &[SourceFile], world: &mut World) -> Vec<Document> {
        let mut all: Vec<Document> = Vec::new();
        for file in files {
            match &file.documents {
                Ok(documents) => {
                    let taken: Vec<_> = documents
                        .iter()
                        .filter(|d| is_completed(&d.value))
                        .map(|d| d.lines)
                        .collect();
                    // A List that holds one completed item is taken out whole; its other items are written beside.
                    for d in documents
                        .iter()
                        .filter(|d| taken.contains(&d.lines) && !is_completed(&d.value))
                    {
                        let (namespace, name) = key(&d.value);
                        let kind = text(&d.value, &["kind"]).to_ascii_lowercase();
                        world.objects.insert(
                            format!("{kind}.{namespace}.{name}.yaml").into(),
                            d.value.clone(),
                        );
                    }
                    world
                        .files
                        .insert(file.path.clone(), without_documents(&file.text, &taken));
                    self.last_good.insert(file.path.clone(), documents.clone());
                    all.extend(documents.iter().cloned());
                }
                Err(error) => {
                    // The control plane gets to see it too, keeps what it had, and names the same line.
                    world.files.insert(file.path.clone(), file.text.clone());
                    world
                        .problems
                        .push(format!("{error} (the last good version stays in force)"));
                    all.extend(
                        self.last_good
                            .get(&file.path)
                            .into_iter()
                            .flatten()
                            .cloned(),
                    );
                }
            }
        }
        self.last_good
            .retain(|path, _| files.iter().any(|f| f.path == *path));
        let mut seen: HashMap<(String, Key), (PathBuf, usize)> = HashMap::new();
        let identity = |v: &Value| {
            let mut k = key(v);
            if matches!(text(v, &["kind"]), "Namespace" | "Node") {
                k.0.clear();
            }
            (
                format!(
                    "{}/{}",
                    text(v, &["apiVersion"]).split('/').next().unwrap_or(""),
                    text(v, &["kind"])
                ),
                k,
            )
        };
        all.retain(|d| {
            let id = identity(&d.value);
            if let Some((file, line)) = seen.get(&id) {
                world.problems.push(format!(
                    "{}:{}: {} {}/{} stands in {}:{line} already; that one is used",
                    d.file.display(),
                    d.lines.0,
                    text(&d.value, &["kind"]),
                    id.1.0,
                    id.1.1,
                    file.display(),
                ));
                return false;
            }
            seen.insert(id, (d.file.clone(), d.lines.0));
            true
        });
        for object in builtin::objects(&self.folders) {
            if seen.contains_key(&identity(&object)) {
                continue;
            }
            if !is_completed(&object) {
                let kind = text(&object, &["kind"]).to_ascii_lowercase();
                world.objects.insert(
                    format!("{kind}.{}.yaml", key(&object).1).into(),
                    object.clone(),
                );
            }
            all.push(Document {
                file: "(built in)".into(),
                lines: (1, 1),
                value: object,
            });
        }
        all
    }

    fn service(&mut self, document: &Document, world: &mut World) {
        let allocate = |key: &Key| {
            if let Some(known) = self.service_addresses.get(key) {
                return *known;
            }
            let used: HashSet<_> = self.service_addresses.values().copied().collect();
            loop {
                self.next_service += 1;
                let address = Ipv4Addr::from(u32::from(SERVICE_RANGE) + self.next_service);
                if !used.contains(&address) {
                    self.service_addresses.insert(key.clone(), address);
                    return address;
                }
            }
        };
        match Service::complete(document.value.clone(), allocate) {
            Ok(service) => {
                if let Some(address) = service.address {
                    self.service_addresses.insert(service.key.clone(), address);
                }
                let name = format!("service.{}.{}.yaml", service.key.0, service.key.1);
                world.objects.insert(name.into(), service.object.clone());
                world.services.push(service);
            }
            Err(message) => world.problems.push(at_line(document, &message)),
        }
    }

    fn workload(
        &mut self,
        document: &Document,
        namespaces: &HashMap<String, Value>,
        settings: &inject::Settings,
        previous: &World,
        world: &mut World,
    ) {
        let templates = match workload::expand(&document.value) {
            Ok(templates) => templates,
            Err(message) => return world.problems.push(at_line(document, &message)),
        };
        if text(&document.value, &["kind"]) == "CronJob" {
            world.problems.push(at_line(
                document,
                "a CronJob is run once, at the start: schedules are not kept here",
            ));
        }
        for template in templates {
            let pod_key = key(&template.pod);
            let labels = namespaces.get(&pod_key.0).cloned().unwrap_or(Value::Null);
            let fingerprint = workload::fingerprint(format!("{labels}{}", template.pod).as_bytes());
            if world.pods.contains_key(&pod_key) {
                let message = format!(
                    "a pod {}/{} exists already: rename one of the workloads",
                    pod_key.0, pod_key.1
                );
                world.problems.push(at_line(document, &message));
                continue;
            }
            if let Some(old) = previous
                .pods
                .get(&pod_key)
                .filter(|p| p.fingerprint == fingerprint)
            {
                world.pods.insert(pod_key, old.clone());
                continue;
            }
            let workload = template.workload.clone();
            let mut object = match admission::admit(template.pod, &labels, settings) {
                Ok(object) => object,
                Err(message) => {
                    world.problems.push(at_line(document, &message));
                    // The old pod goes on, as it would where the webhook refuses the new one.
                    if let Some(old) = previous.pods.get(&pod_key) {
                        world.pods.insert(pod_key, old.clone());
                    }
                    continue;
                }
            };
            let uid = workload::uid(&[&pod_key.0, &pod_key.1, &fingerprint.to_string()]);
            *at_mut(&mut object, &["metadata", "uid"]) = json!(uid);
            let address = self.pod_address(&pod_key);
            self.next_index += 1;
            let plan = PodPlan {
                key: pod_key.clone(),
                workload,
                object,
                address,
                index: self.next_index,
                fingerprint,
            };
            world.pods.insert(pod_key, plan);
        }
    }

    fn pod_address(&mut self, key: &Key) -> Ipv4Addr {
        let number = *self.pod_addresses.entry(key.clone()).or_insert_with(|| {
            self.next_pod += 1;
            self.next_pod - 1
        });
        Ipv4Addr::from(u32::from(POD_RANGE) + number)
    }
}

/// Whether an object is written in completed form, in a file of its own.
fn is_completed(object: &Value) -> bool {
    let kind = text(object, &["kind"]);
    kind == "Service"
        || workload::is_workload(object)
        || (kind == "ConfigMap" && key(object) == ("istio-system".to_owned(), "istio".to_owned()))
}

fn index(documents: &[Document], kind: &str) -> HashMap<Key, Value> {
    documents
        .iter()
        .filter(|d| text(&d.value, &["kind"]) == kind)
        .map(|d| (key(&d.value), d.value.clone()))
        .collect()
}

fn at_line(document: &Document, message: &str) -> String {
    let (namespace, name) = key(&document.value);
    let kind = text(&document.value, &["kind"]);
    format!(
        "{}:{}: {kind} {namespace}/{name}: {message}",
        document.file.display(),
        document.lines.0
    )
}

/// What the hosts of a ServiceEntry resolve to: its address, else its endpoints', else one that leads nowhere but is
/// captured by a sidecar, as Istio's own automatic addresses are.
fn entry_names(entry: &Value, names: &mut HashMap<String, Answer>) {
    let addresses: Vec<Ipv4Addr> = list(entry, &["spec", "addresses"])
        .iter()
        .filter_map(|a| a.as_str()?.trim_end_matches("/32").parse().ok())
        .collect();
    let endpoints: Vec<&str> = list(entry, &["spec", "endpoints"])
        .iter()
        .filter_map(|e| at(e, &["address"]).as_str())
        .collect();
    let endpoint_addresses: Vec<Ipv4Addr> =
        endpoints.iter().filter_map(|e| e.parse().ok()).collect();
    for host in list(entry, &["spec", "hosts"])
        .iter()
        .filter_map(Value::as_str)
    {
        let host = host.to_ascii_lowercase();
        if host == "*" {
            continue;
        }
        let answer = if !addresses.is_empty() {
            Answer::Addresses(addresses.clone())
        } else if !endpoint_addresses.is_empty() {
            Answer::Addresses(endpoint_addresses.clone())
        } else if let Some(name) = endpoints
            .iter()
            .find(|e| e.contains('.') && !e.contains('/'))
        {
            Answer::Alias(name.to_ascii_lowercase())
        } else {
            let n = workload::fingerprint(host.as_bytes());
            Answer::Addresses(vec![Ipv4Addr::new(
                240,
                240,
                (n >> 8) as u8,
                (n as u8).clamp(1, 254),
            )])
        };
        names.entry(host).or_insert(answer);
    }
}

#[cfg(test)]
mod tests;
