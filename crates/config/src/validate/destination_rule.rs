//! DestinationRule.

use proto::istio::networking::v1alpha3::{
    ClientTlsSettings, ConnectionPoolSettings, DestinationRule, LoadBalancerSettings,
    LocalityLoadBalancerSetting, OutlierDetection, TrafficPolicy,
    client_tls_settings::TlSmode,
    connection_pool_settings::http_settings::H2UpgradePolicy,
    load_balancer_settings::{
        LbPolicy,
        consistent_hash_lb::{HashAlgorithm, HashKey},
    },
    traffic_policy::TunnelSettings,
};

use super::{Report, names};
use crate::Meta;

pub(super) fn check(report: &mut Report, meta: &Meta, spec: &DestinationRule) {
    report.check("spec.host", names::wildcard_domain(&spec.host));
    if let Some(policy) = &spec.traffic_policy {
        traffic_policy(report, "spec.trafficPolicy", policy);
    }
    for (i, subset) in spec.subsets.iter().enumerate() {
        let field = format!("spec.subsets[{i}]");
        if spec.subsets[..i].iter().any(|s| s.name == subset.name) {
            report.error(
                format!("{field}.name"),
                format!("{:?} is given twice", subset.name),
            );
        }
        report.check(format!("{field}.name"), names::label(&subset.name));
        report.check(format!("{field}.labels"), names::label_map(&subset.labels));
        if let Some(policy) = &subset.traffic_policy {
            traffic_policy(report, &format!("{field}.trafficPolicy"), policy);
        }
    }
    report.export_to(&meta.namespace, &spec.export_to, false);
    if let Some(selector) = &spec.workload_selector {
        let own = |e: &String| e == "." || *e == meta.namespace;
        if spec.export_to.len() > 1 || spec.export_to.iter().any(|e| !own(e)) {
            let message = "a rule with a workloadSelector is for its own namespace: give \".\" or leave exportTo out";
            report.error("spec.exportTo", message);
        }
        report.selector(Some(selector));
    }
}

fn traffic_policy(report: &mut Report, field: &str, policy: &TrafficPolicy) {
    let given = [
        policy.outlier_detection.is_some(),
        policy.connection_pool.is_some(),
        policy.load_balancer.is_some(),
        policy.tls.is_some(),
        !policy.port_level_settings.is_empty(),
        policy.tunnel.is_some(),
        policy.proxy_protocol.is_some(),
        policy.retry_budget.is_some(),
    ];
    if !given.contains(&true) {
        report.error(field, "is empty: set something or leave it out");
    }
    if policy.tunnel.is_some() && policy.proxy_protocol.is_some() {
        report.error(
            format!("{field}.proxyProtocol"),
            "cannot stand beside tunnel: give one of the two",
        );
    }
    outlier(
        report,
        &format!("{field}.outlierDetection"),
        policy.outlier_detection.as_ref(),
    );
    connection_pool(
        report,
        &format!("{field}.connectionPool"),
        policy.connection_pool.as_ref(),
    );
    let has_outlier = policy.outlier_detection.is_some();
    load_balancer(
        report,
        &format!("{field}.loadBalancer"),
        policy.load_balancer.as_ref(),
        has_outlier,
    );
    client_tls(report, &format!("{field}.tls"), policy.tls.as_ref());
    for (i, port) in policy.port_level_settings.iter().enumerate() {
        let field = format!("{field}.portLevelSettings[{i}]");
        match &port.port {
            None => report.error(format!("{field}.port"), "is missing"),
            Some(p) => report.port(format!("{field}.port.number"), p.number),
        }
        let given = port.outlier_detection.is_some()
            || port.connection_pool.is_some()
            || port.load_balancer.is_some()
            || port.tls.is_some();
        if !given {
            report.error(&field, "is empty: set something or leave it out");
        }
        outlier(
            report,
            &format!("{field}.outlierDetection"),
            port.outlier_detection.as_ref(),
        );
        connection_pool(
            report,
            &format!("{field}.connectionPool"),
            port.connection_pool.as_ref(),
        );
        let has_outlier = port.outlier_detection.is_some();
        load_balancer(
            report,
            &format!("{field}.loadBalancer"),
            port.load_balancer.as_ref(),
            has_outlier,
        );
        client_tls(report, &format!("{field}.tls"), port.tls.as_ref());
    }
    if let Some(t) = &policy.tunnel {
        tunnel(report, &format!("{field}.tunnel"), t);
    }
}

