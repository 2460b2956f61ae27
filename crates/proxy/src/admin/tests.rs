use std::sync::Arc;

use hyper::Method;
use proto::envoy::config::bootstrap::v3::Bootstrap as BootstrapMessage;
use serde_json::Value;
use tokio::task::LocalSet;

use super::*;
use crate::{discovery::Discovery, plan::Bootstrap, server::Server, worker::Options};

const YAML: &str = r#"
node: { id: sidecar~1, cluster: mine }
layered_runtime: { layers: [{ name: a, static_layer: { x: { y: 3 } } }] }
static_resources:
  clusters:
  - name: c
    circuit_breakers: { thresholds: [{ max_connections: 7 }] }
    load_assignment: { cluster_name: c, endpoints: [{ locality: { zone: z }, lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 9 } } } }] }] }
  - { name: other }
  listeners:
  - name: l
    address: { socket_address: { address: 127.0.0.1, port_value: 0 } }
    filter_chains:
    - filters:
      - name: h
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: s
          route_config: { name: inline, virtual_hosts: [] }
          http_filters: [{ name: r, typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router } }]
"#;

/// Runs a process of its own with the bootstrap above.
fn with_admin(test: impl AsyncFnOnce(Admin)) {
    with_admin_of(YAML, test);
}

fn with_admin_of(yaml: &str, test: impl AsyncFnOnce(Admin)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let message: BootstrapMessage = proto::json::from_yaml(yaml).expect("legal YAML");
        let bootstrap = Arc::new(Bootstrap::try_from(&message).expect("a bootstrap"));
        let server =
            Server::start(bootstrap, Options::default(), stats::Store::default()).expect("workers");
        let mut discovery = Discovery::new(server.clone());
        let admin = Admin {
            server,
            truth: discovery.truth(),
        };
        assert_eq!(admin.get("/ready"), (503, "PRE_INITIALIZING\n".to_owned()));
        discovery.begin().await.expect("the static part");
        test(admin).await;
    });
}

impl Admin {
    fn get(&self, path: &str) -> (u16, String) {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(p, q)| (p, Some(q)));
        let answer = self.answer(&Method::GET, path, query);
        (answer.status, answer.body)
    }

    fn get_json(&self, path: &str) -> Value {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("JSON")
    }

    fn post(&self, path: &str) -> (u16, String) {
        let (path, query) = path
            .split_once('?')
            .map_or((path, None), |(p, q)| (p, Some(q)));
        let answer = self.answer(&Method::POST, path, query);
        (answer.status, answer.body)
    }
}

#[test]
fn readiness_and_version() {
    with_admin(async |admin| {
        assert_eq!(admin.get("/ready"), (200, "LIVE\n".to_owned()));
        let info = admin.get_json("/server_info");
        assert_eq!(info["state"], "LIVE");
        assert_eq!(info["node"]["id"], "sidecar~1");
        assert_eq!(info["command_line_options"]["concurrency"], 1);
        assert_eq!(admin.post("/healthcheck/fail").0, 200);
        assert_eq!(admin.get("/ready"), (503, "DRAINING\n".to_owned()));
        assert_eq!(admin.post("/healthcheck/ok").0, 200);
        assert_eq!(admin.get("/ready").0, 200);
        assert_eq!(
            admin.get_json("/runtime")["entries"]["x.y"]["final_value"],
            "3"
        );
    });
}

