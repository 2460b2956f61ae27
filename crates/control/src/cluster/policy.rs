//! What a DestinationRule's traffic policy makes of a cluster: limits, outlier detection, load balancing.

use proto::{
    Duration,
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, OutlierDetection as EnvoyOutliers, UpstreamConnectionOptions,
                circuit_breakers::{Thresholds, thresholds::RetryBudget as EnvoyBudget},
                cluster::{
                    CommonLbConfig, DiscoveryType, LbConfig, LbPolicy, LeastRequestLbConfig,
                    MaglevLbConfig, RingHashLbConfig, RoundRobinLbConfig, SlowStartConfig,
                    common_lb_config::{
                        LocalityConfigSpecifier, LocalityWeightedLbConfig, ZoneAwareLbConfig,
                    },
                },
            },
            common::matcher::v3::{
                HttpHeadersMatch, MatchPredicate,
                match_predicate::{MatchSet, Rule},
            },
            core::v3::{KeepaliveSettings, RuntimeDouble, TcpKeepalive as EnvoyKeepalive},
            route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier},
        },
        extensions::upstreams::http::v3::http_protocol_options::OutlierDetection as ErrorMatching,
        r#type::v3::Percent,
    },
    istio::{
        mesh::v1alpha1::{MeshConfig, mesh_config::H2UpgradePolicy as MeshUpgrade},
        networking::v1alpha3::{
            ConnectionPoolSettings, LoadBalancerSettings, OutlierDetection, TrafficPolicy,
            WarmupConfiguration,
            connection_pool_settings::{
                http_settings::H2UpgradePolicy, tcp_settings::TcpKeepalive,
            },
            load_balancer_settings::{
                ConsistentHashLb, LbPolicy as Choice, SimpleLb, consistent_hash_lb::HashAlgorithm,
            },
            traffic_policy::RetryBudget,
        },
    },
};

use super::draft::Draft;
use crate::{
    endpoint::{LbSetting, lb_setting},
    model::{Port, Service, service::TrafficDistribution},
    route::exact,
};

/// Fills the blocks that a policy leaves out with MeshConfig's `defaultTrafficPolicy`.
pub(super) fn with_mesh_defaults(
    mesh: &MeshConfig,
    policy: Option<TrafficPolicy>,
) -> Option<TrafficPolicy> {
    let Some(defaults) = &mesh.default_traffic_policy else {
        return policy;
    };
    if defaults.connection_pool.is_none() && defaults.outlier_detection.is_none() {
        return policy;
    }
    let mut out = policy.unwrap_or_default();
    out.connection_pool = out.connection_pool.or(defaults.connection_pool);
    out.outlier_detection = out
        .outlier_detection
        .or_else(|| defaults.outlier_detection.clone());
    Some(out)
}

/// Upstream becomes HTTP/2 where the rule, or else the mesh (for HTTP ports), says so.
pub(super) fn upgrade(
    draft: &mut Draft,
    mesh: &MeshConfig,
    port: &Port,
    pool: Option<&ConnectionPoolSettings>,
) {
    let http = pool.and_then(|p| p.http.as_ref());
    let policy = http.map_or(H2UpgradePolicy::Default, |h| h.h2_upgrade_policy());
    let upgrade = if http.is_some_and(|h| h.use_client_protocol) {
        false
    } else {
        match policy {
            H2UpgradePolicy::Upgrade => true,
            H2UpgradePolicy::DoNotUpgrade => false,
            H2UpgradePolicy::Default => {
                port.protocol.is_http() && mesh.h2_upgrade_policy() == MeshUpgrade::Upgrade
            }
        }
    };
    if upgrade {
        draft.set_http2();
    }
}

