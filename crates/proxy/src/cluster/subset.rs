//! Subsets of a cluster: hosts by the values of their `envoy.lb` metadata.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{BuildHasher, Hash, Hasher},
    sync::Arc,
};

use serde_json::Value;

use super::{
    host::{Arrangement, Host, HostSet, metadata_fits},
    stats::ClusterStats,
    view::{LocalityWeights, View},
};
use crate::plan::{
    Cluster,
    endpoint::Locality,
    lb::{SelectorFallback, SubsetFallback, SubsetLb, SubsetSelector},
    metadata::LB,
};

/// Values by key that name a subset.
type Criteria = BTreeMap<String, Value>;

/// The subsets of one set of hosts.
#[derive(Debug)]
pub(super) struct Subsets {
    plan: Arc<SubsetLb>,
    /// By the hash of their criteria: a request looks one up without building a key.
    by_criteria: HashMap<u64, Vec<Subset>, foldhash::fast::RandomState>,
    default: Option<View>,
    /// How often a second host fell into a subset that is to have one.
    duplicates: u64,
}

#[derive(Debug)]
struct Subset {
    criteria: Criteria,
    hosts: Hosts,
}

#[derive(Debug)]
enum Hosts {
    View(View),
    /// One host, whatever its health.
    Single(Arc<Host>),
}

