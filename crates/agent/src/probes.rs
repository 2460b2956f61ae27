//! The application's own probes, which the injector moved to the agent's port.
//!
//! `ISTIO_KUBE_APP_PROBERS` holds, for each rewritten path, what the kubelet would have done. The agent does it
//! from 127.0.0.6, so that the request reaches the application as passed-through traffic.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header,
};
use serde::Deserialize;

use crate::{
    AgentError,
    http_client::{Dial, HttpError, connect, send},
};

/// The stored probes, by path (`/app-health/CONTAINER/readyz`).
#[derive(Debug, Clone, Default)]
pub(crate) struct Probes(BTreeMap<String, Probe>);

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    grpc: Option<Grpc>,
    timeout_seconds: Option<u64>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpGet {
    #[serde(default)]
    path: String,
    port: u16,
    host: Option<String>,
    #[serde(default)]
    scheme: String,
    #[serde(default)]
    http_headers: Vec<Header>,
}

#[derive(Debug, Clone, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Debug, Clone, Deserialize)]
struct TcpSocket {
    port: u16,
}

#[derive(Debug, Clone, Deserialize)]
struct Grpc {
    port: u16,
    service: Option<String>,
}

/// What the kubelet reads of a body at most.
const MAX_BODY: usize = 10 << 10;

impl Probes {
    /// Reads the variable's JSON.
    pub(crate) fn parse(text: &str) -> Result<Self, AgentError> {
        let bad = |why: String| {
            AgentError::Config(format!(
                "environment variable ISTIO_KUBE_APP_PROBERS: {why}"
            ))
        };
        let probes: BTreeMap<String, Probe> =
            serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        for (path, probe) in &probes {
            if !valid_path(path) {
                return Err(bad(format!(
                    "{path:?}: expected /app-health/CONTAINER/(readyz|livez|startupz) or \
                     /app-lifecycle/CONTAINER/(prestopz|poststartz)"
                )));
            }
            let kinds = [
                probe.http_get.is_some(),
                probe.tcp_socket.is_some(),
                probe.grpc.is_some(),
            ];
            if kinds.iter().filter(|k| **k).count() != 1 {
                return Err(bad(format!(
                    "{path:?}: needs one of httpGet, tcpSocket and grpc"
                )));
            }
        }
        Ok(Self(probes))
    }

    /// Runs the probe of `path` against the pod's address.
    pub(crate) async fn run(
        &self,
        pod: IpAddr,
        path: &str,
        headers: &HeaderMap,
    ) -> Response<Bytes> {
        let Some(probe) = self.0.get(path) else {
            return answer(
                StatusCode::BAD_REQUEST,
                format!("no probe is stored for {path}\n"),
            );
        };
        let timeout = Duration::from_secs(probe.timeout_seconds.filter(|s| *s > 0).unwrap_or(1));
        let from: IpAddr = match pod {
            IpAddr::V4(_) => Ipv4Addr::new(127, 0, 0, 6).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6).into(),
        };
        let dial = |port| Dial {
            to: SocketAddr::new(pod, port),
            from: Some(from),
            timeout,
            max_body: 1 << 20,
        };
        let result = if let Some(get) = &probe.http_get {
            http(dial(get.port), get, headers).await
        } else if let Some(tcp) = &probe.tcp_socket {
            connect(dial(tcp.port))
                .await
                .map(|_| answer(StatusCode::OK, String::new()))
        } else if let Some(grpc) = &probe.grpc {
            grpc_health(dial(grpc.port), grpc.service.as_deref().unwrap_or_default()).await
        } else {
            Ok(answer(
                StatusCode::BAD_REQUEST,
                "the probe says nothing to do\n".into(),
            ))
        };
        result.unwrap_or_else(|e| answer(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")))
    }
}

fn valid_path(path: &str) -> bool {
    let mut parts = path.strip_prefix('/').unwrap_or_default().split('/');
    let kind = parts.next();
    let container = parts.next().is_some_and(|c| !c.is_empty());
    let last = parts.next();
    let known = match kind {
        Some("app-health") => matches!(last, Some("livez" | "readyz" | "startupz")),
        Some("app-lifecycle") => matches!(last, Some("poststartz" | "prestopz")),
        _ => false,
    };
    known && container && parts.next().is_none()
}

fn answer(status: StatusCode, body: String) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    response
}

