use std::sync::Arc;

use prost::Message;

use super::*;
use crate::{
    Resource, ResourceSet,
    server::{Event, Phase, Stream},
    type_url::{CDS, EDS, LDS, RDS},
};

fn node() -> Node {
    Node {
        id: "sidecar~10.0.0.1~a.b~b.svc.cluster.local".into(),
        ..Node::default()
    }
}

fn want(names: &[&str]) -> Want {
    Want::Names(names.iter().map(|n| (*n).to_owned()).collect())
}

fn next_delta(session: &mut Session) -> DeltaDiscoveryRequest {
    match session.next_request() {
        Some(Outgoing::Delta(r)) => r,
        other => panic!("{other:?}"),
    }
}

fn named(type_url: &str, name: &str) -> proto::envoy::service::discovery::v3::Resource {
    let mut value = vec![0x0a, name.len() as u8];
    value.extend(name.as_bytes());
    proto::envoy::service::discovery::v3::Resource {
        name: name.into(),
        version: "1".into(),
        resource: Some(Any {
            type_url: type_url.into(),
            value,
        }),
        ..Default::default()
    }
}

fn response(type_url: &str, names: &[&str], nonce: &str) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_url.into(),
        nonce: nonce.into(),
        resources: names.iter().map(|n| named(type_url, n)).collect(),
        ..Default::default()
    }
}

#[test]
fn the_node_goes_with_the_first_request_of_each_stream_only() {
    let mut session = Session::new(Mode::Delta, node());
    session.watch(CDS, Want::All);
    assert!(
        session.next_request().is_none(),
        "not before a stream is open"
    );
    for _ in 0..2 {
        session.connected();
        session.watch(LDS, Want::All);
        let first = next_delta(&mut session);
        assert_eq!((first.type_url.as_str(), first.node), (CDS, Some(node())));
        assert!(
            first.resource_names_subscribe.is_empty(),
            "wildcard by naming nothing"
        );
        let second = next_delta(&mut session);
        assert_eq!((second.type_url.as_str(), second.node), (LDS, None));
        assert!(session.next_request().is_none());
        session.disconnected();
    }
}

#[test]
fn answers_and_subscriptions_are_separate_messages() {
    let mut session = Session::new(Mode::Delta, node());
    session.connected();
    session.watch(CDS, Want::All);
    next_delta(&mut session);
    session.pause(EDS);
    let received = session.received_delta(response(CDS, &["a", "b"], "n1"));
    session.watch(EDS, want(&["a"]));
    session.watch(EDS, want(&["a", "b"]));
    session.answer(&received, &[]);
    session.resume(EDS);
    let ack = next_delta(&mut session);
    assert_eq!(
        (ack.type_url.as_str(), ack.response_nonce.as_str()),
        (CDS, "n1")
    );
    assert!(ack.resource_names_subscribe.is_empty() && ack.error_detail.is_none());
    let subscribe = next_delta(&mut session);
    assert_eq!(subscribe.resource_names_subscribe, ["a", "b"]);
    assert_eq!(subscribe.response_nonce, "");
    session.watch(EDS, want(&["b", "c"]));
    let change = next_delta(&mut session);
    assert_eq!(change.resource_names_subscribe, ["c"]);
    assert_eq!(change.resource_names_unsubscribe, ["a"]);
    assert!(session.next_request().is_none());
}

#[test]
fn a_rejected_resource_is_not_held_but_its_neighbours_are() {
    let mut session = Session::new(Mode::Delta, node());
    session.watch(CDS, Want::All);
    session.connected();
    next_delta(&mut session);
    let received = session.received_delta(response(CDS, &["good", "bad"], "n1"));
    session.answer(
        &received,
        &[("bad".into(), "connect_timeout: negative".into())],
    );
    let nack = next_delta(&mut session);
    assert_eq!(
        nack.error_detail.unwrap().message,
        "bad: connect_timeout: negative"
    );
    session.disconnected();
    session.connected();
    let again = next_delta(&mut session);
    assert_eq!(
        again
            .initial_resource_versions
            .into_keys()
            .collect::<Vec<_>>(),
        ["good"]
    );
}

