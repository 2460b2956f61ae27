//! Subsets, zones, hosts that requests name, aggregates, slow start and what drops from discovery.

use std::sync::atomic::Ordering::Relaxed;

use serde_json::json;

use super::{
    super::shared::{HealthFlag, now_ms},
    *,
};

fn wanted(value: Value) -> BTreeMap<String, Value> {
    value
        .as_object()
        .expect("criteria are an object")
        .clone()
        .into_iter()
        .collect()
}

fn labels(labels: &str) -> String {
    format!(", metadata: {{filter_metadata: {{envoy.lb: {labels}}}}}")
}

impl Bench {
    fn asked(&self, criteria: Value) -> Vec<u8> {
        let criteria = wanted(criteria);
        let context = LbContext {
            metadata_match: Some(&criteria),
            ..ANY
        };
        self.spread(60, &context).into_keys().collect()
    }
}

#[test]
fn subsets_are_found_by_metadata_and_fall_back_as_configured() {
    let hosts = |bench: &mut Bench| {
        let labels: Vec<_> = [
            "{version: v1, stage: prod}",
            "{version: v1, stage: test}",
            "{version: v2, stage: prod}",
            "{stage: prod, id: 4}",
        ]
        .map(labels)
        .into();
        let hosts: Vec<_> = (1..=4).zip(labels.iter().map(String::as_str)).collect();
        bench.assign(&group("priority: 0", &hosts));
    };
    let selectors = "subset_selectors: [{keys: [version]}, {keys: [stage, version]}, \
        {keys: [id], fallback_policy: ANY_ENDPOINT}, {keys: [a], fallback_policy: NO_FALLBACK}, \
        {keys: [stage, zz], fallback_policy: KEYS_SUBSET, fallback_keys_subset: [stage]}, {keys: [stage]}]";
    let with = |more: &str| {
        let mut bench = Bench::new(eds(&format!("lb_subset_config: {{{selectors}, {more}}}")));
        hosts(&mut bench);
        bench
    };
    let bench = with("fallback_policy: DEFAULT_SUBSET, default_subset: {stage: test}");
    assert_eq!(bench.asked(json!({"version": "v1"})), [1, 2]);
    assert_eq!(bench.asked(json!({"version": "v1", "stage": "prod"})), [1]);
    assert_eq!(bench.asked(json!({"id": 4})), [4]);
    assert_eq!(
        bench.asked(json!({"version": "v3"})),
        [2],
        "the default subset"
    );
    assert_eq!(bench.asked(json!({"id": 9})), [1, 2, 3, 4]);
    assert_eq!(bench.asked(json!({"a": 1})), [0u8; 0]);
    assert_eq!(bench.asked(json!({"stage": "prod", "zz": 1})), [1, 3, 4]);
    assert_eq!(bench.asked(json!({"unknown": 1})), [2]);
    assert_eq!(
        bench.spread(9, &ANY),
        BTreeMap::from([(2, 9)]),
        "no route asks"
    );
    assert_eq!(bench.store.number("cluster.c.lb_subsets_active"), 8);
    assert!(bench.store.number("cluster.c.lb_subsets_fallback") > 0);
    assert!(bench.store.number("cluster.c.lb_subsets_selected") > 0);
    let none = with("fallback_policy: NO_FALLBACK");
    assert_eq!(none.asked(json!({"version": "v3"})), [0u8; 0]);
    assert_eq!(none.spread(9, &ANY), BTreeMap::new());
    let panic = with(
        "fallback_policy: DEFAULT_SUBSET, default_subset: {stage: none}, panic_mode_any: true",
    );
    assert_eq!(panic.asked(json!({"version": "v3"})), [1, 2, 3, 4]);
    assert_eq!(
        panic.store.number("cluster.c.lb_subsets_fallback_panic"),
        60
    );
}

