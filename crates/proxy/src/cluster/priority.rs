//! How much traffic each priority takes: Envoy's arithmetic, in whole percent and with its rounding.

/// What is known about the hosts of one priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Census {
    /// Every host.
    pub(crate) hosts: u64,
    /// Hosts that count for nothing (not checked yet).
    pub(crate) excluded: u64,
    pub(crate) healthy: u64,
    pub(crate) degraded: u64,
    /// How much the hosts that are left count for, in percent. Envoy's default: 140.
    pub(crate) overprovisioning: u64,
    /// The same by weight, where health is a share of the weight; `None` where each host counts alike.
    pub(crate) weights: Option<Weights>,
}

/// Sums of weights; excluded hosts are not in `total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Weights {
    pub(crate) total: u64,
    pub(crate) healthy: u64,
    pub(crate) degraded: u64,
}

/// What one priority takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Share of the traffic in percent that goes to its healthy hosts.
    pub(crate) healthy: u32,
    /// Share that goes to degraded ones.
    pub(crate) degraded: u32,
    /// Health is ignored: all its hosts are used, or none where the cluster says so.
    pub(crate) panic: bool,
}

impl Census {
    /// Healthy and degraded share times the overprovisioning factor, each at most 100.
    fn availability(&self) -> (u32, u32) {
        let weights = self.weights.unwrap_or(Weights {
            total: self.counted(),
            healthy: self.healthy,
            degraded: self.degraded,
        });
        if self.counted() == 0 || weights.total == 0 {
            return (0, 0);
        }
        let share = |part: u64| (self.overprovisioning * part / weights.total).min(100) as u32;
        (share(weights.healthy), share(weights.degraded))
    }

    fn counted(&self) -> u64 {
        self.hosts - self.excluded
    }

    /// Whether fewer hosts are usable than the threshold (percent) wants.
    pub(crate) fn in_panic(&self, threshold: u32) -> bool {
        let percent = match self.counted() {
            0 => 0.0,
            counted => {
                let part = |n: u64| 100.0 * n as f64 / counted as f64;
                part(self.healthy) + part(self.degraded)
            }
        };
        percent < f64::from(threshold)
    }
}

/// The load of each priority. The shares of all add up to 100, unless there is no priority.
pub(crate) fn loads(levels: &[Census], panic_threshold: u32) -> Vec<Load> {
    let available: Vec<_> = levels.iter().map(Census::availability).collect();
    let total = available
        .iter()
        .map(|(healthy, degraded)| healthy + degraded)
        .sum::<u32>()
        .min(100);
    let mut loads = vec![Load::default(); levels.len()];
    if loads.is_empty() {
        return loads;
    }
    if total > 0 {
        spread(&mut loads, &available, total);
    }
    let threshold = panic_threshold.min(100);
    if threshold == 0 && total == 0 {
        // Nobody is healthy and that must not be ignored: the request fails at the first priority.
        loads[0].healthy = 100;
        return loads;
    }
    for (load, census) in loads.iter_mut().zip(levels) {
        load.panic = total < 100 && census.in_panic(threshold);
    }
    if loads.iter().all(|load| load.panic) {
        by_number_of_hosts(&mut loads, levels);
    }
    loads
}

/// Healthy hosts first, in order of priority; what they cannot take goes to degraded ones.
fn spread(loads: &mut [Load], available: &[(u32, u32)], total: u32) {
    let mut left = 100;
    for (load, (healthy, _)) in loads.iter_mut().zip(available) {
        load.healthy = (healthy * 100 / total).min(left);
        left -= load.healthy;
    }
    for (load, (_, degraded)) in loads.iter_mut().zip(available) {
        load.degraded = (degraded * 100 / total).min(left);
        left -= load.degraded;
    }
    // What rounding left over goes to the first priority that has any such host.
    if let Some(at) = available.iter().position(|(healthy, _)| *healthy > 0) {
        loads[at].healthy += left;
    } else if let Some(at) = available.iter().position(|(_, degraded)| *degraded > 0) {
        loads[at].degraded += left;
    }
}

/// Every priority panics: each takes its share of all hosts, whatever their health.
fn by_number_of_hosts(loads: &mut [Load], levels: &[Census]) {
    let all: u64 = levels.iter().map(|census| census.hosts).sum();
    let mut left = 100;
    for (load, census) in loads.iter_mut().zip(levels) {
        load.healthy = (100 * census.hosts).checked_div(all).unwrap_or(0) as u32;
        load.degraded = 0;
        left -= load.healthy;
    }
    let first = levels.iter().position(|census| census.hosts > 0);
    loads[first.unwrap_or(0)].healthy += left;
}

