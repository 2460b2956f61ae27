//! What every object has: its metadata, where it was read, and its name among all objects.

use std::{cmp::Ordering, collections::BTreeMap, fmt, path::Path, sync::Arc};

use serde::Deserialize;

use crate::Kind;

/// An object of a user: metadata, content and origin.
#[derive(Debug, Clone)]
pub struct Object<T> {
    /// `metadata`.
    pub meta: Meta,
    /// For Istio's kinds the message under `spec`; for Kubernetes' own a struct with `spec` and `status`.
    pub spec: T,
    /// Where it was read.
    pub source: Source,
}

/// `metadata` of a Kubernetes object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Empty for objects that belong to no namespace; `default` where the user gave none.
    pub namespace: String,
    /// Unique for its kind in its namespace.
    pub name: String,
    /// Labels; sorted.
    #[serde(deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    /// Annotations; sorted.
    #[serde(deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
    /// Seconds since the epoch; `None` where the object was never in a cluster.
    #[serde(deserialize_with = "crate::time::optional")]
    pub creation_timestamp: Option<i64>,
    /// Seconds since the epoch; set while the object is going away.
    #[serde(deserialize_with = "crate::time::optional")]
    pub deletion_timestamp: Option<i64>,
    /// As the cluster gave it, or empty.
    pub uid: String,
    /// As the cluster gave it; a hash of the content where there was none.
    pub resource_version: String,
    /// As the cluster gave it, or 0.
    pub generation: i64,
    /// Who owns the object.
    #[serde(deserialize_with = "null_as_default")]
    pub owner_references: Vec<OwnerReference>,
}

/// One element of `metadata.ownerReferences`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OwnerReference {
    /// e.g. `apps/v1`.
    pub api_version: String,
    /// e.g. `ReplicaSet`.
    pub kind: String,
    /// The owner's name.
    pub name: String,
    /// Whether the owner is the controller of the object.
    pub controller: bool,
}

/// Where an object was read.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Source {
    /// The file, or a word for what is not one (`derived`, `default`).
    pub file: Arc<Path>,
    /// 1-based line of the object's first line; 0 where there is none.
    pub line: u32,
}

impl Source {
    /// The origin of an object that this program made up itself.
    pub fn derived(word: &str) -> Self {
        Source {
            file: Path::new(word).into(),
            line: 0,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}", self.file.display()),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

/// The name of an object among all objects.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace, empty where the kind has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ObjectKey {
    /// The key of `kind` `namespace/name`.
    pub fn new(kind: Kind, namespace: impl Into<String>, name: impl Into<String>) -> Self {
        ObjectKey {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectKey {
    /// As in `VirtualService default/reviews`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl<T> Object<T> {
    /// Istio's order among objects that compete: the older first, then by name, then by namespace. Objects without a
    /// creation time count as equally old (and older than all others), so that a folder has a stable order too.
    pub fn by_age(&self, other: &Self) -> Ordering {
        let key = |o: &'_ Self| o.meta.creation_timestamp.unwrap_or(0);
        key(self)
            .cmp(&key(other))
            .then_with(|| self.meta.name.cmp(&other.meta.name))
            .then_with(|| self.meta.namespace.cmp(&other.meta.namespace))
    }
}

/// Whether `labels` has every pair of `selector`; an empty selector matches everything.
pub fn labels_match<'a>(
    selector: impl IntoIterator<Item = (&'a String, &'a String)>,
    labels: &BTreeMap<String, String>,
) -> bool {
    selector.into_iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// Kubernetes writes `null` for empty lists and maps.
pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
