use prost::Message;
use proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};

use super::*;
use crate::type_url::{LDS, RDS};

fn set(type_url: &str, entries: &[(&str, &str)]) -> Arc<ResourceSet> {
    Arc::new(
        entries
            .iter()
            .map(|(name, content)| Arc::new(Resource::new(*name, type_url, content.as_bytes())))
            .collect(),
    )
}

fn delta(type_url: &str, nonce: &str, subscribe: &[&str], unsubscribe: &[&str]) -> Request {
    let list = |l: &[&str]| l.iter().map(|s| (*s).to_owned()).collect();
    Request {
        node: None,
        type_url: type_url.into(),
        nonce: nonce.into(),
        error: None,
        version: String::new(),
        names: Names::Delta {
            subscribe: list(subscribe),
            unsubscribe: list(unsubscribe),
            initial: Vec::new(),
        },
    }
}

fn sotw(type_url: &str, nonce: &str, names: &[&str]) -> Request {
    Request {
        names: Names::Sotw(names.iter().map(|s| (*s).to_owned()).collect()),
        ..delta(type_url, nonce, &[], &[])
    }
}

fn encoded(response: &Response) -> Vec<u8> {
    let mut out = Vec::new();
    response.encode(&mut out);
    assert_eq!(out.len(), response.encoded_len());
    out
}

/// Names sent, names removed.
fn sent(response: Option<Response>) -> (Vec<String>, Vec<String>) {
    let response =
        DeltaDiscoveryResponse::decode(&*encoded(&response.expect("a response"))).unwrap();
    (
        response.resources.into_iter().map(|r| r.name).collect(),
        response.removed_resources,
    )
}

fn sent_sotw(response: Option<Response>) -> Vec<Vec<u8>> {
    let response = DiscoveryResponse::decode(&*encoded(&response.expect("a response"))).unwrap();
    response.resources.into_iter().map(|r| r.value).collect()
}

fn respond(type_url: &str, first: bool) -> Event {
    Event::Respond {
        type_url: type_url.into(),
        first,
    }
}

#[test]
fn delta_sends_what_changed_and_names_what_is_gone() {
    let mut stream = Stream::new(Mode::Delta);
    assert_eq!(
        stream.request(&delta(CDS, "", &[], &[])),
        respond(CDS, true)
    );
    let one = set(CDS, &[("a", "1"), ("b", "1")]);
    let response = stream.update(CDS, &one, "v1", Phase::All).unwrap();
    let nonce = response.nonce.clone();
    assert_eq!(sent(Some(response)), (vec!["a".into(), "b".into()], vec![]));
    assert!(matches!(
        stream.request(&delta(CDS, &nonce, &[], &[])),
        Event::Ack { .. }
    ));
    assert!(
        stream
            .update(CDS, &set(CDS, &[("a", "1"), ("b", "1")]), "v2", Phase::All)
            .is_none()
    );
    let two = set(CDS, &[("a", "2"), ("c", "1")]);
    assert_eq!(
        sent(stream.update(CDS, &two, "v3", Phase::All)),
        (vec!["a".into(), "c".into()], vec!["b".into()])
    );
}

#[test]
fn removals_can_wait_until_the_upserts_of_all_types_are_out() {
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&delta(CDS, "", &[], &[]));
    stream.update(CDS, &set(CDS, &[("a", "1"), ("b", "1")]), "v1", Phase::All);
    let two = set(CDS, &[("a", "2")]);
    assert_eq!(
        sent(stream.update(CDS, &two, "v2", Phase::Upserts)),
        (vec!["a".into()], vec![])
    );
    assert_eq!(
        sent(stream.update(CDS, &two, "v2", Phase::Removals)),
        (vec![], vec!["b".into()])
    );
    assert!(stream.update(CDS, &two, "v2", Phase::Removals).is_none());

    let mut stream = Stream::new(Mode::Sotw);
    stream.request(&sotw(CDS, "", &[]));
    stream.update(CDS, &set(CDS, &[("a", "1"), ("b", "1")]), "v1", Phase::All);
    assert_eq!(
        sent_sotw(stream.update(CDS, &two, "v2", Phase::Upserts)),
        [b"2", b"1"]
    );
    assert_eq!(
        sent_sotw(stream.update(CDS, &two, "v2", Phase::Removals)),
        [b"2"]
    );
}

#[test]
fn a_resubscribed_name_is_sent_again_though_unchanged() {
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&delta(RDS, "", &["80", "90"], &[]));
    let routes = set(RDS, &[("70", "1"), ("80", "1"), ("90", "1")]);
    assert_eq!(
        sent(stream.update(RDS, &routes, "v1", Phase::All)).0,
        ["80", "90"]
    );
    assert_eq!(
        stream.request(&delta(RDS, "", &["80"], &[])),
        respond(RDS, false)
    );
    assert_eq!(
        sent(stream.update(RDS, &routes, "v1", Phase::All)).0,
        ["80"]
    );
    assert_eq!(
        stream.request(&delta(RDS, "", &[], &["80"])),
        Event::Ignored
    );
    let changed = set(RDS, &[("70", "1"), ("80", "2"), ("90", "2")]);
    assert_eq!(
        sent(stream.update(RDS, &changed, "v2", Phase::All)).0,
        ["90"]
    );
}

