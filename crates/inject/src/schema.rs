//! How Kubernetes prints a container and its parts: which fields, in which order, and which are left out when empty.
//!
//! A pod passes through Kubernetes' types when it is injected, and parts of it travel as JSON text (the ports and probes
//! that the agent gets, the user's own container in an annotation): the order of fields is then part of the value.

use serde_json::{Map, Value, json};

use crate::{Error, quantity};

/// A type of Kubernetes' API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A container.
    Container,
    /// A port of a container.
    Port,
    /// A probe's or hook's HTTP call.
    HttpGet,
    /// A probe's or hook's TCP connection.
    TcpSocket,
    /// A probe's gRPC call.
    Grpc,
    /// A type without a table of its own: printed with its keys sorted.
    Any,
    /// Named parts of the types above.
    Part(&'static [Field]),
}

/// One field: its name and how it is printed.
pub type Field = (&'static str, Print);

/// How a field is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Print {
    /// Left out if it is its type's zero value.
    NotZero,
    /// Left out only if it is not there.
    IfThere,
    /// `null` if it is not there.
    Always,
    /// A part; left out only if it is not there.
    One(Type),
    /// A part that is printed even if it is empty.
    Whole(Type),
    /// A list of parts, left out if empty.
    Many(Type),
    /// An object of quantities, left out if empty.
    Quantities,
    /// A quantity; `"0"` if it is not there.
    Quantity,
}

use Print::*;

impl Type {
    fn fields(self) -> Option<&'static [Field]> {
        match self {
            Type::Container => Some(CONTAINER),
            Type::Port => Some(PORT),
            Type::HttpGet => Some(HTTP_GET),
            Type::TcpSocket => Some(TCP_SOCKET),
            Type::Grpc => Some(GRPC),
            Type::Part(fields) => Some(fields),
            Type::Any => None,
        }
    }
}

/// The value as its type holds it: zero values gone, quantities canonical. Fields that are not known stay.
pub fn normal(kind: Type, value: &Value, path: &str) -> Result<Value, Error> {
    let (Some(fields), Value::Object(object)) = (kind.fields(), value) else {
        return Ok(value.clone());
    };
    let mut out = Map::new();
    for (name, value) in object
        .iter()
        .filter(|(n, _)| fields.iter().all(|(f, _)| f != n))
    {
        out.insert(name.clone(), value.clone());
    }
    for (name, print) in fields {
        let value = object.get(*name).filter(|v| !v.is_null());
        let path = format!("{path}.{name}");
        if let Some(value) = value {
            check(name, value, &path)?;
        }
        let value = match (print, value) {
            (Always | NotZero | IfThere | One(_) | Many(_) | Quantities, None) => continue,
            (NotZero, Some(v)) if zero(v) => continue,
            (Many(_) | Quantities, Some(v)) if zero(v) => continue,
            (NotZero | IfThere | Always, Some(v)) => v.clone(),
            (One(kind) | Whole(kind), Some(v)) => normal(*kind, v, &path)?,
            (Whole(_), None) => json!({}),
            (Many(kind), Some(v)) => {
                let list = v.as_array().ok_or_else(|| Error::Invalid {
                    path: path.clone(),
                    why: "a list is expected".into(),
                })?;
                let items = list
                    .iter()
                    .enumerate()
                    .map(|(i, v)| normal(*kind, v, &format!("{path}[{i}]")));
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            (Quantities, Some(v)) => quantities(v, &path)?,
            (Quantity, Some(v)) => canonical(v, &path)?,
            (Quantity, None) => "0".into(),
        };
        out.insert(name.to_string(), value);
    }
    Ok(Value::Object(out))
}

/// Refuses numbers and truth values where Kubernetes takes only text: an unquoted `true` or `8080` in YAML.
fn check(name: &str, value: &Value, path: &str) -> Result<(), Error> {
    match value {
        Value::Array(items) if matches!(name, "args" | "command" | "add" | "drop") => items
            .iter()
            .enumerate()
            .try_for_each(|(i, item)| text(item, &format!("{path}[{i}]"))),
        value if TEXTS.contains(&name) => text(value, path),
        _ => Ok(()),
    }
}

/// Refuses what is no text.
pub fn text(value: &Value, path: &str) -> Result<(), Error> {
    let kind = match value {
        Value::String(_) => return Ok(()),
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        _ => "something else",
    };
    Err(Error::Invalid {
        path: path.into(),
        why: format!("a text is expected and {kind} is given ({value}): put it in quotes"),
    })
}

/// Fields that are texts wherever they stand.
const TEXTS: &[&str] = &[
    "name",
    "image",
    "workingDir",
    "value",
    "path",
    "host",
    "scheme",
    "protocol",
    "hostIP",
    "prefix",
    "key",
    "fieldPath",
    "resource",
    "containerName",
    "mountPath",
    "subPath",
    "imagePullPolicy",
    "restartPolicy",
];

/// An object of quantities in canonical form.
pub fn quantities(value: &Value, path: &str) -> Result<Value, Error> {
    let Value::Object(object) = value else {
        return Ok(value.clone());
    };
    object
        .iter()
        .map(|(k, v)| Ok((k.clone(), canonical(v, &format!("{path}.{k}"))?)))
        .collect::<Result<Map<_, _>, Error>>()
        .map(Value::Object)
}

fn canonical(value: &Value, path: &str) -> Result<Value, Error> {
    let text = match value {
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    quantity::canonical(&text)
        .map(Value::String)
        .map_err(|why| Error::Invalid {
            path: path.into(),
            why,
        })
}

/// The value as compact JSON with its type's order of fields; it must be [`normal`].
pub fn json_text(kind: Type, value: &Value) -> String {
    match value {
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(|v| json_text(kind, v)).collect();
            format!("[{}]", items.join(","))
        }
        Value::Object(object) => {
            let fields = kind.fields().unwrap_or_default();
            let mut out = Vec::new();
            let mut add = |name: &str, text: String| out.push(format!("{}:{text}", string(name)));
            for (name, print) in fields {
                match (object.get(*name), print) {
                    (Some(v), One(kind) | Whole(kind) | Many(kind)) => {
                        add(name, json_text(*kind, v));
                    }
                    (Some(v), _) => add(name, json_text(Type::Any, v)),
                    (None, Always) => add(name, "null".into()),
                    (None, _) => {}
                }
            }
            for (name, v) in object
                .iter()
                .filter(|(n, _)| fields.iter().all(|(f, _)| f != n))
            {
                add(name, json_text(Type::Any, v));
            }
            format!("{{{}}}", out.join(","))
        }
        Value::String(s) => string(s),
        other => other.to_string(),
    }
}

/// A string as Go prints it in JSON: `<`, `>` and `&` are escaped.
pub fn string(text: &str) -> String {
    Value::from(text)
        .to_string()
        .replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

fn zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
    }
}

