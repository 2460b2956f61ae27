//! Workloads become pods, with names that stay the same from one start to the next.

use serde_json::{Value, json};

use super::{at, at_mut, default_at, key, text};

/// A pod as its controller would make it: not injected, without an address.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    /// `kind/name` of the workload in lower case.
    pub(crate) workload: String,
    /// The Pod.
    pub(crate) pod: Value,
}

/// Whether an object is a workload (or a pod).
pub(crate) fn is_workload(object: &Value) -> bool {
    template_path(text(object, &["kind"])).is_some()
}

fn template_path(kind: &str) -> Option<&'static [&'static str]> {
    Some(match kind {
        "Pod" => &[],
        "Deployment"
        | "ReplicaSet"
        | "StatefulSet"
        | "DaemonSet"
        | "Job"
        | "ReplicationController"
        | "DeploymentConfig"
        | "Rollout" => &["spec", "template"],
        "CronJob" => &["spec", "jobTemplate", "spec", "template"],
        _ => return None,
    })
}

/// The pods of a workload; an error says what is missing.
pub(crate) fn expand(object: &Value) -> Result<Vec<Template>, String> {
    let kind = text(object, &["kind"]);
    let path = template_path(kind).ok_or_else(|| format!("{kind} is not a workload"))?;
    let template = at(object, path);
    if at(template, &["spec", "containers"])
        .as_array()
        .is_none_or(Vec::is_empty)
    {
        let prefix = path.iter().map(|p| format!("{p}.")).collect::<String>();
        return Err(format!(
            "`{prefix}spec.containers` is missing: a pod needs at least one container"
        ));
    }
    let (namespace, mut name) = key(object);
    if name.is_empty() {
        name = text(object, &["metadata", "generateName"])
            .trim_end_matches('-')
            .to_owned();
    }
    let count = match kind {
        "Pod" | "DaemonSet" => 1,
        "Job" => number(object, &["spec", "parallelism"])?,
        "CronJob" => number(object, &["spec", "jobTemplate", "spec", "parallelism"])?,
        _ => number(object, &["spec", "replicas"])?,
    };
    let mut out = Vec::new();
    for i in 0..count {
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]});
        if kind == "Pod" {
            pod["metadata"] = object["metadata"].clone();
        }
        let pod_name = match kind {
            "StatefulSet" => format!(
                "{name}-{}",
                i + number_or(object, &["spec", "ordinals", "start"], 0)
            ),
            _ if i == 0 => name.clone(),
            _ => format!("{name}-{i}"),
        };
        *at_mut(&mut pod, &["metadata", "name"]) = json!(pod_name);
        *at_mut(&mut pod, &["metadata", "namespace"]) = json!(namespace);
        own(&mut pod, object, kind, &name, &pod_name, i);
        default_at(&mut pod, &["spec", "serviceAccountName"], "default");
        default_at(&mut pod, &["spec", "restartPolicy"], "Always");
        default_at(&mut pod, &["spec", "nodeName"], NODE);
        out.push(Template {
            workload: format!("{}/{name}", kind.to_ascii_lowercase()),
            pod,
        });
    }
    Ok(out)
}

/// Owner, generated-name prefix and the labels that each controller adds.
fn own(pod: &mut Value, object: &Value, kind: &str, name: &str, pod_name: &str, index: i64) {
    let (owner_kind, owner_api, owner) = match kind {
        "Pod" => return,
        "Deployment" | "Rollout" => {
            let hash = template_hash(&object["spec"]["template"]);
            let label = if kind == "Rollout" {
                "rollouts-pod-template-hash"
            } else {
                "pod-template-hash"
            };
            *at_mut(pod, &["metadata", "labels", label]) = json!(hash);
            ("ReplicaSet", "apps/v1", format!("{name}-{hash}"))
        }
        "DeploymentConfig" => {
            *at_mut(pod, &["metadata", "labels", "deploymentconfig"]) = json!(name);
            ("ReplicationController", "v1", format!("{name}-1"))
        }
        // The minute of the schedule is part of a Job's name; here it is run once, at minute zero.
        "CronJob" => ("Job", "batch/v1", format!("{name}-00000000")),
        other => (other, text(object, &["apiVersion"]), name.to_owned()),
    };
    match kind {
        "StatefulSet" => {
            *at_mut(
                pod,
                &["metadata", "labels", "statefulset.kubernetes.io/pod-name"],
            ) = json!(pod_name);
            *at_mut(pod, &["metadata", "labels", "apps.kubernetes.io/pod-index"]) =
                json!(index.to_string());
            *at_mut(pod, &["spec", "hostname"]) = json!(pod_name);
            let service = text(object, &["spec", "serviceName"]);
            if !service.is_empty() {
                *at_mut(pod, &["spec", "subdomain"]) = json!(service);
            }
        }
        "Job" | "CronJob" => {
            *at_mut(pod, &["metadata", "labels", "job-name"]) = json!(owner);
            *at_mut(pod, &["metadata", "labels", "batch.kubernetes.io/job-name"]) = json!(owner);
        }
        _ => {}
    }
    *at_mut(pod, &["metadata", "generateName"]) = json!(format!("{owner}-"));
    *at_mut(pod, &["metadata", "ownerReferences"]) = json!([{
        "apiVersion": owner_api, "kind": owner_kind, "name": owner, "uid": uid(&[owner_kind, &owner]),
        "controller": true, "blockOwnerDeletion": true,
    }]);
}

