//! Ejections step by step, with a clock of our own.

use proptest::prelude::*;

use super::*;
use crate::cluster::tests::host;

struct Bench {
    plan: OutlierDetection,
    hosts: Vec<Arc<Host>>,
    detector: Detector,
    now: Instant,
    random: Random,
}

impl Bench {
    fn new(count: u16, yaml: &str) -> Self {
        let plan = crate::cluster::tests::plan(&format!(
            "name: c\ntype: STATIC\noutlier_detection: {{{yaml}}}"
        ));
        Self {
            plan: plan.plan().outlier_detection.clone().expect("it is given"),
            hosts: (0..count).map(host).collect(),
            detector: Detector::default(),
            now: Instant::now(),
            random: Random::seeded(7),
        }
    }

    fn fail(&mut self, host: usize) -> Vec<EventKind> {
        let id = self.hosts[host].shared.id;
        let events = self.detector.failing(
            &self.plan,
            &self.hosts,
            id,
            Ejection::Consecutive5xx,
            self.now,
            &self.random,
        );
        events.iter().map(|event| event.kind).collect()
    }

    /// Lets whole seconds pass, with an interval ending at each tenth.
    fn pass(&mut self, seconds: u64) -> Vec<(u64, EventKind)> {
        let mut all = Vec::new();
        for second in 1..=seconds {
            self.now += Duration::from_secs(1);
            if second % 10 == 0 {
                let events = self
                    .detector
                    .tick(&self.plan, &self.hosts, self.now, &self.random);
                all.extend(events.iter().map(|event| (second, event.kind)));
            }
        }
        all
    }

    fn answer(&self, host: usize, good: u64, bad: u64) {
        let results = &self.hosts[host].shared.results;
        results.success.fetch_add(good, Relaxed);
        results.failure.fetch_add(bad, Relaxed);
    }

    fn aside(&self) -> Vec<usize> {
        let hosts = self.hosts.iter().enumerate();
        hosts
            .filter(|(_, host)| host.shared.ejected.load(Relaxed))
            .map(|(index, _)| index)
            .collect()
    }
}

const DETECTED: EventKind = EventKind::Detected(Ejection::Consecutive5xx);
const EJECTED: EventKind = EventKind::Ejected(Ejection::Consecutive5xx, true);

#[test]
fn each_ejection_lasts_longer_and_calm_makes_it_shorter_again() {
    let mut bench = Bench::new(10, "base_ejection_time: 30s, max_ejection_time: 80s");
    assert_eq!(bench.fail(0), [DETECTED, EJECTED]);
    assert_eq!(bench.fail(0), [], "it is aside already");
    assert_eq!(bench.pass(30), [(30, EventKind::Unejected)]);
    assert_eq!(bench.fail(0), [DETECTED, EJECTED]);
    assert_eq!(bench.pass(60), [(60, EventKind::Unejected)]);
    assert_eq!(bench.fail(0), [DETECTED, EJECTED]);
    // Three times the base, but no more than the maximum.
    assert_eq!(bench.pass(80), [(80, EventKind::Unejected)]);
    // Two intervals without ejection take two from the factor: 3 - 2 + 1 = 2.
    assert_eq!(bench.pass(20), []);
    assert_eq!(bench.fail(0), [DETECTED, EJECTED]);
    assert_eq!(bench.pass(60), [(60, EventKind::Unejected)]);
}

#[test]
fn only_so_many_are_put_aside() {
    let mut bench = Bench::new(5, "max_ejection_percent: 40");
    assert_eq!(bench.fail(0), [DETECTED, EJECTED]);
    assert_eq!(bench.fail(1), [DETECTED, EJECTED]);
    assert_eq!(bench.fail(2), [DETECTED, EventKind::Overflow]);
    assert_eq!(bench.aside(), [0, 1]);
    // The default of 10 % means nobody of five, unless one may go in any case.
    let mut bench = Bench::new(5, "");
    assert_eq!(bench.fail(0), [DETECTED, EventKind::Overflow]);
    let mut bench = Bench::new(5, "always_eject_one_host: true");
    assert_eq!(bench.fail(0), [DETECTED, EJECTED]);
    assert_eq!(bench.fail(1), [DETECTED, EventKind::Overflow]);
}

