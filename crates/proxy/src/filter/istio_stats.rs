//! `istio.stats`: Istio's standard request metrics, with the workloads on both ends as labels.

use std::{cell::RefCell, collections::HashMap, rc::Rc, sync::Arc, time::Duration};

use foldhash::fast::RandomState;
use serde_json::Value;
use stats::{Counter, Histogram};

use super::{
    Filter, Interests,
    peer_metadata::{DOWNSTREAM_PEER, UPSTREAM_PEER, workload},
};
use crate::{
    http::Exchange,
    plan::{http_filter::IstioStats, listener::TrafficDirection},
    worker::Worker,
};

/// The filter of one connection manager.
#[derive(Debug)]
pub(super) struct IstioStatsFilter {
    config: Arc<IstioStats>,
    own: Value,
    /// Handles by the text of all labels: a request that looks like one before finds them at once.
    handles: RefCell<HashMap<String, Rc<Handles>, RandomState>>,
    scratch: RefCell<String>,
}

/// The handles of one set of labels; a metric that the configuration drops has none.
#[derive(Debug)]
struct Handles {
    requests: Option<Counter>,
    duration: Option<Histogram>,
    request_bytes: Option<Histogram>,
    response_bytes: Option<Histogram>,
    request_messages: Option<Counter>,
    response_messages: Option<Counter>,
}

/// The same labels on whole connections: `istio_tcp_*`.
#[derive(Debug)]
pub(crate) struct IstioTcpStats(IstioStatsFilter);

/// What has happened on a connection since the last report.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TcpReport {
    /// It was opened.
    pub(crate) opened: bool,
    /// It was closed.
    pub(crate) closed: bool,
    /// Bytes from the client.
    pub(crate) received: u64,
    /// Bytes to the client.
    pub(crate) sent: u64,
}

impl IstioTcpStats {
    pub(crate) fn new(config: Arc<IstioStats>, worker: &Worker) -> Self {
        Self(IstioStatsFilter::new(config, worker))
    }

    /// How often open connections are reported.
    pub(crate) fn interval(&self) -> Duration {
        self.0
            .config
            .tcp_reporting_duration
            .unwrap_or(REPORTING_DURATION)
    }

    /// Counts what has happened.
    pub(crate) fn report(&self, exchange: &Exchange<'_>, report: TcpReport, worker: &Worker) {
        let mut labels = self.0.scratch.borrow_mut();
        self.0.labels(exchange, &mut labels);
        let values: Vec<&str> = labels.split_terminator('\0').collect();
        let all: Vec<(&str, &str)> = LABELS
            .iter()
            .copied()
            .zip(values)
            .filter(|(name, _)| !matches!(*name, "response_code" | "grpc_response_status"))
            .collect();
        // Not on the way of a request: a few look-ups for each connection and interval.
        let add = |metric: &str, value: u64| {
            if value > 0
                && let Some(tags) = self.0.tags(metric, &all)
            {
                worker
                    .stats
                    .tagged_counter(&format!("istiocustom.istio_{metric}"), &tags)
                    .add(value);
            }
        };
        add("tcp_connections_opened_total", report.opened.into());
        add("tcp_connections_closed_total", report.closed.into());
        add("tcp_received_bytes_total", report.received);
        add("tcp_sent_bytes_total", report.sent);
    }
}

/// Istio's default for `tcp_reporting_duration`.
const REPORTING_DURATION: Duration = Duration::from_secs(5);

impl IstioStatsFilter {
    pub(super) fn new(config: Arc<IstioStats>, worker: &Worker) -> IstioStatsFilter {
        IstioStatsFilter {
            config,
            own: workload(&worker.bootstrap.node.metadata),
            handles: RefCell::default(),
            scratch: RefCell::default(),
        }
    }