#[test]
fn a_list_can_stand_for_its_elements_and_a_subset_for_one_host() {
    let config = "lb_subset_config: {list_as_any: true, subset_selectors: \
        [{keys: [v]}, {keys: [id], single_host_per_subset: true}]}";
    let mut bench = Bench::new(eds(config));
    let first = labels("{v: [1, 2], id: 7}");
    let second = labels("{v: 2, id: 7}") + ", health_status: UNHEALTHY";
    let third = labels("{v: [], id: 8}") + ", health_status: UNHEALTHY";
    bench.assign(&group(
        "priority: 0",
        &[(1, &first), (2, &second), (3, &third), (4, "")],
    ));
    assert_eq!(bench.asked(json!({"v": 1})), [1]);
    assert_eq!(bench.asked(json!({"v": 3})), [0u8; 0]);
    assert_eq!(bench.asked(json!({"id": 7})), [1]);
    assert_eq!(bench.asked(json!({"id": 8})), [3], "whatever its health");
    let duplicate = "cluster.c.lb_subsets_single_host_per_subset_duplicate";
    assert_eq!(bench.store.number(duplicate), 1);
}

#[test]
fn redundant_keys_and_lists_of_fallbacks_are_the_typed_and_the_old_form_s() {
    let typed = "load_balancing_policy: {policies: [{typed_extension_config: {name: s, typed_config: \
        {\"@type\": type.googleapis.com/envoy.extensions.load_balancing_policies.subset.v3.Subset, \
        allow_redundant_keys: true, subset_selectors: [{keys: [v]}], subset_lb_policy: {policies: \
        [{typed_extension_config: {name: r, typed_config: \
        {\"@type\": type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin}}}]}}}}]}";
    let mut bench = Bench::new(eds(typed));
    let (one, two) = (labels("{v: 1}"), labels("{v: 2}"));
    let hosts = group("priority: 0", &[(1, &one), (2, &two)]);
    bench.assign(&hosts);
    assert_eq!(bench.asked(json!({"v": 2, "other": 5})), [2]);
    let old = "lb_subset_config: {metadata_fallback_policy: FALLBACK_LIST, subset_selectors: [{keys: [v]}]}";
    let mut bench = Bench::new(eds(old));
    bench.assign(&hosts);
    let list = json!({"v": 9, "fallback_list": [{"v": 7}, {"v": 2}, {"v": 1}]});
    assert_eq!(bench.asked(list), [2]);
    assert_eq!(bench.asked(json!({"v": 1, "fallback_list": []})), [1]);
}

#[test]
fn weights_of_localities_count_in_subsets_only_where_they_are_to() {
    let near = "locality: {zone: a}\n  load_balancing_weight: 90";
    let far = "locality: {zone: b}\n  load_balancing_weight: 10";
    let (in_it, not) = (labels("{v: 1}"), labels("{v: 2}"));
    let share_of_far = |more: &str| {
        let config = format!(
            "common_lb_config: {{locality_weighted_lb_config: {{}}}}\nlb_policy: ROUND_ROBIN\n\
             lb_subset_config: {{subset_selectors: [{{keys: [v]}}]{more}}}"
        );
        let mut bench = Bench::new(eds(&config));
        let near = group(near, &[(1, &in_it), (2, &not), (3, &not)]);
        bench.assign(&(near + &group(far, &[(4, &in_it)])));
        let criteria = wanted(json!({"v": 1}));
        let context = LbContext {
            metadata_match: Some(&criteria),
            ..ANY
        };
        bench.spread(4000, &context)[&4]
    };
    assert!(share_of_far("").abs_diff(2000) <= 2);
    assert!(share_of_far(", locality_weight_aware: true").abs_diff(400) <= 2);
    // One of three near hosts is in the subset: 30 against 10.
    let scaled = share_of_far(", locality_weight_aware: true, scale_locality_weight: true");
    assert!(scaled.abs_diff(1000) <= 2, "{scaled}");
}