#[test]
fn what_is_not_enforced_is_only_told() {
    let mut bench = Bench::new(10, "enforcing_consecutive_5xx: 0");
    let not = EventKind::Ejected(Ejection::Consecutive5xx, false);
    assert_eq!(bench.fail(0), [DETECTED, not]);
    assert_eq!(bench.aside(), [0usize; 0]);
}

#[test]
fn a_host_far_below_the_others_success_rate_goes() {
    // The example of Envoy's documentation: rates 50, 100, 100, 100, 100 give mean 90, deviation 20, threshold 52.
    let found = ejection_threshold(&[50.0, 100.0, 100.0, 100.0, 100.0], 1.9);
    assert_eq!((found.average, found.threshold), (90.0, 52.0));
    let mut bench = Bench::new(5, "max_ejection_percent: 50");
    for host in 0..5 {
        let bad = if host == 3 { 50 } else { 0 };
        bench.answer(host, 100 - bad, bad);
    }
    let reason = Ejection::SuccessRate;
    assert_eq!(
        bench.pass(10),
        [
            (10, EventKind::Detected(reason)),
            (10, EventKind::Ejected(reason, true))
        ]
    );
    assert_eq!(bench.aside(), [3]);
    assert_eq!(bench.hosts[3].shared.success_rate(0), 50.0);
    assert_eq!(bench.detector.rates[0].threshold, 52.0);
    assert_eq!(bench.detector.rates[1], UNKNOWN);
    // Without requests in the next interval nothing is known.
    assert_eq!(bench.pass(10), []);
    assert_eq!(bench.hosts[0].shared.success_rate(0), -1.0);
}

#[test]
fn a_success_rate_needs_hosts_and_requests_enough() {
    let mut bench = Bench::new(4, "max_ejection_percent: 100");
    (0..4).for_each(|host| bench.answer(host, if host == 0 { 0 } else { 1000 }, 0));
    bench.answer(0, 0, 1000);
    assert_eq!(bench.pass(10), [], "four hosts are fewer than five");
    let mut bench = Bench::new(5, "max_ejection_percent: 100");
    (1..5).for_each(|host| bench.answer(host, 100, 0));
    bench.answer(0, 0, 49);
    assert_eq!(bench.pass(10), [], "only four hosts have 100 requests");
}

#[test]
fn a_failure_percentage_is_a_fixed_limit() {
    let config = "max_ejection_percent: 100, enforcing_failure_percentage: 100, enforcing_success_rate: 0, \
        failure_percentage_threshold: 30, failure_percentage_request_volume: 10, failure_percentage_minimum_hosts: 3";
    let mut bench = Bench::new(3, config);
    bench.answer(0, 7, 3);
    bench.answer(1, 71, 29);
    bench.answer(2, 0, 9);
    assert_eq!(bench.pass(10), [], "two hosts with enough requests");
    bench.answer(0, 7, 3);
    bench.answer(1, 71, 29);
    bench.answer(2, 0, 10);
    bench.pass(10);
    assert_eq!(bench.aside(), [0, 2]);
}

#[test]
fn an_early_return_begins_anew() {
    let mut bench = Bench::new(10, "");
    bench.fail(0);
    let host = bench.hosts[0].clone();
    host.shared.consecutive_gateway.store(3, Relaxed);
    let event = bench.detector.uneject(&host, bench.now);
    assert_eq!((event.kind, event.ejections), (EventKind::Unejected, 1));
    assert_eq!(host.shared.consecutive_gateway.load(Relaxed), 0);
    assert_eq!(bench.aside(), [0usize; 0]);
}

proptest! {
    #[test]
    fn never_more_are_aside_than_allowed(
        count in 1u16..40,
        percent in 0u32..=100,
        failing in prop::collection::vec(0usize..40, 0..100),
    ) {
        let mut bench = Bench::new(count, &format!("max_ejection_percent: {percent}"));
        for host in failing {
            bench.fail(host % usize::from(count));
            let aside = bench.aside().len();
            prop_assert!(aside * 100 <= percent as usize * usize::from(count));
        }
    }
}
