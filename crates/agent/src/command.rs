//! The command line: `proxy`, `wait`, `request`, `istio-iptables` and `version`, as `pilot-agent` has them.

use std::{env, ffi::OsString, process::ExitCode, sync::Arc, time::Duration};

use base::clock::Clock;
use clap::{CommandFactory, FromArgMatches, Parser};
use tracing::{error, info};

use crate::{
    AgentError, bootstrap,
    capture::Capture,
    control_plane::{ControlPlane, Secure},
    dns::{self, Dns},
    flags::Flags,
    identity::{self, Workload},
    relay::Relay,
    request,
    sds::{Place, Sds},
    settings::Settings,
    status::Status,
    supervise,
};

const USAGE: &str = "\
Usage: outrigger agent COMMAND [ARGUMENTS]

Commands:
  proxy [sidecar|router]  run the pod agent with the proxy as its child
  wait                    wait until the proxy is ready
  request METHOD PATH     send a request to the proxy's admin interface
  istio-iptables          write the interception rules of this network namespace
  version                 print the version
";

/// Wait until the proxy answers that it is ready.
#[derive(Debug, Parser)]
struct Wait {
    /// URL to ask.
    #[arg(long, default_value = "http://localhost:15021/healthz/ready")]
    url: String,
    /// Give up after this many seconds.
    #[arg(long = "timeoutSeconds", default_value_t = 60)]
    timeout_seconds: u64,
    /// Patience with one request, in milliseconds.
    #[arg(long = "requestTimeoutMillis", default_value_t = 500)]
    request_timeout_millis: u64,
    /// Time between two requests, in milliseconds.
    #[arg(long = "periodMillis", default_value_t = 500)]
    period_millis: u64,
}

/// Send a request to a port of this pod and print the answer.
#[derive(Debug, Parser)]
struct Request {
    /// HTTP method.
    method: String,
    /// Path and query.
    path: String,
    /// Body to send.
    #[arg(default_value = "")]
    body: String,
    /// Port on localhost.
    #[arg(long = "debug-port", default_value_t = 15000)]
    debug_port: u16,
}

/// Runs the agent's command line; `args[0]` is its own name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let mut args: Vec<OsString> = args.into_iter().skip(1).collect();
    let name = args
        .first()
        .map(|a| a.to_string_lossy().into_owned())
        .unwrap_or_default();
    match name.as_str() {
        "proxy" => {
            let words = args.drain(1..).map(|a| a.to_string_lossy().into_owned());
            run(&Flags::parse(words))
        }
        "wait" => match parse::<Wait>(args) {
            Ok(w) => finish(block_on(request::wait(
                &w.url,
                Duration::from_secs(w.timeout_seconds),
                Duration::from_millis(w.request_timeout_millis),
                Duration::from_millis(w.period_millis),
            ))),
            Err(code) => code,
        },
        "request" => match parse::<Request>(args) {
            Ok(r) => finish(
                block_on(request::request(&r.method, &r.path, &r.body, r.debug_port))
                    .map(|body| print!("{body}")),
            ),
            Err(code) => code,
        },
        "istio-iptables" => intercept::command::main(args),
        "version" | "--version" => {
            println!(
                "outrigger agent {} (Istio {})",
                env!("CARGO_PKG_VERSION"),
                bootstrap::ISTIO_VERSION
            );
            ExitCode::SUCCESS
        }
        "" | "help" | "-h" | "--help" => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        other => {
            eprintln!("outrigger agent: unknown command {other:?}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse<T: Parser + CommandFactory + FromArgMatches>(args: Vec<OsString>) -> Result<T, ExitCode> {
    T::try_parse_from(args).map_err(|e| {
        // Help goes to standard output with status 0, a mistake to standard error with 2.
        let _ = e.print();
        ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
    })
}

fn finish(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime needs only an epoll instance")
        .block_on(future)
}

fn run(flags: &Flags) -> ExitCode {
    let level = flags
        .value("log_output_level")
        .and_then(|v| v.strip_prefix("default:"));
    base::log::init(level.unwrap_or("info"));
    for note in &flags.notes {
        info!("{note}");
    }
    match block_on(serve(flags)) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            error!("{e}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(flags: &Flags) -> Result<u8, AgentError> {
    let settings = Settings::read(flags)?;
    info!(
        "node {}, control plane {}",
        settings.node_id(),
        settings.discovery_address
    );
    let bootstrap = bootstrap::write(&settings)?;
    let metadata = bootstrap::metadata(&settings)?;
    let wanted = metadata.get("DNS_CAPTURE").and_then(|v| v.as_str()) == Some("true");
    let dns = match wanted {
        true => Some(Dns::start(dns::Options::read(&settings)?)?),
        false => None,
    };
    let capture = Capture::start(&settings)?;
    let headers = headers(&metadata);
    let clock = Clock::system();
    let control_plane = match settings.plaintext {
        true => ControlPlane::plaintext(&settings.discovery_address),
        false => ControlPlane::secure(
            &settings.discovery_address,
            Secure::read("XDS_ROOT_CA", clock.clone()),
        ),
    }
    .with_headers(&headers)?;
    let relay = Relay::new(control_plane).with_names(dns.clone());
    let (workload, secrets) = secrets(identity::Options::read(&settings, &headers, clock)?)?;
    let (status, orders) = Status::with(&settings, dns, capture, workload.clone())?;
    let relay = Arc::new(relay).serve(&settings.config_path.join(bootstrap::XDS_SOCKET))?;
    let server = status.clone().serve(settings.status_port).await?;
    if let Some(workload) = workload {
        tokio::spawn(workload.run());
    }
    let servers = async {
        tokio::select! {
            end = relay => end,
            end = server => end,
            end = secrets => end,
        }
    };
    tokio::select! {
        code = supervise::run(&settings, &bootstrap, &status, orders) => code,
        end = servers => end.map(|()| 1),
    }
}

/// A workload's certificate, if it is ours to get, and the service that gives secrets out.
type Secrets<F> = (Option<Arc<Workload>>, F);

/// The workload's certificate and the service that gives it out; where another serves it, files alone.
fn secrets(
    options: identity::Options,
) -> Result<Secrets<impl Future<Output = Result<(), AgentError>>>, AgentError> {
    match Place::find(&options)? {
        Place::Own(path) => {
            let workload = Workload::new(options);
            let server = Sds::new(workload.clone()).serve(&path)?;
            Ok((Some(workload), server))
        }
        Place::Beside(path) => Ok((None, Sds::files().serve(&path)?)),
    }
}

/// gRPC metadata of each xDS stream: the cluster's id, and what `XDS_HEADER_*` adds.
fn headers(metadata: &serde_json::Map<String, serde_json::Value>) -> Vec<(String, String)> {
    let mut out = Vec::new();
    if let Some(id) = metadata.get("CLUSTER_ID").and_then(|v| v.as_str()) {
        out.push(("clusterid".to_owned(), id.to_owned()));
    }
    for (key, value) in env::vars() {
        if let Some(name) = key.strip_prefix("XDS_HEADER_") {
            out.push((name.to_owned(), value));
        }
    }
    out
}
