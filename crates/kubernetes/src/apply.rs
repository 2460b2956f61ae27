//! Objects put into a cluster and taken out again: what an installer does.

use std::time::{Duration, Instant};

use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PropagationPolicy},
    core::{ApiResource, DynamicObject},
};
use serde_json::Value;

use crate::{ClusterError, FIELD_MANAGER, code, resource};

/// One object and where the API server keeps it.
#[derive(Debug, Clone)]
pub struct Target {
    resource: ApiResource,
    namespace: String,
    name: String,
}

impl Target {
    /// The place of an object: of its kind's usual plural, in its namespace.
    pub fn of(object: &Value) -> Result<Self, ClusterError> {
        let text = |pointer: &str| {
            let found = object.pointer(pointer).and_then(Value::as_str);
            found.unwrap_or_default().to_owned()
        };
        let (api_version, kind, name) =
            (text("/apiVersion"), text("/kind"), text("/metadata/name"));
        if api_version.is_empty() || kind.is_empty() || name.is_empty() {
            return Err(ClusterError::Object {
                what: format!("{kind} {name}"),
                why: "apiVersion, kind and metadata.name are needed".to_owned(),
            });
        }
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", &api_version));
        let lower = kind.to_lowercase();
        let plural = match lower.strip_suffix('y') {
            Some(stem) if !stem.ends_with(['a', 'e', 'o', 'u']) => format!("{stem}ies"),
            _ if lower.ends_with('s') => format!("{lower}es"),
            _ => format!("{lower}s"),
        };
        Ok(Target {
            resource: resource::resource(group, version, &kind, &plural),
            namespace: text("/metadata/namespace"),
            name,
        })
    }

    fn api(&self, client: &Client) -> Api<DynamicObject> {
        resource::within(client, &self.resource, &self.namespace)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.resource.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.resource.kind, self.name),
        }
    }
}

/// What became of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was not there before.
    Created,
    /// It is different now.
    Changed,
    /// It was so already.
    Unchanged,
}

/// Puts an object in, or brings the fields that it names to what it says.
pub async fn apply(client: &Client, object: &Value) -> Result<Outcome, ClusterError> {
    let target = Target::of(object)?;
    let api = target.api(client);
    let failed = |e| ClusterError::request(target.to_string())(e);
    let before = api.get_opt(&target.name).await.map_err(failed)?;
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let after = api
        .patch(&target.name, &params, &Patch::Apply(object))
        .await
        .map_err(failed)?;
    Ok(match before {
        None => Outcome::Created,
        Some(before) if before.metadata.resource_version == after.metadata.resource_version => {
            Outcome::Unchanged
        }
        Some(_) => Outcome::Changed,
    })
}

/// Takes an object out. Whether it was there.
pub async fn delete(client: &Client, object: &Value) -> Result<bool, ClusterError> {
    let target = Target::of(object)?;
    let params = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Background),
        ..DeleteParams::default()
    };
    match target.api(client).delete(&target.name, &params).await {
        Ok(_) => Ok(true),
        Err(e) if code(&e) == Some(404) => Ok(false),
        Err(e) => Err(ClusterError::request(target.to_string())(e)),
    }
}

/// Takes out every ConfigMap of this name, in all namespaces. How many there were.
pub async fn delete_config_maps(client: &Client, name: &str) -> Result<usize, ClusterError> {
    let found = resource::resource("", "v1", "ConfigMap", "configmaps");
    let list = kube::api::ListParams::default().fields(&format!("metadata.name={name}"));
    let all = resource::all(client, &found)
        .list(&list)
        .await
        .map_err(ClusterError::request(format!("ConfigMaps {name}")))?;
    let mut count = 0;
    for map in all.items {
        let namespace = map.metadata.namespace.unwrap_or_default();
        let object = serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace},
        });
        count += usize::from(delete(client, &object).await?);
    }
    Ok(count)
}

/// Waits until an object is as it should be: a definition established, a Deployment or DaemonSet rolled out.
///
/// # Errors
/// After `patience`, with what was still missing.
pub async fn wait(client: &Client, object: &Value, patience: Duration) -> Result<(), ClusterError> {
    let target = Target::of(object)?;
    let api = target.api(client);
    let begun = Instant::now();
    loop {
        let missing = match api.get_opt(&target.name).await {
            Ok(Some(found)) => match missing(&found) {
                None => return Ok(()),
                Some(missing) => missing,
            },
            Ok(None) => "it is not there".to_owned(),
            Err(e) => e.to_string(),
        };
        if begun.elapsed() >= patience {
            return Err(ClusterError::Object {
                what: target.to_string(),
                why: format!("not ready after {} s: {missing}", patience.as_secs()),
            });
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Waits until an object is gone.
pub async fn wait_gone(
    client: &Client,
    object: &Value,
    patience: Duration,
) -> Result<(), ClusterError> {
    let target = Target::of(object)?;
    let api = target.api(client);
    let begun = Instant::now();
    while let Ok(Some(_)) | Err(_) = api.get_opt(&target.name).await {
        if begun.elapsed() >= patience {
            return Err(ClusterError::Object {
                what: target.to_string(),
                why: format!("still there after {} s", patience.as_secs()),
            });
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Ok(())
}

/// What an object still lacks.
fn missing(object: &DynamicObject) -> Option<String> {
    let kind = object.types.as_ref().map_or("", |t| t.kind.as_str());
    let status = &object.data["status"];
    let number = |value: &Value| value.as_i64().unwrap_or(0);
    match kind {
        "CustomResourceDefinition" => {
            let established = status["conditions"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|c| c["type"] == "Established" && c["status"] == "True");
            (!established).then(|| "not established".to_owned())
        }
        "Deployment" => {
            let wanted = object.data["spec"]["replicas"].as_i64().unwrap_or(1);
            let seen = number(&status["observedGeneration"]);
            let (updated, ready, all) = (
                number(&status["updatedReplicas"]),
                number(&status["readyReplicas"]),
                number(&status["replicas"]),
            );
            let current = object.metadata.generation.unwrap_or(0);
            let done = seen >= current && updated >= wanted && ready >= wanted && all <= wanted;
            (!done).then(|| format!("{ready} of {wanted} pods ready, {updated} of this version"))
        }
        "DaemonSet" => {
            let wanted = number(&status["desiredNumberScheduled"]);
            let ready = number(&status["numberReady"]);
            let seen = number(&status["observedGeneration"]);
            let done = seen >= object.metadata.generation.unwrap_or(0) && ready >= wanted;
            (!done).then(|| format!("{ready} of {wanted} pods ready"))
        }
        _ => None,
    }
}
