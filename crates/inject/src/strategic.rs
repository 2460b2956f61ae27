//! Strategic merge: Kubernetes' way to lay one partial object over another.
//!
//! Objects merge key by key, `null` removes, and lists are replaced, except those of the table below: their items are
//! merged by a key. The order of such a list is that of the patch, with the items that only the original has put where
//! the original had them relative to items of both.

use serde_json::{Map, Value};

/// Lays `patch` over `original`, both pods (or parts of one with the same field names).
pub fn merge(original: &Value, patch: &Value) -> Value {
    match (original, patch) {
        (Value::Object(original), Value::Object(patch)) => {
            let mut out: Map<String, Value> = original.clone();
            for (name, value) in patch {
                if value.is_null() {
                    out.remove(name);
                    continue;
                }
                let merged = match (out.get(name), value) {
                    (Some(Value::Array(old)), Value::Array(new)) => match list(name, old, new) {
                        Some(items) => Value::Array(items),
                        None => without_nulls(value),
                    },
                    (Some(old), value) => merge(old, value),
                    (None, value) => without_nulls(value),
                };
                out.insert(name.clone(), merged);
            }
            Value::Object(out)
        }
        _ => without_nulls(patch),
    }
}

/// Nulls of a patch say what to remove; in new objects they leave nothing behind.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(object) => object
            .iter()
            .filter(|(_, v)| !v.is_null())
            .map(|(k, v)| (k.clone(), without_nulls(v)))
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

fn list(name: &str, old: &[Value], new: &[Value]) -> Option<Vec<Value>> {
    let key = KEYS.iter().find(|(list, _)| *list == name)?.1;
    // Lists of the same name elsewhere (a NetworkPolicy's ports, say) hold other things.
    if !old.iter().chain(new).all(|item| item.get(key).is_some()) {
        return None;
    }
    let place = |item: &Value| old.iter().position(|o| o.get(key) == item.get(key));
    let mut merged: Vec<(Option<usize>, Value)> = Vec::new();
    for item in new {
        if let Some((_, twin)) = merged.iter_mut().find(|(_, m)| m.get(key) == item.get(key)) {
            *twin = merge(twin, item);
            continue;
        }
        let at = place(item);
        let value = match at {
            Some(i) => merge(&old[i], item),
            None => without_nulls(item),
        };
        merged.push((at, value));
    }
    let mut kept = old
        .iter()
        .enumerate()
        .filter(|(_, o)| new.iter().all(|n| n.get(key) != o.get(key)))
        .peekable();
    let mut out = Vec::with_capacity(old.len() + new.len());
    for (at, item) in merged {
        while let Some((i, o)) = kept.peek()
            && at.is_some_and(|at| *i < at)
        {
            out.push((*o).clone());
            kept.next();
        }
        out.push(item);
    }
    out.extend(kept.map(|(_, o)| o.clone()));
    Some(out)
}

/// The lists of a pod that are merged, and their keys.
const KEYS: &[(&str, &str)] = &[
    ("containers", "name"),
    ("initContainers", "name"),
    ("ephemeralContainers", "name"),
    ("volumes", "name"),
    ("imagePullSecrets", "name"),
    ("env", "name"),
    ("ports", "containerPort"),
    ("volumeMounts", "mountPath"),
    ("volumeDevices", "devicePath"),
    ("hostAliases", "ip"),
    ("topologySpreadConstraints", "topologyKey"),
    ("resourceClaims", "name"),
    ("schedulingGates", "name"),
    ("ownerReferences", "uid"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn items_merge_by_key_and_keep_their_places() {
        let pod = json!({"containers": [{"name": "web", "env": [{"name": "A", "value": "1"}]}]});
        let patch = json!({"containers": [{"name": "istio-proxy", "args": ["x"]}]});
        let both = merge(&pod, &patch);
        assert_eq!(both["containers"][0]["name"], "istio-proxy");
        assert_eq!(both["containers"][1]["name"], "web");
        let old = json!({"env": [{"name": "A"}, {"name": "B"}, {"name": "C"}], "args": ["a", "b"]});
        let new = json!({"env": [{"name": "C", "value": "3"}, {"name": "D"}], "args": ["c"]});
        assert_eq!(
            merge(&old, &new),
            json!({"env": [{"name": "A"}, {"name": "B"}, {"name": "C", "value": "3"}, {"name": "D"}], "args": ["c"]})
        );
    }

    #[test]
    fn null_removes_and_leaves_nothing() {
        let old = json!({"a": {"b": 1, "c": 2}});
        assert_eq!(
            merge(&old, &json!({"a": {"b": null}, "d": {"e": null}})),
            json!({"a": {"c": 2}, "d": {}})
        );
    }
}