#[test]
fn requests_stay_in_the_own_zone_as_far_as_its_hosts_carry_them() {
    let zone = |name: &str| format!("locality: {{zone: {name}}}");
    let mut bench = Bench::new(plan(
        "name: c\ntype: EDS\neds_cluster_config: {eds_config: {ads: {}}}\nlb_policy: ROUND_ROBIN\n\
         common_lb_config: {zone_aware_lb_config: {min_cluster_size: 2}}",
    ));
    let own = crate::plan::endpoint::Locality {
        zone: "a".to_owned(),
        ..Default::default()
    };
    bench.registry.set_local("local".into(), own);
    let local = |zones: &[&str]| {
        let groups = zones.iter().enumerate().map(|(at, zone)| {
            format!(
                "{{locality: {{zone: {zone}}}, lb_endpoints: [{{endpoint: {{address: {{socket_address: \
                 {{address: 10.9.0.{at}, port_value: 1}}}}}}}}]}}"
            )
        });
        let groups: Vec<_> = groups.collect();
        plan(&format!(
            "name: local\ntype: STATIC\nload_assignment: {{cluster_name: local, endpoints: [{}]}}",
            groups.join(", ")
        ))
    };
    let even = local(&["a", "b"]);
    let changes = bench.registry.upsert(even, Instant::now());
    bench.tell(changes);
    bench.assign(&(group(&zone("a"), &[(1, "")]) + &group(&zone("b"), &[(2, "")])));
    assert_eq!(bench.spread(50, &ANY), BTreeMap::from([(1, 50)]));
    assert_eq!(
        bench.store.number("cluster.c.lb_zone_routing_all_directly"),
        50
    );
    // A quarter of the hosts for half of the traffic: half of it goes to the other zone.
    let far = group(&zone("b"), &[(2, ""), (3, ""), (4, "")]);
    bench.assign(&(group(&zone("a"), &[(1, "")]) + &far));
    let spread = bench.spread(3000, &ANY);
    assert!((1350..1650).contains(&spread[&1]), "{spread:?}");
    assert!(bench.store.number("cluster.c.lb_zone_routing_cross_zone") > 1000);
    // Where the proxies are elsewhere, too, it is another sum: one of four in zone a.
    let changes = bench
        .registry
        .upsert(local(&["a", "b", "b", "b"]), Instant::now());
    bench.tell(changes);
    assert_eq!(bench.spread(50, &ANY), BTreeMap::from([(1, 50)]));
    // No proxy in this zone: the numbers cannot be right.
    let changes = bench.registry.upsert(local(&["b", "c"]), Instant::now());
    bench.tell(changes);
    assert_eq!(bench.spread(40, &ANY).len(), 4);
    assert!(bench.store.number("cluster.c.lb_local_cluster_not_ok") > 0);
}

#[test]
fn a_session_s_host_comes_first_if_its_health_is_allowed() {
    let mut bench = Bench::new(eds(
        "common_lb_config: {override_host_status: {statuses: [HEALTHY, UNKNOWN, DRAINING]}}",
    ));
    let hosts = [
        (1, ""),
        (2, ", health_status: DRAINING"),
        (3, ", health_status: UNHEALTHY"),
    ];
    bench.assign(&group("priority: 0", &hosts));
    let choose = |address: &str, strict| {
        let override_host = Some(OverrideHost { address, strict });
        let context = LbContext {
            override_host,
            ..ANY
        };
        bench.spread(20, &context).into_keys().collect::<Vec<_>>()
    };
    assert_eq!(
        choose("10.0.0.2:80", false),
        [2],
        "an old session of it may end there"
    );
    assert_eq!(choose("10.0.0.3:80", true), [0u8; 0]);
    assert_eq!(choose("10.0.0.9:80", true), [0u8; 0]);
    // A third of the hosts is healthy: panic, any host.
    assert_eq!(choose("10.0.0.9:80", false).len(), 3);
    assert_eq!(choose("no address", false).len(), 3);
}

#[test]
fn a_request_names_its_hosts_for_each_attempt() {
    let mut bench = Bench::new(eds(""));
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    let named = ["10.0.0.9:80", "10.0.0.2:80", "10.0.0.1:80"]
        .map(|address| address.parse().expect("it is an address"));
    let choose = |attempt| {
        let context = LbContext {
            preferred: (&named, attempt),
            ..ANY
        };
        bench.spread(40, &context).into_keys().collect::<Vec<_>>()
    };
    assert_eq!(
        (choose(0), choose(1), choose(2)),
        (vec![2], vec![1], vec![1, 2])
    );
}

