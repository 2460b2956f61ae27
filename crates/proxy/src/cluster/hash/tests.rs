//! Rings and tables against what a real Envoy chose, and their properties.

use super::*;
use crate::cluster::tests::{host, plan};

fn shares(weights: &[u32]) -> Vec<(Arc<Host>, f64)> {
    let sum: u32 = weights.iter().sum();
    let share =
        |(index, weight): (usize, &u32)| (host(index as u16), f64::from(*weight) / f64::from(sum));
    weights.iter().enumerate().map(share).collect()
}

#[test]
fn murmur_is_the_standard_library_s() {
    // `std::hash<std::string>` of libstdc++, 64 bits.
    for (text, want) in [
        ("", 6_142_509_188_972_423_790),
        ("a", 4_993_892_634_952_068_459),
        ("hello", 2_762_169_579_135_187_400),
    ] {
        assert_eq!(murmur2(text.as_bytes(), STD_HASH_SEED), want, "{text:?}");
    }
}

#[test]
fn xxhash_is_the_reference_s() {
    assert_eq!(xxh64(b""), 0xef46_db37_51d8_e999);
    assert_eq!(xxh64(b"a"), 0xd24e_c4f1_a98c_6e5b);
}

#[test]
fn a_ring_has_points_by_weight_and_at_least_its_minimum() {
    let size = |weights: &[u32], minimum, maximum| {
        let table = ring(shares(weights), false, minimum, maximum, false);
        (table.size(), table.entries_per_host)
    };
    assert_eq!(size(&[1, 1, 1], 1024, 8 << 20), (1026, (342, 342)));
    assert_eq!(size(&[1, 2], 6, 8 << 20), (6, (2, 4)));
    assert_eq!(size(&[1, 1, 1, 1], 4, 6), (4, (1, 1)));
    assert_eq!(size(&[1, 1, 1, 1], 6, 6), (6, (1, 2)));
    assert_eq!(size(&[], 1024, 8 << 20).0, 0);
}

#[test]
fn a_maglev_table_is_full_and_fair() {
    let table = maglev(shares(&[1, 1, 2]), false, 65_537);
    assert_eq!(table.size(), 65_537);
    let (least, most) = table.entries_per_host;
    assert!(
        least.abs_diff(16_384) <= 2 && most.abs_diff(32_768) <= 2,
        "{least} {most}"
    );
    assert!(maglev(Vec::new(), false, 17).choose(5, 0).is_none());
}

#[test]
fn a_metadata_key_is_hashed_in_place_of_the_address() {
    let with_key = |key: &str| {
        let mut host = Host::clone(&host(1));
        let value = serde_json::json!({ "hash_key": key });
        host.metadata = crate::plan::Metadata::new([(LB.to_owned(), value)].into());
        host.hostname = "name".into();
        host
    };
    assert_eq!(key(&with_key("k"), true), "k");
    assert_eq!(key(&with_key(""), true), "name");
    assert_eq!(key(&with_key(""), false), "10.0.0.1:1");
}

#[test]
fn a_full_host_hands_over_to_one_that_the_hash_says() {
    let hosts = shares(&[1, 1, 1, 1]);
    let table = ring(hosts.clone(), false, 1024, 8 << 20, false);
    let port = |host: &Arc<Host>| host.address.port();
    let choose = |hash, active| table.choose_bounded(hash, 0, 150, active).map(port);
    for hash in [1u64, 1 << 40, u64::MAX] {
        let first = table.choose(hash, 0).expect("it has hosts");
        assert_eq!(choose(hash, 0), Some(port(first)));
        // 9 requests and this one: (10 * 1.5 = 15) / 4, rounded up, is room for 4 on each host.
        first.shared.rq_active.store(4, Relaxed);
        assert_eq!(choose(hash, 9), Some(port(first)));
        first.shared.rq_active.store(5, Relaxed);
        let other = choose(hash, 9).expect("others have room");
        assert_ne!(Some(other), Some(port(first)));
        assert_eq!(choose(hash, 9), Some(other), "the same each time");
        // Where nobody has room the one that is least over it takes the request.
        hosts
            .iter()
            .for_each(|(host, _)| host.shared.rq_active.store(9, Relaxed));
        hosts[2].0.shared.rq_active.store(8, Relaxed);
        assert_eq!(choose(hash, 9), Some(port(&hosts[2].0)));
        hosts
            .iter()
            .for_each(|(host, _)| host.shared.rq_active.store(0, Relaxed));
    }
}

#[test]
fn policies_without_hash_have_no_table() {
    let random = plan("name: c\ntype: STATIC\nlb_policy: RANDOM");
    assert!(HashTable::new(random.plan(), shares(&[1])).is_none());
}

/// `envoy.json` was written by `tests/interop/hashing` with Envoy 1.40: clusters, and the host of each of 10,000 keys.
#[test]
fn choices_are_those_of_a_real_envoy() {
    use crate::cluster::{LbContext, tests::Bench};

    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        cluster: Value,
        chosen: String,
    }
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("envoy.json")).expect("the file is what was written");
    assert_eq!(cases.len(), 17);
    for case in cases {
        let bench = Bench::new(plan(&case.cluster.to_string()));
        let name = case.cluster["name"].as_str().expect("it has a name");
        let cluster = bench.clusters.find(name).expect("it is there");
        let mut wrong = 0;
        for (key, want) in case.chosen.bytes().enumerate() {
            let hash = Some(xxh64(format!("key {key}").as_bytes()));
            let context = LbContext {
                hash,
                ..LbContext::default()
            };
            let host = cluster.choose(&context).expect("it has hosts");
            let Some(std::net::IpAddr::V4(ip)) = host.address.ip() else {
                panic!("{}", host.address);
            };
            wrong += u32::from(ip.octets()[3] != want - b'0');
        }
        assert_eq!((wrong, case.chosen.len()), (0, 10_000), "{}", case.name);
    }
}
