//! `wait` and `request`: the small clients that pod templates call.

use std::{
    net::{SocketAddr, ToSocketAddrs},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Uri, header};

use crate::{
    AgentError,
    http_client::{Dial, send},
};

/// Asks `url` until it answers 200. Errors: a bad URL, or none within `limit`.
pub(crate) async fn wait(
    url: &str,
    limit: Duration,
    request_timeout: Duration,
    period: Duration,
) -> Result<(), String> {
    let (uri, to) = resolve(url).map_err(|e| e.to_string())?;
    let end = Instant::now() + limit;
    let mut last;
    loop {
        let mut request = Request::new(Bytes::new());
        *request.uri_mut() = uri.clone();
        let dial = Dial {
            to,
            from: None,
            timeout: request_timeout,
            max_body: 1 << 20,
        };
        match send(dial, request).await {
            Ok(response) if response.status() == 200 => return Ok(()),
            Ok(response) => {
                let body = String::from_utf8_lossy(response.body()).trim().to_owned();
                last = format!("status {}: {body}", response.status().as_u16());
            }
            Err(e) => last = e.to_string(),
        }
        if Instant::now() + period > end {
            return Err(format!(
                "timeout waiting for Envoy proxy to become ready. Last error: {last}"
            ));
        }
        tokio::time::sleep(period).await;
    }
}

/// Sends one request to a port of this pod; gives the body, or what went wrong.
pub(crate) async fn request(
    method: &str,
    path: &str,
    body: &str,
    port: u16,
) -> Result<String, String> {
    let path = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    let request = Request::builder()
        .method(method)
        .uri(&path)
        .header(header::HOST, format!("localhost:{port}"))
        .body(Bytes::from(body.to_owned()))
        .map_err(|e| format!("{method} {path}: {e}"))?;
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    let timeout = Duration::from_secs(60);
    let response = send(
        Dial {
            to,
            from: None,
            timeout,
            max_body: 1 << 30,
        },
        request,
    )
    .await
    .map_err(|e| e.to_string())?;
    let body = String::from_utf8_lossy(response.body()).into_owned();
    if response.status().is_success() {
        return Ok(body);
    }
    Err(format!(
        "{method} {path}: status {}: {}",
        response.status().as_u16(),
        body.trim()
    ))
}

fn resolve(url: &str) -> Result<(Uri, SocketAddr), AgentError> {
    let bad = |why: &str| AgentError::Flag(format!("--url {url:?}: {why}"));
    let uri: Uri = url.parse().map_err(|_| bad("not a URL"))?;
    if uri.scheme_str() != Some("http") {
        return Err(bad("expected http://HOST:PORT/PATH"));
    }
    let host = uri
        .host()
        .ok_or_else(|| bad("it names no host"))?
        .to_owned();
    let port = uri.port_u16().unwrap_or(80);
    let to = (host.trim_matches(['[', ']']), port)
        .to_socket_addrs()
        .map_err(|e| bad(&format!("cannot resolve {host}: {e}")))?
        .min_by_key(SocketAddr::is_ipv6)
        .ok_or_else(|| bad("the host has no address"))?;
    let path = uri
        .path_and_query()
        .map_or("/", |p| p.as_str())
        .parse()
        .map_err(|_| bad("bad path"))?;
    Ok((path, to))
}
