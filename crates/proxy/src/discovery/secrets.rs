//! Secrets that come on streams of their own, or from files.
//!
//! As Envoy does it, each secret has its own stream to the SDS server (the agent's unix socket in a mesh). A stream that
//! breaks is opened again; what it brought stays in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use proto::envoy::{config::core::v3::Node, service::discovery::v3::DiscoveryResponse};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};
use xds::{
    Mode,
    client::{
        Incoming, Outgoing, Received, ReceivedResource, Service, Session, Target, Want, connect_to,
    },
    type_url::SDS,
};

use super::stream::next;
use crate::plan::{bootstrap::ConfigSourceKind, tls::SdsSecret};

/// What a source said.
#[derive(Debug)]
pub(super) enum Delivery {
    /// Secrets; the verdict goes back.
    Secrets {
        kind: ConfigSourceKind,
        received: Received,
        verdict: oneshot::Sender<Vec<(String, String)>>,
    },
    /// There is nobody to ask for this secret: its cluster or its server's socket does not exist. Nothing waits
    /// for it then; whoever needs it refuses connections until it comes.
    Nobody {
        kind: ConfigSourceKind,
        name: String,
    },
}

/// The streams and files that are followed.
#[derive(Debug)]
pub(super) struct SecretSources {
    tasks: BTreeMap<(ConfigSourceKind, String), Task>,
    /// Those whose cluster does not exist; said once.
    homeless: BTreeSet<(ConfigSourceKind, String)>,
    sender: mpsc::UnboundedSender<Delivery>,
    receiver: mpsc::UnboundedReceiver<Delivery>,
}

/// Ends with its owner.
#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Default for SecretSources {
    fn default() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            tasks: BTreeMap::new(),
            homeless: BTreeSet::new(),
            sender,
            receiver,
        }
    }
}

impl SecretSources {
    /// What came next. Never ends; can be dropped at any time.
    pub(super) async fn next(&mut self) -> Delivery {
        match self.receiver.recv().await {
            Some(delivery) => delivery,
            // The sender is ours.
            None => std::future::pending().await,
        }
    }

    /// Follows these secrets and no others. `target` tells where a cluster is.
    pub(super) fn follow(
        &mut self,
        wanted: &BTreeSet<SdsSecret>,
        node: &Node,
        target: impl Fn(&str) -> Result<Target, String>,
    ) {
        let wanted: BTreeSet<_> = wanted
            .iter()
            .filter_map(|secret| {
                let kind = &secret.source.as_ref()?.kind;
                (*kind != ConfigSourceKind::Ads).then(|| (kind.clone(), secret.name.to_string()))
            })
            .collect();
        self.tasks.retain(|key, _| wanted.contains(key));
        self.homeless.retain(|key| wanted.contains(key));
        for key in wanted {
            if self.tasks.contains_key(&key) {
                continue;
            }
            let (kind, name) = key.clone();
            let sender = self.sender.clone();
            let task = match &kind {
                ConfigSourceKind::Ads => continue,
                ConfigSourceKind::Path(path) => {
                    tokio::task::spawn_local(follow_file(path.clone(), kind.clone(), sender))
                }
                ConfigSourceKind::Grpc { cluster, delta } => {
                    let target = match target(cluster) {
                        Ok(target) => target,
                        Err(why) => {
                            // Asked again with the next change of configuration.
                            if self.homeless.insert(key) {
                                tracing::warn!("secret {name}: {why}");
                                // Its receiver is ours.
                                let _ = sender.send(Delivery::Nobody { kind, name });
                            }
                            continue;
                        }
                    };
                    let mode = if *delta { Mode::Delta } else { Mode::Sotw };
                    let mut session = Session::new(mode, node.clone());
                    session.watch(SDS, Want::Names([name.clone()].into()));
                    let (kind, asked) = (kind.clone(), name);
                    tokio::task::spawn_local(follow_stream(session, target, kind, asked, sender))
                }
            };
            self.tasks.insert(key, Task(task.abort_handle()));
        }
    }
}

