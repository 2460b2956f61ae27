//! Port 15012: who is let in, and what they get.

use super::*;

#[tokio::test]
async fn tokens_prove_what_they_say_and_nothing_else() {
    let dir = tempfile::tempdir().expect("dir");
    let issuer = Issuer::new(dir.path());
    let clock = Clock::manual(SystemTime::now());
    let reviewer = KeyFile::open(&dir.path().join("keys.json"), clock.clone()).expect("keys");
    let review = async |token: &str| reviewer.review(token).await.map_err(|e| e.to_string());

    let good = issuer.token(|_| ());
    let reviewed = review(&good).await.expect("good");
    assert_eq!(reviewed.identity("cluster.local").expect("identity"), web());
    assert_eq!(reviewed.pod.as_deref(), Some("web-0"));

    let wrong = |what: &str, got: Result<_, String>| {
        let error = got.err().unwrap_or_else(|| panic!("{what} is accepted"));
        assert!(error.contains(what), "{error}");
    };
    let now = clock.seconds();
    wrong(
        "expired",
        review(&issuer.token(|c| c["exp"] = json!(now - 31))).await,
    );
    wrong(
        "not valid for",
        review(&issuer.token(|c| c["nbf"] = json!(now + 60))).await,
    );
    wrong(
        "meant for",
        review(&issuer.token(|c| c["aud"] = json!("vault"))).await,
    );
    wrong(
        "no service account",
        review(&issuer.token(|c| c["sub"] = json!("admin"))).await,
    );
    wrong("at most", review(&"x".repeat(1 << 20)).await);
    wrong("not a signed token", review("a.b.c").await);
    let parts: Vec<&str> = good.split('.').collect();
    let other = issuer.token(|c| c["sub"] = json!("system:serviceaccount:shop:admin"));
    let mixed = format!("{}.{}", other.rsplit_once('.').expect("dot").0, parts[2]);
    wrong("signature", review(&mixed).await);
    // Signed with a "secret" that everybody can read, and not signed at all.
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some("s".to_owned());
    let claims =
        json!({"sub": "system:serviceaccount:shop:web", "aud": "istio-ca", "exp": now + 600});
    let shared = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(b"secret"));
    wrong("not accepted", review(&shared.expect("token")).await);
    let none = format!("eyJhbGciOiJub25lIn0.{}.", parts[1]);
    assert!(review(&none).await.is_err());

    // An hour on, the same token is worth nothing; an hour back, it was not yet made, which is no reason to refuse it.
    clock.set(SystemTime::now() + Duration::from_secs(3600));
    wrong("expired", review(&good).await);
    clock.set(SystemTime::now() - Duration::from_secs(3600));
    assert!(review(&good).await.is_ok());
}

/// Two pods of one namespace; only the gateway's is here, on this machine.

#[tokio::test]
async fn a_token_buys_a_certificate_and_the_certificate_the_next_one() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let (csr, key) = request(&[WEB], false);
    let token = secured.issuer.token(|_| ());
    let chain = Secured::certificate(channel.clone(), Some(&token), csr.clone())
        .await
        .expect("signed");

    let nobody = Secured::certificate(channel.clone(), None, csr.clone()).await;
    assert_eq!(nobody.expect_err("no token").code(), Code::Unauthenticated);
    let admin = secured.issuer.token(|c| {
        c["sub"] = json!("system:serviceaccount:shop:admin");
        c["kubernetes.io"] = Value::Null;
    });
    let stolen = Secured::certificate(channel, Some(&admin), csr.clone()).await;
    assert_eq!(stolen.expect_err("other").code(), Code::PermissionDenied);

    let known = secured
        .channel(Some((&chain[..1], &key)))
        .await
        .expect("mTLS");
    let renewed = Secured::certificate(known, None, csr)
        .await
        .expect("renewed");
    assert_ne!(renewed[0], chain[0]);
}

#[tokio::test]
async fn a_certificate_is_worth_something_while_it_is_good() {
    let (start, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let clock = Clock::manual(start);
    let secured = Secured::with(clock.clone()).await;
    let channel = secured.channel(None).await.expect("connected");
    let (csr, key) = request(&[WEB], false);
    let token = secured.issuer.token(|_| ());
    let chain = Secured::certificate(channel, Some(&token), csr).await;
    let chain = chain.expect("signed");
    let shown = async || {
        let channel = secured.channel(Some((&chain[..1], &key))).await?;
        Secured::certificate(channel, None, request(&[], false).0)
            .await
            .map_err(|status| status.to_string())
    };
    for (now, good) in [
        (start, true),
        (start + 23 * hour, true),
        (start + 25 * hour, false),
        (start - hour, false),
        (start + hour, true),
    ] {
        clock.set(now);
        let answer = shown().await;
        assert_eq!(answer.is_ok(), good, "{now:?}: {:?}", answer.err());
    }
}

#[tokio::test]
async fn a_certificate_that_signed_itself_is_shown_the_door() {
    let secured = Secured::start().await;
    let (_, key) = request(&[], false);
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(WEB.try_into().expect("uri"))];
    let own = params.self_signed(&key).expect("signed").pem();
    let outcome = match secured.channel(Some((&[own], &key))).await {
        Err(error) => error,
        Ok(channel) => Secured::certificate(channel, None, request(&[], false).0)
            .await
            .expect_err("refused")
            .to_string(),
    };
    assert!(!outcome.is_empty());
}

