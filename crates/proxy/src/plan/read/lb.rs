//! How an endpoint is chosen: the old `lb_policy` with its `*_lb_config`, and the typed `load_balancing_policy`.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use proto::{
    Struct,
    envoy::{
        config::{
            cluster::v3::{self as pb, cluster as nested},
            core::v3 as core,
        },
        extensions::load_balancing_policies as ext,
        r#type::{metadata::v3 as metadata_pb, v3 as types},
    },
};
use serde_json::Value;

use super::common::{above_zero, enumeration, extension, header_name, json, percent};
use crate::plan::{
    error::{At, Step, unsupported},
    lb::{
        CommonLb, LbPolicy, OverrideSource, SelectorFallback, SlowStart, StatusSet, SubsetFallback,
        SubsetLb, SubsetSelector, ZoneAware,
    },
    matcher::Percent,
};

/// Everything a cluster says about choosing.
pub(super) struct Planned {
    pub(super) policy: LbPolicy,
    pub(super) common: CommonLb,
    pub(super) subsets: Option<Arc<SubsetLb>>,
    pub(super) override_sources: Vec<OverrideSource>,
}

/// The fields of a cluster that say how a host is chosen. `provided` where its type needs CLUSTER_PROVIDED.
pub(super) fn load_balancing(at: &At<'_>, m: &pb::Cluster, provided: bool) -> Step<Planned> {
    use nested::LbPolicy as P;
    let common = at.optional("common_lb_config", &m.common_lb_config, common_lb)?;
    let mut planned = Planned {
        policy: LbPolicy::ClusterProvided,
        common: common.unwrap_or_default(),
        subsets: None,
        override_sources: Vec::new(),
    };
    let policy: P = enumeration(at, "lb_policy", m.lb_policy)?;
    // The typed form counts where both are given, as in Envoy.
    if let Some(typed) = &m.load_balancing_policy {
        if m.lb_subset_config.is_some() {
            at.field("lb_subset_config")
                .error("cannot be given beside load_balancing_policy; use its subset policy");
        }
        // What the typed policies say of these themselves is not taken from the common part.
        planned.common = CommonLb {
            locality_weighted: false,
            zone_aware: ZoneAware::default(),
            fail_traffic_on_panic: false,
            use_hostname_for_hashing: false,
            hash_balance_factor: None,
            ..planned.common
        };
        typed_policies(at.field("load_balancing_policy"), typed, &mut planned, 0)?;
    } else {
        if policy == P::LoadBalancingPolicyConfig {
            return Err(at
                .field("load_balancing_policy")
                .error("is required for lb_policy LOAD_BALANCING_POLICY_CONFIG"));
        }
        planned.policy = old_policy(at, policy, &m.lb_config)?;
        planned.subsets = at.optional("lb_subset_config", &m.lb_subset_config, old_subsets)?;
    }
    let given = planned.policy == LbPolicy::ClusterProvided;
    if provided != given {
        let message = match provided {
            true => "must be CLUSTER_PROVIDED for this cluster type",
            false => "can only be CLUSTER_PROVIDED for types ORIGINAL_DST and aggregate",
        };
        let field = match m.load_balancing_policy {
            Some(_) => "load_balancing_policy",
            None => "lb_policy",
        };
        return Err(at.field(field).error(message));
    }
    if given && planned.subsets.is_some() {
        at.field("lb_subset_config")
            .error("cannot be given with CLUSTER_PROVIDED");
    }
    Ok(planned)
}

