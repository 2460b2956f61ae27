//! One pod: from what the user wrote to what runs.

use proto::istio::mesh::v1alpha1::ProxyConfig;
use serde_json::{Map, Value, json};

use crate::{
    Error, Owner, Settings, annotations, probes, prometheus,
    schema::{self, Type},
    strategic,
    template::{self, Data, INIT, MODE, NATIVE, PROXY, VALIDATION},
};

const STATUS: &str = "sidecar.istio.io/status";
const OVERRIDES: &str = "proxy.istio.io/overrides";
const CONFIG: &str = "proxy.istio.io/config";
const NETWORK_LABEL: &str = "topology.istio.io/network";
const LISTS: [&str; 2] = ["containers", "initContainers"];

/// Injects a pod (an object with `metadata` and `spec`), whatever [`crate::decide`] says. Injecting the result again
/// changes nothing.
pub fn inject(pod: &Value, owner: &Owner, settings: &Settings) -> Result<Value, Error> {
    let pod = &normal(pod)?;
    let metadata = &pod["metadata"];
    annotations::validate(metadata)?;
    let proxy = &proxy_config(metadata, settings)?;
    let agent_port = i64::from(proxy.status_port);
    let view = with_overrides(&stripped(pod, agent_port), metadata)?;
    let data = Data {
        settings,
        owner,
        metadata: &view["metadata"],
        spec: &view["spec"],
        proxy,
    };
    let mut added = json!({});
    let mut merged = pod.clone();
    for name in templates(metadata, settings) {
        let partial = template::render(&name, &data)?;
        added = strategic::merge(&added, &partial);
        if native(&merged, settings) && find(&added, "initContainers", PROXY).is_some() {
            // The user's own settings of the proxy stand among the containers.
            move_to_init(&mut merged);
        }
        merged = strategic::merge(&merged, &partial);
    }
    let mut merged = overlay(merged, pod, &added)?;
    adjust_users(&mut merged, pod, proxy);
    finish(&mut merged, &added, pod, agent_port, proxy, settings)?;
    normal(&merged)
}

/// The pod as Kubernetes' types hold it.
pub(crate) fn normal(pod: &Value) -> Result<Value, Error> {
    let mut out = pod.clone();
    for part in ["metadata", "spec"] {
        if !out[part].is_object() {
            out[part] = json!({});
        }
        if let Value::Object(fields) = &mut out[part] {
            fields.retain(|_, v| !v.is_null() && *v != false);
        }
    }
    for list in LISTS {
        let Some(items) = out["spec"].get_mut(list) else {
            continue;
        };
        let path = format!("spec.{list}");
        let Value::Array(items) = items else {
            return Err(Error::Invalid {
                path,
                why: "a list is expected".into(),
            });
        };
        for (i, item) in items.iter_mut().enumerate() {
            if !item["name"].is_string() {
                return Err(Error::Invalid {
                    path: format!("{path}[{i}].name"),
                    why: "a container needs a name".into(),
                });
            }
            *item = schema::normal(Type::Container, item, &format!("{path}[{i}]"))?;
        }
    }
    for volume in out["spec"]["volumes"].as_array_mut().into_iter().flatten() {
        if let Some(fields) = volume.as_object_mut() {
            fields.retain(|_, v| !v.is_null());
        }
        let Some(limit) = volume.pointer_mut("/emptyDir/sizeLimit") else {
            continue;
        };
        let wrapped = schema::quantities(&json!({"q": limit}), "emptyDir.sizeLimit")?;
        *limit = wrapped["q"].clone();
    }
    if out["spec"].get("volumes").is_some_and(Value::is_null) {
        out["spec"].as_object_mut().map(|s| s.remove("volumes"));
    }
    Ok(out)
}

/// The mesh's ProxyConfig with the pod's own merged in, and over it what wins over that.
fn proxy_config(metadata: &Value, settings: &Settings) -> Result<ProxyConfig, Error> {
    let own = annotated(metadata, settings)?;
    let Some(over) = &settings.proxy_config else {
        return Ok(own);
    };
    config::mesh::merge_proxy(&own, over)
        .map(|read| read.config)
        .map_err(|e| Error::Invalid {
            path: "ProxyConfig".into(),
            why: e.to_string(),
        })
}

