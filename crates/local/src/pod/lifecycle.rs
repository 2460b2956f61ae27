//! One pod from its first process to its last: namespaces, init containers, containers, probes, restarts.

use std::{cell::RefCell, fs, path::PathBuf, process::Stdio, rc::Rc, time::Duration};

use base::clock::Clock;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, Command},
    sync::{Notify, watch},
    task::JoinHandle,
    time::sleep,
};

use super::{
    cgroup,
    container::{Backoff, Container, Role, SIDECAR_GRACE},
    environment::{References, hostname},
    hold::HoldSpec,
    image::Images,
    probe::{self, Probe},
    process,
    run::RunSpec,
    volume,
};
use crate::{
    error::{Doing, Error, Result},
    node::network::{self, DNS, GATEWAY},
    objects::{Key, list, text, token::Issuer, world::PodPlan},
    state::{ContainerStatus, PodStatus, StateDir, namespace_inode},
};

/// What all pods share.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) state: StateDir,
    pub(crate) program: PathBuf,
    pub(crate) images: Images,
    /// Told at each change of a pod's status.
    pub(crate) changed: Notify,
    pub(crate) config_maps: RefCell<std::collections::HashMap<Key, Value>>,
    pub(crate) secrets: RefCell<std::collections::HashMap<Key, Value>>,
    /// What peers in the mesh are trusted by, PEM.
    pub(crate) roots: RefCell<Option<String>>,
    /// Told when the three above have changed.
    pub(crate) sources: watch::Sender<()>,
    /// Signs the pods' tokens.
    pub(crate) issuer: Issuer,
    pub(crate) clock: Clock,
}

/// A pod's status, shared between the pod and the supervisor.
pub(crate) type SharedStatus = Rc<RefCell<PodStatus>>;

/// How a pod is asked to end; the duration is the grace that its containers get.
pub(crate) type Stop = watch::Receiver<Option<Duration>>;

/// Runs a pod until it is told to stop or has done its work. Failures to set it up are tried again.
pub(crate) async fn run_pod(
    context: Rc<Context>,
    plan: PodPlan,
    status: SharedStatus,
    mut stop: Stop,
) {
    let mut pause = Backoff::new();
    loop {
        let pod = Rc::new(Pod {
            context: context.clone(),
            plan: plan.clone(),
            status: status.clone(),
        });
        match pod.run(&mut stop).await {
            Ok(()) => return,
            Err(e) => {
                pod.update(|s| {
                    s.reason = e.to_string();
                    s.ready = false;
                });
                eprintln!("{e}");
            }
        }
        tokio::select! {
            () = sleep(pause.next()) => {}
            _ = stopping(&mut stop) => return,
        }
    }
}

pub(super) struct Pod {
    pub(super) context: Rc<Context>,
    pub(super) plan: PodPlan,
    pub(super) status: SharedStatus,
}

/// The process that holds the namespaces; they end with it.
struct Holder {
    child: Child,
    /// Closed on drop, which ends the process.
    _input: ChildStdin,
    pid: i32,
    net: u64,
    cgroup: Option<PathBuf>,
}

