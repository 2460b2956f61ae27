//! What the control plane does in a cluster beside serving proxies: it shares the authority's key with its other
//! replicas, asks the API server about tokens, and (one replica at a time) writes back roots and reports.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use config::{ObjectKey, Problem, Severity, Snapshot};
use kubernetes::{
    Client, ClusterError, apply,
    gateway_status::{StatusWriter, Wanted},
    lease::{self, Election, Timing},
    rejections::{self, Board, Rejections, Role},
    review, secret,
    status::{Message, Report, Reporter, is_reported},
    trust,
    webhook::{self, Ours},
};
use tokio::{sync::watch, task::JoinSet};
use tracing::{debug, info, warn};

use crate::{
    ca::token::{AUDIENCE, Review, Reviewed, TokenError, TokenReviewer},
    gateway_api::{self, CONTROLLER, MESH_CONTROLLER},
    server::Server,
    webhook::Injector,
};

/// Who this replica is.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Its pod's name: how it calls itself in elections.
    pub name: String,
    /// Its namespace, where leases, settings and the authority's key are.
    pub namespace: String,
    /// The revision that it serves; `default` for the one without a name.
    pub revision: String,
}

impl Replica {
    /// The service by which the API server and proxies call this revision.
    pub fn service(&self) -> String {
        kubernetes::of_revision("istiod", &self.revision)
    }
}

/// Reviews tokens by asking the API server.
pub struct ClusterTokens(pub Client);

impl std::fmt::Debug for ClusterTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterTokens")
    }
}

impl TokenReviewer for ClusterTokens {
    fn review<'a>(&'a self, token: &'a str) -> Review<'a> {
        Box::pin(async move {
            match review::review(&self.0, token, AUDIENCE).await {
                Ok(subject) => Ok(Reviewed {
                    namespace: subject.namespace,
                    service_account: subject.service_account,
                    pod: subject.pod,
                }),
                Err(e) => Err(TokenError::Cluster(e.to_string())),
            }
        })
    }
}

/// The Secret of a self-signed authority (Istio's name and type, so that either control plane takes over the other's).
const CA_SECRET: &str = "istio-ca-secret";
const CA_TYPE: &str = "istio.io/ca-root";
const CA_FILES: [&str; 2] = ["ca-cert.pem", "ca-key.pem"];

/// Brings the authority's key that replicas share into the state folder. Whether there is one already.
pub async fn take_authority(
    client: &Client,
    replica: &Replica,
    state: &Path,
) -> Result<bool, ClusterError> {
    secret::take(client, &replica.namespace, CA_SECRET, state).await
}

/// Shares the key that was just made in the state folder. Where another replica was faster, its key is taken over and
/// the answer is `false`: the authority has to be opened again.
pub async fn share_authority(
    client: &Client,
    replica: &Replica,
    state: &Path,
) -> Result<bool, ClusterError> {
    let made = secret::give(
        client,
        &replica.namespace,
        CA_SECRET,
        CA_TYPE,
        state,
        &CA_FILES,
    )
    .await?;
    if made {
        info!(
            "the key of the certificate authority is in Secret {}/{CA_SECRET}",
            replica.namespace
        );
    } else {
        take_authority(client, replica, state).await?;
    }
    Ok(made)
}

/// Starts what runs beside the servers; ends with `stop`, and gives its leases back.
pub fn start(
    client: &Client,
    replica: &Replica,
    server: &Arc<Server>,
    roots: &watch::Receiver<Arc<str>>,
    stop: &watch::Receiver<()>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let elect = |name: &str| {
        Election::new(
            client,
            &replica.namespace,
            name,
            &replica.name,
            Timing::default(),
        )
    };
    // Roots are one for all revisions, reports are each revision's own.
    let (election, stopped) = (elect(lease::NAMESPACES), stop.clone());
    let (writer, of_all) = (client.clone(), roots.clone());
    tasks.spawn(async move {
        election
            .run(stopped, || trust::run(writer.clone(), of_all.clone()))
            .await;
    });
    let election = elect(&kubernetes::of_revision(lease::STATUS, &replica.revision));
    let reporting = Arc::new(Reporting {
        server: server.clone(),
        revision: replica.revision.clone(),
        others: watch::Sender::default(),
        leads: AtomicBool::new(false),
    });
    let (stopped, writer, leading) = (stop.clone(), client.clone(), reporting.clone());
    tasks.spawn(async move {
        election
            .run(stopped, || report(writer.clone(), leading.clone()))
            .await;
    });
    let board = Board::new(
        client,
        &replica.namespace,
        &replica.revision,
        &replica.name,
        rejections::Timing::default(),
    );
    let stopped = stop.clone();
    tasks.spawn(async move {
        let role = || reporting.role();
        board.run(stopped, role, &reporting.others).await;
    });
    let election = elect(&kubernetes::of_revision(lease::GATEWAYS, &replica.revision));
    let (stopped, writer) = (stop.clone(), client.clone());
    let (deploying, injector) = (
        server.clone(),
        Arc::new(Injector::new(&replica.namespace, &replica.revision)),
    );
    tasks.spawn(async move {
        election
            .run(stopped, || {
                deploy(writer.clone(), deploying.clone(), injector.clone())
            })
            .await;
    });
    // Every replica mends webhooks: each of them is called, and the outcome is the same.
    let revision = match replica.revision.as_str() {
        "" => "default",
        revision => revision,
    };
    let ours = Ours {
        selector: format!("istio.io/rev={revision}"),
        namespace: replica.namespace.clone(),
        service: replica.service(),
    };
    let (client, roots, mut stopped) = (client.clone(), roots.clone(), stop.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = webhook::run(client, ours, roots) => {}
            _ = stopped.changed() => {}
        }
    });
    tasks
}

