//! One request to the Kubernetes API: the pod, by the kubeconfig that the installer wrote.
//!
//! The plug-in is started for each pod and asks once, so there is no client to keep: TLS over a blocking socket, and
//! HTTP/1.0, whose answer ends with the connection.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use serde::Deserialize;
use serde_json::Value;

use crate::CniError;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Kubeconfig {
    #[serde(default)]
    current_context: String,
    #[serde(default)]
    contexts: Vec<NamedContext>,
    #[serde(default)]
    clusters: Vec<NamedCluster>,
    #[serde(default)]
    users: Vec<NamedUser>,
}

#[derive(Debug, Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Debug, Deserialize)]
struct Context {
    cluster: String,
    #[serde(default)]
    user: String,
}

#[derive(Debug, Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Cluster {
    server: String,
    certificate_authority: String,
    certificate_authority_data: String,
    insecure_skip_tls_verify: bool,
    tls_server_name: String,
}

#[derive(Debug, Deserialize)]
struct NamedUser {
    name: String,
    user: User,
}

// No Debug for what is secret.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct User {
    token: String,
    #[serde(rename = "tokenFile")]
    token_file: String,
    client_certificate: String,
    client_certificate_data: String,
    client_key: String,
    client_key_data: String,
    exec: Option<Value>,
    auth_provider: Option<Value>,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("User")
    }
}

/// The pod of that name; none where the API knows none.
pub(crate) fn pod(path: &str, namespace: &str, name: &str) -> Result<Option<Value>, CniError> {
    get(
        path,
        &format!("/api/v1/namespaces/{namespace}/pods/{name}"),
        MAX_ANSWER,
    )
}

/// The pods of a node.
pub(crate) fn pods_of(path: &str, node: &str) -> Result<Vec<Value>, CniError> {
    let what = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{node}");
    let mut found = get(path, &what, MAX_LIST)?.unwrap_or_default();
    Ok(match found["items"].take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    })
}

