//! What a proxyless gRPC client is told, by name.

use std::{path::Path, sync::Arc};

use config::Snapshot;
use outrigger_control::{
    grpc,
    model::{Mesh, Node, Proxy, Resource, Settings},
};
use prost::Message;
use proto::envoy::config::{
    cluster::v3::Cluster, core::v3::Node as EnvoyNode, endpoint::v3::ClusterLoadAssignment,
    listener::v3::Listener, route::v3::RouteConfiguration,
};

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: server-svc, namespace: grpc}
spec:
  clusterIP: 10.96.0.9
  selector: {app: server}
  ports: [{name: grpc, port: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: grpc, labels: {app: server}}
spec: {containers: [{name: server, ports: [{containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.1.0.9, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server, namespace: grpc}
spec:
  hosts: [server-svc]
  http: [{timeout: 3s, route: [{destination: {host: server-svc}}]}]
";

fn mesh() -> Mesh {
    let (snapshot, problems) = Snapshot::from_texts([(Path::new("mesh.yaml"), OBJECTS)]);
    assert!(problems.is_empty(), "{problems:?}");
    Mesh::new(Arc::new(snapshot), Settings::default(), None)
}

fn client(mesh: &Mesh) -> Proxy {
    let node: EnvoyNode = proto::json::from_value(&serde_json::json!({
        "id": "sidecar~10.1.0.8~client.grpc~grpc.svc.cluster.local",
        "metadata": {"GENERATOR": "grpc", "NAMESPACE": "grpc"},
    }))
    .unwrap();
    let node = Node::parse(&node).unwrap();
    assert!(grpc::is_grpc(&node));
    Proxy::new(mesh, Arc::new(node))
}

fn only<M: Message + Default>(resources: Vec<Resource>) -> M {
    assert_eq!(resources.len(), 1);
    M::decode(resources[0].value.as_ref()).unwrap()
}

const CLUSTER: &str = "outbound|8080||server-svc.grpc.svc.cluster.local";

#[test]
fn a_target_leads_from_listener_to_endpoints() {
    let mesh = mesh();
    let proxy = client(&mesh);
    for target in [
        "server-svc:8080",
        "server-svc.grpc:8080",
        "server-svc.grpc.svc.cluster.local:8080",
        "server-svc",
    ] {
        let listener: Listener = only(grpc::listeners(&mesh, &proxy, &[target]));
        assert_eq!(listener.name, target);
        let json = proto::json::to_value(&listener);
        let manager = &json["apiListener"]["apiListener"];
        assert_eq!(manager["rds"]["routeConfigName"], CLUSTER);
        assert_eq!(
            manager["httpFilters"][1]["name"],
            "envoy.filters.http.router"
        );
    }
    assert!(grpc::listeners(&mesh, &proxy, &["nobody:8080", "server-svc:81"]).is_empty());

    let routes: RouteConfiguration = only(grpc::routes(&mesh, &proxy, &[CLUSTER]));
    assert_eq!(routes.name, CLUSTER);
    let [host] = routes.virtual_hosts.as_slice() else {
        panic!("{routes:?}")
    };
    assert!(
        host.domains.contains(&"server-svc.grpc:8080".to_owned()),
        "{:?}",
        host.domains
    );
    let route = proto::json::to_value(&routes)["virtualHosts"][0]["routes"][0]["route"].clone();
    assert_eq!(
        (route["cluster"].as_str(), route["timeout"].as_str()),
        (Some(CLUSTER), Some("3s"))
    );

    let cluster: Cluster = only(grpc::clusters(&mesh, &proxy, &[CLUSTER]));
    assert!(cluster.transport_socket_matches.is_empty() && cluster.filters.is_empty());
    let endpoints: ClusterLoadAssignment = only(grpc::endpoints(&mesh, &proxy, &[CLUSTER]));
    let json = proto::json::to_value(&endpoints);
    let address = &json["endpoints"][0]["lbEndpoints"][0]["endpoint"]["address"]["socketAddress"];
    assert_eq!(
        (&address["address"], &address["portValue"]),
        (&"10.1.0.9".into(), &8080.into())
    );
}

#[test]
fn a_server_gets_a_listener_for_its_own_address() {
    let mesh = mesh();
    let proxy = client(&mesh);
    let name = "xds.istio.io/grpc/lds/inbound/10.1.0.8:9000";
    let listener: Listener = only(grpc::listeners(&mesh, &proxy, &[name]));
    let json = proto::json::to_value(&listener);
    assert_eq!(json["address"]["socketAddress"]["portValue"], 9000);
    let chain = &json["filterChains"][0];
    assert_eq!(chain["name"], "inbound-plaintext");
    let route = &chain["filters"][0]["typedConfig"]["routeConfig"]["virtualHosts"][0]["routes"][0];
    assert!(route["nonForwardingAction"].is_object(), "{route}");
}
