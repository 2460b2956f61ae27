//! Which endpoints a proxy prefers: shares by place, or priorities by distance or by labels.

use std::collections::BTreeMap;

use proto::{
    envoy::config::{core::v3::Locality, endpoint::v3::LocalityLbEndpoints},
    istio::{
        mesh::v1alpha1::MeshConfig,
        networking::v1alpha3::{
            LoadBalancerSettings, LocalityLoadBalancerSetting, ZoneAwareLoadBalancerSetting,
            locality_load_balancer_setting::Distribute,
        },
    },
};

use super::{
    Place,
    locality::{distance, locality_match},
};
use crate::model::{Proxy, Service, service::TrafficDistribution};

/// How load is spread over places.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum LbSetting {
    Locality {
        setting: LocalityLoadBalancerSetting,
        /// Failover even without outlier detection: `trafficDistribution` goes by the endpoints' own health.
        force: bool,
    },
    ZoneAware(ZoneAwareLoadBalancerSetting),
}

/// What counts: the rule's block, else the service's `trafficDistribution`, else the mesh's. `None`: nothing special.
pub(crate) fn lb_setting(
    mesh: &MeshConfig,
    rule: Option<&LoadBalancerSettings>,
    service: &Service,
) -> Option<LbSetting> {
    let enabled = |s: &LocalityLoadBalancerSetting| s.enabled != Some(false);
    if let Some(zone) = rule.and_then(|r| r.zone_aware_lb_setting.as_ref()) {
        return Some(LbSetting::ZoneAware(zone.clone()));
    }
    if let Some(setting) = rule.and_then(|r| r.locality_lb_setting.as_ref()) {
        return enabled(setting).then(|| LbSetting::Locality {
            setting: setting.clone(),
            force: false,
        });
    }
    let labels: &[&str] = match service.traffic_distribution {
        TrafficDistribution::Any => &[],
        TrafficDistribution::SameZone => &[
            "topology.istio.io/network",
            "topology.kubernetes.io/region",
            "topology.kubernetes.io/zone",
        ],
        TrafficDistribution::SameNode => &[
            "topology.istio.io/network",
            "topology.kubernetes.io/region",
            "topology.kubernetes.io/zone",
            "topology.istio.io/subzone",
            "kubernetes.io/hostname",
        ],
    };
    if !labels.is_empty() {
        let setting = LocalityLoadBalancerSetting {
            enabled: Some(true),
            failover_priority: labels.iter().map(|l| (*l).to_owned()).collect(),
            ..LocalityLoadBalancerSetting::default()
        };
        return Some(LbSetting::Locality {
            setting,
            force: true,
        });
    }
    if let Some(zone) = &mesh.zone_aware_lb_setting {
        return Some(LbSetting::ZoneAware(zone.clone()));
    }
    let setting = mesh.locality_lb_setting.as_ref()?;
    enabled(setting).then(|| LbSetting::Locality {
        setting: setting.clone(),
        force: false,
    })
}

/// The places with the weights and priorities that a proxy at its own place has. `outliers`: bad endpoints are found
/// out, without which nobody would ever fail over.
pub(super) fn apply(
    setting: &LbSetting,
    places: Vec<Place>,
    proxy: &Proxy,
    outliers: bool,
) -> Vec<LocalityLbEndpoints> {
    let here = &proxy.locality;
    match setting {
        LbSetting::Locality { setting, force } => {
            if !setting.distribute.is_empty() {
                let mut out = plain(places);
                distribute(&setting.distribute, here, &mut out);
                return out;
            }
            if !outliers && !force {
                return plain(places);
            }
            let region_failover: Vec<_> = setting
                .failover
                .iter()
                .map(|f| (f.from.as_str(), f.to.as_str()))
                .collect();
            if setting.failover_priority.is_empty() {
                let mut out = plain(places);
                by_distance(here, &region_failover, &mut out);
                return out;
            }
            let mut out = by_labels(&setting.failover_priority, places, proxy);
            if !region_failover.is_empty() {
                by_distance(here, &region_failover, &mut out);
            }
            out
        }
        LbSetting::ZoneAware(setting) => {
            if setting.enabled == Some(false) {
                return plain(places);
            }
            let mut out = if setting.failover_priority.is_empty() {
                plain(places)
            } else {
                by_labels(&setting.failover_priority, places, proxy)
            };
            let failover: Vec<_> = setting
                .failover
                .iter()
                .map(|f| (f.from.as_str(), f.to.as_str()))
                .collect();
            prioritise(&mut out, 3, |place| {
                if place.region == here.region {
                    return 0;
                }
                let to = failover
                    .iter()
                    .find(|(from, _)| *from == here.region)
                    .map(|(_, to)| *to);
                if to == Some(place.region.as_str()) {
                    1
                } else {
                    2
                }
            });
            out
        }
    }
}

