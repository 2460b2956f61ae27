//! Choice by hash: Envoy's ring (ketama) and Maglev tables, point for point.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use serde_json::Value;
use twox_hash::XxHash64;

use super::{host::Host, mt19937::Mt19937};
use crate::plan::{Cluster, lb::LbPolicy, metadata::LB};

/// A ring or a table over the hosts of one priority.
#[derive(Debug)]
pub(crate) struct HashTable {
    /// Each host with its share of the whole; shares add up to 1.
    hosts: Vec<(Arc<Host>, f64)>,
    form: Form,
    /// Entries of the host that has fewest and of the one that has most.
    pub(crate) entries_per_host: (u64, u64),
}

#[derive(Debug)]
enum Form {
    /// Points in ascending order, each with the index of its host.
    Ring(Vec<(u64, u32)>),
    /// Index of the host for each slot; small where 16 bits suffice.
    Maglev(Box<[u16]>),
    LargeMaglev(Box<[u32]>),
}

/// xxHash64 with seed 0, as Envoy.
pub fn xxh64(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

impl HashTable {
    /// The table that the cluster's policy asks for; `None` for policies without hash. Shares of the hosts add up to 1.
    pub(crate) fn new(plan: &Cluster, hosts: Vec<(Arc<Host>, f64)>) -> Option<Self> {
        let named = plan.lb.use_hostname_for_hashing;
        match plan.lb_policy {
            LbPolicy::RingHash {
                minimum_ring_size,
                maximum_ring_size,
                murmur,
            } => Some(ring(
                hosts,
                named,
                minimum_ring_size,
                maximum_ring_size,
                murmur,
            )),
            LbPolicy::Maglev { table_size } => Some(maglev(hosts, named, table_size)),
            _ => None,
        }
    }

    /// How many points or slots there are.
    pub(crate) fn size(&self) -> u64 {
        let size = match &self.form {
            Form::Ring(points) => points.len(),
            Form::Maglev(slots) => slots.len(),
            Form::LargeMaglev(slots) => slots.len(),
        };
        size as u64
    }

    /// The host for a hash; `attempt` moves on to others.
    pub(crate) fn choose(&self, hash: u64, attempt: u32) -> Option<&Arc<Host>> {
        Some(&self.hosts.get(self.index(hash, attempt)?)?.0)
    }

    /// Like [`HashTable::choose`], but no host takes more than `factor` percent of the average load: who is full hands
    /// over to others in an order that depends on the hash alone (arXiv 1608.01350, 1908.08762). `active` is the number
    /// of requests that all hosts have under way.
    pub(crate) fn choose_bounded(
        &self,
        hash: u64,
        attempt: u32,
        factor: u32,
        active: u64,
    ) -> Option<&Arc<Host>> {
        let slots = ((active + 1) * u64::from(factor)).div_ceil(100);
        let overload = |index: usize| {
            let (host, share) = &self.hosts[index];
            let own = (slots as f64 * share).ceil().max(1.0);
            host.shared.rq_active.load(Relaxed) as f64 / own
        };
        let first = self.index(hash, attempt)?;
        let mut least = (overload(first), first);
        if least.0 <= 1.0 {
            return Some(&self.hosts[first].0);
        }
        // Allocates only where the host is overloaded: the order is different for each hash.
        let mut order: Vec<u32> = (0..self.hosts.len() as u32).collect();
        let mut random = Mt19937::new(hash as u32);
        for at in 0..order.len() {
            let other = at + random.below((order.len() - at) as u32) as usize;
            order.swap(at, other);
            let index = order[at] as usize;
            if index == first {
                continue;
            }
            let load = overload(index);
            if load <= 1.0 {
                return Some(&self.hosts[index].0);
            }
            if load < least.0 {
                least = (load, index);
            }
        }
        Some(&self.hosts[least.1].0)
    }

    fn index(&self, hash: u64, attempt: u32) -> Option<usize> {
        let slot = |len: usize| {
            let hash = match attempt {
                0 => hash,
                // Most bits change, so that not all retries of one host meet the same other one.
                _ => hash ^ (u64::MAX - u64::from(attempt)).wrapping_add(1),
            };
            (hash % len.max(1) as u64) as usize
        };
        match &self.form {
            Form::Ring(points) => {
                let at = points.partition_point(|point| point.0 < hash);
                let at = if at == points.len() { 0 } else { at };
                let at = (at + attempt as usize) % points.len().max(1);
                points.get(at).map(|point| point.1 as usize)
            }
            Form::Maglev(slots) => slots.get(slot(slots.len())).map(|&at| at.into()),
            Form::LargeMaglev(slots) => slots.get(slot(slots.len())).map(|&at| at as usize),
        }
    }
}

/// What of a host is hashed: `hash_key` of its `envoy.lb` metadata, else its name or address.
fn key(host: &Host, named: bool) -> String {
    match host.metadata.lookup(LB, &["hash_key"]) {
        Some(Value::String(key)) if !key.is_empty() => key.clone(),
        _ if named && !host.hostname.is_empty() => host.hostname.to_string(),
        _ => host.address.to_string(),
    }
}

/// Each host gets points in proportion to its share; the host with the smallest gets whole points, so that the ring
/// has at least the minimum size where the maximum allows it.
fn ring(
    hosts: Vec<(Arc<Host>, f64)>,
    named: bool,
    minimum: u64,
    maximum: u64,
    murmur: bool,
) -> HashTable {
    let smallest = hosts.iter().map(|host| host.1).fold(1.0, f64::min);
    let scale = ((smallest * minimum as f64).ceil() / smallest).min(maximum as f64);
    let size = scale.ceil() as u64;
    let mut points = Vec::with_capacity(if hosts.is_empty() { 0 } else { size as usize });
    let (mut target, mut made) = (0.0, 0.0);
    let (mut fewest, mut most) = (size, 0);
    for (index, (host, share)) in hosts.iter().enumerate() {
        let mut text = key(host, named);
        text.push('_');
        let stem = text.len();
        target += scale * share;
        let mut number = 0;
        while made < target {
            text.truncate(stem);
            text.push_str(itoa::Buffer::new().format(number));
            let hash = match murmur {
                true => murmur2(text.as_bytes(), STD_HASH_SEED),
                false => xxh64(text.as_bytes()),
            };
            points.push((hash, index as u32));
            number += 1;
            made += 1.0;
        }
        fewest = fewest.min(number);
        most = most.max(number);
    }
    points.sort_unstable();
    HashTable {
        hosts,
        form: Form::Ring(points),
        entries_per_host: (fewest, most),
    }
}

/// Maglev (Eisenbud et al. 2016, 3.4): hosts take turns, by weight, to fill the next free slot of their permutation.
fn maglev(mut hosts: Vec<(Arc<Host>, f64)>, named: bool, size: u64) -> HashTable {
    struct Entry {
        offset: u64,
        skip: u64,
        next: u64,
        target: f64,
        count: u64,
    }
    // The order of the hosts decides about slots that several want, so it must not depend on the configuration's.
    hosts.sort_by_cached_key(|(host, _)| key(host, named));
    let largest = hosts.iter().map(|host| host.1).fold(0.0, f64::max);
    let mut entries: Vec<Entry> = hosts
        .iter()
        .map(|(host, _)| {
            let key = key(host, named);
            Entry {
                offset: xxh64(key.as_bytes()) % size,
                skip: XxHash64::oneshot(1, key.as_bytes()) % (size - 1) + 1,
                next: 0,
                target: 0.0,
                count: 0,
            }
        })
        .collect();
    let mut slots = vec![u32::MAX; if hosts.is_empty() { 0 } else { size as usize }];
    let mut left = slots.len();
    let mut turn = 1.0;
    while left > 0 {
        for (index, entry) in entries.iter_mut().enumerate() {
            if left == 0 {
                break;
            }
            if turn * hosts[index].1 < entry.target {
                continue;
            }
            entry.target += largest;
            let slot = loop {
                let slot = ((entry.offset + entry.skip * entry.next) % size) as usize;
                entry.next += 1;
                if slots[slot] == u32::MAX {
                    break slot;
                }
            };
            slots[slot] = index as u32;
            entry.count += 1;
            left -= 1;
        }
        turn += 1.0;
    }
    let counts = || entries.iter().map(|entry| entry.count);
    let entries_per_host = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
    let form = match hosts.len() {
        0..=0xffff => Form::Maglev(slots.iter().map(|&at| at as u16).collect()),
        _ => Form::LargeMaglev(slots.into()),
    };
    HashTable {
        hosts,
        form,
        entries_per_host,
    }
}

/// MurmurHash2 of 64 bits (MurmurHash64A by Austin Appleby), which is also GCC's `std::hash` for texts.
fn murmur2(bytes: &[u8], seed: u64) -> u64 {
    const MUL: u64 = 0xc6a4_a793_5bd1_e995;
    let mix = |value: u64| value ^ (value >> 47);
    let mut hash = seed ^ (bytes.len() as u64).wrapping_mul(MUL);
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let word = mix(u64::from_le_bytes(*word).wrapping_mul(MUL)).wrapping_mul(MUL);
        hash = (hash ^ word).wrapping_mul(MUL);
    }
    if !rest.is_empty() {
        let mut word = [0; 8];
        word[..rest.len()].copy_from_slice(rest);
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(MUL);
    }
    mix(mix(hash).wrapping_mul(MUL))
}

/// The seed that GCC's library takes, and Envoy with it.
const STD_HASH_SEED: u64 = 0xc70f_6907;

#[cfg(test)]
mod tests;
