//! DNS queries: whatever comes, an answer repeats the query's id, is one, and fits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use outrigger_agent::dns::{
    table::{Place, Table},
    wire::{Reply, reply},
};
use outrigger_proto::istio::networking::nds::v1::{NameTable, name_table::NameInfo};

fuzz_target!(|data: (bool, &[u8])| {
    let (over_tcp, query) = data;
    let info = NameInfo {
        ips: (0..40).map(|n| format!("10.0.0.{n}")).collect(),
        registry: "Kubernetes".into(),
        shortname: "a".into(),
        namespace: "b".into(),
        alt_hosts: vec!["*.c".into()],
    };
    let names = NameTable {
        table: [("a.b.svc.cluster.local".to_owned(), info)].into(),
        name_info: None,
    };
    let place = Place {
        namespace: "b".into(),
        search: vec!["b.svc.cluster.local".into()],
    };
    let table = Table::build(&names, &place);
    match reply(Some(&table), query, over_tcp) {
        Reply::Answer(answer) => {
            assert_eq!(answer[..2], query[..2]);
            assert_eq!(answer[2] & 0x80, 0x80);
            assert!(answer.len() <= usize::from(u16::MAX));
        }
        Reply::Forward { limit } => assert!(limit >= 512),
        Reply::Nothing => assert!(query.len() < 12 || query[2] & 0x80 != 0),
    }
});