fn annotated(metadata: &Value, settings: &Settings) -> Result<ProxyConfig, Error> {
    let base = settings.mesh.default_config.clone().unwrap_or_default();
    let Some(text) = metadata["annotations"].get(CONFIG).and_then(Value::as_str) else {
        return Ok(base);
    };
    let fail = |why: String| {
        Error::Annotations(vec![format!(
            "invalid value '{text}' for annotation '{CONFIG}': failed to convert to apply proxy config: {why}"
        )])
    };
    let user = match config::yaml::document(text, 1) {
        Ok(Some(document)) => document.value,
        Ok(None) => return Ok(base),
        Err(e) => return Err(fail(e.message)),
    };
    config::mesh::merge_proxy(&base, &user)
        .map(|read| read.config)
        .map_err(|e| fail(e.to_string()))
}

/// The templates that the pod asks for, else the install's. (Aliases are the user's own; the shipped install has none.)
fn templates(metadata: &Value, settings: &Settings) -> Vec<String> {
    match metadata["annotations"]
        .get("inject.istio.io/templates")
        .and_then(Value::as_str)
    {
        Some(list) => list.split(',').map(|n| n.trim().to_string()).collect(),
        None => settings.default_templates.clone(),
    }
}

/// The pod without what a former injection added.
fn stripped(pod: &Value, agent_port: i64) -> Value {
    let mut out = pod.clone();
    let Some(status) = status(pod) else {
        return out;
    };
    for list in LISTS {
        let injected = &status[list];
        let ours = |c: &Value| {
            injected
                .as_array()
                .into_iter()
                .flatten()
                .any(|name| *name == c["name"])
        };
        if let Some(items) = out["spec"].get_mut(list).and_then(Value::as_array_mut) {
            items.retain(|c| !ours(c));
        }
    }
    if prometheus::names_agent(&out["metadata"], agent_port) {
        prometheus::clear(&mut out["metadata"]);
    }
    if let Some(annotations) = out["metadata"]["annotations"].as_object_mut() {
        annotations.remove(STATUS);
    }
    out
}

/// The status that a former injection wrote.
fn status(pod: &Value) -> Option<Value> {
    let text = pod["metadata"]["annotations"].get(STATUS)?.as_str()?;
    serde_json::from_str(text).ok().filter(Value::is_object)
}

fn overrides(metadata: &Value) -> Result<Value, Error> {
    match metadata["annotations"]
        .get(OVERRIDES)
        .and_then(Value::as_str)
    {
        None => Ok(json!({})),
        Some(text) => serde_json::from_str(text).map_err(|e| Error::Invalid {
            path: OVERRIDES.into(),
            why: e.to_string(),
        }),
    }
}

/// Puts back the user's own containers that a former injection had laid over its own.
fn with_overrides(pod: &Value, metadata: &Value) -> Result<Value, Error> {
    let kept = overrides(metadata)?;
    let mut out = pod.clone();
    for list in LISTS {
        for container in kept[list].as_array().into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default();
            if find(&out, list, name).is_none() {
                push(&mut out, list, container.clone());
            }
        }
    }
    Ok(out)
}

/// Whether the proxy runs before the pod's containers; here, unlike in the template, only plain words count.
fn native(pod: &Value, settings: &Settings) -> bool {
    match pod["metadata"]["annotations"]
        .get(NATIVE)
        .and_then(Value::as_str)
    {
        Some("true") => true,
        Some("false") => false,
        _ => settings.native_sidecars,
    }
}

fn move_to_init(pod: &mut Value) {
    let Some(items) = pod["spec"]
        .get_mut("containers")
        .and_then(Value::as_array_mut)
    else {
        return;
    };
    if let Some(at) = items.iter().position(|c| c["name"] == PROXY) {
        let container = items.remove(at);
        push(pod, "initContainers", container);
    }
}

