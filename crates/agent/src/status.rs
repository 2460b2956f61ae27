//! The agent's status server (port 15020): readiness, merged metrics, application probes, shutdown.

use std::{
    env,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request as AxumRequest, State},
    response::Response as AxumResponse,
    routing::{any, get, post},
};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use tokio::{net::TcpListener, sync::mpsc};
use tracing::info;

use crate::{
    AgentError,
    capture::Capture,
    dns::Dns,
    http_client::{Dial, send},
    identity::Workload,
    metrics::{AgentMetrics, AppScrape},
    probes::Probes,
    settings::Settings,
};

/// What a request to the status server asks of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `/drain`: the pod is going; a later SIGTERM ends the proxy at once.
    Drain,
    /// `/quitquitquit`: end now, without draining.
    Quit,
}

/// What the server knows and shares with the supervisor.
#[derive(Debug)]
pub struct Status {
    pod: IpAddr,
    admin_port: u16,
    prometheus_port: u16,
    ready: AtomicBool,
    terminating: AtomicBool,
    probes: Probes,
    app: Option<AppScrape>,
    metrics: AgentMetrics,
    orders: mpsc::Sender<Order>,
    dns: Option<Arc<Dns>>,
    capture: Option<Arc<Capture>>,
    workload: Option<Arc<Workload>>,
}

impl Status {
    /// Reads probes and scrape targets from the environment; orders go to the returned receiver.
    pub fn new(settings: &Settings) -> Result<(Arc<Self>, mpsc::Receiver<Order>), AgentError> {
        Self::with(settings, None, None, None)
    }

    /// The same with what else must be ready: the name server, the capture and the certificate, where this pod has
    /// them.
    pub fn with(
        settings: &Settings,
        dns: Option<Arc<Dns>>,
        capture: Option<Arc<Capture>>,
        workload: Option<Arc<Workload>>,
    ) -> Result<(Arc<Self>, mpsc::Receiver<Order>), AgentError> {
        let (orders, receiver) = mpsc::channel(4);
        let probes = match env::var("ISTIO_KUBE_APP_PROBERS") {
            Ok(text) if !text.is_empty() => Probes::parse(&text)?,
            _ => Probes::default(),
        };
        let app = match env::var("ISTIO_PROMETHEUS_ANNOTATIONS") {
            Ok(text) if !text.is_empty() => AppScrape::parse(&text)?,
            _ => None,
        };
        let status = Arc::new(Self {
            pod: settings.addresses[0],
            admin_port: settings.admin_port,
            prometheus_port: settings.prometheus_port,
            ready: AtomicBool::new(false),
            terminating: AtomicBool::new(false),
            probes,
            app,
            metrics: AgentMetrics::default(),
            orders,
            dns,
            capture,
            workload,
        });
        Ok((status, receiver))
    }

    /// From now on the pod is not ready any more.
    pub fn terminate(&self) {
        self.terminating.store(true, Ordering::Relaxed);
    }

    /// Serves on `port` of all addresses until dropped.
    pub async fn serve(
        self: Arc<Self>,
        port: u16,
    ) -> Result<impl Future<Output = Result<(), AgentError>>, AgentError> {
        let listener = listen(port).await?;
        let router = Router::new()
            .route("/healthz/ready", any(ready))
            .route("/metrics", get(metrics))
            .route("/stats/prometheus", get(metrics))
            .route("/quitquitquit", post(quit))
            .route("/drain", post(drain))
            .route("/debug/ndsz", get(names))
            .route("/app-health/{container}/{probe}", get(probe))
            .route("/app-lifecycle/{container}/{hook}", get(probe))
            .with_state(self)
            .into_make_service_with_connect_info::<SocketAddr>();
        Ok(async move {
            axum::serve(listener, router)
                .await
                .map_err(|source| AgentError::Listen {
                    address: format!("port {port}"),
                    source,
                })
        })
    }

    /// Why the pod is not ready; `None` when it is. Once ready it stays so: that the proxy still serves is shown by
    /// the kubelet's request coming through its own listener.
    async fn not_ready(&self) -> Option<String> {
        if self.terminating.load(Ordering::Relaxed) {
            return Some("the server is terminated".into());
        }
        // Unlike the rest this is asked each time: rules can go while the pod runs.
        let captured = self.capture.as_ref().and_then(|c| c.not_ready());
        if captured.is_some() && self.ready.load(Ordering::Relaxed) {
            return captured;
        }
        // So is this: a certificate that has expired is refused by every peer.
        if let Some(why) = self.workload.as_ref().and_then(|w| w.not_ready()) {
            return Some(why);
        }
        if self.ready.load(Ordering::Relaxed) {
            return None;
        }
        let no_names = self.dns.as_ref().is_some_and(|dns| !dns.ready());
        let names = no_names.then(|| "the name table has not come from the control plane".into());
        let reason = self.ask_proxy().await.err().or(names).or(captured);
        if reason.is_none() {
            self.ready.store(true, Ordering::Relaxed);
            info!("the proxy is ready");
        }
        reason
    }

