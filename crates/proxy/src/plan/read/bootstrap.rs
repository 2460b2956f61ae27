//! The bootstrap message.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message;
use proto::envoy::config::{
    bootstrap::v3 as pb, cluster::v3 as cluster_pb, core::v3 as core, listener::v3 as listener_pb,
    metrics::v3 as metrics,
};
use serde_json::Value;

use super::{
    access_log::plain_access_log,
    cluster::cluster,
    common::{above_zero, address, ads_source, api_config_source, json, string_matcher},
    endpoint::locality_of,
    listener::listener,
    overload,
    route::option,
    tls::secret,
};
use crate::plan::{
    bootstrap::{
        Admin, Ads, Bootstrap, LogFormatConfig, Node, StatsConfig, StatsMatcher, StatsTag,
        StatsTagSource,
    },
    error::{At, Step, unsupported},
    lazy::LazyCluster,
    matcher::Finite,
};

/// `Bootstrap`.
pub(super) fn bootstrap(at: At<'_>, m: &pb::Bootstrap) -> Step<Bootstrap> {
    let pb::Bootstrap {
        node,
        node_context_params,
        static_resources,
        dynamic_resources,
        cluster_manager,
        hds_config,
        flags_path: _,
        // Sinks are a later version's: docs/accepted-without-effect.md.
        stats_sinks: _,
        deferred_stat_options: _,
        stats_config,
        stats_flush_interval,
        watchdog: _,
        watchdogs: _,
        tracing,
        layered_runtime,
        admin,
        overload_manager,
        enable_dispatcher_stats: _,
        header_prefix,
        stats_server_version_override,
        use_tcp_for_dns_lookups: _,
        dns_resolution_config: _,
        typed_dns_resolver_config: _,
        bootstrap_extensions,
        fatal_actions: _,
        config_sources,
        default_config_source,
        default_socket_interface,
        certificate_provider_instances,
        // Only memory lay-out in Envoy.
        inline_headers: _,
        perf_tracing_file_path: _,
        default_regex_engine: _,
        xds_delegate_extension,
        xds_config_tracker_extension,
        listener_manager: _,
        application_log_config,
        grpc_async_client_manager_config: _,
        memory_allocator_manager: _,
        // Where threads run is the kernel's choice.
        enable_worker_cpu_affinity: _,
        stats_flush: _,
        stats_eviction: _,
    } = m;
    unsupported!(
        at,
        node_context_params,
        hds_config,
        config_sources,
        default_config_source,
        default_socket_interface,
        certificate_provider_instances,
        xds_delegate_extension,
        xds_config_tracker_extension,
    );
    at.each("bootstrap_extensions", bootstrap_extensions, |at, m| {
        let found = super::common::typed_config(&at, &m.typed_config, "extension")?;
        match found.name.as_str() {
            // No listener of ours is internal; without one the registry of them has no effect.
            "envoy.extensions.bootstrap.internal_listener.v3.InternalListener"
            | "istio.workload.BootstrapExtension" => Ok(()),
            _ => Err(found.unknown(&at.field("typed_config"), "bootstrap extension")),
        }
    });
    let overload = at
        .optional(
            "overload_manager",
            overload_manager,
            overload::overload_manager,
        )
        .unwrap_or(None)
        .unwrap_or_default();
    let mut plan = Bootstrap {
        node: node.as_ref().map(node_of).unwrap_or_default(),
        static_clusters: Vec::new(),
        static_listeners: Vec::new(),
        static_secrets: Vec::new(),
        lds: None,
        cds: None,
        ads: None,
        admin: at.optional("admin", admin, admin_of).unwrap_or(None),
        stats: at
            .optional("stats_config", stats_config, stats)
            .unwrap_or(None)
            .unwrap_or_else(default_stats),
        stats_flush_interval: above_zero(&at, "stats_flush_interval", stats_flush_interval)
            .unwrap_or(None)
            .unwrap_or(Duration::from_secs(5)),
        runtime: runtime(&at, layered_runtime),
        max_downstream_connections: overload.max_downstream_connections,
        server_version: *stats_server_version_override,
        overload: overload.manager.map(Arc::new),
        log_format: application_log_config.as_ref().and_then(log_format),
        local_cluster_name: None,
        outlier_event_log: None,
        tracer: at
            .optional("tracing", tracing, super::tracing::of_bootstrap)
            .unwrap_or(None)
            .flatten(),
        header_prefix: option(header_prefix).unwrap_or_else(|| "x-envoy".into()),
        encoded: m.encode_to_vec().into(),
    };
    if let Some(m) = static_resources {
        let at = at.field("static_resources");
        let pb::bootstrap::StaticResources {
            listeners,
            clusters,
            secrets,
        } = m;
        // What dumps show of each is a part of the whole: there may be ten thousand.
        let mut parts = parts_of(&plan.encoded, 1);
        plan.static_listeners = at.each("listeners", listeners, |at, m: &listener_pb::Listener| {
            let encoded = parts.next();
            let named = named(m);
            Ok((Arc::new(listener(at, &named)?), encoded.unwrap_or_default()))
        });
        let mut parts = parts_of(&plan.encoded, 2);
        plan.static_clusters = at.each("clusters", clusters, |at, m: &cluster_pb::Cluster| {
            let encoded = parts.next().unwrap_or_default();
            let plan = LazyCluster::later(cluster(at, m)?, encoded.clone());
            Ok((Arc::new(plan), encoded))
        });
        plan.static_secrets = at.each("secrets", secrets, secret);
        unique(
            &at,
            "clusters",
            plan.static_clusters.iter().map(|(c, _)| &*c.name),
        );
        unique(
            &at,
            "listeners",
            plan.static_listeners.iter().map(|(l, _)| &*l.name),
        );
    }
    if let Some(m) = dynamic_resources {
        let at = at.field("dynamic_resources");
        let pb::bootstrap::DynamicResources {
            lds_config,
            lds_resources_locator,
            cds_config,
            cds_resources_locator,
            ads_config,
        } = m;
        unsupported!(at, lds_resources_locator, cds_resources_locator);
        plan.lds = at
            .optional("lds_config", lds_config, ads_source)
            .unwrap_or(None);
        plan.cds = at
            .optional("cds_config", cds_config, ads_source)
            .unwrap_or(None);
        plan.ads = at.optional("ads_config", ads_config, ads).unwrap_or(None);
        if let Some(ads) = &plan.ads
            && !plan
                .static_clusters
                .iter()
                .any(|(c, _)| c.name == ads.cluster)
        {
            let at = at.field("ads_config");
            at.error(format!(
                "goes to cluster `{}`, which is not among static_resources.clusters",
                ads.cluster
            ));
        }
        let by_ads = [&plan.lds, &plan.cds].into_iter().flatten();
        if plan.ads.is_none()
            && by_ads
                .into_iter()
                .any(|s| s.kind == crate::plan::bootstrap::ConfigSourceKind::Ads)
        {
            at.field("ads_config")
                .error("is required: lds_config or cds_config says ads");
        }
    }
    if let Some(m) = cluster_manager {
        let at = at.field("cluster_manager");
        let pb::ClusterManager {
            local_cluster_name,
            outlier_detection,
            upstream_bind_config,
            load_stats_config: _,
            enable_deferred_cluster_creation: _,
        } = m;
        unsupported!(at, upstream_bind_config);
        plan.local_cluster_name = option(local_cluster_name);
        if let Some(m) = outlier_detection {
            let at = at.field("outlier_detection");
            let event_service = &m.event_service;
            unsupported!(at, event_service);
            plan.outlier_event_log = option(&m.event_log_path).map(|path| path.as_ref().into());
        }
    }
    Ok(plan)
}

