//! The process behind a running mesh: `outrigger local supervise`, started by `up`.
//!
//! It makes itself a network and a mount namespace, so that the bridge, the service addresses and the mounts belong to
//! it and end with it; then it follows the user's folder and keeps pods, network and published objects in step.
//! Everything happens on one thread, which is also the parent of every container: containers die with it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use base::clock::Clock;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    task::{JoinHandle, LocalSet},
    time::sleep,
};

use crate::{
    error::{Doing, Result},
    node::{
        dns::{self, Answer, SharedTable},
        forward::{Forwarder, Forwarders, HostSockets},
        network::{self, DNS, GATEWAY},
        services::{self, VirtualPort},
    },
    objects::{
        Key,
        builtin::{Folders, TOKEN_KEYS},
        document::{self, SourceFile},
        publish::Publisher,
        service::{Backend, port_name},
        text,
        token::Issuer,
        world::{Builder, PodPlan, World},
    },
    pod::{
        environment::hostname,
        image::{Images, PROXY_USER},
        lifecycle::{Context, SharedStatus, run_pod},
        root::directory,
    },
    state::{Forward, PodStatus, StateDir, Status, process_start, write_atomically},
};

/// Runs the mesh of a folder until SIGTERM.
pub(crate) fn supervise(folder: &Path, state: &StateDir, images: Images) -> Result<()> {
    // Away from the terminal of whoever started it: Ctrl-C there is not meant for the mesh.
    let _ = nix::unistd::setsid();
    let host = HostSockets::start();
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .doing(|| "make namespaces for the mesh (root is needed)".to_owned())?;
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .doing(|| "keep the mesh's mounts to itself".to_owned())?;
    // Few machines come without it, and it ends with the mesh. Where it cannot be had, a pod of mode EBPF says so.
    let _ = intercept::ebpf::mount();
    network::set_up_node()?;
    let program = install_programs(state)?;
    let publisher = Publisher::new(&state.config())?;
    let clock = Clock::system();
    let issuer = Issuer::new(clock.clone())?;
    let folders = make_folders(state, &issuer)?;
    let context = Rc::new(Context {
        state: state.clone(),
        program,
        images,
        changed: Notify::new(),
        config_maps: RefCell::default(),
        secrets: RefCell::default(),
        roots: RefCell::default(),
        sources: watch::Sender::new(()),
        issuer,
        clock,
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .doing(|| "start the runtime".to_owned())?;
    let mut mesh = Mesh {
        folder: folder.to_owned(),
        builder: Builder::new(folders),
        context,
        host,
        world: World::default(),
        pods: BTreeMap::new(),
        publisher,
        table: SharedTable::default(),
        rules: None,
        forwarders: Forwarders::new(),
        settled: false,
        problems: Vec::new(),
    };
    LocalSet::new().block_on(&runtime, mesh.run())
}

/// What the control plane works with beside the objects: a folder of its own for the keys of its authority, which
/// outlives its process, and the public key of who signs tokens here.
fn make_folders(state: &StateDir, issuer: &Issuer) -> Result<Folders> {
    let folders = Folders {
        config: state.config(),
        authority: state.authority(),
        token_keys: state.token_keys(),
    };
    directory(&folders.authority, 0o700)?;
    std::os::unix::fs::chown(&folders.authority, Some(PROXY_USER), Some(PROXY_USER))
        .doing(|| format!("give {} to the control plane", folders.authority.display()))?;
    directory(&folders.token_keys, 0o755)?;
    write_atomically(
        &folders.token_keys.join(TOKEN_KEYS),
        issuer.jwks().as_bytes(),
    )?;
    Ok(folders)
}

/// Makes this program, and the names by which pod templates call it, appear in the state folder's `bin`.
///
/// It is mounted there, not copied: a debug build is large, and the folder may be in memory. A program that others may
/// not read is copied.
fn install_programs(state: &StateDir) -> Result<PathBuf> {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let bin = state.bin();
    directory(&bin, 0o755)?;
    mount(
        Some("tmpfs"),
        &bin,
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        Some("mode=755"),
    )
    .doing(|| format!("mount a tmpfs on {}", bin.display()))?;
    let own = std::env::current_exe().doing(|| "find this program".to_owned())?;
    let program = bin.join("outrigger");
    let mode = fs::metadata(&own)
        .doing(|| format!("look at {}", own.display()))?
        .permissions()
        .mode();
    if mode & 0o005 == 0o005 {
        fs::write(&program, b"").doing(|| format!("write {}", program.display()))?;
        mount(
            Some(&own),
            &program,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .doing(|| format!("mount {} on {}", own.display(), program.display()))?;
    } else {
        fs::copy(&own, &program).doing(|| format!("copy {}", own.display()))?;
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&program, open).doing(|| format!("open {}", program.display()))?;
    }
    for name in ["envoy", "pilot-agent", "istio-iptables", "pilot-discovery"] {
        symlink("outrigger", bin.join(name)).doing(|| format!("link {name}"))?;
    }
    Ok(program)
}

struct Mesh {
    folder: PathBuf,
    builder: Builder,
    context: Rc<Context>,
    host: HostSockets,
    world: World,
    pods: BTreeMap<Key, Running>,
    publisher: Publisher,
    table: SharedTable,
    rules: Option<Vec<VirtualPort>>,
    forwarders: Forwarders,
    settled: bool,
    problems: Vec<String>,
}

/// A pod that runs, or is ending.
struct Running {
    plan: PodPlan,
    status: SharedStatus,
    stop: watch::Sender<Option<Duration>>,
    task: JoinHandle<()>,
    ending: bool,
}

impl Mesh {
    async fn run(&mut self) -> Result<()> {
        let what = || "listen for signals".to_owned();
        let mut terminate = signal(SignalKind::terminate()).doing(what)?;
        let mut interrupt = signal(SignalKind::interrupt()).doing(what)?;
        let table = self.table.clone();
        let name_server = tokio::task::spawn_local(async move {
            if let Err(e) = dns::serve(table, SocketAddr::from((DNS, 53))).await {
                eprintln!("the name server has stopped: {e}");
            }
        });
        let edited = Rc::new(Notify::new());
        let _watch = watch_folder(&self.folder, edited.clone())?;
        let rooted = Rc::new(Notify::new());
        let _roots = watch_folder(&self.context.state.authority(), rooted.clone())?;
        self.read_folder().await;
        self.read_roots();
        self.step().await?;
        loop {
            let context = self.context.clone();
            tokio::select! {
                () = edited.notified() => {
                    // An editor writes in several steps: wait until it has been quiet for a moment.
                    let patience = tokio::time::Instant::now() + PATIENCE;
                    while tokio::time::Instant::now() < patience
                        && tokio::time::timeout(QUIET, edited.notified()).await.is_ok()
                    {}
                    self.read_folder().await;
                }
                () = async { tokio::select! {
                    () = context.changed.notified() => sleep(GATHER).await,
                    () = rooted.notified() => self.read_roots(),
                } } => {}
                _ = async { tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} } } => break,
            }
            // Nothing that fails here ends the mesh: it is reported, and tried again at the next change.
            match self.step().await {
                Ok(()) => self.problems.clear(),
                Err(e) => {
                    eprintln!("{e}");
                    self.problems = vec![e.to_string()];
                }
            }
        }
        name_server.abort();
        self.shut_down().await;
        Ok(())
    }

    async fn read_folder(&mut self) {
        let mut files = document::read_folder(&self.folder);
        // A file that was emptied this very moment is being written: its content comes in a moment.
        for _ in 0..10 {
            let half_written = files
                .as_ref()
                .is_ok_and(|files| files.iter().any(|f| self.is_being_written(f)));
            if !half_written {
                break;
            }
            sleep(QUIET).await;
            files = document::read_folder(&self.folder);
        }
        match files {
            Ok(files) => {
                let world = self.builder.build(&files, &self.world);
                for problem in world
                    .problems
                    .iter()
                    .filter(|p| !self.world.problems.contains(p))
                {
                    eprintln!("{problem}");
                }
                *self.context.config_maps.borrow_mut() = world.config_maps.clone();
                *self.context.secrets.borrow_mut() = world.secrets.clone();
                self.context.sources.send_replace(());
                self.world = world;
            }
            Err(e) => {
                eprintln!("{e}");
                let text = e.to_string();
                if !self.world.problems.contains(&text) {
                    self.world.problems.push(text);
                }
            }
        }
    }

    /// The roots that the control plane gives out: each namespace has them as a ConfigMap.
    fn read_roots(&self) {
        let path = self.context.state.authority().join(ROOTS);
        let Ok(text) = fs::read_to_string(&path) else {
            // It is there once the control plane has made its authority.
            return;
        };
        let roots = Some(text).filter(|t| !t.is_empty());
        if *self.context.roots.borrow() != roots {
            *self.context.roots.borrow_mut() = roots;
            self.context.sources.send_replace(());
        }
    }

    fn is_being_written(&self, file: &SourceFile) -> bool {
        let had_content = self
            .world
            .files
            .get(&file.path)
            .is_some_and(|t| !t.trim().is_empty());
        file.text.trim().is_empty() && had_content
    }

    /// Brings everything in step with the folder and with what the pods report.
    async fn step(&mut self) -> Result<()> {
        self.end_unwanted();
        let backends = self.backends();
        self.route(&backends)?;
        self.name(&backends);
        self.forward(&backends).await;
        self.publish()?;
        self.start_wanted();
        let up = |p: &Running| {
            let s = p.status.borrow();
            s.ready || s.phase == "Succeeded"
        };
        if !self.settled && self.pods.len() == self.world.pods.len() && self.pods.values().all(up) {
            self.settled = true;
        }
        self.context.state.write_status(&self.status())
    }

    /// Pods that the folder no longer wants, or wants otherwise, leave the published objects at once and then end.
    fn end_unwanted(&mut self) {
        for (key, running) in &mut self.pods {
            let wanted = self
                .world
                .pods
                .get(key)
                .is_some_and(|p| p.fingerprint == running.plan.fingerprint);
            if !wanted && !running.ending {
                running.ending = true;
                let seconds = running.plan.object["spec"]["terminationGracePeriodSeconds"]
                    .as_u64()
                    .unwrap_or(30);
                let _ = running.stop.send(Some(Duration::from_secs(seconds)));
            }
        }
        let folder = |key: &Key| self.context.state.pod(&key.0, &key.1);
        self.pods.retain(|key, running| {
            if running.ending && running.task.is_finished() {
                // What cannot be removed now is removed by `down`.
                let _ = fs::remove_dir_all(folder(key));
                return false;
            }
            true
        });
    }

    fn start_wanted(&mut self) {
        for (key, plan) in &self.world.pods {
            if self.pods.contains_key(key) {
                continue;
            }
            let status = SharedStatus::new(RefCell::new(PodStatus {
                name: key.1.clone(),
                namespace: key.0.clone(),
                workload: plan.workload.clone(),
                address: plan.address.to_string(),
                phase: "Pending".to_owned(),
                ..PodStatus::default()
            }));
            let (stop, stopped) = watch::channel(None);
            let context = self.context.clone();
            let (pod_plan, pod_status) = (plan.clone(), status.clone());
            let task = tokio::task::spawn_local(async move {
                run_pod(context.clone(), pod_plan, pod_status, stopped).await;
                context.changed.notify_one();
            });
            self.pods.insert(
                key.clone(),
                Running {
                    plan: plan.clone(),
                    status,
                    stop,
                    task,
                    ending: false,
                },
            );
        }
    }

    fn backends(&self) -> Vec<Backend> {
        self.pods
            .values()
            .filter(|r| !r.ending)
            .map(|r| Backend {
                namespace: r.plan.key.0.clone(),
                object: r.plan.object.clone(),
                address: r.plan.address,
                ready: r.status.borrow().ready,
            })
            .collect()
    }

    /// Service addresses, put in force where they changed.
    fn route(&mut self, backends: &[Backend]) -> Result<()> {
        let rules: Vec<_> = self
            .world
            .services
            .iter()
            .flat_map(|s| s.virtual_ports(backends, &self.world.slices))
            .collect();
        if self.rules.as_ref() != Some(&rules) {
            services::apply(&rules)?;
            self.rules = Some(rules);
        }
        Ok(())
    }

    /// The names that pods can look up.
    fn name(&self, backends: &[Backend]) {
        let mut names: HashMap<String, Answer> = self.world.entry_names.clone();
        for service in &self.world.services {
            let host = service.host();
            let external = text(&service.object, &["spec", "externalName"]);
            if !external.is_empty() {
                names.insert(
                    host,
                    Answer::Alias(external.trim_end_matches('.').to_ascii_lowercase()),
                );
                continue;
            }
            if let Some(address) = service.address {
                names.insert(host, Answer::Addresses(vec![address]));
                continue;
            }
            if service.is_headless() {
                let pods: Vec<_> = service.backends(backends).collect();
                for pod in &pods {
                    if text(&pod.object, &["spec", "subdomain"]) == service.key.1 {
                        let name = format!("{}.{host}", hostname(&pod.object));
                        names.insert(name, Answer::Addresses(vec![pod.address]));
                    }
                }
                names.insert(
                    host,
                    Answer::Addresses(pods.iter().map(|p| p.address).collect()),
                );
            }
        }
        self.table.borrow_mut().replace(names);
    }

    /// Ports of this machine that lead to services which ask for it.
    async fn forward(&mut self, backends: &[Backend]) {
        let mut wanted = HashMap::new();
        for service in &self.world.services {
            for (port, number) in service.forwards() {
                let endpoints = service.endpoints(&port, backends, &self.world.slices);
                let key = (
                    service.key.0.clone(),
                    service.key.1.clone(),
                    port["port"].as_u64().unwrap_or(0) as u16,
                );
                wanted.insert(key, (number, endpoints));
            }
        }
        self.forwarders.retain(|key, _| wanted.contains_key(key));
        for (key, (number, endpoints)) in wanted {
            if !self.forwarders.contains_key(&key) {
                match Forwarder::open(&self.host, number).await {
                    Ok(forwarder) => {
                        self.forwarders.insert(key.clone(), forwarder);
                    }
                    Err(e) => eprintln!(
                        "service {}/{} port {}: no port of this machine: {e}",
                        key.0, key.1, key.2
                    ),
                }
            }
            if let Some(forwarder) = self.forwarders.get(&key) {
                *forwarder.targets.borrow_mut() = endpoints;
            }
        }
    }

    fn publish(&mut self) -> Result<()> {
        let mut objects = self.world.objects.clone();
        for (key, running) in self.pods.iter().filter(|(_, r)| !r.ending) {
            let path = format!("pod.{}.{}.yaml", key.0, key.1);
            objects.insert(
                path.into(),
                with_status(&running.plan.object, &running.status.borrow()),
            );
        }
        // A pod is known before it starts, as it is to an API server.
        for (key, plan) in self
            .world
            .pods
            .iter()
            .filter(|(k, _)| !self.pods.contains_key(*k))
        {
            let pending = PodStatus {
                address: plan.address.to_string(),
                phase: "Pending".into(),
                ..PodStatus::default()
            };
            objects.insert(
                format!("pod.{}.{}.yaml", key.0, key.1).into(),
                with_status(&plan.object, &pending),
            );
        }
        self.publisher.publish(&self.world.files, &objects)
    }

    fn status(&self) -> Status {
        let pid = std::process::id() as i32;
        let mut forwards: Vec<_> = self
            .forwarders
            .iter()
            .map(|((namespace, service, port), forwarder)| Forward {
                host: forwarder.local.to_string(),
                service: service.clone(),
                namespace: namespace.clone(),
                port_name: self.port_name(namespace, service, *port),
                port: *port,
            })
            .collect();
        forwards.sort_by(|a, b| {
            (&a.namespace, &a.service, a.port).cmp(&(&b.namespace, &b.service, b.port))
        });
        let mut problems = self.world.problems.clone();
        problems.extend(self.problems.iter().cloned());
        Status {
            supervisor: pid,
            supervisor_start: process_start(pid).unwrap_or(0),
            settled: self.settled,
            pods: self
                .pods
                .values()
                .map(|r| r.status.borrow().clone())
                .collect(),
            forwards,
            problems,
        }
    }

    fn port_name(&self, namespace: &str, service: &str, port: u16) -> String {
        self.world
            .services
            .iter()
            .find(|s| s.key.0 == namespace && s.key.1 == service)
            .and_then(|s| {
                let ports = crate::objects::list(&s.object, &["spec", "ports"]);
                ports
                    .iter()
                    .find(|p| p["port"] == json!(port))
                    .map(port_name)
            })
            .unwrap_or_default()
    }

    /// Ends every pod with a short grace; namespaces and mounts go with their processes.
    async fn shut_down(&mut self) {
        for running in self.pods.values() {
            let _ = running.stop.send(Some(DOWN_GRACE));
        }
        let deadline = tokio::time::Instant::now() + DOWN_GRACE + Duration::from_secs(5);
        for running in self.pods.values_mut() {
            // Whoever is late is killed with this process.
            let _ = tokio::time::timeout_at(deadline, &mut running.task).await;
        }
    }
}

