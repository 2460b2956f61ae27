//! An echo server: tells what of a call arrived, over HTTP, TCP and gRPC.

use std::{cell::RefCell, collections::HashMap, env, ffi::OsString, rc::Rc, time::Duration};

use clap::Parser;
use http::StatusCode;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
};

use super::{
    grpc,
    http::{Incoming, Reply, json as json_reply, listen, serve, text},
};

/// Tell what of a call arrived.
#[derive(Debug, Parser)]
#[command(name = "outrigger echo")]
struct Flags {
    /// Ports for HTTP/1.1; 8080 where no port of any kind is given.
    #[arg(long)]
    http: Vec<u16>,
    /// Ports for lines of text.
    #[arg(long)]
    tcp: Vec<u16>,
    /// Ports for gRPC.
    #[arg(long)]
    grpc: Vec<u16>,
    /// Speak first on TCP ports, as mail and database servers do.
    #[arg(long)]
    greet: bool,
}

pub(super) async fn main(args: Vec<OsString>) -> Result<(), String> {
    let mut flags = Flags::try_parse_from(args).unwrap_or_else(|e| e.exit());
    if flags.http.is_empty() && flags.tcp.is_empty() && flags.grpc.is_empty() {
        flags.http.push(8080);
    }
    let own = Rc::new(Own {
        pod: env::var("POD_NAME")
            .or_else(|_| env::var("HOSTNAME"))
            .unwrap_or_default(),
        version: env::var("VERSION").unwrap_or_default(),
    });
    let attempts = Rc::new(RefCell::new(HashMap::new()));
    let mut servers = tokio::task::JoinSet::new();
    for port in flags.http {
        let listener = listen(port).await?;
        println!("HTTP on port {port}");
        let (own, attempts) = (own.clone(), attempts.clone());
        servers.spawn_local(async move {
            serve(listener, move |r| {
                over_http(own.clone(), attempts.clone(), r)
            })
            .await
        });
    }
    for port in flags.tcp {
        let listener = listen(port).await?;
        println!("TCP on port {port}");
        servers.spawn_local(over_tcp(listener, own.clone(), flags.greet));
    }
    for port in flags.grpc {
        let listener = listen(port).await?;
        println!("gRPC on port {port}");
        servers.spawn_local(grpc::serve(listener, own.pod.clone()));
    }
    match servers.join_next().await {
        Some(Ok(Err(e))) => Err(format!("outrigger echo: {e}")),
        Some(Err(e)) => Err(format!("outrigger echo: {e}")),
        _ => Ok(()),
    }
}

#[derive(Debug)]
struct Own {
    pod: String,
    version: String,
}

/// How often each key was asked for, for paths that fail a number of times.
type Attempts = Rc<RefCell<HashMap<String, u32>>>;

/// `/status/CODE` answers so; `/delay/MILLISECONDS` takes its time; `/flaky/N/KEY` fails N times for each key; any other
/// path answers at once. All but failures tell about the request.
async fn over_http(own: Rc<Own>, attempts: Attempts, incoming: Incoming) -> Reply {
    let path = incoming.request.uri().path().to_owned();
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let mut status = StatusCode::OK;
    match parts.as_slice() {
        ["status", code, ..] => match code
            .parse()
            .ok()
            .and_then(|c: u16| StatusCode::from_u16(c).ok())
        {
            Some(code) => status = code,
            None => {
                return text(
                    StatusCode::BAD_REQUEST,
                    format!("{code:?} is not a status\n"),
                );
            }
        },
        ["delay", milliseconds, ..] => {
            let Ok(milliseconds) = milliseconds.parse() else {
                return text(
                    StatusCode::BAD_REQUEST,
                    format!("{milliseconds:?} is not a number\n"),
                );
            };
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        }
        ["flaky", times, key] => {
            let mut attempts = attempts.borrow_mut();
            let count = attempts.entry((*key).to_owned()).or_insert(0);
            *count += 1;
            if *count <= times.parse().unwrap_or(0) {
                return text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    format!("attempt {count}\n"),
                );
            }
        }
        _ => {}
    }
    json_reply(status, &describe(&own, &incoming))
}

fn describe(own: &Own, incoming: &Incoming) -> Value {
    let request = &incoming.request;
    let mut headers = serde_json::Map::new();
    for name in request.headers().keys() {
        let values: Vec<_> = request
            .headers()
            .get_all(name)
            .iter()
            .map(|v| String::from_utf8_lossy(v.as_bytes()))
            .collect();
        headers.insert(name.to_string(), json!(values.join(",")));
    }
    json!({
        "pod": own.pod,
        "version": own.version,
        "method": request.method().as_str(),
        "path": request.uri().path_and_query().map_or("/", |p| p.as_str()),
        "headers": headers,
        "peer": incoming.peer.ip().to_canonical().to_string(),
        "local": incoming.local.ip().to_canonical().to_string(),
        "port": incoming.local.port(),
        "body": String::from_utf8_lossy(request.body()),
    })
}

/// Answers each line with `POD PEER LINE`.
async fn over_tcp(listener: TcpListener, own: Rc<Own>, greet: bool) -> std::io::Result<()> {
    loop {
        let (mut stream, peer) = listener.accept().await?;
        let own = own.clone();
        tokio::task::spawn_local(async move {
            let peer = peer.ip().to_canonical();
            if greet
                && stream
                    .write_all(format!("hello from {}\n", own.pod).as_bytes())
                    .await
                    .is_err()
            {
                return;
            }
            let (read, mut write) = stream.split();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let answer = format!("{} {peer} {line}\n", own.pod);
                if write.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
    }
}