const CONTAINER: &[Field] = &[
    ("name", IfThere),
    ("image", NotZero),
    ("command", NotZero),
    ("args", NotZero),
    ("workingDir", NotZero),
    ("ports", Many(Type::Port)),
    ("envFrom", Many(Type::Part(ENV_FROM))),
    ("env", Many(Type::Part(ENV))),
    ("resources", Whole(Type::Part(RESOURCES))),
    ("resizePolicy", Many(Type::Part(RESIZE))),
    ("restartPolicy", IfThere),
    ("volumeMounts", Many(Type::Part(MOUNT))),
    ("volumeDevices", Many(Type::Part(DEVICE))),
    ("livenessProbe", One(Type::Part(PROBE))),
    ("readinessProbe", One(Type::Part(PROBE))),
    ("startupProbe", One(Type::Part(PROBE))),
    ("lifecycle", One(Type::Part(LIFECYCLE))),
    ("terminationMessagePath", NotZero),
    ("terminationMessagePolicy", NotZero),
    ("imagePullPolicy", NotZero),
    ("securityContext", One(Type::Part(SECURITY))),
    ("stdin", NotZero),
    ("stdinOnce", NotZero),
    ("tty", NotZero),
];

const PORT: &[Field] = &[
    ("name", NotZero),
    ("hostPort", NotZero),
    ("containerPort", IfThere),
    ("protocol", NotZero),
    ("hostIP", NotZero),
];

const ENV_FROM: &[Field] = &[
    ("prefix", NotZero),
    ("configMapRef", One(Type::Part(REFERENCE))),
    ("secretRef", One(Type::Part(REFERENCE))),
];

const REFERENCE: &[Field] = &[("name", NotZero), ("optional", IfThere)];

const ENV: &[Field] = &[
    ("name", IfThere),
    ("value", NotZero),
    ("valueFrom", One(Type::Part(ENV_SOURCE))),
];

const ENV_SOURCE: &[Field] = &[
    (
        "fieldRef",
        One(Type::Part(&[
            ("apiVersion", NotZero),
            ("fieldPath", IfThere),
        ])),
    ),
    (
        "resourceFieldRef",
        One(Type::Part(&[
            ("containerName", NotZero),
            ("resource", IfThere),
            ("divisor", Quantity),
        ])),
    ),
    ("configMapKeyRef", One(Type::Part(KEY))),
    ("secretKeyRef", One(Type::Part(KEY))),
];

const KEY: &[Field] = &[("name", NotZero), ("key", IfThere), ("optional", IfThere)];

const RESOURCES: &[Field] = &[
    ("limits", Quantities),
    ("requests", Quantities),
    (
        "claims",
        Many(Type::Part(&[("name", IfThere), ("request", NotZero)])),
    ),
];

const RESIZE: &[Field] = &[("resourceName", IfThere), ("restartPolicy", IfThere)];

