use hickory_proto::op::Query;
use proto::istio::networking::nds::v1::{NameTable, name_table::NameInfo};

use super::*;
use crate::dns::table::Place;

fn table(many: usize) -> Table {
    let info = |ips: Vec<String>| NameInfo {
        ips,
        registry: "Kubernetes".into(),
        shortname: "db".into(),
        namespace: "a".into(),
        alt_hosts: Vec::new(),
    };
    let ips = (0..many)
        .map(|n| format!("10.1.{}.{}", n / 250, n % 250))
        .collect();
    let names = NameTable {
        table: [("db.a.svc.cluster.local".to_owned(), info(ips))].into(),
        name_info: None,
    };
    let place = Place {
        namespace: "a".into(),
        search: vec!["a.svc.cluster.local".into()],
    };
    Table::build(&names, &place)
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::new(0xabcd, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    query
}

fn ask(table: &Table, query: &Message, over_tcp: bool) -> (Vec<u8>, Message) {
    match reply(Some(table), &query.to_vec().unwrap(), over_tcp) {
        Reply::Answer(bytes) => {
            let message = Message::from_vec(&bytes).unwrap();
            (bytes, message)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_name_of_the_mesh_is_answered_in_the_case_it_was_asked() {
    let (_, answer) = ask(&table(1), &query("DB.a.", RecordType::A), false);
    assert_eq!(answer.metadata.id, 0xabcd);
    assert!(answer.metadata.recursion_desired && answer.metadata.recursion_available);
    assert_eq!(answer.answers[0].to_string(), "DB.a. 30 IN A 10.1.0.0");
    // A family that the name lacks: it exists, and nobody else is asked.
    let (_, answer) = ask(&table(1), &query("db.a.", RecordType::AAAA), false);
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert!(answer.answers.is_empty());
    let (_, answer) = ask(
        &table(1),
        &query("db.a.a.svc.cluster.local.", RecordType::A),
        false,
    );
    assert_eq!(
        answer.answers[0].to_string(),
        "db.a.a.svc.cluster.local. 30 IN CNAME db.a."
    );
    assert_eq!(answer.answers[1].to_string(), "db.a. 30 IN A 10.1.0.0");
}

#[test]
fn other_names_and_types_go_on() {
    for q in [
        query("db.a.", RecordType::MX),
        query("example.com.", RecordType::A),
    ] {
        assert_eq!(
            reply(Some(&table(1)), &q.to_vec().unwrap(), false),
            Reply::Forward { limit: 512 }
        );
    }
    let mut q = query("example.com.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(1400);
    q.set_edns(edns);
    assert_eq!(
        reply(Some(&table(1)), &q.to_vec().unwrap(), false),
        Reply::Forward { limit: 1400 }
    );
}

#[test]
fn what_does_not_fit_is_cut_and_says_so() {
    let (bytes, answer) = ask(&table(100), &query("db.a.", RecordType::A), false);
    assert!(bytes.len() <= 512 && answer.metadata.truncation && answer.answers.len() > 10);
    let (_, whole) = ask(&table(100), &query("db.a.", RecordType::A), true);
    assert_eq!(
        (whole.answers.len(), whole.metadata.truncation),
        (100, false)
    );
    let mut q = query("db.a.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    q.set_edns(edns);
    let (_, answer) = ask(&table(100), &q, false);
    assert_eq!(answer.answers.len(), 100);
    assert_eq!(answer.edns.unwrap().max_payload(), PAYLOAD);
}

#[test]
fn before_the_first_table_nothing_is_known() {
    let q = query("db.a.", RecordType::A).to_vec().unwrap();
    let Reply::Answer(answer) = reply(None, &q, false) else {
        panic!()
    };
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn rubbish_gets_an_error_or_nothing() {
    let table = table(1);
    let good = query("db.a.", RecordType::A).to_vec().unwrap();
    for length in 0..good.len() {
        match reply(Some(&table), &good[..length], false) {
            Reply::Nothing => assert!(length < HEADER),
            Reply::Answer(a) => assert_eq!((&a[..2], a[3] & 0x0f), (&good[..2], 1)),
            other => panic!("{other:?}"),
        }
    }
    let mut two = good.clone();
    two[5] = 2;
    two.extend(&good[HEADER..].to_vec());
    let Reply::Answer(answer) = reply(Some(&table), &two, false) else {
        panic!()
    };
    assert_eq!(answer[3] & 0x0f, 1);
    let mut response = good.clone();
    response[2] |= 0x80;
    assert_eq!(reply(Some(&table), &response, false), Reply::Nothing);
    let mut update = good.clone();
    update[2] |= 5 << 3;
    let Reply::Answer(answer) = reply(Some(&table), &update, false) else {
        panic!()
    };
    assert_eq!(answer[3] & 0x0f, 4);
    // A name that points at itself.
    let mut pointing = good[..HEADER].to_vec();
    pointing.extend([0xc0, 12, 0, 1, 0, 1]);
    assert!(matches!(
        reply(Some(&table), &pointing, false),
        Reply::Answer(_)
    ));
}

#[test]
fn an_answer_must_repeat_the_question() {
    let asked = query("db.a.", RecordType::A).to_vec().unwrap();
    let answer = error(
        &query("DB.A.", RecordType::A).to_vec().unwrap(),
        ResponseCode::NXDomain,
    );
    assert!(answers(&answer, &asked));
    let other = error(
        &query("db.b.", RecordType::A).to_vec().unwrap(),
        ResponseCode::NXDomain,
    );
    assert!(!answers(&other, &asked));
    assert!(!answers(&asked, &asked) && !answers(&[0; 4], &asked));
}

/// Queries with bytes turned over, left out and repeated: an answer is always one, to that query, and fits.
#[test]
fn damaged_queries_never_break_anything() {
    let table = table(100);
    let mut q = query("db.a.", RecordType::A);
    q.set_edns(Edns::new());
    let good = q.to_vec().unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for _ in 0..5_000 {
        let mut bad = good.clone();
        for _ in 0..1 + random() % 4 {
            let at = random() % bad.len();
            match random() % 3 {
                0 => bad[at] = random() as u8,
                1 => bad.truncate(at.max(1)),
                _ => bad.extend_from_within(at..),
            }
        }
        match reply(Some(&table), &bad, false) {
            Reply::Answer(answer) => {
                assert_eq!(answer[..2], bad[..2]);
                assert!(answer[2] & 0x80 != 0 && answer.len() <= usize::from(u16::MAX));
            }
            Reply::Forward { limit } => assert!(limit >= 512),
            Reply::Nothing => assert!(bad.len() < HEADER || bad[2] & 0x80 != 0),
        }
        // And the same as an answer of a resolver.
        bad.resize(bad.len().max(HEADER), 0);
        let _ = answers(&bad, &good);
        assert!(relay(bad.clone(), &good, 512).len() <= 512 || bad.len() <= 512);
    }
}