/// What the API has at `what`, by the kubeconfig at `path`.
fn get(path: &str, what: &str, most: u64) -> Result<Option<Value>, CniError> {
    let text = read(path)?;
    let wrong = |field: &str, why: &str| CniError::Config {
        field: format!("{path}: {field}"),
        why: why.into(),
    };
    let text = String::from_utf8(text).map_err(|_| wrong("file", "it is not UTF-8"))?;
    // Errors of the parser may quote the text, and the text holds secrets.
    let config: Kubeconfig = serde_saphyr::from_str(&text).map_err(|_| {
        wrong(
            "file",
            "it is not a kubeconfig (YAML with clusters, users, contexts)",
        )
    })?;
    let context = config
        .contexts
        .iter()
        .find(|c| c.name == config.current_context)
        .ok_or_else(|| wrong("current-context", "no context has that name"))?;
    let cluster = config
        .clusters
        .into_iter()
        .find(|c| c.name == context.context.cluster)
        .ok_or_else(|| wrong("contexts.context.cluster", "no cluster has that name"))?
        .cluster;
    let user = config
        .users
        .into_iter()
        .find(|u| u.name == context.context.user)
        .map(|u| u.user)
        .unwrap_or_default();
    if user.exec.is_some() || user.auth_provider.is_some() {
        return Err(CniError::Unsupported {
            field: format!("{path}: users.user.exec"),
            why: "programs that fetch credentials are not run; give a token, tokenFile or client certificate".into(),
        });
    }
    let (host, port) = cluster
        .server
        .strip_prefix("https://")
        .map(|rest| rest.trim_end_matches('/'))
        .and_then(split)
        .ok_or_else(|| wrong("clusters.cluster.server", "https://HOST:PORT is expected"))?;
    let tls = tls(path, &cluster, &user)?;
    let server_name = match cluster.tls_server_name.is_empty() {
        true => host.clone(),
        false => cluster.tls_server_name.clone(),
    };
    let server_name = ServerName::try_from(server_name).map_err(|_| {
        wrong(
            "clusters.cluster.server",
            "the host is no name and no address",
        )
    })?;
    let token = match (&user.token, &user.token_file) {
        (token, _) if !token.is_empty() => token.clone(),
        (_, file) if !file.is_empty() => String::from_utf8(read(file)?)
            .map_err(|_| wrong("users.user.tokenFile", "it is not text"))?,
        _ => String::new(),
    };
    let token = token.trim();
    if token.bytes().any(|b| !b.is_ascii_graphic()) {
        return Err(wrong(
            "users.user.token",
            "it has characters that no token has",
        ));
    }
    let io = |e: std::io::Error| CniError::Io {
        what: cluster.server.clone(),
        why: e.to_string(),
    };
    let stream = TcpStream::connect((host.as_str(), port)).map_err(io)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(io)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(io)?;
    let connection =
        ClientConnection::new(Arc::new(tls), server_name).map_err(|e| CniError::Io {
            what: cluster.server.clone(),
            why: e.to_string(),
        })?;
    let mut stream = StreamOwned::new(connection, stream);
    let authorization = match token.is_empty() {
        true => String::new(),
        false => format!("authorization: Bearer {token}\r\n"),
    };
    write!(
        stream,
        "GET {what} HTTP/1.0\r\nhost: {host}\r\naccept: application/json\r\n\
         user-agent: outrigger-cni\r\n{authorization}\r\n"
    )
    .map_err(io)?;
    let mut answer = Vec::new();
    match stream.take(most).read_to_end(&mut answer) {
        // Some servers end the connection without a farewell of TLS.
        Err(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => return Err(io(e)),
        _ => {}
    }
    parse(&answer).map_err(|why| CniError::Io {
        what: cluster.server,
        why,
    })
}

/// Status and body of an answer.
fn parse(answer: &[u8]) -> Result<Option<Value>, String> {
    let at = answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .ok_or("the answer is not HTTP")?;
    let head = String::from_utf8_lossy(&answer[..at]);
    let status = head.split(' ').nth(1).unwrap_or_default();
    let body: Value = serde_json::from_slice(&answer[at + 4..])
        .map_err(|e| format!("status {status}, and the body is no JSON: {e}"))?;
    match status {
        "200" => Ok(Some(body)),
        "404" => Ok(None),
        _ => Err(format!(
            "status {status}: {}",
            body["message"].as_str().unwrap_or("no reason given")
        )),
    }
}

fn split(authority: &str) -> Option<(String, u16)> {
    if authority.contains('/') {
        return None;
    }
    match authority.rsplit_once(':') {
        Some((host, port))
            if !host.ends_with(':') && (!host.contains(':') || host.ends_with(']')) =>
        {
            let host = host.trim_start_matches('[').trim_end_matches(']');
            Some((host.into(), port.parse().ok()?))
        }
        None if !authority.is_empty() => Some((authority.into(), 443)),
        _ => None,
    }
}

fn tls(path: &str, cluster: &Cluster, user: &User) -> Result<ClientConfig, CniError> {
    let wrong = |field: &str, why: &str| CniError::Config {
        field: format!("{path}: {field}"),
        why: why.into(),
    };
    if cluster.insecure_skip_tls_verify {
        return Err(CniError::Unsupported {
            field: format!("{path}: clusters.cluster.insecure-skip-tls-verify"),
            why: "the server's certificate is always verified; give certificate-authority-data"
                .into(),
        });
    }
    let given = |data: &str, file: &str, field: &str| -> Result<Vec<u8>, CniError> {
        match (data.is_empty(), file.is_empty()) {
            (false, _) => BASE64_STANDARD
                .decode(data)
                .map_err(|_| wrong(field, "it is not base64")),
            (true, false) => read(file),
            (true, true) => Ok(Vec::new()),
        }
    };
    let authorities = given(
        &cluster.certificate_authority_data,
        &cluster.certificate_authority,
        "clusters.cluster.certificate-authority-data",
    )?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&authorities) {
        let bad = |_| {
            wrong(
                "clusters.cluster.certificate-authority",
                "a certificate cannot be read",
            )
        };
        roots
            .add(certificate.map_err(|_| bad(()))?)
            .map_err(|_| bad(()))?;
    }
    if roots.is_empty() {
        return Err(wrong(
            "clusters.cluster.certificate-authority-data",
            "the authority that signs the API server's certificate is needed",
        ));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| wrong("TLS", &e.to_string()))?
        .with_root_certificates(roots);
    let chain = given(
        &user.client_certificate_data,
        &user.client_certificate,
        "users.user.client-certificate-data",
    )?;
    if chain.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let key = given(
        &user.client_key_data,
        &user.client_key,
        "users.user.client-key-data",
    )?;
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&chain)
        .collect::<Result<_, _>>()
        .map_err(|_| wrong("users.user.client-certificate", "it cannot be read"))?;
    let key = PrivateKeyDer::from_pem_slice(&key)
        .map_err(|_| wrong("users.user.client-key", "it cannot be read"))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|e| wrong("users.user.client-certificate", &e.to_string()))
}

fn read(path: &str) -> Result<Vec<u8>, CniError> {
    fs::read(path).map_err(|e| CniError::Io {
        what: path.into(),
        why: e.to_string(),
    })
}

const PATIENCE: Duration = Duration::from_secs(5);
/// A pod is a few kilobytes; etcd takes no more than this.
const MAX_ANSWER: u64 = 4 << 20;
/// A full node has some hundred pods.
const MAX_LIST: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_taken_apart() {
        assert_eq!(split("10.96.0.1:443"), Some(("10.96.0.1".into(), 443)));
        assert_eq!(split("[fd00::1]:6443"), Some(("fd00::1".into(), 6443)));
        assert_eq!(split("kubernetes"), Some(("kubernetes".into(), 443)));
        for bad in ["fd00::1", "a:b", "a/b", ""] {
            assert_eq!(split(bad), None, "{bad}");
        }
    }

    #[test]
    fn answers_tell_found_missing_and_refused() {
        let answer = |status: &str, body: &str| {
            parse(format!("HTTP/1.0 {status}\r\na: b\r\n\r\n{body}").as_bytes())
        };
        assert!(answer("200 OK", "{\"kind\":\"Pod\"}").unwrap().is_some());
        assert!(answer("404 Not Found", "{}").unwrap().is_none());
        let refused = answer("403 Forbidden", "{\"message\":\"pods is forbidden\"}");
        assert!(refused.unwrap_err().contains("403: pods is forbidden"));
        assert!(parse(b"nothing").is_err());
    }
}