fn tunnel(report: &mut Report, field: &str, tunnel: &TunnelSettings) {
    if !matches!(tunnel.protocol.as_str(), "" | "CONNECT" | "POST") {
        report.error(format!("{field}.protocol"), "must be CONNECT or POST");
    }
    if names::ip(&tunnel.target_host).is_err() {
        report.check(
            format!("{field}.targetHost"),
            names::fqdn(&tunnel.target_host),
        );
    }
    report.port(format!("{field}.targetPort"), tunnel.target_port);
}

fn outlier(report: &mut Report, field: &str, outlier: Option<&OutlierDetection>) {
    let Some(o) = outlier else { return };
    report.duration(
        format!("{field}.baseEjectionTime"),
        o.base_ejection_time.as_ref(),
    );
    report.duration(format!("{field}.interval"), o.interval.as_ref());
    if o.consecutive_errors != 0 {
        report.warning(
            format!("{field}.consecutiveErrors"),
            "is old: use consecutiveGatewayErrors or consecutive5xxErrors",
        );
    }
    if !o.split_external_local_origin_errors
        && o.consecutive_local_origin_failures.is_some_and(|n| n > 0)
    {
        let message = "has an effect only with splitExternalLocalOriginErrors: true";
        report.error(format!("{field}.consecutiveLocalOriginFailures"), message);
    }
    report.percent(
        format!("{field}.maxEjectionPercent"),
        o.max_ejection_percent,
    );
    report.percent(format!("{field}.minHealthPercent"), o.min_health_percent);
}

pub(super) fn connection_pool(
    report: &mut Report,
    field: &str,
    pool: Option<&ConnectionPoolSettings>,
) {
    let Some(pool) = pool else { return };
    if pool.http.is_none() && pool.tcp.is_none() {
        report.error(field, "is empty: set tcp or http, or leave it out");
    }
    if let Some(http) = &pool.http {
        let field = format!("{field}.http");
        for (name, value) in [
            ("http1MaxPendingRequests", http.http1_max_pending_requests),
            ("http2MaxRequests", http.http2_max_requests),
            ("maxRequestsPerConnection", http.max_requests_per_connection),
            ("maxRetries", http.max_retries),
            ("maxConcurrentStreams", http.max_concurrent_streams),
        ] {
            if value < 0 {
                report.error(
                    format!("{field}.{name}"),
                    format!("{value} must not be negative"),
                );
            }
        }
        report.duration(format!("{field}.idleTimeout"), http.idle_timeout.as_ref());
        if http.h2_upgrade_policy() == H2UpgradePolicy::Upgrade && http.use_client_protocol {
            report.error(
                format!("{field}.useClientProtocol"),
                "contradicts h2UpgradePolicy: UPGRADE",
            );
        }
        if let Some(keepalive) = &http.http2_keep_alive {
            let field = format!("{field}.http2KeepAlive");
            for (name, value) in [
                ("interval", &keepalive.interval),
                ("timeout", &keepalive.timeout),
            ] {
                if value.is_none() {
                    report.error(format!("{field}.{name}"), "is missing");
                }
                report.duration(format!("{field}.{name}"), value.as_ref());
            }
        }
    }
    if let Some(tcp) = &pool.tcp {
        let field = format!("{field}.tcp");
        if tcp.max_connections < 0 {
            report.error(
                format!("{field}.maxConnections"),
                format!("{} must not be negative", tcp.max_connections),
            );
        }
        report.duration(
            format!("{field}.connectTimeout"),
            tcp.connect_timeout.as_ref(),
        );
        report.duration(
            format!("{field}.maxConnectionDuration"),
            tcp.max_connection_duration.as_ref(),
        );
        // 0 turns the idle timeout off.
        let idle = tcp
            .idle_timeout
            .as_ref()
            .filter(|d| d.seconds != 0 || d.nanos.abs() >= 1_000_000);
        report.duration(format!("{field}.idleTimeout"), idle);
        if let Some(keepalive) = &tcp.tcp_keepalive {
            report.duration(
                format!("{field}.tcpKeepalive.time"),
                keepalive.time.as_ref(),
            );
            report.duration(
                format!("{field}.tcpKeepalive.interval"),
                keepalive.interval.as_ref(),
            );
        }
    }
}