/// Limits, timeouts and keepalive.
pub(super) fn connection_pool(
    draft: &mut Draft,
    mesh: &MeshConfig,
    pool: Option<&ConnectionPoolSettings>,
    budget: Option<&RetryBudget>,
) {
    let positive = |n: i32| u32::try_from(n).ok().filter(|n| *n > 0);
    let (tcp, http) = (
        pool.and_then(|p| p.tcp.as_ref()),
        pool.and_then(|p| p.http.as_ref()),
    );
    // Envoy's own defaults (1024 and 3) would refuse requests that nobody asked to refuse.
    let mut limits = Thresholds {
        max_connections: Some(u32::MAX),
        max_pending_requests: Some(u32::MAX),
        max_requests: Some(u32::MAX),
        max_retries: Some(u32::MAX),
        retry_budget: budget.map(retry_budget),
        ..Thresholds::default()
    };
    draft.cluster.connect_timeout = mesh.connect_timeout;
    if let Some(http) = http {
        limits.max_requests = positive(http.http2_max_requests).or(limits.max_requests);
        limits.max_pending_requests =
            positive(http.http1_max_pending_requests).or(limits.max_pending_requests);
        limits.max_retries = positive(http.max_retries).or(limits.max_retries);
    }
    if let Some(tcp) = tcp {
        draft.cluster.connect_timeout = tcp.connect_timeout.or(mesh.connect_timeout);
        limits.max_connections = positive(tcp.max_connections).or(limits.max_connections);
    }
    keepalive(draft, mesh.tcp_keepalive.as_ref());
    keepalive(draft, tcp.and_then(|t| t.tcp_keepalive.as_ref()));
    draft.cluster.circuit_breakers = Some(CircuitBreakers {
        thresholds: vec![limits],
        ..CircuitBreakers::default()
    });

    let idle: Option<Duration> = http
        .and_then(|h| h.idle_timeout)
        .or(tcp.and_then(|t| t.idle_timeout));
    let max_life = tcp.and_then(|t| t.max_connection_duration);
    let max_requests = http.and_then(|h| positive(h.max_requests_per_connection));
    let max_streams = http.and_then(|h| positive(h.max_concurrent_streams));
    let ping = http.and_then(|h| h.http2_keep_alive.as_ref());
    if idle.is_some()
        || max_life.is_some()
        || max_requests.is_some()
        || max_streams.is_some()
        || ping.is_some()
    {
        let common = draft
            .http()
            .common_http_protocol_options
            .get_or_insert_default();
        common.idle_timeout = idle.or(common.idle_timeout);
        common.max_requests_per_connection = max_requests.or(common.max_requests_per_connection);
        common.max_connection_duration = max_life.or(common.max_connection_duration);
        if let Some(http2) = draft.http2() {
            http2.max_concurrent_streams = max_streams.or(http2.max_concurrent_streams);
            if let Some(ping) = ping {
                http2.connection_keepalive = Some(KeepaliveSettings {
                    interval: ping.interval,
                    timeout: ping.timeout,
                    ..KeepaliveSettings::default()
                });
            }
        }
    }
    if http.is_some_and(|h| h.use_client_protocol) {
        draft.set_downstream_protocol();
    }
}

fn keepalive(draft: &mut Draft, settings: Option<&TcpKeepalive>) {
    let Some(settings) = settings else { return };
    let options = draft
        .cluster
        .upstream_connection_options
        .get_or_insert_with(UpstreamConnectionOptions::default);
    let keepalive = options
        .tcp_keepalive
        .get_or_insert_with(EnvoyKeepalive::default);
    let seconds = |d: &Duration| u32::try_from(d.seconds).unwrap_or(0);
    if settings.probes > 0 {
        keepalive.keepalive_probes = Some(settings.probes);
    }
    keepalive.keepalive_time = settings
        .time
        .as_ref()
        .map(seconds)
        .or(keepalive.keepalive_time);
    keepalive.keepalive_interval = settings
        .interval
        .as_ref()
        .map(seconds)
        .or(keepalive.keepalive_interval);
}

fn retry_budget(budget: &RetryBudget) -> EnvoyBudget {
    EnvoyBudget {
        budget_percent: Some(Percent {
            value: budget.percent.unwrap_or(20.0),
        }),
        min_retry_concurrency: Some(match budget.min_retry_concurrency {
            0 => 3,
            n => n,
        }),
        budget_interval: budget.budget_interval,
    }
}

