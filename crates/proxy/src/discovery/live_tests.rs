//! A scripted ADS server sends what a real istiod sent to each node; the running proxy takes all of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use proto::envoy::config::bootstrap::v3::Bootstrap as BootstrapMessage;
use serde_json::Value;
use tokio::{net::UnixListener, sync::mpsc, task::LocalSet};
use tokio_stream::{
    StreamExt,
    wrappers::{UnboundedReceiverStream, UnixListenerStream},
};
use xds::{
    Mode, Resource, ResourceSet,
    server::{Event, Handler, Incoming, Phase as Half, Responses, Service, Stream},
    type_url::{CDS, EDS, LDS, PUSH_ORDER, RDS, short},
};

use super::*;
use crate::{
    plan::{Bootstrap, read::tests as captured},
    server::{Server, State},
    worker::Options,
};

/// Serves fixed sets, and notes the answers.
struct Script {
    sets: BTreeMap<&'static str, Arc<ResourceSet>>,
    answers: Answers,
}

/// Type, and what was wrong.
type Answers = Arc<Mutex<Vec<(String, Option<String>)>>>;

impl Handler for Script {
    async fn open(
        &self,
        mode: Mode,
        request: tonic::Request<Incoming>,
    ) -> Result<Responses, tonic::Status> {
        let (sets, answers) = (self.sets.clone(), self.answers.clone());
        let mut requests = request.into_inner();
        let (send, receive) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut stream = Stream::new(mode);
            while let Some(Ok(request)) = requests.next().await {
                let note = |type_url: &str, error: Option<String>| {
                    answers
                        .lock()
                        .expect("not poisoned")
                        .push((short(type_url).to_owned(), error));
                };
                match stream.request(&request) {
                    Event::Respond { .. } => {
                        for type_url in PUSH_ORDER {
                            let Some(set) = sets.get(type_url) else {
                                continue;
                            };
                            if let Some(response) = stream.update(type_url, set, "v1", Half::All)
                                && send.send(Ok(response)).is_err()
                            {
                                return;
                            }
                        }
                    }
                    Event::Ack { type_url, .. } => note(&type_url, None),
                    Event::Nack {
                        type_url, message, ..
                    } => note(&type_url, Some(message)),
                    _ => {}
                }
            }
        });
        Ok(Box::pin(UnboundedReceiverStream::new(receive)))
    }
}

/// The lists of an answer as sets; listeners keep away from the machine's ports.
fn sets(answer: &Value) -> BTreeMap<&'static str, Arc<ResourceSet>> {
    let types = [
        ("clusters", CDS),
        ("endpoints", EDS),
        ("listeners", LDS),
        ("routes", RDS),
    ];
    let mut sets = BTreeMap::new();
    for (key, type_url) in types {
        let list = answer[key].as_array().cloned().unwrap_or_default();
        let resources = list.into_iter().map(|mut resource| {
            let members = resource.as_object_mut().expect("an object");
            members.remove("@type");
            if type_url == LDS {
                members.insert("bindToPort".to_owned(), false.into());
            }
            let name = resource.get("name").or(resource.get("clusterName"));
            let name = name.and_then(Value::as_str).expect("a name").to_owned();
            let encoded = proto::json::value_to_encoded(proto::any::type_name(type_url), &resource);
            Arc::new(Resource::new(
                name,
                type_url,
                &encoded.expect("canonical JSON"),
            ))
        });
        sets.insert(type_url, Arc::new(resources.collect()));
    }
    sets
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waited)
        .await
        .expect(what);
}

async fn one(label: &str, answer: &Value, mode: Mode) -> usize {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("XDS");
    let answers = Arc::new(Mutex::new(Vec::new()));
    let sets = sets(answer);
    let (clusters, listeners) = (sets[CDS].len(), sets[LDS].len());
    let service = Service::new(Arc::new(Script {
        sets,
        answers: answers.clone(),
    }));
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).expect("a socket"));
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );

    let api_type = if mode == Mode::Delta {
        "DELTA_GRPC"
    } else {
        "GRPC"
    };
    let yaml = format!(
        r#"
node: {{ id: node-1, cluster: mine }}
dynamic_resources:
  ads_config: {{ api_type: {api_type}, transport_api_version: V3, grpc_services: [{{ envoy_grpc: {{ cluster_name: xds-grpc }} }}] }}
  cds_config: {{ ads: {{}}, initial_fetch_timeout: 0s }}
  lds_config: {{ ads: {{}}, initial_fetch_timeout: 0s }}
static_resources:
  clusters:
  - {{ name: xds-grpc, load_assignment: {{ cluster_name: xds-grpc, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ pipe: {{ path: "{}" }} }} }} }}] }}] }} }}
"#,
        socket.display()
    );
    let message: BootstrapMessage = proto::json::from_yaml(&yaml).expect("legal YAML");
    let bootstrap = Arc::new(Bootstrap::try_from(&message).expect("a bootstrap"));
    let server =
        Server::start(bootstrap, Options::default(), stats::Store::default()).expect("workers");
    let mut discovery = Discovery::new(server.clone());
    let truth = discovery.truth();
    discovery.begin().await.expect("the static part");
    let running = tokio::task::spawn_local(discovery.run());
    until(&format!("{label}: live"), || server.state() == State::Live).await;
    // The answer to the last response comes after what it put in force.
    until(&format!("{label}: all types answered"), || {
        let answers = answers.lock().expect("not poisoned");
        ["CDS", "LDS"]
            .iter()
            .all(|t| answers.iter().any(|(kind, _)| kind == t))
    })
    .await;

    let mut refused = 0;
    for (kind, error) in answers.lock().expect("not poisoned").iter() {
        for line in error.iter().flat_map(|e| e.lines()) {
            assert!(captured::is_later(line), "{label}: {kind} refused: {line}");
            refused += 1;
        }
    }
    let truth = truth.borrow();
    let failed = truth
        .clusters
        .entries
        .values()
        .filter(|e| e.error.is_some())
        .count();
    assert_eq!(server.clusters().len() + failed, clusters + 1, "{label}");
    let failed = truth
        .listeners
        .entries
        .values()
        .filter(|e| e.error.is_some())
        .count();
    assert_eq!(server.listeners().len() + failed, listeners, "{label}");
    assert_eq!(
        truth.clusters.warming() + truth.listeners.warming(),
        0,
        "{label}"
    );
    if failed == 0 {
        assert_eq!(
            server.store.number("listener_manager.lds.update_success"),
            1,
            "{label}"
        );
    }
    running.abort();
    refused
}

#[test]
fn a_scripted_server_sends_every_captured_answer() {
    let Some(root) = captured::conformance() else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let answers = captured::answers(&root);
        let mut refused = 0;
        for (index, (label, answer)) in answers.iter().enumerate() {
            let mode = if index % 2 == 0 {
                Mode::Delta
            } else {
                Mode::Sotw
            };
            refused += one(label, answer, mode).await;
        }
        println!(
            "{} nodes; {refused} extensions of later versions refused",
            answers.len()
        );
    });
}
