//! Choice by hash: Envoy's ring (ketama) and Maglev tables.

use std::{hash::Hasher, sync::Arc};

use twox_hash::XxHash64;

use super::host::Host;
use crate::plan::{Cluster, cluster::LbPolicy};

/// A ring or a table over the hosts of one list.
#[derive(Debug)]
pub(crate) enum HashTable {
    /// Points in ascending order, each with the index of its host.
    Ring(Vec<(u64, u32)>),
    /// Index of the host for each slot.
    Maglev(Vec<u32>),
}

/// xxHash64 with seed 0, as Envoy.
pub fn xxh64(bytes: &[u8]) -> u64 {
    xxh64_seeded(bytes, 0)
}

fn xxh64_seeded(bytes: &[u8], seed: u64) -> u64 {
    let mut hasher = XxHash64::with_seed(seed);
    hasher.write(bytes);
    hasher.finish()
}

impl HashTable {
    /// The table that the cluster's policy asks for; `None` for policies without hash.
    pub(crate) fn new(plan: &Cluster, hosts: &[Arc<Host>]) -> Option<Self> {
        let key = |host: &Host| {
            if plan.lb.use_hostname_for_hashing && !host.hostname.is_empty() {
                host.hostname.to_string()
            } else {
                host.address.to_string()
            }
        };
        match plan.lb_policy {
            LbPolicy::RingHash {
                minimum_ring_size,
                maximum_ring_size,
                ..
            } => Some(ring(hosts, key, minimum_ring_size, maximum_ring_size)),
            LbPolicy::Maglev { table_size } => Some(maglev(hosts, key, table_size)),
            _ => None,
        }
    }

    /// The index of the host for a hash; `attempt` moves on to others.
    pub(crate) fn choose(&self, hash: u64, attempt: u32) -> Option<usize> {
        match self {
            Self::Ring(points) => {
                let at = points.partition_point(|point| point.0 < hash);
                let at = (at + attempt as usize) % points.len().max(1);
                points.get(at).map(|point| point.1 as usize)
            }
            Self::Maglev(slots) => {
                let hash = if attempt == 0 {
                    hash
                } else {
                    xxh64_seeded(&hash.to_le_bytes(), u64::from(attempt))
                };
                let at = (hash % slots.len().max(1) as u64) as usize;
                slots.get(at).map(|&index| index as usize)
            }
        }
    }
}

/// Each host gets points in proportion to its weight; the host with the smallest weight gets whole points, so that the
/// ring has at least the minimum size where the maximum allows it.
fn ring(
    hosts: &[Arc<Host>],
    key: impl Fn(&Host) -> String,
    minimum: u64,
    maximum: u64,
) -> HashTable {
    let total: f64 = hosts.iter().map(|host| f64::from(host.weight)).sum();
    let smallest = hosts
        .iter()
        .map(|host| f64::from(host.weight) / total)
        .fold(1.0, f64::min);
    let scale = ((smallest * minimum as f64).ceil() / smallest).min(maximum as f64);
    let mut points = Vec::with_capacity(scale.ceil() as usize);
    let (mut target, mut made) = (0.0, 0.0);
    for (index, host) in hosts.iter().enumerate() {
        let key = key(host);
        target += scale * f64::from(host.weight) / total;
        let mut number = 0;
        while made < target {
            points.push((xxh64(format!("{key}_{number}").as_bytes()), index as u32));
            number += 1;
            made += 1.0;
        }
    }
    points.sort_unstable();
    HashTable::Ring(points)
}

/// Maglev (Eisenbud et al. 2016, 3.4): hosts take turns, by weight, to fill the next free slot of their permutation.
fn maglev(hosts: &[Arc<Host>], key: impl Fn(&Host) -> String, size: u64) -> HashTable {
    struct Entry {
        offset: u64,
        skip: u64,
        next: u64,
        weight: f64,
        target: f64,
    }
    let heaviest = hosts.iter().map(|host| host.weight).max().unwrap_or(1);
    let mut entries: Vec<Entry> = hosts
        .iter()
        .map(|host| {
            let key = key(host);
            Entry {
                offset: xxh64(key.as_bytes()) % size,
                skip: xxh64_seeded(key.as_bytes(), 1) % (size - 1) + 1,
                next: 0,
                weight: f64::from(host.weight) / f64::from(heaviest),
                target: 0.0,
            }
        })
        .collect();
    let mut slots = vec![u32::MAX; size as usize];
    let mut filled = 0;
    let mut turn = 1.0;
    while filled < size && !entries.is_empty() {
        for (index, entry) in entries.iter_mut().enumerate() {
            if turn * entry.weight < entry.target {
                continue;
            }
            entry.target += 1.0;
            let mut slot;
            loop {
                slot = ((entry.offset + entry.skip * entry.next) % size) as usize;
                entry.next += 1;
                if slots[slot] == u32::MAX {
                    break;
                }
            }
            slots[slot] = index as u32;
            filled += 1;
            if filled == size {
                break;
            }
        }
        turn += 1.0;
    }
    if entries.is_empty() {
        slots.clear();
    }
    HashTable::Maglev(slots)
}