/// A host, or the view to choose it from.
pub(super) enum Found<'a> {
    View(&'a View),
    Host(&'a Arc<Host>),
}

impl Subsets {
    pub(super) fn new(
        plan: &Cluster,
        subsets: &Arc<SubsetLb>,
        hosts: &[Arc<Host>],
        weights: Option<LocalityWeights<'_>>,
        arrangement: &Arrangement<'_>,
        set: &mut HostSet,
    ) -> Self {
        let mut members: Vec<(Criteria, bool, Vec<Arc<Host>>)> = Vec::new();
        let mut index: HashMap<Criteria, usize> = HashMap::new();
        let mut duplicates = 0;
        for host in hosts {
            for selector in &subsets.selectors {
                for criteria in values(selector, host, subsets.list_as_any) {
                    let at = *index.entry(criteria).or_insert_with_key(|criteria| {
                        let single = selector.single_host_per_subset;
                        members.push((criteria.clone(), single, Vec::new()));
                        members.len() - 1
                    });
                    let (_, single, of) = &mut members[at];
                    if *single && of.iter().any(|other| other.priority == host.priority) {
                        duplicates += 1;
                    } else if of.last().is_none_or(|last| !Arc::ptr_eq(last, host)) {
                        of.push(host.clone());
                    }
                }
            }
        }
        let mut view = |of: &[Arc<Host>]| {
            let scaled;
            let weights = match weights {
                Some(weights) if subsets.scale_locality_weight => {
                    scaled = scale(weights, hosts, of);
                    Some(&*scaled)
                }
                other => other,
            };
            View::new(plan, of, weights, arrangement, set)
        };
        let needs_default = subsets.fallback == SubsetFallback::DefaultSubset
            || subsets
                .selectors
                .iter()
                .any(|s| s.fallback == Some(SelectorFallback::DefaultSubset));
        let default = needs_default.then(|| {
            let fits = |host: &&Arc<Host>| {
                let metadata = host.metadata.namespace(LB);
                metadata_fits(metadata, &subsets.default_subset, subsets.list_as_any)
            };
            view(&hosts.iter().filter(fits).cloned().collect::<Vec<_>>())
        });
        let mut by_criteria = HashMap::<_, Vec<Subset>, foldhash::fast::RandomState>::default();
        for (criteria, single, of) in members {
            let hosts = match &*of {
                [first, ..] if single => Hosts::Single(
                    of.iter()
                        .min_by_key(|h| h.priority)
                        .unwrap_or(first)
                        .clone(),
                ),
                _ => Hosts::View(view(&of)),
            };
            let hash = hash_of(criteria.iter());
            let subset = Subset { criteria, hosts };
            by_criteria.entry(hash).or_default().push(subset);
        }
        Self {
            plan: subsets.clone(),
            by_criteria,
            default,
            duplicates,
        }
    }

    /// Counts that these subsets take the place of others in a worker, `None` where there were or will be none.
    pub(super) fn count(old: Option<&Self>, new: Option<&Self>, stats: &ClusterStats) {
        let all = |subsets: Option<&Self>| -> HashSet<Criteria> {
            let lists = subsets.into_iter().flat_map(|s| s.by_criteria.values());
            lists
                .flatten()
                .map(|subset| subset.criteria.clone())
                .collect()
        };
        if old.is_none() && new.is_none() {
            return;
        }
        let (before, after) = (all(old), all(new));
        let created = after.difference(&before).count() as u64;
        let removed = before.difference(&after).count() as u64;
        stats.lb_subsets_created().add(created);
        stats.lb_subsets_removed().add(removed);
        stats
            .lb_subsets_active()
            .add(created as i64 - removed as i64);
        let duplicates = |subsets: Option<&Self>| subsets.map_or(0, |s| s.duplicates as i64);
        stats
            .lb_subsets_single_host_per_subset_duplicate()
            .add(duplicates(new) - duplicates(old));
    }

    /// A host for what a route asks. `any` is the view of all hosts; `pick` chooses from a view.
    pub(super) fn choose(
        &self,
        wanted: Option<&Criteria>,
        any: &View,
        stats: &ClusterStats,
        pick: &dyn Fn(Found<'_>) -> Option<Arc<Host>>,
    ) -> Option<Arc<Host>> {
        let list = match wanted {
            Some(wanted) if self.plan.metadata_fallback_list => wanted.get(FALLBACK_LIST),
            _ => None,
        };
        let (Some(wanted), Some(list)) = (wanted, list) else {
            return self.once(wanted, any, stats, pick);
        };
        // Each entry of the list replaces keys of what the route asks, until one gives a host.
        let mut base = wanted.clone();
        base.remove(FALLBACK_LIST);
        let entries = list.as_array().map_or(&[][..], |list| list);
        if entries.is_empty() {
            return self.once(Some(&base), any, stats, pick);
        }
        entries.iter().find_map(|entry| {
            let mut wanted = base.clone();
            let members = entry.as_object().into_iter().flatten();
            wanted.extend(members.map(|(key, value)| (key.clone(), value.clone())));
            self.once(Some(&wanted), any, stats, pick)
        })
    }

    fn once(
        &self,
        wanted: Option<&Criteria>,
        any: &View,
        stats: &ClusterStats,
        pick: &dyn Fn(Found<'_>) -> Option<Arc<Host>>,
    ) -> Option<Arc<Host>> {
        let reduced = wanted.and_then(|wanted| self.without_redundant_keys(wanted));
        let asked = reduced.as_ref().or(wanted);
        if let Some(asked) = asked.filter(|asked| !asked.is_empty()) {
            if let Some(subset) = self.find(asked) {
                stats.lb_subsets_selected().inc();
                return match &subset.hosts {
                    Hosts::View(view) => pick(Found::View(view)),
                    Hosts::Single(host) => pick(Found::Host(host)),
                };
            }
            let selector = self
                .plan
                .selectors
                .iter()
                .find(|selector| selector.keys.iter().map(|k| &**k).eq(asked.keys()));
            match selector.and_then(|selector| selector.fallback.as_ref()) {
                None => {}
                Some(SelectorFallback::NoFallback) => return None,
                Some(SelectorFallback::AnyEndpoint) => return pick(Found::View(any)),
                Some(SelectorFallback::DefaultSubset) => {
                    return pick(Found::View(self.default.as_ref()?));
                }
                Some(SelectorFallback::KeysSubset(keys)) => {
                    // Fewer keys each time, so this ends.
                    let keep = |key: &String| keys.iter().any(|k| **k == *key);
                    let fewer: Criteria = asked
                        .iter()
                        .filter(|(key, _)| keep(key))
                        .map(|(key, value)| (key.clone(), value.clone()))
                        .collect();
                    return self.once(Some(&fewer), any, stats, pick);
                }
            }
        }
        let fallback = match self.plan.fallback {
            SubsetFallback::NoFallback => return None,
            SubsetFallback::AnyEndpoint => any,
            SubsetFallback::DefaultSubset => self.default.as_ref()?,
        };
        if let Some(host) = pick(Found::View(fallback)) {
            stats.lb_subsets_fallback().inc();
            return Some(host);
        }
        if !self.plan.panic_mode_any {
            return None;
        }
        pick(Found::View(any)).inspect(|_| stats.lb_subsets_fallback_panic().inc())
    }

    fn find(&self, wanted: &Criteria) -> Option<&Subset> {
        let candidates = self.by_criteria.get(&hash_of(wanted.iter()))?;
        candidates.iter().find(|subset| subset.criteria == *wanted)
    }

    /// What the first selector has of the wanted keys, where all its keys are wanted.
    fn without_redundant_keys(&self, wanted: &Criteria) -> Option<Criteria> {
        if !self.plan.allow_redundant_keys {
            return None;
        }
        let selector = self
            .plan
            .selectors
            .iter()
            .find(|s| s.keys.iter().all(|key| wanted.contains_key(&**key)))?;
        let member = |key: &Arc<str>| Some((key.to_string(), wanted.get(&**key)?.clone()));
        selector.keys.iter().map(member).collect()
    }
}

/// The criteria of a host for a selector: none where a key is missing, several where a list stands for its elements.
fn values(selector: &SubsetSelector, host: &Host, list_as_any: bool) -> Vec<Criteria> {
    let mut all = vec![Criteria::new()];
    for key in &selector.keys {
        let found = host.metadata.namespace(LB).and_then(|m| m.get(&**key));
        let choices = match found {
            None => return Vec::new(),
            Some(Value::Array(list)) if list_as_any => &**list,
            Some(one) => std::slice::from_ref(one),
        };
        all = all
            .iter()
            .flat_map(|criteria| {
                choices.iter().map(|value| {
                    let mut criteria = criteria.clone();
                    criteria.insert(key.to_string(), value.clone());
                    criteria
                })
            })
            .collect();
    }
    all
}

/// Weights shrink with the share of a locality's hosts that are in the subset.
fn scale(
    weights: LocalityWeights<'_>,
    all: &[Arc<Host>],
    subset: &[Arc<Host>],
) -> Vec<(u32, Arc<Locality>, u32)> {
    let count = |hosts: &[Arc<Host>], priority: u32, locality: &Arc<Locality>| {
        hosts
            .iter()
            .filter(|host| host.priority == priority && host.locality == *locality)
            .count()
    };
    weights
        .iter()
        .map(|(priority, locality, weight)| {
            let whole = count(all, *priority, locality);
            let part = count(subset, *priority, locality);
            let scaled = match whole {
                0 => 0.0,
                _ => (f64::from(*weight) * part as f64 / whole as f64).round(),
            };
            (*priority, locality.clone(), scaled as u32)
        })
        .collect()
}

fn hash_of<'a>(criteria: impl Iterator<Item = (&'a String, &'a Value)>) -> u64 {
    let mut hasher = foldhash::fast::FixedState::default().build_hasher();
    for (key, value) in criteria {
        key.hash(&mut hasher);
        value.hash(&mut hasher);
    }
    hasher.finish()
}

/// The key of a route's metadata with what to ask for instead, in order.
const FALLBACK_LIST: &str = "fallback_list";
