//! Objects with a pod in them: every workload kind that kube-inject takes, and lists of them.

use serde_json::{Value, json};

use crate::{
    Error, Owner, Settings,
    decide::{Decision, decide},
    pod, schema,
};

/// Injects the pod of a workload. `None` for objects of other kinds, which stay as they are. A workload that is not to
/// be injected comes back as Kubernetes prints it and is told in `warnings`, in kube-inject's words.
pub fn object(
    object: &Value,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Result<Option<Value>, Error> {
    let text = |name: &str| object[name].as_str().unwrap_or_default();
    let (version, kind) = (text("apiVersion"), text("kind"));
    if (version, kind) == ("v1", "List") {
        let mut out = object.clone();
        for item in out["items"].as_array_mut().into_iter().flatten() {
            if let Some(injected) = self::object(item, settings, warnings)? {
                *item = injected;
            }
        }
        return Ok(Some(out));
    }
    let Some((_, _, place)) = KINDS.iter().find(|(v, k, _)| (*v, *k) == (version, kind)) else {
        return Ok(None);
    };
    let mut out = object.clone();
    complete(kind, &mut out);
    let named = |part: &Value, name: &str| part[name].as_str().unwrap_or_default().to_string();
    let owner = match place {
        Place::Pod => pod::owner(object),
        _ => Owner {
            api_version: version.into(),
            kind: kind.into(),
            name: named(&object["metadata"], "name"),
            namespace: named(&object["metadata"], "namespace"),
        },
    };
    let spec = |part: &Value, path: &str| match part.get("spec") {
        Some(Value::Object(_)) => Ok(part["spec"].clone()),
        _ => Err(Error::Invalid {
            path: format!("{kind} {:?}", owner.name),
            why: format!("{path} is required value"),
        }),
    };
    let (metadata, spec) = match place {
        Place::Pod => (object["metadata"].clone(), spec(object, "spec")?),
        Place::Template => {
            let template = &object["spec"]["template"];
            (
                template["metadata"].clone(),
                spec(template, "spec.template")?,
            )
        }
        // What injection writes goes to the job's template, as kube-inject has it; its pods carry no label of it.
        Place::JobTemplate => {
            let job = &object["spec"]["jobTemplate"];
            let template = &job["spec"]["template"];
            (
                job["metadata"].clone(),
                spec(template, "spec.jobTemplate.spec.template")?,
            )
        }
    };
    for part in ["labels", "annotations"] {
        for (key, value) in metadata[part].as_object().into_iter().flatten() {
            let path = format!("{kind} {:?}: metadata.{part}.{key}", owner.name);
            schema::text(value, &path)?;
        }
    }
    let pod = json!({"metadata": metadata, "spec": spec});
    let name = match named(&pod["metadata"], "name") {
        name if name.is_empty() => owner.name.clone(),
        name => name,
    };
    let name = match owner.namespace.as_str() {
        "" => name,
        namespace => format!("{namespace}/{name}"),
    };
    let why = match decide(&pod, settings) {
        Decision::Inject => None,
        Decision::HostNetwork => Some("has host networking enabled"),
        Decision::Disabled => Some("has sidecar injection disabled"),
    };
    let outcome = match why {
        None => pod::inject(&pod, &owner, settings),
        Some(why) => {
            warnings.push(format!(
                "===> Skipping injection because {kind} {name:?} {why}\n"
            ));
            pod::normal(&pod)
        }
    };
    let mut pod = outcome.map_err(|e| match e {
        Error::Invalid { path, why } if path.starts_with("spec.") => Error::Invalid {
            path: format!("{kind} {name:?}: {path}"),
            why,
        },
        other => other,
    })?;
    let (metadata, spec) = (pod["metadata"].take(), pod["spec"].take());
    match place {
        Place::Pod => (out["metadata"], out["spec"]) = (metadata, spec),
        Place::Template => {
            let template = &mut out["spec"]["template"];
            (template["metadata"], template["spec"]) = (metadata, spec);
        }
        Place::JobTemplate => {
            let job = &mut out["spec"]["jobTemplate"];
            job["metadata"] = metadata;
            job["spec"]["template"]["spec"] = spec;
        }
    }
    Ok(Some(out))
}

/// Where an object has its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Pod,
    Template,
    JobTemplate,
}

const KINDS: &[(&str, &str, Place)] = &[
    ("v1", "Pod", Place::Pod),
    ("v1", "ReplicationController", Place::Template),
    ("apps/v1", "Deployment", Place::Template),
    ("apps/v1", "DaemonSet", Place::Template),
    ("apps/v1", "ReplicaSet", Place::Template),
    ("apps/v1", "StatefulSet", Place::Template),
    ("batch/v1", "Job", Place::Template),
    ("batch/v1", "CronJob", Place::JobTemplate),
    ("apps.openshift.io/v1", "DeploymentConfig", Place::Template),
    // Its form before OpenShift had API groups.
    ("v1", "DeploymentConfig", Place::Template),
];

/// Fields that Kubernetes prints of an object even if they are empty.
fn complete(kind: &str, object: &mut Value) {
    let mut default = |part: &str, name: &str, value: Value| {
        let parent = if part.is_empty() {
            &mut *object
        } else {
            &mut object[part]
        };
        if let Value::Object(fields) = parent
            && fields.get(name).is_none_or(Value::is_null)
        {
            fields.insert(name.into(), value);
        }
    };
    match kind {
        "Deployment" => default("spec", "strategy", json!({})),
        "StatefulSet" | "DaemonSet" => default("spec", "updateStrategy", json!({})),
        "DeploymentConfig" => {
            default("spec", "strategy", json!({"resources": {}}));
            default("spec", "test", false.into());
        }
        _ => {}
    }
    let status = match kind {
        "StatefulSet" => json!({"availableReplicas": 0, "replicas": 0}),
        "DaemonSet" => json!({
            "currentNumberScheduled": 0,
            "desiredNumberScheduled": 0,
            "numberMisscheduled": 0,
            "numberReady": 0,
        }),
        "ReplicaSet" | "ReplicationController" => json!({"replicas": 0}),
        "DeploymentConfig" => json!({
            "availableReplicas": 0,
            "latestVersion": 0,
            "observedGeneration": 0,
            "replicas": 0,
            "unavailableReplicas": 0,
            "updatedReplicas": 0,
        }),
        _ => json!({}),
    };
    default("", "status", status);
    if let Some(spec) = object["spec"].as_object_mut() {
        // Left out by Kubernetes when they say nothing.
        spec.retain(|name, v| match name.as_str() {
            "paused" => *v != false,
            "minReadySeconds" => *v != 0,
            _ => !v.is_null(),
        });
    }
}
