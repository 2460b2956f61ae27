//! Probes: what the kubelet asks a container, from the node.

use std::{net::Ipv4Addr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::objects::{list, service::container_port, text};

/// What is done to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Http {
        host: Option<String>,
        port: u16,
        path: String,
        headers: Vec<(String, String)>,
    },
    Tcp {
        port: u16,
    },
    Exec {
        command: Vec<String>,
    },
    /// Of hooks only: wait.
    Sleep(Duration),
}

/// A probe with Kubernetes' defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Probe {
    pub(crate) action: Action,
    pub(crate) initial_delay: Duration,
    pub(crate) period: Duration,
    pub(crate) timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

impl Probe {
    /// Reads `container[field]`; `None` where there is none.
    pub(crate) fn read(
        pod: &Value,
        container: &Value,
        field: &str,
    ) -> Result<Option<Self>, String> {
        let probe = &container[field];
        if probe.is_null() {
            return Ok(None);
        }
        let action = action(pod, container, probe).map_err(|e| format!("{field}: {e}"))?;
        if matches!(action, Action::Sleep(_)) {
            return Err(format!(
                "{field}: sleep is for lifecycle hooks: write httpGet, tcpSocket or exec"
            ));
        }
        let number = |name: &str, default: u64| probe[name].as_u64().unwrap_or(default);
        Ok(Some(Self {
            action,
            initial_delay: Duration::from_secs(number("initialDelaySeconds", 0)),
            period: Duration::from_secs(number("periodSeconds", 10).max(1)),
            timeout: Duration::from_secs(number("timeoutSeconds", 1).max(1)),
            success_threshold: number("successThreshold", 1).max(1) as u32,
            failure_threshold: number("failureThreshold", 3).max(1) as u32,
        }))
    }
}

/// Reads `httpGet`, `tcpSocket` or `exec`, of a probe or of a lifecycle hook.
pub(crate) fn action(pod: &Value, container: &Value, value: &Value) -> Result<Action, String> {
    let port = |v: &Value| -> Result<u16, String> {
        let number = match v {
            Value::Number(n) => n.as_u64().and_then(|n| u16::try_from(n).ok()),
            Value::String(s) => s.parse().ok().or_else(|| {
                let own = list(container, &["ports"])
                    .iter()
                    .find(|p| text(p, &["name"]) == s);
                own.and_then(|p| p["containerPort"].as_u64())
                    .map(|n| n as u16)
                    .or_else(|| container_port(pod, s))
            }),
            _ => None,
        };
        number
            .ok_or_else(|| format!("port {v} is neither a number nor the name of a container port"))
    };
    if let Some(get) = value.get("httpGet").filter(|g| g.is_object()) {
        if text(get, &["scheme"]).eq_ignore_ascii_case("https") {
            return Err(
                "httpGet.scheme HTTPS is not asked here: use HTTP, tcpSocket or exec".to_owned(),
            );
        }
        let path = match text(get, &["path"]) {
            "" => "/".to_owned(),
            p if p.starts_with('/') => p.to_owned(),
            p => format!("/{p}"),
        };
        let headers = list(get, &["httpHeaders"])
            .iter()
            .map(|h| {
                (
                    text(h, &["name"]).to_owned(),
                    text(h, &["value"]).to_owned(),
                )
            })
            .collect();
        let host = Some(text(get, &["host"]).to_owned()).filter(|h| !h.is_empty());
        return Ok(Action::Http {
            host,
            port: port(&get["port"])?,
            path,
            headers,
        });
    }
    if let Some(socket) = value.get("tcpSocket").filter(|s| s.is_object()) {
        return Ok(Action::Tcp {
            port: port(&socket["port"])?,
        });
    }
    if let Some(exec) = value.get("exec").filter(|e| e.is_object()) {
        let command: Vec<String> = list(exec, &["command"])
            .iter()
            .filter_map(|c| c.as_str().map(str::to_owned))
            .collect();
        return if command.is_empty() {
            Err("exec.command is empty".to_owned())
        } else {
            Ok(Action::Exec { command })
        };
    }
    if let Some(seconds) = value["sleep"]["seconds"].as_u64() {
        return Ok(Action::Sleep(Duration::from_secs(seconds)));
    }
    if value["grpc"].is_object() {
        return Err(
            "grpc is asked only through a sidecar's rewritten probe: use tcpSocket or exec"
                .to_owned(),
        );
    }
    Err("write httpGet, tcpSocket or exec".to_owned())
}