const MOUNT: &[Field] = &[
    ("name", IfThere),
    ("readOnly", NotZero),
    ("recursiveReadOnly", IfThere),
    ("mountPath", IfThere),
    ("subPath", NotZero),
    ("mountPropagation", IfThere),
    ("subPathExpr", NotZero),
];

const DEVICE: &[Field] = &[("name", IfThere), ("devicePath", IfThere)];

const PROBE: &[Field] = &[
    ("exec", One(Type::Part(EXEC))),
    ("httpGet", One(Type::HttpGet)),
    ("tcpSocket", One(Type::TcpSocket)),
    ("grpc", One(Type::Grpc)),
    ("initialDelaySeconds", NotZero),
    ("timeoutSeconds", NotZero),
    ("periodSeconds", NotZero),
    ("successThreshold", NotZero),
    ("failureThreshold", NotZero),
    ("terminationGracePeriodSeconds", IfThere),
];

const EXEC: &[Field] = &[("command", NotZero)];

const HTTP_GET: &[Field] = &[
    ("path", NotZero),
    ("port", IfThere),
    ("host", NotZero),
    ("scheme", NotZero),
    (
        "httpHeaders",
        Many(Type::Part(&[("name", IfThere), ("value", IfThere)])),
    ),
];

const TCP_SOCKET: &[Field] = &[("port", IfThere), ("host", NotZero)];

const GRPC: &[Field] = &[("port", IfThere), ("service", Always)];

const LIFECYCLE: &[Field] = &[
    ("postStart", One(Type::Part(HANDLER))),
    ("preStop", One(Type::Part(HANDLER))),
    ("stopSignal", IfThere),
];

const HANDLER: &[Field] = &[
    ("exec", One(Type::Part(EXEC))),
    ("httpGet", One(Type::HttpGet)),
    ("tcpSocket", One(Type::TcpSocket)),
    ("sleep", One(Type::Part(&[("seconds", IfThere)]))),
];

const SECURITY: &[Field] = &[
    (
        "capabilities",
        One(Type::Part(&[("add", NotZero), ("drop", NotZero)])),
    ),
    ("privileged", IfThere),
    (
        "seLinuxOptions",
        One(Type::Part(&[
            ("user", NotZero),
            ("role", NotZero),
            ("type", NotZero),
            ("level", NotZero),
        ])),
    ),
    ("windowsOptions", One(Type::Any)),
    ("runAsUser", IfThere),
    ("runAsGroup", IfThere),
    ("runAsNonRoot", IfThere),
    ("readOnlyRootFilesystem", IfThere),
    ("allowPrivilegeEscalation", IfThere),
    ("procMount", IfThere),
    (
        "seccompProfile",
        One(Type::Part(&[
            ("type", IfThere),
            ("localhostProfile", IfThere),
        ])),
    ),
    (
        "appArmorProfile",
        One(Type::Part(&[
            ("type", IfThere),
            ("localhostProfile", IfThere),
        ])),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_printed_in_the_order_of_its_type() {
        let container = json!({
            "env": [{"value": "1", "name": "A"}, {"name": "B", "value": ""}],
            "resources": {"requests": {"cpu": 0.5}},
            "tty": false,
            "livenessProbe": {"grpc": {"port": 1}, "timeoutSeconds": 0},
            "name": "istio-proxy",
        });
        let normal = normal(Type::Container, &container, "c").unwrap();
        assert_eq!(
            json_text(Type::Container, &normal),
            r#"{"name":"istio-proxy","env":[{"name":"A","value":"1"},{"name":"B"}],"resources":{"requests":{"cpu":"500m"}},"livenessProbe":{"grpc":{"port":1,"service":null}}}"#
        );
        assert_eq!(string("<a&b>"), r#""\u003ca\u0026b\u003e""#);
        let wrong = json!({"resources": {"limits": {"cpu": "many"}}});
        let error = super::normal(Type::Container, &wrong, "c")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("c.resources.limits.cpu: quantities"),
            "{error}"
        );
    }

    #[test]
    fn what_kubernetes_would_refuse_is_named_by_its_place() {
        for (container, error) in [
            (
                json!({"resources": {"limits": {"cpu": "many"}}}),
                "c.resources.limits.cpu: quantities must match",
            ),
            (
                json!({"env": [{"name": "A", "value": true}]}),
                "c.env[0].value: a text is expected and a truth value is given (true): put it in quotes",
            ),
            (
                json!({"args": ["a", 1]}),
                "c.args[1]: a text is expected and a number is given (1): put it in quotes",
            ),
            (
                json!({"livenessProbe": {"httpGet": {"httpHeaders": [{"name": "x", "value": 1}]}}}),
                "c.livenessProbe.httpGet.httpHeaders[0].value: a text is expected",
            ),
            (json!({"ports": {"a": 1}}), "c.ports: a list is expected"),
        ] {
            let found = normal(Type::Container, &container, "c")
                .unwrap_err()
                .to_string();
            assert!(found.starts_with(error), "{found}");
        }
    }
}
