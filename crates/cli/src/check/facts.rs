//! What is asked of a cluster, once.

use kubernetes::{Client, ClusterError, look};
use serde_json::Value;

use super::{label, text};

/// Everything that findings are made of.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    pub(crate) server: Option<look::Server>,
    pub(crate) nodes: Vec<Value>,
    pub(crate) namespaces: Vec<Value>,
    pub(crate) pods: Vec<Value>,
    pub(crate) services: Vec<Value>,
    pub(crate) slices: Vec<Value>,
    pub(crate) deployments: Vec<Value>,
    pub(crate) daemon_sets: Vec<Value>,
    pub(crate) definitions: Vec<Value>,
    pub(crate) mutating: Vec<Value>,
    pub(crate) validating: Vec<Value>,
}

impl Facts {
    /// Asks for all of it.
    pub(crate) async fn ask(client: &Client) -> Result<Self, ClusterError> {
        let list = |api, kind, plural| look::list(client, api, kind, plural);
        let hooks = "admissionregistration.k8s.io/v1";
        Ok(Facts {
            server: Some(look::server(client).await?),
            nodes: list("v1", "Node", "nodes").await?,
            namespaces: list("v1", "Namespace", "namespaces").await?,
            pods: list("v1", "Pod", "pods").await?,
            services: list("v1", "Service", "services").await?,
            slices: list("discovery.k8s.io/v1", "EndpointSlice", "endpointslices").await?,
            deployments: list("apps/v1", "Deployment", "deployments").await?,
            daemon_sets: list("apps/v1", "DaemonSet", "daemonsets").await?,
            definitions: list(
                "apiextensions.k8s.io/v1",
                "CustomResourceDefinition",
                "customresourcedefinitions",
            )
            .await?,
            mutating: list(
                hooks,
                "MutatingWebhookConfiguration",
                "mutatingwebhookconfigurations",
            )
            .await?,
            validating: list(
                hooks,
                "ValidatingWebhookConfiguration",
                "validatingwebhookconfigurations",
            )
            .await?,
        })
    }

    /// The Deployment of a revision's control plane.
    pub(crate) fn control_plane(&self, namespace: &str, revision: &str) -> Option<&Value> {
        self.deployments.iter().find(|d| {
            text(d, "/metadata/namespace") == namespace
                && label(d, "app") == "istiod"
                && label(d, "istio.io/rev") == revision
        })
    }

    /// The namespace of that name.
    pub(crate) fn namespace(&self, name: &str) -> Option<&Value> {
        self.namespaces
            .iter()
            .find(|n| text(n, "/metadata/name") == name)
    }

    /// What a namespace's pods are injected by: a revision or a tag. None where they are not.
    pub(crate) fn injected_by(&self, namespace: &Value) -> Option<String> {
        match label(namespace, "istio-injection") {
            "enabled" => Some("default".to_owned()),
            "" => Some(label(namespace, "istio.io/rev").to_owned()).filter(|r| !r.is_empty()),
            _ => None,
        }
    }

    /// Whether an endpoint of that Service is ready; none where there is no such Service.
    pub(crate) fn answers(&self, namespace: &str, service: &str) -> Option<bool> {
        let is = |o: &&Value| text(o, "/metadata/namespace") == namespace;
        self.services
            .iter()
            .filter(is)
            .find(|s| text(s, "/metadata/name") == service)?;
        let ready = |slice: &Value| {
            let endpoints = slice["endpoints"].as_array().into_iter().flatten();
            endpoints
                .filter(|e| e["conditions"]["ready"] != false)
                .count()
                > 0
        };
        let slices = self.slices.iter().filter(is);
        Some(
            slices
                .filter(|s| label(s, "kubernetes.io/service-name") == service)
                .any(ready),
        )
    }
}