/// Bad endpoints are taken out of use for a while.
pub(super) fn outliers(draft: &mut Draft, service: &Service, rule: Option<&OutlierDetection>) {
    let Some(rule) = rule else { return };
    let enforce = |n: Option<u32>| n.map(|n| if n > 0 { 100 } else { 0 });
    let mut out = EnvoyOutliers {
        // Success rate looks at all endpoints together, which surprises: off.
        enforcing_success_rate: Some(0),
        consecutive_5xx: rule.consecutive_5xx_errors,
        enforcing_consecutive_5xx: enforce(rule.consecutive_5xx_errors),
        consecutive_gateway_failure: rule.consecutive_gateway_errors,
        enforcing_consecutive_gateway_failure: enforce(rule.consecutive_gateway_errors),
        interval: rule.interval,
        base_ejection_time: rule.base_ejection_time,
        max_ejection_percent: u32::try_from(rule.max_ejection_percent)
            .ok()
            .filter(|n| *n > 0),
        ..EnvoyOutliers::default()
    };
    if rule.split_external_local_origin_errors {
        out.split_external_local_origin_errors = true;
        if let Some(n) = rule.consecutive_local_origin_failures.filter(|n| *n > 0) {
            out.consecutive_local_origin_failure = Some(n);
            out.enforcing_consecutive_local_origin_failure = Some(100);
        }
        out.enforcing_local_origin_success_rate = Some(0);
    }
    draft.cluster.outlier_detection = Some(out);
    if rule.min_health_percent >= 0 {
        let forced = service.traffic_distribution != TrafficDistribution::Any;
        let percent = if forced { 0 } else { rule.min_health_percent };
        common(draft).healthy_panic_threshold = Some(Percent {
            value: percent.into(),
        });
    }
    if !rule.outlier_detection_http_error_codes.is_empty() {
        error_codes(draft, &rule.outlier_detection_http_error_codes);
    }
}

fn error_codes(draft: &mut Draft, codes: &[u32]) {
    let mut rules: Vec<MatchPredicate> = codes
        .iter()
        .map(|code| {
            let header = HeaderMatcher {
                name: ":status".to_owned(),
                header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(exact(
                    &code.to_string(),
                ))),
                ..HeaderMatcher::default()
            };
            let rule = Rule::HttpResponseHeadersMatch(HttpHeadersMatch {
                headers: vec![header],
            });
            MatchPredicate { rule: Some(rule) }
        })
        .collect();
    let predicate = if rules.len() == 1 {
        rules.remove(0)
    } else {
        MatchPredicate {
            rule: Some(Rule::OrMatch(MatchSet { rules })),
        }
    };
    draft.http().outlier_detection = Some(ErrorMatching {
        error_matcher: Some(predicate),
    });
}

/// How one endpoint is chosen. Returns how load is spread over places, for clusters that hold their endpoints.
pub(super) fn load_balancer(
    draft: &mut Draft,
    mesh: &MeshConfig,
    service: &Service,
    rule: Option<&LoadBalancerSettings>,
) -> Option<LbSetting> {
    let setting = lb_setting(mesh, rule, service);
    let has_outliers = draft.cluster.outlier_detection.is_some();
    let lb = common(draft);
    // Unready endpoints are sent with their state; the proxy is never to "panic" and use them.
    lb.healthy_panic_threshold
        .get_or_insert(Percent { value: 0.0 });
    match &setting {
        Some(LbSetting::Locality { setting, force }) => {
            let failover = (has_outliers || *force)
                && (!setting.failover.is_empty() || !setting.failover_priority.is_empty());
            if failover || !setting.distribute.is_empty() {
                lb.locality_config_specifier =
                    Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(
                        LocalityWeightedLbConfig::default(),
                    ));
            }
        }
        Some(LbSetting::ZoneAware(zone)) => {
            let off = zone.enabled == Some(false);
            lb.locality_config_specifier = Some(LocalityConfigSpecifier::ZoneAwareLbConfig(
                ZoneAwareLbConfig {
                    routing_enabled: off.then_some(Percent { value: 0.0 }),
                    min_cluster_size: zone.min_cluster_size,
                    ..ZoneAwareLbConfig::default()
                },
            ));
        }
        None => {}
    }
    if draft.is(DiscoveryType::OriginalDst) {
        draft.set_lb(LbPolicy::ClusterProvided);
        return setting;
    }
    match simple(rule) {
        Some(SimpleLb::Random) => draft.set_lb(LbPolicy::Random),
        Some(SimpleLb::RoundRobin) => {
            draft.set_lb(LbPolicy::RoundRobin);
            draft.cluster.lb_config = slow_start(rule).map(|slow| {
                LbConfig::RoundRobinLbConfig(RoundRobinLbConfig {
                    slow_start_config: Some(slow),
                })
            });
        }
        Some(SimpleLb::Passthrough) => {
            draft.set_lb(LbPolicy::ClusterProvided);
            draft.set_kind(DiscoveryType::OriginalDst);
            draft.cluster.load_assignment = None;
        }
        Some(SimpleLb::Unspecified | SimpleLb::LeastConn | SimpleLb::LeastRequest) | None => {
            draft.set_lb(LbPolicy::LeastRequest);
            draft.cluster.lb_config = slow_start(rule).map(|slow| {
                LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
                    slow_start_config: Some(slow),
                    ..LeastRequestLbConfig::default()
                })
            });
        }
    }
    if let Some(Choice::ConsistentHash(hash)) = rule.and_then(|r| r.lb_policy.as_ref()) {
        consistent_hash(draft, hash);
    }
    setting
}

