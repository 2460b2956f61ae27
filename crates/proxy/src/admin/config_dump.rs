//! `/config_dump`: every resource as it came, with its version, and what was refused and why.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use prost::{Message, Name};
use proto::{
    Any, Timestamp,
    envoy::{
        admin::v3::{
            BootstrapConfigDump, ClientResourceStatus, ClustersConfigDump, EndpointsConfigDump,
            ListenersConfigDump, RoutesConfigDump, UpdateFailureState,
            clusters_config_dump::{DynamicCluster, StaticCluster},
            endpoints_config_dump::{DynamicEndpointConfig, StaticEndpointConfig},
            listeners_config_dump::{DynamicListener, DynamicListenerState, StaticListener},
            routes_config_dump::{DynamicRouteConfig, StaticRouteConfig},
        },
        config::{
            bootstrap::v3::Bootstrap as BootstrapMessage,
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint,
            },
            listener::v3::{self as listener_pb, Listener as ListenerMessage},
            route::v3::RouteConfiguration,
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager, http_connection_manager::RouteSpecifier,
        },
    },
};
use regex::Regex;
use serde_json::{Value, json};
use xds::type_url::{CDS, EDS, LDS, RDS};

use super::{Admin, Answer, Params, certs, clusters::address_message, mask::Mask};
use crate::{
    cluster::ClusterEntry,
    discovery::{Config, Entry, ErrorState, Truth, Version, complete},
};

pub(super) fn config_dump(admin: &Admin, params: &Params) -> Answer {
    let name = match params
        .get("name_regex")
        .filter(|r| !r.is_empty())
        .map(Regex::new)
    {
        None => None,
        Some(Ok(regex)) => Some(regex),
        Some(Err(_)) => {
            return Answer::text("Error while parsing name_regex from /config_dump?name_regex=\n")
                .status(400);
        }
    };
    let mask = params
        .get("mask")
        .filter(|m| !m.is_empty())
        .map(Mask::parse);
    let resource = params.get("resource").filter(|r| !r.is_empty());
    // A dump of endpoints is asked for by its own flag or by naming one of its fields.
    let with_eds = params.has("include_eds")
        || resource.is_some_and(|r| camel_case(r).ends_with("EndpointConfigs"));
    let truth = admin.truth.borrow();
    let configs = dumps(admin, &truth, name.as_ref(), with_eds);
    let configs = match resource {
        Some(resource) => match one_resource(&configs, resource, mask.as_ref()) {
            Ok(list) => list,
            Err((status, message)) => return Answer::text(message).status(status),
        },
        None => match &mask {
            Some(mask) => configs
                .into_iter()
                .filter_map(|c| mask.apply_top(c))
                .collect(),
            None => configs,
        },
    };
    let dump = json!({ "configs": configs });
    Answer::json(&proto::json::with_proto_names(
        "envoy.admin.v3.ConfigDump",
        dump,
    ))
}

/// The elements of a repeated field of whatever dump has it.
fn one_resource(
    configs: &[Value],
    resource: &str,
    mask: Option<&Mask>,
) -> Result<Vec<Value>, (u16, String)> {
    let key = camel_case(resource);
    let Some((type_name, field)) = DUMPS.iter().find_map(|dump| {
        let descriptor = proto::json::descriptor(dump)?;
        let field = descriptor.get_field_by_json_name(&key)?;
        Some((*dump, field))
    }) else {
        return Err((404, format!("{resource} not found in config dump\n")));
    };
    if !field.is_list() {
        let message = format!(
            "{resource} is not a repeated field. Use ?mask={resource} to get only this field\n"
        );
        return Err((400, message));
    }
    let element = field
        .kind()
        .as_message()
        .map(|m| m.full_name().to_owned())
        .unwrap_or_default();
    let type_url = format!("type.googleapis.com/{element}");
    let suffix = format!("/{type_name}");
    let dump = configs
        .iter()
        .find(|c| c["@type"].as_str().is_some_and(|t| t.ends_with(&suffix)));
    let list = dump
        .and_then(|d| d[&key].as_array())
        .cloned()
        .unwrap_or_default();
    Ok(list
        .into_iter()
        .map(|value| match mask {
            Some(mask) => mask.apply(value),
            None => value,
        })
        .map(|mut value| {
            if let Value::Object(members) = &mut value {
                members.insert("@type".to_owned(), type_url.clone().into());
            }
            value
        })
        .collect())
}

/// The dumps in which `?resource=` looks.
const DUMPS: [&str; 6] = [
    "envoy.admin.v3.BootstrapConfigDump",
    "envoy.admin.v3.ClustersConfigDump",
    "envoy.admin.v3.EndpointsConfigDump",
    "envoy.admin.v3.ListenersConfigDump",
    "envoy.admin.v3.RoutesConfigDump",
    "envoy.admin.v3.SecretsConfigDump",
];