/// What replicas know of objects that are wrong.
struct Reporting {
    server: Arc<Server>,
    revision: String,
    /// What proxies of other replicas reject.
    others: watch::Sender<Rejections>,
    /// Whether this replica writes what all of them know.
    leads: AtomicBool,
}

impl Reporting {
    fn role(&self) -> Role {
        match self.leads.load(Ordering::Relaxed) {
            true => Role::Leads,
            false => Role::Tells(rejected(&self.server)),
        }
    }

    /// Leads until the answer is dropped.
    fn lead(self: &Arc<Self>) -> impl Drop + use<> {
        struct Leads(Arc<Reporting>);
        impl Drop for Leads {
            fn drop(&mut self) {
                self.0.leads.store(false, Ordering::Relaxed);
            }
        }
        self.leads.store(true, Ordering::Relaxed);
        Leads(self.clone())
    }
}

/// Writes what is wrong with objects below their status, while this replica leads.
async fn report(client: Client, reporting: Arc<Reporting>) {
    let _leads = reporting.lead();
    let server = &reporting.server;
    let (began, mut is_taken_over) = (Instant::now(), false);
    let mut reporter = Reporter::new(&reporting.revision);
    let mut statuses = StatusWriter::default();
    // The state of the mesh of which everything was said.
    let mut told = None;
    loop {
        // Proxies of a leader that is gone come back by then, and reject again what they rejected.
        if !is_taken_over && began.elapsed() >= TAKE_OVER_AFTER {
            is_taken_over = reporter.take_over(&client).await;
        }
        let others = reporting.others.borrow().clone();
        reporter.write(&client, &reports(server, &others)).await;
        if let Some(push) = server.current()
            && told != Some(push.generation)
        {
            let snapshot = push.mesh.snapshot();
            let wanted = gateway_api::status::all(&push.mesh)
                .into_iter()
                .map(|(key, status)| {
                    let object = snapshot.get(&key);
                    let uid = object.map_or_else(String::new, |o| o.meta().uid.clone());
                    (key, Wanted { uid, status })
                })
                .collect();
            let ours = [CONTROLLER, MESH_CONTROLLER];
            if statuses.write(&client, &wanted, &ours).await {
                told = Some(push.generation);
            }
        }
        tokio::time::sleep(REPORT_EVERY).await;
    }
}

/// Brings what managed Gateways are run by to what it should be, while this replica leads.
async fn deploy(client: Client, server: Arc<Server>, injector: Arc<Injector>) {
    let mut applied: BTreeMap<String, gateway_api::deploy::Deployed> = BTreeMap::new();
    let mut asked_for_class = None;
    // The state of the mesh for which everything is there.
    let mut done = None;
    loop {
        tokio::time::sleep(REPORT_EVERY).await;
        let Some(push) = server.current() else {
            continue;
        };
        let snapshot = push.mesh.snapshot();
        let class = gateway_api::deploy::class();
        let class_name = class["metadata"]["name"].as_str().unwrap_or_default();
        let long_ago = |at: Instant| at.elapsed() >= CLASS_EVERY;
        if snapshot.gateway_classes.get("", class_name).is_none()
            && asked_for_class.is_none_or(long_ago)
        {
            asked_for_class = Some(Instant::now());
            // A cluster without Gateway API answers 404: it is asked again later.
            if let Err(e) = apply::apply(&client, &class).await {
                debug!("GatewayClass {class_name}: {e}");
            }
        }
        if done == Some(push.generation) {
            continue;
        }
        done = Some(push.generation);
        let wanted = gateway_api::deploy::all(&push.mesh, &injector.settings(snapshot));
        applied.retain(|gateway, _| wanted.iter().any(|w| w.gateway == *gateway));
        for deployed in wanted {
            if applied.get(&deployed.gateway) == Some(&deployed) {
                continue;
            }
            match bring(&client, &deployed).await {
                Ok(()) => {
                    applied.insert(deployed.gateway.clone(), deployed);
                }
                Err(e) => {
                    done = None;
                    warn!("Gateway {}: {e}; tried again", deployed.gateway);
                }
            }
        }
    }
}

