//! `/debug/config_dump`: what a proxy was sent, in the form of Envoy's own dump.

use serde_json::{Map, Value, json};
use xds::{
    Resource,
    type_url::{CDS, EDS, LDS, RDS},
};

use crate::server::Connection;

/// The whole dump.
pub(crate) fn dump(connection: &Connection, version: &str, include_eds: bool) -> Value {
    let mut configs = vec![
        section("BootstrapConfigDump", Map::new()),
        section(
            "ClustersConfigDump",
            fields(
                version,
                "dynamicActiveClusters",
                list(
                    connection,
                    CDS,
                    |_, body| json!({"versionInfo": version, "cluster": body}),
                ),
            ),
        ),
    ];
    if include_eds {
        configs.push(endpoints_section(connection, version));
    }
    configs.push(section(
        "ListenersConfigDump",
        fields(version, "dynamicListeners", list(connection, LDS, |r, body| {
            json!({"name": &**r.name(), "activeState": {"versionInfo": version, "listener": body}})
        })),
    ));
    configs.push(section("ScopedRoutesConfigDump", Map::new()));
    let routes = list(
        connection,
        RDS,
        |_, body| json!({"versionInfo": version, "routeConfig": body}),
    );
    configs.push(section(
        "RoutesConfigDump",
        fields_of("dynamicRouteConfigs", routes),
    ));
    configs.push(section("SecretsConfigDump", Map::new()));
    configs.push(section("EcdsConfigDump", Map::new()));
    json!({"configs": configs})
}

/// The endpoints alone.
pub(super) fn endpoints(connection: &Connection, version: &str) -> Value {
    endpoints_section(connection, version)
}

fn endpoints_section(connection: &Connection, version: &str) -> Value {
    let all = list(
        connection,
        EDS,
        |_, body| json!({"versionInfo": version, "endpointConfig": body}),
    );
    section(
        "EndpointsConfigDump",
        fields_of("dynamicEndpointConfigs", all),
    )
}

fn list(
    connection: &Connection,
    type_url: &str,
    make: impl Fn(&Resource, Value) -> Value,
) -> Vec<Value> {
    let Some(sent) = connection.sent(type_url) else {
        return Vec::new();
    };
    sent.iter()
        .map(|r| {
            let any = proto::Any {
                type_url: type_url.to_owned(),
                value: r.value().to_vec(),
            };
            make(r, proto::json::any_to_value(&any))
        })
        .collect()
}

fn section(name: &str, mut fields: Map<String, Value>) -> Value {
    fields.insert(
        "@type".into(),
        format!("type.googleapis.com/envoy.admin.v3.{name}").into(),
    );
    Value::Object(fields)
}

fn fields(version: &str, name: &str, all: Vec<Value>) -> Map<String, Value> {
    let mut out = fields_of(name, all);
    out.insert("versionInfo".into(), version.into());
    out
}

fn fields_of(name: &str, all: Vec<Value>) -> Map<String, Value> {
    let mut out = Map::new();
    if !all.is_empty() {
        out.insert(name.to_owned(), Value::Array(all));
    }
    out
}