/// `dynamic_listeners` as JSON calls it.
pub(super) fn camel_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        if c == '_' {
            upper = true;
        } else {
            out.push(if std::mem::take(&mut upper) {
                c.to_ascii_uppercase()
            } else {
                c
            });
        }
    }
    out
}

/// All parts in Envoy's order.
fn dumps(admin: &Admin, truth: &Truth, name: Option<&Regex>, with_eds: bool) -> Vec<Value> {
    let mut list = vec![
        packed(&bootstrap(admin)),
        packed(&clusters(&truth.clusters, name)),
    ];
    if with_eds {
        list.push(packed(&endpoints(admin, truth, name)));
    }
    list.push(packed(&listeners(&truth.listeners, name)));
    list.push(packed(&routes(truth, name)));
    list.push(packed(&certs::secrets(admin, truth, name)));
    list
}

fn packed<M: Message + Name>(message: &M) -> Value {
    let mut value = proto::json::to_value(message);
    certs::redact(&mut value);
    if let Value::Object(members) = &mut value {
        members.insert("@type".to_owned(), M::type_url().into());
    }
    value
}

fn bootstrap(admin: &Admin) -> BootstrapConfigDump {
    let age = admin.server.started.elapsed();
    let mut bootstrap = BootstrapMessage::decode(&*admin.server.bootstrap.encoded).ok();
    if let Some(bootstrap) = &mut bootstrap {
        complete(bootstrap.node.get_or_insert_default());
    }
    BootstrapConfigDump {
        bootstrap,
        last_updated: SystemTime::now().checked_sub(age).map(timestamp),
    }
}

/// Entries whose name the expression finds.
fn chosen<'a, T>(
    config: &'a Config<T>,
    name: Option<&'a Regex>,
) -> impl Iterator<Item = (&'a Arc<str>, &'a Entry<T>)> {
    config
        .entries
        .iter()
        .filter(move |(n, _)| name.is_none_or(|r| r.is_match(n)))
}

fn clusters(config: &Config<crate::plan::LazyCluster>, name: Option<&Regex>) -> ClustersConfigDump {
    let mut dump = ClustersConfigDump {
        version_info: config.version.clone(),
        ..Default::default()
    };
    for (_, entry) in chosen(config, name) {
        if entry.fixed {
            let version = entry.active.as_ref().or(entry.warming.as_deref());
            dump.static_clusters.extend(version.map(|v| StaticCluster {
                cluster: Some(any(CDS, &v.resource)),
                last_updated: Some(timestamp(v.updated)),
            }));
            continue;
        }
        let error = entry.error.as_deref().map(|e| failure(CDS, e));
        let dynamic = |v: &Version<_>, error_state| DynamicCluster {
            version_info: v.version.to_string(),
            cluster: Some(any(CDS, &v.resource)),
            last_updated: Some(timestamp(v.updated)),
            error_state,
            client_status: ClientResourceStatus::Unknown as i32,
        };
        dump.dynamic_active_clusters
            .extend(entry.active.iter().map(|v| dynamic(v, error.clone())));
        dump.dynamic_warming_clusters
            .extend(entry.warming.as_deref().map(|v| dynamic(v, None)));
        if entry.active.is_none() && entry.warming.is_none() && error.is_some() {
            // Refused from the start: there is no version to hang the error on.
            dump.dynamic_warming_clusters.push(DynamicCluster {
                error_state: error,
                ..Default::default()
            });
        }
    }
    dump
}

fn listeners(config: &Config<crate::plan::Listener>, name: Option<&Regex>) -> ListenersConfigDump {
    let mut dump = ListenersConfigDump {
        version_info: config.version.clone(),
        ..Default::default()
    };
    for (listener, entry) in chosen(config, name) {
        if entry.fixed {
            let version = entry.active.as_ref().or(entry.warming.as_deref());
            dump.static_listeners
                .extend(version.map(|v| StaticListener {
                    listener: Some(any(LDS, &v.resource)),
                    last_updated: Some(timestamp(v.updated)),
                }));
            continue;
        }
        let state = |v: &Version<_>| DynamicListenerState {
            version_info: v.version.to_string(),
            listener: Some(any(LDS, &v.resource)),
            last_updated: Some(timestamp(v.updated)),
        };
        dump.dynamic_listeners.push(DynamicListener {
            name: listener.to_string(),
            active_state: entry.active.as_ref().map(state),
            warming_state: entry.warming.as_deref().map(state),
            draining_state: None,
            error_state: entry.error.as_deref().map(|e| failure(LDS, e)),
            client_status: ClientResourceStatus::Unknown as i32,
        });
    }
    dump
}