/// A static listener without a name gets a random one, as in Envoy. One that comes by xDS is known by its name.
fn named(m: &listener_pb::Listener) -> Cow<'_, listener_pb::Listener> {
    if !m.name.is_empty() {
        return Cow::Borrowed(m);
    }
    let name = uuid::Uuid::new_v4();
    Cow::Owned(listener_pb::Listener {
        name: name.to_string(),
        ..m.clone()
    })
}

/// The encodings of one list of the static resources.
fn parts_of(bootstrap: &Bytes, list: u32) -> impl Iterator<Item = Bytes> + use<> {
    const STATIC_RESOURCES: u32 = 2;
    let parts = proto::wire::parts(bootstrap, &[STATIC_RESOURCES, list]);
    parts.unwrap_or_default().into_iter()
}

fn unique<'a>(at: &At<'_>, field: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen = std::collections::HashMap::new();
    let at = at.field(field);
    for (index, name) in names.enumerate() {
        if let Some(first) = seen.insert(name, index).filter(|_| !name.is_empty()) {
            let at = at.index(index);
            at.field("name")
                .error(format!("`{name}` is also the name of {field}[{first}]"));
        }
    }
}

fn node_of(m: &core::Node) -> Node {
    Node {
        id: m.id.as_str().into(),
        cluster: m.cluster.as_str().into(),
        metadata: m
            .metadata
            .as_ref()
            .map_or_else(|| Value::Object(Default::default()), json),
        locality: m.locality.as_ref().map(locality_of).unwrap_or_default(),
    }
}

