//! Filter state of requests: who makes it, and what goes by it.

use std::sync::Arc;

use outrigger_proxy::{plan::Cluster, server::Change};
use proto::envoy::config;
use testkit::envoy::{hosts, message};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::support::{Mesh, OK, Origin, TO_A, run, within};

const SET: &str =
    "\"@type\": type.googleapis.com/envoy.extensions.filters.http.set_filter_state.v3.Config";

fn value(key: &str, factory: &str, text: &str) -> String {
    format!(
        "{{object_key: {key}, factory_key: \"{factory}\", skip_if_empty: true, format_string: {{omit_empty_values: true, text_format_source: {{inline_string: {text:?}}}}}}}"
    )
}

#[test]
fn objects_that_a_request_makes_choose_its_route_and_are_told() {
    run(async {
        let by_route = format!(
            "typed_per_filter_config: {{set: {{{SET}, on_request_headers: [{}, {}]}}}}",
            value("own", "envoy.string", "the route's"),
            value("fixed", "envoy.string", "the route's"),
        );
        let routes = format!(
            "          - match: {{prefix: /, filter_state: [{{key: kind, string_match: {{exact: gold}}}}]}}
            route: {{cluster: gold}}
            request_headers_to_add: [{{header: {{key: x-own, value: \"%FILTER_STATE(own:PLAIN)%\"}}}}, {{header: {{key: x-fixed, value: \"%FILTER_STATE(fixed:PLAIN)%\"}}}}, {{header: {{key: x-port, value: \"%FILTER_STATE(envoy.network.transport_socket.original_dst_address:FIELD:port)%\"}}}}]
            {by_route}
          - {{match: {{prefix: /}}, route: {{cluster: other}}}}"
        );
        // The route is chosen anew after the first filter; the second one then has what the route says.
        let filter = |name: &str, values: &str, more: &str| {
            format!(
                "      - {{name: {name}, typed_config: {{{SET}, on_request_headers: [{values}]{more}}}}}\n"
            )
        };
        let filters = [
            filter(
                "first",
                &value("kind", "envoy.string", "%REQ(x-kind)%"),
                ", clear_route_cache: true",
            ),
            filter(
                "set",
                &[
                    value("own", "envoy.string", "the filter's"),
                    value("fixed", "envoy.string", "%FILTER_STATE(kind:PLAIN)%")
                        .replace("skip_if_empty", "read_only: true, skip_if_empty"),
                    value(
                        "envoy.network.transport_socket.original_dst_address",
                        "",
                        "192.0.2.1:77",
                    ),
                ]
                .join(", "),
                "",
            ),
        ]
        .concat();
        let (gold, other) = (Origin::new(&[OK]).await, Origin::new(&[OK]).await);
        let clusters = [("gold", gold.port), ("other", other.port)];
        let mesh = Mesh::new(&routes, "", filters.trim_end(), &clusters).await;
        for kind in ["x-kind: gold", "x-kind: no"] {
            let answer = mesh
                .ask(&format!(
                    "GET / HTTP/1.1\r\nHost: h\r\n{kind}\r\nConnection: close\r\n\r\n"
                ))
                .await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        }
        let seen = gold.seen().concat();
        for header in ["x-own: the route's", "x-fixed: gold", "x-port: 77"] {
            assert!(seen.contains(&format!("{header}\r\n")), "{header}: {seen}");
        }
        assert_eq!(other.seen().len(), 1);
    });
}

/// A filter with these values.
fn sets(values: &[String]) -> String {
    let values = values.join(", ");
    format!("      - {{name: set, typed_config: {{{SET}, on_request_headers: [{values}]}}}}")
}

async fn add(mesh: &Mesh, yaml: &str) {
    let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(yaml));
    let change = Change::UpsertCluster(Arc::new(plan.unwrap().into()));
    for result in mesh.server.apply(vec![change]) {
        result.unwrap();
    }
    mesh.server.settled().await;
}

#[test]
fn objects_name_what_tls_asks_a_host_for() {
    run(async {
        let sink = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = sink.local_addr().unwrap().port();
        let filters = sets(&[
            value("envoy.network.upstream_server_name", "", "%REQ(x-name)%"),
            value("envoy.network.application_protocols", "", "some/1,other/2"),
        ]);
        let tls = "transport_socket: {name: tls, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext}}";
        let mesh = Mesh::with(TO_A, "", &filters, &[("a", port)], tls).await;
        let mut client = mesh.connect().await;
        let request = b"GET / HTTP/1.1\r\nHost: h\r\nX-Name: named.example\r\n\r\n";
        client.write_all(request).await.unwrap();
        let (mut stream, _) = within(sink.accept()).await.unwrap();
        let mut hello = vec![0; 5];
        within(stream.read_exact(&mut hello)).await.unwrap();
        hello.resize(u16::from_be_bytes([hello[3], hello[4]]).into(), 0);
        within(stream.read_exact(&mut hello)).await.unwrap();
        for wanted in [&b"\0\x0dnamed.example"[..], b"\x06some/1\x07other/2"] {
            assert!(hello.windows(wanted.len()).any(|at| at == wanted));
        }
    });
}

#[test]
fn an_object_names_the_original_destination() {
    run(async {
        let origin = Origin::new(&[OK]).await;
        let filters = sets(&[value(
            "envoy.network.transport_socket.original_dst_address",
            "",
            "%REQ(:AUTHORITY)%",
        )]);
        let mesh = Mesh::new(TO_A, "", &filters, &[]).await;
        let cluster = "name: a\ntype: ORIGINAL_DST\nlb_policy: CLUSTER_PROVIDED";
        add(&mesh, cluster).await;
        let ask = async |host: &str| {
            mesh.ask(&format!(
                "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            ))
            .await
        };
        let answer = ask(&format!("127.0.0.1:{}", origin.port)).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        // What is no address makes no object, and the connection was meant for nobody else.
        let answer = ask("somewhere").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    });
}

#[test]
fn only_objects_that_are_made_for_it_are_hashed() {
    run(async {
        for (factory, stays) in [("envoy.hashable_string", true), ("envoy.string", false)] {
            let origins = [
                Origin::new(&[OK; 40]).await,
                Origin::new(&[OK; 40]).await,
                Origin::new(&[OK; 40]).await,
            ];
            let filters = sets(&[value("who", factory, "%REQ(x-who)%")]);
            let routes = "          - {match: {prefix: /}, route: {cluster: a, hash_policy: [{filter_state: {key: who}}]}}";
            let mesh = Mesh::new(routes, "", &filters, &[]).await;
            let ports = origins.each_ref().map(|origin| origin.port);
            let cluster = format!(
                "name: a\ntype: STATIC\nlb_policy: RING_HASH\nload_assignment: {{cluster_name: a, endpoints: [{{lb_endpoints: [{}]}}]}}",
                hosts(&ports)
            );
            add(&mesh, &cluster).await;
            for _ in 0..30 {
                let request = "GET / HTTP/1.1\r\nHost: h\r\nX-Who: me\r\nConnection: close\r\n\r\n";
                let answer = mesh.ask(request).await;
                assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
            }
            let used = origins.iter().filter(|origin| !origin.seen().is_empty());
            assert_eq!(used.count() == 1, stays, "{factory}");
        }
    });
}
