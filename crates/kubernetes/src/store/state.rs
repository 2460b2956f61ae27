//! All objects of the cluster as they are known now. No I/O: events in, updates out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use config::{
    AnyObject, Kind, ObjectKey, Problem, Severity, Snapshot, Update,
    decode::{self, Decoded},
};
use serde_json::Value;
use tracing::{error, info, warn};

use super::follow::{Followed, What};

/// The objects of all kinds, and the state that was last passed on.
#[derive(Debug)]
pub(super) struct State {
    kinds: BTreeMap<Kind, Objects>,
    dirty: bool,
    snapshot: Arc<Snapshot>,
    problems: Arc<Vec<Problem>>,
}

#[derive(Debug, Default)]
struct Objects {
    known: BTreeMap<Name, Entry>,
    /// A list that is under way.
    listing: Option<BTreeMap<Name, Entry>>,
    /// Whether there was ever a complete list.
    listed: bool,
}

type Name = (String, String);

#[derive(Debug, Default)]
struct Entry {
    version: String,
    /// The last good version.
    object: Option<AnyObject>,
    problems: Vec<Problem>,
}

impl State {
    /// With nothing but where MeshConfig will be.
    pub(super) fn new(kinds: &[Kind], nothing: Snapshot) -> Self {
        State {
            kinds: kinds.iter().map(|k| (*k, Objects::default())).collect(),
            dirty: true,
            snapshot: Arc::new(nothing),
            problems: Arc::default(),
        }
    }

    /// Whether every kind has been listed.
    pub(super) fn is_complete(&self) -> bool {
        self.kinds.values().all(|k| k.listed)
    }

    /// The kinds that have not been listed yet.
    pub(super) fn missing(&self) -> impl Iterator<Item = Kind> {
        self.kinds
            .iter()
            .filter(|(_, o)| !o.listed)
            .map(|(k, _)| *k)
    }

    /// Takes an event in.
    pub(super) fn apply(&mut self, event: Followed) {
        let Followed { kind, what } = event;
        let Some(objects) = self.kinds.get_mut(&kind) else {
            return;
        };
        match what {
            What::Listing => objects.listing = Some(BTreeMap::new()),
            What::Listed(value) => {
                let Some((name, entry)) = entry(kind, &value, &objects.known) else {
                    return;
                };
                objects.listing.get_or_insert_default().insert(name, entry);
            }
            What::Complete => {
                let listed = objects.listing.take().unwrap_or_default();
                self.dirty |= !same(&objects.known, &listed) || !objects.listed;
                objects.known = listed;
                objects.listed = true;
            }
            What::Changed(value) => {
                let Some((name, entry)) = entry(kind, &value, &objects.known) else {
                    return;
                };
                // Written back status, a node's heartbeat: a new version with nothing new for us.
                let same = objects.known.get(&name).is_some_and(|o| o.is(&entry));
                objects.known.insert(name, entry);
                self.dirty |= !same;
            }
            What::Gone { namespace, name } => {
                self.dirty |= objects.known.remove(&(namespace, name)).is_some();
            }
        }
    }

    /// What differs from the last update, if anything does.
    pub(super) fn update(&mut self) -> Option<Update> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        let entries = || self.kinds.values().flat_map(|o| o.known.values());
        let objects = entries().filter_map(|e| e.object.clone());
        let (snapshot, more) = Snapshot::of_cluster(objects, &self.snapshot);
        let mut problems: Vec<Problem> = entries().flat_map(|e| e.problems.clone()).collect();
        problems.extend(more);
        tell(&self.problems, &problems);
        let changed: BTreeSet<ObjectKey> = snapshot.changed_since(&self.snapshot);
        if changed.is_empty() && *self.problems == problems {
            return None;
        }
        self.snapshot = Arc::new(snapshot);
        self.problems = Arc::new(problems);
        Some(Update {
            changed,
            ..self.current()
        })
    }

    /// The last update, with nothing changed.
    pub(super) fn current(&self) -> Update {
        Update {
            snapshot: self.snapshot.clone(),
            changed: BTreeSet::new(),
            problems: self.problems.clone(),
        }
    }
}

impl Entry {
    fn is(&self, other: &Entry) -> bool {
        let same = match (&self.object, &other.object) {
            (Some(a), Some(b)) => a.same_content(b),
            (None, None) => true,
            _ => false,
        };
        same && self.problems == other.problems
    }
}

/// The object with its last good version. A relist brings the same versions again: those are not read twice.
fn entry(kind: Kind, value: &Value, known: &BTreeMap<Name, Entry>) -> Option<(Name, Entry)> {
    let metadata = value.get("metadata")?;
    let text = |field: &str| {
        let found = metadata.get(field).and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    let name = (text("namespace"), text("name"));
    if name.1.is_empty() {
        return None;
    }
    let version = text("resourceVersion");
    let old = known.get(&name);
    if let Some(old) = old.filter(|o| !version.is_empty() && o.version == version) {
        let entry = Entry {
            version,
            object: old.object.clone(),
            problems: old.problems.clone(),
        };
        return Some((name, entry));
    }
    let origin = match name.0.as_str() {
        "" => format!("cluster:{kind}/{}", name.1),
        namespace => format!("cluster:{kind}/{namespace}/{}", name.1),
    };
    let origin: Arc<Path> = Path::new(&origin).into();
    // Heartbeats and reports make new versions without new content: the content alone says whether something changed.
    let mut value = value.clone();
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        metadata.remove("resourceVersion");
    }
    let Decoded {
        mut objects,
        mut problems,
    } = decode::value(&value, &origin);
    let mut object = objects.pop();
    match (&object, old.and_then(|o| o.object.clone())) {
        (None, Some(last)) => {
            for p in &mut problems {
                if p.severity == Severity::Error {
                    p.message.push_str("; the last good version stays in force");
                }
            }
            object = Some(last);
        }
        // The same object in memory tells everyone that nothing happened to it.
        (Some(new), Some(last)) if last.same_content(new) => object = Some(last),
        _ => {}
    }
    Some((
        name,
        Entry {
            version,
            object,
            problems,
        },
    ))
}

fn same(a: &BTreeMap<Name, Entry>, b: &BTreeMap<Name, Entry>) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|((an, a), (bn, b))| an == bn && a.is(b))
}

fn tell(old: &[Problem], new: &[Problem]) {
    for p in new.iter().filter(|p| !old.contains(p)) {
        match p.severity {
            Severity::Error => error!("{p}"),
            Severity::Warning => warn!("{p}"),
        }
    }
    for p in old.iter().filter(|p| !new.contains(p)) {
        info!("no longer: {p}");
    }
}
