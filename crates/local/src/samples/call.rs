//! A client for tests and demos: makes a number of calls and prints each as a line of JSON.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use clap::Parser;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri, header};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
};

use super::{grpc, http::Connection};

/// Call `http://…`, `grpc://…` or `tcp://…` and print what came back, a line of JSON a call.
#[derive(Clone, Debug, Parser)]
#[command(name = "outrigger call")]
struct Flags {
    url: Uri,
    /// How many calls.
    #[arg(short = 'n', long, default_value_t = 1)]
    count: u32,
    /// Go on for ever, until SIGTERM or an interrupt: `--count` is not read.
    #[arg(long)]
    endless: bool,
    /// Milliseconds between two calls of a worker.
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// How many at the same time.
    #[arg(long, default_value_t = 1)]
    concurrency: u32,
    /// A connection for each call, instead of one for all of a worker's.
    #[arg(long)]
    close: bool,
    #[arg(short = 'X', long, default_value = "GET")]
    method: String,
    /// `Name: value`; `Host` replaces the URL's.
    #[arg(short = 'H', long)]
    header: Vec<String>,
    /// The request's body, for HTTP; the line to send, for TCP; the text, for gRPC.
    #[arg(short, long, default_value = "")]
    data: String,
    /// For gRPC: ask for this many answers in a stream.
    #[arg(long)]
    stream: Option<u32>,
    /// Seconds after which a call has failed.
    #[arg(long, default_value_t = 15.0)]
    timeout: f64,
    /// Print how often each status and each answering pod came, instead of each call. The first calls that fail are told
    /// on standard error, with the time.
    #[arg(long)]
    summary: bool,
}

pub(super) async fn main(args: Vec<OsString>) -> Result<(), String> {
    let flags = Rc::new(Flags::try_parse_from(args).unwrap_or_else(|e| e.exit()));
    let headers = Rc::new(headers(&flags)?);
    let mut workers = tokio::task::JoinSet::new();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    if flags.endless {
        let mut ended = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
        let mut interrupted = signal(SignalKind::interrupt()).map_err(|e| e.to_string())?;
        tokio::task::spawn_local(async move {
            tokio::select! {
                _ = ended.recv() => {}
                _ = interrupted.recv() => {}
            }
            stop.send_replace(true);
        });
    }
    let most = if flags.endless { u32::MAX } else { flags.count };
    let concurrency = flags.concurrency.clamp(1, most.max(1));
    for worker in 0..concurrency {
        let share = most / concurrency + u32::from(worker < most % concurrency);
        let (flags, headers) = (flags.clone(), headers.clone());
        let mut stopped = stopped.clone();
        workers.spawn_local(async move {
            let mut connection = None;
            let mut results = Summary::default();
            for _ in 0..share {
                if *stopped.borrow() {
                    break;
                }
                let begun = Instant::now();
                let limit = Duration::from_secs_f64(flags.timeout.clamp(0.001, 3600.0));
                let call = call(&flags, &headers, &mut connection);
                let mut result = match tokio::time::timeout(limit, call).await {
                    Ok(Ok(result)) => result,
                    Ok(Err(e)) => json!({"error": e}),
                    Err(_) => json!({"error": format!("no answer within {} s", flags.timeout)}),
                };
                if result["error"].is_string() {
                    connection = None;
                }
                result["milliseconds"] = json!(begun.elapsed().as_millis() as u64);
                if flags.summary {
                    results.count(&result);
                } else {
                    println!("{result}");
                }
                if flags.pause > 0 {
                    let pause = tokio::time::sleep(Duration::from_millis(flags.pause));
                    // Whoever makes calls for ever need not wait for the end of a pause.
                    tokio::select! {
                        () = pause => {}
                        Ok(()) = stopped.changed() => {}
                    }
                }
            }
            results
        });
    }
    let mut all = Summary::default();
    while let Some(results) = workers.join_next().await {
        all.add(results.map_err(|e| e.to_string())?);
    }
    if flags.summary {
        println!("{}", all.shown());
    }
    Ok(())
}

fn headers(flags: &Flags) -> Result<HeaderMap, String> {
    let mut out = HeaderMap::new();
    for text in &flags.header {
        let bad = || format!("--header {text:?}: write Name: value");
        let (name, value) = text.split_once(':').ok_or_else(bad)?;
        let name: HeaderName = name.trim().parse().map_err(|_| bad())?;
        let value: HeaderValue = value.trim().parse().map_err(|_| bad())?;
        out.append(name, value);
    }
    Ok(out)
}

async fn call(
    flags: &Flags,
    headers: &HeaderMap,
    connection: &mut Option<Connection>,
) -> Result<Value, String> {
    let host = flags
        .url
        .host()
        .ok_or("the URL has no host")?
        .trim_matches(['[', ']']);
    let scheme = flags.url.scheme_str().unwrap_or("http");
    let port = flags.url.port_u16();
    match scheme {
        "http" => over_http(flags, headers, connection, host, port.unwrap_or(80)).await,
        "grpc" => over_grpc(flags, headers, host, port.unwrap_or(80)).await,
        "tcp" => over_tcp(flags, host, port.ok_or("the URL has no port")?).await,
        other => Err(format!("scheme {other:?} is not http, grpc or tcp")),
    }
}

