//! MeshConfig and MeshNetworks: the ConfigMap `istio` of the root namespace over Istio's defaults.
//!
//! As in Istio, a field that is given replaces the default as a whole; only `defaultConfig` is merged field by field
//! (its `proxyMetadata` key by key), `defaultProviders` field by field and `extensionProviders` by name.

use prost::Name;
use proto::{
    istio::mesh::v1alpha1::{MeshConfig, MeshNetworks, ProxyConfig},
    json::{self, JsonError, MessageDescriptor},
};
use serde_json::{Map, Value, json};

/// Keys of the ConfigMap.
pub const MESH_KEY: &str = "mesh";
/// See [`MESH_KEY`].
pub const NETWORKS_KEY: &str = "meshNetworks";

/// A MeshConfig and what of the user's text had no effect.
#[derive(Debug)]
pub struct Read<T> {
    /// What the text and the defaults say together.
    pub config: T,
    /// Fields that are unknown (removed from Istio, or misspelt), by path.
    pub unknown: Vec<String>,
}

/// Istio's defaults.
pub fn defaults() -> MeshConfig {
    json::from_value(&defaults_json()).expect("the defaults are a MeshConfig; a test reads them")
}

/// The user's MeshConfig over the defaults. Unknown fields have no effect and are listed: one of them must not undo a
/// whole mesh's settings.
pub fn merge(user: &Value) -> Result<Read<MeshConfig>, JsonError> {
    let (user, unknown) = known::<MeshConfig>(user)?;
    let mut out = defaults_json();
    for (name, value) in user {
        let target = &mut out[&name];
        match name.as_str() {
            "defaultConfig" => {
                *target = merge_proxy_config(target.take(), value);
            }
            "defaultProviders" => merge_objects(target, value),
            "extensionProviders" => merge_by_name(target, value),
            _ => *target = value,
        }
    }
    Ok(Read {
        config: json::from_value(&out)?,
        unknown,
    })
}

/// A ProxyConfig (of the annotation `proxy.istio.io/config`, say) over another one.
pub fn merge_proxy(base: &ProxyConfig, user: &Value) -> Result<Read<ProxyConfig>, JsonError> {
    let (user, unknown) = known::<ProxyConfig>(user)?;
    let out = merge_proxy_config(json::to_value(base), Value::Object(user));
    Ok(Read {
        config: json::from_value(&out)?,
        unknown,
    })
}

/// MeshNetworks of its own document.
pub fn networks(user: &Value) -> Result<MeshNetworks, JsonError> {
    json::from_value(user)
}

fn defaults_json() -> Value {
    json!({
        "enableTracing": true,
        "accessLogEncoding": "TEXT",
        "protocolDetectionTimeout": "0s",
        "ingressService": "istio-ingressgateway",
        "ingressControllerMode": "STRICT",
        "ingressClass": "istio",
        "trustDomain": "cluster.local",
        "enableAutoMtls": true,
        "outboundTrafficPolicy": {"mode": "ALLOW_ANY"},
        "inboundTrafficPolicy": {"mode": "PASSTHROUGH"},
        "localityLbSetting": {"enabled": true},
        "rootNamespace": "istio-system",
        "proxyListenPort": 15001,
        "proxyInboundListenPort": 15006,
        "connectTimeout": "10s",
        "defaultServiceExportTo": ["*"],
        "defaultVirtualServiceExportTo": ["*"],
        "defaultDestinationRuleExportTo": ["*"],
        // Used only when DNS fails: answers carry their own time to live.
        "dnsRefreshRate": "60s",
        "enablePrometheusMerge": true,
        "defaultProviders": {},
        "extensionProviders": [
            {"name": "prometheus", "prometheus": {}},
            {"name": "stackdriver", "stackdriver": {}},
            {"name": "envoy", "envoyFileAccessLog": {"path": "/dev/stdout"}},
        ],
        "defaultConfig": {
            "configPath": "./etc/istio/proxy",
            "serviceCluster": "istio-proxy",
            "drainDuration": "45s",
            "terminationDrainDuration": "5s",
            "proxyAdminPort": 15000,
            "controlPlaneAuthPolicy": "MUTUAL_TLS",
            "discoveryAddress": "istiod.istio-system.svc:15012",
            "binaryPath": "/usr/local/bin/envoy",
            "statNameLength": 189,
            "statusPort": 15020,
        },
    })
}

/// The user's fields under their JSON names, durations canonical, unknown ones taken out; wrong values are errors.
fn known<M: prost::Message + Name + Default>(
    user: &Value,
) -> Result<(Map<String, Value>, Vec<String>), JsonError> {
    let mut user = crate::go::canonical_durations(&M::full_name(), user).into_owned();
    let mut unknown = Vec::new();
    if let Some(descriptor) = json::descriptor(&M::full_name()) {
        canonical_names(&descriptor, &mut user, "", &mut unknown);
    }
    json::from_value::<M>(&user)?;
    match user {
        Value::Object(entries) => Ok((entries, unknown)),
        _ => Ok((Map::new(), unknown)),
    }
}

