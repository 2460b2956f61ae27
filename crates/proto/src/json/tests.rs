#[path = "../../../testkit/src/conformance.rs"]
mod finder;

use std::fs;

use prost_types::Any;
use serde_json::{Value, json};

use super::{from_value, from_yaml, to_value, to_yaml};
use crate::envoy::config::{bootstrap::v3::Bootstrap, cluster::v3::Cluster, core::v3::Node};

const TCP_PROXY: &str =
    "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";

#[test]
fn yaml_and_json_are_two_spellings_of_one_message() {
    let cluster: Cluster = from_yaml(
        "name: a\nconnect_timeout: 0.25s\ntype: STRICT_DNS\nlb_policy: 0\nmax_requests_per_connection: 5\n",
    )
    .unwrap();
    assert_eq!(
        to_value(&cluster),
        json!({"name": "a", "connectTimeout": "0.250s", "type": "STRICT_DNS", "maxRequestsPerConnection": 5})
    );
    assert_eq!(from_yaml::<Cluster>(&to_yaml(&cluster)).unwrap(), cluster);
}

#[test]
fn an_unknown_field_is_named_with_its_path_inside_an_any_too() {
    let bootstrap = json!({"static_resources": {"listeners": [{"filter_chains": [{"filters": [
        {"name": "x", "typed_config": {"@type": TCP_PROXY, "stat_prefix": "s", "clutser": "c"}}]}]}]}});
    let error = from_value::<Bootstrap>(&bootstrap).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.clutser: unknown field in \
             envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
        ),
        "{error}"
    );
}

#[test]
fn wrong_values_say_what_is_allowed() {
    for (value, want) in [
        (
            json!({"type": "NOPE"}),
            "type: unknown value \"NOPE\"; one of STATIC, STRICT_DNS",
        ),
        (
            json!({"connectTimeout": 3}),
            "connectTimeout: not a google.protobuf.Duration",
        ),
        (
            json!({"maxRequestsPerConnection": -1}),
            "maxRequestsPerConnection: not a google.protobuf.UInt32Value",
        ),
        (json!({"name": 7}), "name: expected text, got 7"),
        (
            json!({"loadAssignment": []}),
            "loadAssignment: expected an object",
        ),
        (
            json!({"typedExtensionProtocolOptions": {"k": {"@type": "type.googleapis.com/no.Such"}}}),
            "typedExtensionProtocolOptions[\"k\"].@type: unknown type",
        ),
    ] {
        let error = from_value::<Cluster>(&value).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    }
}

/// Envoy reads its configuration with protobuf's reader for C++, which takes these; users' objects of a mesh are strict.
#[test]
fn what_is_written_for_envoy_may_be_looser() {
    for (loose, canonical) in [
        (json!({"type": "strict_dns"}), json!({"type": "STRICT_DNS"})),
        (json!({"lbPolicy": "Round_Robin"}), json!({})),
        (
            json!({"ignoreHealthOnHostRemoval": "True"}),
            json!({"ignoreHealthOnHostRemoval": true}),
        ),
        (json!({"ignoreHealthOnHostRemoval": "f"}), json!({})),
        (
            json!({"healthChecks": {"timeout": "1s"}}),
            json!({"healthChecks": [{"timeout": "1s"}]}),
        ),
        (
            json!({"edsClusterConfig": null, "dnsResolvers": {"pipe": {"path": "a"}}}),
            json!({"dnsResolvers": [{"pipe": {"path": "a"}}]}),
        ),
    ] {
        let message: Cluster = super::from_envoy_value(&loose).unwrap();
        assert_eq!(to_value(&message), canonical);
        assert!(from_value::<Cluster>(&loose).is_err(), "{loose}");
    }
    for (wrong, want) in [
        (json!({"type": "strict-dns"}), "type: unknown value"),
        (
            json!({"ignoreHealthOnHostRemoval": "maybe"}),
            "ignoreHealthOnHostRemoval: expected true or false",
        ),
        (
            json!({"healthChecks": 3}),
            "healthChecks: expected an object",
        ),
    ] {
        let error = super::from_envoy_value::<Cluster>(&wrong).unwrap_err();
        assert!(error.to_string().starts_with(want), "{error}");
    }
    // Texts and numbers of a list, packed and not.
    let codes: crate::envoy::config::core::v3::HealthCheck = super::from_envoy_value(
        &json!({"httpHealthCheck": {"path": "/", "requestHeadersToRemove": "a"}}),
    )
    .unwrap();
    assert_eq!(
        to_value(&codes)["httpHealthCheck"]["requestHeadersToRemove"],
        json!(["a"])
    );
    let retry: crate::envoy::config::route::v3::RetryPolicy =
        super::from_envoy_value(&json!({"retriableStatusCodes": 503})).unwrap();
    assert_eq!(retry.retriable_status_codes, [503]);
}

#[test]
fn an_any_of_an_unknown_type_is_shown_as_base64() {
    let any = Any {
        type_url: "type.googleapis.com/no.Such".into(),
        value: vec![1, 2, 3],
    };
    assert_eq!(
        super::any_to_value(&any),
        json!({"@type": any.type_url, "value": "AQID"})
    );
}