/// Lays the user's own version of injected containers over the result, and remembers it for the next injection.
fn overlay(mut merged: Value, pod: &Value, added: &Value) -> Result<Value, Error> {
    let former = status(pod).unwrap_or_default();
    let kept = overrides(&pod["metadata"])?;
    let mut texts = Vec::new();
    for list in LISTS {
        let mut found = Vec::new();
        for container in added["spec"][list].as_array().into_iter().flatten() {
            let name = container["name"].as_str().unwrap_or_default();
            let kept = kept[list]
                .as_array()
                .into_iter()
                .flatten()
                .find(|c| c["name"] == name);
            let injected = former[list].as_array();
            // What a former injection put there is not the user's; what it remembered is.
            let user = match kept {
                None if injected.into_iter().flatten().any(|n| n == name) => None,
                None => find(pod, list, name).or_else(|| match list {
                    "initContainers" => find(pod, "containers", name),
                    _ => None,
                }),
                kept => kept,
            };
            let Some(user) = user else { continue };
            let mut user = schema::normal(Type::Container, user, name)?;
            if user["image"] == "auto" {
                user.as_object_mut().map(|c| c.remove("image"));
            }
            found.push(schema::json_text(Type::Container, &user));
            merged = strategic::merge(&merged, &json!({"spec": {list: [user]}}));
        }
        if !found.is_empty() {
            texts.push(format!("\"{list}\":[{}]", found.join(",")));
        }
    }
    if pod["metadata"]["annotations"].get(STATUS).is_none() && !texts.is_empty() {
        merged["metadata"]["annotations"][OVERRIDES] = format!("{{{}}}", texts.join(",")).into();
    }
    Ok(merged)
}

/// Where the user chose another user for the proxy, the rules must name that one.
fn adjust_users(merged: &mut Value, pod: &Value, proxy: &ProxyConfig) {
    use proto::istio::mesh::v1alpha1::proxy_config::InboundInterceptionMode::Tproxy;
    let user = LISTS.iter().find_map(|list| find(pod, list, PROXY));
    let Some(security) = user.and_then(|c| c.get("securityContext")) else {
        return;
    };
    let id = |name: &str| security.get(name).and_then(Value::as_i64);
    let (uid, gid) = (id("runAsUser"), id("runAsGroup"));
    if uid.is_none() && gid.is_none() {
        return;
    }
    let Some(init) = [INIT, VALIDATION]
        .into_iter()
        .find(|name| find(merged, "initContainers", name).is_some())
    else {
        return;
    };
    let tproxy = proxy.interception_mode == Tproxy as i32
        || merged["metadata"]["annotations"]
            .get(MODE)
            .is_some_and(|m| m == "TPROXY");
    if tproxy
        && uid.is_some()
        && let Some(sidecar) = find_proxy(merged)
    {
        sidecar["securityContext"]["runAsUser"] = 0.into();
    }
    let Some(container) = find_mut(merged, "initContainers", init) else {
        return;
    };
    if !tproxy && init == VALIDATION {
        for (name, id) in [("runAsUser", uid), ("runAsGroup", gid)] {
            if let Some(id) = id {
                container["securityContext"][name] = id.into();
            }
        }
    }
    let args = container.get_mut("args").and_then(Value::as_array_mut);
    // No rule can be about root.
    if let (Some(uid), Some(args)) = (uid.filter(|u| *u != 0), args)
        && let Some(at) = args.iter().position(|a| a == "-u")
        && let Some(value) = args.get_mut(at + 1)
    {
        *value = uid.to_string().into();
    }
}

/// What no template can say.
fn finish(
    merged: &mut Value,
    added: &Value,
    pod: &Value,
    agent_port: i64,
    proxy: &ProxyConfig,
    settings: &Settings,
) -> Result<(), Error> {
    for part in ["annotations", "labels"] {
        if !merged["metadata"][part].is_object() {
            merged["metadata"][part] = json!({});
        }
    }
    let outside = outside_env(pod, settings);
    if let Some(sidecar) = find_proxy(merged) {
        set_env(sidecar, &outside);
    }
    let merge = settings.mesh.enable_prometheus_merge.unwrap_or(true);
    let said = match &mut merged["metadata"] {
        Value::Object(metadata) => prometheus::merge(metadata, merge, agent_port)?,
        _ => None,
    };
    let was_injected = merged["metadata"]["annotations"].get(STATUS).is_some();
    if let Some(sidecar) = find_proxy(merged) {
        if let Some(text) = said {
            add_env(sidecar, prometheus::VARIABLE, text);
        }
        let env = sidecar["env"].clone();
        prometheus::secure_port(&mut merged["metadata"], &env);
        rewrite_probes(merged, agent_port, was_injected, settings);
    }
    if let Some((_, network)) = outside
        .iter()
        .find(|(name, _)| name == "ISTIO_META_NETWORK")
    {
        merged["metadata"]["labels"][NETWORK_LABEL] = network.as_str().into();
    }
    merged["metadata"]["annotations"][STATUS] = status_text(added, settings).into();
    for (name, value) in &settings.annotations {
        merged["metadata"]["annotations"][name] = value.as_str().into();
    }
    let hold = proxy.hold_application_until_proxy_starts.unwrap_or(false)
        || settings
            .values
            .is("global.proxy.holdApplicationUntilProxyStarts");
    reorder(merged, hold);
    Ok(())
}