/// The Pod as an API server would show it now.
fn with_status(pod: &Value, status: &PodStatus) -> Value {
    let condition = |kind: &str, value: bool| json!({"type": kind, "status": if value { "True" } else { "False" }});
    let mut out = pod.clone();
    let containers: Vec<_> = status
        .containers
        .iter()
        .filter(|c| !c.init)
        .map(|c| json!({"name": c.name, "ready": c.ready, "restartCount": c.restarts}))
        .collect();
    out["status"] = json!({
        "phase": status.phase,
        "podIP": status.address,
        "podIPs": [{"ip": status.address}],
        "hostIP": GATEWAY.to_string(),
        "conditions": [
            condition("Initialized", status.phase != "Pending"),
            condition("Ready", status.ready),
            condition("ContainersReady", status.ready),
            condition("PodScheduled", true),
        ],
        "containerStatuses": containers,
    });
    out
}

/// Tells of changes below a folder, including those made by renaming.
fn watch_folder(folder: &Path, edited: Rc<Notify>) -> Result<JoinHandle<()>> {
    let (events, mut incoming) = tokio::sync::mpsc::unbounded_channel();
    let what = || format!("watch {}", folder.display());
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading is no change, and this program reads after each event.
        if !matches!(&event, Ok(e) if matches!(e.kind, notify::EventKind::Access(_))) {
            let _ = events.send(());
        }
    })
    .map_err(std::io::Error::other)
    .doing(what)?;
    // A single file is replaced by renaming: its folder sees that.
    let target = if folder.is_dir() {
        folder
    } else {
        folder.parent().unwrap_or(folder)
    };
    notify::Watcher::watch(&mut watcher, target, notify::RecursiveMode::Recursive)
        .map_err(std::io::Error::other)
        .doing(what)?;
    Ok(tokio::task::spawn_local(async move {
        let _watcher = watcher;
        while incoming.recv().await.is_some() {
            edited.notify_one();
        }
    }))
}

/// The roots that peers are trusted by, in the folder of the control plane's authority.
const ROOTS: &str = "root-cert.pem";
/// How long the folder must be quiet before it is read.
const QUIET: Duration = Duration::from_millis(40);
/// How long is waited for quiet at most: somebody may write all the time.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long changes of pods are gathered before they are published.
const GATHER: Duration = Duration::from_millis(20);
/// What containers get when the whole mesh ends.
const DOWN_GRACE: Duration = Duration::from_millis(1500);