fn load_balancer(
    report: &mut Report,
    field: &str,
    lb: Option<&LoadBalancerSettings>,
    outlier: bool,
) {
    let Some(lb) = lb else { return };
    if let Some(LbPolicy::ConsistentHash(hash)) = &lb.lb_policy {
        let field = format!("{field}.consistentHash");
        if let Some(HashKey::HttpCookie(cookie)) = &hash.hash_key {
            if cookie.name.is_empty() {
                report.error(format!("{field}.httpCookie.name"), "is missing");
            }
            for (i, a) in cookie.attributes.iter().enumerate() {
                let twice = cookie.attributes[..i].iter().any(|b| a.name == b.name);
                if a.name.is_empty() || twice {
                    let message = if twice {
                        "is given twice"
                    } else {
                        "is missing"
                    };
                    report.error(format!("{field}.httpCookie.attributes[{i}].name"), message);
                }
            }
        }
        if hash.minimum_ring_size != 0 {
            report.warning(
                format!("{field}.minimumRingSize"),
                "is old: use ringHash.minimumRingSize",
            );
            if hash.hash_algorithm.is_some() {
                report.error(
                    format!("{field}.minimumRingSize"),
                    "cannot stand beside ringHash or maglev",
                );
            }
        }
        if let Some(HashAlgorithm::Maglev(maglev)) = &hash.hash_algorithm {
            let size = maglev.table_size;
            if size >= 5_000_011 || !is_prime(size) {
                report.error(
                    format!("{field}.maglev.tableSize"),
                    format!("{size} must be a prime number below 5000011"),
                );
            }
        }
    }
    if lb.locality_lb_setting.is_some() && lb.zone_aware_lb_setting.is_some() {
        report.error(
            format!("{field}.zoneAwareLbSetting"),
            "cannot stand beside localityLbSetting",
        );
    }
    if let Some(locality) = &lb.locality_lb_setting {
        self::locality(
            report,
            &format!("{field}.localityLbSetting"),
            locality,
            outlier,
        );
    }
    if let Some(warmup) = &lb.warmup {
        let field = format!("{field}.warmup");
        if warmup.duration.is_none() {
            report.error(format!("{field}.duration"), "is missing");
        }
        report.duration(format!("{field}.duration"), warmup.duration.as_ref());
        if warmup.minimum_percent.is_some_and(|p| p > 100.0) {
            report.error(format!("{field}.minimumPercent"), "must be at most 100");
        }
        if warmup.aggression.is_some_and(|a| a <= 0.0) {
            report.error(format!("{field}.aggression"), "must be above 0");
        }
    }
}

