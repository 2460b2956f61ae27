//! The admin endpoint: what runs, in Envoy's paths and forms. JSON is canonical protobuf JSON.
//!
//! It lives on the main thread and answers from what that thread owns. Paths that change something want POST, as in
//! Envoy; the endpoint belongs on a loopback address or a unix socket.

mod certs;
mod clusters;
mod config_dump;
mod control;
mod info;
mod listeners;
mod mask;

use std::{cell::RefCell, collections::HashMap, convert::Infallible, io, rc::Rc};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::spawn_local,
};

use crate::{discovery::Truth, plan::Address, server::Server};

/// What the handlers answer from.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The running process.
    pub server: Rc<Server>,
    /// Its configuration.
    pub truth: Rc<RefCell<Truth>>,
}

/// Opens the endpoint and serves it for the life of the process. Gives the address, with the port the system chose.
pub fn start(admin: Admin, address: &Address) -> io::Result<Address> {
    match address {
        Address::Socket(address) => {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let bound = listener.local_addr()?;
            let listener = TcpListener::from_std(listener)?;
            spawn_local(async move {
                loop {
                    match listener.accept().await {
                        Ok((stream, _)) => connection(admin.clone(), stream),
                        Err(error) => pause(&error).await,
                    }
                }
            });
            Ok(Address::Socket(bound))
        }
        Address::Pipe { path, .. } => {
            // What a former process left behind is in the way.
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            spawn_local(async move {
                loop {
                    match listener.accept().await {
                        Ok((stream, _)) => connection(admin.clone(), stream),
                        Err(error) => pause(&error).await,
                    }
                }
            });
            Ok(address.clone())
        }
        Address::Name { .. } => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "must be an IP address",
        )),
    }
}

/// Opens the access logs and the file of `--log-path` anew.
pub(crate) fn reopen_logs() {
    crate::access_log::reopen();
    if let Err(error) = crate::logging::reopen() {
        tracing::error!("--log-path: cannot be opened anew: {error}");
    }
}

/// Out of file descriptors: others will close some.
async fn pause(error: &io::Error) {
    tracing::warn!("accept: {error}");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
}

fn connection(admin: Admin, stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
    spawn_local(async move {
        let service = service_fn(move |request: Request<Incoming>| {
            let answer = admin.answer(
                request.method(),
                request.uri().path(),
                request.uri().query(),
            );
            async move { Ok::<_, Infallible>(answer.into_response()) }
        });
        // A peer that goes away in the middle is its own affair.
        let _ = http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await;
    });
}

/// One answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: String,
}

impl Answer {
    fn text(body: impl Into<String>) -> Self {
        Self {
            status: 200,
            content_type: "text/plain; charset=UTF-8",
            body: body.into(),
        }
    }

    /// A message with the names of its `.proto`, as Envoy prints all of them.
    fn message<M: prost::Message + prost::Name>(message: &M) -> Self {
        let value = proto::json::to_value(message);
        Self::json(&proto::json::with_proto_names(&M::full_name(), value))
    }

    fn json(value: &serde_json::Value) -> Self {
        // serde_json prints one space after a colon and two of indentation, Envoy one; readers do not care.
        let body = format!("{value:#}\n");
        Self {
            status: 200,
            content_type: "application/json",
            body,
        }
    }

    fn status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body.into()));
        *response.status_mut() =
            StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static(self.content_type),
        );
        headers.insert(
            header::CACHE_CONTROL,
            header::HeaderValue::from_static("no-cache, max-age=0"),
        );
        headers.insert(
            "x-content-type-options",
            header::HeaderValue::from_static("nosniff"),
        );
        headers.insert(header::SERVER, header::HeaderValue::from_static("envoy"));
        response
    }
}

/// Query parameters, percent-decoded; a repeated one keeps its last value.
#[derive(Debug, Default)]
pub(crate) struct Params(HashMap<String, String>);

impl Params {
    fn parse(query: Option<&str>) -> Self {
        let pairs = query
            .unwrap_or_default()
            .split('&')
            .filter(|p| !p.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decode(key), decode(value))
                })
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }
}

