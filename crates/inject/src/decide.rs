//! Whether a pod is injected.

use serde_json::Value;

use crate::Settings;

/// The label, and the older annotation, by which a pod decides.
pub const INJECT: &str = "sidecar.istio.io/inject";

/// Namespaces whose pods are never injected.
pub const SYSTEM_NAMESPACES: [&str; 4] = [
    "kube-system",
    "kube-public",
    "kube-node-lease",
    "local-path-storage",
];

/// What becomes of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is injected.
    Inject,
    /// It shares the node's network, whose rules must not be touched.
    HostNetwork,
    /// Its label, its annotation, its namespace or the install says no.
    Disabled,
}

/// Decides about a pod (`metadata` and `spec`). The first that speaks counts: host network, system namespace, the
/// label, the annotation, the install's selectors, the install's policy.
pub fn decide(pod: &Value, settings: &Settings) -> Decision {
    if pod["spec"]["hostNetwork"] == true {
        return Decision::HostNetwork;
    }
    let metadata = &pod["metadata"];
    let namespace = metadata["namespace"].as_str().unwrap_or_default();
    if SYSTEM_NAMESPACES.contains(&namespace) {
        return Decision::Disabled;
    }
    let said = metadata["labels"]
        .get(INJECT)
        .or_else(|| metadata["annotations"].get(INJECT));
    let inject = match said.and_then(Value::as_str) {
        Some("true") => true,
        Some("false") => false,
        // Anything else is as if nothing were said.
        _ => {
            let selected = |list: &str| {
                let path = format!("sidecarInjectorWebhook.{list}");
                let selectors = settings.values.at(&path).and_then(Value::as_array);
                selectors
                    .into_iter()
                    .flatten()
                    .any(|s| selects(s, &metadata["labels"]))
            };
            !selected("neverInjectSelector")
                && (selected("alwaysInjectSelector") || settings.inject_by_default)
        }
    };
    if inject {
        Decision::Inject
    } else {
        Decision::Disabled
    }
}

/// Whether a label selector matches; an empty one selects nothing here.
fn selects(selector: &Value, labels: &Value) -> bool {
    let equal = selector["matchLabels"].as_object();
    let expressions = selector["matchExpressions"].as_array();
    if equal.is_none_or(|m| m.is_empty()) && expressions.is_none_or(|e| e.is_empty()) {
        return false;
    }
    equal
        .into_iter()
        .flatten()
        .all(|(k, v)| labels.get(k) == Some(v))
        && expressions.into_iter().flatten().all(|e| {
            let label = e["key"].as_str().and_then(|k| labels.get(k));
            let among = || {
                let values = e["values"].as_array();
                values.into_iter().flatten().any(|v| Some(v) == label)
            };
            match e["operator"].as_str() {
                Some("In") => among(),
                Some("NotIn") => !among(),
                Some("Exists") => label.is_some(),
                Some("DoesNotExist") => label.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Values;
    use serde_json::json;

    #[test]
    fn the_first_that_speaks_counts() {
        let values = json!({"sidecarInjectorWebhook": {
            "neverInjectSelector": [{"matchExpressions": [{"key": "no", "operator": "Exists"}]}],
            "alwaysInjectSelector": [{"matchLabels": {"yes": "1"}}, {}],
        }});
        let mut settings = Settings {
            values: Values::new(&values).unwrap(),
            ..Settings::default()
        };
        let labels = |l: Value| json!({"metadata": {"labels": l}, "spec": {}});
        let check = |pod: &Value, settings: &Settings| decide(pod, settings);
        use Decision::*;
        for by_default in [Inject, Disabled] {
            settings.inject_by_default = by_default == Inject;
            assert_eq!(check(&labels(json!({})), &settings), by_default);
            assert_eq!(
                check(&labels(json!({INJECT: "maybe"})), &settings),
                by_default
            );
            assert_eq!(check(&labels(json!({"yes": "1"})), &settings), Inject);
            assert_eq!(
                check(&labels(json!({"yes": "1", "no": ""})), &settings),
                Disabled
            );
            assert_eq!(
                check(&labels(json!({"no": "", INJECT: "true"})), &settings),
                Inject
            );
        }
        let mut pod = labels(json!({INJECT: "false"}));
        pod["metadata"]["annotations"] = json!({INJECT: "true"});
        assert_eq!(check(&pod, &settings), Disabled);
        pod["metadata"]["labels"] = json!({});
        assert_eq!(check(&pod, &settings), Inject);
        pod["metadata"]["namespace"] = json!("kube-system");
        assert_eq!(check(&pod, &settings), Disabled);
        pod["spec"]["hostNetwork"] = json!(true);
        assert_eq!(check(&pod, &settings), HostNetwork);
    }
}