/// Whether the rule sends connections where the caller aimed.
pub(super) fn is_passthrough(policy: Option<&TrafficPolicy>) -> bool {
    simple(policy.and_then(|p| p.load_balancer.as_ref())) == Some(SimpleLb::Passthrough)
}

fn simple(rule: Option<&LoadBalancerSettings>) -> Option<SimpleLb> {
    match rule?.lb_policy.as_ref()? {
        Choice::Simple(simple) => SimpleLb::try_from(*simple).ok(),
        Choice::ConsistentHash(_) => None,
    }
}

fn consistent_hash(draft: &mut Draft, hash: &ConsistentHashLb) {
    let ring = |size: u64| {
        LbConfig::RingHashLbConfig(RingHashLbConfig {
            minimum_ring_size: Some(size),
            ..RingHashLbConfig::default()
        })
    };
    let positive = |n: u64| Some(n).filter(|n| *n != 0);
    match &hash.hash_algorithm {
        Some(HashAlgorithm::Maglev(maglev)) => {
            draft.set_lb(LbPolicy::Maglev);
            if let Some(size) = positive(maglev.table_size) {
                draft.cluster.lb_config = Some(LbConfig::MaglevLbConfig(MaglevLbConfig {
                    table_size: Some(size),
                }));
            }
        }
        Some(HashAlgorithm::RingHash(own)) => {
            draft.set_lb(LbPolicy::RingHash);
            if let Some(size) = positive(own.minimum_ring_size) {
                draft.cluster.lb_config = Some(ring(size));
            }
        }
        None => {
            draft.set_lb(LbPolicy::RingHash);
            draft.cluster.lb_config = Some(ring(positive(hash.minimum_ring_size).unwrap_or(1024)));
        }
    }
}

/// New endpoints get their full share only after a while.
fn slow_start(rule: Option<&LoadBalancerSettings>) -> Option<SlowStartConfig> {
    let rule = rule?;
    if let Some(warmup) = &rule.warmup {
        return Some(warm_up(warmup));
    }
    rule.warmup_duration_secs.map(|window| SlowStartConfig {
        slow_start_window: Some(window),
        ..SlowStartConfig::default()
    })
}

fn warm_up(warmup: &WarmupConfiguration) -> SlowStartConfig {
    SlowStartConfig {
        slow_start_window: warmup.duration,
        aggression: Some(RuntimeDouble {
            default_value: warmup.aggression.unwrap_or(1.0),
            // Envoy asks for a key that is not empty; no runtime layer has this one.
            runtime_key: "(".to_owned(),
        }),
        min_weight_percent: Some(Percent {
            value: warmup.minimum_percent.unwrap_or(10.0),
        }),
    }
}

fn common(draft: &mut Draft) -> &mut CommonLbConfig {
    draft.cluster.common_lb_config.get_or_insert_default()
}