/// Variables that come from the webhook's path, the install or a label, sorted by name.
fn outside_env(pod: &Value, settings: &Settings) -> Vec<(String, String)> {
    let mut out = settings.proxy_env.clone();
    let mut default = |name: &str, path: &str| {
        let value = settings.values.text(path);
        if !value.is_empty() && out.get(name).is_none_or(String::is_empty) {
            out.insert(name.into(), value);
        }
    };
    default("ISTIO_META_CLUSTER_ID", "global.multiCluster.clusterName");
    default("ISTIO_META_NETWORK", "global.network");
    if let Some(label) = pod["metadata"]["labels"]
        .get(NETWORK_LABEL)
        .and_then(Value::as_str)
        && !label.is_empty()
    {
        out.insert("ISTIO_META_NETWORK".into(), label.into());
    }
    out.into_iter().collect()
}

fn set_env(container: &mut Value, variables: &[(String, String)]) {
    let Some(env) = container.get_mut("env").and_then(Value::as_array_mut) else {
        return;
    };
    env.retain(|v| variables.iter().all(|(name, _)| v["name"] != *name));
    env.extend(
        variables
            .iter()
            .map(|(name, value)| json!({"name": name, "value": value})),
    );
}

fn add_env(container: &mut Value, name: &str, value: String) {
    let variable = json!({"name": name, "value": value});
    match container.get_mut("env").and_then(Value::as_array_mut) {
        Some(env) => env.push(variable),
        None => container["env"] = json!([variable]),
    }
}

fn rewrite_probes(merged: &mut Value, agent_port: i64, was_injected: bool, settings: &Settings) {
    let annotations = &merged["metadata"]["annotations"];
    let text = |name: &str| annotations.get(name).and_then(Value::as_str);
    let install = settings
        .values
        .is("sidecarInjectorWebhook.rewriteAppHTTPProbe");
    if !probes::wanted(text("sidecar.istio.io/rewriteAppHTTPProbers"), install) {
        return;
    }
    let port = text(template::STATUS_PORT)
        .and_then(|p| p.trim().parse().ok())
        .unwrap_or(agent_port);
    let originals = probes::originals(merged, agent_port);
    if let (Some(new), Some(sidecar)) = (originals, find_proxy(merged)) {
        let env = sidecar["env"].as_array_mut();
        let former = env
            .into_iter()
            .flatten()
            .find(|v| v["name"] == probes::VARIABLE);
        match former.filter(|_| was_injected) {
            Some(variable) => {
                let text = variable["value"].as_str().unwrap_or_default();
                if let Some(both) = probes::merged(text, &new) {
                    *variable = json!({"name": probes::VARIABLE, "value": both});
                }
            }
            None => add_env(sidecar, probes::VARIABLE, new),
        }
    }
    probes::rewrite(merged, port);
}

/// What was added, for the next injection and for the CNI plug-in.
fn status_text(added: &Value, settings: &Settings) -> String {
    let names = |list: &str| match added["spec"][list].as_array() {
        Some(items) if !items.is_empty() => {
            let names: Vec<String> = items
                .iter()
                .map(|i| schema::string(i["name"].as_str().unwrap_or_default()))
                .collect();
            format!("[{}]", names.join(","))
        }
        _ => "null".into(),
    };
    let revision = match settings.revision.as_str() {
        "" => "default",
        revision => revision,
    };
    format!(
        "{{\"initContainers\":{},\"containers\":{},\"volumes\":{},\"imagePullSecrets\":{},\"revision\":{}}}",
        names("initContainers"),
        names("containers"),
        names("volumes"),
        names("imagePullSecrets"),
        schema::string(revision)
    )
}

