//! Where things came from, and the encoded resource that remembers it.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use config::{Meta, Object, ObjectKey, Source};
use prost::{Message, Name};

/// The object behind a derived thing, and the file and line it was read from. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(Arc<(ObjectKey, Source)>);

impl Origin {
    /// The origin of what is derived from `object`, an object of `kind`.
    pub fn of<T>(kind: config::Kind, object: &Object<T>) -> Self {
        Self::named(kind, &object.meta, &object.source)
    }

    /// The same for an object of which only metadata and source are at hand.
    pub fn named(kind: config::Kind, meta: &Meta, source: &Source) -> Self {
        let key = ObjectKey::new(kind, &*meta.namespace, &*meta.name);
        Self(Arc::new((key, source.clone())))
    }

    /// The object's kind, namespace and name.
    pub fn key(&self) -> &ObjectKey {
        &self.0.0
    }

    /// The file and line.
    pub fn source(&self) -> &Source {
        &self.0.1
    }
}

impl fmt::Display for Origin {
    /// As in `VirtualService default/reviews (mesh.yaml:12)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.key(), self.source())
    }
}

/// One xDS resource: encoded once, its bytes shared by every proxy that gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub name: String,
    /// `type.googleapis.com/…`.
    pub type_url: String,
    pub value: Bytes,
    /// The objects that it was made from: first the one that it is about.
    pub from: Vec<Origin>,
}

impl Resource {
    /// Encodes `message`.
    pub fn new<M: Message + Name>(name: impl Into<String>, message: &M, from: Vec<Origin>) -> Self {
        Self {
            name: name.into(),
            type_url: M::type_url(),
            value: message.encode_to_vec().into(),
            from,
        }
    }

    /// The same as `google.protobuf.Any`.
    pub fn any(&self) -> proto::Any {
        proto::Any {
            type_url: self.type_url.clone(),
            value: self.value.to_vec(),
        }
    }
}