    /// Writes `value\0` for each of [`LABELS`].
    fn labels(&self, exchange: &Exchange<'_>, out: &mut String) {
        out.clear();
        let inbound = exchange.connection.listener.traffic_direction == TrafficDirection::Inbound;
        let server = inbound || self.config.server_gateway;
        let mut label = |text: &str| {
            out.push_str(text);
            out.push('\0');
        };
        label(match (self.config.server_gateway, inbound) {
            (true, _) => "waypoint",
            (false, true) => "destination",
            (false, false) => "source",
        });
        let from_endpoint = match server {
            true => None,
            false => exchange
                .upstream
                .host
                .as_ref()
                .and_then(|host| host.metadata.lookup("istio", &["workload"]))
                .and_then(Value::as_str)
                .map(endpoint_workload),
        };
        let state = if server {
            DOWNSTREAM_PEER
        } else {
            UPSTREAM_PEER
        };
        let peer = exchange
            .state(state)
            .or(from_endpoint.as_ref())
            .unwrap_or(&Value::Null);
        let (source, destination) = if server {
            (peer, &self.own)
        } else {
            (&self.own, peer)
        };
        let session = match server {
            true => exchange.connection.tls.as_deref(),
            false => exchange.upstream.tls.as_deref(),
        };
        let peer = session.and_then(|session| session.peer.as_deref());
        let own = session.and_then(|session| session.local.as_deref());
        let principals = if server { [peer, own] } else { [own, peer] };
        for (end, principal) in [source, destination].into_iter().zip(principals) {
            let field = |name: &str| end[name].as_str().unwrap_or("unknown");
            let tag = |name: &str, otherwise| end["LABELS"][name].as_str().unwrap_or(otherwise);
            label(field("WORKLOAD_NAME"));
            label(field("NAMESPACE"));
            let principal = principal.and_then(|certificate| certificate.uris.first());
            label(principal.map_or("unknown", |uri| uri));
            label(tag("app", "unknown"));
            label(tag("version", "unknown"));
            label(tag("service.istio.io/canonical-name", "unknown"));
            label(tag("service.istio.io/canonical-revision", "latest"));
            label(field("CLUSTER_ID"));
        }
        self.service(exchange, destination, &mut label);
        let grpc = exchange.request.is_grpc();
        label(match (exchange.tcp, grpc) {
            (true, _) => "tcp",
            (false, true) => "grpc",
            (false, false) => "http",
        });
        label(itoa::Buffer::new().format(exchange.status()));
        match (grpc, grpc_status(exchange)) {
            (true, Some(status)) => label(status),
            (true, None) => label("unknown"),
            (false, _) => label(""),
        }
        if exchange.flags.is_empty() {
            label("-");
        } else {
            label(&exchange.flags.short().collect::<Vec<_>>().join(","));
        }
        label(match (server, peer) {
            (false, _) => "unknown",
            (true, Some(_)) => "mutual_tls",
            (true, None) => "none",
        });
    }

    /// The three labels of the destination's service.
    fn service(&self, exchange: &Exchange<'_>, destination: &Value, label: &mut impl FnMut(&str)) {
        let namespace = destination["NAMESPACE"].as_str().unwrap_or("unknown");
        let cluster = exchange.upstream.cluster.as_ref();
        let known = cluster
            .and_then(|cluster| cluster.metadata.lookup("istio", &["services"]))
            .and_then(|services| services.get(0));
        if let Some(service) = known {
            let field = |name: &str| service[name].as_str().unwrap_or("unknown");
            label(field("host"));
            label(field("name"));
            label(match field("namespace") {
                "unknown" => namespace,
                known => known,
            });
            return;
        }
        let host = match self.config.disable_host_header_fallback || exchange.tcp {
            true => "unknown",
            false => exchange.request.authority(),
        };
        let route = exchange.route.route().map_or("", |route| &*route.name);
        let cluster = exchange.upstream.cluster_name().unwrap_or_default();
        let name = match (route, cluster) {
            ("allow_any", _) | (_, "PassthroughCluster") => "PassthroughCluster",
            ("block_all", _) | (_, "BlackHoleCluster") => "BlackHoleCluster",
            (_, "InboundPassthroughCluster" | "InboundPassthroughClusterIpv4") => {
                "InboundPassthroughCluster"
            }
            _ => host,
        };
        label(host);
        label(name);
        label(namespace);
    }