#[test]
fn an_aggregate_goes_to_its_first_healthy_cluster() {
    let of = |name: &str, hosts: &str| {
        plan(&format!(
            "name: {name}\ntype: STATIC\ncommon_lb_config: {{healthy_panic_threshold: {{value: 0}}}}\nload_assignment: \
             {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{hosts}]}}]}}"
        ))
    };
    let host = |number: u8, more: &str| {
        format!(
            "{{endpoint: {{address: {{socket_address: {{address: 10.0.0.{number}, port_value: 80}}}}}}{more}}}"
        )
    };
    let down = ", health_status: UNHEALTHY";
    let mut bench = Bench::new(plan(
        "name: c\nlb_policy: CLUSTER_PROVIDED\ncluster_type: {name: envoy.clusters.aggregate, typed_config: \
         {\"@type\": type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig, \
         clusters: [first, missing, second]}}",
    ));
    assert_eq!(
        bench.cluster().plan.name.as_ref(),
        "c",
        "none of its clusters exists"
    );
    assert!(bench.cluster().choose(&ANY).is_err());
    let mut with = |plan| {
        let changes = bench.registry.upsert(plan, Instant::now());
        bench.tell(changes);
        (0..500).fold(BTreeMap::new(), |mut chosen, _| {
            let name = bench.cluster().plan.name.to_string();
            *chosen.entry(name).or_insert(0) += 1;
            chosen
        })
    };
    with(of("second", &host(9, "")));
    let all = with(of("first", &[host(1, ""), host(2, "")].join(",")));
    assert_eq!(all, BTreeMap::from([("first".to_owned(), 500)]));
    // One of two: 70 %.
    let some = with(of("first", &[host(1, ""), host(2, down)].join(",")));
    assert!((300..400).contains(&some["first"]), "{some:?}");
    let none = with(of("first", &host(1, down)));
    assert_eq!(none, BTreeMap::from([("second".to_owned(), 500)]));
}

#[test]
fn new_hosts_start_slowly() {
    for policy in ["ROUND_ROBIN", "LEAST_REQUEST"] {
        let mut bench = Bench::new(eds(&format!(
            "lb_policy: {policy}\n{}_lb_config: {{slow_start_config: {{slow_start_window: 0.010s}}}}",
            policy.to_lowercase()
        )));
        bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
        let hosts = bench.cluster().hosts().hosts().to_vec();
        // One is older than the window, the other will not be for an hour.
        while now_ms() < 20 {
            std::thread::yield_now();
        }
        hosts[0].shared.healthy_since.store(1, Relaxed);
        let later = now_ms() + 3_600_000;
        hosts[1].shared.healthy_since.store(later, Relaxed);
        bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
        let spread = bench.spread(1100, &ANY);
        assert!(
            spread[&2].abs_diff(100) <= 2,
            "a tenth of a whole share: {spread:?}"
        );
    }
}

#[test]
fn a_degraded_host_serves_by_hash_where_no_other_is_left() {
    let mut bench = Bench::new(eds("lb_policy: RING_HASH"));
    bench.assign(&group("priority: 0", &[(1, ", health_status: DEGRADED")]));
    assert_eq!(bench.spread(10, &ANY), BTreeMap::from([(1, 10)]));
}

#[test]
fn hosts_that_discovery_forgets_stay_while_checks_find_them_healthy() {
    let check = "health_checks: [{timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, \
        tcp_health_check: {}}]";
    let mut bench = Bench::new(eds(check));
    let number = |bench: &Bench| bench.cluster().hosts().hosts().len();
    bench.assign(&group("priority: 0", &[(1, ""), (2, "")]));
    let hosts = bench.cluster().hosts().hosts().to_vec();
    assert!(
        hosts.iter().all(|host| !host.is_healthy()),
        "not checked yet"
    );
    hosts[0].shared.set_flag(HealthFlag::FailedActiveHc, false);
    bench.assign(&group("priority: 0", &[(3, "")]));
    assert_eq!(number(&bench), 2, "the healthy one stays, the other goes");
    assert!(hosts[0].shared.flag(HealthFlag::PendingDynamicRemoval));
    hosts[0].shared.set_flag(HealthFlag::FailedActiveHc, true);
    let changes = bench.registry.health_changed("c", &[hosts[0].shared.id]);
    bench.tell(changes);
    assert_eq!(number(&bench), 1);
    // With the switch they go at once.
    let mut bench = Bench::new(eds(&format!(
        "{check}\nignore_health_on_host_removal: true"
    )));
    bench.assign(&group("priority: 0", &[(1, "")]));
    let host = bench.cluster().hosts().hosts()[0].clone();
    host.shared.set_flag(HealthFlag::FailedActiveHc, false);
    bench.assign(&group("priority: 0", &[(3, "")]));
    assert_eq!(number(&bench), 1);
}

