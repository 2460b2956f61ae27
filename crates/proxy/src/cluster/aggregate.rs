//! Aggregate clusters: the priorities of several clusters one after the other, as if they were one.

use std::rc::Rc;

use super::{Cluster, Clusters, priority};
use crate::{plan::cluster::Discovery, worker::Random};

/// The cluster among those named that a request goes to; the aggregate itself, which has no host, where none exists.
///
/// Which of its own priorities the chosen cluster takes is its own affair: its healthy shares are the same there.
pub(super) fn choose(
    clusters: &Clusters,
    aggregate: &Rc<Cluster>,
    names: &[std::sync::Arc<str>],
    random: &Random,
) -> Option<Rc<Cluster>> {
    let mut all = Vec::new();
    gather(clusters, names, DEPTH, &mut all);
    let mut censuses = Vec::new();
    let mut owners = Vec::new();
    for (index, cluster) in all.iter().enumerate() {
        let hosts = cluster.hosts.borrow();
        for level in &hosts.all.levels {
            censuses.push(level.census);
            owners.push(index);
        }
    }
    let loads = priority::loads(&censuses, aggregate.plan.lb.panic_percent());
    let chosen = priority::choose(loads.iter().copied(), random.bits());
    let cluster = chosen.and_then(|(level, _)| all.get(owners[level]));
    Some(cluster.unwrap_or(aggregate).clone())
}

/// Those of the named clusters that exist, aggregates among them opened.
fn gather(
    clusters: &Clusters,
    names: &[std::sync::Arc<str>],
    depth: usize,
    all: &mut Vec<Rc<Cluster>>,
) {
    for cluster in names.iter().filter_map(|name| clusters.live(name)) {
        match &cluster.plan.discovery {
            Discovery::Aggregate(inner) if depth > 0 => gather(clusters, inner, depth - 1, all),
            // Deeper than anybody means it: a circle.
            Discovery::Aggregate(_) => {}
            _ => all.push(cluster),
        }
    }
}

/// How deep aggregates may stand in one another.
const DEPTH: usize = 4;
