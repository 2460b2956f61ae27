//! A config dump: Envoy's `/config_dump`, or istiod's `/debug/config_dump` in the same form.

use std::{fs, io::Read, path::Path};

use anyhow::{Context, bail};
use serde_json::Value;

/// The parts of a dump.
#[derive(Debug)]
pub(crate) struct Dump {
    configs: Vec<Value>,
}

impl Dump {
    /// Reads a file, or standard input for `-`.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let mut text = Vec::new();
        if path.as_os_str() == "-" {
            std::io::stdin()
                .read_to_end(&mut text)
                .context("cannot read standard input")?;
        } else {
            text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads the JSON text; `source` names it in errors.
    pub(crate) fn parse(text: &[u8], source: &str) -> anyhow::Result<Self> {
        let mut value: Value =
            serde_json::from_slice(text).with_context(|| format!("{source}: not JSON"))?;
        match value.get_mut("configs").map(Value::take) {
            Some(Value::Array(configs)) => Ok(Self { configs }),
            _ => bail!(
                "{source}: no config dump: expected {{\"configs\": […]}} as /config_dump of a proxy's admin \
                 interface gives it"
            ),
        }
    }

    /// The whole dump.
    pub(crate) fn raw(&self) -> Value {
        serde_json::json!({"configs": self.configs})
    }

    /// The section whose type ends in `name`, e.g. `ClustersConfigDump`.
    fn section(&self, name: &str) -> Option<&Value> {
        self.configs.iter().find(|c| {
            let kind = c.get("@type").and_then(Value::as_str).unwrap_or_default();
            kind.rsplit_once('.').is_some_and(|(_, last)| last == name)
        })
    }

    /// The resources of a section in canonical form: of each list in `lists` (in that order), what `path` leads to.
    pub(crate) fn resources(
        &self,
        section: &str,
        lists: &[(&str, &[&str])],
        full_name: &str,
    ) -> Vec<Value> {
        let Some(section) = self.section(section) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        for (list, path) in lists {
            for entry in field(section, list)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                let resource = path.iter().try_fold(entry, |value, key| field(value, key));
                if let Some(resource) = resource {
                    out.push(canonical(full_name, resource));
                }
            }
        }
        out
    }

    /// The bootstrap.
    pub(crate) fn bootstrap(&self) -> Option<Value> {
        let bootstrap = field(self.section("BootstrapConfigDump")?, "bootstrap")?;
        Some(canonical("envoy.config.bootstrap.v3.Bootstrap", bootstrap))
    }
}

/// A field by its JSON name or by its proto name: Envoy writes the latter, istiod the former.
pub(crate) fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).or_else(|| {
        let mut snake = String::with_capacity(name.len() + 4);
        for c in name.chars() {
            if c.is_ascii_uppercase() {
                snake.push('_');
            }
            snake.push(c.to_ascii_lowercase());
        }
        value.get(snake)
    })
}

/// The resource with canonical names, whichever it was written with; as it is where it holds types that this
/// program does not know.
fn canonical(full_name: &str, resource: &Value) -> Value {
    let mut resource = resource.clone();
    if let Some(fields) = resource.as_object_mut() {
        fields.remove("@type");
    }
    proto::json::value_to_encoded(full_name, &resource)
        .ok()
        .and_then(|bytes| proto::json::encoded_to_value(full_name, &bytes))
        .unwrap_or(resource)
}

/// JSON indented by four blanks, as Go's programs do it.
pub(crate) fn indented(value: &Value) -> String {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut writer = serde_json::Serializer::with_formatter(&mut out, formatter);
    serde::Serialize::serialize(value, &mut writer).expect("a JSON value is always writable");
    String::from_utf8(out).expect("JSON is UTF-8")
}

/// Text at a JSON pointer; empty where there is none.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// List at a JSON pointer; empty where there is none.
pub(crate) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

/// `NAME.NAMESPACE` of the Istio object that a resource's metadata names; empty where it names none.
pub(crate) fn managed_by(resource: &Value) -> String {
    let path = text(resource, "/metadata/filterMetadata/istio/config");
    if path.is_empty() {
        return String::new();
    }
    // /apis/networking.istio.io/v1/namespaces/NAMESPACE/KIND/NAME
    let parts: Vec<_> = path.split('/').collect();
    match parts.as_slice() {
        [
            "",
            "apis",
            "networking.istio.io",
            _,
            "namespaces",
            namespace,
            _,
            name,
        ] => {
            format!("{name}.{namespace}")
        }
        _ => path.to_owned(),
    }
}