async fn follow_stream(
    mut session: Session,
    target: Target,
    kind: ConfigSourceKind,
    name: String,
    sender: mpsc::UnboundedSender<Delivery>,
) {
    let mut told = false;
    let mut backoff = base::backoff::Backoff::new(BACK_OFF_BASE, BACK_OFF_CAP);
    loop {
        session.connected();
        let first: Vec<Outgoing> = std::iter::from_fn(|| session.next_request()).collect();
        let opened = connect_to(Service::Secrets, &target, session.mode(), &[], first).await;
        match opened {
            Err(error) => {
                let nobody = matches!(&target, Target::Unix(path) if !path.exists());
                if !told {
                    tracing::warn!("secret {name}: {error}");
                    told = true;
                    if nobody {
                        let (kind, name) = (kind.clone(), name.clone());
                        let _ = sender.send(Delivery::Nobody { kind, name });
                    }
                } else {
                    tracing::debug!("secret {name}: {error}");
                }
            }
            Ok(mut connection) => {
                told = false;
                tracing::debug!("SDS stream to {target:?} is open");
                loop {
                    match stream_turn(&mut connection.responses, &mut session, &kind, &sender).await
                    {
                        Ok(true) => backoff.reset(),
                        Ok(false) => break,
                        Err(why) => {
                            tracing::warn!("SDS stream to {target:?}: {why}");
                            break;
                        }
                    }
                    while let Some(request) = session.next_request() {
                        // A stream that is over is noticed by the next read.
                        let _ = connection.requests.send(request);
                    }
                }
            }
        }
        session.disconnected();
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

/// One response and its answer; `false` at the end of the stream.
async fn stream_turn(
    responses: &mut Incoming,
    session: &mut Session,
    kind: &ConfigSourceKind,
    sender: &mpsc::UnboundedSender<Delivery>,
) -> Result<bool, String> {
    let Some(received) = next(responses, session).await.map_err(|e| e.to_string())? else {
        return Ok(false);
    };
    let errors = deliver(received.clone(), kind, sender).await;
    session.answer(&received, &errors);
    Ok(true)
}

async fn deliver(
    received: Received,
    kind: &ConfigSourceKind,
    sender: &mpsc::UnboundedSender<Delivery>,
) -> Vec<(String, String)> {
    let (verdict, answer) = oneshot::channel();
    let delivery = Delivery::Secrets {
        kind: kind.clone(),
        received,
        verdict,
    };
    // Nobody listens only at the end of the process.
    if sender.send(delivery).is_err() {
        return Vec::new();
    }
    answer.await.unwrap_or_default()
}

/// Reads a file with a `DiscoveryResponse` now and whenever it has changed.
async fn follow_file(
    path: PathBuf,
    kind: ConfigSourceKind,
    sender: mpsc::UnboundedSender<Delivery>,
) {
    let mut seen = None;
    let mut ticks = tokio::time::interval(FILE_INTERVAL);
    loop {
        ticks.tick().await;
        let now = crate::transport::stamp(&path);
        if now == seen && now.is_some() {
            continue;
        }
        if now.is_none() && seen.is_none() {
            tracing::debug!("{} does not exist yet", path.display());
            continue;
        }
        seen = now;
        match read(&path) {
            Ok(received) => {
                for (name, why) in deliver(received, &kind, &sender).await {
                    tracing::warn!("{}: secret {name}: {why}", path.display());
                }
            }
            Err(why) => tracing::warn!("{}: {why}", path.display()),
        }
    }
}

fn read(path: &Path) -> Result<Received, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let response: DiscoveryResponse =
        proto::json::from_envoy_yaml(&text).map_err(|error| error.to_string())?;
    let resources = response
        .resources
        .into_iter()
        .map(|resource| {
            use prost::Message;
            use proto::envoy::extensions::transport_sockets::tls::v3::Secret;
            if resource.type_url != SDS {
                return Err(format!("{} is not a Secret", resource.type_url));
            }
            let secret = Secret::decode(&*resource.value).map_err(|error| error.to_string())?;
            Ok(ReceivedResource {
                name: secret.name,
                version: response.version_info.clone(),
                resource,
            })
        })
        .collect::<Result<_, String>>()?;
    Ok(Received {
        type_url: SDS.to_owned(),
        version: response.version_info,
        nonce: String::new(),
        resources,
        removed: Vec::new(),
        refused: Vec::new(),
        malformed: None,
    })
}

/// Waiting times between attempts, as for the control plane.
const BACK_OFF_BASE: Duration = Duration::from_millis(100);
const BACK_OFF_CAP: Duration = Duration::from_secs(1);
/// How often a file is looked at.
const FILE_INTERVAL: Duration = Duration::from_secs(1);
