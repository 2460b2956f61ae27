//! The merged scrape: the agent's own figures, the proxy's, and the application's.
//!
//! A source that fails costs only its own part; the failure is counted by type.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, header};
use serde::Deserialize;

use crate::{
    AgentError,
    http_client::{Dial, HttpError, send},
};

/// Where the application's metrics are, from `ISTIO_PROMETHEUS_ANNOTATIONS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AppScrape {
    targets: Vec<(u16, String)>,
}

#[derive(Deserialize)]
struct Annotations {
    #[serde(default)]
    scrape: String,
    #[serde(default)]
    path: String,
    #[serde(default)]
    port: String,
    #[serde(default)]
    targets: String,
}

impl AppScrape {
    /// Reads the variable's JSON; `None` where the application is not to be scraped.
    pub(crate) fn parse(text: &str) -> Result<Option<Self>, AgentError> {
        let bad = |why: String| {
            AgentError::Config(format!(
                "environment variable ISTIO_PROMETHEUS_ANNOTATIONS: {why}"
            ))
        };
        let a: Annotations = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        if a.scrape == "false" {
            return Ok(None);
        }
        let slash = |path: &str| match path {
            "" => "/metrics".to_owned(),
            path if path.starts_with('/') => path.to_owned(),
            path => format!("/{path}"),
        };
        let port = |text: &str| -> Result<u16, AgentError> {
            text.parse()
                .map_err(|_| bad(format!("{text:?} is not a port")))
        };
        let mut targets = Vec::new();
        for target in a
            .targets
            .split(',')
            .map(str::trim)
            .filter(|t| !t.is_empty())
        {
            let (number, path) = target.split_once('/').unwrap_or((target, ""));
            targets.push((port(number)?, slash(path)));
        }
        if targets.is_empty() {
            let number = if a.port.is_empty() {
                80
            } else {
                port(&a.port)?
            };
            targets.push((number, slash(&a.path)));
        }
        Ok(Some(Self { targets }))
    }
}

/// Counters of the agent itself.
#[derive(Debug, Default)]
pub(crate) struct AgentMetrics {
    scrapes: AtomicU64,
    proxy_failures: AtomicU64,
    app_failures: AtomicU64,
}

/// A body beyond this is not metrics any more.
const MAX_BODY: usize = 10 << 20;

impl AgentMetrics {
    /// Collects all sources, with `more` of the agent's own; gives the content type to answer with and the text.
    pub(crate) async fn scrape(
        &self,
        prometheus_port: u16,
        app: Option<&AppScrape>,
        headers: &HeaderMap,
        more: &str,
    ) -> (String, Vec<u8>) {
        self.scrapes.fetch_add(1, Ordering::Relaxed);
        let proxy = fetch(prometheus_port, "/stats/prometheus", headers).await;
        let mut parts = Vec::new();
        for (port, path) in app.map(|a| a.targets.as_slice()).unwrap_or_default() {
            parts.push(fetch(*port, path, headers).await);
        }
        let mut content_type = "text/plain; version=0.0.4; charset=utf-8".to_owned();
        let mut bodies = Vec::new();
        match proxy {
            Ok((_, body)) => bodies.push(body),
            Err(e) => {
                tracing::warn!("cannot scrape the proxy: {e}");
                self.proxy_failures.fetch_add(1, Ordering::Relaxed);
            }
        }
        for part in parts {
            match part {
                Ok((kind, body)) => {
                    // The application's form decides: the others are valid in both.
                    content_type = kind.unwrap_or(content_type);
                    bodies.push(body);
                }
                Err(e) => {
                    tracing::warn!("cannot scrape the application: {e}");
                    self.app_failures.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let open_metrics = content_type.starts_with("application/openmetrics-text");
        let mut out = (self.own() + more).into_bytes();
        for body in bodies {
            let body = body.trim_ascii_end();
            out.extend_from_slice(body.strip_suffix(b"# EOF").unwrap_or(body).trim_ascii_end());
            out.push(b'\n');
        }
        if open_metrics {
            out.extend_from_slice(b"# EOF\n");
        }
        (content_type, out)
    }

    fn own(&self) -> String {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        format!(
            "# TYPE istio_agent_scrapes_total counter\nistio_agent_scrapes_total {}\n\
             # TYPE istio_agent_scrape_failures_total counter\n\
             istio_agent_scrape_failures_total{{type=\"application\"}} {}\n\
             istio_agent_scrape_failures_total{{type=\"envoy\"}} {}\n",
            read(&self.scrapes),
            read(&self.app_failures),
            read(&self.proxy_failures),
        )
    }
}

async fn fetch(
    port: u16,
    path: &str,
    headers: &HeaderMap,
) -> Result<(Option<String>, Bytes), HttpError> {
    let to = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let mut request = Request::new(Bytes::new());
    *request.uri_mut() = path
        .parse()
        .map_err(|_| HttpError::Exchange(to, format!("bad path {path:?}")))?;
    for name in [
        "accept",
        "user-agent",
        "x-prometheus-scrape-timeout-seconds",
    ] {
        if let Some(value) = headers.get(name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    let timeout = headers
        .get("x-prometheus-scrape-timeout-seconds")
        .and_then(|v| v.to_str().ok()?.parse().ok())
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .unwrap_or(Duration::from_secs(10));
    let response = send(
        Dial {
            to,
            from: None,
            timeout,
            max_body: MAX_BODY,
        },
        request,
    )
    .await?;
    if !response.status().is_success() {
        return Err(HttpError::Exchange(
            to,
            format!("{path}: status {}", response.status()),
        ));
    }
    let kind = response.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|v| v.to_str().ok()).map(str::to_owned);
    Ok((kind, response.into_body()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_name_port_and_path() {
        let parse = |text| AppScrape::parse(text).unwrap().map(|a| a.targets);
        assert_eq!(
            parse(r#"{"scrape":"true","path":"m","port":"9080"}"#),
            Some(vec![(9080, "/m".into())])
        );
        assert_eq!(parse(r#"{"scrape":"false","path":"","port":"9080"}"#), None);
        assert_eq!(parse("{}"), Some(vec![(80, "/metrics".into())]));
        assert_eq!(
            parse(r#"{"targets":"81/a, 82"}"#),
            Some(vec![(81, "/a".into()), (82, "/metrics".into())])
        );
        assert!(
            AppScrape::parse(r#"{"port":"http"}"#)
                .unwrap_err()
                .to_string()
                .contains("\"http\"")
        );
    }
}