#[test]
fn what_breaks_the_protocol_is_refused_by_itself() {
    let mut session = Session::new(Mode::Delta, node());
    session.watch(CDS, Want::All);
    session.connected();
    next_delta(&mut session);
    let long = "n".repeat(4097);
    let fine = "f".repeat(4096);
    let mut message = response(CDS, &["a", "twice", &long, "twice", &fine, "gone"], "n1");
    message.resources.push(named(LDS, "foreign"));
    message.removed_resources = vec!["gone".into(), "old".into()];
    let received = session.received_delta(message);
    assert_eq!(received.malformed, None);
    let taken: Vec<_> = received.resources.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(taken, ["a", &fine]);
    assert_eq!(received.removed, ["old"]);
    session.answer(&received, &[("a".into(), "no".into())]);
    let nack = next_delta(&mut session).error_detail.unwrap().message;
    let lines: Vec<&str> = nack.lines().collect();
    assert_eq!(
        lines,
        [
            "foreign: is a \"type.googleapis.com/envoy.config.listener.v3.Listener\" in a response of type \
             \"type.googleapis.com/envoy.config.cluster.v3.Cluster\"",
            "gone: is both sent and removed in one response",
            &format!(
                "{}…: the name has 4097 bytes; at most 4096 are taken",
                "n".repeat(100)
            ),
            "twice: duplicate resource name in one response",
            "a: no",
        ]
    );
    assert!(session.held(CDS, &fine).is_some());
    for name in ["a", "twice", "gone", "foreign"] {
        assert_eq!(session.held(CDS, name), None);
    }
    // A response of a type that nobody asked for has nothing that could be taken.
    let foreign = session.received_delta(response(EDS, &["e"], "n2"));
    assert!(foreign.malformed.is_some());
}

#[test]
fn a_rejection_is_short_enough_to_be_taken() {
    let mut session = Session::new(Mode::Delta, node());
    session.watch(CDS, Want::All);
    session.connected();
    next_delta(&mut session);
    let received = session.received_delta(response(CDS, &["a"], "n1"));
    let errors: Vec<_> = (0..10_000)
        .map(|i| (format!("c{i}"), "ä".repeat(100)))
        .collect();
    session.answer(&received, &errors);
    let told = next_delta(&mut session).error_detail.unwrap().message;
    assert!(told.len() < 300 << 10, "{}", told.len());
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines[0].starts_with("c0: ä"));
    assert_eq!(
        lines[lines.len() - 1],
        format!("and {} more", 10_000 - (lines.len() - 1))
    );
    let received = session.received_delta(response(CDS, &["a"], "n2"));
    session.answer(&received, &[("a".into(), "ä".repeat(1 << 20))]);
    let told = next_delta(&mut session).error_detail.unwrap().message;
    assert!(told.len() < 300 << 10 && told.ends_with('…'));
}

#[test]
fn a_name_that_came_twice_is_not_taken_for_one_that_is_gone() {
    let mut session = Session::new(Mode::Sotw, node());
    session.watch(CDS, Want::All);
    session.connected();
    session.next_request();
    let message = |nonce: &str, names: &[&str]| DiscoveryResponse {
        version_info: nonce.into(),
        type_url: CDS.into(),
        nonce: nonce.into(),
        resources: names
            .iter()
            .filter_map(|n| named(CDS, n).resource)
            .collect(),
        ..Default::default()
    };
    let received = session.received_sotw(message("n1", &["a", "b"]));
    session.answer(&received, &[]);
    let received = session.received_sotw(message("n2", &["a", "a", "b"]));
    assert_eq!(received.removed, Vec::<String>::new());
    assert_eq!(received.refused.len(), 1);
    assert_eq!(received.resources.len(), 1);
}

