//! A proxy with one HTTP listener, a client and a scripted origin.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use base::clock::Clock;
use outrigger_proxy as proxy;
use proto::envoy::config;
use proxy::{
    plan::{Bootstrap, Cluster, Listener},
    server::{Change, Server},
    worker::{Options, drain::DrainStrategy},
};
use testkit::envoy::message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{LocalSet, spawn_local},
};

/// A proxy with one listener, whose routes, filters and options a test says, and clusters by port.
pub(crate) struct Mesh {
    pub(crate) server: Rc<Server>,
    /// What the validity of tokens goes by; it stands still at [`NOW`].
    pub(crate) clock: Clock,
    log: tempfile::TempDir,
}

/// How long a drain takes.
const DRAIN: Duration = Duration::from_millis(200);

/// Seconds since the epoch.
pub(crate) const NOW: u64 = 1_800_000_000;

impl Mesh {
    pub(crate) async fn new(
        routes: &str,
        options: &str,
        filters: &str,
        clusters: &[(&str, u16)],
    ) -> Mesh {
        Mesh::with(routes, options, filters, clusters, "").await
    }

    /// [`Mesh::new`] with further fields of all clusters.
    pub(crate) async fn with(
        routes: &str,
        options: &str,
        filters: &str,
        clusters: &[(&str, u16)],
        cluster: &str,
    ) -> Mesh {
        Mesh::make(routes, options, filters, clusters, cluster, "", DRAIN, "").await
    }

    /// [`Mesh::new`] without filters, and with fields of the router.
    pub(crate) async fn with_router(
        routes: &str,
        options: &str,
        router: &str,
        clusters: &[(&str, u16)],
    ) -> Mesh {
        // The terminal filter: the one that follows it is left out.
        let filters = format!("      - name: own\n        typed_config: {{{ROUTER}, {router}}}");
        Mesh::make(routes, options, &filters, clusters, "", "", DRAIN, "").await
    }

    /// [`Mesh::new`] without filters, with a further access log and a drain time that Istio would give.
    pub(crate) async fn with_log(
        routes: &str,
        options: &str,
        log: &str,
        clusters: &[(&str, u16)],
    ) -> Mesh {
        let log = format!("- {log}");
        let drain = Duration::from_secs(45);
        Mesh::make(routes, options, "", clusters, "", &log, drain, "").await
    }

    /// [`Mesh::with_log`] with filters.
    pub(crate) async fn with_log_and_filters(
        options: &str,
        filters: &str,
        log: &str,
        clusters: &[(&str, u16)],
    ) -> Mesh {
        let log = format!("- {log}");
        Mesh::make(TO_A, options, filters, clusters, "", &log, DRAIN, "").await
    }

