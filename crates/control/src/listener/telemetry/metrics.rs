//! Statistics: the settings of the `istio.stats` filters.

use std::collections::{BTreeMap, BTreeSet};

use proto::{
    Any, Duration, any,
    istio::telemetry::v1alpha1::{
        MetricSelector, Metrics, WorkloadMode,
        metric_selector::{IstioMetric, MetricMatch},
        metrics_overrides::{TagOverride, tag_override::Operation},
    },
    stats::{MetricConfig, PluginConfig},
};

use super::{super::settings::Class, Applied, Kind, mode_of, prometheus, provider_names};

/// Names in Telemetry and names on the wire, in the order of the former.
const METRICS: [(IstioMetric, &str, &str); 10] = [
    (
        IstioMetric::GrpcRequestMessages,
        "GRPC_REQUEST_MESSAGES",
        "request_messages_total",
    ),
    (
        IstioMetric::GrpcResponseMessages,
        "GRPC_RESPONSE_MESSAGES",
        "response_messages_total",
    ),
    (IstioMetric::RequestCount, "REQUEST_COUNT", "requests_total"),
    (
        IstioMetric::RequestDuration,
        "REQUEST_DURATION",
        "request_duration_milliseconds",
    ),
    (IstioMetric::RequestSize, "REQUEST_SIZE", "request_bytes"),
    (IstioMetric::ResponseSize, "RESPONSE_SIZE", "response_bytes"),
    (
        IstioMetric::TcpClosedConnections,
        "TCP_CLOSED_CONNECTIONS",
        "tcp_connections_closed_total",
    ),
    (
        IstioMetric::TcpOpenedConnections,
        "TCP_OPENED_CONNECTIONS",
        "tcp_connections_opened_total",
    ),
    (
        IstioMetric::TcpReceivedBytes,
        "TCP_RECEIVED_BYTES",
        "tcp_received_bytes_total",
    ),
    (
        IstioMetric::TcpSentBytes,
        "TCP_SENT_BYTES",
        "tcp_sent_bytes_total",
    ),
];

/// What is changed about one metric.
#[derive(Debug, Default)]
struct Override {
    disabled: bool,
    /// By tag, its expression; `None` removes it.
    tags: BTreeMap<String, Option<String>>,
}

/// What one provider gets from one side of calls.
#[derive(Debug, Default)]
struct Side {
    /// Nothing at all.
    disabled: bool,
    /// By the metric's name in Telemetry.
    overrides: BTreeMap<String, Override>,
    interval: Option<Duration>,
}

impl Applied<'_> {
    /// The settings of a side's statistics filters, one for each provider that wants any.
    pub(super) fn statistics(&self, class: Class) -> Vec<Any> {
        let mode = mode_of(class);
        self.sides(mode)
            .into_iter()
            .filter(|(name, side)| !side.disabled && self.provider(name).is_some_and(prometheus))
            .map(|(_, side)| any::pack(&plugin(side, class)))
            .collect()
    }

    fn sides(&self, mode: WorkloadMode) -> BTreeMap<String, Side> {
        let defaults = self.default_providers(Kind::Metrics);
        let rules: Vec<&Metrics> = self.objects.iter().flat_map(|o| &o.spec.metrics).collect();
        if rules.is_empty() {
            return defaults
                .iter()
                .map(|n| ((*n).to_owned(), Side::default()))
                .collect();
        }
        // The last rule that names providers says which ones count at all.
        let counting: BTreeSet<&str> = rules
            .iter()
            .rev()
            .find(|m| !m.providers.is_empty())
            .map_or(defaults.clone(), |m| provider_names(&m.providers))
            .into_iter()
            .collect();
        let mut out: BTreeMap<String, Side> = BTreeMap::new();
        let mut meant = defaults;
        for rule in rules {
            if !rule.providers.is_empty() {
                meant = provider_names(&rule.providers);
            }
            for name in meant.iter().filter(|n| counting.contains(*n)) {
                let side = out.entry((*name).to_owned()).or_default();
                side.interval = rule.reporting_interval.or(side.interval);
                apply(side, rule, mode);
            }
        }
        out
    }
}

fn apply(side: &mut Side, rule: &Metrics, mode: WorkloadMode) {
    for change in &rule.overrides {
        let selector = change.r#match.as_ref();
        let wanted = selector.map_or(WorkloadMode::ClientAndServer, MetricSelector::mode);
        if !super::covers(wanted, mode) {
            continue;
        }
        let (names, all) = selected(selector);
        if all && change.disabled == Some(true) {
            side.disabled = true;
            continue;
        }
        side.disabled = false;
        for name in names {
            let entry = side.overrides.entry(name).or_default();
            entry.disabled = change.disabled.unwrap_or(entry.disabled);
            for (tag, what) in &change.tag_overrides {
                entry.tags.insert(tag.clone(), expression(what));
            }
        }
    }
}

fn expression(what: &TagOverride) -> Option<String> {
    (what.operation() == Operation::Upsert).then(|| what.value.clone())
}

/// The metrics that are meant, and whether that is every one.
fn selected(selector: Option<&MetricSelector>) -> (Vec<String>, bool) {
    let all = || {
        METRICS
            .iter()
            .map(|(_, name, _)| (*name).to_owned())
            .collect()
    };
    match selector.and_then(|s| s.metric_match.as_ref()) {
        Some(MetricMatch::CustomMetric(name)) => (vec![name.clone()], false),
        Some(MetricMatch::Metric(metric)) if *metric != IstioMetric::AllMetrics as i32 => {
            let found = METRICS.iter().find(|(m, ..)| *m as i32 == *metric);
            (
                found
                    .map(|(_, name, _)| (*name).to_owned())
                    .into_iter()
                    .collect(),
                false,
            )
        }
        _ => (all(), true),
    }
}

fn plugin(side: Side, class: Class) -> PluginConfig {
    let metric = |(name, change): (String, Override)| {
        let on_wire = METRICS
            .iter()
            .find(|(_, n, _)| *n == name)
            .map(|(.., wire)| *wire);
        let (removed, set): (Vec<_>, Vec<_>) = change
            .tags
            .into_iter()
            .partition(|(_, value)| value.is_none());
        MetricConfig {
            name: on_wire.map_or(name, str::to_owned),
            drop: change.disabled,
            tags_to_remove: removed.into_iter().map(|(tag, _)| tag).collect(),
            dimensions: set
                .into_iter()
                .map(|(tag, v)| (tag, v.unwrap_or_default()))
                .collect(),
            ..Default::default()
        }
    };
    PluginConfig {
        // Where the destination is known the Host header is not to be believed.
        disable_host_header_fallback: class != Class::Outbound,
        tcp_reporting_duration: side.interval,
        metrics: side.overrides.into_iter().map(metric).collect(),
        ..Default::default()
    }
}