    /// The labels of one metric; `None` where the configuration drops it.
    fn tags<'a>(
        &'a self,
        metric: &str,
        all: &[(&'a str, &'a str)],
    ) -> Option<Vec<(&'a str, &'a str)>> {
        let mut tags = all.to_vec();
        for change in &self.config.metrics {
            if !change.name.is_empty() && *change.name != *metric {
                continue;
            }
            if change.drop {
                return None;
            }
            tags.retain(|(name, _)| !change.tags_to_remove.iter().any(|tag| **tag == **name));
            for (name, expression) in &change.dimensions {
                let value = self.expression(expression);
                match tags.iter_mut().find(|(tag, _)| **tag == **name) {
                    Some((_, old)) => *old = value,
                    None => tags.push((name, value)),
                }
            }
        }
        Some(tags)
    }

    fn make(&self, labels: &str, worker: &Worker) -> Handles {
        let values: Vec<&str> = labels.split_terminator('\0').collect();
        let all: Vec<(&str, &str)> = LABELS.iter().copied().zip(values).collect();
        let tags = |metric: &str| self.tags(metric, &all);
        let counter = |metric: &str| {
            Some(
                worker
                    .stats
                    .tagged_counter(&format!("istiocustom.istio_{metric}"), &tags(metric)?),
            )
        };
        let histogram = |metric: &str| {
            Some(
                worker
                    .stats
                    .tagged_histogram(&format!("istiocustom.istio_{metric}"), &tags(metric)?),
            )
        };
        let is_grpc = all.contains(&("request_protocol", "grpc"));
        Handles {
            requests: counter("requests_total"),
            duration: histogram("request_duration_milliseconds"),
            request_bytes: histogram("request_bytes"),
            response_bytes: histogram("response_bytes"),
            request_messages: is_grpc.then(|| counter("request_messages_total")).flatten(),
            response_messages: is_grpc
                .then(|| counter("response_messages_total"))
                .flatten(),
        }
    }

    /// The value of a configured dimension: a literal, or a field of our own node. Expressions
    /// about the request have no value here.
    fn expression<'a>(&'a self, expression: &'a str) -> &'a str {
        let text = expression.trim();
        for quote in ['\'', '"'] {
            if let Some(literal) = text
                .strip_prefix(quote)
                .and_then(|rest| rest.strip_suffix(quote))
            {
                return literal;
            }
        }
        text.strip_prefix("node.metadata['")
            .and_then(|rest| rest.strip_suffix("']"))
            .and_then(|name| self.own[name].as_str())
            .unwrap_or("unknown")
    }
}

impl Filter for IstioStatsFilter {
    fn interests(&self) -> Interests {
        Interests::COMPLETE
    }

    fn complete(&self, exchange: &mut Exchange<'_>, worker: &Worker) {
        let mut labels = self.scratch.borrow_mut();
        self.labels(exchange, &mut labels);
        let mut all = self.handles.borrow_mut();
        let handles = match all.get(labels.as_str()) {
            Some(handles) => handles.clone(),
            None => {
                if all.len() >= KEPT_SETS {
                    all.clear();
                }
                let handles = Rc::new(self.make(&labels, worker));
                all.insert(labels.clone(), handles.clone());
                handles
            }
        };
        let record = |histogram: &Option<Histogram>, value| {
            if let Some(histogram) = histogram {
                histogram.record(value);
            }
        };
        let add = |counter: &Option<Counter>, value| {
            if let Some(counter) = counter {
                counter.add(value);
            }
        };
        add(&handles.requests, 1);
        record(&handles.duration, exchange.duration().as_millis() as u64);
        let request_head = exchange.request.headers.wire_size() as u64;
        record(
            &handles.request_bytes,
            exchange.progress.received + request_head,
        );
        let head = exchange
            .response
            .as_ref()
            .map_or(0, |head| head.headers.wire_size() as u64);
        record(&handles.response_bytes, exchange.progress.sent + head);
        if let Some(counts) = &exchange.filters.grpc {
            add(&handles.request_messages, counts.requests.count);
            add(&handles.response_messages, counts.responses.count);
        }
    }
}

fn grpc_status<'e>(exchange: &'e Exchange<'_>) -> Option<&'e str> {
    exchange
        .trailers
        .as_ref()
        .and_then(|trailers| trailers.get_str("grpc-status"))
        .or_else(|| exchange.response.as_ref()?.get_str("grpc-status"))
}

/// `workload;namespace;canonical-name;canonical-revision;cluster`, as istiod says it of endpoints.
fn endpoint_workload(text: &str) -> Value {
    let mut parts = text
        .split(';')
        .map(|part| Some(part).filter(|part| !part.is_empty()));
    let mut next = || parts.next().flatten();
    let (name, namespace, service, revision, cluster) = (next(), next(), next(), next(), next());
    serde_json::json!({
        "WORKLOAD_NAME": name, "NAMESPACE": namespace, "CLUSTER_ID": cluster,
        "LABELS": {
            "service.istio.io/canonical-name": service,
            "service.istio.io/canonical-revision": revision,
            "app": service, "version": revision,
        },
    })
}

/// Sets of labels whose handles are kept; the stats themselves stay.
const KEPT_SETS: usize = 4096;

const LABELS: [&str; 25] = [
    "reporter",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_canonical_service",
    "source_canonical_revision",
    "source_cluster",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_cluster",
    "destination_service",
    "destination_service_name",
    "destination_service_namespace",
    "request_protocol",
    "response_code",
    "grpc_response_status",
    "response_flags",
    "connection_security_policy",
];