/// Percent-decoding; what is not valid stays as it is.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = bytes
            .get(at + 1..at + 3)
            .and_then(|h| std::str::from_utf8(h).ok());
        match (bytes[at], hex.and_then(|h| u8::from_str_radix(h, 16).ok())) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 3;
            }
            (b'+', _) => {
                out.push(b' ');
                at += 1;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Paths with what they tell, and whether they change something.
const PATHS: &[(&str, bool, &str)] = &[
    ("/certs", false, "print certs on machine"),
    ("/clusters", false, "upstream cluster status"),
    (
        "/config_dump",
        false,
        "dump current configs (resource, mask, include_eds, name_regex)",
    ),
    ("/contention", false, "tells that locks are not traced"),
    (
        "/drain_listeners",
        true,
        "drain listeners (graceful, skip_exit, inboundonly)",
    ),
    (
        "/healthcheck/fail",
        true,
        "cause the server to fail health checks",
    ),
    (
        "/healthcheck/ok",
        true,
        "cause the server to pass health checks",
    ),
    ("/help", false, "print out list of admin commands"),
    (
        "/hot_restart_version",
        false,
        "print the hot restart compatibility version",
    ),
    ("/init_dump", false, "dump what is still warming"),
    ("/listeners", false, "print listener info"),
    (
        "/logging",
        true,
        "query/change logging levels (level, paths, or NAME=LEVEL)",
    ),
    ("/memory", false, "print current allocation/heap usage"),
    ("/quitquitquit", true, "exit the server"),
    (
        "/ready",
        false,
        "print server state, return 200 if LIVE, otherwise return 503",
    ),
    ("/reopen_logs", true, "reopen access logs"),
    ("/reset_counters", true, "reset all counters to zero"),
    ("/runtime", false, "print runtime values"),
    (
        "/server_info",
        false,
        "print server version/status information",
    ),
    (
        "/stats",
        false,
        "print server stats (filter, usedonly, type, format=text|json|prometheus, histogram_buckets)",
    ),
    (
        "/stats/recentlookups",
        false,
        "tells that lookups of stats are not tracked",
    ),
    (
        "/stats/prometheus",
        false,
        "print server stats in prometheus format (filter, usedonly)",
    ),
];

/// Nothing here waits long for a lock, and nothing measures it.
const CONTENTION: &str =
    "Mutex contention tracing is not enabled. There is no switch for it: workers share no locks.\n";
/// Envoy counts the names that its stats are looked up by; here a stat is found once and kept.
const RECENT_LOOKUPS: &str = "stat lookups are not tracked: each stat is looked up once\n";

impl Admin {
    /// The answer to a request.
    pub fn answer(&self, method: &Method, path: &str, query: Option<&str>) -> Answer {
        let Some((_, mutates, _)) = PATHS.iter().find(|(known, ..)| *known == path) else {
            if path == "/" {
                return help();
            }
            let message = format!("invalid path. admin commands are:\n{}", commands());
            return Answer::text(message).status(404);
        };
        if *mutates && *method != Method::POST {
            tracing::error!(
                "admin path \"{path}\" mutates state, method={method} rather than POST"
            );
            let message =
                format!("Invalid request; \"{path}\" mutates state: use POST (curl -X POST)\n");
            return Answer::text(message).status(405);
        }
        if !matches!(*method, Method::GET | Method::HEAD | Method::POST) {
            return Answer::text("Method Not Allowed\n").status(405);
        }
        let params = Params::parse(query);
        match path {
            "/certs" => certs::certs(self),
            "/clusters" => clusters::clusters(self, &params),
            "/config_dump" => config_dump::config_dump(self, &params),
            "/drain_listeners" => control::drain_listeners(self, &params),
            "/healthcheck/fail" => control::health_check(self, true),
            "/healthcheck/ok" => control::health_check(self, false),
            "/hot_restart_version" => Answer::text("disabled\n"),
            "/init_dump" => info::init_dump(self),
            "/listeners" => listeners::listeners(self, &params),
            "/logging" => control::logging(&params),
            "/memory" => info::memory(),
            "/quitquitquit" => control::quit(self),
            "/ready" => info::ready(self),
            "/reopen_logs" => {
                reopen_logs();
                Answer::text("OK\n")
            }
            "/reset_counters" => control::reset_counters(self),
            "/runtime" => info::runtime(self),
            "/server_info" => info::server_info(self),
            "/contention" => Answer::text(CONTENTION).status(503),
            "/stats" => info::stats(self, &params, None),
            "/stats/recentlookups" => Answer::text(RECENT_LOOKUPS).status(501),
            "/stats/prometheus" => info::stats(self, &params, Some("prometheus")),
            _ => help(),
        }
    }
}

fn help() -> Answer {
    Answer::text(format!("admin commands are:\n{}", commands()))
}

fn commands() -> String {
    PATHS
        .iter()
        .map(|(path, mutates, what)| {
            let method = if *mutates { " (POST)" } else { "" };
            format!("  {path}{method}: {what}\n")
        })
        .collect()
}

#[cfg(test)]
mod tests;
