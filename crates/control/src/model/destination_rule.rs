//! DestinationRule: which rule a client uses for a service, how rules for one host merge, and which part of a
//! policy counts for a port and a subset.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use config::{Kind, Object, labels_match};
use proto::istio::networking::v1alpha3::{
    DestinationRule, TrafficPolicy, traffic_policy::PortTrafficPolicy,
};

use super::{Labels, Origin, host, service::ExportTo};
use crate::gateway_api::Derived;

/// One rule as clients see it: what several objects for the same host and audience say together.
#[derive(Debug, Clone)]
pub struct MergedRule {
    /// The first object's metadata with the merged content; `host` is a full name.
    pub rule: Arc<Object<DestinationRule>>,
    pub export_to: ExportTo,
    /// The objects that were merged, the oldest first.
    pub from: Vec<Origin>,
}

impl MergedRule {
    /// The labels that a client must have for this rule to be its; `None` for a rule for everyone.
    pub fn selector(&self) -> Option<&Labels> {
        self.rule
            .spec
            .workload_selector
            .as_ref()
            .map(|s| &s.match_labels)
    }
}

/// The rules of one namespace by host.
#[derive(Debug, Clone, Default)]
struct Rules {
    exact: BTreeMap<String, Vec<MergedRule>>,
    wildcard: BTreeMap<String, Vec<MergedRule>>,
}

/// All rules, by who may use them.
#[derive(Debug, Clone, Default)]
pub struct DestinationRules {
    root: String,
    /// For clients of the namespace itself.
    local: BTreeMap<String, Rules>,
    /// For clients elsewhere.
    exported: BTreeMap<String, Rules>,
    /// Rules of the root namespace that only it may use.
    root_local: Rules,
    label_keys: BTreeSet<String>,
}

impl DestinationRules {
    /// Indexes and merges the objects. `derived` were made of Gateway API's policies; `default_export` is MeshConfig's
    /// `defaultDestinationRuleExportTo`.
    pub fn new(
        objects: Vec<Arc<Object<DestinationRule>>>,
        derived: &[Derived<DestinationRule>],
        root: &str,
        domain: &str,
        default_export: &ExportTo,
    ) -> Self {
        let own = objects.into_iter().map(|o| {
            let from = vec![Origin::of(Kind::DestinationRule, &o)];
            (o, from)
        });
        let derived = derived.iter().map(|d| (d.object.clone(), d.from.clone()));
        let mut objects: Vec<_> = own.chain(derived).collect();
        objects.sort_by(|(a, _), (b, _)| {
            a.spec
                .workload_selector
                .is_none()
                .cmp(&b.spec.workload_selector.is_none())
                .then_with(|| a.by_age(b))
        });
        let mut out = Self {
            root: root.to_owned(),
            ..Self::default()
        };
        for (object, from) in objects {
            let namespace = object.meta.namespace.clone();
            let full = host::fqdn(&object.spec.host, &namespace, domain);
            let object = if full == object.spec.host {
                object
            } else {
                let mut copy = (*object).clone();
                copy.spec.host = full;
                Arc::new(copy)
            };
            let export: ExportTo = match &object.spec.workload_selector {
                // A rule for chosen workloads counts only in its own namespace.
                Some(selector) => {
                    out.label_keys.extend(selector.match_labels.keys().cloned());
                    BTreeSet::from([".".to_owned()])
                }
                None => object.spec.export_to.iter().cloned().collect(),
            };
            collect_failover_labels(&object.spec, &mut out.label_keys);
            let own = export.is_empty()
                || export.contains("*")
                || export.contains(".")
                || export.contains(&namespace);
            let merged = MergedRule {
                rule: object,
                export_to: export.clone(),
                from,
            };
            if own {
                out.local
                    .entry(namespace.clone())
                    .or_default()
                    .add(merged.clone());
            }
            let private = if export.is_empty() {
                default_export.contains(".")
            } else {
                export.len() == 1 && (export.contains(".") || export.contains(&namespace))
            };
            if !private {
                out.exported.entry(namespace).or_default().add(merged);
            } else if namespace == root {
                out.root_local.add(merged);
            }
        }
        out
    }

    /// The rules for a service as seen from `client`: the client's own namespace first (for the root namespace
    /// only what it keeps to itself), then the service's, then the root's. In each the most specific host.
    pub fn for_service(&self, client: &str, hostname: &str, namespace: &str) -> Vec<MergedRule> {
        let own = if client == self.root {
            Some(&self.root_local)
        } else {
            self.local.get(client)
        };
        if let Some(rules) = own.and_then(|rules| rules.find(hostname)) {
            return rules.clone();
        }
        for owner in [namespace, self.root.as_str()] {
            let found: Vec<_> = self
                .exported
                .get(owner)
                .and_then(|rules| rules.find(hostname))
                .into_iter()
                .flatten()
                .filter(|r| {
                    r.export_to.is_empty()
                        || r.export_to.contains("*")
                        || r.export_to.contains(client)
                })
                .cloned()
                .collect();
            if !found.is_empty() {
                return found;
            }
        }
        Vec::new()
    }

    /// Labels of clients that some rule looks at.
    pub(super) fn label_keys(&self) -> impl Iterator<Item = &String> {
        self.label_keys.iter()
    }
}

