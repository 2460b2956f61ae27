//! Earliest deadline first: who has twice the weight comes twice as often, and evenly.

use std::{cmp::Ordering, collections::BinaryHeap};

use crate::worker::Random;

/// Entries `0..n` in the order of their turns.
#[derive(Debug, Default)]
pub(crate) struct Edf {
    heap: BinaryHeap<Entry>,
    now: f64,
    /// Of equal deadlines the one that was put back first comes first.
    order: u64,
}

#[derive(Debug, PartialEq)]
struct Entry {
    deadline: f64,
    order: u64,
    index: usize,
}

impl Eq for Entry {}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        // A heap has its greatest on top.
        other
            .deadline
            .total_cmp(&self.deadline)
            .then(other.order.cmp(&self.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Edf {
    /// Begins at a random place, so that workers do not all load the same host.
    pub(crate) fn new(count: usize, weight: impl Fn(usize) -> f64, random: &Random) -> Self {
        let heap = (0..count)
            .map(|index| {
                let part = random.below(1 << 20) as f64 / f64::from(1 << 20);
                Entry {
                    deadline: part / weight(index),
                    order: index as u64,
                    index,
                }
            })
            .collect();
        Self {
            heap,
            now: 0.0,
            order: count as u64,
        }
    }

    /// The next one; its weight of now decides when it comes again.
    pub(crate) fn pick(&mut self, weight: impl Fn(usize) -> f64) -> Option<usize> {
        // Changed in place: one sift instead of two.
        let mut top = self.heap.peek_mut()?;
        self.now = top.deadline;
        self.order += 1;
        top.deadline = self.now + 1.0 / weight(top.index);
        top.order = self.order;
        Some(top.index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nobody_gets_more_than_two_turns_too_many_or_too_few(
            weights in prop::collection::vec(1u32..50, 1..12),
            seed: u64,
        ) {
            let weight = |index: usize| f64::from(weights[index]);
            let mut edf = Edf::new(weights.len(), weight, &Random::seeded(seed));
            let total: u32 = weights.iter().sum();
            let mut counts = vec![0u32; weights.len()];
            for _ in 0..total * 3 {
                counts[edf.pick(weight).expect("it has entries")] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                prop_assert!(count.abs_diff(weight * 3) <= 2, "{:?} for {:?}", counts, weights);
            }
        }
    }
}
