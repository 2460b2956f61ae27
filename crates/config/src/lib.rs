//! The objects of the user: Kubernetes', Istio's and Gateway API's, read from files and kept as snapshots.
//!
//! [`yaml`] parses text and remembers lines, [`decode`] turns documents into typed [`Object`]s, [`validate`] holds the
//! rules of each kind, [`Snapshot`] is all objects at one moment (with [`mesh`]'s MeshConfig and the EndpointSlices that
//! Kubernetes would derive). [`folder`] is the store that reads a folder and watches it. Precedence among objects that compete is [`Object::by_age`].

mod assemble;
pub mod decode;
mod endpoints;
pub mod folder;
pub mod gateway_api;
mod go;
mod kinds;
pub mod kubernetes;
pub mod mesh;
mod object;
mod problem;
pub mod time;
pub mod validate;
pub mod yaml;

pub use assemble::{DEFAULT_ROOT_NAMESPACE, MESH_CONFIG_MAP};
pub use folder::{Folder, Update, Watch};
pub use go::duration_nanos;
pub use kinds::{AnyObject, Kind, Snapshot, Table};
pub use object::{Meta, Object, ObjectKey, OwnerReference, Source, labels_match};
pub use problem::{Problem, Severity};