async fn over_http(
    flags: &Flags,
    headers: &HeaderMap,
    slot: &mut Option<Connection>,
    host: &str,
    port: u16,
) -> Result<Value, String> {
    let mut connection = match slot.take().filter(|c| c.is_open() && !flags.close) {
        Some(connection) => connection,
        None => Connection::open(host, port).await?,
    };
    let path = flags.url.path_and_query().map_or("/", |p| p.as_str());
    let mut request = Request::builder()
        .method(flags.method.as_str())
        .uri(path)
        .body(Full::new(Bytes::from(flags.data.clone())))
        .map_err(|e| e.to_string())?;
    request.headers_mut().extend(headers.clone());
    if !headers.contains_key(header::HOST) {
        let authority = flags.url.authority().map_or(host, |a| a.as_str());
        let value = HeaderValue::from_str(authority).map_err(|e| e.to_string())?;
        request.headers_mut().insert(header::HOST, value);
    }
    let local = connection.local.to_string();
    let response = connection.send(request).await?;
    let text = String::from_utf8_lossy(response.body()).into_owned();
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    let result = json!({"status": response.status().as_u16(), "headers": as_json(response.headers()), "body": body, "local": local});
    if !flags.close {
        *slot = Some(connection);
    }
    Ok(result)
}

async fn over_grpc(
    flags: &Flags,
    headers: &HeaderMap,
    host: &str,
    port: u16,
) -> Result<Value, String> {
    let request = grpc::EchoRequest {
        text: flags.data.clone(),
        times: flags.stream.unwrap_or(0),
    };
    let method = if flags.stream.is_some() {
        grpc::REPEAT
    } else {
        grpc::SAY
    };
    let outcome = grpc::call(host, port, method, &request, headers).await?;
    let replies: Vec<_> = outcome
        .replies
        .iter()
        .map(|r| json!({"text": r.text, "pod": r.pod, "peer": r.peer, "number": r.number}))
        .collect();
    Ok(json!({
        "status": outcome.http_status.as_u16(), "grpcStatus": outcome.grpc_status, "grpcMessage": outcome.grpc_message,
        "replies": replies, "headers": as_json(&outcome.headers),
    }))
}

async fn over_tcp(flags: &Flags, host: &str, port: u16) -> Result<Value, String> {
    let mut stream = TcpStream::connect((host, port))
        .await
        .map_err(|e| format!("connect to {host}:{port}: {e}"))?;
    stream
        .write_all(format!("{}\n", flags.data).as_bytes())
        .await
        .map_err(|e| e.to_string())?;
    let mut line = String::new();
    let read = BufReader::new(&mut stream)
        .read_line(&mut line)
        .await
        .map_err(|e| e.to_string())?;
    if read == 0 {
        Err("the connection was closed without an answer".to_owned())
    } else {
        Ok(json!({"line": line.trim_end()}))
    }
}

fn as_json(headers: &HeaderMap) -> Value {
    let mut out = serde_json::Map::new();
    for (name, value) in headers {
        out.insert(
            name.to_string(),
            json!(String::from_utf8_lossy(value.as_bytes())),
        );
    }
    Value::Object(out)
}

/// How often each outcome and each answering pod came.
#[derive(Debug, Default)]
struct Summary {
    calls: u64,
    statuses: BTreeMap<String, u64>,
    pods: BTreeMap<String, u64>,
    told: u32,
}

impl Summary {
    fn count(&mut self, result: &Value) {
        self.calls += 1;
        let status = match &result["error"] {
            Value::String(e) => e.clone(),
            _ => result["status"]
                .as_u64()
                .map_or_else(|| "ok".to_owned(), |s| s.to_string()),
        };
        let failed = result["error"].is_string() || result["status"].as_u64() >= Some(500);
        if failed && self.told < FAILURES_TOLD {
            self.told += 1;
            eprintln!("{} {result}", jiff::Timestamp::now());
        }
        *self.statuses.entry(status).or_default() += 1;
        let body = &result["body"];
        // Bookinfo's reviews call it `podname`.
        let pod = [&body["pod"], &body["podname"], &result["replies"][0]["pod"]]
            .into_iter()
            .find_map(|p| p.as_str());
        if let Some(pod) = pod {
            *self.pods.entry(pod.to_owned()).or_default() += 1;
        }
    }

    fn add(&mut self, other: Summary) {
        self.calls += other.calls;
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        for (pod, count) in other.pods {
            *self.pods.entry(pod).or_default() += count;
        }
    }

    fn shown(&self) -> Value {
        json!({"calls": self.calls, "statuses": self.statuses, "pods": self.pods})
    }
}

/// Of each worker: enough to see what went wrong.
const FAILURES_TOLD: u32 = 5;
