//! What istioctl asks on port 15012.

use super::*;

/// As istioctl asks: one question on a stream of its own, with a token and a node that is no proxy's.
async fn question(
    secured: &Secured,
    account: (&str, &str),
    type_url: &str,
    names: &[&str],
) -> Result<DiscoveryResponse, Status> {
    let (namespace, account) = account;
    let token = secured.issuer.token(|c| {
        c["kubernetes.io"] = json!({"namespace": namespace});
        c["sub"] = json!(format!("system:serviceaccount:{namespace}:{account}"));
    });
    let node = proto::json::from_value(&json!({
        "id": "sidecar~10.0.0.9~test-1.default~default.svc.cluster.local",
        "metadata": {"NAMESPACE": namespace, "SERVICE_ACCOUNT": account, "GENERATOR": "event"},
    }))
    .expect("node");
    let first = DiscoveryRequest {
        node: Some(node),
        type_url: type_url.to_owned(),
        resource_names: names.iter().map(|n| (*n).to_owned()).collect(),
        response_nonce: "2026-11-22 05:00:00".to_owned(),
        ..Default::default()
    };
    let requests =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut request = Request::new(requests);
    let token = format!("Bearer {token}").parse().expect("ascii");
    request.metadata_mut().insert("authorization", token);
    let channel = secured.channel(None).await.expect("connected");
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut answers = client
        .stream_aggregated_resources(request)
        .await?
        .into_inner();
    Ok(answers.message().await?.expect("an answer"))
}

#[tokio::test]
async fn istioctl_learns_how_far_proxies_are_and_what_they_were_sent() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let node = proto::json::from_value(&json!({
        "id": "sidecar~127.0.0.1~web-0.shop~shop.svc.cluster.local",
        "metadata": {"NAMESPACE": "shop", "SERVICE_ACCOUNT": "web", "CLUSTER_ID": "Kubernetes",
            "ISTIO_VERSION": "1.30.1", "PROXY_CONFIG": {}},
    }))
    .expect("node");
    let cds = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    let first = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: cds.to_owned(),
        ..Default::default()
    };
    let requests =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut request = Request::new(requests);
    let token = format!("Bearer {}", secured.token_of("web-0", "web"));
    request
        .metadata_mut()
        .insert("authorization", token.parse().expect("ascii"));
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut proxy = client
        .delta_aggregated_resources(request)
        .await
        .expect("a stream")
        .into_inner();
    let sent = proxy.message().await.expect("sent").expect("clusters");

    let admin = ("istio-system", "default");
    let syncz = question(&secured, admin, "istio.io/debug/syncz", &[])
        .await
        .expect("syncz");
    let identifier = syncz.control_plane.expect("who answers").identifier;
    let identifier: Value = serde_json::from_str(&identifier).expect("JSON");
    assert_eq!(identifier["ID"], "replica-0");
    assert_eq!(identifier["Info"]["version"], env!("CARGO_PKG_VERSION"));
    // The one who asks is none of them.
    let [one] = &syncz.resources[..] else {
        panic!("{:?}", syncz.resources);
    };
    let one: csds::ClientConfig = proto::any::unpack(one).expect("a ClientConfig");
    let node = one.node.expect("node");
    assert_eq!(node.id, "web-0.shop");
    let node = proto::json::to_value(&node);
    assert_eq!(
        node["metadata"],
        json!({"CLUSTER_ID": "Kubernetes", "ISTIO_VERSION": "1.30.1", "NAMESPACE": "shop"})
    );
    let [state] = &one.generic_xds_configs[..] else {
        panic!("{:?}", one.generic_xds_configs);
    };
    assert_eq!(state.type_url, cds);
    assert_eq!(
        state.config_status(),
        csds::ConfigStatus::Stale,
        "not answered"
    );
    assert!(state.last_updated.is_some());

    let dump = "istio.io/debug/config_dump";
    let dumped = question(&secured, admin, dump, &["web-0.shop"])
        .await
        .expect("dump");
    let clusters: ClustersConfigDump = dumped
        .resources
        .iter()
        .find_map(|r| proto::any::unpack(r).ok())
        .expect("clusters");
    assert_eq!(clusters.dynamic_active_clusters.len(), sent.resources.len());
    // Another replica may have it: istioctl goes on by this text.
    let gone = question(&secured, admin, dump, &["gone-0.shop"])
        .await
        .expect("no error");
    assert!(
        gone.resources[0]
            .value
            .starts_with(b"Proxy not connected to this Pilot instance.")
    );
    let page = question(&secured, admin, "istio.io/debug", &["registryz"])
        .await
        .expect("page");
    serde_json::from_slice::<Value>(&page.resources[0].value).expect("JSON");

    // A workload learns of its own namespace alone.
    let syncz = "istio.io/debug/syncz";
    let count = async |account| {
        let answer = question(&secured, account, syncz, &[]).await;
        answer.expect("syncz").resources.len()
    };
    assert_eq!(count(("shop", "web")).await, 1);
    assert_eq!(count(("bank", "web")).await, 0);
    let refused = question(&secured, ("shop", "web"), "istio.io/debug", &["registryz"]).await;
    assert_eq!(refused.expect_err("all").code(), Code::PermissionDenied);
    let own = "edsz?proxyID=web-0.shop";
    question(&secured, ("shop", "web"), "istio.io/debug", &[own])
        .await
        .expect("its own");
    let refused = question(&secured, ("bank", "web"), "istio.io/debug", &[own]).await;
    assert_eq!(
        refused.expect_err("another's").code(),
        Code::PermissionDenied
    );
}