async fn http(
    dial: Dial,
    get: &HttpGet,
    incoming: &HeaderMap,
) -> Result<Response<Bytes>, HttpError> {
    if get.scheme.eq_ignore_ascii_case("https") {
        return Err(HttpError::Exchange(
            dial.to,
            "an HTTPS probe needs TLS, which the agent does not speak yet: use an HTTP or TCP probe".into(),
        ));
    }
    let path = if get.path.starts_with('/') {
        get.path.clone()
    } else {
        format!("/{}", get.path)
    };
    let bad = |what: &str| HttpError::Exchange(dial.to, format!("the probe's {what} is not valid"));
    let mut request = Request::new(Bytes::new());
    *request.method_mut() = Method::GET;
    *request.uri_mut() = path.parse::<Uri>().map_err(|_| bad("path"))?;
    let headers = request.headers_mut();
    for (name, value) in incoming {
        if *name != header::CONNECTION && *name != header::HOST {
            headers.append(name, value.clone());
        }
    }
    // The kubelet spoke to the agent's port; the application is to see its own.
    if let Some(host) = incoming.get(header::HOST).and_then(|h| h.to_str().ok()) {
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let host = format!("{name}:{}", get.port);
        headers.insert(
            header::HOST,
            HeaderValue::from_str(&host).map_err(|_| bad("host"))?,
        );
    }
    if let Some(host) = &get.host {
        headers.insert(
            header::HOST,
            HeaderValue::from_str(host).map_err(|_| bad("host"))?,
        );
    }
    for h in &get.http_headers {
        let name = HeaderName::from_bytes(h.name.as_bytes()).map_err(|_| bad("header name"))?;
        let value = HeaderValue::from_str(&h.value).map_err(|_| bad("header value"))?;
        headers.insert(name, value);
    }
    let mut response = send(dial, request).await?;
    // A redirect elsewhere counts as success, as it does for the kubelet.
    if response.status().is_redirection() {
        *response.status_mut() = StatusCode::OK;
    }
    let body = response.body_mut();
    body.truncate(MAX_BODY);
    let (mut parts, body) = response.into_parts();
    parts.headers = HeaderMap::new();
    Ok(Response::from_parts(parts, body))
}

/// `grpc.health.v1.Health/Check`: two fields of protobuf, so no generated client.
async fn grpc_health(dial: Dial, service: &str) -> Result<Response<Bytes>, HttpError> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Check {
        #[prost(string, tag = "1")]
        service: String,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Health {
        #[prost(int32, tag = "1")]
        status: i32,
    }
    const SERVING: i32 = 1;
    let failed = |e: String| HttpError::Exchange(dial.to, e);
    let call = async {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", dial.to))
            .map_err(|e| failed(e.to_string()))?;
        let channel = endpoint
            .connect_with_connector(tower::service_fn(move |_| async move {
                connect(dial).await.map(hyper_util::rt::TokioIo::new)
            }))
            .await
            .map_err(|e| failed(e.to_string()))?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.map_err(|e| failed(e.to_string()))?;
        let request = tonic::Request::new(Check {
            service: service.to_owned(),
        });
        let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let codec = tonic_prost::ProstCodec::<Check, Health>::default();
        let health = client
            .unary(request, path, codec)
            .await
            .map_err(|s| failed(s.to_string()))?;
        Ok(match health.into_inner().status {
            SERVING => answer(StatusCode::OK, String::new()),
            other => answer(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("gRPC health status {other}\n"),
            ),
        })
    };
    tokio::time::timeout(dial.timeout, call)
        .await
        .unwrap_or(Err(HttpError::Timeout(dial.to, dial.timeout)))
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[test]
    fn paths_and_kinds_are_checked() {
        assert!(Probes::parse(r#"{"/app-health/web/readyz":{"tcpSocket":{"port":1}}}"#).is_ok());
        for (text, want) in [
            (
                r#"{"/app-health/web/other":{"tcpSocket":{"port":1}}}"#,
                "expected /app-health/",
            ),
            (r#"{"/app-health/web/readyz":{}}"#, "needs one of"),
            ("nonsense", "ISTIO_KUBE_APP_PROBERS"),
        ] {
            let error = Probes::parse(text).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[tokio::test]
    async fn an_http_probe_reaches_the_application_with_its_own_port_and_headers() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let probes = Probes::parse(&format!(
            r#"{{"/app-health/web/livez":{{"httpGet":{{"path":"/live?x=1","port":{port},
                "httpHeaders":[{{"name":"x","value":"why"}}]}},"timeoutSeconds":5}}}}"#
        ))
        .unwrap();
        let application = async {
            let (mut stream, peer) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let n = stream.read(&mut request).await.unwrap();
            stream
                .write_all(b"HTTP/1.1 418 Teapot\r\ncontent-length: 3\r\n\r\npot")
                .await
                .unwrap();
            (peer.ip(), String::from_utf8(request[..n].to_vec()).unwrap())
        };
        let mut headers = HeaderMap::new();
        headers.insert("host", "10.0.0.1:15020".parse().unwrap());
        let probe = probes.run(
            "127.0.0.1".parse().unwrap(),
            "/app-health/web/livez",
            &headers,
        );
        let (answer, (peer, request)) = tokio::join!(probe, application);
        assert_eq!(
            (answer.status().as_u16(), &answer.body()[..]),
            (418, &b"pot"[..])
        );
        assert_eq!(peer, IpAddr::from([127, 0, 0, 6]));
        assert!(
            request.starts_with("GET /live?x=1 HTTP/1.1\r\n"),
            "{request}"
        );
        assert!(
            request.contains(&format!("Host: 10.0.0.1:{port}\r\n")),
            "{request}"
        );
        assert!(request.contains("X: why\r\n"), "{request}");
    }

    #[tokio::test]
    async fn a_refused_connection_is_a_failed_probe() {
        let port = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let probes = Probes::parse(&format!(
            r#"{{"/app-health/web/readyz":{{"tcpSocket":{{"port":{port}}}}}}}"#
        ))
        .unwrap();
        let pod = "127.0.0.1".parse().unwrap();
        let answer = probes
            .run(pod, "/app-health/web/readyz", &HeaderMap::new())
            .await;
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let answer = probes
            .run(pod, "/app-health/none/readyz", &HeaderMap::new())
            .await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    }
}