fn ads(at: At<'_>, m: &core::ApiConfigSource) -> Step<Ads> {
    let (cluster, delta) = api_config_source(at, m)?;
    let metadata = m.grpc_services.iter().flat_map(|s| &s.initial_metadata);
    Ok(Ads {
        cluster,
        delta,
        set_node_on_first_message_only: m.set_node_on_first_message_only,
        initial_metadata: metadata
            .map(|h| (h.key.to_ascii_lowercase().into(), h.value.as_str().into()))
            .collect(),
    })
}

fn admin_of(at: At<'_>, m: &pb::Admin) -> Step<Admin> {
    let pb::Admin {
        access_log: logs,
        // Deprecated text log of admin requests; /dev/null in every generated bootstrap.
        access_log_path: _,
        profile_path: _,
        address: bound,
        socket_options,
        ignore_global_conn_limit: _,
        allow_paths,
    } = m;
    unsupported!(at, socket_options, allow_paths);
    Ok(Admin {
        address: at.required("address", bound, |at, m| address(at, m, false))?,
        access_logs: at.each("access_log", logs, plain_access_log),
    })
}

fn default_stats() -> StatsConfig {
    StatsConfig {
        tags: Vec::new(),
        use_all_default_tags: true,
        matcher: StatsMatcher::All,
        histogram_buckets: Vec::new(),
    }
}