#[tokio::test]
async fn a_proxy_gets_the_configuration_of_its_own_workload_only() {
    let secured = Secured::start().await;
    let open = async |namespace: &str, account: &str| {
        let channel = secured.channel(None).await.expect("connected");
        let node = proto::json::from_value(&json!({
            "id": format!("sidecar~10.0.0.1~web-0.{namespace}~{namespace}.svc.cluster.local"),
            "metadata": {"NAMESPACE": namespace, "SERVICE_ACCOUNT": account, "CLUSTER_ID": "Kubernetes"},
        }))
        .expect("node");
        let first = DeltaDiscoveryRequest {
            node: Some(node),
            type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
            ..Default::default()
        };
        let requests =
            tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
        let mut request = Request::new(requests);
        let token = format!("Bearer {}", secured.issuer.token(|_| ()));
        request
            .metadata_mut()
            .insert("authorization", token.parse().expect("ascii"));
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let mut answers = client
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        answers.message().await
    };
    assert!(open("shop", "web").await.expect("its own").is_some());
    for (namespace, account) in [("bank", "web"), ("shop", "admin")] {
        let refused = open(namespace, account).await.expect_err("another's");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
}

#[tokio::test]
async fn a_token_is_worth_nothing_away_from_its_pod() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let ask = async |pod: &str, account: &str| {
        let token = secured.issuer.token(|c| {
            c["kubernetes.io"]["pod"]["name"] = json!(pod);
            c["sub"] = json!(format!("system:serviceaccount:shop:{account}"));
        });
        let (csr, _) = request(&[], false);
        Secured::certificate(channel.clone(), Some(&token), csr).await
    };
    ask("web-0", "web").await.expect("from its pod");
    // Of a pod that is elsewhere, that is gone, and with an account that is not the pod's.
    for (pod, account) in [("away-0", "web"), ("gone-0", "web"), ("web-0", "entry")] {
        let refused = ask(pod, account).await.expect_err("another's");
        assert_eq!(refused.code(), Code::Unauthenticated, "{pod} {account}");
        assert_eq!(
            refused.message(),
            "authentication failure",
            "no more is told"
        );
    }
    // More than a request can be is not even read.
    let token = secured.issuer.token(|_| ());
    let large = Secured::certificate(channel, Some(&token), "x".repeat(10 << 20)).await;
    let large = large.expect_err("10 MB");
    assert!(
        matches!(
            large.code(),
            Code::OutOfRange | Code::ResourceExhausted | Code::InvalidArgument
        ),
        "{large}"
    );
}

#[tokio::test]
async fn the_plain_port_signs_nothing_and_gives_no_secrets() {
    let secured = Secured::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let ads = Ads::open(secured.server.clone());
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(xds::server::Service::new(Arc::new(ads)))
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
    );
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{address}"))
        .expect("uri")
        .connect()
        .await
        .expect("connected");
    // What somebody has read on the wire, sent again here.
    let token = secured.issuer.token(|_| ());
    let refused = Secured::certificate(channel.clone(), Some(&token), request(&[], false).0).await;
    assert_eq!(refused.expect_err("not here").code(), Code::Unimplemented);
    let gateway = secured.token_of("gateway-0", "entry");
    let found = secrets(
        channel,
        Some(&gateway),
        "gateway-0",
        "entry",
        &["kubernetes://site"],
    );
    assert_eq!(found.await.expect("an answer"), [""; 0]);
}

#[tokio::test]
async fn a_gateway_gets_the_secrets_that_are_named_for_it() {
    let secured = Secured::start().await;
    let channel = secured.channel(None).await.expect("connected");
    let all = [
        "kubernetes://site",
        "kubernetes://site-cacert",
        "kubernetes-gateway://shop/site",
        "kubernetes://other",
        "kubernetes://gone",
        "kubernetes-gateway://bank/site",
        "kubernetes://../bank/site",
    ];
    let gateway = secured.token_of("gateway-0", "entry");
    let found = secrets(channel.clone(), Some(&gateway), "gateway-0", "entry", &all).await;
    let mut found = found.expect("an answer");
    found.sort();
    assert_eq!(
        found,
        [
            "kubernetes-gateway://shop/site",
            "kubernetes://site",
            "kubernetes://site-cacert"
        ]
    );
    // A workload beside it, which says that it has the gateway's labels, gets none.
    let web = secured.token_of("web-0", "web");
    let found = secrets(channel, Some(&web), "web-0", "web", &all).await;
    assert_eq!(found.expect("an answer"), [""; 0]);
}

/// Asks for secrets as a gateway would; the names of those that come.
async fn secrets(
    channel: Channel,
    token: Option<&str>,
    pod: &str,
    account: &str,
    names: &[&str],
) -> Result<Vec<String>, Status> {
    let node = proto::json::from_value(&json!({
        "id": format!("router~127.0.0.1~{pod}.shop~shop.svc.cluster.local"),
        "metadata": {"NAMESPACE": "shop", "SERVICE_ACCOUNT": account, "CLUSTER_ID": "Kubernetes",
            "LABELS": {"istio": "entry"}},
    }))
    .expect("node");
    let first = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: xds::type_url::SDS.to_owned(),
        resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
        ..Default::default()
    };
    let requests =
        tokio_stream::StreamExt::chain(tokio_stream::iter([first]), tokio_stream::pending());
    let mut request = Request::new(requests);
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().expect("ascii");
        request.metadata_mut().insert("authorization", value);
    }
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut answers = client
        .delta_aggregated_resources(request)
        .await?
        .into_inner();
    let answer = answers.message().await?.expect("an answer");
    assert_eq!(answer.type_url, xds::type_url::SDS);
    Ok(answer.resources.into_iter().map(|r| r.name).collect())
}
