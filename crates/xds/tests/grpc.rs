//! Server and client over real sockets: the same conversation through tonic, on TCP and on a unix socket.

use std::sync::Arc;

use outrigger_xds::{
    Mode, Resource, ResourceSet,
    client::{self, Session, Target, Want},
    server::{Event, Handler, Incoming, Phase, Response, Responses, Service, Stream},
    type_url::CDS,
};
use proto::envoy::config::core::v3::Node;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::mpsc,
};
use tokio_stream::{
    StreamExt,
    wrappers::{TcpListenerStream, UnboundedReceiverStream, UnixListenerStream},
};

struct OneSet(Arc<ResourceSet>);

impl Handler for OneSet {
    async fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> Result<Responses, tonic::Status> {
        assert_eq!(request.metadata().get("clusterid").unwrap(), "Kubernetes");
        let set = self.0.clone();
        let mut requests = request.into_inner();
        let (send, receive) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut stream = Stream::new(mode);
            while let Some(Ok(request)) = requests.next().await {
                if let Event::Respond { type_url, .. } = stream.request(&request) {
                    let response = stream.update(&type_url, &set, "v1", Phase::All).unwrap();
                    if send.send(Ok(response)).is_err() {
                        break;
                    }
                }
            }
        });
        Ok(Box::pin(UnboundedReceiverStream::new(receive)))
    }
}

#[tokio::test]
async fn a_stream_over_tcp_and_over_a_unix_socket_in_both_modes() {
    let resource = Resource::new("a", CDS, b"\x0a\x01a");
    let handler = Arc::new(OneSet(Arc::new([Arc::new(resource)].into_iter().collect())));

    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("xds.sock");
    let targets = [
        Target::Tcp(tcp.local_addr().unwrap().to_string()),
        Target::Unix(path.clone()),
    ];
    let server = tonic::transport::Server::builder().add_service(Service::new(handler));
    tokio::spawn(
        server
            .clone()
            .serve_with_incoming(TcpListenerStream::new(tcp)),
    );
    let unix = UnixListenerStream::new(UnixListener::bind(path).unwrap());
    tokio::spawn(server.serve_with_incoming(unix));

    for target in &targets {
        for mode in [Mode::Delta, Mode::Sotw] {
            let mut session = Session::new(
                mode,
                Node {
                    id: "n".into(),
                    ..Node::default()
                },
            );
            session.watch(CDS, Want::All);
            session.connected();
            let first = vec![session.next_request().unwrap()];
            let headers = [("ClusterID".to_owned(), "Kubernetes".to_owned())];
            let connection = client::connect(target, mode, &headers, first)
                .await
                .unwrap();
            let received = match connection.responses {
                client::Incoming::Delta(mut s) => {
                    session.received_delta(s.message().await.unwrap().unwrap())
                }
                client::Incoming::Sotw(mut s) => {
                    session.received_sotw(s.message().await.unwrap().unwrap())
                }
            };
            assert_eq!(received.malformed, None);
            assert_eq!(received.resources[0].name, "a");
            assert_eq!(received.resources[0].resource.value, b"\x0a\x01a");
        }
    }
}

/// Answers everything with 200 MB.
struct Large;

impl Handler for Large {
    async fn open(
        &self,
        mode: Mode,
        _: tonic::Request<Incoming>,
    ) -> Result<Responses, tonic::Status> {
        // Every part is the same megabyte.
        let part = Arc::new(Resource::new("a", CDS, &vec![0; 1 << 20]));
        let response = Response::answer(mode, CDS, "1", "n".to_owned(), &[], &vec![part; 200]);
        Ok(Box::pin(tokio_stream::once(Ok(response))))
    }
}

#[tokio::test]
async fn a_response_beyond_measure_is_refused_by_its_length() {
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let target = Target::Tcp(tcp.local_addr().unwrap().to_string());
    let server = tonic::transport::Server::builder().add_service(Service::new(Arc::new(Large)));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(tcp)));
    let mut session = Session::new(Mode::Delta, Node::default());
    session.watch(CDS, Want::All);
    session.connected();
    let first = vec![session.next_request().unwrap()];
    let connection = client::connect(&target, Mode::Delta, &[], first)
        .await
        .unwrap();
    let client::Incoming::Delta(mut stream) = connection.responses else {
        panic!("a delta stream was asked for");
    };
    let refused = stream.message().await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::OutOfRange);
    // Its length and ours.
    assert!(refused.message().contains("found 2097"), "{refused}");
    assert!(
        refused
            .message()
            .contains(&client::MAX_RESPONSE.to_string()),
        "{refused}"
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named() {
    let target = Target::Unix("/nonexistent/xds.sock".into());
    let error = client::connect(&target, Mode::Delta, &[], Vec::new())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent/xds.sock"),
        "{error}"
    );
}