fn plain(places: Vec<Place>) -> Vec<LocalityLbEndpoints> {
    places.into_iter().map(|p| p.lb).collect()
}

/// Gives the places that the first fitting rule names their shares, and takes the endpoints of all others away.
fn distribute(rules: &[Distribute], here: &Locality, out: &mut [LocalityLbEndpoints]) {
    let Some(rule) = rules.iter().find(|r| locality_match(here, &r.from)) else {
        return;
    };
    let mut taken = vec![false; out.len()];
    for (pattern, share) in &rule.to {
        let mine: Vec<usize> = (0..out.len())
            .filter(|i| {
                !taken[*i]
                    && out[*i]
                        .locality
                        .as_ref()
                        .is_some_and(|l| locality_match(l, pattern))
            })
            .collect();
        let weight =
            |place: &LocalityLbEndpoints| u64::from(place.load_balancing_weight.unwrap_or(1));
        let total: u64 = mine.iter().map(|i| weight(&out[*i])).sum();
        for i in mine {
            taken[i] = true;
            let part = (weight(&out[i]) * u64::from(*share)).div_ceil(total.max(1));
            if part > 0 {
                out[i].load_balancing_weight = Some(u32::try_from(part).unwrap_or(u32::MAX));
            }
        }
    }
    for (place, taken) in out.iter_mut().zip(taken) {
        if !taken {
            place.lb_endpoints.clear();
        }
    }
}

/// Nearer places first; of other regions those that `failover` names for the proxy's region before the rest.
fn by_distance(here: &Locality, failover: &[(&str, &str)], out: &mut [LocalityLbEndpoints]) {
    prioritise(out, 5, |place| {
        let near = distance(here, place);
        let to = failover
            .iter()
            .find(|(from, _)| *from == here.region)
            .map(|(_, to)| *to);
        if near == 3 && to.is_some_and(|to| to != place.region) {
            4
        } else {
            near
        }
    });
}

/// Sets priorities within the priorities that are there, without holes: Envoy refuses a gap.
fn prioritise(out: &mut [LocalityLbEndpoints], steps: u32, rank: impl Fn(&Locality) -> u32) {
    let nowhere = Locality::default();
    for place in out.iter_mut() {
        place.priority = place.priority * steps + rank(place.locality.as_ref().unwrap_or(&nowhere));
    }
    close_gaps(out);
}

fn close_gaps(out: &mut [LocalityLbEndpoints]) {
    let mut ranks: Vec<u32> = out.iter().map(|p| p.priority).collect();
    ranks.sort_unstable();
    ranks.dedup();
    for place in out {
        place.priority = ranks.partition_point(|r| *r < place.priority) as u32;
    }
}

/// Splits every place by how many of the labels, from the first on, its endpoints share with the proxy. A first label
/// that is the network ranks above all others.
fn by_labels(labels: &[String], places: Vec<Place>, proxy: &Proxy) -> Vec<LocalityLbEndpoints> {
    if proxy.labels.is_empty() || places.is_empty() {
        return plain(places);
    }
    let wanted: Vec<(&str, &str)> = labels
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) => (key, value),
            None => (
                label.as_str(),
                proxy.labels.get(label).map_or("", String::as_str),
            ),
        })
        .collect();
    let count = wanted.len() as u32;
    let network_first = wanted
        .first()
        .is_some_and(|(key, _)| *key == "topology.istio.io/network");
    let mut out = Vec::new();
    for place in places {
        let mut split: BTreeMap<u32, LocalityLbEndpoints> = BTreeMap::new();
        for (endpoint, labels) in place.lb.lb_endpoints.iter().zip(&place.labels) {
            let mut rank = 0;
            for (j, (key, value)) in wanted.iter().enumerate() {
                if labels.get(*key).map_or("", String::as_str) == *value {
                    continue;
                }
                if j == 0 && network_first {
                    rank += count;
                    continue;
                }
                rank += count - j as u32;
                break;
            }
            let part = split.entry(rank).or_insert_with(|| LocalityLbEndpoints {
                lb_endpoints: Vec::new(),
                load_balancing_weight: Some(0),
                priority: rank,
                ..place.lb.clone()
            });
            part.load_balancing_weight = Some(
                part.load_balancing_weight
                    .unwrap_or(0)
                    .saturating_add(endpoint.load_balancing_weight.unwrap_or(1)),
            );
            part.lb_endpoints.push(endpoint.clone());
        }
        out.extend(split.into_values());
    }
    close_gaps(&mut out);
    out
}