#[test]
fn what_is_not_checked_yet_can_count_for_nothing() {
    let check = "health_checks: [{timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, \
        tcp_health_check: {}}]\ncommon_lb_config: {ignore_new_hosts_until_first_hc: true}";
    let mut bench = Bench::new(eds(check));
    bench.assign(&group("priority: 0", &[(1, "")]));
    let first = bench.cluster().hosts().hosts()[0].clone();
    for flag in [HealthFlag::FailedActiveHc, HealthFlag::PendingActiveHc] {
        first.shared.set_flag(flag, false);
    }
    bench.assign(&group("priority: 0", &[(1, ""), (2, ""), (3, ""), (4, "")]));
    assert_eq!(
        bench.spread(10, &ANY),
        BTreeMap::from([(1, 10)]),
        "one of one, not of four"
    );
    assert_eq!(bench.cluster().hosts().excluded(), 3);
}

#[test]
fn a_share_of_requests_is_dropped() {
    let mut bench = Bench::new(eds(""));
    let policy = "policy: {drop_overloads: [{category: x, drop_percentage: {numerator: 25}}]}";
    let text = format!("{}{policy}", group("priority: 0", &[(1, "")]));
    bench.assign(&text);
    let dropped = (0..4000).filter(|_| bench.cluster().drops()).count();
    assert!((850..1150).contains(&dropped), "{dropped}");
    let counted = bench.store.number("cluster.c.upstream_rq_drop_overload");
    assert_eq!(counted, dropped as i64);
}

#[test]
fn endpoints_get_stale() {
    let mut bench = Bench::new(eds(""));
    let policy = "policy: {endpoint_stale_after: 5s}";
    let text = format!("{}{policy}", group("priority: 0", &[(1, "")]));
    let (first, second) = (assignment(&text), assignment(&text));
    for one in [&first, &second] {
        let changes = bench.registry.assign(one.clone());
        bench.tell(changes);
    }
    assert!(
        bench.registry.stale(&first).is_empty(),
        "another one has come"
    );
    let changes = bench.registry.stale(&second);
    bench.tell(changes);
    assert_eq!(bench.cluster().hosts().hosts().len(), 0);
}

#[test]
fn random_takes_every_host_alike_whatever_it_has_to_do() {
    let hosts: Vec<_> = (1..=3).map(|number| (number, "")).collect();
    let mut bench = Bench::new(eds("lb_policy: RANDOM"));
    bench.assign(&group("priority: 0", &hosts));
    let busy = bench.cluster().hosts().hosts()[0].clone();
    busy.shared.rq_active.store(1000, Relaxed);
    let spread = bench.spread(3000, &ANY);
    assert_eq!(spread.len(), 3);
    for (host, times) in spread {
        assert!((850..1150).contains(&times), "{host}: {times}");
    }
}

#[test]
fn least_request_compares_as_many_hosts_as_it_is_told() {
    // One host of eight is idle. Two draws find it in 15 of 64 cases, forty in nearly all.
    let hosts: Vec<_> = (1..=8).map(|number| (number, "")).collect();
    for (choices, range) in [("", 380..560), ("choice_count: 40", 1950..2001)] {
        let policy = format!("lb_policy: LEAST_REQUEST\nleast_request_lb_config: {{{choices}}}");
        let mut bench = Bench::new(eds(&policy));
        bench.assign(&group("priority: 0", &hosts));
        for host in &bench.cluster().hosts().hosts()[1..] {
            host.shared.rq_active.store(5, Relaxed);
        }
        let spread = bench.spread(2000, &ANY);
        assert!(range.contains(&spread[&1]), "{choices}: {spread:?}");
    }
}
