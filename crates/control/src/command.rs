//! `outrigger control`: the command line of the control plane, with the flags of `pilot-discovery discovery`.

use std::{
    ffi::OsString,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base::clock::Clock;
use clap::Parser;
use config::Folder;
use kubernetes::{
    Access, Client, ClusterError,
    store::{self, Opened},
};
use proto::istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::Server as Grpc;
use tracing::{error, info, warn};

use crate::{
    apiserver::{self, ClusterTokens, Replica},
    ca::{
        Authority, CaError, Files,
        service::{Authenticator, Certificates},
        token::{KeyFile, TokenError, TokenReviewer},
    },
    compat::Compat,
    debug::{self, Readers},
    model::Settings,
    push::Timing,
    server::{Ads, Server, secure},
    translate::Istio,
    webhook,
};

/// Run the control plane over a Kubernetes cluster, or over a folder of Kubernetes and Istio YAML.
///
/// An address is HOST:PORT or :PORT; an empty one turns that server off.
#[derive(Debug, Parser)]
#[command(name = "outrigger control", version)]
struct Flags {
    /// Folder with the objects, read with its subfolders and watched (*.yaml, *.yml, *.json).
    #[arg(
        long = "config",
        alias = "configDir",
        value_name = "DIR",
        conflicts_with = "kubeconfig"
    )]
    config: Option<PathBuf>,
    /// Kubeconfig of the cluster with the objects; without one (and without --config) the cluster that this pod is in.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Namespace of the control plane: settings, leases, the authority's key.
    #[arg(
        long,
        default_value = "istio-system",
        env = "POD_NAMESPACE",
        value_name = "NAME"
    )]
    namespace: String,
    /// Name of this replica in elections; the host's if not given.
    #[arg(long = "replica", env = "POD_NAME", value_name = "NAME")]
    replica: Option<String>,
    /// Revision that this control plane serves.
    #[arg(long, default_value = "default", env = "REVISION", value_name = "NAME")]
    revision: String,
    /// Where proxies get their configuration, plaintext gRPC.
    #[arg(long = "grpcAddr", default_value = ":15010", value_name = "ADDRESS")]
    grpc: String,
    /// Metrics, readiness and debug pages.
    #[arg(
        long = "monitoringAddr",
        default_value = ":15014",
        value_name = "ADDRESS"
    )]
    monitoring: String,
    /// Readiness and debug pages, as istiod has them on :8080.
    #[arg(long = "httpAddr", default_value = "", value_name = "ADDRESS")]
    http: String,
    /// Where proxies get configuration and certificates, gRPC over TLS (:15012 in a cluster).
    #[arg(long = "secureGRPCAddr", default_value = "", value_name = "ADDRESS")]
    secure_grpc: String,
    /// Folder for the keys of the certificate authority, made at the first start.
    #[arg(
        long = "stateDir",
        default_value = "/var/lib/outrigger",
        value_name = "DIR"
    )]
    state: PathBuf,
    /// Folder of an authority to plug in: ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem.
    #[arg(
        long = "caCertsDir",
        default_value = "/etc/cacerts",
        env = "ROOT_CA_DIR",
        value_name = "DIR"
    )]
    ca_certs: PathBuf,
    /// How long a new root is given out to everybody before it signs.
    #[arg(long = "rootOverlap", default_value = "1h", value_name = "DURATION", value_parser = duration)]
    root_overlap: Duration,
    /// Public keys (JWKS) of who signs service account tokens.
    #[arg(long = "tokenKeys", value_name = "FILE")]
    token_keys: Option<PathBuf>,
    /// Webhooks: /inject and /validate, over TLS (:15017 in a cluster).
    #[arg(long = "httpsAddr", default_value = "", value_name = "ADDRESS")]
    https: String,
    /// Last part of the names of Kubernetes services.
    #[arg(long, default_value = "cluster.local")]
    domain: String,
    /// Name of the cluster that the objects are of.
    #[arg(
        long = "clusterID",
        default_value = "Kubernetes",
        env = "CLUSTER_ID",
        value_name = "NAME"
    )]
    cluster_id: String,
    /// Give out names and defaults of an older Istio release (1.13).
    #[arg(long, default_value = "", value_name = "RELEASE")]
    compat: Compat,
    /// How long open streams may take to end at shutdown.
    #[arg(long = "shutdownDuration", default_value = "10s", value_name = "DURATION", value_parser = duration)]
    shutdown: Duration,
    /// Interval between signs of life on idle connections.
    #[arg(long = "keepaliveInterval", default_value = "30s", value_name = "DURATION", value_parser = duration)]
    keepalive_interval: Duration,
    /// How long a sign of life may stay unanswered.
    #[arg(long = "keepaliveTimeout", default_value = "10s", value_name = "DURATION", value_parser = duration)]
    keepalive_timeout: Duration,
    /// Quiet time after which changes are pushed.
    #[arg(
        long = "debounceAfter", default_value = "100ms", env = "PILOT_DEBOUNCE_AFTER",
        value_name = "DURATION", value_parser = duration
    )]
    debounce_after: Duration,
    /// The longest that changes wait.
    #[arg(
        long = "debounceMax", default_value = "10s", env = "PILOT_DEBOUNCE_MAX",
        value_name = "DURATION", value_parser = duration
    )]
    debounce_max: Duration,
    /// What to log: a level, or a filter such as `info,control=debug`.
    #[arg(
        long = "log_output_level",
        default_value = "info",
        value_name = "LEVEL"
    )]
    log: String,
}