#[test]
fn well_known_types_inside_an_any_stand_under_value() {
    let text = json!({"@type": "type.googleapis.com/google.protobuf.Duration", "value": "1.500s"});
    let any: Any = from_value(&text).unwrap();
    assert_eq!(super::any_to_value(&any), text);
}

/// Every resource that a real istiod sent reads strictly and writes back as the same JSON.
#[test]
fn what_a_real_istiod_sends_survives_the_round_trip() {
    let Some(root) = finder::conformance("istiod-xds") else {
        return;
    };
    let types = [
        ("clusters", "envoy.config.cluster.v3.Cluster"),
        (
            "endpoints",
            "envoy.config.endpoint.v3.ClusterLoadAssignment",
        ),
        ("listeners", "envoy.config.listener.v3.Listener"),
        ("routes", "envoy.config.route.v3.RouteConfiguration"),
    ];
    let mut checked = 0;
    for scenario in fs::read_dir(root)
        .unwrap()
        .flatten()
        .filter(|e| e.path().is_dir())
    {
        for file in fs::read_dir(scenario.path()).unwrap().flatten() {
            let name = file.file_name().into_string().unwrap();
            if !name.ends_with(".json") || name.ends_with(".node.json") {
                continue;
            }
            let doc: Value = serde_json::from_slice(&fs::read(file.path()).unwrap()).unwrap();
            for (section, full_name) in types {
                for resource in doc[section].as_array().into_iter().flatten() {
                    let mut resource = resource.clone();
                    resource.as_object_mut().unwrap().remove("@type");
                    let bytes = super::value_to_encoded(full_name, &resource)
                        .unwrap_or_else(|e| panic!("{}: {section}: {e}", file.path().display()));
                    let again = super::encoded_to_value(full_name, &bytes).unwrap();
                    assert!(
                        again == resource,
                        "{}: {}",
                        file.path().display(),
                        resource["name"]
                    );
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 1000, "only {checked} resources");
}

#[test]
fn the_caller_says_how_large_a_text_may_be() {
    let text = |entries| {
        format!(
            "clusters: [{}]",
            vec!["{name: a, type: STATIC}"; entries].join(", ")
        )
    };
    let large = text(100_000);
    let value = super::yaml_of_size(&large, 50_000_000).unwrap();
    assert_eq!(value["clusters"].as_array().map(Vec::len), Some(100_000));
    let error = super::yaml_to_value(&large).unwrap_err().to_string();
    assert!(error.contains("more than 250000 values"), "{error}");
    let error = super::yaml_of_size(&text(10), 20).unwrap_err().to_string();
    assert!(error.contains("more than 20 values"), "{error}");
    let error = super::yaml_of_size(&"x".repeat(10_000), 20)
        .unwrap_err()
        .to_string();
    assert!(error.contains("more than 20 values"), "{error}");
}

#[test]
fn a_struct_s_words_are_texts_where_the_message_has_texts() {
    let value = json!({"id": true, "cluster": 7});
    let encoded = crate::json::struct_to_encoded("envoy.config.core.v3.Node", &value).unwrap();
    let node = <Node as prost::Message>::decode(&*encoded).unwrap();
    assert_eq!((node.id.as_str(), node.cluster.as_str()), ("true", "7"));
    assert!(crate::json::value_to_encoded("envoy.config.core.v3.Node", &value).is_err());
}

#[test]
#[allow(deprecated)] // Few fields of clusters are booleans.
fn words_that_yaml_once_took_for_booleans_are_what_the_field_is() {
    let node: Node = from_yaml("{id: n, cluster: on, locality: {region: No}}").unwrap();
    assert_eq!((node.id.as_str(), node.cluster.as_str()), ("n", "on"));
    assert_eq!(node.locality.unwrap().region, "No");
    for (word, want) in [
        ("true", true),
        ("y", true),
        ("On", true),
        ("NO", false),
        ("off", false),
    ] {
        let cluster: Cluster = from_yaml(&format!("{{name: a, respect_dns_ttl: {word}}}")).unwrap();
        assert_eq!(cluster.respect_dns_ttl, want, "{word}");
    }
    let error = from_yaml::<Cluster>("{name: a, respect_dns_ttl: perhaps}").unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("respect_dns_ttl: expected true or false"),
        "{error}"
    );
}

#[test]
fn durations_and_wrappers_may_be_written_field_by_field() {
    type Route = crate::envoy::config::route::v3::RouteAction;
    let read = |value| from_value::<Route>(&value);
    let route = read(json!({"timeout": {"seconds": 30}, "auto_host_rewrite": {"value": true}}))
        .expect("as Envoy takes it");
    assert_eq!(route.timeout.expect("a timeout").seconds, 30);
    let error = read(json!({"timeout": {"second": 30}})).expect_err("no such field");
    assert!(
        error
            .to_string()
            .starts_with("timeout.second: unknown field"),
        "{error}"
    );
}
