use super::*;

/// The lists of a captured answer, wrapped as a dump.
fn dump_of(answer: &Value) -> Value {
    let list = |key: &str| answer[key].as_array().cloned().unwrap_or_default();
    let listeners: Vec<Value> = list("listeners")
        .into_iter()
        .map(|l| json!({ "name": l["name"], "activeState": { "listener": l } }))
        .collect();
    let routes: Vec<Value> = list("routes")
        .into_iter()
        .map(|r| json!({ "routeConfig": r }))
        .collect();
    json!({ "configs": [
        { "@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump", "dynamicListeners": listeners },
        { "@type": "type.googleapis.com/envoy.admin.v3.RoutesConfigDump", "dynamicRouteConfigs": routes },
    ] })
}

fn call(line: &Value) -> Call {
    let text = |key: &str| line[key].as_str().unwrap_or_default();
    let port = line["port"]
        .as_u64()
        .and_then(|p| u16::try_from(p).ok())
        .expect("a port");
    Call {
        mode: match text("mode") {
            "outbound" => Mode::Outbound,
            "inbound" => Mode::Inbound,
            "gateway" => Mode::Gateway,
            other => panic!("mode {other}"),
        },
        destination: SocketAddr::new(text("address").parse().expect("an address"), port),
        protocol: match text("protocol") {
            "http" => Protocol::Http,
            "http2" => Protocol::Http2,
            "tcp" => Protocol::Tcp,
            other => panic!("protocol {other}"),
        },
        security: match text("tls") {
            "plaintext" => Security::Plaintext,
            "tls" => Security::Tls,
            "mtls" => Security::Mtls,
            other => panic!("tls {other}"),
        },
        sni: text("sni").to_owned(),
        alpn: [text("alpn")]
            .into_iter()
            .filter(|a| !a.is_empty())
            .map(ToOwned::to_owned)
            .collect(),
        host: text("host").to_owned(),
        path: text("path").to_owned(),
        headers: Vec::new(),
    }
}

/// The two kinds of lines in which a real Envoy and the simulation differ (docs/call-differences.md).
fn differs_as_envoy_does(
    configuration: &Configuration,
    call: &Call,
    end: &End,
    simulated: &Value,
) -> bool {
    // Domains are matched whatever the case.
    let lower = Call {
        host: call.host.to_ascii_lowercase(),
        ..call.clone()
    };
    if lower.host != call.host {
        return configuration.end_of(&lower) == *end;
    }
    // The simulation takes a route for its path alone; without the headers that it wants there is no route.
    let routes = end
        .route_config
        .as_deref()
        .and_then(|name| configuration.routes.get(name));
    let host = routes.and_then(|r| {
        r.virtual_hosts
            .iter()
            .find(|h| Some(&*h.name) == end.virtual_host.as_deref())
    });
    end.error.as_deref() == Some("no route matched")
        && host.is_some_and(|h| {
            h.routes.iter().any(|r| {
                let cluster = match &r.action {
                    Action::Route(action) => match &action.cluster {
                        ClusterSpecifier::Cluster(name) => Some(&**name),
                        _ => None,
                    },
                    _ => None,
                };
                !r.matches.headers.is_empty() && cluster == simulated["cluster"].as_str()
            })
        })
}

/// Every recorded call comes to the end that Istio's own traffic simulation gives it.
#[test]
fn calls_end_where_istio_says() {
    let Some(root) = crate::plan::read::tests::conformance() else {
        return;
    };
    let mut calls = 0;
    let mut documented = 0;
    let mut wrong = Vec::new();
    for file in std::fs::read_dir(root.join("calls"))
        .expect("readable")
        .flatten()
    {
        let name = file.file_name().into_string().expect("UTF-8");
        let Some((scenario, pod)) = name.strip_suffix(".jsonl").and_then(|n| n.split_once('.'))
        else {
            continue;
        };
        let answer = root
            .join("istiod-xds")
            .join(scenario)
            .join(format!("{pod}.json"));
        let answer = std::fs::read_to_string(answer).expect("the dump it was made from");
        let dump = dump_of(&serde_json::from_str(&answer).expect("JSON"));
        let configuration = Configuration::from_dump(&dump).expect("a dump");
        for line in std::fs::read_to_string(file.path())
            .expect("readable")
            .lines()
        {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let call = call(&line["call"]);
            let end = configuration.end_of(&call);
            calls += 1;
            if end.to_json() == line["result"] {
                continue;
            }
            if differs_as_envoy_does(&configuration, &call, &end, &line["result"]) {
                documented += 1;
                continue;
            }
            let end = end.to_json();
            wrong.push(format!(
                "{name} {}\n  want {}\n  have {end}",
                line["call"], line["result"]
            ));
        }
    }
    println!("{calls} calls, {documented} of them different as docs/call-differences.md says");
    assert!(calls > 0);
    assert!(
        wrong.is_empty(),
        "{} of {calls} differ:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(12)].join("\n")
    );
}

#[test]
fn headers_and_weights_are_looked_at() {
    let dump = json!({ "configs": [
        { "@type": "type.googleapis.com/envoy.admin.v3.ListenersConfigDump", "staticListeners": [{ "listener": {
            "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            "name": "l",
            "address": { "socketAddress": { "address": "0.0.0.0", "portValue": 80 } },
            "filterChains": [{ "filters": [{ "name": "h", "typedConfig": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "statPrefix": "s",
                "routeConfig": { "virtualHosts": [{ "name": "v", "domains": ["*"], "routes": [
                    { "name": "beta", "match": { "prefix": "/", "headers": [{ "name": "x-user", "stringMatch": { "exact": "jason" } }] },
                      "route": { "cluster": "v2" } },
                    { "match": { "prefix": "/" }, "route": { "weightedClusters": { "clusters": [
                        { "name": "v1", "weight": 80 }, { "name": "v3", "weight": 20 }] } } },
                ] }] },
                "httpFilters": [
                    { "name": "later", "typedConfig": { "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm" } },
                    { "name": "r", "typedConfig": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" } },
                ],
            } }] }],
        } }] },
    ] });
    let configuration = Configuration::from_dump(&dump).expect("a dump");
    assert_eq!(
        configuration.left_out.len(),
        1,
        "{:?}",
        configuration.left_out
    );
    let mut call = Call {
        mode: Mode::Gateway,
        destination: "10.0.0.1:80".parse().expect("an address"),
        protocol: Protocol::Http,
        security: Security::Plaintext,
        sni: String::new(),
        alpn: Vec::new(),
        host: "any".to_owned(),
        path: "/".to_owned(),
        headers: vec![("X-User".to_owned(), "jason".to_owned())],
    };
    let end = configuration.end_of(&call);
    assert_eq!(
        (end.route.as_deref(), end.cluster.as_deref()),
        (Some("beta"), Some("v2"))
    );
    call.headers.clear();
    let end = configuration.end_of(&call);
    assert_eq!(
        end.weighted_clusters,
        [("v1".to_owned(), 80), ("v3".to_owned(), 20)]
    );
    call.destination.set_port(81);
    assert_eq!(
        configuration.end_of(&call).error.as_deref(),
        Some("no listener matched")
    );
}
