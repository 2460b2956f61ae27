//! Which pods get a sidecar, by the rules of Istio's webhooks, and the pod with it.

use inject::{
    Settings, Values,
    decide::{self, Decision},
};
use serde_json::Value;

use super::text;

/// The pod as it is stored: with a sidecar where its namespace or its own labels ask for one.
///
/// `labels` are the namespace's. The error is the injector's, as a user would see it.
pub(crate) fn admit(pod: Value, labels: &Value, settings: &Settings) -> Result<Value, String> {
    if !webhook_selects(labels, &pod) || decide::decide(&pod, settings) != Decision::Inject {
        return Ok(pod);
    }
    inject::pod(&pod, &inject::owner(&pod), settings).map_err(|e| e.to_string())
}

/// The injector's settings for a mesh, and what of the mesh's own could not be used.
pub(crate) fn settings(mesh: &Value) -> (Settings, Vec<String>) {
    let (config, problems) = match config::mesh::merge(mesh) {
        Ok(read) => {
            let unknown = read
                .unknown
                .iter()
                .map(|f| format!("`data.mesh`: {f}: there is no such field"));
            (read.config, unknown.collect())
        }
        Err(e) => {
            let ours = config::mesh::merge(&super::builtin::mesh_defaults());
            (
                ours.map_or_else(|_| config::mesh::defaults(), |r| r.config),
                vec![format!("`data.mesh`: {e}")],
            )
        }
    };
    (Settings::new(Values::default(), config), problems)
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
    fn a_pod_gets_its_sidecar_with_the_mesh_settings() {
        let (settings, problems) = settings(&crate::objects::builtin::mesh_defaults());
        assert_eq!(problems, Vec::<String>::new());
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "a"},
            "spec": {"containers": [{"name": "web", "image": "x"}]}});
        let out = admit(
            pod.clone(),
            &json!({"istio-injection": "enabled"}),
            &settings,
        )
        .unwrap();
        let names: Vec<_> = out["spec"]["containers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| text(c, &["name"]))
            .collect();
        assert_eq!(names, ["web", "istio-proxy"]);
        assert!(
            out.to_string().contains("istiod.istio-system.svc:15012"),
            "{out}"
        );
        assert_eq!(admit(pod.clone(), &json!({}), &settings).unwrap(), pod);
    }

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