/// The priority that a number leads to, and whether its degraded hosts are meant.
pub(crate) fn choose(
    loads: impl Iterator<Item = Load> + Clone,
    number: u64,
) -> Option<(usize, bool)> {
    let mut percent = (number % 100) as u32;
    for degraded in [false, true] {
        for (at, load) in loads.clone().enumerate() {
            let share = if degraded {
                load.degraded
            } else {
                load.healthy
            };
            if percent < share {
                return Some((at, degraded));
            }
            percent -= share;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn census(hosts: u64, healthy: u64, degraded: u64) -> Census {
        Census {
            hosts,
            healthy,
            degraded,
            overprovisioning: 140,
            ..Census::default()
        }
    }

    fn shares(levels: &[Census], panic: u32) -> Vec<(u32, u32, bool)> {
        loads(levels, panic)
            .iter()
            .map(|load| (load.healthy, load.degraded, load.panic))
            .collect()
    }

    #[test]
    fn lower_priorities_take_what_is_missing() {
        // Healthy percent of two priorities, and what they take.
        for (first, second, want) in [
            (100, 100, (100, 0)),
            (72, 100, (100, 0)),
            (71, 100, (99, 1)),
            (50, 100, (70, 30)),
            (25, 100, (35, 65)),
            (0, 100, (0, 100)),
            (25, 25, (50, 50)),
            (5, 65, (8, 92)),
        ] {
            let found = shares(&[census(100, first, 0), census(100, second, 0)], 0);
            assert_eq!((found[0].0, found[1].0), want, "{first} {second}");
        }
    }

    #[test]
    fn degraded_hosts_help_out() {
        // 10/20/10 healthy and 20/10/0 degraded availability (given as such: factor 100).
        let levels = [census(10, 1, 2), census(10, 2, 1), census(10, 1, 0)].map(|census| Census {
            overprovisioning: 100,
            ..census
        });
        let found: Vec<_> = loads(&levels, 0)
            .iter()
            .map(|load| (load.healthy, load.degraded))
            .collect();
        assert_eq!(found, [(16, 28), (28, 14), (14, 0)]);
    }

    #[test]
    fn panic_needs_a_lack_of_healthy_hosts_in_all_priorities() {
        let (bad, good) = (census(10, 1, 0), census(10, 10, 0));
        assert_eq!(shares(&[bad, good], 50), [(14, 0, false), (86, 0, false)]);
        // 14 + 14 < 100: both panic, and share by their number of hosts.
        assert_eq!(shares(&[bad, bad], 50), [(50, 0, true), (50, 0, true)]);
        assert_eq!(
            shares(&[census(30, 1, 0), census(10, 0, 0)], 50),
            [(75, 0, true), (25, 0, true)]
        );
        // Only the second is below the threshold of 20 %.
        assert_eq!(
            shares(&[census(10, 3, 0), census(10, 1, 0)], 20),
            [(75, 0, false), (25, 0, true)]
        );
        assert_eq!(shares(&[census(3, 0, 0)], 0), [(100, 0, false)]);
        assert_eq!(shares(&[census(0, 0, 0)], 50), [(100, 0, true)]);
    }

    #[test]
    fn weights_can_count_instead_of_numbers() {
        let mut level = census(2, 1, 0);
        level.weights = Some(Weights {
            total: 100,
            healthy: 10,
            degraded: 0,
        });
        assert_eq!(shares(&[level, census(1, 1, 0)], 0)[0].0, 14);
    }

    /// Walks over every one of the 100 parts of the traffic in turn.
    fn naive(levels: &[Census], factor: u64) -> Option<Vec<(u32, u32)>> {
        let of = |n: u64, hosts: u64| (0..100).filter(|p| (p + 1) * hosts <= factor * n).count();
        let healthy: Vec<_> = levels
            .iter()
            .map(|l| of(l.healthy, l.hosts.max(1)))
            .collect();
        let degraded: Vec<_> = levels
            .iter()
            .map(|l| of(l.degraded, l.hosts.max(1)))
            .collect();
        let total = (healthy.iter().sum::<usize>() + degraded.iter().sum::<usize>()).min(100);
        if total == 0 {
            return None;
        }
        let mut result = vec![(0, 0); levels.len()];
        let mut given = 0;
        for (which, list) in [(0, &healthy), (1, &degraded)] {
            for (at, part) in list.iter().enumerate() {
                for _ in 0..part * 100 / total {
                    if given < 100 {
                        given += 1;
                        match which {
                            0 => result[at].0 += 1,
                            _ => result[at].1 += 1,
                        }
                    }
                }
            }
        }
        let rest = 100 - given;
        match healthy.iter().position(|h| *h > 0) {
            Some(at) => result[at].0 += rest,
            None => result[degraded.iter().position(|d| *d > 0)?].1 += rest,
        }
        Some(result)
    }

    proptest! {
        #[test]
        fn the_shares_are_those_of_a_naive_model(
            levels in prop::collection::vec((1u64..40, 0u64..40, 0u64..40), 1..6),
            factor in 100u64..200,
        ) {
            let levels: Vec<_> = levels
                .into_iter()
                .map(|(hosts, healthy, degraded)| {
                    let healthy = healthy % (hosts + 1);
                    Census {
                        overprovisioning: factor,
                        ..census(hosts, healthy, degraded % (hosts - healthy + 1))
                    }
                })
                .collect();
            let found = loads(&levels, 0);
            prop_assert_eq!(found.iter().map(|l| l.healthy + l.degraded).sum::<u32>(), 100);
            if let Some(want) = naive(&levels, factor) {
                let found: Vec<_> = found.iter().map(|l| (l.healthy, l.degraded)).collect();
                prop_assert_eq!(found, want);
            }
        }

        #[test]
        fn every_number_leads_to_the_priority_that_has_it(
            levels in prop::collection::vec((1u64..9, 0u64..9, 0u64..9), 1..5),
            panic in 0u32..=100,
        ) {
            let levels: Vec<_> = levels
                .into_iter()
                .map(|(hosts, healthy, degraded)| {
                    let healthy = healthy % (hosts + 1);
                    census(hosts, healthy, degraded % (hosts - healthy + 1))
                })
                .collect();
            let loads = loads(&levels, panic);
            let mut counts = vec![(0, 0); loads.len()];
            for number in 0..100 {
                match choose(loads.iter().copied(), number) {
                    Some((at, false)) => counts[at].0 += 1,
                    Some((at, true)) => counts[at].1 += 1,
                    None => prop_assert!(false, "the shares add up to 100"),
                }
            }
            let want: Vec<_> = loads.iter().map(|l| (l.healthy, l.degraded)).collect();
            prop_assert_eq!(counts, want);
        }
    }
}