/// Asks over the network; the error says what came instead. `Exec` is not for this function.
pub(crate) async fn ask(action: &Action, address: Ipv4Addr, limit: Duration) -> Result<(), String> {
    let work = async {
        match action {
            Action::Tcp { port } => TcpStream::connect((address, *port))
                .await
                .map(drop)
                .map_err(|e| format!("connect to {address}:{port}: {e}")),
            Action::Http {
                host,
                port,
                path,
                headers,
            } => {
                let target = host.clone().unwrap_or_else(|| address.to_string());
                let status = get(&target, *port, path, headers)
                    .await
                    .map_err(|e| format!("GET http://{target}:{port}{path}: {e}"))?;
                if (200..400).contains(&status) {
                    Ok(())
                } else {
                    Err(format!("GET http://{target}:{port}{path}: status {status}"))
                }
            }
            Action::Sleep(duration) => {
                tokio::time::sleep(*duration).await;
                Ok(())
            }
            Action::Exec { .. } => Err("a command is not asked over the network".to_owned()),
        }
    };
    timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", limit.as_secs())))
}

async fn get(
    host: &str,
    port: u16,
    path: &str,
    headers: &[(String, String)],
) -> Result<u16, String> {
    let mut stream = TcpStream::connect((host, port))
        .await
        .map_err(|e| e.to_string())?;
    let own = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    let mut request = format!("GET {path} HTTP/1.1\r\n");
    if !own("host") {
        request.push_str(&format!("Host: {host}:{port}\r\n"));
    }
    if !own("user-agent") {
        request.push_str("User-Agent: kube-probe/1.30\r\n");
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("Accept: */*\r\nConnection: close\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|e| e.to_string())?;
    let mut head = Vec::new();
    let mut chunk = [0; 512];
    while !head.contains(&b'\n') && head.len() < 4096 {
        match stream.read(&mut chunk).await.map_err(|e| e.to_string())? {
            0 => break,
            n => head.extend_from_slice(&chunk[..n]),
        }
    }
    let line = String::from_utf8_lossy(&head);
    line.strip_prefix("HTTP/1.")
        .and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
        .ok_or_else(|| "the answer is not HTTP".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokio::net::TcpListener;

    #[test]
    fn defaults_are_kubernetes() {
        let container = json!({"ports": [{"name": "http", "containerPort": 8080}],
            "readinessProbe": {"httpGet": {"path": "ready", "port": "http"}, "periodSeconds": 2}});
        let p = Probe::read(&json!({}), &container, "readinessProbe")
            .unwrap()
            .unwrap();
        assert_eq!(
            (
                p.period.as_secs(),
                p.timeout.as_secs(),
                p.success_threshold,
                p.failure_threshold
            ),
            (2, 1, 1, 3)
        );
        let Action::Http { port, path, .. } = p.action else {
            panic!("{:?}", p.action)
        };
        assert_eq!((port, path.as_str()), (8080, "/ready"));
    }

    #[test]
    fn what_is_not_asked_here_is_refused() {
        for (probe, part) in [
            (json!({"httpGet": {"port": 1, "scheme": "HTTPS"}}), "HTTPS"),
            (json!({"httpGet": {"port": "none"}}), "none"),
            (json!({"grpc": {"port": 1}}), "grpc"),
            (json!({}), "httpGet, tcpSocket or exec"),
        ] {
            let e = Probe::read(
                &json!({}),
                &json!({"livenessProbe": probe}),
                "livenessProbe",
            )
            .unwrap_err();
            assert!(e.starts_with("livenessProbe: ") && e.contains(part), "{e}");
        }
    }

    #[tokio::test]
    async fn the_status_decides() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            for status in ["204 No Content", "503 Service Unavailable"] {
                let (mut s, _) = listener.accept().await.unwrap();
                let mut buffer = [0; 1024];
                let n = s.read(&mut buffer).await.unwrap();
                assert!(
                    buffer[..n].starts_with(b"GET /x HTTP/1.1\r\nHost: a.b\r\n")
                        || buffer[..n].windows(9).any(|w| w == b"host: a.b")
                );
                s.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes())
                    .await
                    .unwrap();
            }
        });
        let action = Action::Http {
            host: None,
            port,
            path: "/x".into(),
            headers: vec![("host".into(), "a.b".into())],
        };
        let limit = Duration::from_secs(5);
        assert_eq!(ask(&action, Ipv4Addr::LOCALHOST, limit).await, Ok(()));
        assert!(
            ask(&action, Ipv4Addr::LOCALHOST, limit)
                .await
                .unwrap_err()
                .contains("status 503")
        );
        server.await.unwrap();
        assert!(
            ask(&Action::Tcp { port }, Ipv4Addr::LOCALHOST, limit)
                .await
                .is_err()
        );
    }
}
