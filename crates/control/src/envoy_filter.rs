//! EnvoyFilter: the user's patches of what translation made.
//!
//! Patches are read once for a state of the mesh ([`EnvoyFilters`]). Where some are for a proxy, the finished resources
//! are taken apart again, patched and put together; where none are, nothing of this runs. The order is: by priority,
//! the root namespace's before the proxy's own, the older first.

mod cluster;
mod listener;
mod route;

pub(crate) use cluster::clusters;
pub(crate) use listener::{added_listeners, listeners};
pub(crate) use route::routes;

use std::{collections::BTreeMap, sync::Arc};

use config::{Kind, Object, labels_match};
use prost::{Message, Name};
use proto::{
    envoy::{
        config::{
            cluster::v3::Cluster,
            listener::v3::{Filter, FilterChain, Listener, ListenerFilter},
            route::v3::{Route, RouteConfiguration, VirtualHost},
        },
        extensions::filters::network::http_connection_manager::v3::HttpFilter,
    },
    istio::networking::v1alpha3::{
        EnvoyFilter,
        envoy_filter::{
            ApplyTo, ClusterMatch, EnvoyConfigObjectMatch, EnvoyConfigObjectPatch, ListenerMatch,
            PatchContext, ProxyMatch, RouteConfigurationMatch,
            envoy_config_object_match::ObjectTypes, patch::Operation,
        },
    },
    merge::{self, Lists},
};
use regex::Regex;

use crate::model::{Mesh, Origin, Proxy, node::value_of};

/// One patch, read.
#[derive(Debug)]
pub(crate) struct Patch {
    pub apply_to: ApplyTo,
    pub operation: Operation,
    context: PatchContext,
    version: Option<Regex>,
    metadata: BTreeMap<String, String>,
    object: Option<ObjectTypes>,
    /// The value, encoded as the type that `apply_to` says.
    value: Vec<u8>,
    pub origin: Origin,
}

impl Patch {
    /// The value; `None` only if the type asked for is not that of `apply_to`.
    pub(crate) fn value<M: Message + Default>(&self) -> Option<M> {
        M::decode(self.value.as_slice()).ok()
    }

    /// Merges the value into a message.
    pub(crate) fn merge_into<M: Message + Name + Default>(&self, message: &mut M) {
        let lists = match self.operation {
            Operation::MergeAndReplaceList => Lists::Replace,
            _ => Lists::Append,
        };
        if let Some(merged) = merge::merge(message, &self.value, lists) {
            *message = merged;
        }
    }

    /// Whether it merges.
    pub(crate) fn merges(&self) -> bool {
        matches!(
            self.operation,
            Operation::Merge | Operation::MergeAndReplaceList
        )
    }

    /// Whether it is meant for resources of this context.
    pub(crate) fn is_for(&self, context: PatchContext) -> bool {
        self.context == context || self.context == PatchContext::Any
    }

    /// Whether it is meant for this context alone, and not for any.
    pub(crate) fn names_context(&self) -> bool {
        self.context != PatchContext::Any
    }

    /// What it asks of a cluster.
    pub(crate) fn cluster(&self) -> Option<&ClusterMatch> {
        match &self.object {
            Some(ObjectTypes::Cluster(m)) => Some(m),
            _ => None,
        }
    }

    /// What it asks of a listener.
    pub(crate) fn listener(&self) -> Option<&ListenerMatch> {
        match &self.object {
            Some(ObjectTypes::Listener(m)) => Some(m),
            _ => None,
        }
    }

    /// What it asks of a route configuration.
    pub(crate) fn routes(&self) -> Option<&RouteConfigurationMatch> {
        match &self.object {
            Some(ObjectTypes::RouteConfiguration(m)) => Some(m),
            _ => None,
        }
    }

    fn is_for_proxy(&self, proxy: &Proxy) -> bool {
        let version = proxy.node.meta("ISTIO_VERSION").unwrap_or_default();
        self.version
            .as_ref()
            .is_none_or(|r| !version.is_empty() && r.is_match(version))
            && self
                .metadata
                .iter()
                .all(|(key, value)| proxy.node.meta(key) == Some(value))
    }
}

/// All patches for one proxy, in order.
#[derive(Debug, Clone)]
pub(crate) struct Patches(Vec<Arc<Patch>>);

impl Patches {
    /// Those for one kind of thing.
    pub(crate) fn of(&self, apply_to: ApplyTo) -> impl Iterator<Item = &Arc<Patch>> {
        self.0.iter().filter(move |p| p.apply_to == apply_to)
    }
}

/// An object with its patches.
#[derive(Debug)]
struct Filters {
    object: Arc<Object<EnvoyFilter>>,
    patches: Vec<Arc<Patch>>,
}

/// All EnvoyFilters, read.
#[derive(Debug, Default)]
pub(crate) struct EnvoyFilters {
    root: String,
    /// By priority, root first, oldest first.
    all: Vec<Filters>,
}

impl EnvoyFilters {
    /// Reads the objects. A patch whose value is not what `applyTo` says is left out, with a line in the log that names
    /// object, place and field.
    pub(crate) fn new(mut objects: Vec<Arc<Object<EnvoyFilter>>>, root: &str) -> Self {
        objects.sort_by(|a, b| {
            let rank = |o: &Object<EnvoyFilter>| (o.spec.priority, o.meta.namespace != root);
            rank(a).cmp(&rank(b)).then_with(|| a.by_age(b))
        });
        let all = objects
            .into_iter()
            .map(|object| {
                let origin = Origin::of(Kind::EnvoyFilter, &object);
                let patches = object.spec.config_patches.iter().enumerate();
                let patches = patches
                    .filter_map(|(i, p)| read(p, i, &origin))
                    .map(Arc::new)
                    .collect();
                Filters { object, patches }
            })
            .collect();
        Self {
            root: root.to_owned(),
            all,
        }
    }