fn routes(truth: &Truth, name: Option<&Regex>) -> RoutesConfigDump {
    let mut dump = RoutesConfigDump::default();
    for (_, entry) in chosen(&truth.routes, name) {
        let error = entry.error.as_deref().map(|e| failure(RDS, e));
        dump.dynamic_route_configs
            .extend(entry.active.iter().map(|v| DynamicRouteConfig {
                version_info: v.version.to_string(),
                route_config: Some(any(RDS, &v.resource)),
                last_updated: Some(timestamp(v.updated)),
                error_state: error.clone(),
                client_status: ClientResourceStatus::Unknown as i32,
            }));
        if entry.active.is_none() && error.is_some() {
            dump.dynamic_route_configs.push(DynamicRouteConfig {
                error_state: error,
                ..Default::default()
            });
        }
    }
    for entry in truth.listeners.entries.values() {
        let Some(version) = &entry.active else {
            continue;
        };
        for config in inline_routes(&version.resource) {
            if name.is_none_or(|r| r.is_match(&config.name)) {
                dump.static_route_configs.push(StaticRouteConfig {
                    route_config: Some(proto::any::pack(&config)),
                    last_updated: Some(timestamp(version.updated)),
                });
            }
        }
    }
    dump
}

/// The route configurations that are part of a listener.
fn inline_routes(listener: &[u8]) -> Vec<RouteConfiguration> {
    let Ok(message) = ListenerMessage::decode(listener) else {
        return Vec::new();
    };
    let chains = message
        .filter_chains
        .iter()
        .chain(&message.default_filter_chain);
    let filters = chains.flat_map(|c| &c.filters);
    filters
        .filter_map(|filter| {
            let Some(listener_pb::filter::ConfigType::TypedConfig(any)) = &filter.config_type
            else {
                return None;
            };
            match proto::any::unpack::<HttpConnectionManager>(any)
                .ok()?
                .route_specifier?
            {
                RouteSpecifier::RouteConfig(config) => Some(config),
                _ => None,
            }
        })
        .collect()
}

fn endpoints(admin: &Admin, truth: &Truth, name: Option<&Regex>) -> EndpointsConfigDump {
    let mut dump = EndpointsConfigDump::default();
    for (_, entry) in chosen(&truth.endpoints, name) {
        let error = entry.error.as_deref().map(|e| failure(EDS, e));
        dump.dynamic_endpoint_configs
            .extend(entry.active.iter().map(|v| DynamicEndpointConfig {
                version_info: v.version.to_string(),
                endpoint_config: Some(any(EDS, &v.resource)),
                last_updated: Some(timestamp(v.updated)),
                error_state: error.clone(),
                client_status: ClientResourceStatus::Unknown as i32,
            }));
    }
    for entry in admin.server.clusters() {
        let own = entry.plan.eds().is_none();
        if own && name.is_none_or(|r| r.is_match(&entry.plan.name)) {
            dump.static_endpoint_configs.push(StaticEndpointConfig {
                endpoint_config: Some(proto::any::pack(&assignment(&entry))),
                last_updated: None,
            });
        }
    }
    dump
}

/// The hosts of a cluster that finds them itself.
fn assignment(entry: &ClusterEntry) -> ClusterLoadAssignment {
    let mut groups: Vec<LocalityLbEndpoints> = Vec::new();
    let (_, hosts) = entry.look();
    for host in hosts.hosts() {
        let locality = proto::envoy::config::core::v3::Locality {
            region: host.locality.region.clone(),
            zone: host.locality.zone.clone(),
            sub_zone: host.locality.sub_zone.clone(),
        };
        let endpoint = LbEndpoint {
            health_status: if host.is_healthy() { 1 } else { 2 },
            load_balancing_weight: Some(host.weight),
            host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(Endpoint {
                address: Some(address_message(&host.address)),
                hostname: host.hostname.to_string(),
                ..Endpoint::default()
            })),
            ..LbEndpoint::default()
        };
        match groups
            .iter_mut()
            .find(|g| g.locality.as_ref() == Some(&locality) && g.priority == host.priority)
        {
            Some(group) => group.lb_endpoints.push(endpoint),
            None => groups.push(LocalityLbEndpoints {
                locality: Some(locality),
                priority: host.priority,
                lb_endpoints: vec![endpoint],
                ..LocalityLbEndpoints::default()
            }),
        }
    }
    ClusterLoadAssignment {
        cluster_name: entry.plan.name.to_string(),
        endpoints: groups,
        ..ClusterLoadAssignment::default()
    }
}

pub(super) fn any(type_url: &str, encoded: &[u8]) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: encoded.to_vec(),
    }
}

pub(super) fn failure(type_url: &str, state: &ErrorState) -> UpdateFailureState {
    UpdateFailureState {
        failed_configuration: Some(any(type_url, &state.resource)),
        last_update_attempt: Some(timestamp(state.attempted)),
        details: state.details.clone(),
        version_info: state.version.to_string(),
    }
}

/// Milliseconds, as Envoy prints them.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: since.as_secs() as i64,
        nanos: (since.subsec_millis() * 1_000_000) as i32,
    }
}