async fn bring(
    client: &Client,
    deployed: &gateway_api::deploy::Deployed,
) -> Result<(), ClusterError> {
    match &deployed.objects {
        // It stays so until the Gateway or the settings change.
        Err(why) => warn!(
            "Gateway {}: no Deployment can be made: {why}",
            deployed.gateway
        ),
        Ok(objects) => {
            for object in objects {
                apply::apply(client, object).await?;
            }
            info!(
                "Gateway {}: its Deployment and Service are up to date",
                deployed.gateway
            );
        }
    }
    Ok(())
}

/// What is to be said of each object: by the store, by analysis, and by proxies (those of `others` as well) that
/// rejected what was made of it.
fn reports(server: &Server, others: &Rejections) -> BTreeMap<ObjectKey, Report> {
    let Some(push) = server.current() else {
        return BTreeMap::new();
    };
    merged(
        push.mesh.snapshot(),
        &server.problems(),
        &rejected(server),
        others,
    )
}

fn merged(
    snapshot: &Snapshot,
    problems: &[Problem],
    ours: &Rejections,
    others: &Rejections,
) -> BTreeMap<ObjectKey, Report> {
    let mut out: BTreeMap<ObjectKey, Report> = BTreeMap::new();
    let mut say = |key: &ObjectKey, message: Message| {
        if is_reported(key.kind) {
            let report = out.entry(key.clone()).or_insert_with(|| {
                let object = snapshot.get(key);
                let meta = object.as_ref().map(|o| o.meta());
                Report {
                    uid: meta.map_or_else(String::new, |m| m.uid.clone()),
                    generation: meta.map_or(0, |m| m.generation),
                    messages: BTreeSet::new(),
                }
            });
            report.messages.insert(message);
        }
    };
    for p in problems {
        if let Some(key) = &p.object {
            let message = Message {
                is_error: p.severity == Severity::Error,
                field: p.field.clone(),
                text: p.message.clone(),
            };
            say(key, message);
        }
    }
    // Another replica may know of objects that did not come here yet, or are gone.
    let others = others.iter().filter(|(key, _)| snapshot.get(key).is_some());
    for (key, why) in ours.iter().chain(others) {
        let message = Message {
            is_error: true,
            field: String::new(),
            text: format!("rejected by a proxy: {why}"),
        };
        say(key, message);
    }
    out
}

/// What this replica's own proxies reject.
fn rejected(server: &Server) -> Rejections {
    let mut out = Rejections::new();
    for connection in server.connections() {
        for rejection in connection.rejections() {
            let origins = rejection.resources.iter().flat_map(|(_, origins)| origins);
            for key in origins.map(|o| o.key()).filter(|k| is_reported(k.kind)) {
                let why = rejections::shortened(&rejection.message).to_owned();
                out.insert((key.clone(), why));
            }
        }
    }
    out
}

/// Where an election gets its identity from when no pod name is given.
pub fn host_name() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/hostname") {
        Ok(name) => name.trim().to_owned(),
        Err(e) => {
            warn!("the host's name cannot be read: {e}");
            "outrigger".to_owned()
        }
    }
}

const REPORT_EVERY: Duration = Duration::from_secs(1);
/// When a leader takes back what the one before it reported and nobody says any more.
const TAKE_OVER_AFTER: Duration = Duration::from_secs(30);
/// How often a GatewayClass that is missing is put in.
const CLASS_EVERY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use config::{Kind, decode};
    use serde_json::json;

    use super::*;

    fn snapshot() -> Snapshot {
        let object = json!({
            "apiVersion": "networking.istio.io/v1alpha3", "kind": "EnvoyFilter",
            "metadata": {"name": "one", "namespace": "shop", "uid": "u-1", "generation": 4},
            "spec": {},
        });
        let objects = decode::value(&object, &Path::new("cluster").into()).objects;
        let before = Snapshot::with_mesh_in("istio-system", "istio");
        Snapshot::of_cluster(objects, &before).0
    }

    fn rejections(all: &[(&str, &str)]) -> Rejections {
        let key = |name: &str| ObjectKey::new(Kind::EnvoyFilter, "shop", name);
        all.iter().map(|(n, why)| (key(n), (*why).into())).collect()
    }

    #[test]
    fn rejections_heard_here_and_by_other_replicas_are_one_report() {
        let ours = rejections(&[("one", "no such filter")]);
        let others = rejections(&[
            ("one", "no such filter"),
            ("one", "worse"),
            ("of-elsewhere", "unknown here"),
        ]);
        let reports = merged(&snapshot(), &[], &ours, &others);
        let (key, report) = reports.first_key_value().unwrap();
        assert_eq!((reports.len(), key.name.as_str()), (1, "one"));
        assert_eq!((report.uid.as_str(), report.generation), ("u-1", 4));
        let said: Vec<_> = report.messages.iter().map(|m| m.text.as_str()).collect();
        assert_eq!(
            said,
            [
                "rejected by a proxy: no such filter",
                "rejected by a proxy: worse"
            ]
        );
        assert!(report.messages.iter().all(|m| m.is_error));
    }
}
