//! Distributions: buckets of two decimal digits, as Envoy's.
//!
//! Within a decade there are 90 buckets (1.0, 1.1 … 9.9), so a quantile is at most 10 % off and small whole numbers are
//! exact. A decade takes memory when a value falls into it.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering::Relaxed},
};

/// The quantiles that Envoy prints, in percent.
pub const QUANTILES: [f64; 10] = [0.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 100.0];

/// Envoy's upper bounds for Prometheus.
pub(crate) const BOUNDS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

const PER_DECADE: usize = 90;
const DECADES: usize = 20;

/// One thread's share of a histogram.
#[derive(Debug, Default)]
pub(crate) struct Buckets {
    zeros: AtomicU64,
    sum: AtomicU64,
    decades: [OnceLock<Box<[AtomicU64; PER_DECADE]>>; DECADES],
}

impl Buckets {
    /// Only the owner of the handle calls this, so a load and a store do.
    pub(crate) fn record(&self, value: u64) {
        self.sum
            .store(self.sum.load(Relaxed).wrapping_add(value), Relaxed);
        let cell = if value == 0 {
            &self.zeros
        } else {
            let decade = value.ilog10() as usize;
            let digits = if decade == 0 {
                value * 10
            } else {
                value / 10u64.pow(decade as u32 - 1)
            };
            let buckets = self.decades[decade]
                .get_or_init(|| Box::new([const { AtomicU64::new(0) }; PER_DECADE]));
            &buckets[digits as usize - 10]
        };
        cell.store(cell.load(Relaxed) + 1, Relaxed);
    }

    pub(crate) fn add_to(&self, total: &mut Distribution) {
        total.sum = total.sum.wrapping_add(self.sum.load(Relaxed));
        total.add(0.0, 0.0, self.zeros.load(Relaxed));
        for (decade, buckets) in self.decades.iter().enumerate() {
            let Some(buckets) = buckets.get() else {
                continue;
            };
            let unit = 10f64.powi(decade as i32 - 1);
            for (index, count) in buckets.iter().enumerate() {
                total.add((index + 10) as f64 * unit, unit, count.load(Relaxed));
            }
        }
    }

    pub(crate) fn reset(&self) {
        self.sum.store(0, Relaxed);
        self.zeros.store(0, Relaxed);
        for count in self
            .decades
            .iter()
            .filter_map(OnceLock::get)
            .flat_map(|decade| decade.iter())
        {
            count.store(0, Relaxed);
        }
    }
}

/// What a histogram has seen, over all threads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Number of values.
    pub count: u64,
    /// Sum of values.
    pub sum: u64,
    /// Buckets that are not empty, ascending: lower edge, width, number of values.
    pub buckets: Vec<(f64, f64, u64)>,
}

impl Distribution {
    fn add(&mut self, lower: f64, width: f64, count: u64) {
        if count == 0 {
            return;
        }
        self.count += count;
        match self
            .buckets
            .binary_search_by(|bucket| bucket.0.total_cmp(&lower))
        {
            Ok(found) => self.buckets[found].2 += count,
            Err(place) => self.buckets.insert(place, (lower, width, count)),
        }
    }

    /// The value below which `percent` of the values lie, interpolated within its bucket; `None` without values.
    pub fn quantile(&self, percent: f64) -> Option<f64> {
        let wanted = percent / 100.0 * self.count as f64;
        let mut below = 0.0;
        for &(lower, width, count) in &self.buckets {
            let count = count as f64;
            if below + count >= wanted {
                return Some(lower + width * ((wanted - below) / count).clamp(0.0, 1.0));
            }
            below += count;
        }
        self.buckets.last().map(|&(lower, width, _)| lower + width)
    }

    /// How many values are at most `bound`.
    pub fn at_most(&self, bound: f64) -> u64 {
        self.buckets
            .iter()
            .take_while(|bucket| bucket.0 <= bound)
            .map(|bucket| bucket.2)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u64>) -> Distribution {
        let buckets = Buckets::default();
        values.into_iter().for_each(|value| buckets.record(value));
        let mut total = Distribution::default();
        buckets.add_to(&mut total);
        total
    }

    #[test]
    fn quantiles_are_within_a_tenth() {
        let all = of(1..=1000);
        assert_eq!((all.count, all.sum), (1000, 500_500));
        for percent in [25.0, 50.0, 90.0, 99.0] {
            let quantile = all.quantile(percent).expect("it has values");
            assert!(
                (quantile / (percent * 10.0) - 1.0).abs() < 0.1,
                "{percent}: {quantile}"
            );
        }
    }

    #[test]
    fn one_value_gives_envoys_figures() {
        let one = of([1]);
        assert_eq!(one.quantile(0.0), Some(1.0));
        assert!((one.quantile(50.0).expect("it has a value") - 1.05).abs() < 1e-9);
        assert_eq!(of([]).quantile(50.0), None);
    }

    #[test]
    fn bounds_count_what_is_at_most_that() {
        let some = of([0, 1, 2, 5, 6, 1000, u64::MAX]);
        assert_eq!(
            [0.5, 1.0, 5.0, 10.0, 1000.0].map(|bound| some.at_most(bound)),
            [1, 2, 4, 5, 6]
        );
        assert_eq!(some.count, 7);
    }
}