/// Why the control plane could not start or go on.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(
        "--{flag} {address:?} is not an address: give HOST:PORT, :PORT, or nothing to turn it off"
    )]
    Address { flag: &'static str, address: String },
    #[error("--{flag} {address}: cannot listen there: {source}")]
    Bind {
        flag: &'static str,
        address: SocketAddr,
        source: io::Error,
    },
    #[error("--config {folder}: {source}")]
    Folder { folder: String, source: io::Error },
    #[error("{0}")]
    Cluster(#[from] ClusterError),
    #[error("certificate authority: {0}")]
    Authority(#[from] CaError),
    #[error("{0}")]
    Tokens(#[from] TokenError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the gRPC server has ended: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

/// Runs the command; `args[0]` is its own name.
pub fn main(mut args: Vec<OsString>) -> ExitCode {
    // `pilot-discovery discovery --flags` names its one command.
    if args.get(1).is_some_and(|a| a == "discovery") {
        args.remove(1);
    }
    let flags = match Flags::try_parse_from(args) {
        Ok(flags) => flags,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    base::log::init(&log_filter(&flags.log));
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(CommandError::Io)
        .and_then(|runtime| runtime.block_on(run(flags)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("{e}");
            eprintln!("outrigger control: {e}");
            ExitCode::FAILURE
        }
    }
}

async fn run(flags: Flags) -> Result<(), CommandError> {
    let name = flags.replica.clone();
    let name = name.unwrap_or_else(apiserver::host_name);
    let settings = Settings {
        domain: flags.domain.clone(),
        cluster_id: flags.cluster_id.clone(),
        compat: flags.compat,
        replica: name.clone(),
    };
    let timing = Timing {
        quiet: flags.debounce_after,
        longest: flags.debounce_max,
    };
    let server = Server::new(Box::new(Istio), settings);

    // The monitoring port opens first, so that whoever waits can see that the objects are still being read.
    let (stop, stopped) = watch::channel(());
    let mut pages = Vec::new();
    // On one machine everybody who gets here is its user; in a cluster every pod does.
    let readers = flags
        .config
        .is_none()
        .then(|| Arc::new(Readers::new(&flags.namespace)));
    for (flag, given) in [
        ("monitoringAddr", &flags.monitoring),
        ("httpAddr", &flags.http),
    ] {
        if let Some(listener) = bind(flag, given).await? {
            info!("{flag}: debug pages on {}", listener.local_addr()?);
            let router = debug::router(server.clone(), readers.clone())
                .into_make_service_with_connect_info::<SocketAddr>();
            let mut stopped = stopped.clone();
            let until = async move {
                let _ = stopped.changed().await;
            };
            pages.push(tokio::spawn(
                axum::serve(listener, router)
                    .with_graceful_shutdown(until)
                    .into_future(),
            ));
        }
    }
    let grpc = bind("grpcAddr", &flags.grpc).await?;
    let secure = bind("secureGRPCAddr", &flags.secure_grpc).await?;
    let https = bind("httpsAddr", &flags.https).await?;

    let replica = Replica {
        name,
        namespace: flags.namespace.clone(),
        revision: flags.revision.clone(),
    };
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    // An API server that cannot be reached is waited for without end: whoever starts us may give up earlier.
    let (client, opened) = tokio::select! {
        opened = open(&flags) => opened?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    // A token must not be refused for the first moments of a control plane that has just come back.
    server
        .fetch_keys(&opened.snapshot, Duration::from_secs(5))
        .await;
    server.load(opened.snapshot, opened.problems);
    let follow = tokio::spawn(server.clone().follow(opened.watch, timing));
    let tidy = tokio::spawn(server.clone().tidy());

    let until = || {
        let mut stopped = stopped.clone();
        async move {
            let _ = stopped.changed().await;
        }
    };
    let builder = || {
        Grpc::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(flags.keepalive_interval))
            .http2_keepalive_timeout(Some(flags.keepalive_timeout))
    };
    let mut serving = JoinSet::new();
    let mut turning = None;
    let mut beside = JoinSet::new();
    let trusted = match secure.is_some() || https.is_some() {
        true => Some(trust(&flags, &server, client.as_ref(), &replica).await?),
        false => None,
    };
    let tokens = trusted.as_ref().map(|t| t.authenticator.tokens.clone());
    if let (Some(readers), Some(Some(tokens))) = (readers, tokens) {
        readers.trust(tokens);
    }
    if let Some(trusted) = &trusted {
        let turned = turn(trusted.authority.clone(), server.clone());
        turning = Some(tokio::spawn(turned));
    }
    if let (Some(listener), Some(trusted)) = (https, &trusted) {
        info!("httpsAddr: webhooks on {}", listener.local_addr()?);
        let injector = webhook::Injector::new(&replica.namespace, &replica.revision);
        let pages = webhook::router(server.clone(), injector);
        beside.spawn(webhook::serve(listener, trusted.tls.clone(), pages));
    }
    let cluster = client.as_ref().zip(trusted.as_ref()).map(|(client, t)| {
        let roots = t.authority.changes();
        apiserver::start(client, &replica, &server, &roots, &stopped)
    });
    if let Some(listener) = grpc {
        info!("grpcAddr: xDS on {}", listener.local_addr()?);
        let service = xds::server::Service::new(Arc::new(Ads::open(server.clone())));
        let incoming = TcpListenerStream::new(listener);
        let router = builder().add_service(service);
        serving.spawn(router.serve_with_incoming_shutdown(incoming, until()));
    }
    if let (Some(listener), Some(trusted)) = (secure, trusted) {
        info!(
            "secureGRPCAddr: xDS and certificates on {}",
            listener.local_addr()?
        );
        let Trusted {
            authority,
            authenticator,
            tls,
        } = trusted;
        let ads = Ads::authenticated(server.clone(), authenticator.clone());
        let certificates =
            Certificates::new(authority, authenticator, server.clone(), Clock::system());
        let router = builder()
            .add_service(xds::server::Service::new(Arc::new(ads)))
            .add_service(IstioCertificateServiceServer::new(certificates));
        let incoming = secure::incoming(listener, tls);
        serving.spawn(router.serve_with_incoming_shutdown(incoming, until()));
    }

    tokio::select! {
        _ = terminate.recv() => info!("SIGTERM: shutting down"),
        _ = interrupt.recv() => info!("SIGINT: shutting down"),
        Some(ended) = serving.join_next() => {
            return ended.map_err(io::Error::other)?.map_err(CommandError::Grpc);
        }
    }
    follow.abort();
    tidy.abort();
    turning.inspect(|task| task.abort());
    drop(stop);
    // Streams of proxies end by themselves only when the proxy goes: they are cut off when there is no more time.
    server.close_streams();
    let ended = async { while serving.join_next().await.is_some() {} };
    if tokio::time::timeout(flags.shutdown, ended).await.is_err() {
        warn!("streams were still open after {:?}", flags.shutdown);
    }
    if let Some(mut cluster) = cluster {
        let given_back = async { while cluster.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(GIVE_BACK, given_back).await;
    }
    Ok(())
}

/// Does what the authority has to do by itself, as long as there is one.
async fn turn(authority: Arc<Authority>, server: Arc<Server>) {
    let mut failed = false;
    loop {
        tokio::time::sleep(TURN).await;
        let ends = authority.not_after().duration_since(SystemTime::UNIX_EPOCH);
        server.metrics.set(
            "citadel_server_root_cert_expiry_timestamp",
            &[],
            ends.unwrap_or_default().as_secs_f64(),
        );
        match authority.turn() {
            Ok(()) => failed = false,
            Err(error) => {
                // Said once: it is tried again every second.
                if !std::mem::replace(&mut failed, true) {
                    warn!("certificate authority: {error}");
                }
            }
        }
    }
}

/// How often the authority is looked after.
const TURN: Duration = Duration::from_secs(1);

/// All objects, and the cluster that they are of, if they are of one.
async fn open(flags: &Flags) -> Result<(Option<Client>, Opened), CommandError> {
    let Some(root) = flags.config.clone() else {
        let access = Access {
            kubeconfig: flags.kubeconfig.clone(),
            context: None,
        };
        let client = kubernetes::connect(&access).await?;
        let options = store::Options::new(&flags.namespace, &flags.revision);
        let opened = store::open(client.clone(), options).await;
        return Ok((Some(client), opened));
    };
    let name = root.display().to_string();
    let opened = tokio::task::spawn_blocking(move || Folder::open(root)).await;
    let folder = opened
        .map_err(io::Error::other)
        .and_then(|folder| folder)
        .map_err(|source| CommandError::Folder {
            folder: name,
            source,
        })?;
    let opened = Opened {
        snapshot: folder.snapshot().clone(),
        problems: folder.problems().clone(),
        watch: folder.watch()?,
    };
    Ok((None, opened))
}

/// What proves us to others and others to us.
struct Trusted {
    authority: Arc<Authority>,
    authenticator: Authenticator,
    tls: watch::Receiver<Arc<rustls::ServerConfig>>,
}

/// The authority, with the key that all replicas of a cluster share.
async fn trust(
    flags: &Flags,
    server: &Arc<Server>,
    client: Option<&Client>,
    replica: &Replica,
) -> Result<Trusted, CommandError> {
    let Some(client) = client else {
        return authority(flags, server, None);
    };
    let shared = apiserver::take_authority(client, replica, &flags.state).await?;
    let mut trusted = authority(flags, server, Some(client))?;
    let own = flags.state.join("ca-key.pem").exists();
    if !shared && own && !apiserver::share_authority(client, replica, &flags.state).await? {
        trusted = authority(flags, server, Some(client))?;
    }
    Ok(trusted)
}

/// The certificate authority, who may ask it, and the TLS settings of the port where they do.
fn authority(
    flags: &Flags,
    server: &Arc<Server>,
    client: Option<&Client>,
) -> Result<Trusted, CommandError> {
    let current = server.current();
    let mesh = current.as_ref().map(|push| push.mesh.config());
    let trust_domain = mesh.map_or("cluster.local", |m| &m.trust_domain).to_owned();
    let namespace = mesh
        .map_or("istio-system", |m| &m.root_namespace)
        .to_owned();
    let files = Files {
        state: flags.state.clone(),
        plugged: flags.ca_certs.clone(),
    };
    let clock = Clock::system();
    let authority = Authority::open(&files, &trust_domain, clock.clone())?;
    let authority = authority
        .with_overlap(flags.root_overlap)
        .with_replicas(client.is_some());
    let authority = Arc::new(authority);
    let names = secure::names(&namespace, &flags.revision);
    let tls = secure::keep(authority.clone(), names, clock.clone())?;
    let tokens = match (&flags.token_keys, client) {
        (Some(file), _) => Some(Arc::new(KeyFile::open(file, clock)?) as Arc<dyn TokenReviewer>),
        (None, Some(client)) => Some(Arc::new(ClusterTokens(client.clone())) as _),
        (None, None) => None,
    };
    let authenticator = Authenticator {
        tokens,
        trust_domain,
        server: server.clone(),
    };
    Ok(Trusted {
        authority,
        authenticator,
        tls,
    })
}

async fn bind(flag: &'static str, given: &str) -> Result<Option<TcpListener>, CommandError> {
    if given.is_empty() {
        return Ok(None);
    }
    let wrong = || CommandError::Address {
        flag,
        address: given.to_owned(),
    };
    let (host, port) = given.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let listen = |ip: IpAddr| async move {
        let address = SocketAddr::new(ip, port);
        TcpListener::bind(address)
            .await
            .map_err(|source| CommandError::Bind {
                flag,
                address,
                source,
            })
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let listener = match host {
        // Both families through one socket where there is IPv6.
        "" | "*" => match listen(Ipv6Addr::UNSPECIFIED.into()).await {
            Err(CommandError::Bind { source, .. }) if source.kind() != io::ErrorKind::AddrInUse => {
                listen(Ipv4Addr::UNSPECIFIED.into()).await?
            }
            other => other?,
        },
        "localhost" => listen(Ipv4Addr::LOCALHOST.into()).await?,
        host => listen(host.parse().map_err(|_| wrong())?).await?,
    };
    Ok(Some(listener))
}

fn duration(text: &str) -> Result<Duration, String> {
    config::duration_nanos(text)
        .and_then(|nanos| u64::try_from(nanos).ok())
        .map(Duration::from_nanos)
        .ok_or_else(|| format!("{text:?} is no duration; write it as in 100ms, 10s or 1m30s"))
}

/// Istio's form names scopes (`default:info,ads:debug`); ours is a level, then modules.
fn log_filter(level: &str) -> String {
    level
        .split(',')
        .filter_map(|part| match part.split_once(':') {
            None => Some(part.to_owned()),
            Some(("default" | "all", level)) => Some(level.to_owned()),
            Some(_) => None,
        })
        .next()
        .unwrap_or_else(|| "info".to_owned())
}

/// How long giving back leases may take.
const GIVE_BACK: Duration = Duration::from_secs(2);