fn old_policy(
    at: &At<'_>,
    policy: nested::LbPolicy,
    config: &Option<nested::LbConfig>,
) -> Step<LbPolicy> {
    use nested::{LbConfig as C, LbPolicy as P};
    match policy {
        P::RoundRobin => Ok(LbPolicy::RoundRobin(match config {
            Some(C::RoundRobinLbConfig(m)) => at.field("round_robin_lb_config").optional(
                "slow_start_config",
                &m.slow_start_config,
                old_slow_start,
            )?,
            _ => None,
        })),
        P::LeastRequest => {
            let none = nested::LeastRequestLbConfig::default();
            let m = match config {
                Some(C::LeastRequestLbConfig(m)) => m,
                _ => &none,
            };
            let at = at.field("least_request_lb_config");
            let slow = at.optional("slow_start_config", &m.slow_start_config, old_slow_start)?;
            Ok(least_request(
                &at,
                m.choice_count,
                &m.active_request_bias,
                false,
                slow,
            ))
        }
        P::Random => Ok(LbPolicy::Random),
        P::RingHash => {
            let none = nested::RingHashLbConfig::default();
            let m = match config {
                Some(C::RingHashLbConfig(m)) => m,
                _ => &none,
            };
            let at = at.field("ring_hash_lb_config");
            let murmur = match enumeration(&at, "hash_function", m.hash_function)? {
                nested::ring_hash_lb_config::HashFunction::XxHash => false,
                nested::ring_hash_lb_config::HashFunction::MurmurHash2 => true,
            };
            Ok(ring(&at, m.minimum_ring_size, m.maximum_ring_size, murmur))
        }
        P::Maglev => {
            let size = match config {
                Some(C::MaglevLbConfig(m)) => m.table_size,
                _ => None,
            };
            Ok(maglev(&at.field("maglev_lb_config"), size))
        }
        P::ClusterProvided | P::LoadBalancingPolicyConfig => Ok(LbPolicy::ClusterProvided),
    }
}

/// The first policy of the list that is implemented here.
fn typed_policies(
    at: At<'_>,
    m: &pb::LoadBalancingPolicy,
    planned: &mut Planned,
    depth: usize,
) -> Step<()> {
    let policies = at.field("policies");
    let mut unknown = None;
    for (index, policy) in m.policies.iter().enumerate() {
        let at = policies.index(index);
        let at = at.field("typed_extension_config");
        let Some(config) = &policy.typed_extension_config else {
            return Err(at.error("is required"));
        };
        let at = at.field("typed_config");
        let Some(any) = &config.typed_config else {
            return Err(at.error("is required: the configuration of this policy with its @type"));
        };
        let found = extension(&at, any)?;
        match found
            .name
            .strip_prefix("envoy.extensions.load_balancing_policies.")
        {
            Some(name) if typed_policy(&at, name, &found, planned, depth)? => return Ok(()),
            _ => unknown = unknown.or(Some((index, found.name))),
        }
    }
    match unknown {
        None => Err(policies.error("needs at least one policy")),
        Some((index, name)) => Err(policies.index(index).not_implemented(format!(
            "load balancing policy {name} is not implemented, and no other of the list is; add one that is"
        ))),
    }
}

