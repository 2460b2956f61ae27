//! Gateways and whose they are: of all pods with some labels (Istio's), or of the pods of some services (Gateway API's).

use std::sync::Arc;

use config::{Kind, Object, labels_match};
use proto::istio::networking::v1alpha3::Gateway;

use super::{Labels, Origin, Proxy};

/// A Gateway as translation reads it.
#[derive(Debug, Clone)]
pub struct BoundGateway {
    /// The object; made of a listener for Gateway API.
    pub object: Arc<Object<Gateway>>,
    /// What it was made of: first what it is about.
    pub from: Vec<Origin>,
    /// Whose it is.
    pub binding: Binding,
}

/// Whose a Gateway is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binding {
    /// Of all pods that its own selector takes.
    Selector,
    /// Of the pods of services.
    Service(ServiceBinding),
}

/// Whose a Gateway of Gateway API is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceBinding {
    /// Host names of the services.
    pub hosts: Vec<String>,
    /// Their namespace.
    pub namespace: String,
    /// The account of the pods, where we made them.
    pub service_account: Option<String>,
}

impl BoundGateway {
    /// One of Istio's own.
    pub fn selecting(object: Arc<Object<Gateway>>) -> Self {
        BoundGateway {
            from: vec![Origin::of(Kind::Gateway, &object)],
            object,
            binding: Binding::Selector,
        }
    }

    /// Whether its own selector takes a pod with these labels.
    pub fn selects(&self, labels: &Labels) -> bool {
        self.binding == Binding::Selector && labels_match(&self.object.spec.selector, labels)
    }

    /// Whether it is of this proxy.
    pub fn is_of(&self, proxy: &Proxy) -> bool {
        match &self.binding {
            Binding::Selector => self.selects(&proxy.labels),
            Binding::Service(service) => proxy
                .service_targets
                .iter()
                .any(|t| service.has(&t.service.hostname, &t.service.namespace)),
        }
    }
}

impl ServiceBinding {
    /// Whether a service is one of those.
    pub fn has(&self, hostname: &str, namespace: &str) -> bool {
        self.namespace == namespace && self.hosts.iter().any(|h| h == hostname)
    }
}