/// The proxy stands last, so that kubectl's default stays the app, or first if the app waits for it. The rules come
/// after the user's own init containers, which would have no proxy to speak through, unless the proxy is native.
fn reorder(pod: &mut Value, hold: bool) {
    place(pod, "containers", PROXY, hold);
    if find(pod, "initContainers", PROXY).is_some() {
        for name in [CORE_DUMP, PROXY, VALIDATION, INIT] {
            place(pod, "initContainers", name, true);
        }
    } else {
        place(pod, "initContainers", VALIDATION, true);
        place(pod, "initContainers", INIT, false);
        place(pod, "initContainers", CORE_DUMP, false);
    }
}

const CORE_DUMP: &str = "enable-core-dump";

fn place(pod: &mut Value, list: &str, name: &str, first: bool) {
    let Some(items) = pod["spec"].get_mut(list).and_then(Value::as_array_mut) else {
        return;
    };
    if let Some(at) = items.iter().position(|c| c["name"] == name) {
        let container = items.remove(at);
        items.insert(if first { 0 } else { items.len() }, container);
    }
}

fn find<'a>(pod: &'a Value, list: &str, name: &str) -> Option<&'a Value> {
    pod["spec"][list]
        .as_array()?
        .iter()
        .find(|c| c["name"] == name)
}

fn find_mut<'a>(pod: &'a mut Value, list: &str, name: &str) -> Option<&'a mut Value> {
    pod["spec"]
        .get_mut(list)?
        .as_array_mut()?
        .iter_mut()
        .find(|c| c["name"] == name)
}

/// The proxy, wherever it stands.
fn find_proxy(pod: &mut Value) -> Option<&mut Value> {
    let list = LISTS
        .into_iter()
        .find(|list| find(pod, list, PROXY).is_some())?;
    find_mut(pod, list, PROXY)
}

fn push(pod: &mut Value, list: &str, container: Value) {
    if let Value::Object(spec) = &mut pod["spec"] {
        let items = spec.entry(list).or_insert_with(|| json!([]));
        if let Value::Array(items) = items {
            items.push(container);
        }
    }
}

/// The workload that a pod of a cluster belongs to, told by its controller.
pub fn owner(pod: &Value) -> Owner {
    let metadata = &pod["metadata"];
    let text = |name: &str| metadata[name].as_str().unwrap_or_default().to_string();
    let mut owner = Owner {
        api_version: "v1".into(),
        kind: "Pod".into(),
        name: text("name"),
        namespace: text("namespace"),
    };
    if text("generateName").is_empty() {
        return owner;
    }
    let references = metadata["ownerReferences"].as_array();
    if let Some(reference) = references
        .into_iter()
        .flatten()
        .find(|r| r["controller"] == true)
    {
        let text = |name: &str| reference[name].as_str().unwrap_or_default().to_string();
        (owner.api_version, owner.kind, owner.name) =
            (text("apiVersion"), text("kind"), text("name"));
        let empty = Map::new();
        let labels = metadata["labels"].as_object().unwrap_or(&empty);
        told_by_name(&mut owner, labels);
    }
    owner
}

/// Controllers that belong to another workload: its name is in theirs.
fn told_by_name(owner: &mut Owner, labels: &Map<String, Value>) {
    let label = |name: &str| {
        labels
            .get(name)
            .and_then(Value::as_str)
            .filter(|t| !t.is_empty())
    };
    let without = |hash: &str| {
        owner
            .name
            .strip_suffix(hash)
            .map(|n| n.strip_suffix('-').unwrap_or(n).to_string())
    };
    match owner.kind.as_str() {
        "ReplicaSet" => {
            if let Some(name) = label("pod-template-hash").and_then(without) {
                (owner.name, owner.kind) = (name, "Deployment".into());
            } else if let Some(name) = label("rollouts-pod-template-hash").and_then(without) {
                (owner.name, owner.kind) = (name, "Rollout".into());
                owner.api_version = "v1alpha1".into();
            }
        }
        "ReplicationController" => {
            if let Some(name) = label("deploymentconfig") {
                (owner.name, owner.kind) = (name.into(), "DeploymentConfig".into());
            }
        }
        "Job" => {
            let parts = owner.name.rsplit_once('-');
            if let Some((name, time)) = parts
                && (8..=10).contains(&time.len())
                && time.bytes().all(|b| b.is_ascii_digit())
                && !name.is_empty()
            {
                (owner.name, owner.kind) = (name.to_string(), "CronJob".into());
                owner.api_version = "batch/v1".into();
            }
        }
        _ => {}
    }
}
