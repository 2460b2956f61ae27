//! What routes attach to: listeners of Gateways, or services of the mesh; and why one may not.

use std::collections::BTreeSet;

use config::{
    Kind, Object, ObjectKey,
    gateway_api::{GROUP, ParentReference},
};

use super::{
    Fault, Inputs,
    listener::{Attachable, Listeners},
};
use crate::model::host;

/// Where a route is attached, or would be.
#[derive(Debug, Clone)]
pub(super) struct Attachment {
    /// As the route names it.
    pub(super) reference: ParentReference,
    pub(super) to: To,
    pub(super) denied: Option<Fault>,
}

/// A parent.
#[derive(Debug, Clone)]
pub(super) enum To {
    /// A listener, and the hostnames of other listeners of its port and protocol: hosts that those fit better are not its.
    Listener {
        object: ObjectKey,
        listener: Box<Attachable>,
        others: BTreeSet<String>,
    },
    /// A service of the mesh, by its hosts.
    Mesh(Vec<String>),
}

impl To {
    pub(super) fn is_mesh(&self) -> bool {
        matches!(self, To::Mesh(_))
    }

    /// The gateway's name in a VirtualService.
    pub(super) fn internal(&self) -> &str {
        match self {
            To::Listener { listener, .. } => &listener.internal,
            To::Mesh(_) => crate::model::MESH,
        }
    }

    /// Whether a host of a route is served here, and not by a listener that fits it better.
    pub(super) fn takes_host(&self, hostname: &str) -> bool {
        let To::Listener {
            listener, others, ..
        } = self
        else {
            return true;
        };
        let own = listener.hostname.as_str();
        if !own.is_empty() && !host::is_wildcard(own) {
            return true;
        }
        if !own.is_empty() && !host::matches(hostname, own) {
            return false;
        }
        !others
            .iter()
            .any(|other| own.len() <= other.len() && host::subset_of(hostname, other))
    }
}

/// All parents.
pub(super) struct Parents<'a> {
    inputs: &'a Inputs<'a>,
    listeners: &'a Listeners,
}

/// A route as far as attaching it is concerned.
pub(super) struct Route<'a> {
    pub(super) kind: Kind,
    pub(super) namespace: &'a str,
    pub(super) hostnames: &'a [String],
    pub(super) references: &'a [ParentReference],
}

impl<'a> Parents<'a> {
    pub(super) fn new(inputs: &'a Inputs<'a>, listeners: &'a Listeners) -> Self {
        Parents { inputs, listeners }
    }

    /// Everything that a route names and that is ours.
    pub(super) fn of(&self, route: &Route<'_>) -> Vec<Attachment> {
        let mut out = Vec::new();
        for reference in route.references {
            let namespace = reference.namespace.as_deref().unwrap_or(route.namespace);
            match (reference.group(), reference.kind()) {
                (GROUP, "Gateway") => {
                    self.listeners_of(
                        Kind::KubernetesGateway,
                        namespace,
                        reference,
                        route,
                        &mut out,
                    );
                }
                (GROUP, "ListenerSet") => {
                    self.listeners_of(Kind::ListenerSet, namespace, reference, route, &mut out);
                }
                ("" | "core", "Service") => {
                    out.push(self.service(namespace, reference));
                }
                ("networking.istio.io", "ServiceEntry") => {
                    out.push(self.service_entry(namespace, reference));
                }
                // Somebody else's.
                _ => {}
            }
        }
        out.sort_by_cached_key(|a| sort_key(&a.reference, route.namespace));
        out
    }

    fn listeners_of(
        &self,
        kind: Kind,
        namespace: &str,
        reference: &ParentReference,
        route: &Route<'_>,
        out: &mut Vec<Attachment>,
    ) {
        let key = ObjectKey::new(kind, namespace, &*reference.name);
        let Some(all) = self.listeners.attachable.get(&key) else {
            return;
        };
        for (i, listener) in all.iter().enumerate() {
            let others = all
                .iter()
                .enumerate()
                .filter(|(j, o)| {
                    *j != i && o.port == listener.port && o.protocol == listener.protocol
                })
                .map(|(_, o)| o.hostname.clone())
                .filter(|h| *h != listener.hostname)
                .collect();
            out.push(Attachment {
                reference: reference.clone(),
                denied: denied(listener, reference, route),
                to: To::Listener {
                    object: key.clone(),
                    listener: Box::new(listener.clone()),
                    others,
                },
            });
        }
    }