fn stats(at: At<'_>, m: &metrics::StatsConfig) -> Step<StatsConfig> {
    use metrics::{stats_matcher::StatsMatcher as M, tag_specifier::TagValue};
    let metrics::StatsConfig {
        stats_tags,
        use_all_default_tags,
        stats_matcher,
        histogram_bucket_settings,
        // A rule of the user's own counts before Envoy's of the same name in any case.
        allow_default_tag_overrides: _,
    } = m;
    let tags = at.each("stats_tags", stats_tags, |at, m| {
        let source = match &m.tag_value {
            Some(TagValue::Regex(text)) => {
                // Not the language of the other expressions: one may look ahead here.
                stats::TagRules::none()
                    .regex(&m.tag_name, text)
                    .map_err(|why| at.field("regex").error(format!("`{text}` {}", why.reason)))?;
                StatsTagSource::Regex(text.as_str().into())
            }
            Some(TagValue::FixedValue(value)) => StatsTagSource::Fixed(value.as_str().into()),
            // The name of one of Envoy's own tags.
            None => return Ok(None),
        };
        Ok(Some(StatsTag {
            name: m.tag_name.as_str().into(),
            source,
        }))
    });
    let matcher = match stats_matcher
        .as_ref()
        .and_then(|m| m.stats_matcher.as_ref())
    {
        None | Some(M::RejectAll(false)) => StatsMatcher::All,
        Some(M::RejectAll(true)) => StatsMatcher::None,
        Some(M::InclusionList(m)) => {
            let at = at.field("stats_matcher");
            StatsMatcher::Include(at.field("inclusion_list").each(
                "patterns",
                &m.patterns,
                string_matcher,
            ))
        }
        Some(M::ExclusionList(m)) => {
            let at = at.field("stats_matcher");
            StatsMatcher::Exclude(at.field("exclusion_list").each(
                "patterns",
                &m.patterns,
                string_matcher,
            ))
        }
    };
    let histogram_buckets = at.each(
        "histogram_bucket_settings",
        histogram_bucket_settings,
        |at, m| {
            let matcher = at.required("match", &m.r#match, string_matcher)?;
            let bounds = at.each("buckets", &m.buckets, |at, bound| {
                Finite::new(*bound)
                    .filter(|b| b.get() > 0.0)
                    .ok_or_else(|| at.error("must be a number greater than 0"))
            });
            if !bounds.is_sorted() {
                at.field("buckets").error("must be in rising order");
            }
            Ok((matcher, bounds))
        },
    );
    Ok(StatsConfig {
        tags: tags.into_iter().flatten().collect(),
        use_all_default_tags: use_all_default_tags.unwrap_or(true),
        matcher,
        histogram_buckets,
    })
}

fn runtime(at: &At<'_>, m: &Option<pb::LayeredRuntime>) -> BTreeMap<String, Value> {
    use pb::runtime_layer::LayerSpecifier as L;
    let mut values = BTreeMap::new();
    let at = at.field("layered_runtime");
    for layer in m.iter().flat_map(|m| {
        at.each("layers", &m.layers, |at, m| {
            match &m.layer_specifier {
                Some(L::StaticLayer(m)) => Ok(json(m)),
                // Values set over /runtime_modify, which is not offered: the layer stays empty.
                Some(L::AdminLayer(_)) => Ok(Value::Null),
                Some(L::DiskLayer(_)) => Err(at
                    .field("disk_layer")
                    .not_implemented("is not implemented; write static_layer")),
                Some(L::RtdsLayer(_)) => Err(at
                    .field("rtds_layer")
                    .not_implemented("is not implemented; write static_layer")),
                None => Err(at.error("needs one of static_layer, admin_layer")),
            }
        })
    }) {
        flatten(&mut values, String::new(), &layer);
    }
    values
}

/// `{a: {b: 1}}` and `{"a.b": 1}` are the same key; a fraction (numerator, denominator) is a value.
fn flatten(values: &mut BTreeMap<String, Value>, prefix: String, value: &Value) {
    match value {
        Value::Object(members) if !members.contains_key("numerator") => {
            for (key, value) in members {
                let name = if prefix.is_empty() {
                    key.clone()
                } else {
                    format!("{prefix}.{key}")
                };
                flatten(values, name, value);
            }
        }
        Value::Null => {}
        value => {
            values.insert(prefix, value.clone());
        }
    }
}

fn log_format(m: &pb::bootstrap::ApplicationLogConfig) -> Option<LogFormatConfig> {
    use pb::bootstrap::application_log_config::log_format::LogFormat as F;
    match m.log_format.as_ref()?.log_format.as_ref()? {
        F::TextFormat(text) => Some(LogFormatConfig::Text(text.as_str().into())),
        F::JsonFormat(m) => Some(LogFormatConfig::Json(json(m))),
    }
}