/// Plans one policy; false where nothing here implements it.
fn typed_policy(
    at: &At<'_>,
    name: &str,
    found: &super::common::Extension<'_>,
    planned: &mut Planned,
    depth: usize,
) -> Step<bool> {
    match name {
        "round_robin.v3.RoundRobin" => {
            let m: ext::round_robin::v3::RoundRobin = found.decode(at)?;
            locality(at, &m.locality_lb_config, &mut planned.common)?;
            planned.policy = LbPolicy::RoundRobin(at.optional(
                "slow_start_config",
                &m.slow_start_config,
                slow_start,
            )?);
        }
        "least_request.v3.LeastRequest" => {
            use ext::least_request::v3::least_request::SelectionMethod;
            let m: ext::least_request::v3::LeastRequest = found.decode(at)?;
            locality(at, &m.locality_lb_config, &mut planned.common)?;
            let method: SelectionMethod = enumeration(at, "selection_method", m.selection_method)?;
            let full = method == SelectionMethod::FullScan || m.enable_full_scan == Some(true);
            let slow = at.optional("slow_start_config", &m.slow_start_config, slow_start)?;
            planned.policy = least_request(at, m.choice_count, &m.active_request_bias, full, slow);
        }
        "random.v3.Random" => {
            let m: ext::random::v3::Random = found.decode(at)?;
            locality(at, &m.locality_lb_config, &mut planned.common)?;
            planned.policy = LbPolicy::Random;
        }
        "ring_hash.v3.RingHash" => {
            use ext::ring_hash::v3::ring_hash::HashFunction;
            let m: ext::ring_hash::v3::RingHash = found.decode(at)?;
            let murmur = match enumeration(at, "hash_function", m.hash_function)? {
                HashFunction::DefaultHash | HashFunction::XxHash => false,
                HashFunction::MurmurHash2 => true,
            };
            planned.common.use_hostname_for_hashing = m.use_hostname_for_hashing;
            planned.common.hash_balance_factor = balance_factor(at, m.hash_balance_factor);
            hashing(at, &m.consistent_hashing_lb_config, &mut planned.common)?;
            planned.common.locality_weighted |= m.locality_weighted_lb_config.is_some();
            planned.policy = ring(at, m.minimum_ring_size, m.maximum_ring_size, murmur);
        }
        "maglev.v3.Maglev" => {
            let m: ext::maglev::v3::Maglev = found.decode(at)?;
            hashing(at, &m.consistent_hashing_lb_config, &mut planned.common)?;
            planned.common.locality_weighted |= m.locality_weighted_lb_config.is_some();
            planned.policy = maglev(at, m.table_size);
        }
        "cluster_provided.v3.ClusterProvided" => planned.policy = LbPolicy::ClusterProvided,
        "wrr_locality.v3.WrrLocality" => {
            let m: ext::wrr_locality::v3::WrrLocality = found.decode(at)?;
            inner(
                at,
                "endpoint_picking_policy",
                &m.endpoint_picking_policy,
                planned,
                depth,
            )?;
            planned.common.locality_weighted = true;
        }
        "override_host.v3.OverrideHost" => {
            let m: ext::override_host::v3::OverrideHost = found.decode(at)?;
            let selected_host_key = &m.selected_host_key;
            unsupported!(at, selected_host_key);
            let sources = at.each(
                "override_host_sources",
                &m.override_host_sources,
                |at, m| match (&*m.header, &m.metadata) {
                    ("", Some(key)) => metadata_key(&at.field("metadata"), key),
                    ("", None) => Err(at.error("needs one of header, metadata")),
                    (_, Some(_)) => Err(at.error("can have only one of header, metadata")),
                    (header, None) => {
                        Ok(OverrideSource::Header(header_name(&at, "header", header)?))
                    }
                },
            );
            if m.override_host_sources.is_empty() {
                at.field("override_host_sources")
                    .error("needs at least one source");
            }
            planned.override_sources = sources;
            inner(at, "fallback_policy", &m.fallback_policy, planned, depth)?;
        }
        "subset.v3.Subset" => {
            let m: ext::subset::v3::Subset = found.decode(at)?;
            if planned.subsets.is_some() {
                return Err(at.error("cannot stand inside of another subset policy"));
            }
            planned.subsets = Some(typed_subsets(at, &m)?);
            inner(at, "subset_lb_policy", &m.subset_lb_policy, planned, depth)?;
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// The policy that another one hands over to.
fn inner(
    at: &At<'_>,
    field: &str,
    m: &Option<pb::LoadBalancingPolicy>,
    planned: &mut Planned,
    depth: usize,
) -> Step<()> {
    if depth >= DEPTH {
        return Err(at.field(field).error("nests too deep"));
    }
    at.required(field, m, |at, m| typed_policies(at, m, planned, depth + 1))
}

fn metadata_key(at: &At<'_>, m: &metadata_pb::MetadataKey) -> Step<OverrideSource> {
    use metadata_pb::metadata_key::path_segment::Segment;
    let path = at.each("path", &m.path, |at, m| match &m.segment {
        Some(Segment::Key(key)) => at.text("key", key),
        Some(Segment::Index(_)) => Err(at
            .field("index")
            .not_implemented("is not implemented; write key")),
        None => Err(at.field("key").error("is required")),
    });
    Ok(OverrideSource::Metadata(at.text("key", &m.key)?, path))
}

fn least_request(
    at: &At<'_>,
    choice_count: Option<u32>,
    bias: &Option<core::RuntimeDouble>,
    full_scan: bool,
    slow_start: Option<SlowStart>,
) -> LbPolicy {
    let bias = bias.as_ref().map_or(1.0, |b| b.default_value);
    if !(0.0..=4000.0).contains(&bias) {
        at.field("active_request_bias")
            .error("must be from 0 to 4000");
    }
    let choice_count = choice_count.unwrap_or(2);
    if choice_count < 2 {
        at.field("choice_count").error("must be at least 2");
    }
    LbPolicy::LeastRequest {
        choice_count,
        active_request_bias_ppm: (bias * 1e6).round() as u32,
        full_scan,
        slow_start,
    }
}

fn ring(at: &At<'_>, minimum: Option<u64>, maximum: Option<u64>, murmur: bool) -> LbPolicy {
    const LIMIT: u64 = 8 << 20;
    let minimum_ring_size = minimum.unwrap_or(1024);
    let maximum_ring_size = maximum.unwrap_or(LIMIT);
    if minimum_ring_size > maximum_ring_size || maximum_ring_size > LIMIT {
        at.error("needs minimum_ring_size ≤ maximum_ring_size ≤ 8388608");
    }
    LbPolicy::RingHash {
        minimum_ring_size,
        maximum_ring_size,
        murmur,
    }
}

fn maglev(at: &At<'_>, size: Option<u64>) -> LbPolicy {
    let table_size = size.unwrap_or(65_537);
    if table_size > 5_000_011 || !is_prime(table_size) {
        at.field("table_size")
            .error("must be a prime, at most 5000011");
    }
    LbPolicy::Maglev { table_size }
}

fn is_prime(n: u64) -> bool {
    n >= 2
        && (2..)
            .take_while(|d| d * d <= n)
            .all(|d| !n.is_multiple_of(d))
}

fn old_slow_start(at: At<'_>, m: &nested::SlowStartConfig) -> Step<SlowStart> {
    let nested::SlowStartConfig {
        slow_start_window,
        aggression,
        min_weight_percent,
    } = m;
    slow_start_of(&at, slow_start_window, aggression, min_weight_percent)
}

fn slow_start(at: At<'_>, m: &ext::common::v3::SlowStartConfig) -> Step<SlowStart> {
    let ext::common::v3::SlowStartConfig {
        slow_start_window,
        aggression,
        min_weight_percent,
    } = m;
    slow_start_of(&at, slow_start_window, aggression, min_weight_percent)
}

fn slow_start_of(
    at: &At<'_>,
    window: &Option<proto::Duration>,
    aggression: &Option<core::RuntimeDouble>,
    min_weight: &Option<types::Percent>,
) -> Step<SlowStart> {
    let Some(window) = above_zero(at, "slow_start_window", window)? else {
        return Err(at.field("slow_start_window").error("is required"));
    };
    let aggression = aggression.as_ref().map_or(1.0, |a| a.default_value);
    if !(0.001..=4000.0).contains(&aggression) {
        at.field("aggression").error("must be greater than 0");
    }
    Ok(SlowStart {
        window: window.max(Duration::from_millis(1)),
        aggression_milli: (aggression * 1000.0).round() as u32,
        min_weight: at
            .optional("min_weight_percent", min_weight, percent)?
            .unwrap_or(Percent::whole(10)),
    })
}

fn common_lb(at: At<'_>, m: &nested::CommonLbConfig) -> Step<CommonLb> {
    use nested::common_lb_config::{ConsistentHashingLbConfig, LocalityConfigSpecifier as L};
    let nested::CommonLbConfig {
        healthy_panic_threshold,
        // Changes are applied at once; merging them only saves work.
        update_merge_window: _,
        ignore_new_hosts_until_first_hc,
        close_connections_on_host_set_change,
        consistent_hashing_lb_config,
        override_host_status,
        locality_config_specifier,
    } = m;
    let default = CommonLb::default();
    let mut lb = CommonLb {
        healthy_panic_threshold: at
            .optional("healthy_panic_threshold", healthy_panic_threshold, percent)?
            .unwrap_or(default.healthy_panic_threshold),
        close_connections_on_host_set_change: *close_connections_on_host_set_change,
        ignore_new_hosts_until_first_hc: *ignore_new_hosts_until_first_hc,
        ..default
    };
    match locality_config_specifier {
        None => {}
        Some(L::LocalityWeightedLbConfig(_)) => lb.locality_weighted = true,
        Some(L::ZoneAwareLbConfig(m)) => {
            let at = at.field("zone_aware_lb_config");
            let nested::common_lb_config::ZoneAwareLbConfig {
                routing_enabled,
                min_cluster_size,
                fail_traffic_on_panic,
            } = m;
            lb.fail_traffic_on_panic = *fail_traffic_on_panic;
            zone_aware(&at, routing_enabled, *min_cluster_size, &mut lb.zone_aware)?;
        }
    }
    if let Some(ConsistentHashingLbConfig {
        use_hostname_for_hashing,
        hash_balance_factor,
    }) = consistent_hashing_lb_config
    {
        let at = at.field("consistent_hashing_lb_config");
        lb.use_hostname_for_hashing = *use_hostname_for_hashing;
        lb.hash_balance_factor = balance_factor(&at, *hash_balance_factor);
    }
    if let Some(set) = override_host_status {
        let at = at.field("override_host_status");
        lb.override_host_status = StatusSet::new(at.each("statuses", &set.statuses, |at, m| {
            core::HealthStatus::try_from(*m)
                .map(super::endpoint::health_status)
                .map_err(|_| at.error(format!("{m} is not one of this field's values")))
        }));
    }
    Ok(lb)
}

fn zone_aware(
    at: &At<'_>,
    enabled: &Option<types::Percent>,
    min_cluster_size: Option<u64>,
    planned: &mut ZoneAware,
) -> Step<()> {
    if let Some(enabled) = at.optional("routing_enabled", enabled, percent)? {
        planned.routing_enabled = enabled;
    }
    planned.min_cluster_size = min_cluster_size.unwrap_or(planned.min_cluster_size);
    Ok(())
}

/// `LocalityLbConfig` of a typed policy.
fn locality(
    at: &At<'_>,
    m: &Option<ext::common::v3::LocalityLbConfig>,
    lb: &mut CommonLb,
) -> Step<()> {
    use ext::common::v3::locality_lb_config::{LocalityConfigSpecifier as L, ZoneAwareLbConfig};
    let at = at.field("locality_lb_config");
    match m
        .as_ref()
        .and_then(|m| m.locality_config_specifier.as_ref())
    {
        None => Ok(()),
        Some(L::LocalityWeightedLbConfig(_)) => {
            lb.locality_weighted = true;
            Ok(())
        }
        Some(L::ZoneAwareLbConfig(m)) => {
            let at = at.field("zone_aware_lb_config");
            let ZoneAwareLbConfig {
                routing_enabled,
                min_cluster_size,
                fail_traffic_on_panic,
                force_locality_direct_routing,
                force_local_zone,
                locality_basis,
            } = m;
            unsupported!(at, force_local_zone, locality_basis);
            lb.fail_traffic_on_panic = *fail_traffic_on_panic;
            lb.zone_aware.force_locality_direct_routing = *force_locality_direct_routing;
            zone_aware(&at, routing_enabled, *min_cluster_size, &mut lb.zone_aware)
        }
    }
}

/// `ConsistentHashingLbConfig` of a typed policy.
fn hashing(
    at: &At<'_>,
    m: &Option<ext::common::v3::ConsistentHashingLbConfig>,
    lb: &mut CommonLb,
) -> Step<()> {
    let Some(m) = m else { return Ok(()) };
    let at = at.field("consistent_hashing_lb_config");
    let ext::common::v3::ConsistentHashingLbConfig {
        use_hostname_for_hashing,
        hash_balance_factor,
        hash_policy,
    } = m;
    unsupported!(at, hash_policy);
    lb.use_hostname_for_hashing = *use_hostname_for_hashing;
    lb.hash_balance_factor = balance_factor(&at, *hash_balance_factor);
    Ok(())
}

fn balance_factor(at: &At<'_>, factor: Option<u32>) -> Option<u32> {
    if factor.is_some_and(|f| f < 100) {
        at.field("hash_balance_factor")
            .error("must be at least 100");
    }
    factor
}

fn old_subsets(at: At<'_>, m: &nested::LbSubsetConfig) -> Step<Arc<SubsetLb>> {
    use nested::lb_subset_config::{
        LbSubsetFallbackPolicy as F, LbSubsetMetadataFallbackPolicy as M,
    };
    let nested::LbSubsetConfig {
        fallback_policy,
        default_subset,
        subset_selectors,
        locality_weight_aware,
        scale_locality_weight,
        panic_mode_any,
        list_as_any,
        metadata_fallback_policy,
    } = m;
    Ok(Arc::new(SubsetLb {
        fallback: match enumeration(&at, "fallback_policy", *fallback_policy)? {
            F::NoFallback => SubsetFallback::NoFallback,
            F::AnyEndpoint => SubsetFallback::AnyEndpoint,
            F::DefaultSubset => SubsetFallback::DefaultSubset,
        },
        default_subset: criteria(default_subset),
        selectors: at.each("subset_selectors", subset_selectors, |at, m| {
            selector(
                &at,
                &m.keys,
                m.single_host_per_subset,
                m.fallback_policy,
                &m.fallback_keys_subset,
            )
        }),
        locality_weight_aware: *locality_weight_aware,
        scale_locality_weight: *scale_locality_weight,
        panic_mode_any: *panic_mode_any,
        list_as_any: *list_as_any,
        allow_redundant_keys: false,
        metadata_fallback_list: match enumeration(
            &at,
            "metadata_fallback_policy",
            *metadata_fallback_policy,
        )? {
            M::MetadataNoFallback => false,
            M::FallbackList => true,
        },
    }))
}

fn typed_subsets(at: &At<'_>, m: &ext::subset::v3::Subset) -> Step<Arc<SubsetLb>> {
    use ext::subset::v3::subset::{
        LbSubsetFallbackPolicy as F, LbSubsetMetadataFallbackPolicy as M,
    };
    let ext::subset::v3::Subset {
        fallback_policy,
        default_subset,
        subset_selectors,
        allow_redundant_keys,
        locality_weight_aware,
        scale_locality_weight,
        panic_mode_any,
        list_as_any,
        metadata_fallback_policy,
        subset_lb_policy: _,
    } = m;
    Ok(Arc::new(SubsetLb {
        fallback: match enumeration(at, "fallback_policy", *fallback_policy)? {
            F::NoFallback => SubsetFallback::NoFallback,
            F::AnyEndpoint => SubsetFallback::AnyEndpoint,
            F::DefaultSubset => SubsetFallback::DefaultSubset,
        },
        default_subset: criteria(default_subset),
        selectors: at.each("subset_selectors", subset_selectors, |at, m| {
            selector(
                &at,
                &m.keys,
                m.single_host_per_subset,
                m.fallback_policy,
                &m.fallback_keys_subset,
            )
        }),
        locality_weight_aware: *locality_weight_aware,
        scale_locality_weight: *scale_locality_weight,
        panic_mode_any: *panic_mode_any,
        list_as_any: *list_as_any,
        allow_redundant_keys: *allow_redundant_keys,
        metadata_fallback_list: match enumeration(
            at,
            "metadata_fallback_policy",
            *metadata_fallback_policy,
        )? {
            M::MetadataNoFallback => false,
            M::FallbackList => true,
        },
    }))
}

/// Both messages number their policies alike.
fn selector(
    at: &At<'_>,
    keys: &[String],
    single_host_per_subset: bool,
    fallback: i32,
    fallback_keys: &[String],
) -> Step<SubsetSelector> {
    use nested::lb_subset_config::lb_subset_selector::LbSubsetSelectorFallbackPolicy as F;
    let sorted = |names: &[String]| {
        let mut names: Vec<Arc<str>> = names.iter().map(|n| n.as_str().into()).collect();
        names.sort();
        names.dedup();
        names
    };
    let keys = sorted(keys);
    if keys.is_empty() {
        at.field("keys").error("needs at least one key");
    }
    let fallback_keys = sorted(fallback_keys);
    let fallback = match enumeration(at, "fallback_policy", fallback)? {
        F::NotDefined => None,
        F::NoFallback => Some(SelectorFallback::NoFallback),
        F::AnyEndpoint => Some(SelectorFallback::AnyEndpoint),
        F::DefaultSubset => Some(SelectorFallback::DefaultSubset),
        F::KeysSubset => {
            let at = at.field("fallback_keys_subset");
            if fallback_keys.is_empty() {
                at.error("is required for KEYS_SUBSET");
            } else if fallback_keys == keys || fallback_keys.iter().any(|k| !keys.contains(k)) {
                at.error("must be some of the selector's keys, and not all");
            }
            Some(SelectorFallback::KeysSubset(fallback_keys))
        }
    };
    Ok(SubsetSelector {
        keys,
        single_host_per_subset,
        fallback,
    })
}

fn criteria(m: &Option<Struct>) -> BTreeMap<String, Value> {
    let members = m.iter().flat_map(|m| match json(m) {
        Value::Object(members) => members,
        _ => serde_json::Map::new(),
    });
    members.collect()
}

/// How deep policies may stand in one another.
const DEPTH: usize = 8;