    /// [`Mesh::new`] without options, and with members of a static runtime layer.
    pub(crate) async fn with_runtime(
        routes: &str,
        filters: &str,
        runtime: &str,
        clusters: &[(&str, u16)],
    ) -> Mesh {
        let layer =
            format!("layered_runtime: {{layers: [{{name: s, static_layer: {{{runtime}}}}}]}}");
        Mesh::make(routes, "", filters, clusters, "", "", DRAIN, &layer).await
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "each test says one or two of them"
    )]
    async fn make(
        routes: &str,
        options: &str,
        filters: &str,
        clusters: &[(&str, u16)],
        cluster: &str,
        further: &str,
        drain_time: Duration,
        bootstrap: &str,
    ) -> Mesh {
        let log = tempfile::tempdir().unwrap();
        let path = log.path().join("access.log");
        let yaml = format!(
            "name: l
address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: test
      {options}
      access_log:
      - name: file
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
          path: {path}
          log_format: {{text_format_source: {{inline_string: \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_REQUEST_ATTEMPT_COUNT%\\n\"}}}}
      {further}
      route_config:
        name: r
        virtual_hosts:
        - name: v
          domains: ['*']
          include_request_attempt_count: true
          routes:
{routes}
      http_filters:
{filters}
{router}
",
            path = path.display(),
            router = if filters.contains(ROUTER) {
                String::new()
            } else {
                format!("      - name: router\n        typed_config: {{{ROUTER}}}")
            },
        );
        let bootstrap = match bootstrap {
            "" => config::bootstrap::v3::Bootstrap::default(),
            yaml => message(yaml),
        };
        let bootstrap = Bootstrap::try_from(&bootstrap).unwrap();
        let clock = Clock::manual(UNIX_EPOCH + Duration::from_secs(NOW));
        let settings = Options {
            concurrency: 1,
            drain_time,
            drain_strategy: DrainStrategy::Immediate,
            file_flush_interval: Duration::from_millis(1),
            clock: clock.clone(),
            ..Options::default()
        };
        let server = Server::start(Arc::new(bootstrap), settings, stats::Store::default()).unwrap();
        let mut changes = Vec::new();
        for (name, port) in clusters {
            let protocol = if name.ends_with("-h2") { H2 } else { "" };
            let plan = Cluster::try_from(&message::<config::cluster::v3::Cluster>(&format!(
                "name: {name}\ntype: STATIC\nconnect_timeout: 2s\nload_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [\
                 {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}\n{cluster}\n{protocol}"
            )));
            changes.push(Change::UpsertCluster(Arc::new(plan.unwrap().into())));
        }
        let plan = Listener::try_from(&message::<config::listener::v3::Listener>(&yaml));
        changes.push(Change::UpsertListener(Arc::new(
            plan.unwrap_or_else(|e| panic!("{e}\n{yaml}")),
        )));
        for result in server.apply(changes) {
            result.unwrap();
        }
        server.settled().await;
        Mesh { server, clock, log }
    }

    /// The plan of a listener with nothing but this access log.
    pub(crate) fn plan(log: &str) -> Result<Listener, String> {
        let yaml = format!(
            "{{name: only, address: {{socket_address: {{address: 127.0.0.1, port_value: 0}}}}, filter_chains: [{{filters: [{{name: hcm, typed_config: {{\
             \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: s, \
             access_log: [{}], route_config: {{name: r}}, http_filters: [{{name: router, typed_config: {{{ROUTER}}}}}]}}}}]}}]}}",
            log.replace('\n', " ")
        );
        Listener::try_from(&message::<config::listener::v3::Listener>(&yaml))
            .map_err(|error| error.to_string())
    }

    /// Why a listener with this access log is refused; empty where it is not.
    pub(crate) fn refused(&self, log: &str) -> String {
        let plan = Mesh::plan(log).expect("a legal listener");
        let change = Change::UpsertListener(Arc::new(plan));
        let results = self.server.apply(vec![change]);
        let errors = results.into_iter().filter_map(Result::err);
        errors.map(|error| error.to_string()).collect()
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.server.listener_address("l").unwrap())
            .await
            .unwrap()
    }

    /// Sends one request on a connection of its own and gives all that comes back.
    pub(crate) async fn ask(&self, request: &str) -> String {
        String::from_utf8_lossy(&self.ask_bytes(request.as_bytes()).await).into_owned()
    }

    /// [`Mesh::ask`] where the answer is no text.
    pub(crate) async fn ask_bytes(&self, request: &[u8]) -> Vec<u8> {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let _ = within(stream.read_to_end(&mut answer)).await;
        answer
    }

    /// `GET` of a path with `connection: close`.
    pub(crate) async fn get(&self, path: &str) -> String {
        self.ask(&format!(
            "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        ))
        .await
    }

    /// The log, once it has so many lines.
    pub(crate) async fn log(&self, lines: usize) -> String {
        within(async {
            loop {
                let text = std::fs::read_to_string(self.log.path().join("access.log"));
                let text = text.unwrap_or_default();
                if text.lines().count() >= lines {
                    return text;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }
}

const ROUTER: &str =
    "\"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// Of a cluster whose name ends in `-h2`.
const H2: &str = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}";

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it happens within 20 s")
}

/// What an origin does with its next request.
#[derive(Clone, Copy)]
pub(crate) enum Act {
    /// Answers.
    Say(&'static str),
    /// Answers after a while.
    SayLater(&'static str, Duration),
    /// Closes without a word.
    Close,
    /// Says nothing.
    Hang,
    /// Answers, then closes at once.
    SayAndClose(&'static str),
}

/// An origin that acts by a script, one act a request; it keeps what it was sent.
pub(crate) struct Origin {
    pub(crate) port: u16,
    seen: Rc<RefCell<Vec<String>>>,
}

impl Origin {
    pub(crate) async fn new(script: &[Act]) -> Origin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Rc::new(RefCell::new(Vec::new()));
        let script: Rc<RefCell<VecDeque<Act>>> =
            Rc::new(RefCell::new(script.iter().copied().collect()));
        let kept = seen.clone();
        spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (seen, script) = (kept.clone(), script.clone());
                spawn_local(async move {
                    while let Some(request) = request(&mut stream).await {
                        seen.borrow_mut().push(request);
                        let act = script.borrow_mut().pop_front();
                        match act {
                            Some(Act::Say(answer)) => {
                                stream.write_all(answer.as_bytes()).await.unwrap();
                            }
                            Some(Act::SayAndClose(answer)) => {
                                stream.write_all(answer.as_bytes()).await.unwrap();
                                return;
                            }
                            Some(Act::SayLater(answer, after)) => {
                                tokio::time::sleep(after).await;
                                // It may have been given up.
                                let _ = stream.write_all(answer.as_bytes()).await;
                            }
                            Some(Act::Hang) => std::future::pending::<()>().await,
                            Some(Act::Close) | None => return,
                        }
                    }
                });
            }
        });
        Origin { port, seen }
    }

    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.borrow().clone()
    }
}

/// One request: its head, and as much of a body as its length says.
pub(crate) async fn request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        // By bytes: what is no text is longer once it is shown as one.
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let length = String::from_utf8_lossy(&bytes[..end])
                .lines()
                .find_map(|line| {
                    line.to_lowercase()
                        .strip_prefix("content-length: ")?
                        .parse()
                        .ok()
                })
                .unwrap_or(0);
            let chunked = text.to_lowercase().contains("transfer-encoding: chunked");
            if bytes.len() >= end + 4 + length
                && (!chunked || is_last_chunk(&String::from_utf8_lossy(&bytes[end..])))
            {
                return Some(text);
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// Whether a chunked body ends here, with trailers or without.
fn is_last_chunk(body: &str) -> bool {
    body.contains("\r\n0\r\n") && body.ends_with("\r\n\r\n")
}

pub(crate) const OK: Act = Act::Say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
pub(crate) const TO_A: &str = "          - {match: {prefix: /}, route: {cluster: a}}";

pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}