#[test]
fn clusters_and_listeners() {
    with_admin(async |admin| {
        let (_, text) = admin.get("/clusters");
        for line in [
            "c::default_priority::max_connections::7\n",
            "c::high_priority::max_connections::1024\n",
            "c::added_via_api::false\n",
            "c::127.0.0.1:9::cx_active::0\n",
            "c::127.0.0.1:9::health_flags::healthy\n",
            "c::127.0.0.1:9::zone::z\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let json = admin.get_json("/clusters?format=json");
        let status = json["cluster_statuses"].as_array().expect("a list");
        let status = status.iter().find(|c| c["name"] == "c").expect("c");
        let host = &status["host_statuses"][0];
        assert_eq!(host["address"]["socket_address"]["port_value"], 9);
        assert_eq!(host["health_status"]["eds_health_status"], "HEALTHY");
        let address = admin.server.listener_address("l").expect("bound");
        assert_eq!(admin.get("/listeners").1, format!("l::{address}\n"));
        let json = admin.get_json("/listeners?format=json");
        assert_eq!(
            json["listener_statuses"][0]["local_address"]["socket_address"]["port_value"],
            address.port()
        );
        assert_eq!(admin.get("/clusters?format=xml").0, 400);
        // Looking brings no cluster to life.
        let (_, stats) = admin.get("/stats?filter=membership");
        assert!(stats.contains("cluster.c.membership_total: 1\n"), "{stats}");
        let dump = admin.get("/config_dump?include_eds").1;
        assert!(dump.contains("\"port_value\": 9"), "{dump}");
        let cluster = admin.server.cluster("c").expect("it is there");
        assert!(cluster.plan.made().is_none());
    });
}

#[test]
fn a_dump_holds_everything_and_can_be_cut() {
    with_admin(async |admin| {
        let types = |dump: &Value| -> Vec<String> {
            let configs = dump["configs"].as_array().expect("a list");
            configs
                .iter()
                .map(|c| {
                    c["@type"]
                        .as_str()
                        .expect("typed")
                        .rsplit('.')
                        .next()
                        .expect("a name")
                        .to_owned()
                })
                .collect()
        };
        let dump = admin.get_json("/config_dump");
        assert_eq!(
            types(&dump),
            [
                "BootstrapConfigDump",
                "ClustersConfigDump",
                "ListenersConfigDump",
                "RoutesConfigDump",
                "SecretsConfigDump"
            ]
        );
        assert_eq!(dump["configs"][0]["bootstrap"]["node"]["cluster"], "mine");
        assert_eq!(
            dump["configs"][0]["bootstrap"]["node"]["user_agent_build_version"]["version"]["minor_number"],
            env!("CARGO_PKG_VERSION_MINOR").parse::<u32>().unwrap()
        );
        let clusters = &dump["configs"][1]["static_clusters"];
        assert_eq!(
            clusters[0]["cluster"]["@type"],
            "type.googleapis.com/envoy.config.cluster.v3.Cluster"
        );
        assert_eq!(clusters.as_array().map(Vec::len), Some(2));
        assert_eq!(
            dump["configs"][3]["static_route_configs"][0]["route_config"]["name"],
            "inline"
        );
        let with_eds = admin.get_json("/config_dump?include_eds");
        assert_eq!(types(&with_eds)[2], "EndpointsConfigDump");
        let endpoints = &with_eds["configs"][2]["static_endpoint_configs"][0]["endpoint_config"];
        assert_eq!(
            endpoints["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"],
            9
        );

        let one = admin
            .get_json("/config_dump?resource=static_clusters&mask=cluster.name&name_regex=oth");
        assert_eq!(one["configs"].as_array().map(Vec::len), Some(1));
        assert_eq!(
            one["configs"][0],
            serde_json::json!({
                "@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump.StaticCluster",
                "cluster": { "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "other" },
            })
        );
        let cut = admin.get_json("/config_dump?mask=bootstrap.node.id");
        assert_eq!(
            cut["configs"],
            serde_json::json!([{
                "@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump",
                "bootstrap": { "node": { "id": "sidecar~1" } },
            }])
        );
        assert_eq!(
            admin.get("/config_dump?resource=nope"),
            (404, "nope not found in config dump\n".to_owned())
        );
        assert_eq!(admin.get("/config_dump?resource=bootstrap").0, 400);
        assert_eq!(admin.get("/config_dump?name_regex=(").0, 400);
        assert_eq!(
            admin.get_json("/config_dump?resource=dynamic_listeners")["configs"],
            serde_json::json!([])
        );
    });
}

#[test]
fn stats_say_what_the_process_is() {
    with_admin(async |admin| {
        let (_, text) = admin.get("/stats?filter=%5Eserver%5C.");
        let number = |name: &str| -> i64 {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(&format!("server.{name}: ")));
            line.and_then(|number| number.parse().ok())
                .unwrap_or_else(|| panic!("no {name} in {text}"))
        };
        for name in [
            "memory_allocated",
            "memory_heap_size",
            "memory_physical_size",
        ] {
            assert!(number(name) > 1 << 20, "{name} {text}");
        }
        for name in [
            "total_connections",
            "parent_connections",
            "hot_restart_epoch",
        ] {
            assert_eq!(number(name), 0, "{name}");
        }
        // There is no certificate.
        assert_eq!(
            number("days_until_first_cert_expiring"),
            i64::from(u32::MAX)
        );
    });
}

#[test]
fn stats_can_be_chosen() {
    with_admin(async |admin| {
        let (_, text) = admin.get("/stats?filter=%5Eserver.state%24&usedonly");
        assert_eq!(text, "server.state: 0\n");
        assert!(
            admin
                .get("/stats/prometheus")
                .1
                .contains("# TYPE envoy_server_state gauge\n")
        );
        assert!(
            admin
                .get("/stats?format=prometheus&filter=server")
                .1
                .contains("envoy_server_live")
        );
        assert!(
            admin.get_json("/stats?format=json&filter=server.live")["stats"][0]["name"]
                == "server.live"
        );
        assert_eq!(admin.get("/stats?filter=(").0, 400);
        assert_eq!(admin.post("/reset_counters"), (200, "OK\n".to_owned()));
    });
}

#[test]
fn what_changes_something_wants_post() {
    with_admin(async |admin| {
        for path in [
            "/quitquitquit",
            "/drain_listeners",
            "/healthcheck/fail",
            "/logging",
            "/reset_counters",
        ] {
            assert_eq!(admin.get(path).0, 405, "{path}");
        }
        assert_eq!(admin.get("/nope").0, 404);
        assert!(admin.get("/help").1.contains("/config_dump"));
        assert_eq!(admin.post("/drain_listeners?skip_exit").0, 400);
        assert_eq!(admin.post("/logging?level=loud").0, 400);
        assert!(
            admin
                .post("/logging?admin=debug")
                .1
                .starts_with("active loggers:\n")
        );
        assert_eq!(admin.post("/quitquitquit"), (200, "OK\n".to_owned()));
        admin.server.quitting().await;
    });
}

#[test]
fn it_is_served_over_http() {
    with_admin(async |admin| {
        let address = Address::Socket("127.0.0.1:0".parse().expect("an address"));
        let bound = start(admin, &address)
            .expect("a free port")
            .socket()
            .expect("a socket");
        let stream = tokio::net::TcpStream::connect(bound)
            .await
            .expect("connects");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .expect("HTTP");
        spawn_local(connection);
        let request = Request::get("/ready")
            .header("host", "x")
            .body(Full::<Bytes>::default())
            .expect("legal");
        let response = sender.send_request(request).await.expect("an answer");
        assert_eq!(response.status(), 200);
        assert_eq!(
            response.headers()["content-type"],
            "text/plain; charset=UTF-8"
        );
    });
}

#[test]
fn parameters_are_decoded() {
    let params = Params::parse(Some("a=%5Ex+y&b&c=1=2&d=%zz"));
    assert_eq!(params.get("a"), Some("^x y"));
    assert!(params.has("b"));
    assert_eq!(
        (params.get("c"), params.get("d")),
        (Some("1=2"), Some("%zz"))
    );
}

#[test]
fn what_logs_may_print_stands_in_no_dump() {
    let yaml = YAML.replace(
        "          http_filters:",
        "          access_log:
          - name: a
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: /dev/null
              log_format:
                text_format_source: { inline_string: '%SECRET(token)%' }
                formatters: [{ name: s, typed_config: { \"@type\": type.googleapis.com/envoy.extensions.formatter.generic_secret.v3.GenericSecret, secret_configs: { token: { name: bearer } } } }]
          http_filters:",
    ) + "  secrets: [{ name: bearer, generic_secret: { secret: { inline_string: swordfish } } }]\n";
    with_admin_of(&yaml, async |admin| {
        let (status, dump) = admin.get("/config_dump");
        assert_eq!(status, 200);
        assert!(dump.contains("%SECRET(token)%"), "{dump}");
        assert!(
            dump.contains("\"bearer\"") && dump.contains("[redacted]"),
            "{dump}"
        );
        assert!(!dump.contains("swordfish"), "{dump}");
        let certs = admin.get("/certs").1;
        assert!(
            !certs.contains("swordfish") && !certs.contains("bearer"),
            "{certs}"
        );
    });
}