    /// Whether some patch is only for proxies that have a certain value of this metadata.
    pub(crate) fn asks_for_metadata(&self, key: &str) -> bool {
        self.all
            .iter()
            .flat_map(|f| &f.patches)
            .any(|p| p.metadata.contains_key(key))
    }

    /// The patches for a proxy; `None` where there are none.
    pub(crate) fn for_proxy(&self, proxy: &Proxy) -> Option<Patches> {
        let patches: Vec<_> = self
            .all
            .iter()
            .filter(|f| {
                let namespace = &f.object.meta.namespace;
                let selector = f.object.spec.workload_selector.as_ref();
                (*namespace == self.root || namespace == proxy.namespace())
                    && selector.is_none_or(|s| labels_match(&s.labels, &proxy.labels))
            })
            .flat_map(|f| &f.patches)
            .filter(|p| p.is_for_proxy(proxy))
            .cloned()
            .collect();
        (!patches.is_empty()).then_some(Patches(patches))
    }
}

/// The patches for a proxy; `None` where there are none.
pub(crate) fn patches(mesh: &Mesh, proxy: &Proxy) -> Option<Patches> {
    mesh.envoy_filters().for_proxy(proxy)
}

/// The context of what a proxy's own clients send: a gateway's only one, and a sidecar's outbound one.
pub(crate) fn outbound_context(proxy: &Proxy) -> PatchContext {
    if proxy.is_router() {
        PatchContext::Gateway
    } else {
        PatchContext::SidecarOutbound
    }
}

fn read(written: &EnvoyConfigObjectPatch, index: usize, origin: &Origin) -> Option<Patch> {
    let complain = |field: &str, message: &str| {
        tracing::warn!(
            "{origin}: spec.configPatches[{index}].{field}: {message}; the patch has no effect"
        );
    };
    let Some(patch) = &written.patch else {
        complain("patch", "is missing: say operation and value");
        return None;
    };
    let apply_to = written.apply_to();
    let name = match apply_to {
        ApplyTo::Listener => Listener::full_name(),
        ApplyTo::FilterChain => FilterChain::full_name(),
        ApplyTo::NetworkFilter => Filter::full_name(),
        ApplyTo::HttpFilter => HttpFilter::full_name(),
        ApplyTo::RouteConfiguration => RouteConfiguration::full_name(),
        ApplyTo::VirtualHost => VirtualHost::full_name(),
        ApplyTo::HttpRoute => Route::full_name(),
        ApplyTo::Cluster => Cluster::full_name(),
        ApplyTo::ListenerFilter => ListenerFilter::full_name(),
        ApplyTo::ExtensionConfig | ApplyTo::Bootstrap | ApplyTo::Invalid => {
            complain(
                "applyTo",
                "is not implemented (EXTENSION_CONFIG and BOOTSTRAP are not)",
            );
            return None;
        }
    };
    let value = match &patch.value {
        None => Vec::new(),
        Some(value) => match proto::json::value_to_encoded(&name, &value_of(value)) {
            Ok(bytes) => bytes,
            Err(e) => {
                complain("patch.value", &e.to_string());
                return None;
            }
        },
    };
    let inserts = matches!(
        patch.operation(),
        Operation::InsertAfter | Operation::InsertBefore | Operation::InsertFirst
    );
    let ordered = matches!(
        apply_to,
        ApplyTo::HttpFilter | ApplyTo::NetworkFilter | ApplyTo::HttpRoute | ApplyTo::ListenerFilter
    );
    // Where order means nothing, an insertion is an addition.
    let operation = if inserts && !ordered {
        Operation::Add
    } else {
        patch.operation()
    };
    let default = EnvoyConfigObjectMatch::default();
    let matching = written.r#match.as_ref().unwrap_or(&default);
    let none = ProxyMatch::default();
    let proxy = matching.proxy.as_ref().unwrap_or(&none);
    let version = match proxy.proxy_version.as_str() {
        "" => None,
        text => match Regex::new(text) {
            Ok(regex) => Some(regex),
            Err(e) => {
                complain("match.proxy.proxyVersion", &e.to_string());
                return None;
            }
        },
    };
    Some(Patch {
        apply_to,
        operation,
        context: matching.context(),
        version,
        metadata: proxy.metadata.clone(),
        object: matching.object_types.clone(),
        value,
        origin: origin.clone(),
    })
}

/// Inserts or replaces beside the first element that matches; whether one did.
pub(crate) fn place<T>(
    list: &mut Vec<T>,
    value: T,
    operation: Operation,
    matches: impl Fn(&T) -> bool,
) -> bool {
    let Some(at) = list.iter().position(matches) else {
        return false;
    };
    match operation {
        Operation::InsertBefore => list.insert(at, value),
        Operation::InsertAfter => list.insert(at + 1, value),
        Operation::InsertFirst => list.insert(0, value),
        Operation::Replace => list[at] = value,
        _ => return false,
    }
    true
}

/// Adds an origin once.
pub(crate) fn note(from: &mut Vec<Origin>, origin: &Origin) {
    if !from.contains(origin) {
        from.push(origin.clone());
    }
}