    fn service(&self, namespace: &str, reference: &ParentReference) -> Attachment {
        let found = self
            .inputs
            .snapshot
            .services
            .get(namespace, &reference.name);
        let host = self.inputs.service_host(&reference.name, namespace);
        let section = reference.section_name.as_deref();
        let denied = match (found, section) {
            (None, _) => Some(format!("parent service: {:?} not found", reference.name)),
            (Some(service), Some(section))
                if !service.spec.spec.ports.iter().any(|p| p.name == section) =>
            {
                Some(format!("sectionName {section:?} not found"))
            }
            _ => None,
        };
        Attachment {
            reference: reference.clone(),
            to: To::Mesh(vec![host]),
            denied: denied.map(|message| Fault::new("NoMatchingParent", message)),
        }
    }

    fn service_entry(&self, namespace: &str, reference: &ParentReference) -> Attachment {
        let table = &self.inputs.snapshot.service_entries;
        let found = table.get(namespace, &reference.name);
        let missing = || {
            Fault::new(
                "NoMatchingParent",
                format!("parent service entry: {:?} not found", reference.name),
            )
        };
        Attachment {
            reference: reference.clone(),
            to: To::Mesh(
                found
                    .map(|o: &std::sync::Arc<Object<_>>| o.spec.hosts.clone())
                    .unwrap_or_default(),
            ),
            denied: found.is_none().then(missing),
        }
    }
}

/// Why a route may not attach to a listener.
fn denied(listener: &Attachable, reference: &ParentReference, route: &Route<'_>) -> Option<Fault> {
    if let Some(port) = reference.port
        && port != listener.port
    {
        return Some(Fault::new(
            "NoMatchingParent",
            format!("port {port} not found"),
        ));
    }
    if let Some(section) = &reference.section_name
        && !section.is_empty()
        && *section != listener.name
    {
        return Some(Fault::new(
            "NoMatchingParent",
            format!("sectionName {section:?} not found"),
        ));
    }
    let everything = ["*".to_owned()];
    let hostnames = if route.hostnames.is_empty() {
        &everything[..]
    } else {
        route.hostnames
    };
    let (mut by_host, mut by_both) = (false, false);
    for wanted in hostnames {
        for own in &listener.hosts {
            let (namespace, own) = own.split_once('/').unwrap_or(("*", own));
            if host::matches(own, wanted) {
                by_host = true;
                by_both |= namespace == "*" || namespace == route.namespace;
            }
        }
    }
    if !by_both {
        return Some(if by_host {
            Fault::new(
                "NotAllowedByListeners",
                format!(
                    "hostnames matched parent hostname {:?}, but namespace {:?} is not allowed by the parent",
                    listener.hostname, route.namespace
                ),
            )
        } else {
            Fault::new(
                "NoMatchingListenerHostname",
                format!(
                    "no hostnames matched parent hostname {:?}",
                    listener.hostname
                ),
            )
        });
    }
    (!listener.kinds.contains(&route.kind.name())).then(|| {
        Fault::new(
            "NotAllowedByListeners",
            format!("kind {} is not allowed", route.kind),
        )
    })
}

/// The order in which parents are worked on: that of their full names.
fn sort_key(reference: &ParentReference, namespace: &str) -> String {
    format!(
        "{}/{}/{}/{}/{}.{}",
        reference.group(),
        reference.kind(),
        reference.name,
        reference.section_name.as_deref().unwrap_or_default(),
        reference.port.unwrap_or(0),
        reference.namespace.as_deref().unwrap_or(namespace)
    )
}