fn locality(report: &mut Report, field: &str, lb: &LocalityLoadBalancerSetting, outlier: bool) {
    if !lb.distribute.is_empty() && !lb.failover.is_empty() {
        report.error(
            format!("{field}.failover"),
            "cannot stand beside distribute: give one of the two",
        );
        return;
    }
    let topology = lb
        .failover_priority
        .iter()
        .position(|l| l.starts_with("topology."));
    if let Some(i) = topology.filter(|_| !lb.failover.is_empty()) {
        report.error(
            format!("{field}.failoverPriority[{i}]"),
            "a label of topology cannot stand beside failover",
        );
    }
    for (i, d) in lb.distribute.iter().enumerate() {
        let field = format!("{field}.distribute[{i}]");
        for (to, weight) in &d.to {
            if !(1..=100).contains(weight) {
                report.error(
                    format!("{field}.to[{to:?}]"),
                    format!("{weight} is no share: give 1 to 100"),
                );
            }
        }
        let total: u64 = d.to.values().map(|w| u64::from(*w)).sum();
        if total != 100 {
            report.error(
                format!("{field}.to"),
                format!("the shares add up to {total}, not to 100"),
            );
        }
        localities(report, &format!("{field}.to"), d.to.keys());
    }
    localities(
        report,
        &format!("{field}.distribute"),
        lb.distribute.iter().map(|d| &d.from),
    );
    if (!lb.failover.is_empty() || !lb.failover_priority.is_empty()) && !outlier {
        report.warning(field, "fails over only together with outlierDetection");
    }
    for (i, f) in lb.failover.iter().enumerate() {
        let field = format!("{field}.failover[{i}]");
        if f.from == f.to {
            report.error(format!("{field}.to"), "must be another region than from");
        }
        for (name, region) in [("from", &f.from), ("to", &f.to)] {
            if region.contains(['/', '*']) {
                report.error(
                    format!("{field}.{name}"),
                    format!("{region:?} must be a region alone"),
                );
            }
        }
    }
}

/// Localities of one list must not contain one another.
fn localities<'a>(report: &mut Report, field: &str, all: impl Iterator<Item = &'a String>) {
    let mut seen: Vec<Vec<&str>> = Vec::new();
    for text in all {
        let parts: Vec<&str> = text.split('/').collect();
        let star = text.matches('*').count();
        if parts.iter().any(|p| p.is_empty()) || parts.len() > 3 {
            report.error(field, format!("{text:?} must be REGION, REGION/ZONE or REGION/ZONE/SUBZONE, without empty parts"));
            return;
        }
        if star > 1 || (star == 1 && !text.ends_with('*')) {
            report.error(field, format!("{text:?}: \"*\" may stand once, at the end"));
            return;
        }
        let prefix: Vec<&str> = parts.into_iter().take_while(|p| *p != "*").collect();
        if seen
            .iter()
            .any(|s| s.starts_with(&prefix) || prefix.starts_with(s))
        {
            report.error(
                field,
                format!("{text:?} overlaps with another locality of the list"),
            );
            return;
        }
        seen.push(prefix);
    }
}

fn client_tls(report: &mut Report, field: &str, tls: Option<&ClientTlsSettings>) {
    let Some(tls) = tls else { return };
    let (simple, mutual) = (tls.mode() == TlSmode::Simple, tls.mode() == TlSmode::Mutual);
    if tls.insecure_skip_verify == Some(true) {
        let sources = !tls.ca_certificates.is_empty() || !tls.subject_alt_names.is_empty();
        if (simple && (sources || !tls.credential_name.is_empty())) || (mutual && sources) {
            report.error(
                format!("{field}.insecureSkipVerify"),
                "contradicts caCertificates, subjectAltNames and credentialName",
            );
        }
    }
    if (simple || mutual) && !tls.credential_name.is_empty() {
        let files = [
            &tls.client_certificate,
            &tls.ca_certificates,
            &tls.private_key,
            &tls.ca_crl,
        ];
        if files.iter().any(|f| !f.is_empty()) {
            report.error(
                format!("{field}.credentialName"),
                "cannot stand beside certificate files: give one of the two",
            );
        }
        return;
    }
    if mutual {
        for (name, value) in [
            ("clientCertificate", &tls.client_certificate),
            ("privateKey", &tls.private_key),
        ] {
            if value.is_empty() {
                report.error(format!("{field}.{name}"), "is needed for mode MUTUAL");
            }
        }
    }
}

fn is_prime(n: u64) -> bool {
    n > 1
        && (2..)
            .take_while(|f| f * f <= n)
            .all(|f| !n.is_multiple_of(f))
}