fn canonical_names(
    descriptor: &MessageDescriptor,
    value: &mut Value,
    path: &str,
    unknown: &mut Vec<String>,
) {
    if !descriptor.full_name().starts_with("istio.") {
        return;
    }
    let Value::Object(entries) = value else {
        return;
    };
    for (name, mut value) in std::mem::take(entries) {
        let at = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let field = descriptor
            .get_field_by_json_name(&name)
            .or_else(|| descriptor.get_field_by_name(&name));
        let Some(field) = field else {
            unknown.push(at);
            continue;
        };
        let kind = field.kind();
        if let Some(inner) = kind.as_message()
            && !field.is_map()
        {
            match &mut value {
                Value::Array(items) => {
                    for (i, item) in items.iter_mut().enumerate() {
                        canonical_names(inner, item, &format!("{at}[{i}]"), unknown);
                    }
                }
                value => canonical_names(inner, value, &at, unknown),
            }
        }
        if !value.is_null() {
            entries.insert(field.json_name().to_owned(), value);
        }
    }
}

fn merge_proxy_config(base: Value, user: Value) -> Value {
    let Value::Object(user) = user else {
        return base;
    };
    let mut out = match base {
        Value::Object(base) => base,
        _ => Map::new(),
    };
    for (name, value) in user {
        match name.as_str() {
            "proxyMetadata" => merge_objects(out.entry(name).or_insert_with(|| json!({})), value),
            // Headers that the user does not name keep what the mesh says of them.
            "proxyHeaders" => merge_objects(out.entry(name).or_insert_with(|| json!({})), value),
            // The two names of a cluster exclude each other.
            "tracingServiceName" => {
                out.remove("serviceCluster");
                out.insert(name, value);
            }
            "serviceCluster" => {
                out.remove("tracingServiceName");
                out.insert(name, value);
            }
            _ => {
                out.insert(name, value);
            }
        }
    }
    Value::Object(out)
}

fn merge_objects(target: &mut Value, from: Value) {
    if let (Value::Object(target), Value::Object(from)) = (target, from) {
        target.extend(from);
    }
}

fn merge_by_name(target: &mut Value, from: Value) {
    let (Value::Array(target), Value::Array(from)) = (target, from) else {
        return;
    };
    for provider in from {
        match target.iter_mut().find(|p| p["name"] == provider["name"]) {
            Some(existing) => *existing = provider,
            None => target.push(provider),
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::istio::mesh::v1alpha1::{mesh_config, proxy_config};

    use super::*;

    #[test]
    fn defaults_are_istios() {
        let mesh = defaults();
        assert_eq!(mesh.proxy_listen_port, 15001);
        assert_eq!(mesh.connect_timeout.unwrap().seconds, 10);
        assert_eq!(mesh.default_config.unwrap().status_port, 15020);
        assert_eq!(mesh.extension_providers.len(), 3);
    }

    #[test]
    fn a_false_of_the_user_wins_over_a_true_of_the_defaults() {
        let read = merge(
            &json!({"enableTracing": false, "enableAutoMtls": false, "connectTimeout": "100ms"}),
        )
        .unwrap();
        assert!(!read.config.enable_tracing);
        assert_eq!(read.config.enable_auto_mtls, Some(false));
        assert_eq!(read.config.connect_timeout.unwrap().nanos, 100_000_000);
        assert_eq!(read.config.proxy_listen_port, 15001);
    }

    #[test]
    fn default_config_is_merged_and_other_messages_are_replaced() {
        let read = merge(&json!({
            "defaultConfig": {"proxyMetadata": {"A": "1"}, "tracingServiceName": "CANONICAL_NAME_ONLY", "discovery_address": "x:1"},
            "localityLbSetting": {"failover": [{"from": "a", "to": "b"}]},
            "extensionProviders": [{"name": "envoy", "envoyFileAccessLog": {"path": "/tmp/log"}}, {"name": "z", "prometheus": {}}],
        }))
        .unwrap();
        let proxy = read.config.default_config.unwrap();
        assert_eq!(proxy.status_port, 15020);
        assert_eq!(proxy.discovery_address, "x:1");
        assert!(matches!(
            proxy.cluster_name,
            Some(proxy_config::ClusterName::TracingServiceName(1))
        ));
        assert_eq!(read.config.locality_lb_setting.unwrap().enabled, None);
        let names: Vec<_> = read
            .config
            .extension_providers
            .iter()
            .map(|p| p.name.as_str())
            .collect();
        assert_eq!(names, ["prometheus", "stackdriver", "envoy", "z"]);
        let Some(mesh_config::extension_provider::Provider::EnvoyFileAccessLog(log)) =
            &read.config.extension_providers[2].provider
        else {
            panic!("the provider kept its type");
        };
        assert_eq!(log.path, "/tmp/log");
    }

    #[test]
    fn unknown_fields_are_listed_and_wrong_values_refused() {
        let read =
            merge(&json!({"thriftConfig": {}, "defaultConfig": {"parentShutdownDuration": "1s"}}))
                .unwrap();
        assert_eq!(
            read.unknown,
            ["defaultConfig.parentShutdownDuration", "thriftConfig"]
        );
        let e = merge(&json!({"outboundTrafficPolicy": {"mode": "SOMETIMES"}})).unwrap_err();
        assert!(e.to_string().contains("outboundTrafficPolicy.mode"), "{e}");
    }
}