#[test]
fn sotw_keeps_the_old_version_when_it_rejects() {
    let mut session = Session::new(Mode::Sotw, node());
    session.watch(CDS, Want::All);
    session.connected();
    session.next_request();
    let message = |version: &str, nonce: &str, names: &[&str]| DiscoveryResponse {
        version_info: version.into(),
        type_url: CDS.into(),
        nonce: nonce.into(),
        resources: names
            .iter()
            .filter_map(|n| named(CDS, n).resource)
            .collect(),
        ..Default::default()
    };
    let received = session.received_sotw(message("1", "n1", &["a", "b"]));
    session.answer(&received, &[]);
    let Some(Outgoing::Sotw(ack)) = session.next_request() else {
        panic!()
    };
    assert_eq!(
        (ack.version_info.as_str(), ack.response_nonce.as_str()),
        ("1", "n1")
    );
    let received = session.received_sotw(message("2", "n2", &["b"]));
    assert_eq!(
        received.removed,
        ["a"],
        "what a whole listing leaves out is gone"
    );
    session.answer(&received, &[("b".into(), "no".into())]);
    let Some(Outgoing::Sotw(nack)) = session.next_request() else {
        panic!()
    };
    assert_eq!(
        (nack.version_info.as_str(), nack.response_nonce.as_str()),
        ("1", "n2")
    );
}

/// Both ends against each other: whatever the server's set becomes, the client comes to hold it.
#[test]
fn both_ends_agree_after_every_change() {
    for mode in [Mode::Delta, Mode::Sotw] {
        let mut server = Stream::new(mode);
        let mut client = Session::new(mode, node());
        client.watch(CDS, Want::All);
        client.watch(RDS, want(&["80", "90"]));
        client.connected();
        type Set = &'static [(&'static str, &'static str)];
        let steps: [(Set, Set); 4] = [
            (&[("a", "1"), ("b", "1")], &[("80", "1")]),
            (
                &[("a", "1"), ("b", "2"), ("c", "1")],
                &[("80", "2"), ("90", "1")],
            ),
            (&[("c", "1")], &[("80", "2"), ("90", "2")]),
            (&[], &[("80", "2"), ("90", "2")]),
        ];
        for (clusters, routes) in steps {
            let sets = [(CDS, build(CDS, clusters)), (RDS, build(RDS, routes))];
            exchange(&mut client, &mut server, &sets);
            for (type_url, set) in &sets {
                for phase in [Phase::Upserts, Phase::Removals] {
                    deliver(&mut client, server.update(type_url, set, "v", phase), mode);
                    exchange(&mut client, &mut server, &sets);
                }
                for resource in set.iter() {
                    let held = client.held(type_url, resource.name());
                    assert!(held.is_some(), "{mode:?} {type_url} {}", resource.name());
                }
            }
            for name in ["a", "b", "c"] {
                let exists = clusters.iter().any(|(n, _)| *n == name);
                assert_eq!(client.held(CDS, name).is_some(), exists, "{mode:?} {name}");
            }
        }
        assert!(
            server
                .status()
                .iter()
                .all(|s| s.sent == s.acked && s.rejected.is_none())
        );
    }
}

fn build(type_url: &str, entries: &[(&str, &str)]) -> Arc<ResourceSet> {
    let resources = entries.iter().map(|(name, content)| {
        let mut value = named(type_url, name).resource.unwrap().value;
        value.extend([0x12, content.len() as u8]);
        value.extend(content.as_bytes());
        Arc::new(Resource::new(*name, type_url, &value))
    });
    Arc::new(resources.collect())
}

/// Carries requests to the server and its answers back until both are silent.
fn exchange(client: &mut Session, server: &mut Stream, sets: &[(&str, Arc<ResourceSet>)]) {
    while let Some(request) = client.next_request() {
        let request = match request {
            Outgoing::Delta(r) => r.into(),
            Outgoing::Sotw(r) => r.into(),
        };
        if let Event::Respond { type_url, .. } = server.request(&request) {
            let set = &sets.iter().find(|(t, _)| *t == &*type_url).unwrap().1;
            let mode = server.mode();
            deliver(client, server.update(&type_url, set, "v", Phase::All), mode);
        }
    }
}

fn deliver(client: &mut Session, response: Option<crate::server::Response>, mode: Mode) {
    let Some(response) = response else { return };
    let mut bytes = Vec::new();
    response.encode(&mut bytes);
    let received = match mode {
        Mode::Delta => client.received_delta(Message::decode(&*bytes).unwrap()),
        Mode::Sotw => client.received_sotw(Message::decode(&*bytes).unwrap()),
    };
    client.answer(&received, &[]);
}
