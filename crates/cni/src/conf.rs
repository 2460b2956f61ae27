//! The network configuration on standard input, as istio-cni's installer writes it.

use serde_json::Value;

use crate::CniError;

/// Where pods are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The Kubernetes API, by the kubeconfig of that path.
    Kubeconfig(String),
    /// Files with Pod objects below that folder.
    Folder(String),
}

/// What of the configuration matters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Conf {
    /// The protocol's version that the runtime speaks.
    pub(crate) version: String,
    /// What the plug-ins before this one made; passed on as it is.
    pub(crate) previous: Option<Value>,
    /// Namespaces whose pods are left alone.
    pub(crate) excluded: Vec<String>,
    /// The namespace of the node agent, whose own pods must start even if nothing can be asked.
    pub(crate) own_namespace: String,
    /// Whether nft writes the rules.
    pub(crate) native_nftables: bool,
    /// As `--tproxy-notrack`, for every pod of mode TPROXY.
    pub(crate) tproxy_notrack: bool,
    /// As `--ebpf-sockmap`, for every pod of mode EBPF; empty is off.
    pub(crate) ebpf_sockmap: String,
    /// As `--ebpf-fallback`.
    pub(crate) ebpf_fallback: bool,
    /// Where pods are asked for.
    pub(crate) source: Option<Source>,
}

/// The versions spoken.
pub(crate) const VERSIONS: [&str; 4] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0"];

impl Conf {
    /// Reads the configuration strictly: a key that nobody here knows is refused by name.
    pub(crate) fn parse(text: &str) -> Result<Conf, CniError> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| CniError::Decode(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(CniError::Decode("an object is expected".into()));
        };
        let mut conf = Conf {
            version: "0.1.0".into(),
            previous: None,
            excluded: Vec::new(),
            own_namespace: String::new(),
            native_nftables: false,
            tproxy_notrack: false,
            ebpf_sockmap: String::new(),
            ebpf_fallback: false,
            source: None,
        };
        for (key, value) in &map {
            match key.as_str() {
                "cniVersion" => conf.version = text_of(key, value)?,
                "prevResult" => conf.previous = Some(value.clone()).filter(|v| !v.is_null()),
                "exclude_namespaces" => conf.excluded = texts_of(key, value)?,
                "pod_namespace" => conf.own_namespace = text_of(key, value)?,
                "native_nftables" => conf.native_nftables = switch_of(key, value)?,
                "tproxy_notrack" => conf.tproxy_notrack = switch_of(key, value)?,
                "ebpf_sockmap" => conf.ebpf_sockmap = text_of(key, value)?,
                "ebpf_fallback" => conf.ebpf_fallback = switch_of(key, value)?,
                "kubeconfig" => conf.source = Some(Source::Kubeconfig(text_of(key, value)?)),
                "outrigger_pods" => conf.source = Some(Source::Folder(text_of(key, value)?)),
                "kubernetes" => conf.kubernetes(value)?,
                "ambient_enabled" if switch_of(key, value)? => {
                    return Err(CniError::Unsupported {
                        field: key.clone(),
                        why: "ambient pods are not built in; set it to false".into(),
                    });
                }
                // The runtime's own keys, and those that say where logs go (here: standard error).
                "name"
                | "type"
                | "args"
                | "dns"
                | "ipam"
                | "ipMasq"
                | "capabilities"
                | "runtimeConfig"
                | "disableCheck"
                | "log_level"
                | "plugin_log_level"
                | "log_uds_address"
                | "cni_agent_run_dir"
                | "cni_event_address"
                | "ambient_enabled"
                | "enablement_selectors"
                | "enable_ambient_retry" => {}
                key if key.starts_with("cni.dev/") => {}
                other => {
                    return Err(CniError::Unsupported {
                        field: other.into(),
                        why: "not a key of this plug-in".into(),
                    });
                }
            }
        }
        if !VERSIONS.contains(&conf.version.as_str()) {
            return Err(CniError::Version(conf.version));
        }
        Ok(conf)
    }

    /// The older form keeps some keys below `kubernetes`.
    fn kubernetes(&mut self, value: &Value) -> Result<(), CniError> {
        for (key, value) in value.as_object().into_iter().flatten() {
            let path = format!("kubernetes.{key}");
            match key.as_str() {
                "kubeconfig" => self.source = Some(Source::Kubeconfig(text_of(&path, value)?)),
                "exclude_namespaces" => self.excluded = texts_of(&path, value)?,
                // What the older installer needed to find itself again.
                "cni_bin_dir" | "intercept_type" | "node_name" => {}
                _ => {
                    return Err(CniError::Unsupported {
                        field: path,
                        why: "not a key of this plug-in".into(),
                    });
                }
            }
        }
        Ok(())
    }
}

fn wrong(field: &str, what: &str) -> CniError {
    CniError::Config {
        field: field.into(),
        why: format!("{what} is expected"),
    }
}

fn text_of(field: &str, value: &Value) -> Result<String, CniError> {
    let text = value.as_str().ok_or_else(|| wrong(field, "a text"))?;
    Ok(text.into())
}

fn switch_of(field: &str, value: &Value) -> Result<bool, CniError> {
    value.as_bool().ok_or_else(|| wrong(field, "true or false"))
}

fn texts_of(field: &str, value: &Value) -> Result<Vec<String>, CniError> {
    let list = value
        .as_array()
        .ok_or_else(|| wrong(field, "a list of texts"))?;
    list.iter().map(|v| text_of(field, v)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_installer_are_read() {
        let conf = Conf::parse(
            r#"{"cniVersion": "1.0.0", "name": "x", "type": "istio-cni", "plugin_log_level": "info",
                "kubernetes": {"kubeconfig": "/k", "exclude_namespaces": ["a"]}, "prevResult": {"ips": []}}"#,
        )
        .unwrap();
        assert_eq!(conf.source, Some(Source::Kubeconfig("/k".into())));
        assert_eq!(conf.excluded, ["a"]);
        assert!(conf.previous.is_some());
        let conf = Conf::parse(
            r#"{"cniVersion": "0.3.1", "exclude_namespaces": ["b"], "native_nftables": true, "kubeconfig": "/k"}"#,
        )
        .unwrap();
        assert!(conf.native_nftables && conf.excluded == ["b"]);
    }

    #[test]
    fn what_is_not_known_is_named() {
        let code = |text: &str| {
            let e = Conf::parse(text).unwrap_err();
            (e.code(), e.to_string())
        };
        assert_eq!(code("nope").0, 6);
        assert_eq!(code(r#"{"cniVersion": "9.0.0"}"#).0, 1);
        assert_eq!(
            code(r#"{"cniVersion": "1.0.0", "exclude_namespaces": "a"}"#).0,
            7
        );
        let (n, text) = code(r#"{"cniVersion": "1.0.0", "kubernetes": {"zone": 1}}"#);
        assert_eq!((n, text.contains("kubernetes.zone")), (2, true));
        let (n, text) = code(r#"{"cniVersion": "1.0.0", "ambient_enabled": true}"#);
        assert_eq!((n, text.contains("ambient_enabled")), (2, true));
    }
}