impl Rules {
    fn find(&self, hostname: &str) -> Option<&Vec<MergedRule>> {
        host::most_specific(hostname, &self.exact, &self.wildcard).map(|(_, rules)| rules)
    }

    /// Adds a rule: it joins those for the same host, audience and workloads, else stands beside them.
    fn add(&mut self, new: MergedRule) {
        let host = new.rule.spec.host.clone();
        let map = if host::is_wildcard(&host) {
            &mut self.wildcard
        } else {
            &mut self.exact
        };
        let list = map.entry(host).or_default();
        let mut separate = true;
        for old in list.iter_mut() {
            if old.export_to != new.export_to || old.selector() != new.selector() {
                continue;
            }
            separate = false;
            let mut merged = (*old.rule).clone();
            for subset in &new.rule.spec.subsets {
                if merged.spec.subsets.iter().any(|s| s.name == subset.name) {
                    tracing::warn!(
                        "subset {:?} of {} is ignored: an older rule for host {} already has it",
                        subset.name,
                        new.from[0],
                        merged.spec.host
                    );
                } else {
                    merged.spec.subsets.push(subset.clone());
                }
            }
            if merged.spec.traffic_policy.is_none() {
                merged.spec.traffic_policy = new.rule.spec.traffic_policy.clone();
            }
            old.rule = Arc::new(merged);
            old.from.extend(new.from.iter().cloned());
        }
        if separate {
            list.push(new);
        }
    }
}

/// The rule of `rules` (those for one service in one scope) for a client with these labels: the first with a
/// matching selector, else the one for everyone. Selectors count only for outbound, and only in their namespace.
pub fn choose<'a>(
    rules: &'a [MergedRule],
    outbound: bool,
    scope_namespace: &str,
    labels: &Labels,
) -> Option<&'a MergedRule> {
    let mut everyone = None;
    for rule in rules {
        match rule.selector() {
            None => everyone = Some(rule),
            Some(selector)
                if outbound
                    && rule.rule.meta.namespace == scope_namespace
                    && labels_match(selector, labels) =>
            {
                return Some(rule);
            }
            Some(_) => {}
        }
    }
    everyone
}

/// The policy for a port: the port's own where there is one (then nothing of the rest counts), and whether it was.
pub fn port_policy(
    policy: Option<&TrafficPolicy>,
    port: u32,
) -> (Option<Cow<'_, TrafficPolicy>>, bool) {
    let Some(policy) = policy else {
        return (None, false);
    };
    let own = policy
        .port_level_settings
        .iter()
        .find(|p| p.port.as_ref().is_some_and(|n| n.number == port));
    match own {
        Some(own) => (Some(Cow::Owned(widen(own))), true),
        None => (Some(Cow::Borrowed(policy)), false),
    }
}

/// The policy for a port of a subset: the subset's blocks over those of the whole rule.
pub fn subset_policy(
    whole: Option<&TrafficPolicy>,
    subset: Option<&TrafficPolicy>,
    port: u32,
) -> Option<TrafficPolicy> {
    let (whole, _) = port_policy(whole, port);
    let (subset, own_port) = port_policy(subset, port);
    let Some(subset) = subset else {
        return whole.map(Cow::into_owned);
    };
    let Some(whole) = whole else {
        return Some(subset.into_owned());
    };
    let (mut out, over) = (whole.into_owned(), subset.into_owned());
    out.port_level_settings.clear();
    // A port's own settings stand alone: what they leave out is the default, not the rule's.
    if over.connection_pool.is_some() || own_port {
        out.connection_pool = over.connection_pool;
    }
    if over.outlier_detection.is_some() || own_port {
        out.outlier_detection = over.outlier_detection;
    }
    if over.load_balancer.is_some() || own_port {
        out.load_balancer = over.load_balancer;
    }
    if over.tls.is_some() || own_port {
        out.tls = over.tls;
    }
    out.tunnel = over.tunnel.or(out.tunnel);
    out.proxy_protocol = over.proxy_protocol.or(out.proxy_protocol);
    out.retry_budget = over.retry_budget.or(out.retry_budget);
    Some(out)
}

fn widen(port: &PortTrafficPolicy) -> TrafficPolicy {
    TrafficPolicy {
        load_balancer: port.load_balancer.clone(),
        connection_pool: port.connection_pool,
        outlier_detection: port.outlier_detection.clone(),
        tls: port.tls.clone(),
        ..TrafficPolicy::default()
    }
}

fn collect_failover_labels(rule: &DestinationRule, keys: &mut BTreeSet<String>) {
    let policies = rule.traffic_policy.iter().chain(
        rule.subsets
            .iter()
            .filter_map(|s| s.traffic_policy.as_ref()),
    );
    for policy in policies {
        let ports = policy.port_level_settings.iter().map(|p| &p.load_balancer);
        for lb in ports.chain([&policy.load_balancer]).flatten() {
            if let Some(locality) = &lb.locality_lb_setting {
                keys.extend(locality.failover_priority.iter().map(|l| label_key(l)));
            }
            if let Some(zone) = &lb.zone_aware_lb_setting {
                keys.extend(zone.failover_priority.iter().map(|l| label_key(l)));
            }
        }
    }
}

/// `key` of `key` or `key=value`.
fn label_key(label: &str) -> String {
    label
        .split_once('=')
        .map_or(label, |(key, _)| key)
        .to_owned()
}