fn number(object: &Value, path: &[&str]) -> Result<i64, String> {
    match at(object, path) {
        Value::Null => Ok(1),
        v => v.as_i64().filter(|n| (0..=200).contains(n)).ok_or_else(|| {
            format!(
                "`{}`: {v} is not a number between 0 and 200",
                path.join(".")
            )
        }),
    }
}

fn number_or(object: &Value, path: &[&str], default: i64) -> i64 {
    at(object, path).as_i64().unwrap_or(default)
}

/// Ten letters and digits that change with the template, of the alphabet that Kubernetes uses for this.
fn template_hash(template: &Value) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut n = fingerprint(template.to_string().as_bytes());
    (0..10)
        .map(|_| {
            let c = ALPHABET[(n % ALPHABET.len() as u64) as usize];
            n /= ALPHABET.len() as u64;
            char::from(c)
        })
        .collect()
}

/// A uid that is the same at each start.
pub(crate) fn uid(parts: &[&str]) -> String {
    let text = parts.join("/");
    let a = fingerprint(text.as_bytes());
    let b = fingerprint(format!("{text}#").as_bytes());
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        (a >> 16) & 0xffff,
        a & 0xfff,
        b >> 52,
        b & 0xffff_ffff_ffff
    )
}

/// FNV-1a: stable between builds, unlike the standard hasher's promise.
pub(crate) fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The one node.
pub(crate) const NODE: &str = "local";

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(kind: &str, spec: Value) -> Value {
        json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": "web", "namespace": "shop"}, "spec": spec})
    }

    fn template() -> Value {
        json!({"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "web", "image": "x"}]}})
    }

    #[test]
    fn pods_have_stable_names_and_an_owner() {
        let pods = expand(&workload(
            "Deployment",
            json!({"replicas": 3, "template": template()}),
        ))
        .unwrap();
        let names: Vec<_> = pods
            .iter()
            .map(|p| text(&p.pod, &["metadata", "name"]))
            .collect();
        assert_eq!(names, ["web", "web-1", "web-2"]);
        let pod = &pods[0].pod;
        let hash = text(pod, &["metadata", "labels", "pod-template-hash"]);
        assert_eq!(hash.len(), 10);
        assert_eq!(
            pod["metadata"]["ownerReferences"][0]["name"],
            format!("web-{hash}")
        );
        assert_eq!(pod["metadata"]["namespace"], "shop");
        assert_eq!(pod["metadata"]["labels"]["app"], "web");
        assert_eq!(pods[0].workload, "deployment/web");
    }

    #[test]
    fn every_kind_has_its_own_way() {
        let pods = expand(&workload(
            "StatefulSet",
            json!({"replicas": 2, "serviceName": "db", "template": template()}),
        ))
        .unwrap();
        assert_eq!(pods[1].pod["metadata"]["name"], "web-1");
        assert_eq!(pods[1].pod["spec"]["subdomain"], "db");
        let pods = expand(&workload(
            "CronJob",
            json!({"jobTemplate": {"spec": {"template": template()}}}),
        ))
        .unwrap();
        assert_eq!(pods[0].pod["metadata"]["ownerReferences"][0]["kind"], "Job");
        assert!(
            expand(&workload(
                "Deployment",
                json!({"replicas": 0, "template": template()})
            ))
            .unwrap()
            .is_empty()
        );
        for kind in [
            "ReplicaSet",
            "DaemonSet",
            "Job",
            "ReplicationController",
            "DeploymentConfig",
            "Rollout",
        ] {
            assert_eq!(
                expand(&workload(kind, json!({"template": template()})))
                    .unwrap()
                    .len(),
                1,
                "{kind}"
            );
        }
    }

    #[test]
    fn a_template_without_containers_is_refused() {
        let e = expand(&workload("Deployment", json!({"template": {"spec": {}}}))).unwrap_err();
        assert!(e.contains("`spec.template.spec.containers`"), "{e}");
        let e = expand(&workload(
            "Deployment",
            json!({"replicas": -1, "template": template()}),
        ))
        .unwrap_err();
        assert!(e.contains("spec.replicas"), "{e}");
    }
}
