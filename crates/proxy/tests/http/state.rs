//! Filter state of requests: who makes it, and what goes by it.

use super::support::{Mesh, OK, Origin, run};

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