#[test]
fn a_name_that_does_not_exist_is_answered() {
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&delta(RDS, "", &["80", "none"], &[]));
    let routes = set(RDS, &[("80", "1")]);
    assert_eq!(
        sent(stream.update(RDS, &routes, "v1", Phase::All)),
        (vec!["80".into()], vec!["none".into()])
    );
    stream.request(&delta(EDS, "", &["nobody"], &[]));
    let response = stream.update(EDS, &set(EDS, &[]), "v1", Phase::All);
    assert_eq!(sent(response), (vec!["nobody".into()], vec![]));
}

#[test]
fn a_changed_cluster_makes_its_endpoints_due_again() {
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&delta(CDS, "", &[], &[]));
    stream.update(CDS, &set(CDS, &[("a", "1"), ("b", "1")]), "v1", Phase::All);
    stream.request(&delta(EDS, "", &["a", "b"], &[]));
    let endpoints = set(EDS, &[("a", "e"), ("b", "e")]);
    stream.update(EDS, &endpoints, "v1", Phase::All);
    stream.update(CDS, &set(CDS, &[("a", "2"), ("b", "1")]), "v2", Phase::All);
    assert_eq!(
        sent(stream.update(EDS, &endpoints, "v2", Phase::All)).0,
        ["a"]
    );
    assert!(stream.update(EDS, &endpoints, "v2", Phase::All).is_none());
}

#[test]
fn a_returning_client_is_spared_what_it_holds() {
    let clusters = set(CDS, &[("a", "1"), ("b", "1")]);
    let held = version_text(clusters.find("a").unwrap().version());
    let mut request = delta(CDS, "", &[], &[]);
    request.names = Names::Delta {
        subscribe: Vec::new(),
        unsubscribe: Vec::new(),
        initial: vec![
            ("a".into(), held),
            ("b".into(), "old".into()),
            ("gone".into(), "x".into()),
        ],
    };
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&request);
    assert_eq!(
        sent(stream.update(CDS, &clusters, "v1", Phase::All)),
        (vec!["b".into()], vec!["gone".into()])
    );
}

#[test]
fn a_rejection_is_remembered_until_something_is_accepted() {
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&delta(LDS, "", &[], &[]));
    let nonce = stream
        .update(LDS, &set(LDS, &[("l", "1")]), "v1", Phase::All)
        .unwrap()
        .nonce;
    let mut nack = delta(LDS, &nonce, &[], &[]);
    nack.error = Some("bad".into());
    assert_eq!(
        stream.request(&nack),
        Event::Nack {
            type_url: LDS.into(),
            nonce: nonce.to_string(),
            message: "bad".into()
        }
    );
    assert_eq!(
        stream.status()[0].rejected,
        Some((nonce.to_string(), "bad".into()))
    );
    let nonce = stream
        .update(LDS, &set(LDS, &[("l", "2")]), "v2", Phase::All)
        .unwrap()
        .nonce;
    stream.request(&delta(LDS, &nonce, &[], &[]));
    assert_eq!(stream.status()[0].rejected, None);
    assert_eq!(stream.status()[0].acked, *nonce);
}

#[test]
fn sotw_answers_only_what_was_added_and_ignores_what_is_stale() {
    let mut stream = Stream::new(Mode::Sotw);
    assert_eq!(stream.request(&sotw(RDS, "", &["80"])), respond(RDS, true));
    let routes = set(RDS, &[("80", "r80"), ("90", "r90")]);
    let nonce = stream.update(RDS, &routes, "v1", Phase::All).unwrap().nonce;
    assert_eq!(
        stream.request(&sotw(RDS, "other", &["80", "90"])),
        Event::Ignored
    );
    assert!(matches!(
        stream.request(&sotw(RDS, &nonce, &["80"])),
        Event::Ack { .. }
    ));
    assert_eq!(
        stream.request(&sotw(RDS, &nonce, &["80", "90"])),
        respond(RDS, false)
    );
    assert_eq!(
        sent_sotw(stream.update(RDS, &routes, "v1", Phase::All)),
        [b"r90"]
    );
    let nonce = stream.status()[0].sent.clone();
    assert!(matches!(
        stream.request(&sotw(RDS, &nonce, &[])),
        Event::Ack { .. }
    ));
    assert!(!stream.watches(RDS), "no names ends the subscription");
}

#[test]
fn sotw_with_a_nonce_of_another_server_starts_anew() {
    let mut stream = Stream::new(Mode::Sotw);
    assert_eq!(
        stream.request(&sotw(CDS, "from-elsewhere", &[])),
        respond(CDS, true)
    );
    assert_eq!(
        sent_sotw(stream.update(CDS, &set(CDS, &[("a", "1")]), "v1", Phase::All)),
        [b"1"]
    );
}

#[test]
fn a_client_of_the_same_view_keeps_no_names_of_its_own() {
    let mut stream = Stream::new(Mode::Delta);
    stream.request(&delta(EDS, "", &["a"], &[]));
    let endpoints = set(EDS, &[("a", "1")]);
    stream.update(EDS, &endpoints, "v1", Phase::All);
    let name = stream.names(EDS).next().unwrap();
    assert!(Arc::ptr_eq(name, endpoints.find("a").unwrap().name()));
}
