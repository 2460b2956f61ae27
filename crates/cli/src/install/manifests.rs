//! What an install consists of. Each step holds what must be there before the next one.

use serde_json::{Value, json};

use super::{admission, cni, control_plane, gateway, rights, values::Values, webhooks};

/// Where and as what the mesh is installed.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) namespace: String,
    pub(super) revision: String,
    pub(super) values: Values,
}

/// Objects that go in together.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) objects: Vec<Value>,
    /// Whether the next step needs this one to be done.
    pub(super) must_wait: bool,
    /// Whether an uninstall leaves it, because objects of users hang on it.
    pub(super) kept: bool,
}

impl Place {
    /// A name that each revision has of its own; the plain one for the default.
    pub(super) fn named(&self, name: &str) -> String {
        match self.is_default() {
            true => name.to_owned(),
            false => format!("{name}-{}", self.revision),
        }
    }

    /// A name of an object that belongs to no namespace: two installs must not meet.
    pub(super) fn cluster_wide(&self, name: &str) -> String {
        format!("{}-{}", self.named(name), self.namespace)
    }

    pub(super) fn is_default(&self) -> bool {
        self.revision == "default"
    }

    /// Labels of everything of the control plane.
    pub(super) fn labels(&self, app: &str) -> Value {
        json!({
            "app": app,
            "istio.io/rev": self.revision,
            "app.kubernetes.io/name": app,
            "app.kubernetes.io/part-of": "outrigger",
            "app.kubernetes.io/version": env!("CARGO_PKG_VERSION"),
        })
    }

    /// `metadata` of an object in the control plane's namespace.
    pub(super) fn meta(&self, name: &str, app: &str) -> Value {
        json!({"name": name, "namespace": self.namespace, "labels": self.labels(app)})
    }
}

/// All steps, in order.
pub(super) fn steps(place: &Place) -> anyhow::Result<Vec<Step>> {
    let namespace = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": place.namespace},
    });
    let mut control = rights::control_plane(place);
    control.extend(admission::all(place));
    control.extend(control_plane::settings(place));
    control.extend(control_plane::workload(place));
    let mut out = vec![
        Step {
            name: "namespace",
            objects: vec![namespace],
            must_wait: true,
            kept: true,
        },
        Step {
            name: "definitions",
            objects: kubernetes::crd::all(),
            must_wait: true,
            kept: true,
        },
    ];
    let node_agent = cni::all(place);
    if !node_agent.is_empty() {
        out.push(Step {
            name: "CNI plug-in",
            objects: node_agent,
            must_wait: false,
            kept: false,
        });
    }
    out.extend([
        Step {
            name: "control plane",
            objects: control,
            must_wait: false,
            kept: false,
        },
        Step {
            name: "webhooks",
            objects: webhooks::all(place),
            must_wait: false,
            kept: false,
        },
    ]);
    let gateway = gateway::all(place);
    if !gateway.is_empty() {
        out.push(Step {
            name: "ingress gateway",
            objects: gateway,
            must_wait: false,
            kept: false,
        });
    }
    Ok(out)
}

/// What no container of ours needs.
pub(super) fn security_context() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "capabilities": {"drop": ["ALL"]},
        "privileged": false,
        "readOnlyRootFilesystem": true,
        "runAsGroup": 1337,
        "runAsNonRoot": true,
        "runAsUser": 1337,
        "seccompProfile": {"type": "RuntimeDefault"},
    })
}
