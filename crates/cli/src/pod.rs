//! Talking to the processes of a running mesh: the admin interface of a pod's proxy, the control plane's pages.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, bail};

/// Asks the admin interface of a pod's proxy for `path`; gives the body.
///
/// `name` is POD, POD.NAMESPACE or deploy/NAME[.NAMESPACE].
pub(crate) fn admin(
    name: &str,
    namespace: Option<&str>,
    port: u16,
    path: &str,
) -> anyhow::Result<Vec<u8>> {
    let stream = local::reach::dial(None, name, namespace, port)?;
    get(stream, path).with_context(|| format!("admin interface of {name} (port {port})"))
}

/// Asks the control plane for `path`: the one at `address` (HOST:PORT of its monitoring port), or the local mesh's.
pub(crate) fn control_plane(address: Option<&str>, path: &str) -> anyhow::Result<Vec<u8>> {
    let address = match address {
        Some(address) => address.to_owned(),
        None => local::reach::control_plane(None)?.to_string(),
    };
    let stream = TcpStream::connect(&address)
        .with_context(|| format!("cannot reach the control plane at {address}: is it running?"))?;
    get(stream, path).with_context(|| format!("control plane at {address}"))
}

fn get(mut stream: TcpStream, path: &str) -> anyhow::Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let (status, body) = take_apart(&answer)?;
    if status != 200 {
        bail!(
            "{path}: status {status}: {}",
            String::from_utf8_lossy(&body).trim()
        );
    }
    Ok(body)
}

/// Status and body of a whole answer; a chunked body is put together.
fn take_apart(answer: &[u8]) -> anyhow::Result<(u16, Vec<u8>)> {
    let end = answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .context("the answer breaks off")?;
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .context("no HTTP answer")?;
    let mut rest = &answer[end + 4..];
    if !head.contains("transfer-encoding: chunked") {
        return Ok((status, rest.to_vec()));
    }
    let mut body = Vec::new();
    loop {
        let line = rest
            .windows(2)
            .position(|w| w == b"\r\n")
            .context("a chunk breaks off")?;
        let size = std::str::from_utf8(&rest[..line])?;
        let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)?;
        rest = &rest[line + 2..];
        if size == 0 {
            return Ok((status, body));
        }
        body.extend_from_slice(rest.get(..size).context("a chunk breaks off")?);
        rest = rest.get(size + 2..).context("a chunk breaks off")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_apart() {
        let plain = b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno";
        assert_eq!(take_apart(plain).unwrap(), (404, b"no".to_vec()));
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n";
        assert_eq!(take_apart(chunked).unwrap(), (200, b"abcde".to_vec()));
        assert!(
            take_apart(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc").is_err()
        );
        assert!(take_apart(b"nonsense").is_err());
    }
}
