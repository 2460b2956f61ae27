//! Objects of kind ProxyConfig: what they change of the mesh's settings for a pod.
//!
//! Istio's order, from the weakest: the mesh, the root namespace's object, the namespace's own, the pod's annotation, an
//! object whose selector takes the pod. Of several the oldest counts.

use std::sync::Arc;

use config::{Object, Snapshot};
use proto::istio::networking::v1beta1::ProxyConfig;
use serde_json::{Map, Value, json};

use crate::{Error, Settings};

type Configs<'a> = Vec<&'a Arc<Object<ProxyConfig>>>;

/// The settings for this pod, where an object changes them.
pub fn for_pod(
    settings: &Settings,
    snapshot: &Snapshot,
    pod: &Value,
) -> Result<Option<Settings>, Error> {
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or_default();
    let root = settings.mesh.root_namespace.as_str();
    let of = |namespace: &str| -> Configs<'_> {
        let mut all: Configs<'_> = snapshot.proxy_configs.in_namespace(namespace).collect();
        all.sort_by_key(|o| (o.meta.creation_timestamp.unwrap_or(0), o.meta.name.clone()));
        all
    };
    let (global, own) = (of(root), of(namespace));
    let of_all = |configs: &Configs<'_>| {
        let found = configs.iter().find(|o| labels(o).next().is_none());
        found.map(|o| change(&o.spec))
    };
    let below = [
        of_all(&global),
        (namespace != root).then(|| of_all(&own)).flatten(),
    ];
    let selecting = own.iter().find(|o| {
        let has = |(key, value): (&String, &String)| {
            pod["metadata"]["labels"][key].as_str() == Some(value)
        };
        labels(o).next().is_some() && labels(o).all(has)
    });
    let above = selecting.map(|o| change(&o.spec));
    if above.is_none() && below.iter().all(Option::is_none) {
        return Ok(None);
    }
    let mut out = settings.clone();
    let mut base = out.mesh.default_config.take().unwrap_or_default();
    for change in below.into_iter().flatten() {
        base = config::mesh::merge_proxy(&base, &change)
            .map_err(|e| Error::Invalid {
                path: "ProxyConfig".into(),
                why: e.to_string(),
            })?
            .config;
    }
    out.mesh.default_config = Some(base);
    out.proxy_config = above;
    Ok(Some(out))
}

fn labels(object: &Object<ProxyConfig>) -> impl Iterator<Item = (&String, &String)> {
    let selector = object.spec.selector.as_ref();
    selector.into_iter().flat_map(|s| &s.match_labels)
}

/// What an object says, as fields of the mesh's own ProxyConfig.
fn change(spec: &ProxyConfig) -> Value {
    let mut out = Map::new();
    if let Some(concurrency) = spec.concurrency {
        out.insert("concurrency".to_owned(), concurrency.into());
    }
    if !spec.environment_variables.is_empty() {
        out.insert(
            "proxyMetadata".to_owned(),
            json!(spec.environment_variables),
        );
    }
    if let Some(image) = &spec.image {
        out.insert("image".to_owned(), json!({"imageType": image.image_type}));
    }
    Value::Object(out)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn env(injected: &Value, name: &str) -> String {
        let containers = ["containers", "initContainers"]
            .into_iter()
            .flat_map(|l| injected["spec"][l].as_array().into_iter().flatten());
        let proxy = containers
            .filter(|c| c["name"] == "istio-proxy")
            .flat_map(|c| c["env"].as_array().into_iter().flatten());
        let found = proxy.clone().find(|e| e["name"] == name);
        found
            .and_then(|e| e["value"].as_str())
            .unwrap_or_default()
            .to_owned()
    }

    #[test]
    fn a_selector_wins_over_the_annotation_and_that_over_namespaces() {
        let text = r#"
apiVersion: networking.istio.io/v1beta1
kind: ProxyConfig
metadata: {name: all, namespace: istio-system}
spec: {concurrency: 1, environmentVariables: {FROM: root, ROOT: "yes"}}
---
apiVersion: networking.istio.io/v1beta1
kind: ProxyConfig
metadata: {name: own, namespace: shop}
spec: {concurrency: 2, environmentVariables: {FROM: namespace}}
---
apiVersion: networking.istio.io/v1beta1
kind: ProxyConfig
metadata: {name: web, namespace: shop}
spec: {selector: {matchLabels: {app: web}}, environmentVariables: {FROM: selector}}
"#;
        let (snapshot, problems) = Snapshot::from_texts([(Path::new("p.yaml"), text)]);
        assert!(problems.is_empty(), "{problems:?}");
        let settings = Settings::default();
        let injected = |namespace: &str, app: &str, annotation: &str| {
            let pod = json!({"apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": "p", "namespace": namespace, "labels": {"app": app},
                    "annotations": {"proxy.istio.io/config": annotation}},
                "spec": {"containers": [{"name": "c", "image": "x"}]}});
            let own = for_pod(&settings, &snapshot, &pod).unwrap().unwrap();
            crate::pod(&pod, &crate::owner(&pod), &own).unwrap()
        };
        let web = injected(
            "shop",
            "web",
            "{concurrency: 3, proxyMetadata: {FROM: annotation}}",
        );
        assert_eq!(env(&web, "FROM"), "selector");
        assert_eq!(env(&web, "ROOT"), "yes");
        assert!(
            env(&web, "PROXY_CONFIG").contains(r#""concurrency":3"#),
            "{web}"
        );
        let other = injected("shop", "db", "{}");
        assert_eq!(env(&other, "FROM"), "namespace");
        assert!(
            env(&other, "PROXY_CONFIG").contains(r#""concurrency":2"#),
            "{other}"
        );
        assert_eq!(env(&injected("else", "web", "{}"), "FROM"), "root");
    }

    #[test]
    fn without_objects_nothing_is_copied() {
        let pod = json!({"metadata": {"namespace": "a"}});
        let out = for_pod(&Settings::default(), &Snapshot::empty(), &pod).unwrap();
        assert!(out.is_none());
    }
}