    async fn ask_proxy(&self) -> Result<(), String> {
        const FILTER: &str = "/stats?usedonly&filter=%5E(server.state%7Clistener_manager.workers_started%7C\
             (cluster_manager.cds%7Clistener_manager.lds).update_(success%7Crejected))%24";
        let mut request = Request::new(Bytes::new());
        *request.uri_mut() = FILTER.parse().expect("a constant");
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.admin_port);
        let dial = Dial {
            to,
            from: None,
            timeout: Duration::from_secs(2),
            max_body: 1 << 20,
        };
        let response = send(dial, request)
            .await
            .map_err(|e| format!("the proxy does not answer: {e}"))?;
        let text = String::from_utf8_lossy(response.body()).into_owned();
        let value = |name: &str| -> u64 {
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(n, _)| *n == name)
                .and_then(|(_, v)| v.trim().parse().ok())
                .unwrap_or(0)
        };
        for (part, prefix) in [
            ("CDS", "cluster_manager.cds"),
            ("LDS", "listener_manager.lds"),
        ] {
            if value(&format!("{prefix}.update_success")) == 0 {
                return Err(if value(&format!("{prefix}.update_rejected")) > 0 {
                    format!("the proxy rejected its configuration ({part}): see its log")
                } else {
                    format!(
                        "configuration not received from the xDS server ({part}): is the control plane running?"
                    )
                });
            }
        }
        const LIVE: u64 = 0;
        if value("server.state") != LIVE {
            return Err("the proxy is not live".into());
        }
        if value("listener_manager.workers_started") == 0 {
            return Err("the proxy's workers have not started".into());
        }
        Ok(())
    }

    /// Asks the proxy to drain: `POST /drain_listeners?QUERY`.
    pub(crate) async fn drain_proxy(&self, query: &str) {
        let path = format!("/drain_listeners?{query}");
        let mut request = Request::new(Bytes::new());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = path.parse().expect("a constant");
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.admin_port);
        let dial = Dial {
            to,
            from: None,
            timeout: Duration::from_secs(2),
            max_body: 1 << 20,
        };
        match send(dial, request).await {
            Ok(r) if r.status().is_success() => info!("the proxy drains its listeners"),
            Ok(r) => tracing::warn!("the proxy refused to drain: {}", r.status()),
            Err(e) => tracing::warn!("cannot ask the proxy to drain: {e}"),
        }
    }
}

/// Both families where the kernel has them, IPv4 alone otherwise.
async fn listen(port: u16) -> Result<TcpListener, AgentError> {
    let v6 = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    if let Ok(listener) = TcpListener::bind(v6).await {
        return Ok(listener);
    }
    let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    TcpListener::bind(v4)
        .await
        .map_err(|source| AgentError::Listen {
            address: v4.to_string(),
            source,
        })
}

fn text(status: StatusCode, body: impl Into<Body>) -> AxumResponse {
    let mut response = AxumResponse::new(body.into());
    *response.status_mut() = status;
    response
}

async fn ready(State(status): State<Arc<Status>>) -> AxumResponse {
    match status.not_ready().await {
        None => {
            let mut detail = String::new();
            detail.extend(status.capture.as_ref().map(|c| c.detail()));
            detail.extend(status.workload.as_ref().map(|w| w.detail()));
            text(StatusCode::OK, detail)
        }
        Some(why) => text(StatusCode::SERVICE_UNAVAILABLE, why + "\n"),
    }
}

async fn metrics(State(status): State<Arc<Status>>, headers: HeaderMap) -> AxumResponse {
    let app = status.app.as_ref();
    let mut more = status
        .dns
        .as_ref()
        .map_or(String::new(), |d| d.figures.text());
    more.extend(status.capture.as_ref().map(|c| c.text()));
    more.extend(status.workload.as_ref().map(|w| w.text()));
    let (kind, body) = status
        .metrics
        .scrape(status.prometheus_port, app, &headers, &more)
        .await;
    let mut response = text(StatusCode::OK, body);
    if let Ok(kind) = kind.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response
}

/// Only processes of this pod may end the proxy.
fn is_local(peer: SocketAddr) -> bool {
    match peer.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback())
        }
    }
}

fn not_local() -> AxumResponse {
    text(StatusCode::FORBIDDEN, "only from this pod itself\n")
}

async fn quit(
    State(status): State<Arc<Status>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> AxumResponse {
    if !is_local(peer) {
        return not_local();
    }
    // A full queue means that the agent is ending already.
    let _ = status.orders.try_send(Order::Quit);
    text(StatusCode::OK, "OK\n")
}

async fn drain(
    State(status): State<Arc<Status>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> AxumResponse {
    if !is_local(peer) {
        return not_local();
    }
    let _ = status.orders.try_send(Order::Drain);
    text(StatusCode::OK, "OK\n")
}

/// The names that are answered in this pod.
async fn names(
    State(status): State<Arc<Status>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
) -> AxumResponse {
    if !is_local(peer) {
        return text(StatusCode::FORBIDDEN, "only from this pod itself\n");
    }
    match status.dns.as_ref().and_then(|dns| dns.table()) {
        Some(table) => text(StatusCode::OK, format!("{:#}\n", table.dump())),
        None => text(
            StatusCode::NOT_FOUND,
            "DNS is not captured in this pod, or no table has come\n",
        ),
    }
}

async fn probe(State(status): State<Arc<Status>>, request: AxumRequest) -> AxumResponse {
    let path = request.uri().path().to_owned();
    let answer = status
        .probes
        .run(status.pod, &path, request.headers())
        .await;
    answer.map(Body::from)
}
