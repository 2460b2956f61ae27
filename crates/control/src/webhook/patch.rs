//! The difference of two documents as a JSON patch (RFC 6902).

use serde_json::{Value, json};

/// The operations that make `new` of `old`. Lists that differ are replaced as a whole.
pub(super) fn diff(old: &Value, new: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    walk(old, new, "", &mut out);
    out
}

fn walk(old: &Value, new: &Value, path: &str, out: &mut Vec<Value>) {
    if old == new {
        return;
    }
    let (Value::Object(before), Value::Object(after)) = (old, new) else {
        out.push(json!({"op": "replace", "path": path, "value": new}));
        return;
    };
    for (key, value) in before {
        let path = format!("{path}/{}", escaped(key));
        match after.get(key) {
            Some(new) => walk(value, new, &path, out),
            None => out.push(json!({"op": "remove", "path": path})),
        }
    }
    for (key, value) in after.iter().filter(|(k, _)| !before.contains_key(*k)) {
        let path = format!("{path}/{}", escaped(key));
        out.push(json!({"op": "add", "path": path, "value": value}));
    }
}

/// RFC 6901, 3.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_touched() {
        let old = json!({"a": {"x/y": 1, "b~": [1, 2], "c": 3}, "same": {"n": null}});
        let new = json!({"a": {"x/y": 2, "b~": [1, 2, 3], "d": {}}, "same": {"n": null}});
        assert_eq!(
            diff(&old, &new),
            [
                json!({"op": "replace", "path": "/a/b~0", "value": [1, 2, 3]}),
                json!({"op": "remove", "path": "/a/c"}),
                json!({"op": "replace", "path": "/a/x~1y", "value": 2}),
                json!({"op": "add", "path": "/a/d", "value": {}}),
            ]
        );
        assert!(diff(&new, &new).is_empty());
    }
}