impl Pod {
    pub(super) fn name(&self) -> String {
        format!("{}.{}", self.plan.key.1, self.plan.key.0)
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut PodStatus)) {
        change(&mut self.status.borrow_mut());
        self.context.changed.notify_one();
    }

    fn fail(&self, message: impl std::fmt::Display) -> Error {
        Error::Pod {
            pod: self.name(),
            message: message.to_string(),
        }
    }

    async fn run(self: &Rc<Self>, stop: &mut Stop) -> Result<()> {
        let folder = self.context.state.pod(&self.plan.key.0, &self.plan.key.1);
        for part in ["root", "volumes"] {
            fs::create_dir_all(folder.join(part))
                .doing(|| format!("make {}", folder.join(part).display()))?;
        }
        let mut holder = self.hold(&folder).await?;
        let result = self.run_containers(&folder, &holder, stop).await;
        // Whatever is left in the namespace goes before the namespace does.
        process::signal_namespace("net", holder.net, Signal::SIGKILL);
        let _ = holder.child.wait().await;
        if let Some(path) = &holder.cgroup {
            cgroup::remove(path).await;
        }
        self.update(|s| {
            s.holder = 0;
            s.net_namespace = 0;
        });
        result
    }

    /// Makes the namespaces and plugs the pod into the node.
    async fn hold(&self, folder: &std::path::Path) -> Result<Holder> {
        let pod = &self.plan.object;
        let namespace = &self.plan.key.0;
        let host = hostname(pod).to_owned();
        let address = self.plan.address;
        let mut names = host.clone();
        let subdomain = text(pod, &["spec", "subdomain"]);
        if !subdomain.is_empty() {
            names = format!("{host}.{subdomain}.{namespace}.svc.cluster.local {host}");
        }
        let mut hosts = format!(
            "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{address} {names}\n"
        );
        for alias in list(pod, &["spec", "hostAliases"]) {
            let names: Vec<_> = list(alias, &["hostnames"])
                .iter()
                .filter_map(Value::as_str)
                .collect();
            hosts.push_str(&format!("{} {}\n", text(alias, &["ip"]), names.join(" ")));
        }
        let spec = HoldSpec {
            root: folder.join("root"),
            bin: self.context.state.bin(),
            hostname: host,
            address: address.to_string(),
            gateway: GATEWAY.to_string(),
            hosts,
            resolv_conf: format!(
                "nameserver {DNS}\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
            ),
        };
        let spec_file = folder.join("hold.json");
        let bytes = serde_json::to_vec(&spec).expect("a specification is plain data");
        fs::write(&spec_file, bytes).doing(|| format!("write {}", spec_file.display()))?;
        let mut child = Command::new(&self.context.program)
            .args(["local", "hold"])
            .arg(&spec_file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .process_group(0)
            .spawn()
            .doing(|| format!("start {}", self.context.program.display()))?;
        let pid = child.id().unwrap_or(0) as i32;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(self.fail("the holder has no streams"));
        };
        let mut lines = BufReader::new(output).lines();
        let gone = || self.fail("its namespaces could not be made (see supervisor.log)");
        if lines.next_line().await.ok().flatten().as_deref() != Some("namespaces") {
            return Err(gone());
        }
        network::plug(self.plan.index, pid)?;
        input
            .write_all(b"go\n")
            .await
            .doing(|| "tell the holder to go on".to_owned())?;
        if lines.next_line().await.ok().flatten().as_deref() != Some("up") {
            return Err(gone());
        }
        let net = namespace_inode(pid, "net");
        self.update(|s| {
            s.holder = pid;
            s.net_namespace = net;
        });
        Ok(Holder {
            child,
            _input: input,
            pid,
            net,
            cgroup: cgroup::make(self.context.state.root(), &self.name()),
        })
    }

    /// Starts what watches the rules that an init container wrote, or the programs: from the node, since nobody in the pod may. It is in
    /// the pod's network namespace and ends with all that is; what it says is in `guard.log`.
    fn guard(&self, containers: &[Rc<Container>], folder: &std::path::Path, holder: i32) {
        let writes_rules = |c: &&Rc<Container>| {
            let mut args = c.spec.args.iter();
            c.role == Role::Init && args.any(|a| a.ends_with("istio-iptables"))
        };
        let Some(container) = containers.iter().find(writes_rules) else {
            return;
        };
        let program = self.context.program.display().to_string();
        let spec = RunSpec {
            on_node: true,
            args: [&program, "intercept", "guard"].map(str::to_owned).to_vec(),
            env: vec![(
                "PATH".into(),
                "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            )],
            cgroup: None,
            holder,
            ..container.spec.clone()
        };
        let (file, log) = (folder.join("guard.json"), folder.join("guard.log"));
        if let Err(e) = process::start(&self.context.program, &spec, &file, &log) {
            eprintln!("pod {}: its rules are not guarded: {e}", self.name());
        }
    }

    async fn run_containers(
        self: &Rc<Self>,
        folder: &std::path::Path,
        holder: &Holder,
        stop: &mut Stop,
    ) -> Result<()> {
        let mut pod = self.plan.object.clone();
        pod["status"] =
            json!({"podIP": self.plan.address.to_string(), "hostIP": GATEWAY.to_string()});
        let volumes = folder.join("volumes");
        let mut prepared = Vec::new();
        {
            let config_maps = self.context.config_maps.borrow();
            let secrets = self.context.secrets.borrow();
            let roots = self.context.roots.borrow();
            let refs = References {
                pod: &pod,
                config_maps: &config_maps,
                secrets: &secrets,
                roots: roots.as_deref(),
            };
            volume::prepare(&volumes, &refs, &self.context.issuer).map_err(|e| self.fail(e))?;
            for field in ["initContainers", "containers"] {
                for container in list(&pod, &["spec", field]) {
                    let role = match (field, text(container, &["restartPolicy"])) {
                        ("initContainers", "Always") => Role::Sidecar,
                        ("initContainers", _) => Role::Init,
                        _ => Role::App,
                    };
                    let name = text(container, &["name"]).to_owned();
                    let fail = |e: String| process::in_pod(&self.name(), &name, e);
                    let mut spec = process::specify(
                        container,
                        &refs,
                        &self.context.images,
                        holder.pid,
                        &volumes,
                    )
                    .map_err(fail)?;
                    spec.cgroup = holder.cgroup.clone();
                    if spec.on_node {
                        let cgroup = holder.cgroup.as_ref().ok_or_else(|| {
                            fail("interception mode EBPF needs cgroup2: mount -t cgroup2".into())
                        })?;
                        spec.args
                            .insert(0, self.context.program.display().to_string());
                        spec.args
                            .extend(["--ebpf-cgroup".into(), cgroup.display().to_string()]);
                        // The pod's resolvers are not known on the node, so every query is
                        // captured where any is, as by the CNI plug-in.
                        spec.args.push("--capture-all-dns".into());
                    }
                    let probe = |field| Probe::read(&pod, container, field).map_err(fail);
                    let hook = |field: &str| match &container["lifecycle"][field] {
                        Value::Null => Ok(None),
                        value => probe::action(&pod, container, value)
                            .map(Some)
                            .map_err(|e| fail(format!("{field}: {e}"))),
                    };
                    prepared.push(Rc::new(Container {
                        pod: self.clone(),
                        role,
                        spec,
                        startup: probe("startupProbe")?,
                        readiness: probe("readinessProbe")?,
                        liveness: probe("livenessProbe")?,
                        post_start: hook("postStart")?,
                        pre_stop: hook("preStop")?,
                        folder: folder.to_owned(),
                        name,
                    }));
                }
            }
        }
        let keeper = self.clone().keep_volumes(volumes.clone(), pod.clone());
        let _keeper = Aborted(tokio::task::spawn_local(keeper));
        self.update(|s| {
            s.phase = "Pending".to_owned();
            s.reason.clear();
            s.default_container = default_container(&pod);
            s.containers = prepared
                .iter()
                .map(|c| ContainerStatus {
                    name: c.name.clone(),
                    init: c.role == Role::Init,
                    state: "waiting".to_owned(),
                    uid: c.spec.uid,
                    ..ContainerStatus::default()
                })
                .collect();
        });
        let policy = text(&pod, &["spec", "restartPolicy"]).to_owned();
        let mut tasks = Vec::new();
        for container in &prepared {
            if container.role == Role::Init {
                tokio::select! {
                    done = container.run_once_to_success(&policy) => if !done {
                        self.update(|s| s.phase = "Failed".to_owned());
                        stopping(stop).await;
                        return Ok(());
                    },
                    _ = stopping(stop) => return Ok(()),
                }
                continue;
            }
            let (started, mut wait_started) = watch::channel(false);
            let policy = if container.role == Role::Sidecar {
                "Always".to_owned()
            } else {
                policy.clone()
            };
            let task = container
                .clone()
                .keep_running(policy, started, stop.clone());
            tasks.push((container.clone(), tokio::task::spawn_local(task)));
            // A sidecar must have started before what follows; a hook holds what follows back too.
            if container.role == Role::Sidecar || container.post_start.is_some() {
                tokio::select! {
                    _ = wait_started.wait_for(|s| *s) => {}
                    _ = stopping(stop) => break,
                }
            }
        }
        self.guard(&prepared, folder, holder.pid);
        self.update(|s| s.phase = "Running".to_owned());
        let apps_done = async {
            let mut all_well = true;
            for (container, task) in &mut tasks {
                if container.role == Role::App {
                    all_well &= task.await.unwrap_or(false);
                }
            }
            all_well
        };
        let finished = tokio::select! {
            all_well = apps_done => Some(all_well),
            _ = stopping(stop) => None,
        };
        if let Some(all_well) = finished {
            // The work is done; sidecars end with it.
            self.update(|s| {
                s.phase = if all_well { "Succeeded" } else { "Failed" }.to_owned();
                s.ready = false;
            });
            for (container, task) in &tasks {
                if container.role == Role::Sidecar {
                    container.end(SIDECAR_GRACE).await;
                    task.abort();
                }
            }
            stopping(stop).await;
            return Ok(());
        }
        let grace = stop.borrow().unwrap_or(SIDECAR_GRACE);
        // Apps first, sidecars after them, as the kubelet does.
        for role in [Role::App, Role::Sidecar] {
            let ends = tasks
                .iter()
                .filter(|(c, _)| c.role == role)
                .map(|(c, _)| c.end(grace));
            join_all(ends).await;
        }
        for (_, task) in &tasks {
            task.abort();
        }
        Ok(())
    }
}

/// A task that ends with its owner.
struct Aborted(JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Pod {
    /// Gives the pod new tokens in time, and new content of what it mounts.
    async fn keep_volumes(self: Rc<Self>, folder: PathBuf, pod: Value) {
        let mut sources = self.context.sources.subscribe();
        // Those that were there already may have changed while the volumes were made.
        sources.mark_changed();
        // As the kubelet does: when four fifths of a token's life are over.
        let life = volume::token_life(&pod).mul_f64(0.8);
        let mut signed = self.context.clock.now();
        loop {
            tokio::select! {
                changed = sources.changed() => if changed.is_err() { return },
                () = sleep(TOKEN_LOOK) => {}
            }
            let now = self.context.clock.now();
            let due = now.duration_since(signed).map_or(true, |age| age >= life);
            if due {
                signed = now;
            }
            let config_maps = self.context.config_maps.borrow();
            let secrets = self.context.secrets.borrow();
            let roots = self.context.roots.borrow();
            let refs = References {
                pod: &pod,
                config_maps: &config_maps,
                secrets: &secrets,
                roots: roots.as_deref(),
            };
            let issuer = due.then_some(&self.context.issuer);
            if let Err(e) = volume::update(&folder, &refs, issuer) {
                eprintln!("{}", self.fail(e));
            }
        }
    }
}

/// How often the age of tokens is looked at: the clock may be set.
const TOKEN_LOOK: Duration = Duration::from_secs(30);

/// The container that commands mean where none is named.
fn default_container(pod: &Value) -> String {
    let given = pod["metadata"]["annotations"]["kubectl.kubernetes.io/default-container"].as_str();
    let first = list(pod, &["spec", "containers"])
        .first()
        .map(|c| text(c, &["name"]));
    given.or(first).unwrap_or("").to_owned()
}

pub(super) async fn stopping(stop: &mut Stop) {
    // The sender lives as long as the supervisor: an error means the same as a request.
    let _ = stop.wait_for(Option::is_some).await;
}

async fn join_all(futures: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut pending: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        pending.retain_mut(|f| f.as_mut().poll(cx).is_pending());
        if pending.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
